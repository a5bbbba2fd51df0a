"""The walk over a GPU, at tiny sizes on the CPU."""

import json
import math

from conftest import run_script


def test_the_walk_runs_without_a_gpu_and_writes_finite_numbers(tmp_path):
    checks, out = ("versions", "kernels", "rollouts", "step_7b"), tmp_path / "rows.json"  # no trainers, for time
    table = run_script("tests/gpu_check.py", "--out", out, "--checks", *checks).stdout
    rows = json.loads(out.read_text())
    assert len(rows) == 10 and "cpu, tiny" in rows[0]["line"] and all(r["line"] in table for r in rows)
    for r in rows:
        numbers = [v for v in r["measured"].values() if not isinstance(v, str)]
        assert all(map(math.isfinite, numbers)) and "error" not in r["measured"], r
        assert r["ok"] or r["check"].startswith("7b"), f"what is to be exact on a GPU is exact here: {r}"
    assert [r["check"] for r in rows][-2:] == ["7b, P = 53, C = 6", "7b, C = 6, plain, 2 x one prompt"]
