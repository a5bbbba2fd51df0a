"""Stage 1: supervised fine-tuning of a Qwen-VL on chains of thought (CoT-SFT) or on bare answers (the SFT baseline).

reads   --data        samples.jsonl of gen_cot.py or filter.py, own JSONL, or LLaMA-Factory ShareGPT JSON files
writes  --output_dir  metrics.jsonl, run.json, checkpoint-N/ (resumable), final/ (Hugging Face model)
  toy      python train_sft.py --model tests/toy/base --data runs/toy/filter_cot/samples.jsonl --output_dir runs/sft
  1 GPU    python train_sft.py --model Qwen/Qwen2-VL-2B-Instruct --data cot.jsonl --output_dir runs/sft
  8 GPUs   torchrun --nproc_per_node 8 train_sft.py --model Qwen/Qwen2-VL-7B-Instruct --data ... --output_dir runs/sft

One step: 1 draw sequences (`draw_steps`, `encode`)  2 pack them into rows without padding (`pack_sequences`)  3 loss,
the mean of -log p over all assistant tokens of the step on all ranks  4 update. The same command continues a stopped
run; 1 rank and 8 learn the same.
Defaults are the paper's (arXiv 2503.12797, LLaMA-Factory recipe). Differences: an over-long row is skipped and
counted, never cut; the loss weighs tokens equally, not ranks; lm_head runs where there is a label alone.
Shapes: T tokens of a packed row, N of them supervised, P prompt tokens, V vocabulary.
"""

import argparse
import fcntl
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from types import MethodType, SimpleNamespace

import deepspeed
import numpy as np
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = p.add_argument
    # fmt: off
    add("--model", required=True, help="Hugging Face folder or name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    add("--output_dir", required=True, help="run folder; an interrupted run is continued")
    # data
    add("--data", required=True, nargs="+", help="samples.jsonl, or ShareGPT .json")
    add("--image_root", help="folder that the rows' images are relative to (default: that of the row's file)")
    add("--target", default="cot", choices=["cot", "direct"], help="learn the messages, or question -> answer alone")
    add("--prompt_suffix", help="what follows a question (default: as in the messages)")
    add("--max_pixels", type=int, default=401408, help="pixel cap of an image (paper: 401,408)")
    add("--max_length", type=int, default=4096, help="tokens; a longer row is skipped and counted (paper: 4096)")
    add("--max_bad_rows", type=int, default=0, help="rows without text, sound box or readable image to skip and list")
    # optimisation
    add("--learning_rate", type=float, default=5e-6, help="peak (paper: 5e-6)")
    add("--lr_scheduler", default="cosine", choices=["cosine", "linear", "constant"], help="(paper: cosine)")
    add("--warmup_ratio", type=float, default=0.1, help="share of the steps (paper: 0.1)")
    add("--weight_decay", type=float, default=0.0, help="of AdamW")
    add("--max_grad_norm", type=float, default=1.0, help="0 means no clipping")
    add("--num_epochs", type=float, default=1.0, help="passes over the data (paper: 1)")
    add("--max_steps", type=int, default=-1, help="if > 0, steps instead of --num_epochs")
    add("--train_batch_size", type=int, default=16, help="sequences per step over all ranks (paper: 16)")
    add("--freeze_vision", action=argparse.BooleanOptionalAction, default=True, help="tower and merger (paper: frozen)")
    # engine
    add("--tokens_per_row", type=int, default=4096, help="tokens of a forward pass: sequences are packed up to it")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    add("--deepspeed", help="DeepSpeed's own settings (default: ds_config.json beside the script, else built in)")
    add("--zero_stage", type=int, choices=[1, 2, 3], help="3 shards the weights too (default: that of --deepspeed)")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="auto: bfloat16 on CUDA")
    # run
    add("--wandb", metavar="PROJECT", help="send the metrics to Weights & Biases too")
    add("--save_steps", type=int, default=200, help="0 means no checkpoint before the end")
    add("--save_total_limit", type=int, default=2, help="checkpoints kept")
    add("--keep_checkpoints", action="store_true", help="also once final/ is there")
    add("--seed", type=int, default=0, help="of the order of the rows")
    # fmt: on
    return p.parse_args(argv)

def encode(processors, args, sample):
    """Inputs of the prompt, the assistant's `completion_ids` with the <|im_end|> that closes them, and `num_tokens`."""
    completion = sample["completion"] if args.target == "cot" else sample["answer"]
    if not completion:
        raise ValueError("nothing to learn from; want an assistant's message, or an answer for --target direct")
    inputs = chat_inputs(processors, sample["image"], sample["question"] + suffix_of(sample, args))
    text = model_text(completion, processors[2], inputs["grid"]) + "<|im_end|>"
    ids = processors[0].encode(text, add_special_tokens=False)
    return inputs | {"completion_ids": ids, "num_tokens": len(inputs["prompt_ids"]) + len(ids)}

def suffix_of(sample, args):
    """What follows the question: --prompt_suffix, or what the row's messages have there; direct: nothing."""
    return (sample["suffix"] if args.target == "cot" else "") if args.prompt_suffix is None else args.prompt_suffix

def model_text(text, style, grid):
    """A completion as the family writes it: names without tokens, boxes on its `grid`, answers as JSON."""
    def written(match):
        name, *box = match.groups()
        x1, y1, x2, y2 = (round(int(v) * n / 1000) for v, n in zip(box, grid * 2, strict=True))
        x1, y1 = min(x1, grid[0] - 1), min(y1, grid[1] - 1)
        x2, y2, label = max(x2, x1 + 1), max(y2, y1 + 1), json.dumps(name, ensure_ascii=False)
        as_json = f'```json\n[\n\t{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": {label}}}\n]\n```'
        return as_json if name else f"({x1},{y1}),({x2},{y2})"
    named = re.compile(f"(?:{REF.pattern})?{BOX.pattern}", re.S | re.A)
    return REF.sub(r"\1", named.sub(written, text)) if style.json else text

def pack_sequences(items, device):
    """Items of `encode` end to end in one row of T tokens, each a causal sequence of its own; no padding."""
    sizes, positions, at = [x["num_tokens"] for x in items], [], []
    spans = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device), max(sizes)
    for x, end in zip(items, accumulate(sizes), strict=True):
        C, after = len(x["completion_ids"]), int(x["position_ids"][0, -1]) + 1
        positions += [x["position_ids"], torch.arange(after, after + C).expand(3, -1)]
        at += range(end - C - 1, end - 1)
    ids = [i for x in items for i in x["prompt_ids"] + x["completion_ids"]]
    row = packed_row(items, ids, positions, lambda layer, *args: attend_sequences(*args, spans), device)
    row.at = torch.tensor(at, device=device)  # (N,), the position before each supervised token
    row.targets = torch.tensor([i for x in items for i in x["completion_ids"]], device=device)  # (N,), that token
    return row

def main():
    args = parse_args()
    rank, world_size, device = init_dist()
    out, B = Path(args.output_dir), args.train_batch_size
    if rank == 0:
        start_run(out, vars(args) | {"ranks": world_size, "torch": torch.__version__})
    if (out / "final").exists():
        return print0(f"{out / 'final'} exists; want another --output_dir")
    processors, rows = load_processors(args.model, args.max_pixels), read_samples(args.data, args.image_root)
    read = partial(encode, processors, args)
    samples, total, total_steps = usable(*rows, lambda s: read(s)["num_tokens"], args.max_length, args)
    model = load_model(args.model, args.dtype, device)
    model.config.prompt_suffix = suffix_of(samples[0], args)  # exported with the weights
    engine = start_engine(CompletionLogProbs(model), args)
    state, asked_to_stop = resume(engine, out, args), []
    print0(f"train_sft: {total_steps} steps of {B}, {world_size} ranks on {device.type}, {model.dtype}")
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))
    engine.train()
    # 1. sequences; those of the last step beyond `total` do not count
    for step, items, times in draw_steps(samples, read, state["step"] + 1, total_steps, args):
        counted = items[: len(range((step - 1) * B + rank, min(step * B, total), world_size))]
        (step_tokens,) = all_sum([sum(len(x["completion_ids"]) for x in counted)], device)
        # 2. rows; a rank without one left takes part with one that weighs nothing
        rows, sums = fill_rows(counted, args.tokens_per_row, device), np.zeros(2)
        for i, members in enumerate(rows):
            with timed(times, "train"):
                row = pack_sequences(members or items[:1], device)
                # 3. the loss: summed over rows and ranks it is the mean over the tokens of the step
                loss = -engine(row).sum() / step_tokens * bool(members)
                engine.set_gradient_accumulation_boundary(i == len(rows) - 1)
                engine.backward(loss * world_size, scale_wrt_gas=False)  # of the ranks DeepSpeed takes the mean
                sums += loss.item(), row.input_ids.numel() * bool(members)
        # 4. the update
        set_learning_rate(engine, step - 1, total_steps, args)
        with timed(times, "optimizer"):
            engine.step()
        loss, stop = all_sum([sums[0], len(asked_to_stop)], device)
        state = {"step": step, "num_tokens": state["num_tokens"] + int(step_tokens)}
        metrics = state | {"epoch": min(step * B, total) / len(samples), "loss": loss}
        log_step(engine, out, metrics, [], times, sums[1], total_steps - step, args)
        save_step(engine, processors, out, state, stop, total_steps - step, args)
    leave()

# ======== plumbing: the same bytes stand in train_grpo.py, and most of them in eval_kvg.py ========

# >>> shared:files (copy of synth_data.py)
QUESTION = "Find and give the bounding box of <|object_ref_start|>{}<|object_ref_end|>"
ANSWER = "<|object_ref_start|>{}<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>"
R1_SUFFIX = ("  Output the thinking process in <think> </think> "
             "and final answer (bounding box) in <answer> </answer> tags.")
to_json = partial(json.dumps, ensure_ascii=False)

class InputError(ValueError):
    """What the user has to mend, in one line: where, what was found, what is wanted."""

def read_jsonl(path, unfinished=False):
    """Rows as dicts. `unfinished`: of a killed run, if there was one, without its cut last line."""
    lines = b"" if unfinished and not os.path.exists(path) else Path(path).read_bytes()
    rows = []
    for number, line in enumerate(lines.split(b"\n")[: -1 if unfinished else None], 1):
        try:
            rows += [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError):
            raise InputError(f"{path}:{number}: {line[:80]!r}; want one JSON object a line") from None
    return rows

def write(path, *lines):
    """A text file, whole or not at all."""
    Path(f"{path}.tmp").write_text("".join(f"{line}\n" for line in lines), "utf-8", "backslashreplace")
    os.replace(f"{path}.tmp", path)

def start_run(out, settings, fixed=()):
    """Locks the folder, writes run.json: settings and a hash of this script. Says which an earlier run had otherwise;
    those in `fixed` are refused: one file would hold two kinds of rows."""
    global LOCK  # until the process ends
    out.mkdir(parents=True, exist_ok=True)
    LOCK, path = open(out / ".lock", "w"), out / "run.json"
    try:
        fcntl.lockf(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another run writes here; want one at a time") from None
    except OSError:
        pass  # some file systems have no locks
    now = json.loads(to_json(settings | {"script": hashlib.md5(Path(__file__).read_bytes()).hexdigest()}))
    old = json.loads(path.read_bytes()) if path.exists() else now
    changed = {key: f"{old.get(key)} -> {now[key]}" for key in now if old.get(key) != now[key]}
    if changed.keys() & set(fixed):
        raise InputError(f"{path}: {changed}; want the same settings, or another folder")
    if changed:
        print(f"{path}: goes on with other settings, {changed}", flush=True)
    write(path, to_json(now, indent=1))
# <<< shared:files

# >>> shared:model (copy of eval_kvg.py)
REF = re.compile(r"<\|object_ref_start\|>((?:(?!<\|).)*)<\|object_ref_end\|>", re.S)
BOX = re.compile(r"(?:<\|box_start\|>)?\((\d+),(\d+)\),\((\d+),(\d+)\)(?:<\|box_end\|>)?", re.A)
PAIRS = re.compile(r"<\|(object_ref|box)_start\|>(?:(?!<\|).)*<\|\1_end\|>", re.S)  # the only tokens that rows may hold
BAD = (LookupError, TypeError, AttributeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError)
# how a family writes boxes: as JSON, else between box tokens; in pixels of the resized image, else 0..1000
BOX_STYLES = {"qwen2_vl": (False, False), "qwen2_5_vl": (True, True), "qwen3_vl": (True, False)}
BOX_STYLES = {kind: SimpleNamespace(json=json_, pixels=pixels) for kind, (json_, pixels) in BOX_STYLES.items()}

def parse_row(r, folder, number):
    """A row of any format as a sample; raises BAD. `suffix`: what its user's turn adds to the question."""
    user, reply = ([t["content"].replace("<image>", "") for t in r.get("messages") or ()] + ["", ""])[:2]
    question = r.get("question") or r.get("problem") or r.get("phrase") and QUESTION.format(r["phrase"].strip()) or user
    question = question.replace("<image>", "").removesuffix(R1_SUFFIX)
    answer = (r.get("answer") or r.get("solution") or reply).rsplit("<answer>", 1)[-1].split("</answer>")[0].strip()
    image = (r.get("images") or [r["image"]])[0]
    image = image.get("bytes") or image["path"] if isinstance(image, dict) else image
    image = str(Path(folder, image)) if isinstance(image, str) else image
    name = r.get("entity") or (REF.findall(answer) + REF.findall(question) + [""])[0]
    box = [int(v) for found in BOX.findall(REF.sub("", answer))[:1] for v in found]
    if px := r.get("bbox_px"):
        sides = zip(px, load_image(image).size * 2, strict=True)  # up to 1 px beyond them is rounding
        box = [min(max(v, 0), n) * 1000 / n if -1 <= v <= n + 1 else -1 for v, n in sides]
        x1, y1, x2, y2 = map(round, box)
        answer = ANSWER.format(name, min(x1, 999), min(y1, 999), max(x2, x1 + 1), max(y2, y1 + 1))
    if not question or box and not (0 <= box[0] < box[2] <= 1000 and 0 <= box[1] < box[3] <= 1000):
        raise ValueError(f"question {question!r}, box {px or box}; want x1 < x2, y1 < y2, within the image or 0..1000")
    if found := re.search(r"<\|.{0,20}", PAIRS.sub("", f"{question}\n{answer}\n{user}\n{reply}")):
        raise ValueError(f"{found[0]!r} in a text; want no tokens but pairs around a name or a box")
    key = [r[name] for name in ("question_id", "id") if r.get(name) is not None] + [number]
    return dict(id=str(key[0]), image=image, image_id=r.get("image_id"), question=question, answer=answer, entity=name,
                bbox_1000=box or None, options=r.get("options"), category=str(r.get("category")).lower(),
                completion=reply, suffix=R1_SUFFIX * user.endswith(R1_SUFFIX))

def read_samples(paths, image_root=None):
    """(samples, a line about each row that is none) of JSONL, ShareGPT .json, released .parquet files"""
    samples, bad = {}, []
    for path in map(Path, paths):
        if path.suffix == ".parquet":
            rows = (r for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256) for r in batch.to_pylist())
        else:
            try:
                rows = list(map(dict, json.loads(path.read_bytes()))) if path.suffix == ".json" else read_jsonl(path)
            except (TypeError, json.JSONDecodeError) as e:
                raise InputError(f"{path}: {e}; want a JSON list of objects") from None
        for number, row in enumerate(rows, 1):
            try:
                sample = parse_row(row, image_root or path.parent, len(samples) + len(bad) + 1)
                if samples.setdefault(sample["id"], sample) is not sample:
                    raise ValueError("its id occurs twice; want unique ids")
            except BAD as e:
                bad.append(f"{path}:{number} ({row.get('question_id', row.get('id'))}): {type(e).__name__} {e}")
    return list(samples.values()), bad

def load_image(image):
    """RGB picture of a path or bytes, turned as its EXIF says, on white."""
    im = ImageOps.exif_transpose(Image.open(io.BytesIO(image) if isinstance(image, bytes) else image))
    if im.has_transparency_data:
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
    return im.convert("RGB")

def load_processors(path, max_pixels):
    """(tokenizer, image processor, box style) of a model. By PIL, for torchvision makes other pixels."""
    p = AutoImageProcessor.from_pretrained(path, backend="pil")
    p.size = {"shortest_edge": min(p.size["shortest_edge"], max_pixels), "longest_edge": max_pixels}
    return AutoTokenizer.from_pretrained(path), p, BOX_STYLES[AutoConfig.from_pretrained(path).model_type]

def chat_inputs(processors, image, text):
    """A user turn with an image, up to the assistant's first token: prompt_ids, list of P; position_ids (3, P);
    pixel_values (patches, values); image_grid_thw (1, 3); grid, the (width, height) that boxes count in; style."""
    (tokenizer, p, style), pad, text = processors, "<|image_pad|>", REF.sub(r"\1", text) if processors[2].json else text
    vision = p(images=[load_image(image)], return_tensors="pt")
    _, rows, columns = (vision["image_grid_thw"][0] // p.merge_size).tolist()
    grid = tuple(n * p.merge_size * p.patch_size for n in (columns, rows)) if style.pixels else (1000, 1000)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    prompt = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(prompt.replace(pad, pad * (rows * columns), 1), add_special_tokens=False)
    # M-RoPE: an image's tokens count frame, row and column from its start; the text behind it goes on from there
    start = ids.index(tokenizer.convert_tokens_to_ids(pad))
    positions, end = torch.arange(len(ids)).repeat(3, 1), start + rows * columns
    positions[:, start:end] = start + torch.tensor([(0, y, x) for y in range(rows) for x in range(columns)]).T
    positions[:, end:] += max(rows, columns) - rows * columns
    return {**vision, "prompt_ids": ids, "position_ids": positions, "grid": grid, "style": style}

def init_dist():
    """(rank, world_size, device), under torchrun or alone."""
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    rank, local_rank, world_size = (int(os.environ.setdefault(k, v)) for k, v in names.items())
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size == 1 else {}  # needs no port
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2), **alone)
    return rank, world_size, torch.device(f"cuda:{local_rank}" if cuda else "cpu")

def print0(message):
    if dist.get_rank() == 0:
        print(message, flush=True)

def leave():
    """Ends the ranks. Of several one now and then aborted in the interpreter's shutdown."""
    dist.destroy_process_group()
    if os.environ["WORLD_SIZE"] != "1":
        os._exit(0)

def load_model(path, dtype, device):
    """A `packable` Qwen-VL on the device."""
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(dtype, dtype)
    return packable(AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, device_map={"": device}))

def packable(model):
    """The model with `packed_flash` for attention."""
    AttentionInterface.register("packed_flash", packed_flash)
    model.config._attn_implementation = "packed_flash"  # its setter looks for flash-attn
    proj = model.model.visual.patch_embed.proj  # stride = kernel, a product; cuDNN may take seconds
    proj.forward = MethodType(lambda self, x: F.linear(x.flatten(1), self.weight.flatten(1), self.bias), proj)
    return model

def packed_flash(module, query, key, value, attention_mask, scaling, attend=None, **kwargs):
    """What transformers calls: the decoder with the row's `attend`, the vision tower within images or windows."""
    if attend:
        return attend(module.layer_idx, query, key, value, scaling), None
    spans = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]  # given since "flash" is in the name
    return attend_sequences(query, key, value, scaling, spans, causal=False), None

def attend_sequences(query, key, value, scaling, spans, key_spans=None, causal=True):
    """Attention within sequences end to end. Spans: their ends, int32, from 0 on, and the longest; of more keys than
    queries the last query sees all. Shapes: query (1, H, T, D), key, value (1, KV, K, D) -> (1, T, H, D)."""
    (ends, longest), (key_ends, longest_key) = spans, key_spans or spans
    if query.is_cuda and query.dtype != torch.float32:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__kwdefaults__ else {}  # torch 2.11: always
        options |= {"scale": scaling, "window_size": (-1, 0 if causal else -1)}
        return varlen_attn(q, k, v, ends, key_ends, longest, longest_key, **options)[None]
    out, lengths, key_lengths = [], ends.diff().tolist(), key_ends.diff().tolist()
    parts = query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2)
    for n, m, q, k, v in zip(lengths, key_lengths, *parts, strict=True):
        seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n) if causal and n < m else None
        out.append(F.scaled_dot_product_attention(q, k, v, seen, 0, causal and n == m, scale=scaling, enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2)

def packed_row(items, ids, positions, attend, device):
    """Sequences end to end, no padding: input_ids (1, T), position_ids (3, 1, T), M-RoPE, images, who sees whom."""
    row = {"input_ids": torch.tensor([ids]), "position_ids": torch.cat(positions, 1)[:, None]}
    row |= {k: torch.cat([x[k] for x in items]) for k in ("pixel_values", "image_grid_thw")}
    return SimpleNamespace(**{k: x.to(device) for k, x in row.items()}, image_features=None, attend=attend)

def embed_images(model, row):
    """Per image (1 + levels, visual tokens, hidden): what the decoder reads, then adds behind its first layers."""
    out = model.model.get_image_features(row.pixel_values, row.image_grid_thw, return_dict=True)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]  # deepstack: Qwen3-VL
    return torch.stack([x if torch.is_tensor(x) else torch.cat(x) for x in levels]).split([*map(len, levels[0])], 1)

def hidden_states(model, row):
    """Last ones (T, hidden) of a packed row; its images may be embedded already."""
    first, *rest = torch.cat(row.image_features or embed_images(model, row), 1)
    seen, inputs = row.input_ids == model.config.image_token_id, model.get_input_embeddings()(row.input_ids)
    inputs = inputs.masked_scatter(seen[..., None], first.to(inputs.dtype))
    options = {"visual_pos_masks": seen, "deepstack_visual_embeds": rest} if rest else {}
    options |= {"position_ids": row.position_ids, "attend": row.attend, "use_cache": False}
    return model.model.language_model(inputs_embeds=inputs, **options).last_hidden_state[0]
# <<< shared:model

# >>> shared:engine (source)
DS_CONFIG = """{"zero_optimization": {
    "stage": 2, "overlap_comm": true, "reduce_bucket_size": 560000000, "allgather_bucket_size": 560000000}}"""

def usable(samples, bad, num_tokens, most_tokens, args):
    """(samples of up to `most_tokens`, how many the run takes, its steps); num_tokens raises for bad ones"""
    B, world_size = args.train_batch_size, dist.get_world_size()
    def look(sample):
        try:
            return num_tokens(sample), None
        except BAD as e:
            return math.inf, f"{sample['id']}: {type(e).__name__} {e}"
    with ThreadPoolExecutor() as pool:
        found = [[*pool.map(look, samples)] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    bad = bad + [line for _, line in found[0] if line]
    kept = [s for s, (n, _) in zip(samples, found[0], strict=True) if n <= most_tokens]
    print0("\n".join([f"{len(kept)} of {len(samples)} rows are of use, the others too long or bad", *bad]))
    if len(bad) > args.max_bad_rows or not kept or B % world_size:
        want = f"at most --max_bad_rows {args.max_bad_rows}, at least 1, a multiple of {world_size} ranks"
        raise InputError(f"{len(bad)} bad rows, {len(kept)} of use, --train_batch_size {B}; want {want}")
    total = args.max_steps * B if args.max_steps > 0 else max(1, int(args.num_epochs * len(kept)))
    return kept, total, math.ceil(total / B)  # the last step takes what is left

def draw_steps(samples, read, first, total_steps, args):
    """(step, this rank's inputs, {"data": seconds waited}) from step `first` on; threads read a step ahead."""
    rank, world_size, B = dist.get_rank(), dist.get_world_size(), args.train_batch_size
    epochs = range(math.ceil(total_steps * B / len(samples)))
    order = [s | {"epoch": e} for e in epochs for s in random.Random(f"{args.seed}:{e}").sample(samples, len(samples))]
    mine = [order[i + rank : i + B : world_size] for i in range(0, total_steps * B, B)] + [[]]  # by step
    with ThreadPoolExecutor(4) as pool:
        ahead = pool.map(read, mine[first - 1])
        for step in range(first, total_steps + 1):
            began, now, ahead = time.perf_counter(), ahead, pool.map(read, mine[step])
            yield step, [*now], {"data": time.perf_counter() - began}

class CompletionLogProbs(torch.nn.Module):
    """Packed row -> fp32 log-probs (N,) of its completion tokens with the sampler's temperature and banned ids."""
    def __init__(self, model, banned=(), temperature=1.0, chunk=2**26):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.size = max(1, chunk // model.config.get_text_config().vocab_size)  # positions; `chunk` counts logits
        self.register_buffer("banned", torch.tensor(banned, dtype=torch.long, device=model.device), persistent=False)

    def score(self, hidden, targets):
        logits = self.model.lm_head(hidden).float().index_fill(-1, self.banned, -torch.inf) / self.temperature
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    def forward(self, row):
        hidden = hidden_states(self.model, row)[row.at]  # lm_head runs on these N alone
        if len(hidden) <= self.size:  # else in chunks, computed again in the backward pass
            return self.score(hidden, row.targets)
        parts = zip(hidden.split(self.size), row.targets.split(self.size), strict=True)
        return torch.cat([checkpoint(self.score, *part, use_reentrant=False) for part in parts])

def start_engine(scorer, args):
    """DeepSpeed around a CompletionLogProbs. bf16 weights have bf16 gradients and an fp32 optimizer."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ on a CPU
    model, path = scorer.model, Path(args.deepspeed or Path(__file__).with_name("ds_config.json"))
    model.model.visual.requires_grad_(not args.freeze_vision)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = json.loads(path.read_text() if args.deepspeed or path.exists() else DS_CONFIG)
    config["zero_optimization"] |= {"stage": args.zero_stage} if args.zero_stage else {}
    config |= {"gradient_clipping": args.max_grad_norm, "bf16": {"enabled": model.dtype == torch.bfloat16}}
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # main() says where steps end
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": model.device.type == "cuda"}
    optimizer = torch.optim.AdamW([p for p in scorer.parameters() if p.requires_grad], **options)
    dist.barrier()  # all have loaded: DeepSpeed's groups wait 10 minutes alone
    return deepspeed.initialize(model=scorer, optimizer=optimizer, config=config)[0]

def fill_rows(items, budget, device):
    """Items, longest first, in rows of up to `budget` "num_tokens"; as many on every rank."""
    rows = []
    for item in sorted(items, key=lambda x: -x["num_tokens"]):
        fits = [row for row in rows if sum(x["num_tokens"] for x in [*row, item]) <= budget]
        rows += [] if fits else [[]]
        (fits or rows[-1:])[0].append(item)
    dist.all_reduce(most := torch.tensor(max(1, len(rows)), device=device), op=dist.ReduceOp.MAX)
    return rows + [[]] * (int(most) - len(rows))

def set_learning_rate(engine, update, updates, args):
    """For update 0..updates - 1; linear warm-up."""
    warmup = math.ceil(args.warmup_ratio * updates)
    done = max(0, update - warmup) / max(1, updates - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[args.lr_scheduler]
    engine.optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, (update + 1) / max(1, warmup)) * shape

def all_sum(values, device):
    dist.all_reduce(total := torch.tensor(values, dtype=torch.float64, device=device))
    return total.tolist()

@contextmanager
def timed(seconds, phase):
    """Adds the block's wall time to seconds[phase]; waits for the device."""
    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began

def log_step(engine, out, row, shown, times, row_tokens, steps_left, args, completions=()):
    """Adds to a step's metrics what it cost, appends them to metrics.jsonl, prints those `shown`."""
    norm, seconds, cuda = engine.get_global_grad_norm(), sum(times.values()), engine.device.type == "cuda"
    if not math.isfinite(row["loss"]) or engine.optimizer.overflow:  # then DeepSpeed did not apply the step
        raise InputError(f"step {row['step']}: loss {row['loss']}, gradient {norm}; want a lower --learning_rate")
    row |= {"grad_norm": float(norm or 0.0), "learning_rate": engine.optimizer.param_groups[0]["lr"]}
    row["mem_gib"] = torch.cuda.max_memory_reserved() / 2**30 if cuda else getrusage(RUSAGE_SELF).ru_maxrss / 2**20
    row |= {f"time/{phase}": s for phase, s in times.items()}
    row |= {"step_time": seconds, "train_tokens_per_second": row_tokens / times["train"]}  # of this rank
    if engine.global_rank == 0:
        for name, lines in (("metrics", [row]), ("samples", completions)):
            with open(out / f"{name}.jsonl", "a", encoding="utf-8") as f:
                f.writelines(to_json(line, allow_nan=False) + "\n" for line in lines)
        if args.wandb:
            import wandb
            wandb.log(row, step=row["step"])
        shown = " | ".join(f"{key} {row[key]:.4g}" for key in ["loss", *shown, "grad_norm", "learning_rate", "mem_gib"])
        phases = ", ".join(f"{phase} {s:.1f}" for phase, s in times.items())
        end = f"{seconds:.1f} s ({phases}) | eta {steps_left * seconds / 60:.1f} min"
        print0(f"step {row['step']}/{row['step'] + steps_left} | {shown} | {end}")

def save_step(engine, processors, out, state, stop, steps_left, args):
    """A checkpoint every --save_steps and on SIGTERM, final/ at the end. A folder is complete or absent."""
    if not (stop or not steps_left or args.save_steps and state["step"] % args.save_steps == 0):
        return
    folder = out / (f"checkpoint-{state['step']}" if steps_left else "final")
    part, sharded = Path(f"{folder}.tmp"), engine.zero_optimization_stage() == 3
    shutil.rmtree(part, ignore_errors=True)  # by the first rank
    dist.barrier()
    if steps_left:
        engine.save_checkpoint(str(part), tag="engine")
    weights = engine._zero3_consolidated_16bit_state_dict() if sharded else engine.module.state_dict()
    if engine.global_rank == 0:  # a Hugging Face folder, renamed last
        weights = {name.removeprefix("model."): w for name, w in weights.items()}
        engine.module.model.save_pretrained(part, state_dict=weights)
        for processor in processors[:2]:
            processor.save_pretrained(part)
        write(part / "state.json", to_json(state | {"ranks": dist.get_world_size()}))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
        keep = args.save_total_limit if steps_left or args.keep_checkpoints else 0
        for old in checkpoints(out)[::-1][keep:]:
            shutil.rmtree(old)
    dist.barrier()
    if stop:
        raise SystemExit(f"SIGTERM: saved after step {state['step']}; the same command goes on from there")

def checkpoints(out):
    """Complete checkpoints of a run, oldest first."""
    return sorted(out.glob("checkpoint-*[0-9]"), key=lambda folder: int(folder.name.split("-")[1]))

def resume(engine, out, args):
    """state.json of the newest checkpoint, which is loaded, or of step 0; cuts the logs back to it."""
    state = {"step": 0, "num_tokens": 0}
    for folder in checkpoints(out)[-1:]:
        state = json.loads((folder / "state.json").read_bytes())
        tag = engine._config.load_universal_checkpoint = state["ranks"] != dist.get_world_size() and "universal"
        if tag and not (folder / tag).exists():
            make = "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder engine"
            raise InputError(f"want {state['ranks']} ranks, or: cd {folder} && {make} --output_folder {tag}")
        engine.load_checkpoint(str(folder), tag=tag or "engine")
        print0(f"goes on from {folder}")
    for log in out.glob("*s.jsonl") if engine.global_rank == 0 else ():  # metrics, samples
        write(log, *(to_json(row) for row in read_jsonl(log, unfinished=True) if row["step"] <= state["step"]))
    if args.wandb and engine.global_rank == 0:
        key = hashlib.md5(bytes(out.resolve())).hexdigest()
        import wandb
        wandb.init(project=args.wandb, name=out.name, id=key, resume="allow", config=vars(args))
    return state
# <<< shared:engine

if __name__ == "__main__":
    try:
        main()
    except (InputError, FileNotFoundError) as e:
        raise SystemExit(f"train_sft: {e}") from None
