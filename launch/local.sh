#!/usr/bin/env bash
# The command line of a pod on this machine: N processes of M simulated devices, joined as hosts are.
#
#   launch/local.sh --processes=2 --devices=4 [--port=12355] [--dry_run] -- \
#       --config=configs/debug_tiny.py --config.workdir=runs/two --config.mesh.sequence=2
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
processes=2 devices=4 port=12355 dry_run=0
die() { echo "${0##*/}: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    --processes=*) processes="${1#*=}" ;;
    --devices=*) devices="${1#*=}" ;;
    --port=*) port="${1#*=}" ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) die "unknown flag $1; it takes --processes=N --devices=M --port=P --dry_run, and the flags of 'hico train' after --" ;;
  esac
  shift
done
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || die "--processes is '$processes'; it must be a whole number, 1 or more"
[[ "$devices" =~ ^[1-9][0-9]*$ ]] || die "--devices is '$devices'; it must be a whole number, 1 or more"
[ $# -gt 0 ] || die "nothing to run; give the flags of 'hico train' after --"
hico="${HICO_VENV:-$root/.venv}/bin/hico"
pids=()
# shellcheck disable=SC2329  # called by trap
end() { [ "${#pids[@]}" = 0 ] || kill "${pids[@]}" 2>/dev/null || true; }
trap end EXIT INT TERM
for ((i = 0; i < processes; i++)); do
  settings=(JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices" HICO_COORDINATOR="localhost:$port" HICO_PROCESS="$i" HICO_PROCESSES="$processes")
  echo "+ ${settings[*]} $hico train $* --config.train.distributed=True"
  [ "$dry_run" = 1 ] || { env "${settings[@]}" "$hico" train "$@" --config.train.distributed=True & pids+=($!); }
done
code=0
for pid in "${pids[@]:-}"; do [ -z "$pid" ] || wait "$pid" || code=$?; done
pids=()
exit "$code"
