#!/usr/bin/env bash
# Trains on TPUs of a Google Kubernetes cluster, one slice or several, through xpk.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/gke_xpk.sh --name=NAME --cluster=NAME --project=ID --zone=ZONE --type=TYPE [options]
                         -- COMMAND...
       launch/gke_xpk.sh --name=NAME --cluster=NAME --project=ID --zone=ZONE --logs | --delete

Submits COMMAND as a workload to a cluster that exists (`xpk cluster create`). Kubernetes starts it
again up to --restarts times when a machine is taken away or a process dies (those that are left end
with status 42, which xpk counts as such); it resumes by itself. A mistake (status 1, 2) is not repeated.

  launch/gke_xpk.sh --name=r1-950m --cluster=tpus --project=$PROJECT --zone=us-east5-a \
    --type=v5p-1024 --image=$REGION-docker.pkg.dev/$PROJECT/images/mobilellm-jax \
    -- python -m mobilellm_jax.train --config=configs/mobilellm_r1.py:950m,pretrain1 \
       --config.plan=gs://$BUCKET/data/mixture.json --workdir=gs://$BUCKET/runs/r1-950m

  --cluster, --project, --zone   also from the variables CLUSTER, PROJECT and ZONE
  --type=TYPE       of each slice, as xpk names it
  --slices=N        of that type, joined by the data centre's network (default 1)
  --image=IMAGE     with this folder installed in it; without it xpk packs this folder onto --base
  --base=IMAGE      what it is packed onto (default python:3.12)
  --restarts=N      (default 100)
  --logs            follow the output of the first process
  --delete          stop the workload
  --dry-run         print the command and run nothing
  --help            this text

LIBTPU_INIT_ARGS and JAX_COMPILATION_CACHE_DIR are passed on if they are set.
END
}

die() { echo "error: $*" >&2; exit 2; }

name="" cluster="${CLUSTER:-}" project="${PROJECT:-}" zone="${ZONE:-}" type="" slices=1
image="" base="python:3.12" restarts=100 action="create" dry=""
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --cluster=*) cluster="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --base=*) base="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --logs) action="logs" ;;
    --delete) action="delete" ;;
    --dry-run) dry=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1 (the command comes after --; see --help)." ;;
  esac
  shift
done
[[ -n "$name" ]] || die "--name is missing: choose one for this workload."
[[ -n "$cluster" ]] || die "--cluster is missing: the cluster to run on (or set CLUSTER)."
[[ -n "$project" ]] || die "--project is missing: the Google Cloud project that pays (or set PROJECT)."
[[ -n "$zone" ]] || die "--zone is missing: where the cluster is (or set ZONE)."

run() {
  if [[ -n "$dry" ]]; then
    printf '%q ' "$@"
    echo
  else
    exec "$@"
  fi
}
where=(--cluster="$cluster" --project="$project" --zone="$zone")

case "$action" in
  logs)
    run kubectl logs --follow --tail=100 \
      --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
    exit ;;
  delete) run xpk workload delete --workload="$name" "${where[@]}" --force; exit ;;
esac
[[ -n "$type" ]] || die "--type is missing: the slice, as v5litepod-256."
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices is no number of slices."
(($#)) || die "there is no command: put it after -- (see --help)."

command="$(printf '%q ' "$@")--distributed=on"
create=(xpk workload create --workload="$name" "${where[@]}" --tpu-type="$type"
  --num-slices="$slices" --max-restarts="$restarts")
for variable in LIBTPU_INIT_ARGS JAX_COMPILATION_CACHE_DIR; do
  [[ -z "${!variable:-}" ]] || create+=(--env="$variable=${!variable}")
done
if [[ -n "$image" ]]; then
  create+=(--docker-image="$image")
else
  create+=(--base-docker-image="$base" --script-dir=.)
  command="pip install --quiet '.[tpu,gcs]' && $command"
fi
run "${create[@]}" --command="$command"
