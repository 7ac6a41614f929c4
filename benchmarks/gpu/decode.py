"""Decoding: tokens per second, and the share of the measured memory bandwidth, by weight layout and batch size.

python -m benchmarks.gpu.decode OUT [--small]

OPT-1.3B with random bfloat16 weights, 256 prompt tokens and 256 new ones. Bytes that a decode step must read:
the weights except the embedding, of which it looks up one row per answer, and the keys and values that its query
attends to, on average those of the prompt and half the answer.

The scale of the final norm is 0, so that the logits depend only on the head: one head never ends an answer, another
ends all at their first token, which times the prefill with the same compiled program.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import ceilings
from benchmarks.gpu.models import arguments, keep
from benchmarks.timing import SIZES
from rlhf_jax.decode import Decoding, generate
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, single_device_mesh
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import init_params
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.inference import Inference, Weights
from rlhf_jax.rollout import generate_program, make_publish
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.train_step import Params

DTYPE, TRIALS, END = jnp.dtype("bfloat16"), 3, 7
BATCHES = (64, 1, 16)  # the most informative first
# (config, mesh, parameters, sample) -> (program(weights, prompts, mask, key) -> Rollout, its weights)
Variant = Callable[[DecoderConfig, Mesh, Params, SampleConfig], tuple[Any, Any]]


def decoding_of(config: DecoderConfig, mesh: Mesh, sample: SampleConfig) -> Decoding:
    return Decoding(Inference(config, Layout(mesh, GENERATE), DTYPE), sample, (END,))


def published_program(config: DecoderConfig, mesh: Mesh, params: Params, sample: SampleConfig) -> tuple[Any, Weights]:
    """The program of the engine: every layer has separate arrays."""
    return generate_program(decoding_of(config, mesh, sample)), make_publish(config, mesh, DTYPE)(params)


def stacked_program(config: DecoderConfig, mesh: Mesh, params: Params, sample: SampleConfig) -> tuple[Any, Weights]:
    """The same weights stacked over layers as in training, with each layer sliced where it is used."""
    decoding = decoding_of(config, mesh, sample)
    weights = make_publish(config, mesh, DTYPE)(params)
    names = [path.removeprefix("layers/0/") for path in weights if path.startswith("layers/0/")]
    whole = {path: leaf for path, leaf in weights.items() if not path.startswith("layers/")}
    for name in names:
        layers = [weights.pop(f"layers/{i}/{name}") for i in range(config.num_layers)]
        whole[f"layers/{name}"] = jnp.stack(layers)

    def program(weights, prompts, mask, key):
        return generate(decoding, Sliced(weights), prompts, mask, key)

    return jax.jit(program), whole


VARIANTS: dict[str, Variant] = {"a layer's arrays by themselves": published_program, "stacked": stacked_program}


class Sliced(Mapping):
    """Stacked weights under the names of single layers."""

    def __init__(self, weights: Weights):
        self.weights = weights

    def __getitem__(self, path: str) -> jax.Array:
        if not path.startswith("layers/"):
            return self.weights[path]
        _, layer, name = path.split("/", 2)
        return self.weights[f"layers/{name}"][int(layer)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def main(out: str, small: bool) -> None:
    config = decoder_config(SIZES["toy" if small else "opt-1.3b"].hf_config, scalar_head=False)
    prompt, new = (32, 16) if small else (256, 256)
    mesh, sample = single_device_mesh(), SampleConfig(new)
    measured = ceilings.bandwidth(ceilings.add_by_jax, 2**22 if small else 2**29)
    result = {"bandwidth": measured, "prompt": prompt, "new": new, "runs": []}
    keep(out, result)
    drawn = init_params(config, jax.random.key(0), Layout(mesh, TRAIN))
    params = {path: drawn.pop(path).astype(DTYPE) for path in list(drawn)}
    params["final_norm/scale"] *= 0
    params["final_norm/bias"] = jnp.ones_like(params["final_norm/bias"])
    prompts = np.random.default_rng(0).integers(END + 1, config.vocab_size, (max(BATCHES), prompt)).astype(np.int32)
    built = {name: variant(config, mesh, params, sample) for name, variant in VARIANTS.items()}
    cases = [(batch, name) for batch in BATCHES for name in built]  # if time runs out, the last ones are missing

    def compile_case(case: tuple[int, str]):
        program, weights = built[case[1]]
        return program.lower(weights, *given(case[0])).compile()

    def given(batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.asarray(prompts[:batch]), jnp.ones((batch, prompt), bool), jax.random.key(0)

    with ThreadPoolExecutor(len(cases)) as pool:  # compiling takes most of the time, and nothing is timed yet
        programs = list(pool.map(compile_case, cases))
    for (batch, name), program in zip(cases, programs, strict=True):
        weights, run = built[name][1], {"variant": name, "batch": batch}
        for kind, sign, steps in (("never ends", -1.0, new - 1), ("ends at once", 1.0, 0)):
            head = {"head/kernel": weights["head/kernel"].at[:, END].set(sign)}
            run[kind], made = fastest(program, weights | head, *given(batch))
            assert made == steps, (kind, made)
        step = (run["never ends"] - run["ends at once"]) / (new - 1)
        cache = 2 * config.num_layers * batch * config.num_kv_heads * config.head_dim * DTYPE.itemsize
        read = sum(leaf.nbytes for path, leaf in weights.items() if path != "embed/tokens")
        run |= {"tokens_per_second": batch / step, "bytes_per_step": int(read + cache * (prompt + new / 2))}
        run["share_of_bandwidth"] = run["bytes_per_step"] / step / result["bandwidth"]
        result["runs"].append(run)
        keep(out, result)


def fastest(program, *args) -> tuple[float, int]:
    """(seconds of the best trial after a warm-up, decode steps)."""
    steps, seconds = int(jax.block_until_ready(program(*args)).steps.max()), []
    for _ in range(TRIALS):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - start)
    return min(seconds), steps


if __name__ == "__main__":
    out, small, _ = arguments()
    main(out, small)
