"""train_grpo.py with one more reward, `grounded`: reasoning that is looked at, without labels or a second model.

  python tests/toy/grounded.py --reward_funcs iou format grounded_0.7 ...     the other flags are those of train_grpo.py
"""

import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_grpo  # noqa: E402
from train_grpo import BOXES, NAMES, box_iou, parse_bbox  # noqa: E402


def grounded_reward(c, prompt, args, same_iou):
    """1 where the reasoning wrote the answered box down before its conclusion, and ends at it; else 0."""
    think = NAMES.sub("_", c.text.partition("<think>")[2].partition("</think>")[0])
    listed, *end = re.split("conclusion", think, maxsplit=1, flags=re.I)

    def agree(text):  # with the answered box, for each box in it
        boxes = (parse_bbox(m[0], "direct", prompt["grid"]) for m in BOXES.finditer(text))
        return [bool(b) and box_iou(b, c.bbox_1000) >= same_iou for b in boxes]

    return float(bool(c.bbox_1000 and end) and any(agree(listed)) and agree(end[0])[-1:] == [True])

for iou in (0.7, 0.9):
    train_grpo.REWARD_FUNCS[f"grounded_{iou}"] = partial(grounded_reward, same_iou=iou)
if __name__ == "__main__":
    train_grpo.main()
