"""--plan: its FLOPs, bytes and counts against what torch, DeepSpeed and the rollout really do, on tiny models."""

import json
import re
import sys
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TWO_RANKS, run_script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

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


def counted(model, row, backward):
    """(FLOPs with weights, FLOPs of attention) as torch counts them; its plain attention computes whole rectangles."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logps = t.CompletionLogProbs(model)(row)
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


def peak_bytes(call):
    """Most bytes that call() holds at once, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_activations_are_what_autograd_saves_and_the_peak_of_a_pass(family, checkpointing, tmp_path):
    """In bf16. The packed attention of a CPU keeps copies that the CUDA kernel does without: 6 % here."""
    model = build(family, torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    row = t.pack([item((32, 56), [200] * 4, dtype=torch.bfloat16)], "cpu")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    tiny_config(family).save_pretrained(tmp_path)
    decoder, tower, again = t.activation_bytes(t.meta_model(tmp_path), row.spans[0], 32 * 56, checkpointing)
    saved = t.saved_bytes(lambda: t.CompletionLogProbs(model)(row), *model.parameters())
    assert decoder + tower + 4 * len(row.at) * 300 == pytest.approx(saved, rel=0.1)  # and the fp32 logits
    lm_head = 16 * len(row.at) * 300 + 4 * 300 * 128  # as in plan_memory
    peak = peak_bytes(lambda: t.CompletionLogProbs(model)(row).sum().backward())
    assert decoder + tower + max(again, lm_head) == pytest.approx(peak, rel=0.15)
    assert bool(again) == checkpointing


def test_a_chunk_of_logits_takes_16_bytes_each():
    """lm_head and loss, forward and backward, in chunks that are computed twice."""
    head, vocab = torch.nn.Linear(64, 20000, bias=False).bfloat16(), 20000
    scorer = SimpleNamespace(model=SimpleNamespace(lm_head=head), banned=[5], temperature=1.0)
    hidden, targets = torch.randn(800, 64, dtype=torch.bfloat16, requires_grad=True), torch.arange(800) + 6

    def call():
        chunks = zip(hidden.split(200), targets.split(200), strict=True)
        score = partial(checkpoint, t.CompletionLogProbs.score, scorer, use_reentrant=False)
        torch.cat([score(h, ids) for h, ids in chunks]).sum().backward()

    call()
    assert 16 * 200 * vocab + 4 * vocab * 64 == pytest.approx(peak_bytes(call), rel=0.1)


ENGINE = """
import gc, json, sys, time, torch
import torch.distributed as dist
sys.path[:0] = ["ROOT", "ROOT/tests"]
import train_sft as t
from test_plan import Qwen2VLConfig, build, item

def storages():
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    return {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}

t.init_dist()
row = t.pack([item((8, 14), [9], dtype=torch.bfloat16)], "cpu")
for settings in sys.argv[1:]:
    before, found = storages(), []
    args = t.parse_args(["--model", "x", "--plan", "--deepspeed", settings])
    model = build(Qwen2VLConfig, torch.bfloat16)
    model.model.visual.requires_grad_(False)
    engine = t.start_engine(t.CompletionLogProbs(model), args)
    for call in (lambda: t.backward(engine, engine(row).sum(), True), engine.step):
        call()
        counts = []
        for _ in range(20):  # a thread of gloo may hold the last bucket a moment longer
            counts.append(sum(s.nbytes() for key, s in storages().items() if key not in before))
            time.sleep(0.05)
        found.append(min(counts))
    found.append(t.train_flops(model, row))
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, found)
    t.print0("held", json.dumps(box))
dist.destroy_process_group()
t.leave()
"""


def test_weights_gradients_and_optimizer_are_what_deepspeed_holds(tmp_path):
    """A census of the tensors of two ranks, after a backward pass and after the update."""
    settings = [tmp_path / "2.json", tmp_path / "3.json"]
    for path in settings:
        zero = {"stage": int(path.stem), "reduce_bucket_size": 4000, "stage3_param_persistence_threshold": 0}
        path.write_text(json.dumps({"zero_optimization": zero}))
    (tmp_path / "engine.py").write_text(ENGINE.replace("ROOT", str(ROOT)))
    done = run_script(tmp_path / "engine.py", *settings,
                      launcher=TWO_RANKS)  # fmt: skip
    tiny_config(Qwen2VLConfig).save_pretrained(tmp_path)
    whole = build(Qwen2VLConfig)
    whole.model.visual.requires_grad_(False)
    for path, held in zip(settings, re.findall(r"held (.*)", done.stdout), strict=True):
        backward, update, flops = map(max, zip(*json.loads(held), strict=True))
        args = t.parse_args(["--model", "x", "--plan", "--train_batch_size", "2", "--deepspeed", str(path)])
        memory = t.plan(t.meta_model(tmp_path), args, "h100", 2, int(path.stem), False).memory
        always, train = memory["always"], memory["train"]
        moments = 8 / 12 * always["optimizer, fp32"]  # made by the first update
        if path.stem == "2":
            assert backward == pytest.approx(sum(always.values()) - moments + train["gradients"], rel=0.002)
        assert update == pytest.approx(sum(always.values()), rel=0.002)
        assert flops == t.train_flops(whole, t.pack([item((8, 14), [9])], "cpu"))  # ZeRO-3 leaves empty weights


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
    assert rollout["logits, softmax"] == 4 * state.logits.nbytes


CONFIGS = "tests/configs/qwen2-vl-"


def test_parameters_are_the_published_numbers():
    for name, billions in (("2b", 2.21), ("7b", 8.29)):
        model = t.meta_model(ROOT / f"{CONFIGS}{name}")
        assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions


def test_more_gpus_than_prompts_make_the_batch_grow():
    sizes = t.model_sizes(t.meta_model(ROOT / f"{CONFIGS}2b"))
    args = grpo_args("--train_batch_size", 16)
    assert [t.plan_shape(sizes, args, n).prompts * n for n in (1, 8, 16, 64)] == [16, 16, 16, 64]


def test_table_of_the_readme_is_what_the_plan_gives():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("2b", "7b"):
        model = t.meta_model(ROOT / f"{CONFIGS}{name}")
        for script, stage in ((t, "SFT"), (train_grpo, "GRPO")):
            args = script.parse_args(["--model", "x", "--plan"])
            peaks = [t.plan(model, args, "h100", 8, *kind).peak / 1e9 for kind in ((2, 0), (2, 1), (3, 0), (3, 1))]
            assert f"| {name.upper()}, {stage} | " + " | ".join(f"{p:.1f}" for p in peaks) + " |" in readme


def test_example_of_the_readme_is_what_the_command_prints(monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## Before you queue")[1]
    _, command, _, example, *_ = (part.strip("\n") for part in readme.split("```"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command.split("#")[0].split()[2:])
    train_grpo.main()
    assert example.count("\n") > 2 and set(example.split("\n")) <= set(capsys.readouterr().out.split("\n"))


def test_plan_says_in_one_line_what_is_wrong(capsys):
    with pytest.raises(SystemExit, match="--plan 8xb100: no such GPU; want one of a100, h100, h200, as in 8xh100"):
        t.print_plan(t.parse_args(["--model", "x", "--plan", "8xb100"]))
    with pytest.raises(SystemExit):
        t.parse_args(["--model", "x"])
    assert "the following arguments are required: --data, --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--zero_stage", 1), ("--dtype", "float32")])
def test_what_is_not_planned_is_refused(flags):
    model = ROOT / "tests/configs/qwen2-vl-2b"
    done = run_script("train_sft.py", "--model", model, "--plan", *flags, check=False)
    assert (
        done.returncode != 0 and "it knows ZeRO-2 and 3 in bfloat16" in done.stderr and "Traceback" not in done.stderr
    )
