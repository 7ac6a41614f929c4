#!/usr/bin/env bash
# Surprising: on CPUs, JAX compiles a product of bfloat16 in a batch of one that is asked for in float32 and whose left
# matrix is transposed, and the compiled program then always fails: "Unsupported element type ... BF16 x BF16 = F32".
# Not transposed, the same product runs, and asked for in bfloat16 both do. And the dtype of the result decides that of
# the operands: asked for in bfloat16 they are converted to float32 first, asked for in float32 they are not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/show.py" <<'PYTHON'
import re

import jax
import jax.numpy as jnp

print("jax", jax.__version__)
x, y = jnp.ones((256, 512), jnp.bfloat16), jnp.ones((512, 384), jnp.bfloat16)


def product(x, y, dtype):
    return jax.lax.dot_general(x[None], y[None], (((2,), (1,)), ((0,), (0,))), preferred_element_type=dtype)


def outcome(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    dtypes = set()
    for body in re.split(r"\n\n", compiled.as_text()):
        if re.search(r" dot\(", body):
            dtypes |= set(re.findall(r"= (bf16|f32)\S+ parameter", body))
    try:
        jax.block_until_ready(compiled(*arguments))
    except jax.errors.JaxRuntimeError as error:
        return f"fails: {error}"
    return f"runs, reading {' and '.join(sorted(dtypes))}"


found = {}
for name in ("float32", "bfloat16"):
    found[name, "as it is"] = outcome(lambda x, y: product(x, y, name), x, y)
    found[name, "transposed"] = outcome(lambda x, y: product(x.T, y, name), x.T, y)
for (name, order), text in found.items():
    print(f"bfloat16 by bfloat16 in {name}, left matrix {order}: {text}")
assert found["float32", "as it is"] == "runs, reading bf16", "the behaviour has changed"
assert "BF16 x BF16 = F32" in found["float32", "transposed"], "the behaviour has changed"
assert found["bfloat16", "as it is"] == "runs, reading f32", "the behaviour has changed"
assert found["bfloat16", "transposed"].startswith("runs"), "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py"
