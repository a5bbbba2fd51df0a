"""Knowledge-aware GRPO: the levels, the two forms, what the published one nearly cancels to, and runs of the script."""

import json
import math

import pytest
from test_train_grpo import arguments, rows, train

import train_grpo as g

HIT, MISS, NO_BOX, NO_ANSWER = (
    "<answer>(0,0),(100,90)</answer>",
    "<answer>(0,0),(9,9)</answer>",
    "<answer>?</answer>",
    "",
)
NAMES = list(g.LEVELS)
INPUTS = {"grid": (1000, 1000), "style": g.BOX_STYLES["qwen2_vl"]}


def sample(level, entity="Lo"):
    return {"id": "0", "bbox_1000": [0, 0, 100, 100], "entity": entity, "level": level} | INPUTS


def advantages_of(texts, level, form, monkeypatch, **changes):
    """Of a group with these completions, by the step's own code."""
    rolled = [[([i], [0.0], True) for i in range(len(texts))]]
    monkeypatch.setattr(g, "rollout", lambda *args: rolled)
    monkeypatch.setattr(g, "completion_text", lambda tokenizer, ids: texts[ids[0]])
    args = arguments(**{"knowledge_form": form, "reward_funcs": ["iou"], "reward_weights": [1.0],
                        "iou_threshold": 0.65} | changes)  # fmt: skip
    (group,) = g.roll_out_step(None, None, [sample(level)], [INPUTS], 1, args, {})
    return group.advantages


@pytest.mark.parametrize("mastery, level", [
    (1.0, 0), (0.7, 0), (0.699, 1), (0.45, 1), (0.449, 2), (0.3, 2), (0.299, 3), (0.1, 3), (0.099, 4), (0.0, 4)
])  # fmt: skip
def test_levels_begin_where_they_are_published_to(mastery, level):
    assert g.level_of(mastery) == NAMES[level]


@pytest.mark.parametrize("level, hit, miss", [
    ("completely correct", 0.585, -0.6), ("mostly correct", 0.765, -0.5), ("partially correct", 0.9, -0.4),
    ("mostly incorrect", 1.0, -0.2), ("completely incorrect", 1.0, 0.0),
])  # fmt: skip
def test_published_reward(level, hit, miss):
    """At IoU .9: scaled and capped; a wrong box and an answer without one are punished, no answer is not."""
    args = arguments(knowledge_form="reward", iou_threshold=0.65)
    got = [g.iou_reward(text, sample(level), args) for text in (HIT, MISS, NO_BOX, NO_ANSWER)]
    assert got == pytest.approx([hit, miss, miss, 0.0])
    for text, plain in ((HIT, 0.9), (MISS, 0.0), (NO_BOX, 0.0)):
        assert g.iou_reward(text, sample(level), arguments(knowledge_form="advantage")) == plain
    assert g.iou_reward("<answer>(0,0),(100,65)</answer>", sample(level), args) == miss, "hits are above the threshold"
    assert g.iou_reward("<answer>(0,0),(9,9)", sample(level), args) == 0, "cut before the answer ended"


def test_the_published_form_cancels_where_the_advantage_form_does_not(monkeypatch):
    """One hit with IoU .9 and three misses: the same advantages for all levels as for plain IoU, to 1e-2."""
    texts = [HIT, MISS, MISS, MISS]
    assert advantages_of(texts, NAMES[0], None, monkeypatch) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-2)
    up, down = (0.65, 0.85, 1.0, 1.2, 1.4), (1.5, 1.25, 1.0, 0.5, 0.0)
    for level, hit, miss in zip(NAMES, up, down, strict=True):
        published = advantages_of(texts, level, "reward", monkeypatch)
        assert published == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-2)
        weighted = advantages_of(texts, level, "advantage", monkeypatch)
        assert weighted == pytest.approx([1.5 * hit, *[-0.5 * miss] * 3], abs=1e-2)


def test_without_the_std_the_published_form_pulls_the_least_known_up_least(monkeypatch):
    gaps = []
    for level in NAMES:
        a = advantages_of([HIT, MISS, MISS, MISS], level, "reward", monkeypatch, scale_rewards="none")
        gaps.append(a[0] - a[1])
    assert gaps == pytest.approx([1.185, 1.265, 1.3, 1.2, 1.0])


def test_the_cap_flattens_the_order_of_ious_where_little_is_known(monkeypatch):
    """IoU .9 and .75 and two misses: at s+ 1.4 both hits are worth the same, at 1 the better one is worth more."""
    texts = [HIT, "<answer>(0,0),(100,75)</answer>", MISS, MISS]
    best, good, *_ = advantages_of(texts, "completely incorrect", "reward", monkeypatch)
    assert best == good
    for level, form in (("partially correct", "reward"), ("completely incorrect", "advantage")):
        best, good, *_ = advantages_of(texts, level, form, monkeypatch)
        assert best > good + 0.1


def test_a_group_without_signal_weighs_nothing_and_is_left_alone(monkeypatch):
    assert advantages_of([MISS] * 4, "completely incorrect", "advantage", monkeypatch) == [0.0] * 4
    assert g.knowledge_weights([0.0, 1.0, -1.0], "completely correct") == pytest.approx([1.0, 0.65, 1.5])


def write(path, table):
    path.write_text(json.dumps(table))
    return path


def test_both_forms_of_the_file_are_read(tmp_path):
    samples = [sample(None, "Lo"), sample(None, "Mi"), sample(None, "Lo")]
    ours = {"Lo": {"mastery": 0.5, "n": 2, "level": "for people"}, "Mi": {"mastery": 0, "n": 1}, "Zo": {"mastery": 1}}
    karl = {"Lo": {"knowledge_category": "mostly correct"}, "Mi": {"knowledge_category": "completely incorrect"}}
    want = ["mostly correct", "completely incorrect", "mostly correct"]
    for table in (ours, karl):
        assert g.read_levels(write(tmp_path / "m.json", table), samples) == want


@pytest.mark.parametrize("table, message", [
    ({"Mi": {"mastery": 0.5}}, r"1 entities of the data are not in it, such as 'Lo'"),
    ({"Lo": {"mastery": 1.5}}, r"\(Lo\): .*1.5.*; want mastery, 0 to 1"),
    ({"Lo": {"mastery": math.nan}}, "want mastery, 0 to 1"),
    ({"Lo": {"pass_rate": 0.5}}, "want mastery, 0 to 1"),
    ({"Lo": {"knowledge_category": "known"}}, "one of completely correct, mostly correct"),
    ({"Lo": 0.5}, "want mastery, 0 to 1"),
    ([{"entity_name": "Lo"}], "want mastery, 0 to 1"),
])  # fmt: skip
def test_a_file_that_says_too_little_gets_one_line(table, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as e:
        g.read_levels(write(tmp_path / "m.json", table), [sample(None)])
    assert "\n" not in str(e.value)
    (tmp_path / "m.json").write_text("{")
    for path in (tmp_path / "m.json", tmp_path / "none.json"):
        with pytest.raises(SystemExit, match="unreadable|not JSON"):
            g.read_levels(path, [sample(None)])


@pytest.fixture(scope="module")
def half_known(synth_dir, tmp_path_factory):
    """mastery.json in which the entities of the data are known best and least, by turns."""
    entities = sorted({s["entity"] for s in g.read_samples(synth_dir / "samples.jsonl")})
    path = tmp_path_factory.mktemp("mastery") / "mastery.json"
    return write(path, {e: {"mastery": float(i % 2), "n": 1} for i, e in enumerate(entities)})


def test_a_run_weighs_its_advantages_and_says_so(half_known, tiny_dir, synth_dir, tmp_path):
    train(tmp_path, tiny_dir, synth_dir / "samples.jsonl", "--knowledge", half_known, "--max_steps", 2)
    metrics = rows(tmp_path / "metrics.jsonl")
    assert len(metrics) == 2 and json.loads((tmp_path / "config.json").read_text())["knowledge_form"] == "advantage"
    groups = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {group["level"] for group in groups} == {NAMES[0], NAMES[4]}
    for group in groups:
        plain = g.group_advantages([c["reward"] for c in group["completions"]], "group")
        up, down = {NAMES[0]: (0.65, 1.5), NAMES[4]: (1.4, 0.0)}[group["level"]]
        want = [a * (up if a > 0 else down) for a in plain]
        assert any(plain) and [c["advantage"] for c in group["completions"]] == pytest.approx(want)
    assert all(0 < m["knowledge/weight_mean"] < 1.5 and m["grad_norm"] > 0 for m in metrics)


def test_a_run_with_the_published_reward(half_known, tiny_dir, synth_dir, tmp_path):
    """A random model earns nothing and answers nothing: there is nothing to punish either."""
    flags = ("--knowledge", half_known, "--knowledge_form", "reward", "--reward_funcs", "iou", "letters")
    train(tmp_path, tiny_dir, synth_dir / "samples.jsonl", *flags, "--max_steps", 2)
    metrics = rows(tmp_path / "metrics.jsonl")
    assert [m["rewards/iou/mean"] for m in metrics] == [0.0, 0.0] and "knowledge/weight_mean" not in metrics[0]
    assert all(m["grad_norm"] > 0 for m in metrics)


def test_mistakes_are_found_before_the_weights_are_loaded(half_known, synth_dir, tmp_path):
    """The model named here does not exist: the script must not come to it."""
    (tmp_path / "one.json").write_text('{"Lo": {"mastery": 0.5}}')
    for flags, message in (
        (("--knowledge", tmp_path / "one.json"), "entities of the data are not in it"),
        (("--knowledge_form", "reward"), "no --knowledge"),
        (("--knowledge", half_known, "--knowledge_form", "reward"), "no iou in --reward_funcs letters"),
    ):
        done = train(tmp_path / "o", tmp_path / "none", synth_dir / "samples.jsonl", *flags, check=False)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
