"""Training that is stopped from outside or stops itself: nothing lost, nothing wrong applied, one clean curve."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TWO_RANKS, run_script
from safetensors.torch import load_file

import train_grpo as g

TIMES = re.compile("time|per_second|mfu")
FLAGS = ("--max_steps", 6, "--train_batch_size", 4, "--num_generations", 3, "--max_completion_length", 12,
         "--learning_rate", 1e-3, "--reward_funcs", "letters", "--save_steps", 2)  # fmt: skip


def read(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not TIMES.search(k)} for row in rows]


def arguments(tiny_dir, synth_dir, out):
    return ("--model", tiny_dir, "--data", synth_dir / "samples.jsonl", "--output_dir", out, *FLAGS)


@pytest.fixture(scope="module")
def undisturbed(tiny_dir, synth_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_script("tests/grpo_letters.py", *arguments(tiny_dir, synth_dir, out))
    return out


def same_run(ours, theirs):
    ours_final, theirs_final = (load_file(d / "final/model.safetensors") for d in (ours, theirs))
    assert read(ours / "metrics.jsonl") == read(theirs / "metrics.jsonl")
    assert (ours / "samples.jsonl").read_text() == (theirs / "samples.jsonl").read_text()
    assert all((ours_final[k] == theirs_final[k]).all() for k in theirs_final)


def test_a_step_that_is_not_finite_is_not_applied(undisturbed, tiny_dir, synth_dir, tmp_path):
    """Rewards that are no numbers in step 4: the run stops there, names the samples, and goes on to the same end."""
    out = tmp_path / "run"
    flags = arguments(tiny_dir, synth_dir, out)
    done = run_script("tests/grpo_letters.py", *flags, check=False, POISON_AFTER=str(3 * 4 * 3))
    assert done.returncode != 0 and "step 4: loss nan, gradient not finite" in done.stderr
    assert "the step was not applied" in done.stderr and "Traceback" not in done.stderr
    bad = json.loads((out / "bad_step-00000.json").read_text())
    assert bad["step"] == 4 and len(bad["ids"]) == 4 and len(read(out / "metrics.jsonl")) == 3
    run_script("tests/grpo_letters.py", *flags)
    same_run(out, undisturbed)


@pytest.mark.parametrize("before, after, stage", [(1, 1, 2), (2, 1, 3), (1, 2, 2)])
def test_sigterm_saves_and_the_same_command_goes_on(before, after, stage, undisturbed, tiny_dir, synth_dir, tmp_path):
    """Also with another number of ranks: the same samples are drawn, the same is learned."""
    out, launchers = tmp_path / "run", {1: (sys.executable,), 2: TWO_RANKS}
    flags = arguments(tiny_dir, synth_dir, out) + (("--zero_stage", stage) if stage != 2 else ())
    command = [*launchers[before], str(ROOT / "tests/grpo_letters.py"), *map(str, flags)]
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=os.environ)
        while run.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) != 0
    said = (tmp_path / "log").read_text()
    step = int(re.search(r"SIGTERM: saved after step (\d)", said)[1])
    assert 1 <= step < 6 and (out / f"checkpoint-{step}/state.json").exists() and not (out / "final").exists()
    done = run_script("tests/grpo_letters.py", *flags, launcher=launchers[after])
    assert f"resuming from {out}/checkpoint-{step}" in done.stdout
    if before == after:
        return same_run(out, undisturbed)
    assert f"is of {before} ranks, now {after}" in done.stdout
    for ours, theirs in zip(read(out / "metrics.jsonl"), read(undisturbed / "metrics.jsonl"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    ours, theirs = (load_file(d / "final/model.safetensors") for d in (out, undisturbed))
    assert max((ours[k] - theirs[k]).abs().max().item() for k in theirs) < 1e-4


@pytest.mark.parametrize("file, size, message", [
    ("engine/zero_pp_rank_0_mp_rank_00_optim_states.pt", 0.5, "bytes; want"),
    ("model/model.safetensors", 0.9, "bytes; want"),
    ("engine/mp_rank_00_model_states.pt", None, "no file; want"),
    ("state.json", 0.5, "cut or damaged; want it as it was written"),
])  # fmt: skip
def test_a_checkpoint_cut_in_half_is_named_and_the_one_before_goes_on(
    file, size, message, undisturbed, tiny_dir, synth_dir, tmp_path
):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(out / "final")
    cut = next((out / "checkpoint-4").glob(file.replace("zero", "*zero")))
    if size:
        os.truncate(cut, int(cut.stat().st_size * size))
    else:
        cut.unlink()
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file() and f.name != ".lock"}
    done = run_script("tests/grpo_letters.py", *arguments(tiny_dir, synth_dir, out), check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr and str(cut) in done.stderr
    assert message in done.stderr and "remove this checkpoint" in done.stderr and "DeepSpeed ZeRO" not in done.stdout
    assert {f: f.read_bytes() for f in before} == before
    if message.startswith("cut"):  # once is enough
        shutil.rmtree(out / "checkpoint-4")
        done = run_script("tests/grpo_letters.py", *arguments(tiny_dir, synth_dir, out))
        assert f"resuming from {out}/checkpoint-2" in done.stdout
        same_run(out, undisturbed)


def test_troubles_are_named_once_with_their_cause():
    fine = {"step": 6, "reward": 0.4, "parse_rate": 0.9, "completions/clipped_ratio": 0.1, "entropy": 1.0, "kl": 0.01}
    assert g.likely_troubles([fine] * 12) == {}
    cases = [
        ([fine | {"reward": 0.0}] * 10, "reward 0 for 10 logged steps"),
        ([fine | {"step": 1, "parse_rate": 0.04}], "fewer than 5 %"),
        ([fine | {"completions/clipped_ratio": 1.0}] * 3, "all completions were cut"),
        ([fine, fine | {"entropy": 0.09}], "entropy fell"),
        ([fine | {"kl": 3.0}], "kl above 1"),
    ]
    for rows, trouble in cases:
        (found,) = g.likely_troubles(rows)
        assert found.startswith(trouble)
    assert g.likely_troubles([fine | {"reward": 0.0}] * 9) == {}


def test_two_runs_into_one_folder_at_once_are_refused(tiny_dir, synth_dir, world_dir, tmp_path):
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); time.sleep(300)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    other.stdout.readline()
    runs = [
        ("synth_data.py", "--source", world_dir / "train", "--out", tmp_path, "--num_samples", 4),
        ("gen_cot.py", "--samples", synth_dir / "samples.jsonl", "--out", tmp_path, "--knowledge",
         world_dir / "knowledge.json"),
        ("tests/grpo_letters.py", *arguments(tiny_dir, synth_dir, tmp_path)),
    ]  # fmt: skip
    for run in runs:
        done = run_script(*run, check=False)
        assert done.returncode != 0 and f"{tmp_path}: another run writes here" in done.stderr
    other.kill()
    other.wait()
    run_script(*runs[0])


@pytest.mark.parametrize("blocks", [200, 1200])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoints_before(blocks, undisturbed, tiny_dir, synth_dir, tmp_path):
    """A limit on the size of a file (1,024-byte blocks) stands for the disk; it comes while checkpoint-4 is written."""
    out = tmp_path / "run"
    flags = arguments(tiny_dir, synth_dir, out)
    run_script("tests/grpo_letters.py", *flags, "--max_steps", 3)
    (out / "config.json").write_text((undisturbed / "config.json").read_text())
    full = ("bash", "-c", f'ulimit -f {blocks}; exec "$@"', "bash", sys.executable)
    done = run_script("tests/grpo_letters.py", *flags, launcher=full, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "checkpoint-4.tmp" in done.stderr and "not written" in done.stderr and "GiB are free" in done.stderr
    assert (out / "checkpoint-2/state.json").exists() and not (out / "checkpoint-4").exists()


@pytest.mark.parametrize("folder, message", [("file", "File exists"), ("file/run", "Not a directory")])
def test_an_output_that_cannot_be_written_is_one_line(folder, message, synth_dir, world_dir, tmp_path):
    (tmp_path / "file").write_text("")
    inputs = ("--samples", synth_dir / "samples.jsonl", "--knowledge", world_dir / "knowledge.json")
    done = run_script("gen_cot.py", *inputs, "--out", tmp_path / folder, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"{tmp_path / folder}: {message}; want a place that can be written" in done.stderr
