"""eval_kvg.py: what a run asks and writes, how it goes on, its scores to the digit and as the released evaluator's."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TWO_RANKS, run_script, start_script
from PIL import Image
from test_synth_data import write

import eval_kvg as e

BASE = ROOT / "tests/toy/base"  # writes boxes: right ones for descriptions, for names now and then
SEEN = ("--seen", "disc", "square", "triangle", "diamond", "cross")
BOX = "<|box_start|>({},{}),({},{})<|box_end|>"

def answered(box, name="it"):
    return f"<think>I look.</think> <answer><|object_ref_start|>{name}<|object_ref_end|>{BOX.format(*box)}</answer>"

def run(*flags):
    out, printed = Path(flags[flags.index("--out") + 1]), io.StringIO()
    with mock.patch.object(sys, "argv", ["eval_kvg.py", *map(str, flags)]), mock.patch.dict(os.environ):
        try:
            with contextlib.redirect_stdout(printed):
                e.main()
        finally:
            if e.dist.is_initialized():
                e.dist.destroy_process_group()
    return e.read_jsonl(out / "predictions.jsonl"), json.loads((out / "metrics.json").read_text()), printed.getvalue()

@pytest.fixture
def says(monkeypatch, tiny_dir):
    """Runs main() with a model that answers say(what it is asked): run()'s three, and all that it was asked."""
    def start(say, *flags, trained=None):
        asked = []
        def rollout(model, tokenizer, prompts, seeds, *limits):
            turns = [tokenizer.decode(p["prompt_ids"]).split("<|vision_end|>")[1] for p in prompts]
            asked.extend(texts := [turn.split("<|im_end|>")[0] for turn in turns])
            return [[(tokenizer.encode(say(text)), None, True)] * len(seeds[0]) for text in texts]
        monkeypatch.setattr(e, "load_model", lambda *_: SimpleNamespace(config=SimpleNamespace(prompt_suffix=trained)))
        monkeypatch.setattr(e, "rollout", rollout)
        return *run("--model", tiny_dir, *flags), asked
    return start

@pytest.fixture(scope="module")
def few(world_dir, tmp_path_factory):
    bench = pq.read_table(world_dir / "kvg-bench.parquet")  # 28 questions on 14 pictures of 7 categories
    pq.write_table(bench.slice(0, 6), path := tmp_path_factory.mktemp("few") / "six.parquet")
    return path

@pytest.fixture(scope="module")
def greedy(world_dir, tmp_path_factory):
    out, bench = tmp_path_factory.mktemp("greedy"), world_dir / "kvg-bench.parquet"
    flags = ("--bench", bench, "--model", BASE, "--prompt", "direct", "--max_completion_length", 32, *SEEN)
    run(*flags, "--out", out, "--batch_size", 64)
    return out, flags

def test_answers_stand_in_the_order_of_the_bench_and_do_not_depend_on_the_batch(greedy, few, tmp_path):
    rows, metrics = e.read_jsonl(greedy[0] / "predictions.jsonl"), json.loads((greedy[0] / "metrics.json").read_text())
    assert run(*greedy[1], "--bench", few, "--out", tmp_path, "--batch_size", 1)[0] == rows[:6]
    assert [r["question_id"] for r in rows] == pq.read_table(greedy[1][1])["question_id"].to_pylist()
    assert len({r["response"] for r in rows}) > 20 and 1 < sum(r["correct"] for r in rows) < 27
    tokens, cut = sum(r["num_tokens"] for r in rows), sum(not r["finished"] for r in rows)
    assert (metrics["completions/num_tokens"], metrics["completions/num_clipped"]) == (tokens, cut)
    assert metrics["all"]["parse_rate"] == 1 and len({r["image_id"] for r in rows}) == 14

def test_a_run_killed_in_the_middle_of_a_line_goes_on_with_two_ranks_to_the_same_bytes(greedy, tmp_path):
    out, part, flags = tmp_path / "out", tmp_path / "out/part-0.jsonl", (*greedy[1], "--out", tmp_path / "out")
    (process,) = start_script("eval_kvg.py", *flags, "--batch_size", 1, log=tmp_path / "log")
    while process.is_alive() and not (part.exists() and part.stat().st_size):
        time.sleep(0.002)
    process.kill()
    process.join()
    done = part.read_text(encoding="utf-8").count("\n")
    assert 0 < done < 28
    with open(part, "a", encoding="utf-8") as f:
        f.write('{"question_id": "disc/0')
    resumed = run_script("eval_kvg.py", *flags, "--batch_size", 2, launcher=TWO_RANKS)
    assert f"{done} answered before, 2 ranks" in resumed.stdout
    assert (out / "predictions.jsonl").read_bytes() == (greedy[0] / "predictions.jsonl").read_bytes()
    got, want = (json.loads((folder / "metrics.json").read_text()) for folder in (out, greedy[0]))
    assert got | {"args": 0} == want | {"args": 0} and not [*out.glob("part-*")]

def test_samples_follow_from_seed_question_and_number_alone_so_they_are_the_same_in_other_batches(few, tmp_path):
    pq.write_table(pq.read_table(few).slice(2, 2), tmp_path / "two.parquet")
    ask = ("--model", BASE, "--num_samples", 3, "--temperature", 1, "--prompt", "direct", "--max_completion_length", 32)
    rows, metrics, _ = run("--bench", few, *ask, "--out", tmp_path / "a")
    assert run("--bench", tmp_path / "two.parquet", *ask, "--out", tmp_path / "b", "--batch_size", 4)[0] == rows[6:12]
    assert [r["sample"] for r in rows] == [0, 1, 2] * 6 and metrics["all"]["n"] == 18
    assert any(len({r["response"] for r in rows[i : i + 3]}) == 3 for i in range(0, 18, 3))
    assert run("--bench", few, *ask, "--out", tmp_path / "c", "--seed", 1)[0] != rows

def test_a_finished_run_is_scored_again_without_asking_and_what_would_mix_is_refused(greedy, tmp_path, monkeypatch):
    monkeypatch.setattr(e, "load_model", None)
    out = shutil.copytree(greedy[0], tmp_path / "out")
    old, flags = json.loads((out / "metrics.json").read_text()), (*greedy[1][: -len(SEEN)], "--out", out)
    more = ("--batch_size", 3, "--max_bad_rows", 9)
    _, metrics, printed = run(*flags, *more, "--seen", "Star", "bowl")
    assert "28 answered before" in printed and metrics["seen"] == old["unseen"] and metrics["unseen"] == old["seen"]
    for change in ("--prompt cot", "--seed 1", "--num_samples 2 --temperature 1", "--model elsewhere"):
        with pytest.raises(e.InputError, match=rf"run.json: .*'{change.split()[0][2:]}': .*; want the same settings"):
            run(*flags, *change.split())
    assert (out / "predictions.jsonl").read_bytes() == (greedy[0] / "predictions.jsonl").read_bytes()

def test_a_model_trained_again_at_its_path_is_another_model(says, few, tiny_dir, tmp_path):
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    flags = ("--bench", few, "--out", tmp_path / "out", "--model", model)
    assert [len(says(lambda text: "no", *flags)[3]) for _ in range(2)] == [6, 0]
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(e.InputError, match="'files': .*model.safetensors"):
        says(lambda text: "no", *flags)

def test_what_follows_a_question_is_the_prompts_or_prompt_suffix(says, tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    options = {"image": "a.png", "question": "Which?\nA. Lo\nB. Mi", "options": ["Lo", "Mi"], "answer": "Mi"}
    path, letter = write(tmp_path / "s", [{"image": "a.png", "question": "?"}, options]), ("(bounding box)", "(letter)")
    for out, prompt, *more in (("a", "r1", e.R1_SUFFIX, e.R1_SUFFIX.replace(*letter)), ("b", "direct", "", ""),
                               ("c", "json", ", output its bbox coordinates using JSON format.", ""),
                               ("d", "direct --prompt_suffix Why", "Why", "Why")):  # fmt: skip
        flags = ("--bench", path, "--out", tmp_path / out, "--prompt", *prompt.split())
        _, _, printed, asked = says(lambda text: "no", *flags, trained=e.R1_SUFFIX)
        assert asked == ["?" + more[0], options["question"] + more[1]] and ("note: " in printed) == (prompt != "r1")

def test_options_are_scored_and_rows_without_a_truth_are_asked_alone(says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (56, 56), "red").save("a.png")
    base = {"image": "a.png", "question": "Which?\nA. Lo\nB. Mi", "options": ["Lo", "Mi"], "category": "Car"}
    rows = [base | {"answer": "Mi"}, base | {"answer": "Lo"}, base | {"answer": "Mi", "question": "By name?"},
            base, {"image": "a.png", "question": "Where?"}, {"image": "a.png", "phrase": "Lo"}]  # fmt: skip
    flags = ("--bench", write(Path("s.jsonl"), rows), "--out", "out", "--prompt", "direct")
    texts = {"Which": "B.", "By na": "mi", "Where": "left", "Find ": "(1,2),(3,4)"}
    rows, metrics, *_ = says(lambda text: texts[text[:5]], *flags)
    assert [r["correct"] for r in rows] == [True, False, True, None, None, None]
    assert [(r["choice"], r["answer"]) for r in rows[:4]] == [("Mi", "Mi"), ("Mi", "Lo"), ("Mi", "Mi"), ("Mi", "")]
    assert [r["pred_bbox_1000"] for r in rows[4:]] == [None, [1, 2, 3, 4]]
    want = {"n": 3, "acc": 2 / 3, "acc_ci95": None, "parse_rate": 1, "chance": 0.5}  # of boxes nothing
    assert metrics["all"] == metrics["seen"] == metrics["categories"]["car"] == want

def test_a_choice_is_read_strictly_from_where_it_belongs():
    options, think = ["Lo", "Mi", "Audi A4", "E. coli"], "<think>A</think> "
    found = {"B": "Mi", "mi.": "Mi", "E. coli.": "E. coli", "B. Mi": "Mi", think + "<answer>(C)</answer>": "Audi A4"}
    found |= dict.fromkeys(("It is Mi", "Mi or Lo", "", "B. Lo", "b", "E", "A B"))
    assert {text: e.parse_choice(text, options, "direct") for text in found} == found
    for text in ("B", think, "<answer>B", "<answer>A</answer><answer>B</answer>", "<think><answer>B</answer>"):
        assert e.parse_choice(text, options, "r1") is None, text
    assert e.parse_choice(think + "<answer> Mi </answer>", options, "r1") == "Mi"
    assert e.parse_choice("B", ["B", "Mi"], "direct") is None, "the letter of one option, the name of another"

NAMES = ["Porsche 911 (901, 930, 964, 993)", "Clumber Spaniel\n", 'E. "coli"', "Größe {0}"]

def test_own_pictures_go_through_without_a_conversion(says, tmp_path):
    """Absolute, relative and linked paths; one photo that its EXIF turns; boxes in px, one of them 1 px too wide."""
    pictures, rows, truth = tmp_path / "pictures", [], {}
    (tmp_path / "disk/in").mkdir(parents=True)
    pictures.symlink_to(tmp_path / "disk")
    (exif := Image.Exif())[0x0112] = 6
    for i, name in enumerate(NAMES):
        w, h, image = 100 + 7 * i, 150 - 5 * i, pictures / f"in/{i}.jpg"
        Image.new("RGB", (h, w) if i == 1 else (w, h)).save(image, exif=exif if i == 1 else b"")
        box = {"bbox_px": [w / 4, 10, w + (i == 3), h / 2]}
        rows.append(box | {"image": f"in/{i}.jpg" if i % 2 else str(image), "phrase": name})
        truth[name.strip()] = [250, 10000 / h, 1000, 500]
    flags = ("--bench", write(tmp_path / "own.jsonl", rows), "--image_root", pictures, "--out", tmp_path / "out")
    rows, metrics, _, asked = says(lambda text: answered(map(round, truth[text.split("<|")[1][18:]])), *flags)
    assert asked == [e.QUESTION.format(n) + e.R1_SUFFIX for n in truth] and [r["entity"] for r in rows] == [*truth]
    assert [r["question_id"] for r in rows] == ["1", "2", "3", "4"] and metrics["all"]["acc"] == 1
    assert [r["image"] for r in rows] == [str(pictures / f"in/{i}.jpg") for i in range(4)]
    assert all(r["gt_bbox_1000"] == pytest.approx(truth[r["entity"]]) and r["iou"] > 0.98 for r in rows)

def test_max_bad_rows_leaves_out_a_corrupt_image_and_a_bad_row_and_raising_it_is_no_other_run(says, few, tmp_path):
    rows = pq.read_table(few).to_pylist()
    for i, r in enumerate(rows):
        (tmp_path / f"{i}.png").write_bytes(r["image"]["bytes"][: 999 if i == 2 else None])
        r |= {"image": {"bytes": None, "path": str(tmp_path / f"{i}.png" if i % 2 else f"{i}.png")}}
    rows[4] |= {"answer": rows[4]["answer"].replace("(", "(1")}  # beyond 1000
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    ids, flags = [r["question_id"] for r in rows], ("--bench", tmp_path / "s.parquet", "--out", tmp_path / "out")
    with pytest.raises(e.InputError, match=rf"2 bad rows, .*s.parquet:5 \({ids[4]}\): .*; want .*max_bad_rows"):
        says(lambda text: answered((1, 2, 3, 4)), *flags, "--max_bad_rows", 1)
    got, metrics, *_ = says(lambda text: answered((1, 2, 3, 4)), *flags, "--max_bad_rows", 2)
    assert [r["question_id"] for r in got] == [ids[i] for i in (0, 1, 3, 5)] and metrics["all"]["n"] == 4
    assert len(metrics["bad_rows"]) == 2 and all(ids[i] in str(metrics["bad_rows"]) for i in (2, 4))

ROWS = [  # category, image, what the row has otherwise, answer; correct, IoU, right for the released evaluator
    ("disc", "A", {}, "<answer>[0, 0, 20, 10]</answer>", True, 1, False),  # in px of 40 x 20, of which it knows nothing
    ("disc", "A", {}, answered((0, 0, 250, 500)), True, 0.5, True),
    ("disc", "B", {}, answered((0, 0, 249, 500)), False, 0.498, False),
    ("star", "C", {}, "no box", False, 0, False),
    ("star", "D", {}, "It is (0,0),(500,500)", False, 0, True),
    ("star", "D", {"answer": None}, answered((0, 0, 500, 500)), None, None, None),
    ("star", "E", {"options": ["Lo", "Mi", "Zo", "Ra"], "answer": "Zo"}, "<answer>C</answer>", True, None, None),
]

def test_scores_equal_those_worked_out_by_hand(tmp_path):
    """Of answers in another order, by a copy of the script in a folder without any other file of the project."""
    shutil.copy(ROOT / "eval_kvg.py", tmp_path)
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    base = {"image": "a.png", "question": "Where?", "answer": BOX.format(0, 0, 500, 500)}
    bench = [base | {"id": f"q{i}", "category": r[0].title(), "image_id": r[1]} | r[2] for i, r in enumerate(ROWS)]
    answers = [{"question_id": f"q{i}", "response": r[3], "grid": [1000, 1000]} for i, r in enumerate(ROWS)]
    answers[0] |= {"grid": [40, 20]}
    write(tmp_path / "b.jsonl", bench), write(tmp_path / "p.jsonl", answers[::-1])
    command = [sys.executable, *"eval_kvg.py --bench b.jsonl --predictions p.jsonl --out . --seen Disc".split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, metrics = e.read_jsonl(tmp_path / "predictions.jsonl"), json.loads((tmp_path / "metrics.json").read_text())
    got = [(r["correct"], r.get("iou"), r["official_iou"] >= 0.5 if "iou" in r else None) for r in rows]
    assert got == [r[4:] for r in ROWS] and rows[0]["pred_bbox_1000"] == rows[5]["pred_bbox_1000"] == [0, 0, 500, 500]
    seen = {"n": 3, "acc": 2 / 3, "parse_rate": 1, "acc_official": 1 / 3, "mean_iou": 1.998 / 3}
    unseen = {"n": 3, "acc": 1 / 3, "parse_rate": 1 / 3, "acc_official": 1 / 2, "mean_iou": 0, "chance": 0.25}
    whole = {"n": 6, "acc": 1 / 2, "parse_rate": 4 / 6, "acc_official": 2 / 5, "mean_iou": 1.998 / 5, "chance": 0.25}
    for m, want in zip((metrics["all"], metrics["seen"], metrics["unseen"]), (whole, seen, unseen), strict=True):
        low, high = m.pop("acc_ci95")
        assert m == pytest.approx(want, abs=1e-12) and 0 <= low < want["acc"] < high <= 1

@pytest.mark.parametrize("a, b, want", [((0, 0, 4, 3), (2, 1, 6, 5), 4 / 24), ((0, 0, 9, 2), (1, 0, 3, 1), 2 / 18),
    ((0, 0, 2, 2), (2, 0, 4, 2), 0), ((0, 0, 2, 2), (5, 5, 7, 7), 0), ((1, 2, 5, 9), (1, 2, 5, 9), 1)])  # fmt: skip
def test_the_iou_is_a_pixel_count(a, b, want):
    assert e.box_iou(a, b) == pytest.approx(want) == e.official_iou(str([*a]), b)

def test_the_official_score_equals_the_released_evaluators_in_all_500_stored_cases():
    """It was given special tokens as text, which its own inference drops, as `official_iou` does: no tokens here."""
    cases = e.read_jsonl(ROOT / "tests/official_cases.jsonl")
    for case in cases:
        text, want = case["response"].replace("<|", "<").replace("|>", ">"), case["official"]
        iou = e.official_iou(text, case["gt_bbox_1000"])
        assert (iou, iou >= 0.5) == (want["iou"], want["correct"]), case
    assert len(cases) == 500 and {case["official"]["pattern"] for case in cases} == {*range(9)}, "all, and none"
    assert e.official_iou("(1, 2), it is" + answered((324, 255, 697, 658)), [324, 255, 697, 658]) == 1

def test_an_answer_that_loops_does_not_stall_the_scores():
    for loop in ("<answer>(1,2),", "So the answer is (1,2),(3,", "((((", "[[[[", "[1, 2, ", "(1,2)  "):
        start, text = time.process_time(), loop * (4000 // len(loop))
        e.official_iou(text, [0, 0, 1, 1])
        assert e.parse_bbox(25 * text) is None and e.parse_bbox(f"<answer>{25 * text}</answer>") is None
        assert time.process_time() - start < 3, loop

@pytest.mark.parametrize("images, questions, accuracy", [(531, 1336, 0.62), (33, 83, 0.87)])  # all of KVG-Bench; food
def test_the_interval_of_an_accuracy_covers_the_truth(images, questions, accuracy):
    """Of 1000 benches on which images, of one to six questions, have accuracies of their own: correlation 0.2."""
    rng, sizes = np.random.default_rng(0), np.ones(images, int)
    while (missing := questions - sizes.sum()) > 0:
        sizes[rng.permutation(np.flatnonzero(sizes < 6))[:missing]] += rng.integers(0, 2)
    image, held = np.repeat(np.arange(images), sizes), 0
    for own in rng.beta(4 * accuracy, 4 * (1 - accuracy), (1000, images)):
        low, high = e.accuracy_interval((rng.random(questions) < own[image]).astype(float), image)
        held += low <= accuracy <= high
    assert 930 <= held <= 970

def test_intervals_at_the_edges():
    images, twice, interval = np.arange(20), np.repeat(np.arange(20), 2), e.accuracy_interval
    low, high = interval([1.0] * 20, images)
    assert 0.8 < low < 0.9 and high == 1 and interval([0.0] * 20, images) == pytest.approx([0, 1 - low])
    assert interval([1.0] * 40, twice) == [low, 1], "all right: an image counts once"
    assert interval([1.0, 0.0], ["one", "one"]) is None
    # 3 right of 12: Wilson's with Student's t of 11 degrees of freedom, 2.199 by its series; 40 of 100: 1.984
    assert interval([1.0] * 3 + [0.0] * 9, np.arange(12)) == pytest.approx((0.07517845, 0.57749819), abs=1e-8)
    assert interval([1.0] * 40 + [0.0] * 60, np.arange(100)) == pytest.approx((0.30793903, 0.49971050), abs=1e-8)
    values = np.repeat(np.tile([0.0, 1.0], 10), 2)  # two equal answers on each image tell as much as one
    assert np.ptp(interval(values, twice)) == pytest.approx(2**0.5 * np.ptp(interval(values, np.arange(40))), rel=0.08)
