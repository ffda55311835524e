"""How fast the CPU computes: which library multiplies matrices, and whether freed memory stays with the program.

Both are settings of the process, made once before training. Neither changes what is computed beyond fp32 rounding.
"""

import ctypes
import hashlib
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from llmforge.atomic import write_atomically
from llmforge.errors import OutputError

# The library is changed only for a clear gain.
WORTH = 1.3
# How much larger its error may be. Another order of additions makes a factor of 2 or 3; bf16 makes 1000 and more.
AS_EXACT = 8.0
_PLACES, _FEATURES, _RANK = 512, 768, 8
_ROUNDS = 12
_PRECISIONS = ("highest", "medium")


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
        for precision in _PRECISIONS:
            torch.set_float32_matmul_precision(precision)
            errors[precision] = max(_error(left, right) for left, right in products)
        for _ in range(_ROUNDS):  # in turns, so that other programs disturb both alike
            for precision in _PRECISIONS:
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


def settle_matmul(device: torch.device, cache_dir: Path) -> str:
    """Choose as `choose_matmul`, but once for a kind of processor; give the precision that is set.

    A choice that hangs on timings can come out another way in another run, and that run would differ from the first
    one in rounding. So it is kept in a file below `cache_dir`, and runs that share the directory compute the same.
    Where it cannot be written, each run measures for itself.
    """
    kind = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    file = cache_dir / f"matmul-{hashlib.blake2b(kind.encode(), digest_size=8).hexdigest()}"
    with suppress(OSError, UnicodeDecodeError):
        known = file.read_text(encoding="utf-8").partition("\n")[0]
        if known in _PRECISIONS:
            torch.set_float32_matmul_precision(known)
            return known
    torch.set_float32_matmul_precision("highest")
    found = choose_matmul(device)
    chosen = "highest" if found is None else found.precision
    with suppress(OSError, OutputError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(file, f"{chosen}\n{kind}\n")
    return chosen


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


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _error(left: torch.Tensor, right: torch.Tensor) -> float:
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).norm() / exact.norm())


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    began = time.perf_counter()
    left @ right
    return time.perf_counter() - began
