"""How fast the CPU computes: which library multiplies matrices, and whether freed memory stays with the program.

Both are settings of the process, made once before training. Neither changes what is computed beyond fp32 rounding.
"""

import ctypes
import platform
import time
from dataclasses import dataclass

import torch

# The library is changed only for a clear gain.
WORTH = 1.3
# How much larger its error may be. Another order of additions makes a factor of 2 or 3; bf16 makes 1000 and more.
AS_EXACT = 8.0
_PLACES, _FEATURES, _RANK = 512, 768, 8


@dataclass(frozen=True)
class MatmulPath:
    """What `choose_matmul` found: the errors relative to float64, and how many times faster the other library is."""

    precision: str
    speedup: float
    error: float
    plain_error: float


def choose_matmul(device: torch.device) -> MatmulPath | None:
    """Send fp32 matrix products to oneDNN where that is faster on this CPU and as exact; None where there is no choice.

    torch multiplies fp32 matrices with the BLAS it was built with: MKL, whose kernels for processors of other makers
    than Intel's leave half of the speed unused. `set_float32_matmul_precision("medium")` sends them to oneDNN. It
    allows oneDNN to compute in bf16 too, which it does where the processor has units for that (AMX), so the error is
    measured as well as the speed. The products of a training step are tried: forward, both gradients, LoRA's thin ones.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient, thin = (
        torch.randn(*shape, generator=generator)
        for shape in ((_PLACES, _FEATURES), (_FEATURES, _FEATURES), (_PLACES, _FEATURES), (_FEATURES, _RANK))
    )
    products = [(x, weight.t()), (gradient, weight), (gradient.t(), x), (x, thin), (thin.t(), x.t())]
    seconds: dict[str, float] = {}
    errors: dict[str, float] = {}
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            errors[precision] = max(_error(left, right) for left, right in products)
        for _ in range(5):  # in turns, so that other programs disturb both alike
            for precision in ("highest", "medium"):
                torch.set_float32_matmul_precision(precision)
                took = _seconds(x, weight.t())
                seconds[precision] = min(took, seconds.get(precision, took))
    finally:
        torch.set_float32_matmul_precision(before)
    speedup = seconds["highest"] / seconds["medium"]
    exact = errors["medium"] <= AS_EXACT * errors["highest"]
    precision = "medium" if exact and speedup >= WORTH else before
    torch.set_float32_matmul_precision(precision)
    return MatmulPath(precision, speedup, errors["medium"], errors["highest"])


def lay_out_weights(model: torch.nn.Module) -> None:
    """Lay the weights of linear layers out in memory as products of few rows read them: by input features.

    Their shapes and values stay. On 2 cores of an AMD EPYC it takes a tenth to a fifth off all products of a step of
    1 to 16 tokens. Weights that something else reads, too, such as tied embeddings, stay as they are.
    """
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[parameter.data_ptr()] = uses.get(parameter.data_ptr(), 0) + 1
    for module in model.modules():
        if type(module) is torch.nn.Linear and uses.get(module.weight.data_ptr()) == 1:
            module.weight.data = module.weight.data.t().contiguous().t()


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep large blocks that are freed; return whether there is one to tell.

    It maps blocks over 32 MB anew each time and gives them back when they are freed, so each use costs a page fault per
    4 kB. A step frees and asks for the same blocks again and again: activations, logits, gradients.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(mmap_threshold, 2**31 - 1) and mallopt(trim_threshold, -1))  # the largest int; never


def use_one_arena() -> bool:
    """Tell glibc's allocator to serve all threads from one pool; return whether there is one to tell.

    By default up to eight per core grow side by side, and what one of a server's threads frees, the others cannot use.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    arena_max = -8  # M_ARENA_MAX of malloc.h
    return bool(ctypes.CDLL(None).mallopt(arena_max, 1))


def give_back_memory() -> None:
    """Give what `keep_freed_memory` kept back to the system: what comes next asks for other blocks."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _error(left: torch.Tensor, right: torch.Tensor) -> float:
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).norm() / exact.norm())


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    began = time.perf_counter()
    left @ right
    return time.perf_counter() - began
