#!/usr/bin/env bash
# hico-nano from nothing: the made-up world, a language model that has read, the four stages, the exported model. One GPU, some minutes a stage.
#   bash launch/nano.sh runs/hico_nano [SEED]
# The same command goes on where it was stopped. Steps are multiplied by SCALE (default 1; 0.01 tries the path).
# SKIP="stage2" leaves stages out, for ablations. MERGE=off keeps every patch (196 tokens a frame at the end, not 16).
# DROP="--config.model.drop.kind=attention ..." is how the language model drops tokens from the long films on.
# TUNE="--config.data.worker_count=6" goes to every stage ("--config.model.dtype=float32" on a CPU). HICO is the program (default: the one in .venv).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:?give a folder: bash launch/nano.sh runs/hico_nano [SEED]}" seed="${2:-0}"
scale="${SCALE:-1}" skip=" ${SKIP:-} " preset="${PRESET:-hico_nano}"
read -ra hico <<<"${HICO:-${HICO_VENV:-$root/.venv}/bin/hico}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
world="$(realpath -m "${WORLD:-$out/world}")"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/compiled}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
cd "$root"

"${hico[@]}" world --preset "$preset" --out "$world" --seed "$seed"

last="" names=() lines=()
# stage NAME CONFIG ANNOTATIONS STEPS ROWS TOKENS CLIPS TILES [--config.KEY=VALUE ...]
stage() {
  local name="$1" config="$2" films="$3" steps rows="$5" tokens="$6" clips="$7" tiles="$8"
  steps="$(awk -v n="$4" -v s="$scale" 'BEGIN { n = int(n * s + 0.5); print n < 2 ? 2 : n }')"
  shift 8
  [[ "$skip" == *" $name "* ]] && return
  local patches=100 whole=""
  [[ "$config" == stage4* ]] && patches=196
  if [ "${MERGE:-on}" = off ]; then
    tokens=$(((tokens + clips * 4 * (patches - 16) + 127) / 128 * 128))
    whole="--config.model.compressor.tokens_per_frame=$patches"
  fi
  names+=("$name")
  lines+=("--config=configs/$config.py:hico_nano --config.workdir=$out/$name --config.data.annotations=$world/$films \
--config.data.tokenizer=$world --config.train.steps=$steps --config.train.seed=$seed --config.data.seed=$seed \
--config.train.num_samples=0 --config.checkpoint.every=500 --config.data.batch_size=$rows --config.data.length_buckets=($tokens,) \
--config.data.clip_buckets=($clips,) --config.data.tile_buckets=($tiles,) ${last:+--config.init.parent=$out/$last} $whole ${TUNE:-} $*")
  last="$name"
}
far="--config.data.position_skip=163840"
rest="--config.optim.rates=(('vision/.*',None),('.*','lr'))"
words="--config.optim.rates=(('vision/.*',None),('projector/.*',None),('.*','lr'))"
stage told stage3_sft told.yaml 3000 64 512 1 0 --config.init.parent= --config.data.pack=512 --config.optim.lr=1e-3 "$words"
stage stage1 stage1_align stage1.yaml 60 64 192 1 1
stage stage2 stage2_pretrain stage2.yaml 1200 64 512 3 2 --config.optim.lr=1e-3
stage stage3 stage3_sft short.yaml 2600 64 512 3 0 --config.optim.lr=1e-3 "$far"
stage stage3_middle stage3_sft middle.yaml 3000 32 960 8 0 --config.data.max_frames=32 --config.optim.lr=8e-4 "$far"
stage stage3_long stage3_sft long.yaml 400 4 8576 128 0 --config.data.max_frames=512 --config.optim.lr=4e-4 "$far" "$rest" ${DROP:-}
stage stage4 stage4_highres short.yaml 600 64 512 3 0 --config.optim.lr=5e-4 "$far" ${DROP:-}
stage stage4_long stage4_highres long.yaml 150 4 4480 64 0 --config.data.max_frames=256 --config.optim.lr=3e-4 "$far" ${DROP:-}

# The programs of later stages are compiled while earlier ones train.
(for i in "${!names[@]}"; do
  if ((i > 0)) && [[ ! -e "$out/${names[i]}.done" ]]; then
    read -ra line <<<"${lines[i]}"
    nice -n 10 "${hico[@]}" train "${line[@]}" --config.data.worker_count=0 --compile_only
  fi
done) >"$out/compile.log" 2>&1 &
ahead=$!
trap 'kill "$ahead" 2>/dev/null || true' EXIT
for i in "${!names[@]}"; do
  [[ -e "$out/${names[i]}.done" ]] && continue
  read -ra line <<<"${lines[i]}"
  began="$(date +%s)"
  "${hico[@]}" train "${line[@]}"
  echo "== ${names[i]} took $(($(date +%s) - began)) s" | tee -a "$out/stages.log"
  touch "$out/${names[i]}.done"
done
"${hico[@]}" export "$out/$last" "$out/model" --overwrite
echo "== $out/model"
