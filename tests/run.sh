#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, tests. Sets up its own .venv.
#
#     bash tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
source launcher/environment.sh
make_environment '[dev]'
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
mypy
lint-imports --no-cache
python -m pytest "$@"
