"""Asks a model about images and scores its boxes (KVG-Bench) or letters; the one script that asks a model.

reads   --bench: KVG-Bench parquet, samples.jsonl of synth_data.py, or any JSONL with image and question (or phrase),
        scored by a box (answer or bbox_px), by a letter or name (options, answer), or not at all (neither).
        --model to ask, or --predictions FILE made elsewhere
writes  --out: predictions.jsonl (a line per answer: what filter.py and tools/ read), metrics.json, table.md, run.json
  toy      python eval_kvg.py --bench runs/toy/world/kvg-bench.parquet --model runs/toy/train_grpo/final --out runs/eval
  8 GPUs   torchrun --nproc_per_node 8 eval_kvg.py --bench kvg-bench.parquet --model runs/grpo/final --out runs/eval
  for RL   ... --bench runs/synth_grpo/samples.jsonl --num_samples 4 --temperature 1      (filter.py reads the answers)

A case is correct if its one box has IoU >= 0.5 with the truth (arXiv 2503.12797). Differences from the released
evaluator, whose view of the same answers is `acc_official`: the parser is that of the reward, so a box in the reasoning
alone, two boxes or a cut-off answer are no box; decoding is greedy; the pixel cap is equal for all models; intervals
know that questions on one image are not independent. An answer depends on weights, row and (seed, id, sample) alone.
"""

import argparse
import fcntl
import hashlib
import io
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = p.add_argument
    # fmt: off
    add("--bench", required=True, help="KVG-Bench .parquet, or .jsonl with image and question")
    add("--image_root", help="folder that the rows' images are relative to (default: that of the bench)")
    add("--max_bad_rows", type=int, default=0, help="rows without question or readable image to skip, count and list")
    add("--out", required=True, help="run folder; an interrupted run is continued, a finished one scored again")
    add("--model", help="Hugging Face folder or name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    add("--predictions", help="score this JSONL instead: question_id, response; grid [w, h] of boxes in px")
    add("--prompt", default="r1", choices=["r1", "direct", "cot", "json"], help="behind a question; r1 reasons first")
    add("--prompt_suffix", help="behind it instead; --prompt then says where the answer is looked for")
    add("--num_samples", type=int, default=1, help="answers per question")
    add("--temperature", type=float, default=0.0, help="of the sampler; 0: greedy")
    add("--max_completion_length", type=int, default=1024, help="tokens; a longer answer is cut and counted")
    add("--max_pixels", type=int, default=401408, help="pixel cap of an image (paper: 401,408)")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="auto: bfloat16 on CUDA")
    add("--seed", type=int, default=0, help="of the sampler")
    add("--batch_size", type=int, default=128, help="answers decoded at once on one rank")
    add("--seen", nargs="*", default="aircraft car reptilia bird food".split(), help="categories trained on")
    # fmt: on
    args = p.parse_args(argv)
    if bool(args.model) == bool(args.predictions) or args.num_samples > 1 and args.temperature <= 0:
        p.error("want one of --model and --predictions, and a --temperature for more than one of --num_samples")
    return args

def prompt_suffix(sample, args):
    """What follows a question; r1 alone has a form for letters."""
    letter, as_json = R1_SUFFIX.replace("bounding box", "letter"), ", output its bbox coordinates using JSON format."
    boxes = {"r1": R1_SUFFIX, "cot": ". Let's think step by step", "json": as_json}
    prompts = {"r1": letter} if sample["options"] else boxes
    return prompts.get(args.prompt, "") if args.prompt_suffix is None else args.prompt_suffix

# ---- asking ----
def ask(samples, args):
    """{id: answers} of the model on rank 0, else None. Every rank appends what it finished to its own part file."""
    rank, world_size, device = init_dist()
    out, k, C = Path(args.out), args.num_samples, args.max_completion_length
    answered, part = read_answers(out), out / f"part-{rank}.jsonl"
    todo = [s for s in samples if len(answered.get(s["id"], ())) < k]
    print0(f"eval_kvg: {len(samples)} questions, {len(samples) - len(todo)} answered before, {world_size} ranks")
    dist.barrier()  # all have read before one writes
    write(part, *map(to_json, read_jsonl(part, unfinished=True)))  # whose last line a kill may have cut
    todo, size = todo[rank::world_size], max(1, args.batch_size // k)  # questions at once
    batches = [todo[i : i + size] for i in range(0, len(todo), size)]
    if todo:
        processors, model = load_processors(args.model, args.max_pixels), load_model(args.model, args.dtype, device)
        asks, learned = prompt_suffix(todo[0], args), getattr(model.config, "prompt_suffix", None)
        if learned not in (None, asks):
            print0(f"note: the model learned with {learned!r} behind a question and is asked with {asks!r}")
    def read(s):
        try:
            return s, chat_inputs(processors, s["image"], s["question"] + prompt_suffix(s, args))
        except BAD as e:
            print(f"skipped {s['id']}: {type(e).__name__} {e}", flush=True)
    with ThreadPoolExecutor(4) as pool, open(part, "a") as f:
        ahead = pool.map(read, batches[0] if batches else [])
        for i in tqdm(range(len(batches)), desc="eval_kvg", disable=None if rank == 0 else True):
            asked = [pair for pair in ahead if pair]
            ahead = pool.map(read, batches[i + 1] if i + 1 < len(batches) else [])  # while the model works
            seeds, limits = [[f"{args.seed}:{s['id']}:{g}" for g in range(k)] for s, _ in asked], (C, args.temperature)
            rolled = rollout(model, processors[0], [p for _, p in asked], seeds, *limits) if asked else []
            for (s, p), completions in zip(asked, rolled, strict=True):
                for g, (ids, _, finished) in enumerate(completions):
                    text = processors[0].decode(ids).removesuffix("<|im_end|>").removesuffix("<|endoftext|>")
                    answer = {"question_id": s["id"], "sample": g, "response": text, "num_tokens": len(ids)}
                    f.write(to_json(answer | {"finished": finished, "grid": p["grid"]}) + "\n")
            f.flush()
    dist.barrier()
    return read_answers(out) if rank == 0 else None

def read_answers(path):
    """{id: answers, in order of `sample`} of a file, or of what there is of a run in a folder."""
    answers, columns = {}, ("sample", "response", "num_tokens", "finished", "grid")
    for file in [path / "predictions.jsonl", *path.glob("part-*.jsonl")] if path.is_dir() else [path]:
        for number, r in enumerate(read_jsonl(file, unfinished=path.is_dir()), 1):
            answer, given = {c: r[c] for c in columns if c in r}, answers.setdefault(str(r.get("question_id")), {})
            first = given.setdefault(r.get("sample", 0), answer)  # a killed run may have asked twice
            if not isinstance(r.get("response"), str) or first != answer and not path.is_dir():
                raise InputError(f"{file}:{number}: {str(r)[:99]}; want a question_id and its one response")
    return {key: [given[g] for g in sorted(given)] for key, given in answers.items()}

# ---- scoring ----
def parse_choice(text, options, mode):
    """The option that an answer names, or None: by its letter, as B, B. or (B), by its own text, or by both."""
    region = (answer_text(text, mode) or "").strip()
    letters = zip("ABCDEFGH", map(re.escape, options), options, strict=False)
    form = r"(?:\({0}\)|{0}[.:)]?)(?:\s*{1})?\.?|(?i:{1})\.?"
    named = {option for letter, name, option in letters if re.fullmatch(form.format(letter, name), region)}
    return named.pop() if len(named) == 1 else None

# What deepperception/eval/evaluate.py of github.com/thunlp/KARL at 01b53d6^ looks for, in this order, in a whole text.
# So that brackets cannot stall it, (?=(.*?)...)\1 goes to the first point of a line; behind it is nothing else.
OFFICIAL_POINTS = r"\((\d*),.*?(\d*)\),\((\d*),(\d*)\)"
OFFICIAL_PATTERNS = (
    rf"<answer>(?=(.*?)\(\d*,)\1{OFFICIAL_POINTS}</answer>",
    rf"So the answer is(?=(.*?)\(\d*,)\1{OFFICIAL_POINTS}",
    OFFICIAL_POINTS,
    r"\(([^,\n]*),([^)\n]*)\)[^(\n]*\(([^,\n]*),([^)\n]*)\)",  # any text counts as a number here
    r"\[(\d*), (\d*), (\d*), (\d*)\]",
    r"\[" + r"((?:(?!, ).)*), " * 3 + r"([^]\n]*)\]",  # here too
    r"\((\d*), (\d*), (\d*), (\d*)\)",
    r"\((\d*), (\d*)\)\n?.*?\((\d*), (\d*)\)",
)

def official_iou(text, truth):
    """IoU of the last find of the first pattern that finds any, in fp32, as there. What is no number makes the box
    (0, 0, 0, 0), which is also that of no find; a sum below 4 is scaled by 1000; boxes may be reversed or infinite."""
    text, box = re.sub(r"<\|\w+\|>", "", text)[-10_000:], [0.0] * 4  # no tokens, as there; the time grows as n squared
    if matches := next((m for p in OFFICIAL_PATTERNS if (m := list(re.finditer(p, text)))), None):
        first, *rest = matches[-1].groups()[-4:]
        try:
            box = [float(v) for v in (first.replace("[", "").replace("x", ""), *rest)]
        except ValueError:
            pass
    with np.errstate(all="ignore"):
        a, b = np.array([v * (1000 if sum(box) < 4 else 1) for v in box], np.float32), np.array(truth, np.float32)
        width, height = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
        areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
        iou = float(width * height / (areas[0] + areas[1] - width * height))
    return iou if iou > 0 else 0.0  # not a number is 0, too

def score(sample, answer, mode):
    """A line of predictions.jsonl. An answer without one valid box has pred_bbox_1000 None and IoU 0."""
    image, response, truth, options = (sample["image"], answer["response"], sample["bbox_1000"], sample["options"])
    row = {"question_id": sample["id"]} | {key: sample[key] for key in ("category", "entity", "question")} | answer
    row["image"] = os.path.abspath(image) if isinstance(image, str) else None
    row["image_id"] = sample["image_id"] or row["image"] or hashlib.md5(image).hexdigest()
    if options:
        choice = parse_choice(response, options, mode)
        row |= {"options": options, "answer": sample["answer"], "choice": choice}
        return row | {"correct": choice == sample["answer"] if sample["answer"] else None}
    box = parse_bbox(response, mode, tuple(answer.get("grid") or (1000, 1000)))
    row |= {"pred_bbox_1000": box, "gt_bbox_1000": truth, "correct": None}  # None: nothing to be right about
    if truth:
        iou = box_iou(box, truth) if box else 0.0
        row |= {"iou": iou, "correct": iou >= 0.5, "official_iou": official_iou(response, truth)}
    return row

def accuracy_interval(correct, image_ids):
    """95 % interval [lo, hi] of an accuracy: Wilson's at the effective number of questions; None for a single image.
    The spread between images tells how many independent questions the n are worth, n at most; if all are right, or all
    wrong, it tells nothing: an image counts once then. Source: Dean and Pagano 2015, J. Survey Stat. Methodol. 3(4)."""
    image = np.unique(image_ids, return_inverse=True)[1]
    right, asked = np.bincount(image, weights=correct), np.bincount(image)  # per image, which carry several questions
    n, images, z = len(correct), len(asked), 1.9599639845400536
    if images < 2:
        return None
    p, free = right.sum() / n, images - 1
    variance = ((right - p * asked) ** 2).sum() * images / free / n**2
    # Student's t, Abramowitz and Stegun 26.7.5, off by less than 1 % from 6 images on
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    effective = min(n, p * (1 - p) / variance) if variance > 0 else images
    middle = p + t * t / (2 * effective)
    half = t * math.sqrt(p * (1 - p) / effective + (t / (2 * effective)) ** 2)
    low, high = ((middle + side * half) / (1 + t * t / effective) for side in (-1, 1))
    return [min(p, max(0.0, low)), max(p, min(1.0, high))]  # at 0 and 1 they may be off in the last digit

def split_metrics(rows):
    """Accuracy with its interval and so on, 0..1, of what the rows have: boxes, letters or both; None for no rows."""
    if not rows:
        return None
    means = {
        "acc": [r["correct"] for r in rows],
        "parse_rate": [(r["choice"] if "options" in r else r["pred_bbox_1000"]) is not None for r in rows],
        "acc_official": [r["official_iou"] >= 0.5 for r in rows if "iou" in r],
        "mean_iou": [r["iou"] for r in rows if "iou" in r],
        "chance": [1 / len(r["options"]) for r in rows if "options" in r],
    }
    interval = accuracy_interval([float(c) for c in means["acc"]], [r["image_id"] for r in rows])
    return {"n": len(rows), "acc_ci95": interval} | {key: sum(v) / len(v) for key, v in means.items() if v}

def bench_metrics(rows, seen):
    """Metrics of every split and category, and of the completions where it is known how they ended."""
    scored = [r for r in rows if r["correct"] is not None]
    names = sorted({r["category"] for r in scored}, key=lambda c: (c not in seen, c))
    metrics = {"all": split_metrics(scored), "seen_categories": seen}
    for split in ("seen", "unseen"):
        metrics[split] = split_metrics([r for r in scored if (r["category"] in seen) == (split == "seen")])
    metrics["categories"] = {c: split_metrics([r for r in scored if r["category"] == c]) for c in names}
    if told := [r for r in rows if None not in (r.get("num_tokens"), r.get("finished"))]:
        tokens, clipped = sum(r["num_tokens"] for r in told), sum(not r["finished"] for r in told)
        metrics |= {"completions/num_tokens": tokens, "completions/mean_length": tokens / len(told)}
        metrics |= {"completions/num_clipped": clipped, "completions/clipped_ratio": clipped / len(told)}
    return metrics

def metrics_table(metrics):
    """Markdown: a line per split and category; in %, but for the IoU."""
    lines = ["| split | cases | accuracy | 95 % interval | official | mean IoU | parsed |", "|:--" + "|--:" * 6 + "|"]
    for name, m in [*((split, metrics[split]) for split in ("all", "seen", "unseen")), *metrics["categories"].items()]:
        if m:
            name += " (seen)" * (name in metrics["seen_categories"])
            ci95 = "{:.1f} to {:.1f}".format(*(100 * v for v in m["acc_ci95"])) if m["acc_ci95"] else "-"
            box = f"{100 * m['acc_official']:.1f} | {m['mean_iou']:.3f}" if "mean_iou" in m else "- | -"
            lines.append(f"| {name} | {m['n']} | {100 * m['acc']:.1f} | {ci95} | {box} | {100 * m['parse_rate']:.1f} |")
    return "\n".join(lines)

def main():
    args = parse_args()
    # 1. questions, and what may not change between two runs into one folder
    (samples, bad), out, asked = read_samples([args.bench], args.image_root), Path(args.out), {}
    for s in samples:
        s["bbox_1000"] = s["bbox_1000"] or parse_bbox(s["answer"], "direct")
        if args.model and isinstance(s["image"], str) and not os.path.isfile(s["image"]):
            bad.append(f"{args.bench} ({s['id']}): no image {s['image']}; want a path from its folder or --image_root")
        elif s["answer"] and not (s["answer"] in s["options"] if s["options"] else s["bbox_1000"]):
            bad.append(f"{args.bench} ({s['id']}): answer {s['answer']!r}; want a box, one of `options`, or none")
        else:
            asked[s["id"]] = s
    def limit_bad_rows():
        if len(bad) > args.max_bad_rows or not asked:
            found = f"{len(asked)} questions, {len(bad)} bad rows, {' | '.join(bad[:5])}"
            raise InputError(f"{args.bench}: {found}; want some, and at most --max_bad_rows")
    limit_bad_rows()
    if os.environ.get("RANK", "0") == "0":
        files = [Path(args.bench), *sorted(Path(args.model or out / "none").glob("*.safetensors"))]
        settings = vars(args) | {"files": {str(f): [f.stat().st_size, f.stat().st_mtime] for f in files}}
        start_run(out, settings, settings.keys() - {"out", "batch_size", "seen", "image_root", "max_bad_rows"})
    # 2. answers: a model's, on all ranks, or a file's
    answers = ask([*asked.values()], args) if args.model else read_answers(Path(args.predictions))
    if answers is not None:  # rank 0 scores
        bad += [f"{key!r}: no answer" for key in asked.keys() - answers.keys()]
        bad += [f"{key!r}: no question" for key in answers.keys() - {s["id"] for s in samples}]
        limit_bad_rows()
        # 3. scores
        rows = [score(s, answer, args.prompt) for key, s in asked.items() for answer in answers.get(key, ())]
        metrics = bench_metrics(rows, [c.lower() for c in args.seen])
        table = metrics_table(metrics)
        write(out / "predictions.jsonl", *map(to_json, rows))
        write(out / "metrics.json", json.dumps(metrics | {"bad_rows": bad, "args": vars(args)}, indent=1))
        write(out / "table.md", table)
        for part in out.glob("part-*.jsonl"):
            part.unlink()
        print(f"{table}\neval_kvg: {len(rows)} answers, {len(bad)} bad rows -> {out}/predictions.jsonl", flush=True)
    if args.model:
        leave()

# ======== plumbing: the same bytes stand in train_grpo.py, and most of them in train_sft.py ========

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

# >>> shared:answers (source)
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

# >>> shared:model (source)
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

# >>> shared:rollout (source)
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

if __name__ == "__main__":
    try:
        main()
    except (InputError, FileNotFoundError) as e:
        raise SystemExit(f"eval_kvg: {e}") from None
