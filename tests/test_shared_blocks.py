"""Keeps the marked shared blocks byte-identical: `python tests/test_shared_blocks.py --fix` rewrites every copy."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["synth_data.py", "gen_cot.py", "filter.py", "eval_kvg.py", "train_sft.py", "train_grpo.py"]
TOOLS = ["tools/report.py", "tools/rows.py", "tools/plan.py", "tools/karl.py"]
SOURCES = {"files": "synth_data.py", "chain_rules": "gen_cot.py", "answers": "eval_kvg.py", "model": "eval_kvg.py",
           "rollout": "eval_kvg.py", "engine": "train_sft.py"}  # fmt: skip
BLOCK = re.compile(r"^# >>> shared:(\w+) \((?:source|copy of (\w+\.py))\)\n(.*?)^# <<< shared:\1\n", re.M | re.S)

def read(names):
    return {name: (ROOT / name).read_text("utf-8") for name in names}

def drift(texts):
    found = [(script, *block) for script, text in texts.items() for block in BLOCK.findall(text)]
    sources = {(script, name): body for script, name, copied, body in found if not copied}
    marks = {script: len(re.findall("^# [<>]{3} shared", text, re.M)) for script, text in texts.items()}
    wrong = [f"{s}: a marker is malformed" for s in texts if marks[s] != 2 * len(BLOCK.findall(texts[s]))]
    wrong += [f"{s}: a second source of {n}" for s, n in sources if (s, n) != next(k for k in sources if k[1] == n)]
    return wrong + [f"{script}: {name} differs from {copied}; run python tests/test_shared_blocks.py --fix"
                    for script, name, copied, body in found if copied and body != sources.get((copied, name))]

def defined(text):
    pairs = []
    for node in ast.parse(text).body:
        targets = [n for t in getattr(node, "targets", []) for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        pairs += [(n, ast.unparse(node)) for n in names + [t.id for t in targets if isinstance(t, ast.Name)]]
    return pairs

def twins(texts):
    places, codes = {}, {}
    for script, text in texts.items():
        for name in dict(defined(BLOCK.sub("", text))).keys() - {"main", "parse_args"}:
            places.setdefault(name, set()).add(script)
        for block, _, body in BLOCK.findall(text):
            for name, code in defined(body):
                codes.setdefault(name, {})[code] = block
    several = [*places.items(), *((name, {*blocks.values()}) for name, blocks in codes.items() if len(blocks) > 1)]
    return [f"{name} is defined in {where}" for name, where in several if len(where) > 1]

def test_every_copy_equals_its_source_and_no_name_is_defined_twice():
    texts = read(SCRIPTS)
    assert not drift(texts) + twins(texts)
    assert {n: s for s, text in texts.items() for n, copied, _ in BLOCK.findall(text) if not copied} == SOURCES

def test_tools_read_boxes_and_ask_questions_as_the_scripts_do():
    codes = {code for text in read(SCRIPTS).values() for _, code in defined(text)}
    names = ("NUMBER", "POINT", "FOUR", "BOXES", "QUESTION", "InputError")
    same = [(name, code) for text in read(TOOLS).values() for name, code in defined(text) if name in names]
    assert len(same) >= 6 and not [name for name, code in same if code not in codes]

def test_drift_is_seen():
    source = "# >>> shared:a (source)\nx = 1\n# <<< shared:a\n"
    copy = "# >>> shared:a (copy of a.py)\nx = 2\n# <<< shared:a\n"
    assert drift({"a.py": source, "b.py": copy}) and not drift({"a.py": source, "b.py": copy.replace("2", "1")})
    assert drift({"a.py": source, "b.py": source}) and drift({"a.py": source + "# <<< shared:b\n"})
    assert twins({"a.py": "x, y = 1, 2\n", "b.py": "y = 1\n"}) and twins({"a.py": source + copy.replace(":a", ":b")})

if __name__ == "__main__":
    texts = read(SCRIPTS)
    bodies = {name: body for text in texts.values() for name, copied, body in BLOCK.findall(text) if not copied}
    for script, text in texts.items() if sys.argv[1:] == ["--fix"] else ():
        (ROOT / script).write_text(BLOCK.sub(lambda m: m[0].replace(m[3], bodies[m[1]]), text), encoding="utf-8")
