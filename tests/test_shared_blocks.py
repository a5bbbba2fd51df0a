"""Keeps the marked shared blocks byte-identical.

`python tests/test_shared_blocks.py --fix` rewrites every copy from its source.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["synth_data.py", "gen_cot.py", "filter.py", "train_sft.py", "train_grpo.py", "eval_kvg.py"]
BLOCK = re.compile(r"^# >>> shared:(\w+) \((source|copy of (\w+\.py))\)\n(.*?)^# <<< shared:\1\n", re.M | re.S)


def blocks(text):
    """{name: (role, source script or None, body)} of one script."""
    return {name: (role, source, body) for name, role, source, body in BLOCK.findall(text)}


def read():
    return {s: (ROOT / s).read_text(encoding="utf-8") for s in SCRIPTS if (ROOT / s).exists()}


def drift(texts):
    """One line per marker that is malformed, has no or two sources, or differs from its source."""
    found, problems = {s: blocks(t) for s, t in texts.items()}, []
    sources = {}
    for script, text in texts.items():
        marks = len(re.findall(r"^# [<>]{3} shared", text, re.M))
        if marks != 2 * len(found[script]):
            problems.append(f"{script}: {marks} markers for {len(found[script])} blocks; a marker is malformed")
        for name, (role, _, _) in found[script].items():
            if role == "source":
                if name in sources:
                    problems.append(f"{name}: two sources, {sources[name]} and {script}")
                sources[name] = script
    for script, named in found.items():
        for name, (role, source, body) in named.items():
            if role == "source":
                continue
            if sources.get(name) != source:
                problems.append(f"{script}: {name} says copy of {source}, but the source is in {sources.get(name)}")
            elif body != found[source][name][2]:
                problems.append(f"{script}: {name} differs from {source}; run python tests/test_shared_blocks.py --fix")
    return problems


def twins(texts):
    """Names defined at top level of two scripts outside a marked block."""
    places = {}
    for script, text in texts.items():
        rest = BLOCK.sub("", text)
        for node in ast.parse(rest).body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            names += [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            for name in names:
                places.setdefault(name, []).append(script)
    return {n: s for n, s in places.items() if len(s) > 1 and n not in ("main", "parse_args")}


def test_every_copy_equals_its_source():
    assert not drift(read())


def test_no_name_is_defined_twice_outside_a_block():
    assert not twins(read())


def test_drift_is_seen():
    source = "# >>> shared:a (source)\nx = 1\n# <<< shared:a\n"
    copy = "# >>> shared:a (copy of a.py)\nx = 2\n# <<< shared:a\n"
    assert drift({"a.py": source, "b.py": copy}) and not drift({"a.py": source, "b.py": copy.replace("2", "1")})
    assert drift({"a.py": source, "b.py": source}) and drift({"a.py": source + "# <<< shared:b\n"})
    assert twins({"a.py": "def f(): pass\n", "b.py": "def f(): pass\n"}) and not twins({"a.py": source, "b.py": copy})


def fix():
    texts = read()
    bodies = {name: body for t in texts.values() for name, (role, _, body) in blocks(t).items() if role == "source"}
    for script, text in texts.items():
        new = BLOCK.sub(lambda m: m[0][: m.start(4) - m.start()] + bodies[m[1]] + m[0][m.end(4) - m.start() :], text)
        if new != text:
            (ROOT / script).write_text(new, encoding="utf-8")
            print(f"rewrote {script}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--fix"]:
        fix()
    print("\n".join(drift(read()) + [f"{n} is defined in {s}" for n, s in twins(read()).items()]) or "in order")
