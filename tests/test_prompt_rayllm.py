"""What RayLLM's published tests ask of a prompt format, on conversations of our own.

The formats are those of `tests/test_aviary/common/test_prompt_format.py` in https://github.com/ray-project/ray-llm.
"""

import pytest
from pydantic import ValidationError

import chat_templates
from conftest import build_tokenizer
from llmforge.errors import ConversationError
from llmforge.prompt import Encoder, PromptFormat, build_format

BRACKETS = {
    "system": "[system] {instruction} [/system] ",
    "user": "[user] {instruction} [/user] ",
    "assistant": "[assistant] {instruction} [/assistant] ",
    "trailing_assistant": "[assistant]",
    "default_system_message": "",
}
LLAMA_2 = {
    "system": "<<SYS>>\n{instruction}\n<</SYS>>\n\n",
    "user": "[INST] {system}{instruction} [/INST]",
    "assistant": " {instruction} </s><s>",
    "trailing_assistant": "",
    "default_system_message": "",
    "system_in_user": True,
}
LLAMA_2_SPACED = {**LLAMA_2, "assistant": " {instruction} </s><s> ", "trailing_assistant": " "}
MISTRAL = {
    **LLAMA_2,
    "system": "{instruction} + ",
    "assistant": "{instruction}</s> ",
}
MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}{{- message.content + eos_token + ' ' }}{%- endif %}
{%- endfor %}"""


def chat(*contents: str, system: str | None = None) -> list[dict]:
    """Write a conversation that the user begins."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@pytest.mark.parametrize("default", ["", "Test"])
@pytest.mark.parametrize("system", [None, "law"])
@pytest.mark.parametrize("turns", [1, 3, 5])
def test_messages_are_written_one_after_the_other(turns, system, default):
    contents = [f"m{number}" for number in range(turns)]
    law = system or default
    dialogue = "".join(
        f"[assistant] {content} [/assistant] " if index % 2 else f"[user] {content} [/user] "
        for index, content in enumerate(contents)
    )
    format = PromptFormat(**{**BRACKETS, "default_system_message": default})
    head = f"[system] {law} [/system] " if law else ""
    assert format.render(chat(*contents, system=system)) == f"{head}{dialogue}[assistant]"

    in_user = PromptFormat(**{**LLAMA_2_SPACED, "default_system_message": default})
    head = f"<<SYS>>\n{law}\n<</SYS>>\n\n" if law else ""
    dialogue = "".join(
        f" {content} </s><s> " if index % 2 else f"[INST] {'' if index else head}{content} [/INST]"
        for index, content in enumerate(contents)
    )
    assert in_user.render(chat(*contents, system=system)) == f"{dialogue} "


@pytest.mark.parametrize("section", [BRACKETS, LLAMA_2_SPACED])
@pytest.mark.parametrize("default", ["", "Test"])
def test_a_system_message_moves_to_the_front_and_a_second_one_is_refused(section, default):
    format = PromptFormat(**{**section, "default_system_message": default})
    late = [*chat("ask"), {"role": "system", "content": "law"}]
    assert format.render(late) == format.render(chat("ask", system="law"))
    with pytest.raises(ConversationError, match="2 system messages") as caught:
        format.render([{"role": "system", "content": "law"}, *late])
    assert isinstance(caught.value, ValueError)


def test_system_in_user_asks_for_its_placeholder():
    with pytest.raises(ValidationError, match="system"):
        PromptFormat(**{**BRACKETS, "system_in_user": True})


def test_system_tags_around_nothing():
    tagged = {"add_system_tags_even_if_message_is_empty": True}
    assert (
        PromptFormat(**BRACKETS, **tagged).render(chat("ask")) == "[system]  [/system] [user] ask [/user] [assistant]"
    )
    written = PromptFormat(**LLAMA_2_SPACED, **tagged).render(chat("ask"))
    assert written == "[INST] <<SYS>>\n\n<</SYS>>\n\nask [/INST] "


@pytest.mark.parametrize(
    ("strip", "expected"),
    [
        (True, "[user] one [/user] [assistant] two [/assistant] [user] three [/user] [assistant]"),
        (False, "[user] one  [/user] [assistant]  two [/assistant] [user] three [/user] [assistant]"),
    ],
)
def test_white_space_around_contents(strip, expected):
    assert PromptFormat(**BRACKETS, strip_whitespace=strip).render(chat("one ", " two", "three")) == expected


@pytest.mark.parametrize(
    ("section", "template", "takes_system"),
    [(LLAMA_2, chat_templates.LLAMA_2, True), (MISTRAL, MISTRAL_TEMPLATE, False)],
    ids=["llama-2", "mistral"],
)
def test_the_published_formats_give_the_ids_of_the_models_own_templates(section, template, takes_system):
    tokenizer = build_tokenizer(chat_template=template)
    ours = Encoder(tokenizer, build_format({**section, "bos": "<s>"}, tokenizer))
    theirs = Encoder(tokenizer, build_format(None, tokenizer))
    for system in (None, "law") if takes_system else (None,):
        for turns in (1, 3, 5):
            messages = chat(*(f"m{number}" for number in range(turns)), system=system)
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            assert theirs.encode_prompt(messages) == ids
            assert ours.encode_prompt(messages) == ids
