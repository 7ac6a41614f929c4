"""Iterations of the GRPOLearner of tunix 0.1.7, with its own sampler, on Qwen3.

    python -m benchmarks.peers.tunix_grpo [--size qwen3] [--dtype bfloat16]

An iteration is the time between two calls of the reward.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tunix.models.qwen3 import model as qwen
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks import ceilings, timing
from benchmarks.peers import words


class Words:
    """The tokenizer as tunix calls it."""

    def __init__(self, vocab: int):
        self.tokenizer = words.make_tokenizer(vocab)

    def encode(self, text: str, **_) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids, **_) -> str:
        return self.tokenizer.decode(ids)

    def bos_id(self) -> int:
        return 0  # none is added

    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id


def make_config(sizes: timing.Sizes, dtype: jnp.dtype) -> qwen.ModelConfig:
    return qwen.ModelConfig(
        num_layers=sizes.layers,
        vocab_size=sizes.vocab,
        embed_dim=sizes.hidden,
        hidden_dim=sizes.mlp,
        num_heads=sizes.heads,
        head_dim=sizes.hidden // sizes.heads,
        num_kv_heads=sizes.kv_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
        dtype=dtype,
        param_dtype=jnp.float32,
    )


def main(argv: list[str] | None = None) -> dict:
    args = timing.make_parser(__doc__, "qwen3").parse_args(argv)
    sizes, times = timing.sizes_of(args), []
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    count = args.warm_up + args.iterations

    def reward(prompts, completions, **_) -> list[float]:
        times.append(time.perf_counter())
        assert [len(text.split()) for text in completions] == [sizes.answer] * sizes.rows
        return words.share_of_distinct(completions)

    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    settings = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(1e-6, 0.9, 0.95, weight_decay=0.0),
            eval_every_n_steps=10**6,
            max_steps=count + 1,  # the start of the last ends the last that is timed
            mini_batch_size=sizes.prompts,
            train_micro_batch_size=sizes.prompts,
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=sizes.answer,
            max_prompt_length=sizes.prompt,
            kv_cache_size=sizes.length,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            eos_tokens=[-1],  # that no token is: answers have full length
        ),
    )
    with mesh:
        config = make_config(sizes, jnp.dtype(args.dtype))
        actor, reference = (qwen.Qwen3(config, rngs=nnx.Rngs(0)) for _ in range(2))
        cluster = rl_cluster.RLCluster(
            actor=actor, reference=reference, tokenizer=Words(sizes.vocab), cluster_config=settings
        )
        algorithm = GRPOConfig(num_generations=sizes.samples, num_iterations=1, beta=0.04)
        prompts = {"prompts": np.array(words.make_prompts(sizes))}
        GRPOLearner(cluster, algorithm, reward_fns=[reward]).train([prompts] * (count + 1))
    iterations = timing.between(times)
    assert len(iterations) == count, (len(iterations), count)
    return timing.report("grpo_iteration", "tunix", args, iterations, ceilings.by_jax)


if __name__ == "__main__":
    main()
