"""Attention within a pack (`data/packing.py`): each token sees the tokens of its own path before it, nothing else.

It enters a model through transformers' attention interface (https://huggingface.co/docs/transformers/attention_interface),
so that no model is changed: the mask that a model builds for its layers becomes a `PackMask`, which carries the pack's
layout, and the attention function reads it. Without a pack both do what `sdpa` does.

In depth-first order all that has to be computed is rectangles of the attention matrix: of every node its own triangle,
and of every node with descendants what all of them see of it. Softmax over several rectangles is put together from each
one's output and log-sum-exp, as FlashAttention does for its blocks (https://arxiv.org/abs/2205.14135), and so are the
gradients: with the final log-sum-exp, each rectangle's backward pass gives its share.

Shapes: N tokens of a pack, H query heads, G key-value heads, D width of a head; Q and K tokens of a rectangle.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from llmforge.data.packing import Pack

# Under these names models find it. The second computes each node with the model's own eager attention, for models that
# do more than a softmax (soft-capped scores, sinks) and so have no `sdpa`.
NAME, OWN_NAME = "llmforge_pack", "llmforge_pack_own"

# Up to so many keys (by default any) matrix products beat PyTorch's CPU kernel, as measured on a processor with
# AVX-512; and the queries that they take at a time, whose scores then stay in caches.
_PRODUCTS_FORWARD = {torch.float32: 256}
_PRODUCTS_BACKWARD = {torch.float32: 1024}
_BLOCK = 128
# Triangles of at most so many tokens are put together on a CPU, those of a few tokens whatever their lengths.
_SHORT, _TINY = 96, 16

MaskFunction = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""Says by batch, head, query position and key position whether a query sees a key; transformers composes them."""


class NotPackableError(Exception):
    """A model's attention wants something that a pack cannot give. Never reaches a user: the model is not packed."""


@dataclass(frozen=True)
class Places:
    """Short runs of the row, padded to one length: their places (R runs × L, a pad is any), and which are real."""

    index_RL: torch.Tensor
    real: torch.Tensor  # flat positions of the places that are no pads
    pads: torch.Tensor  # and of those that are


class Rectangle(NamedTuple):
    """A part of the attention matrix: queries see all keys, or those up to their own place in a triangle.

    `queries` and `keys` are slices of the row, `mask` (bool, Q × K) is what is seen of it where that is not everything.
    On a CPU short triangles are put together, which makes their places `Places`, and the mask R × 1 × L × L. On a GPU
    all triangles in a row are one of these: `query_bounds` and `key_bounds` (int32) are where each begins, and where
    the last one ends, and `longest` is the most tokens that one has (queries, keys).
    """

    queries: slice | Places
    keys: slice | Places
    is_triangle: bool
    mask: torch.Tensor | None = None
    query_bounds: torch.Tensor | None = None
    key_bounds: torch.Tensor | None = None
    longest: tuple[int, int] = (0, 0)


def _take(tensor: torch.Tensor, places: slice | Places) -> torch.Tensor:
    """Give the tokens of a part, (R, heads, L, D), of a tensor (1, heads, N, D).

    Tokens are gathered with all their heads: stored as projections give them, these lie side by side.
    """
    if isinstance(places, slice):
        return tensor[:, :, places]
    rows = tensor[0].transpose(0, 1).index_select(0, places.index_RL.flatten())
    return rows.unflatten(0, places.index_RL.shape).transpose(1, 2)


def _put(whole: torch.Tensor, places: slice | Places, part: torch.Tensor) -> None:
    """Write a part, (R, heads, L, ...), where its tokens are in a tensor (1, heads, N, ...), without its pads."""
    if isinstance(places, slice):
        whole[:, :, places] = part
        return
    rows = part.transpose(1, 2).flatten(0, 1).index_select(0, places.real)
    whole[0].transpose(0, 1).index_copy_(0, places.index_RL.flatten()[places.real], rows)


@dataclass(frozen=True)
class Layout:
    """Where the nodes of a pack lie; see `Pack`. Plain numbers, so that no device has to be asked for them."""

    starts: Sequence[int]
    ends: Sequence[int]
    stops: Sequence[int]
    parents: Sequence[int]
    depths: Sequence[int]  # position of each node's first token within its samples

    @classmethod
    def of(cls, pack: Pack) -> "Layout":
        """Take the layout of a pack."""
        depths = pack.position_ids[pack.starts]
        return cls(*(a.tolist() for a in (pack.starts, pack.ends, pack.stops, pack.parents, depths)))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(d + e - s for d, s, e in zip(self.depths, self.starts, self.ends, strict=True))

    def spans(self) -> list[tuple[slice, slice, bool]]:
        """Cut what has to be computed into parts: queries, keys, and whether it is a triangle.

        The triangles come first, and cover every token once.
        """
        nodes = list(zip(self.starts, self.ends, self.stops, strict=True))
        triangles = [(slice(start, end), slice(start, end), True) for start, end, _ in nodes]
        return triangles + [(slice(end, stop), slice(start, end), False) for start, end, stop in nodes if stop > end]

    def path(self, node: int) -> list[int]:
        """List the ancestors of a node from the root, and the node."""
        nodes = [node]
        while self.parents[nodes[-1]] >= 0:
            nodes.append(self.parents[nodes[-1]])
        return nodes[::-1]


@dataclass(frozen=True)
class PackMask:
    """What a model's layers get as their attention mask: the layout, and which keys a query sees of those before it.

    `sees` is None where that is all of them; with a sliding window, or chunks, it is not.
    """

    layout: Layout
    sees: MaskFunction | None
    device: torch.device
    _rectangles: list[Rectangle] = field(default_factory=list)

    def rectangles(self) -> list[Rectangle]:
        """Give the rectangles, with what the kernels need to know of them on this device. Made once."""
        if not self._rectangles:
            if self.sees is not None:
                self._rectangles.extend(self._masked(self.sees))
            elif self.device.type == "cpu":
                self._rectangles.extend(self._grouped())
            else:
                self._rectangles.extend(self._bounded())
        return self._rectangles

    @property
    def all_short(self) -> bool:
        """Whether there is nothing but short triangles, in which everything before is seen."""
        layout = self.layout
        runs = zip(layout.starts, layout.ends, layout.stops, strict=True)
        return self.sees is None and all(end - start <= _SHORT and stop == end for start, end, stop in runs)

    def _masked(self, sees: MaskFunction) -> Iterator[Rectangle]:
        """Give every rectangle its mask, by the positions within samples."""
        layout = self.layout
        positions = torch.empty(max(layout.ends), dtype=torch.int64, device=self.device)
        for depth, start, end in zip(layout.depths, layout.starts, layout.ends, strict=True):
            positions[start:end] = torch.arange(depth, depth + end - start, device=self.device)
        for queries, keys, is_triangle in layout.spans():
            yield Rectangle(queries, keys, is_triangle, _seen(sees, positions[queries], positions[keys]))

    def _grouped(self) -> Iterator[Rectangle]:
        """Put short triangles of similar length together: a call for each costs more than its work."""
        spans = self.layout.spans()
        short = sorted((_length(run) for run, _, is_triangle in spans if is_triangle and _length(run) <= _SHORT))
        longest_of: dict[int, int] = {}  # of the group that a length belongs to
        for length in reversed(short):
            # A run of at least half the length is padded; what is added costs less than another call.
            last = min(longest_of.values(), default=0)
            longest_of[length] = last if 2 * length >= last - _TINY and last else length
        groups: dict[int, list[slice]] = {}
        for run, keys, is_triangle in spans:
            if is_triangle and _length(run) <= _SHORT:
                groups.setdefault(longest_of[_length(run)], []).append(run)
            elif is_triangle:
                yield Rectangle(run, keys, True)
        for runs in groups.values():
            yield _put_together(runs)
        yield from (Rectangle(*span) for span in spans if not span[2])

    def _bounded(self) -> Iterator[Rectangle]:
        """Put all triangles into one call of a kernel for runs of variable length; the other rectangles are few."""
        layout = self.layout
        bounds = torch.tensor([*layout.starts, max(layout.ends)], dtype=torch.int32, device=self.device)
        longest = max(end - start for start, end in zip(layout.starts, layout.ends, strict=True))
        row = slice(0, max(layout.ends))
        yield Rectangle(row, row, True, None, bounds, bounds, (longest, longest))
        for queries, keys, is_triangle in layout.spans():
            if not is_triangle:
                sizes = _length(queries), _length(keys)
                of_queries, of_keys = (torch.tensor([0, n], dtype=torch.int32, device=self.device) for n in sizes)
                yield Rectangle(queries, keys, False, None, of_queries, of_keys, sizes)


def _length(run: slice) -> int:
    length: int = run.stop - run.start
    return length


def _put_together(runs: Sequence[slice]) -> Rectangle:
    """Make one part of the triangles of some runs, padded to the longest; a pad sees nothing and is not seen."""
    if len(runs) == 1:
        return Rectangle(runs[0], runs[0], True)
    lengths = torch.tensor([_length(run) for run in runs])
    starts = torch.tensor([run.start for run in runs])
    offsets = torch.arange(int(lengths.max()))
    is_real = offsets < lengths[:, None]
    index_RL = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
    real, pads = (of.flatten().nonzero().squeeze(1) for of in (is_real, ~is_real))
    places = Places(index_RL, real, pads)
    mask = (offsets[:, None] >= offsets) & is_real[:, :, None] & is_real[:, None, :]
    return Rectangle(places, places, True, mask[:, None])


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def packed(layout: Layout) -> Iterator[None]:
    """Let the forward passes inside take their row for a pack of this layout."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def _seen(sees: MaskFunction, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.int64, device=queries.device)
    return sees(zero, zero, queries[:, None], keys[None, :]).expand(len(queries), len(keys))


def _mask(*arguments: Any, mask_function: MaskFunction = causal_mask_function, **options: Any) -> Any:
    """Stand in for `sdpa_mask`, which transformers calls once for each kind of layer in a forward pass."""
    if _layout.get() is None:
        return sdpa_mask(*arguments, mask_function=mask_function, **options)
    return _pack_mask(mask_function, options)


def _own_mask(*arguments: Any, mask_function: MaskFunction = causal_mask_function, **options: Any) -> Any:
    """Stand in for `eager_mask`."""
    if _layout.get() is None:
        return eager_mask(*arguments, mask_function=mask_function, **options)
    return _pack_mask(mask_function, options)


def _pack_mask(mask_function: MaskFunction, options: Mapping[str, Any]) -> PackMask:
    layout = _layout.get()
    assert layout is not None
    if options.get("use_vmap"):
        raise NotPackableError("its attention mask is not a function of positions")
    device = torch.device(options.get("device", "cpu"))
    if mask_function is causal_mask_function:
        return PackMask(layout, None, device)
    positions = torch.arange(layout.longest, device=device)
    seen = _seen(mask_function, positions, positions)
    is_plain = bool(torch.equal(seen, positions[:, None] >= positions[None, :]))
    return PackMask(layout, None if is_plain else mask_function, device)


@torch.compiler.disable  # kernels and Python between them: there is nothing to compile
def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: PackMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Stand in for `sdpa_attention_forward`: query (B, H, N, D), key and value (B, G, N, D) to output (B, N, H, D)."""
    if not isinstance(attention_mask, PackMask):
        if _layout.get() is not None:
            raise NotPackableError("its attention does not use the mask that transformers makes")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options
        )
    if is_causal is False or any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
        raise NotPackableError("its attention is not a plain softmax over the tokens before")
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == max(attention_mask.layout.ends):
        raise NotPackableError("its attention does not see the whole row")
    width = value.shape[-1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[-1] > width:  # as in DeepSeek's attention; zeros add nothing, and the kernels want one width
        value = pad(value, (0, query.shape[-1] - width))
    kernel = None if dropout or query.shape[-1] != value.shape[-1] else _kernel(query, attention_mask)
    if kernel is None:
        output = _by_node(query, key, value, attention_mask, dropout, scale)
    elif kernel is CPU and attention_mask.all_short:
        output = _ShortTriangles.apply(query, key, value, attention_mask.rectangles(), scale)
    else:
        output = _Rectangles.apply(query, key, value, attention_mask.rectangles(), scale, kernel)
    return output[..., :width], None


@torch.compiler.disable
def _own_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: PackMask | torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the eager attention of the model's own file, in a pack on each node with the keys of its path."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise NotPackableError("it has no eager attention of its own")
    if not isinstance(attention_mask, PackMask):
        if _layout.get() is not None:
            raise NotPackableError("its attention does not use the mask that transformers makes")
        found: tuple[torch.Tensor, torch.Tensor | None] = own(module, query, key, value, attention_mask, **options)
        return found
    outputs = []
    for q, k, v, seen in _nodes(query, key, value, attention_mask):
        if seen is None:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        additive = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
        additive = additive.masked_fill_(~seen, torch.finfo(q.dtype).min)[None, None]
        outputs.append(own(module, q, k, v, additive, **options)[0])
    return torch.cat(outputs, dim=1), None


def _nodes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: PackMask
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Give each node's queries, the keys and values of its whole path, and what is seen (None: a plain triangle)."""
    layout = mask.layout
    for node, (start, end, depth) in enumerate(zip(layout.starts, layout.ends, layout.depths, strict=True)):
        runs = [slice(layout.starts[n], layout.ends[n]) for n in layout.path(node)]
        keys, values = (torch.cat([t[:, :, run] for run in runs], dim=2) for t in (key, value))
        places = torch.arange(keys.shape[2], device=query.device)
        seen = None
        if mask.sees is not None:
            seen = _seen(mask.sees, places[depth:], places)
        elif depth:
            seen = places[depth:, None] >= places[None, :]
        yield query[:, :, start:end], keys, values, seen


def _by_node(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: PackMask, dropout: float, scale: float
) -> torch.Tensor:
    """Compute each node by PyTorch's own attention: on any device, with dropout too."""
    outputs = [
        scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            is_causal=seen is None,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for q, k, v, seen in _nodes(query, key, value, mask)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


class Kernel(NamedTuple):
    """Attention over one rectangle, forward and backward; tensors are (1, heads, tokens, D).

    `forward(query, key, value, rectangle, scale)` gives output and log-sum-exp (1, H, Q), `backward(grad, query, key,
    value, output, log_sum_exp, rectangle, scale)` the three gradients.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _cpu_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: Rectangle, scale: float) -> Any:
    if part.mask is not None or k.shape[2] <= _PRODUCTS_FORWARD.get(q.dtype, sys.maxsize):
        return _products_forward(q, k, v, part, scale)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, part.is_triangle, scale=scale)


def _cpu_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    part: Rectangle,
    scale: float,
) -> Any:
    if part.mask is not None or k.shape[2] <= _PRODUCTS_BACKWARD.get(q.dtype, sys.maxsize):
        return _products_backward(grad, q, k, v, output, log_sum_exp, part, scale)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, output, log_sum_exp, 0.0, part.is_triangle, scale=scale
    )


def _blocks(part: Rectangle, queries: int, keys: int) -> Iterator[tuple[slice, slice, torch.Tensor | None, slice]]:
    """Cut a part into blocks of queries: the queries, the keys that they see, and what is hidden in which of those."""
    size = queries if queries < 2 * _BLOCK or isinstance(part.queries, Places) else _BLOCK
    for start in range(0, queries, size):
        rows = slice(start, min(start + size, queries))
        if part.mask is not None:
            yield rows, slice(0, keys), ~part.mask[..., rows, :].unsqueeze(-3), slice(0, keys)
        elif part.is_triangle:
            length = rows.stop - rows.start
            yield rows, slice(0, rows.stop), torch.ones(length, length, dtype=torch.bool).triu(1), rows
        else:
            yield rows, slice(0, keys), None, rows


def _products_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: Rectangle, scale: float) -> Any:
    """Attention by matrix products, block by block: on a CPU faster than PyTorch's kernel, but for long rows in fp32.

    Query heads of one key-value head are rows of one product.
    """
    runs, heads, queries, width = q.shape
    groups = k.shape[1]
    k, v = (t.reshape(runs * groups, -1, width) for t in (k, v))
    output = q.new_empty(runs, heads, queries, width)
    wide = torch.promote_types(q.dtype, torch.float32)
    log_sum_exp = q.new_empty(runs, heads, queries, dtype=wide)
    for rows, seen, hidden, of in _blocks(part, queries, k.shape[1]):
        block = (q[:, :, rows] * scale).reshape(runs * groups, -1, width)
        scores = torch.bmm(block, k[:, seen].mT)
        by_head = scores.view(runs, groups, heads // groups, rows.stop - rows.start, -1)
        if hidden is not None:
            by_head[..., of].masked_fill_(hidden, -torch.inf)
        largest, place = by_head.max(-1, keepdim=True)
        probabilities = torch.softmax(by_head, -1, dtype=wide)
        lse = largest.to(wide) - probabilities.gather(-1, place).log()
        if part.mask is not None:  # a query that sees nothing
            probabilities.nan_to_num_(0.0)
            lse.masked_fill_(largest == -torch.inf, -torch.inf)
        log_sum_exp[:, :, rows] = lse.flatten(1, 2).squeeze(-1)
        product = torch.bmm(probabilities.to(q.dtype).view_as(scores), v[:, seen])
        output[:, :, rows] = product.view(runs, heads, -1, width)
    return output, log_sum_exp


def _products_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    part: Rectangle,
    scale: float,
) -> Any:
    """Give the gradients of `_products_forward`, with the output and the log-sum-exp of the whole row."""
    runs, heads, queries, width = q.shape
    groups = k.shape[1]
    shape = k.shape
    k, v = (t.reshape(runs * groups, -1, width) for t in (k, v))
    dq, dk, dv = torch.empty(q.shape, dtype=q.dtype), torch.zeros_like(k), torch.zeros_like(v)
    inner = (grad * output).sum(-1, keepdim=True)
    for rows, seen, hidden, of in _blocks(part, queries, k.shape[1]):
        block = (q[:, :, rows] * scale).reshape(runs * groups, -1, width)
        block_grad = grad[:, :, rows].reshape(runs * groups, -1, width)
        scores = torch.bmm(block, k[:, seen].mT)
        by_head = scores.view(runs, groups, heads // groups, rows.stop - rows.start, -1)
        if hidden is not None:
            by_head[..., of].masked_fill_(hidden, -torch.inf)
        lse = log_sum_exp[:, :, rows].reshape(runs * groups, -1, 1)
        probabilities = torch.sub(scores, lse).exp_().to(q.dtype)
        d_scores = torch.bmm(block_grad, v[:, seen].mT)
        dv[:, seen] += torch.bmm(probabilities.mT, block_grad)
        d_scores.sub_(inner[:, :, rows].reshape(runs * groups, -1, 1)).mul_(probabilities)
        dq[:, :, rows] = torch.bmm(d_scores, k[:, seen]).view(runs, heads, -1, width) * scale
        dk[:, seen] += torch.bmm(d_scores.mT, block)
    return dq, dk.view(shape), dv.view(shape)


def _cuda_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: Rectangle, scale: float) -> Any:
    output, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
        *(t[0].transpose(0, 1) for t in (q, k, v)),
        part.query_bounds,
        part.key_bounds,
        *part.longest,
        0.0,
        part.is_triangle,
        False,
        scale=scale,
    )
    return output.transpose(0, 1)[None], log_sum_exp[None]


def _cuda_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    part: Rectangle,
    scale: float,
) -> Any:
    gradients = torch.ops.aten._flash_attention_backward(
        *(t[0].transpose(0, 1) for t in (grad, q, k, v, output)),
        log_sum_exp[0].contiguous(),
        part.query_bounds,
        part.key_bounds,
        *part.longest,
        0.0,
        part.is_triangle,
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # the random state of a dropout that there is not
        torch.empty(0, device=q.device),
        scale=scale,
    )
    return tuple(gradient.transpose(0, 1)[None] for gradient in gradients)


CPU = Kernel(_cpu_forward, _cpu_backward)
CUDA = Kernel(_cuda_forward, _cuda_backward)


def _kernel(query: torch.Tensor, mask: PackMask) -> Kernel | None:
    """Choose the kernel for a device and number format, None where there is none."""
    if query.device.type == "cpu":
        return CPU
    if query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and mask.sees is None:
        return CUDA
    return None


class _Rectangles(torch.autograd.Function):
    """Attention as a sum over rectangles, of which nothing is kept for the backward pass but inputs and output."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rectangles: Sequence[Rectangle],
        scale: float,
        kernel: Kernel,
    ) -> torch.Tensor:
        _, heads, tokens, width = query.shape
        stored = query.new_empty(1, tokens, heads, width)
        output = stored.transpose(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        log_sum_exp = query.new_empty(1, heads, tokens, dtype=wide)
        for part in rectangles:
            q, k, v = _take(query, part.queries), _take(key, part.keys), _take(value, part.keys)
            out, lse = kernel.forward(q, k, v, part, scale)
            if part.is_triangle:
                _put(output, part.queries, out)
                _put(log_sum_exp, part.queries, lse)
                continue
            assert isinstance(part.queries, slice)
            before = log_sum_exp[:, :, part.queries]
            both = torch.logaddexp(before, lse)
            merged = output[:, :, part.queries] * (before - both).exp()[..., None] + out * (lse - both).exp()[..., None]
            output[:, :, part.queries] = merged.to(output.dtype)
            log_sum_exp[:, :, part.queries] = both
        ctx.save_for_backward(query, key, value, stored, log_sum_exp)
        ctx.rectangles, ctx.scale, ctx.kernel = rectangles, scale, kernel
        return stored

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, stored, log_sum_exp = ctx.saved_tensors
        output = stored.transpose(1, 2)
        grad = gradients[0].transpose(1, 2)
        # Stored as the projections want them, tokens before heads.
        dq, dk, dv = (torch.empty_like(t.transpose(1, 2)).transpose(1, 2) for t in (query, key, value))
        for part in ctx.rectangles:
            shares = ctx.kernel.backward(
                _take(grad, part.queries),
                _take(query, part.queries),
                _take(key, part.keys),
                _take(value, part.keys),
                _take(output, part.queries),
                _take(log_sum_exp[..., None], part.queries)[..., 0],
                part,
                ctx.scale,
            )
            for whole, places, share in zip((dq, dk, dv), (part.queries, part.keys, part.keys), shares, strict=True):
                if part.is_triangle:  # the triangles come first and cover every token
                    _put(whole, places, share)
                else:
                    whole[:, :, places] += share
        return dq, dk, dv, None, None, None


class _ShortTriangles(torch.autograd.Function):
    """Attention where every run is short: nothing is put together, and the probabilities are few enough to be kept.

    A pad lies behind its run's tokens, so these do not see it; what it sees itself is not used.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        triangles: Sequence[Rectangle],
        scale: float,
    ) -> torch.Tensor:
        _, heads, tokens, width = query.shape
        stored = query.new_empty(1, tokens, heads, width)
        wide = torch.promote_types(query.dtype, torch.float32)
        kept: list[torch.Tensor] = []
        for part in triangles:
            q = _take(query, part.queries)
            runs, _, length, _ = q.shape
            k, v = (_take(t, part.keys).flatten(0, 1) for t in (key, value))
            q = (q * scale).reshape(len(k), -1, width)  # the query heads of one key-value head are rows of one product
            scores = torch.bmm(q, k.mT).view(len(k), -1, length, length)
            scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu_(1), -torch.inf)
            probabilities = torch.softmax(scores, -1, dtype=wide).to(q.dtype).view(len(k), -1, length)
            out = torch.bmm(probabilities, v)
            _put(stored.transpose(1, 2), part.queries, out.view(runs, heads, length, width))
            kept += [q, k, v, probabilities, out]
        ctx.save_for_backward(*kept)
        ctx.triangles, ctx.scale = triangles, scale
        ctx.shapes = [t.transpose(1, 2).shape for t in (query, key, value)]
        return stored

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        grad = gradients[0].transpose(1, 2)
        dq, dk, dv = (grad.new_empty(shape).transpose(1, 2) for shape in ctx.shapes)
        kept = iter(ctx.saved_tensors)
        for part, (q, k, v, probabilities, out) in zip(ctx.triangles, zip(*[kept] * 5, strict=True), strict=True):
            part_grad = _take(grad, part.queries)
            runs, heads, length, width = part_grad.shape
            if isinstance(part.queries, Places):
                part_grad.transpose(1, 2).flatten(0, 1).index_fill_(0, part.queries.pads, 0.0)
            part_grad = part_grad.reshape(len(k), -1, width)
            d_scores = torch.bmm(part_grad, v.mT).sub_((part_grad * out).sum(-1, keepdim=True)).mul_(probabilities)
            share = torch.bmm(d_scores, k).mul_(ctx.scale)
            _put(dq, part.queries, share.view(runs, heads, length, width))
            for whole, share in ((dk, torch.bmm(d_scores.mT, q)), (dv, torch.bmm(probabilities.mT, part_grad))):
                _put(whole, part.keys, share.view(runs, -1, length, width))
        return dq, dk, dv, None, None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
AttentionInterface.register(OWN_NAME, _own_attention)
AttentionMaskInterface.register(OWN_NAME, _own_mask)
