"""Filters: every rule for chains rejects its own case; difficulty is measured, resumable, and equal on two ranks."""

import json
import sys
from types import SimpleNamespace

import pytest
from conftest import run_script

import filter as f

ANSWER = "<|object_ref_start|>Lo<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|>"
THINK = "Planning: Lo is red.\nI see two objects here and compare them.\nLo is at (10,20),(300,400)."
ARGS = SimpleNamespace(min_words=10, max_words=50, max_repeats=3)


def sample(think=THINK, answer=ANSWER, **changes):
    base = {
        "completion": f"<think>\n{think}\n</think> <answer>{answer}</answer>",
        "bbox_1000": [10, 20, 300, 400],
        "entity": "Lo",
        "image_id": "a",
    }
    return base | changes


@pytest.mark.parametrize("bad, rule", [
    (sample(completion="Lo is at (10,20),(300,400)"), "not one <think>"),
    (sample(completion=None), "not one <think>"),
    (sample(THINK + "</think><think>"), "not one <think>"),
    (sample(answer=ANSWER.replace("10,20", "20,20")), "answer is not"),
    (sample(answer=ANSWER + ANSWER.replace("10", "11")), "answer is not"),
    (sample("Lo is here."), "not 10 to 50 words"),
    (sample(THINK * 5), "not 10 to 50 words"),
    (sample(THINK.replace("Lo", "Mi")), "does not name"),
    (sample(THINK + " It may be (10,20),(3000,400)."), "a box in the reasoning"),
    (sample(THINK + " No: (500,500),(900,900)."), "reasoning ends at another box"),
    (sample(THINK + "\nso on" * 4), "repeats itself"),
])  # fmt: skip
def test_each_rule_rejects_its_own_chain(bad, rule):
    assert f.broken_rule(bad, set(), ARGS).startswith(rule)


def test_a_sound_chain_is_kept_once():
    seen = set()
    assert f.broken_rule(sample(), seen, ARGS) is None
    assert f.broken_rule(sample(), seen, ARGS) == "duplicate"
    assert f.broken_rule(sample(image_id="b"), seen, ARGS) is None


@pytest.fixture(scope="module")
def cot_dir(world_dir, synth_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("cot")
    run_script(
        "gen_cot.py",
        "--samples",
        synth_dir / "samples.jsonl",
        "--knowledge",
        world_dir / "knowledge.json",
        "--out",
        out,
    )
    return out


def test_cot_stage_keeps_sound_rows_and_names_the_rule_of_the_others(cot_dir, tmp_path):
    rows = [json.loads(line) for line in (cot_dir / "samples.jsonl").read_text().splitlines()]
    rows[3]["messages"][1]["content"] = "nothing"
    (tmp_path / "in").mkdir()
    for r in rows:
        r["images"] = [str(cot_dir / i) for i in r["images"]]
    (tmp_path / "in" / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run_script("filter.py", "--stage", "cot", "--samples", tmp_path / "in" / "samples.jsonl", "--out", tmp_path / "out")
    kept = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    (rejected,) = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [r["id"] for r in kept] == [r["id"] for i, r in enumerate(rows) if i != 3] and rejected["reason"].startswith(
        "not one <think>"
    )
    assert all((tmp_path / "out" / r["images"][0]).is_file() for r in kept)


def measure(synth_dir, tiny_dir, out, *flags, launcher=(sys.executable,), check=False):
    """A random model solves nothing: keep 0 of 3 too, so that rows come out."""
    return run_script("filter.py", "--stage", "grpo", "--model", tiny_dir, "--samples", synth_dir / "samples.jsonl",
                      "--out", out, "--num_rollouts", 3, "--min_correct", 0, "--max_completion_length", 8, *flags,
                      launcher=launcher, check=check)  # fmt: skip


def test_difficulty_is_the_same_after_a_kill_and_on_two_ranks(synth_dir, tiny_dir, tmp_path):
    measure(synth_dir, tiny_dir, tmp_path / "a", check=True)
    want = (tmp_path / "a" / "samples.jsonl").read_bytes()
    rows = [json.loads(line) for line in want.splitlines()]
    assert len(rows) == 12 and all(r["pass_rate"] == 0 and r["num_rollouts"] == 3 for r in rows)
    assert (tmp_path / "a" / "pass_rate.png").exists() and json.loads((tmp_path / "a" / "mastery.json").read_text())
    part = tmp_path / "a" / "part-0.jsonl"
    part.write_bytes(part.read_bytes()[:200])
    (tmp_path / "a" / "samples.jsonl").unlink()
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29613")
    measure(synth_dir, tiny_dir, tmp_path / "a", launcher=launcher, check=True)
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == want


def test_nothing_kept_is_an_error_with_the_reasons(synth_dir, tiny_dir, tmp_path):
    done = measure(synth_dir, tiny_dir, tmp_path, "--min_correct", 1)
    assert (
        done.returncode != 0
        and "0 of 12 rows kept" in done.stderr
        and "12 too hard" in done.stdout
        and "Traceback" not in done.stderr
    )


def test_bad_flags_and_rows_get_one_clear_line(synth_dir, tiny_dir, tmp_path):
    row = (synth_dir / "samples.jsonl").read_text().splitlines()[0]
    (tmp_path / "twice.jsonl").write_text(f"{row}\n{row}\n")
    for flags, message in (
        (("--num_rollouts", 1), "--num_rollouts >= 2"),
        (("--samples", tmp_path / "twice.jsonl"), "occurs twice"),
        (("--model", "nowhere"), "nowhere: no model"),
    ):
        done = measure(synth_dir, tiny_dir, tmp_path / "o", *flags)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
