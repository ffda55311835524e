"""Runs of the tiny models, in this process and as the console script, for the tests of training and of the artifact."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from conftest import QUESTIONS
from llmforge.config import load_config
from llmforge.jobs.finetune import finetune, resume
from llmforge.jobs.run import Run

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
COLOURS = [([{"role": "user", "content": f"What does {colour} mean?"}], answer) for colour, answer in QUESTIONS.items()]


class Listener:
    """Remembers what a run reports."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def event(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, rows_done: int) -> None:
        pass

    def of(self, event: str, field: str) -> list[Any]:
        """Give one field of all events of a kind."""
        return [fields[field] for fields in self.events if fields["event"] == event]


def write_config(data_dir: Path, model: Path, **keys: Any) -> Path:
    """Write a config over `train.jsonl` of a directory; everything that a run leaves stays in that directory."""
    config = {
        "model_id": str(model),
        "train_path": str(data_dir / "train.jsonl"),
        "task": "instruction_tuning",
        "num_epochs": 1,
        "train_batch_size_per_device": 8,
        "num_warmup_steps": 0,
        "dtype": "fp32",
        "data_workers": 1,
        "cache_dir": str(data_dir / "cache"),
        "output_dir": str(data_dir / "runs"),
        "custom_model_tag": "run",
        **keys,
    }
    path = data_dir / f"{config['custom_model_tag']}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def run_here(data_dir: Path, model: Path, **keys: Any) -> tuple[Run, Listener]:
    """Fine-tune in this process."""
    listener = Listener()
    run = finetune(load_config(write_config(data_dir, model, **keys)), listener)
    assert run is not None
    return run, listener


def run_config(config: Path) -> None:
    """Start a run; a target for `child`."""
    finetune(load_config(config), Listener())


def resume_run(run_dir: Path) -> None:
    """Continue a run; a target for `child`."""
    resume(run_dir, Listener())


def child(target: Any, path: Path) -> Any:
    """Start a process that can be killed; all of them are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_runs", "llmforge.train.run"])
    process = context.Process(target=target, args=(path,))
    process.start()
    return process


def environment() -> dict[str, str]:
    """Give the environment for a child process: nothing is read from or written to this user's directories."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAY_ADDRESS": os.environ.get("RAY_ADDRESS", "local"),  # and no cluster that happens to run here
    }


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Start the console script."""
    command = [sys.executable, "-m", "llmforge", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **{**pipes, **options})


def command(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the console script to its end."""
    process = start(*arguments, stdin=subprocess.PIPE)
    out, err = process.communicate(stdin, timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def plain_python(program: str, *arguments: str | Path) -> Any:
    """Run a program in a fresh Python without llmforge on its path, and give the JSON that it prints."""
    env = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    guard = "import sys; sys.modules['llmforge'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", guard + program, *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tree(directory: Path) -> dict[str, bytes]:
    """Read all files below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
