"""Plain prompt formats: which text a conversation becomes, what of it is trained, and what is refused."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from conftest import HOSTILE_TEXTS, PROMPT_FORMATS
from llmforge.errors import ConversationError, InputError
from llmforge.prompt import PromptFormat

PLAIN = {
    "system": "(sys {instruction})",
    "user": "(usr {instruction})",
    "assistant": "(ast {instruction})",
    "trailing_assistant": "(ast ",
}
INST = {
    "system": "<<{instruction}>> ",
    "user": "[I]{system}{instruction}[/I]",
    "assistant": " {instruction} $",
    "trailing_assistant": " ",
    "system_in_user": True,
}
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def chat(*messages: str) -> list[dict]:
    """Write a conversation as `u:hello`."""
    return [{"role": ROLES[message[0]], "content": message[2:]} for message in messages]


def plain(**changes) -> PromptFormat:
    return PromptFormat(**{**PLAIN, **changes})


def inst(**changes) -> PromptFormat:
    return PromptFormat(**{**INST, **changes})


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (["u:one"], "(usr one)(ast "),
        (["s:zero", "u:one"], "(sys zero)(usr one)(ast "),
        (["u:one", "a:two", "u:three"], "(usr one)(ast two)(usr three)(ast "),
        (["s:0", "u:1", "a:2", "u:3", "a:4", "u:5"], "(sys 0)(usr 1)(ast 2)(usr 3)(ast 4)(usr 5)(ast "),
        (["u:one", "s:late"], "(sys late)(usr one)(ast "),
        (["u:one", "a:two", "s:last", "u:three"], "(sys last)(usr one)(ast two)(usr three)(ast "),
        (["s:", "u:one"], "(usr one)(ast "),
        (["s:alone"], "(sys alone)(ast "),
        (["a:first", "u:second"], "(ast first)(usr second)(ast "),
        (["u:one", "u:two"], "(usr one)(usr two)(ast "),
        (["u:", "a:"], "(usr )(ast )(ast "),
    ],
)
def test_turns_are_concatenated_with_the_system_message_in_front(messages, expected):
    assert plain().render(chat(*messages)) == expected
    assert plain(bos="<B>").render(chat(*messages)) == "<B>" + expected
    assert plain().render(chat(*messages), add_generation_prompt=False) == expected.removesuffix("(ast ")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (["u:one"], "[I]one[/I] "),
        (["s:zero", "u:one"], "[I]<<zero>> one[/I] "),
        (["u:one", "s:zero"], "[I]<<zero>> one[/I] "),
        (["s:", "u:one"], "[I]one[/I] "),
        (["s:0", "u:1", "a:2", "u:3", "a:4", "u:5"], "[I]<<0>> 1[/I] 2 $[I]3[/I] 4 $[I]5[/I] "),
        (["a:hi", "s:0", "u:1", "u:2"], " hi $[I]<<0>> 1[/I][I]2[/I] "),
    ],
)
def test_system_in_user_goes_into_the_first_user_turn_only(messages, expected):
    assert inst().render(chat(*messages)) == expected


@pytest.mark.parametrize("build", [plain, inst])
def test_default_system_message_stands_in_for_an_absent_one_only(build):
    format = build(default_system_message="Test")
    assert format.render(chat("u:one")) == build().render(chat("s:Test", "u:one"))
    assert format.render(chat("s:mine", "u:one")) == build().render(chat("s:mine", "u:one"))
    assert format.render(chat("s:", "u:one")) == build().render(chat("u:one"))


def test_system_tags_around_an_empty_message_only_when_asked_for():
    assert plain(add_system_tags_even_if_message_is_empty=True).render(chat("u:one")) == "(sys )(usr one)(ast "
    tagged = inst(add_system_tags_even_if_message_is_empty=True)
    assert tagged.render(chat("u:one", "a:two", "u:three")) == "[I]<<>> one[/I] two $[I]three[/I] "
    assert tagged.render(chat("s:", "u:one")) == "[I]<<>> one[/I] "


@pytest.mark.parametrize("build", [plain, inst])
def test_strip_whitespace_strips_contents_and_never_templates(build):
    spaced, tight = chat("s:\t s \n", "u: one\n", "a:\n two "), chat("s:s", "u:one", "a:two")
    assert build(strip_whitespace=True).render(spaced) == build().render(tight)
    assert build().render(spaced) != build().render(tight)
    assert build(strip_whitespace=True).render(chat("s: \n ", "u:one")) == build().render(chat("u:one"))


def test_whitespace_is_kept_by_default():
    assert plain().render(chat("u: one\n\n"), False) == "(usr  one\n\n)"


def test_whitespace_only_system_message_is_not_empty_by_default():
    assert plain().render(chat("s: ", "u:one"), False) == "(sys  )(usr one)"


@pytest.mark.parametrize("content", HOSTILE_TEXTS)
def test_content_is_verbatim_whatever_it_holds(content):
    messages = [{"role": "system", "content": content + "!"}, *chat("u:?"), {"role": "assistant", "content": content}]
    assert plain().render(messages, False) == f"(sys {content}!)(usr ?)(ast {content})"
    assert inst().render(messages, False) == f"[I]<<{content}!>> ?[/I] {content} $"


@given(st.text(), st.text(), st.text(), st.booleans())
def test_any_text_passes_through_a_pass_through_format(system, user, assistant, add_generation_prompt):
    format = PromptFormat(
        system="{instruction}", user="{instruction}", assistant="{instruction}", trailing_assistant=""
    )
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
    ]
    assert format.render(messages, add_generation_prompt) == system + user + assistant


def test_other_braces_in_templates_are_text_and_placeholders_may_repeat():
    format = plain(user='{"q": "{instruction}", "again": "{instruction}", "x": {}, "y": {{z}}, {0} %s {system}}')
    assert (
        format.render(chat("u:a{instruction}"), False)
        == '{"q": "a{instruction}", "again": "a{instruction}", "x": {}, "y": {{z}}, {0} %s {system}}'
    )
    twice = inst(user="{system}{instruction}{system}|{instruction}")
    assert twice.render(chat("s:S", "u:U"), False) == "<<S>> U<<S>> |U"


def test_system_placeholder_is_filled_in_user_turns_alone():
    shared = "{system}{instruction};"
    format = PromptFormat(
        system=shared, user=shared, assistant=shared, trailing_assistant="{system}{instruction}", system_in_user=True
    )
    expected = "{system}S;U;{system}A;V;{system}{instruction}"
    assert format.render(chat("s:S", "u:U", "a:A", "u:V")) == expected


def test_texts_that_are_not_templates_are_never_filled():
    format = plain(bos="{instruction}", trailing_assistant="{instruction}", default_system_message="{instruction}")
    assert format.render(chat("u:one")) == "{instruction}(sys {instruction})(usr one){instruction}"


def test_messages_may_be_any_mapping_in_any_sequence():
    messages = tuple(types.MappingProxyType(message) for message in chat("s:s", "u:one"))
    assert plain().render(messages) == "(sys s)(usr one)(ast "


def test_rendering_leaves_the_messages_alone():
    messages = chat("u:one", "s:late")
    plain().render(messages)
    inst().turns([*messages, *chat("a:two")])
    assert messages == chat("u:one", "s:late")


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "empty"),
        ("hello", "list"),
        ({"role": "user", "content": "x"}, "list"),
        (["hello"], "message 0 must be a mapping"),
        ([{"role": "user"}], "needs text"),
        ([{"role": "user", "content": None}], "needs text"),
        ([{"role": "user", "content": 3}], "needs text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "needs text"),
        ([{"content": "x"}], "role None"),
        ([{"role": "User", "content": "x"}], "'User'"),
        ([{"role": "human", "content": "x"}], "system, user, assistant"),
        ([{"role": ["user"], "content": "x"}], "role"),
        ([{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}], "message 1 has role 'tool'"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], "tool_calls"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "tool_calls"),
        ([{"role": "assistant", "content": "x", "weight": 2}], "weight 2"),
        ([{"role": "assistant", "content": "x", "weight": "0"}], "weight '0'"),
        ([{"role": "user", "content": "half an emoji \ud83d"}], "surrogate"),
        (chat("s:one", "u:two", "s:three"), "2 system messages"),
        (chat("s:", "s:", "u:two"), "2 system messages"),
    ],
)
def test_conversations_that_cannot_be_rendered(messages, told):
    for call in (plain().render, plain().turns, inst().render):
        with pytest.raises(ConversationError, match=told) as caught:
            call(messages)
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, InputError)


@pytest.mark.parametrize("messages", [chat("s:lost"), chat("s:lost", "a:answer")])
def test_system_in_user_needs_a_user_turn(messages):
    with pytest.raises(ConversationError, match="no user turn"):
        inst().render(messages)
    with pytest.raises(ConversationError, match="no user turn"):
        inst(default_system_message="D").render(chat("a:answer"))
    assert inst().render(chat("a:answer"), False) == " answer $"


@pytest.mark.parametrize("key", ["system", "user", "assistant", "trailing_assistant"])
def test_the_four_templates_are_required(key):
    with pytest.raises(ValidationError, match=key):
        PromptFormat(**{name: value for name, value in PLAIN.items() if name != key})


@pytest.mark.parametrize("key", ["system", "user", "assistant"])
@pytest.mark.parametrize("value", ["", "no placeholder", "{ instruction }", "{Instruction}", "{}"])
def test_templates_hold_the_instruction(key, value):
    with pytest.raises(ValidationError, match=r"\{instruction\}"):
        plain(**{key: value})


def test_system_in_user_needs_its_placeholder():
    with pytest.raises(ValidationError, match=r"\{system\}"):
        plain(system_in_user=True)
    assert plain(user="{system}|{instruction}").render(chat("s:s", "u:u"), False) == "(sys s){system}|u"


@pytest.mark.parametrize(
    "wrong",
    [
        {"sytem": "{instruction}"},
        {"stopping_sequences": ["x"]},
        {"bos": None},
        {"bos": 1},
        {"user": None},
        {"user": 5},
        {"user": ["{instruction}"]},
        {"trailing_assistant": None},
        {"system_in_user": "yes"},
        {"strip_whitespace": 1},
        {"default_system_message": None},
    ],
)
def test_unknown_keys_and_wrong_types(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        plain(**wrong)


def test_formats_are_frozen_and_comparable():
    format = plain()
    with pytest.raises(ValidationError):
        format.user = "{instruction}"
    assert format == plain()
    assert hash(format) == hash(plain())
    assert format != plain(bos="<s>")
    assert PromptFormat(**format.model_dump()) == format


def turns_of(format: PromptFormat, *messages: str) -> list[tuple[str, str, float]]:
    return [(turn.prompt, turn.completion, turn.weight) for turn in format.turns(chat(*messages))]


def test_the_header_is_given_and_the_end_of_turn_is_learned():
    assert turns_of(plain(bos="<B>"), "s:S", "u:1", "a:2", "u:3", "a:4") == [
        ("<B>(sys S)(usr 1)(ast ", "2)", 1.0),
        ("<B>(sys S)(usr 1)(ast 2)(usr 3)(ast ", "4)", 1.0),
    ]


def test_a_space_that_the_generation_prompt_lacks_is_learned():
    assert turns_of(inst(trailing_assistant=""), "u:1", "a:2") == [("[I]1[/I]", " 2 $", 1.0)]
    assert turns_of(inst(), "u:1", "a:2") == [("[I]1[/I] ", "2 $", 1.0)]


@pytest.mark.parametrize(
    ("assistant", "trailing", "content", "prompt", "completion"),
    [
        ("Answer: {instruction}\n", "Answer:\n", "4", "Answer:", " 4\n"),  # a part of the header is shared
        ("{instruction}</s>", "Answer: ", "4", "", "4</s>"),  # nothing is shared
        ("A:{instruction}", "A: ", " 4", "A: ", "4"),  # content that begins as the generation prompt ends
        ("A: {instruction}", "A: the answer is ", "the answer is 4", "A: the answer is ", "4"),
        ("{instruction}", "", "4", "", "4"),
    ],
)
def test_what_is_learned_is_the_turn_minus_its_common_prefix(assistant, trailing, content, prompt, completion):
    format = plain(assistant=assistant, trailing_assistant=trailing)
    messages = [*chat("u:q"), {"role": "assistant", "content": content}]
    (turn,) = format.turns(messages)
    assert (turn.prompt, turn.completion) == ("(usr q)" + prompt, completion)


def test_turns_carry_the_weight_of_their_message():
    messages = chat("u:1", "a:2", "u:3", "a:4", "u:5", "a:6")
    messages[1]["weight"] = 0
    messages[3]["weight"] = 1
    messages[5]["weight"] = None  # what a missing value is in a Parquet file
    assert [turn.weight for turn in plain().turns(messages)] == [0.0, 1.0, 1.0]
    assert plain().render(messages) == plain().render(chat("u:1", "a:2", "u:3", "a:4", "u:5", "a:6"))


def test_no_assistant_message_no_turns():
    assert plain().turns(chat("s:s", "u:1")) == []


def test_a_turn_is_a_prefix_of_the_rendered_conversation(prompt_format):
    messages = chat("s:rules", "u:1", "a:two", "u:3", "a:four")
    first, second = prompt_format.turns(messages)
    assert second.prompt + second.completion == prompt_format.render(messages, False)
    assert first.prompt + first.completion == prompt_format.render(messages[:3], False)
    assert first.prompt == prompt_format.render(messages[:2])
    assert second.prompt == prompt_format.render(messages[:4])


CONVERSATION = chat("s:Be brief.", "u:Hi!", "a:Hello.", "u:Bye.")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] Be brief.\n\nHi! [/INST] Hello.</s>[INST] Bye. [/INST]"),
        (
            "gemma2",
            "<bos><start_of_turn>user\nBe brief.\n\nHi!<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
            "<start_of_turn>user\nBye.<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
            "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("llama_guard2", "Be brief.Hi!Hello.<|eot_id|>Bye."),
    ],
)
def test_formats_of_published_models(name, expected):
    assert PromptFormat(**PROMPT_FORMATS[name]).render(CONVERSATION) == expected
