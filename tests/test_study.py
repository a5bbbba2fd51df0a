"""The study of the toy world: commands that the scripts take, in an order that works, resumed after a stop."""

import importlib
import json
import os
import re

import pytest
import study
import toy_world as world
from conftest import run_script

def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

def test_every_command_is_one_that_its_script_takes_and_the_parts_can_run_one_after_the_other():
    jobs = {f"0/{name}": command for part, _ in study.PARTS for name, command in study.jobs_of(0, part).items()}
    for command in jobs.values():
        script, *flags = command.split()
        if not script.startswith("tests/"):  # they are run below, and in test_toy.py
            args = importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_args(flags)
            if script == "train_grpo.py":  # all see equally many completions
                assert args.max_steps * args.train_batch_size * args.num_generations == study.STEPS * study.PROMPTS * 8
    waits, done = {name: study.needs(name, command) for name, command in jobs.items()}, set()
    assert waits["0/cot_sft_more"] == {"0/cot_sft", "0/cot_more"}
    for part, _ in study.PARTS:
        todo = {f"0/{name}" for name in study.jobs_of(0, part)} - done
        while ready := {name for name in todo if waits[name] <= done}:
            todo, done = todo - ready, done | ready
        assert not todo, part

def test_the_teacher_errs_where_it_is_said_to_and_the_rest_stays_right(world_dir, synth_dir, tmp_path):
    run_script("gen_cot.py", "--samples", synth_dir / "samples.jsonl", "--knowledge", world_dir / "knowledge.json",
               "--out", tmp_path / "cot")  # fmt: skip
    right = study.report.read_rows(tmp_path / "cot/samples.jsonl")
    def errors(*flags):
        world.main(["--err", str(tmp_path / "cot/samples.jsonl"), "--out", str(tmp_path / "err"), *map(str, flags)])
        rows, wrong = study.report.read_rows(tmp_path / "err/samples.jsonl"), set()
        for a, b in zip(right, rows, strict=True):
            said = f"<think>\n{b['cot']}\n</think> <answer>{a['answer']}</answer>"
            assert b["messages"][1]["content"] == said and (tmp_path / "err" / b["images"][0]).exists()
            assert re.findall(r"\(.*", a["cot"]) == re.findall(r"\(.*", b["cot"]), "all boxes, the last one too"
            if a["cot"] != b["cot"]:
                wrong.add((a["entities"][a["target"]]["entity"], b["cot"].split("\n")[0]))
        return wrong
    none, few, most = (errors("--share", share) for share in (0, 0.4, 0.8))
    assert few < most and len(few) > 1 and not none and (always := errors("--share", 0.5, "--systematic"))
    names = json.loads((tmp_path / "err/wrong.json").read_text())
    assert len(names) == 6 * 7 and {name for name, _ in always} <= set(names)
    for name, planning in always:
        assert planning == f"Planning: {name} is {world.describe(world.ENTITIES[names[name]])}."

def test_a_stopped_study_goes_on_with_what_is_left(tmp_path, capsys):
    out, given = tmp_path / "out", tmp_path / "given"
    (tmp_path / "copy.py").write_text("import pathlib, sys\nsource, _, folder = map(pathlib.Path, sys.argv[1:])\n"
                                      "(folder / 'x').write_text(source.read_text())\n")  # fmt: skip
    jobs = {"0/b": f"{tmp_path}/copy.py @/a/x --out @/b", "0/a": f"{tmp_path}/copy.py {given} --out @/a"}
    assert not study.run_jobs(jobs, out, at_once=2)
    assert "0/a failed" in capsys.readouterr().out and not (out / "0/b").exists()
    given.write_text("x")
    assert study.run_jobs(jobs, out, at_once=2) and (out / "0/b/x").read_text() == "x"
    with pytest.raises(SystemExit, match="0/a: made by another command than now; delete it"):
        study.run_jobs(jobs | {"0/a": jobs["0/a"] + " --more"}, out, at_once=2)
    os.utime(out / "0/a/done.json", (2**31, 2**31))
    with pytest.raises(SystemExit, match="0/b: older than what it reads; delete it"):
        study.run_jobs(jobs, out, at_once=2)

def evaluated(folder, acc, *rows):
    scores = {"acc": acc, "mean_iou": acc, "parse_rate": 1.0}
    write(folder / "metrics.json", {k: scores for k in ("all", "seen", "unseen")} | {"completions/mean_length": 9})
    row = {"correct": True, "entity": "Penika", "category": "disc", "image_id": "i", "pred_bbox_1000": [1, 2, 30, 40]}
    write(folder / "predictions.jsonl", *(row | r for r in rows))
    write(folder / "done.json", {"seconds": 60})

def test_the_tables_say_what_the_runs_say(tmp_path):
    """Two seeds with known scores: mean, Student's interval, paired difference. What is not finished is left out."""
    for seed, accs in enumerate(((0.5, 0.7), (0.6, 0.9))):
        for model, acc in zip(("sft", "cot_sft"), accs, strict=True):
            evaluated(tmp_path / f"{seed}/eval_{model}", acc, {"response": "Lo"})
    study.write_results(tmp_path, [0, 1, 2], ["0/eval_sft", "0/eval_cot_sft", "0/eval_grpo"])
    text, values = (tmp_path / "results.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    for cells in ("sft | 55.0 (-8.5 to 118.5)", "cot_sft - sft | +25.0 (-38.5 to +88.5)", "grpo - cot_sft | - | - | -"):
        assert any(line.startswith(f"| {cells} |") for line in lines)
    difference = values["The paper's comparison"]["points, paired by seed, cot_sft - sft: all"]
    assert difference == {"0": 20.0, "1": 30.0} and set(values) == set(study.TABLES)
