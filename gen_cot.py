"""Writes a chain of thought for every composite sample: from a local teacher, a served teacher, or an attribute table.

reads   --samples: samples.jsonl of synth_data.py
        --knowledge: {"Name": {"category", "description"}} (teacher `knowledge`)
writes  --out: samples.jsonl (rows with cot, teacher and <think>/<answer> messages), rejected.jsonl, stats.json (tokens
        and cost of the finished rows too), config.json, part-*.jsonl (one line per finished row, so that a killed run
        continues)

  smoke    python gen_cot.py --samples runs/toy/synth_sft/samples.jsonl --knowledge runs/toy/world/knowledge.json
           --out runs/toy/cot
  served   python gen_cot.py --samples runs/synth/samples.jsonl --teacher openai --base_url http://localhost:8000/v1
           --teacher_model Qwen/Qwen2-VL-72B-Instruct --out runs/cot
  8 GPUs   torchrun --nproc_per_node 8 gen_cot.py --samples runs/synth/samples.jsonl --teacher hf
           --teacher_model Qwen/Qwen2-VL-7B-Instruct --out runs/cot  (72B: python, one process, --device_map auto)

As in the paper (arXiv 2503.12797) the teacher sees all labels and boxes and the target's box, and rationalises:
Planning, Visual Analysis, Comparison, Conclusion. Differences: our own wording of the prompt; every chain is validated,
a bad one is drawn again and at last rejected with its reason (the paper describes no filter and no retries); the
`knowledge` teacher, which looks at nothing but the table. Boxes are on Qwen2-VL's 0..1000 grid, and the prompt says so.
"""

import argparse
import asyncio
import base64
import errno
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

TEACHER_PROMPT = """This image shows {listed}.
Boxes are (x1,y1),(x2,y2), on a grid from 0 to 1000 over the width and over the height of the image.
The bounding box of {target} is {box}.
Write the reasoning by which an expert who sees only the image would find {target}, \
from the image and from what is known about its looks.
Notes:
1. Compare {target} in detail with the other objects, which are of the same kind, \
until there is evidence that only it shows.
2. First analyse the visible features of every object, and only then compare.
3. An object called [Unknown] has no known name; it can still be compared by its looks.
Write exactly four parts, each beginning on a new line with its heading, and nothing before the first:
Planning: what is known about the looks of {target}, and what to look for.
Visual Analysis: one numbered block per object with its name, its box, and its colours, shapes and parts.
Comparison: which features set {target} apart from each of the others.
Conclusion: the decision; the last words are the box of {target}, written as (x1,y1),(x2,y2).
Never mention that names, boxes or these notes were given to you."""
HEADINGS = re.compile(r"^[ \t#*\d.)]*(planning|visual analysis|comparison|conclusion)[ \t*]*(?::|$)", re.I | re.M)
INLINE = re.compile(r"<\|(?:box|object_ref)_(?:start|end)\|>")  # Qwen's own way to write names and boxes; dropped
GIVEN = r"(?:provided|given|supplied|stated|specified)"
ARE = r"(?:is|are|was|were|has been|have been)"
MATCHES = r"(?:match|matches|matching|consistent with|confirmed by|according to)"
BETRAYALS = [re.compile(pattern, re.I) for pattern in (
    rf"\b{GIVEN} (?:bounding box|box|coordinate|label|name|annotation|location|information|answer)",
    rf"\b(?:box|boxes|coordinates?|labels?|names?|annotations?)(?: (?:that )?{ARE})? {GIVEN}\b",
    rf"\bbounding box[^.\n]{{0,60}}\b{GIVEN}\b",
    rf"\bas {GIVEN}\b",
    rf"\b{MATCHES} the (?:\w+ )?(?:bounding box|coordinates|labels?|annotations?)\b",
    r"\bthe (?:prompt|instructions?|annotations?|notes)\b",
    r"\bground[- ]truth\b",
    r"\b(?:I|we) (?:am|are|was|were|have been) (?:told|given|provided)\b",
    r"\blabell?ed (?:as\b|\[?unknown)",
)]  # fmt: skip
TOKENS = ("prompt_tokens", "completion_tokens")
RECORD = dict(id=(str, int), cot=(str, type(None)), reason=(str, type(None)), attempt=int)  # a line of a part file


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--samples", required=True, help="samples.jsonl of synth_data.py")
    p.add_argument("--out", required=True, help="output folder; an interrupted run is continued")
    p.add_argument(
        "--teacher",
        default="knowledge",
        choices=["hf", "openai", "knowledge"],
        help="local model, served model, or attribute table",
    )
    p.add_argument(
        "--teacher_model",
        help="hf: folder or name of a Qwen-VL; openai: the name the server knows (paper: Qwen2-VL-72B)",
    )
    p.add_argument("--knowledge", help='teacher knowledge: JSON {"Name": {"category", "description"}}')
    # asking
    p.add_argument("--max_attempts", type=int, default=3, help="chains drawn per row before it is rejected")
    p.add_argument("--temperature", type=float, default=0.7, help="0 is greedy and wants --max_attempts 1")
    p.add_argument("--max_completion_length", type=int, default=1024, help="tokens; a longer chain is rejected")
    p.add_argument("--max_pixels", type=int, default=401408, help="pixel cap of an image (paper: 401,408)")
    p.add_argument("--min_words", type=int, default=30, help="a shorter chain of a model is rejected")
    p.add_argument("--max_words", type=int, default=800, help="a longer chain of a model is rejected")
    # hf
    p.add_argument("--batch_size", type=int, default=16, help="chains decoded at once on one rank")
    p.add_argument(
        "--device_map",
        choices=["auto"],
        help="auto: one process, the model over all GPUs (default: one GPU per process)",
    )
    p.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="auto: bfloat16 on CUDA, float32 on CPU",
    )
    # openai; the key is read from the environment variable OPENAI_API_KEY alone
    p.add_argument(
        "--base_url", default="http://localhost:8000/v1", help="OpenAI-compatible server (vLLM, SGLang, ...)"
    )
    p.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    p.add_argument(
        "--request_timeout", type=float, default=300, help="seconds per request, its wait in the server included"
    )
    p.add_argument(
        "--max_retries", type=int, default=8, help="repeats of a request that met a busy, slow or absent server"
    )
    # run
    p.add_argument(
        "--price_per_million",
        nargs=2,
        type=float,
        metavar=("PROMPT", "COMPLETION"),
        help="price of a million tokens, in any currency, for the cost in stats.json (default: no cost)",
    )
    p.add_argument("--log_every_s", type=float, default=30, help="seconds between lines of progress")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if min(args.max_attempts, args.batch_size, args.concurrency, args.max_completion_length) < 1:
        p.error("want at least 1 for --max_attempts, --batch_size, --concurrency and --max_completion_length")
    if args.price_per_million and min(args.price_per_million) < 0:
        p.error("--price_per_million: want prices of 0 or more")
    if args.teacher == "knowledge" and not args.knowledge:
        raise SystemExit(
            "--teacher knowledge: no --knowledge; want a JSON table of the entities; give its path or another --teacher"
        )
    if args.teacher != "knowledge" and not args.teacher_model:
        raise SystemExit(f"--teacher {args.teacher}: no --teacher_model; want the name of a Qwen-VL; give one")
    if args.teacher != "knowledge" and args.temperature <= 0 and args.max_attempts > 1:
        raise SystemExit(
            f"--temperature {args.temperature}: the attempts would be equal; want more than 0; "
            "raise it or set --max_attempts 1"
        )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and (args.teacher != "hf" or args.device_map):
        raise SystemExit(
            f"torchrun with {world_size} processes: only --teacher hf without --device_map is data-parallel; "
            "run plain python"
        )
    if args.device_map and not importlib.util.find_spec("accelerate"):
        raise SystemExit(
            "--device_map auto: no accelerate in this environment; want it to place the layers; pip install accelerate"
        )
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


# ---- chains ----
def box_text(bbox_1000):
    return "({},{}),({},{})".format(*bbox_1000)


def knowledge_cot(row, knowledge):
    """(chain, None) from the table alone, or (None, reason). Reading order: upper half first, each from the left."""
    entities, target = row["entities"], row["entities"][row["target"]]
    for e in entities:
        if e["entity"] not in knowledge:
            return None, f"unknown entity: {e['entity']}"
    looks = {e["entity"]: knowledge[e["entity"]]["description"] for e in entities}
    if len(set(looks.values())) < len(entities):
        return None, "same description: two entities of the image cannot be told apart"
    name, look, box = target["entity"], looks[target["entity"]], box_text(target["bbox_1000"])
    ordered = sorted(
        entities, key=lambda e: (e["bbox_1000"][1] + e["bbox_1000"][3] > 1000, e["bbox_1000"][0] + e["bbox_1000"][2])
    )
    listed = "\n".join(f"{looks[e['entity']]} {box_text(e['bbox_1000'])}" for e in ordered)
    chain = (
        f"Planning: {name} is {look}.\nVisual Analysis:\n{listed}\n"
        f"Comparison: of the objects above, only {look} fits {name}.\nConclusion: {name} is {look} {box}."
    )
    return chain, None


def teacher_prompt(row):
    """What a model is asked: all labels and boxes, the target's box, the paper's three notes, four headed parts."""
    target = row["entities"][row["target"]]
    listed = ", ".join(f"{e['entity']} {box_text(e['bbox_1000'])}" for e in row["entities"])
    return TEACHER_PROMPT.format(listed=listed, target=target["entity"], box=box_text(target["bbox_1000"]))


def validate(text, row, min_words=30, max_words=800):
    """None for a chain that may be learned from, else the reason against it (what comes before a colon is counted)."""
    target, words = row["entities"][row["target"]], len(text.split())
    if not text:
        return "empty"
    if found := MARKUP.search(text):
        return f"markup: {found[0]}"
    heads = list(HEADINGS.finditer(text))
    if [h[1].lower() for h in heads] != ["planning", "visual analysis", "comparison", "conclusion"] or heads[
        0
    ].start() > 0:
        return "headings: " + ", ".join(h[1] for h in heads)
    if not min_words <= words <= max_words:
        return f"{'too short' if words < min_words else 'too long'}: {words} words"
    if not re.search(rf"(?<!\w){re.escape(target['entity'])}(?!\w)", text, re.I):
        return "target not named"
    for pattern in BETRAYALS:
        if found := pattern.search(text):
            return f"betrays that the answer was given: {found[0]}"
    last = [m for m in BOXES.finditer(text) if m.start() > heads[3].start()][-1:]
    if not last:
        return "no final box"
    bbox_1000 = parse_bbox(last[0][0], mode="direct")
    if bbox_1000 is None or box_iou(bbox_1000, target["bbox_1000"]) < 0.9:
        return f"wrong final box: {last[0][0]}"
    return None


def judge(response, cut, row, args):
    """(chain, reason) of a teacher's answer; `cut` says that it ran into --max_completion_length."""
    text = re.sub("[\u0085\u2028\u2029]", "\n", INLINE.sub("", response)).strip()  # line ends that JSON does not escape
    return text, "cut off: ran into --max_completion_length" if cut else validate(
        text, row, args.min_words, args.max_words
    )


# ---- data ----
def read_composites(path):
    """Rows of synth_data.py. Errors: one line for a missing column or image, a doubled id, a bad target or box."""
    path = Path(path)
    rows, seen = read_jsonl(path, ("id", "images", "entities", "target", "question", "answer")), set()
    for r in rows:
        where = f"{path} ({short(r['id'])})"
        if not is_id(r["id"]):
            raise SystemExit(f"{where}: no id; want a line of text or an integer; mend the row")
        if r["id"] in seen:
            raise SystemExit(f"{where}: id occurs twice; want unique ids; rerun synth_data.py")
        entities, target = r["entities"] if isinstance(r["entities"], list) else [], r["target"]
        if type(target) is not int or not 0 <= target < len(entities):
            raise SystemExit(
                f"{where}: target {short(target)} of {len(entities)} entities; want an index; rerun synth_data.py"
            )
        for e in entities:
            e = e if isinstance(e, dict) else {}
            check_name(e.get("entity"), where)
            box = e.get("bbox_1000")
            if not is_box(box, most=1000) or any(type(v) is not int for v in box):
                raise SystemExit(
                    f"{where}: bbox_1000 {short(box)} of {e['entity'][:80]}; "
                    "want integers 0 <= x1 < x2 <= 1000, 0 <= y1 < y2 <= 1000; mend the row"
                )
        for key in ("question", "answer"):
            check_text(r[key], where, key)
        images = r["images"] if isinstance(r["images"], list) else []
        if len(images) != 1 or not os.path.isfile(image_path(path.parent, images[0], where)):
            raise SystemExit(
                f"{where}: images {short(r['images'])}; want one file that is there, relative to {path.parent}; "
                "check the path"
            )
        seen.add(r["id"])
    return rows


def read_knowledge(path):
    """{name: {"category", "description"}}. Errors: one line for a missing file, broken JSON or no sound description."""
    want = 'want {"Name": {"category", "description"}}; mend the file or check the path'
    if not os.path.isfile(path):
        raise SystemExit(f"--knowledge {path}: no such file; {want}")
    table = read_json(path, '{"Name": {"category", "description"}}')
    if not isinstance(table, dict):
        raise SystemExit(f"--knowledge {path}: a {type(table).__name__}; {want}")
    for name, entry in table.items():
        text = entry.get("description") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip() or "\n" in text:
            raise SystemExit(f"--knowledge {path}: {short(name)} has no description in one line; {want}")
        check_name(name, f"--knowledge {path}")
        check_name(text, f"--knowledge {path}: {short(name)}", "description")
    return table


def image_url(path, max_pixels):
    """data: URL of an image: the file's own bytes, or a PNG where it exceeds the cap, is turned or no plain RGB."""
    image, data = load_image(str(path)), Path(path).read_bytes()
    kind = {b"\x89PN": "png", b"\xff\xd8\xff": "jpeg"}.get(data[:3])
    plain = open_image(data)[0].mode == "RGB" and open_image(data)[1] is None  # else a server may see it otherwise
    if kind is None or not plain or image.width * image.height > max_pixels:
        scale, buffer = min(1.0, (max_pixels / (image.width * image.height)) ** 0.5), io.BytesIO()
        image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale)))).save(buffer, "PNG")
        kind, data = "png", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ---- teachers: rows in, save(records) of rows that are finished ----
def record_of(row, cot, reason, attempt, response, usage):
    """One line of a part file. A row is finished with its chain, or with the reason why it has none."""
    out = {"id": row["id"], "cot": None if reason else cot, "reason": reason, "attempt": attempt}
    return out | ({"response": response} if reason else {}) | usage


def load_teacher(args, device):
    """Model, tokenizer and image processor of a local Qwen-VL. Errors: one line for what is no model or no Qwen-VL."""
    from transformers import AutoModelForImageTextToText

    where = f"--teacher_model {args.teacher_model}"
    kind = model_config(args.teacher_model, "--teacher_model").model_type
    if not re.fullmatch(r"qwen\w*_vl\w*", kind):
        raise SystemExit(f"{where}: model_type {short(kind)}; want a Qwen-VL; or serve it and use --teacher openai")
    tokenizer, image_processor = load_processors(args.teacher_model, args.max_pixels)
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(args.dtype, args.dtype)
    model = AutoModelForImageTextToText.from_pretrained(
        args.teacher_model, dtype=getattr(torch, dtype), device_map=args.device_map
    )
    return model if args.device_map else model.to(device), tokenizer, image_processor


@torch.no_grad()
def generate_responses(model, tokenizer, prompts, seeds, max_completion_length, temperature):
    """One (ids, finished) per prompt, decoded together by the model's own forward pass, so that any Qwen-VL can teach.

    A response is a function of the weights, the prompt and its seed.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    stop, banned = (torch.tensor(i, device=device) for i in (stop_ids(tokenizer), vision_ids(tokenizer)))
    length = max(len(p["prompt_ids"]) for p in prompts)
    ids = torch.full((len(prompts), length), tokenizer.pad_token_id, device=device)
    mask = torch.zeros_like(ids)
    for row, p in enumerate(prompts):  # padded on the left, so that all responses start in the same column
        ids[row, length - len(p["prompt_ids"]) :] = torch.tensor(p["prompt_ids"], device=device)
        mask[row, length - len(p["prompt_ids"]) :] = 1
    pixels, grid = (torch.cat([p[k] for p in prompts]).to(device) for k in ("pixel_values", "image_grid_thw"))
    is_image = (ids == model.config.image_token_id).int()
    rope, _ = model.model.get_rope_index(ids, is_image, image_grid_thw=grid, attention_mask=mask)  # (3, B, P)
    position = torch.cat([(mask.cumsum(-1) - 1).clamp(min=0)[None], rope])
    new = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": is_image}
    cache = DynamicCache(config=model.config.get_text_config())
    draws = torch.from_numpy(np.stack([uniforms(s, max_completion_length) for s in seeds])).to(device)
    tokens = torch.full((len(prompts), max_completion_length), -1, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for t in range(max_completion_length):
        logits = model(
            **new, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        token, _ = choose(logits, draws[:, t], banned, temperature)
        tokens[:, t] = torch.where(done, -1, token)
        done |= torch.isin(token, stop)
        if done.all():
            break
        new, mask = {"input_ids": token[:, None]}, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position[:, :, -1:] + 1
    return [([x for x in row if x >= 0], end) for row, end in zip(tokens.tolist(), done.tolist(), strict=True)]


def ask_local(rows, args, save, device):
    """Batches stay full: a row whose chain was bad joins the queue again with its next attempt."""
    if not rows:
        return
    model, tokenizer, image_processor = load_teacher(args, device)
    root, queue, ahead = Path(args.samples).parent, deque((row, 1, {}) for row in rows), {}
    with ThreadPoolExecutor(4) as pool:  # reads the images of the next batch while this one is decoded

        def prompt_of(row):
            image, text = str(root / row["images"][0]), teacher_prompt(row)
            style = BOX_STYLES["qwen2_vl"]  # whatever the family: the prompt itself says how boxes are written
            return ahead.pop(row["id"], None) or pool.submit(
                chat_inputs, tokenizer, image_processor, image, text, style
            )

        while queue:
            batch = [queue.popleft() for _ in range(min(args.batch_size, len(queue)))]
            waiting = [prompt_of(row) for row, _, _ in batch]
            ahead |= {row["id"]: prompt_of(row) for row, _, _ in list(queue)[: args.batch_size]}
            prompts = [w.result() for w in waiting]
            seeds = [f"{args.seed}:{attempt}:{row['id']}" for row, attempt, _ in batch]
            responses = generate_responses(
                model, tokenizer, prompts, seeds, args.max_completion_length, args.temperature
            )
            finished = []
            for (row, attempt, usage), prompt, (ids, ended) in zip(batch, prompts, responses, strict=True):
                spent = {
                    "requests": 1,
                    "retries": 0,
                    "prompt_tokens": len(prompt["prompt_ids"]),
                    "completion_tokens": len(ids),
                }
                usage = {k: v + usage.get(k, 0) for k, v in spent.items()}
                response = completion_text(tokenizer, ids)
                cot, reason = judge(response, not ended, row, args)
                if reason and attempt < args.max_attempts:
                    queue.append((row, attempt + 1, usage))
                else:
                    finished.append(record_of(row, cot, reason, attempt, response, usage))
            save(finished)


def read_reply(body):
    """(text, cut, token counts) of a chat completion. Errors: ValueError for other bytes, such as a proxy's page."""
    try:
        reply = json.loads(body)
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text = choice["message"].get("content") or ""
        text = text.encode("utf-8", "replace").decode()  # JSON can hold half a character
        tokens = {key: usage[key] for key in TOKENS if type(usage.get(key)) is int and 0 <= usage[key] < 1e9}
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"no chat completion: {body[:100]!r}") from None
    return text, choice.get("finish_reason") == "length", tokens


async def ask_served(rows, args, save, answered):
    """`answered`: the server has answered in an earlier run, so that it is the row's fault if it refuses one.

    Errors: ConnectionError with one line for a server that stays away or refuses us; what is saved stays saved.
    """
    import openai

    root, todo, answers = Path(args.samples).parent, iter(rows), Counter(all=int(answered))

    async def request(url, row, attempt, usage):
        """(response, cut), or (error text, None) for a row that the server refuses or always fails on."""
        prompt = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": teacher_prompt(row)}]
        seed = int(hashlib.sha256(f"{args.seed}:{attempt}:{row['id']}".encode()).hexdigest()[:7], 16)
        before = answers["all"]
        for retry in range(args.max_retries + 1):
            usage["requests"] += 1
            status, code, after = None, None, ""
            try:
                # a limit on the whole: the client's own is one on every read, and a server may drip
                reply = await asyncio.wait_for(
                    client.chat.completions.with_raw_response.create(
                        model=args.teacher_model, messages=[{"role": "user", "content": prompt}], seed=seed,
                        temperature=args.temperature, max_tokens=args.max_completion_length),
                    args.request_timeout)  # fmt: skip
                response, cut, tokens = read_reply(reply.http_response.content)
                answers["all"] += 1
                usage.update({key: usage.get(key, 0) + count for key, count in tokens.items()})
                return response, cut
            except asyncio.TimeoutError:
                error = f"no answer in {args.request_timeout:g} s"
            except openai.APIStatusError as e:
                status, code = e.status_code, e.code
                # the body itself: the client's text has none where a server does not put it in OpenAI's form
                error = f"{type(e).__name__} ({status}: {' '.join(e.response.text.split())[:300]})"
                after = e.response.headers.get("retry-after", "")
            except (openai.APIConnectionError, ValueError) as e:  # ValueError: a body that is no chat completion
                error = f"{type(e).__name__} ({e})"
            refused = status in (400, 413, 422)  # too long, or against the content rules
            if refused and answers["all"]:
                return error[:500], None
            if not (refused or status is None or status in (408, 409, 425, 429) or status >= 500):
                raise ConnectionError(
                    f"{args.base_url}: {error}; want --base_url, --teacher_model and OPENAI_API_KEY "
                    "that fit the server; mend them, then the same command continues"
                )
            if code == "insufficient_quota" or retry == args.max_retries:
                if answers["all"] > before and status != 429:
                    return error[:500], None  # the server works for others: it is this row
                raise ConnectionError(
                    f"{args.base_url}: {retry + 1} requests failed, last {error}; "
                    "want a server that answers; start or mend it, then the same command continues"
                )
            # A refusal waits too: without an answer to any row, it may be that this server takes no such requests.
            wait = min(60.0, 2.0**retry) * random.uniform(0.5, 1.5)  # jitter: or all workers come back at once
            if re.fullmatch(r"\d+(\.\d+)?", after):  # not less than the growing wait: a busy server may say 0 for long
                wait = max(wait, min(600.0, float(after)))
            usage["retries"] += 1
            if retry == 2:
                print(f"{args.base_url}: {error}; still trying", file=sys.stderr)
            await asyncio.sleep(wait)

    async def worker():
        for row in todo:  # all workers draw from one iterator
            usage = {"requests": 0, "retries": 0}
            # in a thread: shrinking a large image takes longer than the others should wait
            url = await asyncio.to_thread(image_url, root / row["images"][0], args.max_pixels)
            for attempt in range(1, args.max_attempts + 1):
                response, cut = await request(url, row, attempt, usage)
                cot, reason = ("", "refused by the server") if cut is None else judge(response, cut, row, args)
                if reason is None or cut is None:
                    break
            save([record_of(row, cot, reason, attempt, response, usage)])

    key = os.environ.get("OPENAI_API_KEY") or "EMPTY"
    async with openai.AsyncOpenAI(base_url=args.base_url, api_key=key, timeout=None, max_retries=0) as client:
        workers = [asyncio.ensure_future(worker()) for _ in range(min(args.concurrency, len(rows)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for w in workers:
                w.cancel()


def merge(rows, args, out, seconds):
    """Writes samples.jsonl, rejected.jsonl and stats.json from the part files, in the input's order. Returns stats."""
    parts = sorted(out.glob("part-*.jsonl"))
    records = {r["id"]: r for part in parts for r in complete_lines(part, **RECORD)}
    kept, rejected = [], []
    for row in rows:
        r = records[row["id"]]
        if r["reason"] or not r["cot"]:
            rejected.append(
                {
                    "id": r["id"],
                    "reason": r["reason"] or "empty",
                    "attempts": r["attempt"],
                    "response": r.get("response"),
                }
            )
            continue
        completion = f"<think>\n{r['cot']}\n</think> <answer>{row['answer']}</answer>"
        messages = [{"role": "user", "content": "<image>" + row["question"] + R1_SUFFIX},
                    {"role": "assistant", "content": completion}]  # fmt: skip
        images = [
            Path(os.path.relpath(Path(args.samples).parent.resolve() / i, out.resolve())).as_posix()
            for i in row["images"]
        ]
        teacher = {
            "backend": args.teacher,
            "model": args.teacher_model or Path(args.knowledge).name,
            "attempt": r["attempt"],
        }
        kept.append(row | {"images": images, "messages": messages, "cot": r["cot"], "teacher": teacher})
    reasons = Counter(r["reason"].split(":")[0] for r in rejected)
    stats = {"rows": len(rows), "kept": len(kept), "rejected": dict(reasons.most_common()),
             "attempts": dict(Counter(r["teacher"]["attempt"] for r in kept)),
             "words": round(sum(len(r["cot"].split()) for r in kept) / max(1, len(kept)), 1)}  # fmt: skip
    for key in ("requests", "retries", *TOKENS):
        told = [records[row["id"]][key] for row in rows if isinstance(records[row["id"]].get(key), int)]
        stats[key] = sum(told) if told else None
    stats["cost"] = None
    if args.price_per_million and None not in (counts := [stats[key] for key in TOKENS]):
        stats["cost"] = round(sum(n * p / 1e6 for n, p in zip(counts, args.price_per_million, strict=True)), 4)
    for name, lines in (("rejected.jsonl", rejected), ("samples.jsonl", kept)):
        if lines or name != "samples.jsonl":  # the next stage wants rows or no file
            write_text(out / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_text(
        out / "stats.json", json.dumps(stats | {"seconds": round(seconds, 1)}, indent=1, ensure_ascii=False) + "\n"
    )
    return stats


def main():
    args, start = parse_args(), time.time()
    out, rows = Path(args.out), read_composites(args.samples)
    if (out / "samples.jsonl").resolve() == Path(args.samples).resolve():
        raise SystemExit(
            f"--out {out}: holds --samples itself; want another folder, or the input would be overwritten; give one"
        )
    table = read_knowledge(args.knowledge) if args.teacher == "knowledge" else None
    # the same path may hold another file
    inputs = {"samples_sha": args.samples} | ({"knowledge_sha": args.knowledge} if table else {})
    inputs = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for name, path in inputs.items()}
    rank, world_size, device = init_dist(timeout_minutes=7 * 24 * 60) if args.teacher == "hf" else (0, 1, None)
    done = None
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        free = (
            "samples",
            "knowledge",
            "out",
            "batch_size",
            "device_map",
            "base_url",
            "concurrency",
            "request_timeout",
            "max_retries",
            "price_per_million",
            "log_every_s",
        )
        same_config(out, argparse.Namespace(**vars(args), **inputs), ignore=free)
        done = {r["id"] for part in sorted(out.glob("part-*.jsonl")) for r in complete_lines(part, **RECORD)}
    done = broadcast(done) if world_size > 1 else done
    todo = [row for row in rows if row["id"] not in done]
    print0(
        f"gen_cot: {len(rows)} rows, {len(rows) - len(todo)} of them done before, "
        f"teacher {args.teacher}, {world_size} processes"
    )

    mine = todo[rank::world_size]
    began = printed = time.time()
    tally, share = Counter(), f" (rank 0 of {world_size})" if world_size > 1 else ""
    with open(out / f"part-{rank:05d}.jsonl", "a", encoding="utf-8") as f:

        def save(records):
            nonlocal printed
            for record in records:
                # ASCII: an answer may hold U+2028, at which str.splitlines cuts a line
                f.write(json.dumps(record) + "\n")
                tally.update(rows=1, kept=int(not record["reason"]), **{key: record.get(key, 0) for key in TOKENS})
            f.flush()
            now = time.time()
            if records and now - printed >= args.log_every_s:
                printed, n = now, tally["rows"]
                rate = n / max(1e-9, now - began)
                print0(
                    f"rows {n}/{len(mine)}{share} | kept {tally['kept']} | rejected {n - tally['kept']} | "
                    f"{rate:.2f} rows/s | tokens {tally[TOKENS[0]]} prompt, {tally[TOKENS[1]]} completion | "
                    f"eta {(len(mine) - n) / rate / 60:.1f} min"
                )

        if args.teacher == "knowledge":
            for row in mine:
                save([record_of(row, *knowledge_cot(row, table), 1, "", {})])
        elif args.teacher == "hf":
            ask_local(mine, args, save, device)
        elif mine:
            try:
                asyncio.run(ask_served(mine, args, save, answered=len(todo) < len(rows)))
            except ConnectionError as e:
                raise SystemExit(str(e)) from None
    if args.teacher == "hf":
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0:
        leave()
    stats = merge(rows, args, out, time.time() - start)
    reasons = ", ".join(f"{n} {reason}" for reason, n in stats["rejected"].items())
    spent = ""
    if args.teacher != "knowledge":
        told = {key: "unknown" if stats[key] is None else stats[key] for key in (*TOKENS, "cost")}
        spent = f"tokens {told['prompt_tokens']} prompt, {told['completion_tokens']} completion, "
        spent += f"cost {told['cost']}, " if args.price_per_million else ""
    if not stats["kept"]:
        raise SystemExit(
            f"{out}: 0 of {len(rows)} chains kept ({spent}{reasons}); want a teacher that keeps to the format; "
            f"read {out / 'rejected.jsonl'}, then use another teacher and --out"
        )
    print(f"gen_cot: {stats['kept']} kept, {len(rows) - stats['kept']} rejected{f' ({reasons})' if reasons else ''}, "
          f"{spent}{time.time() - start:.1f} s -> {out / 'samples.jsonl'}")  # fmt: skip
    leave()


if __name__ == "__main__":
    run(main)
