"""Composes look-alike entities into one image each and writes knowledge-intensive visual grounding (KVG) samples.

reads   --source: a folder category/entity/*.jpg|png, or a JSONL or parquet with image, entity, category (and bbox_px)
        --boxes: {image, bbox_px} a line, or predictions.jsonl of eval_kvg.py (question_id: the image as in the source)
        --exclude: what no sample may show, as a benchmark's images: a parquet, JSONL or folder
writes  --out: samples.jsonl (a row per query), images/, stats.json, preview.png, run.json

  smoke    python synth_data.py --source runs/toy/world/train --out runs/synth --num_samples 32 --canvas_size 168 112
  photos   python synth_data.py --source fgvr/ --exclude kvg-bench.parquet --jpeg_quality 90 95 --out runs/synth
  boxes    tools/rows.py ask-boxes, eval_kvg.py --prompt direct, then --boxes runs/boxes/predictions.jsonl

The paper (arXiv 2503.12797) does not state how it draws: ours is uniform over 2 to 6 entities, layouts and categories.
The released data is not (MB: bird 27, car 18, food 7, aircraft 6, reptilia 5), see --category_weights. Not here: the
refinement of boxes by SAM3. A sample is a function of (seed, index): equal for any number of workers, after any kill.
"""

import argparse
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import random
import struct
import time
from collections import Counter, defaultdict, namedtuple
from functools import lru_cache, partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from tqdm import tqdm

LAYOUTS = ("horizontal", "vertical", "grid", "random")
FREE = {"out", "num_samples", "num_workers", "max_bad_rows"}  # what may change when a run goes on
FREE |= {"source", "categories", "boxes", "min_box_area", "exclude", "exclude_distance"}  # if the sources stay the same


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = p.add_argument
    # fmt: off
    add("--source", required=True, help="folder category/entity/*, .jsonl or .parquet of single-entity images")
    add("--out", required=True, help="output folder; an interrupted run is continued")
    add("--num_samples", type=int, default=25000, help="composite images (the paper's stage 1: 25K)")
    add("--queries_per_image", type=int, default=1, help="rows per composite, each with another target")
    add("--min_entities", type=int, default=2, help="fewest entities per image (paper: 2)")
    add("--max_entities", type=int, default=6, help="most entities per image (paper: 6)")
    add("--categories", nargs="+", help="use these only, in any case (default: all of the source)")
    add("--category_weights", default="uniform", choices=["uniform", "images"], help="all alike, or by their images")
    add("--holdout_entities", type=float, default=0.0, help="share of entities kept out of every sample, 0..1")
    # boxes, leaks
    add("--boxes", help="boxes or predictions (default: boxes.jsonl in a source folder, else SOURCE.boxes.jsonl)")
    add("--min_box_area", type=float, default=0.02, help="predicted boxes below this share of their image are left out")
    add("--exclude", help="source images that occur here too are left out: scaled, compressed or mirrored, not cropped")
    add("--exclude_distance", type=int, default=4, help="bits of 64 in which two hashes of the same picture may differ")
    # canvas
    add("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="drawn uniformly")
    add("--tile_px", type=int, default=448, help="nominal side of one tile, px, before the pixel cap")
    add("--max_pixels", type=int, default=401408, help="cap on width x height of a composite (paper: 401,408)")
    add("--canvas_size", type=int, nargs=2, metavar=("W", "H"), help="fixed canvas, px (default: from the tiles)")
    add("--grid", type=int, nargs=2, metavar=("COLS", "ROWS"), help="fixed grid (default: near-square)")
    add("--background", default="white", choices=["white", "noise", "gradient"], help="where no tile lies")
    # against shortcuts: seams, sizes and compression tell a model that the image was made, not taken
    add("--entity_scale", type=float, nargs=2, default=[1.0, 1.0], metavar=("LO", "HI"), help="share of its cell")
    add("--gap_px", type=int, nargs=2, default=[0, 0], metavar=("LO", "HI"), help="random gap between tiles, px")
    add("--color_jitter", type=float, default=0.0, help="brightness, contrast and saturation x 1 +- this, 0..1")
    add("--jpeg_quality", type=int, nargs=2, metavar=("LO", "HI"), help="write JPEG of random quality (default: PNG)")
    # run
    add("--max_bad_rows", type=int, help="unreadable images and wrong boxes to skip (default: 1 %% of the source)")
    add("--num_workers", type=int, default=os.cpu_count(), help="processes; does not change the output")
    add("--seed", type=int, default=0)
    # fmt: on
    args = p.parse_args(argv)
    if not max(2, args.queries_per_image) <= args.min_entities <= args.max_entities <= 6 or args.queries_per_image < 1:
        p.error("want 2 <= --min_entities <= --max_entities <= 6 and 1 <= --queries_per_image <= --min_entities")
    if args.grid and math.prod(args.grid) < args.max_entities or min(args.num_samples, args.num_workers) < 1:
        p.error("want a --grid of at least --max_entities cells, and at least 1 for --num_samples and --num_workers")
    if not 0 < args.entity_scale[0] <= args.entity_scale[1] <= 1 or not 0 <= args.gap_px[0] <= args.gap_px[1]:
        p.error("want 0 < LO <= HI <= 1 for --entity_scale and 0 <= LO <= HI for --gap_px")
    return args


# ---- 1. sources: which can be used, and their boxes ----
def look_at(at, views=0):
    """(size, hashes, None) of an image, or (None, [], why it is unreadable). `views`: 1 hashes it, 2 its mirror too."""
    try:
        image = open_image(at)
    except UNREADABLE as e:
        return None, [], f"bad image: {e}"
    return image.size, [difference_hash(im) for im in (image, ImageOps.mirror(image))[:views]], None


def difference_hash(image):
    """64 bits: does each of 8 x 9 grey cells grow brighter to the right? Scaling, JPEG and brightness change few."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS))
    return (cells[:, 1:] > cells[:, :-1]).ravel()


def box_of(source, line, size, min_box_area):
    """The box in px of an image of this size, or why there is none. `line`: what --boxes says of it, if anything.

    A box up to 1 px beyond the image is clipped. A model's is believed if it is neither small nor thinner than 1:10.
    """
    if box := source.bbox_px or line.get("bbox_px"):
        four = isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)
        cut = [min(max(v, 0), n) for v, n in zip(box, size * 2, strict=True)] if four else [0] * 4
        if cut[0] < cut[2] and cut[1] < cut[3] and max(abs(v - c) for v, c in zip(box, cut, strict=True)) <= 1:
            return cut
        return f"bad box: {box}; want x1 < x2, y1 < y2 in {size[0]}x{size[1]}"
    if not line.get("pred_bbox_1000"):
        return "not one box" if "pred_bbox_1000" in line else line.get("reason") or ("null" if line else "not listed")
    x1, y1, x2, y2 = (round(v * n / 1000, 2) for v, n in zip(line["pred_bbox_1000"], size * 2, strict=True))
    short, long = sorted((x2 - x1, y2 - y1))
    if short < 8 or short * long < min_box_area * size[0] * size[1]:
        return "too small"
    return "too thin" if long > 10 * short else [x1, y1, x2, y2]


def read_boxes(path):
    """{image: its line} of a boxes file, where the last line counts, or of predictions, where the first answer does."""
    lines = {}
    for number, r in enumerate(read_jsonl(path), 1):
        name = r.get("question_id", r.get("image"))
        if name is None or not r.keys() & {"bbox_px", "pred_bbox_1000"}:
            raise InputError(f"{path}:{number} ({name}): no box; want image, bbox_px or question_id, pred_bbox_1000")
        if not r.get("sample"):
            lines[str(name)] = r
    return lines


def usable_sources(args):
    """Sources with their box, every one looked at once; and {name: why it is left out} of the others."""
    path, wanted, usable, left_out = Path(args.source), {c.lower() for c in args.categories or ()}, [], {}
    sources = [s for s in list_sources(path) if not wanted or s.category in wanted]
    boxes = args.boxes or next(filter(os.path.exists, (path / "boxes.jsonl", f"{path}.boxes.jsonl")), None)
    lines, rows = read_boxes(boxes) if boxes else {}, image_rows(Path(args.exclude)) if args.exclude else []
    names = {e["source"] for r in rows for e in r.get("entities") or ()}  # if they are our own composites
    with Pool(args.num_workers, start_worker) as pool:
        excluded = [*pool.imap(partial(look_at, views=2), dict.fromkeys(r["at"] for r in rows), 16)]
        bench = np.array([h for _, hashes, _ in excluded for h in hashes])
        if args.exclude and not len(bench):
            raise InputError(f"--exclude {args.exclude}: no images; want a parquet, JSONL or folder of some")
        if unreadable := [reason for _, _, reason in excluded if reason]:
            print(f"--exclude {args.exclude}: {len(unreadable)} skipped, {unreadable[0]}", flush=True)
        looks = pool.imap(partial(look_at, views=int(len(bench) > 0)), [s.at for s in sources], 64)
        for s, (size, hashes, reason) in zip(sources, tqdm(looks, "sources", len(sources), disable=None), strict=True):
            if s.name in names or hashes and (bench != hashes[0]).sum(1).min() <= args.exclude_distance:
                reason = "excluded"
            found = reason or box_of(s, lines.get(s.name) or lines.get(str(s.at), {}), size, args.min_box_area)
            if isinstance(found, str):
                left_out[s.name] = found
            else:
                usable.append(s._replace(bbox_px=found))
    return usable, left_out


# ---- 2. composition ----
def cells_of(layout, sizes, rng, args):
    """Canvas size and one cell (x, y, w, h) per image, all float px. `sizes` holds (w, h) of the images."""
    tile, k = float(args.tile_px), len(sizes)
    if layout == "horizontal":
        widths = [tile * w / h for w, h in sizes]
        canvas, cells = (sum(widths), tile), [(sum(widths[:i]), 0.0, w, tile) for i, w in enumerate(widths)]
    elif layout == "vertical":
        heights = [tile * h / w for w, h in sizes]
        canvas, cells = (tile, sum(heights)), [(0.0, sum(heights[:i]), tile, h) for i, h in enumerate(heights)]
    elif layout == "grid":
        cols = math.ceil(math.sqrt(k))
        cols, rows = args.grid or (cols, math.ceil(k / cols))
        at = rng.sample(range(cols * rows), k)
        canvas, cells = (cols * tile, rows * tile), [(i % cols * tile, i // cols * tile, tile, tile) for i in at]
    else:  # random: rectangles by rejection, a little smaller after every failed round
        side = tile * math.sqrt(k) * 1.3
        canvas = (side, side) if not args.canvas_size else (side, side * args.canvas_size[1] / args.canvas_size[0])
        shrink, cells = 1.0, []
        while len(cells) < k:
            cells = []
            for w, h in sizes:
                s = shrink * tile * rng.uniform(0.6, 1.0) / max(w, h)
                for _ in range(50):
                    x, y = rng.uniform(0, max(0.0, canvas[0] - s * w)), rng.uniform(0, max(0.0, canvas[1] - s * h))
                    if all(x + s * w <= a or a + c <= x or y + s * h <= b or b + d <= y for a, b, c, d in cells):
                        cells.append((x, y, s * w, s * h))
                        break
            shrink *= 0.9
    cap = min(1.0, math.sqrt(args.max_pixels / (canvas[0] * canvas[1])))
    fx, fy = (n / c for n, c in zip(args.canvas_size, canvas, strict=True)) if args.canvas_size else (cap, cap)
    cells = [(x * fx, y * fy, w * fx, h * fy) for x, y, w, h in cells]
    return (max(1, int(canvas[0] * fx + 1e-6)), max(1, int(canvas[1] * fy + 1e-6))), cells


def background_of(kind, size, rng):
    """RGB canvas. The gradient's red and green tell x and y, so that a tiny model can read positions off colours."""
    if kind == "white":
        return Image.new("RGB", size, "white")
    if kind == "noise":
        return Image.frombytes("RGB", size, rng.randbytes(math.prod(size) * 3))
    x, y = (np.linspace(60, 205, n).astype(np.uint8) for n in size)
    return Image.fromarray(np.dstack([*np.meshgrid(x, y), np.full(size[::-1], rng.randint(170, 210), np.uint8)]))


def compose(images, bboxes_px, rng, args):
    """k images and their boxes (x1, y1, x2, y2) in px -> canvas, k boxes in canvas px, layout name.

    Every image is resized once, keeps its aspect up to rounding, and its box is mapped by the very same factors.
    """
    layout = rng.choice(args.layouts)
    canvas_size, cells = cells_of(layout, [im.size for im in images], rng, args)
    canvas, placed = background_of(args.background, canvas_size, rng), []
    for image, (bx1, by1, bx2, by2), (cx, cy, cw, ch) in zip(images, bboxes_px, cells, strict=True):
        gap = min(rng.uniform(*args.gap_px), cw / 2, ch / 2)
        cx, cy, cw, ch = cx + gap / 2, cy + gap / 2, cw - gap, ch - gap
        s = min(cw / image.width, ch / image.height) * rng.uniform(*args.entity_scale)
        w, h = max(1, int(image.width * s + 1e-6)), max(1, int(image.height * s + 1e-6))
        x, y = int(cx + rng.uniform(0, cw - w)), int(cy + rng.uniform(0, ch - h))
        tile = image.resize((w, h), Image.Resampling.BILINEAR)
        alpha = tile.getchannel("A") if tile.mode == "RGBA" else None
        if args.color_jitter:
            tile = tile.convert("RGB")
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                tile = enhance(tile).enhance(rng.uniform(1 - args.color_jitter, 1 + args.color_jitter))
        canvas.paste(tile, (x, y), alpha)
        fx, fy = w / image.width, h / image.height
        placed.append([x + bx1 * fx, y + by1 * fy, x + bx2 * fx, y + by2 * fy])
    return canvas, placed, layout


def to_1000(bbox_px, width, height):
    """Box in px -> ints on Qwen2-VL's 0..1000 grid of the original image; at least one cell wide and high."""
    x1, y1, x2, y2 = (round(v * 1000 / s) for v, s in zip(bbox_px, (width, height, width, height), strict=True))
    return [min(x1, 999), min(y1, 999), min(max(x2, x1 + 1), 1000), min(max(y2, y1 + 1), 1000)]


def start_worker(*shared):  # once per process: as an argument it would be pickled again with every task
    global SHARED
    SHARED = shared
    Image.core.set_blocks_max(8)  # 16 MB each, kept for the next image: a sixth of the time


def make_sample(index):
    """Rows of one composite image, which it writes: a function of (seed, index)."""
    by_category, drawn, args = SHARED  # {category: {entity: sources}}; categories, each as often as it weighs
    rng = random.Random(f"{args.seed}:{index}")
    category = rng.choice(drawn)
    entities = by_category[category]
    names = rng.sample(sorted(entities), min(len(entities), rng.randint(args.min_entities, args.max_entities)))
    sources = [rng.choice(entities[name]) for name in names]
    canvas, boxes, layout = compose([open_image(s.at) for s in sources], [s.bbox_px for s in sources], rng, args)
    file = f"images/{index:06d}.{'jpg' if args.jpeg_quality else 'png'}"
    quality = {"quality": rng.randint(*args.jpeg_quality)} if args.jpeg_quality else {"compress_level": 1}
    canvas.save(Path(args.out, file), **quality)
    listed = [{"entity": s.entity, "bbox_px": [round(v, 2) for v in b], "bbox_1000": to_1000(b, *canvas.size),
               "source": s.name} for s, b in zip(sources, boxes, strict=True)]  # fmt: skip
    rows = []
    for target in rng.sample(range(len(names)), args.queries_per_image):
        question, answer = QUESTION.format(names[target]), ANSWER.format(names[target], *listed[target]["bbox_1000"])
        messages = [{"role": "user", "content": "<image>" + question}, {"role": "assistant", "content": answer}]
        rows.append({
            "id": f"{args.seed}-{index:06d}-{target}", "images": [file], "width": canvas.width, "height": canvas.height,
            "category": category, "layout": layout, "entities": listed, "target": target,
            "question": question, "answer": answer, "messages": messages,
        })  # fmt: skip
    return rows


def main():
    args, start = parse_args(), time.time()
    out, samples = Path(args.out), Path(args.out, "samples.jsonl")
    # 1. images that can be read, have a box, and are not excluded
    sources, left_out = usable_sources(args)
    reasons = Counter(reason.split(":")[0] for reason in left_out.values())
    bad = {name: reason for name, reason in left_out.items() if reason.startswith(("bad image:", "bad box:"))}
    most_bad = math.ceil((len(sources) + len(left_out)) / 100) if args.max_bad_rows is None else args.max_bad_rows
    if len(bad) > most_bad:
        raise InputError(f"{args.source}: {len(bad)} bad, {to_json(bad)[:500]}; want --max_bad_rows, now {most_bad}")
    # 2. look-alikes: the entities of one category, without the held-out ones
    names = sorted({(s.category, s.entity) for s in sources})
    held = set(random.Random(f"{args.seed}:holdout").sample(names, round(args.holdout_entities * len(names))))
    grouped = defaultdict(lambda: defaultdict(list))
    for s in sources:
        if (s.category, s.entity) not in held:
            grouped[s.category][s.entity].append(s)
    by_category = {c: dict(entities) for c, entities in grouped.items() if len(entities) >= args.min_entities}
    if not by_category:
        raise InputError(f"{args.source}: {len(sources)} usable, {dict(reasons)}; want --min_entities of one category")
    weights = {c: sum(map(len, e.values())) if args.category_weights == "images" else 1 for c, e in by_category.items()}
    drawn = [c for c in sorted(by_category) for _ in range(weights[c])]
    # 3. composites, in order; what an interrupted run finished stays
    listed = f"{len(sources)}, {hashlib.md5(repr([(s.name, s.bbox_px) for s in sources]).encode()).hexdigest()}"
    start_run(out, vars(args) | {"usable_sources": listed}, {"usable_sources", *vars(args)} - FREE)
    (out / "images").mkdir(exist_ok=True)
    rows = read_jsonl(samples, unfinished=True)
    whole = min(len(rows) // args.queries_per_image, args.num_samples)
    rows, todo = rows[: whole * args.queries_per_image], range(whole, args.num_samples)
    write(samples, *map(to_json, rows))
    with Pool(args.num_workers, start_worker, (by_category, drawn, args)) as pool, open(samples, "a", 1, "utf-8") as f:
        for new in tqdm(pool.imap(make_sample, todo, 8), "synth", len(todo), disable=None):
            f.writelines(to_json(r) + "\n" for r in new)
            rows += new
    # 4. what people look at
    draw_preview(rows[:: args.queries_per_image], out)
    stats = {"images": args.num_samples, "rows": len(rows), "categories": Counter(r["category"] for r in rows),
             "entities": len({(r["category"], e["entity"]) for r in rows for e in r["entities"]}),
             "entities_per_image": Counter(len(r["entities"]) for r in rows), "left_out": reasons,
             "layouts": Counter(r["layout"] for r in rows), "held_out_entities": sorted(map("/".join, held)),
             "left_out_sources": left_out, "seconds": round(time.time() - start, 1)}  # fmt: skip
    write(out / "stats.json", to_json(stats, indent=1))
    print(f"synth_data: {len(rows)} rows, sources left out: {dict(reasons)}, {stats['seconds']} s -> {samples}")


def draw_preview(rows, out):
    """Contact sheet of the first twelve images with all boxes, the target's in red."""
    sheet = Image.new("RGB", (4 * 370, 3 * 370), "white")
    for i, row in enumerate(rows[:12]):
        image = ImageOps.contain(Image.open(out / row["images"][0]).convert("RGB"), (360, 360))
        draw, scale = ImageDraw.Draw(image), image.width / row["width"]
        for k, e in enumerate(row["entities"]):
            box, color = [v * scale for v in e["bbox_px"]], "red" if k == row["target"] else "black"
            draw.rectangle(box, outline=color, width=2)
            draw.text(box[:2], f" {e['entity']}", color)
        sheet.paste(image, (i % 4 * 370, i // 4 * 370))
    sheet.save(out / "preview.png")


# ======== plumbing: source images ========
Source = namedtuple("Source", "name at category entity bbox_px")  # at: see image_rows; bbox_px: in its own px, or None
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)  # says Pillow


def image_rows(path, pattern="**/*.*"):
    """Rows of a folder of images, a JSONL or a parquet, with `at`: a path, or (parquet, row group, row in it)."""
    if path.is_dir():
        names = sorted(Path(n) for n in glob.glob(pattern, root_dir=path, recursive=True))  # follows links
        return [{"image": str(n), "at": path / n, "category": n.parts[0], "entity": n.parent.name.replace("_", " ")}
                for n in names if n.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp")]  # fmt: skip
    if path.suffix != ".parquet":
        rows = read_jsonl(path)
        return [r | {"at": path.parent / str(r.get("image") or (r.get("images") or [None])[0])} for r in rows]
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    columns = [c for c in file.schema_arrow.names if c in ("category", "entity", "bbox_px")]
    ats = [(path, g, i) for g in range(file.num_row_groups) for i in range(file.metadata.row_group(g).num_rows)]
    rows = file.read(columns).to_pylist() or [{} for _ in ats]
    return [r | {"image": f"{path.name}#{i}", "at": at} for i, (r, at) in enumerate(zip(rows, ats, strict=True))]


def list_sources(path):
    """All `Source`s of a folder category/entity/*, a JSONL or a parquet."""
    sources = []
    for number, r in enumerate(image_rows(path, "*/*/*.*"), 1):
        names = [r.get(column) for column in ("image", "category", "entity")]
        if not all(isinstance(n, str) and n.strip() and "<|" not in n for n in names):
            raise InputError(f"{path}:{number}: image, category, entity {names}; want texts without special tokens")
        sources.append(Source(names[0], r["at"], names[1].strip().lower(), names[2].strip(), r.get("bbox_px")))
    return sources


@lru_cache(maxsize=4)
def image_column(file, group):
    from pyarrow import parquet  # a source of gigabytes is never loaded whole
    return parquet.ParquetFile(file).read_row_group(group, ["image"])["image"]


def open_image(at):
    """RGB picture of a row's `at`, RGBA if it has transparency; turned as its EXIF says."""
    if isinstance(at, tuple):
        file, group, row = at
        cell = image_column(file, group)[row].as_py()
        cell = cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell
        at = io.BytesIO(cell) if isinstance(cell, bytes) else file.parent / str(cell)
    with Image.open(at) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return image.convert("RGBA" if image.has_transparency_data else "RGB")


# ======== plumbing: the same bytes stand in other scripts ========
# >>> shared:files (source)
QUESTION = "Find and give the bounding box of <|object_ref_start|>{}<|object_ref_end|>"
ANSWER = "<|object_ref_start|>{}<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>"
R1_SUFFIX = ("  Output the thinking process in <think> </think> "
             "and final answer (bounding box) in <answer> </answer> tags.")
to_json = partial(json.dumps, ensure_ascii=False)

class InputError(ValueError):
    """What the user has to mend, in one line: where, what was found, what is wanted."""

def read_jsonl(path, unfinished=False):
    """Rows as dicts. `unfinished`: of a killed run, if there was one, without its cut last line."""
    lines = b"" if unfinished and not os.path.exists(path) else Path(path).read_bytes()
    rows = []
    for number, line in enumerate(lines.split(b"\n")[: -1 if unfinished else None], 1):
        try:
            rows += [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError):
            raise InputError(f"{path}:{number}: {line[:80]!r}; want one JSON object a line") from None
    return rows

def write(path, *lines):
    """A text file, whole or not at all."""
    Path(f"{path}.tmp").write_text("".join(f"{line}\n" for line in lines), "utf-8", "backslashreplace")
    os.replace(f"{path}.tmp", path)

def start_run(out, settings, fixed=()):
    """Locks the folder, writes run.json: settings and a hash of this script. Says which an earlier run had otherwise;
    those in `fixed` are refused: one file would hold two kinds of rows."""
    global LOCK  # until the process ends
    out.mkdir(parents=True, exist_ok=True)
    LOCK, path = open(out / ".lock", "w"), out / "run.json"
    try:
        fcntl.lockf(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another run writes here; want one at a time") from None
    except OSError:
        pass  # some file systems have no locks
    now = json.loads(to_json(settings | {"script": hashlib.md5(Path(__file__).read_bytes()).hexdigest()}))
    old = json.loads(path.read_bytes()) if path.exists() else now
    changed = {key: f"{old.get(key)} -> {now[key]}" for key in now if old.get(key) != now[key]}
    if changed.keys() & set(fixed):
        raise InputError(f"{path}: {changed}; want the same settings, or another folder")
    if changed:
        print(f"{path}: goes on with other settings, {changed}", flush=True)
    write(path, to_json(now, indent=1))
# <<< shared:files


if __name__ == "__main__":
    try:
        main()
    except (InputError, FileNotFoundError) as e:
        raise SystemExit(f"synth_data: {e}") from None
