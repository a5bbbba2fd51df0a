"""Stage 2: GRPO on a Qwen-VL that thinks before it points, with an IoU reward. One file, no trainer library.

reads   --data        rows with a box each: samples.jsonl of filter.py, own JSONL, the released GRPO parquets
writes  --output_dir  metrics.jsonl, samples.jsonl (two groups a step), run.json, checkpoint-N/ (resumable), final/
  1 GPU   python train_grpo.py --model runs/cot_sft/final --data runs/grpo/samples.jsonl --output_dir runs/train_grpo
  8 GPUs  torchrun --nproc_per_node 8 train_grpo.py ... (or CPUs; the same command continues a stopped run)

One step: 1 draw prompts (`draw_steps`)  2 roll out G completions of each (`rollout`)  3 rewards by name (REWARD_FUNCS)
4 advantages within the group (`group_advantages`)  5 clipped loss + beta x k3 KL (`grpo_loss`) over packed rows
(`pack_groups`)  6 update. A prompt and its image go through the model once in the rollout and once in the loss; groups
without an advantage are left out. 1 rank and 8 learn the same. Defaults are the paper's (2503.12797), but for beta.
Shapes: B prompts, G completions of each, R = B x G; tokens: P of a prompt, C of a completion, T of a packed row, N of
completions in it; V vocabulary, H query heads, KV key heads, D head width.
"""

import argparse
import copy
import fcntl
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from types import MethodType, SimpleNamespace

import deepspeed
import numpy as np
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    def add(name, default, help, **options):
        kind = {"action": "store_true"} if default is False else {"type": type(default)}
        p.add_argument(name, default=default, help=help, **kind | options)
    # fmt: off
    # model and data
    add("--model", "", "of stage 1, folder or name", required=True)
    add("--data", "", "JSONL, or the released .parquet", required=True, nargs="+")
    add("--image_root", None, "folder of the images (default: that of the row's file)", type=str)
    add("--output_dir", "", "run folder; an interrupted run is continued", required=True)
    add("--prompt_suffix", R1_SUFFIX, "behind a question (default: the paper's)")
    add("--max_pixels", 401408, "of an image")
    add("--max_prompt_length", 4096, "tokens; longer ones are skipped")
    add("--max_bad_rows", 0, "rows without sound box or image to skip and list")
    # rollout
    add("--num_generations", 4, "G, completions per prompt")
    add("--max_completion_length", 512, "tokens")
    add("--temperature", 1.0, "of sampler and trained log-probs")
    add("--rollout_batch_size", 256, "completions decoded at once by a rank")
    # rewards
    add("--reward_funcs", ["iou", "format"], "summed", nargs="+", type=str, choices=[*REWARD_FUNCS])
    add("--reward_weights", None, "one per reward (default: 1)", nargs="+", type=float)
    add("--iou_threshold", 0.8, "above it iou pays IoU, binary 1")
    # GRPO
    add("--scale_rewards", "group", "/ std, mean only, leave-one-out", choices=["group", "none", "loo"])
    add("--loss_type", "grpo", "mean per sequence, token, constant", choices=["grpo", "dapo", "dr_grpo"])
    add("--beta", 0.0, "of the KL (paper: 0.04); 0: no reference model")
    add("--epsilon", 0.2, "the ratio is clipped at 1 - epsilon")
    add("--epsilon_high", None, "and at 1 + this (default: epsilon; DAPO: 0.28)", type=float)
    add("--num_iterations", 1, "updates per rollout")
    # optimisation
    add("--learning_rate", 1e-6, "peak")
    add("--lr_scheduler", "linear", "after the warm-up", choices=["cosine", "linear", "constant"])
    add("--warmup_ratio", 0.0, "share of the updates")
    add("--weight_decay", 0.0, "of AdamW")
    add("--max_grad_norm", 1.0, "0: no clipping")
    add("--num_epochs", 2.0, "passes over the data")
    add("--max_steps", -1, "if > 0, steps instead of --num_epochs")
    add("--train_batch_size", 16, "prompts per step, over all ranks")
    add("--freeze_vision", False, "and the merger")
    # engine
    add("--tokens_per_row", 8192, "of a pass, filled with whole groups")
    add("--gradient_checkpointing", False, "less memory, a third more time")
    add("--deepspeed", None, "its settings (default: ds_config.json beside it, or built in)", type=str)
    add("--zero_stage", None, "3 shards the weights too (default: --deepspeed's)", type=int, choices=[1, 2, 3])
    add("--dtype", "auto", "auto: bfloat16 on CUDA", choices=["auto", "bfloat16", "float32"])
    # run
    add("--wandb", None, "Weights & Biases project", type=str)
    add("--save_steps", 100, "0: none before the end")
    add("--save_total_limit", 2, "checkpoints kept")
    add("--keep_checkpoints", False, "also once final/ is there")
    add("--seed", 0, "of row order and sampler")
    # fmt: on
    args = p.parse_args(argv)
    args.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    args.reward_weights = args.reward_weights or [1.0] * len(args.reward_funcs)
    if args.num_generations < 2 or args.temperature <= 0 or len(args.reward_weights) != len(args.reward_funcs):
        p.error("want --num_generations >= 2, --temperature > 0 and one --reward_weights per reward")
    return args

# ---- 3. rewards: (completion, its prompt, args) -> float ----
@dataclass
class Completion:  # a group is its prompt, a dict of `parse_row` and `chat_inputs`, with a list "completions"
    ids: list  # C tokens, with the stop token if it came
    logps: torch.Tensor  # (C,) fp32, under the sampler
    finished: bool  # the stop token came
    text: str = ""
    bbox_1000: list | None = None  # the one box of its answer
    iou: float = 0.0  # with prompt["bbox_1000"]
    rewards: dict[str, float] | None = None
    reward: float = 0.0  # their weighted sum
    advantage: float = 0.0

def format_reward(c, prompt, args):
    """0.5 for one <think> with words, one <answer>, nothing else; 0.5 for one box as the family writes it."""
    blocks = re.fullmatch(rf"<think>({NO_TAG}*)</think>\s*<answer>{NO_TAG}*</answer>", c.text.strip(), re.S)
    form = r'"bbox_2d":\s*\[#(?:,\s*#){3}\]' if prompt["style"].json else r"\(#,#\),\(#,#\)"
    boxed = c.bbox_1000 and re.search(form.replace("#", r"\d{1,4}"), answer_text(c.text), re.A)
    return 0.5 * bool(blocks and re.search(r"\w", blocks[1])) + 0.5 * bool(boxed)

NO_TAG = r"(?:(?!</?think>|</?answer>).)"

def grounded_reward(c, prompt, args, same_iou=0.7):
    """1 where the reasoning lists the answered box before its conclusion, and ends at it; looks at no label."""
    think = NAMES.sub("_", c.text.partition("<think>")[2].partition("</think>")[0])
    listed, _, end = think.lower().partition("conclusion")
    def agree(text):  # each box in it: with the answered one
        boxes = (parse_bbox(m[0], "direct", prompt["grid"]) for m in BOXES.finditer(text))
        return [bool(b) and box_iou(b, c.bbox_1000) >= same_iou for b in boxes]
    return bool(c.bbox_1000) and any(agree(listed)) and agree(end)[-1:] == [True]

REWARD_FUNCS = {
    "iou": lambda c, prompt, args: c.iou * (c.iou > args.iou_threshold),
    "format": format_reward,
    "grounded_0.7": grounded_reward,
    "grounded_0.9": partial(grounded_reward, same_iou=0.9),
    "iou_if_grounded": lambda *x: REWARD_FUNCS["iou"](*x) * grounded_reward(*x),
    "dense_iou": lambda c, *_: c.iou,  # for cold starts, where iou stays 0
    "binary": lambda c, prompt, args: c.iou > args.iou_threshold,
}

# ---- 4. advantages, 5. loss ----
def group_advantages(rewards, scale_rewards):
    """G floats -> G floats, 0 where all rewards are equal. group: (r - mean) / (std + 1e-4), unbiased std, as released;
    none: r - mean (Dr. GRPO); loo: r - mean of the other G - 1 (RLOO)."""
    r = torch.tensor(rewards, dtype=torch.float64)
    if r.max() == r.min():
        return [0.0] * len(rewards)
    scale = {"group": 1 / (r.std() + 1e-4), "none": 1.0, "loo": len(r) / (len(r) - 1)}[scale_rewards]
    return ((r - r.mean()) * scale).tolist()

def token_weight(length, num_sequences, num_tokens, args):
    """Of a token in the loss of the step; totals are those of all ranks, groups without advantage included. GRPO: arXiv
    2402.03300 eq. 3, DAPO: 2503.14476 eq. 8, Dr. GRPO: 2503.20783."""
    constant = num_sequences * args.max_completion_length
    return 1 / {"grpo": length * num_sequences, "dapo": num_tokens, "dr_grpo": constant}[args.loss_type]

def grpo_loss(logps, old_logps, ref_logps, advantages, weights, args):
    """(share of N tokens in the loss of the step, sum of their KL, how many are clipped); all inputs (N,)"""
    ratio = (logps - old_logps).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high) * advantages
    per_token, kl = -torch.minimum(free, clipped), torch.zeros_like(logps)
    if ref_logps is not None:
        log_ratio = (ref_logps - logps).clamp(-20, 20)
        kl = log_ratio.exp() - log_ratio - 1  # k3: unbiased, never negative
        per_token = per_token + args.beta * kl
    return (per_token * weights).sum(), kl.sum().item(), (clipped < free).sum().item()

def row_loss(engine, reference, groups, num_sequences, num_tokens, args):
    """(share of a row of whole groups in the loss of the step; sums over its tokens)"""
    row, cs = pack_groups(groups, engine.device, args.freeze_vision), [c for g in groups for c in g["completions"]]
    known = torch.tensor([(c.advantage, token_weight(len(c.ids), num_sequences, num_tokens, args)) for c in cs])
    advantages, weights = known.repeat_interleave(torch.tensor([len(c.ids) for c in cs]), 0).T.to(engine.device)
    sampled = torch.cat([c.logps for c in cs]).to(engine.device)
    logps = engine(row)
    ref_logps = reference and reference(row)  # its weights take no gradient
    old_logps = sampled if args.num_iterations > 1 else logps.detach()  # with one update: the ratio is exactly 1
    loss, kl, clipped = grpo_loss(logps, old_logps, ref_logps, advantages, weights, args)
    drift = (logps.detach() - sampled).abs().sum().item()
    return loss, np.array([loss.item(), kl, clipped, drift, len(logps), row.input_ids.numel()])

# ---- 2. to 4. of a step, and its metrics ----
def rollout_and_score(engine, processors, prompts, step, args, times):
    """Gives this rank's prompts their "completions", G of each, with rewards and advantages."""
    tokenizer, G, size = processors[0], args.num_generations, max(1, args.rollout_batch_size // args.num_generations)
    full = deepspeed.zero.unwrap_model_for_generation if hasattr(engine.optimizer, "parameter_offload") else nullcontext
    with timed(times, "rollout"), full(engine):  # ZeRO-3: all weights, without the hooks that let go of them
        for batch in [prompts[i : i + size] for i in range(0, len(prompts), size)]:
            seeds = [[f"{args.seed}:{step}:{p['id']}:{p['epoch'] * G + g}" for g in range(G)] for p in batch]
            rolled = rollout(engine.module.model, tokenizer, batch, seeds, args.max_completion_length, args.temperature)
            for p, completions in zip(batch, rolled, strict=True):
                p["completions"] = [Completion(*c) for c in completions]
    with timed(times, "reward"):
        for p in prompts:
            for c in p["completions"]:
                c.text = tokenizer.decode(c.ids).removesuffix("<|im_end|>").removesuffix("<|endoftext|>")
                c.bbox_1000 = parse_bbox(c.text, grid=p["grid"])
                c.iou = box_iou(c.bbox_1000, p["bbox_1000"]) if c.bbox_1000 else 0.0
                c.rewards = {name: float(REWARD_FUNCS[name](c, p, args)) for name in args.reward_funcs}
                c.reward = sum(w * r for w, r in zip(args.reward_weights, c.rewards.values(), strict=True))
            advantages = group_advantages([c.reward for c in p["completions"]], args.scale_rewards)
            for c, advantage in zip(p["completions"], advantages, strict=True):
                c.advantage = advantage
            p["num_tokens"] = len(p["prompt_ids"]) + sum(len(c.ids) for c in p["completions"])  # of its packed row

def step_metrics(prompts, counted, device):
    """(means over the step's completions, `counted` of them on this rank; their number; their tokens)"""
    each = [{
        "reward": c.reward,
        **{f"rewards/{name}/mean": r for name, r in c.rewards.items()},
        "acc@0.5": c.iou >= 0.5,
        "parse_rate": c.bbox_1000 is not None,
        "completions/mean_length": len(c.ids),
        "completions/clipped_ratio": not c.finished,
        "entropy": -c.logps.sum().item(),
        "reward_std": c.reward**2,
        "frac_reward_zero_std": len({x.reward for x in p["completions"]}) == 1,
    } for p in prompts for c in p["completions"]]  # fmt: skip
    n, *totals = all_sum([counted, *(sum(x[name] for x in each[:counted]) for name in each[0])], device)
    means = {name: total / n for name, total in zip(each[0], totals, strict=True)}
    means["entropy"] /= means["completions/mean_length"]  # mean of -log p over tokens drawn from p
    means["reward_std"] = max(0.0, means["reward_std"] - means["reward"] ** 2) ** 0.5
    return means, int(n), round(n * means["completions/mean_length"])

def warn(history):
    """Names two ways to learn nothing. `history`: all metrics."""
    if len(history) % 10 == 0 and not any(m["reward"] for m in history[-10:]):
        print0("warning: reward 0 for ten steps; train CoT-SFT first, lower --iou_threshold, add dense_iou")
    if len(history) == 5 and max(m["parse_rate"] for m in history) < 0.05:
        print0("warning: almost no answer has a box; is --model stage 1's, the length enough?")

def main():
    args = parse_args()
    rank, world_size, device = init_dist()
    out, B, G, updates = Path(args.output_dir), args.train_batch_size, args.num_generations, args.num_iterations
    if rank == 0:
        start_run(out, vars(args) | {"ranks": world_size, "torch": torch.__version__})
    if (out / "final").exists():
        return print0(f"{out / 'final'} exists; want another --output_dir")
    processors, rows = load_processors(args.model, args.max_pixels), read_samples(args.data, args.image_root)
    def read(s):
        if not s["bbox_1000"]:
            raise ValueError(f"answer {s['answer']!r}; want a box")
        return s | chat_inputs(processors, s["image"], s["question"] + args.prompt_suffix)
    samples, total, total_steps = usable(*rows, lambda s: len(read(s)["prompt_ids"]), args.max_prompt_length, args)
    model = load_model(args.model, args.dtype, device)
    model.config.prompt_suffix = args.prompt_suffix  # exported with the weights
    scorer = CompletionLogProbs(model, processors[0].convert_tokens_to_ids(BANNED), args.temperature)
    reference = copy.deepcopy(scorer).eval().requires_grad_(False) if args.beta > 0 else None
    engine = start_engine(scorer, args)
    state, history, asked_to_stop = resume(engine, out, args), [], []
    print0(f"train_grpo: {total_steps} steps of {B} x {G}, {world_size} ranks on {device.type}, {model.dtype}")
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))
    shown = ["reward", "reward_std", "acc@0.5", "parse_rate", "frac_reward_zero_std", "completions/mean_length"]
    # 1. prompts
    for step, prompts, times in draw_steps(samples, read, state["step"] + 1, total_steps, args):
        # 2. completions  3. rewards  4. advantages; of the last step none beyond `total` count
        rollout_and_score(engine, processors, prompts, step, args, times)
        groups = prompts[: len(range((step - 1) * B + rank, min(step * B, total), world_size))]
        metrics, num_sequences, step_tokens = step_metrics(prompts, len(groups) * G, device)
        # 5. the loss; a group of equally good completions has no gradient but the KL's
        taught = [g for g in groups if args.beta or any(c.advantage for c in g["completions"])]
        rows, sums = fill_rows(taught, args.tokens_per_row, device), np.zeros(6)
        engine.train()
        for iteration in range(updates):
            for i, members in enumerate(rows):
                with timed(times, "train"):  # a rank without a row left takes part with one of no weight
                    loss, logged = row_loss(engine, reference, members or prompts[:1], num_sequences, step_tokens, args)
                    engine.set_gradient_accumulation_boundary(i == len(rows) - 1)
                    engine.backward(loss * world_size * bool(members), scale_wrt_gas=False)  # it takes the ranks' mean
                    logged[3] *= updates * (iteration == 0)  # later the policy has moved away
                    sums += logged * bool(members) / updates
            # 6. the update
            set_learning_rate(engine, (step - 1) * updates + iteration, total_steps * updates, args)
            with timed(times, "optimizer"):
                engine.step()
        loss, kl, clipped, drift, tokens, stop = all_sum([*sums[:5], len(asked_to_stop)], device)
        state = {"step": step, "num_tokens": state["num_tokens"] + step_tokens}
        means = {"kl": kl, "clip_ratio/region_mean": clipped, "sampling/logp_diff": drift}
        metrics |= state | {"loss": loss} | {name: value / max(1, tokens) for name, value in means.items()}
        metrics["decode_tokens_per_second"] = step_tokens / world_size / times["rollout"]
        told = [{"step": step, "id": g["id"], "bbox_1000": g["bbox_1000"], "completions": [
            {key: vars(c)[key] for key in ("text", "bbox_1000", "reward", "advantage")} | c.rewards
            for c in g["completions"]]} for g in groups[:2]]  # fmt: skip
        log_step(engine, out, metrics, shown, times, sums[5] * updates, total_steps - step, args, told)
        warn(history := [*history, metrics])
        save_step(engine, processors, out, state, stop, total_steps - step, args)
    leave()

# ======== plumbing: the packed row, then blocks shared with train_sft.py, eval_kvg.py
def pack_groups(groups, device, reuse_features=False):
    """Prompts, each followed by its completions, in one row; each completion sees its prompt and itself, and has the
    positions that it would have alone behind it."""
    ids, positions, at, targets, sequences = [], [], [], [], []  # (tokens of a prompt or completion, those it sees)
    for g in groups:
        prompt, after = range(len(ids), len(ids) + len(g["prompt_ids"])), int(g["position_ids"][0, -1]) + 1
        ids, positions = ids + g["prompt_ids"], [*positions, g["position_ids"]]
        sequences.append((prompt, prompt))
        for c in g["completions"]:
            own = range(len(ids), len(ids) + len(c.ids))
            ids, at, targets = ids + c.ids, [*at, prompt[-1], *own[:-1]], targets + c.ids
            sequences.append((own, [*prompt, *own]))
            positions.append(torch.arange(after, after + len(own)).expand(3, -1))
    seen = torch.tensor([i for _, keys in sequences for i in keys], device=device)
    lengths = [[*map(len, x)] for x in zip(*sequences, strict=True)]
    spans = [(torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device), max(n)) for n in lengths]
    def attend(layer, query, key, value, scaling):
        return attend_sequences(query, key[:, :, seen], value[:, :, seen], scaling, *spans)
    row = packed_row(groups, ids, positions, attend, device)
    row.at = torch.tensor(at, device=device)  # (N,), the position before each completion token
    row.targets = torch.tensor(targets, device=device)  # (N,)
    if reuse_features:  # of a frozen vision tower
        row.image_features = [g["image_features"] for g in groups]
    return row

# >>> shared:files (copy of synth_data.py)
QUESTION = "Find and give the bounding box of <|object_ref_start|>{}<|object_ref_end|>"
ANSWER = "<|object_ref_start|>{}<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>"
R1_SUFFIX = ("  Output the thinking process in <think> </think> "
             "and final answer (bounding box) in <answer> </answer> tags.")
to_json = partial(json.dumps, ensure_ascii=False)

class InputError(ValueError):
    """What the user has to mend, in one line: where, what was found, what is wanted."""

def read_jsonl(path, unfinished=False):
    """Rows as dicts. `unfinished`: of a killed run, if there was one, without its cut last line."""
    lines = b"" if unfinished and not os.path.exists(path) else Path(path).read_bytes()
    rows = []
    for number, line in enumerate(lines.split(b"\n")[: -1 if unfinished else None], 1):
        try:
            rows += [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError):
            raise InputError(f"{path}:{number}: {line[:80]!r}; want one JSON object a line") from None
    return rows

def write(path, *lines):
    """A text file, whole or not at all."""
    Path(f"{path}.tmp").write_text("".join(f"{line}\n" for line in lines), "utf-8", "backslashreplace")
    os.replace(f"{path}.tmp", path)

def start_run(out, settings, fixed=()):
    """Locks the folder, writes run.json: settings and a hash of this script. Says which an earlier run had otherwise;
    those in `fixed` are refused: one file would hold two kinds of rows."""
    global LOCK  # until the process ends
    out.mkdir(parents=True, exist_ok=True)
    LOCK, path = open(out / ".lock", "w"), out / "run.json"
    try:
        fcntl.lockf(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another run writes here; want one at a time") from None
    except OSError:
        pass  # some file systems have no locks
    now = json.loads(to_json(settings | {"script": hashlib.md5(Path(__file__).read_bytes()).hexdigest()}))
    old = json.loads(path.read_bytes()) if path.exists() else now
    changed = {key: f"{old.get(key)} -> {now[key]}" for key in now if old.get(key) != now[key]}
    if changed.keys() & set(fixed):
        raise InputError(f"{path}: {changed}; want the same settings, or another folder")
    if changed:
        print(f"{path}: goes on with other settings, {changed}", flush=True)
    write(path, to_json(now, indent=1))
# <<< shared:files

# >>> shared:answers (copy of eval_kvg.py)
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
POINT, FOUR = rf"\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)", rf"{NUMBER}\s*(?:,\s*{NUMBER}\s*){{3}}"
BOXES = re.compile(rf"{POINT}(?:\s*,\s*{POINT})+|\(\s*{FOUR}\)|\[\s*{FOUR}\]")
NAMES = re.compile(r'<\|object_ref_start\|>.*?<\|object_ref_end\|>|"label":\s*"(?:[^"\\]|\\.)*"', re.S)

def answer_text(text, mode="r1"):
    """Where the answer is looked for, names left out, or None. r1: the one closed <answer> pair, not inside an open
    <think>; other modes: the whole text, or the answer block if there is one."""
    if (text.count("<answer>"), text.count("</answer>")) == (1, 1):
        before, rest = text.split("<answer>")
        if "</answer>" in rest and before.rfind("<think>") <= before.rfind("</think>"):
            return NAMES.sub("_", rest.split("</answer>")[0])
    return None if mode == "r1" or "<answer>" in text or "</answer>" in text else NAMES.sub("_", text)

def parse_bbox(text, mode="r1", grid=(1000, 1000)):
    """The one box of a completion as [x1, y1, x2, y2] on the 0..1000 grid, or None. (x1,y1),(x2,y2), (x1,y1,x2,y2) and
    [x1,y1,x2,y2] are boxes, also nested, in JSON, with decimals or spaces, but not in a name. The same box twice is
    one. Two boxes, three points, x1 >= x2, y1 >= y2, a number beyond the `grid` (width, height) that the model counts
    in are none. Nothing is reordered or clipped."""
    found = {tuple(map(float, re.findall(NUMBER, m[0]))) for m in BOXES.finditer(answer_text(text, mode) or "")}
    box = found.pop() if len(found) == 1 else ()
    if len(box) != 4 or not (box[0] < box[2] <= grid[0] and box[1] < box[3] <= grid[1]):
        return None
    box = [v if n == 1000 else v * 1000 / n for v, n in zip(box, grid * 2, strict=True)]  # v * 1000 / 1000 may round
    return [int(v) if v == int(v) else v for v in box]

def box_iou(a, b):
    """IoU of boxes (x1, y1, x2, y2)."""
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0
# <<< shared:answers

# >>> shared:model (copy of eval_kvg.py)
REF = re.compile(r"<\|object_ref_start\|>((?:(?!<\|).)*)<\|object_ref_end\|>", re.S)
BOX = re.compile(r"(?:<\|box_start\|>)?\((\d+),(\d+)\),\((\d+),(\d+)\)(?:<\|box_end\|>)?", re.A)
PAIRS = re.compile(r"<\|(object_ref|box)_start\|>(?:(?!<\|).)*<\|\1_end\|>", re.S)  # the only tokens that rows may hold
BAD = (LookupError, TypeError, AttributeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError)
# how a family writes boxes: as JSON, else between box tokens; in pixels of the resized image, else 0..1000
BOX_STYLES = {"qwen2_vl": (False, False), "qwen2_5_vl": (True, True), "qwen3_vl": (True, False)}
BOX_STYLES = {kind: SimpleNamespace(json=json_, pixels=pixels) for kind, (json_, pixels) in BOX_STYLES.items()}

def parse_row(r, folder, number):
    """A row of any format as a sample; raises BAD. `suffix`: what its user's turn adds to the question."""
    user, reply = ([t["content"].replace("<image>", "") for t in r.get("messages") or ()] + ["", ""])[:2]
    question = r.get("question") or r.get("problem") or r.get("phrase") and QUESTION.format(r["phrase"].strip()) or user
    question = question.replace("<image>", "").removesuffix(R1_SUFFIX)
    answer = (r.get("answer") or r.get("solution") or reply).rsplit("<answer>", 1)[-1].split("</answer>")[0].strip()
    image = (r.get("images") or [r["image"]])[0]
    image = image.get("bytes") or image["path"] if isinstance(image, dict) else image
    image = str(Path(folder, image)) if isinstance(image, str) else image
    name = r.get("entity") or (REF.findall(answer) + REF.findall(question) + [""])[0]
    box = [int(v) for found in BOX.findall(REF.sub("", answer))[:1] for v in found]
    if px := r.get("bbox_px"):
        sides = zip(px, load_image(image).size * 2, strict=True)  # up to 1 px beyond them is rounding
        box = [min(max(v, 0), n) * 1000 / n if -1 <= v <= n + 1 else -1 for v, n in sides]
        x1, y1, x2, y2 = map(round, box)
        answer = ANSWER.format(name, min(x1, 999), min(y1, 999), max(x2, x1 + 1), max(y2, y1 + 1))
    if not question or box and not (0 <= box[0] < box[2] <= 1000 and 0 <= box[1] < box[3] <= 1000):
        raise ValueError(f"question {question!r}, box {px or box}; want x1 < x2, y1 < y2, within the image or 0..1000")
    if found := re.search(r"<\|.{0,20}", PAIRS.sub("", f"{question}\n{answer}\n{user}\n{reply}")):
        raise ValueError(f"{found[0]!r} in a text; want no tokens but pairs around a name or a box")
    key = [r[name] for name in ("question_id", "id") if r.get(name) is not None] + [number]
    return dict(id=str(key[0]), image=image, image_id=r.get("image_id"), question=question, answer=answer, entity=name,
                bbox_1000=box or None, options=r.get("options"), category=str(r.get("category")).lower(),
                completion=reply, suffix=R1_SUFFIX * user.endswith(R1_SUFFIX))

def read_samples(paths, image_root=None):
    """(samples, a line about each row that is none) of JSONL, ShareGPT .json, released .parquet files"""
    samples, bad = {}, []
    for path in map(Path, paths):
        if path.suffix == ".parquet":
            rows = (r for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256) for r in batch.to_pylist())
        else:
            try:
                rows = list(map(dict, json.loads(path.read_bytes()))) if path.suffix == ".json" else read_jsonl(path)
            except (TypeError, json.JSONDecodeError) as e:
                raise InputError(f"{path}: {e}; want a JSON list of objects") from None
        for number, row in enumerate(rows, 1):
            try:
                sample = parse_row(row, image_root or path.parent, len(samples) + len(bad) + 1)
                if samples.setdefault(sample["id"], sample) is not sample:
                    raise ValueError("its id occurs twice; want unique ids")
            except BAD as e:
                bad.append(f"{path}:{number} ({row.get('question_id', row.get('id'))}): {type(e).__name__} {e}")
    return list(samples.values()), bad

def load_image(image):
    """RGB picture of a path or bytes, turned as its EXIF says, on white."""
    im = ImageOps.exif_transpose(Image.open(io.BytesIO(image) if isinstance(image, bytes) else image))
    if im.has_transparency_data:
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
    return im.convert("RGB")

def load_processors(path, max_pixels):
    """(tokenizer, image processor, box style) of a model. By PIL, for torchvision makes other pixels."""
    p = AutoImageProcessor.from_pretrained(path, backend="pil")
    p.size = {"shortest_edge": min(p.size["shortest_edge"], max_pixels), "longest_edge": max_pixels}
    return AutoTokenizer.from_pretrained(path), p, BOX_STYLES[AutoConfig.from_pretrained(path).model_type]

def chat_inputs(processors, image, text):
    """A user turn with an image, up to the assistant's first token: prompt_ids, list of P; position_ids (3, P);
    pixel_values (patches, values); image_grid_thw (1, 3); grid, the (width, height) that boxes count in; style."""
    (tokenizer, p, style), pad, text = processors, "<|image_pad|>", REF.sub(r"\1", text) if processors[2].json else text
    vision = p(images=[load_image(image)], return_tensors="pt")
    _, rows, columns = (vision["image_grid_thw"][0] // p.merge_size).tolist()
    grid = tuple(n * p.merge_size * p.patch_size for n in (columns, rows)) if style.pixels else (1000, 1000)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    prompt = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(prompt.replace(pad, pad * (rows * columns), 1), add_special_tokens=False)
    # M-RoPE: an image's tokens count frame, row and column from its start; the text behind it goes on from there
    start = ids.index(tokenizer.convert_tokens_to_ids(pad))
    positions, end = torch.arange(len(ids)).repeat(3, 1), start + rows * columns
    positions[:, start:end] = start + torch.tensor([(0, y, x) for y in range(rows) for x in range(columns)]).T
    positions[:, end:] += max(rows, columns) - rows * columns
    return {**vision, "prompt_ids": ids, "position_ids": positions, "grid": grid, "style": style}

def init_dist():
    """(rank, world_size, device), under torchrun or alone."""
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    rank, local_rank, world_size = (int(os.environ.setdefault(k, v)) for k, v in names.items())
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size == 1 else {}  # needs no port
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2), **alone)
    return rank, world_size, torch.device(f"cuda:{local_rank}" if cuda else "cpu")

def print0(message):
    if dist.get_rank() == 0:
        print(message, flush=True)

def leave():
    """Ends the ranks. Of several one now and then aborted in the interpreter's shutdown."""
    dist.destroy_process_group()
    if os.environ["WORLD_SIZE"] != "1":
        os._exit(0)

def load_model(path, dtype, device):
    """A `packable` Qwen-VL on the device."""
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(dtype, dtype)
    return packable(AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, device_map={"": device}))

def packable(model):
    """The model with `packed_flash` for attention."""
    AttentionInterface.register("packed_flash", packed_flash)
    model.config._attn_implementation = "packed_flash"  # its setter looks for flash-attn
    proj = model.model.visual.patch_embed.proj  # stride = kernel, a product; cuDNN may take seconds
    proj.forward = MethodType(lambda self, x: F.linear(x.flatten(1), self.weight.flatten(1), self.bias), proj)
    return model

def packed_flash(module, query, key, value, attention_mask, scaling, attend=None, **kwargs):
    """What transformers calls: the decoder with the row's `attend`, the vision tower within images or windows."""
    if attend:
        return attend(module.layer_idx, query, key, value, scaling), None
    spans = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]  # given since "flash" is in the name
    return attend_sequences(query, key, value, scaling, spans, causal=False), None

def attend_sequences(query, key, value, scaling, spans, key_spans=None, causal=True):
    """Attention within sequences end to end. Spans: their ends, int32, from 0 on, and the longest; of more keys than
    queries the last query sees all. Shapes: query (1, H, T, D), key, value (1, KV, K, D) -> (1, T, H, D)."""
    (ends, longest), (key_ends, longest_key) = spans, key_spans or spans
    if query.is_cuda and query.dtype != torch.float32:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__kwdefaults__ else {}  # torch 2.11: always
        options |= {"scale": scaling, "window_size": (-1, 0 if causal else -1)}
        return varlen_attn(q, k, v, ends, key_ends, longest, longest_key, **options)[None]
    out, lengths, key_lengths = [], ends.diff().tolist(), key_ends.diff().tolist()
    parts = query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2)
    for n, m, q, k, v in zip(lengths, key_lengths, *parts, strict=True):
        seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n) if causal and n < m else None
        out.append(F.scaled_dot_product_attention(q, k, v, seen, 0, causal and n == m, scale=scaling, enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2)

def packed_row(items, ids, positions, attend, device):
    """Sequences end to end, no padding: input_ids (1, T), position_ids (3, 1, T), M-RoPE, images, who sees whom."""
    row = {"input_ids": torch.tensor([ids]), "position_ids": torch.cat(positions, 1)[:, None]}
    row |= {k: torch.cat([x[k] for x in items]) for k in ("pixel_values", "image_grid_thw")}
    return SimpleNamespace(**{k: x.to(device) for k, x in row.items()}, image_features=None, attend=attend)

def embed_images(model, row):
    """Per image (1 + levels, visual tokens, hidden): what the decoder reads, then adds behind its first layers."""
    out = model.model.get_image_features(row.pixel_values, row.image_grid_thw, return_dict=True)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]  # deepstack: Qwen3-VL
    return torch.stack([x if torch.is_tensor(x) else torch.cat(x) for x in levels]).split([*map(len, levels[0])], 1)

def hidden_states(model, row):
    """Last ones (T, hidden) of a packed row; its images may be embedded already."""
    first, *rest = torch.cat(row.image_features or embed_images(model, row), 1)
    seen, inputs = row.input_ids == model.config.image_token_id, model.get_input_embeddings()(row.input_ids)
    inputs = inputs.masked_scatter(seen[..., None], first.to(inputs.dtype))
    options = {"visual_pos_masks": seen, "deepstack_visual_embeds": rest} if rest else {}
    options |= {"position_ids": row.position_ids, "attend": row.attend, "use_cache": False}
    return model.model.language_model(inputs_embeds=inputs, **options).last_hidden_state[0]
# <<< shared:model

# >>> shared:rollout (copy of eval_kvg.py)
STOP = ["<|im_end|>", "<|endoftext|>"]
BANNED = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]  # stand for images

class Rollout:
    """G completions of each of B prompts, decoded as R = B x G rows, a prompt's side by side. Prompts and images go
    through the model once, in one packed row; then a token of all rows at a time. Per layer prompt_kv (2, B, KV, P, D),
    read by all its rows, and own_kv 2 x (B, KV, G, W, D), W grows; behind (B, P), padding; logits (R, V) fp32, position
    (R,) of the next token; done (R,); step (1,), tokens so far; draws (R, C) in [0, 1). Results: tokens (R, C), -1
    behind the end, logps (R, C) fp32; slot (R,), a row's place in them."""
    def __init__(self, model, tokenizer, prompts, seeds, max_completion_length, temperature):
        device, (B, G, C) = model.device, (len(prompts), len(seeds[0]), max_completion_length)
        lengths = [len(p["prompt_ids"]) for p in prompts]
        ends, P = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths)
        self.model, self.temperature, self.prompt_kv = model, temperature, []
        def attend(layer, query, key, value, scaling):  # within the prompts, whose keys and values are kept
            kv = torch.cat([key, value]).transpose(0, 2).split(lengths)
            kv = torch.nn.utils.rnn.pad_sequence(kv, batch_first=True)  # (B, P, KV, 2, D)
            self.prompt_kv.append(kv.permute(3, 0, 2, 1, 4).contiguous())
            return attend_sequences(query, key, value, scaling, (ends, P))
        ids, positions = [i for p in prompts for i in p["prompt_ids"]], [p["position_ids"] for p in prompts]
        row = packed_row(prompts, ids, positions, attend, device)
        row.image_features = embed_images(model, row)
        for p, features in zip(prompts, row.image_features, strict=True):
            p["image_features"] = features
        last = ends[1:].long() - 1
        self.logits = model.lm_head(hidden_states(model, row)[last]).float().repeat_interleave(G, 0)
        self.own_kv = [[x[:, :, None, :0].repeat_interleave(G, 2) for x in kv] for kv in self.prompt_kv]
        self.behind = torch.arange(P, device=device) >= ends.diff()[:, None]
        self.position = (row.position_ids[0, 0, last] + 1).repeat_interleave(G)
        self.slot, self.step = torch.arange(B * G, device=device), torch.zeros(1, dtype=torch.long, device=device)
        self.done = self.slot < 0
        rngs = (np.random.default_rng([*hashlib.sha256(s.encode()).digest()]) for group in seeds for s in group)
        self.draws = torch.tensor(np.stack([rng.random(C, dtype=np.float32) for rng in rngs]), device=device)
        self.tokens, self.logps = torch.full((B * G, C), -1, device=device), torch.zeros(B * G, C, device=device)
        self.stop, self.banned = (torch.tensor(tokenizer.convert_tokens_to_ids(t)).to(device) for t in (STOP, BANNED))

    def advance(self):
        """Samples a token for every row (temperature 0: the likeliest), feeds it to the model."""
        logits = self.logits.index_fill(-1, self.banned, -torch.inf) / (self.temperature or 1)
        token, probs = logits.argmax(-1), logits.softmax(-1)
        if self.temperature:
            cdf, draw = probs.cumsum(-1), self.draws[self.slot, self.step][:, None]
            token = torch.searchsorted(cdf, draw * cdf[:, -1:], right=True)[:, 0].clamp(max=cdf.shape[-1] - 1)
        self.tokens[self.slot, self.step] = torch.where(self.done, -1, token)
        self.logps[self.slot, self.step] = probs.gather(1, token[:, None])[:, 0].log()
        self.done |= torch.isin(token, self.stop)
        future = torch.arange(self.own_kv[0][0].shape[3], device=token.device) > self.step
        unseen = torch.cat([self.behind, future.expand(len(self.behind), -1)], 1)
        self.bias = torch.where(unseen, -torch.inf, 0.0)[:, None, None]
        inputs = {"inputs_embeds": self.model.get_input_embeddings()(token)[:, None], "use_cache": False}
        inputs["position_ids"] = self.position.expand(3, 1, -1).transpose(1, 2)
        hidden = self.model.model.language_model(**inputs, attend=self.attend).last_hidden_state
        self.logits.copy_(self.model.lm_head(hidden[:, 0]))
        self.position += 1
        self.step += 1

    def attend(self, layer, query, key, value, scaling):
        """Of a new token per row: (R, H, 1, D) -> (R, 1, H, D). A prompt's keys are read once for all its rows; one
        softmax over prompt and completion, scores in fp32, as in attention kernels."""
        (prompt_k, prompt_v), (own_k, own_v) = self.prompt_kv[layer], self.own_kv[layer]
        B, KV, G, W, D = own_k.shape
        def by_prompt(x):  # (R, KV x n, 1, D) -> (B, KV, G, n, D)
            return x.view(B, G, KV, -1, D).transpose(1, 2)
        own_k.index_copy_(3, self.step, by_prompt(key))
        own_v.index_copy_(3, self.step, by_prompt(value))
        exact = {"out_dtype": torch.float32} if query.is_cuda and query.dtype != torch.float32 else {}
        def scores(q, k):
            return torch.bmm(q.flatten(0, -3), k.flatten(0, -3).mT, **exact).view(B, KV, -1, k.shape[-2])
        q = by_prompt(query * scaling).contiguous()
        weights = torch.cat([scores(q.flatten(2, 3), prompt_k), scores(q, own_k)], -1).add_(self.bias)
        weights = weights.softmax(-1).to(q.dtype)
        out = (weights[..., :-W] @ prompt_v).view(q.shape) + weights[..., -W:].unflatten(2, (G, -1)) @ own_v
        return out.transpose(1, 2).reshape(len(query), 1, -1, D)

    def drop_finished(self):
        """Leaves behind groups that are done, and rows of the others down to what the fullest needs."""
        unfinished = ~self.done.view(len(self.behind), -1)  # (B, G)
        groups, most = unfinished.any(1).nonzero()[:, 0], int(unfinished.sum(1).max())
        if len(groups) * most > 0.9 * unfinished.numel():
            return
        first = unfinished.int().argsort(dim=1, descending=True, stable=True)[groups, :most]
        keep = (first + groups[:, None] * unfinished.shape[1]).flatten()
        for name in ("position", "logits", "done", "slot"):
            setattr(self, name, getattr(self, name)[keep])
        self.behind, self.prompt_kv = self.behind[groups], [x[:, groups] for x in self.prompt_kv]
        self.own_kv = [[x[groups[:, None], :, first].transpose(1, 2) for x in kv] for kv in self.own_kv]

    @torch.inference_mode()
    def decode(self, graphs):
        """Until all rows stop. `graphs` (CUDA): a step is a captured graph, `done` is read at times."""
        C, stride = self.tokens.shape[1], 256 if graphs else 16
        for t in range(C):
            if t % stride == 0:  # room for more; the pass after it also warms up, as a capture needs
                self.drop_finished()
                self.own_kv = [[F.pad(x, (0, 0, 0, min(stride, C - t))) for x in kv] for kv in self.own_kv]
                advance = self.advance
            elif graphs and t % stride == 1:
                advance = capture(self.advance)
            advance()
            if (not graphs or t % 16 == 15) and bool(self.done.all()):
                break

def capture(advance):
    """Replay of `advance` as a CUDA graph. Capturing runs nothing."""
    torch.cuda.synchronize()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        advance()
    return graph.replay

@torch.no_grad()
def rollout(model, tokenizer, prompts, seeds, max_completion_length, temperature):
    """Per prompt [(ids, logps (C,) fp32, finished)], by weights, prompt, seed alone; gives it "image_features"."""
    r = Rollout(model.eval(), tokenizer, prompts, seeds, max_completion_length, temperature)
    r.decode(graphs=r.logits.is_cuda)
    ids = [[i for i in row if i >= 0] for row in r.tokens.tolist()]
    rows = zip(ids, r.logps.cpu(), torch.isin(r.tokens, r.stop).any(-1).tolist(), strict=True)
    return [[(i, logps[: len(i)], end) for i, logps, end in islice(rows, len(group))] for group in seeds]
# <<< shared:rollout

# >>> shared:engine (copy of train_sft.py)
DS_CONFIG = """{"zero_optimization": {
    "stage": 2, "overlap_comm": true, "reduce_bucket_size": 560000000, "allgather_bucket_size": 560000000}}"""

def usable(samples, bad, num_tokens, most_tokens, args):
    """(samples of up to `most_tokens`, how many the run takes, its steps); num_tokens raises for bad ones"""
    B, world_size = args.train_batch_size, dist.get_world_size()
    def look(sample):
        try:
            return num_tokens(sample), None
        except BAD as e:
            return math.inf, f"{sample['id']}: {type(e).__name__} {e}"
    with ThreadPoolExecutor() as pool:
        found = [[*pool.map(look, samples)] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    bad = bad + [line for _, line in found[0] if line]
    kept = [s for s, (n, _) in zip(samples, found[0], strict=True) if n <= most_tokens]
    print0("\n".join([f"{len(kept)} of {len(samples)} rows are of use, the others too long or bad", *bad]))
    if len(bad) > args.max_bad_rows or not kept or B % world_size:
        want = f"at most --max_bad_rows {args.max_bad_rows}, at least 1, a multiple of {world_size} ranks"
        raise InputError(f"{len(bad)} bad rows, {len(kept)} of use, --train_batch_size {B}; want {want}")
    total = args.max_steps * B if args.max_steps > 0 else max(1, int(args.num_epochs * len(kept)))
    return kept, total, math.ceil(total / B)  # the last step takes what is left

def draw_steps(samples, read, first, total_steps, args):
    """(step, this rank's inputs, {"data": seconds waited}) from step `first` on; threads read a step ahead."""
    rank, world_size, B = dist.get_rank(), dist.get_world_size(), args.train_batch_size
    epochs = range(math.ceil(total_steps * B / len(samples)))
    order = [s | {"epoch": e} for e in epochs for s in random.Random(f"{args.seed}:{e}").sample(samples, len(samples))]
    mine = [order[i + rank : i + B : world_size] for i in range(0, total_steps * B, B)] + [[]]  # by step
    with ThreadPoolExecutor(4) as pool:
        ahead = pool.map(read, mine[first - 1])
        for step in range(first, total_steps + 1):
            began, now, ahead = time.perf_counter(), ahead, pool.map(read, mine[step])
            yield step, [*now], {"data": time.perf_counter() - began}

class CompletionLogProbs(torch.nn.Module):
    """Packed row -> fp32 log-probs (N,) of its completion tokens with the sampler's temperature and banned ids."""
    def __init__(self, model, banned=(), temperature=1.0, chunk=2**26):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.size = max(1, chunk // model.config.get_text_config().vocab_size)  # positions; `chunk` counts logits
        self.register_buffer("banned", torch.tensor(banned, dtype=torch.long, device=model.device), persistent=False)

    def score(self, hidden, targets):
        logits = self.model.lm_head(hidden).float().index_fill(-1, self.banned, -torch.inf) / self.temperature
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    def forward(self, row):
        hidden = hidden_states(self.model, row)[row.at]  # lm_head runs on these N alone
        if len(hidden) <= self.size:  # else in chunks, computed again in the backward pass
            return self.score(hidden, row.targets)
        parts = zip(hidden.split(self.size), row.targets.split(self.size), strict=True)
        return torch.cat([checkpoint(self.score, *part, use_reentrant=False) for part in parts])

def start_engine(scorer, args):
    """DeepSpeed around a CompletionLogProbs. bf16 weights have bf16 gradients and an fp32 optimizer."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ on a CPU
    model, path = scorer.model, Path(args.deepspeed or Path(__file__).with_name("ds_config.json"))
    model.model.visual.requires_grad_(not args.freeze_vision)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = json.loads(path.read_text() if args.deepspeed or path.exists() else DS_CONFIG)
    config["zero_optimization"] |= {"stage": args.zero_stage} if args.zero_stage else {}
    config |= {"gradient_clipping": args.max_grad_norm, "bf16": {"enabled": model.dtype == torch.bfloat16}}
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # main() says where steps end
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": model.device.type == "cuda"}
    optimizer = torch.optim.AdamW([p for p in scorer.parameters() if p.requires_grad], **options)
    dist.barrier()  # all have loaded: DeepSpeed's groups wait 10 minutes alone
    return deepspeed.initialize(model=scorer, optimizer=optimizer, config=config)[0]

def fill_rows(items, budget, device):
    """Items, longest first, in rows of up to `budget` "num_tokens"; as many on every rank."""
    rows = []
    for item in sorted(items, key=lambda x: -x["num_tokens"]):
        fits = [row for row in rows if sum(x["num_tokens"] for x in [*row, item]) <= budget]
        rows += [] if fits else [[]]
        (fits or rows[-1:])[0].append(item)
    dist.all_reduce(most := torch.tensor(max(1, len(rows)), device=device), op=dist.ReduceOp.MAX)
    return rows + [[]] * (int(most) - len(rows))

def set_learning_rate(engine, update, updates, args):
    """For update 0..updates - 1; linear warm-up."""
    warmup = math.ceil(args.warmup_ratio * updates)
    done = max(0, update - warmup) / max(1, updates - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[args.lr_scheduler]
    engine.optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, (update + 1) / max(1, warmup)) * shape

def all_sum(values, device):
    dist.all_reduce(total := torch.tensor(values, dtype=torch.float64, device=device))
    return total.tolist()

@contextmanager
def timed(seconds, phase):
    """Adds the block's wall time to seconds[phase]; waits for the device."""
    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began

def log_step(engine, out, row, shown, times, row_tokens, steps_left, args, completions=()):
    """Adds to a step's metrics what it cost, appends them to metrics.jsonl, prints those `shown`."""
    norm, seconds, cuda = engine.get_global_grad_norm(), sum(times.values()), engine.device.type == "cuda"
    if not math.isfinite(row["loss"]) or engine.optimizer.overflow:  # then DeepSpeed did not apply the step
        raise InputError(f"step {row['step']}: loss {row['loss']}, gradient {norm}; want a lower --learning_rate")
    row |= {"grad_norm": float(norm or 0.0), "learning_rate": engine.optimizer.param_groups[0]["lr"]}
    row["mem_gib"] = torch.cuda.max_memory_reserved() / 2**30 if cuda else getrusage(RUSAGE_SELF).ru_maxrss / 2**20
    row |= {f"time/{phase}": s for phase, s in times.items()}
    row |= {"step_time": seconds, "train_tokens_per_second": row_tokens / times["train"]}  # of this rank
    if engine.global_rank == 0:
        for name, lines in (("metrics", [row]), ("samples", completions)):
            with open(out / f"{name}.jsonl", "a", encoding="utf-8") as f:
                f.writelines(to_json(line, allow_nan=False) + "\n" for line in lines)
        if args.wandb:
            import wandb
            wandb.log(row, step=row["step"])
        shown = " | ".join(f"{key} {row[key]:.4g}" for key in ["loss", *shown, "grad_norm", "learning_rate", "mem_gib"])
        phases = ", ".join(f"{phase} {s:.1f}" for phase, s in times.items())
        end = f"{seconds:.1f} s ({phases}) | eta {steps_left * seconds / 60:.1f} min"
        print0(f"step {row['step']}/{row['step'] + steps_left} | {shown} | {end}")

def save_step(engine, processors, out, state, stop, steps_left, args):
    """A checkpoint every --save_steps and on SIGTERM, final/ at the end. A folder is complete or absent."""
    if not (stop or not steps_left or args.save_steps and state["step"] % args.save_steps == 0):
        return
    folder = out / (f"checkpoint-{state['step']}" if steps_left else "final")
    part, sharded = Path(f"{folder}.tmp"), engine.zero_optimization_stage() == 3
    shutil.rmtree(part, ignore_errors=True)  # by the first rank
    dist.barrier()
    if steps_left:
        engine.save_checkpoint(str(part), tag="engine")
    weights = engine._zero3_consolidated_16bit_state_dict() if sharded else engine.module.state_dict()
    if engine.global_rank == 0:  # a Hugging Face folder, renamed last
        weights = {name.removeprefix("model."): w for name, w in weights.items()}
        engine.module.model.save_pretrained(part, state_dict=weights)
        for processor in processors[:2]:
            processor.save_pretrained(part)
        write(part / "state.json", to_json(state | {"ranks": dist.get_world_size()}))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
        keep = args.save_total_limit if steps_left or args.keep_checkpoints else 0
        for old in checkpoints(out)[::-1][keep:]:
            shutil.rmtree(old)
    dist.barrier()
    if stop:
        raise SystemExit(f"SIGTERM: saved after step {state['step']}; the same command goes on from there")

def checkpoints(out):
    """Complete checkpoints of a run, oldest first."""
    return sorted(out.glob("checkpoint-*[0-9]"), key=lambda folder: int(folder.name.split("-")[1]))

def resume(engine, out, args):
    """state.json of the newest checkpoint, which is loaded, or of step 0; cuts the logs back to it."""
    state = {"step": 0, "num_tokens": 0}
    for folder in checkpoints(out)[-1:]:
        state = json.loads((folder / "state.json").read_bytes())
        tag = engine._config.load_universal_checkpoint = state["ranks"] != dist.get_world_size() and "universal"
        if tag and not (folder / tag).exists():
            make = "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder engine"
            raise InputError(f"want {state['ranks']} ranks, or: cd {folder} && {make} --output_folder {tag}")
        engine.load_checkpoint(str(folder), tag=tag or "engine")
        print0(f"goes on from {folder}")
    for log in out.glob("*s.jsonl") if engine.global_rank == 0 else ():  # metrics, samples
        write(log, *(to_json(row) for row in read_jsonl(log, unfinished=True) if row["step"] <= state["step"]))
    if args.wandb and engine.global_rank == 0:
        key = hashlib.md5(bytes(out.resolve())).hexdigest()
        import wandb
        wandb.init(project=args.wandb, name=out.name, id=key, resume="allow", config=vars(args))
    return state
# <<< shared:engine

if __name__ == "__main__":
    try:
        main()
    except (InputError, FileNotFoundError) as e:
        raise SystemExit(f"train_grpo: {e}") from None
