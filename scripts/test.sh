#!/usr/bin/env bash
# Makes .venv, installs what the tests need, checks the style and runs the tests that need no GPU, except those that
# tests/long.toml lists; with --long those too. Other arguments go to pytest: scripts/test.sh -m long runs only the
# listed ones, scripts/test.sh tests/test_config.py one file. Two processes, each running one test file at a time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

arguments=()
for argument in "$@"; do
    if [[ $argument == --long ]]; then arguments+=(-m "not gpu and not cuda"); else arguments+=("$argument"); fi
done
install -e '.[test,parity,serve]' torch==2.13.0
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${arguments[@]}"
