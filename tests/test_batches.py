"""Batches: every row once per epoch, resume by arithmetic, removable padding, few shapes, packed rows."""

import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.batches import BUCKET_WINDOW, Batch, Batches, Prefetch, bucket_lengths
from rlhf_jax.data.chat_template import Encoding
from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.rows import Rows, SourceRows, pack_rows
from rlhf_jax.data.store import memory_store, record_batch
from rlhf_jax.data.tokenize import RowStats

NOTHING = RowStats()


def source(lengths: list[int], per_row: int = 1, first: int = 1, name: str = "made") -> SourceRows:
    """Sequence s holds first + s, first + s + 1, ...; all tokens but the first have a loss."""
    num = len(lengths) // per_row
    sequences = [
        Encoding(np.arange(first + s, first + s + length, dtype=np.int32), np.array([[1, length]], np.int32))
        for s, length in enumerate(lengths[: num * per_row])
    ]
    keys = np.arange(2 * num, dtype=np.uint64).reshape(num, 2)
    store = memory_store([record_batch(sequences, keys, range(num), [False] * num, per_row, 1000)], per_row, 1000)
    return SourceRows(SourceConfig(name), store, np.arange(num, dtype=np.int32), NOTHING)


def make_rows(lengths: list[int], per_row: int = 1) -> Rows:
    part = source(lengths, per_row)
    return Rows((part,), per_row, (len(part),), "")


def fields(batch: Batch) -> list[np.ndarray]:
    return [x for x in (batch.tokens, batch.mask, batch.loss_mask, batch.segments) if x is not None]


LENGTHS = st.lists(st.integers(1, 20), min_size=2, max_size=40)
SEEDS = st.integers(0, 2**32 - 1)
BUCKETS = st.sampled_from([1, 3])


@settings(deadline=None)
@given(lengths=LENGTHS, seed=SEEDS, buckets=BUCKETS, data=st.data())
def test_every_row_occurs_once_per_epoch_except_in_the_incomplete_batch(lengths, seed, buckets, data):
    batch_size = data.draw(st.integers(1, len(lengths)))
    batches = Batches(make_rows(lengths), batch_size=batch_size, seed=seed, buckets=buckets)
    steps = batches.steps_per_epoch
    assert steps == len(lengths) // batch_size
    for epoch in range(3):
        rows = np.concatenate([batches.draws(epoch * steps + position)[1] for position in range(steps)])
        assert len(rows) == steps * batch_size == len(set(rows.tolist())) <= len(lengths)
        assert set(rows.tolist()) <= set(range(len(lengths)))


@settings(deadline=None)
@given(lengths=LENGTHS, seed=SEEDS, buckets=BUCKETS, start=st.integers(0, 200))
def test_a_resumed_run_gets_the_batches_of_an_uninterrupted_one(lengths, seed, buckets, start):
    rows = make_rows(lengths)
    uninterrupted = Batches(rows, batch_size=2, seed=seed, buckets=buckets)
    for step in range(start):
        uninterrupted.draws(step)
    resumed = Batches(make_rows(lengths), batch_size=2, seed=seed, buckets=buckets)
    for step in range(start, start + 3):
        for old, new in zip(fields(uninterrupted[step]), fields(resumed[step]), strict=True):
            np.testing.assert_array_equal(old, new)


def test_epochs_and_seeds_have_different_orders_and_without_shuffling_rows_keep_theirs():
    rows = make_rows([1] * 50)
    orders = [Batches(rows, batch_size=50, seed=seed).draws(epoch)[1].tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert Batches(rows, batch_size=10, seed=0, shuffle=False).draws(7)[1].tolist() == list(range(20, 30))


def test_the_order_is_the_same_with_every_numpy_version():
    assert Batches(make_rows([1] * 8), batch_size=8, seed=3).draws(2)[1].tolist() == [0, 5, 1, 3, 6, 7, 2, 4]
    assert Batches(make_rows([1] * 5000), batch_size=4, seed=3).draws(2)[1].tolist() == [2865, 517, 3600, 1331]


@given(lengths=LENGTHS, side=st.sampled_from(["left", "right"]), per_row=st.sampled_from([1, 2]))
@settings(max_examples=50, deadline=None)
def test_sequences_are_recovered_from_padding_on_either_side(lengths, side, per_row):
    rows = make_rows(lengths, per_row)
    batches = Batches(rows, batch_size=len(rows), seed=0, side=side, shuffle=False)
    batch, (part,) = batches[0], rows.parts
    longest, (width,) = int(part.lengths.max()), batches.lengths
    assert width % 8 == 0 and longest <= width < longest + 8
    assert (batch.tokens.dtype, batch.mask.dtype, batch.loss_mask.dtype) == (np.int32, np.bool_, np.bool_)
    assert batch.tokens.shape == ((len(rows),) if per_row == 1 else (len(rows), 2)) + (width,)
    assert batch.segments is None
    flat, masks, losses = (a.reshape(-1, width) for a in (batch.tokens, batch.mask, batch.loss_mask))
    for s, (tokens, mask, loss) in enumerate(zip(flat, masks, losses, strict=True)):
        expected = list(range(1 + s, 1 + s + lengths[s]))
        assert tokens[mask].tolist() == expected
        assert tokens[loss].tolist() == expected[1:]
        assert mask[0 if side == "right" else -1] and np.count_nonzero(np.diff(mask)) <= 1
        assert not tokens[~mask].any()


def test_buckets_give_few_shapes_and_remove_most_of_the_padding():
    rng = np.random.RandomState(0)
    lengths = np.minimum(rng.lognormal(4, 0.8, 40 * BUCKET_WINDOW), 500).astype(int) + 1
    shares = []
    for buckets in (1, 4):
        batches = Batches(make_rows(lengths.tolist()), batch_size=8, seed=0, buckets=buckets)
        made = [batches[step] for step in range(batches.steps_per_epoch)]
        assert {batch.tokens.shape[1] for batch in made} == set(batches.lengths)
        assert len(batches.lengths) == buckets and all(length % 8 == 0 for length in batches.lengths)
        shares.append(1 - np.mean([batch.mask.sum() for batch in made]) / np.mean([batch.mask.size for batch in made]))
    assert shares[0] > 0.8 and shares[1] < 0.5
    first = [batch.tokens.shape[1] for batch in made[:BUCKET_WINDOW]]
    assert first != sorted(first)  # steps of short and long rows alternate randomly


def test_rows_that_are_padded_to_one_length_are_not_sorted_by_their_own():
    lengths = np.random.RandomState(0).randint(1, 33, 8 * BUCKET_WINDOW)
    batches = Batches(make_rows(lengths.tolist()), batch_size=8, seed=0, buckets=2)
    assert batches.lengths == (16, 32)
    made = [batches[step] for step in range(batches.steps_per_epoch)]
    spread = [np.ptp(batch.mask.sum(axis=-1)) for batch in made if batch.tokens.shape[1] == 16]
    assert np.mean(spread) > 8  # of lengths from 1 to 16; sorted, eight neighbours would be within 1 or 2


@given(st.lists(st.integers(1, 96), min_size=1, max_size=30), st.integers(1, 3))
def test_the_lengths_are_those_that_pad_the_rows_least(row_lengths, buckets):
    longest = -(-max(row_lengths) // 8) * 8
    lengths = bucket_lengths(np.array(row_lengths), longest, buckets)

    def padded_size(candidate) -> int:
        return sum(next(length for length in candidate if length >= row) for row in row_lengths)

    multiples = range(8, longest, 8)
    choices = [c for k in range(buckets) for c in itertools.combinations(multiples, k)]
    assert padded_size(lengths) == min(padded_size((*choice, longest)) for choice in choices)
    assert lengths[-1] == longest and len(lengths) <= buckets and list(lengths) == sorted(set(lengths))


DOCUMENTS = st.lists(st.integers(2, 30), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths=DOCUMENTS, seed=SEEDS)
def test_packing_keeps_every_token_once_and_separates_the_documents(lengths, seed):
    part = pack_rows(source(lengths), 32)
    rows = Rows((part,), 1, (len(part),), "")
    batch = Batches(rows, batch_size=len(part), seed=seed, width=32)[0]
    assert batch.tokens.shape == (len(part), 32)
    found = []
    for tokens, mask, loss, segments in zip(*fields(batch), strict=True):
        assert np.array_equal(segments > 0, mask)
        assert segments[mask].tolist() == sorted(segments[mask].tolist())  # one after the other
        for number in range(1, segments.max() + 1):
            document, learned = tokens[segments == number], tokens[loss & (segments == number)]
            found.append(document.tolist())
            assert learned.tolist() == document[1:].tolist()
    assert sorted(found) == sorted(list(range(1 + s, 1 + s + length)) for s, length in enumerate(lengths))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=2, max_size=60), seed=SEEDS)
def test_packed_pairs_keep_every_token_of_both_answers_under_the_number_of_its_answer(lengths, seed):
    part = pack_rows(source(lengths, per_row=2), 32)
    rows = Rows((part,), 2, (len(part),), "")
    batch = Batches(rows, batch_size=len(part), seed=seed, width=32)[0]
    assert batch.tokens.shape == (len(part), 2, 32)
    assert np.array_equal(part.lengths.sum(), batch.mask.sum()) and np.array_equal(batch.segments > 0, batch.mask)
    found = []
    for tokens, loss, segments, scores in zip(batch.tokens, batch.loss_mask, batch.segments, batch.scores, strict=True):
        count = segments.max() // 2
        assert np.isnan(scores).tolist() == [[d >= count] * 2 for d in range(len(scores))]
        for number in range(1, 2 * count + 1):
            sub_row = (segments == number).any(axis=1)
            document, learned = tokens[segments == number], tokens[loss & (segments == number)]
            assert sub_row.sum() == 1 and learned.tolist() == document[1:].tolist()
            # Sequence s starts with s + 1: the first and the second answer of a pair are an even s and the next.
            assert document[0] % 2 == number % 2 and (number % 2 or document[0] == found[-1][0] + 1)
            found.append(document.tolist())
    pairs = len(lengths) // 2 * 2
    assert sorted(found) == sorted(list(range(1 + s, 1 + s + length)) for s, length in enumerate(lengths[:pairs]))


def test_what_is_packed_together_changes_the_fingerprint_of_the_rows():
    parts = [pack_rows(source([7, 3, 6, 4, 5, 5]), length) for length in (10, 14)]
    assert list(map(len, parts)) == [3, 3] and parts[0].digest != parts[1].digest


def test_a_packed_row_has_the_name_of_its_first_document():
    part = pack_rows(source([20, 9, 20, 9, 9]), 32)
    for row in range(len(part)):
        first = part.documents(row)[0][0].tokens[0]  # sequence s starts with s + 1 and is example s
        assert part.number(row) == first - 1


def test_the_rows_of_a_step_are_counted_by_source():
    parts = (source([2] * 30, name="one"), source([2] * 30, first=500, name="two"))
    rows = Rows(parts, 1, (90, 30), "")
    batches = Batches(rows, batch_size=12, seed=0)
    counts = [batches.counts(step) for step in range(10)]
    assert sum(each["one"] for each in counts) == 90 and sum(each["two"] for each in counts) == 30
    for step, each in enumerate(counts):
        assert (batches[step].tokens[:, 0] < 500).sum() == each["one"]
    assert Batches(make_rows([2, 2]), batch_size=1, seed=0).counts(0) == {}


def test_a_process_that_reads_its_own_rows_of_a_batch_reads_no_others_and_pads_them_to_the_same_length():
    rows = make_rows([3, 9, 17] * 8)
    whole = Batches(rows, batch_size=12, seed=1, buckets=3)[1]
    for own in ([0, 1, 2, 6, 7, 8], [11], range(12)):
        part = Batches(rows, batch_size=12, seed=1, buckets=3, own=np.array(own))[1]
        assert np.array_equal(part.tokens, whole.tokens[list(own)]), own
        assert np.array_equal(part.loss_mask, whole.loss_mask[list(own)]), own


@pytest.mark.parametrize("batch_size", [0, -1, 4])
def test_a_batch_larger_than_the_rows_is_rejected_with_the_largest_that_fits(batch_size):
    with pytest.raises(ValueError, match=f"batch size {batch_size} does not fit 3 rows: choose 1 to 3"):
        Batches(make_rows([1, 2, 3]), batch_size=batch_size, seed=0)


def test_batches_are_endless_and_cannot_be_iterated():
    with pytest.raises(TypeError):
        iter(Batches(make_rows([1, 2, 3]), batch_size=1, seed=0))


class Slow:
    """Batches that take 20 ms each and record the requested steps."""

    def __init__(self):
        self.asked: list[tuple[int, str]] = []

    def __getitem__(self, step: int) -> int:
        self.asked.append((step, threading.current_thread().name))
        time.sleep(0.02)
        if step == 7:
            raise ValueError("row 7 is broken")
        return step * step


def test_each_batch_is_prefetched_once_and_none_beyond_the_last_step():
    slow = Slow()
    prefetch = Prefetch(slow, stop=5)
    for step in range(5):
        assert prefetch[step] == step * step
    assert [step for step, _ in slow.asked] == [0, 1, 2, 3, 4]
    assert all(name.startswith("batches") for _, name in slow.asked)


def test_the_next_two_batches_are_made_before_they_are_requested():
    class Signalled:
        """Batches that set an event when they have been made."""

        made = [threading.Event() for _ in range(6)]

        def __getitem__(self, step: int) -> int:
            self.made[step].set()
            return step

    prefetch = Prefetch(Signalled(), stop=6)
    prefetch[0]
    assert all(event.wait(timeout=60) for event in Signalled.made[:3])
    assert not any(event.is_set() for event in Signalled.made[3:])


def test_a_prefetch_error_is_raised_at_the_step_that_needs_the_batch_and_any_step_can_be_requested():
    prefetch = Prefetch(Slow(), stop=10)
    assert prefetch[5] == 25  # 6 and 7 are being prefetched
    with pytest.raises(ValueError, match="row 7 is broken"):
        prefetch[7]
    assert prefetch[2] == 4 and prefetch[9] == 81


def test_rows_of_uint16_and_int32_tokens_give_equal_batches():
    part = source([5, 9])
    wide = [
        Encoding(sequence.tokens.astype(np.int32), sequence.spans)
        for row in range(2)
        for sequence in part.store.row(row)
    ]
    store = memory_store([record_batch(wide, part.store.keys(), range(2), [False] * 2, 1, 200_000)], 1, 200_000)
    assert part.store.row(0)[0].tokens.dtype == np.uint16 and store.row(0)[0].tokens.dtype == np.int32
    other = dataclasses.replace(part, store=store)
    one, two = (Batches(Rows((each,), 1, (2,), ""), batch_size=2, seed=0)[0] for each in (part, other))
    assert np.array_equal(one.tokens, two.tokens) and one.tokens.dtype == two.tokens.dtype == np.int32
