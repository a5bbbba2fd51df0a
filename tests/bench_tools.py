"""What the benchmarks share: a random Qwen2-VL of the real one's proportions, photos and prompts, ratios, memory."""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "toy")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

GEOMETRIES = {  # hidden, layers, heads, key heads, feed-forward; vision width, heads, depth; vocabulary, tied or not
    "tiny": (64, 2, 4, 2, 128, 64, 2, 1, 600, False),  # for tests
    "small": (256, 6, 4, 2, 1280, 128, 4, 1, 4096, False),  # FLOPs of vision: a fifth of a prefill, as in the 7B
    "2b": (1536, 28, 12, 2, 8960, 1280, 16, 32, 151936, True),
    "7b": (3584, 28, 28, 4, 18944, 1280, 16, 32, 152064, False),
}

def build_model(geometry, device="cpu", dtype=torch.float32):
    """Random Qwen2-VL as transformers has it, and the toy world's tokenizer and image processor."""
    import make_toy
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.utils import logging
    logging.disable_progress_bar()
    hidden, layers, heads, key_heads, feed_forward, vision, vision_heads, depth, vocabulary, tied = GEOMETRIES[geometry]
    ids, section = make_toy.TOKENIZER.convert_tokens_to_ids, hidden // heads // 8
    mrope = [4 * section - 2 * (3 * section // 2), *2 * [3 * section // 2]]
    text = dict(vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=key_heads, intermediate_size=feed_forward, max_position_embeddings=32768,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope},
                bos_token_id=None, eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"))  # fmt: skip
    tower = dict(depth=depth, embed_dim=vision, num_heads=vision_heads, hidden_size=hidden, mlp_ratio=4)
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    tokens = {f"{name}_token_id": ids(f"<|{token}|>") for name, token in tokens.items()}
    config = Qwen2VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied, **tokens)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model, make_toy.TOKENIZER, make_toy.PROCESSOR

def write_photos(folder, count):
    """Noise photos of 560 x 560 pixels, 400 visual tokens; every second a little narrower, as real ones differ."""
    paths = [f"{folder}/{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        pixels = np.random.default_rng(i).integers(0, 256, (560, 560 - 28 * (i % 2), 3), np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
    return paths

def prompt_text(tokenizer, count):
    """Words of about `count` tokens."""
    return tokenizer.decode(tokenizer.encode("find the red thing with the white band " * count)[:count])

def run(*command):
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)

def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

def spread(values):
    """Median, least and most of the rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}

def show(name, s, unit="x"):
    print(f"{name:44s} {s['median']:8.2f}{unit}   ({s['min']:.2f} to {s['max']:.2f}, {s['rounds']} rounds)")

def seconds_of(function):
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start

def high_water(function, queue):
    """MB that the call which function() returns needs on top: resident set on the CPU, allocator on CUDA."""
    call, cuda = function(), torch.cuda.is_available()
    def now(key):
        if cuda:
            return {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}[key]() / 2**20
        return int(Path("/proc/self/status").read_text().split(key)[1].split()[1]) / 1024
    before = now("VmRSS")
    torch.cuda.reset_peak_memory_stats() if cuda else Path("/proc/self/clear_refs").write_text("5")
    call()
    queue.put(now("VmHWM") - before)

def peak_memory(function):
    """`high_water` in a process of its own, so that nothing freed before is used again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.qwen2_vl.modeling_qwen2_vl"])
    process = context.Process(target=high_water, args=(function, queue := context.Queue()))
    process.start()
    peak = queue.get(timeout=900)
    process.join()
    return peak

def write_result(path, result):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs"
    about = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads(), "commit": commit}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(about | result, indent=1) + "\n")
    print(f"-> {path}")

def parser(doc, name):
    p = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    p.add_argument("--geometry", default="small", choices=sorted(GEOMETRIES))
    p.add_argument("--rounds", type=int, default=5, help="of every side, in turns")
    p.add_argument("--trl_python", help="Python of an environment with TRL, see tests/trl_baseline.py")
    p.add_argument("--step_rounds", type=int, default=3, help="against TRL")
    p.add_argument("--out", default=f"runs/bench/{name}.json")
    return p
