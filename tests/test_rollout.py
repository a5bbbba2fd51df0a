"""The rollout against transformers' generate and the plain log-probs, in every family; what a GPU does otherwise."""

import copy
import math

import plain
import pytest
import torch

import train_grpo as g

def roll(parts, prompts, seeds, length, temperature=1.0):
    return g.rollout(parts.model, parts.tokenizer, [dict(p) for p in prompts], seeds, length, temperature)

def test_greedy_tokens_equal_generate(parts):
    stops, ours = parts.tokenizer.convert_tokens_to_ids(g.STOP), roll(parts, parts.prompts, [["0"]] * 5, 24, 0.0)
    for p, [(ids, _, finished)] in zip(parts.prompts, ours, strict=True):
        draw = dict(max_new_tokens=24, do_sample=False, bad_words_ids=[[i] for i in parts.banned], eos_token_id=stops)
        assert plain.generate(parts.plain_model, p, **draw) == [ids] and finished == (ids[-1] in stops)

@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_log_probs_are_those_of_the_plain_model_at_the_temperature_without_banned_tokens(temperature, parts):
    model, plain_model = (copy.deepcopy(m) for m in (parts.model, parts.plain_model))
    with torch.no_grad():
        for m in (model, plain_model):
            m.lm_head.weight[parts.banned] *= 50
    prompts = [dict(p) for p in parts.prompts]
    rolled = g.rollout(model, parts.tokenizer, prompts, [["a", "b"]] * 5, 20, temperature)
    for p, group in zip(prompts, rolled, strict=True):
        ids = [c[0] for c in group]
        assert not {i for c in ids for i in c} & set(parts.banned)
        with torch.no_grad():
            how = (temperature or 1, parts.banned)
            want, mask = plain.completion_logps(plain_model, parts.tokenizer, p, ids, *how)
        assert (torch.cat([c[1] for c in group]) - want[mask.bool()]).abs().max() < 1e-5

def test_a_completion_depends_on_its_seed_alone(parts):
    seeds = [[f"{i}:{j}" for j in range(3)] for i in range(5)]
    together, backwards = roll(parts, parts.prompts, seeds, 40), roll(parts, parts.prompts[::-1], seeds[::-1], 40)
    ids = [[[c[0] for c in group] for group in rolled] for rolled in (together, backwards[::-1])]
    assert ids[0] == ids[1] and len({tuple(c) for group in ids[0] for c in group}) == 15
    for i in range(5):
        assert roll(parts, [parts.prompts[i]], [seeds[i][i % 3 :][:1]], 40)[0][0][0] == ids[0][i][i % 3]
    assert any(len(c) < 40 for group in ids[0] for c in group), "some rows stop early"

def test_the_loop_around_the_graphs_gives_the_same_completions(parts, monkeypatch):
    """What CUDA runs, without CUDA: a step is a replay; every 256 tokens rows are left behind and it is made anew."""
    seeds, decode, captured = [[f"{i}:{j}" for j in range(3)] for i in range(5)], g.Rollout.decode, []
    want, stops = roll(parts, parts.prompts, seeds, 260), {*parts.tokenizer.convert_tokens_to_ids(g.STOP)}
    assert not any(stops & {*ids[:-1]} for group in want for ids, _, _ in group), "each of them ends a row"
    monkeypatch.setattr(g, "capture", lambda advance: captured.append(advance) or advance)
    monkeypatch.setattr(g.Rollout, "decode", lambda self, graphs: decode(self, graphs=True))
    for a, b in zip(sum(roll(parts, parts.prompts, seeds, 260), []), sum(want, []), strict=True):
        assert a[0] == b[0] and a[2] == b[2] and torch.allclose(a[1], b[1], atol=1e-5)
    assert len(captured) == 2, "one capture serves all steps between two changes of room"

@pytest.mark.parametrize("parts", ["qwen2_vl"], indirect=True)
def test_sampling_follows_the_distribution(parts):
    (group,) = roll(parts, parts.prompts[:1], [[str(i) for i in range(4000)]], 1)
    count = torch.bincount(torch.tensor([ids[0] for ids, _, _ in group]), minlength=len(parts.tokenizer)) / 4000
    every, exact = [[i] for i in range(len(count)) if i not in parts.banned], torch.zeros(len(count))
    with torch.no_grad():
        logp, _ = plain.completion_logps(parts.plain_model, parts.tokenizer, parts.prompts[0], every, 1, parts.banned)
    exact[sum(every, [])] = logp[:, 0].exp()
    expected = (2 * exact * (1 - exact) / (math.pi * 4000)).sqrt().sum() / 2
    assert (count - exact).abs().sum() / 2 < 1.3 * expected

# ---- attention ----
class OnCuda(torch.Tensor):
    """float64 stands for bfloat16: what the code asks a tensor before it calls the CUDA kernel."""
    is_cuda = True

def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """The contract of torch's varlen_attn in plain words: sequences by offsets, causal from the lower right corner."""
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max() and enable_gqa and cu_q.dtype == torch.int32
    out = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        q1, k1, v1 = (x.as_subclass(torch.Tensor).transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        k1, v1 = (x.repeat_interleave(len(q1) // len(x), 0) for x in (k1, v1))
        unseen = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1) & (window_size == (-1, 0))
        scores = (q1 @ k1.mT * scale).masked_fill(unseen, -torch.inf)
        out.append((scores.softmax(-1) @ v1).transpose(0, 1))
    return torch.cat(out)

@pytest.mark.parametrize("causal", [True, False, "groups"])
def test_attention_within_sequences_and_groups_equals_the_kernels_contract(causal, monkeypatch):
    """Prefill (causal), vision tower (not), and packed groups: loops on a CPU, one call on CUDA, plain softmax."""
    monkeypatch.setattr(g, "varlen_attn", kernel)
    generator, groups = torch.Generator().manual_seed(0), [[5, 1, 7, 3], [4], [2, 9], [6, 2, 2]]
    sizes = [n for group in groups for n in group]
    q, k, v = (torch.randn(1, h, sum(sizes), 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2))
    seen, start = torch.zeros(sum(sizes), sum(sizes), dtype=torch.bool), 0
    for P, *ns in groups if causal == "groups" else [[n] for n in sizes]:
        own = start
        for n in (P, *ns):  # a token sees its prompt, and its own sequence up to itself
            seen[own : own + n, start : start + P] = own > start
            seen[own : own + n, own : own + n] = torch.ones(n, n).tril(0 if causal else n)
            own += n
        start = own
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~seen, -torch.inf)
    want = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    row = {"pixel_values": torch.zeros(1, 1), "image_grid_thw": torch.ones(1, 3, dtype=torch.long)}
    prompts = [row | {"prompt_ids": [0] * P, "position_ids": torch.arange(P).expand(3, -1),
                      "completions": [g.Completion([0] * n, None, True) for n in ns]} for P, *ns in groups]  # fmt: skip
    attend, ends = g.pack_groups(prompts, "cpu").attend, torch.tensor([0, *sizes]).cumsum(0).int()
    for kind in (torch.Tensor, OnCuda):
        qkv = [x.as_subclass(kind) for x in (q, k, v)]
        if causal == "groups":
            got = attend(0, *qkv, 0.3)
        else:
            got = g.attend_sequences(*qkv, 0.3, (ends, max(sizes)), causal=causal)
        assert torch.allclose(got.as_subclass(torch.Tensor), want), kind
