#!/usr/bin/env bash
# The whole pipeline: set-up, data, both training stages, evaluation. A finished stage is skipped, a killed one goes on.
#   bash run_all.sh                             the toy world: no data, no weights, no GPU needed; minutes on 2 CPU cores
#   MODEL=Qwen/Qwen2-VL-7B-Instruct DATA=fgvr/ BENCH=kvg-bench.parquet TEACHER=serve:Qwen/Qwen2-VL-72B-Instruct bash run_all.sh
#                                               the paper's recipe on every GPU of this node; DRY=1 only says what it would do
#   bash run_all.sh test | setup | study        the tests | the environment alone | the toy world over several seeds
#   FROM=train_grpo bash run_all.sh [forget]    forgets this stage and all after it, and goes on from there [or stops]
# TEACHER  serve:MODEL (vllm, else transformers, started and stopped here) | openai:MODEL (at OPENAI_BASE_URL) | knowledge:FILE
# DATA     category/entity/* with boxes.jsonl, JSONL or parquet; BOX_MODEL=Qwen/Qwen2-VL-7B-Instruct makes the boxes it lacks
# RUN=runs/name SEED=1 NPROC=8 (a node) CARD=h100 PYTHON=python (an environment at hand) TORCH_INDEX=URL (another build of torch)
# SYNTH_FLAGS COT_FLAGS SFT_FLAGS ROLLOUT_FLAGS FILTER_FLAGS GRPO_FLAGS EVAL_FLAGS="..." go to the stages, after ours
# NNODES=2 NODE_RANK=0 MASTER_ADDR=host on every node; repo and RUN on a shared disk
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
SEED=${SEED:-0} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} PY=${PYTHON:-.venv/bin/python} URL=${OPENAI_BASE_URL:-http://localhost:8000/v1}
NODES=--standalone # one node finds a free port itself
[ "$NNODES" = 1 ] || NODES="--nnodes $NNODES --node_rank $NODE_RANK --master_addr ${MASTER_ADDR:?want the host of node 0} --master_port ${MASTER_PORT:-29500}"
stop() { echo "run_all.sh: $*" >&2; exit 2; }

setup() {
  ready() { [ -n "${PYTHON:-}" ] || cmp -s requirements.txt .venv/installed.txt; }
  while [ "$NODE_RANK" != 0 ] && ! ready; do sleep 5; done # node 0 makes it
  if ! ready; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || stop "python3 is $(python3 -V); want 3.10 or newer"
    echo "== setup: .venv from requirements.txt"
    python3 -m venv .venv
    $PY -m pip install -q "$(grep '^torch==' requirements.txt)" setuptools wheel ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
    DS_BUILD_OPS=0 $PY -m pip install -q -r requirements.txt
    cp requirements.txt .venv/installed.txt
  fi
  GPUS=$("$PY" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
  [ "$GPUS" != 0 ] || ! nvidia-smi -L >/dev/null 2>&1 || stop "there are GPUs, but torch sees none; want a newer driver, or TORCH_INDEX of a build for this one"
}

stage() { # name, command ...: runs it once; its output folder is $RUN/name
  local name=$1 began=$SECONDS; shift
  [ ! -e "$RUN/.done/$name" ] || return 0
  if [ "$1" = torchrun ]; then set -- "$PY" -m torch.distributed.run --nproc_per_node "$NPROC" $NODES "${@:2}"
  elif [ "$NODE_RANK" != 0 ]; then set -- true; fi # work of one process: node 0 does it
  echo "== $name${DRY:+: $*}"; [ -z "${DRY:-}" ] || return 0
  "$@"
  [ "$NODE_RANK" != 0 ] || echo $((SECONDS - began)) > "$RUN/.done/$name"
  while [ ! -e "$RUN/.done/$name" ]; do sleep 5; done
}

serve() { # model: a teacher for gen_cot on node 0, until gen_cot is done or the script ends
  local server=(vllm serve "$1" --port 8000 --tensor-parallel-size "$NPROC")
  command -v vllm >/dev/null || server=("$PY" -m transformers.cli.transformers serve "$1" --port 8000)
  if [ -n "${DRY:-}" ]; then echo "== teacher: ${server[*]}"; return; fi
  [ ! -e "$RUN/.done/gen_cot" ] && [ "$NODE_RANK" = 0 ] || return 0
  "${server[@]}" > "$RUN/teacher.log" 2>&1 &
  TEACHER_PID=$!; trap 'kill $TEACHER_PID 2>/dev/null || true' EXIT
  until curl -sf --noproxy '*' localhost:8000/health >/dev/null; do
    sleep 2; kill -0 $TEACHER_PID 2>/dev/null || stop "the teacher stopped: $(tail -n 1 "$RUN/teacher.log"); see $RUN/teacher.log"
  done
}

check() { # the real recipe: says memory, time and disk, and now what could not work later
  [ ! -d "$DATA" ] || [ -f "$DATA/boxes.jsonl" ] || [ -f "${DATA%/}.boxes.jsonl" ] || [ -n "${BOX_MODEL:-}" ] || stop "DATA=$DATA: no boxes.jsonl; want it, or BOX_MODEL"
  [ -f "$BENCH" ] && "$PY" -c 'import sys, eval_kvg as e; sys.exit(not any(s["bbox_1000"] or s["options"] for s in e.read_samples(sys.argv[1:])[0]))' "$BENCH" || stop "BENCH=$BENCH: no file, or no answer in it; want some to score against"
  case $TEACHER in
    knowledge:*) [ -f "${TEACHER#*:}" ] || stop "TEACHER=$TEACHER: no such file" ;;
    openai:*) curl -sfm 20 -H "Authorization: Bearer ${OPENAI_API_KEY:-}" "$URL/models" >/dev/null || stop "no teacher at $URL; want TEACHER=serve:MODEL, or OPENAI_BASE_URL" ;;
  esac
  local gpus=$((NPROC * NNODES))x${CARD:-$( (nvidia-smi -L 2>/dev/null || echo h100) | tr A-Z a-z | grep -oE -m 1 'a100|h100|h200|l40s|a6000|rtx ?[34]090' | tr -d ' ' || echo h100)}
  "$PY" tools/plan.py sft --model "$MODEL" --gpus "$gpus" --data_rows "$N_SFT" $SFT ${SFT_FLAGS:-} > "$RUN/plan_sft.txt" &
  "$PY" tools/plan.py grpo --model "$MODEL" --gpus "$gpus" --data_rows "$N_GRPO" $GRPO ${GRPO_FLAGS:-} > "$RUN/plan_grpo.txt"
  wait $!; tail -qn 1 "$RUN"/plan_*.txt
  local needs=$(sed -n 's/.*run_all.sh at most \([0-9]*\) GB.*/\1/p' "$RUN/plan_grpo.txt") free=$(($(df -kP "$RUN" | awk 'END {print $4}') / 1000000))
  echo "disk: $needs GB wanted at most, $free GB free in $RUN"
  [ "$free" -ge "$needs" ] || [ -n "${DRY:-}" ] || stop "want more room, or --save_total_limit 1 in SFT_FLAGS and GRPO_FLAGS"
}

setup
case "${1:-all}" in
  setup) exit ;;
  test)
    command -v chromium google-chrome >/dev/null || (apt-get update && apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 || true # shows the report
    exec "$PY" -m pytest -q -n 2 --dist loadfile tests ;;
  study) shift; exec "$PY" tests/toy/study.py "$@" ;;
  all | forget) ;;
  *) stop "$1: want setup, test, study, forget or nothing" ;;
esac

if [ -z "${MODEL:-}" ]; then # ---- the toy world
  RUN=${RUN:-runs/toy} MODEL=tests/toy/base TOY=yes SEEN="disc square triangle diamond cross"
  DATA=$RUN/world/train BENCH=$RUN/world/kvg-bench.parquet TEACHER=knowledge:$RUN/world/knowledge.json
  export NPROC=${NPROC:-$((GPUS ? 1 : 2))} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # so small a model gains more from processes than from threads
  SYNTH="--canvas_size 168 112 --grid 3 2 --layouts grid --background gradient --entity_scale 0.6 0.95"
  N_SFT=${N_SFT:-1500} N_GRPO=${N_GRPO:-640} LENGTH=320 EVAL_LENGTH=320 TEMPERATURE=0.8 # stage 1 leaves something to learn
  SFT="--learning_rate 1e-3 --train_batch_size 32 --tokens_per_row 8192 --save_steps 25"
  GRPO="--learning_rate 1e-4 --lr_scheduler constant --train_batch_size 16 --num_generations 8 --iou_threshold 0.5 --max_steps 40 --save_steps 10"
else # ---- the paper's recipe
  : "${DATA:?want DATA=single-entity images}" "${BENCH:?want BENCH=kvg-bench.parquet}" "${TEACHER:?want TEACHER=serve:MODEL, openai:MODEL or knowledge:FILE}"
  RUN=${RUN:-runs/real} TOY="" SEEN=${SEEN:-aircraft car reptilia bird food} NPROC=${NPROC:-$((GPUS ? GPUS : 1))}
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  SYNTH="--categories $SEEN --exclude $BENCH --jpeg_quality 90 95" # what the table calls unseen is not trained on
  N_SFT=${N_SFT:-25000} N_GRPO=${N_GRPO:-8000} LENGTH=512 EVAL_LENGTH=1024 TEMPERATURE=1 SFT="" GRPO="--beta 0.04 --gradient_checkpointing"
fi
[[ $TEACHER != serve:* ]] || export URL=http://localhost:8000/v1 no_proxy=localhost
case $TEACHER in
  knowledge:*) COT="--teacher knowledge --knowledge ${TEACHER#*:}" ;;
  serve:* | openai:*) COT="--teacher openai --teacher_model ${TEACHER#*:} --base_url $URL" ;;
  *) stop "TEACHER=$TEACHER: want serve:MODEL, openai:MODEL or knowledge:FILE" ;;
esac
STAGES="world ask_boxes boxes synth_sft gen_cot filter_cot train_sft train_cot_sft synth_grpo rollouts filter_grpo train_grpo eval_base eval_sft eval_cot_sft eval_grpo"
if [ -n "${FROM:-}" ]; then
  [[ " $STAGES " = *" $FROM "* ]] || stop "FROM=$FROM: no such stage; want one of: $STAGES"
  [ "$NNODES" = 1 ] || [ "${1:-}" = forget ] || stop "FROM on several nodes: want FROM=$FROM bash run_all.sh forget once, then all without FROM"
  for name in $(echo "$STAGES" | sed "s/.*\b$FROM\b/$FROM/"); do rm -rf "${RUN:?}/$name" "$RUN/.done/$name"; done
fi
[ "${1:-all}" != forget ] || exit 0; mkdir -p "$RUN/.done"
[ -n "$TOY" ] || [ "$NODE_RANK" != 0 ] || check

# ---- the stages
[ -z "$TOY" ] || stage world "$PY" tests/toy/toy_world.py --out "$RUN/world" --seed "$SEED"
if [ -n "${BOX_MODEL:-}" ]; then # boxes that the source lacks, by asking; those it lists stay
  stage ask_boxes "$PY" tools/rows.py ask-boxes --source "$DATA" --out "$RUN/ask_boxes"
  stage boxes torchrun eval_kvg.py --bench "$RUN/ask_boxes/rows.jsonl" --model "$BOX_MODEL" --prompt direct --out "$RUN/boxes" --max_completion_length 128
  [ -n "${DRY:-}" ] || cat "$RUN/boxes/predictions.jsonl" $(ls "$DATA/boxes.jsonl" "${DATA%/}.boxes.jsonl" 2>/dev/null) > "$RUN/boxes.jsonl"
  SYNTH+=" --boxes $RUN/boxes.jsonl"
fi
stage synth_sft "$PY" synth_data.py --source "$DATA" --out "$RUN/synth_sft" --num_samples "$N_SFT" --seed "$SEED" $SYNTH ${SYNTH_FLAGS:-}
[ "${TEACHER%%:*}" != serve ] || serve "${TEACHER#*:}"
stage gen_cot "$PY" gen_cot.py --samples "$RUN/synth_sft/samples.jsonl" --out "$RUN/gen_cot" $COT ${COT_FLAGS:-}
[ -z "${TEACHER_PID:-}" ] || { kill "$TEACHER_PID"; wait "$TEACHER_PID" || true; } # its GPUs are wanted now
stage filter_cot "$PY" filter.py --stage cot --samples "$RUN/gen_cot/samples.jsonl" --out "$RUN/filter_cot"
LEARN=(torchrun train_sft.py --model "$MODEL" --data "$RUN/filter_cot/samples.jsonl" --seed "$SEED" $SFT ${SFT_FLAGS:-})
stage train_sft "${LEARN[@]}" --output_dir "$RUN/train_sft" --target direct # the paper's baseline
stage train_cot_sft "${LEARN[@]}" --output_dir "$RUN/train_cot_sft"
# stage 2 learns from composites that stage 1 has not seen, and which it solves now and then
stage synth_grpo "$PY" synth_data.py --source "$DATA" --out "$RUN/synth_grpo" --num_samples "$N_GRPO" --seed $((SEED + 1000)) $SYNTH ${SYNTH_FLAGS:-}
stage rollouts torchrun eval_kvg.py --bench "$RUN/synth_grpo/samples.jsonl" --model "$RUN/train_cot_sft/final" --out "$RUN/rollouts" --num_samples 4 --temperature $TEMPERATURE --max_completion_length $LENGTH --batch_size 256 --seed "$SEED" ${ROLLOUT_FLAGS:-}
stage filter_grpo "$PY" filter.py --stage grpo --samples "$RUN/synth_grpo/samples.jsonl" --predictions "$RUN/rollouts/predictions.jsonl" --out "$RUN/filter_grpo" ${FILTER_FLAGS:-}
stage train_grpo torchrun train_grpo.py --model "$RUN/train_cot_sft/final" --data "$RUN/filter_grpo/samples.jsonl" --output_dir "$RUN/train_grpo" --temperature $TEMPERATURE --max_completion_length $LENGTH --seed "$SEED" $GRPO ${GRPO_FLAGS:-}
ASK=(torchrun eval_kvg.py --bench "$BENCH" --seen $SEEN --max_completion_length $EVAL_LENGTH --seed "$SEED" ${EVAL_FLAGS:-})
stage eval_base "${ASK[@]}" --out "$RUN/eval_base" --model "$MODEL" --prompt "${BASE_PROMPT:-direct}"
stage eval_sft "${ASK[@]}" --out "$RUN/eval_sft" --model "$RUN/train_sft/final" --prompt direct
for name in cot_sft grpo; do stage eval_$name "${ASK[@]}" --out "$RUN/eval_$name" --model "$RUN/train_$name/final"; done
[ "$NODE_RANK" != 0 ] || [ -n "${DRY:-}" ] || "$PY" tools/report.py run "$RUN"
