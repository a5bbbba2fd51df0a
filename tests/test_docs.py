"""What README.md and RESULTS.md say is so: flags, files and names exist, examples run, claimed numbers have a table."""

import ast
import importlib
import inspect
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image
from test_shared_blocks import SCRIPTS, TOOLS, defined

README, RESULTS = DOCS = [(ROOT / name).read_text("utf-8") for name in ("README.md", "RESULTS.md")]
BY_HAND = [str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py") if not re.match("test_(?!sh)", p.name)]
FLAG = re.compile(r"(?<![\w-])--[a-z]\w+")
ADDED = re.compile(r'(?:add|add_argument|==)\s?[(\[]\s*("--\w+"(?:, "--\w+")?)')  # with its other name
CODE = {name: (ROOT / name).read_text("utf-8") for name in (*SCRIPTS, *TOOLS, *BY_HAND)}
FLAGS = {name: {*FLAG.findall(" ".join(ADDED.findall(text)))} for name, text in CODE.items()}
OUTSIDE = r"pip install.*|(vllm|transformers) serve.*|apt-get.*|curl.*|pytest.*|--nproc_per_node.\S*|NODES=.*"
SECTIONS = dict(part.split("\n", 1) for part in re.split(r"^## ", README, flags=re.M)[1:])
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
CONVERTER, CHANGES = (text for kind, text in BLOCKS if kind == "python")

def inline(text):
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]

def metric_keys(*functions):
    source = "".join(map(inspect.getsource, functions))
    filled = (re.sub(r"\{(\w+)\}", r"<\1>", key) for key in re.findall(r'f"([a-z]+/[^"]*)"', source))
    return {*re.findall(r'"([\w/@.]+)"(?::|\] [|/*]?=)', source), *filled}

@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "run_all.sh", *SCRIPTS, *TOOLS])
def test_flags_exist_in_the_script_that_they_are_given_to(name):
    text = (ROOT / name).read_text("utf-8")
    text = ast.get_docstring(ast.parse(text)) if name.endswith(".py") else text
    assert not {*FLAG.findall(re.sub(OUTSIDE, "", text))} - set().union(*FLAGS.values())
    blocks = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    for command in blocks + inline(text):
        if found := re.search(r"(?:^|python )((?:\w+/)*\w+\.py) ([^#]*)", command):
            assert not {*FLAG.findall(found[2])} - FLAGS[found[1]], command

@pytest.mark.parametrize("text", DOCS)
def test_files_and_names_exist(text):
    said = "\n".join([*CODE.values(), (ROOT / "run_all.sh").read_text("utf-8"), *re.findall(r"^\|.*", RESULTS, re.M)])
    for code in set(inline(text)) - {"mine.jsonl", "cG", "PY", "COMMIT"}:
        if re.fullmatch(r"[\w/.-]+\.(py|sh|json|jsonl|md|png|html)", code):
            assert (ROOT / code).exists() or code.split("/")[-1] in said, code
        elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?", code) and not re.fullmatch(r"[0-9a-f]{7}", code):
            assert all(re.search(rf"(\b|(?<=grpo_)){part}\b", said) for part in code.split(".")), code

def test_the_algorithm_is_told_by_functions_of_train_grpo_and_every_metric_is_explained():
    names = {*dict(defined(CODE["train_grpo.py"])), *importlib.import_module("train_grpo").REWARD_FUNCS}
    told = {code for code in inline(SECTIONS["GRPO as executed"]) if not code.startswith(("--", "<"))}
    assert told <= names and len(told) >= 12 and len(shown := re.findall(r"^# .*?: (\w+)", CHANGES, re.M)) == 6
    assert {*shown} <= names
    grpo, sft, ask = (importlib.import_module(name) for name in ("train_grpo", "train_sft", "eval_kvg"))
    table, rest = SECTIONS["Metrics"].split("\n\n`metrics.json`")
    told = {key for line in table.splitlines() if line.startswith("| `") for key in inline(line.split("|")[1])}
    written = metric_keys(grpo.step_metrics, grpo.main, grpo.log_step, sft.main)
    assert told == written - {"ranks", "torch", "id", "bbox_1000", "completions"}  # run.json, samples.jsonl
    assert metric_keys(ask.split_metrics) <= {*inline(rest)}
    assert {k for k in inline(rest) if k.startswith("completions/")} <= metric_keys(ask.bench_metrics)

def test_the_converter_makes_rows_that_are_asked_and_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (200, 100)).save("a b.jpg")
    (tmp_path / "boxes.csv").write_text('file,name,x1,y1,x2,y2\na b.jpg,"Audi A4, red",20,10,100,60.5\n')
    monkeypatch.setattr(sys, "argv", ["convert.py", str(tmp_path)])
    exec(CONVERTER, {})
    for name in ("eval_kvg", "train_sft", "train_grpo"):
        (sample,), bad = importlib.import_module(name).read_samples([tmp_path / "mine.jsonl"])
        assert not bad and sample["bbox_1000"] == [100, 100, 500, 605] and ">Audi A4, red<" in sample["question"]

def test_one_thing_is_changed_by_the_lines_that_are_shown():
    g, text = {"__name__": __name__, "__file__": str(ROOT / "train_grpo.py")}, CODE["train_grpo.py"]
    exec(text.replace("\nif __name__", f"\n{CHANGES}\nif __name__"), g)
    args = g["parse_args"]("--model m --data d --output_dir o --reward_funcs iou short".split())
    assert g["REWARD_FUNCS"]["short"](SimpleNamespace(ids=[1] * 256), {}, args) == 0.1
    assert g["group_advantages"]([2.0, 0, 0.5, 0], "group") == [0.75, -0.25, -0.25, -0.25]
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    g["grpo_loss"](logps, logps.detach() - 1, None, torch.tensor([1.0, -1.0]), torch.ones(2), args)[0].backward()
    assert logps.grad.tolist() == pytest.approx([-1.2, 1.2]), "the ratio is clipped at 1.2, its gradient is there"

def test_every_number_that_is_claimed_stands_in_a_table_with_its_command_and_commit():
    number, sections = r"[+-]?\d+\.\d+", re.split(r"^#{2,3} ", RESULTS, flags=re.M)[1:]
    claims = [(s, c) for s in sections for c in re.findall(r"^\* .*(?:\n  .*)*", s, re.M)]
    claims += [(RESULTS, c) for c in re.findall(r"^\* .*", SECTIONS["Results"], re.M)]
    for section, claim in claims:
        claim, tables = " ".join(claim.split()), "".join(re.findall(r"^\|.*\n", section, re.M))
        claim = re.sub(r"the paper's Table 4.*?0\.15", "", claim)
        assert {*re.findall(number, claim)} <= {*re.findall(number, tables)}, claim
        assert all(cell in tables for cell in re.findall(rf"{number} \({number} to {number}\)", claim)), claim
    assert len(claims) > 20 and all("`" in s and "commit" in s for s in re.split(r"^## ", RESULTS, flags=re.M)[3:])

def test_the_readme_is_small_and_what_fits_is_the_planners_word(tmp_path):
    assert len(README.splitlines()) <= 250 and len(README.encode()) <= 20 * 1024 and len(CONVERTER.splitlines()) <= 10
    (tmp_path / "qwen2-vl-2b").symlink_to(ROOT / "tests/configs/qwen2-vl-2b")
    planned = run_script("tools/plan.py", "table", "--configs", tmp_path).stdout.splitlines()
    assert {*planned[:4]} <= {*README.splitlines()}
