"""What importing llmforge and starting its commands costs: nothing heavy before it is needed."""

import json
from pathlib import Path

from commands import program

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "pyarrow",
    "numpy",
    "matplotlib",
    "huggingface_hub",
    "rich",
    "fsspec",
    "fastapi",
    "uvicorn",
)

# Each statement is run and followed by the heavy modules that are there since: one interpreter, in order of weight.
PROBE = """
import contextlib, io, json, sys

heavy, seen, loaded = sys.argv[1].split(), set(), {}
for statement in sys.argv[2:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        exec(statement)
    loaded[statement] = [name for name in heavy if name in sys.modules and name not in seen]
    seen.update(loaded[statement])
print(json.dumps(loaded))
"""


def newly_loaded(*statements: str) -> dict[str, list[str]]:
    outcome = program("-c", PROBE, " ".join(HEAVY), *statements)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def command(*arguments: str) -> str:
    return f"sys.argv = ['llmforge', *{list(arguments)}]\nfrom llmforge.cli import main\nmain()"


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    config = Path(__file__).parent / "configs" / "lora_wandb.yaml"
    loaded = newly_loaded(
        "import llmforge",
        command("--help"),
        command("--version"),
        command("finetune", "--help"),
        command("validate", "--config-only", str(config)),
        command("schema"),
        command("serve", "--help"),
        command("anyscale", "finetune", "--help"),
        "from llmforge.prompt import PromptFormat, compile_to_jinja",
        "from llmforge.jobs.display import open_display",
        "from llmforge.jobs.finetune import finetune, resume",
        "from llmforge import load_config, load_run",
    )
    assert {statement: names for statement, names in loaded.items() if names} == {}


def test_looking_for_a_model_imports_no_torch(tmp_path: Path) -> None:
    look = f"with contextlib.suppress(ValueError): find_model('./no', relative_to=Path({str(tmp_path)!r}))"
    loaded = newly_loaded("from pathlib import Path", "from llmforge.models.source import find_model", look)
    assert {name for names in loaded.values() for name in names} <= {"huggingface_hub"}


def test_what_a_program_imports_for_good_is_no_longer_looked_through() -> None:
    program_code = """
import gc
from llmforge.jobs.imports import imports_for_good

with imports_for_good():
    print(gc.isenabled())
    import ast
print(gc.isenabled(), gc.get_freeze_count() > 0)
gc.disable()
with imports_for_good():
    pass
print(gc.isenabled())
"""
    assert program("-c", program_code).out.split() == ["False", "True", "True", "False"]


def test_the_import_contracts_hold() -> None:
    root = Path(__file__).parent.parent
    statement = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    outcome = program("-c", statement, "--no-cache", cwd=root)
    assert outcome.code == 0, outcome.out
