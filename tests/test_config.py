import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import config


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Sft:
    batch_size: int = 16
    shuffle: bool = True
    optimizer: Optimizer = Optimizer(learning_rate=9e-6)

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, but must be at least 1")


@dataclass(frozen=True)
class Source:
    path: str
    limit: int = 0


@dataclass(frozen=True)
class Data:
    sources: tuple[Source, ...]
    split: dict[str, float] | str = "2,4,4"


@dataclass(frozen=True)
class Schema:
    data: Data
    sft: Sft = Sft()
    actor: str = "facebook/opt-125m"
    dtype: Literal["float32", "bfloat16"] = "float32"
    betas: tuple[float, ...] = (0.9, 0.95)
    names: tuple[str, ...] = field(default_factory=tuple)


TEXT = """
actor = "gpt"

[[data.sources]]
path = "a.jsonl"

[[data.sources]]
path = "b.jsonl"
limit = 7

[sft]
batch_size = 32
"""


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "demo.toml").write_text(TEXT)
    return tmp_path / "demo.toml"


def load(path, *overrides):
    return config.load_config(path, overrides, Schema)


def test_a_file_gives_its_values_and_the_defaults_for_all_other_keys(path):
    assert load(path) == Schema(
        data=Data((Source("a.jsonl"), Source("b.jsonl", 7))), sft=Sft(batch_size=32), actor="gpt"
    )


def test_a_partial_table_keeps_the_defaults_chosen_by_its_parent(path):
    loaded = load(path, "sft.optimizer.weight_decay=0.1")
    assert loaded.sft.optimizer == Optimizer(learning_rate=9e-6, weight_decay=0.1)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("sft.batch_size=4", lambda c: c.sft.batch_size, 4),
        ("sft.batch_size = 4", lambda c: c.sft.batch_size, 4),
        ("sft.shuffle=false", lambda c: c.sft.shuffle, False),
        ("sft.optimizer.learning_rate=5e-6", lambda c: c.sft.optimizer.learning_rate, 5e-6),
        ("sft.optimizer={learning_rate=1}", lambda c: c.sft.optimizer, Optimizer(1.0)),
        ("actor=facebook/opt-1.3b", lambda c: c.actor, "facebook/opt-1.3b"),
        ('actor="quoted"', lambda c: c.actor, "quoted"),
        ("actor=a=b", lambda c: c.actor, "a=b"),
        ("actor=", lambda c: c.actor, ""),
        ("actor=125", lambda c: c.actor, "125"),
        ("actor=2026-11-24", lambda c: c.actor, "2026-11-24"),
        ("actor=x # y", lambda c: c.actor, "x # y"),
        ("data.split=1,0,9", lambda c: c.data.split, "1,0,9"),
        ("data.split={sft=1, ppo=2.5}", lambda c: c.data.split, {"sft": 1.0, "ppo": 2.5}),
        ("data.split={}", lambda c: c.data.split, {}),
        ("data.split.ppo=3", lambda c: c.data.split, {"ppo": 3.0}),
        ("dtype=bfloat16", lambda c: c.dtype, "bfloat16"),
        ("betas=[0, 0.5]", lambda c: c.betas, (0.0, 0.5)),
        ("betas.1=0.99", lambda c: c.betas, None),
        ("names=['a', 'b']", lambda c: c.names, ("a", "b")),
        ('data.sources=[{path="x.jsonl"}]', lambda c: c.data.sources, (Source("x.jsonl"),)),
        ("data.sources.1.limit=9", lambda c: c.data.sources[1], Source("b.jsonl", 9)),
    ],
)
def test_an_override_sets_its_key(path, override, read, value):
    if value is None:
        path.write_text("betas = [0.9, 0.95]\n" + TEXT)
        value = (0.9, 0.99)
    assert read(load(path, override)) == value


def test_the_last_of_two_overrides_of_one_key_wins(path):
    assert load(path, "sft.batch_size=1", "sft.batch_size=2").sft.batch_size == 2


def test_an_integer_becomes_a_float_for_a_float_field(path):
    rate = load(path, "sft.optimizer.learning_rate=1").sft.optimizer.learning_rate
    assert isinstance(rate, float) and rate == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sft.batch_sise=3",
            "override 'sft.batch_sise=3': unknown key 'sft.batch_sise'; did you mean 'sft.batch_size'?",
        ),
        ("batch_size=3", "unknown key 'batch_size'; did you mean 'sft.batch_size'?"),
        ("data.sources.1.limits=3", "unknown key 'data.sources.1.limits'; did you mean 'data.sources.1.limit'?"),
        ("data.sources.1.transcript=true", "unknown key 'data.sources.1.transcript'; 'data.sources.1' has path, limit"),
        ("data.sources.limit=3", "unknown key 'data.sources.limit'; did you mean 'data.sources.0.limit'?"),
        ("zzzz=3", "unknown key 'zzzz'; see"),
        ("sft.batch_size.x=3", "unknown key 'sft.batch_size.x'; did you mean 'sft.batch_size'?"),
        ("sft.batch_size", "is written section.key=value"),
        ("=3", "is written section.key=value"),
        ("sft.batch_size=2.0", "override 'sft.batch_size=2.0': 'sft.batch_size' is 2.0, but wants a whole number"),
        ("sft.batch_size=true", "'sft.batch_size' is true, but wants a whole number"),
        ("sft.batch_size=many", "'sft.batch_size' is \"many\", but wants a whole number"),
        ("sft.batch_size=1\nx=2", "wants a whole number"),
        ("sft.shuffle=1", "'sft.shuffle' is 1, but wants true or false"),
        ("sft.optimizer.learning_rate=fast", 'is "fast", but wants a number'),
        ("sft.optimizer.learning_rate=true", "is true, but wants a number"),
        ("sft.optimizer.learning_rate=nan", "is NaN, but wants a number"),
        ("sft=3", "'sft' is 3, but wants a table"),
        ("sft={batch_sise=3}", "override 'sft={batch_sise=3}': unknown key 'sft.batch_sise'"),
        ("betas=0.9", "'betas' is 0.9, but wants an array"),
        ("betas=[0.9, 'x']", "'betas.1' is \"x\", but wants a number"),
        ("betas.0=0.5", "has 0 items in 'betas', so no item 0; set 'betas=[...]'"),
        ("data.sources.2.limit=1", "has 2 items in 'data.sources', so no item 2"),
        ("data.sources=[{limit=1}]", "override 'data.sources=[{limit=1}]': 'data.sources.0.path' is missing"),
        ("data.split=7", "'data.split' is 7, but wants a table or a string"),
        ("data.split={sft='a'}", "'data.split.sft' is \"a\", but wants a number"),
        ("data.split.sft=a", "override 'data.split.sft=a': 'data.split.sft' is \"a\", but wants a number"),
        ("data.split.sft.x=1", "unknown key 'data.split.sft.x'; did you mean 'data.split'?"),
        (
            "dtype=bfloat61",
            '\'dtype\' is "bfloat61", but wants one of "float32", "bfloat16"; did you mean \'bfloat16\'?',
        ),
    ],
)
def test_a_wrong_override_is_rejected_with_the_key_and_the_fix(path, override, message):
    with pytest.raises(ValueError) as error:
        load(path, override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data.sources = []\n[sft]\nbatch_sise = 3",
            "demo.toml: unknown key 'sft.batch_sise'; did you mean 'sft.batch_size'?",
        ),
        ("[data]\nsplit = '1'", "demo.toml: 'data.sources' is missing and has no default; set it"),
        ("actor = 'a'", "demo.toml: 'data.sources' is missing"),
        ("[sft]\nbatch_size = = 3", "demo.toml: not valid TOML: Invalid value (at line 2"),
        ("[data]\nsources = [1]", "demo.toml: 'data.sources.0' is 1, but wants a table"),
        ("[sft]\nbatch_size = 0\n[data]\nsources = []", "demo.toml: [sft] batch_size is 0, but must be at least 1"),
        (
            "[[sft]]\nbatch_size = 0\n[data]\nsources = []",
            "demo.toml: 'sft' is [{\"batch_size\": 0}], but wants a table",
        ),
    ],
)
def test_a_wrong_file_is_rejected_with_its_name(path, text, message):
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load(path)
    assert message in str(error.value)


def test_an_override_adds_to_a_table_of_the_file_but_not_to_a_text(path):
    path.write_text("[data]\nsources = []\nsplit = { sft = 1, ppo = 2 }")
    assert load(path, "data.split.ppo=3").data.split == {"sft": 1.0, "ppo": 3.0}
    path.write_text("[data]\nsources = []\nsplit = '2,4,4'")
    with pytest.raises(ValueError, match="'data.split' is \"2,4,4\", which 'data.split.ppo' cannot be set in"):
        load(path, "data.split.ppo=3")


@pytest.mark.parametrize("text", ["sft = 3", "sft = [1]", "[[sft]]"])
def test_an_override_into_a_malformed_table_is_reported_as_an_error_of_the_file(path, text):
    path.write_text(text)
    with pytest.raises(ValueError, match=r"demo.toml: 'sft' is .*, which 'sft.batch_size' cannot be set in"):
        load(path, "sft.batch_size=3")


def test_a_file_that_cannot_be_read_is_rejected_with_a_similar_name(path):
    with pytest.raises(ValueError, match=r"dem.toml: no such file; did you mean '.*demo.toml'\?"):
        load(path.with_name("dem.toml"))
    with pytest.raises(ValueError, match="no such file; give the path"):
        load(path.parent / "nowhere" / "x.toml")
    with pytest.raises(ValueError, match="cannot be read"):
        load(path.parent)
    path.write_bytes(b"actor = '\xff'")
    with pytest.raises(ValueError, match="not valid TOML"):
        load(path)


def test_parse_errors_name_the_origin_of_the_mapping():
    assert config.parse_config(Optimizer, {"learning_rate": 2}, "here") == Optimizer(2.0)
    with pytest.raises(ValueError, match=r"^here: unknown key 'rate'"):
        config.parse_config(Optimizer, {"rate": 2}, "here")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.floats(allow_nan=False)
sources = st.builds(Source, path=texts, limit=st.integers(-(2**63), 2**63 - 1))
schemas = st.builds(
    Schema,
    data=st.builds(
        Data,
        sources=st.lists(sources, max_size=3).map(tuple),
        split=texts | st.dictionaries(texts, numbers, max_size=3),
    ),
    sft=st.builds(
        Sft, batch_size=st.integers(1, 99), shuffle=st.booleans(), optimizer=st.builds(Optimizer, numbers, numbers)
    ),
    actor=texts,
    dtype=st.sampled_from(["float32", "bfloat16"]),
    betas=st.lists(numbers, max_size=3).map(tuple),
    names=st.lists(texts, max_size=3).map(tuple),
)


@settings(max_examples=50, deadline=None)
@given(schemas)
def test_load_reads_back_what_dump_wrote(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round.toml"
    path.write_text(config.dump_config(value), encoding="utf-8", newline="")
    assert config.load_config(path, [], Schema) == value
    assert config.differences(tomllib.loads(config.dump_config(value)), dataclasses.asdict(value)) == []


def test_differences_names_changed_added_and_absent_keys():
    old = {"sft": {"batch_size": 32, "path": "a"}, "gone": True, "betas": [0.9, 0.95], "data": {"sources": [{"p": 1}]}}
    new = {"sft": {"batch_size": 64, "path": "a"}, "betas": (0.9, 0.99), "data": {"sources": ({"p": 1}, {"p": 2})}}
    assert config.differences(old, new) == [
        "sft.batch_size: 32 -> 64",
        "betas: [0.9, 0.95] -> [0.9, 0.99]",
        "data.sources.1.p: absent -> 2",
        "gone: true -> absent",
    ]
    assert config.differences({}, {"actor": "b"}) == ['actor: absent -> "b"']
    assert config.differences(old, old) == []
