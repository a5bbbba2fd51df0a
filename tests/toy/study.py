"""The questions of the paper, answered in the toy world: every table of RESULTS.md, over several seeds.

  bash run_all.sh study            5.8 h on 2 CPU cores; also: python tests/toy/study.py --out runs/study
  python tests/toy/study.py --out runs/study --report        the tables of what is finished, at any time

A job is one command of the pipeline with a folder of its own, runs/study/SEED/NAME; `jobs_of` lists those of a seed. It
starts when the jobs whose folders it reads are finished, as many at once as there are cores, one thread each. Finished
jobs have a done.json and are skipped, trainers go on from their checkpoints: the same command continues after a stop.
The main comparison comes first, four seeds in 17 minutes, five in 23, then the other PARTS. results.json holds the
values of every seed, results.md the tables: means over seeds with Student's 95 % interval, differences paired by seed.

N_SFT, the temperature, the learning rate of GRPO and all steps were chosen on seeds 0 and 1, which are left out. With
1,600 samples in stage 1, GRPO has little to gain on the seen categories; with 1,400, CoT-SFT is fewer than 10 points
ahead of SFT on the unseen ones. At temperature 1, most of what GRPO learns is to sample with less noise, which does
not show in greedy answers.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[2]  # commands run there
sys.path[:0] = [str(ROOT / "tests/toy"), str(ROOT), str(ROOT / "tools")]
import report  # noqa: E402
import toy_world as world  # noqa: E402

BASE, SEEN = "tests/toy/base", " ".join(world.SEEN)
SYNTH = "--canvas_size 168 112 --grid 3 2 --layouts grid --background gradient --entity_scale 0.6 0.95 --num_workers 1"
N_SFT, N_GRPO, STEPS, PROMPTS = 1500, 640, 20, 16
SFT = "--learning_rate 1e-3 --train_batch_size 32 --tokens_per_row 8192 --save_steps 25"
MORE = "--max_steps 40"  # CoT-SFT continued, 1,280 samples, 60 s; GRPO has 2,560 completions in 157 s
LENGTH, TEMPERATURE = "--max_completion_length 320", "--temperature 0.8"
GRPO = (f"--learning_rate 1e-4 --lr_scheduler constant --train_batch_size {PROMPTS} --num_generations 8 {LENGTH} "
        f"{TEMPERATURE} --iou_threshold 0.5 --max_steps {STEPS} --save_steps 10")  # fmt: skip
SCENES = 192  # questions per skill of the base

RANDOM, SYSTEMATIC = "_random_0.3", "_systematic_0.3"
TEACHERS = {"": "", **{f"_random_{p}": f"--share {p}" for p in (0.1, 0.2, 0.3, 0.5)},
            SYSTEMATIC: "--share 0.3 --systematic"}  # fmt: skip
GROUNDED = {  # what differs from the GRPO of the main comparison
    "grounded_0.7": "--reward_funcs iou format grounded_0.7",
    "grounded_0.7_half": "--reward_funcs iou format grounded_0.7 --reward_weights 1 1 0.5",
    "grounded_0.9": "--reward_funcs iou format grounded_0.9",
    "grounded_0.9_half": "--reward_funcs iou format grounded_0.9 --reward_weights 1 1 0.5",
    "no_format": "--reward_funcs iou grounded_0.7",
    "gated": "--reward_funcs iou_if_grounded format",
}
ARMS = {  # as many steps and completions each
    "binary": "--reward_funcs binary format",
    "iou_0.8": "--iou_threshold 0.8",
    "g4": f"--num_generations 4 --train_batch_size {2 * PROMPTS}",
    "unfiltered": "",
    "karl_advantage": "--knowledge @/filter/mastery.json",
    "karl_reward": "--knowledge @/filter/mastery.json --reward_funcs karl format",
}
MODELS = ("base", "sft", "cot_sft", "cot_sft_more", "grpo")
# in this order, each for that many of --seeds
PARTS = (("main", 5), ("teachers", 5), ("grounded", 5), ("skills", 5), ("main", 8), ("arms", 8), ("unknown", 8))

# ---- jobs ----
def jobs_of(seed, part):
    """{name: command} of a part of the study for one seed, whose folder @ stands for; @/name is that of a job."""
    jobs = {}

    def add(name, command, seed=seed):
        seeded = "" if command.startswith("filter") else f" --seed {seed}"
        out = "--output_dir" if command.startswith(("train", "tools/karl")) else "--out"
        jobs[name] = f"{command} {out} @/{name}{seeded}"

    def evaluate(model):
        asked = f"--model @/{model}/final --prompt {'direct' if model.startswith('sft') else 'r1'}"
        asked = f"--model {BASE} --prompt direct" if model == "base" else asked
        add(f"eval_{model}", f"eval_kvg.py --bench @/world/kvg-bench.parquet {asked} --seen {SEEN} {LENGTH}")

    def sft(name, model, rows, flags=""):
        add(name, f"train_sft.py --model {model} --data @/{rows}/samples.jsonl {SFT} {flags}")
        evaluate(name)

    def grpo(name, tag="", flags="", rows="filter"):
        rows = f"@/{rows}{tag}/samples.jsonl"
        script = "tools/karl.py" if "--knowledge" in flags else "train_grpo.py"
        add(name, f"{script} --model @/cot_sft{tag}/final --data {rows} {GRPO} {flags}")
        evaluate(name)

    def chains(name, rows, errors):
        command = f"gen_cot.py --samples @/{rows}/samples.jsonl --knowledge @/world/knowledge.json"
        add(f"right_{name}" if errors else name, command)
        if errors:
            add(name, f"tests/toy/toy_world.py --err @/right_{name}/samples.jsonl {errors}")

    def course(tag="", base=BASE, errors=""):
        """CoT-SFT; the rows of stage 2 that it solves now and then; on these CoT-SFT continued, and GRPO."""
        chains(f"cot{tag}", "synth_sft", errors)
        sft(f"cot_sft{tag}", base, f"cot{tag}")
        rows, model = "@/synth_grpo/samples.jsonl", f"@/cot_sft{tag}/final"
        several = f"--num_samples 4 {TEMPERATURE} {LENGTH} --batch_size 256"
        add(f"rollouts{tag}", f"eval_kvg.py --bench {rows} --model {model} {several}")
        predictions = f"@/rollouts{tag}/predictions.jsonl"
        add(f"filter{tag}", f"filter.py --stage grpo --samples {rows} --predictions {predictions}")
        if base == BASE:
            chains(f"cot_more{tag}", f"filter{tag}", errors)
            sft(f"cot_sft_more{tag}", model, f"cot_more{tag}", MORE)
        grpo(f"grpo{tag}", tag)

    if part == "main":
        add("world", "tests/toy/toy_world.py")
        add("synth_sft", f"synth_data.py --source @/world/train --num_samples {N_SFT} {SYNTH}")
        add("synth_grpo", f"synth_data.py --source @/world/train --num_samples {N_GRPO} {SYNTH}", seed=seed + 1000)
        evaluate("base")
        course()
        sft("sft", BASE, "cot", "--target direct")
    if part == "teachers":
        for tag in [t for t in TEACHERS if t]:
            course(tag, errors=TEACHERS[tag])
    if part == "grounded":
        for tag in ("", RANDOM):
            for arm, flags in GROUNDED.items():
                grpo(f"grpo{tag}_{arm}", tag, flags)
    if part == "skills":
        for model in MODELS:
            path = BASE if model == "base" else f"@/{model}/final"
            add(f"skills_{model}", f"tests/toy/make_toy.py --evaluate --model {path} --scenes {SCENES}")
    if part == "arms":
        for arm, flags in ARMS.items():
            grpo(f"grpo_{arm}", flags=flags, rows="synth_grpo" if arm == "unfiltered" else "filter")
    if part == "unknown":
        add("unknown_base", "tests/toy/make_toy.py --unknown")
        course("_unknown", base="@/unknown_base")
        sft("sft_unknown", "@/unknown_base", "cot_unknown", "--target direct")
    return jobs

def needs(name, command):
    """Names of the jobs whose folders a command reads."""
    seed = name.split("/")[0]
    return {f"{seed}/{other}" for other in re.findall(r"@/([^/\s]+)", command)} - {name}

def jobs_done(jobs, out):
    """Names of the jobs that are done; stops where one was done by another command, or before what it reads."""
    marks = {name: path for name in jobs if (path := out / name / "done.json").exists()}
    for name, path in marks.items():
        others = [marks[n] for n in needs(name, jobs[name]) if n in marks]
        if json.loads(path.read_text())["command"] != jobs[name]:
            sys.exit(f"study: {path.parent}: made by another command than now; delete it, or take another --out")
        if any(other.stat().st_mtime > path.stat().st_mtime for other in others):
            sys.exit(f"study: {path.parent}: older than what it reads; delete it, or take another --out")
    return set(marks)

def run_jobs(jobs, out, at_once):
    """Runs all jobs that are not done; stops when one fails. Returns whether all are done."""
    running, began, done = {}, time.time(), jobs_done(jobs, out)
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // at_once)), "TOKENIZERS_PARALLELISM": "false"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("study: stopped; the same command goes on"))
    try:
        while len(done) < len(jobs):
            for name, command in jobs.items():
                free = len(running) < at_once and name not in done | running.keys()
                if free and needs(name, command) <= done:
                    (out / name).mkdir(parents=True, exist_ok=True)
                    words = [word.replace("@", str(out / name.split("/")[0])) for word in command.split()]
                    with open(out / f"{name}.log", "a") as log:
                        process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, cwd=ROOT, env=env)
                    running[name] = process, time.time()
            time.sleep(0.2)
            for name, (process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    print(f"{name} failed: {jobs[name]}\n{(out / f'{name}.log').read_text()[-2000:]}")
                    return False
                took, total = time.time() - since, (time.time() - began) / 60
                report.write(out / name / "done.json", json.dumps({"seconds": round(took, 1), "command": jobs[name]}))
                done.add(name)
                print(f"{len(done)}/{len(jobs)} {name} {took:.0f} s, {total:.0f} min", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return True

# ---- what the jobs say ----
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's 97.5 % points, 2 seeds and more
SCORES = {"seen": ("seen", "acc"), "unseen": ("unseen", "acc"), "all": ("all", "acc"), "mean IoU": ("all", "mean_iou")}
NAME, PLAN, LIST = "no name in Planning", "no look in Planning", "no look in Visual Analysis"  # of the target
LACKS = (NAME, PLAN, LIST, "no look in Comparison")
FAULTS = (*LACKS, "contradicts the box")  # by the rule of tools/report.py

@cache
def read_json(path):
    return json.loads(path.read_bytes())

@cache
def read_answers(path):
    """Rows of predictions.jsonl with the FAULTS of their reasoning, and with what it listed before its conclusion."""
    rows = report.judged(report.read_rows(path))
    for x in rows:
        text, name, box = x["response"], x["entity"], x["pred_bbox_1000"]
        for fault in LACKS:
            said = name if fault == NAME else world.describe(world.ENTITIES[name])
            x[fault] = report.lacks(text, fault.split(" in ")[1], said)
        found = [re.findall(report.NUMBER, m[0]) for m in report.BOXES.finditer(text.split("Conclusion")[0])]
        near = any(report.iou([*map(float, b)], box) >= 0.7 for b in found if box and len(b) == 4)
        x |= {"contradicts the box": x["reasoning_contradicts"], "box not listed": not near}
        x |= {"box in Planning": bool(report.BOXES.search(text.split("Visual")[0])), "one box listed": len(found) == 1}
        x |= {"listed by another look": near and x[LIST], "boxes listed": len(found) / 100}  # a number, not a share
    return rows

class Points(dict):
    """A difference {seed: value}, shown with its sign."""

def minus(a, b):
    return Points({s: a[s] - b[s] for s in a if s in b})

class Runs:
    """Values of the finished jobs of some seeds: {seed: value}, in percent."""

    def __init__(self, out, seeds):
        self.out, self.seeds = out, seeds

    def files(self, job, name):
        """{seed: that file of the job}, where it is done."""
        return {s: self.out / f"{s}/{job}/{name}" for s in self.seeds if (self.out / f"{s}/{job}/done.json").exists()}

    def number(self, job, *keys, file="metrics.json"):
        return {s: 100 * reduce(getitem, keys, read_json(path)) for s, path in self.files(job, file).items()}

    def scores(self, model):
        return [self.number(f"eval_{model}", *keys) for keys in SCORES.values()]

    def gaps(self, a, b):
        """a - b, paired by seed."""
        return [*map(minus, self.scores(a), self.scores(b))]

    def share(self, model, key="correct", chosen=lambda x, seed: x["correct"]):
        """Of the answers `chosen` those for which `key` holds; where it is None nothing can be said."""
        files = self.files(f"eval_{model}", "predictions.jsonl")
        marks = {s: [x[key] for x in read_answers(path) if chosen(x, s)] for s, path in files.items()}
        marks = {s: [m for m in some if m is not None] for s, some in marks.items()}
        return {s: 100 * mean(some) for s, some in marks.items() if some}

    def trained(self, model, key):
        """Mean of a metric of training over the last ten steps."""
        files = self.files(model, "metrics.jsonl")
        return {s: 100 * mean(m[key] for m in report.read_rows(path)[-10:]) for s, path in files.items()}

def cell(values):
    """'mean (95 % interval over seeds)' of {seed: value}; a text stays."""
    if not values or isinstance(values, str):
        return values or "-"
    n, middle, sign = len(values), mean(values.values()), "+" * isinstance(values, Points)
    if n == 1:
        return f"{middle:{sign}.1f}"
    half = T_95[n - 2] * stdev(values.values()) / math.sqrt(n)
    return f"{middle:{sign}.1f} ({middle - half:{sign}.1f} to {middle + half:{sign}.1f})"

# ---- tables: each function gives (head, rows) of some, and its docstring is printed above them ----
def teacher(tag):
    return tag.strip("_").replace("_", " ") or "never errs"

def comparison(r):
    """`cot_sft_more` is CoT-SFT that goes on with chains for the rows that GRPO gets: 1,280 draws of them, GRPO has
    8 completions each of 320 and takes 2.6 times as long."""
    yield ["%", *SCORES, "parsed, seen", "parsed, unseen"], [
        [m, *r.scores(m), *(r.number(f"eval_{m}", s, "parse_rate") for s in ("seen", "unseen"))] for m in MODELS]
    pairs = ("cot_sft", "sft"), ("grpo", "cot_sft"), ("cot_sft_more", "cot_sft"), ("grpo", "cot_sft_more")
    yield ["points, paired by seed", *SCORES], [[f"{a} - {b}", *r.gaps(a, b)] for a, b in pairs]

def reasoning(r):
    """How many right, and wrong, answers rest on reasoning that does not hold: Planning should recall the target's
    look, Visual Analysis list it, Comparison name it as the one that fits."""
    kinds = {"right": lambda x, s: x["correct"], "wrong": lambda x, s: not x["correct"]}
    yield ["%", "answers", *FAULTS], [
        [m, kind, *(r.share(m, fault, kinds[kind]) for fault in FAULTS)] for kind in kinds for m in MODELS[2:]]

def erring_teacher(r):
    """The teacher misdescribes the target in Planning, Comparison and Conclusion: in a share of the chains, at random,
    or always in the same way a share of the entities. The final box is right. The last two tables are of entities of
    seen categories: those that the systematic teacher always gets wrong, and the others."""
    models, faults, wrong = MODELS[2:], FAULTS[1:], r.files(f"cot{SYSTEMATIC}", "wrong.json")
    pairs = ("grpo", "cot_sft_more"), ("grpo", "cot_sft"), ("cot_sft_more", "cot_sft")
    shares = {m + t: [r.share(m + t, fault) for fault in faults] for t in TEACHERS for m in models}
    kinds = {"misdescribed": True, "others": False}

    def of(kind, model, key="correct", right=(True, False)):
        def chosen(x, s):
            is_kind = s in wrong and (x["entity"] in read_json(wrong[s])) == kinds[kind]
            return is_kind and x["category"] in world.SEEN and x["correct"] in right

        return r.share(model, key, chosen)

    yield ["%", "teacher", *SCORES], [[m, teacher(t), *r.scores(m + t)] for t in TEACHERS for m in models]
    yield ["points, paired by seed", "teacher", *SCORES], [
        [f"{a} - {b}", teacher(t), *r.gaps(a + t, b + t)] for a, b in pairs for t in TEACHERS]
    yield ["% of right answers", "teacher", *faults, "of all answers: " + PLAN], [
        [m, teacher(t), *shares[m + t], r.share(m + t, PLAN, lambda x, s: True)] for t in TEACHERS for m in models]
    yield ["points of right answers", "teacher", *faults], [
        [f"{a} - {b}", teacher(t), *map(minus, shares[a + t], shares[b + t])] for a, b in pairs for t in TEACHERS]
    yield ["%", "entities", teacher(SYSTEMATIC), "points from never errs", "of right answers: " + PLAN], [
        [m, kind, of(kind, m + SYSTEMATIC), minus(of(kind, m + SYSTEMATIC), of(kind, m)),
         of(kind, m + SYSTEMATIC, PLAN, [True])] for m in models for kind in kinds]  # fmt: skip
    yield ["points, " + teacher(SYSTEMATIC), *kinds], [
        [f"{a} - {b}", *(minus(of(kind, a + SYSTEMATIC), of(kind, b + SYSTEMATIC)) for kind in kinds)]
        for a, b in pairs]  # fmt: skip

def grounded(r):
    """The reward `grounded` pays when the answered box is one that the reasoning wrote down before its conclusion, and
    its last: with an IoU of 0.7 or 0.9, at half the weight, or instead of `format`. `gated`: only then does `iou` pay.
    From the fourth column on, the tokens apart, all is of right answers."""
    cheats = "listed by another look", "box in Planning", "one box listed", "boxes listed"
    others = [PLAN, *FAULTS[3:], "box not listed", *cheats]
    for tag in ("", RANDOM):
        grpo, rows = f"grpo{tag}", []
        for m in (f"cot_sft{tag}", grpo, *(f"{grpo}_{arm}" for arm in GROUNDED)):
            (_, _, all_, _), lists, (_, _, gap, _) = r.scores(m), r.share(m, LIST), r.gaps(m, grpo)
            tokens = {s: v / 100 for s, v in r.number(f"eval_{m}", "completions/mean_length").items()}
            gaps = (gap, minus(lists, r.share(grpo, LIST))) if m != grpo else ({}, {})
            rows.append([m, all_, gaps[0], lists, gaps[1], *(r.share(m, fault) for fault in others), tokens])
        yield ["%", "all", f"points from {grpo}", LIST, f"its points from {grpo}", *others, "tokens"], rows

def skills(r):
    """What the base could do before: find by description, also among five or six objects, and asked to reason first;
    say a colour and a place; what a name means, without and with a picture; describe and find a name, and find a
    description, in a list in words; list a picture's objects. Words must be said, boxes in pictures have IoU 0.5."""
    keys = "find_2_4 find_5_6 find_reasoning color where know know_with_image recall_copy copy list".split()
    got = {m: [r.number(f"skills_{m}", key) for key in keys] for m in MODELS}
    yield ["%", *keys], [[m, *got[m]] for m in MODELS]
    yield ["points from base", *keys], [[m, *map(minus, got[m], got["base"])] for m in MODELS[1:]]

def arms(r):
    """Each differs from `grpo` in what its name says, shares its random numbers, and has as many steps and completions:
    `g4` has 32 prompts a step."""
    models, of_training = ["grpo", *(f"grpo_{arm}" for arm in ARMS)], {
        "rollouts right, last 10 steps": "acc@0.5", "groups of equal rewards, last 10 steps": "frac_reward_zero_std"}
    pairs = [*((m, "grpo") for m in models[1:]), ("grpo_karl_advantage", "grpo_karl_reward")]
    yield ["%", *SCORES, *of_training], [
        [m, *r.scores(m), *(r.trained(m, key) for key in of_training.values())] for m in models]
    yield ["points, paired by seed", *SCORES], [[f"{a} - {b}", *r.gaps(a, b)] for a, b in pairs]

def known_and_unknown(r):
    """Half of the names of every category get an embedding that means nothing (a random mixture of their category's)
    before stage 1. Their models have `_unknown` in their name; the others answer the same questions with all known.
    How much more known names gain than unknown ones, less the same difference where all are known: the interaction."""
    lost = r.files("unknown_base", "unknown.json")
    groups = {"known, seen": (1, 1), "unknown, seen": (0, 1), "known, unseen": (1, 0), "unknown, unseen": (0, 0)}

    def acc(model, known, seen):
        def chosen(x, s):
            is_unknown = s not in lost or x["entity"] in read_json(lost[s])
            return s in lost and (not is_unknown, x["category"] in world.SEEN) == (known, seen)

        return r.share(model, chosen=chosen)

    yield ["%", *groups], [
        [m + tag, *(acc(m + tag, *group) for group in groups.values())]
        for tag in ("_unknown", "") for m in ("sft", "cot_sft", "grpo")]  # fmt: skip
    head, rows = ["points, paired by seed", "categories", "known", "unknown", "known - unknown"], []
    for a, b in (("cot_sft", "sft"), ("grpo", "cot_sft"), ("grpo", "sft")):
        for split, seen in (("seen", 1), ("unseen", 0)):
            gains = [minus(acc(a + tag, k, seen), acc(b + tag, k, seen)) for tag in ("_unknown", "") for k in (1, 0)]
            more = [minus(*gains[:2]), minus(*gains[2:])]
            rows.append([f"{a} - {b}", split, *gains[:2], *more, minus(*more)])
    yield [*head, "the same, all known", "interaction"], rows

TABLES = {  # title: what makes it, from how many of --seeds
    "The paper's comparison": (comparison, 8),
    "Right answer, wrong reasoning": (reasoning, 8),
    "When the teacher errs": (erring_teacher, 5),
    "A reward that looks at the reasoning": (grounded, 5),
    "What training forgets": (skills, 5),
    "What matters in GRPO": (arms, 8),
    "Entities that the base knows, and does not": (known_and_unknown, 8),
}

def write_results(out, seeds, jobs):
    """results.md, and results.json: {title: {"row: column": {seed: value}}}."""
    text, values = "", {}
    for title, (make, n) in TABLES.items():
        text, values[title] = f"{text}### {title}\n\n{' '.join(make.__doc__.split())} Seeds {seeds[:n]}.\n\n", {}
        for head, rows in make(Runs(out, seeds[:n])):
            text += report.table(head, [map(cell, row) for row in rows]) + "\n"
            for row in rows:
                name = ", ".join([head[0], *(c for c in row if isinstance(c, str))])
                cells = {f"{name}: {column}": c for column, c in zip(head, row, strict=True) if isinstance(c, dict)}
                values[title] |= {key: {s: round(v, 3) for s, v in c.items()} for key, c in cells.items()}
    minutes = [read_json(path)["seconds"] / 60 for name in jobs if (path := out / name / "done.json").exists()]
    report.write(out / "results.md", f"{text}{len(minutes)} of {len(jobs)} jobs, {sum(minutes):.0f} minutes together.")
    report.write(out / "results.json", json.dumps(values, indent=1))

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = p.add_argument
    add("--out", type=Path, default=Path("runs/study"), help="folder of all runs; an interrupted study is continued")
    add("--seeds", type=int, nargs="+", default=[*range(10, 18)], help="first five: most parts; eight: the others")
    add("--at_once", type=int, default=os.cpu_count(), help="jobs that run at a time")
    add("--report", action="store_true", help="only write the tables of what is finished")
    args = p.parse_args(argv)
    out, jobs = args.out.resolve(), {}
    for part, n in PARTS:
        for seed in args.seeds[:n]:
            jobs |= {f"{seed}/{name}": command for name, command in jobs_of(seed, part).items()}
    finished = args.report or run_jobs(jobs, out, args.at_once)
    write_results(out, args.seeds, jobs)
    print(f"{(out / 'results.md').read_text()}study: {out / 'results.md'}, {out / 'results.json'}")
    sys.exit(not finished)

if __name__ == "__main__":
    main()
