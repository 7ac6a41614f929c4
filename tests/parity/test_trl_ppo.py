"""The losses and gradients of PPO equal what TRL 1.9.2's PPOTrainer gave for the same weights and answers.

benchmarks/peers/trl_ppo.py wrote those, with an environment of its own: TRL 1.16 has no PPOTrainer.
"""

import base64
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import load, transformers

from benchmarks import provenance
from benchmarks.peers import ppo_case
from rlhf_jax.decode import Rollout
from rlhf_jax.engine import Optimizers, ScoredRollout
from rlhf_jax.models.pretrained import from_pretrained, reward_from_pretrained, save_pretrained
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.ppo import ppo_engine, ppo_models
from rlhf_jax.stages.ppo_config import PPOConfig
from rlhf_jax.stages.ppo_losses import estimate

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
(RUN,) = json.loads((provenance.RESULTS / "trl_ppo.json").read_text())
# The plain gradient: parameters before an update minus those after it.
STEP = optax.sgd(1.0)


def decode(text, *shape):
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(shape)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    for name in ppo_case.MODELS:
        ppo_case.torch_model(name).save_pretrained(folder / name)
    return folder


def make_rollout(settings):
    tokens, prompts = ppo_case.answers(settings).astype(np.int32), ppo_case.prompts().astype(np.int32)
    mask, nothing = tokens != ppo_case.PAD, np.zeros(tokens.shape, np.float32)
    ended = (tokens == ppo_case.EOS).any(axis=1)
    return Rollout(prompts, prompts != ppo_case.PAD, tokens, mask, nothing, ended, nothing, mask.sum(1))


def make_engine(settings, folders):
    """The engine, its state and frozen parameters, and the configuration of TRL's settings."""
    config = PPOConfig(
        rollout_batch_size=ppo_case.ROWS,
        micro_batch_size=ppo_case.ROWS // 2,
        kl_coef=settings.kl_coef,
        kl_estimator=settings.estimator,
        score_clip=1e6,
        missing_eos_penalty=settings.missing_eos_penalty,
        gamma=settings.gamma,
        lam=settings.lam,
        clip=settings.clip,
        value_clip=settings.value_clip,
        sample=SampleConfig(ppo_case.ANSWER, temperature=settings.temperature),
    )
    policy, reference = (from_pretrained(folders / name) for name in ("policy", "reference"))
    value, reward = (reward_from_pretrained(folders / name) for name in ("value", "reward"))
    model, optimizers = ModelConfig(dtype="float32", remat="none", logprob_chunk=4), Optimizers(STEP, STEP)
    engine = ppo_engine(config, model, policy.config, value.config, optimizers, (ppo_case.EOS,), policy.layout)
    state, frozen = ppo_models(policy, value, model, optimizers, 0, config)
    return engine, state, dataclasses.replace(frozen, reference=reference.params, reward=reward.params), config


def assert_gradient(after, before, expected, folder, kind):
    """before - after is the gradient of every weight that TRL's optimizer was given."""
    gradient = {path: before.params[path] - leaf for path, leaf in after.items()}
    save_pretrained(dataclasses.replace(before, params=gradient), folder)
    found = {name: each.detach().numpy() for name, each in load(kind, folder).named_parameters()}
    wanted = {name: decode(text, *found[name].shape) for name, text in expected.items()}
    largest = max(np.abs(each).max() for each in wanted.values())
    assert found.keys() == wanted.keys() and largest > 1e-2
    for name, each in wanted.items():
        assert np.abs(found[name] - each).max() <= 1e-5 * max(largest, 1.0), name


@pytest.mark.parametrize("case", ppo_case.CASES)
def test_the_losses_and_gradients_of_ppo_from_scores_to_weights(case, folders, tmp_path):
    settings, found = ppo_case.CASES[case], RUN["result"]["cases"][case]
    assert RUN["result"]["packages"][0] == "trl==1.9.2"
    rollout, shape = make_rollout(settings), (ppo_case.ROWS, ppo_case.ANSWER)
    engine, state, frozen, config = make_engine(settings, folders)
    experience = engine.score(state, frozen, rollout)
    old = {"logprobs": decode(found["old_logprobs"], *shape), "values": decode(found["old_values"], *shape)}
    fields = [field.name for field in dataclasses.fields(ScoredRollout)]
    scored = ScoredRollout(**{name: getattr(experience, name) for name in fields} | old)
    rewards, advantages, returns = estimate(scored, config)
    count = int(rollout.mask.sum())
    # TRL divides by the standard deviation over n - 1 tokens, we by that over n.
    advantages = advantages * np.sqrt((count - 1) / count)
    estimates = dict(rewards=rewards, advantages=advantages, returns=returns)
    experience = dataclasses.replace(experience, **old, **estimates)
    if settings.ended:  # TRL's critic also learns the score as the value after an answer that ended
        score = scored.score - settings.missing_eos_penalty * ~rollout.ended
        lengths = rollout.mask.sum(axis=1, keepdims=True)
        counted = np.arange(ppo_case.ANSWER) <= lengths
        assert counted.sum() == count + 5
        returns = jnp.where(rollout.mask, returns, score[:, None])
        critic_experience = dataclasses.replace(experience, action_mask=counted, returns=returns)
    else:
        critic_experience = experience
    state, stats = engine.update(state, frozen, experience, models=("actor",))
    state, critic_stats = engine.update(state, frozen, critic_experience, models=("critic",))
    stats |= critic_stats

    for ours, theirs in [("actor_loss", "policy_loss"), ("critic_loss", "value_loss")]:
        assert float(stats[ours]) == pytest.approx(found[theirs], rel=1e-5), ours
    for ours, theirs in [("actor_clip_fraction", "policy_clipped"), ("critic_clip_fraction", "value_clipped")]:
        assert float(stats[ours]) == pytest.approx(found[theirs], abs=1e-6) and found[theirs] > 0.05, ours
    actor, critic = from_pretrained(folders / "policy"), reward_from_pretrained(folders / "value")
    kinds = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    gradients = found["gradients"]
    assert_gradient(state.actor.trainable, actor, gradients["policy"], tmp_path / "actor", kinds[0])
    assert_gradient(state.critic.trainable, critic, gradients["value"], tmp_path / "critic", kinds[1])
