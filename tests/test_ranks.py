"""Several ranks: the same loss, rewards, gradients and samples as one; what is uneven between ranks does not hang."""

import json
import sys
import time

import pytest
import torch
from conftest import TWO_RANKS, run_script
from safetensors.torch import load_file

FLAGS = {
    "train_sft": ("--target", "direct", "--tokens_per_row", 200, "--train_batch_size", 4, "--learning_rate", 1e-3),
    "train_grpo": ("--train_batch_size", 4, "--num_generations", 3, "--max_completion_length", 12, "--reward_funcs",
                   "letters", "--learning_rate", 1e-3, "--log_completions", 4, "--beta", 0.04,
                   "--num_iterations", 2),
}  # fmt: skip


def train(script, out, model, data, *flags, ranks=2, check=True, dump=True, **env):
    arguments = ("--model", model, "--data", data, "--output_dir", out, "--save_steps", 0, *FLAGS[script], *flags)
    first = (script, out.with_suffix(".pt")) if dump else ()
    program = "tests/dump_gradients.py" if dump else "tests/grpo_letters.py"
    launcher = TWO_RANKS if ranks > 1 else (sys.executable,)
    return run_script(program, *first, *arguments, check=check, launcher=launcher, PYTHONPATH="tests:.", **env)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(family_dirs, synth_dir, tmp_path_factory):
    """{script: run folder} of two steps on one rank."""
    out = tmp_path_factory.mktemp("one")
    for script in FLAGS:
        data = synth_dir / "samples.jsonl"
        train(script, out / script, family_dirs["qwen2_vl"], data, "--max_steps", 2, ranks=1)
    return {script: out / script for script in FLAGS}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("script", list(FLAGS))
def test_two_ranks_compute_what_one_computes(script, stage, one_rank, tiny_dir, synth_dir, tmp_path):
    out, data = tmp_path / "two", synth_dir / "samples.jsonl"
    done = train(script, out, tiny_dir, data, "--max_steps", 2, "--zero_stage", stage)
    assert f"DeepSpeed ZeRO-{stage} | qwen2_vl, torch.float32 | attention: sdpa (decoder), sdpa" in done.stdout
    assert "2 ranks on cpu" in done.stdout
    ours, theirs = (read(d / "metrics.jsonl") for d in (out, one_rank[script]))
    for a, b in zip(ours, theirs, strict=True):
        keys = [k for k in b if k in ("loss", "reward", "reward_std", "kl", "num_tokens") or k.startswith("rewards/")]
        assert len(keys) > 1 and all(abs(a[k] - b[k]) < 1e-5 for k in keys), (a, b)
    ours, theirs = (torch.load(d.with_suffix(".pt"), weights_only=True) for d in (out, one_rank[script]))
    assert ours.keys() == theirs.keys() and max(g.abs().max() for g in theirs.values()) > 1e-3
    assert max((ours[n] - theirs[n]).abs().max().item() for n in theirs) < 1e-5
    if script == "train_grpo":  # rank 0 logs what it rolled out: half of the groups, word for word
        ours, theirs = ({(s["step"], s["id"]): s for s in read(d / "samples.jsonl")} for d in (out, one_rank[script]))
        assert len(ours) == 4 and len(theirs) == 8
        for key, group in ours.items():
            texts = [[c["text"] for c in x["completions"]] for x in (group, theirs[key])]
            assert texts[0] == texts[1]
            rewards = [torch.tensor([c["reward"] for c in x["completions"]]) for x in (group, theirs[key])]
            assert (rewards[0] - rewards[1]).abs().max() < 1e-5
    ours, theirs = (load_file(d / "final/model.safetensors") for d in (out, one_rank[script]))
    assert max((ours[k] - theirs[k]).abs().max().item() for k in theirs) < 1e-4
    beats = sorted(p.name for p in out.glob("heartbeat-*.log"))
    assert beats == ["heartbeat-00000.log", "heartbeat-00001.log"]
    phases = [line.split()[-1] for line in (out / beats[1]).read_text().splitlines()]
    update = ["train", "optimizer"]
    assert phases == 2 * (["data", "rollout", *update, *update] if script == "train_grpo" else ["data", *update])


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case, flags", [
    ("one row a group, and groups of different length", ("--reward_funcs", "letters", "--tokens_per_row", 1)),
    ("a rank with zero-variance groups only", ("--reward_funcs", "one_rank", "--beta", 0, "--tokens_per_row", 1)),
    ("no group with a signal on any rank", ("--reward_funcs", "none", "--beta", 0)),
])  # fmt: skip
def test_uneven_ranks_do_not_hang(case, flags, stage, tiny_dir, synth_dir, tmp_path):
    out = tmp_path / "run"
    train("train_grpo", out, tiny_dir, synth_dir / "samples.jsonl", "--max_steps", 2, "--zero_stage", stage, *flags,
          "--timeout_minutes", 1, dump=False)  # fmt: skip
    metrics = read(out / "metrics.jsonl")
    assert len(metrics) == 2 and all((m["grad_norm"] > 0) == ("none" not in flags) for m in metrics)
    if "one_rank" in flags:
        assert all(0.5 <= m["frac_reward_zero_std"] < 1 for m in metrics)


@pytest.mark.parametrize("script", list(FLAGS))
def test_the_last_step_takes_what_is_left(script, tiny_dir, synth_dir, tmp_path):
    """Nine samples in steps of four: the last step has one, and with two ranks one of them has nothing."""
    data = synth_dir / "samples.jsonl"
    runs = {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    for ranks, out in runs.items():
        stage = ("--zero_stage", 3) if ranks == 2 else ()
        train(script, out, tiny_dir, data, "--num_epochs", 0.75, *stage, "--timeout_minutes", 1, ranks=ranks)
    one, two = (read(out / "metrics.jsonl") for out in runs.values())
    assert len(one) == len(two) == 3
    assert all(
        abs(a["loss"] - b["loss"]) < 1e-5 and a["num_tokens"] == b["num_tokens"] for a, b in zip(one, two, strict=True)
    )
    if script == "train_sft":
        assert [m["epoch"] for m in one] == pytest.approx([4 / 12, 8 / 12, 9 / 12])
    tokens = [b["num_tokens"] - a["num_tokens"] for a, b in zip(one[:-1], one[1:], strict=True)]
    assert tokens[1] < tokens[0] / 2


def test_a_rank_that_stays_away_ends_the_run_after_the_timeout(tiny_dir, synth_dir, tmp_path):
    """And the heartbeats say where: both are in the rollout, where rewards are given."""
    began = time.time()
    flags = ("--max_steps", 1, "--reward_funcs", "absent", "--timeout_minutes", 0.05)
    done = train("train_grpo", tmp_path / "run", tiny_dir, synth_dir / "samples.jsonl", *flags, check=False, dump=False)
    assert done.returncode != 0 and "Timed out" in done.stderr and time.time() - began < 60
    beat = (tmp_path / "run/heartbeat-00001.log").read_text().splitlines()[-1]
    assert beat.endswith("rank 1 step 1 rollout")


def test_zero3_gathers_once_per_rollout(tiny_dir, synth_dir, monkeypatch):
    """Not once per token, nor once per batch of prompts."""
    import deepspeed

    import train_grpo as g

    model = g.load_model(str(tiny_dir), "float32", torch.device("cpu"))
    tokenizer, image_processor = g.load_processors(str(tiny_dir), 401408)
    samples = g.read_samples(synth_dir / "samples.jsonl")[:3]
    style = g.BOX_STYLES["qwen2_vl"]
    prompts = [g.chat_inputs(tokenizer, image_processor, s["image"], s["question"], style) for s in samples]
    for p in model.parameters():
        p.ds_id = 0  # what DeepSpeed marks a sharded weight with
    gathered = []

    class Gathered:
        def __init__(self, params):
            gathered.append(len(list(params)))

        __enter__ = __exit__ = lambda self, *_: None

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", Gathered)
    rolled = g.rollout(model, tokenizer, prompts, [["0", "1"]] * 3, 24, 1.0, 2)
    assert len(rolled) == 3 and gathered == [len(list(model.parameters()))]


def test_bf16_keeps_fp32_masters(tiny_dir, synth_dir, tmp_path):
    """Updates of a hundredth of a bf16 step add up: after 40 of them the weights have moved as fp32's do."""
    finals = {}
    for dtype in ("bfloat16", "float32"):
        out = tmp_path / dtype
        train("train_sft", out, tiny_dir, synth_dir / "samples.jsonl", "--max_steps", 40, "--learning_rate", 2e-5,
              "--lr_scheduler", "constant", "--warmup_ratio", 0, "--dtype", dtype, ranks=1)  # fmt: skip
        finals[dtype] = read(out / "metrics.jsonl")
    falls = {d: m[0]["loss"] - m[-1]["loss"] for d, m in finals.items()}
    assert falls["float32"] > 0.01 and falls["bfloat16"] == pytest.approx(falls["float32"], rel=0.3)


@pytest.mark.parametrize("script", list(FLAGS))
def test_dry_run_prints_the_peak_and_stops(script, tiny_dir, synth_dir, tmp_path):
    out, flags = tmp_path / "run", ("--zero_stage", 3, "--dry_run_memory")
    done = train(script, out, tiny_dir, synth_dir / "samples.jsonl", *flags, ranks=1 + (script == "train_grpo"))
    assert "GiB; this machine, all ranks together has" in done.stdout and "peak of the fullest rank" in done.stdout
    assert not out.exists(), "nothing is left behind that would refuse other flags"
