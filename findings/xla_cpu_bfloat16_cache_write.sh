#!/usr/bin/env bash
# Surprising: on CPUs one token written into a KV cache in bfloat16 costs a pass over the whole cache. XLA (jax 0.10.2)
# has no write of bfloat16 there: it converts the array to float32, writes, and converts all of it back, in every step of
# a decoding loop. In float32, or with 16-bit integers, the same loop converts nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/show.py" <<'PYTHON'
import re

import jax
import jax.numpy as jnp

TOKENS, SIZE = 4096, 64


def decode(cache):
    """One token of ones at each place, in a loop."""
    token = jnp.ones((1, SIZE), cache.dtype)
    write = lambda place, cache: jax.lax.dynamic_update_slice(cache, token, (place, 0))
    return jax.lax.fori_loop(0, TOKENS, write, cache)


found = {}
for dtype in (jnp.bfloat16, jnp.float32, jnp.uint16):
    text = jax.jit(decode, donate_argnums=0).lower(jax.ShapeDtypeStruct((TOKENS, SIZE), dtype)).compile().as_text()
    name = jnp.dtype(dtype).name
    found[name] = len(re.findall(rf"\[{TOKENS},{SIZE}\]\S* convert\(", text))
    print(f"jax {jax.__version__}, {name}: {found[name]} conversions of the whole array in the compiled program")
assert found["bfloat16"] >= 2 and found["float32"] == found["uint16"] == 0, "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py"
