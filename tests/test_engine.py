import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.collectives import collectives
from rlhf_jax.engine import (
    Algorithm,
    Architectures,
    EngineState,
    Execution,
    FrozenParams,
    Optimizers,
    Sampling,
    make_hybrid_engine,
)
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, single_device_mesh, to_devices, to_host, train_layout
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params, bind, head_kernel
from rlhf_jax.models.lora import NO_LORA, is_adapter, is_trainable, merge_adapters
from rlhf_jax.models.quantised import Quantised, block_axis, is_quantisable, quantise, quantised_shardings
from rlhf_jax.objectives import masked, ppo
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.rollout import make_publish, publish_bytes
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.ppo import ppo_algorithm
from rlhf_jax.stages.ppo_config import PPOConfig
from rlhf_jax.stages.ppo_losses import actor_loss
from rlhf_jax.train_step import init_state, start_ema
from rlhf_jax.trees import partition

EIGHT = [name for name in tiny.MESHES if name != "one"]
FLOAT32 = jnp.dtype("float32")
# name: family, adapters, temperature, micro-batches of one update
CASES = {"llama": ("llama", NO_LORA, 0.7, 1), "opt-lora": ("opt", tiny.LORA, 1.0, 2)}
ON_EIGHT = [("llama", "fsdp4-tensor2"), ("llama", "data2-fsdp2-tensor2"), ("opt-lora", "fsdp4-tensor2")]
EVERYWHERE = [("llama", "one"), ("opt-lora", "one"), *ON_EIGHT]
LENGTHS = [8, 1, 5, 3, 8, 2, 7, 4, 6, 6, 1, 8, 3, 5, 2, 7]
ROWS, WIDTH, NEW = 16, 8, 6
EOS = (3, 15, 24, 39, 42, 53)
# With Adam's usual eps of 1e-8 a gradient that is zero except for rounding becomes a full step; see test_train_step.
OPTIM = OptimConfig(learning_rate=0.02, schedule="constant", eps=1e-3)


def copy_to_host(tree):
    """Copies the leaves: on a CPU, a NumPy view would share the buffer, which could then not be donated."""
    return jax.device_get(jax.tree.map(jnp.copy, tree))


def state_of(config, lora, layout, tx, seed, scaling=None):
    params = tiny.random_params(tiny.with_lora(config, lora), layout.mesh, seed)
    trainable, frozen = partition(params, lambda path: is_trainable(path, lora))
    return init_state(trainable, tx, abstract_params(tiny.with_lora(config, lora)), layout, scaling), frozen


def engine_of(case, mesh, dtype=FLOAT32, num_score_micro=None, ema_decay=0.0, scaling=None, **settings):
    """(engine, state, frozen): the actor differs from its reference, the critic from the reward model."""
    family, lora, temperature, num_micro = CASES[case]
    config, layout, settings = tiny.FAMILIES[family], Layout(mesh, TRAIN), PPOConfig(**settings)
    critic, tx = tiny.scalar(config), make_optimizer(OPTIM, 10)

    def policy_objective(logprobs, entropy, experience):
        loss, stats = actor_loss(logprobs, entropy, experience, settings)
        ratio = jnp.exp(logprobs - experience.logprobs)
        off = jnp.where(experience.action_mask, jnp.abs(ratio - 1), 0).max()
        return loss, {**stats, "ratio_off": off}

    engine = make_hybrid_engine(
        Architectures(tiny.with_lora(config, lora), critic, config, critic),
        dataclasses.replace(ppo_algorithm(settings), actor_loss=policy_objective),
        Optimizers(tx, tx, ema_decay),
        Sampling(SampleConfig(NEW, temperature), EOS),
        Execution(layout, Compute(dtype, "layers", 4, scaling=scaling), num_micro, num_score_micro or num_micro),
    )
    actor_state, actor_frozen = state_of(config, lora, layout, tx, 0, scaling)
    critic_state, critic_frozen = state_of(critic, NO_LORA, layout, tx, 1, scaling)
    reference = {} if lora.rank else tiny.random_params(config, mesh, seed=2)
    frozen = FrozenParams(actor_frozen, critic_frozen, reference, tiny.random_params(critic, mesh, seed=3))
    return engine, EngineState(actor_state, critic_state), frozen


# Actor and critic of the llama case: (architecture, adapters, seed).
START = [((tiny.LLAMA, NO_LORA), 0), ((tiny.scalar(tiny.LLAMA), NO_LORA), 1)]


def params_of(state, frozen):
    """All parameters of the actor and the critic."""
    return state.actor.params(frozen.actor), state.critic.params(frozen.critic)


class Run:
    """Publish, generate, score and two updates, with their results on the host; then everything once more."""

    def __init__(self, case, name):
        family, self.lora, self.temperature, _ = CASES[case]
        self.config, self.mesh = tiny.FAMILIES[family], tiny.mesh_of(name)
        self.engine, self.state, self.frozen = engine_of(case, self.mesh)
        self.key = jax.random.key(7)
        self.prompts = tiny.prompts(self.config, LENGTHS, WIDTH)
        self.start = copy_to_host((*params_of(self.state, self.frozen), self.frozen.reference))
        self.reward = copy_to_host(self.frozen.reward)
        with tiny.compilations() as self.first_compiled:
            self.weights = self.engine.publish(params_of(self.state, self.frozen)[0])
            self.rollout_there = self.engine.generate(self.weights, *self.prompts, self.key)
            self.experience = self.engine.score(self.state, self.frozen, self.rollout_there)
        self.rollout = copy_to_host(self.rollout_there)
        self.shards = jax.tree.map(shard, self.state)
        self.first_state = self.state
        self.after, self.stats = [], []
        for _ in range(2):
            with tiny.compilations() as names:
                self.state, stats = self.engine.update(self.state, self.frozen, self.experience)
            self.first_compiled += names
            self.after.append(copy_to_host(params_of(self.state, self.frozen)))
            self.stats.append(jax.device_get(stats))
        others, key = tiny.prompts(self.config, LENGTHS[3:] + LENGTHS[:3], WIDTH, seed=5), jax.random.key(8)
        with tiny.compilations() as self.later_compiled:
            weights = self.engine.publish(params_of(self.state, self.frozen)[0])
            experience = self.engine.score(self.state, self.frozen, self.engine.generate(weights, *others, key))
            self.state, _ = self.engine.update(self.state, self.frozen, experience)


def shard(leaf):
    return {shard.data.shape for shard in leaf.addressable_shards}


@functools.lru_cache
def run(case, name="one"):
    return Run(case, name)


def right_padded_rows(run):
    """(tokens [B, S], mask, lengths of prompts) right-padded by loops, as scoring must see them."""
    rollout, length = run.rollout, WIDTH + NEW
    tokens, mask = np.zeros((ROWS, length), np.int32), np.zeros((ROWS, length), bool)
    for row in range(ROWS):
        prompt = rollout.prompts[row][rollout.prompt_mask[row]]
        real = np.concatenate([prompt, rollout.tokens[row][rollout.mask[row]]])
        tokens[row, : len(real)], mask[row, : len(real)] = real, True
    return tokens, mask, rollout.prompt_mask.sum(1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def hidden_of(config, lora, params, tokens, mask):
    return bind(tiny.with_lora(config, lora), params)(tokens, mask, Compute(jnp.float32, "none"))[0]


def logprobs_of(run, params, lora, temperature):
    """[B, N] log-probabilities of the answers by full passes on one device and a float64 softmax; 0 off the mask."""
    tokens, mask, starts = right_padded_rows(run)
    hidden = hidden_of(run.config, lora, params, tokens, mask)
    logits = np.asarray(hidden @ head_kernel(run.config, params)[:, : run.config.vocab_size], np.float64) / temperature
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    out = np.zeros((ROWS, NEW))
    for row in range(ROWS):
        for n in range(run.rollout.mask[row].sum()):
            out[row, n] = logp[row, starts[row] + n - 1, run.rollout.tokens[row, n]]
    return out


@pytest.mark.parametrize(("case", "name"), EVERYWHERE)
def test_the_sampled_logprobs_equal_those_of_the_training_forward_pass(case, name):
    trained = run(case, name)
    mask, sampled = trained.rollout.mask, trained.rollout.logprobs
    assert len(set(mask.sum(1))) >= 4 and 0 < trained.rollout.ended.mean() < 1, "answers of several lengths"
    np.testing.assert_allclose(trained.experience.logprobs[mask], sampled[mask], atol=1e-5)
    actor = trained.start[0]
    by_hand = logprobs_of(trained, actor, trained.lora, trained.temperature)
    np.testing.assert_allclose(sampled[mask], by_hand[mask], atol=1e-5)


@pytest.mark.parametrize(("case", "name"), EVERYWHERE)
def test_the_ratio_is_one_before_the_first_update_and_not_after_it(case, name):
    trained = run(case, name)
    first, second = trained.stats
    assert first["actor_ratio_off"] <= 1e-5 and second["actor_ratio_off"] > 0.01
    assert first["actor_clip_fraction"] == 0 and 0 <= first["actor_approx_kl"] < 1e-10
    assert first["critic_clip_fraction"] == 0 and second["actor_approx_kl"] > 1e-5
    # The ratio is 1, so the loss is minus the mean of the advantages, which are whitened over the same tokens.
    assert abs(first["actor_loss"]) < 1e-5


@pytest.mark.parametrize(("case", "name"), [("llama", "one"), ("opt-lora", "fsdp4-tensor2")])
def test_logprobs_of_the_rollout_in_place_of_a_pass_give_the_same_experience_and_save_a_quarter_of_the_products(
    case, name
):
    trained = run(case, name)
    engine, state, frozen = engine_of(case, trained.mesh, old_logprobs="rollout")
    got, e = engine.score(state, frozen, trained.rollout_there), trained.experience
    np.testing.assert_array_equal(got.logprobs, trained.rollout.logprobs)
    for field in ("ref_logprobs", "values", "score", "rewards", "returns", "advantages"):
        mask = e.action_mask if getattr(e, field).ndim == 2 else True
        ours, theirs = (np.where(mask, getattr(each, field), 0) for each in (got, e))
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=field)
    flops = [
        each.programs.score.lower(state, frozen, trained.rollout_there, None).cost_analysis()["flops"]
        for each in (engine, trained.engine)
    ]
    assert flops[0] == pytest.approx(3 / 4 * flops[1], rel=0.1)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_a_separate_model_or_the_base_without_adapters(case):
    trained = run(case)
    actor, _, reference = trained.start
    assert (reference == {}) == bool(trained.lora.rank)
    params = reference or {path: leaf for path, leaf in actor.items() if not is_adapter(path)}
    by_hand = logprobs_of(trained, params, NO_LORA, trained.temperature)
    mask = trained.rollout.mask
    np.testing.assert_allclose(trained.experience.ref_logprobs[mask], by_hand[mask], atol=1e-5)
    assert np.abs(by_hand - trained.rollout.logprobs)[mask].max() > 0.1, "the actor differs from the reference"


@pytest.mark.parametrize("case", CASES)
def test_values_are_read_before_each_action_and_the_score_at_the_last_token(case):
    trained = run(case)
    tokens, mask, starts = right_padded_rows(trained)
    config, experience = tiny.scalar(trained.config), trained.experience
    by_role = {"critic": trained.start[1], "reward": trained.reward}
    said = {
        role: np.asarray(hidden_of(config, NO_LORA, params, tokens, mask) @ params["score/kernel"])[..., 0]
        for role, params in by_role.items()
    }
    for row in range(ROWS):
        size = trained.rollout.mask[row].sum()
        values = said["critic"][row, starts[row] - 1 : starts[row] - 1 + size]
        np.testing.assert_allclose(experience.values[row, :size], values, atol=1e-5)
        np.testing.assert_allclose(experience.score[row], said["reward"][row, starts[row] + size - 1], atol=1e-5)
    np.testing.assert_array_equal(np.where(mask, experience.tokens, 0), tokens)
    np.testing.assert_array_equal(experience.mask, mask)
    np.testing.assert_array_equal(experience.starts, starts)


@pytest.mark.parametrize("case", CASES)
def test_advantages_come_from_the_estimator_over_the_whole_experience(case):
    trained = run(case)
    e, settings = trained.experience, PPOConfig()
    rewards = ppo.token_rewards(e.score, e.logprobs, e.ref_logprobs, e.action_mask, kl_coef=0.1, clip=5.0)
    np.testing.assert_allclose(e.rewards, rewards, atol=1e-5)
    gains, returns = ppo.gae(rewards, e.values, e.action_mask, gamma=settings.gamma, lam=settings.lam)
    np.testing.assert_allclose(e.returns, returns, atol=1e-5)
    real = np.asarray(gains)[np.asarray(e.action_mask)]
    np.testing.assert_allclose(
        np.asarray(e.advantages)[np.asarray(e.action_mask)], (real - real.mean()) / real.std(), atol=1e-5
    )


@pytest.mark.parametrize(("case", "name"), ON_EIGHT)
def test_eight_devices_sample_and_score_like_one(case, name):
    one, eight = run(case), run(case, name)
    np.testing.assert_array_equal(eight.rollout.tokens, one.rollout.tokens)
    np.testing.assert_array_equal(eight.rollout.mask, one.rollout.mask)
    np.testing.assert_allclose(eight.rollout.logprobs, one.rollout.logprobs, atol=1e-5)
    np.testing.assert_array_equal(eight.experience.mask, one.experience.mask)
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "score"):
        ours, theirs = (np.asarray(getattr(trained.experience, name)) for trained in (one, eight))
        if ours.ndim == 2:
            ours, theirs = ours[one.rollout.mask], theirs[one.rollout.mask]
        np.testing.assert_allclose(theirs, ours, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("case", "name"), ON_EIGHT)
def test_one_and_two_updates_on_eight_devices_equal_those_on_one(case, name):
    one, eight = run(case), run(case, name)
    for step in range(2):
        for role in range(2):
            ours, theirs = one.after[step][role], eight.after[step][role]
            assert max(np.abs(ours[path] - one.start[role][path]).max() for path in ours) > 0.005
            for path in ours:
                np.testing.assert_allclose(theirs[path], ours[path], atol=1e-5, rtol=0, err_msg=f"{step} {path}")
        for stat in one.stats[step]:
            np.testing.assert_allclose(
                eight.stats[step][stat], one.stats[step][stat], atol=1e-5, rtol=1e-5, err_msg=stat
            )


@pytest.mark.parametrize(("case", "name"), EVERYWHERE)
def test_trained_arrays_are_donated_and_reference_and_reward_model_are_not(case, name):
    trained = run(case, name)
    before = trained.first_state
    for state in (before.actor, before.critic):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trained.frozen))
    again = trained.engine.score(trained.state, trained.frozen, trained.rollout_there)
    mask = trained.rollout.mask
    np.testing.assert_allclose(again.ref_logprobs[mask], trained.experience.ref_logprobs[mask], atol=1e-5)
    np.testing.assert_allclose(again.score, trained.experience.score, atol=1e-5)
    assert np.abs(np.asarray(again.logprobs - trained.experience.logprobs))[mask].max() > 1e-3


def test_with_adapters_the_base_stays_bit_equal_through_two_updates():
    trained = run("opt-lora", "fsdp4-tensor2")
    for path, start in trained.start[0].items():
        assert np.array_equal(trained.after[1][0][path], start) != is_adapter(path), path


@pytest.mark.parametrize(("case", "name"), ON_EIGHT)
def test_models_keep_their_shardings_and_experience_is_sharded_by_rows(case, name):
    trained = run(case, name)
    assert jax.tree.map(shard, trained.state) == trained.shards
    for field in dataclasses.fields(trained.experience):
        leaf = getattr(trained.experience, field.name)
        assert {x.data.shape[0] for x in leaf.addressable_shards} == {2}, field.name


@pytest.mark.parametrize(("case", "name"), ON_EIGHT)
def test_published_weights_are_sharded_over_tensor_only(case, name):
    trained = run(case, name)
    split = {"qkv/kernel", "qkv/bias", "gate_up/kernel", "gate_up/bias", "o/kernel", "down/kernel"}
    for path, leaf in trained.weights.items():
        halves = path in ("embed/tokens", "head/rows") or path.split("/", 2)[-1] in split
        sizes = {x.data.size for x in leaf.addressable_shards}
        assert sizes == {leaf.size // (2 if halves else 1)}, path


@pytest.mark.parametrize("family", ["opt-350m", "llama"])
def test_published_weights_are_the_trained_ones_in_the_generation_layout(family):
    config = tiny.FAMILIES[family]
    params = tiny.random_arrays(tiny.with_lora(config, tiny.LORA))
    weights = make_publish(tiny.with_lora(config, tiny.LORA), single_device_mesh(), FLOAT32)(params)
    merged = merge_adapters(params, tiny.LORA)
    heads = config.num_kv_heads
    for i in range(2):
        q, k, v = (
            np.asarray(merged[f"layers/attention/{name}/kernel"])[i].reshape(32, heads, -1, config.head_dim)
            for name in "qkv"
        )
        np.testing.assert_allclose(weights[f"layers/{i}/qkv/kernel"], np.concatenate([q, k, v], axis=2), atol=1e-6)
        up = np.asarray(merged["layers/mlp/up/kernel"])[i]
        np.testing.assert_allclose(weights[f"layers/{i}/gate_up/kernel"][:, -1], up, atol=1e-6)
    head = merged["embed/tokens" if config.tied else "head/kernel"]
    np.testing.assert_array_equal(weights["head/rows"], head)


@pytest.mark.parametrize("name", ["one", "fsdp4-tensor2"])
def test_in_bfloat16_published_weights_have_a_row_for_each_output_sharded_like_their_kernels(name):
    config, mesh = tiny.FAMILIES["llama"], tiny.mesh_of(name)
    params = tiny.random_params(config, mesh)
    kernels, rows = (make_publish(config, mesh, dtype)(params) for dtype in (FLOAT32, jnp.bfloat16))
    names = {f"layers/{i}/{name}" for i in range(2) for name in ("qkv", "o", "gate_up", "down")}
    assert {f"{name}/kernel" for name in names} == kernels.keys() - rows.keys()
    for path in names:
        kernel, by_rows = kernels[f"{path}/kernel"], rows[f"{path}/rows"]
        np.testing.assert_array_equal(by_rows, np.moveaxis(np.asarray(kernel.astype(jnp.bfloat16)), 0, -1))
        first, *rest = kernel.sharding.shard_shape(kernel.shape)
        assert by_rows.sharding.shard_shape(by_rows.shape) == (*rest, first)


@pytest.mark.parametrize(
    ("family", "lora", "name"),
    [
        ("opt-350m", NO_LORA, "fsdp4-tensor2"),
        ("opt-350m", tiny.LORA, "fsdp4-tensor2"),
        ("llama", NO_LORA, "data2-fsdp2-tensor2"),
        ("llama", tiny.LORA, "fsdp4-tensor2"),
    ],
)
def test_publish_compiles_to_one_all_gather_per_sharded_weight_and_nothing_else(family, lora, name):
    config, layout = tiny.FAMILIES[family], Layout(tiny.mesh_of(name), TRAIN)
    params = tiny.random_params(tiny.with_lora(config, lora), layout.mesh)
    text = make_publish(tiny.with_lora(config, lora), layout.mesh, FLOAT32).lower(params).compile().as_text()
    split = [path for path, leaf in abstract_params(config).items() if any(layout.spec(leaf.axes))]
    assert len(split) == {"opt-350m": 14, "llama": 9}[family]
    assert Counter(collective.kind for collective in collectives(text)) == {"all-gather": len(split)}


@pytest.mark.parametrize("lora", [NO_LORA, tiny.LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_publish_moves_nothing_when_parameters_are_not_sharded_over_fsdp(zero, lora):
    config, layout = tiny.with_lora(tiny.LLAMA, lora), train_layout(tiny.mesh_of("fsdp4-tensor2"), zero)
    leaves = abstract_params(config)
    params = {
        path: jax.device_put(leaf, layout.sharding(leaves[path].axes))
        for path, leaf in tiny.random_params(config, layout.mesh).items()
    }
    publish = make_publish(config, layout.mesh, FLOAT32, layout.table)
    assert collectives(publish.lower(params).compile().as_text()) == []
    by_train = make_publish(config, layout.mesh, FLOAT32)
    assert collectives(by_train.lower(params).compile().as_text()) != [], (
        "moves them if constrained to another sharding"
    )


def test_the_other_axis_order_would_need_more_than_all_gathers_and_is_detected():
    mesh = tiny.mesh_of("fsdp4-tensor2")
    minor = jax.device_put(np.zeros((64, 64), np.float32), NamedSharding(mesh, PartitionSpec(None, ("fsdp", "tensor"))))
    text = jax.jit(lambda x: Layout(mesh, GENERATE).constrain(x, None, "mlp")).lower(minor).compile().as_text()
    assert tiny.collective_kinds(text) == {"all-gather", "collective-permute"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_published_weights_have_the_requested_dtype_and_norms_keep_theirs(dtype):
    weights = make_publish(tiny.with_lora(tiny.LLAMA, tiny.LORA), single_device_mesh(), jnp.dtype(dtype))(
        tiny.random_params(tiny.with_lora(tiny.LLAMA, tiny.LORA), single_device_mesh())
    )
    assert {str(leaf.dtype) for path, leaf in weights.items() if "norm" not in path} == {dtype}
    assert {str(leaf.dtype) for path, leaf in weights.items() if "norm" in path} == {"float32"}


@pytest.mark.parametrize(("case", "name"), EVERYWHERE)
def test_new_prompts_a_new_key_and_updated_models_compile_nothing(case, name):
    trained = run(case, name)
    # Publishing and generating may already be compiled by another test; an update program belongs to its engine.
    assert trained.first_compiled.count("jit(update)") == 2, (
        "one for the actor, one for the critic, and no recompilation"
    )
    assert trained.later_compiled == []


@pytest.mark.parametrize(("name", "in_turn"), [("one", True), ("fsdp4-tensor2", False)])
def test_on_one_cpu_the_pass_of_the_reward_model_waits_for_all_others(name, in_turn):
    engine, state, frozen = engine_of("llama", tiny.mesh_of(name))
    prompts = tiny.prompts(tiny.LLAMA, LENGTHS, WIDTH)
    rollout = engine.generate(engine.publish(params_of(state, frozen)[0]), *prompts, jax.random.key(7))

    score = engine.programs.score.__wrapped__  # without its own jit

    def products(result):
        program = jax.jit(lambda *models: result(score(*models, rollout, None)))
        return program.lower(state, frozen).compile().as_text().count(" dot(")

    assert (products(lambda experience: experience.score) == products(lambda experience: experience)) == in_turn


def test_scoring_in_micro_batches_equals_scoring_at_once():
    whole, parts = (engine_of("opt-lora", tiny.mesh_of("one"), num_score_micro=n) for n in (1, 4))
    prompts = tiny.prompts(tiny.OPT, LENGTHS, WIDTH)
    rollout = whole[0].generate(whole[0].publish(params_of(*whole[1:])[0]), *prompts, jax.random.key(7))
    one, four = (engine.score(*models, rollout) for engine, *models in (whole, parts))
    for field in dataclasses.fields(one):
        got, want = (np.asarray(getattr(each, field.name)) for each in (four, one))
        assert got.shape == want.shape and got.dtype == want.dtype, field.name
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=field.name)


@pytest.mark.parametrize(("case", "name"), [("llama", "one"), ("opt-lora", "one"), ("llama", "fsdp4-tensor2")])
def test_reference_and_average_in_host_memory_change_no_bit_and_the_average_follows_every_update(case, name):
    decay, trained = 0.75, run(case, name)
    engine, there, frozen = engine_of(case, trained.mesh, ema_decay=decay)
    _, away, frozen_away = engine_of(case, trained.mesh)
    there = dataclasses.replace(there, average=start_ema(there.actor.trainable, offload=False))
    away = dataclasses.replace(away, average=start_ema(away.actor.trainable, offload=True))
    frozen_away = dataclasses.replace(frozen_away, reference=to_host(frozen_away.reference))
    expected = jax.tree.map(lambda leaf: leaf.astype(np.float64), copy_to_host(there.average))
    assert expected.keys() == {path for path in trained.start[0] if is_trainable(path, trained.lora)}
    for _ in range(2):
        there, away = (
            engine.update(state, kept, engine.score(state, kept, trained.rollout_there))[0]
            for state, kept in ((there, frozen), (away, frozen_away))
        )
        moved = copy_to_host(there.actor.trainable)
        expected = {path: decay * leaf + (1 - decay) * moved[path] for path, leaf in expected.items()}
    resting = jax.tree.leaves((frozen_away.reference, away.average))
    assert {leaf.sharding.memory_kind for leaf in resting} == {"pinned_host"}
    for path, leaf in expected.items():
        np.testing.assert_allclose(there.average[path], leaf, atol=1e-6, err_msg=path)
    jax.tree.map(np.testing.assert_array_equal, (away, frozen_away), (there, frozen))


def test_scoring_does_not_copy_a_reference_on_the_devices_and_frees_one_fetched_from_host_memory():
    trained = run("llama")
    engine, frozen = trained.engine, trained.frozen

    def live_bytes(kind):
        return sum(leaf.nbytes for leaf in jax.live_arrays() if leaf.sharding.memory_kind == kind)

    def pointers(params):
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]

    assert pointers(to_devices(frozen.reference)) == pointers(frozen.reference)
    away = dataclasses.replace(frozen, reference=to_host(frozen.reference))
    before = live_bytes("device")
    scored = jax.block_until_ready(engine.score(trained.state, away, trained.rollout_there))
    assert live_bytes("device") - before == sum(leaf.nbytes for leaf in jax.tree.leaves(scored))


@pytest.mark.parametrize(
    ("family", "lora", "name", "dtype"),
    [
        ("llama", NO_LORA, "fsdp4-tensor2", "float32"),
        ("opt-350m", NO_LORA, "fsdp4-tensor2", "float32"),
        ("opt", tiny.LORA, "fsdp4-tensor2", "float32"),
        ("sparse", NO_LORA, "data2-fsdp2-tensor2", "float32"),
        ("llama", NO_LORA, "fsdp4-tensor2", "bfloat16"),
        ("llama", NO_LORA, "one", "float32"),
    ],
)
def test_publish_moves_exactly_the_bytes_of_sharded_weights_that_a_device_lacks(family, lora, name, dtype):
    config, mesh, dtype = tiny.FAMILIES[family], tiny.mesh_of(name), jnp.dtype(dtype)
    params = tiny.random_params(tiny.with_lora(config, lora), mesh)
    publish = make_publish(tiny.with_lora(config, lora), mesh, dtype).compile(params)
    reported, layouts = publish_bytes(publish, params, dtype), [Layout(mesh, table) for table in (TRAIN, GENERATE)]
    by_hand = 0
    for leaf in abstract_params(config).values():
        t, tg = (np.prod([layout.shards(axis) for axis in leaf.axes if axis]) for layout in layouts)
        by_hand += int(np.prod(leaf.shape) * dtype.itemsize * (t - tg) / (t * tg))
    if name == "one":
        assert reported == {"publish_bytes": 0, "publish_bytes_least": 0} and by_hand == 0
        return
    wider = 4 // dtype.itemsize  # a CPU's collectives are of float32
    assert reported == {"publish_bytes": wider * by_hand, "publish_bytes_least": by_hand, "publish_bytes_ratio": wider}
    split = [leaf for leaf in abstract_params(config).values() if any(layouts[0].spec(leaf.axes))]
    # Of a model that generation splits in two and training in eight, every device receives 3/8 (a half is sharded over
    # fsdp alone: 1/4); of position tables, which generation replicates, 7/8.
    total = sum(np.prod(leaf.shape) for leaf in split) * dtype.itemsize
    assert total / 4 <= by_hand < total / 2
    # Replicated arrays are not moved: norms, and biases that are added to whole rows.
    assert len(split) < len(abstract_params(config))
    weights = publish(params)
    again = make_publish(tiny.with_lora(config, lora), mesh, dtype)(params)
    jax.tree.map(np.testing.assert_array_equal, weights, again)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_publishing_quantised_kernels_moves_the_codes_and_scales_that_a_device_lacks(kind):
    config, mesh = dataclasses.replace(tiny.LLAMA_TIED, num_heads=4), tiny.mesh_of("fsdp4-tensor2")
    params, leaves = tiny.random_params(tiny.with_lora(config, tiny.LORA), mesh), abstract_params(config)
    for path in filter(is_quantisable, leaves):
        codes = quantise(params[path], kind, block_axis(leaves[path].axes))
        params[path] = jax.device_put(codes, quantised_shardings(leaves[path].axes, kind, Layout(mesh, TRAIN)))
    publish = make_publish(tiny.with_lora(config, tiny.LORA), mesh, FLOAT32).compile(params)
    reported = publish_bytes(publish, params, FLOAT32)
    assert reported["publish_bytes"] == reported["publish_bytes_least"]
    kernels = [each for each in params.values() if isinstance(each, Quantised)]
    assert reported["publish_bytes"] > 3 / 8 * sum(each.codes.nbytes + each.scales.nbytes for each in kernels)


def test_a_greedy_actor_is_rejected_because_it_has_no_ratios():
    with pytest.raises(ValueError, match="temperature=0: a greedy policy has no probability ratios .* set it above 0"):
        make_hybrid_engine(
            Architectures(tiny.LLAMA),
            Algorithm(None, None),
            Optimizers(None),
            Sampling(SampleConfig(NEW, 0.0), EOS),
            Execution(Layout(single_device_mesh(), TRAIN), Compute(FLOAT32)),
        )


# Two samples for each of eight prompts.
PAIRS = SampleConfig(NEW, num_samples=2)


def reinforce():
    """REINFORCE with the mean score of a prompt's samples as its baseline."""

    def estimate(scored):
        gains = scored.score - scored.score.reshape(-1, 2).mean(axis=1).repeat(2)
        return (*(jnp.where(scored.action_mask, x[:, None], 0) for x in (scored.score, gains)), None)

    def actor_loss(logprobs, entropy, experience):
        return -masked.mean(experience.advantages * logprobs, experience.action_mask), {}

    return Algorithm(estimate, actor_loss)


def actor_alone(mesh, **options):
    """(engine, state, frozen) without critic, reference and reward model."""
    layout, tx = Layout(mesh, TRAIN), make_optimizer(OPTIM, 10)
    execution = Execution(layout, Compute(FLOAT32, "layers", 4), num_micro=2, num_score_micro=2)
    algorithm = dataclasses.replace(reinforce(), **options)
    engine = make_hybrid_engine(Architectures(tiny.LLAMA), algorithm, Optimizers(tx), Sampling(PAIRS, EOS), execution)
    actor, frozen = state_of(tiny.LLAMA, NO_LORA, layout, tx, seed=0)
    return engine, EngineState(actor), FrozenParams(frozen)


@functools.lru_cache
def run_alone(name):
    """Rollout, experience, parameters before and after an update, its metrics, and the log-probabilities after it."""
    engine, state, frozen = actor_alone(tiny.mesh_of(name))
    before = copy_to_host(state.actor.trainable)
    prompts = tiny.prompts(tiny.LLAMA, LENGTHS[::2], WIDTH)
    rollout = engine.generate(engine.publish(state.actor.params(frozen.actor)), *prompts, jax.random.key(7))
    scores = np.asarray(rollout.tokens[:, 0]) % 7
    experience = engine.score(state, frozen, rollout, scores)
    state, stats = engine.update(state, frozen, experience)
    after = engine.score(state, frozen, rollout, scores).logprobs
    return copy_to_host((rollout, experience, before, state.actor.trainable, stats, after))


@pytest.mark.parametrize("name", ["one", "fsdp4-tensor2"])
def test_an_actor_alone_takes_the_group_baseline_step_from_scores_of_the_caller(name):
    rollout, experience, _, _, stats, after = run_alone(name)
    assert experience.values is experience.ref_logprobs is experience.returns is None
    first = rollout.tokens[:, 0] % 7
    np.testing.assert_array_equal(experience.score, first)
    gains = (first - np.repeat((first[::2] + first[1::2]) / 2, 2))[:, None] * rollout.mask
    np.testing.assert_allclose(experience.advantages, gains)
    np.testing.assert_array_equal(experience.rewards, first[:, None] * rollout.mask)
    moved = np.where(rollout.mask, gains * (after - experience.logprobs), 0)
    assert moved.sum() > 0.1, "better answers are likelier than before"
    assert stats.keys() == {"actor_loss", "actor_grad_norm", "actor_skipped_steps"}


def test_an_update_of_an_actor_alone_on_eight_devices_equals_that_on_one():
    one, eight = run_alone("one"), run_alone("fsdp4-tensor2")
    assert max(np.abs(one[3][path] - one[2][path]).max() for path in one[2]) > 0.005
    np.testing.assert_array_equal(eight[0].tokens, one[0].tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5), one[1:], eight[1:])


def test_an_engine_has_no_forward_pass_and_no_program_of_a_model_that_it_lacks():
    def products(engine, *args):
        return engine.programs.score.lower(*args).as_text().count("dot_general")

    trained = run("llama")
    rollout = trained.rollout_there
    engine, state, frozen = actor_alone(tiny.mesh_of("one"))
    alone = products(engine, state, frozen, rollout, rollout.logprobs[:, 0])
    assert alone > 4 and products(trained.engine, trained.state, trained.frozen, rollout, None) == 4 * alone
    sampled = actor_alone(tiny.mesh_of("one"), old_logprobs="rollout")[0]
    assert products(sampled, state, frozen, rollout, rollout.logprobs[:, 0]) == 0, "no model is left to score"
    scored = sampled.score(state, frozen, rollout, np.zeros(ROWS))
    np.testing.assert_array_equal(scored.logprobs, rollout.logprobs)
    assert engine.programs.critic is None and len(jax.tree.leaves(frozen)) == 0


@pytest.mark.parametrize("lacking", ["critic", "reference", "reward"])
def test_outputs_of_the_other_models_do_not_depend_on_a_missing_one(lacking):
    trained = run("llama")
    e, layout = trained.experience, Layout(trained.mesh, TRAIN)
    models = dataclasses.replace(trained.engine.models, **{lacking: None})
    frozen = dataclasses.replace(trained.frozen, **{lacking: {}})
    state = EngineState(*(state_of(*each, layout, make_optimizer(OPTIM, 10), seed)[0] for each, seed in START))
    if lacking == "critic":
        state = dataclasses.replace(state, critic=None)
    scores = e.score if lacking == "reward" else None
    engine = make_hybrid_engine(
        models,
        Algorithm(lambda scored: (scored.logprobs, scored.logprobs, None), None, models.critic and len),
        Optimizers(None, models.critic and "none is called"),
        Sampling(SampleConfig(NEW, trained.temperature), EOS),
        Execution(layout, Compute(FLOAT32, "layers", 4)),
    )
    got = engine.score(state, frozen, trained.rollout_there, scores)
    for name in ("logprobs", "ref_logprobs", "values", "score"):
        if name == {"critic": "values", "reference": "ref_logprobs"}.get(lacking):
            assert getattr(got, name) is None
        else:
            np.testing.assert_allclose(getattr(got, name), getattr(e, name), atol=1e-5, err_msg=name)


def test_scores_of_the_caller_are_added_to_those_of_the_reward_model_and_needed_without_one():
    trained = run("llama")
    engine, state, frozen = actor_alone(tiny.mesh_of("one"))
    rollout = trained.rollout_there
    with pytest.raises(ValueError, match="give the scores of the answers: the engine has no reward model"):
        engine.score(state, frozen, rollout)
    more = np.arange(float(ROWS))
    both = trained.engine.score(trained.state, trained.frozen, rollout, more)
    np.testing.assert_allclose(both.score, trained.experience.score + more, rtol=1e-5, atol=1e-5)


def test_rollouts_that_micro_batches_and_devices_do_not_divide_are_rejected_with_the_nearest_that_do():
    trained = run("opt-lora", "fsdp4-tensor2")
    part = jax.tree.map(lambda leaf: leaf[:12], trained.experience)
    reported = "rollouts of one update=12 does not divide over 16 micro-batches x devices; nearest that do: [16]"
    with pytest.raises(ValueError, match=re.escape(reported)):
        trained.engine.update(trained.state, trained.frozen, part)


COMPILED = """
import glob, json, sys, tempfile
import jax, jax.numpy as jnp, numpy as np
import test_engine, tiny
from rlhf_jax.rollout import make_publish
from rlhf_jax.mesh import GENERATE, TRAIN, Layout

mesh, report = tiny.mesh_of("fsdp4-tensor2"), {}


def say(what):
    print(f"== {what}", file=sys.stderr, flush=True)


say("control")
x = Layout(mesh, TRAIN).put(np.zeros((64, 64), np.float32), "mlp", None)
jax.jit(lambda x: Layout(mesh, GENERATE).constrain(x, None, "mlp")).lower(x).compile()

say("publish")
params = tiny.random_params(tiny.with_lora(tiny.LLAMA, tiny.LORA), mesh)
with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
    make_publish(tiny.with_lora(tiny.LLAMA, tiny.LORA), mesh, jnp.dtype("bfloat16")).lower(params).compile(options)
    report["partitioned"] = open(glob.glob(f"{folder}/*after_spmd-partitioning*")[0]).read()

for case, dtype in (("llama", "bfloat16"), ("opt-lora", "float32")):
    engine, state, frozen = test_engine.engine_of(case, mesh, jnp.dtype(dtype))
    say(case)
    config = tiny.FAMILIES[test_engine.CASES[case][0]]
    prompts = tiny.prompts(config, test_engine.LENGTHS, test_engine.WIDTH)
    rollout = engine.generate(engine.publish(state.actor.params(frozen.actor)), *prompts, jax.random.key(0))
    jax.block_until_ready(engine.update(state, frozen, engine.score(state, frozen, rollout)))
say("end")
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def compile_logs():
    """({program: compiler log}, JSON result of the script), from a process without a compile cache."""
    tests = Path(__file__).parent
    env = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMPILATION_CACHE", "TF_CPP"))}
    env["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = re.split(r"^== (.*)\n", done.stderr, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)), json.loads(done.stdout.splitlines()[-1])


REMAT = "Involuntary full rematerialization"


def test_no_program_of_the_engine_makes_the_compiler_replicate_a_whole_array(compile_logs):
    said = compile_logs[0]
    assert REMAT in said["control"], "the control program must trigger the compiler's message: update the pattern"
    assert [name for name, text in said.items() if REMAT in text] == ["control"]
    assert said.keys() == {"control", "publish", "llama", "opt-lora", "end"}


def test_weights_are_bfloat16_before_they_are_gathered(compile_logs):
    # After partitioning, before the CPU compiler turns every bfloat16 collective into float32.
    gathered = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather\(", compile_logs[1]["partitioned"])
    assert gathered == ["bf16"] * 9
