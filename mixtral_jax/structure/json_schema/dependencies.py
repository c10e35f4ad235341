"""Dependencies: rules about the names that an object has beside others."""

from typing import Any

from mixtral_jax.structure.json_schema.document import Place
from mixtral_jax.structure.json_schema.report import Mode, Report, Write

_MOST = 4  # dependencies of one schema: each doubles the ways to write an object


def write_dependencies(
    place: Place, keyword: str, types: frozenset[str], report: Report, write: Write
) -> list[Any]:
    """Returns schemas that say: an object without the name, or with all that it asks for."""
    if "object" not in types:
        return []
    rows: list[Any] = []
    required = {*place.value.get("required", ())}
    kind = {"type": "object"} if types == {"object"} else {}
    for count, (name, needed) in enumerate(place.value[keyword].items()):
        if isinstance(needed, list):
            schema: Any = {**kind, "required": needed}
            is_needed = bool(needed)
        else:
            schema = write(place.below(keyword, name), Mode(is_composed=True))
            is_needed = schema is not True
        if not is_needed:
            continue
        if name in required:
            rows.append(schema)
            continue
        if count >= _MOST:
            report.weaken(place.below(keyword), name, f"more than {_MOST} names have dependencies")
            continue
        absent = {**kind, "properties": {name: False}}
        if schema is False:
            rows.append(absent)
        elif isinstance(needed, list):
            rows.append({"anyOf": [{**kind, "required": [name, *needed]}, absent]})
        else:
            present = {"allOf": [{**kind, "required": [name]}, schema]}
            rows.append({"anyOf": [present, absent]})
    return rows
