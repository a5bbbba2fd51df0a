"""Composes look-alike entities into one image each and writes knowledge-intensive visual grounding (KVG) samples.

reads   --source: a folder category/entity/*.png|jpg (with boxes.jsonl), a JSONL or a parquet of single-entity images
writes  --out: samples.jsonl (one row per query), images/, stats.json, preview.png, config.json

  smoke    python synth_data.py --source runs/toy/world/train --out runs/synth --num_samples 32 --canvas_size 168 112
  photos   python synth_data.py --source fgvr/ --out runs/synth --num_samples 25000 --num_workers 16

The paper (arXiv 2503.12797, data engine) draws 2 to 6 different entities of one category per image and lays them out in
a row, a column, a grid or at random; it does not state the distributions. Ours: uniform over k and over layouts. Every
sample is a function of (seed, index) alone, so the output is the same for any number of workers and after any kill.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import random
import struct
import sys
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, UnidentifiedImageError
from tqdm import tqdm

QUESTION = "Find and give the bounding box of <|object_ref_start|>{}<|object_ref_end|>"
ANSWER = "<|object_ref_start|>{}<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>"
LAYOUTS = ("horizontal", "vertical", "grid", "random")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PHOTO_FORMATS = ("JPEG", "MPO", "WEBP")  # Pillow's names; MPO: a JPEG as many phones write it


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument(
        "--source", required=True, help="folder category/entity/*, .jsonl or .parquet of single-entity images"
    )
    p.add_argument("--out", required=True, help="output folder; an interrupted run is continued")
    p.add_argument("--num_samples", type=int, default=25000, help="composite images (the paper's stage 1: 25K)")
    p.add_argument("--queries_per_image", type=int, default=1, help="rows per composite, each with another target")
    p.add_argument("--min_entities", type=int, default=2, help="fewest entities per image (paper: 2)")
    p.add_argument("--max_entities", type=int, default=6, help="most entities per image (paper: 6)")
    p.add_argument("--categories", nargs="+", help="use these categories only (default: all of the source)")
    p.add_argument(
        "--holdout_entities", type=float, default=0.0, help="share of entities kept out of every sample, 0..1"
    )
    p.add_argument("--exclude", help="drop source images that also occur here: a benchmark's .parquet, or a folder")
    p.add_argument("--exclude_distance", type=int, default=4, help="bits of 64 in which such images may differ")
    # canvas
    p.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="drawn uniformly")
    p.add_argument("--tile_px", type=int, default=448, help="nominal side of one tile, px, before the pixel cap")
    p.add_argument(
        "--max_pixels", type=int, default=401408, help="cap on width x height of a composite (paper: 401,408)"
    )
    p.add_argument(
        "--canvas_size", type=int, nargs=2, metavar=("W", "H"), help="fixed canvas, px (default: from the tiles)"
    )
    p.add_argument("--grid", type=int, nargs=2, metavar=("COLS", "ROWS"), help="fixed grid (default: near-square)")
    p.add_argument("--background", default="white", choices=["white", "noise", "gradient"], help="where no tile lies")
    # against shortcuts: seams, sizes and compression tell a model that the image was made, not taken
    p.add_argument(
        "--entity_scale", type=float, nargs=2, default=[1.0, 1.0], metavar=("LO", "HI"), help="share of its cell"
    )
    p.add_argument("--gap_px", type=int, nargs=2, default=[0, 0], metavar=("LO", "HI"), help="random gap between tiles")
    p.add_argument("--color_jitter", type=float, default=0.0, help="brightness/contrast/saturation factor 1 +- this")
    p.add_argument(
        "--jpeg_quality", type=int, nargs=2, metavar=("LO", "HI"), help="write JPEG of random quality (default: PNG)"
    )
    # run
    p.add_argument("--max_bad_images", type=int, default=0, help="unreadable source images to skip before stopping")
    p.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes; does not change the output")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if not 2 <= args.min_entities <= args.max_entities <= 6:
        p.error("want 2 <= --min_entities <= --max_entities <= 6")
    if args.num_samples < 1 or not 1 <= args.queries_per_image <= args.min_entities:
        p.error("want --num_samples >= 1 and 1 <= --queries_per_image <= --min_entities")
    if args.grid and args.grid[0] * args.grid[1] < args.max_entities:
        p.error(f"--grid {args.grid[0]} {args.grid[1]} has fewer cells than --max_entities {args.max_entities}")
    return args


# >>> shared:jsonl_io (source)
def read_jsonl(path, required=()):
    """Rows of a JSONL file as dicts. Errors: one line naming file, line and the missing column or broken JSON."""
    if not os.path.isfile(path):
        raise SystemExit(f"{path}: no such file; want JSONL, one object a line; check the path or run the stage before")
    rows = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise SystemExit(
                    f"{path}:{number}: not JSON ({e.msg}); want one object a line; mend or drop the line"
                ) from None
            if missing := [c for c in required if not isinstance(row, dict) or row.get(c) is None]:
                raise SystemExit(
                    f"{path}:{number}: no column {missing[0]!r}; want {', '.join(required)}; rerun the stage before"
                )
            rows.append(row)
    if not rows:
        raise SystemExit(f"{path}: 0 rows; want at least one; rerun the stage before")
    return rows


def write_text(path, text):
    """Writes a file whole or not at all: to a temporary name first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def complete_lines(path):
    """Rows already written by an interrupted run; cuts off a half-written last line, so that appending is safe."""
    if not os.path.exists(path):
        return []
    data = Path(path).read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]


def same_config(out, args, ignore=()):
    """Writes {out}/config.json, or checks that an earlier run into this folder had the same settings."""
    now = {k: v for k, v in vars(args).items() if k not in ignore}
    path = Path(out) / "config.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        for key, value in now.items():
            if json.loads(json.dumps(value)) != old.get(key):
                raise SystemExit(
                    f"{path}: --{key} was {old.get(key)}, now {value}; want the same settings to continue; "
                    "give another output folder or delete this one"
                )
    write_text(path, json.dumps(now, indent=1, sort_keys=True) + "\n")


# <<< shared:jsonl_io


# ---- source images ----
@dataclass(frozen=True)
class Source:
    """One single-entity image: where it is, what it shows, and the box of the entity in its own pixels."""

    path: str  # file path, or "file.parquet#row"
    name: str  # stable name for the rows: relative to the source
    entity: str
    category: str
    bbox_px: tuple


def read_sources(source):
    """All `Source` records of a folder, JSONL or parquet. Errors: one line for a missing path, column or box."""
    source = Path(source)
    if not source.exists():
        raise SystemExit(
            f"--source {source}: no such file or folder; want category/entity/*.png, .jsonl or .parquet; check the path"
        )
    if source.is_dir():
        boxes_file = source / "boxes.jsonl"
        found = sorted(p for p in source.glob("*/*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise SystemExit(f"--source {source}: no images; want category/entity/*.png|jpg below it; check the path")
        if not boxes_file.exists():
            raise SystemExit(f"{boxes_file}: no boxes; want one {{image, bbox_px}} a line; write it")
        boxes = {r["image"]: r["bbox_px"] for r in read_jsonl(boxes_file, ("image", "bbox_px"))}
        rows = [
            {
                "image": p.relative_to(source).as_posix(),
                "entity": p.parent.name.replace("_", " "),
                "category": p.parent.parent.name,
            }
            for p in found
        ]
        root, records = source, [r | {"bbox_px": boxes[r["image"]]} for r in rows if r["image"] in boxes]
        if len(records) < len(rows):
            print(
                f"{boxes_file}: no box for {len(rows) - len(records)} of {len(rows)} images; left out", file=sys.stderr
            )
    elif source.suffix == ".parquet":
        import pyarrow.parquet as pq

        wanted = ["image", "entity", "category", "bbox_px"]
        if missing := [c for c in wanted if c not in pq.read_schema(source).names]:
            raise SystemExit(f"--source {source}: no column {missing[0]!r}; want {', '.join(wanted)}; mend the file")
        table = pq.read_table(source, columns=wanted[1:])
        root, records = None, [r | {"image": f"{source}#{i}"} for i, r in enumerate(table.to_pylist())]
    else:
        root, records = source.parent, read_jsonl(source, ("image", "entity", "category", "bbox_px"))
    return [
        Source(
            path=str(root / r["image"]) if root else r["image"],
            name=r["image"],
            entity=r["entity"],
            category=r["category"].lower(),
            bbox_px=tuple(r["bbox_px"]),
        )
        for r in records
    ]


def difference_hash(image):
    """64-bit perceptual hash: does each of 8 x 9 grey cells grow brighter to the right? Survives scaling and JPEG."""
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    return np.packbits(cells[:, 1:] > cells[:, :-1]).view(">u8")[0].astype(np.uint64)


def benchmark_hashes(path):
    """Hashes of all images of a benchmark: a parquet with an `image` column, or a folder."""
    path = Path(path)
    if path.is_dir():
        images = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES)
    elif path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as pq

        rows = pq.read_table(path, columns=["image"])["image"].to_pylist()
        images = (io.BytesIO(data) for data in dict.fromkeys(r["bytes"] if isinstance(r, dict) else r for r in rows))
    else:
        raise SystemExit(f"--exclude {path}: no such folder or .parquet; want the benchmark's images; check the path")
    hashes = np.array([difference_hash(Image.open(image)) for image in images], np.uint64)
    if not len(hashes):
        raise SystemExit(f"--exclude {path}: no images; want the benchmark's images; check the path")
    return hashes


def occurs_in(source, hashes, distance):
    """Whether a source image is one of the benchmark's. An unreadable one is left to `make_sample`, which names it."""
    try:
        return bool((np.bitwise_count(hashes ^ difference_hash(load_image(source))) <= distance).any())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


@lru_cache(maxsize=1)
def image_column(file):
    """The images of a parquet, read once per process."""
    import pyarrow.parquet as pq

    return pq.read_table(file, columns=["image"])["image"]


def load_image(source):
    """RGB or RGBA image of a `Source`. Errors: OSError for a corrupt file, ValueError for a box outside the image."""
    if ".parquet#" in source.path:
        file, row = source.path.rsplit("#", 1)
        data = image_column(file)[int(row)].as_py()
        image = Image.open(io.BytesIO(data["bytes"] if isinstance(data, dict) else data))
    else:
        image = Image.open(source.path)
    mode = "RGBA" if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info else "RGB"
    if image.mode == mode:
        image.load()  # decodes; convert() would copy the pixels and forget the format
    else:
        image = image.convert(mode)
    x1, y1, x2, y2 = source.bbox_px
    if not (0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height):
        raise ValueError(f"bbox_px {list(source.bbox_px)} does not lie in the {image.width}x{image.height} image")
    return image


# ---- composition ----
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
        cols = args.grid[0] if args.grid else math.ceil(math.sqrt(k))
        rows = args.grid[1] if args.grid else math.ceil(k / cols)
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
    if args.canvas_size:
        fx, fy = args.canvas_size[0] / canvas[0], args.canvas_size[1] / canvas[1]
    else:
        fx = fy = min(1.0, math.sqrt(args.max_pixels / (canvas[0] * canvas[1])))
    cells = [(x * fx, y * fy, w * fx, h * fy) for x, y, w, h in cells]
    return (max(1, int(canvas[0] * fx + 1e-6)), max(1, int(canvas[1] * fy + 1e-6))), cells


def background_of(kind, size, rng):
    """RGB canvas. The gradient's red and green tell x and y, so that a tiny model can read positions off colours."""
    w, h = size
    if kind == "white":
        return Image.new("RGB", size, (255, 255, 255))
    if kind == "noise":
        return Image.frombytes("RGB", size, rng.randbytes(w * h * 3))
    pixels = np.empty((h, w, 3), np.uint8)
    pixels[..., 0] = np.linspace(60, 205, w)
    pixels[..., 1] = np.linspace(60, 205, h)[:, None]
    pixels[..., 2] = rng.randint(170, 210)
    return Image.fromarray(pixels)


def compose(images, bboxes_px, rng, args):
    """Pastes single-entity images on one canvas.

    Shapes: k images and k boxes (x1, y1, x2, y2) in their own px -> canvas, k boxes in canvas px, layout name.
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
        if args.color_jitter:
            alpha = tile.getchannel("A") if tile.mode == "RGBA" else None
            tile = tile.convert("RGB")
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                tile = enhance(tile).enhance(rng.uniform(1 - args.color_jitter, 1 + args.color_jitter))
            if alpha is not None:
                tile.putalpha(alpha)
        canvas.paste(tile, (x, y), tile if tile.mode == "RGBA" else None)
        fx, fy = w / image.width, h / image.height
        placed.append([x + bx1 * fx, y + by1 * fy, x + bx2 * fx, y + by2 * fy])
    return canvas, placed, layout


def save_photo_png(image, file):
    """Writes an RGB image as PNG, in half to a third of the time that Pillow takes: lossless, about a tenth larger.

    Most of a composite's time goes into its PNG, and more than half of that into Pillow's search for the best of five
    filters in every row. Here each row stores its difference to the row above, and deflate looks for repeats of the
    byte before only: empty background has those, and photos hardly any others. Drawings do, so they stay with Pillow.
    """
    rows = np.asarray(image).reshape(image.height, -1)
    data = np.empty((image.height, 1 + rows.shape[1]), np.uint8)
    data[:, 0] = 2  # PNG's filter "up"; what it subtracts from the first row is 0
    data[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=data[1:, 1:])
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 0)  # 8 bits a channel, type 2: RGB
    chunks = ((b"IHDR", header), (b"IDAT", deflate.compress(data) + deflate.flush()), (b"IEND", b""))
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    )


def to_1000(bbox_px, width, height):
    """Box in px -> ints on Qwen2-VL's 0..1000 grid of the original image; at least one cell wide and high."""
    x1, y1, x2, y2 = (round(v * 1000 / s) for v, s in zip(bbox_px, (width, height, width, height), strict=True))
    return [min(x1, 999), min(y1, 999), min(max(x2, x1 + 1), 1000), min(max(y2, y1 + 1), 1000)]


def make_sample(index, by_category, args):
    """One composite image with its rows, a function of (seed, index). Also returns the unreadable sources it met."""
    rng, bad = random.Random(f"{args.seed}:{index}"), []
    while True:
        category = rng.choice(sorted(by_category))
        entities = by_category[category]
        names = rng.sample(sorted(entities), min(len(entities), rng.randint(args.min_entities, args.max_entities)))
        sources, images = [rng.choice(entities[name]) for name in names], []
        for source in sources:
            try:
                images.append(load_image(source))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, UnidentifiedImageError) as e:
                bad.append((source.path, str(e)))
        if len(images) == len(sources):
            break
        if len({path for path, _ in bad}) > args.max_bad_images or len(bad) > 1000:
            return None, bad
    canvas, boxes, layout = compose(images, [s.bbox_px for s in sources], rng, args)
    suffix = "jpg" if args.jpeg_quality else "png"
    file = Path(args.out) / "images" / f"{index:06d}.{suffix}"
    if args.jpeg_quality:
        canvas.save(file, quality=rng.randint(*args.jpeg_quality))
    elif any(image.format in PHOTO_FORMATS for image in images):
        save_photo_png(canvas, file)
    else:
        canvas.save(file, compress_level=1)
    boxes_1000 = [to_1000(b, *canvas.size) for b in boxes]
    listed = [{"entity": s.entity, "bbox_px": [round(v, 2) for v in b], "bbox_1000": n, "source": s.name}
              for s, b, n in zip(sources, boxes, boxes_1000, strict=True)]  # fmt: skip
    rows = []
    for target in rng.sample(range(len(names)), args.queries_per_image):
        question, answer = QUESTION.format(names[target]), ANSWER.format(names[target], *boxes_1000[target])
        messages = [{"role": "user", "content": "<image>" + question}, {"role": "assistant", "content": answer}]
        rows.append(
            {
                "id": f"{args.seed}-{index:06d}-{target}",
                "images": [f"images/{file.name}"],
                "width": canvas.width,
                "height": canvas.height,
                "category": category,
                "layout": layout,
                "entities": listed,
                "target": target,
                "question": question,
                "answer": answer,
                "messages": messages,
            }
        )
    return rows, bad


def worker_pool(num_workers):
    """Processes that keep freed image memory for the next image: at most 8 blocks of up to 16 MB each.

    Else the system takes it back and hands out pages cleared anew, which costs about a tenth of a photo composite.
    """
    return multiprocessing.Pool(num_workers, initializer=Image.core.set_blocks_max, initargs=(8,))


# ---- pictures for people ----
def draw_preview(rows, root, path, most=12):
    """Contact sheet of the first composites with every box drawn, the target's in red."""
    tiles = []
    for row in list({r["images"][0]: r for r in rows}.values())[:most]:
        image = Image.open(root / row["images"][0]).convert("RGB")
        scale = 360 / image.width
        image = image.resize((360, max(1, round(image.height * scale))))
        draw = ImageDraw.Draw(image)
        for i, e in enumerate(row["entities"]):
            color = (230, 0, 0) if i == row["target"] else (0, 0, 0)
            draw.rectangle([v * scale for v in e["bbox_px"]], outline=color, width=2)
            draw.text((e["bbox_px"][0] * scale + 3, e["bbox_px"][1] * scale + 2), e["entity"], fill=color)
        tiles.append(image)
    height = max(t.height for t in tiles)
    sheet = Image.new("RGB", (370 * min(4, len(tiles)), (height + 10) * math.ceil(len(tiles) / 4)), (255, 255, 255))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % 4 * 370 + 5, i // 4 * (height + 10) + 5))
    sheet.save(path)


def main():
    args, start = parse_args(), time.time()
    sources = [s for s in read_sources(args.source) if not args.categories or s.category in args.categories]
    excluded = []
    if args.exclude:
        check = partial(occurs_in, hashes=benchmark_hashes(args.exclude), distance=args.exclude_distance)
        with worker_pool(args.num_workers) as pool:
            occurs = list(
                tqdm(pool.imap(check, sources, chunksize=64), total=len(sources), disable=not sys.stderr.isatty())
            )
        excluded = [s.name for s, found in zip(sources, occurs, strict=True) if found]
        sources = [s for s, found in zip(sources, occurs, strict=True) if not found]
    names = sorted({(s.category, s.entity) for s in sources})
    held = set(random.Random(f"{args.seed}:holdout").sample(names, round(args.holdout_entities * len(names))))
    grouped = defaultdict(lambda: defaultdict(list))
    for s in sources:
        if (s.category, s.entity) not in held:
            grouped[s.category][s.entity].append(s)
    by_category = {c: dict(e) for c, e in grouped.items() if len(e) >= args.min_entities}
    if not by_category:
        raise SystemExit(
            f"--source {args.source}: no category with {args.min_entities} entities; want look-alikes; add images"
        )

    out = Path(args.out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    same_config(out, args, ignore=("out", "num_workers"))
    samples = out / "samples.jsonl"
    rows = complete_lines(samples)
    done = len({r["images"][0] for r in rows})
    whole = done - (len(rows) % args.queries_per_image > 0)  # a composite whose last rows were cut off is made again
    rows = rows[: whole * args.queries_per_image]
    write_text(samples, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))

    bad = {}
    work = partial(make_sample, by_category=by_category, args=args)
    with worker_pool(args.num_workers) as pool, open(samples, "a", encoding="utf-8") as f:
        todo = range(whole, args.num_samples)
        for new, met in tqdm(
            pool.imap(work, todo, chunksize=8), total=len(todo), disable=not sys.stderr.isatty(), desc="synth"
        ):
            for path, reason in met:
                if path not in bad:
                    print(f"{path}: unreadable ({reason}); skipped", file=sys.stderr)
                bad[path] = reason
            if new is None or len(bad) > args.max_bad_images:
                raise SystemExit(
                    f"{len(bad)} unreadable source images, last {path}: {reason}; want at most --max_bad_images "
                    f"{args.max_bad_images}; mend the images or raise the flag"
                )
            f.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in new))
            rows += new
    draw_preview(rows, out, out / "preview.png")
    stats = {
        "images": args.num_samples,
        "rows": len(rows),
        "categories": Counter(r["category"] for r in rows),
        "entities": len({(r["category"], e["entity"]) for r in rows for e in r["entities"]}),
        "entities_per_image": Counter(len(r["entities"]) for r in rows),
        "layouts": Counter(r["layout"] for r in rows),
        "held_out_entities": sorted(f"{c}/{e}" for c, e in held),
        "excluded": excluded,
        "bad_images": bad,
        "seconds": round(time.time() - start, 1),
    }
    write_text(out / "stats.json", json.dumps(stats, indent=1, ensure_ascii=False) + "\n")
    print(
        f"synth_data: {stats['images']} images, {stats['rows']} rows, {stats['entities']} entities, "
        f"{len(excluded)} excluded, {len(bad)} unreadable, {stats['seconds']} s -> {samples}, {out / 'preview.png'}"
    )


if __name__ == "__main__":
    main()
