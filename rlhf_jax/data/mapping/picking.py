"""Values out of the fields of a row, by dotted names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from rlhf_jax.data.example import BadRow

T = TypeVar("T")
Fields = dict[str, Any]
MISSING = object()  # there is no such field; a null is None


class Lacking(BadRow):
    """The row has the field, but nothing in it: what a sparse source may have."""


class NoField(BadRow):
    """The row has no such field: likely the name is wrong."""


def picker(name: str) -> Callable[[Fields], Any]:
    """The function from fields to the value at a dotted name, as "a.0.b", or "a.*.b" for a list of those of every item.

    MISSING where an object has no such key; None at a null on the way, and where a list is too short. A field whose
    own name has a dot in it goes before what the dots would lead to.
    """
    if "." not in name:
        return lambda fields: fields.get(name, MISSING)
    steps = name.split(".")
    return lambda fields: fields[name] if name in fields else _walk(fields, steps)


def _walk(value: Any, steps: list[str]) -> Any:
    for at, step in enumerate(steps):
        if isinstance(value, dict):
            value = value.get(step, MISSING)
        elif isinstance(value, list) and step == "*":
            return [_walk(item, steps[at + 1 :]) for item in value]
        elif isinstance(value, list) and step.isdecimal():
            value = value[int(step)] if int(step) < len(value) else None
        else:
            return None if value is None else MISSING
    return value


def part(
    name: str, convert: Callable[[Any], T], *, needed: bool = True, absent: tuple = (), sparse: bool = False
) -> Callable[[Fields], T | str]:
    """The function from fields to the converted value at `name`; to "" where it is one of `absent`.

    BadRow, naming the field, for what `convert` refuses; Lacking for a null, which `convert` must refuse, and in a
    sparse source for an empty text or list; NoField. Where it is not needed, or has no name, all these are "".
    """
    if not name:
        return lambda fields: ""
    pick = picker(name)

    def read(fields: Fields) -> T | str:
        value = pick(fields)
        try:
            if value is None or value is MISSING or (sparse and not value):
                if not needed or value in absent:
                    return ""
                if value is MISSING:
                    raise NoField(f"no field {name!r}; the fields are {', '.join(map(str, fields)) or 'none'}")
                if value is not None:
                    raise Lacking("must not be empty")
            return convert(value)
        except NoField:
            raise
        except BadRow as error:
            if not needed:
                return ""
            kind = Lacking if value is None else type(error)
            raise kind(f"field {name!r} {error}") from error

    return read
