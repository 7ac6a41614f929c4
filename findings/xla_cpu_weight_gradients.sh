#!/usr/bin/env bash
# Surprising: on CPUs the gradient of a linear's weight, as JAX derives it from x [a, b, d] by w [d, f], takes about
# twice as long as the same product written by hand, einsum("abd,abf->df", x, gradient). The derived one is compiled
# (jax 0.10.2, float32) to a copy of the gradient, the larger operand, turned to [f, a b], with the operations that
# compute it inside that loop of strides, and to a product that YNNPACK does not take; the one by hand to a copy of x
# and to YNNPACK's product.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/show.py" <<'PYTHON'
import re
import time

import jax
import jax.numpy as jnp

print("jax", jax.__version__)
a, b, d, f = 8, 128, 512, 2048
x, w, y = jnp.ones((a, b, d)), jnp.ones((d, f)), jnp.ones((a, b, f))


def derived(x, y):
    _, gradient_of = jax.vjp(lambda w: jnp.einsum("abd,df->abf", x, w), w)
    return gradient_of(y * jax.nn.sigmoid(y))[0]


def by_hand(x, y):
    return jnp.einsum("abd,abf->df", x, y * jax.nn.sigmoid(y))


found = {}
for function in (derived, by_hand):
    compiled = jax.jit(function).lower(x, y).compile()
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    turned = [name for name, size in (("x", d), ("the gradient", f)) if f"f32[{size},{a * b}]" in entry]
    library = "YNNPACK" if re.search(r"ynn_fusion\S* = ", entry) else "XLA's own" if " dot(" in entry else "none"
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, y))
        seconds.append(time.perf_counter() - start)
    found[function.__name__] = turned, library
    print(f"{function.__name__}: turns {' and '.join(turned)}, product of {library}, {1e3 * sorted(seconds)[7]:.1f} ms")
assert found["derived"] == (["the gradient"], "XLA's own"), "the behaviour has changed"
assert found["by_hand"] == (["x"], "YNNPACK"), "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py"
