"""Objects of Kubernetes held against the typed models of its client: what is unknown there is a mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from kubernetes import client  # type: ignore[import-untyped]

PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def wrong(found: dict[str, Any]) -> list[str]:
    """What a whole object says that its model does not know, or does not say that it must.

    Args:
        found: an object with `apiVersion` and `kind`.
    """
    name = f"{found['apiVersion'].rpartition('/')[2].capitalize()}{found['kind']}"
    return [*_wrong(found, name, found["kind"])]


def _wrong(value: Any, kind: str, where: str) -> Iterator[str]:
    if value is None or kind in ("object", "datetime"):
        return
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for number, one in enumerate(value):
            yield from _wrong(one, inner[1], f"{where}[{number}]")
    elif inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            yield f"{where} is no mapping"
            return
        for key, one in value.items():
            yield from _wrong(one, inner[1], f"{where}.{key}")
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (kind == "int" and isinstance(value, bool)):
            yield f"{where} is {value!r}, and no {kind}"
    else:
        yield from _wrong_fields(value, getattr(client, kind), where)


def _wrong_fields(value: Any, model: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where} is no mapping"
        return
    known = {name: attribute for attribute, name in model.attribute_map.items()}
    for name, one in value.items():
        if name in known:
            yield from _wrong(one, model.openapi_types[known[name]], f"{where}.{name}")
        else:
            yield f"{where}.{name} is unknown"
    try:
        model(**{known[name]: one for name, one in value.items() if name in known})
    except ValueError as error:  # what must be there is not
        yield f"{where}: {error}"
