"""A language model in training: its state, and the log-probabilities that it gives to tokens.

B rows of T tokens; N answer tokens; E the hidden size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.data.batches import Batch
from rlhf_jax.loss_scale import LossScaleConfig
from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import Compute, DecoderConfig
from rlhf_jax.models.decoder import abstract_params, bind, head_kernel, head_options, init_params
from rlhf_jax.models.lora import is_adapter, is_trainable
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.objectives.logprobs import token_logprobs
from rlhf_jax.objectives.sft import nll
from rlhf_jax.train_step import Params, TrainState, init_state
from rlhf_jax.trees import partition


def make_train_state(
    model: Pretrained,
    config: DecoderConfig,
    tx: optax.GradientTransformation,
    scaling: LossScaleConfig | None,
    seed: int,
) -> tuple[TrainState, Params]:
    """The training state of a loaded model, and its frozen parameters. New adapters do not change the model.

    Args:
        config: the architecture of the model, with the adapters that train.
        seed: of adapters that the model does not have.
    Raises:
        ValueError: no linear of the model is a target of the adapters.
    """
    layout, lora, leaves = model.layout, config.lora, abstract_params(config)
    if lora.rank and not any(map(is_adapter, leaves)):
        raise ValueError(f"none of the adapters' targets {', '.join(lora.targets)} is a linear of this model")
    key = jax.random.key(seed)
    new = init_params(config, key, layout, only=lambda path: is_adapter(path) and path not in model.params)
    trainable, frozen = partition({**model.params, **new}, lambda path: is_trainable(path, lora))
    trainable = {path: leaf.astype(jnp.float32) for path, leaf in trainable.items()}
    return init_state(trainable, tx, leaves, layout, scaling), frozen


def next_token_logprobs(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    compute: Compute,
    layout: Layout,
    segments: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each token after the first, given those before it, [B, T - 1] float32, and the balance
    loss; arbitrary but finite on padding. `mask` [B, T] is true on real tokens."""
    hidden, balance = bind(config, params)(tokens, mask, compute, layout, segments)
    options = dict(chunk=compute.chunk, temperature=temperature, **head_options(config, params))
    return token_logprobs(hidden[:, :-1], head_kernel(config, params), tokens[:, 1:], **options), balance


def next_token_losses(
    config: DecoderConfig, params: Params, batch: Batch, compute: Compute, layout: Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean loss of the tokens in `loss_mask`, the balance loss, and the number of those tokens."""
    given = batch.tokens, batch.mask, compute, layout, batch.segments
    logprobs, balance = next_token_logprobs(config, params, *given)
    learned = batch.loss_mask[:, 1:]
    return nll(logprobs, learned), balance, learned.sum()


def answer_hidden(hidden: jax.Array, starts: jax.Array, num_actions: int) -> jax.Array:
    """The states from which each answer token was predicted: [B, T, E] -> [B, N, E]."""
    index = (starts - 1)[:, None] + jnp.arange(num_actions)
    return jnp.take_along_axis(hidden, index[..., None], axis=1)
