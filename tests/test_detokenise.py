"""Text of tokens as they come: the pieces are the text of all tokens, and end before a stop string."""

import hypothesis
import pytest
import tiny_tokenizer
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlhf_jax.detokenise import LONGEST_WINDOW, TextStream, decode_ids, token_bytes


def stripping_like():
    """SentencePiece as in Llama 2, whose decoder strips the blank at the beginning of a text."""
    tokenizer = tiny_tokenizer.llama_like()
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words_like():
    """Whole words, with blanks between them that the decoder writes."""
    words = {word: i for i, word in enumerate(["[UNK]", "a", "##b", "c", ".", "##d"])}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


TOKENIZERS = {
    "byte-level": tiny_tokenizer.gpt2_like(),
    "sentencepiece": tiny_tokenizer.llama_like(),
    "sentencepiece, stripped": stripping_like(),
    "words": words_like(),
}
EACH = pytest.mark.parametrize("name", TOKENIZERS)


def pieces(name, ids, stops=(), **options):
    stream = TextStream(TOKENIZERS[name], stops, **options)
    found = [stream.push(id) for id in ids]
    return [*found, stream.finish()], stream


@EACH
@hypothesis.settings(max_examples=20)
@hypothesis.given(data=st.data())
def test_the_pieces_of_any_tokens_are_together_the_text_of_all(name, data):
    size = len(TOKENIZERS[name])
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=3 * LONGEST_WINDOW))
    found, stream = pieces(name, ids)
    assert "".join(found) == decode_ids(TOKENIZERS[name], ids)
    assert stream.size == len("".join(found))
    stripped, _ = pieces(name, ids, strip=True)
    assert "".join(stripped) == decode_ids(TOKENIZERS[name], ids).lstrip()


@EACH
@hypothesis.settings(max_examples=20)
@hypothesis.given(data=st.data())
def test_the_pieces_end_before_the_first_stop_string_of_the_text(name, data):
    size = len(TOKENIZERS[name])
    ids = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=60))
    whole = decode_ids(TOKENIZERS[name], ids)
    hypothesis.assume(whole)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[start : start + data.draw(st.integers(1, 6))]
    found, stream = pieces(name, ids, [stop, "in none of the texts"])
    assert stream.stopped and "".join(found) == whole[: whole.index(stop)]
    assert stream.end == whole.index(stop)


@pytest.mark.parametrize("text", ["日本語 ok", "né 🙂🙂 – “q”", "a\N{COMBINING ACUTE ACCENT}"])
@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
def test_characters_of_several_tokens_come_whole(name, text):
    ids = TOKENIZERS[name](text, add_special_tokens=False).input_ids
    assert len(ids) > len(text)
    found, _ = pieces(name, ids)
    assert "".join(found) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(found)
    assert sum(map(bool, found)) > 1, "in more than one piece"


def test_a_run_of_bytes_that_is_no_utf_8_is_not_given_before_it_ends():
    # The decoder writes a replacement for every byte of such a run, also for those that were a character before.
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [*tokenizer("日", add_special_tokens=False).input_ids, tokenizer.convert_tokens_to_ids("<0xFF>")]
    found, _ = pieces("sentencepiece", ids)
    assert "".join(found) == decode_ids(tokenizer, ids) == "\N{REPLACEMENT CHARACTER}" * 4


def test_text_that_may_be_the_beginning_of_a_stop_string_is_kept_until_it_is_none():
    tokenizer = TOKENIZERS["byte-level"]
    ids = [tokenizer(each, add_special_tokens=False).input_ids for each in "xabay"]
    stream = TextStream(tokenizer, ["abac"])
    assert [stream.push(*each) for each in ids] == ["x", "", "", "", "abay"]
    stream = TextStream(tokenizer, ["abac"])
    assert [stream.push(*each) for each in ids[:4]] == ["x", "", "", ""]
    assert stream.finish() == "aba"


def test_a_token_has_its_bytes_unless_they_are_part_of_a_character():
    assert token_bytes(TOKENIZERS["byte-level"], 1) == ("</s>", list(b"</s>"))
    byte_level, pieces_ = TOKENIZERS["byte-level"], TOKENIZERS["sentencepiece"]
    first, *_ = byte_level("é", add_special_tokens=False).input_ids
    assert token_bytes(byte_level, first) == ("\N{REPLACEMENT CHARACTER}", None)
    assert token_bytes(pieces_, pieces_.convert_tokens_to_ids("<0xC3>"))[1] == [0xC3]
