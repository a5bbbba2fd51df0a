"""The GRPO training pass and step against the plain way and against TRL. By hand: python tests/bench_grpo.py

pass   log-probs of G = 8 completions behind one prompt with a photo (>= 512 tokens), forward and backward:
         naive   G rows, each with its own prompt and image (tests/plain.py)
         ours    one packed row (train_grpo.pack, CompletionLogProbs)
       Time in turns, largest difference of log-probs and of gradients, and peak memory, each in a process of its own.
step   with --trl_python: whole steps of train_grpo.py and of TRL's GRPOTrainer (tests/trl_baseline.py): the same
       model, prompts and number of tokens, both with the vision tower trained, one process after the other.
"""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import plain
import torch
from bench_tools import (
    ROOT,
    build_model,
    parser,
    peak_memory,
    prompt_text,
    seconds_of,
    shown,
    spread,
    write_photos,
    write_result,
)

import train_grpo as g

# train_grpo.py with a reward that is drawn, so that every group trains, and completions that never stop early
ENDLESS = """
import random, resource
import train_grpo as g
g.stop_ids = lambda tokenizer: []
g.REWARDS["random"] = lambda text, sample, args: random.Random(text).random()
g.main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def training_pass(side, geometry, length, generations, freeze_vision=False):
    """(a call that runs forward and backward of one group, the model); the call returns the log-probs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, image_processor = build_model(geometry, device, torch.bfloat16 if device == "cuda" else None)
    model.model.visual.requires_grad_(not freeze_vision)
    model.train()
    with tempfile.TemporaryDirectory() as folder:
        (photo,) = write_photos(folder, 1)
        inputs = g.chat_inputs(tokenizer, image_processor, photo, prompt_text(tokenizer, 110), g.BOX_STYLES["qwen2_vl"])
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(3, 500, (generations, length), generator=generator).tolist()
    weights = torch.randn(generations, generator=generator)[:, None].expand(-1, length).to(device)
    scorer = g.CompletionLogProbs(model)
    moved = inputs | {key: inputs[key].to(device) for key in ("pixel_values", "image_grid_thw")}

    def run():
        model.zero_grad()
        if side == "naive":
            logps, _ = plain.completion_logps(model, tokenizer, moved, completions)
        else:
            logps = scorer(g.pack([(inputs, completions)], device)).view(generations, length)
        (logps * weights).sum().backward()
        return logps.detach()

    return run, model, len(inputs["prompt_ids"])


def memory_of(*args):
    return training_pass(*args)[0]


def compare_passes(args, result):
    for length in args.completion_lengths:
        cases = {s: training_pass(s, args.geometry, length, args.num_generations, args.freeze_vision)
                 for s in ("naive", "ours")}  # fmt: skip
        logps = {side: run() for side, (run, _, _) in cases.items()}
        gap = (logps["naive"] - logps["ours"]).abs().max().item()
        naive, ours = (dict(model.named_parameters()) for _, model, _ in cases.values())
        grads = [(naive[n].grad - ours[n].grad).abs().max() / naive[n].grad.abs().max()
                 for n in naive if naive[n].grad is not None and naive[n].grad.abs().max() > 0]  # fmt: skip
        times = [{side: seconds_of(run) for side, (run, _, _) in cases.items()} for _ in range(args.rounds)]
        peaks = {
            s: peak_memory(partial(memory_of, s, args.geometry, length, args.num_generations, args.freeze_vision))
            for s in cases
        }
        name = f"C={length}"
        result[name] = {
            "prompt_tokens": cases["ours"][2],
            "naive / ours, time": spread([t["naive"] / t["ours"] for t in times]),
            "seconds": {side: spread([t[side] for t in times]) for side in cases},
            "peak_mb": {side: peak / 2**20 for side, peak in peaks.items()},
            "ours / naive, peak memory": peaks["ours"] / peaks["naive"],
            "log-prob difference": gap,
            "gradient difference, relative": max(grads).item(),
        }
        print(shown(f"training pass, naive / ours, {name}", result[name]["naive / ours, time"]))
        ours, naive = (peaks[side] / 2**20 for side in ("ours", "naive"))
        print(f"  log-probs differ by {gap:.1e}, gradients by {max(grads):.1e} relative")
        print(f"  peak memory {ours:.0f} of {naive:.0f} MB = {ours / naive:.2f}")


def compare_steps(args, result):
    """Whole steps: rollout, reward, training pass, update; the first step of every process is warm-up."""
    length, steps = args.completion_lengths[0], 4
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, tokenizer, image_processor = build_model(args.geometry)
        for part in (model, tokenizer, image_processor):
            part.save_pretrained(folder / "model")
        rows, prompts = [], []
        for i, photo in enumerate(write_photos(folder, args.prompts)):
            question = prompt_text(tokenizer, 80 + 5 * i)
            answer = {"role": "assistant", "content": "<|box_start|>(1,1),(9,9)<|box_end|>"}
            messages = [{"role": "user", "content": "<image>" + question}, answer]
            rows.append({"id": str(i), "images": [Path(photo).name], "messages": messages})
            prompts.append({"image": photo, "text": question + g.R1_SUFFIX})
        for name, lines in (("rows", rows), ("prompts", prompts)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        G = str(args.num_generations)
        ratios, seconds = [], {"ours": [], "trl": []}
        for turn in range(args.step_rounds):
            out = folder / f"run{turn}"
            flags = ["--model", folder / "model", "--data", folder / "rows.jsonl", "--output_dir", out]
            flags += ["--train_batch_size", str(args.prompts), "--num_generations", G, "--max_steps", str(steps)]
            flags += ["--max_completion_length", str(length), "--reward_funcs", "random", "--save_steps", "0"]
            command = [sys.executable, "-c", ENDLESS, *map(str, flags)]
            done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            peak_mb = float(done.stdout.split()[-1])
            metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
            assert all(m["completions/mean_length"] == length for m in metrics)
            command = [args.trl_python, ROOT / "tests/trl_baseline.py", "grpo", "--model", folder / "model"]
            command += ["--prompts", folder / "prompts.jsonl", "--num_generations", G, "--steps", str(steps)]
            command += ["--max_completion_length", str(length), "--out", folder / "trl.json"]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
            trl = json.loads((folder / "trl.json").read_text())
            assert set(trl["completion_tokens"]) == {args.prompts * args.num_generations * length}
            seconds["ours"].append(sum(m["step_time"] for m in metrics) / len(metrics))
            seconds["trl"].append(sum(trl["step_seconds"][1:]) / (len(trl["step_seconds"]) - 1))
            ratios.append(seconds["trl"][-1] / seconds["ours"][-1])
        last = {k: v for k, v in metrics[-1].items() if k.startswith("time/") or "per_second" in k or k == "mfu"}
    name = f"step, {args.prompts} prompts x {G}, C={length}"
    result[name] = {"trl / ours, time": spread(ratios), "seconds": {s: spread(v) for s, v in seconds.items()},
                    "trl": trl["versions"], "process peak_mb": {"ours": peak_mb, "trl": trl["peak_rss_mb"]},
                    "our last step": last}  # fmt: skip
    print(shown(f"{name}, TRL {trl['versions']['trl']} / ours", result[name]["trl / ours, time"]))
    print(f"  ours {spread(seconds['ours'])['median']:.2f} s and {peak_mb:.0f} MB in the process, "
          f"TRL {spread(seconds['trl'])['median']:.2f} s and {trl['peak_rss_mb']:.0f} MB")  # fmt: skip


def main():
    p = parser(__doc__, "grpo")
    p.add_argument("--completion_lengths", type=int, nargs="+", default=[64, 256])
    p.add_argument("--num_generations", type=int, default=8)
    p.add_argument("--freeze_vision", action="store_true", help="in the training pass")
    p.add_argument("--trl_python", help="Python of an environment with TRL, see tests/trl_baseline.py")
    p.add_argument("--prompts", type=int, default=2, help="of a whole step")
    p.add_argument("--step_rounds", type=int, default=3)
    args = p.parse_args()
    result = {"args": vars(args)}
    compare_passes(args, result)
    if args.trl_python:
        compare_steps(args, result)
    write_result(args.out, result)


if __name__ == "__main__":
    main()
