"""filter.py: every rule for chains rejects its own case; difficulty and mastery are counted from predictions."""

import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT
from test_synth_data import write

import filter as f

BOX = "(10,20),(300,400)"
ANSWER = f"<|object_ref_start|>Lo<|object_ref_end|><|box_start|>{BOX}<|box_end|>"
OTHER = ANSWER.replace("10", "11")
THINK = f"Planning: Lo is red, nothing else is.\nI see two objects here and compare them with care.\nLo is at {BOX}."
ARGS = f.parse_args(["--stage", "cot", "--samples", "x", "--out", "y", "--max_words", "60"])

def row(think=THINK, answer=ANSWER, text=None, **more):
    text = f"<think>\n{think}\n</think> <answer>{answer}</answer>" if text is None else text
    said = [("user", "<image>Find <|object_ref_start|>Lo<|object_ref_end|>"), ("assistant", text)]
    return {"images": ["a.png"], "answer": ANSWER, "messages": [{"role": r, "content": c} for r, c in said]} | more

def read(path):
    return json.loads(path.read_text()) if path.suffix == ".json" else list(map(json.loads, open(path)))

def run(stage, out, **flags):
    with pytest.MonkeyPatch.context() as patch:
        flags = [str(x) for key, value in flags.items() for x in (f"--{key}", value)]
        patch.setattr(sys, "argv", ["filter.py", "--stage", stage, "--out", str(out), *flags])
        f.main()

@pytest.mark.parametrize("bad, rule", [
    *[(bad, "not one <think>") for bad in (row(text=f"Lo is at {BOX}"), row(THINK + "</think><think>"))],
    *[(row(answer=ANSWER.replace("10", x)), "answer is not") for x in ("20", "1", "300")],
    *[(row(answer="".join(two)), "answer is not") for two in ((ANSWER, OTHER), (OTHER, ANSWER))],
    *[(row(think), "not 20 to 60 words") for think in ("Lo is here.", THINK * 5)],
    *[(row(THINK.replace("Lo", name)), "target not named") for name in ("Mi", "Lower")],
    *[(row(THINK + token), "markup") for token in ("<|im_end|>", "<|box_start|>", "<image>")],
    *[(row(f"{THINK} It may be (10,20),({end})."), "a box in the reasoning") for end in ("3000,400", "300,4000")],
    *[(row(f"{THINK} No: (10,20),({x},400)."), "ends at another box") for x in ("150", "999")],  # IoU 0.48, 0.29
    (row(THINK + "\nso on" * 4 + "\nor not"), "repeats itself"),
])  # fmt: skip
def test_each_rule_rejects_its_own_chain(bad, rule):
    assert f.broken_row(bad, Counter(), ARGS).startswith(rule)
    assert not f.broken_row(row(f"{THINK} Or (10,20),(160,400)." + "\nso on" * 3), Counter(), ARGS), "IoU 0.52"

def test_rows_of_other_origin_are_read_once_and_their_images_found_from_the_new_folder(tmp_path):
    think = THINK.replace("two objects", "<|object_ref_start|>Porsche 911 (901, 930, 964, 993)<|object_ref_end|>")
    think, pictures = think.replace(BOX, f"<|box_start|>{BOX}<|box_end|>"), tmp_path / "pictures"
    images = {"images": ["a"]}, {"images": [str(pictures / "b")]}, {"image": "c"}, {"images": ["a"]}
    rows = [{"messages": row(think)["messages"]} | at for at in images]
    run("cot", tmp_path / "o/k", samples=write(tmp_path / "rows.jsonl", rows), image_root=pictures)
    kept, (rejected,) = read(tmp_path / "o/k/samples.jsonl"), read(tmp_path / "o/k/rejected.jsonl")
    assert [r["id"] for r in kept] == [1, 2, 3] and rejected["reason"] == "duplicate"
    assert ["image" in r for r in kept] == [False] * 3 and kept[1]["images"] == [str(pictures / "b")]
    found = [os.path.normpath(tmp_path / "o/k" / r["images"][0]) for r in [*kept, rejected]]
    assert found == [str(pictures / name) for name in "abca"]

IOUS = {"none": [0, 0.49, 0, 0], "one": [0.5, 0, 0, 0.1], "three": [0.5, 0.8, 0.79, 0.2], "all": [0.5, 0.9, 1, 0.7]}

def test_rows_that_are_solved_sometimes_are_kept_with_both_pass_rates(tmp_path):
    answers = [{"question_id": q, "sample": k, "entity": "A" if q in ("none", "one") else "B", "iou": iou}
               for q, ious in IOUS.items() for k, iou in enumerate(ious)]  # fmt: skip
    files = {"samples": write(tmp_path / "s", [row(id=q) for q in IOUS]), "predictions": write(tmp_path / "p", answers)}
    run("grpo", tmp_path, **files)
    kept, rejected = read(tmp_path / "samples.jsonl"), read(tmp_path / "rejected.jsonl")
    assert [(r["id"], r["pass_rate"], r["num_rollouts"]) for r in kept] == [("one", 0.25, 4), ("three", 0.75, 4)]
    assert [r["pass_rate_at"] for r in kept] == [{"0.5": 0.25, "0.8": 0.0}, {"0.5": 0.75, "0.8": 0.25}]
    assert [(r["id"], r["reason"]) for r in rejected] == [("none", "too hard"), ("all", "trivial")]
    assert read(tmp_path / "mastery.json") == {"A": {"mastery": 0.125, "n": 2}, "B": {"mastery": 0.875, "n": 2}}
    for flags, want in (({"iou": 0.8}, ["three", "all"]), ({"min_correct": 0, "max_correct": 1}, ["none", "one"])):
        run("grpo", tmp_path, **files, **flags)
        assert [r["id"] for r in read(tmp_path / "samples.jsonl")] == want
    write(tmp_path / "p", answers[:-1])
    with pytest.raises(f.InputError, match="p: 3 answers to all; want 4 with an iou"):
        run("grpo", tmp_path, **files)

def test_mastery_is_the_share_of_choices_that_are_right(tmp_path):
    said = [("A", True), ("A", True), ("B", True), ("B", False), ("C", False)]
    rows = [{"question_id": i, "options": ["A", "B", "C"], "answer": e, "correct": c} for i, (e, c) in enumerate(said)]
    run("mastery", tmp_path, predictions=write(tmp_path / "p", [*rows, {"question_id": 9, "entity": "Z", "iou": 0.3}]))
    found = {e: (m["mastery"], m["n"]) for e, m in read(tmp_path / "mastery.json").items()}
    assert found == {"A": (1, 2), "B": (0.5, 2), "C": (0, 1)}

def test_a_killed_run_ends_in_the_same_bytes(tmp_path):
    rows = [row(THINK.replace("two", f"{i}"), id=i) for i in range(9000)]
    command = [sys.executable, ROOT / "filter.py", "--stage", "cot", "--samples", write(tmp_path / "s", rows), "--out"]
    subprocess.run([*command, tmp_path / "a"], check=True)
    killed = subprocess.Popen([*command, tmp_path / "b"])
    while not (tmp_path / "b/run.json").exists():
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -9 and not (tmp_path / "b/samples.jsonl").exists()
    subprocess.run([*command, tmp_path / "b"], check=True)
    for name in ("samples.jsonl", "rejected.jsonl", "stats.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
