"""eval_kvg.py: scores against numbers worked out by hand, intervals, comparison, runs on the tiny model."""

import json
import os
import shutil
import socket

import pytest
from conftest import TWO_RANKS, run_script

import eval_kvg

SEEN = ("--seen", "disc", "square", "triangle", "diamond", "cross")


def box_answer(box):
    return f"<think>I look.</think> <answer><|box_start|>({box[0]},{box[1]}),({box[2]},{box[3]})<|box_end|></answer>"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def bench(world_dir):
    return world_dir / "kvg-bench.parquet"


@pytest.fixture(scope="session")
def samples(bench):
    return eval_kvg.read_bench(bench)


@pytest.fixture(scope="session")
def scored(bench, samples, tmp_path_factory):
    """Answers made elsewhere: case 0 exact, case 1 half as wide (IoU 0.5 or less), case 2 hostile, the rest no box."""
    out = tmp_path_factory.mktemp("scored")
    texts = ["no idea"] * len(samples)
    x1, y1, x2, y2 = samples[1]["bbox_1000"]
    texts[0], texts[1] = box_answer(samples[0]["bbox_1000"]), box_answer((x1, y1, (x1 + x2) // 2 - 1, y2))
    texts[2] = "<think></script><script>alert('x')</script><img src=x onerror=alert(1)>"
    write_rows(
        out / "answers.jsonl",
        [{"question_id": s["id"], "response": t} for s, t in zip(samples, texts, strict=True)][::-1],
    )
    done = run_script(
        "eval_kvg.py", "--bench", bench, "--predictions", out / "answers.jsonl", "--out", out / "run", *SEEN
    )
    return out / "run", done


# ---- scores ----
def test_scores_of_answers_made_elsewhere_equal_the_hand_computed_ones(scored, samples):
    out, done = scored
    metrics = json.loads((out / "metrics.json").read_text())
    rows = eval_kvg.read_jsonl(out / "predictions.jsonl")
    x1, _, x2, _ = samples[1]["bbox_1000"]
    half = ((x1 + x2) // 2 - 1 - x1) / (x2 - x1)  # same height, so the IoU is the ratio of the widths
    seen = [s for s in samples if s["category"] in SEEN]
    assert (len(samples), len(seen)) == (28, 20) and half < 0.5
    assert [r["question_id"] for r in rows] == [s["id"] for s in samples]
    assert [r["correct"] for r in rows] == [True] + [False] * 27 and rows[2]["pred_bbox_1000"] is None
    assert metrics["all"]["n"] == 28 and metrics["all"]["acc"] == 1 / 28 and metrics["seen"]["acc"] == 1 / 20
    assert metrics["all"]["mean_iou"] == pytest.approx((1 + half) / 28) and metrics["all"]["parse_rate"] == 2 / 28
    unseen = {"n": 8, "acc": 0.0, "acc_official": 0.0, "mean_iou": 0.0, "parse_rate": 0.0}
    assert metrics["unseen"] == unseen | {"acc_ci95": metrics["unseen"]["acc_ci95"]}
    assert (
        metrics["unseen"]["acc_ci95"][0] == 0 < metrics["unseen"]["acc_ci95"][1]
        and metrics["official_differences"] == {}
    )
    assert metrics["categories"][samples[0]["category"]]["acc"] == 1 / 4 and len(metrics["categories"]) == 7
    assert (out / "table.md").read_text() in done.stdout and "28 cases" in done.stdout.splitlines()[-1]


def test_a_split_without_cases_is_null():
    row = {
        "category": "bird",
        "correct": True,
        "iou": 1.0,
        "pred_bbox_1000": [0, 0, 1, 1],
        "num_tokens": None,
        "finished": None,
        "official_iou": 1.0,
        "official_difference": None,
    }
    rows = [row | {"image_id": str(i)} for i in range(3)]
    metrics = eval_kvg.bench_metrics(rows, ["bird"])
    assert metrics["unseen"] is None and metrics["seen"]["acc"] == 1.0
    assert "| unseen" in eval_kvg.metrics_table(metrics, ["bird"])


def test_every_prompt_parses_its_own_kind_of_answer():
    sample = {"id": "a", "bbox_1000": [10, 20, 300, 400], "category": "c", "entity": "e", "image_id": "i"}
    answers = {
        "r1": box_answer((10, 20, 300, 400)),
        "direct": "<|box_start|>(10,20),(300,400)<|box_end|>",
        "cot": "It is on the left: (10,20),(300,400)",
        "json": '```json\n[{"bbox_2d": [10, 20, 300, 400]}]\n```',
    }
    for mode in eval_kvg.EVAL_PROMPTS:
        assert eval_kvg.score_answers([sample], {"a": {"response": answers[mode]}}, mode)[0]["correct"], mode
    assert not eval_kvg.score_answers([sample], {"a": {"response": answers["cot"]}}, "r1")[0]["correct"]


# ---- comparison ----
def test_mcnemar_p_equals_the_hand_value():
    assert eval_kvg.mcnemar_p(0, 0) == 1.0 and eval_kvg.mcnemar_p(4, 4) == 1.0
    assert eval_kvg.mcnemar_p(0, 5) == 2 / 32  # 2 x P(no head in 5)
    assert eval_kvg.mcnemar_p(8, 2) == 2 * (1 + 10 + 45) / 1024
    assert 0 < eval_kvg.mcnemar_p(400, 700) < 1e-18


def test_compare_gives_b_minus_a(tmp_path):
    row = {"image_id": "0", "category": "disc", "gt_bbox_1000": [0, 0, 1, 1]}
    for name, right in (("a", "110000"), ("b", "101111")):
        (tmp_path / name).mkdir()
        rows = [row | {"question_id": str(i), "image_id": str(i), "correct": c == "1"} for i, c in enumerate(right)]
        write_rows(tmp_path / name / "predictions.jsonl", rows)
    done = run_script("eval_kvg.py", "--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out", *SEEN)
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert result["all"]["difference"] == pytest.approx(3 / 6) and (
        result["all"]["only_a"],
        result["all"]["only_b"],
    ) == (1, 4)
    assert (
        result["all"]["mcnemar_p"] == 2 * (1 + 5) / 32 and result["seen"] == result["all"] and result["unseen"] is None
    )
    assert "+50.0" in done.stdout and "compare.json" in done.stdout.splitlines()[-1]
    write_rows(tmp_path / "b" / "predictions.jsonl", [row | {"question_id": "0", "correct": True}])
    with pytest.raises(SystemExit, match="5 cases in one run only"):
        eval_kvg.compare_runs(tmp_path / "a", tmp_path / "b", [])


# ---- errors ----
def test_wrong_predictions_give_one_clear_line(bench, samples, tmp_path):
    rows = [{"question_id": s["id"], "response": "x"} for s in samples]
    for change, words in (
        (rows[1:], "1 of 28 cases missing"),
        (rows + rows[:1], "occurs 2 times"),
        (rows + [{"question_id": "q", "response": ""}], "not in the bench"),
        ([{"question_id": "q"}], "no column 'response'"),
        ([rows[0] | {"response": 3}, *rows[1:]], "another type"),
    ):
        with pytest.raises(SystemExit, match=words) as error:
            eval_kvg.read_foreign_answers(write_rows(tmp_path / "p.jsonl", change), samples)
        assert "\n" not in str(error.value) and "; want " in str(error.value)
    done = run_script(
        "eval_kvg.py",
        "--bench",
        bench,
        "--predictions",
        tmp_path / "none.jsonl",
        "--out",
        tmp_path / "out",
        check=False,
    )
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "no such file" in done.stderr


def test_wrong_benches_give_one_clear_line(tmp_path):
    message = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "(1,2)"}]
    row = {"id": "a", "images": ["a.png"], "messages": message}
    boxed = row | {"answer": "<|box_start|>(1,2),(3,4)<|box_end|>"}
    for rows, words in (
        ([], "0 rows"),
        ([row], "no box in the answer"),
        ([boxed, boxed], "more than once"),
        ([boxed], "no such image"),
    ):
        with pytest.raises(SystemExit, match=words):
            eval_kvg.read_bench(write_rows(tmp_path / "bench.jsonl", rows))
    with pytest.raises(SystemExit, match="no such file"):
        eval_kvg.read_bench(tmp_path / "none.parquet")


def test_a_folder_without_a_model_gives_one_clear_line(bench, tmp_path):
    done = run_script("eval_kvg.py", "--bench", bench, "--model", tmp_path, "--out", tmp_path / "out", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "check --model" in done.stderr


# ---- with a model ----
@pytest.fixture(scope="session")
def model_run(bench, tiny_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "one"
    flags = ("--bench", bench, "--model", tiny_dir, "--max_completion_length", 12, *SEEN)
    done = run_script("eval_kvg.py", *flags, "--out", out, "--batch_size", 32)
    return out, flags, done.stdout


def test_a_model_run_writes_predictions_in_the_order_of_the_bench(model_run, samples):
    rows = eval_kvg.read_jsonl(model_run[0] / "predictions.jsonl")
    metrics = json.loads((model_run[0] / "metrics.json").read_text())
    assert [r["question_id"] for r in rows] == [s["id"] for s in samples] and not list(model_run[0].glob("part-*"))
    assert all(
        0 < r["num_tokens"] <= 12 and r["finished"] in (True, False) and isinstance(r["response"], str) for r in rows
    )
    tokens, speed = sum(r["num_tokens"] for r in rows), json.loads((model_run[0] / "run.json").read_text())["speed"]
    assert metrics["completions/num_tokens"] == tokens == speed["tokens"] and speed["cases"] == 28
    assert metrics["completions/mean_length"] == tokens / 28 and speed["cases_per_second"] > 0
    assert metrics["completions/num_clipped"] == sum(not r["finished"] for r in rows)
    assert f"{tokens:,} tokens, {metrics['completions/num_clipped']} answers cut off" in model_run[2]


def test_metrics_and_predictions_are_the_same_bytes_with_one_case_at_a_time(model_run, tmp_path):
    """Speed, batch size and paths are in run.json alone; two ranks are in the test of an interrupted run."""
    run_script("eval_kvg.py", *model_run[1], "--out", tmp_path / "single", "--batch_size", 1, "--num_workers", 1)
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "single" / name).read_bytes() == (model_run[0] / name).read_bytes()
    run = json.loads((tmp_path / "single" / "run.json").read_text())
    assert run["args"]["batch_size"] == 1 and run["args"]["out"] == str(tmp_path / "single")


def test_a_finished_run_is_scored_again_without_weights(model_run, tiny_dir, tmp_path):
    """Weights that cannot be loaded prove that none are loaded; the speed measured before is kept."""
    model, out, flags = tmp_path / "tiny", tmp_path / "out", list(model_run[1])
    shutil.copytree(tiny_dir, model)
    shutil.copytree(model_run[0], out)
    config = json.loads((out / "config.json").read_text()) | {"model": str(model), "weights_md5": ""}
    (out / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").unlink()
    flags[flags.index("--model") + 1] = model
    before, speed = os.stat(out / "predictions.jsonl").st_mtime_ns, json.loads((out / "run.json").read_text())["speed"]
    done = run_script("eval_kvg.py", *flags, "--out", out, "--seed", 3)
    assert "28 answered before" in done.stdout and os.stat(out / "predictions.jsonl").st_mtime_ns == before
    assert json.loads((out / "run.json").read_text())["speed"] == speed


def test_an_interrupted_run_continues_on_two_ranks_with_the_same_predictions(model_run, tmp_path, samples):
    """Five answers of a killed run, one line half written: they are kept, the rest is made by two ranks."""
    out, rows = tmp_path / "two", (model_run[0] / "predictions.jsonl").read_text(encoding="utf-8").splitlines(True)
    out.mkdir()
    (out / "part-5.jsonl").write_text("".join(rows[:5]) + rows[5][:20], encoding="utf-8")
    done = run_script("eval_kvg.py", *model_run[1], "--out", out, "--batch_size", 5, launcher=TWO_RANKS)
    assert "5 answered before, 2 ranks" in done.stdout
    assert (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines(True) == rows
    assert (out / "metrics.json").read_bytes() == (model_run[0] / "metrics.json").read_bytes()
    assert not list(out.glob("part-*")) and json.loads((out / "run.json").read_text())["speed"]["world_size"] == 2


def test_answers_of_other_settings_are_not_reused(model_run):
    out, flags, _ = model_run
    done = run_script("eval_kvg.py", *flags, "--out", out, "--prompt", "direct", check=False)
    assert done.returncode == 1 and "--prompt was 'r1', now 'direct'" in done.stderr and "Traceback" not in done.stderr
