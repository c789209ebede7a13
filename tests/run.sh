#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, tests. Sets up its own .venv.
#
#     bash tests/run.sh [--full] [PYTEST ARGUMENTS]
#
# Without --full, cells of large products are thinned to pairwise covers; see tests/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source launcher/environment.sh
make_environment '[dev]'
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
codespell
mypy
lint-imports --no-cache
python -m pytest --numprocesses 2 --dist loadgroup "$@"
