"""Checkpoints are written beside training, and hold the state of the step that they are named after."""

import threading
from collections.abc import ItemsView
from pathlib import Path

import pytest
import torch

from llmforge.checkpoint import State, list_checkpoints, read_optimizer_state, read_parameters
from llmforge.errors import OutputError
from llmforge.train.backends import SingleDevice
from llmforge.train.saver import Saver
from tiny_runs import Listener


class Held(dict[str, torch.Tensor]):
    """Tensors that another thread gets only once `free` is set: as slow as a disk can be."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.free = threading.Event()

    def items(self) -> ItemsView[str, torch.Tensor]:
        if threading.current_thread() is not threading.main_thread():
            assert self.free.wait(30)
        return super().items()


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def saver(tmp_path: Path, listener: Listener) -> Saver:
    return Saver(tmp_path, backend=SingleDevice(torch.device("cpu")), last_step=9, keep=1, reporter=listener)


def test_training_does_not_wait_for_the_disk(saver: Saver, listener: Listener, tmp_path: Path) -> None:
    held = Held({"weight": torch.arange(6.0)})
    with saver:
        saver.save(State(held, {}, {}, is_copy=True), step=3, metrics={"eval_loss": 0.5})
        saver.settle()
        assert listener.events == []
        assert list_checkpoints(tmp_path) == []
        held.free.set()
        saver.save(State({"weight": torch.zeros(6)}, {}, {}), step=6, metrics={"eval_loss": 0.4})  # waits for the first
        assert listener.of("checkpoint", "step") == [3]
    assert listener.of("checkpoint", "step") == [3, 6]
    assert listener.of("checkpoint", "best") == [True, True]
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [3, 6]


def test_what_is_written_is_the_state_of_its_step(saver: Saver, tmp_path: Path) -> None:
    weight, average = torch.ones(10_000_000), torch.full((10_000_000,), 2.0)
    with saver:
        saver.save(State({"weight": weight}, {"weight/exp_avg": average}, {"weight/step": 3}), step=3, metrics={})
        weight.zero_()
        average.zero_()
    (checkpoint,) = list_checkpoints(tmp_path)
    assert torch.equal(read_parameters(checkpoint)["weight"], torch.ones(10_000_000))
    state = read_optimizer_state(checkpoint)
    assert torch.equal(state["weight/exp_avg"], torch.full((10_000_000,), 2.0))
    assert state["weight/step"] == 3


@pytest.mark.parametrize("step", [3, 9])
def test_a_checkpoint_that_cannot_be_written_stops_the_run(saver: Saver, tmp_path: Path, step: int) -> None:
    (tmp_path / f".step-{step:06d}.partial").write_text("a file where a directory is to be made")
    with pytest.raises(OutputError, match=r"cannot be created"), saver:
        saver.save(State({"weight": torch.ones(3)}, {}, {}), step=step, metrics={})


def test_nothing_is_left_to_write_once_the_last_step_is_saved(saver: Saver, listener: Listener) -> None:
    with saver:
        saver.save(State({"weight": torch.ones(3)}, {}, {}), step=9, metrics={})
        assert listener.of("checkpoint", "step") == [9]
