"""The blend: quotas by hand, permutations that are some, draws that come out as the quotas say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.blend import Blend, Part, permuted, quotas


def test_without_weights_an_epoch_has_each_row_as_often_as_its_epochs_say():
    parts = [Part(100), Part(10, epochs=3), Part(1000, max_rows=50), Part(7, epochs=0.5)]
    assert quotas(parts).tolist() == [100, 30, 50, 4]


def test_weights_are_shares_of_an_epoch_that_has_as_many_draws_as_without_them():
    assert quotas([Part(100, weight=1), Part(900, weight=3)]).tolist() == [250, 750]


def test_a_cap_under_weights_shortens_the_epoch_and_leaves_the_shares():
    assert quotas([Part(100, weight=1), Part(900, weight=1, max_rows=60)]).tolist() == [60, 60]


def test_a_temperature_draws_the_small_source_more_often():
    assert quotas([Part(100), Part(900)], temperature=1).tolist() == [100, 900]
    assert quotas([Part(100), Part(900)], temperature=2).tolist() == [250, 750]
    assert quotas([Part(100), Part(900)], temperature=1e9).tolist() == [500, 500]


def test_a_source_without_rows_is_drawn_from_never():
    assert quotas([Part(0, weight=1), Part(10, weight=1)]).tolist() == [0, 10]
    assert quotas([Part(0), Part(10)], temperature=2).tolist() == [0, 10]


def test_weights_for_some_are_refused_and_so_are_weights_with_a_temperature():
    with pytest.raises(ValueError, match="every source a weight, or none"):
        quotas([Part(1, weight=1), Part(1)])
    with pytest.raises(ValueError, match="data.temperature is for sources without weights"):
        quotas([Part(1, weight=1)], temperature=2)


SIZES = st.integers(1, 3000) | st.integers(4000, 40000)


@given(SIZES, st.lists(st.integers(0, 2**32 - 1), max_size=3))
def test_a_permutation_has_every_place_once(size, key):
    places = permuted(np.arange(size), size, *key)
    assert np.array_equal(np.sort(places), np.arange(size))
    some = np.arange(size)[:: max(1, size // 7)]
    assert np.array_equal(permuted(some, size, *key), places[some])


def test_each_place_of_ten_receives_each_number_equally_often():
    counts = np.zeros((10, 10))
    for key in range(4000):
        counts[np.arange(10), permuted(np.arange(10), 10, key)] += 1
    chi_square = ((counts - 400) ** 2 / 400).sum()  # 81 degrees of freedom: mean 81, deviation 12.7
    assert 40 < chi_square < 132


def test_neighbours_are_not_kept_together_and_seeds_differ():
    one, two = permuted(np.arange(10**5), 10**5, 1), permuted(np.arange(10**5), 10**5, 2)
    assert (np.abs(np.diff(one)) == 1).mean() < 1e-3
    assert (one == two).mean() < 1e-3
    assert abs(np.corrcoef(one, np.arange(10**5))[0, 1]) < 0.02


PARTS = st.lists(
    st.builds(Part, st.integers(1, 60), epochs=st.floats(0.1, 3), max_rows=st.integers(0, 50)), min_size=1, max_size=4
)


@given(PARTS, st.integers(0, 9), st.floats(0.5, 5))
def test_an_epoch_draws_from_each_part_what_its_quota_says_and_evenly(parts, seed, temperature):
    counts = quotas(parts, temperature)
    blend = Blend(tuple(part.size for part in parts), tuple(counts.tolist()))
    drawn = [np.zeros(part.size, int) for part in parts]
    for epoch in range(3):
        part, row = blend.draws(seed, epoch, np.arange(len(blend)))
        assert np.bincount(part, minlength=len(parts)).tolist() == counts.tolist()
        for p, r in zip(part, row, strict=True):
            drawn[p][r] += 1
    assert all(each.max() - each.min() <= 1 for each in drawn)


@given(st.integers(0, 99))
def test_in_any_stretch_the_proportions_are_the_quotas_within_sampling_error(seed):
    blend = Blend((5000, 5000), (7000, 3000))
    part, _ = blend.draws(seed, 0, np.arange(2000, 3000))
    # 1000 of 10000 without replacement: deviation of the share sqrt(0.7 x 0.3 / 1000 x 0.9) = 0.0137
    assert abs((part == 0).mean() - 0.7) < 5 * 0.0137


def test_a_draw_depends_on_seed_epoch_and_position_alone():
    blend = Blend((50, 20), (50, 60))
    whole = np.stack(blend.draws(3, 5, np.arange(110)))
    assert np.array_equal(np.stack(blend.draws(3, 5, np.array([17, 4, 109]))), whole[:, [17, 4, 109]])
    assert not np.array_equal(np.stack(blend.draws(4, 5, np.arange(110))), whole)
    assert not np.array_equal(np.stack(blend.draws(3, 6, np.arange(110))), whole)


def test_without_shuffling_the_parts_follow_each_other_in_order():
    part, row = Blend((2, 3), (2, 5)).draws(0, 0, np.arange(7), shuffle=False)
    assert part.tolist() == [0, 0, 1, 1, 1, 1, 1] and row.tolist() == [0, 1, 0, 1, 2, 0, 1]
