"""Rollout of a group against transformers' generate. By hand: python tests/bench_rollout.py

One prompt with a photo (>= 512 tokens), G = 8 completions of exactly C tokens, temperature 1, same model, in turns:
`sequential`, G calls of generate, as the released trainer does; `batched`, one with num_return_sequences=G; `ours`,
and this again with --prompts prompts at once, against `batched` prompt by prompt.
"""

from functools import partial

import bench_tools as tools
import plain
import torch
from bench_grpo import parser, photo_prompts
from bench_tools import spread

import train_grpo as g

def main():
    args = parser(__doc__, "rollout").parse_args()
    (model, *processors), plain_model = tools.build_model(args.geometry), tools.build_model(args.geometry)[0].eval()
    g.packable(model)
    g.STOP = []  # every completion has C tokens, on all sides
    prompts, G, result = photo_prompts(processors, args.prompts), args.num_generations, {"args": vars(args)}
    def ours(prompts, C):
        seeds = [[f"{i}:{j}" for j in range(G)] for i in range(len(prompts))]
        return [[ids for ids, _, _ in x] for x in g.rollout(model, processors[0], prompts, seeds, C, 1.0)]
    def batched(prompts, C, count=G):
        draw = dict(max_new_tokens=C, min_new_tokens=C, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        return [plain.generate(plain_model, x, **draw, num_return_sequences=count) for x in prompts]
    for C, some in ((C, some) for C in args.completion_lengths for some in (prompts[:1], prompts)):
        sides = {"ours": partial(ours, some, C), "batched": partial(batched, some, C)}
        sides |= {} if some is prompts else {"sequential": partial(batched, some * G, C, 1)}
        assert {len(ids) for side in ("ours", "batched") for ids in sides[side]()[0]} == {C}
        times = [{name: tools.seconds_of(side) for name, side in sides.items()} for _ in range(args.rounds)]
        for name in sides:
            told = f"{name}, prompts {len(some)}, C {C}"
            rate = result[f"tokens/s, {told}"] = spread([G * C * len(some) / t[name] for t in times])
            ratio = result[f"time / ours, {told}"] = spread([t[name] / t["ours"] for t in times])
            tools.show(f"tokens/s, {told}", rate, ""), tools.show("  time / ours", ratio)
    tools.write_result(args.out, result)

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
