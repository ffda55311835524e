"""The training loop: the list of what happens in a step, and nothing else.

It knows no file, no device layout, no task and no config: all of that is in the parts it is handed.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import psutil
import torch

from llmforge.errors import Interrupted, NonFiniteLossError
from llmforge.tasks import Batch, PackedBatch
from llmforge.train.backends import Backend
from llmforge.train.evaluation import Autocast, ComputeLoss
from llmforge.train.optimization import Schedule
from llmforge.train.reporter import Reporter


def train(
    model: Any,
    compute_loss: ComputeLoss,
    *,
    micro_batches: Callable[[int], Sequence[Batch | PackedBatch]],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    backend: Backend,
    autocast: Autocast,
    reporter: Reporter,
    first_step: int,
    last_step: int,
    steps_per_epoch: int,
    max_grad_norm: float,
    seed: int,
    is_milestone: Callable[[int], bool],
    milestone: Callable[[int], None],
    save: Callable[[int], None],
    settle: Callable[[], None],
    interrupted: Callable[[], bool],
) -> None:
    """Run the updates `first_step` + 1 … `last_step`.

    Steps count finished updates: step 1 is the first. The loss of a step is the sum over all of its micro-batches and
    ranks divided once by the sum of their weights, so the result does not depend on how the step was cut.

    Args:
        micro_batches: gives the micro-batches of this rank for an update, by its number from 0.
        is_milestone, milestone: after which steps to evaluate and write a checkpoint, and how.
        interrupted, save: whether to stop after the current step, and how to write a checkpoint without evaluating: one
            more evaluation could change which checkpoint is best.
        settle: called after every step, to tell of checkpoints written meanwhile.

    Raises:
        NonFiniteLossError: loss or gradient norm is not finite.
        Interrupted: `interrupted` said so, and `save` has everything up to here.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for index in range(first_step, last_step):
        began = time.perf_counter()
        torch.manual_seed(_mix(seed, index, backend.rank))  # dropout depends on the step, not on what came before
        batches = micro_batches(index)
        weight = backend.total(sum(batch.weight for batch in batches))
        loss_sum = torch.zeros((), dtype=torch.float64, device=backend.device)
        for number, batch in enumerate(batches, 1):
            with autocast():
                loss = compute_loss(batch.to(backend.device))
            backend.backward(loss.sum / weight, last=number == len(batches))
            loss_sum += loss.sum.detach()
        busy = time.perf_counter() - began
        for group in optimizer.param_groups:
            group["lr"] = schedule(index)
        norm = backend.clip(parameters, max_grad_norm)
        total, gradient_norm = torch.stack((loss_sum, norm.to(loss_sum))).tolist()  # the step's one wait for the device
        train_loss = backend.total(total) / weight
        _stop_if_not_finite(index + 1, train_loss, gradient_norm)
        backend.step(optimizer)

        step = index + 1
        seconds = time.perf_counter() - began
        workers = Workers.gather(backend, batches, busy)
        reporter.event(
            "step",
            step=step,
            epoch=round(step / steps_per_epoch, 4),
            train_loss=train_loss,
            learning_rate=schedule(index),
            grad_norm=gradient_norm,
            examples=workers.examples,
            tokens=workers.tokens,
            trained_tokens=workers.trained_tokens,
            tokens_per_second=workers.tokens / seconds,
            step_seconds=seconds,
            memory_bytes=_device_memory(backend.device),
            **workers.fields(),
        )
        settle()
        stopping = bool(backend.total(float(interrupted())))  # one of the ranks is asked to, and all do
        if is_milestone(step):
            milestone(step)
        elif stopping:
            save(step)
        if stopping and step < last_step:
            raise Interrupted(f"interrupted after step {step} of {last_step}; its checkpoint is written")


@dataclass(frozen=True)
class Workers:
    """What each rank did in a step: a row of `_COLUMNS` for each, in the order of ranks."""

    rows: Sequence[Sequence[float]]

    @classmethod
    def gather(cls, backend: Backend, batches: Sequence[Batch | PackedBatch], busy: float) -> Self:
        """Put together what all ranks say; `busy` is how long this one computed, in seconds."""
        counts = [sum(getattr(batch, name) for batch in batches) for name in ("examples", "tokens", "trained_tokens")]
        memory = _device_memory(backend.device) or _own_memory()
        return cls(backend.gather([*counts, busy, memory]))

    @property
    def examples(self) -> int:
        return self._sum("examples")

    @property
    def tokens(self) -> int:
        return self._sum("tokens")

    @property
    def trained_tokens(self) -> int:
        return self._sum("trained_tokens")

    def fields(self) -> dict[str, Any]:
        """Give what an event says of each worker; nothing where there is only one."""
        if len(self.rows) == 1:
            return {}
        each = [dict(zip(_COLUMNS, row, strict=True)) for row in self.rows]
        return {
            "workers": [
                {
                    "worker": rank,
                    "tokens": int(row["tokens"]),
                    "busy_seconds": row["busy_seconds"],
                    "memory_bytes": int(row["memory_bytes"]),
                }
                for rank, row in enumerate(each)
            ]
        }

    def _sum(self, name: str) -> int:
        column = _COLUMNS.index(name)
        return int(sum(row[column] for row in self.rows))


_COLUMNS = ("examples", "tokens", "trained_tokens", "busy_seconds", "memory_bytes")


def _stop_if_not_finite(step: int, loss: float, gradient_norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {gradient_norm}"
    raise NonFiniteLossError(
        f"{what} at step {step}; no checkpoint holds that update. Lower learning_rate, use dtype: fp32, or look "
        "at that step's rows; the run's last checkpoint is from before it"
    )


def _mix(seed: int, step: int, rank: int) -> int:
    """Give each step and rank its own stream of random numbers (splitmix64's finaliser)."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank + 1) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) >> 1


def _device_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _own_memory() -> int:
    return psutil.Process().memory_info().rss
