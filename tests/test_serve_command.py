"""`llmforge serve`: a run behind OpenAI's API, from the command line to the signal that ends it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from commands import llmforge, program
from conftest import conversation_rows, write_jsonl
from llmforge.jobs.run import Run
from tiny_runs import LORA, environment, run_here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Run:
    """A small adapter that answers otherwise than its base."""
    directory = tmp_path_factory.mktemp("serve")
    write_jsonl(directory / "train.jsonl", conversation_rows(48))
    return run_here(directory, model_dir, lora_config=LORA, learning_rate=3e-2, num_epochs=2)[0]


@contextmanager
def started(*arguments: str | Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Start `llmforge serve`; give the process, its URL and what it said when it was ready."""
    command = [sys.executable, "-m", "llmforge", "serve", *map(str, arguments), "--port", "0", "--dtype", "fp32"]
    env = {**environment(), **variables}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            said = server.stdout.readline()
            assert said, server.communicate()[1]
            yield server, said.split()[-1], said + server.stdout.readline()
        finally:
            server.kill()


def ask(url: str, model: str, content: str, key: str = "none") -> Any:
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=model, messages=messages, max_tokens=12)


def test_a_run_is_served_with_its_adapter_under_another_name_and_its_base(run: Run, model_dir: Path) -> None:
    adapter = f"again={run.artifact_dir}"
    with started(run.run_dir, f"plain={model_dir}", "--adapter", adapter) as (server, url, said):
        assert said.startswith(f"llmforge serves {run.tag}, plain, again at http://127.0.0.1:")
        for row in conversation_rows(2):
            question = row["messages"][0]["content"]
            answer = run.chat(row["messages"][:1], max_new_tokens=12)
            assert [ask(url, name, question).choices[0].message.content for name in (run.tag, "again")] == [answer] * 2
            assert ask(url, "plain", question).choices[0].message.content != answer
        # The example that it prints works as it stands.
        example = said.splitlines()[1].strip()
        done = subprocess.run(example, shell=True, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"]
        server.send_signal(signal.SIGTERM)
        err = server.communicate(timeout=20)[1]
        assert server.returncode == 0, err
        assert "Traceback" not in err
        assert err.endswith("shutting down\n")


def test_adapters_are_loaded_when_they_are_asked_for(run: Run, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "colours").symlink_to(run.run_dir)
    options = ("--dynamic-adapters", tmp_path, "--max-adapters", "1")
    with started(f"plain={model_dir}", *options, LLMFORGE_API_KEY="the-key") as (_, url, said):
        assert "the-key" not in said
        assert "Authorization: Bearer KEY" in said
        answer = run.chat([{"role": "user", "content": "Red?"}], max_new_tokens=12)
        assert ask(url, "colours", "Red?", key="the-key").choices[0].message.content == answer
        with pytest.raises(openai.NotFoundError, match="there is no model shapes"):
            ask(url, "shapes", "Hello", key="the-key")
        with pytest.raises(openai.AuthenticationError):
            ask(url, "colours", "Hello", key="another")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/run"], "no/such/run"),
        ([".", "--adapter", "path-alone"], "an adapter is given as NAME=PATH"),
        ([".", "--dtype", "int4"], "given --dtype int4; number formats are bf16, fp32"),
        ([".", "--api-key", ""], "an API key is empty"),
        ([".", "--port", "70000"], "65535"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_served(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = llmforge("serve", "--port", "0", *arguments)
    assert outcome.code == 2
    assert words in outcome.err


def test_without_its_packages_it_says_which_to_install() -> None:
    hide = (
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name in ('uvicorn', 'llguidance') else find(name, *rest)\n"
        "sys.argv = ['llmforge', 'serve', '.']\n"
        "from llmforge.cli import main\n"
        "main()"
    )
    outcome = program("-c", hide, environment=dict(os.environ))
    assert outcome.code == 2
    assert outcome.error.startswith(
        "error: llmforge serve needs uvicorn, llguidance; install them with pip install 'llmforge[serve]'"
    )
