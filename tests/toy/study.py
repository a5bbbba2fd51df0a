"""The questions of the paper, answered in the toy world: every table of the README's results, over several seeds.

  bash run_all.sh study            about 2 h 10 min on 2 CPU cores; also: python tests/toy/study.py --out runs/study
  python tests/toy/study.py --out runs/study --report        the tables of what is finished, at any time

A job is one command of the pipeline with a folder of its own, runs/study/SEED/NAME; `jobs_of` lists those of a seed. It
starts when the jobs whose folders it reads are finished, as many at once as there are cores, one thread each. Finished
jobs have a done.json and are skipped, trainers go on from their checkpoints: the same command continues after a stop.
results.json holds the numbers of every seed, results.md the tables.

N_SFT, the temperature and the learning rate of GRPO were chosen on seeds 0 and 1, which the study leaves out. With
1,600 samples in stage 1, GRPO has little to gain on the seen categories; with 1,400, CoT-SFT is fewer than 10 points
ahead of SFT on the unseen ones. At temperature 1, most of what GRPO learns is to sample with less noise, which does
not show in greedy answers.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

TOY = Path(__file__).resolve().parent
sys.path[:0] = [str(TOY), str(TOY.parents[1])]
import toy_world as world  # noqa: E402

BASE = "tests/toy/base"  # commands run in the root of the repo
SCENE = ("--canvas_size", 168, 112, "--grid", 3, 2, "--background", "gradient")
PLAIN = ("--layouts", "grid", "--entity_scale", 0.6, 0.95)
VARIED = ("--layouts", "grid", "random", "--entity_scale", 0.4, 0.95, "--color_jitter", 0.15, "--jpeg_quality", 60, 95)
SFT = ("--learning_rate", 1e-3, "--train_batch_size", 32, "--tokens_per_row", 8192, "--save_steps", 25)
LENGTH = ("--max_completion_length", 320)
STEPS, PROMPTS = 40, 16
TEMPERATURE = ("--temperature", 0.8)
GRPO = ("--train_batch_size", PROMPTS, "--num_generations", 8, *LENGTH, *TEMPERATURE, "--max_steps", STEPS,
        "--learning_rate", 1e-4, "--lr_scheduler", "constant", "--iou_threshold", 0.5, "--save_steps", 10,
        "--log_completions", 0)  # fmt: skip
N_SFT, N_GRPO = 1500, 640
MORE = ("--max_steps", STEPS * PROMPTS // 32)  # CoT-SFT continued: as many samples as GRPO's prompts
HELD_OUT = "disc"  # a seen category that one run does without
DIRECT = ("base", "sft", "unknown_sft", "novel_sft")  # answer without reasoning
CORRUPTIONS = (("noise", 2), ("color", 2), ("seams", 2))
# what differs from the GRPO of the main comparison; `knowledge` is the mastery.json of the filter
ARMS = {
    "binary": ("--reward_funcs", "binary", "format"),
    **{f"iou_{t}": ("--iou_threshold", t) for t in (0, 0.65, 0.8, 0.85)},
    "unfiltered": (),
    "g2": ("--num_generations", 2),
    "g4": ("--num_generations", 4),
    "beta_0.04": ("--beta", 0.04),
    "dapo": ("--loss_type", "dapo"),
    "dr_grpo": ("--loss_type", "dr_grpo"),
    "karl_advantage": ("knowledge", "--knowledge_form", "advantage"),
    "karl_reward": ("knowledge", "--knowledge_form", "reward", "--iou_threshold", 0.65),
    "temperature_1": ("--temperature", 1),
    "lr_5e-4": ("--learning_rate", 5e-4),
}


# ---- jobs ----
def jobs_of(seed, out, arms):
    """{name: command} of one seed; with `arms` all experiments, else the main comparison alone. A command names its own
    folder and those that it reads.
    """
    root, jobs = f"{out}/{seed}", {}

    def add(name, script, *flags, folder="--out", seed=seed):
        jobs[name] = [script, *map(str, flags), folder, f"{root}/{name}", "--seed", str(seed)]

    def synth(name, n, seed, *flags):
        add(name, "synth_data.py", "--source", f"{root}/world/train", "--num_samples", n, *SCENE, *flags,
            "--num_workers", 1, seed=seed)  # fmt: skip

    def chains(name, composites):
        add(name, "gen_cot.py", "--samples", f"{root}/{composites}/samples.jsonl", "--knowledge",
            f"{root}/world/knowledge.json")  # fmt: skip

    def sft(name, model, data, *flags):
        add(name, "train_sft.py", "--model", model, "--data", f"{root}/{data}/samples.jsonl", *SFT, *flags,
            folder="--output_dir")  # fmt: skip

    def grpo(name, model, data, *flags):
        add(name, "train_grpo.py", "--model", f"{root}/{model}/final", "--data", f"{root}/{data}/samples.jsonl", *GRPO,
            *flags, folder="--output_dir")  # fmt: skip
        evaluate(name)

    def pass_rates(name, model, composites):
        add(name, "filter.py", "--stage", "grpo", "--model", f"{root}/{model}/final", "--samples",
            f"{root}/{composites}/samples.jsonl", *LENGTH, *TEMPERATURE)  # fmt: skip

    def evaluate(model, name="", *flags, bench="kvg-bench"):
        path = BASE if model == "base" else f"{root}/{model}/final"
        prompt = "direct" if model in DIRECT else "r1"
        add(f"eval_{model}{name}", "eval_kvg.py", "--model", path, "--bench",
            f"{root}/world/{bench}.parquet", "--prompt", prompt, "--seen", *world.SEEN, *LENGTH, *flags)  # fmt: skip

    # 1. base, SFT, CoT-SFT, CoT-SFT continued, GRPO
    add("world", "tests/toy/toy_world.py", "--natural")
    synth("synth_sft", N_SFT, seed, *PLAIN)
    chains("cot", "synth_sft")
    synth("synth_grpo", N_GRPO, seed + 1000, *PLAIN)
    evaluate("base")
    sft("sft", BASE, "cot", "--target", "direct")
    sft("cot_sft", BASE, "cot")
    for model in ("sft", "cot_sft"):
        evaluate(model)
    pass_rates("filter", "cot_sft", "synth_grpo")
    chains("cot_more", "filter")
    sft("cot_sft_more", f"{root}/cot_sft/final", "cot_more", *MORE)
    evaluate("cot_sft_more")
    grpo("grpo", "cot_sft", "filter")
    if not arms:
        return jobs
    # 2. what matters in GRPO
    for arm, flags in ARMS.items():
        known = ("--knowledge", f"{root}/filter/mastery.json") if "knowledge" in flags else ()
        data = "synth_grpo" if arm == "unfiltered" else "filter"
        grpo(f"grpo_{arm}", "cot_sft", data, *(f for f in flags if f != "knowledge"), *known)
    # a seen category that is held out of both stages
    others = ("--categories", *(c for c in world.SEEN if c != HELD_OUT))
    synth("without_synth", N_SFT, seed, *PLAIN, *others)
    chains("without_cot", "without_synth")
    sft("without_cot_sft", BASE, "without_cot")
    evaluate("without_cot_sft")
    synth("without_synth2", N_GRPO, seed + 1000, *PLAIN, *others)
    pass_rates("without_filter", "without_cot_sft", "without_synth2")
    grpo("without_grpo", "without_cot_sft", "without_filter")
    # 3. entities that the base knows nothing of
    add("unknown_base", "tests/toy/study.py", folder="--unknown")
    sft("unknown_sft", f"{root}/unknown_base", "cot", "--target", "direct")
    sft("unknown_cot_sft", f"{root}/unknown_base", "cot")
    pass_rates("unknown_filter", "unknown_cot_sft", "synth_grpo")
    grpo("unknown_grpo", "unknown_cot_sft", "unknown_filter")
    for model in ("unknown_sft", "unknown_cot_sft"):
        evaluate(model)
    # 4. spoilt and natural pictures, with and without options against shortcuts; entities that no sample shows
    synth("varied_synth", N_SFT, seed, *VARIED)
    chains("varied_cot", "varied_synth")
    sft("varied_cot_sft", BASE, "varied_cot")
    evaluate("varied_cot_sft")
    for model in ("base", "sft", "cot_sft", "grpo", "varied_cot_sft"):
        for kind, strength in CORRUPTIONS:
            evaluate(model, f"_{kind}", "--corrupt", kind, "--corrupt_strength", strength)
        evaluate(model, "_natural", bench="natural")
    synth("novel_synth", N_SFT, seed, *PLAIN, "--holdout_entities", 0.25)
    chains("novel_cot", "novel_synth")
    sft("novel_cot_sft", BASE, "novel_cot")
    sft("novel_sft", BASE, "novel_cot", "--target", "direct")
    for model in ("novel_cot_sft", "novel_sft"):
        evaluate(model)
    return jobs


def make_unknown(folder, seed):
    """The base without the knowledge of half of the names of every category; unknown.json lists them.

    A name is one token: its embedding, the only place that tells it from other names, becomes a random mixture of those
    of its category, with their mean and spread. It can still be read and written, as the name of nothing in particular.
    """
    import make_toy
    import torch

    model = make_toy.Qwen2VLForConditionalGeneration.from_pretrained(TOY / "base", dtype=torch.float32)
    rng, table, unknown = random.Random(seed), model.get_input_embeddings().weight.data, set()
    torch.manual_seed(seed)
    for category in world.SEEN + world.UNSEEN:
        names = [n for n in world.ENTITIES if world.ENTITIES[n][0] == category]
        tokens = [token for (token,) in map(make_toy.TOKENIZER.encode, names)]
        old = table[tokens]
        for i in rng.sample(range(len(names)), len(names) // 2):
            weights = torch.randn(len(names)) / math.sqrt(len(names) - 1)
            table[tokens[i]] = old.mean(0) + weights @ (old - old.mean(0))
            unknown.add(names[i])
    for known in (True, False):
        turns = [make_toy.know_turn(n) for n in world.ENTITIES if (n not in unknown) == known]
        got = make_toy.answers(model, [q for q, _ in turns])
        right = mean(text == answer for text, (_, answer) in zip(got, turns, strict=True))
        print(f"{'known' if known else 'unknown'}: {len(turns)} names, {100 * right:.1f} % described right")
    for part in (model, make_toy.TOKENIZER, make_toy.PROCESSOR):
        part.save_pretrained(folder)
    (Path(folder) / "unknown.json").write_text(json.dumps(sorted(unknown)) + "\n")


def needs(name, command, out):
    """Names of the jobs whose folders a command reads."""
    folders = {Path(a).relative_to(out).parts[:2] for a in command if a.startswith(f"{out}/")}
    return {"/".join(parts) for parts in folders} - {name}


def jobs_done(jobs, out):
    """Names of the jobs that are done; stops where one was done by another command, or before what it reads."""
    marks = {name: path for name in jobs if (path := out / name / "done.json").exists()}
    for name, path in marks.items():
        others = [marks[n] for n in needs(name, jobs[name], out) if n in marks]
        if json.loads(path.read_text())["command"] != portable(jobs[name], out):
            sys.exit(f"study: {path.parent}: made by another command than now; delete it, or take another --out")
        if any(other.stat().st_mtime > path.stat().st_mtime for other in others):
            sys.exit(f"study: {path.parent}: older than what it reads; delete it, or take another --out")
    return set(marks)


def portable(command, out):
    return [a.replace(f"{out}/", "") for a in command]


def run_jobs(jobs, out, at_once):
    """Runs all jobs that are not done; stops when one fails. Returns whether all are done."""
    running, failed, began, done = {}, [], time.time(), jobs_done(jobs, out)
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // at_once)), "TOKENIZERS_PARALLELISM": "false"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("study: stopped; the same command goes on"))
    try:
        while len(done) < len(jobs) and not failed:
            for name, command in jobs.items():
                free = len(running) < at_once and name not in done | running.keys()
                if free and needs(name, command, out) <= done:
                    (out / name).mkdir(parents=True, exist_ok=True)
                    with open(out / f"{name}.log", "a") as log:
                        process = subprocess.Popen(
                            [sys.executable, *command], stdout=log, stderr=log, cwd=TOY.parents[1], env=env
                        )
                    running[name] = process, time.time()
            time.sleep(0.2)
            for name, (process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    print(f"{name} failed: {' '.join(jobs[name])}\n{(out / f'{name}.log').read_text()[-2000:]}")
                    failed.append(name)
                    continue
                took, total = time.time() - since, (time.time() - began) / 60
                mark = {"seconds": round(took, 1), "command": portable(jobs[name], out)}
                (out / name / "done.tmp").write_text(json.dumps(mark) + "\n")
                (out / name / "done.tmp").replace(out / name / "done.json")
                for checkpoint in (out / name).glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
                done.add(name)
                print(f"{len(done)}/{len(jobs)} {name} {took:.0f} s, {total:.0f} min", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return not failed


# ---- tables ----
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's 97.5 % points, 2 seeds and more


def table(head, rows):
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + "\n"


def seconds(mark):
    return json.loads(mark.read_text())["seconds"]


class Results:
    """Scores of the finished jobs of some seeds, in percent; `numbers` keeps what a table shows."""

    def __init__(self, out, seeds):
        self.out, self.seeds, self.numbers = out, seeds, {}

    def having(self, *names):
        """Seeds for which all of these jobs are done."""
        return [s for s in self.seeds if all((self.out / f"{s}/{n}/done.json").exists() for n in names)]

    def lines(self, seed, name, file):
        text = (self.out / f"{seed}/{name}/{file}").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def score(self, seed, model, split, key):
        metrics = json.loads((self.out / f"{seed}/eval_{model}/metrics.json").read_text(encoding="utf-8"))
        return 100 * (metrics[split] if split in metrics else metrics["categories"][split])[key]

    def cell(self, name, values, sign=""):
        """'mean (95 % interval over seeds)' of {seed: value}, which results.json keeps under this name."""
        if not values:
            return "-"
        self.numbers[name], n, middle = {s: round(v, 3) for s, v in values.items()}, len(values), mean(values.values())
        if n == 1:
            return f"{middle:{sign}.1f}"
        half = T_95[n - 2] * stdev(values.values()) / math.sqrt(n)
        return f"{middle:{sign}.1f} ({middle - half:{sign}.1f} to {middle + half:{sign}.1f})"

    def scores(self, model, split="all", key="acc"):
        seeds = self.having(f"eval_{model}")
        return self.cell(f"{model}, {split}, {key}", {s: self.score(s, model, split, key) for s in seeds})

    def gain(self, model, other, split="all", key="acc"):
        """model - other, paired by seed."""
        seeds = self.having(f"eval_{model}", f"eval_{other}") if model != other else []
        gains = {s: self.score(s, model, split, key) - self.score(s, other, split, key) for s in seeds}
        return self.cell(f"{model} - {other}, {split}, {key}", gains, "+")

    def share(self, name, model, chosen, counted=lambda row, seed: row["correct"]):
        """Of the answers `chosen` those that are `counted`, functions of a row of predictions.jsonl and the seed.

        Answers for which `counted` is None are left out.
        """
        rows = {s: self.lines(s, f"eval_{model}", "predictions.jsonl") for s in self.having(f"eval_{model}")}
        marks = {s: [counted(x, s) for x in rows[s] if chosen(x, s)] for s in rows}
        marks = {s: [m for m in marks[s] if m is not None] for s in rows}
        return self.cell(f"{model}, {name}", {s: 100 * mean(m) for s, m in marks.items() if m})

    def rollouts(self, model, key, first, last):
        """Mean of a training metric over these steps, both included."""
        runs = {s: self.lines(s, model, "metrics.jsonl")[first - 1 : last] for s in self.having(model)}
        means = {s: 100 * mean(m[key] for m in run) for s, run in runs.items()}
        return self.cell(f"{model}, {key} in steps {first} to {last}", means)

    def minutes(self, model):
        times = [seconds(self.out / f"{s}/{model}/done.json") / 60 for s in self.having(model)]
        return f"{mean(times):.1f}" if times else "-"


def differences(r, pairs):
    splits = ("seen", "unseen", "all")
    return table(
        ["points, paired by seed", *splits, "mean IoU"],
        [[f"{a} - {b}", *(r.gain(a, b, s) for s in splits), r.gain(a, b, key="mean_iou")] for a, b in pairs],
    )


def comparison(r):
    models, splits = ("base", "sft", "cot_sft", "cot_sft_more", "grpo"), ("seen", "unseen", "all")
    pairs = (("cot_sft", "sft"), ("grpo", "cot_sft"), ("cot_sft_more", "cot_sft"), ("grpo", "cot_sft_more"))
    text = table(
        ["model", "seeds", *(f"{s} %" for s in splits), "mean IoU %", "parsed, seen %", "parsed, unseen %"],
        [[m, len(r.having(f"eval_{m}")), *(r.scores(m, s) for s in splits), r.scores(m, key="mean_iou"),
          *(r.scores(m, s, "parse_rate") for s in ("seen", "unseen"))] for m in models],
    )  # fmt: skip
    return text + differences(r, pairs)


def experiments(r):
    head = ["arm", "seeds", "all %", "all, points from grpo", "unseen, points from grpo", "mean IoU, points from grpo"]
    head += ["rollouts right in steps 1 to 10 %", f"in steps {STEPS - 9} to {STEPS} %", "groups of equal rewards %"]
    spans = (("acc@0.5", 1, 10), ("acc@0.5", STEPS - 9, STEPS), ("frac_reward_zero_std", 1, STEPS))
    text = table(
        [*head, "minutes"],
        [[arm, len(r.having(f"eval_{arm}")), r.scores(arm), *(r.gain(arm, "grpo", s) for s in ("all", "unseen")),
          r.gain(arm, "grpo", key="mean_iou"), *(r.rollouts(arm, *span) for span in spans), r.minutes(arm)]
         for arm in ("grpo", *(f"grpo_{a}" for a in ARMS))],
    )  # fmt: skip
    karl = "grpo_karl_reward"  # it has a threshold of its own
    return text + differences(r, ((karl, "grpo_iou_0.65"), ("grpo_karl_advantage", karl)))


def held_out(r):
    def others(x, _):
        return x["category"] in world.SEEN and x["category"] != HELD_OUT

    models = ("cot_sft", "grpo", "without_cot_sft", "without_grpo")
    return table(
        ["model", f"{HELD_OUT} %", "other seen %", "unseen %"],
        [[m, r.scores(m, HELD_OUT), r.share("other seen", m, others), r.scores(m, "unseen")] for m in models],
    )


def known_and_unknown(r):
    lost = {s: json.loads((r.out / f"{s}/unknown_base/unknown.json").read_text()) for s in r.having("unknown_base")}
    groups = [(known, seen) for seen in (True, False) for known in (True, False)]

    def chosen(group):
        return lambda x, seed: (x["entity"] not in lost[seed], x["category"] in world.SEEN) == group

    names = {g: f"{'' if g[0] else 'un'}known, {'seen' if g[1] else 'unseen'} category" for g in groups}
    return table(
        ["model", *(f"{name} %" for name in names.values())],
        [
            [m, *(r.share(names[g], m, chosen(g)) for g in groups)]
            for m in ("sft", "cot_sft", "grpo", "unknown_sft", "unknown_cot_sft", "unknown_grpo")
        ],
    )


def pictures(r):
    kinds = [f"_{kind}" for kind, _ in CORRUPTIONS] + ["_natural"]
    models = ("base", "sft", "cot_sft", "grpo", "varied_cot_sft")
    return table(
        ["model", "composites %", *(f"{kind[1:]} %" for kind in kinds)],
        [[m, *(r.scores(m + kind) for kind in ("", *kinds))] for m in models],
    )


def novel(r):
    shown = {s: {e["entity"] for row in r.lines(s, "novel_synth", "samples.jsonl") for e in row["entities"]}
             for s in r.having("novel_synth")}  # fmt: skip

    def chosen(is_shown):
        return lambda x, seed: x["category"] in world.SEEN and (x["entity"] in shown[seed]) == is_shown

    return table(
        ["model", "shown %", "not shown %", "unseen categories %"],
        [[m, r.share("shown", m, chosen(True)), r.share("not shown", m, chosen(False)), r.scores(m, "unseen")]
         for m in ("sft", "novel_sft", "cot_sft", "novel_cot_sft")],
    )  # fmt: skip


def reasoning(r):
    def lacks(part, what):
        """Whether this part of the reasoning does not say what(target)."""

        def fault(x, _):
            said = re.search(rf"{part}:(.*?)(\n[A-Z]|</think>|\Z)", x["response"], re.DOTALL)
            return said is None or what(x["entity"]) not in said[1]

        return fault

    def look(name):
        return world.describe(world.ENTITIES[name])

    faults = {"target's name not in Planning": lacks("Planning", str)}
    faults |= {f"target's look not in {p}": lacks(p, look) for p in ("Planning", "Visual Analysis", "Comparison")}
    faults["contradicts the box, by rule"] = lambda x, _: x["reasoning_contradicts"]
    kinds = {"right": lambda x, _: x["correct"], "wrong": lambda x, _: not x["correct"]}
    models = ("cot_sft", "cot_sft_more", "grpo", "grpo_binary", "grpo_iou_0.8")
    return table(
        ["model", "answers", "seeds", *(f"{fault} %" for fault in faults)],
        [[m, kind, len(r.having(f"eval_{m}")), *(r.share(f"{kind}, {f}", m, chosen, faults[f]) for f in faults)]
         for kind, chosen in kinds.items() for m in models],
    )  # fmt: skip


TABLES = {  # title: what makes it, a job that its seeds have
    "The paper's comparison": (comparison, "world"),
    "What matters in GRPO": (experiments, "grpo_binary"),
    f"One seen category, {HELD_OUT}, held out of both stages": (held_out, "eval_without_grpo"),
    "Entities that the base knows, and does not": (known_and_unknown, "unknown_base"),
    "Other pictures than clean composites": (pictures, "eval_varied_cot_sft"),
    "Entities of seen categories that no sample shows": (novel, "novel_synth"),
    "Right answer, wrong reasoning": (reasoning, "eval_grpo"),
}


def report(out, seeds):
    """(the tables as Markdown, {title: {name: value of every seed}})"""
    text, numbers = "", {}
    for title, (make, needed) in TABLES.items():
        results = Results(out, Results(out, seeds).having(needed))
        text += f"### {title}\n\n{make(results)}"
        numbers[title] = results.numbers
    times = [seconds(mark) / 60 for mark in out.glob("*/*/done.json")]
    return text + f"{len(times)} jobs of {sum(times):.0f} minutes together.\n", numbers


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--out", default="runs/study", help="folder of all runs; an interrupted study is continued")
    p.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14], help="of the main comparison")
    p.add_argument("--arm_seeds", type=int, nargs="+", help="of all experiments; default: the first three of --seeds")
    p.add_argument("--at_once", type=int, default=os.cpu_count(), help="jobs that run at a time")
    p.add_argument("--report", action="store_true", help="only write the tables of what is finished")
    p.add_argument("--unknown", metavar="FOLDER", help="write the base without half of its knowledge, and stop")
    p.add_argument("--seed", type=int, default=0, help="of --unknown")
    args = p.parse_args()
    args.arm_seeds = args.seeds[:3] if args.arm_seeds is None else args.arm_seeds
    if not set(args.arm_seeds) <= set(args.seeds) or len(args.seeds) > len(T_95) + 1 or args.at_once < 1:
        p.error(f"want --arm_seeds among --seeds, at most {len(T_95) + 1} of these, and --at_once of 1 or more")
    if args.unknown:
        return make_unknown(args.unknown, args.seed)
    out, finished = Path(args.out).resolve(), True
    out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        parts = [(s, False) for s in args.seeds] + [(s, True) for s in args.arm_seeds]  # in this order
        jobs = {f"{s}/{name}": command for s, arms in parts for name, command in jobs_of(s, out, arms).items()}
        finished = run_jobs(jobs, out, args.at_once)
    text, numbers = report(out, args.seeds)
    (out / "results.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    (out / "results.md").write_text(text)
    print(f"{text}study: {out / 'results.md'}, {out / 'results.json'}")
    sys.exit(not finished)


if __name__ == "__main__":
    main()
