"""Composites per second of synth_data.py from JPEG photos, against plain Pillow. By hand: python tests/bench_synth.py

Makes 200 smooth random photos (JPEG, quality 90, 500x400), and composites of up to 401,408 px from them, saved as PNG.
In every round, one after the other, so that other load on the machine falls on all:

  plain      one process: open, convert to RGB, resize, paste, save. The layout is handed to it (our own rows), so it
             draws nothing, maps no box, writes no row, statistics or preview; and it is timed without its start-up
  default    the same with Pillow's own PNG settings, as one would write it first (on a part of the composites)
  1, N       synth_data.py as a command, doing all it does, with 1 and with --workers processes

Both make the same composites; that the pixels are equal is checked first. plain saves at compress_level 1, as
synth_data.py does for drawings; for photos that has a faster way (save_photo_png). The size of both is printed.
Our rate is given whole ("all": with interpreter, imports, processes, preview) and without start-up ("steady": a run of
PREVIEW composites, which has all that is paid once, is timed too and taken off). Neither side caches a source.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, features

ROOT = Path(__file__).resolve().parents[1]
PREVIEW = 12  # composites that the preview shows; fewer would make it cheaper than that of a whole run


def make_sources(folder, count, entities=20):
    """bird/species_N/*.jpg with boxes.jsonl. Every box is its whole photo, so that our rows tell where tiles lie."""
    boxes = []
    for i in range(count):
        rng = np.random.default_rng(i)
        pixels = rng.normal(0, 3, (400, 500, 3))  # a camera's noise
        for cells, share in ((4, 0.6), (16, 0.3), (64, 0.1)):  # shapes, parts, texture
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            pixels += share * np.asarray(small.resize((500, 400), Image.Resampling.BICUBIC), np.float64)
        name = f"bird/species_{i % entities}/{i}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
        boxes.append({"image": name, "bbox_px": [0, 0, 500, 400]})
    (folder / "boxes.jsonl").write_text("".join(json.dumps(b) + "\n" for b in boxes))


def run_ours(source, out, count, workers):
    """Wall seconds of the whole command."""
    command = [sys.executable, ROOT / "synth_data.py", "--source", source, "--out", out]
    command += ["--num_samples", str(count), "--num_workers", str(workers)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def run_plain(source, out, rows, **save_options):
    """Wall seconds of the loop that one would write without thinking of speed."""
    out.mkdir(parents=True)
    start = time.perf_counter()
    for row in rows:
        canvas = Image.new("RGB", (row["width"], row["height"]), (255, 255, 255))
        for e in row["entities"]:
            x1, y1, x2, y2 = map(round, e["bbox_px"])
            tile = Image.open(source / e["source"]).convert("RGB").resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
            canvas.paste(tile, (x1, y1))
        canvas.save(out / Path(row["images"][0]).name, **save_options)
    return time.perf_counter() - start


def spread(values):
    values = sorted(values)
    return {"median": values[len(values) // 2], "min": values[0], "max": values[-1]}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--count", type=int, default=200, help=f"composites per run, more than {PREVIEW}")
    p.add_argument("--workers", type=int, default=2, help="processes of the second run of ours")
    p.add_argument("--out", default=str(ROOT / "runs/bench/synth.json"))
    args = p.parse_args()
    if args.count <= PREVIEW or args.rounds < 1:
        p.error(f"want --count > {PREVIEW} and --rounds >= 1")
    load, rounds = os.getloadavg(), []
    with tempfile.TemporaryDirectory() as folder:
        tmp, workers = Path(folder), sorted({1, args.workers})
        source = tmp / "source"
        make_sources(source, 200)
        run_ours(source, tmp / "ours", args.count, args.workers)
        rows = [json.loads(line) for line in (tmp / "ours/samples.jsonl").read_text().splitlines()]
        run_plain(source, tmp / "same", rows[:20], compress_level=1)
        for path in (tmp / "same").iterdir():
            ours, plain = (np.asarray(Image.open(f)) for f in (tmp / "ours/images" / path.name, path))
            assert np.array_equal(ours, plain), f"{path.name}: ours differs from plain; want the same pixels"
        pixels = sum(r["width"] * r["height"] for r in rows) / len(rows)
        mb = {k: sum(f.stat().st_size for f in d.iterdir()) / len(list(d.iterdir())) / 1e6
              for k, d in (("ours", tmp / "ours/images"), ("plain", tmp / "same"))}  # fmt: skip
        print(
            f"{len(rows)} composites of {pixels:,.0f} px on average; PNG MB: {mb['ours']:.2f}, plain {mb['plain']:.2f}"
        )
        part = rows[: max(1, len(rows) // 8)]  # the default's PNG takes so long that a part has to do
        for n in range(args.rounds):
            out = tmp / "round"
            rate = {"plain": len(rows) / run_plain(source, out / "plain", rows, compress_level=1)}
            rate["default"] = len(part) / run_plain(source, out / "default", part)
            for w in workers:
                once, whole = (run_ours(source, out / f"{w}_{k}", k, w) for k in (PREVIEW, args.count))
                rate[f"{w} all"], rate[f"{w} steady"] = args.count / whole, (args.count - PREVIEW) / (whole - once)
            shutil.rmtree(out)
            rounds.append(rate)
            print(f"round {n + 1}: " + " | ".join(f"{k} {v:.1f}/s" for k, v in rate.items()), flush=True)
    result = {
        "composites_per_s": {k: spread([r[k] for r in rounds]) for k in rounds[0]},
        "times_plain": {k: spread([r[k] / r["plain"] for r in rounds]) for k in rounds[0] if k != "plain"},
        "times_default": {k: spread([r[k] / r["default"] for r in rounds]) for k in rounds[0] if k != "default"},
        "rounds": rounds,
        "pixels_per_composite": pixels,
        "png_mb": mb,
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "machine": {"cpus": os.cpu_count(), "arch": platform.machine(), "load_before": load},
        "versions": {"python": platform.python_version(), "pillow": PIL.__version__, "numpy": np.__version__}
        | {"zlib": zlib.ZLIB_RUNTIME_VERSION, "libjpeg_turbo": features.version("libjpeg_turbo")},
    }
    for k in rounds[0]:
        v, t = result["composites_per_s"][k], result["times_plain"].get(k, dict.fromkeys(("median", "min", "max"), 1))
        print(f"{k:10s} {v['median']:6.1f}/s ({v['min']:.1f} .. {v['max']:.1f}) "
              f"= {t['median']:.2f} x plain ({t['min']:.2f} .. {t['max']:.2f})")  # fmt: skip
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"-> {args.out}")


if __name__ == "__main__":
    main()
