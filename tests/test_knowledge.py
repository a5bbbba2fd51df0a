"""Knowledge-aware GRPO: the levels, the two forms, what the published one nearly cancels to, and two runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAIN_FLAGS, metrics_of, run_script
from test_train_grpo import arguments

import train_grpo as g
from tools import karl

HIT, MISS, NO_BOX = "<answer>(0,0),(100,90)</answer>", "<answer>(0,0),(9,9)</answer>", "<answer>?</answer>"
NAMES = list(karl.LEVELS)

def scored(texts, level, form, monkeypatch, **changes):
    """(rewards, advantages) of a group with these completions, by the step's own code."""
    monkeypatch.setattr(g, "rollout", lambda *args: [[([i], torch.zeros(1), True) for i in range(len(texts))]])
    tokenizer = SimpleNamespace(decode=lambda ids: texts[ids[0]])
    engine = SimpleNamespace(module=SimpleNamespace(model=None, parameters=lambda: ()), optimizer=None)
    base = dict(reward_funcs=["karl" if form == "reward" else "iou"], reward_weights=[1.0], iou_threshold=0.65)
    base["num_generations"] = len(texts)
    prompt = {"id": "0", "epoch": 0, "level": level, "bbox_1000": [0, 0, 100, 100], "grid": (1000, 1000)}
    prompt["prompt_ids"] = [1]
    score = karl.score_and_weigh if form else g.rollout_and_score
    score(engine, (tokenizer, None, None), [prompt], 1, arguments(**base | changes), {})
    return [[getattr(c, key) for c in prompt["completions"]] for key in ("reward", "advantage")]

@pytest.mark.parametrize("mastery, level", [
    (1.0, 0), (0.7, 0), (0.699, 1), (0.45, 1), (0.449, 2), (0.3, 2), (0.299, 3), (0.1, 3), (0.099, 4), (0.0, 4)
])  # fmt: skip
def test_levels_begin_where_they_are_published_to_and_one_of_another_name_is_refused(mastery, level, tmp_path):
    table = {"Lo": {"mastery": mastery, "n": 3}, "Mi": {"knowledge_category": NAMES[level]}}
    read, path = [{"id": str(i), "entity": name} for i, name in enumerate(("Lo", "Mi", "Lo"))], tmp_path / "m.json"
    path.write_text(json.dumps(table))
    karl.add_levels(read, [], path)
    assert [s["level"] for s in read] == [NAMES[level]] * 3, "both forms of the file"
    path.write_text(json.dumps(table | {"Mi": {"knowledge_category": "known"}}))
    with pytest.raises(g.InputError, match=r"m.json: 'Mi', target of 1: .*; want its mastery, 0..1"):
        karl.add_levels(read, [], path)

@pytest.mark.parametrize("level, hit, miss", [
    ("completely correct", 0.585, -0.6), ("mostly correct", 0.765, -0.5), ("partially correct", 0.9, -0.4),
    ("mostly incorrect", 1.0, -0.2), ("completely incorrect", 1.0, 0.0),
])  # fmt: skip
def test_published_reward(level, hit, miss, monkeypatch):
    """At IoU .9: scaled and capped; a wrong box and an answer without one are punished, no answer is not."""
    texts = [HIT, MISS, NO_BOX, "", "<answer>(0,0),(9,9)", "<answer>(0,0),(100,65)</answer>"]
    assert scored(texts, level, "reward", monkeypatch)[0] == pytest.approx([hit, miss, miss, 0, 0, miss])
    assert scored(texts, level, "advantage", monkeypatch)[0] == pytest.approx([0.9, 0, 0, 0, 0, 0])

def test_the_published_form_cancels_where_the_advantage_form_does_not(monkeypatch):
    """One hit with IoU .9 and three misses: the same advantages for all levels as for plain IoU, to 1e-2."""
    texts = [HIT, MISS, MISS, MISS]
    for level, up, down in zip(NAMES, (0.65, 0.85, 1.0, 1.2, 1.4), (1.5, 1.25, 1.0, 0.5, 0.0), strict=True):
        for form in (None, "reward"):
            assert scored(texts, level, form, monkeypatch)[1] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-2)
        plain, weighted = (scored(texts, level, form, monkeypatch)[1] for form in (None, "advantage"))
        assert weighted == pytest.approx([a * w for a, w in zip(plain, (up, down, down, down), strict=True)])
    assert scored([MISS] * 4, level, "advantage", monkeypatch)[1] == [0.0] * 4, "no signal, no weight"

@pytest.mark.parametrize("form", ["advantage", "reward"])
def test_a_run_weighs_what_it_is_told_to(form, tiny_dir, synth_dir, tmp_path):
    rows = {r["id"]: r["entity"] for r in g.read_samples([synth_dir / "samples.jsonl"])[0]}
    known = {e: {"mastery": float(i % 2), "n": 1} for i, e in enumerate(sorted(set(rows.values())))}
    (tmp_path / "m.json").write_text(json.dumps(known))
    flags = ("--knowledge", tmp_path / "m.json", "--max_steps", 2)
    flags += ("--reward_funcs", "karl", "letters") if form == "reward" else ()
    start = "import sys\nsys.argv.insert(1, 'train_grpo')\nimport trouble\nfrom tools import karl\nkarl.main()\n"
    (tmp_path / "karl.py").write_text(start)
    run_script(tmp_path / "karl.py", "--model", tiny_dir, "--data", synth_dir / "samples.jsonl", "--output_dir",
               tmp_path / "run", *TRAIN_FLAGS["train_grpo"], *flags, PYTHONPATH="tests:.")  # fmt: skip
    assert ("rewards/karl/mean" in metrics_of(tmp_path / "run")[0]) == (form == "reward")
    assert json.loads((tmp_path / "run/run.json").read_text())["knowledge"] == str(tmp_path / "m.json")
    for line in (tmp_path / "run/samples.jsonl").read_text().splitlines():
        group = json.loads(line)
        plain = g.group_advantages([c["reward"] for c in group["completions"]], "group")
        up, down = (0.65, 1.5) if known[rows[group["id"]]]["mastery"] else (1.4, 0.0)
        want = [a * (up if a > 0 else down) for a in plain] if form == "advantage" else plain
        assert any(plain) and [c["advantage"] for c in group["completions"]] == pytest.approx(want)
