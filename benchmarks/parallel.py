"""Trains the same rows on one device and on two workers with every backend: is it the same run, and what does it cost?

    python benchmarks/parallel.py [--steps 16] [--backends ddp,fsdp2,zero1,zero2,zero3] [--methods lora,full]

The workers are CPU processes of Ray Train that share this machine's cores, so two of them have the arithmetic of one:
the ratio of their speeds shows what the sharing costs, not what a second device brings. Writes results/parallel.md.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from startup import build_model, write_conversations

RESULT = Path(__file__).parent / "results" / "parallel.md"
BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    **{f"zero{stage}": {"deepspeed": {"config_path": f"zero_{stage}.json"}} for stage in (1, 2, 3)},
}
WARM_UP = 3  # steps


def main() -> None:
    """Run everything, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--methods", default="lora,full")
    options = parser.parse_args()
    lines = [
        "| method | devices | largest relative difference: losses | weights | tokens/s | to one device "
        "| first step s | all s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = build_model(directory / "model")
        data = write_conversations(directory / "train.jsonl")
        data.write_text("".join(data.read_text().splitlines(keepends=True)[: 8 * options.steps]))
        for stage in (1, 2, 3):
            zero = {"zero_optimization": {"stage": stage, "overlap_comm": False}, "gradient_clipping": "auto"}
            (directory / f"zero_{stage}.json").write_text(json.dumps(zero))
        for method in options.methods.split(","):
            one = train(directory, model, data, method, "one", {"train_batch_size_per_device": 8})
            lines.append(row(method, "one", one, one))
            print(lines[-1], flush=True)
            for backend in options.backends.split(","):
                two = {"num_devices": 2, "train_batch_size_per_device": 4, **BACKENDS[backend]}
                lines.append(row(method, f"two, {backend}", train(directory, model, data, method, backend, two), one))
                print(lines[-1], flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "deepspeed", "transformers", "peft"))
    machine = f"{platform.processor() or platform.machine()}, {datetime.now():%Y-%m-%d}, {versions}"
    RESULT.write_text(
        "# Two workers and one device\n\n"
        f"`python benchmarks/parallel.py --steps {options.steps}`: 31M parameters and 25M embeddings, fp32, 8 examples "
        f"a step; two CPU workers of one thread against one process of {torch.get_num_threads()}; {machine}.\n\n"
        + "\n".join(lines)
        + "\n\nLosses: over all steps. Weights: norm of the difference over the norm, of the worst tensor, at the end. "
        f"tokens/s: median after {WARM_UP} steps. *First step* shows what Ray and its workers take to start.\n"
    )


def train(directory: Path, model: Path, data: Path, method: str, name: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Train once, and give what it was like."""
    settings = {
        "model_id": str(model),
        "train_path": str(data),
        "task": "instruction_tuning",
        "num_epochs": 1,
        "num_warmup_steps": 0,
        "learning_rate": 1e-4,
        "dtype": "fp32",
        "output_dir": str(directory / "runs"),
        "cache_dir": str(directory / "cache"),
        "custom_model_tag": f"{method}-{name}",
        **({"lora_config": {"r": 8}} if method == "lora" else {}),
        **keys,
    }
    config = directory / f"{method}-{name}.yaml"
    config.write_text(json.dumps(settings))
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "llmforge", "finetune", str(config), "--json"], text=True, capture_output=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    seconds = time.time() - began
    run = Path(json.loads(done.stdout)["run_dir"])
    steps = [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["event"] == "step"]
    speeds = sorted(step["tokens_per_second"] for step in steps[WARM_UP:])
    weights = load_file(run / "artifact" / ("adapter_model.safetensors" if method == "lora" else "model.safetensors"))
    shutil.rmtree(run)
    return {
        "losses": [step["train_loss"] for step in steps],
        "weights": weights,
        "speed": speeds[len(speeds) // 2],
        "first": datetime.fromisoformat(steps[0]["time"]).timestamp() - began,
        "seconds": seconds,
    }


def row(method: str, devices: str, run: dict[str, Any], one: dict[str, Any]) -> str:
    """Put a run into a line of the table."""
    losses = max(abs(a - b) / a for a, b in zip(one["losses"], run["losses"], strict=True))
    weights = max(float((run["weights"][name] - t).norm() / t.norm()) for name, t in one["weights"].items())
    return (
        f"| {method} | {devices} | {losses:.1e} | {weights:.1e} | {run['speed']:,.0f} "
        f"| {run['speed'] / one['speed']:.2f} | {run['first']:.1f} | {run['seconds']:.1f} |"
    )


if __name__ == "__main__":
    main()
