"""The GRPO training pass and step against the plain way and against TRL. By hand: python tests/bench_grpo.py

pass   log-probs of G = 8 completions behind one prompt with a photo (>= 512 tokens), forward and backward: G rows, each
       with its own prompt and image (naive, tests/plain.py), against one packed row (ours). Time in turns, largest
       difference of log-probs and gradients, and peak memory, each in a process of its own.
step   with --trl_python: whole steps of train_grpo.py and of TRL's GRPOTrainer (tests/trl_baseline.py): the same
       model, prompts and number of tokens, both with the vision tower trained, one process after the other.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import bench_tools as tools
import plain
import torch
from bench_tools import spread

import train_grpo as g

# train_grpo.py with a reward that is drawn, so that every group trains, and completions that never stop early
ENDLESS = """
import random
import train_grpo as g
g.STOP = []
g.REWARD_FUNCS["random"] = lambda c, prompt, args: random.Random(c.text).random()
g.main()
"""

def training_pass(side, args, length):
    """(a call that runs forward and backward of one group and returns the log-probs, the model, prompt tokens)"""
    cuda, G, generator = torch.cuda.is_available(), args.num_generations, torch.Generator().manual_seed(0)
    device = "cuda" if cuda else "cpu"
    model, *processors = tools.build_model(args.geometry, device, torch.bfloat16 if cuda else torch.float32)
    model.train().model.visual.requires_grad_(not args.freeze_vision)
    with tempfile.TemporaryDirectory() as folder:
        text, (photo,) = tools.prompt_text(processors[0], 110), tools.write_photos(folder, 1)
        inputs = g.chat_inputs((*processors, g.BOX_STYLES["qwen2_vl"]), photo, text)
    ids = torch.randint(3, 500, (G, length), generator=generator).tolist()
    weights = torch.randn(G, generator=generator)[:, None].expand(-1, length).to(device)
    group = inputs | {"completions": [g.Completion(c, None, False) for c in ids]}
    scorer = g.CompletionLogProbs(g.packable(model)) if side == "ours" else None

    def call():
        model.zero_grad()
        if side == "naive":
            logps, _ = plain.completion_logps(model, processors[0], inputs, ids)
        else:
            logps = scorer(g.pack_groups([group], device)).view(G, length)
        (logps * weights).sum().backward()
        return logps.detach()

    return call, model, len(inputs["prompt_ids"])

def memory_of(*args):
    return training_pass(*args)[0]

def compare_passes(args, result):
    for length in args.completion_lengths:
        cases = {side: training_pass(side, args, length) for side in ("naive", "ours")}
        logps = {side: call() for side, (call, _, _) in cases.items()}
        pairs = zip(*(model.parameters() for _, model, _ in cases.values()), strict=True)
        gap = max((a.grad - b.grad).abs().max() / a.grad.abs().max() for a, b in pairs if a.grad is not None and a.grad.any())
        times = [{side: tools.seconds_of(call) for side, (call, _, _) in cases.items()} for _ in range(args.rounds)]
        told = result[f"C={length}"] = {
            "prompt_tokens": cases["ours"][2],
            "naive / ours, time": spread([t["naive"] / t["ours"] for t in times]),
            "seconds": {side: spread([t[side] for t in times]) for side in cases},
            "peak_mb": {side: tools.peak_memory(partial(memory_of, side, args, length)) for side in cases},
            "log-prob difference": (logps["naive"] - logps["ours"]).abs().max().item(),
            "gradient difference, relative": gap.item(),
        }
        tools.show(f"training pass, naive / ours, C={length}", told["naive / ours, time"])
        print(*(f"  {key}: {told[key]}" for key in [*told][3:]), sep="\n")

def against_trl(args, kind, folder, ours, theirs, rates):
    """Runs of ours and of TRL in turns, by one model: ({side: what `rates` makes of the two}, both results at last)."""
    same, found = ("--model", folder / "model"), {"ours": [], "trl": []}
    for part in tools.build_model(args.geometry):
        part.save_pretrained(folder / "model")
    for turn in range(args.step_rounds):
        out, trl = folder / f"run{turn}", folder / "trl.json"
        tools.run(sys.executable, *ours, *same, "--output_dir", out, "--save_steps", 0)
        tools.run(args.trl_python, "tests/trl_baseline.py", kind, *same, *theirs, "--out", trl)
        both = tools.read_rows(out / "metrics.jsonl"), json.loads(trl.read_text())
        for side, value in zip(found, rates(*both), strict=True):
            found[side].append(value)
    return found, *both

def compare_steps(args, result):
    """Whole steps: rollout, reward, training pass, update; the first step of every process is warm-up."""
    length, steps, G = args.completion_lengths[0], 4, args.num_generations
    same = ("--num_generations", G, "--max_completion_length", length)

    def step_seconds(ours, trl):
        assert {m["completions/mean_length"] for m in ours} == {length}
        assert set(trl["completion_tokens"]) == {args.prompts * G * length}
        return [sum(x[1:]) / (steps - 1) for x in ([m["step_time"] for m in ours], trl["step_seconds"])]

    with tempfile.TemporaryDirectory() as folder:
        rows, tokenizer = Path(folder, "rows.jsonl"), tools.build_model("tiny")[1]
        with open(rows, "w") as f:
            for i, photo in enumerate(tools.write_photos(folder, args.prompts)):
                text = tools.prompt_text(tokenizer, 80 + 5 * i)
                row = {"image": photo, "question": text, "answer": "(1,1),(9,9)", "text": text + g.R1_SUFFIX}
                f.write(json.dumps(row) + "\n")
        ours = ("-c", ENDLESS, *same, "--data", rows, "--train_batch_size", args.prompts, "--reward_funcs", "random")
        theirs = (*same, "--prompts", rows, "--steps", steps)
        seconds, ours, trl = against_trl(args, "grpo", Path(folder), (*ours, "--max_steps", steps), theirs, step_seconds)
    ratios = spread([a / b for a, b in zip(seconds["trl"], seconds["ours"], strict=True)])
    peaks = {"ours": ours[-1]["mem_gib"] * 1024, "trl": trl["peak_rss_mb"]}
    name = f"step, {args.prompts} prompts x {G}, C={length}"
    result[name] = {"trl / ours, time": ratios, "seconds": {s: spread(v) for s, v in seconds.items()},
                    "trl": trl["versions"], "process peak_mb": peaks, "our last step": ours[-1]}  # fmt: skip
    tools.show(f"{name}, TRL {trl['versions']['trl']} / ours", ratios)

def main():
    p = tools.parser(__doc__, "grpo")
    p.add_argument("--completion_lengths", type=int, nargs="+", default=[64, 256])
    p.add_argument("--num_generations", type=int, default=8)
    p.add_argument("--freeze_vision", action="store_true", help="in the training pass")
    p.add_argument("--prompts", type=int, default=2, help="of a whole step")
    args = p.parse_args()
    compare_passes(args, result := {"args": vars(args)})
    if args.trl_python:
        compare_steps(args, result)
    tools.write_result(args.out, result)

if __name__ == "__main__":
    main()
