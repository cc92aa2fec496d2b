#!/usr/bin/env bash
# The six stages of MobileLLM-R1 in a row, each from the end of the one before.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/r1_recipe.sh [options] [-- FLAGS OF TRAIN...]

Trains pretrain1, pretrain2, midtrain1, midtrain2, sft_general and sft_reasoning of
configs/mobilellm_r1.py, each in a workdir of its own. Started again it goes on: a stage that is done
says so and ends, one that was interrupted resumes. Ctrl-C and SIGTERM save and leave.

  launch/r1_recipe.sh --size=tiny      data, teacher and all stages on this machine, in minutes
  launch/r1_recipe.sh --size=950m --data=gs://$BUCKET/data/r1 --runs=gs://$BUCKET/runs \
    --teacher=gs://$BUCKET/models/Llama-3.1-8B-Instruct --from=midtrain1 --to=midtrain2 \
    -- --config.mesh.fsdp=8

  --size=SIZE       140m, 360m, 950m or tiny (default tiny)
  --data=DIR        pretrain.json, midtrain.json, sft_general/ and sft_reasoning/ (docs/recipe.md);
                    default data/r1, and data/r1-tiny for tiny, which is made if it is not there
  --runs=DIR        workdirs are DIR/r1-SIZE-STAGE (default runs)
  --teacher=DIR     of mid-training: a checkpoint or a Hugging Face folder
                    (default models/Llama-3.1-8B-Instruct; tiny trains its own)
  --from=STAGE      first stage (default: the first)
  --to=STAGE        last stage (default: the last)
  --launcher='...'  words before the command of a stage, which must wait for its end:
                    'launch/local_pod.sh --processes=2 --', 'srun'
  --dry-run         print the commands and run nothing
  --help            this text

PYTHON is the interpreter (default python).
END
}

die() { echo "error: $*" >&2; exit 2; }

size="tiny" data="" runs="runs" teacher="" from="" to="" launcher="" dry=""
while (($#)); do
  case "$1" in
    --size=*) size="${1#*=}" ;;
    --data=*) data="${1#*=}" ;;
    --runs=*) runs="${1#*=}" ;;
    --teacher=*) teacher="${1#*=}" ;;
    --from=*) from="${1#*=}" ;;
    --to=*) to="${1#*=}" ;;
    --launcher=*) launcher="${1#*=}" ;;
    --dry-run) dry=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1 (flags of train come after --; see --help)." ;;
  esac
  shift
done

stages=(pretrain1 pretrain2 midtrain1 midtrain2 sft_general sft_reasoning)
case "$size" in
  140m | 360m | 950m)
    data="${data:-data/r1}"
    teacher="${teacher:-models/Llama-3.1-8B-Instruct}" ;;
  tiny)
    data="${data:-data/r1-tiny}"
    [[ -n "$teacher" ]] || stages=(teacher "${stages[@]}")
    teacher="${teacher:-$runs/r1-tiny-teacher}" ;;
  *) die "--size=$size is none of 140m, 360m, 950m and tiny." ;;
esac
place() {  # of a stage in the chain
  local i
  for i in "${!stages[@]}"; do
    [[ "${stages[$i]}" != "$1" ]] || { echo "$i"; return; }
  done
  die "$1 is no stage: choose one of ${stages[*]}."
}
first="$(place "${from:-${stages[0]}}")"
last="$(place "${to:-${stages[-1]}}")"
((first <= last)) || die "--from=$from comes after --to=$to."

# A process group of its own for each command: what stops the chain reaches it once, from here.
set -m
running="" stopped=""
trap 'stopped=143; [[ -z "$running" ]] || kill -TERM "$running" 2>/dev/null || true' TERM
trap 'stopped=130; [[ -z "$running" ]] || kill -TERM "$running" 2>/dev/null || true' INT
run() {
  if [[ -n "$dry" ]]; then
    printf '%q ' "$@"
    echo
    return
  fi
  local status=0
  "$@" &
  running=$!
  wait "$running" || status=$?
  while kill -0 "$running" 2>/dev/null; do  # a trapped signal ends `wait` early
    sleep 0.1  # or, of a command that is suspended, this would spin
    status=0
    wait "$running" || status=$?
  done
  running=""
  [[ -z "$stopped" ]] || exit "$stopped"
  ((status == 0)) || exit "$status"
}

program() { run "${PYTHON:-python}" -m "mobilellm_jax.$1" "${@:2}"; }

# What Python's own library says, dialogues that call functions, and worked arithmetic.
prepare_tiny() {
  [[ ! -e "$data/sft_reasoning/mixture.json" ]] || { echo "data: complete in $data"; return; }
  program prepare --embedded --row_length=256 --vocab_size=2048 --chat_template=chatml --out="$data"
  for plan in pretrain midtrain; do
    [[ -e "$data/$plan.json" ]] || program plan "configs/plans/mobilellm_r1_tiny_$plan.json" \
      --data="$data" --out="$data/$plan.json"
  done
  [[ -e "$data/api" ]] || program api_dialogues --out="$data/api" --train=50 --test=50
  [[ -e "$data/worked" ]] || program worked_problems --out="$data/worked" --train=200 --test=100
  local chats=(--tokenizer="$data" --heldout=0.1)
  program prepare --chat=api="$data/api/train.jsonl" "${chats[@]}" --row_length=1024 \
    --out="$data/sft_general"
  program prepare --chat=worked="$data/worked/train.jsonl" "${chats[@]}" --row_length=2048 \
    --system_prompt='Please reason step-by-step and put your final answer within \boxed{}.' \
    --out="$data/sft_reasoning"
}

read -ra before <<<"$launcher"
train() {  # STAGE, and the one before it if there is one
  local arguments=(--config="configs/mobilellm_r1.py:$size,$1" --workdir="$runs/r1-$size-$1")
  case "$1" in
    teacher) arguments+=(--config.plan="$data/pretrain.json") ;;
    sft_*) arguments+=(--config.plan="$data/$1/mixture.json") ;;
    *) arguments+=(--config.plan="$data/${1%[12]}.json") ;;
  esac
  case "$1" in midtrain*) arguments+=(--config.teacher.path="$teacher") ;; esac
  [[ -z "$2" ]] || arguments+=(--config.init_from="$runs/r1-$size-$2")
  run "${before[@]}" "${PYTHON:-python}" -m mobilellm_jax.train "${arguments[@]}" "${@:3}"
}

[[ "$size" != tiny ]] || prepare_tiny
for ((i = first; i <= last; i++)); do
  stage="${stages[$i]}" start=""
  case "$stage" in teacher | pretrain1) ;; *) start="${stages[$((i - 1))]}" ;; esac
  [[ -n "$dry" ]] || echo "== $stage, $((i + 1)) of ${#stages[@]}: $runs/r1-$size-$stage"
  train "$stage" "$start" "$@"
done
