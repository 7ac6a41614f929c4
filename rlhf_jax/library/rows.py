"""Batches of the library: made from rows of different lengths, and checked before anything runs. On the host.

B rows of T tokens. A batch is a mapping of arrays: "tokens", "mask" and "loss_mask" [B, T], and any others with one
entry per token, [B, T], or per row, [B, ...]. Entry t of a row always belongs to its token t; nothing is shifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax import hosts
from rlhf_jax.decode import bucket_length
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.pretrained import check_in_vocabulary

MASKS = ("mask", "loss_mask")


def pad_rows(rows: Sequence[Mapping[str, Any]], length: int = 0) -> dict[str, np.ndarray]:
    """The batch of these rows, padded on the right with 0.

    Args:
        rows: mappings with the same keys, "tokens" among them, a sequence of token ids. Of the other values, a sequence
            has one entry per token, and a number is of the whole row. "loss_mask": 1 where the token is learned.
        length: T; 0: the power of two, at least 32, that the longest row fits in, so that few lengths are compiled.
    Returns:
        "tokens" [B, T] int32, "mask" [B, T] bool, true on the tokens of the rows, and every other key, [B, T] or [B]:
        int32, bool or float32 as its values are; "loss_mask" bool.
    Raises:
        ValueError: no rows, keys that differ, a key "mask", a sequence of another length than its tokens, or a row
            longer than `length`.
    """
    if not rows or "tokens" not in rows[0]:
        raise ValueError('give at least one row, each a mapping with "tokens", a sequence of token ids')
    keys, sizes = rows[0].keys(), [len(row.get("tokens", ())) for row in rows]
    if "mask" in keys:
        raise ValueError('a row has no "mask": all its tokens are real; the tokens to learn are those of "loss_mask"')
    width = length or bucket_length(max(sizes))
    if max(sizes) > width:
        raise ValueError(f"row {int(np.argmax(sizes))} has {max(sizes)} tokens: set length to at least that, or cut it")
    for index, row in enumerate(rows):
        if row.keys() != keys:
            raise ValueError(f"row {index} has the keys {sorted(row)} and row 0 {sorted(keys)}: give all the same")
    batch = {key: _stack(key, [np.asarray(row[key]) for row in rows], sizes, width) for key in keys}
    return batch | {"mask": np.arange(width) < np.asarray(sizes)[:, None]}


def _stack(name: str, values: Sequence[np.ndarray], sizes: Sequence[int], width: int) -> np.ndarray:
    """[B, T] of sequences with one entry per token, padded with 0, or [B] of numbers."""
    per_token = values[0].ndim > 0
    for index, (value, size) in enumerate(zip(values, sizes, strict=True)):
        if value.shape != ((size,) if per_token else ()):
            raise ValueError(
                f"{name} of row {index} has shape {list(value.shape)} and the row {size} tokens: give one value per "
                "token, or in every row one number of the whole row"
            )
    array = np.zeros((len(values), width) if per_token else len(values), np.result_type(*values))
    for index, value in enumerate(values):
        array[(index, slice(len(value))) if per_token else index] = value
    return _as_mask(name, array) if name in MASKS else as_plain(name, array)


def pad_prompts(prompts: Sequence[Sequence[int]], config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [B, P] of prompts, padded on the left to a power of two.

    Raises:
        ValueError: no prompts, an empty one, or an id that is not an integer of the vocabulary.
    """
    if not len(prompts):
        raise ValueError("there are no prompts: give at least one")
    ids = [np.asarray(prompt) for prompt in prompts]
    for index, each in enumerate(ids):
        if each.ndim != 1 or not each.size or not np.issubdtype(each.dtype, np.integer):
            raise ValueError(f"prompt {index} is {each.dtype} {list(each.shape)}: give token ids, at least one integer")
    width = bucket_length(max(map(len, ids)))
    mask = np.arange(width)[::-1] < np.array([[len(each)] for each in ids])
    tokens = np.zeros(mask.shape, np.int64)
    tokens[mask] = np.concatenate(ids)
    check_in_vocabulary(config, tokens, mask, "prompts")
    return tokens.astype(np.int32), mask


def as_plain(name: str, values: Any) -> np.ndarray:
    """The values as a numpy array that the devices take: bool, int32 or float32. ValueError for other kinds."""
    array = np.asarray(hosts.fetch(values))
    if array.dtype == bool or array.dtype == np.int32 or array.dtype == np.float32:
        return array
    if np.issubdtype(array.dtype, np.integer):
        if array.size and max(abs(int(array.min())), abs(int(array.max()))) >= 2**31:
            raise ValueError(f"{name} has integers of more than 32 bits: give smaller ones, or floats")
        return array.astype(np.int32)
    if array.dtype.kind == "f" or "float" in array.dtype.name:  # bfloat16 has a kind of its own
        return array.astype(np.float32)
    raise ValueError(f"{name} has the dtype {array.dtype}: give bool, integers or floats")


def check_batch(batch: Mapping[str, Any], config: DecoderConfig, *, learns: bool) -> dict[str, np.ndarray]:
    """The arrays of a batch as `as_plain` makes them, masks as bool.

    Args:
        learns: whether "loss_mask" is needed.
    Raises:
        ValueError: an array is missing, has another dtype, shape or number of rows, or a value that is not finite; a
            token is not in the vocabulary; a row is empty, too long or not padded on the right; or nothing is learned.
    """
    names = ("tokens", "mask", "loss_mask") if learns else ("tokens", "mask")
    if lacking := [name for name in names if name not in batch]:
        raise ValueError(f"the batch has no {', '.join(lacking)}: rlhf_jax.pad_rows makes a batch from rows")
    arrays = {name: as_plain(name, values) for name, values in batch.items()}
    tokens = arrays["tokens"]
    if tokens.ndim != 2 or tokens.dtype != np.int32:
        raise ValueError(f"tokens is {tokens.dtype} {list(tokens.shape)}: give token ids, integers [B, T]")
    for name in names[1:]:
        arrays[name] = _as_mask(name, arrays[name])
    for name, array in arrays.items():
        if array.shape[:1] != tokens.shape[:1] or (array.ndim == 2 or name in MASKS) and array.shape != tokens.shape:
            raise ValueError(
                f"{name} has shape {list(array.shape)} and tokens {list(tokens.shape)}: give one entry per token, at "
                "its place, or one per row"
            )
        if array.dtype == np.float32 and not np.isfinite(array).all():
            row = np.argwhere(~np.isfinite(array))[0].tolist()
            raise ValueError(f"{name}{row} is {array[tuple(row)]}: give finite numbers, and 0 where there is none")
    _check_rows(arrays["mask"], config.max_positions)
    check_in_vocabulary(config, tokens, arrays["mask"], "tokens")
    if learns:
        _check_loss_mask(arrays["loss_mask"], arrays["mask"])
    return arrays


def _as_mask(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.float32 or not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} is {array.dtype}: give bool, or 0 and 1; weights of tokens are an array of their own")
    return array.astype(bool)


def _check_rows(mask: np.ndarray, positions: int) -> None:
    sizes = mask.sum(axis=1)
    if not sizes.size or sizes.min() == 0:
        raise ValueError(f"row {int(sizes.argmin()) if sizes.size else 0} of mask has no token: leave the row out")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        row = int((mask[:, 1:] & ~mask[:, :-1]).any(axis=1).argmax())
        raise ValueError(f"row {row} of mask has padding before a token: put tokens first, as rlhf_jax.pad_rows does")
    if sizes.max() > positions:
        raise ValueError(
            f"row {int(sizes.argmax())} has {sizes.max()} tokens, and the model has {positions} positions: cut the row"
        )


def _check_loss_mask(loss_mask: np.ndarray, mask: np.ndarray) -> None:
    if (loss_mask & ~mask).any():
        row, column = np.argwhere(loss_mask & ~mask)[0]
        raise ValueError(f"loss_mask[{row}, {column}] is true on padding: make it false where mask is false")
    if loss_mask[:, :1].any():
        row = int(loss_mask[:, 0].argmax())
        raise ValueError(f"loss_mask[{row}, 0] is true, and no token before it predicts it: make it false")
    if not loss_mask.any():
        raise ValueError("loss_mask is false everywhere, so nothing would be learned: leave the batch out")
