"""gen_cot.py: chains of the table, rules, resuming; and a teacher behind a server with faults, on this machine."""

import base64
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

def start(*flags):
    command = [sys.executable, ROOT / "gen_cot.py", *map(str, flags)]
    return subprocess.Popen(command, env=os.environ | {"NO_PROXY": "*"}, text=True, stdout=-1, stderr=-1)

def cot(*flags, check=True):
    run = start(*flags)
    out, err = run.communicate()
    assert "Traceback" not in err and (run.returncode == 0) == check, err
    return out + err

def test_the_chain_of_a_hand_written_row_is_exact_and_a_teacher_is_told_all_names_and_boxes():
    assert gen_cot.knowledge_cot(ROW, TABLE) == gen_cot.judge(EXACT, False, ROW, ARGS) == (EXACT, None)
    assert "Mi (500,600),(700,900), Lo (10,20),(300,400), Ra (400,100),(600,500)." in gen_cot.teacher_prompt(ROW)
    assert gen_cot.knowledge_cot(ROW, {k: v for k, v in TABLE.items() if k != "Ra"})[1] == "unknown entity: Ra"
    assert gen_cot.knowledge_cot(ROW, TABLE | {"Mi": TABLE["Ra"]})[1].startswith("same description")

def test_kept_rows_end_in_their_box_and_a_run_that_was_cut_in_the_same_bytes(world_dir, synth_dir, tmp_path):
    table, source = json.loads((world_dir / "knowledge.json").read_text()), read(synth_dir / "samples.jsonl")
    del table[source[0]["entities"][0]["entity"]]  # so that there is something in rejected.jsonl
    out, flags = tmp_path / "deep/out", ["--knowledge", write(tmp_path / "table.json", [table])]
    flags += ["--samples", synth_dir / "samples.jsonl", "--out", out]
    cot(*flags)
    rows, rejected = read(out / "samples.jsonl"), read(out / "rejected.jsonl")
    assert len(rows) + len(rejected) == 12 and rejected[0]["reason"].startswith("unknown entity: ")
    for row in rows:
        old, boxes = next(r for r in source if r["id"] == row["id"]), gen_cot.boxes_in(row["cot"], [])
        assert boxes[-1] == row["entities"][row["target"]]["bbox_1000"] and len(boxes) == len(row["entities"]) + 1
        said = f"<think>\n{row['cot']}\n</think> <answer>{row['answer']}</answer>"
        assert [m["content"] for m in row["messages"]] == ["<image>" + row["question"] + gen_cot.R1_SUFFIX, said]
        assert (out / row["images"][0]).samefile(synth_dir / old["images"][0])
        assert row == old | {k: row[k] for k in ("images", "messages", "cot", "teacher")}
    whole = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    for path in whole:
        path.write_bytes(whole[path][: int(len(whole[path]) * 0.6)])
    cot(*flags)
    assert {path: path.read_bytes() for path in whole} == whole and len(whole) == 3
    write(tmp_path / "table.json", [table | {"Nobody": {"description": "a grey disc"}}])
    assert "'knowledge_md5'" in cot(*flags, check=False)

@pytest.mark.parametrize("rule, text", [  # those of filter.py stand in its own test
    *[("headings", text) for text in ("", "Sure.\n" + FINE, FINE + "\nConclusion: (10,20),(300,400)")],
    *[("wrong final box", FINE.replace(LAST, box)) for box in (
        "left", "(60,20),(300,400)", LAST + ", (5,6),(7,8)", LAST + " or (500,600),(700,900)")],
    ("not 20 to 800 words", FINE.replace("red all", "red " * 900)), ("target not named", FINE.replace("Lo", "Zu")),
    *[("betrays that the answer was given", FINE.replace("red all over", f"red all over, {phrase},")) for phrase in (
        "the provided bounding box", "as stated", "the labels given", "by the ground truth", "the prompt says it",
        "it is labeled as Lo", "matches the bounding box", "the bounding box of Lo is given", "we are told so")],
])  # fmt: skip
def test_each_rule_rejects_its_text(rule, text):
    assert gen_cot.judge(text, False, ROW, ARGS)[1].split(":")[0] == rule

def test_what_is_accepted_passes_the_filter():
    theirs, odd = f.parse_args(["--stage", "cot", "--samples", "x", "--out", "y"]), "Porsche 911 (901, 930, 964, 993)"
    bullets = "".join(f"{i}. object\n- four round wheels\n" for i in range(5)) + "2. "
    for change in (("Lo", "Lo"), ("Lo", "LO"), ("Lo", odd), ("red all", "red " * 700), ("2. ", bullets)):
        name = odd if odd in change else "Lo"
        row, chain = json.loads(json.dumps(ROW).replace("Lo", name)), FINE.replace(*change)
        said = {"user": row["question"], "assistant": f"<think>\n{chain}\n</think> <answer>{row['answer']}</answer>"}
        row["messages"] = [{"role": role, "content": said[role]} for role in said]
        assert (gen_cot.judge(chain, False, row, ARGS)[1], f.broken_row(row, Counter(), theirs)) == (None, None)
    tokens = FINE.replace(LAST, f"<|box_start|>{LAST}<|box_end|>") + "\n"  # Qwen's own are dropped
    assert gen_cot.judge(tokens, False, ROW, ARGS) == (FINE, None)
    assert gen_cot.judge(FINE, True, ROW, ARGS)[1] == "cut off: ran into --max_completion_length"

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
        time.sleep(1.5 if fault == "slow" else 0)
        if fault == "drop":
            return self.connection.close()
        chain = FINE.replace("Lo", target).replace(LAST, box).replace("outline.", f"outline.{server.odd}", 1)
        choice = {"message": {"content": "blah" if fault == "garbage" else chain}, "finish_reason": "stop"}
        data = json.dumps({"id": "1", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})
        data = {"half a JSON": data[:99], "no choices": "{}", "page": "<html>Hello</html>"}.get(fault, data).encode()
        self.send_response(fault if isinstance(fault, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

def serve(port):
    server = ThreadingHTTPServer(("127.0.0.1", port), Teacher)
    server.lock, server.keys, server.left, server.counts = threading.Lock(), set(), {}, Counter()
    server.faults, server.odd = [[]], ""
    return server

@pytest.fixture
def server(tmp_path):
    """With flags to ask it about 90 rows, each with a target of its own name."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    rows = [ROW | {"id": f"many-{i}", "entities": [{"entity": f"Lo {i}", "bbox_1000": BOXES["Lo"]}], "target": 0,
                   "answer": ANSWER.replace("Lo", f"Lo {i}")} for i in range(90)]  # fmt: skip
    server = serve(0)
    server.odd = "\u2028\ud83d"  # a line separator that JSON does not escape, and half a character
    server.flags = ["--samples", write(tmp_path / "samples.jsonl", rows), "--teacher", "openai", "--teacher_model", "m",
                    "--request_timeout", 1, "--base_url", f"http://127.0.0.1:{server.server_port}/v1"]  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()

FAULTS = [[429], ["slow"], ["garbage"] * 2, ["half a JSON"], ["page"], ["no choices"], ["drop", 500, 408],
          ["garbage"] * 99, [400] * 99, []]  # fmt: skip

def test_rows_through_every_fault_and_a_kill_are_each_finished_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    server.faults, out, lines = FAULTS, tmp_path / "out", 0
    run = start(*server.flags, "--out", out, "--concurrency", 8)
    while run.poll() is None and lines < 20:
        time.sleep(0.02)
        lines = (out / "part.jsonl").read_bytes().count(b"\n") if (out / "part.jsonl").exists() else 0
    run.kill()
    assert run.wait() == -9 and 20 <= lines < 80
    cot(*server.flags, "--out", out, "--concurrency", 32)
    parts, kept = read(out / "part.jsonl"), read(out / "samples.jsonl")
    kinds = {f"many-{i}": FAULTS[i % len(FAULTS)] for i in range(90)}
    assert sorted(r["id"] for r in parts) == sorted(kinds)
    assert [r["id"] for r in kept] == [i for i, kind in kinds.items() if len(kind) < 99]
    assert all(gen_cot.judge(r["cot"], False, r, ARGS)[1] is None and "\u2028" not in r["cot"] for r in kept)
    rejected = Counter(r["reason"].split(":")[0] for r in read(out / "rejected.jsonl"))
    assert rejected == {"refused by the server": 9, "headings": 9}
    assert len(kept) <= server.counts[None] <= len(kept) + 8  # what was saved is not asked again
    written = "".join(p.read_text() for p in out.glob("*.json*"))
    assert server.keys == {"Bearer from-the-environment"} and "from-the-environment" not in written

def test_a_row_is_at_fault_if_others_are_answered_else_the_server(server, tmp_path):
    server.faults = [[500] * 9] + [[]] * 89
    cot(*server.flags, "--out", tmp_path / "a", "--max_retries", 1, "--concurrency", 2)
    assert [r["id"] for r in read(tmp_path / "a/rejected.jsonl")] == ["many-0"]
    server.faults, server.left = [[400] * 9], {}
    assert "every row is refused, BadRequestError" in cot(*server.flags, "--out", tmp_path / "b", check=False)
    absent = [*server.flags[:-1], "http://127.0.0.1:9/v1", "--max_retries", 1, "--out", tmp_path / "c"]
    assert "127.0.0.1:9/v1: APIConnectionError" in cot(*absent, check=False)
    assert not read(tmp_path / "b/part.jsonl") and not read(tmp_path / "c/part.jsonl")
