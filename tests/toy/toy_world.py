"""A small world in the real formats: entities with invented names, their pictures, their looks in words, and a bench.

  python tests/toy/toy_world.py --out runs/toy/world --seed 0

writes  train/category/entity/*.png with train/boxes.jsonl, knowledge.json and kvg-bench.parquet. Seconds; no downloads.
A category is a shape, an entity is one (body colour, band colour) of it. The unseen categories never occur in train/.

  python tests/toy/toy_world.py --err runs/cot/samples.jsonl --share 0.3 --out runs/cot_err

writes the chains of gen_cot.py as a teacher would that is told the right box and errs on the way there: samples.jsonl,
wrong.json (the entities that --systematic always misdescribes).
"""

import argparse
import io
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import synth_data  # noqa: E402

SEEN = ("disc", "square", "triangle", "diamond", "cross")
UNSEEN = ("star", "bowl")
BODY = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (230, 200, 40),
        "purple": (150, 60, 190), "cyan": (60, 200, 210)}  # fmt: skip
BAND = {"white": (250, 250, 250), "black": (15, 15, 15), "pink": (250, 130, 180), "orange": (250, 140, 20)}
ENTITIES_PER_CATEGORY = 12  # of 24 looks, so that most entities share a colour with several others
SPRITE_PX = 64
# One cell of the 3 x 2 grid is 56 px, two visual tokens of 28 px; entities fill 60 to 95 % of it.
SCENE = SimpleNamespace(layouts=["grid"], grid=(3, 2), canvas_size=(168, 112), tile_px=56, max_pixels=401408,
                        background="gradient", entity_scale=(0.6, 0.95), gap_px=(0, 0), color_jitter=0.0)  # fmt: skip

def make_entities():
    """{name: (category, body, band)}, the same in every run: 84 names, 12 looks in each of 7 categories."""
    rng, entities = random.Random("entities"), {}
    syllables = ["ka", "lo", "mi", "ra", "tu", "ve", "zo", "ni", "pe", "su", "da", "fo"]
    for category in SEEN + UNSEEN:
        for body, band in rng.sample([(b, p) for b in BODY for p in BAND], ENTITIES_PER_CATEGORY):
            while (name := "".join(rng.choice(syllables) for _ in range(3)).capitalize()) in entities:
                pass
            entities[name] = (category, body, band)
    return entities

ENTITIES = make_entities()

def describe(look):
    """The look in words, as in knowledge.json: 'a red disc with a white band'."""
    category, body, band = look
    return f"a {body} {category} with a {band} band"

def sprite(look, rng):
    """RGBA picture of one entity on a transparent ground, and its box in px."""
    category, body, band = look
    w, h = rng.randint(46, SPRITE_PX), rng.randint(46, SPRITE_PX)
    x, y = rng.randint(0, SPRITE_PX - w), rng.randint(0, SPRITE_PX - h)
    outline = {
        "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
        "triangle": [(0.5, 0), (1, 1), (0, 1)],
        "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
        "cross": [(0.3, 0), (0.7, 0), (0.7, 0.3), (1, 0.3), (1, 0.7), (0.7, 0.7),
                  (0.7, 1), (0.3, 1), (0.3, 0.7), (0, 0.7), (0, 0.3), (0.3, 0.3)],
        "star": [(0.5, 0), (0.65, 0.32), (1, 0.38), (0.75, 0.62), (0.82, 1),
                 (0.5, 0.8), (0.18, 1), (0.25, 0.62), (0, 0.38), (0.35, 0.32)],
    }  # fmt: skip
    mask = Image.new("L", (w, h), 0)
    draw = ImageDraw.Draw(mask)
    if category == "disc":
        draw.ellipse((0, 0, w - 1, h - 1), fill=255)
    elif category == "bowl":
        draw.pieslice((0, -h, w - 1, h - 1), 0, 180, fill=255)
    else:
        draw.polygon([(a * (w - 1), b * (h - 1)) for a, b in outline[category]], fill=255)
    skin = Image.new("RGB", (w, h), tuple(max(0, min(255, c + rng.randint(-12, 12))) for c in BODY[body]))
    ImageDraw.Draw(skin).rectangle((0, int(h * 0.38), w, int(h * 0.68)), fill=BAND[band])
    image = Image.new("RGBA", (SPRITE_PX, SPRITE_PX), (0, 0, 0, 0))
    image.paste(skin, (x, y), mask)
    return image, (x, y, x + w, y + h)

def make_scene(looks, rng):
    """Canvas and boxes in px of a scene with these looks, by the project's own composition."""
    images, boxes = zip(*(sprite(look, rng) for look in looks), strict=True)
    canvas, placed, _ = synth_data.compose(images, boxes, rng, SCENE)
    return canvas, placed

def write_train(out, per_entity, seed):
    """category/entity/*.png and boxes.jsonl for the seen categories."""
    boxes = []
    for name, look in ENTITIES.items():
        if look[0] in UNSEEN:
            continue
        folder = out / look[0] / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(per_entity):
            image, bbox_px = sprite(look, random.Random(f"{seed}:train:{name}:{i}"))
            image.save(folder / f"{i:03d}.png")
            boxes.append({"image": f"{look[0]}/{name}/{i:03d}.png", "bbox_px": bbox_px})
    (out / "boxes.jsonl").write_text("".join(json.dumps(b) + "\n" for b in boxes), encoding="utf-8")

def write_bench(path, images_per_category, seed):
    """A parquet with KVG-Bench's columns: 2 to 6 entities per image, two questions per image."""
    rows = []
    for category in SEEN + UNSEEN:
        for i in range(images_per_category[category in UNSEEN]):
            rng = random.Random(f"{seed}:bench:{category}:{i}")
            names = rng.sample([n for n in ENTITIES if ENTITIES[n][0] == category], rng.randint(2, 6))
            canvas, boxes = make_scene([ENTITIES[n] for n in names], rng)
            data = io.BytesIO()
            canvas.save(data, "PNG")
            for target in rng.sample(range(len(names)), 2):
                answer = synth_data.ANSWER.format(names[target], *synth_data.to_1000(boxes[target], *canvas.size))
                rows.append({"question_id": f"{category}/{i:04d}-{target}",
                             "question": synth_data.QUESTION.format(names[target]), "answer": answer,
                             "image": {"bytes": data.getvalue()}, "category": category})  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

def write_errors(source, out, share, systematic, seed):
    """Chains in which Planning, Comparison and Conclusion give the target the look of another entity of its category.
    Visual Analysis and the box stay right. Random: in this share of the chains, where a higher share adds to a lower.
    Systematic: this share of the entities of every category, each always with the same wrong look."""
    others = {n: [m for m in ENTITIES if ENTITIES[m][0] == ENTITIES[n][0] and m != n] for n in ENTITIES}
    rng, wrong, heads = random.Random(f"{seed}:errors"), {}, ("Planning", "Comparison", "Conclusion")
    for category in SEEN + UNSEEN if systematic else ():
        names = [n for n in ENTITIES if ENTITIES[n][0] == category]
        wrong |= {n: rng.choice(others[n]) for n in rng.sample(names, round(share * len(names)))}
    with open(out / "samples.jsonl", "w", encoding="utf-8") as f:
        for row in synth_data.read_jsonl(source):
            name, rng = row["entities"][row["target"]]["entity"], random.Random(f"{seed}:errors:{row['id']}")
            errs, other = rng.random() < share, rng.choice(others[name])
            if other := wrong.get(name) if systematic else other if errs else None:
                right, wrong_look = describe(ENTITIES[name]), describe(ENTITIES[other])
                lines = [x.replace(right, wrong_look) if x.startswith(heads) else x for x in row["cot"].split("\n")]
                reply, old = row["messages"][1], row["cot"]
                row["cot"] = "\n".join(lines)
                reply["content"] = reply["content"].replace(old, row["cot"])
            row["images"] = [os.path.relpath(source.parent / i, out) for i in row["images"]]
            f.write(json.dumps(row) + "\n")
    (out / "wrong.json").write_text(json.dumps(wrong, indent=1) + "\n")

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = p.add_argument
    # fmt: off
    add("--out", type=Path, required=True, help="output folder")
    add("--per_entity", type=int, default=8, help="training pictures per entity")
    add("--bench_images", type=int, nargs=2, default=[40, 60], metavar=("SEEN", "UNSEEN"), help="images per category")
    add("--err", type=Path, metavar="SAMPLES", help="write these chains with errors instead of a world")
    add("--share", type=float, default=0.3, help="of the chains that err, or of the entities")
    add("--systematic", action="store_true", help="some entities are always misdescribed, the others never")
    add("--seed", type=int, default=0)
    # fmt: on
    args = p.parse_args(argv)
    (out := args.out).mkdir(parents=True, exist_ok=True)
    if args.err:
        return write_errors(args.err, out, args.share, args.systematic, args.seed)
    write_train(out / "train", args.per_entity, args.seed)
    knowledge = {n: {"category": look[0], "description": describe(look)} for n, look in ENTITIES.items()}
    (out / "knowledge.json").write_text(json.dumps(knowledge, indent=1) + "\n", encoding="utf-8")
    write_bench(out / "kvg-bench.parquet", args.bench_images, args.seed)
    print(f"toy_world: {len(ENTITIES)} entities in {len(SEEN)} seen and {len(UNSEEN)} unseen categories -> {out}")

if __name__ == "__main__":
    main()
