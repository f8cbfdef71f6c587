# Sourced by the other scripts: activates .venv, made if need be, unless an environment is active.
# Needs `root`, the repository's root.
if [[ -z "${VIRTUAL_ENV:-}" && "${CONDA_DEFAULT_ENV:-base}" == base ]]; then
  if [[ ! -x "$root/.venv/bin/python" ]]; then
    echo "making the virtual environment .venv"
    python3 -m venv "$root/.venv"
  fi
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
fi
python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "lorakit needs Python 3.10 or newer; $(command -v python) is $(python --version)" >&2
  exit 2
}
