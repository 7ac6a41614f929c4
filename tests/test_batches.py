"""Rows and batches: masks, cuts and drops by hand; every row once an epoch; resume by arithmetic."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import chatml_like, gpt2_like, opt_like

from rlhf_jax.data.batches import Batches, Rows, pair_rows, prompt_rows, sft_rows
from rlhf_jax.data.sources import DataConfig, Example, SourceConfig, load_examples
from rlhf_jax.data.template import encode_prompt, encode_response, prepare_tokenizer

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")

TOKENIZER = prepare_tokenizer(gpt2_like())
CONFIG = DataConfig(sources=(SourceConfig("x.jsonl"),), max_prompt_length=40, max_length=60)


def example(prompt: str, answer: str = "", chosen: str = "", rejected: str = "") -> Example:
    return Example((("user", prompt),), answer, chosen, rejected, "x.jsonl", 1)


def sequence(rows: Rows, s: int) -> list[int]:
    return rows.tokens[rows.offsets[s] : rows.offsets[s + 1]].tolist()


@pytest.mark.parametrize("kind", [gpt2_like, opt_like, chatml_like])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_on_the_answer_and_its_end_and_on_nothing_else(kind, side):
    tokenizer = prepare_tokenizer(kind())
    examples = [example("Hi.", "Yes."), example("What is 3 + 4?", "Sure! 7. Anything else?")]
    rows = sft_rows(examples, tokenizer, CONFIG, train_on_prompt=False)
    batch = Batches(rows, batch_size=2, seed=0, side=side, shuffle=False)[0]
    for i, e in enumerate(examples):
        prompt, response = encode_prompt(tokenizer, e.turns), encode_response(tokenizer, e.turns, e.answer)
        assert batch.tokens[i][batch.mask[i]].tolist() == prompt + response
        assert batch.tokens[i][batch.loss_mask[i]].tolist() == response
        assert response[-1] in (tokenizer.eos_token_id, 3)


def test_training_on_the_prompt_leaves_out_the_first_token_only():
    rows = sft_rows([example("Hi.", "Yes.")], TOKENIZER, CONFIG, train_on_prompt=True)
    batch = Batches(rows, batch_size=1, seed=0)[0]
    assert batch.loss_mask.sum() == batch.mask.sum() - 1
    assert batch.mask[0, 0] and not batch.loss_mask[0, 0]


def test_a_long_answer_is_cut_on_the_right_with_its_end_and_counted():
    examples = [example("Hi.", "no " * 100), example("Hi.", "Yes.")]
    rows = sft_rows(examples, TOKENIZER, CONFIG, train_on_prompt=False)
    whole = encode_prompt(TOKENIZER, examples[0].turns) + encode_response(TOKENIZER, examples[0].turns, "no " * 100)
    assert sequence(rows, 0) == whole[:60] and TOKENIZER.eos_token_id not in sequence(rows, 0)
    assert sequence(rows, 1)[-1] == TOKENIZER.eos_token_id
    assert rows.report == "2 rows, 1 cut at 60 tokens"


def test_an_answer_that_just_fits_is_not_cut():
    turns = (("user", "Hi."),)
    length = len(encode_prompt(TOKENIZER, turns)) + len(encode_response(TOKENIZER, turns, "a1 b2 c3"))
    for max_length, cut in [(length, ""), (length - 1, f", 1 cut at {length - 1} tokens")]:
        config = dataclasses.replace(CONFIG, max_prompt_length=length - 2, max_length=max_length)
        rows = sft_rows([example("Hi.", "a1 b2 c3")], TOKENIZER, config, train_on_prompt=False)
        assert (len(rows.tokens), rows.report) == (max_length, "1 rows" + cut)


def test_long_prompts_and_empty_texts_are_dropped_and_counted_by_reason():
    examples = [
        example("x" * 99, "a"),
        example("Hi.", "a"),
        example("", "a"),
        example("Hi.", ""),
        example("x" * 98, "a"),
    ]
    rows = sft_rows(examples, TOKENIZER, CONFIG, train_on_prompt=False)
    reasons = "2 dropped: prompt over 40 tokens, 1 dropped: empty prompt, 1 dropped: empty answer"
    assert rows.report == f"1 rows, {reasons}"
    assert rows.examples.tolist() == [1]


def test_when_nothing_is_left_the_report_is_the_error():
    with pytest.raises(
        ValueError, match=r"is left \(0 rows, 1 dropped: prompt over 40 tokens\): raise data.max_prompt"
    ):
        prompt_rows([example("x" * 99)], TOKENIZER, CONFIG)


def test_no_examples_at_all_are_no_held_out_rows():
    with pytest.raises(ValueError, match=r"is left \(0 rows\): raise data.held_out or name an eval_path"):
        pair_rows([], TOKENIZER, CONFIG)


def test_a_pair_is_chosen_then_rejected_with_the_loss_on_both_answers():
    rows = pair_rows([example("Hi.", "", "Yes.", "Never."), example("Hi.", "", "a", "b")], TOKENIZER, CONFIG)
    batch = Batches(rows, batch_size=2, seed=0, shuffle=False)[0]
    assert (
        batch.tokens.shape
        == batch.mask.shape
        == batch.loss_mask.shape
        == (2, 2, Batches(rows, batch_size=1, seed=0).length)
    )
    texts = [[TOKENIZER.decode(batch.tokens[i, j][batch.loss_mask[i, j]]) for j in range(2)] for i in range(2)]
    assert texts == [[" Yes.</s>", " Never.</s>"], [" a</s>", " b</s>"]]


def test_a_pair_that_is_equal_after_the_cut_is_dropped_and_one_that_is_not_is_cut():
    long = "no " * 100
    examples = [example("Hi.", "", long + "yes", long), example("Hi.", "", "Yes.", long), example("Hi.", "", "a", "a")]
    rows = pair_rows(examples, TOKENIZER, CONFIG)
    assert rows.report == "1 rows, 2 dropped: chosen and rejected equal, 1 cut at 60 tokens"
    assert rows.examples.tolist() == [1]


def test_prompts_come_once_and_nothing_of_them_is_trained():
    rows = prompt_rows([example("Hi."), example("Ho."), example("Hi.")], TOKENIZER, CONFIG)
    assert rows.report == "2 rows, 1 dropped: repeated prompt"
    batch = Batches(rows, batch_size=2, seed=0, side="left", shuffle=False)[0]
    assert not batch.loss_mask.any() and batch.mask[:, -1].all()
    assert TOKENIZER.decode(batch.tokens[1][batch.mask[1]]) == "\n\nHuman: Ho.\n\nAssistant:"


def made_rows(lengths: list[int], per_row: int = 1) -> Rows:
    """Sequence s holds s + 1, s + 2, ...; trained from its second token."""
    num = len(lengths) // per_row
    lengths = lengths[: num * per_row]
    tokens = np.concatenate([s + 1 + np.arange(length) for s, length in enumerate(lengths)]).astype(np.int32)
    starts = np.ones(len(lengths), np.int32)
    return Rows(tokens, np.cumsum([0, *lengths]), starts, per_row, np.arange(num, dtype=np.int32), "")


LENGTHS = st.lists(st.integers(1, 20), min_size=2, max_size=40)


@given(lengths=LENGTHS, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_every_row_comes_once_an_epoch_but_for_the_incomplete_batch(lengths, seed, data):
    batch_size = data.draw(st.integers(1, len(lengths)))
    batches = Batches(made_rows(lengths), batch_size=batch_size, seed=seed)
    steps = batches.steps_per_epoch
    assert steps == len(lengths) // batch_size
    for epoch in range(3):
        rows = np.concatenate([batches.indices(epoch * steps + position) for position in range(steps)])
        assert len(rows) == steps * batch_size == len(set(rows.tolist())) and set(rows.tolist()) <= set(
            range(len(lengths))
        )


@given(lengths=LENGTHS, seed=st.integers(0, 2**32 - 1), start=st.integers(0, 200))
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(lengths, seed, start):
    rows = made_rows(lengths)
    uninterrupted = Batches(rows, batch_size=2, seed=seed)
    for step in range(start):
        uninterrupted.indices(step)
    resumed = Batches(rows, batch_size=2, seed=seed)
    for step in range(start, start + 3):
        old, new = uninterrupted[step], resumed[step]
        for field in ("tokens", "mask", "loss_mask"):
            np.testing.assert_array_equal(getattr(old, field), getattr(new, field))


def test_epochs_and_seeds_have_different_orders_and_no_shuffle_has_that_of_the_rows():
    rows = made_rows([1] * 50)
    orders = [Batches(rows, batch_size=50, seed=seed).indices(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert Batches(rows, batch_size=10, seed=0, shuffle=False).indices(7).tolist() == list(range(20, 30))


def test_the_order_is_the_same_under_every_numpy():
    assert Batches(made_rows([1] * 8), batch_size=8, seed=3).indices(2).tolist() == [3, 7, 4, 0, 1, 6, 2, 5]


@given(lengths=LENGTHS, side=st.sampled_from(["left", "right"]), per_row=st.sampled_from([1, 2]))
@settings(max_examples=50)
def test_padding_on_either_side_gives_the_sequences_back(lengths, side, per_row):
    rows = made_rows(lengths, per_row)
    batches = Batches(rows, batch_size=len(rows), seed=0, side=side, shuffle=False)
    batch = batches[0]
    longest = int(np.diff(rows.offsets).max())
    assert batches.length % 8 == 0 and longest <= batches.length < longest + 8
    assert (batch.tokens.dtype, batch.mask.dtype, batch.loss_mask.dtype) == (np.int32, np.bool_, np.bool_)
    assert batch.tokens.shape == ((len(rows),) if per_row == 1 else (len(rows), 2)) + (batches.length,)
    flat, masks, losses = (a.reshape(-1, batches.length) for a in (batch.tokens, batch.mask, batch.loss_mask))
    for s, (tokens, mask, loss) in enumerate(zip(flat, masks, losses, strict=True)):
        assert tokens[mask].tolist() == sequence(rows, s)
        assert tokens[loss].tolist() == sequence(rows, s)[1:]
        assert mask[0 if side == "right" else -1] and np.count_nonzero(np.diff(mask)) <= 1
        assert not tokens[~mask].any()


@pytest.mark.parametrize("batch_size", [0, -1, 4])
def test_a_batch_that_the_rows_cannot_fill_is_refused_with_the_largest_that_they_can(batch_size):
    with pytest.raises(ValueError, match=f"batch size {batch_size} does not fit 3 rows: from 1 to 3 is possible"):
        Batches(made_rows([1, 2, 3]), batch_size=batch_size, seed=0)


def test_batches_cannot_be_iterated_because_they_have_no_end():
    with pytest.raises(TypeError):
        iter(Batches(made_rows([1, 2, 3]), batch_size=1, seed=0))


def real_config(name: str, stage: str, **source) -> DataConfig:
    folder = REAL / name
    sources = (SourceConfig(str(folder / "train.jsonl"), eval_path=str(folder / "test.jsonl"), **source),)
    return DataConfig(sources=sources, split={"sft": "1,0,0", "reward": "0,1,0", "ppo": "0,0,1"}[stage])


@needs_real_data
def test_hh_rlhf_transcripts_become_pairs_that_read_as_the_file_does():
    config = real_config("hh-rlhf-harmless", "reward", transcript=True)
    examples = load_examples(config, "reward", held_out=True)
    rows = pair_rows(examples, TOKENIZER, dataclasses.replace(config, max_prompt_length=4000, max_length=8000))
    assert rows.report == "250 rows, 2 dropped: empty answer"
    text = (REAL / "hh-rlhf-harmless" / "test.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n") if line]
    for i in (0, 100, 249):
        line = lines[rows.examples[i]]
        for j, field in enumerate(("chosen", "rejected")):
            text = TOKENIZER.decode(sequence(rows, 2 * i + j)).replace("</s>", "")
            assert text.split() == line[field].split()


@needs_real_data
@pytest.mark.slow
def test_alpaca_eval_is_tokenised_in_seconds():
    config = real_config("alpaca-eval-preferences", "reward")
    examples = load_examples(config, "reward", held_out=False)
    start = time.perf_counter()
    rows = pair_rows(examples, TOKENIZER, config)
    assert len(examples) == 13_823 and len(rows) > 6_000
    assert time.perf_counter() - start < 60
