"""The benchmarks run, and what they compare is equal. Times are for people: by hand, on a quiet machine."""

import json

from conftest import run_script


def test_benchmarks_run_and_both_sides_agree(tmp_path):
    few = ("--rounds", 1, "--completion_lengths", 4, "--num_generations", 2)
    run_script("tests/bench_rollout.py", *few, "--prompts", 2, "--out", tmp_path / "rollout.json")
    assert json.loads((tmp_path / "rollout.json").read_text())["batched / ours, C=4"]["rounds"] == 1
    run_script("tests/bench_grpo.py", *few, "--out", tmp_path / "grpo.json")
    result = json.loads((tmp_path / "grpo.json").read_text())["C=4"]
    assert result["log-prob difference"] < 1e-5 and result["gradient difference, relative"] < 1e-4
    assert 0 < result["peak_mb"]["ours"] < result["peak_mb"]["naive"]
    run_script("tests/bench_sft.py", "--rounds", 1, "--rows", 4, "--batch_size", 2, "--out", tmp_path / "sft.json")
    assert json.loads((tmp_path / "sft.json").read_text())["gradient difference, relative"] < 1e-4
