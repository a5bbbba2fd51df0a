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
BLOCK = re.compile(r"^# >>> shared:(\w+) \((source|copy of (\w+\.py))\)\n(.*?)^# <<< shared:\1\n", re.M | re.S)


def read(names):
    return {name: (ROOT / name).read_text("utf-8") for name in names}


def blocks(text):
    """{name: (role, source script or None, body)} of one script."""
    return {name: (role, source, body) for name, role, source, body in BLOCK.findall(text)}


def drift(texts):
    """One line per marker that is malformed, has no or two sources, or differs from its source."""
    found, problems, sources = {s: blocks(t) for s, t in texts.items()}, [], {}
    for script, text in texts.items():
        if (marks := len(re.findall(r"^# [<>]{3} shared", text, re.M))) != 2 * len(found[script]):
            problems.append(f"{script}: {marks} markers for {len(found[script])} blocks; a marker is malformed")
        for name, (role, _, _) in found[script].items():
            if role == "source" and sources.setdefault(name, script) != script:
                problems.append(f"{name}: two sources, {sources[name]} and {script}")
    for script, named in found.items():
        for name, (_, source, body) in named.items():
            if source and sources.get(name) != source:
                problems.append(f"{script}: {name} says copy of {source}, but the source is in {sources.get(name)}")
            elif source and body != found[source][name][2]:
                problems.append(f"{script}: {name} differs from {source}; run python tests/test_shared_blocks.py --fix")
    return problems


def defined(text):
    """[(name, its code)] of what is defined at top level."""
    pairs = []
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        targets = [n for t in getattr(node, "targets", []) for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
        names += [t.id for t in targets if isinstance(t, ast.Name)]
        pairs += [(name, ast.unparse(node)) for name in names]
    return pairs


def twins(texts):
    """Names that two scripts define outside a marked block, and names that two blocks define in different ways."""
    places, codes = {}, {}
    for script, text in texts.items():
        for name in dict(defined(BLOCK.sub("", text))):
            places.setdefault(name, []).append(script)
        for block, (_, _, body) in blocks(text).items():
            for name, code in dict(defined(body)).items():
                codes.setdefault(name, {})[code] = block
    outside = {name: where for name, where in places.items() if len(where) > 1 and name not in ("main", "parse_args")}
    return outside | {name: list(other.values()) for name, other in codes.items() if len(other) > 1}


def test_every_copy_equals_its_source():
    texts = read(SCRIPTS)
    assert not drift(texts)
    assert {n: s for s, t in texts.items() for n, (role, _, _) in blocks(t).items() if role == "source"} == SOURCES


def test_no_name_is_defined_twice_outside_a_block_or_differently_in_two():
    assert not twins(read(SCRIPTS))


def test_tools_read_boxes_and_ask_questions_as_the_scripts_do():
    codes = {code for text in read(SCRIPTS).values() for _, code in defined(text)}
    names = ("NUMBER", "POINT", "FOUR", "BOXES", "QUESTION", "InputError")
    same = [(tool, name, code) for tool, text in read(TOOLS).items() for name, code in defined(text) if name in names]
    assert len(same) >= 6 and not [f"{tool}: {name}" for tool, name, code in same if code not in codes]


def test_drift_is_seen():
    source = "# >>> shared:a (source)\nx = 1\n# <<< shared:a\n"
    copy = "# >>> shared:a (copy of a.py)\nx = 2\n# <<< shared:a\n"
    assert drift({"a.py": source, "b.py": copy}) and not drift({"a.py": source, "b.py": copy.replace("2", "1")})
    assert drift({"a.py": source, "b.py": source}) and drift({"a.py": source + "# <<< shared:b\n"})
    assert drift({"b.py": copy}), "a copy without a source"
    assert twins({"a.py": "def f(): pass\n", "b.py": "def f(): pass\n"}) and not twins({"a.py": source, "b.py": source})
    assert twins({"a.py": "x, y = 1, 2\n", "b.py": "y = 1\n"}) and twins({"a.py": source + copy.replace(":a", ":b")})


def fix():
    texts = read(SCRIPTS)
    bodies = {name: body for t in texts.values() for name, (role, _, body) in blocks(t).items() if role == "source"}
    for script, text in texts.items():
        new = BLOCK.sub(lambda m: m[0][: m.start(4) - m.start()] + bodies[m[1]] + m[0][m.end(4) - m.start() :], text)
        if new != text:
            (ROOT / script).write_text(new, encoding="utf-8")
            print(f"rewrote {script}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--fix"]:
        fix()
    texts = read(SCRIPTS)
    print("\n".join(drift(texts) + [f"{n} is defined in {s}" for n, s in twins(texts).items()]) or "in order")
