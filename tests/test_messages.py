"""A mistake is one line, before weights are loaded; any row is a sample or a bad one, any text has one box or none."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText

import eval_kvg as e

QUESTION, ANSWER = e.QUESTION.format("Lo"), e.ANSWER.format("Lo", 10, 20, 300, 400)
LO = {"entity": "Lo", "bbox_px": [1, 2, 30, 40], "bbox_1000": [10, 20, 300, 400]}
MI = LO | {"entity": "Mi"}
ROW = {"images": ["a.png"], "question": QUESTION, "answer": ANSWER, "target": 0, "entities": [LO, MI]}
ROW["messages"] = [{"role": "user", "content": "<image>" + QUESTION}, {"role": "assistant", "content": ANSWER}]
SOURCE = {"image": "a.png", "entity": "Lo", "category": "car", "bbox_px": [0, 0, 9, 9]}
NAN, SWAPPED = float("nan"), ANSWER.replace("(10", "(310")

def rows(**change):
    return [ROW | {"id": "a"}, {k: v for k, v in (ROW | {"id": "b"} | change).items() if v is not None}]

def sources(**change):
    return [SOURCE, SOURCE | change]

COMMANDS = {
    "synth_data": "--source s.jsonl --out out --num_workers 1 --num_samples 1 --max_bad_rows 0",
    "gen_cot": "--samples s.jsonl --knowledge k.json --out out",
    "filter": "--stage cot --samples s.jsonl --out out",
    "eval_kvg": "--bench s.jsonl --model {tiny} --out out",
    "train_sft": "--model {tiny} --data s.jsonl --output_dir out",
    "train_grpo": "--model {tiny} --data s.jsonl --output_dir out",
    "rows": "--source s.jsonl --out out",
}
MESSAGES = [  # script, more flags, s.jsonl as rows or text, a line that it prints
    ("synth_data", "--min_entities 7", [], "error: want 2 <= --min_entities <= --max_entities <= 6"),
    ("eval_kvg", "--predictions p.jsonl", [], "error: want one of --model and --predictions"),
    ("train_grpo", "", None, "No such file or directory: 's.jsonl'"),
    ("gen_cot", "", rows(target=None), r"s.jsonl:2 \(b\): no target; want images, entities, target, question, answer"),
    ("eval_kvg", "", rows(question=None, messages=None), r"s.jsonl:2 \(b\): .*question ''.*; want"),
    ("train_sft", "", rows(messages=None), "b: .*nothing to learn from; want an assistant's message"),
    ("rows choices", "", [SOURCE], r"s.jsonl:1 \(1\): options \['Lo'\]; want 2 to 6 names of a car, with 'Lo'"),
    ("synth_data", "", sources(bbox_px=[9, 0, 0, 9]), r"s.jsonl: 1 bad, .*box: \[9, 0, 0, 9\]; want"),
    ("gen_cot", "", rows(entities=[LO | {"bbox_1000": [1, 2, 3, NAN]}]), r"\(b\): .*nan\].*; want .* y2 in 0..1000"),
    ("train_grpo", "", rows(bbox_px=[0, 0, 102, 10]), r"s.jsonl:2 \(b\): .*box \[0, 0, 102, 10\]; want .* within"),
    ("gen_cot", "", rows(images=["none.png"]), r"s.jsonl:2 \(b\): no file none.png; want an image"),
    ("synth_data", "", sources(entity="Lo<|im_end|>"), r"s.jsonl:2: .*<\|im_end\|>'\]; want texts without"),
    ("gen_cot", "", rows(entities=[LO | {"entity": "<|im_end|>"}]), r"s.jsonl:2 \(b\): .*; want a name without"),
    ("eval_kvg", "", rows(id="a"), r"s.jsonl:2 \(a\): .*its id occurs twice; want unique ids"),
    ("synth_data", "", [], "s.jsonl: 0 usable, {}; want --min_entities of one category"),
    ("eval_kvg", "", [], "s.jsonl: 0 questions, 0 bad rows"),
    ("filter", "", rows(), "rejected.jsonl: 0 of 2 rows kept, {'not one <think> .*': 2}; want some"),
    ("gen_cot", "--knowledge n.json", rows(), 'n.json: .*int.*; want JSON {"Name": {"description"}}'),
]

@pytest.fixture
def say(tmp_path, monkeypatch, capsys, tiny_dir):
    """Runs a command here, in a folder with some files; (exit code, its last line, all that it prints)."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 50), "red").save("a.png")
    for file, text in (("k.json", "{}"), ("n.json", '{"Lo": 1}'), ("p.jsonl", "")):
        Path(file).write_text(text)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)  # who loads weights fails otherwise
    def start(script, flags):
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            monkeypatch.setenv(name, value)  # the scripts set them; undone after the test
        script, *command = script.split()
        path = ROOT / ("tools" if command else "") / f"{script}.py"
        flags = f"{COMMANDS[script]} {flags}".format(tiny=tiny_dir).split()
        monkeypatch.setattr(sys, "argv", [path.name, *command, *flags])
        with pytest.raises(SystemExit) as end:
            try:
                runpy.run_path(str(path), run_name="__main__")
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        (out, err), code = capsys.readouterr(), end.value.code
        return (1, code, out + code) if isinstance(code, str) else (code, err.strip().split("\n")[-1], err)
    return start

@pytest.mark.parametrize("script, flags, content, want", MESSAGES)
def test_a_mistake_is_one_line_before_weights_are_loaded(script, flags, content, want, say):
    if content is not None:
        text = "".join(json.dumps(r) + "\n" for r in content) if isinstance(content, list) else content
        Path("s.jsonl").write_text(text, encoding="latin-1")
    code, last, printed = say(script, flags)
    assert re.search(want, printed) and last.startswith(script.split()[0]) and "\n" not in last, printed
    assert code == (2 if "error: " in want else 1)

def test_two_runs_into_one_folder_are_refused(say, tmp_path):
    (tmp_path / "out").mkdir()
    Path("s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows()))
    lock = "import fcntl, sys; f = open('out/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert say("filter", "")[:2] == (1, "filter: out: another run writes here; want one at a time")
        other.communicate(b"\n")

TEXT = st.text(max_size=9) | st.sampled_from([
    QUESTION, ANSWER, SWAPPED, "a.png", "none.png", ".", "a\0", "(1,2),(3,4)", f"(1,2),(3,{'9' * 5000})", "<|im_end|>",
    f"<think>Hm.</think> <answer>{ANSWER}</answer>", "<image>" + QUESTION, "<|object_ref_start|>", "\ud800", "x" * 300])
LEAF = TEXT | st.none() | st.booleans() | st.integers(-1, 120) | st.floats() | st.just(10**400)
VALUE = LEAF | st.lists(LEAF, max_size=5) | st.dictionaries(TEXT, LEAF, max_size=2)
TURN = st.fixed_dictionaries({"content": TEXT}) | st.dictionaries(st.sampled_from(["role", "content"]), VALUE) | VALUE
KINDS = {"bbox_px": st.lists(LEAF, min_size=3, max_size=5), "messages": st.lists(TURN, max_size=3),
         "image": st.fixed_dictionaries({"bytes": TEXT}), "images": st.lists(TEXT, max_size=1)}  # fmt: skip
COLUMNS = [*KINDS, *"id question_id question problem phrase answer solution options entity category image_id".split()]
CHANGE = st.sampled_from(COLUMNS).flatmap(lambda c: st.tuples(st.just(c), VALUE | KINDS.get(c, TEXT)))
EXAMPLES = dict(deadline=None, derandomize=True, database=None)

@settings(max_examples=300, **EXAMPLES)
@given(st.lists(CHANGE, max_size=3).map(dict), st.sets(st.sampled_from(COLUMNS), max_size=3))
def test_any_json_object_is_a_sample_or_a_bad_row(tmp_path_factory, changes, lacking):
    folder = tmp_path_factory.getbasetemp()
    Image.new("RGB", (100, 50), "red").save(folder / "a.png")
    row = {k: v for k, v in (rows()[0] | changes).items() if k not in lacking}
    (folder / "s.jsonl").write_text(json.dumps(row) + "\n")
    samples, bad = e.read_samples([folder / "s.jsonl"])
    assert len(samples) + len(bad) == 1 and all(line.startswith(f"{folder}/s.jsonl:1 (") for line in bad)
    for s in samples:
        x1, y1, x2, y2 = s["bbox_1000"] or (0, 0, 1, 1)
        assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000 and s["question"] and isinstance(s["id"], str)
        assert not re.search(r"<\|im|<\|vision", s["question"] + s["answer"] + s["completion"])

def test_blank_lines_are_no_rows_and_half_a_character_is_kept(tmp_path):
    e.write(tmp_path / "f", e.to_json({"response": "\ud800É"}), "", " \r", '{"a": 1}\r')
    assert e.read_jsonl(tmp_path / "f") == [{"response": "\ud800É"}, {"a": 1}] and "É" in (tmp_path / "f").read_text()

PIECES = [  # what is written, and the numbers that are read as a box
    ("(1,2),(3,4)", (1, 2, 3, 4)), ("( 1 ,2) ,\n(3, 4.50)", (1, 2, 3, 4.5)), ("(1,2,3,4)", (1, 2, 3, 4)),
    ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "(5,6),(7,8)"}]\n```', (1, 2, 3, 4)),
    ("2 of (3) in 1999: [[01, 2, 3, 4]]", (1, 2, 3, 4)), ("(1,2)\t,\u00a0(3,4)", (1, 2, 3, 4)),
    ("<|object_ref_start|>Porsche 911 (901, 930, 964, 993)<|object_ref_end|>(1,2),(3,4)", (1, 2, 3, 4)),
    ("[0,0,1.025582,1]", (0, 0, 1.025582, 1)),  # 1.025582 * 1000 / 1000 is another number
    ("(1,2),(3,4),(5,6)", (1, 2, 3, 4, 5, 6)), ("(1,2),(3,4),(5,6),(7,8)", (1, 2, 3, 4, 5, 6, 7, 8)),
    *((box, tuple(map(float, box[1:-1].split(",")))) for box in (
        "[3,2,1,4]", "[1,4,3,2]", "[1,2,1,4]", "[1,2,3,2]", "[0,0,1000,1000]", "[1,2,3,1000.001]", "(1,2,1001,4)",
        "[0,0,560,420]", "[0,0,561,1]", "[0,0,1,421]", f"[1,2,3,{'9' * 400}]")),
    *((text, ()) for text in (
        "(1,2) (3,4)", "(1,2)(3,4)", "(1;2),(3;4)", "1,2,3,4", "[1,2],[3,4]", "[1,2,3]", "[1,2,3,4,5]", "(1,2)", "[",
        "[-1,2,3,4]", "[0.1,0.2,1e2,3]", "[1,2,3,4٤]", "[１２,20,30,40]", "[²,2,3,4]", "[1_0,20,30,40]", "[1 0,2,3,4]",
        "[.5,1,2,3]", "[5.,6,7,8]", "[1.2.3,4,5,6]", "(1,2,3,4]", "(1,2),[3,4]", '"label":"\\"[1,2,3,4]"', "Lo. \ud800",
        "<|object_ref_start|>(1,2),(3,4)<|object_ref_end|>", "<|box_start|>", "so", "")),
]  # fmt: skip
NUMBER = st.integers(0, 420).map(str) | st.floats(0, 1000).map("{:.3f}".format)
FORMS = st.sampled_from(["({},{}),({},{})", "({}, {}, {}, {})", "[{},{} ,{},{}]", "[[{},{},{},{}]]"])
DRAWN = st.tuples(FORMS, st.tuples(*4 * [NUMBER])).map(lambda x: (x[0].format(*x[1]), tuple(map(float, x[1]))))
WRAPS = {"<think>[5,6,7,8]</think><answer>{}</answer>": ("r1", "direct"), "{}": ("direct",), "<answer>{}": (),
         "{}</answer>": (), "<think><answer>{}</answer>": (), "<answer></answer>{}": (), "{}<answer></answer>": (),
         "<answer></answer><answer>{}</answer>": (), "</answer>{}<answer>": (),
         "<answer>{}</answer></answer>": ()}  # fmt: skip

def check_parser(pieces, between, grid):
    boxes = {box for _, box in pieces if box}
    box, want = boxes.pop() if len(boxes) == 1 else (), None
    if len(box) == 4 and box[0] < box[2] <= grid[0] and box[1] < box[3] <= grid[1]:
        want = [v if n == 1000 else v * 1000 / n for v, n in zip(box, grid * 2, strict=True)]
    for wrap, modes in WRAPS.items():
        text = wrap.format(between.join(text for text, _ in pieces))
        for mode in ("r1", "direct"):
            assert e.parse_bbox(text, mode, grid) == (want if mode in modes else None), text

@pytest.mark.parametrize("piece", PIECES)
def test_one_sound_box_is_read_in_every_notation_with_its_numbers_as_they_are(piece):
    for grid in ((1000, 1000), (560, 420)):
        check_parser([piece], "", grid)

@settings(max_examples=600, **EXAMPLES)
@given(st.lists(DRAWN | st.sampled_from(PIECES), max_size=4), st.sampled_from(["", " ", "\n", ". "]),
       st.sampled_from([(1000, 1000), (560, 420)]))  # fmt: skip
def test_a_text_has_the_one_box_of_its_pieces(pieces, between, grid):
    check_parser(pieces, between, grid)
    check_parser(2 * pieces, between, grid)  # the same box twice is one
