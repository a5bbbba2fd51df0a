"""A mistake is one line, before weights are loaded; any row is a sample or a bad one, any text has one box or none."""

import json
import re
import runpy
import subprocess
import sys

import pytest
import torch.distributed as dist
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText

import eval_kvg as e

QUESTION, ANSWER = e.QUESTION.format("Lo"), e.ANSWER.format("Lo", 10, 20, 300, 400)
ENTITIES = [{"entity": name, "bbox_px": [1, 2, 30, 40], "bbox_1000": [10, 20, 300, 400]} for name in ("Lo", "Mi")]
ROW = {"images": ["a.png"], "question": QUESTION, "answer": ANSWER, "entities": ENTITIES, "target": 0}
ROW["messages"] = [{"role": "user", "content": "<image>" + QUESTION}, {"role": "assistant", "content": ANSWER}]
SOURCE = {"image": "a.png", "entity": "Lo", "category": "car", "bbox_px": [0, 0, 9, 9]}
NAN, SWAPPED = float("nan"), ANSWER.replace("(10", "(310")

def rows(**change):
    """s.jsonl of two samples, of which "b" has changes, or lacks what is None."""
    return [ROW | {"id": "a"}, {k: v for k, v in (ROW | {"id": "b"} | change).items() if v is not None}]

COMMANDS = {
    "synth_data": "--source s.jsonl --out out --num_workers 1 --num_samples 1 --max_bad_rows 0",
    "gen_cot": "--samples s.jsonl --knowledge k.json --out out",
    "filter": "--stage cot --samples s.jsonl --out out",
    "eval_kvg": "--bench s.jsonl --model {tiny} --out out",
    "train_sft": "--model {tiny} --data s.jsonl --output_dir out",
    "train_grpo": "--model {tiny} --data s.jsonl --output_dir out",
    "tools/karl": "--model {tiny} --data s.jsonl --output_dir out",
}
MESSAGES = [  # script, more flags, s.jsonl as rows or text, a line that it prints
    # a flag out of range
    ("synth_data", "--min_entities 7", [], "error: want 2 <= --min_entities <= --max_entities <= 6"),
    ("filter", "--stage grpo", [], "error: want --samples for cot and grpo, --predictions for grpo and mastery"),
    ("eval_kvg", "--predictions p.jsonl", [], "error: want one of --model and --predictions"),
    ("train_sft", "--zero_stage 4", [], "error: argument --zero_stage: invalid choice: 4"),
    ("train_grpo", "--num_generations 1", [], "error: want --num_generations >= 2"),
    # a missing file
    ("train_grpo", "", None, "No such file or directory: 's.jsonl'"),
    # broken JSON
    ("synth_data", "", json.dumps(SOURCE) + "\n[3]\n", r"s.jsonl:2: b'\[3\]'; want one JSON object a line"),
    ("filter", "", '{"id": "É"}', "s.jsonl:1: b'.*'; want one JSON object a line"),
    ("train_sft", "--data s.json", '[{"messages":', "s.json: .*; want"),
    # a missing column
    ("synth_data", "", [SOURCE, SOURCE | {"entity": None}], r"s.jsonl:2: .*, entity \[.*, None\]; want texts"),
    ("gen_cot", "", rows(target=None), r"s.jsonl:2 \(b\): no target; want images, entities, target, question, answer"),
    ("eval_kvg", "", rows(question=None, messages=None), r"s.jsonl:2 \(b\): .*question ''.*; want"),
    ("train_sft", "", rows(messages=None), "b: .*nothing to learn from; want an assistant's message"),
    ("train_grpo", "", rows(answer="left"), "b: .*answer 'left'; want a box"),
    # a box that is none
    ("synth_data", "", [SOURCE, SOURCE | {"bbox_px": [9, 0, 0, 9]}], r"s.jsonl: 1 bad, .*box: \[9, 0, 0, 9\]; want"),
    ("eval_kvg", "", rows(answer=SWAPPED), r"s.jsonl:2 \(b\): .*box \[310, 20, 300, 400\]; want x1 < x2"),
    ("train_sft", "", rows(bbox_px=[0, 0, NAN, 10]), r"s.jsonl:2 \(b\): .*box \[0, 0, nan, 10\]; want x1 < x2"),
    ("train_grpo", "", rows(bbox_px=[0, 0, 102, 10]), r"s.jsonl:2 \(b\): .*box \[0, 0, 102, 10\]; want .* within"),
    # an image that is not there, or none
    ("gen_cot", "", rows(entities=[ENTITIES[0], ENTITIES[1] | {"bbox_1000": [1, 2, 3, NAN]}]),
     r"s.jsonl:2 \(b\): .*nan\].*; want .* x1 < x2 and y1 < y2 in 0..1000"),
    ("gen_cot", "", rows(images=["none.png"]), r"s.jsonl:2 \(b\): no file none.png; want an image"),
    ("eval_kvg", "", rows(images=["none.png"]), r"\bb\b.*none.png"),
    ("train_sft", "", rows(images=["k.json"]), "b: .*cannot identify image file '.*k.json'"),
    # tokens other than pairs around names and boxes
    ("synth_data", "", [SOURCE, SOURCE | {"entity": "Lo<|im_end|>"}], r"s.jsonl:2: .*<\|im_end\|>'\]; want .* tokens"),
    ("eval_kvg", "", rows(question="<|im_end|>"), r"s.jsonl:2 \(b\): .*'<\|im_end\|>.*' in a text; want no tokens"),
    ("train_sft", "", rows(question="<|image_pad|>"), r"s.jsonl:2 \(b\): .*'<\|image_pad\|>.*' in a text; want"),
    # ids that occur twice, or nothing at all
    ("gen_cot", "", rows(id="a"), "s.jsonl: 2 rows, 1 ids; want some, each once"),
    ("eval_kvg", "", rows(id="a"), r"s.jsonl:2 \(a\): .*its id occurs twice; want unique ids"),
    ("synth_data", "", [], "s.jsonl: 0 usable, {}; want --min_entities of one category"),
    ("eval_kvg", "", [], "; want"),
    # what belongs together
    ("filter", "--stage grpo --predictions p.jsonl", rows(), "p.jsonl: 0 answers to a; want 2 with an iou"),
    ("tools/karl", "--knowledge k.json", rows(), "k.json: 'Lo', target of a: {}; want its mastery, 0..1"),
]

@pytest.fixture
def say(tmp_path, monkeypatch, capsys, tiny_dir):
    """Runs a command here, in a folder with a.png, k.json, p.jsonl; (exit code, its last line, all that it prints)."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 50), "red").save("a.png")
    (tmp_path / "k.json").write_text("{}")
    (tmp_path / "p.jsonl").touch()
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)  # who loads weights fails otherwise
    def start(script, flags):
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            monkeypatch.setenv(name, value)  # the scripts set them; undone after the test
        flags = f"{COMMANDS[script]} {flags}".format(tiny=tiny_dir).split()
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        with pytest.raises(SystemExit) as end:
            try:
                runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        (out, err), code = capsys.readouterr(), end.value.code
        return (1, code, out + code) if isinstance(code, str) else (code, err.strip().split("\n")[-1], err)
    return start


@pytest.mark.parametrize("script, flags, content, want", MESSAGES)
def test_a_mistake_is_one_line_before_weights_are_loaded(script, flags, content, want, say, tmp_path):
    if content is not None:
        text = "".join(json.dumps(r) + "\n" for r in content) if isinstance(content, list) else content
        (tmp_path / ("s.json" if "s.json" in flags else "s.jsonl")).write_text(text, encoding="latin-1")
    code, last, printed = say(script, flags)
    assert re.search(want, printed) and last.startswith(script.split("/")[-1]) and "\n" not in last, printed
    assert code == (2 if "error: " in want else 1)

def test_two_runs_into_one_folder_are_refused(say, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows()))
    lock = "import fcntl, sys; f = open('out/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert say("filter", "")[:2] == (1, "filter: out: another run writes here; want one at a time")
        other.communicate(b"\n")

def test_a_run_with_other_settings_goes_on_or_is_refused(tmp_path, capsys):
    run = {"seed": 0, "batch_size": 8}
    e.start_run(tmp_path, run, {"seed"})
    e.start_run(tmp_path, run | {"batch_size": 9}, {"seed"})
    assert f"{tmp_path}/run.json: goes on with other settings, {{'batch_size': '8 -> 9'}}" in capsys.readouterr().out
    with pytest.raises(e.InputError, match="'seed': '0 -> 1'.*; want the same settings, or another folder"):
        e.start_run(tmp_path, run | {"seed": 1}, {"seed"})
    assert json.loads((tmp_path / "run.json").read_text())["batch_size"] == 9, "a refused run changes nothing"

# ---- rows ----
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

# ---- boxes ----
def without_names(text):
    """The text with one letter in place of a name between ref tokens or of a JSON label."""
    bare, i = "", 0
    while i < len(text):
        rest, end = text[i:], 0
        label = rest.removeprefix('"label":').lstrip()
        if rest.startswith("<|object_ref_start|>") and "<|object_ref_end|>" in rest:
            end = rest.index("<|object_ref_end|>") + len("<|object_ref_end|>")
        elif rest.startswith('"label":') and label.startswith('"'):
            k = 1
            while k < len(label) and label[k] != '"':
                k += 2 if label[k] == "\\" else 1
            end = len(rest) - len(label) + k + 1 if k < len(label) else 0
        bare, i = bare + ("_" if end else text[i]), i + max(end, 1)
    return bare

def plain_parse(text, mode, grid):
    """What parse_bbox reads, number by number and sign by sign, without patterns."""
    if mode == "r1" or "<answer>" in text or "</answer>" in text:
        opened, closed = text.find("<answer>"), text.find("</answer>")
        one = text.count("<answer>") == text.count("</answer>") == 1 and opened < closed
        if not one or text[:opened].rfind("<think>") > text[:opened].rfind("</think>"):
            return None
        text = text[opened + len("<answer>") : closed]
    tokens = [""]
    for c in without_names(text):  # numbers stay whole, spaces part them
        if tokens[-1][:1] in DIGITS and (c in DIGITS or c == "." and "." not in tokens[-1]):
            tokens[-1] += c
        else:
            if tokens[-1][:1] in DIGITS and tokens[-1][-1] == ".":
                tokens += [tokens.pop()[:-1], "."]
            tokens.append(c)
    tokens, found, k = [t for t in tokens if t and not t.isspace()], set(), 0

    def values(start, form):  # of the numbers in `form`, if the tokens from `start` on have it
        part = tokens[start : start + len(form)]
        if ["0" if p[0] in DIGITS else p for p in part] == [*form]:
            return [float(p) for p in part if p[0] in DIGITS]

    while k < len(tokens):
        box, end = values(k, "(0,0)"), k + 5
        while box and (point := values(end, ",(0,0)")):
            box, end = box + point, end + 6
        if len(box or ()) < 4:
            box, end = values(k, "(0,0,0,0)") or values(k, "[0,0,0,0]"), k + 9
        found |= {tuple(box)} if box else set()
        k = end if box else k + 1
    box = found.pop() if len(found) == 1 else ()
    if len(box) != 4 or not (box[0] < box[2] <= grid[0] and box[1] < box[3] <= grid[1]):
        return None
    return [v if n == 1000 else v * 1000 / n for v, n in zip(box, grid * 2, strict=True)]

DIGITS = set("0123456789")
NUMBER = st.integers(0, 1000).map(str) | st.floats(0, 1000).map("{:.3f}".format) | st.sampled_from(
    ["0", "1000", "1001", "-3", "007", "1e3", ".5", "5.", "1.2.3", "9" * 400, "٣", "１２", "²", "1_0", "1 0"])
FORMS = st.sampled_from(["({},{}),({},{})", "({},{},{},{})", "[{},{},{},{}]", "[[{},{},{},{}]]", "({},{}),({},{}),"])
SOUND = st.tuples(*2 * [st.integers(0, 199)], *2 * [st.integers(200, 420)])
BOX = st.tuples(FORMS, SOUND | st.tuples(*4 * [NUMBER])).map(lambda x: x[0].format(*x[1]))
BOX = BOX | st.tuples(BOX, st.sampled_from([" ", "\n", " \t", "\u00a0"])).map(lambda x: re.sub(r"\b", x[1], x[0]))
PART = BOX | BOX | NUMBER | st.text(max_size=5) | st.sampled_from([
    *"()[],.-{}\\\" \n", "<answer>", "</answer>", "<think>", "</think>", "<|box_start|>", "<|box_end|>", '"bbox_2d": ',
    "<|object_ref_start|>", "<|object_ref_end|>", '"label": "', '"label":"Lo"', "(1,2)", "(1,2),", "\ud800"])
REPLY = st.lists(PART, max_size=6).map("".join)
REPLY |= REPLY.map("<think>so</think> <answer>{}</answer>".format) | REPLY.map("{}<answer>(1,2),(3,4)</answer>".format)

@settings(max_examples=600, **EXAMPLES)
@given(REPLY, st.sampled_from(["r1", "direct", "cot", "json"]), st.sampled_from([(1000, 1000), (560, 420)]))
def test_the_parser_reads_what_a_slow_plain_one_reads(text, mode, grid):
    assert e.parse_bbox(text, mode, grid) == plain_parse(text, mode, grid)

@pytest.mark.parametrize("text, want", [
    ("(1,2),(3,4)", [1, 2, 3, 4]), ("( 1 ,2) ,\n(3, 4.50)", [1, 2, 3, 4.5]), ("(1,2,3,4)", [1, 2, 3, 4]),
    ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "(5,6),(7,8)"}]\n```', [1, 2, 3, 4]),
    ("[1,2,3,4] or, again, (1,2),(3,4)", [1, 2, 3, 4]), ("2 of (3) in 1999: [[01, 2, 3, 4]]", [1, 2, 3, 4]),
    ("<|object_ref_start|>Porsche 911 (901, 930, 964, 993)<|object_ref_end|>(1,2),(3,4)", [1, 2, 3, 4]),
    ("[0,0,1.025582,1]", [0, 0, 1.025582, 1]),  # 1.025582 * 1000 / 1000 is another number
    *((text, None) for text in (
        "(1,2) (3,4)", "(1,2)(3,4)", "(1;2),(3;4)", "1,2,3,4", "[1,2],[3,4]", "[1,2,3]", "[1,2,3,4,5]", "(1,2)",
        "[-1,2,3,4]", "[3,2,1,4]", "[1,4,3,2]", "[1,2,1,4]", "[1,2,3,1000.001]", "[0.1,0.2,1e2,3]", "(1,2),(3,4),(5,6)",
        "[1,2,3,4٤]", "[1,2,3,4] [5,6,7,8]", "<|object_ref_start|>(1,2),(3,4)<|object_ref_end|>")),
])  # fmt: skip
def test_one_sound_box_is_read_in_every_notation_with_its_numbers_as_they_are(text, want):
    assert e.parse_bbox(f"<think>(5,6),(7,8)</think><answer>{text}</answer>") == e.parse_bbox(text, "direct") == want
