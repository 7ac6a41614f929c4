"""The mixture: quotas by hand, valid permutations, and draws that follow the quotas."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.mixture import draw_rows, draws_per_epoch, permute


def counts_of(*parts: tuple[int, dict], temperature: float = 1.0) -> list[int]:
    """The quotas of sources given as (number of rows, settings)."""
    sources = [SourceConfig("x", **settings) for _, settings in parts]
    return draws_per_epoch([size for size, _ in parts], sources, temperature).tolist()


def test_without_weights_each_row_occurs_epochs_times_per_epoch():
    parts = [(100, {}), (10, {"epochs": 3}), (1000, {"max_rows": 50}), (7, {"epochs": 0.5})]
    assert counts_of(*parts) == [100, 30, 50, 4]


def test_weights_are_shares_of_an_epoch_with_the_same_number_of_draws_as_without_them():
    assert counts_of((100, {"weight": 1}), (900, {"weight": 3})) == [250, 750]


def test_a_cap_with_weights_shortens_the_epoch_and_keeps_the_shares():
    assert counts_of((100, {"weight": 1}), (900, {"weight": 1, "max_rows": 60})) == [60, 60]


def test_a_temperature_draws_the_small_source_more_often():
    assert counts_of((100, {}), (900, {}), temperature=1) == [100, 900]
    assert counts_of((100, {}), (900, {}), temperature=2) == [250, 750]
    assert counts_of((100, {}), (900, {}), temperature=1e9) == [500, 500]


def test_no_draw_is_from_an_empty_source():
    assert counts_of((0, {"weight": 1}), (10, {"weight": 1})) == [0, 10]
    assert counts_of((0, {}), (10, {}), temperature=2) == [0, 10]


def test_weights_for_only_some_sources_and_weights_with_a_temperature_are_rejected():
    with pytest.raises(ValueError, match="every source a weight, or none"):
        counts_of((1, {"weight": 1}), (1, {}))
    with pytest.raises(ValueError, match="data.temperature is for sources without weights"):
        counts_of((1, {"weight": 1}), temperature=2)


SIZES = st.integers(1, 3000) | st.integers(4000, 40000)


@given(SIZES, st.lists(st.integers(0, 2**32 - 1), max_size=3))
def test_a_permutation_contains_every_position_once(size, key):
    places = permute(np.arange(size), size, *key)
    assert np.array_equal(np.sort(places), np.arange(size))
    some = np.arange(size)[:: max(1, size // 7)]
    assert np.array_equal(permute(some, size, *key), places[some])


def test_each_of_ten_positions_receives_each_number_equally_often():
    counts = np.zeros((10, 10))
    for key in range(4000):
        counts[np.arange(10), permute(np.arange(10), 10, key)] += 1
    chi_square = ((counts - 400) ** 2 / 400).sum()  # 81 degrees of freedom: mean 81, deviation 12.7
    assert 40 < chi_square < 132


def test_neighbours_are_separated_and_seeds_differ():
    one, two = permute(np.arange(10**5), 10**5, 1), permute(np.arange(10**5), 10**5, 2)
    assert (np.abs(np.diff(one)) == 1).mean() < 1e-3
    assert (one == two).mean() < 1e-3
    assert abs(np.corrcoef(one, np.arange(10**5))[0, 1]) < 0.02


PARTS = st.lists(
    st.tuples(
        st.integers(1, 60), st.builds(SourceConfig, st.just("x"), epochs=st.floats(0.1, 3), max_rows=st.integers(0, 50))
    ),
    min_size=1,
    max_size=4,
)


@given(PARTS, st.integers(0, 9), st.floats(0.5, 5))
def test_an_epoch_draws_its_quota_from_each_part_evenly(parts, seed, temperature):
    sizes, sources = zip(*parts, strict=True)
    counts = draws_per_epoch(sizes, sources, temperature)
    drawn = [np.zeros(size, int) for size in sizes]
    for epoch in range(3):
        part, row = draw_rows(sizes, counts, seed, epoch, np.arange(counts.sum()))
        assert np.bincount(part, minlength=len(parts)).tolist() == counts.tolist()
        for p, r in zip(part, row, strict=True):
            drawn[p][r] += 1
    assert all(each.max() - each.min() <= 1 for each in drawn)


@given(st.integers(0, 99))
def test_any_interval_of_draws_has_the_proportions_of_the_quotas_within_sampling_error(seed):
    part, _ = draw_rows((5000, 5000), (7000, 3000), seed, 0, np.arange(2000, 3000))
    # 1000 of 10000 without replacement: deviation of the share sqrt(0.7 x 0.3 / 1000 x 0.9) = 0.0137
    assert abs((part == 0).mean() - 0.7) < 5 * 0.0137


def test_a_draw_depends_only_on_seed_epoch_and_position():
    blend = (50, 20), (50, 60)
    whole = np.stack(draw_rows(*blend, 3, 5, np.arange(110)))
    assert np.array_equal(np.stack(draw_rows(*blend, 3, 5, np.array([17, 4, 109]))), whole[:, [17, 4, 109]])
    assert not np.array_equal(np.stack(draw_rows(*blend, 4, 5, np.arange(110))), whole)
    assert not np.array_equal(np.stack(draw_rows(*blend, 3, 6, np.arange(110))), whole)


def test_without_shuffling_the_parts_follow_each_other_in_order():
    part, row = draw_rows((2, 3), (2, 5), 0, 0, np.arange(7), shuffle=False)
    assert part.tolist() == [0, 0, 1, 1, 1, 1, 1] and row.tolist() == [0, 1, 0, 1, 2, 0, 1]
