"""The short form of faults.py: every stage is killed once; `python tests/faults.py` kills 42 times."""

import subprocess
import sys

from conftest import ROOT


def test_a_kill_in_every_stage_loses_nothing():
    command = [sys.executable, str(ROOT / "tests/faults.py"), "--kills", "7", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "faults: 7 kills over 7 commands, 0 differences" in done.stdout
