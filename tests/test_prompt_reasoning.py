"""Chat templates of thinking and tool-calling models: what is trained is what a server would ask for, turn by turn."""

import json

import pytest

import chat_templates
from conftest import PROMPT_FORMATS, build_tokenizer
from llmforge.errors import ConversationError
from llmforge.prompt import ChatTemplate, Encoder, PromptFormat, compile_to_jinja
from llmforge.prompt.adversary import random_conversations

QUESTION = {"role": "user", "content": "48/2?"}
THOUGHT = {"role": "assistant", "content": "<think>\nhalf of it\n</think>\n\n24"}
FOLLOW_UP = {"role": "user", "content": "72/3?"}
ANSWER = {"role": "assistant", "content": "24"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
ARGUMENTS = {"word": "café", "times": 2}
RESULT = {"role": "tool", "content": "a place", "tool_call_id": "call00001"}


def calling(arguments, content=None, **more) -> dict:
    function = {"name": "look_up", "arguments": arguments}
    call = {"id": "call00001", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def encoder_for(name: str, tokenizer) -> Encoder:
    return Encoder(tokenizer, ChatTemplate(getattr(chat_templates, name), tokenizer, from_tokenizer=False))


def samples_of(encoder: Encoder, messages, **row) -> list[tuple[str, str]]:
    """Give each sample's text and its trained text."""
    (result,) = encoder.encode_conversations([{"messages": messages, **row}], "assistant")
    if isinstance(result, ConversationError):
        raise result
    return [
        (
            encoder.decode(sample.input_ids),
            encoder.decode([t for t, weight in zip(sample.input_ids, sample.loss_weights, strict=True) if weight]),
        )
        for sample in result
    ]


def check_prompts(encoder: Encoder, messages, **row) -> None:
    """Check that each trained turn stands behind the ids that transformers renders for its prompt."""
    (samples,) = encoder.explain([{"messages": messages, **row}], "assistant")
    assert not isinstance(samples, ConversationError), samples
    answers = iter(index for index, message in enumerate(messages) if message["role"] == "assistant")
    for pieces in samples:
        before = []
        for piece in pieces:
            if piece.reason == "trained":
                served = encoder.tokenizer.apply_chat_template(
                    encoder.format._visible(messages[: next(answers)]),
                    chat_template=encoder.format.source,
                    tools=row.get("tools"),
                    add_generation_prompt=True,
                    return_dict=False,
                )
                assert before == served
            before += piece.input_ids
    assert next(answers, None) is None


def test_dropped_thinking_is_unrolled(tokenizer):
    encoder = encoder_for("THINKING", tokenizer)
    messages = [QUESTION, THOUGHT, FOLLOW_UP, ANSWER]
    (first, first_trained), (second, second_trained) = samples_of(encoder, messages)
    assert first_trained == "<think>\nhalf of it\n</think>\n\n24<|im_end|>\n"
    assert second_trained == "24<|im_end|>\n"
    assert "half of it" in first
    assert "half of it" not in second
    check_prompts(encoder, messages)
    # Nothing is rewritten where nothing was thought: one sample.
    assert len(samples_of(encoder, [QUESTION, ANSWER, FOLLOW_UP, ANSWER])) == 1


def test_thinking_that_the_prompt_opens_is_trained_behind_it(tokenizer):
    encoder = encoder_for("THINKING_OPENED", tokenizer)
    messages = [QUESTION, THOUGHT, FOLLOW_UP, {"role": "assistant", "content": "<think>a third</think>24"}]
    (first, first_trained), (second, second_trained) = samples_of(encoder, messages)
    assert first_trained == "half of it\n</think>\n\n24</s>"
    assert first.endswith("<think>\nhalf of it\n</think>\n\n24</s>")
    assert second_trained == "a third</think>24</s>"
    assert "half of it" not in second
    check_prompts(encoder, messages)
    with pytest.raises(ConversationError, match="opens <think>, and this answer does not think"):
        samples_of(encoder, [QUESTION, ANSWER])


def test_white_space_around_thinking_is_the_templates_affair(tokenizer):
    source = chat_templates.THINKING.replace(
        "{%- set content = message.content %}",
        "{%- set content = message.content | replace('<think>', '<think>\\n') %}",
    )
    encoder = Encoder(tokenizer, ChatTemplate(source, tokenizer, from_tokenizer=False))
    ((_, trained),) = samples_of(encoder, [QUESTION, {"role": "assistant", "content": "<think>hm</think>24"}])
    assert trained == "<think>\nhm</think>24<|im_end|>\n"


def test_reasoning_content_is_trained_where_the_template_writes_it(tokenizer):
    messages = [QUESTION, {**ANSWER, "reasoning_content": "half of it"}, FOLLOW_UP, {**ANSWER, "reasoning": "a third"}]
    encoder = encoder_for("REASONING_AND_TOOLS", tokenizer)
    (_, first), (second, second_trained) = samples_of(encoder, messages)
    assert first == "<think>\nhalf of it\n</think>\n\n24<|im_end|>\n"
    assert second_trained == "<think>\na third\n</think>\n\n24<|im_end|>\n"
    assert "half of it" not in second
    check_prompts(encoder, messages)
    with pytest.raises(ConversationError, match="leaves out the assistant's reasoning"):
        samples_of(encoder_for("CHATML", tokenizer), messages)
    with pytest.raises(ConversationError, match="has reasoning_content, which plain templates cannot express"):
        PromptFormat(**PROMPT_FORMATS["chatml"]).render(messages)


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS), json.dumps(ARGUMENTS, ensure_ascii=False)])
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("REASONING_AND_TOOLS", '<tool_call>look_up {"word": "café", "times": 2}</tool_call>'),
        ("ARGUMENTS_AS_MAPPING", 'look_up(word="café";times=2;)'),
        ("ARGUMENTS_TO_JSON", 'look_up({"word": "café", "times": 2})'),
    ],
)
def test_arguments_reach_the_template_as_it_wants_them(name, written, arguments, tokenizer):
    """OpenAI's rows hold a JSON string; most templates want a mapping, and would quote a string a second time."""
    encoder = encoder_for(name, tokenizer)
    messages = [QUESTION, calling(arguments), RESULT, ANSWER]
    texts = samples_of(encoder, messages)
    assert "".join(trained for _, trained in texts) == f"{written}<|im_end|>\n24<|im_end|>\n"
    check_prompts(encoder, messages)


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS, ensure_ascii=False)])
def test_arguments_reach_a_template_that_pastes_them_as_text(arguments, tokenizer):
    encoder = encoder_for("ARGUMENTS_AS_TEXT", tokenizer)
    ((_, trained),) = samples_of(encoder, [QUESTION, calling(arguments)])
    assert trained == 'look_up(<{"word": "café", "times": 2}>)<|im_end|>\n'


def test_arguments_that_are_no_json_object_stay_as_they_are(tokenizer):
    encoder = encoder_for("REASONING_AND_TOOLS", tokenizer)
    ((_, trained),) = samples_of(encoder, [QUESTION, calling("not JSON")])
    assert trained == "<tool_call>look_up not JSON</tool_call><|im_end|>\n"


def test_absent_content_is_given_as_the_template_can_take_it(tokenizer):
    """A template that joins content with other text cannot do without, one that asks for it must be told."""
    joins = chat_templates.REASONING_AND_TOOLS.replace("message.content or ''", "message.content")
    joins = joins.replace("{{- message.content }}", "{{- '' + message.content }}")
    asks = chat_templates.REASONING_AND_TOOLS.replace(
        "{{- message.content or '' }}", "{{- message.content if message.content is defined else '(none)' }}"
    )
    for source, begin in ((joins, ""), (asks, "(none)")):
        encoder = Encoder(tokenizer, ChatTemplate(source, tokenizer, from_tokenizer=False))
        ((_, trained),) = samples_of(encoder, [QUESTION, calling(ARGUMENTS)])
        assert trained.startswith(begin + "<tool_call>look_up")


def test_thoughts_that_are_put_back_do_not_hide_a_call_that_is_lost(tokenizer):
    encoder = encoder_for("THINKING_OPENED", tokenizer)
    with pytest.raises(ConversationError, match="leaves out the assistant's call of look_up"):
        samples_of(encoder, [QUESTION, calling(ARGUMENTS, "<think>\nhm\n</think>\n\nhello")])


def test_thoughts_without_line_breaks_follow_an_opened_tag(tokenizer):
    """The template keeps the content, whose tag is not followed by the line break of the generation prompt."""
    source = chat_templates.CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    encoder = Encoder(tokenizer, ChatTemplate(source, tokenizer, from_tokenizer=False))
    ((text, trained),) = samples_of(encoder, [QUESTION, {"role": "assistant", "content": "<think>hm</think>yes"}])
    assert text.endswith("<|im_start|>assistant\n<think>\nhm</think>yes<|im_end|>\n")
    assert trained == "hm</think>yes<|im_end|>\n"


@pytest.mark.parametrize("answer", ["yes", "<b>yes</b>"])
def test_answers_without_thoughts_are_learned_behind_the_empty_one_that_asks_for_them(answer):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|channel>", "<channel|>", "<think>", "</think>"])
    messages = [QUESTION, {"role": "assistant", "content": answer}, QUESTION, {"role": "assistant", "content": "no"}]

    encoder = encoder_for("EMPTY_THOUGHT", tokenizer)
    check_prompts(encoder, messages)
    first, second = samples_of(encoder, messages)
    assert first[0].endswith(f"<start_of_turn>assistant\n<|channel>thought\n<channel|>{answer}<end_of_turn>\n")
    assert second[0].count("<|channel>") == 1
    assert [trained for _, trained in (first, second)] == [f"{answer}<end_of_turn>\n", "no<end_of_turn>\n"]

    encoder = encoder_for("CLOSED_THOUGHT", tokenizer)
    check_prompts(encoder, messages)
    assert [trained for _, trained in samples_of(encoder, messages)] == [
        f"</think>{answer}<end_of_turn>",
        "</think>no<end_of_turn>",
    ]
    # What thinks after all is not learned behind a thought that is over.
    thinking = {"role": "assistant", "content": "<|channel>thought\nhm<channel|>yes"}
    with pytest.raises(ConversationError, match="does not write this conversation as it continues it"):
        samples_of(encoder_for("EMPTY_THOUGHT", tokenizer), [QUESTION, thinking])


def test_the_key_that_a_template_reads_thoughts_from_is_named(tokenizer):
    source = chat_templates.CHATML.replace("+ message['content']", "+ (message.reasoning or '') + message['content']")
    encoder = Encoder(tokenizer, ChatTemplate(source, tokenizer, from_tokenizer=False))
    with pytest.raises(ConversationError, match="put it into reasoning, which the template reads"):
        samples_of(encoder, [QUESTION, {"role": "assistant", "content": "yes", "reasoning_content": "hm"}])


def test_a_template_that_writes_no_calls_is_said_to_leave_them_out(tokenizer):
    encoder = encoder_for("HEADERS_TRIMMED", tokenizer)
    with pytest.raises(ConversationError, match="leaves out the assistant's call of look_up"):
        samples_of(encoder, [QUESTION, calling(ARGUMENTS)])


def test_content_may_be_left_out_beside_calls(tokenizer):
    """As in OpenAI's API, where the key is optional then."""
    encoder = encoder_for("REASONING_AND_TOOLS", tokenizer)
    with_null = [QUESTION, calling(ARGUMENTS), RESULT, ANSWER]
    without = [{key: value for key, value in message.items() if value is not None} for message in with_null]
    assert "content" not in without[1]
    assert samples_of(encoder, without, tools=[TOOL]) == samples_of(encoder, with_null, tools=[TOOL])
    with pytest.raises(ConversationError, match="continue_final_message needs"):
        encoder.encode_prompt(without[:2], [TOOL], continue_final_message=True)


def test_tools_are_part_of_the_prompt(tokenizer):
    encoder = encoder_for("REASONING_AND_TOOLS", tokenizer)
    messages = [QUESTION, calling(json.dumps(ARGUMENTS), reasoning_content="let me see"), RESULT, ANSWER]
    check_prompts(encoder, messages, tools=[TOOL])
    ((text, trained),) = samples_of(encoder, messages, tools=[TOOL])
    assert text.startswith("<|im_start|>system\nTools: {")
    assert "look_up" in text
    assert "<tool_response>a place" in text
    assert "a place" not in trained
    assert trained.startswith("<think>\nlet me see\n</think>\n\n<tool_call>look_up")


def test_what_a_template_leaves_out_is_said(tokenizer):
    silent = chat_templates.CHATML.replace("message['content'] +", "(message['content'] or '') +")
    encoder = Encoder(tokenizer, ChatTemplate(silent, tokenizer, from_tokenizer=False))
    with pytest.raises(ConversationError, match="leaves out the assistant's call of look_up"):
        samples_of(encoder, [QUESTION, calling(ARGUMENTS, content="Wait.")])
    with pytest.raises(ConversationError, match="has tools, of which the chat template writes nothing"):
        samples_of(encoder, [QUESTION, ANSWER], tools=[TOOL])


def test_generation_marks_agree_with_transformers(tokenizer):
    """transformers is the oracle: a mask of what stands between the marks."""
    encoder = encoder_for("MARKED", tokenizer)
    rows = [
        {"messages": messages}
        for messages in random_conversations(150, 3, orderly=True)
        if any(message["role"] == "assistant" for message in messages)
    ]
    for row, samples in zip(rows, encoder.encode_conversations(rows, "assistant"), strict=True):
        while row["messages"][-1]["role"] != "assistant":
            row["messages"].pop()
        theirs = tokenizer.apply_chat_template(
            row["messages"],
            chat_template=encoder.format.source,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        (sample,) = samples
        assert sample.input_ids == theirs["input_ids"]
        assert [bool(weight) for weight in sample.loss_weights] == [bool(mask) for mask in theirs["assistant_masks"]]


@pytest.mark.parametrize("space", ["", "-"])
def test_a_turn_ends_with_its_mark(space, tokenizer):
    """What a template writes behind the mark is the next turn's: seen, but not trained."""
    source = chat_templates.MARKED.replace(
        "{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}",
        "{{- message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}",
    ).replace("{%- generation %}", f"{{%{space} generation %}}")
    assert source != chat_templates.MARKED
    encoder = Encoder(tokenizer, ChatTemplate(source, tokenizer, from_tokenizer=False))
    ((text, trained),) = samples_of(encoder, [QUESTION, ANSWER, FOLLOW_UP, ANSWER])
    assert trained == "24<|im_end|>24<|im_end|>"
    assert text.endswith("24<|im_end|>\n<|im_start|>user\n72/3?<|im_end|>\n<|im_start|>assistant\n24<|im_end|>")


def test_headers_inside_a_mark_are_the_servers_part(tokenizer):
    source = chat_templates.MARKED.replace("{%- if message.role == 'assistant' %}\n", "{%- if false %}\n").replace(
        "{{- message.content + '<|im_end|>\\n' }}\n",
        "{%- generation %}{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}\n",
    )
    encoder = Encoder(tokenizer, ChatTemplate(source, tokenizer, from_tokenizer=False))
    ((_, trained),) = samples_of(encoder, [QUESTION, ANSWER, FOLLOW_UP, ANSWER])
    assert trained == "24<|im_end|>\n24<|im_end|>\n"


CONTINUED = ["CHATML", "HEADERS_TRIMMED", "HEADERS_ALWAYS_ASKING", "LLAMA_2", "THINKING", "REASONING_AND_TOOLS"]


def ending_open(count: int, seed: int) -> list[list[dict]]:
    drawn = random_conversations(count, seed, orderly=True)
    return [messages for messages in drawn if messages[-1]["role"] == "assistant"]


@pytest.mark.parametrize("name", CONTINUED)
def test_an_open_message_is_what_transformers_makes_of_it(name, tokenizer):
    encoder = encoder_for(name, tokenizer)
    compared = 0
    for messages in ending_open(200, 5):
        try:
            theirs = tokenizer.apply_chat_template(
                messages, chat_template=encoder.format.source, continue_final_message=True, return_dict=False
            )
        except ValueError:
            with pytest.raises(ConversationError):
                encoder.encode_prompt(messages, continue_final_message=True)
            continue
        assert encoder.encode_prompt(messages, continue_final_message=True) == theirs
        compared += 1
    assert compared > 80


@pytest.mark.parametrize("strip", [True, False])
def test_an_open_message_of_plain_templates_is_what_the_compiled_template_gives(prompt_format, strip, tokenizer):
    for end in (None, " {instruction} </s>", "{instruction}"):
        changes = {"strip_whitespace": strip} | ({"assistant": end} if end else {})
        format = PromptFormat(**prompt_format.model_dump() | changes)
        encoder, template = Encoder(tokenizer, format), compile_to_jinja(format)
        for messages in ending_open(60, 6):
            assert encoder.encode_prompt(messages, continue_final_message=True) == tokenizer.apply_chat_template(
                messages, chat_template=template, continue_final_message=True, return_dict=False
            )


@pytest.mark.parametrize("messages", [[QUESTION], [QUESTION, ANSWER, FOLLOW_UP], [QUESTION, calling(ARGUMENTS)]])
def test_only_text_of_the_assistant_can_be_continued(messages, tokenizer):
    for format in (PromptFormat(**PROMPT_FORMATS["chatml"]), encoder_for("REASONING_AND_TOOLS", tokenizer).format):
        with pytest.raises(ConversationError, match="continue_final_message needs a last message of the assistant"):
            Encoder(tokenizer, format).encode_prompt(messages, continue_final_message=True)
