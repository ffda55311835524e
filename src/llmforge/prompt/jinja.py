"""Compiles a `PromptFormat` to a Jinja chat template, so that servers that never heard of llmforge render its text.

The result uses nothing beyond what transformers' sandbox offers (`namespace`, `raise_exception`, `trim`), and writes
every text as a string literal, which Jinja leaves alone.
"""

import json

from llmforge.prompt.format import PLACEHOLDER, PromptFormat


def compile_to_jinja(format: PromptFormat) -> str:
    """Write the Jinja chat template that renders every conversation exactly as `format.render` does."""
    cleaned = " | trim" if format.strip_whitespace else ""
    tags_always = format.add_system_tags_even_if_message_is_empty
    system = _concatenation(format.system, content="found.system")
    user = _concatenation(format.user, content="content", system="found.text" if format.system_in_user else None)
    lines = [
        f"{{%- set found = namespace(system={_literal(format.default_system_message)}, count=0, text='') -%}}",
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'system' -%}",
        "{%- set found.system = message['content'] -%}",
        "{%- set found.count = found.count + 1 -%}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if found.count > 1 -%}{{- raise_exception('At most one system message is allowed.') -}}{%- endif -%}",
        f"{{%- set found.system = found.system{cleaned} -%}}",
        f"{{%- if {'true' if tags_always else 'found.system'} -%}}{{%- set found.text = {system} -%}}{{%- endif -%}}",
        f"{{{{- {_literal(format.bos)} -}}}}",
    ]
    if not format.system_in_user:
        lines.append("{{- found.text -}}{%- set found.text = '' -%}")
    lines += [
        "{%- for message in messages -%}",
        f"{{%- set content = message['content']{cleaned} -%}}",
        "{%- if message['role'] == 'user' -%}",
        f"{{{{- {user} -}}}}{{%- set found.text = '' -%}}",
        "{%- elif message['role'] == 'assistant' -%}",
        f"{{{{- {_concatenation(format.assistant, content='content')} -}}}}",
        "{%- elif message['role'] != 'system' -%}",
        "{{- raise_exception('Only the roles system, user and assistant are supported.') -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if found.text -%}{{- raise_exception('The system message needs a user turn.') -}}{%- endif -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {_literal(format.trailing_assistant)} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines)


def _concatenation(template: str, *, content: str, system: str | None = None) -> str:
    """Write a template as a Jinja expression: its literal pieces joined with the variables that fill it."""
    pieces = []
    position = 0
    for match in PLACEHOLDER.finditer(template):
        variable = content if match[1] == "instruction" else system
        if variable is None:
            continue
        pieces += [_literal(template[position : match.start()]), variable]
        position = match.end()
    pieces.append(_literal(template[position:]))
    return " + ".join(piece for piece in pieces if piece != '""') or '""'


def _literal(text: str) -> str:
    """Quote text for Jinja, whose string escapes are Python's; JSON's are a subset of them."""
    return json.dumps(text, ensure_ascii=False)
