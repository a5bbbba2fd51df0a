"""--plan: its FLOPs, bytes and counts against what torch, DeepSpeed and the rollout really do, on tiny models."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.masking_utils import sdpa_mask

import train_grpo
import train_sft as t

TOWERS = {
    Qwen2VLConfig: dict(embed_dim=96, mlp_ratio=3, hidden_size=128),
    Qwen2_5_VLConfig: dict(hidden_size=96, intermediate_size=288, out_hidden_size=128, window_size=112,
                           fullatt_block_indexes=[1]),
    Qwen3VLConfig: dict(hidden_size=96, intermediate_size=288, out_hidden_size=128, deepstack_visual_indexes=[0, 1],
                        num_position_embeddings=64),
}  # fmt: skip
GRIDS = [(12, 22), (8, 14)]  # patches of the two images; windows of 8 x 8 do not fit evenly


def tiny_config(family):
    text = dict(vocab_size=300, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]})  # fmt: skip
    text |= {"head_dim": 48} if family is Qwen3VLConfig else {}  # there heads are wider than the hidden states
    text["rope_parameters"]["mrope_section"] = [8, 8, 8] if family is Qwen3VLConfig else [4, 6, 6]
    tower = dict(depth=3, num_heads=3, patch_size=14, spatial_merge_size=2) | TOWERS[family]
    return family(text_config=text, vision_config=tower, image_token_id=5, video_token_id=6, vision_start_token_id=7,
                  vision_end_token_id=8, tie_word_embeddings=family is Qwen2VLConfig)  # fmt: skip


@pytest.fixture(params=TOWERS, ids=lambda family: family.model_type)
def family(request):
    return request.param


def build(family, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_config(family), dtype=dtype)
    AttentionInterface.register("packed", t.packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)
    model.set_attn_implementation({"text_config": "packed", "vision_config": "sdpa"})
    return model.train()


def item(grid, completions, text=30, dtype=torch.float32):
    """What `pack` takes: a prompt with an image of rows x columns patches and `text` more tokens."""
    rows, columns = grid
    ids = [7] + [5] * (rows * columns // 4) + [8] + [9] * (text - 2)
    inputs = {
        "prompt_ids": ids,
        "position_ids": t.rope_positions(ids, (1, rows, columns), 5, 2),
        "pixel_values": torch.randn(rows * columns, 3 * 2 * 14 * 14, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }
    return inputs, [[10 + i] * n for i, n in enumerate(completions)]


def score(model, row):
    """Log-probs of a packed row; as CompletionLogProbs, for all three families."""
    features = model.model.get_image_features(row.pixel_values, row.image_grid_thw, return_dict=True)
    hidden = model.model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=torch.ones(1, 1, 1, 1),  # taken as it is, and ignored
        mm_encoder_outputs={"image": features},
        use_cache=False,
        row=row,
    ).last_hidden_state[0]
    return t.CompletionLogProbs(model).score(hidden[row.at], row.targets)


def counted(model, row, backward):
    """(FLOPs with weights, FLOPs of attention) as torch counts them; its plain attention computes whole rectangles."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logps = score(model, row)
        if backward:
            logps.sum().backward()
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert set(by_op) <= {"aten.mm", "aten.addmm", "aten.convolution", "aten.convolution_backward", "aten.bmm"}
    attention = by_op.pop("aten.bmm")
    return sum(by_op.values()), attention


def without(sizes, *names):
    return SimpleNamespace(**vars(sizes) | dict.fromkeys(names, 0))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_flops_equal_those_torch_counts(family, frozen):
    model = build(family)
    model.model.visual.requires_grad_(not frozen)
    row = t.pack([item(GRIDS[0], [12, 7, 20]), item(GRIDS[1], [9])], "cpu")
    sizes, times = t.model_sizes(model), 1 if frozen else 3
    rectangles = sum(n * n + sum(c * (n + c) for c in completions) for _, n, completions in row.spans)
    tokens, scored = row.input_ids.numel(), len(row.at)
    weights_only, attention_only = without(sizes, "width"), without(sizes, "blocks", "mergers", "patch_embed")

    weights, attention = counted(model, row, backward=False)
    assert weights == t.decoder_flops(sizes, tokens, 0, scored) + sum(t.vision_flops(weights_only, *g) for g in GRIDS)
    tower = sum(t.vision_flops(attention_only, *g) for g in GRIDS)
    assert attention == t.decoder_flops(sizes, 0, rectangles, 0) + tower

    weights, attention = counted(model, row, backward=True)
    assert weights == 3 * t.decoder_flops(sizes, tokens, 0, scored) + sum(
        t.vision_flops(weights_only, *g, trained=not frozen) for g in GRIDS
    )
    assert attention == 3 * t.decoder_flops(sizes, 0, rectangles, 0) + times * tower
    # what the trainers report differs in one thing: a token attends to the tokens before it, not to the rectangle
    unseen = rectangles - t.attended_pairs(row.spans)
    assert t.train_flops(model, row) == weights + attention - 3 * t.decoder_flops(sizes, 0, unseen, 0)


def test_attended_pairs_equal_a_count_of_the_mask():
    spans, pairs = [(0, 5, [3, 1, 4]), (13, 6, [])], 0
    for _, n, completions in spans:
        prompt = [("prompt", i) for i in range(n)]
        for who, length in [("prompt", n), *enumerate(completions)]:
            own = prompt if who == "prompt" else [(who, i) for i in range(length)]
            for i in range(length):
                pairs += sum(w == who and j <= i or w == "prompt" != who for w, j in {*prompt, *own})
    assert t.attended_pairs(spans) == pairs


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_activations_equal_what_autograd_saves(family, checkpointing, tmp_path):
    """In bf16 within 15 %: the packed attention of a CPU keeps copies that the CUDA kernel does without."""
    model = build(family, torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    row = t.pack([item((16, 28), [90, 60, 70], dtype=torch.bfloat16)], "cpu")
    saved = t.saved_bytes(lambda: score(model, row), *model.parameters())
    tiny_config(family).save_pretrained(tmp_path)
    decoder, tower, again = t.activation_bytes(t.meta_model(tmp_path), row.spans[0], 16 * 28, checkpointing)
    logits = 4 * len(row.at) * 300
    assert decoder + tower + logits == pytest.approx(saved, rel=0.15)
    assert bool(again) == checkpointing


ENGINE = """
import gc, json, sys, torch
import torch.distributed as dist
sys.path[:0] = ["ROOT", "ROOT/tests"]
import train_sft as t
from test_plan import build, item, Qwen2VLConfig

args = t.parse_args(["--model", "x", "--data", "x", "--output_dir", "x", "--deepspeed", sys.argv[1]])
rank, world_size, device = t.init_dist()
model = build(Qwen2VLConfig, torch.bfloat16)
row = t.pack([item((8, 14), [9], dtype=torch.bfloat16)], "cpu")
model.model.visual.requires_grad_(False)
engine = t.start_engine(t.CompletionLogProbs(model), args)

def held():
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())

found = []
for last in (False, True):
    t.backward(engine, engine(row).sum(), last)
found.append(held())
engine.step()
found.append(held())
box = [None] * world_size
dist.all_gather_object(box, found)
t.print0("held", json.dumps(box))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_gradients_and_optimizer_are_what_deepspeed_holds(stage, tmp_path):
    """Two ranks. Buckets of one element, so that the census counts no buffers."""
    zero = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    (tmp_path / "engine.py").write_text(ENGINE.replace("ROOT", str(ROOT)))
    done = run_script(tmp_path / "engine.py", tmp_path / "ds.json",
                      launcher=(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"))  # fmt: skip
    after_backward, after_step = map(max, zip(*json.loads(re.search(r"held (.*)", done.stdout)[1]), strict=True))
    tiny_config(Qwen2VLConfig).save_pretrained(tmp_path)
    args = t.parse_args(["--model", "x", "--plan", "--deepspeed", str(tmp_path / "ds.json")])
    memory = t.plan(t.meta_model(tmp_path), args, "h100", 2, stage, False).memory
    print(after_backward, after_step, memory)
    always = memory["always"]["weights"] + memory["always"]["optimizer, fp32"]
    gradients = {**memory["always"], **memory["train"]}["gradients"]
    assert after_step == pytest.approx(always + (gradients if stage == 3 else 0), rel=0.05)


def grpo_args(*flags):
    return train_grpo.parse_args(["--model", "x", "--plan", *map(str, flags)])


def test_kv_cache_and_logits_are_those_of_the_rollout(tmp_path):
    model = build(Qwen2VLConfig, torch.bfloat16).eval()
    prompts = [item((8, 8), [], text=t.PLAN_TEXT, dtype=torch.bfloat16)[0] for _ in range(3)]
    with torch.no_grad():
        state = train_grpo.prefill(model, prompts, [["a", "b"]] * 3, 300, {})
        state = train_grpo.widen(state, 300)
    tiny_config(Qwen2VLConfig).save_pretrained(tmp_path)
    args = grpo_args("--max_pixels", 16 * 28 * 28, "--num_generations", 2, "--max_completion_length", 300,
                     "--train_batch_size", 3)  # fmt: skip
    rollout = t.plan(t.meta_model(tmp_path), args, "h100", 1, 2, False).memory["rollout"]
    assert rollout["KV cache"] == sum(x.nbytes for layer in state.prompt_kv + state.own_kv for x in layer)
    old = train_grpo.widen(train_grpo.replace(state, own_kv=[[x[:, :, :0] for x in y] for y in state.own_kv]), 256)
    assert rollout["KV cache, old copy"] == sum(x.nbytes for layer in old.own_kv for x in layer)
    assert rollout["logits, probabilities"] == 4 * state.logits.nbytes


def test_parameters_are_the_published_numbers():
    for name, billions in (("2b", 2.21), ("7b", 8.29)):
        model = t.meta_model(ROOT / "tests" / "configs" / f"qwen2-vl-{name}")
        assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions
