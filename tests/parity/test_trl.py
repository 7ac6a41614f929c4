"""The losses and gradients of DPO, GRPO and RLOO equal those of TRL on the same weights and the same answers."""

import dataclasses

import numpy as np
import optax
import pytest
from checkpoints import build, load, torch, transformers
from tiny_tokenizer import gpt2_like

from rlhf_jax.data.batches import Batch
from rlhf_jax.decode import Rollout
from rlhf_jax.engine import EngineState, FrozenParams, Optimizers
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.pretrained import from_pretrained, save_pretrained
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.dpo import DPOConfig, dpo_objective
from rlhf_jax.stages.grpo import grpo_engine
from rlhf_jax.stages.grpo_config import GRPOConfig
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.reference import Reference
from rlhf_jax.train_step import init_state, make_update

trl = pytest.importorskip("trl", minversion="1.16")
datasets = pytest.importorskip("datasets")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SETTINGS = dict(
    model_type="llama",
    vocab_size=360,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=40,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=1,
)
# The plain gradient: parameters before an update minus those after it.
STEP = optax.sgd(1.0)
N, GROUP = 6, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of random models of one architecture, the policy and its reference, with a tokenizer."""
    folder = tmp_path_factory.mktemp("trl")
    for seed, name in enumerate(("policy", "reference")):
        model = build(SETTINGS, seed=seed)
        # The first norm divides by their size: from small ones the gradient has the rounding of all layers, enlarged.
        model.get_input_embeddings().weight.data *= 16
        model.save_pretrained(folder / name)
        gpt2_like(pad_token="<s>").save_pretrained(folder / name)
    return folder


def torch_models(folders):
    return [load(transformers.AutoModelForCausalLM, folders / name).train() for name in ("policy", "reference")]


def arguments(folder, config, **settings):
    """TRL's arguments for one step on a CPU."""
    shared = dict(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)
    return config(per_device_train_batch_size=8, gradient_accumulation_steps=1, **shared, **settings)


def assert_same(theirs, loss, ours, before, after, folder):
    """The losses are equal, and after - before is minus the gradient of every weight of the torch model."""
    theirs.zero_grad()
    loss.backward()
    assert float(ours) == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    gradient = {path: before.params[path] - leaf for path, leaf in after.items()}
    save_pretrained(dataclasses.replace(before, params=gradient), folder)
    found = dict(load(transformers.AutoModelForCausalLM, folder).named_parameters())
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(each.abs().max().item() for each in expected.values())
    assert largest > 1e-3
    for name, each in expected.items():
        assert (found[name] - each).abs().max().item() <= 1e-5 * max(largest, 1.0), name


def preference_batch():
    """Eight pairs of ragged answers to a prompt of three tokens."""
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(4, 360, (8, 2, 14), np.int32), rng.integers(4, 15, (8, 2, 1))
    mask = np.arange(14) < lengths
    return Batch(np.where(mask, tokens, 0), mask, mask & (np.arange(14) >= 3))


@pytest.mark.parametrize(("name", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)])
def test_the_loss_and_gradient_of_dpo(name, smoothing, folders, tmp_path):
    batch, (policy, reference) = preference_batch(), torch_models(folders)
    both = [
        torch.tensor(np.concatenate([each[:, 0], each[:, 1]])) for each in (batch.tokens, batch.mask, batch.loss_mask)
    ]
    rows = datasets.Dataset.from_list([{"prompt": "Please add 3 and 4.", "chosen": " 7", "rejected": " 8"}] * 8)
    # TRL 1.16 ignores its label_smoothing with "sigmoid".
    args = arguments(tmp_path / "out", trl.DPOConfig, loss_type=[name], beta=0.3)
    tokenizer = gpt2_like(pad_token="<s>")
    trainer = trl.DPOTrainer(policy, reference, args=args, train_dataset=rows, processing_class=tokenizer)
    keys = ("input_ids", "attention_mask", "completion_mask")
    loss = trainer._compute_loss(trainer.model, dict(zip(keys, (each.long() for each in both), strict=True)), False)

    model, settings = from_pretrained(folders / "policy"), DPOConfig(loss=name, beta=0.3, label_smoothing=smoothing)
    layout, compute = model.layout, Compute(np.dtype("float32"), "none", 4)
    objective, leaves = dpo_objective(model.config, compute, layout, settings), abstract_params(model.config)
    values = Reference(objective.reference, from_pretrained(folders / "reference").params, layout)(batch)
    state = init_state(dict(model.params), STEP, leaves, layout)
    update = make_update(objective.loss, STEP, leaves, layout, 2)
    before = from_pretrained(folders / "policy")
    state, stats = update(state, {}, layout.put_batch(dataclasses.replace(batch, reference=values)))
    if smoothing:  # -log sigmoid(-d) is -log sigmoid(d) + d, so smoothing adds its share of the mean margin
        assert float(stats["loss"]) == pytest.approx(loss.item() + smoothing * float(stats["margin"]), rel=1e-5)
    else:
        assert_same(policy, loss, stats["loss"], before, state.trainable, tmp_path / "gradients")


FAMILY = {
    "grpo": (dict(scale="sequence"), dict(loss_type="grpo")),
    "grpo-kl": (dict(scale="sequence", kl_coef=0.2), dict(loss_type="grpo", beta=0.2)),
    "dapo": (dict(scale="token", clip_high=0.35), dict(loss_type="dapo", epsilon_high=0.35)),
    "dr-grpo": (dict(scale="constant", advantage="group_mean"), dict(loss_type="dr_grpo")),
    "gspo": (dict(scale="sequence", ratio="sequence"), dict(loss_type="grpo", importance_sampling_level="sequence")),
    "cispo": (dict(surrogate="cispo", clip_high=0.3), dict(loss_type="cispo", epsilon_high=1.3)),
    "rloo": (dict(scale="sequence", ratio="product", advantage="leave_one_out"), None),
}


def group_rollout():
    """Two groups of four ragged answers."""
    rng = np.random.default_rng(1)
    prompt_mask = np.arange(5) >= np.repeat([2, 0], GROUP)[:, None]
    prompts = np.where(prompt_mask, np.repeat(rng.integers(4, 360, (2, 5)), GROUP, axis=0), 0).astype(np.int32)
    mask = np.arange(N) < np.array([6, 1, 3, 2, 5, 6, 4, 1])[:, None]
    tokens = np.where(mask, rng.integers(4, 360, (8, N)), 0).astype(np.int32)
    return Rollout(prompts, prompt_mask, tokens, mask, 0.0 * mask, mask.sum(1) < N, 0.0 * mask, mask.sum(1))


@pytest.mark.parametrize("name", FAMILY)
def test_the_loss_and_gradient_of_groups(name, folders, tmp_path):
    own, options = FAMILY[name]
    rollout, model = group_rollout(), from_pretrained(folders / "policy")
    config = GRPOConfig(
        ("a:b",), rollout_batch_size=2, micro_batch_size=4, sample=SampleConfig(N, num_samples=GROUP), **own
    )
    settings = ModelConfig(dtype="float32", remat="none", logprob_chunk=4)
    engine = grpo_engine(config, settings, model.config, None, Optimizers(STEP), (1,), model.layout)
    state = init_state(dict(model.params), STEP, abstract_params(model.config), model.layout)
    reference = from_pretrained(folders / "reference").params if config.kl_coef else {}
    state, frozen = EngineState(state), FrozenParams({}, reference=reference)
    experience = engine.score(state, frozen, rollout, np.random.default_rng(2).normal(size=8))
    noise = np.random.default_rng(3).normal(0, 0.3, rollout.mask.shape).astype(np.float32)
    experience = dataclasses.replace(experience, logprobs=experience.logprobs + noise)
    inputs = {
        "prompt_ids": rollout.prompts,
        "prompt_mask": rollout.prompt_mask,
        "completion_ids": rollout.tokens,
        "completion_mask": rollout.mask,
    }
    inputs = {key: torch.tensor(np.asarray(value)).long() for key, value in inputs.items()}
    old = torch.tensor(np.where(rollout.mask, np.asarray(experience.logprobs), 0.0))
    inputs |= {
        "old_per_token_logps": old,
        "old_logps": old.sum(dim=1),
        "num_items_in_batch": torch.tensor(rollout.mask.sum()),
    }
    inputs["advantages"] = torch.tensor(np.asarray(experience.advantages)[:, 0])
    if config.kl_coef:
        inputs["ref_per_token_logps"] = torch.tensor(np.asarray(experience.ref_logprobs))

    policy, _ = torch_models(folders)
    policy.config._name_or_path = str(folders / "policy")
    rows = datasets.Dataset.from_list([{"prompt": "Please add 3 and 4."}] * 8)
    kind, trainer_kind = (trl.RLOOConfig, trl.RLOOTrainer) if options is None else (trl.GRPOConfig, trl.GRPOTrainer)
    args = arguments(
        tmp_path / "out", kind, num_generations=GROUP, max_completion_length=N, **(options or {"beta": 0.0})
    )
    given = dict(args=args, train_dataset=rows, processing_class=gpt2_like(pad_token="<s>"))
    trainer = trainer_kind(policy, reward_funcs=lambda completions, **rest: [0.0] * len(completions), **given)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs)
    before = from_pretrained(folders / "policy")
    state, stats = engine.update(state, frozen, experience)
    assert_same(policy, loss, stats["actor_loss"], before, state.actor.trainable, tmp_path / "gradients")
