#!/usr/bin/env bash
# Teach a small language model to write SQL: install, fetch models, generate data, train, evaluate, merge.
# Completed steps of an earlier run are reused; an interrupted training run is resumed.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
recipe=recipes/quickstart.yaml
model=models/smollm2-135m-instruct
sample=data/wikisql-sample
run=runs/quickstart

step() { printf '\n== %s\n' "$*"; }
show() { printf '$'; printf ' %q' "$@"; echo; "$@"; }

# Write a command's output to a file once the command has succeeded.
save_output() {
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
  step "lorakit is already installed in $prefix"
else
  step "installing lorakit into $prefix"
  show python -m pip install --quiet --disable-pip-version-check --editable '.[eval]' 'gguf>=0.18,<1'
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
  echo "$sample: already exists"
else
  show python scripts/make_wikisql_sample.py "$sample"
fi

step "training"
show lorakit train "$recipe" --resume auto || {
  code=$?
  if [[ $code == 2 && -e "$run" ]]; then
    echo "hint: if $run is from another recipe, remove it and run this again: rm -r $run" >&2
  fi
  exit "$code"
}

step "evaluation: base model and adapter, on tables that do not occur in training"
for which in base adapter; do
  file="$run/eval-$which.json"
  if [[ "$file" -nt "$run/run.json" ]]; then
    echo "$file: already exists"
  elif [[ "$which" == base ]]; then
    save_output "$file" lorakit eval "$recipe" --base --json
  else
    save_output "$file" lorakit eval "$recipe" --json
  fi
done

step "merging the adapter into the base"
if [[ "$run/merged" -nt "$run/run.json" ]]; then
  echo "$run/merged: already exists"
elif [[ -e "$run/merged" ]]; then
  show lorakit merge "$model" "$run/adapter" "$run/merged" --overwrite
else
  show lorakit merge "$model" "$run/adapter" "$run/merged"
fi

python scripts/quickstart_table.py "$run"
