"""KVG-Bench: answers every case, scores the boxes, and shows pictures, boxes and reasoning together in one HTML page.

reads   --bench: the KVG-Bench parquet or samples.jsonl of synth_data.py; --model, or --predictions made elsewhere
         --task rec: JSONL like RefCOCO's; --task fgvr: JSONL or a folder category/entity/* of pictures to name
writes  --out: predictions.jsonl, metrics.json, table.md, report.html, config.json, run.json (speed, paths, all flags);
        with --compare A B: compare.json, compare.html; with --gap also choices.jsonl; with --curves one PNG

  smoke    python eval_kvg.py --bench runs/toy/world/kvg-bench.parquet --model runs/toy/train_grpo/final --out ...
  score    python eval_kvg.py --bench kvg-bench.parquet --predictions answers.jsonl --out runs/eval_theirs
  1 GPU    python eval_kvg.py --bench kvg-bench.parquet --model runs/grpo/final --out runs/eval
  8 GPUs   torchrun --nproc_per_node 8 eval_kvg.py --bench kvg-bench.parquet --model runs/grpo/final --out runs/eval
  compare  python eval_kvg.py --compare runs/eval_sft runs/eval --out runs/eval
  curves   python eval_kvg.py --curves runs/*/metrics.jsonl --out runs/curves.png
  gap      python eval_kvg.py --bench ... --model ... --out runs/eval --gap --mastery runs/probe/mastery.json
  spoilt   python eval_kvg.py --bench ... --model ... --out runs/eval_jpeg3 --corrupt jpeg --corrupt_strength 3

A case is correct if its one box has IoU >= 0.5 with the truth (arXiv 2503.12797). Differences from the released
evaluator: the parser is the one that training rewards, so a box in the reasoning alone, two boxes or a cut-off answer
are no box and score 0 (what the released evaluator says of the same answers is `acc_official`); decoding is greedy; the
pixel cap is a flag and equal for all models; accuracies come with 95 % intervals that know that questions on one image
are not independent; answers of other settings are never reused.

--gap (paper v3, App. C.3) asks each case also as a 4-choice question: which entity is the marked object? The paper does
not say how the object is marked; here the picture is cut to its true box and a small margin, as in filter.py's probe.
Wrong options are first the entities that the bench asks for on the same image, then others of the category. The form of
the answer is that of --prompt: after reasoning and in <answer> with r1, else at once. --task fgvr asks the same way
about whole pictures. The released code's FGVR evaluation cannot run, and its prompt is not published: this one is ours.
"""

import argparse
import base64
import errno
import fcntl
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
import random
import re
import string
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFilter

EVAL_PROMPTS = {
    "r1": None,
    "direct": "",
    "cot": ". Let's think step by step",
    "json": ", output its bbox coordinates using JSON format.",
}
CORRECT_IOU = 0.5
CORRUPTIONS = {  # --corrupt: unit, and its amount at --corrupt_strength 1 to 5
    "noise": ("standard deviation of Gaussian noise, of 255", (8, 16, 32, 64, 96)),
    "color": ("share by which one channel gets brighter and one darker", (0.1, 0.2, 0.3, 0.45, 0.6)),
    "jpeg": ("JPEG quality", (50, 30, 15, 8, 3)),
    "blur": ("radius of Gaussian blur in % of the shorter side", (0.4, 0.8, 1.6, 2.8, 4.0)),
    "seams": ("thin lines and frames at random places, like the borders in composites", (2, 4, 8, 16, 32)),
}
# flags that change neither an answer nor a score; they stay out of config.json and metrics.json
RUN_FLAGS = "out compare summary curves smooth batch_size num_workers report_samples timeout_minutes".split()


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--bench", help="KVG-Bench .parquet, or samples.jsonl with boxes; of --task rec or fgvr: see --task")
    p.add_argument("--out", help="run folder; an interrupted run is continued, a finished one scored again")
    p.add_argument(
        "--task",
        default="kvg",
        choices=["kvg", "rec", "fgvr"],
        help="kvg: find the entity; rec: find what an expression names; fgvr: name the picture, one of four options",
    )
    p.add_argument("--model", help="Hugging Face folder or name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    p.add_argument(
        "--predictions",
        help="score this JSONL instead of running a model: question_id, response, and grid: [width, height] if the "
        "boxes count in pixels of such an image (else 0..1000)",
    )
    p.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two run folders: paired difference B - A, no bench needed"
    )
    p.add_argument("--curves", nargs="+", metavar="FILE", help="metrics.jsonl of several runs: one PNG, in or at --out")
    p.add_argument("--smooth", type=int, default=1, help="steps averaged in --curves; 1: none")
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
    # what else is asked
    p.add_argument("--gap", action="store_true", help="also ask which of 4 entities the marked object is (kvg)")
    levels = "; ".join(f"{kind}: {unit}: {', '.join(map(str, row))}" for kind, (unit, row) in CORRUPTIONS.items())
    p.add_argument(
        "--corrupt",
        choices=list(CORRUPTIONS),
        help=f"spoil every picture; boxes stay. At strength 1 to 5, {levels}".replace("%", "%%"),
    )
    p.add_argument("--corrupt_strength", type=int, choices=range(1, 6), help="1 to 5 (default: 3)")
    # scores
    p.add_argument(
        "--mastery", help="mastery.json of filter.py, or KARL's: accuracy on known and unknown entities (kvg)"
    )
    p.add_argument(
        "--seen",
        nargs="+",
        default=["aircraft", "car", "reptilia", "bird", "food"],
        help="categories with training data (kvg)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the run, drawn options and --corrupt; decoding is greedy")
    # run
    p.add_argument("--report_samples", type=int, help="most cases shown in report.html, worst first; default: all")
    p.add_argument("--timeout_minutes", type=float, default=60, help="of a collective operation")
    args = p.parse_args(argv)
    if not args.summary and not args.out:
        p.error("want --out")
    alone = args.compare or args.summary or args.curves
    if not alone and (not args.bench or bool(args.model) == bool(args.predictions)):
        p.error(
            "want --bench with one of --model and --predictions, or --compare A B, --summary RUN, --curves FILE ..."
        )
    if args.max_completion_length < 1 or args.batch_size < 1 or (args.report_samples or 0) < 0 or args.smooth < 1:
        p.error("want --max_completion_length, --batch_size and --smooth >= 1, --report_samples >= 0")
    if args.task != "kvg" and (args.gap or args.mastery):
        p.error(f"--gap and --mastery are about entities in boxes; want --task kvg, not {args.task}")
    if args.predictions and (args.gap or args.corrupt):
        p.error("--gap and --corrupt ask a model; want --model, not --predictions")
    if args.task == "fgvr" and args.prompt not in ("r1", "direct"):
        p.error(f"--prompt {args.prompt} asks for boxes; want r1 or direct with --task fgvr")
    if args.corrupt_strength and not args.corrupt:
        p.error("--corrupt_strength without --corrupt; want both")
    args.corrupt_strength = args.corrupt_strength or (3 if args.corrupt else None)
    args.seen = sorted({c.lower() for c in args.seen}) if args.task == "kvg" else []
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


# >>> shared:mastery (copy of train_grpo.py)
def read_mastery(path):
    """{entity: level} of mastery.json of filter.py, or of KARL's own, which names the level.

    Errors: one line for a file or an entry that is none.
    """
    table, levels = read_json(path, "mastery.json of filter.py"), {}
    for entity, entry in table.items() if isinstance(table, dict) else [("all", table)]:
        found = entry if isinstance(entry, dict) else {}
        mastery, level = found.get("mastery"), found.get("knowledge_category")
        if isinstance(mastery, (int, float)) and 0 <= mastery <= 1:
            level = level_of(mastery)
        if not isinstance(level, str) or level not in LEVELS:
            raise SystemExit(
                f"{path} ({short(entity)[1:-1]}): {short(entry)}; want mastery, 0 to 1, or knowledge_category, one of "
                f"{', '.join(LEVELS)}; make it with filter.py"
            )
        levels[entity] = level
    return levels


# <<< shared:mastery


# >>> shared:probe (copy of filter.py)
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


# ---- the released evaluator ----
# What deepperception/eval/evaluate.py of github.com/thunlp/KARL at 01b53d6^ looks for, in this order, in the whole
# text; written anew so that a text of brackets cannot stall it: (?=(.*?)...)\1 goes to the first point of a line and no
# further, for behind a later one there is nothing else to find. Held against it in tests/official_cases.jsonl.
OFFICIAL_LENGTH = 10_000  # characters; of a longer text its end is looked at, since the time grows as the square of it
OFFICIAL_POINTS = r"\((\d*),.*?(\d*)\),\((\d*),(\d*)\)"
OFFICIAL_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        rf"<answer>(?=(.*?)\(\d*,)\1{OFFICIAL_POINTS}</answer>",
        rf"So the answer is(?=(.*?)\(\d*,)\1{OFFICIAL_POINTS}",
        OFFICIAL_POINTS,
        r"\(([^,\n]*),([^)\n]*)\)[^(\n]*\(([^,\n]*),([^)\n]*)\)",  # any text counts as a number here
        r"\[(\d*), (\d*), (\d*), (\d*)\]",
        r"\[" + r"((?:(?!, ).)*), " * 3 + r"([^]\n]*)\]",  # here too
        r"\((\d*), (\d*), (\d*), (\d*)\)",
        r"\((\d*), (\d*)\)\n?.*?\((\d*), (\d*)\)",
    )
]


def official_box(text):
    """(four floats, match, scale): the last find of the first pattern that finds any; match is None if none does.

    What is no number makes it (0, 0, 0, 0), which is also the box of no find; a sum below 4 is scaled by 1000.
    """
    for pattern in OFFICIAL_PATTERNS:
        if matches := list(pattern.finditer(text)):
            first, *rest = matches[-1].groups()[-4:]
            try:
                box = [float(v) for v in (first.replace("[", "").replace("x", ""), *rest)]
            except ValueError:
                box = [0.0] * 4
            scale = 1000 if sum(box) < 4 else 1
            return [scale * v for v in box], matches[-1], scale
    return [0.0] * 4, None, 1


def official_iou(box, truth):
    """IoU in fp32, as there; boxes may be reversed, infinite or no numbers at all."""
    with np.errstate(all="ignore"):
        a, b = np.array(box, np.float32), np.array(truth, np.float32)
        width, height = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
        areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
        iou = float(width * height / (areas[0] + areas[1] - width * height))
    return iou if iou > 0 else 0.0  # not a number is 0, too


def official_difference(text, mode, grid):
    """Why the released evaluator may judge an answer otherwise than we do."""
    box, match, scale = official_box(text)
    if tuple(grid) != (1000, 1000):
        return "box in pixels"
    if match is None:
        return "notation they do not read"
    if not any(box):
        return "numbers in prose"
    if scale > 1:
        return "rescaled from 0..1"
    region, start, last = answer_text(text, mode), text.find("<answer>"), match.start(match.lastindex)
    if region is None and 0 <= start < last:
        return "not one closed <answer>"
    if region is None or region != text and not 0 <= last - start - len("<answer>") < len(region):
        return "box outside <answer>"
    found = {re.sub(r"\s", "", m[0]) for m in BOXES.finditer(region)}
    if len(found) > 1:
        return "two boxes, last one taken"
    if any("." in f for f in found):
        return "decimals lost"
    if max(box) > 1000:
        return "number beyond 0..1000"
    return "numbers in prose" if parse_bbox(text, mode) else "notation we do not read"


# ---- scores ----
def score_answers(samples, answers, mode):
    """One row per case in the bench's order. An answer without one valid box has pred_bbox_1000 None and IoU 0."""
    rows = []
    for s in samples:
        answer = answers[s["id"]]
        grid = answer.get("grid") or (1000, 1000)
        box = parse_bbox(answer["response"], mode, grid)
        iou = box_iou(box, s["bbox_1000"]) if box else 0.0
        # its inference decodes without special tokens
        plain = re.sub(r"<\|\w+\|>", "", answer["response"])[-OFFICIAL_LENGTH:]
        theirs, match, _ = official_box(plain)
        their_iou = official_iou(theirs, s["bbox_1000"])
        differs = (iou >= CORRECT_IOU) != (their_iou >= CORRECT_IOU)
        rows.append({"question_id": s["id"], "category": s["category"], "entity": s["entity"],
                     "response": answer["response"], "pred_bbox_1000": box, "gt_bbox_1000": s["bbox_1000"],
                     "iou": iou, "correct": iou >= CORRECT_IOU, "num_tokens": answer.get("num_tokens"),
                     "finished": answer.get("finished"), "grid": answer.get("grid"),
                     "image_id": s["image_id"], "official_iou": their_iou,
                     "official_bbox_1000": theirs if match and all(map(math.isfinite, theirs)) else None,
                     "official_difference": official_difference(plain, mode, grid) if differs else None})  # fmt: skip
    return rows


def image_spread(values, image_ids):
    """(mean, variance of the mean between images, images, t): t is Student's 97.5 % point at images - 1.

    The mean is a ratio of sums, because images carry different numbers of questions. t is Abramowitz and Stegun
    26.7.5, off by less than 1 % from 6 images on.
    """
    _, image = np.unique(image_ids, return_inverse=True)
    sums, sizes = np.bincount(image, weights=values), np.bincount(image)
    mean, images, z = sums.sum() / sizes.sum(), len(sums), NormalDist().inv_cdf(0.975)
    free = max(images - 1, 1)
    variance = ((sums - mean * sizes) ** 2).sum() * images / free / sizes.sum() ** 2
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return float(mean), float(variance), images, t


def accuracy_interval(correct, image_ids):
    """95 % interval [lo, hi] of an accuracy: Wilson's at the effective number of questions; None for a single image.

    The spread between images tells how many independent questions the n are worth, n at most. If all answers are
    right, or all wrong, it tells nothing: an image counts once then. A percentile bootstrap covers too little with few
    images or near 0 and 1. Source: Dean and Pagano 2015, J. Survey Stat. Methodol. 3(4), 484 to 503.
    """
    p, variance, images, t = image_spread(correct, image_ids)
    if images < 2:
        return None
    effective = min(len(correct), p * (1 - p) / variance) if variance > 0 else images
    middle = p + t * t / (2 * effective)
    half = t * math.sqrt(p * (1 - p) / effective + (t / (2 * effective)) ** 2)
    low, high = ((middle + side * half) / (1 + t * t / effective) for side in (-1, 1))
    return [min(p, max(0.0, low)), max(p, min(1.0, high))]  # at 0 and 1 they may be off in the last digit


def difference_interval(differences, image_ids):
    """95 % interval [lo, hi] of a mean of differences in -1..1: Student's t over images; None for a single image."""
    mean, variance, images, t = image_spread(differences, image_ids)
    half = t * math.sqrt(variance)
    return [max(-1.0, mean - half), min(1.0, mean + half)] if images > 1 else None


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


def split_metrics(rows):
    """Accuracy with its interval, the released evaluator's, mean IoU and parse rate, 0..1; None for no rows."""
    if not rows:
        return None
    n, correct = len(rows), [float(r["correct"]) for r in rows]
    return {"n": n, "acc": sum(correct) / n, "acc_official": sum(r["official_iou"] >= CORRECT_IOU for r in rows) / n,
            "acc_ci95": accuracy_interval(correct, [r["image_id"] for r in rows]),
            "mean_iou": sum(r["iou"] for r in rows) / n,
            "parse_rate": sum(r["pred_bbox_1000"] is not None for r in rows) / n}  # fmt: skip


def bench_metrics(rows, seen, score=split_metrics):
    """Metrics of every split and category, and of the completions where their token counts are known.

    A function of the answers alone: equal for any batch size, number of ranks and folder.
    """
    metrics = {name: score(part) for name, part in split_rows(rows, seen).items()}
    names = sorted({r["category"] for r in rows}, key=lambda c: (c not in seen, c))
    metrics["categories"] = {c: score([r for r in rows if r["category"] == c]) for c in names}
    reasons = Counter(r["official_difference"] for r in rows if r.get("official_difference"))
    metrics["official_differences"] = dict(sorted(reasons.items(), key=lambda kv: (-kv[1], kv[0])))
    tokens, ends = ([r[k] for r in rows if r[k] is not None] for k in ("num_tokens", "finished"))
    metrics["completions/num_tokens"] = sum(tokens) if tokens else None
    metrics["completions/mean_length"] = sum(tokens) / len(tokens) if tokens else None
    metrics["completions/num_clipped"] = sum(not e for e in ends) if ends else None
    metrics["completions/clipped_ratio"] = sum(not e for e in ends) / len(ends) if ends else None
    return metrics


# ---- choices: which of four entities is it? ----
def prompt_suffix(prompt, choices):
    """What follows the question; a question with options asks for a letter instead of a box."""
    suffix = R1_SUFFIX if prompt == "r1" else EVAL_PROMPTS[prompt]
    return suffix.replace("bounding box", "letter") if prompt == "r1" and choices else "" if choices else suffix


def read_choice(text, options, mode):
    """The option that an answer names, or None: by its letter, or by its name and nothing else.

    Read from <answer> alone in r1, else from the whole text. A text that is the letter of one and the name of another
    option is no answer.
    """
    region = answer_text(text, "r1" if mode == "r1" else "direct")
    if region is None:
        return None
    bare = region.strip().casefold()
    found = {o for o in options if o.casefold() in (bare, bare.removesuffix("."))} | {chosen_option(region, options)}
    found.discard(None)
    return found.pop() if len(found) == 1 else None


def score_choices(samples, answers, mode):
    """One row per case in the bench's order; an answer that names no option has choice None and is wrong."""
    rows = []
    for s in samples:
        answer = answers[s["id"]]
        choice = read_choice(answer["response"], s["options"], mode)
        rows.append({"question_id": s["id"], "category": s["category"], "entity": s["entity"], "options": s["options"],
                     "response": answer["response"], "choice": choice, "correct": choice == s["entity"],
                     "num_tokens": answer.get("num_tokens"), "finished": answer.get("finished"),
                     "image_id": s["image_id"]})  # fmt: skip
    return rows


def choice_metrics(rows):
    """Accuracy with its interval, parse rate and chance level of choices, 0..1; None for no rows."""
    if not rows:
        return None
    n, correct = len(rows), [float(r["correct"]) for r in rows]
    return {"n": n, "acc": sum(correct) / n, "acc_ci95": accuracy_interval(correct, [r["image_id"] for r in rows]),
            "parse_rate": sum(r["choice"] is not None for r in rows) / n,
            "chance": sum(1 / len(r["options"]) for r in rows) / n}  # fmt: skip


def choice_table(metrics, seen):
    """Of --task fgvr; it knows no seen categories."""
    lines = [
        (name, m["n"], percent(m["acc"]), interval(m["acc_ci95"]), percent(m["parse_rate"]), percent(m["chance"]))
        for name, m in {"all": metrics["all"], **metrics["categories"]}.items()
    ]
    return markdown(("split", "cases", "accuracy %", "95 % interval", "parsed %", "chance %"), lines)


def rival_entities(samples):
    """({image_id: names}, {category: names}) of all entities that the bench asks for, or lists in its rows."""
    on_image, of_category = defaultdict(set), defaultdict(set)
    for s in samples:
        names = {s["entity"]} | {e["entity"] for e in s["row"].get("entities") or []}
        on_image[s["image_id"]] |= names - {None}
        of_category[s["category"]] |= names - {None}
    return on_image, of_category


def choice_cases(samples, seed):
    """The cases of --gap. Options are drawn from (seed, case): entities of the same image first, then of the category.

    Errors: one line for a case without a name, or without another entity to be told from.
    """
    on_image, of_category = rival_entities(samples)
    cases = []
    for s in samples:
        pools = [on_image[s["image_id"]], of_category[s["category"]]]
        if not s["entity"] or not set().union(*pools) - {s["entity"]}:
            raise SystemExit(
                f"{s['id']}: {'no other entity' if s['entity'] else 'no name'} in category {s['category']!r}; want two "
                "to choose from; leave out --gap, or drop the row"
            )
        options = draw_options(s["entity"], pools, random.Random(f"{seed}:gap:{s['id']}"))
        cases.append(s | {"options": options, "question": choice_question(s["category"], options), "cut": True})
    return cases


GAP_CELLS = {  # (choice right, box right)
    "both_right": (True, True),
    "choice_only": (True, False),
    "box_only": (False, True),
    "both_wrong": (False, False),
}


def gap_metrics(rows, choices, seen):
    """{split: counts and shares of the four cells of choice x box, and the metrics of the choices}."""
    by_id, result = {c["question_id"]: c for c in choices}, {}
    for name, part in split_rows(rows, seen).items():
        asked = [by_id[r["question_id"]] for r in part]
        pairs = Counter((c["correct"], r["correct"]) for c, r in zip(asked, part, strict=True))
        cells = {k: {"n": pairs[cell], "share": pairs[cell] / len(part)} for k, cell in GAP_CELLS.items() if part}
        result[name] = {"n": len(part), **cells, "choice": choice_metrics(asked)} if part else None
    return result


# ---- known and unknown entities ----
def mastery_metrics(rows, levels):
    """Metrics of the cases by level of their entity: high (KARL: the best three), low (the other two), each level.

    An entity that is not in the file is unrated, and in no level.
    """
    by_level = defaultdict(list)
    for r in rows:
        by_level[levels.get(r["entity"])].append(r)
    names = list(LEVELS)
    groups = {
        "high": [r for level in names[:3] for r in by_level[level]],
        "low": [r for level in names[3:] for r in by_level[level]],
        "unrated": by_level[None],
    }
    return {
        **{name: split_metrics(part) for name, part in groups.items()},
        "levels": {level: split_metrics(by_level[level]) for level in names},
        "entities": {name: len({r["entity"] for r in part}) for name, part in groups.items()},
    }


# ---- reasoning that contradicts its answer ----
DENIED = re.compile(r"(?:\b(?:not|no|nor|neither|unlike|than|instead of|cannot be|excludes?)|n't(?: be)?)"
                    r"(?: (?:an?|the))?\s+(?:<\|object_ref_start\|>)?$", re.I)  # fmt: skip
SENTENCE_END = re.compile(r"(?<!\bvs)(?<!\bcf)(?<!\be\.g)(?<!\bi\.e)[.!?]\s+|\n", re.I)


def concluded_names(text, names):
    """Which of the names, in lower case, the last sentence with a name says; a denied one ("not X") does not count."""
    by_length = sorted(names, key=len, reverse=True)  # Boeing 747-400 is not Boeing 747
    pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, by_length))})(?!\w|-\w)", re.I)
    mentions = list(pattern.finditer(text))
    claims = [m for m in mentions if not DENIED.search(text[max(0, m.start() - 60) : m.start()])]
    if not names or not claims:
        return set()
    inside = {i for m in mentions for i in range(m.start(), m.end())}  # a dot in a name ends no sentence
    ends = [m.end() for m in SENTENCE_END.finditer(text) if m.start() not in inside]
    begin = max((end for end in ends if end <= claims[-1].start()), default=0)
    return {m[0].casefold() for m in claims if m.start() >= begin}


def contradicts(row, others):
    """Whether the text in <think> ends elsewhere than the answer, by rule. None without reasoning or a valid box.

    Its last box has IoU < 0.5 with the answered one, or its last sentence with a name names only `others`: entities of
    the same image or category, not the target. If the text says "conclusion", what follows is looked at alone, so that
    a list of all objects before it is no contradiction.
    """
    blocks = [part.partition("<think>") for part in row["response"].split("</think>")[:-1]]
    think = "\n".join(text for _, tag, text in blocks if tag).strip()
    if not think or not row["pred_bbox_1000"]:
        return None
    think = re.split(r"\bconclusion\b", think, flags=re.I)[-1]
    grid = row["grid"] or (1000, 1000)
    boxes = [[float(v) for v in re.findall(r"[0-9]+(?:\.[0-9]+)?", m[0])] for m in BOXES.finditer(think)]
    boxes = [b for b in boxes if len(b) == 4 and b[0] < b[2] and b[1] < b[3]]
    if boxes:
        last = [v * 1000 / n for v, n in zip(boxes[-1], (*grid, *grid), strict=True)]
        if box_iou(last, row["pred_bbox_1000"]) < CORRECT_IOU:
            return True
    named = concluded_names(think, others | {row["entity"]}) if others and row["entity"] else set()
    return bool(named) and row["entity"].casefold() not in named


def judged_reasoning(rows, samples, names):
    """The rows with reasoning_contradicts; without `names` (expressions are none) it is judged by the boxes alone."""
    on_image, of_category = rival_entities(samples) if names else (defaultdict(set), defaultdict(set))
    return [
        r | {"reasoning_contradicts": contradicts(r, on_image[r["image_id"]] | of_category[r["category"]])}
        for r in rows
    ]


def reasoning_metrics(rows):
    """How often the reasoning contradicts: among all, correct and wrong answers that have reasoning and a valid box."""
    judged = [r for r in rows if r["reasoning_contradicts"] is not None]
    parts = {
        "all": judged,
        "correct": [r for r in judged if r["correct"]],
        "wrong": [r for r in judged if not r["correct"]],
    }
    result = {}
    for name, part in parts.items():
        values = [float(r["reasoning_contradicts"]) for r in part]
        result[name] = {"n": len(part), "contradicts": sum(values) / len(part),
                        "contradicts_ci95": accuracy_interval(values, [r["image_id"] for r in part])
                        } if part else None  # fmt: skip
    return result


# ---- spoilt pictures ----
def corrupt(image, kind, strength, seed):
    """PNG bytes of a picture spoilt at a strength of 1 to 5, in its own size.

    What is drawn depends on the seed (a text) alone: a higher strength is the same pattern, with more of it.
    """
    picture, amount = load_image(image), CORRUPTIONS[kind][1][strength - 1]
    rng = np.random.default_rng(int.from_bytes(hashlib.md5(seed.encode()).digest()[:8], "big"))
    shorter, data = min(picture.size), io.BytesIO()
    if kind == "jpeg":
        picture.save(data, "JPEG", quality=amount)
        picture, data = load_image(data.getvalue()), io.BytesIO()
    elif kind == "blur":
        picture = picture.filter(ImageFilter.GaussianBlur(amount / 100 * shorter))
    elif kind == "seams":
        draw, (width, height) = ImageDraw.Draw(picture), picture.size
        for i in range(amount):
            grey, thick = (int(rng.integers(256)),) * 3, max(1, round(shorter / 200))
            (x1, x2), (y1, y2) = (sorted(rng.integers(0, n, 2).tolist()) for n in picture.size)
            if i % 2:
                draw.rectangle((x1, y1, x2, y2), outline=grey, width=thick)
            else:
                draw.line((x1, 0, x1, height) if rng.random() < 0.5 else (0, y1, width, y1), grey, thick)
    else:
        pixels = np.asarray(picture, dtype=np.float32)
        if kind == "noise":
            pixels = pixels + rng.normal(0, amount, pixels.shape)
        else:
            pixels = pixels * (1 + amount * rng.permutation([1, -1, rng.uniform(-1, 1)]))
        picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    picture.save(data, "PNG", compress_level=1)
    return data.getvalue()


def case_picture(sample, args):
    """What the model is shown: the image, spoilt by --corrupt; for a question about a box, that box cut out of it."""
    image = sample["image"]
    if args.corrupt:
        image = corrupt(image, args.corrupt, args.corrupt_strength, f"{args.seed}:corrupt:{sample['id']}")
    if sample.get("cut"):
        sides = zip(sample["bbox_1000"], image_size(image) * 2, strict=True)
        image = crop(image, [v * n / 1000 for v, n in sides])
    return image


def mode_tables(metrics):
    """Tables of --mastery and --gap, and a line about the reasoning, as far as there is something to tell."""
    text = ""
    if m := metrics.get("mastery"):
        named = {"known (top 3 levels)": m["high"], "unknown (bottom 2)": m["low"], **m["levels"]}
        named["unrated"] = m["unrated"]
        lines = [
            (name, p["n"], percent(p["acc"]), interval(p["acc_ci95"]), f"{p['mean_iou']:.3f}", percent(p["parse_rate"]))
            if p else (name, 0, *"----")
            for name, p in named.items()
        ]  # fmt: skip
        text += "\n" + markdown(("mastery", "cases", "accuracy %", "95 % interval", "mean IoU", "parsed %"), lines)
    if m := metrics.get("gap"):
        lines = []
        for name, p in m.items():
            cells = [f"{p[k]['n']} ({percent(p[k]['share'])} %)" for k in GAP_CELLS] if p else "----"
            choice = (percent(p["choice"]["acc"]), percent(p["choice"]["parse_rate"])) if p else "--"
            lines.append((name, p["n"] if p else 0, *cells, *choice))
        header = ("choice x box", "cases", "both right", "choice right, box wrong", "choice wrong, box right")
        text += "\n" + markdown((*header, "both wrong", "choice %", "choice parsed %"), lines)
        if m["all"]["choice"]["parse_rate"] < 0.9:  # no option named counts as wrong
            text += "\nMany answers name no option: the choices are too low; see choices.jsonl.\n"
    if (m := metrics.get("reasoning")) and m["all"]:
        told = [f"{percent(m[k]['contradicts'])} % of {m[k]['n']} {k}" for k in ("correct", "wrong") if m[k]]
        text += f"\nReasoning that contradicts its answer: {' and '.join(told)} answers.\n"
    return text


# ---- tables and comparison ----
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
    """(name, kind, n, accuracy, interval, official, mean IoU, parsed) as text: the splits, then the categories."""

    def cells(m):
        accuracy = percent(m["acc"]), interval(m["acc_ci95"]), percent(m["acc_official"])
        return m["n"], *accuracy, f"{m['mean_iou']:.3f}", percent(m["parse_rate"])

    named = [(k, "split", metrics[k]) for k in ("all", "seen", "unseen") if seen or k == "all"]
    named += [(c, "seen" if c in seen else "unseen", m) for c, m in metrics["categories"].items()]
    return [(name, kind, *(cells(m) if m else (0, *"-----"))) for name, kind, m in named]


def metrics_table(metrics, seen):
    lines = [
        (name if kind == "split" or not seen else f"{name} ({kind})", *rest)
        for name, kind, *rest in metric_lines(metrics, seen)
    ]
    return markdown(("split", "cases", "accuracy %", "95 % interval", "official %", "mean IoU", "parsed %"), lines)


def closing_lines(metrics, speed):
    """What a run says below its table: where the released evaluator differs, tokens, answers cut off, speed."""
    counts, known = metrics["official_differences"], []
    if metrics["completions/num_tokens"] is not None:
        known.append(f"{metrics['completions/num_tokens']:,} tokens")
    if metrics["completions/num_clipped"] is not None:
        known.append(f"{metrics['completions/num_clipped']} answers cut off")
    if speed:
        known.append(f"{speed['cases_per_second']:.2f} cases/s, {speed['tokens_per_second']:.0f} tokens/s")
    differs = ", ".join(f"{n} {why}" for why, n in counts.items())
    official = (
        f"judged otherwise by the released evaluator: {sum(counts.values())} cases{f' ({differs})' * bool(differs)}"
    )
    return f"{official}\n" * ("acc_official" in metrics["all"]) + f"{', '.join(known)}\n" * bool(known)


def read_scored(folder):
    """Rows of the predictions.jsonl that an earlier run wrote. Errors: one line for a row that is none of them."""
    path, texts = Path(folder) / "predictions.jsonl", ("question_id", "category", "image_id")
    rows = read_jsonl(path, (*texts, "gt_bbox_1000", "correct"))
    for i, r in enumerate(rows, 1):
        r |= {"response": r.get("response") or "", "iou": r.get("iou", 0.0), "entity": r.get("entity") or ""}
        sound = all(isinstance(r[key], str) for key in (*texts, "entity")) and isinstance(r["correct"], bool)
        boxes = [r["gt_bbox_1000"], r.get("pred_bbox_1000") or r["gt_bbox_1000"]]
        sound = sound and all(is_box(box, most=1000) for box in boxes) and sound_answer(r)
        if not sound or type(r["iou"]) not in (int, float) or not 0 <= r["iou"] < 1.001:  # rounded
            raise SystemExit(f"{path}: row {i}: {short(r)}; want a row of eval_kvg.py; evaluate again")
    return rows


def compare_runs(a, b, seen):
    """{split: n, acc_a, acc_b, difference B - A with interval, discordant cases, McNemar p} of two runs on one bench.

    The interval knows which questions share an image; the p-value takes all as independent and is a little small where
    images have several.
    """
    runs = [{r["question_id"]: r for r in read_scored(x)} for x in (a, b)]
    if odd := sorted(set(runs[0]) ^ set(runs[1])):
        raise SystemExit(
            f"{b}: {len(odd)} cases in one run only, first {short(odd[0])}; want two runs on one bench; check --compare"
        )
    if odd := [k for k, r in runs[0].items() if r["gt_bbox_1000"] != runs[1][k]["gt_bbox_1000"]]:
        raise SystemExit(
            f"{b}: {short(odd[0])} has another true box than in {a}; want two runs on one bench; check --compare"
        )
    result = {}
    for name, rows in split_rows(list(runs[0].values()), seen).items():
        pairs = [(bool(r["correct"]), bool(runs[1][r["question_id"]]["correct"])) for r in rows]
        only_a, only_b, n = pairs.count((True, False)), pairs.count((False, True)), len(pairs)
        both = pairs.count((True, True))
        differences, images = [float(y) - x for x, y in pairs], [r["image_id"] for r in rows]
        result[name] = {"n": n, "acc_a": (both + only_a) / n, "acc_b": (both + only_b) / n,
                        "difference": (only_b - only_a) / n,
                        "difference_ci95": difference_interval(differences, images),
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
    rows, lines, splits = [], [], ("seen", "unseen", "all")
    for path in paths:
        m = read_json(path, "metrics.json of eval_kvg.py")
        try:
            if m.get("config", {}).get("task", "kvg") != "kvg":  # another bench, another table
                continue
            r = {"model": path.parent.name.removeprefix("eval_"), "n": m["all"]["n"],
                 **{k: m[k] and m[k]["acc"] for k in splits},
                 "mean_iou": m["all"]["mean_iou"], "parse_rate": m["all"]["parse_rate"],
                 "ci95": {k: m[k] and m[k]["acc_ci95"] for k in splits}}  # fmt: skip
            cells = [f"{percent(r[k])} ({interval(r['ci95'][k])})" if r[k] is not None else "-" for k in splits]
            lines.append((r["model"], r["n"], *cells, f"{r['mean_iou']:.3f}", percent(r["parse_rate"])))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise SystemExit(f"{path}: broken ({short(e)}); want metrics.json of eval_kvg.py; evaluate again") from None
        rows.append(r)
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).resolve().parent
    )
    seconds = {p.name: int(p.read_text()) for p in sorted((run / ".done").glob("*"), key=lambda p: p.stat().st_mtime)}
    write_text(
        run / "results.json",
        json.dumps({"rows": rows, "seconds": seconds, "seed": seed, "commit": git.stdout.strip() or None}, indent=1)
        + "\n",
    )
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
    return checked_cases(path, samples)


def checked_cases(path, samples):
    """The samples, if each id occurs once and every picture is there."""
    if twice := [i for i, count in Counter(s["id"] for s in samples).items() if count > 1]:
        raise SystemExit(f"{path}: id {twice[0]!r} occurs more than once; want every case once; mend the bench")
    if missing := [s["image"] for s in samples if isinstance(s["image"], str) and not os.path.isfile(s["image"])]:
        raise SystemExit(
            f"{path}: {short(missing[0], 250)}: no such image; want paths relative to the bench's folder; check it"
        )
    return samples


def read_rec(path):
    """Samples of a JSONL like RefCOCO's; their category is the split, their entity the expression.

    Columns: image; expression, or the whole question; bbox_px (xyxy) or bbox (COCO's x, y, width, height), in pixels of
    the image; split and id if there are any. A box up to 1 px beyond the image is cut to it: RefCOCO rounds.
    """
    samples, size_of = [], lru_cache(maxsize=None)(image_size)
    for i, r in enumerate(read_jsonl(path, ("image",))):
        where, expression = f"{path}:{i + 1}", r.get("expression") or r.get("question")
        if not is_id(r.get("id", i)):
            raise SystemExit(f"{where}: id {short(r['id'])}; want a line of text or an integer; mend the row")
        if not isinstance(expression, str) or not expression.strip():
            raise SystemExit(f"{where}: no expression and no question; want one of them, a text; mend the row")
        check_text(expression, where, "expression")
        box = r.get("bbox_px", r.get("bbox"))
        if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) and abs(v) < 1e9 for v in box):
            raise SystemExit(
                f"{where}: no box; want bbox_px [x1, y1, x2, y2] or bbox [x, y, width, height]; mend the row"
            )
        x1, y1, x2, y2 = box if "bbox_px" in r else (box[0], box[1], box[0] + box[2], box[1] + box[3])
        image = str(Path(path).parent / str(r["image"]))
        if not os.path.isfile(image) or CONTROL.search(image):
            raise SystemExit(
                f"{where}: {short(image, 250)}: no such image; want a path relative to the bench's folder; check it"
            )
        width, height = size_of(image)
        if not (-1 <= x1 < x2 <= width + 1 and -1 <= y1 < y2 <= height + 1):
            key = "bbox_px [x1, y1, x2, y2]" if "bbox_px" in r else "bbox [x, y, width, height]"
            raise SystemExit(f"{where}: box {box} in an image of {width} x {height} px; want {key} in it; mend the row")
        sides = zip((x1, y1, x2, y2), (width, height) * 2, strict=True)
        bbox_1000 = [round(1000 * min(max(v / n, 0), 1), 3) for v, n in sides]
        question = f"Find and give the bounding box of <|object_ref_start|>{expression}<|object_ref_end|>"
        samples.append({"id": str(r.get("id", i)), "image": image, "image_id": image, "bbox_1000": bbox_1000,
                        "question": question if r.get("expression") else expression, "answer": str(bbox_1000),
                        "entity": expression, "category": str(r.get("split") or "none"), "row": r})  # fmt: skip
    return checked_cases(path, samples)


def read_fgvr(path, seed):
    """Samples of 4-choice questions: JSONL (image, entity, category, perhaps options and id), or a folder of pictures.

    Options that are not given are the entity and three random others of its category. Source: arXiv 2503.12797.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if folder == Path(path):
        suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
        found = sorted(p for p in folder.glob("*/*/*") if p.suffix.lower() in suffixes)
        if not found:
            raise SystemExit(f"{path}: 0 pictures; want category/entity/*.jpg or .png; check --bench")
        rows = [{"image": str(p.relative_to(folder)), "entity": p.parts[-2], "category": p.parts[-3]} for p in found]
    else:
        rows = read_jsonl(path, ("image", "entity", "category"))
    names, samples = defaultdict(set), []
    for i, r in enumerate(rows):
        check_name(r["entity"], f"{path}:{i + 1}")
        check_name(r["category"], f"{path}:{i + 1}", "category")
        names[r["category"]].add(r["entity"])
    for i, r in enumerate(rows):
        where, entity = f"{path}:{i + 1}", r["entity"]
        if not is_id(r.get("id", r["image"])):
            raise SystemExit(
                f"{where}: id {short(r.get('id', r['image']))}; want a line of text or an integer; mend the row"
            )
        case = str(r.get("id", r["image"]))
        others = names[r["category"]]
        options = r.get("options") or draw_options(entity, [others], random.Random(f"{seed}:fgvr:{case}"))
        sound = isinstance(options, list) and all(isinstance(o, str) and not CONTROL.search(o) for o in options)
        if not sound or not 2 <= len(options) <= 4 or len(set(options)) < len(options) or entity not in options:
            raise SystemExit(
                f"{where}: options {short(options)}; want 2 to 4 different texts, {short(entity)} among them; give "
                f"them, or more entities of category {short(r['category'])}"
            )
        for option in options:
            check_name(option, where, "option")
        image = str(folder / str(r["image"]))
        samples.append({"id": case, "image": image, "image_id": image, "entity": entity, "options": options,
                        "category": str(r["category"]).lower(), "answer": entity, "bbox_1000": None,
                        "question": choice_question(r["category"], options), "row": r})  # fmt: skip
    return checked_cases(path, samples)


def sound_answer(r):
    """Whether the response is text, and what else may be told of it has its type."""
    tokens, grid = r.get("num_tokens"), r.get("grid")
    told = tokens is None or type(tokens) is int and 0 <= tokens < 1e9
    grid = grid is None or isinstance(grid, list) and len(grid) == 2 and is_box([0, 0, *grid])
    return isinstance(r["response"], str) and told and grid and isinstance(r.get("finished"), bool | None)


def read_foreign_answers(path, samples):
    """{id: row} of answers made elsewhere: exactly one text for every case of the bench."""
    rows = read_jsonl(path, ("question_id", "response"))
    counts, wanted = Counter(str(r["question_id"]) for r in rows), {s["id"] for s in samples}
    if twice := [i for i, count in counts.items() if count > 1]:
        raise SystemExit(
            f"{path}: question_id {short(twice[0])} occurs {counts[twice[0]]} times; want every case once; drop some"
        )
    if unknown := [i for i in counts if i not in wanted]:
        raise SystemExit(
            f"{path}: {len(unknown)} question_id not in the bench, first {short(unknown[0])}; "
            f"want its {len(wanted)} ids; check --bench"
        )
    if missing := [s["id"] for s in samples if s["id"] not in counts]:
        raise SystemExit(
            f"{path}: {len(missing)} of {len(wanted)} cases missing, first {missing[0]!r}; want every case; add them"
        )
    if wrong := [r["question_id"] for r in rows if not sound_answer(r)]:
        raise SystemExit(
            f"{path}: response, num_tokens, finished or grid of {short(wrong[0])} has another type; want text, an "
            "integer, true or false, [width, height]; mend the row"
        )
    return {str(r["question_id"]): r for r in rows}


def part_prefix(job):
    return "part-" if job == "predictions" else f"{job}-part-"


def stored_answers(out, job="predictions"):
    """{id: row} of an earlier run in this folder, finished or not."""
    paths = [out / f"{job}.jsonl", *sorted(out.glob(f"{part_prefix(job)}*.jsonl"))]
    rows = [(path, r) for path in paths for r in complete_lines(path, question_id=str, response=str)]
    if wrong := [(path, r) for path, r in rows if not sound_answer(r)]:
        raise SystemExit(
            f"{wrong[0][0]}: {short(wrong[0][1])}; want an answer of the interrupted run; drop the line, then the same "
            "command goes on"
        )
    return {r["question_id"]: r for _, r in rows}


# ---- model ----
# >>> shared:fingerprint (source)
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


def answer_cases(model, tokenizer, image_processor, style, samples, path, args):
    """Appends the greedy answers to `path`, batch by batch."""
    began, scored, choices = time.time(), [], any("options" in s for s in samples)
    suffix, found = prompt_suffix(args.prompt, choices), "choice" if choices else "pred_bbox_1000"
    inputs = prefetch(
        lambda s: chat_inputs(tokenizer, image_processor, case_picture(s, args), s["question"] + suffix, style),
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
            answer |= {"options": s["options"]} if choices else {}
            answers[s["id"]] = answer | {"finished": finished, "grid": prompt["grid"]}
        with open(path, "a", encoding="utf-8") as f:
            f.write("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers.values()))
        scored += (score_choices if choices else score_answers)(batch, answers, args.prompt)
        n, parsed = len(scored), sum(r[found] is not None for r in scored)
        correct, cut = sum(r["correct"] for r in scored), sum(not r["finished"] for r in scored)
        length, eta = sum(r["num_tokens"] for r in scored) / n, (time.time() - began) / n * (len(samples) - n) / 60
        print0(
            f"case {n:05d}/{len(samples):05d} | acc {correct / n:.3f} | parsed {parsed / n:.2f} | len {length:.0f} | "
            f"trunc {cut / n:.2f} | {seconds:.2f}s/case | eta {eta:.1f} min"
        )


# ---- report ----
PICTURE_BYTES = 20_000_000  # of all pictures of a report together, so that it can be opened and mailed
# The page: $top is made here, the gallery by the browser from $data, a card when it is about to be seen. What comes
# from a model or a bench is text all the way (escape, textContent), never markup.
REPORT_PAGE = string.Template(r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme:light dark; --ink:#1a2330; --dim:#586474; --line:#dde3ea; --page:#f5f7f9; --panel:#fff;
  --well:#edf0f4; --truth:#00845c; --a:#c94a06; --b:#6548d6; --seen:#2a6bd0; --unseen:#9247c2; --none:#8a95a5;
  --mark:#fdf0c4; --named:#d1008f }
@media (prefers-color-scheme:dark) { :root { --ink:#e3e8ee; --dim:#9ba8b8; --line:#2c3540; --page:#10151b;
  --panel:#181f27; --well:#242d38; --truth:#2fc191; --a:#f58a4b; --b:#a594ff; --seen:#6ea3f5; --unseen:#c58bea;
  --none:#7c8898; --mark:#4a3f16; --named:#ff7ad0 } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); -webkit-text-size-adjust:100%;
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; print-color-adjust:exact }
main { max-width:1240px; margin:0 auto; padding:1.8rem 1.25rem 4rem }
h1 { font-size:1.6rem; line-height:1.25; margin:0 0 .3rem; letter-spacing:-.01em; overflow-wrap:anywhere }
h2 { font-size:1rem; margin:0 0 .7rem } h3 { font-size:1.05rem; margin:0; overflow-wrap:anywhere } p { margin:0 }
.dim { color:var(--dim); font-size:.85rem } .lead { color:var(--dim); max-width:60rem; overflow-wrap:anywhere }
.panel,.card { background:var(--panel); border:1px solid var(--line); border-radius:10px; min-width:0 }
.panel { padding:1rem 1.15rem; margin-top:.9rem }
.heads { display:grid; grid-template-columns:repeat(3,minmax(0,1fr)); gap:.9rem; margin-top:1.2rem }
.heads .panel { margin:0 }
.head b { display:block; font-size:2.2rem; line-height:1.2; letter-spacing:-.02em; font-variant-numeric:tabular-nums }
.head b small { font-size:1.1rem; font-weight:600 }
.two { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr)); gap:0 .9rem }
.facts { display:flex; flex-wrap:wrap; gap:.5rem 2.2rem }
.facts b { font-size:1.05rem; margin-right:.4rem; font-variant-numeric:tabular-nums }
.scroll { overflow-x:auto } .panel>.dim { margin-top:.6rem }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums }
th,td { padding:.28rem .6rem; text-align:right; border-bottom:1px solid var(--line); white-space:nowrap }
th:first-child,td:first-child { text-align:left; padding-left:0; max-width:14rem; overflow:hidden;
  text-overflow:ellipsis }
th { color:var(--dim); font-weight:600; font-size:.82rem } tr:last-child td { border-bottom:0 }
td.bar { width:34%; min-width:7.5rem } tr.split td { font-weight:650 }
.dot { display:inline-block; width:.6rem; height:.6rem; border-radius:50%; margin-right:.45rem;
  background:var(--c,var(--ink)) }
.seen { --c:var(--seen) } .unseen { --c:var(--unseen) } .good,.truth { --c:var(--truth) } .bad,.a { --c:var(--a) }
.b { --c:var(--b) } .none { --c:var(--none) } .named { --c:var(--named) }
.track { position:relative; height:.95rem; background:var(--well); border-radius:4px }
.track i { position:absolute; inset:0 auto 0 0; background:var(--c,var(--dim)); border-radius:4px; opacity:.8 }
.track u { position:absolute; top:50%; border-top:2px solid var(--ink) }
.track u::before,.track u::after { content:""; position:absolute; top:-5px; height:8px;
  border-left:2px solid var(--ink) }
.track u::before { left:-1px } .track u::after { right:-1px }
.track.diff::before { content:""; position:absolute; left:50%; top:-3px; bottom:-3px; border-left:1px solid var(--dim) }
.track.diff i { inset:50% auto auto auto; width:.62rem; height:.62rem; margin:-.31rem; border-radius:50%;
  opacity:1; background:var(--ink) }
.head .track { height:.5rem; margin:.5rem 0 }
.hist { display:flex; align-items:flex-end; gap:3px; height:180px; border-bottom:1px solid var(--dim) }
.hist span { flex:1; background:var(--c); opacity:.85; border-radius:3px 3px 0 0; position:relative }
.hist em { position:absolute; bottom:100%; left:-9px; right:-9px; text-align:center; color:var(--dim);
  font:600 .66rem/1.5 system-ui,sans-serif }
.hist .none { flex:1.6; margin-right:12px } .axis .none { flex:1.6; margin-right:12px }
.axis { display:flex; gap:3px; font-size:.75rem; color:var(--dim) }
.axis span { flex:1; position:relative; height:1.2rem }
.axis em { position:absolute; left:-1.2em; width:2.4em; text-align:center; font-style:normal }
.axis .none em { left:0; width:auto; white-space:nowrap } .axis .end { flex:0 0 0; margin-left:-3px }
.plot { position:relative; height:180px; margin:.4rem 1.2rem 2.8rem 2.2rem; border:solid var(--dim);
  border-width:0 0 1px 1px }
.plot svg { position:absolute; inset:0; width:100%; height:100% }
.plot line { stroke:var(--none); stroke-dasharray:4 4; vector-effect:non-scaling-stroke }
.plot b { position:absolute; width:.7rem; height:.7rem; margin:0 -.35rem -.35rem; border-radius:50%;
  background:var(--seen) }
.plot u { position:absolute; border-left:2px solid var(--seen); margin-left:-1px; opacity:.6 }
.plot em { position:absolute; font:.75rem/1.3 system-ui,sans-serif; color:var(--dim); text-align:center }
.plot .x { top:100%; width:3rem; margin:.25rem -1.5rem } .plot .y { right:100%; margin:0 .4rem -.5rem }
.filters { display:flex; flex-wrap:wrap; gap:.5rem 1rem; align-items:center; position:sticky; top:0; z-index:5;
  background:var(--page); padding:.6rem 0; border-bottom:1px solid var(--line); margin-bottom:.9rem }
.filters label { display:flex; gap:.4rem; align-items:center; font-size:.85rem; color:var(--dim); min-width:0 }
select,input { font:inherit; font-size:.9rem; padding:.28rem .5rem; border:1px solid var(--line); border-radius:7px;
  background:var(--panel); color:var(--ink); min-width:0; max-width:15rem }
#count { margin-left:auto; font-weight:600; color:var(--ink) }
.keys { display:flex; flex-wrap:wrap; gap:.2rem 1.2rem; margin:2rem 0 .2rem; align-items:baseline }
.keys h2 { margin:0 }
.key { display:inline-block; width:1rem; height:.7rem; border:2px solid var(--c); border-radius:3px;
  margin-right:.35rem }
.key.a,figure .a { border-style:dashed } .key.b,figure .b { border-style:dotted }
.card { display:grid; grid-template-columns:minmax(0,25rem) minmax(0,1fr); gap:1.1rem; padding:.95rem;
  margin-bottom:.9rem; scroll-margin-top:4rem }
.pair .card { grid-template-columns:minmax(0,20rem) minmax(0,1fr) minmax(0,1fr) } .pair .about { grid-column:1/-1 }
.about { display:flex; flex-wrap:wrap; gap:.2rem .7rem; align-items:baseline; grid-column:1/-1 }
.about code { margin-left:auto }
figure { position:relative; margin:0 auto; width:100%; align-self:start; background:var(--well); border-radius:6px;
  overflow:hidden }
figure img { display:block; width:100%; height:100% }
figure i { position:absolute; border:3px solid var(--c); border-radius:3px; pointer-events:none;
  box-shadow:0 0 0 1px rgb(255 255 255/.8),inset 0 0 0 1px rgb(255 255 255/.8) }
figure .named { border-width:4px; background:color-mix(in srgb,var(--c) 18%,transparent) }
.answer { display:flex; flex-direction:column; gap:.5rem; min-width:0 }
.row { display:flex; flex-wrap:wrap; gap:.3rem .5rem; align-items:center }
.chip { font-size:.78rem; padding:.05rem .55rem; border-radius:99px; border:1px solid var(--c,var(--dim));
  color:var(--c,var(--dim)); font-weight:600 }
.text { white-space:pre-wrap; overflow-wrap:anywhere; background:var(--page); border-radius:7px; padding:.6rem .8rem;
  max-height:24rem; overflow:auto; font-size:.92rem }
.text .tag { color:var(--dim); opacity:.8; font:.8em ui-monospace,Menlo,Consolas,monospace }
.text mark { background:var(--mark); color:inherit; padding:.05em .15em; border-radius:3px }
.text button { font:inherit; color:inherit; background:none; border:0; border-bottom:2px dotted var(--named); padding:0;
  cursor:pointer; text-align:left }
.text button:hover,.text button:focus { background:color-mix(in srgb,var(--named) 18%,transparent) }
code { font:.8rem ui-monospace,Menlo,Consolas,monospace; overflow-wrap:anywhere }
:focus-visible { outline:2px solid var(--seen); outline-offset:2px }
#more { display:block; margin:1rem auto; font:inherit; padding:.5rem 1.2rem; border:1px solid var(--line);
  border-radius:8px; background:var(--panel); color:var(--ink); cursor:pointer } #more[hidden] { display:none }
@media (max-width:760px) {
  main { padding:1.1rem .75rem 3rem } h1 { font-size:1.3rem } .heads { gap:.5rem } .panel { padding:.8rem }
  .heads .panel { padding:.6rem } .head b { font-size:1.35rem } .head b small { font-size:.8rem }
  .head .dim { font-size:.72rem; line-height:1.35 } .card,.pair .card { grid-template-columns:minmax(0,1fr) }
  .card { padding:.75rem; gap:.7rem } .text { max-height:55vh } th,td { padding:.28rem .4rem; font-size:.85rem }
  th:first-child,td:first-child { position:sticky; left:0; background:var(--panel); z-index:1; max-width:7.5rem }
  .hist span:not(.none) em,.axis .none em { display:none } .about code { margin-left:0 }
  .filters { position:static; display:grid; grid-template-columns:1fr 1fr } .filters label { display:block }
  select,input { width:100%; max-width:none; font-size:1rem } #count { margin:0; grid-column:1/-1 }
  .hint { display:none } .text button { padding:.15rem 0 }
}
@media print { body { background:#fff; font-size:11px } .filters,#more,.hint { display:none }
  .panel,.card { break-inside:avoid } .text { max-height:none } main { padding:0; max-width:none } }
</style></head><body><main>
<h1>$title</h1>
<p class="lead">$lead</p>
$top
<section aria-label="cases">
<div class="keys"><h2>Cases</h2><span class="dim" id="legend"></span>
<span class="dim hint">Keys: j and k go through the cases, / searches. A box in the text shows on the picture.</span>
</div>
<div class="filters" role="search"><label>Show <select id="show"></select></label>
<label>Category <select id="category"></select></label><label>Sort <select id="sort"></select></label>
<label>Search <input type="search" id="search" placeholder="name or response" autocomplete="off"></label>
<span id="count" role="status" class="dim"></span></div>
<noscript>The cases are drawn by a script, which is switched off here.</noscript>
<div id="cards"></div><button type="button" id="more" hidden>Show more</button></section>
</main>
<script type="application/json" id="data">$data</script>
<script type="application/json" id="pictures">$pictures</script>
<script>
const by = id => document.getElementById(id), read = id => JSON.parse(by(id).textContent);
const data = read("data"), pictures = read("pictures"), pair = data.names.length > 1, kinds = ["a", "b"];
const last = c => c.answers[c.answers.length - 1], worst = c => c.iou - (last(c).box ? 0 : 1);
for (const c of data.cases) c.iou = last(c).iou;
document.body.classList.toggle("pair", pair);

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function drawn(box, kind) { // a box of the 0..1000 grid over its picture; a model may write any numbers
  const [x1, y1, x2, y2] = box.map(v => Math.min(100, Math.max(0, v / 10)));
  return make("i", {class: kind, style: "left:" + Math.min(x1, x2) + "%;top:" + Math.min(y1, y2) + "%;width:"
    + Math.abs(x2 - x1) + "%;height:" + Math.abs(y2 - y1) + "%"});
}
function pointer(text, box, figure) { // a box named in the text: pointed at, focused or tapped, it is on the picture
  const button = make("button", {type: "button", title: "on the picture"}, text);
  let shown = null;
  const show = () => { shown ??= figure.appendChild(drawn(box, "named")); };
  const hide = () => { if (button !== document.activeElement) { shown?.remove(); shown = null; } };
  button.onpointerenter = button.onfocus = show;
  button.onpointerleave = button.onblur = hide;
  button.onclick = () => button.focus();
  return button;
}
const token = new RegExp("(</?(?:think|answer)>|<\\|\\w+\\|>)|" + data.box_pattern, "g");
function fill(node, answer, figure) { // tags recede, the answer stands out, boxes become pointers
  let into = node, at = 0;
  for (const m of answer.text.matchAll(token)) {
    into.append(answer.text.slice(at, m.index));
    at = m.index + m[0].length;
    if (m[1] === "</answer>") into = node;
    const numbers = m[1] ? [] : m[0].match(/[0-9]+(\.[0-9]+)?/g).map((v, i) => v * 1000 / answer.grid[i % 2]);
    into.append(m[1] ? make("span", {class: "tag"}, m[1])
      : numbers.length === 4 ? pointer(m[0], numbers, figure) : m[0]);
    if (m[1] === "<answer>") node.append(into = make("mark", {}));
  }
  into.append(answer.text.slice(at));
  if (!answer.text) node.append(make("span", {class: "tag"}, "(empty response)"));
  return node;
}
function card(c) {
  const [source, width, height] = pictures[c.picture] ?? ["", 4, 3];
  const figure = make("figure", {style: "aspect-ratio:" + width + "/" + height + ";max-width:"
    + Math.round(440 * width / height) + "px"});
  if (source) figure.append(make("img", {src: "data:image/jpeg;base64," + source, alt: "picture of case " + c.id,
    decoding: "async"}));
  if (c.truth) figure.append(drawn(c.truth, "truth"));
  const about = make("div", {class: "about"}, make("h3", {}, c.entity), make("span", {class: "dim"}, c.category),
    make("code", {class: "dim"}, c.id));
  const label = c.entity + ", " + c.category;
  const node = make("article", {class: "card", tabindex: -1, "aria-label": label}, about, figure);
  c.answers.forEach((a, i) => {
    if (a.box) figure.append(drawn(a.box, kinds[i]));
    const chip = (text, kind = "") => make("span", {class: "chip " + kind}, text);
    const row = make("div", {class: "row"});
    if (pair) row.append(make("b", {}, "AB"[i]));
    row.append(chip(a.correct ? "✓ correct" : "✗ wrong", a.correct ? "good" : "bad"));
    if (c.truth) row.append(chip(a.box ? "IoU " + a.iou.toFixed(2) : "no valid box", a.box ? "" : "none"));
    if (a.contradicts) row.append(chip("reasoning contradicts", "named"));
    if (a.tokens !== null) row.append(make("span", {class: "dim"}, a.tokens + " tokens" + (a.cut ? ", cut off" : "")));
    const boxes = make("p", {class: "dim"});
    for (const [kind, box, name] of [["truth", i ? null : c.truth, "truth"], [kinds[i], a.box, "predicted"]])
      if (box) boxes.append(make("span", {class: "key " + kind, role: "img", "aria-label": name}),
        make("code", {}, box.map(v => Math.round(v)).join(", ")), " \u00a0 ");
    node.append(make("div", {class: "answer"}, row, fill(make("div", {class: "text"}), a, figure), boxes));
  });
  return node;
}

// what can be shown, in which order
const some = test => c => c.answers.some(test);
const shows = pair ? {
  differ: ["one right, one wrong", c => c.answers[0].correct !== c.answers[1].correct],
  a: ["A right, B wrong", c => c.answers[0].correct && !c.answers[1].correct],
  b: ["B right, A wrong", c => c.answers[1].correct && !c.answers[0].correct],
  wrong: ["both wrong", c => !c.answers.some(a => a.correct)],
  right: ["both right", c => c.answers.every(a => a.correct)],
  all: ["all", c => true],
} : {
  all: ["all", c => true],
  wrong: ["wrong", some(a => !a.correct)],
  box: ["wrong, with a box", some(a => !a.correct && a.box)],
  right: ["correct", some(a => a.correct)],
};
if (data.cases.some(c => c.truth)) shows.nobox = ["no valid box", some(a => !a.box)];
shows.cut = ["cut off", some(a => a.cut)];
shows.contradicts = ["reasoning contradicts", some(a => a.contradicts)];
const sorts = {
  worst: ["worst first", worst],
  best: ["best first", c => -worst(c)],
  bench: ["as in the bench", c => c.number],
  long: ["longest response first", c => -last(c).text.length],
};
if (pair) {
  sorts.lost = ["B − A, least first", c => c.iou - c.answers[0].iou];
  sorts.gained = ["B − A, most first", c => c.answers[0].iou - c.iou];
}
const number = n => n.toLocaleString("en"), count = (name, n) => name + " (" + number(n) + ")";
for (const [key, [name, test]] of Object.entries(shows)) {
  const n = data.cases.filter(test).length;
  if (n || key === "all" || key === "differ") by("show").append(make("option", {value: key}, count(name, n)));
}
const categories = [...new Set(data.cases.map(c => c.category))].sort();
by("category").append(make("option", {value: ""}, "all"));
for (const split of ["seen", "unseen"])
  by("category").append(make("option", {value: "/" + split},
    count(split, data.cases.filter(c => c.split === split).length)));
for (const name of categories)
  by("category").append(make("option", {value: name}, count(name, data.cases.filter(c => c.category === name).length)));
for (const [key, [name]] of Object.entries(sorts)) by("sort").append(make("option", {value: key}, name));
const keys = [["truth", "truth"], ["a", pair ? "A" : "predicted"], ...pair ? [["b", "B"]] : [],
  ["named", "named in the text"]];
for (const [kind, name] of data.cases.some(c => c.truth) ? keys : [])
  by("legend").append(make("span", {class: "key " + kind}), name + " \u00a0 ");

let list = [], at = 0;
function more() {
  by("cards").append(...list.slice(at, at += 24).map(card));
  by("more").hidden = at >= list.length;
}
function filter() {
  const test = shows[by("show").value][1], key = sorts[by("sort").value][1], category = by("category").value;
  const words = by("search").value.trim().toLowerCase();
  list = data.cases.filter(c => test(c) && (!category || c.category === category || "/" + c.split === category)
    && (!words || [c.entity, c.id, ...c.answers.map(a => a.text)].some(t => t.toLowerCase().includes(words))));
  list.sort((x, y) => key(x) - key(y) || x.number - y.number);
  at = 0;
  by("cards").replaceChildren();
  more();
  const kept = data.cases.length < data.total ? " (the " + data.cases.length + " worst are here)" : "";
  by("count").textContent = number(list.length) + " of " + number(data.total) + " cases" + kept;
}
const controls = ["show", "category", "sort", "search"].map(by);
for (const control of controls) control.oninput = () => {
  filter(); // the address keeps the view, so that it can be reloaded and sent
  history.replaceState(null, "", "#" + new URLSearchParams(controls.map(c => [c.id, c.value])));
};
for (const [id, value] of new URLSearchParams(location.hash.slice(1))) {
  const control = controls.find(c => c.id === id), options = [...control?.options ?? []].map(o => o.value);
  if (control && (id === "search" || options.includes(value))) control.value = value;
}
by("more").onclick = more;
new IntersectionObserver(e => e[0].isIntersecting && more(), {rootMargin: "1500px"}).observe(by("more"));
document.onkeydown = e => {
  if (e.target.matches("input,select") || e.ctrlKey || e.metaKey || e.altKey) return;
  const cards = [...by("cards").children], step = {j: 1, k: -1}[e.key];
  if (e.key === "/") { e.preventDefault(); by("search").focus(); }
  if (step) cards[Math.max(0, cards.indexOf(document.activeElement.closest(".card")) + step)]?.focus();
};
filter();
</script></body></html>
""")


def page_json(value):
    """JSON for a script element: ASCII, and no <, so that no text can end the element or a line of script."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def thumbnail(image, most):
    """[base64 JPEG, width, height]: the largest and finest of a few settings that takes at most `most` bytes."""
    image = load_image(image)
    for side, quality in ((640, 82), (560, 76), (480, 72), (400, 68), (320, 62), (240, 50)):
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality)
        if data.tell() * 4 / 3 <= most:
            break
    return [base64.b64encode(data.getvalue()).decode(), *image.size]


def gallery(runs, samples, names, seen, most=None):
    """(data, pictures) as JSON: the cases of one run or of two with the same ids; `most`: only so many, the worst.

    A case whose sample is not there has no picture; its boxes are drawn on an empty one.
    """
    by_id, other = {s["id"]: s for s in samples}, [{r["question_id"]: r for r in rows} for rows in runs]
    shown = sorted(enumerate(runs[-1]), key=lambda r: (r[1].get("iou", 0.0), r[1].get("pred_bbox_1000") is not None))[
        :most
    ]
    images = {r["image_id"]: by_id[r["question_id"]]["image"] for _, r in shown if r["question_id"] in by_id}
    number, cases = {image_id: i for i, image_id in enumerate(images)}, []
    for i, row in shown:
        key = row["question_id"]
        answers = [{"text": r.get("response") or "", "box": r.get("pred_bbox_1000"), "iou": r.get("iou", 0.0),
                    "correct": bool(r["correct"]), "tokens": r.get("num_tokens"), "cut": r.get("finished") is False,
                    "contradicts": bool(r.get("reasoning_contradicts")), "grid": r.get("grid") or [1000, 1000]}
                   for r in (rows[key] for rows in other)]  # fmt: skip
        name = row.get("entity") or by_id.get(key, {}).get("question") or key
        cases.append({"number": i, "id": key, "entity": name, "category": row["category"],
                      "split": "seen" if row["category"] in seen else "unseen", "truth": row.get("gt_bbox_1000"),
                      "picture": number.get(row["image_id"]), "answers": answers})  # fmt: skip
    pictures = [thumbnail(image, PICTURE_BYTES / len(images)) for image in images.values()]
    data = {"names": names, "total": len(runs[-1]), "box_pattern": BOXES.pattern, "cases": cases}
    return page_json(data), page_json(pictures)


def track(m, kind=""):
    """Bar of an accuracy with its interval as a whisker."""
    whisker = (
        f'<u style="left:{percent(m["acc_ci95"][0])}%;right:{percent(1 - m["acc_ci95"][1])}%"></u>'
        if m["acc_ci95"]
        else ""
    )
    return f'<div class="track {kind}"><i style="width:{percent(m["acc"])}%"></i>{whisker}</div>'


def html_table(header, lines):
    """Lines are (class, cell, cell, ...); cells are markup. A cell that is a track becomes a wide one."""
    body = ""
    for kind, *cells in lines:
        cells = [f"<td{' class=bar' if str(c).startswith('<div') else ''}>{c}</td>" for c in cells]
        body += f'<tr class="{kind}">{"".join(cells)}</tr>'
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{h}</th>" for h in header)}</tr>{body}</table></div>'


def results_panel(metrics, seen):
    """Table of the splits and categories with bars, and why the official accuracy differs, where it is known."""
    splits = ("all", "seen", "unseen") if seen else ("all",)
    named = [(k, "split", k if k != "all" else "", metrics[k]) for k in splits]
    named += [(c, "", "seen" if c in seen else "unseen", m) for c, m in metrics["categories"].items()]
    official, lines = "acc_official" in (metrics["all"] or {}), []
    for name, row, kind, m in named:
        if m:
            cells = [percent(m["acc"]), track(m, kind), interval(m["acc_ci95"])]
            cells += [percent(m["acc_official"])] if official else []
            cells += [f"{m['mean_iou']:.3f}", percent(m["parse_rate"]), f"{m['n']:,}"]
        else:
            cells = ["–"] * (5 + official) + ["0"]
        lines.append((row, f'<span class="dot {kind}"></span>{html.escape(name)}', *cells))
    header = ["split", "accuracy %", "", "95 % interval", *(["official %"] if official else []),
              "mean IoU", "parsed %", "cases"]  # fmt: skip
    why = ""
    if official and (reasons := metrics.get("official_differences")):
        counts = "; ".join(f"{html.escape(str(k))}: {n}" for k, n in reasons.items())
        why = f'<p class="dim">“Official” is the count of the released evaluator, which reads answers by other rules. '\
              f"The two differ in {sum(reasons.values())} cases ({counts}).</p>"  # fmt: skip
    return (f'<section class="panel"><h2>Results</h2>{html_table(header, lines)}{why}'
            f'<p class="dim"><span class="dot seen"></span>seen in training &nbsp; <span class="dot unseen"></span>'
            f"unseen &nbsp; whiskers: 95 %, knowing which questions share an image; a single image has none</p>"
            "</section>")  # fmt: skip


def histogram_panel(rows):
    """Columns of the IoU in steps of 0.05, and one of the answers without a valid box."""
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
    return (f'<section class="panel"><h2>Overlap with the truth (IoU)</h2><div class="hist">{"".join(columns)}</div>'
            f'<div class="axis">{"".join(ticks)}</div><p class="dim"><span class="dot bad"></span>wrong &nbsp; '
            '<span class="dot good"></span>correct, IoU ≥ 0.5 &nbsp; <span class="dot none"></span>no valid box</p>'
            "</section>")  # fmt: skip


def pass_rate_bins(rows, rates):
    """[(mean pass rate, split_metrics)] of the cases with a pass rate: per value if these are few, else in 5 bins."""
    rows = [r for r in rows if rates.get(r["question_id"]) is not None]
    values, bins = {rates[r["question_id"]] for r in rows}, {}
    for r in rows:
        rate = rates[r["question_id"]]
        bins.setdefault(rate if len(values) < 10 else min(int(rate * 5), 4), []).append(r)
    return [(sum(rates[r["question_id"]] for r in b) / len(b), split_metrics(b)) for _, b in sorted(bins.items())]


def calibration_panel(bins):
    """Accuracy over pass rate, a point with its interval per bin; nothing where no row has a pass rate."""
    if not bins:
        return ""
    marks = [f'<em class="y" style="bottom:{v}%">{v}</em>' for v in (0, 50, 100)]
    for rate, m in bins:
        x, low, high = percent(rate), *(m["acc_ci95"] or (m["acc"], m["acc"]))
        words = f"pass rate {rate:.2f}: accuracy {percent(m['acc'])} % ({interval(m['acc_ci95'])}), {m['n']} cases"
        marks.append(
            f'<u style="left:{x}%;bottom:{percent(low)}%;height:{percent(high - low)}%"></u>'
            f'<b style="left:{x}%;bottom:{percent(m["acc"])}%" role="img" aria-label="{words}" title="{words}"></b>'
            f'<em class="x" style="left:{x}%">{rate:.2f}<br>n {m["n"]}</em>'
        )
    return ('<section class="panel"><h2>Accuracy over pass rate</h2><div class="plot"><svg preserveAspectRatio="none" '
            'viewBox="0 0 1 1"><line x1="0" y1="1" x2="1" y2="0"/></svg>' + "".join(marks) + "</div>"
            '<p class="dim">Accuracy in percent over the pass rate that filter.py wrote to the rows, with 95 % '
            "intervals; on the dashed line the two are equal.</p></section>")  # fmt: skip


def run_name(args):
    """(name of a run, how its answers were made), as text."""
    source = Path(args.model or args.predictions)
    generic = source.name in ("final", "model", "predictions.jsonl", "answers.jsonl")
    name = f"{source.parent.name}/{source.name}" if generic else source.name
    how = (
        f"greedy, at most {args.max_pixels:,} pixels and {args.max_completion_length:,} tokens"
        if args.model
        else "answers made elsewhere"
    )
    if args.corrupt:
        how += f"; pictures spoilt before the model saw them ({args.corrupt}, strength {args.corrupt_strength})"
    return name, how


def choice_html(rows, samples, metrics, args):
    """The page of --task fgvr as text: as that of boxes, without boxes."""
    name, how = run_name(args)
    named = [("split", "all", metrics["all"]), *(("", c, m) for c, m in metrics["categories"].items())]
    lines = [(kind, html.escape(c), percent(m["acc"]), track(m), interval(m["acc_ci95"]), percent(m["parse_rate"]),
              percent(m["chance"]), f"{m['n']:,}") for kind, c, m in named]  # fmt: skip
    header = ("split", "accuracy %", "", "95 % interval", "parsed %", "chance %", "cases")
    listed = [", ".join(f"{letter}. {o}" for letter, o in zip("ABCD", r["options"], strict=False)) for r in rows]
    shown = [r | {"iou": float(r["correct"]), "entity": f"{r['entity']} ({options})"}
             for r, options in zip(rows, listed, strict=True)]  # fmt: skip
    data, pictures = gallery([shown], samples, [name], [], args.report_samples)
    return REPORT_PAGE.substitute(
        title=html.escape(f"{name} on {Path(args.bench).name}"),
        lead="Name what the picture shows, out of up to four of its kind: a case is correct when the answer is one "
        f"option and the right one. Prompt “{html.escape(args.prompt)}”, {how}.",
        top=f'<section class="panel"><h2>Results</h2>{html_table(header, lines)}<p class="dim">Whiskers: 95 %; a title '
        "names the right option and, in brackets, all of them.</p></section>",
        data=data,
        pictures=pictures,
    )


def report_html(rows, samples, metrics, args):
    """The whole page of one run as text; it refers to no other file."""
    splits = (("all", "all categories"), ("seen", "seen"), ("unseen", "unseen"))
    cases, heads = [(k, label, metrics[k]) for k, label in splits if args.seen or k == "all"], ""
    for k, label, m in cases:
        heads += f'<div class="panel head"><span class="dim">{label}</span>'
        if m:
            heads += f'<b>{percent(m["acc"])}<small> %</small></b>{track(m, k)}<p class="dim">'
            heads += f'<span class="hint">95 %: </span>{interval(m["acc_ci95"])}<br>{m["n"]:,} cases</p></div>'
        else:
            heads += '<b>–</b><p class="dim">0 cases</p></div>'
    facts = [("images", f"{len({r['image_id'] for r in rows}):,}"),
             ("answers with one valid box", f"{percent(metrics['all']['parse_rate'])} %"),
             ("mean IoU", f"{metrics['all']['mean_iou']:.3f}")]  # fmt: skip
    if (length := metrics.get("completions/mean_length")) is not None:
        facts.append(("tokens per answer", f"{length:.0f}"))
    if (clipped := metrics.get("completions/clipped_ratio")) is not None:
        facts.append(("cut off", f"{percent(clipped)} %"))
    judged = [r["reasoning_contradicts"] for r in rows if r.get("reasoning_contradicts") is not None]
    if judged:
        facts.append(("reasoning contradicts the answer", f"{percent(sum(judged) / len(judged))} %"))
    name, how = run_name(args)
    task = "Find the named entity among look-alikes" if args.task == "kvg" else "Find what the expression names"
    rates = {s["id"]: s["row"].get("pass_rate") for s in samples}
    data, pictures = gallery([rows], samples, [name], args.seen, args.report_samples)
    return REPORT_PAGE.substitute(
        title=html.escape(f"{name} on {Path(args.bench).name}"),
        lead=f"{task}: a case is correct when the answer holds one valid box that "
        f"overlaps the truth with IoU ≥ {CORRECT_IOU}. Prompt “{html.escape(args.prompt)}”, {how}.",
        top=f'<section class="heads">{heads}</section><section class="panel facts">'
        + "".join(f'<div><b>{v}</b><span class="dim">{k}</span></div>' for k, v in facts)
        + f'</section>{results_panel(metrics, args.seen)}<div class="two">{histogram_panel(rows)}'
        + f"{calibration_panel(pass_rate_bins(rows, rates))}</div>",
        data=data,
        pictures=pictures,
    )


def compare_html(result, folders, bench, seen):
    """The page of two runs: `result` of compare_runs, and both answers of every case beside each other.

    Pictures come from `bench`, or from the one that the run was made with, as long as that file is there.
    """
    runs = [read_scored(folder) for folder in folders]
    config = Path(folders[1]) / "config.json"
    config = read_json(config, "the settings of the run") if config.exists() else {}
    if not isinstance(config, dict) or not isinstance(config.get("bench", ""), str):
        raise SystemExit(f"{folders[1]}/config.json: {short(config)}; want the settings of the run; evaluate again")
    bench, read = bench or config.get("bench"), read_rec if config.get("task") == "rec" else read_bench
    truth = {r["question_id"]: r["gt_bbox_1000"] for r in runs[1]}
    samples = read(bench) if bench and os.path.isfile(bench) else []
    samples = [s for s in samples if truth.get(s["id"]) == s["bbox_1000"]]
    splits = [(k, result[k]) for k in ("all", "seen", "unseen") if result.get(k)]
    widest = max(abs(v) for _, m in splits for v in (*(m["difference_ci95"] or ()), m["difference"], 0.01))

    def whisker(m):
        point, low, high = (50 + 48 * v / widest for v in (m["difference"], *(m["difference_ci95"] or (0, 0))))
        line = f'<u style="left:{low:.1f}%;right:{100 - high:.1f}%"></u>' if m["difference_ci95"] else ""
        return f'<div class="track diff">{line}<i style="left:{point:.1f}%"></i></div>'

    tests = [k for k in splits[0][1] if k.endswith("_p")]
    heads, lines = "", []
    for name, m in splits:
        difference, ci = f"{100 * m['difference']:+.1f}", interval(m["difference_ci95"], "+")
        p = ["-" if m[k] is None else f"{m[k]:.2g}" for k in tests]
        ends = m["only_a"], m["only_b"], *p, f"{m['n']:,}"
        lines.append(("split", name, percent(m["acc_a"]), percent(m["acc_b"]), difference, whisker(m), ci, *ends))
        heads += f'<div class="panel head"><span class="dim">{name}: B − A in points</span><b>{difference}</b>'
        heads += (
            f'{whisker(m)}<p class="dim"><span class="hint">95 %: </span>{ci}<br>p = {p[0] if p else "-"}</p></div>'
        )
    header = ["split", "A %", "B %", "B − A", "", "95 % interval", "only A right", "only B right",
              *("McNemar p" if k == "mcnemar_p" else f"{k[:-2]} p" for k in tests), "cases"]  # fmt: skip
    data, pictures = gallery(runs, samples, [str(f) for f in folders], seen)
    a, b = (html.escape(str(f)) for f in folders)
    note = "" if samples else " The pictures are left out: no bench file was found; name it with --bench."
    return REPORT_PAGE.substitute(
        title=f"{html.escape(Path(folders[1]).name)} against {html.escape(Path(folders[0]).name)}",
        lead=f"A = {a}, B = {b}: two runs on the same cases.{note}",
        top=f'<section class="heads">{heads}</section><section class="panel"><h2>Difference in accuracy</h2>'
        f'{html_table(header, lines)}<p class="dim">In points; the line in the middle is no difference. Intervals '
        "know which questions share an image; p-values ask whether the two runs could be equally good.</p></section>",
        data=data,
        pictures=pictures,
    )


# ---- curves ----
CURVES_FIRST = ("reward", "loss", "acc@0.5", "rewards/iou/mean", "rewards/format/mean", "parse_rate",
                "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio", "kl", "grad_norm",
                "learning_rate")  # fmt: skip


def curve_points(rows, key, smooth):
    """(steps, values) of one metric, each value the mean of the last `smooth`; null and NaN are left out."""
    points = [(r.get("step", i), r.get(key)) for i, r in enumerate(rows, 1)]
    points = [p for p in points if all(isinstance(v, int | float) and abs(v) < 1e30 for v in p)]
    values = [v for _, v in points]
    means = [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - smooth) : i + 1])]
    return [x for x, _ in points], means


def draw_runs(paths, png_path, smooth):
    """Draws a panel per metric that all the files have, a line per run; returns the metrics, most useful first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [read_jsonl(path) for path in paths]
    folders = [Path(path).resolve().parent for path in paths]
    common = os.path.commonpath(folders) if len(set(folders)) > 1 else folders[0].parent
    labels = [os.path.relpath(folder, common) for folder in folders]
    if len(set(labels)) < len(labels):  # several files in one folder
        labels = [f"{label}/{Path(path).name}" for label, path in zip(labels, paths, strict=True)]
    keys = [k for k in dict.fromkeys(k for r in runs[0] for k in r if k.isprintable() and len(k) < 80)
            if all(curve_points(r, k, 1)[0] for r in runs)]  # fmt: skip
    keys = [k for k in CURVES_FIRST if k in keys] + [k for k in keys if k not in (*CURVES_FIRST, "step")]
    if not keys:
        raise SystemExit(
            f"{paths[0]}: no metric that all {len(paths)} files have; want metrics.jsonl of alike runs; check --curves"
        )
    columns = min(3, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 2.7 * lines + 0.5), squeeze=False)
    for ax, key in zip(axes.flat, keys, strict=False):
        for i, rows in enumerate(runs):
            steps, values = curve_points(rows, key, smooth)
            style = dict(color=f"C{i % 10}", linestyle=("-", "--", ":", "-.")[i // 10 % 4], linewidth=1.4)
            ax.plot(steps, values, marker="." if len(steps) == 1 else None, **style)
        ax.set_title(key, fontsize=10, loc="left", parse_math=False)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(keys) :]:
        ax.axis("off")
    figure.tight_layout()
    handles = axes.flat[0].get_lines()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(4, len(runs)), frameon=False)
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return keys


def free_flags(args):
    """Flags that change neither an answer nor a score; answers of --gap are stored with their options."""
    drawn = args.corrupt or args.task == "fgvr"
    return (*RUN_FLAGS, "mastery", "gap", *(() if drawn else ("seed",)))


def write_results(out, samples, answers, choices, levels, speed, args):
    """predictions.jsonl (left alone if unchanged), metrics.json, table.md, run.json and report.html; returns the table.

    choices: {id: answer} of --gap, levels: {entity: level} of --mastery; None without. speed: numbers of the answers
    made just now, or None; then those of the earlier run are kept.
    """
    if args.task == "fgvr":
        rows = score_choices(samples, answers, args.prompt)
    else:
        rows = judged_reasoning(score_answers(samples, answers, args.prompt), samples, names=args.task == "kvg")
    text, path = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), out / "predictions.jsonl"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    metrics = bench_metrics(rows, args.seen, choice_metrics if args.task == "fgvr" else split_metrics)
    if args.task != "kvg":
        metrics["seen"] = metrics["unseen"] = None
    if levels is not None:
        metrics["mastery"] = mastery_metrics(rows, levels)
    if choices is not None:
        asked = score_choices(choice_cases(samples, args.seed), choices, args.prompt)
        write_text(out / "choices.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in asked))
        metrics["gap"] = gap_metrics(rows, asked, args.seen)
    if args.task != "fgvr":
        metrics["reasoning"] = reasoning_metrics(rows)
    elsewhere = (*free_flags(args), "bench", "model", "predictions")  # paths; bench and weights are told by their md5
    metrics["config"] = {k: v for k, v in sorted(vars(args).items()) if k not in elsewhere}
    write_text(out / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    table = (choice_table if args.task == "fgvr" else metrics_table)(metrics, args.seen) + mode_tables(metrics)
    write_text(out / "table.md", table)
    if not speed and (out / "run.json").exists():
        speed = json.loads((out / "run.json").read_text(encoding="utf-8"))["speed"]
    write_text(out / "run.json", json.dumps({"speed": speed, "args": vars(args)}, indent=1) + "\n")
    page = (choice_html if args.task == "fgvr" else report_html)(rows, samples, metrics, args)
    write_text(out / "report.html", page)
    return table + closing_lines(metrics, speed)


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
    if args.curves:
        path = out if out.suffix == ".png" else out / "curves.png"
        keys = draw_runs(args.curves, path, args.smooth)
        print0(f"eval_kvg: {len(keys)} metrics of {len(args.curves)} runs ({', '.join(keys[:4])}, ...) -> {path}")
        return
    if args.compare:
        result = compare_runs(*args.compare, args.seen)
        write_text(
            out / "compare.json", json.dumps({"a": args.compare[0], "b": args.compare[1], **result}, indent=1) + "\n"
        )
        write_text(out / "compare.html", compare_html(result, args.compare, args.bench, args.seen))
        print0(
            compare_table(result)
            + f"eval_kvg: A = {args.compare[0]}, B = {args.compare[1]} -> {out / 'compare.json'}, compare.html"
        )
        return
    if args.task == "fgvr":
        samples = read_fgvr(args.bench, args.seed)
    else:
        samples = read_rec(args.bench) if args.task == "rec" else read_bench(args.bench)
    jobs = {"predictions": samples} | ({"choices": choice_cases(samples, args.seed)} if args.gap else {})
    levels, choices = read_mastery(args.mastery) if args.mastery else None, None
    if levels is not None and not any(s["entity"] in levels for s in samples):
        raise SystemExit(f"{args.mastery}: no entity of {args.bench} is in it; want some; measure them with filter.py")
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
        same_config(out, args, ignore=(*free_flags(args), "seen"))
    categories = {s["category"] for s in samples}
    if odd := sorted(set(args.seen) - categories):
        print0(f"note: --seen {' '.join(odd)}: not in {args.bench}, which has {' '.join(sorted(categories))}")

    speed = None
    if args.model:
        rank, world_size, device = init_dist(args.timeout_minutes)
        stored = broadcast({job: stored_answers(out, job) for job in jobs} if rank == 0 else None)
        todo = {
            job: [s for s in cases if stored[job].get(s["id"], {"options": "none"}).get("options") != s.get("options")]
            for job, cases in jobs.items()
        }
        count, left = (sum(map(len, cases.values())) for cases in (jobs, todo))
        print0(f"eval_kvg: {count} cases, {count - left} answered before, {world_size} ranks on {device.type}")
        if left:
            tokenizer, image_processor = load_processors(args.model, args.max_pixels)
            for s in samples:
                resized_size(image_processor, s["image"])  # what is no image is named before weights are loaded
            model = load_model(args.model, args.dtype, device)
            since = time.time()
            for job, cases in todo.items():
                path = out / f"{part_prefix(job)}{rank}.jsonl"
                answer_cases(model, tokenizer, image_processor, style, cases[rank::world_size], path, args)
            dist.barrier()
            seconds = time.time() - since
            if rank == 0:
                stored = {job: stored_answers(out, job) for job in jobs}
                made = [stored[job][s["id"]]["num_tokens"] for job, cases in todo.items() for s in cases]
                speed = {"cases": len(made), "seconds": seconds, "cases_per_second": len(made) / seconds,
                         "tokens": sum(made), "tokens_per_second": sum(made) / seconds, "world_size": world_size,
                         "device": device.type}  # fmt: skip
        answers, choices = (stored["predictions"], stored.get("choices")) if rank == 0 else (None, None)
    if rank == 0:
        table = write_results(out, samples, answers, choices, levels, speed, args)
        for part in [p for job in jobs for p in out.glob(f"{part_prefix(job)}*.jsonl")]:
            part.unlink()
        print0(table + f"eval_kvg: {len(samples)} cases in {time.time() - start:.0f} s -> {out / 'report.html'}")
    if dist.is_initialized():
        dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    run(main)
