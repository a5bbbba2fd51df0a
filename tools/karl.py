"""Stage 2 with KARL (version 3 of the paper): what the model knows less of is pulled up more and punished less.
  python tools/karl.py --knowledge runs/filter_grpo/mastery.json --model ...        or torchrun tools/karl.py ...
runs train_grpo.py, whose flags it takes, with its advantages scaled; with `--reward_funcs karl format`, as published,
the reward is scaled instead, most of which the mean and std of the group undo."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_grpo as g  # noqa: E402

LEVELS = {  # level: mastery from, s+ (times a hit), s- (instead of a miss's 0)
    "completely correct": (0.7, 0.65, -0.6), "mostly correct": (0.45, 0.85, -0.5),
    "partially correct": (0.3, 1.0, -0.4), "mostly incorrect": (0.1, 1.2, -0.2), "completely incorrect": (0, 1.4, 0.0)}

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--knowledge", required=True, help="mastery.json of filter.py, or KARL's own")
    own, rest = p.parse_known_args(argv)
    return argparse.Namespace(**vars(g.parse_args(rest)), **vars(own))

def add_levels(samples, bad, path):
    """(samples, bad), these with their "level", by {entity: {"mastery": 0..1} or {"knowledge_category": level}}."""
    table = json.loads(Path(path).read_bytes())
    for s in samples:
        entry = table.get(s["entity"], {})
        level, mastery = entry.get("knowledge_category"), entry.get("mastery", -1)
        s["level"] = next((name for name, (least, _, _) in LEVELS.items() if mastery >= least), level)
        if s["level"] not in LEVELS:  # KARL's code silently takes a missing entity for completely incorrect
            raise g.InputError(f"{path}: {s['entity']!r}, target of {s['id']}: {entry}; want its mastery, 0..1")
    return samples, bad

def karl_reward(c, prompt, args):
    """s+ times IoU, at most 1, where it exceeds the threshold; s- for an answered miss; no answer, no penalty."""
    _, s_plus, s_minus = LEVELS[prompt["level"]]
    missed = s_minus if "</answer>" in c.text.partition("<answer>")[2] else 0.0
    return min(1.0, s_plus * c.iou) if c.iou > args.iou_threshold else missed
g.REWARD_FUNCS["karl"] = karl_reward

def score_and_weigh(engine, processors, prompts, step, args, times, score=g.rollout_and_score):
    """Advantages times s+ where right, s- over the middle level's where wrong; mean and std cannot undo it."""
    score(engine, processors, prompts, step, args, times)
    for p in prompts if "karl" not in args.reward_funcs else ():
        _, s_plus, s_minus = LEVELS[p["level"]]
        for c in p["completions"]:
            c.advantage *= s_plus if c.advantage >= 0 else s_minus / LEVELS["partially correct"][2]

def main():
    args, read_samples = parse_args(), g.read_samples
    g.parse_args, g.rollout_and_score = lambda: args, score_and_weigh
    g.read_samples = lambda *where: add_levels(*read_samples(*where), args.knowledge)
    g.main()

if __name__ == "__main__":
    try:
        main()
    except (g.InputError, FileNotFoundError) as e:
        raise SystemExit(f"karl: {e}") from None
