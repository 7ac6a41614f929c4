"""Every family and every option of its checkpoints: read, compute, generate, train, adapt, score, write."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    EOS,
    VARIANTS,
    assert_close,
    checkpoint,
    chosen_experts,
    load,
    padded_rows,
    torch,
    torch_inputs,
    torch_logits,
    transformers,
)

from rlhf_jax.mesh import MeshConfig, make_mesh
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params, bind, head_kernel, head_options, logits
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.lora import LoraConfig, is_adapter, merge_adapters
from rlhf_jax.models.pretrained import (
    apply,
    from_pretrained,
    reward_from_pretrained,
    save_pretrained,
    score,
)
from rlhf_jax.objectives.logprobs import token_logprobs
from rlhf_jax.objectives.masked import mean
from rlhf_jax.rollout import sample_answers
from rlhf_jax.sampling import SampleConfig

pytestmark = pytest.mark.parity

SIDES = ("none", "left", "right")
NEW_TOKENS = 10
LORA = LoraConfig(rank=4, alpha=8.0)
# One example per family: its first variant, and variants whose heads, norms or experts divide differently.
FIRST = {settings["model_type"]: name for name, settings in reversed(VARIANTS.items())}
SOME = [
    *FIRST.values(),
    "opt-350m",
    "llama-mqa",
    "falcon-40b",
    "bloom-twelve-heads-untied",
    "olmo2-tied",
    "stablelm-parallel",
    "mixtral-window",
]
# A head with a bias, one key-value head, alternating pairs of norms, experts.
LEARN_ON_EIGHT = ["gptj", "falcon-7b", "gemma2", "mixtral-window", "qwen3_moe-raw"]


class Variant:
    """A checkpoint on disk, its torch model and this package's."""

    def __init__(self, name: str, folder: Path):
        self.name, self.family, self.source = name, FAMILIES[VARIANTS[name]["model_type"]], folder / "source"
        self.theirs = checkpoint(name, self.source)
        self.model = from_pretrained(self.source)

    def rows(self, side: str):
        return padded_rows(side, self.theirs.config.vocab_size)

    @functools.cached_property
    def prompts(self):
        lengths = np.minimum((12, 7, 3, 1), self.model.config.max_positions - NEW_TOKENS)
        return padded_rows("left", self.theirs.config.vocab_size, lengths)

    def torch_answers(self):
        """Greedy (tokens, mask); asserts that every token is the likeliest by a clear margin."""
        prompts, mask = self.prompts
        inputs = dict(input_ids=torch.tensor(prompts), attention_mask=torch.tensor(mask.astype(np.int64)))
        options = dict(do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True)
        answered = self.theirs.generate(**inputs, **options)
        tokens = answered.sequences[:, prompts.shape[1] :].numpy()
        real = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) == 0
        ranked = np.sort(torch.stack(answered.logits, dim=1).numpy(), axis=-1)
        assert (ranked[..., -1] - ranked[..., -2])[real].min() > 1e-3, "rounding could swap tokens: choose another seed"
        assert len(np.unique(tokens[real])) > 5, "repeated tokens test little: choose another seed"
        return tokens, real


def load_once(name, tmp_path_factory):
    yield Variant(name, tmp_path_factory.mktemp(name))
    jax.clear_caches()  # hundreds of programs that no other variant uses


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    yield from load_once(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=SOME)
def example(request, tmp_path_factory):
    yield from load_once(request.param, tmp_path_factory)


@functools.cache
def eight_devices():
    return make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices()[:8])


def assert_same_answers(model, variant):
    """Asserts that the greedy answers equal those of transformers."""
    sample = SampleConfig(max_new_tokens=NEW_TOKENS, temperature=0.0)
    rollout = sample_answers(model, *variant.prompts, sample, jax.random.key(0))
    ours, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    theirs, real = variant.torch_answers()
    length = real.shape[1]  # less than NEW_TOKENS if every answer has ended earlier
    np.testing.assert_array_equal(mask[:, :length], real)
    assert not mask[:, length:].any()
    np.testing.assert_array_equal(ours[:, :length][real], theirs[real])


def next_token_loss(config, params, ids, mask, layout=None):
    """The SFT loss on all tokens except the first of right-padded rows."""
    decoder = bind(config, params)
    hidden, balance = decoder(ids, mask, Compute(jnp.float32, "layers"), layout)
    options = head_options(config, params)
    logprobs = token_logprobs(hidden[:, :-1], head_kernel(config, params), ids[:, 1:], chunk=4, **options)
    return -mean(logprobs, mask[:, 1:]) + balance


@functools.lru_cache
def gradient_program(config, layout):
    def gradient(params, ids, mask):
        return jax.value_and_grad(functools.partial(next_token_loss, config, layout=layout))(params, ids=ids, mask=mask)

    return jax.jit(gradient)


def test_logits_equal_transformers_with_padding_on_either_side(variant):
    for side in SIDES:
        ids, mask = variant.rows(side)
        ours, reference = np.asarray(apply(variant.model, ids, mask)), torch_logits(variant.theirs, ids, mask)
        assert np.isfinite(ours).all(), side
        chosen_experts(variant.theirs, ids, mask, mask)
        # Three times the largest rounding error of any variant; the smallest difference, of the two GELUs, is 2e-4.
        assert_close(ours[mask], reference[mask], relative=5e-5)


def test_an_export_is_bit_equal_to_the_imported_checkpoint(variant, tmp_path):
    save_pretrained(variant.model, tmp_path / "copy")
    exported = load(transformers.AutoModelForCausalLM, tmp_path / "copy")
    assert type(exported) is type(variant.theirs) and type(exported).__name__ == variant.family.causal
    ids, mask = variant.rows("left")
    np.testing.assert_array_equal(torch_logits(exported, ids, mask), torch_logits(variant.theirs, ids, mask))
    source, copy = (json.loads((folder / "config.json").read_text()) for folder in (variant.source, tmp_path / "copy"))
    # Older spellings are added for other programs; what the source says is unchanged.
    assert {key for key in source if source[key] != copy.get(key)} <= {"transformers_version"}


def test_greedy_answers_with_the_kv_cache_equal_those_of_transformers(variant):
    assert_same_answers(variant.model, variant)


def test_the_gradient_of_every_weight_equals_torch_and_reaches_every_weight_in_use(variant, tmp_path):
    config, params = variant.model.config, variant.model.params
    ids, mask = variant.rows("right")
    loss, gradients = gradient_program(config, None)(params, ids, mask)

    inputs = torch_inputs(variant.theirs, ids, mask) | {"labels": torch.tensor(np.where(mask, ids, -100))}
    reference = variant.theirs(**inputs, **({"output_router_logits": True} if config.experts else {})).loss
    variant.theirs.zero_grad()
    reference.backward()
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)
    # Written as a checkpoint and read by transformers, the gradients have its names and shapes.
    save_pretrained(dataclasses.replace(variant.model, params=gradients), tmp_path / "gradients")
    ours = dict(load(transformers.AutoModelForCausalLM, tmp_path / "gradients").named_parameters())
    theirs = {name: parameter.grad for name, parameter in variant.theirs.named_parameters()}
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in theirs.items():
        # Gradients that cancel in softmax (below) are zero except for rounding; the floor is 1e-6 of the largest.
        scale = max(2e-4 * gradient.abs().max().item(), 1e-6 * largest)
        assert (ours[name] - gradient).abs().max().item() <= scale, name

    learns = mask & (np.cumsum(mask, axis=1) < mask.sum(axis=1, keepdims=True))  # all except the last token of a row
    seen = mask if config.experts else learns  # the loss that balances the routers counts the last token too
    took_part = np.zeros(config.padded_vocab, bool)
    took_part[ids[seen]] = True
    if config.experts:
        experts = chosen_experts(variant.theirs, ids, mask, seen)
        experts[-1] = chosen_experts(variant.theirs, ids, mask, learns)[-1]  # no router follows these
    for path, gradient in gradients.items():
        gradient = np.abs(np.asarray(gradient))
        if path == "embed/tokens":
            # A tied head gets a gradient for every possible next token, but never for the padding of the vocabulary.
            real = took_part | (config.tied & (np.arange(config.padded_vocab) < config.vocab_size))
            np.testing.assert_array_equal(gradient.any(axis=1), real)
        elif path.startswith("head/"):
            rows = gradient.reshape(config.padded_vocab, -1).any(axis=1)
            np.testing.assert_array_equal(rows, np.arange(config.padded_vocab) < config.vocab_size)
        elif path == "embed/positions":
            used = np.arange(config.position_rows) - config.position_offset
            np.testing.assert_array_equal(gradient.any(axis=1), (used >= 0) & (used < learns.sum(axis=1).max()))
        elif path == "layers/attention/k/bias" and config.rope is None and config.qk_norm == "none":
            # It adds the same to every score of a query, which cancels in softmax unless keys are rotated or normed.
            assert not config.attention_softcap and gradient.max() <= 1e-6 * largest
        elif "/experts/" in path:
            np.testing.assert_array_equal(gradient.any(axis=(2, 3)), experts, err_msg=path)
        else:
            layers = gradient if path.startswith("layers/") else gradient[None]
            assert (layers.reshape(len(layers), -1).max(axis=1) > 1e-5 * largest).all(), path


@pytest.mark.parametrize("name", LEARN_ON_EIGHT)
def test_the_gradient_on_eight_devices_equals_that_on_one(name, tmp_path):
    variant = Variant(name, tmp_path)
    config, (ids, mask) = variant.model.config, variant.rows("right")
    loss, gradients = gradient_program(config, None)(variant.model.params, ids, mask)
    sharded = from_pretrained(variant.source, mesh=eight_devices())
    loss8, gradients8 = gradient_program(config, sharded.layout)(sharded.params, *sharded.layout.put_batch((ids, mask)))
    np.testing.assert_allclose(loss8, loss, rtol=1e-5)
    largest = max(np.abs(gradient).max() for gradient in map(np.asarray, gradients.values()))
    for path, gradient in gradients.items():
        scale = max(np.abs(np.asarray(gradient)).max(), 1e-2 * largest)
        np.testing.assert_allclose(gradients8[path], gradient, atol=1e-4 * scale, rtol=0, err_msg=path)


def test_eight_devices_hold_shards_and_give_the_same_answers(example):
    model = from_pretrained(example.source, mesh=eight_devices())
    for path, leaf in abstract_params(model.config).items():
        shards = model.params[path].addressable_shards
        split = 8 if any(model.layout.spec(leaf.axes)) else 1
        assert len(shards) == 8 and all(shard.data.size == model.params[path].size // split for shard in shards), path
        assert split == 8 or np.prod(leaf.shape) < 2**11, f"{path} is replicated although it is large"
    assert_same_answers(model, example)


def test_merged_adapters_equal_separate_adapters(example):
    config, (ids, mask) = example.model.config, example.rows("right")
    rng, leaves = np.random.default_rng(0), abstract_params(dataclasses.replace(config, lora=LORA))
    # Larger adapters sharpen attention until rounding alone, one unit in every kernel, exceeds the 1e-5 below.
    adapters = {path: 0.1 * rng.standard_normal(leaf.shape) for path, leaf in leaves.items() if is_adapter(path)}
    params = example.model.params | {path: jnp.asarray(leaf, jnp.float32) for path, leaf in adapters.items()}

    @jax.jit
    def logits_with_adapters(params, ids, mask):
        decoder = bind(dataclasses.replace(config, lora=LORA), params)
        return logits(config, params, decoder(ids, mask, Compute(jnp.float32, "none"))[0])

    extra = np.asarray(logits_with_adapters(params, ids, mask))[mask]
    merged = dataclasses.replace(example.model, params=merge_adapters(params, LORA))
    base = np.asarray(apply(example.model, ids, mask))[mask]
    assert (np.abs(extra - base).max(axis=-1) > 1e-2 * np.abs(base).max(axis=-1)).mean() > 0.9
    # Kernels that differ by one rounding give up to 2e-5.
    assert_close(np.asarray(apply(merged, ids, mask))[mask], extra, relative=5e-5)


def test_scores_equal_transformers_and_are_unchanged_by_an_export(example, tmp_path):
    """Compares with ...ForSequenceClassification, or, for a family without that class, with a re-read export."""
    if example.family.scalar is None:
        scorer = reward_from_pretrained(example.source)
    else:
        theirs = checkpoint(example.name, tmp_path / "source", scalar_head=True)
        assert type(theirs).__name__ == example.family.scalar
        scorer = reward_from_pretrained(tmp_path / "source")
    save_pretrained(scorer, tmp_path / "copy")
    again = reward_from_pretrained(tmp_path / "copy")
    if example.family.scalar is not None:
        exported = load(transformers.AutoModelForSequenceClassification, tmp_path / "copy")
        assert type(exported) is type(theirs) and exported.config.num_labels == 1
    for side in SIDES:
        ids, mask = example.rows(side)
        ours = np.asarray(score(scorer, ids, mask))
        assert ours.shape == (len(ids),) and np.unique(ours).size == len(ids)
        np.testing.assert_array_equal(score(again, ids, mask), ours)
        if example.family.scalar is not None:
            reference = torch_logits(theirs, ids, mask)[:, 0]
            assert_close(ours, reference)
            np.testing.assert_array_equal(torch_logits(exported, ids, mask)[:, 0], reference)


def test_a_base_model_saved_without_its_prefix_gives_the_same_scores(example, tmp_path):
    example.theirs.base_model.save_pretrained(tmp_path / "base")
    ids, mask = example.rows("right")
    whole, base = (score(reward_from_pretrained(path), ids, mask) for path in (example.source, tmp_path / "base"))
    np.testing.assert_array_equal(whole, base)


def test_every_family_has_a_variant_and_exports_the_class_names_of_transformers():
    assert {settings["model_type"] for settings in VARIANTS.values()} == FAMILIES.keys()
    auto = transformers.models.auto.modeling_auto
    for name, family in FAMILIES.items():
        assert family.causal == auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
        assert family.scalar == auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(name)
