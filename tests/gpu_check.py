"""The first minutes on a GPU: does everything run there, is it exact, how fast is it. One command, one GPU, 8 minutes.

  python tests/gpu_check.py [--checks kernels rollouts]         without CUDA the same walk at tiny sizes

Prints a table, and writes it to --out. Needs no weights, no data and no flash-attn: a tiny model for what is to be
exact, random weights of 2B and 7B geometry for what is to be fast. Without DeepSpeed PlainEngine stands in. Unless
--checks are named, each has a process of its own: one that breaks is a row.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import plain
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModelForImageTextToText

ROOT, LIMIT, TOTAL = Path(__file__).resolve().parents[1], 150, 470  # seconds of a check, and of all
sys.path.insert(0, str(ROOT))
CUDA, TOY, LOW = torch.cuda.is_available(), str(ROOT / "tests/toy/base"), torch.bfloat16
SFT = ("train_sft", "--target", "direct")
DEVICE, MODE = (torch.device("cuda"), "cuda") if CUDA else (torch.device("cpu"), "cpu, tiny")
if CUDA:
    PATCHES, WIDTH, SHAPES = 2048, 1280, range(512, 4092, 179)  # of the vision tower; 20 lengths of a sequence
    ROLLED, ROLLOUTS, LENGTH, ALONE, TOGETHER = 8, 50, 32, 24, 128  # prompts, how often, tokens; greedy answers
    STEPS, STOP_AFTER, BUCKETS = 10, 30, (560_000_000, 200_000_000, 50_000)  # seconds; the toy embeds in 79,360
    GEOMETRIES = {"2b": ("tests/configs/qwen2-vl-2b", 1), "7b": ("tests/configs/qwen2-vl-7b", 8)}  # and its GPUs
    B, G, SIDES, WORDS, LENGTHS = 8, 8, (700, 560), 503, (150, 512)  # prompts, completions; photo, words, tokens
else:
    PATCHES, WIDTH, SHAPES, ROLLED, ROLLOUTS, LENGTH, ALONE, TOGETHER = 16, 32, range(8, 11), 2, 2, 16, 2, 8
    STEPS, STOP_AFTER, BUCKETS = 2, 40, (560_000_000, 50_000)
    B, G, SIDES, WORDS, LENGTHS, GEOMETRIES = 2, 2, (112, 84), 20, (6,), {"2b": (TOY, 1), "7b": (TOY, 8)}

class PlainEngine(torch.nn.Module):
    """What the trainers ask of DeepSpeed's engine, in one process; the optimizer holds every n-th tensor in fp32."""
    def __init__(self, model, optimizer, config):
        super().__init__()
        self.module, self.optimizer, self.clip = model, optimizer, config["gradient_clipping"] or np.inf
        self.device, self.global_rank, self.forward, optimizer.overflow = model.model.device, 0, model.forward, False
        self.weights = optimizer.param_groups[0]["params"][:: STAND_IN.ranks]
        self.copies = optimizer.param_groups[0]["params"] = [p.detach().float() for p in self.weights]
        self.backward = lambda loss, scale_wrt_gas: loss.backward()
        self.set_gradient_accumulation_boundary = bool  # does nothing
        self.get_global_grad_norm, self.zero_optimization_stage = lambda: self.norm, lambda: 2
    @torch.no_grad()
    def step(self):
        self.norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip).item()
        for p, copy in zip(self.weights, self.copies, strict=True):
            copy.grad, p.grad = p.grad.float(), None
        self.optimizer.step(), self.optimizer.zero_grad(), self.zero_grad()
        torch._foreach_copy_(self.weights, self.copies)

STAND_IN = ModuleType("deepspeed")
STAND_IN.__spec__ = ModuleSpec("deepspeed", None)  # transformers looks for it
STAND_IN.ops, STAND_IN.ranks = SimpleNamespace(__compatible_ops__={}), 1
STAND_IN.initialize = lambda **parts: [PlainEngine(**parts)]
try:
    import deepspeed
except ImportError:
    sys.modules["deepspeed"] = deepspeed = STAND_IN

import train_grpo as g  # noqa: E402
from tools import plan  # noqa: E402

g.REWARD_FUNCS["letters"] = lambda c, prompt, args: sum(map(str.isalpha, c.text)) / 99  # any model earns it
INSTALLED = {d.name.lower().replace("-", "_"): d.version for d in distributions()}

# ---- what the checks share ----
def apart(names, ours, exact):
    """{name: norm of the difference, relative to that of the exact one}"""
    pairs = ((a.float(), b.float()) for a, b in zip(ours, exact, strict=True))
    return {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in zip(names, pairs, strict=True)}

def run(*command):
    """What a Python process prints; what it complains of goes to the terminal."""
    alone = ("env", "-u", "LOCAL_RANK", "-u", "RANK", "-u", "WORLD_SIZE", sys.executable)  # they are set here
    return subprocess.check_output([*alone, *map(str, command)], text=True, cwd=ROOT)

def toy(folder, count):
    """(the toy base in bf16, its processors, prompts that it answers with a box)"""
    processors, (samples, _) = g.load_processors(TOY, 401408), g.read_samples([folder / "kvg-bench.parquet"])
    prompts = [x | g.chat_inputs(processors, x["image"], x["question"]) for x in samples[:count]]
    return g.load_model(TOY, "bfloat16", DEVICE), processors, prompts

def trained(folder, name, trainer, *flags, seconds=100):
    """metrics.jsonl of a run in a process of its own, which gets SIGTERM after so many seconds."""
    out, code = folder / name, f"import sys, gpu_check, {trainer}; sys.argv[0] = '{trainer}'; {trainer}.main()"
    same = ("--model", TOY, "--data", folder / "kvg-bench.parquet", "--output_dir", out, "--save_steps", 0)
    command = map(str, ("timeout", seconds, sys.executable, "-c", code, *same, "--train_batch_size", 8, *flags))
    subprocess.run([*command], stdout=subprocess.DEVNULL, cwd=ROOT / "tests")
    return g.read_jsonl(out / "metrics.jsonl")

# ---- the checks; each yields (what, {name: number or text}, what is wanted, whether it is so or None) ----
def versions(folder):
    code, gpu = subprocess.getstatusoutput("nvidia-smi --query-gpu=name,driver_version --format=csv,noheader")
    found = {n: INSTALLED.get(n, "none") for n in ("torch", "transformers", "deepspeed", "trl")}
    found |= {"device": MODE, "CUDA": str(torch.version.cuda), "GPU": gpu}
    yield "versions", found, "CUDA where a GPU is", torch.ones(1, device=DEVICE) and CUDA >= (code == 0)

def vision(folder):
    """What the patch embedding as a product spares, and torch's attention of patches with and without cuDNN's."""
    x, conv = torch.randn(PATCHES, 3, 2, 14, 14), torch.nn.Conv3d(3, WIDTH, (2, 14, 14), (2, 14, 14), bias=False)
    x, conv = x.to(DEVICE, LOW), conv.to(DEVICE, LOW)
    ways = {"a product": lambda: F.linear(x.flatten(1), conv.weight.flatten(1)), "Conv3d": lambda: conv(x)}
    for name, way in ways.items():
        ms = 1e3 * Timer("way().sum().backward()", globals={"way": way}).timeit(5).mean
        yield f"patches by {name}", {"ms, forward and backward": ms}, "", None
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        times, bad = [], 0
        for S in (*SHAPES, *SHAPES):
            q, k, v, up = (torch.randn(1, 16, S, 80, device=DEVICE, dtype=LOW, requires_grad=True) for _ in range(4))
            with g.timed(t := {}, "s"):
                F.scaled_dot_product_attention(q, k, v).backward(up)
            times.append(1e3 * t["s"])
            bad += not all(x.grad.isfinite().all() for x in (q, k, v))
        first, again = map(np.median, (times[: len(SHAPES)], times[len(SHAPES) :]))
        told, ok = {"first ms": first, "again ms": again, "bad gradients": bad}, bad == 0 and first < 5 * again
        yield f"SDPA {'with' if cudnn else 'without'} cuDNN", told, "first < 5 x again", None if cudnn else ok

def kernels(folder):
    _, processors, prompts = toy(folder, 2)
    for p in prompts:
        p["completions"] = [SimpleNamespace(ids=torch.randint(3, 500, (n,)).tolist()) for n in (1, 7, 300)]
    T = (packed := g.pack_groups(prompts, DEVICE)).input_ids.numel()
    spans = torch.tensor([0, T // 3, T], dtype=torch.int32, device=DEVICE), T - T // 3
    parts = partial(g.attend_sequences, spans=spans)
    cases = {"the row": (partial(packed.attend, 0), 28, 4, 128), "attend_sequences": (parts, 28, 4, 128),
             "attend_sequences, tower": (partial(parts, causal=False), 16, 16, 80)}  # fmt: skip
    for name, (attend, heads, key_heads, width) in cases.items():
        shapes, results = [(1, n, T, width) for n in (heads, key_heads, key_heads)] + [(1, T, heads, width)], []
        drawn = [torch.randn(shape, device=DEVICE).to(LOW) for shape in shapes]
        for dtype in (LOW, torch.float32):  # which takes the loop
            q, k, v, up = (x.detach().to(dtype).requires_grad_() for x in drawn)
            (out := attend(q, k, v, width**-0.5)).backward(up)
            results.append((out, q.grad, k.grad, v.grad))
        off = apart(("output", "dq", "dk", "dv"), *results)
        yield f"{name}, bf16 against the fp32 loop", off, "each < 0.02", max(off.values()) < 0.02
    def felt(model, logps):
        logps.sum().backward()
        return torch.cat(g.embed_images(model, packed), 1), logps, model.model.visual.patch_embed.proj.weight.grad
    model, torch.backends.cudnn.allow_tf32 = AutoModelForImageTextToText.from_pretrained(TOY).to(DEVICE), False  # fp32
    rows = [plain.completion_logps(model, processors[0], p, [c.ids for c in p["completions"]]) for p in prompts]
    exact = felt(model, torch.cat([logps[mask.bool()] for logps, mask in rows]))
    for dtype, limit in (("float32", 1e-3), ("bfloat16", 0.1)):
        model = g.load_model(TOY, dtype, DEVICE)
        off = apart(("image", "log-probs", "first gradient"), felt(model, g.CompletionLogProbs(model)(packed)), exact)
        yield f"the toy in {dtype} against transformers", off, f"each < {limit}", max(off.values()) < limit

def rollouts(folder):
    (model, processors, many), capture, done, times = toy(folder, TOGETHER), g.capture, [], {}
    prompts, seeds = many[:ROLLED], [[f"{i}:{j}" for j in range(G)] for i in range(ROLLED)]
    for g.capture in (lambda advance: advance, capture):  # a CPU never asks for it
        done.append([c for group in g.rollout(model, processors[0], prompts, seeds, LENGTH, 1.0) for c in group])
    other = sum(a[0] != b[0] for a, b in zip(*done, strict=True))
    off = max([(a[1] - b[1]).abs().max().item() for a, b in zip(*done, strict=True) if a[0] == b[0]], default=0)
    yield "graphs against none", {"other rows": other, "log-probs": off}, "0, < 0.01", other == 0 and off < 0.01
    held = torch.cuda.memory_reserved()
    for _ in range(ROLLOUTS):
        with g.timed(times, "s"):
            g.rollout(model, processors[0], prompts, seeds, LENGTH, 1.0)
    measured = {"s each": times["s"] / ROLLOUTS, "grown MB": (torch.cuda.memory_reserved() - held) / 1e6}
    yield f"{ROLLOUTS} rollouts", measured, "grown < 64 MB", measured["grown MB"] < 64
    greedy = partial(g.rollout, model, processors[0], max_completion_length=LENGTH, temperature=0.0)
    among = greedy(many, [["0"]] * TOGETHER)
    equal = np.mean([greedy([p], [["0"]])[0][0][0] == c[0] for p, [c] in zip(many[:ALONE], among, strict=False)])
    yield f"greedy answers alone and among {TOGETHER}, bf16", {"equal": equal}, ">= 0.9", equal >= 0.9

def step(folder, name):
    """A GRPO step at this geometry, by one of so many GPUs; then the plain way and TRL's, with one prompt."""
    (path, gpus), processors, prompts = GEOMETRIES[name], g.load_processors(TOY, 401408), []
    for photo in (f"{folder}/{i}.png" for i in range(B)):
        Image.fromarray(np.random.randint(0, 256, (*SIDES[::-1], 3), np.uint8)).save(photo)
        prompts.append({"id": photo} | g.chat_inputs(processors, photo, " red" * WORDS))
    P, image = len(prompts[0]["prompt_ids"]), AutoConfig.from_pretrained(TOY).image_token_id
    config = AutoConfig.from_pretrained(ROOT / path, image_token_id=image)
    with DEVICE:
        model = AutoModelForImageTextToText.from_config(config, dtype=LOW if CUDA else torch.float32)
    args = g.parse_args(["--model=", "--data=", "--output_dir=", *(flags := ["--gradient_checkpointing"] * (gpus > 1))])
    g.deepspeed, STAND_IN.ranks = deepspeed if gpus == 1 else STAND_IN, gpus
    engine = g.start_engine(g.CompletionLogProbs(g.packable(model)), args)
    def once(C):
        times, seeds = {}, [[f"{p['id']}:{i}" for i in range(G)] for p in prompts]
        with torch.no_grad(), g.timed(times, "vision, prefill"):
            rolled = g.Rollout(model.eval(), processors[0], prompts, seeds, C, 1.0)
        with torch.no_grad(), g.timed(times, "decode"):
            rolled.decode(graphs=CUDA)
        for p, group in zip(prompts, rolled.tokens.view(B, G, C).tolist(), strict=True):
            ids = [[i for i in c if i >= 0] for c in group]
            p["completions"] = [g.Completion(c, torch.zeros(len(c)), True, advantage=1.0) for c in ids]
            p["num_tokens"] = P + G * C
        with g.timed(times, "train"):
            engine.train()
            for members in (rows := g.fill_rows(prompts, args.tokens_per_row, DEVICE)):
                loss, _ = g.row_loss(engine, None, members, B * G, B * G * C, args)
                engine.set_gradient_accumulation_boundary(members is rows[-1])
                engine.backward(loss, scale_wrt_gas=False)
        with g.timed(times, "optimizer"):
            engine.step()
        return times
    card = next((c for c in plan.CARDS if CUDA and c in torch.cuda.get_device_name().lower().replace(" ", "")), None)
    plan.TEXT, sized = P - np.prod(SIDES) // 784, plan.meta_model(ROOT / path)
    given = ["grpo", "--model=m", f"--gpus={gpus}x{card or 'h100'}", *flags]
    given += [f"--train_batch_size={B * gpus}", f"--num_generations={G}", f"--max_pixels={np.prod(SIDES)}"]
    ours, wanted = {}, "bandwidth > 0.4, MFU > 0.3" + ", GB < 1.15 x planned" * (gpus == 1)
    for C in LENGTHS:
        once(C)  # warms up
        times, planned = once(C), plan.plan(sized, plan.parse_args([*given, f"--max_completion_length={C}"]))
        told = {f"{k} s": t for k, t in times.items()} | {"tokens/s": B * G * C / times["decode"]}
        told |= {name: planned.seconds[k] / times[k] for name, k in (("bandwidth", "decode"), ("MFU", "train"))}
        told |= {"GB": torch.cuda.max_memory_allocated() / 1e9, "planned GB": planned.peak / 1e9}
        ok = told["bandwidth"] > 0.4 and told["MFU"] > 0.3 and (gpus > 1 or told["GB"] < 1.15 * told["planned GB"])
        yield f"{name}, P = {P}, C = {C}", told, wanted, ok if card else None
        ours[C] = sum(times.values()) - times["optimizer"]
    engine = getattr(engine, "destroy", bool)()  # its hooks and its optimizer
    model.set_attn_implementation("sdpa")
    model.generation_config.suppress_tokens = [image, config.video_token_id]  # random weights would draw them
    for C in LENGTHS:
        draw = dict(max_new_tokens=C, min_new_tokens=C, do_sample=True, top_k=0, num_return_sequences=G, pad_token_id=0)
        with g.timed(times := {}, "generate"):
            ids = plain.generate(model.eval(), prompts[0], **draw)
        with g.timed(times, "train"):
            logps, mask = plain.completion_logps(model.train(), processors[0], prompts[0], ids)
            (logps * mask).sum().backward()
        ratio = B * sum(times.values()) / ours[C]
        measured = {f"{k} s": B * t for k, t in times.items()} | {"times ours": ratio}
        yield f"{name}, C = {C}, plain, {B} x one prompt", measured, "> 1", ratio > 1 if CUDA else None
    if gpus == 1 and "trl" in INSTALLED:
        for part in (model, *processors[:2]):
            part.save_pretrained(folder / "model")
        (folder / "trl.jsonl").write_text(json.dumps({"image": prompts[0]["id"], "text": " red" * WORDS}))
        flags = ("--num_generations", G, "--max_completion_length", C, "--steps", 2, "--out", folder / "trl.json")
        run("tests/trl_baseline.py", "grpo", "--model", folder / "model", "--data", folder / "trl.jsonl", *flags)
        measured = {"s": B * json.loads((folder / "trl.json").read_text())["step_seconds"][-1]}
        yield f"{name}, C = {C}, TRL, {B} x one prompt", measured, "", None

def stages(folder):
    letters = ("--reward_funcs", "letters", "--max_completion_length", 32, "--dtype", "bfloat16")
    for trainer, *flags in (SFT, ("train_grpo", *letters)):
        rows = trained(folder, trainer, trainer, *flags, "--max_steps", STEPS)
        cost = {k: rows[-1][k] for k in ("step_time", "mem_gib", "loss", "grad_norm")}
        drift = max(r.get("sampling/logp_diff", 0) for r in rows)
        told, ok = cost | {"sampling/logp_diff": drift}, cost["grad_norm"] > 0 and drift < 0.03
        yield trainer, told, "a gradient, logp_diff < 0.03", ok
    flags = ("--prompt", "direct", "--max_completion_length", 48, "--out", folder / "eval")
    run("eval_kvg.py", "--bench", folder / "kvg-bench.parquet", "--model", folder / "train_sft/final", *flags)
    told = json.loads((folder / "eval/metrics.json").read_text())["all"]
    yield "eval_kvg", {k: told[k] for k in ("n", "acc", "parse_rate")}, "answers", told["parse_rate"] > 0

def engine(folder):
    if deepspeed is STAND_IN:
        return (yield "buckets, SIGTERM", {"skipped": "DeepSpeed is not installed"}, "", None)
    stopped, norms = (folder, "stopped", *SFT, "--max_steps"), {}
    for size in BUCKETS:
        (folder / "ds.json").write_text(g.DS_CONFIG.replace("560000000", str(size)))
        rows = trained(folder, str(size), *SFT, "--max_steps", 1, "--deepspeed", folder / "ds.json")
        norms[str(size)] = rows[0]["grad_norm"]
    yield "grad_norm by bucket", norms, "equal to 0.1 %", max(norms.values()) < 1.001 * min(norms.values())
    n = len(trained(*stopped, 10**6, seconds=STOP_AFTER))
    saved, rows = len(g.checkpoints(folder / "stopped")), trained(*stopped, n + 2)
    ok = saved == 1 and [r["step"] for r in rows] == [*range(1, n + 3)]
    yield "SIGTERM, resumed", {"stopped after": n, "steps": len(rows)}, "saved, each step once", ok

# ---- the walk ----
CHECKS = {f.__name__: f for f in (versions, vision, kernels, rollouts, stages)}
CHECKS |= {f"step_{name}": partial(step, name=name) for name in GEOMETRIES} | {"engine": engine}

def keep(out, check, measured, wanted, ok):
    """Adds a row to the file, and prints it as a line of the table. ok None: numbers to look at, or nothing to do."""
    measured = {k: v if isinstance(v, str) or np.isfinite(v) else str(v) for k, v in measured.items()}
    told = ", ".join(f"{k} {v}" if isinstance(v, str) else f"{k} {v:.3g}" for k, v in measured.items())
    print(line := f"| {check} | {told} | {wanted} | {'-' if ok is None else 'yes' if ok else 'NO'} |", flush=True)
    row = {"check": check, "measured": measured, "wanted": wanted, "ok": ok if ok is None else bool(ok), "line": line}
    rows = json.loads(Path(out).read_text()) if Path(out).exists() else []
    g.write(out, json.dumps([*rows, row], indent=1, allow_nan=False))

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--out", default="gpu_check.json", help="what was measured, a row for each line of the table")
    p.add_argument("--checks", nargs="+", choices=CHECKS, help="these alone, in one process, added to --out")
    args, began = p.parse_args(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        if args.checks:
            g.init_dist()
            run("tests/toy/toy_world.py", "--out", folder, "--per_entity", 1, "--bench_images", TOGETHER // 4, 1)
        else:
            g.write(args.out, "[]")
        for name in args.checks or CHECKS:
            limit = f"{max(1, min(LIMIT, TOTAL + began - time.time())):.0f}"
            alone = ["timeout", "-s", "KILL", limit, sys.executable, __file__, "--out", args.out, "--checks", name]
            try:
                for measured in CHECKS[name](Path(folder)) if args.checks else ():
                    keep(args.out, *measured)
                if not args.checks and (code := subprocess.run(alone).returncode):
                    raise RuntimeError(f"exit code {code} within {limit} s")
            except Exception as e:  # noqa: BLE001  whatever breaks in a check is its result, and the walk goes on
                keep(args.out, name, {"error": repr(e)[:200]}, "no error", False)
    if not args.checks:
        print(f"\n{MODE}, {time.time() - began:.0f} s\n\n| check | measured | wanted | ok |\n|-|-|-|-|")
        print(*(row["line"] for row in json.loads(Path(args.out).read_text())), sep="\n")

if __name__ == "__main__":
    main()
