"""What the tokens of a row see of each other, and from where: made once, and given to every layer beside its input.

A row may hold several documents end to end. None of them sees another, and positions start at 0 in each.

B batch, T positions, K key-value heads, G query heads of each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.mesh import Layout
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.layers import Turns, alibi_bias, turns_of


class Sight(NamedTuple):
    """What every layer is given beside its input.

    Attributes:
        real: [B, T] bool.
        visible: [B, T, T] bool, see `visible_of`; None where fused attention needs no mask.
        turns: of rotary embeddings, and `local_turns` of the layers with a window where theirs differ.
        bias: [B, K, G, 1, T] float32 of ALiBi.
        layout: where activations lie; None leaves that to the compiler.
    """

    real: jax.Array
    visible: jax.Array | None
    turns: Turns | None
    local_turns: Turns | None
    bias: jax.Array | None
    layout: Layout | None

    def pin(self, x: jax.Array) -> jax.Array:
        """Keep [B, T, ...] split by its batch: left alone, XLA also tries heads, badly."""
        return x if self.layout is None else self.layout.constrain(x, "batch", None, None)


def visible_of(mask: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """[B, T] bool, and [B, T] int32 of packed rows -> [B, T, T] bool: the keys that each query may look at.

    Those are the real tokens up to the query itself, of its own document where there are several.
    """
    visible = jnp.tril(jnp.ones((mask.shape[1],) * 2, bool)) & mask[:, None, :]
    return visible if segments is None else visible & (segments[:, :, None] == segments[:, None, :])


def sight_of(
    config: DecoderConfig,
    mask: jax.Array,
    positions: jax.Array,
    segments: jax.Array | None,
    layout: Layout | None,
    *,
    causal: bool,
) -> Sight:
    """For rows [B, T] whose tokens stand at `positions`; `causal` where attention is fused and asks for no mask.

    Windows count places in the row, which within a document are positions: its tokens lie side by side.
    """
    assert not (causal and segments is not None), "causality alone does not keep documents apart"
    c = config
    return Sight(
        real=mask,
        visible=None if causal else visible_of(mask, segments),
        turns=turns_of(c.rope, positions) if c.rope else None,
        local_turns=turns_of(c.local_rope, positions) if c.local_rope else None,
        bias=alibi_bias(c.alibi, positions, c.num_kv_heads) if c.alibi else None,
        layout=layout,
    )
