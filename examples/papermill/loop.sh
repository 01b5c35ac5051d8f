#!/usr/bin/env bash
# The α study as a loop of papermill runs: DATA=folder bash examples/papermill/loop.sh -p num_epochs 20
# What is finished is not repeated, and what was cut off goes on from its last checkpoint; a run that fails leaves its notebook, with the error in it, and the loop
# goes on. ALPHAS, SEEDS and OUT may be set, and AUDIO (a folder or a pack), if the audio is not in DATA.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/alpha} failed=0
data=()       # without DATA: the synthesised demo corpus
if [ -n "${DATA:-}" ]; then
  data=(-p audio_base_path "${AUDIO:-$DATA}" -p train_jsonl "$DATA/train.jsonl" -p val_jsonl "$DATA/val.jsonl" -p test_jsonl "$DATA/test.jsonl" -p tokenizer_path "$OUT/tok.model")
fi
for alpha in ${ALPHAS:-0 0.001 0.01 0.1 1}; do
  for seed in ${SEEDS:-0 1 2}; do
    run="$OUT/alpha_${alpha}_seed_$seed"
    [ -f "$run/test_results.json" ] && { echo "$run is finished"; continue; }
    mkdir -p "$run"
    resume=(); ls "$run"/checkpoint-*/trainer_state.json > /dev/null 2>&1 && resume=(-p resume True)
    papermill nbs/train.ipynb "$run/report.ipynb" "${data[@]}" "${resume[@]}" -p checkpoint_interval 1 -p save_dir "$run" -p alpha_asr "$alpha" -p alpha_prosody "$alpha" -p seed "$seed" "$@" \
      || { echo "$run failed; see $run/report.ipynb"; failed=$((failed + 1)); }
  done
done
papermill nbs/gather.ipynb "$OUT/comparison.ipynb" -p runs "$OUT" -p out "$OUT/comparison"
exit $((failed > 0))
