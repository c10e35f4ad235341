"""Alternatives: "any of" as it is, "exactly one of" as "any of" where no two can both be valid."""

from typing import Any

from mixtral_jax.structure.json_schema.document import Place
from mixtral_jax.structure.json_schema.overlap import Prover, Side, Types
from mixtral_jax.structure.json_schema.report import Mode, Report, Write

_MOST_BRANCHES = 100  # that are compared in pairs


def write_any_of(place: Place, mode: Mode, write: Write) -> Any:
    """Returns what is written for the `anyOf` of a schema."""
    count = len(place.value["anyOf"])
    return _union([write(place.below("anyOf", index), mode) for index in range(count)])


def write_one_of(
    place: Place, types: Types, mode: Mode, prover: Prover, report: Report, write: Write
) -> Any:
    """Returns what is written for the `oneOf` of a schema.

    Where branches could overlap, they are told apart by a tag that each must have, or by names that
    another requires and that this one then must not have. Where that is not enough it is listed.
    `types` are those that the schema allows beside it.
    """
    types |= {"integer"} if "number" in types else types
    branches = [place.below("oneOf", index) for index in range(len(place.value["oneOf"]))]
    modes = [mode] * len(branches)
    if len(branches) > _MOST_BRANCHES:
        report.weaken(place, "oneOf", f"it has more than {_MOST_BRANCHES} branches")
    else:
        modes = _told_apart(place, types, branches, mode, prover)
        overlaps = _overlaps(branches, modes, prover, types)
        if overlaps:
            first, second = overlaps[0]
            why = f"branches {min(first, second)} and {max(first, second)} may both be valid"
            report.weaken(place, "oneOf", why)
    return _union([write(branch, own) for branch, own in zip(branches, modes, strict=True)])


def _union(written: list[Any]) -> Any:
    options = [schema for schema in written if schema is not False]
    if not options or any(schema is True for schema in options):
        return bool(options)
    return options[0] if len(options) == 1 else {"anyOf": options}


def _overlaps(
    branches: list[Place], modes: list[Mode], prover: Prover, types: Types
) -> list[tuple[int, int]]:
    """Returns the pairs of which the first, as written, may be valid under the second."""
    count = len(branches)
    return [
        (i, j)
        for i in range(count)
        for j in range(count)
        if i != j
        and not prover.are_disjoint(Side(branches[i], modes[i]), Side(branches[j]), types=types)
    ]


def _told_apart(
    place: Place, types: Types, branches: list[Place], mode: Mode, prover: Prover
) -> list[Mode]:
    """Returns the modes in which the branches overlap least."""
    modes = [mode] * len(branches)
    overlaps = _overlaps(branches, modes, prover, types)
    tag = _tag(place, branches, prover)
    if tag and (overlaps or _declared_tag(place) == tag):  # readers look for a declared one
        modes = [Mode(mode.is_composed, (*mode.require, tag), mode.exclude)] * len(branches)
        overlaps = _overlaps(branches, modes, prover, types)
    beside = {*place.value.get("required", ()), *mode.require}
    for i, j in overlaps:
        side = Side(branches[i], modes[i])
        own = {*_required(side, prover), *_described(side, prover), *beside}
        for name in _required(Side(branches[j]), prover):
            if name in own:
                continue
            tried = Mode(modes[i].is_composed, modes[i].require, (*modes[i].exclude, name))
            if prover.are_disjoint(Side(branches[i], tried), Side(branches[j]), types=types):
                modes[i] = tried
                break
    return modes


def _required(side: Side, prover: Prover) -> list[str]:
    rows = [prover.required(conjunct) for conjunct in prover.conjuncts(side)]
    return list(dict.fromkeys(name for names in rows for name in names))


def _described(side: Side, prover: Prover) -> list[str]:
    rules = [conjunct.place.value for conjunct in prover.conjuncts(side)]
    return [name for rule in rules if isinstance(rule, dict) for name in rule.get("properties", ())]


def _tag(place: Place, branches: list[Place], prover: Prover) -> str | None:
    """Returns the name that has a constant of its own in every branch, if there is one."""
    tags = [_constants(branch, prover) for branch in branches]
    names = [name for name in tags[0] if all(name in tag for tag in tags)]
    wanted = _declared_tag(place)
    names.sort(key=lambda name: name != wanted)
    return names[0] if names else None


def _declared_tag(place: Place) -> str | None:
    declared = place.value.get("discriminator")
    name = declared.get("propertyName") if isinstance(declared, dict) else None
    return name if isinstance(name, str) else None


def _constants(branch: Place, prover: Prover) -> list[str]:
    names = []
    for conjunct in prover.conjuncts(Side(branch)):
        rules = conjunct.place.value
        if isinstance(rules, dict):
            for name, schema in rules.get("properties", {}).items():
                if isinstance(schema, dict) and ("const" in schema or "enum" in schema):
                    names.append(name)
    return names
