#!/usr/bin/env bash
# Makes .venv, installs what the tests need, checks the style and runs all tests that need no GPU.
# Two processes, a file of tests to each at a time. Arguments go to pytest: scripts/test.sh -m "not slow", scripts/test.sh tests/test_config.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

install -e '.[test,parity]' torch==2.13.0
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
