"""Scores of dialogues and texts by a reward model, its accuracy on pairs, and the interval of a win rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax import hosts
from rlhf_jax.data.chat_template import encode_dialogues, prepare_tokenizer
from rlhf_jax.data.dialogues import parse_messages
from rlhf_jax.data.records import Dialogue, Turn
from rlhf_jax.decode import bucket_length
from rlhf_jax.models.attention import Choice
from rlhf_jax.models.pretrained import Pretrained, score
from rlhf_jax.reward_functions import Answered
from rlhf_jax.stages.run_folder import date_of_export

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score_texts(
    scorer: Pretrained, texts: Sequence[str | Sequence[Mapping[str, Any]]], *, batch_size: int = 64
) -> np.ndarray:
    """Scores of texts, and of dialogues that end with the assistant's turn.

    Args:
        scorer: from `reward_from_pretrained`, with a tokenizer.
        texts: each a text, which is encoded as transformers does it, or messages [{"role", "content"}, ...], which
            the chat template of the scorer's tokenizer renders.
        batch_size: sequences scored at once.
    Returns:
        [B] float32. Of a sequence that exceeds the model's positions the beginning is left out.
    Raises:
        ValueError: no scalar head, no tokenizer, no dialogue, or one that the template rejects.
    """
    read = [each if isinstance(each, str) else Dialogue(parse_messages(each)) for each in texts]
    return score_rows(scorer, encode_each(scorer_tokenizer(scorer), read), batch_size)


def scorer_tokenizer(scorer: Pretrained) -> PreTrainedTokenizerBase:
    """The scorer's tokenizer with a template, and with the date of its run. ValueError if it has none."""
    if scorer.tokenizer is None:
        raise ValueError(f"{scorer.source} has no tokenizer: save one into the folder (tokenizer.save_pretrained)")
    return prepare_tokenizer(scorer.tokenizer, date=date_of_export(scorer.folder))


def encode_each(tokenizer: PreTrainedTokenizerBase, rows: Sequence[str | Dialogue]) -> list[np.ndarray]:
    """int32 ids of each text or dialogue; a BOS that a text has already is not repeated. ValueError with the row."""
    encoded: list = [None] * len(rows)
    dialogues = [i for i, row in enumerate(rows) if not isinstance(row, str)]
    if not all(rows[i].turns and rows[i].turns[-1][0] == "assistant" for i in dialogues):
        raise ValueError("a dialogue to score ends with a turn of the assistant")
    for i, found in zip(dialogues, encode_dialogues(tokenizer, [rows[i] for i in dialogues]), strict=True):
        if isinstance(found, ValueError):
            raise ValueError(f"dialogue {i + 1}: {found}") from found
        encoded[i] = found.tokens
    for i, row in enumerate(rows):
        if isinstance(row, str):
            has_bos = bool(tokenizer.bos_token) and row.startswith(tokenizer.bos_token)
            ids = tokenizer(row, add_special_tokens=not has_bos, verbose=False).input_ids
            encoded[i] = np.array(ids or [tokenizer.eos_token_id], np.int32)
    return encoded


def fit_positions(ids: np.ndarray, positions: int, bos: int | None) -> np.ndarray:
    """The ids without their beginning where they exceed the positions; a BOS is kept."""
    if len(ids) <= positions:
        return ids
    return np.concatenate([ids[:1], ids[1 - positions :]]) if ids[0] == bos else ids[-positions:]


def score_rows(scorer: Pretrained, rows: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    """[B] float32 scores of sequences of ids, those of similar length at once."""
    positions, bos = scorer.config.max_positions, scorer.tokenizer.bos_token_id
    fitted = [fit_positions(ids, positions, bos) for ids in rows]
    widths = np.array([min(bucket_length(len(ids)), positions) for ids in fitted], int)
    scores = np.zeros(len(rows), np.float32)
    for width in np.unique(widths):
        (chosen,) = (widths == width).nonzero()
        tokens, mask = np.zeros((len(chosen), width), np.int32), np.zeros((len(chosen), width), bool)
        for row, index in enumerate(chosen):
            tokens[row, : len(fitted[index])], mask[row, : len(fitted[index])] = fitted[index], True
        scores[chosen] = score_sequences(scorer, tokens, mask, min(batch_size, len(chosen)))
    return scores


def score_sequences(
    scorer: Pretrained, tokens: np.ndarray, mask: np.ndarray, batch_size: int, attention: Choice = "auto"
) -> np.ndarray:
    """[B] scores of [B, T] sequences, `batch_size` at a time."""
    real = mask.any(axis=0)  # without the padding that all rows share, which may exceed the model's positions
    parts = chunks(batch_size, tokens[:, real], mask[:, real])
    return np.concatenate([hosts.fetch(score(scorer, *part, attention=attention)) for part in parts])[: len(tokens)]


def chunks(size: int, *arrays: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """Chunks of `size` rows of each array; the last repeats its last row, so that one shape is compiled."""
    rows = len(arrays[0])
    filled = [np.pad(x, ((0, -rows % size), (0, 0)), mode="edge") for x in arrays]
    return [tuple(x[i : i + size] for x in filled) for i in range(0, rows, size)]


def score_answers(scorer: Pretrained, answers: Sequence[Answered], batch_size: int) -> np.ndarray:
    """[B] float32 scores of answers, each read as text by the scorer's own tokenizer and template."""
    tokenizer = scorer_tokenizer(scorer)
    dialogues = [Dialogue((*each.turns, Turn("assistant", each.answer)), each.tools) for each in answers]
    rows = encode_each(tokenizer, dialogues)
    cut = [ids if each.ended else ids[:-1] for ids, each in zip(rows, answers, strict=True)]
    return score_rows(scorer, cut, batch_size)


def win_rate(scores: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """How often `scores` [B] are above `others` [B], ties counted half, and its 95% interval.

    The interval is that of `wilson` for B independent prompts; with ties it is wider than it need be.
    """
    difference = np.sign(np.subtract(scores, others))
    rate = float((difference / 2 + 0.5).mean())
    return rate, *wilson(rate, len(difference))


def wilson(rate: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share of `n` independent cases (Wilson 1927, J. Am. Stat. Assoc. 22, 209)."""
    z = 1.959964
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def pair_accuracy(scores: np.ndarray, lengths: np.ndarray, sources: Sequence[str]) -> dict[str, Any]:
    """How often the chosen answer of a pair scores higher, next to how often it is the longer one.

    Args:
        scores, lengths: [B, 2] of the chosen and the rejected answer; lengths in tokens.
        sources: [B] where each pair comes from.
    Returns:
        {pairs, accuracy, accuracy_interval, longer, longer_interval} of all pairs, with a list of the same in
        "by_length", for quarters of the pairs by the difference of lengths, chosen minus rejected, "from" to "to", of
        which equal differences share one; and in "by_source" {source: the same} where there are several. Intervals and
        ties are those of `win_rate`.
    """

    def figures(of: np.ndarray) -> dict[str, Any]:
        found: dict[str, Any] = {"pairs": int(of.size)}
        for name, values in (("accuracy", scores), ("longer", lengths)):
            rate, low, high = win_rate(values[of, 0], values[of, 1])
            found |= {name: rate, f"{name}_interval": [low, high]}
        return found

    difference = lengths[:, 0].astype(int) - lengths[:, 1]
    # Pairs of one difference are all in the quarter that their middle is in.
    _, place, counts = np.unique(difference, return_inverse=True, return_counts=True)
    quarter = np.floor(4 * (np.cumsum(counts) - counts / 2) / len(difference))[place]
    quarters = [np.flatnonzero(quarter == part) for part in np.unique(quarter)]
    ends = [{"from": int(difference[each].min()), "to": int(difference[each].max())} for each in quarters]
    found = figures(np.arange(len(scores)))
    found["by_length"] = [end | figures(each) for end, each in zip(ends, quarters, strict=True)]
    if len(set(sources)) > 1:
        where = np.array(sources)
        found["by_source"] = {each: figures(np.flatnonzero(where == each)) for each in sorted(set(sources))}
    return found


def best_of(scores: np.ndarray, count: int) -> np.ndarray:
    """[B] the row with the highest of each `count` adjacent scores [B count]; of equal ones the first."""
    return np.arange(0, len(scores), count) + np.asarray(scores).reshape(-1, count).argmax(axis=1)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of values [B] and its 95% interval by the normal approximation, 1.96 standard errors to each side.

    Of a single value the interval is infinite.
    """
    values = np.asarray(values, np.float64)
    half = 1.959964 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)
