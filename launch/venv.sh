#!/usr/bin/env bash
# Make or update the virtual environment. Does nothing when it is up to date.
#
#   launch/venv.sh          what running needs
#   launch/venv.sh --dev    and what testing needs
#
#   HICO_VENV     where (default: .venv in the repository)
#   HICO_PYTHON   which Python makes it (default: the first of python3, python3.13, .12, .11 that is 3.11 or later)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${HICO_VENV:-$root/.venv}"

case "${1:-}" in
  "") extras="" ;;
  --dev) extras="[dev]" ;;
  *) echo "launch/venv.sh: unknown argument '$1'; it takes --dev or nothing" >&2; exit 2 ;;
esac

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

pick_python() {
  if [ -n "${HICO_PYTHON:-}" ]; then
    recent "$HICO_PYTHON" && { echo "$HICO_PYTHON"; return; }
    echo "launch/venv.sh: HICO_PYTHON=$HICO_PYTHON is not a Python 3.11 or later" >&2
    return 1
  fi
  for name in python3 python3.13 python3.12 python3.11; do
    command -v "$name" >/dev/null && recent "$name" && { echo "$name"; return; }
  done
  echo "launch/venv.sh: no Python 3.11 or later was found (python3 is $(python3 --version 2>&1 || true))." >&2
  echo "Install one, or name it: HICO_PYTHON=/path/to/python3.11 $0" >&2
  return 1
}

# A stamp says what the environment was made from: the same text again means there is nothing to do.
wanted="$root $(cat "$root/requirements.txt" "$root/pyproject.toml" | cksum)"
stamp="$venv/.hico"
if [ -x "$venv/bin/python" ] && recent "$venv/bin/python" && [ -f "$stamp" ]; then
  made="$(cat "$stamp")"
  if [ "$made" = "$wanted $extras" ] || [ "$made" = "$wanted [dev]" ]; then
    exit 0
  fi
  case "$made" in *"[dev]") extras="[dev]" ;; esac  # an update never takes the test tools away
fi

began=$SECONDS
if ! { [ -x "$venv/bin/python" ] && recent "$venv/bin/python"; }; then
  python="$(pick_python)"
  echo "== making $venv with $("$python" --version)" >&2
  if command -v uv >/dev/null; then
    uv venv --quiet --seed --clear --python "$(command -v "$python")" "$venv"
  else
    "$python" -m venv --clear "$venv" || {
      echo "launch/venv.sh: '$python -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv" >&2
      exit 1
    }
  fi
fi

rm -f "$stamp"  # an interrupted install is not taken for a finished one
echo "== installing hico_jax$extras and what it needs (a minute or two; nothing to do next time)" >&2
if command -v uv >/dev/null; then
  uv pip install --quiet --python "$venv/bin/python" --editable "$root$extras" >&2
else  # ten thousand files are compiled on every core, where pip would take one
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile --editable "$root$extras" >&2
  "$venv/bin/python" -W ignore -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || true  # a file may be a template
fi
echo "$wanted $extras" >"$stamp"
echo "== ready in $((SECONDS - began)) s" >&2
