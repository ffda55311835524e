"""What is asked of a model and what comes of it: pieces of text with their tokens, however they are read."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from conftest import build_tokenizer
from llmforge.errors import ConversationError, InputError, LlmforgeError
from llmforge.prompt import Encoder, PromptFormat, StopRules
from llmforge.serve.model import Answer, Piece, ServedModel
from llmforge.serve.requests import Request, Sampling
from scripted_engine import ScriptedEngine

FORMAT = PromptFormat(
    system="{instruction}",
    user="<|im_start|>{instruction}<|im_end|>",
    assistant="<|im_start|>{instruction}<|im_end|>",
    trailing_assistant="<|im_start|>",
)
ENCODER = Encoder(build_tokenizer(), FORMAT)
END = ENCODER.encode_text("<|im_end|>")
ASKED = [{"role": "user", "content": "hello"}]


def served(answer: str, *, stops: Sequence[str] = (), defaults: Any = None, **options: Any) -> ServedModel:
    """Serve a model that says something and ends its turn."""
    ids = [*ENCODER.encode_text(answer), *END]
    return model_of(lambda request: ids, stops=stops, defaults=defaults, **options)


def model_of(script: Callable[[Request], Sequence[Any]], **options: Any) -> ServedModel:
    stops, defaults = options.pop("stops", ()), options.pop("defaults", None) or {}
    engine = ScriptedEngine(script, **options)
    rules = StopRules.derive(ENCODER, stops, [])
    return ServedModel("tiny", "/models/tiny", 0, ENCODER, rules, engine, defaults=defaults)


def ask(model: ServedModel, **options: Any) -> Answer:
    stop = options.pop("stop", ())
    return model.answer(model.encode(ASKED), model.sampling(**options), stop=stop)


async def read(answer: Answer) -> list[Piece]:
    return [piece async for piece in answer]


BOTH = pytest.mark.parametrize("pieces_of", [list, lambda answer: asyncio.run(read(answer))], ids=["sync", "async"])


def said(model: ServedModel) -> ScriptedEngine:
    assert isinstance(model.engine, ScriptedEngine)
    return model.engine


@BOTH
@pytest.mark.parametrize("chunks", [(1,), (3,), (2, 1, 5), (100,)])
def test_pieces_are_text_and_the_tokens_that_made_it_readable(pieces_of: Any, chunks: Sequence[int]) -> None:
    text = "The quick brown 日本 fox"
    answer = ask(served(text, chunks=chunks))
    pieces = pieces_of(answer)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    ids = [token.id for piece in pieces for token in piece.tokens]
    assert ids == ENCODER.encode_text(text)  # so the stop token is in none
    assert (answer.prompt_tokens, answer.completion_tokens) == (len(ENCODER.encode_prompt(ASKED)), len(ids) + 1)
    for piece in pieces[:-1]:
        assert piece.text
        assert "\ufffd" not in piece.text
    if chunks == (1,):
        assert all(ENCODER.decode([token.id for token in piece.tokens]) == piece.text for piece in pieces)


@BOTH
def test_a_stop_sequence_ends_answer_and_generation_and_nothing_of_it_is_shown(pieces_of: Any) -> None:
    step = threading.Semaphore(0)
    model = served("fox STO dog 你好 STOP and much more", step=step)
    ids = ENCODER.encode_text("fox STO dog 你好 STOP")
    step.release(len(ids))  # the engine gets no further than the stop sequence
    answer = ask(model, stop=["STOP"])
    pieces = pieces_of(answer)
    assert "".join(piece.text for piece in pieces) == "fox STO dog 你好 "
    assert pieces[-1].finish == "stop"
    assert answer.completion_tokens == len(ids)
    shown = ""
    for piece in pieces[:-1]:
        shown += piece.text
        assert not shown.endswith(("S", "ST", "STO"))
    told = ENCODER.decode([token.id for piece in pieces for token in piece.tokens])
    assert told.startswith("fox STO dog 你好 ")
    assert "STOP" not in told
    assert said(model).tickets[0].cancelled.is_set()
    step.release()


def test_stop_sequences_of_the_artifact_and_of_the_request_both_end_an_answer() -> None:
    model = served("one fox two dog", stops=[" two"])
    assert "".join(piece.text for piece in ask(model)) == "one fox"
    assert "".join(piece.text for piece in ask(model, stop=[" fox"])) == "one"
    assert model.stop.sequences == (" two",)


def test_an_answer_that_was_not_ended_shows_what_was_held_back() -> None:
    model = served("fox STO", stops=["STOP"])
    assert "".join(piece.text for piece in ask(model)) == "fox STO"
    pieces = list(ask(model, max_tokens=len(ENCODER.encode_text("fox STO"))))
    assert "".join(piece.text for piece in pieces) == "fox STO"
    assert pieces[-1].finish == "length"


def test_for_measuring_nothing_ends_an_answer_but_its_length() -> None:
    model = served("fox STOP" * 3, stops=["STOP"])
    pieces = list(ask(model, max_tokens=9, ignore_stops=True))
    assert pieces[-1].finish == "length"
    assert sum(len(piece.tokens) for piece in pieces) == 9


def test_whoever_leaves_early_cancels_the_answer() -> None:
    async def close(answer: Answer) -> None:
        pieces = aiter(answer)
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]

    async def cancel(answer: Answer) -> None:
        task = asyncio.create_task(read(answer))
        await asyncio.sleep(0.05)  # it waits for a token now
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def leave(answer: Answer) -> None:
        pieces = iter(answer)
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]

    ways: list[Callable[[Answer], Any]] = [
        leave,
        lambda answer: asyncio.run(close(answer)),
        lambda answer: asyncio.run(cancel(answer)),
        lambda answer: answer.cancel(),
    ]
    for way in ways:
        step = threading.Semaphore(1)
        model = served("one two three four", step=step)
        way(ask(model))
        ticket = said(model).tickets[0]
        assert ticket.cancelled.wait(2)
        step.release()  # the engine comes by, and finds that nobody waits
        deadline = time.monotonic() + 2
        while said(model).running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not said(model).running
        assert ticket.told <= 1


@BOTH
def test_a_failure_of_the_engine_reaches_the_reader(pieces_of: Any) -> None:
    model = model_of(lambda request: [*ENCODER.encode_text("The"), LlmforgeError("the model failed")])
    with pytest.raises(LlmforgeError, match="the model failed"):
        pieces_of(ask(model))


def test_defaults_are_those_of_the_artifact() -> None:
    greedy = served("x", defaults={"max_new_tokens": 64, "do_sample": False, "repetition_penalty": 1.1})
    assert greedy.sampling() == Sampling(64, temperature=0.0, repetition_penalty=1.1)
    assert greedy.sampling(temperature=0.5, max_tokens=3) == Sampling(3, temperature=0.5, repetition_penalty=1.1)
    assert greedy.sampling(top_p=0.9).temperature == 1.0  # only sampling reads it
    assert greedy.sampling(seed=3).temperature == 0.0
    hot = served("x", defaults={"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20})
    assert hot.sampling() == Sampling(4096, temperature=0.7, top_p=0.8, top_k=20)
    assert hot.sampling(temperature=0.0, top_k=None).temperature == 0.0
    list(hot.answer([5] * 4000, hot.sampling(temperature=0.0)))
    assert said(hot).requests[0].sampling.max_tokens == 96  # what the context has room for


def test_options_are_named_as_transformers_names_them() -> None:
    model = served("x", defaults={"do_sample": True, "temperature": 0.7, "max_new_tokens": 9})
    assert model.options(do_sample=False) == Sampling(9, temperature=0.0)
    assert model.options(max_new_tokens=5, temperature=0.2, seed=1) == Sampling(5, temperature=0.2, seed=1)
    assert model.options(top_k=3, temperature=None) == Sampling(9, temperature=0.7, top_k=3)
    assert served("x").options(do_sample=True).temperature == 1.0
    for options, words in [
        ({"num_beams": 4}, "given num_beams; options of an answer are max_new_tokens"),
        ({"max_new_tokens": 0}, "given max_new_tokens 0; allowed is a whole number from 1"),
        ({"temperature": "hot"}, "given temperature 'hot'; allowed is a number from 0"),
        ({"top_p": 1.5}, "given top_p 1.5; allowed is a number above 0, at most 1"),
        ({"do_sample": 1}, "given do_sample 1; allowed is true or false"),
    ]:
        with pytest.raises(InputError, match=words):
            model.options(**options)


def test_prompts_that_no_answer_follows_are_refused() -> None:
    model = served("x", context_length=16)
    with pytest.raises(InputError, match="the prompt has 16 tokens and the model's context holds 16"):
        model.answer([5] * 16, model.sampling())
    with pytest.raises(InputError, match="the prompt is empty"):
        model.answer([], model.sampling())
    with pytest.raises(ConversationError):
        model.encode([{"role": "user", "content": "a"}, {"role": "user"}])
    assert not said(model).requests
