"""What a training run needs, before it is queued: memory of a GPU, host RAM, disk, and the least time of a step.

  python tools/plan.py grpo --model Qwen/Qwen2-VL-7B-Instruct --gpus 8xh100     with the flags of train_grpo.py
  python tools/plan.py sft --model tests/configs/qwen2-vl-2b --gpus 1xrtx4090 --offload
  python tools/plan.py table                                                    what fits where, as Markdown

Reads the model's config alone: no weights, no data, no GPU. GB are 10^9 bytes, for rows as long as the flags let them
be, without the CUDA context, NCCL and fragmentation, to which a tenth of the card is left. Seconds are lower bounds at
the peaks of the data sheet, for full-length completions. Activations are what autograd keeps of one layer on meta
tensors; what DeepSpeed 0.19 holds is read from its sources. A group: a prompt of P tokens, G completions of C tokens.
"""

import argparse
import math
import re
from collections import namedtuple
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText

# Data sheets: bytes of memory, its bytes/s, dense bf16 FLOP/s with fp32 sums (half of the figure with sparsity), and
# bytes/s one way to the GPUs of the node (NVLink, else PCIe), to the host, and out of the node (DGX; else 400 Gb/s)
Card = namedtuple("Card", "memory hbm flops link pcie network")
CARDS = {
    "a100": Card(80e9, 2.039e12, 312e12, 300e9, 32e9, 25e9),
    "h100": Card(80e9, 3.35e12, 989e12, 450e9, 64e9, 50e9),
    "h200": Card(141e9, 4.8e12, 989e12, 450e9, 64e9, 50e9),
    "l40s": Card(48e9, 0.864e12, 362e12, 32e9, 32e9, 50e9),
    "a6000": Card(48e9, 0.768e12, 154.8e12, 32e9, 32e9, 50e9),
    "rtx4090": Card(24e9, 1.008e12, 165.2e12, 32e9, 32e9, 50e9),
    "rtx3090": Card(24e9, 0.936e12, 71e12, 32e9, 32e9, 50e9),
}
BUCKET, LOGIT = 560_000_000, 16  # reduce_bucket_size of ds_config.json; bytes of a logit, forward and backward
TEXT, ANSWER = 128, 512  # tokens that no flag tells: of a prompt beside its image; of an answer in SFT


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add, on_off = p.add_argument, argparse.BooleanOptionalAction
    # fmt: off
    add("run", choices=["grpo", "sft", "table"], help="the trainer whose run is planned; table: what fits where")
    add("--model", help="a Hugging Face folder or name")
    add("--configs", default=Path(__file__).parents[1] / "tests/configs", type=Path, help="table: folder of the models")
    add("--gpus", default="8xh100", help=f"how many of which: {', '.join(CARDS)}")
    add("--offload", action="store_true", help="optimizer on the CPU: offload_optimizer in ds_config.json")
    add("--data_rows", type=int, default=1000, help="rows of --data, for the time of the paper's epochs")
    # the trainers' own
    add("--max_pixels", type=int, default=401408, help="pixel cap of an image")
    add("--max_prompt_length", type=int, default=4096, help="tokens (grpo)")
    add("--max_length", type=int, default=4096, help="tokens of a row (sft)")
    add("--num_generations", type=int, default=4, help="G (grpo)")
    add("--max_completion_length", type=int, default=512, help="C (grpo)")
    add("--rollout_batch_size", type=int, default=256, help="completions decoded at once on one rank (grpo)")
    add("--beta", type=float, default=0.0, help="above 0 a reference model is held (grpo)")
    add("--num_iterations", type=int, default=1, help="updates per rollout (grpo)")
    add("--train_batch_size", type=int, default=16, help="prompts (grpo) or sequences (sft) per step over all ranks")
    add("--tokens_per_row", type=int, help="tokens of a forward pass (default: 8192 for grpo, 4096 for sft)")
    add("--freeze_vision", action=on_off, help="vision tower and merger (default: on for sft, off for grpo)")
    add("--gradient_checkpointing", action=on_off, default=False)
    add("--zero_stage", type=int, choices=[2, 3], default=2, help="3 shards the weights too")
    add("--save_total_limit", type=int, default=2, help="checkpoints kept")
    # fmt: on
    args, ignored = p.parse_known_args(argv)  # other flags of the trainers: they are named
    found, sft = re.fullmatch(r"([1-9]\d*)x(\w+)", args.gpus), args.run == "sft"
    if not found or found[2] not in CARDS or not (args.model or args.run == "table"):
        p.error(f"want --model, and --gpus with one of {', '.join(CARDS)}, as in 8xh100; it is {args.gpus}")
    args.num_gpus, args.card, args.ignored = int(found[1]), CARDS[found[2]], ignored
    args.tokens_per_row = args.tokens_per_row or (4096 if sft else 8192)
    args.freeze_vision = sft if args.freeze_vision is None else args.freeze_vision
    return args


def run_sizes(model, args):
    """What a rank computes in a step, if completions have full length and rows are as long as the flags let them be."""
    trained = [p.numel() for name, p in model.named_parameters() if not (args.freeze_vision and ".visual." in name)]
    r = SimpleNamespace(**vars(model_sizes(model)), trained=sum(trained), largest=max(trained), n=args.num_gpus)
    r.grpo, r.zero3, r.share, held, start = args.run == "grpo", args.zero_stage == 3, r.trained / r.n, [0] * r.n, 0
    for size in trained:  # ZeRO-2: who owns a slice of a tensor keeps its whole gradient
        for rank in range(int(start / r.share), int((start + size - 1) / r.share) + 1):
            held[rank] += size
        start += size
    r.held, r.image = max(held), args.max_pixels // (r.patch * r.merge) ** 2  # tokens
    high = next(i for i in range(math.isqrt(r.image), 0, -1) if r.image % i == 0)
    r.grid = high * r.merge, r.image // high * r.merge  # patches
    r.G, r.C = (args.num_generations, args.max_completion_length) if r.grpo else (1, ANSWER)
    r.P = min(r.image + TEXT, args.max_prompt_length) if r.grpo else r.image + TEXT
    r.span, r.group = (r.P, *[r.C] * r.G) if r.grpo else (r.P + r.C,), r.P + r.G * r.C
    r.prompts = -(-args.train_batch_size // r.n)  # of a rank, which takes at least one
    r.passes = -(-r.prompts // max(1, args.tokens_per_row // r.group))
    longest = r.group if r.grpo else args.max_length  # SFT lets longer rows in than the usual
    r.row = min(r.prompts * longest, max(args.tokens_per_row, longest))
    r.images, r.scored = min(r.prompts, -(-r.row // r.group)), r.row * r.G * r.C // r.group  # tokens lm_head sees in it
    r.chunk = max(1, 2**26 // r.vocab)  # of them the trainers take at once
    r.together = min(r.prompts, max(1, args.rollout_batch_size // r.G))  # prompts that are decoded at once
    r.decoded, r.kv = r.together * r.G, 4 * r.layers * r.key  # bytes of a token's key and value
    return r


def gpu_memory(model, args):
    """{phase: {item: bytes}} of a GPU in bf16, optimizer and logits in fp32; a phase needs "always" and its own."""
    r, offload, zero2 = run_sizes(model, args), args.offload, args.zero_stage == 2
    decoder, tower, again = activation_bytes(model, r.span, math.prod(r.grid), args.gradient_checkpointing)
    norm = 8 * (min(r.largest, r.share) if zero2 else r.largest / r.n)  # of the largest gradient, in fp64
    logits = LOGIT * r.vocab * min(r.scored, r.chunk)  # of a chunk
    memory = {
        "always": {
            "weights": 2 * r.weights / (1 if zero2 else r.n),
            "optimizer": 12 * r.share * (not offload),
            "reference model": 2 * r.weights * (args.beta > 0),
            "gradients": 2 * r.share * (r.zero3 and not offload),
            "bucket": 2 * BUCKET * r.zero3,
            "largest gradient": 2 * r.largest * (zero2 and offload),  # on its way to the host
        },
        "rollout": {
            "weights gathered": 2 * r.weights * r.zero3,
            "KV cache": (r.together * r.P + r.decoded * r.C) * r.kv,
            "KV cache, old copy": r.decoded * ((r.C - 1) // 256 * 256) * r.kv,  # while the cache is widened
            "logits, softmax": 4 * r.decoded * r.vocab * 4,
            "prefill's widest layer": r.together * r.P * 3 * r.mlp * 2,
        },
        "train": {
            "gradients": 2 * r.held * min(r.passes, 2) * (zero2 and not offload),  # their sum, and the newest
            "two buckets": 2 * 2 * BUCKET * zero2,  # overlap_comm
            "layers gathered": 2 * min(r.weights, 1e9) * r.zero3,  # stage3_max_live_parameters
            "activations, decoder": decoder * r.row / r.group,
            "activations, vision": tower * r.images * (not args.freeze_vision),
            "lm_head, or a layer": max(logits + 4 * r.vocab * r.hidden, again * r.row / r.group, norm * offload),
        },
        "update": {  # gradients are flattened, then made fp32; ZeRO-3 takes 10^9 values at a time (sub_group_size)
            "gradients": 2 * r.share * (zero2 and not offload),
            "gradients in fp32": max(6 * (r.share if zero2 else min(r.share, 1e9)), norm) * (not offload),
        },
    }
    return {phase: items for phase, items in memory.items() if phase != "rollout" or r.grpo}


def least_seconds(model, args):
    """{phase: seconds} of a step at the peaks of the GPU; what the CPU computes is not counted."""
    r, card, updates, frozen = run_sizes(model, args), args.card, args.num_iterations, args.freeze_vision
    rollouts, scored = -(-r.prompts // r.together) * r.grpo, r.prompts * r.G * r.C
    look, head = r.prompts * vision_flops(r, *r.grid), 2 * r.vocab * r.hidden * scored
    forward = decoder_flops(r, r.prompts * r.group, r.prompts * attended_pairs(*r.span), scored)
    train = 3 * forward + (not frozen) * r.prompts * vision_flops(r, *r.grid, trained=True)
    train += look * (frozen and not r.grpo)  # GRPO keeps what the frozen tower said in the rollout
    train += (forward - head + look * (not frozen)) * args.gradient_checkpointing + head * (r.scored > r.chunk)
    train += (forward + look * (not frozen)) * (args.beta > 0)  # the reference model
    prefill = decoder_flops(r, r.prompts * r.P, r.prompts * attended_pairs(r.P), r.prompts)
    token = decoder_flops(r, r.decoded, r.decoded * (r.P + r.C / 2), r.decoded) / card.flops
    read = 2 * (r.body + r.vocab * r.hidden) + (r.together * r.P + r.decoded * r.C / 2) * r.kv
    # bytes: gradients after every pass; weights after the update, by ZeRO-3 twice a pass and once for all rollouts
    moved = updates * 2 * ((r.trained + 2 * r.weights) * r.passes if r.zero3 else r.trained * (r.passes + 1))
    moved += 2 * r.weights * (r.zero3 and r.grpo)
    link = card.link if r.n <= 8 else min(card.link, 8 * card.network)  # 8 GPUs a node
    # 16 bytes read, 14 written; or over PCIe: fp32 gradients down, bf16 weights up, before that sums both ways
    optimizer = (6 + 4 * (r.passes - 1)) * r.share / card.pcie if args.offload else 30 * r.share / card.hbm
    return {
        "vision": look / card.flops * r.grpo,
        "prefill": prefill / card.flops * r.grpo,
        "decode": rollouts * r.C * max(token, read / card.hbm),
        "train": updates * train / card.flops,
        "optimizer": updates * optimizer,
        "communication": moved * (r.n - 1) / r.n / link,
    }


def plan(model, args, **changes):
    """All that a run needs, with some of its flags changed: bytes, and the least seconds of a step."""
    args = argparse.Namespace(**vars(args) | changes)
    r, memory, seconds = run_sizes(model, args), gpu_memory(model, args), least_seconds(model, args)
    always, *phases = (sum(items.values()) for items in memory.values())
    peak, limit = always + max(phases), args.card.memory
    fits = "fits" if peak < 0.9 * limit else "tight" if peak < limit else "too large"
    step = sum(seconds.values()) - min(seconds["train"], seconds["communication"])  # at best the two overlap
    buffers = 0 if r.zero3 else 2 * r.held * (r.passes > 1) + 2 * r.largest  # the sum of earlier passes, one gradient
    host = min(r.n, 8) * (18 * r.share + buffers) * args.offload  # fp32 master, two moments, gradients; bf16 weights
    # the engine's files, where ZeRO-3 leaves out the trained weights, and the export; one more while it is written
    final, checkpoint = 2 * r.weights, 12 * r.trained + 4 * r.weights - 2 * r.trained * r.zero3
    kept, largest = args.save_total_limit + 1, (14 if r.zero3 else 16) * r.weights  # GRPO's, whose tower is trained
    disk = checkpoint, final, kept * checkpoint + final, kept * largest + 3 * final  # both SFT have left their final/
    return SimpleNamespace(memory=memory, peak=peak, fits=fits, seconds=seconds, step=step, host=host, disk=disk)


def print_plan(args):
    model, limit = meta_model(args.model), args.card.memory / 1e9
    r, now = run_sizes(model, args), plan(model, args)
    kinds = {"ZeRO-2": (2, False), "+ checkp.": (2, True), "ZeRO-3": (3, False), " + checkp.": (3, True)}
    plans = [plan(model, args, zero_stage=stage, gradient_checkpointing=on) for stage, on in kinds.values()]
    print(f"{args.model}: {r.weights / 1e9:.2f} B parameters, {args.gpus}{', optimizer on the CPU' * args.offload}")
    print(f"{r.prompts} prompts a GPU, of {r.P} tokens, {r.image} of them of the image; {r.G} x {r.C} of completion")
    print("flags not looked at:", *args.ignored or ["none"])
    lines = {f"rows of up to {r.row} tokens": kinds}
    for phase, items in now.memory.items():
        lines |= {f"{phase:8} {item:24} GB": [p.memory[phase][item] / 1e9 for p in plans] for item in items}
    lines |= {f"{'peak':33} GB": [p.peak / 1e9 for p in plans], f"of {limit:.0f} GB": [p.fits for p in plans]}
    lines |= {f"{phase:34} s": [p.seconds[phase] for p in plans] for phase in now.seconds}
    for name, values in (lines | {f"{'step, at least':34} s": [p.step for p in plans]}).items():
        if any(values):
            print(f"{name:36}" + "".join(f"{v:>12}" if isinstance(v, str) else f"{v:12.3f}" for v in values))
    checkpoint, final, most, whole = (size / 1e9 for size in now.disk)
    print(f"disk: a checkpoint {checkpoint:.1f} GB, final/ {final:.1f} GB, a whole run_all.sh at most {whole:.0f} GB")
    how = f"ZeRO-{args.zero_stage}{', checkpointing' * args.gradient_checkpointing}{', offload' * args.offload}"
    seen = args.data_rows * (2 if r.grpo else 1)  # epochs
    steps = math.ceil(seen / r.prompts / r.n)
    print(f"as started: {args.gpus}, {how}: {now.peak / 1e9:.1f} of {limit:.0f} GB a GPU ({now.fits}), host RAM "
          f"{now.host / 1e9:.0f} GB, disk {most:.0f} GB; {args.data_rows} rows: {seen * r.group / 1e6:.1f} M tokens, "
          f"{steps} steps, at least {steps * now.step / 60:.1f} min")  # fmt: skip


MACHINES = {"1 x 24 GB": "1xrtx4090", "1 x 48 GB": "1xl40s", "1 x 80 GB": "1xa100", "8 x 80 GB": "8xh100"}
FLAGS = {"C": ("gradient_checkpointing", True), "Z": ("zero_stage", 3), "O": ("offload", True)}
LADDER = ("", "C", "Z", "C Z", "O", "C O", "C O Z")  # what to try, in this order


def print_table(args):
    """Per model and machine the first step of the ladder that fits, with its GB; else "no", with the fewest GB."""
    print(f"| at the defaults | {' | '.join(MACHINES)} |\n|---|{'---|' * len(MACHINES)}")
    models = {path.name: meta_model(path) for path in args.configs.iterdir()}
    models = sorted(models.items(), key=lambda item: model_sizes(item[1]).weights)
    for name, model, run in ((*item, run) for item in models for run in ("sft", "grpo")):
        cells = []
        for gpus in MACHINES.values():
            own = parse_args([run, "--model", name, "--gpus", gpus])
            steps = [step for step in LADDER if own.num_gpus > 1 or "Z" not in step]
            plans = {step: plan(model, own, **dict(FLAGS[x] for x in step.split())) for step in steps}
            step = next((step for step, p in plans.items() if p.fits == "fits"), "no")
            found = plans.get(step) or min(plans.values(), key=lambda p: p.peak)
            cells.append(f"{step or 'plain'} {found.peak / 1e9:.1f}" + f", RAM {found.host / 1e9:.0f}" * ("O" in step))
        print(f"| {name}, {run.upper()} | {' | '.join(cells)} |")
    print("\nGB a GPU; C: --gradient_checkpointing, Z: --zero_stage 3, O: optimizer on the CPU, with GB of host RAM")


# ==== plumbing: sizes of a model, FLOPs, activations ====
def meta_model(path):
    """Any Qwen-VL without weights, from its config."""
    AttentionInterface.register("plan", plan_attention)
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="plan")


def model_sizes(model):
    """Widths, and numbers of weights that multiply an input; from the modules, because each family's config has its own
    names. Qwen2.5-VL attends in windows in most blocks of its tower, Qwen3-VL has a merger for some of them."""
    text, visual, vision = model.model.language_model, model.model.visual, model.config.vision_config
    depth, config, layer, kinds = len(visual.blocks), text.config, text.layers[0], (torch.nn.Linear, torch.nn.Conv3d)
    matrices = {name: m.weight.numel() for name, m in model.model.named_modules() if isinstance(m, kinds)}
    parts = {"body": ".layers.", "patch_embed": ".patch_embed.", "blocks": ".blocks.", "mergers": "merger"}
    sums = {part: sum(n for name, n in matrices.items() if key in name) for part, key in parts.items()}
    return SimpleNamespace(
        **sums, weights=sum(p.numel() for p in model.parameters()), layers=len(text.layers), hidden=config.hidden_size,
        vocab=config.vocab_size, query=layer.self_attn.q_proj.out_features, key=layer.self_attn.k_proj.out_features,
        mlp=layer.mlp.gate_proj.out_features, width=visual.blocks[0].attn.proj.in_features, depth=depth,
        full=len(getattr(vision, "fullatt_block_indexes", range(depth))), merge=vision.spatial_merge_size,
        window=getattr(vision, "window_size", vision.patch_size) // vision.patch_size, patch=vision.patch_size,
    )  # fmt: skip


def attended_pairs(prompt, *completions):
    """How many (token, token it sees) a prompt with its completions has."""
    return prompt * (prompt + 1) // 2 + sum(c * prompt + c * (c + 1) // 2 for c in completions)


def decoder_flops(sizes, tokens, pairs, scored):
    """Forward pass: 2 per weight and token, 4 per pair and width (scores and sum); `scored` tokens through lm_head."""
    weights = sizes.body * tokens + sizes.vocab * sizes.hidden * scored
    return 2 * weights + 4 * sizes.layers * sizes.query * pairs


def vision_flops(sizes, rows, columns, trained=False):
    """Forward pass over an image of rows x columns patches, or forward and backward if trained."""
    patches, side = rows * columns, sizes.window
    high, wide = (n // side * side**2 + (n % side) ** 2 for n in (rows, columns))  # squares of the windows' sides
    pairs = sizes.full * patches**2 + (sizes.depth - sizes.full) * high * wide
    flops = 2 * patches * (sizes.blocks + sizes.mergers / sizes.merge**2) + 4 * sizes.width * pairs
    first = 2 * patches * sizes.patch_embed  # pixels need no gradient
    return 3 * flops + 2 * first if trained else flops + first


def saved_bytes(call, *known):
    """Bytes that call() keeps for the backward pass, without the `known` tensors."""
    kept, known = {}, {t.untyped_storage()._cdata for t in known}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for key, storage in kept.items() if key not in known)


def plan_attention(module, query, key, value, attention_mask, scaling=None, keys=slice(None), **kwargs):
    """Keeps what the CUDA kernel keeps. `keys`: indices of the decoder's keys, those of a prompt once a completion."""
    (q, k, v), ends = (x[0].transpose(0, 1) for x in (query, key, value)), query.new_empty(2, dtype=torch.int32)
    gqa = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__kwdefaults__ else {}  # torch 2.11: always
    return varlen_attn(q, k[keys], v[keys], ends, ends, len(q), len(k), **gqa)[None], None


@cache
def activation_bytes(model, span, patches, checkpointing):
    """Bytes that a group, `span` = (P, C, ...), keeps for the backward pass in decoder and vision tower, and those that
    checkpointing computes again at a time."""
    text, visual, vision = model.model.language_model, model.model.visual, model.config.vision_config
    s, tokens, weights = model_sizes(model), sum(span), list(model.parameters())
    empty = partial(torch.empty, device="meta", dtype=model.dtype)
    x, patch = (empty(*n, requires_grad=True) for n in ((1, tokens, s.hidden), (patches, s.width)))
    rope, keys = text.rotary_emb(x, empty(3, 1, tokens)), empty(tokens + span[0] * len(span[1:]), dtype=torch.long)
    angles = empty(patches, s.width // vision.num_heads, dtype=torch.float32)
    pixels = empty(patches, vision.in_channels * vision.temporal_patch_size * s.patch**2)
    read = dict(position_embeddings=rope, attention_mask=None, keys=keys)
    seen = dict(position_embeddings=(angles, angles), cu_seqlens=torch.tensor([0, patches]))
    layer = saved_bytes(lambda: text.layers[0](x, **read), *weights, *rope, keys)
    block = saved_bytes(lambda: visual.blocks[0](patch, **seen), *weights, angles)
    ends = saved_bytes(lambda: visual.merger(patch), *weights) * (1 + len(getattr(visual, "deepstack_merger_list", ())))
    ends += saved_bytes(lambda: visual.patch_embed(pixels), *weights)
    decoder, tower = (x.nbytes, patch.nbytes) if checkpointing else (layer, block)
    decoder = s.layers * decoder + saved_bytes(lambda: text.norm(x), *weights)
    return decoder, s.depth * tower + ends, max(layer, block) if checkpointing else 0


if __name__ == "__main__":
    arguments = parse_args()
    try:
        print_table(arguments) if arguments.run == "table" else print_plan(arguments)
    except OSError as e:  # no such model
        raise SystemExit(f"plan: {str(e).splitlines()[0]}") from None
