#!/usr/bin/env bash
# Teach a small language model to write SQL: install, fetch models, generate data, train, compare.
# Completed steps of an earlier run are reused; an interrupted training run is resumed.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
recipe=recipes/quickstart.yaml
sample=data/wikisql-sample
run=runs/quickstart
was_active="${VIRTUAL_ENV:-}"
[[ "${CONDA_DEFAULT_ENV:-base}" == base ]] || was_active="$CONDA_DEFAULT_ENV"

step() { printf '\n[%s] %s\n' "$1" "$2"; }
show() { printf '$'; printf ' %q' "$@"; echo; "$@"; }

# Of what pip prints: the packages of a megabyte or more as they are downloaded, and the end.
large_downloads() {
  sed -nuE \
    -e 's/^ *(Downloading|Using cached) (.*\/)?([^/ -]+)-([^-]+)-[^ ]* (\([0-9.]+ [MG]B\)).*/  \1 \3 \4 \5/p' \
    -e 's/^Installing collected packages: .*/  Installing the packages/p'
}

source scripts/venv.sh
prefix="$(python -c 'import sys; print(sys.prefix)')"
stamp="$prefix/.lorakit-quickstart"
if [[ "$(cat "$stamp" 2>/dev/null)" == "$root" && "$stamp" -nt pyproject.toml ]]; then
  step 1/5 "lorakit is already installed in $prefix"
else
  step 1/5 "Installing lorakit and PyTorch into $prefix: 1 to 4 minutes"
  python -m pip install --disable-pip-version-check --editable '.[eval]' 'gguf>=0.18,<1' | large_downloads
  printf '%s\n' "$root" > "$stamp"
fi

step 2/5 "Fetching two demo models: about 180 MB, under a minute"
python scripts/fetch_models.py
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

step 3/5 "Generating questions, tables and databases in WikiSQL's format"
complete=yes
for file in {train,dev}.{jsonl,tables.jsonl,db}; do
  [[ -f "$sample/$file" ]] || complete=no
done
if [[ "$complete" == yes ]]; then
  echo "$sample: already exists"
else
  python scripts/make_wikisql_sample.py "$sample"
fi

step 4/5 "Training on 1,000 questions and evaluating on 200: 2 to 6 minutes on 2 idle CPU cores"
show lorakit train "$recipe" --resume auto || {
  code=$?
  if [[ $code == 2 && -e "$run" ]]; then
    echo "hint: if $run is from another recipe, remove it and run this again: rm -r $run" >&2
  fi
  exit "$code"
}

step 5/5 "Asking the base model the same 200 questions, for comparison: 1 to 2 minutes"
scores="$run/eval-base.json"
answers="$run/predictions-base.jsonl"
if [[ -f "$answers" && "$scores" -nt "$recipe" && "$scores" -nt "$sample/dev.jsonl" ]]; then
  echo "$scores: already exists"
else
  show lorakit eval "$recipe" --base --output "$scores" --save-predictions "$answers"
fi

python scripts/quickstart_summary.py "$run" ${was_active:+--active}
