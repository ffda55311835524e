"""Times a LoRA step on the CPU under the ways to hold frozen weights and to compute with them.

python benchmarks/cpu_formats.py MODEL_DIR
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from llmforge.models.adapter import add_lora
from llmforge.models.load import load_base_model
from llmforge.models.source import find_model

BATCH, TOKENS, STEPS = 8, 96, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a local model directory, a .gguf file's converted directory, or a hub id")
    source = find_model(parser.parse_args().model, relative_to=Path.cwd())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {BATCH} × {TOKENS} tokens, median of {STEPS}")
    for name, held, autocast in (
        ("fp32 held, fp32 computed", torch.float32, False),
        ("fp32 held, bf16 autocast", torch.float32, True),
        ("bf16 held, bf16 autocast", torch.bfloat16, True),
        ("bf16 held, no autocast", torch.bfloat16, False),
    ):
        model = add_lora(load_base_model(source, dtype=held), {"r": 8, "target_modules": "all-linear"})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        torch.manual_seed(0)
        ids_BT = torch.randint(0, 40_000, (BATCH, TOKENS))
        seconds = []
        for _ in range(STEPS + 1):
            began = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
                logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])
        print(f"{name:<28} {median:6.2f} s per step   {BATCH * TOKENS / median:6.0f} tokens/s   loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
