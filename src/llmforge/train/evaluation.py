"""Measures a model on held-out data."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from llmforge.errors import NonFiniteLossError
from llmforge.tasks import Batch, Loss, PackedBatch
from llmforge.train.backends import Backend

ComputeLoss = Callable[[Batch | PackedBatch], Loss]
"""Runs the model on a micro-batch."""

Autocast = Callable[[], AbstractContextManager]
"""Makes the context in which forward passes run."""


@torch.no_grad()
def evaluate(
    model: Any,
    compute_loss: ComputeLoss,
    batches: Iterable[Batch | PackedBatch],
    *,
    metrics: Callable[[float], dict[str, float]],
    backend: Backend,
    autocast: Autocast,
) -> dict[str, float]:
    """Give the `metrics` of the mean loss over all batches, each weighted token counted once whatever the batching.

    Args:
        batches: this rank's.

    Raises:
        NonFiniteLossError: the mean loss is NaN or infinite.
    """
    was_training = model.training
    model.eval()
    total = weight = 0.0
    try:
        for batch in batches:
            with autocast():
                loss = compute_loss(batch.to(backend.device))
            total += float(loss.sum)
            weight += loss.weight
    finally:
        model.train(was_training)
    everyones = backend.gather([total, weight])
    mean = sum(row[0] for row in everyones) / sum(row[1] for row in everyones)
    if not math.isfinite(mean):
        raise NonFiniteLossError(
            f"the loss on the validation data is {mean}, so the model's weights can be no good and no checkpoint was "
            "written of them. Lower learning_rate or use dtype: fp32; the run's last checkpoint is from before it"
        )
    return metrics(mean)
