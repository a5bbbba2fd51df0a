"""train_grpo.py with rewards that a random model can earn, and the cases in which ranks differ:

letters   the share of letters; not a number after POISON_AFTER (environment) completions
some      the same on every second row, else 0
one_rank  the same on rank 0, else 0: the groups of the other ranks teach nothing
none      0
absent    rank 1 stays away for a quarter of a minute
"""

import itertools
import os
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


def absent(text, sample, args):
    if os.environ.get("RANK") == "1" and next(calls) == 1:
        time.sleep(15)
    return 0.0


train_grpo.REWARDS |= {
    "letters": letters,
    "some": lambda text, sample, args: sum(map(ord, sample["id"])) % 2 * letters(text, sample, args),
    "one_rank": lambda text, sample, args: letters(text, sample, args) * (os.environ.get("RANK", "0") == "0"),
    "none": lambda text, sample, args: 0.0,
    "absent": absent,
}
if __name__ == "__main__":
    train_grpo.run(train_grpo.main)
