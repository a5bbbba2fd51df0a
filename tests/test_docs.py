"""What README and run_all.sh say must be true: flags exist, metrics are explained, scripts stand alone."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_shared_blocks import SCRIPTS


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """--help of every script, each copied alone into an empty folder."""
    texts = {}
    for script in SCRIPTS:
        folder = tmp_path_factory.mktemp("alone")
        shutil.copy(ROOT / script, folder)
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=folder, capture_output=True, text=True, check=True
        )
        code = f"import {script[:-3]}; import torch; assert not torch.distributed.is_initialized()"
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, env={"PATH": "/usr/bin:/bin"})
        assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == [script], (
            "an import or --help wrote something"
        )
        texts[script] = done.stdout
    return texts


def flags_of(text):
    return set(re.findall(r"--[a-z][a-z_0-9]+", text))


def test_every_script_alone_imports_without_side_effects_and_prints_its_help(helps):
    assert all(len(text) > 500 for text in helps.values())


def test_flags_in_docs_exist(helps):
    by_hand = [
        ROOT / "tests" / "toy" / "make_toy.py",
        ROOT / "tests" / "toy" / "study.py",
        ROOT / "tests" / "faults.py",
        ROOT / "tests" / "fuzz.py",
        *(ROOT / "tests").glob("bench_*.py"),
    ]
    known = set().union(*(flags_of(f.read_text()) for f in by_hand), *(flags_of(t) for t in helps.values()))
    outside = {
        "--fix",
        "--nproc_per_node",
        "--nnodes",
        "--node_rank",
        "--master_addr",
        "--master_port",
        "--help",
        "--version",
        "--dist",
        "--standalone",
    }
    for name in ("README.md", "run_all.sh"):
        text = re.sub(r"pip install.*|#SBATCH.*|srun.*", "", (ROOT / name).read_text())
        missing = flags_of(text) - known - outside - {"--no"}
        assert not missing, f"{name} names {missing}, which no script has"


def test_flags_in_each_docstring_exist_in_that_script(helps):
    for script, text in helps.items():
        doc = (ROOT / script).read_text().split('"""')[1]
        missing = flags_of(doc) - flags_of(text) - {"--nproc_per_node"}
        assert not missing, f"{script}: its docstring names {missing}"


def test_every_metric_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for script in ("train_sft.py", "train_grpo.py"):
        text = (ROOT / script).read_text()
        body = text[text.index("def main()") :] + text[text.find("def step_metrics") :][:3000]
        for key in re.findall(
            r'"((?:completions|sampling|clip_ratio|knowledge)/[a-z_]+|[a-z_]*(?:loss|reward_std|num_tokens|parse_rate|grad_norm|_time))":',
            body,
        ):
            assert f"`{key}`" in readme, f"{script} logs {key}, README does not explain it"


def test_engine_settings_hold_no_number_that_is_a_flag():
    config = json.loads((ROOT / "ds_config.json").read_text())
    assert not {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "optimizer",
        "scheduler",
    } & set(config)
    assert "auto" not in json.dumps(config)
