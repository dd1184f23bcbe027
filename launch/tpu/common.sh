# shellcheck shell=bash
# What the scripts of this folder share: flags, running or printing a command, errors in one line.

# Read by the scripts that source this file.
# shellcheck disable=SC2034
DRY_RUN=0
NAME="" ZONE="" PROJECT="" ACCELERATOR="" NODES=1 SPOT=0 RESERVED=0 VERSION="" SOURCE="" LOG="hico.log"

die() { echo "${0##*/}: $*" >&2; exit 2; }

# Print a command, and run it unless --dry_run.
run() {
  local shown="" word
  for word in "$@"; do shown+="$(printf '%q' "$word") "; done
  echo "+ ${shown% }"
  [ "$DRY_RUN" = 1 ] || "$@"
}

# Flags common to all; what is not one of them is left in REST.
# shellcheck disable=SC2034
parse() {
  REST=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --dry_run) DRY_RUN=1 ;;
      --name=*) NAME="${1#*=}" ;;
      --zone=*) ZONE="${1#*=}" ;;
      --project=*) PROJECT="${1#*=}" ;;
      --type=*) ACCELERATOR="${1#*=}" ;;
      --slices=*) NODES="${1#*=}" ;;
      --version=*) VERSION="${1#*=}" ;;
      --source=*) SOURCE="${1#*=}" ;;
      --log=*) LOG="${1#*=}" ;;
      --spot) SPOT=1 ;;
      --reserved) RESERVED=1 ;;
      --) shift; REST+=("$@"); return ;;
      --*) die "unknown flag $1; see launch/README.md" ;;
      *) REST+=("$1") ;;
    esac
    shift
  done
}

need_name() {
  [ -n "$NAME" ] || die "no --name=NAME is given"
  [ -n "$ZONE" ] || die "no --zone=ZONE is given, for example --zone=us-east5-a"
  [[ "$NODES" =~ ^[1-9][0-9]*$ ]] || die "--slices is '$NODES'; it must be a whole number, 1 or more"
  WHERE=(--zone "$ZONE")
  [ -z "$PROJECT" ] || WHERE+=(--project "$PROJECT")
}

# The TPU VMs of a run: one a slice. Queued resources name several nodes NAME-0, NAME-1, ...
nodes() {
  if [ "$NODES" = 1 ]; then echo "$NAME"; return; fi
  local i
  for ((i = 0; i < NODES; i++)); do echo "$NAME-$i"; done
}

# The runtime image of a generation, unless --version names one.
runtime() {
  if [ -n "$VERSION" ]; then echo "$VERSION"; return; fi
  case "$ACCELERATOR" in
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "--type is '$ACCELERATOR'; it reads v5litepod-32, v5p-128 or v6e-64 (or give --version too)" ;;
  esac
}

# XLA's flags for a generation: the lines of flags/GENERATION that are no comments.
xla_flags() {
  local file
  case "$ACCELERATOR" in
    v5p-*) file=v5p ;; v5litepod-* | v5e-*) file=v5e ;; v6e-*) file=v6e ;; *) return 0 ;;
  esac
  grep -v '^#' "$(dirname "${BASH_SOURCE[0]}")/flags/$file" | tr '\n' ' ' | sed 's/ *$//'
}

# One command on every worker of every slice.
everywhere() {
  local node
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" --worker=all --command "$1"
  done
}
