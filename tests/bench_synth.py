"""Composites per second of synth_data.py from JPEG photos, against plain Pillow. By hand: python tests/bench_synth.py

Smooth random photos (JPEG, 500x400) become composites of up to 401,408 px, PNG or JPEG (quality 92), in turns by

  plain   one process: open, convert, resize, paste, save with Pillow's defaults, without start-up; the layout is ours
  1, N    synth_data.py as a command, doing all it does, with 1 and with --workers processes

The pixels of PNG are checked to be equal. Of our time that of a run of 12 composites is taken off: what is paid once.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import bench_tools as tools
import numpy as np
from PIL import Image

ONCE = 12  # composites that the preview shows; fewer would make it cheaper than that of a whole run
FORMATS = {"PNG": ((), {}), "JPEG": (("--jpeg_quality", 92, 92), {"quality": 92})}

def make_sources(folder, count):
    """bird/species_N/*.jpg with boxes.jsonl. Every box is its whole photo, so that our rows tell where tiles lie."""
    boxes = []
    for i in range(count):
        rng = np.random.default_rng(i)
        pixels = rng.normal(0, 3, (400, 500, 3))  # a camera's noise
        for cells, share in ((4, 0.6), (16, 0.3), (64, 0.1)):  # shapes, parts, texture
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            pixels += share * np.asarray(small.resize((500, 400), Image.Resampling.BICUBIC), np.float64)
        path = folder / f"bird/species_{i % 20}/{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        boxes.append({"image": str(path.relative_to(folder)), "bbox_px": [0, 0, 500, 400]})
    (folder / "boxes.jsonl").write_text("".join(json.dumps(b) + "\n" for b in boxes))

def run_ours(source, out, count, workers, flags):
    flags += ("--num_samples", count, "--num_workers", workers)
    tools.run(sys.executable, "synth_data.py", "--source", source, "--out", out, *flags)

def run_plain(source, out, rows, options):
    out.mkdir(parents=True)
    for row in rows:
        canvas = Image.new("RGB", (row["width"], row["height"]), (255, 255, 255))
        for e in row["entities"]:
            x1, y1, x2, y2 = map(round, e["bbox_px"])
            tile = Image.open(source / e["source"]).convert("RGB").resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
            canvas.paste(tile, (x1, y1))
        canvas.save(out / Path(row["images"][0]).name, **options)

if __name__ == "__main__":
    p = tools.parser(__doc__, "synth")
    p.add_argument("--count", type=int, default=200, help=f"composites per run, more than {ONCE}")
    p.add_argument("--sources", type=int, default=200, help="photos")
    p.add_argument("--workers", type=int, default=2, help="processes of the second run of ours")
    args = p.parse_args()
    result, seconds = {"args": vars(args)}, tools.seconds_of
    with tempfile.TemporaryDirectory() as folder:
        tmp, source = Path(folder), Path(folder, "source")
        make_sources(source, args.sources)
        for kind, (flags, options) in FORMATS.items():
            run_ours(source, tmp / kind, args.count, args.workers, flags)
            rows, rates = tools.read_rows(tmp / kind / "samples.jsonl"), []
            rows = rows[: len(rows) // 4] if kind == "PNG" else rows  # for plain, which takes so long
            for n in range(args.rounds):
                out = tmp / f"{kind}{n}"
                rates.append({"plain": len(rows) / seconds(partial(run_plain, source, out / "plain", rows, options))})
                for w in sorted({1, args.workers}):
                    once, whole = (seconds(partial(run_ours, source, out / f"{w}-{k}", k, w, flags))
                                   for k in (ONCE, args.count))  # fmt: skip
                    rates[-1][str(w)] = (args.count - ONCE) / (whole - once)
            for path in (tmp / f"{kind}0/plain").iterdir():
                both = (np.asarray(Image.open(f)) for f in (tmp / kind / "images" / path.name, path))
                assert kind == "JPEG" or np.array_equal(*both), f"{path.name}: ours differs from plain"
            for side in rates[0]:
                result[f"{kind}/s, {side}"] = tools.spread([r[side] for r in rates])
                result[f"{kind}, {side} / plain"] = tools.spread([r[side] / r["plain"] for r in rates])
                tools.show(f"{kind}, {side}", result[f"{kind}/s, {side}"], "/s")
    tools.write_result(args.out, result)
