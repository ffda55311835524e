"""Runs llmforge's commands as a user does: in this process where that is enough, and as a program of its own."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TOKEN = "hf_" + "TestTokenOfNobody" * 2
SMALL_LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error message, its lines joined."""
        lines = self.err[self.err.index("error: ") :].splitlines()
        return " ".join(line.strip() for line in lines)


def llmforge(*arguments: object, stdin: str = "") -> Outcome:
    """Run a command in this process. A stack trace is a failure, whatever the exit code."""
    from llmforge.cli import main

    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["llmforge", *map(str, arguments)], io.StringIO(stdin)
    code: Any = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, sys.stdin = before
    assert isinstance(code, int)
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return Outcome(code, out.getvalue(), err.getvalue())


def program(
    *arguments: object, environment: Mapping[str, str] | None = None, prefix: Sequence[str] = (), **options: Any
) -> Outcome:
    """Run Python with the given arguments in a process of its own, such as `-m llmforge validate config.yaml`."""
    done = subprocess.run(
        [*prefix, sys.executable, *map(str, arguments)],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def write_config(directory: Path, model: object, **changes: Any) -> Path:
    """Write the config of a small LoRA run on `train.jsonl`; a change to None leaves the key out."""
    config = {
        "model_id": str(model),
        "train_path": "train.jsonl",
        "task": "instruction_tuning",
        "context_length": 128,
        "num_epochs": 1,
        "train_batch_size_per_device": 8,
        "learning_rate": 1e-3,
        "dtype": "fp32",
        "lora_config": SMALL_LORA,
        "custom_model_tag": "test",
        "output_dir": str(directory / "runs"),
        "cache_dir": str(directory / "cache"),
        **changes,
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}, sort_keys=False))
    return path
