"""Packs: samples in one row, what they share held once, and computed exactly as each sample alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.data.packing import LEAST_SAVED, Pack, cut_into_packs, pack
from llmforge.data.samples import Sample
from llmforge.models import packed_attention
from llmforge.models.adapter import add_lora
from llmforge.models.head import find_head
from llmforge.models.isolation import isolate
from llmforge.models.packed_attention import Layout, packed
from llmforge.tasks import InstructionTuning
from small_models import IN_FP32, KINDS, SMALL, VOCABULARY, small_model

TASK = InstructionTuning(0, None)


def samples_of(rows: list[list[int]], seed: int = 0) -> list[Sample]:
    """Give every row weights of its own, so that samples differ in what they train of a shared beginning."""
    numbers = np.random.default_rng(seed)
    return [Sample(row, [0.0, *numbers.choice([0.0, 0.0, 0.5, 1.0], len(row) - 1).tolist()]) for row in rows]


def forest(seed: int = 0) -> list[Sample]:
    """Make rows that share beginnings in three levels, are beginnings of each other, occur twice, or stand apart."""
    numbers = np.random.default_rng(seed)

    def more(length: int) -> list[int]:
        return numbers.integers(0, VOCABULARY, length).tolist()

    policy, examples, question = more(40), more(24), more(18)
    rows = [policy + more(length) for length in (1, 9, 30)]
    rows += [policy + examples + more(length) for length in (5, 12)]
    rows += [policy + examples + question + more(length) for length in (3, 8, 1)]
    rows += [policy, policy + examples, policy + examples + question, rows[1], more(50), more(2), more(1)]
    return samples_of(rows, seed)


def unpacked(made: Pack) -> list[tuple[list[int], list[int]]]:
    """Read the tokens and positions along the path to each node that is nobody's parent."""
    layout = Layout.of(made)
    found = []
    for node in set(range(len(layout.starts))) - set(layout.parents):
        path = [range(layout.starts[n], layout.ends[n]) for n in layout.path(node)]
        places = [place for run in path for place in run]
        found.append((made.input_ids[places].tolist(), made.position_ids[places].tolist()))
    return found


# --- the layout -------------------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=90)
beginnings = st.lists(st.integers(0, 2), min_size=16, max_size=60)
rows_with_beginnings = st.builds(
    lambda starts, tails: [(starts[n % len(starts)] if n % 3 else []) + tail for n, tail in enumerate(tails)],
    st.lists(beginnings, min_size=1, max_size=3),
    st.lists(tokens, min_size=1, max_size=12),
)


@settings(deadline=None)
@given(rows=rows_with_beginnings, share=st.booleans(), fill_to=st.sampled_from([1, 64]))
def test_every_sample_can_be_read_off_and_every_weight_counts_once(
    rows: list[list[int]], share: bool, fill_to: int
) -> None:
    chosen = samples_of(rows)
    made = pack(chosen, share=share, fill_to=fill_to, fill_with=1)
    assert len(made.input_ids) % fill_to == 0
    paths = unpacked(made)
    for ids, positions in paths:
        assert positions == list(range(len(ids)))
    if share:
        assert all(any(ids[: len(row)] == row for ids, _ in paths) for row in rows)
    else:
        assert sorted(ids for ids, _ in paths)[-len(rows) :] or rows == []
        assert made.parents.max() == -1
    assert made.weight == pytest.approx(sum(sum(s.loss_weights) for s in chosen))
    assert made.weights.sum() == pytest.approx(made.weight)
    assert (made.examples, made.tokens) == (len(rows), sum(map(len, rows)))
    assert made.trained_tokens == sum(w > 0 for s in chosen for w in s.loss_weights)
    # What each target stands behind, and how much it counts, as the samples say it.
    expected: dict[tuple[int, ...], float] = {}
    for sample in chosen:
        for place, weight in enumerate(sample.loss_weights):
            if weight:
                before = tuple(sample.input_ids[: place + 1])
                expected[before] = expected.get(before, 0.0) + weight
    found: dict[tuple[int, ...], float] = {}
    layout = Layout.of(made)
    for place, target, weight in zip(made.places, made.targets, made.weights, strict=True):
        node = next(n for n, (s, e) in enumerate(zip(layout.starts, layout.ends, strict=True)) if s <= place < e)
        path = [i for n in layout.path(node) for i in range(layout.starts[n], layout.ends[n]) if i <= place]
        before = (*made.input_ids[path].tolist(), int(target))
        found[before] = found.get(before, 0.0) + float(weight)
    assert found == pytest.approx(expected)


def test_what_is_shared_is_held_once() -> None:
    policy = list(range(60))
    made = pack(samples_of([[*policy, 70 + n, 80] for n in range(8)]), share=True)
    assert len(made.input_ids) == 60 + 8 * 2
    assert made.tokens == 8 * 62
    short = pack(samples_of([[*policy[:10], 70 + n, 80] for n in range(8)]), share=True)
    assert len(short.input_ids) == 8 * 12  # ten tokens are not worth it


def test_many_samples_that_are_each_others_beginnings() -> None:
    rows = [[1] * length for length in range(1, 400)]
    made = pack(samples_of(rows), share=True)
    assert made.tokens == sum(range(400))
    assert len(made.input_ids) < made.tokens / 5


@settings(deadline=None)
@given(rows=rows_with_beginnings, share=st.booleans(), wanted=st.integers(1, 200))
def test_packs_hold_every_sample_once_and_fit(rows: list[list[int]], share: bool, wanted: int) -> None:
    chosen = samples_of(rows)
    packs = cut_into_packs(chosen, share=share, wanted=wanted, limit=2 * wanted)
    assert sorted(id(sample) for part in packs for sample in part) == sorted(map(id, chosen))
    for part in packs:
        assert len(part) == 1 or len(pack(part, share=False).input_ids) <= wanted or share
        if len(part) > 1 and share:
            assert len(pack(part, share=True).input_ids) <= 2 * wanted + LEAST_SAVED * len(part)  # too little to share


def test_samples_with_a_long_common_beginning_stay_together() -> None:
    policy = list(range(90))
    chosen = samples_of([[*policy, n] for n in range(30)] + [[95] * 50, [94] * 50])
    sizes = [len(part) for part in cut_into_packs(chosen, share=True, wanted=100, limit=1000)]
    assert sorted(sizes) == [2, 30]


# --- loss and gradients -----------------------------------------------------------------------------------------------


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model: Any, chosen: list[Sample], *, share: bool, atol: float, rtol: float = 1e-9) -> None:
    """Compare the loss of a pack, and every gradient, with the sum over samples that are computed one by one."""
    expected: Any = sum(TASK.loss(model, TASK.collate([s])).sum for s in chosen)
    wanted = gradients(model, expected)
    found = isolate(model, find_head(model), torch.enable_grad)
    assert (found.packs, found.shares) == (True, True), found.reason
    head = find_head(model)
    loss = TASK.loss(model, TASK.pack(chosen, share=share, fill_to=16), head)
    assert loss.sum.item() == pytest.approx(expected.item(), rel=rtol)
    ours = gradients(model, loss.sum)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=atol, msg=name)


# Norms that compute in fp32 round sums of gradients otherwise than summands.
ROUNDED = ("two kinds of layers", "a factor of the logits")


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_in_full_training_a_pack_is_the_sum_of_its_samples(kind: str, share: bool) -> None:
    atol = 1e-2 if kind in IN_FP32 else 2e-4 if kind in ROUNDED else 1e-9
    check_equal(small_model(kind), forest(), share=share, atol=atol, rtol=1e-5 if kind in IN_FP32 else 1e-9)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", ["llama", "a sliding window", "tied embeddings"])
def test_with_lora_it_is_too(kind: str, share: bool) -> None:
    model = add_lora(small_model(kind), {"r": 3, "target_modules": "all-linear"}).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    check_equal(model, forest(1), share=share, atol=1e-9)


def test_with_activation_checkpointing_it_is_too() -> None:
    from llmforge.models.load import enable_activation_checkpointing

    model = small_model("a sliding window")
    assert enable_activation_checkpointing(model) is None
    model.train()
    check_equal(model, forest(2), share=True, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "a sliding window"])
def test_computed_node_by_node_it_is_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What devices without a kernel for rectangles do, and attention with dropout."""
    monkeypatch.setattr(packed_attention, "_kernel", lambda *_: None)
    check_equal(small_model(kind), forest(3), share=True, atol=1e-9)


@pytest.mark.parametrize("settings", [{"_BLOCK": 8, "_SHORT": 0}, {"_BLOCK": 64, "_SHORT": 40, "_TINY": 0}])
@pytest.mark.parametrize("kind", ["llama", "a sliding window", "keys wider than values"])
def test_however_the_cpu_cuts_it_it_is_too(
    kind: str, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setattr(packed_attention, name, value)
    check_equal(small_model(kind), forest(5), share=True, atol=1e-9)


def test_by_pytorchs_cpu_kernel_it_is_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PRODUCTS_FORWARD", "_PRODUCTS_BACKWARD"):
        monkeypatch.setattr(packed_attention, name, {torch.float64: 10})
    monkeypatch.setattr(packed_attention, "_SHORT", 0)
    check_equal(small_model("llama"), forest(6), share=True, atol=1e-9)


def test_dropout_in_attention_is_applied() -> None:
    model = small_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert isolate(model, find_head(model), torch.enable_grad).shares
    batch = TASK.pack(forest(), share=True)
    quiet = TASK.loss(model, batch).sum.item()
    model.train()
    first, second = (TASK.loss(model, batch).sum.item() for _ in range(2))
    assert len({quiet, first, second}) == 3
    assert torch.isfinite(torch.tensor([first, second])).all()


class FlashStandIn:
    """PyTorch's CUDA kernels for runs of variable length, written down for the CPU: same arguments, same layouts."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        query_bounds: torch.Tensor,
        key_bounds: torch.Tensor,
        longest_q: int,
        longest_k: int,
        dropout: float,
        is_causal: bool,
        _: bool,
        *,
        scale: float,
        **__: Any,
    ) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        output, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])
        for qs, ks, probs, scores in self._runs(q, k, query_bounds, key_bounds, is_causal, scale):
            assert qs.stop - qs.start <= longest_q
            assert ks.stop - ks.start <= longest_k
            output[qs] = (probs @ self._heads(v[ks], q)).transpose(0, 1)
            lse[:, qs] = torch.logsumexp(scores, -1)
        return output, lse, torch.zeros(2), torch.zeros(0), torch.zeros(0)

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        query_bounds: torch.Tensor,
        key_bounds: torch.Tensor,
        longest_q: int,
        longest_k: int,
        dropout: float,
        is_causal: bool,
        *_: torch.Tensor,
        scale: float,
        **__: Any,
    ) -> tuple[torch.Tensor, ...]:
        assert lse.is_contiguous()
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        groups = q.shape[1] // k.shape[1]
        for qs, ks, _probs, scores in self._runs(q, k, query_bounds, key_bounds, is_causal, scale):
            probs = (scores - lse[:, qs, None]).exp()
            d_out = grad[qs].transpose(0, 1)
            d_probs = d_out @ self._heads(v[ks], q).mT
            d_scores = probs * (d_probs - (d_out * out[qs].transpose(0, 1)).sum(-1, keepdim=True)) * scale
            dq[qs] = (d_scores @ self._heads(k[ks], q)).transpose(0, 1)
            dk[ks] = (d_scores.mT @ q[qs].transpose(0, 1)).unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
            dv[ks] = (probs.mT @ d_out).unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
        return dq, dk, dv

    def _heads(self, t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return t.transpose(0, 1).repeat_interleave(q.shape[1] // t.shape[1], 0)

    def _runs(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        query_bounds: torch.Tensor,
        key_bounds: torch.Tensor,
        is_causal: bool,
        scale: float,
    ) -> Iterator[Any]:
        assert query_bounds.dtype == key_bounds.dtype == torch.int32
        runs = zip(query_bounds.unfold(0, 2, 1).tolist(), key_bounds.unfold(0, 2, 1).tolist(), strict=True)
        for (q0, q1), (k0, k1) in runs:
            scores = q[q0:q1].transpose(0, 1) @ self._heads(k[k0:k1], q).mT * scale
            if is_causal:
                assert (q0, q1) == (k0, k1)
                scores = scores.masked_fill(torch.ones(q1 - q0, q1 - q0).triu(1).bool(), -torch.inf)
            yield slice(q0, q1), slice(k0, k1), scores.softmax(-1), scores


def test_as_a_gpu_computes_it_it_is_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that are made on CUDA, with stand-ins for its kernels: all triangles in one, then the other parts."""
    kernels = FlashStandIn()
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", kernels.forward, "CPU")
    library.impl("_flash_attention_backward", kernels.backward, "CPU")
    monkeypatch.setattr(packed_attention, "_kernel", lambda *_: packed_attention.CUDA)
    monkeypatch.setattr(packed_attention.PackMask, "rectangles", lambda mask: list(mask._bounded()))
    try:
        check_equal(small_model("llama"), forest(4), share=True, atol=1e-9)
        layers, batch = 2, TASK.pack(forest(4), share=True)
        kernels.calls = 0
        model = small_model("llama")
        model.set_attn_implementation(packed_attention.NAME)
        TASK.loss(model, batch)
        parents = len(set(batch.layout.parents) - {-1})
        assert kernels.calls == layers * (1 + parents)
    finally:
        library._destroy()


# --- the probe --------------------------------------------------------------------------------------------------------

LEAKING = {
    "a state that is carried on": lambda: transformers.Qwen3NextConfig(
        **SMALL,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "positions that it counts itself": lambda: transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        is_decoder=True,
        dropout=0.0,
    ),
    "attention that is not exchanged": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2
    ),
}


@pytest.mark.parametrize("kind", LEAKING)
def test_a_model_whose_samples_would_see_each_other_is_not_packed(kind: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(LEAKING[kind]()).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    before = model.config._attn_implementation
    found = isolate(model, find_head(model), torch.enable_grad)
    assert (found.packs, found.shares) == (False, False)
    assert found.reason
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    assert {config._attn_implementation for config in configs} == {before}


class Leak(torch.nn.Module):
    """Adds a little of a token to another one."""

    def __init__(self, inner: torch.nn.Module, amount: float, where: str) -> None:
        super().__init__()
        self.inner, self.amount, self.where = inner, amount, where

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output = self.inner(hidden)
        if self.where == "from the first token of the row":
            return output + self.amount * hidden[:, :1]
        if self.where == "from the token before":
            return output + self.amount * hidden.roll(1, dims=1)
        if self.where == "only far away":
            return output + self.amount * torch.nn.functional.pad(hidden, (0, 0, 30, 0))[:, : hidden.shape[1]]
        return output + self.amount * hidden.detach().roll(1, dims=1)  # without a gradient


@pytest.mark.parametrize("amount", [1.0, 1e-3])
@pytest.mark.parametrize(
    "where",
    ["from the first token of the row", "from the token before", "only far away", "without a gradient"],
)
def test_a_leak_anywhere_is_found(where: str, amount: float) -> None:
    model = small_model("llama").float()
    model.model.layers[0].mlp = Leak(model.model.layers[0].mlp, amount, where)
    assert not isolate(model, find_head(model), torch.enable_grad).packs


def test_a_leak_below_rounding_is_found_by_its_gradient() -> None:
    model = small_model("llama").float()
    model.model.layers[0].mlp = Leak(model.model.layers[0].mlp, 1e-9, "from the token before")
    found = isolate(model, find_head(model), torch.enable_grad)
    assert not found.packs
    assert found.reason == "examples in a pack see each other"


def test_modes_random_state_and_other_forwards_stay_as_they_were() -> None:
    model = small_model("llama").train()
    model.model.layers[0].eval()
    ids_BT = torch.randint(VOCABULARY, (2, 9))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 5:] = 0
    modes, state = {module: module.training for module in model.modules()}, torch.get_rng_state()
    before = model(input_ids=ids_BT, attention_mask=mask_BT).logits
    assert isolate(model, find_head(model), torch.enable_grad).packs
    assert {module: module.training for module in model.modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model(input_ids=ids_BT, attention_mask=mask_BT).logits, before)
    generated = model.eval().generate(ids_BT, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 12)


def test_a_pack_of_one_token_samples() -> None:
    model = small_model("llama")
    assert isolate(model, find_head(model), torch.enable_grad).packs
    made = pack(samples_of([[3], [4], [3]]), share=True)
    with packed(Layout.of(made)):
        logits = model(
            input_ids=torch.from_numpy(made.input_ids)[None],
            position_ids=torch.from_numpy(made.position_ids)[None],
            attention_mask=torch.ones(1, len(made.input_ids), dtype=torch.int64),
        ).logits[0]
    alone = model(input_ids=torch.tensor([[3], [4]])).logits[:, 0]
    torch.testing.assert_close(logits[[0, 2]], alone)  # in order of their tokens, the equal ones first
