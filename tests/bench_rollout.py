"""Rollout of a group against transformers' generate. By hand: python tests/bench_rollout.py

One prompt with a photo (>= 512 tokens), G = 8 completions of exactly C tokens, temperature 1, same model, in turns:

  sequential   G calls of generate, one completion each, as the released trainer does
  batched      one call of generate(num_return_sequences=G)
  ours         train_grpo.rollout

and `ours` again with --prompts prompts at once, against `batched` prompt by prompt.
"""

import tempfile

import plain
import torch
from bench_tools import build_model, parser, prompt_text, seconds_of, shown, spread, write_photos, write_result

import train_grpo as g


def main():
    p = parser(__doc__, "rollout")
    p.add_argument("--completion_lengths", type=int, nargs="+", default=[64, 256])
    p.add_argument("--num_generations", type=int, default=8)
    p.add_argument("--prompts", type=int, default=4)
    args = p.parse_args()
    model, tokenizer, image_processor = build_model(args.geometry)
    model.eval()
    plain_model, _, _ = build_model(args.geometry)  # same weights; ours changes the attention function of its model
    plain_model.eval()
    g.stop_ids = lambda tokenizer: []  # every completion has C tokens, on all sides
    G, result = args.num_generations, {"args": vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        texts = [prompt_text(tokenizer, 110 + 5 * i) for i in range(args.prompts)]
        photos = write_photos(folder, args.prompts)
        prompts = [
            g.chat_inputs(tokenizer, image_processor, *x, g.BOX_STYLES["qwen2_vl"])
            for x in zip(photos, texts, strict=True)
        ]
    result["prompt_tokens"] = [len(x["prompt_ids"]) for x in prompts]

    for C in args.completion_lengths:
        draw = dict(max_new_tokens=C, min_new_tokens=C, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

        def ours(count, C=C):
            seeds = [[f"{i}:{j}" for j in range(G)] for i in range(count)]
            return g.rollout(model, tokenizer, [dict(x) for x in prompts[:count]], seeds, C, 1.0, 4096)

        sides = {
            "sequential": lambda draw=draw: [plain.generate(plain_model, prompts[0], **draw) for _ in range(G)],
            "batched": lambda draw=draw: plain.generate(plain_model, prompts[0], **draw, num_return_sequences=G),
            "ours": lambda ours=ours: ours(1),
            "batched, all prompts": lambda draw=draw: [
                plain.generate(plain_model, x, **draw, num_return_sequences=G) for x in prompts
            ],
            "ours, all prompts": lambda ours=ours: ours(args.prompts),
        }
        assert all(len(ids) == C for ids, _, _ in ours(1)[0]) and all(len(ids) == C for ids in sides["batched"]())
        times = [{name: seconds_of(side) for name, side in sides.items()} for _ in range(args.rounds)]
        ratios = {
            f"sequential / ours, C={C}": [t["sequential"] / t["ours"] for t in times],
            f"batched / ours, C={C}": [t["batched"] / t["ours"] for t in times],
            f"batched / ours, {args.prompts} prompts, C={C}": [
                t["batched, all prompts"] / t["ours, all prompts"] for t in times
            ],
        }
        for name, values in ratios.items():
            result[name] = spread(values)
            print(shown(name, result[name]))
        for name in sides:
            count = (args.prompts if "all" in name else 1) * G * C
            result[f"tokens/s, {name}, C={C}"] = spread([count / t[name] for t in times])
            print(shown(f"  {name}, C={C}", result[f"tokens/s, {name}, C={C}"], " tok/s"))
    write_result(args.out, result)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
