"""Runs a trainer and writes the gradients of its first update: dump_gradients.py train_sft OUT.pt --model ...

Whole gradients, gathered over the ranks; what DeepSpeed is about to clip and to give to the optimizer.
"""

import sys

import grpo_letters  # noqa: F401, adds its rewards
import torch
from deepspeed.utils import safe_get_full_grad

import train_grpo
import train_sft

trainer, out = {"train_sft": train_sft, "train_grpo": train_grpo}[sys.argv[1]], sys.argv[2]
start_engine = trainer.start_engine


def start_dumping_engine(scorer, args):
    engine = start_engine(scorer, args)
    step = engine.step

    def dump_and_step():
        gradients = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if p.requires_grad}
        if engine.global_rank == 0:
            torch.save(gradients, out)
        engine.step = step
        step()

    engine.step = dump_and_step
    return engine


trainer.start_engine = start_dumping_engine
sys.argv = [sys.argv[0], *sys.argv[3:]]
trainer.main()
