#!/usr/bin/env bash
# A small language model learns to write SQL: install, models, data, train, evaluate, merge, table.
# What an earlier run finished is used again; a run that was interrupted goes on where it stopped.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
recipe=recipes/quickstart.yaml
model=models/smollm2-135m-instruct
sample=data/wikisql-sample
run=runs/quickstart

step() { printf '\n== %s\n' "$*"; }
show() { printf '$'; printf ' %q' "$@"; echo; "$@"; }

# The answer of a command, written when the command succeeded.
answer() {
  local file="$1"
  shift
  printf '$ %s > %s\n' "$*" "$file"
  "$@" > "$file.new"
  mv "$file.new" "$file"
}

source scripts/venv.sh
prefix="$(python -c 'import sys; print(sys.prefix)')"
stamp="$prefix/.lorakit-quickstart"
if [[ "$(cat "$stamp" 2>/dev/null)" == "$root" && "$stamp" -nt pyproject.toml ]]; then
  step "lorakit is installed in $prefix"
else
  step "installing lorakit into $prefix"
  show python -m pip install --quiet --disable-pip-version-check --editable '.[eval]' 'gguf>=0.17,<1'
  printf '%s\n' "$root" > "$stamp"
fi

step "demo models"
show python scripts/fetch_models.py
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

step "data: questions, tables and databases in WikiSQL's format"
complete=yes
for file in {train,dev}.{jsonl,tables.jsonl,db}; do
  [[ -f "$sample/$file" ]] || complete=no
done
if [[ "$complete" == yes ]]; then
  echo "$sample: already there"
else
  show python scripts/make_wikisql_sample.py "$sample"
fi

step "training"
show lorakit train "$recipe" --resume auto || {
  code=$?
  if [[ $code == 2 && -e "$run" ]]; then
    echo "If $run is left from another recipe, remove it and run this again: rm -r $run" >&2
  fi
  exit "$code"
}

step "evaluation: the base, then the adapter, on tables that training never saw"
for which in base adapter; do
  file="$run/eval-$which.json"
  if [[ "$file" -nt "$run/run.json" ]]; then
    echo "$file: already there"
  elif [[ "$which" == base ]]; then
    answer "$file" lorakit eval "$recipe" --base --json
  else
    answer "$file" lorakit eval "$recipe" --json
  fi
done

step "merging the adapter into the base"
if [[ "$run/merged" -nt "$run/run.json" ]]; then
  echo "$run/merged: already there"
elif [[ -e "$run/merged" ]]; then
  show lorakit merge "$model" "$run/adapter" "$run/merged" --overwrite
else
  show lorakit merge "$model" "$run/adapter" "$run/merged"
fi

python scripts/quickstart_table.py "$run"
