"""The compiled programs of an `Engine`: gradients summed over calls, an optimizer step, log-probabilities.

B rows of T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.hardware import RUN_OPTIONS
from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import Compute, DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.objectives.masked import zero_outside
from rlhf_jax.policy import next_token_logprobs
from rlhf_jax.train_step import (
    Params,
    Sums,
    TrainState,
    join_micro_batches,
    split_micro_batches,
    sum_gradients,
    take_step,
)

LOGGER = logging.getLogger(__name__)
Arrays = dict[str, jax.Array]
# (logprobs [B, T], batch) -> (loss, {name: number})
Loss = Callable[[jax.Array, Arrays], tuple[jax.Array, Arrays]]
Over = Literal["tokens", "rows", "sum"]
MANY_LOSSES = 4  # functions of the same code, from which on a program for each is probably not meant


class LibraryPrograms(NamedTuple):
    """The jitted functions of an engine.

    Attributes:
        accumulate: (train, frozen, sums or None, batch, temperature, loss, over, num_micro) -> (sums, metrics); donates
            the sums. The last three are static.
        step: (train, sums) -> (train, metrics); donates the first.
        score: (params, batch, temperature, config, num_micro) -> [B, T] float32; the last two are static.
    """

    accumulate: Any
    step: Any
    score: Any


def make_library_programs(
    config: DecoderConfig, tx: optax.GradientTransformation, compute: Compute, layout: Layout
) -> LibraryPrograms:
    """The programs for this architecture and layout, compiled when they are called."""
    place, compiled = (abstract_params(config), layout), defaultdict(set)

    def accumulate(
        train: TrainState, frozen: Params, before: Sums | None, batch: Arrays, temperature, loss, over, num_micro
    ):
        report_compilation(loss, batch, compiled)

        def loss_fn(params: Params, micro: Arrays):
            logprobs, balance = row_logprobs(config, params, micro, compute, layout, temperature)
            value, metrics = check_result(loss, loss(logprobs, micro))
            rows = jnp.int32(len(micro["tokens"]))
            weight = {"tokens": micro["loss_mask"].sum(), "rows": rows, "sum": jnp.int32(1)}[over]
            return value + (balance / num_micro if over == "sum" else balance), (weight, metrics)

        sums = sum_gradients(loss_fn, train, frozen, batch, *place, num_micro)
        means = jax.tree.map(lambda leaf: leaf / jnp.maximum(sums.weight if over != "sum" else 1, 1), sums.stats)
        sums = dataclasses.replace(sums, stats={"loss": sums.stats["loss"]})
        total = sums if before is None else jax.tree.map(jnp.add, before, sums)
        return (dataclasses.replace(total, weight=jnp.int32(1)) if over == "sum" else total), means

    def step(train: TrainState, sums: Sums):
        return take_step(tx, compute.scaling, train, sums, *place)

    def score(
        params: Params, batch: Arrays, temperature: jax.Array, config: DecoderConfig, num_micro: int
    ) -> jax.Array:
        whole = dataclasses.replace(compute, remat="none")

        def part(micro: Arrays) -> jax.Array:
            return row_logprobs(config, params, micro, whole, layout, temperature)[0]

        return join_micro_batches(jax.lax.map(part, split_micro_batches(batch, num_micro, layout)), layout)

    jit = functools.partial(jax.jit, compiler_options=RUN_OPTIONS)
    return LibraryPrograms(
        jit(accumulate, static_argnames=("loss", "over", "num_micro"), donate_argnums=2),
        jit(step, donate_argnums=0),
        jit(score, static_argnames=("config", "num_micro")),
    )


def row_logprobs(
    config: DecoderConfig, params: Params, batch: Arrays, compute: Compute, layout: Layout, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of every token of right-padded rows, [B, T], 0 at the first of each row and on padding; and
    the balance loss."""
    tokens, mask = batch["tokens"], batch["mask"]
    logprobs, balance = next_token_logprobs(config, params, tokens, mask, compute, layout, temperature=temperature)
    return zero_outside(jnp.pad(logprobs, ((0, 0), (1, 0))), mask), balance


def check_result(loss: Loss, result: Any) -> tuple[jax.Array, Arrays]:
    """What a loss function has returned, in float32; ValueError unless it is a number and numbers by name."""
    name = f"the loss function {describe_function(loss)}"
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise ValueError(
            f"{name} returned {type(result).__name__}: return (loss, {{name: number}}), at least (loss, {{}})"
        )
    value, metrics = result
    for key, each in {"its loss": value, **metrics}.items():
        if jnp.shape(each):
            raise ValueError(f"{name} returned {key} of shape {list(jnp.shape(each))}: reduce it to one number")
    if "loss" in metrics:
        raise ValueError(f'{name} returned a metric called "loss", which is that of the loss itself: rename it')
    return jnp.float32(value), {key: jnp.float32(each) for key, each in metrics.items()}


def report_compilation(loss: Loss, batch: Arrays, compiled: dict[Any, set[int]]) -> None:
    """Log that a program is compiled, which this is called for, and warn where every call has a function of its own."""
    inner = loss.func if isinstance(loss, functools.partial) else loss
    seen = compiled[getattr(inner, "__code__", inner)]
    seen.add(id(loss))  # compiled programs keep their functions, so ids do not repeat
    rows, length = batch["tokens"].shape
    LOGGER.info(f"forward_backward: compiling {describe_function(loss)} for {rows} rows of {length} tokens")
    if len(seen) >= MANY_LOSSES:
        LOGGER.warning(
            f"forward_backward was compiled for {len(seen)} function objects of {describe_function(loss)}: make the "
            "function once, outside of the loop, and give numbers that change in the batch"
        )


def describe_function(loss: Loss) -> str:
    """Name, file and line of a function."""
    inner = loss.func if isinstance(loss, functools.partial) else loss
    code = getattr(inner, "__code__", None)
    name = getattr(inner, "__qualname__", type(inner).__name__)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name
