"""The GRPO training pass and step against the plain way and against TRL. By hand: python tests/bench_grpo.py

pass   log-probs of G = 8 completions behind one prompt with a photo (>= 512 tokens), forward and backward: G rows, each
       with its own prompt and image (naive, tests/plain.py), against one packed row (ours), in turns.
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

def parser(*args):
    p = tools.parser(*args)
    p.add_argument("--completion_lengths", type=int, nargs="+", default=[64, 256])
    p.add_argument("--num_generations", type=int, default=8)
    p.add_argument("--prompts", type=int, default=4, help="at once, or of a step")
    return p

def photo_prompts(processors, count):
    """Inputs of prompts with a photo, of at least 512 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        texts = (tools.prompt_text(processors[0], 110 + 5 * i) for i in range(count))
        pairs = zip(tools.write_photos(folder, count), texts, strict=True)
        return [g.chat_inputs((*processors, g.BOX_STYLES["qwen2_vl"]), *pair) for pair in pairs]

def gradient_gap(a, b):
    """Largest difference of the gradients of two models, relative to each one's largest entry."""
    pairs = ((p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters(), strict=True) if p.grad is not None)
    return max(((p - q).abs().max() / p.abs().max()).item() for p, q in pairs if p.any())

def training_pass(side, args, length):
    """A call that runs forward and backward of one group and returns the log-probs; it has its model as `model`."""
    cuda, G, generator = torch.cuda.is_available(), args.num_generations, torch.Generator().manual_seed(0)
    device = "cuda" if cuda else "cpu"
    model, *processors = tools.build_model(args.geometry, device, torch.bfloat16 if cuda else torch.float32)
    model.train().model.visual.requires_grad_(not args.freeze_vision)
    (inputs,), ids = photo_prompts(processors, 1), torch.randint(3, 500, (G, length), generator=generator).tolist()
    weights = torch.randn(G, generator=generator)[:, None].to(device)
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
    call.model = model
    return call

def race(args, name, plain, ours):
    """Two calls in turns: seconds of both, and how many times ours the plain one takes."""
    times = [(tools.seconds_of(plain), tools.seconds_of(ours)) for _ in range(args.rounds)]
    tools.show(name, ratio := spread([a / b for a, b in times]))
    return {"plain / ours": ratio, "seconds": [spread(values) for values in zip(*times, strict=True)]}

def compare_passes(args, result):
    for length in args.completion_lengths:
        naive, ours = (training_pass(side, args, length) for side in ("naive", "ours"))
        far = (naive() - ours()).abs().max().item()
        told = {"log-prob difference": far, "gradient difference, relative": gradient_gap(naive.model, ours.model)}
        peaks = {side: tools.peak_memory(partial(training_pass, side, args, length)) for side in ("naive", "ours")}
        print(told := told | {"peak_mb": peaks})
        result[f"C={length}"] = told | race(args, f"training pass, naive / ours, C={length}", naive, ours)

def against_trl(args, kind, folder, ours, theirs, values_of):
    """Runs of ours and of TRL in turns, by one model: TRL's last result, with what `values_of` makes of both, each."""
    values, same = [], ("--model", folder / "model", "--data", folder / "rows.jsonl")
    for part in tools.build_model(args.geometry):
        part.save_pretrained(folder / "model")
    for turn in range(args.step_rounds):
        out, trl = folder / f"run{turn}", folder / "trl.json"
        tools.run(sys.executable, *ours, *same, "--output_dir", out, "--save_steps", 0)
        tools.run(args.trl_python, "tests/trl_baseline.py", kind, *same, *theirs, "--out", trl)
        rows, trl = tools.read_rows(out / "metrics.jsonl"), json.loads(trl.read_text())
        values.append(values_of(rows, trl))
    tools.show(f"ours / TRL {trl['versions']['trl']}", ratio := spread([a / b for a, b in values]))
    both = dict(zip(("ours", "trl"), map(spread, zip(*values, strict=True)), strict=True))
    return trl | both | {"ours / trl": ratio, "our peak_rss_mb": rows[-1]["mem_gib"] * 1024}

def compare_steps(args, folder, result):
    length, steps, G = args.completion_lengths[0], 4, args.num_generations
    same, tokenizer = ("--num_generations", G, "--max_completion_length", length), tools.build_model("tiny")[1]
    with open(folder / "rows.jsonl", "w") as f:
        for i, photo in enumerate(tools.write_photos(folder, args.prompts)):
            text = tools.prompt_text(tokenizer, 80 + 5 * i)
            row = {"image": photo, "question": text, "answer": "(1,1),(9,9)", "text": text + g.R1_SUFFIX}
            f.write(json.dumps(row) + "\n")
    def steps_per_second(ours, trl):
        assert {m["completions/mean_length"] for m in ours} == {length}
        assert {*trl["tokens"]} == {args.prompts * G * length}
        return [(steps - 1) / sum(x[1:]) for x in ([m["step_time"] for m in ours], trl["step_seconds"])]
    ours = ("-c", ENDLESS, *same, "--train_batch_size", args.prompts, "--reward_funcs", "random", "--max_steps", steps)
    result["steps/s"] = against_trl(args, "grpo", folder, ours, (*same, "--steps", steps), steps_per_second)

def main():
    p = parser(__doc__, "grpo")
    p.add_argument("--freeze_vision", action="store_true", help="in the training pass")
    p.set_defaults(prompts=2)
    args = p.parse_args()
    compare_passes(args, result := {"args": vars(args)})
    if args.trl_python:
        with tempfile.TemporaryDirectory() as folder:
            compare_steps(args, Path(folder), result)
    tools.write_result(args.out, result)

if __name__ == "__main__":
    main()
