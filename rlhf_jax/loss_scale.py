"""Dynamic loss scaling, for gradients in float16 (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).

The loss is multiplied by a power of two before the backward pass and the summed gradients are divided by it in
float32, so small gradients do not become 0 in float16 and no value changes otherwise. Gradients that are not finite are
dropped with their whole step, and the scale is halved; after a number of steps without one it is doubled. The sequence
of scales is that of torch.amp.GradScaler, within bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rlhf_jax.trees import record


@dataclass(frozen=True)
class LossScaleConfig:
    """Loss scaling of a float16 model. Raises ValueError for a value outside its range."""

    initial: float = 65536.0  # first scale, a power of two
    growth_steps: int = 2000  # optimizer steps without overflow after which the scale is doubled
    smallest: float = 1.0  # scale that is never halved: overflow there counts for run.max_skipped
    largest: float = 16777216.0  # scale that is never doubled

    def __post_init__(self) -> None:
        scales = self.smallest, self.initial, self.largest
        if any(scale <= 0 or math.frexp(scale)[0] != 0.5 for scale in scales) or list(scales) != sorted(scales):
            raise ValueError(
                f"loss_scale: smallest, initial and largest are {', '.join(f'{scale:g}' for scale in scales)}: "
                "set powers of two in ascending order"
            )
        if self.growth_steps < 1:
            raise ValueError(f"loss_scale.growth_steps={self.growth_steps}: 1 or more")


@record
class LossScale:
    """The part of a training state that loss scaling changes.

    Attributes:
        value: [] float32, of the next step.
        clean: [] int32, steps without overflow since the scale last changed.
    """

    value: jax.Array
    clean: jax.Array


def first_scale(config: LossScaleConfig) -> LossScale:
    """The loss scale of step 0."""
    return LossScale(jnp.float32(config.initial), jnp.int32(0))


def next_scale(config: LossScaleConfig, scale: LossScale, is_finite: jax.Array) -> LossScale:
    """The loss scale after a step whose gradients are finite, [] bool, or not."""
    clean = scale.clean + 1
    grows = is_finite & (clean >= config.growth_steps)
    larger = jnp.minimum(2 * scale.value, config.largest)
    smaller = jnp.maximum(scale.value / 2, config.smallest)
    value = jnp.where(is_finite, jnp.where(grows, larger, scale.value), smaller)
    return LossScale(value, jnp.where(is_finite & ~grows, clean, 0))
