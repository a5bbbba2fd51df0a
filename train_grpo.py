"""Stage 2: GRPO from scratch on a Qwen2-VL that thinks before it points, with an IoU reward.

reads   --data: samples.jsonl of filter.py (or any rows with boxes), or the released GRPO parquet
writes  --output_dir: metrics.jsonl, samples.jsonl, curves.png, config.json, checkpoint-N/ (resumable), final/

  smoke    python train_grpo.py --model runs/toy/train_cot_sft/final --data runs/toy/filter_grpo/samples.jsonl ...
  1 GPU    python train_grpo.py --model runs/cot_sft/final --data runs/grpo_data/samples.jsonl --output_dir ...
  8 GPUs   torchrun --nproc_per_node 8 train_grpo.py --model runs/cot_sft/final --data ... --output_dir ...

One step: 1 draw prompts  2 roll out G completions each, all prompts of the step together  3 rewards by name
4 advantages within the group  5 clipped loss (+ beta x k3 KL)  6 update.
Paper defaults (arXiv 2503.12797 and its released trainer): 16 prompts a step, G = 4, temperature 1, lr 1e-6 linear, 512
new tokens, IoU reward above 0.8, advantage (r - mean) / (std + 1e-4), loss averaged per sequence. Differences: beta is
0 (0.04 there), so that no reference model is needed; both halves of the format reward can be paid; a box counts only in
the strict grammar below; the sampled ids are the trained ids, scored with the sampler's temperature and banned tokens.
Shapes: B prompts, G completions per prompt, P prompt tokens, C completion tokens, V vocabulary.
"""

import argparse
import copy
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--model", required=True, help="the stage-1 model, a Hugging Face folder or name")
    p.add_argument("--data", required=True, help="samples.jsonl, or .parquet with image, problem, solution")
    p.add_argument("--output_dir", required=True, help="run folder; an interrupted run is continued")
    # rollout
    p.add_argument("--num_generations", type=int, default=4, help="G, completions per prompt (paper: 4)")
    p.add_argument("--max_completion_length", type=int, default=512, help="tokens (paper: 512)")
    p.add_argument(
        "--temperature", type=float, default=1.0, help="of the sampler, and of the trained log-probs (paper: 1)"
    )
    p.add_argument("--rollout_batch_size", type=int, default=256, help="sequences decoded at once on one rank")
    p.add_argument("--max_pixels", type=int, default=401408, help="pixel cap of an image (paper: 401,408)")
    p.add_argument(
        "--max_prompt_length", type=int, default=4096, help="tokens; a longer prompt stops the run, it is never cut"
    )
    # rewards
    p.add_argument(
        "--reward_funcs",
        nargs="+",
        default=["iou", "format"],
        choices=sorted(REWARDS),
        help="summed (paper: iou + format)",
    )
    p.add_argument("--reward_weights", nargs="+", type=float, help="one per reward (default: 1)")
    p.add_argument(
        "--iou_threshold", type=float, default=0.8, help="iou pays IoU, binary pays 1, above this (released code: 0.8)"
    )
    # GRPO
    p.add_argument(
        "--scale_rewards",
        default="group",
        choices=["group", "none", "loo"],
        help="advantage: / group std, mean only, leave-one-out",
    )
    p.add_argument(
        "--loss_type",
        default="grpo",
        choices=["grpo", "dapo", "dr_grpo"],
        help="mean per sequence (paper), per token, constant",
    )
    p.add_argument("--beta", type=float, default=0.0, help="weight of the KL; 0 loads no reference model (paper: 0.04)")
    p.add_argument("--epsilon", type=float, default=0.2, help="ratio clip below 1, and above without --epsilon_high")
    p.add_argument("--epsilon_high", type=float, help="ratio clip above 1 (DAPO: 0.28)")
    p.add_argument(
        "--num_iterations",
        type=int,
        default=1,
        help="updates per rollout; above 1 the sampler's log-probs are the old ones",
    )
    # optimisation
    p.add_argument("--learning_rate", type=float, default=1e-6, help="peak (paper: 1e-6)")
    p.add_argument("--lr_scheduler", default="linear", choices=["cosine", "linear", "constant"])
    p.add_argument("--warmup_ratio", type=float, default=0.0, help="share of the updates")
    p.add_argument("--weight_decay", type=float, default=0.0)
    p.add_argument("--max_grad_norm", type=float, default=1.0, help="0 means no clipping")
    p.add_argument("--num_epochs", type=float, default=2.0, help="passes over the data (paper: 2)")
    p.add_argument("--max_steps", type=int, help="stop after this many steps instead (default: from --num_epochs)")
    p.add_argument("--train_batch_size", type=int, default=16, help="prompts per step over all ranks (paper: 16)")
    p.add_argument(
        "--freeze_vision",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="vision tower and merger (paper: trained)",
    )
    p.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False)
    # engine
    p.add_argument("--deepspeed", default="ds_config.json", help="DeepSpeed engine settings")
    p.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="auto: bfloat16 on CUDA, float32 on CPU",
    )
    p.add_argument("--timeout_minutes", type=float, default=60, help="of a collective operation")
    # run
    p.add_argument("--logging_steps", type=int, default=1)
    p.add_argument(
        "--log_completions", type=int, default=2, help="prompts per logging step whose rollouts go to samples.jsonl"
    )
    p.add_argument("--save_steps", type=int, default=100, help="0 means no checkpoint before the end")
    p.add_argument("--save_total_limit", type=int, default=2, help="checkpoints kept")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if args.num_generations < 2:
        p.error(f"--num_generations {args.num_generations}: a group of one has no advantage; want at least 2")
    if args.temperature <= 0:
        p.error(f"--temperature {args.temperature}: greedy completions of a group are all equal; want more than 0")
    if args.reward_weights and len(args.reward_weights) != len(args.reward_funcs):
        p.error(
            f"--reward_weights: {len(args.reward_weights)} weights for {len(args.reward_funcs)} rewards; want one each"
        )
    args.reward_weights = args.reward_weights or [1.0] * len(args.reward_funcs)
    args.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    return args


# >>> shared:jsonl_io (copy of synth_data.py)
def read_jsonl(path, required=()):
    """Rows of a JSONL file as dicts. Errors: one line naming file, line and the missing column or broken JSON."""
    if not os.path.isfile(path):
        raise SystemExit(f"{path}: no such file; want JSONL, one object a line; check the path or run the stage before")
    rows = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise SystemExit(
                    f"{path}:{number}: not JSON ({e.msg}); want one object a line; mend or drop the line"
                ) from None
            if missing := [c for c in required if not isinstance(row, dict) or row.get(c) is None]:
                raise SystemExit(
                    f"{path}:{number}: no column {missing[0]!r}; want {', '.join(required)}; rerun the stage before"
                )
            rows.append(row)
    if not rows:
        raise SystemExit(f"{path}: 0 rows; want at least one; rerun the stage before")
    return rows


def write_text(path, text):
    """Writes a file whole or not at all: to a temporary name first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def complete_lines(path):
    """Rows already written by an interrupted run; cuts off a half-written last line, so that appending is safe."""
    if not os.path.exists(path):
        return []
    data = Path(path).read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]


def same_config(out, args, ignore=()):
    """Writes {out}/config.json, or checks that an earlier run into this folder had the same settings."""
    now = {k: v for k, v in vars(args).items() if k not in ignore}
    path = Path(out) / "config.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        for key, value in now.items():
            if json.loads(json.dumps(value)) != old.get(key):
                raise SystemExit(
                    f"{path}: --{key} was {old.get(key)}, now {value}; want the same settings to continue; "
                    "give another output folder or delete this one"
                )
    write_text(path, json.dumps(now, indent=1, sort_keys=True) + "\n")


# <<< shared:jsonl_io


# >>> shared:dist (copy of train_sft.py)
def init_dist(timeout_minutes=60):
    """(rank, world_size, device) under torchrun, or (0, 1, device) alone; NCCL on CUDA, gloo on CPU."""
    rank, local_rank, world_size = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if not dist.is_initialized():
        where = dict(store=dist.HashStore(), rank=0, world_size=1) if world_size == 1 else {}
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes), **where
        )
    return rank, world_size, device


def print0(*message):
    if int(os.environ.get("RANK", 0)) == 0:
        print(*message, flush=True)


def broadcast(value):
    """Rank 0's value (any picklable object) on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_sum(values, device):
    """Sums a list of numbers over all ranks; every rank must call it."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


# <<< shared:dist


# >>> shared:run_log (copy of train_sft.py)
def truncate_log(path, step):
    """Drops the rows after `step`, so that a resumed run leaves one clean curve."""
    if os.path.exists(path):
        rows = [r for r in complete_lines(path) if r["step"] <= step]
        write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def append_row(path, row):
    """One JSON object a line, on disk when this returns. NaN and infinity are errors, not strings."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def draw_curves(metrics_path, png_path, keys):
    """One small chart per metric over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = complete_lines(metrics_path)
    keys = [k for k in keys if any(k in r for r in rows)]
    columns = min(3, len(keys))
    figure, axes = plt.subplots(
        math.ceil(len(keys) / columns), columns, figsize=(4 * columns, 2.6 * math.ceil(len(keys) / columns))
    )
    axes = list(getattr(axes, "flat", [axes]))
    for ax, key in zip(axes, keys, strict=False):
        ax.plot([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r], linewidth=1.2)
        ax.set_title(key, fontsize=9)
        ax.grid(alpha=0.3)
    for ax in axes[len(keys) :]:
        ax.axis("off")
    figure.tight_layout()
    figure.savefig(png_path, dpi=110)
    plt.close(figure)


def run_config(args, derived):
    """What a run was made with: flags, derived sizes, engine settings, versions, commit."""
    import deepspeed
    import transformers

    def git(*command):
        return subprocess.run(
            ["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()

    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
    }
    return {"args": vars(args), "derived": derived, "versions": versions, "commit": git("rev-parse", "HEAD") or None,
            "dirty": bool(git("status", "--porcelain"))}  # fmt: skip


# <<< shared:run_log


# >>> shared:chat_inputs (copy of train_sft.py)
R1_SUFFIX = (
    "  Output the thinking process in <think> </think> and final answer (bounding box) in <answer> </answer> tags."
)
BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")
REF = re.compile(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", re.S)


def read_samples(path):
    """Samples of any format we know, as dicts with the same keys.

    Reads our JSONL, ShareGPT JSON (messages, images), GRPO parquet (image, problem, solution) and KVG-Bench parquet
    (question_id, question, answer, image, category). Keys: id, image (path or bytes), image_id, question, answer,
    bbox_1000 (list of 4 ints or None), entity, category, completion (what SFT learns, or None), prompt_suffix, row.
    Errors: one line for a missing file, an unknown format, a missing column or a box that is none.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        if not path.is_file():
            raise SystemExit(f"{path}: no such file; want parquet of KVG-Bench or of GRPO; check the path")
        table = pq.read_table(path)
        names = (
            ("question_id", "question", "answer", "image", "category")
            if "question" in table.column_names
            else ("image", "problem", "solution")
        )
        if missing := [n for n in names if n not in table.column_names]:
            raise SystemExit(
                f"{path}: no column {missing[0]!r}, found {table.column_names}; want {', '.join(names)}; check the file"
            )
        rows = table.to_pylist()
        for i, r in enumerate(rows):
            r |= {
                "question": r.get("question") or r["problem"],
                "answer": r.get("answer") or r["solution"],
                "id": r.get("question_id", str(i)),
            }
    elif path.suffix == ".json":
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; want ShareGPT JSON (messages, images); check the path")
        rows = json.loads(path.read_text(encoding="utf-8"))
        for i, r in enumerate(rows):
            if not isinstance(r, dict) or "messages" not in r or "images" not in r:
                raise SystemExit(f"{path}: row {i + 1} has no messages or images; want ShareGPT JSON; check the file")
        rows = [r | {"id": r.get("id", str(i))} for i, r in enumerate(rows)]
    else:
        rows = read_jsonl(path, ("id", "images", "messages"))
    if not rows:
        raise SystemExit(f"{path}: 0 rows; want at least one; check the file")
    samples = []
    for i, r in enumerate(rows):
        where = f"{path}:{i + 1} ({r['id']})"
        completion, suffix = None, ""
        if "messages" in r:
            if not r.get("images") or len(r["images"]) != 1 or len(r["messages"]) < 2:
                counts = f"{len(r.get('images') or [])} images, {len(r['messages'])} messages"
                raise SystemExit(f"{where}: {counts}; want one image, a user and an assistant message; mend the row")
            user, completion = r["messages"][0]["content"].replace("<image>", ""), r["messages"][1]["content"]
            suffix = R1_SUFFIX if user.endswith(R1_SUFFIX) else ""
            r = {
                "question": user.removesuffix(R1_SUFFIX),
                "answer": completion.rsplit("<answer>", 1)[-1].split("</answer>")[0],
            } | r
            image = image_id = str(path.parent / r["images"][0])
        else:
            image = r["image"]["bytes"] or r["image"].get("path") if isinstance(r["image"], dict) else r["image"]
            if not image:
                raise SystemExit(f"{where}: no image; want a path, or bytes; mend or drop the row")
            image_id = hashlib.md5(image).hexdigest() if isinstance(image, bytes) else str(image)
        box = BOX.search(r["answer"] or "")
        bbox_1000 = [int(v) for v in box.groups()] if box else None
        if bbox_1000 and not (0 <= bbox_1000[0] < bbox_1000[2] <= 1000 and 0 <= bbox_1000[1] < bbox_1000[3] <= 1000):
            raise SystemExit(
                f"{where}: bbox_1000 {bbox_1000}; want 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000; mend the row"
            )
        entity = REF.search(r["answer"] or "") or REF.search(r["question"])
        samples.append(
            {
                "id": r["id"],
                "image": image,
                "image_id": image_id,
                "question": r["question"],
                "answer": r["answer"],
                "bbox_1000": bbox_1000,
                "entity": entity.group(1) if entity else None,
                "category": r.get("category"),
                "completion": completion,
                "prompt_suffix": suffix,
                "row": r,
            }
        )
    return samples


def load_processors(model_path, max_pixels):
    """Tokenizer and image processor. The PIL backend everywhere: torchvision resizes to other pixels."""
    from transformers import AutoImageProcessor, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        image_processor = AutoImageProcessor.from_pretrained(model_path, backend="pil")
    except (OSError, ValueError) as e:
        raise SystemExit(
            f"{model_path}: {str(e).splitlines()[0]}; want a folder with tokenizer and image processor; check it"
        ) from None
    if "<|image_pad|>" not in tokenizer.get_vocab():
        raise SystemExit(f"{model_path}: the tokenizer has no <|image_pad|>; want a Qwen2-VL; check the model")
    image_processor.size = {
        "shortest_edge": min(image_processor.size["shortest_edge"], max_pixels),
        "longest_edge": max_pixels,
    }
    return tokenizer, image_processor


def load_image(image):
    """RGB picture from a path or bytes. Errors: one line for a file that is missing or broken."""
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as im:
            return im.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise SystemExit(
            f"{image if isinstance(image, str) else 'image bytes'}: unreadable ({e}); want an image; mend the row"
        ) from None


def visual_tokens(image_processor, image):
    """Number of <|image_pad|> that an image takes, from its header alone."""
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as im:
            width, height = im.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise SystemExit(
            f"{image if isinstance(image, str) else 'image bytes'}: unreadable ({e}); mend the row"
        ) from None
    return image_processor.get_number_of_image_patches(height, width) // image_processor.merge_size**2


def prompt_ids(tokenizer, text, count):
    """Token ids of one user turn with one image of `count` visual tokens, up to the assistant's first token."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(prompt.replace("<|image_pad|>", "<|image_pad|>" * count, 1), add_special_tokens=False)


def chat_inputs(tokenizer, image_processor, image, text):
    """Prompt with one image. Shapes: prompt_ids list of P ints, pixel_values (patches, 1176), image_grid_thw (1, 3)."""
    image = load_image(image)
    vision = image_processor(images=[image], return_tensors="pt")
    count = int(vision["image_grid_thw"].prod()) // image_processor.merge_size**2
    return {
        "prompt_ids": prompt_ids(tokenizer, text, count),
        "pixel_values": vision["pixel_values"],
        "image_grid_thw": vision["image_grid_thw"],
    }


# <<< shared:chat_inputs


# >>> shared:load_model (copy of train_sft.py)
def check_model(path):
    """Stops with one line unless `path` names a Qwen2-VL; loads no weights."""
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError) as e:
        raise SystemExit(
            f"{path}: no model ({str(e).splitlines()[0]}); want a Hugging Face folder or name; check --model"
        ) from None
    if kind != "qwen2_vl":
        raise SystemExit(f"{path}: model_type {kind!r}; want 'qwen2_vl'; check --model")


def load_model(path, dtype, device):
    """Qwen2-VL with flash-attn 2 where CUDA has it, else SDPA. dtype auto: bfloat16 on CUDA, float32 on CPU."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import is_flash_attn_2_available, logging

    logging.disable_progress_bar()
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(dtype, dtype)
    attention = (
        "flash_attention_2" if device.type == "cuda" and dtype == "bfloat16" and is_flash_attn_2_available() else "sdpa"
    )
    return AutoModelForImageTextToText.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation=attention
    ).to(device)


# <<< shared:load_model


# >>> shared:engine (copy of train_sft.py)
def start_engine(model, args, accumulation_steps):
    """DeepSpeed engine around the model. `ds_config.json` holds engine matters only; the flags fill in the rest."""
    import deepspeed

    config = json.loads(Path(args.deepspeed).read_text(encoding="utf-8"))
    ours = {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
    }
    if clash := sorted(ours & set(config)):
        raise SystemExit(
            f"{args.deepspeed}: has {clash[0]!r}; want engine settings only; remove it and use the flags of the script"
        )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ at the first start on a CPU
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
        "bf16": {"enabled": model.dtype == torch.bfloat16},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def learning_rate_at(step, total_steps, args):
    """Rate of update `step` (1..total_steps): linear warm-up, then cosine, linear or constant."""
    warmup = math.ceil(args.warmup_ratio * total_steps)
    if step <= warmup:
        return args.learning_rate * step / warmup
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return args.learning_rate * shape[args.lr_scheduler]


def export_model(engine, tokenizer, image_processor, folder):
    """Hugging Face folder (safetensors, tokenizer, image processor), written whole or not at all. All ranks call it."""
    sharded = engine.zero_optimization_stage() == 3
    weights = engine._zero3_consolidated_16bit_state_dict() if sharded else engine.module.state_dict()
    if engine.global_rank == 0:
        part = Path(f"{folder}.tmp")
        shutil.rmtree(part, ignore_errors=True)
        engine.module.save_pretrained(part, state_dict=weights)
        tokenizer.save_pretrained(part)
        image_processor.save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    dist.barrier()


def save_checkpoint(engine, tokenizer, image_processor, output_dir, state, keep):
    """checkpoint-{step}/: engine state, state.json, Hugging Face export; renamed last, so it is complete or absent."""
    folder = Path(output_dir) / f"checkpoint-{state['step']}"
    part = Path(f"{folder}.tmp")
    if engine.global_rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(part), tag="engine")
    export_model(engine, tokenizer, image_processor, part / "model")
    if engine.global_rank == 0:
        write_text(part / "state.json", json.dumps(state) + "\n")
        os.replace(part, folder)
        for old in sorted(Path(output_dir).glob("checkpoint-*[0-9]"), key=lambda c: int(c.name.split("-")[1]))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def resume(engine, output_dir):
    """Loads the newest complete checkpoint of this run. Returns its state.json, or {"step": 0, "num_tokens": 0}."""
    found = [c for c in Path(output_dir).glob("checkpoint-*/state.json") if not c.parent.name.endswith(".tmp")]
    if not found:
        return {"step": 0, "num_tokens": 0}
    newest = max(found, key=lambda c: int(c.parent.name.split("-")[1]))
    engine.load_checkpoint(str(newest.parent), tag="engine")
    print0(f"resuming from {newest.parent}")
    return json.loads(newest.read_text(encoding="utf-8"))


@lru_cache(maxsize=2)
def shuffled(count, seed, epoch):
    return random.Random(f"{seed}:{epoch}").sample(range(count), count)


def epoch_order(index, count, seed):
    """Sample number `index` of an endless stream of seeded shuffles of range(count)."""
    return shuffled(count, seed, index // count)[index % count]


# <<< shared:engine


# >>> shared:answer_format (source)
POINT = r"\(\s*[0-9]+(?:\.[0-9]+)?\s*,\s*[0-9]+(?:\.[0-9]+)?\s*\)"
FOUR = r"[0-9]+(?:\.[0-9]+)?\s*(?:,\s*[0-9]+(?:\.[0-9]+)?\s*){3}"
BOXES = re.compile(rf"{POINT}(?:\s*,?\s*{POINT})+|\(\s*{FOUR}\)|\[\s*{FOUR}\]")
CANONICAL = re.compile(r"\(\d{1,4},\d{1,4}\),\(\d{1,4},\d{1,4}\)", re.A)
THINK_ANSWER = re.compile(
    r"<think>((?:(?!</?think>|</?answer>).)*)</think>\s*<answer>((?:(?!</?think>|</?answer>).)*)</answer>", re.S
)


def answer_text(text, mode="r1"):
    """Where the box is looked for, or None. `r1`: the one closed <answer> pair, not inside an open <think>.

    Other modes: the whole text, or the answer block if there is one.
    """
    if (text.count("<answer>"), text.count("</answer>")) == (1, 1):
        before, rest = text.split("<answer>")
        if "</answer>" in rest and before.count("<think>") == before.count("</think>"):
            return rest.split("</answer>")[0]
    return None if mode == "r1" or "<answer>" in text or "</answer>" in text else text


def parse_bbox(text, mode="r1"):
    """The one box of a completion as [x1, y1, x2, y2] on the 0..1000 grid, or None.

    Notations: (x1,y1),(x2,y2) · (x1,y1,x2,y2) · [x1,y1,x2,y2], nested or in JSON too; decimals and spaces allowed.
    The same box twice is one box. Two boxes, a chain of three points, a number over 1000, x1 >= x2 or y1 >= y2: None.
    Nothing is reordered, clipped or rescaled.
    """
    region = answer_text(text, mode)
    if region is None:
        return None
    found = {tuple(float(v) for v in re.findall(r"[0-9]+(?:\.[0-9]+)?", m[0])) for m in BOXES.finditer(region)}
    if len(found) != 1:
        return None
    (box,) = found
    if len(box) != 4 or not (box[0] < box[2] <= 1000 and box[1] < box[3] <= 1000):
        return None
    return [int(v) if v == int(v) else v for v in box]


def box_iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2) in the same unit, 0..1."""
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


# <<< shared:answer_format


# ---- rewards: completion text, sample, args -> 0..1 ----
def iou_of(text, sample):
    bbox_1000 = parse_bbox(text)
    return 0.0 if bbox_1000 is None else box_iou(bbox_1000, sample["bbox_1000"])


def iou_reward(text, sample, args):
    """IoU where it exceeds the threshold, else 0 (the paper's reward)."""
    iou = iou_of(text, sample)
    return iou if iou > args.iou_threshold else 0.0


def dense_iou_reward(text, sample, args):
    """IoU as it is, for cold starts in which the thresholded reward stays 0."""
    return iou_of(text, sample)


def binary_reward(text, sample, args):
    """1 where the IoU exceeds the threshold, else 0 (ablation)."""
    return float(iou_of(text, sample) > args.iou_threshold)


def format_reward(text, sample, args):
    """0.5 for one <think> block, then one <answer> block and nothing else; 0.5 for one canonical box in the answer."""
    canonical = parse_bbox(text) is not None and CANONICAL.search(answer_text(text)) is not None
    return 0.5 * (THINK_ANSWER.fullmatch(text.strip()) is not None) + 0.5 * canonical


REWARDS = {"iou": iou_reward, "dense_iou": dense_iou_reward, "binary": binary_reward, "format": format_reward}


# >>> shared:rollout (source)
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def vision_ids(tokenizer):
    """Ids that are never sampled: in a completion they would be counted as image features."""
    return [i for i in tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)) if i is not None]


def uniforms(seed, count):
    """`count` numbers in [0, 1) that depend on the string `seed` alone, not on batch, rank or position."""
    return np.random.default_rng(list(hashlib.sha256(seed.encode()).digest())).random(count, dtype=np.float32)


@torch.no_grad()
def rollout(model, tokenizer, prompts, seeds, max_completion_length, temperature, batch_size):
    """Completions of every prompt, one per seed; decoded together, each prompt prefilled once.

    Shapes: prompts: B dicts of `chat_inputs`; seeds: B lists of G strings -> B lists of G (ids, logps, finished);
    ids: list of at most C ints, with the stop token if it came; logps: fp32 log-probs of these ids under the sampler.
    Units: temperature 0 is greedy. A completion is a function of the weights, the prompt and its seed.
    """
    generations = len(seeds[0])
    chunk = max(1, batch_size // generations)
    training = model.training
    model.eval()  # in train mode with gradient checkpointing transformers drops the cache and goes on with one token
    out = []
    for i in range(0, len(prompts), chunk):
        out += decode_batch(
            model, tokenizer, prompts[i : i + chunk], seeds[i : i + chunk], max_completion_length, temperature
        )
    model.train(training)
    return out


def decode_batch(model, tokenizer, prompts, seeds, max_completion_length, temperature):
    from transformers import DynamicCache

    device, generations = model.device, len(seeds[0])
    stop = torch.tensor(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]), device=device)
    banned = torch.tensor(vision_ids(tokenizer), device=device)
    length = max(len(p["prompt_ids"]) for p in prompts)
    ids = torch.full((len(prompts), length), tokenizer.pad_token_id, device=device)
    mask = torch.zeros_like(ids)
    for row, p in enumerate(prompts):  # padded on the left, so that all completions start in the same column
        ids[row, length - len(p["prompt_ids"]) :] = torch.tensor(p["prompt_ids"], device=device)
        mask[row, length - len(p["prompt_ids"]) :] = 1
    pixels, grid = (torch.cat([p[k] for p in prompts]).to(device) for k in ("pixel_values", "image_grid_thw"))
    is_image = (ids == model.config.image_token_id).int()
    rope, _ = model.model.get_rope_index(ids, is_image, image_grid_thw=grid, attention_mask=mask)  # (3, B, P)
    text = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config.get_text_config())
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=torch.cat([text[None], rope]),
        pixel_values=pixels,
        image_grid_thw=grid,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]

    # from here on one row per completion
    cache.batch_repeat_interleave(generations)
    logits, mask = logits.repeat_interleave(generations, 0), mask.repeat_interleave(generations, 0)
    position = torch.cat([text[None], rope])[:, :, -1].repeat_interleave(generations, 1)  # (4, rows), of the last token
    rows = len(prompts) * generations
    draws = (
        np.stack([uniforms(s, max_completion_length) for group in seeds for s in group])
        if temperature > 0
        else np.zeros((rows, 1))
    )
    draws = torch.from_numpy(draws).to(device)
    tokens = torch.full((rows, max_completion_length), -1, device=device)
    logps = torch.zeros(rows, max_completion_length, device=device)
    active = torch.arange(rows, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)  # of the active rows
    for t in range(max_completion_length):
        logp = torch.log_softmax(logits.float().index_fill(-1, banned, float("-inf")) / (temperature or 1.0), -1)
        if temperature > 0:  # inverse of the cumulative distribution at one uniform number per token
            cdf = logp.exp().cumsum(-1)
            token = torch.searchsorted(cdf, draws[active, t, None] * cdf[:, -1:], right=True)[:, 0].clamp(
                max=cdf.shape[-1] - 1
            )
        else:
            token = logp.argmax(-1)
        tokens[active, t] = torch.where(done, -1, token)
        logps[active, t] = logp.gather(1, token[:, None])[:, 0]
        done |= torch.isin(token, stop)
        if t + 1 == max_completion_length or done.all():
            break
        if t % 16 == 15 and done.float().mean() > 0.2:  # leave finished rows behind
            keep = (~done).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            active, token, mask, position, done = active[keep], token[keep], mask[keep], position[:, keep], done[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position + 1
        logits = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position[..., None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    finished = torch.isin(tokens, stop).any(-1).tolist()
    tokens, logps = tokens.tolist(), logps.cpu()
    out = [([x for x in ids if x >= 0], logps[r], finished[r]) for r, ids in enumerate(tokens)]
    out = [(ids, logp[: len(ids)], end) for ids, logp, end in out]
    return [out[i : i + generations] for i in range(0, rows, generations)]


def completion_text(tokenizer, ids):
    """Text with box and ref tokens, without the stop token."""
    return tokenizer.decode(ids, skip_special_tokens=False).removesuffix("<|im_end|>").removesuffix("<|endoftext|>")


# <<< shared:rollout


# ---- GRPO ----
@dataclass
class Group:
    """One prompt and its G completions: what a step computes on, from rollout to loss."""

    sample: dict
    inputs: dict  # of chat_inputs: prompt_ids, pixel_values, image_grid_thw
    completion_ids: list  # G lists of ints
    old_logps: list  # G tensors (C,), from the sampler
    finished: list  # G bools: the stop token came before the length ran out
    texts: list  # G strings
    rewards_per_func: dict = field(default_factory=dict)  # name -> G floats
    rewards: list = field(default_factory=list)  # G floats
    advantages: list = field(default_factory=list)  # G floats


def group_advantages(rewards, scale_rewards):
    """Advantages within one group. Shapes: G floats -> G floats; all 0 where all rewards are equal.

    `group`: (r - mean) / (std + 1e-4) with the unbiased std, as in the released trainer; `none`: r - mean (Dr. GRPO);
    `loo`: r - mean of the other G - 1 (RLOO).
    """
    r = torch.tensor(rewards, dtype=torch.float64)
    centred = r - r.mean()
    if r.max() == r.min():
        return [0.0] * len(rewards)
    if scale_rewards == "group":
        centred = centred / (r.std() + 1e-4)
    elif scale_rewards == "loo":
        centred = centred * len(r) / (len(r) - 1)
    return centred.tolist()


def completion_logps(model, tokenizer, group, temperature):
    """Log-probs of the completions under `model`, as the sampler defines them. Shapes: -> (G, C) fp32, mask (G, C)."""
    P, C = len(group.inputs["prompt_ids"]), max(len(ids) for ids in group.completion_ids)
    G, device = len(group.completion_ids), next(model.parameters()).device
    ids = torch.full((G, P + C), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, completion in enumerate(group.completion_ids):
        ids[row, : P + len(completion)] = torch.tensor(group.inputs["prompt_ids"] + completion)
        mask[row, : P + len(completion)] = 1
    is_image = torch.zeros_like(ids)
    is_image[:, :P] = ids[:, :P] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    batch = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": is_image.int()}
    batch |= {key: group.inputs[key].repeat(G, 1) for key in ("pixel_values", "image_grid_thw")}
    logits = (
        model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False, logits_to_keep=C + 1)
        .logits[:, :-1]
        .float()
    )
    banned = torch.tensor(vision_ids(tokenizer), device=device)
    logps = torch.log_softmax(logits.index_fill(-1, banned, float("-inf")) / temperature, -1)
    return logps.gather(-1, ids[:, P:].to(device)[..., None])[..., 0], mask[:, P:].to(device)


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, args, num_sequences, num_tokens):
    """Share of one group in the loss of the step, and what is logged of it.

    Shapes: logps, old_logps, ref_logps (or None), mask (G, C); advantages (G,). `num_sequences` and `num_tokens` count
    the completions of the whole step on all ranks, so that the groups' shares add up to the step's loss.
    Source: GRPO arXiv 2402.03300 eq. 3 (sequence), DAPO 2503.14476 eq. 8 (token), Dr. GRPO 2503.20783 (constant).
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
    advantages = advantages[:, None]
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(logps)
    if ref_logps is not None:
        log_ratio = (ref_logps - logps).clamp(-20, 20)
        kl = log_ratio.exp() - log_ratio - 1  # k3: unbiased, never negative
        per_token = per_token + args.beta * kl
    if args.loss_type == "grpo":
        loss = ((per_token * mask).sum(1) / mask.sum(1)).sum() / num_sequences
    elif args.loss_type == "dapo":
        loss = (per_token * mask).sum() / num_tokens
    else:
        loss = (per_token * mask).sum() / (num_sequences * args.max_completion_length)
    was_clipped = ((ratio < 1 - args.epsilon) & (advantages < 0)) | ((ratio > 1 + args.epsilon_high) & (advantages > 0))
    return loss, {"kl": (kl * mask).sum().item(), "clip": (was_clipped * mask).sum().item()}


def padded(rows, like):
    """(G, C) tensor of G rows of different length, on the device of `like`, zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(like.device)


def roll_out_step(model, tokenizer, image_processor, samples, step, args):
    """The groups of one step on this rank, with rewards and advantages."""
    prompts = [chat_inputs(tokenizer, image_processor, s["image"], s["question"] + R1_SUFFIX) for s in samples]
    seeds = [[f"{args.seed}:{step}:{s['id']}:{g}" for g in range(args.num_generations)] for s in samples]
    rolled = rollout(
        model, tokenizer, prompts, seeds, args.max_completion_length, args.temperature, args.rollout_batch_size
    )
    groups = []
    for sample, inputs, completions in zip(samples, prompts, rolled, strict=True):
        ids, logps, finished = (list(c) for c in zip(*completions, strict=True))
        group = Group(sample, inputs, ids, logps, finished, [completion_text(tokenizer, i) for i in ids])
        group.rewards_per_func = {
            name: [REWARDS[name](t, sample, args) for t in group.texts] for name in args.reward_funcs
        }
        group.rewards = [sum(w * r for w, r in zip(args.reward_weights, per, strict=True))
                         for per in zip(*group.rewards_per_func.values(), strict=True)]  # fmt: skip
        group.advantages = group_advantages(group.rewards, args.scale_rewards)
        groups.append(group)
    return groups


def step_metrics(groups, device):
    """Means over all completions of the step on all ranks (names are TRL's where it has one), and how many they are.

    Shapes: groups of this rank -> {name: float}, number of completions, number of completion tokens.
    """
    texts = [(t, g.sample) for g in groups for t in g.texts]
    values = {
        "reward": [r for g in groups for r in g.rewards],
        **{f"rewards/{f}/mean": [r for g in groups for r in g.rewards_per_func[f]] for f in groups[0].rewards_per_func},
        "acc@0.5": [iou_of(text, sample) >= 0.5 for text, sample in texts],
        "parse_rate": [parse_bbox(text) is not None for text, _ in texts],
        "completions/mean_length": [len(ids) for g in groups for ids in g.completion_ids],
        "completions/clipped_ratio": [not end for g in groups for end in g.finished],
    }
    constant = sum(max(g.rewards) == min(g.rewards) for g in groups)
    squares = sum(r * r for r in values["reward"])
    total = all_sum([len(texts), len(groups), constant, squares, *map(sum, values.values())], device)
    n, num_groups, constant, squares = total[:4]
    means = {name: t / n for name, t in zip(values, total[4:], strict=True)}
    means["reward_std"] = max(0.0, squares / n - means["reward"] ** 2) ** 0.5
    means["frac_reward_zero_std"] = constant / num_groups
    return means, int(n), int(total[4 + list(values).index("completions/mean_length")])


def group_row(group, step):
    """A whole group for samples.jsonl."""
    completions = [
        {"text": t, "bbox_1000": parse_bbox(t), "reward": r, "advantage": a}
        | {name: values[i] for name, values in group.rewards_per_func.items()}
        for i, (t, r, a) in enumerate(zip(group.texts, group.rewards, group.advantages, strict=True))
    ]
    return {"step": step, "id": group.sample["id"], "bbox_1000": group.sample["bbox_1000"], "completions": completions}


def main():
    args, start = parse_args(), time.time()
    samples = read_samples(args.data)
    if missing := [s["id"] for s in samples if s["bbox_1000"] is None]:
        box = "<|box_start|>(x1,y1),(x2,y2)<|box_end|>"
        raise SystemExit(f"{args.data} ({missing[0]}): no box in the answer; want {box}; mend or drop the row")
    check_model(args.model)
    rank, world_size, device = init_dist(args.timeout_minutes)
    out = Path(args.output_dir)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        same_config(
            out,
            args,
            ignore=(
                "output_dir",
                "logging_steps",
                "save_steps",
                "save_total_limit",
                "timeout_minutes",
                "rollout_batch_size",
            ),
        )
    if args.train_batch_size % world_size:
        raise SystemExit(
            f"--train_batch_size {args.train_batch_size}: not a multiple of {world_size} ranks; change one of them"
        )
    total_steps = args.max_steps or max(1, int(args.num_epochs * len(samples) / args.train_batch_size))
    torch.manual_seed(args.seed)

    tokenizer, image_processor = load_processors(args.model, args.max_pixels)
    for s in samples[rank::world_size]:
        length = len(prompt_ids(tokenizer, s["question"] + R1_SUFFIX, visual_tokens(image_processor, s["image"])))
        if length > args.max_prompt_length:
            raise SystemExit(
                f"{args.data} ({s['id']}): prompt of {length} tokens; want at most --max_prompt_length "
                f"{args.max_prompt_length}; raise it, lower --max_pixels or drop the row; a prompt is never cut"
            )
    model = load_model(args.model, args.dtype, device)
    if args.freeze_vision:
        model.model.visual.requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reference = copy.deepcopy(model).eval().requires_grad_(False) if args.beta > 0 else None
    engine = start_engine(model, args, accumulation_steps=args.train_batch_size // world_size)
    if rank == 0:
        derived = {"world_size": world_size, "total_steps": total_steps, "rows": len(samples)}
        write_text(out / "run.json", json.dumps(run_config(args, derived), indent=1) + "\n")
    state = resume(engine, out)
    first, num_tokens = state["step"], state["num_tokens"]
    if rank == 0:
        truncate_log(out / "metrics.jsonl", first)
        truncate_log(out / "samples.jsonl", first)
    print0(
        f"train_grpo: {len(samples)} rows, {total_steps} steps of {args.train_batch_size} x {args.num_generations}, "
        f"{world_size} ranks, {model.dtype} on {device.type}, reference model {'on' if reference else 'off'}"
    )

    B = args.train_batch_size
    for step in range(first + 1, total_steps + 1):
        began = time.time()
        # GRPO 1: the prompts of this step; every rank takes its share
        drawn = [
            samples[epoch_order(i, len(samples), args.seed)] for i in range((step - 1) * B + rank, step * B, world_size)
        ]
        # GRPO 2-4: completions, rewards, advantages
        groups = roll_out_step(engine.module, tokenizer, image_processor, drawn, step, args)
        generated = time.time()
        metrics, step_sequences, step_tokens = step_metrics(groups, device)
        num_tokens += step_tokens
        sums = {"loss": 0.0, "kl": 0.0, "clip": 0.0, "drift": 0.0}
        engine.train()
        for iteration in range(args.num_iterations):
            rate = learning_rate_at(
                (step - 1) * args.num_iterations + iteration + 1, total_steps * args.num_iterations, args
            )
            for param_group in engine.optimizer.param_groups:
                param_group["lr"] = rate
            for group in groups:
                logps, mask = completion_logps(engine, tokenizer, group, args.temperature)
                sampled = padded(group.old_logps, logps)
                old_logps = sampled if args.num_iterations > 1 else logps.detach()  # one update: the ratio is exactly 1
                ref_logps = None
                if reference is not None:
                    with torch.no_grad():
                        ref_logps, _ = completion_logps(reference, tokenizer, group, args.temperature)
                advantages = torch.tensor(group.advantages, device=device, dtype=torch.float32)
                # GRPO 5: the loss; DeepSpeed averages over ranks, times world_size makes it the loss of the whole step
                loss, logged = grpo_loss(
                    logps, old_logps, ref_logps, advantages, mask, args, step_sequences, step_tokens
                )
                engine.backward(loss * world_size, scale_wrt_gas=False)
                engine.step()  # GRPO 6: updates after the last group of the step
                sums["loss"] += loss.item() / args.num_iterations
                sums["kl"] += logged["kl"] / args.num_iterations
                sums["clip"] += logged["clip"] / args.num_iterations
                sums["drift"] += ((logps.detach() - sampled).abs() * mask).sum().item() * (iteration == 0)
        sums = dict(zip(sums, all_sum(list(sums.values()), device), strict=True))
        if not math.isfinite(sums["loss"]):
            raise SystemExit(
                f"step {step}: loss is {sums['loss']}; want a finite number; lower --learning_rate, resume from {out}"
            )
        if rank == 0 and step % args.logging_steps == 0:
            row = {
                "step": step,
                "loss": sums["loss"],
                **metrics,
                "grad_norm": float(engine.get_global_grad_norm() or 0.0),
                "learning_rate": rate,
                "num_tokens": num_tokens,
                "sampling/logp_diff": sums["drift"] / step_tokens,
                "gen_time": generated - began,
                "step_time": time.time() - began,
            }
            if reference is not None:
                row["kl"] = sums["kl"] / step_tokens
            if args.num_iterations > 1:
                row["clip_ratio/region_mean"] = sums["clip"] / step_tokens
            append_row(out / "metrics.jsonl", row)
            for group in groups[: args.log_completions]:
                append_row(out / "samples.jsonl", group_row(group, step))
            eta = (total_steps - step) * (time.time() - start) / (step - first)
            parts = " | ".join(f"{name} {row[f'rewards/{name}/mean']:.3f}" for name in args.reward_funcs)
            print0(
                f"step {step:05d}/{total_steps:05d} | loss {row['loss']:+.4f} | reward {row['reward']:.3f} ± "
                f"{row['reward_std']:.3f} | {parts} | acc {row['acc@0.5']:.2f} | zero-std "
                f"{row['frac_reward_zero_std']:.2f} | len {row['completions/mean_length']:.0f} | trunc "
                f"{row['completions/clipped_ratio']:.2f} | gnorm {row['grad_norm']:.2f} | lr {rate:.1e} | "
                f"{row['step_time']:.1f}s (gen {row['gen_time']:.1f}) | eta {eta / 60:.1f} min"
            )
        if args.save_steps and step % args.save_steps == 0 and step < total_steps:
            save_checkpoint(
                engine, tokenizer, image_processor, out, {"step": step, "num_tokens": num_tokens}, args.save_total_limit
            )
    export_model(engine, tokenizer, image_processor, out / "final")
    if rank == 0:
        keys = ["reward", *(f"rewards/{name}/mean" for name in args.reward_funcs), "acc@0.5", "parse_rate"]
        keys += ["frac_reward_zero_std", "completions/mean_length", "grad_norm", "kl"]
        draw_curves(out / "metrics.jsonl", out / "curves.png", keys)
    print0(f"train_grpo: {time.time() - start:.0f} s -> {out / 'final'}, {out / 'curves.png'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
