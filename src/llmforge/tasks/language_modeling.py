"""Next-token prediction over weighted tokens: the batch, the loss and the metrics that several tasks share.

Shapes: B samples in a micro-batch, T tokens in the longest of them (padded on the right), S the places where some row
is trained, V vocabulary, N trained tokens of the micro-batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import cross_entropy

from llmforge.data.samples import Sample
from llmforge.prompt.encoder import Trained


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    `input_ids_BT` (int64), `attention_mask_BT` (int64, 1 on real tokens) and `loss_weights_BT` (float32, weight of
    predicting the token at that place) are tensors; `weight` is the sum of the loss weights, `tokens` and
    `trained_tokens` count real tokens.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    loss_weights_BT: torch.Tensor
    weight: float
    examples: int
    tokens: int
    trained_tokens: int

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to a device."""
        return Batch(
            self.input_ids_BT.to(device, non_blocking=True),
            self.attention_mask_BT.to(device, non_blocking=True),
            self.loss_weights_BT.to(device, non_blocking=True),
            self.weight,
            self.examples,
            self.tokens,
            self.trained_tokens,
        )


@dataclass(frozen=True)
class Loss:
    """A sum over weighted tokens, as a scalar tensor (fp32 or wider) with gradient, and the weight to divide it by."""

    sum: torch.Tensor
    weight: float


@dataclass(frozen=True)
class LanguageModeling:
    """What the tasks that predict tokens have in common; each names which tokens count.

    Args:
        pad_token_id: fills rows on the right; never attended to, never trained.
        pad_to: length that every batch is padded to; None pads to its longest sample.
        keeps_logits: whether the model's forward takes `logits_to_keep`, so that the head computes only what the loss
            reads.
    """

    pad_token_id: int
    pad_to: int | None
    keeps_logits: bool

    name: ClassVar[Literal["causal_lm", "instruction_tuning"]]
    trained: ClassVar[Trained]
    needs_assistant: ClassVar[bool]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad samples on the right into one micro-batch."""
        longest = self.pad_to or max(len(sample.input_ids) for sample in samples)
        shape = (len(samples), longest)
        input_ids_BT = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask_BT = torch.zeros(shape, dtype=torch.int64)
        loss_weights_BT = torch.zeros(shape, dtype=torch.float32)
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            input_ids_BT[row, :length] = torch.as_tensor(sample.input_ids)
            attention_mask_BT[row, :length] = 1
            loss_weights_BT[row, :length] = torch.as_tensor(sample.loss_weights, dtype=torch.float32)
        return Batch(
            input_ids_BT,
            attention_mask_BT,
            loss_weights_BT,
            weight=float(loss_weights_BT.sum(dtype=torch.float64)),
            examples=len(samples),
            tokens=int(attention_mask_BT.sum()),
            trained_tokens=int((loss_weights_BT > 0).sum()),
        )

    def loss(self, model: Any, batch: Batch) -> Loss:
        """Sum the weighted cross-entropy of the trained tokens, in nats.

        Only trained positions are turned into log-probabilities, in fp32 or wider, and where the model allows it the
        head runs only where some row of the batch is trained.
        """
        trained_BT = batch.loss_weights_BT > 0
        if not batch.weight:
            return Loss(torch.zeros((), device=batch.input_ids_BT.device, requires_grad=True), 0.0)
        places_S = trained_BT.any(dim=0).nonzero().squeeze(1)
        # The logits at one place predict the token at the next. Places are given as a tensor even where they are a
        # tail: of a slice, torch makes a batched product that copies the head's weight for every row.
        kept = {"logits_to_keep": places_S - 1} if self.keeps_logits else {}
        output = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False, **kept)
        logits_BSV = output.logits if self.keeps_logits else output.logits[:, places_S - 1]
        trained_BS = trained_BT[:, places_S]
        logits_NV = logits_BSV[trained_BS]
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        targets_N = batch.input_ids_BT[:, places_S][trained_BS]
        weights_N = batch.loss_weights_BT[:, places_S][trained_BS]
        losses_N = cross_entropy(logits_NV, targets_N, reduction="none")
        return Loss((losses_N * weights_N).sum(), batch.weight)

    def metrics(self, mean_loss: float) -> dict[str, float]:
        """Name what an evaluation reports for a mean loss in nats per weighted token."""
        return {"eval_loss": mean_loss, "perplexity": math.exp(min(mean_loss, 700.0))}
