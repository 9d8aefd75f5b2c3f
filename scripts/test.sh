#!/usr/bin/env bash
# Installs everything and runs every check: style, types, tests. Arguments go to pytest (scripts/test.sh -k packing).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh
install dev

say "Style"
ruff check .
ruff format --check .
say "Types"
mypy
say "Tests"
export HF_HUB_OFFLINE=1           # nothing here asks a hub
unset PYTHONDONTWRITEBYTECODE     # or each of some hundred starts would compile the project once more
if [ $# -gt 0 ]; then
    python -m pytest "$@"
else
    # More workers than cores: many a test waits for processes that it has started.
    python -m pytest --numprocesses 3
fi
