"""Whatever bytes come, the server answers or refuses in words, and never fails; `make fuzz` tries more of them."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from chat_templates import REASONING_AND_TOOLS
from conftest import save_model
from fuzz.driver import Driver, fault_of
from fuzz.mutations import CHAT, PATHS, SEEDS, TEXT, TOKENS, request
from llmforge.models.source import ModelSource
from llmforge.serve.app import make_app
from llmforge.serve.door import Settings
from llmforge.serve.models import Loading, Models

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted({field for _, body in SEEDS for field in body})


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """A server of a tiny model, whose template knows tools."""
    directory = save_model(tmp_path_factory.mktemp("model"), chat_template=REASONING_AND_TOOLS)
    models = Models(cache_bytes=1 << 27)
    models.add("tiny", ModelSource("tiny", directory), Loading(dtype="fp32"))
    yield make_app(models, Settings())
    models.close()


@pytest.fixture(scope="module")
def driver(app: FastAPI) -> Driver:
    return Driver(app)


@pytest.mark.parametrize("seed", range(4))
def test_requests_with_something_changed(driver: Driver, seed: int) -> None:
    statuses = set()
    for number in range(100):
        path, body = request(random.Random(f"{seed}-{number}"))
        answer = driver.post(path, body)
        assert fault_of(*answer) is None, (fault_of(*answer), path, body, answer)
        statuses.add(answer[0])
    assert statuses >= {200, 400}


def test_answers_are_as_the_schema_describes_them(app: FastAPI, driver: Driver) -> None:
    schema = app.openapi()
    seen = set()
    for path, content in SEEDS:
        for fields in ({"max_tokens": 3} if path in (CHAT, TEXT) else {}, {"no_such_field": 1}):
            status, kind, text = driver.post(path, json.dumps({**content, **fields}).encode())
            kind = kind.split(";")[0]
            described = schema["paths"][path]["post"]["responses"][str(status)]["content"][kind]["schema"]
            if kind == "application/json":
                Draft202012Validator({**schema, **described}).validate(json.loads(text))
            seen.add((path, status, kind))
    assert len(seen) == 9


@given(
    path=st.sampled_from(PATHS), fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), base=st.booleans()
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_any_field(driver: Driver, path: str, fields: dict[str, Any], base: bool) -> None:
    body = {**({"messages": HELLO, "prompt": "Hello"} if base else {}), "max_tokens": 2, **fields}
    body.pop("prompt" if path == CHAT else "messages", None)
    answer = driver.post(path, json.dumps(body).encode())
    assert fault_of(*answer) is None, answer


@given(path=st.sampled_from(PATHS), body=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes(driver: Driver, path: str, body: bytes) -> None:
    answer = driver.post(path, body)
    assert fault_of(*answer) is None, answer


def ask(driver: Driver, path: str, text: str) -> tuple[int, dict[str, Any]]:
    status, _, answer = driver.post(path, text.encode())
    return status, json.loads(answer)


# What was found once, and must not come back.


@pytest.mark.parametrize("path", [CHAT, TEXT, TOKENS])
def test_half_a_surrogate_pair_is_refused(driver: Driver, path: str) -> None:
    what = r'"messages": [{"role": "user", "content": "\ud800"}]' if path == CHAT else r'"prompt": "\ud800"'
    status, body = ask(driver, path, f"{{{what}}}")
    assert (status, "surrogate" in body["error"]["message"]) == (400, True)


@pytest.mark.parametrize("content", [[{}, None], [{"type": None}, "x"], ["text"], [{"type": "text"}], [[]]])
def test_parts_that_are_none_are_refused(driver: Driver, content: Any) -> None:
    status, body = ask(driver, CHAT, json.dumps({"messages": [{"role": "user", "content": content}]}))
    assert (status, body["error"]["param"]) == (400, "messages[0].content")


@pytest.mark.parametrize("depth", [200, 940, 5000, 100_000])
def test_values_that_are_nested_for_ever_are_refused(driver: Driver, depth: int) -> None:
    nested = '{"a": ' * depth + "0" + "}" * depth
    call = f'{{"id": "1", "type": "function", "function": {{"name": "f", "arguments": {nested}}}}}'
    messages = f'[{{"role": "user", "content": "?"}}, {{"role": "assistant", "tool_calls": [{call}]}}]'
    for fields in (f'"messages": {messages}', f'"messages": {json.dumps(HELLO)}, "metadata": {nested}, "top_p": 3'):
        status, body = ask(driver, CHAT, f"{{{fields}}}")
        assert (status, bool(body["error"]["message"])) == (400, True)


@pytest.mark.parametrize(
    "schema",
    [{"const": -(2**63)}, {"enum": [1, [-(2**63) + 1]]}, {"type": "integer", "minimum": -1e308, "maximum": -1e308}],
)
def test_a_schema_that_brings_down_llguidance_is_refused(driver: Driver, schema: dict[str, Any]) -> None:
    body = {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    status, answer = ask(driver, CHAT, json.dumps(body))
    assert (status, "cannot be followed" in answer["error"]["message"]) == (400, True)


def test_a_schema_that_proves_too_much_says_so_in_the_middle(driver: Driver) -> None:
    schema = {"type": "string", "pattern": "(.*[a-f].{1000}){100}"}
    body = {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    status, answer = ask(driver, CHAT, json.dumps({**body, "temperature": 2, "seed": 1, "max_tokens": 300}))
    assert (status, "cannot be followed" in answer.get("error", {}).get("message", "")) == (400, True), answer
    assert ask(driver, CHAT, json.dumps({"messages": HELLO, "max_tokens": 2}))[0] == 200


@pytest.mark.parametrize("wrong", [{"stream": "yes"}, {"n": "2"}, {"max_tokens": True}, {"temperature": "0.5"}])
def test_values_have_the_type_that_the_schema_says(driver: Driver, wrong: dict[str, Any]) -> None:
    (field,) = wrong
    status, body = ask(driver, CHAT, json.dumps({"messages": HELLO, **wrong}))
    assert (status, body["error"]["param"]) == (400, field)
