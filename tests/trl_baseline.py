"""TRL, a benchmark's baseline: GRPO steps (GRPOTrainer) or padded SFT steps of a Qwen2-VL with images; fp32 on a CPU.

runs in a virtual environment of its own: pip install torch==2.13.0 transformers trl accelerate pillow numpy datasets
reads   --data: {"image", "text"} a line, all of them in every step; for sft with "completion", in order
writes  --out: versions, arguments, and per step its seconds and tokens; the first step is warm-up

A step is timed from the end of the one before. On a shared machine set OMP_WAIT_POLICY=PASSIVE.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no telemetry thread beside the timed steps

import torch  # noqa: E402
import transformers as hf  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset, Image  # noqa: E402
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor  # noqa: E402
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling  # noqa: E402

class ImageTextProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor less its video processor, which needs torchvision; sub-processors are __init__'s names."""
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        hf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

def dataset(rows):
    columns, turns = {"image": [r["image"] for r in rows]}, {"prompt": ("user", "text")}
    turns |= {"completion": ("assistant", "completion")} if "completion" in rows[0] else {}
    columns |= {k: [[{"role": role, "content": r[name]}] for r in rows] for k, (role, name) in turns.items()}
    return Dataset.from_dict(columns).cast_column("image", Image())

def grpo_trainer(args, rows, model, processor, settings, tokens):
    settings |= {"num_generations": args.num_generations, "max_completion_length": args.max_completion_length}
    settings |= {"beta": 0.0, "temperature": 1.0, "loss_type": "grpo", "shuffle_dataset": False}
    settings["generation_kwargs"] = {"min_new_tokens": args.max_completion_length}  # the stop token is barred
    settings["per_device_train_batch_size"] = len(rows) * args.num_generations  # 1 generate call, 1 forward pass a step
    config, data, rng = trl.GRPOConfig(**settings), dataset(rows * args.steps), random.Random(0)
    def reward(completions, completion_ids, **kwargs):
        tokens.append(sum(map(len, completion_ids)))
        return [rng.random() for _ in completions]
    return trl.GRPOTrainer(model, reward, config, data, processing_class=processor)

def sft_trainer(args, rows, model, processor, settings, tokens):
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    def collator(examples):
        batch = collate(examples)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch
    settings |= {"per_device_train_batch_size": args.batch_size, "train_sampling_strategy": "sequential"}
    data = dataset(rows * -(-(args.steps + 1) * args.batch_size // len(rows)))  # the loader reads a batch ahead
    return trl.SFTTrainer(model, trl.SFTConfig(**settings, max_length=None), collator, data, processing_class=processor)

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("kind", choices=["grpo", "sft"], help="sft: right padding, loss on completions, vision frozen")
    for name in ("model", "data", "out"):
        p.add_argument(f"--{name}", required=True)
    for name, default in (("steps", 3), ("num_generations", 8), ("max_completion_length", 64), ("batch_size", 8)):
        p.add_argument(f"--{name}", type=int, default=default)
    args, cuda, tokens = p.parse_args(), torch.cuda.is_available(), []
    trl.trainer.utils._use_triton = lambda device: True  # scores of the trained tokens alone, as on CUDA
    tokenizer = hf.AutoTokenizer.from_pretrained(args.model)
    images = hf.AutoImageProcessor.from_pretrained(args.model, backend="pil")
    processor = ImageTextProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = hf.Qwen2VLForConditionalGeneration.from_pretrained(args.model, dtype=dtype)
    model.model.visual.requires_grad_(args.kind == "grpo")
    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
    settings = {"max_steps": args.steps, "seed": 0, "learning_rate": 1e-6, "lr_scheduler_type": "constant"}
    settings |= {"use_cpu": not cuda, "bf16": cuda, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    settings |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        build = grpo_trainer if args.kind == "grpo" else sft_trainer
        trainer = build(args, rows, model, processor, settings | {"output_dir": folder}, tokens)
        ends, clock = [time.perf_counter()], hf.TrainerCallback()
        clock.on_step_end = lambda *args, **kwargs: ends.append(time.perf_counter())
        trainer.add_callback(clock)
        trainer.train()
    result = {"versions": {name: version(name) for name in ("torch", "transformers", "trl")}, "args": vars(args)}
    result |= {"step_seconds": [b - a for a, b in pairwise(ends)], "tokens": tokens[: args.steps]}
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(args.out).write_text(json.dumps(result) + "\n")

if __name__ == "__main__":
    main()
