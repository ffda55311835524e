"""What every section of the config shares: the strict, frozen base model and a few field types.

It must not know any key.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema


class Section(BaseModel):
    """A part of the config: frozen, no unknown keys, and no value of a type that merely converts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


# YAML has lists only; in the frozen config they are tuples. Only the container is converted, its items stay strict.
LooseTuple = Field(strict=False)
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], LooseTuple]
Integers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], LooseTuple]


def _uri_of_storage(value: Any) -> Any:
    """Take the address out of LLMForge's RemoteStoragePath object; leave anything else as it is."""
    if isinstance(value, Mapping) and isinstance(value.get("uri"), str) and set(value) <= {"uri", "type"}:
        return value["uri"]
    return value


_PATH_SCHEMA = {"title": "Path", "type": "string", "minLength": 1}
_STORAGE_SCHEMA = {
    "title": "RemoteStoragePath",
    "type": "object",
    "properties": {"uri": {"type": "string"}, "type": {"type": "string"}},
    "required": ["uri"],
    "additionalProperties": False,
}
StoragePath = Annotated[
    str,
    Field(min_length=1),
    BeforeValidator(_uri_of_storage),
    WithJsonSchema({"anyOf": [_PATH_SCHEMA, _STORAGE_SCHEMA]}),
]


class RepoId(Section):
    """A repository on the Hugging Face hub, written as `{repo_id: org/model}`."""

    repo_id: str = Field(min_length=1, description="Name of the repository, for example org/model.")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with how values go together.

    `keys` are dotted names below the section that found it: all that are involved, the one to look at first.
    """

    keys: tuple[str, ...]
    text: str


class CombinationError(ValueError):
    """Everything that is wrong with how the values of a section go together."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{problem.keys[0]}: {problem.text}" for problem in problems))
        self.problems = problems
