"""What the rewards pay for texts that try to be paid without finding the object.

Rules of the table: iou, binary and dense_iou look at nothing but the one box of the one closed answer block. format
pays 0.5 for the blocks and 0.5 for the notation, right or not: it keeps answers readable, and never pays for a box.
"""

from types import SimpleNamespace

import pytest

import train_grpo as g
from tools import karl

SAMPLE = {"bbox_1000": [100, 100, 500, 500], "grid": (1000, 1000), "style": g.BOX_STYLES["qwen2_vl"]}
ARGS = SimpleNamespace(iou_threshold=0.8)
NAME, RIGHT, WRONG = "<|object_ref_start|>{}<|object_ref_end|>", "(100,100),(500,500)", "(600,600),(900,900)"
BOX = f"{NAME.format('Lo')}<|box_start|>{RIGHT}<|box_end|>"

def answered(text):
    return f"<think>\nLo is red.\n</think> <answer>{text}</answer>"

# name: (text, iou, dense_iou, format); binary pays 1 where iou pays
ATTACKS = {
    "honest": (answered(BOX), 1, 1, 1),
    # no single box: which of them is meant is for the model to say; the blocks are in order
    "two boxes, the right one last": (answered(f"{WRONG} {BOX}"), 0, 0, 0.5),
    "a hundred boxes": (answered(" ".join(f"({i},{i}),({i + 400},{i + 400})" for i in range(100))), 0, 0, 0.5),
    # what stands in a name is never read as a box, and does not make another notation the family's own
    "box in the name alone": (answered(NAME.format(f"Lo {RIGHT}")), 0, 0, 0.5),
    "right box in the name, wrong one behind it": (answered(NAME.format(RIGHT) + WRONG), 0, 0, 1),
    "wrong box in the name, right one behind it": (answered(NAME.format(WRONG) + RIGHT), 1, 1, 1),
    "canonical box in the name, a list": (answered(NAME.format(f"Lo {RIGHT}") + "[100, 100, 500, 500]"), 1, 1, 0.5),
    "right label, wrong list": (answered(f'{{"bbox_2d": [600, 600, 900, 900], "label": "Lo {RIGHT}"}}'), 0, 0, 0.5),
    "right list, wrong label": (answered(f'{{"bbox_2d": [100, 100, 500, 500], "label": "\\"{WRONG}"}}'), 1, 1, 0.5),
    # a box of no use: dense_iou pays the overlap, which every smaller and better box exceeds
    "the whole image": (answered("(0,0),(1000,1000)"), 0, 0.16, 1),
    "a wrong box": (answered(WRONG), 0, 0, 1),
    "swapped corners": (answered("(500,500),(100,100)"), 0, 0, 0.5),
    # numbers that are none on the grid
    "just beyond the grid": (answered("(0,0),(1001,1000)"), 0, 0, 0.5),
    # no box in the answer
    "box in the reasoning alone": (f"<think>\n{BOX}\n</think> <answer>see above</answer>", 0, 0, 0.5),
    # blocks: not one closed answer outside of the reasoning
    "answer cut off": (f"<think>\nLo\n</think> <answer>{BOX}", 0, 0, 0),
    "answer inside think": (f"<think>\n<answer>{BOX}</answer>\n</think>", 0, 0, 0),
    "think never closed": (f"<think>\nLo <answer>{BOX}</answer>", 0, 0, 0),
    "answers inside think and after": (f"<think>\n<answer>{BOX}</answer>\n</think> <answer>{WRONG}</answer>", 0, 0, 0),
    "two answers": (answered(BOX) + f"<answer>{WRONG}</answer>", 0, 0, 0),
    "answer closed twice": (answered(BOX) + "</answer>", 0, 0, 0),
    # blocks: the box counts, it is the one of the one answer; the half of the format for the blocks does not
    "empty think": (f"<think></think> <answer>{BOX}</answer>", 1, 1, 0.5),
    "think of zero-width spaces": (f"<think>\u200b\u200b</think> <answer>{BOX}</answer>", 1, 1, 0.5),
    "no think": (f"<answer>{BOX}</answer>", 1, 1, 0.5),
    "two thinks": (f"<think>a</think><think>b</think> <answer>{BOX}</answer>", 1, 1, 0.5),
    "words before": ("Sure! " + answered(BOX), 1, 1, 0.5),
    "words after": (answered(BOX) + " or " + WRONG, 1, 1, 0.5),
    "words between": (answered(BOX).replace("</think> ", "</think> so "), 1, 1, 0.5),
    # notation: the same box in other words is right; the half of the format for the notation is for the family's own
    "the same box twice": (answered(f"{BOX} {BOX}"), 1, 1, 1),
    "the same box in two notations": (answered(f"{BOX} [100, 100, 500, 500]"), 1, 1, 1),
    "decimals": (answered("(100.0,100.0),(500.0,500.0)"), 1, 1, 0.5),
    "JSON": (answered('```json\n[{"bbox_2d": [100, 100, 500, 500], "score": 0.97, "size": [1, 2]}]\n```'), 1, 1, 0.5),
    # above the threshold it is the IoU, just below it is nothing
    "a little off": (answered("(100,100),(500,480)"), 0.95, 0.95, 1),
    "exactly at the threshold": (answered("(100,100),(500,420)"), 0, 0.8, 1),
}  # fmt: skip

WITH_KARL = ("iou", "binary", "dense_iou", "format", "karl")

def paid(text, prompt=SAMPLE, args=ARGS):
    c = g.Completion([], None, True, text, g.parse_bbox(text, grid=prompt["grid"]))
    c.iou = g.box_iou(c.bbox_1000, prompt["bbox_1000"]) if c.bbox_1000 else 0.0
    return {name: g.REWARD_FUNCS[name](c, prompt, args) for name in WITH_KARL[: 4 + ("level" in prompt)]}

@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_paid_what_the_table_says(name):
    text, iou, dense, form = ATTACKS[name]
    assert [*paid(text).values()] == pytest.approx([iou, float(iou > 0), dense, form])

JSON = {"bbox_1000": [100, 100, 500, 500], "grid": (280, 140), "style": g.BOX_STYLES["qwen2_5_vl"]}

@pytest.mark.parametrize("answer, iou, form", [
    ('```json\n[{"bbox_2d": [28, 14, 140, 70], "label": "Lo"}]\n```', 1, 1),
    ('[{"bbox_2d": [28, 14, 140, 70]}, {"bbox_2d": [0, 0, 9, 9]}]', 0, 0.5),
    ('{"bbox_2d": [100, 100, 500, 500]}', 0, 0.5),  # on a grid of 1000, which this family does not count in
    ('{"bbox_2d": [0, 0, 281, 70]}', 0, 0.5),
    ("(28,14),(140,70)", 1, 0.5),
    (r'{"bbox_2d": [0, 0, 9, 9], "label": "\"bbox_2d\": [28, 14, 140, 70]"}', 0, 1),
    (r'{"label": "\"bbox_2d\": [28, 14, 140, 70]"}', 0, 0.5),
])  # fmt: skip
def test_families_that_count_in_pixels_are_no_easier(answer, iou, form):
    assert paid(answered(answer), JSON) == {"iou": iou, "binary": iou, "dense_iou": pytest.approx(iou), "format": form}

def test_a_penalty_is_not_worth_dodging():
    """KARL's reward has no penalty without an answer block: leaving it out must cost more format than it saves."""
    for level in karl.LEVELS:
        prompt, args = SAMPLE | {"level": level}, SimpleNamespace(iou_threshold=0.65)
        wrong, dodged = (paid(text, prompt, args) for text in (answered(WRONG), "<think>\nLo is red.\n</think>"))
        assert wrong["karl"] + wrong["format"] > dodged["karl"] + dodged["format"] == 0
