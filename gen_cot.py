"""Writes a chain of thought for every composite sample, from a served teacher or from an attribute table.

reads   --samples: samples.jsonl of synth_data.py; --knowledge: {"Name": {"description"}} (teacher `knowledge`)
writes  --out: samples.jsonl (rows with cot, teacher and <think>/<answer> messages), rejected.jsonl (with the reasons),
        stats.json (tokens and cost too), run.json, part.jsonl (a line per finished row: a killed run goes on)

  smoke    python gen_cot.py --samples runs/synth/samples.jsonl --knowledge runs/toy/world/knowledge.json --out runs/cot
  served   vllm serve Qwen/Qwen2-VL-72B-Instruct --tensor-parallel-size 8; python gen_cot.py --teacher openai
             --teacher_model Qwen/Qwen2-VL-72B-Instruct --samples runs/synth/samples.jsonl --out runs/cot

As in the paper (arXiv 2503.12797) the teacher sees all labels and boxes and the target's box, and rationalises:
Planning, Visual Analysis, Comparison, Conclusion. Differences: our own wording of the prompt; every chain is checked, a
bad one is drawn again and at last rejected (the paper describes neither); the teacher `knowledge`, a mere table.
"""

import argparse
import asyncio
import base64
import fcntl
import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from functools import partial
from mimetypes import guess_type
from pathlib import Path

from tqdm import tqdm

TEACHER_PROMPT = """This image shows {listed}.
Boxes are (x1,y1),(x2,y2), on a grid from 0 to 1000 over the width and over the height of the image.
The bounding box of {target} is {box}.
Write the reasoning by which an expert who sees only the image would find {target}, \
from the image and from what is known about its looks.
Notes:
1. Compare {target} in detail with the other objects, which are of the same kind, \
until there is evidence that only it shows.
2. First analyse the visible features of every object, and only then compare.
3. An object called [Unknown] has no known name; it can still be compared by its looks.
Write exactly four parts, each beginning on a new line with its heading, and nothing before the first:
Planning: what is known about the looks of {target}, and what to look for.
Visual Analysis: one numbered block per object with its name, its box, and its colours, shapes and parts.
Comparison: which features set {target} apart from each of the others.
Conclusion: the decision; the last words are the box of {target}, written as (x1,y1),(x2,y2).
Never mention that names, boxes or these notes were given to you."""
HEADINGS = re.compile(r"^[ \t#*\d.)]*(planning|visual analysis|comparison|conclusion)[ \t*]*(?::|$)", re.I | re.M)
INLINE = re.compile(r"<\|(?:box|object_ref)_(?:start|end)\|>")  # Qwen's own way to write names and boxes; dropped
GIVEN = r"(?:provided|given|supplied|stated|specified)"
BETRAYALS = re.compile("|".join((
    rf"\b{GIVEN} (?:bounding box|box|coordinate|label|name|annotation|location|information|answer)",
    r"\b(?:box|boxes|coordinates?|labels?|names?|annotations?)(?: (?:that )?(?:is|are|was|were|has been|have been))?"
    rf" {GIVEN}\b|\bbounding box[^.\n]{{0,60}}\b{GIVEN}\b|\bas {GIVEN}\b",
    r"\b(?:match|matches|matching|consistent with|confirmed by|according to)"
    r" the (?:\w+ )?(?:bounding box|coordinates|labels?|annotations?)\b",
    r"\bthe (?:prompt|instructions?|annotations?|notes)\b|\bground[- ]truth\b|\blabell?ed (?:as\b|\[?unknown)",
    r"\b(?:I|we) (?:am|are|was|were|have been) (?:told|given|provided)\b",
)), re.I)  # fmt: skip
BOX_TEXT = "({},{}),({},{})"
TOKENS = ("prompt_tokens", "completion_tokens")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = p.add_argument
    # fmt: off
    add("--samples", required=True, help="samples.jsonl of synth_data.py")
    add("--out", required=True, help="output folder; an interrupted run is continued")
    add("--teacher", default="knowledge", choices=["openai", "knowledge"], help="served model, or attribute table")
    add("--knowledge", help='teacher knowledge: JSON {"Name": {"description"}}')
    # teacher openai; the key is read from the environment variable OPENAI_API_KEY alone
    add("--teacher_model", help="name of a VLM that the server knows (paper: Qwen2-VL-72B)")
    add("--base_url", default="http://localhost:8000/v1", help="OpenAI-compatible server (vLLM, SGLang, ...)")
    add("--concurrency", type=int, default=16, help="requests in flight")
    add("--request_timeout", type=float, default=300, help="seconds, the wait in the server included")
    add("--max_retries", type=int, default=40, help="of a request, up to 8 s apart: a restart of 4 minutes is survived")
    add("--price_per_million", nargs=2, type=float, metavar=("PROMPT", "COMPLETION"), help="tokens, in any currency")
    # its chains
    add("--max_attempts", type=int, default=3, help="chains drawn per row before it is rejected")
    add("--temperature", type=float, default=0.7, help="0 is greedy and wants --max_attempts 1")
    add("--max_completion_length", type=int, default=1024, help="tokens; a longer chain is rejected")
    add("--min_words", type=int, default=20, help="of a chain; the same rules as in filter.py")
    add("--max_words", type=int, default=800, help="of a chain")
    add("--seed", type=int, default=0)
    # fmt: on
    args = p.parse_args(argv)
    if not (args.knowledge if args.teacher == "knowledge" else args.teacher_model):
        p.error("want --knowledge for teacher knowledge, --teacher_model for teacher openai")
    if min(args.max_attempts, args.concurrency) < 1 or args.temperature <= 0 and args.max_attempts > 1:
        p.error("want at least 1 for --max_attempts and --concurrency, and 1 attempt at --temperature 0: all are equal")
    return args


# ---- chains ----
def knowledge_cot(row, knowledge):
    """(chain, None) from the table alone, or (None, reason). Reading order: upper half first, each from the left."""
    entities, target = row["entities"], row["entities"][row["target"]]
    looks = {e["entity"]: knowledge.get(e["entity"], {}).get("description") for e in entities}
    if unknown := [name for name in looks if looks[name] is None]:
        return None, f"unknown entity: {unknown[0]}"
    if len(set(looks.values())) < len(entities):
        return None, "same description: two entities of the image cannot be told apart"
    ordered = sorted(entities, key=lambda e: (sum(e["bbox_1000"][1::2]) > 1000, sum(e["bbox_1000"][::2])))
    listed = "\n".join(f"{looks[e['entity']]} {BOX_TEXT.format(*e['bbox_1000'])}" for e in ordered)
    name, look, box = target["entity"], looks[target["entity"]], BOX_TEXT.format(*target["bbox_1000"])
    seen = f"Planning: {name} is {look}.\nVisual Analysis:\n{listed}\nComparison: of the objects above, "
    return f"{seen}only {look} fits {name}.\nConclusion: {name} is {look} {box}.", None


def teacher_prompt(row):
    """What a model is asked: all labels and boxes, the target's box, the paper's three notes, four headed parts."""
    target = row["entities"][row["target"]]
    listed = ", ".join(f"{e['entity']} {BOX_TEXT.format(*e['bbox_1000'])}" for e in row["entities"])
    return TEACHER_PROMPT.format(listed=listed, target=target["entity"], box=BOX_TEXT.format(*target["bbox_1000"]))


def judge(response, cut, row, args):
    """(chain, None) of a response, or (chain, the rule that it breaks). `cut`: it ran into --max_completion_length."""
    chain = re.sub("[\u0085\u2028\u2029]", "\n", INLINE.sub("", response)).strip()  # line ends, not escaped by JSON
    names, target = [e["entity"] for e in row["entities"]], row["entities"][row["target"]]
    heads = HEADINGS.findall(chain)
    if cut:
        return chain, "cut off: ran into --max_completion_length"
    if " ".join(heads).lower() != "planning visual analysis comparison conclusion" or not HEADINGS.match(chain):
        return chain, "headings: " + ", ".join(heads)
    if found := BETRAYALS.search(chain):
        return chain, f"betrays that the answer was given: {found[0]}"
    last = boxes_in(HEADINGS.split(chain)[-1], names)[-1:]
    if not last or not last[0] or box_iou(last[0], target["bbox_1000"]) < 0.9:
        return chain, f"wrong final box: {last}"
    return chain, broken_rule(chain, target["entity"], names, target["bbox_1000"], args)


# ---- the served teacher ----
async def ask(rows, answered, args, save):
    """Draws chains for every row, up to --max_attempts; saves the good one, or the reason why there is none.

    A busy, slow or absent server is the client's business, which asks again, waiting longer and longer; at last the run
    ends. A row that the server refuses, or still fails on while it answers others, is rejected.
    """
    import openai

    todo, refused, last = iter(rows), [], -math.inf  # last: when it answered, in seconds

    async def check(response):  # what is no chat completion, such as a proxy's page, counts as a busy server
        try:
            json.loads(await response.aread())["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            response.status_code = 503 if response.is_success else response.status_code

    async def worker():
        nonlocal answered, last
        for row in todo:  # all workers draw from one iterator
            path, tokens = Path(args.samples).parent / row["images"][0], Counter()
            url = f"data:{guess_type(path)[0]};base64,{base64.b64encode(path.read_bytes()).decode()}"
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": teacher_prompt(row)}]
            for attempt in range(1, args.max_attempts + 1):
                before, seed = answered, hashlib.sha256(f"{args.seed}:{attempt}:{row['id']}".encode()).hexdigest()[:7]
                try:
                    reply = await client.chat.completions.create(
                        model=args.teacher_model, messages=[{"role": "user", "content": content}], seed=int(seed, 16),
                        temperature=args.temperature, max_tokens=args.max_completion_length)  # fmt: skip
                except openai.APIError as e:
                    status, said = getattr(e, "status_code", None), f"{type(e).__name__} ({e})"[:500]
                    # the row is at fault, not the server, if it answered others meanwhile and until now
                    is_there = answered > before and time.monotonic() - last < 60 and status not in (401, 403, 404, 429)
                    if not is_there and (status not in (400, 413, 422) or len(refused) > 100 and not answered):
                        raise InputError(f"{args.base_url}: {said}; want an answer; the same command goes on") from None
                    refused.append((row, None, "refused by the server", attempt, said, tokens))
                    break
                answered, last = answered + 1, time.monotonic()
                tokens.update({key: getattr(reply.usage, key, None) or 0 for key in TOKENS})
                text, cut = reply.choices[0].message.content or "", reply.choices[0].finish_reason == "length"
                cot, reason = judge(text, cut, row, args)
                if reason is None or attempt == args.max_attempts:
                    save(row, cot, reason, attempt, text, tokens)
                    break

    async with openai.AsyncOpenAI(
        base_url=args.base_url, api_key=os.environ.get("OPENAI_API_KEY") or "EMPTY", timeout=args.request_timeout,
        max_retries=args.max_retries, http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [check]}),
    ) as client:  # fmt: skip
        await asyncio.gather(*[worker() for _ in range(args.concurrency)])
    if refused and not answered:
        raise InputError(f"{args.base_url}: every row is refused, {refused[0][4]}; want a server that takes them")
    for record in refused:
        save(*record)


def main():
    args, start = parse_args(), time.time()
    out, folder, part = Path(args.out), Path(args.samples).parent.resolve(), Path(args.out, "part.jsonl")
    rows, table = read_composites(args.samples), {}
    if args.teacher == "knowledge":
        try:
            table = {name: dict(entry) for name, entry in json.loads(Path(args.knowledge).read_bytes()).items()}
        except (ValueError, TypeError, AttributeError) as e:
            raise InputError(f'{args.knowledge}: {e}; want JSON {{"Name": {{"description"}}}}') from None
    if out.resolve() == folder:
        raise InputError(f"--out {out}: holds --samples; want another folder")
    settings = vars(args) | {"knowledge_md5": hashlib.md5(json.dumps(table).encode()).hexdigest()}
    start_run(out, settings, {"samples", "teacher", "teacher_model", "knowledge_md5", "seed"})
    # 1. a chain for every row, or the reason why there is none; what an interrupted run finished stays
    answers, before = {r["id"]: r["answer"] for r in rows}, read_jsonl(part, unfinished=True)
    records = {r["id"]: r for r in before if answers.get(r["id"]) == r["answer"]}
    todo = [r for r in rows if r["id"] not in records]
    write(part, *map(json.dumps, before))
    with open(part, "a", 1, "utf-8") as f, tqdm(total=len(rows), initial=len(records), mininterval=10) as bar:

        def save(row, cot, reason, attempt, response, tokens):
            r = {"id": row["id"], "answer": row["answer"], "cot": None if reason else cot, "reason": reason}
            records[row["id"]] = r | {"attempt": attempt, "response": response if reason else None, **tokens}
            f.write(json.dumps(records[row["id"]]) + "\n")  # ASCII: half a character, which JSON may hold, is no UTF-8
            bar.update()

        if args.teacher == "knowledge":
            for row in todo:
                cot, reason = knowledge_cot(row, table)
                save(row, *((cot, reason) if reason else judge(cot, False, row, args)), 1, None, {})
        elif todo:
            asyncio.run(ask(todo, len(records), args, save))
    # 2. rows in the input's order
    kept, rejected = [], [r for r in (records[row["id"]] for row in rows) if r["reason"]]
    for row in rows:
        if (r := records[row["id"]])["reason"]:
            continue
        messages = [{"role": "user", "content": "<image>" + row["question"] + R1_SUFFIX},
                    {"role": "assistant", "content": f"<think>\n{r['cot']}\n</think> <answer>{row['answer']}</answer>"}]
        images = [i if os.path.isabs(i) else os.path.relpath(folder / i, out.resolve()) for i in row["images"]]
        model = args.teacher_model or Path(args.knowledge).name
        teacher = {"backend": args.teacher, "model": model, "attempt": r["attempt"]}
        kept.append(row | {"images": images, "messages": messages, "cot": r["cot"], "teacher": teacher})
    reasons = Counter(r["reason"].split(":")[0] for r in rejected)
    tokens = {key: sum(records[row["id"]].get(key, 0) for row in rows) for key in TOKENS}
    cost = sum(n * price / 1e6 for n, price in zip(tokens.values(), args.price_per_million or (0, 0), strict=True))
    stats = {"rows": len(rows), "kept": len(kept), "rejected": dict(reasons.most_common()),
             "attempts": Counter(r["teacher"]["attempt"] for r in kept),
             "words": round(sum(len(r["cot"].split()) for r in kept) / max(1, len(kept)), 1),
             **tokens, "cost": round(cost, 4), "seconds": round(time.time() - start, 1)}  # fmt: skip
    write(out / "stats.json", to_json(stats, indent=1))
    write(out / "rejected.jsonl", *map(to_json, rejected))
    if not kept:
        raise InputError(f"{out}/rejected.jsonl: 0 of {len(rows)} chains kept, {dict(reasons)}; want a better teacher")
    write(out / "samples.jsonl", *map(to_json, kept))
    print(f"gen_cot: {to_json(stats)} -> {out}/samples.jsonl")


def read_composites(path):
    """Rows of synth_data.py: what a teacher is told must be there."""
    rows, columns = read_jsonl(path), ("images", "entities", "target", "question", "answer")
    for number, r in enumerate(rows, 1):
        where = f"{path}:{number} ({r.setdefault('id', number)})"
        if missing := [c for c in columns if c not in r]:
            raise InputError(f"{where}: no {missing[0]}; want {', '.join(columns)}")
        for e in r["entities"]:
            if "<|" in e.get("entity", "<|") or boxes_in(str(e.get("bbox_1000")), ()) != [e.get("bbox_1000")]:
                raise InputError(f"{where}: {e}; want a name without special tokens, x1 < x2 and y1 < y2 in 0..1000")
        target = [e["bbox_1000"] for e in r["entities"][r["target"] :]][:1]
        if not target or boxes_in(r["answer"], ()) != target:
            raise InputError(f"{where}: target {r['target']}, answer {r['answer']!r}; want an entity, and its box")
        if not (Path(path).parent / r["images"][0]).is_file():
            raise InputError(f"{where}: no file {r['images'][0]}; want an image")
    if len({r["id"] for r in rows}) < len(rows) or not rows:
        raise InputError(f"{path}: {len(rows)} rows, {len({r['id'] for r in rows})} ids; want some, each once")
    return rows


# ======== plumbing: the same bytes stand in other scripts ========
# >>> shared:chain_rules (source)
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
POINT, FOUR = rf"\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)", rf"{NUMBER}\s*(?:,\s*{NUMBER}\s*){{3}}"
BOXES = re.compile(rf"{POINT}(?:\s*,\s*{POINT})+|\(\s*{FOUR}\)|\[\s*{FOUR}\]")
NAMES = re.compile(r'<\|object_ref_start\|>.*?<\|object_ref_end\|>|"label":\s*"(?:[^"\\]|\\.)*"', re.S)
PAIRS = re.compile(r"<\|(object_ref|box)_start\|>(?:(?!<\|).)*<\|\1_end\|>", re.S)  # the only tokens that rows may hold
MARKUP = re.compile(r"</?(?:think|answer|image|video)>|<\|", re.I)  # it would open a turn, a block or an image


def boxes_in(text, names):
    """[x1, y1, x2, y2] of each box of a text, None for one that is none. A name is no box, as "911 (901, 930, 964)"."""
    text = NAMES.sub("_", text)
    for name in sorted((n for n in names if re.search(r"[(\[]", n)), key=len, reverse=True):
        text = re.sub(re.escape(name), "_", text, flags=re.I)
    boxes = [[float(v) for v in re.findall(NUMBER, m[0])] for m in BOXES.finditer(text)]
    return [b if len(b) == 4 and b[0] < b[2] <= 1000 and b[1] < b[3] <= 1000 else None for b in boxes]


def box_iou(a, b):
    """IoU of boxes (x1, y1, x2, y2)."""
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def broken_rule(chain, target, names, bbox_1000, args):
    """The first rule that a chain of thought breaks, or None. `target`: a name, if known; `names`: of all entities."""
    boxes, lines = boxes_in(chain, names), [line.strip() for line in chain.split("\n") if line.strip()]
    rules = {
        "markup": MARKUP.search(PAIRS.sub("", chain)),
        f"not {args.min_words} to {args.max_words} words": not args.min_words <= len(chain.split()) <= args.max_words,
        "target not named": target and not re.search(rf"(?<!\w){re.escape(target)}(?!\w)", chain, re.I),
        "a box in the reasoning is none": None in boxes,
        "ends at another box than the answer": boxes and boxes[-1] and box_iou(boxes[-1], bbox_1000) < 0.5,
        "repeats itself": any(len({*lines[i : i + 4]}) == 1 for i in range(len(lines) - 3)),  # four times in a row
    }
    return next((rule for rule, broken in rules.items() if broken), None)


# <<< shared:chain_rules


# >>> shared:files (copy of synth_data.py)
QUESTION = "Find and give the bounding box of <|object_ref_start|>{}<|object_ref_end|>"
ANSWER = "<|object_ref_start|>{}<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>"
R1_SUFFIX = ("  Output the thinking process in <think> </think> "
             "and final answer (bounding box) in <answer> </answer> tags.")
to_json = partial(json.dumps, ensure_ascii=False)

class InputError(ValueError):
    """What the user has to mend, in one line: where, what was found, what is wanted."""

def read_jsonl(path, unfinished=False):
    """Rows as dicts. `unfinished`: of a killed run, if there was one, without its cut last line."""
    lines = b"" if unfinished and not os.path.exists(path) else Path(path).read_bytes()
    rows = []
    for number, line in enumerate(lines.split(b"\n")[: -1 if unfinished else None], 1):
        try:
            rows += [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError):
            raise InputError(f"{path}:{number}: {line[:80]!r}; want one JSON object a line") from None
    return rows

def write(path, *lines):
    """A text file, whole or not at all."""
    Path(f"{path}.tmp").write_text("".join(f"{line}\n" for line in lines), "utf-8", "backslashreplace")
    os.replace(f"{path}.tmp", path)

def start_run(out, settings, fixed=()):
    """Locks the folder, writes run.json: settings and a hash of this script. Says which an earlier run had otherwise;
    those in `fixed` are refused: one file would hold two kinds of rows."""
    global LOCK  # until the process ends
    out.mkdir(parents=True, exist_ok=True)
    LOCK, path = open(out / ".lock", "w"), out / "run.json"
    try:
        fcntl.lockf(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another run writes here; want one at a time") from None
    except OSError:
        pass  # some file systems have no locks
    now = json.loads(to_json(settings | {"script": hashlib.md5(Path(__file__).read_bytes()).hexdigest()}))
    old = json.loads(path.read_bytes()) if path.exists() else now
    changed = {key: f"{old.get(key)} -> {now[key]}" for key in now if old.get(key) != now[key]}
    if changed.keys() & set(fixed):
        raise InputError(f"{path}: {changed}; want the same settings, or another folder")
    if changed:
        print(f"{path}: goes on with other settings, {changed}", flush=True)
    write(path, to_json(now, indent=1))
# <<< shared:files


if __name__ == "__main__":
    try:
        main()
    except (InputError, FileNotFoundError) as e:
        raise SystemExit(f"gen_cot: {e}") from None
