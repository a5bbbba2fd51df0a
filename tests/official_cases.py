"""Makes official_cases.jsonl: 500 responses and what the released evaluator says of them, as data for test_eval_kvg.py.

`python tests/official_cases.py --evaluator PATH`; PATH is deepperception/eval/evaluate.py of github.com/thunlp/KARL at
commit 01b53d6^. Its file is run as it is; what it imports from `datasets`, `tqdm` and torchvision is stood in for.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import random
import sys
from pathlib import Path
from types import ModuleType


def notation(rng, box):
    """One box in one of the notations, with or without decimals, spaces and line breaks."""
    x1, y1, x2, y2 = (f"{v + rng.random():.{rng.randint(1, 3)}f}" if rng.random() < 0.15 else f"{v}" for v in box)
    s, t = rng.choice(("", "", " ", "\n")), rng.choice(("", " ", "  "))
    return rng.choice((
        f"({x1},{y1}),({x2},{y2})", f"({x1},{y1}),({x2},{y2})", f"({x1},{t}{y1}),{s}({x2},{t}{y2})",
        f"({x1}, {y1}) {s}({x2}, {y2})", f"({x1}, {y1}){s}to ({x2}, {y2})", f"({t}{x1},{y1}{t}){s},({x2},{y2})",
        f"({x1},{t}{y1},{t}{x2},{t}{y2})", f"[{x1},{t}{y1},{t}{x2},{t}{y2}]", f"[[{x1}, {y1}, {x2}, {y2}]]",
        f"[{x1}, {y1}], [{x2}, {y2}]", f'```json\n[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "x"}}]\n```',
        f'{{"bbox": [{x1},{y1},{x2},{y2}]}}', f"x1={x1}, y1={y1}, x2={x2}, y2={y2}", f"(x{x1},{y1}),({x2},{y2})",
        f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>", f"{x1}, {y1}, {x2}, {y2}",
        f"({x1}, {y1})\n({x2}, {y2})", f"([{x1}, {y1}], [{x2}, {y2}])", f"(({x1},{y1}),({x2},{y2}))",
        f"({x1},{y1},),({x2},{y2})",
    ))  # fmt: skip

ODD = (
    "(nan, 1) (2, 3)", "(inf,1) and (2,3)", "(1e2,1_0) (300, 400)", "(١,٢),(٣,٤)", "(,),(,)", "(,) (,)", "[, , , ]",
    "(a, b) c (d, e)", "(1,2", "[1, 2, 3", "()", "(2,3),(4,5),(6,7)", "(٠,٠),(٩٠٠,٩٠٠)", "(9" + "9" * 400 + ",1),(2,3)",
    "<answer></answer>", "<answer>", "</answer>", "[[[1, 2, 3, 4]]]", "(-5, 2) (300, 400)", "[x10, 20, 300, 400]", "(",
)  # fmt: skip
PROSE = (
    "The wings (both of them, that is) are short.", "It has stripes (white, I think).", "There are two (2) birds.",
    "In 1999 (see (a), (b)), it was built.", "So the answer is here: ", "No box.", "The left one, [sic], is it.",
    "(1) first, (2) second.", "(1, 2) marks the corner.", "Between 10 and 300, (10, 20), it stands.", "",
)  # fmt: skip

def response(rng, box):
    """An answer as models give it, right or wrong in one of many ways."""
    near = [min(1000, max(0, v + rng.randint(-12, 12))) for v in box]
    other = [rng.randint(0, 500), rng.randint(0, 500), rng.randint(501, 1000), rng.randint(501, 1000)]
    kind, answer = rng.randrange(13), notation(rng, near)
    think = " ".join(rng.choice(PROSE) for _ in range(rng.randint(0, 2)))
    if kind == 0:
        answer = rng.choice((" and ", " or\n", ",", "")).join(rng.sample([answer, notation(rng, other)], 2))
    elif kind == 1:
        think, answer = think + notation(rng, other), answer + rng.choice(("", " ", "."))
    elif kind == 2:
        think, answer = think + notation(rng, near), rng.choice(PROSE)
    elif kind == 3:
        answer = ("({}, {}), ({}, {})" if rng.random() < 0.5 else "[{}, {}, {}, {}]").format(*(v / 1000 for v in near))
    elif kind == 4:
        answer = rng.choice(ODD)
    elif kind == 5:
        answer = notation(rng, near[2:] + near[:2] if rng.random() < 0.5 else [v * 2 for v in near])
    elif kind == 6:
        answer = f"{rng.choice(PROSE)} {answer} {rng.choice(PROSE)}"
    elif kind == 7:
        answer = notation(rng, [0, 0, rng.randint(0, 3), 1])
    head, tail = rng.choice((("<answer>", "</answer>"), ("<answer> ", " </answer>"), ("<answer>\n", "\n</answer>")))
    whole = f"<think>{think}</think>{rng.choice(('', ' ', chr(10)))}{head}{answer}{tail}"
    if kind == 8:
        return whole[: rng.randint(0, len(whole))]
    if kind == 9:
        return rng.choice((think + " ", "So the answer is ", "", "So the answer is (here), ")) + answer
    return whole + rng.choice((answer, notation(rng, other), whole, rng.choice(ODD))) if kind == 10 else whole

def evaluator(path):
    """The released file as a module."""
    for name in ("datasets", "tqdm", "torchvision", "torchvision.ops", "torchvision.ops.boxes"):
        sys.modules[name] = ModuleType(name)
    sys.modules["datasets"].load_dataset = sys.modules["tqdm"].tqdm = None
    sys.modules["torchvision.ops.boxes"].box_area = lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    spec = importlib.util.spec_from_file_location("released_evaluator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--evaluator", required=True, help="the released evaluate.py")
    p.add_argument("--out", default=Path(__file__).with_name("official_cases.jsonl"), type=Path)
    args = p.parse_args()
    rng, released, lines = random.Random(0), evaluator(args.evaluator), []
    for _ in range(500):
        gt = [rng.randint(0, 400), rng.randint(0, 400), rng.randint(450, 1000), rng.randint(450, 1000)]
        text = response(rng, gt)
        with contextlib.redirect_stdout(io.StringIO()):
            [row], metrics = released.calculate_ious("all", [{"answer": text, "gt_bbox": [gt]}])
        official = {"bbox": [repr(v) for v in map(float, row["pred_bbox"])], "pattern": row["match pattern"],
                    "iou": row["iou"], "correct": metrics["all"]["Acc"] == 1}  # fmt: skip
        lines.append(json.dumps({"response": text, "gt_bbox_1000": gt, "official": official}) + "\n")
    args.out.write_text("".join(lines), encoding="utf-8")
    print(f"official_cases: {len(lines)} cases -> {args.out}")
