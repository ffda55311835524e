"""Linear layers for the steps of a server on a CPU: few rows, and weights that do not fit into its caches.

What such a product costs is reading the weights. But for x Wᵀ with 2 to 64 rows in x, PyTorch's library took up to four
times as long as for W xᵀ (torch 2.13 with MKL and with oneDNN, on 2 cores of an AMD EPYC): by the look of it, the
operand on the right is copied into another order first, and xᵀ is small. For one row both took about as long.
"""

import torch
from torch.nn.functional import linear

_MOST_ROWS = 64  # above them both ways take as long


def multiply_few_rows(model: torch.nn.Module) -> int:
    """Let a model's fp32 linear layers on the CPU compute few rows the faster way; return how many do.

    For computing without gradients. Names, types and values of parameters stay; results differ in rounding.
    """
    layers = [module for module in model.modules() if _is_plain(module)]
    for layer in layers:
        layer.__class__ = FewRowsLinear
    return len(layers)


class FewRowsLinear(torch.nn.Linear):
    """An `nn.Linear`, (…, I) to (…, O); `multiply_few_rows` makes them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.shape[:-1].numel()
        if not 1 < rows <= _MOST_ROWS or input.dtype != self.weight.dtype or torch.is_autocast_enabled("cpu"):
            return linear(input, self.weight, self.bias)
        x_IN = input.reshape(rows, -1).t()
        y_ON = self.weight @ x_IN if self.bias is None else torch.addmm(self.bias[:, None], self.weight, x_IN)
        # In the order of an input: the next layer takes twice as long for one that is in the other.
        return y_ON.t().contiguous().view(*input.shape[:-1], -1)


def _is_plain(module: torch.nn.Module) -> bool:
    return (
        type(module) is torch.nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and "forward" not in vars(module)
    )
