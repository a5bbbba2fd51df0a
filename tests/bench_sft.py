"""Supervised training on rows of mixed length: packed, padded, and TRL. By hand: python tests/bench_sft.py

Rows have a photo (about 400 tokens) and completions of 20 to 600 tokens; vision tower frozen, 8 rows a step.

  padded   transformers' forward on right-padded batches, loss on the completions, backward
  ours     train_sft.pack and CompletionLogProbs on the same batches, in turns with it
  trl      with --trl_python: TRL's SFTTrainer (tests/trl_baseline.py) against train_sft.py, whole steps with reading
           images, forward, backward and update; the same rows, one process after the other

Tokens are those of the rows, padding not counted.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_tools import ROOT, build_model, parser, prompt_text, seconds_of, shown, spread, write_photos, write_result

import train_sft as t


def make_rows(folder, tokenizer, count):
    """samples.jsonl of train_sft.py and rows.jsonl of tests/trl_baseline.py, the same rows."""
    rng, ours, theirs = random.Random(0), [], []
    for i, photo in enumerate(write_photos(folder, count)):
        question, completion = prompt_text(tokenizer, 30), prompt_text(tokenizer, int(20 * 30 ** rng.random()))
        messages = [{"role": "user", "content": "<image>" + question}, {"role": "assistant", "content": completion}]
        ours.append({"id": str(i), "images": [Path(photo).name], "messages": messages})
        theirs.append({"image": photo, "text": question, "completion": completion})
    for name, rows in (("samples", ours), ("rows", theirs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def padded_loss(model, items, pad_id):
    """Cross-entropy, summed over the completions of a right-padded batch, by transformers' own forward pass."""
    rows = [(inputs["prompt_ids"] + ids, [-100] * len(inputs["prompt_ids"]) + ids) for inputs, [ids] in items]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([x + [-100] * (length - len(x)) for _, x in rows])
    mask = torch.arange(length) < torch.tensor([[len(ids)] for ids, _ in rows])
    images = {key: torch.cat([inputs[key] for inputs, _ in items]) for key in ("pixel_values", "image_grid_thw")}
    kinds = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, attention_mask=mask.long(), mm_token_type_ids=kinds, use_cache=False, **images).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def compare_passes(args, folder, result):
    models = [build_model(args.geometry) for _ in range(2)]
    _, tokenizer, image_processor = models[0]
    padded, packed = (model for model, _, _ in models)
    for model in (padded, packed):
        model.model.visual.requires_grad_(False)
    scorer = t.CompletionLogProbs(packed)
    samples = t.read_samples(folder / "samples.jsonl")
    items = [t.encode_row(s, tokenizer, image_processor, "cot", t.BOX_STYLES["qwen2_vl"]) for s in samples]
    batches = [items[i : i + args.batch_size] for i in range(0, len(items), args.batch_size)]

    def plain_epoch():
        for batch in batches:
            padded_loss(padded, batch, tokenizer.pad_token_id).backward()

    def packed_epoch():
        for batch in batches:
            (-scorer(t.pack(batch, "cpu")).sum()).backward()

    plain_epoch(), packed_epoch()
    pairs = zip(padded.parameters(), packed.parameters(), strict=True)
    gap = max(((a.grad - b.grad).abs().max() / a.grad.abs().max()).item() for a, b in pairs if a.grad is not None)
    tokens = sum(len(inputs["prompt_ids"]) + len(ids) for inputs, [ids] in items)
    times = [(seconds_of(plain_epoch), seconds_of(packed_epoch)) for _ in range(args.rounds)]
    result["padded / ours, time"] = spread([a / b for a, b in times])
    result["tokens/s"] = {s: spread([tokens / x[i] for x in times]) for i, s in enumerate(("padded", "ours"))}
    result["gradient difference, relative"] = gap
    lengths = [len(inputs["prompt_ids"]) + len(ids) for inputs, [ids] in items]
    result["row_tokens"] = {"min": min(lengths), "max": max(lengths), "mean": sum(lengths) / len(lengths)}
    print(shown("forward and backward, padded / ours", result["padded / ours, time"]))
    print(f"  gradients differ by {gap:.1e} relative")


def compare_trainers(args, folder, result):
    """Rates over the second of two epochs; the first is warm-up."""
    model, tokenizer, image_processor = build_model(args.geometry)
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder / "model")
    epoch, size, rates = args.rows // args.batch_size, str(args.batch_size), {"ours": [], "trl": []}
    for turn in range(args.step_rounds):
        out = folder / f"run{turn}"
        flags = ["--model", folder / "model", "--data", folder / "samples.jsonl", "--output_dir", out]
        flags += ["--max_steps", 2 * epoch, "--save_steps", 0]
        flags += ["--train_batch_size", size]
        command = [sys.executable, ROOT / "train_sft.py", *flags]
        subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][epoch:]
        tokens = sum(m["tokens_per_second"] * m["step_time"] for m in metrics)
        rates["ours"].append(tokens / sum(m["step_time"] for m in metrics))
        command = [args.trl_python, ROOT / "tests/trl_baseline.py", "sft", "--model", folder / "model", "--rows"]
        command += [folder / "rows.jsonl", "--batch_size", size, "--steps", 2 * epoch, "--out", folder / "trl.json"]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        trl = json.loads((folder / "trl.json").read_text())
        rates["trl"].append(sum(trl["tokens"][epoch : 2 * epoch]) / sum(trl["step_seconds"][epoch:]))
    result["ours / trl, tokens/s"] = spread([a / b for a, b in zip(rates["ours"], rates["trl"], strict=True)])
    result["trainer tokens/s"] = {side: spread(values) for side, values in rates.items()}
    result["trl"], result["trl_peak_mb"] = trl["versions"], trl["peak_rss_mb"]
    print(shown(f"whole steps, ours / TRL {trl['versions']['trl']}, tokens/s", result["ours / trl, tokens/s"]))


def main():
    p = parser(__doc__, "sft")
    p.add_argument("--rows", type=int, default=32)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--trl_python", help="Python of an environment with TRL, see tests/trl_baseline.py")
    p.add_argument("--step_rounds", type=int, default=3)
    args = p.parse_args()
    result = {"args": vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_rows(folder, build_model("small")[1], args.rows)
        compare_passes(args, folder, result)
        if args.trl_python:
            compare_trainers(args, folder, result)
    write_result(args.out, result)


if __name__ == "__main__":
    main()
