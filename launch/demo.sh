#!/usr/bin/env bash
# From a fresh clone to a trained model, its answers and a report: no weights, no accelerator.
# Arguments go to `hico demo`: launch/demo.sh --quick
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/venv.sh"
exec "${HICO_VENV:-$root/.venv}/bin/hico" demo "$@"
