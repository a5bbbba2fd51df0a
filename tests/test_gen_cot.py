"""gen_cot.py: chains of the table, rules, resuming; and a teacher behind a server with faults, on this machine."""

import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from PIL import Image
from test_synth_data import write

import filter as f
import gen_cot

ANSWER = "<|object_ref_start|>Lo<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|>"
BOXES = {"Mi": [500, 600, 700, 900], "Lo": [10, 20, 300, 400], "Ra": [400, 100, 600, 500]}
ROW = {"id": "a", "target": 1, "question": "Find <|object_ref_start|>Lo<|object_ref_end|>", "answer": ANSWER,
       "images": ["a.png"], "entities": [{"entity": e, "bbox_1000": b} for e, b in BOXES.items()]}  # fmt: skip
TABLE = {name: {"description": f"a {color} disc"} for name, color in (("Mi", "red"), ("Lo", "blue"), ("Ra", "green"))}
EXACT = """Planning: Lo is a blue disc.
Visual Analysis:
a blue disc (10,20),(300,400)
a green disc (400,100),(600,500)
a red disc (500,600),(700,900)
Comparison: of the objects above, only a blue disc fits Lo.
Conclusion: Lo is a blue disc (10,20),(300,400)."""
FINE = """**Planning:** The Lo has a blue body, so look for blue.
## Visual Analysis
1. Mi (500,600),(700,900): red all over, no band.
2. Lo (10,20),(300,400): blue body, round outline.
Comparison: only the second object is blue; the others are red and green, and none has the same round outline.
Conclusion: the Lo is the blue one at (12,20),(300,400)."""
LAST = "(12,20),(300,400)"
ARGS = gen_cot.parse_args(["--samples", "x", "--out", "y", "--knowledge", "z"])
read = gen_cot.read_jsonl

def start(samples, out, *flags):
    command = [sys.executable, ROOT / "gen_cot.py", "--samples", samples, "--out", out, *flags]
    env = os.environ | {"NO_PROXY": "*"}
    return subprocess.Popen(list(map(str, command)), env=env, text=True, stdout=-1, stderr=-1)

def cot(*command, check=True):
    """What a whole run said; it fails, if at all, with one line."""
    run = start(*command)
    out, err = run.communicate()
    assert "Traceback" not in err and (run.returncode == 0) == check, err
    return out + err

# ---- the table ----
def test_the_chain_of_a_hand_written_row_is_exact_and_the_shortest_is_long_enough():
    assert gen_cot.knowledge_cot(ROW, TABLE) == (EXACT, None)
    table = {name: {"description": color} for name, color in (("Lo", "red"), ("Mi", "blue"))}
    for chain in (EXACT, gen_cot.knowledge_cot(ROW | {"entities": ROW["entities"][:2]}, table)[0]):
        assert gen_cot.judge(chain, False, ROW, ARGS) == (chain, None)
    assert gen_cot.knowledge_cot(ROW, {k: v for k, v in TABLE.items() if k != "Ra"})[1] == "unknown entity: Ra"
    assert gen_cot.knowledge_cot(ROW, TABLE | {"Mi": TABLE["Ra"]})[1].startswith("same description")

def test_kept_rows_end_in_their_box_and_a_run_that_was_cut_in_the_same_bytes(world_dir, synth_dir, tmp_path):
    table, source = json.loads((world_dir / "knowledge.json").read_text()), read(synth_dir / "samples.jsonl")
    del table[source[0]["entities"][0]["entity"]]  # so that there is something in rejected.jsonl
    out, flags = tmp_path / "deep/out", ["--knowledge", write(tmp_path / "table.json", [table])]
    cot(synth_dir / "samples.jsonl", out, *flags)
    rows, rejected = read(out / "samples.jsonl"), read(out / "rejected.jsonl")
    assert len(rows) + len(rejected) == 12 and rejected[0]["reason"].startswith("unknown entity: ")
    for row in rows:
        old, boxes = next(r for r in source if r["id"] == row["id"]), gen_cot.boxes_in(row["cot"], [])
        assert boxes[-1] == row["entities"][row["target"]]["bbox_1000"] and len(boxes) == len(row["entities"]) + 1
        said = f"<think>\n{row['cot']}\n</think> <answer>{row['answer']}</answer>"
        assert [m["content"] for m in row["messages"]] == ["<image>" + row["question"] + gen_cot.R1_SUFFIX, said]
        assert (out / row["images"][0]).samefile(synth_dir / old["images"][0])
        teacher = {"backend": "knowledge", "model": "table.json", "attempt": 1}
        assert row == old | {k: row[k] for k in ("images", "messages", "cot")} | {"teacher": teacher}
    whole = {name: (out / name).read_bytes() for name in ("samples.jsonl", "rejected.jsonl", "part.jsonl")}
    for name in whole:
        (out / name).write_bytes(whole[name][: int(len(whole[name]) * 0.6)])
    cot(synth_dir / "samples.jsonl", out, *flags)
    assert {name: (out / name).read_bytes() for name in whole} == whole
    write(tmp_path / "table.json", [table | {"Nobody": {"description": "a grey disc"}}])
    assert "'knowledge_md5'" in cot(synth_dir / "samples.jsonl", out, *flags, check=False)

# ---- rules ----
@pytest.mark.parametrize("rule, text", [  # those of filter.py stand in its own test
    *[("headings", text) for text in ("", FINE.replace("## Visual Analysis", "## Looks"), "Sure, here it is.\n" + FINE,
                                      FINE + "\nConclusion: (10,20),(300,400)")],
    *[("wrong final box", FINE.replace(LAST, box)) for box in (
        "left", "(60,20),(300,400)", LAST + ", (5,6),(7,8)", LAST + " or (500,600),(700,900)")],
    ("a box in the reasoning is none", FINE.replace("(500,600),(700,900)", "(500,600),(400,900)")),
    ("not 20 to 800 words", FINE.replace("red all", "red " * 900)),
    *[("betrays that the answer was given", FINE.replace("red all over", f"red all over, {phrase},")) for phrase in (
        "the provided bounding box", "the given bounding box says so", "as stated", "the prompt says it",
        "the labels given", "by the ground truth", "the ground-truth box", "the bounding box of Lo is given",
        "we are told so", "it is labeled as Lo", "matches the bounding box", "the names that were given",
        "according to the annotations")],
])  # fmt: skip
def test_each_rule_rejects_its_text(rule, text):
    assert gen_cot.judge(text, False, ROW, ARGS)[1].split(":")[0] == rule

def test_what_is_accepted_passes_the_filter():
    """The case of the name, 601 to 800 words, a bullet that is true of every look-alike, a name that is like a box."""
    theirs, odd = f.parse_args(["--stage", "cot", "--samples", "x", "--out", "y"]), "Porsche 911 (901, 930, 964, 993)"
    entities = [e | {"entity": {"Lo": odd, "Mi": "Ford (2010, 2012)"}.get(e["entity"], "Ra")} for e in ROW["entities"]]
    odd_row = ROW | {"entities": entities} | {k: ROW[k].replace("Lo", odd) for k in ("question", "answer")}
    def judged(chain, row):
        said = {"user": row["question"], "assistant": f"<think>\n{chain}\n</think> <answer>{row['answer']}</answer>"}
        row = row | {"messages": [{"role": role, "content": said[role]} for role in said]}
        return gen_cot.judge(chain, False, row, ARGS)[1], f.broken_row(row, Counter(), theirs)
    bullets = "".join(f"{i}. object\n- four round wheels\n" for i in range(5)) + "2. "
    for change in (("Lo", "Lo"), ("Lo", "LO"), ("red all", "red " * 700), ("2. ", bullets)):
        named = re.sub(r"\bLo\b", odd, FINE.replace(*change), flags=re.I).replace("Mi (5", "ford (2010, 2012), (5")
        assert judged(FINE.replace(*change), ROW) == judged(named, odd_row) == (None, None)
    assert judged(FINE.replace("Lo", "Zu"), ROW) == ("target not named", "target not named")
    tokens = FINE.replace(LAST, f"<|box_start|>{LAST}<|box_end|>") + "\n"  # Qwen's own are dropped
    assert gen_cot.judge(tokens, False, ROW, ARGS) == (FINE, None)
    assert gen_cot.judge(FINE, True, ROW, ARGS)[1] == "cut off: ran into --max_completion_length"

def test_the_prompt_tells_all_names_and_boxes():
    prompt = gen_cot.teacher_prompt(ROW)
    assert "Mi (500,600),(700,900), Lo (10,20),(300,400), Ra (400,100),(600,500)." in prompt
    assert "The bounding box of Lo is (10,20),(300,400)." in prompt

# ---- a server with faults ----
class Teacher(BaseHTTPRequestHandler):
    """A prompt first meets the faults of its row, by the number at the end of the target's name, then a good chain."""
    log_message = staticmethod(print)
    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        image, text = body["messages"][0]["content"]
        Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].split(",", 1)[1]))).load()
        target, box = re.search(r"The bounding box of (.*) is (.*)\.", text["text"]).groups()
        with server.lock:
            server.keys.add(self.headers["Authorization"])
            number = int(re.search(r"\d*$", target)[0] or 0) % len(server.faults)
            faults = server.left.setdefault(target, [*server.faults[number]])
            fault = faults.pop(0) if faults else None
            server.counts[fault] += 1
            fault = 401 if server.counts[None] > server.quits_after else fault
        time.sleep(1.5 if fault == "slow" else 0)
        if fault == "drop":
            return self.connection.close()
        chain = FINE.replace("Lo", target).replace(LAST, box).replace("outline.", f"outline.{server.odd}", 1)
        choice = {"message": {"content": "blah" if fault == "garbage" else chain}, "finish_reason": "stop"}
        answer = {"id": "1", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
        status = fault if isinstance(fault, int) else 200
        data = json.dumps(answer if status == 200 else {"error": {"message": "no"}}).encode()
        sent = {"half a body": data[:99], "half a JSON": data[:99], "no choices": b"{}", "page": b"<html>Hello</html>"}
        sent = sent.get(fault, data)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client had waited long enough
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if fault == "page" else "application/json")
            self.send_header("Content-Length", str(len(data if fault == "half a body" else sent)))
            self.end_headers()
            self.wfile.write(sent)

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

def serve(port):
    """A server without faults."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Teacher)
    server.lock, server.keys, server.left, server.counts = threading.Lock(), set(), {}, Counter()
    server.faults, server.quits_after, server.odd = [[]], 10**9, ""
    return server

@pytest.fixture
def server():
    server = serve(0)
    server.odd = "\u2028\ud83d"  # a line separator that JSON does not escape, and half a character
    server.flags = ["--teacher", "openai", "--teacher_model", "big", "--request_timeout", 1, "--base_url",
                    f"http://127.0.0.1:{server.server_port}/v1"]  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

@pytest.fixture
def many(tmp_path):  # 90 rows, each with a target of its own name
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    rows = [ROW | {"id": f"many-{i}", "entities": [{"entity": f"Lo {i}", "bbox_1000": BOXES["Lo"]}], "target": 0,
                   "answer": ANSWER.replace("Lo", f"Lo {i}")} for i in range(90)]  # fmt: skip
    return write(tmp_path / "samples.jsonl", rows)

ALWAYS_BAD = (["garbage"] * 99, [400] * 99)
FAULTS = [[429], [500], [503], ["slow"], ["garbage", "garbage"], ["drop"], ["half a body"], ["half a JSON"], ["page"],
          ["no choices"], ["drop", "garbage", 408], *ALWAYS_BAD, []]  # fmt: skip

def test_rows_through_every_fault_and_a_kill_are_each_finished_once(many, tmp_path, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    server.faults, out, lines = FAULTS, tmp_path / "out", 0
    run = start(many, out, *server.flags, "--concurrency", 8)
    while run.poll() is None and lines < 20:
        time.sleep(0.02)
        lines = (out / "part.jsonl").read_bytes().count(b"\n") if (out / "part.jsonl").exists() else 0
    run.kill()
    assert run.wait() == -9 and 20 <= lines < 80
    (out / "part.jsonl").write_bytes((out / "part.jsonl").read_bytes() + b'{"id": "many-')
    cot(many, out, *server.flags, "--concurrency", 32, "--price_per_million", 1000, 2000)
    parts, kept = read(out / "part.jsonl"), read(out / "samples.jsonl")
    stats = json.loads((out / "stats.json").read_text())
    ids, kinds = [f"many-{i}" for i in range(90)], [FAULTS[i % len(FAULTS)] for i in range(90)]
    assert sorted(r["id"] for r in parts) == sorted(ids)
    assert [r["id"] for r in kept] == [i for i, kind in zip(ids, kinds, strict=True) if kind not in ALWAYS_BAD]
    assert all(gen_cot.judge(r["cot"], False, r, ARGS)[1] is None and "\u2028" not in r["cot"] for r in kept)
    garbage, refused = (kinds.count(kind) for kind in ALWAYS_BAD)
    assert stats["rejected"] == {"refused by the server": refused, "headings": garbage}
    answers = sum(r["attempt"] for r in parts) - refused
    assert (stats["prompt_tokens"], stats["completion_tokens"]) == (7 * answers, 5 * answers)
    assert stats["cost"] == round(answers * (7 * 1000 + 5 * 2000) / 1e6, 4) and stats["attempts"].keys() == {*"123"}
    assert len(kept) <= server.counts[None] <= len(kept) + 8  # what was saved is not asked again
    written = "".join(p.read_text() for p in out.glob("*.json*"))
    assert server.keys == {"Bearer from-the-environment"} and "from-the-environment" not in written

def test_a_row_is_at_fault_if_others_are_answered_else_the_server(many, tmp_path, server):
    """It fails on one row, refuses every row, is absent, quits: the last three end in one line, no row is lost."""
    server.faults = [[500] * 9] + [[]] * 89
    cot(many, tmp_path / "a", *server.flags, "--max_retries", 1, "--concurrency", 2)
    (rejected,) = read(tmp_path / "a/rejected.jsonl")
    assert (rejected["id"], rejected["reason"]) == ("many-0", "refused by the server")
    server.faults, server.left = [[400] * 9], {}
    assert "every row is refused, BadRequestError" in cot(many, tmp_path / "b", *server.flags, check=False)
    absent = [*server.flags[:-1], "http://127.0.0.1:9/v1", "--max_retries", 1]
    assert "127.0.0.1:9/v1: APIConnectionError" in cot(many, tmp_path / "c", *absent, check=False)
    assert not read(tmp_path / "b/part.jsonl") and not read(tmp_path / "c/part.jsonl")
    server.faults, server.left, server.quits_after = [[]], {}, server.counts[None] + 30
    assert "AuthenticationError" in cot(many, tmp_path / "d", *server.flags, check=False)
    assert 15 <= len(read(tmp_path / "d/part.jsonl")) <= 30 and not (tmp_path / "d/samples.jsonl").exists()
