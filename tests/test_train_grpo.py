"""GRPO: advantages, packed rows against plain rows, the loss against plain loops, and runs of the script."""

import copy
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import plain
import pytest
import torch
from conftest import ROOT, metrics_of, run_script, train
from safetensors.torch import load_file

import train_grpo as g

def arguments(**changes):
    given = g.parse_args(["--model=m", "--data=d", "--output_dir=o", "--num_epochs=1.5", "--epsilon_high=0.28"])
    small = dict(max_completion_length=20, temperature=0.7, num_generations=3, rollout_batch_size=7, num_iterations=2)
    return SimpleNamespace(**vars(given) | small | {"train_batch_size": 2} | changes)

@pytest.fixture(scope="module")
def alone():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

def test_advantages():
    r = [1.0, 0.0, 0.0, 0.0]
    assert g.group_advantages(r, "none") == [0.75, -0.25, -0.25, -0.25]
    assert g.group_advantages(r, "loo") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert g.group_advantages(r, "group") == pytest.approx([x / 0.5001 for x in (0.75, -0.25, -0.25, -0.25)])
    assert all(g.group_advantages([0.3] * 4, scale) == [0.0] * 4 for scale in ("group", "none", "loo"))

# ---- packed rows, log-probs, loss ----
@pytest.fixture(scope="module")
def rolled(parts, alone):
    """Rolled out and scored; then cut, so that completions have different length, with advantages of both signs."""
    seen = []
    def drawn(c, prompt, args):
        seen.append((prompt["id"], c.ids, c.text))
        return len(seen) * 0.7 % 1
    g.REWARD_FUNCS["drawn"] = drawn
    engine = SimpleNamespace(module=SimpleNamespace(model=parts.model, parameters=lambda: ()), optimizer=None)
    groups, args = [p | {"epoch": 0} for p in parts.prompts], arguments(reward_funcs=["drawn"], reward_weights=[2.0])
    g.rollout_and_score(engine, parts.processors, groups, 1, args, {})
    cs = [(group["id"], c) for group in groups for c in group["completions"]]
    assert seen == [(i, c.ids, parts.tokenizer.decode(c.ids).removesuffix("<|im_end|>")) for i, c in cs]
    assert [c.reward for _, c in cs] == [i * 0.7 % 1 * 2 for i in range(1, 16)]
    for i, group in enumerate(groups):
        assert group["num_tokens"] == len(group["prompt_ids"]) + sum(len(c.ids) for c in group["completions"])
        for j, c in enumerate(group["completions"]):
            c.ids, c.logps = c.ids[: 20 - 5 * j - i], c.logps[: 20 - 5 * j - i]
    return groups

@pytest.fixture
def groups(rolled):
    return copy.deepcopy(rolled)

def plain_logps(parts, groups, model=None):
    found = []
    for group in groups:
        ids, model = [c.ids for c in group["completions"]], model or parts.plain_model
        logps, mask = plain.completion_logps(model, parts.tokenizer, group, ids, 0.7, parts.banned)
        found.append(logps[mask.bool()])
    return torch.cat(found)

def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys() and any("visual" in name for name in ours)
    for name, want in theirs.items():
        assert (ours[name] - want).abs().max() <= 1e-4 * want.abs().max() + 1e-7, name

@pytest.mark.parametrize("which", ["one prompt", "all", "chunks", "checkpointing", "frozen"])
def test_a_packed_row_equals_plain_rows(which, parts, groups):
    groups = groups[2:3] if which == "one prompt" else groups
    model, frozen = copy.deepcopy(parts.model), which == "frozen"
    if which == "checkpointing":
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    scorer = g.CompletionLogProbs(model, parts.banned, 0.7, 7 * len(parts.tokenizer) if which == "chunks" else 2**26)
    row = g.pack_groups(groups, "cpu", frozen)
    if frozen:  # the rollout's features: the tower does not run again, and gets no gradient
        row.pixel_values = None
    ours, theirs = scorer(row), plain_logps(parts, groups)
    assert ours.shape == row.targets.shape == theirs.shape and (ours - theirs).abs().max() < 1e-5
    assert (ours - torch.cat([c.logps for group in groups for c in group["completions"]])).abs().max() < 1e-5
    weights = torch.randn(len(ours), generator=torch.Generator().manual_seed(0))
    ours, theirs = gradients(model, (ours * weights).sum()), gradients(parts.plain_model, (theirs * weights).sum())
    if frozen:
        assert not any("visual" in name for name in ours)
        ours |= {name: grad for name, grad in theirs.items() if "visual" in name}
        ours.pop(tied := "model.language_model.embed_tokens.weight"), theirs.pop(tied)  # image features are constants
    assert_close(ours, theirs)

@pytest.mark.parametrize("loss_type, beta", [("grpo", 0.0), ("grpo", 0.5), ("dapo", 0.1), ("dr_grpo", 0.1)])
@pytest.mark.parametrize("parts", ["qwen2_vl"], indirect=True)
def test_the_loss_of_a_step_is_the_plain_one_however_it_is_split_into_rows(loss_type, beta, parts, groups):
    args, generator = arguments(loss_type=loss_type, beta=beta), torch.Generator().manual_seed(1)
    model, other, plain_other = (copy.deepcopy(m) for m in (parts.model, parts.model, parts.plain_model))
    for m in (other, plain_other):  # the reference is another model, in its vision tower too
        with torch.no_grad():
            m.model.language_model.norm.weight.mul_(1.02), m.model.visual.patch_embed.proj.weight.mul_(1.5)
    cs = [c for group in groups for c in group["completions"]]
    for c in cs:  # and the sampler was
        c.logps = c.logps + 0.3 * torch.randn(len(c.ids), generator=generator)
    engine, reference = (g.CompletionLogProbs(m, parts.banned, 0.7) for m in (model, other))
    engine.device, num_tokens, total, logged = torch.device("cpu"), sum(len(c.ids) for c in cs), 0, 0
    for row in (groups[:2], groups[2:3], groups[3:]):
        loss, sums = g.row_loss(engine, reference if beta else None, row, 15, num_tokens, args)
        total, logged = total + loss, logged + sums
    logps, sampled = plain_logps(parts, groups), torch.cat([c.logps for c in cs])
    ref = plain_logps(parts, groups, plain_other).detach()
    rows = list(zip(logps, sampled, ref, strict=True))
    want = plain.grpo_loss([[(c.advantage, [rows.pop(0) for _ in c.ids]) for c in cs]], args)
    assert total.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-6) == pytest.approx(logged[0], abs=1e-6)
    assert_close(gradients(model, total), gradients(parts.plain_model, want))
    ratio, sign = (logps - sampled).exp(), torch.tensor([c.advantage for c in cs for _ in c.ids]).sign()
    clipped = torch.where(sign > 0, ratio > 1.28, (ratio < 0.8) & (sign < 0)).sum().item()
    kl = ((ref - logps).exp() - (ref - logps) - 1).sum().item() if beta else 0.0
    drift = (logps - sampled).abs().sum().item()
    assert logged[1:5].tolist() == pytest.approx([kl, clipped, drift, num_tokens], rel=1e-3)
    assert 0 < clipped < num_tokens / 2 and (kl > 0.01) == (beta > 0)
    once, _ = g.row_loss(engine, None, groups, 15, num_tokens, arguments(num_iterations=1, beta=0))
    assert abs(once.item() - sum(-c.advantage / 15 for c in cs)) < 1e-6, "with one update the ratio is exactly 1"

def test_prompt_and_image_go_through_the_model_once(parts, groups, monkeypatch):
    model, tokens, patches, every = copy.deepcopy(parts.model), [], [], [dict(p) for p in parts.prompts]
    model.model.visual.register_forward_pre_hook(lambda _, x: patches.append(len(x[0])))
    model.get_input_embeddings().register_forward_pre_hook(lambda _, x: tokens.append(x[0].numel()))
    g.rollout(model, parts.tokenizer, every, [["a", "b"]] * 5, 1, 1.0)
    for frozen in (False, True):
        g.CompletionLogProbs(model)(g.pack_groups(groups, "cpu", frozen))
    assert patches == [sum(len(p["pixel_values"]) for p in every)] * 2, "in the rollout, and unless frozen in the row"
    row = sum(len(x["prompt_ids"]) + sum(len(c.ids) for c in x["completions"]) for x in groups)
    assert tokens == [sum(len(p["prompt_ids"]) for p in every), 10, row, row]

# ---- rows, order, rate ----
def test_rows_are_filled_up_to_the_budget(alone):
    items = [{"num_tokens": n} for n in (30, 70, 50, 20, 90, 40)]
    for budget, count in ((1, 6), (90, 4), (110, 3), (300, 1)):
        rows = g.fill_rows(items, budget, "cpu")
        assert sorted(x["num_tokens"] for row in rows for x in row) == [20, 30, 40, 50, 70, 90] and len(rows) == count
        assert all(sum(x["num_tokens"] for x in row) <= budget or len(row) == 1 for row in rows)
    assert g.fill_rows([], 9, "cpu") == [[]]

def test_every_epoch_is_another_order_of_all_samples(alone):
    steps = g.draw_steps([{"id": i} for i in range(10)], dict, 1, 6, arguments(train_batch_size=4))
    drawn = [x for _, read, _ in steps for x in read]
    assert [x["epoch"] for x in drawn] == [0] * 10 + [1] * 10 + [2] * 4, "else a row twice in a step is sampled alike"
    order = [x["id"] for x in drawn]
    assert sorted(order[:10]) == sorted(order[10:20]) == [*range(10)] != order[:10] != order[10:20]

def test_learning_rates():
    engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{}]))
    def rates(scheduler, warmup):
        args = arguments(learning_rate=2.0, lr_scheduler=scheduler, warmup_ratio=warmup)
        for update in range(8):
            g.set_learning_rate(engine, update, 8, args)
            yield engine.optimizer.param_groups[0]["lr"]
    assert [*rates("constant", 0)] == [2.0] * 8 and [*rates("linear", 0)] == [2 - i / 4 for i in range(8)]
    assert [*rates("cosine", 0.2)] == pytest.approx([1, 2, *(1 + math.cos(math.pi * i / 6) for i in range(6))])

def test_the_engine_is_told_what_the_flags_say(tiny_dir, alone, monkeypatch, tmp_path):
    monkeypatch.setattr(g.deepspeed, "initialize", lambda **given: [given])
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    for dtype, stage, flags in (("bfloat16", 3, dict(zero_stage=3, max_grad_norm=0.5, weight_decay=0.1)),
                                ("float32", 1, dict(deepspeed=tmp_path / "ds.json", freeze_vision=True))):  # fmt: skip
        args = arguments(**flags)
        given = g.start_engine(g.CompletionLogProbs(g.load_model(tiny_dir, dtype, torch.device("cpu"))), args)
        (group,), config = given["optimizer"].param_groups, given["config"]
        told = [config["zero_optimization"]["stage"], config["gradient_clipping"], config["bf16"]["enabled"]]
        assert told == [stage, args.max_grad_norm, dtype == "bfloat16"] and group["weight_decay"] == args.weight_decay

def test_all_formats_are_read_as_the_same_sample(synth_dir):
    row = json.loads((synth_dir / "samples.jsonl").read_text().splitlines()[0])
    target, said = row["entities"][row["target"]], f"<think>so</think> <answer> {row['answer']} </answer>"
    turns = [{"content": f"<image>{row['question']}{g.R1_SUFFIX}"}, {"content": said}]
    own = {"phrase": target["entity"], "bbox_px": target["bbox_px"]}
    rows = [row, own, {"problem": row["question"], "solution": said}, {"messages": turns}]
    ours, *read = [g.parse_row({"images": row["images"]} | r, synth_dir, 7) for r in rows]
    assert [(s["id"], s["suffix"]) for s in read] == [("7", ""), ("7", ""), ("7", g.R1_SUFFIX)]
    assert read[2]["completion"] == said
    for s in read:
        assert all(s[key] == ours[key] for key in ("question", "answer", "entity", "image"))
        assert s["bbox_1000"] == pytest.approx(ours["bbox_1000"], abs=0.51)

# ---- runs ----
def test_a_run_writes_what_is_said_and_its_export_loads_in_plain_transformers(runs):
    out, metrics = runs["train_grpo"], metrics_of(runs["train_grpo"])
    assert all(m["grad_norm"] > 0 for m in metrics)
    assert [m["learning_rate"] for m in metrics] == pytest.approx([1e-3 * (1 - i / 8) for i in (1, 3, 5, 7)])
    assert all(m["sampling/logp_diff"] < 1e-5 and m["clip_ratio/region_mean"] >= 0 and m["kl"] > 0 for m in metrics)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [1, 1, 2, 2, 3, 3, 4] and len(samples[0]["completions"]) == 3
    for s in samples:
        rewards = [c["reward"] for c in s["completions"]]
        assert rewards == [c["letters"] for c in s["completions"]]
        assert [c["advantage"] for c in s["completions"]] == g.group_advantages(rewards, "group")
    model, info = g.AutoModelForImageTextToText.from_pretrained(out / "final", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.prompt_suffix == g.R1_SUFFIX
    saved = load_file(out / "final/model.safetensors")
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items() if k in saved)

def test_reward_rises(tiny_dir, synth_dir, tmp_path):
    flags = ("--max_steps", 25, "--num_generations", 8, "--learning_rate", 3e-3, "--lr_scheduler", "constant")
    train("train_grpo", tmp_path / "run", tiny_dir, synth_dir / "samples.jsonl", *flags, "--save_steps", 0)
    rewards = [m["reward"] for m in metrics_of(tmp_path / "run")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2, rewards

def test_a_script_copied_alone_trains_on_own_rows_and_says_what_changed(tiny_dir, synth_dir, tmp_path):
    assert json.loads(g.DS_CONFIG) == json.loads((ROOT / "ds_config.json").read_text())
    script, out = shutil.copy(ROOT / "train_grpo.py", tmp_path), tmp_path / "run"
    samples = [{"image": "no.png"}, *map(json.loads, (synth_dir / "samples.jsonl").open())]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))
    flags = ("--model", tiny_dir, "--data", tmp_path / "own.jsonl", "--image_root", synth_dir, "--output_dir", out)
    flags += ("--train_batch_size", 2, "--num_generations", 2, "--max_completion_length", 4, "--save_steps", 1)
    done = run_script(script, *flags, check=False)
    assert done.returncode == 1 and "own.jsonl:1 (None): " in done.stdout
    assert done.stderr.splitlines()[-1].startswith("train_grpo: 1 bad rows, 12 of use")
    flags += ("--max_bad_rows", 1, "--keep_checkpoints")
    run_script(script, *flags, "--max_steps", 2)
    assert [m["step"] for m in metrics_of(out)] == [1, 2] and (out / "checkpoint-1").exists()
    (out / "final").rename(tmp_path / "final")
    Path(script).write_text(Path(script).read_text() + "# changed\n")
    done = run_script(script, *flags, "--max_steps", 3, "--gradient_checkpointing")
    (said,) = (line for line in done.stdout.splitlines() if "goes on with other settings" in line)
    for name in ("'script': ", "'max_steps': '2 -> 3'", "'gradient_checkpointing': 'False -> True'"):
        assert name in said and "seed" not in said
    assert f"goes on from {out}/checkpoint-1" in done.stdout and (out / "final/model.safetensors").exists()
    assert [m["step"] for m in metrics_of(out)] == [1, 2, 3]
