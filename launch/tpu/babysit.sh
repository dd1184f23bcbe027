#!/usr/bin/env bash
# Create, set up and start a run; after a preemption do it again; wait longer each time; give up when a run fails twice
# at the same step. Flags as start.sh's.
#
#   launch/tpu/babysit.sh --name=run1 --zone=us-east5-a --type=v5p-128 --spot [--dry_run] -- --config=... --config.workdir=...
#
#   HICO_POLL_S    seconds between looks (60)
#   HICO_BACKOFF_S seconds before the first new attempt, doubled each time, at most an hour (60)
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/tpu/common.sh
source "$here/common.sh"
all=("$@")
parse "$@"
need_name
[ "${#REST[@]}" -gt 0 ] || die "nothing to run; give the flags of 'hico train' after --"
mine=()
for word in "${all[@]}"; do [ "$word" != -- ] || break; mine+=("$word"); done
poll="${HICO_POLL_S:-60}" backoff="${HICO_BACKOFF_S:-60}" failed_at="none"
first="$(nodes | head -n 1)"

begin() {
  bash "$here/create.sh" "${mine[@]}" && bash "$here/setup.sh" "${mine[@]}" && bash "$here/start.sh" "${mine[@]}" -- "${REST[@]}"
}

state() { gcloud compute tpus tpu-vm describe "$first" "${WHERE[@]}" --format='value(state)' 2>/dev/null || echo GONE; }

# "running", "done", or "failed STEP": what the first worker says.
progress() {
  gcloud compute tpus tpu-vm ssh "$first" "${WHERE[@]}" --worker=0 --command \
    "cd hico && if kill -0 \$(cat .run.lock) 2>/dev/null; then echo running; elif grep -q 'HICO_EXIT 0' $LOG; then echo done; else echo failed \$(grep -o 'step [0-9]*' $LOG | tail -n 1 | cut -d' ' -f2); fi" \
    2>/dev/null || echo unreachable
}

if [ "$DRY_RUN" = 1 ]; then begin; echo "+ # then look every $poll s; after a preemption delete and begin again"; exit 0; fi
begin
while sleep "$poll"; do
  now="$(state)"
  if [ "$now" = READY ]; then
    said="$(progress)"
    case "$said" in
      running | unreachable) continue ;;
      done) echo "done"; exit 0 ;;
      failed*)
        step="${said#failed}" step="${step# }"
        [ "$step" != "$failed_at" ] || die "the run failed twice at step ${step:-0}; see launch/tpu/logs.sh"
        failed_at="$step"
        echo "failed at step ${step:-0}; starting again in $backoff s"
        sleep "$backoff"
        bash "$here/start.sh" "${mine[@]}" -- "${REST[@]}"
        ;;
    esac
  else
    echo "$NAME is $now; again in $backoff s"
    sleep "$backoff"
    bash "$here/delete.sh" "${mine[@]}" || true
    begin
  fi
  backoff=$((backoff * 2 > 3600 ? 3600 : backoff * 2))
done
