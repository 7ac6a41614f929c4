"""How the next token is sampled: settings, their checks, and pure functions of logits.

B rows, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rlhf_jax.trees import record


@dataclass(frozen=True)
class SampleConfig:
    """How the next token is sampled, in the order of transformers: penalties and forbidden tokens, then temperature,
    then top-k, top-p and min-p, each applied to the tokens that the one before kept."""

    max_new_tokens: int = 256  # largest number of tokens of an answer
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # sample among the k most likely tokens; 0: all
    top_p: float = 1.0  # sample among the most likely tokens whose probabilities first sum to p
    min_p: float = 0.0  # sample among tokens at least p times as likely as the most likely one; 0: all
    repetition_penalty: float = 1.0  # logits of tokens of the prompt and the answer are divided by it where positive
    min_new_tokens: int = 0  # number of tokens before which no EOS is sampled
    num_samples: int = 1  # answers per prompt


@record
class RowSample:
    """What the request of each row asks for, where requests differ; all else is as in a SampleConfig.

    Attributes:
        seeds: [B] uint32.
        temperature: [B] float32; 0: greedy.
        top_p: [B] float32, as in SampleConfig.
        limits: [B] int32, largest number of tokens of the answer.
    """

    seeds: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    limits: jax.Array


def check_sample(sample: SampleConfig) -> None:
    """Raise ValueError for settings that define no distribution."""
    s, least, most = sample, sample.min_new_tokens, f"max_new_tokens={sample.max_new_tokens}"
    _check_all(
        (s.max_new_tokens >= 1, f"{most}: at least 1"),
        (s.temperature >= 0, f"temperature={s.temperature}: at least 0, and 0 is greedy"),
        (s.top_k >= 0, f"top_k={s.top_k}: at least 0, and 0 keeps every token"),
        (0 < s.top_p <= 1, f"top_p={s.top_p}: above 0 and at most 1, and 1 keeps every token"),
        (0 <= s.min_p <= 1, f"min_p={s.min_p}: from 0 to 1, and 0 keeps every token"),
        (s.repetition_penalty > 0, f"repetition_penalty={s.repetition_penalty}: above 0, and 1 penalises nothing"),
        (0 <= least <= s.max_new_tokens, f"min_new_tokens={least}: from 0 to {most}, and 0 forbids no EOS"),
        (s.num_samples >= 1, f"num_samples={s.num_samples}: at least 1"),
    )


def check_learnable(sample: SampleConfig) -> None:
    """Raise ValueError unless policy gradients can be taken of the samples: the whole distribution, not greedy."""
    check_sample(sample)
    own, every = "probability ratios are of the model's own logits", "probability ratios are of all tokens"
    greedy = "a greedy policy has no probability ratios to learn from"
    _check_all(
        (sample.temperature > 0, f"sample.temperature=0: {greedy}; set it above 0"),
        (not sample.top_k and sample.top_p == 1, f"sample.top_k, sample.top_p: {every}; set top_k=0 and top_p=1.0"),
        (not sample.min_p, f"sample.min_p: {every}; set min_p=0.0"),
        (sample.repetition_penalty == 1, f"sample.repetition_penalty: {own}; set repetition_penalty=1.0"),
        (not sample.min_new_tokens, f"sample.min_new_tokens: {every}, EOS too; set min_new_tokens=0"),
    )


def _check_all(*checks: tuple[bool, str]) -> None:
    """Raise ValueError with the message of the first of (condition, message) that is false."""
    for holds, message in checks:
        if not holds:
            raise ValueError(message)


def is_model_distribution(sample: SampleConfig) -> bool:
    """Whether `logprobs` are already those of the model's own distribution."""
    plain = SampleConfig(sample.max_new_tokens, 1.0, num_samples=sample.num_samples)
    return dataclasses.replace(sample, temperature=sample.temperature or 1.0) == plain


def is_eos(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(tokens, jnp.asarray(eos_ids, jnp.int32))


def seen_ids(tokens: jax.Array, mask: jax.Array, vocab: int) -> jax.Array:
    """[B, V] bool: the ids that occur in tokens [B, T] where the mask is true."""
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), vocab), bool).at[rows, jnp.where(mask, tokens, vocab)].set(True, mode="drop")


def penalise_logits(
    logits: jax.Array, sample: SampleConfig, seen: jax.Array | None, drawn: jax.Array, eos_ids: tuple[int, ...]
) -> jax.Array:
    """[B, V] -> [B, V]: repetition penalty (Keskar et al. 2019, eq. 1, negative logits multiplied), then -inf for an
    early EOS.

    Args:
        seen: [B, V] bool, ids of the prompt (without its padding) and of the answer so far; used only with a penalty.
        drawn: [B] int32, number of tokens of the answer so far.
    """
    if sample.repetition_penalty != 1:
        penalty = sample.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sample.min_new_tokens:
        is_end = is_eos(jnp.arange(logits.shape[-1]), eos_ids)
        logits = jnp.where(is_end & (drawn < sample.min_new_tokens)[:, None], -jnp.inf, logits)
    return logits


def truncate_logits(logits: jax.Array, sample: SampleConfig) -> jax.Array:
    """[B, V] -> [B, V]: divided by the temperature, then -inf outside the top k, outside the nucleus (Holtzman et al.
    2020), and below min-p times the most likely token (Nguyen et al. 2024)."""
    logits = logits / sample.temperature
    if 0 < sample.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sample.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sample.top_p < 1:
        logits = cut_nucleus(logits, sample.top_p)
    if sample.min_p:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(sample.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def cut_nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """[B, V] -> [B, V]: -inf outside the most likely tokens whose probabilities first sum to `top_p`, [B, 1] or one."""
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of all more likely tokens
    least = jnp.where(before < top_p, ranked, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def truncate_rows(logits: jax.Array, rows: RowSample) -> jax.Array:
    """`truncate_logits` by each row's temperature and top_p, where greedy rows are left as they are.

    The vocabulary is sorted only where some row needs it.
    """
    divided = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    is_cut = ((rows.top_p < 1) & (rows.temperature > 0))[:, None]

    def cut(logits: jax.Array) -> jax.Array:
        return jnp.where(is_cut, cut_nucleus(logits, rows.top_p[:, None]), logits)

    return jax.lax.cond(is_cut.any(), cut, lambda logits: logits, divided)


def logprob_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """[B] float32 log-probabilities of tokens [B] by logits [B, V]."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def most_likely(logits: jax.Array) -> jax.Array:
    """[..., V] -> [...] int32: the first of the largest, 0 where some are NaN.

    Two reductions, which XLA makes vector instructions of on CPUs; of `argmax`, with two results, it does not.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    size = logits.shape[-1]
    return jnp.where(logits == logits.max(axis=-1, keepdims=True), ids, size).min(axis=-1) % size


def draw(logits: jax.Array, keys: jax.Array, sample: SampleConfig | RowSample) -> tuple[jax.Array, jax.Array]:
    """Next tokens [B] int32 and their log-probabilities [B] float32 from [B, V] float32 logits and [B] keys."""

    def sample_all(logits: jax.Array) -> jax.Array:
        # What `jax.random.categorical` draws with these keys.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
        return most_likely(logits + noise)

    if isinstance(sample, RowSample):
        logits, is_greedy = truncate_rows(logits, sample), sample.temperature == 0
        tokens = jax.lax.cond(
            is_greedy.all(), most_likely, lambda x: jnp.where(is_greedy, most_likely(x), sample_all(x)), logits
        )
    elif sample.temperature == 0:
        tokens = most_likely(logits)
    else:
        logits = truncate_logits(logits, sample)
        tokens = sample_all(logits)
    return tokens, logprob_of(logits, tokens)
