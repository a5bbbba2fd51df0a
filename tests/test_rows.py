"""tools/rows.py: what is asked is drawn from seed and id alone; pictures are exact. Letters are golden."""

import json
import random
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_synth_data import write

from synth_data import list_sources
from tools import rows as script

NAMES = ["Boeing_737-600,_700,_800", "Porsche 911 (901, 930, 964, 993)", "Chardonnay 2012, 2013 "]
NAMED = "<|object_ref_start|>{}<|object_ref_end|>"

@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command; returns its rows, with `pixels` where a picture was made."""
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["rows.py", *map(str, flags), "--out", str(tmp_path / "out")])
        script.main()
        rows, root = [json.loads(line) for line in open(tmp_path / "out/rows.jsonl", "rb")], tmp_path / "out"
        return [r | {"pixels": np.array(Image.open(root / r["image"]))} if r["image"][0] != "/" else r for r in rows]
    return run

def test_images_without_a_box_are_asked_by_the_names_that_synth_data_gives_them(run, tmp_path):
    source = tmp_path / "source"
    for path in [source / "Thing" / name / file for name in NAMES for file in ("0.png", "1.PNG")]:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(path)
    write(source / "boxes.jsonl", [{"image": f"Thing/{n}/0.png", "bbox_px": [10, 10, 20, 20]} for n in NAMES])
    rows, both = run("ask-boxes", "--source", source), run("ask-boxes", "--source", source, "--all")
    assert {(r["id"], r["entity"]) for r in rows} == {(f"Thing/{n}/1.PNG", n.replace("_", " ").strip()) for n in NAMES}
    assert all(r["image"] == str(source / r["id"]) and NAMED.format(r["entity"]) in r["question"] for r in rows)
    assert [r.get("bbox_px") for r in both] == [[10, 10, 20, 20], None] * 3
    named = [(s.name, s.entity, s.category) for s in list_sources(source)]
    assert [(r["id"], r["entity"], r["category"]) for r in both] == named

def test_single_images_of_a_list_or_a_folder_get_options_of_their_category(run, tmp_path):
    some = [{"image": f"{i}.png", "entity": n, "category": "Bird"} for i, n in enumerate("ABCDEFG")]
    own = {"image": "/x.png", "entity": "Z", "category": "bird", "options": ["Y", " Z"], "id": 7}
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*some, own]))
    rows = run("choices", "--source", tmp_path / "f.jsonl")
    assert ["".join(r["options"]) for r in rows[:3] + rows[7:]] == ["AEDF", "EBAD", "AZBC", "YZ"]
    assert [(r["id"], r["image"]) for r in rows[::7]] == [("0.png", str(tmp_path / "0.png")), ("7", "/x.png")]
    assert rows[1]["question"] == "Which bird is this?\nA. E\nB. B\nC. A\nD. D\nAnswer with the letter of one option."
    for name in "ABCD":
        (tmp_path / "fgvr/Bird" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "fgvr/Bird" / name / "0.png")
    assert [(r["answer"], sorted(r["options"])) for r in run("choices", "--source", tmp_path / "fgvr")] == [
        (name, [*"ABCD"]) for name in "ABCD"]  # fmt: skip

@pytest.fixture
def composites(tmp_path):
    """60 rows with three entities of one of two categories; those of 20 rows come from the same source images."""
    image, rows = Image.new("RGB", (200, 100), "white"), []
    image.paste((200, 0, 0), (100, 20, 200, 80))
    image.save(tmp_path / "wide.png")
    for i in range(60):
        names, row = random.Random(i).sample("ABCDE" if i % 2 else "PQRST", 3), {"id": f"r{i}", "images": ["wide.png"]}
        listed = [{"entity": n, "bbox_px": [100.0, 20.0, 200.0, 80.0], "source": f"{n}/{i // 20}"} for n in names]
        rows.append(row | {"category": "car" if i % 2 else "bird", "entities": listed})
    return write(tmp_path / "samples.jsonl", rows)

def test_a_probe_asks_about_an_entity_once_per_source_image_and_leaves_no_rows_if_it_stops(run, composites, tmp_path):
    rows = run("choices", "--source", composites)
    assert sorted(r["answer"] for r in rows) == sorted("ABCDEPQRST" * 3)
    assert [(r["id"], "".join(r["options"])) for r in rows[2:4]] == [("r0:P", "QPST"), ("r1:B", "CBAE")]
    cut = rows[0]["pixels"]  # the box, 5 % around it, no more than the picture
    assert cut.shape == (66, 105, 3) and (cut[3:-3, 5:] == [200, 0, 0]).all() and cut[2, 5, 2] == cut[3, 4, 2] == 255
    assert len(run("choices", "--source", composites, "--max_per_entity", 2)) == 20
    composites.write_bytes(composites.read_bytes() + b"{")
    with pytest.raises(script.InputError, match="samples.jsonl:61: b'{'; want one JSON object a line"):
        run("choices", "--source", composites)
    assert not (tmp_path / "out/rows.jsonl").exists()

def test_a_gap_takes_wrong_options_from_the_same_image_first(run, composites, tmp_path):
    Image.new("RGB", (200, 100), "blue").save(tmp_path / "1.png")
    names, box_1000 = ["A (1,2),(3,4)", *"BCDEFGH"], [500, 200, 1000, 800]
    truth = [{"answer": NAMED.format(names[0]) + "<|box_start|>(500,200),(1000,800)<|box_end|>"}]
    truth += [{"bbox_px": [100, 20, 200, 80]}, *[{"bbox_1000": box_1000}] * 5, {"answer": str(box_1000)}]
    bench = [{"question_id": f"c/{i}", "question": NAMED.format(n), "category": "Bird", "image": "1.png"} | truth[i]
             | ({"image": "wide.png"} if i < 4 else {}) for i, n in enumerate(names)]  # fmt: skip
    rows = run("choices", "--bench", write(tmp_path / "b.jsonl", bench))
    assert [(r["id"], r["answer"]) for r in rows] == [(f"c/{i}", n) for i, n in enumerate(names)]
    assert ["".join(sorted(r["options"])) for r in rows] == ["A (1,2),(3,4)BCD"] * 4 + ["EFGH"] * 4
    assert len({r["pixels"].tobytes() for r in rows}) == len({r["image_id"] for r in rows}) == 2

def test_expressions_keep_their_box_whoever_wrote_it(run, tmp_path):
    coco = {"image": "/a.jpg", "expression": " left one ", "bbox": [10, 20, 30.5, 40], "split": "testA", "id": 5}
    own = {"image": "/b.jpg", "question": "Where?", "bbox_px": [0, 0, 9, 9.5]}
    want = {"id": "5", "image": "/a.jpg", "phrase": "left one", "bbox_px": [10, 20, 40.5, 60], "category": "testA"}
    rows = run("refcoco", "--source", write(tmp_path / "r.jsonl", [coco, own]))
    assert rows == [want, own | {"id": "2", "category": "none"}]

@pytest.mark.parametrize("kind", script.AMOUNTS)
def test_a_spoilt_picture_depends_on_seed_and_case_and_gets_worse(kind, run, tmp_path):
    plain = (np.arange(48).reshape(6, 8, 1) * [3, 5, 1] % 256).astype(np.uint8).repeat(20, 0).repeat(20, 1)
    Image.fromarray(plain).save(tmp_path / "a.png")
    row = {"image": {"bytes": (tmp_path / "a.png").read_bytes()}, "answer": "(1,2),(3,4)"}
    pq.write_table(pa.Table.from_pylist([row | {"id": i, "own": {"k": i}} for i in (8, 9)]), tmp_path / "b.parquet")
    flags = ("spoil", "--bench", tmp_path / "b.parquet", "--kind", kind)
    levels = [run(*flags, "--strength", s)[0]["pixels"] for s in range(1, 6)]
    errors = [np.square(pixels.astype(float) - plain).mean() for pixels in levels]
    assert errors == sorted(errors) and errors[4] > 4 * errors[0] > 0
    (a, b), (other, _) = run(*flags), run(*flags, "--seed", 1)
    assert a.items() >= {"id": "8", "own": {"k": 8}, "answer": "(1,2),(3,4)", "image_id": b["image_id"]}.items()
    assert (a["pixels"] == levels[2]).all()
    assert [(a["pixels"] != r["pixels"]).any() for r in (b, other)] == [kind not in ("jpeg", "blur")] * 2
