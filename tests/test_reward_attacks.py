"""What the rewards pay for texts that try to be paid without finding the object, next to what the released reward paid.

Rules, so that the table can be read: iou, binary and dense_iou look at nothing but the one box of the one closed answer
block. format pays 0.5 for the blocks and 0.5 for the notation, whether the box is right or not: it is there to keep
answers readable. So a wrong answer in the right form earns format, and that is meant; what it can never earn is iou.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script
from grpo_letters import released

import train_grpo as g

SAMPLE = {"bbox_1000": [100, 100, 500, 500], "grid": (1000, 1000), "style": g.BOX_STYLES["qwen2_vl"]}
ARGS = SimpleNamespace(iou_threshold=0.8, knowledge_form=None)
BOX = "<|object_ref_start|>Lo<|object_ref_end|><|box_start|>(100,100),(500,500)<|box_end|>"
WRONG = "(600,600),(900,900)"


def answered(text):
    return f"<think>\nLo is red.\n</think> <answer>{text}</answer>"


# name: (text, iou, binary, dense_iou, format, released)
# released: R_iou (IoU above 0.8 of the last box in the first <answer>) + R_format (0.5 if a think and an answer block
# stand at the start, trailing text allowed; its box half could not be reached); None where its code is not known to us
ATTACKS = {
    "honest": (answered(BOX), 1, 1, 1, 1, 1.5),
    # no single box: which of them is meant is for the model to say; the blocks are in order
    "two boxes, the right one last": (answered(f"{WRONG} {BOX}"), 0, 0, 0, 0.5, 1.5),
    "two boxes, the right one first": (answered(f"{BOX} {WRONG}"), 0, 0, 0, 0.5, 0.5),
    "a hundred boxes": (
        answered(" ".join(f"({x},{y}),({x + 400},{y + 400})" for x in range(0, 500, 50) for y in range(0, 500, 50))),
        0, 0, 0, 0.5, 0.5),
    "another box in a comment": (answered(f"<!-- {WRONG} -->{BOX}"), 0, 0, 0, 0.5, 1.5),
    "another box in another notation": (answered(f"[600, 600, 900, 900] {BOX}"), 0, 0, 0, 0.5, None),
    "chain of points": (answered("(100,100),(500,500),(900,900)"), 0, 0, 0, 0.5, None),
    "a second box that is upside down": (answered(f"{BOX} (900,900),(600,600)"), 0, 0, 0, 0.5, None),
    # a box of no use: dense_iou pays the overlap, which every smaller and better box exceeds
    "the whole image": (answered("(0,0),(1000,1000)"), 0, 0, 0.16, 1, 0.5),
    "a box around it": (answered("(50,50),(600,600)"), 0, 0, 16 / 30.25, 1, 0.5),
    "a wrong box": (answered(WRONG), 0, 0, 0, 1, 0.5),
    "swapped corners": (answered("(500,500),(100,100)"), 0, 0, 0, 0.5, None),
    "one pair swapped": (answered("(500,100),(100,500)"), 0, 0, 0, 0.5, None),
    "no area": (answered("(300,300),(300,300)"), 0, 0, 0, 0.5, 0.5),
    # numbers that are none on the grid
    "huge numbers": (answered("(0,0),(99999,99999)"), 0, 0, 0, 0.5, 0.5),
    "number without end": (answered(f"(100,100),(500,{'9' * 5000})"), 0, 0, 0, 0.5, None),
    "just beyond the grid": (answered("(0,0),(1001,1000)"), 0, 0, 0, 0.5, 0.5),
    "negative": (answered("(-100,100),(500,500)"), 0, 0, 0, 0.5, None),
    "with a plus": (answered("(+100,+100),(+500,+500)"), 0, 0, 0, 0.5, None),
    "percent": (answered("(10%,10%),(50%,50%)"), 0, 0, 0, 0.5, None),
    "fractions": (answered("[0.1, 0.1, 0.5, 0.5]"), 0, 0, 0, 0.5, None),
    "scientific": (answered("(1e2,1e2),(5e2,5e2)"), 0, 0, 0, 0.5, None),
    "infinite": (answered("(0,0),(inf,inf)"), 0, 0, 0, 0.5, None),
    "nan": (answered("(nan,nan),(nan,nan)"), 0, 0, 0, 0.5, None),
    "Arabic digits": (answered("(١٠٠,١٠٠),(٥٠٠,٥٠٠)"), 0, 0, 0, 0.5, None),
    "full-width digits": (answered("(１００,１００),(５００,５００)"), 0, 0, 0, 0.5, None),
    "full-width brackets": (answered("（100,100），（500,500）"), 0, 0, 0, 0.5, None),
    "zero-width space in a number": (answered("(10\u200b0,100),(500,500)"), 0, 0, 0, 0.5, None),
    "five numbers": (answered("[100, 100, 500, 500, 0.9]"), 0, 0, 0, 0.5, None),
    "named sides": (answered("x1=100, y1=100, x2=500, y2=500"), 0, 0, 0, 0.5, None),
    # no box in the answer
    "empty answer": (answered(""), 0, 0, 0, 0.5, 0.5),
    "prose": (answered("It is the left one."), 0, 0, 0, 0.5, 0.5),
    "the question again": (answered("Find and give the bounding box of <|object_ref_start|>Lo<|object_ref_end|>"),
                           0, 0, 0, 0.5, 0.5),
    "the prompt's tags again": (answered("<think> </think> and <answer> </answer> tags."), 0, 0, 0, 0, 0.5),
    "box in the reasoning alone": (f"<think>\n{BOX}\n</think> <answer>see above</answer>", 0, 0, 0, 0.5, 0.5),
    # blocks: not one closed answer outside of the reasoning
    "no answer block": (f"<think>\n{BOX}\n</think>", 0, 0, 0, 0, 0),
    "box alone": (BOX, 0, 0, 0, 0, 0),
    "answer cut off": (f"<think>\nLo\n</think> <answer>{BOX}", 0, 0, 0, 0, 0),
    "answer inside think": (f"<think>\n<answer>{BOX}</answer>\n</think>", 0, 0, 0, 0, 1),
    "think never closed": (f"<think>\nLo <answer>{BOX}</answer>", 0, 0, 0, 0, 1),
    "answers inside think and after": (
        f"<think>\n<answer>{BOX}</answer>\n</think> <answer>{WRONG}</answer>", 0, 0, 0, 0, 1.5),
    "two answers": (answered(BOX) + f"<answer>{WRONG}</answer>", 0, 0, 0, 0, 1.5),
    "the same answer twice": (answered(BOX) * 2, 0, 0, 0, 0, 1.5),
    "nested answers": (answered(f"<answer>{BOX}</answer>"), 0, 0, 0, 0, 1.5),
    "answer closed twice": (answered(BOX) + "</answer>", 0, 0, 0, 0, 1.5),
    "closed before it opens": (f"</answer>{BOX}<answer>", 0, 0, 0, 0, 0),
    "capital tags": (answered(BOX).replace("answer>", "ANSWER>"), 0, 0, 0, 0, 0),
    "zero-width space in a tag": (answered(BOX).replace("<answer>", "<ans\u200bwer>"), 0, 0, 0, 0, 0),
    "spaces in a tag": (answered(BOX).replace("<answer>", "< answer >"), 0, 0, 0, 0, 0),
    # blocks: the box counts, it is the one of the one answer; the half of the format for the blocks does not
    "empty think": (f"<think></think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "think of spaces": (f"<think> \n\t </think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "think of zero-width spaces": (f"<think>\u200b\u200b</think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "think of dots": (f"<think>......</think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "tags alone": ("<think></think><answer></answer>", 0, 0, 0, 0, 0.5),
    "no think": (f"<answer>{BOX}</answer>", 1, 1, 1, 0.5, 1),
    "think after the answer": (f"<answer>{BOX}</answer> <think>Lo is red.</think>", 1, 1, 1, 0.5, 1),
    "two thinks": (f"<think>a</think><think>b</think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "think nested in think": (f"<think>a <think>b</think></think> <answer>{BOX}</answer>", 1, 1, 1, 0.5, 1.5),
    "words before": ("Sure! " + answered(BOX), 1, 1, 1, 0.5, 1),
    "words after": (answered(BOX) + " or " + WRONG, 1, 1, 1, 0.5, 1.5),
    "words between": (answered(BOX).replace("</think> ", "</think> so "), 1, 1, 1, 0.5, 1),
    # notation: the same box in other words is right; the half of the format for the notation is for the family's own
    "the same box twice": (answered(f"{BOX} {BOX}"), 1, 1, 1, 1, 1.5),
    "the same box in two notations": (answered(f"{BOX} [100, 100, 500, 500]"), 1, 1, 1, 1, 1.5),
    "leading zeros": (answered("(0100,0100),(0500,0500)"), 1, 1, 1, 1, 1.5),
    "decimals": (answered("(100.0,100.0),(500.0,500.0)"), 1, 1, 1, 0.5, 0.5),
    "compact list": (answered("[100,100,500,500]"), 1, 1, 1, 0.5, 0.5),
    "spaces": (answered("( 100, 100 ), ( 500, 500 )"), 1, 1, 1, 0.5, None),
    "nested list": (answered("[[100, 100, 500, 500]]"), 1, 1, 1, 0.5, None),
    "JSON in a code fence, with a score": (
        answered('```json\n[{"bbox_2d": [100, 100, 500, 500], "label": "Lo", "score": 0.97, "size": [1, 2]}]\n```'),
        1, 1, 1, 0.5, None),
    "a negative box besides": (answered(f"{BOX} (-1,2),(3,4)"), 1, 1, 1, 1, None),
    # above the threshold it is the IoU, just below it is nothing
    "a little off": (answered("(100,100),(500,480)"), 0.95, 1, 0.95, 1, 1.45),
    "exactly at the threshold": (answered("(100,100),(500,420)"), 0, 0, 0.8, 1, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_paid_what_the_table_says(name):
    text, iou, binary, dense, form, _ = ATTACKS[name]
    paid = {k: g.REWARDS[k](text, SAMPLE, ARGS) for k in ("iou", "binary", "dense_iou", "format")}
    assert paid == pytest.approx({"iou": iou, "binary": binary, "dense_iou": dense, "format": form})


def test_the_released_column_follows_from_its_rules():
    for name, (text, *_, paid) in ATTACKS.items():
        if paid is not None:
            assert released(text, SAMPLE, ARGS) == pytest.approx(paid), name


def test_no_attack_earns_more_than_the_honest_answer_and_hedges_earn_less():
    def ours(text):
        return g.iou_reward(text, SAMPLE, ARGS) + g.format_reward(text, SAMPLE, ARGS)

    honest = ours(ATTACKS["honest"][0])
    assert all(ours(text) <= honest for text, *_ in ATTACKS.values())
    overpaid = [name for name, (text, *_, old) in ATTACKS.items() if old == 1.5 and ours(text) < honest]
    assert len(overpaid) >= 12, "what the released reward paid in full and ours does not"


JSON = {"bbox_1000": [100, 100, 500, 500], "grid": (280, 140), "style": g.BOX_STYLES["qwen2_5_vl"]}


@pytest.mark.parametrize("answer, iou, form", [
    ('```json\n[{"bbox_2d": [28, 14, 140, 70], "label": "Lo"}]\n```', 1, 1),
    ('[{"bbox_2d": [28, 14, 140, 70]}, {"bbox_2d": [0, 0, 9, 9]}]', 0, 0.5),
    ('{"bbox_2d": [100, 100, 500, 500]}', 0, 0.5),  # on a grid of 1000, which this family does not count in
    ('{"bbox_2d": [0, 0, 281, 70]}', 0, 0.5),
    ('{"bbox_2d": [140, 70, 28, 14]}', 0, 0.5),
    ('{"bbox_2d": [-28, 14, 140, 70]}', 0, 0.5),
    ('{"bbox_2d": "28, 14, 140, 70"}', 0, 0.5),
    ('{"bbox_2d": [28, 14, 140, 70], "bbox_2d": [28, 14, 140, 71]}', 0, 0.5),
    ("(28,14),(140,70)", 1, 0.5),
])  # fmt: skip
def test_families_that_count_in_pixels_are_no_easier(answer, iou, form):
    text = answered(answer)
    assert (g.iou_reward(text, JSON, ARGS), g.format_reward(text, JSON, ARGS)) == pytest.approx((iou, form))


def test_a_penalty_is_not_worth_dodging():
    """KARL's reward has no penalty without an answer block: leaving it out must cost more format than it saves."""
    for level in g.LEVELS:
        sample, args = SAMPLE | {"level": level}, SimpleNamespace(iou_threshold=0.65, knowledge_form="reward")
        wrong, dodged = answered(WRONG), "<think>\nLo is red.\n</think>"
        paid = [g.iou_reward(x, sample, args) + g.format_reward(x, sample, args) for x in (wrong, dodged)]
        assert paid[0] > paid[1] == 0


def test_vision_tokens_cannot_be_sampled(tiny_dir):
    """In a completion they would be counted as image features; they are never drawn, however likely."""
    tokenizer, _ = g.load_processors(tiny_dir, 401408)
    banned = torch.tensor(g.vision_ids(tokenizer))
    assert len(banned) == len(g.VISION_TOKENS)
    logits = torch.zeros(9, len(tokenizer))
    logits[:, banned] = 50.0
    for temperature in (0, 1.0):
        token, logp = g.choose(logits, torch.linspace(0, 0.999, 9), banned, temperature)
        assert not torch.isin(token, banned).any() and torch.isfinite(logp).all()


@pytest.fixture(scope="module")
def half_honest(tiny_dir, synth_dir, tmp_path_factory):
    """(policy, data): it looks at one picture; half of its answers point at the wrong thing, as it knows no better, the
    other half say the right box in the reasoning and end with the wrong one.
    """
    root = tmp_path_factory.mktemp("half_honest")
    row = json.loads((synth_dir / "samples.jsonl").read_text().splitlines()[0])
    right, wrong = row["answer"], row["answer"].rpartition("<|box_start|>")[0] + "<|box_start|>(1,1),(9,9)<|box_end|>"
    hack = f"<think>\n<answer>{right}</answer>\n</think> <answer>{wrong}</answer>"
    for name, answers in (("taught", (answered(wrong), hack)), ("asked", (answered(right),))):
        (root / name).mkdir()
        (root / name / "images").symlink_to(synth_dir / "images")
        with open(root / name / "samples.jsonl", "w") as file:
            for i, text in enumerate(answers * 2):
                turns = (("user", f"<image>{row['question']}{g.R1_SUFFIX}"), ("assistant", text))
                messages = [{"role": role, "content": content} for role, content in turns]
                print(json.dumps(row | {"id": f"{name}{i}", "messages": messages}), file=file)
    flags = ("--max_steps", 300, "--train_batch_size", 4, "--learning_rate", 3e-3, "--save_steps", 0)
    data = ("--data", root / "taught/samples.jsonl", "--output_dir", root / "policy")
    run_script("train_sft.py", "--model", tiny_dir, *data, *flags)
    return root / "policy/final", root / "asked/samples.jsonl"


@pytest.mark.parametrize("rewards", [("released",), ("iou", "format")])
def test_a_policy_learns_the_hack_from_the_released_reward_and_drops_it_under_ours(rewards, half_honest, tmp_path):
    """The released reward reads the first answer block, also inside the reasoning; ours reads the one answer."""
    policy, data = half_honest
    flags = ("--max_steps", 25, "--train_batch_size", 2, "--num_generations", 8, "--learning_rate", 1e-4,
             "--max_completion_length", 120, "--lr_scheduler", "constant", "--save_steps", 0)  # fmt: skip
    run_script("tests/grpo_letters.py", "--model", policy, "--data", data, "--output_dir", tmp_path,
               "--reward_funcs", *rewards, *flags)  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    def hacks(steps):
        texts = [(c["text"], SAMPLE | row) for row in rows if row["step"] in steps for c in row["completions"]]
        paid = [
            released(t, s, ARGS) == 1.5 and g.iou_reward(t, s, ARGS) + g.format_reward(t, s, ARGS) == 0
            for t, s in texts
        ]
        return sum(paid) / len(paid)

    before, after = hacks(range(1, 3)), hacks(range(21, 26))
    assert 0.15 < before < 0.85
    assert after > 0.6 if rewards == ("released",) else after < 0.15
