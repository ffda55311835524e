"""Takes a causal language model apart, so that its head sees trained places only, and only some of them at a time.

Logits are the largest tensors of a training step: a row for each place, as wide as the vocabulary. Nothing but the loss
needs them, and it needs them once. A frozen head passes on one gradient only, that of the hidden states, which can be
computed while a chunk's logits are there (as Liger's kernels do, https://arxiv.org/abs/2410.10989).

Shapes: B rows, T tokens, N trained places, C width of the hidden states, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch.nn.functional import cross_entropy

from llmforge.models.load import UNREADABLE, quiet

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # of fp32 logits: as many as stay in caches, or fill a GPU
_SMALLEST_CHUNK = 64  # places; with fewer, the matrix product itself becomes slow
_PROBE_TOKENS = 6
_TOLERANCE = 1e-4  # of the largest logit: the same numbers through products of another shape
_HALF_TOLERANCE = 2e-2


class Head:
    """What makes logits of a model's last hidden states, whatever that is: projection, bias, scaling, soft-capping.

    It is the model's own forward, run over hidden states that are given in the backbone's place.
    """

    def __init__(self, model: Any) -> None:
        self._model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        self._backbone = self._model.get_decoder()
        path = next(name for name, module in self._model.named_modules() if module is self._backbone)
        parent, _, self._name = path.rpartition(".")
        self._parent = self._model.get_submodule(parent)
        inside = set(self._backbone.modules())
        outside = [module for module in self._model.modules() if module not in inside]
        self.is_frozen = not any(p.requires_grad for module in outside for p in module.parameters(recurse=False))

    def hidden(self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor) -> torch.Tensor:
        """Compute the last hidden states (B, T, C)."""
        output = self._backbone(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
        hidden_BTC: torch.Tensor = output.last_hidden_state
        return hidden_BTC

    def logits(self, hidden_NC: torch.Tensor) -> torch.Tensor:
        """Compute the logits (N, V) of hidden states, in fp32 or wider."""
        places_1N = torch.zeros(1, len(hidden_NC), dtype=torch.int64, device=hidden_NC.device)
        with self._given(hidden_NC[None]):
            logits_NV = self._model(input_ids=places_1N, use_cache=False).logits[0]
        return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))

    def loss(self, hidden_NC: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        """Sum the weighted cross-entropy (nats) of the tokens that follow, with the logits of a chunk at a time."""
        if not torch.is_grad_enabled():
            parts = zip(*(tensor.split(self.chunk) for tensor in (hidden_NC, targets_N, weights_N)), strict=True)
            return torch.stack([self.part(*part) for part in parts]).sum()
        total: torch.Tensor = _ChunkedLoss.apply(self, hidden_NC, targets_N, weights_N)
        return total

    @property
    def chunk(self) -> int:
        """How many places are computed at a time."""
        vocabulary = self._model.get_output_embeddings().weight.shape[0]
        return max(_SMALLEST_CHUNK, CHUNK_BYTES[self._model.device.type] // (4 * vocabulary))

    def part(self, hidden_NC: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        """Sum the loss of some places, all of whose logits are computed at once."""
        return (cross_entropy(self.logits(hidden_NC), targets_N, reduction="none") * weights_N).sum()

    @contextmanager
    def _given(self, hidden_1NC: torch.Tensor) -> Iterator[None]:
        """Let the model's forward find these hidden states where its backbone computes them."""
        self._parent._modules[self._name] = _Given(self._backbone, hidden_1NC)
        try:
            yield
        finally:
            self._parent._modules[self._name] = self._backbone


class _Given(torch.nn.Module):
    """Stands in for a backbone: gives what it was given, and the backbone's attributes."""

    def __init__(self, backbone: Any, hidden_1NC: torch.Tensor) -> None:
        super().__init__()
        self.__dict__["_given"] = (backbone, _Output(hidden_1NC))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_given"][0], name)

    def forward(self, *_: Any, **__: Any) -> "_Output":
        output: _Output = self.__dict__["_given"][1]
        return output


class _Output:
    """Hidden states as a backbone returns them, with none of the other things that some return beside them."""

    def __init__(self, hidden_1NC: torch.Tensor) -> None:
        self.last_hidden_state = hidden_1NC

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient of a chunk's hidden states while its logits are there; nothing is computed again."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, hidden_NC: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
    ) -> torch.Tensor:
        gradient_NC = torch.empty_like(hidden_NC)
        total = weights_N.new_zeros((), dtype=torch.promote_types(hidden_NC.dtype, torch.float32))
        for start in range(0, len(hidden_NC), head.chunk):
            places = slice(start, start + head.chunk)
            with torch.enable_grad():
                part_NC = hidden_NC[places].detach().requires_grad_()
                loss = head.part(part_NC, targets_N[places], weights_N[places])
                (gradient_NC[places],) = torch.autograd.grad(loss, [part_NC])
            total += loss.detach()
        ctx.save_for_backward(gradient_NC)
        return total

    @staticmethod
    def backward(ctx: Any, *scales: torch.Tensor) -> Any:
        (gradient_NC,) = ctx.saved_tensors
        return None, gradient_NC * scales[0], None, None


@torch.no_grad()
def find_head(model: Any) -> Head | None:
    """Take a model apart if its head is frozen and the parts, put together, compute what the model does; else None.

    Where the head is trained (in full training, tied embeddings, an adapted `lm_head`), a gradient as large as the head
    would be needed for every chunk, which costs more memory than the logits.

    Args:
        model: on the device where it will be trained; its modes and the random state stay as they were.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        head = Head(model)
        if not head.is_frozen:
            return None
        device = head._model.device
        vocabulary = len(head._model.get_input_embeddings().weight)
        rows_BT = torch.arange(2 * _PROBE_TOKENS, device=device).reshape(2, -1) * 7 % vocabulary
        mask_BT = torch.ones_like(rows_BT)
        mask_BT[1, -2:] = 0
        with quiet(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            whole_NV = model(input_ids=rows_BT, attention_mask=mask_BT, use_cache=False).logits[mask_BT > 0]
            parts_NV = head.logits(head.hidden(rows_BT, mask_BT)[mask_BT > 0])
    except torch.OutOfMemoryError:
        raise
    except (*UNREADABLE, IndexError, NotImplementedError, StopIteration):
        return None
    finally:
        for module, training in modes.items():
            module.training = training
    if whole_NV.shape != parts_NV.shape:
        return None
    allowed = _HALF_TOLERANCE if whole_NV.dtype in (torch.bfloat16, torch.float16) else _TOLERANCE
    difference = (whole_NV.to(parts_NV) - parts_NV).abs().max()
    return head if difference <= allowed * whole_NV.abs().max() else None  # not where they are NaN
