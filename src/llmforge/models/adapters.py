"""LoRA adapters of several runs over one copy of the base model: each token of a batch is computed with its own.

An adapter is no part of the model here, as it is for PEFT: its matrices lie beside it, and a hook on each layer that an
adapter knows adds what they compute. So one is added or removed without touching what is being computed, and costs
nothing but its own matrices.

Where few tokens have several adapters, as when many answers grow, the matrices of all of them are stacked: two products
for a layer instead of two for each adapter, and of what the first gives, a token keeps its own adapter's part. That
computes too much, which costs less than many small products do.

Shapes: N tokens, I and O features that go into and come out of a layer, R rank, K ranks of several adapters together.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llmforge.errors import ModelError
from llmforge.models.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter

_PREFIX = "base_model.model."
_PARTS = {  # how PEFT names the two matrices of a layer
    torch.nn.Linear: (".lora_A.weight", ".lora_B.weight"),
    torch.nn.Embedding: (".lora_embedding_A", ".lora_embedding_B"),
}
# Measured is only that stacking gains for 16 tokens on a CPU. What is computed too much grows with tokens times
# adapters, and a stack is a copy, so both are bounded; where it stops gaining was not looked for.
_MOST_STACKED = 64  # tokens
_MOST_BYTES = 2**28  # of all adapters in a stack


class NotShareableError(ModelError):
    """A sound adapter that changes more of the base model than products beside its linear layers and embeddings."""


@dataclass(frozen=True)
class _Low:
    """What an adapter adds to a layer: `scale` · x · A^T · B^T; to an embedding, whose x is an id, that of a unit x."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    embeds: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # In fp32, as it was trained and as PEFT computes it, unless an autocast says otherwise.
        if self.embeds:
            hidden = torch.nn.functional.embedding(x, self.a_RI.t())
        else:
            hidden = torch.nn.functional.linear(x.to(self.a_RI.dtype), self.a_RI)
        return torch.nn.functional.linear(hidden, self.b_OR) * self.scale


@dataclass(frozen=True)
class _Stack:
    """What several adapters add to a layer, one below the other; `b_OK` contains the scales."""

    a_KI: torch.Tensor
    b_OK: torch.Tensor
    adapter_K: torch.Tensor  # whose the rank is: a number in the step
    embeds: bool

    def __call__(self, rows: torch.Tensor, adapter_N: torch.Tensor) -> torch.Tensor:
        # As A xᵀ and B hᵀ, which a CPU computes faster for few tokens (few_rows.py).
        h_KN = self.a_KI[:, rows] if self.embeds else self.a_KI @ rows.to(self.a_KI.dtype).t()
        h_KN = h_KN.masked_fill(self.adapter_K[:, None] != adapter_N, 0)
        return (self.b_OK @ h_KN).t()


class _Layer:
    """A layer of the base model, by its path, and what each adapter that knows it adds to it."""

    def __init__(self, path: str, *, embeds: bool) -> None:
        self.path = path
        self._embeds = embeds
        self._lows: dict[str, _Low] = {}
        self._stack: tuple[tuple[str, ...], _Stack | None] = ((), None)  # the last one, and of which adapters it is

    def get(self, name: str) -> _Low | None:
        return self._lows.get(name)

    def set(self, name: str, low: _Low | None) -> None:
        """Let an adapter add that, or nothing any more."""
        self._lows.pop(name, None)
        if low is not None:
            self._lows[name] = low
        self._stack = ((), None)

    def stack(self, names: tuple[str, ...]) -> _Stack | None:
        """Stack what these adapters add; nothing if none of them adds anything."""
        if self._stack[0] != names:
            lows = [(number, low) for number, name in enumerate(names) if (low := self._lows.get(name)) is not None]
            stack = None
            if lows:
                a_KI = torch.cat([low.a_RI for _, low in lows])
                b_OK = torch.cat([low.b_OR * low.scale for _, low in lows], dim=1)
                adapter_K = torch.tensor([number for number, low in lows for _ in low.a_RI], device=a_KI.device)
                stack = _Stack(a_KI, b_OK, adapter_K, self._embeds)
            self._stack = (names, stack)
        return self._stack[1]

    def rows(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """Give a layer's input (…, I) as (N, I), or ids (…) as (N).

        Raises:
            ModelError: the layer is given other tokens than those of the step, and nobody knows whose they are.
        """
        rows = x.flatten() if self._embeds else x.flatten(0, -2)
        if len(rows) != tokens:
            raise ModelError(
                f"requests for different adapters cannot share a step: {self.path} is given {len(rows)} of its "
                f"{tokens} tokens. Serve one adapter at a time, or whole models: llmforge export --format merged"
            )
        return rows


class _Step(Protocol):
    """Which token of a step has which adapter."""

    def add(self, layer: _Layer, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add what the tokens' adapters compute from a layer's input to its output."""


@dataclass(frozen=True)
class _One:
    """All tokens have the same one."""

    name: str

    def add(self, layer: _Layer, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        low = layer.get(self.name)
        return output if low is None else output + low(x).to(output.dtype)


@dataclass(frozen=True)
class _Grouped:
    """The places of each adapter's tokens."""

    tokens: int
    places: Mapping[str, torch.Tensor]

    def add(self, layer: _Layer, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        rows, output_NO = layer.rows(x, self.tokens), output.flatten(0, -2)
        for name, places in self.places.items():
            if (low := layer.get(name)) is not None:
                more = low(rows.index_select(0, places)).to(output.dtype)
                output_NO = output_NO.index_add(0, places, more)
        return output_NO.view_as(output)


@dataclass(frozen=True)
class _Stacked:
    """For each token, the number of its adapter among these; -1 where it has none."""

    names: tuple[str, ...]
    adapter_N: torch.Tensor

    def add(self, layer: _Layer, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        rows, stack = layer.rows(x, len(self.adapter_N)), layer.stack(self.names)
        if stack is None:
            return output
        return output + stack(rows, self.adapter_N).to(output.dtype).reshape(output.shape)


class Adapters:
    """The adapters over one base model.

    Args:
        model: the base model, without any.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._layers: dict[str, _Layer] = {}
        self._bytes: dict[str, int] = {}
        self._versions: dict[str, int] = {}
        self._narrow: set[torch.nn.Module] = set()
        self._step: _Step | None = None
        self._narrow_step: _Step | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._bytes

    @property
    def bytes_of(self) -> Mapping[str, int]:
        """The bytes that each adapter takes, by name."""
        return dict(self._bytes)

    def version(self, name: str) -> int:
        """Count how often an adapter was added under a name."""
        return self._versions.get(name, 0)

    def read(self, directory: Path) -> dict[str, Any]:
        """Read an adapter and check that it fits; from any thread. What it gives is for `add`.

        Raises:
            NotShareableError: it needs a base model of its own.
            ModelError: it is damaged, or belongs to another base model.
        """
        check_adapter(directory, key="adapter")
        settings = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if why := needs_own_base(settings):
            raise NotShareableError(f"the adapter in {directory} cannot share its base model: {why}")
        config = peft.LoraConfig.from_pretrained(directory)
        try:
            tensors = load_file(directory / ADAPTER_WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{directory / ADAPTER_WEIGHTS} cannot be read: {error}") from error
        found: dict[str, Any] = {}
        ends = {end: pair for pair in _PARTS.values() for end in pair}
        for name, a_RI in tensors.items():
            end = next((end for end in ends if name.endswith(end)), None)
            if end is None or not name.startswith(_PREFIX):
                raise NotShareableError(f"the adapter in {directory} cannot share its base model: it holds {name}")
            if end == ends[end][1]:
                continue
            path = name[len(_PREFIX) : -len(end)]
            try:
                found[path] = self._low(path, a_RI, tensors.get(_PREFIX + path + ends[end][1]), config)
            except NotShareableError as error:
                raise NotShareableError(f"the adapter in {directory} cannot share its base model: {error}") from None
            except ModelError as error:
                raise ModelError(f"the adapter in {directory} {error}") from None
        if not found:
            raise ModelError(f"the adapter in {directory} is empty")
        return found

    def _low(self, path: str, a_RI: torch.Tensor, b_OR: torch.Tensor | None, config: Any) -> _Low:
        """Fit an adapter's matrices to a layer; raises as `read` does."""
        module = self._modules.get(path)
        if b_OR is None or module is None:
            why = f"this one has no {path}" if module is None else f"{path} has no lora_B"
            raise ModelError(f"was trained on another base model: {why}")
        embeds = isinstance(module, torch.nn.Embedding)
        if isinstance(module, torch.nn.Embedding):
            size = (module.num_embeddings, module.embedding_dim)
        elif isinstance(module, torch.nn.Linear) and a_RI.ndim == 2:
            size = (module.in_features, module.out_features)
        else:
            raise NotShareableError(f"{path} is a {type(module).__name__}")
        found = (a_RI.shape[1], b_OR.shape[0])
        sizes = f"its {path} is {found[0]} to {found[1]} features, and this one's {size[0]} to {size[1]}"
        if found != size and (embeds or module in self._narrow):
            raise NotShareableError(f"it may have another vocabulary: {sizes}")
        if found != size:
            raise ModelError(f"was trained on another base model: {sizes}")
        if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
            raise ModelError(f"is damaged: {path} holds values that are not finite; train it again, or copy it again")
        # Embeddings that scale what they give, as Gemma's do, scale what adapters add too.
        scale = _scale(config, path, len(a_RI)) * float(getattr(module, "embed_scale", 1.0) if embeds else 1.0)
        device = module.weight.device
        return _Low(a_RI.to(device), b_OR.to(device), scale, embeds)

    def add(self, name: str, layers: Mapping[str, Any]) -> None:
        """Make what `read` gave answerable under a name; between steps."""
        self.remove(name)
        for path, low in layers.items():
            if path not in self._layers:
                self._layers[path] = _Layer(path, embeds=low.embeds)
                self._modules[path].register_forward_hook(self._hook(self._layers[path]))
            self._layers[path].set(name, low)
        self._versions[name] = self.version(name) + 1
        self._bytes[name] = sum(t.nbytes for low in layers.values() for t in (low.a_RI, low.b_OR))

    def remove(self, name: str) -> None:
        """Forget an adapter, if it is there; between steps."""
        for layer in self._layers.values():
            layer.set(name, None)
        self._bytes.pop(name, None)

    def narrow(self, module: torch.nn.Module) -> None:
        """Name the part of the model, its head, that is shown only the tokens that are `selected` in a step."""
        self._narrow = set(module.modules())

    @contextmanager
    def using(
        self, names: Sequence[str | None], device: torch.device, selected: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Let forward passes inside compute each token of a step with its adapter, None with the base model alone.

        Args:
            names: the adapter of each token.
            device: that of the model.
            selected: the places of the tokens that the `narrow` part is shown, in its order; all if None.
        """
        self._step = self._narrow_step = self._arrange(names, device)
        if selected is not None:
            self._narrow_step = self._arrange([names[place] for place in selected], device)
        try:
            yield
        finally:
            self._step = self._narrow_step = None

    def _arrange(self, names: Sequence[str | None], device: torch.device) -> _Step | None:
        own = tuple(sorted({name for name in names if name is not None}))
        if not own:
            return None
        if len(set(names)) == 1:
            return _One(own[0])
        numbers = {name: number for number, name in enumerate(own)}
        adapter_N = torch.tensor([-1 if name is None else numbers[name] for name in names])
        if len(names) <= _MOST_STACKED and sum(self._bytes[name] for name in own) <= _MOST_BYTES:
            return _Stacked(own, adapter_N.to(device))
        places = [(adapter_N == number).nonzero().flatten().to(device) for number in range(len(own))]
        return _Grouped(len(names), dict(zip(own, places, strict=True)))

    def _hook(self, layer: _Layer) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            step = self._narrow_step if module in self._narrow else self._step
            return output if step is None else step.add(layer, inputs[0], output)

        return add


def needs_own_base(settings: Mapping[str, Any]) -> str:
    """Say what of an adapter's settings is more than products beside linear layers; nothing if nothing is."""
    if settings.get("peft_type") != "LORA":
        return f"it is {settings.get('peft_type')}, not LORA"
    more = (
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "lora_bias",
        "fan_in_fan_out",
    )
    for key in (*more, "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora"):
        if settings.get(key):
            return f"it has {key}"
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        return f"it begins at other base weights (init_lora_weights: {settings['init_lora_weights']})"
    if settings.get("bias", "none") != "none":
        return f"it trained biases (bias: {settings['bias']})"
    return ""


def _scale(config: Any, path: str, rank: int) -> float:
    """Give what PEFT multiplies an adapter's product with in a layer."""
    patterns = config.alpha_pattern or {}
    pattern = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), None)
    alpha = config.lora_alpha if pattern is None else patterns[pattern]
    return float(alpha / (rank**0.5 if config.use_rslora else rank))
