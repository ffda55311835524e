"""Published chat templates: which of them plain templates can express, and what of reasoning and tools is trained."""

import json

import pytest

from conftest import PROMPT_FORMATS
from llmforge.errors import ConversationError
from llmforge.prompt import Encoder, PromptFormat, build_format
from llmforge.prompt.adversary import random_conversations
from llmforge.prompt.infer import infer_format
from test_prompt_real_tokenizers import NAMES, load
from test_prompt_reasoning import (
    ANSWER,
    ARGUMENTS,
    FOLLOW_UP,
    QUESTION,
    RESULT,
    THOUGHT,
    TOOL,
    calling,
    check_prompts,
    samples_of,
)

pytestmark = pytest.mark.real_tokenizers


@pytest.fixture(scope="module", params=NAMES)
def named(request):
    """A tokenizer's name and itself; one at a time is in memory."""
    return request.param, load(request.param)


def test_what_can_be_inferred_of_published_templates(named):
    name, tokenizer = named
    inference = infer_format(tokenizer)
    if name in ("llama3", "llama3_1"):
        assert inference.format == PromptFormat(**PROMPT_FORMATS["llama3"])
        assert inference.conversations == 300
        assert inference.stopping_sequences == ("<|eot_id|>",)
        assert any("always ends in" in remark for remark in inference.remarks) == (name == "llama3")
        return
    assert inference.format is None
    if name == "gemma3":
        (reason,) = inference.reasons
        assert "(system: no, user: yes, assistant: yes)" in reason
    if name == "qwen3":
        dropped, inserted = inference.reasons
        assert "<think>…</think> is dropped from earlier assistant turns" in dropped
        assert "an empty block '<think>\\n\\n</think>\\n\\n' is written in front of the last assistant turn" in inserted
        assert any("enable_thinking" in remark for remark in inference.remarks)
        assert any(remark.startswith("tools:") for remark in inference.remarks)


def test_open_messages_are_what_transformers_makes_of_them(named):
    _, tokenizer = named
    encoder = Encoder(tokenizer, build_format(None, tokenizer))
    compared = 0
    for messages in random_conversations(120, 8, orderly=True):
        if messages[-1]["role"] != "assistant":
            continue
        try:
            theirs = tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
        except ValueError:  # the template changes the text that is to be continued
            with pytest.raises(ConversationError):
                encoder.encode_prompt(messages, continue_final_message=True)
            continue
        assert encoder.encode_prompt(messages, continue_final_message=True) == theirs
        compared += 1
    assert compared > 25


def test_qwen_3_learns_to_think_and_to_call():
    tokenizer = load("qwen3")
    encoder = Encoder(tokenizer, build_format(None, tokenizer))
    call = calling(json.dumps(ARGUMENTS), reasoning_content="look it up")
    messages = [QUESTION, call, RESULT, {**ANSWER, "reasoning_content": "so it is"}, FOLLOW_UP, ANSWER]
    check_prompts(encoder, messages, tools=[TOOL])
    samples = samples_of(encoder, messages, tools=[TOOL])
    assert "".join(trained for _, trained in samples) == (
        "<think>\nlook it up\n</think>\n\n"
        '<tool_call>\n{"name": "look_up", "arguments": {"word": "café", "times": 2}}\n</tool_call><|im_end|>\n'
        "<think>\nso it is\n</think>\n\n24<|im_end|>\n"
        "<think>\n\n</think>\n\n24<|im_end|>\n"
    )
    # Within one question the thinking stays; the next question drops all of it.
    assert len(samples) == 2
    assert "look it up" in samples[0][0]
    assert "look it up" not in samples[1][0]
    assert all("# Tools" in text and "<tool_response>\na place" in text for text, _ in samples)


def test_qwen_3_takes_thinking_from_the_content_too():
    tokenizer = load("qwen3")
    encoder = Encoder(tokenizer, build_format(None, tokenizer))
    for content in (THOUGHT["content"], "<think>half of it</think>24"):
        ((_, trained),) = samples_of(encoder, [QUESTION, {"role": "assistant", "content": content}])
        assert trained == "<think>\nhalf of it\n</think>\n\n24<|im_end|>\n"


@pytest.mark.parametrize("name", ["llama3", "llama3_1", "gemma3"])
def test_what_older_templates_leave_out_is_said(name):
    tokenizer = load(name)
    encoder = Encoder(tokenizer, build_format(None, tokenizer))
    with pytest.raises(ConversationError, match="leaves out the assistant's reasoning"):
        samples_of(encoder, [QUESTION, {**ANSWER, "reasoning_content": "half of it"}])
    with pytest.raises(ConversationError, match="has tools, of which the chat template writes nothing"):
        samples_of(encoder, [QUESTION, ANSWER], tools=[TOOL])
