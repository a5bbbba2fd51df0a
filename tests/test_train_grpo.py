"""GRPO: rewards, advantages, the loss against plain loops, packed rows against plain rows, and runs of the script."""

import copy
import json
import math
import shutil
from types import SimpleNamespace

import plain
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, metrics_of, run_script, train
from safetensors.torch import load_file

import train_grpo as g

BOX = "<|box_start|>(10,20),(300,400)<|box_end|>"
GOOD = f"<think>it is red</think> <answer><|object_ref_start|>X<|object_ref_end|>{BOX}</answer>"
PROMPT = {"bbox_1000": [10, 20, 300, 400], "grid": (1000, 1000), "style": g.BOX_STYLES["qwen2_vl"]}

def arguments(**changes):
    base = dict(epsilon=0.2, epsilon_high=0.28, beta=0.0, loss_type="grpo", max_completion_length=20, iou_threshold=0.8,
                temperature=0.7, reward_funcs=["iou", "format"], reward_weights=[1.0, 1.0], scale_rewards="group",
                num_generations=3, seed=0, rollout_batch_size=7, num_iterations=2,
                freeze_vision=False, max_bad_rows=0, train_batch_size=2, max_steps=None, num_epochs=1.5)  # fmt: skip
    return SimpleNamespace(**(base | changes))

def completion(text, prompt=PROMPT):
    box = g.parse_bbox(text, grid=prompt["grid"])
    return g.Completion([], None, True, text, box, g.box_iou(box, prompt["bbox_1000"]) if box else 0.0)

@pytest.fixture(scope="module")
def alone():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

# ---- rewards and advantages ----
@pytest.mark.parametrize("text, want", [
    (GOOD, 1.0), (GOOD.replace(BOX, "[10, 20, 300, 400]"), 0.5), ("so: " + GOOD + " bye", 0.5), ("none", 0.0),
    (GOOD.replace("<think>", "").replace("</think>", ""), 0.5), (GOOD.replace("it is red", " "), 0.5),
    (GOOD.replace("<think>", "<think><think>"), 0.5), (GOOD + GOOD, 0.0), (GOOD.replace("(10", "(400"), 0.5),
])  # fmt: skip
def test_both_halves_of_the_format_reward_are_paid(text, want):
    """The released trainer never pays the box half: its matcher returns i + 2 and the reward asks for 1."""
    assert g.format_reward(completion(text), PROMPT, None) == want

def test_rewards_by_name():
    near, miss = completion(GOOD.replace("300,400", "290,380")), completion("no box")
    iou = 280 * 360 / (290 * 380)
    for threshold, want in ((0.8, [iou, iou, 1.0]), (0.95, [0.0, iou, 0.0]), (near.iou, [0.0, iou, 0.0])):
        args, names = arguments(iou_threshold=threshold), ("iou", "dense_iou", "binary")
        assert [g.REWARD_FUNCS[n](near, PROMPT, args) for n in names] == pytest.approx(want)
        assert [g.REWARD_FUNCS[n](miss, PROMPT, args) for n in names] == [0.0] * 3

def test_advantages():
    r = [1.0, 0.0, 0.0, 0.0]
    assert g.group_advantages(r, "none") == [0.75, -0.25, -0.25, -0.25]
    assert g.group_advantages(r, "loo") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert g.group_advantages(r, "group") == pytest.approx([x / 0.5001 for x in (0.75, -0.25, -0.25, -0.25)])
    assert all(g.group_advantages([0.3] * 4, scale) == [0.0] * 4 for scale in ("group", "none", "loo"))

# ---- packed rows, log-probs, loss ----
@pytest.fixture(scope="module")
def rolled(parts, alone):
    """Rolled out and scored: prompts and completions of different length, advantages of both signs."""
    seen = []

    def drawn(c, prompt, args):
        seen.append((c.ids, c.text, prompt["id"]))
        return len(seen) * 0.7 % 1

    g.REWARD_FUNCS["drawn"] = drawn
    engine = SimpleNamespace(module=SimpleNamespace(model=parts.model, parameters=lambda: ()), optimizer=None)
    groups, args = [dict(p) for p in parts.prompts], arguments(reward_funcs=["drawn"], reward_weights=[2.0])
    g.rollout_and_score(engine, parts.processors, groups, 1, args, {})
    cs = [c for group in groups for c in group["completions"]]
    assert [(c.ids, c.text) for c in cs] == [x[:2] for x in seen] and len(cs) == 15, "rewards see ids and text"
    assert all(c.text == parts.tokenizer.decode(c.ids).removesuffix("<|im_end|>") for c in cs)
    assert [x[2] for x in seen] == [group["id"] for group in groups for _ in range(3)]
    assert [c.reward for c in cs] == [(i + 1) * 0.7 % 1 * 2 for i in range(15)]
    for i, group in enumerate(groups):
        assert group["num_tokens"] == len(group["prompt_ids"]) + sum(len(c.ids) for c in group["completions"])
        for j, c in enumerate(group["completions"]):
            c.ids, c.logps = c.ids[: 20 - 5 * j - i], c.logps[: 20 - 5 * j - i]
    return groups

@pytest.fixture
def groups(rolled):
    return copy.deepcopy(rolled)

def plain_logps(parts, groups, model=None):
    found, model = [], model or parts.plain_model
    for group in groups:
        ids = [c.ids for c in group["completions"]]
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

@pytest.mark.parametrize("which", ["one completion", "one prompt", "all", "chunks", "checkpointing", "frozen"])
def test_a_packed_row_equals_plain_rows(which, parts, groups):
    """Log-probs and all gradients, the vision tower's too; with the sampler's temperature and banned tokens."""
    if which == "one completion":
        groups = [groups[1] | {"completions": groups[1]["completions"][:1]}]
    groups = groups[2:3] if which == "one prompt" else groups
    model, frozen = copy.deepcopy(parts.model), which == "frozen"
    if which == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
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
    """Three rows, as of several ranks, against loops over all tokens: value and gradients, with clipping and KL."""
    args, generator = arguments(loss_type=loss_type, beta=beta), torch.Generator().manual_seed(1)
    model, other = copy.deepcopy(parts.model), copy.deepcopy(parts.model)
    plain_other = copy.deepcopy(parts.plain_model)
    for m in (other, plain_other):  # the reference is another model, and the sampler was
        with torch.no_grad():
            m.model.language_model.norm.weight.mul_(1.02)
    cs = [c for group in groups for c in group["completions"]]
    for c in cs:
        c.logps = c.logps + 0.3 * torch.randn(len(c.ids), generator=generator)
    engine = g.CompletionLogProbs(model, parts.banned, 0.7)
    engine.device = torch.device("cpu")
    reference = g.CompletionLogProbs(other, parts.banned, 0.7) if beta else None
    num_tokens, total, logged = sum(len(c.ids) for c in cs), 0, 0
    for row in (groups[:2], groups[2:3], groups[3:]):
        loss, sums = g.row_loss(engine, reference, row, 15, num_tokens, args)
        total, logged = total + loss, logged + sums
    logps, sampled = plain_logps(parts, groups), torch.cat([c.logps for c in cs])
    ref = plain_logps(parts, groups, plain_other).detach()
    rows = list(zip(logps, sampled, ref, strict=True))
    sequences = [(c.advantage, [rows.pop(0) for _ in c.ids]) for c in cs]
    want = plain.grpo_loss([sequences], args)
    assert total.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-6) == pytest.approx(logged[0], abs=1e-6)
    assert_close(gradients(model, total), gradients(parts.plain_model, want))
    ratio = (logps - sampled).exp()
    advantages = torch.cat([torch.full((len(c.ids),), c.advantage) for c in cs])
    clipped = ((ratio > 1.28) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    kl = ((ref - logps).exp() - (ref - logps) - 1).sum().item() if beta else 0.0
    drift = (logps - sampled).abs().sum().item()
    assert logged[1:5].tolist() == pytest.approx([kl, clipped.sum().item(), drift, num_tokens], rel=1e-3)
    assert 0 < clipped.sum() < num_tokens / 2 and (kl > 0.01) == (beta > 0)
    once, _ = g.row_loss(engine, None, groups, 15, num_tokens, arguments(num_iterations=1, beta=0))
    assert abs(once.item() - sum(-c.advantage / 15 for c in cs)) < 1e-6, "with one update the ratio is exactly 1"

def test_a_good_token_becomes_likelier_unless_it_is_clipped():
    logps, old = torch.tensor([0.0, 0.0, 0.3, -0.3, 0.3], requires_grad=True), torch.zeros(5)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    g.grpo_loss(logps, old, None, advantages, torch.ones(5), arguments())[0].backward()
    assert logps.grad.sign().tolist() == [-1, 1, 0, 0, 1]

def test_prompt_and_image_go_through_the_model_once(parts, groups):
    """Patches seen by the vision tower and tokens seen by the decoder: not one pass per completion."""
    model, tokens, patches = parts.model, [], []
    def see(_, args, given):
        tokens.append(given["inputs_embeds"].shape[:2].numel())
    hooks = [model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)]
    hooks.append(model.model.visual.register_forward_pre_hook(lambda _, x: patches.append(len(x[0]))))
    every = [dict(p) for p in parts.prompts]
    g.rollout(model, parts.tokenizer, every, [["a", "b"]] * 5, 1, 1.0)
    pixels = sum(len(p["pixel_values"]) for p in every)
    assert patches == [pixels] and tokens == [sum(len(p["prompt_ids"]) for p in every), 10]
    for frozen in (False, True):
        g.CompletionLogProbs(model)(g.pack_groups(groups, "cpu", frozen))
    assert patches == [pixels] * 2
    assert tokens[2:] == [sum(len(x["prompt_ids"]) + sum(len(c.ids) for c in x["completions"]) for x in groups)] * 2
    for hook in hooks:
        hook.remove()

# ---- rows, order, rate, warnings ----
def test_rows_are_filled_up_to_the_budget(alone):
    items = [{"num_tokens": n} for n in (30, 70, 50, 20, 90, 40)]
    for budget, count in ((1, 6), (90, 4), (110, 3), (300, 1)):
        rows = g.fill_rows(items, budget, "cpu")
        assert sorted(x["num_tokens"] for row in rows for x in row) == [20, 30, 40, 50, 70, 90] and len(rows) == count
        assert all(sum(x["num_tokens"] for x in row) <= budget or len(row) == 1 for row in rows)
    assert g.fill_rows([], 9, "cpu") == [[]]

def test_every_epoch_is_another_order_of_all_samples_on_any_number_of_ranks(monkeypatch):
    def drawn(first=1, last=6, seed=0, ranks=1):
        steps = {}
        monkeypatch.setattr(g.dist, "get_world_size", lambda: ranks)
        for rank in range(ranks):
            monkeypatch.setattr(g.dist, "get_rank", lambda rank=rank: rank)
            args = SimpleNamespace(seed=seed, train_batch_size=4)
            for step, read, _ in g.draw_steps([*range(10)], str, first, last, args):
                steps.setdefault(step, [None] * 4)[rank::ranks] = read
        return steps

    steps = drawn()
    assert [*steps] == [1, 2, 3, 4, 5, 6] and drawn(ranks=2) == steps != drawn(seed=1)
    order = [int(x) for read in steps.values() for x in read]
    assert sorted(order[:10]) == sorted(order[10:20]) == [*range(10)] != order[:10] != order[10:20]
    assert drawn(first=4) == {i: steps[i] for i in (4, 5, 6)} and drawn(last=3) == {i: steps[i] for i in (1, 2, 3)}

def test_learning_rates():
    engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{}]))

    def rates(scheduler, warmup):
        for update in range(8):
            args = SimpleNamespace(learning_rate=2.0, lr_scheduler=scheduler, warmup_ratio=warmup)
            g.set_learning_rate(engine, update, 8, args)
            yield engine.optimizer.param_groups[0]["lr"]

    assert [*rates("constant", 0)] == [2.0] * 8 and [*rates("linear", 0)] == [2 - i / 4 for i in range(8)]
    assert [*rates("cosine", 0.2)] == pytest.approx([1, 2, *(1 + math.cos(math.pi * i / 6) for i in range(6))])

@pytest.mark.parametrize("parts", ["qwen2_vl"], indirect=True)
def test_the_engine_is_told_what_the_flags_say(parts, alone, monkeypatch, tmp_path):
    monkeypatch.setattr(g.deepspeed, "initialize", lambda **given: [given])
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')

    def told(*flags, dtype=torch.float32):
        args = g.parse_args(["--model", "m", "--data", "d", "--output_dir", "o", "--weight_decay", "0.1", *flags])
        given = g.start_engine(g.CompletionLogProbs(copy.deepcopy(parts.model).to(dtype)), args)
        (group,), config = given["optimizer"].param_groups, given["config"]
        trained = [p for name, p in given["model"].named_parameters() if not (args.freeze_vision and "visual" in name)]
        assert group["weight_decay"] == 0.1 and [*map(id, group["params"])] == [*map(id, trained)]
        return config["zero_optimization"]["stage"], config["gradient_clipping"], config["bf16"]["enabled"]

    assert told() == (2, 1.0, False) and told("--zero_stage", "3", "--max_grad_norm", "0.5") == (3, 0.5, False)
    assert told("--deepspeed", str(tmp_path / "ds.json"), "--freeze_vision", dtype=torch.bfloat16) == (1, 1.0, True)

def test_prompts_too_long_and_bad_rows_are_counted_never_cut(alone, capsys):
    samples = [{"id": str(i), "length": n} for i, n in enumerate((5, 9, 7, "no image", 10))]

    def length(s):
        if s["length"] == "no image":
            raise FileNotFoundError("a.png")
        return s["length"]

    kept, total, steps = g.usable(samples, ["x.jsonl:3 (x): no box"], length, 9, arguments(max_bad_rows=2))
    assert ([s["id"] for s in kept], total, steps) == (["0", "1", "2"], 4, 2)
    assert g.usable(samples, [], length, 9, arguments(max_bad_rows=1, max_steps=5))[1:] == (10, 5)
    said = capsys.readouterr().out
    assert "3 of 5 rows are of use" in said and "x.jsonl:3 (x): no box\n3: FileNotFoundError a.png" in said
    for most, bad in ((9, 0), (4, 1)):
        want = f"1 bad rows, {3 * (most > 4)} of use.*want at most --max_bad_rows {bad}"
        with pytest.raises(g.InputError, match=want):
            g.usable(samples, [], length, most, arguments(max_bad_rows=bad))

def test_two_troubles_are_named_once(alone, capsys):
    fine, poor = {"reward": 0.1, "parse_rate": 0.5}, {"reward": 0.0, "parse_rate": 0.01}
    for i in range(1, 20):
        g.warn([poor] * i), g.warn([fine] * i), g.warn([poor] * 4 + [fine] * i)
    said = [line.split(";")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["warning: almost no answer has a box", "warning: reward 0 for ten steps"]

# ---- what is read ----
def test_all_formats_are_read_as_the_same_sample(synth_dir, tmp_path):
    row = json.loads((synth_dir / "samples.jsonl").read_text().splitlines()[0])
    image, (ours, *_) = synth_dir / row["images"][0], g.read_samples([synth_dir / "samples.jsonl"])[0]
    target, data = row["entities"][row["target"]], image.read_bytes()
    released = {"problem": row["question"], "solution": f"<answer> {row['answer']} </answer>"}
    pq.write_table(pa.Table.from_pylist([released | {"image": {"bytes": data}}] * 2), tmp_path / "grpo.parquet")
    own = {"image": str(image), "question": row["question"], "bbox_px": target["bbox_px"]}
    phrase = {"images": [image.name], "phrase": target["entity"], "bbox_px": target["bbox_px"]}
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (own, phrase)))
    (parquet, second), bad = g.read_samples([tmp_path / "grpo.parquet"])
    assert not bad and (parquet["id"], second["id"]) == ("1", "2") and parquet["image"] == data
    read = [parquet, *g.read_samples([tmp_path / "own.jsonl"], image.parent)[0]]
    assert [s["id"] for s in read] == ["1", "1", "2"], "the line, where a row has no id"
    for s in read:
        assert all(s[key] == ours[key] for key in ("question", "answer", "entity"))
        assert s["bbox_1000"] == pytest.approx(ours["bbox_1000"], abs=0.51)
    assert {g.load_image(s["image"]).size for s in (ours, *read)} == {(168, 112)}
    assert len({g.load_image(s["image"]).tobytes() for s in (ours, *read)}) == 1

# ---- runs ----
def test_a_run_writes_what_is_said_and_its_export_loads_in_plain_transformers(runs):
    out, metrics = runs["train_grpo"], metrics_of(runs["train_grpo"])
    assert [m["step"] for m in metrics] == [1, 2, 3, 4] and all(m["grad_norm"] > 0 for m in metrics)
    assert [m["learning_rate"] for m in metrics] == pytest.approx([1e-3 * (1 - i / 8) for i in (1, 3, 5, 7)])
    assert all(m["sampling/logp_diff"] < 1e-5 and m["clip_ratio/region_mean"] >= 0 and m["kl"] > 0 for m in metrics)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [1, 1, 2, 2, 3, 3, 4] and len(samples[0]["completions"]) == 3
    for s in samples:
        rewards = [c["reward"] for c in s["completions"]]
        assert rewards == [c["letters"] for c in s["completions"]]
        assert [c["advantage"] for c in s["completions"]] == g.group_advantages(rewards, "group")
    assert json.loads((out / "run.json").read_text())["beta"] == 0.04
    model, info = g.AutoModelForImageTextToText.from_pretrained(out / "final", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.prompt_suffix == g.R1_SUFFIX
    saved = load_file(out / "final/model.safetensors")
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items() if k in saved)

def test_reward_rises(tiny_dir, synth_dir, tmp_path):
    """On a reward that any policy can raise: the whole loop, from rollout to update, has the right sign."""
    flags = ("--max_steps", 25, "--num_generations", 8, "--learning_rate", 3e-3, "--lr_scheduler", "constant")
    train("train_grpo", tmp_path / "run", tiny_dir, synth_dir / "samples.jsonl", *flags, "--save_steps", 0)
    rewards = [m["reward"] for m in metrics_of(tmp_path / "run")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2, rewards
    assert not [*(tmp_path / "run").glob("checkpoint-*")]

def test_a_script_copied_alone_trains_on_own_rows_and_says_what_changed(tiny_dir, synth_dir, tmp_path):
    """In an empty folder, without ds_config.json; a bad row is skipped if it may be; then with other flags and code."""
    assert json.loads(g.DS_CONFIG) == json.loads((ROOT / "ds_config.json").read_text())
    script, out = tmp_path / "train_grpo.py", tmp_path / "run"
    shutil.copy(ROOT / "train_grpo.py", script)
    with open(tmp_path / "own.jsonl", "w") as f:
        f.write('{"image": "no.png"}\n')
        for r in map(json.loads, (synth_dir / "samples.jsonl").read_text().splitlines()):
            box = r["entities"][r["target"]]["bbox_px"]
            f.write(json.dumps({"image": r["images"][0], "question": r["question"], "bbox_px": box}) + "\n")
    flags = ("--model", tiny_dir, "--data", tmp_path / "own.jsonl", "--image_root", synth_dir, "--output_dir", out)
    flags += ("--train_batch_size", 2, "--num_generations", 2, "--max_completion_length", 4, "--save_steps", 1)
    done = run_script(script, *flags, "--max_steps", 2, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr and "own.jsonl:1 (None): " in done.stdout
    assert done.stderr.splitlines()[-1].startswith("train_grpo: 1 bad rows, 12 of use")
    done = run_script(script, *flags, "--max_steps", 2, "--max_bad_rows", 1, "--keep_checkpoints")
    assert [m["step"] for m in metrics_of(out)] == [1, 2] and (out / "checkpoint-1").exists()
    (out / "final").rename(tmp_path / "final")
    script.write_text(script.read_text() + "# changed\n")
    done = run_script(script, *flags, "--max_steps", 3, "--max_bad_rows", 1, "--gradient_checkpointing")
    (said,) = (line for line in done.stdout.splitlines() if "goes on with other settings" in line)
    for name in ("'script': ", "'max_steps': '2 -> 3'", "'gradient_checkpointing': 'False -> True'"):
        assert name in said
    assert "seed" not in said and f"goes on from {out}/checkpoint-1" in done.stdout
    assert [m["step"] for m in metrics_of(out)] == [1, 2, 3] and (out / "final/model.safetensors").exists()
