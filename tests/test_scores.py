"""Parser, released evaluator, intervals: against hostile text, a stored run of the released file, simulated benches."""

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_kvg as e

STORED = Path(__file__).with_name("official_cases.jsonl")
GRID = (1000, 1000)


# ---- the strict parser ----
def spellings(box):
    """Every notation of four number texts, without spaces."""
    x1, y1, x2, y2 = box
    return f"({x1},{y1}),({x2},{y2})", f"({x1},{y1},{x2},{y2})", f"[{x1},{y1},{x2},{y2}]"


def stands_in(text, box):
    """Whether some notation of the box is in the text letter by letter; written without the parser's patterns."""
    text = "".join(text.split())
    runs = {r for r in "".join(c if c in "0123456789." else " " for c in text).split() if r[0] != "." != r[-1]}
    texts = [[r for r in runs if r.count(".") < 2 and float(r) == v] for v in box]
    return any(s in text for numbers in itertools.product(*texts) for s in spellings(numbers))


NUMBER = st.one_of(
    st.integers(0, 1000).map(str),
    st.floats(0, 1000).map(lambda v: f"{v:.3f}"),
    st.sampled_from(["0", "1000", "1001", "-3", "007", "1e3", ".5", "5.", "1.2.3", "9" * 400, "٣", "１２", "²", "1_0"]),
)
BOX = st.tuples(*4 * [NUMBER]).flatmap(lambda b: st.sampled_from(spellings(b)))
SOUND = st.tuples(*2 * [st.integers(0, 499)], *2 * [st.integers(500, 1000)]).flatmap(
    lambda b: st.sampled_from(spellings(b))
)
PART = st.one_of(
    BOX,
    SOUND,
    NUMBER,
    st.sampled_from("<answer> </answer> <answer </answer <Answer> <think> </think> <|box_start|> <|box_end|>".split()),
    st.sampled_from([*"()[],.-{} \n\t\u00a0\x00\ud800", "[[", "]]", '{"bbox_2d": ', '"bbox":', "in 1999 (about 20)"]),
    st.text(max_size=8),
    st.sampled_from(["(", "[1,", "(1,2),", " ", "7", "<answer>", "(1,2)" + " " * 99]).map(lambda s: s * 300),
)
TEXT = st.lists(PART, max_size=8).map("".join)
RESPONSE = st.one_of(TEXT, TEXT.map(lambda t: f"<think>so</think> <answer>{t}</answer>"))


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(RESPONSE, st.sampled_from(sorted(e.EVAL_PROMPTS)))
def test_no_response_breaks_the_parser_or_makes_it_invent_a_box(text, mode):
    box = e.parse_bbox(text, mode)
    e.official_difference(text[:2000], mode, GRID)  # its patterns take the square of the length
    if box is None:
        return
    region = text
    if mode == "r1" or "<answer>" in text:
        assert text.count("<answer>") == text.count("</answer>") == 1
        region = text[text.index("<answer>") + 8 : text.index("</answer>")]
    assert 0 <= box[0] < box[2] <= 1000 and 0 <= box[1] < box[3] <= 1000
    assert stands_in(region, box)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_a_box_is_read_in_every_notation_with_spaces_and_line_breaks_anywhere(data):
    decimals = data.draw(st.sampled_from([0, 0, 1, 3, 15]))
    low, high = (data.draw(st.tuples(*2 * [st.floats(a, b)])) for a, b in ((0, 499), (501, 1000)))
    box = [f"{v:.{decimals}f}" for v in (*low, *high)]
    parts = re.findall(r"[0-9.]+|[^0-9.]", data.draw(st.sampled_from([*spellings(box), f"[{spellings(box)[2]}]"])))
    spaces = data.draw(st.lists(st.sampled_from(["", " ", "\n", " \n\t"]), min_size=len(parts), max_size=len(parts)))
    text = "".join(space + part for space, part in zip(spaces, parts, strict=True))
    frames = ("{}", "<|box_start|>{}<|box_end|>", '```json\n[{{"bbox_2d": {}, "label": "x"}}]```', '{{"bbox":{}}}',
              "{0} or, again, {0}", "2 of (3) in 1999: {}.")  # fmt: skip
    text = data.draw(st.sampled_from(frames)).format(text)
    assert e.parse_bbox(f"<think>(1,2),(3,4)</think><answer>{text}</answer>") == [float(v) for v in box]
    assert e.parse_bbox(text, "direct") == [float(v) for v in box]


@pytest.mark.parametrize("text", [
    "(1,2) (3,4)", "(1,2)(3,4)", "(1;2),(3;4)", "1,2,3,4", "[1,2],[3,4]", "[1,2,3]", "[1,2,3,4,5]", "(1,2)",
    "[-1,2,3,4]", "[3,2,1,4]", "[1,4,3,2]", "[1,2,1,4]", "[1,2,3,1000.001]", "[0.1,0.2,1e2,3]", "(1,2),(3,4),(5,6)",
    "[1,2,3,4] [5,6,7,8]", "[1,2,3,4٤]",
])  # fmt: skip
def test_what_is_not_exactly_one_sound_box_is_none(text):
    assert e.parse_bbox(f"<answer>{text}</answer>") is None and e.parse_bbox(text, "direct") is None


def test_a_coordinate_comes_back_as_it_was_written():
    """1.025582 * 1000 / 1000 is another number."""
    assert 1.025582 * 1000 / 1000 != 1.025582
    assert e.parse_bbox("<answer>[0,0,1.025582,1]</answer>") == [0, 0, 1.025582, 1]


def test_long_hostile_answers_end():
    """100 kB each; with `\\s*,?\\s*` between two points the spaces alone took time with the square of their number."""
    for part in ("(", "[", "(1,", "(1,2),", "[1,2,3,", "1", " ", "<answer>", "(1,2)" + " " * 99_990):
        long = part * (100_000 // len(part)) + "x"
        for text in (long, f"<answer>{long}</answer>"):
            assert e.parse_bbox(text) is None and e.parse_bbox(text, "direct") is None


def test_the_iou_of_a_case_is_a_pixel_count():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 40, (200, 2, 2, 2)) * [1, 1] + [[0, 0], [1, 1]], axis=2)
    for a, b in corners.reshape(200, 2, 4).tolist():
        if a[0] >= a[2] or a[1] >= a[3] or b[0] >= b[2] or b[1] >= b[3]:
            continue
        masks = np.zeros((2, 50, 50), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, (a, b), strict=True):
            mask[y1:y2, x1:x2] = True
        [row] = rows_of("<answer>({},{}),({},{})</answer>".format(*a), b)
        want = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
        assert math.isclose(row["iou"], want) and math.isclose(row["official_iou"], want, rel_tol=1e-6) or sum(a) < 4


def rows_of(text, truth, mode="r1", grid=None):
    sample = {"id": "a", "bbox_1000": truth, "category": "c", "entity": "e", "image_id": "i"}
    return e.score_answers([sample], {"a": {"response": text, "grid": grid}}, mode)


# ---- the released evaluator ----
def test_official_scores_equal_the_released_evaluator_in_all_stored_cases():
    """official_cases.jsonl is what the released file itself said; official_cases.py makes it."""
    patterns = Counter()
    for case in e.read_jsonl(STORED):
        want = case["official"]
        box, match, _ = e.official_box(case["response"])
        pattern = 1 + e.OFFICIAL_PATTERNS.index(match.re) if match else 0
        iou = e.official_iou(box, case["gt_bbox_1000"])
        assert ([repr(v) for v in box], pattern, iou) == (want["bbox"], want["pattern"], want["iou"]), case
        assert (iou >= e.CORRECT_IOU) == want["correct"], case
        patterns[pattern] += 1
    assert sum(patterns.values()) == 500 and len(patterns) == 9, "every pattern, and none, occurs"


@pytest.mark.parametrize("text, mode, reason", [
    ("<think>(10,20),(300,400)</think> <answer>left</answer>", "r1", "box outside <answer>"),
    ("<think>(10,20),(300,400) and then", "r1", "box outside <answer>"),
    ("<answer>(1,2),(3,4) </answer> (10,20),(300,400)", "direct", "box outside <answer>"),
    ("<answer>(10,20),(300,400)", "r1", "not one closed <answer>"),
    ("<answer>(1,2),(3,4) or (10,20),(300,400)</answer>", "r1", "two boxes, last one taken"),
    ("<answer>[0.01, 0.02, 0.3, 0.4]</answer>", "r1", "rescaled from 0..1"),
    ("<answer>(10,20.390),(300,400)</answer>", "r1", "decimals lost"),
    ("<answer>Bird (on the left) at [10, 20, 300, 400], (see it?), (a, b)</answer>", "r1", "numbers in prose"),
    ("<answer>[10,20,300,400]</answer>", "r1", "notation they do not read"),
    ("<answer>(10, 20) to (300, 400)</answer>", "r1", "notation we do not read"),
])  # fmt: skip
def test_every_difference_has_its_reason(text, mode, reason):
    [row] = rows_of(text, [10, 20, 300, 400], mode)
    assert row["correct"] != (row["official_iou"] >= 0.5) and row["official_difference"] == reason


def test_the_released_evaluator_sees_no_special_tokens_no_pixels_and_no_limit():
    text = (
        "<answer><|object_ref_start|>X<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|></answer> (1,2),(3,4)"
    )
    [row] = rows_of(text, [10, 20, 300, 400])
    assert row["official_bbox_1000"] == [10, 20, 300, 400] and row["official_iou"] == 1 and row["correct"]
    assert row["official_difference"] is None
    [row] = rows_of("<answer>[28, 28, 280, 280]</answer>", [50, 50, 500, 500], grid=[560, 560])
    assert row["correct"] and row["official_difference"] == "box in pixels"
    [row] = rows_of("<answer>(10,20),(300,1001)</answer>", [10, 20, 300, 1000])
    assert row["official_iou"] > 0.9 and row["official_difference"] == "number beyond 0..1000" and not row["correct"]
    assert rows_of("<answer>(nan, 1) (2, 3)</answer>", [1, 2, 3, 4])[0]["official_bbox_1000"] is None


def test_metrics_count_the_differences():
    texts = (
        ["<answer>(10,20),(300,400)</answer>"] + ["(10,20),(300,400)"] * 2 + ["<answer>[10,20,300,400]</answer>", "-"]
    )
    samples = [{"id": str(i), "bbox_1000": [10, 20, 300, 400], "category": "c", "entity": "e", "image_id": str(i)}
               for i in range(5)]  # fmt: skip
    rows = e.score_answers(samples, {str(i): {"response": t} for i, t in enumerate(texts)}, "r1")
    metrics = e.bench_metrics(rows, ["c"])
    assert (
        metrics["all"]["acc"] == 2 / 5
        and metrics["all"]["acc_official"] == 3 / 5 == metrics["categories"]["c"]["acc_official"]
    )
    assert metrics["official_differences"] == {"box outside <answer>": 2, "notation they do not read": 1}
    assert "| 40.0 |" in re.sub(" +", " ", e.metrics_table(metrics, ["c"])) and "official %" in e.metrics_table(
        metrics, ["c"]
    )
    assert "3 cases (2 box outside <answer>, 1 notation they do not read)" in e.closing_lines(metrics, None)


# ---- intervals ----
SIZES = {"all": (531, 1336), "unseen": (216, 544), "largest category": (100, 251), "smallest category": (33, 83)}


def simulated(images, questions, shares, overlap, count, seed=0):
    """`count` benches: (outcome of every question, its image). An outcome is drawn from its image's own shares.

    `overlap` is the correlation of two questions on one image; every image has one to six questions.
    """
    rng = np.random.default_rng(seed)
    sizes = np.ones(images, int)
    while (missing := questions - sizes.sum()) > 0:
        sizes[rng.permutation(np.flatnonzero(sizes < 6))[:missing]] += rng.integers(0, 2)
    image, shares = np.repeat(np.arange(images), sizes), np.array(shares)
    for _ in range(count):
        own = rng.dirichlet(shares * (1 / overlap - 1), images)
        yield (rng.random((questions, 1)) > own.cumsum(1)[image, :-1]).sum(1), image


@pytest.mark.parametrize("size, accuracy", [("all", 0.62), ("all", 0.95), ("unseen", 0.61), ("largest category", 0.41),
                                            ("smallest category", 0.6), ("smallest category", 0.87)])  # fmt: skip
def test_the_interval_of_an_accuracy_covers_the_truth(size, accuracy):
    held = [low <= accuracy <= high for outcome, image in simulated(*SIZES[size], (1 - accuracy, accuracy), 0.2, 1000)
            for low, high in [e.accuracy_interval(outcome == 1, image)]]  # fmt: skip
    assert 0.93 <= np.mean(held) <= 0.97, np.mean(held)


@pytest.mark.parametrize("size, only", [("all", (0.15, 0.10)), ("unseen", (0.10, 0.10)), ("unseen", (0.04, 0.10))])
def test_the_interval_of_a_difference_covers_the_truth(size, only):
    shares, truth = (*only, 1 - sum(only)), only[1] - only[0]
    held = [low <= truth <= high for outcome, image in simulated(*SIZES[size], shares, 0.2, 1000)
            for low, high in [e.difference_interval((outcome == 1) * 1.0 - (outcome == 0), image)]]  # fmt: skip
    assert 0.93 <= np.mean(held) <= 0.97, np.mean(held)


def test_intervals_at_the_edges():
    images = np.arange(20)
    low, high = e.accuracy_interval([1.0] * 20, images)
    assert 0.8 < low < 0.9 and high == 1.0
    assert e.accuracy_interval([0.0] * 20, images) == pytest.approx([0.0, 1 - low])
    assert e.accuracy_interval([1.0, 0.0] * 20, np.repeat(images, 2))[0] > 0.25, "as many as images, at least"
    assert e.difference_interval([0.0] * 20, images) == [0.0, 0.0]
    for interval in (e.accuracy_interval, e.difference_interval):
        assert interval([1.0, 0.0], ["one", "one"]) is None


def test_the_interval_of_independent_answers_is_wilsons():
    """40 right of 100, each on an image of its own: 0.309 to 0.498 by the formula with z = 1.96."""
    low, high = e.accuracy_interval([1.0] * 40 + [0.0] * 60, np.arange(100))
    assert (low, high) == pytest.approx((0.309, 0.498), abs=2e-3)


def test_two_questions_on_one_image_move_together():
    """40 images with two equal answers each tell as much as 40 answers, not 80: the interval is sqrt(2) wider."""
    values, pairs = np.repeat(np.tile([0.0, 1.0], 20), 2), np.repeat(np.arange(40), 2)
    for interval in (e.accuracy_interval, e.difference_interval):
        together, apart = interval(values, pairs), interval(values, np.arange(80))
        assert together[1] - together[0] == pytest.approx(2**0.5 * (apart[1] - apart[0]), rel=0.05)
        assert together[0] < values.mean() < together[1]


def test_a_run_compared_with_itself_differs_by_nothing(tmp_path):
    rows = [{"question_id": str(i), "image_id": str(i // 2), "category": "c", "gt_bbox_1000": [0, 0, 1, 1],
             "correct": i % 3 == 0} for i in range(40)]  # fmt: skip
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = e.compare_runs(tmp_path, tmp_path, ["c"])["all"]
    assert (result["difference"], result["difference_ci95"], result["mcnemar_p"]) == (0, [0, 0], 1)
