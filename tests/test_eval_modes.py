"""eval_kvg.py beyond the box: mastery, the knowledge-grounding gap, spoilt pictures, reasoning, FGVR, expressions."""

import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_script
from PIL import Image
from test_eval_kvg import SEEN, bench, box_answer, samples, write_rows  # noqa: F401  (fixtures)

import eval_kvg as e


def case(name, entity="Lo", category="bird", image="1.png", **changes):
    base = {"id": name, "image": image, "image_id": image, "question": "?", "answer": "", "bbox_1000": [0, 0, 500, 500]}
    return base | {"entity": entity, "category": category, "row": {}} | changes


def scored(entity, correct, image="i", **changes):
    base = {"question_id": entity, "entity": entity, "category": "bird", "image_id": image, "correct": correct}
    return base | {"iou": float(correct), "official_iou": float(correct), "pred_bbox_1000": [0, 0, 1, 1]} | changes


def test_flags_that_do_not_fit_are_refused_before_anything_is_read(monkeypatch):
    for flags, words in (
        (("--model", "m", "--task", "rec", "--gap"), "want --task kvg"),
        (("--model", "m", "--task", "fgvr", "--mastery", "x"), "want --task kvg"),
        (("--predictions", "p", "--gap"), "want --model"),
        (("--predictions", "p", "--corrupt", "blur"), "want --model"),
        (("--model", "m", "--task", "fgvr", "--prompt", "json"), "want r1 or direct"),
        (("--model", "m", "--corrupt_strength", "2"), "want both"),
    ):
        said = []
        monkeypatch.setattr(e.argparse.ArgumentParser, "error", lambda self, message, said=said: said.append(message))
        e.parse_args(["--bench", "b", "--out", "o", *flags])
        assert len(said) == 1 and words in said[0]
    assert e.parse_args(["--bench", "b", "--out", "o", "--model", "m", "--corrupt", "jpeg"]).corrupt_strength == 3


# ---- mastery ----
def test_known_and_unknown_follow_karls_split_and_the_unrated_stay_out(tmp_path):
    """Top 3 levels: A, B, C, with 2 of 4 right; bottom 2: D, E, with 1 of 2; X is in no level."""
    table = {"A": {"mastery": 0.7}, "B": {"knowledge_category": "mostly correct"}, "C": {"mastery": 0.3}}
    table |= {"D": {"mastery": 0.29}, "E": {"knowledge_category": "completely incorrect"}, "Z": {"mastery": 0}}
    (tmp_path / "m.json").write_text(json.dumps(table))
    right = [("A", 1), ("A", 0), ("B", 1), ("C", 0), ("D", 1), ("E", 0), ("X", 1), ("X", 1), ("x", 1)]
    rows = [scored(name, bool(hit), str(i)) for i, (name, hit) in enumerate(right)]
    m = e.mastery_metrics(rows, e.read_mastery(tmp_path / "m.json"))
    assert (m["high"]["n"], m["high"]["acc"], m["low"]["n"], m["low"]["acc"]) == (4, 0.5, 2, 0.5)
    assert (m["unrated"]["n"], m["unrated"]["acc"]) == (3, 1.0) and m["entities"] == {"high": 3, "low": 2, "unrated": 2}
    assert [m["levels"][level]["n"] for level in e.LEVELS] == [2, 1, 1, 1, 1]
    assert m["high"]["acc_ci95"][0] < 0.5 < m["high"]["acc_ci95"][1]
    text = e.mode_tables({"mastery": m})
    assert re.search(r"\| known \(top 3 levels\) \| +4 \| +50\.0 ", text) and re.search(r"\| unrated +\| +3 ", text)


def test_mastery_is_read_before_the_weights_and_stored_answers_serve_again(bench, samples, tmp_path):  # noqa: F811
    write_rows(
        tmp_path / "p.jsonl", [{"question_id": s["id"], "response": box_answer(s["bbox_1000"])} for s in samples]
    )
    flags = ("--bench", bench, "--predictions", tmp_path / "p.jsonl", "--out", tmp_path / "out", *SEEN)
    (tmp_path / "none.json").write_text('{"Nobody": {"mastery": 1}}')
    done = run_script("eval_kvg.py", *flags, "--mastery", tmp_path / "none.json", check=False)
    assert done.returncode == 1 and "no entity of" in done.stderr and len(done.stderr.splitlines()) == 1
    run_script("eval_kvg.py", *flags)
    known = {samples[0]["entity"]: {"mastery": 0.9}}
    (tmp_path / "one.json").write_text(json.dumps(known))
    done = run_script("eval_kvg.py", *flags, "--mastery", tmp_path / "one.json")
    m = json.loads((tmp_path / "out" / "metrics.json").read_text())["mastery"]
    n = sum(s["entity"] in known for s in samples)
    assert (m["high"]["n"], m["low"], m["unrated"]["n"]) == (n, None, 28 - n) and "| unrated" in done.stdout


# ---- the gap ----
def test_wrong_options_come_from_the_same_image_first():
    cases = [case("a", "A"), case("b", "B"), *(case(x.lower(), x, image="2.png") for x in "CDEFGH"),
             case("x", "X", category="car", image="3.png"), case("y", "Y", category="car", image="4.png")]  # fmt: skip
    drawn = {c["id"]: c for c in e.choice_cases(cases, 0)}
    assert {"A", "B"} <= set(drawn["a"]["options"]) and len(set(drawn["a"]["options"])) == 4
    assert set(drawn["a"]["options"]) <= set("ABCDEFGH") and set(drawn["c"]["options"]) <= set("CDEFGH")
    assert sorted(drawn["x"]["options"]) == ["X", "Y"]
    assert [c["options"] for c in e.choice_cases(cases[::-1], 0)][::-1] == [c["options"] for c in drawn.values()]
    others = [[c["options"] for c in e.choice_cases(cases, seed)] for seed in range(40)]
    places = [options[0].index("A") for options in others]
    assert others[0] != others[1] and {0, 1, 2, 3} == set(places)
    listed = case("s", "A", row={"entities": [{"entity": x} for x in "APQR"]})
    assert sorted(e.choice_cases([listed, *cases[2:]], 0)[0]["options"]) == ["A", "P", "Q", "R"]
    for lone, words in ((case("o", "O", category="dog", image="9"), "no other entity"), (case("o", None), "no name")):
        with pytest.raises(SystemExit, match=words):
            e.choice_cases([*cases, lone], 0)


def test_the_two_by_two_table_counts_every_case_once():
    pairs = [(1, 1)] * 3 + [(1, 0)] * 2 + [(0, 1)] + [(0, 0)] * 4  # choice, box
    rows = [scored(str(i), bool(box), category="bird" if i else "dog") for i, (_, box) in enumerate(pairs)]
    choices = [{"question_id": str(i), "correct": bool(c), "choice": "A" if i < 9 else None, "options": list("ABCD"),
                "image_id": str(i)} for i, (c, _) in enumerate(pairs)]  # fmt: skip
    gap = e.gap_metrics(rows, choices[::-1], ["bird"])
    assert [gap["all"][k]["n"] for k in e.GAP_CELLS] == [3, 2, 1, 4] and gap["all"]["choice_only"]["share"] == 0.2
    assert [gap["seen"][k]["n"] for k in e.GAP_CELLS] == [2, 2, 1, 4] and gap["unseen"]["both_right"]["n"] == 1
    assert (gap["all"]["choice"]["acc"], gap["all"]["choice"]["parse_rate"], gap["all"]["choice"]["chance"]) == (
        0.5, 0.9, 0.25)  # fmt: skip
    assert e.gap_metrics(rows, choices, ["bird", "dog"])["unseen"] is None
    assert "name no option" not in e.mode_tables({"gap": gap}), "9 of 10 do"
    gap["all"]["choice"]["parse_rate"] = 0.8
    assert "Many answers name no option" in e.mode_tables({"gap": gap})
    assert "3 (30.0 %)" in e.mode_tables({"gap": gap}) and "| unseen" in e.mode_tables({"gap": gap})


def test_the_marked_object_is_the_cut_out_box_and_the_prompt_asks_for_a_letter(tmp_path):
    picture = Image.new("RGB", (200, 100), "white")
    picture.paste((200, 0, 0), (100, 0, 200, 100))
    picture.save(tmp_path / "a.png")
    args = SimpleNamespace(corrupt=None, corrupt_strength=None, seed=0)
    whole = case("a", image=str(tmp_path / "a.png"), bbox_1000=[500, 0, 1000, 1000])
    assert e.case_picture(whole, args) == whole["image"], "a plain case is read as it is"
    cut = e.load_image(e.case_picture(whole | {"cut": True}, args))
    assert cut.size == (105, 100) and cut.getpixel((50, 50)) == (200, 0, 0)  # 5 % to the left, the rest is the border
    args = SimpleNamespace(corrupt="noise", corrupt_strength=5, seed=0)
    assert e.load_image(e.case_picture(whole | {"cut": True}, args)).size == (105, 100)
    assert e.load_image(e.case_picture(whole | {"cut": True}, args)).getpixel((50, 50)) != (200, 0, 0)
    shown = {(seed, name): e.case_picture(whole | {"id": name}, SimpleNamespace(**vars(args) | {"seed": seed}))
             for seed in (0, 1) for name in "ab"}  # fmt: skip
    assert len(set(shown.values())) == 4, "each seed and each case is spoilt in its own way"
    assert e.prompt_suffix("r1", False) == e.R1_SUFFIX and "(letter)" in e.prompt_suffix("r1", True)
    assert e.prompt_suffix("json", True) == e.prompt_suffix("direct", True) == "" and "JSON" in e.prompt_suffix(
        "json", 0
    )


OPTIONS = ["Lo", "Mi", "Audi A4", "E. coli"]


@pytest.mark.parametrize("text, mode, want", [
    ("B", "direct", "Mi"), ("mi.", "direct", "Mi"), ("E. coli.", "direct", "E. coli"), ("(C)", "direct", "Audi A4"),
    ("It is Mi", "direct", None), ("Mi or Lo", "direct", None), ("", "direct", None), ("B. Lo", "direct", None),
    ("<think>A</think> <answer>B</answer>", "r1", "Mi"), ("<think>A</think> <answer> Mi </answer>", "r1", "Mi"),
    ("<think>A</think> <answer>B</answer>", "direct", "Mi"),
    ("B", "r1", None), ("<think>B</think>", "r1", None), ("<answer>B", "r1", None), ("<answer></answer>", "r1", None),
    ("<answer>A</answer><answer>B</answer>", "r1", None), ("<think>or <answer>B</answer>", "r1", None),
])  # fmt: skip
def test_a_choice_is_read_strictly_from_where_it_belongs(text, mode, want):
    assert e.read_choice(text, OPTIONS, mode) == want


def test_a_letter_that_is_the_name_of_another_option_is_no_answer():
    assert e.read_choice("B", ["B", "Mi"], "direct") is None and e.read_choice("A", ["A", "Mi"], "direct") == "A"


@pytest.fixture
def in_process(monkeypatch, tiny_dir, bench):  # noqa: F811
    """Runs main() here, with a rollout that says what `say` (prompt text, case) returns; returns what it was asked."""
    answer_cases = e.answer_cases

    def run(say, out, *flags, task_bench=bench):
        asked, queue = [], []

        def noting(model, tokenizer, image_processor, style, cases, path, args):
            queue.extend(cases)
            answer_cases(model, tokenizer, image_processor, style, cases, path, args)

        def rollout(model, tokenizer, prompts, seeds, length, temperature, batch_size):
            assert temperature == 0
            texts = [
                tokenizer.decode(p["prompt_ids"]).split("<|vision_end|>")[1].split("<|im_end|>")[0] for p in prompts
            ]
            asked.extend((p["image_grid_thw"].tolist(), p["pixel_values"]) for p in prompts)
            return [[(say(text, queue.pop(0)), None, True)] for text in texts]

        monkeypatch.setattr(e, "answer_cases", noting)
        monkeypatch.setattr(e, "rollout", rollout)
        monkeypatch.setattr(e, "completion_text", lambda tokenizer, ids: ids)
        monkeypatch.setattr(e.sys, "argv", ["eval_kvg.py", *map(str, (
            "--bench", task_bench, "--model", tiny_dir, "--out", out, *flags))])  # fmt: skip
        e.main()
        return asked

    return run


def test_the_gap_is_asked_after_the_boxes_stored_and_not_asked_again(in_process, samples, tmp_path, capsys):  # noqa: F811
    """Says the true box of every other case, and A always; --gap is added to a finished run, then the seed changes."""
    wrong = {s["id"] for s in samples[::2]}

    def say(text, case):
        if "Which" in text:
            assert text == case["question"] + e.prompt_suffix("r1", True) and "(letter)" in text and "\nB. " in text
            return "<think>Hm.</think> <answer>A</answer>"
        assert text == case["question"] + e.R1_SUFFIX
        return box_answer((0, 0, 1, 1) if case["id"] in wrong else case["bbox_1000"])

    whole = in_process(say, tmp_path, *SEEN)
    cut = in_process(say, tmp_path, *SEEN, "--gap")
    assert len(whole) == len(cut) == 28 and "56 cases, 28 answered before" in capsys.readouterr().out
    assert all(np.prod(small) < np.prod(large) for (small, _), (large, _) in zip(cut, whole, strict=True))
    gap = json.loads((tmp_path / "metrics.json").read_text())["gap"]
    rows = e.read_jsonl(tmp_path / "choices.jsonl")
    right = [r["options"][0] == r["entity"] for r in rows]
    hit = [r["correct"] for r in e.read_jsonl(tmp_path / "predictions.jsonl")]
    assert [r["correct"] for r in rows] == right and 0 < sum(right) < 28 and 0 < sum(hit) < 28
    for k, cell in e.GAP_CELLS.items():
        assert gap["all"][k]["n"] == list(zip(right, hit, strict=True)).count(cell)
    assert "choice x box" in (tmp_path / "table.md").read_text() and not list(tmp_path.glob("*part*"))
    assert in_process(say, tmp_path, *SEEN, "--gap") == []
    again = in_process(say, tmp_path, *SEEN, "--gap", "--seed", 1)
    changed = sum(
        a["options"] != b["options"] for a, b in zip(rows, e.read_jsonl(tmp_path / "choices.jsonl"), strict=True)
    )
    assert len(again) == changed > 14, "answers to other options are not reused"


# ---- spoilt pictures ----
def photo(width=160, height=120):
    """Smooth shades with some edges, as PNG bytes."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([60 + x, 200 - y, 90 + 40 * np.sin(x / 9)], -1)
    pixels[30:70, 40:90] = (200, 60, 40)
    data = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def pixels_of(image):
    return np.asarray(e.load_image(image), dtype=float)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((pixels_of(a) - pixels_of(b)) ** 2))


@pytest.mark.parametrize("kind", list(e.CORRUPTIONS))
def test_a_spoilt_picture_depends_on_seed_and_case_keeps_its_size_and_gets_worse(kind):
    image = photo()
    levels = [psnr(image, e.corrupt(image, kind, s, "0:corrupt:a")) for s in range(1, 6)]
    assert levels == sorted(levels, reverse=True) and levels[0] > levels[4] + 6 and 20 < levels[0] < 50, levels
    spoilt = e.corrupt(image, kind, 3, "0:corrupt:a")
    assert spoilt == e.corrupt(image, kind, 3, "0:corrupt:a") and e.load_image(spoilt).size == (160, 120)
    other = [e.corrupt(image, kind, 3, seed) for seed in ("1:corrupt:a", "0:corrupt:b")]
    assert all((o == spoilt) == (kind in ("jpeg", "blur")) for o in other), "only these two draw nothing"


def test_each_kind_does_what_it_says():
    image = photo()
    plain = pixels_of(image)
    steps = np.abs(np.diff(pixels_of(e.corrupt(image, "jpeg", 5, "s")).mean(-1), axis=1)).mean(0)
    assert steps[7::8].mean() > 3 * np.delete(steps, slice(7, None, 8)).mean(), "jpeg: jumps between blocks of 8 px"
    noise = pixels_of(e.corrupt(image, "noise", 2, "s")) - plain
    assert (
        abs(noise.mean()) < 1
        and 14 < noise.std() < 17
        and abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.05
    )
    blurred = pixels_of(e.corrupt(image, "blur", 5, "s"))
    assert np.abs(np.diff(blurred, axis=1)).max() < 0.3 * np.abs(np.diff(plain, axis=1)).max()
    assert abs(blurred.mean() - plain.mean()) < 2
    ratio = (pixels_of(e.corrupt(image, "color", 3, "s")) / plain.clip(1)).mean((0, 1))
    assert ratio.min() < 0.75 and ratio.max() > 1.1, "color: one channel weaker, one stronger"
    for seed in "stuvwx":
        changed = (pixels_of(e.corrupt(image, "seams", 1, seed)) != plain).any(-1)
        assert changed.mean() < 0.1 and (changed.all(0).any() or changed.all(1).any()), (
            "seams: a line across, little else"
        )
    first, more = ((pixels_of(e.corrupt(image, "seams", s, "s")) != plain).any(-1) for s in (1, 5))
    assert more[first].mean() > 0.95, "a higher strength keeps the lines of a lower one"


def test_what_was_spoilt_is_part_of_the_run(in_process, tmp_path, samples):  # noqa: F811
    say = lambda text, case: "<think>Hm.</think> <answer>(1,2),(3,4)</answer>"  # noqa: E731
    plain = in_process(say, tmp_path / "plain", *SEEN)
    spoilt = in_process(say, tmp_path / "a", *SEEN, "--corrupt", "seams", "--corrupt_strength", 2)
    assert [grid for grid, _ in plain] == [grid for grid, _ in spoilt]
    changed = [bool((a != b).any()) for (_, a), (_, b) in zip(plain, spoilt, strict=True)]
    assert all(changed), "the model sees other pixels in every case"
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["corrupt"], config["corrupt_strength"], config["seed"]) == ("seams", 2, 0)
    truth = [r["gt_bbox_1000"] for r in e.read_jsonl(tmp_path / "a" / "predictions.jsonl")]
    assert (
        truth == [s["bbox_1000"] for s in samples]
        and "seams, strength 2" in (tmp_path / "a" / "report.html").read_text()
    )
    for flags in (("--corrupt_strength", 3), ("--corrupt_strength", 2, "--seed", 1)):
        with pytest.raises(SystemExit, match=f"{flags[-2]} was"):
            in_process(say, tmp_path / "a", *SEEN, "--corrupt", "seams", *flags)


# ---- reasoning ----
HERE, THERE = "(10,20),(300,400)", "(600,600),(900,900)"


def verdict(think, others=("Mi", "Lo 2", "E. coli"), entity="Lo", box=(10, 20, 300, 400), grid=None):
    row = {"response": f"<think>{think}</think> <answer>{HERE}</answer>", "pred_bbox_1000": box and list(box)}
    return e.contradicts(row | {"entity": entity, "grid": grid}, set(others))


@pytest.mark.parametrize("think, want", [
    (f"Mi is at {THERE}. Lo is red, so it is at {HERE}.", False),
    (f"Lo may be {HERE}. No: it is at {THERE}.", True),
    (f"It is at [10, 20, 300, 400], not {THERE[:9]}.", False),  # half a box is none
    ('So: {"bbox_2d": [600, 600, 900, 900]}', True), ("It is at ( 600 , 600 , 900.5 , 900 ).", True),
    (f"It is at {HERE}, from (900,900),(600,600).", False),  # the last is reversed: no box
    ("Lo is the red one. Mi is blue.\nConclusion: the red one.", False),
    (f"1. Lo {HERE}: red\n2. Mi {THERE}: blue\nConclusion: the first one.", False),
    (f"1. Lo {HERE}: red\n2. Mi {THERE}: blue\nConclusion: Mi.", True),
    ("Unlike Mi, which is blue, Lo is red. So the left one is Lo.", False),
    ("This could be Mi. It is red, so it is Lo.", False), ("The left one is Lo, the right one Mi.", False),
    ("I look for Lo. The left one is Mi.", True), ("I look for Lo. Hence it is mi.", True),
    ("The left one is Lo. It is not Mi.", False), ("The left one is Lo. It isn't a Mi.", False),
    ("The left one is not Lo but Mi.", True), ("The one is Lo, rather than Mi. It is red.", False),
    ("It is the <|object_ref_start|>Mi<|object_ref_end|>.", True), ("It is Lo vs. Mi, by colour.", False),
    ("I want Lo. It is Lo 2.", True), ("Mi? Minor marks. Lore. The red one.", True), ("Mine and Lo-like. Red.", False),
    ("I want Lo. It is E. coli. It is red.", True), ("It is red and round.", False), ("  \n ", None), ("", None),
])  # fmt: skip
def test_reasoning_contradicts_where_it_ends_elsewhere_than_the_answer(think, want):
    assert verdict(think) is want


def test_names_that_hold_other_names_are_told_apart():
    assert verdict("It is Lo 2.", others={"Lo"}, entity="Lo 2") is False
    assert verdict("I want Lo. So: E. coli", others={"E. coli"}) is True
    assert verdict("So: Mi", others=()) is False, "without other names the boxes alone are judged"


def test_no_reasoning_or_no_answer_is_no_verdict_and_boxes_are_on_the_models_grid():
    assert (
        e.contradicts({"response": HERE, "pred_bbox_1000": [10, 20, 300, 400], "entity": "Lo", "grid": None}, {"Mi"})
        is None
    )
    assert verdict("It is Mi.", box=None) is None
    assert verdict("at (5,5),(150,100)", grid=[500, 250]) is False and verdict("at (5,5),(150,100)") is True


def test_the_rates_are_told_among_correct_and_wrong_answers(samples):  # noqa: F811
    """Case 0 right and sound, 1 right but its reasoning names a neighbour, 2 wrong and sound, 3 without reasoning."""
    names = sorted({s["entity"] for s in samples if s["category"] == samples[1]["category"]} - {samples[1]["entity"]})
    texts = [box_answer(s["bbox_1000"]) for s in samples[:4]]
    texts[1] = texts[1].replace("I look.", f"So this is {names[0]}.")
    texts[2] = box_answer((0, 0, 1, 1))
    texts[3] = texts[3].split("</think>")[1]
    rows = e.score_answers(samples[:4], {s["id"]: {"response": t} for s, t in zip(samples, texts, strict=False)}, "r1")
    rows = e.judged_reasoning(rows, samples, names=True)
    assert [r["reasoning_contradicts"] for r in rows] == [False, True, False, None]
    metrics = e.reasoning_metrics(rows)
    told = {k: (m["n"], m["contradicts"]) for k, m in metrics.items()}
    assert told == {"all": (3, pytest.approx(1 / 3)), "correct": (2, 0.5), "wrong": (1, 0.0)}
    assert "50.0 % of 2 correct and 0.0 % of 1 wrong" in e.mode_tables({"reasoning": metrics})
    assert e.reasoning_metrics(rows[3:]) == {"all": None, "correct": None, "wrong": None}
    assert not any(r["reasoning_contradicts"] for r in e.judged_reasoning(rows, samples, names=False))


# ---- FGVR ----
def test_fgvr_from_a_folder_asks_among_entities_of_the_category(world_dir):
    cases = e.read_fgvr(world_dir / "train", 0)
    assert len(cases) == 120 and len({c["id"] for c in cases}) == 120 and cases == e.read_fgvr(world_dir / "train", 0)
    names = {k: {c["entity"] for c in cases if c["category"] == k} for k in {c["category"] for c in cases}}
    for c in cases:
        assert c["entity"] in c["options"] and len(set(c["options"])) == 4 and set(c["options"]) <= names[c["category"]]
        assert (
            c["id"] == f"{c['category']}/{c['entity']}/{c['id'].split('/')[-1]}"
            and f"\nA. {c['options'][0]}\n" in c["question"]
        )
    assert [c["options"] for c in cases] != [c["options"] for c in e.read_fgvr(world_dir / "train", 1)]


def test_fgvr_keeps_given_options_and_says_what_is_wrong(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    row = {"image": "a.png", "entity": "Lo", "category": "Dog"}
    (got,) = e.read_fgvr(write_rows(tmp_path / "b.jsonl", [row | {"options": ["Mi", "Lo"], "id": 7}]), 0)
    assert (got["options"], got["category"], got["id"]) == (["Mi", "Lo"], "dog", "7")
    for rows, words in (
        ([row], "want 2 to 4 different texts"),
        ([row | {"options": "Lo, Mi"}], "want 2 to 4 different texts"),
        ([row | {"options": ["Lo", 3]}], "want 2 to 4 different texts"),
        ([row | {"options": ["Mi", "Zo"]}], "'Lo' among them"),
        ([row | {"options": ["Lo", "Lo"]}], "different"),
        ([row | {"options": list("ABCD") + ["Lo"]}], "2 to 4"),
        ([row | {"image": "b.png", "options": ["Lo", "Mi"]}], "no such image"),
        ([row | {"options": ["Lo", "Mi"]}] * 2, "more than once"),
        ([{"image": "a.png", "entity": "Lo"}], "no column 'category'"),
    ):
        with pytest.raises(SystemExit, match=words) as error:
            e.read_fgvr(write_rows(tmp_path / "b.jsonl", rows), 0)
        assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="0 pictures"):
        e.read_fgvr(tmp_path / "empty", 0)


def test_an_fgvr_run_scores_letters_per_category(in_process, world_dir, tmp_path, capsys):
    """The right letter for discs, names for squares, no option for the rest."""
    folder = tmp_path / "pictures"
    for category in ("disc", "square", "cross"):
        shutil.copytree(world_dir / "train" / category, folder / category)
    cases = e.read_fgvr(folder, 0)

    def say(text, c):
        letter = "ABCD"[c["options"].index(c["entity"])]
        return (
            f"<think>Hm.</think> <answer>{ {'disc': letter, 'square': c['entity']}.get(c['category'], '?') }</answer>"
        )

    flags = ("--task", "fgvr")
    assert len(in_process(say, tmp_path / "out", *flags, task_bench=folder)) == len(cases)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {k: (m["acc"], m["parse_rate"]) for k, m in metrics["categories"].items()} == {
        "disc": (1.0, 1.0), "square": (1.0, 1.0), "cross": (0.0, 0.0)}  # fmt: skip
    assert (
        metrics["all"]["acc"] == pytest.approx(2 / 3) and metrics["all"]["chance"] == 0.25 and metrics["seen"] is None
    )
    assert metrics["all"]["acc_ci95"][0] < 2 / 3 < metrics["all"]["acc_ci95"][1]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out and "| disc" in table and "seen" not in table
    page = (tmp_path / "out" / "report.html").read_text()
    shown = json.loads(page.split('id="data">')[1].split("</script>")[0])["cases"]
    assert len(shown) == len(cases) and not shown[0]["answers"][0]["correct"] and shown[0]["truth"] is None
    assert all(option in shown[0]["entity"] for option in cases[0]["options"]) or shown[0]["id"] != cases[0]["id"]
    assert "<h2>Results</h2>" in page and "chance %" in page and shown[0]["picture"] is not None
    assert in_process(say, tmp_path / "out", *flags, task_bench=folder) == [], "all is stored"
    with pytest.raises(SystemExit, match="--seed was 0, now 1"):
        in_process(say, tmp_path / "out", *flags, "--seed", 1, task_bench=folder)


# ---- expressions ----
def rec_rows(samples, folder):  # noqa: F811
    """The bench as RefCOCO would write it, half of it in COCO's boxes, in three splits."""
    rows = []
    for i, s in enumerate(samples):
        picture = e.load_image(s["image"])
        picture.save(folder / f"{i}.png")
        x1, y1, x2, y2 = (v * n / 1000 for v, n in zip(s["bbox_1000"], picture.size * 2, strict=True))
        box = {"bbox_px": [x1, y1, x2, y2]} if i % 2 else {"bbox": [x1, y1, x2 - x1, y2 - y1]}
        rows.append({"image": f"{i}.png", "expression": f"thing {i}", "split": ("val", "testA", "testB")[i % 3]} | box)
    return rows


def test_expressions_are_scored_per_split_by_the_same_machinery(in_process, samples, tmp_path):  # noqa: F811
    path = write_rows(tmp_path / "refcoco.jsonl", rec_rows(samples, tmp_path))
    cases = e.read_rec(path)
    assert all(np.allclose(c["bbox_1000"], s["bbox_1000"], atol=0.01) for c, s in zip(cases, samples, strict=True))

    def say(text, c):
        assert f"<|object_ref_start|>{c['entity']}<|object_ref_end|>" in text
        return box_answer([round(v) for v in c["bbox_1000"]] if c["category"] == "testA" else (0, 0, 1, 1))

    assert len(in_process(say, tmp_path / "out", "--task", "rec", task_bench=path)) == 28
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {k: m["acc"] for k, m in metrics["categories"].items()} == {"val": 0.0, "testA": 1.0, "testB": 0.0}
    assert metrics["all"]["acc"] == 9 / 28 and metrics["categories"]["testA"]["mean_iou"] > 0.9
    assert metrics["seen"] is None and metrics["unseen"] is None and metrics["all"]["acc_ci95"]
    table, page = (tmp_path / "out" / "table.md").read_text(), (tmp_path / "out" / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert "seen" not in table and "| testA" in table and len(data["cases"]) == 28 and "thing 3" in page
    assert ">unseen<" not in page, "splits in place of seen and unseen"


def test_boxes_of_expressions_are_checked_against_their_picture(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    good = {"image": "a.png", "expression": "left one", "bbox": [50, 10, 50.6, 40]}
    (got,) = e.read_rec(write_rows(tmp_path / "r.jsonl", [good]))
    assert got["bbox_1000"] == [500, 200, 1000, 1000] and got["category"] == "none", "0.6 px too far is rounding"
    (got,) = e.read_rec(
        write_rows(tmp_path / "r.jsonl", [{"image": "a.png", "question": "Where?", "bbox_px": [0, 0, 9, 9]}])
    )
    assert got["question"] == "Where?" and got["bbox_1000"] == [0, 0, 90, 180]
    for change, words in (
        ({"bbox": [50, 10, 60, 20]}, r"want bbox \[x, y, width, height\] in it"),
        ({"bbox_px": [50, 10, 20, 40]}, r"want bbox_px \[x1, y1, x2, y2\] in it"),
        ({"bbox": None}, "no box"), ({"bbox": [1, 2, 3]}, "no box"), ({"expression": None}, "no expression"),
        ({"image": "b.png"}, "no such image"), ({"image": "r.jsonl"}, "unreadable"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=words) as error:
            e.read_rec(write_rows(tmp_path / "r.jsonl", [good | change]))
        assert "\n" not in str(error.value)


def test_a_table_of_runs_leaves_other_tasks_out(tmp_path):
    row = {"n": 4, "acc": 0.5, "acc_ci95": None, "mean_iou": 0.5, "parse_rate": 1.0}
    for name, task in (("grpo", "kvg"), ("ref", "rec")):
        (tmp_path / f"eval_{name}").mkdir()
        m = {"all": row, "seen": row, "unseen": None, "config": {"task": task}}
        (tmp_path / f"eval_{name}" / "metrics.json").write_text(json.dumps(m))
    assert "grpo" in e.summarize(tmp_path, 0) and "ref" not in e.summarize(tmp_path, 0)


def test_a_real_model_answers_choices_and_spoilt_pictures(bench, tiny_dir, tmp_path):  # noqa: F811
    flags = ("--bench", bench, "--model", tiny_dir, "--max_completion_length", 4, "--prompt", "direct", *SEEN)
    done = run_script("eval_kvg.py", *flags, "--gap", "--corrupt", "jpeg", "--out", tmp_path)
    rows = e.read_jsonl(tmp_path / "choices.jsonl")
    assert len(rows) == 28 and "choice x box" in done.stdout and all(0 < r["num_tokens"] <= 4 for r in rows)
    assert json.loads((tmp_path / "config.json").read_text())["corrupt_strength"] == 3
