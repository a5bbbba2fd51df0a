"""Stage 2: GRPO from scratch on a Qwen-VL that thinks before it points, with an IoU reward.

reads   --data: samples.jsonl of filter.py (or any rows with boxes), or the released GRPO parquet
writes  --output_dir: metrics.jsonl, samples.jsonl, curves.png, config.json, checkpoint-N/ (resumable), final/

  smoke    python train_grpo.py --model runs/toy/train_cot_sft/final --data runs/toy/filter_grpo/samples.jsonl ...
  1 GPU    python train_grpo.py --model runs/cot_sft/final --data runs/grpo_data/samples.jsonl --output_dir ...
  8 GPUs   torchrun --nproc_per_node 8 train_grpo.py --model runs/cot_sft/final --data ... --output_dir ...
  before   python train_grpo.py --model runs/cot_sft/final --plan 8xh100   (memory, and time at the least)

One step: 1 draw prompts  2 roll out G completions each, all prompts of the step together  3 rewards by name
4 advantages within the group  5 clipped loss (+ beta x k3 KL)  6 update.
Paper defaults (arXiv 2503.12797 and its released trainer): 16 prompts a step, G = 4, temperature 1, lr 1e-6 linear, 512
new tokens, IoU reward above 0.8, advantage (r - mean) / (std + 1e-4), loss averaged per sequence. Differences: beta is
0 (0.04 there), so that no reference model is needed; both halves of the format reward can be paid; a box counts only in
the strict grammar below; the sampled ids are the trained ids, scored with the sampler's temperature and banned tokens.
--knowledge mastery.json makes it knowledge-aware (KARL, v3 of the paper): entities that the model knows less are pulled
up more and punished less. --knowledge_form reward is as published, advantage is what it means to do; see the README.
Nothing is computed twice: a prompt and its image go through the model once in the rollout and once in the loss, however
many completions they have (PackedRow); groups without an advantage are not trained on.
Shapes: B prompts, G completions per prompt, R = B x G rows of the rollout, P prompt tokens, C completion tokens,
T tokens of a packed row, N completion tokens in it, V vocabulary.
"""

import argparse
import copy
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
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--model", required=True, help="the stage-1 model, a Hugging Face folder or name")
    p.add_argument("--data", help="samples.jsonl, or .parquet with image, problem, solution")
    p.add_argument("--output_dir", help="run folder; an interrupted run is continued")
    # rollout
    p.add_argument("--num_generations", type=int, default=4, help="G, completions per prompt (paper: 4)")
    p.add_argument("--max_completion_length", type=int, default=512, help="tokens (paper: 512)")
    p.add_argument(
        "--temperature", type=float, default=1.0, help="of the sampler, and of the trained log-probs (paper: 1)"
    )
    p.add_argument("--rollout_batch_size", type=int, default=256, help="sequences decoded at once on one rank")
    p.add_argument("--max_pixels", type=int, default=401408, help="pixel cap of an image (paper: 401,408)")
    p.add_argument(
        "--max_prompt_length", type=int, default=4096, help="tokens; a longer prompt stops the run, it is never cut"
    )
    p.add_argument("--num_workers", type=int, default=2, help="threads that read images ahead, per rank")
    # rewards
    p.add_argument(
        "--reward_funcs",
        nargs="+",
        default=["iou", "format"],
        choices=sorted(REWARDS),
        help="summed (paper: iou + format)",
    )
    p.add_argument("--reward_weights", nargs="+", type=float, help="one per reward (default: 1)")
    p.add_argument(
        "--iou_threshold", type=float, default=0.8, help="iou pays IoU, binary pays 1, above this (released code: 0.8)"
    )
    p.add_argument("--knowledge", help="mastery.json of filter.py, or KARL's own: how well each entity is known")
    p.add_argument(
        "--knowledge_form",
        choices=["advantage", "reward"],
        help="what the knowledge scales (default: advantage; reward, as KARL published it with --iou_threshold 0.65, "
        "nearly cancels when the group is normalised)",
    )
    # GRPO
    p.add_argument(
        "--scale_rewards",
        default="group",
        choices=["group", "none", "loo"],
        help="advantage: / group std, mean only, leave-one-out",
    )
    p.add_argument(
        "--loss_type",
        default="grpo",
        choices=["grpo", "dapo", "dr_grpo"],
        help="mean per sequence (paper), per token, constant",
    )
    p.add_argument("--beta", type=float, default=0.0, help="weight of the KL; 0 loads no reference model (paper: 0.04)")
    p.add_argument("--epsilon", type=float, default=0.2, help="ratio clip below 1, and above without --epsilon_high")
    p.add_argument("--epsilon_high", type=float, help="ratio clip above 1 (DAPO: 0.28)")
    p.add_argument(
        "--num_iterations",
        type=int,
        default=1,
        help="updates per rollout; above 1 the sampler's log-probs are the old ones",
    )
    # optimisation
    p.add_argument("--learning_rate", type=float, default=1e-6, help="peak (paper: 1e-6)")
    p.add_argument("--lr_scheduler", default="linear", choices=["cosine", "linear", "constant"])
    p.add_argument("--warmup_ratio", type=float, default=0.0, help="share of the updates")
    p.add_argument("--weight_decay", type=float, default=0.0)
    p.add_argument("--max_grad_norm", type=float, default=1.0, help="0 means no clipping")
    p.add_argument("--num_epochs", type=float, default=2.0, help="passes over the data (paper: 2)")
    p.add_argument("--max_steps", type=int, help="stop after this many steps instead (default: from --num_epochs)")
    p.add_argument("--train_batch_size", type=int, default=16, help="prompts per step over all ranks (paper: 16)")
    p.add_argument(
        "--freeze_vision",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="vision tower and merger (paper: trained)",
    )
    p.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False)
    p.add_argument(
        "--tokens_per_row",
        type=int,
        default=8192,
        help="tokens of a forward pass: whole groups, each prompt once, are packed up to it",
    )
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
        "--dry_run_memory", action="store_true", help="run the largest step once, print the peak memory, and stop"
    )
    # run
    p.add_argument("--logging_steps", type=int, default=1)
    p.add_argument("--wandb", metavar="PROJECT", help="send the metrics to Weights & Biases too")
    p.add_argument("--tensorboard", action="store_true", help="write them to OUTPUT_DIR/tensorboard too")
    p.add_argument(
        "--log_completions", type=int, default=2, help="prompts per logging step whose rollouts go to samples.jsonl"
    )
    p.add_argument("--save_steps", type=int, default=100, help="0 means no checkpoint before the end")
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
    if args.num_generations < 2:
        p.error(f"--num_generations {args.num_generations}: a group of one has no advantage; want at least 2")
    if args.temperature <= 0:
        p.error(f"--temperature {args.temperature}: greedy completions of a group are all equal; want more than 0")
    if args.reward_weights and len(args.reward_weights) != len(args.reward_funcs):
        p.error(
            f"--reward_weights: {len(args.reward_weights)} weights for {len(args.reward_funcs)} rewards; want one each"
        )
    args.reward_weights = args.reward_weights or [1.0] * len(args.reward_funcs)
    if args.knowledge_form and not args.knowledge:
        p.error(f"--knowledge_form {args.knowledge_form}: no --knowledge; want a mastery.json of filter.py")
    if args.knowledge_form == "reward" and "iou" not in args.reward_funcs:
        p.error(f"--knowledge_form reward: no iou in --reward_funcs {' '.join(args.reward_funcs)}; it scales no other")
    args.knowledge_form = args.knowledge_form or ("advantage" if args.knowledge else None)
    args.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
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


# >>> shared:run_log (copy of train_sft.py)
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


# >>> shared:engine (copy of train_sft.py)
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


# >>> shared:plan (copy of train_sft.py)
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


# >>> shared:answer_format (source)
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


# >>> shared:levels (source)
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


# ---- rewards: completion text, sample, args -> 0..1 (iou with --knowledge_form reward: -0.6..1) ----
def iou_of(text, sample):
    bbox_1000 = parse_bbox(text, grid=sample["grid"])
    return 0.0 if bbox_1000 is None else box_iou(bbox_1000, sample["bbox_1000"])


def iou_reward(text, sample, args):
    """IoU where it exceeds the threshold, else 0 (the paper's reward).

    --knowledge_form reward: s+ times IoU, at most 1, else s-; no closed answer block: 0, no penalty.
    Source: KARL-verl, verl/utils/reward_score/kvg_reward-knowledge.py.
    """
    iou = iou_of(text, sample)
    _, hit, miss = LEVELS[sample["level"]] if args.knowledge_form == "reward" else (None, 1.0, 0.0)
    if iou > args.iou_threshold:
        return min(1.0, hit * iou)
    return miss if "</answer>" in text.partition("<answer>")[2] else 0.0


def dense_iou_reward(text, sample, args):
    """IoU as it is, for cold starts in which the thresholded reward stays 0."""
    return iou_of(text, sample)


def binary_reward(text, sample, args):
    """1 where the IoU exceeds the threshold, else 0 (ablation)."""
    return float(iou_of(text, sample) > args.iou_threshold)


def format_reward(text, sample, args):
    """0.5 for one <think> block with words, then one <answer> block and nothing else; 0.5 for one box as the family
    writes it.
    """
    form = CANONICAL_JSON if sample["style"].json else CANONICAL
    canonical = parse_bbox(text, grid=sample["grid"]) is not None and form.search(answer_text(text)) is not None
    blocks = THINK_ANSWER.fullmatch(text.strip())
    return 0.5 * (blocks is not None and re.search(r"\w", blocks[1]) is not None) + 0.5 * canonical


REWARDS = {"iou": iou_reward, "dense_iou": dense_iou_reward, "binary": binary_reward, "format": format_reward}


# ---- knowledge ----
# >>> shared:mastery (source)
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


def read_levels(path, samples):
    """Level of the target of every sample.

    Errors: one line for a target that is not in the file: KARL's released code takes such an entity for completely
    incorrect, without a word.
    """
    levels = read_mastery(path)
    if missing := sorted({str(s["entity"]) for s in samples} - set(levels)):
        raise SystemExit(
            f"{path}: {len(missing)} entities of the data are not in it, such as {short(missing[0])}; want all; "
            "measure them with filter.py, or drop their rows"
        )
    return [levels[s["entity"]] for s in samples]


def knowledge_weights(advantages, level):
    """What advantages are multiplied by: s+ where positive, s- over the middle level's where negative, 1 where 0.

    After the group is normalised, so that nothing cancels: 0.65 to 1.4 on what is right, 1.5 to 0 on what is wrong.
    """
    _, hit, miss = LEVELS[level]
    wrong = abs(miss / LEVELS["partially correct"][2])
    return [hit if a > 0 else wrong if a < 0 else 1.0 for a in advantages]


# >>> shared:sampling (source)
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


# >>> shared:rollout (source)
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


# ---- GRPO ----
@dataclass
class Group:
    """One prompt and its G completions: what a step computes on, from rollout to loss."""

    sample: dict
    inputs: dict  # of chat_inputs: prompt_ids, position_ids, pixel_values, image_grid_thw
    completion_ids: list  # G lists of ints
    old_logps: list  # G tensors (C,), from the sampler
    finished: list  # G bools: the stop token came before the length ran out
    texts: list  # G strings
    rewards_per_func: dict = field(default_factory=dict)  # name -> G floats
    rewards: list = field(default_factory=list)  # G floats
    weights: list = field(default_factory=list)  # G floats that the advantages were multiplied by (knowledge), or none
    advantages: list = field(default_factory=list)  # G floats

    @property
    def num_tokens(self):
        """Length of its packed row."""
        return len(self.inputs["prompt_ids"]) + sum(map(len, self.completion_ids))


def group_advantages(rewards, scale_rewards):
    """Advantages within one group. Shapes: G floats -> G floats; all 0 where all rewards are equal.

    `group`: (r - mean) / (std + 1e-4) with the unbiased std, as in the released trainer; `none`: r - mean (Dr. GRPO);
    `loo`: r - mean of the other G - 1 (RLOO).
    """
    r = torch.tensor(rewards, dtype=torch.float64)
    centred = r - r.mean()
    if r.max() == r.min():
        return [0.0] * len(rewards)
    if scale_rewards == "group":
        centred = centred / (r.std() + 1e-4)
    elif scale_rewards == "loo":
        centred = centred * len(r) / (len(r) - 1)
    return centred.tolist()


def token_weights(lengths, args, num_sequences, num_tokens):
    """What each token's loss counts in the loss of the step. Shapes: completion lengths, N their sum -> (N,) fp32.

    `num_sequences` and `num_tokens` count the completions of the whole step on all ranks, skipped groups included, so
    that the shares of all groups add up. Source: GRPO arXiv 2402.03300 eq. 3 (mean per sequence), DAPO 2503.14476
    eq. 8 (mean over tokens), Dr. GRPO 2503.20783 (constant).
    """
    per_sequence = {
        "grpo": [1 / (n * num_sequences) for n in lengths],
        "dapo": [1 / num_tokens for _ in lengths],
        "dr_grpo": [1 / (num_sequences * args.max_completion_length) for _ in lengths],
    }[args.loss_type]
    return torch.tensor(per_sequence).repeat_interleave(torch.tensor(lengths))


def pack_groups(groups, device, freeze_vision):
    """One row of whole groups. A frozen vision tower need not run again: the rollout left its output."""
    features = [g.inputs["image_features"] for g in groups] if freeze_vision else None
    return pack([(g.inputs, g.completion_ids) for g in groups], device, features)


def row_values(groups, args, num_sequences, num_tokens):
    """Sampler's log-probs, advantages and weights of the completion tokens of a row: three tensors (N,)."""
    lengths = [len(ids) for g in groups for ids in g.completion_ids]
    advantages = torch.tensor([a for g in groups for a in g.advantages]).repeat_interleave(torch.tensor(lengths))
    sampled = torch.cat([logps for g in groups for logps in g.old_logps])
    return sampled, advantages, token_weights(lengths, args, num_sequences, num_tokens)


def grpo_loss(logps, old_logps, ref_logps, advantages, weights, args):
    """Share of these tokens in the loss of the step, and what is logged of them: sums over the tokens.

    Shapes: logps, old_logps, ref_logps (or None), advantages, weights (N,).
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(logps)
    if ref_logps is not None:
        log_ratio = (ref_logps - logps).clamp(-20, 20)
        kl = log_ratio.exp() - log_ratio - 1  # k3: unbiased, never negative
        per_token = per_token + args.beta * kl
    was_clipped = ((ratio < 1 - args.epsilon) & (advantages < 0)) | ((ratio > 1 + args.epsilon_high) & (advantages > 0))
    return (per_token * weights).sum(), {"kl": kl.sum().item(), "clip": was_clipped.sum().item()}


def stand_in(group):
    """What a rank computes when it has no row left: one token of a group, with no advantage."""
    return replace(group, completion_ids=[group.completion_ids[0][:1]], old_logps=[group.old_logps[0][:1]],
                   advantages=[0.0])  # fmt: skip


def roll_out_step(model, tokenizer, samples, prompts, step, args, times):
    """The groups of one step on this rank, with rewards and advantages."""
    seeds = [[f"{args.seed}:{step}:{s['id']}:{g}" for g in range(args.num_generations)] for s in samples]
    rolled = rollout(
        model, tokenizer, prompts, seeds, args.max_completion_length, args.temperature, args.rollout_batch_size, times
    )
    groups = []
    with timed(times, "reward"):
        for sample, inputs, completions in zip(samples, prompts, rolled, strict=True):
            sample = sample | {"grid": inputs["grid"], "style": inputs["style"]}
            ids, logps, finished = (list(c) for c in zip(*completions, strict=True))
            group = Group(sample, inputs, ids, logps, finished, [completion_text(tokenizer, i) for i in ids])
            group.rewards_per_func = {
                name: [REWARDS[name](t, sample, args) for t in group.texts] for name in args.reward_funcs
            }
            group.rewards = [sum(w * r for w, r in zip(args.reward_weights, per, strict=True))
                             for per in zip(*group.rewards_per_func.values(), strict=True)]  # fmt: skip
            group.advantages = group_advantages(group.rewards, args.scale_rewards)
            if args.knowledge_form == "advantage":
                group.weights = knowledge_weights(group.advantages, sample["level"])
                group.advantages = [w * a for w, a in zip(group.weights, group.advantages, strict=True)]
            groups.append(group)
    return groups


def step_metrics(groups, args, device):
    """Means over all completions of the step on all ranks (names are TRL's where it has one), and how many they are.

    Shapes: groups of this rank -> {name: float}, number of completions, number of completion tokens.
    """
    texts = [(t, g.sample) for g in groups for t in g.texts]
    values = {
        "reward": [r for g in groups for r in g.rewards],
        **{f"rewards/{f}/mean": [r for g in groups for r in g.rewards_per_func[f]] for f in args.reward_funcs},
        "acc@0.5": [iou_of(text, sample) >= 0.5 for text, sample in texts],
        "parse_rate": [parse_bbox(text, grid=sample["grid"]) is not None for text, sample in texts],
        "completions/mean_length": [len(ids) for g in groups for ids in g.completion_ids],
        "completions/clipped_ratio": [not end for g in groups for end in g.finished],
        "entropy": [-logps.sum().item() for g in groups for logps in g.old_logps],
        **(
            {"knowledge/weight_mean": [w for g in groups for w in g.weights]}
            if args.knowledge_form == "advantage"
            else {}
        ),
    }
    constant = sum(max(g.rewards) == min(g.rewards) for g in groups)
    squares = sum(r * r for r in values["reward"])
    total = all_sum([len(texts), len(groups), constant, squares, *map(sum, values.values())], device)
    n, num_groups, constant, squares = total[:4]
    means = {name: t / n for name, t in zip(values, total[4:], strict=True)}
    means["reward_std"] = max(0.0, squares / n - means["reward"] ** 2) ** 0.5
    means["frac_reward_zero_std"] = constant / num_groups
    tokens = total[4 + list(values).index("completions/mean_length")]
    means["entropy"] *= n / tokens  # per token: the mean of -log p over tokens drawn from p
    return means, int(n), int(tokens)


def likely_troubles(rows):
    """{what is wrong: why it may be}, from the metrics of the steps so far; empty if all looks well."""
    now, last, troubles = rows[-1], rows[-10:], {}
    if len(last) == 10 and max(r["reward"] for r in last) == 0:
        troubles["reward 0 for 10 logged steps"] = (
            "nothing to learn from; train CoT-SFT first, lower --iou_threshold, or add dense_iou to --reward_funcs"
        )
    if now["step"] <= 5 and now["parse_rate"] < 0.05:
        troubles["fewer than 5 % of the completions have a box"] = (
            "is --model the stage-1 model, and --max_completion_length enough for its reasoning? See samples.jsonl"
        )
    if len(last) >= 3 and min(r["completions/clipped_ratio"] for r in last[-3:]) == 1:
        troubles["all completions were cut at --max_completion_length"] = "raise it"
    if now["entropy"] < 0.1 * rows[0]["entropy"]:
        troubles["entropy fell to less than a tenth"] = (
            "completions grow alike; lower --learning_rate, or raise --temperature, --epsilon_high or --beta"
        )
    if now.get("kl", 0) > 1:
        troubles["kl above 1 per token"] = "the policy has left its reference; lower --learning_rate or raise --beta"
    return troubles


def group_row(group, step):
    """A whole group for samples.jsonl."""
    completions = [
        {"text": t, "bbox_1000": parse_bbox(t, grid=group.sample["grid"]), "reward": r, "advantage": a}
        | {name: values[i] for name, values in group.rewards_per_func.items()}
        for i, (t, r, a) in enumerate(zip(group.texts, group.rewards, group.advantages, strict=True))
    ]
    about = {key: group.sample[key] for key in ("id", "bbox_1000", "level") if key in group.sample}
    return {"step": step, **about, "completions": completions}


def dry_run_grpo(engine, reference, tokenizer, prompt, args, device):
    """Rollout and training pass of the largest step: the longest prompt, no completion that stops; prints the peak."""
    model, G, C = engine.module.model, args.num_generations, args.max_completion_length
    count = min(args.train_batch_size // dist.get_world_size(), max(1, args.rollout_batch_size // G))
    never, banned = torch.tensor([-1], device=device), torch.tensor(vision_ids(tokenizer), device=device)
    with out_of_memory_line("rollout"), torch.no_grad():
        state = prefill(model, [dict(prompt) for _ in range(count)], [[str(g) for g in range(G)]] * count, C, {})
        ids = state.tokens
        with whole_weights(model):
            decode(model, state, never, banned, args.temperature, graphs=device.type == "cuda")
    del state
    peaks, ids = {"rollout": peak_bytes(device)}, ids[:G].tolist()
    with out_of_memory_line("training"):
        length = len(prompt["prompt_ids"]) + G * C
        row = pack([(prompt, ids)] * max(1, args.tokens_per_row // length), device)
        engine.train()
        logps = engine(row)
        if reference is not None:
            with torch.no_grad():
                reference(row)
        backward(engine, logps.sum() * 0, last=True)
        engine.step()
    peaks["training"] = peak_bytes(device)
    line = memory_line(peaks, device)
    print0(
        f"train_grpo: rollout of {count} x {G} x {C} tokens behind {len(prompt['prompt_ids'])}, "
        f"row of {row.input_ids.numel()} tokens: {line}"
    )
    dist.destroy_process_group()
    leave()


def main():
    args, start = parse_args(), time.time()
    if args.plan:
        return print_plan(args)
    engine_settings(args.deepspeed)
    samples = read_samples(args.data)
    if missing := [s["id"] for s in samples if s["bbox_1000"] is None]:
        box = "<|box_start|>(x1,y1),(x2,y2)<|box_end|>"
        raise SystemExit(f"{args.data} ({missing[0]}): no box in the answer; want {box}; mend or drop the row")
    if args.knowledge:
        levels = read_levels(args.knowledge, samples)
        samples = [s | {"level": level} for s, level in zip(samples, levels, strict=True)]
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
                "rollout_batch_size",
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
    B = args.train_batch_size
    total = args.max_steps * B if args.max_steps else max(1, int(args.num_epochs * len(samples)))
    total_steps = math.ceil(total / B)  # the last step takes what is left
    torch.manual_seed(args.seed)

    tokenizer, image_processor = load_processors(args.model, args.max_pixels)
    lengths = []
    for s in samples[rank::world_size]:
        length = prompt_length(tokenizer, image_processor, s["image"], s["question"] + R1_SUFFIX, style)
        if length > args.max_prompt_length:
            raise SystemExit(
                f"{args.data} ({s['id']}): prompt of {length} tokens; want at most --max_prompt_length "
                f"{args.max_prompt_length}; raise it, lower --max_pixels or drop the row; a prompt is never cut"
            )
        lengths.append(length)
    model = load_model(args.model, args.dtype, device)
    if args.freeze_vision:
        model.model.visual.requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    scorer = CompletionLogProbs(model, vision_ids(tokenizer), args.temperature)
    reference = copy.deepcopy(scorer).eval().requires_grad_(False) if args.beta > 0 else None
    engine = start_engine(scorer, args)
    print0(f"train_grpo: {run_banner(engine, device)} | reference model {'on' if reference else 'off'}")
    if args.dry_run_memory:
        longest = samples[rank::world_size][lengths.index(max(lengths))] if lengths else samples[0]
        prompt = chat_inputs(tokenizer, image_processor, longest["image"], longest["question"] + R1_SUFFIX, style)
        dry_run_grpo(engine, reference, tokenizer, prompt, args, device)
        return
    peak = matmul_rate(device, model.dtype)
    if rank == 0:
        derived = {"world_size": world_size, "total_steps": total_steps, "rows": len(samples), "matmul_flops": peak}
        config = run_config(args, derived)
        write_text(out / "run.json", json.dumps(config, indent=1) + "\n")
    state = resume(engine, out)
    first, num_tokens = state["step"], state["num_tokens"]
    if rank == 0:
        truncate_log(out / "metrics.jsonl", first)
        truncate_log(out / "samples.jsonl", first)
        send, finish = start_trackers(args, config, first + 1)
        history, warned = complete_lines(out / "metrics.jsonl", step=int), set()
    print0(f"train_grpo: {len(samples)} rows, {total_steps} steps of {B} x {args.num_generations}")

    # GRPO 1: the prompts of every step, this rank's share, read by threads while the model works
    drawn = [samples[epoch_order(i, len(samples), args.seed)]
             for i in range(first * B + rank, total_steps * B, world_size)]  # fmt: skip
    inputs = prefetch(
        lambda s: chat_inputs(tokenizer, image_processor, s["image"], s["question"] + R1_SUFFIX, style),
        drawn, args.num_workers, 2 * B // world_size,
    )  # fmt: skip
    drawn, asked_to_stop = iter(drawn), ask_to_stop()
    for step in range(first + 1, total_steps + 1):
        began, times = time.time(), {}
        heartbeat(out, rank, step, "data")
        with timed(times, "data"):
            batch, prompts = (list(itertools.islice(x, B // world_size)) for x in (drawn, inputs))
        # GRPO 2-4: completions, rewards, advantages
        heartbeat(out, rank, step, "rollout")
        rolled = roll_out_step(model, tokenizer, batch, prompts, step, args, times)
        groups = rolled[: len(range((step - 1) * B + rank, min(step * B, total), world_size))]
        metrics, step_sequences, step_tokens = step_metrics(groups, args, device)
        num_tokens += step_tokens
        # a group whose completions are all equally good has no gradient, unless the KL gives it one
        taught = [g for g in groups if any(g.advantages) or args.beta]
        filled = fill_rows([g.num_tokens for g in taught], args.tokens_per_row, device)
        sums = {"loss": 0.0, "kl": 0.0, "clip": 0.0, "drift": 0.0, "tokens": 0.0, "row_tokens": 0.0, "flops": 0.0}
        engine.train()
        for iteration in range(args.num_iterations):
            heartbeat(out, rank, step, "train")
            rate = learning_rate_at(
                (step - 1) * args.num_iterations + iteration + 1, total_steps * args.num_iterations, args
            )
            for param_group in engine.optimizer.param_groups:
                param_group["lr"] = rate
            for i, members in enumerate(filled):
                with timed(times, "train"):
                    here = [taught[m] for m in members] or [stand_in(rolled[0])]
                    row = pack_groups(here, device, args.freeze_vision)
                    values = row_values(here, args, step_sequences, step_tokens)
                    sampled, advantages, weights = (x.to(device) for x in values)
                    logps = engine(row)
                    with torch.no_grad():
                        ref_logps = reference(row) if reference is not None else None
                    # with one update per rollout the old log-probs are these: the ratio is exactly 1
                    old_logps = sampled if args.num_iterations > 1 else logps.detach()
                    # GRPO 5: this row's share of the loss of the whole step
                    loss, logged = grpo_loss(logps, old_logps, ref_logps, advantages, weights * bool(members), args)
                    backward(engine, loss, last=i == len(filled) - 1)
                    sums["loss"] += loss.item() / args.num_iterations
                    if members:
                        sums["row_tokens"] += row.input_ids.numel()
                        sums["flops"] += train_flops(model, row)
                        sums["kl"] += logged["kl"] / args.num_iterations
                        sums["clip"] += logged["clip"] / args.num_iterations
                        sums["drift"] += (logps.detach() - sampled).abs().sum().item() * (iteration == 0)
                        sums["tokens"] += len(logps) / args.num_iterations
            heartbeat(out, rank, step, "optimizer")
            with timed(times, "optimizer"):
                engine.step()  # GRPO 6: the update
            loss, stop = all_sum([sums["loss"], len(asked_to_stop)], device)
            check_step(engine, loss, step, [g.sample["id"] for g in rolled], out)
        step_time = time.time() - began
        sums = dict(zip(sums, all_sum(list(sums.values()), device), strict=True))
        trained = max(1, sums["tokens"])
        if rank == 0 and step % args.logging_steps == 0:
            row = {
                "step": step,
                "loss": sums["loss"],
                **metrics,
                "grad_norm": float(engine.get_global_grad_norm() or 0.0),
                "learning_rate": rate,
                "num_tokens": num_tokens,
                "sampling/logp_diff": sums["drift"] / trained,
                "step_time": step_time,
                **{f"time/{phase}": seconds for phase, seconds in times.items()},
                "decode_tokens_per_second": step_tokens / world_size / times["decode"],
                "train_tokens_per_second": sums["row_tokens"] / world_size / times["train"],
                "mfu": sums["flops"] / world_size / times["train"] / peak,
            }
            if reference is not None:
                row["kl"] = sums["kl"] / trained
            if args.num_iterations > 1:
                row["clip_ratio/region_mean"] = sums["clip"] / trained
            append_row(out / "metrics.jsonl", row)
            send(row)
            history.append(row)
            for trouble, cause in likely_troubles(history).items():
                if trouble not in warned:
                    print0(f"warning, step {step}: {trouble}: {cause}")
                warned.add(trouble)
            for group in groups[: args.log_completions]:
                append_row(out / "samples.jsonl", group_row(group, step))
            eta = (total_steps - step) * (time.time() - start) / (step - first)
            parts = " | ".join(f"{name} {row[f'rewards/{name}/mean']:.3f}" for name in args.reward_funcs)
            phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in times.items())
            print0(
                f"step {step:05d}/{total_steps:05d} | loss {row['loss']:+.4f} | reward {row['reward']:.3f} ± "
                f"{row['reward_std']:.3f} | {parts} | acc {row['acc@0.5']:.2f} | zero-std "
                f"{row['frac_reward_zero_std']:.2f} | len {row['completions/mean_length']:.0f} | trunc "
                f"{row['completions/clipped_ratio']:.2f} | gnorm {row['grad_norm']:.2f} | lr {rate:.1e} | "
                f"{step_time:.1f}s ({phases}) | mfu {row['mfu']:.2f} | eta {eta / 60:.1f} min"
            )
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
        keys = ["reward", *(f"rewards/{name}/mean" for name in args.reward_funcs), "acc@0.5", "parse_rate"]
        keys += ["frac_reward_zero_std", "completions/mean_length", "grad_norm", "kl"]
        draw_curves(out / "metrics.jsonl", out / "curves.png", keys)
    print0(f"train_grpo: {time.time() - start:.0f} s -> {out / 'final'}, {out / 'curves.png'}")
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    run(main)
