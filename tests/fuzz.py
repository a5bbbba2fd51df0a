"""Feeds every parser and every reader of the scripts spoilt input, and looks for what none of them may do.

  python tests/fuzz.py --minutes 30 --seed 0              one process; the table at its end says what was tried
  python tests/fuzz.py --replay fuzz-crashes/NAME.bin     one input again, with its traceback

An input is a valid one, spoilt: bits, cuts, splices, foreign bytes; in JSON also types, keys, depth and numbers. One
that runs a line of the scripts which no other ran joins the valid ones of its target. Input number n of a target
depends on the seed and on the inputs before it alone; targets take turns so that all get the same time.
A crash: an exception other than SystemExit with one line of at most 600 characters that says what is wanted; 10 seconds
without an end; a value that is not sound, such as a box with NaN or text that cannot be written as UTF-8.
"""

import argparse
import contextlib
import faulthandler
import gc
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from test_bad_input import ANSWER, BENCH, ODD_IMAGES, QUESTION, SOURCE, encoded, halves, row  # noqa: E402

import eval_kvg as e  # noqa: E402
import filter as f  # noqa: E402
import gen_cot as c  # noqa: E402
import synth_data as s  # noqa: E402
import train_grpo as g  # noqa: E402
import train_sft as t  # noqa: E402

SCRIPTS = {script.__file__ for script in (s, c, f, t, g, e)}
HANG_SECONDS, LONGEST = 10, 600
GRIDS = ((1000, 1000), (364, 252), (28, 28), (1092, 28))
STYLES = list(t.BOX_STYLES.values())
# fmt: off
VALUES = [None, True, False, 0, -1, 1, 7, 1.5, 1e308, -0.0, 2**31, 2**63, 10**400, math.nan, math.inf, "", " ",
          "\n", "\0", "a\nb\r\x85\u2028c", "\ud800", "Lo", "١٢٣", "\u202eLo", "<|im_end|>", "<image>", "(1,2),(3,4)",
          "../../x", "/etc/passwd", "a.png", "x" * 5000, [], {}, [[]], [1, 2, 3, 4], [None], {"a": 1}, {"": []}]
TOKENS = [b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\r", b" ", b"\\ud800", b"\\u0000", b"\xed\xa0\x80",
          b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-1", b"null", b"[" * 2000, b"[" * 100000, b'{"a":' * 2000,
          b'"', b",", b"]", b"}", *(x.encode() for x in "\u2028\x85\u202e٣３²İ")]
WORDS = [w.encode() for w in (
    "<answer>", "</answer>", "<think>", "</think>", "(", ")", "[", "]", ",", ", ", ".", "(1,2)", "(1,2),", "((((",
    "[[[[", "(1,", "0.", "1e5", "nan", "inf", "x", "(10,20),(300,400)", "[10, 20, 300, 400]",
    "So the answer is", "Planning:", "\nConclusion: Lo ",
    "Visual Analysis\n", "**Comparison**:", "not ", "conclusion", ". ", "Lo", "Mi", "A", "(B)",
    "C.", "D:", "Lo.", "provided", "```json", '"bbox_2d": [1, 2, 3, 4]', "<|box_start|>", "<|box_end|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<image>")]
# fmt: on


# ---- spoilt input ----
def spoil_bytes(data, rng, corpus, words):
    """One to four of: a bit, a cut, a part dropped or repeated, foreign bytes, a splice with another input."""
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randint(0, min(len(data), rng.choice((16, 200, 10**9)))) for _ in "ij")
        other, word = rng.choice(corpus), rng.choice((*words, rng.randbytes(rng.choice((1, 2, 4)))))
        times = min(rng.choice((1, 1, 1, 2, 3, 2000)), 1 + 20_000 // (1 + max(len(word), j - i)))
        data = rng.choice((
            data[:i] + bytes(x ^ 1 << rng.randrange(8) for x in data[i : i + 1]) + data[i + 1 :],
            data[:j], data[i:], data[:i] + data[j:], data[:j] + data[i:j] * times + data[j:],
            data[:i] + word * times + data[i:], data[:i] + word * times + data[j:],
            data[:i] + other[rng.randint(0, len(other)) :],
        ))  # fmt: skip
    return data


def places(value):
    """(container, key) of every part of a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def spoil_value(value, rng):
    """The value with a few parts of another type, dropped, doubled, moved, renamed, wrapped or changed a little."""
    whole = [value]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        (container, key), (other, name) = rng.choices([*places(whole)], k=2)
        old, kind = container[key], rng.randrange(8)
        if kind < 3:
            container[key] = rng.choice(VALUES)
        elif kind == 3 and container is not whole:
            del container[key]
        elif kind == 4 and isinstance(container, list):
            container.insert(key, old)
        elif kind == 5:
            for _ in range(rng.choice((1, 1, 300))):
                old = rng.choice(([old], {"a": old}))
            container[key] = old
        elif kind == 6 and isinstance(container, dict):
            container[str(rng.choice(VALUES))[:50]] = container.pop(key)
        elif isinstance(old, str):
            at = rng.randint(0, len(old))
            container[key] = old[:at] + str(rng.choice(VALUES)) + old[at:]
        elif isinstance(old, (int, float)) and abs(old) < 1e300:
            container[key] = rng.choice((-old, old + 1, old * 1000, old / 3, str(old)))
        else:
            container[key] = json.loads(json.dumps(other[name])) if other is not whole else 0
    return whole[0] if whole else None


def spoil(kind, rng, corpus):
    data = rng.choice(corpus)
    if kind.startswith("json") and rng.random() < 0.7:
        with contextlib.suppress(ValueError, RecursionError):
            value = [json.loads(r) for r in data.splitlines()] if kind == "jsonl" else json.loads(data)
            value, ascii_only = spoil_value(value, rng), rng.random() < 0.5
            lines = value if kind == "jsonl" and isinstance(value, list) else [value]
            lines = [json.dumps(v, ensure_ascii=ascii_only) + "\n" for v in lines]
            return "".join(lines).encode("utf-8", "surrogatepass")
    data = spoil_bytes(data, rng, corpus, TOKENS + WORDS if kind == "text" else TOKENS)
    return data[: 8000 if kind == "text" else 300_000]


# ---- targets: valid inputs, and a function (data, folder) that reads one and checks what comes out ----
TARGETS = {}


def target(kind, *seeds):
    """kind: text, json (one value), jsonl (a value a line) or bytes; seeds: valid inputs, as bytes, text or values."""

    def valid(seed):
        if kind == "jsonl" and not isinstance(seed, (bytes, str)):
            seed = "".join(json.dumps(r) + "\n" for r in seed)
        seed = seed if isinstance(seed, (bytes, str)) else json.dumps(seed)
        return seed if isinstance(seed, bytes) else seed.encode()

    def register(function):
        TARGETS[function.__name__] = (kind, [valid(seed) for seed in seeds], function)
        return function

    return register


def put(folder, name, data):
    (folder / name).write_bytes(data)
    return folder / name


def text_of(data):
    """Any bytes as text; what is no UTF-8 becomes lone surrogates."""
    return data.decode("utf-8", "surrogateescape")


def sound_box(box, most=1000):
    return t.is_box(box, most) and all(map(math.isfinite, box))


def writable(value):
    """It can go into an output: JSON without NaN, in UTF-8."""
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


THINK = f"<think>\nPlanning: Lo is red.\nLo is at (10,20),(300,400), not Mi.\n</think> <answer>{ANSWER}</answer>"
CHAIN = "Planning: Lo is red.\nVisual Analysis: Lo\nComparison: Lo\nConclusion: Lo is at (10,20),(300,400)."
LIST = t.model_text(ANSWER, STYLES[1], (1000, 1000))
RULES = SimpleNamespace(min_words=0, max_words=600, max_repeats=3)
SAMPLE = {"id": "a", "entity": "Lo", "category": "car", "bbox_1000": [10, 20, 300, 400], "image_id": "a", "row": row()}


@target("text", THINK, ANSWER, LIST, f"<answer>{LIST}</answer>", "[[1.5, 2, 3, 4.25]]", "(1,2,3,4)")
def boxes(data, folder):
    for mode in e.EVAL_PROMPTS:
        for grid in GRIDS:
            box = g.parse_bbox(text_of(data), mode, grid)
            assert box is None or sound_box(box), box
            found = s.judge_box(text_of(data), (320, 200), grid, 0.02)
            assert found["bbox_px"] is None or sound_box(found["bbox_px"], 320), found


@target("text", THINK, f"<think>x</think><answer>{LIST}</answer>", "<answer></answer>")
def rewards(data, folder):
    text = text_of(data)
    for i, (level, form) in enumerate((level, form) for level in g.LEVELS for form in (None, "reward", "advantage")):
        sample = SAMPLE | {"grid": GRIDS[i % 4], "style": STYLES[i % 3], "level": level}
        args = SimpleNamespace(iou_threshold=0.5, knowledge_form=form)
        for name in ("binary", "dense_iou", "format", "iou"):
            value, low = (
                g.REWARDS[name](text, sample, args),
                g.LEVELS[level][2] if (name, form) == ("iou", "reward") else 0,
            )
            assert low <= value <= 1, (name, value)
            if g.parse_bbox(text, grid=sample["grid"]) is None:
                assert value <= (0.5 if name == "format" else 0), (name, value)


@target("text", THINK, "So the answer is (1,2),(3,4)", "(0.1, 0.2), (0.3, 0.4)", "[1, 2, 3, 4]", "(1, 2)\n(3, 4)")
def official(data, folder):
    text = text_of(data)
    box, match, _ = e.official_box(text)
    assert len(box) == 4 and math.isfinite(e.official_iou(box, SAMPLE["bbox_1000"])), box
    for mode, grid in random.Random(data).sample([*zip(e.EVAL_PROMPTS, GRIDS, strict=True)], 1):
        assert isinstance(e.official_difference(text, mode, grid), str)
        (scored,) = e.score_answers([SAMPLE], {"a": {"response": text, "grid": grid}}, mode)
        json.dumps(scored, allow_nan=False)


@target("text", "<answer>B</answer>", "A.", "(C)", "Lo.", "D: Ka", "Mi\nLo\nKa")
def choices(data, folder):
    text = text_of(data)
    for options in (["Lo", "Mi"], ["Lo", "lo", "A", "B"], text.splitlines()[:4]):
        for mode in e.EVAL_PROMPTS:
            assert e.read_choice(text, options, mode) in (None, *options)
        assert f.chosen_option(text, options) in (None, *options)


@target("text", THINK, f"Lo,Mi 2.5,x-y<think>Conclusion: It is not Lo, it is x-y.</think><answer>{ANSWER}</answer>")
def contradiction(data, folder):
    text = text_of(data)
    for names in ({"Mi", "Boeing 747", "Boeing 747-400"}, set(), set(text.split("<")[0].split(","))):
        for grid, entity in zip((None, *GRIDS), ("Lo", None, "Mi", "", text[:9]), strict=True):
            answer = {"response": text, "pred_bbox_1000": [1, 2, 3, 4], "grid": grid, "entity": entity}
            assert e.contradicts(answer, names) in (None, True, False)


@target("text", QUESTION, ANSWER, "Lo", "Peugeot 206 (1998)", "a [b] {c}")
def translation(data, folder):
    """Any text is translated; a box of an answer comes back, to half a pixel where it counts in pixels."""
    text, rng = text_of(data), random.Random(data)
    (x1, x2), (y1, y2) = (sorted(rng.sample(rng.choice((range(1001), range(5), range(996, 1001))), 2)) for _ in "xy")
    with contextlib.suppress(SystemExit):
        t.check_text(text, "x", "text")
    for style in STYLES:
        for grid in GRIDS:
            assert isinstance(t.model_text(text, style, grid), str)
    t.check_name(text, "x")
    for style in STYLES:
        for grid in GRIDS if style.pixels else GRIDS[:1]:
            back = g.parse_bbox(t.model_text(s.ANSWER.format(text, x1, y1, x2, y2), style, grid), "direct", grid)
            assert back, (style, grid, [x1, y1, x2, y2])
            for v, want, n in zip(back, (x1, y1, x2, y2), grid * 2, strict=True):
                most = 1500 / n if style.pixels else 0  # at least one pixel wide
                assert abs(v - want) <= most, (back, [x1, y1, x2, y2])


@target("text", CHAIN, "Planning:\nVisual Analysis:\nComparison:\nConclusion:")
def teacher_answer(data, folder):
    text = text_of(data)
    for cut in (False, True):
        chain, reason = c.judge(text, cut, row(), SimpleNamespace(min_words=1, max_words=800))
        assert isinstance(chain, str) and (reason is None or isinstance(reason, str) and reason)


@target("json", {"choices": [{"message": {"content": CHAIN}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}})
def teacher_reply(data, folder):
    with contextlib.suppress(ValueError):
        text, cut, tokens = c.read_reply(data)
        text.encode()
        assert type(cut) is bool and all(type(n) is int and n >= 0 for n in tokens.values()), tokens


@target("text", THINK, "<think></think><answer>(10,20),(300,400)</answer>", "<think>\n.\n.\n</think><answer></answer>")
def quality(data, folder):
    for changes in ({}, {"entity": None}, {"bbox_1000": None}, {"completion": None}):
        assert isinstance(f.broken_rule(SAMPLE | {"completion": text_of(data)} | changes, set(), RULES), str | None)


@target("text", "Lo", "images/a.png", "../run/a.png", "a.png", ANSWER)
def names(data, folder):
    for check in (t.check_name, t.check_text):
        with contextlib.suppress(SystemExit):
            check(text_of(data), "x", "text")
    assert Path(t.image_path(folder, text_of(data), "x")).resolve().is_relative_to(folder.parent)


@target("jsonl", [row(), row(id=2)], b"\xef\xbb\xbf{}\r\n\r\n{}")
def jsonl(data, folder):
    for required in ((), ("id", "images")):
        for r in t.read_jsonl(put(folder, "s.jsonl", data), required):
            assert isinstance(r, dict) and all(r[key] is not None for key in required)


@target("jsonl", [row(), row(id=2)], b'{"a": 1}\n{"b"')
def lines(data, folder):
    path = put(folder, "part-0.jsonl", data)
    t.complete_lines(path)
    assert path.read_bytes() == data[: data.rfind(b"\n") + 1]


def check_samples(samples):
    assert len({sample["id"] for sample in samples}) == len(samples)
    for sample in samples:
        assert type(sample["id"]) in (str, int) and all(isinstance(sample[key], str) for key in ("question", "answer"))
        assert all(isinstance(sample[key], str | None) for key in ("entity", "category", "completion"))
        assert sample["bbox_1000"] is None or sound_box(sample["bbox_1000"])
        f.broken_rule(sample, set(), RULES)
        "{id} {question} {answer}".format(**sample).encode()  # as for bench_md5
    scored = dict(correct=True, official_iou=0.0, iou=0.0, pred_bbox_1000=None, image_id="a")
    rates = {sample["id"]: sample["row"].get("pass_rate") for sample in samples}
    e.calibration_panel(e.pass_rate_bins([scored | {"question_id": i} for i in rates], rates))


def read_all(path):
    """What all stages read of samples."""
    samples = t.read_samples(path)
    check_samples(samples)
    with refusals():
        e.choice_cases(e.read_bench(path), 0)
    with refusals():
        f.probe_questions(samples, SimpleNamespace(samples=path, max_per_entity=2, seed=0))
    for r in (sample["row"] for sample in samples if "images" in sample["row"]):
        t.write_text(path.with_name("out.jsonl"), json.dumps(f.moved(r, path, path.parent), ensure_ascii=False))


@target("jsonl", [row(), row(id=2, pass_rate=0.5)], [row(question=None) | {"entities": []}])
def samples_jsonl(data, folder):
    read_all(put(folder, "s.jsonl", data))


SHARE = {"messages": row()["messages"], "images": ["a.png"]}


@target("json", [SHARE], [SHARE | {"id": 3}])
def samples_sharegpt(data, folder):
    read_all(put(folder, "s.json", data))


def parquet(folder, data):
    """A parquet of the rows that JSON holds. Errors: SystemExit if it cannot hold them."""
    try:
        table = [json.loads(line) for line in data.splitlines()]
        for r in table:
            image = r.get("image")
            if isinstance(image, dict) and isinstance(image.get("bytes"), str):
                image["bytes"] = image["bytes"].encode()
        pq.write_table(pa.Table.from_pylist(table), folder / "b.parquet")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, pa.ArrowException):
        raise SystemExit("no parquet; want rows; none") from None
    return folder / "b.parquet"


def parquet_bytes(table):
    pq.write_table(pa.Table.from_pylist(table), buffer := io.BytesIO())
    return buffer.getvalue()


PNG = encoded(halves())
KVG = BENCH | {"image": {"bytes": "x", "path": "a.png"}}
GRPO = {"image": {"bytes": "x"}, "problem": QUESTION, "solution": ANSWER}


@target("jsonl", [KVG, KVG | {"question_id": "car/2"}], [GRPO], [KVG | {"image": "a.png"}])
def samples_parquet(data, folder):
    read_all(parquet(folder, data))


@target("bytes", *(parquet_bytes([r | {"image": {"bytes": PNG}}] * 3) for r in (KVG, GRPO, SOURCE)))
def parquet_file(data, folder):
    path = put(folder, "b.parquet", data)
    for read in (t.read_samples, s.list_sources, s.benchmark_images):
        with refusals():
            read(path)


@target("jsonl", [SOURCE, {k: v for k, v in SOURCE.items() if k != "bbox_px"}])
def sources(data, folder):
    s.image_column.cache_clear()
    for path in (lambda: put(folder, "src.jsonl", data), lambda: parquet(folder, data)):
        with refusals():
            for source in s.list_sources(path()):
                assert source.bbox_px is None or sound_box(list(source.bbox_px), 1e9)
                writable([source.name, source.entity, source.category])
                with contextlib.suppress(*s.UNREADABLE):
                    s.load_source(source)


@target("text", "car/audi_a4/a.png\nbird/Lo/b.jpg", "car/Lo/a.PNG\n")
def source_folder(data, folder):
    shutil.rmtree(folder / "world", ignore_errors=True)
    (folder / "world").mkdir()
    for name in data.replace(b"\0", b"").split(b"\n")[:5]:
        parts = [part[:200] for part in name.split(b"/") if part not in (b"", b".", b"..")][:3]
        if len(parts) == 3:
            path = os.path.join(os.fsencode(folder / "world"), *parts)
            with contextlib.suppress(OSError):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                Path(os.fsdecode(path)).write_bytes(PNG)
    for read in (s.list_sources, s.benchmark_images, lambda path: e.read_fgvr(path, 0)):
        with refusals():
            read(folder / "world")
    for source in s.list_sources(folder / "world"):
        writable([source.name, source.entity, source.category])


@target("jsonl", [{"image": "a.png", "bbox_px": [1, 2, 3, 4]}, {"image": "b.png", "bbox_px": None, "reason": "x"}])
def boxes_file(data, folder):
    made = [s.Source(name, name, "Lo", "car", None) for name in ("a.png", "b.png", "c.png")]
    kept, _, _ = s.with_boxes(made, put(folder, "boxes.jsonl", data))
    assert all(sound_box(list(source.bbox_px), 1e9) for source in kept)


@target("jsonl", [row()], [{"image": "a.png"}])
def benchmark(data, folder):
    hashes, listed = s.benchmark_images(put(folder, "s.jsonl", data))
    assert len(hashes) and all(isinstance(name, str) for name in listed)
    with refusals():
        s.benchmark_images(parquet(folder, data))


@target("jsonl", [row(), row(id=2, target=1)])
def composites(data, folder):
    for r in c.read_composites(put(folder, "s.jsonl", data)):
        c.teacher_prompt(r)
        c.knowledge_cot(r, {"Lo": {"description": "red"}, "Mi": {"description": "blue"}})
        f"{r['id']}".encode()


@target("json", {"Lo": {"category": "car", "description": "red"}, "Mi": {"category": "car", "description": "blue"}})
def knowledge(data, folder):
    chain, reason = c.knowledge_cot(row(), c.read_knowledge(put(folder, "k.json", data)))
    writable(chain or reason)


def stored(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


KEPT = {"id": "a", "cot": "x", "reason": None, "attempt": 1, "requests": 1, "prompt_tokens": 3}


@target("bytes", stored(KEPT, KEPT | {"id": "b", "cot": None, "reason": "too short: 3", "response": ""}))
def chains_stored(data, folder):
    """Part files of a killed gen_cot.py."""
    out = folder / "cot"
    out.mkdir(exist_ok=True)
    put(out, "part-00000.jsonl", data)
    args = SimpleNamespace(samples=folder / "s.jsonl", teacher="openai", teacher_model="m", price_per_million=[1, 2])
    done = {r["id"] for r in c.complete_lines(out / "part-00000.jsonl", **c.RECORD)}
    c.merge([row(id=i) for i in done], args, out, 1.0)


@target("json", {"Lo": {"mastery": 0.5, "n": 3}, "Mi": {"knowledge_category": "mostly correct"}})
def mastery(data, folder):
    path = put(folder, "mastery.json", data)
    assert set(g.read_mastery(path).values()) <= set(g.LEVELS)
    g.read_levels(path, [SAMPLE, SAMPLE | {"entity": "Mi"}])


def run_eval(folder, samples, answers, task):
    """Scores and writes what eval_kvg.py does; all of it must be UTF-8."""
    out = folder / "eval"
    shutil.rmtree(out, ignore_errors=True)
    args = e.parse_args(["--bench", "s.jsonl", "--predictions", "p.jsonl", "--out", str(out), "--task", task])
    e.write_results(out, samples, answers, None, {"Lo": "mostly correct"} if task == "kvg" else None, None, args)
    for path in out.iterdir():
        path.read_text(encoding="utf-8")


TOLD = {"question_id": "a", "response": THINK, "num_tokens": 3, "finished": True, "grid": [364, 252]}


@target("jsonl", [TOLD, {"question_id": "2", "response": ""}])
def predictions(data, folder):
    put(folder, "s.jsonl", b"".join(json.dumps(row(id=i)).encode() + b"\n" for i in ("a", 2)))
    samples = e.read_bench(folder / "s.jsonl")
    run_eval(folder, samples, e.read_foreign_answers(put(folder, "p.jsonl", data), samples), "kvg")


@target("bytes", stored(TOLD))
def answers_stored(data, folder):
    """The answers of a killed eval_kvg.py."""
    out = folder / "stored"
    out.mkdir(exist_ok=True)
    put(out, "predictions.jsonl", b"")
    put(out, "part-0.jsonl", data)
    answers = e.stored_answers(out)
    if "a" in answers:
        e.score_answers([SAMPLE], answers, "r1")


REC = {"image": "a.png", "expression": "the left car", "bbox_px": [0, 0, 9, 9], "split": "val", "id": "r1"}


@target("jsonl", [REC, {"image": "a.png", "question": "Where?", "bbox": [0, 0, 9.5, 9]}])
def referring(data, folder):
    samples = e.read_rec(put(folder, "s.jsonl", data))
    assert all(sound_box(sample["bbox_1000"]) for sample in samples)
    run_eval(folder, samples, {sample["id"]: {"response": THINK} for sample in samples}, "rec")


FGVR = {"image": "a.png", "entity": "Lo", "category": "car", "id": "f1", "options": ["Lo", "Mi"]}


@target("jsonl", [FGVR, {"image": "a.png", "entity": "Mi", "category": "car"}])
def fgvr(data, folder):
    samples = e.read_fgvr(put(folder, "s.jsonl", data), 0)
    assert all(sample["entity"] in sample["options"] for sample in samples)
    run_eval(folder, samples, {sample["id"]: {"response": "<answer>A</answer>"} for sample in samples}, "fgvr")


METRICS = [{"step": 1, "loss": 1.5, "reward": 0.5}, {"step": 2, "loss": 1.25, "reward": None}]


@target("jsonl", METRICS)
def curves(data, folder):
    path = put(folder, "metrics.jsonl", data)
    e.draw_runs([path, path], folder / "curves.png", 2)


@target("bytes", stored(*METRICS))
def metrics_stored(data, folder):
    path = put(folder, "metrics.jsonl", data)
    t.truncate_log(path, 1)
    t.draw_curves(path, folder / "curves.png", ["loss", "reward"])


SCORED = [
    {"question_id": i, "category": "car", "image_id": i, "gt_bbox_1000": [1, 2, 3, 4], "correct": i == "a"}
    | {"iou": 0.5, "response": "x", "pred_bbox_1000": None, "entity": "Lo"}
    for i in "ab"
]


@target("jsonl", SCORED)
def compared(data, folder):
    for name, content in (("A", stored(*SCORED).encode()), ("B", data)):
        (folder / name).mkdir(exist_ok=True)
        put(folder / name, "predictions.jsonl", content)
    result = e.compare_runs(folder / "A", folder / "B", ["car"])
    e.compare_table(result)
    t.write_text(folder / "compare.json", json.dumps(result, allow_nan=False))
    t.write_text(folder / "compare.html", e.compare_html(result, [folder / "A", folder / "B"], None, ["car"]))


@target("json", {"bench": "s.jsonl", "task": "kvg"}, {"task": "rec", "bench": 3})
def compared_config(data, folder):
    compared(stored(*SCORED).encode(), folder)
    put(folder / "B", "config.json", data)
    try:
        e.compare_html(e.compare_runs(folder / "A", folder / "B", []), [folder / "A", folder / "B"], None, [])
    finally:
        (folder / "B" / "config.json").unlink()


SPLIT = {"n": 2, "acc": 0.5, "acc_ci95": [0.1, 0.9], "mean_iou": 0.5, "parse_rate": 1.0}


@target("json", {"all": SPLIT, "seen": SPLIT, "unseen": None, "config": {"task": "kvg"}})
def summary(data, folder):
    (folder / "eval_x").mkdir(exist_ok=True)
    put(folder / "eval_x", "metrics.json", data)
    e.summarize(folder, 0)


@target("json", {"seed": 0, "samples": "a", "grid": [3, 2]})
def config_kept(data, folder):
    """config.json of an earlier run in the same folder."""
    put(folder, "config.json", data)
    try:
        t.same_config(folder, SimpleNamespace(seed=0, samples="a", grid=[3, 2]))
    finally:
        t.LOCKS.pop().close()


@target("json", {"step": 4, "num_tokens": 9, "world_size": 1, "files": {"model/a": 3}})
def checkpoint(data, folder):
    """state.json of a checkpoint."""
    (folder / "checkpoint-4/model").mkdir(parents=True, exist_ok=True)
    put(folder / "checkpoint-4", "state.json", data)
    put(folder / "checkpoint-4/model", "a", b"abc")
    state = t.newest_checkpoint(folder)[1]
    assert all(type(state[key]) is int for key in ("step", "num_tokens", "world_size"))


MODEL = ROOT / "tests/toy/base"
PLANNED = t.meta_model(MODEL)


@target("json", (ROOT / "ds_config.json").read_bytes())
def engine_config(data, folder):
    path = put(folder, "ds_config.json", data)
    stage = t.engine_settings(path)["zero_optimization"]["stage"]
    args = ["--model", str(MODEL), "--data", "x", "--output_dir", "x", "--deepspeed", str(path)]
    t.plan_memory(PLANNED, t.parse_args(args), 8, stage, True)


IMAGES = [data for data, _ in ODD_IMAGES.values()]
IMAGES += [encoded(halves(), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")]


@target("bytes", *IMAGES)
def images(data, folder):
    path = put(folder, "spoilt.png", data)
    for image in (data, str(path)):
        for read in (t.load_image, e.image_size, lambda i: t.resized_size(PROCESSOR, i)):
            with refusals():
                read(image)
    with contextlib.suppress(*s.UNREADABLE):
        s.difference_hash(s.decode_image(data))
    assert c.image_url(path, 500).startswith("data:image/")


PROCESSOR = SimpleNamespace(patch_size=14, merge_size=2, size={"shortest_edge": 3136, "longest_edge": 401408})


def with_model(data, folder, name, check):
    """A copy of the toy's model with one other file."""
    model = folder / "model"
    if not model.exists():
        shutil.copytree(MODEL, model)
    kept = (model / name).read_bytes() if (model / name).exists() else None
    put(model, name, data)
    try:
        check(model)
    finally:
        put(model, name, kept) if kept is not None else (model / name).unlink()


def load(model):
    tokenizer, image_processor = t.load_processors(model, 401408)
    t.chat_inputs(tokenizer, image_processor, PNG, QUESTION, STYLES[0])


MODEL_FILES = {
    "config.json": t.check_model,
    "preprocessor_config.json": load,
    "tokenizer_config.json": load,
    "tokenizer.json": load,
    "chat_template.jinja": load,
    "model.safetensors": t.check_weights,
    "model.safetensors.index.json": t.check_weights,
}
VALID = {name: (MODEL / name).read_bytes() for name in list(MODEL_FILES)[:5]}
HEADER = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
VALID["model.safetensors"] = len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)
VALID["model.safetensors.index.json"] = b'{"weight_map": {"a": "model.safetensors"}}'
for name, read in MODEL_FILES.items():
    kind = {".json": "json", ".jinja": "text"}.get(Path(name).suffix, "bytes")
    TARGETS[name] = (kind, [VALID[name]], partial(with_model, name=name, check=read))


# ---- the run ----
class Hang(BaseException):
    """Raised into an input that takes too long; no `except` of the scripts may take it."""


def check_refusal(stopped):
    """A refusal is one short line that says what is wanted."""
    text = stopped.code
    sound = isinstance(text, str) and len(text.splitlines()) == 1 and len(text) <= LONGEST and "want " in text
    assert sound, repr(text)[:2000]


@contextlib.contextmanager
def refusals():
    """Lets a target go on to its next reader."""
    try:
        yield
    except SystemExit as stopped:
        check_refusal(stopped)


@contextlib.contextmanager
def workplace():
    """An empty run folder with one image, below a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as base:
        folder = Path(base).resolve() / "run"
        (folder / "images").mkdir(parents=True)
        put(folder, "a.png", PNG)
        yield folder


def attempt(function, data, folder):
    """("accepted", "refused" or the exception, lines of the scripts that ran)"""
    ran = set()

    def line(frame, event, _):
        ran.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def late(*_):
        raise Hang(f"no end after {HANG_SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename in SCRIPTS else None)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            function(data, folder)
        result = "accepted"
    except SystemExit as stopped:
        result = "refused"
        try:
            check_refusal(stopped)
        except AssertionError as wrong:
            result = wrong.with_traceback(stopped.__traceback__)
    except (Exception, Hang) as wrong:  # noqa: BLE001 - what no target may raise is what is looked for
        result = wrong
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.settrace(None)
        gc.enable()  # check_model turns it off
    return result, ran


def place(wrong):
    """Type and innermost line of the scripts or of this file: crashes that share it count as one."""
    frames = [x for x in traceback.extract_tb(wrong.__traceback__) if x.filename in SCRIPTS | {__file__}]
    at = f"{Path(frames[-1].filename).stem}-{frames[-1].name}-{frames[-1].lineno}" if frames else "elsewhere"
    return f"{type(wrong).__name__}-{at}"


def fuzz(seconds, seed, crashes, only=None):
    """Runs all targets; returns {target: counts}. Crashing inputs are saved in the folder `crashes`, one per place."""
    warnings.simplefilter("ignore")
    chosen = {name: TARGETS[name] for name in only or TARGETS}
    counts = {name: dict(inputs=0, accepted=0, refused=0, crashes=0, kept=0, seconds=0.0) for name in chosen}
    corpora, seen, met = {name: list(seeds) for name, (_, seeds, _) in chosen.items()}, set(), set()
    with workplace() as folder:
        end = time.time() + seconds
        while time.time() < end or not all(count["inputs"] for count in counts.values()):
            name = min(counts, key=lambda name: counts[name]["seconds"])
            (kind, seeds, function), count, corpus = chosen[name], counts[name], corpora[name]
            number = count["inputs"]
            rng = random.Random(f"{seed}:{name}:{number}")
            began = time.time()
            data = seeds[number] if number < len(seeds) else spoil(kind, rng, corpus)
            result, ran = attempt(function, data, folder)
            count["seconds"] += time.time() - began
            count["inputs"] += 1
            if new := {(name, *at) for at in ran} - seen:
                seen |= new
                count["kept"] += number >= len(seeds)
                corpus.append(data)
            if isinstance(result, str):
                count[result] += 1
                continue
            count["crashes"] += 1
            if (name, place(result)) not in met:
                met.add((name, place(result)))
                crashes.mkdir(parents=True, exist_ok=True)
                path = put(crashes, f"{name}-{place(result)}-{hashlib.md5(data).hexdigest()[:6]}.bin", data)
                found = f"{type(result).__name__}: {str(result)[:300]}"
                print(f"crash: {name}, input {number} of seed {seed}: {ascii(found)}\n  saved: {path}", flush=True)
    return counts


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--minutes", type=float, default=30)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--targets", nargs="+", choices=TARGETS, metavar="NAME", help=f"of {', '.join(TARGETS)}")
    p.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"), help="folder for inputs that crash")
    p.add_argument("--replay", type=Path, help="one saved input; its name begins with its target's")
    args = p.parse_args()
    if args.replay:
        with workplace() as folder:
            TARGETS[args.replay.name.split("-")[0]][2](args.replay.read_bytes(), folder)
        return
    sys.stdout = os.fdopen(os.dup(1), "w")
    faulthandler.enable(sys.stdout)
    for stream in (1, 2):  # libtiff, tokenizers and others write there
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    counts = fuzz(60 * args.minutes, args.seed, args.crashes, args.targets)
    columns = ("inputs", "accepted", "refused", "kept", "crashes", "seconds")
    print(f"{'target':18}" + "".join(f"{name:>10}" for name in columns))
    total = {name: sum(count[name] for count in counts.values()) for name in columns}
    for name, count in (*counts.items(), ("all", total)):
        print(f"{name:18}" + "".join(f"{count[key]:10.0f}" for key in columns))
    print(f"fuzz: {total['inputs']} inputs, {total['crashes']} crashes; seed {args.seed}, {args.minutes:g} min")
    sys.exit(total["crashes"] > 0)


if __name__ == "__main__":
    main()
