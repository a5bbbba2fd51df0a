#!/usr/bin/env bash
# The whole pipeline: set-up, data, both training stages, evaluation.
#
#   bash run_all.sh                 the toy world: no data, no weights, no GPU needed; about 4 min on 2 CPU cores
#   MODEL=Qwen/Qwen2-VL-7B-Instruct DATA=fgvr/ BENCH=kvg-bench.parquet TEACHER=openai:Qwen/Qwen2-VL-72B-Instruct bash run_all.sh
#                                   the paper's recipe on every GPU of this node; TEACHER is
#                                     openai:MODEL      a server at OPENAI_BASE_URL (default http://localhost:8000/v1)
#                                     hf:MODEL          loaded here, one copy per GPU;  shard:MODEL  one copy over all GPUs of node 0
#                                     knowledge[:FILE]  a table; without FILE knowledge.json in DATA or in the folder above it
#                                   DATA is a folder category/entity/* with boxes.jsonl; BOX_MODEL=Qwen/Qwen2-VL-7B-Instruct makes the
#                                   boxes that it lacks, on every GPU
#   bash run_all.sh test | setup    the tests | the environment alone
#   bash run_all.sh study           the toy world over several seeds: every table of the README's results; about 2 h 10 min on 2 CPU cores
#   FROM=train_grpo bash run_all.sh forget     forgets this stage and all after it; a finished stage is skipped, a killed one goes on
#   FROM=train_grpo bash run_all.sh            the same, and goes on from there (one node)
#
# RUN=runs/name another run folder · SEED=1 another seed · PYTHON=python uses the environment at hand and makes none
# NPROC=8 processes per node · N_SFT, N_GRPO composites of stage 1 and 2 · SEEN="bird car" categories with training data
# SYNTH_FLAGS, COT_FLAGS, SFT_FLAGS, FILTER_FLAGS, GRPO_FLAGS, EVAL_FLAGS="..." go to the stages of that script, after ours
# BASE_PROMPT=json asks the untrained model for JSON (Qwen2.5-VL, Qwen3-VL)
# NNODES=2 NODE_RANK=0 MASTER_ADDR=host  on every node; the run folder must be on a file system that all nodes share
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

setup() {
  if [ -n "${PYTHON:-}" ]; then PY=$PYTHON; return; fi
  PY=.venv/bin/python
  cmp -s requirements.txt .venv/installed.txt && return
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "python3 is $(python3 -V); want 3.10 or newer" >&2; exit 1; }
  echo "== setup: .venv from requirements.txt"
  python3 -m venv .venv
  $PY -m pip install -q "$(grep '^torch==' requirements.txt)" setuptools wheel
  DS_BUILD_OPS=0 $PY -m pip install -q -r requirements.txt
  if command -v nvidia-smi >/dev/null; then
    $PY -m pip install -q flash-attn --no-build-isolation || echo "flash-attn could not be installed; torch's own kernels are used"
  fi
  cp requirements.txt .venv/installed.txt
}

stage() { # name, command ...: runs it once; its output folder is $RUN/name
  local name=$1 began=$SECONDS; shift; [ ! -e "$RUN/.done/$name" ] || return 0
  if [ "$NODE_RANK" != 0 ] && [ "$1" != torchrun ]; then # work of one process: node 0 does it
    while [ ! -e "$RUN/.done/$name" ]; do sleep 5; done; return
  fi
  echo "== $name"
  if [ "$1" = torchrun ]; then
    shift
    local where="--nnodes $NNODES --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port $MASTER_PORT"
    [ "$NNODES" != 1 ] || where=--standalone # finds a free port
    "$PY" -m torch.distributed.run --nproc_per_node "$NPROC" $where "$@"
  else
    "$@"
  fi
  if [ "$NODE_RANK" = 0 ]; then echo $((SECONDS - began)) > "$RUN/.done/$name"; return; fi
  while [ ! -e "$RUN/.done/$name" ]; do sleep 5; done # node 0 may have work left that is not shared
}

setup
case "${1:-all}" in
  setup) exit ;;
  test)
    if [ "$(id -u)" = 0 ] && ! command -v chromium chromium-browser google-chrome >/dev/null && command -v apt-get >/dev/null; then
      echo "== chromium, in which the report is tested" # without one these tests are skipped
      { timeout 300 apt-get update; timeout 300 env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
        >/dev/null 2>&1 || echo "chromium could not be installed; the report is not tested in a browser"
    fi
    exec "$PY" -m pytest -q -n 2 --dist loadfile tests ;;
  study) shift; exec "$PY" tests/toy/study.py "$@" ;;
  all|forget) ;;
  *) echo "usage: bash run_all.sh [setup|test|study|forget]" >&2; exit 2 ;;
esac
# ---- where, with what ----
SEED=${SEED:-0} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
SYNTH_RUNNER=$PY # boxes are made by all processes, composites by one
TOY=$([ -n "${MODEL:-}" ] || echo yes)
if [ -n "$TOY" ]; then
  RUN=${RUN:-runs/toy} MODEL=tests/toy/base DATA=$RUN/world/train BENCH=$RUN/world/kvg-bench.parquet
  # a model this small gains more from two processes than from two threads
  NPROC=${NPROC:-$("$PY" -c 'import os, torch; print(1 if torch.cuda.is_available() else min(2, os.cpu_count()))')}
  RUNNER=torchrun; [ "$NPROC" != 1 ] || RUNNER=$PY
  CORES=$(getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > NPROC ? CORES / NPROC : 1))}
  TEACHER=knowledge:$RUN/world/knowledge.json SEEN="disc square triangle diamond cross"
  SYNTH="--canvas_size 168 112 --grid 3 2 --layouts grid --background gradient --entity_scale 0.6 0.95"
  # stage 1 is short enough to leave something to learn; the same settings over several seeds: bash run_all.sh study
  N_SFT=${N_SFT:-1500} N_GRPO=${N_GRPO:-640} LENGTH=320 FILTER="--temperature 0.8"
  SFT="--learning_rate 1e-3 --train_batch_size 32 --tokens_per_row 8192 --save_steps 25"
  GRPO="--learning_rate 1e-4 --lr_scheduler constant --train_batch_size 16 --num_generations 8 --temperature 0.8 --iou_threshold 0.5"
  GRPO+=" --max_completion_length $LENGTH --max_steps 40 --save_steps 10"
else # the paper's recipe
  : "${DATA:?want DATA=folder of single-entity images}" "${BENCH:?want BENCH=kvg-bench.parquet}" "${TEACHER:?want TEACHER=knowledge[:FILE], hf:MODEL, shard:MODEL or openai:MODEL}"
  NPROC=${NPROC:-$("$PY" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
  RUN=${RUN:-runs/real} RUNNER=torchrun SYNTH="--exclude $BENCH" SEEN=${SEEN:-aircraft car reptilia bird food} N_SFT=${N_SFT:-25000} N_GRPO=${N_GRPO:-8000} LENGTH=1024
  FILTER="" SFT="" GRPO="--max_completion_length 512 --gradient_checkpointing" # else a 7B fills 80 GB, see --plan
  [ -z "${BOX_MODEL:-}" ] || { SYNTH+=" --box_model $BOX_MODEL" SYNTH_RUNNER=$RUNNER; }
  if [ "$TEACHER" = knowledge ]; then
    for folder in "$DATA" "$(dirname "$DATA")"; do [ ! -f "$folder/knowledge.json" ] || TEACHER=knowledge:$folder/knowledge.json; done
  fi
fi
case $TEACHER in
  knowledge:*) TEACHER_FLAGS="--teacher knowledge --knowledge ${TEACHER#*:}" TEACHER_RUNNER=$PY ;;
  openai:*) TEACHER_FLAGS="--teacher openai --teacher_model ${TEACHER#*:} --base_url ${OPENAI_BASE_URL:-http://localhost:8000/v1}" TEACHER_RUNNER=$PY ;;
  hf:*) TEACHER_FLAGS="--teacher hf --teacher_model ${TEACHER#*:}" TEACHER_RUNNER=$RUNNER ;;
  shard:*) TEACHER_FLAGS="--teacher hf --teacher_model ${TEACHER#*:} --device_map auto" TEACHER_RUNNER=$PY ;;
  *) echo "TEACHER=$TEACHER: want knowledge:FILE, hf:MODEL, shard:MODEL or openai:MODEL (no knowledge.json in or above DATA)" >&2; exit 2 ;;
esac
if [ -n "${FROM:-}" ] && [ "$NNODES" != 1 ] && [ "${1:-all}" != forget ]; then
  echo "FROM=$FROM on $NNODES nodes: want it forgotten once, before all start; run FROM=$FROM bash run_all.sh forget, then without FROM" >&2; exit 2
fi
mkdir -p "$RUN/.done"
STAGES="world synth_sft gen_cot filter_cot train_sft train_cot_sft synth_grpo filter_grpo train_grpo eval_base eval_sft eval_cot_sft eval_grpo"
if [ -n "${FROM:-}" ]; then
  case " $STAGES " in *" $FROM "*) ;; *) echo "FROM=$FROM: no such stage; want one of: $STAGES" >&2; exit 2 ;; esac
  for name in $(echo "$STAGES" | sed "s/.*\b$FROM\b/$FROM/"); do rm -rf "${RUN:?}/$name" "$RUN/.done/$name"; done
fi
[ "${1:-all}" != forget ] || exit 0

# ---- the stages ----
[ -z "$TOY" ] || stage world "$PY" tests/toy/toy_world.py --out "$RUN/world" --seed "$SEED"
stage synth_sft $SYNTH_RUNNER synth_data.py --source "$DATA" --out "$RUN/synth_sft" --num_samples "$N_SFT" --seed "$SEED" $SYNTH ${SYNTH_FLAGS:-}
stage gen_cot $TEACHER_RUNNER gen_cot.py --samples "$RUN/synth_sft/samples.jsonl" --out "$RUN/gen_cot" $TEACHER_FLAGS ${COT_FLAGS:-}
stage filter_cot "$PY" filter.py --stage cot --samples "$RUN/gen_cot/samples.jsonl" --out "$RUN/filter_cot"
for target in direct cot; do # the paper's SFT baseline, and CoT-SFT
  name=train_sft; [ $target = direct ] || name=train_cot_sft
  stage $name $RUNNER train_sft.py --model "$MODEL" --data "$RUN/filter_cot/samples.jsonl" --target $target --output_dir "$RUN/$name" --seed "$SEED" $SFT ${SFT_FLAGS:-}
done
# stage 2 learns from composites that stage 1 has not seen
stage synth_grpo "$PY" synth_data.py --source "$DATA" --out "$RUN/synth_grpo" --num_samples "$N_GRPO" --seed $((SEED + 1000)) $SYNTH ${SYNTH_FLAGS:-}
stage filter_grpo $RUNNER filter.py --stage grpo --model "$RUN/train_cot_sft/final" --samples "$RUN/synth_grpo/samples.jsonl" \
  --out "$RUN/filter_grpo" --max_completion_length "$LENGTH" --seed "$SEED" $FILTER ${FILTER_FLAGS:-}
stage train_grpo $RUNNER train_grpo.py --model "$RUN/train_cot_sft/final" --data "$RUN/filter_grpo/samples.jsonl" --output_dir "$RUN/train_grpo" \
  --seed "$SEED" $GRPO ${GRPO_FLAGS:-}
for name in base sft cot_sft grpo; do
  model=$RUN/train_$name/final prompt=r1
  case $name in base) model=$MODEL prompt=${BASE_PROMPT:-direct} ;; sft) prompt=direct ;; esac
  stage eval_$name $RUNNER eval_kvg.py --bench "$BENCH" --model "$model" --out "$RUN/eval_$name" --prompt $prompt --seen $SEEN \
    --max_completion_length "$LENGTH" --seed "$SEED" ${EVAL_FLAGS:-}
done
[ "$NODE_RANK" = 0 ] || exit 0
"$PY" eval_kvg.py --summary "$RUN" --seed "$SEED"
