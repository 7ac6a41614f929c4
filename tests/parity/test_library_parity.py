"""The library's gradients and exports equal those of torch transformers on the same weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import checkpoint, load, torch, transformers

import rlhf_jax
from rlhf_jax.models.pretrained import save_pretrained
from rlhf_jax.objectives import grpo, masked

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
LORA = rlhf_jax.LoraConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "model"
    checkpoint("llama", path)
    return path


def ragged_batch(vocab):
    rng, rows = np.random.default_rng(0), []
    for size in (12, 7, 9, 3, 10, 5, 12, 8):
        prompt = int(rng.integers(1, size - 1))
        mask = [0] * prompt + [1] * (size - prompt)
        old = np.where(np.array(mask) == 1, rng.uniform(-6, -3, size), 0)
        rows.append(dict(tokens=rng.integers(3, vocab, size), loss_mask=mask, old=old, gain=float(rng.normal())))
    return rlhf_jax.pad_rows(rows, 16)


def loss(logprobs, batch):
    """Clipped policy gradient with an unbiased KL to the sampled tokens."""
    mask = batch["loss_mask"]
    ratio = grpo.log_ratios(logprobs, batch["old"], mask, "token")
    losses = grpo.clipped_losses(ratio, batch["gain"][:, None], low=0.2, high=0.28)
    return masked.mean(losses + 0.1 * (jnp.exp(-ratio) - 1 + ratio), mask), {}


def torch_loss(model, batch):
    tokens, mask, gain = (torch.tensor(batch[name]) for name in ("tokens", "mask", "gain"))
    logits = model(input_ids=tokens.long(), attention_mask=mask.long()).logits
    chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None].long())[..., 0]
    learned = torch.tensor(batch["loss_mask"][:, 1:])
    log_ratio = torch.where(learned, chosen - torch.tensor(batch["old"][:, 1:]), 0.0)
    ratio, gain = log_ratio.exp(), gain[:, None]
    losses = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.28) * gain) + 0.1 * ((-log_ratio).exp() - 1 + log_ratio)
    return (losses * learned).sum() / learned.sum()


def test_the_gradient_of_every_weight_equals_torch_over_calls_and_micro_batches(folder, tmp_path):
    theirs = load(transformers.AutoModelForCausalLM, folder)
    batch = ragged_batch(theirs.config.vocab_size)
    expected = torch_loss(theirs, batch)
    expected.backward()
    model = rlhf_jax.from_pretrained(folder)
    engine = rlhf_jax.make_engine(model, optax.sgd(1.0), micro_batch_size=2)
    state = engine.init(model)
    for rows in (slice(0, 2), slice(2, 8)):
        state, _ = engine.forward_backward(state, {name: array[rows] for name, array in batch.items()}, loss)
    state, step = engine.optim_step(state)
    assert float(step["loss"]) == pytest.approx(expected.item(), rel=1e-5)
    moved = {path: model.params[path] - leaf for path, leaf in state.params.items()}
    save_pretrained(dataclasses.replace(model, params=moved), tmp_path / "gradient")
    found = dict(load(transformers.AutoModelForCausalLM, tmp_path / "gradient").named_parameters())
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(each.abs().max().item() for each in gradients.values())
    assert largest > 0.01
    for name, each in gradients.items():
        assert (found[name] - each).abs().max().item() <= 1e-5 * max(largest, 1.0), name


@pytest.mark.parametrize("lora", [rlhf_jax.LoraConfig(), LORA], ids=["whole", "lora"])
def test_an_export_has_the_logits_of_the_policy_in_transformers_and_peft(folder, tmp_path, lora):
    model = rlhf_jax.from_pretrained(folder)
    engine = rlhf_jax.make_engine(model, optax.adam(0.01), lora=lora)
    state, batch = engine.init(model), ragged_batch(model.config.vocab_size)
    for _ in range(2):
        state, _ = engine.forward_backward(state, batch, loss)
        state, _ = engine.optim_step(state)
    engine.export(state, tmp_path / "whole")
    models = [load(transformers.AutoModelForCausalLM, tmp_path / "whole")]
    if lora.rank:
        engine.export(state, tmp_path / "adapter", adapter=True)
        base = load(transformers.AutoModelForCausalLM, folder)
        models.append(peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval())
    ours = engine.score(state, batch)
    assert np.abs(ours - engine.score(model, batch)).max() > 0.1
    for theirs in models:
        with torch.no_grad():
            inputs = {
                "input_ids": torch.tensor(batch["tokens"]).long(),
                "attention_mask": torch.tensor(batch["mask"]).long(),
            }
            logits = theirs(**inputs).logits
        chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0].numpy()
        np.testing.assert_allclose(ours[:, 1:], np.where(batch["mask"][:, 1:], chosen, 0), atol=2e-5)
    trained = rlhf_jax.from_pretrained(tmp_path / "whole")
    logits = np.asarray(rlhf_jax.apply(trained, batch["tokens"], batch["mask"]))
    with torch.no_grad():
        found = models[0](**inputs).logits.numpy()
    np.testing.assert_allclose(found[batch["mask"]], logits[batch["mask"]], atol=1e-4)
