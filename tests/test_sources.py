"""Sources: files, globs, folders, saved data sets and the hub; errors with the fix; flat memory; content keys."""

import json
import os
import sys
import time
import tracemalloc
import types

import pyarrow as pa
import pyarrow.parquet
import pytest

from rlhf_jax.data import builtin, readers, sources
from rlhf_jax.data.records import Row

GOOD = b'{"a": 1}\n'


def read(path, **options) -> list[Row]:
    return list(sources.read_rows(str(path), **options))


def write_rows_to(tmp_path, *names: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"file": name}) + "\n")


def test_folders_and_globs_are_read_recursively_in_order_of_path(tmp_path):
    write_rows_to(tmp_path, "c.jsonl", "a/2.json", "a/10.jsonl", "b.json", "README.md", ".hidden.jsonl", ".git/x.json")
    write_rows_to(tmp_path, "dataset_infos.json")
    os.symlink(tmp_path, tmp_path / "a" / "up")  # a cycle
    in_order = ["a/10.jsonl", "a/2.json", "b.json", "c.jsonl"]
    assert [row.fields["file"] for row in read(tmp_path)] == in_order
    assert [row.file for row in read(tmp_path)] == [str(tmp_path / name) for name in in_order]
    os.unlink(tmp_path / "a" / "up")
    assert [row.fields["file"] for row in read(tmp_path / "**" / "*.json*")] == [*in_order[:3], "c.jsonl"] + [
        "dataset_infos.json"
    ]
    assert [row.fields["file"] for row in read(tmp_path / "*")] == ["b.json", "c.jsonl", "dataset_infos.json"]
    assert [row.fields["file"] for row in read(tmp_path / "[bc].json*")] == ["b.json", "c.jsonl"]


def test_a_file_with_a_bracket_in_its_name_is_found(tmp_path):
    write_rows_to(tmp_path, "rows[1].jsonl")
    assert len(read(tmp_path / "rows[1].jsonl")) == 1


def test_the_built_in_set_is_generated_from_its_seed_and_rows():
    rows = read("builtin:assistant", builtin_seed=3, builtin_rows=20)
    assert [row.fields for row in rows] == list(builtin.make_rows(3, 20)) and rows[19].number == 20
    with pytest.raises(ValueError, match="no built-in set 'builtin:assistent', only 'builtin:assistant'"):
        read("builtin:assistent")


def saved_folder(tmp_path, datasets):
    sets = {
        split: datasets.Dataset.from_list([{"a": f"{split}{i}"} for i in range(5)], split=split)
        for split in ("train", "test")
    }
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "both", num_shards={"train": 2, "test": 1})
    sets["test"].save_to_disk(tmp_path / "one")


def test_a_data_set_saved_to_disk_is_read_by_split(tmp_path):
    saved_folder(tmp_path, pytest.importorskip("datasets"))
    assert [row.fields["a"] for row in read(tmp_path / "both")] == [f"train{i}" for i in range(5)]
    assert [row.fields["a"] for row in read(tmp_path / "both", split="test")] == [f"test{i}" for i in range(5)]
    assert [row.fields["a"] for row in read(tmp_path / "one")] == [f"test{i}" for i in range(5)]
    with pytest.raises(ValueError, match="both: has no split 'dev', only train, test: set data.sources.split"):
        read(tmp_path / "both", split="dev")
    with pytest.raises(ValueError, match="one: has no split 'dev', only test: set data.sources.split"):
        read(tmp_path / "one", split="dev")
    keys = {split: key_of(tmp_path / "both", tmp_path, split=split) for split in ("train", "test")}
    assert keys["train"] != keys["test"] == key_of(tmp_path / "one", tmp_path)


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_any_other_name_is_read_from_the_hub_at_once_or_as_a_stream(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return [{"a": 1}, {"a": 2}]

    hub(monkeypatch, load)
    rows = [Row("someone/pairs (test)", 1, {"a": 1}), Row("someone/pairs (test)", 2, {"a": 2})]
    assert read("someone/pairs", split="test") == rows
    assert list(sources.read_hub_stream("someone/pairs", "en", "test")) == rows
    args, options = ("someone/pairs", "en"), {"split": "test", "streaming": True}
    assert asked == [(("someone/pairs", None), {"split": "test"}), (args, options)]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no net"), "'someone/pairs' is no file here, and cannot be had from the hub: no net"),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']"),
            r"hub data set 'someone/pairs': Config .*\['en', 'de'\]; set data.sources.name to one of them",
        ),
        (
            ValueError("BuilderConfig 'fr' not found. Available: ['en', 'de']"),
            r"hub data set 'someone/pairs': .* Available: \['en', 'de'\]; set data.sources.name to one of them",
        ),
        (ValueError("Unknown split \"dev\". Should be one of ['train']."), "'train'].; set data.sources.split"[7:]),
    ],
)
def test_an_unavailable_hub_dataset_is_reported_with_the_fix(monkeypatch, error, message):
    def load(*_, **__):
        raise error

    hub(monkeypatch, load)
    for reader in (read, lambda path: sources.read_hub_stream(path, "", "train")):
        with pytest.raises(ValueError, match=message):
            reader("someone/pairs")


def test_an_interrupted_stream_reports_the_last_row_read(monkeypatch):
    def rows():
        yield {"a": 1}
        raise ConnectionError("no net")

    hub(monkeypatch, lambda *_, **__: rows())
    stream = sources.read_hub_stream("someone/pairs", "", "train")
    assert next(stream).fields == {"a": 1}
    with pytest.raises(ValueError, match="'someone/pairs' broke off after row 1 of train: no net"):
        next(stream)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such.jsonl", "no/such.jsonl: no such file"),
        ("./none", "./none: no such file"),
        ("a/b/c", "a/b/c: no such file"),
        ("no*.jsonl", r"no\*.jsonl: matches no file"),
        ("rows.xml", "rows.xml: unknown ending; the known ones are .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet"),
        ("rows.gz", "rows.gz: unknown ending"),
        ("folder", "folder: holds no file of a known ending; the known ones are"),
        ("*.xml", r"\*.xml: holds no file of a known ending"),
        ("empty.jsonl", "empty.jsonl: holds no rows"),
        ("empty.json", "empty.json: holds no rows"),
        ("empty.csv", "empty.csv: holds no rows"),
        ("empty.parquet", "empty.parquet: holds no rows, it is empty"),
        ("blank.jsonl", "blank.jsonl: holds no rows"),
        ("head.csv", "head.csv: holds no rows"),
        ("array.json", "array.json: holds no rows"),
        ("none.parquet", "none.parquet: holds no rows"),
    ],
)
def test_an_unusable_path_is_reported_with_the_fix_and_never_looked_up_on_the_hub(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "folder").mkdir()
    contents = {"rows.xml": "x", "rows.gz": "x", "folder/notes.md": "x", "blank.jsonl": "\n \n", "head.csv": "a,b\n"}
    for name, text in (
        contents.items() | {(f"empty.{e}", "") for e in ("jsonl", "json", "csv", "parquet")} | {("array.json", "[]")}
    ):
        (tmp_path / name).write_text(text)
    pa.parquet.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=message):
        sources.read_rows(path)


def test_an_empty_file_among_others_is_accepted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    assert [row.fields for row in read(tmp_path)] == [{"a": 1}]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_reported_by_name(tmp_path):
    write_rows_to(tmp_path, "a/b.jsonl")
    for place, mode in ((tmp_path / "a" / "b.jsonl", 0o600), (tmp_path / "a", 0o700)):
        place.chmod(0)
        try:
            for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b.jsonl"):
                with pytest.raises(ValueError, match="no permission to read it; grant it"):
                    sources.read_rows(str(path))
        finally:
            place.chmod(mode)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "no permission to read it; grant it, as with chmod"),
        (FileNotFoundError(2, "No such file or directory"), "b.jsonl: no such file"),
        (OSError(5, "Input/output error"), "b.jsonl: cannot be read: Input/output error"),
    ],
)
def test_a_file_that_cannot_be_opened_during_reading_stops_it(tmp_path, monkeypatch, error, message):
    write_rows_to(tmp_path, "a.jsonl", "b.jsonl")

    def refuse(path, *args):
        if path.endswith("b.jsonl"):
            raise error
        return open(path, *args)

    monkeypatch.setattr(readers, "open", refuse, raising=False)
    rows = sources.read_rows(str(tmp_path))
    assert next(rows).fields == {"file": "a.jsonl"}
    with pytest.raises(ValueError, match=message):
        next(rows)


def test_an_unlistable_folder_is_reported_by_name(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="no permission to read it; grant it, as with chmod"):
        sources.read_rows(str(tmp_path))


# Memory


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "framed.json"])
def test_a_file_of_50_mib_is_read_in_4_mib_of_memory(tmp_path, name):
    row = {"prompt": "p" * 9_000, "answer": "a" * 1_000}
    count = 5300
    with open(tmp_path / name, "w") as file:
        if name.endswith(".csv"):
            file.write("prompt,answer\n" + f"{row['prompt']},{row['answer']}\n" * count)
        elif name == "rows.jsonl":
            file.write((json.dumps(row) + "\n") * count)
        else:
            before, after = ("[", "]") if name == "rows.json" else ('{"n": 1, "data": [', "]}")
            file.write(before + ", ".join([json.dumps(row)] * count) + after)
    assert os.path.getsize(tmp_path / name) > 50 << 20
    tracemalloc.start()
    assert sum(1 for given in sources.read_rows(str(tmp_path / name)) if given.fields == row) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


# Content keys


def key_of(path, tmp_path, **options) -> str:
    arguments = {"name": "", "split": "train", "builtin_seed": 0, "builtin_rows": 50, "memo": tmp_path / "memo" / "m"}
    return sources.content_key(str(path), **{**arguments, **options})


def test_a_copy_has_the_same_key_and_a_changed_byte_gives_another(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "copy.jsonl").write_bytes(GOOD)
    key = key_of(tmp_path / "a.jsonl", tmp_path)
    assert key == key_of(tmp_path / "copy.jsonl", tmp_path) and len(key) == 32
    (tmp_path / "a.jsonl").write_bytes(GOOD.replace(b"1", b"2"))  # immediately, with the same size
    changed = key_of(tmp_path / "a.jsonl", tmp_path)
    assert changed != key and key_of(tmp_path / "[ac]*.jsonl", tmp_path) not in (key, changed)


def test_the_key_depends_on_the_order_and_the_format_of_files(tmp_path):
    for folder, names in {"x": ("a.jsonl", "b.jsonl"), "y": ("b.jsonl", "a.jsonl"), "z": ("a.txt", "b.txt")}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / names[0]).write_bytes(GOOD)
        (tmp_path / folder / names[1]).write_bytes(GOOD * 2)
    assert len({key_of(tmp_path / folder, tmp_path) for folder in "xyz"}) == 3


def test_the_key_of_the_built_in_set_consists_of_its_seed_and_rows(tmp_path):
    keys = [key_of("builtin:assistant", tmp_path, builtin_seed=s, builtin_rows=r) for s, r in [(0, 9), (1, 9), (0, 8)]]
    assert len(set(keys)) == 3 and keys[0] == key_of("builtin:assistant", tmp_path, builtin_seed=0, builtin_rows=9)


def test_the_key_of_a_hub_dataset_consists_of_its_name_and_fingerprint(tmp_path, monkeypatch):
    hub(monkeypatch, lambda path, name, split: types.SimpleNamespace(_fingerprint="f" + path[-1]))
    asked = [("x/a", "", "train"), ("x/b", "", "train"), ("x/a", "en", "train"), ("x/a", "", "test")]
    assert len({key_of(path, tmp_path, name=name, split=split) for path, name, split in asked}) == 4


def test_a_missing_file_is_reported_by_name_when_its_key_is_computed(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        key_of(tmp_path / "none.jsonl", tmp_path)


def write_old_file(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_a_file_in_the_memo_is_read_again_only_after_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SETTLED", -1)
    memo, path = tmp_path / "memo.json", write_old_file(tmp_path / "a.jsonl", GOOD)
    (first,) = sources.file_digests([path], memo)
    known = json.loads(memo.read_bytes())
    assert known[path][-1] == first
    known[path][-1] = "from the memo"
    memo.write_text(json.dumps(known))
    assert sources.file_digests([path], memo) == ["from the memo"]
    time.sleep(0.02)  # longer than the resolution of the file system's clock
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert sources.file_digests([path], memo) == [first]


def test_a_recently_changed_file_is_not_stored_in_the_memo(tmp_path):
    sources.file_digests([write_old_file(tmp_path / "a.jsonl", GOOD)], tmp_path / "memo.json")
    assert not (tmp_path / "memo.json").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\0", b'{"FILE": 7}', b'{"FILE": []}', b'{"FILE": [1, 2]}']
)
def test_a_corrupt_memo_is_rebuilt(tmp_path, monkeypatch, content):
    monkeypatch.setattr(sources, "SETTLED", -1)
    memo, path = tmp_path / "memo.json", write_old_file(tmp_path / "a.jsonl", GOOD)
    memo.write_bytes(content.replace(b"FILE", path.encode()))
    (digest,) = sources.file_digests([path], memo)
    assert json.loads(memo.read_bytes())[path][-1] == digest and len(digest) == 32
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "memo.json"]


def test_entries_written_concurrently_by_another_process_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SETTLED", -1)
    memo = tmp_path / "memo.json"
    inner = sources._stat

    def write_concurrently(file):
        memo.write_text('{"/other": [1, 2, 3, 4, "digest"]}')
        return inner(file)

    monkeypatch.setattr(sources, "_stat", write_concurrently)
    path = write_old_file(tmp_path / "a.jsonl", GOOD)
    sources.file_digests([path], memo)
    assert set(json.loads(memo.read_bytes())) == {"/other", path}


def test_an_unwritable_memo_only_costs_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SETTLED", -1)
    path = write_old_file(tmp_path / "a.jsonl", GOOD)  # a file in the place of a folder is unwritable too
    assert len(sources.file_digests([path], tmp_path / "a.jsonl" / "memo.json")) == 1
