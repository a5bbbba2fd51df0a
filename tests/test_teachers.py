"""The model teachers of gen_cot.py: served by transformers, served behind faults, and local."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, TWO_RANKS
from PIL import Image
from test_gen_cot import FINE, cot, one_line, read

import gen_cot


def stats_of(out):
    return json.loads((out / "stats.json").read_text())


# ---- a real server ----
@pytest.fixture(scope="module")
def toy_dir(tmp_path_factory):
    """The toy base with a processor that reads no videos: transformers' own for Qwen2-VL wants torchvision for them."""
    out = shutil.copytree(ROOT / "tests/toy/base", tmp_path_factory.mktemp("served") / "base")
    for name, more in (
        ("preprocessor_config.json", {"processor_class": "PaddleOCRVLProcessor"}),
        ("tokenizer_config.json", {"model_specific_special_tokens": {"image_token": "<|image_pad|>"}}),
    ):
        (out / name).write_text(json.dumps(json.loads((out / name).read_text()) | more))
    return out


@pytest.fixture(scope="module")
def transformers_serve(toy_dir):
    """Flags that ask `transformers serve`, which is ready, for the toy base."""
    pytest.importorskip("fastapi", reason="transformers serve wants it; pip install -r requirements.txt")
    pytest.importorskip("uvicorn", reason="transformers serve wants it; pip install -r requirements.txt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    url, log = f"http://127.0.0.1:{port}", toy_dir.parent / "server.log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(toy_dir), "--device", "cpu",
               "--dtype", "float32", "--host", "127.0.0.1", "--port", port]  # fmt: skip
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    with open(log, "w") as f:
        server = subprocess.Popen(command, stdout=f, stderr=f, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                ask(f"{url}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield ["--teacher", "openai", "--base_url", f"{url}/v1", "--teacher_model", toy_dir]
    finally:
        server.terminate()
        server.wait(20)


def test_a_real_server_gives_what_the_same_model_gives_here(synth_dir, toy_dir, transformers_serve, tmp_path):
    """Image, prompt, limits and token counts arrive: greedy, the served model writes what the local one writes."""
    flags = ["--temperature", 0, "--max_attempts", 1, "--max_completion_length", 24, "--price_per_million", 2, 10]
    done = cot(synth_dir, tmp_path / "served", *transformers_serve, *flags, check=False, NO_PROXY="*")
    here = cot(synth_dir, tmp_path / "hf", "--teacher", "hf", "--teacher_model", toy_dir, *flags, check=False)
    for run in (done, here):  # the toy base cannot write a chain
        one_line(run, "0 of 12 chains kept", "12 cut off", "want a teacher", "cost")
    rows, stats = read(tmp_path / "served/rejected.jsonl"), stats_of(tmp_path / "served")
    assert [r["id"] for r in rows] == [r["id"] for r in read(synth_dir / "samples.jsonl")]
    assert rows == read(tmp_path / "hf/rejected.jsonl") and len({r["response"] for r in rows}) > 3
    assert all(stats[k] == stats_of(tmp_path / "hf")[k] for k in ("requests", *gen_cot.TOKENS, "cost"))
    assert stats["completion_tokens"] == 12 * 24 and stats["requests"] == 12 and stats["retries"] == 0
    assert stats["prompt_tokens"] > 12 * 400 and stats["cost"] > 0
    assert stats["cost"] == pytest.approx((2 * stats["prompt_tokens"] + 10 * 12 * 24) / 1e6, abs=1e-4)
    assert f"tokens {stats['prompt_tokens']} prompt, 288 completion, cost {stats['cost']}" in done.stderr


def test_a_server_that_refuses_every_request_stops_the_run_and_rejects_no_row(synth_dir, transformers_serve, tmp_path):
    flags = ["--teacher_model", "another", "--max_retries", 0]
    done = cot(synth_dir, tmp_path, *transformers_serve, *flags, check=False, NO_PROXY="*")
    one_line(done, "BadRequestError", "pinned to", "continues")
    assert not read(tmp_path / "part-00000.jsonl")


# ---- a server with faults ----
class Teacher(BaseHTTPRequestHandler):
    """A prompt first meets its kind of faults, then a good chain built from it.

    Its kind follows from the number at the end of the target's name, or from the order of the first requests.
    """

    FAULTS = [[429], [500], ["slow"], ["garbage", "garbage"], ["drop"], []]

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = body["messages"][0]["content"]
        server, prompt = self.server, text["text"]
        Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].split(",", 1)[1]))).load()
        target, box = re.search(r"The bounding box of (.*) is (.*)\.", prompt).groups()
        with server.lock:
            server.keys.add(self.headers["Authorization"])
            number = re.search(r" (\d+)$", target)
            kind = self.FAULTS[int(number[1] if number else len(server.faults)) % len(self.FAULTS)]
            faults = server.faults.setdefault(prompt, list(kind) if server.faulty else [])
            server.times.setdefault(prompt, []).append(time.time())
            fault = faults.pop(0) if faults else None
            server.counts[fault] += 1
            if server.quits_after is not None and server.counts[None] > server.quits_after:
                fault = 401
        if fault in ("slow", "poison"):
            time.sleep(server.slow_s if fault == "slow" else 0.7)
        if fault == "drop":
            return self.connection.close()
        fault = 500 if fault == "poison" else fault
        odd = "\u2028\ud83d"  # a line separator that JSON does not escape, and half a character
        chain = (
            f"Planning: {target} has a look of its own, known to all who have seen it once in their life.\n"
            f"Visual Analysis:\n1. {target} {box}: bright.{odd}\n"
            f"Comparison: no other object is as bright.\nConclusion: {target} is at {box}"
        )
        message = {"role": "assistant", "content": "blah" if fault == "garbage" else chain}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                  "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                  "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}}  # fmt: skip
        data, status = json.dumps(answer).encode(), 200
        if isinstance(fault, int):
            data, status = json.dumps({"error": {"message": "no", "code": fault}}).encode(), fault
        sent = {
            "half a body": data[:99],
            "half a JSON": data[:99],
            "bytes": b"\xff\xfe\xfd",
            "page": b"<html>Hello</html>",
        }
        sent = sent.get(fault, data)
        try:
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if fault == "page" else "application/json")
            self.send_header("Content-Length", str(len(data if fault == "half a body" else sent)))
            self.send_header("Retry-After", "2" if fault == 429 else "0")
            self.end_headers()
            for byte in sent[:20] if fault == "drip" else b"":  # each comes in time, all together do not
                self.wfile.write(bytes([byte]))
                time.sleep(server.slow_s / 20)
            self.wfile.write(sent[20:] if fault == "drip" else sent)
        except (BrokenPipeError, ConnectionResetError):  # the client had waited long enough
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    server.daemon_threads = True
    server.lock, server.keys, server.faults, server.counts = threading.Lock(), set(), {}, Counter()
    server.times = {}  # prompt -> when it was asked
    server.faulty, server.quits_after, server.slow_s = True, None, 4
    url = f"http://127.0.0.1:{server.server_port}/v1"
    server.flags = ["--teacher", "openai", "--teacher_model", "big", "--base_url", url, "--request_timeout", 2]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_faulty_server_loses_and_doubles_no_row(synth_dir, tmp_path, server):
    flags = ["--log_every_s", 0, "--price_per_million", 1000, 2000]
    done = cot(synth_dir, tmp_path, *server.flags, *flags, OPENAI_API_KEY="from-the-environment", NO_PROXY="*")
    rows, stats = read(tmp_path / "samples.jsonl"), stats_of(tmp_path)
    assert [r["id"] for r in rows] == [r["id"] for r in read(synth_dir / "samples.jsonl")]
    assert all(gen_cot.validate(r["cot"], r) is None and "\u2028" not in r["cot"] for r in rows)
    assert len(read(tmp_path / "part-00000.jsonl")) == 12 and not read(tmp_path / "rejected.jsonl")
    assert stats["attempts"] == {"1": 10, "3": 2} and stats["retries"] >= 8 and stats["requests"] >= 24
    assert stats["prompt_tokens"] == 7 * 16 and server.keys == {"Bearer from-the-environment"}
    waits = [b - a for a, b, *_ in (server.times[p] for p in list(server.faults)[::6])]  # of the two that met a 429
    assert len(waits) == 2 and min(waits) > 1.9, "Retry-After was 2 s"
    assert "from-the-environment" not in "".join(p.read_text() for p in tmp_path.glob("*.json*"))
    progress = re.findall(
        r"^rows (\d+)/12 \| kept (\d+) \| rejected 0 \| .* rows/s \| tokens (\d+) .* eta", done.stdout, re.M
    )
    assert [int(n) for n, _, _ in progress] == [*range(1, 13)] and progress[-1] == ("12", "12", "112")
    assert ", tokens 112 prompt, 80 completion, cost 0.272, " in done.stdout.splitlines()[-1] and stats["cost"] == 0.272


ALWAYS_BAD = (["garbage"] * 99, [400] * 99)
MANY_FAULTS = [[429], [500], ["slow"], ["garbage", "garbage"], ["drop"], ["half a body"], ["half a JSON"], ["bytes"],
               ["page"], ["drip"], ["drop", 429, "garbage", 503, "half a body"], [408], *ALWAYS_BAD, []]  # fmt: skip


@pytest.mark.parametrize("killed", [False, True])
def test_200_rows_through_every_fault_are_each_finished_once(synth_dir, tmp_path, server, monkeypatch, killed):
    """`killed`: with SIGKILL, in the middle of a line, and started again."""
    monkeypatch.setattr(Teacher, "FAULTS", MANY_FAULTS)
    server.slow_s, source, rows = 1.5, read(synth_dir / "samples.jsonl"), []
    for i in range(200):
        row = source[i % len(source)]
        entities = [dict(e) for e in row["entities"]]
        entities[row["target"]]["entity"] += f" {i}"  # so that every prompt is another
        image = os.path.relpath(synth_dir / row["images"][0], tmp_path)
        rows.append(row | {"id": f"many-{i}", "entities": entities, "images": [image]})
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out, part = tmp_path / "out", tmp_path / "out/part-00000.jsonl"
    flags = [*server.flags, "--request_timeout", 1, "--concurrency", 64]
    if killed:
        argv = ["--samples", tmp_path / "samples.jsonl", "--out", out, *flags]
        command = [sys.executable, ROOT / "gen_cot.py", *map(str, argv)]
        run = subprocess.Popen(command, env=os.environ | {"NO_PROXY": "*"}, stdout=subprocess.DEVNULL)
        for _ in range(600):
            if part.exists() and part.read_bytes().count(b"\n") >= 60:
                break
            time.sleep(0.05)
        run.kill()
        assert run.wait() == -9 and 60 <= part.read_bytes().count(b"\n") < 180
        with open(part, "a") as f:
            f.write('{"id": "many-')
    cot(tmp_path, out, *flags, NO_PROXY="*")

    parts, kept, rejected, stats = read(part), read(out / "samples.jsonl"), read(out / "rejected.jsonl"), stats_of(out)
    ids, bad = [r["id"] for r in rows], [MANY_FAULTS[i % len(MANY_FAULTS)] in ALWAYS_BAD for i in range(200)]
    assert sorted(r["id"] for r in parts) == sorted(ids)
    assert [r["id"] for r in kept] == [i for i, no in zip(ids, bad, strict=True) if not no]
    assert [r["id"] for r in rejected] == [i for i, no in zip(ids, bad, strict=True) if no]
    assert all(gen_cot.validate(r["cot"], r) is None for r in kept)
    refused = sum(r["reason"] == "refused by the server" for r in rejected)
    assert stats["rejected"] == {"headings": len(rejected) - refused, "refused by the server": refused} and refused > 9
    assert stats["attempts"] == {str(k): n for k, n in Counter(r["teacher"]["attempt"] for r in kept).items()}
    answers = sum(r["attempt"] for r in parts) - refused
    assert (stats["prompt_tokens"], stats["completion_tokens"]) == (7 * answers, 5 * answers)
    assert len(kept) <= server.counts[None] <= len(kept) + 64  # what was saved is not asked again


def test_a_row_that_the_server_refuses_or_fails_on_is_rejected_alone(synth_dir, tmp_path, server, monkeypatch):
    monkeypatch.setattr(Teacher, "FAULTS", [["poison"] * 9, [400] * 9] + [[]] * 10)
    cot(synth_dir, tmp_path, *server.flags, "--max_retries", 1, NO_PROXY="*")
    assert [r["reason"] for r in read(tmp_path / "rejected.jsonl")] == ["refused by the server"] * 2
    assert len(read(tmp_path / "samples.jsonl")) == 10 and server.counts["poison"] == 2
    assert server.counts[400] <= 2  # once more where no other row had its answer yet


def test_a_server_that_stops_answering_leaves_a_run_that_continues(synth_dir, tmp_path, server):
    server.faulty, server.quits_after = False, 5
    one_line(
        cot(synth_dir, tmp_path, *server.flags, "--concurrency", 2, NO_PROXY="*", check=False),
        "AuthenticationError",
        "continues",
    )
    assert not (tmp_path / "samples.jsonl").exists() and 4 <= len(read(tmp_path / "part-00000.jsonl")) <= 5
    before, server.quits_after = server.counts[None], None
    cot(synth_dir, tmp_path, *server.flags, "--concurrency", 3, "--price_per_million", 1000, 1000, NO_PROXY="*")
    assert [r["id"] for r in read(tmp_path / "samples.jsonl")] == [r["id"] for r in read(synth_dir / "samples.jsonl")]
    assert server.counts[None] - before <= 8  # what was saved is not asked again
    assert stats_of(tmp_path)["attempts"] == {"1": 12} and stats_of(tmp_path)["cost"] == 0.144  # of both runs


def test_an_absent_server_is_one_clear_line(synth_dir, tmp_path):
    url = "http://127.0.0.1:9/v1"
    flags = ["--teacher", "openai", "--teacher_model", "big", "--base_url", url, "--max_retries", 1]
    one_line(
        cot(synth_dir, tmp_path, *flags, NO_PROXY="*", check=False), url, "2 requests failed", "APIConnectionError"
    )


NO_ANSWERS = ["", "[]", "{}", "null", "<p>", "\ufeff", '{"choices": []}', '{"choices": [{}]}', '{"choices": "a"}',
              '{"choices": [{"message": null}]}', '{"choices": [{"message": {"content": [1]}}]}',
              '{"choices": [{"message": {"content": "a"}}], "usage": 5}']  # fmt: skip


@pytest.mark.parametrize("body", NO_ANSWERS)
def test_what_is_no_chat_completion_is_asked_again(body):
    with pytest.raises(ValueError):
        gen_cot.read_reply(body.encode())


def test_a_reply_without_usage_or_text_is_read():
    body = b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}'
    assert gen_cot.read_reply(body) == ("", True, {})


# ---- a local teacher ----
RANDOM = ["--max_completion_length", 8, "--max_attempts", 2, "--batch_size", 5]


@pytest.fixture(scope="module")
def random_run(synth_dir, tiny_dir, tmp_path_factory):
    """The output folder of a run whose teacher is a random model, in one process."""
    out = tmp_path_factory.mktemp("random")
    done = cot(synth_dir, out, "--teacher", "hf", "--teacher_model", tiny_dir, *RANDOM, check=False)
    one_line(done, "0 of 12 chains kept", "cut off", "want")
    return out


def test_a_random_model_is_rejected_with_reasons(random_run):
    rejected, stats = read(random_run / "rejected.jsonl"), stats_of(random_run)
    assert len(rejected) == 12 and all(r["reason"] and r["attempts"] == 2 and "response" in r for r in rejected)
    assert stats["requests"] == 24 and not (random_run / "samples.jsonl").exists()
    assert stats["completion_tokens"] == 24 * 8 and stats["cost"] is None


@pytest.mark.parametrize("way", ["two ranks", "sharded"])
def test_ranks_and_shards_write_what_one_process_writes(synth_dir, tiny_dir, tmp_path, random_run, way):
    more = {"launcher": TWO_RANKS} if way == "two ranks" else {}
    flags = [*RANDOM, "--log_every_s", 0] + (["--device_map", "auto"] if way == "sharded" else [])
    done = cot(synth_dir, tmp_path, "--teacher", "hf", "--teacher_model", tiny_dir, *flags, check=False, **more)
    assert "0 of 12 chains kept" in done.stderr, done.stderr
    assert (tmp_path / "rejected.jsonl").read_bytes() == (random_run / "rejected.jsonl").read_bytes()
    assert {k: v for k, v in stats_of(tmp_path).items() if k != "seconds"} == {
        k: v for k, v in stats_of(random_run).items() if k != "seconds"}  # fmt: skip
    parts = [[r["id"] for r in read(p)] for p in sorted(tmp_path.glob("part-*.jsonl"))]
    assert [len(p) for p in parts] == ([6, 6] if way == "two ranks" else [12]) and len(set(sum(parts, []))) == 12
    assert ("rows 6/6 (rank 0 of 2) |" if way == "two ranks" else "rows 12/12 |") in done.stdout


def test_shards_without_accelerate_are_one_clear_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["--samples", "s", "--out", "o", "--teacher", "hf", "--teacher_model", "m", "--device_map", "auto"]
    with pytest.raises(SystemExit, match="pip install accelerate"):
        gen_cot.parse_args(flags)


def test_a_local_chain_is_kept_and_a_bad_one_is_drawn_again(synth_dir, tiny_dir, tmp_path, monkeypatch):
    rows, asked = read(synth_dir / "samples.jsonl"), []

    def responses(model, tokenizer, prompts, seeds, *_):
        asked.extend(seeds)
        out = []
        for seed, prompt in zip(seeds, prompts, strict=True):
            _, attempt, name = seed.split(":")
            row = next(r for r in rows if r["id"] == name)
            target, box = (
                row["entities"][row["target"]]["entity"],
                gen_cot.box_text(row["entities"][row["target"]]["bbox_1000"]),
            )
            assert f"The bounding box of {target} is {box}." in tokenizer.decode(prompt["prompt_ids"])
            text = FINE.replace("(12,20),(300,400)", box).replace("Lo", target) if attempt == "2" else "no"
            out.append((tokenizer.encode(text + "<|im_end|>"), True))
        return out

    monkeypatch.setattr(gen_cot, "generate_responses", responses)
    argv = ["--samples", synth_dir / "samples.jsonl", "--out", tmp_path, "--teacher", "hf", "--teacher_model", tiny_dir]
    monkeypatch.setattr("sys.argv", ["gen_cot.py", *map(str, argv), "--batch_size", "5"])
    gen_cot.main()
    assert {r["teacher"]["attempt"] for r in read(tmp_path / "samples.jsonl")} == {2}
    assert len(set(asked)) == len(asked) == 24
