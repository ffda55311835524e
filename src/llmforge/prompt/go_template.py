"""Compiles a `PromptFormat` to the template language of Ollama's Modelfile: Go's `text/template`.

Ollama hands a template `.Messages`, each with `.Role` and `.Content`, and feeds the model what it prints. Two of its
rules have no counterpart in our formats and are taken over as they are (`template/template.go` and `server/prompt.go`
of https://github.com/ollama/ollama, as of August 2026):

- consecutive messages of one role reach the template as one, joined by an empty line (`changed_by_ollama`);
- where the assistant has the last word, the model goes on with that message instead of beginning one.

The language has no function that strips white space and none that raises an error. Stripping is written as templates
that call themselves with a character less; to refuse a conversation, a template is called that does not exist and whose
name is the message. Every text is a string literal in which no quotation mark and no unprintable character stands: a
Modelfile ends its values at quotation marks and drops what is unprintable.
"""

import sys
from collections.abc import Sequence
from functools import cache

from llmforge.prompt.conversation import Message
from llmforge.prompt.format import PLACEHOLDER, PromptFormat


def compile_to_go_template(format: PromptFormat, *, writes_bos: bool = True) -> str:
    """Write the template under which Ollama renders what `text_in_ollama` gives, and refuses what `render` refuses.

    Args:
        format: the format to compile.
        writes_bos: whether the text begins with the format's `bos`. False where the runner puts the BOS token in front
            by itself (`tokenizer.ggml.add_bos_token` of the GGUF file): it would stand there twice.
    """
    content = '{{ template "stripped" .Content }}' if format.strip_whitespace else "{{ .Content }}"
    answer, instruction, end = format.assistant.rpartition("{instruction}")
    trailing = _print(format.trailing_assistant)
    system = '{{ template "system" $system }}'
    return "\n".join(
        [
            *_definitions(format),
            f"{{{{- $system := {_literal(format.default_system_message)} }}}}"
            "{{ $found := false }}{{ $waits := true }}{{ $goes_on := false -}}",
            "{{- range .Messages -}}",
            '{{- if eq .Role "system" -}}',
            f"{{{{- if $found }}}}{_refusal('at most one system message is allowed')}{{{{ end -}}}}",
            "{{- $found = true }}{{ $system = .Content -}}",
            "{{- end -}}",
            "{{- end -}}",
            *_line(_print(format.bos) if writes_bos else ""),
            *_line("" if format.system_in_user else system),
            "{{- range $index, $message := .Messages -}}",
            "{{- $is_last := eq (len (slice $.Messages $index)) 1 -}}",
            '{{- if eq .Role "user" -}}',
            *_line(
                _fill(
                    format.user, content, f"{{{{ if $waits }}}}{system}{{{{ end }}}}" if format.system_in_user else None
                )
            ),
            "{{- $waits = false -}}",
            '{{- else if eq .Role "assistant" -}}',
            *_line(_fill(answer + instruction, content)),
            f"{{{{- if $is_last }}}}{{{{ $goes_on = true }}}}{{{{ else }}}}{_print(end)}{{{{ end -}}}}",
            '{{- else if ne .Role "system" -}}',
            *_line(_refusal("only the roles system, user and assistant are allowed")),
            "{{- end -}}",
            "{{- end -}}",
            *_line('{{ if $waits }}{{ template "unplaced" $system }}{{ end }}' if format.system_in_user else ""),
            *_line(f"{{{{ if not $goes_on }}}}{trailing}{{{{ end }}}}" if trailing else ""),
        ]
    )


def text_in_ollama(format: PromptFormat, messages: Sequence[Message], *, writes_bos: bool = True) -> str:
    """Render what the model is fed for a conversation that Ollama leaves as it is.

    That is what `format.render` gives, the generation prompt included; where the assistant has the last word, the
    text ends with that message's content, for the model to go on.

    Raises:
        ConversationError: the messages are malformed, or the format cannot express them.
    """
    text = format.render(messages)
    if messages[-1]["role"] == "assistant":
        unfinished = format.assistant.rpartition("{instruction}")[2] + format.trailing_assistant
        text = text[: len(text) - len(unfinished)]
    return text if writes_bos else text[len(format.bos) :]


def changed_by_ollama(messages: Sequence[Message]) -> str | None:
    """Say what Ollama does to a conversation before any template sees it, or None where it does nothing."""
    for index in range(1, len(messages)):
        if messages[index - 1]["role"] == messages[index]["role"] != "tool":
            return f"messages {index - 1} and {index} are both of the {messages[index]['role']}: they are joined to one"
    return None


def _definitions(format: PromptFormat) -> list[str]:
    """Define the templates that the main one calls: `system`, and what strips the white space of a content."""
    content = '{{ template "stripped_right" . }}' if format.strip_whitespace else "{{ . }}"
    system = _fill(format.system, content)
    has_tags = bool(PLACEHOLDER.sub("", format.system)) or "{system}" in format.system
    always = format.add_system_tags_even_if_message_is_empty
    bodies = {"system": system if always else f"{{{{ if . }}}}{system}{{{{ end }}}}"}
    if format.system_in_user:
        refusal = _refusal("the system message has no user turn to go into")
        bodies["unplaced"] = refusal if always and has_tags else f"{{{{ if . }}}}{refusal}{{{{ end }}}}"
    if not format.strip_whitespace:
        return [f'{{{{- define "{name}" }}}}{body}{{{{ end -}}}}' for name, body in bodies.items()]
    bodies["stripped"] = content
    lines = []
    for name, body in bodies.items():
        lines += _stripping(name, "(slice . 0 {width})", "(slice . {width})", body)
    return lines + _stripping(
        "stripped_right", "(slice . (len (slice . {width})))", "(slice . 0 (len (slice . {width})))", "{{ . }}"
    )


def _stripping(name: str, edge: str, rest: str, body: str) -> list[str]:
    """Define a template that calls itself without the character at one edge as long as that is white space.

    `edge` and `rest` are Go's expressions for that character of `width` bytes of UTF-8, and for what is left. Bytes can
    be compared because none of these characters is the end of another one.
    """
    lines = [f'{{{{- define "{name}" -}}}}']
    for width, keyword in ((1, "if"), (2, "else if"), (3, "else if")):
        characters = " ".join(_literal(one) for one in _white_space() if len(one.encode()) == width)
        lines.append(
            f"{{{{- {keyword} and (ge (len .) {width}) (eq {edge.format(width=width)} {characters}) -}}}}"
            f'{{{{- template "{name}" {rest.format(width=width)} -}}}}'
        )
    return [*lines, "{{- else -}}", *_line(body), "{{- end -}}", "{{- end -}}"]


@cache
def _white_space() -> str:
    """Give the characters that `str.strip` strips; there are a million to ask."""
    return "".join(filter(str.isspace, map(chr, range(sys.maxunicode + 1))))


def _line(actions: str) -> list[str]:
    """Make a line of its own of actions, whose braces trim the line breaks around it; nothing of nothing."""
    return [f"{{{{-{actions.removeprefix('{{').removesuffix('}}')}-}}}}"] if actions else []


def _fill(template: str, content: str, system: str | None = None) -> str:
    """Write a template as a row of actions: its literal pieces, and what fills it."""
    actions = ""
    position = 0
    for match in PLACEHOLDER.finditer(template):
        action = content if match[1] == "instruction" else system
        if action is not None:
            actions += _print(template[position : match.start()]) + action
            position = match.end()
    return actions + _print(template[position:])


def _print(text: str) -> str:
    return f"{{{{ {_literal(text)} }}}}" if text else ""


def _refusal(message: str) -> str:
    return f'{{{{ template "{message}" . }}}}'


def _literal(text: str) -> str:
    """Quote text for Go, keeping what can be read."""
    return f'"{"".join(map(_escape, text))}"'


def _escape(character: str) -> str:
    match character:
        case "\n":
            return r"\n"
        case "\t":
            return r"\t"
        case "\\":
            return r"\\"
        case '"':
            return r"\x22"
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"
