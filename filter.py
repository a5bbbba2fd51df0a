"""Drops bad chains of thought (--stage cot), keeps what RL can learn from (grpo), says what a model knows (mastery).

reads   --samples: rows of gen_cot.py, or others with images and messages (cot), or of synth_data.py (grpo)
        --predictions (grpo, mastery): what eval_kvg.py was answered; this script asks no model
writes  --out: samples.jsonl, rejected.jsonl (with reasons), stats.json, run.json; grpo: pass_rate.png and mastery.json

  cot      python filter.py --stage cot --samples runs/gen_cot/samples.jsonl --out runs/filter_cot
  grpo     eval_kvg.py --bench SAMPLES --model runs/cot_sft/final --num_samples 4 --temperature 1 --out runs/rollouts
           python filter.py --stage grpo --samples SAMPLES --predictions runs/rollouts/predictions.jsonl --out runs/kept
  mastery  tools/rows.py choices, eval_kvg.py, then filter.py --stage mastery --predictions FILE --out runs/mastery

The paper (arXiv 2503.12797) drops what the stage-1 model solves in 4 or 0 of 4 rollouts, at an IoU that it does not
state, and filters no chains. mastery.json: an entity's mean pass rate (grpo), or share of right choices (mastery).
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = p.add_argument
    # fmt: off
    add("--stage", required=True, choices=["cot", "grpo", "mastery"], help="chains, difficulty for RL, or knowledge")
    add("--samples", help="cot, grpo: rows, .jsonl")
    add("--predictions", help="grpo, mastery: predictions.jsonl of eval_kvg.py")
    add("--image_root", help="where image paths of the rows count from (default: the folder of --samples)")
    add("--out", required=True, help="output folder")
    add("--min_words", type=int, default=20, help="cot: of a chain; the same rules as in gen_cot.py")
    add("--max_words", type=int, default=800, help="cot: of a chain")
    add("--iou", type=float, nargs="+", default=[0.5, 0.8], help="grpo: correct from the first on; rows tell all rates")
    add("--min_correct", type=int, default=1, help="grpo: fewest correct of k to keep (paper: 1)")
    add("--max_correct", type=int, help="grpo: most correct of k to keep (default and paper: k - 1)")
    # fmt: on
    args = p.parse_args(argv)
    if (args.stage != "mastery") != bool(args.samples) or (args.stage != "cot") != bool(args.predictions):
        p.error("want --samples for cot and grpo, --predictions for grpo and mastery")
    return args


def broken_row(row, seen, args):
    """Why a row's chain of thought is not to be learned from, or None. `seen` counts the (image, text) so far."""
    said = {m["role"]: m["content"] for m in row["messages"]}
    match = re.fullmatch(r"<think>(.*)</think>\s*<answer>(.*)</answer>", said["assistant"].strip(), re.S)
    if not match or re.search("</?(?:think|answer)>", match[1] + match[2]):
        return "not one <think> and one <answer> block"
    asked = re.findall(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", said["user"] + match[2], re.S)[:1]
    names = asked + [e["entity"] for e in row.get("entities") or ()]
    given, truth = (boxes_in(written, names) for written in (match[2], row.get("answer") or match[2]))
    if not given or not truth or None in truth or any(box != truth[0] for box in given + truth):
        return "answer is not the ground-truth box"
    seen[row["images"][0], match[0]] += 1
    rule = broken_rule(match[1], asked and asked[0], names, truth[0], args)
    return rule or ("duplicate" if seen[row["images"][0], match[0]] > 1 else None)


def rate_rows(rows, args, by_entity):
    """Gives every row its pass rates; yields why RL cannot learn from it, or None. `by_entity` collects mastery."""
    answers = defaultdict(list)
    for a in read_jsonl(args.predictions):
        answers[str(a.get("question_id"))].append(a)
        if "options" in a:
            by_entity[a.get("entity") or a.get("answer") or "?"].append(a["correct"])
    k = max(map(len, answers.values()), default=0)
    most = k - 1 if args.max_correct is None else args.max_correct
    for r in rows:
        given = answers[str(r["id"])]
        if len(given) != k or k < 2 or not all("iou" in a for a in given):
            raise InputError(f"{args.predictions}: {len(given)} answers to {r['id']}; want {max(k, 2)} with an iou")
        rates = {iou: sum(a["iou"] >= iou for a in given) / k for iou in args.iou}
        r |= {"pass_rate": rates[args.iou[0]], "pass_rate_at": rates, "num_rollouts": k}
        by_entity[given[0].get("entity") or "?"].append(r["pass_rate"])
        correct = round(r["pass_rate"] * k)
        yield "too hard" if correct < args.min_correct else "trivial" if correct > most else None


def main():
    args, seen, by_entity = parse_args(), Counter(), defaultdict(list)
    out, rows = Path(args.out), read_jsonl(args.samples) if args.samples else []
    # 1. rows with an id, and the paths of their images counted from --out
    folder = Path(args.image_root or Path(args.samples or ".").parent).resolve()
    for number, r in enumerate(rows, 1):
        images, said = r.get("images") or [r.pop("image", None)], {m.get("role") for m in r.get("messages") or ()}
        if not images[0] or args.stage == "cot" and not said >= {"user", "assistant"}:
            raise InputError(f"{args.samples}:{number}: {[*r]}; want images, and messages of user and assistant")
        images = [i if os.path.isabs(i) else os.path.relpath(folder / i, out.resolve()) for i in images]
        r |= {"id": r.get("question_id") or r.get("id", number), "images": images}
    if args.samples and len({str(r["id"]) for r in rows}) < max(1, len(rows)):
        raise InputError(f"{args.samples}: {len(rows)} rows; want some, and no id twice")
    start_run(out, vars(args), {"stage"})
    # 2. what speaks against each, and how well the entities are known
    reasons = [broken_row(r, seen, args) for r in rows] if args.stage == "cot" else [*rate_rows(rows, args, by_entity)]
    if args.stage != "cot":
        mastery = {e: {"mastery": sum(right) / len(right), "n": len(right)} for e, right in sorted(by_entity.items())}
        write(out / "mastery.json", to_json(mastery, indent=1))
    if args.stage == "mastery":
        return print(f"filter: {len(mastery)} entities -> {out}/mastery.json")
    # 3. the kept and the rejected
    kept = [r for r, reason in zip(rows, reasons, strict=True) if not reason]
    rejected = [r | {"reason": reason} for r, reason in zip(rows, reasons, strict=True) if reason]
    stats = {"rows": len(rows), "kept": len(kept), "rejected": Counter(filter(None, reasons))}
    if args.stage == "grpo":
        stats["pass_rate_at"] = {iou: sum(r["pass_rate_at"][iou] for r in rows) / len(rows) for iou in args.iou}
        from matplotlib.figure import Figure
        ax = Figure(figsize=(5, 3), layout="tight").add_subplot(xlabel="pass rate; kept rows are blue", ylabel="rows")
        ax.hist([[r["pass_rate"] for r in part] for part in (kept, rejected)], 21, range=(0, 1), stacked=True)
        ax.figure.savefig(out / "pass_rate.png", dpi=110)
    write(out / "rejected.jsonl", *map(to_json, rejected))
    write(out / "stats.json", to_json(stats, indent=1))
    if not kept:
        raise InputError(f"{out}/rejected.jsonl: 0 of {len(rows)} rows kept, {dict(stats['rejected'])}; want some")
    write(out / "samples.jsonl", *map(to_json, kept))
    print(f"filter: {to_json(stats)} -> {out}/samples.jsonl")


# ======== plumbing: the same bytes stand in other scripts ========
# >>> shared:chain_rules (copy of gen_cot.py)
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
POINT, FOUR = rf"\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)", rf"{NUMBER}\s*(?:,\s*{NUMBER}\s*){{3}}"
BOXES = re.compile(rf"{POINT}(?:\s*,\s*{POINT})+|\(\s*{FOUR}\)|\[\s*{FOUR}\]")
NAMES = re.compile(r'<\|object_ref_start\|>.*?<\|object_ref_end\|>|"label":\s*"(?:[^"\\]|\\.)*"', re.S)
PAIRS = re.compile(r"<\|(object_ref|box)_start\|>(?:(?!<\|).)*<\|\1_end\|>", re.S)  # the only tokens that rows may hold
MARKUP = re.compile(r"</?(?:think|answer|image|video)>|<\|", re.I)  # it would open a turn, a block or an image


def boxes_in(text, names):
    """[x1, y1, x2, y2] of each box of a text, None for one that is none. A name is no box, as "911 (901, 930, 964)"."""
    text = NAMES.sub("_", text)
    for name in sorted((n for n in names if re.search(r"[(\[]", n)), key=len, reverse=True):
        text = re.sub(re.escape(name), "_", text, flags=re.I)
    boxes = [[float(v) for v in re.findall(NUMBER, m[0])] for m in BOXES.finditer(text)]
    return [b if len(b) == 4 and b[0] < b[2] <= 1000 and b[1] < b[3] <= 1000 else None for b in boxes]


def box_iou(a, b):
    """IoU of boxes (x1, y1, x2, y2)."""
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def broken_rule(chain, target, names, bbox_1000, args):
    """The first rule that a chain of thought breaks, or None. `target`: a name, if known; `names`: of all entities."""
    boxes, lines = boxes_in(chain, names), [line.strip() for line in chain.split("\n") if line.strip()]
    rules = {
        "markup": MARKUP.search(PAIRS.sub("", chain)),
        f"not {args.min_words} to {args.max_words} words": not args.min_words <= len(chain.split()) <= args.max_words,
        "target not named": target and not re.search(rf"(?<!\w){re.escape(target)}(?!\w)", chain, re.I),
        "a box in the reasoning is none": None in boxes,
        "ends at another box than the answer": boxes and boxes[-1] and box_iou(boxes[-1], bbox_1000) < 0.5,
        "repeats itself": any(len({*lines[i : i + 4]}) == 1 for i in range(len(lines) - 3)),  # four times in a row
    }
    return next((rule for rule, broken in rules.items() if broken), None)


# <<< shared:chain_rules


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


if __name__ == "__main__":
    try:
        main()
    except (InputError, FileNotFoundError) as e:
        raise SystemExit(f"filter: {e}") from None
