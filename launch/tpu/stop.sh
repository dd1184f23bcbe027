#!/usr/bin/env bash
# Ask every worker's run to save and stop (SIGTERM).
#
#   launch/tpu/stop.sh --name=run1 --zone=us-east5-a [--slices=2] [--dry_run]
set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need_name
everywhere "[ ! -f hico/.run.lock ] || { kill -TERM -- -\$(cat hico/.run.lock) 2>/dev/null || true; rm -f hico/.run.lock; }"
