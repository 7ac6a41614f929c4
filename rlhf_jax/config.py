"""TOML and `section.key=value` into frozen dataclasses, and back.

A schema is a frozen dataclass whose fields are `int`, `float`, `bool`, `str`, `Literal[...]`, `dict[str, T]` of those,
`tuple[T, ...]` of those or of frozen dataclasses, frozen dataclasses, and unions of types that TOML distinguishes.
It is defined next to the code that reads it and checks itself in `__post_init__` (a `ValueError` from there is raised
with the place it came from). There is no None: an absent choice is "" or 0, so that every configuration can be
written as TOML.
"""

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import tomli_w

from rlhf_jax.redact import find_secret, redact

C = TypeVar("C")
ABSENT = dataclasses.MISSING
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", tuple: "an array"}


class ConfigSource(NamedTuple):
    """What an error message needs: the whole schema, and the file or override that a dotted key came from."""

    schema: type
    of: Callable[[str], str]


def load_config(path: str | Path, overrides: Sequence[str], schema: type[C]) -> C:
    """The configuration in the TOML file `path`, changed by `overrides` such as "sft.batch_size=32" (later ones win).

    `a.b.0.c=v` reaches into an array. A value is TOML or, where that fails, the bare text; for a string field it is
    the text itself unless it is a quoted string. Raises ValueError for a file that cannot be read, and for an unknown,
    mistyped or missing key, naming the file or the override and the full dotted key.
    """
    path = Path(path)
    mapping = _read_toml(path)
    changed = {_override(schema, mapping, text, str(path)): f"override '{text}'" for text in overrides}

    def of(key: str) -> str:
        while key and key not in changed:
            key = key.rpartition(".")[0]
        return changed.get(key, str(path))

    return _parse(schema, mapping, "", ConfigSource(schema, of), ABSENT)


def parse_config(schema: type[C], mapping: dict[str, Any], where: str) -> C:
    """`mapping` (as read from TOML) as a `schema`; `where` names its origin in the ValueError of a bad key."""
    return _parse(schema, mapping, "", ConfigSource(schema, lambda key: where), ABSENT)


def dump_config(config: Any) -> str:
    """The TOML text that `load_config` reads back as an equal configuration."""
    return tomli_w.dumps(dataclasses.asdict(config))


def with_defaults(schema: type, table: dict[str, Any], defaults: Any = None) -> dict[str, Any]:
    """The TOML table with the default of every key of `schema` that it lacks, in its own tables too. Checks nothing.

    defaults: a `schema` with the defaults, where the parent of the table has one; None: those of its fields.
    """
    hints, filled = get_type_hints(schema), dict(table)
    for field in dataclasses.fields(schema):
        default = getattr(defaults, field.name, field.default)
        if default is ABSENT and field.default_factory is not ABSENT:
            default = field.default_factory()
        if field.name in table:
            filled[field.name] = _fill(hints[field.name], table[field.name], default)
        elif default is not ABSENT:
            filled[field.name] = dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default
    return filled


def _fill(wanted: Any, value: Any, default: Any) -> Any:
    for kind in _members(wanted):
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            return with_defaults(kind, value, default)
        if get_origin(kind) is tuple and dataclasses.is_dataclass(get_args(kind)[0]) and isinstance(value, list):
            return [with_defaults(get_args(kind)[0], each) if isinstance(each, dict) else each for each in value]
    return value


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two nested dicts: ["sft.batch_size: 32 -> 64"], in the order of `new`."""
    before, after = dict(leaves(old, "")), dict(leaves(new, ""))
    return [
        f"{key}: {_toml_value(before.get(key, ABSENT))} -> {_toml_value(after.get(key, ABSENT))}"
        for key in [*after, *(key for key in before if key not in after)]
        if key not in before or key not in after or before[key] != after[key]
    ]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.toml")], 1)
        hint = f"; did you mean '{path.parent / near[0]}'?" if near else "; give the path of a TOML file"
        raise ValueError(f"{path}: no such file{hint}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error


def _override(schema: type, mapping: dict[str, Any], override: str, path: str) -> str:
    """Writes one override into `mapping` in place and returns its key."""
    key, equals, text = override.partition("=")
    key, text, where = key.strip(), text.strip(), f"override '{override}'"
    if not (key and equals):
        raise ValueError(f"{where}: an override is written section.key=value")
    wanted = _type_at(schema, key, where)
    node: Any = mapping
    *parents, last = key.split(".")
    for depth, part in enumerate([*parents, last]):
        held = ".".join(parents[:depth])
        if not isinstance(node, dict | list) or isinstance(node, list) != part.isdecimal():
            raise ValueError(f"{path}: '{held}' is {_toml_value(node)}, which '{key}' cannot be set in; fix the file")
        if isinstance(node, list) and int(part) >= len(node):
            many = f"{path} has {len(node)} items in '{held}'"
            raise ValueError(f"{where}: {many}, so no item {part}; set '{held}=[...]'")
        if depth < len(parents):
            below = [] if [*parents, last][depth + 1].isdecimal() else {}
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, below)
    node[int(last) if isinstance(node, list) else last] = _parse_override_value(text, wanted)
    return key


def _parse_override_value(text: str, wanted: Any) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    wants_text = wanted is str or (get_origin(wanted) is Literal and isinstance(get_args(wanted)[0], str))
    return text if len(parsed) > 1 or (wants_text and not isinstance(value, str)) else value


def _type_at(schema: type, key: str, where: str) -> Any:
    wanted: Any = schema
    for part in key.split("."):
        # In a union the key leads into the table.
        wanted = next((kind for kind in _members(wanted) if get_origin(kind) is dict), wanted)
        if dataclasses.is_dataclass(wanted) and part in get_type_hints(wanted):
            wanted = get_type_hints(wanted)[part]
        elif get_origin(wanted) is tuple and part.isdecimal():
            wanted = get_args(wanted)[0]
        elif get_origin(wanted) is dict:
            wanted = get_args(wanted)[1]
        else:
            raise _unknown(schema, key, where)
    return wanted


def _members(wanted: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(wanted) if get_origin(wanted) is UnionType else (wanted,)


def _parse(wanted: Any, value: Any, key: str, source: ConfigSource, default: Any) -> Any:
    """`value` as a `wanted`; where a table leaves fields out they come from `default`, the parent's default for it."""
    members = _members(wanted)
    if len(members) > 1:
        wanted = next((kind for kind in members if isinstance(value, get_origin(kind) or kind)), wanted)
    if dataclasses.is_dataclass(wanted) and isinstance(value, dict):
        return _parse_table(wanted, value, key, source, default)
    if get_origin(wanted) is dict and isinstance(value, dict):
        kind = get_args(wanted)[1]
        return {name: _parse(kind, item, f"{key}.{name}", source, ABSENT) for name, item in value.items()}
    if get_origin(wanted) is tuple and isinstance(value, list | tuple):
        item_type = get_args(wanted)[0]
        return tuple(_parse(item_type, item, f"{key}.{i}", source, ABSENT) for i, item in enumerate(value))
    if get_origin(wanted) is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(wanted)):
            return value
        near = difflib.get_close_matches(str(value), [str(choice) for choice in get_args(wanted)], 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        choices = ", ".join(_toml_value(choice) for choice in get_args(wanted))
        raise ValueError(f"{source.of(key)}: '{key}' is {_toml_value(value)}, but wants one of {choices}{hint}")
    if wanted is float and type(value) in (int, float) and not math.isnan(value):
        return float(value)
    if wanted is str and type(value) is str and (secret := find_secret(value)):
        fix = "messages and copies of the configuration would show it: let its reader take it from the environment"
        raise ValueError(f"{redact(source.of(key))}: '{key}' holds {secret}, and {fix}")
    if wanted in (int, bool, str) and type(value) is wanted:
        return value
    name = " or ".join(TYPE_NAMES.get(get_origin(kind) or kind, "a table") for kind in members)
    raise ValueError(f"{source.of(key)}: '{key}' is {_toml_value(value)}, but wants {name}")


def _parse_table(wanted: type, table: dict[str, Any], key: str, source: ConfigSource, default: Any) -> Any:
    hints, values = get_type_hints(wanted), {}
    for name in table:
        if name not in hints:
            raise _unknown(source.schema, _join(key, name), source.of(_join(key, name)))
    for field in dataclasses.fields(wanted):
        child, inherited = _join(key, field.name), getattr(default, field.name, field.default)
        if inherited is ABSENT and field.default_factory is not ABSENT:
            inherited = field.default_factory()
        if field.name in table:
            values[field.name] = _parse(hints[field.name], table[field.name], child, source, inherited)
        elif inherited is not ABSENT:
            values[field.name] = inherited
        elif dataclasses.is_dataclass(hints[field.name]):
            # An absent section is an empty one: it is complete, or the error names the key that it lacks.
            values[field.name] = _parse(hints[field.name], {}, child, source, ABSENT)
        else:
            raise ValueError(f"{source.of(child)}: '{child}' is missing and has no default; set it")
    try:
        return wanted(**values)
    except ValueError as error:
        raise ValueError(f"{source.of(key)}: {f'[{key}] ' if key else ''}{error}") from error


def _unknown(schema: type, key: str, where: str) -> ValueError:
    pattern = ".".join("*" if part.isdecimal() else part for part in key.split("."))
    keys = list(_keys(schema, ""))
    section, _, name = pattern.rpartition(".")
    siblings = [known.rpartition(".")[2] for known in keys if known.rpartition(".")[0] == section]
    near = difflib.get_close_matches(pattern, keys, 1)
    hint = "; see the sections of an example configuration"
    if section and siblings and not difflib.get_close_matches(name, siblings, 1):  # similar by its section alone
        hint = f"; '{key.rpartition('.')[0]}' has {', '.join(siblings)}"
    elif near:
        indices = iter([part for part in key.split(".") if part.isdecimal()])
        hint = "; did you mean '" + ".".join(next(indices, "0") if p == "*" else p for p in near[0].split(".")) + "'?"
    return ValueError(f"{where}: unknown key '{key}'{hint}")


def _keys(wanted: Any, key: str) -> Iterator[str]:
    """Every dotted key of a schema, sections included, with "*" for the index of an array of tables."""
    for name, kind in get_type_hints(wanted).items():
        yield _join(key, name)
        if dataclasses.is_dataclass(kind):
            yield from _keys(kind, _join(key, name))
        elif get_origin(kind) is tuple and dataclasses.is_dataclass(get_args(kind)[0]):
            yield from _keys(get_args(kind)[0], f"{_join(key, name)}.*")


def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Arrays of tables are traversed; an array of scalars is one leaf, always as a list."""
    is_array = isinstance(value, list | tuple)
    if isinstance(value, dict) or (is_array and value and isinstance(value[0], dict)):
        for name, item in enumerate(value) if is_array else value.items():
            yield from leaves(item, _join(key, str(name)))
    else:
        yield key, list(value) if is_array else value


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _toml_value(value: Any) -> str:
    return "absent" if value is ABSENT else json.dumps(value, ensure_ascii=False, default=str)
