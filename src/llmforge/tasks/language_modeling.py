"""Next-token prediction over weighted tokens: the batch, the loss and the metrics that several tasks share.

Shapes: B samples in a micro-batch, T tokens in the longest of them (padded on the right), N tokens of a pack, S
targets, V vocabulary.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch.nn.functional import cross_entropy

from llmforge.data.packing import pack
from llmforge.data.samples import Sample
from llmforge.models.head import Head
from llmforge.models.packed_attention import Layout, packed
from llmforge.prompt.encoder import Trained


@dataclass(frozen=True)
class Targets:
    """What a micro-batch has to predict: at the place `places_S` (of its tokens, flattened) the token `tokens_S`."""

    places_S: torch.Tensor
    tokens_S: torch.Tensor
    weights_S: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch of padded rows.

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
    is_muted: bool = False

    def muted(self) -> Self:
        """Give a copy that is computed as this one is, with a loss and gradients of exactly 0."""
        return replace(self, weight=0.0, examples=0, tokens=0, trained_tokens=0, is_muted=True)

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to a device."""
        return replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device, non_blocking=True),
            attention_mask_BT=self.attention_mask_BT.to(device, non_blocking=True),
            loss_weights_BT=self.loss_weights_BT.to(device, non_blocking=True),
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        """Give what the model's forward takes."""
        return {"input_ids": self.input_ids_BT, "attention_mask": self.attention_mask_BT}

    def targets(self) -> Targets:
        """Give the trained tokens, each with the place before it, where it is predicted."""
        tokens = (self.loss_weights_BT.flatten() > 0).nonzero().squeeze(1)
        return Targets(tokens - 1, self.input_ids_BT.flatten()[tokens], self.loss_weights_BT.flatten()[tokens])

    def attention(self) -> AbstractContextManager[None]:
        """Give the context for the forward pass."""
        return nullcontext()


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch in one row without padding; see `llmforge.data.packing.Pack`, which its counts come from."""

    input_ids_1N: torch.Tensor
    position_ids_1N: torch.Tensor
    layout: Layout
    trained: Targets
    weight: float
    examples: int
    tokens: int
    trained_tokens: int
    is_muted: bool = False

    def muted(self) -> Self:
        """Give a copy that is computed as this one is, with a loss and gradients of exactly 0."""
        return replace(self, weight=0.0, examples=0, tokens=0, trained_tokens=0, is_muted=True)

    def to(self, device: torch.device) -> "PackedBatch":
        """Copy the tensors to a device."""
        trained = self.trained
        return replace(
            self,
            input_ids_1N=self.input_ids_1N.to(device, non_blocking=True),
            position_ids_1N=self.position_ids_1N.to(device, non_blocking=True),
            trained=Targets(
                trained.places_S.to(device, non_blocking=True),
                trained.tokens_S.to(device, non_blocking=True),
                trained.weights_S.to(device, non_blocking=True),
            ),
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        """Give what the model's forward takes.

        With the mask, whose every place is real, transformers leaves the positions alone; it would else look for packed
        rows by itself, and find other ones.
        """
        ids = self.input_ids_1N
        return {"input_ids": ids, "position_ids": self.position_ids_1N, "attention_mask": torch.ones_like(ids)}

    def targets(self) -> Targets:
        """Give the trained tokens."""
        return self.trained

    def attention(self) -> AbstractContextManager[None]:
        """Give the context for the forward pass."""
        return packed(self.layout)


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
        pad_to: length that every batch is padded to, if its samples are not longer; None pads to the longest of them.
    """

    pad_token_id: int
    pad_to: int | None

    name: ClassVar[Literal["causal_lm", "instruction_tuning"]]
    trained: ClassVar[Trained]
    needs_assistant: ClassVar[bool]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad samples on the right into one micro-batch."""
        longest = max(self.pad_to or 0, *(len(sample.input_ids) for sample in samples))
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

    def pack(self, samples: Sequence[Sample], *, share: bool, fill_to: int = 1) -> PackedBatch:
        """Lay samples into one row; see `llmforge.data.packing.pack`."""
        made = pack(samples, share=share, fill_to=fill_to, fill_with=self.pad_token_id)
        return PackedBatch(
            input_ids_1N=torch.from_numpy(made.input_ids)[None],
            position_ids_1N=torch.from_numpy(made.position_ids)[None],
            layout=Layout.of(made),
            trained=Targets(*(torch.from_numpy(a) for a in (made.places, made.targets, made.weights))),
            weight=made.weight,
            examples=made.examples,
            tokens=made.tokens,
            trained_tokens=made.trained_tokens,
        )

    def loss(self, model: Any, batch: Batch | PackedBatch, head: Head | None = None) -> Loss:
        """Sum the weighted cross-entropy of the trained tokens, in nats.

        Only trained places are turned into log-probabilities, in fp32 or wider; with the model's `head` only they go
        through it. A muted batch gives a loss of 0 through which gradients of 0 flow: other ranks may wait for them.
        """
        if not batch.weight and not batch.is_muted:
            return Loss(torch.zeros((), device=batch.inputs()["input_ids"].device, requires_grad=True), 0.0)
        targets = batch.targets()
        with batch.attention():
            if head is None:
                logits_SV = model(**batch.inputs(), use_cache=False).logits.flatten(0, 1)[targets.places_S]
            else:
                with head.selecting(targets.places_S):
                    logits_SV = model(**batch.inputs(), use_cache=False).logits.flatten(0, 1)
                if not head.stays_whole:
                    return Loss(head.loss(targets.tokens_S, targets.weights_S), batch.weight)
        logits_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
        losses_S = cross_entropy(logits_SV, targets.tokens_S, reduction="none")
        total = (losses_S * targets.weights_S).sum()
        return Loss(total * 0.0 if batch.is_muted else total, batch.weight)

    def metrics(self, mean_loss: float) -> dict[str, float]:
        """Name what an evaluation reports for a mean loss in nats per weighted token."""
        return {"eval_loss": mean_loss, "perplexity": math.exp(min(mean_loss, 700.0))}
