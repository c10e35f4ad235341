"""Rules about an object's other names: dependencies, and the negations that can be written."""

from typing import Any

from mixtral_jax.structure.json_schema.document import Place
from mixtral_jax.structure.json_schema.keywords import TYPES, is_annotation, types_of
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


def write_not(place: Place, types: frozenset[str], report: Report) -> Any:
    """Returns a schema that says what must not be: a type, or a name; else it is listed."""
    refused = place.value["not"]
    if isinstance(refused, bool):
        return not refused
    rules = {key: rule for key, rule in refused.items() if not is_annotation(key)}
    if not rules:
        return False
    if rules.keys() == {"type"}:
        names = types_of(place.below("not")) or ()
        if not ({"integer"} == {*names} & {"integer", "number"} and "number" in types):
            kept = [
                t for t in TYPES if t not in names and (t != "integer" or "number" not in names)
            ]
            kept = [t for t in kept if t in types or (t == "integer" and "number" in types)]
            return {"type": kept} if kept else False
    names = rules.get("required", ())
    is_name = rules.keys() <= {"required", "type"} and len(names) == 1
    if is_name and rules.get("type") in (None, "object") and types == {"object"}:
        return {"type": "object", "properties": {names[0]: False}}
    report.weaken(place, "not", "only types and single names can be ruled out")
    return True
