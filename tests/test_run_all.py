"""run_all.sh: finished stages are skipped, a stage can be named, mistakes get one line; the real recipe on toys."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

STAGES = (
    [line for line in (ROOT / "run_all.sh").read_text().splitlines() if line.startswith("STAGES=")][0]
    .split('"')[1]
    .split()
)


def run_all(*args, **env):
    command = ["bash", str(ROOT / "run_all.sh"), *args]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=os.environ | {"PYTHON": sys.executable} | env
    )


@pytest.fixture
def finished(tmp_path):
    """A run folder in which every stage is done."""
    (tmp_path / ".done").mkdir()
    for i, name in enumerate(STAGES):
        (tmp_path / ".done" / name).write_text(f"{i}\n")
    for i, name in enumerate(("base", "sft", "cot_sft", "grpo")):
        m = {"n": 4, "acc": 0.25 * (i + 1), "acc_ci95": [0.1, 0.9], "mean_iou": 0.5, "parse_rate": 1.0}
        (tmp_path / f"eval_{name}").mkdir()
        path = tmp_path / f"eval_{name}" / "metrics.json"
        path.write_text(json.dumps({"all": m, "seen": m, "unseen": None, "categories": {}}))
        os.utime(path, (1e9 + i, 1e9 + i))
    return tmp_path


def test_a_finished_run_only_prints_its_table(finished):
    done = run_all(RUN=str(finished))
    assert done.returncode == 0 and "==" not in done.stdout, done.stderr
    results = json.loads((finished / "results.json").read_text())
    assert [r["model"] for r in results["rows"]] == ["base", "sft", "cot_sft", "grpo"] and set(
        results["seconds"]
    ) == set(STAGES)
    accuracies = {"seen": 1.0, "unseen": None, "all": 1.0}
    intervals = {"seen": [0.1, 0.9], "unseen": None, "all": [0.1, 0.9]}
    expected = {"model": "grpo", "n": 4, **accuracies, "mean_iou": 0.5, "parse_rate": 1.0, "ci95": intervals}
    assert results["rows"][3] == expected
    assert "| grpo" in done.stdout and str(finished / "results.json") in done.stdout


def test_from_forgets_that_stage_and_all_after_it(finished):
    """The stage itself then fails here, because its input is not there: that is where this test stops."""
    done = run_all(RUN=str(finished), FROM="train_grpo")
    assert done.returncode != 0 and "== train_grpo" in done.stdout and "no such file" in done.stderr
    assert {p.name for p in (finished / ".done").iterdir()} == set(STAGES[: STAGES.index("train_grpo")])
    assert not (finished / "eval_grpo").exists()


def test_mistakes_get_one_line(tmp_path):
    cases = [
        (("tset",), {}, "usage: bash run_all.sh"),
        ((), {"MODEL": "x"}, "want DATA="),
        ((), {"MODEL": "x", "DATA": "d", "BENCH": "b", "TEACHER": "knowledge"}, "no knowledge.json in or above"),
    ]
    for args, env, message in [*cases, ((), {"FROM": "train"}, "FROM=train: no such stage")]:
        done = run_all(*args, RUN=str(tmp_path), **env)
        assert done.returncode != 0 and message in done.stderr


def test_box_model_is_asked_by_all_processes_in_the_first_stage_that_wants_boxes(tmp_path):
    """With a Python that only says what it was called with."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$@"\n')
    python.chmod(0o755)
    real = {"MODEL": "m", "DATA": "d", "BENCH": "b", "TEACHER": "knowledge:k", "NPROC": "2", "PYTHON": str(python)}
    for model in ("", "org/boxes"):
        done = run_all(RUN=str(tmp_path / f"run{model}"), BOX_MODEL=model, **real)
        assert done.returncode == 0, done.stderr
        calls = [line for line in done.stdout.splitlines() if "synth_data.py --source d" in line]
        assert len(calls) == 2 and all(("--box_model org/boxes" in c) == bool(model) for c in calls)
        assert ["torch.distributed.run" in c for c in calls] == [bool(model), False]


def test_the_real_recipe_runs_on_the_toys_files_with_two_ranks(world_dir, tmp_path):
    """The code path of an 8-GPU node: MODEL, DATA, BENCH and TEACHER from outside, torchrun, the paper's flags; only
    sizes are cut. A second call finds all done, and `forget` forgets.
    """
    toy = "--canvas_size 168 112 --grid 3 2 --layouts grid --background gradient --entity_scale 0.6 0.95"
    short, mastery = "--max_completion_length 160", f"--knowledge {tmp_path}/filter_grpo/mastery.json"
    env = dict(MODEL="tests/toy/base", DATA=str(world_dir / "train"), BENCH=str(world_dir / "kvg-bench.parquet"),
               TEACHER="knowledge", RUN=str(tmp_path), NPROC="2", N_SFT="96", N_GRPO="16", SEEN="disc square",
               SYNTH_FLAGS=f"{toy} --exclude_distance 0", SFT_FLAGS="--learning_rate 1e-3", EVAL_FLAGS=short,
               FILTER_FLAGS=f"{short} --min_correct 0 --max_correct 4",
               GRPO_FLAGS=f"{short} --max_steps 2 --zero_stage 3 {mastery}")  # fmt: skip
    done = run_all(**env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["model"] for r in results["rows"]] == ["base", "sft", "cot_sft", "grpo"]
    assert len({r["n"] for r in results["rows"]}) == 1 and results["rows"][0]["seen"] is not None
    assert set(results["seconds"]) == set(STAGES) - {"world"}, "the toy world is not the real recipe's"
    for name in ("train_sft", "train_cot_sft", "train_grpo"):
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert run["derived"]["world_size"] == 2 and run["args"]["train_batch_size"] == 16
        assert len(list((tmp_path / name).glob("heartbeat-*.log"))) == 2
        assert (tmp_path / name / "final/model.safetensors").exists()
    assert "DeepSpeed ZeRO-2" in done.stdout and "DeepSpeed ZeRO-3" in done.stdout
    assert "==" not in run_all(**env).stdout
    assert run_all("forget", FROM="eval_grpo", **env).returncode == 0
    assert not (tmp_path / ".done/eval_grpo").exists() and (tmp_path / ".done/eval_cot_sft").exists()


def test_a_stage_is_not_forgotten_by_every_node(finished):
    done = run_all(RUN=str(finished), FROM="train_grpo", NNODES="2")
    assert done.returncode != 0 and "FROM=train_grpo bash run_all.sh forget" in done.stderr
    assert (finished / "eval_grpo").exists()
