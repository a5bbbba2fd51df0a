"""The plain way, in as few words as possible: what every fast path is tested and timed against."""

import torch

def completion_logps(model, tokenizer, inputs, completions, temperature=1.0, banned=()):
    """Log-probs of G completions by G rows, each with its own copy of the prompt and the image: (G, C), mask (G, C)."""
    P, C, G = len(inputs["prompt_ids"]), max(map(len, completions)), len(completions)
    ids = torch.full((G, P + C), tokenizer.pad_token_id, device=model.device)
    mask = torch.zeros_like(ids)
    for row, completion in enumerate(completions):
        ids[row, : P + len(completion)] = torch.tensor(inputs["prompt_ids"] + completion)
        mask[row, : P + len(completion)] = 1
    is_image = torch.zeros_like(ids)
    is_image[:, :P] = ids[:, :P] == model.config.image_token_id
    images = {key: inputs[key].repeat(G, 1).to(model.device) for key in ("pixel_values", "image_grid_thw")}
    logits = model(input_ids=ids, attention_mask=mask, mm_token_type_ids=is_image.int(), **images, use_cache=False,
                   logits_to_keep=C + 1).logits[:, :-1]  # fmt: skip
    logits = logits.float().index_fill(-1, ids.new_tensor(banned), float("-inf")) / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[:, P:, None])[..., 0], mask[:, P:]

def generate(model, inputs, **kwargs):
    """transformers' generate on one prompt with its image: the new token ids, one list per sequence."""
    model.model.rope_deltas = None  # the state of an earlier call must not leak into this one
    ids = torch.tensor([inputs["prompt_ids"]], device=model.device)
    images = {key: inputs[key].to(model.device) for key in ("pixel_values", "image_grid_thw")}
    kinds, mask = (ids == model.config.image_token_id).int(), torch.ones_like(ids)
    out = model.generate(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, **images, **kwargs)
    return out[:, ids.shape[1] :].tolist()

def grpo_loss(groups, args):
    """The loss of a step by loops over its tokens. A group: [(advantage, [(logp, old, ref) of each token])]."""
    sequences, total = [s for group in groups for s in group], 0.0
    tokens = sum(len(rows) for _, rows in sequences)
    for advantage, rows in sequences:
        for logp, old, ref in rows:
            ratio = (logp - old).exp()
            clipped = min(max(ratio, 1 - args.epsilon), 1 + args.epsilon_high)
            loss = -min(ratio * advantage, clipped * advantage)
            loss += args.beta * ((ref - logp).exp() - (ref - logp) - 1)
            share = {"grpo": len(rows) * len(sequences), "dapo": tokens,
                     "dr_grpo": len(sequences) * args.max_completion_length}[args.loss_type]  # fmt: skip
            total += loss / share
    return total
