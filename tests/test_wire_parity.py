"""The prompts of training rows, sent over HTTP, reach the model id for id as they stand in the training samples."""

import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import chat_templates
from conftest import PROMPT_FORMATS, build_tokenizer, random_conversation
from http_server import served
from llmforge.data.conversation import checked_messages
from llmforge.data.rows import BadRow
from llmforge.errors import ConversationError
from llmforge.prompt import Encoder, PromptFormat, StopRules, build_format
from llmforge.serve.model import ServedModel
from scripted_engine import ScriptedEngine

ROWS = 25
TEMPLATES = (
    "CHATML",
    "CHATML_WITH_DEFAULT_SYSTEM",
    "HEADERS_TRIMMED",
    "HEADERS_ALWAYS_ASKING",
    "FIXED_DATE",
    "SYSTEM_IN_FIRST_USER",
    "NO_SYSTEM",
    "EOS_BEHIND_LAST",
    "THINKING",
    "REASONING_AND_TOOLS",
)
TOOLS = [{"type": "function", "function": {"parameters": {"type": "object"}, "name": "f", "x-more": [1, None]}}]
CALL = {"function": {"arguments": '{"b": "é", "a": 1.0}', "name": "f"}, "type": "function", "id": "call_1"}


def encoder_of(name: str) -> Encoder:
    if name in PROMPT_FORMATS:
        return Encoder(build_tokenizer(), PromptFormat(**PROMPT_FORMATS[name]))
    tokenizer = build_tokenizer(eos="<|im_end|>", chat_template=getattr(chat_templates, name))
    return Encoder(tokenizer, build_format(None, tokenizer))


@pytest.fixture(scope="module", params=[*PROMPT_FORMATS, *TEMPLATES])
def wire(request: pytest.FixtureRequest) -> Iterator[tuple[httpx.Client, ScriptedEngine, Encoder]]:
    encoder = encoder_of(request.param)
    engine = ScriptedEngine(lambda request: [5], context_length=2**20)
    model = ServedModel("tiny", "/x", 1, encoder, StopRules.derive(encoder, [], []), engine)
    with served(model) as url, httpx.Client(base_url=url) as client:
        yield client, engine, encoder


def trained_prompts(encoder: Encoder, row: dict[str, Any]) -> list[list[int]] | None:
    """Give the prompt of each assistant turn as it stands in the training samples; None if training refuses the row."""
    try:
        checked_messages(row["messages"], has_tools="tools" in row, needs_assistant=True)
    except BadRow:
        return None
    (samples,) = encoder.explain([row], "assistant")
    if isinstance(samples, ConversationError):
        return None
    prompts = []
    for pieces in samples:
        ids: list[int] = []
        for piece in pieces:
            ids = ids + piece.input_ids
            if piece.reason == "prompt":
                prompts.append(ids)
    return prompts


def rows() -> Iterator[dict[str, Any]]:
    rng = random.Random(5)
    for _ in range(ROWS):
        yield {"messages": random_conversation(rng)}
    question, result = {"role": "user", "content": "f?"}, {"role": "tool", "tool_call_id": "call_1", "content": "9"}
    answer = {"role": "assistant", "content": "Nine."}
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    yield {"messages": [question, calling, result, answer], "tools": TOOLS}
    yield {"messages": [question, {**answer, "weight": 0}, question, {**answer, "reasoning_content": "Hm."}]}


def test_prompts_of_training_rows_are_fed_id_for_id(wire: tuple[httpx.Client, ScriptedEngine, Encoder]) -> None:
    client, engine, encoder = wire
    compared = 0
    for row in rows():
        prompts = trained_prompts(encoder, row)
        if prompts is None:
            continue
        turns = [place for place, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        assert len(turns) == len(prompts)
        for place, prompt in zip(turns, prompts, strict=True):
            before = row["messages"][:place]
            if isinstance(encoder.format, PromptFormat):  # it writes the system message in front, wherever it stands
                before = before + [message for message in row["messages"][place:] if message["role"] == "system"]
            if not any(message["role"] == "user" for message in before):
                continue  # nothing is asked yet
            body = {"messages": before} | ({"tools": row["tools"]} if "tools" in row else {})
            shown = client.post("/tokenize", json=body).json()
            assert shown["tokens"] == prompt
            assert shown["count"] == len(prompt)
            assert client.post("/v1/chat/completions", json={**body, "max_tokens": 1}).status_code == 200
            assert list(engine.tickets[-1].request.prompt_ids) == prompt
            compared += 1
    assert compared >= 10


def test_what_training_refuses_the_wire_refuses(wire: tuple[httpx.Client, ScriptedEngine, Encoder]) -> None:
    client, _, encoder = wire
    user, system = {"role": "user", "content": "x"}, {"role": "system", "content": "y"}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    for before in ([system, system, user], [{**user, "content": ""}], [user, call, user], [system, user, call, user]):
        row = {"messages": [*before, {"role": "assistant", "content": "z"}]}
        is_trained = trained_prompts(encoder, row) is not None
        for path in ("/tokenize", "/v1/chat/completions"):
            response = client.post(path, json={"messages": before})
            assert response.status_code == (200 if is_trained else 400), (before, response.text)
            assert is_trained or response.json()["error"]["param"] == "messages"
