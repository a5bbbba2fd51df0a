"""Composes look-alike entities into one image each and writes knowledge-intensive visual grounding (KVG) samples.

reads   --source: a folder category/entity/*.png|jpg (with boxes.jsonl), a JSONL or a parquet of single-entity images
writes  --out: samples.jsonl (one row per query), images/, stats.json, preview.png, config.json
        with --box_model: the boxes that the source lacks, into --boxes; boxes_preview.png

  smoke    python synth_data.py --source runs/toy/world/train --out runs/synth --num_samples 32 --canvas_size 168 112
  photos   python synth_data.py --source fgvr/ --out runs/synth --num_samples 25000 --num_workers 16
  boxes    torchrun --nproc_per_node 8 synth_data.py --source fgvr/ --out runs/synth
           --box_model Qwen/Qwen2-VL-7B-Instruct  (8 GPUs ask for the boxes, then one process composes)

The paper (arXiv 2503.12797, data engine) draws 2 to 6 different entities of one category per image and lays them out in
a row, a column, a grid or at random; it does not state the distributions. Ours: uniform over k and over layouts. Every
sample is a function of (seed, index) alone, so the output is the same for any number of workers and after any kill.
Boxes, as in the paper: a grounding model is asked the very question of the rows on the single-entity image. Not here:
refinement by SAM3 (the paper, mainly for food). Added: sanity rules. Look at boxes_preview.png; mend boxes by hand.
"""

import argparse
import errno
import fcntl
import gc
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import struct
import sys
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from tqdm import tqdm

QUESTION = "Find and give the bounding box of <|object_ref_start|>{}<|object_ref_end|>"
ANSWER = "<|object_ref_start|>{}<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>"
LAYOUTS = ("horizontal", "vertical", "grid", "random")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PHOTO_FORMATS = ("JPEG", "MPO", "WEBP")  # Pillow's names; MPO: a JPEG as many phones write it


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument(
        "--source", required=True, help="folder category/entity/*, .jsonl or .parquet of single-entity images"
    )
    p.add_argument("--out", required=True, help="output folder; an interrupted run is continued")
    p.add_argument("--num_samples", type=int, default=25000, help="composite images (the paper's stage 1: 25K)")
    p.add_argument("--queries_per_image", type=int, default=1, help="rows per composite, each with another target")
    p.add_argument("--min_entities", type=int, default=2, help="fewest entities per image (paper: 2)")
    p.add_argument("--max_entities", type=int, default=6, help="most entities per image (paper: 6)")
    p.add_argument("--categories", nargs="+", help="use these categories only (default: all of the source)")
    p.add_argument(
        "--holdout_entities", type=float, default=0.0, help="share of entities kept out of every sample, 0..1"
    )
    # boxes
    p.add_argument(
        "--box_model", help="a Qwen-VL that is asked for the boxes that the source lacks (paper: Qwen2-VL-7B)"
    )
    p.add_argument(
        "--boxes",
        help="one {image, bbox_px} a line; what is listed is never asked, also if bbox_px is null "
        "(default: boxes.jsonl in a source folder, else SOURCE.boxes.jsonl)",
    )
    p.add_argument("--min_box_area", type=float, default=0.02, help="share of the image below which a box is rejected")
    p.add_argument("--box_batch_size", type=int, default=32, help="images that a process asks about at once")
    # against leaks from a benchmark
    p.add_argument(
        "--exclude",
        help="drop source images that also occur here: a .parquet or .jsonl with images, or a folder; of our own rows "
        "also their sources, by name. Found: other sizes, JPEG, brightness, mirrored. Often not found: cropped by more "
        "than 1 %% a side. Not found: a part of a picture, a turned one. Drawings on an empty ground look alike to it: "
        "other ones are dropped too",
    )
    p.add_argument("--exclude_distance", type=int, default=4, help="bits of 64 in which such images may differ")
    # canvas
    p.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="drawn uniformly")
    p.add_argument("--tile_px", type=int, default=448, help="nominal side of one tile, px, before the pixel cap")
    p.add_argument(
        "--max_pixels",
        type=int,
        default=401408,
        help="cap on width x height of a composite, and of what the box model sees (paper: 401,408)",
    )
    p.add_argument(
        "--canvas_size", type=int, nargs=2, metavar=("W", "H"), help="fixed canvas, px (default: from the tiles)"
    )
    p.add_argument("--grid", type=int, nargs=2, metavar=("COLS", "ROWS"), help="fixed grid (default: near-square)")
    p.add_argument("--background", default="white", choices=["white", "noise", "gradient"], help="where no tile lies")
    # against shortcuts: seams, sizes and compression tell a model that the image was made, not taken
    p.add_argument(
        "--entity_scale", type=float, nargs=2, default=[1.0, 1.0], metavar=("LO", "HI"), help="share of its cell"
    )
    p.add_argument("--gap_px", type=int, nargs=2, default=[0, 0], metavar=("LO", "HI"), help="random gap between tiles")
    p.add_argument("--color_jitter", type=float, default=0.0, help="brightness/contrast/saturation factor 1 +- this")
    p.add_argument(
        "--jpeg_quality", type=int, nargs=2, metavar=("LO", "HI"), help="write JPEG of random quality (default: PNG)"
    )
    # run
    p.add_argument("--max_bad_images", type=int, default=0, help="unreadable source images to skip before stopping")
    p.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes; does not change the output")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if not 2 <= args.min_entities <= args.max_entities <= 6:
        p.error("want 2 <= --min_entities <= --max_entities <= 6")
    if args.num_samples < 1 or not 1 <= args.queries_per_image <= args.min_entities:
        p.error("want --num_samples >= 1 and 1 <= --queries_per_image <= --min_entities")
    if not 0 <= args.min_box_area < 1 or args.box_batch_size < 1:
        p.error("want 0 <= --min_box_area < 1 and --box_batch_size >= 1")
    if args.grid and args.grid[0] * args.grid[1] < args.max_entities:
        p.error(f"--grid {args.grid[0]} {args.grid[1]} has fewer cells than --max_entities {args.max_entities}")
    return args


# >>> shared:jsonl_io (source)
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


# ---- source images ----
@dataclass(frozen=True)
class Source:
    """One single-entity image: where it is, what it shows, and the box of the entity in its own pixels."""

    path: str  # file path, or "file.parquet#row"
    name: str  # stable name for the rows and the boxes file: relative to the source
    entity: str
    category: str
    bbox_px: tuple | None


def list_sources(source):
    """All `Source` records of a folder, JSONL or parquet; a folder's have no box yet.

    Image paths of a JSONL: see `image_path`; a folder's may be links to anywhere. Errors: one line.
    """
    source = Path(source)
    if not source.exists():
        raise SystemExit(
            f"--source {source}: no such file or folder; want category/entity/*.png, .jsonl or .parquet; check the path"
        )
    if source.is_dir():
        found = sorted(p for p in source.glob("*/*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise SystemExit(f"--source {source}: no images; want category/entity/*.png|jpg below it; check the path")
        rows = [
            {
                "image": p.relative_to(source).as_posix(),
                "entity": p.parent.name.replace("_", " "),
                "category": p.parent.parent.name,
            }
            for p in found
        ]
    elif source.suffix == ".parquet":
        wanted = ("image", "entity", "category")
        table, columns = read_parquet(source, ("entity", "category", "bbox_px"))
        if missing := [c for c in wanted if c not in columns]:
            raise SystemExit(f"--source {source}: no column {missing[0]!r}; want {', '.join(wanted)}; mend the file")
        rows = [r | {"image": f"{source.name}#{i}"} for i, r in enumerate(table)]
    else:
        rows = read_jsonl(source, ("image", "entity", "category"))
    for i, r in enumerate(rows):
        where = f"--source {source}: row {i + 1}, {short(r['image'])[1:-1]}"
        check_name(r["entity"], where)
        check_name(r["category"], where, "category")
        if r.get("bbox_px") and not is_box(r["bbox_px"]):
            raise SystemExit(
                f"{where}: bbox_px {short(r['bbox_px'])}; want 0 <= x1 < x2 and 0 <= y1 < y2; mend the row"
            )
        if not source.is_dir():
            image_path(source.parent, r["image"], where)
        elif CONTROL.search(r["image"]):
            raise SystemExit(f"{where}; want a file name of one line in UTF-8; rename the file")
    return [
        Source(
            path=str((source if source.is_dir() else source.parent) / r["image"]),
            name=r["image"],
            entity=r["entity"],
            category=r["category"].lower(),
            bbox_px=tuple(r["bbox_px"]) if r.get("bbox_px") else None,
        )
        for r in rows
    ]


def read_boxes(path):
    """{image: line} of a boxes file, nothing if there is none; the last line on an image counts. Errors: one line."""
    lines = {str(r["image"]): r for r in read_jsonl(path, ("image",))} if os.path.exists(path) else {}
    if missing := [image for image, r in lines.items() if "bbox_px" not in r]:
        raise SystemExit(
            f"{path}: {short(missing[0])[1:-1]}: no 'bbox_px'; want [x1, y1, x2, y2], or null; mend or drop it"
        )
    if wrong := [r for r in lines.values() if r["bbox_px"] is not None and not is_box(r["bbox_px"])]:
        raise SystemExit(
            f"{path}: {short(wrong[0]['image'])[1:-1]}: bbox_px {short(wrong[0]['bbox_px'])}; "
            "want 0 <= x1 < x2 and 0 <= y1 < y2, or null; mend or drop the line"
        )
    if wrong := [r for r in lines.values() if not isinstance(r.get("reason", ""), str)]:
        raise SystemExit(f"{path}: reason {short(wrong[0]['reason'])}; want text; mend or drop the line")
    return lines


def with_boxes(sources, boxes_file):
    """Sources with a box, their own or the file's; {reason: count} of the others; how many boxes are a whole image.

    Prints one line if sources are left out. Errors: one line if no box is there.
    """
    boxes, kept, left_out, whole_image = read_boxes(boxes_file), [], Counter(), 0
    for s in sources:
        line = boxes.get(s.name, {"bbox_px": None, "reason": "not listed"})
        if s.bbox_px or line["bbox_px"]:
            kept.append(s if s.bbox_px else replace(s, bbox_px=tuple(line["bbox_px"])))
            whole_image += not s.bbox_px and line.get("note") == "whole image"
        else:
            left_out[line.get("reason", "rejected by hand")] += 1
    if left_out:
        found = f"no box for {left_out.total()} of {len(sources)} images"
        if not boxes:
            raise SystemExit(f"{boxes_file}: {found}; want one {{image, bbox_px}} a line; write it or give --box_model")
        found += " (" + ", ".join(f"{n} {short(reason)[1:-1]}" for reason, n in left_out.most_common(5)) + ")"
        if not kept:
            raise SystemExit(
                f"{boxes_file}: {found}; want boxes; read the answers there, then try another --box_model and --boxes"
            )
        print(f"{boxes_file}: {found}; left out", file=sys.stderr)
    return kept, left_out, whole_image


def difference_hash(image):
    """64-bit perceptual hash: does each of 8 x 9 grey cells grow brighter to the right? Survives scaling and JPEG."""
    cells = np.asarray(on_ground(image).convert("L").resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    return np.packbits(cells[:, 1:] > cells[:, :-1]).view(">u8")[0].astype(np.uint64)


def benchmark_images(path):
    """Hashes of all images of a benchmark, mirrored ones too, and the names of the sources that our own rows list.

    A parquet or JSONL with a column `image` or `images`, or a folder. Errors: one line.
    """
    path, names = Path(path), set()
    if path.is_dir():
        images = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    elif path.suffix == ".jsonl":
        rows = read_jsonl(path)
        if missing := [i for i, r in enumerate(rows, 1) if not (r.get("images") or r.get("image"))]:
            raise SystemExit(f"--exclude {path}: row {missing[0]} has no image; want image or images; mend the file")
        listed = {i: r["images"] if isinstance(r.get("images"), list) else [r.get("images") or r["image"]]
                  for i, r in enumerate(rows, 1)}  # fmt: skip
        images = dict.fromkeys(
            image_path(path.parent, image, f"--exclude {path}: row {i}") for i in listed for image in listed[i]
        )
        entities = [e for r in rows if isinstance(r.get("entities"), list) for e in r["entities"]]
        names = {e["source"] for e in entities if isinstance(e, dict) and isinstance(e.get("source"), str)}
    elif path.suffix == ".parquet" and path.is_file():
        rows, columns = read_parquet(path, ("image",))
        if "image" not in columns:
            raise SystemExit(f"--exclude {path}: no column 'image'; want the benchmark's images; check the path")
        rows = [r["image"] for r in rows]
        images = dict.fromkeys((r.get("bytes") or r.get("path")) if isinstance(r, dict) else r for r in rows)
        images = [i if isinstance(i, bytes) else image_path(path.parent, i, f"--exclude {path}") for i in images]
    else:
        raise SystemExit(
            f"--exclude {path}: no such folder, .jsonl or .parquet; want the benchmark's images; check the path"
        )
    hashes = []
    for image in images:
        try:
            im = decode_image(image)
            hashes += [difference_hash(im), difference_hash(ImageOps.mirror(im))]
        except UNREADABLE as e:
            raise SystemExit(
                f"--exclude {path}: unreadable image ({short(e, 300)}); want all of them; mend the benchmark"
            ) from None
    if not hashes:
        raise SystemExit(f"--exclude {path}: no images; want the benchmark's images; check the path")
    return np.array(hashes, np.uint64), names


def occurs_in(source, hashes, names, distance):
    """Whether a source image is one of the benchmark's. An unreadable one is left to `make_sample`, which names it."""
    try:
        return source.name in names or bool(
            (np.bitwise_count(hashes ^ difference_hash(load_source(source))) <= distance).any()
        )
    except UNREADABLE:
        return False


@lru_cache(maxsize=1)
def image_column(file):
    """The images of a parquet, read once per process."""
    import pyarrow.parquet as pq

    return pq.read_table(file, columns=["image"])["image"]


def load_source(source):
    """RGB or RGBA image of a `Source`, as `decode_image` gives it. Errors: one of UNREADABLE, also for a strip that no
    model takes (200 times as long as wide) and for a box outside the image.
    """
    if ".parquet#" in source.path:
        file, row = source.path.rsplit("#", 1)
        data = image_column(file)[int(row)].as_py()
        data = data.get("bytes") if isinstance(data, dict) else data
        image = decode_image(data if isinstance(data, bytes) else b"")
    else:
        image = decode_image(source.path)
    if max(image.size) > 200 * min(image.size):
        raise ValueError(f"{image.width}x{image.height}, a side more than 200 times the other")
    x1, y1, x2, y2 = source.bbox_px or (0, 0, *image.size)
    if not (0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height):
        raise ValueError(f"bbox_px {list(source.bbox_px)} does not lie in the {image.width}x{image.height} image")
    return image


# ---- boxes from a grounding model ----
def on_ground(image, background="white", seed=""):
    """RGB; where the image is transparent, the background shows."""
    if "A" not in image.getbands():
        return image if image.mode == "RGB" else image.convert("RGB")
    image, canvas = image.convert("RGBA"), background_of(background, image.size, random.Random(seed))
    canvas.paste(image, (0, 0), image)
    return canvas


def judge_box(text, size, grid, min_area):
    """What the boxes file says of an answer: its box in px of the image of `size` (width, height), or why it has none.

    An answer is about the one entity of the image, so two boxes are no answer. `grid`: as in `parse_bbox`.
    """
    bbox_1000 = parse_bbox(text, "direct", grid)
    if bbox_1000 is None:
        return {"bbox_px": None, "reason": "unparsed", "response": text}
    x1, y1, x2, y2 = (round(v * n / 1000, 2) for v, n in zip(bbox_1000, size * 2, strict=True))
    w, h, share = x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1) / (size[0] * size[1])
    if min(w, h) < 8 or share < min_area:
        return {"bbox_px": None, "reason": "too small", "response": text}
    if max(w, h) > 10 * min(w, h):
        return {"bbox_px": None, "reason": "too thin", "response": text}
    # close-ups are common in such data; but a model that gives up also boxes everything
    return {"bbox_px": [x1, y1, x2, y2]} | ({"note": "whole image"} if share >= 0.95 else {})


def box_prompt(source, tokenizer, image_processor, style, args):
    """Size of a source image, and what the box model gets: the image as it lies on a canvas, and the question."""
    image, data = load_source(source), io.BytesIO()
    on_ground(image, args.background, source.name).save(data, "BMP")
    question = QUESTION.format(source.entity)
    return image.size, chat_inputs(tokenizer, image_processor, data.getvalue(), question, style)


def greedy_answers(model, tokenizer, prompts):
    """One text per prompt of `chat_inputs`, by transformers' own generate: a box is short, the prompt is the cost."""
    from transformers import GenerationConfig

    length = max(len(p["prompt_ids"]) for p in prompts)
    ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, p in enumerate(prompts):  # padded on the left, so that all answers start in the same column
        ids[row, length - len(p["prompt_ids"]) :] = torch.tensor(p["prompt_ids"])
        mask[row, length - len(p["prompt_ids"]) :] = 1
    inputs = {k: torch.cat([p[k] for p in prompts]) for k in ("pixel_values", "image_grid_thw")}
    inputs |= {"input_ids": ids, "attention_mask": mask}
    inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    # in place of the model's own, whose repetition penalty would touch the digits of a box
    model.generation_config = GenerationConfig(
        max_new_tokens=128,
        suppress_tokens=vision_ids(tokenizer),
        eos_token_id=stop_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    stop, answers = set(stop_ids(tokenizer)), []
    for row in model.generate(**{k: v.to(model.device) for k, v in inputs.items()})[:, length:].tolist():
        end = next((i for i, token in enumerate(row) if token in stop), len(row))
        answers.append(completion_text(tokenizer, row[:end]))
    return answers


def find_boxes(sources, boxes_file, args):
    """Asks the box model for what `boxes_file` does not list, and adds it there. Returns {path: error} of bad images.

    Every rank writes a part file, so that a killed run continues; at the end rank 0 merges them. Errors: one line.
    """
    global torch, dist  # imported here, so that a run without a box model starts in a tenth of the time
    known, lacking = read_boxes(boxes_file), {s.name: s for s in sources if s.bbox_px is None}
    by = Counter(known[name].get("model", "hand") for name in lacking if name in known)
    whose = ", ".join(f"{n} by {model}" for model, n in by.items())
    print0(f"{boxes_file}: lists {by.total()} of {len(lacking)} images{f' ({whose})' if whose else ''}")
    if by.total() == len(lacking):
        return {}
    part, start = Path(f"{boxes_file}.part-{int(os.environ.get('RANK', 0)):05d}"), time.time()
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as e:
        raise SystemExit(f"{boxes_file}: {e.strerror}; want a file that can be written; give another --boxes") from None
    import torch
    import torch.distributed as dist

    def parts():
        return sorted(p for p in part.parent.iterdir() if p.name.startswith(f"{boxes_file.name}.part-"))

    rank, world_size, device = init_dist(timeout_minutes=7 * 24 * 60)
    done = (
        broadcast({r["image"]: r for p in parts() for r in complete_lines(p, image=str)} if rank == 0 else None) | known
    )
    todo = [s for name, s in lacking.items() if name not in done]
    mine, bad = todo[rank::world_size], {}
    if mine:
        style = check_model(args.box_model)
        tokenizer, image_processor = load_processors(args.box_model, args.max_pixels)
        model = load_model(args.box_model, "auto", device).eval()
    bar = tqdm(total=len(mine), disable=not sys.stderr.isatty(), desc="boxes")
    with open(part, "a", encoding="utf-8") as f:
        for i in range(0, len(mine), args.box_batch_size):
            batch = []
            for s in mine[i : i + args.box_batch_size]:
                try:
                    batch.append((s, *box_prompt(s, tokenizer, image_processor, style, args)))
                except UNREADABLE as e:
                    print(f"{s.path}: unreadable ({e}); skipped", file=sys.stderr)
                    bad[s.path] = str(e)
            answers = greedy_answers(model, tokenizer, [p for _, _, p in batch]) if batch else []
            for (s, size, prompt), text in zip(batch, answers, strict=True):
                line = judge_box(text, size, prompt["grid"], args.min_box_area)
                f.write(json.dumps({"image": s.name} | line | {"model": args.box_model}) + "\n")
            f.flush()
            bar.update(args.box_batch_size)
    bar.close()
    every_bad = [None] * world_size
    dist.all_gather_object(every_bad, bad)  # also waits for the others
    dist.destroy_process_group()
    if rank > 0:
        return {}
    new = {r["image"]: r for p in parts() for r in complete_lines(p, image=str) if r["image"] not in known}
    if new:
        old = boxes_file.read_text(encoding="utf-8").removesuffix("\n") + "\n" if known else ""
        lines = [json.dumps(new[name], ensure_ascii=False) + "\n" for name in sorted(new)]
        write_text(boxes_file, old + "".join(lines))
    for p in parts():
        p.unlink()
    print(
        f"{boxes_file}: {args.box_model} asked about {len(todo)} images in {time.time() - start:.1f} s, "
        f"{len(lacking) - by.total() - len(todo)} answers kept of a killed run"
    )
    return {path: reason for bad in every_bad for path, reason in bad.items()}


# ---- composition ----
def cells_of(layout, sizes, rng, args):
    """Canvas size and one cell (x, y, w, h) per image, all float px. `sizes` holds (w, h) of the images."""
    tile, k = float(args.tile_px), len(sizes)
    if layout == "horizontal":
        widths = [tile * w / h for w, h in sizes]
        canvas, cells = (sum(widths), tile), [(sum(widths[:i]), 0.0, w, tile) for i, w in enumerate(widths)]
    elif layout == "vertical":
        heights = [tile * h / w for w, h in sizes]
        canvas, cells = (tile, sum(heights)), [(0.0, sum(heights[:i]), tile, h) for i, h in enumerate(heights)]
    elif layout == "grid":
        cols = args.grid[0] if args.grid else math.ceil(math.sqrt(k))
        rows = args.grid[1] if args.grid else math.ceil(k / cols)
        at = rng.sample(range(cols * rows), k)
        canvas, cells = (cols * tile, rows * tile), [(i % cols * tile, i // cols * tile, tile, tile) for i in at]
    else:  # random: rectangles by rejection, a little smaller after every failed round
        side = tile * math.sqrt(k) * 1.3
        canvas = (side, side) if not args.canvas_size else (side, side * args.canvas_size[1] / args.canvas_size[0])
        shrink, cells = 1.0, []
        while len(cells) < k:
            cells = []
            for w, h in sizes:
                s = shrink * tile * rng.uniform(0.6, 1.0) / max(w, h)
                for _ in range(50):
                    x, y = rng.uniform(0, max(0.0, canvas[0] - s * w)), rng.uniform(0, max(0.0, canvas[1] - s * h))
                    if all(x + s * w <= a or a + c <= x or y + s * h <= b or b + d <= y for a, b, c, d in cells):
                        cells.append((x, y, s * w, s * h))
                        break
            shrink *= 0.9
    if args.canvas_size:
        fx, fy = args.canvas_size[0] / canvas[0], args.canvas_size[1] / canvas[1]
    else:
        fx = fy = min(1.0, math.sqrt(args.max_pixels / (canvas[0] * canvas[1])))
    cells = [(x * fx, y * fy, w * fx, h * fy) for x, y, w, h in cells]
    return (max(1, int(canvas[0] * fx + 1e-6)), max(1, int(canvas[1] * fy + 1e-6))), cells


def background_of(kind, size, rng):
    """RGB canvas. The gradient's red and green tell x and y, so that a tiny model can read positions off colours."""
    w, h = size
    if kind == "white":
        return Image.new("RGB", size, (255, 255, 255))
    if kind == "noise":
        return Image.frombytes("RGB", size, rng.randbytes(w * h * 3))
    pixels = np.empty((h, w, 3), np.uint8)
    pixels[..., 0] = np.linspace(60, 205, w)
    pixels[..., 1] = np.linspace(60, 205, h)[:, None]
    pixels[..., 2] = rng.randint(170, 210)
    return Image.fromarray(pixels)


def compose(images, bboxes_px, rng, args):
    """Pastes single-entity images on one canvas.

    Shapes: k images and k boxes (x1, y1, x2, y2) in their own px -> canvas, k boxes in canvas px, layout name.
    Every image is resized once, keeps its aspect up to rounding, and its box is mapped by the very same factors.
    """
    layout = rng.choice(args.layouts)
    canvas_size, cells = cells_of(layout, [im.size for im in images], rng, args)
    canvas, placed = background_of(args.background, canvas_size, rng), []
    for image, (bx1, by1, bx2, by2), (cx, cy, cw, ch) in zip(images, bboxes_px, cells, strict=True):
        gap = min(rng.uniform(*args.gap_px), cw / 2, ch / 2)
        cx, cy, cw, ch = cx + gap / 2, cy + gap / 2, cw - gap, ch - gap
        s = min(cw / image.width, ch / image.height) * rng.uniform(*args.entity_scale)
        w, h = max(1, int(image.width * s + 1e-6)), max(1, int(image.height * s + 1e-6))
        x, y = int(cx + rng.uniform(0, cw - w)), int(cy + rng.uniform(0, ch - h))
        tile = image.resize((w, h), Image.Resampling.BILINEAR)
        if args.color_jitter:
            alpha = tile.getchannel("A") if tile.mode == "RGBA" else None
            tile = tile.convert("RGB")
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                tile = enhance(tile).enhance(rng.uniform(1 - args.color_jitter, 1 + args.color_jitter))
            if alpha is not None:
                tile.putalpha(alpha)
        canvas.paste(tile, (x, y), tile if tile.mode == "RGBA" else None)
        fx, fy = w / image.width, h / image.height
        placed.append([x + bx1 * fx, y + by1 * fy, x + bx2 * fx, y + by2 * fy])
    return canvas, placed, layout


def save_photo_png(image, file):
    """Writes an RGB image as PNG, in half to a third of the time that Pillow takes: lossless, about a tenth larger.

    Most of a composite's time goes into its PNG, and more than half of that into Pillow's search for the best of five
    filters in every row. Here each row stores its difference to the row above, and deflate looks for repeats of the
    byte before only: empty background has those, and photos hardly any others. Drawings do, so they stay with Pillow.
    """
    rows = np.asarray(image).reshape(image.height, -1)
    data = np.empty((image.height, 1 + rows.shape[1]), np.uint8)
    data[:, 0] = 2  # PNG's filter "up"; what it subtracts from the first row is 0
    data[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=data[1:, 1:])
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 0)  # 8 bits a channel, type 2: RGB
    chunks = ((b"IHDR", header), (b"IDAT", deflate.compress(data) + deflate.flush()), (b"IEND", b""))
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    )


def to_1000(bbox_px, width, height):
    """Box in px -> ints on Qwen2-VL's 0..1000 grid of the original image; at least one cell wide and high."""
    x1, y1, x2, y2 = (round(v * 1000 / s) for v, s in zip(bbox_px, (width, height, width, height), strict=True))
    return [min(x1, 999), min(y1, 999), min(max(x2, x1 + 1), 1000), min(max(y2, y1 + 1), 1000)]


def make_sample(index, by_category, args):
    """One composite image with its rows, a function of (seed, index). Also returns the unreadable sources it met."""
    rng, bad = random.Random(f"{args.seed}:{index}"), []
    while True:
        category = rng.choice(sorted(by_category))
        entities = by_category[category]
        names = rng.sample(sorted(entities), min(len(entities), rng.randint(args.min_entities, args.max_entities)))
        sources, images = [rng.choice(entities[name]) for name in names], []
        for source in sources:
            try:
                images.append(load_source(source))
            except UNREADABLE as e:
                bad.append((source.path, str(e)))
        if len(images) == len(sources):
            break
        if len({path for path, _ in bad}) > args.max_bad_images or len(bad) > 1000:
            return None, bad
    canvas, boxes, layout = compose(images, [s.bbox_px for s in sources], rng, args)
    suffix = "jpg" if args.jpeg_quality else "png"
    file = Path(args.out) / "images" / f"{index:06d}.{suffix}"
    if args.jpeg_quality:
        canvas.save(file, quality=rng.randint(*args.jpeg_quality))
    elif any(image.format in PHOTO_FORMATS for image in images):
        save_photo_png(canvas, file)
    else:
        canvas.save(file, compress_level=1)
    boxes_1000 = [to_1000(b, *canvas.size) for b in boxes]
    listed = [{"entity": s.entity, "bbox_px": [round(v, 2) for v in b], "bbox_1000": n, "source": s.name}
              for s, b, n in zip(sources, boxes, boxes_1000, strict=True)]  # fmt: skip
    rows = []
    for target in rng.sample(range(len(names)), args.queries_per_image):
        question, answer = QUESTION.format(names[target]), ANSWER.format(names[target], *boxes_1000[target])
        messages = [{"role": "user", "content": "<image>" + question}, {"role": "assistant", "content": answer}]
        rows.append(
            {
                "id": f"{args.seed}-{index:06d}-{target}",
                "images": [f"images/{file.name}"],
                "width": canvas.width,
                "height": canvas.height,
                "category": category,
                "layout": layout,
                "entities": listed,
                "target": target,
                "question": question,
                "answer": answer,
                "messages": messages,
            }
        )
    return rows, bad


def worker_pool(num_workers):
    """Processes that keep freed image memory for the next image: at most 8 blocks of up to 16 MB each.

    Else the system takes it back and hands out pages cleared anew, which costs about a tenth of a photo composite.
    """
    return multiprocessing.Pool(num_workers, initializer=Image.core.set_blocks_max, initargs=(8,))


# ---- pictures for people ----
def with_marks(image, marks):
    """The image 360 px wide, with boxes and names drawn. `marks`: (bbox_px, text, color) each."""
    scale = 360 / image.width
    image = on_ground(image).resize((360, max(1, round(image.height * scale))))
    draw = ImageDraw.Draw(image)
    for bbox_px, text, color in marks:
        draw.rectangle([v * scale for v in bbox_px], outline=color, width=2)
        draw.text((bbox_px[0] * scale + 3, bbox_px[1] * scale + 2), text, fill=color)
    return image


def save_sheet(tiles, path):
    """Writes a contact sheet, four tiles a row."""
    height = max(t.height for t in tiles)
    sheet = Image.new("RGB", (370 * min(4, len(tiles)), (height + 10) * math.ceil(len(tiles) / 4)), (255, 255, 255))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % 4 * 370 + 5, i // 4 * (height + 10) + 5))
    sheet.save(path)


def draw_preview(rows, root, path, most=12):
    """Contact sheet of the first composites with every box drawn, the target's in red."""
    tiles = []
    for row in list({r["images"][0]: r for r in rows}.values())[:most]:
        colors = [(230, 0, 0) if i == row["target"] else (0, 0, 0) for i in range(len(row["entities"]))]
        marks = [(e["bbox_px"], e["entity"], c) for e, c in zip(row["entities"], colors, strict=True)]
        tiles.append(with_marks(Image.open(root / row["images"][0]).convert("RGB"), marks))
    save_sheet(tiles, path)


def draw_sources(sources, seed, path, most=40):
    """Contact sheet of some single-entity images with their box and name, for the check by eye."""
    tiles = []
    for s in random.Random(f"{seed}:preview").sample(sources, min(most, len(sources))):
        try:
            tiles.append(with_marks(load_source(s), [(s.bbox_px, s.entity, (230, 0, 0))]))
        except UNREADABLE:
            continue  # `make_sample` names it
    if tiles:
        save_sheet(tiles, path)


def too_many_bad(bad, args):
    path, reason = list(bad.items())[-1]
    return SystemExit(
        f"{len(bad)} unreadable source images, last {path}: {reason}; want at most --max_bad_images "
        f"{args.max_bad_images}; mend the images or raise the flag"
    )


def main():
    args, start = parse_args(), time.time()
    boxes_file = Path(args.source) / "boxes.jsonl" if os.path.isdir(args.source) else Path(f"{args.source}.boxes.jsonl")
    boxes_file = Path(args.boxes) if args.boxes else boxes_file
    sources = [s for s in list_sources(args.source) if not args.categories or s.category in args.categories]
    out, first = Path(args.out), int(os.environ.get("RANK", 0)) == 0
    (out / "images").mkdir(parents=True, exist_ok=True)
    hashes, listed = benchmark_images(args.exclude) if args.exclude and first else (None, None)
    bad = find_boxes(sources, boxes_file, args) if args.box_model else {}
    if not first:
        return leave()  # what follows is work for one process
    if len(bad) > args.max_bad_images:
        raise too_many_bad(bad, args)
    sources, left_out, whole_image = with_boxes(sources, boxes_file)
    boxes_sha = hashlib.sha256(repr([(s.name, s.bbox_px) for s in sources]).encode()).hexdigest()[:16]
    excluded = []
    if args.exclude:
        check = partial(occurs_in, hashes=hashes, names=listed, distance=args.exclude_distance)
        with worker_pool(args.num_workers) as pool:
            occurs = list(
                tqdm(pool.imap(check, sources, chunksize=64), total=len(sources), disable=not sys.stderr.isatty())
            )
        excluded = [s.name for s, found in zip(sources, occurs, strict=True) if found]
        sources = [s for s, found in zip(sources, occurs, strict=True) if not found]
    names = sorted({(s.category, s.entity) for s in sources})
    held = set(random.Random(f"{args.seed}:holdout").sample(names, round(args.holdout_entities * len(names))))
    grouped = defaultdict(lambda: defaultdict(list))
    for s in sources:
        if (s.category, s.entity) not in held:
            grouped[s.category][s.entity].append(s)
    by_category = {c: dict(e) for c, e in grouped.items() if len(e) >= args.min_entities}
    if not by_category:
        raise SystemExit(
            f"--source {args.source}: no category with {args.min_entities} entities; want look-alikes; add images"
        )

    # how the boxes came is free, what they are is not
    free = ("out", "num_workers", "box_model", "boxes", "box_batch_size", "min_box_area")
    same_config(out, argparse.Namespace(**vars(args), boxes_sha=boxes_sha), ignore=free)
    if args.box_model:
        draw_sources(sources, args.seed, out / "boxes_preview.png")
    samples = out / "samples.jsonl"
    rows = complete_lines(samples, images=list, category=str, entities=list, layout=str)
    done = len({r["images"][0] for r in rows})
    whole = done - (len(rows) % args.queries_per_image > 0)  # a composite whose last rows were cut off is made again
    rows = rows[: whole * args.queries_per_image]
    write_text(samples, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))

    work = partial(make_sample, by_category=by_category, args=args)
    with worker_pool(args.num_workers) as pool, open(samples, "a", encoding="utf-8") as f:
        todo = range(whole, args.num_samples)
        for new, met in tqdm(
            pool.imap(work, todo, chunksize=8), total=len(todo), disable=not sys.stderr.isatty(), desc="synth"
        ):
            for path, reason in met:
                if path not in bad:
                    print(f"{path}: unreadable ({reason}); skipped", file=sys.stderr)
                bad[path] = reason
            if new is None or len(bad) > args.max_bad_images:
                raise too_many_bad(bad, args)
            f.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in new))
            rows += new
    draw_preview(rows, out, out / "preview.png")
    stats = {
        "images": args.num_samples,
        "rows": len(rows),
        "categories": Counter(r["category"] for r in rows),
        "entities": len({(r["category"], e["entity"]) for r in rows for e in r["entities"]}),
        "entities_per_image": Counter(len(r["entities"]) for r in rows),
        "layouts": Counter(r["layout"] for r in rows),
        "held_out_entities": sorted(f"{c}/{e}" for c, e in held),
        "boxes": {"left_out": left_out, "whole_image": whole_image},
        "excluded": excluded,
        "bad_images": bad,
        "seconds": round(time.time() - start, 1),
    }
    write_text(out / "stats.json", json.dumps(stats, indent=1, ensure_ascii=False) + "\n")
    print(
        f"synth_data: {stats['images']} images, {stats['rows']} rows, {stats['entities']} entities, "
        f"{len(excluded)} excluded, {len(bad)} unreadable, {stats['seconds']} s -> {samples}, {out / 'preview.png'}"
    )
    leave()


if __name__ == "__main__":
    run(main)
