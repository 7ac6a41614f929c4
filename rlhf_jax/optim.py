"""The optimizer: global-norm clipping, then AdamW, and the learning-rate schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

Schedule = Literal["cosine", "linear", "constant"]
# Progress p after the warmup, 0 to 1 -> fall f from 1.
FALLS: dict[Schedule, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": jnp.ones_like,
}


@dataclass(frozen=True)
class OptimConfig:
    """Settings of one optimizer. Raises ValueError for a value outside its range."""

    learning_rate: float  # peak, reached at the end of the warmup
    schedule: Schedule = "cosine"  # how the learning rate falls after the warmup
    warmup_steps: int = 0  # optimizer steps of linear rise; the first step already has a positive rate
    weight_decay: float = 0.0  # decoupled from the gradient (AdamW); never on biases and norm scales
    beta1: float = 0.9  # decay of the mean of the gradient
    beta2: float = 0.95  # decay of the mean of the squared gradient
    eps: float = 1e-8  # added to the square root of that mean
    clip_norm: float = 1.0  # largest global norm of a gradient; 0 = do not clip
    final_lr_share: float = 0.0  # learning rate at the end of the schedule, as a share of the peak

    def __post_init__(self) -> None:
        legal = {
            "learning_rate": (self.learning_rate > 0, "a positive number"),
            "schedule": (self.schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "beta1": (0 <= self.beta1 < 1, "at least 0 and below 1"),
            "beta2": (0 <= self.beta2 < 1, "at least 0 and below 1"),
            "eps": (self.eps > 0, "a positive number"),
            "clip_norm": (self.clip_norm >= 0, "0 (no clip) or more"),
            "final_lr_share": (0 <= self.final_lr_share <= 1, "between 0 and 1"),
        }
        wrong = [f"{name} is {getattr(self, name)!r}, give {wanted}" for name, (ok, wanted) in legal.items() if not ok]
        if wrong:
            raise ValueError("; ".join(wrong))


def learning_rate(config: OptimConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """The schedule: step -> float32 rate of that optimizer step, counted from 0; `step` is an int or an int32 array.

    Warmup of W steps: rate = peak (step + 1) / W. Then, with p = (step - W) / (total_steps - W) up to 1 and the share
    s left at the end: peak (s + (1 - s) f(p)), f = (1 + cos(pi p)) / 2 for "cosine" (Loshchilov and Hutter 2017,
    arXiv 1608.03983, eq. 5), 1 - p for "linear", 1 for "constant".
    Raises ValueError if the warmup is longer than the run.
    """
    warmup = config.warmup_steps
    if total_steps < 1:
        raise ValueError(f"the run has {total_steps} optimizer steps: give it at least one")
    if warmup > total_steps:
        raise ValueError(
            f"warmup_steps is {warmup}, longer than the run of {total_steps} steps: lower it, or train longer"
        )

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        share = config.final_lr_share + (1.0 - config.final_lr_share) * FALLS[config.schedule](progress)
        return config.learning_rate * jnp.minimum((step + 1.0) / max(warmup, 1), share)

    return rate


def decay_mask(params: Any) -> Any:
    """The tree of `params` with False for every path that ends in bias or scale, True elsewhere."""

    def is_decayed(path: tuple[Any, ...], _: Any) -> bool:
        return jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 1)[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(is_decayed, params)


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation`, by its first two fields, that can also run parameter by parameter.

    Attributes:
        init, update: those of optax, for all parameters together.
        clip: all gradients -> clipped gradients; the stateless part that needs all of them at once.
        update_each: like `update`, for clipped gradients and the state of a part of the parameters (`select_path`).
    """

    init: Callable
    update: Callable
    clip: Callable[[Any], Any]
    update_each: Callable


def make_optimizer(config: OptimConfig, total_steps: int) -> Optimizer:
    """Global-norm clip, then AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) at `learning_rate`.

    Weight decay applies where `decay_mask` is True. Raises ValueError if the warmup is longer than the run.
    """
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    adamw = optax.adamw(learning_rate(config, total_steps), *betas, config.eps, weight_decay=decay, mask=decay_mask)
    if not config.clip_norm:
        return Optimizer(adamw.init, adamw.update, lambda grads: grads, adamw.update)
    clip = optax.stateless(functools.partial(_clip, config.clip_norm))
    whole, each = optax.chain(clip, adamw), optax.chain(optax.identity(), adamw)  # with equal states
    return Optimizer(whole.init, whole.update, lambda grads: clip.update(grads, clip.init(grads))[0], each.update)


def _clip(largest: float, grads: Any, params: Any = None) -> Any:
    """A tree of gradients scaled to at most this global norm, in their dtypes.

    By one factor, which XLA fuses into what reads them: `optax.clip_by_global_norm` divides every number in a pass.
    """
    share = largest / jnp.maximum(optax.tree.norm(grads), largest)
    return jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), grads)


def map_nodes(function: Callable, opt_state: Any, *more: Any) -> Any:
    """Map over the nodes of an optax state: each dictionary by path (moments) is one node, each counter another."""
    return jax.tree.map(function, opt_state, *more, is_leaf=_is_moments)


def select_path(opt_state: Any, path: str) -> tuple[Any, Any]:
    """(moments of one parameter, counters, which all parameters share), as trees that `with_counters` joins."""
    moments = map_nodes(lambda node: {path: node[path]} if _is_moments(node) else None, opt_state)
    return moments, map_nodes(lambda node: None if _is_moments(node) else node, opt_state)


def with_counters(moments: Any, counters: Any) -> Any:
    """The inverse of `select_path`: the optax state of the parameters in `moments`."""

    def is_node(node: Any) -> bool:
        return node is None or _is_moments(node)

    return jax.tree.map(lambda node, counter: counter if node is None else node, moments, counters, is_leaf=is_node)


def join_states(opt_state: Any, other: Any) -> Any:
    """The state of the parameters of both; counters are those of the second."""
    return map_nodes(lambda one, two: {**one, **two} if _is_moments(one) else two, opt_state, other)


def _is_moments(node: Any) -> bool:
    return isinstance(node, dict)
