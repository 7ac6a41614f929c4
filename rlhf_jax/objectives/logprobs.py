"""Log-probabilities of chosen tokens, and the entropy of the distribution they were chosen from.

B sequences, T positions, D hidden size, V vocabulary. Position t holds the distribution of `targets[:, t]`: the
caller has shifted the targets.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.products import einsum

# In place of minus infinity: exp gives 0, and 0 times it is still 0, which the entropy needs.
_EXCLUDED = -1e30


def from_logits(logits: jax.Array, targets: jax.Array, *, num_real: int = 0) -> tuple[jax.Array, jax.Array]:
    """log p(y) = z_y - logsumexp(z) and entropy H = -sum_v p_v log p_v, both [B, T] float32.

    logits [B, T, V] any float dtype, targets [B, T] int. With `num_real` > 0, columns from there on are padding of the
    vocabulary and have probability 0.
    """
    logits = jnp.asarray(logits, jnp.float32)
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    if num_real:
        logits = jnp.where(column < num_real, logits, _EXCLUDED)
    log_p = jax.nn.log_softmax(logits)
    # A comparison instead of a gather: it fuses, splits over a sharded vocabulary, and its gradient needs no scatter.
    chosen = jnp.where(column == jnp.asarray(targets)[..., None], log_p, 0.0).sum(-1)
    return chosen, -(jnp.exp(log_p) * log_p).sum(-1)


def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int, **options) -> jax.Array:
    """log softmax(hidden @ head)[targets], [B, T] float32, without ever keeping [B, T, V].

    The first half of `token_logprobs_and_entropy`, which has the arguments.
    """
    return token_logprobs_and_entropy(hidden, head, targets, chunk=chunk, **options)[0]


def softcap_logits(x: jax.Array, cap: float) -> jax.Array:
    """cap x tanh(x / cap), as Gemma 2 (2024, section 2) bounds scores and logits; x where the cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def head_logits(hidden: jax.Array, rows: jax.Array, bias: jax.Array | None = None, softcap: float = 0.0) -> jax.Array:
    """hidden [..., D] by rows [V, D] + bias [V], soft-capped, in float32.

    Multiplied in the dtype of `hidden`, summed in float32 and kept so: rounded to bfloat16, what is sampled would not
    be what trains.
    """
    leading = "abc"[: hidden.ndim - 1]
    logits = einsum(f"{leading}d,vd->{leading}v", hidden, rows.astype(hidden.dtype), jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    return softcap_logits(logits, softcap)


def token_logprobs_and_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    num_real: int = 0,
    temperature: float = 1.0,
    bias: jax.Array | None = None,
    softcap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """`from_logits(head_logits(hidden, head) / temperature, targets)`, `chunk` positions at a time.

    The backward pass recomputes the logits where there are several chunks.

    hidden [B, T, D], head [D, V], targets [B, T] int; bias [V] and softcap as `head_logits` takes them.
    Live at once are the logits of one chunk, [B, chunk, V] float32. `chunk` need not divide T; 0 takes T whole.
    A head in float32 with a bfloat16 `hidden` gets its gradient summed over the chunks in float32.
    Returns logprobs and entropy, both [B, T] float32. Raises ValueError for a negative chunk.
    """
    if chunk < 0:
        raise ValueError(f"chunk is {chunk}: give the positions per chunk, or 0 for all at once")
    batch, length = targets.shape
    rows = head.T
    size = min(chunk, length) or length
    num_chunks = -(-length // size)

    def chunks_first(x: jax.Array) -> jax.Array:
        rest = x.shape[2:]
        x = jnp.pad(x, [(0, 0), (0, num_chunks * size - length)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(batch, num_chunks, size, *rest), 1, 0)

    # A single chunk is the first thing that the backward pass needs: to keep its logits takes no more memory at once.
    policy = jax.checkpoint_policies.save_only_these_names(*["logits"] * (num_chunks == 1))

    # Inside a scan nothing can undo the recomputation, so the barrier against it is left out.
    @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
    def one_chunk(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = checkpoint_name(head_logits(hidden, rows, bias, softcap), "logits")
        return from_logits(logits / temperature, targets, num_real=num_real)

    _, outputs = jax.lax.scan(lambda _, xs: (None, one_chunk(*xs)), None, (chunks_first(hidden), chunks_first(targets)))
    logprobs, entropy = (jnp.moveaxis(x, 0, 1).reshape(batch, num_chunks * size)[:, :length] for x in outputs)
    return logprobs, entropy
