"""tools/report.py: what its tables, tests and pages say, that no text becomes markup, and that a browser shows it."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_script
from PIL import Image

import eval_kvg
from tools import report

HOSTILE = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'> \u2028\"'&amp;`${1}$data 漢🦜"
TRUTH, OTHER, LEVELS = [100, 100, 300, 400], [500, 500, 900, 900], list(report.LEVELS)

def row(i, right, **more):
    """Of predictions.jsonl: question i of the bench, on picture i // 5; a box that is right, wrong or (None) none."""
    box = {True: TRUTH, False: OTHER, None: None}[right]
    text = f"<think>at (90,100),(300,400), needle{i}</think> <answer>{box}</answer>" if box else "no box"
    return {"question_id": f"q{i}", "sample": 0, "response": text, "num_tokens": 10 + i, "finished": i != 4,
            "image_id": f"p{i // 5}", "image": None, "category": "bird" if i % 2 else "<b>x</b>", "grid": [1000, 1000],
            "entity": f"Entity {i}", "question": f"Find Entity {i}", "gt_bbox_1000": TRUTH, "pred_bbox_1000": box,
            "iou": float(right or 0), "correct": bool(right)} | more  # fmt: skip

def choice(i, chosen):
    answer = row(i, None, options=["X", "Y"], answer="X", choice=chosen, correct=chosen == "X")
    return {k: v for k, v in answer.items() if k not in ("iou", "pred_bbox_1000", "gt_bbox_1000")}

def evaluation(folder, rows, **args):
    """A folder as eval_kvg.py leaves it."""
    told = [(r,) for r in report.judged(rows) if r["correct"] is not None]
    metrics = report.by_split(told, {"seen_categories": ["bird"]}, lambda part: report.scores([r for (r,) in part]))
    args = {"bench": "none", "model": "m", "prompt": "r1", "seed": 7} | args
    report.write(folder / "metrics.json", json.dumps(metrics | {"args": args}))
    report.write(folder / "predictions.jsonl", "\n".join(map(json.dumps, rows)))
    return folder

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 cases on 12 pictures. Run a: every third wrong, pictures are files. Run b: the first 30 wrong, pictures are in
    a parquet, case 0 is hostile, 3 has no box. Run kinds: letters, a box without a truth, four samples of one case."""
    out = tmp_path_factory.mktemp("report")
    paths = [out / f"p{i // 5}.png" for i in range(60)]
    for i, path in enumerate(paths[::5]):
        Image.new("RGB", (160, 120), (20 * i, 100, 90)).save(path)
    cases = [{"question_id": f"q{i}", "image": {"bytes": path.read_bytes()}} for i, path in enumerate(paths)]
    pq.write_table(pa.Table.from_pylist(cases), out / "bench.parquet")
    evaluation(out / "a", [row(i, i % 3 > 0, image=str(path)) for i, path in enumerate(paths)])
    rows = [row(i, None if i in (0, 3) else i >= 30) for i in range(60)]
    rows[0] |= {"response": HOSTILE, "entity": HOSTILE}
    evaluation(out / "b", rows, bench=str(out / "bench.parquet"), model=HOSTILE)
    rows = [choice(i, chosen) for i, chosen in enumerate(["X", "Y", None])]
    rows += [row(3, True, correct=None, gt_bbox_1000=None), *(row(4, s == 2, sample=s) for s in range(4))]
    for path in (out / "a", out / "b", evaluation(out / "kinds", rows)):
        report.page(path)
    report.compare(out / "a", out / "b", out=out / "c")
    return out

def embedded(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"), re.S)[1])

def test_a_page_has_every_case_and_picture_as_far_as_they_are_there_and_no_text_is_markup(folder):
    for path in (folder / "a/report.html", folder / "b/report.html", folder / "c/compare.html"):
        page, data = path.read_text("utf-8"), embedded(path)
        assert len(data["pictures"]) == 12 and len(data["cases"]) == (30 if path.parent.name == "c" else 60), path
        assert page.count("<script") == page.count("</script>") == 2 and not re.search("<img src=x|<b>x", page)
        assert not re.search(r"https?://|@import|url\(|src=\"", page) and "&lt;b&gt;x&lt;/b&gt; (unseen)" in page
    assert embedded(folder / "b/report.html")["cases"][0][0]["response"] == HOSTILE
    report.page(folder / "b", bench=folder / "gone.parquet", max_cases=4, out=folder / "few.html")
    data, page = embedded(folder / "few.html"), (folder / "few.html").read_text("utf-8")
    assert [c[0]["question_id"] for c in data["cases"]] == ["q0", "q15", "q30", "q45"] and data["pictures"] == {}
    assert "4 of them are shown, evenly drawn. 4 pictures were not found" in page
    assert "its answer: 0.0 % of 30 correct and 100.0 % of 28 wrong" in page

def test_a_thumbnail_is_small_turned_upright_and_on_white(tmp_path):
    (exif := Image.Exif())[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGBA", (1500, 1000)).save(tmp_path / "turned.png", exif=exif)
    small = Image.open(io.BytesIO(base64.b64decode(report.thumbnail(tmp_path / "turned.png", 300))))
    assert small.size == (200, 300) and small.getpixel((9, 9)) == (255, 255, 255)

def test_two_runs_are_compared_case_by_case(folder, tmp_path):
    result = json.loads((folder / "c/compare.json").read_text())
    a, b = [i % 3 > 0 for i in range(60)], [i >= 30 for i in range(60)]
    for name, ids in (("all", range(60)), ("seen", range(1, 60, 2)), ("unseen", range(0, 60, 2))):
        m, only = result[name], [sum(x[i] and not y[i] for i in ids) for x, y in ((a, b), (b, a))]
        assert (m["n"], m["only_a"], m["only_b"]) == (len(ids), *only) and m["mcnemar_p"] == report.mcnemar_p(*only)
        assert m["difference"] == (only[1] - only[0]) / len(ids) == pytest.approx(m["acc_b"] - m["acc_a"])
        assert m["difference_ci95"][0] < m["difference"] < m["difference_ci95"][1]
    assert result["categories"] == {"bird": result["seen"], "<b>x</b>": result["unseen"]}
    done = run_script("tools/report.py", "compare", folder / "a", folder / "a", "--out", tmp_path)
    same = json.loads((tmp_path / "compare.json").read_text())["all"]
    assert (same["difference"], same["difference_ci95"], same["mcnemar_p"]) == (0, [0, 0], 1)
    assert re.search(r"\| all .* 60 \| 66.7 \| 66.7 \|  \+0.0 \|", done.stdout)
    for name, rows in (("few", [row(0, True)]), ("moved", [row(i, True, gt_bbox_1000=OTHER) for i in range(60)])):
        with pytest.raises(report.InputError, match=r"\(q\d+\): \d+ cases that .* want one bench$"):
            report.compare(folder / "a", evaluation(tmp_path / name, rows))

def test_intervals_know_images_and_the_p_value_is_a_fair_coins():
    rng = np.random.default_rng(0)
    for n in (5, 40, 300):
        correct, images = rng.random(n) > 0.3, rng.integers(0, n // 2, n)
        assert report.accuracy_interval(correct, images) == eval_kvg.accuracy_interval(correct, images)
    values, images = rng.choice([-1.0, 0.0, 1.0], 40), np.arange(40)
    half = 2.0227 * values.std(ddof=1) / 40**0.5  # Student's, at 39
    for n in (1, 3):  # three equal answers on one image tell as much as one
        interval = report.difference_interval(np.repeat(values, n), np.repeat(images, n))
        assert interval == pytest.approx([values.mean() - half, values.mean() + half], abs=1e-4)
    assert report.accuracy_interval([1.0, 0.0], ["one", "one"]) is report.difference_interval([1.0], ["one"]) is None
    assert report.mcnemar_p(0, 5) == 2 / 32 and report.mcnemar_p(3, 3) == report.mcnemar_p(0, 0) == 1

HERE, THERE, PORSCHE = "(10,20),(300,400)", "(600,600),(900,900)", "Porsche 911 (901, 930, 964, 993)"

def verdict(think, others=("Mi", "Lo 2", "E. coli"), entity="Lo", box=(10, 20, 300, 400), grid=None):
    answer = {"response": f"<think>{think}</think> <answer>{HERE}</answer>", "pred_bbox_1000": box, "grid": grid}
    return report.contradicts(answer | {"entity": entity}, frozenset({*others, entity}))

VERDICTS = {
    True: [f"Lo may be {HERE}. No: it is at {THERE}.", 'So: {"bbox_2d": [600, 600, 900, 900]}', "Lo? So it is mi.",
           f"1. Lo {HERE}\nConclusion: Mi.", "It is not Lo but <|object_ref_start|>Mi<|object_ref_end|>.",
           "I want Lo. It is Lo 2.", "Mi? Minor marks. Lore. The red one.", "I want Lo. It is E. coli. It is red."],
    False: [f"Mi is at {THERE}. Lo is red, so it is at {HERE}.", "Lo is red. Mi is blue.\nConclusion: the red one.",
            f"It is at {HERE}, not {THERE[:9]}, from (900,900),(600,600).",  # half a box, a reversed one
            f"1. Lo {HERE}\n2. Mi {THERE}\nConclusion: the first.", "Unlike Mi, which is blue, it is Lo.", "I see.",
            "The left is Lo. It isn't a Mi.", "Lo? Mi vs. Lo.", "Mine and Lo-like. Red."],
    None: ["  \n ", ""],
}  # fmt: skip

def test_reasoning_contradicts_where_it_ends_elsewhere_than_the_answer():
    assert VERDICTS == {want: [t for t in thoughts if verdict(t) is want] for want, thoughts in VERDICTS.items()}
    assert verdict("It is Lo 2.", others={"Lo"}, entity="Lo 2") is verdict("So: Mi", others=()) is False
    assert verdict(f"At {HERE} is the {PORSCHE}.", entity=PORSCHE) is False, "what stands in a name is no box"
    assert verdict("at (5,5),(150,100)", grid=[500, 250]) is False and verdict("at (5,5),(150,100)") is True
    assert verdict("It is Mi.", box=None) is None, "no answer, no verdict"

def test_other_names_are_those_of_the_category_and_the_rates_those_of_right_and_wrong_answers(tmp_path):
    texts = {1: "I look.", 5: "It is Entity 3.", 7: "It is Entity 4.", 9: "", 3: "", 4: ""}
    rows = [row(i, i != 5, response=f"<think>{text}</think>") for i, text in texts.items()]
    assert [r["reasoning_contradicts"] for r in report.judged(rows)] == [False, True, False, None, None, None]
    done = run_script("tools/report.py", "reasoning", evaluation(tmp_path / "r", rows))
    assert done.stdout == "Reasoning that contradicts its answer: 0.0 % of 2 correct and 100.0 % of 1 wrong answers.\n"
    assert json.loads((tmp_path / "r/reasoning.json").read_text())["all"]["contradicts"] == 1 / 3

def test_known_and_unknown_follow_karls_split_and_the_unrated_stay_out(tmp_path):
    table = {i: {"mastery": m} for i, m in ((0, 0.7), (2, 0.3), (3, 0.29))} | {1: {"knowledge_category": LEVELS[1]}}
    (tmp_path / "m.json").write_text(json.dumps({f"Entity {i}": entry for i, entry in table.items()}))
    rows = [row(i, i % 2 == 0) for i in range(6)] + [row(6, True, correct=None)]
    done = run_script("tools/report.py", "mastery", evaluation(tmp_path / "e", rows), "--mastery", tmp_path / "m.json")
    cells = [re.findall(r"[\d.-]+", "".join(line.split("|")[2:4])) for line in done.stdout.splitlines()[2:]]
    assert cells == [["3", "66.7"], ["1", "0.0"], *[["1", "100.0"], ["1", "0.0"]] * 2, ["0", "-"], ["2", "50.0"]]

def test_the_gap_counts_every_case_with_a_choice_once(tmp_path):
    pairs = [(1, 1)] * 3 + [(1, 0)] * 2 + [(0, 1)] + [(0, 0)] * 4  # choice, box
    boxes = evaluation(tmp_path / "boxes", [row(i, bool(box)) for i, (_, box) in enumerate(pairs)] + [row(20, True)])
    answers = [choice(i, "XY"[not known]) for i, (known, _) in enumerate(pairs)][::-1]
    done = run_script("tools/report.py", "gap", boxes, evaluation(tmp_path / "choices", answers))
    cells = json.loads((tmp_path / "boxes/gap.json").read_text())
    assert [cells["all"][k]["n"] for k in ("both_right", "choice_only", "box_only", "both_wrong")] == [3, 2, 1, 4]
    assert cells["seen"]["n"] + cells["unseen"]["n"] == 10 and cells["all"]["choice"]["acc"] == 0.5
    assert "3 (30.0 %)" in done.stdout and "10 of 11 answers have a choice" in done.stdout

def test_a_run_folder_gives_its_table_curves_and_pages(folder, tmp_path):
    """By a copy of the tool elsewhere, while a trainer writes its metrics."""
    report.write(tmp_path / ".done/world", "3")
    for t, (old, new) in enumerate((("b", "eval_base"), ("a", "eval_grpo"))):
        shutil.copytree(folder / old, tmp_path / new, ignore=shutil.ignore_patterns("*.html"))
        os.utime(tmp_path / new / "metrics.json", (t, t))
    steps = "".join(json.dumps({"step": i, "loss": 1 / i, "time/x": i, "kl": None}) + "\n" for i in range(1, 4))
    report.write(tmp_path / "train_grpo/metrics.jsonl", steps + '{"step": 4, "lo')
    command = [sys.executable, shutil.copy(ROOT / "tools/report.py", tmp_path), "run", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines, result = done.stdout.splitlines(), json.loads((tmp_path / "results.json").read_text())
    assert [line.split("|")[1].strip() for line in lines[:4:2]] == ["model", "base"] and "| 50.0 (" in lines[2]
    assert lines[4:] == ["results.json", "train_grpo/curves.png", "eval_base/report.html", "eval_grpo/report.html"]
    assert result["seconds"] == {"world": 3} and result["seed"] == 7 and result["rows"][1]["all"] == 40 / 60
    rows = [{"step": 10 * i, "x": x} for i, x in enumerate((1.0, float("inf"), 3.0, None, 8.0), 1)]
    assert report.curve_points(rows, "x", 2) == ([10, 30, 50], [1.0, 2.0, 5.5])
    failed = run_script("tools/report.py", "run", tmp_path / "train_grpo", check=False)
    assert failed.returncode and re.fullmatch(r"report: .*; want .*\n", failed.stderr)

DRIVER = """<body><pre id="result"></pre><script type="module">
const results = [];
async function visit(width, src) {
  const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), {width, height: 800, src}));
  await new Promise(done => { frame.onload = () => setTimeout(done, 200); });
  return [frame.contentWindow, query => [...frame.contentWindow.document.querySelectorAll(query)]];
}
async function look(page) {
  const [w, all] = await visit(1280, page), [, phone] = await visit(390, page);
  const set = (control, value) => { control.value = value; control.dispatchEvent(new w.Event("input", {bubbles: true}));
    return [parseInt(all("#count")[0].textContent), all("header span")[0]?.textContent.split(" ").pop()]; };
  const r = {text: all(".text")[0].textContent, chips: all(".chip").map(c => c.textContent)};
  for (const s of all("select")) // of every option its text, the number of cases and the first of them
    r[s.id] = [...s.options].map(o => [o.textContent, ...set(s, o.value)]), set(s, s.options[0].value);
  r.search = ["NEEDLE7", "entity 59", "no such words", ""].map(words => set(all("#search")[0], words)[0]);
  const [button] = all(".text button"), marks = () => all("figure .named").map(n => n.style.inset);
  button.focus(); r.marks = [button.textContent, ...marks()];
  button.blur(); r.marks.push(marks().length);
  const wide = phone("article, .panel, nav :is(label, input)").filter(n => n.getBoundingClientRect().right > 390);
  return {...r, wrong: [w.hacked, wide.length, all("script").length, all("img:not([src^=data]), .text b").length]};
}
for (const page of %s) results.push(await look(page));
document.getElementById("result").textContent = encodeURIComponent(JSON.stringify(results));
</script>"""

def test_the_pages_work_in_a_browser(folder):
    if not (browser := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no Chromium here")
    pages = [(folder / name).as_uri() for name in ("b/report.html", "c/compare.html", "kinds/report.html")]
    (folder / "driver.html").write_text(DRIVER % json.dumps(pages))
    flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --allow-file-access-from-files"
    flags += f" --enable-logging=stderr --virtual-time-budget=8000 --dump-dom --user-data-dir={folder / 'profile'}"
    done = subprocess.run([browser, *flags.split(), folder / "driver.html"], capture_output=True, timeout=120)
    got = json.loads(unquote(re.search(r'<pre id="result">(.*?)</pre>', done.stdout.decode())[1]) or "[]")
    assert len(got) == 3 and b"CONSOLE" not in done.stderr, done.stderr.decode()
    (b, c, kinds), wrong = got, [r["wrong"] for r in got]
    assert wrong == [[None, 0, 2, 0]] * 3, "scripts of others, things wider than a phone, elements of others"
    counts = {"show": {"all": 60, "right": 30, "wrong": 30, "unparsed": 2, "cut off": 1, "reasoning contradicts": 28},
              "category": {"all": 60, "seen": 30, "unseen": 30, "– <b>x</b>": 30, "– bird": 30}}  # fmt: skip
    for select, numbers in counts.items():
        assert [line[:2] for line in b[select]] == [[f"{name} ({n})", n] for name, n in numbers.items()]
    assert [line[2] for line in b["sort"]] == ["q0", "q30", "q0", "q0"] and b["search"] == [1, 1, 0, 60]
    assert b["marks"] == ["(90,100),(300,400)", "10% 70% 60% 9%", 0] and b["text"] == HOSTILE
    assert [n for n, *_ in c["show"]][3:5] == ["A right, B wrong (20)", "B right, A wrong (10)"]
    assert [n for n, *_ in kinds["show"]][1:5] == ["right (2)", "wrong (3)", "without a truth (1)", "unparsed (1)"]
    assert {"A", "B"} <= set(c["chips"]) and {"X", "Y", "no option", "4"} <= set(kinds["chips"])
