"""Streams: windows follow each other without a gap, resume anywhere, and are trained on like stored rows."""

import dataclasses
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_specs import SPECS, split_of
from tiny_tokenizer import gpt2_like

from rlhf_jax.data import stream, tokenize
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.records import Row
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.selection import select_rows

TOKENIZER = prepare_tokenizer(gpt2_like())


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 20)
    for module in (stream, tokenize):
        monkeypatch.setattr(module, "ROWS_PER_BLOCK", 7)


def write(path: Path, count: int, first: int = 0) -> Path:
    rows = [{"prompt": f"q{i}", "chosen": f"a{i}"} for i in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(path: Path, cache: Path, **change) -> DataConfig:
    source = SourceConfig(str(path), rejected="", stream=True)
    return dataclasses.replace(DataConfig((source,), split_of("1,0,0"), 0.0, cache_dir=str(cache)), **change)


def rows_for(config: DataConfig, held_out: bool = False) -> Rows:
    return select_rows(config, TOKENIZER, SPECS["sft"], held_out=held_out)


def numbers(rows: Rows, windows: int) -> list[list[int]]:
    (part,) = rows.parts
    return [[part.number(w * 20 + i) for i in range(20)] for w in range(windows)]


def test_windows_follow_each_other_through_the_source_and_then_start_over(tmp_path):
    rows = rows_for(config_of(write(tmp_path / "rows.jsonl", 53), tmp_path / "cache"))
    found = sum(numbers(rows, 8), [])
    assert found == [1 + i % 53 for i in range(160)]
    assert len(rows) == 20 and rows.endless and "streamed" in rows.report


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 90), asked=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_any_process_can_request_any_window_at_any_time(tmp_path_factory, count, asked):
    folder = tmp_path_factory.mktemp("stream")
    config = config_of(write(folder / "rows.jsonl", count), folder / "cache")
    expected = [1 + i % count for i in range(200)]
    for number in asked:
        rows = rows_for(config)  # as a new process would
        (part,) = rows.parts
        assert [part.number(number * 20 + i) for i in range(20)] == expected[number * 20 : number * 20 + 20]
    made = sorted(path.stem for path in (folder / "cache").rglob("0*.json"))
    assert made == [f"{n:06}" for n in range(len(made))] and max(asked) < len(made)


def test_two_readers_of_one_folder_build_each_window_once_and_agree(tmp_path):
    config = config_of(write(tmp_path / "rows.jsonl", 53), tmp_path / "cache")
    one, two = rows_for(config).parts[0], rows_for(config).parts[0]
    found = {n: (one, two)[n % 2].make_window(n)[0].numbers().tolist() for n in range(10)}
    assert sum(found.values(), []) == [1 + i % 53 for i in range(200)]
    # Every row is counted once: ten windows of twenty rows, and the rest of the last block.
    tally = one.make_window(9)[1]
    assert tally.share == tally.rows and 200 <= tally.rows < 207


def test_two_threads_can_read_one_stream_at_distant_positions(tmp_path):
    (part,) = rows_for(config_of(write(tmp_path / "rows.jsonl", 53), tmp_path / "cache")).parts
    expected = [part.number(20 * window) for window in range(8)]
    orders = [np.random.RandomState(seed).randint(0, 8, 2000).tolist() for seed in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that the threads interleave everywhere
    try:
        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(lambda order: [part.number(20 * n) for n in order], order) for order in orders]
            found = [reader.result() for reader in readers]
    finally:
        sys.setswitchinterval(interval)
    assert found == [[expected[n] for n in order] for order in orders]


def test_a_stream_skips_prompts_of_other_stages_and_held_out_prompts(tmp_path):
    path, held = write(tmp_path / "rows.jsonl", 400), write(tmp_path / "held.jsonl", 100, first=350)
    whole = select_rows(
        config_of(path, tmp_path / "cache", split=split_of("1,1,0"), held_out=0.2, sources=(SourceConfig(str(path)),)),
        TOKENIZER,
        SPECS["sft"],
        held_out=False,
    )
    (part,) = whole.parts
    expected = [part.number(row) for row in range(len(part))]
    config = config_of(path, tmp_path / "cache", split=split_of("1,1,0"), held_out=0.2)
    found = sum(numbers(rows_for(config), 12), [])
    assert 120 < len(expected) < 200 and found[: len(expected)] == expected and found[len(expected)] == expected[0]
    # A separate evaluation file alone decides what is held out.
    apart = dataclasses.replace(config.sources[0], eval_path=str(held))
    config = dataclasses.replace(config, sources=(apart,), split=split_of("1,0,0"))
    found = sum(numbers(rows_for(config), 30), [])
    assert set(found) == set(range(1, 351))
    assert len(rows_for(config, held_out=True)) == 100


def text_of(tokens: np.ndarray, mask: np.ndarray) -> str:
    return re.search(r"q\d+", TOKENIZER.decode(tokens[mask]))[0]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 99), start=st.integers(0, 30))
def test_a_resumed_run_gets_the_batches_of_an_uninterrupted_one(tmp_path_factory, seed, start):
    folder = tmp_path_factory.mktemp("stream")
    config = config_of(write(folder / "rows.jsonl", 53), folder / "cache")
    batches = Batches(rows_for(config), batch_size=5, seed=seed)
    steps = [batches[step].tokens for step in range(start + 3)]
    resumed = Batches(rows_for(config), batch_size=5, seed=seed)
    for step in range(start, start + 3):
        assert np.array_equal(resumed[step].tokens, steps[step])
    fresh = config_of(folder / "rows.jsonl", folder / "another cache")
    assert np.array_equal(Batches(rows_for(fresh), batch_size=5, seed=seed)[start].tokens, steps[start])


def test_each_window_has_its_own_order_and_each_of_its_rows_occurs_once(tmp_path):
    config = config_of(write(tmp_path / "rows.jsonl", 1000), tmp_path / "cache")
    batches = Batches(rows_for(config), batch_size=5, seed=3)
    orders = []
    for window in range(4):
        made = [batches[window * 4 + step] for step in range(4)]
        seen = [text_of(*row) for batch in made for row in zip(batch.tokens, batch.mask, strict=True)]
        assert sorted(seen) == sorted(f"q{i}" for i in range(window * 20, window * 20 + 20))
        orders.append([int(text[1:]) - window * 20 for text in seen])
    assert all(one != other for one, other in pairwise(orders))
    assert batches.lengths == (512,)  # the lengths of future rows are unknown


def test_streams_and_stored_rows_are_blended_by_weight(tmp_path):
    big, small = write(tmp_path / "big.jsonl", 1000), write(tmp_path / "small.jsonl", 10, first=5000)
    sources = (
        SourceConfig(str(big), rejected="", stream=True, weight=3),
        SourceConfig(str(small), rejected="", weight=1),
    )
    config = DataConfig(sources, split_of("1,0,0"), 0.0, cache_dir=str(tmp_path / "cache"))
    batches = Batches(rows_for(config), batch_size=10, seed=0)
    counts = [batches.counts(step) for step in range(60)]
    assert sum(each[str(small)] for each in counts) == pytest.approx(150, abs=15)
    seen = [text_of(*row) for step in range(60) for row in zip(batches[step].tokens, batches[step].mask, strict=True)]
    streamed = [int(text[1:]) for text in seen if int(text[1:]) < 5000]
    assert len(set(streamed)) == len(streamed) > 400  # no row of the stream twice


def test_bad_rows_of_a_stream_are_counted_and_stop_it_when_they_are_too_many(tmp_path):
    path = write(tmp_path / "rows.jsonl", 60)
    lines = path.read_text().splitlines()
    lines[30] = "{broken"
    path.write_text("\n".join(lines) + "\n")
    rows = rows_for(config_of(path, tmp_path / "cache"))
    with pytest.raises(ValueError, match="rows.jsonl, line 31: malformed JSON"):
        numbers(rows, 3)
    tolerant = rows_for(config_of(path, tmp_path / "cache", max_bad_rows=1))
    good = [i for i in range(1, 61) if i != 31]
    assert sum(numbers(tolerant, 6), []) == (good * 3)[:120]  # in the second pass it is the same bad row


def test_a_hub_dataset_is_streamed_from_the_network(tmp_path, monkeypatch):
    asked = []

    def load_stream(path, name, split):
        asked.append((path, name, split))
        return (Row(f"{path} ({split})", i, {"prompt": f"q{i}", "chosen": "a"}) for i in range(1, 51))

    monkeypatch.setattr(stream, "read_hub_stream", load_stream)
    config = config_of(Path("someone/dialogues"), tmp_path / "cache")
    assert sum(numbers(rows_for(config), 4), []) == [1 + i % 50 for i in range(80)]
    assert set(asked) == {("someone/dialogues", "", "train")}


def test_sources_that_cannot_be_streamed_are_rejected(tmp_path):
    path = write(tmp_path / "rows.jsonl", 60)
    config = config_of(path, tmp_path / "cache")
    with pytest.raises(ValueError, match="ppo: there are no rows to train on"):  # a stream serves only SFT
        select_rows(config, TOKENIZER, SPECS["ppo"], held_out=False)
    with pytest.raises(ValueError, match="rows of a stream are not packed: set sft.pack_length = 0"):
        select_rows(config, TOKENIZER, dataclasses.replace(SPECS["sft"], pack_length=512), held_out=False)
    with pytest.raises(ValueError, match="none of its rows is usable by the stage sft"):
        rows_for(dataclasses.replace(config, split=split_of("0,1,0")))
    with pytest.raises(ValueError, match="sft: there are no held-out rows to evaluate on"):
        rows_for(dataclasses.replace(config, held_out=0.5), held_out=True)


def test_of_several_processes_the_main_one_makes_the_windows_and_the_others_wait_for_them(tmp_path, monkeypatch):
    config = config_of(write(tmp_path / "rows.jsonl", 53), tmp_path / "cache")
    monkeypatch.setattr(stream, "WAIT", 0.01)
    main = rows_for(config)
    expected = numbers(main, 2)
    main.parts[0]._held[2].result()  # made in the background
    monkeypatch.setattr(stream.hosts, "is_main", lambda: False)
    other = rows_for(config)
    assert numbers(other, 2) == expected
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(numbers, other, 6)
        time.sleep(0.1)
        assert not waiting.done()
        monkeypatch.setattr(stream.hosts, "is_main", lambda: True)
        expected = numbers(main, 6)
        assert waiting.result(timeout=60) == expected
