"""Compares what different copies of one model compute: the one that was trained, the one on disk, the merged one.

Shapes: T tokens of a probe, P places of it that are looked at, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import log_softmax

from llmforge.models.load import quiet, takes_logits_to_keep

PLACES = 48  # looked at per probe, the last ones: with a large vocabulary each costs a megabyte
Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two models' predictions are apart, over P places of all probes.

    `kl` is the mean Kullback-Leibler divergence from the first to the second in nats, `max_difference` and
    `mean_difference` are of the log-probabilities of the tokens that are there, `same_choice` is the share of places at
    which both find the same token likeliest, `max_logit_difference` the largest difference between any two logits.
    """

    places: int
    kl: float
    max_difference: float
    mean_difference: float
    max_logit_difference: float
    same_choice: float

    def figures(self) -> dict[str, float]:
        """Give the figures under their names, rounded to what they are worth."""
        return {
            name: value if isinstance(value, int) else float(f"{value:.4g}") for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Reference:
    """What a model computes for some probes: `logits_PV` of each (fp32, on the CPU) and the tokens that follow."""

    probes: list[list[int]]
    logits: list[torch.Tensor]

    def agreement(self, other: "Reference") -> Agreement:
        """Compare another model's predictions with these."""
        kls, differences, logit_differences, choices = [], [], [], []
        for probe, ours_PV, theirs_PV in zip(self.probes, self.logits, other.logits, strict=True):
            ours, theirs = log_softmax(ours_PV, -1), log_softmax(theirs_PV, -1)
            kls.append((ours.exp() * (ours - theirs)).sum(-1))
            differences.append((_log_probs(probe, ours_PV) - _log_probs(probe, theirs_PV)).abs())
            logit_differences.append((ours_PV - theirs_PV).abs().amax(-1))
            choices.append((ours_PV.argmax(-1) == theirs_PV.argmax(-1)).float())
        kl, difference = torch.cat(kls), torch.cat(differences)
        return Agreement(
            places=len(kl),
            kl=max(float(kl.mean()), 0.0),
            max_difference=float(difference.max()),
            mean_difference=float(difference.mean()),
            max_logit_difference=float(torch.cat(logit_differences).max()),
            same_choice=float(torch.cat(choices).mean()),
        )

    @property
    def is_finite(self) -> bool:
        """Say whether there are numbers to compare: no NaN, and nothing infinite."""
        return all(bool(logits_PV.isfinite().all()) for logits_PV in self.logits)

    def log_probs(self) -> list[list[float]]:
        """Give the log-probabilities of each probe's last tokens, P of them, rounded to five digits."""
        return [
            [round(value, 5) for value in _log_probs(probe, logits_PV).tolist()]
            for probe, logits_PV in zip(self.probes, self.logits, strict=True)
        ]


@torch.no_grad()
def measure(model: Any, probes: Sequence[Sequence[int]], *, device: torch.device, autocast: Autocast) -> Reference:
    """Run a model over probes (token ids), one by one, without dropout."""
    was_training = model.training
    model.eval()
    tokens = [list(probe) for probe in probes]
    logits = []
    kept = {"logits_to_keep": PLACES + 1} if takes_logits_to_keep(model) else {}
    try:
        for probe in tokens:
            with quiet(), autocast():
                output = model(input_ids=torch.tensor([probe], device=device), use_cache=False, **kept)
            logits.append(output.logits[0, :-1][-PLACES:].float().cpu())  # the last predicts what nobody wrote
    finally:
        model.train(was_training)
    return Reference(tokens, logits)


def log_prob_difference(reference: Reference, recorded: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Give the mean and the largest difference between a model's log-probabilities and recorded ones."""
    differences = [
        abs(ours - theirs)
        for ours_P, theirs_P in zip(reference.log_probs(), recorded, strict=True)
        for ours, theirs in zip(ours_P, theirs_P, strict=True)
    ]
    return sum(differences) / len(differences), max(differences)


def _log_probs(probe: list[int], logits_PV: torch.Tensor) -> torch.Tensor:
    targets_P1 = torch.tensor(probe[len(probe) - len(logits_PV) :])[:, None]
    return log_softmax(logits_PV, -1).gather(-1, targets_P1).flatten()
