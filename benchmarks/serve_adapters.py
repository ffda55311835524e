"""What many adapters over one base cost: to add one, to hold one, and to answer for several in one batch.

    python benchmarks/serve_adapters.py [--adapters 50] [--model DIR]

Without `--model`, a Llama of 57M random weights. The adapters have rank 8 on every linear layer. Writes
results/serve_adapters.md.
"""

import argparse
import statistics
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path

import peft
import psutil
import torch

from llmforge.models.load import load_base_model
from llmforge.models.source import ModelSource
from llmforge.serve.engines.transformers import TransformersEngine
from llmforge.serve.requests import Request, Sampling, Update
from measuring.machine import describe
from startup import build_model

RESULT = Path(__file__).parent / "results" / "serve_adapters.md"
PROMPT, NEW, BATCH = list(range(100, 164)), 48, 16


def save_adapters(source: ModelSource, directory: Path, count: int) -> list[Path]:
    """Save adapters with random weights."""
    model = load_base_model(source, dtype=torch.float32, trust_remote_code=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    paths = []
    for number in range(count):
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.02)
        paths.append(directory / f"adapter-{number}")
        adapted.save_pretrained(paths[-1])
    return paths


def tokens_per_second(engine: TransformersEngine, names: list[str | None]) -> float:
    """Answer a batch, its requests for these adapters in turns; the best of three times."""

    def once() -> float:
        events = [threading.Event() for _ in range(BATCH)]
        began = time.perf_counter()
        for number, event in enumerate(events):

            def hear(update: Update, event: threading.Event = event) -> None:
                assert update.error is None, update.error
                if update.finish:
                    event.set()

            sampling = Sampling(NEW, temperature=0, ignore_stops=True)
            engine.submit(Request([*PROMPT, number], sampling, adapter=names[number % len(names)]), hear)
        for event in events:
            event.wait()
        return BATCH * NEW / (time.perf_counter() - began)

    return max(once() for _ in range(3))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = options.model or build_model(Path(name) / "model")
        source = ModelSource(str(model), model)
        paths = save_adapters(source, Path(name), options.adapters)
        engine = TransformersEngine.load(source, None, dtype="fp32")
        plain = tokens_per_second(engine, [None])
        before = psutil.Process().memory_info().rss
        seconds = []
        for path in paths:
            began = time.perf_counter()
            engine.add_adapter(path.name, path)
            seconds.append(time.perf_counter() - began)
        held = (psutil.Process().memory_info().rss - before) / len(paths)
        own = engine.stats()["adapter_bytes"] / len(paths)
        names = [path.name for path in paths]
        rows = [("the base model alone", plain), ("one adapter", tokens_per_second(engine, names[:1]))]
        for count in (2, 4, 16):
            rows.append((f"{count} adapters in a batch", tokens_per_second(engine, list(names[:count]))))
        rows.append((f"{len(names)} adapters loaded, the base model asked", tokens_per_second(engine, [None])))
        engine.close()
    machine = describe(gpu=False)
    lines = [
        "# Adapters over one base",
        "",
        f"`python benchmarks/serve_adapters.py`, {datetime.now():%Y-%m-%d}, {machine['processor']}, "
        f"{machine['cores']} cores, torch {torch.__version__}, fp32.",
        f"{len(paths)} adapters, {own / 1e6:.1f} MB each; the process grew by {held / 1e6:.1f} MB for each. To add one "
        f"takes {1000 * statistics.median(seconds):.0f} ms (median; the most was {1000 * max(seconds):.0f} ms).",
        "",
        f"| {BATCH} requests at a time, {len(PROMPT) + 1} + {NEW} tokens | tokens/s | of the base model |",
        "|---|---|---|",
        *(f"| {what} | {rate:,.0f} | {rate / plain:.2f} |" for what, rate in rows),
    ]
    print("\n".join(lines))
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
