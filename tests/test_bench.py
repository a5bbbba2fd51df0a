"""The benchmarks run, and what they compare is equal."""

import json

from conftest import run_script


def test_benchmarks_run_and_both_sides_agree(tmp_path):
    few = ("--rounds", 1, "--geometry", "tiny", "--completion_lengths", 4, "--num_generations", 2)
    def result(name, *flags):
        run_script(f"tests/bench_{name}.py", *flags, "--out", tmp_path / "result.json")
        return json.loads((tmp_path / "result.json").read_text())
    assert result("rollout", *few, "--prompts", 2)["time / ours, batched, prompts 2, C 4"]["rounds"] == 1
    grpo = result("grpo", *few)["C=4"]
    assert grpo["log-prob difference"] < 1e-5 and grpo["gradient difference, relative"] < 1e-4
    assert 0 < grpo["peak_mb"]["ours"] < grpo["peak_mb"]["naive"]
    assert result("sft", *few[:4], "--rows", 4, "--batch_size", 2)["gradient difference, relative"] < 1e-4
    assert result("synth", "--rounds", 1, "--count", 14, "--sources", 24)["JPEG/s, plain"]["median"] > 0
