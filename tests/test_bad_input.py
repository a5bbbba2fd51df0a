"""Broken or hostile input gets one line that says what is wrong, before weights are loaded; odd input just works."""

import io
import json
import os
import random
import re
import shutil
import struct
import time
import zlib
from types import SimpleNamespace

import pytest
from conftest import run_script
from PIL import Image

import eval_kvg
import gen_cot
import synth_data
import train_grpo
import train_sft as t

QUESTION, ANSWER = synth_data.QUESTION.format("Lo"), synth_data.ANSWER.format("Lo", 10, 20, 300, 400)


def one_line(message, call, *args):
    """The call stops with one line of the house's form that holds `message`."""
    with pytest.raises(SystemExit) as e:
        call(*args)
    text = str(e.value)
    assert message in text and "\n" not in text and "; want " in text and text.count(";") >= 2, text


def row(**changes):
    """A sound row of samples.jsonl."""
    turns = [{"role": "user", "content": "<image>" + QUESTION}, {"role": "assistant", "content": ANSWER}]
    entities = [{"entity": n, "bbox_px": [1, 2, 30, 40], "bbox_1000": [10, 20, 300, 400]} for n in ("Lo", "Mi")]
    base = dict(id="a", images=["a.png"], category="car", question=QUESTION, answer=ANSWER, messages=turns)
    return base | {"entities": entities, "target": 0} | changes


def named(name):
    """The row with another name of the target, everywhere."""
    text = json.dumps(row(), ensure_ascii=False).replace("Lo", json.dumps(name)[1:-1])
    return json.loads(text)


def said(user=QUESTION, assistant=ANSWER, **roles):
    return [{"role": roles.get("first", "user"), "content": user}, {"role": "assistant", "content": assistant}]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode="RGB", size=(40, 20)):
    """Blue on the left, red on the right."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


def near(pixel, want):
    return all(abs(a - b) < 12 for a, b in zip(pixel, want, strict=True))


# ---- images ----
def bomb(width, height):
    """A PNG of a few bytes that says it is huge."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOISE = Image.frombytes("RGB", (64, 48), random.Random(0).randbytes(64 * 48 * 3))
PALETTE = halves().quantize(2)
FRAMES = [halves(), Image.new("RGB", (40, 20), "lime")]
ODD_IMAGES = {
    "CMYK JPEG": (encoded(halves("CMYK"), "JPEG"), None),
    "black and white": (encoded(halves("1")), ((0, 0, 0), None)),
    "grey with alpha": (encoded(halves("LA")), ((29, 29, 29), (76, 76, 76))),
    "palette": (encoded(PALETTE), None),
    "palette, red is transparent": (
        encoded(PALETTE, transparency=PALETTE.getpixel((39, 0))), ((0, 0, 255), (255, 255, 255))),
    "transparent on the left": (
        encoded(Image.merge("RGBA", (*halves().split(), halves("RGB").getchannel("R")))),
        ((255, 255, 255), (255, 0, 0))),
    "16-bit grey": (
        encoded(Image.frombytes("I;16", (40, 20), struct.pack("<40H", *[0x4000] * 20, *[0x8000] * 20) * 20)),
        ((64, 64, 64), (128, 128, 128))),
    "16-bit grey PGM": (
        b"P5 40 20 65535\n" + struct.pack(">40H", *[0x4000] * 20, *[0x8000] * 20) * 20,
        ((64, 64, 64), (128, 128, 128))),
    "animated GIF, first frame": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), None),
    "animated WebP, first frame": (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), None),
    "JPEG with broken EXIF": (encoded(halves(), "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40), None),
    "TIFF": (encoded(halves(), "TIFF"), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_an_odd_image_is_seen_as_a_viewer_shows_it(name):
    data, want = ODD_IMAGES[name]
    image, (left, right) = t.load_image(data), want or ((0, 0, 255), (255, 0, 0))
    assert image.mode == "RGB" and image.size == (40, 20)
    assert near(image.getpixel((5, 10)), left) and (right is None or near(image.getpixel((35, 10)), right))


def test_one_pixel_is_an_image(family_dirs):
    for folder in family_dirs.values():
        tokenizer, image_processor = t.load_processors(folder, 401408)
        inputs = t.chat_inputs(
            tokenizer, image_processor, encoded(Image.new("RGB", (1, 1))), QUESTION, t.BOX_STYLES["qwen2_vl"]
        )
        length = t.prompt_length(tokenizer, image_processor, encoded(Image.new("RGB", (1, 1))), QUESTION, STYLE)
        assert len(inputs["prompt_ids"]) == length


def test_a_wrong_extension_does_not_matter(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(halves(), "JPEG"))
    assert near(t.load_image(str(tmp_path / "a.png")).getpixel((5, 10)), (0, 0, 255))
    assert gen_cot.image_url(tmp_path / "a.png", 10**6).startswith("data:image/jpeg")


BAD_IMAGES = {
    "truncated JPEG": (encoded(NOISE, "JPEG")[:2000], "truncated"),
    "truncated PNG": (encoded(NOISE)[:3000], "truncated"),
    "truncated WebP": (encoded(NOISE, "WEBP")[:300], "unreadable"),
    "empty file": (b"", "cannot identify"),
    "text": (b"<html>not found</html>", "cannot identify"),
    "float pixels": (encoded(halves("F"), "TIFF"), "32-bit float pixels"),
    "decompression bomb": (bomb(60000, 60000), "decompression bomb"),
    "a strip": (encoded(Image.new("L", (30000, 100))), "aspect ratio must be smaller than 200"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_gets_one_line_naming_the_file(name, tmp_path, tiny_dir):
    data, message = BAD_IMAGES[name]
    (tmp_path / "a.png").write_bytes(data)
    processors = t.load_processors(tiny_dir, 401408)
    one_line(message, t.chat_inputs, *processors, str(tmp_path / "a.png"), QUESTION, t.BOX_STYLES["qwen2_vl"])
    one_line(
        f"{tmp_path / 'a.png'}: unreadable",
        t.chat_inputs,
        *processors,
        str(tmp_path / "a.png"),
        QUESTION,
        t.BOX_STYLES["qwen2_vl"],
    )
    one_line("image bytes: unreadable", t.chat_inputs, *processors, data, QUESTION, t.BOX_STYLES["qwen2_vl"])
    with pytest.raises(synth_data.UNREADABLE):
        synth_data.load_source(synth_data.Source(str(tmp_path / "a.png"), "a", "a", "a", (0, 0, 1, 1)))


@pytest.mark.parametrize("what", ["folder", "nothing"])
def test_what_is_no_file_gets_one_line(what, tmp_path):
    path = tmp_path / "a.png"
    if what == "folder":
        path.mkdir()
    one_line(f"{path}: unreadable", t.load_image, str(path))
    one_line("images", gen_cot.read_composites, write(tmp_path / "s.jsonl", [row()]))
    one_line("no such image", eval_kvg.read_bench, write(tmp_path / "s.jsonl", [row()]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image_everywhere(kind, orientation, tmp_path, tiny_dir):
    """The picture, its size from the header, the sources of composites, and what a served teacher gets."""
    exif, path = Image.Exif(), tmp_path / "a.png"
    exif[0x0112] = orientation
    path.write_bytes(encoded(halves(size=(240, 120)), kind, exif=exif))
    want = {1: (0, 0), 2: (1, 0), 3: (1, 0), 4: (0, 0), 5: (0, 0), 6: (0, 0), 7: (0, 1), 8: (0, 1)}[orientation]
    size = (240, 120) if orientation < 5 else (120, 240)
    tokenizer, image_processor = t.load_processors(tiny_dir, 401408)
    source = synth_data.Source(str(path), "a", "a", "a", (0, 0, *size))
    url = gen_cot.image_url(path, 10**6)
    sent = t.load_image(str(path)) if kind == "TIFF" else Image.open(io.BytesIO(decoded(url)))
    for image in (t.load_image(str(path)), synth_data.load_source(source), sent.convert("RGB")):
        corner = (5 if want[0] == 0 else size[0] - 5, 5 if want[1] == 0 else size[1] - 5)
        opposite = (size[0] - 1 - corner[0], size[1] - 1 - corner[1])
        assert image.size == size == t.image_size(str(path)) and near(image.getpixel(corner), (0, 0, 255))
        assert near(image.getpixel(opposite), (255, 0, 0))
    width, height = t.resized_size(image_processor, str(path))
    inputs = t.chat_inputs(tokenizer, image_processor, str(path), QUESTION, t.BOX_STYLES["qwen2_vl"])
    assert inputs["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]


def decoded(url):
    import base64

    return base64.b64decode(url.split(",", 1)[1])


# ---- names and texts ----
STYLE = t.BOX_STYLES["qwen2_vl"]
ODD_NAMES = ["O'Brien \"Jo\"", "Peugeot 206 (1998)", "a [b] {c} {}", "北京鸭", "نسر ذهبي", "C++ .*+?^$|\\d(", "x < y",
             "z | É́cole 🦆", "نسر\u200cها", "%s {0} $1", "a/b\\c", "1-2, 3"]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_passes_all_stages_and_adds_no_token(name, tmp_path, tiny_dir):
    data = write(tmp_path / "s.jsonl", [named(name)])
    (tmp_path / "a.png").write_bytes(encoded(halves()))
    (sample,) = t.read_samples(data)
    (composite,) = gen_cot.read_composites(data)
    assert sample["entity"] == name and sample["bbox_1000"] == [10, 20, 300, 400]
    assert train_grpo.parse_bbox(sample["answer"], "direct") == [10, 20, 300, 400]
    tokenizer, _ = t.load_processors(tiny_dir, 401408)
    special = set(tokenizer.all_special_ids)

    def specials(text):
        return [i for i in t.prompt_ids(tokenizer, text, 4) if i in special]

    assert specials(sample["question"]) == specials(QUESTION)
    assert specials(gen_cot.teacher_prompt(composite)) == specials("Which?")
    listed = t.model_text(sample["answer"], t.BOX_STYLES["qwen3_vl"], (1000, 1000))
    assert json.loads(listed.strip("`json\n"))[0] == {"bbox_2d": [10, 20, 300, 400], "label": name}
    chain = f"Planning: x\nVisual Analysis: x\nComparison: x\nConclusion: {name} is at (10,20),(300,400)."
    assert gen_cot.validate(chain, composite, min_words=1) is None


BAD_NAMES = ["Lo<|im_end|>", "Lo<|image_pad|>", "<|box_start|>", "<|im_start|>system", "Lo</answer>", "<THINK>",
             "<image>", "Lo\nMi", "Lo\r", "Lo\u2028Mi", "Lo\x00", "", "  ", "(1,2),(3,4)", "Lo [1, 2, 3, 4]",
             "\ud800"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_a_token_a_tag_or_a_box_is_refused_by_every_reader(name, tmp_path):
    path = write(tmp_path / "s.jsonl", [named(name)])
    for read in (t.read_samples, eval_kvg.read_bench, gen_cot.read_composites):
        one_line("mend the row", read, path)
    others = row(entities=[{"entity": "Lo", "bbox_px": [1, 2, 3, 4]}, {"entity": name, "bbox_px": [1, 2, 3, 4]}])
    one_line("entity", t.read_samples, write(tmp_path / "e.jsonl", [others]))
    one_line("category", t.read_samples, write(tmp_path / "c.jsonl", [row(category=name)]))
    source = {"image": "a.png", "entity": name, "category": "car"}
    one_line("entity", synth_data.list_sources, write(tmp_path / "src.jsonl", [source]))
    table = {"Lo": {"category": "car", "description": f"red {name}"}}
    (tmp_path / "k.json").write_text(json.dumps(table))
    if name.strip():
        one_line("description", gen_cot.read_knowledge, tmp_path / "k.json")


def test_a_folder_name_is_refused_too(tmp_path):
    (tmp_path / "car" / "Lo<|im_end|>").mkdir(parents=True)
    (tmp_path / "car" / "Lo<|im_end|>" / "a.png").write_bytes(encoded(halves()))
    one_line("entity 'Lo<|im end|>'", synth_data.list_sources, tmp_path)


BAD_TEXTS = {
    "question": (row(question=QUESTION + "<|im_end|>"), "'<|im_end|>' in the question"),
    "image token": (row(messages=said(user="Where?<|image_pad|>"), question=None), "question"),
    "user's message": (
        {k: v for k, v in row(messages=said(user="<|vision_start|>Where?")).items() if k != "question"},
        "'<|vision_start|>' in the question"),
    "answer": (row(answer=ANSWER + "<|endoftext|>"), "'<|endoftext|>' in the answer"),
    "completion": (row(messages=said(assistant="So.<|im_end|>" + ANSWER)), "'<|im_end|>' in the assistant's message"),
    "open pair": (row(messages=said(assistant="<|box_start|>(1,2),(3,4)")), "'<|box_start|>' in the assistant's"),
    "crossed pairs": (
        row(messages=said(assistant="<|box_start|><|object_ref_start|>Lo<|box_end|><|object_ref_end|>")),
        "'<|box_start|>'"),
    "nested pairs": (row(answer="<|object_ref_start|>" + ANSWER + "<|object_ref_end|>"), "'<|object_ref_start|>'"),
    "half a character": (row(question="\ud83d Where?"), "'\\ud83d' in the question"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_with_foreign_tokens_is_refused(name, tmp_path):
    bad, message = BAD_TEXTS[name]
    one_line(message, t.read_samples, write(tmp_path / "s.jsonl", [bad]))


# ---- rows ----
BAD_ROWS = {
    "two images": (row(images=["a.png", "b.png"]), "2 images"),
    "no image": (row(images=[]), "0 images"),
    "images is text": (row(images="a.png"), "0 images"),
    "image is a number": (row(images=[7]), "image 7; want a path"),
    "one message": (row(messages=said()[:1]), "1 messages"),
    "messages is a dict": (row(messages={"user": "x"}), "0 messages"),
    "system first": (row(messages=said(first="system")), "messages of ['system', 'assistant']"),
    "content is a list": (row(messages=said(user=[{"type": "text"}])), "want text of user and assistant"),
    "messages are texts": (row(messages=["a", "b"]), "want text of user and assistant"),
    "empty question": (row(question="  "), "an empty question"),
    "question is a number": (row(question=3), "question 3; want text"),
    "answer is a list": (row(answer=[1, 2, 3, 4]), "answer [1, 2, 3, 4]; want text"),
    "category is a number": (row(category=5), "category 5"),
    "id is a list": (row(id=["a"]), "no id"),
    "id is a float": (row(id=0.5), "no id"),
    "id is empty": (row(id=""), "no id"),
    "id of two lines": (row(id="a\nb"), "'a\\nb'): no id"),
    "id of half a character": (row(id="\ud800"), "no id"),
    "id without end": (row(id="x" * 5000), "no id"),
    "image of two lines": (row(images=["a\n.png"]), "image 'a\\n.png'; want a path"),
    "pass rate is NaN": (row(pass_rate=float("nan")), "pass_rate nan; want 0 to 1"),
    "pass rate is a text": (row(pass_rate="1"), "pass_rate '1'; want 0 to 1"),
    "swapped box": (row(answer=ANSWER.replace("(10,20)", "(310,20)")), "bbox_1000 [310, 20, 300, 400]"),
    "empty box": (row(answer=ANSWER.replace("(10,20)", "(300,20)")), "bbox_1000 [300, 20, 300, 400]"),
    "box beyond the grid": (row(answer=ANSWER.replace("300", "1001")), "bbox_1000 [10, 20, 1001, 400]"),
    "entities of texts": (row(entities=["Lo"]), "entity None"),
    "entities is a text": (row(entities="Lo"), "entities 'Lo'; want a list"),
    "entities is one of them": (row(entities={"entity": "Lo", "bbox_px": [1, 2, 30, 40]}), "want a list"),
    "entity without box": (row(entities=[{"entity": "Lo"}]), "bbox_px None of Lo"),
    "NaN in a box": (row(entities=[{"entity": "Lo", "bbox_px": [float("nan"), 1, 2, 3]}]), "bbox_px [nan, 1, 2, 3]"),
    "infinite box": (row(entities=[{"entity": "Lo", "bbox_px": [0, 0, float("inf"), 3]}]), "bbox_px [0, 0, inf, 3]"),
    "negative box": (row(entities=[{"entity": "Lo", "bbox_px": [-1, 0, 2, 3]}]), "bbox_px [-1, 0, 2, 3]"),
    "swapped corners in px": (row(entities=[{"entity": "Lo", "bbox_px": [5, 0, 2, 3]}]), "bbox_px [5, 0, 2, 3]"),
    "three numbers": (row(entities=[{"entity": "Lo", "bbox_px": [0, 2, 3]}]), "bbox_px [0, 2, 3]"),
    "box of texts": (row(entities=[{"entity": "Lo", "bbox_px": ["0", "1", "2", "3"]}]), "bbox_px ['0', '1', '2', '3']"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_gets_one_line_with_its_number(name, tmp_path):
    bad, message = BAD_ROWS[name]
    path = write(tmp_path / "s.jsonl", [row(id="first"), bad])
    one_line(message, t.read_samples, path)
    one_line(f"{path}:2 (", t.read_samples, path)


def test_boxes_in_other_scripts_digits_or_of_huge_numbers_are_none(tmp_path):
    for box in ("(١٠,٢٠),(٣٠٠,٤٠٠)", f"(1,2),(3,{'9' * 5000})", "(-1,2),(3,4)", "(1.5,2),(3,4)", "(1e2,2),(3,4)"):
        bad = row(answer=re.sub(r"\(10.*400\)", box, ANSWER))
        (sample,) = t.read_samples(write(tmp_path / "s.jsonl", [bad]))
        assert sample["bbox_1000"] is None
        one_line("no box in the answer", eval_kvg.read_bench, tmp_path / "s.jsonl")


def test_extra_columns_blank_lines_and_crlf_are_fine(tmp_path):
    text = "\r\n".join(["", json.dumps(row(extra={"a": [None]})), "  ", json.dumps(row(id=2)), ""])
    (tmp_path / "s.jsonl").write_bytes(text.encode("utf-8-sig"))  # with a BOM
    assert [s["id"] for s in t.read_samples(tmp_path / "s.jsonl")] == ["a", 2]
    share = [{"messages": said(), "images": ["a.png"]}]
    (tmp_path / "s.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(share).encode())
    assert [s["id"] for s in t.read_samples(tmp_path / "s.json")] == ["0"]


GOOD = json.dumps(row())
BAD_FILES = {
    "s.jsonl, empty": (b"", "0 rows"),
    "s.jsonl, blank lines": (b"\n \r\n", "0 rows"),
    "s.jsonl, UTF-16": (GOOD.encode("utf-16"), "s.jsonl:1: no text"),
    "s.jsonl, Latin-1": (GOOD.encode() + '\n{"id": "É"}'.encode("latin-1"), "s.jsonl:2: no text"),
    "s.jsonl, number without end": (b'{"id": ' + b"9" * 5000 + b"}", "s.jsonl:1: not JSON (Exceeds the limit"),
    "s.jsonl, too deep": (b"[" * 100_000, "s.jsonl:1: not JSON (maximum recursion depth"),
    "s.json, too deep": (b'{"a":' * 100_000, "s.json: not JSON (maximum recursion depth"),
    "s.jsonl, an array in one line": (f"[{GOOD}]".encode(), "s.jsonl:1: [{'id': 'a'"),
    "s.jsonl, an array": (f"[\n{GOOD}\n]".encode(), "s.jsonl:1: not JSON"),
    "s.jsonl, a number": (b"3\n", "s.jsonl:1: 3; want one object a line"),
    "s.jsonl, cut off": (GOOD.encode()[:90], "s.jsonl:1: not JSON"),
    "s.jsonl, two ids": (f"{GOOD}\n{GOOD}".encode(), "id 'a' occurs more than once"),
    "s.json, cut off": (b'[{"messages"', "not JSON"),
    "s.json, an object": (b'{"messages": [], "images": []}', "a dict; want a list"),
    "s.json, empty list": (b"[]", "0 rows"),
    "s.json, texts": (b'["a"]', "row 1 has no messages"),
    "s.json, null": (b"null", "a NoneType; want a list"),
    "s.parquet, text": (b"PAR1 is not here", "unreadable"),
    "s.parquet, empty": (b"", "unreadable"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gets_one_line(name, tmp_path):
    data, message = BAD_FILES[name]
    path = tmp_path / name.split(",")[0]
    path.write_bytes(data)
    one_line(message, t.read_samples, path)


BENCH = {"question_id": "car/1", "question": QUESTION, "answer": ANSWER, "category": "car", "image": {"bytes": b"x"}}
BAD_BENCHES = {
    "no column": ([{k: v for k, v in BENCH.items() if k != "category"}], "no column 'category'"),
    "0 rows": ([], "0 rows"),
    "no question": ([BENCH | {"question": None}], "question None; want text"),
    "no answer": ([BENCH | {"answer": None}], "answer None; want text"),
    "number as answer": ([BENCH | {"answer": 3}], "answer 3; want text"),
    "no box": ([BENCH | {"answer": "(1,2),(3,4)"}], "no box in the answer"),
    "no id": ([BENCH | {"question_id": None}], "no id"),
    "two ids": ([BENCH, BENCH], "more than once"),
    "no bytes, no path": ([BENCH | {"image": {"bytes": None}}], "no image"),
    "image without bytes": ([BENCH | {"image": {"other": 3}}], "no image"),
    "image is a number": ([BENCH | {"image": 3}], "no image"),
    "path outside": ([BENCH | {"image": "/etc/passwd"}], "want a path relative"),
    "token in the question": ([BENCH | {"question": QUESTION + "<|im_start|>"}], "'<|im_start|>' in the question"),
    "negative box": ([BENCH | {"answer": ANSWER.replace("(10", "(-10")}], "no box in the answer"),
    "grpo, no solution": ([{"image": b"x", "problem": QUESTION}], "no column 'solution'"),
    "grpo, null solution": ([{"image": b"x", "problem": QUESTION, "solution": None}], "answer None"),
}


@pytest.mark.parametrize("name", BAD_BENCHES)
def test_a_bad_bench_gets_one_line(name, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, message = BAD_BENCHES[name]
    table = pa.Table.from_pylist(rows) if rows else pa.table({k: [] for k in BENCH})
    pq.write_table(table, tmp_path / "b.parquet")
    one_line(message, eval_kvg.read_bench, tmp_path / "b.parquet")


def test_paths_in_a_parquet_count_from_its_folder(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([BENCH | {"image": "a.png"}]), tmp_path / "b.parquet")
    (tmp_path / "a.png").write_bytes(encoded(halves()))
    assert eval_kvg.read_bench(tmp_path / "b.parquet")[0]["image"] == str(tmp_path / "a.png")


# ---- composites, sources, tables ----
BAD_COMPOSITES = {
    "target is a text": (row(target="0"), "target '0' of 2 entities"),
    "target is true": (row(target=True), "target True of 2"),
    "target is negative": (row(target=-1), "target -1 of 2"),
    "target beyond": (row(target=2), "target 2 of 2"),
    "entities is a dict": (row(entities={"a": 1}), "target 0 of 0"),
    "entity is a text": (row(entities=["Lo"]), "entity None"),
    "box of floats": (row(entities=[{"entity": "Lo", "bbox_1000": [1.5, 2, 3, 4]}]), "bbox_1000 [1.5, 2, 3, 4] of Lo"),
    "NaN": (row(entities=[{"entity": "Lo", "bbox_1000": [float("nan"), 2, 3, 4]}]), "bbox_1000 [nan, 2, 3, 4]"),
    "box of texts": (row(entities=[{"entity": "Lo", "bbox_1000": ["1", "2", "3", "4"]}]), "bbox_1000 ['1'"),
    "no box": (row(entities=[{"entity": "Lo"}]), "bbox_1000 None of Lo"),
    "images is a text": (row(images="a.png"), "images 'a.png'; want one file"),
    "id is a list": (row(id=[1]), "no id"),
    "climbs": (row(images=["../../../../../../etc/passwd"]), "leads out of"),
    "token in the answer": (row(answer=ANSWER + "<|im_end|>"), "'<|im_end|>' in the answer"),
}


@pytest.mark.parametrize("name", BAD_COMPOSITES)
def test_a_bad_composite_gets_one_line(name, tmp_path):
    bad, message = BAD_COMPOSITES[name]
    (tmp_path / "a.png").write_bytes(encoded(halves()))
    one_line(message, gen_cot.read_composites, write(tmp_path / "s.jsonl", [bad]))


SOURCE = {"image": "a.png", "entity": "Lo", "category": "car", "bbox_px": [0, 0, 9, 9]}
BAD_SOURCES = {
    "category is null": ([SOURCE | {"category": None}], "no column 'category'"),
    "entity is a number": ([SOURCE | {"entity": 3}], "entity 3"),
    "category is a list": ([SOURCE | {"category": ["car"]}], "category ['car']"),
    "image is a list": ([SOURCE | {"image": ["a.png"]}], "want a path relative"),
    "box of texts": ([SOURCE | {"bbox_px": "0 0 9 9"}], "bbox_px '0 0 9 9'"),
    "box of three": ([SOURCE | {"bbox_px": [1, 2, 3]}], "bbox_px [1, 2, 3]"),
    "box with NaN": ([SOURCE | {"bbox_px": [0, 0, float("nan"), 9]}], "bbox_px [0, 0, nan, 9]"),
    "swapped box": ([SOURCE | {"bbox_px": [9, 0, 0, 9]}], "bbox_px [9, 0, 0, 9]"),
    "absolute": ([SOURCE | {"image": "/etc/passwd"}], "want a path relative"),
    "climbs": ([SOURCE | {"image": "../../../../../../../etc/passwd"}], "leads out of"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_bad_source_row_gets_one_line(name, tmp_path):
    rows, message = BAD_SOURCES[name]
    one_line(message, synth_data.list_sources, write(tmp_path / "s.jsonl", rows))


@pytest.mark.parametrize(
    "box", ["1 2 3 4", [1, 2, 3], [4, 0, 1, 9], [0, 0, float("inf"), 9], {"x": 1}, [0, 0, None, 9], True]
)
def test_a_bad_line_of_a_boxes_file_gets_one_line(box, tmp_path):
    path = write(tmp_path / "boxes.jsonl", [{"image": "a.png", "bbox_px": None}, {"image": "b.png", "bbox_px": box}])
    one_line("boxes.jsonl: b.png: bbox_px", synth_data.read_boxes, path)


@pytest.mark.parametrize("rows, message", [
    ([[1]], "s.jsonl:1: [1]; want one object"),
    ([{"image": "/etc/passwd"}], "want a path relative"),
    ([{"images": ["../../../../../../../etc/passwd"]}], "leads out of"),
    ([{"images": [None]}], "image None"),
])  # fmt: skip
def test_a_bad_benchmark_to_exclude_gets_one_line(rows, message, tmp_path):
    one_line(message, synth_data.benchmark_images, write(tmp_path / "s.jsonl", rows))


# ---- paths ----
def test_images_lie_in_the_run_folder_or_beside_samples_of_ours(tmp_path):
    run = tmp_path / "run"
    for name in ("synth/images", "cot", "cot/photos", "elsewhere/images"):
        (run / name).mkdir(parents=True)
    outside = tmp_path / "other" / "deep" / "synth"
    (outside / "images").mkdir(parents=True)
    write(outside / "samples.jsonl", [row()])
    (tmp_path / "secret.png").write_bytes(encoded(halves()))
    (run / "cot" / "link.png").symlink_to(tmp_path / "secret.png")
    (run / "cot" / "inside.png").symlink_to(run / "synth" / "images" / "a.png")
    (run / "cot" / "folder").symlink_to(tmp_path)
    (run / "cot" / "ours").symlink_to(outside)
    fine = ["photos/a.png", "../synth/images/a.png", "../elsewhere/a.png", "inside.png", "photos/../a.png",
            "../../other/deep/synth/images/a.png", "ours/images/a.png"]  # fmt: skip
    for name in fine:
        assert t.image_path(run / "cot", name, "x") == str(run / "cot" / name)
    for name in ("../..", "../../secret.png", "link.png", "folder/secret.png", "../../other/deep/images/a.png",
                 "../../other/deep/synth/samples.jsonl", "photos/../../../secret.png", "../" * 20 + "x"):  # fmt: skip
        one_line("leads out of", t.image_path, run / "cot", name, "x")
    for name in ("/etc/passwd", str(run / "cot" / "photos" / "a.png"), "", "a\0.png", None, 3, ["a.png"]):
        one_line("want a path relative", t.image_path, run / "cot", name, "x")


def test_a_file_below_the_root_does_not_open_the_root(tmp_path):
    one_line("leads out of", t.image_path, "/tmp", "../etc/passwd", "x")


def test_rows_of_our_own_stages_are_read_from_any_folder(synth_dir, world_dir, tmp_path):
    out = tmp_path / "far" / "away" / "cot"
    flags = ("--knowledge", world_dir / "knowledge.json", "--out", out)
    run_script("gen_cot.py", "--samples", synth_dir / "samples.jsonl", *flags)
    samples = t.read_samples(out / "samples.jsonl")
    assert len(samples) == 12 and all(os.path.isfile(s["image"]) for s in samples)


# ---- models ----
def another_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def edit_header(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:8] + b"?" * 50 + data[58:])


def split(folder, index):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)


def without_token(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|object_ref_start|>", "<|other|>"))
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|object_ref_start|>", "<|other|>"))


def without_template(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def cut(folder):
    os.truncate(folder / "model.safetensors", 20000)


def edited(name, old, new):
    def edit(folder):
        text = (folder / name).read_text()
        assert old in text, text[:2000]
        (folder / name).write_text(text.replace(old, new))

    return edit


BAD_MODELS = {
    "another family": (another_family, "model_type 'llama'"),
    "no config": (lambda d: (d / "config.json").unlink(), "no model"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "no model"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "cut weights": (cut, "20000 bytes, not a whole file"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "0 bytes, not a whole file"),
    "broken header": (edit_header, "not a whole file; want a header"),
    "a page instead of weights": (
        lambda d: (d / "model.safetensors").write_text("<html>" * 99), "not a whole file; want a header"),
    "a part is missing": (lambda d: split(d, '{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors: no such"),
    "broken index": (lambda d: split(d, "{"), "index.json: not JSON"),
    "index, endless name": (lambda d: split(d, json.dumps({"weight_map": {"a": "x" * 5000}})), "no such file"),
    "config of other types": (edited("config.json", '"hidden_size": 64', '"hidden_size": "64"'), "no model"),
    "config with more layers": (edited("config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 3'), "no model"),
    "tokens out of the vocabulary": (edited("tokenizer.json", '"merges": [', '"merges": [["?", "??"], '), "vocabulary"),
    "broken template": (edited("chat_template.jinja", "{% for", "{% of"), "one picture and no text fail"),
    "template without image": (edited("chat_template.jinja", "<|image_pad|>", ""), "one picture and no text fail"),
    "patches of no size": (edited("preprocessor_config.json", '"patch_size": 14', '"patch_size": 0'), "one picture"),
    "no resizing": (edited("preprocessor_config.json", '"do_resize": true', '"do_resize": false'), "one picture"),
    "sides of no number": (edited("preprocessor_config.json", '"shortest_edge"', '"shortest"'), "want a folder with"),
    "index of nothing": (lambda d: split(d, "[]"), "index.json: broken"),
    "no special token": (without_token, "the tokenizer has no <|object_ref_start|>"),
    "no chat template": (without_template, "no chat template"),
    "no image processor": (lambda d: (d / "preprocessor_config.json").unlink(), "want a folder with tokenizer"),
    "no tokenizer": (lambda d: [p.unlink() for p in d.glob("*token*")], "the tokenizer has no <|image_pad|>"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_folder_gets_one_line_before_weights_are_loaded(name, tiny_dir, tmp_path):
    change, message = BAD_MODELS[name]
    shutil.copytree(tiny_dir, tmp_path / "model")
    change(tmp_path / "model")

    def start():
        t.check_model(tmp_path / "model")
        t.load_processors(tmp_path / "model", 401408)

    one_line(message, start)


def test_weights_in_parts_are_fine(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path / "model")
    split(tmp_path / "model", '{"weight_map": {"a": "part.safetensors", "b": "part.safetensors"}}')
    t.check_weights(tmp_path / "model")
    t.check_weights("Qwen/Qwen2-VL-7B-Instruct")


# ---- what an earlier run left, tables and answers ----
KEPT = SimpleNamespace(seed=0)
SCORED = {"question_id": "a", "category": "car", "image_id": "a", "gt_bbox_1000": [1, 2, 3, 4], "correct": True}
NAN = float("nan")
BAD_LEFT = {  # file: content, reader of its folder, message
    "zeros after a crash": (b'{"id": 1}\n\0\0\0\n', lambda d: t.complete_lines(d / "f"), "f:2: not JSON"),
    "a row without its column": (b"{}\n", lambda d: t.complete_lines(d / "f", step=int), "f:1: {}; want a row of the"),
    "a step of text": (b'{"step": "1"}\n', lambda d: t.truncate_log(d / "f", 1), "f:1: {'step': '1'}; want a row"),
    "config.json, cut": (b"{", lambda d: t.same_config(d, KEPT), "config.json: not JSON"),
    "config.json, a list": (b"[]", lambda d: t.same_config(d, KEPT), "--seed was None, now 0"),
    "config.json, lines": (b'{"seed": "\\n"}', lambda d: t.same_config(d, KEPT), "--seed was '\\n', now 0"),
    "knowledge, too deep": (b"[" * 100_000, lambda d: gen_cot.read_knowledge(d / "f"), "not JSON"),
    "mastery, a level of lists": (
        b'{"a": {"knowledge_category": []}}', lambda d: train_grpo.read_mastery(d / "f"), "want mastery, 0 to 1"),
    "mastery, a name of lines": (b'{"a\\nb": 3}', lambda d: train_grpo.read_mastery(d / "f"), "(a\\nb): 3; want"),
    "mastery, no file": (None, lambda d: train_grpo.read_mastery(d / "f"), "unreadable"),
    "engine, a list": (b"[]", lambda d: t.engine_settings(d / "f"), "f: zero_optimization None; want"),
    "engine, stage of text": (b'{"zero_optimization": {"stage": "2"}}', lambda d: t.engine_settings(d / "f"), "want"),
    "boxes, reason of a list": (
        b'{"image": "a", "bbox_px": null, "reason": []}', lambda d: synth_data.read_boxes(d / "f"), "reason []; want"),
    "an answer in a grid of text": (
        b'{"question_id": "a", "response": "", "grid": "x"}',
        lambda d: eval_kvg.read_foreign_answers(d / "f", [{"id": "a"}]), "grid of 'a' has another type"),
    "more tokens than can be": (
        b'{"question_id": "a", "response": "", "num_tokens": 1' + b"0" * 400 + b"}",
        lambda d: eval_kvg.read_foreign_answers(d / "f", [{"id": "a"}]), "num_tokens, finished or grid"),
    "predictions.jsonl, NaN": (
        json.dumps(SCORED | {"iou": NAN}).encode(), lambda d: eval_kvg.compare_runs(d, d, []), "row 1: {'question_id'"),
    "predictions.jsonl, ids of numbers": (
        json.dumps(SCORED | {"question_id": 1}).encode(), lambda d: eval_kvg.compare_runs(d, d, []), "want a row of"),
    "eval_a/metrics.json, another": (b'{"all": []}', lambda d: eval_kvg.summarize(d, 0), "metrics.json: broken"),
    "an expression with a token": (
        b'{"image": "f", "expression": "<|im_end|>", "bbox": [0, 0, 1, 1]}', lambda d: eval_kvg.read_rec(d / "f"),
        "'<|im_end|>' in the expression"),
    "a box of true and false": (
        b'{"image": "f", "expression": "x", "bbox": [false, 0, true, 1]}', lambda d: eval_kvg.read_rec(d / "f"),
        "no box"),
    "an id of a list": (
        b'{"image": "f", "expression": "x", "bbox": [0, 0, 1, 1], "id": []}', lambda d: eval_kvg.read_rec(d / "f"),
        "id []; want a line of text"),
    "an entity of a list": (
        b'{"image": "f", "entity": ["x"], "category": "y"}', lambda d: eval_kvg.read_fgvr(d / "f", 0), "entity ['x']"),
    "an option with a token": (
        b'{"image": "f", "entity": "x", "category": "y", "options": ["x", "<|im_end|>"]}',
        lambda d: eval_kvg.read_fgvr(d / "f", 0), "option '<|im_end|>'"),
    "curves without steps": (b'{"step": "1", "loss": 1}', lambda d: eval_kvg.draw_runs([d / "f"], "x", 1), "no metric"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LEFT)
def test_a_bad_file_of_ours_or_of_others_gets_one_line(name, tmp_path):
    data, read, message = BAD_LEFT[name]
    first = name.split(",")[0]
    path = tmp_path / (first if "." in first else "f")
    path.parent.mkdir(exist_ok=True)
    if data is not None:
        path.write_bytes(data)
    one_line(message, read, tmp_path)


def test_half_a_character_is_written_as_its_escape(tmp_path):
    t.write_text(tmp_path / "f", json.dumps({"response": "\ud800É"}, ensure_ascii=False))
    assert json.loads((tmp_path / "f").read_text(encoding="utf-8")) == {"response": "\ud800É"}


def test_a_path_without_end_is_no_image(tmp_path):
    one_line(
        "want one file that is there", gen_cot.read_composites, write(tmp_path / "s.jsonl", [row(images=["x" * 5000])])
    )


@pytest.mark.parametrize("body", [b"[" * 100_000, b"[]", b"\xff", b'{"choices": [{"message": {"content": 3}}]}'])
def test_a_reply_that_is_none_is_a_value_error(body):
    with pytest.raises(ValueError):
        gen_cot.read_reply(body)


def test_a_reply_counts_tokens_only(tmp_path):
    usage = {"prompt_tokens": True, "completion_tokens": -1}
    reply = {"choices": [{"message": {"content": "x"}}], "usage": usage}
    assert gen_cot.read_reply(json.dumps(reply).encode()) == ("x", False, {})


def test_a_parquet_image_without_bytes_or_path(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"other": 1}, "entity": "Lo", "category": "car"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    one_line("image None; want a path", synth_data.benchmark_images, tmp_path / "b.parquet")
    (source,) = synth_data.list_sources(tmp_path / "b.parquet")
    with pytest.raises(synth_data.UNREADABLE):
        synth_data.load_source(source)


def test_a_thin_box_at_the_edge_stays_a_box():
    style = t.BOX_STYLES["qwen2_5_vl"]
    text = t.model_text(synth_data.ANSWER.format("Lo", 999, 0, 1000, 1), style, (28, 28))
    assert train_grpo.parse_bbox(text, "direct", (28, 28)) == [27 * 1000 / 28, 0, 1000, 1000 / 28]


def test_a_name_without_box_stays_out_of_the_label_of_the_next():
    text = "<|object_ref_start|>Mi<|object_ref_end|> is not it: " + ANSWER
    assert t.model_text(text, t.BOX_STYLES["qwen3_vl"], (1000, 1000)).startswith("Mi is not it: ```json")


@pytest.mark.parametrize("loop", ["<answer>(1,2),", "So the answer is (1,2),(3,", "((((", "[[[["])
def test_an_answer_that_loops_does_not_stall_the_released_evaluator(loop):
    start = time.process_time()
    eval_kvg.official_box(loop * (4000 // len(loop)))
    assert time.process_time() - start < 1


# ---- as a user meets it ----
def refused(done, message):
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr and message in last, done.stderr


def test_scripts_say_it_in_one_line(synth_dir, tiny_dir, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = write(tmp_path / "s.jsonl", [named("Lo<|im_end|>")])
    done = run_script("train_sft.py", "--model", tiny_dir, "--data", bad, "--output_dir", tmp_path / "o", check=False)
    refused(done, "in the assistant's message")
    pq.write_table(pa.table({k: [] for k in BENCH}), tmp_path / "b.parquet")
    flags = ("--bench", tmp_path / "b.parquet", "--model", tiny_dir, "--out", tmp_path / "o")
    refused(run_script("eval_kvg.py", *flags, check=False), "b.parquet: 0 rows")
    climbing = write(tmp_path / "src.jsonl", [SOURCE | {"image": "../../../../../../etc/passwd"}])
    done = run_script("synth_data.py", "--source", climbing, "--out", tmp_path / "o", check=False)
    refused(done, "leads out of")
    shutil.copytree(tiny_dir, tmp_path / "model")
    cut(tmp_path / "model")
    flags = ("--stage", "grpo", "--samples", synth_dir / "samples.jsonl", "--model", tmp_path / "model")
    refused(run_script("filter.py", *flags, "--out", tmp_path / "f", check=False), "not a whole file")


def test_what_is_no_image_is_named_before_weights_are_loaded(synth_dir, tiny_dir, tmp_path):
    shutil.copytree(synth_dir, tmp_path / "s")
    (tmp_path / "s/images/000005.png").write_bytes(b"no picture")
    rows = ("--model", tiny_dir, "--max_completion_length", 4)
    for command in (("eval_kvg.py", "--bench"), ("filter.py", "--stage", "grpo", "--samples")):
        out = tmp_path / command[0]
        done = run_script(*command, tmp_path / "s/samples.jsonl", *rows, "--out", out, check=False)
        refused(done, "images/000005.png: unreadable (cannot identify image file")
        assert not any(f.stat().st_size for f in out.glob("part-*"))


def test_a_stopped_filter_does_not_go_on_with_another_model(synth_dir, tiny_dir, tmp_path):
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    flags = ("--stage", "grpo", "--samples", synth_dir / "samples.jsonl", "--max_completion_length", 4)
    run_script("filter.py", *flags, "--model", model, "--out", tmp_path / "f", check=False)
    with open(model / "model.safetensors", "r+b") as f:
        f.seek(os.path.getsize(f.name) // 2)
        f.write(bytes(64))
    done = run_script("filter.py", *flags, "--model", model, "--out", tmp_path / "f", check=False)
    refused(done, "--weights_md5 was")


def test_composites_of_odd_sources(tmp_path):
    """CMYK, 16 bits, transparency, an animation and a turned photo, under names that need escaping."""
    exif, sources = Image.Exif(), {}
    exif[0x0112] = 6
    files = [encoded(halves(size=(240, 120)), "JPEG", exif=exif), *(data for data, _ in ODD_IMAGES.values())]
    for name, data in zip(ODD_NAMES, files, strict=False):
        (tmp_path / f"{len(sources)}.png").write_bytes(data)
        size = (120, 240) if not sources else (40, 20)
        path = str(tmp_path / f"{len(sources)}.png")
        sources[name] = [synth_data.Source(path, path, name, "car", (0, 0, size[0], size[1] // 2))]
    (tmp_path / "images").mkdir()
    args = synth_data.parse_args(["--source", "x", "--out", str(tmp_path), "--min_entities", "6", "--seed", "3"])
    rows = []
    for index in range(12):
        new, bad = synth_data.make_sample(index, {"car": sources}, SimpleNamespace(**vars(args)))
        assert not bad
        rows += new
    samples = t.read_samples(write(tmp_path / "samples.jsonl", rows))
    assert {s["entity"] for s in samples} <= set(ODD_NAMES) and all(s["bbox_1000"] for s in samples)
    gen_cot.read_composites(tmp_path / "samples.jsonl")
    turned = [(s["image"], e["bbox_px"]) for s in samples for e in s["row"]["entities"] if e["entity"] == ODD_NAMES[0]]
    assert turned
    for image, (x1, y1, x2, y2) in turned:  # blue fills its upper half, and that is its box
        assert near(Image.open(image).getpixel((int((x1 + x2) / 2), int((y1 + y2) / 2))), (0, 0, 255))
