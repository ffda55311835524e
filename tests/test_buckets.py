"""Runs whose model, data and output lie in a bucket, on servers of this machine; killed, throttled, without them."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch

from commands import llmforge
from conftest import save_model
from faulty_store import (
    BROKEN,
    CUT,
    DAMAGED,
    FORBIDDEN,
    LATE,
    SLOW_DOWN,
    FaultyStore,
    Request,
    credentials,
    down_after,
    faulty_store,
    one_in,
)
from llmforge import bucket
from llmforge.bucket import BucketDirectory, bucket_url, copy_to_cache, origin_of_copy
from llmforge.config import load_config
from llmforge.config.serve_config import load_serve_config
from llmforge.errors import BucketError, InputError, ModelError, OutputError
from llmforge.jobs import finetune as jobs
from llmforge.jobs.events import read_events
from llmforge.jobs.mirror import Mirror
from llmforge.jobs.run import load_run
from llmforge.jobs.serve import find_configured
from llmforge.models.source import ModelSource, find_model
from llmforge.serve.models import Loading, Models, UnknownModelError
from llmforge.serve.offline import stream
from ranks import train_on_ranks
from test_ray import KEYS as ON_RAY
from test_ray import assert_same_result, workers_of
from test_resume import LONG, results, same, wait_for_steps
from tiny_runs import LORA, Listener, child, run_config, run_here, tree, write_config


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyStore]:
    scheme = getattr(request, "param", "s3")
    with faulty_store(scheme) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in credentials(running, tmp_path_factory.mktemp("cache")).items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"):
            patch.delenv(name, raising=False)
        patch.setattr(bucket, "FIRST_WAIT", 0.01)
        yield running
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


both = pytest.mark.parametrize("server", ["s3", "gs"], indirect=True)


@pytest.fixture
def store(server: FaultyStore) -> Iterator[FaultyStore]:
    server.requests.clear()
    yield server
    server.fault, server.encrypts = (lambda request: None), False


def put_tree(store: FaultyStore, prefix: str, directory: Path) -> str:
    for name, content in tree(directory).items():
        store.put(f"{prefix}/{name}", content)
    return f"{store.bucket}/{prefix}"


@both
def test_a_plain_model_in_a_bucket_is_served_by_its_mirror(store: FaultyStore, model_dir: Path, tmp_path: Path) -> None:
    url = put_tree(store, "plain/tiny", model_dir)
    (tmp_path / "serve.yaml").write_text(
        f"model_loading_config: {{model_id: tiny, model_source: {{bucket_uri: {url}}}}}", encoding="utf-8"
    )
    (config,) = load_serve_config(tmp_path / "serve.yaml")
    source, _, _ = find_configured(config, "transformers")
    assert source.url == url
    assert (source.directory / "model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()


# --- adapters on demand ---------------------------------------------------------------------------------------------


def test_adapters_are_loaded_on_demand_from_a_bucket(store: FaultyStore, data_dir: Path, model_dir: Path) -> None:
    run, _ = run_here(data_dir, model_dir, **QUICK)
    put_tree(store, "lora/one", run.artifact_dir)
    put_tree(store, "lora/a-run", run.run_dir)
    put_tree(store, "secret/two", run.artifact_dir)
    expected = run.chat(question := [{"role": "user", "content": "What does red mean?"}], max_new_tokens=4)
    models = Models(dynamic_lora_loading_path="s3://bucket/lora/", cache_bytes=1 << 26)
    models.add("base", ModelSource(str(model_dir), model_dir), Loading(dtype="fp32"))
    for name in ("one", "base:one", "a-run"):
        assert "".join(stream(models.get(name), question, {"max_new_tokens": 4})) == expected
    assert not any("checkpoints" in request.path for request in store.requests if request.method == "GET")
    for name in ("two", "../secret/two", "secret"):
        with pytest.raises(UnknownModelError, match=r"there is no model .*, and adapters in s3://bucket/lora"):
            models.get(name)
    store.fault = lambda request: FORBIDDEN
    with pytest.raises(BucketError, match="no permission"):
        models.get("three")
    assert "".join(stream(models.get("one"), question, {"max_new_tokens": 4})) == expected
    models.close()


# --- whole runs -------------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "lora_config": LORA,
    "learning_rate": 1e-2,
    "num_epochs": 2,
    "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 5},
}


@both
def test_model_data_and_output_in_a_bucket(
    store: FaultyStore, data_dir: Path, model_dir: Path, tmp_path_factory: Any, monkeypatch: Any
) -> None:
    local, _ = run_here(
        data_dir, model_dir, **QUICK, valid_path=str(data_dir / "valid.jsonl"), custom_model_tag="local"
    )
    model = put_tree(store, "all/model", model_dir)
    for name in ("train.jsonl", "valid.jsonl"):
        store.put(f"all/{name}", (data_dir / name).read_bytes())
    keys = {
        **QUICK,
        "train_path": f"{store.bucket}/all/train.jsonl",
        "valid_path": f"{store.bucket}/all/valid.jsonl",
        "output_dir": f"{store.bucket}/all/runs/",
    }
    run, listener = run_here(data_dir, model, **keys)  # type: ignore[arg-type]
    url = f"{store.bucket}/all/runs/run"
    assert run.url == url
    assert store.tree("all/runs/run") == tree(run.run_dir)
    assert listener.notes == []
    assert listener.of("finished", "artifact_path") == [f"{url}/artifact"]
    assert run.metrics == local.metrics
    same(tree(local.run_dir / "checkpoints"), tree(run.run_dir / "checkpoints"))
    weights = "adapter_model.safetensors"
    assert (run.artifact_dir / weights).read_bytes() == (local.artifact_dir / weights).read_bytes()
    resolved = load_config(run.run_dir / "resolved_config.yaml").config
    assert (resolved.model_id, resolved.output_dir) == (model, f"{store.bucket}/all/runs")

    with pytest.raises(
        OutputError, match=rf"already holds a run.*--resume {store.bucket}/all/runs/run.*custom_model_tag"
    ):
        run_here(data_dir, model, **keys)  # type: ignore[arg-type]
    again = jobs.resume(url, listener)
    assert (again.url, again.metrics) == (url, run.metrics)
    assert "finished already" in listener.notes[-1]

    # Another machine: it has neither the run nor the base model, which the adapter names by a path of the first one.
    question = [{"role": "user", "content": "What does red mean?"}]
    answer = run.chat(question, max_new_tokens=4)
    shutil.rmtree(data_dir / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("elsewhere")))
    for place in (url, f"{url}/artifact"):
        outcome = llmforge("chat", place, "--max-new-tokens", 4, stdin="What does red mean?\n")
        assert (outcome.code, outcome.out) == (0, f"{answer}\n"), outcome.err
    assert load_run(url).run_dir.name == "run"
    store.put("all/model/config.json", store.get("all/model/config.json") + b"\n")
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    with pytest.raises(ModelError, match=f"{store.bucket}/all/model have changed since this was trained"):
        load_run(url).chat(question)


def run_in(environment: dict[str, str], config: Path) -> None:
    """Start a run in a process that was forked before there was a store."""
    os.environ.update(environment)
    bucket.FIRST_WAIT = 0.01
    run_config(config)


def resume_in(environment: dict[str, str], url: str) -> None:
    """Continue a run in such a process."""
    os.environ.update(environment)
    bucket.FIRST_WAIT = 0.01
    jobs.resume(url, Listener())


@both
def test_a_killed_run_goes_on_from_the_bucket_alone(store: FaultyStore, data_dir: Path, model_dir: Path) -> None:
    torch.set_num_threads(1)
    keys = {
        **LONG,
        "num_epochs": 5,
        "valid_path": str(data_dir / "valid.jsonl"),
        "output_dir": f"{store.bucket}/killed",
    }
    uninterrupted, _ = run_here(data_dir, model_dir, **keys, custom_model_tag="whole")
    staging = data_dir / "cache" / "staging" / store.scheme / "bucket" / "killed" / "run"
    environment = {name: os.environ[name] for name in credentials(store, data_dir)}
    cut = threading.Event()  # until then, what belongs to the second checkpoint does not come through
    store.fault = lambda request: CUT if "step-000010" in request.key and cut.wait(60) else None
    process = child(partial(run_in, environment), write_config(data_dir, model_dir, **keys))
    wait_for_steps(staging / "events.jsonl", 22, process.is_alive)  # it trains on meanwhile
    first = "killed/run/checkpoints/step-000005/state.json"
    while process.is_alive() and ((staging / "checkpoints" / "step-000010").exists() or not store.server.names(first)):
        time.sleep(0.01)  # the second one is superseded while it is uploaded
    process.kill()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    cut.set()
    store.fault = lambda request: None
    there = store.tree("killed/run")
    assert sorted(whole(there)) == ["step-000005"]
    assert "checkpoints/step-000010/state.json" not in there
    shutil.rmtree(staging)
    # What a kill in the middle of an upload leaves.
    store.put("killed/run/checkpoints/step-000040/parameters.safetensors", b"half of")
    listener = Listener()
    run = jobs.resume(f"{store.bucket}/killed/run", listener)
    assert run.run_dir == staging
    assert listener.of("started", "resumed_from") == [5]
    same(results(uninterrupted.run_dir), results(run.run_dir))
    assert store.tree("killed/run") == tree(run.run_dir)


def test_workers_of_ray_and_a_bucket_that_fails_one_request_in_five(
    store: FaultyStore, data_dir: Path, model_dir: Path, tmp_path_factory: Any
) -> None:
    for name in ("train.jsonl", "valid.jsonl"):
        store.put(f"ray/{name}", (data_dir / name).read_bytes())
    keys = {**ON_RAY, "num_epochs": 8}
    plain = write_config(
        data_dir, model_dir, **keys, valid_path=str(data_dir / "valid.jsonl"), custom_model_tag="plain"
    )
    train_on_ranks(2, data_dir / "meeting", [(plain, data_dir / "plain", None)])

    choose = one_in(5, BROKEN, SLOW_DOWN, CUT, LATE)
    verified, killed = threading.Event(), threading.Event()

    def fault(request: Request) -> Any:
        if verified.is_set() and request.changes and "/checkpoints/" in request.key and not killed.is_set():
            killed.wait(60)  # the first checkpoint is there, the next one on its way
            return CUT
        if request.method == "HEAD" and request.key.endswith("/state.json"):
            verified.set()
        return choose(request)

    store.fault = fault
    environment = {name: os.environ[name] for name in credentials(store, data_dir)} | {"RAY_ADDRESS": "local"}
    places = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    places_in_bucket = {
        "train_path": "s3://bucket/ray/train.jsonl",
        "valid_path": "s3://bucket/ray/valid.jsonl",
        "output_dir": "s3://bucket/ray/runs",
    }
    config = write_config(data_dir, model_dir, **keys, **places_in_bucket, cache_dir=None)
    first = child(partial(run_in, {**environment, "XDG_CACHE_HOME": str(places[0])}), config)
    staging = places[0] / "llmforge" / "staging" / "s3" / "bucket" / "ray" / "runs" / "run"
    assert verified.wait(200)
    workers = workers_of(first.pid)
    assert len(workers) == 2
    first.kill()
    first.join(100)
    assert first.exitcode == -signal.SIGKILL
    assert psutil.wait_procs(workers, timeout=60)[1] == []  # they notice that their driver is gone
    killed.set()
    shutil.rmtree(places[0])

    second = child(partial(resume_in, {**environment, "XDG_CACHE_HOME": str(places[1])}), "s3://bucket/ray/runs/run")
    second.join(300)
    assert second.exitcode == 0
    assert not places[0].exists()  # the workers have moved, too
    run_dir = places[1] / staging.relative_to(places[0])
    assert store.tree("ray/runs/run") == tree(run_dir)
    assert_same_result(run_dir, data_dir / "plain")
    events = read_events(run_dir / "events.jsonl")
    began, resumed = [event["resumed_from"] for event in events if event["event"] == "started"]
    assert began is None
    assert resumed is not None
    assert events[-1]["artifact_path"] == "s3://bucket/ray/runs/run/artifact"


@both
def test_a_store_that_fails_throttles_and_delays(store: FaultyStore, data_dir: Path, model_dir: Path) -> None:
    model = put_tree(store, "faults/model", model_dir)
    faults: list[Any] = []
    choose = one_in(5, BROKEN, SLOW_DOWN, CUT, LATE)

    def remembered(request: Request) -> Any:
        faults.append(choose(request))
        return faults[-1]

    store.fault = remembered
    run, listener = run_here(data_dir, model, **QUICK, output_dir=f"{store.bucket}/faults/runs")  # type: ignore[arg-type]
    assert {fault for fault in faults if fault} == {BROKEN, SLOW_DOWN, CUT, LATE}
    assert listener.notes == []
    assert store.tree("faults/runs/run") == tree(run.run_dir)


class Watcher(Listener):
    """Lets the store fail from one step on (once a file is there), or from then until that is told."""

    def __init__(self, store: FaultyStore, *, down: int, until_told: bool = False, after: str | None = None) -> None:
        super().__init__()
        self._store, self._down, self._until_told, self._after = store, down, until_told, after

    def event(self, event: str, **fields: Any) -> None:
        super().event(event, **fields)
        if event == "step" and fields["step"] == self._down:
            while self._after is not None and not self._store.server.names(self._after):
                time.sleep(0.01)  # it is uploaded behind our back
            self._store.fault = lambda request: CUT

    def note(self, text: str) -> None:
        super().note(text)
        if self._until_told:
            self._store.fault = lambda request: None


@both
def test_an_outage_is_told_once_and_what_was_missed_is_uploaded_later(
    store: FaultyStore, data_dir: Path, model_dir: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bucket, "ATTEMPTS", 2)
    listener = Watcher(store, down=3, until_told=True)
    keys = {**QUICK, "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 3}}
    config = write_config(data_dir, model_dir, **keys, output_dir=f"{store.bucket}/outage")
    run = jobs.finetune(load_config(config), listener)
    assert run is not None
    (note,) = listener.notes
    assert f"{store.bucket}/outage/run cannot be had, also at try 2" in note
    assert f"The run goes on in {run.run_dir}" in note
    assert store.tree("outage/run") == tree(run.run_dir)


def test_an_outage_at_the_end_is_a_clear_error_and_nothing_is_lost(
    store: FaultyStore, data_dir: Path, model_dir: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bucket, "ATTEMPTS", 2)
    listener = Watcher(store, down=7, after="end/run/checkpoints/step-000005/state.json")
    config = write_config(data_dir, model_dir, **QUICK, output_dir="s3://bucket/end")
    staging = data_dir / "cache" / "staging" / "s3" / "bucket" / "end" / "run"
    with pytest.raises(
        OutputError, match="the run has finished, but s3://bucket/end/run could not be written"
    ) as caught:
        jobs.finetune(load_config(config), listener)
    assert f"llmforge finetune --resume {staging}" in str(caught.value)
    assert len(listener.notes) == 1
    with pytest.raises(OutputError, match="could not be written"):  # still
        jobs.resume(staging, listener)
    before = store.tree("end/run")
    assert {name for name in before if name.endswith("state.json")} == {"checkpoints/step-000005/state.json"}
    store.fault = lambda request: None
    again = Listener()
    run = jobs.resume(staging, again)
    assert again.of("step", "step") == []
    assert store.tree("end/run") == tree(staging)
    assert run.url == "s3://bucket/end/run"

    # Deleted in the bucket, the run may be made again: its local copy is no more than that.
    store.delete("end/run")
    Mirror.check(load_config(config).config)
    assert not staging.exists()


# --- the mirror -------------------------------------------------------------------------------------------------------

STATES: dict[str, dict[int, str]] = {
    "before": {5: "a"},
    "superseded": {10: "b"},
    "kept": {5: "a", 10: "b"},
    "other": {5: "c"},
}


def fake_run(directory: Path, steps: dict[int, str], *, finished: bool = False) -> None:
    """Make the directory of a run whose checkpoints hold the given texts."""
    shutil.rmtree(directory, ignore_errors=True)
    for step, text in steps.items():
        folder = directory / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        for name in ("parameters.safetensors", "state.json"):
            (folder / name).write_text(f"{name} {text}")
    for name in ("config.yaml", "manifest.json", "resolved_config.yaml", "rows.jsonl"):
        (directory / name).write_text("{}\n")
    events = [{"event": "step", "step": step} for step in range(max(steps))]
    if finished:
        (directory / "artifact").mkdir()
        (directory / "artifact" / "model.safetensors").write_text("trained")
        events.append({"event": "finished"})
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def whole(files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Give the checkpoints that have a state, with their files."""
    steps = {name.split("/")[1] for name in files if name.endswith("/state.json")}
    return {step: {name: files[name] for name in files if name.startswith(f"checkpoints/{step}/")} for step in steps}


@both
@pytest.mark.parametrize(("after", "finished"), [("superseded", False), ("kept", True), ("other", False)])
def test_a_kill_at_any_moment_of_an_upload_leaves_the_old_state_or_the_new(
    store: FaultyStore, tmp_path: Path, monkeypatch: Any, after: str, finished: bool
) -> None:
    monkeypatch.setattr(bucket, "ATTEMPTS", 1)
    url, prefix = f"{store.bucket}/kills/{after}", f"kills/{after}"
    fake_run(tmp_path / "before", STATES["before"])
    old = tree(tmp_path / "before")
    for changes in itertools.count():
        store.delete(prefix)
        put_tree(store, prefix, tmp_path / "before")
        mirror = Mirror(url, tmp_path / "cache")
        fake_run(mirror.directory, STATES[after], finished=finished)
        new = tree(mirror.directory)
        store.fault = down_after(changes)
        try:
            mirror.upload()
            done = True
        except BucketError:
            done = False
        store.fault = lambda request: None
        there = store.tree(prefix)
        allowed = {**whole(old), **whole(new)} if after != "other" else None
        if allowed is not None:
            assert whole(there), changes
            assert all(allowed[step] == files for step, files in whole(there).items()), changes
        else:  # one that is written over is none meanwhile, and never a mixture
            assert all(files in (whole(old)[step], whole(new)[step]) for step, files in whole(there).items()), changes
        if b"finished" in there["events.jsonl"]:
            assert there["artifact/model.safetensors"] == b"trained"
        # An empty machine takes what is whole.
        elsewhere = Mirror(url, tmp_path / f"elsewhere{changes}")
        Mirror.to_resume(elsewhere.directory, print)
        if b"finished" not in there["events.jsonl"]:
            assert whole(tree(elsewhere.directory)) == whole(there)
        if done:
            break
    assert there == new
    assert changes > 3
    store.requests.clear()
    Mirror(url, tmp_path / "cache").upload()
    assert not any(request.changes for request in store.requests)  # what is there is not uploaded again


@pytest.mark.parametrize("has_links", [True, False])
def test_what_changes_during_an_upload_waits_for_the_next_one(
    store: FaultyStore, tmp_path: Path, monkeypatch: Any, has_links: bool
) -> None:
    def link(*paths: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as on exFAT, and on some mounts

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    prefix = f"meanwhile/{has_links}"
    mirror = Mirror(f"s3://bucket/{prefix}", tmp_path / "cache")
    fake_run(mirror.directory, STATES["kept"])
    before = tree(mirror.directory)
    events = mirror.directory / "events.jsonl"

    def train_on(request: Request) -> None:
        if request.changes and "step-000005" in request.key and (mirror.directory / "checkpoints/step-000005").exists():
            shutil.rmtree(mirror.directory / "checkpoints")
            shutil.copytree(tmp_path / "new" / "checkpoints", mirror.directory / "checkpoints")
            events.write_bytes(events.read_bytes() + b'{"event": "step", "step": 20}\n')

    fake_run(tmp_path / "new", {10: "another", 20: "d"})
    store.fault = train_on
    mirror.upload()
    assert store.tree(prefix) == before
    mirror.upload()
    assert store.tree(prefix) == tree(mirror.directory) != before


def test_a_start_that_was_cut_off_in_its_first_upload_can_be_made_again(
    store: FaultyStore, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bucket, "ATTEMPTS", 1)
    url = "s3://bucket/cut/run"
    for changes in range(5):
        store.delete("cut/run")
        mirror = Mirror(url, tmp_path / f"cache{changes}")
        mirror.directory.mkdir(parents=True)
        for name in ("config.yaml", "manifest.json", "resolved_config.yaml", "rows.jsonl"):
            (mirror.directory / name).write_text("{}\n")
        store.fault = down_after(changes)
        with contextlib.suppress(BucketError):
            mirror.upload()
        store.fault = lambda request: None
        another_machine = Mirror(url, tmp_path / f"elsewhere{changes}")
        if changes < 4:
            assert len(store.tree("cut/run")) == changes
            with pytest.raises(InputError, match="start the run again" if changes else "is not the directory of a run"):
                Mirror.to_resume(url, print)
            another_machine.claim()
    with pytest.raises(OutputError, match="already holds a run"):
        another_machine.claim()


def test_a_run_goes_on_that_was_killed_in_its_first_upload(
    store: FaultyStore, tmp_path: Path, monkeypatch: Any
) -> None:
    """Where its local copy is: by its place in the bucket, and as the refusal of a new start says."""
    monkeypatch.setattr(bucket, "ATTEMPTS", 1)
    url = "s3://bucket/first/run"
    mirror = Mirror(url, Path(os.environ["XDG_CACHE_HOME"]) / "llmforge")
    fake_run(mirror.directory, {3: "a"})
    run = tree(mirror.directory)
    for changes in itertools.count():
        store.delete("first/run")
        store.fault = down_after(changes)
        with contextlib.suppress(BucketError):
            Mirror(url, mirror.cache_dir).upload()
        store.fault = lambda request: None
        with pytest.raises(OutputError) as refused:
            mirror.claim()
        named = str(refused.value).split("--resume ")[1].split("`")[0]
        for place in (url, named):
            found = Mirror.to_resume(place, pytest.fail)
            assert found is not None
            assert (found.url, found.directory, tree(found.directory)) == (url, mirror.directory, run)
        if store.tree("first/run") == run:
            break
    assert changes == len(run)


def test_whoever_is_ahead_wins(store: FaultyStore, tmp_path: Path) -> None:
    url = "s3://bucket/ahead/run"
    fake_run(tmp_path / "six", {3: "a", 6: "b"})
    fake_run(tmp_path / "nine", {3: "a", 9: "c"})
    mirror = Mirror(url, tmp_path / "cache")

    put_tree(store, "ahead/run", tmp_path / "six")
    shutil.copytree(tmp_path / "nine", mirror.directory)
    Mirror.to_resume(mirror.directory, print)
    assert tree(mirror.directory) == tree(tmp_path / "nine")

    store.delete("ahead/run")
    put_tree(store, "ahead/run", tmp_path / "nine")
    shutil.rmtree(mirror.directory)
    shutil.copytree(tmp_path / "six", mirror.directory)
    store.requests.clear()
    Mirror.to_resume(mirror.directory, print)
    assert tree(mirror.directory) == tree(tmp_path / "nine")
    read = [request.path for request in store.requests if request.method == "GET" and "step-" in request.path]
    assert read
    assert not any("step-000003" in path for path in read)  # which was here already

    (mirror.directory / "resolved_config.yaml").write_text("seed: 1\n")
    with pytest.raises(InputError, match="is the local copy of another run"):
        Mirror.to_resume(mirror.directory, print)


@both
def test_a_download_of_a_run_may_be_cut_anywhere(store: FaultyStore, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bucket, "ATTEMPTS", 1)
    monkeypatch.setattr(bucket, "AT_ONCE", 1)
    fake_run(tmp_path / "run", {3: "a", 6: "b"})
    mirror = Mirror(f"{store.bucket}/fetched/run", tmp_path / "cache")
    put_tree(store, "fetched/run", tmp_path / "run")
    notes: list[str] = []
    for reads in itertools.count():
        left = [reads]

        def fault(request: Request, left: list[int] = left) -> Any:
            left[0] -= 1
            return CUT if left[0] < 0 else None

        store.fault = fault
        Mirror.to_resume(mirror.directory, notes.append)
        if len(notes) == reads:
            break
        files = tree(mirror.directory)
        assert all(files[name] == content for step in whole(files).values() for name, content in step.items())
        assert all(step == whole(tree(tmp_path / "run"))[name] for name, step in whole(files).items())
        assert "resolved_config.yaml" not in files or len(whole(files)) == 2
        if reads % 2:  # a program that starts with nothing, and one that goes on
            shutil.rmtree(mirror.directory, ignore_errors=True)
    assert reads > 8
    assert tree(mirror.directory) == tree(tmp_path / "run")


def test_the_local_copy_goes_on_without_the_bucket(store: FaultyStore, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bucket, "ATTEMPTS", 1)
    mirror = Mirror("s3://bucket/gone/run", Path(os.environ["XDG_CACHE_HOME"]) / "llmforge")
    fake_run(mirror.directory, {3: "a"})
    store.fault = lambda request: CUT
    notes: list[str] = []
    found = Mirror.to_resume(mirror.directory, notes.append)
    assert found is not None
    assert (found.url, found.directory) == (mirror.url, mirror.directory)
    assert "goes on from its local copy" in notes[0]
    with pytest.raises(BucketError, match=f"cannot be had.*--resume {mirror.directory}"):
        Mirror.to_resume(mirror.url, notes.append)
    assert Mirror.to_resume(tmp_path, notes.append) is None


def test_a_store_whose_tags_are_no_hashes(store: FaultyStore, tmp_path: Path) -> None:
    store.encrypts = True
    mirror = Mirror("s3://bucket/encrypted/run", tmp_path / "cache")
    fake_run(mirror.directory, {3: "a"})
    mirror.upload()
    assert store.tree("encrypted/run") == tree(mirror.directory)
    store.requests.clear()
    (mirror.directory / "rows.jsonl").write_text("[]\n")
    Mirror(mirror.url, tmp_path / "cache").upload()
    assert [request.path for request in store.requests if request.changes] == ["/bucket/encrypted/run/rows.jsonl"]
    assert store.tree("encrypted/run") == tree(mirror.directory)


# --- files and directories --------------------------------------------------------------------------------------------


def test_urls(tmp_path: Path) -> None:
    assert bucket_url("s3://b/x/") == bucket_url(Path("s3://b/x")) == "s3://b/x"
    assert bucket_url("gs://b") == "gs://b"
    assert [bucket_url(place) for place in ("runs", "/runs", "s3", "s3://", "https://b/x")] == [None] * 5
    for bad in ("s3://b/../x", "s3://b//x"):
        with pytest.raises(BucketError, match="a part that is empty or made of dots"):
            Mirror(bad, tmp_path)


@both
def test_a_file_in_parts_is_verified_and_known_again(store: FaultyStore, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bucket, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(bucket, "PIECE_BYTES", 3 << 20)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(11 << 20))
    directory = BucketDirectory(f"{store.bucket}/parts")
    there = directory.upload(path, "large")
    assert there.tag.endswith("-3" if store.scheme == "s3" else hashlib.md5(path.read_bytes()).hexdigest())
    assert directory.holds("large", there, path)
    assert directory.entries() == {"large": there}
    directory.download("large", there, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert not directory.holds("large", there, path)
    directory.delete(["large", "missing"])
    assert directory.entries() == {}


@both
def test_what_is_damaged_on_its_way_is_uploaded_again(store: FaultyStore, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    directory = BucketDirectory(f"{store.bucket}/damaged")
    directory.holds("file", directory.upload(path, "file"), path)  # the store's tags are known to be hashes
    path.write_bytes(b"another")
    times = iter([DAMAGED])
    store.fault = lambda request: next(times, None) if request.changes else None
    directory.upload(path, "file")
    assert store.get("damaged/file") == b"another"
    store.fault = lambda request: DAMAGED if request.changes else None
    with pytest.raises(BucketError, match="uploaded 3 times and is another file there"):
        directory.upload(path, "file")
    with pytest.raises(BucketError, match="damaged/file"):  # in doubt it is read back
        BucketDirectory(f"{store.bucket}/damaged").upload(path, "file")


@both
def test_a_model_goes_on_downloading_where_it_was_cut(
    store: FaultyStore, model_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bucket, "ATTEMPTS", 1)
    monkeypatch.setattr(bucket, "PIECE_BYTES", 80_000)
    size = (model_dir / "model.safetensors").stat().st_size
    assert size > 160_000
    url = put_tree(store, "cut/model", model_dir)
    store.put("cut/model/original/consolidated.pth", b"unwanted")
    store.put("cut/model/pytorch_model.bin", b"unwanted")
    store.fault = lambda request: CUT if (request.part or "").startswith("bytes=160000-") else None
    find = partial(find_model, url, relative_to=tmp_path, cache_dir=tmp_path / "cache")
    with pytest.raises(ModelError, match=rf"model_id: {store.bucket}/cut/model/model.safetensors cannot be had"):
        find()
    store.fault = lambda request: None
    store.requests.clear()
    source = find()
    parts = [request.part for request in store.requests if request.method == "GET" and request.part]
    assert parts[0] == f"bytes=160000-{min(size, 240_000) - 1}"
    assert source.name == source.url == url
    assert tree(source.directory) == tree(model_dir)
    assert origin_of_copy(Path("/another/machine") / source.directory.relative_to(tmp_path)) == (
        url,
        source.directory.parent.name,
    )
    store.requests.clear()
    assert find().directory == source.directory
    assert not any(request.part for request in store.requests)
    # A changed model is another copy.
    store.put("cut/model/generation_config.json", b"{}")
    assert find().directory != source.directory


def test_two_runs_may_want_the_same_model(
    store: FaultyStore, model_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bucket, "PIECE_BYTES", 50_000)
    url = put_tree(store, "shared/model", model_dir)

    def get(number: int) -> Path:
        directory = BucketDirectory(url)
        entries = directory.entries()
        return copy_to_cache(directory, entries, entries, tmp_path)

    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            (copy,) = set(pool.map(get, range(4)))
        assert tree(copy) == tree(model_dir)
        shutil.rmtree(copy)


# --- what is refused, and how -----------------------------------------------------------------------------------------


def test_places_that_cannot_be_used_are_found_before_anything_expensive(
    store: FaultyStore, data_dir: Path, model_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bucket, "ATTEMPTS", 2)

    def refused(kind: type[Exception], *words: str, **keys: Any) -> None:
        model = keys.pop("model_id", model_dir)
        with pytest.raises(kind) as caught:
            jobs.finetune(load_config(write_config(data_dir, model, **keys)), Listener())
        assert all(word in str(caught.value) for word in words), caught.value
        assert not (data_dir / "cache" / "rows").exists()

    out = {"output_dir": "s3://bucket/refused"}
    refused(OutputError, "output_dir", "there is no bucket s3://nowhere", "make it", output_dir="s3://nowhere/runs")
    for key in ("model_id", "initial_base_model_ckpt_path", "initial_adapter_model_ckpt_path"):
        lora = {"lora_config": LORA} if "adapter" in key else {}
        refused(
            ModelError,
            key,
            "there is no model in s3://bucket/nothing",
            "safetensors",
            **{key: "s3://bucket/nothing"},
            **lora,
        )
        refused(ModelError, key, "there is no bucket s3://nowhere", **{key: "s3://nowhere/x"}, **lora)
    store.put("refused/pickles/config.json", b'{"model_type": "llama"}')
    store.put("refused/pickles/pytorch_model.bin", b"pickle")
    refused(ModelError, "model_id", "allow_pickle_weights", model_id="s3://bucket/refused/pickles")

    store.fault = lambda request: FORBIDDEN
    refused(OutputError, "output_dir", "no permission", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", **out)
    store.fault = lambda request: CUT
    refused(OutputError, "output_dir", "s3://bucket/refused cannot be had, also at try 2", **out)
    store.fault = lambda request: None

    # A local copy that the bucket knows nothing of is somebody's run.
    staging = data_dir / "cache" / "staging" / "s3" / "bucket" / "refused" / "run"
    fake_run(staging, {3: "a"})
    refused(OutputError, "still holds the local copy of an earlier run", f"--resume {staging}", **out)

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    refused(OutputError, "no credentials were found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", **out)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@both
def test_a_refusal_is_told_at_once_and_an_outage_after_a_few_tries(store: FaultyStore) -> None:
    store.put("told/file", b"content")
    directory = BucketDirectory(f"{store.bucket}/told")
    directory.attempts = 3
    store.fault = lambda request: FORBIDDEN
    with pytest.raises(BucketError, match="told/file: no permission"):
        directory.read("file")
    assert len(store.requests) == 1
    store.requests.clear()
    store.fault = lambda request: BROKEN
    with pytest.raises(BucketError, match="told/file cannot be had, also at try 3"):
        directory.read("file")
    assert len(store.requests) == 3  # the library below does not try again by itself
    expired = iter([(401, "", "Invalid Credentials")] if store.scheme == "gs" else [])
    store.fault = lambda request: next(expired, None)
    assert directory.read("file") == b"content"
    with pytest.raises(BucketError, match=f"there is no bucket {store.scheme}://nowhere; check its name"):
        BucketDirectory(f"{store.scheme}://nowhere/x").entries()


@pytest.mark.parametrize(("scheme", "module", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: Any, scheme: str, module: str, extra: str
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(ModelError, match=rf"model_id: {scheme}:// needs a package.*pip install 'llmforge\[{extra}\]'"):
        find_model(f"{scheme}://b/x", relative_to=tmp_path, cache_dir=tmp_path)


def test_what_is_no_run_is_said(store: FaultyStore, tmp_path: Path) -> None:
    store.put("norun/readme.txt", b"hello")
    for place in ("s3://bucket/norun", "s3://bucket/never"):
        with pytest.raises(InputError, match="is not the directory of a run"):
            jobs.resume(place, Listener())
        with pytest.raises(InputError, match="neither a run nor an artifact"):
            load_run(place)
    fake_run(tmp_path / "run", {3: "a"})
    put_tree(store, "unfinished/run", tmp_path / "run")
    with pytest.raises(InputError, match=r"has not finished.*--resume s3://bucket/unfinished/run"):
        load_run("s3://bucket/unfinished/run")
    outcome = llmforge("finetune", "--resume", "s3://bucket/norun")
    assert outcome.code == 2


def test_a_gguf_file_in_a_bucket_is_downloaded_alone(store: FaultyStore, tmp_path: Path) -> None:
    store.put("gguf/small.gguf", b"GGUF and so on")
    store.put("gguf/other.gguf", b"GGUF and so on")
    source = find_model("s3://bucket/gguf/small.gguf", relative_to=tmp_path, cache_dir=tmp_path)
    assert source.gguf_file == "small.gguf"
    assert list(tree(source.directory)) == ["small.gguf"]


def test_an_adapter_in_a_bucket_is_continued(store: FaultyStore, data_dir: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    first, _ = run_here(data_dir, model, lora_config=LORA, custom_model_tag="first")
    url = put_tree(store, "adapters/first", first.artifact_dir)
    local, _ = run_here(
        data_dir, model, lora_config=LORA, initial_adapter_model_ckpt_path=str(first.artifact_dir), custom_model_tag="a"
    )
    remote, _ = run_here(data_dir, model, lora_config=LORA, initial_adapter_model_ckpt_path=url, custom_model_tag="b")
    assert tree(local.run_dir / "checkpoints") == tree(remote.run_dir / "checkpoints")
