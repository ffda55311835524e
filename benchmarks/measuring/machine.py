"""What the machine is, and how fast it multiplies matrices: the limit that every program is held against."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring.work import Shape

TOKENS = 1_024
# Dense bf16 rates by the makers' data sheets, in TFLOP/s.
DATA_SHEET = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "B200": 2_250,
}


def describe(*, gpu: bool) -> dict[str, Any]:
    """Say what the machine is, in words that other people understand."""
    import psutil
    import torch

    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "features": sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True),
    }
    if gpu:
        machine["gpu"] = torch.cuda.get_device_name(0)
        machine["gpu_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
        machine["cuda"] = torch.version.cuda
        machine["data_sheet_rate"] = _data_sheet_rate(machine["gpu"])
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _data_sheet_rate(gpu: str) -> float | None:
    """Give the dense bf16 rate of a GPU in FLOP/s, where it is known."""
    return next((rate * 1e12 for name, rate in DATA_SHEET.items() if name in gpu), None)


def product_rates(shape: Shape, threads: int, device: str) -> dict[str, float]:
    """Measure the rate (FLOP/s) of the products of a model's linear layers, in a process of its own.

    On a CPU in fp32: "highest" is torch's default (MKL where it is built in), "medium" goes to oneDNN.
    """
    options = {"products": shape.products(), "tokens": TOKENS, "device": device, "threads": threads}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(options)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _measure(products: list[tuple[int, int]], tokens: int, device: str, threads: int) -> dict[str, float]:
    import time

    import torch

    torch.set_num_threads(threads)
    formats = (
        [("bf16", torch.bfloat16, "highest")]
        if device == "cuda"
        else [
            ("fp32 MKL (highest)", torch.float32, "highest"),
            ("fp32 oneDNN (medium)", torch.float32, "medium"),
            ("bf16", torch.bfloat16, "highest"),
        ]
    )
    rates = {}
    for name, dtype, precision in formats:
        torch.set_float32_matmul_precision(precision)
        work = seconds = 0.0
        for inputs, outputs in sorted(set(map(tuple, products))):
            a = torch.randn(tokens * (16 if device == "cuda" else 1), inputs, device=device, dtype=dtype)
            b = torch.randn(outputs, inputs, device=device, dtype=dtype)
            out = torch.empty(a.shape[0], outputs, device=device, dtype=dtype)
            fastest = float("inf")
            for _ in range(8):
                if device == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(10):
                    torch.mm(a, b.t(), out=out)
                if device == "cuda":
                    torch.cuda.synchronize()
                fastest = min(fastest, (time.perf_counter() - began) / 10)
            times = products.count([inputs, outputs])
            work += times * 2 * a.shape[0] * inputs * outputs
            seconds += times * fastest
        rates[name] = work / seconds
    return rates


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
