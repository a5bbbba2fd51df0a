"""Drops bad chains of thought (--stage cot), keeps what RL can learn from (grpo), asks what a model knows (probe).

reads   --samples: samples.jsonl of gen_cot.py (cot) or synth_data.py (grpo, with --model: the stage-1 model; probe)
writes  --out: samples.jsonl, rejected.jsonl (with the reason), stats.json; grpo also pass_rate.png and mastery.json;
        probe: mastery.json and stats.json alone

  smoke    python filter.py --stage cot --samples runs/toy/gen_cot/samples.jsonl --out runs/cot_kept
  1 GPU    python filter.py --stage grpo --model runs/cot_sft/final --samples runs/synth2/samples.jsonl --out ...
  8 GPUs   torchrun --nproc_per_node 8 filter.py --stage grpo --model ... --samples ... --out runs/grpo_data
  probe    python filter.py --stage probe --model Qwen/Qwen2-VL-7B-Instruct --samples ... --out runs/probe

The paper (arXiv 2503.12797) rolls the stage-1 model out 4 times per sample and drops 4/4 (trivial) and 0/4 (too hard).
Its threshold and temperature are not stated: ours are IoU >= 0.5, as in the benchmark, and 1. It filters no chains.
mastery.json says how well each entity is known, for train_grpo.py: the mean pass rate of its samples (grpo), or the
share of 4-choice questions answered right (probe). The paper (v3, KARL) probes: up to 50 single-entity images of each
entity, distractors of the same kind, asked of the base Instruct model; its prompt is not published. Here a picture is
the entity's box cut out of a composite, one per source image, and the distractors are other entities of its category.
"""

import argparse
import errno
import fcntl
import gc
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict, deque
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
from tqdm import tqdm


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument(
        "--stage",
        required=True,
        choices=["cot", "grpo", "probe"],
        help="check chains of thought, difficulty for RL, or what a model knows of each entity",
    )
    p.add_argument("--samples", required=True, help="samples.jsonl")
    p.add_argument("--out", required=True, help="output folder; an interrupted run is continued")
    # --stage cot
    p.add_argument("--min_words", type=int, default=10, help="of a chain of thought")
    p.add_argument("--max_words", type=int, default=600, help="of a chain of thought")
    p.add_argument("--max_repeats", type=int, default=3, help="times a line of a chain may occur; loops repeat theirs")
    # --stage grpo, --stage probe
    p.add_argument("--model", help="grpo: the stage-1 model; probe: the model that is asked (paper: the base Instruct)")
    p.add_argument("--max_per_entity", type=int, default=50, help="probe: most questions per entity (paper: 50)")
    p.add_argument("--num_rollouts", type=int, default=4, help="k per sample (paper: 4)")
    p.add_argument("--min_correct", type=int, default=1, help="fewest correct of k to keep (paper: 1)")
    p.add_argument("--max_correct", type=int, help="most correct of k to keep (default and paper: k - 1)")
    p.add_argument("--temperature", type=float, default=1.0, help="of the sampler; the paper does not state it")
    p.add_argument("--max_completion_length", type=int, help="tokens (default: 512, probe 32)")
    p.add_argument("--batch_size", type=int, default=256, help="sequences decoded at once on one rank")
    p.add_argument("--num_workers", type=int, default=2, help="threads that read images ahead, per rank")
    p.add_argument("--max_pixels", type=int, default=401408, help="pixel cap of an image")
    p.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="auto: bfloat16 on CUDA, float32 on CPU",
    )
    p.add_argument("--timeout_minutes", type=float, default=60, help="of a collective operation")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if args.stage != "cot" and not args.model:
        p.error(f"--stage {args.stage} rolls a model out; want --model")
    if args.max_per_entity < 1:
        p.error(f"--max_per_entity {args.max_per_entity}; want at least 1")
    args.max_completion_length = args.max_completion_length or (32 if args.stage == "probe" else 512)
    args.max_correct = args.num_rollouts - 1 if args.max_correct is None else args.max_correct
    if args.num_rollouts < 2 or not 0 <= args.min_correct <= args.max_correct <= args.num_rollouts:
        p.error("want --num_rollouts >= 2 and 0 <= --min_correct <= --max_correct <= --num_rollouts")
    return args


# >>> shared:jsonl_io (copy of synth_data.py)
BOM = b"\xef\xbb\xbf"  # that some editors put before UTF-8


def short(value, most=80):
    """A value as messages quote it: one line of at most `most` characters; of an error, the first line it says."""
    if isinstance(value, Exception):
        return (str(value).strip() or type(value).__name__).splitlines()[0][:most]
    try:
        return repr(value)[:most]
    except RecursionError:
        return f"a deep {type(value).__name__}"


def parse_json(data, where, want):
    """The value that bytes hold as JSON in UTF-8. Errors: one line."""
    try:
        return json.loads(data.removeprefix(BOM).decode())
    except (ValueError, RecursionError) as e:
        kind = "no text" if isinstance(e, UnicodeDecodeError) else "not JSON"
        raise SystemExit(f"{where}: {kind} ({short(e, 200)}); want {want}; mend it, or write it again") from None


def read_json(path, want):
    """The value of a JSON file. Errors: one line."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as e:
        raise SystemExit(
            f"{short(str(path), 250)[1:-1]}: unreadable ({short(e)}); want {want}; check the path"
        ) from None
    return parse_json(data, path, want)


def read_jsonl(path, required=()):
    """Rows of a JSONL file as dicts. Errors: one line naming file, line and the missing column or broken JSON."""
    if not os.path.isfile(path):
        raise SystemExit(f"{path}: no such file; want JSONL, one object a line; check the path or run the stage before")
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.removeprefix(BOM).strip():
                continue
            row = parse_json(line, f"{path}:{number}", "one object a line")
            if not isinstance(row, dict):
                raise SystemExit(f"{path}:{number}: {short(row)}; want one object a line; mend or drop the line")
            if missing := [c for c in required if row.get(c) is None]:
                raise SystemExit(
                    f"{path}:{number}: no column {missing[0]!r}; want {', '.join(required)}; rerun the stage before"
                )
            rows.append(row)
    if not rows:
        raise SystemExit(f"{path}: 0 rows; want at least one; rerun the stage before")
    return rows


def write_text(path, text):
    """Writes a file whole or not at all: to a temporary name first, then renamed. Half a character, which JSON can hold
    and UTF-8 cannot, is written as JSON's escape for it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


def complete_lines(path, **types):
    """Rows already written by an interrupted run; cuts off a half-written last line, so that appending is safe.

    `types`: of columns that all have. Errors: one line for a line in between that is none, as after a machine's crash.
    """
    if not os.path.exists(path):
        return []
    data = Path(path).read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    lines = {number: line for number, line in enumerate(whole.split(b"\n"), 1) if line}
    rows = {n: parse_json(line, f"{path}:{n}", "a row of the interrupted run") for n, line in lines.items()}
    for number, row in rows.items():
        sound = isinstance(row, dict) and row.keys() >= types.keys()
        if not sound or not all(isinstance(row[column], kind) for column, kind in types.items()):
            raise SystemExit(
                f"{path}:{number}: {short(row)}; want a row of the interrupted run; drop the line, then the same "
                "command goes on"
            )
    return list(rows.values())


LOCKS = []  # open files: a folder is locked until the process ends


def same_config(out, args, ignore=()):
    """Writes {out}/config.json, or checks that an earlier run into this folder had the same settings; locks the folder.

    Errors: one line for other settings, or for another run that writes there.
    """
    LOCKS.append(open(Path(out) / ".lock", "w"))
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"{out}: another run writes here; want one at a time; wait, or give another folder") from None
    except OSError as e:
        print(f"note: {out}: no locks on this file system ({e.strerror}); start no second run into it", file=sys.stderr)
    now = {k: v for k, v in vars(args).items() if k not in ignore}
    path = Path(out) / "config.json"
    if path.exists():
        old = read_json(path, "the settings of the run in this folder")
        for key, value in now.items():
            before = old.get(key) if isinstance(old, dict) else None
            if json.loads(json.dumps(value)) != before:
                raise SystemExit(
                    f"{path}: --{key} was {short(before)}, now {short(value)}; want the same settings to continue; "
                    "give another output folder or delete this one"
                )
    write_text(path, json.dumps(now, indent=1, sort_keys=True) + "\n")


def run(main):
    """main(), with one line instead of a traceback where the output cannot be written."""
    try:
        main()
    except OSError as e:
        full, refused = (
            (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
            (errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST),
        )
        if e.errno not in full + refused:
            raise
        raise SystemExit(
            f"{e.filename or 'output'}: {e.strerror}; want a place that can be written; what was finished is kept: "
            "make room, then the same command goes on"
        ) from None


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
REF = re.compile(r"<\|object_ref_start\|>((?:(?!<\|).)*)<\|object_ref_end\|>", re.S)
PAIRS = re.compile(r"<\|(object_ref|box)_start\|>(?:(?!<\|).)*<\|\1_end\|>", re.S)  # all the tokens that rows may hold
MARKUP = re.compile(r"</?(?:think|answer|image|video)>|<\|", re.I)  # it would open a turn, a block or an image
CONTROL = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")  # a line break, or half a character
NO_NAME = re.compile(CONTROL.pattern + r"|(?:\d[\d.]*\s*[)\]]?\s*,\s*[(\[]?\s*){3}\d")  # or a box
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # what Pillow raises
# what transformers raises where a file of a model folder holds other values than it should
MALFORMED = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


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
        x1, y1 = x1 - (x1 == grid[0]), y1 - (y1 == grid[1])  # a thin box at the edge stays within it
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


def is_id(value):
    """Whether it is an integer or text, of one line and at most 200 characters."""
    return type(value) in (str, int) and 0 < len(str(value)) <= 200 and not CONTROL.search(str(value))


def check_name(name, where, kind="entity"):
    """Errors: one line unless a name is text in one line that becomes no token, tag or box in a prompt."""
    sound = isinstance(name, str) and name.strip() and len(name) <= 1000
    if not sound or MARKUP.search(name) or NO_NAME.search(name):
        raise SystemExit(
            f"{where}: {kind} {short(name)}; want a name in one line, without tokens, tags and boxes; mend the row"
        )


def check_text(text, where, kind):
    """Errors: one line unless it is text without special tokens, but for whole pairs around names and boxes."""
    if not isinstance(text, str):
        raise SystemExit(f"{where}: {kind} {short(text)}; want text; mend the row")
    if found := re.search("<\\|[^>\n]{0,30}>?|[\ud800-\udfff]", PAIRS.sub("", text)):
        raise SystemExit(
            f"{where}: {short(found[0])} in the {kind}; want no special token but pairs around a name or a box; "
            "mend the row"
        )
    for name in REF.findall(text):
        check_name(name, where)


@lru_cache(maxsize=4096)
def real_folder(folder):
    """(path without symbolic links, whether a samples.jsonl lies in it)"""
    folder = Path(os.path.realpath(folder))
    return folder, os.path.isfile(folder / "samples.jsonl")


def image_path(folder, name, where):
    """Path of the image that a row names relative to `folder`, which holds the row's file.

    Symbolic links followed, it must lie in the run folder (the parent of `folder`, if that is not the root), or in
    images/ beside a samples.jsonl, wherever that is: so lie the images of synth_data.py, to which the rows of all later
    stages point. Errors: one line for an absolute path and for one that leads elsewhere.
    """
    if not isinstance(name, str) or not name or CONTROL.search(name) or os.path.isabs(name):
        raise SystemExit(f"{where}: image {short(name)}; want a path relative to {folder}; mend the row")
    path, here = Path(folder, name), real_folder(Path(folder))[0]
    leads = os.path.islink(path) or path.name == ".."
    real = Path(os.path.realpath(path)) if leads else real_folder(path.parent)[0] / path.name
    run = here if here.parent == Path(here.anchor) else here.parent
    ours = real.parent.name == "images" and real_folder(real.parents[1])[1]
    if not ours and not real.is_relative_to(run):
        raise SystemExit(
            f"{where}: image {short(name)} leads out of {run}; want one below it or in images/ beside a "
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
        raise SystemExit(f"{path}: unreadable ({short(e, 200)}); want parquet; fetch the file again") from None


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
        found = short([t.get("content") for t in turns])
        raise SystemExit(f"{where}: messages of {short(roles)}, {found}; want text of user and assistant; mend the row")
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
                f"{path}: no column {missing[0]!r}, found {short(columns)}; want {', '.join(names)}; check the file"
            )
        if not bench:
            rows = [r | {"id": str(i), "question": r["problem"], "answer": r["solution"]} for i, r in enumerate(rows)]
        rows = [{"id": r.get("question_id")} | r for r in rows]
    elif path.suffix == ".json":
        rows = read_json(path, "ShareGPT JSON (messages, images)")
        if not isinstance(rows, list):
            raise SystemExit(f"{path}: a {type(rows).__name__}; want a list, ShareGPT JSON; check the file")
        for i, r in enumerate(rows):
            if not isinstance(r, dict) or "messages" not in r or "images" not in r:
                raise SystemExit(f"{path}: row {i + 1} has no messages or images; want ShareGPT JSON; check the file")
        rows = [r | {"id": r.get("id", str(i))} for i, r in enumerate(rows)]
    else:
        rows = read_jsonl(path, ("id", "images", "messages"))
    if not rows:
        raise SystemExit(f"{path}: 0 rows; want at least one; check the file")
    samples = []
    for i, r in enumerate(rows):
        where = f"{path}:{i + 1} ({short(r['id'])})"
        if not is_id(r["id"]):
            raise SystemExit(f"{where}: no id; want a line of text or an integer; mend the row")
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
        if not isinstance(listed, list):
            raise SystemExit(f"{where}: entities {short(listed)}; want a list; mend the row")
        for e in listed:
            e = e if isinstance(e, dict) else {}
            check_name(e.get("entity"), where)
            if not is_box(e.get("bbox_px")):
                raise SystemExit(
                    f"{where}: bbox_px {short(e.get('bbox_px'))} of {e['entity'][:80]}; want 0 <= x1 < x2 and "
                    "0 <= y1 < y2; mend the row"
                )
        rate = r.get("pass_rate")
        if rate is not None and (type(rate) not in (int, float) or not 0 <= rate <= 1):
            raise SystemExit(f"{where}: pass_rate {short(rate)}; want 0 to 1; mend the row")
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


def model_config(path, flag="--model"):
    """The config of a model. Errors: one line for what is no folder or name of one, or has values of other types."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (*MALFORMED, StrictDataclassError) as e:
        raise SystemExit(
            f"{path}: no model ({short(e, 200)}); want a Hugging Face folder or name; check {flag}"
        ) from None


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
            table = read_json(index, "a list of weight files")
            files = [folder / name for name in sorted(set(table["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError) as e:
            raise SystemExit(
                f"{index}: broken ({short(e)}); want a list of weight files; copy the model again"
            ) from None
    elif any(folder.glob("pytorch_model*.bin*")):
        return
    for file in files:
        if not os.path.isfile(file):
            raise SystemExit(
                f"{short(str(file), 250)[1:-1]}: no such file; want the weights of the model; copy the model again, or "
                "check --model"
            )
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = f.read(length if length < file.stat().st_size else 0)
        try:
            table = json.loads(header)
            end = max(entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__")
            end = end if type(end) is int and 0 <= end < 2**62 else None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            end = None
        size = file.stat().st_size
        if end is None or size != 8 + length + end:
            want = "a header" if end is None else f"{8 + length + end} bytes"
            raise SystemExit(f"{file}: {size} bytes, not a whole file; want {want}; copy the model again")


def load_processors(model_path, max_pixels):
    """Tokenizer and image processor. The PIL backend everywhere: torchvision resizes to other pixels.

    Errors: one line for what is missing or broken in the folder, the weights too, before they are loaded.
    """
    from jinja2 import TemplateError
    from transformers import AutoImageProcessor, AutoTokenizer

    want = "want a folder with tokenizer and image processor; check it"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        image_processor = AutoImageProcessor.from_pretrained(model_path, backend="pil")
    except Exception as e:  # tokenizers raises Exception itself
        if type(e) is not Exception and not isinstance(e, MALFORMED):
            raise
        raise SystemExit(f"{model_path}: {short(e, 200)}; {want}") from None
    wanted = "<|image_pad|> <|vision_start|> <|vision_end|> <|im_start|> <|im_end|> <|endoftext|> <|object_ref_start|>"
    wanted = f"{wanted} <|object_ref_end|> <|box_start|> <|box_end|>".split()
    if missing := [token for token in wanted if token not in tokenizer.get_vocab()]:
        raise SystemExit(f"{model_path}: the tokenizer has no {missing[0]}; want a Qwen-VL; check the model")
    if not tokenizer.chat_template:
        raise SystemExit(f"{model_path}: the tokenizer has no chat template; want an Instruct model; check the model")
    check_weights(model_path)
    try:
        image_processor.size = {
            "shortest_edge": min(image_processor.size["shortest_edge"], max_pixels),
            "longest_edge": max_pixels,
        }
        sizes = [getattr(image_processor, key, None) for key in ("patch_size", "merge_size", "temporal_patch_size")]
        if not all(type(n) is int and 0 < n <= 32 for n in sizes):
            raise ValueError(f"sizes of patches {sizes}")
        image_processor(images=[Image.new("RGB", (61, 47))], return_tensors="pt")  # sides that must be resized
        prompt_ids(tokenizer, "", 1).index(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    except (*MALFORMED, TemplateError, RuntimeError, MemoryError) as e:
        raise SystemExit(f"{model_path}: one picture and no text fail ({short(e, 200)}); {want}") from None
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
        raise SystemExit(f"{name}: unreadable ({short(e, 200)}); want an image; mend the row") from None
    if im.mode == "RGB":
        return im
    canvas = Image.new("RGB", im.size, (255, 255, 255))
    canvas.paste(im, (0, 0), im)
    return canvas


def image_size(image):
    """(width, height) px of the turned image, from the header alone. Errors: one line."""
    try:
        im, turn = open_image(image)
        with im:
            sideways = turn in (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                                Image.Transpose.ROTATE_90)  # fmt: skip
            return im.size[::-1] if sideways else im.size
    except UNREADABLE as e:
        name = image if isinstance(image, str) else "image bytes"
        raise SystemExit(f"{name}: unreadable ({short(e, 200)}); want an image; mend the row") from None


def resized_size(image_processor, image):
    """(width, height) px at which the model sees an image, from the image's header alone. Errors: one line."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    (width, height), size = image_size(image), image_processor.size
    factor = image_processor.patch_size * image_processor.merge_size
    try:
        height, width = smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
    except ValueError as e:
        name = image if isinstance(image, str) else "image bytes"
        raise SystemExit(f"{name}: unreadable ({short(e, 200)}); want another; mend the row") from None
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


def chat_inputs(tokenizer, image_processor, image, text, style):
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
    kind = model_config(path).model_type
    if kind not in BOX_STYLES:
        raise SystemExit(f"{path}: model_type {short(kind)}; want one of {', '.join(BOX_STYLES)}; check --model")
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
BOXES = re.compile(rf"{POINT}(?:\s*,\s*{POINT})+|\(\s*{FOUR}\)|\[\s*{FOUR}\]")
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
        if "</answer>" in rest and before.rfind("<think>") <= before.rfind("</think>"):
            return rest.split("</answer>")[0]
    return None if mode == "r1" or "<answer>" in text or "</answer>" in text else text


def parse_bbox(text, mode="r1", grid=(1000, 1000)):
    """The one box of a completion as [x1, y1, x2, y2] on the 0..1000 grid, or None.

    Notations: (x1,y1),(x2,y2) · (x1,y1,x2,y2) · [x1,y1,x2,y2], nested or in JSON too; decimals and spaces allowed.
    The same box twice is one box. Two boxes, two points without a comma between, a chain of three points, a number
    beyond the `grid` (width, height) that the model counts in, x1 >= x2 or y1 >= y2: None. Nothing is reordered or
    clipped.
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
    box = [v if n == 1000 else v * 1000 / n for v, n in zip(box, grid * 2, strict=True)]  # v * 1000 / 1000 may round
    return [int(v) if v == int(v) else v for v in box]


def box_iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2) in the same unit, 0..1."""
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


# <<< shared:answer_format


# >>> shared:levels (copy of train_grpo.py)
# KARL (arXiv 2503.12797 v3): what a model knows of an entity, in five levels, and what that does to its IoU reward
LEVELS = {  # level: mastery from, s+ (times a hit's IoU), s- (instead of a miss's 0)
    "completely correct": (0.70, 0.65, -0.6),
    "mostly correct": (0.45, 0.85, -0.5),
    "partially correct": (0.30, 1.0, -0.4),
    "mostly incorrect": (0.10, 1.2, -0.2),
    "completely incorrect": (0.0, 1.4, 0.0),
}


def level_of(mastery):
    """Level of a mastery of 0..1."""
    return next(level for level, (at_least, _, _) in LEVELS.items() if mastery >= at_least)


# <<< shared:levels


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


# ---- rules for chains of thought ----
def broken_rule(sample, seen, args):
    """Name of the first rule that a row's chain breaks, or None. `seen`: the (image, text) met so far; it grows."""
    text, gt = sample["completion"] or "", sample["bbox_1000"]
    match = THINK_ANSWER.fullmatch(text.strip())
    if not match:
        return "not one <think> and one <answer> block"
    if gt is None or parse_bbox(text) != gt:
        return "answer is not the ground-truth box"
    think = match.group(1).strip()
    if not args.min_words <= len(think.split()) <= args.max_words:
        return f"not {args.min_words} to {args.max_words} words"
    if not sample["entity"] or sample["entity"] not in think:
        return "does not name the target"
    boxes = [[float(v) for v in re.findall(r"[0-9.]+", m[0])] for m in BOXES.finditer(think)]
    if any(len(b) != 4 or not (b[0] < b[2] <= 1000 and b[1] < b[3] <= 1000) for b in boxes):
        return "a box in the reasoning is none"
    if boxes and box_iou(boxes[-1], gt) < 0.5:
        return "reasoning ends at another box than the answer"
    if max(Counter(line for line in think.splitlines() if line.strip()).values()) > args.max_repeats:
        return "repeats itself"
    if (sample["image_id"], text) in seen:
        return "duplicate"
    seen.add((sample["image_id"], text))
    return None


# ---- outputs ----
def moved(row, source, out):
    """The row with its image paths relative to the new file's folder."""
    return row | {"images": [os.path.relpath(Path(source).parent / image, out) for image in row["images"]]}


def draw_pass_rates(rates, k, kept, path):
    """How many samples were solved 0..k times; the kept ones in colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = Counter(round(r * k) for r in rates)
    figure, ax = plt.subplots(figsize=(5, 3))
    ax.bar(
        range(k + 1),
        [counts[i] for i in range(k + 1)],
        color=["tab:blue" if i in kept else "lightgray" for i in range(k + 1)],
    )
    ax.set_xlabel(f"correct of {k} rollouts (IoU >= 0.5)")
    ax.set_ylabel("samples")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- the model's answers ----
# >>> shared:fingerprint (copy of eval_kvg.py)
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


# <<< shared:fingerprint


def measure(questions, args, out, generations, temperature, score):
    """{id: score(question, texts)} by rollouts; every rank appends what it finished, so that a killed run goes on.

    Shapes: questions: dicts with id, image, text, and bbox_px if the image is cut to it -> texts: G strings.
    """
    style = check_model(args.model)
    args.weights_md5 = weights_md5(args.model)  # a killed run goes on with the same model alone
    rank, world_size, device = init_dist(args.timeout_minutes)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        same_config(out, args, ignore=("out", "batch_size", "timeout_minutes", "num_workers"))
    dist.barrier()
    done = {r["id"]: r for part in sorted(out.glob("part-*.jsonl")) for r in complete_lines(part, id=(str, int))}
    dist.barrier()
    todo = [q for q in questions if q["id"] not in done][rank::world_size]
    if todo:
        tokenizer, image_processor = load_processors(args.model, args.max_pixels)
        for q in questions:
            resized_size(image_processor, q["image"])  # what is no image is named before weights are loaded
        model = load_model(args.model, args.dtype, device)

        def model_inputs(q):
            image = crop(q["image"], q["bbox_px"]) if "bbox_px" in q else q["image"]
            return chat_inputs(tokenizer, image_processor, image, q["text"], style)

        inputs = prefetch(model_inputs, todo, args.num_workers, args.batch_size)
    chunk = max(1, args.batch_size // generations)
    with open(out / f"part-{rank}.jsonl", "a", encoding="utf-8") as f:
        for i in tqdm(range(0, len(todo), chunk), disable=rank > 0 or not sys.stderr.isatty(), desc="filter"):
            batch, prompts = todo[i : i + chunk], list(itertools.islice(inputs, chunk))
            seeds = [[f"{args.seed}:filter:{q['id']}:{g}" for g in range(generations)] for q in batch]
            rolled = rollout(model, tokenizer, prompts, seeds, args.max_completion_length, temperature, args.batch_size)
            for q, prompt, completions in zip(batch, prompts, rolled, strict=True):
                texts = [completion_text(tokenizer, ids) for ids, _, _ in completions]
                scored = score(q | {"grid": prompt["grid"]}, texts)
                f.write(json.dumps({"id": q["id"]} | scored, ensure_ascii=False) + "\n")
            f.flush()
    dist.barrier()
    done = {r["id"]: r for part in sorted(out.glob("part-*.jsonl")) for r in complete_lines(part, id=(str, int))}
    dist.barrier()
    return done, rank


# >>> shared:probe (source)
def crop(image, bbox_px):
    """PNG bytes of a box and a margin of 5 % of its sides, within the image."""
    picture, (x1, y1, x2, y2) = load_image(image), bbox_px
    dx, dy = 0.05 * (x2 - x1), 0.05 * (y2 - y1)
    low = max(0, math.floor(x1 - dx)), max(0, math.floor(y1 - dy))
    high = min(picture.width, math.ceil(x2 + dx)), min(picture.height, math.ceil(y2 + dy))
    buffer = io.BytesIO()
    picture.crop((*low, *high)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def draw_options(entity, pools, rng):
    """The entity at a random place among up to three others, from the first pool (a set) as far as that goes."""
    options = []
    for pool in pools:
        others = sorted(set(pool) - {entity, *options})
        options += rng.sample(others, min(3 - len(options), len(others)))
    options.insert(rng.randint(0, len(options)), entity)
    return options


def choice_question(category, options):
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=False))
    return f"Which {category} is this?{listed}\nAnswer with the letter of one option."


def chosen_option(text, options):
    """The option that an answer names, or None: its letter alone, as B, B. or (B), or with that option's own text."""
    match = re.fullmatch(r"\(([A-D])\)(.*)|([A-D])(?:[.:)](.*))?", text.strip(), re.S)
    letter, rest = ((match[1] or match[3]), (match[2] or match[4] or "")) if match else ("", "")
    option = dict(zip("ABCD", options, strict=False)).get(letter)
    return option if rest.strip() in ("", ".", option, f"{option}.") else None


# <<< shared:probe


# ---- probe: which entities does the model know? ----
def probe_questions(samples, args):
    """One question per occurrence of an entity in another source image, at most --max_per_entity of each, in row order.

    Options are the entity and up to three others of its category, drawn from (seed, row, entity). Errors: one line for
    a row without entities and for an entity that has no other to be told from.
    """
    names, asked, questions = defaultdict(set), defaultdict(set), []
    for s in samples:
        if not s["category"] or not s["row"].get("entities"):
            raise SystemExit(f"{args.samples} ({s['id']}): no category or no entities; want rows of synth_data.py")
        names[s["category"]] |= {e["entity"] for e in s["row"]["entities"]}
    if alone := [category for category, entities in names.items() if len(entities) < 2]:
        raise SystemExit(f"{args.samples}: one entity of category {alone[0]!r}; want two to choose from; drop its rows")
    for s in samples:
        for e in s["row"]["entities"]:
            entity = e["entity"]
            source = e.get("source", s["image_id"])
            if source in asked[entity] or len(asked[entity]) == args.max_per_entity:
                continue
            asked[entity].add(source)
            rng = random.Random(f"{args.seed}:probe:{s['id']}:{entity}")
            options = draw_options(entity, [names[s["category"]]], rng)
            questions.append(
                {
                    "id": f"{s['id']}:{entity}",
                    "entity": entity,
                    "options": options,
                    "image": s["image"],
                    "bbox_px": e["bbox_px"],
                    "text": choice_question(s["category"], options),
                }
            )
    return questions


def probe(samples, args, out):
    """Asks all questions; writes mastery.json and stats.json."""
    start, questions = time.time(), probe_questions(samples, args)

    def score(question, texts):
        chosen, chance = chosen_option(texts[0], question["options"]), 1 / len(question["options"])
        correct = chosen == question["entity"]
        return {"correct": correct, "parsed": chosen is not None, "chance": chance, "text": texts[0]}

    def mean(rows, key):
        return sum(r[key] for r in rows) / len(rows)

    answers, rank = measure(questions, args, out, generations=1, temperature=0, score=score)
    if rank > 0:
        return
    by_entity, mastery = defaultdict(list), {}
    for q in questions:
        by_entity[q["entity"]].append(answers[q["id"]])
    for entity, rows in sorted(by_entity.items()):
        mastery[entity] = {
            "mastery": mean(rows, "correct"),
            "n": len(rows),
            "parsed": sum(r["parsed"] for r in rows),
            "chance": mean(rows, "chance"),
            "level": level_of(mean(rows, "correct")),
        }
    asked = [answers[q["id"]] for q in questions]
    levels = Counter(m["level"] for m in mastery.values())
    stats = {
        "entities": len(mastery),
        "questions": len(asked),
        "accuracy": mean(asked, "correct"),
        "parse_rate": mean(asked, "parsed"),
        "chance": mean(asked, "chance"),
        "levels": {level: levels[level] for level in LEVELS},
        "seconds": round(time.time() - start, 1),
    }
    write_text(out / "mastery.json", json.dumps(mastery, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "stats.json", json.dumps(stats, indent=1) + "\n")
    print(
        f"filter: {len(mastery)} entities, {len(asked)} questions, right {stats['accuracy']:.1%} (chance "
        f"{stats['chance']:.1%}), parsed {stats['parse_rate']:.1%}, {stats['seconds']} s -> {out / 'mastery.json'}"
    )
    if stats["parse_rate"] < 0.9:  # an answer that is no letter counts as wrong
        print(f"filter: this model often does not answer by a letter; its mastery is too low; see {out}/part-*.jsonl")


def main():
    args, start = parse_args(), time.time()
    samples, out, rank = read_samples(args.samples), Path(args.out), 0
    if missing := [s["id"] for s in samples if s["bbox_1000"] is None or "images" not in s["row"]]:
        raise SystemExit(f"{args.samples} ({missing[0]}): no box or no image; want rows of synth_data.py or gen_cot.py")
    if args.stage == "probe":
        probe(samples, args, out)
        dist.destroy_process_group()
        return leave()
    kept, rejected, stats = [], [], {}
    if args.stage == "cot":
        seen = set()
        for s in samples:
            rule = broken_rule(s, seen, args)
            (rejected if rule else kept).append(moved(s["row"], args.samples, out) | ({"reason": rule} if rule else {}))
    else:

        def score(question, texts):
            boxes = [box for text in texts if (box := parse_bbox(text, grid=question["grid"]))]
            correct = sum(box_iou(box, question["bbox_1000"]) >= 0.5 for box in boxes)
            return {"correct": correct, "parsed": len(boxes)}

        questions = [s | {"text": s["question"] + R1_SUFFIX} for s in samples]
        answers, rank = measure(questions, args, out, args.num_rollouts, args.temperature, score)
        by_entity = defaultdict(list)
        for s in samples:
            k = answers[s["id"]]["correct"]
            row = moved(s["row"], args.samples, out) | {
                "pass_rate": k / args.num_rollouts,
                "num_rollouts": args.num_rollouts,
            }
            reason = "too hard" if k < args.min_correct else "trivial" if k > args.max_correct else None
            (rejected if reason else kept).append(row | ({"reason": reason} if reason else {}))
            by_entity[s["entity"]].append(row["pass_rate"])
        stats["pass_rate"] = sum(answers[s["id"]]["correct"] for s in samples) / args.num_rollouts / len(samples)
    if rank == 0:
        stats |= {
            "rows": len(samples),
            "kept": len(kept),
            "rejected": Counter(r["reason"] for r in rejected),
            "seconds": round(time.time() - start, 1),
        }
        write_text(out / "rejected.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected))
        if args.stage == "grpo":
            means = {e: (sum(r) / len(r), len(r)) for e, r in sorted(by_entity.items())}
            mastery = {e: {"mastery": m, "n": n, "level": level_of(m)} for e, (m, n) in means.items()}
            write_text(out / "mastery.json", json.dumps(mastery, indent=1, ensure_ascii=False) + "\n")
            rates, good = [r["pass_rate"] for r in kept + rejected], range(args.min_correct, args.max_correct + 1)
            draw_pass_rates(rates, args.num_rollouts, good, out / "pass_rate.png")
        write_text(out / "stats.json", json.dumps(stats, indent=1) + "\n")
        reasons = ", ".join(f"{n} {reason}" for reason, n in stats["rejected"].most_common())
        print(
            f"filter: {len(kept)} of {len(samples)} rows kept ({reasons or 'none rejected'}), "
            f"{stats['seconds']} s -> {out / 'samples.jsonl'}"
        )
        if not kept:
            raise SystemExit(
                f"{out}/rejected.jsonl: 0 of {len(samples)} rows kept; want some; look at the reasons there"
            )
        write_text(out / "samples.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
    if dist.is_initialized():
        dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    run(main)
