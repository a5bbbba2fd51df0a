"""train_grpo.py with rewards that a random model can earn: `letters`, and `some`, which pays on every second row."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_grpo  # noqa: E402

train_grpo.REWARDS["letters"] = lambda text, sample, args: min(1.0, sum(c.isalpha() for c in text) / 60)
train_grpo.REWARDS["some"] = lambda text, sample, args: (
    0.0 if sum(map(ord, sample["id"])) % 2 else train_grpo.REWARDS["letters"](text, sample, args)
)
if __name__ == "__main__":
    train_grpo.main()
