"""Splits: determined by the prompt alone, disjoint, in the configured shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.splits import as_keys, is_held_out, is_trained_by, named_shares, prompt_key

STAGES = ("sft", "reward", "ppo")


def held_out_flags(key: bytes, share: float) -> bool:
    return bool(is_held_out(as_keys([key]), share)[0])


def stage_of(key: bytes, shares) -> str:
    table = dict(zip(STAGES, shares, strict=True))
    (stage,) = [stage for stage in STAGES if is_trained_by(as_keys([key]), stage, table)[0]]  # exactly one
    return stage


KEYS = [prompt_key((("user", f"question {i}"),)) for i in range(10_000)]


def test_the_key_of_a_prompt_is_the_same_in_every_version_of_the_package():
    assert prompt_key((("user", "Hello"),)).hex() == "49259f1a81e1f3dadfe72df3359b146d"


def test_the_key_ignores_whitespace_and_nothing_else():
    turns = (("user", "a b"), ("assistant", "c"), ("user", "d"))
    assert prompt_key(turns) == prompt_key((("user", " a\n\nb "), ("assistant", "c"), ("user", "d")))
    others = [
        (("user", "a B"), ("assistant", "c"), ("user", "d")),
        (("user", "a b"), ("user", "c"), ("user", "d")),
        (("user", "a b c"), ("user", "d")),
        (("user", "ab"), ("assistant", "c"), ("user", "d")),
    ]
    assert len({prompt_key(other) for other in [turns, *others]}) == 5


def test_ten_thousand_prompts_are_split_2_4_4_among_the_stages():
    stages = [stage_of(key, (2, 4, 4)) for key in KEYS]
    # Three standard deviations of a binomial count here are 120 and 147.
    assert [stages.count(stage) for stage in STAGES] == pytest.approx([2000, 4000, 4000], abs=147)


def test_being_held_out_is_independent_of_the_stage():
    held_out = [key for key in KEYS if held_out_flags(key, 0.1)]
    assert len(held_out) == pytest.approx(1000, abs=90)
    stages = [stage_of(key, (1, 1, 1)) for key in held_out]
    assert [stages.count(stage) for stage in STAGES] == pytest.approx([333] * 3, abs=50)


def test_a_larger_held_out_share_includes_the_prompts_of_a_smaller_one():
    assert {key for key in KEYS if held_out_flags(key, 0.05)} < {key for key in KEYS if held_out_flags(key, 0.1)}
    assert not any(held_out_flags(key, 0.0) for key in KEYS)


SHARES = st.tuples(*[st.integers(0, 1000)] * 3).filter(any)


@given(st.binary(min_size=16, max_size=16), SHARES)
def test_every_prompt_has_one_stage_and_never_one_with_share_zero(key, shares):
    assert shares[STAGES.index(stage_of(key, shares))] > 0


@given(SHARES, st.integers(1, 9))
def test_the_split_does_not_depend_on_the_scale_of_the_shares(shares, factor):
    scaled = [share * factor for share in shares]
    assert all(stage_of(key, shares) == stage_of(key, scaled) for key in KEYS[:50])


def test_the_smallest_and_largest_hashes_have_a_stage():
    assert stage_of(b"\xff" * 16, (1, 1, 1)) == "ppo"
    assert stage_of(b"\xff" * 16, (1, 0, 0)) == "sft"
    assert stage_of(b"\x00" * 16, (0, 0, 1)) == "ppo"
    assert not held_out_flags(b"\xff" * 16, 0.999999)


def test_the_first_prompts_have_the_same_stages_in_every_version_of_the_package():
    by_stage = "".join(stage_of(key, (2, 4, 4))[0] for key in KEYS[:60])
    assert by_stage == "rrpssrppprprprppsrspprpprppprrppppppprprrsrppppspprrprpprpss"


def test_a_new_share_of_zero_moves_no_prompt_and_a_positive_one_takes_equally_from_all():
    table = {"sft": 2.0, "reward": 4.0, "ppo": 4.0}
    keys = as_keys(KEYS)
    for stage in STAGES:
        before = is_trained_by(keys, stage, table)
        assert np.array_equal(before, is_trained_by(keys, stage, table | {"more": 0.0}))
        assert np.array_equal(before, is_trained_by(keys, stage, {name: 20 * share for name, share in table.items()}))
        after = is_trained_by(keys, stage, table | {"more": 10.0})
        assert after.sum() == pytest.approx(before.sum() / 2, abs=130)
    assert is_trained_by(keys, "more", table | {"more": 10.0}).sum() == pytest.approx(5000, abs=150)


def test_shares_are_a_table_by_name_or_a_text_of_three_numbers():
    names, defaults = ("sft", "reward", "ppo", "dpo"), {"sft": 1.0, "dpo": 3.0}
    assert named_shares("2,4,4", names, defaults) == {"sft": 2.0, "reward": 4.0, "ppo": 4.0}
    assert named_shares(" 0.5, 0, 1e1 ", names, defaults) == {"sft": 0.5, "reward": 0.0, "ppo": 10.0}
    assert named_shares({}, names, defaults) == defaults
    # The order of the names matters, not that of the table.
    assert list(named_shares({"dpo": 1.0, "ppo": 0.0, "sft": 2.0}, names, defaults)) == ["sft", "ppo", "dpo"]
    with pytest.raises(
        ValueError, match="data.split has a share for stf; it may have shares for sft, reward, ppo, dpo"
    ):
        named_shares({"stf": 1.0}, names, defaults)


TABLES = [{"sft": -1.0, "ppo": 2.0}, {"sft": 0.0}, {"sft": float("inf")}]


@pytest.mark.parametrize(
    "split", ["", "2,4", "2,4,4,1", "a,b,c", "1,-1,1", "0,0,0", "nan,1,1", "inf,1,1", "2;4;4", *TABLES]
)
def test_any_other_split_is_rejected(split):
    with pytest.raises(ValueError, match="three shares as in '2,4,4'"):
        DataConfig((SourceConfig("x.jsonl"),), split)
