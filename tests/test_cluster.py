"""A cluster of two hosts, and what happens to a run when the cable between them is cut."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hosts import HEAD, PORT, Hosts, can_make_hosts, two_hosts
from llmforge.jobs.events import read_events
from test_ray import KEYS, assert_same_result, expected, place, steps_in, wait_for  # noqa: F401 - fixtures
from tiny_runs import write_config

pytestmark = pytest.mark.skipif(not can_make_hosts(), reason="needs the right to make network namespaces, and iproute2")


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("r")) as made:
        made.start_ray("head")
        made.start_ray("other")
        yield made


def restarts_in(events: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(events) if event["event"] == "restarted"]


def test_a_lost_host_comes_back(hosts: Hosts, place: Path, model_dir: Path, expected: Path) -> None:  # noqa: F811
    config = write_config(place, model_dir, **KEYS, valid_path=str(place / "valid.jsonl"), custom_model_tag="hosts")
    run_dir = place / "runs" / "hosts"
    events = run_dir / "events.jsonl"
    command = (sys.executable, "-m", "llmforge", "finetune", str(config), "--json")
    process = hosts.start("head", *command, RAY_ADDRESS=f"{HEAD}:{PORT}")
    wait_for(lambda: steps_in(events) >= 8, process)
    hosts.cut(cable=True)
    wait_for(lambda: restarts_in(events), process)
    hosts.cut(cable=False)
    time.sleep(2)
    hosts.start_ray("other")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["run_dir"] == str(run_dir)
    assert_same_result(run_dir, expected)
