"""Filters: every rule for chains rejects its own case; difficulty is measured, resumable, and equal on two ranks.

The probe asks fair questions and reads strict answers.
"""

import io
import json
import os
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import TWO_RANKS, run_script
from PIL import Image

import filter as f

ANSWER = "<|object_ref_start|>Lo<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|>"
THINK = "Planning: Lo is red.\nI see two objects here and compare them.\nLo is at (10,20),(300,400)."
ARGS = SimpleNamespace(min_words=10, max_words=50, max_repeats=3)


def sample(think=THINK, answer=ANSWER, **changes):
    base = {
        "completion": f"<think>\n{think}\n</think> <answer>{answer}</answer>",
        "bbox_1000": [10, 20, 300, 400],
        "entity": "Lo",
        "image_id": "a",
    }
    return base | changes


@pytest.mark.parametrize("bad, rule", [
    (sample(completion="Lo is at (10,20),(300,400)"), "not one <think>"),
    (sample(completion=None), "not one <think>"),
    (sample(THINK + "</think><think>"), "not one <think>"),
    (sample(answer=ANSWER.replace("10,20", "20,20")), "answer is not"),
    (sample(answer=ANSWER + ANSWER.replace("10", "11")), "answer is not"),
    (sample("Lo is here."), "not 10 to 50 words"),
    (sample(THINK * 5), "not 10 to 50 words"),
    (sample(THINK.replace("Lo", "Mi")), "does not name"),
    (sample(entity=None), "does not name"),
    (sample(THINK + " It may be (10,20),(3000,400)."), "a box in the reasoning"),
    (sample(THINK + " No: (500,500),(900,900)."), "reasoning ends at another box"),
    (sample(THINK + "\nso on" * 4), "repeats itself"),
])  # fmt: skip
def test_each_rule_rejects_its_own_chain(bad, rule):
    assert f.broken_rule(bad, set(), ARGS).startswith(rule)


def test_a_sound_chain_is_kept_once():
    seen = set()
    assert f.broken_rule(sample(), seen, ARGS) is None
    assert f.broken_rule(sample(), seen, ARGS) == "duplicate"
    assert f.broken_rule(sample(image_id="b"), seen, ARGS) is None


@pytest.fixture(scope="module")
def cot_dir(world_dir, synth_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("cot")
    run_script(
        "gen_cot.py",
        "--samples",
        synth_dir / "samples.jsonl",
        "--knowledge",
        world_dir / "knowledge.json",
        "--out",
        out,
    )
    return out


def test_cot_stage_keeps_sound_rows_and_names_the_rule_of_the_others(cot_dir, tmp_path):
    rows = [json.loads(line) for line in (cot_dir / "samples.jsonl").read_text().splitlines()]
    rows[3]["messages"][1]["content"] = "nothing"
    (tmp_path / "in").mkdir()
    for r in rows:
        r["images"] = [os.path.relpath(cot_dir / i, tmp_path / "in") for i in r["images"]]
    (tmp_path / "in" / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run_script("filter.py", "--stage", "cot", "--samples", tmp_path / "in" / "samples.jsonl", "--out", tmp_path / "out")
    kept = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    (rejected,) = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [r["id"] for r in kept] == [r["id"] for i, r in enumerate(rows) if i != 3] and rejected["reason"].startswith(
        "not one <think>"
    )
    assert all((tmp_path / "out" / r["images"][0]).is_file() for r in kept)


def measure(synth_dir, tiny_dir, out, *flags, launcher=(sys.executable,), check=False):
    """A random model solves nothing: keep 0 of 3 too, so that rows come out."""
    return run_script("filter.py", "--stage", "grpo", "--model", tiny_dir, "--samples", synth_dir / "samples.jsonl",
                      "--out", out, "--num_rollouts", 3, "--min_correct", 0, "--max_completion_length", 8, *flags,
                      launcher=launcher, check=check)  # fmt: skip


def test_difficulty_is_the_same_after_a_kill_and_on_two_ranks(synth_dir, tiny_dir, tmp_path):
    measure(synth_dir, tiny_dir, tmp_path / "a", check=True)
    want = (tmp_path / "a" / "samples.jsonl").read_bytes()
    rows = [json.loads(line) for line in want.splitlines()]
    assert len(rows) == 12 and all(r["pass_rate"] == 0 and r["num_rollouts"] == 3 for r in rows)
    assert (tmp_path / "a" / "pass_rate.png").exists()
    counts = Counter(f.REF.search(r["question"])[1] for r in rows)
    want_mastery = {e: {"mastery": 0.0, "n": n, "level": "completely incorrect"} for e, n in counts.items()}
    assert json.loads((tmp_path / "a" / "mastery.json").read_text()) == want_mastery
    part = tmp_path / "a" / "part-0.jsonl"
    part.write_bytes(part.read_bytes()[:200])
    (tmp_path / "a" / "samples.jsonl").unlink()
    measure(synth_dir, tiny_dir, tmp_path / "a", launcher=TWO_RANKS, check=True)
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == want


def test_nothing_kept_is_an_error_with_the_reasons(synth_dir, tiny_dir, tmp_path):
    done = measure(synth_dir, tiny_dir, tmp_path, "--min_correct", 1)
    assert (
        done.returncode != 0
        and "0 of 12 rows kept" in done.stderr
        and "12 too hard" in done.stdout
        and "Traceback" not in done.stderr
    )


def test_bad_flags_and_rows_get_one_clear_line(synth_dir, tiny_dir, tmp_path):
    row = (synth_dir / "samples.jsonl").read_text().splitlines()[0]
    (tmp_path / "twice.jsonl").write_text(f"{row}\n{row}\n")
    for flags, message in (
        (("--num_rollouts", 1), "--num_rollouts >= 2"),
        (("--samples", tmp_path / "twice.jsonl"), "occurs more than once; want unique ids"),
        (("--model", "nowhere"), "nowhere: no model"),
    ):
        done = measure(synth_dir, tiny_dir, tmp_path / "o", *flags)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


# ---- probe ----
def scene(number, *entities, category="car"):
    listed = [{"entity": e, "bbox_px": [0, 0, 9, 9], "source": f"{e}/{number}.png"} for e in entities]
    return {"id": f"r{number}", "category": category, "image": "x.png", "image_id": "x", "row": {"entities": listed}}


PROBE = SimpleNamespace(seed=0, max_per_entity=50, samples="rows")
SCENES = [scene(i, *names) for i, names in enumerate(("AB", "CDE", "AFE"))] + [scene(3, "X", "Y", category="bird")]


def test_probe_offers_the_entity_among_different_ones_of_its_category():
    questions = f.probe_questions(SCENES * 2, PROBE)
    assert [q["id"] for q in questions] == [
        "r0:A",
        "r0:B",
        "r1:C",
        "r1:D",
        "r1:E",
        "r2:A",
        "r2:F",
        "r2:E",
        "r3:X",
        "r3:Y",
    ]
    for q in questions:
        of_category = set("XY") if q["entity"] in "XY" else set("ABCDEF")
        assert q["entity"] in q["options"] and set(q["options"]) <= of_category
        assert len(set(q["options"])) == len(q["options"]) == min(4, len(of_category))
        assert all(f"\n{x}. {option}\n" in q["text"] for x, option in zip("ABCD", q["options"], strict=False))
    assert "C. " not in questions[-1]["text"] and questions[0]["text"].startswith("Which car is this?")


def test_probe_draws_from_row_and_entity_alone_and_every_letter_is_right_sometimes():
    many = [scene(i, "A", "B", "C", "D", "E") for i in range(200)]
    questions = {q["id"]: q for q in f.probe_questions(many, SimpleNamespace(**vars(PROBE) | {"max_per_entity": 200}))}
    assert all(questions[q["id"]] == q for q in f.probe_questions(many[150:], PROBE))
    other = f.probe_questions(many, SimpleNamespace(**vars(PROBE) | {"seed": 1}))
    assert any(questions[q["id"]]["options"] != q["options"] for q in other) and len(other) == 5 * PROBE.max_per_entity
    places = Counter(q["options"].index(q["entity"]) for q in questions.values())
    assert all(200 < places[i] < 300 for i in range(4)), places


def test_probe_needs_something_to_choose_from():
    for rows, message in (([scene(0, "A")], "one entity"), ([scene(0)], "no entities")):
        with pytest.raises(SystemExit, match=message):
            f.probe_questions(rows, PROBE)


def test_crop_is_the_box_and_a_small_margin(tmp_path):
    image = Image.new("RGB", (100, 60), "white")
    image.paste("red", (20, 10, 60, 50))
    image.save(tmp_path / "a.png")
    cut = Image.open(io.BytesIO(f.crop(tmp_path / "a.png", [20.0, 10.0, 60.0, 50.0])))
    assert cut.size == (44, 44) and cut.getpixel((0, 0)) == (255, 255, 255) and cut.getpixel((2, 2)) == (255, 0, 0)
    assert Image.open(io.BytesIO(f.crop(tmp_path / "a.png", [0, 0, 100, 60]))).size == (100, 60)


@pytest.mark.parametrize("text, want", [
    ("B", "Mi"), (" B.\n", "Mi"), ("(B)", "Mi"), ("(B).", "Mi"), ("B)", "Mi"), ("B: Mi", "Mi"), ("B. Mi.", "Mi"),
    ("(C) Audi A4", "Audi A4"), ("D. E. coli", "E. coli"),
    ("", None), ("b", None), ("E", None), ("Mi", None), ("BB", None), ("B or C", None), ("B, C", None), ("B. Lo", None),
    ("A Mi", None), ("A photo of Mi", None), ("(B", None), ("The answer is B", None), ("B. C.", None), ("В", None),
    ("B\nC", None), ("B. Mi or C. Audi A4", None), ("<think>B</think>", None), ("(A)(B)", None),
])  # fmt: skip
def test_an_answer_is_one_letter_or_nothing(text, want):
    assert f.chosen_option(text, ["Lo", "Mi", "Audi A4", "E. coli"]) == want


def test_a_letter_without_an_option_is_no_answer():
    assert f.chosen_option("B", ["Lo", "Mi"]) == "Mi" and f.chosen_option("C", ["Lo", "Mi"]) is None


def run_probe(synth_dir, model, out, *flags, launcher=(sys.executable,), check=True):
    return run_script("filter.py", "--stage", "probe", "--model", model, "--samples", synth_dir / "samples.jsonl",
                      "--out", out, "--max_completion_length", 4, *flags, launcher=launcher, check=check)  # fmt: skip


def test_probe_measures_every_entity_and_goes_on_after_a_kill(synth_dir, tiny_dir, tmp_path):
    run_probe(synth_dir, tiny_dir, tmp_path)

    def answers():
        lines = [line for part in tmp_path.glob("part-*.jsonl") for line in part.read_text().splitlines()]
        return sorted(lines)

    want, stats, said = (tmp_path / "mastery.json").read_bytes(), (tmp_path / "stats.json").read_bytes(), answers()
    mastery, stats = json.loads(want), json.loads(stats)
    rows = [json.loads(line) for line in (synth_dir / "samples.jsonl").read_text().splitlines()]
    tokenizer, image_processor = f.load_processors(tiny_dir, 401408)
    model = f.load_model(tiny_dir, "float32", torch.device("cpu"))
    questions = {q["id"]: q for q in f.probe_questions(f.read_samples(synth_dir / "samples.jsonl"), PROBE)}
    for answer in map(json.loads, said[:8]):
        q = questions[answer["id"]]
        inputs = f.chat_inputs(
            tokenizer, image_processor, f.crop(q["image"], q["bbox_px"]), q["text"], f.BOX_STYLES["qwen2_vl"]
        )
        ids = f.rollout(model, tokenizer, [inputs], [["0"]], 4, 0.0, 1)[0][0][0]
        assert answer["text"] == f.completion_text(tokenizer, ids), "the picture of the entity alone is shown"
    sources = {(e["entity"], e["source"]) for r in rows for e in r["entities"]}
    assert {e: m["n"] for e, m in mastery.items()} == Counter(entity for entity, _ in sources)
    assert all(set(m) == {"mastery", "n", "parsed", "chance", "level"} for m in mastery.values())
    assert stats["questions"] == len(sources) and stats["entities"] == len(mastery) == sum(stats["levels"].values())
    part = tmp_path / "part-0.jsonl"
    part.write_bytes(part.read_bytes()[:300])
    (tmp_path / "mastery.json").unlink()
    run_probe(synth_dir, tiny_dir, tmp_path, launcher=TWO_RANKS)
    assert (tmp_path / "mastery.json").read_bytes() == want and answers() == said
    done = run_probe(synth_dir, tiny_dir, tmp_path, "--max_per_entity", 1, check=False)
    assert done.returncode != 0 and "--max_per_entity was 50, now 1" in done.stderr and "Traceback" not in done.stderr


def test_probe_counts_what_was_answered(monkeypatch, tmp_path):
    """Right: A always, C once of two. Unparsed is wrong."""
    said = {"A": ["A", "A"], "B": ["B", None], "C": ["C", "A"]}

    def measure(questions, args, out, generations, temperature, score):
        assert (generations, temperature) == (1, 0)
        texts = {q["id"]: said[q["entity"]][int(q["id"][1])] for q in questions}
        say = {
            q["id"]: "hm" if texts[q["id"]] is None else "ABCD"[q["options"].index(texts[q["id"]])] for q in questions
        }
        return {q["id"]: score(q, [say[q["id"]]]) for q in questions}, 0

    monkeypatch.setattr(f, "measure", measure)
    f.probe([scene(0, *"ABC"), scene(1, *"ABC")], PROBE, tmp_path)
    got = json.loads((tmp_path / "mastery.json").read_text())
    names = dict(zip("ABC", ("completely correct", "mostly correct", "mostly correct"), strict=True))
    assert {e: (m["mastery"], m["n"], m["parsed"], m["level"]) for e, m in got.items()} == {
        "A": (1.0, 2, 2, names["A"]), "B": (0.5, 2, 1, names["B"]), "C": (0.5, 2, 2, names["C"])}  # fmt: skip
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert (stats["accuracy"], stats["parse_rate"]) == pytest.approx((4 / 6, 5 / 6))
    assert stats["chance"] == pytest.approx(1 / 3) == got["A"]["chance"]
