"""LoRA's linear layers as one differentiable function each: the same numbers as PEFT's, in fewer passes over memory.

PEFT computes base(x) + B(A(x)) · s with five operations, whose intermediate results are all written out, and whose
gradients are too. Here the update is added to the base layer's output where it lies, and so is its share of the input's
gradient. Under autocast the input is cast once, instead of to fp32 and back for every layer.
"""

from typing import Any

import torch
from peft.tuners import lora
from torch.autograd.function import once_differentiable


def fuse_lora(model: Any) -> int:
    """Let a model's LoRA layers compute as one function each, where that is the same computation; return how many do.

    Names and types of parameters stay, and so does what PEFT does with a layer: it saves, merges and unloads it as
    before. A layer that is asked for something else than plain LoRA later (its adapter disabled, merged, or another
    one active) computes it as PEFT does.
    """
    layers = [module for module in model.modules() if _is_plain(module)]
    for layer in layers:
        layer.__class__ = FusedLinear
    return len(layers)


class FusedLinear(lora.Linear):
    """PEFT's LoRA layer around a frozen `nn.Linear`; `fuse_lora` makes them."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if (
            args
            or kwargs
            or self.disable_adapters
            or self.merged
            or name not in self.lora_A
            or name in self.lora_variant
            or (self.training and _drops(self.lora_dropout[name]))
            or weight.dtype != dtype  # a copy of the weight, made anew in the backward pass, would cost more
            or not (autocast or self.lora_A[name].weight.dtype == dtype)  # PEFT computes each part in its own format
        ):
            return super().forward(x, *args, **kwargs)
        return _LoraLinear.apply(
            x, weight, bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], dtype
        )


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ. W and b are frozen: they get no gradient.

    Shapes: N places, I and O features in and out, R the rank. The scale is put on the smallest factor there is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        y = x_NI.new_empty(*x.shape[:-1], len(weight_OI))  # no view of something: models may change it in place
        y_NO = y.view(-1, len(weight_OI))
        if bias_O is None:
            torch.mm(x_NI, weight_OI.t(), out=y_NO)
        else:
            torch.addmm(bias_O.to(dtype), x_NI, weight_OI.t(), out=y_NO)
        h_NR = x_NI @ (a_RI * scaling).to(dtype).t()
        y_NO.addmm_(h_NR, b_OR.to(dtype).t())
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, h_NR)
        ctx.shape, ctx.dtype, ctx.scaling = x.shape, x.dtype, scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, weight_OI, a_RI, b_OR, h_NR = ctx.saved_tensors
        dtype = x_NI.dtype
        dy_NO = gradients[0].reshape(-1, weight_OI.shape[0])
        dh_NR = dy_NO @ (b_OR * ctx.scaling).to(dtype)
        dx = da_RI = db_OR = None
        if ctx.needs_input_grad[0]:  # not where the layer reads frozen embeddings
            dx_NI = dy_NO @ weight_OI
            dx_NI.addmm_(dh_NR, a_RI.to(dtype))
            dx = dx_NI.view(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            da_RI = (dh_NR.t() @ x_NI).to(a_RI.dtype)
        if ctx.needs_input_grad[4]:
            # Up to twice as fast on a CPU as dyᵀ h; the copy is that of a small matrix.
            db_OR = (h_NR.t() @ dy_NO).t().contiguous().to(b_OR.dtype)
        return dx, None, None, da_RI, db_OR, None, None


def _is_plain(module: Any) -> bool:
    """Say whether a module is plain LoRA around a plain, frozen linear layer, on a CPU: there this was measured."""
    if type(module) is not lora.Linear or type(module.base_layer) is not torch.nn.Linear:
        return False
    inner = [*module.lora_A.values(), *module.lora_B.values()]
    return (
        not any(parameter.requires_grad for parameter in module.base_layer.parameters())
        and module.base_layer.weight.device.type == "cpu"
        and not module.fan_in_fan_out
        and not module.lora_variant
        and all(type(layer) is torch.nn.Linear and layer.bias is None for layer in inner)
        and not any(_is_watched(layer) for layer in (module.base_layer, *inner))
    )


def _drops(dropout: torch.nn.Module) -> bool:
    return not isinstance(dropout, torch.nn.Identity) and getattr(dropout, "p", 1.0) != 0


def _is_watched(module: torch.nn.Module) -> bool:
    """Say whether somebody hooked a module or replaced its forward: it has to be called then."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
