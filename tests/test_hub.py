"""Models from the hub: what is downloaded, what each refusal says, and that tokens stay secret.

huggingface_hub reads its variables when it is imported, so every hub is asked from a process of its own.
"""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save, save_file

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
    Request,
    Versions,
    fake_hub,
)

PIECE = 10 << 20  # what huggingface_hub writes to a file at a time

FIND = """
import json, os, sys, time
from pathlib import Path
from llmforge.errors import ModelError
from llmforge.models.source import find_model

options = {"relative_to": Path("/"), "allow_pickle_weights": os.environ.get("PICKLES", "").split()}
answers = {}
for name in sys.argv[1:]:
    model, _, revision = name.partition("@")
    began = time.monotonic()
    try:
        answer = str(find_model(model, revision=revision or None, **options).directory)
    except ModelError as error:
        answer = str(error)
    answers[name] = answer, time.monotonic() - began
print(json.dumps(answers))
"""


def find(
    home: Path, endpoint: str, *models: str, token: str = "", offline: bool = False, **variables: str
) -> dict[str, str]:
    """Look for models on a hub; give for each its directory, or the error."""
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": token}
    environment["HF_HUB_OFFLINE"] = "1" if offline else "0"
    outcome = program("-c", FIND, *models, environment={**environment, **variables})
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
        assert {request.authorization for request in hub.requests[asked_as_stranger:]} == {f"Bearer {TOKEN}"}
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
        asked = {request.path for request in hub.requests if request.host == hub.url}
        assert {Path(request.path).name for request in hub.stored} == {"model.safetensors"}
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


def files_asked_for(requests: Iterable[Request]) -> list[str]:
    """Give the names of the files that were downloaded."""
    return [Path(request.path).name for request in requests if request.method == "GET" and "/api/" not in request.path]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_with_another_content_than_announced_is_not_kept(tmp_path: Path, published: Path, name: str) -> None:
    home = tmp_path / "home"
    with fake_hub({"org/tiny": published}) as hub:
        hub.damaged = name  # of the same length
        answer = find(home, hub.url, "org/tiny")["org/tiny"]
        assert f"{name} of org/tiny came with another content than the hub announced (the hash differs)" in answer
        assert "run again" in answer
        assert not any(path.name == name for path in home.rglob("*"))
        again = len(hub.requests)
        hub.damaged = ""
        directory = Path(find(home, hub.url, "org/tiny")["org/tiny"])
        assert (directory / name).read_bytes() == (published / name).read_bytes()
        assert "config.json" not in files_asked_for(hub.requests[again:])  # whole files were kept

        # Another start asks for nothing but the commit.
        again = len(hub.requests)
        assert find(home, hub.url, "org/tiny")["org/tiny"] == str(directory)
        assert [request.path for request in hub.requests[again:]] == ["/api/models/org/tiny/revision/main"]

        # What was checked once is not read again at every start; a file may also be changed on purpose.
        (directory / name).write_bytes((published / name).read_bytes() + b" ")
        assert "the hash differs" not in find(home, hub.url, "org/tiny")["org/tiny"]


def test_a_file_of_another_length_than_announced(tmp_path: Path, published: Path) -> None:
    with fake_hub({"org/tiny": published}) as hub:
        hub.short = "model.safetensors"
        answer = find(tmp_path / "home", hub.url, "org/tiny")["org/tiny"]
        assert "model.safetensors of org/tiny came with another length than the hub announced; run again" in answer
        assert "space" not in answer
        hub.short = ""
        assert Path(find(tmp_path / "home", hub.url, "org/tiny")["org/tiny"]).is_dir()


@pytest.fixture
def large(published: Path) -> Path:
    """A model whose weights are downloaded in several pieces, which are of ten megabytes."""
    save_file({"weight": np.arange(6_000_000, dtype=np.float32)}, published / "model.safetensors")
    return published


def test_a_file_that_is_cut_half_way_is_continued(tmp_path: Path, large: Path) -> None:
    with fake_hub({"org/tiny": large}) as hub:
        hub.cuts = 1
        directory = Path(find(tmp_path / "home", hub.url, "org/tiny")["org/tiny"])
        first, second = (request.part for request in hub.stored)
    assert first is None
    assert second == f"bytes={PIECE}-"
    assert (directory / "model.safetensors").read_bytes() == (large / "model.safetensors").read_bytes()


def test_after_a_lost_connection_the_next_run_goes_on(tmp_path: Path, large: Path) -> None:
    home = tmp_path / "home"
    with fake_hub({"org/tiny": large}) as hub:
        hub.lost = "tokenizer.json"
        answer = find(home, hub.url, "org/tiny")["org/tiny"]
        assert f"the connection to {hub.url} was lost while files of org/tiny were downloaded; run again" in answer
        hub.lost = "model.safetensors"
        answer = find(home, hub.url, "org/tiny")["org/tiny"]
        assert (
            "the connection was lost while model.safetensors of org/tiny was downloaded; run again to go on" in answer
        )
        hub.lost = ""
        lost = len(hub.requests)
        directory = Path(find(home, hub.url, "org/tiny")["org/tiny"])
        assert files_asked_for(hub.requests[lost:]).count("model.safetensors") == 2  # the hub, then the store
        assert hub.stored[-1].part == f"bytes={PIECE}-"
    assert (directory / "model.safetensors").read_bytes() == (large / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_download_ends_at_once_and_the_next_run_goes_on(tmp_path: Path, large: Path, number: signal.Signals) -> None:
    home = tmp_path / "home"
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(4))
    validate = ("-m", "llmforge", "validate", str(write_config(tmp_path, "org/tiny")))
    with fake_hub({"org/tiny": large}) as hub:
        hub.stalled = "model.safetensors"
        with subprocess.Popen(
            [sys.executable, *(validate if number == signal.SIGINT else ("-c", FIND, "org/tiny"))],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert hub.half_sent.wait(60)
            while not any(path.stat().st_size == PIECE for path in home.rglob("*.incomplete")):
                time.sleep(0.01)
            process.send_signal(number)
            began = time.monotonic()
            out, err = process.communicate(timeout=20)
            assert time.monotonic() - began < 2
        assert out == ""
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert err == "interrupted; files that are complete stay in the cache\n"
        hub.stalled = ""
        hub.go_on.set()
        killed = len(hub.requests)
        directory = Path(find(home, hub.url, "org/tiny")["org/tiny"])
        assert set(files_asked_for(hub.requests[killed:])) == {"model.safetensors"}  # whole files were kept
        assert hub.stored[-1].part == f"bytes={PIECE}-"
    assert (directory / "model.safetensors").read_bytes() == (large / "model.safetensors").read_bytes()
    assert not list(home.rglob("*.incomplete"))


def test_what_killed_downloads_left_is_removed_unless_it_may_be_alive(tmp_path: Path, published: Path) -> None:
    blobs = tmp_path / "home" / "hub" / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    dead, alive = (blobs / f"{'a' * 64}.{number}.incomplete" for number in ("0123abcd", "4567abcd"))
    dead.touch()
    alive.touch()
    os.utime(dead, (0, time.time() - 7200))
    with fake_hub({"org/tiny": published}) as hub:
        find(tmp_path / "home", hub.url, "org/tiny")
    assert not dead.exists()
    assert alive.exists()


def test_a_revision_is_a_branch_a_tag_or_a_commit(tmp_path: Path, published: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(published, other)
    (other / "model.safetensors").write_bytes(save({"weight": np.zeros(3, dtype=np.float32)}))
    new = "beef" * 10
    with fake_hub({"org/tiny": Versions({"main": (COMMIT, published), "v2": (new, other)})}) as hub:
        names = ["org/tiny", "org/tiny@v2", f"org/tiny@{COMMIT}", f"org/tiny@{new}", "org/tiny@v9"]
        answers = find(tmp_path / "home", hub.url, *names)
    assert [Path(answers[name]).name for name in names[:4]] == [COMMIT, new, COMMIT, new]
    assert (Path(answers["org/tiny@v2"]) / "model.safetensors").read_bytes() == (
        other / "model.safetensors"
    ).read_bytes()
    assert "org/tiny has no revision v9 (404)" in answers["org/tiny@v9"]
    # All that is known of a revision is in the cache; of a missing one, nothing.
    answers = find(tmp_path / "home", hub.url, *names, offline=True)
    assert [Path(answers[name]).name for name in names[:4]] == [COMMIT, new, COMMIT, new]
    assert "HF_HUB_OFFLINE" in answers["org/tiny@v9"]


def test_tokens_come_from_where_they_are_kept_and_go_to_the_hub_alone(tmp_path: Path, published: Path) -> None:
    with fake_hub({"org/tiny": published}, token=TOKEN) as hub:

        def look(home: str, **options: str) -> str:
            (tmp_path / home).mkdir(exist_ok=True)
            return find(tmp_path / home, hub.url, "org/tiny", **options)["org/tiny"]

        assert "the hub does not show org/tiny to strangers (401)" in look("nobody")
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "token").write_text(f"{TOKEN}\n")
        assert Path(look("kept")).is_dir()
        assert Path(look("elsewhere", HF_TOKEN_PATH=str(tmp_path / "kept" / "token"))).is_dir()
        assert Path(look("variable", token=TOKEN)).is_dir()
        shutil.rmtree(tmp_path / "kept" / "hub")
        assert "does not accept the access token" in look("kept", token="hf_another")  # the variable is stronger
        assert len(hub.stored) == 3
        assert {request.authorization for request in hub.stored} == {None}


def test_where_the_cache_is_and_what_it_gives_offline(tmp_path: Path, published: Path) -> None:
    cache = tmp_path / "cache"
    with fake_hub({"org/tiny": published}) as hub:
        directory = Path(find(tmp_path / "home", hub.url, "org/tiny", HF_HUB_CACHE=str(cache))["org/tiny"])
        assert directory.is_relative_to(cache)
        assert not (tmp_path / "home").exists()
        asked = len(hub.requests)
        for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            offline = {"HF_HUB_OFFLINE": "", "HF_HUB_CACHE": str(cache), variable: "1"}
            assert find(tmp_path / "home", hub.url, "org/tiny", **offline)["org/tiny"] == str(directory)
        for part in ("model.safetensors", "tokenizer.json"):
            (directory / part).unlink()
            answer = find(tmp_path / "home", hub.url, "org/tiny", **offline)["org/tiny"]
            assert f"its files are not all in the hub cache ({cache}), and HF_HUB_OFFLINE forbids" in answer
        assert len(hub.requests) == asked


def test_progress_is_shown_on_a_terminal(tmp_path: Path, published: Path) -> None:
    with fake_hub({"org/tiny": published}) as hub:
        ours, its = pty.openpty()
        termios.tcsetwinsize(its, (40, 120))
        with subprocess.Popen(
            [sys.executable, "-c", FIND, "org/tiny"],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
            stdout=subprocess.DEVNULL,
            stderr=its,
        ):
            os.close(its)
            shown = b""
            with suppress(OSError):  # how Linux says that nobody writes to the terminal any more
                while piece := os.read(ours, 4096):
                    shown += piece
        os.close(ours)
    assert b"\r" in shown
    assert re.search(rb"model\.safetensors: 100%", shown), shown


def test_pickles_in_shards_are_taken_by_name_only(tmp_path: Path, published: Path) -> None:
    (published / "model.safetensors").unlink()
    (published / "pytorch_model.bin").unlink()
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for shard in shards:
        (published / shard).write_bytes(shard.encode())
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (published / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with fake_hub({"org/tiny": published}) as hub:
        answer = find(tmp_path / "home", hub.url, "org/tiny")["org/tiny"]
        assert f"are Python pickles ({', '.join(shards)}), which can run code" in answer
        assert f"allow_pickle_weights: [{', '.join(shards)}]" in answer
        assert hub.stored == []
        allowed = find(tmp_path / "home", hub.url, "org/tiny", PICKLES=" ".join(shards))["org/tiny"]
        assert [(Path(allowed) / shard).read_text() for shard in shards] == shards


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
