"""Checks plain data against the schema and says in plain words what is wrong; pydantic's own messages never get out.

It must not know files or lines.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from llmforge.config import words
from llmforge.config.old_keys import FOREIGN_NAMES
from llmforge.config.schema import FineTuningConfig
from llmforge.config.section import CombinationError, Section
from llmforge.config.yaml_source import KeyPath, dotted

Model = TypeVar("Model", bound=Section)


@dataclass(frozen=True, slots=True)
class Wrong:
    """What is wrong with the value at `path`, and the other keys that have to do with it."""

    path: KeyPath
    text: str
    others: tuple[KeyPath, ...] = ()


def validated(data: Mapping[str, Any], model: type[Model]) -> tuple[Model | None, list[Wrong]]:
    """Return the config, or everything that is wrong with it."""
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        return None, list(dict.fromkeys(_in_words(error, data, model)))


def _in_words(error: ValidationError, data: Mapping[str, Any], model: type[Section]) -> Iterator[Wrong]:
    """Translate pydantic's errors; its own messages never reach a person."""
    found = [(_path_in(data, detail["loc"], detail["type"]), detail) for detail in error.errors(include_url=False)]
    paths = {path for path, _ in found}
    for path, detail in found:
        across = detail.get("ctx", {}).get("error")
        if isinstance(across, CombinationError):
            for problem in across.problems:
                first, *others = ((*path, *key.split(".")) for key in problem.keys)
                yield Wrong(first, problem.text, tuple(others))
            continue
        if any(len(other) > len(path) and other[: len(path)] == path for other in paths):
            continue  # a value that may be of several kinds fails once for each: what is wrong inside it says more
        match detail["type"]:
            case "missing":
                yield Wrong(path, f"missing; allowed {words.allowed(words.schemas_at(path, model))}; add it")
            case "extra_forbidden":
                yield Wrong(path, _unknown_words(path, model))
            case _:
                value, schemas = _value_at(data, path), words.schemas_at(path, model)
                change = words.what_to_change(value, schemas)
                yield Wrong(path, f"given {words.shown(value)}; allowed {words.allowed(schemas)}; {change}")


def _path_in(data: Any, loc: tuple[int | str, ...], kind: str) -> KeyPath:
    """Keep the parts of a pydantic location that are keys of `data`; the others name members of a union."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_list or (isinstance(data, Mapping) and part in data):
            data = data[part]
        elif not (last and kind == "missing"):
            continue
        path.append(part)
    return tuple(path)


def _value_at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


def _unknown_words(path: KeyPath, model: type[Section]) -> str:
    *around, key = path
    section = tuple(around)
    known = words.keys_at(section, model)
    name = str(key)
    where = f"in {dotted(section)}" if section else "at the top level"
    foreign = FOREIGN_NAMES.get(dotted(section), {}).get(name) if model is FineTuningConfig else None
    meant = foreign or words.nearest(name, known)
    homes = [home for home in words.sections_with(name, model) if home != dotted(section)]
    if homes and foreign is None:
        place = " or ".join(f"in {home}" if home else "at the top level" for home in homes[:3])
        return f"unknown key {where}; it is a key {place}; move it there"
    if meant is not None:
        return f"unknown key {where}; did you mean {meant}?"
    return f"unknown key {where}; allowed: {words.listed(known)}; remove it"
