"""Asks an OpenAI-compatible server like many clients at once, and measures when each piece of an answer arrives."""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import numpy as np

from measuring.chat import Prompt

LIMIT = 600  # seconds for one answer


@dataclass
class Answer:
    """What came back for one request. Times are seconds of a monotonic clock; `pieces` are those of pieces with text.

    `tokens` and `prompt_tokens` are the server's own counts, None where it gives none.
    """

    prompt: Prompt
    began: float
    pieces: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int | None = None
    prompt_tokens: int | None = None
    finish_reason: str | None = None
    error: str = ""
    ended: float = 0.0


def ask(base: str, model: str, prompts: Sequence[Prompt], *, clients: int, max_tokens: int) -> list[Answer]:
    """Let so many clients ask: each sends its next request when it has its answer, until no prompt is left.

    Args:
        base: the server's address up to and without `/v1`.
    """
    return asyncio.run(_ask(base, model, prompts, clients, max_tokens))


async def _ask(base: str, model: str, prompts: Sequence[Prompt], clients: int, max_tokens: int) -> list[Answer]:
    left = iter(prompts)
    timeout = aiohttp.ClientTimeout(total=LIMIT)
    # A connection for each request: llama.cpp closes those that it has answered on, some while the next one is sent.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(base, timeout=timeout, connector=connector) as session:

        async def client(left: Iterator[Prompt]) -> list[Answer]:
            return [await _answer(session, model, prompt, max_tokens) for prompt in left]

        return [
            answer for answers in await asyncio.gather(*(client(left) for _ in range(clients))) for answer in answers
        ]


async def _answer(session: aiohttp.ClientSession, model: str, prompt: Prompt, max_tokens: int) -> Answer:
    body = {
        "model": model,
        "messages": prompt.messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = Answer(prompt, time.perf_counter())
    try:
        async with session.post("/v1/chat/completions", json=body) as response:
            if response.status != 200:
                answer.error = f"status {response.status}: {(await response.text())[:200]}"
            else:
                async for line in response.content:
                    if line.startswith(b"data:"):
                        _take(answer, line.removeprefix(b"data:").strip())
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.perf_counter()
    if not answer.pieces and not answer.error:
        answer.error = "the answer is empty"
    return answer


def _take(answer: Answer, data: bytes) -> None:
    """Read one event of the stream."""
    if data == b"[DONE]":
        return
    event = json.loads(data)
    if "error" in event:
        answer.error = str(event["error"])
        return
    for choice in event.get("choices", ()):
        piece = choice.get("delta", {}).get("content")
        if piece:
            answer.pieces.append(time.perf_counter())
            answer.text += piece
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    usage = event.get("usage")
    if usage:
        answer.tokens = usage["completion_tokens"]
        answer.prompt_tokens = usage["prompt_tokens"]


def summary(answers: Sequence[Answer], count: Any) -> dict[str, Any]:
    """Sum up answers that were asked for together.

    Args:
        count: gives the number of tokens in a text, for servers that do not say how many they produced.
    """
    good = [answer for answer in answers if not answer.error]
    result: dict[str, Any] = {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "errors": sorted({answer.error for answer in answers if answer.error})[:3],
    }
    if not good:
        return result
    seconds = max(answer.ended for answer in answers) - min(answer.began for answer in answers)
    tokens = [count(answer.text) if answer.tokens is None else answer.tokens for answer in good]
    gaps = [after - before for answer in good for before, after in pairwise(answer.pieces)]
    return result | {
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "tokens": sum(tokens),
        "tokens_counted": "by the server" if good[0].tokens is not None else "from the text",
        "tokens_per_second": sum(tokens) / seconds,
        "tokens_per_piece": sum(tokens) / sum(len(answer.pieces) for answer in good),
        "first_token_seconds": _percentiles([answer.pieces[0] - answer.began for answer in good]),
        "between_tokens_seconds": _percentiles(gaps),
        # What shows that all servers did the same work.
        "same_prompt_tokens": sum(answer.prompt_tokens in (None, answer.prompt.tokens) for answer in good),
        "same_answers": sum(answer.text == answer.prompt.answer for answer in good),
        "finish_reasons": _counted([answer.finish_reason for answer in good]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """Give median and 95th percentile."""
    return {name: float(np.percentile(values, of)) for name, of in (("p50", 50), ("p95", 95))} if values else {}


def _counted(values: Sequence[str | None]) -> Mapping[str, int]:
    return {str(value): list(values).count(value) for value in dict.fromkeys(values)}
