#!/usr/bin/env bash
# A pod of processes on this machine: the same program as on many machines, over simulated CPU
# devices. For trying out and testing what many processes do, not for speed.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/local_pod.sh [--processes=N] [--devices=M] [--logs=DIR] [--dry-run] -- COMMAND...

Runs COMMAND N times (default 2) as the processes of one run, each with M simulated CPU devices
(default 1), and ends with the worst of their statuses. The output of each goes to
DIR/process-<i>.log and its number to DIR/process-<i>.pid if --logs is given, else all output comes
here. Signals go to every process.

  launch/local_pod.sh --processes=4 -- python -m mobilellm_jax.train \
    --config=configs/smoke.py --workdir=runs/pod

  --port=P    of process 0 (default: one that is free)
  --dry-run   print the commands and run nothing
  --help      this text
END
}

die() { echo "error: $*" >&2; exit 2; }

processes=2 devices=1 logs="" port="" dry=""
while (($#)); do
  case "$1" in
    --processes=*) processes="${1#*=}" ;;
    --devices=*) devices="${1#*=}" ;;
    --logs=*) logs="${1#*=}" ;;
    --port=*) port="${1#*=}" ;;
    --dry-run) dry=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1 (the command comes after --; see --help)." ;;
  esac
  shift
done
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || die "--processes=$processes is no number of processes."
[[ "$devices" =~ ^[1-9][0-9]*$ ]] || die "--devices=$devices is no number of devices."
(($#)) || die "there is no command: put it after -- (see --help)."

free_port() {  # below those that the system gives to outgoing connections
  local candidate
  while :; do
    candidate=$((20000 + RANDOM % 10000))
    (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null || { echo "$candidate"; return; }
  done
}
port="${port:-$(free_port)}"

# A process group of its own for each: Ctrl-C reaches them once, from here; twice, they would not save.
set -m
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
[[ -z "$logs" || -n "$dry" ]] || mkdir -p "$logs"
for ((i = 0; i < processes; i++)); do
  settings=(
    "JAX_PLATFORMS=cpu"
    "XLA_FLAGS=${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
    "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
    "JAX_NUM_PROCESSES=$processes"
    "JAX_PROCESS_ID=$i"
  )
  if [[ -n "$dry" ]]; then
    printf '%q ' env "${settings[@]}" "$@"
    echo
  elif [[ -n "$logs" ]]; then
    env "${settings[@]}" "$@" >"$logs/process-$i.log" 2>&1 &
    pids+=($!)
    echo $! >"$logs/process-$i.pid"
  else
    env "${settings[@]}" "$@" &
    pids+=($!)
  fi
done

worst=0
for ((i = 0; i < ${#pids[@]}; i++)); do
  status=0
  wait "${pids[$i]}" || status=$?
  while kill -0 "${pids[$i]}" 2>/dev/null; do  # a trapped signal ends `wait` early
    status=0
    wait "${pids[$i]}" || status=$?
  done
  ((status == 0)) || echo "process $i ended with status $status" >&2
  ((status <= worst)) || worst=$status
done
exit "$worst"
