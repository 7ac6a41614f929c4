#!/usr/bin/env bash
# Surprising: jax.nn.softmax has a rule for its derivative, y (g - sum(y g)), which needs its result alone, but does not
# use it by default (jax 0.10.2: jax_softmax_custom_jvp is False). It differentiates exponential, sum and quotient one
# by one, for which it keeps the exponentials. Where the next product keeps the result too, as in attention, a backward
# pass so has two arrays as large as the scores in place of one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/show.py" <<'PYTHON'
import jax
import jax.numpy as jnp

scores = jnp.linspace(-3.0, 3.0, 64 * 128).reshape(64, 128)


def kept() -> int:
    """How many different arrays as large as the scores the backward pass of attention keeps."""
    _, backward = jax.vjp(lambda x, v: jax.nn.softmax(x) @ v, scores, jnp.ones((128, 16)))
    large = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == scores.shape]
    return len({leaf.tobytes() for leaf in map(jax.device_get, large)})


default = jax.config.jax_softmax_custom_jvp
print("jax", jax.__version__, "jax_softmax_custom_jvp is", default, "by default")
found = {}
for by_rule in (False, True):
    jax.config.update("jax_softmax_custom_jvp", by_rule)
    found[by_rule] = kept()
    print(f"jax_softmax_custom_jvp = {by_rule}: the backward pass keeps {found[by_rule]} as large as the scores")
assert (default, found) == (False, {False: 2, True: 1}), "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py"
