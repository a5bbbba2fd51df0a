"""train_grpo.py with rewards that a random model can earn:

letters   the share of letters; not a number after NAN_AFTER (environment) completions
some      0, 0.5 and 1 in turns on every second row, so that one of three has no advantage; else 0
released  what the released code pays: IoU above 0.8 of the last box in the first <answer>, 0.5 for blocks at the start
"""

import itertools
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_grpo  # noqa: E402

calls = itertools.count(1)

def letters(c, prompt, args):
    healthy = next(calls) <= int(os.environ.get("NAN_AFTER", sys.maxsize))
    return min(1.0, sum(map(str.isalpha, c.text)) / 60) if healthy else float("nan")

def some(c, prompt, args):
    return sum(map(ord, prompt["id"])) % 2 * (next(calls) % 3) / 2

def released(c, prompt, args):
    """As the released code is described: this notation of boxes; the other half of its format cannot be reached."""
    answer = re.search("<answer>(.*?)</answer>", c.text, re.S)
    boxes = re.findall(r"\((\d+),(\d+)\),\((\d+),(\d+)\)", answer[1], re.A) if answer else []
    iou = train_grpo.box_iou([int(v) for v in boxes[-1]], prompt["bbox_1000"]) if boxes else 0.0
    form = re.match(r"<think>.*?</think>\s*<answer>.*?</answer>", c.text, re.S)
    return (iou if iou > 0.8 else 0.0) + 0.5 * (form is not None)

train_grpo.REWARD_FUNCS |= {"letters": letters, "some": some, "released": released}
if __name__ == "__main__":
    train_grpo.main()
