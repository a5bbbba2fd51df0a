"""What the rewards pay for texts that try to be paid without finding the object, next to what the released reward paid.

Rules, so that the table can be read: iou, binary and dense_iou look at nothing but the one box of the one closed answer
block. format pays 0.5 for the blocks and 0.5 for the notation, whether the box is right or not: it is there to keep
answers readable. So a wrong answer in the right form earns format, and that is meant; what it can never earn is iou.
"""

from types import SimpleNamespace

import pytest
from grpo_letters import released

import train_grpo as g
from tools import karl

SAMPLE = {"bbox_1000": [100, 100, 500, 500], "grid": (1000, 1000), "style": g.BOX_STYLES["qwen2_vl"]}
ARGS = SimpleNamespace(iou_threshold=0.8)
NAME, RIGHT, WRONG = "<|object_ref_start|>{}<|object_ref_end|>", "(100,100),(500,500)", "(600,600),(900,900)"
BOX = f"{NAME.format('Lo')}<|box_start|>{RIGHT}<|box_end|>"

def answered(text):
    return f"<think>\nLo is red.\n</think> <answer>{text}</answer>"

# name: (text, iou, binary, dense_iou, format, released)
# released: R_iou (IoU above 0.8 of the last box in the first <answer>) + R_format (0.5 if a think and an answer block
# stand at the start, trailing text allowed; its box half could not be reached); None where its code is not known to us
ATTACKS = {
    "honest": (answered(BOX), 1, 1, 1, 1, 1.5),
    # no single box: which of them is meant is for the model to say; the blocks are in order
    "two boxes, the right one last": (answered(f"{WRONG} {BOX}"), 0, 0, 0, 0.5, 1.5),
    "two boxes, the right one first": (answered(f"{BOX} {WRONG}"), 0, 0, 0, 0.5, 0.5),
    "a hundred boxes": (
        answered(" ".join(f"({x},{y}),({x + 400},{y + 400})" for x in range(0, 500, 50) for y in range(0, 500, 50))),
        0, 0, 0, 0.5, 0.5),
    "another box in a comment": (answered(f"<!-- {WRONG} -->{BOX}"), 0, 0, 0, 0.5, 1.5),
    "another box in another notation": (answered(f"[600, 600, 900, 900] {BOX}"), 0, 0, 0, 0.5, None),
    "chain of points": (answered("(100,100),(500,500),(900,900)"), 0, 0, 0, 0.5, None),
    "a second box that is upside down": (answered(f"{BOX} (900,900),(600,600)"), 0, 0, 0, 0.5, None),
    # what stands in a name is never read as a box, and does not make another notation the family's own
    "box in the name alone": (answered(NAME.format(f"Lo {RIGHT}")), 0, 0, 0, 0.5, 1.5),
    "right box in the name, wrong one behind it": (answered(NAME.format(RIGHT) + WRONG), 0, 0, 0, 1, 0.5),
    "wrong box in the name, right one behind it": (answered(NAME.format(WRONG) + RIGHT), 1, 1, 1, 1, 1.5),
    "canonical box in the name, a list as the box": (
        answered(NAME.format(f"Lo {RIGHT}") + "[100, 100, 500, 500]"), 1, 1, 1, 0.5, 1.5),
    "right box in the label, wrong list": (
        answered(f'{{"bbox_2d": [600, 600, 900, 900], "label": "Lo {RIGHT}"}}'), 0, 0, 0, 0.5, 1.5),
    "right list, wrong box in the label": (
        answered(f'{{"bbox_2d": [100, 100, 500, 500], "label": "\\"{WRONG}"}}'), 1, 1, 1, 0.5, 0.5),
    "both boxes in the label": (answered(f'{{"label": "{WRONG} {RIGHT}"}}'), 0, 0, 0, 0.5, 1.5),
    "label that never ends": (answered(f'{{"label": "{WRONG} {RIGHT}'), 0, 0, 0, 0.5, 1.5),
    "name that never ends": (answered(f"<|object_ref_start|>{WRONG} {RIGHT}"), 0, 0, 0, 0.5, 1.5),
    "name of four numbers": (answered(BOX.replace("Lo", "Porsche 911 (901, 930, 964, 993)")), 1, 1, 1, 1, 1.5),
    "name of years": (answered(BOX.replace("Lo", "Chardonnay [2012, 2013, 2014, 2015]")), 1, 1, 1, 1, 1.5),
    # a box of no use: dense_iou pays the overlap, which every smaller and better box exceeds
    "the whole image": (answered("(0,0),(1000,1000)"), 0, 0, 0.16, 1, 0.5),
    "a box around it": (answered("(50,50),(600,600)"), 0, 0, 16 / 30.25, 1, 0.5),
    "a wrong box": (answered(WRONG), 0, 0, 0, 1, 0.5),
    "swapped corners": (answered("(500,500),(100,100)"), 0, 0, 0, 0.5, None),
    "one pair swapped": (answered("(500,100),(100,500)"), 0, 0, 0, 0.5, None),
    "no area": (answered("(300,300),(300,300)"), 0, 0, 0, 0.5, 0.5),
    # numbers that are none on the grid
    "huge numbers": (answered("(0,0),(99999,99999)"), 0, 0, 0, 0.5, 0.5),
    "number without end": (answered(f"(100,100),(500,{'9' * 5000})"), 0, 0, 0, 0.5, None),
    "just beyond the grid": (answered("(0,0),(1001,1000)"), 0, 0, 0, 0.5, 0.5),
    "negative": (answered("(-100,100),(500,500)"), 0, 0, 0, 0.5, None),
    "with a plus": (answered("(+100,+100),(+500,+500)"), 0, 0, 0, 0.5, None),
    "percent": (answered("(10%,10%),(50%,50%)"), 0, 0, 0, 0.5, None),
    "fractions": (answered("[0.1, 0.1, 0.5, 0.5]"), 0, 0, 0, 0.5, None),
    "scientific": (answered("(1e2,1e2),(5e2,5e2)"), 0, 0, 0, 0.5, None),
    "infinite": (answered("(0,0),(inf,inf)"), 0, 0, 0, 0.5, None),
    "nan": (answered("(nan,nan),(nan,nan)"), 0, 0, 0, 0.5, None),
    "Arabic digits": (answered("(١٠٠,١٠٠),(٥٠٠,٥٠٠)"), 0, 0, 0, 0.5, None),
    "full-width digits": (answered("(１００,１００),(５００,５００)"), 0, 0, 0, 0.5, None),
    "full-width brackets": (answered("（100,100），（500,500）"), 0, 0, 0, 0.5, None),
    "zero-width space in a number": (answered("(10\u200b0,100),(500,500)"), 0, 0, 0, 0.5, None),
    "five numbers": (answered("[100, 100, 500, 500, 0.9]"), 0, 0, 0, 0.5, None),
    "named sides": (answered("x1=100, y1=100, x2=500, y2=500"), 0, 0, 0, 0.5, None),
    # no box in the answer
    "empty answer": (answered(""), 0, 0, 0, 0.5, 0.5),
    "prose": (answered("It is the left one."), 0, 0, 0, 0.5, 0.5),
    "the question again": (answered("Find and give the bounding box of <|object_ref_start|>Lo<|object_ref_end|>"),
                           0, 0, 0, 0.5, 0.5),
    "the prompt's tags again": (answered("<think> </think> and <answer> </answer> tags."), 0, 0, 0, 0, 0.5),
    "box in the reasoning alone": (f"<think>\n{BOX}\n</think> <answer>see above</answer>", 0, 0, 0, 0.5, 0.5),
    # blocks: not one closed answer outside of the reasoning
    "no answer block": (f"<think>\n{BOX}\n</think>", 0, 0, 0, 0, 0),
    "box alone": (BOX, 0, 0, 0, 0, 0),
    "answer cut off": (f"<think>\nLo\n</think> <answer>{BOX}", 0, 0, 0, 0, 0),
    "answer inside think": (f"<think>\n<answer>{BOX}</answer>\n</think>", 0, 0, 0, 0, 1),
    "think never closed": (f"<think>\nLo <answer>{BOX}</answer>", 0, 0, 0, 0, 1),
    "answers inside think and after": (
        f"<think>\n<answer>{BOX}</answer>\n</think> <answer>{WRONG}</answer>", 0, 0, 0, 0, 1.5),
    "two answers": (answered(BOX) + f"<answer>{WRONG}</answer>", 0, 0, 0, 0, 1.5),
    "the same answer twice": (answered(BOX) * 2, 0, 0, 0, 0, 1.5),
    "nested answers": (answered(f"<answer>{BOX}</answer>"), 0, 0, 0, 0, 1.5),
    "answer closed twice": (answered(BOX) + "</answer>", 0, 0, 0, 0, 1.5),
    "closed before it opens": (f"</answer>{BOX}<answer>", 0, 0, 0, 0, 0),
    "capital tags": (answered(BOX).replace("answer>", "ANSWER>"), 0, 0, 0, 0, 0),
    "zero-width space in a tag": (answered(BOX).replace("<answer>", "<ans\u200bwer>"), 0, 0, 0, 0, 0),
    "spaces in a tag": (answered(BOX).replace("<answer>", "< answer >"), 0, 0, 0, 0, 0),
    # blocks: the box counts, it is the one of the one answer; the half of the format for the blocks does not
    "empty think": (f"<think></think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "think of spaces": (f"<think> \n\t </think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "think of zero-width spaces": (f"<think>\u200b\u200b</think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "think of dots": (f"<think>......</think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "tags alone": ("<think></think><answer></answer>", 0, 0, 0, 0, 0.5),
    "no think": (f"<answer>{BOX}</answer>", 1, 1, 1, 0.5, 1),
    "think after the answer": (f"<answer>{BOX}</answer> <think>Lo is red.</think>", 1, 1, 1, 0.5, 1),
    "two thinks": (f"<think>a</think><think>b</think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "think nested in think": (f"<think>a <think>b</think></think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "words before": ("Sure! " + answered(BOX), 1, 1, 1, 0.5, 1),
    "words after": (answered(BOX) + " or " + WRONG, 1, 1, 1, 0.5, 1.5),
    "words between": (answered(BOX).replace("</think> ", "</think> so "), 1, 1, 1, 0.5, 1),
    # notation: the same box in other words is right; the half of the format for the notation is for the family's own
    "the same box twice": (answered(f"{BOX} {BOX}"), 1, 1, 1, 1, 1.5),
    "the same box in two notations": (answered(f"{BOX} [100, 100, 500, 500]"), 1, 1, 1, 1, 1.5),
    "leading zeros": (answered("(0100,0100),(0500,0500)"), 1, 1, 1, 1, 1.5),
    "decimals": (answered("(100.0,100.0),(500.0,500.0)"), 1, 1, 1, 0.5, 0.5),
    "compact list": (answered("[100,100,500,500]"), 1, 1, 1, 0.5, 0.5),
    "spaces": (answered("( 100, 100 ), ( 500, 500 )"), 1, 1, 1, 0.5, None),
    "nested list": (answered("[[100, 100, 500, 500]]"), 1, 1, 1, 0.5, None),
    "JSON in a code fence, with a score": (
        answered('```json\n[{"bbox_2d": [100, 100, 500, 500], "label": "Lo", "score": 0.97, "size": [1, 2]}]\n```'),
        1, 1, 1, 0.5, None),
    "a negative box besides": (answered(f"{BOX} (-1,2),(3,4)"), 1, 1, 1, 1, None),
    # above the threshold it is the IoU, just below it is nothing
    "a little off": (answered("(100,100),(500,480)"), 0.95, 1, 0.95, 1, 1.45),
    "exactly at the threshold": (answered("(100,100),(500,420)"), 0, 0, 0.8, 1, 0.5),
}  # fmt: skip

WITH_KARL = ("iou", "binary", "dense_iou", "format", "karl")

def paid(text, prompt=SAMPLE, args=ARGS):
    """{reward: what it pays}; box and IoU as rollout_and_score sets them."""
    c = g.Completion([], None, True, text, g.parse_bbox(text, grid=prompt["grid"]))
    c.iou = g.box_iou(c.bbox_1000, prompt["bbox_1000"]) if c.bbox_1000 else 0.0
    return {name: g.REWARD_FUNCS[name](c, prompt, args) for name in WITH_KARL[: 4 + ("level" in prompt)]}

@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_paid_what_the_table_says(name):
    text, *want, theirs = ATTACKS[name]
    assert [*paid(text).values()] == pytest.approx(want)
    assert theirs is None or released(SimpleNamespace(text=text), SAMPLE, ARGS) == pytest.approx(theirs)

def test_no_attack_earns_more_than_the_honest_answer_and_hedges_earn_less():
    ours = {name: paid(text)["iou"] + paid(text)["format"] for name, (text, *_) in ATTACKS.items()}
    assert max(ours.values()) == ours["honest"]
    overpaid = [name for name, (*_, theirs) in ATTACKS.items() if theirs == 1.5 and ours[name] < ours["honest"]]
    assert len(overpaid) >= 16, "what the released reward paid in full and ours does not"

JSON = {"bbox_1000": [100, 100, 500, 500], "grid": (280, 140), "style": g.BOX_STYLES["qwen2_5_vl"]}

@pytest.mark.parametrize("answer, iou, form", [
    ('```json\n[{"bbox_2d": [28, 14, 140, 70], "label": "Lo"}]\n```', 1, 1),
    ('[{"bbox_2d": [28, 14, 140, 70]}, {"bbox_2d": [0, 0, 9, 9]}]', 0, 0.5),
    ('{"bbox_2d": [100, 100, 500, 500]}', 0, 0.5),  # on a grid of 1000, which this family does not count in
    ('{"bbox_2d": [0, 0, 281, 70]}', 0, 0.5),
    ('{"bbox_2d": [140, 70, 28, 14]}', 0, 0.5),
    ('{"bbox_2d": [-28, 14, 140, 70]}', 0, 0.5),
    ('{"bbox_2d": "28, 14, 140, 70"}', 0, 0.5),
    ('{"bbox_2d": [28, 14, 140, 70], "bbox_2d": [28, 14, 140, 71]}', 0, 0.5),
    ("(28,14),(140,70)", 1, 0.5),
    ('{"bbox_2d": [28, 14, 140, 70], "label": "Porsche 911 (901, 930, 964, 993)"}', 1, 1),
    (r'{"bbox_2d": [0, 0, 9, 9], "label": "\"bbox_2d\": [28, 14, 140, 70]"}', 0, 1),
    (r'{"label": "\"bbox_2d\": [28, 14, 140, 70]"}', 0, 0.5),
])  # fmt: skip
def test_families_that_count_in_pixels_are_no_easier(answer, iou, form):
    got = paid(answered(answer), JSON)
    assert (got["iou"], got["format"]) == pytest.approx((iou, form))

def test_a_penalty_is_not_worth_dodging():
    """KARL's reward has no penalty without an answer block: leaving it out must cost more format than it saves."""
    for level in karl.LEVELS:
        prompt, args = SAMPLE | {"level": level}, SimpleNamespace(iou_threshold=0.65)
        wrong, dodged = (paid(text, prompt, args) for text in (answered(WRONG), "<think>\nLo is red.\n</think>"))
        assert wrong["karl"] + wrong["format"] > dodged["karl"] + dodged["format"] == 0
