"""Fuzzes the server in three ways, and writes benchmarks/results/fuzz.md: `make fuzz`.

    PYTHONPATH=tests:benchmarks python -m fuzz [--examples 300] [--requests 10000] [--runs 200000]

The first two ask a server of a tiny model in a process of its own, over HTTP.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx

from chat_templates import REASONING_AND_TOOLS
from conftest import save_model
from fuzz.driver import fault_of
from fuzz.mutations import request
from measuring.machine import describe

REPORT = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.md"
SLOW = 10  # seconds that no answer of a few tokens may take
# Not every body of the right shape can be answered: messages have an order, and a context is so long. Embeddings never.
LEFT_OUT = "positive_data_acceptance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300, help="of schemathesis, for each endpoint")
    parser.add_argument("--requests", type=int, default=10_000, help="with something changed")
    parser.add_argument("--runs", type=int, default=200_000, help="of atheris")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with serving(directory) as url:
            found = [by_schema(url, directory, options.examples), by_changes(url, options.requests)]
        found.append(by_coverage(directory, options.runs))
    machine = describe(gpu=False)
    lines = [
        "# Fuzzing of the server",
        "",
        f"`make fuzz`, {datetime.now():%Y-%m-%d}, {machine['processor']}, {machine['cores']} cores.",
        "",
        "| way | cases | failed | seconds |",
        "|---|---|---|---|",
        *(f"| {way} | {cases:,} | {len(faults)} | {seconds:,.0f} |" for way, cases, faults, seconds in found),
    ]
    faults = [fault for *_, faults, _ in found for fault in faults]
    if faults:
        lines += ["", "What failed:", "", *(f"* {fault}" for fault in faults[:20])]
    print("\n".join(lines))
    REPORT.write_text("\n".join(lines) + "\n")
    sys.exit(1 if faults else 0)


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    """Serve a tiny model; give the URL. At the end the server has to shut down as it should, without a stack trace."""
    model = save_model(directory / "model", chat_template=REASONING_AND_TOOLS)
    command = [sys.executable, "-m", "llmforge", "serve", f"tiny={model}", "--port", "0", "--dtype", "fp32"]
    command += ["--dynamic-adapters", str(directory)]
    log = directory / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            assert said, log.read_text()
            yield said.split()[-1].removesuffix("/v1")
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0, log.read_text()
        finally:
            server.kill()
    assert "Traceback" not in log.read_text(), log.read_text()


Found = tuple[str, int, list[str], float]


def by_schema(url: str, directory: Path, examples: int) -> Found:
    """Have schemathesis make requests from the server's own schema, right and wrong ones."""
    began = time.monotonic()
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "all"]
    command += ["--exclude-checks", LEFT_OUT, "--max-examples", str(examples), "--continue-on-failure", "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    cases = re.search(r"([\d,]+) generated", done.stdout)
    if done.returncode or cases is None:
        print(done.stdout, done.stderr)
    faults = [] if done.returncode == 0 else re.findall(r"- (ST\d+ .*)", done.stdout) or [done.stdout[-500:]]
    count = 0 if cases is None else int(cases[1].replace(",", ""))
    return "schemathesis, from `/openapi.json`", count, faults, time.monotonic() - began


def by_changes(url: str, count: int) -> Found:
    """Send requests as clients write them, with a few things changed."""
    began = time.monotonic()
    faults = []
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(count):
            path, body = request(random.Random(number))
            sent = time.monotonic()
            try:
                answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
                fault = fault_of(answer.status_code, answer.headers["content-type"], answer.text)
                statuses[answer.status_code] += 1
            except httpx.HTTPError as error:
                fault = f"{type(error).__name__}: {error}"
            if fault is None and time.monotonic() - sent > SLOW:
                fault = f"{time.monotonic() - sent:.0f} seconds"
            if fault is not None:
                faults.append(f"{fault}: {path} {body[:300]!r}")
    told = ", ".join(f"{number:,} of status {status}" for status, number in sorted(statuses.items()))
    return f"requests with something changed ({told})", count, faults, time.monotonic() - began


def by_coverage(directory: Path, runs: int) -> Found:
    """Have atheris change bytes in the direction of code that was not reached yet."""
    began = time.monotonic()
    corpus, words = directory / "corpus", directory / "words"
    corpus.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fuzz.parser", f"-runs={runs}", "-max_len=4096", "-timeout=20", f"-dict={words}"]
    done = subprocess.run([*command, corpus], env=environment, capture_output=True, text=True, cwd=directory)
    finished = re.search(r"Done (\d+) runs", done.stderr)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:])
    faults = [] if done.returncode == 0 and finished else [done.stderr[-500:]]
    return "atheris, from bytes", int(finished[1]) if finished else 0, faults, time.monotonic() - began


main()
