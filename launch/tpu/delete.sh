#!/usr/bin/env bash
# Give the slices back.
#
#   launch/tpu/delete.sh --name=run1 --zone=us-east5-a [--dry_run]
set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need_name
run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
