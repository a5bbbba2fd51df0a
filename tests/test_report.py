"""report.html, compare.html and the curves: what they say, that no text becomes markup, and that a browser shows it."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script
from PIL import Image

import eval_kvg

HOSTILE = (
    "</script><script>parent.hacked = window.hacked = 1</script><img src=x onerror='parent.hacked = 1'> "
    "\u2028\u2029\"'&amp;`${1}漢🦜"
)
NAME = re.sub("[\u2028\u2029]", "", HOSTILE)  # as far as a bench may hold it
NAMES = {"seen": ["bird"], "unseen": ["<b>x</b>&'\""]}  # of categories


def boxed(box):
    return f"<|box_start|>({box[0]},{box[1]}),({box[2]},{box[3]})<|box_end|>"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """bench.jsonl: 60 cases on 12 pictures. Run a: every third wrong, run b: the first 30 wrong; case 0 is hostile."""
    out, cases, runs = tmp_path_factory.mktemp("report"), [], {"a": [], "b": []}
    for i in range(12):
        Image.new("RGB", (160, 120), (20 * i, 100, 90)).save(out / f"{i}.png")
    for i in range(60):
        entity, category = NAME if i == 0 else f"Entity {i}", "bird" if i % 2 else NAMES["unseen"][0].lower()
        truth, other = (100, 100, 300 + i, 400), (500, 500, 900, 900)
        answer = f"<|object_ref_start|>{entity}<|object_ref_end|>{boxed(truth)}"
        message = [{"role": "user", "content": f"<image>Find {entity}"}, {"role": "assistant", "content": answer}]
        cases.append({"id": f"q{i}", "images": [f"{i % 12}.png"], "messages": message, "answer": answer,
                      "entity": entity, "category": category, "pass_rate": i % 4 / 4})  # fmt: skip
        for name, right in (("a", i % 3), ("b", i >= 30)):
            text = (
                f"<think>not at (0,0),(250,500), needle{i}</think> <answer>{boxed(truth if right else other)}</answer>"
            )
            text = HOSTILE if i == 0 else "no box" if i == 3 else text
            runs[name].append({"question_id": f"q{i}", "response": text, "num_tokens": 10 + i, "finished": i != 4})
    bench = write_rows(out / "bench.jsonl", cases)
    samples = eval_kvg.read_bench(bench)
    for name, rows in runs.items():
        flags = ("--bench", bench, "--predictions", write_rows(out / f"{name}.jsonl", rows), "--out", out / name)
        args = eval_kvg.parse_args([*map(str, flags), "--seen", *NAMES["seen"]])
        (out / name).mkdir()
        (out / name / "config.json").write_text(json.dumps(vars(args)))
        eval_kvg.write_results(out / name, samples, {r["question_id"]: r for r in rows}, None, None, None, args)
        rows = eval_kvg.read_jsonl(out / name / "predictions.jsonl")  # a judgement of the reasoning, whoever made it
        rows = [r | {"reasoning_contradicts": {5: True, 6: True, 7: False}.get(i)} for i, r in enumerate(rows)]
        write_rows(out / name / "predictions.jsonl", rows)
        rows[1]["grid"] = [500, 1000]  # this one counts in pixels
        page = eval_kvg.report_html(rows, samples, eval_kvg.bench_metrics(rows, args.seen), args)
        (out / name / "judged.html").write_text(page, encoding="utf-8")
    (out / "compare.html").write_text(compare(out, None), encoding="utf-8")
    return out


def compare(folder, bench):
    folders = (folder / "a", folder / "b")
    return eval_kvg.compare_html(eval_kvg.compare_runs(*folders, ["bird"]), folders, bench, ["bird"])


def embedded(page, name):
    return json.loads(re.search(rf'id="{name}">(.*?)</script>', page, re.S)[1])


@pytest.fixture(scope="module")
def pages(folder):
    return {n: (folder / n).read_text(encoding="utf-8") for n in ("b/judged.html", "compare.html")}


# ---- the text of the pages ----
def test_an_evaluation_writes_the_report_with_all_cases(folder):
    data = embedded((folder / "a" / "report.html").read_text(encoding="utf-8"), "data")
    assert len(data["cases"]) == data["total"] == 60 and data["cases"][0]["answers"][0]["text"] == HOSTILE


def test_no_text_ends_a_script_or_becomes_markup(pages):
    for name, page in pages.items():
        assert page.count("<script") == page.count("</script>") == 3, name
        assert "<img src=x" not in page and "<b>x" not in page and "\u2028" not in page, name
        assert not re.search(r"(?:https?:)?//[a-z]|@import|url\(", re.sub(r'id="pictures">.*?</script>', "", page)), (
            name
        )
        assert embedded(page, "data")["cases"][0]["answers"][-1]["text"] == HOSTILE
    assert html.escape(NAMES["unseen"][0]) in pages["b/judged.html"]


def test_the_worst_come_first_and_every_picture_is_there_once(pages):
    data, pictures = (embedded(pages["b/judged.html"], k) for k in ("data", "pictures"))
    ious = [c["answers"][0]["iou"] for c in data["cases"]]
    assert ious == sorted(ious) and (ious[0], ious[-1], len(ious)) == (0, 1, 60)
    assert [c["id"] for c in data["cases"][:2]] == ["q0", "q3"]  # no box is worse than a box elsewhere
    assert len(pictures) == 12 and pictures[0][1:] == [160, 120]


def test_only_the_worst_are_kept_if_a_number_is_given(folder):
    rows = eval_kvg.read_jsonl(folder / "b" / "predictions.jsonl")
    data, pictures = (json.loads(t) for t in eval_kvg.gallery([rows], eval_kvg.read_bench(folder / "bench.jsonl"),
                                                              ["b"], ["bird"], 2))  # fmt: skip
    assert [c["id"] for c in data["cases"]] == ["q0", "q3"] and data["total"] == 60 and len(pictures) == 2


def test_a_picture_shrinks_until_it_fits(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), "uint8")).save(tmp_path / "noise.png")
    large, small = (eval_kvg.thumbnail(str(tmp_path / "noise.png"), most) for most in (1e9, 60_000))
    assert large[1:] == [640, 480] and small[1] < 640 and len(small[0]) <= 60_000 < len(large[0])


def test_accuracy_is_shown_per_pass_rate(pages):
    rates = {str(i): i % 4 / 4 for i in range(60)}
    rows = [{"question_id": str(i), "image_id": str(i), "correct": i % 4 == 3, "iou": 0.0,
             "official_iou": 0.0, "pred_bbox_1000": None}
            for i in range(60)]  # fmt: skip
    bins = eval_kvg.pass_rate_bins(rows, rates)
    assert [(rate, m["n"], m["acc"]) for rate, m in bins] == [(0, 15, 0), (0.25, 15, 0), (0.5, 15, 0), (0.75, 15, 1)]
    fine = eval_kvg.pass_rate_bins(rows, {k: int(k) / 59 for k in rates})
    assert [m["n"] for _, m in fine] == [12] * 5 and fine[0][0] == pytest.approx(sum(range(12)) / 12 / 59)
    assert eval_kvg.pass_rate_bins(rows, dict.fromkeys(rates)) == [] and eval_kvg.calibration_panel([]) == ""
    assert pages["b/judged.html"].count('aria-label="pass rate') == 4 and "pass rate 0.25: accuracy" in pages[
        "b/judged.html"]  # fmt: skip


def test_the_official_count_is_shown_where_it_is_known():
    m = {"n": 4, "acc": 0.5, "acc_ci95": None, "mean_iou": 0.5, "parse_rate": 1.0}
    metrics = {"all": m, "seen": m, "unseen": None, "categories": {"bird": m}}
    assert "fficial" not in eval_kvg.results_panel(metrics, ["bird"])
    metrics = {k: v and (v | {"acc_official": 0.75} if k != "categories" else {"bird": m | {"acc_official": 0.75}})
               for k, v in metrics.items()}  # fmt: skip
    panel = eval_kvg.results_panel(metrics | {"official_differences": {"two <boxes>": 3, "cut": 1}}, ["bird"])
    assert panel.count("<td>75.0</td>") == 3 and "4 cases (two &lt;boxes&gt;: 3; cut: 1)" in panel


def test_the_compare_page_has_both_runs_and_finds_the_pictures(folder, pages):
    data = embedded(pages["compare.html"], "data")
    assert len(embedded(pages["compare.html"], "pictures")) == 12  # of the bench that config.json names
    assert len(data["names"]) == 2 and {len(c["answers"]) for c in data["cases"]} == {2}
    result = eval_kvg.compare_runs(folder / "a", folder / "b", ["bird"])["all"]
    right = [[c["answers"][k]["correct"] for c in data["cases"]] for k in (0, 1)]
    assert (sum(right[0]), sum(right[1])) == (round(60 * result["acc_a"]), round(60 * result["acc_b"])) == (40, 30)
    assert f"<b>{100 * (30 - 40) / 60:+.1f}</b>" in pages["compare.html"]
    other = write_rows(folder / "other.jsonl", [eval_kvg.read_jsonl(folder / "bench.jsonl")[0] | {"id": "none"}])
    page = compare(folder, str(other))  # a bench of other cases: no pictures, and it says so
    assert embedded(page, "pictures") == [] and "pictures are left out" in page
    done = run_script("eval_kvg.py", "--compare", folder / "a", folder / "b", "--out", folder / "c", "--seen", "bird")
    assert (folder / "c" / "compare.html").read_text(encoding="utf-8") == pages["compare.html"]
    assert "compare.html" in done.stdout.splitlines()[-1]


# ---- in a browser ----
DRIVER = """<body><pre id="result"></pre><script>
const results = {};
window.hacked = 0;
const wait = ms => new Promise(done => setTimeout(done, ms));
async function visit(width, height, page) {
  const frame = document.body.appendChild(document.createElement("iframe"));
  frame.style = "border:0;width:" + width + "px;height:" + height + "px";
  await new Promise(done => { frame.onload = done; frame.src = page; });
  await wait(200);
  return frame.contentWindow;
}
(async () => {
  try { %s } catch (e) { results.error = String(e.stack); }
  results.hacked = window.hacked;
  document.getElementById("result").textContent = btoa(unescape(encodeURIComponent(JSON.stringify(results))));
})();
</script>"""
HELPERS = """
const doc = w.document, by = id => doc.getElementById(id), cards = () => doc.querySelectorAll(".card").length;
const set = (id, value) => { by(id).value = value; by(id).dispatchEvent(new w.Event("input"));
  return [by("count").textContent, cards()]; };
const key = k => (doc.activeElement ?? doc.body).dispatchEvent(new w.KeyboardEvent("keydown", {key: k, bubbles: true}));
const first = () => doc.querySelector(".card code").textContent;
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Runs a script beside a page in headless Chromium; gives what it wrote into `results`, and the console errors."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    works = [
        n for n in names if shutil.which(n) and not subprocess.run([n, "--version"], capture_output=True).returncode
    ]
    if not works:
        pytest.skip("no Chromium here; `bash run_all.sh test` installs one where it is root and has apt-get")
    here = tmp_path_factory.mktemp("browser")

    def run(script):
        (here / "driver.html").write_text(DRIVER % script, encoding="utf-8")
        flags = ("--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --allow-file-access-from-files "
                 "--enable-logging=stderr --window-size=1400,1000 --virtual-time-budget=8000 --dump-dom")  # fmt: skip
        command = [works[0], *flags.split(), f"--user-data-dir={here / 'profile'}", (here / "driver.html").as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120)
        dump, log = done.stdout.decode(), done.stderr.decode(errors="replace")
        found = re.search(r'<pre id="result">([\w+/=]+)</pre>', dump)
        assert found, f"the page did not come to its end:\n{log[-3000:]}"
        results = json.loads(base64.b64decode(found[1]))
        assert "error" not in results, results["error"]
        results["console"] = [line for line in log.splitlines() if "CONSOLE" in line]
        return results

    return run


def test_the_report_works_in_a_browser(folder, browse):
    page = (folder / "b" / "judged.html").as_uri()
    got = browse("const w = await visit(1280, 800, %s);" % json.dumps(page) + HELPERS + """
  results.start = [by("count").textContent, cards(), first()];
  results.text = doc.querySelector(".text").textContent; results.title = doc.querySelector("h3").textContent;
  results.scripts = doc.scripts.length; results.strays = doc.querySelectorAll("img:not([src^=data]), .card b").length;
  results.pictures = [...doc.querySelectorAll(".card img")].map(i => i.naturalWidth);
  by("more").click(); by("more").click(); results.more = [cards(), by("more").hidden];
  results.wrong = set("show", "wrong"); results.hash = w.location.hash;
  results.nobox = set("show", "nobox"); results.cut = set("show", "cut");
  results.contradicts = set("show", "contradicts"); results.chip = doc.querySelector(".chip.named")?.textContent;
  results.shows = [...by("show").options].map(o => o.textContent);
  set("show", "all"); results.split = set("category", "/seen"); results.category = set("category", "bird");
  results.categories = [...by("category").options].map(o => o.textContent);
  set("category", ""); set("sort", "best"); results.best = first(); set("sort", "long"); results.long = first();
  results.search = set("search", "NEEDLE7"); results.entity = set("search", "entity 59");
  results.unicode = set("search", "漢🦜");
  results.none = set("search", "no such words"); set("search", ""); set("sort", "bench");
  const button = doc.querySelectorAll(".card")[1].querySelector(".text button");
  const named = () => [...doc.querySelectorAll("figure .named")].map(n => n.getAttribute("style"));
  button.focus(); results.named = [button.textContent, ...named()]; button.blur(); results.hidden = named().length;
  key("j"); results.j = [...doc.querySelectorAll(".card")].indexOf(doc.activeElement);
  key("j"); key("j"); key("k"); results.jjk = [...doc.querySelectorAll(".card")].indexOf(doc.activeElement);
  key("/"); results.slash = doc.activeElement.id; key("j"); results.typed = doc.activeElement.id;
  results.unlabelled = [...doc.querySelectorAll("select,input")].filter(c => !c.labels.length).length
    + [...doc.querySelectorAll("img")].filter(i => !i.alt).length;
  const again = await visit(1280, 800, %s);
  results.again = again.document.getElementById("count").textContent;
""" % json.dumps(page + "#show=wrong&category=bird&search=needle"))  # fmt: skip
    assert got["console"] == [] and got["hacked"] == 0 and got["scripts"] == 3 and got["strays"] == 0
    assert got["start"] == ["60 of 60 cases", 24, "q0"] and got["text"] == HOSTILE and got["title"] == NAME
    assert got["pictures"] == [160] * 24 and got["more"] == [60, True]
    assert got["wrong"] == ["30 of 60 cases", 24] and got["hash"].startswith("#show=wrong&")
    assert got["nobox"] == ["2 of 60 cases", 2] and got["cut"] == ["1 of 60 cases", 1]
    assert got["contradicts"] == ["2 of 60 cases", 2] and got["chip"] == "reasoning contradicts"
    assert got["shows"] == ["all (60)", "wrong (30)", "wrong, with a box (28)", "correct (30)", "no valid box (2)",
                            "cut off (1)", "reasoning contradicts (2)"]  # fmt: skip
    assert got["split"] == got["category"] == ["30 of 60 cases", 24]
    assert got["categories"] == ["all", "seen (30)", "unseen (30)", "<b>x</b>&'\" (30)", "bird (30)"]
    assert got["best"] == "q30" and got["long"] == "q0" and got["none"] == ["0 of 60 cases", 0]
    assert got["search"] == got["entity"] == got["unicode"] == ["1 of 60 cases", 1]
    assert got["named"] == ["(0,0),(250,500)", "left:0%;top:0%;width:50%;height:50%"] and got["hidden"] == 0
    assert (got["j"], got["jjk"], got["slash"], got["typed"]) == (0, 1, "search", "search") and got["unlabelled"] == 0
    assert got["again"] == "14 of 60 cases"  # wrong and bird and a needle: odd numbers below 30 but 3


def test_the_compare_page_filters_disagreements_in_a_browser(folder, browse):
    page = json.dumps((folder / "compare.html").as_uri())
    got = browse("const w = await visit(1280, 800, %s);" % page + HELPERS + """
  results.start = [by("count").textContent, doc.querySelectorAll(".card .answer").length, cards()];
  for (const name of ["a", "b", "wrong", "right", "all"]) results[name] = set("show", name)[0];
  results.scripts = doc.scripts.length; set("sort", "lost"); results.lost = first(); set("sort", "gained");
  results.gained = first(); results.boxes = doc.querySelector("figure").querySelectorAll(".truth, .a, .b").length;
""")  # fmt: skip
    right = [(i % 3 > 0 and i not in (0, 3), i >= 30) for i in range(60)]
    pairs = {"a": (True, False), "b": (False, True), "wrong": (False, False), "right": (True, True)}
    counts = {name: right.count(pair) for name, pair in pairs.items()}
    assert got["console"] == [] and got["hacked"] == 0 and got["scripts"] == 3
    assert got["start"] == [f"{counts['a'] + counts['b']} of 60 cases", 48, 24]
    assert {k: got[k] for k in counts} == {k: f"{n} of 60 cases" for k, n in counts.items()}
    assert got["all"] == "60 of 60 cases" and got["lost"] == "q1" and got["gained"] == "q30" and got["boxes"] == 3


def test_no_page_is_wider_than_the_window(folder, browse):
    sizes, urls = ((1280, 800), (390, 844)), [(folder / n).as_uri() for n in ("b/judged.html", "compare.html")]
    script = """results.widths = [];
  for (const page of %s) for (const [x, y] of %s) {
    const w = await visit(x, y, page), parts = [...w.document.querySelectorAll(".card, .panel, .filters *")];
    results.widths.push([w.innerWidth, w.document.documentElement.scrollWidth,
      Math.max(...parts.map(n => n.getBoundingClientRect().right))]);
  }"""
    got = browse(script % (json.dumps(urls), json.dumps(sizes)))
    assert [w[0] for w in got["widths"]] == [1280, 390] * 2 and got["console"] == []
    assert all(page <= window and right <= window for window, page, right in got["widths"]), got["widths"]


# ---- curves ----
@pytest.fixture
def metric_files(tmp_path):
    files = []
    for name, keys in (("a", ("time/train", "loss", "reward")), ("b", ("reward", "loss", "kl", "time/train"))):
        rows = [{"step": i, "text": "x", "empty": None, **{k: i / 10 for k in keys}} for i in range(1, 9)]
        rows[3] |= {"loss": float("nan"), "reward": None}
        (tmp_path / name).mkdir()
        files.append(write_rows(tmp_path / name / "metrics.jsonl", rows))
    return files


def test_curves_draw_the_metrics_that_all_runs_have_most_useful_first(metric_files, tmp_path, monkeypatch):
    import matplotlib.figure

    drawn, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    keys = eval_kvg.draw_runs([str(p) for p in metric_files], tmp_path / "curves.png", 1)
    assert keys == ["reward", "loss", "time/train"]
    [figure] = drawn
    panels = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title(loc="left") for ax in panels] == keys and all(len(ax.get_lines()) == 2 for ax in panels)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]
    assert panels[1].get_lines()[0].get_xdata().tolist() == [1, 2, 3, 5, 6, 7, 8]  # without the NaN


def test_smoothing_is_the_mean_of_the_last_finite_values():
    rows = [{"step": 10, "x": 1.0}, {"step": 20, "x": float("inf")}, {"step": 30, "x": 3.0}, {"step": 40, "x": 8.0}]
    assert eval_kvg.curve_points(rows, "x", 1) == ([10, 30, 40], [1.0, 3.0, 8.0])
    assert eval_kvg.curve_points(rows, "x", 2) == ([10, 30, 40], [1.0, 2.0, 5.5])


def test_curves_from_the_command_line(metric_files, tmp_path):
    done = run_script("eval_kvg.py", "--curves", *metric_files, "--out", tmp_path / "new" / "folder", "--smooth", 3)
    assert "3 metrics of 2 runs" in done.stdout
    with Image.open(tmp_path / "new" / "folder" / "curves.png") as im:
        assert im.width > 900 and im.format == "PNG"
    other = write_rows(tmp_path / "other.jsonl", [{"step": 1, "else": 2.0}])
    with pytest.raises(SystemExit, match="no metric that all 2 files have; want "):
        eval_kvg.draw_runs([metric_files[0], other], tmp_path / "x.png", 1)
    assert not Path(tmp_path / "x.png").exists()
