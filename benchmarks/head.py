"""Times training steps with the head's logits all at once and in chunks (`llmforge.models.head`), side by side.

    python benchmarks/head.py [--dtype bf16|fp32] [--steps 6]

The model is Llama's shape with random weights: 10 layers of 512, 49,152 tokens; LoRA of rank 8. The rows are of 16 to
512 tokens with a long tail, 60 % of them trained; 8 rows a step in two micro-batches. Each way runs in a process of its
own.
"""

import argparse
import random
import resource
import subprocess
import sys
import time

import torch
import transformers

from llmforge.data.samples import Sample
from llmforge.models.adapter import add_lora
from llmforge.models.device import DTYPES, autocast
from llmforge.models.head import find_head
from llmforge.models.load import takes_logits_to_keep
from llmforge.tasks import InstructionTuning

VOCABULARY, WARM_UP = 49_152, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--way", choices=["all at once", "in chunks"], help="of logits; both where it is not given")
    options = parser.parse_args()
    if options.way:
        _measure(options.way, options.dtype, options.steps)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}\n")
    print("| logits | tokens/s | peak memory, GB | last loss |\n|---|---|---|---|")
    for way in ("all at once", "in chunks"):
        subprocess.run(
            [sys.executable, __file__, "--way", way, "--dtype", options.dtype, "--steps", str(options.steps)],
            check=True,
        )


def _measure(way: str, dtype: str, steps: int) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(DTYPES[dtype])
    model = add_lora(model, {"r": 8, "target_modules": "all-linear"}).train()
    context = autocast(torch.device("cpu"), dtype)
    with context():
        head = find_head(model) if way == "in chunks" else None
    task = InstructionTuning(pad_token_id=0, pad_to=None, keeps_logits=takes_logits_to_keep(model), head=head)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    seconds = tokens = 0.0
    for step in range(WARM_UP + steps):
        samples = _samples(step)
        began = time.perf_counter()
        batches = [task.collate(samples[:4]), task.collate(samples[4:])]
        weight, total = sum(batch.weight for batch in batches), 0.0
        for batch in batches:
            with context():
                loss = task.loss(model, batch)
            (loss.sum / weight).backward()
            total += float(loss.sum.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= WARM_UP:
            seconds += time.perf_counter() - began
            tokens += sum(batch.tokens for batch in batches)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"| {way} | {tokens / seconds:,.0f} | {memory:.2f} | {total / weight:.5f} |", flush=True)


def _samples(step: int) -> list[Sample]:
    """Draw the rows of a step, the longest first."""
    generator = random.Random(step)
    lengths = sorted((min(512, int(generator.lognormvariate(4.8, 0.8)) + 16) for _ in range(8)), reverse=True)
    return [
        Sample(
            [generator.randrange(10, VOCABULARY) for _ in range(length)],
            [0.0 if place < 0.4 * length else 1.0 for place in range(length)],
        )
        for length in lengths
    ]


if __name__ == "__main__":
    main()
