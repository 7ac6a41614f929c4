#!/usr/bin/env bash
# Measures this machine's NVIDIA GPU: parity tests, decoding, peak memory against the plan, the seconds of PPO's phases
# and of training steps, and of the same work by torch and TRL; first of all what is wanted of each. The parts before
# the peers end within twenty minutes, and these, which are installed first, after forty more. Writes
# benchmarks/results/DEVICE-DATE.json and .md; exit code 1 if a part failed, whose error is then in both. Uses the
# Python named by PYTHON (python3) if its JAX sees a GPU and all dependencies are installed; otherwise makes .venv and
# installs them (some more minutes, the first time).
#   benchmarks/gpu.sh            everything, on the GPU
#   benchmarks/gpu.sh --small    the same at toy size, also on a CPU: tests the script, and says nothing about a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(command -v "${PYTHON:-python3}" || true)
wanted=gpu
for argument in "$@"; do
    if [[ $argument == --small ]]; then wanted=any; fi
done

serves() {
    "$1" -c '
import sys
import jax, pytest
import rlhf_jax.plan, rlhf_jax.stages.ppo
sys.exit(sys.argv[1] == "gpu" and jax.default_backend() != "gpu")' "$wanted"
}

if [[ -z $python ]] || ! said=$(serves "$python" 2>&1); then
    if [[ $wanted == gpu ]] && ! command -v nvidia-smi >/dev/null; then
        echo "this machine has no nvidia-smi, so no NVIDIA GPU: try the script at toy size with --small" >&2
        exit 1
    fi
    echo "${PYTHON:-python3} cannot be used (${said:+$(tail -n 1 <<<"$said")}): using .venv" >&2
    source scripts/venv.sh
    extra=test
    if [[ $wanted == gpu ]]; then
        extra=$(.venv/bin/python -c 'from benchmarks.peers.environments import jax_extra; print(jax_extra())'),test
    fi
    install -e ".[$extra]"
    python=.venv/bin/python
fi
exec "$python" -m benchmarks.gpu "$@"
