#!/usr/bin/env bash
# Put the code on every worker and make its environment. Again after every change of the code.
#
#   launch/tpu/setup.sh --name=run1 --zone=us-east5-a [--slices=2] [--source=gs://bucket/hico.tar.gz] [--dry_run]
set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
parse "$@"
need_name
if [ -n "$SOURCE" ]; then
  fetch="gsutil -q cp $(printf '%q' "$SOURCE") hico.tar.gz"
else
  archive="$(mktemp -d)/hico.tar.gz"
  trap 'rm -rf "$(dirname "$archive")"' EXIT
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:hico.tar.gz" "${WHERE[@]}" --worker=all
  done
  fetch=true
fi
everywhere "$fetch && rm -rf hico && mkdir hico && tar -xzf hico.tar.gz -C hico && cd hico && bash launch/venv.sh && .venv/bin/python -m pip install -q -e '.[tpu]'"
