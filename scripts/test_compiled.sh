#!/usr/bin/env bash
# The tests of programs compiled for GPUs that are not attached: makes .venv-cuda with JAX's CUDA plugin (about 5 GB)
# and runs the tests marked cuda. No GPU is needed or used. Arguments go to pytest: scripts/test_compiled.sh -k one_copy
set -euo pipefail
venv=.venv-cuda
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

install -e '.[cuda13,test]'
export JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 HF_HUB_OFFLINE=1
"$venv"/bin/python -m pytest -m cuda "$@"
