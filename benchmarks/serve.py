"""Loads llmforge's server and others with the same requests, and compares throughput, latency and memory.

    python benchmarks/serve.py                                       # everything; half an hour on two cores
    python benchmarks/serve.py --servers llmforge,llama.cpp --clients 16 --merge
    python benchmarks/serve.py --overhead --merge                    # what HTTP adds to the time to the first token
    python benchmarks/serve.py --render                              # the table again, from the results there are

Every server gets the same model (SmolLM2-135M-Instruct, fp32, on the CPU) and the same prompts, one server after
another, each with an environment of its own that is made on demand. Writes results/serve.md and results/serve.json.
"""

import argparse
import dataclasses
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from measuring import chat, load, machine, process
from peers.llmforge import CHATML
from peers.program import CACHE, NotInstalledError, NotPossibleError, last_error, versions
from servers import SERVERS
from servers.server import Server, Start

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "serve.json"
GGUF = Path(os.environ.get("LLMFORGE_REAL_MODEL") or ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.gguf")
FIRST_TOKEN = ROOT / "benchmarks" / "servers" / "inside" / "first_token.py"
PROMPT_FORMAT = {"prompt_format": CHATML, "stopping_sequences": ["<|im_end|>"], "stopping_tokens": []}
OURS, RIVAL = "llmforge", "transformers"
LEVELS = (1, 4, 16)  # clients
REQUESTS_PER_CLIENT, FEWEST_REQUESTS = 3, 8
WARM_UP_TOKENS = 8
CONTEXT = 512  # tokens of a prompt and its answer; where a server asks for it beforehand
OVERHEAD = "overhead"
ROUNDS = 100


def main() -> None:
    options = _options()
    path = options.result
    results: dict[str, Any] = {"runs": [], "servers": {}}
    if (options.merge or options.render) and path.is_file():
        results = json.loads(path.read_text())
    if options.render:
        _render(results, path)
        return
    if not GGUF.is_file():
        sys.exit(f"{GGUF} is missing; `make install-model` fetches it, or LLMFORGE_REAL_MODEL names it")
    results |= {"machine": machine.describe(gpu=False) | {"threads": options.threads}, "max_tokens": options.max_tokens}
    model = chat.build_model(GGUF, PROMPT_FORMAT, CACHE)
    prompts = _prompts(model, options.max_tokens)
    results["prompt_tokens"] = sorted(prompt.tokens for level in prompts.values() for prompt in level)
    if options.overhead:
        results[OVERHEAD] = _overhead(chat.build_first_layer(model, PROMPT_FORMAT), prompts[1], options)
        _write(results, path)
        _render(results, path)
        return
    for key in options.servers:
        server = SERVERS[key]
        record: dict[str, Any] = {"title": server.title, "note": server.note, "versions": {}}
        results["servers"][key] = record
        try:
            record["versions"] = versions(server.python(), server.packages)
            for run in _measure(server, model, prompts, options):
                results["runs"] = [r for r in results["runs"] if (r["server"], r["clients"]) != (key, run["clients"])]
                results["runs"].append(run)
                print(f"{datetime.now():%H:%M:%S} {key} {_summary(run)}", file=sys.stderr, flush=True)
                _write(results, path)
        except (NotInstalledError, NotPossibleError) as error:
            record["error"] = str(error)
            _write(results, path)
            print(f"{key}: {error}", file=sys.stderr)
    _render(results, path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def servers(text: str) -> list[str]:
        wrong = [key for key in text.split(",") if key not in SERVERS]
        if wrong:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}; allowed: {', '.join(SERVERS)}")
        return text.split(",")

    def levels(text: str) -> list[int]:
        numbers = [int(number) for number in text.split(",")]
        if not set(numbers) <= set(LEVELS):
            raise argparse.ArgumentTypeError(f"{text}; allowed: {', '.join(map(str, LEVELS))}")
        return numbers

    parser.add_argument("--servers", type=servers, default=list(SERVERS), help=f"some of {','.join(SERVERS)}")
    parser.add_argument("--clients", type=levels, default=list(LEVELS), help=f"some of {','.join(map(str, LEVELS))}")
    parser.add_argument("--max-tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--threads", type=int, default=2, help="of every server")
    parser.add_argument("--limit", type=float, default=180, help="seconds until a server must be ready")
    parser.add_argument("--overhead", action="store_true", help="only measure what HTTP adds to the first token")
    parser.add_argument("--merge", action="store_true", help="keep what the results have of other servers and clients")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON file; the table lies beside it")
    return parser.parse_args()


def _prompts(model: Path, max_tokens: int) -> dict[int, list[chat.Prompt]]:
    """Give each number of clients its prompts, and 0 those to warm up with: none twice, so that no cache knows them."""
    sizes = {0: 2 * max(LEVELS), **{clients: _requests(clients) for clients in LEVELS}}
    prompts = iter(chat.build_prompts(model, sum(sizes.values()), max_tokens, CACHE))
    return {clients: [next(prompts) for _ in range(size)] for clients, size in sizes.items()}


def _requests(clients: int) -> int:
    return max(FEWEST_REQUESTS, REQUESTS_PER_CLIENT * clients)


def _measure(
    server: Server, model: Path, prompts: Mapping[int, Sequence[chat.Prompt]], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Start a server, load it with each number of clients, and give what came out.

    Raises:
        NotInstalledError, NotPossibleError: it does not run here; the text says why.
    """
    count = _counter(model)
    with _serving(server, model, prompts[0][0], options) as served:
        for clients in options.clients:
            # As many as will ask, so that memory and kernels for this many are there.
            served.ask(prompts[0][-clients:], clients, WARM_UP_TOKENS)
            cpu = time.process_time()
            answers = served.ask(prompts[clients], clients, options.max_tokens)
            cpu = time.process_time() - cpu
            yield {
                "server": server.key,
                "clients": clients,
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                **load.summary(answers, count),
                "asking_cpu_seconds": cpu,
                "peak_bytes": served.program.peak.together,
                "ready_seconds": served.ready_seconds,
                "first_answer_seconds": served.first_answer_seconds,
            }


@dataclasses.dataclass(frozen=True)
class Served:
    """A server that is ready, and the seconds from its start to the first `/health` and to the first short answer."""

    start: Start
    name: str
    program: process.Running
    ready_seconds: float
    first_answer_seconds: float

    def ask(self, prompts: Sequence[chat.Prompt], clients: int, max_tokens: int) -> list[load.Answer]:
        return load.ask(self.start.base, self.name, prompts, clients=clients, max_tokens=max_tokens)


@contextmanager
def _serving(server: Server, model: Path, first: chat.Prompt, options: argparse.Namespace) -> Iterator[Served]:
    """Start a server and end it.

    Raises:
        NotInstalledError, NotPossibleError: it does not start here, or does not answer; the text says why.
    """
    python = server.python()
    directory = CACHE / "runs" / f"{server.key}-{time.time():.0f}"
    directory.mkdir(parents=True)
    start = Start(model, GGUF, directory, _free_port(), options.threads, max(LEVELS), CONTEXT)
    try:
        command = server.command(start)
        environment = _environment(options.threads, directory) | dict(command.environment)
        words = [str(python), *command.arguments]
        with process.running(words, environment=environment, directory=directory) as program:
            _wait(start, program, options.limit)
            ready = time.time() - program.began
            name = server.model_name(start)
            (answer,) = load.ask(start.base, name, [first], clients=1, max_tokens=WARM_UP_TOKENS)
            if answer.error:
                raise NotPossibleError(f"{answer.error}; {last_error(program.log.read_text(errors='replace'))}")
            yield Served(start, name, program, ready, time.time() - program.began)
    finally:
        shutil.rmtree(directory)


def _wait(start: Start, program: process.Running, limit: float) -> None:
    """Return when the server says that it is ready."""
    while time.time() - program.began < limit:
        if program.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{start.base}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.05)
    ended = program.process.poll()
    state = f"not ready after {limit:.0f} s" if ended is None else f"it ended with exit code {ended}"
    raise NotPossibleError(f"{state}: {last_error(program.log.read_text(errors='replace'))}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _environment(threads: int, directory: Path) -> dict[str, str]:
    """Give the variables of a server: nothing is asked of a network."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in inherited if entry),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(directory / "hf"),
        "DO_NOT_TRACK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _counter(model: Path) -> Callable[[str], int]:
    """Give a function that counts the tokens of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _overhead(model: Path, prompts: Sequence[chat.Prompt], options: argparse.Namespace) -> dict[str, Any]:
    """Compare the time to the first token over HTTP with that of the engine under it, in turns and in one process.

    Args:
        model: one that computes so little that its time varies by less than what is measured.
    """
    directory = CACHE / "runs" / f"first-token-{time.time():.0f}"
    directory.mkdir(parents=True)
    try:
        (directory / "prompts.json").write_text(json.dumps([prompt.messages for prompt in prompts]))
        done = subprocess.run(
            [sys.executable, FIRST_TOKEN, model, directory / "prompts.json", str(ROUNDS)],
            env=_environment(options.threads, directory),
            capture_output=True,
            text=True,
        )
    finally:
        shutil.rmtree(directory)
    if done.returncode:
        sys.exit(f"it fails: {last_error(done.stderr)}")
    direct, served = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    added = [there - here for there, here in zip(served, direct, strict=True)]
    low, middle, high = np.percentile(added, (25, 50, 75))
    return {
        "prompts": len(prompts),
        "rounds": ROUNDS,
        "direct_seconds": statistics.median(direct),
        "served_seconds": statistics.median(served),
        "added_seconds": {"p25": float(low), "p50": float(middle), "p75": float(high)},
    }


def _summary(run: Mapping[str, Any]) -> str:
    if "tokens" not in run:
        return f"{run['clients']:2d} clients: {run['failed']} of {run['requests']} failed: {'; '.join(run['errors'])}"
    first, between = run["first_token_seconds"], run["between_tokens_seconds"]
    return (
        f"{run['clients']:2d} clients: {run['requests_per_second']:.2f} requests/s, {run['tokens_per_second']:.0f} "
        f"tokens/s, first token {_pair(first)} ms, between tokens {_pair(between)} ms, "
        f"{run['peak_bytes'] / 2**30:.2f} GiB, {run['failed']} failed, "
        f"{run['same_answers']} of {run['requests']} answers as generate's"
    )


def _write(results: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def _render(results: Mapping[str, Any], path: Path) -> None:
    path.with_suffix(".md").write_text("\n".join(_page(results)) + "\n")
    print(path.with_suffix(".md"))


def _page(results: Mapping[str, Any]) -> Iterator[str]:
    about, runs = results["machine"], results["runs"]
    yield "# llmforge's server and others under load"
    yield ""
    yield "`python benchmarks/serve.py`; what is measured: [docs/benchmarks.md](../../docs/benchmarks.md#servers)."
    yield ""
    days = sorted({run["when"][:10] for run in runs})
    lengths = results["prompt_tokens"]
    yield (
        f"{about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB, {about['system']}, Python "
        f"{about['python']}, {about['threads']} threads for every server; {' – '.join(dict.fromkeys(days))}. "
        f"SmolLM2-135M-Instruct in fp32, prompts of {lengths[0]} to {lengths[-1]} tokens (median "
        f"{lengths[len(lengths) // 2]}), answers of {results['max_tokens']} tokens, greedy, streamed."
    )
    for clients in sorted({run["clients"] for run in runs}):
        yield from ("", f"## {clients} client{'s' if clients > 1 else ''}", "")
        yield from _table(results, [run for run in runs if run["clients"] == clients])
    yield from ("", "## Start and memory", "")
    yield "| server | ready after s | first answer after s | peak GiB | versions |"
    yield "|---|---|---|---|---|"
    for key, server in results["servers"].items():
        mine = [run for run in runs if run["server"] == key]
        named = ", ".join(f"{name} {number}" for name, number in server["versions"].items())
        if not mine:
            yield f"| {server['title']} | – {server.get('error', 'not measured')} | | | {named} |"
            continue
        peak = max(run["peak_bytes"] for run in mine)
        yield (
            f"| {server['title']} | {mine[-1]['ready_seconds']:.1f} | {mine[-1]['first_answer_seconds']:.1f} "
            f"| {peak / 2**30:.2f} | {named} |"
        )
    if OVERHEAD in results:
        over = results[OVERHEAD]
        added = " / ".join(f"{seconds * 1e3:.1f}" for seconds in over["added_seconds"].values())
        yield from ("", "## What HTTP adds to the first token", "")
        yield (
            f"The model's embeddings, first layer and head only; {over['prompts']} prompts, {over['rounds']} times "
            f"each, one at a time, in turns: medians {over['direct_seconds'] * 1e3:.1f} ms from the engine, "
            f"{over['served_seconds'] * 1e3:.1f} ms over HTTP; quartiles of the difference: {added} ms."
        )
    notes = [f"* {server['title']}: {server['note']}." for server in results["servers"].values() if server["note"]]
    if notes:
        yield from ("", "## Not the same", "", *notes)


def _table(results: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "| server | requests/s | output tokens/s | ÷ transformers serve | first token ms, p50 / p95 "
        "| between tokens ms, p50 / p95 | tokens per piece | failed | answers as `generate`'s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    rates = {run["server"]: run.get("tokens_per_second") for run in runs}
    for run in sorted(runs, key=lambda run: -(run.get("tokens_per_second") or 0)):
        title = results["servers"][run["server"]]["title"]
        if not rates[run["server"]]:
            yield f"| {title} | – {'; '.join(run['errors'])} | | | | | | {run['failed']} of {run['requests']} | |"
            continue
        ratio = f"{rates[run['server']] / rates[RIVAL]:.2f}" if rates.get(RIVAL) else "–"
        yield (
            f"| {title} | {run['requests_per_second']:.2f} | {run['tokens_per_second']:.0f} | {ratio} "
            f"| {_pair(run['first_token_seconds'])} | {_pair(run['between_tokens_seconds'])} "
            f"| {run['tokens_per_piece']:.2f} | {run['failed']} of {run['requests']} "
            f"| {run['same_answers']} of {run['requests']} |"
        )


def _pair(seconds: Mapping[str, float]) -> str:
    return " / ".join(f"{value * 1e3:.0f}" for value in seconds.values()) or "–"


if __name__ == "__main__":
    main()
