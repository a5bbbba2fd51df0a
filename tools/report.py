"""What there is to see after a run: pages of cases, tables, tests and curves, from the files that the scripts wrote.

  run        python tools/report.py run runs/toy                 all that a run folder of run_all.sh has, and its table
  page       python tools/report.py page runs/toy/eval_grpo      every case with its picture, boxes and reasoning
  compare    python tools/report.py compare runs/toy/eval_sft runs/toy/eval_grpo       two runs on one bench, paired
  curves     python tools/report.py curves runs/*/train_grpo/metrics.jsonl --out curves.png --smooth 5
  mastery    python tools/report.py mastery runs/real/eval_grpo --mastery runs/real/filter_grpo/mastery.json
  gap        python tools/report.py gap runs/real/eval_grpo runs/real/eval_choices     knows it x finds it
  reasoning  python tools/report.py reasoning runs/toy/eval_grpo           how often does it contradict its answer?

Reads predictions.jsonl and metrics.json of eval_kvg.py, metrics.jsonl of the trainers. A page is one file that loads
nothing else. Questions on one image are not independent: intervals are Wilson's at the effective number of questions,
and Student's t over images for a difference; McNemar's p takes all as independent, and is a little small where images
have several. Of --num_samples k answers, sample i is compared with sample i.
"""

import argparse
import base64
import html
import io
import itertools
import json
import math
import os
import re
import string
import subprocess
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageOps

# how much of an entity a model knows, in KARL's five levels (arXiv 2503.12797 v3): mastery from
LEVELS = {"completely correct": 0.70, "mostly correct": 0.45, "partially correct": 0.30, "mostly incorrect": 0.10,
          "completely incorrect": 0.0}  # fmt: skip
GAP_CELLS = {"both_right": (True, True), "choice_only": (False, True), "box_only": (True, False),
             "both_wrong": (False, False)}  # (box right, choice right)  # fmt: skip
CURVES_FIRST = ("reward", "loss", "acc@0.5", "rewards/iou/mean", "rewards/format/mean", "parse_rate",
                "frac_reward_zero_std", "completions/mean_length", "grad_norm")  # fmt: skip


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = p.add_subparsers(dest="command", required=True)
    # fmt: off
    c = commands.add_parser("run", help="run folder of run_all.sh: results.json, its table, curves and pages")
    c.add_argument("run", type=Path, help="with eval_*/ and train_*/")
    c = commands.add_parser("page", help="report.html of one evaluation")
    c.add_argument("folder", type=Path, help="--out of eval_kvg.py")
    c.add_argument("--bench", type=Path, help="parquet that holds the pictures; default: the run's own")
    c.add_argument("--max_cases", type=int, default=1500, help="more are thinned out evenly; pictures take about 15 MB")
    c.add_argument("--out", type=Path, help="default: report.html in the folder")
    c = commands.add_parser("compare", help="compare.html, compare.json: the difference B - A on the same cases")
    c.add_argument("a", type=Path, help="--out of eval_kvg.py")
    c.add_argument("b", type=Path, help="--out of eval_kvg.py")
    c.add_argument("--bench", type=Path, help="parquet that holds the pictures; default: that of B")
    c.add_argument("--max_cases", type=int, default=1500, help="of those that differ; more are thinned out evenly")
    c.add_argument("--out", type=Path, help="folder; default: B")
    c = commands.add_parser("curves", help="a panel per metric, a line per file")
    c.add_argument("files", nargs="+", type=Path, metavar="FILE", help="metrics.jsonl of a trainer")
    c.add_argument("--out", type=Path, help="PNG; default: curves.png beside the first file")
    c.add_argument("--smooth", type=int, default=1, help="steps that are averaged; 1: none")
    c = commands.add_parser("mastery", help="accuracy on known and unknown entities; known.json")
    c.add_argument("folder", type=Path, help="--out of eval_kvg.py")
    c.add_argument("--mastery", type=Path, required=True, help="mastery.json of filter.py, or KARL's own")
    c = commands.add_parser("gap", help="which entities are known, found, both, neither; gap.json")
    c.add_argument("folder", type=Path, help="--out of eval_kvg.py, boxes")
    c.add_argument("choices", type=Path, help="--out of eval_kvg.py, options of the same cases")
    c = commands.add_parser("reasoning", help="reasoning that contradicts its answer; reasoning.json")
    c.add_argument("folder", type=Path, help="--out of eval_kvg.py")
    # fmt: on
    return p.parse_args(argv)


# ---- the commands: each reads and writes files, and returns what is printed ----
def run(run):
    """Writes RUN/results.json and the curves and pages of all stages; the table has a line per evaluation, in order."""
    paths = sorted(run.glob("eval_*/metrics.json"), key=lambda p: p.stat().st_mtime)
    if not paths:
        raise InputError(f"{run}: no eval_*/metrics.json; want the run folder of run_all.sh, evaluated")
    rows, lines, splits = [], [], ("seen", "unseen", "all")
    for path in paths:
        m = json.loads(path.read_bytes())
        if all_ := m["all"]:
            row = {"model": path.parent.name.removeprefix("eval_"), "n": all_["n"]}
            row |= {k: m[k] and m[k]["acc"] for k in splits} | {k: all_.get(k) for k in ("mean_iou", "parse_rate")}
            rows.append(row | {"ci95": {k: m[k] and m[k]["acc_ci95"] for k in splits}})
            cells = [f"{percent(m[k]['acc'])} ({interval(m[k]['acc_ci95'])})" if m[k] else "-" for k in splits]
            lines.append((row["model"], row["n"], *cells, decimals(row["mean_iou"]), percent(row["parse_rate"])))
    git = subprocess.run("git rev-parse HEAD", shell=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    done = sorted((run / ".done").glob("*"), key=lambda p: p.stat().st_mtime)
    result = {"rows": rows, "seconds": {p.name: int(p.read_text()) for p in done}, "seed": m["args"]["seed"]}
    write(run / "results.json", json.dumps(result | {"commit": git.stdout.strip() or None}, indent=1))
    for path in run.glob("train_*/metrics.jsonl"):
        curves([path])
    for path in paths:
        page(path.parent)
    header = ("model", "cases", *(f"{k} % (95 %)" for k in splits), "mean IoU", "parsed %")
    shown = [p for name in ("*/preview.png", "*/curves.png", "eval_*/report.html") for p in sorted(run.glob(name))]
    return table(header, lines) + "\n".join(map(str, [run / "results.json", *shown]))


def page(folder, bench=None, max_cases=1500, out=None):
    """Writes report.html: the metrics and every case; the answers to one question share a card."""
    rows, metrics = read_evaluation(folder)
    groups, args, name = defaultdict(list), metrics["args"], folder.resolve()
    for row in rows:
        groups[row["question_id"]].append(row | {"label": row["sample"] + 1})
    lead = f"{args['model'] or args['predictions']} on {args['bench']}, prompt “{args['prompt']}”. "
    lead += f"{len(groups):,} cases, {len({r['image_id'] for r in rows}):,} images."
    if length := metrics.get("completions/mean_length"):
        lead += f" {length:.0f} tokens per answer, {percent(metrics['completions/clipped_ratio'])} % cut off."
    lead += f" {reasoning_line(reasoning_metrics(rows))}"
    lines = []
    for split, m in named(metrics):
        text = [percent(m["acc"]), interval(m["acc_ci95"]), percent(m.get("acc_official")), decimals(m.get("mean_iou"))]
        lines.append((split, m["n"], *text, percent(m["parse_rate"]), bar(m["acc"], m["acc_ci95"])))
    header = ("split", "cases", "accuracy %", "95 % interval", "official %", "mean IoU", "parsed %", "")
    out, title, panel = out or folder / "report.html", f"{name.parent.name}/{name.name}", html_table(header, lines)
    write_page(out, title, lead, panel, groups, metrics, bench, max_cases)
    return f"report: {len(groups)} cases -> {out}"


def compare(a, b, bench=None, max_cases=1500, out=None):
    """Accuracy of A and B on the same questions, B - A with its interval and test, per split and category."""
    (rows_a, _), (rows_b, metrics) = read_evaluation(a), read_evaluation(b)
    by_key = [{(r["question_id"], r["sample"]): r for r in rows} for rows in (rows_a, rows_b)]
    truths = [{(key, str(r.get("gt_bbox_1000")), r.get("answer")) for key, r in rows.items()} for rows in by_key]
    if odd := truths[0] ^ truths[1]:
        raise InputError(f"{b} ({min(odd, key=str)[0][0]}): {len(odd)} cases that {a} has otherwise; want one bench")

    def paired(part):
        right = [(float(x["correct"]), float(y["correct"])) for x, y in part]
        only_a, only_b, n = right.count((1, 0)), right.count((0, 1)), len(right)
        ci95 = difference_interval([y - x for x, y in right], [x["image_id"] for x, _ in part])
        return {"n": n, "acc_a": sum(x for x, _ in right) / n, "acc_b": sum(y for _, y in right) / n,
                "difference": (only_b - only_a) / n, "difference_ci95": ci95, "only_a": only_a, "only_b": only_b,
                "mcnemar_p": mcnemar_p(only_a, only_b)}  # fmt: skip

    pairs = {key: (row, by_key[1][key]) for key, row in by_key[0].items()}
    result = by_split([pair for pair in pairs.values() if pair[0]["correct"] is not None], metrics, paired)
    out = out or b
    write(out / "compare.json", json.dumps({"a": str(a), "b": str(b)} | result, indent=1))
    lines, widest = [], max((abs(v) for _, m in named(result) for v in m["difference_ci95"] or [0]), default=0) or 1
    for name, m in named(result):
        text = [percent(m["acc_a"]), percent(m["acc_b"]), f"{100 * m['difference']:+.1f}"]
        text += [interval(m["difference_ci95"], "+"), m["only_a"], m["only_b"], f"{m['mcnemar_p']:.2g}"]
        lines.append((name, m["n"], *text, bar(m["difference"], m["difference_ci95"], -widest, widest)))
    header = ("split", "cases", "A %", "B %", "B - A", "95 % interval", "only A right", "only B right", "McNemar p", "")
    differ = {key: [x | {"label": "A"}, y | {"label": "B"}] for key, (x, y) in pairs.items()
              if x["correct"] != y["correct"] or x["correct"] is None and x["found"] != y["found"]}  # fmt: skip
    lead = f"A = {a}, B = {b}: {len(differ):,} of {len(pairs):,} cases differ. The difference is in points."
    path, title = out / "compare.html", f"{b.resolve().name} against {a.resolve().name}"
    write_page(path, title, lead, html_table(header, lines), differ, metrics, bench, max_cases)
    text = table(header[:-1], [line[:-1] for line in lines])
    return f"{text}report: A = {a}, B = {b} -> {out / 'compare.json'}, {path}"


def curves(files, out=None, smooth=1):
    """Draws a panel per metric and in it a line per file that has it, the most useful metrics first."""
    from matplotlib.figure import Figure

    runs = [read_rows(path) for path in files]
    keys = dict.fromkeys(k for rows in runs for r in rows for k in r if k != "step" and curve_points(rows, k, 1)[0])
    keys = [k for k in CURVES_FIRST if k in keys] + [k for k in keys if k not in CURVES_FIRST]
    if not keys:
        raise InputError(f"{files[0]}: no numbers; want metrics.jsonl of a trainer")
    lines = math.ceil(len(keys) / 3)
    figure, out = Figure((13.8, 2.7 * lines + 0.5)), out or files[0].with_name("curves.png")
    axes = figure.subplots(lines, 3, squeeze=False).flat
    for ax, key in itertools.zip_longest(axes, keys, fillvalue=""):
        for rows in runs:
            ax.plot(*curve_points(rows, key, smooth), marker="." if len(rows) == 1 else None, linewidth=1.4)
        ax.set_title(key, fontsize=10, loc="left", parse_math=False)
        ax.grid(alpha=0.25)
        ax.set_visible(bool(key))
    figure.tight_layout()
    figure.legend(axes[0].get_lines(), map(str, files), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig(out, dpi=120, bbox_inches="tight")
    return f"report: {len(keys)} metrics of {len(runs)} runs ({', '.join(keys[:4])}, ...) -> {out}"


def mastery(folder, mastery):
    """Scores by how much of the entity the model knows; one that is not in the file is unrated."""
    levels, by_level, names = {}, defaultdict(list), list(LEVELS)
    for entity, entry in json.loads(mastery.read_bytes()).items():  # KARL's own file names the level
        levels[entity] = entry.get("knowledge_category") or next(k for k, v in LEVELS.items() if entry["mastery"] >= v)
    for row in read_evaluation(folder)[0]:
        if row["correct"] is not None:
            by_level[levels.get(row["entity"])].append(row)
    parts = {"known (top 3 levels)": names[:3], "unknown (bottom 2)": names[3:]}
    parts |= {level: [level] for level in names} | {"unrated": [None]}
    result = {name: scores([r for level in part for r in by_level[level]]) for name, part in parts.items()}
    write(folder / "known.json", json.dumps(result, indent=1))
    lines = [(name, m["n"], percent(m["acc"]), interval(m["acc_ci95"]), decimals(m["mean_iou"]),
              percent(m["parse_rate"])) for name, m in result.items()]  # fmt: skip
    return table(("mastery", "cases", "accuracy %", "95 % interval", "mean IoU", "parsed %"), lines).rstrip()


def gap(folder, choices):
    """The knowledge-grounding gap: is the entity told from others, is it found; counts and shares of the four cells."""
    rows, metrics = read_evaluation(folder)
    asked = {(r["question_id"], r["sample"]): r for r in read_evaluation(choices)[0]}
    pairs = [(r, asked.get((r["question_id"], r["sample"]))) for r in rows if r["correct"] is not None]
    crossed = [pair for pair in pairs if pair[1]]

    def cells(part):
        counts = Counter((r["correct"], c["correct"]) for r, c in part)
        result = {name: {"n": counts[cell], "share": counts[cell] / len(part)} for name, cell in GAP_CELLS.items()}
        return {"n": len(part), **result, "choice": scores([c for _, c in part])}

    result, lines = by_split(crossed, metrics, cells), []
    write(folder / "gap.json", json.dumps(result, indent=1))
    for name, m in named(result):
        shares = [f"{m[cell]['n']} ({percent(m[cell]['share'])} %)" for cell in GAP_CELLS]
        lines.append((name, m["n"], *shares, percent(m["choice"]["acc"]), percent(m["choice"]["parse_rate"])))
    header = ("choice x box", "cases", "both right", "choice right, box wrong", "choice wrong, box right", "both wrong")
    text = table((*header, "choice %", "choice parsed %"), lines)
    return f"{text}{len(crossed)} of {len(pairs)} answers have a choice; one that names no option counts as wrong."


def reasoning(folder):
    result = reasoning_metrics(read_evaluation(folder)[0])
    write(folder / "reasoning.json", json.dumps(result, indent=1))
    return reasoning_line(result) or f"report: no answer in {folder} has reasoning and a box"


def main():
    args = vars(parse_args())
    commands = {"run": run, "page": page, "compare": compare, "curves": curves, "mastery": mastery, "gap": gap,
                "reasoning": reasoning}  # fmt: skip
    print(commands[args.pop("command")](**args))


# ======== plumbing: the rule for reasoning, statistics, files, tables, pages ========


# ---- reasoning that contradicts its answer ----
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
POINT, FOUR = rf"\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)", rf"{NUMBER}\s*(?:,\s*{NUMBER}\s*){{3}}"
BOXES = re.compile(rf"{POINT}(?:\s*,\s*{POINT})+|\(\s*{FOUR}\)|\[\s*{FOUR}\]")
DENIED = re.compile(r"(?:\b(?:not|no|nor|neither|unlike|than|instead of|cannot be|excludes?)|n't(?: be)?)"
                    r"(?: (?:an?|the))?\s+(?:<\|object_ref_start\|>)?$", re.I)  # fmt: skip
SENTENCE_END = re.compile(r"(?<!\bvs)(?<!\bcf)(?<!\be\.g)(?<!\bi\.e)[.!?]\s+|\n", re.I)


@cache
def any_of(names):
    by_length = sorted(names, key=len, reverse=True)  # Boeing 747-400 is not Boeing 747
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, by_length)) or '(?!)'})(?!\w|-\w)", re.I)


def concluded_names(text, names):
    """Which of the names, in lower case, the last sentence with a name says; a denied one ("not X") does not count."""
    mentions = list(any_of(names).finditer(text))
    claims = [m for m in mentions if not DENIED.search(text[max(0, m.start() - 60) : m.start()])]
    inside = {i for m in mentions for i in range(m.start(), m.end())}  # a dot in a name ends no sentence
    ends = [m.end() for m in SENTENCE_END.finditer(text) if m.start() not in inside]
    last = claims[-1].start() if claims else 0
    begin = max((end for end in ends if end <= last), default=0)
    return {m[0].casefold() for m in claims if m.start() >= begin}


def contradicts(row, names):
    """Whether the text in <think> ends elsewhere than the answer, by rule. None without reasoning or a valid box.

    Its last box has IoU < 0.5 with the answered one, or its last sentence with a name names only others of `names`, the
    entities of the same image or category. If the text says "conclusion", what follows is looked at alone, so that a
    list of all objects before it is no contradiction.
    """
    blocks = [part.partition("<think>") for part in row["response"].split("</think>")[:-1]]
    think = "\n".join(text for _, tag, text in blocks if tag).strip()
    if not think or not row.get("pred_bbox_1000"):
        return None
    think = re.split(r"\bconclusion\b", think, flags=re.I)[-1]
    bare = any_of(frozenset(filter(BOXES.search, names))).sub("_", think)  # Porsche 911 (901, 930, 964, 993) is no box
    boxes = [[float(v) for v in re.findall(NUMBER, m[0])] for m in BOXES.finditer(bare)]
    boxes = [b for b in boxes if len(b) == 4 and b[0] < b[2] and b[1] < b[3]]
    if boxes:
        last = [v * 1000 / n for v, n in zip(boxes[-1], (row.get("grid") or (1000, 1000)) * 2, strict=True)]
        if iou(last, row["pred_bbox_1000"]) < 0.5:
            return True
    concluded = concluded_names(think, names) if row["entity"] else set()
    return bool(concluded) and row["entity"].casefold() not in concluded


def judged(rows):
    """Rows with `found`, the box or option of an answer, and `reasoning_contradicts`, None if there is none."""
    on_image, of_category = defaultdict(set), defaultdict(set)
    for r in rows:
        on_image[r["image_id"]] |= {r["entity"]} - {None}
        of_category[r["category"]] |= {r["entity"]} - {None}
    names = [frozenset(on_image[r["image_id"]] | of_category[r["category"]]) for r in rows]
    return [r | {"reasoning_contradicts": contradicts(r, known), "found": r.get("choice") or r.get("pred_bbox_1000")}
            for r, known in zip(rows, names, strict=True)]  # fmt: skip


def lacks(response, part, words):
    """Whether that part of the reasoning ("Planning: ...", up to the next one) does not say the words."""
    said = re.search(rf"{part}:(.*?)(\n[A-Z]|</think>|\Z)", response, re.DOTALL)
    return said is None or words not in said[1]


def reasoning_metrics(rows):
    """How often the reasoning contradicts: among all, correct and wrong answers that have reasoning and a valid box."""
    rows, result = [r for r in rows if r["reasoning_contradicts"] is not None], {}
    for name, kinds in (("all", (True, False, None)), ("correct", (True,)), ("wrong", (False,))):
        part = [r for r in rows if r["correct"] in kinds]
        values, image_ids = [float(r["reasoning_contradicts"]) for r in part], [r["image_id"] for r in part]
        result[name] = {"n": len(part), "contradicts": sum(values) / len(part),
                        "contradicts_ci95": accuracy_interval(values, image_ids)} if part else None  # fmt: skip
    return result


def reasoning_line(m):
    told = [f"{percent(m[k]['contradicts'])} % of {m[k]['n']} {k}" for k in ("correct", "wrong") if m[k]]
    return f"Reasoning that contradicts its answer: {' and '.join(told)} answers." if told else ""


# ---- statistics ----
def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2) in the same unit, 0..1."""
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def image_spread(values, image_ids):
    """(mean, variance of the mean between images, images, Student's 97.5 % point at images - 1).

    Images carry different numbers of questions. Abramowitz and Stegun 26.7.5 is off by < 1 % from 6 images on.
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

    That number is told by the spread between images; if all are right, or all wrong, an image counts once. Source: Dean
    and Pagano 2015, J. Survey Stat. Methodol. 3(4), 484 to 503.
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


def scores(rows):
    """Accuracy with its interval, mean IoU (None for letters) and parse rate, 0..1; all None for no rows."""
    columns = {"acc": [float(r["correct"]) for r in rows], "mean_iou": [r["iou"] for r in rows if "iou" in r]}
    columns["parse_rate"] = [r["found"] is not None for r in rows]
    means = {name: sum(values) / len(values) if values else None for name, values in columns.items()}
    ci95 = accuracy_interval(columns["acc"], [r["image_id"] for r in rows]) if rows else None
    return {"n": len(rows), "acc_ci95": ci95} | means


def by_split(pairs, metrics, measure):
    """{split: measure of its pairs of rows} for all, seen, unseen and every category, as metrics.json has them."""
    seen, names = set(metrics["seen_categories"]), {pair[0]["category"] for pair in pairs}

    def of(categories):
        part = [pair for pair in pairs if pair[0]["category"] in categories]
        return measure(part) if part else None

    result = {"all": of(names), "seen": of(names & seen), "unseen": of(names - seen)}
    categories = {c: of({c}) for c in sorted(names, key=lambda c: (c not in seen, c))}
    return result | {"categories": categories, "seen_categories": sorted(seen)}


def named(metrics):
    """[(name, measures)] of all splits and categories that have cases."""
    kinds = {c: "seen" if c in metrics["seen_categories"] else "unseen" for c in metrics["categories"]}
    lines = [(name, metrics[name]) for name in ("all", "seen", "unseen")]
    lines += [(f"{c} ({kinds[c]})", m) for c, m in metrics["categories"].items()]
    return [(name, m) for name, m in lines if m]


def curve_points(rows, key, smooth):
    """(steps, values) of one metric, each value the mean of the last `smooth`; null and NaN are left out."""
    points = [(r.get("step", i), r.get(key)) for i, r in enumerate(rows, 1)]
    points = [p for p in points if all(isinstance(v, int | float) and math.isfinite(v) for v in p)]
    values = [v for _, v in points]
    means = [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - smooth) : i + 1])]
    return [x for x, _ in points], means


# ---- files and tables ----
class InputError(ValueError):
    """What the user has to mend, in one line: where, what was found, what is wanted."""


def read_rows(path):
    """Of JSONL; a line that a running stage has not ended yet is left out."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise InputError(f"{path}:{number}: {line[:80]!r}; want one JSON object a line") from None
    return rows


def read_evaluation(folder):
    """(judged rows of predictions.jsonl, metrics.json)"""
    return judged(read_rows(folder / "predictions.jsonl")), json.loads((folder / "metrics.json").read_bytes())


def write(path, text):
    """A text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(text + "\n", "utf-8", "backslashreplace")
    os.replace(f"{path}.tmp", path)


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def decimals(value):
    return "-" if value is None else f"{value:.3f}"


def interval(ci95, sign=""):
    return f"{100 * ci95[0]:{sign}.1f} to {100 * ci95[1]:{sign}.1f}" if ci95 else "-"


def table(header, lines):
    """Markdown with padded columns: the first to the left, the others to the right."""
    rows = [[str(cell) for cell in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    padded = [[r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))] for r in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in padded)


# ---- pages ----
def bar(value, ci95, low=0, high=1):
    """A bar from 0 to a value, with its interval as a whisker, on a track from `low` to `high`."""
    zero, x, *ends = (100 * (v - low) / (high - low) for v in (0, value, *(ci95 or ())))
    whisker = f'<u style="left:{ends[0]:.1f}%;right:{100 - ends[1]:.1f}%"></u>' if ends else ""
    return f'<div class="bar"><i style="left:{min(zero, x):.1f}%;right:{100 - max(zero, x):.1f}%"></i>{whisker}</div>'


def html_table(header, lines):
    """Of cells that are text, or a bar at the end."""
    cells = [[*map(html.escape, map(str, line[:-1])), line[-1]] for line in lines]
    body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in line)}</tr>" for line in cells)
    head = "".join(f"<th>{h}</th>" for h in header)
    return f'<section class="panel"><table><tr>{head}</tr>{body}</table></section>' if lines else ""


def thumbnail(source, side):
    """JPEG in base64."""
    with Image.open(source) as image:
        image.draft("RGB", (side, side))  # a large JPEG is not decoded whole
        image = ImageOps.exif_transpose(image).convert("RGBA")
    image.thumbnail((side, side))
    data = io.BytesIO()
    Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB").save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode()


def thumbnails(rows, bench):
    """{image_id: thumbnail} of the rows' images, as far as they are found."""
    first = {r["image_id"]: r for r in reversed(rows)}
    side = min(640, max(200, int(7000 / max(1, len(first)) ** 0.5)))  # the same area in all, from 120 to 1,225
    pictures = {i: thumbnail(r["image"], side) for i, r in first.items() if r["image"] and os.path.isfile(r["image"])}
    wanted = {r["question_id"]: i for i, r in first.items() if not r["image"]}
    if wanted and bench.suffix == ".parquet" and bench.is_file():
        import pyarrow.parquet as pq

        rows = (r for batch in pq.ParquetFile(bench).iter_batches(64) for r in batch.to_pylist())
        for number, r in enumerate(rows, 1):
            if (key := str(r.get("question_id", r.get("id", number)))) in wanted:
                pictures[wanted[key]] = thumbnail(io.BytesIO(r["image"]["bytes"]), side)
    return pictures


def write_page(path, title, lead, panel, groups, metrics, bench, max_cases):
    """groups: {case: rows}, the answers that share a card, each with its label."""
    n, keys = min(len(groups), max_cases), list(groups)
    cases = [groups[keys[i * len(keys) // n]] for i in range(n)]
    pictures = thumbnails([answers[0] for answers in cases], bench or Path(metrics["args"]["bench"]))
    lost = len({answers[0]["image_id"] for answers in cases} - pictures.keys())
    lead += f" {n:,} of them are shown, evenly drawn." if n < len(groups) else ""
    lead += f" {lost} pictures were not found; name the bench with --bench." if lost else ""
    data = {"cases": cases, "pictures": pictures, "boxes": BOXES.pattern, "seen": metrics["seen_categories"]}
    data = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no text ends the script element
    write(path, PAGE.substitute(title=html.escape(title), lead=html.escape(lead), panel=panel, data=data))


# The browser makes cards of $data, as they come into view. What a model or a bench wrote is text all the way
# (html.escape, append), never markup.
PAGE = string.Template(r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { color-scheme:light dark; --ink:light-dark(#1b2430,#e3e8ee); --dim:light-dark(#5d6979,#9ba8b8);
  --line:light-dark(#dfe4ea,#2c3540); --page:light-dark(#f5f7f9,#10151b); --panel:light-dark(#fff,#181f27) }
.truth { --c:light-dark(#00845c,#2fc191) } .a { --c:light-dark(#c94a06,#f58a4b) }
.b,.bar { --c:light-dark(#6548d6,#a594ff) } .named { --c:light-dark(#d1008f,#ff7ad0) }
* { box-sizing:border-box } body { margin:0 auto; max-width:1240px; padding:1.5rem 1rem 4rem; background:var(--page);
  color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; overflow-wrap:anywhere }
h1,h2,p { margin:0 0 .4rem; line-height:1.4 } h1 { font-size:1.5rem } h2 { font-size:1.05rem }
small,.dim,label,th { color:var(--dim); font-size:.86rem } header span,.text { white-space:pre-wrap }
.panel,article { background:var(--panel); border:1px solid var(--line); border-radius:10px; padding:.9rem }
.panel { overflow-x:auto } table { border-collapse:collapse; width:100%; white-space:nowrap; margin:0 }
th,td { padding:.25rem .6rem; text-align:right; border-bottom:1px solid var(--line) } td:last-child { width:30% }
th:first-child,td:first-child { text-align:left; padding-left:0 } tr:last-child td { border:0 }
.bar { position:relative; height:.9rem; min-width:7rem; border-radius:4px; background:var(--page) }
.bar i { position:absolute; top:0; bottom:0; background:var(--c); opacity:.6; border-radius:4px }
.bar u { position:absolute; top:calc(50% - 1px); border-top:2px solid var(--ink) }
nav { position:sticky; top:0; z-index:2; display:flex; flex-wrap:wrap; gap:.5rem 1rem; align-items:center;
  margin:1rem 0 .6rem; padding:.6rem 0; background:var(--page); border-bottom:1px solid var(--line) }
select,input { font:inherit; max-width:14rem; padding:.25rem .5rem; border:1px solid var(--line); border-radius:7px;
  background:var(--panel); color:var(--ink) } #count { margin-left:auto; font-weight:600 }
article { display:grid; grid-template-columns:minmax(0,23rem) minmax(0,1fr); gap:.6rem 1.1rem; margin-bottom:.9rem }
header { grid-column:1/-1 } .answers { display:grid; gap:1rem;
  grid-template-columns:repeat(auto-fit,minmax(min(100%,16rem),1fr)) } .empty { aspect-ratio:4/3 }
figure { position:relative; margin:0; align-self:start; overflow:hidden; border-radius:6px; background:var(--page) }
figure img { display:block; width:100% } figure .a { border-style:dashed } figure .b { border-style:dotted }
figure i { position:absolute; border:3px solid var(--c); border-radius:3px; box-shadow:0 0 0 1px #fffc }
.chip { display:inline-block; margin:0 .4rem .4rem 0; padding:0 .55rem; border:1px solid; border-radius:99px;
  font-size:.8rem; font-weight:600; color:var(--c,var(--dim)) }
.text { overflow:auto; max-height:24rem; padding:.7rem; border-radius:7px; background:var(--page) }
button { font:inherit; color:inherit; background:none; border:0; border-bottom:2px dotted #d1008f; padding:0 }
@media (max-width:760px) { article { grid-template-columns:minmax(0,1fr) } #count { margin:0 } label { display:grid }
  nav { position:static; display:grid; grid-template-columns:repeat(2,minmax(0,1fr)) } select,input { width:100% } }
</style></head><body><h1>$title</h1><p class="dim">$lead</p>$panel
<nav><label>Show <select id="show"></select></label> <label>Category <select id="category"></select></label>
<label>Sort <select id="sort"></select></label> <label>Search <input type="search" id="search"></label>
<span id="count" role="status"></span></nav>
<span class="chip truth">truth</span><span class="chip a">answer</span><span class="chip named">pointed at</span>
<main id="cards"></main><div id="end"></div><noscript>The cases are drawn by a script.</noscript>
<script type="application/json" id="data">$data</script><script>
const by = id => document.getElementById(id), data = JSON.parse(by("data").textContent);
const cases = data.cases.map(answers => ({...answers[0], answers}));
function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
function drawn(box, kind) { // of a 0..1000 grid, over the picture; a model may write any numbers
  const [x1, y1, x2, y2] = box.map(v => Math.min(100, Math.max(0, v / 10)));
  const sides = [Math.min(y1, y2), 100 - Math.max(x1, x2), 100 - Math.max(y1, y2), Math.min(x1, x2)];
  return make("i", {className: kind, style: "inset:" + sides.join("% ") + "%"});
}
function pointer(text, box, figure) { // a box in the text is shown on the picture while it is pointed at or focused
  const button = make("button", {type: "button"}, text), mark = drawn(box, "named");
  button.onpointerenter = button.onfocus = () => figure.append(mark);
  button.onpointerleave = button.onblur = () => mark.remove();
  return button;
}
const token = new RegExp("(</?(?:think|answer)>|<\\|\\w+\\|>)|" + data.boxes, "g");
function reading(a, figure) { // tags recede
  const node = make("div", {className: "text"}), grid = a.grid || [1000, 1000];
  let at = 0;
  for (const m of a.response.matchAll(token)) {
    const box = m[1] ? [] : m[0].match(/[0-9]+(\.[0-9]+)?/g).map((v, i) => v * 1000 / grid[i % 2]);
    const part = m[1] ? make("small", {}, m[1]) : box.length === 4 ? pointer(m[0], box, figure) : m[0];
    node.append(a.response.slice(at, m.index), part);
    at = m.index + m[0].length;
  }
  node.append(a.response.slice(at) || (at ? "" : "(empty)"));
  return node;
}
function card(c) {
  const source = data.pictures[c.image_id], answers = make("div", {className: "answers"});
  const figure = make("figure", {className: source ? "" : "empty"}), alt = "picture of " + c.question_id;
  if (source) figure.append(make("img", {src: "data:image/jpeg;base64," + source, alt}));
  if (c.gt_bbox_1000) figure.append(drawn(c.gt_bbox_1000, "truth"));
  for (const a of c.answers) {
    const row = make("div", {}), kind = a.label === "B" ? "b" : "a", box = a.pred_bbox_1000;
    const chip = (text, kind) => row.append(make("span", {className: "chip " + kind}, text));
    if (c.answers.length > 1) chip(a.label, kind);
    if (a.correct !== null) chip(a.correct ? "✓ right" : "✗ wrong", a.correct ? "truth" : "a");
    if (c.options || !box) chip(a.choice || (c.options ? "no option" : "no valid box"), "");
    if (box && c.gt_bbox_1000) chip("IoU " + a.iou.toFixed(2), "");
    if (a.reasoning_contradicts) chip("reasoning contradicts", "named");
    if (a.num_tokens) chip(a.num_tokens + " tokens" + (a.finished ? "" : ", cut off"), "");
    if (box) figure.append(drawn(box, kind));
    answers.append(make("section", {}, row, reading(a, figure)));
  }
  const about = c.category + " · " + c.question_id + (c.options ? "\n" + c.question + "\nRight: " + c.answer : "");
  const head = make("header", {}, make("h2", {}, c.entity || c.question), make("span", {className: "dim"}, about));
  return make("article", {}, head, figure, answers);
}
// what can be shown, in which order; the last answer of a case decides its place
const some = test => c => c.answers.some(test), last = c => c.answers[c.answers.length - 1], all = c => true;
const score = c => last(c).found ? last(c).iou ?? Number(last(c).correct) : -1;
const only = i => c => c.answers[0].label === "A" && c.answers[i].correct && !c.answers[1 - i].correct;
const tests = {
  show: {all, "right": some(a => a.correct), "wrong": some(a => a.correct === false), "A right, B wrong": only(0),
    "B right, A wrong": only(1), "without a truth": some(a => a.correct === null), "unparsed": some(a => !a.found),
    "cut off": some(a => a.finished === false), "reasoning contradicts": some(a => a.reasoning_contradicts)},
  category: {all, "seen": c => data.seen.includes(c.category), "unseen": c => !data.seen.includes(c.category)},
  sort: {"worst first": score, "best first": c => -score(c), "as in the bench": all,
    "longest first": c => -last(c).response.length}};
for (const name of new Set(cases.map(c => c.category).sort())) tests.category["– " + name] = c => c.category === name;
for (const id in tests) for (const name in tests[id]) {
  const n = cases.filter(tests[id][name]).length, count = id === "sort" ? "" : " (" + n + ")";
  if (n || !count || name === "all") by(id).append(make("option", {value: name}, name + count));
}
let list = [], at = 0;
const more = () => by("cards").append(...list.slice(at, at += 24).map(card));
function filter() {
  const [show, category, sort] = ["show", "category", "sort"].map(id => tests[id][by(id).value]);
  const words = by("search").value.trim().toLowerCase();
  const text = c => [c.entity, c.question, c.question_id, ...c.answers.map(a => a.response)].join("\n").toLowerCase();
  list = cases.filter(c => show(c) && category(c) && text(c).includes(words)).sort((x, y) => sort(x) - sort(y)), at = 0;
  by("cards").replaceChildren();
  by("count").textContent = list.length + " of " + cases.length + " cases";
  more();
}
document.oninput = filter;
new IntersectionObserver(e => e[0].isIntersecting && more(), {rootMargin: "1500px"}).observe(by("end"));
filter();
</script></body></html>""")


if __name__ == "__main__":
    try:
        main()
    except (InputError, FileNotFoundError) as e:
        raise SystemExit(f"report: {e}") from None
