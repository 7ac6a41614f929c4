"""Program one: prefill and decode with a KV cache, sampling inside one compiled loop; laid out by GENERATE.

B rows, P prompt positions, N new tokens, V padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rlhf_jax.mesh import Layout
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.attention import Choice
from rlhf_jax.models.cached import Cache, Weights, empty_cache, forward, logits_of
from rlhf_jax.models.layers import positions_of
from rlhf_jax.trees import record

SHORTEST_BUCKET = 32


@dataclass(frozen=True)
class SampleConfig:
    """How the next token is drawn."""

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # draw among the k likeliest; 0: all
    top_p: float = 1.0  # draw among the likeliest whose probabilities first sum to p


@record
class Rollout:
    """Prompts and the answers sampled to them.

    Attributes:
        prompts: [B, P] int32, left-padded.
        prompt_mask: [B, P] bool.
        tokens: [B, N] int32; after the end of an answer, whatever (the mask says).
        mask: [B, N] bool, true up to and including EOS.
        logprobs: [B, N] float32, of the distribution that was sampled from (tempered and cut by top-k and top-p);
            when greedy, of the model's own distribution.
        ended: [B] bool, true where the answer ended by EOS, false where it was cut at N.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    ended: jax.Array


def check_sample(sample: SampleConfig) -> None:
    """Raise ValueError for settings that name no distribution."""
    if sample.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={sample.max_new_tokens}: at least 1")
    if sample.temperature < 0:
        raise ValueError(f"temperature={sample.temperature}: at least 0, and 0 is greedy")
    if sample.top_k < 0:
        raise ValueError(f"top_k={sample.top_k}: at least 0, and 0 keeps every token")
    if not 0 < sample.top_p <= 1:
        raise ValueError(f"top_p={sample.top_p}: above 0 and at most 1, and 1 keeps every token")


def check_learnable(sample: SampleConfig) -> None:
    """Raise ValueError unless policy gradients can be taken of what is sampled: the whole distribution, not greedy."""
    check_sample(sample)
    if sample.temperature == 0:
        raise ValueError(
            "sample.temperature=0: a greedy policy has no probability ratios to learn from; set it above 0"
        )
    if sample.top_k or sample.top_p < 1:
        raise ValueError("sample.top_k, sample.top_p: probability ratios are of all tokens; set top_k=0 and top_p=1.0")


def truncated_logits(logits: jax.Array, sample: SampleConfig) -> jax.Array:
    """[B, V] -> [B, V]: tempered, then -inf outside the top k, then outside the nucleus (Holtzman et al. 2020)."""
    logits = logits / sample.temperature
    if 0 < sample.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sample.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sample.top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of all that are likelier
        least = jnp.where(before < sample.top_p, ranked, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(logits: jax.Array, keys: jax.Array, sample: SampleConfig) -> tuple[jax.Array, jax.Array]:
    """Next tokens [B] int32 and their log-probabilities [B] float32 from [B, V] float32 logits and [B] keys."""
    if sample.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = truncated_logits(logits, sample)
        tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def is_eos(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(tokens, jnp.asarray(eos_ids, jnp.int32))


def prefill(
    config: DecoderConfig,
    weights: Weights,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    new_tokens: int,
    layout: Layout,
    dtype: jnp.dtype,
    attention: Choice = "auto",
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after each left-padded prompt [B, P], and a cache with room for `new_tokens` more."""
    batch, length = prompts.shape
    cache = empty_cache(config, batch, length + new_tokens, dtype, layout)
    positions = positions_of(prompt_mask)
    hidden, cache = forward(config, weights, prompts, prompt_mask, positions, cache, 0, layout, attention)
    return logits_of(config, weights, hidden[:, -1]), cache


def generate(
    config: DecoderConfig,
    weights: Weights,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    sample: SampleConfig,
    eos_ids: tuple[int, ...],
    layout: Layout,
    dtype: jnp.dtype,
    attention: Choice = "auto",
) -> Rollout:
    """Sample an answer to every prompt; to be jitted with all but the arrays static.

    Args:
        prompts, prompt_mask: [B, P], left-padded, at least one real token a row.
        key: one key for the whole batch; token t of row b is drawn with fold_in(fold_in(key, b), t), so that a row's
            answer does not depend on how many rows there are.
        attention: the kernel of the prefill, see `attention_kernel`.
    """
    batch, prompt_length = prompts.shape
    answer_length = sample.max_new_tokens
    prompt_sizes = prompt_mask.sum(axis=1, dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    logits, cache = prefill(config, weights, prompts, prompt_mask, answer_length, layout, dtype, attention)

    def write(t, logits, done, tokens, mask, logprobs):
        """Draw token t for the rows that are not done, and say who is done now."""
        token, logprob = draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, t), sample)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, t))
        mask = jax.lax.dynamic_update_slice(mask, ~done[:, None], (0, t))
        logprobs = jax.lax.dynamic_update_slice(logprobs, jnp.where(done, 0.0, logprob)[:, None], (0, t))
        return token, done | is_eos(token, eos_ids), tokens, mask, logprobs

    def unfinished(state):
        t, _, done, *_ = state
        return (t < answer_length) & ~done.all()

    def step(state):
        t, token, done, tokens, mask, logprobs, cache = state
        real = ~done[:, None]
        positions = (prompt_sizes + t - 1)[:, None]
        hidden, cache = forward(config, weights, token[:, None], real, positions, cache, prompt_length + t - 1, layout)
        logits = logits_of(config, weights, hidden[:, -1])
        return t + 1, *write(t, logits, done, tokens, mask, logprobs), cache

    shape = (batch, answer_length)
    blank = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32)
    first = write(0, logits, jnp.zeros(batch, bool), *blank)
    _, _, done, tokens, mask, logprobs, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(1), *first, cache))
    return Rollout(prompts, prompt_mask, tokens, mask, logprobs, done)


def bucket(length: int) -> int:
    """The padded prompt length that is compiled for prompts of `length` tokens: a power of two, so that few are."""
    return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())
