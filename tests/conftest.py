"""Fixtures: the toy world, samples of it, and a tiny random Qwen2-VL on disk; made in seconds, without downloads."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toy")]

import pytest  # noqa: E402


def run_script(script, *args, check=True, launcher=(sys.executable,), **env):
    """Runs a script of the project as a user would; returns the finished process."""
    command = [*launcher, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | env, timeout=600)
    if check:
        assert done.returncode == 0, f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
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


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A random 2-layer Qwen2-VL on disk: two query heads per key head as in the real one; toy tokenizer and images."""
    import make_toy
    import torch

    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("tiny")
    model = make_toy.build_model(make_toy.TOKENIZER, hidden=64, layers=2, vision=48, depth=1, key_heads=2)
    for part in (model, make_toy.TOKENIZER, make_toy.PROCESSOR):
        part.save_pretrained(out)
    return out
