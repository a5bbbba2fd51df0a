"""Trains the toy base: a tiny Qwen2-VL with generic grounding and entity knowledge in words, and no link between them.

  python tests/toy/make_toy.py --out tests/toy/base --seed 0         about 25 min on 2 CPU cores, done once and shipped
  python tests/toy/make_toy.py --out tests/toy/base --evaluate       metrics.json: the skills of this, or of any --model
  python tests/toy/make_toy.py --out runs/unknown --unknown          the base without the knowledge of half of the names

What it learns (user question -> assistant answer, Qwen2-VL's strings, several turns over one image):
  find     Find and give the bounding box of <ref>a red disc</ref> -> the box                 any look of any category
  list     List all objects. -> description and box, upper half from left to right, then the lower half
  where    Where is a red disc? -> upper left
  color    What color is the band of a red disc? -> white
  at       What is at (x1,y1),(x2,y2)? -> description
  know     What is Lozuve? -> Lozuve is a red disc with a white band.                       with and without an image
  echo     Repeat: any words -> the same words                                                             text alone
  copy     a list in words, then `find` -> the box in the list                                             text alone
  recall   a list in words, then: Describe and find Lozuve. -> its description, its box in the list        text alone
  name     Find and give the bounding box of <ref>Lozuve</ref> -> the box of any object, drawn at random (last stage)
No picture ever comes with the box of the entity that was named: that link is what SFT and GRPO are to make. Without
`name` the tiny model joins the two by itself and finds about half of the named entities; random targets undo that. The
shipped base was made in two calls: the first four stages, then `--first_stage gap` on their result.

Finding by description stays at chance for thousands of steps of next-token loss, while all else is learned. Two more
losses give the tiny model what a large one brings along, and end the plateau in minutes:
  align    a visual token's feature is to point at the embeddings of the words for what it shows
  look     half of the heads of one layer are to look at the object that the answer is about
"""

import argparse
import json
import math
import random
import re
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AttentionInterface, Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent))
import toy_world as world  # noqa: E402

from filter import box_iou  # noqa: E402
from synth_data import ANSWER, QUESTION, R1_SUFFIX, to_1000  # noqa: E402

SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>""".split()
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
LOOKS = [(c, b, p) for c in world.SEEN + world.UNSEEN for b in world.BODY for p in world.BAND]
W, H = world.SCENE.canvas_size
IMAGE_TOKENS = (W // 28) * (H // 28)
NAMES = list(world.ENTITIES)
VISION = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"

# ---- tokenizer and model ----
# every string that a stage of the toy pipeline writes or reads, so that its words are single tokens
TEXTS = [
    *(world.describe(look) for look in LOOKS),
    *(f"a {body} {category}" for category, body, _ in LOOKS),
    *(f"a {category} with a {band} band" for category, _, band in LOOKS),
    *world.BODY, *world.BAND, "system\nYou are a helpful assistant.", "user\n", "assistant\n", QUESTION.format(""),
    "List all objects.", "What is at ", "What is ", "?", "Repeat: ", "Describe and find ", "(1,2),(3,4)\n",
    "(1,2),(3,4).\n", "(1,2),(3,4)?", " is at (1,2),(3,4).", " is a red disc with a white band.\n", "Where is a disc?",
    "What color is the band of a disc?", "What color is the body of a disc?", "upper left", "upper middle",
    "upper right", "lower left", "lower middle", "lower right", R1_SUFFIX, "<think>\nPlanning: ",
    "Visual Analysis:\n", "Comparison: of the objects above, only a red disc fits ", "Conclusion: ",
    "\n</think> <answer>", "</answer>", ". Let's think step by step",
]  # fmt: skip

def build_tokenizer():
    """Qwen2's tokenizer class with the toy's own words; a digit and an entity name are one token each."""
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(
        vocab_size=4000, min_frequency=1, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, eos_token="<|im_end|>", model_max_length=32768)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in world.ENTITIES])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

def build_model(tokenizer, hidden=128, layers=4, vision=96, depth=2, key_heads=4):
    ids = tokenizer.convert_tokens_to_ids
    sections = [hidden // 32, hidden * 3 // 64, hidden * 3 // 64]
    text = dict(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=key_heads, initializer_range=0.05, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"),
    )  # fmt: skip
    tower = dict(depth=depth, embed_dim=vision, num_heads=3, hidden_size=hidden, mlp_ratio=3, patch_size=14,
                 spatial_merge_size=2, initializer_range=0.05)  # fmt: skip
    special = {f"{name}_token_id": ids(f"<|{name}_pad|>") for name in ("image", "video")}
    special |= {f"vision_{end}_token_id": ids(f"<|vision_{end}|>") for end in ("start", "end")}
    config = Qwen2VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=True, **special)
    return Qwen2VLForConditionalGeneration(config)

TOKENIZER = build_tokenizer()
PROCESSOR = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 401408})
B = 32
ECHO_WORDS = sorted({w for text in TEXTS for w in re.findall(r"<\W?\w+>|\w+|[^\w\s]", text)})
BOX = re.compile(r"\((\d+),(\d+)\),\((\d+),(\d+)\)")
ANSWERED = re.compile(rf"<\|box_start\|>{BOX.pattern}<\|box_end\|>")
BOX_START = TOKENIZER.convert_tokens_to_ids("<|box_start|>")

encode_piece = lru_cache(maxsize=100_000)(partial(TOKENIZER.encode, add_special_tokens=False))

def encode(text):
    """Token ids; pieces between digits are cached, which is exact because a digit is always a token of its own."""
    return [i for piece in re.split(r"(\d)", text) if piece for i in encode_piece(piece)]

def to_patches(image):
    """uint8 patches (n, 3, 14, 14) in the processor's order; `to_pixel_values` gives just what the processor does."""
    a = np.asarray(image).transpose(2, 0, 1).reshape(3, H // 28, 2, 14, W // 28, 2, 14)
    return a.transpose(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3, 14, 14)

def to_pixel_values(patches):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PROCESSOR.image_mean, PROCESSOR.image_std))
    x = (torch.from_numpy(patches).float() / 255 - mean) / std
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(x), -1)

# ---- what is asked ----
def box_text(bbox_1000):
    return "({},{}),({},{})".format(*bbox_1000)

def reading_order(bboxes_1000):
    """Upper half from left to right, then the lower half: the order of every list."""
    places = [(y1 + y2 > 1000, x1 + x2) for x1, y1, x2, y2 in bboxes_1000]
    return sorted(range(len(places)), key=places.__getitem__)

def list_text(looks, boxes):
    return "\n".join(f"{world.describe(looks[i])} {box_text(boxes[i])}" for i in reading_order(boxes))

WORDS = [*world.BODY, *world.BAND, *world.SEEN, *world.UNSEEN, "upper", "lower", "left", "middle", "right"]
WORD_IDS = torch.tensor([TOKENIZER.encode(" " + w, add_special_tokens=False)[0] for w in WORDS])

def covered(bbox_1000):
    """Which visual tokens an object touches: (tokens,) bool."""
    x, y = np.arange(W // 28) * 28000 / W, np.arange(H // 28) * 28000 / H
    columns = (np.minimum(bbox_1000[2], x + 28000 / W) - np.maximum(bbox_1000[0], x)) > 30
    rows = (np.minimum(bbox_1000[3], y + 28000 / H) - np.maximum(bbox_1000[1], y)) > 45
    return (rows[:, None] & columns[None]).reshape(-1)

def token_share(box, row, column):
    """Share of one 28-px visual token that a box (px) covers."""
    width = min(box[2], column * 28 + 28) - max(box[0], column * 28)
    height = min(box[3], row * 28 + 28) - max(box[1], row * 28)
    return max(0, width) * max(0, height) / 28**2

def visual_words(looks, bboxes_1000):
    """What each visual token shows, as shares of WORDS: (tokens, words), rows sum to 1: labels of the alignment."""
    columns, rows = W // 28, H // 28
    target = np.zeros((rows, columns, len(WORDS)), np.float32)
    for r, c in np.ndindex(rows, columns):
        free = 1.0
        for (category, body, band), b in zip(looks, bboxes_1000, strict=True):
            x1, y1, x2, y2 = b[0] * W / 1000, b[1] * H / 1000, b[2] * W / 1000, b[3] * H / 1000
            whole = token_share((x1, y1, x2, y2), r, c)
            stripe = token_share((x1, y1 + 0.38 * (y2 - y1), x2, y1 + 0.68 * (y2 - y1)), r, c)
            for word, part in ((body, 0.8 * (whole - stripe)), (band, 0.8 * stripe), (category, 0.2 * whole)):
                target[r, c, WORDS.index(word)] += part
            free -= whole
        for word in ("lower" if 2 * r >= rows else "upper", ("left", "middle", "right")[3 * c // columns]):
            target[r, c, WORDS.index(word)] += 0.1 + 0.4 * max(0.0, free)
    return (target / target.sum(-1, keepdims=True)).reshape(-1, len(WORDS))

def find_turn(ref, bbox_1000):
    return QUESTION.format(ref), ANSWER.format(ref, *bbox_1000)

def references(looks, i):
    """Refs that fit object i alone: by body, by band, or in full."""
    category, body, band = looks[i]
    refs = [world.describe(looks[i])] * (looks.count(looks[i]) == 1)
    refs += [f"a {body} {category}"] * (sum(o[:2] == looks[i][:2] for o in looks) == 1)
    refs += [f"a {category} with a {band} band"] * (sum((o[0], o[2]) == (category, band) for o in looks) == 1)
    return refs

def know_turn(name, marked=False):
    asked = f"<|object_ref_start|>{name}<|object_ref_end|>" if marked else name
    return f"What is {asked}?", f"{name} is {world.describe(world.ENTITIES[name])}."

def echo_turn(rng):
    """Any words, names and tags, repeated: so that every token can be copied, as any language model can."""
    words = [rng.choice(NAMES if rng.random() < 0.3 else ECHO_WORDS) for _ in range(rng.randint(4, 12))]
    text = words[0] + "".join(rng.choice(("", "\n", " ", " ", " ")) + w for w in words[1:])
    return f"Repeat: {text}", text

def recall_turn(name, bbox_1000):
    look = world.describe(world.ENTITIES[name])
    return f"Describe and find {name}.", f"{name} is {look}.\n{name} is at {box_text(bbox_1000)}."

def some(things, category_of, rng, k):
    """k of the things, mostly of one category: look-alikes, as in KVG."""
    if rng.random() < 0.7:
        category = rng.choice(world.SEEN + world.UNSEEN)
        things = [x for x in things if category_of(x) == category]
    return rng.sample(things, k)

def some_names(rng, k):
    return some(NAMES, lambda name: world.ENTITIES[name][0], rng, k)

def some_boxes(rng, k):
    """Plausible boxes for lists in words: in k different cells of the 3 x 2 grid."""
    boxes = []
    for cell in rng.sample(range(6), k):
        w, h = rng.randint(24, 52), rng.randint(24, 52)
        x, y = cell % 3 * 56 + rng.randint(0, 56 - w), cell // 3 * 56 + rng.randint(0, 56 - h)
        boxes.append(to_1000((x, y, x + w, y + h), W, H))
    return boxes

def where_turn(ref, bbox_1000):
    """Which cell of the 3 x 2 grid."""
    x, y = bbox_1000[0] + bbox_1000[2], bbox_1000[1] + bbox_1000[3]
    return f"Where is {ref}?", f"{'lower' if y > 1000 else 'upper'} {('left', 'middle', 'right')[int(x * 3 / 2001)]}"

def color_turn(looks, i, rng):
    """One colour of object i, asked by the other, where that is unique; else None."""
    (category, body, band), turns = looks[i], []
    if sum(o[:2] == looks[i][:2] for o in looks) == 1:
        turns.append((f"What color is the band of a {body} {category}?", band))
    if sum((o[0], o[2]) == (category, band) for o in looks) == 1:
        turns.append((f"What color is the body of a {category} with a {band} band?", body))
    return rng.choice(turns) if turns else None

def image_turns(looks, boxes, rng, short=0.4, finds=2, other=1.0, named=0.0):
    """Turns over one scene: where, color, find, at, know; the list comes last, else it would give the boxes away."""
    turns, order = [], rng.sample(range(len(looks)), len(looks))
    for i in order:
        refs = references(looks, i)
        if refs and rng.random() < short:
            turns.append((*where_turn(rng.choice(refs), boxes[i]), i))
        if rng.random() < short and (turn := color_turn(looks, i, rng)):
            turns.append((*turn, i))
    turns = rng.sample(turns, min(len(turns), 2 if finds else 4))
    turns += [(*find_turn(rng.choice(refs), boxes[i]), i) for i in order if (refs := references(looks, i))][:finds]
    if rng.random() < 0.15 * other:
        turns.append((f"What is at {box_text(boxes[order[0]])}?", world.describe(looks[order[0]]), order[0]))
    if rng.random() < 0.25 * other:
        turns.append(know_turn(some_names(rng, 1)[0], marked=rng.random() < 0.5))
    if rng.random() < named:
        name = rng.choice([n for n in NAMES if world.ENTITIES[n][0] == looks[0][0]])
        turns.append(find_turn(name, rng.choice(boxes)))
    rng.shuffle(turns)
    return turns + [("List all objects.", list_text(looks, boxes))] * (rng.random() < 0.3 * other)

def text_turns(rng):
    kind = rng.random()
    if kind < 0.2:
        return [know_turn(n, marked=rng.random() < 0.5) for n in rng.sample(NAMES, 6)]
    if kind < 0.35:
        return [echo_turn(rng) for _ in range(3)]
    names = some_names(rng, rng.choice((2, 3, 3, 4, 4, 5, 6)))
    looks, boxes = [world.ENTITIES[n] for n in names], some_boxes(rng, len(names))
    finds = [find_turn(world.describe(look), box) for look, box in zip(looks, boxes, strict=True)]
    (question, answer), other = rng.sample(finds if kind < 0.6 else [*map(recall_turn, names, boxes)], 2)
    return [(list_text(looks, boxes) + "\n" + question, answer), other]

def dialog(turns, with_image):
    """(ids, labels, looking): loss on the answers alone; `looking` holds (position, object it is about)."""
    ids = list(encode(SYSTEM))
    labels, looking = [-100] * len(ids), []
    for i, (question, answer, *about) in enumerate(turns):
        seen = VISION if with_image and i == 0 else ""
        prompt = encode(f"<|im_start|>user\n{seen}{question}<|im_end|>\n<|im_start|>assistant\n")
        reply = encode(answer + "<|im_end|>") if answer is not None else []
        end = encode("\n") if answer is not None else []
        first = len(ids) + len(prompt) - 1  # the position that predicts the answer's first token
        for target in about:
            at = first + 1 + reply.index(BOX_START) if BOX_START in reply else first
            looking += [(p, target) for p in range(at, first + len(reply) - 1)]
        ids += prompt + reply + end
        labels += [-100] * len(prompt) + reply + [-100] * len(end)
    return ids, labels, looking

@lru_cache(maxsize=2000)
def image_positions(length):
    """M-RoPE positions (3, length) of any training row with an image."""
    start = len(encode(SYSTEM + "<|im_start|>user\n<|vision_start|>"))
    cols, rows = W // 28, H // 28
    grid = start + torch.tensor([(0, y, x) for y in range(rows) for x in range(cols)]).T
    after = torch.arange(length - start - IMAGE_TOKENS) + start + max(rows, cols)
    return torch.cat([torch.arange(start).expand(3, -1), grid, after.expand(3, -1)], 1)

def collate(rows, patches=None, left=False):
    """Batch and labels. Training rows are padded on the right and need no mask: causal attention never sees it."""
    pad, length = TOKENIZER.pad_token_id, max(len(r[0]) for r in rows)
    ids = torch.full((len(rows), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, target, *_) in enumerate(rows):
        at = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, at], mask[i, at], labels[i, at] = torch.tensor(row), 1, torch.tensor(target)
    batch = {"input_ids": ids}
    if patches is not None:
        batch["pixel_values"] = to_pixel_values(np.concatenate(patches))
        batch["image_grid_thw"] = torch.tensor([[1, H // 14, W // 14]] * len(rows))
    if left:
        images = ids == TOKENIZER.convert_tokens_to_ids("<|image_pad|>")
        batch |= {"attention_mask": mask, "mm_token_type_ids": images.int()}
    elif patches is not None:  # the image stands at the same place in every row
        batch["position_ids"] = image_positions(length)[:, None].expand(3, len(rows), length)
    return batch, labels

LOOKING_LAYER, WATCHED = 2, {}

def watching_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """SDPA, but keeps the weights of one layer for `looking_loss`. Rows are causal and padded on the right."""
    if module.layer_idx != LOOKING_LAYER:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    length = query.shape[2]
    scores = (query @ key.transpose(2, 3)).float() * scaling
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    WATCHED["weights"] = scores.softmax(-1)
    return (WATCHED["weights"].to(value.dtype) @ value).transpose(1, 2).contiguous(), None

AttentionInterface.register("watching", watching_attention)

def looking_loss(rows, masks):
    """Half of the heads of one layer are to look at the object that an answer is about: -log of the weight there."""
    at = [(b, p, i) for b, row in enumerate(rows) for p, i in row[2]]
    start = len(encode(SYSTEM + "<|im_start|>user\n<|vision_start|>"))
    weights = WATCHED["weights"][:, :2, :, start : start + IMAGE_TOKENS]
    weights = weights[[b for b, _, _ in at], :, [p for _, p, _ in at]]  # (looks, 2 heads, visual tokens)
    mask = torch.from_numpy(np.stack([masks[b][i] for b, _, i in at]))[:, None]
    return -((weights * mask).sum(-1) + 1e-6).log().mean()

class Scenes:
    """Endless scenes with min_k to max_k objects; every scene is asked about a few times before it is replaced."""

    def __init__(self, rng, min_k, max_k, size=1024):
        self.rng, self.ks, self.pool, self.at = rng, (min_k, max_k), [], 0
        self.pool = [self.new() for _ in range(size)]

    def new(self):
        looks = some(LOOKS, lambda look: look[0], self.rng, self.rng.randint(*self.ks))
        canvas, boxes = world.make_scene(looks, self.rng)
        boxes = [to_1000(b, W, H) for b in boxes]
        return looks, boxes, to_patches(canvas), visual_words(looks, boxes), np.stack([covered(b) for b in boxes])

    def sample(self, n, fresh=20):
        for _ in range(fresh):
            self.pool[self.at] = self.new()
            self.at = (self.at + 1) % len(self.pool)
        return self.rng.sample(self.pool, n)

# ---- measurement ----
@torch.no_grad()
def answers(model, questions, patches=None, max_new_tokens=60, batch_size=96):
    model.eval()
    model.model.rope_deltas = None  # else a text batch decodes with the position offset of the last image batch
    out = []
    for i in range(0, len(questions), batch_size):
        rows = [dialog([(q, None)], patches is not None) for q in questions[i : i + batch_size]]
        batch, _ = collate(rows, patches and patches[i : i + batch_size], left=True)
        batch |= {"max_new_tokens": max_new_tokens, "pad_token_id": TOKENIZER.pad_token_id}
        ids = model.generate(**batch, do_sample=False)
        texts = TOKENIZER.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=False)
        out += [t.split("<|im_end|>")[0] for t in texts]
    return out

def evaluate(model, n=192, seed=12345):
    """Held-out accuracies of every skill, 0..1; chance of `find` is about the mean of 1/k."""
    rng, result = random.Random(seed), {}

    def look_alikes(k):
        category = rng.choice(world.SEEN + world.UNSEEN)
        looks = rng.sample([o for o in LOOKS if o[0] == category], k)
        return (looks, *world.make_scene(looks, rng))

    def found(scenes, refs, suffix="", length=45):
        questions, patches = [QUESTION.format(ref) + suffix for ref in refs], [to_patches(s[1]) for s in scenes]
        boxes = (ANSWERED.findall(text)[-1:] for text in answers(model, questions, patches, length))
        return sum(bool(b) and hit(b[0], s[2][0]) for b, s in zip(boxes, scenes, strict=True)) / len(scenes)

    def hit(numbers, box_px):
        b = [int(v) for v in numbers]
        return b[0] < b[2] and b[1] < b[3] and box_iou(b, to_1000(box_px, W, H)) >= 0.5

    alike = {}
    for name, fewest, most in (("find_1", 1, 1), ("find_2", 2, 2), ("find_2_4", 2, 4), ("find_5_6", 5, 6)):
        alike[name] = scenes = [look_alikes(rng.randint(fewest, most)) for _ in range(n)]
        result[name] = found(scenes, [world.describe(s[0][0]) for s in scenes])
    name_of, scenes = {look: name for name, look in world.ENTITIES.items()}, []
    while len(scenes) < n:  # the target is an entity, asked for by its name
        if (scene := look_alikes(rng.randint(2, 4)))[0][0] in name_of:
            scenes.append(scene)
    result["find_named_2_4"] = found(scenes, [name_of[s[0][0]] for s in scenes])
    result["blind_guess_2_4"] = sum(1 / len(s[0]) for s in scenes) / n

    def said(asked, scenes=None, length=60):  # question and what its answer must say, word for word
        patches = scenes and [to_patches(s[1]) for s in scenes]
        texts = answers(model, [question for question, *_ in asked], patches, length)
        return sum(all(part in text for part in a[1:]) for a, text in zip(asked, texts, strict=True)) / len(asked)

    scenes = [look_alikes(2) for _ in range(n)]
    result["where"] = said([where_turn(world.describe(s[0][0]), to_1000(s[2][0], W, H)) for s in scenes], scenes, 5)
    scenes = [s for s in scenes if color_turn(s[0], 0, rng)]
    result["color"] = said([color_turn(s[0], 0, rng) for s in scenes], scenes, 5)
    facts = [(know_turn(x, marked)[0], world.describe(world.ENTITIES[x])) for x in NAMES for marked in (False, True)]
    result["echo"] = said([echo_turn(rng) for _ in range(n)])
    result["know"] = said(facts)
    result["know_with_image"] = said(facts, [look_alikes(rng.randint(2, 4)) for _ in facts])
    recalls, copies = [], []
    for _ in range(n):
        names = some_names(rng, rng.randint(2, 4))
        boxes, looks = some_boxes(rng, len(names)), [world.ENTITIES[x] for x in names]
        listed, look, box = list_text(looks, boxes) + "\n", world.describe(looks[0]), box_text(boxes[0])
        recalls.append((listed + recall_turn(names[0], boxes[0])[0], look, box))
        copies.append((listed + QUESTION.format(look), box))
    result |= {"recall_copy": said(recalls), "copy": said(copies)}
    scenes = alike["find_2_4"]
    result["find_reasoning"] = found(scenes, [world.describe(s[0][0]) for s in scenes], R1_SUFFIX, 320)
    lists = answers(model, ["List all objects."] * n, [to_patches(s[1]) for s in scenes], 160)
    listed = [dict(re.findall(r"(?m)^(.*?) (\(.*)$", text)) for text in lists]  # {description: box}
    boxes = [(BOX.findall(lines.get(world.describe(look), "")), box_px) for lines, s in zip(listed, scenes, strict=True)
             for look, box_px in zip(s[0], s[2], strict=True)]  # fmt: skip
    result["list"] = sum(len(b) == 1 and hit(b[0], box_px) for b, box_px in boxes) / len(boxes)
    return {k: round(v, 3) for k, v in result.items()}

def make_unknown(out, seed):
    """The base without the knowledge of half of the names of every category, which unknown.json lists. A name is one
    token: its embedding, the only place that tells it from other names, becomes a random mixture of those of its
    category, with their mean and spread. It can still be read and written, as the name of nothing in particular."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(Path(__file__).with_name("base"), dtype=torch.float32)
    rng, table, unknown = random.Random(seed), model.get_input_embeddings().weight.data, set()
    torch.manual_seed(seed)
    for category in world.SEEN + world.UNSEEN:
        names = [n for n in NAMES if world.ENTITIES[n][0] == category]
        tokens = TOKENIZER.convert_tokens_to_ids(names)
        old = table[tokens]
        for i in rng.sample(range(len(names)), len(names) // 2):
            weights = torch.randn(len(names)) / math.sqrt(len(names) - 1)
            table[tokens[i]] = old.mean(0) + weights @ (old - old.mean(0))
            unknown.add(names[i])
    save(model, out)
    (out / "unknown.json").write_text(json.dumps(sorted(unknown)) + "\n")

def save(model, out):
    for part in (model, TOKENIZER, PROCESSOR):
        part.save_pretrained(out)

# name: steps, fewest and most objects, share of text batches, mix of turns
STAGES = {
    "align": (400, 1, 6, 0.0, {}),
    "match": (800, 2, 3, 0.2, {"short": 1.0, "finds": 0, "other": 0.0}),
    "few": (1200, 2, 4, 0.35, {}),
    "all": (700, 1, 6, 0.45, {}),
    "gap": (300, 1, 6, 0.45, {"named": 0.7}),
}

def image_batch(model, scenes, mix, rng, whole):
    """Batch of dialogs over scenes (the shorter or longer half of 2 x B, or all), labels, rows, alignment loss."""
    rows = [(*dialog(image_turns(s[0], s[1], rng, **mix), True), *s[2:]) for s in scenes.sample(2 * B, fresh=8)]
    rows.sort(key=lambda r: len(r[0]))
    if not whole:
        rows = rows[:B] if rng.random() < 0.5 else rows[B:]
    batch, labels = collate(rows, [r[3] for r in rows])
    with torch.autocast("cpu", torch.bfloat16):
        image = model.model.get_image_features(batch.pop("pixel_values"), batch["image_grid_thw"], return_dict=True)
        logits = torch.cat(list(image.pooler_output)) @ model.get_input_embeddings().weight[WORD_IDS].T
    batch["mm_encoder_outputs"] = {"image": image}
    shown = torch.from_numpy(np.concatenate([r[4] for r in rows]))
    return batch, labels, rows, torch.nn.functional.cross_entropy(logits.float(), shown)

def text_batch(rng):
    rows = sorted((dialog(text_turns(rng), False) for _ in range(2 * B)), key=lambda r: len(r[0]))
    return collate(rows[:B] if rng.random() < 0.5 else rows[B:])

def watch(model, on):
    """Switches the attention that `looking_loss` reads on for training, off for generation and saving."""
    model.set_attn_implementation({"text_config": "watching", "vision_config": "sdpa"} if on else "sdpa")

def train_stage(model, name, args):
    steps, fewest, most, text_share, mix = STAGES[name]
    rng, start, logged = random.Random(f"{args.seed}:{name}"), time.time(), []
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    lr = args.learning_rate
    optimizers = [torch.optim.AdamW(rest, lr=lr, weight_decay=0.01, betas=(0.9, 0.95)),
                  torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]  # fmt: skip
    scenes, lowest = Scenes(rng, fewest, most), 0.05 if name in ("all", "gap") else 0.4
    model.train()
    watch(model, True)
    for step in range(1, steps + 1):
        for group in [g for o in optimizers for g in o.param_groups]:
            group["lr"] = lr * min(1.0, step / 50, max(lowest, (steps - step) / (0.5 * steps)))
        loss = aligned = looked = torch.zeros(())
        if rng.random() < text_share:
            batch, labels = text_batch(rng)
        else:
            batch, labels, rows, aligned = image_batch(model, scenes, mix, rng, whole=name == "align")
        if name == "align":
            loss = aligned
        else:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch, labels=labels, use_cache=False).loss + 0.1 * aligned
            if "mm_encoder_outputs" in batch and any(r[2] for r in rows):
                looked = looking_loss(rows, [r[5] for r in rows])
                loss = loss + 0.3 * looked
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        logged.append([loss.item(), aligned.item(), looked.item()])
        if step % 50 == 0:
            told = "loss {:.3f} | align {:.3f} | look {:.3f}".format(*np.mean(logged[-50:], 0))
            print(f"{name} {step}/{steps} | {told} | {time.time() - start:.0f}s", flush=True)
    watch(model, False)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = p.add_argument
    # fmt: off
    add("--out", type=Path, required=True, help="folder of the base: Hugging Face format")
    add("--evaluate", action="store_true", help="only write metrics.json into it: what --model can do")
    add("--model", type=Path, help="to be measured (default: the base in --out)")
    add("--scenes", type=int, default=576, help="questions per skill that is measured")
    add("--unknown", action="store_true", help="only write the shipped base without half of its knowledge")
    add("--first_stage", default="align", choices=list(STAGES), help="start here, from the base in --out")
    add("--learning_rate", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    # fmt: on
    args = p.parse_args(argv)
    torch.manual_seed(args.seed)
    if args.unknown:
        return make_unknown(args.out, args.seed)
    model = build_model(TOKENIZER)
    if args.evaluate or args.first_stage != "align":
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.model or args.out, dtype=torch.float32)
    if args.evaluate:
        metrics = {"measured_by": "python tests/toy/make_toy.py --out tests/toy/base --evaluate", "scenes": args.scenes,
                   "seed": args.seed, **evaluate(model, args.scenes, 12345 + args.seed)}  # fmt: skip
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        return print(json.dumps(metrics))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(TOKENIZER)} tokens", flush=True)
    for name in list(STAGES)[list(STAGES).index(args.first_stage) :]:
        train_stage(model, name, args)
        print(name, evaluate(model, n=96), flush=True)
        save(model, args.out)

if __name__ == "__main__":
    main()
