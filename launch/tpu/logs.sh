#!/usr/bin/env bash
# Follow the log of the first worker of the first slice (or --worker=N after --).
#
#   launch/tpu/logs.sh --name=run1 --zone=us-east5-a [--slices=2] [--dry_run] [-- WORKER]
set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need_name
first="$(nodes | head -n 1)"
run gcloud compute tpus tpu-vm ssh "$first" "${WHERE[@]}" --worker="${REST[0]:-0}" --command "tail -n 100 -F hico/$LOG"
