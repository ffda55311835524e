"""What README and docs show is true: YAML blocks are valid configs, Python blocks run, tables are current."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from llmforge.config import load_config
from llmforge.config.serve_config import load_serve_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MINIMAL = {"model_id": "some/model", "train_path": "train.jsonl"}


def blocks(language: str) -> list:
    return [
        pytest.param(match[1], id=f"{page.name}:{page.read_text(encoding='utf-8')[: match.start()].count(chr(10)) + 1}")
        for page in PAGES
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    ]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_are_valid_configs(text, tmp_path):
    keys = yaml.safe_load(text)
    if keys.keys() & {"engine_config", "model_loading_config", "applications"}:
        (tmp_path / "serve.yaml").write_text(text, encoding="utf-8")
        assert load_serve_config(tmp_path / "serve.yaml")[0].name == "my-model"
        return
    missing = "".join(f"{key}: {value}\n" for key, value in MINIMAL.items() if key not in keys)
    config = tmp_path / "config.yaml"
    config.write_text(missing + text, encoding="utf-8")
    assert load_config(config).config.model_id


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_run(text):
    compile(text, "block", "exec")
    if "finetune" not in text and "load_run" not in text:  # those are run by the quickstart and the tests of training
        exec(text, {})


CONFIGS = sorted(path for path in (ROOT / "examples").glob("*/*.yaml") if path.parent.name != "cluster")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_example_configs_are_valid(config):
    assert load_config(config).config.train_path


def test_configuration_page_is_current():
    page = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page, (
        "run python docs/make_configuration.py"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_shown_exist(page):
    import typer

    from llmforge.cli.app import app

    known = set(typer.main.get_command(app).commands)
    shown = "".join(re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S))
    for command in re.findall(r"^(?:\.venv/bin/)?llmforge ([a-z-]+)", shown, re.M):
        assert command in known, command
