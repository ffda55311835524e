"""Attention of many conversations in one forward pass, each over its own cached keys and values.

A step is a column of tokens, (N, 1): the newest token of every conversation that is being answered, and stretches of
prompts that are being read. All but attention treats tokens alone, so each layer's weights are read once for all.
Attention enters through transformers' interface, as packs do (`packed_attention.py`): no model is changed.

Keys and values lie in slabs: rows of one capacity, so that conversations of like length are computed by one product
without copies. A conversation moves to a slab with longer rows when its own is full.

Shapes: N tokens of a step, H query heads, G key-value heads, D width of a head, C capacity, L keys that are looked at,
R conversations of a slab that get one more token, T tokens of a stretch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

NAME = "llmforge_cached"  # under which models find it
SMALLEST, GROWTH = 256, 4  # capacities of slabs: 256, 1024, 4096, …
_BLOCK = 128  # queries of a stretch at a time, so that scores stay in the CPU's caches

MaskFunction = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]


class NotCacheableError(Exception):
    """A model's attention wants something that is not here. Never reaches a user: the model is run differently."""


class Conversation:
    """What is cached of one conversation: `length` tokens, in a row of a slab."""

    def __init__(self) -> None:
        self.slab: Slab | None = None
        self.row = -1
        self.length = 0


class Slab:
    """Rows of keys and values of one capacity, for all layers. Rows in use are the first ones."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.users: list[Conversation] = []
        self._rows = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # (rows, G, C, D) each

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the keys and values of a layer, made at its first use as what is to be stored there, (N, G, 1, D)."""
        if index not in self._layers:
            keys, values = (t.new_zeros(self._rows, t.shape[1], self.capacity, t.shape[3]) for t in (key, value))
            self._layers[index] = keys, values
        return self._layers[index]

    @property
    def bytes_per_token(self) -> int:
        """The bytes that a token takes in all layers."""
        tensors = [tensor for pair in self._layers.values() for tensor in pair]
        return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in tensors)

    def add(self, conversation: Conversation) -> None:
        """Give a conversation a row, moving in what it has."""
        if len(self.users) == self._rows:
            self._resize(max(1, 2 * self._rows))
        before, row = conversation.slab, len(self.users)
        if before is not None:
            for index, tensors in before._layers.items():
                for mine, theirs in zip(self.layer(index, *tensors), tensors, strict=True):
                    mine[row, :, : conversation.length] = theirs[conversation.row, :, : conversation.length]
            before.remove(conversation)
        self.users.append(conversation)
        conversation.slab, conversation.row = self, row

    def remove(self, conversation: Conversation) -> None:
        """Take a conversation's row, which the last one gets."""
        last, row = self.users[-1], conversation.row
        if last is not conversation:
            for tensors in self._layers.values():
                for tensor in tensors:
                    tensor[row, :, : last.length] = tensor[last.row, :, : last.length]
            self.users[row], last.row = last, row
        self.users.pop()
        conversation.slab, conversation.row = None, -1
        if self._rows >= 4 * max(1, len(self.users)):
            self._resize(self._rows // 2)

    def _resize(self, rows: int) -> None:
        self._rows = rows
        for index, tensors in self._layers.items():
            grown = []
            for tensor in tensors:
                other = tensor.new_zeros(rows, *tensor.shape[1:])
                kept = min(rows, len(tensor))
                other[:kept] = tensor[:kept]
                grown.append(other)
            self._layers[index] = (grown[0], grown[1])


class Cache:
    """The keys and values of all conversations."""

    def __init__(self) -> None:
        self._slabs: dict[int, Slab] = {}
        self._bytes_per_token = 0

    def make_room(self, conversation: Conversation, tokens: int) -> None:
        """See that so many tokens of a conversation, cached ones included, have a place."""
        if conversation.slab is None or tokens > conversation.slab.capacity:
            capacity = capacity_for(tokens)
            self._slabs.setdefault(capacity, Slab(capacity)).add(conversation)

    @property
    def bytes_per_token(self) -> int:
        """The bytes that a token takes, once something was cached and forgotten."""
        return self._bytes_per_token

    @torch.inference_mode()
    def forget(self, conversation: Conversation) -> None:
        """Free the row of a conversation."""
        if conversation.slab is not None:
            slab = conversation.slab
            slab.remove(conversation)
            if not slab.users:
                self._bytes_per_token = max(self._bytes_per_token, slab.bytes_per_token)
                del self._slabs[slab.capacity]
        conversation.length = 0


def capacity_for(tokens: int) -> int:
    """Give the capacity of the slab for so many tokens."""
    steps = max(0, math.ceil(math.log(max(tokens, 1) / SMALLEST, GROWTH) - 1e-9))
    return SMALLEST * GROWTH**steps


@dataclass(frozen=True)
class Stretch:
    """Tokens of one conversation that stand together in a step: `start` is the place of the first in the step."""

    conversation: Conversation
    start: int
    tokens: int


@dataclass(frozen=True)
class _Newest:
    """One more token for each of R conversations of a slab: R places of the step, from `start` on."""

    slab: Slab
    start: int
    rows: slice | torch.Tensor  # R
    index_R: torch.Tensor
    positions_R: torch.Tensor
    longest: int
    are_even: bool  # all have as many tokens

    @property
    def places(self) -> slice:
        return slice(self.start, self.start + len(self.positions_R))


@dataclass(frozen=True)
class Step:
    """What a forward pass computes: the groups of newest tokens come first, then the stretches.

    `precision` is how fp32 matrices are multiplied outside of attention: inside, oneDNN would copy what lies apart.
    """

    newest: Sequence[_Newest]
    stretches: Sequence[Stretch]
    position_ids: torch.Tensor  # N × 1
    precision: str
    _hidden: dict[Any, list[torch.Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        growing: Sequence[Conversation],
        reading: Sequence[tuple[Conversation, int]],
        device: torch.device,
        pads: int,
        precision: str,
    ) -> "Step":
        """Lay out a step.

        Args:
            growing: conversations that get one more token each, in the order of `arranged`.
            reading: conversations with so many more tokens of their prompts each.
            pads: places at the end that belong to nobody.
            precision: of fp32 products outside of attention, as PyTorch names it.
        """
        newest, start = [], 0
        positions: list[torch.Tensor] = []
        while start < len(growing):
            slab = growing[start].slab
            assert slab is not None
            group = [conversation for conversation in growing[start:] if conversation.slab is slab]
            rows = [conversation.row for conversation in group]
            index_R = torch.tensor(rows, device=device)
            positions_R = torch.tensor([conversation.length for conversation in group], device=device)
            together = slice(0, len(rows)) if rows == list(range(len(rows))) else index_R
            lengths = {conversation.length + 1 for conversation in group}
            newest.append(_Newest(slab, start, together, index_R, positions_R, max(lengths), len(lengths) == 1))
            positions.append(positions_R)
            start += len(group)
        stretches = []
        for conversation, tokens in reading:
            stretches.append(Stretch(conversation, start, tokens))
            begin = conversation.length
            positions.append(torch.arange(begin, begin + tokens, device=device))
            start += tokens
        positions.append(torch.zeros(pads, dtype=torch.int64, device=device))
        return cls(newest, stretches, torch.cat(positions)[:, None], precision)

    def hidden(self, sees: MaskFunction | None) -> list[torch.Tensor | None]:
        """Say, for each group of newest tokens, what its queries do not see: added to scores, (R, 1, 1, L) or None.

        The same in all layers of a kind, so it is made once.
        """
        if sees not in self._hidden:
            self._hidden[sees] = [_hidden(group, sees) for group in self.newest]
        return self._hidden[sees]


def _hidden(group: _Newest, sees: MaskFunction | None) -> torch.Tensor | None:
    positions = group.positions_R
    places = torch.arange(group.longest, device=positions.device)
    if sees is None and group.are_even:
        return None
    seen = _seen_by(positions, places, sees)
    hidden = torch.zeros(seen.shape, device=positions.device).masked_fill_(~seen, -torch.inf)
    return hidden[:, None, None]


def arranged(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Order conversations as a step wants them: slab by slab, row by row."""

    def place(conversation: Conversation) -> tuple[int, int]:
        assert conversation.slab is not None
        return conversation.slab.capacity, conversation.row

    return sorted(conversations, key=place)


_step: ContextVar[Step | None] = ContextVar("step", default=None)


@contextmanager
def stepping(step: Step) -> Iterator[None]:
    """Let the forward passes inside take their tokens for those of a step."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


@dataclass(frozen=True)
class _StepMask:
    """What a model's layers get as their attention mask; `sees` is None where a token sees all before it."""

    step: Step
    sees: MaskFunction | None


def _mask(*arguments: Any, mask_function: MaskFunction = causal_mask_function, **options: Any) -> Any:
    """Stand in for `sdpa_mask`, which transformers calls once for each kind of layer in a forward pass."""
    step = _step.get()
    if step is None:
        return sdpa_mask(*arguments, mask_function=mask_function, **options)
    if options.get("use_vmap"):
        raise NotCacheableError("its attention mask is not a function of positions")
    return _StepMask(step, None if mask_function is causal_mask_function else mask_function)


def _seen_by(queries: torch.Tensor, keys: torch.Tensor, sees: MaskFunction | None) -> torch.Tensor:
    """Say which keys queries see, by their positions."""
    before = keys <= queries[:, None]
    if sees is None:
        return before
    zero = torch.zeros((), dtype=torch.int64, device=queries.device)
    return before & sees(zero, zero, queries[:, None], keys[None, :])


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: _StepMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Stand in for `sdpa_attention_forward`: query (N, H, 1, D), key and value (N, G, 1, D) to output (N, 1, H, D)."""
    if not isinstance(attention_mask, _StepMask):
        if _step.get() is not None:
            raise NotCacheableError("its attention does not use the mask that transformers makes")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options
        )
    if is_causal is False or any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
        raise NotCacheableError("its attention is not a plain softmax over the tokens before")
    step, sees = attention_mask.step, attention_mask.sees
    if query.shape[2] != 1 or not len(query) == len(key) == len(step.position_ids):
        raise NotCacheableError("its attention does not see single tokens")
    width = value.shape[-1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = query.new_zeros(len(query), 1, query.shape[1], width)
    if step.precision != "highest":
        torch.set_float32_matmul_precision("highest")
    for group, hidden in zip(step.newest, step.hidden(sees), strict=True):
        keys, values = group.slab.layer(module.layer_idx, key, value)  # type: ignore[arg-type]
        places = group.places
        keys[group.index_R, :, group.positions_R] = key[places, :, 0]
        values[group.index_R, :, group.positions_R] = value[places, :, 0]
        output[places, 0] = _one_each(
            query[places, :, 0] * scale,
            keys[group.rows, :, : group.longest],
            values[group.rows, :, : group.longest],
            hidden,
        )
    for stretch in step.stretches:
        conversation = stretch.conversation
        assert conversation.slab is not None
        keys, values = conversation.slab.layer(module.layer_idx, key, value)  # type: ignore[arg-type]
        places = slice(stretch.start, stretch.start + stretch.tokens)
        end = conversation.length + stretch.tokens
        keys[conversation.row, :, conversation.length : end] = key[places, :, 0].transpose(0, 1)
        values[conversation.row, :, conversation.length : end] = value[places, :, 0].transpose(0, 1)
        output[places, 0] = _many(
            query[places, :, 0].transpose(0, 1),
            keys[conversation.row, :, :end],
            values[conversation.row, :, :end],
            scale,
            sees,
        ).transpose(0, 1)
    if step.precision != "highest":
        torch.set_float32_matmul_precision(step.precision)
    return output, None


def _one_each(
    query_RHD: torch.Tensor, keys_RGLD: torch.Tensor, values_RGLD: torch.Tensor, hidden: torch.Tensor | None
) -> torch.Tensor:
    """One query of each conversation over its keys, (R, H, D). Query heads of one key-value head are rows of a product.

    Products and not PyTorch's kernel: for single queries that takes 10 times as long where oneDNN multiplies.
    """
    rows, groups, length, width = keys_RGLD.shape
    query = query_RHD.reshape(rows * groups, -1, width)
    scores = torch.bmm(query, keys_RGLD.flatten(0, 1).mT)
    if hidden is not None:
        by_row = scores.view(rows, groups, -1, length)
        by_row += hidden.to(scores.dtype)
    probabilities = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    output = torch.bmm(probabilities.to(scores.dtype), values_RGLD.flatten(0, 1))
    return output.view(rows, -1, values_RGLD.shape[-1])


def _many(
    query_HTD: torch.Tensor,
    keys_GLD: torch.Tensor,
    values_GLD: torch.Tensor,
    scale: float,
    sees: MaskFunction | None,
) -> torch.Tensor:
    """The last T of L tokens over all of them, (H, T, D)."""
    tokens, length = query_HTD.shape[1], keys_GLD.shape[1]
    places = torch.arange(length, device=query_HTD.device)
    if query_HTD.device.type != "cpu":
        width = values_GLD.shape[-1]
        values = pad(values_GLD, (0, query_HTD.shape[-1] - width))
        whole = tokens == length and sees is None
        queries = places[length - tokens :]
        seen = None if whole else _seen_by(queries, places, sees)
        output = scaled_dot_product_attention(
            query_HTD[None],
            keys_GLD[None],
            values[None],
            attn_mask=seen,
            is_causal=whole,
            scale=scale,
            enable_gqa=len(query_HTD) != len(keys_GLD),
        )
        return output[0, ..., :width]
    groups = len(keys_GLD)
    parts = []
    for start in range(0, tokens, _BLOCK):
        block = query_HTD[:, start : start + _BLOCK] * scale
        queries = places[length - tokens + start :][: block.shape[1]]
        end = length - tokens + start + block.shape[1]
        keys, values = keys_GLD[:, :end], values_GLD[:, :end]
        scores = torch.bmm(block.reshape(groups, -1, block.shape[-1]), keys.mT)
        seen = _seen_by(queries, places[:end], sees)
        scores.view(groups, -1, *seen.shape).masked_fill_(~seen, -torch.inf)
        probabilities = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
        output = torch.bmm(probabilities.to(scores.dtype), values)
        parts.append(output.view(len(query_HTD), block.shape[1], -1))
    return torch.cat(parts, 1)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
