"""train_grpo.py with one more reward, `letters`, that a random model can earn: its gradients are not all zero."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_grpo  # noqa: E402

train_grpo.REWARDS["letters"] = lambda text, sample, args: min(1.0, sum(c.isalpha() for c in text) / 60)
if __name__ == "__main__":
    train_grpo.main()
