"""GRPO: parser, rewards, advantages, loss against plain Python, rollout against generate, log-probs, runs and ranks."""

import json
import math
import random
import re
import shutil
import sys
from types import SimpleNamespace

import plain
import pytest
import torch
from conftest import FAMILIES, TWO_RANKS, run_script
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

import train_grpo as g

BOX = "<|box_start|>(10,20),(300,400)<|box_end|>"
GOOD = f"<think>it is red</think> <answer><|object_ref_start|>X<|object_ref_end|>{BOX}</answer>"
SAMPLE = {"bbox_1000": [10, 20, 300, 400], "grid": (1000, 1000), "style": g.BOX_STYLES["qwen2_vl"]}


def arguments(**changes):
    base = dict(epsilon=0.2, epsilon_high=0.2, beta=0.0, loss_type="grpo", max_completion_length=16, iou_threshold=0.8,
                temperature=1.0, reward_funcs=["iou", "format"], reward_weights=[1.0, 1.0], scale_rewards="group",
                num_generations=4, seed=0, rollout_batch_size=64, knowledge_form=None)  # fmt: skip
    return SimpleNamespace(**(base | changes))


# ---- parser and rewards ----
@pytest.mark.parametrize("text, want", [
    ("<answer>(1,2),(3,4)</answer>", [1, 2, 3, 4]),
    ("<answer>(1,2,3,4)</answer>", [1, 2, 3, 4]),
    ("<answer>[1, 2,\n3, 4]</answer>", [1, 2, 3, 4]),
    ("<answer>[[1,2,3,4]]</answer>", [1, 2, 3, 4]),
    ('<answer>```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "x"}]```</answer>', [1, 2, 3, 4]),
    ("<answer>(1.5,2),(3,4.25)</answer>", [1.5, 2, 3, 4.25]),
    ("<answer>(1,2),(3,4) and again (1,2),(3,4)</answer>", [1, 2, 3, 4]),
    ("<answer>(1,2),(3,4) or (5,6),(7,8)</answer>", None),
    ("<answer>(1,2),(3,4),(5,6)</answer>", None),
    ("<answer>(3,2),(1,4)</answer>", None),
    ("<answer>(1,2),(3,2)</answer>", None),
    ("<answer>(1,2),(3,1001)</answer>", None),
    ("<answer>(-1,2),(3,4)</answer>", None),
    ("<answer>1, 2, 3, 4</answer>", None),
    ("<answer>(1,2),(3,4)", None),
    ("<answer>(1,2),(3,4)</answer><answer>(1,2),(3,4)</answer>", None),
    ("<think><answer>(1,2),(3,4)</answer></think>", None),
    ("<think>(1,2),(3,4)</think> <answer>none</answer>", None),
    ("<think>so</think> or so</think> <answer>(1,2),(3,4)</answer>", [1, 2, 3, 4]),
    ("<think>so</think><think>or <answer>(1,2),(3,4)</answer>", None),
    ("</answer>(1,2),(3,4)<answer>", None),
    ("<answer>(١,٢),(٣,٤)</answer>", None),
    ("(1,2),(3,4)", None),
    ("", None),
])  # fmt: skip
def test_parser_takes_the_one_box_of_the_one_answer(text, want):
    assert g.parse_bbox(text) == want


def test_other_modes_read_the_whole_text_or_the_answer_block():
    assert g.parse_bbox("it is at (1,2),(3,4).", "direct") == [1, 2, 3, 4]
    assert g.parse_bbox("(5,6),(7,8) <answer>(1,2),(3,4)</answer>", "cot") == [1, 2, 3, 4]
    assert g.parse_bbox("in 1999 (about 20) of them", "direct") is None


def test_both_halves_of_the_format_reward_are_paid():
    """The released trainer never pays the box half: its matcher returns i + 2 and the reward asks for 1."""
    assert g.format_reward(GOOD, SAMPLE, None) == 1.0
    assert g.format_reward(GOOD.replace(BOX, "[10, 20, 300, 400]"), SAMPLE, None) == 0.5
    assert g.format_reward(GOOD.replace("<think>", "").replace("</think>", ""), SAMPLE, None) == 0.5
    assert g.format_reward("so: " + GOOD + " bye", SAMPLE, None) == 0.5
    assert g.format_reward(GOOD.replace("<think>", "<think><think>"), SAMPLE, None) <= 0.5
    assert g.format_reward("none", SAMPLE, None) == 0.0


def test_rewards_by_name():
    near = GOOD.replace("300,400", "290,380")
    iou = g.box_iou([10, 20, 290, 380], [10, 20, 300, 400])
    assert 0.8 < iou < 1
    args = arguments(iou_threshold=0.8)
    assert [g.REWARDS[n](near, SAMPLE, args) for n in ("iou", "dense_iou", "binary")] == [iou, iou, 1.0]
    args = arguments(iou_threshold=0.95)
    assert [g.REWARDS[n](near, SAMPLE, args) for n in ("iou", "dense_iou", "binary")] == [0.0, iou, 0.0]
    assert [g.REWARDS[n]("no box", SAMPLE, args) for n in ("iou", "dense_iou", "binary")] == [0.0] * 3


def test_iou_equals_a_pixel_count():
    rng = random.Random(0)
    for _ in range(200):
        a, b = (
            [x1 := rng.randint(0, 18), y1 := rng.randint(0, 18), rng.randint(x1 + 1, 20), rng.randint(y1 + 1, 20)]
            for _ in range(2)
        )
        pixels = [{(x, y) for x in range(c[0], c[2]) for y in range(c[1], c[3])} for c in (a, b)]
        assert math.isclose(g.box_iou(a, b), len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1]))


# ---- advantages and loss ----
def test_advantages():
    r = [1.0, 0.0, 0.0, 0.0]
    assert g.group_advantages(r, "none") == [0.75, -0.25, -0.25, -0.25]
    assert g.group_advantages(r, "loo") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert g.group_advantages(r, "group") == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-3)
    for scale in ("group", "none", "loo"):
        assert g.group_advantages([0.3] * 4, scale) == [0.0] * 4


def plain_loss(logps, old, ref, advantages, lengths, args):
    """The loss of one group by loops over numbers."""
    total, tokens = 0.0, sum(lengths)
    for i, n in enumerate(lengths):
        row = 0.0
        for t in range(n):
            ratio = math.exp(logps[i][t] - old[i][t])
            clipped = min(max(ratio, 1 - args.epsilon), 1 + args.epsilon_high)
            row += -min(ratio * advantages[i], clipped * advantages[i])
            if args.beta:
                d = ref[i][t] - logps[i][t]
                row += args.beta * (math.exp(d) - d - 1)
        total += {
            "grpo": row / n / len(lengths),
            "dapo": row / tokens,
            "dr_grpo": row / (len(lengths) * args.max_completion_length),
        }[args.loss_type]
    return total


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_equals_a_plain_loop(loss_type, beta):
    torch.manual_seed(0)
    args, lengths = arguments(loss_type=loss_type, beta=beta, epsilon_high=0.28), [5, 2, 7, 1]
    logps, old, ref = (-torch.rand(sum(lengths), dtype=torch.float64) * 2 for _ in range(3))
    advantages = torch.tensor([1.2, -0.7, 0.4, -0.9], dtype=torch.float64)
    weights = g.token_weights(lengths, args, 4, sum(lengths)).double()
    spread = advantages.repeat_interleave(torch.tensor(lengths))
    loss, logged = g.grpo_loss(logps, old, ref if beta else None, spread, weights, args)
    nested = [[x.tolist() for x in values.split(lengths)] for values in (logps, old, ref)]
    assert loss.item() == pytest.approx(plain_loss(*nested, advantages.tolist(), lengths, args), rel=1e-6)
    assert logged["clip"] > 0 and (logged["kl"] > 0) == (beta > 0)


def test_positive_advantage_raises_the_log_prob():
    logps = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0])
    loss, _ = g.grpo_loss(logps, logps.detach(), None, advantages, torch.full((3,), 1 / 3), arguments())
    loss.backward()
    assert (logps.grad[:2] < 0).all() and logps.grad[2] > 0


def test_kl_is_zero_at_equality_and_never_negative():
    logps, args, zeros, ones = torch.randn(15), arguments(beta=1.0), torch.zeros(15), torch.ones(15)
    loss, logged = g.grpo_loss(logps, logps, logps, zeros, ones, args)
    assert loss.item() == 0 and logged["kl"] == 0
    assert g.grpo_loss(logps, logps, logps + torch.randn(15), zeros, ones, args)[1]["kl"] > 0


# ---- rollout ----
@pytest.fixture(scope="module", params=FAMILIES)
def parts(request, family_dirs, synth_dir):
    folder = str(family_dirs[request.param])
    style = g.check_model(folder)
    tokenizer, image_processor = g.load_processors(folder, 401408)
    model = g.load_model(folder, "float32", torch.device("cpu"))
    with torch.no_grad():  # a random model's logits are nearly flat; sharper ones make greedy choices clear
        model.model.language_model.norm.weight.mul_(3)
    samples = g.read_samples(synth_dir / "samples.jsonl")[:5]
    texts = [s["question"] + " please" * i for i, s in enumerate(samples)]  # prompts of different length
    prompts = [
        g.chat_inputs(tokenizer, image_processor, s["image"], t, style) for s, t in zip(samples, texts, strict=True)
    ]
    return model, tokenizer, image_processor, samples, prompts


def test_greedy_rollout_equals_generate(parts):
    model, tokenizer, _, _, prompts = parts
    ours = g.rollout(model, tokenizer, prompts, [["0"]] * len(prompts), 24, 0.0, 64)
    banned = [[tokenizer.convert_tokens_to_ids(t)] for t in g.VISION_TOKENS]
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for p, [(ids, _, _)] in zip(prompts, ours, strict=True):
        assert plain.generate(
            model, p, max_new_tokens=24, do_sample=False, bad_words_ids=banned, eos_token_id=ends
        ) == [ids]


def test_a_completion_depends_on_its_seed_alone(parts):
    """Not on the batch, its order, the other completions, or on rows that finish earlier and are left behind."""
    model, tokenizer, _, _, prompts = parts
    seeds = [[f"{i}:{j}" for j in range(3)] for i in range(len(prompts))]
    together = g.rollout(model, tokenizer, prompts, seeds, 40, 1.0, 64)
    reversed_ = g.rollout(model, tokenizer, prompts[::-1], seeds[::-1], 40, 1.0, 64)[::-1]
    alone = [g.rollout(model, tokenizer, [p], [s], 40, 1.0, 64)[0] for p, s in zip(prompts, seeds, strict=True)]
    ids = [[[c[0] for c in group] for group in rolled] for rolled in (together, reversed_, alone)]
    assert ids[0] == ids[1] == ids[2]
    assert len({tuple(c) for group in ids[0] for c in group}) == 15, "different seeds give different completions"
    assert any(len(c) < 40 for group in ids[0] for c in group), "some rows stop early"


def test_the_loop_around_the_graphs_gives_the_same_completions(parts, monkeypatch):
    """What CUDA runs, without CUDA: no row is left behind, the host looks every 16 tokens, a step is a replay."""
    model, tokenizer, _, _, prompts = parts
    seeds = [[f"{i}:{j}" for j in range(3)] for i in range(len(prompts))]
    want = g.rollout(model, tokenizer, prompts, seeds, 40, 1.0, 64)
    decode, captured = g.decode, []
    monkeypatch.setattr(g, "decode", lambda *args, graphs: decode(*args, graphs=True))
    monkeypatch.setattr(g, "capture", lambda advance: captured.append(advance) or advance)
    got = g.rollout(model, tokenizer, prompts, seeds, 40, 1.0, 64)
    assert len(captured) == 1, "one capture serves all steps"
    for ours, theirs in zip(got, want, strict=True):
        assert [(ids, end) for ids, _, end in ours] == [(ids, end) for ids, _, end in theirs]
        assert all(torch.allclose(a[1], b[1], atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_vision_tokens_are_never_sampled_even_by_a_model_that_wants_them(parts):
    model, tokenizer, _, _, prompts = parts
    wanted = {tokenizer.convert_tokens_to_ids(t) for t in g.VISION_TOKENS}
    embedding = model.lm_head.weight
    saved = embedding.detach().clone()
    with torch.no_grad():
        embedding[list(wanted)] *= 50
    rolled = g.rollout(model, tokenizer, prompts, [["a", "b"]] * len(prompts), 16, 1.0, 64)
    with torch.no_grad():
        embedding.copy_(saved)
    assert not wanted & {i for group in rolled for ids, _, _ in group for i in ids}


def test_rollout_keeps_its_cache_in_train_mode_with_checkpointing(parts):
    """transformers drops the cache in train mode with gradient checkpointing: it sees one token, and warns once."""
    model, tokenizer, _, _, prompts = parts
    want = g.rollout(model, tokenizer, prompts, [["0"]] * len(prompts), 12, 0.0, 64)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    got = g.rollout(model, tokenizer, prompts, [["0"]] * len(prompts), 12, 0.0, 64)
    assert model.training
    model.gradient_checkpointing_disable()
    model.eval()
    assert [c[0][0] for c in got] == [c[0][0] for c in want]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ragged_groups(parts, generations=3):
    """Rollouts of all prompts: groups with prompts and completions of different length."""
    model, tokenizer, _, samples, prompts = parts
    args = arguments(temperature=0.7, max_completion_length=20, num_generations=generations)
    groups = g.roll_out_step(model, tokenizer, samples, [dict(p) for p in prompts], 1, args, {})
    for i, group in enumerate(groups):
        for values in (group.completion_ids, group.old_logps):
            values[:] = [x[: 20 - 5 * j - i] for j, x in enumerate(values)]
    return groups, args


def test_packed_row_equals_one_row_per_completion(parts):
    """Log-probs to 1e-5 and all gradients, the vision tower's too, to 1e-4 relative: several groups in one row."""
    model, tokenizer, _, _, _ = parts
    groups, args = ragged_groups(parts)
    assert len({len(ids) for group in groups for ids in group.completion_ids}) > 5, "want ragged completions"
    banned = g.vision_ids(tokenizer)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(len(ids), generator=generator) for group in groups for ids in group.completion_ids]
    model.zero_grad()
    want = []
    for group in groups:
        logps, _ = plain.completion_logps(model, tokenizer, group.inputs, group.completion_ids, 0.7, banned)
        want += [row[: len(ids)] for row, ids in zip(logps, group.completion_ids, strict=True)]
    (torch.cat(want) * torch.cat(weights)).sum().backward()
    wanted = gradients(model)
    for chunk in (2**26, 7 * len(tokenizer)):  # at once, and 7 positions at a time
        model.zero_grad()
        scorer = g.CompletionLogProbs(model, banned, 0.7, chunk)
        logps = scorer(g.pack_groups(groups, "cpu", freeze_vision=False))
        assert (logps - torch.cat(want)).abs().max() < 1e-5
        (logps * torch.cat(weights)).sum().backward()
        ours = gradients(model)
        assert ours.keys() == wanted.keys() and any("visual" in name for name in ours)
        for name in wanted:
            assert (ours[name] - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max() + 1e-9, name


def test_packed_row_is_the_same_under_gradient_checkpointing(parts):
    model, tokenizer, _, _, _ = parts
    groups, _ = ragged_groups(parts)
    row = g.pack_groups(groups, "cpu", freeze_vision=False)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        model.zero_grad()
        g.CompletionLogProbs(model, g.vision_ids(tokenizer))(row).sum().backward()
        grads.append(gradients(model))
    model.gradient_checkpointing_disable()
    model.eval()
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6) for name in grads[0])


def test_positions_of_the_prompt_are_the_models_own(parts):
    model, _, _, _, prompts = parts
    for p in prompts:
        ids = torch.tensor([p["prompt_ids"]])
        kinds = (ids == model.config.image_token_id).int()
        want, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=p["image_grid_thw"])
        assert torch.equal(p["position_ids"], want[:, 0])


@pytest.mark.parametrize("kernel", ["varlen_attn", "flash_attn"])
def test_the_layout_for_the_cuda_kernels_says_the_same(kernel, parts, monkeypatch):
    """The contract of both, written out in PyTorch: sequences by offsets, causal from the lower right corner."""
    import torch.nn.attention.varlen as varlen

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
        out = []
        for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            one = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            one = torch.nn.functional.scaled_dot_product_attention(*one, attn_mask=mask, scale=scale, enable_gqa=True)
            out.append(one[0].transpose(0, 1))
        return torch.cat(out)

    def varlen_attn(*args, scale, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa
        return attend(*args, scale)

    def flash_attn_varlen_func(*args, softmax_scale, causal):
        assert causal
        return attend(*args, softmax_scale)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    groups, _ = ragged_groups(parts)
    row = g.pack_groups(groups, "cpu", freeze_vision=False)
    T, generator = row.input_ids.shape[1], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, T, 8, generator=generator) for heads in (4, 2, 2))
    want = g.attend_spans(q, k, v, 0.3, row)
    assert (g.attend_varlen(q, k, v, 0.3, row, kernel) - want).abs().max() < 1e-5


def test_the_kernel_is_chosen_by_what_is_there(monkeypatch):
    monkeypatch.setattr(g.importlib.util, "find_spec", lambda name: None)
    kernels = [("cpu", torch.bfloat16), ("cuda", torch.float32), ("cuda", torch.bfloat16)]
    assert [g.attention_kernel.__wrapped__(*k) for k in kernels] == ["sdpa", "sdpa", "varlen_attn"]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, k, v: None)  # an older torch
    assert g.attention_kernel.__wrapped__("cuda", torch.bfloat16) == "sdpa"
    monkeypatch.setattr(g.importlib.util, "find_spec", lambda name: name == "flash_attn" or None)
    assert [g.attention_kernel.__wrapped__(*k) for k in kernels] == ["sdpa", "sdpa", "flash_attn"]


def test_image_and_prompt_go_through_the_model_once(parts):
    """Patches seen by the vision tower and tokens seen by the decoder, counted: not one pass per completion."""
    model, tokenizer, _, samples, prompts = parts
    patches, tokens = [], []
    hooks = [
        model.model.visual.register_forward_pre_hook(lambda _, x: patches.append(len(x[0]))),
        model.model.language_model.register_forward_pre_hook(
            lambda _, x, kw: tokens.append(kw["inputs_embeds"].shape[1]), with_kwargs=True
        ),
    ]
    args = arguments(max_completion_length=4, num_generations=3)
    all_patches, all_tokens = sum(len(p["pixel_values"]) for p in prompts), sum(len(p["prompt_ids"]) for p in prompts)
    for frozen, vision_passes in ((False, 2), (True, 1)):
        patches.clear(), tokens.clear()
        model.model.visual.requires_grad_(not frozen)
        groups = g.roll_out_step(model, tokenizer, samples, [dict(p) for p in prompts], 1, args, {})
        g.CompletionLogProbs(model)(g.pack_groups(groups, "cpu", frozen))
        completed = sum(len(ids) for x in groups for ids in x.completion_ids)
        assert sum(patches) == vision_passes * all_patches, "one pass for the rollout, one with gradient if it trains"
        assert tokens == [all_tokens, all_tokens + completed], "prefill, and one packed row"
    model.model.visual.requires_grad_(True)
    for hook in hooks:
        hook.remove()


def test_trainer_log_probs_equal_the_samplers(parts):
    model, tokenizer, _, _, _ = parts
    groups, args = ragged_groups(parts)
    scorer = g.CompletionLogProbs(model, g.vision_ids(tokenizer), args.temperature)
    logps = scorer(g.pack_groups(groups, "cpu", freeze_vision=False))
    assert (logps - torch.cat([lp for group in groups for lp in group.old_logps])).abs().max() < 1e-5


def test_rows_are_filled_up_to_the_budget(monkeypatch):
    monkeypatch.setattr(g.dist, "all_reduce", lambda *_, **__: None)
    lengths = [30, 70, 50, 20, 90, 40]
    for budget, count in ((1, 6), (90, 4), (110, 3), (300, 1)):
        rows = g.fill_rows(lengths, budget, "cpu")
        assert sorted(i for row in rows for i in row) == list(range(6)) and len(rows) == count
        assert all(sum(lengths[i] for i in row) <= budget or len(row) == 1 for row in rows)
    assert g.fill_rows([], 9, "cpu") == [[]]


def test_sampling_follows_the_distribution(parts):
    """The first token of 4,000 completions against its softmax: total variation below 4 %."""
    model, tokenizer, _, _, prompts = parts
    rolled = g.rollout(model, tokenizer, prompts[:1], [[str(i) for i in range(4000)]], 1, 1.0, 4000)[0]
    count = torch.bincount(torch.tensor([ids[0] for ids, _, _ in rolled]), minlength=len(tokenizer)) / 4000
    p = prompts[0]
    x = torch.tensor([p["prompt_ids"]])
    with torch.no_grad():
        logits = model(input_ids=x, mm_token_type_ids=(x == model.config.image_token_id).int(),
                       pixel_values=p["pixel_values"], image_grid_thw=p["image_grid_thw"]).logits[:, -1]  # fmt: skip
    logits[..., g.vision_ids(tokenizer)] = float("-inf")
    exact = torch.softmax(logits, -1)[0]
    expected = (2 * exact * (1 - exact) / (math.pi * 4000)).sqrt().sum() / 2  # mean total variation of a true sample
    assert (count - exact).abs().sum() / 2 < 1.3 * expected


# ---- the script ----
def train(out, model, data, *flags, launcher=(sys.executable,), check=True):
    """Four steps with a reward that a random model can earn."""
    return run_script("tests/grpo_letters.py", "--model", model, "--data", data, "--output_dir", out, "--max_steps", 4,
                      "--train_batch_size", 4, "--num_generations", 3, "--max_completion_length", 12,
                      "--learning_rate", 1e-3, "--reward_funcs", "letters", "--save_steps", 2, *flags,
                      launcher=launcher, check=check)  # fmt: skip


TIMES = re.compile("time|per_second|mfu")


def rows(path):
    """Metrics without the times, which differ between runs."""
    return [
        {k: v for k, v in json.loads(line).items() if not TIMES.search(k)} for line in path.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def run_dir(tiny_dir, synth_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("grpo") / "run"
    train(out, tiny_dir, synth_dir / "samples.jsonl", "--beta", 0.04, "--num_iterations", 2)
    return out


def test_reward_rises(tiny_dir, synth_dir, tmp_path):
    """30 steps on a reward that any policy can raise: the whole loop, from rollout to update, has the right sign."""
    flags = (
        "--max_steps",
        30,
        "--num_generations",
        8,
        "--learning_rate",
        3e-3,
        "--lr_scheduler",
        "constant",
        "--save_steps",
        0,
    )
    train(tmp_path, tiny_dir, synth_dir / "samples.jsonl", *flags)
    rewards = [m["reward"] for m in rows(tmp_path / "metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2, rewards


def test_smoke_run_writes_everything(run_dir):
    metrics = rows(run_dir / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert all(m["grad_norm"] > 0 and m["sampling/logp_diff"] < 1e-5 for m in metrics)
    assert {"reward", "reward_std", "rewards/letters/mean", "frac_reward_zero_std", "completions/mean_length", "kl",
            "clip_ratio/region_mean", "parse_rate", "num_tokens", "learning_rate"} <= set(metrics[-1])  # fmt: skip
    assert metrics[-1]["kl"] > 0
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {1, 2, 3, 4} and len(samples[0]["completions"]) == 3
    assert (run_dir / "curves.png").stat().st_size > 1000 and (run_dir / "config.json").exists()
    Qwen2VLForConditionalGeneration.from_pretrained(run_dir / "final")


def test_resume_repeats_the_undisturbed_run(run_dir, tiny_dir, synth_dir, tmp_path):
    """Killed after step 2 and a half-written line: the same metrics and the same weights at the end."""
    out = tmp_path / "run"
    shutil.copytree(run_dir, out)
    shutil.rmtree(out / "final")
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    train(out, tiny_dir, synth_dir / "samples.jsonl", "--beta", 0.04, "--num_iterations", 2)
    assert rows(out / "metrics.jsonl") == rows(run_dir / "metrics.jsonl")
    assert (out / "samples.jsonl").read_text() == (run_dir / "samples.jsonl").read_text()
    ours, theirs = (load_file(d / "final" / "model.safetensors") for d in (out, run_dir))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_groups_without_signal_are_skipped_and_packing_does_not_matter(tiny_dir, synth_dir, tmp_path):
    """Half of the groups have equal rewards. Two ranks with a row per group, and so with a different number of
    rows to train on, learn what one rank learns from everything in one row."""
    data, flags = synth_dir / "samples.jsonl", ("--reward_funcs", "some", "--save_steps", 0)
    train(tmp_path / "one", tiny_dir, data, *flags)
    train(tmp_path / "two", tiny_dir, data, *flags, "--tokens_per_row", 1, launcher=TWO_RANKS)
    one, two = (rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert any(0 < m["frac_reward_zero_std"] < 1 for m in one) and all(m["grad_norm"] > 0 for m in one)
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    ours, theirs = (load_file(tmp_path / d / "final" / "model.safetensors") for d in ("one", "two"))
    assert max((ours[k] - theirs[k]).abs().max().item() for k in theirs) < 1e-4


@pytest.mark.parametrize("flags, message", [
    (("--num_generations", 1), "a group of one has no advantage"),
    (("--temperature", 0), "greedy completions"),
    (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (("--model", "nowhere"), "nowhere: no model"),
    (("--max_prompt_length", 50), "a prompt is never cut"),
])  # fmt: skip
def test_bad_input_gets_one_clear_line(flags, message, tiny_dir, synth_dir, tmp_path):
    done = train(tmp_path, tiny_dir, synth_dir / "samples.jsonl", *flags, check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_another_setting_in_the_same_folder_is_refused(run_dir, tiny_dir, synth_dir):
    done = train(run_dir, tiny_dir, synth_dir / "samples.jsonl", "--beta", 0.5, "--num_iterations", 2, check=False)
    assert done.returncode != 0 and "--beta was 0.04, now 0.5" in done.stderr
