"""SFT: packed sequences against plain ones, what is learned from which rows, and what the export gives back."""

import json
from types import SimpleNamespace

import plain
import pytest
import torch
from conftest import metrics_of, run_script
from safetensors.torch import load_file

import train_grpo as g
import train_sft as t

@pytest.fixture(scope="module")
def items(parts):
    args = SimpleNamespace(target="direct", prompt_suffix=None)
    questions = [s | {"question": s["question"] + " please" * i} for i, s in enumerate(parts.prompts)]
    return [t.encode(parts.processors, args, s) for s in questions]

def test_packed_sequences_equal_plain_ones(parts, items):
    pieces = [plain.completion_logps(parts.plain_model, parts.tokenizer, x, [x["completion_ids"]])[0][0] for x in items]
    want, weights = torch.cat(pieces), torch.randn(sum(map(len, pieces)), generator=torch.Generator().manual_seed(0))
    parts.plain_model.zero_grad()
    (want * weights).sum().backward()
    theirs = {n: p.grad for n, p in parts.plain_model.named_parameters()}
    for size, chunk in ((5, 2**26), (5, 9 * len(parts.tokenizer)), (2, 2**26)):
        parts.model.zero_grad()
        rows = [t.pack_sequences(items[i : i + size], "cpu") for i in range(0, 5, size)]
        got = torch.cat([t.CompletionLogProbs(parts.model, chunk=chunk)(row) for row in rows])
        assert (got - want).abs().max() < 1e-5
        (got * weights).sum().backward()
        for name, p in parts.model.named_parameters():
            assert (p.grad - theirs[name]).abs().max() <= 1e-4 * theirs[name].abs().max() + 1e-7, (size, name)

def test_what_is_learned_is_the_assistants_turn_and_its_end(parts, items):
    for s, x in zip(parts.prompts, items, strict=True):
        said, turn = (parts.tokenizer.decode(x[key]) for key in ("completion_ids", "prompt_ids"))
        assert said == t.model_text(s["answer"], parts.processors[2], x["grid"]) + "<|im_end|>"
        assert turn.endswith("<|im_end|>\n<|im_start|>assistant\n") and s["question"].split("<")[0] in turn

def test_a_chain_follows_the_prompt_it_was_made_with_and_a_bare_answer_the_bare_question():
    for target, flag, want in (("cot", None, "!"), ("direct", None, ""), ("cot", "", ""), ("direct", "?", "?")):
        assert t.suffix_of({"suffix": "!"}, SimpleNamespace(target=target, prompt_suffix=flag)) == want

@pytest.mark.parametrize("parts", ["qwen2_vl"], indirect=True)
def test_a_run_learns_freezes_vision_and_its_export_gives_the_same_tokens(runs, tiny_dir, parts):
    metrics, folder = metrics_of(runs["train_sft"]), str(runs["train_sft"] / "final")
    assert [m["epoch"] for m in metrics] == pytest.approx([4 / 12, 8 / 12, 1, 13 / 12])
    assert metrics[2]["loss"] < metrics[0]["loss"] - 0.2
    first, last = metrics[0]["num_tokens"], metrics[3]["num_tokens"] - metrics[2]["num_tokens"]
    assert last < first / 3, "the last step has one row, not four"
    before, after = load_file(tiny_dir / "model.safetensors"), load_file(f"{folder}/model.safetensors")
    assert all(torch.equal(before[k], after[k]) == ("visual" in k) for k in before)
    plain_model, processors = t.AutoModelForImageTextToText.from_pretrained(folder), t.load_processors(folder, 401408)
    assert plain_model.config.prompt_suffix == "" and processors[0].get_vocab() == parts.tokenizer.get_vocab()
    prompt = parts.prompts[0] | t.chat_inputs(processors, parts.prompts[0]["image"], parts.prompts[0]["question"])
    model = t.load_model(folder, "float32", torch.device("cpu"))
    ((ours, _, _),) = g.rollout(model, processors[0], [prompt], [["0"]], 16, 0.0)[0]
    draw = dict(max_new_tokens=16, do_sample=False, bad_words_ids=[[i] for i in parts.banned])
    assert plain.generate(plain_model, prompt, **draw) == [ours]

def test_sharegpt_files_train_with_the_long_rows_counted_and_the_tracker_told(synth_dir, tiny_dir, tmp_path):
    rows = [json.loads(line) for line in (synth_dir / "samples.jsonl").read_text().splitlines()]
    share = [{"messages": r["messages"], "images": [str(synth_dir / r["images"][0])]} for r in rows]
    del share[3]["messages"][1]
    share[4]["messages"][1]["content"] = "so " * 200
    for i in (0, 1):
        (tmp_path / f"{i}.json").write_text(json.dumps([r | {"id": f"{i}{j}"} for j, r in enumerate(share[i::2])]))
    stub = "def init(id, **kwargs): print('wandb init', len(id))\ndef log(row, step): print('wandb log', step)\n"
    (tmp_path / "wandb.py").write_text(stub)
    done = run_script("train_sft.py", "--model", tiny_dir, "--data", tmp_path / "0.json", tmp_path / "1.json",
                      "--output_dir", tmp_path / "run", "--train_batch_size", 5, "--max_length", 150, "--max_bad_rows",
                      1, "--wandb", "kvg", "--save_steps", 0, PYTHONPATH=str(tmp_path))  # fmt: skip
    assert "10 of 12 rows are of use, the others too long or bad\n11: ValueError nothing to learn from" in done.stdout
    assert [(m["step"], m["epoch"]) for m in metrics_of(tmp_path / "run")] == [(1, 0.5), (2, 1.0)]
    told = [line for line in done.stdout.splitlines() if line.startswith("wandb")]
    assert told == ["wandb init 32", "wandb log 1", "wandb log 2"]
