#!/usr/bin/env bash
# From a fresh clone to answers about a film, by the model that ships: no accelerator, no download.
# Arguments go to `hico demo`: launch/demo.sh --train trains a small model from nothing (--quick: on less).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/venv.sh"
exec "${HICO_VENV:-$root/.venv}/bin/hico" demo "$@"
