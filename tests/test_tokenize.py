"""Examples to token rows: masks, truncation and dropped rows by hand."""

import copy
import dataclasses

import numpy as np
import pytest
from chat_templates import tokenizer_of
from row_specs import SPECS
from tiny_tokenizer import chatml_like, gpt2_like, llama_like, opt_like

from rlhf_jax.data.batches import Batches
from rlhf_jax.data.chat_template import encode_prompt, encode_response, prepare_tokenizer
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.records import Example, Turn
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.selection import rows_from_examples

TOKENIZER = prepare_tokenizer(gpt2_like())
CONFIG = DataConfig(sources=(SourceConfig("x.jsonl"),), max_prompt_length=40, max_length=60)


def example(prompt: str, answer: str = "", chosen: str = "", rejected: str = "") -> Example:
    return Example((("user", prompt),), answer, chosen, rejected, "x.jsonl", 1)


def document(text: str) -> Example:
    return Example((), "", "", "", "x.txt", 1, text=text)


def sequences(rows: Rows) -> list[list[int]]:
    (part,) = rows.parts
    return [each.tokens.tolist() for row in range(len(part)) for (doc,) in [part.documents(row)] for each in doc]


def learned_texts(rows: Rows) -> list[str]:
    batch = Batches(rows, batch_size=len(rows), seed=0, shuffle=False)[0]
    tokens, masks = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.loss_mask))
    return [TOKENIZER.decode(row[mask]) for row, mask in zip(tokens, masks, strict=True)]


@pytest.mark.parametrize("kind", [gpt2_like, opt_like, chatml_like, llama_like])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_on_the_answer_and_its_end_token_and_nothing_else(kind, side):
    tokenizer = prepare_tokenizer(kind())
    config = dataclasses.replace(CONFIG, max_prompt_length=90, max_length=150)
    examples = [example("Hi.", "Yes."), example("What is 3 + 4?", "Sure! 7. Anything else?")]
    rows = rows_from_examples(examples, config, tokenizer, SPECS["sft"])
    batch = Batches(rows, batch_size=2, seed=0, side=side, shuffle=False)[0]
    for i, e in enumerate(examples):
        prompt, response = encode_prompt(tokenizer, e.turns), encode_response(tokenizer, e.turns, e.answer)
        assert batch.tokens[i][batch.mask[i]].tolist() == prompt + response
        assert batch.tokens[i][batch.loss_mask[i]].tolist() == response
        assert response[-1] in (tokenizer.eos_token_id, 3)


HISTORY = (("user", "Hi."), ("assistant", "Hello!"), ("user", "7?"))


def test_the_loss_is_on_the_last_answer_on_all_answers_or_on_everything_except_the_first_token():
    examples = [Example(HISTORY, "Yes.", "", "", "x.jsonl", 1)]
    assert learned_texts(rows_from_examples(examples, CONFIG, TOKENIZER, SPECS["sft"])) == [" Yes.</s>"]
    assert learned_texts(
        rows_from_examples(examples, CONFIG, TOKENIZER, dataclasses.replace(SPECS["sft"], learn="assistant"))
    ) == [" Hello!</s> Yes.</s>"]
    rows = rows_from_examples(examples, CONFIG, TOKENIZER, dataclasses.replace(SPECS["sft"], learn="everything"))
    batch = Batches(rows, batch_size=1, seed=0)[0]
    assert batch.loss_mask.sum() == batch.mask.sum() - 1
    assert batch.mask[0, 0] and not batch.loss_mask[0, 0]


def test_a_long_answer_is_truncated_on_the_right_with_its_end_token_and_counted():
    examples = [example("Hi.", "no " * 99 + "no"), example("Hi.", "Yes.")]
    rows = rows_from_examples(examples, CONFIG, TOKENIZER, SPECS["sft"])
    whole = encode_prompt(TOKENIZER, examples[0].turns) + encode_response(
        TOKENIZER, examples[0].turns, examples[0].answer
    )
    first, second = sequences(rows)
    assert first == whole[:60] and TOKENIZER.eos_token_id not in first
    assert second[-1] == TOKENIZER.eos_token_id
    assert rows.report == "2 rows, 1 cut at 60 tokens"


def test_an_answer_that_exactly_fits_is_not_truncated():
    turns = (("user", "Hi."),)
    length = len(encode_prompt(TOKENIZER, turns)) + len(encode_response(TOKENIZER, turns, "a1 b2 c3"))
    for max_length, cut in [(length, ""), (length - 1, f", 1 cut at {length - 1} tokens")]:
        config = dataclasses.replace(CONFIG, max_prompt_length=length - 2, max_length=max_length)
        rows = rows_from_examples([example("Hi.", "a1 b2 c3")], config, TOKENIZER, SPECS["sft"])
        assert (rows.longest, rows.report) == (max_length, "1 rows" + cut)


def test_rows_truncated_on_the_left_keep_the_end_of_the_prompt_and_the_whole_answer():
    config = dataclasses.replace(CONFIG, long_rows="left")
    prompt, answer = "x" * 200 + "7", "y" * 30
    whole = encode_prompt(TOKENIZER, (("user", prompt),)) + encode_response(TOKENIZER, (("user", prompt),), answer)
    rows = rows_from_examples([example(prompt, answer)], config, TOKENIZER, SPECS["sft"])
    (row,) = sequences(rows)
    assert row == whole[-len(row) :] and len(row) == 60
    assert learned_texts(rows) == [" " + answer + "</s>"]
    assert rows.report == "1 rows, 1 cut at 60 tokens"


def test_the_bos_is_kept_when_the_start_of_a_prompt_is_truncated():
    tokenizer = prepare_tokenizer(opt_like())
    config = dataclasses.replace(CONFIG, long_rows="left")
    (row,) = sequences(rows_from_examples([example("x" * 200, "no")], config, tokenizer, SPECS["ppo"]))
    assert len(row) == 40 and row[0] == 1 and row.count(1) == 1


def test_both_answers_of_a_pair_follow_the_same_prompt_after_truncation_on_the_left():
    config = dataclasses.replace(CONFIG, long_rows="left")
    one, other = sequences(
        rows_from_examples([example("x" * 100, "", "yes" * 10, "no")], config, TOKENIZER, SPECS["reward"])
    )
    opening = TOKENIZER("\n\nAssistant:").input_ids
    ends = [next(i for i in range(len(row)) if row[i : i + len(opening)] == opening) for row in (one, other)]
    assert one[: ends[0]] == other[: ends[1]] and 0 < ends[0] < 40


def test_rows_that_are_too_long_are_dropped_if_configured():
    config = dataclasses.replace(CONFIG, long_rows="drop")
    examples = [example("x" * 99, "a"), example("Hi.", "no " * 99 + "no"), example("Hi.", "a")]
    rows = rows_from_examples(examples, config, TOKENIZER, SPECS["sft"])
    assert rows.report == "1 rows, 1 dropped: prompt over 40 tokens, 1 dropped: over 60 tokens"


def test_long_prompts_and_empty_texts_are_dropped_and_counted_by_reason():
    long = ["x" * 99, "x" * 98]
    examples = [example(long[0], "a"), example("Hi.", "a"), example("", "a"), example("Hi."), example(long[1], "a")]
    rows = rows_from_examples(examples, CONFIG, TOKENIZER, SPECS["sft"])
    reasons = "1 dropped: empty prompt, 1 dropped: empty answer, 2 dropped: prompt over 40 tokens"
    assert rows.report == f"1 rows, {reasons}"
    assert rows.parts[0].store.numbers().tolist() == [1]


def test_when_no_row_is_left_the_report_is_the_error():
    with pytest.raises(
        ValueError, match=r"there are no rows to train on \(0 rows, 1 dropped: prompt over 40 tokens\): add"
    ):
        rows_from_examples([example("x" * 99)], CONFIG, TOKENIZER, SPECS["ppo"])


def test_a_pair_is_stored_chosen_then_rejected_with_the_loss_on_both_answers():
    examples = [example("Hi.", "", "Yes.", "Never."), example("Hi.", "", "a", "b")]
    rows = rows_from_examples(examples, CONFIG, TOKENIZER, SPECS["reward"])
    batches = Batches(rows, batch_size=2, seed=0, shuffle=False)
    batch = batches[0]
    assert batch.tokens.shape == batch.mask.shape == batch.loss_mask.shape == (2, 2, batches.lengths[0])
    assert learned_texts(rows) == [" Yes.</s>", " Never.</s>", " a</s>", " b</s>"]


def test_a_pair_with_equal_answers_after_truncation_is_dropped_and_others_are_truncated():
    long = "no " * 100
    examples = [example("Hi.", "", long + "yes", long), example("Hi.", "", "Yes.", long), example("Hi.", "", "a", "a")]
    rows = rows_from_examples(examples, CONFIG, TOKENIZER, SPECS["reward"])
    assert rows.report == "1 rows, 2 dropped: chosen and rejected equal, 1 cut at 60 tokens"
    assert rows.parts[0].store.numbers().tolist() == [1]


def test_each_prompt_occurs_once_and_has_no_loss():
    rows = rows_from_examples([example("Hi."), example("Ho."), example(" Hi.")], CONFIG, TOKENIZER, SPECS["ppo"])
    assert rows.report == "2 rows, 1 dropped: repeated prompt"
    batch = Batches(rows, batch_size=2, seed=0, side="left", shuffle=False)[0]
    assert not batch.loss_mask.any() and batch.mask[:, -1].all()
    assert TOKENIZER.decode(batch.tokens[1][batch.mask[1]]) == "\n\nHuman: Ho.\n\nAssistant:"


def test_a_document_is_split_into_pieces_that_all_have_a_loss():
    text = " ".join(map(str, range(200)))
    rows = rows_from_examples([document(text), document("</s> is text"), document("")], CONFIG, TOKENIZER, SPECS["sft"])
    pieces = sequences(rows)
    assert all(len(piece) == 60 for piece in pieces[:-2]) and 1 < len(pieces[-2]) <= 60
    assert TOKENIZER.decode(np.concatenate(pieces[:-1])) == text + "</s>"
    assert pieces[-1].count(TOKENIZER.eos_token_id) == 1 and TOKENIZER.decode(pieces[-1]) == "</s> is text</s>"
    assert "1 dropped: empty document" in rows.report
    batch = Batches(rows, batch_size=len(rows), seed=0, shuffle=False)[0]
    assert (batch.loss_mask.sum(axis=1) == batch.mask.sum(axis=1) - 1).all()


def test_an_example_rejected_by_the_template_is_reported():
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}{{ messages }}"
    bad = Example((("system", "x"), ("user", "y")), "z", "", "", "x.jsonl", 7)
    with pytest.raises(
        ValueError, match="x.jsonl, row 7: the tokenizer's chat template refuses a dialogue: user first"
    ):
        rows_from_examples([bad], CONFIG, prepare_tokenizer(gpt2_like(chat_template=strict)), SPECS["sft"])


def test_what_a_chat_template_leaves_out_of_a_row_is_counted_by_its_name():
    named = (
        "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}:\n{{ m.content }}{{ eos_token }}"
    )
    named += "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
    asked, thought = Turn("user", "q", {"name": "Ada", "id": 7}), "<think>\nI add.\n</think>\n\n7."
    rows = [
        Example((asked,), "7.", "", "", "x.jsonl", 1),
        Example((("user", "r"),), thought, "", "", "x.jsonl", 2),
        Example((asked, ("assistant", "a"), ("user", "s")), "7.", "", "", "x.jsonl", 3, extra={"cost": {"usd": 1}}),
        Example((("user", "t"), ("assistant", thought), ("user", "u")), "7.", "", "", "x.jsonl", 4),
        Example((("user", ""),), thought, "", "", "x.jsonl", 5, extra={"id": 8}),  # is dropped
    ]
    both, thoughts = {"id": 2, "name": 2, "cost": 1}, {"reasoning of answers": 1}
    last, all_turns = SPECS["sft"], dataclasses.replace(SPECS["sft"], learn="assistant")
    for name, spec, expected in (
        (gpt2_like(chat_template=named), last, {"id": 2, "cost": 1}),
        (chatml_like(), last, both),
        (tokenizer_of("qwen3"), last, both),
        (tokenizer_of("qwen3"), all_turns, both | thoughts),  # it leaves out reasoning of earlier answers
        (tokenizer_of("r1"), last, both | thoughts),
        (tokenizer_of("r1"), all_turns, both | {"reasoning of answers": 2}),
    ):
        found = rows_from_examples(rows, CONFIG, prepare_tokenizer(copy.deepcopy(name)), spec)
        assert found.parts[0].stats.unwritten == expected
    assert "2 without reasoning of answers, which the template does not write (data.template)" in found.report
