"""Weights published for generation, and answers sampled from them on a mesh, with the host's side of both.

B prompts, P prompt positions, N answer tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from rlhf_jax.collectives import received_bytes
from rlhf_jax.decode import Decoding, Rollout, bucket_length, generate
from rlhf_jax.hardware import RUN_OPTIONS
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, Table, check_divides, check_model_divides
from rlhf_jax.models.attention import Choice
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.inference import Inference, Weights, inference_weights, shared_inference_weights, shared_paths
from rlhf_jax.models.pretrained import Pretrained, check_in_vocabulary
from rlhf_jax.sampling import SampleConfig, check_sample
from rlhf_jax.slots import generate_slots
from rlhf_jax.train_step import Params

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publish:
    """Parameters and adapters -> generation weights, by GENERATE: merge, cast, gather, lay out.

    A base that generation shares with training is not merged, and where already sharded by GENERATE not copied: its
    weights are the arrays of the parameters, see `shared_inference_weights`.
    """

    config: DecoderConfig
    layout: Layout  # of generation
    program: Any  # jitted: all but what is shared

    def __call__(self, params: Params) -> Weights:
        return self.program(params) | shared_inference_weights(self.config, params, self.layout)

    def lower(self, params: Params) -> jax.stages.Lowered:
        """Of the compiled part, from arrays or their abstract shapes."""
        return self.program.lower(params)

    def compile(self, params: Params) -> Publish:
        """The same, compiled now for these parameters, so that the HLO text is available without compiling twice."""
        return dataclasses.replace(self, program=self.lower(params).compile())


@functools.lru_cache
def make_publish(config: DecoderConfig, mesh: Mesh, dtype: jnp.dtype, home: Table = TRAIN) -> Publish:
    """Compile the publishing of weights in `dtype`, of parameters that are sharded by `home`.

    Raises:
        ValueError: the tensor axis does not divide the attention heads.
    """
    check_model_divides({"attention heads": config.num_heads}, mesh)
    layout = Layout(mesh, GENERATE)

    def publish(params):
        return inference_weights(config, params, layout, dtype, home)

    return Publish(config, layout, jax.jit(publish))


def publish_bytes(publish: Publish, params: Params, dtype: jnp.dtype) -> dict[str, float]:
    """What a compiled `publish` moves, for the metrics: bytes that each device receives over links.

    publish_bytes: by the text of the compiled program. publish_bytes_least: what a device lacks of its weights, in
    `dtype`: (t - tg) / (t tg) of a weight of t shards in training and tg in generation, so nothing of those that every
    device has whole already, as norms. publish_bytes_ratio, where there is a bound: the one over the other. CPUs run
    collectives of bfloat16 in float32, which doubles it; KV heads fewer than tensor shards go to several of them, which
    the bound does not count.

    Raises:
        ValueError: the program has no text, or one that is not understood.
    """
    config, layout, kept = publish.config, publish.layout, shared_paths(params)
    total, least = received_bytes(publish.program.as_text()), 0
    moving: list[tuple[jax.Array, Sharding]] = []
    shared_inference_weights(config, params, layout, lambda array, there: moving.append((array, there)))
    moving = [(array, there) for array, there in moving if _missing_elements(array, there)]
    if moving:  # which `jax.device_put` does, by a program as this one
        arrays, there = map(list, zip(*moving, strict=True))
        total += received_bytes(jax.jit(lambda x: x, out_shardings=there).lower(arrays).compile().as_text())
        least += sum(_missing_elements(array, at) * array.dtype.itemsize for array, at in moving)
    for path, leaf in abstract_params(config if kept else config.without_lora()).items():
        if path not in kept:
            least += _missing_elements(params[path], layout.sharding(leaf.axes)) * dtype.itemsize
    reported = {"publish_bytes": total, "publish_bytes_least": least}
    return reported | ({"publish_bytes_ratio": total / least} if least else {})


def _missing_elements(array: jax.Array, there: Sharding) -> int:
    """Elements of a device's shard by `there` that its present shard, a part of it, has not."""
    shards = (math.prod(each.shard_shape(array.shape)) for each in (there, array.sharding))
    return max(0, next(shards) - next(shards))


@functools.lru_cache
def generate_program(decoding: Decoding, rows: int = 0):
    """The jitted (weights, prompts [B, P], mask [B, P], key, in_rows) -> Rollout, on arrays sharded by GENERATE.

    in_rows, static: in `rows` rows that are refilled, in place of all at once.
    """

    @functools.partial(jax.jit, static_argnames="in_rows", compiler_options=RUN_OPTIONS)
    def program(weights, prompts, prompt_mask, key, in_rows=False):
        if in_rows:
            return generate_slots(decoding, weights, prompts, prompt_mask, key, rows)
        return generate(decoding, weights, prompts, prompt_mask, key)

    return program


@functools.lru_cache
def make_generate(decoding: Decoding, rows: int = 0) -> Callable[[Weights, np.ndarray, np.ndarray, jax.Array], Rollout]:
    """(weights, prompts [B, P], mask [B, P], key) -> Rollout, for left-padded prompts on the host.

    Padding that all rows share is cut down to a bucket, so that few lengths are compiled: for one number of prompts no
    more programs than there are buckets, powers of two, up to the model's positions (every one is logged). Prompts are
    padded to what the mesh divides, and dropped again. Each is answered `sample.num_samples` times.

    Args:
        rows: answers that are decoded at a time, a row that ends taking the next prompt; 0, or as many as there are
            answers to draw: all at once.
    Raises:
        ValueError: the devices do not divide the rows, a prompt is empty, or prompt and answer do not fit the model's
            positions.
    """
    sample, config, layout = decoding.sample, decoding.model.config, decoding.model.layout
    check_sample(sample)
    check_slots(rows, layout)
    program = generate_program(decoding, rows)
    compiled: set[tuple[int, int]] = set()

    def run(weights, prompts, prompt_mask, key):
        sizes = prompt_mask.sum(axis=1)
        if sizes.min() == 0:
            raise ValueError(f"row {int(sizes.argmin())} of the prompts is empty: give it at least one token")
        check_positions(config, int(sizes.max()), sample.max_new_tokens)
        cut = tuple(x[:, -bucket_length(int(sizes.max())) :] for x in (prompts, prompt_mask))
        each = tuple(np.repeat(x, sample.num_samples, axis=0) for x in cut)
        count = len(each[0])
        more = -count % layout.shards("batch")
        filled = tuple(np.pad(x, ((0, more), (0, 0)), mode="edge") for x in each)
        in_rows = 0 < rows < count + more
        if (shape := filled[0].shape) not in compiled:
            compiled.add(shape)
            answers = f"{shape[0]} answers" + (f" in {rows} rows" if in_rows else "")
            lengths = len({bucket_length(n) for n in range(1, config.max_positions + 1)})
            LOGGER.info(
                f"generate: compiling program {len(compiled)}, for {answers} to prompts of {shape[1]} tokens; the "
                f"model's positions allow {lengths} lengths"
            )
        # Whichever device has a free row takes the next prompt, so then every device has all of them.
        there = tuple(layout.put(x, None, None) for x in filled) if in_rows else layout.put_batch(filled)
        rollout = program(weights, *there, key, in_rows=in_rows)
        return rollout if not more else jax.tree.map(lambda leaf: leaf[:count], rollout)

    return run


def check_slots(rows: int, layout: Layout, name: str = "rows") -> None:
    """Raise ValueError unless the devices that share the batch in generation divide `rows`; 0 is all at once."""
    if rows:
        check_divides(name, rows, Layout(layout.mesh, GENERATE).shards("batch"), "devices of mesh.data x mesh.fsdp")


def sample_answers(
    model: Pretrained,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    sample: SampleConfig,
    key: jax.Array,
    *,
    rows: int = 0,
    attention: Choice = "auto",
) -> Rollout:
    """Answer prompts by a language model, in the dtype of its parameters.

    Args:
        input_ids, attention_mask: [B, P] int and int or bool; padding may be on either side.
        key: from jax.random.key; the same key gives the same answers on any number of devices and rows.
        rows: answers decoded at a time, a row that ends taking the next prompt; 0: all at once.
        attention: the kernel of the prefill, see `kernel_for_mesh`.
    Returns:
        Rollout with .tokens [B, N] int32, .mask [B, N] bool, true up to and including EOS, .logprobs [B, N] float32;
        B x num_samples rows, the samples of a prompt one after the other.
    Raises:
        ValueError: a scalar head, an empty prompt, no EOS known, more positions than the model has, an id that it does
            not have, or "cudnn" where that is impossible.
    """
    if model.config.scalar_head:
        raise ValueError("this model has a scalar head and cannot generate: load it with from_pretrained")
    tokens, mask = np.asarray(input_ids, np.int32), np.asarray(attention_mask, bool)
    check_in_vocabulary(model.config, tokens, mask)
    order = np.argsort(mask, axis=1, kind="stable")  # padding to the left, real tokens in their order
    more = ((0, 0), (bucket_length(mask.shape[1]) - mask.shape[1], 0))
    tokens, mask = (np.pad(np.take_along_axis(x, order, axis=1), more) for x in (tokens, mask))
    dtype = model.params["embed/tokens"].dtype
    publish = make_publish(model.config, model.layout.mesh, dtype)
    decoding = Decoding(Inference(model.config, publish.layout, dtype, attention), sample, eos_ids(model))
    return make_generate(decoding, rows)(publish(model.params), tokens, mask, key)


def eos_ids(model: Pretrained) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's EOS, and what generation_config.json and config.json list.

    Raises:
        ValueError: none of them names one.
    """
    ids = set() if model.tokenizer is None else {model.tokenizer.eos_token_id}
    for source in (model.generation_config, model.hf_config):
        named = source.get("eos_token_id")
        ids |= set(named) if isinstance(named, list) else {named}
    if not ids - {None}:
        raise ValueError("the model names no EOS token, so no answer could end: set eos_token_id in its config.json")
    return tuple(sorted(ids - {None}))


def check_positions(config: DecoderConfig, prompt: int, answer: int) -> None:
    """Raise ValueError unless `prompt` and `answer` tokens fit the model's positions."""
    if prompt + answer > config.max_positions:
        raise ValueError(
            f"a prompt of {prompt} tokens and {answer} new ones need {prompt + answer} positions, and the model has "
            f"{config.max_positions}: shorten the prompt to {max(0, config.max_positions - answer)} tokens or set "
            f"max_new_tokens to at most {max(0, config.max_positions - prompt)}"
        )
