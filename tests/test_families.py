"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL through the same scripts, each with the boxes it was taught to write."""

import json
import math
from types import SimpleNamespace

import plain
import pytest
import torch
from conftest import FAMILIES, metrics_of, run_script, train

import train_grpo as g
import train_sft as t

ROW = '<think>\nleft (10,20),(300,400)\n</think> <answer><|object_ref_start|>A "b"<|object_ref_end|>'
ROW += "<|box_start|>(510,20),(900,999)<|box_end|></answer>"

def test_each_family_writes_boxes_its_own_way():
    grids = {f: (280, 140) if t.BOX_STYLES[f].pixels else (1000, 1000) for f in FAMILIES}
    form = '<think>\nleft {}\n</think> <answer>```json\n[\n\t{{"bbox_2d": {}, "label": "A \\"b\\""}}\n]\n```</answer>'
    pixels = form.format("(3,3),(84,56)", "[143, 3, 252, 140]")
    json_ = form.format("(10,20),(300,400)", "[510, 20, 900, 999]")
    assert [t.model_text(ROW, t.BOX_STYLES[f], grids[f]) for f in FAMILIES] == [ROW, pixels, json_]
    edge = t.model_text(t.ANSWER.format("A", 999, 999, 1000, 1000), t.BOX_STYLES["qwen2_5_vl"], (28, 28))
    assert "[27, 27, 28, 28]" in edge, "a thin box at the edge stays a box within the image"
    question = "Find <|object_ref_start|>A<|object_ref_end|>"
    assert [t.model_text(question, t.BOX_STYLES[f], (280, 140)) for f in FAMILIES] == [question, "Find A", "Find A"]

def test_prompts_are_in_the_familys_words_and_coordinates(parts):
    (tokenizer, processor, style), p = parts.processors, parts.prompts[0]
    patch, (rows, columns) = processor.patch_size, p["image_grid_thw"][0, 1:].tolist()
    assert p["grid"] == ((columns * patch, rows * patch) if style.pixels else (1000, 1000))
    assert ("<|object_ref_start|>" in tokenizer.decode(p["prompt_ids"])) != style.json
    small = g.load_processors(parts.model.name_or_path, 28 * 28 * 6)  # the cap is on the pixels of the resized image
    capped = g.chat_inputs(small, p["image"], "?")["image_grid_thw"][0]
    assert capped.prod() * patch**2 <= 28 * 28 * 6 < rows * columns * patch**2

@pytest.mark.parametrize("family", FAMILIES[1:])
def test_a_family_is_trained_exported_and_asked(family, family_dirs, synth_dir, tmp_path):
    data, out, folder = synth_dir / "samples.jsonl", tmp_path / "grpo", str(tmp_path / "grpo/final")
    same = ("--max_steps", 3, "--max_pixels", 20000, "--save_steps", 0)
    train("train_sft", tmp_path / "sft", family_dirs[family], data, *same)
    train("train_grpo", out, tmp_path / "sft/final", data, *same)
    sft, grpo = metrics_of(tmp_path / "sft"), metrics_of(out)
    assert sft[2]["loss"] < sft[0]["loss"] and all(math.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in sft + grpo)
    assert all(m["sampling/logp_diff"] < 1e-5 for m in grpo)
    model, info = t.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert model.config.model_type == family and model.config.prompt_suffix == t.R1_SUFFIX
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    processors, how = t.load_processors(folder, 20000), SimpleNamespace(target="direct", prompt_suffix=None)
    x = t.encode(processors, how, t.read_samples([data])[0][0])
    with torch.no_grad():
        ours = t.CompletionLogProbs(t.load_model(folder, "float32", torch.device("cpu")))(t.pack_sequences([x], "cpu"))
        theirs, _ = plain.completion_logps(model, processors[0], x, [x["completion_ids"]])
    assert (ours - theirs[0]).abs().max() < 1e-5
    flags = ("--max_completion_length", 8, "--max_pixels", 20000)
    run_script("eval_kvg.py", "--model", folder, "--bench", data, "--out", tmp_path / "eval", *flags)
    rows = [json.loads(line) for line in (tmp_path / "eval/predictions.jsonl").open()]
    assert len(rows) == 12 and ({tuple(r["grid"]) for r in rows} != {(1000, 1000)}) == t.BOX_STYLES[family].pixels
