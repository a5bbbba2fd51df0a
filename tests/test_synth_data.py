"""Composition: boxes are exact, draws depend on (seed, index) alone, bad sources are named and counted."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import toy_world
from conftest import SCENE_FLAGS, run_script
from PIL import Image, ImageOps

import synth_data as s


def settings(**changes):
    base = dict(layouts=["grid"], grid=None, canvas_size=None, tile_px=100, max_pixels=401408, background="white",
                entity_scale=(1.0, 1.0), gap_px=(0, 0), color_jitter=0.0)  # fmt: skip
    return SimpleNamespace(**(base | changes))


def marked(width, height, box, color):
    """Black image with one coloured rectangle at `box`."""
    image = Image.new("RGB", (width, height))
    image.paste(color, box)
    return image


@pytest.mark.parametrize("layout", s.LAYOUTS)
@pytest.mark.parametrize(
    "options", [{}, {"gap_px": (3, 20), "entity_scale": (0.5, 0.9)}, {"canvas_size": (400, 300)}, {"max_pixels": 20000}]
)
def test_remapped_boxes_lie_on_the_pixels_they_name(layout, options):
    """Each source has its box in a colour of its own; in the composite that colour fills exactly the remapped box."""
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    rng = random.Random(f"{layout}{options}")
    for _ in range(5):
        images, boxes = [], []
        for color in colors:
            w, h = rng.randint(80, 300), rng.randint(80, 300)
            x1, y1 = rng.randint(0, w // 2), rng.randint(0, h // 2)
            boxes.append((x1, y1, rng.randint(x1 + 30, w), rng.randint(y1 + 30, h)))
            images.append(marked(w, h, boxes[-1], color))
        canvas, placed, name = s.compose(images, boxes, rng, settings(layouts=[layout], **options))
        assert name == layout
        pixels = np.asarray(canvas).astype(int)
        for color, box in zip(colors, placed, strict=True):
            rows, cols = np.nonzero(np.abs(pixels - color).sum(-1) < 120)
            assert np.allclose([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1], box, atol=1.6), (color, box)


@pytest.mark.parametrize("layout", s.LAYOUTS)
def test_tiles_never_overlap_and_the_pixel_cap_holds(layout):
    rng = random.Random(0)
    for k in range(2, 7):
        images = [Image.new("RGB", (rng.randint(50, 400), rng.randint(50, 400))) for _ in range(k)]
        whole = [(0, 0, *im.size) for im in images]
        canvas, placed, _ = s.compose(images, whole, rng, settings(layouts=[layout], tile_px=448, gap_px=(0, 10)))
        assert canvas.width * canvas.height <= 401408
        for i, a in enumerate(placed):
            assert 0 <= a[0] < a[2] <= canvas.width + 1e-6 and 0 <= a[1] < a[3] <= canvas.height + 1e-6
            for b in placed[:i]:
                assert a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1


def test_boxes_on_the_1000_grid_are_within_half_a_cell_and_never_empty():
    rng = random.Random(0)
    for _ in range(500):
        w, h = rng.randint(20, 3000), rng.randint(20, 3000)
        x1, y1 = rng.uniform(0, w - 1), rng.uniform(0, h - 1)
        box = (x1, y1, rng.uniform(x1, w), rng.uniform(y1, h))
        n = s.to_1000(box, w, h)
        assert 0 <= n[0] < n[2] <= 1000 and 0 <= n[1] < n[3] <= 1000
        if box[2] - box[0] > w / 500 and box[3] - box[1] > h / 500:
            assert all(abs(v - p * 1000 / size) <= 0.5001 for v, p, size in zip(n, box, (w, h, w, h), strict=True))


def read(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_rows_keep_the_contract(synth_dir):
    rows = read(synth_dir)
    assert len(rows) == 12 and len({r["id"] for r in rows}) == 12
    for r in rows:
        names = [e["entity"] for e in r["entities"]]
        assert 2 <= len(names) <= 6 and len(set(names)) == len(names)
        assert {toy_world.ENTITIES[n][0] for n in names} == {r["category"]}
        target = r["entities"][r["target"]]
        assert r["question"] == s.QUESTION.format(target["entity"]) and r["answer"] == s.ANSWER.format(
            target["entity"], *target["bbox_1000"]
        )
        assert r["messages"][0]["content"] == "<image>" + r["question"] and r["messages"][1]["content"] == r["answer"]
        assert Image.open(synth_dir / r["images"][0]).size == (r["width"], r["height"])
    assert (synth_dir / "preview.png").exists() and json.loads((synth_dir / "stats.json").read_text())["rows"] == 12


def test_output_does_not_depend_on_workers_or_interruption(world_dir, synth_dir, tmp_path):
    flags = ["--source", world_dir / "train", "--num_samples", 12, *SCENE_FLAGS]
    run_script("synth_data.py", "--out", tmp_path / "two", *flags[:-1], 2)
    assert (tmp_path / "two" / "samples.jsonl").read_bytes() == (synth_dir / "samples.jsonl").read_bytes()
    lines = (synth_dir / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "two" / "samples.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:50])
    run_script("synth_data.py", "--out", tmp_path / "two", *flags)
    assert (tmp_path / "two" / "samples.jsonl").read_bytes() == (synth_dir / "samples.jsonl").read_bytes()
    for image in (synth_dir / "images").iterdir():
        assert (tmp_path / "two" / "images" / image.name).read_bytes() == image.read_bytes()
    other = run_script("synth_data.py", "--out", tmp_path / "two", *flags, "--seed", 1, check=False)
    assert other.returncode != 0 and "--seed was 0, now 1" in other.stderr


def test_held_out_entities_never_occur(world_dir, tmp_path):
    run_script(
        "synth_data.py",
        "--source",
        world_dir / "train",
        "--out",
        tmp_path,
        "--num_samples",
        20,
        "--holdout_entities",
        0.3,
        *SCENE_FLAGS,
    )
    held = {e.split("/")[1] for e in json.loads((tmp_path / "stats.json").read_text())["held_out_entities"]}
    assert len(held) == 18 and not held & {e["entity"] for r in read(tmp_path) for e in r["entities"]}


def photo(seed, size=(200, 150)):
    """A smooth random picture: its hash is its own, and survives scaling and compression."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", ["folder", "kvg.parquet", "bytes.parquet", "source.jsonl", "rows.jsonl"])
def test_images_of_the_benchmark_are_excluded_even_scaled_and_compressed(kind, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, boxes = tmp_path / "source", []
    for n in range(12):
        name = f"cat/{'ab'[n % 2]}/{n}.png"
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        photo(n).save(source / name)
        boxes.append({"image": name, "bbox_px": [1, 1, 100, 100]})
    (source / "boxes.jsonl").write_text("".join(json.dumps(b) + "\n" for b in boxes))
    (tmp_path / "folder").mkdir()
    files = [f"folder/{n}.jpg" for n in (3, 4, 50)]
    for n, file in zip((3, 4, 50), files, strict=True):
        photo(n, (640, 480)).save(tmp_path / file, quality=60)
    if kind.endswith("parquet"):
        data = [(tmp_path / f).read_bytes() for f in files]
        rows = [{"image": d if kind == "bytes.parquet" else {"bytes": d, "path": "x"}, "id": 0} for d in data]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / kind)
    elif kind != "folder":
        rows = [{"images": [f]} if kind == "rows.jsonl" else {"image": f} for f in files]
        (tmp_path / kind).write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = synth(source, tmp_path / "out", "--exclude", tmp_path / kind)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["excluded"] == ["cat/a/4.png", "cat/b/3.png"]
    used = {e["source"] for r in read(tmp_path / "out") for e in r["entities"]}
    assert used and not used & {"cat/a/4.png", "cat/b/3.png"}


def test_sources_of_our_own_composites_are_excluded_by_name(world_dir, synth_dir, tmp_path):
    """A composite does not look like any of its sources; its row says which they were."""
    run_script("synth_data.py", "--source", world_dir / "train", "--out", tmp_path, "--num_samples", 12, "--exclude",
               synth_dir / "samples.jsonl", "--exclude_distance", 0, *SCENE_FLAGS)  # fmt: skip
    before, now = ({e["source"] for r in read(d) for e in r["entities"]} for d in (synth_dir, tmp_path))
    assert len(before) > 20 and now and not before & now


def test_what_the_hash_finds_and_what_it_does_not():
    """The shares that --help tells, loosely, on 60 photos; and no two of them are taken for one."""
    photos = [photo(n, (400, 300)) for n in range(60)]
    hashes = np.array([s.difference_hash(p) for p in photos])

    def found(change):
        return np.mean(
            [np.bitwise_count(h ^ s.difference_hash(change(p))) <= 4 for h, p in zip(hashes, photos, strict=True)]
        )

    def crop(share):
        return lambda p: p.crop((400 * share, 300 * share, 400 * (1 - share), 300 * (1 - share)))

    assert found(lambda p: p.resize((133, 100))) == 1 and found(lambda p: p.point(lambda v: v * 0.8)) == 1
    assert found(crop(0.01)) > 0.8 and 0.3 < found(crop(0.02)) < 1 and found(crop(0.05)) < 0.5
    assert found(lambda p: p.rotate(90)) == 0 and found(ImageOps.mirror) == 0, "mirrored ones are hashed in addition"
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None]) + 64 * np.eye(60, dtype=int)
    assert apart.min() > 4


def test_a_benchmark_is_hashed_mirrored_too_and_its_mistakes_get_one_line(tmp_path):
    photo(0).save(tmp_path / "a.png")
    ImageOps.mirror(photo(1)).save(tmp_path / "b.png")
    hashes, names = s.benchmark_images(tmp_path)
    sources = [s.Source(str(tmp_path / f), f, f, "c", None) for f in ("a.png", "b.png", "c.png")]
    photo(1).save(tmp_path / "b.png")
    photo(2).save(tmp_path / "c.png")
    assert [s.occurs_in(x, hashes, names, 4) for x in sources] == [True, True, False]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(b"no image")
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n')
    for name, message in (
        ("nowhere.parquet", "no such folder, .jsonl or .parquet"),
        ("nowhere.jsonl", "no such file"),
        ("rows.jsonl", "row 1 has no image"),
        ("x", "unreadable image"),
    ):
        with pytest.raises(SystemExit, match=message):
            s.benchmark_images(tmp_path / name)


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 7), (333, 222)])
def test_a_photo_png_holds_exactly_the_pixels(size, tmp_path):
    for kind in ("white", "noise", "gradient"):
        image = s.background_of(kind, size, random.Random(0))
        s.save_photo_png(image, tmp_path / "photo.png")
        with Image.open(tmp_path / "photo.png") as back:
            assert back.mode == "RGB" and back.size == size and back.tobytes() == image.tobytes()


def test_photos_give_the_same_bytes_for_any_number_of_workers_and_the_pixels_of_compose(tmp_path):
    source, boxes = tmp_path / "source", []
    for n in range(8):
        name = f"cat/{'abcd'[n % 4]}/{n}.jpg"
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        photo(n).convert("L" if n == 3 else "RGB").save(source / name, quality=90)
        boxes.append({"image": name, "bbox_px": [0, 0, 200, 150]})
    (source / "boxes.jsonl").write_text("".join(json.dumps(b) + "\n" for b in boxes))
    for workers in (1, 3):
        done = synth(source, tmp_path / str(workers), "--num_workers", workers)
        assert done.returncode == 0, done.stderr
    for row in read(tmp_path / "1"):
        name = row["images"][0]
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
        want = Image.new("RGB", (row["width"], row["height"]), (255, 255, 255))
        for e in row["entities"]:
            x1, y1, x2, y2 = map(round, e["bbox_px"])  # the whole photo
            tile = Image.open(source / e["source"]).convert("RGB").resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
            want.paste(tile, (x1, y1))
        assert Image.open(tmp_path / "1" / name).tobytes() == want.tobytes()
    assert (tmp_path / "1" / "samples.jsonl").read_bytes() == (tmp_path / "3" / "samples.jsonl").read_bytes()


def test_drawings_are_written_by_pillow(synth_dir, tmp_path):
    """The toy world's published results hang on these bytes: they must not change with the way photos are written."""
    for path in (synth_dir / "images").iterdir():
        Image.open(path).save(tmp_path / "again.png", compress_level=1)
        assert path.read_bytes() == (tmp_path / "again.png").read_bytes()


@pytest.mark.parametrize("mode, suffix, want", [
    ("RGB", "jpg", "RGB"), ("L", "jpg", "RGB"), ("CMYK", "jpg", "RGB"), ("RGB", "png", "RGB"), ("RGBA", "png", "RGBA"),
    ("LA", "png", "RGBA"), ("P", "png", "RGB"), ("L", "png", "RGB"),
])  # fmt: skip
def test_a_source_of_any_mode_loads_as_convert_would_give_it(mode, suffix, want, tmp_path):
    photo(0).convert(mode).save(tmp_path / f"a.{suffix}")
    image = s.load_source(s.Source(str(tmp_path / f"a.{suffix}"), "a", "a", "a", (0, 0, 200, 150)))
    assert image.mode == want and image.tobytes() == Image.open(tmp_path / f"a.{suffix}").convert(want).tobytes()


@pytest.fixture
def small_source(tmp_path):
    """Two entities of one category with four images each."""
    source, boxes = tmp_path / "source", []
    for name in ("a", "b"):
        (source / "cat" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 30), (i * 50, 0, 0)).save(source / "cat" / name / f"{i}.png")
            boxes.append({"image": f"cat/{name}/{i}.png", "bbox_px": [1, 1, 30, 20]})
    (source / "boxes.jsonl").write_text("".join(json.dumps(b) + "\n" for b in boxes))
    return source


def synth(source, out, *flags):
    return run_script(
        "synth_data.py", "--source", source, "--out", out, "--num_samples", 8, "--num_workers", 1, *flags, check=False
    )


def test_a_corrupt_image_is_named_and_skipped_only_if_allowed(small_source, tmp_path):
    (small_source / "cat" / "a" / "2.png").write_bytes(b"not an image")
    stopped = synth(small_source, tmp_path / "out")
    assert stopped.returncode != 0 and "a/2.png: unreadable" in stopped.stderr and "Traceback" not in stopped.stderr
    done = synth(small_source, tmp_path / "out2", "--max_bad_images", 1)
    assert done.returncode == 0 and len(read(tmp_path / "out2")) == 8
    assert len(json.loads((tmp_path / "out2" / "stats.json").read_text())["bad_images"]) == 1


@pytest.mark.parametrize("change, message", [
    (lambda d: (d / "boxes.jsonl").unlink(), "boxes.jsonl: no box for 8 of 8 images; want one"),
    (lambda d: (d / "boxes.jsonl").write_text('{"image": "cat/a/0.png"}\n'), "boxes.jsonl: cat/a/0.png: no 'bbox_px'"),
    (lambda d: (d / "boxes.jsonl").write_text("{broken\n"), "boxes.jsonl:1: not JSON"),
    (lambda d: (d / "boxes.jsonl").write_text((d / "boxes.jsonl").read_text().replace("30, 20", "300, 20")),
     "does not lie in the 40x30 image"),
    (lambda d: [p.unlink() for p in d.glob("*/*/*.png")], "no images"),
    (lambda d: [p.unlink() for p in d.glob("cat/b/*.png")], "no category with 2 entities"),
])  # fmt: skip
def test_a_bad_source_gets_one_clear_line(change, message, small_source, tmp_path):
    change(small_source)
    done = synth(small_source, tmp_path / "out")
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_a_missing_source_and_bad_flags_get_one_clear_line(tmp_path):
    for flags, message in (
        (("--source", "nowhere"), "nowhere: no such file"),
        (("--source", ".", "--min_entities", "1"), "2 <= --min_entities"),
    ):
        done = run_script("synth_data.py", *flags, "--out", tmp_path / "o", check=False)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_parquet_and_jsonl_sources_give_the_pixels_of_the_folder(small_source, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in (small_source / "boxes.jsonl").read_text().splitlines()]
    rows = [r | {"entity": r["image"].split("/")[1], "category": "cat"} for r in rows]
    (small_source / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = [r | {"image": {"bytes": (small_source / r["image"]).read_bytes()}} for r in rows]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    for i, source in enumerate((small_source, small_source / "rows.jsonl", tmp_path / "rows.parquet")):
        done = synth(source, tmp_path / str(i))
        assert done.returncode == 0, done.stderr
    for image in (tmp_path / "0" / "images").iterdir():
        for other in ("1", "2"):
            assert image.read_bytes() == (tmp_path / other / "images" / image.name).read_bytes()
    for row, message in (({}, "bad.parquet.boxes.jsonl: no box for 1 of 1"), ({"kind": "c"}, "no column 'category'")):
        row = {"image": b"", "entity": "a"} | (row or {"category": "c"})
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "bad.parquet")
        done = synth(tmp_path / "bad.parquet", tmp_path / "bad")
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_images_without_a_box_are_left_out_aloud(small_source, tmp_path):
    lines = (small_source / "boxes.jsonl").read_text().splitlines(keepends=True)
    (small_source / "boxes.jsonl").write_text("".join(lines[:-1]))
    done = synth(small_source, tmp_path / "out")
    assert done.returncode == 0 and "no box for 1 of 8 images (1 not listed); left out" in done.stderr
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["boxes"]["left_out"] == {"not listed": 1}
