"""Reads YAML so that every key and value knows its line, and never builds anything but plain data.

Numbers are read as people write them (`1e-4`, `37_580_963_840`), which PyYAML's own loader does not. This module must
not know any key of the config.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmforge.errors import ConfigError

KeyPath = tuple[str | int, ...]

# A file that aliases itself into more values than this is an attack or an accident, not a config.
_MOST_VALUES = 100_000

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+)")
_FLOAT = re.compile(
    r"[-+]?((\.[0-9][0-9_]*|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
)


class _PlainLoader(yaml.SafeLoader):
    """A SafeLoader whose numbers are YAML 1.2's with underscores, and that knows no dates or other guesses."""


_PlainLoader.yaml_implicit_resolvers = {}  # else PyYAML's own rules stay beside these
for _name, _pattern, _first in (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    (
        "bool",
        re.compile(r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"),
        list("tTfFyYnNoO"),
    ),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<"), ["<"]),
):
    _PlainLoader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern.pattern})$"), _first)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong at one line of the file."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Repeat:
    """A key that is written a second time; the first value counts."""

    path: KeyPath
    first_line: int
    line: int
    same_value: bool


@dataclass
class Source:
    """A YAML mapping as plain data, with the line of every key and list item."""

    file: str
    text: str
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    errors: list[Finding] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)


def read_source(path: str | Path) -> Source:
    """Read the YAML file at `path`.

    Raises ConfigError when it cannot be read, is not YAML, or does not hold a mapping. Faults of single keys are
    collected in `errors`, so that they can be reported together with everything else.
    """
    file = str(path)
    return parse_source(_read_text(Path(path)), file)


def parse_source(text: str, file: str) -> Source:
    """Parse YAML `text`; `file` is the name that errors give. Raises ConfigError as `read_source` does."""
    node = _compose(text, file)
    if node is None:
        raise ConfigError(
            "the file is empty; allowed: a mapping with at least model_id and train_path", file=file, line=1
        )
    if not isinstance(node, yaml.MappingNode):
        what = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise ConfigError(
            f"given {what} at the top level; allowed: a mapping of keys to values; write lines like `model_id: NAME`",
            file=file,
            line=_line(node),
        )
    source = Source(file=file, text=text, data={}, lines={})
    source.data = _Reader(source).mapping(node, ())
    return source


def parse_value(text: str) -> Any:
    """Parse one YAML value, as the right-hand side of `--set key=value` has it; raises ConfigError."""
    node = _compose(text, "")
    source = Source(file="", text=text, data={}, lines={})
    try:
        value = None if node is None else _Reader(source).value(node, ())
    except RecursionError:
        raise ConfigError("an alias contains itself; remove it") from None
    for repeat in source.repeats:
        raise ConfigError(f"{dotted(repeat.path)} is written twice; remove one of them")
    if source.errors:
        raise ConfigError(source.errors[0].text)
    return value


def scalar_is_plain_text(text: str) -> bool:
    """Tell whether `text`, written without quotes, is read as that same text."""
    return _PlainLoader("").resolve(yaml.ScalarNode, text, (True, False)) == _TAG + "str"


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of a YAML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: this is a directory; give the path of a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: the file cannot be read ({error.strerror}); check its permissions") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"byte {content[error.start]:#04x} is not UTF-8 text; save the file with the encoding UTF-8",
            file=str(path),
            line=line,
        ) from None


def _compose(text: str, file: str) -> yaml.Node | None:
    name = file or None
    try:
        return yaml.compose(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark and name else None
        raise ConfigError(_syntax_words(error), file=name, line=line) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if name else None
        raise ConfigError(
            f"the character {error.character!r} is not allowed in YAML; remove it", file=name, line=line
        ) from None
    except RecursionError:
        raise ConfigError("the values are nested too deeply; a config has at most a few levels", file=name) from None


def _syntax_words(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or ""
    if "'\\t'" in problem:
        return "a tab stands where a value or key should start; YAML is indented with spaces; replace the tab by spaces"
    if "mapping values are not allowed" in problem:
        return (
            "not valid YAML: a second `: ` on the line, or a key indented deeper than its neighbours; "
            "put quotes around a value that contains `: `, and align the keys of a section"
        )
    if "expected a single document" in problem or "expected a single document" in (error.context or ""):
        return "the file holds several YAML documents (a line `---` starts the next); allowed: one; remove the others"
    if "found undefined alias" in problem or "expected alphabetic or numeric character" in problem:
        return f"not valid YAML: {problem}; a value that starts with * or & needs quotes"
    if "cannot start any token" in problem:
        return f"not valid YAML: {problem}; put quotes around the value"
    if "expected <block end>" in problem:
        return "not valid YAML: this line is indented differently from the lines it belongs to; align it with them"
    if "could not find expected ':'" in problem:
        return "not valid YAML: a key without `:` before this line; write `key: value`"
    if "found unexpected end of stream" in problem or "'<stream end>'" in problem:
        return "not valid YAML: a quote or bracket is opened and never closed; close it"
    return f"not valid YAML: {problem}; check quotes, brackets and indentation"


class _Reader:
    """Turns YAML nodes into plain data and writes lines, errors and notes into a Source."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.values = 0

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.values += 1
        if self.values > _MOST_VALUES:
            raise ConfigError("the file expands to too many values; remove its aliases", file=self.source.file or None)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path) if node.tag == _TAG + "map" else self._refuse_tag(node)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != _TAG + "seq":
                return self._refuse_tag(node)
            return [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.source.lines[path] = _line(node)
        return self.value(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in self._pairs(node):
            key = self._key(key_node)
            if key is None:
                continue
            here = (*path, key)
            line = _line(key_node)
            if key in result:
                self._repeat(here, result[key], value_node, line)
                continue
            self.source.lines[here] = line
            try:
                result[key] = self.value(value_node, here)
            except RecursionError:
                raise ConfigError("an alias contains itself", file=self.source.file or None, line=line) from None
        return result

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """Yield a mapping's own pairs, then those merged with `<<:` whose keys it has not set itself."""
        own = [(key, value) for key, value in node.value if key.tag != _TAG + "merge"]
        yield from own
        seen = {key.value for key, _ in own if isinstance(key, yaml.ScalarNode)}
        for key, value in node.value:
            if key.tag != _TAG + "merge":
                continue
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(merged, yaml.MappingNode):
                    self.source.errors.append(Finding(_line(key), "`<<` takes a mapping or a list of mappings"))
                    continue
                for pair in merged.value:
                    if pair[0].value not in seen:
                        seen.add(pair[0].value)
                        yield pair

    def _key(self, node: yaml.Node) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag != _TAG + "null":
            return str(node.value)
        self.source.errors.append(Finding(_line(node), "a key must be text, such as `model_id`"))
        return None

    def _repeat(self, path: KeyPath, first: Any, node: yaml.Node, line: int) -> None:
        lines, self.source.lines = self.source.lines, {}
        again = self.value(node, path)
        self.source.lines = lines
        self.source.repeats.append(Repeat(path, lines[path], line, again == first))

    def _scalar(self, node: yaml.Node) -> Any:
        text: str = node.value
        match node.tag.removeprefix(_TAG):
            case "null":
                return None
            case "bool":
                return text.lower() in ("true", "yes", "on")
            case "int" if _INT.fullmatch(text):
                return int(text.replace("_", ""), 0)
            case "float" if _FLOAT.fullmatch(text):
                return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str" | "merge":
                return text
        return self._refuse_tag(node)

    def _refuse_tag(self, node: yaml.Node) -> None:
        tag = node.tag.replace(_TAG, "!!")
        self.source.errors.append(
            Finding(_line(node), f"the tag {tag} is not allowed; a config holds plain values only; remove the tag")
        )


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def dotted(path: KeyPath) -> str:
    """Write a key path as people do: `lora_config.target_modules[2]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text
