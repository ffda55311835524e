"""Finds out on the model at hand whether the samples of a pack stay apart in it, which no config says.

Of 142 causal architectures that transformers has, 40 let samples see each other across positions that begin anew,
without a word: state-space and linear-attention layers carry their state on, others count positions themselves.

Shapes: B rows, T tokens, N tokens of a pack, C width of what is compared, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch

from llmforge.data.packing import SHORTEST_SHARED, Pack, pack
from llmforge.data.samples import Sample
from llmforge.models import packed_attention
from llmforge.models.head import Head
from llmforge.models.load import UNREADABLE, quiet, reason
from llmforge.models.packed_attention import Layout, NotPackableError

# Lengths with one token alone, next to rows longer than the short convolutions that some layers have.
_LENGTHS = (5, 1, 33, 17, 2)
# Of the largest logit: the same numbers by other kernels, and through products of another shape.
_TOLERANCE = 1e-4
# Of the root mean square, in bf16 and fp16: single values are off by more than a small leak would make them, and that
# is what the gradients that have to be exactly 0 are for.
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Isolation:
    """Whether a model `packs` samples in one row and `shares` what they begin with; or the reason not."""

    packs: bool
    shares: bool
    reason: str = ""


class _LeakError(Exception):
    """What one sample does reaches another, or a pack computes something else than its samples do alone."""


def isolate(model: Any, head: Head | None, autocast: Callable[[], AbstractContextManager]) -> Isolation:
    """Let a model attend within packs, if it then computes for each sample what it computes for that sample alone.

    Tried are packs without and with shared beginnings. What the head is shown (without a head, every logit) has to
    equal that of the sample in a padded batch; a sample whose tokens change must leave the others' as they are; and the
    gradient of a sample's must be exactly zero at every token that is not on its own path. A model that fails keeps the
    attention that it had.

    Args:
        model: on the device where it will be trained; its modes and the random state stay as they were.
        head: the model's own.
    """
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    before = _implementation(base)
    ours = packed_attention.OWN_NAME if before == "eager" else packed_attention.NAME
    if before not in ("eager", "sdpa", "flash_attention_2"):
        return Isolation(False, False, f"its attention is {before}, which packs do not reach")
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    try:
        with quiet(), autocast(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            plain, nested = (_Probe(model, base, head, rows, device) for rows in (_rows(), _nested_rows()))
            base.set_attn_implementation(ours)
            if _implementation(base) != ours:
                base.set_attn_implementation(before)
                return Isolation(False, False, "its attention cannot be exchanged")
            if problem := plain.problem(share=False):
                base.set_attn_implementation(before)
                return Isolation(False, False, problem)
            problem = nested.problem(share=True)
            return Isolation(True, not problem, problem)
    finally:
        for module, training in modes.items():
            module.training = training


def _implementation(base: Any) -> str:
    """Name the attention implementation that all parts of a model have, or those that they have."""
    return ", ".join(sorted({str(m.config._attn_implementation) for m in base.modules() if hasattr(m, "config")}))


def _rows() -> list[list[float]]:
    """Make rows without a common beginning, as fractions of the vocabulary."""
    numbers = np.random.default_rng(0)
    return [numbers.random(length).tolist() for length in _LENGTHS]


def _nested_rows() -> list[list[float]]:
    """Make rows that share beginnings in two levels, with one that is another's beginning, one twice, and one apart."""
    numbers = np.random.default_rng(1)

    def more(length: int) -> list[float]:
        return numbers.random(length).tolist()

    policy, examples = more(SHORTEST_SHARED + 3), more(SHORTEST_SHARED)
    deep = [policy + examples + more(length) for length in (7, 1, 12)]
    return [*deep, policy + examples, policy + more(3), policy + more(20), deep[0], more(9)]


class _Probe:
    """Rows of tokens and what a model computes for each of them alone: the head's input, or without a head, logits."""

    def __init__(
        self, model: Any, base: Any, head: Head | None, rows: Sequence[Sequence[float]], device: torch.device
    ) -> None:
        self._model, self._base, self._head, self._device = model, base, head, device
        self._vocabulary = len(base.get_input_embeddings().weight)
        self._rows = [[int(number * self._vocabulary) for number in row] for row in rows]
        longest = max(map(len, self._rows))
        ids_BT = torch.zeros((len(self._rows), longest), dtype=torch.int64, device=device)
        mask_BT = torch.zeros_like(ids_BT)
        for number, row in enumerate(self._rows):
            ids_BT[number, : len(row)] = torch.tensor(row)
            mask_BT[number, : len(row)] = 1
        with torch.no_grad():
            output_BTC = self._run(input_ids=ids_BT, attention_mask=mask_BT).unflatten(0, ids_BT.shape)
        self._alone = [output_TC[: len(row)] for output_TC, row in zip(output_BTC, self._rows, strict=True)]
        self._scale = float(max(output_TC.abs().max() for output_TC in self._alone))
        self._half = output_BTC.dtype in (torch.bfloat16, torch.float16)

    def _run(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Give what is computed for each place of a batch, as one row."""
        if self._head is None:
            logits_BTV: torch.Tensor = self._model(**inputs, use_cache=False).logits
            return logits_BTV.flatten(0, 1)
        with self._head.selecting(torch.arange(inputs["input_ids"].numel(), device=self._device)):
            self._model(**inputs, use_cache=False)
        return self._head.take()

    def problem(self, *, share: bool) -> str:
        """Say what is wrong with a pack of the rows; nothing if nothing is."""
        try:
            self._check(share)
        except torch.OutOfMemoryError:
            raise
        except _LeakError as leak:
            return str(leak)
        except NotPackableError as error:
            return str(error)
        except (*UNREADABLE, IndexError, NotImplementedError) as error:
            return f"it cannot compute a pack ({reason(error)})"
        return ""

    def _check(self, share: bool) -> None:
        made, paths = self._pack(self._rows, share)
        embeddings: list[torch.Tensor] = []

        def watch(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            embeddings.append(output.detach().requires_grad_())
            return embeddings[-1].clone()  # some models scale it in place

        handle = self._base.get_input_embeddings().register_forward_hook(watch)
        try:
            output_NC = self._run_packed(made)
        finally:
            handle.remove()
        for alone_TC, path in zip(self._alone, paths, strict=True):
            self._compare(output_NC[path], alone_TC, "an example is something else in a pack than alone")
        for chosen in (paths[::2], paths[1::2]):
            seen = torch.zeros(len(output_NC), dtype=torch.bool, device=self._device)
            seen[torch.cat(chosen)] = True
            (gradient,) = torch.autograd.grad(
                output_NC[torch.cat(chosen)].float().square().sum(), embeddings[0], retain_graph=True
            )
            if gradient.flatten(0, -2)[~seen].any():
                raise _LeakError("examples in a pack see each other")
        del output_NC, gradient
        for changed in (0, len(self._rows) - 1):  # the last of the nested rows stands apart, in front or behind
            rows = list(self._rows)
            rows[changed] = [(token + self._vocabulary // 2) % self._vocabulary for token in rows[changed]]
            if share and changed == 0:
                continue
            other, other_paths = self._pack(rows, share)
            with torch.no_grad():
                output_NC = self._run_packed(other)
            for number, path in enumerate(other_paths):
                if number != changed:
                    self._compare(output_NC[path], self._alone[number], "examples in a pack see each other")

    def _pack(self, rows: Sequence[list[int]], share: bool) -> tuple[Pack, list[torch.Tensor]]:
        """Pack rows; give the places of each row's tokens too."""
        samples = [Sample(row, [0.0] * len(row)) for row in rows]
        made = pack(samples, share=share)
        layout, found = Layout.of(made), []
        leaves = [
            np.concatenate([np.arange(layout.starts[n], layout.ends[n]) for n in layout.path(node)])
            for node in range(len(layout.starts))
        ]
        for row in rows:
            path = next(p for p in leaves if len(p) >= len(row) and made.input_ids[p[: len(row)]].tolist() == row)
            found.append(torch.from_numpy(path[: len(row)]).to(self._device))
        return made, found

    def _run_packed(self, made: Pack) -> torch.Tensor:
        ids_1N = torch.from_numpy(made.input_ids)[None].to(self._device)
        position_ids_1N = torch.from_numpy(made.position_ids)[None].to(self._device)
        with packed_attention.packed(Layout.of(made)):
            return self._run(input_ids=ids_1N, position_ids=position_ids_1N, attention_mask=torch.ones_like(ids_1N))

    def _compare(self, found: torch.Tensor, expected: torch.Tensor, problem: str) -> None:
        off, expected = found.detach().float() - expected.float(), expected.float()
        difference = float(off.abs().max())
        allowed = difference <= _TOLERANCE * self._scale
        if self._half:
            allowed = float(off.norm()) <= _HALF_TOLERANCE * float(expected.norm())
        if not allowed:  # nor where it is NaN
            raise _LeakError(f"{problem} (by up to {difference:.2g}, where values reach {self._scale:.2g})")
