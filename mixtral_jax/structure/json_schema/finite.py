"""Instances: a schema that no finite text matches is refused before a model writes without end.

This is about what is written, after `writer`: parts without an instance are taken out, so that an
optional one is not begun.
"""

from typing import Any

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.json_schema.document import point
from mixtral_jax.structure.json_schema.keywords import TYPES

MOST_REFERENCES = 200  # one within another
MOST_LEVELS = 1000  # schemas within each other, references followed


def prune(schema: Any, sources: dict[str, str]) -> Any:
    """Returns a written schema without the parts that have no finite instance.

    Args:
        schema: the root, with `$defs`.
        sources: pointer in the caller's document of each name under `$defs`.

    Raises StructureError if the whole has none, or if references stand too deep in each other.
    """
    if isinstance(schema, bool):
        if not schema:
            raise StructureError("the schema allows nothing")
        return schema
    definitions = schema.get("$defs", {})
    alive = _alive(definitions)
    root = {key: value for key, value in schema.items() if key != "$defs"}
    if not _has_instance(root, alive):
        raise StructureError(
            "the schema has no finite instance: what it requires contradicts itself or contains "
            "itself; make it optional, or allow null",
            _culprit(root, definitions, alive, sources),
        )
    pruned = _pruned(root, alive)
    kept = {name: _pruned(definitions[name], alive) for name in definitions if name in alive}
    _check_depth(pruned, kept, sources)
    return {**pruned, "$defs": kept} if kept and isinstance(pruned, dict) else pruned


def _alive(definitions: dict[str, Any]) -> set[str]:
    """Returns the names of the definitions that have an instance: the least fixpoint."""
    users: dict[str, list[str]] = {name: [] for name in definitions}
    for name, schema in definitions.items():
        for target in {*references(schema)}:
            users[target].append(name)
    alive: set[str] = set()
    waiting = list(definitions)
    while waiting:
        name = waiting.pop()
        if name not in alive and _has_instance(definitions[name], alive):
            alive.add(name)
            waiting += users[name]
    return alive


def references(schema: Any) -> list[str]:
    """Returns the names under `$defs` that a written schema refers to, in their order."""
    rows = []
    if isinstance(schema, dict):
        if "$ref" in schema:
            rows.append(schema["$ref"].rpartition("/")[2])
        for child in _children(schema):
            rows += references(child)
    return rows


def _children(schema: dict[str, Any]) -> list[Any]:
    rows: list[Any] = []
    for keyword, value in schema.items():
        if keyword in ("properties", "patternProperties"):
            rows += value.values()
        elif keyword in ("allOf", "anyOf", "prefixItems"):
            rows += value
        elif keyword in ("items", "additionalProperties"):
            rows.append(value)
    return rows


def _has_instance(schema: Any, alive: set[str]) -> bool:
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in alive:
        return False
    if not all(_has_instance(branch, alive) for branch in schema.get("allOf", ())):
        return False
    if "anyOf" in schema and not any(_has_instance(b, alive) for b in schema["anyOf"]):
        return False
    types = schema.get("type", TYPES)
    types = {types} if isinstance(types, str) else {*types}
    if "object" in types and not all(
        _has_instance(_named(schema, name), alive) for name in schema.get("required", ())
    ):
        types.discard("object")
    if "array" in types and not _has_items(schema, alive):
        types.discard("array")
    return bool(types)


def _named(schema: dict[str, Any], name: str) -> Any:
    if name in schema.get("properties", {}):
        return schema["properties"][name]
    return True if "patternProperties" in schema else schema.get("additionalProperties", True)


def _has_items(schema: dict[str, Any], alive: set[str]) -> bool:
    least = schema.get("minItems", 0)
    first = schema.get("prefixItems", [])
    if least > len(first) and not _has_instance(schema.get("items", True), alive):
        return False
    return all(_has_instance(item, alive) for item in first[:least])


def _pruned(schema: Any, alive: set[str]) -> Any:
    """Returns a schema with `false` for the parts without an instance."""
    if not isinstance(schema, dict):
        return schema
    if not _has_instance(schema, alive):
        return False
    out: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in ("properties", "patternProperties"):
            out[keyword] = {name: _pruned(inner, alive) for name, inner in value.items()}
        elif keyword == "anyOf":
            out[keyword] = [b for b in (_pruned(b, alive) for b in value) if b is not False]
        elif keyword in ("allOf", "prefixItems"):
            out[keyword] = [_pruned(inner, alive) for inner in value]
        elif keyword in ("items", "additionalProperties"):
            out[keyword] = _pruned(value, alive)
        else:
            out[keyword] = value
    return out


def _culprit(
    root: dict[str, Any], definitions: dict[str, Any], alive: set[str], sources: dict[str, str]
) -> str:
    """Returns the pointer of the part at which a schema without an instance fails."""
    schema: Any = root
    pointer = ""
    seen: set[str] = set()
    while isinstance(schema, dict):
        name = schema.get("$ref", "").rpartition("/")[2]
        if name and name not in alive:
            if name in seen:
                return pointer
            seen.add(name)
            schema, pointer = definitions[name], sources[name]
            continue
        lacking: list[tuple[tuple[str, ...], Any]] = [
            (("properties", name), _named(schema, name))
            for name in schema.get("required", ())
            if not _has_instance(_named(schema, name), alive)
        ]
        lacking += [
            ((keyword, str(index)), branch)
            for keyword in ("allOf", "anyOf", "prefixItems")
            for index, branch in enumerate(schema.get(keyword, ()))
            if not _has_instance(branch, alive)
        ]
        if "items" in schema and not _has_instance(schema["items"], alive):
            lacking.append((("items",), schema["items"]))
        if not lacking:
            return pointer
        steps, schema = lacking[0]
        pointer = point(pointer, *steps)
    return pointer


def _check_depth(root: Any, definitions: dict[str, Any], sources: dict[str, str]) -> None:
    """Walks as the compiler of grammars does, which follows each reference where it first stands.

    It keeps a frame of its stack for each schema on the way, and a process of ours must not die.
    """
    seen: set[str] = set()
    waiting: list[tuple[Any, int, int]] = [(root, 0, 0)]
    while waiting:
        schema, levels, followed = waiting.pop()
        if not isinstance(schema, dict):
            continue
        inner = [(child, levels + 1, followed) for child in _children(schema)]
        name = schema.get("$ref", "").rpartition("/")[2]
        if name and name not in seen:
            seen.add(name)
            if followed >= MOST_REFERENCES or levels >= MOST_LEVELS:
                raise StructureError(
                    f"references stand more than {MOST_REFERENCES} deep in each other",
                    sources[name],
                )
            inner.append((definitions[name], levels + 1, followed + 1))
        waiting += reversed(inner)
