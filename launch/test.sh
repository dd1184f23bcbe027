#!/usr/bin/env bash
# Set up and test. Without -m, what is slow or needs an accelerator is left out.
# Arguments go to pytest: launch/test.sh tests/test_cli.py -x
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/venv.sh" --dev
cd "$root"
exec "${HICO_VENV:-$root/.venv}/bin/python" -m pytest -m "not slow and not tpu and not gpu" "$@"
