#!/usr/bin/env bash
# Trains on a TPU VM, one host or a pod slice of many, as a queued resource on Google Cloud.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu_vm.sh --name=NAME --project=ID --zone=ZONE --type=TYPE [options] -- COMMAND...
       launch/tpu_vm.sh --name=NAME --project=ID --zone=ZONE --logs | --delete

Queues TPUs, waits until they are there, copies this folder to every host, installs it, starts
COMMAND on every host and leaves it there. Started again with the same name it goes on: TPUs that
are there are used, those that were taken away are queued anew, and COMMAND resumes.

  launch/tpu_vm.sh --name=m125 --project=$PROJECT --zone=us-west4-a --type=v5litepod-256 --spot \
    -- python -m mobilellm_jax.train --config=configs/mobilellm.py:125m \
       --config.plan=gs://$BUCKET/data/mixture.json --workdir=gs://$BUCKET/runs/125m

  --project, --zone     also from the variables PROJECT and ZONE
  --runtime=VERSION     of the TPU VM (default v2-alpha-tpuv5-lite)
  --spot                cheaper, and may be taken away at any moment
  --keep_trying         stay, and begin again whenever the TPUs are taken away or COMMAND has failed,
                        until its log says "done:"
  --logs                follow the output of host 0 (run.log; of earlier starts run-before.log)
  --delete              give the TPUs back
  --dry-run             print the commands and run nothing
  --help                this text

LIBTPU_INIT_ARGS and JAX_COMPILATION_CACHE_DIR are passed on if they are set.
END
}

die() { echo "error: $*" >&2; exit 2; }

name="" project="${PROJECT:-}" zone="${ZONE:-}" type="" runtime="v2-alpha-tpuv5-lite"
spot="" keep="" action="run" dry=""
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --spot) spot=1 ;;
    --keep_trying) keep=1 ;;
    --logs) action="logs" ;;
    --delete) action="delete" ;;
    --dry-run) dry=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1 (the command comes after --; see --help)." ;;
  esac
  shift
done
[[ -n "$name" ]] || die "--name is missing: choose one for these TPUs."
[[ -n "$project" ]] || die "--project is missing: the Google Cloud project that pays (or set PROJECT)."
[[ -n "$zone" ]] || die "--zone is missing: where the TPUs are (or set ZONE)."

run() {
  if [[ -n "$dry" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
where=(--project="$project" --zone="$zone")
on() {  # on WORKER COMMAND: runs a line of shell there
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

case "$action" in
  logs) on 0 "tail -n 100 -F run.log"; exit ;;
  delete) run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; exit ;;
esac
[[ -n "$type" ]] || die "--type is missing: the accelerator type, as v5litepod-256."
(($#)) || die "there is no command: put it after -- (see --help)."

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || true
}

queue() {
  local create=(gcloud compute tpus queued-resources create "$name" "${where[@]}"
    --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  [[ -z "$spot" ]] || create+=(--spot)
  if [[ -n "$dry" ]]; then
    run "${create[@]}"
    return
  fi
  case "$(state)" in
    ACTIVE) return ;;
    FAILED | SUSPENDED)
      run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
      run "${create[@]}" ;;
    "") run "${create[@]}" ;;
  esac
  until [[ "$(state)" == ACTIVE ]]; do
    case "$(state)" in FAILED | SUSPENDED) return 1 ;; esac
    echo "waiting for $type: $(state)"
    sleep 30
  done
}

command="$(printf '%q ' "$@")--distributed=on"
settings=""
for variable in LIBTPU_INIT_ARGS JAX_COMPILATION_CACHE_DIR; do
  [[ -z "${!variable:-}" ]] || settings+="$variable=$(printf '%q' "${!variable}") "
done

begin() {  # what runs already is left alone; a log is of one start, for an earlier command may be done
  queue || return 1
  run tar --exclude='./.venv*' --exclude='./.*_cache' --exclude=./data --exclude=./runs -czf "$bundle" . || return 1
  run gcloud compute tpus tpu-vm scp "$bundle" "$name:code.tgz" "${where[@]}" --worker=all || return 1
  on all "mkdir -p code && tar -xzf code.tgz -C code && cd code && python3 -m venv .venv \
&& .venv/bin/pip install --quiet --editable '.[tpu,gcs]'" || return 1
  on all "cd code && . .venv/bin/activate && { pgrep -F ../run.pid >/dev/null 2>&1 \
|| { [ ! -e ../run.log ] || cat ../run.log >>../run-before.log; \
${settings}nohup $command >../run.log 2>&1 </dev/null & echo \$! >../run.pid; }; }"
}

bundle="${TMPDIR:-/tmp}/$name.tgz"
if [[ -z "$keep" || -n "$dry" ]]; then
  begin || die "it could not be started: mend that and run the same command again."
  echo "started: follow it with --logs; started again with the same --name it goes on."
  exit
fi
until on 0 "pgrep -F run.pid" >/dev/null 2>&1 || begin; do
  echo "not started; trying again in a minute ..."
  sleep 60
done
until on 0 "grep -q '^done: ' run.log" 2>/dev/null; do
  sleep 60
  on 0 "pgrep -F run.pid || grep -q '^done: ' run.log" >/dev/null 2>&1 || begin \
    || echo "not started; trying again in a minute ..."
done
