"""Models from the hub: what is downloaded, what each refusal says, and that tokens stay secret.

huggingface_hub reads its variables when it is imported, so every hub is asked from a process of its own.
"""

import json
import shutil
from pathlib import Path

import pytest

from commands import TOKEN, program, write_config
from conftest import conversation_rows, write_jsonl
from fake_hub import (
    BROKEN,
    COMMIT,
    FORBIDDEN,
    GATED,
    GATED_FOR_STRANGERS,
    MISSING,
    NO_HUB,
    NO_REVISION,
    PRIVATE,
    fake_hub,
)

FIND = """
import json, sys, time
from pathlib import Path
from llmforge.errors import ModelError
from llmforge.models.source import find_model

answers = {}
for name in sys.argv[1:]:
    model, _, revision = name.partition("@")
    began = time.monotonic()
    try:
        answer = str(find_model(model, relative_to=Path("/"), revision=revision or None).directory)
    except ModelError as error:
        answer = str(error)
    answers[name] = answer, time.monotonic() - began
print(json.dumps(answers))
"""


def find(home: Path, endpoint: str, *models: str, token: str = "", offline: bool = False) -> dict[str, str]:
    """Look for models on a hub; give for each its directory, or the error."""
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": token}
    environment["HF_HUB_OFFLINE"] = "1" if offline else "0"
    outcome = program("-c", FIND, *models, environment=environment)
    assert outcome.code == 0, outcome.err
    assert TOKEN not in outcome.out + outcome.err
    answers = json.loads(outcome.out)
    # A hub that is down is waited for, but not for long.
    assert max(seconds for _, seconds in answers.values()) < 20
    return {model: answer for model, (answer, _) in answers.items()}


@pytest.fixture
def published(tmp_path: Path, model_dir: Path) -> Path:
    """A model as repositories have it: with more than what is needed."""
    directory = tmp_path / "published"
    shutil.copytree(model_dir, directory)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_tiny.py", "onnx/config.json", "photo.jpg"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"not wanted")
    return directory


def test_every_refusal_says_something_else(tmp_path: Path, published: Path) -> None:
    models = {
        "org/tiny": published,
        "org/private": PRIVATE,
        "org/gated": GATED,
        "org/gated-for-strangers": GATED_FOR_STRANGERS,
        "org/forbidden": FORBIDDEN,
        "org/broken": BROKEN,
        "org/unversioned": NO_REVISION,
        "org/website": NO_HUB,
        "org/missing": MISSING,
    }
    with fake_hub(models) as hub:
        stranger = find(
            tmp_path / "home", hub.url, "org/private", "org/gated-for-strangers", "org/missing", "org/broken"
        )
        asked_as_stranger = len(hub.requests)
        assert hub.tokens == {None}
        names = ("org/private", "org/gated", "org/forbidden", "org/unversioned@v9", "org/website", "org--/x")
        known = find(tmp_path / "home", hub.url, *names, token=TOKEN)
        assert {token for _, _, token in hub.requests[asked_as_stranger:]} == {f"Bearer {TOKEN}"}
    for name in ("org/private", "org/gated-for-strangers"):
        assert stranger[name].startswith(f"model_id: the hub does not show {name} to strangers (401)")
        assert f"ask for access on {hub.url}/{name}, and set HF_TOKEN" in stranger[name]
    assert f"no model of that name on {hub.url} (404)" in stranger["org/missing"]
    assert f"the hub at {hub.url} answered 500 for org/broken; try again later" in stranger["org/broken"]
    assert "does not accept the access token that it was given for org/private (401)" in known["org/private"]
    assert f"org/gated is gated and your account has no access yet (403). Ask for it on {hub.url}" in known["org/gated"]
    assert "the access token that is set may not read org/forbidden (403)" in known["org/forbidden"]
    assert "org/unversioned has no revision v9" in known["org/unversioned@v9"]
    assert f"{hub.url} does not answer as a model hub does; set HF_ENDPOINT" in known["org/website"]
    assert "neither a local path nor a possible hub id" in known["org--/x"]
    assert len(set(stranger.values()) | set(known.values())) == len(stranger) + len(known)


def test_only_what_is_needed_is_downloaded_and_the_cache_works_offline(tmp_path: Path, published: Path) -> None:
    home = tmp_path / "home"
    with fake_hub({"org/tiny": published}) as hub:
        directory = Path(find(home, hub.url, "org/tiny")["org/tiny"])
        asked = {path for _, path, _ in hub.requests}
    assert directory.name == COMMIT
    assert all("org/tiny" in path for path in asked)  # nothing is asked for or told that is not about the model
    needed = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert {path.name for path in directory.iterdir()} == needed | {"chat_template.jinja"}
    assert (directory / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    assert not any(path.endswith((".bin", ".py", ".jpg", "consolidated.safetensors")) for path in asked)

    # The hub is gone now: what is in the cache is used, and for anything else the network is named.
    gone = hub.url.replace("http://", "http://me:SecretPassword@")
    answers = find(home, gone, "org/tiny", "org/other")
    assert answers["org/tiny"] == str(directory)
    assert f"the hub at {hub.url} cannot be reached to download it" in answers["org/other"]
    assert "HF_ENDPOINT" in answers["org/other"]
    assert "SecretPassword" not in answers["org/other"]

    answers = find(home, gone, "org/tiny", "org/other", offline=True)
    assert answers["org/tiny"] == str(directory)
    assert "its files are not all in the hub cache" in answers["org/other"]
    assert "HF_HUB_OFFLINE" in answers["org/other"]


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, published: Path) -> None:
    (tmp_path / "file").touch()
    with fake_hub({"org/tiny": published}) as hub:
        answer = find(tmp_path / "file" / "home", hub.url, "org/tiny")["org/tiny"]
    assert "org/tiny cannot be stored in the hub cache" in answer
    assert "HF_HOME" in answer


def test_a_run_on_a_model_from_the_hub_keeps_the_token_secret(tmp_path: Path, published: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(16))
    config = write_config(tmp_path, "org/tiny")
    with fake_hub({"org/tiny": published}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        environment["HF_HUB_OFFLINE"] = "0"
        outcome = program("-m", "llmforge", "finetune", config, "--json", environment=environment)
        assert outcome.code == 0, outcome.err
        assert f"Bearer {TOKEN}" in hub.tokens
    run = Path(json.loads(outcome.out)["run_dir"])
    adapter = json.loads((run / "artifact" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/tiny"
    assert TOKEN not in outcome.out + outcome.err
    assert not {"\x1b", "\r"} & set(outcome.out + outcome.err)  # no progress bars in a pipe
    for file in (file for folder in (run, tmp_path / "cache") for file in folder.rglob("*") if file.is_file()):
        assert TOKEN.encode() not in file.read_bytes(), file


def test_a_models_own_code_is_fetched_and_run_where_the_config_trusts_it(tmp_path: Path, published: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(16))
    settings = json.loads((published / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (published / "config.json").write_text(json.dumps(settings))
    (published / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    with fake_hub({"org/mine": published}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        config = write_config(tmp_path, "org/mine", trust_remote_code=True)
        outcome = program("-m", "llmforge", "validate", config, "--json", environment=environment)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["rows"] == 16
    assert (tmp_path / "ran").is_file()
