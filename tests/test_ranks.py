"""What may happen to a run: two ranks, SIGTERM, SIGKILL, a loss that is no number. All end as the undisturbed one."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import TWO_RANKS, metrics_of, train
from safetensors.torch import load_file

HARD = ("--beta", 0.04, "--num_iterations", 2)  # as the undisturbed run of train_grpo

def assert_same_run(ours, theirs, exact=True):
    """Metrics, rollouts and weights: bit for bit, or to what another order of sums leaves over."""
    for a, b in zip(metrics_of(ours), metrics_of(theirs), strict=True):
        assert a == (b if exact else pytest.approx(b, rel=1e-5, abs=1e-5))
    assert not exact or (ours / "samples.jsonl").read_bytes() == (theirs / "samples.jsonl").read_bytes()
    a, b = (load_file(out / "final/model.safetensors") for out in (ours, theirs))
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= (0 if exact else 1e-4) for k in b)

@pytest.fixture(scope="session")
def signal_on_some_rows(tiny_dir, synth_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("some") / "one"
    train("train_grpo", out, tiny_dir, synth_dir / "samples.jsonl", "--reward_funcs", "some")
    taught = [1 - m["frac_reward_zero_std"] for m in metrics_of(out)]
    assert any(0 < share < 1 for share in taught)
    assert all((m["grad_norm"] > 0) == (share > 0) for m, share in zip(metrics_of(out), taught, strict=True))
    return out

@pytest.mark.parametrize("script, flags", [
    ("train_sft", ("--zero_stage", 3)),
    ("train_sft", ("--zero_stage", 2, "--tokens_per_row", 1)),
    ("train_grpo", ("--zero_stage", 2, "--tokens_per_row", 1, "--reward_funcs", "some")),
    ("train_grpo", ("--zero_stage", 3, *HARD)),
])  # fmt: skip
def test_two_ranks_compute_what_one_computes(script, flags, runs, signal_on_some_rows, tiny_dir, synth_dir, tmp_path):
    """Also with a row per group, so that ranks have more or fewer of them, and one none at all in the last step. The
    last case is stopped by a SIGTERM to one rank, and goes on."""
    one, two = signal_on_some_rows if "some" in flags else runs[script], tmp_path / "two"
    command = (script, two, tiny_dir, synth_dir / "samples.jsonl", *flags)
    if flags[2:] == HARD:
        done = train(*command, launcher=TWO_RANKS, check=False, TERM_AT="1")
        assert done.returncode != 0 and "SIGTERM: saved after step 2; the same command goes on" in done.stderr
    done = train(*command, launcher=TWO_RANKS)
    assert "4 steps of 4" in done.stdout and "2 ranks on cpu, torch.float32" in done.stdout
    assert (f"goes on from {two}/checkpoint-2" in done.stdout) == (flags[2:] == HARD)
    assert_same_run(two, one, exact=False)
    if script == "train_grpo":  # rank 0 logs two of its groups, word for word those of one rank
        ours, theirs = ({(s["step"], s["id"]): [c["text"] for c in s["completions"]] for s in map(json.loads, rows)}
                        for rows in ((out / "samples.jsonl").open() for out in (two, one)))  # fmt: skip
        both = ours.keys() & theirs.keys()
        assert len(both) >= 4 and all(ours[key] == theirs[key] for key in both)

def test_grpo_ends_the_same_after_a_kill_in_a_checkpoint_and_a_loss_of_nan(runs, tiny_dir, synth_dir, tmp_path):
    out = tmp_path / "run"
    command = ("train_grpo", out, tiny_dir, synth_dir / "samples.jsonl", *HARD, "--keep_checkpoints")
    assert train(*command, check=False, KILL_AT="checkpoint-2").returncode == -9
    assert (out / "checkpoint-2.tmp").exists() and not (out / "checkpoint-2").exists()
    done = train(*command, check=False, NAN_AFTER=str(3 * 4 * 3 - 1))  # from step 1 again; of step 3 the last one
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train_grpo: step 3: loss nan, ")
    assert [m["step"] for m in metrics_of(out)] == [1, 2] and not (out / "checkpoint-2.tmp").exists()
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "lo')
    done = train(*command, "--tokens_per_row", 4096)
    assert "{'tokens_per_row': '8192 -> 4096'}" in done.stdout and f"goes on from {out}/checkpoint-2" in done.stdout
    assert_same_run(out, runs["train_grpo"])
    assert f"{out}/final exists; want another" in train(*command).stdout
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"]

def test_sft_ends_the_same_after_a_sigterm(runs, tiny_dir, synth_dir, tmp_path):
    out = tmp_path / "run"
    command = ("train_sft", out, tiny_dir, synth_dir / "samples.jsonl", "--save_steps", 0)
    done = train(*command, check=False, TERM_AT="1")
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (out / "final").exists()
    assert done.stderr.splitlines()[-1] == "SIGTERM: saved after step 2; the same command goes on from there"
    train(*command)
    assert_same_run(out, runs["train_sft"])
    assert not [*out.glob("checkpoint-*")], "of no more use"

def test_another_number_of_ranks_needs_the_command_that_is_named(runs, tiny_dir, synth_dir, tmp_path):
    out = shutil.copytree(runs["train_sft"], tmp_path / "run")
    assert sorted(p.name[-2:] for p in out.glob("checkpoint-*")) == ["-1", "-2", "-3"], "--save_total_limit"
    shutil.rmtree(out / "final")
    command = ("train_sft", out, tiny_dir, synth_dir / "samples.jsonl")
    done = train(*command, check=False, launcher=TWO_RANKS)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr and "'ranks': '1 -> 2'" in done.stdout
    assert "want 1 ranks, or: cd " in error
    make = error.split("or: ")[1].replace("python -m", f"{sys.executable} -m")
    subprocess.run(make, shell=True, capture_output=True, check=True)
    done = train(*command, launcher=TWO_RANKS)
    assert f"goes on from {out}/checkpoint-3" in done.stdout
    assert_same_run(out, runs["train_sft"], exact=False)
