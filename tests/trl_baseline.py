"""TRL, a benchmark's baseline: GRPO steps (GRPOTrainer) or padded SFT steps of a Qwen2-VL with images; fp32 on a CPU.

runs in a virtual environment of its own: pip install torch==2.13.0 transformers trl accelerate pillow numpy datasets
reads   --prompts: {"image", "text"} a line, all of them in every step; --rows: {"image", "text", "completion"} a line
writes  --out: versions, arguments, and per step its seconds and tokens; the first step is warm-up

  python tests/trl_baseline.py grpo --model DIR --prompts prompts.jsonl --num_generations 8 --out result.json
  python tests/trl_baseline.py sft --model DIR --rows rows.jsonl --batch_size 8 --steps 6 --out result.json

A step is timed from the end of the one before, so that reading its data is in. On a shared machine set
OMP_WAIT_POLICY=PASSIVE: two threads that spin for a taken core have made a step 10 to 100 times longer.
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


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    kinds = p.add_subparsers(dest="kind", required=True)
    grpo = kinds.add_parser("grpo", allow_abbrev=False, help="generate, reward, update")
    sft = kinds.add_parser("sft", allow_abbrev=False, help="right padding, loss on completions, vision frozen")
    # fmt: off
    grpo.add_argument("--prompts", dest="data", required=True, help="jsonl of image, text")
    grpo.add_argument("--num_generations", type=int, default=8, help="G, completions per prompt")
    grpo.add_argument("--max_completion_length", type=int, default=64, help="tokens of every completion, exactly")
    grpo.add_argument("--freeze_vision", action="store_true", help="vision tower and merger (default: trained)")
    sft.add_argument("--rows", dest="data", required=True, help="jsonl of image, text, completion; read in order")
    sft.add_argument("--batch_size", type=int, default=8, help="rows per step, in one forward pass")
    sft.set_defaults(freeze_vision=True)
    for kind, steps in ((grpo, 3), (sft, 6)):
        kind.add_argument("--model", required=True, help="Hugging Face folder of a Qwen2-VL")
        kind.add_argument("--steps", type=int, default=steps, help="optimizer steps")
        kind.add_argument("--out", required=True, help="result, .json")
        kind.add_argument("--seed", type=int, default=0)
        kind.add_argument("--stock_head", action="store_true", help="vocabulary scores of all tokens, TRL's CPU path")
    # fmt: on
    return p.parse_args(argv)

class ImageTextProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor less its video processor, which needs torchvision; sub-processors are __init__'s names."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        hf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

def dataset(rows):
    columns = {"image": [r["image"] for r in rows], "prompt": [[{"role": "user", "content": r["text"]}] for r in rows]}
    if "completion" in rows[0]:
        columns["completion"] = [[{"role": "assistant", "content": r["completion"]}] for r in rows]
    return Dataset.from_dict(columns).cast_column("image", Image())

def grpo_trainer(args, rows, model, processor, settings, result):
    settings |= {"num_generations": args.num_generations, "max_completion_length": args.max_completion_length}
    settings |= {"beta": 0.0, "temperature": 1.0, "loss_type": "grpo", "shuffle_dataset": False}
    settings["generation_kwargs"] = {"min_new_tokens": args.max_completion_length}  # the stop token is barred
    settings["per_device_train_batch_size"] = len(rows) * args.num_generations  # 1 generate call, 1 forward pass a step
    config, data, rng = trl.GRPOConfig(**settings), dataset(rows * args.steps), random.Random(args.seed)
    tokens = result["completion_tokens"] = []

    def reward(completions, completion_ids, **kwargs):
        tokens.append(sum(map(len, completion_ids)))
        return [rng.random() for _ in completions]

    return trl.GRPOTrainer(model, reward, config, data, processing_class=processor)

def sft_trainer(args, rows, model, processor, settings, result):
    collate, tokens = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True), []
    result["tokens"] = tokens

    def collator(examples):
        batch = collate(examples)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    settings |= {"per_device_train_batch_size": args.batch_size, "train_sampling_strategy": "sequential"}
    data = dataset(rows * -(-(args.steps + 1) * args.batch_size // len(rows)))  # the loader reads a batch ahead
    return trl.SFTTrainer(model, trl.SFTConfig(**settings, max_length=None), collator, data, processing_class=processor)

def main(argv=None):
    args = parse_args(argv)
    if not args.stock_head:  # TRL scores the trained tokens alone on CUDA, all tokens elsewhere: CUDA's way here too
        trl.trainer.utils._use_triton = lambda device: True
    tokenizer = hf.AutoTokenizer.from_pretrained(args.model)
    images = hf.AutoImageProcessor.from_pretrained(args.model, backend="pil")
    processor = ImageTextProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    model = hf.Qwen2VLForConditionalGeneration.from_pretrained(args.model, dtype=dtype)
    model.model.visual.requires_grad_(not args.freeze_vision)
    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines() if line.strip()]
    settings = {"max_steps": args.steps, "seed": args.seed, "learning_rate": 1e-6, "lr_scheduler_type": "constant"}
    settings |= {"use_cpu": not cuda, "bf16": cuda, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    settings |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets")}
    result = {"versions": versions, "args": vars(args), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        build = grpo_trainer if args.kind == "grpo" else sft_trainer
        trainer = build(args, rows, model, processor, settings | {"output_dir": folder}, result)
        ends, clock = [time.perf_counter()], hf.TrainerCallback()
        clock.on_step_end = lambda *args, **kwargs: ends.append(time.perf_counter())
        trainer.add_callback(clock)
        trainer.train()
    result["step_seconds"] = [b - a for a, b in pairwise(ends)]
    result = {key: value[: args.steps] if isinstance(value, list) else value for key, value in result.items()}
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(args.out).write_text(json.dumps(result) + "\n")

if __name__ == "__main__":
    main()
