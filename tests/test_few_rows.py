"""Linear layers of few rows compute what PyTorch's own compute."""

import copy

import pytest
import torch

from llmforge.models.few_rows import FewRowsLinear, multiply_few_rows


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (1, 3), (7, 1), (4, 16), (65,), (2, 70)])
@pytest.mark.parametrize("bias", [True, False])
def test_results_are_those_of_the_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    plain = torch.nn.Linear(48, 80, bias=bias)
    fast = torch.nn.Sequential(copy.deepcopy(plain))
    assert multiply_few_rows(fast) == 1
    lies_apart = torch.randn(48, *shape).movedim(0, -1)
    for x in (torch.randn(*shape, 48), lies_apart):
        with torch.inference_mode():
            found, expected = fast(x), plain(x)
        assert found.shape == expected.shape
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_few_rows_take_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    multiply_few_rows(layer)
    monkeypatch.setattr("llmforge.models.few_rows.linear", lambda *_: torch.tensor(torch.nan))
    assert [bool(layer(torch.ones(rows, 8)).isnan().any()) for rows in (1, 2, 64, 65)] == [True, False, False, True]


def test_layers_keep_their_parameters_and_hooks() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(10, 6), torch.nn.Linear(6, 10, bias=False))
    model[1].weight = model[0].weight
    handle = model[1].register_forward_hook(lambda module, args, output: output + 1)
    before = model(torch.tensor([1, 2, 3]))
    assert multiply_few_rows(model) == 1
    assert model[1].weight is model[0].weight
    torch.testing.assert_close(model(torch.tensor([1, 2, 3])), before, rtol=1e-5, atol=1e-6)
    handle.remove()


def test_other_layers_and_number_formats_stay() -> None:
    class Doubled(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(4, 4).bfloat16(), Doubled(4, 4))
    assert multiply_few_rows(model) == 0
    plain = torch.nn.Linear(4, 4)
    fast = torch.nn.Sequential(copy.deepcopy(plain))
    assert multiply_few_rows(fast) == 1
    assert type(fast[0]) is FewRowsLinear
    x = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(x), plain(x))
        assert fast(x).dtype == torch.bfloat16
    fast.bfloat16()
    assert torch.equal(fast(x.bfloat16()), plain.bfloat16()(x.bfloat16()))
