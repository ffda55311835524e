"""What the benchmark knows of every program: how its environment is made, and how a case becomes a command.

A program trains in a process of its own, with a Python of its own. It must not see another program's packages.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring.work import Case

BENCHMARKS = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("BENCH_CACHE") or BENCHMARKS.parent / ".cache" / "bench").resolve()
INSIDE = BENCHMARKS / "peers" / "inside"
TORCH = "2.13.0"


class NotInstalledError(Exception):
    """A program cannot be installed on this machine; the text says why."""


class NotPossibleError(Exception):
    """A program cannot do a case; the text says why."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment that is made on demand.

    `requirements` come after torch, `constraints` hold back what they would bring. `without` is uninstalled again, and
    `stubs` are empty modules in the place of packages that are imported but not needed. `variables` are set while pip
    runs. `torch` is False for a program that does not compute with it.
    """

    name: str
    requirements: Sequence[str]
    constraints: Sequence[str] = ()
    without: Sequence[str] = ()
    stubs: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    torch: bool = True

    def python(self) -> Path:
        """Give the interpreter, making the environment where it is not there yet.

        `BENCH_PYTHON_<NAME>` names an interpreter that has the program already, for machines without a network.

        Raises:
            NotInstalledError: pip refused, or the packages do not fit together.
        """
        given = os.environ.get(f"BENCH_PYTHON_{self.name.upper().replace('-', '_')}")
        if given:
            return Path(given)
        directory = CACHE / "venvs" / self.name
        python = directory / "bin" / "python"
        parts = [self.requirements, self.constraints, self.without, self.stubs]
        parts += [self.variables] if self.variables else []
        recipe = json.dumps([TORCH, *map(str, parts)])
        marker = directory / "recipe.json"
        if marker.is_file() and marker.read_text() == recipe:
            return python
        print(f"installing {self.name} …", file=sys.stderr, flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        log = directory.with_suffix(".log")
        with open(log, "w") as output:

            def run(*command: str | Path) -> None:
                done = subprocess.run([*map(str, command)], stdout=output, stderr=subprocess.STDOUT, env=environment)
                if done.returncode:
                    output.flush()
                    raise NotInstalledError(last_error(log.read_text(errors="replace")))

            constraints = directory / "constraints.txt"
            constraints.write_text("".join(f"{line}\n" for line in (f"torch=={TORCH}", *self.constraints)))
            environment = {
                **os.environ,
                "PIP_CONSTRAINT": str(constraints),
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                **self.variables,
            }
            environment.pop("PYTHONPATH", None)
            run(sys.executable, "-m", "venv", directory)
            # torch comes first: everything else then accepts the build that is there.
            if self.torch:
                run(python, "-m", "pip", "install", "torch")
            run(python, "-m", "pip", "install", *self.requirements)
            if self.without:
                run(python, "-m", "pip", "uninstall", "-y", *self.without)
            for name, text in self.stubs.items():
                (site,) = directory.glob("lib/python*/site-packages")
                target = site / f"{name}.py"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)
        marker.write_text(recipe)
        return python


@dataclass(frozen=True)
class Command:
    """What to start: the words after the interpreter, and variables to set."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A program, or a way to use it, as one line of the results.

    `key` names it on the command line, `title` in the results. `packages` are those whose versions are recorded.
    """

    key: str
    title: str
    environment: Environment | None = None
    packages: Sequence[str] = ("torch", "transformers", "peft")
    modes: Sequence[str] = ("tuned", "quickstart")

    def python(self) -> Path:
        """Give the interpreter that has this program."""
        return Path(sys.executable) if self.environment is None else self.environment.python()

    def command(self, case: Case) -> Command:
        """Write what the program needs into `case.directory`, and say how to start it.

        Raises:
            NotPossibleError: the program has no way to do this case.
        """
        raise NotImplementedError

    def losses(self, case: Case, log: str) -> list[float]:
        """Give the training loss of every optimizer step, or only their mean where a program's defaults say no more.

        Most programs print what transformers' Trainer prints.
        """
        number = r"'?([\d.]+(?:e[-+]?\d+)?)"
        every = re.findall(rf"'loss': {number}", log) if case.mode == "tuned" else []
        return [float(loss) for loss in every or re.findall(rf"'?train_loss'?\s*[:=]\s*{number}", log)[-1:]]

    def steps(self, case: Case) -> list[dict[str, Any]] | None:
        """Give time (s since 1970), tokens and trained tokens of every step; None has the probe's taken instead."""
        return None

    def note(self, case: Case) -> str:
        """Say what about this program's work in a case is not the same as the others'."""
        return ""


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Ask an interpreter for the versions of packages; those that it does not have are left out."""
    program = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.name.lower(): d.version for d in m.distributions() if d.name}\n"
        "print(json.dumps({p: found[p] for p in sys.argv[1:] if p in found}))"
    )
    done = subprocess.run([python, "-c", program, *packages], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def run_once(python: Path, script: Path, source: Path, target: Path) -> None:
    """Convert a model for a program, unless it has been done; this is not part of what is measured.

    Raises:
        NotPossibleError: the script failed.
    """
    done = target / "done"
    if done.is_file():
        return
    shutil.rmtree(target, ignore_errors=True)
    result = subprocess.run(
        [python, script, source, target], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    if result.returncode:
        raise NotPossibleError(f"its copy of the model cannot be made: {last_error(result.stderr)}")
    done.touch()


def last_error(log: str) -> str:
    """Find the line of a log that says why a program failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [
        line for line in lines if re.match(r"(ERROR: |error: |[\w.]*(Error|Exception|Refused|NotImplemented)\b)", line)
    ]
    line = (telling or lines or ["it printed nothing"])[-1]
    return line if len(line) <= 300 else line[:297] + "…"


def write_json(path: Path, value: Any) -> Path:
    """Write a file that a program reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))
    return path
