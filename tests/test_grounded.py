"""What the reward `grounded` is paid for, and with what it can be cheated."""

from types import SimpleNamespace

import pytest

import train_grpo as g

RIGHT, WRONG = "(100,100),(500,500)", "(600,600),(900,900)"
BOX = f"<|object_ref_start|>Lo<|object_ref_end|><|box_start|>{RIGHT}<|box_end|>"
WRONG_BOX = BOX.replace(RIGHT, WRONG)

def chain(listed, end=RIGHT, answer=BOX, plan="Lo is a red disc."):
    return (f"<think>\nPlanning: {plan}\nVisual Analysis:\n{listed}\nComparison: only a red disc fits Lo.\n"
            f"Conclusion: Lo is a red disc {end}.\n</think> <answer>{answer}</answer>")  # fmt: skip

GRID = "\n".join(f"a disc ({x},{y}),({x + 100},{y + 100})" for y in range(0, 1000, 100) for x in range(0, 1000, 100))
CELLS = "\n".join(f"a disc ({x},{y}),({x + 333},{y + 500})" for y in (0, 500) for x in (0, 333, 666))
BOTH = f"a red disc {RIGHT}\na blue disc {WRONG}"
# (text, iou at --iou_threshold 0.8, format, grounded); iou_if_grounded pays iou x grounded
GROUNDED = {
    "honest": (chain(BOTH), 1, 1, 1),
    "honest, of a wrong object": (chain(BOTH, WRONG, WRONG_BOX), 0, 1, 1),  # it looks at no label: it cannot know
    # what it is there to see
    "no reasoning": (f"<think>\nIt is this one.\n</think> <answer>{BOX}</answer>", 1, 1, 0),
    "the object is not in the list": (chain(f"a blue disc {WRONG}"), 1, 1, 0),
    "the conclusion ends at another box": (chain(BOTH, WRONG), 1, 1, 0),
    "the answer is none of the list": (
        chain(BOTH, "(0,600),(400,900)", BOX.replace(RIGHT, "(0,600),(400,900)")), 0, 1, 0),
    "the conclusion has no box": (chain(BOTH, "there"), 1, 1, 0),
    "the list comes after the conclusion": (chain("a red disc", f"{RIGHT}\n{BOTH}\n{RIGHT}"), 1, 1, 0),
    "a second conclusion behind the list": (chain(f"Conclusion: so {BOTH}"), 1, 1, 0),
    "no conclusion": (chain(BOTH).replace("Conclusion", "So"), 1, 1, 0),
    "a box in a name alone": (chain(f"<|object_ref_start|>Lo {RIGHT}<|object_ref_end|>"), 1, 1, 0),
    "the list is a chain of points": (chain("(100,100),(500,500),(900,900)"), 1, 1, 0),
    "the list is behind </think>": (chain("a red disc").replace("</think>", f"</think> {BOTH}"), 1, 0.5, 0),
    "a little off": (chain(f"a red disc (100,100),(500,400)\na blue disc {WRONG}"), 1, 1, 1),  # IoU 0.75; 0 at 0.9
    "two answers": (chain(BOTH, answer=f"{BOX} {WRONG}"), 0, 0.5, 0),
    # what it can be cheated with: the right box is still wanted by iou, the reasoning is not
    "a list of one": (chain(f"a red disc {RIGHT}"), 1, 1, 1),
    "the answer copied into the list, by another look": (chain(f"a blue bowl {RIGHT}\na blue disc {WRONG}"), 1, 1, 1),
    "the answer copied into Planning": (chain("discs", plan=f"Lo is there: {RIGHT}."), 1, 1, 1),
    "reasoning about another object": (chain(f"{BOTH}", plan="Mi is a blue bowl."), 1, 1, 1),
    "boxes alone": (f"<think>\n{RIGHT} conclusion {RIGHT}\n</think> <answer>{BOX}</answer>", 1, 1, 1),
    # a grid of boxes pays only if one of them fits the answer: at six cells none does here, at a hundred none can
    "every cell of a 3 x 2 grid": (chain(CELLS), 1, 1, 0),
    "every cell of a 3 x 2 grid, answered by one": (
        chain(CELLS, "(0,0),(333,500)", BOX.replace(RIGHT, "(0,0),(333,500)")), 0, 1, 1),
    "every cell of a 10 x 10 grid": (chain(GRID), 1, 1, 0),
    "a grid, and the answer": (chain(f"{GRID}\n{RIGHT}"), 1, 1, 1),
}

@pytest.mark.parametrize("name", GROUNDED)
def test_grounded_pays_for_boxes_that_the_reasoning_wrote_down_and_for_nothing_else(name):
    text, *want = GROUNDED[name]
    args = SimpleNamespace(iou_threshold=0.8)
    prompt = {"bbox_1000": [100, 100, 500, 500], "grid": (1000, 1000), "style": g.BOX_STYLES["qwen2_vl"]}
    c = g.Completion([], None, True, text, g.parse_bbox(text))
    c.iou = g.box_iou(c.bbox_1000, prompt["bbox_1000"]) if c.bbox_1000 else 0.0
    rewards = (g.REWARD_FUNCS[name] for name in ("iou", "format", "grounded_0.7", "iou_if_grounded"))
    assert [reward(c, prompt, args) for reward in rewards] == [*want, want[0] * want[2]]

def test_grounded_counts_in_the_pixels_of_a_family_that_does():
    text = chain("a red disc (28,14),(140,70)", "(28,14),(140,70)", '{"bbox_2d": [28, 14, 140, 70], "label": "Lo"}')
    c = g.Completion([], None, True, text, g.parse_bbox(text, grid=(280, 140)))
    assert g.grounded_reward(c, {"grid": (280, 140)}, None, same_iou=0.9) == 1
