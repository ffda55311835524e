"""The server on the wire: its endpoints through clients that nobody here wrote, over real HTTP.

What the engine says is scripted, so that every answer, every count and every place in a stream is known.
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient

from chat_templates import CHATML, REASONING_AND_TOOLS
from conftest import PROMPT_FORMATS, build_tokenizer
from http_server import served
from llmforge.errors import InputError
from llmforge.prompt import Encoder, PromptFormat, StopRules, build_format
from llmforge.serve.door import Settings
from llmforge.serve.model import ServedModel
from llmforge.serve.requests import Request
from llmforge.serve.server import take_port
from scripted_engine import ScriptedEngine

HELLO = [{"role": "user", "content": "Hello?"}]
ANSWER = "The capital of France is Paris. naïve 你好 👩‍👩‍👧"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass
class Served:
    """A served model, and how to make it speak and listen."""

    url: str
    engine: ScriptedEngine
    model: ServedModel

    def says(self, *texts: str, ends: bool = True) -> None:
        """Have requests answered with texts in turn, each followed by the end of turn if it `ends`."""
        tokenizer = self.model.encoder.tokenizer
        ids = [tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * ends for text in texts]
        self.engine.script = lambda request: ids[(len(self.engine.tickets) - 1) % len(ids)]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def chat(self, **fields: Any) -> Any:
        return self.client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **fields})

    def post(self, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
        body = {"messages": HELLO, **fields} if path == "/v1/chat/completions" else fields
        return httpx.post(self.url + path, json={"model": "tiny", **body})

    @property
    def asked(self) -> Request:
        """What the engine was asked last."""
        return self.engine.tickets[-1].request


@contextmanager
def serving(encoder: Encoder, *stops: str, settings: Settings | None = None, **engine: Any) -> Iterator[Served]:
    scripted = ScriptedEngine(lambda request: [], **{"context_length": 512, **engine})
    model = ServedModel("tiny", "/runs/tiny", 1700000000, encoder, StopRules.derive(encoder, stops, []), scripted)
    with served(model, settings) as url:
        yield Served(url, scripted, model)


def chatml(template: str = CHATML) -> Encoder:
    tokenizer = build_tokenizer(eos="<|im_end|>", chat_template=template)
    return Encoder(tokenizer, build_format(None, tokenizer))


@pytest.fixture(scope="module")
def tiny() -> Iterator[Served]:
    with serving(chatml()) as server:
        yield server


@pytest.fixture(autouse=True)
def _answer(tiny: Served) -> None:
    tiny.says(ANSWER)
    tiny.engine.tickets.clear()
    tiny.engine.pause = 0.0


def streamed(chunks: Any) -> tuple[str, list[str | None]]:
    """Join the text of a stream's only choice; give it with the finish reasons."""
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join(choice.delta.content or "" for choice in choices), [choice.finish_reason for choice in choices]


# The clients


def test_the_openai_client_chats(tiny: Served) -> None:
    completion = tiny.chat()
    assert re.fullmatch(r"chatcmpl-\w{32}", completion.id)
    assert (completion.object, completion.model, completion.system_fingerprint) == ("chat.completion", "tiny", None)
    assert abs(completion.created - time.time()) < 60
    (choice,) = completion.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", ANSWER)
    assert (choice.finish_reason, choice.logprobs, choice.message.tool_calls) == ("stop", None, None)
    answer = len(tiny.model.encoder.encode_text(ANSWER)) + 1  # the end of the turn is generated, too
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(tiny.asked.prompt_ids), answer)
    assert completion.usage.total_tokens == len(tiny.asked.prompt_ids) + answer


def test_the_openai_client_streams(tiny: Served) -> None:
    chunks = list(tiny.chat(stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == tiny.chat().usage
    text, finishes = streamed(chunks)
    assert text == ANSWER
    assert finishes == [None] * (len(finishes) - 1) + ["stop"]
    assert len(finishes) > 10  # piece by piece
    assert not any(chunk.usage for chunk in tiny.chat(stream=True))


def test_the_asynchronous_client_has_many_streams_at_once(tiny: Served) -> None:
    tiny.engine.pause = 0.002

    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client) for _ in range(32)))

    assert asyncio.run(ask_all()) == [ANSWER] * 32


def test_curl_chats_and_streams(tiny: Served) -> None:
    def curl(*options: str, **fields: Any) -> str:
        body = json.dumps({"model": "tiny", "messages": HELLO, **fields})
        command = ["curl", "-sS", f"{tiny.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
        return subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout

    assert json.loads(curl())["choices"][0]["message"]["content"] == ANSWER
    *events, end = [line.removeprefix("data: ") for line in curl("-N", stream=True).split("\n\n") if line]
    assert end == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events) == ANSWER


def test_the_hub_client_chats_and_streams(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it is for the hub, not for this machine
    client = InferenceClient(base_url=f"{tiny.url}/v1", api_key="none")
    completion = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=400, seed=3, logprobs=True)
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].logprobs.content[0].token == "The"
    assert streamed(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))[0] == ANSWER


def test_the_llm_program_chats(tiny: Served, tmp_path: Any) -> None:
    settings = {"model_id": "served", "model_name": "tiny", "api_base": f"{tiny.url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([settings]))
    for options in ([], ["--no-stream", "-o", "temperature", "0.5", "-o", "max_tokens", "64"]):
        done = subprocess.run(
            [sys.executable, "-m", "llm", "prompt", "-m", "served", "-n", "Hello?", *options],
            env={**os.environ, "LLM_USER_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.strip() == ANSWER, done.stderr
    assert (tiny.asked.sampling.temperature, tiny.asked.sampling.max_tokens) == (0.5, 64)


# What the fields mean


def test_fields_reach_the_engine(tiny: Served) -> None:
    tiny.chat(
        temperature=0.7,
        top_p=0.9,
        seed=11,
        max_completion_tokens=33,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"7": -100, "9": 2.5},
        user="somebody",
        metadata={"run": "1"},
        extra_body={"top_k": 12, "min_p": 0.05, "repetition_penalty": 1.2},
    )
    sampling = tiny.asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 12, 0.05)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.2)
    assert (sampling.seed, sampling.max_tokens, dict(sampling.logit_bias)) == (11, 33, {7: -100, 9: 2.5})
    assert (sampling.logprobs, sampling.grammar, sampling.ignore_stops) == (None, None, False)
    tiny.chat(extra_body={"top_k": -1, "ignore_eos": True}, max_tokens=5)
    assert (tiny.asked.sampling.top_k, tiny.asked.sampling.ignore_stops) == (0, True)


def test_null_is_not_given(tiny: Served) -> None:
    names = "temperature top_p n seed stop max_tokens logprobs tools tool_choice response_format stream_options"
    response = tiny.post(**dict.fromkeys(names.split()))
    assert response.status_code == 200
    assert tiny.asked.sampling == tiny.model.sampling(max_tokens=512 - len(tiny.asked.prompt_ids))


def test_n_answers_have_seeds_of_their_own(tiny: Served) -> None:
    tiny.says("one", "two", "three")
    completion = tiny.chat(n=3, seed=2**63 - 1)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert [choice.message.content for choice in completion.choices] == ["one", "two", "three"]
    assert [ticket.request.sampling.seed for ticket in tiny.engine.tickets] == [2**63 - 1, 0, 1]
    assert completion.usage.prompt_tokens == len(tiny.asked.prompt_ids)  # counted once
    texts = {0: "", 1: "", 2: ""}
    for chunk in tiny.chat(n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "one", 1: "two", 2: "three"}


def test_answers_that_reach_their_length_say_so(tiny: Served) -> None:
    completion = tiny.chat(max_tokens=3)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 3
    assert streamed(tiny.chat(max_tokens=3, stream=True))[1][-1] == "length"


@pytest.mark.parametrize("stop", ["Paris", ["absent", " is Par"], ["France is"], "ïve 你", "👩‍👧"])
def test_stop_ends_answers_and_shows_nothing_of_itself(tiny: Served, stop: str | list[str]) -> None:
    first = min(ANSWER.find(each) for each in ([stop] if isinstance(stop, str) else stop) if each in ANSWER)
    completion = tiny.chat(stop=stop)
    assert completion.choices[0].message.content == ANSWER[:first]
    assert completion.choices[0].finish_reason == "stop"
    text, finishes = streamed(tiny.chat(stop=stop, stream=True))
    assert (text, finishes[-1]) == (ANSWER[:first], "stop")


def test_a_stop_string_that_is_ordinary_text_never_leaks(tiny: Served) -> None:
    # Under a tokenizer of Llama 3, `</s>` is no token: it comes in pieces, with which harmless text begins, too.
    tokenizer = build_tokenizer(eos="<|eot_id|>")
    format = PromptFormat(**{**PROMPT_FORMATS["llama3"], "assistant": "{instruction}</s>"})
    with serving(Encoder(tokenizer, format), "</s>") as server:
        pieces = [
            tokenizer(piece, add_special_tokens=False).input_ids for piece in ("a ", "<", "/", "b <", "/", "s", ">")
        ]
        server.engine.script = lambda request: [*itertools.chain(*pieces), tokenizer.eos_token_id]
        for fields in ({"stream": True}, {"stream": True, "extra_body": {"top_k": 3}}):
            chunks = list(server.chat(**fields))
            assert streamed(chunks)[0] == "a </b "
            assert not any((chunk.choices[0].delta.content or "")[-1:] == "<" for chunk in chunks)
        assert server.chat().choices[0].message.content == "a </b "


def test_logprobs_have_openais_shape(tiny: Served) -> None:
    completion = tiny.chat(logprobs=True, top_logprobs=2)
    told = completion.choices[0].logprobs.content
    ids = tiny.model.encoder.encode_text(ANSWER)
    assert len(told) == len(ids)
    assert b"".join(bytes(token.bytes) for token in told).decode() == ANSWER
    assert all(token.logprob == -0.5 for token in told)
    assert [[other.logprob for other in token.top_logprobs] for token in told] == [[-0.5, -1.5]] * len(ids)
    assert told[0].token == "The"
    assert tiny.chat(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    chunks = list(tiny.chat(logprobs=True, top_logprobs=2, stream=True))
    assert [token for chunk in chunks if (found := chunk.choices[0].logprobs) for token in found.content] == told


def test_plain_completions(tiny: Served) -> None:
    create = tiny.client.completions.create
    completion = create(model="tiny", prompt="The capital", logprobs=2)
    (choice,) = completion.choices
    assert (completion.object, choice.text, choice.finish_reason) == ("text_completion", ANSWER, "stop")
    assert tiny.asked.prompt_ids == tiny.model.encoder.encode_text("The capital")
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(choice.logprobs.top_logprobs)
    assert choice.logprobs.text_offset[:3] == [0, 3, 11]
    assert choice.logprobs.top_logprobs[0]["The"] == -0.5
    several = create(model="tiny", prompt=["a", "b"], echo=True, n=2)
    assert [choice.text for choice in several.choices] == ["a" + ANSWER] * 2 + ["b" + ANSWER] * 2
    assert several.usage.prompt_tokens == 2
    create(model="tiny", prompt=[[5, 6], [7]])
    assert [list(ticket.request.prompt_ids) for ticket in tiny.engine.tickets[-2:]] == [[5, 6], [7]]
    chunks = create(model="tiny", prompt=[5, 6], stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == tiny.model.encoder.decode([5, 6]) + ANSWER


def test_a_plain_prompt_begins_as_documents_did_in_training() -> None:
    tokenizer = build_tokenizer()
    format = PromptFormat(**PROMPT_FORMATS["mistral"])  # its bos is <s>
    with serving(Encoder(tokenizer, format)) as server:
        server.says("x")
        document = server.model.encoder.explain([{"messages": [{"role": "user", "content": "Once"}]}], "everything")
        for prompt in ("Once", "<s>Once"):
            server.client.completions.create(model="tiny", prompt=prompt)
            assert server.asked.prompt_ids == document[0][0][0].input_ids[:-1]  # but for its end
        server.client.completions.create(model="tiny", prompt="Once", extra_body={"add_special_tokens": False})
        assert server.asked.prompt_ids == document[0][0][0].input_ids[1:-1]


def test_text_in_parts_and_developers(tiny: Served) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    tiny.chat(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert tiny.model.encoder.decode(tiny.asked.prompt_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_last_message_is_continued(tiny: Served) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The capital"}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    tiny.chat(messages=messages, extra_body=body)
    assert tiny.model.encoder.decode(tiny.asked.prompt_ids).endswith("<|im_start|>assistant\nThe capital")


# Tools and structured answers


@pytest.fixture(scope="module")
def caller() -> Iterator[Served]:
    with serving(chatml(REASONING_AND_TOOLS)) as server:
        yield server


CALLS = [
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>',
    '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Zürich"}}]',
    '<|python_tag|>{"name": "weather", "parameters": {"city": "Zürich"}}',
    '{"name": "weather", "parameters": {"city": "Zürich"}}',
]


@pytest.mark.parametrize("text", CALLS)
def test_calls_of_tools_are_found(caller: Served, text: str) -> None:
    caller.says(text)
    (choice,) = caller.chat(tools=[TOOL]).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert re.fullmatch(r"call_\w{24}", call.id)
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Zürich"})
    chunks = list(caller.chat(tools=[TOOL], stream=True))
    assert streamed(chunks)[0] == ""
    assert streamed(chunks)[1][-1] == "tool_calls"
    (told,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert (told.index, told.function.arguments) == (0, call.function.arguments)
    # A conversation goes on with the call and its result, as the client has them.
    caller.says("Sunny.")
    history = [*HELLO, choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    assert caller.chat(messages=history, tools=[TOOL]).choices[0].message.content == "Sunny."
    assert "Zürich" in caller.model.encoder.decode(caller.asked.prompt_ids)


def test_text_around_and_beside_calls_is_content(caller: Served) -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    caller.says(f"Let me < look.\n{call}\n{call}")
    (choice,) = caller.chat(tools=[TOOL]).choices
    assert choice.message.content == "Let me < look."
    assert len(choice.message.tool_calls) == 2
    assert len(caller.chat(tools=[TOOL], parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    assert streamed(caller.chat(tools=[TOOL], stream=True))[0] == "Let me < look.\n"
    for text in (
        '{"name": "nobody", "parameters": {}}',
        '{"a": 1} and so on',
        "<tool_call>{broken",
        "{",
        "plain <tool",
    ):
        caller.says(text)
        (choice,) = caller.chat(tools=[TOOL]).choices
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
        assert streamed(caller.chat(tools=[TOOL], stream=True))[0] == text


def test_tool_choice(caller: Served) -> None:
    caller.says(CALLS[0])
    (choice,) = caller.chat(tools=[TOOL], tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls) == (CALLS[0], None)
    assert caller.asked.prompt_ids == caller.model.encode(HELLO)
    other = {"type": "function", "function": {"name": "other"}}
    caller.says('{"name": "weather", "parameters": {"city": "Rome"}}')
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        completion = caller.chat(tools=[TOOL, other], tool_choice=choice)
        assert completion.choices[0].message.tool_calls[0].function.name == "weather"
        assert caller.asked.prompt_ids == caller.model.encode(HELLO, [TOOL, other])
        assert caller.asked.sampling.grammar is not None


def test_tools_without_a_place_in_the_format_are_refused(tiny: Served) -> None:
    response = tiny.post(tools=[TOOL])
    assert response.status_code == 400
    assert "of which the chat template writes nothing" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "city", "schema": {"type": "object"}, "strict": True}},
    ],
)
def test_structured_answers_have_a_grammar(tiny: Served, response_format: dict[str, Any]) -> None:
    tiny.chat(response_format=response_format)
    assert tiny.asked.sampling.grammar
    tiny.chat(response_format={"type": "text"})
    assert tiny.asked.sampling.grammar is None


# Errors


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"n": 0}, "n", "1"),
        ({"n": 129}, "n", "128"),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"seed": 2**64}, "seed", ""),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"top_logprobs": 2}, None, "top_logprobs goes with logprobs: true only"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"stream_options": {"include_usage": True}}, None, "stream_options goes with stream"),
        ({"temprature": 1}, "temprature", "no field"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "5"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "image_url"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "empty content"),
        ({"messages": [{"role": "user"}]}, "messages", "no content"),
        ({"messages": [{"role": "system", "content": "a"}] * 2 + HELLO}, "messages", "2 system messages"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages", "continue_final_message"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages", "no tools"),
        ({"continue_final_message": True}, "messages", "continue_final_message needs"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"tool_choice": "required"}, None, "tool_choice goes with tools only"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "max_tokens and max_completion_tokens"),
    ],
)
def test_wrong_fields_are_named(tiny: Served, fields: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tiny.chat(extra_body=fields)
    error = caught.value.body
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert tiny.engine.tickets == []


@pytest.mark.parametrize(
    "body", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b"[]", b"5", b'""', b""]
)
def test_bodies_that_are_no_json_object(tiny: Served, body: bytes) -> None:
    response = httpx.post(f"{tiny.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_body_of_another_type_is_told_its_header(tiny: Served) -> None:
    response = httpx.post(f"{tiny.url}/v1/chat/completions", data={"model": "tiny"})
    assert response.status_code == 400
    assert "Content-Type: application/json; given 'application/x-www-form-urlencoded'" in response.text


def test_statuses(tiny: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        tiny.chat(model="huge")
    assert caught.value.code == "model_not_found"
    assert "tiny" in caught.value.message
    for method, path, status in [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/huge", 404),
    ]:
        response = httpx.request(method, tiny.url + path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert tiny.post("/v1/embeddings", input="x").status_code == 400
    assert "no embeddings" in tiny.post("/v1/embeddings", input="x").json()["error"]["message"]


def test_long_prompts_are_refused_with_counts(tiny: Served) -> None:
    words = [{"role": "user", "content": "capital " * 600}]
    with pytest.raises(openai.BadRequestError) as caught:
        tiny.chat(messages=words)
    assert caught.value.code == "context_length_exceeded"
    count = tiny.post("/tokenize", messages=words).json()["count"]
    assert f"the prompt has {count:,} tokens; the context of tiny holds 512" in caught.value.message
    room = 512 - tiny.chat().usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match=f"has {512 - room} tokens and {room + 1} are asked for"):
        tiny.chat(max_tokens=room + 1)
    tiny.chat(max_tokens=room)


def test_models_are_listed(tiny: Served) -> None:
    (model,) = tiny.client.models.list().data
    assert (model.id, model.object, model.created, model.owned_by) == ("tiny", "model", 1700000000, "llmforge")
    assert tiny.client.models.retrieve("tiny") == model
    del_model = httpx.post(f"{tiny.url}/v1/chat/completions", json={"messages": HELLO})
    assert del_model.status_code == 200  # there is only one


def test_failures_of_the_engine_say_nothing_of_its_insides(tiny: Served) -> None:
    tiny.engine.script = lambda request: [RuntimeError("secret at 0xdeadbeef")]
    for fields in ({}, {"stream": True}):
        response = tiny.post(**fields)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "secret" not in response.text
    ids = tiny.model.encoder.encode_text("The capital")
    tiny.engine.script = lambda request: [*ids, RuntimeError("secret")]
    *events, failure, end = [line[6:] for line in tiny.post(stream=True).text.split("\n\n") if line]
    assert end == "[DONE]"
    assert json.loads(failure)["error"]["code"] == "engine_error"
    assert len(events) >= 2
    with pytest.raises(openai.APIError, match="the model failed"):
        list(tiny.chat(stream=True))


# Under load


def test_overload_is_told_with_a_time_to_wait() -> None:
    with serving(chatml(), max_waiting=2, pause=0.01) as server:
        server.says(ANSWER)
        with pytest.raises(openai.RateLimitError) as caught:
            server.chat(n=3)
        assert caught.value.response.headers["Retry-After"] == "3"
        assert caught.value.code == "overloaded"
        assert eventually(lambda: server.engine.running == 0)  # the two that had been taken were given up
        assert server.chat(n=2).choices[1].message.content == ANSWER


def test_keys() -> None:
    with serving(chatml(), settings=Settings(api_keys=("first-key", "second-key"))) as server:
        server.says(ANSWER)
        for key in ("first-key", "second-key"):
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key)
            assert client.chat.completions.create(model="tiny", messages=HELLO).choices[0].message.content == ANSWER
        with pytest.raises(openai.AuthenticationError) as caught:
            server.chat()
        assert caught.value.code == "invalid_api_key"
        assert "first-key" not in caught.value.message
        for path, status in [("/v1/models", 401), ("/metrics", 401), ("/openapi.json", 401), ("/health", 200)]:
            assert httpx.get(server.url + path).status_code == status
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "second-key"}).status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "bearer second-key"}).status_code == 200


def test_large_and_slow_bodies_are_bounded() -> None:
    with serving(chatml(), settings=Settings(max_body_bytes=1000, stall_timeout=0.3)) as server:
        server.says(ANSWER)
        long = [{"role": "user", "content": "x" * 1000}]
        assert server.post(messages=long).status_code == 413
        chunked = httpx.post(
            f"{server.url}/v1/chat/completions",
            content=iter([json.dumps({"messages": long}).encode()]),
            headers={"Content-Type": "application/json"},
        )
        assert chunked.status_code == 413
        assert chunked.json()["error"]["code"] == "body_too_large"
        with raw_request(server.url, b"{", length=100) as connection:
            assert b"408 Request Timeout" in connection.recv(1000)
        assert server.chat().choices[0].message.content == ANSWER


@pytest.mark.parametrize("chunked", [True, False])
def test_who_sends_far_too_much_is_told_so(chunked: bool) -> None:
    """Like most clients, this one looks for an answer only when all is sent."""
    with serving(chatml(), settings=Settings(max_body_bytes=2**20)) as server:
        large = b"x" * (7 * 2**20)
        content = (large[at : at + 2**16] for at in range(0, len(large), 2**16)) if chunked else large
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_the_server_does_not_read_for_ever() -> None:
    with serving(chatml(), settings=Settings(max_body_bytes=2**20)) as server:
        sent = 0
        with raw_request(server.url, b"{", length=2**40) as connection, contextlib.suppress(OSError):
            while sent < 100:
                connection.sendall(b"x" * 2**20)
                sent += 1
        assert 8 <= sent < 30  # and what the buffers hold
        began = time.monotonic()
        with raw_request(server.url, b"", length=2**40, expect=True) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 413")  # asked before it sends: not a byte is needed
        assert time.monotonic() - began < 5


def test_more_requests_than_the_server_takes_are_refused() -> None:
    with serving(chatml(), settings=Settings(max_requests=1), pause=0.01) as server:
        server.says(ANSWER)
        with server.client.chat.completions.create(model="tiny", messages=HELLO, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError, match="1 requests are under way"):
                server.chat()
            assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_at_once(tiny: Served, stream: bool) -> None:
    tiny.says("capital " * 400, ends=False)
    tiny.engine.pause = 0.02
    body = json.dumps({"model": "tiny", "messages": HELLO, "n": 2, "stream": stream}).encode()
    with raw_request(tiny.url, body) as connection:
        assert eventually(
            lambda: len(tiny.engine.tickets) == 2 and all(ticket.told > 2 for ticket in tiny.engine.tickets)
        )
        if stream:
            assert b"200 OK" in connection.recv(1000)
    told = [ticket.told for ticket in tiny.engine.tickets]
    assert eventually(lambda: tiny.engine.running == 0)
    assert all(ticket.cancelled.is_set() for ticket in tiny.engine.tickets)
    assert all(ticket.told <= before + 5 for ticket, before in zip(tiny.engine.tickets, told, strict=True))


def test_a_client_that_stops_reading_is_given_up_and_blocks_nobody() -> None:
    with serving(chatml(), settings=Settings(stall_timeout=0.5), context_length=2**20) as server:
        server.says("capital " * 100_000, ends=False)  # more than the buffers of both ends hold
        body = json.dumps({"model": "tiny", "messages": HELLO, "stream": True}).encode()
        with raw_request(server.url, body):
            assert eventually(lambda: bool(server.engine.tickets))
            (stalled,) = server.engine.tickets
            server.says(ANSWER)
            assert server.chat().choices[0].message.content == ANSWER
            assert eventually(lambda: stalled.cancelled.is_set(), seconds=20)


@pytest.mark.parametrize("stream", [True, False])
def test_answers_that_take_too_long_are_ended(stream: bool) -> None:
    with serving(chatml(), settings=Settings(request_timeout=0.3), pause=0.02) as server:
        server.says("capital " * 400, ends=False)
        if stream:
            with pytest.raises(openai.APIError, match="longer than the server allows"):
                list(server.chat(stream=True))
        else:
            with pytest.raises(openai.InternalServerError) as caught:
                server.chat()
            assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        assert eventually(lambda: server.engine.running == 0)


def test_metrics_count(tiny: Served) -> None:
    def metric(name: str) -> float:
        text = httpx.get(f"{tiny.url}/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    names = [
        'llmforge_requests_total{route="/v1/chat/completions",status="200"}',
        'llmforge_requests_total{route="/v1/chat/completions",status="404"}',
        'llmforge_prompt_tokens_total{model="tiny"}',
        'llmforge_generated_tokens_total{model="tiny"}',
        'llmforge_answers_total{finish="stop",model="tiny"}',
        'llmforge_time_to_first_token_seconds_count{model="tiny"}',
    ]
    before = [metric(name) for name in names]
    usage = tiny.chat().usage
    tiny.post(model="huge")
    expected = [1, 1, usage.prompt_tokens, usage.completion_tokens, 1, 1]
    assert [after - earlier for after, earlier in zip(map(metric, names), before, strict=True)] == expected
    assert metric("llmforge_running") == 0


def test_the_schema_describes_every_field(tiny: Served) -> None:
    schema = httpx.get(f"{tiny.url}/openapi.json").json()
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "tools", "response_format"} <= set(fields)
    assert fields["temperature"]["anyOf"][0]["maximum"] == 2


@contextmanager
def raw_request(url: str, body: bytes, *, length: int | None = None, expect: bool = False) -> Iterator[socket.socket]:
    """Send a chat request over a socket of one's own, with small buffers; it is closed at the end."""
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        head += "Expect: 100-continue\r\n" if expect else ""
        connection.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
        yield connection


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Wait until a condition holds; say whether it came to that."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


# The end


@contextmanager
def process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server in a process of its own; give it and its URL."""
    program = [sys.executable, str(Path(__file__).with_name("scripted_server.py")), "5"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(program, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server, server.stdout.readline().strip()
        finally:
            server.kill()


@pytest.mark.parametrize("stream", [True, False])
def test_sigterm_finishes_what_was_accepted_and_takes_nothing_new(stream: bool) -> None:
    with process() as (server, url), ThreadPoolExecutor(4) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def ask() -> str:
            answer = client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
            return streamed(answer)[0] if stream else answer.choices[0].message.content

        answers = [pool.submit(ask) for _ in range(4)]
        assert eventually(lambda: "llmforge_running 4.0" in httpx.get(f"{url}/metrics").text)
        server.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="tiny", messages=HELLO)
        assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
        assert caught.value.response.headers["Retry-After"] == "5"
        assert [answer.result() for answer in answers] == [" capital" * 60] * 4
        out, err = server.communicate(timeout=20)
        assert (server.returncode, err) == (0, "")
        assert "4 requests are being finished" in out


def test_a_second_signal_ends_at_once() -> None:
    with process() as (server, url), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{url}/v1/chat/completions", json={"messages": HELLO})
        assert eventually(lambda: "llmforge_running 1.0" in httpx.get(f"{url}/metrics").text)
        server.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=5)
        assert server.returncode == 128 + signal.SIGTERM
        assert isinstance(asked.exception(), httpx.TransportError)


def test_a_port_in_use_is_told() -> None:
    with take_port("127.0.0.1", 0, stall_timeout=1) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on port {port} of 127.0.0.1"):
            take_port("127.0.0.1", port, stall_timeout=1)
    with pytest.raises(InputError, match="cannot listen on port 0 of no-such-host"):
        take_port("no-such-host.invalid", 0, stall_timeout=1)
