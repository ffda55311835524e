"""Optimizers and learning-rate schedules. A schedule is a function of the step, so resuming needs no state of it."""

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch

Schedule = Callable[[int], float]
"""Maps a step, from 0, to the learning rate of that step's update."""


def build_schedule(
    kind: Literal["cosine", "linear", "constant"], *, learning_rate: float, warmup_steps: int, total_steps: int
) -> Schedule:
    """Build a schedule that rises linearly to `learning_rate` over the warm-up and then decays to 0 or stays.

    The first update has a rate above 0, and so has the last: step `total_steps` would be the first with rate 0.
    """

    def rate(step: int) -> float:
        if step < warmup_steps:
            return learning_rate * (step + 1) / (warmup_steps + 1)
        if kind == "constant":
            return learning_rate
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return learning_rate * (1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done)))

    return rate


def build_optimizer(
    kind: Literal["adamw", "sgd", "adafactor"],
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters; vectors (biases, norms) are not decayed.

    The learning rate is set by the loop before each update.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return torch.optim.Adafactor(groups, lr=0.0)
