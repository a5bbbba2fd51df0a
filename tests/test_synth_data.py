"""synth_data.py: boxes are exact, draws depend on (seed, index) alone; sources of every kind, leaks, bad images."""

import json
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy_world
from conftest import ROOT, SCENE_FLAGS
from PIL import Image, ImageOps

import synth_data as s

SCENE = dict(layouts=["grid"], grid=None, canvas_size=None, tile_px=100, max_pixels=401408, background="white",
             entity_scale=(1.0, 1.0), gap_px=(0, 0), color_jitter=0.0)  # fmt: skip
OPTIONS = [{}, {"gap_px": (3, 20), "entity_scale": (0.5, 0.9)}, {"canvas_size": (400, 300)}, {"max_pixels": 20000}]

@pytest.mark.parametrize("layout, options", [(layout, options) for layout in s.LAYOUTS for options in OPTIONS])
def test_remapped_boxes_lie_on_the_pixels_they_name(layout, options):
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    rng, args = random.Random(f"{layout}{options}"), SimpleNamespace(**SCENE | {"layouts": [layout]} | options)
    for _ in range(5):
        images, boxes = [], []
        for color in colors:
            w, h = rng.randint(80, 300), rng.randint(80, 300)
            x1, y1 = rng.randint(0, w // 2), rng.randint(0, h // 2)
            boxes.append((x1, y1, rng.randint(x1 + 30, w), rng.randint(y1 + 30, h)))
            images.append(Image.new("RGB", (w, h)))
            images[-1].paste(color, boxes[-1])
        canvas, placed, name = s.compose(images, boxes, rng, args)
        pixels = np.asarray(canvas).astype(int)
        for color, box in zip(colors, placed, strict=True):
            rows, cols = np.nonzero(np.abs(pixels - color).sum(-1) < 120)
            assert np.allclose([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1], box, atol=1.6), (color, box)
        assert name == layout and canvas.width * canvas.height <= args.max_pixels

def test_boxes_on_the_1000_grid_are_within_half_a_cell_and_never_empty():
    for seed in range(500):
        rng = random.Random(seed)
        w, h, x1, y1 = rng.randint(20, 3000), rng.randint(20, 3000), rng.uniform(0, 19), rng.uniform(0, 19)
        n = s.to_1000(box := (x1, y1, rng.uniform(x1, w), rng.uniform(y1, h)), w, h)
        assert 0 <= n[0] < n[2] <= 1000 and 0 <= n[1] < n[3] <= 1000
        if box[2] - box[0] > w / 500 and box[3] - box[1] > h / 500:
            assert all(abs(v - p * 1000 / size) <= 0.5001 for v, p, size in zip(n, box, (w, h, w, h), strict=True))

def read(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]

def test_rows_keep_the_contract(synth_dir):
    rows = read(synth_dir)
    assert len(rows) == 12 == len({r["id"] for r in rows}) and (synth_dir / "preview.png").exists()
    for r in rows:
        names, target = [e["entity"] for e in r["entities"]], r["entities"][r["target"]]
        assert 2 <= len({*names}) == len(names) <= 6 and {toy_world.ENTITIES[n][0] for n in names} == {r["category"]}
        assert r["question"] == s.QUESTION.format(target["entity"])
        assert r["answer"] == s.ANSWER.format(target["entity"], *target["bbox_1000"])
        assert [m["content"] for m in r["messages"]] == ["<image>" + r["question"], r["answer"]]
        assert Image.open(synth_dir / r["images"][0]).size == (r["width"], r["height"])

def test_a_killed_run_and_more_workers_and_a_longer_run_end_in_the_same_bytes(world_dir, tmp_path):
    command = [sys.executable, ROOT / "synth_data.py", "--source", world_dir / "train", *SCENE_FLAGS[:-2]]
    command, a, b, lines = [*map(str, command), "--queries_per_image", "2"], tmp_path / "a", tmp_path / "b", 0
    subprocess.run([*command, "--out", a, "--num_samples", "600", "--num_workers", "1"], check=True)
    run = subprocess.Popen([*command, "--out", b, "--num_samples", "500", "--num_workers", "2"])
    while run.poll() is None and lines < 100:
        time.sleep(0.005)
        lines = (b / "samples.jsonl").read_bytes().count(b"\n") if (b / "samples.jsonl").exists() else 0
    run.kill()
    assert run.wait() == -9 and 100 <= lines < 1000
    again = [*command, "--out", b, "--num_samples", "600", "--num_workers", "3"]
    assert "500 -> 600" in subprocess.run(again, check=True, capture_output=True, text=True).stdout
    for name in ("samples.jsonl", *{row["images"][0] for row in read(a)}):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    other = subprocess.run([*again, "--seed", "1"], capture_output=True, text=True)
    assert other.returncode == 1 and "'seed': '0 -> 1'" in other.stderr and other.stderr.count("\n") == 1

def photo(seed, size=(200, 150)):  # smooth: its hash is its own, and survives scaling and compression
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)

def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path

def make_source(folder, count=8, category="Cat"):
    names = [f"{category}/{'ab'[i % 2]}/{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(folder / name)
    with open(folder / "boxes.jsonl", "a") as f:
        f.writelines(json.dumps({"image": name, "bbox_px": [1, 1, 100, 100]}) + "\n" for name in names)
    return folder

def synth(source, out, *flags):
    """stats.json of a small run in this process."""
    flags = ("--source", source, "--out", out, "--num_samples", 8, "--num_workers", 1, "--tile_px", 60, *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["synth_data.py", *map(str, flags)])
        s.main()
    return json.loads((out / "stats.json").read_text())

@pytest.mark.parametrize("kind", ["folder", "rows.parquet", "rows.jsonl"])
def test_images_of_the_benchmark_are_excluded_even_scaled_compressed_and_mirrored(kind, tmp_path):
    source, folder = make_source(tmp_path / "source", 10), tmp_path / "folder/deep"
    folder.mkdir(parents=True)
    for i, picture in enumerate((photo(3, (640, 480)), ImageOps.mirror(photo(4)), photo(50))):
        picture.save(folder / f"{i}.jpg", quality=60)
    files = sorted(folder.iterdir())
    if kind == "rows.parquet":
        pq.write_table(pa.table({"image": [{"bytes": f.read_bytes()} for f in files]}), tmp_path / kind)
    elif kind != "folder":
        write(tmp_path / kind, [{"images": ["folder/deep/0.jpg"]}, *[{"image": str(f)} for f in files[1:]]])
    stats = synth(source, tmp_path / "out", "--exclude", tmp_path / kind)
    assert stats["left_out_sources"] == {"Cat/b/3.png": "excluded", "Cat/a/4.png": "excluded"}

def test_held_out_entities_and_sources_of_excluded_composites_never_occur(world_dir, synth_dir, tmp_path):
    flags = ("--holdout_entities", 0.3, "--exclude", synth_dir / "samples.jsonl", "--exclude_distance", 0)
    held = synth(world_dir / "train", tmp_path, *flags)["held_out_entities"]
    used, before = ([e | r for r in read(d) for e in r["entities"]] for d in (tmp_path, synth_dir))
    assert len(held) > 10 and not {*held} & {f"{e['category']}/{e['entity']}" for e in used}
    assert len(before) > 20 and not {e["source"] for e in before} & {e["source"] for e in used}

def test_a_source_is_turned_upright_and_keeps_its_transparency(tmp_path):
    (exif := Image.Exif())[0x0112] = 6
    photo(0).convert("LA").save(path := tmp_path / "a.png", exif=exif)
    turned = Image.open(path).convert("RGBA").transpose(Image.Transpose.ROTATE_270)
    assert s.open_image(path).mode == "RGBA" and s.open_image(path).tobytes() == turned.tobytes()

def test_jsonl_parquet_absolute_paths_and_links_give_the_pixels_of_the_folder(tmp_path):
    source = make_source(tmp_path / "source")
    rows = [r | {"entity": r["image"][4], "category": "CAT "} for r in map(json.loads, open(source / "boxes.jsonl"))]
    (tmp_path / "link").symlink_to(source)
    write(tmp_path / "abs.jsonl", [r | {"image": str(source / r["image"])} for r in rows])
    table = [r | {"image": {"bytes": (source / r["image"]).read_bytes()}} for r in rows]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet", row_group_size=3)
    synth(source, tmp_path / "0")
    for kind in ("link", "abs.jsonl", "rows.parquet"):
        synth(tmp_path / kind, tmp_path / f"out_{kind}", "--categories", "cAt")
        for image in (tmp_path / "0/images").iterdir():
            assert image.read_bytes() == (tmp_path / f"out_{kind}/images" / image.name).read_bytes()

@pytest.mark.parametrize("line, want", [
    ({}, "not listed"), ({"bbox_px": None, "reason": "blurred"}, "blurred"),
    *[({"bbox_px": [*box, 299.5]}, [0, 0, 400, 299.5]) for box in ([0, 0, 400], [-1, 0, 401])],
    *[({"bbox_px": box}, f"bad box: {box}; want x1 < x2, y1 < y2 in 400x300")
      for box in ([-2, 0, 9, 9], [5, 5, 5, 9], [0, 0, float("nan"), 9], [0, 0, "9", 9], [1, 2, 3], [-1, 0, 0, 9])],
    *[({"pred_bbox_1000": box}, now) for box, now in (([10, 10, 330, 666], [4, 3, 132, 199.8]), (None, "not one box"),
      ([0, 0, 19, 1000], "too small"), ([0, 0, 99, 99], "too small"), ([0, 0, 70, 1000], "too thin"))],
])  # fmt: skip
def test_a_box_in_an_image_of_400_x_300_is_clipped_by_1_px_and_a_models_is_doubted(line, want):
    assert s.box_of(s.Source("a", "a", "c", "e", None), line, (400, 300), 0.02) == want

def test_boxes_may_be_predictions_of_which_the_first_about_an_image_counts(tmp_path):
    source = make_source(tmp_path / "source")
    answers = [{"question_id": f"Cat/{'ab'[i % 2]}/{i}.png", "sample": k, "image": str(source), "correct": None,
                "pred_bbox_1000": [0, 0, 500 + 400 * k, 500 - 495 * (i == 0)]} for i in range(7) for k in range(2)]
    stats = synth(source, tmp_path / "out", "--boxes", write(tmp_path / "p.jsonl", answers))
    assert stats["left_out_sources"] == {"Cat/a/0.png": "too small", "Cat/b/7.png": "not listed"}
    for r in read(tmp_path / "out"):  # half of each picture
        assert all(abs((b[2] - b[0]) / (b[3] - b[1]) - 4 / 3) < 0.1 for b in (e["bbox_px"] for e in r["entities"]))

def test_bad_images_are_counted_and_listed_up_to_a_limit(tmp_path):
    source, out = make_source(tmp_path / "source", 20), tmp_path / "out"
    (source / "Cat/a/2.png").write_bytes(b"not an image")
    stats = synth(source, out)  # one is 1 % of 20, rounded up
    assert stats["left_out"] == {"bad image": 1} and list(stats["left_out_sources"]) == ["Cat/a/2.png"]
    (source / "Cat/a/4.png").write_bytes((source / "Cat/a/4.png").read_bytes()[:-60])
    with pytest.raises(s.InputError, match='2 bad, {"Cat/a/2.png": "bad image: cannot .*; want --max_bad_rows, now 1'):
        synth(source, tmp_path / "no")
