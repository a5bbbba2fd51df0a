"""One case of an evaluation as a picture: the two boxes, and the reasoning beside them."""

import argparse
import io
import json
import re
from pathlib import Path

import pyarrow.parquet
from PIL import Image, ImageDraw, ImageFont

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("folder", type=Path, help="--out of eval_kvg.py, of a parquet with pictures")
p.add_argument("--case", required=True, help="its question_id")
p.add_argument("--out", required=True, help="a PNG")
args = p.parse_args()
lines = (args.folder / "predictions.jsonl").read_text("utf-8").splitlines()
case = next(r for r in map(json.loads, lines) if r["question_id"] == args.case)
bench = json.loads((args.folder / "metrics.json").read_bytes())["args"]["bench"]
rows = pyarrow.parquet.read_table(bench, columns=["question_id", "image"]).to_pylist()
image = Image.open(io.BytesIO(next(r["image"]["bytes"] for r in rows if r["question_id"] == args.case)))
image = image.convert("RGB").resize((660, round(660 * image.height / image.width)), Image.Resampling.LANCZOS)
sheet = Image.new("RGB", (1560, image.height + 40), "white")
sheet.paste(image, (20, 20))
draw, font, sides = ImageDraw.Draw(sheet), ImageFont.load_default(21), (image.width / 1000, image.height / 1000) * 2
for box, color, width in ((case["gt_bbox_1000"], "#00845c", 7), (case["pred_bbox_1000"], "#c94a06", 3)):
    draw.rectangle([20 + v * n for v, n in zip(box, sides, strict=True)], outline=color, width=width)
text = re.sub(r"<\|\w+\|>", "", f"{case['question']}\n\n{case['response']}\n\ntruth: green, answer: orange")
draw.text((710, 20), text, "#1b2430", font, spacing=9)
sheet.quantize(256).save(args.out, optimize=True)
