#!/usr/bin/env bash
# Set up and test. Without -m, what is slow or needs an accelerator is left out; without arguments, two processes share it.
# Arguments go to pytest: launch/test.sh tests/test_cli.py -x
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/venv.sh" --dev
cd "$root"
[ $# -gt 0 ] || set -- -n 2 --dist worksteal  # most of the time is compilation, on one core each
exec "${HICO_VENV:-$root/.venv}/bin/python" -m pytest -m "not slow and not tpu and not gpu" "$@"
