# Sourced by the other scripts: activate .venv, creating it if needed, unless an environment is active.
# Expects `root`, the root of the repository.
if [[ -z "${VIRTUAL_ENV:-}" && "${CONDA_DEFAULT_ENV:-base}" == base ]]; then
  if [[ ! -x "$root/.venv/bin/python" ]]; then
    echo "creating the virtual environment .venv"
    python3 -m venv "$root/.venv"
  fi
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
fi
python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: lorakit requires Python 3.10 or newer; $(command -v python) is $(python --version)" >&2
  exit 2
}
