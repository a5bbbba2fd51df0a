"""What the benchmarks share: a random Qwen2-VL of the real one's proportions, photos and prompts, ratios, memory."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "toy")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

SIDE = 560  # pixels of the photos: 400 visual tokens
GEOMETRIES = {  # hidden, layers, heads, key heads, feed-forward; vision width, depth; vocabulary, tied to the embedding
    "small": (256, 6, 4, 2, 1280, 128, 1, 4096, False),  # FLOPs of vision: a fifth of a prefill, as in the 7B
    "2b": (1536, 28, 12, 2, 8960, 1280, 32, 151936, True),
    "7b": (3584, 28, 28, 4, 18944, 1280, 32, 152064, False),
}


def build_model(geometry, device="cpu", dtype=torch.float32):
    """Random Qwen2-VL, and the toy world's tokenizer and image processor."""
    import make_toy
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    hidden, layers, heads, key_heads, feed_forward, vision, depth, vocabulary, tied = GEOMETRIES[geometry]
    ids, section = make_toy.TOKENIZER.convert_tokens_to_ids, hidden // heads // 8
    text = dict(vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=key_heads, intermediate_size=feed_forward, max_position_embeddings=32768,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6,
                                 "mrope_section": [4 * section - 2 * (3 * section // 2), *2 * [3 * section // 2]]},
                bos_token_id=None, eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"))  # fmt: skip
    tower = dict(depth=depth, embed_dim=vision, num_heads=max(1, vision // 80), hidden_size=hidden, mlp_ratio=4)
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=tower | ({"num_heads": 4} if vision == 128 else {}),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model, make_toy.TOKENIZER, make_toy.PROCESSOR


def write_photos(folder, count):
    """Noise photos of SIDE x SIDE pixels; every side a little shorter than the last, as real ones differ."""
    paths = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE - 28 * (i % 2), 3), np.uint8)
        paths.append(str(Path(folder) / f"{i}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def prompt_text(tokenizer, count):
    """Words of about `count` tokens."""
    text = "find the red thing with the white band " * count
    ids = tokenizer.encode(text)[:count]
    return tokenizer.decode(ids)


def spread(values):
    """Median, least and most of the rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def shown(name, s, unit="x"):
    return f"{name:44s} {s['median']:8.2f}{unit}   ({s['min']:.2f} to {s['max']:.2f}, {s['rounds']} rounds)"


def seconds_of(function):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def high_water(function, queue):
    """Bytes that `function` needs on top of what was there before: resident set on the CPU, allocator on CUDA."""
    run = function()  # builds what it works on; the returned call is measured
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return queue.put(torch.cuda.max_memory_allocated() - before)

    def kilobytes(key):
        return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)).split()[1])

    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark so far
    run()
    queue.put((kilobytes("VmHWM") - before) * 1024)


def peak_memory(function):
    """`high_water` in a process of its own, so that nothing freed before is used again."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=high_water, args=(function, queue))
    process.start()
    peak = queue.get(timeout=900)
    process.join()
    return peak


def environment():
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return {"torch": torch.__version__, "transformers": transformers.__version__, "device": device,
            "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "commit": commit}  # fmt: skip


def write_result(path, result):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(environment() | result, indent=1) + "\n", encoding="utf-8")
    print(f"-> {path}")


def parser(doc, name):
    p = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    p.add_argument("--geometry", default="small", choices=sorted(GEOMETRIES))
    p.add_argument("--rounds", type=int, default=5, help="of every side, in turns")
    p.add_argument("--out", default=f"runs/bench/{name}.json")
    return p
