"""run_all.sh: stages are skipped and named, what cannot work is refused early, DRY=1, the real recipe on toy files."""

import json
import os
import re
import socketserver
import subprocess
import sys
import threading
from functools import partial

import pytest
from conftest import ROOT, TWO_RANKS, run_script

STAGES = re.search(r'^STAGES="(.*)"', (ROOT / "run_all.sh").read_text("utf-8"), re.M)[1].split()
CLIENT = r"""#!/bin/bash
exec 3<>/dev/tcp/127.0.0.1/PORT
printf '%s\n' $# "$@" >&3
said=$(cat <&3)
echo "${said%$'\n'*}"
exit "${said##*$'\n'}"
"""
VLLM = f"""#!{sys.executable}
import sys
sys.path[:0] = ["{ROOT}", "{ROOT}/tests"]
from test_gen_cot import serve
serve(8000).serve_forever()
"""

def program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path

@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A `python` for run_all.sh that hands its command to the process with the imports behind it; torchrun too."""
    folder = tmp_path_factory.mktemp("python")
    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            args = [self.rfile.readline().decode().rstrip("\n") for _ in range(int(self.rfile.readline()))]
            if args[0] == "-c":
                args[:2] = [str(program(folder / "code.py", args[1]))]
            torchrun = args[: args.index("--standalone") + 1] if args[0] == "-m" else []
            launcher = TWO_RANKS if "2" in torchrun else (sys.executable,)
            done = run_script(*args[len(torchrun) :], check=False, launcher=launcher, PYTHONPATH=str(ROOT))
            said = done.stdout + done.stderr * bool(done.returncode)
            self.wfile.write(f"{said.rstrip()}\n{done.returncode}".encode())
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return program(folder / "python", CLIENT.replace("PORT", str(server.server_address[1])))

@pytest.fixture
def run_all(python, tmp_path):
    own = os.environ | {"PYTHON": str(python), "RUN": str(tmp_path / "run")}
    run = partial(subprocess.run, capture_output=True, text=True)
    return lambda *args, **env: run(["bash", ROOT / "run_all.sh", *args], env=own | {k: str(env[k]) for k in env})

def test_a_finished_run_only_prints_its_table_and_from_forgets_a_stage_and_all_after_it_once(run_all, tmp_path):
    run, scores = tmp_path / "run", {"n": 4, "acc": 1.0, "acc_ci95": [0.1, 0.9], "mean_iou": 0.5, "parse_rate": 1.0}
    (run / ".done").mkdir(parents=True)
    for name in STAGES:
        (run / ".done" / name).write_text("1\n")
    metrics = {"all": scores, "seen": scores, "unseen": None, "categories": {}, "seen_categories": [],
               "args": {"seed": 0, "model": "m", "bench": "none", "prompt": "r1"}}  # fmt: skip
    (run / "eval_grpo").mkdir()
    (run / "eval_grpo/predictions.jsonl").write_text("")
    (run / "eval_grpo/metrics.json").write_text(json.dumps(metrics))
    done = run_all()
    assert done.returncode == 0 and "==" not in done.stdout, done.stderr
    results = json.loads((run / "results.json").read_text())
    assert {*results["seconds"]} == {*STAGES} and [r["seen"] for r in results["rows"]] == [1.0]
    assert "| grpo " in done.stdout and f"{run}/eval_grpo/report.html" in done.stdout
    done = run_all(FROM="train_grpo", NNODES=2, MASTER_ADDR="host")
    assert done.returncode and "bash run_all.sh forget once" in done.stderr and (run / "eval_grpo").exists()
    assert run_all("forget", FROM="train_grpo").returncode == 0 and not (run / "eval_grpo").exists()
    assert {*os.listdir(run / ".done")} == {*STAGES[: STAGES.index("train_grpo")]}

def test_what_cannot_work_is_refused_at_once_with_one_line_and_a_second_node_waits(world_dir, run_all, tmp_path):
    program(tmp_path / "nvidia-smi", "#!/bin/sh\n")  # lists GPUs
    real = {"MODEL": "tests/configs/qwen2-vl-2b", "DATA": world_dir / "train", "BENCH": world_dir / "kvg-bench.parquet",
            "TEACHER": f"knowledge:{world_dir}/knowledge.json"}  # fmt: skip
    for env, message in [
        ({"FROM": "train"}, "FROM=train: no such stage; want one of: world"),
        ({"PATH": f"{tmp_path}:{os.environ['PATH']}"}, "there are GPUs, but torch sees none; want a newer driver"),
        (real | {"TEACHER": "openai:x", "OPENAI_BASE_URL": "http://localhost:9/v1"}, "no teacher at http://local"),
        (real | {"DATA": tmp_path}, "no boxes.jsonl; want it, or BOX_MODEL")]:  # fmt: skip
        done = run_all(**env)
        assert done.returncode and len(done.stderr.splitlines()) == 1 and "== " not in done.stdout, done
        assert message in done.stderr
    script = program(tmp_path / "run_all.sh", (ROOT / "run_all.sh").read_text("utf-8"))
    env = os.environ | {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "PYTHON": ""}
    with pytest.raises(subprocess.TimeoutExpired):  # for the .venv that the first makes
        subprocess.run(["bash", script, "setup"], env=env, timeout=2)
    assert not (tmp_path / ".venv").exists()

def test_a_dry_run_prints_the_plan_and_every_command_and_starts_none(world_dir, run_all, tmp_path):
    done = run_all(DRY=1, MODEL="tests/toy/base", DATA=world_dir / "train", BENCH=world_dir / "kvg-bench.parquet",
                   TEACHER="serve:org/teacher", BOX_MODEL="org/boxes", SFT_FLAGS="--zero_stage 3", NPROC=8)  # fmt: skip
    assert done.returncode == 0, done.stderr
    commands = dict(line[3:].split(": ", 1) for line in done.stdout.splitlines() if line.startswith("== "))
    assert [name for name in commands if name != "teacher"] == STAGES[1:] and "org/teacher" in commands["teacher"]
    on_all = {name for name, command in commands.items() if "torch.distributed.run --nproc_per_node 8" in command}
    assert on_all == {name for name in commands if re.match("boxes|train|rollouts|eval", name)}
    assert "--zero_stage 3" in commands["train_sft"] and "--beta 0.04" in commands["train_grpo"]
    assert {*os.listdir(tmp_path / "run")} == {".done", "plan_sft.txt", "plan_grpo.txt"}

def test_the_real_recipe_runs_on_the_toys_files_with_two_ranks_and_a_served_teacher(world_dir, run_all, tmp_path):
    health = ["curl", "-s", "--noproxy", "*", "localhost:8000/health"]
    if not subprocess.run(health).returncode:
        pytest.skip("something else is served at port 8000")
    program(tmp_path / "vllm", VLLM)
    toy = "--canvas_size 168 112 --grid 3 2 --layouts grid --background gradient --exclude_distance 0 --num_workers 1"
    short = "--max_completion_length 32"
    env = dict(MODEL="tests/toy/base", DATA=world_dir / "train", BENCH=world_dir / "kvg-bench.parquet", NPROC=2,
               TEACHER="serve:org/teacher", PATH=f"{tmp_path}:{os.environ['PATH']}", SEEN="disc square", N_SFT=16,
               SYNTH_FLAGS=toy, ROLLOUT_FLAGS=short, EVAL_FLAGS=short, FILTER_FLAGS="--min_correct 0 --max_correct 4",
               N_GRPO=4, GRPO_FLAGS=f"{short} --max_steps 1 --train_batch_size 4")  # fmt: skip
    done, run = run_all(**env), tmp_path / "run"
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert (run / "gen_cot/samples.jsonl").read_text().count('"model": "org/teacher"') == 16
    assert subprocess.run(health).returncode, "the teacher is stopped"
    results = json.loads((run / "results.json").read_text())
    assert [r["model"] for r in results["rows"]] == ["base", "sft", "cot_sft", "grpo"]
    assert results["rows"][0]["parse_rate"] == 1 and {*results["seconds"]} == {*STAGES[3:]}
    for name in ("train_sft", "train_cot_sft", "train_grpo"):
        assert json.loads((run / name / "run.json").read_text())["ranks"] == 2
