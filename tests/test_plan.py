"""tools/plan.py: its FLOPs, bytes and sums beside what torch really does, on tiny models."""

import importlib
import re
import sys
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, ROOT, build_tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

sys.path.insert(0, str(ROOT / "tools"))
import plan as t  # noqa: E402

def row(model, grid, spans):
    """What a model takes for a prompt with an image of rows x columns patches, packed with its completions."""
    vision, (rows, columns), tokens = model.config.vision_config, grid, sum(spans)
    ids = torch.full((1, tokens), 9)
    ids[:, 1 : 1 + rows * columns // 4] = model.config.image_token_id
    pixels = torch.randn(rows * columns, 6 * vision.patch_size**2, dtype=model.dtype)
    return dict(input_ids=ids, position_ids=torch.arange(tokens).expand(3, 1, tokens), use_cache=False,
                pixel_values=pixels, image_grid_thw=torch.tensor([[1, rows, columns]]))  # fmt: skip

@pytest.mark.parametrize("family", FAMILIES)
def test_flops_equal_those_torch_counts(family):
    """Torch's plain attention computes whole squares, also of tokens that are not seen."""
    model, grid, tokens = build_tiny(family)[0].train(), (12, 22), 90
    for trained in (True, False):
        model.model.visual.requires_grad_(trained)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            logits = model(**row(model, grid, [tokens])).logits
            forward = counter.get_total_flops()
            logits.sum().backward()
        decoder = t.decoder_flops(s := t.model_sizes(model), tokens, tokens**2, tokens)
        assert forward == decoder + t.vision_flops(s, *grid)
        assert counter.get_total_flops() == 3 * decoder + t.vision_flops(s, *grid, trained=trained)

def attend(module, query, key, value, attention_mask, scaling=None, spans=(), **kwargs):
    """Keeps what attention of a packed row keeps: copies of the prompt's keys and values for each completion."""
    (q, *prompt), *rest = zip(*(x.split(spans, 2) for x in (query, key, value)), strict=True)
    parts = [(q, *(x.clone() for x in prompt))]
    parts += [(q, *(torch.cat(x, 2) for x in zip(prompt, own, strict=True))) for q, *own in rest]
    return torch.cat([F.scaled_dot_product_attention(*x, enable_gqa=True) for x in parts], 2).transpose(1, 2), None

def peak_bytes(call):
    """Most bytes that call() holds at once, beside what was there before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))

@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_saves_and_the_peak_of_a_pass(family, checkpointing, family_dirs):
    model, spans, grid = build_tiny(family)[0].bfloat16().train(), (500, 200, 200, 200, 200), (32, 56)
    AttentionInterface.register("attend", attend)
    model.set_attn_implementation({"text_config": "attend"})
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = row(model, grid, spans)
    call = partial(model.model, **inputs, spans=spans)
    decoder, tower, again = t.activation_bytes(t.meta_model(family_dirs[family]), spans, 32 * 56, checkpointing)
    assert decoder + tower == pytest.approx(t.saved_bytes(call, *model.parameters()), rel=0.05)
    there = inputs["pixel_values"].nbytes - sum(p.nbytes for p in model.parameters())  # pixels; gradients are new
    peak = peak_bytes(lambda: call().last_hidden_state.sum().backward()) + there
    assert decoder + tower + again == pytest.approx(peak, rel=0.15)

def test_a_chunk_of_logits_takes_16_bytes_each():
    """lm_head and log-probs, forward and backward, computed twice."""
    head, hidden = torch.nn.Linear(8, 20000, bias=False).bfloat16(), torch.randn(200, 8).bfloat16().requires_grad_()
    def score(hidden):
        logits = head(hidden).float().index_fill(-1, torch.tensor([5]), float("-inf")) / 0.8
        return logits[:, 7] - logits.logsumexp(-1)
    peak = peak_bytes(lambda: torch.utils.checkpoint.checkpoint(score, hidden, use_reentrant=False).sum().backward())
    assert t.LOGIT * 200 * 20000 == pytest.approx(peak, rel=0.1)

def test_table_has_every_model_and_the_numbers_of_a_plain_sum(tmp_path, capsys):
    """7B, GRPO, one GPU, checkpointing and offload: rows of 8,192 tokens, or 3 groups of 640 + 4 x 512, on 4 images.
    And the published numbers of weights: half the bytes of their files."""
    sizes = {path.name: t.model_sizes(t.meta_model(path)) for path in (ROOT / "tests/configs").iterdir()}
    assert sorted(s.weights for s in sizes.values()) == [2208985600, 3754622976, 4437815808, 8291375616, 8767123696]
    (tmp_path / "7b").symlink_to(ROOT / "tests/configs/qwen2-vl-7b")
    t.print_table(t.parse_args(["table", "--configs", str(tmp_path)]))
    n, largest, tokens, patches = 8291375616, 152064 * 3584, 8192, 2048
    kept = 28 * tokens * 3584 * 2 + tokens * 3584 * 6 + 4 * 32 * patches * 1280 * 2  # inputs of layers, a norm, tower
    # weights; the largest gradient on its way to the host; two buckets; the norm of the largest gradient in fp64
    gpu, host = 2 * n + 2 * largest + 4 * 560_000_000 + kept + 8 * largest, 18 * n + 2 * n + 2 * largest
    cell = re.search(r"7b, GRPO .*?\| .*?\| C O ([\d.]+), RAM (\d+) \|", capsys.readouterr().out)
    assert float(cell[1]) == pytest.approx(gpu / 1e9, rel=0.007) and int(cell[2]) == round(host / 1e9)
    s = sizes["qwen2-vl-7b"]  # known: KV of a token, bytes read to decode one, FLOPs of 1,024 tokens, of 500 visual
    assert 4 * s.layers * s.key == 57344 and 2 * (s.body + s.vocab * s.hidden) == pytest.approx(14.14e9, rel=1e-3)
    assert t.decoder_flops(s, 1024, t.attended_pairs(1024), 0) == pytest.approx(13.58e12, rel=1e-3)
    assert t.vision_flops(s, 40, 50) == pytest.approx(3.22e12, rel=0.01) and t.attended_pairs(3, 2, 1) == 6 + 4 + 5 + 4

def test_flags_and_bucket_are_those_of_the_trainers():
    for run in ("sft", "grpo"):
        script, ours = importlib.import_module(f"train_{run}"), vars(t.parse_args([run, "--model", "x"]))
        theirs = vars(script.parse_args("--model x --data x --output_dir x".split()))
        same = {flag for flag in theirs.keys() & ours.keys() if theirs[flag] is not None} - {"model"}
        assert len(same) >= 4 and {flag: ours[flag] for flag in same} == {flag: theirs[flag] for flag in same}
    assert f'"reduce_bucket_size": {t.BUCKET}' in (ROOT / "ds_config.json").read_text("utf-8")
