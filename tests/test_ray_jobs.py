"""Runs as Ray jobs: followed, left alone, stopped; and what is said when that cannot be."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile

import pytest

from commands import llmforge, write_config
from llmforge.config import load_config
from llmforge.errors import ConfigError, InputError
from llmforge.jobs import ray_jobs
from llmforge.jobs.ray_jobs import check_config, needed_variables, pack


@pytest.fixture
def dashboard(ray_cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return ray_cluster["dashboard"]


def start(*arguments, **options):
    """Start a command as a program of its own."""
    command = [sys.executable, "-m", "llmforge", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def job_of(client):
    """Read the name of the job that a client has submitted."""
    line = client.stderr.readline()
    assert line.startswith("submitted as "), line + client.stderr.read()
    return line.split()[2].rstrip(";")


def test_a_job_goes_on_when_its_client_is_killed(data_dir, model_dir, dashboard, monkeypatch):
    write_config(data_dir, model_dir)
    client = start("anyscale", "finetune", "config.yaml", "--job", "--address", dashboard, cwd=data_dir)
    job = job_of(client)
    client.kill()
    client.communicate()
    done = llmforge("anyscale", "logs", job, "--address", dashboard)
    assert done.code == 0, done.out
    assert done.err == f"{job} SUCCEEDED\n"
    assert (data_dir / "runs" / "test" / "artifact" / "proof.json").exists()

    status = json.loads(llmforge("anyscale", "status", job, "--address", dashboard, "--json").out)
    assert (status["status"], status["exit_code"]) == ("SUCCEEDED", 0)
    assert status["command"] == "python -m llmforge anyscale finetune config.yaml"
    assert status["ended"] > status["started"] > 1e9
    assert llmforge("anyscale", "stop", job, "--address", dashboard).out == f"{job} has ended already\n"


def test_ctrl_c_leaves_a_job_alone_and_stop_makes_it_write_a_checkpoint(data_dir, model_dir, dashboard):
    write_config(data_dir, model_dir, num_epochs=100_000)
    client = start(
        "anyscale", "finetune", "config.yaml", "--job", "--address", dashboard, cwd=data_dir, start_new_session=True
    )
    job = job_of(client)
    events = data_dir / "runs" / "test" / "events.jsonl"
    wait_for(lambda: events.exists() and events.read_text().count('"step"') > 3)
    os.killpg(client.pid, signal.SIGINT)
    _, errors = client.communicate(timeout=30)
    assert client.returncode == 130
    assert f"no longer watching; {job} goes on" in errors
    assert f"llmforge anyscale stop {job} --address {dashboard}" in errors
    assert "status     RUNNING" in llmforge("anyscale", "status", job, "--address", dashboard).out

    assert f"{job} is being stopped" in llmforge("anyscale", "stop", job, "--address", dashboard).out
    followed = llmforge("anyscale", "logs", job, "--address", dashboard)
    assert followed.code == 130
    assert followed.err == f"{job} STOPPED\n"
    assert "stopping after this step to write a checkpoint" in followed.out
    assert list((data_dir / "runs" / "test" / "checkpoints").glob("step-*"))


def test_a_job_that_fails_gives_its_exit_code(data_dir, model_dir, dashboard, monkeypatch):
    monkeypatch.chdir(data_dir)
    write_config(data_dir, model_dir, train_path="elsewhere.jsonl")
    done = llmforge("anyscale", "finetune", "config.yaml", "--job", "--address", dashboard, "--json")
    assert done.code == 2
    assert json.loads(done.out)["status"] == "FAILED"
    assert "elsewhere.jsonl: this file does not exist" in done.err


def test_a_job_that_nobody_knows(dashboard):
    done = llmforge("anyscale", "status", "raysubmit_nobody", "--address", dashboard)
    assert done.code == 2
    assert "knows no job raysubmit_nobody" in done.error


def test_nothing_answers(data_dir, model_dir, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.chdir(data_dir)
    write_config(data_dir, model_dir)
    for options in (["--job", "--address", f"http://127.0.0.1:{port}"], ["--address", f"127.0.0.1:{port}"]):
        done = llmforge("anyscale", "finetune", "config.yaml", *options)
        assert done.code == 2
        assert f"nothing answers at 127.0.0.1:{port}" in done.error
        assert "RAY_ADDRESS" in done.error
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    done = llmforge("anyscale", "finetune", "config.yaml", "--job")
    assert (done.code, "'nonsense' is not the address of a Ray cluster" in done.error) == (2, True)
    done = llmforge("anyscale", "finetune", "config.yaml", "--address", f"http://127.0.0.1:{port}")
    assert (done.code, "anyscale finetune --job" in done.error) == (2, True)


def test_a_run_must_not_be_left_where_ray_deletes_it(data_dir, model_dir, monkeypatch):
    monkeypatch.chdir(data_dir)
    write_config(data_dir, model_dir, output_dir="runs")
    done = llmforge("anyscale", "finetune", "config.yaml", "--job")
    assert done.code == 2
    assert "config.yaml:16: output_dir: 'runs' would lie in the working directory of the job" in done.error
    done = llmforge("anyscale", "finetune", "--resume", "runs/x", "--job")
    assert (done.code, "absolute path" in done.error) == (2, True)


def test_a_config_must_lie_in_the_working_directory(data_dir, model_dir, tmp_path_factory):
    loaded = load_config(write_config(data_dir, model_dir))
    assert check_config(loaded, data_dir) == "config.yaml"
    assert check_config(loaded, data_dir.parent) == f"{data_dir.name}/config.yaml"
    with pytest.raises(ConfigError, match="outside of the working directory"):
        check_config(loaded, tmp_path_factory.mktemp("elsewhere"))


def test_which_variables_go_with_a_job(data_dir, model_dir):
    def needed(**changes):
        return needed_variables(load_config(write_config(data_dir, changes.pop("model", model_dir), **changes)))

    assert needed() == []
    assert needed(model="org/model") == ["HF_ENDPOINT", "HF_TOKEN"]
    assert needed(train_path="hf://datasets/org/name/x.jsonl") == ["HF_ENDPOINT", "HF_TOKEN"]
    assert "AWS_SECRET_ACCESS_KEY" in needed(train_path=["train.jsonl", "s3://bucket/x.jsonl"])
    assert "WANDB_API_KEY" in needed(logger={"provider": "wandb"})
    assert not any("WANDB" in name for name in needed(logger={"provider": "mlflow"}))


def test_a_variable_that_is_not_set(data_dir, model_dir, monkeypatch):
    monkeypatch.chdir(data_dir)
    write_config(data_dir, model_dir)
    done = llmforge("anyscale", "finetune", "config.yaml", "--job", "--env", "NOBODY_SETS_THIS")
    assert (done.code, "NOBODY_SETS_THIS" in done.error) == (2, True)


def test_what_is_packed(tmp_path, monkeypatch):
    directory = tmp_path / "work"
    for name in ("a.yaml", "data/x.jsonl", ".git/config", "sub/__pycache__/a.pyc", "runs/r/x", ".env", "big/b.bin"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(os.urandom(1000))
    pack(directory, tmp_path / "1.zip", exclude=["big"])
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.namelist() == ["a.yaml", "data/x.jsonl"]
    os.utime(directory / "a.yaml", (0, 0))
    pack(directory, tmp_path / "2.zip", exclude=["big/*"])
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()

    monkeypatch.setattr(ray_jobs, "PACKAGE_LIMIT", 2500)
    (directory / "large.bin").write_bytes(os.urandom(50_000))
    with pytest.raises(InputError, match=r"largest of its files: large\.bin .* --exclude"):
        pack(directory, tmp_path / "3.zip")
    pack(directory, tmp_path / "4.zip", exclude=["*.bin"])


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
