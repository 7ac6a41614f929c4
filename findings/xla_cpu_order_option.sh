#!/usr/bin/env bash
# Surprising: jax.jit accepts the compiler option xla_cpu_enable_concurrency_optimized_scheduler for one program, and
# checks its type, but XLA for CPUs (jax 0.10.2) then compiles the program as without it. Only the environment variable
# XLA_FLAGS changes the order of operations, for the whole process, and with it the temporary memory: here to a quarter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/show.py" <<'PYTHON'
import os
import sys

import jax
import jax.numpy as jnp

OPTION = "xla_cpu_enable_concurrency_optimized_scheduler"


def sums(x, weights):
    """Independent sums, each of an array as large as a weight."""
    return [jnp.sin(jnp.tanh(x @ w) @ x).sum(0) for w in weights]


def temporaries(options):
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    program = jax.jit(sums, compiler_options=options).lower(x, [x] * 8).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20


for options in ({}, {OPTION: False}, {OPTION: True}):
    flags = os.environ.get("XLA_FLAGS", "")
    print(f"jax {jax.__version__}, XLA_FLAGS={flags!r}, compiler_options={options}: {temporaries(options)} MiB")
default, off, on = (temporaries(options) for options in ({}, {OPTION: False}, {OPTION: True}))
assert default == off == on, "the option has an effect now"
assert (default < 3) == (sys.argv[1] == "flag"), "the flag has no effect any more"
PYTHON
export JAX_PLATFORMS=cpu
XLA_FLAGS="" "$folder/venv/bin/python" "$folder/show.py" default
XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false "$folder/venv/bin/python" "$folder/show.py" flag
