"""Stage 1: supervised fine-tuning of a Qwen2-VL on chains of thought (CoT-SFT) or on bare answers (the SFT baseline).

reads   --data: samples.jsonl of gen_cot.py / filter.py, or LLaMA-Factory ShareGPT JSON (messages, images)
writes  --output_dir: metrics.jsonl, curves.png, config.json, checkpoint-N/ (resumable), final/ (Hugging Face model)

  smoke    python train_sft.py --model tests/toy/base --data runs/toy/filter_cot/samples.jsonl --output_dir runs/sft
  1 GPU    python train_sft.py --model Qwen/Qwen2-VL-2B-Instruct --data cot.jsonl --output_dir runs/sft
  8 GPUs   torchrun --nproc_per_node 8 train_sft.py --model Qwen/Qwen2-VL-7B-Instruct --data ... --output_dir runs/sft

Paper defaults (arXiv 2503.12797, LLaMA-Factory recipe): language model trained, vision tower and merger frozen, AdamW
5e-6, cosine with 10 % warm-up, 16 sequences a step, one epoch, 4096 tokens, bf16. Differences: an over-long row is
skipped and counted, never cut; the loss is the mean over all assistant tokens of the step, on all ranks.
Shapes: B rows, L tokens (left to right: prompt with image, completion), V vocabulary.
"""

import argparse
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
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

IGNORE_INDEX = -100


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--model", required=True, help="Hugging Face folder or name of a Qwen2-VL")
    p.add_argument("--data", required=True, help="samples.jsonl, or ShareGPT .json")
    p.add_argument("--output_dir", required=True, help="run folder; an interrupted run is continued")
    p.add_argument(
        "--target",
        default="cot",
        choices=["cot", "direct"],
        help="learn the messages as they are, or question -> answer alone",
    )
    # data
    p.add_argument("--max_pixels", type=int, default=401408, help="pixel cap of an image (paper: 401,408)")
    p.add_argument(
        "--max_length", type=int, default=4096, help="tokens; a longer row is skipped and counted (paper cutoff: 4096)"
    )
    # optimisation
    p.add_argument("--learning_rate", type=float, default=5e-6, help="peak (paper: 5e-6)")
    p.add_argument("--lr_scheduler", default="cosine", choices=["cosine", "linear", "constant"])
    p.add_argument("--warmup_ratio", type=float, default=0.1, help="share of the steps (paper: 0.1)")
    p.add_argument("--weight_decay", type=float, default=0.0)
    p.add_argument("--max_grad_norm", type=float, default=1.0, help="0 means no clipping")
    p.add_argument("--num_epochs", type=float, default=1.0, help="passes over the data (paper: 1)")
    p.add_argument("--max_steps", type=int, help="stop after this many steps instead (default: from --num_epochs)")
    p.add_argument("--train_batch_size", type=int, default=16, help="sequences per step over all ranks (paper: 16)")
    p.add_argument("--per_device_train_batch_size", type=int, default=2, help="sequences per forward pass (paper: 2)")
    p.add_argument(
        "--freeze_vision",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="vision tower and merger (paper: frozen)",
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
    p.add_argument("--save_steps", type=int, default=200, help="0 means no checkpoint before the end")
    p.add_argument("--save_total_limit", type=int, default=2, help="checkpoints kept")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if args.max_steps is not None and args.max_steps < 1:
        p.error("want --max_steps >= 1")
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


# >>> shared:dist (source)
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


# >>> shared:run_log (source)
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


# >>> shared:chat_inputs (source)
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


# >>> shared:load_model (source)
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


# >>> shared:engine (source)
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


# ---- data ----
def wanted(sample, target):
    """(user text, assistant text) of a row: its messages as they are, or the question and the bare answer."""
    if target == "cot":
        return sample["question"] + sample["prompt_suffix"], sample["completion"]
    return sample["question"], sample["answer"]


def row_length(sample, tokenizer, image_processor, target):
    """Tokens of a row, from the image's header alone."""
    question, completion = wanted(sample, target)
    prompt = prompt_ids(tokenizer, question, visual_tokens(image_processor, sample["image"]))
    return len(prompt) + len(tokenizer.encode(completion, add_special_tokens=False)) + 1


def encode_row(sample, tokenizer, image_processor, target):
    """input_ids, labels and pixels of one row: loss on the assistant's tokens and the <|im_end|> that closes them."""
    question, completion = wanted(sample, target)
    x = chat_inputs(tokenizer, image_processor, sample["image"], question)
    completion_ids = tokenizer.encode(completion + "<|im_end|>", add_special_tokens=False)
    prompt = x.pop("prompt_ids")
    return x | {"input_ids": prompt + completion_ids, "labels": [IGNORE_INDEX] * len(prompt) + completion_ids}


class Rows(torch.utils.data.Dataset):
    """The rows this rank trains on, in the order in which it does."""

    def __init__(self, samples, order, tokenizer, image_processor, args):
        self.samples, self.order = samples, order
        self.encode = lambda sample: encode_row(sample, tokenizer, image_processor, args.target)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        return self.encode(self.samples[self.order[i]])


def collate(rows, pad_id, image_id):
    """Right-padded batch. Shapes: input_ids, attention_mask, mm_token_type_ids, labels (B, L) long."""
    length = max(len(r["input_ids"]) for r in rows)
    batch = {
        "input_ids": torch.full((len(rows), length), pad_id),
        "labels": torch.full((len(rows), length), IGNORE_INDEX),
    }
    batch["attention_mask"] = torch.zeros(len(rows), length, dtype=torch.long)
    for i, r in enumerate(rows):
        for key in ("input_ids", "labels"):
            batch[key][i, : len(r[key])] = torch.tensor(r[key])
        batch["attention_mask"][i, : len(r["input_ids"])] = 1
    batch["mm_token_type_ids"] = (batch["input_ids"] == image_id).int()
    batch |= {k: torch.cat([r[k] for r in rows]) for k in ("pixel_values", "image_grid_thw")}
    return batch


def token_loss(model, batch):
    """Sum of the cross-entropy over the supervised tokens, fp32; `lm_head` runs only where some row has a label.

    Shapes: logits (B, K, V) for the K positions kept; a label is predicted from the position before it.
    """
    labels = batch.pop("labels")
    at = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero()[:, 0]
    logits = model(**batch, use_cache=False, logits_to_keep=at).logits.float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, at + 1].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def main():
    args, start = parse_args(), time.time()
    samples = read_samples(args.data)
    if missing := [s["id"] for s in samples if not wanted(s, args.target)[1]]:
        raise SystemExit(
            f"{args.data} ({missing[0]}): nothing to learn from; want an assistant message; run gen_cot.py"
        )
    check_model(args.model)
    rank, world_size, device = init_dist(args.timeout_minutes)
    out = Path(args.output_dir)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        same_config(
            out, args, ignore=("output_dir", "logging_steps", "save_steps", "save_total_limit", "timeout_minutes")
        )
    per_pass = args.per_device_train_batch_size * world_size
    if args.train_batch_size % per_pass:
        raise SystemExit(
            f"--train_batch_size {args.train_batch_size}: want a multiple of {per_pass} (per device x ranks)"
        )
    accumulation_steps = args.train_batch_size // per_pass
    torch.manual_seed(args.seed)

    tokenizer, image_processor = load_processors(args.model, args.max_pixels)
    lengths = broadcast(
        [row_length(s, tokenizer, image_processor, args.target) for s in samples] if rank == 0 else None
    )
    kept = [s for s, length in zip(samples, lengths, strict=True) if length <= args.max_length]
    if not kept:
        raise SystemExit(f"{args.data}: all {len(samples)} rows exceed --max_length {args.max_length}; raise it")
    total_steps = args.max_steps or max(1, int(args.num_epochs * len(kept) / args.train_batch_size))

    model = load_model(args.model, args.dtype, device)
    if args.freeze_vision:
        model.model.visual.requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = start_engine(model, args, accumulation_steps)
    if rank == 0:
        derived = {
            "world_size": world_size,
            "accumulation_steps": accumulation_steps,
            "total_steps": total_steps,
            "rows": len(kept),
        }
        write_text(out / "run.json", json.dumps(run_config(args, derived), indent=1) + "\n")
    state = resume(engine, out)
    first, num_tokens = state["step"], state["num_tokens"]
    if rank == 0:
        truncate_log(out / "metrics.jsonl", first)
    print0(
        f"train_sft: {len(kept)} rows ({len(samples) - len(kept)} over {args.max_length} tokens skipped), "
        f"{total_steps} steps of {args.train_batch_size}, {world_size} ranks, {model.dtype} on {device.type}"
    )

    n = args.train_batch_size
    order = [
        epoch_order(i, len(kept), args.seed)
        for s in range(first, total_steps)
        for i in range(s * n + rank, (s + 1) * n, world_size)
    ]
    image_id, pad_id = tokenizer.convert_tokens_to_ids("<|image_pad|>"), tokenizer.pad_token_id
    loader = torch.utils.data.DataLoader(
        Rows(kept, order, tokenizer, image_processor, args),
        batch_size=args.per_device_train_batch_size,
        collate_fn=lambda rows: collate(rows, pad_id, image_id),
    )
    batches, since = iter(loader), time.time()
    engine.train()
    for step in range(first + 1, total_steps + 1):
        rate = learning_rate_at(step, total_steps, args)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        micro_batches = [{k: v.to(device) for k, v in next(batches).items()} for _ in range(accumulation_steps)]
        local = sum(int((b["labels"][:, 1:] != IGNORE_INDEX).sum()) for b in micro_batches)
        (tokens,) = all_sum([local], device)
        total_loss = 0.0
        for batch in micro_batches:
            loss = token_loss(engine, batch)
            total_loss += loss.item()
            # DeepSpeed averages over ranks; times world_size makes it the mean over the tokens of the whole step
            engine.backward(loss * world_size / tokens, scale_wrt_gas=False)
            engine.step()
        total_loss = all_sum([total_loss], device)[0] / tokens
        if not math.isfinite(total_loss):
            raise SystemExit(
                f"step {step}: loss is {total_loss}; want a finite number; lower --learning_rate, resume from {out}"
            )
        num_tokens += int(tokens)
        if rank == 0 and step % args.logging_steps == 0:
            elapsed = time.time() - since
            row = {
                "step": step,
                "loss": total_loss,
                "grad_norm": float(engine.get_global_grad_norm() or 0.0),
                "learning_rate": rate,
                "num_tokens": num_tokens,
                "epoch": step * n / len(kept),
                "step_time": elapsed / args.logging_steps,
            }
            append_row(out / "metrics.jsonl", row)
            eta = (total_steps - step) * (time.time() - start) / max(1, step - first)
            print0(
                f"step {step:05d}/{total_steps:05d} | loss {total_loss:.4f} | gnorm {row['grad_norm']:.2f} | "
                f"lr {rate:.1e} | {row['step_time']:.2f}s | eta {eta / 60:.1f} min"
            )
            since = time.time()
        if args.save_steps and step % args.save_steps == 0 and step < total_steps:
            save_checkpoint(
                engine, tokenizer, image_processor, out, {"step": step, "num_tokens": num_tokens}, args.save_total_limit
            )
    export_model(engine, tokenizer, image_processor, out / "final")
    if rank == 0:
        draw_curves(out / "metrics.jsonl", out / "curves.png", ["loss", "grad_norm", "learning_rate"])
    print0(f"train_sft: {time.time() - start:.0f} s -> {out / 'final'}, {out / 'curves.png'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
