#!/usr/bin/env bash
# Start a training run on every worker. Its hyper-parameters are in the configuration, not here.
#
#   launch/tpu/start.sh --name=run1 --zone=us-east5-a --type=v5p-128 [--slices=2] [--dry_run] -- \
#       --config=configs/stage3_sft.py:umt_qwen2_7b --config.workdir=gs://bucket/run1
set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need_name
[ "${#REST[@]}" -gt 0 ] || die "nothing to run; give the flags of 'hico train' after --"
flags=""
for word in "${REST[@]}"; do flags+=" $(printf '%q' "$word")"; done
libtpu="$(xla_flags)"
# A lock that nobody holds is stale and taken over; one that a live process holds stops us with its number.
busy="a run is going on in hico: process \$(cat .run.lock); launch/tpu/stop.sh ends it"
train=".venv/bin/hico train$flags --config.train.distributed=True --config.mesh.slices=$NODES; echo HICO_EXIT \$?"
command="cd hico && { ! kill -0 \$(cat .run.lock 2>/dev/null || echo 0x) 2>/dev/null || { echo \"$busy\" >&2; exit 2; }; }; rm -f .run.lock"
command+="; export LIBTPU_INIT_ARGS=$(printf '%q' "$libtpu"); setsid nohup bash -c $(printf '%q' "$train") > $LOG 2>&1 < /dev/null & echo \$! > .run.lock"
everywhere "$command"
