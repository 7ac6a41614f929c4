"""How the next token is drawn: settings, their checks, and pure functions of logits.

B rows, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class SampleConfig:
    """How the next token is drawn: in the order of transformers, first what penalises and forbids, then what tempers,
    then the cuts by top-k, top-p and min-p, each of what the one before left."""

    max_new_tokens: int = 256  # tokens of an answer, at most
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # draw among the k likeliest; 0: all
    top_p: float = 1.0  # draw among the likeliest whose probabilities first sum to p
    min_p: float = 0.0  # draw among those at least p times as likely as the likeliest; 0: all
    repetition_penalty: float = 1.0  # logits of tokens of the prompt and the answer are divided by it where positive
    min_new_tokens: int = 0  # tokens before which no EOS is drawn
    num_samples: int = 1  # answers to each prompt


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
    if not 0 <= sample.min_p <= 1:
        raise ValueError(f"min_p={sample.min_p}: from 0 to 1, and 0 keeps every token")
    if not sample.repetition_penalty > 0:
        raise ValueError(f"repetition_penalty={sample.repetition_penalty}: above 0, and 1 penalises nothing")
    if not 0 <= sample.min_new_tokens <= sample.max_new_tokens:
        raise ValueError(
            f"min_new_tokens={sample.min_new_tokens}: from 0 to max_new_tokens={sample.max_new_tokens}, and 0 forbids "
            "no EOS"
        )
    if sample.num_samples < 1:
        raise ValueError(f"num_samples={sample.num_samples}: at least 1")


def check_learnable(sample: SampleConfig) -> None:
    """Raise ValueError unless policy gradients can be taken of what is sampled: the whole distribution, not greedy."""
    check_sample(sample)
    if sample.temperature == 0:
        raise ValueError(
            "sample.temperature=0: a greedy policy has no probability ratios to learn from; set it above 0"
        )
    if sample.top_k or sample.top_p < 1:
        raise ValueError("sample.top_k, sample.top_p: probability ratios are of all tokens; set top_k=0 and top_p=1.0")
    if sample.min_p:
        raise ValueError("sample.min_p: probability ratios are of all tokens; set min_p=0.0")
    if sample.repetition_penalty != 1:
        raise ValueError(
            "sample.repetition_penalty: probability ratios are of the model's own logits; set repetition_penalty=1.0"
        )
    if sample.min_new_tokens:
        raise ValueError("sample.min_new_tokens: probability ratios are of all tokens, EOS too; set min_new_tokens=0")


def is_model_distribution(sample: SampleConfig) -> bool:
    """Whether `logprobs` are of the model's own distribution already."""
    plain = SampleConfig(sample.max_new_tokens, 1.0, num_samples=sample.num_samples)
    return dataclasses.replace(sample, temperature=sample.temperature or 1.0) == plain


def is_eos(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(tokens, jnp.asarray(eos_ids, jnp.int32))


def seen_ids(tokens: jax.Array, mask: jax.Array, vocab: int) -> jax.Array:
    """[B, V] bool: which ids stand in [B, T] tokens where the mask is true."""
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), vocab), bool).at[rows, jnp.where(mask, tokens, vocab)].set(True, mode="drop")


def penalise_logits(
    logits: jax.Array, sample: SampleConfig, seen: jax.Array | None, drawn: jax.Array, eos_ids: tuple[int, ...]
) -> jax.Array:
    """[B, V] -> [B, V]: repetition penalty (Keskar et al. 2019, eq. 1, negative logits multiplied), then no EOS early.

    Args:
        seen: [B, V] bool, ids of the prompt (without its padding) and of the answer so far; read only if there is a
            penalty.
        drawn: [B] int32, tokens of the answer so far.
    """
    if sample.repetition_penalty != 1:
        penalty = sample.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sample.min_new_tokens:
        is_end = is_eos(jnp.arange(logits.shape[-1]), eos_ids)
        logits = jnp.where(is_end & (drawn < sample.min_new_tokens)[:, None], -jnp.inf, logits)
    return logits


def truncate_logits(logits: jax.Array, sample: SampleConfig) -> jax.Array:
    """[B, V] -> [B, V]: tempered, then -inf outside the top k, outside the nucleus (Holtzman et al. 2020), and below
    min-p times the likeliest (Nguyen et al. 2024)."""
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
    if sample.min_p:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(sample.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def logprob_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """[B] float32 log-probabilities of tokens [B] by logits [B, V]."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def draw(logits: jax.Array, keys: jax.Array, sample: SampleConfig) -> tuple[jax.Array, jax.Array]:
    """Next tokens [B] int32 and their log-probabilities [B] float32 from [B, V] float32 logits and [B] keys."""
    if sample.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = truncate_logits(logits, sample)
        tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return tokens, logprob_of(logits, tokens)
