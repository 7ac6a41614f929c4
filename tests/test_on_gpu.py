"""Invariants of the engine, in bfloat16 and with cuDNN's attention, on a GPU: `pytest -m gpu`.

Without `-m gpu` the same tests run with XLA's attention in place of cuDNN's, on the same rolled rows.

How much may two programs in bfloat16 differ? Each differs from the same function in float32 by its own roundings,
of root mean square e: two with independent roundings differ by sqrt(2) e, and `ALLOWED` is 2, in units of the
larger e, which is measured here and is itself bounded. An error of one token, position or layer changes results by
20 e and more.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.engine import (
    Architectures,
    EngineState,
    Execution,
    FrozenParams,
    Optimizers,
    Sampling,
    make_hybrid_engine,
)
from rlhf_jax.mesh import TRAIN, Layout, single_device_mesh, train_layout
from rlhf_jax.models import decoder, inference, transformer
from rlhf_jax.models.attention import AttentionKernel
from rlhf_jax.models.config import Compute, Rope
from rlhf_jax.models.decoder import abstract_params, bind, init_params, logits
from rlhf_jax.models.layers import fused_attention
from rlhf_jax.models.lora import NO_LORA, LoraConfig, is_trainable
from rlhf_jax.models.quantised import block_axis, dequantise, is_quantisable, quantise
from rlhf_jax.rollout import make_generate, make_publish
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.ppo import ppo_algorithm
from rlhf_jax.stages.ppo_config import PPOConfig
from rlhf_jax.train_step import init_state
from rlhf_jax.trees import partition

BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
ALLOWED = 2.0
ROWS, WIDTH, NEW, VOCAB = 16, 32, 24, 500
LENGTHS = [32, 1, 17, 5, 32, 9, 28, 2, 13, 31, 7, 20, 3, 25, 11, 30]
EOS = tuple(range(3, VOCAB, 16))  # one in 16 ids, so that answers have many lengths
WIDE = dict(hidden_size=128, embed_size=128, num_layers=4, head_dim=64, mlp_size=256, vocab_size=VOCAB)
WIDE |= dict(padded_vocab=512, max_positions=128, attention_scale=64**-0.5)
OPT = dataclasses.replace(tiny.OPT, num_heads=2, num_kv_heads=2, position_rows=130, **WIDE)
ROPE = Rope(tuple(10000.0 ** -(np.arange(32) / 32)))
LLAMA = dataclasses.replace(tiny.LLAMA, num_heads=4, num_kv_heads=2, rope=ROPE, **WIDE)
FAMILIES = {"opt": OPT, "llama": LLAMA}
LORA = LoraConfig(rank=8, alpha=16.0)
# Every weight trains; or adapters on a base in bfloat16, int8 or nf4.
CASES = [("opt", "float32"), ("opt", "bfloat16"), ("llama", "int8"), ("llama", "nf4")]

in_both_families = pytest.mark.parametrize("family", ["opt", "llama"])


@pytest.fixture(params=["xla", pytest.param("cudnn", marks=pytest.mark.gpu)], autouse=True)
def kernel(request, monkeypatch):
    """cuDNN's attention or, without a GPU, XLA's attention in its place when "cudnn" is chosen."""
    if request.param == "cudnn":
        return
    fused = functools.partial(fused_attention, implementation="xla")

    def choose(mesh, config, dtype, length, choice, packed=False):
        return AttentionKernel("xla" if choice == "xla" or packed else "cudnn", "")

    for module in (decoder, inference):
        monkeypatch.setattr(module, "kernel_for_mesh", choose)
    monkeypatch.setattr(transformer, "fused_attention", fused)


def params_of(config, lora=NO_LORA, seed=0, kind="float32"):
    """Random parameters with no bias, scale or adapter at its initial value; layer kernels stored as `kind`."""
    key, layout = jax.random.key(seed), Layout(single_device_mesh(), TRAIN)
    config = tiny.with_lora(config, lora)
    leaves, params = abstract_params(config), init_params(config, key, layout)
    for n, path in enumerate(leaves):
        noise = 0.02 * jax.random.normal(jax.random.fold_in(key, n), params[path].shape)
        params[path] = params[path] + noise
        if kind in ("int8", "nf4") and is_quantisable(path):
            params[path] = quantise(params[path], kind, block_axis(leaves[path].axes))
        elif kind != "float32" and not is_trainable(path, lora):
            params[path] = params[path].astype(BFLOAT16)
    return params


def state_of(config, lora, tx, **options):
    trainable, frozen = partition(params_of(config, lora, **options), lambda path: is_trainable(path, lora))
    layout = Layout(single_device_mesh(), TRAIN)
    return init_state(trainable, tx, abstract_params(tiny.with_lora(config, lora)), layout), frozen


def rms(x, mask=None):
    x = np.asarray(x, np.float64)
    return float(np.sqrt(np.square(x if mask is None else x[mask]).mean()))


def rows_of(rollout):
    """(tokens [B, S], mask, lengths of prompts), right-padded by loops."""
    tokens, mask = np.zeros((ROWS, WIDTH + NEW), np.int32), np.zeros((ROWS, WIDTH + NEW), bool)
    for row in range(ROWS):
        prompt = rollout.prompts[row][rollout.prompt_mask[row]]
        real = np.concatenate([prompt, rollout.tokens[row][rollout.mask[row]]])
        tokens[row, : len(real)], mask[row, : len(real)] = real, True
    return tokens, mask, rollout.prompt_mask.sum(1)


def answer_logits(config, lora, params, rollout, dtype, attention):
    """[B, N, V] logits before each answer token, by one full forward pass without a cache."""
    tokens, mask, starts = rows_of(rollout)

    @jax.jit
    def run(params):
        compute, layout = Compute(dtype, "none", attention=attention), Layout(single_device_mesh(), TRAIN)
        return logits(config, params, bind(tiny.with_lora(config, lora), params)(tokens, mask, compute, layout)[0])

    with jax.default_matmul_precision("highest" if dtype == FLOAT32 else "default"):
        every = np.asarray(run(params), np.float32)
    at = np.minimum(starts[:, None] - 1 + np.arange(NEW), WIDTH + NEW - 1)
    return np.take_along_axis(every, at[..., None], axis=1)


def exact_logits(config, lora, params, rollout):
    """The same logits in float32, with XLA's attention and dense kernels: the reference for bfloat16 rounding."""
    dense = {path: dequantise(leaf, FLOAT32) for path, leaf in params.items()}
    return answer_logits(config, lora, dense, rollout, FLOAT32, "xla")


def logprobs_of(scores, tokens):
    scores = scores.astype(np.float64)
    chosen = np.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
    return chosen - np.log(np.exp(scores).sum(-1))


def answers_of(config, params, lora=NO_LORA, *, temperature, rows=0):
    mesh = single_device_mesh()
    weights = make_publish(tiny.with_lora(config, lora), mesh, BFLOAT16)(params)
    run = make_generate(tiny.decoding(config, SampleConfig(NEW, temperature), EOS, mesh, BFLOAT16, "cudnn"), rows)
    return jax.tree.map(np.asarray, run(weights, *tiny.prompts(config, LENGTHS, WIDTH), jax.random.key(7)))


@in_both_families
def test_greedy_tokens_with_a_kv_cache_are_the_likeliest_without_one(family):
    config = FAMILIES[family]
    params = params_of(config)
    rollout = answers_of(config, params, temperature=0.0)
    whole = answer_logits(config, NO_LORA, params, rollout, BFLOAT16, "cudnn")
    exact = exact_logits(config, NO_LORA, params, rollout)
    error = rms((whole - exact)[rollout.mask])
    assert 0 < error < 0.02 * rms(exact[rollout.mask]), "bfloat16 keeps 8 bits, and there are four layers"
    lost = whole.max(-1) - np.take_along_axis(whole, rollout.tokens[..., None], axis=-1)[..., 0]
    # Two logits, each rounded in both programs, and the worst of about 200 choices: 4 sqrt(2) ALLOWED e.
    assert lost[rollout.mask].max() <= 4 * 2**0.5 * ALLOWED * error
    assert (lost[rollout.mask] == 0).mean() > 0.9, "near ties are few"


class Scored:
    """An engine that samples, scores and makes one update by plain gradient descent."""

    def __init__(self, family, kind, num_micro=1, dtype=BFLOAT16, attention="cudnn"):
        self.config, self.lora = FAMILIES[family], NO_LORA if kind == "float32" else LORA
        critic, tx = tiny.scalar(self.config), optax.sgd(1.0)

        def actor_objective(logprobs, entropy, experience):
            gains, mask = experience.advantages, experience.action_mask
            ratio = jnp.exp(logprobs - experience.logprobs)
            count = jnp.maximum(mask.sum(), 1)
            stats = {"ratio_off": jnp.where(mask, jnp.square(ratio - 1), 0).sum() / count}
            return -jnp.where(mask, ratio * gains, 0).sum() / count, stats

        self.engine = make_hybrid_engine(
            Architectures(tiny.with_lora(self.config, self.lora), critic, self.config, critic),
            dataclasses.replace(ppo_algorithm(PPOConfig()), actor_loss=actor_objective),
            Optimizers(tx, tx),
            Sampling(SampleConfig(NEW), EOS),
            Execution(
                train_layout(single_device_mesh(), 3), Compute(dtype, "layers", 8, attention), num_micro, num_micro
            ),
        )
        actor_state, actor_frozen = state_of(self.config, self.lora, tx, kind=kind)
        critic_state, critic_frozen = state_of(critic, NO_LORA, tx, seed=1)
        reference = {} if self.lora.rank else params_of(self.config, seed=2)
        self.state = EngineState(actor_state, critic_state)
        self.frozen = FrozenParams(actor_frozen, critic_frozen, reference, params_of(critic, seed=3))

    def actor_params(self):
        return self.state.actor.params(self.frozen.actor)

    def sample_rollout(self):
        prompts, weights = tiny.prompts(self.config, LENGTHS, WIDTH), self.engine.publish(self.actor_params())
        return self.engine.generate(weights, *prompts, jax.random.key(7))

    def update(self, experience):
        """({path: change of the actor and critic}, stats)."""
        before = [jax.device_get(jax.tree.map(jnp.copy, x.trainable)) for x in (self.state.actor, self.state.critic)]
        after, stats = self.engine.update(self.state, self.frozen, experience)
        moved = zip((after.actor, after.critic), before, strict=True)
        changes = [{path: np.asarray(s.trainable[path]) - b[path] for path in b} for s, b in moved]
        return changes, jax.device_get(stats)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_sampled_logprobs_equal_the_scored_ones_and_the_first_ratio_is_one(family, kind):
    run = Scored(family, kind)
    rollout = run.sample_rollout()
    experience = run.engine.score(run.state, run.frozen, rollout)
    host, mask = jax.tree.map(np.asarray, rollout), np.asarray(rollout.mask)
    assert len(set(mask.sum(1))) >= 4 and 0 < host.ended.mean() < 1, "answers of several lengths"
    exact = logprobs_of(exact_logits(run.config, run.lora, run.actor_params(), host), host.tokens)
    scored, sampled = np.asarray(experience.logprobs), host.logprobs
    error = max(rms(scored - exact, mask), rms(sampled - exact, mask))
    assert 0 < error < 0.03
    assert rms(sampled - scored, mask) <= ALLOWED * error
    _, stats = run.update(experience)
    assert stats["actor_ratio_off"] ** 0.5 <= ALLOWED * error, "root mean square of ratio - 1"
    assert abs(stats["actor_loss"]) <= ALLOWED * error, "minus the mean of whitened advantages, if all ratios were 1"


def test_one_micro_batch_gives_the_update_of_four_and_of_float32():
    one, four = Scored("opt", "float32"), Scored("opt", "float32", num_micro=4)
    exact = Scored("opt", "float32", dtype=FLOAT32, attention="xla")
    with jax.default_matmul_precision("highest"):
        experience = exact.engine.score(exact.state, exact.frozen, exact.sample_rollout())
        truth, _ = exact.update(experience)
    # With their own old log-probabilities, bfloat16 programs would have ratios that differ from 1 by roundings.
    (first, _), (second, _) = one.update(experience), four.update(experience)
    for want, whole, parts in zip(truth, first, second, strict=True):
        size = np.sqrt(sum(np.square(x).sum() for x in want.values()))
        error, other, apart = (
            np.sqrt(sum(np.square(a[path] - b[path]).sum() for path in want)) / size
            for a, b in ((whole, want), (parts, want), (whole, parts))
        )
        assert size > 0 and 0 < error < 0.1
        assert max(other, apart) <= ALLOWED * error


@in_both_families
def test_states_and_gradients_with_fused_attention_are_as_close_to_float32_as_with_xlas(family):
    config, layout = FAMILIES[family], Layout(single_device_mesh(), TRAIN)
    params = params_of(config)
    tokens, mask = tiny.prompts(config, [64, 1, 40, 17], 64, side="right")

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def run(params, dtype, attention):
        def loss(params):
            compute = Compute(dtype, "layers", attention=attention)
            states = bind(config, params)(tokens, mask, compute, layout)[0].astype(jnp.float32)
            return (jnp.square(states) * jnp.cos(jnp.arange(states.size).reshape(states.shape)))[mask].sum(), states

        (_, states), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return {"states": jnp.where(mask[..., None], states, 0), **grads}

    with jax.default_matmul_precision("highest"):
        truth = jax.device_get(run(params, FLOAT32, "xla"))
    fused, plain = (jax.device_get(run(params, BFLOAT16, attention)) for attention in ("cudnn", "xla"))
    for path, want in truth.items():
        if not rms(want):
            continue
        mine, its = (rms(got[path] - want) / rms(want) for got in (fused, plain))
        # The key bias has no gradient except roundings: attention does not change when all keys move equally.
        if not path.endswith("k/bias"):  # losing half a gradient gives 0.5, an unrelated one 1.4
            assert 0 < its < 0.2 and mine <= ALLOWED * its, f"{path}: {mine:.4f} fused, {its:.4f} not fused"


@in_both_families
def test_slot_refill_gives_the_greedy_answers_of_one_batch(family):
    config = FAMILIES[family]
    params = params_of(config)
    once, refilled = (answers_of(config, params, temperature=0.0, rows=rows) for rows in (0, 4))
    exact = exact_logits(config, NO_LORA, params, once)
    error = rms((answer_logits(config, NO_LORA, params, once, BFLOAT16, "cudnn") - exact)[once.mask])
    assert refilled.steps.max() > once.steps.max() and len(set(once.mask.sum(1))) >= 3, (
        "slots become free at different times"
    )
    same = (once.tokens == refilled.tokens).all(1)
    assert same.mean() >= 0.5
    for row in np.flatnonzero(~same):  # matmuls of 4 and 16 rows may sum in different orders: a near tie flipped
        at = int(np.argmax(once.tokens[row] != refilled.tokens[row]))
        tie = exact[row, at][[once.tokens[row, at], refilled.tokens[row, at]]]
        assert abs(tie[0] - tie[1]) <= 4 * 2**0.5 * ALLOWED * error, f"row {row} differs at token {at}"
