"""Turns a YAML file and overrides into a `LoadedConfig`, or says exactly why not.

All problems of a file are reported together, each with its line, what was given, what is allowed and what to change.
This module must not fill in values that depend on data, model or hardware: `resolved.py` does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmforge.config import words
from llmforge.config.old_keys import OLD_KEYS
from llmforge.config.schema import FineTuningConfig
from llmforge.config.validate import validated
from llmforge.config.yaml_source import KeyPath, Repeat, Source, dotted, parse_value, read_source
from llmforge.errors import ConfigError

OriginKind = Literal["user", "override", "default", "derived"]

# `--default` chooses everything but these.
DEFAULT_MODE_KEYS = ("model_id", "train_path", "valid_path", "context_length", "num_epochs", "learning_rate")
_DEFAULT_MODE_LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from: the user's file, an override, a fixed default, or a derivation with its reason."""

    kind: OriginKind
    reason: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" if self.kind == "derived" else self.reason


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config as the user gave it, before anything is derived.

    `origins` has one entry for each top-level key, and one for each nested key that the user wrote (dotted). `text` is
    the file as it was read; `notes` are lines to print.
    """

    config: FineTuningConfig
    origins: Mapping[str, Origin]
    path: Path
    text: str
    notes: list[str] = field(default_factory=list)

    def origin(self, key: str) -> Origin:
        """Return the origin of a dotted key, or of the nearest section around it."""
        while key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins[key]

    def error(self, key: str, text: str, kind: type[ConfigError] = ConfigError) -> ConfigError:
        """Make an error about `key`, with the place where the user wrote it."""
        origin = self.origin(key)
        if origin.kind == "override":
            return kind(f"{origin.reason}: {key}: {text}")
        return kind(f"{key}: {text}", file=str(self.path), line=origin.line)


def load_config(path: str | Path, overrides: Sequence[str] = (), default_mode: bool = False) -> LoadedConfig:
    """Read the config at `path`, apply `--set` overrides (`key.sub=value`), and check all that can be checked alone.

    With `default_mode` (`--default`), the file may name only the model, the data and a few numbers, and everything else
    is chosen. Raises ConfigError with every problem found.
    """
    draft = _Draft(read_source(path))
    if default_mode:
        draft.apply_default_mode()
    draft.find_lost_indentation()
    for override in overrides:
        draft.apply_override(override)
    draft.drop_nulls()
    draft.translate_old_keys()
    config = draft.validate()
    return LoadedConfig(
        config=config, origins=draft.origins(), path=Path(path), text=draft.source.text, notes=draft.all_notes(config)
    )


@dataclass(frozen=True, slots=True)
class _Fault:
    """A problem and its place: a line of the file, or an override."""

    line: int | None
    override: str | None
    text: str


class _Draft:
    """The config on its way from YAML to `FineTuningConfig`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.data = source.data
        self.lines = source.lines
        self.overrides: dict[KeyPath, str] = {}
        self.chosen: set[str] = set()  # top-level keys that --default chose
        self.spelled: dict[str, str] = {}  # new key → the old key that the user wrote
        self.faults = [_Fault(error.line, None, error.text) for error in source.errors]
        self.notes: list[str] = []
        for repeat in source.repeats:
            self._judge_repeat(repeat)

    def _judge_repeat(self, repeat: Repeat) -> None:
        """Accept a key that is written twice where nothing depends on which one counts, as published files have it."""
        key = repeat.path[-1]
        without_effect = len(repeat.path) == 1 and key in OLD_KEYS and OLD_KEYS[str(key)].becomes is None
        if repeat.same_value or without_effect:
            what = "the same value" if repeat.same_value else "different values"
            self.notes.append(
                f"{self.source.file}:{repeat.line}: {key} is written twice with {what} "
                f"(first on line {repeat.first_line})"
            )
        else:
            self.faults.append(
                _Fault(
                    repeat.line,
                    None,
                    f"{dotted(repeat.path)}: written twice, on lines {repeat.first_line} and {repeat.line}, with "
                    "different values; remove one of them",
                )
            )

    # --- places --------------------------------------------------------------------------------------------

    def override_of(self, path: KeyPath) -> str | None:
        """Return the override that set the value at `path`, around it, or in it where the file has nothing there."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overrides:
                return self.overrides[path[:end]]
            if path[:end] in self.lines:
                return None
        return next((text for known, text in self.overrides.items() if known[: len(path)] == path), None)

    def line_of(self, path: KeyPath) -> int | None:
        """Return the line of the key at `path`, or of the nearest section around it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None

    def place(self, path: KeyPath) -> str:
        """Return the place of `path` as people write it."""
        override = self.override_of(path)
        return override if override is not None else f"line {self.line_of(path)}"

    def is_written(self, path: KeyPath) -> bool:
        """Tell whether the user wrote the key at `path` itself."""
        return path in self.lines or path in self.overrides

    def fault(self, path: KeyPath, text: str) -> None:
        """Record a problem with the value at `path`."""
        old = self.spelled.get(str(path[0])) if path else None
        name = f"{old} (now {dotted(path)})" if old else dotted(path)
        override = self.override_of(path)
        line = None if override is not None else self.line_of(path)
        fault = _Fault(line, override, f"{name}: {text}")
        if fault not in self.faults:
            self.faults.append(fault)

    def note(self, path: KeyPath, text: str) -> None:
        """Record a line to print about the value at `path`."""
        override = self.override_of(path)
        self.notes.append(f"{override or f'{self.source.file}:{self.line_of(path)}'}: {text}")

    # --- steps ---------------------------------------------------------------------------------------------

    def apply_default_mode(self) -> None:
        """Refuse keys that `--default` chooses, and choose them."""
        for key in self.data:
            if key not in DEFAULT_MODE_KEYS:
                self.fault(
                    (key,),
                    f"given with --default, which chooses it; allowed: {', '.join(DEFAULT_MODE_KEYS)}; "
                    "remove the key, or drop --default",
                )
        self.raise_faults()
        self.data["lora_config"] = dict(_DEFAULT_MODE_LORA)
        self.chosen.add("lora_config")

    def find_lost_indentation(self) -> None:
        """Report keys that stand at the top level right after the empty section they belong to."""
        top = set(words.keys_at(())) | set(OLD_KEYS)
        opened: list[KeyPath] = []
        lost: dict[str, list[str]] = {}
        for key in self.data:
            homes = [] if key in top else [path for path in reversed(opened) if _belongs(key, path, top)]
            if homes:
                path = (*homes[0], key)
                lost.setdefault(str(path[0]), []).append(key)
            else:
                path = (key,)
                opened = []
            if self.data[key] is None and (words.keys_at(path) or words.takes_any_key(path)):
                opened.append(path)
        for section, children in lost.items():
            lines = f"lines {self.lines[(children[0],)]}–{self.lines[(children[-1],)]}"
            if len(children) == 1:
                lines = f"line {self.lines[(children[0],)]}"
            self.fault(
                (section,),
                f"given nothing, followed by {', '.join(children)} at the top level ({lines}): the indentation of the "
                "section was lost, as happens when text is copied from a web page; indent what belongs to "
                f"{section} by two spaces per level",
            )
            for child in children:
                del self.data[child]

    def apply_override(self, override: str) -> None:
        """Apply one `key.sub=value`; null removes the key."""
        name, equals, text = override.partition("=")
        shown = f"--set {override}"
        if not equals or not all(name.strip().split(".")):
            raise ConfigError(f"{shown}: given no key and value; allowed: key=value or section.key=value; add them")
        try:
            value = parse_value(text)
        except ConfigError as error:
            raise ConfigError(f"{shown}: {error.message}") from None
        path = _override_path(name.strip().split("."))
        section = self.data
        for part in path[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[path[-1]] = value
        for known in [known for known in self.lines if known[: len(path)] == path]:
            del self.lines[known]
        self.overrides[path] = shown
        self.chosen.discard(path[0])

    def drop_nulls(self) -> None:
        """Remove keys that are null: null means unset, for every key that the schema names."""
        _drop_nulls(self.data, ())

    def translate_old_keys(self) -> None:
        """Replace LLMForge's old keys by today's, with a note each."""
        for key in [key for key in self.data if key in OLD_KEYS]:
            old = OLD_KEYS[key]
            value = self.data[key]
            if not _fits(value, old.json_schema):
                self.fault(
                    (key,),
                    f"given {words.shown(value)}; allowed {words.allowed([old.json_schema])}; "
                    f"{words.what_to_change(value, [old.json_schema])}",
                )
                del self.data[key]
                continue
            self.note((key,), f"{key} {old.note}")
            for new, translated in (old.becomes(value, self.data) if old.becomes else {}).items():
                self._take_over(key, new, translated)
            del self.data[key]

    def _take_over(self, old: str, new: str, value: Any) -> None:
        if new not in self.data:
            self.data[new] = value
            self.spelled[new] = old
            if (old,) in self.overrides:
                self.overrides[(new,)] = self.overrides[(old,)]
            else:
                self.lines[(new,)] = self.lines[(old,)]
        elif self.data[new] != value:
            self.fault(
                (old,),
                f"given {words.shown(self.data[old])}, which contradicts {self.spelled.get(new, new)} "
                f"({self.place((new,))}); remove {old}",
            )

    def validate(self) -> FineTuningConfig:
        """Make the config; raises ConfigError with every problem of the draft."""
        config, wrongs = validated(self.data, FineTuningConfig)
        keys = {str(wrong.path[0]) for wrong in wrongs}
        if keys:
            # pydantic skips the checks across keys when a key is wrong. Run them on the keys that are right.
            stand_ins = {"model_id": "unknown", "train_path": "unknown"}
            rest = stand_ins | {key: value for key, value in self.data.items() if key not in keys}
            across = validated(rest, FineTuningConfig)[1]
            wrongs += [wrong for wrong in across if not keys & {str(path[0]) for path in (wrong.path, *wrong.others)}]
        for wrong in wrongs:
            places = [f"{dotted(other)}: {self.place(other)}" for other in wrong.others if self.is_written(other)]
            self.fault(wrong.path, wrong.text + (f" ({', '.join(places)})" if places else ""))
        self.raise_faults()
        assert config is not None
        return config

    def raise_faults(self) -> None:
        """Raise a ConfigError that lists every fault found so far, in the order of the file."""
        if not self.faults:
            return
        faults = sorted(self.faults, key=lambda fault: (fault.override is not None, fault.line or 0))
        texts = []
        for index, fault in enumerate(faults):
            if fault.override is not None:
                texts.append(f"{fault.override}: {fault.text}")
            elif index == 0:
                texts.append(fault.text)  # the error itself writes the place of the first one
            else:
                texts.append(
                    f"{self.source.file}:{fault.line}: {fault.text}"
                    if fault.line
                    else f"{self.source.file}: {fault.text}"
                )
        first = faults[0]
        raise ConfigError("\n".join(texts), file=self.source.file if first.override is None else None, line=first.line)

    # --- results -------------------------------------------------------------------------------------------

    def origins(self) -> dict[str, Origin]:
        """Return the origin of every top-level key and of every nested key that was written."""
        origins: dict[str, Origin] = {}
        for key, info in FineTuningConfig.model_fields.items():
            if key not in self.data:
                origins[key] = Origin("default", "default" if info.default is not None else "not set")
            elif key in self.chosen:
                origins[key] = Origin("default", "chosen by --default")
            else:
                self._add_origins(origins, (key,), self.data[key])
        return origins

    def _add_origins(self, origins: dict[str, Origin], path: KeyPath, value: Any) -> None:
        override = self.override_of(path)
        if override is not None:
            origins[dotted(path)] = Origin("override", override)
        else:
            line = self.line_of(path)
            origins[dotted(path)] = Origin("user", f"{Path(self.source.file).name}:{line}", line)
        if isinstance(value, Mapping):
            for key, inner in value.items():
                self._add_origins(origins, (*path, key), inner)

    def all_notes(self, config: FineTuningConfig) -> list[str]:
        """Return the notes for a person, among them keys that are right but do nothing beside others."""
        # Both at their resolved values is how a resolved config looks: only a chosen min_update_steps deserves a line.
        chosen = config.min_update_steps != FineTuningConfig.model_fields["min_update_steps"].default
        if config.num_epochs is not None and chosen:
            self.note(("min_update_steps",), "min_update_steps has no effect, because num_epochs is set")
        return list(self.notes)


def _belongs(key: str, section: KeyPath, top: set[str]) -> bool:
    """Tell whether `section` can have lost a key to the top level; where keys are free, a misspelt one is not lost."""
    known = words.keys_at(section)
    if known:
        return key in known
    return words.takes_any_key(section) and (len(section) > 1 or words.nearest(key, top) is None)


def _override_path(parts: list[str]) -> tuple[str, ...]:
    """Group dotted parts into keys: below a mapping with free keys, the rest is one key (`g5.12xlarge`)."""
    for end in range(1, len(parts)):
        if words.takes_any_key(tuple(parts[:end])):
            return (*parts[:end], ".".join(parts[end:]))
    return tuple(parts)


def _drop_nulls(data: dict[str, Any], path: KeyPath) -> None:
    for key in list(data):
        here = (*path, key)
        if data[key] is None and (not path or words.keys_at(path)):
            del data[key]
        elif isinstance(data[key], dict):
            _drop_nulls(data[key], here)


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool) and value >= schema.get("minimum", value)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, dict)
