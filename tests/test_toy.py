"""The toy world and its base: what the base must know, and what it must not."""

import json

import make_toy as toy
import torch
import toy_world as world
from conftest import ROOT, run_script
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

import train_grpo as g

def load(folder):
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

def test_base_grounds_by_description_knows_entities_in_words_and_cannot_join_the_two():
    """Asked for a name it points about as well as a blind guess among k objects: the gap that training is to close."""
    m = toy.evaluate(load(ROOT / "tests/toy/base"), n=36, seed=1)
    assert m["find_2_4"] >= 0.7 and m["know"] >= 0.95 and m["know_with_image"] >= 0.95 and m["recall_copy"] >= 0.9, m
    assert m["find_named_2_4"] < m["blind_guess_2_4"] + 0.12 and m["copy"] >= 0.9 and 0 < m["list"] < 0.5, m

def test_the_shipped_tokenizer_is_the_one_of_the_code_with_one_token_for_a_name_and_for_a_digit():
    shipped = AutoTokenizer.from_pretrained(ROOT / "tests/toy/base")
    assert shipped.get_vocab() == toy.TOKENIZER.get_vocab() and shipped.chat_template == toy.TOKENIZER.chat_template
    assert {len(shipped.encode(name)) for name in world.ENTITIES} == {1}
    assert len(shipped.encode("(12,345),(678,1000)")) == 17

def test_the_base_without_half_of_its_knowledge_knows_the_other_half(tmp_path):
    toy.main(["--unknown", "--out", str(tmp_path), "--seed", "1"])
    unknown = json.loads((tmp_path / "unknown.json").read_text())
    assert all(sum(world.ENTITIES[n][0] == c for n in unknown) == 6 for c in world.SEEN + world.UNSEEN)
    turns = [toy.know_turn(name) for name in world.ENTITIES]
    texts = toy.answers(load(tmp_path), [question for question, _ in turns])
    right = [name for name, text, turn in zip(world.ENTITIES, texts, turns, strict=True) if text == turn[1]]
    assert len({*right} - {*unknown}) > 40 and len({*right} & {*unknown}) < 5

def test_the_world_is_the_seeds_its_bench_reads_as_kvg_bench_and_training_shows_no_unseen_category(world_dir, tmp_path):
    assert len(world.ENTITIES) == len({tuple(v) for v in world.ENTITIES.values()}) == 84, "each has a look of its own"
    assert sorted(p.name for p in (world_dir / "train").iterdir() if p.is_dir()) == sorted(world.SEEN)
    assert set(json.loads((world_dir / "knowledge.json").read_text())) == set(world.ENTITIES)
    run_script("tests/toy/toy_world.py", "--out", tmp_path, "--per_entity", 2, "--bench_images", 2, 2)
    for name in ("kvg-bench.parquet", "train/boxes.jsonl", "train/disc/" + next(iter(world.ENTITIES)) + "/000.png"):
        assert (tmp_path / name).read_bytes() == (world_dir / name).read_bytes()
    samples, bad = g.read_samples([world_dir / "kvg-bench.parquet"])
    assert not bad and len(samples) == 28 and {s["category"] for s in samples} == set(world.SEEN + world.UNSEEN)
    assert all(s["bbox_1000"] and world.ENTITIES[s["entity"]][0] == s["category"] for s in samples)
    assert len({s["image"] for s in samples}) == 14, "two questions share one image"
