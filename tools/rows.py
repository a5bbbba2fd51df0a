"""Turns other data into rows that eval_kvg.py asks a model: rows.jsonl, and images/ where pictures had to be made.

  ask-boxes  where is it? of single-entity images without a box; synth_data.py --boxes takes the answers
  choices    which of four is it? of such images (fgvr), of every entity in composites (probe: what does a model know?),
             of the targets of a bench (gap: does it know what it does not find?)
  refcoco    a JSONL like RefCOCO's: image, expression or question, bbox_px or COCO's bbox, perhaps split and id
  spoil      a bench with noise, shifted colours, JPEG, blur or seams in its pictures

  python tools/rows.py choices --source runs/synth_sft/samples.jsonl --out runs/probe_rows

--source is a folder category/entity/*.jpg|png, a JSONL or a parquet. Images that can stay where they are do, unopened.
The paper (v3, App. C.3) does not say how a 4-choice question marks its object; here it is cut out, with 5 % around it.
"""

import argparse
import glob
import hashlib
import io
import json
import math
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

QUESTION = "Find and give the bounding box of <|object_ref_start|>{}<|object_ref_end|>"
REF = re.compile(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", re.S)
AMOUNTS = {  # spoil --kind: what --strength 1 to 5 means
    "noise": (8, 16, 32, 64, 96),  # standard deviation of Gaussian noise, of 255
    "color": (0.1, 0.2, 0.3, 0.45, 0.6),  # share by which one channel gets brighter and one darker
    "jpeg": (50, 30, 15, 8, 3),  # JPEG quality
    "blur": (0.4, 0.8, 1.6, 2.8, 4.0),  # radius of Gaussian blur in % of the shorter side
    "seams": (2, 4, 8, 16, 32),  # thin lines and frames at random places, like the borders in composites
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = p.add_subparsers(dest="command", required=True).add_parser, "ask-boxes choices refcoco spoil"
    ask, choose, refer, harm = (add(name, allow_abbrev=False) for name in names.split())
    # fmt: off
    for q in (ask, choose, refer, harm):
        q.add_argument("--source", "--bench", required=True, help="folder category/entity/*, .jsonl or .parquet")
        q.add_argument("--out", required=True, help="output folder; what is there is made anew")
        q.add_argument("--image_root", help="folder of relative image paths (default: that of the file)")
        q.add_argument("--seed", type=int, default=0, help="what is drawn depends on it, on ids and on names alone")
    ask.add_argument("--all", action="store_true", help="also images that have a box, which is the truth then")
    ask.add_argument("--background", default="white", choices=["white", "gradient"], help="of transparent images")
    choose.add_argument("--task", choices=["fgvr", "probe", "gap"], help="see above (default: by the row's columns)")
    choose.add_argument("--options", type=int, default=4, choices=range(2, 7), help="names to choose from")
    choose.add_argument("--max_per_entity", type=int, default=50, help="questions of a probe (paper: 50)")
    harm.add_argument("--kind", required=True, choices=list(AMOUNTS), help="how the pictures are spoilt")
    harm.add_argument("--strength", type=int, default=3, choices=range(1, 6), help="how much")
    # fmt: on
    return p.parse_args(argv)


def ask_boxes(args):
    """A question's id is the image's name in the source: by it synth_data.py finds the answer."""
    files = filter(Path.exists, (Path(args.source, "boxes.jsonl"), Path(f"{args.source}.boxes.jsonl")))
    listed = {b.get("question_id", b.get("image")): b.get("bbox_px") for f in files for b in read_jsonl(f)}
    for r in read_source(args):
        entity, box = name_in(r, "entity"), r.get("bbox_px") or listed.get(r["image"])
        if args.all or not (box or r["image"] in listed):
            row = {"id": r["image"], "question": QUESTION.format(entity), "entity": entity, "category": r["category"]}
            row |= {"bbox_px": box} if box else {}
            yield row, open_picture(r, gradient=True) if args.background == "gradient" else r["at"]


def things(args):
    """Rows with the `entity` to be named; of composites one per entity and source image, at most --max_per_entity."""
    sources = defaultdict(set)
    for r in read_source(args):
        r["task"] = args.task or ("probe" if "entities" in r else "gap" if "question" in r or "phrase" in r else "fgvr")
        if r["task"] != "probe":
            ref = REF.search(f"{r.get('answer')} {r.get('question')}")
            key = str(r.get("id", r["image"])) if r["task"] == "fgvr" else r["key"]
            yield {"entity": ref[1] if ref else r.get("phrase")} | r | {"key": key}
            continue
        for e in r.get("entities") or ():
            source, known = e.get("source", r["image"]), sources[e["entity"]]
            if source not in known and len(known) < args.max_per_entity:
                known.add(source)
                yield r | e | {"key": f"{r['key']}:{e['entity']}"}


def choices(args):
    """Wrong options are other names of the category; of a bench, first those of the same image."""
    names = defaultdict(set)  # of an image, of a category
    for r in things(args):
        for pool in (r["image_id"], r["category"]):
            names[pool] |= {name_in(r | e, "entity") for e in [{}, *(r.get("entities") or ())]}
    for r in things(args):
        entity, category, options = name_in(r, "entity"), r["category"], [o.strip() for o in r.get("options") or ()]
        if not options:  # the entity at a random place among others
            rng = random.Random(f"{args.seed}:{r['task']}:{r['key']}")
            for pool in [r["image_id"], category] if r["task"] == "gap" else [category]:
                others = sorted(names[pool] - {entity, *options})
                options += rng.sample(others, min(args.options - 1 - len(options), len(others)))
            options.insert(rng.randint(0, len(options)), entity)
        if not 2 <= len(set(options)) == len(options) <= 6 or entity not in options:
            raise InputError(f"{r['where']}: options {options}; want 2 to 6 names of a {category}, with {entity!r}")
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCDEF", options, strict=False))
        question = f"Which {category} is this?{listed}\nAnswer with the letter of one option."
        row = {"id": r["key"], "question": question, "options": options, "answer": entity, "entity": entity}
        row |= {"category": category, "image_id": r["image_id"]}
        yield row, r["at"] if r["task"] == "fgvr" else crop(open_picture(r), r)


def crop(picture, r):
    """The picture cut to the true box of a row and 5 % of its sides around it."""
    box_1000 = r.get("bbox_1000") or map(float, re.findall(r"\b\d+(?:\.\d+)?\b", REF.sub("", str(r.get("answer")))))
    box = r.get("bbox_px") or [v * n / 1000 for v, n in zip(box_1000, picture.size * 2, strict=False)]
    x1, y1, x2, y2 = checked_box(box, r, *picture.size)
    dx, dy = 0.05 * (x2 - x1), 0.05 * (y2 - y1)
    low = max(0, math.floor(x1 - dx)), max(0, math.floor(y1 - dy))
    return picture.crop((*low, min(picture.width, math.ceil(x2 + dx)), min(picture.height, math.ceil(y2 + dy))))


def refcoco(args):
    for r in read_source(args):
        x, y, width, height = [*(r.get("bbox") or ()), 0, 0, 0, 0][:4]  # COCO's way; zeros are no box
        box = checked_box(r.get("bbox_px") or [x, y, x + width, y + height], r)
        whole = "question" in r and "expression" not in r
        asks = {"question": r["question"]} if whole else {"phrase": name_in(r, "expression")}
        yield {"id": r["key"], **asks, "bbox_px": box, "category": str(r.get("split") or "none")}, r["at"]


def spoil(args):
    for r in read_source(args):
        row = {k: v for k, v in r.items() if k not in ("at", "where", "key", "images", "question_id")}
        seed = f"{args.seed}:corrupt:{r['key']}"
        yield row | {"id": r["key"]}, spoilt(open_picture(r), args.kind, args.strength, seed)


def spoilt(picture, kind, strength, seed):
    """In its own size. What is drawn depends on the seed alone: a higher strength is the same pattern, more of it."""
    amount, shorter, (width, height) = AMOUNTS[kind][strength - 1], min(picture.size), picture.size
    rng = np.random.default_rng(int.from_bytes(hashlib.md5(seed.encode()).digest()[:8], "big"))
    if kind == "jpeg":
        picture.save(data := io.BytesIO(), "JPEG", quality=amount)
        return Image.open(data)
    if kind == "blur":
        return picture.filter(ImageFilter.GaussianBlur(amount / 100 * shorter))
    if kind == "seams":
        for i in range(amount):
            grey, thick, draw = (int(rng.integers(256)),) * 3, max(1, round(shorter / 200)), ImageDraw.Draw(picture)
            (x1, x2), (y1, y2) = (sorted(rng.integers(0, n, 2).tolist()) for n in picture.size)
            if i % 2:
                draw.rectangle((x1, y1, x2, y2), outline=grey, width=thick)
            else:
                draw.line((x1, 0, x1, height) if rng.random() < 0.5 else (0, y1, width, y1), grey, thick)
        return picture
    pixels = np.asarray(picture, dtype=np.float32)
    if kind == "noise":
        pixels = pixels + rng.normal(0, amount, pixels.shape)
    else:
        pixels = pixels * (1 + amount * rng.permutation([1, -1, rng.uniform(-1, 1)]))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def main():
    args, commands = parse_args(), {"ask-boxes": ask_boxes, "choices": choices, "refcoco": refcoco, "spoil": spoil}
    path, lines = Path(args.out, "rows.jsonl"), {}
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # it names pictures that are made anew
    for row, picture in commands[args.command](args):  # picture: a path, the bytes of a file, or pixels
        if row["id"] in lines:
            raise InputError(f"{args.source}: id {row['id']!r} occurs twice; want unique ids")
        row["image"] = picture if isinstance(picture, str) else f"images/{len(lines):06d}.png"
        if isinstance(picture, bytes):  # of any format: readers look into the file
            (path.parent / row["image"]).write_bytes(picture)
        elif not isinstance(picture, str):
            picture.save(path.parent / row["image"], compress_level=1)
        lines[row["id"]] = json.dumps(row, ensure_ascii=False) + "\n"
    if not lines:
        raise InputError(f"{args.source}: nothing to ask; want rows, or images without a box (see --all)")
    Path(f"{path}.tmp").write_text("".join(lines.values()), "utf-8", "backslashreplace")
    Path(f"{path}.tmp").replace(path)
    print(f"rows: {len(lines)} rows -> {path}")


# ======== plumbing: rows and pictures ========
class InputError(ValueError):
    """What the user has to mend, in one line: where, what was found, what is wanted."""


def read_jsonl(path):
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        try:
            yield from [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError):
            raise InputError(f"{path}:{number}: {line[:80]!r}; want one JSON object a line") from None


def read_source(args):
    """Rows with `image` (its name in the source), `at` (path or bytes), `image_id`, `key` (as eval_kvg.py), `where`."""
    path, root = Path(args.source), Path(args.image_root or Path(args.source).parent).absolute()
    if path.is_dir():
        root, suffixes = path.absolute(), (".png", ".jpg", ".jpeg", ".webp", ".bmp")
        parts = [n.split("/") for n in sorted(glob.glob("*/*/*", root_dir=path)) if n.lower().endswith(suffixes)]
        rows = [{"image": "/".join(p), "entity": p[1].replace("_", " "), "category": p[0]} for p in parts]
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq
        rows = (r for batch in pq.ParquetFile(path).iter_batches(64) for r in batch.to_pylist())
    else:
        rows = read_jsonl(path)
    for number, r in enumerate(rows, 1):
        image, key = r["images"][0] if r.get("images") else r.get("image"), r.get("question_id") or r.get("id", number)
        image = image.get("bytes") or image.get("path") if isinstance(image, dict) else image
        r["where"] = f"{path}:{number} ({key})"
        if not image:
            raise InputError(f"{r['where']}: no image; want a path or bytes")
        at, image_id = (image, hashlib.md5(image).hexdigest()) if isinstance(image, bytes) else (str(root / image),) * 2
        r |= {"image": f"{path.name}#{number - 1}" if path.suffix == ".parquet" else image, "at": at, "key": str(key)}
        yield {"image_id": image_id} | r | {"category": str(r.get("category") or "none").strip().lower()}


def name_in(r, column):
    """A text of a row, stripped."""
    text = r.get(column)
    if not isinstance(text, str) or not text.strip() or "<|" in text:
        raise InputError(f"{r['where']}: {column} {text!r}; want a text without special tokens")
    return text.strip()


def checked_box(box, r, width=math.inf, height=math.inf):
    """The box [x1, y1, x2, y2] in px; 1 px may lie beyond the image."""
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)
    if not numbers or not (-1 <= box[0] < box[2] <= width + 1 and -1 <= box[1] < box[3] <= height + 1):
        raise InputError(f"{r['where']}: box {box}; want x1 < x2, y1 < y2, in an image of {width} x {height} px")
    return box


def open_picture(r, gradient=False):
    """RGB, turned as its EXIF says. Transparent parts show white, or a ground whose red and green tell x and y."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(r["at"]) if isinstance(r["at"], bytes) else r["at"]))
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:  # what Pillow raises
        raise InputError(f"{r['where']}: {e}; want an image") from None
    if image.mode == "RGB":
        return image
    ground = Image.new("RGB", image.size, "white")
    if gradient:  # as of synth_data.py --background gradient
        x, y = np.meshgrid(*(np.linspace(60, 205, n) for n in image.size))
        blue = np.full_like(x, random.Random(r["image"]).randint(170, 210))
        ground = Image.fromarray(np.dstack([x, y, blue]).astype(np.uint8))
    ground.paste(image, (0, 0), image)
    return ground


if __name__ == "__main__":
    try:
        main()
    except (InputError, FileNotFoundError) as e:
        raise SystemExit(f"rows: {e}") from None
