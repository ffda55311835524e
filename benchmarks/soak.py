"""Holds a server under load and bad manners for thousands of requests: nothing that it accepted may be lost, no memory.

    python benchmarks/soak.py [--requests 4000] [--clients 24]

Serves a Llama of 57M random weights. Well-behaved requests ask one of a few prompts, greedily, and have to get the very
answer that it got when nothing else was running. Between them clients leave in the middle of a stream or before an
answer, read nothing for seconds, send half a body, no JSON, wrong fields, prompts longer than the context, and bodies
of many megabytes. Writes results/soak.md.
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from measuring.machine import describe
from startup import build_model

RESULT = Path(__file__).parent / "results" / "soak.md"
CHAT = "/v1/chat/completions"
PROMPTS = ["Hello", "Tell me a story about a fox", "Count to ten. " * 20, "What is the capital of France? " * 40]
LENGTHS = (3, 12, 30)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def body(prompt: int, length: int, **more: Any) -> dict[str, Any]:
    """Ask one of the prompts for an answer of a known length."""
    messages = [{"role": "user", "content": PROMPTS[prompt]}]
    return {"messages": messages, "max_tokens": LENGTHS[length], "temperature": 0, "ignore_eos": True, **more}


class Soak:
    """One run of requests against a server."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.numbers = random.Random(seed)
        self.expected: dict[tuple[int, int], str] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        self.client = httpx.AsyncClient(base_url=url, timeout=120, limits=limits)
        self.kinds: list[tuple[int, str, Callable[[], Awaitable[None]]]] = [
            (30, "answered whole", self.whole),
            (30, "answered as a stream", self.streamed),
            (5, "two answers", self.two),
            (3, "JSON by a schema", self.schema),
            (8, "left in the middle of a stream", self.leave_stream),
            (6, "left before the answer", self.leave_early),
            (2, "read nothing for seconds", self.slow),
            (4, "no JSON", self.no_json),
            (4, "wrong fields", self.wrong_field),
            (4, "longer than the context", self.too_long),
            (2, "half a body", self.half),
            (1, "a body of 9 MB", self.huge),
            (1, "an unknown path", self.lost_path),
        ]

    async def learn(self) -> None:
        """Ask each question alone."""
        for prompt in range(len(PROMPTS)):
            for length in range(len(LENGTHS)):
                answer = await self.client.post(CHAT, json=body(prompt, length))
                self.expected[prompt, length] = answer.json()["choices"][0]["message"]["content"]

    async def run(self, count: int, clients: int) -> None:
        """Send requests of all kinds, so many at a time."""
        weights = [weight for weight, *_ in self.kinds]
        wanted = iter(self.numbers.choices(self.kinds, weights, k=count))

        async def work() -> None:
            for _, name, send in wanted:
                self.counts[name] += 1
                try:
                    await send()
                except Exception as error:
                    self.wrong.append(f"{name}: {type(error).__name__}: {error}")

        await asyncio.gather(*(work() for _ in range(clients)))

    def pick(self) -> tuple[int, int]:
        """Choose a question."""
        return self.numbers.randrange(len(PROMPTS)), self.numbers.randrange(len(LENGTHS))

    def check(self, name: str, found: Any, expected: Any) -> None:
        """Note what is not as it should be."""
        if found != expected:
            self.wrong.append(f"{name}: {found!r:.200} instead of {expected!r:.200}")

    async def post(self, content: dict[str, Any]) -> httpx.Response:
        """Send a request, again where the server says that it has too many."""
        while True:
            answer = await self.client.post(CHAT, json=content)
            if answer.status_code != 429:
                return answer
            self.counts["told to come back (429)"] += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]) * self.numbers.random())

    async def whole(self) -> None:
        question = self.pick()
        answer = await self.post(body(*question))
        self.check("status", answer.status_code, 200)
        self.check("whole", answer.json()["choices"][0]["message"]["content"], self.expected[question])
        self.check("usage", answer.json()["usage"]["completion_tokens"], LENGTHS[question[1]])

    async def two(self) -> None:
        question = self.pick()
        answer = await self.post(body(*question, n=2))
        self.check("two", [c["message"]["content"] for c in answer.json()["choices"]], [self.expected[question]] * 2)

    async def schema(self) -> None:
        schema = {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        }
        response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        content = body(0, 2, response_format=response_format, max_tokens=60)
        del content["ignore_eos"]
        answer = await self.post(content)
        text = answer.json()["choices"][0]["message"]["content"]
        if answer.json()["choices"][0]["finish_reason"] == "stop":
            self.check("schema", json.loads(text)["a"] in (1, 2), True)

    async def streamed(self) -> None:
        question = self.pick()
        text, status = await self.read(question, asyncio.sleep(0))
        if status == 429:
            self.counts["told to come back (429)"] += 1
        else:
            self.check("stream", text, self.expected[question])

    async def slow(self) -> None:
        question = (self.numbers.randrange(len(PROMPTS)), len(LENGTHS) - 1)
        text, status = await self.read(question, asyncio.sleep(self.numbers.uniform(1, 4)))
        if status != 429:
            self.check("slow reader", text, self.expected[question])

    async def read(self, question: tuple[int, int], pause: Awaitable[None]) -> tuple[str, int]:
        """Read a stream to its end, after a pause behind the first chunk."""
        text, ended, paused = "", False, False
        async with self.client.stream("POST", CHAT, json=body(*question, stream=True)) as answer:
            async for line in answer.aiter_lines():
                if not paused:
                    paused = True
                    await pause
                ended = ended or line == "data: [DONE]"
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise RuntimeError(chunk["error"])
                    text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if not paused:
                await pause
        if answer.status_code == 200:
            self.check("end of a stream", ended, True)
        return text, answer.status_code

    async def leave_stream(self) -> None:
        leave_after = self.numbers.randrange(1, 12)
        async with self.client.stream("POST", CHAT, json=body(0, 2, stream=True, max_tokens=400)) as answer:
            async for _ in answer.aiter_lines():
                leave_after -= 1
                if not leave_after:
                    return

    async def leave_early(self) -> None:
        try:
            async with asyncio.timeout(self.numbers.uniform(0.0, 0.3)):
                await self.client.post(CHAT, json=body(*self.pick(), max_tokens=400))
        except TimeoutError:
            return

    async def no_json(self) -> None:
        content = self.numbers.choice([b"", b"{", b"[1", b"\xff\xfe", b'{"messages": NaN}', b"[" * 5000, b'"text"'])
        answer = await self.client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        self.check("no JSON", answer.status_code, 400)

    async def wrong_field(self) -> None:
        wrong = self.numbers.choice(
            [
                {"temperature": "hot"},
                {"max_tokens": -1},
                {"max_tokens": 10**30},
                {"messages": [{"role": "wizard", "content": "?"}]},
                {"messages": []},
                {"n": 0},
                {"stop": [None]},
                {"logit_bias": {"x": 1}},
                {"no_such_field": 1},
                {"top_p": 2},
            ]
        )
        answer = await self.client.post(CHAT, json={**body(0, 0), **wrong})
        self.check("wrong fields", (answer.status_code, bool(answer.json()["error"]["message"])), (400, True))

    async def too_long(self) -> None:
        messages = [{"role": "user", "content": "word " * 60_000}]
        answer = await self.client.post(CHAT, json={**body(0, 0), "messages": messages})
        found = answer.status_code, answer.json()["error"]["code"]
        self.check("longer than the context", found, (400, "context_length_exceeded"))

    async def half(self) -> None:
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST " + CHAT.encode() + b' HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"messages": [')
        await writer.drain()
        await asyncio.sleep(self.numbers.random())
        writer.close()

    async def huge(self) -> None:
        answer = await self.client.post(CHAT, content=b'{"messages": "' + b"x" * (9 << 20) + b'"}')
        self.check("9 MB", answer.status_code, 413)

    async def lost_path(self) -> None:
        answer = await self.client.get("/v1/nothing/here")
        self.check("an unknown path", answer.status_code, 404)


async def soak(url: str, server: psutil.Process, count: int, clients: int) -> tuple[Soak, list[int], float]:
    """Run the requests; give what was seen, the server's memory on the way (bytes), and the seconds."""
    run = Soak(url, seed=1)
    await run.learn()
    await run.run(max(200, count // 10), clients)  # buffers, caches and threads are there after this
    memory = [server.memory_info().rss]
    run.counts.clear()
    began = time.perf_counter()
    for _ in range(8):
        await run.run(count // 8, clients)
        memory.append(server.memory_info().rss)
        print(f"{datetime.now():%H:%M:%S} {memory[-1] / 1e6:,.0f} MB", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    await asyncio.sleep(2)
    metrics = (await run.client.get("/metrics")).text
    for line in metrics.splitlines():
        if line.startswith(("llmforge_running", "llmforge_waiting")) and not line.endswith(" 0.0"):
            run.wrong.append(f"something is still going on: {line}")
    await run.client.aclose()
    return run, memory, seconds


def main() -> None:
    """Start a server, run the requests, stop it, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4_000)
    parser.add_argument("--clients", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = build_model(Path(name) / "model")
        (model / "chat_template.jinja").write_text(TEMPLATE)
        command = [sys.executable, "-m", "llmforge", "serve", str(model), "--port", "0", "--dtype", "fp32"]
        log = Path(name) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            url = wait_until_ready(process, log)
            found, memory, seconds = asyncio.run(
                soak(url, psutil.Process(process.pid), options.requests, options.clients)
            )
            process.send_signal(signal.SIGTERM)
            found.check("exit code after SIGTERM", process.wait(60), 0)
        finally:
            process.kill()
        if "Traceback" in log.read_text():
            found.wrong.append(f"the server's log has a stack trace:\n{log.read_text()[-3000:]}")
    text = report(found, memory, seconds, options.clients)
    print(text)
    RESULT.write_text(text)
    sys.exit(1 if found.wrong else 0)


def wait_until_ready(process: subprocess.Popen, log: Path) -> str:
    """Give the server's address, which it says when it is ready."""
    while process.poll() is None:
        for word in log.read_text().split():
            if word.startswith("http://") and word.endswith("/v1"):
                return word.removesuffix("/v1")
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def report(found: Soak, memory: list[int], seconds: float, clients: int) -> str:
    """Write what was seen."""
    machine = describe(gpu=False)
    total = sum(n for name, n in found.counts.items() if not name.startswith("told"))
    lines = [
        "# Soak of the server",
        "",
        f"`python benchmarks/soak.py`, {datetime.now():%Y-%m-%d}, {machine['processor']}, {machine['cores']} cores.",
        f"{total:,} requests by {clients} clients in {seconds:,.0f} s. Lost or wrong: {len(found.wrong)}.",
        "",
        "Memory of the server, in MB, at the start (after a tenth as many requests) and after every eighth: "
        + ", ".join(f"{value / 1e6:,.0f}" for value in memory)
        + ".",
        "",
        "| requests | |",
        "|---|---|",
        *(f"| {name} | {number:,} |" for name, number in found.counts.most_common()),
    ]
    if found.wrong:
        lines += ["", "What went wrong:", "", *(f"* {text}" for text in found.wrong[:20])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
