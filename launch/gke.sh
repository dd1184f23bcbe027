#!/usr/bin/env bash
# Submit a run to a GKE cluster through Cluster Toolkit's `gcluster job submit`.
#
#   launch/gke.sh --cluster=my-pods --zone=us-east5-a --type=v5p-128 --image=REGION-docker.pkg.dev/P/R/hico:1 [--slices=2] \
#       [--name=run1] [--dry_run] -- --config=configs/stage3_sft.py:umt_qwen2_7b --config.workdir=gs://bucket/run1
set -euo pipefail
cluster="" image="" words=()
for word in "$@"; do
  case "$word" in
    --cluster=*) cluster="${word#*=}" ;;
    --image=*) image="${word#*=}" ;;
    *) words+=("$word") ;;
  esac
done
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu/common.sh"
NAME=hico
parse "${words[@]}"
need_name
[ -n "$cluster" ] || die "no --cluster=NAME is given"
[ -n "$image" ] || die "no --image=IMAGE is given; launch/README.md says how to build one"
[ -n "$ACCELERATOR" ] || die "no --type=TYPE is given, for example --type=v5p-128"
[ "${#REST[@]}" -gt 0 ] || die "nothing to run; give the flags of 'hico train' after --"
flags=""
for word in "${REST[@]}"; do flags+=" $(printf '%q' "$word")"; done
run gcluster job submit --name "$NAME" --cluster "$cluster" --location "$ZONE" --image "$image" --compute-type "$ACCELERATOR" \
  --num-slices "$NODES" --command "LIBTPU_INIT_ARGS=$(printf '%q' "$(xla_flags)") hico train$flags --config.train.distributed=True --config.mesh.slices=$NODES"
