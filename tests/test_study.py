"""The study of the toy world: commands that the scripts take, in an order that works, resumed after a stop."""

import importlib
import json
import os

import pytest
import study


@pytest.fixture
def jobs(tmp_path):
    return {f"0/{name}": command for name, command in study.jobs_of(0, tmp_path, arms=True).items()}


def test_every_command_is_one_that_its_script_takes(jobs):
    for name, (script, *flags) in jobs.items():
        if not script.startswith("tests/"):
            args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
            assert name.split("/")[1] == str(getattr(args, "output_dir", None) or args.out).rpartition("/")[2]


def test_the_jobs_can_run_in_some_order(jobs, tmp_path):
    done, waits = set(), {name: study.needs(name, command, tmp_path) for name, command in jobs.items()}
    assert waits["0/world"] == waits["0/eval_base"] - {"0/world"} == set()
    assert waits["0/cot_sft_more"] == {"0/cot_sft", "0/cot_more"}
    while len(done) < len(jobs):
        ready = {name for name in jobs if name not in done and waits[name] <= done}
        assert ready, set(jobs) - done
        done |= ready


def test_the_main_comparison_sees_equally_many_samples(jobs):
    def flag(name, key):
        command = jobs[name]
        return int(command[len(command) - 1 - command[::-1].index(key) + 1])

    assert flag("0/synth_sft", "--num_samples") == study.N_SFT
    more, grpo = "0/cot_sft_more", "0/grpo"
    assert flag(more, "--max_steps") * flag(more, "--train_batch_size") == flag(grpo, "--max_steps") * study.PROMPTS


def test_a_stopped_study_goes_on_with_what_is_left(tmp_path, capsys):
    out, given = tmp_path / "out", tmp_path / "given"
    copy = [
        "-c",
        "import pathlib, sys; pathlib.Path(sys.argv[1], 'x').write_text(pathlib.Path(sys.argv[2]).read_text())",
    ]
    jobs = {"0/b": [*copy, f"{out}/0/b", f"{out}/0/a/x"], "0/a": [*copy, f"{out}/0/a", str(given)]}
    assert not study.run_jobs(jobs, out, at_once=2)
    assert "0/a failed" in capsys.readouterr().out and not (out / "0/b").exists()
    given.write_text("x")
    assert study.run_jobs(jobs, out, at_once=2) and (out / "0/b/x").read_text() == "x"
    given.unlink()
    assert study.run_jobs(jobs, out, at_once=2)
    with pytest.raises(SystemExit, match="0/a: made by another command than now; delete it"):
        study.run_jobs(jobs | {"0/a": [*jobs["0/a"], "--more"]}, out, at_once=2)
    os.utime(out / "0/a/done.json", (2**31, 2**31))
    with pytest.raises(SystemExit, match="0/b: older than what it reads; delete it"):
        study.run_jobs(jobs, out, at_once=2)


def test_the_tables_say_what_the_runs_say(tmp_path):
    """Two seeds with known scores: mean, Student's interval, paired difference; what is not finished is left out."""
    for seed, accs in enumerate(((0.5, 0.7), (0.6, 0.9))):
        for model, acc in zip(("sft", "cot_sft"), accs, strict=True):
            folder = tmp_path / f"{seed}/eval_{model}"
            folder.mkdir(parents=True)
            scores = {"acc": acc, "mean_iou": acc, "parse_rate": 1.0}
            (folder / "metrics.json").write_text(json.dumps({k: scores for k in ("all", "seen", "unseen", "disc")}))
            rows = [{"correct": True, "response": "Lo is a red disc with a white band", "entity": "Penika",
                     "category": "disc", "reasoning_contradicts": False}]  # fmt: skip
            (folder / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            (folder / "done.json").write_text('{"seconds": 60}')
    results = study.Results(tmp_path, [0, 1, 2])
    assert results.scores("sft") == "55.0 (-8.5 to 118.5)" and results.scores("grpo") == "-"
    assert results.gain("cot_sft", "sft") == "+25.0 (-38.5 to +88.5)"
    for seed in "01":
        (tmp_path / seed / "world").mkdir()
        (tmp_path / seed / "world/done.json").write_text('{"seconds": 60}')
    text, numbers = study.report(tmp_path, [0, 1, 2])
    assert "| cot_sft | 2 | 80.0" in text and "6 jobs of 6 minutes" in text
    assert numbers["The paper's comparison"]["cot_sft - sft, all, acc"] == {0: 20.0, 1: 30.0}


def test_the_parts_of_the_reasoning_are_judged_one_by_one(tmp_path):
    look = study.world.describe(study.world.ENTITIES["Penika"])
    parts = {"Planning": f"Penika is {look}.", "Visual Analysis": f"\n{look} (1,2),(3,4)\nanother",
             "Comparison": f"of the objects above, only {look} fits Penika."}  # fmt: skip
    whole = "\n".join(f"{k}: {v}" for k, v in parts.items()) + f"\nConclusion: Penika is {look} (1,2),(3,4).\n</think>"
    responses = [whole, *(whole.replace(v, "a white bowl") for v in parts.values()), f"<think>{look}</think>"]
    folder = tmp_path / "0/eval_grpo"
    folder.mkdir(parents=True)
    row = {"correct": True, "entity": "Penika", "category": "disc", "reasoning_contradicts": False}
    rows = [row | {"response": r} for r in responses]
    rows += [row | {"response": whole, "correct": False, "reasoning_contradicts": c} for c in (True, None, None)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "done.json").write_text('{"seconds": 60}')
    results = study.Results(tmp_path, [0])
    text = study.reasoning(results)
    assert [line for line in text.splitlines() if "| grpo |" in line] == [
        "| grpo | right | 1 | 40.0 | 40.0 | 40.0 | 40.0 | 0.0 |",
        "| grpo | wrong | 1 | 0.0 | 0.0 | 0.0 | 0.0 | 100.0 |",  # of one: two have no box to judge
    ]
