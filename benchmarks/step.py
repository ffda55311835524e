"""Times training steps of a Llama on the CPU, with the parts that make them fast added one by one.

python benchmarks/step.py [--full] [--bf16] [--document 128] [--tokens 2048]

Prints for each the share of the fastest matrix product measured here, at which the step's own arithmetic would run
without anything around it: products with weights, LoRA's, attention's and the head's. What is computed twice counts
once. The variants take turns in one process, twice: with the C library's allocator as it is, and told to keep memory.
"""

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from llmforge.data.samples import Sample
from llmforge.models.adapter import add_lora
from llmforge.models.arithmetic import choose_matmul, keep_freed_memory
from llmforge.models.device import autocast
from llmforge.models.fused_lora import fuse_lora
from llmforge.models.fused_norm import fuse_norms
from llmforge.models.head import Head, find_head
from llmforge.models.isolation import isolate
from llmforge.models.load import quiet
from llmforge.tasks.causal_lm import CausalLM
from llmforge.train.backends import SingleDevice
from llmforge.train.optimization import build_optimizer

CPU = torch.device("cpu")
HIDDEN, INNER, LAYERS, HEADS, VOCABULARY, RANK = 512, 1376, 10, 8, 49152, 8
VARIANTS = ("torch's own products", "+ the fastest products", "+ fused LoRA", "+ fused norms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="train every weight instead of an adapter")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step, in one packed row")
    parser.add_argument("--document", type=int, default=128, help="tokens of each sample")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--allocator", choices=["plain", "kept"], help="only this one")
    options = parser.parse_args()
    if options.allocator is None:
        for allocator in ("plain", "kept"):
            subprocess.run([sys.executable, *sys.argv, "--allocator", allocator], check=True)
        return
    if options.allocator == "kept":
        keep_freed_memory()
    measure(options)


def measure(options: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    dtype = "bf16" if options.bf16 else "fp32"
    path = choose_matmul(CPU)
    fastest = torch.get_float32_matmul_precision()
    built = {name: build(options, number) for number, name in enumerate(VARIANTS)}
    if options.full:
        del built["+ fused LoRA"]
    task = CausalLM(pad_token_id=0, pad_to=None)
    numbers = np.random.default_rng(0)
    samples = [
        Sample(
            numbers.integers(1, VOCABULARY, options.document).tolist(),
            [0.0, *[1.0, 0.0] * options.document][: options.document],
        )
        for _ in range(options.tokens // options.document)
    ]
    batch = task.pack(samples, share=False)
    backend, context = SingleDevice(CPU), autocast(CPU, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    losses, rates = {}, []
    for _ in range(options.rounds + 1):
        torch.set_float32_matmul_precision(fastest)
        rates.append(product_rate(options.tokens, torch.bfloat16 if options.bf16 else torch.float32))
        for name, (model, head, optimizer) in built.items():
            torch.set_float32_matmul_precision("highest" if name == VARIANTS[0] else fastest)
            parameters = [p for p in model.parameters() if p.requires_grad]
            began = time.perf_counter()
            with context():
                loss = task.loss(model, batch, head)
            backend.backward(loss.sum / loss.weight)
            backend.clip(parameters, 1.0)
            backend.step(optimizer)
            seconds[name].append(time.perf_counter() - began)
            losses.setdefault(name, float(loss.sum.detach()) / loss.weight)
    needed, rate = arithmetic(options, len(batch.trained.places_S)), max(rates)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; {'full' if options.full else 'LoRA'}, {dtype}, "
        f"{options.tokens} tokens in samples of {options.document}; allocator {options.allocator}; {path}\n"
        f"{needed / 1e9:.0f} GFLOP; products at {min(rates) / 1e9:.0f}–{rate / 1e9:.0f} GFLOP/s"
    )
    for name, all_seconds in seconds.items():
        first, *rest = all_seconds
        best, median = min(rest), statistics.median(rest)
        print(
            f"{name:<24} first {first:5.2f} s  median {median:.3f} s  best {best:.3f} s  "
            f"{options.tokens / median:6.0f} tokens/s  share {needed / median / rate:.1%}, at best "
            f"{needed / best / rate:.1%}  loss {losses[name]:.6f}",
            flush=True,
        )


def build(options: argparse.Namespace, parts: int) -> tuple[Any, Head | None, torch.optim.Optimizer]:
    """Build the model with the first so many of the parts, the learning rate being 0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=True,
    )
    with quiet():
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16 if options.bf16 and not options.full else torch.float32)
    if not options.full:
        model = add_lora(model, {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"})
    if parts >= 2:
        fuse_lora(model)
    if parts >= 3:
        fuse_norms(model)
    with autocast(CPU, "bf16" if options.bf16 else "fp32")():
        head = find_head(model)
    isolation = isolate(model, head, autocast(CPU, "bf16" if options.bf16 else "fp32"))
    if not isolation.packs:
        raise SystemExit(f"this model does not pack: {isolation.reason}")
    return model.train(), head, build_optimizer("adamw", model.named_parameters(), weight_decay=0.0)


def product_rate(places: int, dtype: torch.dtype) -> float:
    """Measure the fastest of some matrix products of a step's size, in FLOP per second."""
    rates = []
    for features_in, features_out in ((HIDDEN, INNER), (INNER, HIDDEN), (HIDDEN, HIDDEN), (2048, 2048)):
        x, weight = torch.randn(places, features_in, dtype=dtype), torch.randn(features_out, features_in, dtype=dtype)
        out, best = torch.empty(places, features_out, dtype=dtype), float("inf")
        for _ in range(8):
            began = time.perf_counter()
            torch.mm(x, weight.t(), out=out)
            best = min(best, time.perf_counter() - began)
        rates.append(2 * places * features_in * features_out / best)
    return max(rates)


def arithmetic(options: argparse.Namespace, targets: int) -> float:
    """Count the floating-point operations that a step cannot do without."""
    weights = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    adapters = 0 if options.full else LAYERS * RANK * (4 * 2 * HIDDEN + 3 * (HIDDEN + INNER))
    passes = 6 if options.full else 4  # of two operations: forward, gradient of the input, gradient of the weight
    attention = LAYERS * 6 * options.tokens * options.document * HIDDEN  # triangles, two products and their gradients
    head = passes * targets * HIDDEN * VOCABULARY
    return passes * options.tokens * weights + 6 * options.tokens * adapters + attention + head


if __name__ == "__main__":
    main()
