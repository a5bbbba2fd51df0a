"""SFT: the loss against plain Python, resume, ranks, formats, and what a finished checkpoint gives back."""

import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

import train_sft as t


def train(out, model, data, *flags, launcher=(sys.executable,), check=True):
    return run_script("train_sft.py", "--model", model, "--data", data, "--output_dir", out, "--target", "direct",
                      "--max_steps", 4, "--train_batch_size", 4, "--tokens_per_row", 200,
                      "--learning_rate", 1e-3, "--save_steps", 2, *flags,
                      launcher=launcher, check=check)  # fmt: skip


STYLE = t.BOX_STYLES["qwen2_vl"]
TIMES = re.compile("time|per_second|mfu")


def rows(path):
    """Metrics without the times, which differ between runs."""
    return [
        {k: v for k, v in json.loads(line).items() if not TIMES.search(k)} for line in path.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def run_dir(tiny_dir, synth_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft") / "run"
    train(out, tiny_dir, synth_dir / "samples.jsonl")
    return out


@pytest.fixture(scope="module")
def parts(tiny_dir, synth_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    image_processor = AutoImageProcessor.from_pretrained(tiny_dir, backend="pil")
    return (
        Qwen2VLForConditionalGeneration.from_pretrained(tiny_dir),
        tokenizer,
        image_processor,
        t.read_samples(synth_dir / "samples.jsonl"),
    )


def items_of(parts, samples):
    _, tokenizer, image_processor, _ = parts
    return [t.encode_row(s, tokenizer, image_processor, "direct", STYLE) for s in samples]


def test_packed_loss_equals_a_plain_loop_over_assistant_tokens(parts):
    """Row by row through the model as transformers has it, the softmax in Python: no leak between packed rows."""
    model, tokenizer, _, samples = parts
    items, expected = items_of(parts, samples[:3]), []
    for inputs, [completion] in items:
        ids = torch.tensor([inputs["prompt_ids"] + completion])
        images = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
        logits = model(input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int(), **images).logits
        logits = logits[0].tolist()
        for i, target in enumerate(completion, len(inputs["prompt_ids"])):
            expected.append(logits[i - 1][target] - math.log(sum(math.exp(v) for v in logits[i - 1])))
    assert len(expected) == sum(len(tokenizer.encode(s["answer"], add_special_tokens=False)) + 1 for s in samples[:3])
    assert t.CompletionLogProbs(model)(t.pack(items, "cpu")).tolist() == pytest.approx(expected, abs=1e-5)


def test_gradient_is_the_same_for_one_row_and_for_several(parts):
    model, _, _, samples = parts
    grads, items = [], items_of(parts, samples[:4])
    for size in (4, 2, 1):
        model.zero_grad()
        for i in range(0, 4, size):
            t.CompletionLogProbs(model)(t.pack(items[i : i + size], "cpu")).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(torch.allclose(g, grads[0], rtol=1e-4, atol=1e-4) for g in grads[1:])


def test_prefetch_keeps_order_reads_ahead_and_passes_errors_on():
    started = []

    def square(i):
        started.append(i)
        if i == 7:
            raise SystemExit("row 7 is broken")
        return i * i

    stream = t.prefetch(square, range(9), workers=2, ahead=4)
    assert next(stream) == 0 and max(started) <= 4
    assert [next(stream) for _ in range(6)] == [1, 4, 9, 16, 25, 36]
    with pytest.raises(SystemExit, match="row 7"):
        next(stream)
    assert list(t.prefetch(square, range(3), workers=1, ahead=100)) == [0, 1, 4]


def test_row_length_is_known_from_the_header(parts):
    _, tokenizer, image_processor, samples = parts
    for s in samples:
        inputs, [completion] = t.encode_row(s, tokenizer, image_processor, "direct", STYLE)
        assert t.row_length(s, tokenizer, image_processor, "direct", STYLE) == len(inputs["prompt_ids"]) + len(
            completion
        )


def test_smoke_run_learns_and_freezes_vision(run_dir, tiny_dir):
    metrics = rows(run_dir / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4] and metrics[-1]["loss"] < metrics[0]["loss"] - 0.2
    before, after = load_file(tiny_dir / "model.safetensors"), load_file(run_dir / "final" / "model.safetensors")
    assert all(torch.equal(before[k], after[k]) == ("visual" in k) for k in before)
    assert (run_dir / "curves.png").stat().st_size > 1000 and json.loads((run_dir / "run.json").read_text())[
        "versions"
    ]["torch"]


def test_resume_repeats_the_undisturbed_run(run_dir, tiny_dir, synth_dir, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run_dir, out)
    shutil.rmtree(out / "final")
    train(out, tiny_dir, synth_dir / "samples.jsonl")
    assert rows(out / "metrics.jsonl") == rows(run_dir / "metrics.jsonl")
    ours, theirs = (load_file(d / "final" / "model.safetensors") for d in (out, run_dir))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_finished_model_loads_in_plain_transformers_and_gives_the_same_greedy_tokens(run_dir, synth_dir):
    import train_grpo as g

    folder, sample = run_dir / "final", t.read_samples(synth_dir / "samples.jsonl")[0]
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    tokenizer, image_processor = (
        AutoTokenizer.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    prompt = g.chat_inputs(tokenizer, image_processor, sample["image"], sample["question"], STYLE)
    ours = g.rollout(
        g.load_model(str(folder), "float32", torch.device("cpu")), tokenizer, [prompt], [["0"]], 16, 0.0, 1
    )[0][0][0]
    content = [{"type": "image"}, {"type": "text", "text": sample["question"]}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    vision = image_processor(images=[Image.open(sample["image"])], return_tensors="pt")
    x = tokenizer(
        text.replace("<|image_pad|>", "<|image_pad|>" * int(vision["image_grid_thw"].prod() // 4)), return_tensors="pt"
    )
    kinds = (x["input_ids"] == model.config.image_token_id).int()
    banned = [[tokenizer.convert_tokens_to_ids(v)] for v in g.VISION_TOKENS]
    out = model.generate(
        **x, **vision, mm_token_type_ids=kinds, max_new_tokens=16, do_sample=False, bad_words_ids=banned
    )
    assert out[0, x["input_ids"].shape[1] :].tolist() == ours


def test_over_long_rows_are_counted_and_skipped_never_cut(tiny_dir, synth_dir, tmp_path):
    done = train(tmp_path, tiny_dir, synth_dir / "samples.jsonl", "--max_length", 40, check=False)
    assert done.returncode != 0 and "all 12 rows exceed --max_length 40" in done.stderr
    args = t.parse_args(["--model", "m", "--data", "d", "--output_dir", "o"])
    assert (args.learning_rate, args.train_batch_size, args.max_length, args.warmup_ratio, args.max_pixels) == (
        5e-6,
        16,
        4096,
        0.1,
        401408,
    )


def test_released_formats_are_read_as_they_are(synth_dir, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    ours = t.read_samples(synth_dir / "samples.jsonl")[:2]
    text = f"<think>because</think> <answer>{ours[0]['answer']}</answer>"
    messages = [{"role": "user", "content": f"<image>{ours[0]['question']}{t.R1_SUFFIX}"},
                {"role": "assistant", "content": text}]  # fmt: skip
    share = [{"messages": messages, "images": [os.path.relpath(ours[0]["image"], tmp_path)]}]
    (tmp_path / "share.json").write_text(json.dumps(share))
    (read,) = t.read_samples(tmp_path / "share.json")
    assert (read["question"], read["completion"], read["prompt_suffix"]) == (ours[0]["question"], text, t.R1_SUFFIX)
    assert (read["bbox_1000"], read["entity"], read["answer"]) == (
        ours[0]["bbox_1000"],
        ours[0]["entity"],
        ours[0]["answer"],
    )
    data = open(ours[0]["image"], "rb").read()
    solution = f"<answer> {ours[0]['answer']} </answer>"  # as in the released debug log
    pq.write_table(
        pa.Table.from_pylist([{"image": {"bytes": data}, "problem": ours[0]["question"], "solution": solution}]),
        tmp_path / "grpo.parquet",
    )
    (read,) = t.read_samples(tmp_path / "grpo.parquet")
    assert (read["question"], read["bbox_1000"], read["entity"]) == (
        ours[0]["question"],
        ours[0]["bbox_1000"],
        ours[0]["entity"],
    )
    assert t.load_image(read["image"]).size == (168, 112)


@pytest.mark.parametrize("edit, message", [
    (lambda r: r.pop("messages"), "samples.jsonl:1: no column 'messages'"),
    (lambda r: r["images"].append("x.png"), "2 images"),
    (lambda r: r.update(answer="<|box_start|>(9,9),(3,12)<|box_end|>"), "bbox_1000 [9, 9, 3, 12]; want 0 <= x1 < x2"),
])  # fmt: skip
def test_a_bad_row_gets_one_clear_line_before_weights_are_loaded(edit, message, synth_dir, tmp_path):
    row = json.loads((synth_dir / "samples.jsonl").read_text().splitlines()[0])
    edit(row)
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    done = train(tmp_path / "out", "no-model-here", tmp_path / "samples.jsonl", check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_engine_settings_that_belong_to_flags_are_refused(tiny_dir, synth_dir, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": 8}')
    done = train(
        tmp_path / "out", tiny_dir, synth_dir / "samples.jsonl", "--deepspeed", tmp_path / "ds.json", check=False
    )
    assert (
        done.returncode != 0
        and "has 'train_batch_size'; want engine settings only" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_trackers_get_every_row_and_are_closed(tmp_path, monkeypatch):
    """A stand-in for each package: an interrupted run goes on under the same name, TensorBoard forgets later steps."""
    seen = []
    run = SimpleNamespace(
        log=lambda row, step: seen.append(("wandb", step, row["loss"])), finish=lambda: seen.append("end")
    )
    started, folders = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            folders.append((folder, purge_step))

        def add_scalar(self, key, value, step):
            seen.append(("tensorboard", step, key, value))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kw: started.append(kw) or run))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    args = SimpleNamespace(wandb="kvg", tensorboard=True, output_dir=str(tmp_path / "run"))
    for _ in range(2):
        send, finish = t.start_trackers(args, {"seed": 0}, 3)
    send({"step": 3, "loss": 0.5})
    finish()
    assert seen == [("wandb", 3, 0.5), ("tensorboard", 3, "loss", 0.5), "end", "closed"]
    assert started[0] == started[1] and (started[0]["project"], started[0]["resume"]) == ("kvg", "allow")
    assert folders[0] == (str(tmp_path / "run/tensorboard"), 3)
    send, finish = t.start_trackers(SimpleNamespace(**vars(args) | {"wandb": None, "tensorboard": False}), {}, 1)
    assert send({"step": 1}) == finish() == [], "off by default"


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(t.importlib.util, "find_spec", lambda name: None)
    for flags, name in ((["--wandb", "kvg"], "wandb"), (["--tensorboard"], "tensorboard")):
        with pytest.raises(SystemExit, match=f"--{name}: no {name} in this environment; .*pip install {name}"):
            t.parse_args(["--model", "m", "--data", "d", "--output_dir", "o", *flags])
