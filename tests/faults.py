"""Kills every stage at random moments (SIGKILL), starts it again, and compares the end with an undisturbed run.

  python tests/faults.py --kills 42 --seed 0        about 3 min on 2 CPU cores; the last line says what was lost
  python tests/faults.py --kills 42 --seed 0 --signal TERM     as before a pre-emption: a trainer saves first

Seven commands, the six scripts with both trained stages of filter.py, on a small toy world and a tiny random model. A
command is killed at a moment drawn evenly over the time that it takes undisturbed, again and again, until it ends by
itself. Then its output must equal the undisturbed one: data stages byte for byte, trainers metric for metric (without
times) and weight for weight, on one rank on the CPU.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
from conftest import SCENE_FLAGS, build_tiny  # noqa: E402

TIMES = re.compile("time|second|mfu")


def stages(base):
    """{name: (script, flags without the output, output flag, files to compare)}; inputs are undisturbed outputs."""
    model, world, runs = base / "model", base / "world", base / "runs"
    composites, chains, data = (f"{runs}/{s}/samples.jsonl" for s in ("synth_data", "gen_cot", "filter_cot"))
    train = ("--model", model, "--train_batch_size", 4, "--learning_rate", 1e-3, "--save_steps", 2, "--data", data)
    short = ("--max_completion_length", 24, "--batch_size", 16)
    weights = ("metrics.jsonl", "final/model.safetensors")
    rows = ("samples.jsonl", "rejected.jsonl", "stats.json")
    grpo = ("--max_completion_length", 12, "--num_generations", 3, "--reward_funcs", "letters", "--max_steps", 8)
    return {
        "synth_data": ("synth_data.py", ("--source", world / "train", "--num_samples", 400, *SCENE_FLAGS), "--out",
                       ("samples.jsonl", "stats.json", "preview.png", "images")),
        "gen_cot": ("gen_cot.py", ("--samples", composites, "--knowledge", world / "knowledge.json"), "--out", rows),
        "filter_cot": ("filter.py", ("--stage", "cot", "--samples", chains), "--out", rows),
        "train_sft": ("train_sft.py", (*train, "--max_steps", 20), "--output_dir", weights),
        "filter_grpo": ("filter.py", ("--stage", "grpo", "--samples", composites, "--model", model, *short,
                                      "--min_correct", 0, "--max_correct", 4), "--out", (*rows, "mastery.json")),
        "train_grpo": ("tests/grpo_letters.py", (*train, *grpo), "--output_dir", (*weights, "samples.jsonl")),
        "eval_kvg": ("eval_kvg.py", ("--bench", composites, "--model", model, *short), "--out",
                     ("predictions.jsonl", "metrics.json", "table.md")),
    }  # fmt: skip


def start(stage, out):
    script, flags, flag, _ = stage
    command = [sys.executable, ROOT / script, *flags, flag, out]
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=ROOT, start_new_session=True)


def content(path):
    """What must be equal: bytes, or JSON without times and without the run's own folder."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if not TIMES.search(k) and k != "config"}
        return value

    if path.is_dir():
        return {p.name: p.read_bytes() for p in sorted(path.iterdir())}
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return timeless(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def differences(stage, ours, theirs):
    """Files of the disturbed run that are missing or differ."""
    return [f for f in stage[3] if not (ours / f).exists() or content(ours / f) != content(theirs / f)]


def disturb(name, stage, base, seconds, kills, rng, sent):
    """Runs a stage to its end under up to `kills` signals; returns (how many met a living process, differences)."""
    out, met = base / "runs" / f"{name}-disturbed", 0
    shutil.rmtree(out, ignore_errors=True)
    while True:
        run, until = start(stage, out), time.time() + rng.uniform(0, seconds)
        while met < kills and time.time() < until and run.poll() is None:
            time.sleep(0.002)
        if met == kills or run.poll() is not None:
            break
        os.killpg(run.pid, sent)
        run.wait()
        met += 1
    if run.wait() != 0:
        return met, [f"ended with {run.returncode}: {Path(f'{out}.log').read_text()[-500:]}"]
    return met, differences(stage, out, base / "runs" / name)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--kills", type=int, default=42)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    args = p.parse_args()
    rng, base = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="faults-"))
    for folder in ("runs", "model"):
        (base / folder).mkdir()
    world = [sys.executable, str(ROOT / "tests/toy/toy_world.py"), "--out", str(base / "world"), "--per_entity", "2"]
    subprocess.run([*world, "--bench_images", "2", "2"], check=True, stdout=subprocess.DEVNULL)
    for part in build_tiny("qwen2_vl"):
        part.save_pretrained(base / "model")
    seconds, met, lost = {}, 0, 0
    for name, stage in stages(base).items():
        began = time.time()
        assert start(stage, base / "runs" / name).wait() == 0, Path(f"{base}/runs/{name}.log").read_text()
        seconds[name] = time.time() - began
        left = (args.kills - met) // (len(stages(base)) - len(seconds) + 1)
        hits, wrong = 0, []
        while hits < left:  # a run that ended early leaves kills for another one
            more, found = disturb(
                name, stage, base, seconds[name], left - hits, rng, signal.Signals[f"SIG{args.signal}"]
            )
            hits, wrong = hits + more, wrong + found
        met, lost = met + hits, lost + len(wrong)
        print(f"{name}: {seconds[name]:.1f} s undisturbed, {hits} kills, {wrong or 'no difference'}", flush=True)
    print(f"faults: {met} kills over {len(seconds)} commands, {lost} differences; SIG{args.signal}, seed {args.seed}")
    shutil.rmtree(base)
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
