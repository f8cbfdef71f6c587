#!/usr/bin/env bash
# The long tests: runs that are killed at random moments, mutated files in large numbers, the blocks of the
# documentation, and the wheel in a new environment, for which PyPI must be reachable.
#   KILLS  kills for each of five methods, with one process and with two [default: 10]
# Arguments go to pytest: scripts/soak.sh -k adalora
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
source scripts/venv.sh
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 LORAKIT_SOAK_KILLS="${KILLS:-10}"
python -m pytest -m slow --durations 10 "$@"
