"""Rollouts of many prompts with slot refill and in batches that wait for their longest answer: steps and seconds.

    python -m benchmarks.slot_refill [PROMPTS] [ROWS]

A decoder of 4 layers, 128 wide, whose head is 0, so that all 64 tokens are equally likely and one is EOS: answer
lengths are geometric with mean 64, cut at 256, as in `tests/test_slots.py`. Prompts have 32 tokens. The first call of
each method compiles and is not timed; the faster of two further calls is reported.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.provenance import record
from rlhf_jax.decode import Decoding
from rlhf_jax.mesh import single_device_mesh
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.inference import Inference
from rlhf_jax.rollout import make_generate, make_publish
from rlhf_jax.sampling import SampleConfig

HIDDEN, LAYERS, HEADS, VOCAB, PROMPT, TRIALS = 128, 4, 4, 64, 32, 2
EOS = (7,)
CONFIG = decoder_config(
    {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
    },
    scalar_head=False,
)


def main(prompts: int = 256, rows: int = 16) -> None:
    if prompts % rows:
        raise SystemExit(f"{prompts} prompts are no whole batches of {rows}: give a multiple")
    mesh, rng, dtype = single_device_mesh(), np.random.default_rng(0), jnp.dtype("float32")
    scale = {"head/kernel": 0.0}
    params = {
        path: jnp.asarray(rng.normal(0, scale.get(path, 0.05), leaf.shape), dtype)
        for path, leaf in abstract_params(CONFIG).items()
    }
    publish = make_publish(CONFIG, mesh, dtype)
    weights = publish(params)
    asked = rng.integers(0, VOCAB, (prompts, PROMPT)).astype(np.int32), np.ones((prompts, PROMPT), bool)
    sample, key = SampleConfig(256), jax.random.key(0)
    decoding = Decoding(Inference(CONFIG, publish.layout, dtype), sample, EOS)
    at_once, refill = (make_generate(decoding, n) for n in (0, rows))

    def batches():
        parts = (tuple(x[i : i + rows] for x in asked) for i in range(0, prompts, rows))
        return [at_once(weights, *part, jax.random.fold_in(key, i)) for i, part in enumerate(parts)]

    ways = {
        "batches": batches,
        "refilled": lambda: [refill(weights, *asked, key)],
    }
    for name, way in ways.items():
        rollouts = jax.block_until_ready(way())
        seconds = []
        for _ in range(TRIALS):
            start = time.perf_counter()
            jax.block_until_ready(way())
            seconds.append(time.perf_counter() - start)
        steps = sum(int(rollout.steps.max()) for rollout in rollouts)
        tokens = sum(int(rollout.mask.sum()) for rollout in rollouts)
        numbers = {"steps": steps, "seconds": min(seconds), "tokens_per_second": tokens / min(seconds)}
        record("slot_refill", {"way": name, "prompts": prompts, "rows": rows, **numbers}, "way", "prompts", "rows")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
