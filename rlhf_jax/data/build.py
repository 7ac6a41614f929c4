"""A source tokenised once, and kept under all that its tokens depend on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.encode import Wanted
from rlhf_jax.data.places import content_key, read
from rlhf_jax.data.store import Store, write
from rlhf_jax.data.tokenise import Shares, Tally, check_bad, encoded_blocks

BLEND = ("weight", "epochs", "max_rows")  # of a source, what its tokens do not depend on


def tokenised(
    source: SourceConfig,
    place: dict[str, Any],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
    shares: Shares,
) -> tuple[Store, Tally]:
    """The rows of a place that a stage may use, from the cache, or built and put there.

    Two processes that want the same build it once: the second waits. A build that is killed leaves nothing that is
    taken for one.

    Args:
        source: with its mapping resolved.
        place: the arguments of `places.read`.
    Raises:
        ValueError: more than `config.max_bad_rows` rows are bad, with the first of them; and as `places.read`.
    """
    cache = cache_folder(config)
    parts = {
        "content": content_key(**place, memo=cache / "contents.json"),
        "mapping": mapping_key(source),
        "wanted": dataclasses.asdict(wanted),
        "shares": dataclasses.asdict(shares),
        "tokenizer": tokenizer_key(tokenizer),
        "code": code_key(),
    }
    folder = cache / hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
    if not folder.exists():
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                _build(folder, parts, source, place, config, tokenizer, wanted, shares)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    tally = tally_of(report)
    check_bad(tally.bad, tally.bad_shown, config.max_bad_rows)
    return Store(folder / "rows.arrow", wanted.per_row, report["digest"]), tally


def _build(
    folder: Path,
    parts: dict,
    source: SourceConfig,
    place: dict[str, Any],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
    shares: Shares,
) -> None:
    unfinished = folder.with_suffix(f".{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        source = dataclasses.replace(source, path=place["path"])  # what its examples are said to come from
        rows = itertools.islice(read(**place), source.limit or None)
        tally = Tally()

        def batches() -> Iterator[pa.RecordBatch]:
            nonlocal tally
            with tqdm(desc=f"{wanted.stage}: tokenising {source.path}", unit=" rows", delay=2, disable=None) as bar:
                for batch, done in encoded_blocks(rows, source, tokenizer, wanted, shares):
                    bar.update(done.rows)
                    tally = tally.plus(done)
                    check_bad(tally.bad, tally.bad_shown, config.max_bad_rows)
                    if len(batch):
                        yield batch

        digest = write(batches(), unfinished / "rows.arrow", len(tokenizer))
        report = {"digest": digest, "tally": dataclasses.asdict(tally), **parts}
        (unfinished / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def tally_of(report: dict[str, Any]) -> Tally:
    """The tally that stands in a report.json."""
    return Tally(**{**report["tally"], "bad_shown": tuple(report["tally"]["bad_shown"])})


def mapping_key(source: SourceConfig) -> dict[str, Any]:
    """What of a source its tokens depend on, but for the place."""
    return {**dataclasses.asdict(source), **dict.fromkeys(("path", "eval_path", "eval_split", "stream", *BLEND))}


def cache_folder(config: DataConfig) -> Path:
    """Where tokenised rows are kept; it is made."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(config.cache_dir).expanduser() if config.cache_dir else caches / "rlhf_jax" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of all of a tokenizer that its encoding depends on."""
    backend = tokenizer.backend_tokenizer.to_str()
    parts = [backend, tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items())]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@functools.cache
def code_key() -> str:
    """Digest of this room's code: what an older version has built is not taken for what this one would."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.*")):
        if path.suffix in (".py", ".toml"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
