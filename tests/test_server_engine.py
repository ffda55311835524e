"""The server on the wire with its real engine: what holds only if both do their part."""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import peft
import pytest
import torch
import transformers

from conftest import save_model
from http_server import all_served
from llmforge.models.source import ModelSource
from llmforge.serve.model import ServedModel
from llmforge.serve.models import Loading, Models

ADAPTERS, AT_ONCE, WORDS = 50, 8, 10
HELLO: list[Any] = [{"role": "user", "content": "Hello?"}]


@dataclass
class Engine:
    """A server of a tiny model and its adapters, which are loaded on demand."""

    url: str
    model: ServedModel
    base_dir: Path
    adapters: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def chat(self, **fields: Any) -> Any:
        return self.client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **fields})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    base_dir = save_model(tmp_path_factory.mktemp("base") / "tiny")
    adapters = tmp_path_factory.mktemp("adapters")
    models = Models(dynamic_lora_loading_path=str(adapters), max_adapters=AT_ONCE, cache_bytes=1 << 28)
    with closing(models):
        model = models.add("tiny", ModelSource(str(base_dir), base_dir), Loading(dtype="fp32"))
        with all_served(models) as url:
            yield Engine(url, model, base_dir, adapters)


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What does {number} mean?"}]


def save_adapters(server: Engine) -> list[list[int]]:
    """Save adapters of random weights; give the ids with which PEFT alone answers a question to each, greedily."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(server.base_dir, dtype=torch.float32).eval()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    adapted = peft.get_peft_model(plain, config)
    found = []
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.3
        adapted.save_pretrained(server.adapters / f"a{number}")
        prompt = torch.tensor([server.model.encode(question(number))])
        with torch.no_grad():
            ids = adapted.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=WORDS, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        found.append(ids[0, prompt.shape[1] :].tolist())
    return found


def test_fifty_clients_ask_fifty_adapters_at_once_of_which_eight_have_room(server: Engine) -> None:
    expected = save_adapters(server)
    texts = [server.model.encoder.decode(ids) for ids in expected]
    assert len(set(texts)) == ADAPTERS

    async def ask(client: httpx.AsyncClient, number: int) -> httpx.Response:
        fields = {"max_tokens": WORDS, "temperature": 0, "ignore_eos": True}
        return await client.post(
            "/v1/chat/completions", json={"model": f"a{number}", "messages": question(number), **fields}
        )

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)
        ) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(ADAPTERS)))

    answers = asyncio.run(ask_all())
    assert [answer.status_code for answer in answers] == [200] * ADAPTERS
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == texts
    assert len(httpx.get(f"{server.url}/v1/models").json()["data"]) == 1 + AT_ONCE
    assert server.client.chat.completions.create(model="a0", messages=question(0), max_tokens=1).model == "a0"


def test_n_and_seed(server: Engine) -> None:
    fields = {"temperature": 1.5, "max_tokens": 12, "seed": 7}
    texts = [choice.message.content for choice in server.chat(**fields, n=3).choices]
    assert len(set(texts)) == 3
    assert [server.chat(**{**fields, "seed": 7 + index}).choices[0].message.content for index in range(3)] == texts
    streamed = ["", "", ""]
    for chunk in server.chat(**fields, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_logprobs_are_those_of_the_model(server: Engine) -> None:
    answer = server.chat(temperature=0, max_tokens=6, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True})
    content = answer.choices[0].logprobs.content
    assert len(content) == 6 == answer.usage.completion_tokens
    plain = transformers.AutoModelForCausalLM.from_pretrained(server.base_dir, dtype=torch.float32).eval()
    prompt = server.model.encode(HELLO)
    ids: list[int] = []
    for told in content:
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + ids])).logits[0, -1]
        values, best = torch.log_softmax(logits, -1).topk(3)
        ids.append(int(best[0]))
        assert told.logprob == pytest.approx(float(values[0]), abs=1e-4)
        assert [top.logprob for top in told.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        assert told.token == told.top_logprobs[0].token
    told_bytes = b"".join(bytes(told.bytes) for told in content)
    assert told_bytes.decode("utf-8", "replace") == server.model.encoder.decode(ids)


@pytest.mark.parametrize("seed", range(3))
def test_stop_strings_at_any_place_of_an_answer(server: Engine, seed: int) -> None:
    """A grammar leaves nothing to say but one text, in tokens that are drawn: some of them are parts of characters."""
    text = '"naïve 你好, 👩‍👧 said the fox"'
    schema = {"name": "x", "schema": {"const": json.loads(text)}}
    fields = {"response_format": {"type": "json_schema", "json_schema": schema}, "temperature": 2, "seed": seed}
    whole = server.chat(**fields, logprobs=True).choices[0]
    assert whole.message.content == text
    assert any(token.token == "\ufffd" for token in whole.logprobs.content)
    for start in range(1, len(text) - 2, 2):
        stop = text[start : start + 3]
        chunks = list(server.chat(**fields, stop=["never said", stop], stream=True))
        told = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert told == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_grammar_that_is_much_work_holds_up_no_stream(server: Engine) -> None:
    schema = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(3000)}}
    fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}

    def ask() -> float:
        began = time.monotonic()
        assert server.chat(**fields, max_tokens=4).usage.completion_tokens
        return time.monotonic() - began

    gaps: list[float] = []
    last = 0.0
    asked: Future[float] | None = None
    with ThreadPoolExecutor(1) as pool:
        for _ in server.chat(max_tokens=450, temperature=0, extra_body={"ignore_eos": True}, stream=True):
            if asked is None:
                asked = pool.submit(ask)
            elif not asked.done():
                gaps.append(time.monotonic() - last)
            last = time.monotonic()
        assert asked is not None
        assert asked.result() > 4 * max(gaps)
