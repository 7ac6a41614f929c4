"""Frequencies of rotary embeddings against values by hand and the functions of transformers."""

import math

import numpy as np
import pytest

from rlhf_jax.models.families.rope import rope, rope_parameters, rotary_dim

LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SHORT, LONG = [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 48.0, 64.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}


def config(scaling=None, positions=2048, **keys):
    return {"model_type": "llama", "max_position_embeddings": positions, "rope_scaling": scaling} | keys


def test_without_scaling_the_frequencies_decrease_geometrically_from_one():
    rotary, positions = rope(config(), 8, theta=10000.0)
    np.testing.assert_allclose(rotary.frequencies, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    assert (rotary.factor, rotary.interleaved, positions) == (1.0, False, 2048)
    assert rope(config(), 8, interleaved=True)[0].interleaved
    assert rope({"model_type": "gptj"}, 8, positions=77)[1] == 77


@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        ({}, 100.0),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 500000}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, 5e5),
        ({"rope_theta": None, "rope_parameters": None}, 100.0),
    ],
)
def test_theta_is_read_in_its_old_and_new_spelling(keys, theta):
    rotary, _ = rope(config() | keys, 4, theta=100.0)
    np.testing.assert_allclose(rotary.frequencies, [1.0, theta**-0.5], rtol=1e-6)


def test_a_scaling_is_read_in_its_old_and_new_spelling():
    old = config({"type": "linear", "factor": 2.0}, rope_theta=100.0)
    new = config() | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}}
    assert rope(old, 8) == rope(new, 8)
    np.testing.assert_allclose(rope(old, 4)[0].frequencies, [0.5, 0.05], rtol=1e-6)


def test_either_spelling_of_the_partial_rotary_factor_is_read():
    assert rotary_dim(config(), 80) == 80
    assert rotary_dim(config(), 80, 0.25) == 20
    assert rotary_dim(config(partial_rotary_factor=0.5), 80, 0.25) == 40
    inner = config(partial_rotary_factor=0.5) | {"rope_parameters": {"partial_rotary_factor": 0.4}}
    assert rotary_dim(inner, 80, 0.25) == 32
    assert rope_parameters(inner) == {"partial_rotary_factor": 0.4, "rope_theta": None, "rope_type": "default"}


def test_dynamic_scaling_has_no_effect_up_to_the_trained_positions():
    assert rope(config({"type": "dynamic", "factor": 4.0}), 16) == rope(config(), 16)


def test_llama_3_keeps_short_wavelengths_and_divides_long_ones():
    plain, scaled = (
        np.array(rope(config(scaling, 131072, rope_theta=5e5), 128)[0].frequencies) for scaling in (None, LLAMA_3_1)
    )
    lengths = 2 * math.pi / plain
    np.testing.assert_array_equal(scaled[lengths < 2048], plain[lengths < 2048])
    np.testing.assert_allclose(scaled[lengths > 8192], plain[lengths > 8192] / 8, rtol=1e-6)
    between = scaled[(lengths > 2048) & (lengths < 8192)] / plain[(lengths > 2048) & (lengths < 8192)]
    assert len(between) == 6 and (np.diff(between) < 0).all() and 1 / 8 < between[-1] < between[0] < 1


def test_yarn_keeps_short_wavelengths_divides_long_ones_and_scales_the_rotated_vectors():
    plain, _ = rope(config(None, 32768, rope_theta=1e6), 128)
    yarn, positions = rope(config(YARN, 32768, rope_theta=1e6), 128)
    ratio = np.array(yarn.frequencies) / np.array(plain.frequencies)
    # By hand: 64 log(32768 / 2 pi r) / log(1e6) is 23.6 for r = 32 rotations and 39.6 for r = 1.
    np.testing.assert_allclose(ratio[:24], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[40:], 0.25, rtol=1e-6)
    np.testing.assert_allclose(ratio[24:40], 1 - 0.75 * np.arange(1, 17) / 17, rtol=1e-6)
    assert positions == 32768 and yarn.factor == pytest.approx(0.1 * math.log(4) + 1)


def test_longrope_serves_the_positions_of_its_short_factors():
    plain, _ = rope(config(), 16)
    rotary, positions = rope(config(LONGROPE, 131072, original_max_position_embeddings=4096), 16)
    np.testing.assert_allclose(rotary.frequencies, np.array(plain.frequencies) / SHORT, rtol=1e-6)
    assert positions == 4096 and rotary.factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert rope(config(LONGROPE, 4096), 16)[0].factor == 1.0


@pytest.mark.parametrize(
    ("hf", "dim", "reported"),
    [
        (config({"rope_type": "ntk"}), 16, 'rope scaling "ntk" is not supported; supported: default, linear, dynamic'),
        (config({"type": "mrope", "mrope_section": [2, 3, 3]}), 16, '"mrope" is not supported'),
        (config({"rope_type": "linear"}), 16, 'rope scaling "linear" needs a number factor, not None'),
        (config({"rope_type": "dynamic", "factor": "2"}), 16, 'rope scaling "dynamic" needs a number factor'),
        (config(LLAMA_3_1 | {"low_freq_factor": None}), 16, "needs a number low_freq_factor, not None"),
        (config(LONGROPE), 8, "a list short_factor of 4 numbers"),
        (config({"rope_type": "longrope"}), 8, "a list short_factor of 4 numbers"),
        (config({"full_attention": {}, "sliding_attention": {}}), 8, "for full_attention and sliding_attention is not"),
        (config(), 5, "positive even number, not 5"),
        (config(), 0, "positive even number, not 0"),
        ({"model_type": "llama"}, 8, "max_position_embeddings has to be a whole number"),
    ],
)
def test_unsupported_scalings_are_rejected_by_name(hf, dim, reported):
    with pytest.raises(ValueError, match=reported):
        rope(hf, dim)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("scaling", "positions", "keys"),
    [
        ({"rope_type": "linear", "factor": 3.0}, 4096, {}),
        ({"rope_type": "dynamic", "factor": 3.0}, 4096, {}),
        (LLAMA_3_1, 131072, {}),
        (LLAMA_3_1 | {"factor": 32.0}, 131072, {"head_dim": 64}),
        ({key: LLAMA_3_1[key] for key in LLAMA_3_1 if key != "original_max_position_embeddings"}, 8192, {}),
        (YARN, 32768, {}),
        (YARN | {"original_max_position_embeddings": 256, "factor": None}, 2048, {"head_dim": 64}),
        (YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}, 32768, {}),
        (YARN | {"mscale": 1.4, "mscale_all_dim": 0.7}, 32768, {}),
        (YARN | {"mscale": 1.4, "attention_factor": 1.7}, 32768, {}),
        (YARN | {"original_max_position_embeddings": 4}, 64, {"head_dim": 16}),
        (LONGROPE | {"original_max_position_embeddings": 4096}, 131072, {"head_dim": 16}),
        (LONGROPE | {"factor": 16.0}, 4096, {"head_dim": 16}),
        (LONGROPE | {"attention_factor": 1.25}, 4096, {"head_dim": 16}),
        (LONGROPE, 131072, {"head_dim": 16, "original_max_position_embeddings": 4096}),
        (LONGROPE, 131072, {"head_dim": 32, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 4096}),
    ],
)
def test_frequencies_and_factor_equal_those_of_transformers(scaling, positions, keys):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    keys = {"head_dim": 128, "rope_theta": 5e5} | keys
    theirs = transformers.LlamaConfig(max_position_embeddings=positions, rope_scaling=dict(scaling), **keys)
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs)
    hf = config(scaling, positions, **keys)
    rotary, _ = rope(hf, rotary_dim(hf, keys["head_dim"]))
    np.testing.assert_allclose(rotary.frequencies, frequencies.numpy(), rtol=3e-7)
    assert rotary.factor == factor
