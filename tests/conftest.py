"""Fixtures: the toy world, samples of it, tiny random models, and the trainers' runs that several files look at."""

import io
import json
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder fails at once, not after retries
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the scripts would take a GPU that DeepSpeed is told not to
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toy")]

import pytest  # noqa: E402

TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["transformers.models.qwen2_vl.modeling_qwen2_vl", "transformers.models.auto.modeling_auto",
    "deepspeed.runtime.zero.muon.original_muon", "torch.nn.attention.varlen", "PIL.Image", "pyarrow.parquet"])

def child(command, env, log):
    """Runs a script as `python script ...` would, in a process that has the slow imports behind it."""
    for stream in (1, 2):
        os.dup2(os.open(f"{log}{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    more = filter(None, env.get("PYTHONPATH", "").split(":"))
    sys.argv, sys.path[:1] = command, [str(Path(command[0]).parent), *more]
    runpy.run_path(command[0], run_name="__main__")  # multiprocessing ends the process as python does

def start_script(script, *args, log, ranks=1, **env):
    """Processes of a running script, one per rank; what they print goes to files that begin with `log`."""
    env, places = os.environ | env, [{}]
    if ranks > 1:  # as torchrun sets them
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(ranks)}
        places = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
    command = [str(ROOT / script), *map(str, args)]
    processes = [FORK.Process(target=child, args=(command, env | place, str(log))) for place in places]
    for process in processes:
        process.start()
    return processes

def run_script(script, *args, check=True, launcher=(sys.executable,), **env):
    """Runs a script of the project as a user would, with python or on TWO_RANKS; returns the finished process."""
    with tempfile.TemporaryDirectory() as folder:
        log, until = Path(folder) / "log", time.time() + 600
        processes = start_script(script, *args, log=log, ranks=1 + (launcher == TWO_RANKS), **env)
        while any(p.exitcode is None for p in processes):
            if time.time() > until or any(p.exitcode for p in processes):  # as torchrun: one failed, all end
                for p in processes:
                    p.join(1) or p.terminate()
            processes[0].join(0.02)
        code = next((p.exitcode for p in processes if p.exitcode), 0)
        done = subprocess.CompletedProcess(args, code, *(Path(f"{log}{i}").read_text() for i in (1, 2)))
    assert code == 0 or not check, f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-12000:]}"
    return done

SCENE_FLAGS = ("--canvas_size", 168, 112, "--grid", 3, 2, "--layouts", "grid", "--background", "gradient",
               "--entity_scale", 0.6, 0.95, "--num_workers", 1)  # fmt: skip

@pytest.fixture(scope="session")
def world_dir(tmp_path_factory):
    """train/category/entity/*.png with boxes.jsonl, knowledge.json, kvg-bench.parquet (2 images per category)."""
    out = tmp_path_factory.mktemp("world")
    run_script("tests/toy/toy_world.py", "--out", out, "--per_entity", 2, "--bench_images", 2, 2)
    return out

@pytest.fixture(scope="session")
def synth_dir(world_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("synth")
    run_script("synth_data.py", "--source", world_dir / "train", "--out", out, "--num_samples", 12, *SCENE_FLAGS)
    return out

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

def build_tiny(family, seed=0):
    """(model, tokenizer, image processor): 2 random layers, two query heads per key head, the toy's tokenizer."""
    import make_toy
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    torch.manual_seed(seed)
    model = make_toy.build_model(make_toy.TOKENIZER, hidden=64, layers=2, vision=48, depth=1, key_heads=2)
    if family == "qwen2_vl":
        return model, make_toy.TOKENIZER, make_toy.PROCESSOR
    own, ids = ("model_type", "layer_types", "use_sliding_window"), model.config.to_dict().items()
    text = {k: v for k, v in model.config.text_config.to_dict().items() if k not in own}
    tower = dict(depth=3, hidden_size=48, num_heads=3, intermediate_size=96, out_hidden_size=64, initializer_range=0.05)
    if family == "qwen2_5_vl":  # windows of 2 x 2 merged patches, one layer with full attention
        tower |= dict(patch_size=14, window_size=56, fullatt_block_indexes=[1])
        processor = make_toy.PROCESSOR
    else:  # heads wider than hidden / heads, M-RoPE interleaved, two layers that get deepstack features
        tower |= dict(patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
        text |= dict(head_dim=32, rope_parameters=rope)
        processor = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 401408})
    ids = {k: v for k, v in ids if k.endswith("_token_id")}
    config = AutoConfig.for_model(family, text_config=text, vision_config=tower, tie_word_embeddings=True, **ids)
    return AutoModelForImageTextToText.from_config(config), make_toy.TOKENIZER, processor

@pytest.fixture(scope="session")
def family_dirs(tmp_path_factory):
    dirs = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in dirs.items():
        for part in build_tiny(family):
            part.save_pretrained(folder)
    return dirs

@pytest.fixture(scope="session")
def tiny_dir(family_dirs):
    return family_dirs["qwen2_vl"]

# ---- what the trainers' tests share ----
@pytest.fixture(scope="session", params=FAMILIES)
def parts(request, family_dirs, synth_dir):
    """A family: model as the scripts use it, plain_model as transformers has it, processors, prompts of any length."""
    import torch
    from transformers import AutoModelForImageTextToText

    import train_grpo as g
    folder = str(family_dirs[request.param])
    model, processors = g.load_model(folder, "float32", torch.device("cpu")), g.load_processors(folder, 401408)
    plain_model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():  # a random model's logits are nearly flat; sharper ones make greedy choices clear
        for m in (model, plain_model):
            m.model.language_model.norm.weight.mul_(3)
    samples = g.read_samples([synth_dir / "samples.jsonl"])[0][:5]
    g.load_image(samples[1]["image"]).resize((96, 130)).save(png := io.BytesIO(), "PNG")
    samples[1]["image"] = png.getvalue()  # a smaller one among them
    prompts = [s | g.chat_inputs(processors, s["image"], s["question"] + " please" * i) for i, s in enumerate(samples)]
    banned = [i for token, i in processors[0].get_vocab().items() if re.search("vision|image|video", token)]
    return SimpleNamespace(model=model, plain_model=plain_model, processors=processors, prompts=prompts,
                           tokenizer=processors[0], banned=banned)  # fmt: skip

TRAIN_FLAGS = {  # four steps; the last one, in which two ranks share one row, is in the second epoch
    "train_sft": ("--target", "direct", "--tokens_per_row", 200),
    "train_grpo": ("--num_generations", 3, "--max_completion_length", 12, "--reward_funcs", "letters"),
}

def train(script, out, model, data, *flags, **env):
    same = ("--train_batch_size", 4, "--num_epochs", 1.1, "--learning_rate", 1e-3, "--save_steps", 2)
    flags = ("--model", model, "--data", data, "--output_dir", out, *same, *TRAIN_FLAGS[script], *flags)
    return run_script("tests/trouble.py", script, *flags, PYTHONPATH="tests:.", **env)

@pytest.fixture(scope="session")
def runs(tiny_dir, synth_dir, tmp_path_factory):
    """{trainer: folder of its undisturbed run on one rank}, with checkpoints."""
    out = tmp_path_factory.mktemp("runs")
    sft, grpo = ("--save_steps", 1, "--save_total_limit", 3), ("--beta", 0.04, "--num_iterations", 2)
    for script, flags in (("train_sft", sft), ("train_grpo", grpo)):
        train(script, out / script, tiny_dir, synth_dir / "samples.jsonl", "--keep_checkpoints", *flags)
    return {script: out / script for script in TRAIN_FLAGS}

def metrics_of(out):
    """Rows of metrics.jsonl without the times and the memory, which differ between runs."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not re.search("time|per_second|mem_gib", k)} for row in rows]
