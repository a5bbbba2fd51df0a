"""Rollout of a group against transformers' generate. By hand: python tests/bench_rollout.py

One prompt with a photo (>= 512 tokens), G = 8 completions of exactly C tokens, temperature 1, same model, in turns:
`sequential`, G calls of generate, as the released trainer does; `batched`, one with num_return_sequences=G; `ours`,
and this again with --prompts prompts at once, against `batched` prompt by prompt.
"""

import tempfile
from functools import partial

import bench_tools as tools
import plain
import torch
from bench_tools import spread

import train_grpo as g


def main():
    p = tools.parser(__doc__, "rollout")
    p.add_argument("--completion_lengths", type=int, nargs="+", default=[64, 256])
    p.add_argument("--num_generations", type=int, default=8)
    p.add_argument("--prompts", type=int, default=4)
    args = p.parse_args()
    (model, *processors), plain_model = tools.build_model(args.geometry), tools.build_model(args.geometry)[0].eval()
    g.packable(model)
    g.STOP = []  # every completion has C tokens, on all sides
    G, result = args.num_generations, {"args": vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        photos, given = tools.write_photos(folder, args.prompts), (*processors, g.BOX_STYLES["qwen2_vl"])
        texts = (tools.prompt_text(processors[0], 110 + 5 * i) for i in range(args.prompts))
        prompts = [g.chat_inputs(given, *x) for x in zip(photos, texts, strict=True)]
    result["prompt_tokens"] = [len(x["prompt_ids"]) for x in prompts]

    def ours(prompts, C):
        seeds = [[f"{i}:{j}" for j in range(G)] for i in range(len(prompts))]
        return [[ids for ids, _, _ in x] for x in g.rollout(model, processors[0], prompts, seeds, C, 1.0)]

    def batched(prompts, C, count=G):
        draw = dict(max_new_tokens=C, min_new_tokens=C, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        return [plain.generate(plain_model, x, **draw, num_return_sequences=count) for x in prompts]

    for C in args.completion_lengths:
        sides = {
            "sequential": partial(batched, prompts[:1] * G, C, 1),
            "batched": partial(batched, prompts[:1], C),
            "ours": partial(ours, prompts[:1], C),
            f"batched, {args.prompts} prompts": partial(batched, prompts, C),
            f"ours, {args.prompts} prompts": partial(ours, prompts, C),
        }
        assert {len(ids) for side in ("ours", "batched") for ids in sides[side]()[0]} == {C}
        times = [{name: tools.seconds_of(side) for name, side in sides.items()} for _ in range(args.rounds)]
        for name in sides:
            count = G * C * (args.prompts if "prompts" in name else 1)
            rate = result[f"tokens/s, {name}, C={C}"] = spread([count / t[name] for t in times])
            tools.show(f"tokens/s, {name}, C={C}", rate, "")
            if not name.startswith("ours"):
                mine = name.replace("batched", "ours").replace("sequential", "ours")
                ratio = result[f"{name} / ours, C={C}"] = spread([t[name] / t[mine] for t in times])
                tools.show(f"  {name} / ours, C={C}", ratio)
    tools.write_result(args.out, result)

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
