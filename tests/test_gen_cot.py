"""gen_cot.py: chains from the table, validation, resuming, errors; the model teachers are in test_teachers.py."""

import json
import os
import re

import pytest
from conftest import run_script

import gen_cot

ROW = {
    "id": "a",
    "target": 1,
    "question": "Find and give the bounding box of <|object_ref_start|>Lo<|object_ref_end|>",
    "answer": "<|object_ref_start|>Lo<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|>",
    "images": ["images/a.png"],
    "entities": [
        {"entity": "Mi", "bbox_1000": [500, 600, 700, 900]},
        {"entity": "Lo", "bbox_1000": [10, 20, 300, 400]},
        {"entity": "Ra", "bbox_1000": [400, 100, 600, 500]},
    ],
}
TABLE = {
    "Mi": {"category": "disc", "description": "a red disc"},
    "Lo": {"category": "disc", "description": "a blue disc"},
    "Ra": {"category": "disc", "description": "a green disc"},
}
EXACT = """Planning: Lo is a blue disc.
Visual Analysis:
a blue disc (10,20),(300,400)
a green disc (400,100),(600,500)
a red disc (500,600),(700,900)
Comparison: of the objects above, only a blue disc fits Lo.
Conclusion: Lo is a blue disc (10,20),(300,400)."""
FINE = """**Planning:** The Lo has a blue body, so look for blue.
## Visual Analysis
1. Mi (500,600),(700,900): red all over, no band.
2. Lo (10,20),(300,400): blue body, round outline.
Comparison: only the second object is blue; the others are red and green, and none has the same round outline.
Conclusion: the Lo is the blue one at (12,20),(300,400)."""


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def cot(synth_dir, out, *args, **kwargs):
    return run_script("gen_cot.py", "--samples", synth_dir / "samples.jsonl", "--out", out, *args, **kwargs)


def one_line(done, *words):
    """The run failed, and stderr ends in one line that says all `words`, with no traceback."""
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "Traceback" not in done.stderr and all(w in last for w in words), done.stderr


# ---- the table ----
def test_the_chain_of_a_hand_written_row_is_exact():
    assert gen_cot.knowledge_cot(ROW, TABLE) == (EXACT, None)
    assert gen_cot.validate(EXACT, ROW) is None


def test_an_unknown_entity_and_equal_descriptions_are_rejected():
    assert gen_cot.knowledge_cot(ROW, {k: v for k, v in TABLE.items() if k != "Ra"})[1] == "unknown entity: Ra"
    assert gen_cot.knowledge_cot(ROW, TABLE | {"Mi": TABLE["Ra"]})[1].startswith("same description")


def test_every_kept_row_ends_in_the_box_of_its_target(world_dir, synth_dir, tmp_path):
    done = cot(synth_dir, tmp_path / "deep" / "out", "--knowledge", world_dir / "knowledge.json")
    rows, source = read(tmp_path / "deep/out/samples.jsonl"), read(synth_dir / "samples.jsonl")
    assert [r["id"] for r in rows] == [r["id"] for r in source] and re.search(
        r"^gen_cot: 12 kept, 0 rejected, .* s -> ", done.stdout, re.M
    )
    for row, old in zip(rows, source, strict=True):
        truth = row["entities"][row["target"]]["bbox_1000"]
        user, assistant = (m["content"] for m in row["messages"])
        assert (
            [int(v) for v in re.findall(r"\d+", gen_cot.BOXES.findall(row["cot"])[-1])]
            == truth
            == gen_cot.parse_bbox(assistant)
        )
        assert user == "<image>" + row["question"] + gen_cot.R1_SUFFIX and gen_cot.THINK_ANSWER.fullmatch(assistant)
        assert (tmp_path / "deep/out" / row["images"][0]).samefile(synth_dir / old["images"][0])
        assert row["teacher"] == {"backend": "knowledge", "model": "knowledge.json", "attempt": 1}
        assert {k: v for k, v in row.items() if k not in ("images", "messages", "cot", "teacher")} == {
            k: v for k, v in old.items() if k not in ("images", "messages")}  # fmt: skip


@pytest.mark.parametrize("cut", [0.5, 0.03, 0.999])
def test_a_killed_run_continues_to_the_same_bytes(world_dir, synth_dir, tmp_path, cut, monkeypatch):
    table = json.loads((world_dir / "knowledge.json").read_text())
    for name in [e["entity"] for e in read(synth_dir / "samples.jsonl")[0]["entities"]][:1]:
        del table[name]  # so that there is something in rejected.jsonl
    (tmp_path / "table.json").write_text(json.dumps(table))
    argv = ["--samples", synth_dir / "samples.jsonl", "--out", tmp_path / "out", "--knowledge", tmp_path / "table.json"]
    monkeypatch.setattr("sys.argv", ["gen_cot.py", *map(str, argv)])
    gen_cot.main()
    whole = {
        name: (tmp_path / "out" / name).read_bytes() for name in ("samples.jsonl", "rejected.jsonl", "part-00000.jsonl")
    }
    assert whole["rejected.jsonl"]
    for name in whole:
        (tmp_path / "out" / name).write_bytes(whole[name][: int(len(whole[name]) * cut)])
    gen_cot.main()
    assert {name: (tmp_path / "out" / name).read_bytes() for name in whole} == whole
    (tmp_path / "table.json").write_text(
        json.dumps(table | {"Nobody": {"category": "disc", "description": "a grey disc"}})
    )
    with pytest.raises(SystemExit, match="knowledge_sha"):
        gen_cot.main()


# ---- validation ----
def test_a_good_chain_is_accepted():
    assert gen_cot.validate(FINE, ROW) is None


BAD = [
    ("empty", ""),
    ("headings", FINE.replace("## Visual Analysis", "## Looks")),
    ("headings", "Sure, here it is.\n" + FINE),
    ("headings", FINE + "\nConclusion: (10,20),(300,400)"),
    ("headings", FINE.replace("Comparison:", "X:").replace("Conclusion:", "Comparison:").replace("X:", "Conclusion:")),
    ("target not named", FINE.replace("Lo", "Zu")),
    ("no final box", FINE.replace("(12,20),(300,400)", "the left")),
    ("wrong final box", FINE.replace("(12,20),(300,400)", "(500,600),(700,900)")),
    ("wrong final box", FINE.replace("(12,20),(300,400)", "(60,20),(300,400)")),
    ("wrong final box", FINE.replace("(12,20),(300,400)", "(12,20),(300,400), not (500,600),(700,900)")),
    ("markup", FINE.replace("red all", "<answer>red</answer> all")),
    ("markup", "<think>" + FINE),
    ("markup", FINE.replace("red all", "<|im_end|> all")),
    ("markup", FINE.replace("red all", "<image> all")),
    ("too short", "Planning: Lo\nVisual Analysis: blue\nComparison: yes\nConclusion: (10,20),(300,400)"),
    ("too long", FINE.replace("red all", "red " * 900)),
]
BETRAYING = ["the provided bounding box", "the given bounding box says so", "as stated", "the prompt says it",
             "the labels given", "by the ground truth", "the ground-truth box", "the bounding box of Lo is given",
             "we are told so", "it is labeled as Lo", "matches the bounding box",
             "according to the annotations"]  # fmt: skip


@pytest.mark.parametrize(("reason", "text"), BAD)
def test_each_rule_rejects_its_text(reason, text):
    assert gen_cot.validate(text, ROW).split(":")[0] == reason


@pytest.mark.parametrize("phrase", BETRAYING)
def test_a_chain_that_betrays_the_answer_is_rejected(phrase):
    assert gen_cot.validate(FINE.replace("red all over", f"red all over, {phrase},"), ROW).startswith("betrays")


def test_qwens_own_box_tokens_are_dropped_and_a_cut_chain_is_rejected():
    args = gen_cot.parse_args(["--samples", "x", "--out", "y", "--knowledge", "z"])
    tokens = FINE.replace("(12,20),(300,400)", "<|box_start|>(12,20),(300,400)<|box_end|>")
    assert gen_cot.judge(tokens + "\n", False, ROW, args) == (FINE, None)
    assert gen_cot.judge(FINE, True, ROW, args)[1].startswith("cut off")


def test_the_prompt_tells_all_boxes_and_the_target():
    prompt = gen_cot.teacher_prompt(ROW)
    assert "Mi (500,600),(700,900), Lo (10,20),(300,400), Ra (400,100),(600,500)." in prompt
    assert "The bounding box of Lo is (10,20),(300,400)." in prompt


# ---- errors ----
def test_bad_input_is_one_clear_line(synth_dir, world_dir, tmp_path):
    rows = read(synth_dir / "samples.jsonl")
    rows = [r | {"images": [os.path.relpath(synth_dir / r["images"][0], tmp_path)]} for r in rows]
    cases = [
        ("question", [{k: v for k, v in rows[0].items() if k != "question"}]),
        ("id occurs twice", [rows[0], rows[0]]),
        ("target 9", [rows[0] | {"target": 9}]),
        ("bbox_1000", [rows[0] | {"entities": [{"entity": "A", "bbox_1000": [5, 5, 5, 9]}] * 6}]),
        ("images", [rows[0] | {"images": ["gone.png"]}]),
    ]
    for words, lines in cases:
        (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        with pytest.raises(SystemExit, match=words):
            gen_cot.read_composites(tmp_path / "s.jsonl")
    for words, text in [("not JSON", "{"), ("no description", '{"A": {"category": "x"}}'), ("want", "[]")]:
        (tmp_path / "k.json").write_text(text)
        with pytest.raises(SystemExit, match=words):
            gen_cot.read_knowledge(tmp_path / "k.json")
    one_line(
        cot(synth_dir, tmp_path / "out", "--knowledge", tmp_path / "gone.json", check=False),
        "gone.json: no such file",
        "check the path",
    )
    for flags in (["--teacher", "hf"], ["--teacher", "openai"], ["--teacher", "knowledge"]):
        with pytest.raises(SystemExit, match=r"no --teacher_model|no --knowledge"):
            gen_cot.parse_args(["--samples", "s", "--out", "o", *flags])
