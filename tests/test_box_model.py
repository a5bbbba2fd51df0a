"""--box_model: answers become boxes in px, nothing is asked twice, killed runs continue; the toy base finds things."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
import toy_world
from conftest import FAMILIES, ROOT, run_script
from PIL import Image

import synth_data as s

s.torch = torch  # which the script imports where it loads a model
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
BOX = (21, 12, 63, 48)  # of a rectangle in the 84 x 60 px images below


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path):
    """Two entities of one category with four images each, all with BOX, and no boxes.jsonl."""
    for name in ("left_one", "right_one"):
        (tmp_path / "source/cat" / name).mkdir(parents=True)
        for i in range(4):
            image = Image.new("RGB", (84, 60), (i * 40, 90, 200))
            image.paste((250, 250, 0), BOX)
            image.save(tmp_path / f"source/cat/{name}/{i}.png")
    return tmp_path / "source"


def flags_of(source, model, out, *flags):
    return [
        str(v)
        for v in (
            "--source",
            source,
            "--out",
            out,
            "--box_model",
            model,
            "--num_samples",
            4,
            "--num_workers",
            1,
            *flags,
        )
    ]


def find(source, model, tmp_path, *flags):
    """find_boxes and with_boxes in this process; returns the sources with a box and {reason: count} of the others."""
    args = s.parse_args(flags_of(source, model, tmp_path / "out", *flags))
    boxes = source / "boxes.jsonl" if source.is_dir() else source.with_name(source.name + ".boxes.jsonl")
    s.find_boxes(s.list_sources(source), boxes, args)
    return s.with_boxes(s.list_sources(source), boxes)


def answering(monkeypatch, answer):
    """Replaces the model's answers; returns the prompts that were asked."""
    asked = []

    def answers(model, tokenizer, prompts):
        asked.extend(prompts)
        return [answer(p) for p in prompts]

    monkeypatch.setattr(s, "greedy_answers", answers)
    return asked


def good(prompt):
    """BOX, as the family of this prompt would write it."""
    x1, y1, x2, y2 = (round(v * n / size) for v, n, size in zip(BOX, prompt["grid"] * 2, (84, 60) * 2, strict=True))
    if prompt["style"].json:
        return f'```json\n[\n\t{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "x"}}\n]\n```'
    return f"<|object_ref_start|>x<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_single_prompts_do(family, family_dirs, tmp_path):
    """Images of three sizes and names of three lengths. The model's own generation settings do not matter."""
    folder = str(family_dirs[family])
    style, (tokenizer, image_processor) = s.check_model(folder), s.load_processors(folder, 20000)
    model = s.load_model(folder, "float32", torch.device("cpu")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight *= 10  # else the tied embeddings of a random model repeat one token, whatever the prompt
    args, prompts = SimpleNamespace(background="white"), []
    for i, size in enumerate([(60, 140), (200, 70), (112, 112)]):
        image = Image.frombytes("RGB", size, random.Random(i).randbytes(size[0] * size[1] * 3))
        image.save(tmp_path / f"{i}.png")
        source = s.Source(str(tmp_path / f"{i}.png"), "x", "a red disc " * (1 + 3 * i), "disc", None)
        seen, prompt = s.box_prompt(source, tokenizer, image_processor, style, args)
        assert seen == size
        prompts.append(prompt)
    single = [s.greedy_answers(model, tokenizer, [p])[0] for p in prompts]
    assert len(set(single)) == 3 and s.greedy_answers(model, tokenizer, prompts) == single
    assert not any(token in text for text in single for token in s.VISION_TOKENS)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    assert s.greedy_answers(model, tokenizer, prompts) == single


@pytest.mark.parametrize("text, size, line", [
    ("(100,200),(600,900)", (500, 250), {"bbox_px": [50, 50, 300, 225]}),
    ("[100, 200, 601, 900]", (333, 333), {"bbox_px": [33.3, 66.6, 200.13, 299.7]}),
    ("(0,0),(1000,1000)", (77, 33), {"bbox_px": [0, 0, 77, 33], "note": "whole image"}),
    ("(1,1),(990,970)", (500, 250), {"bbox_px": [0.5, 0.25, 495, 242.5], "note": "whole image"}),
    ("I see none.", (500, 250), "unparsed"),
    ("(0,0),(500,500) or (1,1),(700,700)", (500, 250), "unparsed"),
    ("(0,0),(1200,500)", (500, 250), "unparsed"),
    ("(100,100),(199,299)", (500, 500), "too small"),
    ("(100,100),(201,300)", (500, 500), {"bbox_px": [50.5 - 0.5, 50, 100.5, 150]}),
    ("(0,0),(70,1000)", (100, 100), "too small"),
    ("(0,0),(80,800)", (100, 100), {"bbox_px": [0, 0, 8, 80]}),
    ("(0,0),(80,801)", (100, 100), "too thin"),
    ("(0,0),(1000,95)", (400, 400), "too thin"),
])  # fmt: skip
def test_an_answer_is_a_sound_box_or_has_the_reason_why_not(text, size, line):
    got = s.judge_box(text, size, (1000, 1000), 0.02)
    assert got == (line if isinstance(line, dict) else {"bbox_px": None, "reason": line, "response": text})


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_are_px_of_the_original_whatever_the_model_counts_in(family, family_dirs, source, tmp_path, monkeypatch):
    asked = answering(monkeypatch, good)
    kept, left_out, _ = find(source, family_dirs[family], tmp_path, "--box_batch_size", 3)
    assert len(asked) == len(kept) == 8 and not left_out
    slack = max(a / b for a, b in zip((84, 60), asked[0]["grid"], strict=True)) / 2 + 0.005
    for x in kept:
        assert all(abs(a - b) <= slack for a, b in zip(x.bbox_px, BOX, strict=True)), x
    grids = {p["grid"] for p in asked}
    assert (grids == {(1000, 1000)}) == (family != "qwen2_5_vl"), "else this tests nothing about pixels"
    assert lines(source / "boxes.jsonl")[0] == {
        "image": "cat/left_one/0.png", "bbox_px": list(kept[0].bbox_px), "model": str(family_dirs[family])}  # fmt: skip
    assert [p.name for p in source.iterdir() if p.is_file()] == ["boxes.jsonl"], "the part files are gone"


def test_what_is_listed_is_never_asked_whatever_it_says(tiny_dir, source, tmp_path, monkeypatch, capsys):
    """A box made by hand, a rejection by hand, one of another model; the old lines stay as they are."""
    old = [
        {"image": "cat/left_one/0.png", "bbox_px": [1, 2, 30, 40]},
        {"image": "cat/left_one/1.png", "bbox_px": None},
        {"image": "cat/right_one/0.png", "bbox_px": None, "reason": "too thin", "response": "x", "model": "other"},
    ]
    text = "\n".join(json.dumps(line) for line in old)  # without the last line end, as an editor may leave it
    (source / "boxes.jsonl").write_text(text)
    asked = answering(monkeypatch, lambda p: [good(p), "none", "(0,0),(1000,1000)"][len(asked) % 3])
    kept, left_out, whole_image = find(source, tiny_dir, tmp_path, "--box_batch_size", 1)
    assert len(asked) == 5 and left_out == {"unparsed": 2, "too thin": 1, "rejected by hand": 1}
    assert {x.name: x.bbox_px for x in kept}["cat/left_one/0.png"] == (1, 2, 30, 40) and len(kept) == 4
    assert whole_image == 2
    printed = capsys.readouterr()
    assert "lists 3 of 8 images (2 by hand, 1 by other)" in printed.out
    assert printed.err.splitlines()[-1].endswith(
        "no box for 4 of 8 images (2 unparsed, 1 rejected by hand, 1 too thin); left out"
    )
    assert (source / "boxes.jsonl").read_text().startswith(text + "\n")
    written = (source / "boxes.jsonl").read_bytes()
    monkeypatch.setattr(s, "check_model", None)  # nothing to ask: no model is even looked at
    find(source, "nowhere", tmp_path)
    assert len(asked) == 5 and (source / "boxes.jsonl").read_bytes() == written


def test_a_killed_run_continues(tiny_dir, source, tmp_path, monkeypatch):
    def until_killed(prompt):
        if len(asked) > 4:
            raise KeyboardInterrupt
        return good(prompt)

    asked = answering(monkeypatch, until_killed)
    with pytest.raises(KeyboardInterrupt):
        find(source, tiny_dir, tmp_path, "--box_batch_size", 2)
    s.dist.destroy_process_group()
    part = source / "boxes.jsonl.part-00000"
    assert not (source / "boxes.jsonl").exists() and len(lines(part)) == 4
    part.write_text(part.read_text()[:-20])  # killed while it wrote: that line is asked again
    part.rename(source / "boxes.jsonl.part-00007")  # and there were more processes then
    asked = answering(monkeypatch, good)
    kept, _, _ = find(source, tiny_dir, tmp_path, "--box_batch_size", 2)
    assert len(asked) == 5 and len(kept) == 8 and len(lines(source / "boxes.jsonl")) == 8
    assert [p.name for p in source.iterdir() if p.is_file()] == ["boxes.jsonl"]


def test_jsonl_and_parquet_sources_ask_only_where_no_box_is(tiny_dir, source, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": x.name, "entity": x.entity, "category": "cat"} for x in s.list_sources(source)]
    rows = [r | {"bbox_px": [1.0, 1.0, 20.0, 20.0] if i < 3 else None} for i, r in enumerate(rows)]
    (source / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = [r | {"image": {"bytes": (source / r["image"]).read_bytes()}} for r in rows]
    pq.write_table(pa.Table.from_pylist(table), source / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(table).drop_columns("bbox_px"), source / "none.parquet")
    for name, count in (("rows.jsonl", 5), ("rows.parquet", 5), ("none.parquet", 8)):
        asked = answering(monkeypatch, good)
        kept, _, _ = find(source / name, tiny_dir, tmp_path)
        assert len(asked) == len(lines(source / f"{name}.boxes.jsonl")) == count and len(kept) == 8
        assert (kept[0].bbox_px == (1, 1, 20, 20)) == (count == 5)


def test_transparent_images_are_asked_as_they_lie_on_a_canvas(tiny_dir, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(s, "chat_inputs", lambda _, __, data, *more: seen.append(s.load_image(data)))
    sprite, box = toy_world.sprite(("disc", "red", "white"), random.Random(0))
    sprite.save(tmp_path / "a.png")
    source = s.Source(str(tmp_path / "a.png"), "a", "a", "a", None)
    for background, corner in (("white", (255, 255, 255)), ("gradient", (60, 60))):
        s.box_prompt(source, None, None, None, SimpleNamespace(background=background))
        middle = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
        assert seen[-1].getpixel((0, 0))[: len(corner)] == corner and seen[-1].getpixel(middle) == (250, 250, 250)


def test_a_random_model_finds_nothing_in_two_processes_and_is_not_asked_again(tiny_dir, source, tmp_path):
    """One line says so, once from torchrun's first process and once from a plain run on what that wrote."""
    flags = flags_of(source, tiny_dir, tmp_path / "out")
    done = run_script("synth_data.py", *flags, launcher=TWO_PROCESSES, check=False)
    message = "boxes.jsonl: no box for 8 of 8 images (8 unparsed); want boxes"
    assert done.returncode != 0 and done.stderr.count("no box for") == 1 and message in done.stderr, done
    assert "asked about 8 images" in done.stdout
    names = [f"cat/{e}/{i}.png" for e in ("left_one", "right_one") for i in range(4)]
    written = lines(source / "boxes.jsonl")
    assert [r["image"] for r in written] == names and [p.name for p in source.iterdir() if p.is_file()] == [
        "boxes.jsonl"
    ]
    assert all(r["bbox_px"] is None and r["reason"] == "unparsed" and r["response"] for r in written)
    again = run_script("synth_data.py", *flags, check=False)
    assert again.returncode != 0 and message in again.stderr and "Traceback" not in again.stderr
    assert "lists 8 of 8 images" in again.stdout and "asked" not in again.stdout
    assert lines(source / "boxes.jsonl") == written


def test_mistakes_get_one_line_before_any_weights(tiny_dir, source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (source / "cat/left_one/1.png").write_bytes(b"no image")
    cases = [(tiny_dir, ("--boxes", tmp_path / "file/boxes.jsonl"), "boxes.jsonl: File exists; want a file"),
             (tmp_path / "nowhere", (), "no model"),
             (tiny_dir, ("--exclude", "nowhere"), "--exclude nowhere: no such")]  # fmt: skip
    with monkeypatch.context() as m:
        m.setattr(s, "load_model", None)
        for model, flags, message in cases:
            m.setattr(sys, "argv", ["synth_data.py", *flags_of(source, model, tmp_path / "out", *flags)])
            with pytest.raises(SystemExit, match=message):
                s.main()
    answering(monkeypatch, good)
    monkeypatch.setattr(sys, "argv", ["synth_data.py", *flags_of(source, tiny_dir, tmp_path / "out")])
    with pytest.raises(SystemExit, match="1 unreadable source images, last .*left_one/1.png: cannot identify"):
        s.main()
    assert len(lines(source / "boxes.jsonl")) == 7, "the others need not be asked again"


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """One thing per image, as the toy base saw them, in folders named by what they look like; and their true boxes."""
    root, truth = tmp_path_factory.mktemp("described"), {}
    for name, look in toy_world.ENTITIES.items():
        if look[0] in ("disc", "star"):
            for i in range(2):
                image, [box] = toy_world.make_scene([look], random.Random(f"{name}:{i}"))
                file = f"{look[0]}/{toy_world.describe(look).replace(' ', '_')}/{i}.png"
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                image.save(root / file)
                truth[file] = box
    return root, truth


def test_the_toy_base_finds_things_by_description(described, tmp_path):
    """From images without boxes to composites, asked by two processes, composed by one: 48 things, boxes are right."""
    source, truth = described
    flags = flags_of(source, ROOT / "tests/toy/base", tmp_path / "out", "--boxes", tmp_path / "found.jsonl")
    done = run_script("synth_data.py", *flags, launcher=TWO_PROCESSES)
    assert done.stdout.count("synth_data: 4 images") == 1
    found = {r["image"]: r["bbox_px"] for r in lines(tmp_path / "found.jsonl")}
    right = [box is not None and s.box_iou(box, truth[file]) > 0.5 for file, box in found.items()]
    assert len(right) == 48 and sum(right) >= 44, sum(right)
    stats = json.loads((tmp_path / "out/stats.json").read_text())
    assert stats["rows"] == 4 and stats["boxes"] == {"left_out": {}, "whole_image": 0}
    width, height = Image.open(tmp_path / "out/boxes_preview.png").size
    assert width == 4 * 370 and height == 10 * 250, "40 images in rows of 4"
    mended = lines(tmp_path / "found.jsonl")
    mended[0]["bbox_px"] = [1, 1, 50, 50]
    (tmp_path / "found.jsonl").write_text("".join(json.dumps(r) + "\n" for r in mended))
    changed = run_script("synth_data.py", *flags, check=False)
    assert changed.returncode != 0 and "--boxes_sha was" in changed.stderr, "no mixture of old boxes and mended ones"
