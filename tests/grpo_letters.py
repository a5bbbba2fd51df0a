"""train_grpo.py with rewards that a random model can earn, and the cases in which ranks differ:

letters   the share of letters; not a number after POISON_AFTER (environment) completions
some      the same on every second row, else 0
one_rank  the same on rank 0, else 0: the groups of the other ranks teach nothing
none      0
released  what the released code pays: IoU above 0.8 of the last box in the first <answer>, 0.5 for blocks at the start
absent    rank 1 stays away for a quarter of a minute
"""

import itertools
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_grpo  # noqa: E402

calls = itertools.count(1)


def letters(text, sample, args):
    if next(calls) > int(os.environ.get("POISON_AFTER", sys.maxsize)):
        return float("nan")
    return min(1.0, sum(c.isalpha() for c in text) / 60)


def released(text, sample, args):
    """As the released code is described: this notation of boxes; the other half of its format cannot be reached."""
    answer = re.search("<answer>(.*?)</answer>", text, re.S)
    boxes = re.findall(r"\((\d+),(\d+)\),\((\d+),(\d+)\)", answer[1], re.A) if answer else []
    iou = train_grpo.box_iou([int(v) for v in boxes[-1]], sample["bbox_1000"]) if boxes else 0.0
    form = re.match(r"<think>.*?</think>\s*<answer>.*?</answer>", text, re.S)
    return (iou if iou > 0.8 else 0.0) + 0.5 * (form is not None)


def absent(text, sample, args):
    if os.environ.get("RANK") == "1" and next(calls) == 1:
        time.sleep(15)
    return 0.0


train_grpo.REWARDS |= {
    "letters": letters,
    "some": lambda text, sample, args: sum(map(ord, sample["id"])) % 2 * letters(text, sample, args),
    "one_rank": lambda text, sample, args: letters(text, sample, args) * (os.environ.get("RANK", "0") == "0"),
    "none": lambda text, sample, args: 0.0,
    "released": released,
    "absent": absent,
}
if __name__ == "__main__":
    train_grpo.run(train_grpo.main)
