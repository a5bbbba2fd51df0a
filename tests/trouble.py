"""A trainer in trouble: trouble.py train_sft --model ...

TERM_AT=N (environment) sends SIGTERM to the last rank when step N is logged, KILL_AT=checkpoint-N SIGKILL while that is
written. With two more rewards, which a random model can earn:

letters  the share of letters; not a number after NAN_AFTER (environment) completions
some     0, 0.5 and 1 in turns on every second row, so that one of three has no advantage; else 0
"""

import itertools
import os
import signal
import sys

import train_grpo
import train_sft

trainer, calls = {"train_sft": train_sft, "train_grpo": train_grpo}[sys.argv.pop(1)], itertools.count(1)
log_step, write = trainer.log_step, trainer.write

def letters(c, prompt, args):
    healthy = next(calls) <= int(os.environ.get("NAN_AFTER", sys.maxsize))
    return min(1.0, sum(map(str.isalpha, c.text)) / 60) if healthy else float("nan")

def some(c, prompt, args):
    return sum(map(ord, prompt["id"])) % 2 * (next(calls) % 3) / 2

def log_or_stop(engine, folder, row, *args):
    log_step(engine, folder, row, *args)
    if os.environ.get("TERM_AT") == str(row["step"]) and engine.global_rank == engine.world_size - 1:
        os.kill(os.getpid(), signal.SIGTERM)

def write_or_die(path, *lines):
    if f"{os.environ.get('KILL_AT')}.tmp" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *lines)

trainer.log_step, trainer.write = log_or_stop, write_or_die
train_grpo.REWARD_FUNCS |= {"letters": letters, "some": some}
if __name__ == "__main__":
    try:
        trainer.main()
    except (trainer.InputError, FileNotFoundError) as e:
        raise SystemExit(f"{trainer.__name__}: {e}") from None
