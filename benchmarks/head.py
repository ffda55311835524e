"""Times ways to the loss of an output layer: all logits, PyTorch's `linear_cross_entropy`, and llmforge's chunks.

    python benchmarks/head.py [--dtype fp32|bf16] [--places 2048] [--hidden 512] [--vocabulary 49152]

Forward and backward, with the layer frozen and trained; each way in a process of its own, whose peak memory counts from
before. fp32 products go to oneDNN where that is faster, as in training.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy

from llmforge.models.arithmetic import choose_matmul, keep_freed_memory
from llmforge.models.head import Head, Tail

WAYS = ("all logits", "linear_cross_entropy", "llmforge")
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--places", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--trained", action="store_true")
    options = parser.parse_args()
    if options.way:
        measure(options)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}, {options.places} places, ")
    print(f"{options.hidden} × {options.vocabulary}; best of {REPEATS}\n")
    print("| layer | way | ms | peak MB | loss |\n|---|---|---|---|---|")
    for trained in ([], ["--trained"]):
        for way in WAYS:
            same = [f"--{name}={getattr(options, name)}" for name in ("dtype", "places", "hidden", "vocabulary")]
            subprocess.run([sys.executable, __file__, "--way", way, *trained, *same], check=True)


def measure(options: argparse.Namespace) -> None:
    """Print one line of the table."""
    keep_freed_memory()
    choose_matmul(torch.device("cpu"))
    torch.manual_seed(0)
    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    layer = torch.nn.Linear(options.hidden, options.vocabulary, bias=False, dtype=dtype)
    layer.requires_grad_(options.trained)
    states_SC = torch.randn(options.places, options.hidden, dtype=dtype)
    targets_S = torch.randint(options.vocabulary, (options.places,))
    weights_S = torch.ones(options.places)
    head = Head(layer, Tail(1.0, 0.0))

    def loss(hidden_SC: torch.Tensor) -> torch.Tensor:
        if options.way == "all logits":
            return cross_entropy(linear(hidden_SC, layer.weight).float(), targets_S, reduction="sum")
        if options.way == "linear_cross_entropy":
            chunked = torch.nn.LinearCrossEntropyOptions()
            return linear_cross_entropy(hidden_SC, layer.weight, targets_S, reduction="sum", options=chunked)
        with head.selecting(torch.arange(options.places)):
            layer(hidden_SC[None])
        return head.loss(targets_S, weights_S)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = float("inf")
    for _ in range(REPEATS):
        layer.weight.grad = None
        hidden_SC = states_SC.clone().requires_grad_()
        began = time.perf_counter()
        total = loss(hidden_SC)
        total.backward()
        best = min(best, time.perf_counter() - began)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    kind = "trained" if options.trained else "frozen"
    print(
        f"| {kind} | {options.way} | {1e3 * best:.0f} | {peak:.0f} | {total.item() / options.places:.6f} |", flush=True
    )


if __name__ == "__main__":
    main()
