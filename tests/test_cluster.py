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


def test_a_lost_host_and_one_that_is_taken_away(
    hosts: Hosts,
    place: Path,  # noqa: F811
    model_dir: Path,
    expected: Path,  # noqa: F811
) -> None:
    config = write_config(place, model_dir, **KEYS, valid_path=str(place / "valid.jsonl"), custom_model_tag="hosts")
    run_dir = place / "runs" / "hosts"
    events = run_dir / "events.jsonl"
    command = (sys.executable, "-m", "llmforge", "finetune", str(config), "--json")
    process = hosts.start("head", *command, RAY_ADDRESS=f"{HEAD}:{PORT}")

    def restarts() -> list[dict[str, Any]]:
        return [event for event in read_events(events) if event["event"] == "restarted"]

    wait_for(lambda: steps_in(events) >= 8, process)
    hosts.cut(cable=True)
    wait_for(restarts, process)
    hosts.cut(cable=False)
    time.sleep(2)
    hosts.start_ray("other")
    began = steps_in(events)
    wait_for(lambda: steps_in(events) >= began + 2, process)
    hosts.drain("other")
    wait_for(lambda: len(restarts()) == 2, process)
    steps = [event["step"] for event in read_events(events) if event["event"] == "step"]
    time.sleep(2)
    hosts.start_ray("other")

    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["run_dir"] == str(run_dir)
    assert_same_result(run_dir, expected)
    lost, taken = restarts()
    assert (lost["attempt"], taken["attempt"]) == (1, 1)
    assert "is being taken away within" in taken["reason"]
    resumed = [event["resumed_from"] for event in read_events(events) if event["event"] == "started"]
    assert resumed[2] == steps[-1]
    assert "waiting for the cluster to have room" in err
