"""Fixtures: the toy world, samples of it, and a tiny random Qwen2-VL on disk; made in seconds, without downloads."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder fails at once, not after retries
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toy")]

import pytest  # noqa: E402

TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch", "transformers.models.auto.modeling_auto", "deepspeed", "PIL.Image"])


def child(command, env, out, err):
    """Runs a script as `python script ...` would, in a process that has the slow imports behind it."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
    sys.path[1:1] = env.get("PYTHONPATH", "").split(":") if env.get("PYTHONPATH") else []
    runpy.run_path(command[0], run_name="__main__")  # multiprocessing ends the process as python does


def run_script(script, *args, check=True, launcher=(sys.executable,), **env):
    """Runs a script of the project as a user would; returns the finished process."""
    command, env = [str(ROOT / script), *map(str, args)], os.environ | env
    if launcher == (sys.executable,):  # what a user starts with python: forked, which saves seconds of imports
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder) / name for name in ("out", "err"))
            process = FORK.Process(target=child, args=(command, dict(env), str(out), str(err)))
            process.start()
            process.join(600)
            assert process.exitcode is not None, f"{script} takes more than ten minutes"
            done = subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())
    else:
        command = [*launcher, *command]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
    if check:
        assert done.returncode == 0, f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-12000:]}"
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
    """samples.jsonl with 12 composites."""
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
    text = model.config.text_config.to_dict()
    text = {k: v for k, v in text.items() if k not in ("model_type", "layer_types", "use_sliding_window")}
    tower = dict(depth=3, hidden_size=48, num_heads=3, intermediate_size=96, out_hidden_size=64, initializer_range=0.05)
    if family == "qwen2_5_vl":  # windows of 2 x 2 merged patches, one layer with full attention
        tower |= dict(patch_size=14, window_size=56, fullatt_block_indexes=[1])
        processor = make_toy.PROCESSOR
    else:  # heads wider than hidden / heads, M-RoPE interleaved, two layers that get deepstack features
        tower |= dict(patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
        text |= dict(head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                   "mrope_section": [6, 5, 5], "mrope_interleaved": True})  # fmt: skip
        processor = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 401408})
    ids = {k: v for k, v in model.config.to_dict().items() if k.endswith("_token_id")}
    config = AutoConfig.for_model(family, text_config=text, vision_config=tower, tie_word_embeddings=True, **ids)
    return AutoModelForImageTextToText.from_config(config), make_toy.TOKENIZER, processor


@pytest.fixture(scope="session")
def family_dirs(tmp_path_factory):
    """{family: folder of a tiny random model}."""
    dirs = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in dirs.items():
        for part in build_tiny(family):
            part.save_pretrained(folder)
    return dirs


@pytest.fixture(scope="session")
def tiny_dir(family_dirs):
    """A tiny random Qwen2-VL on disk."""
    return family_dirs["qwen2_vl"]
