"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL through the same scripts, each with the boxes it was taught to write."""

import json
import math

import pytest
import torch
from conftest import FAMILIES, run_script
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import train_grpo as g
import train_sft as t

ROW = '<think>\nleft (10,20),(300,400)\n</think> <answer><|object_ref_start|>A "b"<|object_ref_end|>'
ROW += "<|box_start|>(510,20),(900,999)<|box_end|></answer>"


def test_each_family_writes_boxes_its_own_way():
    question = "Find <|object_ref_start|>A<|object_ref_end|>"
    text = {f: g.model_text(ROW, g.BOX_STYLES[f], (280, 140)) for f in FAMILIES}
    assert text["qwen2_vl"] == ROW
    form = '<think>\nleft {}\n</think> <answer>```json\n[\n\t{{"bbox_2d": {}, "label": "A \\"b\\""}}\n]\n```</answer>'
    assert text["qwen2_5_vl"] == form.format("(3,3),(84,56)", "[143, 3, 252, 140]")
    assert text["qwen3_vl"] == form.format("(10,20),(300,400)", "[510, 20, 900, 999]")
    asked = [g.model_text(question, g.BOX_STYLES[f], (280, 140)) for f in FAMILIES]
    assert asked == [question, "Find A", "Find A"]


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_survive_the_round_trip_through_the_familys_coordinates(family):
    """What the model is taught is parsed to the box of the row: to half a pixel where it counts in pixels, else
    exactly. And a box that the model wrote is the same box in its own coordinates after a trip through a row."""
    style, size = g.BOX_STYLES[family], (616, 644)
    grid = size if style.pixels else (1000, 1000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        x, y = (sorted(torch.randperm(1001, generator=generator)[:2].tolist()) for _ in range(2))
        box = [x[0], y[0], x[1], y[1]]
        row = "<think>x</think> <answer><|object_ref_start|>A<|object_ref_end|>"
        row += "<|box_start|>({},{}),({},{})<|box_end|></answer>".format(*box)
        text = g.model_text(row, style, grid)
        sample = {"bbox_1000": box, "grid": grid, "style": style}
        read = g.parse_bbox(text, grid=grid)
        slack = [500 / n if style.pixels else 0 for n in grid * 2]
        narrow = style.pixels and min(x[1] - x[0], y[1] - y[0]) < 2  # less than a pixel becomes one
        assert narrow or all(abs(a - b) <= d + 1e-9 for a, b, d in zip(read, box, slack, strict=True))
        assert g.format_reward(text, sample, None) == 1
        written = row.replace("({},{}),({},{})".format(*box), "({},{}),({},{})".format(*map(round, read)))
        assert narrow or g.model_text(written, style, grid) == text
    assert g.parse_bbox(f"<answer>(1,2),({grid[0]},{grid[1]})</answer>", grid=grid)[2:] == [1000, 1000]
    assert g.parse_bbox(f"<answer>(1,2),({grid[0] + 1},{grid[1]})</answer>", grid=grid) is None


def test_the_format_reward_wants_the_familys_own_form():
    for family in FAMILIES:
        style = g.BOX_STYLES[family]
        sample = {"bbox_1000": [0, 0, 1, 1], "grid": (1000, 1000), "style": style}
        for other in FAMILIES:
            text = g.model_text(ROW, g.BOX_STYLES[other], (1000, 1000))
            same = style.json == g.BOX_STYLES[other].json
            assert g.format_reward(text, sample, None) == (1.0 if same else 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_length_and_size_are_known_from_the_header(family, family_dirs, synth_dir):
    folder = str(family_dirs[family])
    style, (tokenizer, image_processor) = t.check_model(folder), t.load_processors(folder, 20000)
    for s in t.read_samples(synth_dir / "samples.jsonl")[:3]:
        inputs, [completion] = t.encode_row(s, tokenizer, image_processor, "direct", style)
        assert t.row_length(s, tokenizer, image_processor, "direct", style) == len(inputs["prompt_ids"] + completion)
        size = t.resized_size(image_processor, s["image"])
        assert size[0] * size[1] == len(inputs["pixel_values"]) * image_processor.patch_size**2
        assert inputs["grid"] == (size if style.pixels else (1000, 1000))


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, family_dirs, synth_dir, tmp_path_factory):
    """(family, run folder) after 3 steps of SFT and, from there, 3 of GRPO."""
    out, data = tmp_path_factory.mktemp("run"), ("--data", synth_dir / "samples.jsonl", "--max_steps", 3)
    same = ("--train_batch_size", 4, "--save_steps", 0, "--learning_rate", 1e-3, "--max_pixels", 20000)
    run_script("train_sft.py", "--model", family_dirs[request.param], *data, "--target", "direct",
               "--output_dir", out / "sft", *same)  # fmt: skip
    run_script("tests/grpo_letters.py", "--model", out / "sft/final", *data, "--output_dir", out / "grpo", *same,
               "--num_generations", 4, "--max_completion_length", 12, "--reward_funcs", "letters")  # fmt: skip
    return request.param, out


def test_every_family_trains(trained):
    _, out = trained
    sft, grpo = ([json.loads(line) for line in (out / n / "metrics.jsonl").open()] for n in ("sft", "grpo"))
    losses = [m["loss"] for m in sft]
    assert all(map(math.isfinite, losses)) and losses[2] < losses[0], "SFT learns"
    assert len(grpo) == 3 and all(math.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in grpo)
    assert all(abs(m["loss"]) < 1e-3 for m in grpo), "the ratio is 1 and advantages sum to 0: the loss is flat at 0"
    assert all(m["sampling/logp_diff"] < 1e-5 for m in grpo)


def test_the_exported_checkpoint_is_the_familys_in_plain_transformers(trained, synth_dir):
    """Loaded by the Auto classes alone: no weight missing, none left over, and our log-probs."""
    family, out = trained
    folder = out / "grpo/final"
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert model.config.model_type == family
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokenizer, image_processor = (
        AutoTokenizer.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    assert image_processor.patch_size == (16 if family == "qwen3_vl" else 14)
    sample = g.read_samples(synth_dir / "samples.jsonl")[0]
    inputs, [completion] = t.encode_row(sample, tokenizer, image_processor, "direct", g.check_model(str(folder)))
    ids = torch.tensor([inputs["prompt_ids"] + completion])
    images = {k: inputs[k] for k in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int(), **images).logits
        ours = t.CompletionLogProbs(t.load_model(str(folder), "float32", torch.device("cpu")))(
            t.pack([(inputs, [completion])], "cpu")
        )
    theirs = logits[0, -len(completion) - 1 : -1].log_softmax(-1).gather(1, ids[0, -len(completion) :, None])[:, 0]
    assert (ours - theirs).abs().max() < 1e-5


def test_filter_and_evaluation_read_the_familys_boxes(trained, synth_dir, tmp_path):
    """A model that answers in its own coordinates is scored in the rows': every case answered, no crash, grid kept."""
    family, out = trained
    run_script("eval_kvg.py", "--model", out / "grpo/final", "--bench", synth_dir / "samples.jsonl", "--out", tmp_path,
               "--max_completion_length", 8, "--max_pixels", 20000)  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    grids = {tuple(r["grid"]) for r in rows}
    assert len(rows) == 12 and (grids != {(1000, 1000)}) == g.BOX_STYLES[family].pixels


def test_an_unknown_family_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit, match="model_type 'llama'; want one of qwen2_vl, qwen2_5_vl, qwen3_vl"):
        g.check_model(str(tmp_path))
