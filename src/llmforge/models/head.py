"""The loss of a language model's head, computed on trained places only and on some of them at a time.

Logits are the largest tensors of a training step: a row for each place, as wide as the vocabulary. Nothing but the loss
needs them, and it needs them once. So the model's own forward runs as it is, but its head is shown nothing;
what it would have been shown goes through it in chunks, and a chunk's gradient is computed while its logits
are there, as Liger's kernels do it (https://arxiv.org/abs/2410.10989). Full logits never exist.

Shapes: B rows, T tokens, S targets, C width of the hidden states, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import peft
import torch
from torch.nn.functional import cross_entropy

from llmforge.models.load import UNREADABLE, quiet

# Bytes of logits that are there at a time: products stay efficient, and the rest of the step is larger than this.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
_SMALLEST_CHUNK = 64
_PROBE_TOKENS = 24
_LOUD = 60.0  # what the largest logit is made in the probe, so that soft-capping shows
_TOLERANCE = 1e-4  # of the largest logit
_HALF_TOLERANCE = 2e-2


class Tail(NamedTuple):
    """What a model does with its head's output: `cap` · tanh(`scale` · output / `cap`), without the tanh where 0."""

    scale: float
    cap: float

    def apply(self, output: torch.Tensor) -> torch.Tensor:
        """Make logits of the head's output."""
        logits = output if self.scale == 1.0 else output * self.scale
        return logits if not self.cap else torch.tanh(logits / self.cap) * self.cap

    def apply_(self, output: torch.Tensor) -> torch.Tensor:
        """Do the same in place."""
        if self.scale != 1.0:
            output.mul_(self.scale)
        return output if not self.cap else output.div_(self.cap).tanh_().mul_(self.cap)

    def pull_back_(self, gradient: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """Turn the gradient of logits into that of the head's output, in place; `logits` are needed with a cap."""
        if self.cap:
            assert logits is not None
            gradient.addcmul_(gradient, logits.div(self.cap).square_(), value=-1.0)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


class Head:
    """A model's output layer, whatever module it is, and what the model does with its output.

    While `selecting`, the layer is shown no place, and `take` gives what it would have been shown at the selected ones.
    A head that `stays_whole` is shown the selected places, and the model's own logits are those of them: where each
    rank holds a part of the layer, it is put together within the model's forward and backward passes only.
    """

    stays_whole = False

    def __init__(self, module: torch.nn.Module, tail: Tail) -> None:
        self.module = module
        self.tail = tail
        self._places: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        module.register_forward_pre_hook(self._select)

    @property
    def is_plain(self) -> bool:
        """Whether the layer is a linear map and nothing else, so that its gradient can be written down."""
        return type(self.module) is torch.nn.Linear

    @contextmanager
    def selecting(self, places_S: torch.Tensor) -> Iterator[None]:
        """Let the model's forward passes inside keep the hidden states of these places (of B · T) for `loss`."""
        self._places, self._hidden = places_S, None
        try:
            yield
        finally:
            self._places = None

    def loss(self, targets_S: torch.Tensor, weights_S: torch.Tensor) -> torch.Tensor:
        """Sum the weighted cross-entropy (nats) of the selected places, in fp32 or wider."""
        hidden_SC = self.take()
        chunk = max(_SMALLEST_CHUNK, _CHUNK_BYTES[hidden_SC.device.type] // (4 * self._vocabulary))
        if self.is_plain:
            return _plain_loss(self, hidden_SC, targets_S, weights_S, chunk)
        if not torch.is_grad_enabled():
            parts = zip(*(t.split(chunk) for t in (hidden_SC, targets_S, weights_S)), strict=True)
            return torch.stack([self.part(*part) for part in parts]).sum()
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        total: torch.Tensor = _AnyLoss.apply(self, targets_S, weights_S, chunk, hidden_SC, *trained)
        return total

    def part(self, hidden_SC: torch.Tensor, targets_S: torch.Tensor, weights_S: torch.Tensor) -> torch.Tensor:
        """Sum the loss of some places, all of whose logits are computed at once, by the layer itself."""
        output_SV = self.module(hidden_SC[None])[0]
        logits_SV = self.tail.apply(output_SV.to(torch.promote_types(output_SV.dtype, torch.float32)))
        return (cross_entropy(logits_SV, targets_S, reduction="none") * weights_S).sum()

    def buffer(self, name: str, shape: tuple[int, int], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Give memory that is kept from step to step: fresh pages for every step's logits cost more than computing."""
        kept = self._buffers.get((name, dtype))
        if kept is None or kept.device != like.device or kept.numel() < shape[0] * shape[1]:
            kept = self._buffers[name, dtype] = torch.empty(shape[0] * shape[1], dtype=dtype, device=like.device)
        return kept[: shape[0] * shape[1]].view(shape)

    @property
    def _vocabulary(self) -> int:
        return max((parameter.shape[0] for parameter in self.module.parameters() if parameter.ndim == 2), default=1)

    def _select(self, _: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._places is None:
            return None
        hidden_BTC = arguments[0]
        if self.stays_whole:
            return (hidden_BTC.flatten(0, 1).index_select(0, self._places)[None], *arguments[1:])
        self._hidden = hidden_BTC.flatten(0, 1).index_select(0, self._places)
        return (hidden_BTC[:1, :0].detach(), *arguments[1:])

    def take(self) -> torch.Tensor:
        """Give the hidden states (S, C) of the selected places, once."""
        assert self._hidden is not None, "the model was run without its head"
        hidden_SC, self._hidden = self._hidden, None
        return hidden_SC


def _plain_loss(
    head: Head, hidden_SC: torch.Tensor, targets_S: torch.Tensor, weights_S: torch.Tensor, chunk: int
) -> torch.Tensor:
    weight_VC, bias_V = head.module.weight, head.module.bias
    device = hidden_SC.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VC.dtype
    total: torch.Tensor = _PlainLoss.apply(head, targets_S, weights_S, chunk, dtype, hidden_SC, weight_VC, bias_V)
    return total


class _PlainLoss(torch.autograd.Function):
    """A linear head: each chunk's logits become its loss, then their own gradient, in one buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        targets_S: torch.Tensor,
        weights_S: torch.Tensor,
        chunk: int,
        dtype: torch.dtype,
        hidden_SC: torch.Tensor,
        weight_VC: torch.Tensor,
        bias_V: torch.Tensor | None,
    ) -> torch.Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[5:]
        weight, hidden = weight_VC.to(dtype), hidden_SC.to(dtype)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight_VC, dtype=wide) if needs_weight else None
        d_bias = torch.zeros_like(weight_VC[:, 0], dtype=wide) if needs_bias else None
        total = hidden.new_zeros((), dtype=wide)
        for start in range(0, len(hidden), chunk):
            places = slice(start, start + chunk)
            part, targets, weights = hidden[places], targets_S[places, None], weights_S[places, None].to(wide)
            shape = (len(part), len(weight))
            narrow = head.buffer("output", shape, part, dtype)
            torch.mm(part, weight.t(), out=narrow)
            logits = narrow if dtype == wide else head.buffer("logits", shape, part, wide).copy_(narrow)
            if bias_V is not None:
                logits += bias_V
            head.tail.apply_(logits)
            kept = head.buffer("kept", shape, part, wide).copy_(logits) if head.tail.cap else None
            torch.ops.aten._log_softmax.out(logits, -1, False, out=logits)
            total -= (logits.gather(1, targets) * weights).sum()
            if not any(ctx.needs_input_grad):
                continue
            gradient = logits.exp_().scatter_add_(1, targets, weights.new_full(targets.shape, -1.0)).mul_(weights)
            gradient = head.tail.pull_back_(gradient, kept)
            if d_bias is not None:
                d_bias += gradient.sum(0)
            if dtype != wide:
                gradient = narrow.copy_(gradient)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[places])
            if d_weight is None:
                continue
            if dtype == d_weight.dtype:
                d_weight.addmm_(gradient.t(), part)
            else:
                d_weight += gradient.t() @ part
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden_SC.dtype, weight_VC.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *scales: torch.Tensor) -> Any:
        gradients = [
            None if gradient is None else (gradient * scales[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, None, *gradients


class _AnyLoss(torch.autograd.Function):
    """Any other head, an adapted one for instance: the layer runs as it is, autograd gives each chunk's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        targets_S: torch.Tensor,
        weights_S: torch.Tensor,
        chunk: int,
        hidden_SC: torch.Tensor,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        d_hidden = torch.zeros_like(hidden_SC)
        d_trained = [torch.zeros_like(parameter) for parameter in trained]
        total = weights_S.new_zeros((), dtype=torch.promote_types(hidden_SC.dtype, torch.float32))
        for start in range(0, len(hidden_SC), chunk):
            places = slice(start, start + chunk)
            with torch.enable_grad():
                part = hidden_SC[places].detach().requires_grad_()
                loss = head.part(part, targets_S[places], weights_S[places])
                d_part, *d_parts = torch.autograd.grad(loss, [part, *trained], allow_unused=True)
            d_hidden[places] = d_part
            for whole, share in zip(d_trained, d_parts, strict=True):
                if share is not None:
                    whole += share
            total += loss.detach()
        ctx.save_for_backward(d_hidden, *d_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *scales: torch.Tensor) -> Any:
        return None, None, None, None, *((gradient * scales[0]).to(gradient.dtype) for gradient in ctx.saved_tensors)


@torch.no_grad()
def find_head(model: Any) -> Head | None:
    """Find a model's output layer and what the model does with its output; None where it is not one that `Head` knows.

    What is found is checked on the model at hand: its own logits have to come out, of quiet and of loud hidden states.

    Args:
        model: on the device where it will be trained; its modes and the random state stay as they were.
    """
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    modes = {module: module.training for module in model.modules()}
    handles = []
    try:
        model.eval()
        module = base.get_output_embeddings()
        if module is None:
            return None
        device = next(model.parameters()).device
        vocabulary = len(base.get_input_embeddings().weight)
        ids_BT = torch.arange(2 * _PROBE_TOKENS, device=device).reshape(2, -1) * 7919 % vocabulary
        factor, outputs = 1.0, []
        handles.append(module.register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:])))
        handles.append(module.register_forward_hook(lambda _, __, output: outputs.append(output.clone())))
        with quiet(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            pairs = []
            for _ in range(2):
                logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
                if len(outputs) != 1 or outputs[0].shape != logits_BTV.shape:
                    return None
                pairs.append((outputs.pop(), logits_BTV))
                factor = _LOUD / max(float(pairs[0][0].abs().max()), 1e-6)
            while handles:
                handles.pop().remove()
            tail = _find_tail(base.config, pairs)
            if tail is None:
                return None
            head = Head(module, tail)
            with head.selecting(torch.arange(ids_BT.numel(), device=device)):
                model(input_ids=ids_BT, use_cache=False)
            head.take()
            return head
    except torch.OutOfMemoryError:
        raise
    except (*UNREADABLE, AssertionError, IndexError, NotImplementedError):
        return None
    finally:
        for handle in handles:
            handle.remove()
        for part, training in modes.items():
            part.training = training


def _find_tail(config: Any, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Tail | None:
    """Find the scale and the cap that make logits of outputs; a cap has to be among the numbers of the config."""
    quiet_output, quiet_logits = (tensor.double() for tensor in pairs[0])
    ratio = float((quiet_output * quiet_logits).sum() / quiet_output.square().sum())
    numbers = [value for value in config.get_text_config().to_dict().values() if isinstance(value, float | int)]
    caps = {float(value) for value in numbers if 1 < value < 1000}
    half = pairs[0][1].dtype in (torch.bfloat16, torch.float16)
    allowed = _HALF_TOLERANCE if half else _TOLERANCE
    for tail in (Tail(1.0, 0.0), Tail(ratio, 0.0), *(Tail(1.0, cap) for cap in caps)):
        if all(
            (tail.apply(output.double()) - logits.double()).abs().max() <= allowed * logits.double().abs().max()
            for output, logits in pairs
        ):
            return tail
    return None
