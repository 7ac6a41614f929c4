"""The token cache: keyed by everything that tokens depend on, built by one process at a time, never incomplete."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from row_specs import SPECS, split_of
from tiny_tokenizer import chatml_like, gpt2_like

from rlhf_jax.data import cache, tokenize
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.selection import select_rows

TOKENIZER = prepare_tokenizer(gpt2_like())


def write(path: Path, count: int = 50, word: str = "good") -> Path:
    rows = [{"prompt": f"q{i}", "chosen": f"{word} {i}", "rejected": f"bad {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path) -> DataConfig:
    source = SourceConfig(str(write(tmp_path / "rows.jsonl")))
    return DataConfig((source,), split_of("1,1,1"), 0.1, cache_dir=str(tmp_path / "cache"))


def rows_for(config: DataConfig, tokenizer=TOKENIZER, stage="sft", **options) -> Rows:
    return select_rows(config, tokenizer, dataclasses.replace(SPECS[stage], **options), held_out=False)


def cached_folders(config: DataConfig) -> set[str]:
    return {path.name for path in Path(config.cache_dir).iterdir() if path.is_dir()}


def test_a_second_run_tokenises_nothing_and_has_the_same_rows(config, monkeypatch):
    first = rows_for(config)
    monkeypatch.setattr(tokenize, "encode_examples", lambda *args: pytest.fail("tokenised again"))
    second = rows_for(config)
    assert second.fingerprint == first.fingerprint and second.report == first.report
    assert len(cached_folders(config)) == 1


def changed_source(config: DataConfig, **change) -> DataConfig:
    return dataclasses.replace(config, sources=(dataclasses.replace(config.sources[0], **change),))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: (changed_source(config, answer="rejected"), TOKENIZER, "sft", {}),
        lambda config: (changed_source(config, limit=20), TOKENIZER, "sft", {}),
        lambda config: (dataclasses.replace(config, max_length=300), TOKENIZER, "sft", {}),
        lambda config: (dataclasses.replace(config, max_prompt_length=30), TOKENIZER, "sft", {}),
        lambda config: (dataclasses.replace(config, long_rows="left"), TOKENIZER, "sft", {}),
        lambda config: (dataclasses.replace(config, split=split_of("1,2,3")), TOKENIZER, "sft", {}),
        lambda config: (dataclasses.replace(config, held_out=0.2), TOKENIZER, "sft", {}),
        lambda config: (config, prepare_tokenizer(chatml_like()), "sft", {}),
        lambda config: (config, prepare_tokenizer(gpt2_like(eos_token="<|im_end|>")), "sft", {}),
        lambda config: (config, prepare_tokenizer(gpt2_like(), "{{ messages[0]['content'] }}"), "ppo", {}),
        lambda config: (config, TOKENIZER, "reward", {}),
        lambda config: (config, TOKENIZER, "sft", {"learn": "everything"}),
    ],
)
def test_a_change_of_anything_that_tokens_depend_on_gives_a_new_build(config, change):
    rows_for(config)
    changed, tokenizer, stage, options = change(config)
    rows_for(changed, tokenizer, stage, **options)
    assert len(cached_folders(config)) == 2


def test_a_change_of_anything_else_gives_no_new_build(config, tmp_path):
    first = rows_for(config)
    moved = shutil.copy(config.sources[0].path, tmp_path / "copy.jsonl")
    for other in (
        changed_source(config, path=str(moved)),
        changed_source(config, weight=2.0, max_rows=9),
        dataclasses.replace(config, max_bad_rows=5),
        dataclasses.replace(config, temperature=2.0),
    ):
        assert rows_for(other).parts[0].store.digest == first.parts[0].store.digest
    assert len(cached_folders(config)) == 1


def test_one_changed_byte_gives_a_new_build_even_with_the_same_size_and_time(config):
    path, first = Path(config.sources[0].path), rows_for(config)
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"good 7", b"best 7"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = rows_for(config)
    assert path.stat().st_size == before.st_size and len(cached_folders(config)) == 2
    assert second.fingerprint != first.fingerprint


def test_changed_code_gives_a_new_build(config, monkeypatch):
    rows_for(config)
    monkeypatch.setattr(cache, "code_key", lambda: "another version")
    rows_for(config)
    assert len(cached_folders(config)) == 2


def test_a_failed_build_leaves_nothing_and_the_next_one_is_complete(config, monkeypatch):
    encode, calls = tokenize.encode_examples, []

    def broken(*args):
        calls.append(args)
        raise RuntimeError("the power went off")

    monkeypatch.setattr(tokenize, "encode_examples", broken)
    with pytest.raises(RuntimeError, match="the power went off"):
        rows_for(config)
    assert calls and cached_folders(config) == set()
    monkeypatch.setattr(tokenize, "encode_examples", encode)
    assert len(rows_for(config)) > 5


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_cache import DataConfig, SourceConfig, TOKENIZER, rows_for, tokenize
encode, calls = tokenize.encode_examples, []
tokenize.encode_examples = lambda *args: calls.append(1) or encode(*args)
config = DataConfig((SourceConfig({path!r}),), {{"sft": 1.0}}, 0.0, cache_dir={cache!r})
print(len(rows_for(config)), rows_for(config).fingerprint, len(calls) > 0)
"""


def test_of_three_concurrent_processes_one_builds_and_all_get_the_same_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", 20_000)
    script = SCRIPT.format(tests=str(Path(__file__).parent), path=str(path), cache=str(tmp_path / "cache"))
    running = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert {(count, fingerprint) for count, fingerprint, _ in said} == {("20000", said[0][1])}
    assert sorted(built for *_, built in said) == ["False", "False", "True"]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_blocks_keep_their_order_whichever_thread_finishes_first():
    done = list(tokenize.map_in_order(lambda block: block, tokenize.split_blocks(range(1000), 7)))
    assert done == [list(range(i, min(i + 7, 1000))) for i in range(0, 1000, 7)]


def test_only_a_few_blocks_are_queued_at_a_time():
    read = []

    def blocks():
        for i in range(1000):
            read.append(i)
            yield [i]

    for taken, _ in enumerate(tokenize.map_in_order(lambda block: None, blocks())):
        assert len(read) - taken <= tokenize.THREADS + 3


def test_the_tokenizers_parallelism_setting_is_restored(monkeypatch):
    for value in ("true", None):
        if value is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        list(tokenize.map_in_order(lambda block: None, [[1], [2]]))
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


def test_stores_on_disk_and_in_memory_hold_the_same_rows_and_pages_can_be_released(config, monkeypatch):
    from rlhf_jax.data import store

    monkeypatch.setattr(store, "READ_BEFORE_RELEASE", 1)
    rows = rows_for(config)
    (part,) = rows.parts
    before = [each.tokens.tolist() for row in range(len(part)) for (each,) in part.documents(row)]
    part.store.release()  # the pages are read again
    assert [each.tokens.tolist() for row in range(len(part)) for (each,) in part.documents(row)] == before
    assert np.array_equal(part.lengths[:, 0], [len(tokens) for tokens in before])
