"""40 small faults, one at a time, in a copy of the project, whose tests should notice. By hand: python tests/mutants.py

A fault in a shared block is made in every script that holds the block. Prints the survivors, which no test noticed;
more than 2 of them are too many. Two processes, some 15 minutes. python tests/mutants.py WORDS: the faults with these.
"""

import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from test_shared_blocks import BLOCK, ROOT, SCRIPTS, read

# "## script: its tests", then: what stands there once -> what stands there instead
FAULTS = r"""
## train_grpo.py: test_train_grpo
[*at, prompt[-1], *own[:-1]] -> [*at, *own]
(own, [*prompt, *own]) -> (own, [*range(prompt[0], own[0]), *own])
int(g["position_ids"][0, -1]) + 1 -> len(g["prompt_ids"])
[g["image_features"] for g in groups] -> [g["image_features"] for g in groups[::-1]]
r.std() + 1e-4 -> r.std(correction=0) + 1e-4
c.advantage = advantage -> c.advantage = -advantage
(ref_logps - logps).clamp(-20, 20) -> (logps - ref_logps).clamp(-20, 20)
kl = log_ratio.exp() - log_ratio - 1 -> kl = -log_ratio
clamp(1 - args.epsilon, 1 + args.epsilon_high) -> clamp(1 - args.epsilon_high, 1 + args.epsilon)
-torch.minimum(free, clipped) -> -torch.maximum(free, clipped)
{"grpo": length * num_sequences, -> {"grpo": num_sequences,
sampled if args.num_iterations > 1 else logps.detach() -> sampled
set_learning_rate(engine, (step - 1) * updates + iteration, -> set_learning_rate(engine, step - 1,
min(step * B, total), world_size))] -> step * B, world_size))]
## train_grpo.py: test_reward_attacks
c.iou * (c.iou > args.iou_threshold) -> c.iou * (c.iou >= args.iou_threshold)
## train_grpo.py: test_ranks
loss * world_size * bool(members) -> loss * bool(members)
## train_sft.py: test_train_sft
at += range(end - C - 1, end - 1) -> at += range(end - C, end)
## train_sft.py: test_train_grpo
index_fill(-1, self.banned, -torch.inf) / self.temperature -> index_fill(-1, self.banned, -torch.inf)
## train_sft.py: test_ranks
-engine(row).sum() / step_tokens -> -engine(row).sum() / len(row.targets)
read, state["step"] + 1, total_steps, args) -> read, max(1, state["step"]), total_steps, args)
for folder in checkpoints(out)[-1:]: -> for folder in checkpoints(out)[:1]:
out.glob("checkpoint-*[0-9]") -> out.glob("checkpoint-*")
## eval_kvg.py: test_eval_kvg
if (r["category"] in seen) == (split -> if (r["category"] in seen) != (split
1.9599639845400536 -> 1.6448536269514722
"correct": iou >= 0.5, -> "correct": iou > 0.5,
f"{args.seed}:{s['id']}:{g}" -> f"{args.seed}:{i}:{g}"
## eval_kvg.py: test_messages test_reward_attacks
box = found.pop() if len(found) == 1 else () -> box = max(found, default=())
box[1] < box[3] <= grid[1] -> box[1] < box[3] <= grid[0]
## eval_kvg.py: test_rollout test_train_grpo
[(0, y, x) for y in range(rows) -> [(0, x, y) for y in range(rows)
positions[:, end:] += max(rows, columns) - rows * columns -> positions[:, end:] += 0
, "<|image_pad|>", "<|video_pad|>"] -> , "<|image_pad|>"]
self.done |= torch.isin(token, self.stop) -> self.done |= token == self.stop[1]
## synth_data.py: test_synth_data
fx, fy = w / image.width, h / image.height -> fx, fy = h / image.width, w / image.height
 or hashes and (bench != hashes[0]).sum(1).min() <= args.exclude_distance: -> :
bbox_px, (width, height, width, height) -> bbox_px, (width, width, height, height)
## filter.py: test_filter
most = k - 1 if args.max_correct is None -> most = k if args.max_correct is None
sum(a["iou"] >= iou for a in given) -> sum(a["iou"] > iou for a in given)
box_iou(boxes[-1], bbox_1000) < 0.5 -> box_iou(boxes[0], bbox_1000) < 0.5
## gen_cot.py: test_gen_cot
box_iou(last[0], target["bbox_1000"]) < 0.9 -> box_iou(last[0], target["bbox_1000"]) < 0
(sum(e["bbox_1000"][1::2]) > 1000, sum(e["bbox_1000"][::2])) -> (sum(e["bbox_1000"][::2]) > 1000,)
"""

def faults():
    """[(script, its tests, what is said of it, {script: text} with the fault)]"""
    found, texts = [], read(SCRIPTS)
    blocks = {script: {name: body for name, _, body in BLOCK.findall(text)} for script, text in texts.items()}
    for line in FAULTS.strip("\n").split("\n"):
        if line.startswith("## "):
            script, tests = line[3:].split(": ")
            continue
        old, new = line.split(" -> ")
        shared = {block for block, body in blocks[script].items() if old in body}
        changed = {name: text for name, text in texts.items() if name == script or shared & blocks[name].keys()}
        if any(text.count(old) != 1 for text in changed.values()):
            raise SystemExit(f"{old!r} does not stand once in each of {[*changed]}")
        changed = {name: text.replace(old, new) for name, text in changed.items()}
        found.append((tests, f"{script} ({tests}): {line}", changed))
    return found

def exit_code(folders, tests, changed):
    """Of these tests, in a copy of the project with these texts; 124: they hung."""
    folder = folders.get()
    for name, text in changed.items():
        (folder / name).write_text(text, "utf-8")
    files = [f"tests/{name}.py" for name in tests.split()]
    command = ["timeout", "900", sys.executable, "-m", "pytest", "-xq", *files]
    code = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode
    for name in changed:
        shutil.copy(ROOT / name, folder)
    folders.put(folder)
    return code

def main():
    rows, folders, survivors = [row for row in faults() if " ".join(sys.argv[1:]) in row[1]], queue.Queue(), []
    rows += [(tests, f"no fault ({tests})", {}) for tests in sorted({row[0] for row in rows})]  # which must pass
    with tempfile.TemporaryDirectory() as tmp, ThreadPoolExecutor(2) as pool:
        for i in "ab":
            folders.put(Path(shutil.copytree(ROOT, f"{tmp}/{i}", ignore=shutil.ignore_patterns(".git", "runs"))))
        codes = pool.map(lambda row: exit_code(folders, row[0], row[2]), rows)
        for (_, told, changed), code in zip(rows, codes, strict=True):
            print(f"{'passed' if code == 0 else 'failed'}  {told}", flush=True)
            survivors += [told] if changed and code == 0 else []
            if code not in ((0, 1, 2, 124) if changed else (0,)):
                pool.shutdown(cancel_futures=True)
                raise SystemExit(f"pytest ended with {code}")
    print(f"\n{len(survivors)} survived", *survivors, sep="\n  ")
    sys.exit(len(survivors) > 2)

if __name__ == "__main__":
    main()
