"""Supervised training on rows of mixed length: packed, padded, and TRL. By hand: python tests/bench_sft.py

Rows have a photo (about 400 tokens) and completions of 20 to 600 tokens; vision tower frozen, 8 rows a step.

  padded   transformers' forward on right-padded batches, loss on the completions, backward; in turns with ours
  trl      with --trl_python: whole steps of TRL's SFTTrainer (tests/trl_baseline.py) and of train_sft.py, in turns
"""

import json
import random
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import bench_tools as tools
import torch
from bench_grpo import against_trl, gradient_gap, race

import train_sft as t

def make_rows(folder, tokenizer, count):
    rng = random.Random(0)
    with open(folder / "rows.jsonl", "w") as f:
        for photo in tools.write_photos(folder, count):
            text, completion = (tools.prompt_text(tokenizer, n) for n in (30, int(20 * 30 ** rng.random())))
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": completion}]
            f.write(json.dumps({"image": photo, "messages": messages, "text": text, "completion": completion}) + "\n")

def padded_loss(model, items, pad_id):
    """Cross-entropy, summed over the completions of a right-padded batch, by transformers' own forward pass."""
    rows = [torch.tensor(x["prompt_ids"] + x["completion_ids"]) for x in items]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    at, ends = torch.arange(ids.shape[1]), torch.tensor([[x["num_tokens"]] for x in items])
    labels = ids.where((at < ends) & (at >= torch.tensor([[len(x["prompt_ids"])] for x in items])), -100)
    images = {key: torch.cat([x[key] for x in items]) for key in ("pixel_values", "image_grid_thw")}
    images["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, attention_mask=(at < ends).long(), use_cache=False, **images).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

def compare_passes(args, folder, result):
    padded, tokenizer, image_processor = tools.build_model(args.geometry)
    packed = t.packable(tools.build_model(args.geometry)[0])
    for model in (padded, packed):
        model.model.visual.requires_grad_(False)
    scorer, processors = t.CompletionLogProbs(packed), (tokenizer, image_processor, t.BOX_STYLES["qwen2_vl"])
    how = SimpleNamespace(target="cot", prompt_suffix=None)
    items = [t.encode(processors, how, s) for s in t.read_samples([folder / "rows.jsonl"])[0]]
    batches = [items[i : i + args.batch_size] for i in range(0, len(items), args.batch_size)]
    def epoch(loss):
        for batch in batches:
            loss(batch).backward()
    plain = partial(epoch, lambda batch: padded_loss(padded, batch, tokenizer.pad_token_id))
    ours = partial(epoch, lambda batch: -scorer(t.pack_sequences(batch, "cpu")).sum())
    plain(), ours()
    result["tokens"] = sum(x["num_tokens"] for x in items)
    result["gradient difference, relative"] = gradient_gap(padded, packed)
    result |= race(args, "forward and backward, padded / ours", plain, ours)

def compare_trainers(args, folder, result):
    """Rates over the second of two epochs; the first is warm-up."""
    epoch = args.rows // args.batch_size
    def tokens_per_second(ours, trl):
        tokens = sum(m["train_tokens_per_second"] * m["time/train"] for m in ours[epoch:])
        theirs = sum(trl["tokens"][epoch:]) / sum(trl["step_seconds"][epoch:])
        return tokens / sum(m["step_time"] for m in ours[epoch:]), theirs
    ours = ("train_sft.py", "--train_batch_size", args.batch_size, "--max_steps", 2 * epoch)
    theirs = ("--batch_size", args.batch_size, "--steps", 2 * epoch)
    result["trainers, tokens/s"] = against_trl(args, "sft", folder, ours, theirs, tokens_per_second)

def main():
    p = tools.parser(__doc__, "sft")
    p.add_argument("--rows", type=int, default=32)
    p.add_argument("--batch_size", type=int, default=8)
    args = p.parse_args()
    result = {"args": vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        make_rows(Path(folder), tools.build_model("tiny")[1], args.rows)
        compare_passes(args, Path(folder), result)
        if args.trl_python:
            compare_trainers(args, Path(folder), result)
    tools.write_result(args.out, result)

if __name__ == "__main__":
    main()
