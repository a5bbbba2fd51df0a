"""KVG-Bench: answers every case, scores the boxes, and shows pictures, boxes and reasoning together in one HTML page.

reads   --bench: the KVG-Bench parquet or samples.jsonl of synth_data.py; --model, or --predictions made elsewhere
writes  --out: predictions.jsonl, metrics.json, table.md, report.html, config.json; with --compare A B: compare.json

  smoke    python eval_kvg.py --bench runs/toy/world/kvg-bench.parquet --model runs/toy/train_grpo/final --out ...
  score    python eval_kvg.py --bench kvg-bench.parquet --predictions answers.jsonl --out runs/eval_theirs
  1 GPU    python eval_kvg.py --bench kvg-bench.parquet --model runs/grpo/final --out runs/eval
  8 GPUs   torchrun --nproc_per_node 8 eval_kvg.py --bench kvg-bench.parquet --model runs/grpo/final --out runs/eval
  compare  python eval_kvg.py --compare runs/eval_sft runs/eval --out runs/eval

A case is correct if its one box has IoU >= 0.5 with the truth (arXiv 2503.12797). Differences from the released
evaluator: the parser is the one that training rewards, so a box in the reasoning alone, two boxes or a cut-off answer
are no box and score 0; decoding is greedy; the pixel cap is a flag and equal for all models; accuracies come with 95 %
intervals that resample images, because questions on one image are not independent; answers of other settings are never
reused.
"""

import argparse
import base64
import gc
import hashlib
import html
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import string
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

EVAL_PROMPTS = {
    "r1": None,
    "direct": "",
    "cot": ". Let's think step by step",
    "json": ", output its bbox coordinates using JSON format.",
}
CORRECT_IOU = 0.5
RESAMPLES = 2000


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--bench", help="KVG-Bench .parquet, or samples.jsonl with boxes")
    p.add_argument("--out", help="run folder; an interrupted run is continued, a finished one scored again")
    p.add_argument("--model", help="Hugging Face folder or name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    p.add_argument("--predictions", help="score this JSONL (question_id, response) instead of running a model")
    p.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two run folders: paired difference B - A, no bench needed"
    )
    p.add_argument("--summary", metavar="RUN", help="table of all RUN/eval_*/metrics.json, written to RUN/results.json")
    # answers
    p.add_argument(
        "--prompt",
        default="r1",
        choices=list(EVAL_PROMPTS),
        help="what follows the question, and where the box is looked for",
    )
    p.add_argument("--max_completion_length", type=int, default=1024, help="tokens; a longer answer is cut and counted")
    p.add_argument("--max_pixels", type=int, default=401408, help="pixel cap of an image (paper: 401,408)")
    p.add_argument("--batch_size", type=int, default=128, help="cases decoded at once on one rank")
    p.add_argument("--num_workers", type=int, default=2, help="threads that read images ahead, per rank")
    p.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="auto: bfloat16 on CUDA, float32 on CPU",
    )
    # scores
    p.add_argument(
        "--seen",
        nargs="+",
        default=["aircraft", "car", "reptilia", "bird", "food"],
        help="categories with training data",
    )
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap; decoding is greedy")
    # run
    p.add_argument("--report_samples", type=int, default=400, help="most cases shown in report.html, worst first")
    p.add_argument("--timeout_minutes", type=float, default=60, help="of a collective operation")
    args = p.parse_args(argv)
    if not args.summary and not args.out:
        p.error("want --out")
    if not args.compare and not args.summary and (not args.bench or bool(args.model) == bool(args.predictions)):
        p.error("want --bench with one of --model and --predictions, or --compare A B, or --summary RUN")
    if args.max_completion_length < 1 or args.batch_size < 1 or args.report_samples < 0:
        p.error("want --max_completion_length >= 1, --batch_size >= 1, --report_samples >= 0")
    args.seen = sorted({c.lower() for c in args.seen})
    return args


# >>> shared:jsonl_io (copy of synth_data.py)
def read_jsonl(path, required=()):
    """Rows of a JSONL file as dicts. Errors: one line naming file, line and the missing column or broken JSON."""
    if not os.path.isfile(path):
        raise SystemExit(f"{path}: no such file; want JSONL, one object a line; check the path or run the stage before")
    rows = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise SystemExit(
                    f"{path}:{number}: not JSON ({e.msg}); want one object a line; mend or drop the line"
                ) from None
            if missing := [c for c in required if not isinstance(row, dict) or row.get(c) is None]:
                raise SystemExit(
                    f"{path}:{number}: no column {missing[0]!r}; want {', '.join(required)}; rerun the stage before"
                )
            rows.append(row)
    if not rows:
        raise SystemExit(f"{path}: 0 rows; want at least one; rerun the stage before")
    return rows


def write_text(path, text):
    """Writes a file whole or not at all: to a temporary name first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def complete_lines(path):
    """Rows already written by an interrupted run; cuts off a half-written last line, so that appending is safe."""
    if not os.path.exists(path):
        return []
    data = Path(path).read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]


def same_config(out, args, ignore=()):
    """Writes {out}/config.json, or checks that an earlier run into this folder had the same settings."""
    now = {k: v for k, v in vars(args).items() if k not in ignore}
    path = Path(out) / "config.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        for key, value in now.items():
            if json.loads(json.dumps(value)) != old.get(key):
                raise SystemExit(
                    f"{path}: --{key} was {old.get(key)}, now {value}; want the same settings to continue; "
                    "give another output folder or delete this one"
                )
    write_text(path, json.dumps(now, indent=1, sort_keys=True) + "\n")


# <<< shared:jsonl_io


# >>> shared:dist (copy of train_sft.py)
def init_dist(timeout_minutes=60):
    """(rank, world_size, device) under torchrun, or (0, 1, device) alone; NCCL on CUDA, gloo on CPU."""
    rank, local_rank, world_size = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if not dist.is_initialized():
        where = dict(store=dist.HashStore(), rank=0, world_size=1) if world_size == 1 else {}
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes), **where
        )
    return rank, world_size, device


def print0(*message):
    if int(os.environ.get("RANK", 0)) == 0:
        print(*message, flush=True)


def broadcast(value):
    """Rank 0's value (any picklable object) on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_sum(values, device):
    """Sums a list of numbers over all ranks; every rank must call it."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def leave():
    """Ends a rank of several here, at once: now and then one aborted in the interpreter's own shutdown ("terminate
    called without an active exception"), with all its work done, and torchrun reported a failure.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# <<< shared:dist


# >>> shared:chat_inputs (copy of train_sft.py)
R1_SUFFIX = (
    "  Output the thinking process in <think> </think> and final answer (bounding box) in <answer> </answer> tags."
)
BOX = re.compile(r"<\|box_start\|>\((\d{1,6}),(\d{1,6})\),\((\d{1,6}),(\d{1,6})\)<\|box_end\|>", re.A)
REF = re.compile(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", re.S)
PAIRS = re.compile(r"<\|(object_ref|box)_start\|>(?:(?!<\|).)*<\|\1_end\|>", re.S)  # all the tokens that rows may hold
MARKUP = re.compile(r"</?(?:think|answer|image|video)>|<\|", re.I)  # it would open a turn, a block or an image
NO_NAME = re.compile(  # a line break, half a character, or a box
    "[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]|" r"(?:\d[\d.]*\s*[)\]]?\s*,\s*[(\[]?\s*){3}\d"
)
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # what Pillow raises


@dataclass(frozen=True)
class BoxStyle:
    """How a model family was taught to write boxes. Rows are in Qwen2-VL's; a model is asked and read in its own."""

    json: bool  # [{"bbox_2d": [x1, y1, x2, y2], "label": name}], else ref and box tokens
    pixels: bool  # of the resized image, else a grid of 0..1000 over its width and height


# by model_type of the config; sources: the grounding examples of the model cards and technical reports
BOX_STYLES = {
    "qwen2_vl": BoxStyle(json=False, pixels=False),
    "qwen2_5_vl": BoxStyle(json=True, pixels=True),
    "qwen3_vl": BoxStyle(json=True, pixels=False),
}


def model_text(text, style, grid):
    """A text of the rows, question or completion, as the family writes it: every box on its `grid` (width, height)."""

    def boxed(match):
        x1, y1, x2, y2 = (round(int(v) * n / 1000) for v, n in zip(match.groups(), grid * 2, strict=True))
        return f"({x1},{y1}),({max(x2, x1 + 1)},{max(y2, y1 + 1)})"

    def listed(match):
        name, *box = match.groups()
        label = json.dumps(name, ensure_ascii=False)
        return f'```json\n[\n\t{{"bbox_2d": [{", ".join(box)}], "label": {label}}}\n]\n```'

    if style.pixels:
        text = re.sub(r"\((\d{1,6}),(\d{1,6})\),\((\d{1,6}),(\d{1,6})\)", boxed, text, flags=re.A)
    return REF.sub(r"\1", re.sub(REF.pattern + BOX.pattern, listed, text, flags=re.S)) if style.json else text


def is_box(box, most=1e9):
    """Whether it is [x1, y1, x2, y2] in numbers, 0 <= x1 < x2 <= most and 0 <= y1 < y2 <= most; NaN is none."""
    numbers = isinstance(box, (list, tuple)) and len(box) == 4 and all(type(v) in (int, float) for v in box)
    return numbers and 0 <= box[0] < box[2] <= most and 0 <= box[1] < box[3] <= most


def check_name(name, where, kind="entity"):
    """Errors: one line unless a name is text in one line that becomes no token, tag or box in a prompt."""
    if not isinstance(name, str) or not name.strip() or MARKUP.search(name) or NO_NAME.search(name):
        raise SystemExit(
            f"{where}: {kind} {ascii(name)[:80]}; want a name in one line, without tokens, tags and boxes; mend the row"
        )


def check_text(text, where, kind):
    """Errors: one line unless it is text without special tokens, but for whole pairs around names and boxes."""
    if not isinstance(text, str):
        raise SystemExit(f"{where}: {kind} {ascii(text)[:80]}; want text; mend the row")
    if found := re.search("<\\|[^>\n]{0,30}>?|[\ud800-\udfff]", PAIRS.sub("", text)):
        raise SystemExit(
            f"{where}: {ascii(found[0])} in the {kind}; want no special token but pairs around a name or a box; "
            "mend the row"
        )
    for name in REF.findall(text):
        check_name(name, where)


@lru_cache(maxsize=4096)
def real_folder(folder):
    """(path without symbolic links, whether a samples.jsonl lies in it)"""
    folder = Path(os.path.realpath(folder))
    return folder, (folder / "samples.jsonl").is_file()


def image_path(folder, name, where):
    """Path of the image that a row names relative to `folder`, which holds the row's file.

    Symbolic links followed, it must lie in the run folder (the parent of `folder`, if that is not the root), or in
    images/ beside a samples.jsonl, wherever that is: so lie the images of synth_data.py, to which the rows of all later
    stages point. Errors: one line for an absolute path and for one that leads elsewhere.
    """
    if not isinstance(name, str) or not name or "\0" in name or os.path.isabs(name):
        raise SystemExit(f"{where}: image {ascii(name)[:80]}; want a path relative to {folder}; mend the row")
    path, here = Path(folder, name), real_folder(Path(folder))[0]
    real = Path(os.path.realpath(path)) if path.is_symlink() else real_folder(path.parent)[0] / path.name
    run = here if here.parent == Path(here.anchor) else here.parent
    ours = real.parent.name == "images" and real_folder(real.parents[1])[1]
    if not ours and not real.is_relative_to(run):
        raise SystemExit(
            f"{where}: image {ascii(name)[:80]} leads out of {run}; want one below it or in images/ beside a "
            "samples.jsonl; move the image there"
        )
    return str(path)


def read_parquet(path, columns=None):
    """(rows, columns) of a parquet; `columns`: the ones to read, of those there are. Errors: one line."""
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=columns and [c for c in columns if c in names])
        return table.to_pylist(), names
    except (OSError, ValueError) as e:
        raise SystemExit(f"{path}: unreadable ({str(e).splitlines()[0]}); want parquet; fetch the file again") from None


def parse_turns(r, where):
    """(question, completion, prompt_suffix) of a row with one image and the messages of a user and an assistant."""
    images, turns = (x if isinstance(x, list) else [] for x in (r.get("images"), r["messages"]))
    if len(images) != 1 or len(turns) < 2:
        counts = f"{len(images)} images, {len(turns)} messages"
        raise SystemExit(f"{where}: {counts}; want one image, a user and an assistant message; mend the row")
    turns = [t if isinstance(t, dict) else {} for t in turns[:2]]
    user, completion = (t.get("content") for t in turns)
    roles = [t.get("role", role) for t, role in zip(turns, ("user", "assistant"), strict=True)]
    if roles != ["user", "assistant"] or not isinstance(user, str) or not isinstance(completion, str):
        found = ascii([t.get("content") for t in turns])[:80]
        raise SystemExit(f"{where}: messages of {roles}, {found}; want text of user and assistant; mend the row")
    user = user.replace("<image>", "")
    suffix = R1_SUFFIX if user.endswith(R1_SUFFIX) else ""
    return user.removesuffix(R1_SUFFIX), completion, suffix


def read_samples(path):
    """Samples of any format we know, as dicts with the same keys.

    Reads our JSONL, ShareGPT JSON (messages, images), GRPO parquet (image, problem, solution) and KVG-Bench parquet
    (question_id, question, answer, image, category). Keys: id, image (path or bytes), image_id, question, answer,
    bbox_1000 (list of 4 ints or None), entity, category, completion (what SFT learns, or None), prompt_suffix, row.
    Image paths: see `image_path`. Errors: one line for a missing or broken file, an unknown format, a missing column, a
    value of another type, a box that is none, an image elsewhere, and a special token in a name or a text.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; want parquet of KVG-Bench or of GRPO; check the path")
        rows, columns = read_parquet(path)
        bench = "question" in columns
        names = (
            ("question_id", "question", "answer", "image", "category") if bench else ("image", "problem", "solution")
        )
        if missing := [n for n in names if n not in columns]:
            raise SystemExit(
                f"{path}: no column {missing[0]!r}, found {columns}; want {', '.join(names)}; check the file"
            )
        if not bench:
            rows = [r | {"id": str(i), "question": r["problem"], "answer": r["solution"]} for i, r in enumerate(rows)]
        rows = [{"id": r.get("question_id")} | r for r in rows]
    elif path.suffix == ".json":
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; want ShareGPT JSON (messages, images); check the path")
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as e:
            raise SystemExit(f"{path}: not JSON ({e}); want ShareGPT JSON; check the file") from None
        if not isinstance(rows, list):
            raise SystemExit(f"{path}: a {type(rows).__name__}; want a list, ShareGPT JSON; check the file")
        for i, r in enumerate(rows):
            if not isinstance(r, dict) or "messages" not in r or "images" not in r:
                raise SystemExit(f"{path}: row {i + 1} has no messages or images; want ShareGPT JSON; check the file")
        rows = [r | {"id": r.get("id", str(i))} for i, r in enumerate(rows)]
    else:
        try:
            rows = read_jsonl(path, ("id", "images", "messages"))
        except UnicodeDecodeError as e:
            raise SystemExit(f"{path}: no text ({e}); want JSONL in UTF-8; write it again") from None
    if not rows:
        raise SystemExit(f"{path}: 0 rows; want at least one; check the file")
    samples = []
    for i, r in enumerate(rows):
        where = f"{path}:{i + 1} ({ascii(r['id'])[:80] if not isinstance(r['id'], str) else r['id']})"
        if type(r["id"]) not in (str, int) or r["id"] == "":
            raise SystemExit(f"{where}: no id; want text or an integer; mend the row")
        completion, suffix = None, ""
        if "messages" in r:
            question, completion, suffix = parse_turns(r, where)
            answer = completion.rsplit("<answer>", 1)[-1].split("</answer>")[0]
            r = {"question": question} | r
            r["answer"] = answer if r.get("answer") is None else r["answer"]
            check_text(completion, where, "assistant's message")
            image = image_id = image_path(path.parent, r["images"][0], where)
        else:
            image = r["image"].get("bytes") or r["image"].get("path") if isinstance(r["image"], dict) else r["image"]
            if not image or not isinstance(image, (bytes, str)):
                raise SystemExit(f"{where}: no image; want a path, or bytes; mend or drop the row")
            image = image_path(path.parent, image, where) if isinstance(image, str) else image
            image_id = hashlib.md5(image).hexdigest() if isinstance(image, bytes) else image
        check_text(r["question"], where, "question")
        check_text(r["answer"], where, "answer")
        if not r["question"].strip():
            raise SystemExit(f"{where}: an empty question; want one; mend the row")
        if r.get("category") is not None:
            check_name(r["category"], where, "category")
        box = BOX.search(r["answer"])
        bbox_1000 = [int(v) for v in box.groups()] if box else None
        if bbox_1000 and not is_box(bbox_1000, most=1000):
            raise SystemExit(
                f"{where}: bbox_1000 {bbox_1000}; want 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000; mend the row"
            )
        listed = r.get("entities") or []
        for e in listed if isinstance(listed, list) else [listed]:
            e = e if isinstance(e, dict) else {}
            check_name(e.get("entity"), where)
            if not is_box(e.get("bbox_px")):
                raise SystemExit(
                    f"{where}: bbox_px {ascii(e.get('bbox_px'))[:80]} of {e['entity']}; want 0 <= x1 < x2 and "
                    "0 <= y1 < y2; mend the row"
                )
        entity = REF.search(r["answer"]) or REF.search(r["question"])
        samples.append(
            {
                "id": r["id"],
                "image": image,
                "image_id": image_id,
                "question": r["question"],
                "answer": r["answer"],
                "bbox_1000": bbox_1000,
                "entity": entity.group(1) if entity else None,
                "category": r.get("category"),
                "completion": completion,
                "prompt_suffix": suffix,
                "row": r,
            }
        )
    if twice := [i for i, count in Counter(s["id"] for s in samples).items() if count > 1]:
        raise SystemExit(f"{path}: id {twice[0]!r} occurs more than once; want unique ids; mend the file")
    return samples


def check_weights(path):
    """Errors: one line for a model folder without weights, or with a safetensors file that is not whole.

    Reads sizes and headers alone. A name on the hub and other formats of weights are left to transformers.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise SystemExit(f"{index}: broken ({e}); want a list of weight files; copy the model again") from None
    elif any(folder.glob("pytorch_model*.bin*")):
        return
    for file in files:
        if not file.is_file():
            raise SystemExit(
                f"{file}: no such file; want the weights of the model; copy the model again, or check --model"
            )
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = f.read(length if length < file.stat().st_size else 0)
        try:
            table = json.loads(header)
            end = max(entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            end = None
        size = file.stat().st_size
        if end is None or size != 8 + length + end:
            want = "a header" if end is None else f"{8 + length + end} bytes"
            raise SystemExit(f"{file}: {size} bytes, not a whole file; want {want}; copy the model again")


def load_processors(model_path, max_pixels):
    """Tokenizer and image processor. The PIL backend everywhere: torchvision resizes to other pixels.

    Errors: one line for what is missing in the folder, the weights too, before they are loaded.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        image_processor = AutoImageProcessor.from_pretrained(model_path, backend="pil")
    except (OSError, ValueError) as e:
        raise SystemExit(
            f"{model_path}: {str(e).splitlines()[0]}; want a folder with tokenizer and image processor; check it"
        ) from None
    wanted = "<|image_pad|> <|vision_start|> <|vision_end|> <|im_start|> <|im_end|> <|endoftext|> <|object_ref_start|>"
    wanted = f"{wanted} <|object_ref_end|> <|box_start|> <|box_end|>".split()
    if missing := [token for token in wanted if token not in tokenizer.get_vocab()]:
        raise SystemExit(f"{model_path}: the tokenizer has no {missing[0]}; want a Qwen-VL; check the model")
    if not tokenizer.chat_template:
        raise SystemExit(f"{model_path}: the tokenizer has no chat template; want an Instruct model; check the model")
    check_weights(model_path)
    image_processor.size = {
        "shortest_edge": min(image_processor.size["shortest_edge"], max_pixels),
        "longest_edge": max_pixels,
    }
    return tokenizer, image_processor


def open_image(image):
    """(image, how it must be turned) of a path or bytes, from the header; the first frame if there are several.

    Everything that reads an image turns it as its EXIF says, as every viewer does: the boxes count in the turned image.
    """
    im = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    if im.format == "TIFF" or im.format == "PNG" and "exif" not in im.info:
        return im, None  # Pillow turns TIFF itself; it would read a whole PNG to look for EXIF at its end
    try:
        orientation = im.getexif().get(0x0112)
    except (OSError, ValueError, SyntaxError, EOFError):
        return im, None  # broken EXIF in a sound image
    flip = Image.Transpose
    turns = {2: flip.FLIP_LEFT_RIGHT, 3: flip.ROTATE_180, 4: flip.FLIP_TOP_BOTTOM, 5: flip.TRANSPOSE,
             6: flip.ROTATE_270, 7: flip.TRANSVERSE, 8: flip.ROTATE_90}  # fmt: skip
    return im, turns.get(orientation)


def decode_image(image):
    """RGB picture of a path or bytes, RGBA if it has transparency. Errors: one of UNREADABLE.

    16-bit grey is scaled to 8 bits (Pillow's own conversion clips it to white).
    """
    im, turn = open_image(image)
    name = im.format
    if im.mode == "F":
        raise ValueError("32-bit float pixels, want 8 or 16 bits a channel")
    if im.mode.startswith("I"):
        im = im.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    mode = "RGBA" if im.has_transparency_data else "RGB"
    if im.mode == mode:
        im.load()  # decodes; convert() would copy the pixels
    else:
        im = im.convert(mode)
    im = im if turn is None else im.transpose(turn)
    im.format = name
    return im


def load_image(image):
    """RGB picture from a path or bytes; transparent parts are white. Errors: one line if it is missing or broken."""
    try:
        im = decode_image(image)
    except UNREADABLE as e:
        name = image if isinstance(image, str) else "image bytes"
        raise SystemExit(f"{name}: unreadable ({e}); want an image; mend the row") from None
    if im.mode == "RGB":
        return im
    canvas = Image.new("RGB", im.size, (255, 255, 255))
    canvas.paste(im, (0, 0), im)
    return canvas


def resized_size(image_processor, image):
    """(width, height) px at which the model sees an image, from the image's header alone. Errors: one line."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    try:
        im, turn = open_image(image)
        with im:
            sideways = turn in (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                                Image.Transpose.ROTATE_90)  # fmt: skip
            width, height = im.size[::-1] if sideways else im.size
        factor, size = image_processor.patch_size * image_processor.merge_size, image_processor.size
        height, width = smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
    except UNREADABLE as e:
        raise SystemExit(
            f"{image if isinstance(image, str) else 'image bytes'}: unreadable ({e}); want another; mend the row"
        ) from None
    return width, height


def prompt_length(tokenizer, image_processor, image, text, style):
    """Tokens of a prompt, from the image's header alone."""
    width, height = resized_size(image_processor, image)
    merged = image_processor.patch_size * image_processor.merge_size
    return len(prompt_ids(tokenizer, model_text(text, style, (width, height)), width * height // merged**2))


def prompt_ids(tokenizer, text, count):
    """Token ids of one user turn with one image of `count` visual tokens, up to the assistant's first token."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(prompt.replace("<|image_pad|>", "<|image_pad|>" * count, 1), add_special_tokens=False)


def rope_positions(ids, grid_thw, image_id, merge):
    """M-RoPE positions (3, P) of a prompt with one image: its tokens count frame, row and column, text counts on."""
    _, rows, columns = (int(n) for n in grid_thw)
    rows, columns, start = rows // merge, columns // merge, ids.index(image_id)
    end = start + rows * columns
    positions = torch.arange(len(ids)).repeat(3, 1)
    positions[0, start:end] = start
    positions[1, start:end] = start + torch.arange(rows).repeat_interleave(columns)
    positions[2, start:end] = start + torch.arange(columns).repeat(rows)
    positions[:, end:] += max(rows, columns) - rows * columns
    return positions


def chat_inputs(tokenizer, image_processor, image, text, style=BOX_STYLES["qwen2_vl"]):
    """Prompt with one image, read and resized once; its text in the family's style.

    Shapes: prompt_ids list of P ints, position_ids (3, P), pixel_values (patches, values), image_grid_thw (1, 3).
    `grid`: the (width, height) that the model's boxes count in.
    """
    resized_size(image_processor, image)  # says in one line what cannot be resized
    vision = image_processor(images=[load_image(image)], return_tensors="pt")
    merge, grid_thw = image_processor.merge_size, vision["image_grid_thw"]
    _, rows, columns = grid_thw[0].tolist()
    patch = image_processor.patch_size
    grid = (columns * patch, rows * patch) if style.pixels else (1000, 1000)
    ids = prompt_ids(tokenizer, model_text(text, style, grid), rows * columns // merge**2)
    positions = rope_positions(ids, grid_thw[0], tokenizer.convert_tokens_to_ids("<|image_pad|>"), merge)
    return {
        "prompt_ids": ids,
        "position_ids": positions,
        "pixel_values": vision["pixel_values"],
        "image_grid_thw": grid_thw,
        "grid": grid,
        "style": style,
    }


# <<< shared:chat_inputs


# >>> shared:load_model (copy of train_sft.py)
def check_model(path):
    """The BoxStyle of a model. Errors: one line unless `path` names a Qwen-VL that we know; loads no weights."""
    gc.disable()  # until load_model: what imports leave behind stays, and is scanned again and again while they run
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError) as e:
        raise SystemExit(
            f"{path}: no model ({str(e).splitlines()[0]}); want a Hugging Face folder or name; check --model"
        ) from None
    if kind not in BOX_STYLES:
        raise SystemExit(f"{path}: model_type {kind!r}; want one of {', '.join(BOX_STYLES)}; check --model")
    return BOX_STYLES[kind]


def load_model(path, dtype, device):
    """A Qwen-VL on the device; its vision tower attends by flash-attn 2 where CUDA has it, else by SDPA.

    How its decoder attends is said at `packed_attention`. dtype auto: bfloat16 on CUDA, float32 on CPU.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import is_flash_attn_2_available, logging

    logging.disable_progress_bar()
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(dtype, dtype)
    attention = (
        "flash_attention_2" if device.type == "cuda" and dtype == "bfloat16" and is_flash_attn_2_available() else "sdpa"
    )
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    gc.enable()
    return model.to(device)


# <<< shared:load_model


# >>> shared:packed (copy of train_sft.py)
@dataclass
class PackedRow:
    """Prompts, each followed by its completions, end to end in one row of T tokens; no padding.

    A token sees its prompt and its own completion up to itself and nothing else, and the positions of every completion
    go on where the prompt ends: each completion is computed as if it stood alone behind its prompt, but the prompt
    and its image go through the model once.
    """

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (3, 1, T), M-RoPE
    spans: list  # per prompt: (start, prompt tokens, [tokens of each completion])
    at: torch.Tensor  # (N,), the position before each completion token
    targets: torch.Tensor  # (N,), that token
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor
    image_features: list | None  # per image (1 + deepstack levels, visual tokens, hidden), if computed before
    causal: torch.Tensor  # (longest completion, longest prompt + it), True where a completion token may look
    varlen: dict | None = None  # the same as sequences for the CUDA kernel


def pack(items, device, image_features=None):
    """PackedRow of [(inputs of chat_inputs, list of completions as token ids), ...].

    `image_features`: one tensor per item where the vision tower need not run again.
    """
    ids, positions, spans, at, targets = [], [], [], [], []
    for inputs, completions in items:
        prompt, start = inputs["prompt_ids"], len(ids)
        lengths = [len(c) for c in completions]
        if len(completions) == 1:  # a prompt with one completion is one plain causal sequence
            spans.append((start, len(prompt) + lengths[0], []))
        else:
            spans.append((start, len(prompt), lengths))
        ids += prompt
        positions.append(inputs["position_ids"])
        for completion in completions:
            at += [start + len(prompt) - 1, *range(len(ids), len(ids) + len(completion) - 1)]
            targets += completion
            ids += completion
            after = int(inputs["position_ids"][0, -1]) + 1
            positions.append(torch.arange(after, after + len(completion)).expand(3, -1))
    longest_prompt = max(length for _, length, _ in spans)
    longest = max((n for _, _, lengths in spans for n in lengths), default=0)
    return PackedRow(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.cat(positions, 1)[:, None].to(device),
        spans=spans,
        at=torch.tensor(at, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        pixel_values=None if image_features else torch.cat([x["pixel_values"] for x, _ in items]).to(device),
        image_grid_thw=torch.cat([x["image_grid_thw"] for x, _ in items]).to(device),
        image_features=image_features,
        causal=torch.ones(longest, longest_prompt + longest, dtype=torch.bool, device=device).tril(longest_prompt),
    )


def attend_spans(query, key, value, scaling, row):
    """Attention of a packed row, span by span. Shapes: query (1, H, T, D), key, value (1, KV, T, D) -> (1, T, H, D)."""
    attend = partial(torch.nn.functional.scaled_dot_product_attention, scale=scaling, enable_gqa=True)
    sizes = [n for _, length, completions in row.spans for n in (length, *completions)]
    parts = zip(*(x.split(sizes, 2) for x in (query, key, value)), strict=True)  # whose gradient is one concatenation
    out, width = [], row.causal.shape[1] - row.causal.shape[0]
    for _, length, completions in row.spans:
        q, k, v = next(parts)
        out.append(attend(q, k, v, is_causal=True))
        for n in completions:
            q, own_k, own_v = next(parts)
            mask = row.causal[:n, width - length : width + n]  # its prompt, and itself up to each token
            out.append(attend(q, torch.cat([k, own_k], 2), torch.cat([v, own_v], 2), attn_mask=mask))
    return torch.cat([o.transpose(1, 2) for o in out], 1)


def varlen_layout(row):
    """What the CUDA kernel needs: every prompt and every completion is a sequence; a completion's keys are its prompt's
    and its own. Shapes: keys (K,) positions in the row; cu_seq_q, cu_seq_k (sequences + 1,) int32.
    """
    device, keys, lengths_q, lengths_k = row.input_ids.device, [], [], []
    for start, length, completions in row.spans:
        here, prompt = start + length, list(range(start, start + length))
        keys += prompt
        lengths_q.append(length)
        lengths_k.append(length)
        for n in completions:
            keys += prompt + list(range(here, here + n))
            lengths_q.append(n)
            lengths_k.append(length + n)
            here += n
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths_q, lengths_k))
    return {"keys": torch.tensor(keys, device=device), "cu_seq_q": cu_q.to(device), "cu_seq_k": cu_k.to(device),
            "max_q": max(lengths_q), "max_k": max(lengths_k)}  # fmt: skip


@lru_cache
def attention_kernel(device_type, dtype):
    """How a packed row attends: flash_attn, or torch's varlen_attn, on CUDA in half precision; else sdpa."""
    if device_type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        if importlib.util.find_spec("flash_attn"):
            return "flash_attn"
        from torch.nn.attention import varlen

        if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:  # torch 2.13 has it
            return "varlen_attn"
    return "sdpa"


def attend_varlen(query, key, value, scaling, row, kernel):
    """`attend_spans` in one call of a variable-length kernel; causal masks start in the lower right corner there."""
    row.varlen = layout = row.varlen or varlen_layout(row)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    k, v = k[layout["keys"]], v[layout["keys"]]
    sizes = (layout[name] for name in ("cu_seq_q", "cu_seq_k", "max_q", "max_k"))
    if kernel == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *sizes, softmax_scale=scaling, causal=True)[None]
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, *sizes, scale=scaling, window_size=(-1, 0), enable_gqa=True)[None]


def packed_attention(module, query, key, value, attention_mask, scaling=None, row=None, cache=None, **kwargs):
    """Attention function for transformers. With a PackedRow: within its spans; without: plain SDPA.

    Shapes: query (1, H, T, D), key, value (1, KV, T, D) -> (1, T, H, D), None. `cache`: list that keeps key and value.
    """
    if row is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if cache is not None:
        cache.append((key, value))
    kernel = attention_kernel(query.device.type, query.dtype)
    if kernel == "sdpa":
        return attend_spans(query, key, value, scaling, row), None
    return attend_varlen(query, key, value, scaling, row, kernel), None


def embed_images(model, row):
    """Output of the vision tower, one tensor (1 + D, visual tokens, hidden) per image of the row.

    First what the decoder reads in place of the image, then what Qwen3-VL adds behind its first D layers (deepstack).
    """
    out = model.model.get_image_features(row.pixel_values, row.image_grid_thw, return_dict=True)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    return [torch.stack(image) for image in zip(*levels, strict=True)]


def hidden_states(model, row, cache=None):
    """Last hidden states (T, hidden) of a packed row, under the model's own modules."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    text = model.config.get_text_config()
    if text._attn_implementation != "packed":
        AttentionInterface.register("packed", packed_attention)
        AttentionMaskInterface.register("packed", sdpa_mask)
        vision = model.config.vision_config._attn_implementation
        model.set_attn_implementation({"text_config": "packed", "vision_config": vision})
    levels = list(zip(*(row.image_features or embed_images(model, row)), strict=True))
    return model.model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        mm_encoder_outputs={"image": SimpleNamespace(pooler_output=levels[0], deepstack_features=levels[1:])},
        use_cache=False,
        row=row,
        cache=cache,
    ).last_hidden_state[0]


def prefetch(function, items, workers, ahead):
    """function(item) for every item, in order; threads compute up to `ahead` of them early, while the model works."""
    with ThreadPoolExecutor(workers) as pool:
        items, early = iter(items), deque()
        for item in itertools.islice(items, ahead):
            early.append(pool.submit(function, item))
        while early:
            result = early.popleft().result()
            early.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield result


@contextmanager
def timed(seconds, phase):
    """Adds the wall time of the block to seconds[phase]; waits for the device at both ends."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    yield
    wait()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began


# <<< shared:packed


# >>> shared:answer_format (copy of train_grpo.py)
POINT = r"\(\s*[0-9]+(?:\.[0-9]+)?\s*,\s*[0-9]+(?:\.[0-9]+)?\s*\)"
FOUR = r"[0-9]+(?:\.[0-9]+)?\s*(?:,\s*[0-9]+(?:\.[0-9]+)?\s*){3}"
BOXES = re.compile(rf"{POINT}(?:\s*,?\s*{POINT})+|\(\s*{FOUR}\)|\[\s*{FOUR}\]")
CANONICAL = re.compile(r"\(\d{1,4},\d{1,4}\),\(\d{1,4},\d{1,4}\)", re.A)
CANONICAL_JSON = re.compile(r'"bbox_2d":\s*\[\d{1,4}(?:,\s*\d{1,4}){3}\]', re.A)
THINK_ANSWER = re.compile(
    r"<think>((?:(?!</?think>|</?answer>).)*)</think>\s*<answer>((?:(?!</?think>|</?answer>).)*)</answer>", re.S
)


def answer_text(text, mode="r1"):
    """Where the box is looked for, or None. `r1`: the one closed <answer> pair, not inside an open <think>.

    Other modes: the whole text, or the answer block if there is one.
    """
    if (text.count("<answer>"), text.count("</answer>")) == (1, 1):
        before, rest = text.split("<answer>")
        if "</answer>" in rest and before.count("<think>") == before.count("</think>"):
            return rest.split("</answer>")[0]
    return None if mode == "r1" or "<answer>" in text or "</answer>" in text else text


def parse_bbox(text, mode="r1", grid=(1000, 1000)):
    """The one box of a completion as [x1, y1, x2, y2] on the 0..1000 grid, or None.

    Notations: (x1,y1),(x2,y2) · (x1,y1,x2,y2) · [x1,y1,x2,y2], nested or in JSON too; decimals and spaces allowed.
    The same box twice is one box. Two boxes, a chain of three points, a number beyond the `grid` (width, height) that
    the model counts in, x1 >= x2 or y1 >= y2: None. Nothing is reordered or clipped.
    """
    region = answer_text(text, mode)
    if region is None:
        return None
    found = {tuple(float(v) for v in re.findall(r"[0-9]+(?:\.[0-9]+)?", m[0])) for m in BOXES.finditer(region)}
    if len(found) != 1:
        return None
    (box,) = found
    if len(box) != 4 or not (box[0] < box[2] <= grid[0] and box[1] < box[3] <= grid[1]):
        return None
    return [int(v) if v == int(v) else v for v in (v * 1000 / n for v, n in zip(box, grid * 2, strict=True))]


def box_iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2) in the same unit, 0..1."""
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


# <<< shared:answer_format


# >>> shared:sampling (copy of train_grpo.py)
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def vision_ids(tokenizer):
    """Ids that are never sampled: in a completion they would be counted as image features."""
    return [i for i in tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)) if i is not None]


def stop_ids(tokenizer):
    return tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def uniforms(seed, count):
    """`count` numbers in [0, 1) that depend on the string `seed` alone, not on batch, rank or position."""
    return np.random.default_rng(list(hashlib.sha256(seed.encode()).digest())).random(count, dtype=np.float32)


def choose(logits, draw, banned, temperature):
    """Next tokens and their log-probs. Shapes: logits (R, V), draw (R,) in [0, 1) -> (R,), (R,) fp32.

    At temperature 0 the likeliest token, else the inverse of the cumulative distribution at `draw`.
    """
    logp = torch.log_softmax(logits.float().index_fill(-1, banned, float("-inf")) / (temperature or 1.0), -1)
    if temperature > 0:
        cdf = logp.exp().cumsum(-1)
        token = torch.searchsorted(cdf, draw[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=cdf.shape[-1] - 1)
    else:
        token = logp.argmax(-1)
    return token, logp.gather(1, token[:, None])[:, 0]


def completion_text(tokenizer, ids):
    """Text with box and ref tokens, without the stop token."""
    return tokenizer.decode(ids, skip_special_tokens=False).removesuffix("<|im_end|>").removesuffix("<|endoftext|>")


# <<< shared:sampling


# >>> shared:rollout (copy of train_grpo.py)
@dataclass
class DecodeState:
    """What decoding keeps on the device: R rows, one per completion; those of a prompt stand together.

    Shapes: B prompts of at most P tokens, G = R / B rows of each, C new tokens, KV heads of width D.
    """

    prompt_kv: list  # per layer keys and values (B, KV, P, D) of the prompts, read by all their rows
    own_kv: list  # per layer keys and values (R, KV, W, D) of the completions; W grows with them
    prompt_bias: torch.Tensor  # (B, 1, 1, P), -inf where a prompt has ended
    position: torch.Tensor  # (R,), of the next token
    logits: torch.Tensor  # (R, V) fp32, of the next token
    done: torch.Tensor  # (R,) bool
    row: torch.Tensor  # (R,), where this row writes into the results below
    step: torch.Tensor  # (1,), tokens so far
    token: torch.Tensor  # (R,), the newest
    draws: torch.Tensor  # (rows, C) in [0, 1)
    tokens: torch.Tensor  # (rows, C), -1 behind the end
    logps: torch.Tensor  # (rows, C) fp32


def linear(x, module):
    return torch.nn.functional.linear(x, module.weight, module.bias)


def rms_norm(x, module):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * wide.to(x.dtype)


def prefill(model, prompts, seeds, max_completion_length, times):
    """DecodeState after one pass over all prompts in one packed row: every prompt once, no padding."""
    device, generations = model.device, len(seeds[0])
    with timed(times, "vision"):
        row = pack([(p, []) for p in prompts], device)
        row.image_features = embed_images(model, row)
        for p, features in zip(prompts, row.image_features, strict=True):
            p["image_features"] = features
    with timed(times, "prefill"):
        packed_kv, lengths = [], [length for _, length, _ in row.spans]
        hidden = hidden_states(model, row, packed_kv)
        ends = torch.tensor([start + length - 1 for start, length, _ in row.spans], device=device)
        logits = model.lm_head(hidden[ends]).float().repeat_interleave(generations, 0)
        prompt_kv = []
        while packed_kv:  # (1, KV, T, D) -> (B, KV, P, D)
            layer = [x[0].transpose(0, 1).split(lengths) for x in packed_kv.pop(0)]
            prompt_kv.append([torch.nn.utils.rnn.pad_sequence(x, True).transpose(1, 2).contiguous() for x in layer])
        rows, C = len(logits), max_completion_length
        k = prompt_kv[0][0]
        ended = torch.arange(k.shape[2], device=device) >= torch.tensor(lengths, device=device)[:, None]
        after = torch.tensor([int(p["position_ids"][0, -1]) for p in prompts], device=device) + 1
        draws = np.stack([uniforms(seed, C) for group in seeds for seed in group])
        return DecodeState(
            prompt_kv=prompt_kv,
            own_kv=[[k.new_zeros(rows, k.shape[1], 0, k.shape[3]) for _ in range(2)] for _ in prompt_kv],
            prompt_bias=k.new_zeros(ended.shape).masked_fill(ended, float("-inf"))[:, None, None],
            position=after.repeat_interleave(generations),
            logits=logits,
            done=torch.zeros(rows, dtype=torch.bool, device=device),
            row=torch.arange(rows, device=device),
            step=torch.zeros(1, dtype=torch.long, device=device),
            token=torch.zeros(rows, dtype=torch.long, device=device),
            draws=torch.from_numpy(draws).to(device),
            tokens=torch.full((rows, C), -1, device=device),
            logps=torch.zeros(rows, C, device=device),
        )


def sample_step(state, stop, banned, temperature):
    """Takes the next token of every row from its logits and writes it down; all on the device."""
    token, logp = choose(state.logits, state.draws[state.row, state.step], banned, temperature)
    state.tokens[state.row, state.step] = torch.where(state.done, -1, token)
    state.logps[state.row, state.step] = logp
    state.token.copy_(token)
    state.done |= (token[:, None] == stop).any(-1)


def forward_step(model, state):
    """One token of every row through the model, into state.logits.

    The prompt's keys are read once for all rows of the prompt. Softmax runs over prompt and completion together, so
    that this is plain attention.
    """
    text = model.model.language_model
    angles = state.position[:, None].float() * text.rotary_emb.inv_freq.float()
    cos, sin = (a * text.rotary_emb.attention_scaling for a in (angles.cos(), angles.sin()))
    cos, sin = (torch.cat([a, a], -1)[:, None].to(model.dtype) for a in (cos, sin))  # (R, 1, D)
    (B, KV, P, D), (R, _, W, _) = state.prompt_kv[0][0].shape, state.own_kv[0][0].shape
    G, future = R // B, torch.arange(W, device=state.step.device) > state.step
    own_bias = torch.zeros(W, dtype=model.dtype, device=future.device).masked_fill(future, float("-inf"))

    def rotate(x):  # (R, heads, D)
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    x = torch.nn.functional.embedding(state.token, text.embed_tokens.weight)
    for layer, (prompt_k, prompt_v), (own_k, own_v) in zip(text.layers, state.prompt_kv, state.own_kv, strict=True):
        h, attention = rms_norm(x, layer.input_layernorm), layer.self_attn
        q, k, v = (linear(h, m).view(R, -1, D) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):  # Qwen3-VL
            q, k = rms_norm(q, attention.q_norm), rms_norm(k, attention.k_norm)
        own_k.index_copy_(2, state.step, rotate(k)[:, :, None])
        own_v.index_copy_(2, state.step, v[:, :, None])
        q = (rotate(q) * attention.scaling).view(B, G, KV, -1, D)
        n = q.shape[3]  # query heads per key head
        to_prompt = q.transpose(1, 2).reshape(B, KV, G * n, D) @ prompt_k.transpose(2, 3) + state.prompt_bias
        to_own = q.reshape(R, KV, n, D) @ own_k.transpose(2, 3) + own_bias
        to_own = to_own.view(B, G, KV, n, W).transpose(1, 2).reshape(B, KV, G * n, W)
        weights = torch.cat([to_prompt, to_own], -1).float().softmax(-1).to(x.dtype)
        from_prompt = (weights[..., :P] @ prompt_v).view(B, KV, G, n, D).transpose(1, 2)
        weights = weights[..., P:].view(B, KV, G, n, W).transpose(1, 2).reshape(R, KV, n, W)
        from_own = weights @ own_v
        x = x + linear(from_prompt.reshape(R, -1) + from_own.reshape(R, -1), attention.o_proj)
        h, mlp = rms_norm(x, layer.post_attention_layernorm), layer.mlp
        x = x + linear(torch.nn.functional.silu(linear(h, mlp.gate_proj)) * linear(h, mlp.up_proj), mlp.down_proj)
    state.logits.copy_(linear(rms_norm(x, text.norm), model.lm_head))
    state.position += 1


def drop_finished(state):
    """The state without groups that are done, and with as many rows per group as the fullest still needs."""
    unfinished = ~state.done.view(len(state.prompt_bias), -1)
    groups, generations = unfinished.any(1).nonzero()[:, 0], int(unfinished.sum(1).max())
    if len(groups) * generations > 0.9 * unfinished.numel():
        return state
    first = unfinished.int().argsort(dim=1, descending=True, stable=True)[groups, :generations]
    keep = (first + groups[:, None] * unfinished.shape[1]).flatten()
    by_row = {name: getattr(state, name)[keep] for name in ("position", "logits", "done", "row", "token")}
    own_kv = [[x[keep] for x in layer] for layer in state.own_kv]
    prompt_kv = [[x[groups] for x in layer] for layer in state.prompt_kv]
    return replace(state, prompt_kv=prompt_kv, own_kv=own_kv, prompt_bias=state.prompt_bias[groups], **by_row)


def widen(state, width):
    """The state with room for `width` tokens per completion. What is read at every token stays in one piece."""
    pad = torch.nn.functional.pad
    return replace(state, own_kv=[[pad(x, (0, 0, 0, width - x.shape[2])) for x in layer] for layer in state.own_kv])


@contextmanager
def whole_weights(model):
    """With ZeRO-3 each rank holds a slice of every weight: gathers them once for a whole decode loop."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def capture(advance):
    """`advance` as a CUDA graph: returns its replay. Capturing runs nothing."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()
    return graph.replay


def decode(model, state, stop, banned, temperature, graphs):
    """Fills state.tokens and state.logps until every row has stopped or is full.

    With `graphs` (CUDA) a step is one captured graph, the host looks at `done` every 16 tokens only, and rows stay
    where they are: reading the weights is what a step costs there. Without, finished rows are left behind.
    """
    C, replay, stride = state.tokens.shape[1], None, 256 if graphs else 32

    def advance():
        forward_step(model, state)
        state.step += 1
        sample_step(state, stop, banned, temperature)

    sample_step(state, stop, banned, temperature)
    for t in range(C - 1):  # token t goes in, its key and value are kept at t, and token t + 1 comes out
        if (not graphs or t % 16 == 15) and bool(state.done.all()):
            break
        if not graphs and t % 8 == 7:
            state = drop_finished(state)
        if t % stride == 0:
            state, replay = widen(state, min(C, t + stride)), None
            advance()  # also the warm-up that a capture needs
        elif graphs:
            replay = replay or capture(advance)
            replay()
        else:
            advance()


@torch.no_grad()
def rollout(model, tokenizer, prompts, seeds, max_completion_length, temperature, batch_size, times=None):
    """Completions of every prompt, one per seed; decoded together, each prompt and its image computed once.

    Shapes: prompts: B dicts of `chat_inputs`; seeds: B lists of G strings -> B lists of G (ids, logps, finished);
    ids: list of at most C ints, with the stop token if it came; logps: fp32 log-probs of these ids under the sampler.
    Units: temperature 0 is greedy; batch_size rows at once; seconds are added to times["vision", "prefill", "decode"].
    A completion is a function of the weights, the prompt and its seed. Leaves "image_features" in the prompts.
    """
    generations, times = len(seeds[0]), {} if times is None else times
    stop, banned = (torch.tensor(i, device=model.device) for i in (stop_ids(tokenizer), vision_ids(tokenizer)))
    chunks, out = range(0, len(prompts), max(1, batch_size // generations)), []
    parts = [slice(i, i + chunks.step) for i in chunks]
    states = [prefill(model, prompts[part], seeds[part], max_completion_length, times) for part in parts]
    with timed(times, "decode"), whole_weights(model):
        for state in states:
            decode(model, state, stop, banned, temperature, graphs=model.device.type == "cuda")
    for state in states:
        finished = torch.isin(state.tokens, stop).any(-1).tolist()
        ids = [[x for x in row if x >= 0] for row in state.tokens.tolist()]
        logps = [row[: len(x)] for row, x in zip(state.logps.cpu(), ids, strict=True)]
        rows = list(zip(ids, logps, finished, strict=True))
        out += [rows[j : j + generations] for j in range(0, len(rows), generations)]
    return out


# <<< shared:rollout


# ---- scores ----
def score_answers(samples, answers, mode):
    """One row per case in the bench's order. An answer without one valid box has pred_bbox_1000 None and IoU 0."""
    rows = []
    for s in samples:
        answer = answers[s["id"]]
        box = parse_bbox(answer["response"], mode, answer.get("grid") or (1000, 1000))
        iou = box_iou(box, s["bbox_1000"]) if box else 0.0
        rows.append({"question_id": s["id"], "category": s["category"], "entity": s["entity"],
                     "response": answer["response"], "pred_bbox_1000": box, "gt_bbox_1000": s["bbox_1000"],
                     "iou": iou, "correct": iou >= CORRECT_IOU, "num_tokens": answer.get("num_tokens"),
                     "finished": answer.get("finished"), "grid": answer.get("grid"),
                     "image_id": s["image_id"]})  # fmt: skip
    return rows


def image_bootstrap(values, image_ids, seed):
    """95 % percentile interval [lo, hi] of the mean, resampling whole images; None for a single image.

    A resample is a count per image; its mean is a ratio of sums, because images carry different numbers of questions.
    """
    _, image = np.unique(image_ids, return_inverse=True)
    sums, sizes = np.bincount(image, weights=values), np.bincount(image)
    if len(sums) < 2:
        return None
    counts = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    return np.percentile((counts @ sums) / (counts @ sizes), [2.5, 97.5]).tolist()


def mcnemar_p(only_a, only_b):
    """Exact two-sided McNemar p-value: a fair coin gives each of the cases that only one run has right."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def split_rows(rows, seen):
    """{split: rows} for all, seen and unseen categories."""
    return {
        "all": rows,
        "seen": [r for r in rows if r["category"] in seen],
        "unseen": [r for r in rows if r["category"] not in seen],
    }


def split_metrics(rows, seed):
    """Accuracy with its interval, mean IoU and parse rate of some rows, 0..1; None for no rows."""
    if not rows:
        return None
    n, correct = len(rows), [float(r["correct"]) for r in rows]
    return {"n": n, "acc": sum(correct) / n, "acc_ci95": image_bootstrap(correct, [r["image_id"] for r in rows], seed),
            "mean_iou": sum(r["iou"] for r in rows) / n,
            "parse_rate": sum(r["pred_bbox_1000"] is not None for r in rows) / n}  # fmt: skip


def bench_metrics(rows, seen, seed):
    """Metrics of every split and category, and of the completions where their token counts are known."""
    metrics = {name: split_metrics(part, seed) for name, part in split_rows(rows, seen).items()}
    names = sorted({r["category"] for r in rows}, key=lambda c: (c not in seen, c))
    metrics["categories"] = {c: split_metrics([r for r in rows if r["category"] == c], seed) for c in names}
    tokens, ends = ([r[k] for r in rows if r[k] is not None] for k in ("num_tokens", "finished"))
    metrics["completions/mean_length"] = sum(tokens) / len(tokens) if tokens else None
    metrics["completions/clipped_ratio"] = sum(not e for e in ends) / len(ends) if ends else None
    return metrics


def percent(value, digits=1):
    return f"{100 * value:.{digits}f}"


def interval(ci, sign=""):
    return f"{100 * ci[0]:{sign}.1f} to {100 * ci[1]:{sign}.1f}" if ci else "-"


def markdown(header, lines):
    """Markdown table with padded columns: first column left, the others right."""
    widths = [max(len(str(c)) for c in column) for column in zip(header, *lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    rows = [[header[0].ljust(widths[0]), *(h.rjust(w) for h, w in zip(header[1:], widths[1:], strict=True))], rule]
    rows += [
        [str(r[0]).ljust(widths[0]), *(str(c).rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))] for r in lines
    ]
    return "".join("| " + " | ".join(r) + " |\n" for r in rows)


def metric_lines(metrics, seen):
    """(name, kind, n, accuracy, interval, mean IoU, parsed) as text: all, seen, unseen, then the categories."""

    def cells(m):
        return m["n"], percent(m["acc"]), interval(m["acc_ci95"]), f"{m['mean_iou']:.3f}", percent(m["parse_rate"])

    named = [(k, "split", metrics[k]) for k in ("all", "seen", "unseen")]
    named += [(c, "seen" if c in seen else "unseen", m) for c, m in metrics["categories"].items()]
    return [(name, kind, *(cells(m) if m else (0, *"----"))) for name, kind, m in named]


def metrics_table(metrics, seen):
    lines = [
        (name if kind == "split" else f"{name} ({kind})", *rest) for name, kind, *rest in metric_lines(metrics, seen)
    ]
    return markdown(("split", "cases", "accuracy %", "95 % interval", "mean IoU", "parsed %"), lines)


def compare_runs(a, b, seen, seed):
    """{split: n, acc_a, acc_b, difference B - A with interval, discordant cases, McNemar p} of two runs on one bench.

    The interval resamples images; the p-value takes questions as independent and is a little small where images have
    several.
    """
    columns = ("question_id", "category", "image_id", "gt_bbox_1000", "correct")
    runs = [{r["question_id"]: r for r in read_jsonl(Path(x) / "predictions.jsonl", columns)} for x in (a, b)]
    if odd := sorted(set(runs[0]) ^ set(runs[1])):
        raise SystemExit(
            f"{b}: {len(odd)} cases in one run only, first {odd[0]!r}; want two runs on one bench; check --compare"
        )
    if odd := [k for k, r in runs[0].items() if r["gt_bbox_1000"] != runs[1][k]["gt_bbox_1000"]]:
        raise SystemExit(
            f"{b}: {odd[0]!r} has another true box than in {a}; want two runs on one bench; check --compare"
        )
    result = {}
    for name, rows in split_rows(list(runs[0].values()), seen).items():
        pairs = [(bool(r["correct"]), bool(runs[1][r["question_id"]]["correct"])) for r in rows]
        only_a, only_b, n = pairs.count((True, False)), pairs.count((False, True)), len(pairs)
        both = pairs.count((True, True))
        differences, images = [float(y) - x for x, y in pairs], [r["image_id"] for r in rows]
        result[name] = {"n": n, "acc_a": (both + only_a) / n, "acc_b": (both + only_b) / n,
                        "difference": (only_b - only_a) / n,
                        "difference_ci95": image_bootstrap(differences, images, seed),
                        "only_a": only_a, "only_b": only_b,
                        "mcnemar_p": mcnemar_p(only_a, only_b)} if n else None  # fmt: skip
    return result


def compare_table(result):
    def cells(m):
        difference = f"{100 * m['difference']:+.1f}", interval(m["difference_ci95"], "+")
        ends = m["only_a"], m["only_b"], f"{m['mcnemar_p']:.2g}"
        return m["n"], percent(m["acc_a"]), percent(m["acc_b"]), *difference, *ends

    lines = [(k, *(cells(m) if m else (0, *"-------"))) for k, m in result.items()]
    return markdown(
        ("split", "cases", "A %", "B %", "B - A", "95 % interval", "only A right", "only B right", "McNemar p"), lines
    )


def summarize(run, seed):
    """Writes {run}/results.json, returns the table of a whole pipeline: a line per model, in order of evaluation."""
    paths = sorted(run.glob("eval_*/metrics.json"), key=lambda p: p.stat().st_mtime)
    if not paths:
        raise SystemExit(f"{run}: no eval_*/metrics.json; want the run folder of run_all.sh; run the evaluations first")
    rows, splits = [], ("seen", "unseen", "all")
    for path in paths:
        m = json.loads(path.read_text(encoding="utf-8"))
        rows.append({"model": path.parent.name.removeprefix("eval_"), "n": m["all"]["n"],
                     **{k: m[k] and m[k]["acc"] for k in splits},
                     "mean_iou": m["all"]["mean_iou"], "parse_rate": m["all"]["parse_rate"],
                     "ci95": {k: m[k] and m[k]["acc_ci95"] for k in splits}})  # fmt: skip
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).resolve().parent
    )
    seconds = {p.name: int(p.read_text()) for p in sorted((run / ".done").glob("*"), key=lambda p: p.stat().st_mtime)}
    write_text(
        run / "results.json",
        json.dumps({"rows": rows, "seconds": seconds, "seed": seed, "commit": git.stdout.strip() or None}, indent=1)
        + "\n",
    )
    lines = []
    for r in rows:
        cells = [f"{percent(r[k])} ({interval(r['ci95'][k])})" if r[k] is not None else "-" for k in splits]
        lines.append((r["model"], r["n"], *cells, f"{r['mean_iou']:.3f}", percent(r["parse_rate"])))
    return markdown(
        ("model", "cases", "seen % (95 %)", "unseen % (95 %)", "all % (95 %)", "mean IoU", "parsed %"), lines
    )


# ---- data ----
def read_bench(path):
    """Samples with text ids and categories, all with a box and a picture, each id once."""
    samples = [s | {"id": str(s["id"]), "category": str(s["category"] or "none").lower()} for s in read_samples(path)]
    if missing := [s["id"] for s in samples if s["bbox_1000"] is None]:
        raise SystemExit(
            f"{path} ({missing[0]}): no box in the answer; want <|box_start|>(x1,y1),(x2,y2)<|box_end|>; mend the row"
        )
    if twice := [i for i, count in Counter(s["id"] for s in samples).items() if count > 1]:
        raise SystemExit(f"{path}: id {twice[0]!r} occurs more than once; want every case once; mend the bench")
    if missing := [s["image"] for s in samples if isinstance(s["image"], str) and not os.path.isfile(s["image"])]:
        raise SystemExit(
            f"{path}: {missing[0]}: no such image; want paths relative to the bench's folder; check the folder"
        )
    return samples


def read_foreign_answers(path, samples):
    """{id: row} of answers made elsewhere: exactly one text for every case of the bench."""
    rows = read_jsonl(path, ("question_id", "response"))
    counts, wanted = Counter(str(r["question_id"]) for r in rows), {s["id"] for s in samples}
    if twice := [i for i, count in counts.items() if count > 1]:
        raise SystemExit(
            f"{path}: question_id {twice[0]!r} occurs {counts[twice[0]]} times; want every case once; drop the others"
        )
    if unknown := [i for i in counts if i not in wanted]:
        raise SystemExit(
            f"{path}: {len(unknown)} question_id not in the bench, first {unknown[0]!r}; "
            f"want its {len(wanted)} ids; check --bench"
        )
    if missing := [s["id"] for s in samples if s["id"] not in counts]:
        raise SystemExit(
            f"{path}: {len(missing)} of {len(wanted)} cases missing, first {missing[0]!r}; want every case; add them"
        )
    sound = [isinstance(r["response"], str) and isinstance(r.get("num_tokens"), int | None) for r in rows]
    if wrong := [r["question_id"] for r, good in zip(rows, sound, strict=True) if not good]:
        raise SystemExit(
            f"{path}: response or num_tokens of {wrong[0]!r} has another type; want text and an integer; mend the row"
        )
    return {str(r["question_id"]): r for r in rows}


def stored_answers(out):
    """{id: row} of an earlier run in this folder, finished or not. The part rows also hold the seconds they took."""
    paths = [out / "predictions.jsonl", *sorted(out.glob("part-*.jsonl"))]
    return {r["question_id"]: r for path in paths for r in complete_lines(path)}


# ---- model ----
def weights_md5(model):
    """Fingerprint of a local model folder, from 64 places of every weight file; '' for a hub name."""
    digest, files = hashlib.md5(), sorted(Path(model).glob("*.safetensors"))
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as f:
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(4096))
    return digest.hexdigest() if files else ""


def answer_cases(model, tokenizer, image_processor, style, samples, path, args):
    """Appends the greedy answers to `path`, batch by batch."""
    suffix, began, scored = EVAL_PROMPTS[args.prompt], time.time(), []
    suffix = R1_SUFFIX if suffix is None else suffix
    inputs = prefetch(
        lambda s: chat_inputs(tokenizer, image_processor, s["image"], s["question"] + suffix, style),
        samples, args.num_workers, args.batch_size,
    )  # fmt: skip
    for i in range(0, len(samples), args.batch_size):
        batch, since = samples[i : i + args.batch_size], time.time()
        prompts = list(itertools.islice(inputs, args.batch_size))
        rolled = rollout(
            model, tokenizer, prompts, [["0"]] * len(batch), args.max_completion_length, 0, args.batch_size
        )
        seconds = (time.time() - since) / len(batch)
        answers = {}
        for s, prompt, [(ids, _, finished)] in zip(batch, prompts, rolled, strict=True):
            answer = {"question_id": s["id"], "response": completion_text(tokenizer, ids), "num_tokens": len(ids)}
            answers[s["id"]] = answer | {"finished": finished, "grid": prompt["grid"], "seconds": seconds}
        with open(path, "a", encoding="utf-8") as f:
            f.write("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers.values()))
        scored += score_answers(batch, answers, args.prompt)
        n, parsed = len(scored), sum(r["pred_bbox_1000"] is not None for r in scored)
        correct, cut = sum(r["correct"] for r in scored), sum(not r["finished"] for r in scored)
        length, eta = sum(r["num_tokens"] for r in scored) / n, (time.time() - began) / n * (len(samples) - n) / 60
        print0(
            f"case {n:05d}/{len(samples):05d} | acc {correct / n:.3f} | parsed {parsed / n:.2f} | len {length:.0f} | "
            f"trunc {cut / n:.2f} | {seconds:.2f}s/case | eta {eta:.1f} min"
        )


# ---- report ----
REPORT_PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { --ink:#17212f; --dim:#5d6a7c; --line:#e2e7ee; --soft:#f5f7fa; --good:#0f8a50; --bad:#d3352c;
  --seen:#2b6cdf; --unseen:#8b4fd0; }
* { box-sizing:border-box }
body { margin:0; background:var(--soft); color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }
main { max-width:1180px; margin:0 auto; padding:2.2rem 1.25rem 4rem }
h1 { font-size:1.75rem; line-height:1.2; margin:0 0 .4rem; letter-spacing:-.01em; overflow-wrap:anywhere }
h2 { font-size:1.1rem; margin:0 0 .8rem }
h3 { font-size:1.05rem; margin:0; overflow-wrap:anywhere }
p { margin:0 }
.dim { color:var(--dim); font-size:.9rem }
.lead { color:var(--dim); max-width:52rem }
.panel,.card { background:#fff; border:1px solid var(--line); border-radius:12px;
  box-shadow:0 1px 2px rgb(20 30 50/.05) }
.panel { padding:1.2rem 1.3rem }
.heads { display:grid; grid-template-columns:repeat(3,1fr); gap:1rem; margin:1.6rem 0 1rem }
.head b { display:block; font-size:2.5rem; line-height:1.15; letter-spacing:-.02em; font-variant-numeric:tabular-nums }
.head b small { font-size:1.2rem; font-weight:600 }
.two { display:grid; grid-template-columns:1fr 1fr; gap:1rem; margin:1rem 0 }
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(8rem,1fr)); gap:.8rem }
.facts b { display:block; font-size:1.25rem; font-variant-numeric:tabular-nums }
.scroll { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; font-size:.95rem }
th,td { padding:.4rem .7rem; text-align:right; border-bottom:1px solid var(--line); white-space:nowrap }
th:first-child,td:first-child { text-align:left; padding-left:0 }
th { color:var(--dim); font-weight:600; font-size:.85rem }
tr.split td { font-weight:650 }
tr:last-child td { border-bottom:0 }
.dot { display:inline-block; width:.65rem; height:.65rem; border-radius:50%; margin-right:.45rem;
  background:var(--c,var(--ink)) }
.seen { --c:var(--seen) } .unseen { --c:var(--unseen) } .good { --c:var(--good) } .bad { --c:var(--bad) }
.bar { display:grid; grid-template-columns:6.5rem 1fr 3.2rem; gap:.7rem; align-items:center;
  margin:.42rem 0; font-size:.92rem }
.bar>span:first-child { overflow:hidden; text-overflow:ellipsis; white-space:nowrap }
.bar>span:last-child { text-align:right; font-variant-numeric:tabular-nums; font-weight:600 }
.track { position:relative; height:1.05rem; background:#edf0f5; border-radius:5px }
.track i { position:absolute; inset:0 auto 0 0; background:var(--c,#46566b); border-radius:5px; opacity:.85 }
.track u { position:absolute; top:50%; height:0; border-top:2px solid var(--ink) }
.track u::before,.track u::after { content:""; position:absolute; top:-6px; height:10px;
  border-left:2px solid var(--ink) }
.track u::before { left:-1px } .track u::after { right:-1px }
.head .track { height:.55rem; margin:.55rem 0 .5rem }
.head .track u::before,.head .track u::after { top:-5px; height:8px }
.hist { display:flex; align-items:flex-end; gap:3px; height:190px; border-bottom:1px solid var(--dim) }
.hist span { flex:1; background:var(--c); opacity:.85; border-radius:3px 3px 0 0; position:relative; min-height:0 }
.hist span em { position:absolute; bottom:100%; left:-9px; right:-9px; text-align:center;
  color:var(--dim); font:600 .68rem/1.5 system-ui,sans-serif }
.hist .none { --c:#8b96a6; flex:1.6; margin-right:12px }
.axis { display:flex; gap:3px; font-size:.75rem; color:var(--dim); margin-bottom:.6rem }
.axis span { flex:1; position:relative; height:1.3rem }
.axis span em { position:absolute; left:-1.2em; width:2.4em; text-align:center; font-style:normal }
.axis .none { flex:1.6; margin-right:12px } .axis .none em { left:-.6em; right:auto; width:auto; white-space:nowrap }
.axis .end { flex:0 0 0; margin-left:-3px }
.filters { display:flex; flex-wrap:wrap; gap:.6rem 1.2rem; align-items:center; position:sticky; top:0; z-index:5;
  background:var(--soft); padding:.7rem 0; border-bottom:1px solid var(--line); margin-bottom:1rem }
select,input[type=search] { font:inherit; padding:.3rem .6rem; border:1px solid #c6cedb; border-radius:8px;
  background:#fff; color:inherit }
label { display:inline-flex; gap:.45rem; align-items:center } input[type=checkbox] { width:1.05rem; height:1.05rem }
#count { margin-left:auto }
.card { display:grid; grid-template-columns:minmax(0,26rem) minmax(0,1fr); gap:1.3rem; padding:1.1rem;
  margin-bottom:1rem; content-visibility:auto; contain-intrinsic-size:auto 360px }
.card[hidden] { display:none }
figure { position:relative; margin:0 auto; width:100%; align-self:start; background:#e9edf2; border-radius:6px;
  overflow:hidden; outline:1px solid var(--line) }
figure img { display:block; width:100%; height:100% }
figure i { position:absolute; border:3px solid var(--c); border-radius:3px;
  box-shadow:0 0 0 1px rgb(255 255 255/.9),inset 0 0 0 1px rgb(255 255 255/.9) }
figure i.bad { border-style:dashed; border-width:2px; box-shadow:0 0 0 1px rgb(255 255 255/.7) }
.body { display:flex; flex-direction:column; gap:.55rem; min-width:0 }
.row { display:flex; flex-wrap:wrap; gap:.35rem .6rem; align-items:center }
.chip { font-size:.8rem; padding:.08rem .6rem; border-radius:99px; border:1px solid var(--c); color:var(--c);
  font-weight:600; white-space:nowrap }
.chip.full { background:var(--c); color:#fff }
.text { white-space:pre-wrap; overflow-wrap:anywhere; background:var(--soft); border-radius:8px; padding:.7rem .9rem;
  max-height:27rem; overflow:auto; font-size:.95rem; flex:0 1 auto }
.text span { color:#66758c; font:.8em ui-monospace,Menlo,Consolas,monospace }
.text mark { background:#fff3c4; color:inherit; padding:.05em .15em; border-radius:3px }
.key { display:inline-block; width:1rem; height:.75rem; border:3px solid var(--c); border-radius:3px;
  margin-right:.35rem; vertical-align:-.05rem }
.key.bad { border-style:dashed }
code { font:.85em ui-monospace,Menlo,Consolas,monospace; overflow-wrap:anywhere }
@media (max-width:760px) {
  main { padding:1.3rem .8rem 3rem } h1 { font-size:1.35rem } .heads { gap:.5rem }
  .two,.card { grid-template-columns:minmax(0,1fr) }
  .head { padding:.7rem .75rem } .head b { font-size:1.45rem } .head b small { font-size:.9rem }
  .panel { padding:.9rem } .head .dim { font-size:.75rem }
  .card { padding:.8rem; gap:.8rem } th,td { padding:.35rem .45rem } table { font-size:.85rem }
  .bar { grid-template-columns:5.2rem 1fr 2.8rem } .hist span:not(.none) em { display:none }
  #count { margin-left:0 } .text { max-height:60vh } .facts { grid-template-columns:1fr 1fr }
  .axis .none em { display:none }
}
</style></head><body><main>
<h1>$title</h1>
<p class="lead">$lead</p>
<section class="heads">$heads</section>
<section class="panel facts">$facts</section>
<section class="two">
<div class="panel"><h2>Accuracy by category</h2>$bars
<p class="dim"><span class="dot seen"></span>seen in training &nbsp;
<span class="dot unseen"></span>unseen &nbsp; whisker: 95 % interval</p></div>
<div class="panel"><h2>Overlap with the truth (IoU)</h2>$histogram
<p class="dim"><span class="dot bad"></span>wrong &nbsp; <span class="dot good"></span>correct, IoU ≥ 0.5 &nbsp;
<span class="dot" style="--c:#8b96a6"></span>no valid box</p></div>
</section>
<section class="panel scroll"><h2>Results</h2><table>$table</table>
<p class="dim">Accuracy and parsed in percent. Intervals: percentile bootstrap over images, $resamples resamples;
a group with a single image has none.</p></section>
<h2 style="margin:2rem 0 .2rem">Cases, worst first</h2>
<div class="filters"><label>Category <select id="category"><option value="">all</option>$options</select></label>
<label><input type="checkbox" id="wrong"> wrong only</label>
<span class="dim"><span class="key good"></span>truth &nbsp;
<span class="key bad"></span>predicted</span><span class="dim" id="count"></span></div>
$cards
</main>
<script type="application/json" id="pictures">$pictures</script>
<script>
const pictures = JSON.parse(document.getElementById("pictures").textContent);
const cards = [...document.querySelectorAll(".card")];
for (const img of document.querySelectorAll("img[data-i]"))
  img.src = "data:image/jpeg;base64," + pictures[img.dataset.i];
const category = document.getElementById("category"), wrong = document.getElementById("wrong");
function filter() {
  let shown = 0;
  for (const c of cards) {
    c.hidden = (category.value && c.dataset.category !== category.value)
      || (wrong.checked && c.dataset.correct === "1");
    shown += !c.hidden;
  }
  const kept = cards.length < $total ? " (the " + cards.length + " worst are here)" : "";
  document.getElementById("count").textContent = shown + " of $total cases shown" + kept;
}
category.onchange = wrong.onchange = filter;
filter();
</script></body></html>
""")


def thumbnail(image):
    """(base64 JPEG, width, height), at most 480 px wide and high."""
    image = load_image(image)
    image.thumbnail((480, 480), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode(), *image.size


def box_div(box, kind):
    """A box of the 0..1000 grid over its picture, in percent."""
    x1, y1, x2, y2 = (v / 10 for v in box)
    return f'<i class="{kind}" style="left:{x1:.1f}%;top:{y1:.1f}%;width:{x2 - x1:.1f}%;height:{y2 - y1:.1f}%"></i>'


def marked_text(text):
    """Escaped response; tags and special tokens stay readable but recede, the answer stands out."""
    shown = re.sub(r"&lt;/?(?:think|answer)&gt;|&lt;\|\w+\|&gt;", r"<span>\g<0></span>", html.escape(text.strip()))
    shown = re.sub(
        r"(<span>&lt;answer&gt;</span>)(.*?)(<span>&lt;/answer&gt;</span>)", r"\1<mark>\2</mark>\3", shown, flags=re.S
    )
    return shown or "<span>(empty response)</span>"


def track(m, kind=""):
    """Bar of an accuracy with its interval as a whisker."""
    whisker = (
        f'<u style="left:{percent(m["acc_ci95"][0])}%;right:{percent(1 - m["acc_ci95"][1])}%"></u>'
        if m["acc_ci95"]
        else ""
    )
    return f'<div class="track {kind}"><i style="width:{percent(m["acc"])}%"></i>{whisker}</div>'


def case_card(row, sample, picture, width, height):
    """One case of the gallery: picture with both boxes, and the reasoning next to it."""
    e, box, kind = html.escape, row["pred_bbox_1000"], "good" if row["correct"] else "bad"
    verdict = f"IoU {row['iou']:.2f}" if box else "no valid box"
    length = (
        ""
        if row["num_tokens"] is None
        else f" · {row['num_tokens']} tokens{', cut off' if row['finished'] is False else ''}"
    )
    boxes = box_div(row["gt_bbox_1000"], "good") + (box_div(box, "bad") if box else "")
    return (f'<article class="card" data-category="{e(row["category"])}" data-correct="{int(row["correct"])}">'
            f'<figure style="aspect-ratio:{width}/{height};max-width:{460 * width / height:.0f}px">'
            f'<img data-i="{picture}" alt="picture of case {e(row["question_id"])}" decoding="async">{boxes}</figure>'
            f'<div class="body"><div class="row {kind}"><h3>{e(row["entity"] or sample["question"])}</h3>'
            f'<span class="chip full">{"correct" if row["correct"] else "wrong"}</span>'
            f'<span class="chip">{verdict}</span><span class="dim">{e(row["category"])}</span></div>'
            f'<div class="text">{marked_text(row["response"])}</div>'
            f'<p class="dim"><span class="key good"></span><code>{row["gt_bbox_1000"]}</code> &nbsp; '
            f'<span class="key bad"></span><code>{box or "none"}</code></p>'
            f'<p class="dim"><code>{e(row["question_id"])}</code>{length}</p></div></article>\n')  # fmt: skip


def report_html(rows, samples, metrics, args):
    """The whole page as text; it refers to no other file."""
    e, by_id = html.escape, {s["id"]: s for s in samples}
    shown = sorted(rows, key=lambda r: (r["iou"], r["pred_bbox_1000"] is not None))[: args.report_samples]
    thumbs = {r["image_id"]: None for r in shown}
    for r in shown:
        thumbs[r["image_id"]] = thumbs[r["image_id"]] or thumbnail(by_id[r["question_id"]]["image"])
    number = {k: i for i, k in enumerate(thumbs)}
    cards = [case_card(r, by_id[r["question_id"]], number[r["image_id"]], *thumbs[r["image_id"]][1:]) for r in shown]

    cases = [(k, label, metrics[k]) for k, label in (("all", "all categories"), ("seen", "seen"), ("unseen", "unseen"))]
    heads = [f'<div class="panel head {k}"><span class="dim">{label}</span>'
             + (f'<b>{percent(m["acc"])}<small> %</small></b>{track(m, k)}'
                f'<p class="dim">{interval(m["acc_ci95"])}<br>{m["n"]} cases</p></div>' if m else
                '<b>–</b><p class="dim">0 cases</p></div>') for k, label, m in cases]  # fmt: skip
    bars = [f'<div class="bar"><span title="{e(c)}">{e(c)}</span>{track(m, "seen" if c in args.seen else "unseen")}'
            f'<span>{percent(m["acc"])}</span></div>'
            for c, m in metrics["categories"].items()]  # fmt: skip
    unparsed = sum(r["pred_bbox_1000"] is None for r in rows)
    counts = np.histogram([r["iou"] for r in rows if r["pred_bbox_1000"]], bins=np.linspace(0, 1, 21))[0].tolist()
    highest = max(counts + [unparsed, 1])
    columns = [("none", unparsed, "no valid box")]
    columns += [
        ("bad" if i < 10 else "good", c, f"IoU {i / 20:.2f} to {(i + 1) / 20:.2f}") for i, c in enumerate(counts)
    ]
    columns = [
        f'<span class="{k}" style="height:{88 * c / highest:.1f}%" title="{t}: {c} cases"><em>{c or ""}</em></span>'
        for k, c, t in columns
    ]
    ticks = [f"<span><em>{i / 20:g}</em></span>" if i % 5 == 0 else "<span></span>" for i in range(20)]
    ticks = ['<span class="none"><em>no box</em></span>', *ticks, '<span class="end"><em>1</em></span>']
    histogram = f'<div class="hist">{"".join(columns)}</div><div class="axis">{"".join(ticks)}</div>'
    lines = [f'<tr class="{kind}"><td><span class="dot {kind if kind != "split" else name}"></span>{e(name)}</td>'
             + "".join(f"<td>{c}</td>" for c in rest) + "</tr>"
             for name, kind, *rest in metric_lines(metrics, args.seen)]  # fmt: skip
    facts = [("images", len({r["image_id"] for r in rows})),
             ("answers with a valid box", f"{metrics['all']['parse_rate']:.1%}"),
             ("mean IoU", f"{metrics['all']['mean_iou']:.3f}")]  # fmt: skip
    optional = (
        ("mean_length", "tokens per answer", ".0f"),
        ("clipped_ratio", "cut off", ".1%"),
        ("per_second", "answers/s per process", ".2f"),
    )
    facts += [
        (label, format(metrics[f"completions/{k}"], form))
        for k, label, form in optional
        if metrics[f"completions/{k}"] is not None
    ]
    source = Path(args.model or args.predictions)
    name = (
        f"{source.parent.name}/{source.name}"
        if source.name in ("final", "model", "predictions.jsonl", "answers.jsonl")
        else source.name
    )
    how = (
        f"greedy, at most {args.max_pixels:,} pixels and {args.max_completion_length:,} tokens"
        if args.model
        else "answers made elsewhere"
    )
    lead = (
        "Find the named entity among look-alikes: a case is correct when the answer holds one valid box that overlaps "
        f"the truth with IoU ≥ 0.5. Prompt “{args.prompt}”, {how}."
    )
    header = ("split", "cases", "accuracy", "95 % interval", "mean IoU", "parsed")
    counted = sorted(Counter(r["category"] for r in shown).items())
    return REPORT_PAGE.substitute(
        title=e(f"{name} on {Path(args.bench).name}"),
        lead=e(lead),
        heads="".join(heads),
        facts="".join(f"<div><b>{v}</b><span class='dim'>{k}</span></div>" for k, v in facts),
        bars="".join(bars),
        histogram=histogram,
        table="<tr>" + "".join(f"<th>{c}</th>" for c in header) + "</tr>" + "".join(lines),
        resamples=f"{RESAMPLES:,}",
        options="".join(f'<option value="{e(c)}">{e(c)} ({n})</option>' for c, n in counted),
        cards="".join(cards),
        total=len(rows),
        pictures=json.dumps([t[0] for t in thumbs.values()]),
    )


def write_results(out, samples, answers, args):
    """predictions.jsonl (left alone if unchanged), metrics.json, table.md and report.html; returns the table."""
    rows = score_answers(samples, answers, args.prompt)
    text, path = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), out / "predictions.jsonl"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    metrics = bench_metrics(rows, args.seen, args.seed)
    seconds = [a["seconds"] for a in answers.values() if args.model and "seconds" in a]
    if not seconds and (out / "metrics.json").exists():  # scored again: the speed is that of the first time
        earlier = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        metrics["completions/per_second"] = earlier["completions/per_second"]
    else:
        metrics["completions/per_second"] = len(seconds) / sum(seconds) if seconds else None
    metrics["config"] = vars(args)
    write_text(out / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    table = metrics_table(metrics, args.seen)
    write_text(out / "table.md", table)
    write_text(out / "report.html", report_html(rows, samples, metrics, args))
    return table


def main():
    args, start = parse_args(), time.time()
    if args.summary:
        run = Path(args.summary)
        found = [
            str(p)
            for p in (
                *sorted(run.glob("*/preview.png")),
                *sorted(run.glob("*/curves.png")),
                *sorted(run.glob("eval_*/report.html")),
            )
        ]
        print(summarize(run, args.seed) + "\n".join([f"{run / 'results.json'}", *found]))
        return
    out, rank = Path(args.out), int(os.environ.get("RANK", 0))
    if args.compare:
        result = compare_runs(*args.compare, args.seen, args.seed)
        write_text(
            out / "compare.json", json.dumps({"a": args.compare[0], "b": args.compare[1], **result}, indent=1) + "\n"
        )
        print0(
            compare_table(result) + f"eval_kvg: A = {args.compare[0]}, B = {args.compare[1]} -> {out / 'compare.json'}"
        )
        return
    samples = read_bench(args.bench)
    if args.predictions:
        answers = read_foreign_answers(args.predictions, samples)
    else:
        style = check_model(args.model)
    args.bench_md5 = hashlib.md5(
        "\n".join(f"{s['id']} {s['question']} {s['answer']}" for s in samples).encode()
    ).hexdigest()
    args.weights_md5 = weights_md5(args.model) if args.model else None
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        same_config(
            out,
            args,
            ignore=(
                "out",
                "compare",
                "summary",
                "batch_size",
                "seen",
                "seed",
                "report_samples",
                "timeout_minutes",
                "num_workers",
            ),
        )
    categories = {s["category"] for s in samples}
    if odd := sorted(set(args.seen) - categories):
        print0(f"note: --seen {' '.join(odd)}: not in {args.bench}, which has {' '.join(sorted(categories))}")

    if args.model:
        rank, world_size, device = init_dist(args.timeout_minutes)
        answers = broadcast(stored_answers(out) if rank == 0 else None)
        todo = [s for s in samples if s["id"] not in answers]
        print0(
            f"eval_kvg: {len(samples)} cases, {len(samples) - len(todo)} answered before, "
            f"{world_size} ranks on {device.type}"
        )
        if todo:
            tokenizer, image_processor = load_processors(args.model, args.max_pixels)
            model = load_model(args.model, args.dtype, device)
            mine = todo[rank::world_size]
            answer_cases(model, tokenizer, image_processor, style, mine, out / f"part-{rank}.jsonl", args)
            dist.barrier()
            answers = stored_answers(out) if rank == 0 else None
    if rank == 0:
        table = write_results(out, samples, answers, args)
        for part in out.glob("part-*.jsonl"):
            part.unlink()
        print0(table + f"eval_kvg: {len(samples)} cases in {time.time() - start:.0f} s -> {out / 'report.html'}")
    if dist.is_initialized():
        dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main()
