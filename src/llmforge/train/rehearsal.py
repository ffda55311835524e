"""The worst of a run, tried before its first step: what does not fit into memory shows in the first minute."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmforge.checkpoint import save_checkpoint
from llmforge.tasks import Batch, PackedBatch
from llmforge.train.backends import Backend
from llmforge.train.evaluation import Autocast, ComputeLoss

# On a CPU nothing is tried where the largest micro-batch needs less than this share of the memory by the estimate: it
# costs as much as a step, and no error comes that could be put into words; the system ends the process.
_PLENTY = 0.25


def is_needed(device: torch.device, places: int, fitting_tokens: float) -> bool:
    """Say whether memory could be too little for micro-batches of so many places."""
    return device.type != "cpu" or places > _PLENTY * fitting_tokens


def rehearse(
    model: Any,
    compute_loss: ComputeLoss,
    largest: Batch | PackedBatch,
    evaluated: Callable[[], Batch | PackedBatch | None],
    *,
    optimizer: torch.optim.Optimizer,
    backend: Backend,
    autocast: Autocast,
    checkpoints: Path,
) -> str:
    """Run the largest micro-batch forward and backward, one of an evaluation, and write a checkpoint; undo all of it.

    Nothing of it stays: no gradient, no optimizer state, no file. Space is taken for what the optimizer will hold.

    Returns:
        What was tried, in words.

    Raises:
        torch.OutOfMemoryError: the device's memory is too small.
        OutputError: the disk is full, or cannot be written to.
    """
    began = time.perf_counter()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    held = [] if optimizer.state else [torch.empty_like(p) for p in trained for _ in range(2)]
    model.train()
    with autocast():
        loss = compute_loss(largest.to(backend.device))
    backend.backward(loss.sum / max(loss.weight, 1.0), last=False)
    optimizer.zero_grad(set_to_none=True)
    batch = evaluated()
    if batch is not None:
        model.eval()
        with torch.no_grad(), autocast():
            compute_loss(batch.to(backend.device))
        model.train()
    del held
    trial = checkpoints / ".step-trial"  # which `checkpoint.sweep` deletes, should the program be killed here
    try:
        state = backend.state(model, optimizer)
        save_checkpoint(trial, step=0, state=state, metrics={}, rank=backend.rank, total=backend.total)
    finally:
        if backend.rank == 0:
            shutil.rmtree(trial, ignore_errors=True)
    places = largest.inputs()["input_ids"].numel()
    return (
        f"tried first what needs most memory: a micro-batch of {places:,} tokens, an evaluation and a checkpoint "
        f"({time.perf_counter() - began:.1f} s)"
    )
