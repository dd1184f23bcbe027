#!/usr/bin/env bash
# Ask for a slice (or several) as a queued resource, and wait until it is there.
#
#   launch/tpu/create.sh --name=run1 --zone=us-east5-a --type=v5p-128 [--slices=2] [--spot | --reserved] [--dry_run]
set -euo pipefail
# shellcheck source=launch/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
need_name
[ -n "$ACCELERATOR" ] || die "no --type=TYPE is given, for example --type=v5p-128"
version="$(runtime)"
ask=(gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" --accelerator-type "$ACCELERATOR" --runtime-version "$version")
if [ "$NODES" = 1 ]; then ask+=(--node-id "$NAME"); else ask+=(--node-prefix "$NAME" --node-count "$NODES"); fi
if [ "$SPOT" = 1 ] && [ "$RESERVED" = 1 ]; then die "--spot and --reserved exclude each other"; fi
if [ "$SPOT" = 1 ]; then ask+=(--spot); fi
if [ "$RESERVED" = 1 ]; then ask+=(--reserved); fi
run "${ask[@]}"
[ "$DRY_RUN" = 0 ] || { echo "+ # then wait until its state is ACTIVE"; exit 0; }
wait_s="${HICO_WAIT_S:-20}"
while :; do
  state="$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state.state)')"
  echo "$(date +%H:%M:%S) $state"
  case "$state" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED) die "$NAME is $state; gcloud compute tpus queued-resources describe $NAME --zone $ZONE says why" ;;
  esac
  sleep "$wait_s"
done
