#!/usr/bin/env bash
# An environment of its own for lmms-eval (it needs PyTorch, and an older PyAV than hico_jax), with hico_jax registered in it.
# Several gigabytes. Then:
#
#   .lmms/bin/lmms-eval --model hico_jax --model_args pretrained=WEIGHTS,python=.venv/bin/python --tasks mvbench
#
#   HICO_LMMS_VENV   where (default: .lmms in the repository)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${HICO_LMMS_VENV:-$root/.lmms}"
bash "$root/launch/venv.sh"
[ -x "$venv/bin/python" ] || "${HICO_VENV:-$root/.venv}/bin/python" -m venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check "lmms-eval>=0.7.3,<0.8"
"$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --editable "$root"
echo "== ready: $venv/bin/lmms-eval --model hico_jax --model_args pretrained=WEIGHTS,python=${HICO_VENV:-$root/.venv}/bin/python"
