"""Stage 1: supervised fine-tuning of a Qwen-VL on chains of thought (CoT-SFT) or on bare answers (the SFT baseline).

reads   --data: samples.jsonl of gen_cot.py / filter.py, or LLaMA-Factory ShareGPT JSON (messages, images)
writes  --output_dir: metrics.jsonl, curves.png, config.json, checkpoint-N/ (resumable), final/ (Hugging Face model)

  smoke    python train_sft.py --model tests/toy/base --data runs/toy/filter_cot/samples.jsonl --output_dir runs/sft
  1 GPU    python train_sft.py --model Qwen/Qwen2-VL-2B-Instruct --data cot.jsonl --output_dir runs/sft
  8 GPUs   torchrun --nproc_per_node 8 train_sft.py --model Qwen/Qwen2-VL-7B-Instruct --data ... --output_dir runs/sft
  before   python train_sft.py --model Qwen/Qwen2-VL-7B-Instruct --plan 8xh100   (memory, and time at the least)

Paper defaults (arXiv 2503.12797, LLaMA-Factory recipe): language model trained, vision tower and merger frozen, AdamW
5e-6, cosine with 10 % warm-up, 16 sequences a step, one epoch, 4096 tokens, bf16. Differences: an over-long row is
skipped and counted, never cut; the loss is the mean over all assistant tokens of the step, on all ranks.
Sequences of a pass are packed into one row without padding (PackedRow); `lm_head` runs where there is a label alone.
Shapes: T tokens of a packed row, N of them supervised, P prompt tokens, V vocabulary.
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
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--model", required=True, help="Hugging Face folder or name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    p.add_argument("--data", help="samples.jsonl, or ShareGPT .json")
    p.add_argument("--output_dir", help="run folder; an interrupted run is continued")
    p.add_argument(
        "--target",
        default="cot",
        choices=["cot", "direct"],
        help="learn the messages as they are, or question -> answer alone",
    )
    # data
    p.add_argument("--max_pixels", type=int, default=401408, help="pixel cap of an image (paper: 401,408)")
    p.add_argument(
        "--max_length", type=int, default=4096, help="tokens; a longer row is skipped and counted (paper cutoff: 4096)"
    )
    p.add_argument("--num_workers", type=int, default=2, help="threads that read images ahead, per rank")
    # optimisation
    p.add_argument("--learning_rate", type=float, default=5e-6, help="peak (paper: 5e-6)")
    p.add_argument("--lr_scheduler", default="cosine", choices=["cosine", "linear", "constant"])
    p.add_argument("--warmup_ratio", type=float, default=0.1, help="share of the steps (paper: 0.1)")
    p.add_argument("--weight_decay", type=float, default=0.0)
    p.add_argument("--max_grad_norm", type=float, default=1.0, help="0 means no clipping")
    p.add_argument("--num_epochs", type=float, default=1.0, help="passes over the data (paper: 1)")
    p.add_argument("--max_steps", type=int, help="stop after this many steps instead (default: from --num_epochs)")
    p.add_argument("--train_batch_size", type=int, default=16, help="sequences per step over all ranks (paper: 16)")
    p.add_argument("--tokens_per_row", type=int, default=4096, help="sequences are packed up to it into a forward pass")
    p.add_argument(
        "--freeze_vision",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="vision tower and merger (paper: frozen)",
    )
    p.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False)
    # engine
    p.add_argument("--deepspeed", default="ds_config.json", help="DeepSpeed engine settings")
    p.add_argument(
        "--zero_stage", type=int, choices=[1, 2, 3], help="3 shards the weights too (default: the stage of --deepspeed)"
    )
    p.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="auto: bfloat16 on CUDA, float32 on CPU",
    )
    p.add_argument("--timeout_minutes", type=float, default=60, help="of a collective operation (NCCL, gloo)")
    p.add_argument(
        "--dry_run_memory", action="store_true", help="run the largest row once, print the peak memory, and stop"
    )
    # run
    p.add_argument("--logging_steps", type=int, default=1)
    p.add_argument("--wandb", metavar="PROJECT", help="send the metrics to Weights & Biases too")
    p.add_argument("--tensorboard", action="store_true", help="write them to OUTPUT_DIR/tensorboard too")
    p.add_argument("--save_steps", type=int, default=200, help="0 means no checkpoint before the end")
    p.add_argument("--save_total_limit", type=int, default=2, help="checkpoints kept")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--plan",
        nargs="?",
        const="8xh100",
        metavar="NxGPU",
        help="only print what a run needs of memory and, at least, of time; reads nothing but the model's config",
    )
    args = p.parse_args(argv)
    if not args.plan and (missing := [f"--{name}" for name in ("data", "output_dir") if not getattr(args, name)]):
        p.error(f"the following arguments are required: {', '.join(missing)}")
    if args.max_steps is not None and args.max_steps < 1:
        p.error("want --max_steps >= 1")
    check_trackers(args)
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


# >>> shared:dist (source)
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


# >>> shared:run_log (source)
def truncate_log(path, step):
    """Drops the rows after `step`, so that a resumed run leaves one clean curve."""
    if os.path.exists(path):
        rows = [r for r in complete_lines(path, step=int) if r["step"] <= step]
        write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def append_row(path, row):
    """One JSON object a line, on disk when this returns. NaN and infinity are errors, not strings."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def heartbeat(out, rank, step, phase):
    """One line as a phase begins, in a file per rank: `tail -qn1 heartbeat-*` says where each is, or hangs."""
    with open(Path(out) / f"heartbeat-{rank:05d}.log", "a", encoding="utf-8") as f:
        f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank} step {step} {phase}\n")


def check_trackers(args):
    """Stops with one line if a tracker is asked for that is not installed."""
    for flag, package in (("wandb", "wandb"), ("tensorboard", "tensorboard")):
        if getattr(args, flag) and not importlib.util.find_spec(package):
            raise SystemExit(f"--{flag}: no {package} in this environment; want it to log there; pip install {package}")


def start_trackers(args, config, first_step):
    """(send, finish): functions that pass a row of metrics on to the trackers, and that close them. An interrupted run
    goes on in the same place.
    """
    sends, ends, out = [], [], Path(args.output_dir)
    if args.wandb:
        import wandb

        name = hashlib.md5(str(out.resolve()).encode()).hexdigest()[:12]
        run = wandb.init(project=args.wandb, name=out.name, id=name, resume="allow", dir=str(out), config=config)
        sends.append(lambda row: run.log(row, step=row["step"]))
        ends.append(run.finish)
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)
        sends.append(lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items() if k != "step"])
        ends.append(writer.close)
    return lambda row: [send(row) for send in sends], lambda: [end() for end in ends]


def draw_curves(metrics_path, png_path, keys):
    """One small chart per metric over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = complete_lines(metrics_path, step=int)
    points = {k: [(r["step"], r[k]) for r in rows if isinstance(r.get(k), (int, float))] for k in keys}
    keys = [k for k in keys if points[k]]
    if not keys:
        return
    columns = min(3, len(keys))
    figure, axes = plt.subplots(
        math.ceil(len(keys) / columns), columns, figsize=(4 * columns, 2.6 * math.ceil(len(keys) / columns))
    )
    axes = list(getattr(axes, "flat", [axes]))
    for ax, key in zip(axes, keys, strict=False):
        ax.plot(*zip(*points[key], strict=True), linewidth=1.2)
        ax.set_title(key, fontsize=9)
        ax.grid(alpha=0.3)
    for ax in axes[len(keys) :]:
        ax.axis("off")
    figure.tight_layout()
    figure.savefig(png_path, dpi=110)
    plt.close(figure)


def run_config(args, derived):
    """What a run was made with: flags, derived sizes, engine settings, versions, commit."""
    import deepspeed
    import transformers

    def git(*command):
        return subprocess.run(
            ["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()

    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
    }
    return {"args": vars(args), "derived": derived, "versions": versions, "commit": git("rev-parse", "HEAD") or None,
            "dirty": bool(git("status", "--porcelain"))}  # fmt: skip


# <<< shared:run_log


# >>> shared:chat_inputs (source)
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


# >>> shared:load_model (source)
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


# >>> shared:packed (source)
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


# >>> shared:engine (source)
class CompletionLogProbs(torch.nn.Module):
    """The model as a trainer needs it: packed row in, fp32 log-probs (N,) of its completion tokens out.

    `lm_head` runs on the N positions alone, in chunks of `chunk` logits that the backward pass computes again; the
    log-probs are those of the sampler: at its temperature, without its `banned` ids.
    """

    def __init__(self, model, banned=(), temperature=1.0, chunk=2**26):
        super().__init__()
        self.model, self.banned, self.temperature, self.chunk = model, list(banned), temperature, chunk

    def score(self, hidden, targets):
        logits = self.model.lm_head(hidden).float()
        if self.banned:
            logits = logits.index_fill(-1, torch.tensor(self.banned, device=logits.device), float("-inf"))
        if self.temperature != 1:
            logits = logits / self.temperature
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    def forward(self, row):
        hidden = hidden_states(self.model, row)[row.at]
        size = max(1, self.chunk // self.model.config.get_text_config().vocab_size)
        if len(hidden) <= size:
            return self.score(hidden, row.targets)
        parts = zip(hidden.split(size), row.targets.split(size), strict=True)
        return torch.cat([checkpoint(self.score, h, t, use_reentrant=False) for h, t in parts])


def engine_settings(path):
    """Settings of a DeepSpeed config: engine matters only. Errors: one line; the rest of it DeepSpeed checks."""
    want = '{"zero_optimization": {"stage": 1, 2 or 3, ...}, ...}'
    settings = read_json(path, want)
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    numbers = ("reduce_bucket_size", "stage3_max_live_parameters")
    sound = isinstance(zero, dict) and type(zero.get("stage")) is int and 0 <= zero["stage"] <= 3
    if not sound or not all(type(zero.get(key, 0)) in (int, float) and 0 <= zero.get(key, 0) < 1e15 for key in numbers):
        raise SystemExit(f"{path}: zero_optimization {short(zero)}; want {want}; mend the file")
    ours = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
            "optimizer", "scheduler")  # fmt: skip
    if clash := [key for key in ours if key in settings]:
        raise SystemExit(
            f"{path}: has {clash[0]!r}; want engine settings only; remove it and use the flags of the script"
        )
    return settings


def start_engine(scorer, args):
    """DeepSpeed engine around a CompletionLogProbs, with the settings of --deepspeed and of the flags."""
    import deepspeed

    config = engine_settings(args.deepspeed)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ at the first start on a CPU
    if args.zero_stage:
        config["zero_optimization"]["stage"] = args.zero_stage
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the loop says which backward pass is the last, see `backward`
        "gradient_clipping": args.max_grad_norm,
        "bf16": {"enabled": scorer.model.dtype == torch.bfloat16},
    }
    trained = [p for p in scorer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    return deepspeed.initialize(model=scorer, optimizer=optimizer, config=config)[0]


def run_banner(engine, device):
    """What a run computes with: engine, attention, precision, ranks."""
    model, world_size = engine.module.model, dist.get_world_size()
    masters = ", fp32 master weights" if model.dtype == torch.bfloat16 else ""
    kernel, vision = attention_kernel(device.type, model.dtype), model.config.vision_config._attn_implementation
    return (
        f"DeepSpeed ZeRO-{engine.zero_optimization_stage()} | {model.config.model_type}, {model.dtype}{masters} | "
        f"attention: {kernel} (decoder), {vision} (vision tower) | {world_size} ranks on {device.type}"
    )


def memory_line(rank_peaks, device):
    """'name 1.2 GiB, ... of 79.1 GiB' of the fullest rank. Shapes: {name: peak bytes}; all ranks call it."""
    peaks = torch.tensor(list(rank_peaks.values()), dtype=torch.float64, device=device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    if device.type == "cuda":
        total, where = torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)
    else:
        total, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine, all ranks together"
    parts = ", ".join(f"{name} {peak / 2**30:.2f} GiB" for name, peak in zip(rank_peaks, peaks.tolist(), strict=True))
    return f"peak of the fullest rank: {parts}; {where} has {total / 2**30:.2f} GiB"


def peak_bytes(device):
    """Most memory that this process has held so far: on CUDA the allocator's since the last call, else resident."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def out_of_memory_line(phase):
    """Says in one line that the device is too small."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise SystemExit(
            f"{phase}: {str(e).splitlines()[0]}; want it to fit; try --gradient_checkpointing, a lower "
            "--tokens_per_row, --zero_stage 3 or more GPUs"
        ) from None


def fill_rows(lengths, budget, device):
    """Indices packed first-fit, longest first, into rows of at most `budget` tokens; at least one index per row.

    Every rank gets equally many rows, empty ones behind, because every rank must take part in every reduction of
    gradients.
    """
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fit = next((r for r, left in enumerate(room) if lengths[i] <= left), len(rows))
        if fit == len(rows):
            rows.append([])
            room.append(budget)
        rows[fit].append(i)
        room[fit] -= lengths[i]
    most = torch.tensor(max(1, len(rows)), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return rows + [[]] * (int(most) - len(rows))


def backward(engine, loss, last):
    """Adds the gradients of `loss`, this rank's share of a sum over all ranks; `last` before the update."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)  # DeepSpeed averages over the ranks


def train_flops(model, row):
    """FLOPs of forward and backward over a packed row; a frozen or already computed vision tower counts its forward
    pass or nothing; recomputation is not counted. Formulas: see `plan`.
    """
    sizes, trained = model_sizes(model), next(model.model.visual.parameters()).requires_grad
    flops = 3 * decoder_flops(sizes, row.input_ids.numel(), attended_pairs(row.spans), len(row.at))
    images = row.image_grid_thw.tolist() if row.image_features is None else []
    return flops + sum(vision_flops(sizes, rows, columns, trained) for _, rows, columns in images)


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product here and now: what `mfu` is a share of."""
    n, seconds = 8192 if device.type == "cuda" else 1024, {}
    a = torch.randn(n, n, dtype=dtype, device=device)
    for i in range(5):
        with timed(seconds, i):
            a @ a
    return 2 * n**3 / min(seconds.values())


def check_step(engine, loss, step, ids, out):
    """Stops the run after a step whose loss or gradient was not finite; DeepSpeed has left the weights as they were.

    `ids`: the samples of this rank, which go to bad_step-RANK.json.
    """
    if math.isfinite(loss) and not engine.optimizer.overflow:
        return
    path = Path(out) / f"bad_step-{engine.global_rank:05d}.json"
    write_text(path, json.dumps({"step": step, "loss": str(loss), "ids": ids}, ensure_ascii=False) + "\n")
    gradient = "not finite" if engine.optimizer.overflow else "finite"
    raise SystemExit(
        f"step {step}: loss {loss}, gradient {gradient}; want finite numbers; the step was not applied; its samples: "
        f"{path}; lower --learning_rate or drop them; the same command goes on from the newest checkpoint"
    )


def ask_to_stop():
    """A list that is no longer empty once SIGTERM has come, as before a pre-emption: the loop then saves and stops."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    return asked


def learning_rate_at(step, total_steps, args):
    """Rate of update `step` (1..total_steps): linear warm-up, then cosine, linear or constant."""
    warmup = math.ceil(args.warmup_ratio * total_steps)
    if step <= warmup:
        return args.learning_rate * step / warmup
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return args.learning_rate * shape[args.lr_scheduler]


@contextmanager
def writing(folder):
    """Says in one line that a checkpoint could not be written, and leaves the ones before it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:  # torch.save says RuntimeError where the disk is full
        free = shutil.disk_usage(Path(folder).parent).free / 2**30
        raise SystemExit(
            f"{folder}: not written ({str(e).splitlines()[0]}); {free:.1f} GiB are free there; want room for it; the "
            "checkpoints before it are whole: make room, then the same command goes on from there"
        ) from None


def export_model(engine, tokenizer, image_processor, folder):
    """Hugging Face folder (safetensors, tokenizer, image processor), written whole or not at all. All ranks call it."""
    sharded = engine.zero_optimization_stage() == 3
    weights = engine._zero3_consolidated_16bit_state_dict() if sharded else engine.module.state_dict()
    if engine.global_rank == 0:
        part = Path(f"{folder}.tmp")
        shutil.rmtree(part, ignore_errors=True)
        with writing(part):
            engine.module.model.save_pretrained(
                part, state_dict={name.removeprefix("model."): w for name, w in weights.items()}
            )
            tokenizer.save_pretrained(part)
            image_processor.save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    dist.barrier()


def save_checkpoint(engine, tokenizer, image_processor, output_dir, state, keep):
    """checkpoint-{step}/: engine state, state.json, Hugging Face export; renamed last, so it is complete or absent."""
    folder = Path(output_dir) / f"checkpoint-{state['step']}"
    part = Path(f"{folder}.tmp")
    if engine.global_rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    with writing(part):
        engine.save_checkpoint(str(part), tag="engine")
    export_model(engine, tokenizer, image_processor, part / "model")
    if engine.global_rank == 0:
        files = {str(f.relative_to(part)): f.stat().st_size for f in sorted(part.rglob("*")) if f.is_file()}
        state = state | {"world_size": dist.get_world_size(), "files": files}
        write_text(part / "state.json", json.dumps(state) + "\n")
        os.replace(part, folder)
        for old in sorted(Path(output_dir).glob("checkpoint-*[0-9]"), key=lambda c: int(c.name.split("-")[1]))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def newest_checkpoint(output_dir):
    """(folder, its state.json) of the newest checkpoint of a run, or (None, {"step": 0, "num_tokens": 0}).

    Each of its files must be as long as when it was written: a disk or a copy that gave up may have cut one.
    """
    found = [c for c in Path(output_dir).glob("checkpoint-*/state.json") if not c.parent.name.endswith(".tmp")]
    if not found:
        return None, {"step": 0, "num_tokens": 0}
    newest = max(found, key=lambda c: int(c.parent.name.split("-")[1]))
    folder, advice = newest.parent, "remove this checkpoint, then the same command goes on from the one before"
    try:
        state = json.loads(newest.read_bytes())
        files = {folder / name: size for name, size in state["files"].items()}
        numbers = [*files.values(), *(state[key] for key in ("step", "num_tokens", "world_size"))]
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError("no numbers")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise SystemExit(f"{newest}: cut or damaged; want it as it was written; {advice}") from None
    for file, size in files.items():
        found = os.path.getsize(file) if os.path.isfile(file) else None
        if found != size:
            length = "no file" if found is None else f"{found:,} bytes"
            raise SystemExit(
                f"{short(str(file), 250)[1:-1]}: {length}; want {size:,} bytes, as it was written; {advice}"
            )
    return folder, state


def resume(engine, output_dir):
    """Loads the newest checkpoint of this run. Returns its state.json, or {"step": 0, "num_tokens": 0}.

    With another number of ranks than it was saved by, DeepSpeed's universal form of it is made first.
    """
    folder, state = newest_checkpoint(output_dir)
    if folder is None:
        return state
    tag = "engine"
    if state["world_size"] != dist.get_world_size():
        print0(f"{folder} is of {state['world_size']} ranks, now {dist.get_world_size()}: making its universal form")
        tag = "universal"
        if engine.global_rank == 0:
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            shutil.rmtree(folder / tag, ignore_errors=True)
            made = subprocess.run(
                [*command, "--input_folder", str(folder / "engine"), "--output_folder", str(folder / tag)],
                capture_output=True, text=True,
            )  # fmt: skip
            if made.returncode:
                raise SystemExit(
                    f"{folder / tag}: not made ({(made.stderr.strip().splitlines() or ['killed'])[-1]}); want room for "
                    "a second copy of the checkpoint, or the number of ranks that saved it"
                )
        dist.barrier()
        engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(str(folder), tag=tag)
    print0(f"resuming from {folder}")
    return state


@lru_cache(maxsize=2)
def shuffled(count, seed, epoch):
    return random.Random(f"{seed}:{epoch}").sample(range(count), count)


def epoch_order(index, count, seed):
    """Sample number `index` of an endless stream of seeded shuffles of range(count)."""
    return shuffled(count, seed, index // count)[index % count]


# <<< shared:engine


# >>> shared:plan (source)
# Peaks of one GPU (SXM) from NVIDIA's datasheets "A100 80GB", "H100", "H200": dense bf16 FLOP/s (half of the figure
# with sparsity), bytes/s and bytes of HBM, bytes/s of NVLink one way (half of the figure for both ways), and bytes/s
# of the network as in "DGX A100" (200 Gb/s a GPU), "DGX H100" and "DGX H200" (400 Gb/s a GPU).
GPUS = {
    "a100": dict(flops=312e12, hbm=2.039e12, bytes=80e9, nvlink=300e9, network=25e9),
    "h100": dict(flops=989e12, hbm=3.35e12, bytes=80e9, nvlink=450e9, network=50e9),
    "h200": dict(flops=989e12, hbm=4.8e12, bytes=141e9, nvlink=450e9, network=50e9),
}
PLAN_TEXT, PLAN_COMPLETION = 128, 512  # tokens that no flag tells: a prompt without its image; an answer in SFT


def model_sizes(model):
    """Widths, and numbers of weights that multiply an input; from the modules, because each family's config has its
    own names. Qwen2.5-VL attends in windows in most blocks of its tower, Qwen3-VL has a merger for some of them.
    """
    text, visual, vision = model.model.language_model, model.model.visual, model.config.vision_config
    depth, config = len(visual.blocks), model.config.get_text_config()

    def weights(module, name=""):
        matrices = (torch.nn.Linear, torch.nn.Conv3d)
        found = [m.weight for n, m in module.named_modules() if isinstance(m, matrices) and name in n]
        return sum(math.prod(getattr(w, "ds_shape", w.shape)) for w in found)  # ZeRO-3 leaves a rank empty weights

    return SimpleNamespace(
        layers=len(text.layers), hidden=config.hidden_size, vocab=config.vocab_size, body=weights(text.layers),
        query=text.layers[0].self_attn.q_proj.out_features, key=text.layers[0].self_attn.k_proj.out_features,
        mlp=text.layers[0].mlp.gate_proj.out_features, width=visual.blocks[0].attn.proj.in_features, depth=depth,
        full=len(getattr(vision, "fullatt_block_indexes", range(depth))), merge=vision.spatial_merge_size,
        window=getattr(vision, "window_size", 0) // vision.patch_size, patch=vision.patch_size,
        patch_embed=weights(visual.patch_embed), blocks=weights(visual.blocks), mergers=weights(visual, "merger"),
    )  # fmt: skip


def attended_pairs(spans):
    """How many (token, token it sees) a packed row has."""
    pairs = sum(n * (n + 1) // 2 for _, n, _ in spans)
    return pairs + sum(c * n + c * (c + 1) // 2 for _, n, completions in spans for c in completions)


def decoder_flops(sizes, tokens, pairs, scored):
    """Forward pass: 2 per weight and token, 4 per pair and width (scores and sum); `scored` tokens through lm_head."""
    flops = 2 * (sizes.body * tokens + sizes.vocab * sizes.hidden * scored)
    return flops + 4 * sizes.layers * sizes.query * pairs


def vision_flops(sizes, rows, columns, trained=False):
    """Forward pass over an image of rows x columns patches, or forward and backward if trained."""

    def squares(n):  # sum of the squares of the windows' sides
        return n // sizes.window * sizes.window**2 + (n % sizes.window) ** 2

    patches, windowed = rows * columns, sizes.depth - sizes.full
    pairs = sizes.full * patches**2 + (windowed * squares(rows) * squares(columns) if windowed else 0)
    flops = 2 * patches * (sizes.blocks + sizes.mergers / sizes.merge**2) + 4 * sizes.width * pairs
    first = 2 * patches * sizes.patch_embed  # pixels need no gradient
    return 3 * flops + 2 * first if trained else flops + first


def saved_bytes(call, *known):
    """Bytes that call() keeps for the backward pass, without the `known` tensors."""
    kept, known = {}, {t.untyped_storage()._cdata for t in known}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for key, storage in kept.items() if key not in known)


def plan_attention(module, query, key, value, attention_mask, scaling=None, row=None, **kwargs):
    """Attention for `activation_bytes`: keeps what the CUDA kernels keep."""
    if row is not None:
        return attend_varlen(query, key, value, scaling, row, "varlen_attn"), None
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0].transpose(1, 2), None


def activation_bytes(model, span, patches, checkpointing):
    """What one prompt with its image and completions keeps for the backward pass: bytes of the decoder, bytes of the
    vision tower, bytes that checkpointing computes again at a time. One layer of each kind is run on meta tensors.
    """
    text, visual, vision = model.model.language_model, model.model.visual, model.config.vision_config
    sizes, tokens, weights = model_sizes(model), span[1] + sum(span[2]), list(model.parameters())
    empty = partial(torch.empty, device="meta", dtype=model.dtype)
    x, patch = (empty(*n, requires_grad=True) for n in ((1, tokens, sizes.hidden), (patches, sizes.width)))
    rope, row = text.rotary_emb(x, empty(3, 1, tokens)), SimpleNamespace(spans=[span], input_ids=x, varlen=None)
    angles = empty(patches, sizes.width // vision.num_heads, dtype=torch.float32)
    pixels = empty(patches, vision.in_channels * vision.temporal_patch_size * sizes.patch**2)
    layer = saved_bytes(
        lambda: text.layers[0](x, position_embeddings=rope, attention_mask=None, row=row), *weights, *rope
    )
    block = saved_bytes(
        lambda: visual.blocks[0](patch, cu_seqlens=torch.tensor([0, patches]), position_embeddings=(angles, angles)),
        *weights, angles,
    )  # fmt: skip
    mergers = 1 + len(getattr(visual, "deepstack_merger_list", ()))
    ends = mergers * saved_bytes(lambda: visual.merger(patch), *weights)
    ends += saved_bytes(lambda: visual.patch_embed(pixels), *weights)
    decoder, tower = (x.nbytes, patch.nbytes) if checkpointing else (layer, block)
    decoder = sizes.layers * decoder + saved_bytes(lambda: text.norm(x), *weights)
    return decoder, sizes.depth * tower + ends, max(layer, block) if checkpointing else 0


def plan_shape(sizes, args, num_gpus):
    """What a rank computes in a step, if completions have full length and rows are as long as the flags let them be."""
    G, C = getattr(args, "num_generations", 1), getattr(args, "max_completion_length", PLAN_COMPLETION)
    tokens = args.max_pixels // (sizes.patch * sizes.merge) ** 2  # of an image
    high = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    P, group, prompts = tokens + PLAN_TEXT, tokens + PLAN_TEXT + G * C, -(-args.train_batch_size // num_gpus)
    longest = getattr(args, "max_length", group)  # SFT lets longer rows in than the usual
    row = min(prompts * longest, max(args.tokens_per_row, longest))
    return SimpleNamespace(
        G=G, C=C, P=P, group=group, image=tokens, span=(0, P, [C] * G) if G > 1 else (0, P + C, []),
        patches=(high * sizes.merge, tokens // high * sizes.merge),
        prompts=prompts,  # of a rank, which takes at least one
        passes=-(-prompts // max(1, args.tokens_per_row // group)),
        row=row,
        images=min(prompts, -(-row // group)),  # in that row
        scored=row * G * C // group,  # tokens in that row that lm_head sees
        chunk=max(1, 2**26 // sizes.vocab),  # of them CompletionLogProbs takes at once
        together=min(prompts, max(1, getattr(args, "rollout_batch_size", 0) // G)),  # prompts that are decoded at once
        kv=4 * sizes.layers * sizes.key,  # bytes of a token's key and value
    )  # fmt: skip


def plan_memory(model, args, num_gpus, stage, checkpointing):
    """Bytes on a rank in bf16: {phase: {item: bytes}}; a phase needs "always" and its own items.

    What DeepSpeed holds is read from its stage_1_and_2.py and stage3.py.
    """
    s, zero = model_sizes(model), engine_settings(args.deepspeed)["zero_optimization"]
    shape, weights = plan_shape(s, args, num_gpus), sum(p.numel() for p in model.parameters())
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    share, held, start = sum(trained) / num_gpus, [0] * num_gpus, 0
    for size in trained:  # ZeRO-2: who owns a slice of a tensor keeps its whole gradient
        for rank in range(int(start / share), int((start + size - 1) / share) + 1):
            held[rank] += size
        start += size
    decoder, tower, again = activation_bytes(model, shape.span, math.prod(shape.patches), checkpointing)
    rows = shape.together * shape.G
    reduced = {
        "gradients": 2 * share if stage == 3 else 2 * max(held) * min(shape.passes, 2),
        "buckets": 2 * zero.get("reduce_bucket_size", 5e8) * (2 if stage == 2 and zero.get("overlap_comm") else 1),
    }
    memory = {
        "always": {
            "weights": 2 * weights / (num_gpus if stage == 3 else 1),
            "optimizer, fp32": 12 * share,
            "reference model": 2 * weights * (getattr(args, "beta", 0) > 0),
            **(reduced if stage == 3 else {}),
        },
        "rollout": {
            "weights gathered": 2 * weights * (stage == 3),
            "KV cache": (shape.prompts * shape.P + rows * shape.C) * shape.kv,
            "KV cache, old copy": rows * ((shape.C - 1) // 256 * 256) * shape.kv,  # while `widen` makes the new one
            "logits, softmax": (shape.prompts * shape.G + 3 * rows) * s.vocab * 4,
            "prefill's widest layer": shape.together * shape.P * 3 * s.mlp * 2,
        },
        "train": {
            **(reduced if stage == 2 else {}),
            "layers gathered": 2 * min(weights, zero.get("stage3_max_live_parameters", 1e9)) * (stage == 3),
            "activations, decoder": decoder * shape.row / shape.group,
            "activations, vision": tower * shape.images * (not args.freeze_vision),
            "lm_head, or a layer": max(  # 16 bytes per logit of a chunk, forward and backward: measured on a CPU
                16 * s.vocab * min(shape.scored, shape.chunk) + 4 * s.vocab * s.hidden, again * shape.row / shape.group
            ),
        },
        "update": {"gradients": 2 * share * (stage == 2), "in fp32, temporary": 8 * share},
    }
    return memory if shape.G > 1 else {phase: memory[phase] for phase in memory if phase != "rollout"}


def plan_seconds(model, args, card, num_gpus, stage, checkpointing):
    """{phase: seconds} of a step at the GPU's peaks: lower bounds for full-length completions."""
    s, trained = model_sizes(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape, weights, frozen = (
        plan_shape(s, args, num_gpus),
        sum(p.numel() for p in model.parameters()),
        args.freeze_vision,
    )
    prompts, rows, updates = shape.prompts, shape.together * shape.G, getattr(args, "num_iterations", 1)
    scored, rollouts = prompts * shape.G * shape.C, -(-prompts // shape.together) if shape.G > 1 else 0
    look, pairs = prompts * vision_flops(s, *shape.patches), prompts * attended_pairs([shape.span])
    forward = decoder_flops(s, prompts * shape.group, pairs, scored)
    head = 2 * s.vocab * s.hidden * scored
    train = 3 * forward + (not frozen) * prompts * vision_flops(s, *shape.patches, trained=True)
    train += look * (frozen and shape.G == 1)  # GRPO keeps what the frozen tower said in the rollout
    train += (forward - head + look * (not frozen)) * checkpointing + head * (shape.scored > shape.chunk)
    train += (forward + look * (not frozen)) * (getattr(args, "beta", 0) > 0)
    read = 2 * (s.body + s.vocab * s.hidden) + (shape.together * shape.P + rows * shape.C / 2) * shape.kv
    token = max(read / card["hbm"], decoder_flops(s, rows, rows * (shape.P + shape.C / 2), rows) / card["flops"])
    prefill = decoder_flops(s, prompts * shape.P, prompts * attended_pairs([(0, shape.P, [])]), prompts)
    link = card["nvlink"] if num_gpus <= 8 else min(card["nvlink"], 8 * card["network"])  # 8 GPUs a node
    # bytes: gradients are reduced after every pass; weights are gathered after the update, or twice a pass by ZeRO-3
    moved = updates * 2 * (trained * (shape.passes + 1) if stage == 2 else (trained + 2 * weights) * shape.passes)
    moved += rollouts * 2 * 2 * weights * (stage == 3)
    rollout = {"vision": look / card["flops"], "prefill": prefill / card["flops"], "decode": rollouts * shape.C * token}
    return (rollout if rollouts else {}) | {
        "train": updates * train / card["flops"],
        "optimizer": updates * 30 * trained / num_gpus / card["hbm"],  # 16 bytes read, 14 written
        "communication": moved * (num_gpus - 1) / num_gpus / link,
    }


def plan(model, args, gpu, num_gpus, stage, checkpointing):
    """Peak bytes of a rank and least seconds of a step, with what they are made of."""
    model.model.visual.requires_grad_(not args.freeze_vision)
    memory = plan_memory(model, args, num_gpus, stage, checkpointing)
    seconds = plan_seconds(model, args, GPUS[gpu], num_gpus, stage, checkpointing)
    always, *phases = (sum(items.values()) for items in memory.values())
    step = sum(seconds.values()) - min(seconds["train"], seconds["communication"])  # at best the two overlap
    return SimpleNamespace(memory=memory, seconds=seconds, peak=always + max(phases), step=step)


def meta_model(path):
    """Any Qwen-VL without weights, from its config."""
    from transformers import AttentionInterface, AutoModelForImageTextToText

    config = model_config(path)
    AttentionInterface.register("plan", plan_attention)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation({"text_config": "plan", "vision_config": "plan"})
    return model


def print_plan(args):
    """What --plan prints: memory of a GPU and least time of a step, for ZeRO-2 and 3, then with one thing changed."""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+)", args.plan)
    if not found or found[2] not in GPUS:
        raise SystemExit(f"--plan {args.plan}: no such GPU; want one of {', '.join(GPUS)}, as in 8xh100")
    model, gpu, num_gpus, limit = meta_model(args.model), found[2], int(found[1] or 8), GPUS[found[2]]["bytes"]
    stage = args.zero_stage or engine_settings(args.deepspeed)["zero_optimization"]["stage"]
    if stage < 2 or args.dtype == "float32":
        raise SystemExit(f"--plan: ZeRO-{stage}, --dtype {args.dtype}; it knows ZeRO-2 and 3 in bfloat16; change them")
    shape = plan_shape(model_sizes(model), args, num_gpus)

    def at(stage=stage, checkpointing=args.gradient_checkpointing, gpus=num_gpus, **changes):
        return plan(model, argparse.Namespace(**vars(args) | changes), gpu, gpus, stage, checkpointing)

    def line(name, values, digits=None):
        print(f"{name:35}" + "".join(f"{v:>12}" if digits is None else f"{v:12.{digits}f}" for v in values))

    def verdict(peak):  # a tenth is left to what is not counted
        return "fits" if peak < 0.9 * limit else "tight" if peak < limit else "too large"

    kinds = {"ZeRO-2": (2, False), "+ checkp.": (2, True), "ZeRO-3": (3, False), " + checkp.": (3, True)}
    plans, now = [at(*kind) for kind in kinds.values()], at()
    print(
        f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, bf16, {num_gpus} x {gpu}\n"
        f"{shape.prompts} prompts a GPU: {shape.image} tokens of image, {PLAN_TEXT} of text, {shape.G} x {shape.C} of "
        f"completion; rows of up to {shape.row} tokens\nGB are those of such rows, without the CUDA context, NCCL and "
        "fragmentation; seconds are lower bounds at the peaks of the GPU\n"
    )
    line("", kinds)
    for phase in now.memory:
        for item in dict.fromkeys(item for p in plans for item in p.memory[phase]):
            if any(values := [p.memory[phase].get(item, 0) / 1e9 for p in plans]):
                line(f"{phase:8} {item:22}  GB", values, 2)
    line("peak                             GB", [p.peak / 1e9 for p in plans], 1)
    line(f"of {limit / 1e9:.0f} GB", [verdict(p.peak) for p in plans])
    for phase in now.seconds:
        line(f"{phase:33} s", [p.seconds[phase] for p in plans], 3)
    line("step, at least                    s", [p.step for p in plans], 3)
    steps = args.max_steps or args.num_epochs * 1000 / (shape.prompts * num_gpus)
    print(
        f"\nas started (ZeRO-{stage}, checkpointing {'on' if args.gradient_checkpointing else 'off'}): "
        f"{now.peak / 1e9:.1f} GB, {verdict(now.peak)}; {steps:.0f} steps{'' if args.max_steps else ' per 1,000 rows'}"
        f", at least {steps * now.step / 60:.1f} min"
    )
    helps = {"--gradient_checkpointing": {"checkpointing": True}, "--freeze_vision": {"freeze_vision": True},
             "--tokens_per_row 1024": {"tokens_per_row": 1024}, "--zero_stage 3": {"stage": 3},
             "both --zero_stage 3 and checkpointing": {"stage": 3, "checkpointing": True},
             f"{2 * num_gpus} GPUs": {"gpus": 2 * num_gpus}}  # fmt: skip
    if verdict(now.peak) != "fits":
        print("GB with " + ", ".join(f"{name}: {at(**change).peak / 1e9:.1f}" for name, change in helps.items()))
    varied = {"num_generations": (4, 8, 16, 32), "max_completion_length": (256, 512, 1024, 2048),
              "train_batch_size": (16, 64, 256, 1024), "gpus": (8, 16, 64, 256, 1024)}  # fmt: skip
    for name, values in varied.items():
        if name == "gpus" or hasattr(args, name):
            others = [at(**{name: value}) for value in values]
            print()
            line(name if name == "gpus" else f"--{name}", values)
            line("peak                             GB", [p.peak / 1e9 for p in others], 1)
            line("step, at least                    s", [p.step for p in others], 3)
    line("prompts (a GPU takes at least one)", [max(1, -(-args.train_batch_size // n)) * n for n in varied["gpus"]])


# <<< shared:plan


# ---- data ----
def wanted(sample, target):
    """(user text, assistant text) of a row: its messages as they are, or the question and the bare answer."""
    if target == "cot":
        return sample["question"] + sample["prompt_suffix"], sample["completion"]
    return sample["question"], sample["answer"]


def row_length(sample, tokenizer, image_processor, target, style):
    """Tokens of a row, from the image's header alone."""
    question, completion = wanted(sample, target)
    completion = model_text(completion, style, resized_size(image_processor, sample["image"]))
    prompt = prompt_length(tokenizer, image_processor, sample["image"], question, style)
    return prompt + len(tokenizer.encode(completion, add_special_tokens=False)) + 1


def encode_row(sample, tokenizer, image_processor, target, style):
    """What `pack` takes: the inputs of the prompt, and the assistant's tokens with the <|im_end|> that closes them."""
    question, completion = wanted(sample, target)
    inputs = chat_inputs(tokenizer, image_processor, sample["image"], question, style)
    completion = model_text(completion, style, inputs["grid"])
    return inputs, [tokenizer.encode(completion + "<|im_end|>", add_special_tokens=False)]


def dry_run_sft(engine, item, args, device):
    """One forward and backward pass of the largest row, and an update that changes nothing; prints the peak."""
    inputs, [completion] = item
    length = len(inputs["prompt_ids"]) + len(completion)
    with out_of_memory_line("training"):
        row = pack([item] * max(1, args.tokens_per_row // length), device)
        engine.train()
        backward(engine, engine(row).sum() * 0, last=True)
        engine.step()
    line = memory_line({"training": peak_bytes(device)}, device)
    print0(f"train_sft: row of {row.input_ids.numel()} tokens, the longest sample has {length}: {line}")
    dist.destroy_process_group()
    leave()


def main():
    args, start = parse_args(), time.time()
    if args.plan:
        return print_plan(args)
    engine_settings(args.deepspeed)
    samples = read_samples(args.data)
    if missing := [s["id"] for s in samples if not wanted(s, args.target)[1]]:
        raise SystemExit(
            f"{args.data} ({missing[0]}): nothing to learn from; want an assistant message; run gen_cot.py"
        )
    style = check_model(args.model)
    rank, world_size, device = init_dist(args.timeout_minutes)
    out = Path(args.output_dir)
    if rank == 0 and not args.dry_run_memory:  # which leaves nothing behind, so that its flags may change
        out.mkdir(parents=True, exist_ok=True)
        same_config(
            out,
            args,
            ignore=(
                "output_dir",
                "logging_steps",
                "save_steps",
                "save_total_limit",
                "timeout_minutes",
                "num_workers",
                "wandb",
                "tensorboard",
            ),
        )
        newest_checkpoint(out)  # a damaged one is named before weights are loaded
    if args.train_batch_size % world_size:
        raise SystemExit(
            f"--train_batch_size {args.train_batch_size}: not a multiple of {world_size} ranks; change one of them"
        )
    torch.manual_seed(args.seed)

    tokenizer, image_processor = load_processors(args.model, args.max_pixels)
    lengths = broadcast(
        [row_length(s, tokenizer, image_processor, args.target, style) for s in samples] if rank == 0 else None
    )
    fitting = [(length, s) for s, length in zip(samples, lengths, strict=True) if length <= args.max_length]
    kept = [s for _, s in fitting]
    if not kept:
        raise SystemExit(f"{args.data}: all {len(samples)} rows exceed --max_length {args.max_length}; raise it")
    n = args.train_batch_size
    total = args.max_steps * n if args.max_steps else max(1, int(args.num_epochs * len(kept)))
    total_steps = math.ceil(total / n)  # the last step takes what is left

    model = load_model(args.model, args.dtype, device)
    if args.freeze_vision:
        model.model.visual.requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = start_engine(CompletionLogProbs(model), args)
    print0(f"train_sft: {run_banner(engine, device)}")
    if args.dry_run_memory:
        longest = max(fitting, key=lambda pair: pair[0])[1]
        dry_run_sft(engine, encode_row(longest, tokenizer, image_processor, args.target, style), args, device)
        return
    if rank == 0:
        derived = {
            "world_size": world_size,
            "total_steps": total_steps,
            "rows": len(kept),
            "matmul_flops": matmul_rate(device, model.dtype),
        }
        config = run_config(args, derived)
        write_text(out / "run.json", json.dumps(config, indent=1) + "\n")
    state = resume(engine, out)
    first, num_tokens = state["step"], state["num_tokens"]
    if rank == 0:
        truncate_log(out / "metrics.jsonl", first)
        send, finish = start_trackers(args, config, first + 1)
    print0(
        f"train_sft: {len(kept)} rows ({len(samples) - len(kept)} over {args.max_length} tokens skipped), "
        f"{total_steps} steps of {n}"
    )

    order = [
        epoch_order(i, len(kept), args.seed)
        for s in range(first, total_steps)
        for i in range(s * n + rank, (s + 1) * n, world_size)
    ]
    encoded = prefetch(
        lambda i: encode_row(kept[i], tokenizer, image_processor, args.target, style), order, args.num_workers, 2 * n
    )
    since, seconds, row_tokens, flops = time.time(), {}, 0, 0.0
    asked_to_stop = ask_to_stop()
    engine.train()
    for step in range(first + 1, total_steps + 1):
        rate = learning_rate_at(step, total_steps, args)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        heartbeat(out, rank, step, "data")
        with timed(seconds, "data"):
            items = list(itertools.islice(encoded, n // world_size))
            counted = items[: len(range((step - 1) * n + rank, min(step * n, total), world_size))]
            (tokens,) = all_sum([sum(len(ids) for _, [ids] in counted)], device)
            filled = fill_rows([len(x["prompt_ids"]) + len(ids) for x, [ids] in counted], args.tokens_per_row, device)
        total_loss = 0.0
        heartbeat(out, rank, step, "train")
        for i, members in enumerate(filled):
            with timed(seconds, "train"):
                row = pack([items[m] for m in members or [0]], device)
                # all ranks together: the mean over the tokens of the whole step; a row too many counts nothing
                loss = -engine(row).sum() / tokens * bool(members)
                total_loss += loss.item()
                backward(engine, loss, last=i == len(filled) - 1)
            if members:
                row_tokens, flops = row_tokens + row.input_ids.numel(), flops + train_flops(model, row)
        heartbeat(out, rank, step, "optimizer")
        with timed(seconds, "optimizer"):
            engine.step()
        total_loss, stop = all_sum([total_loss, len(asked_to_stop)], device)
        batch = order[(step - 1 - first) * (n // world_size) : (step - first) * (n // world_size)]
        check_step(engine, total_loss, step, [kept[i]["id"] for i in batch], out)
        num_tokens += int(tokens)
        if rank == 0 and step % args.logging_steps == 0:
            elapsed = time.time() - since
            row = {
                "step": step,
                "loss": total_loss,
                "grad_norm": float(engine.get_global_grad_norm() or 0.0),
                "learning_rate": rate,
                "num_tokens": num_tokens,
                "epoch": min(step * n, total) / len(kept),
                "step_time": elapsed / args.logging_steps,
                **{f"time/{phase}": s / args.logging_steps for phase, s in seconds.items()},
                "tokens_per_second": row_tokens / elapsed,
                "mfu": flops / elapsed / derived["matmul_flops"],
            }
            append_row(out / "metrics.jsonl", row)
            send(row)
            eta = (total_steps - step) * (time.time() - start) / max(1, step - first)
            print0(
                f"step {step:05d}/{total_steps:05d} | loss {total_loss:.4f} | gnorm {row['grad_norm']:.2f} | "
                f"lr {rate:.1e} | {row['step_time']:.2f}s | {row['tokens_per_second']:.0f} tok/s/rank | "
                f"mfu {row['mfu']:.2f} | eta {eta / 60:.1f} min"
            )
            since, seconds, row_tokens, flops = time.time(), {}, 0, 0.0
        if step < total_steps and (stop or args.save_steps and step % args.save_steps == 0):
            heartbeat(out, rank, step, "checkpoint")
            save_checkpoint(
                engine, tokenizer, image_processor, out, {"step": step, "num_tokens": num_tokens}, args.save_total_limit
            )
            if stop:
                raise SystemExit(f"SIGTERM: saved after step {step}; the same command goes on from there")
    export_model(engine, tokenizer, image_processor, out / "final")
    if rank == 0:
        finish()
        draw_curves(out / "metrics.jsonl", out / "curves.png", ["loss", "grad_norm", "learning_rate"])
    print0(f"train_sft: {time.time() - start:.0f} s -> {out / 'final'}, {out / 'curves.png'}")
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    run(main)
