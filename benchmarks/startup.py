"""Measures how soon commands that need no model answer: the promises are 0.5 s for --help, 1 s for --config-only.

python benchmarks/startup.py [--runs 10]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = "model_id: org/name\ntrain_path: train.jsonl\nlora_config: {r: 8}\n"
LIMITS = {"--version": 0.5, "--help": 0.5, "finetune --help": 0.5, "schema": 1.0, "validate --config-only CONFIG": 1.0}


def main() -> None:
    """Print the median and the slowest of some runs of each command; exit with 1 if a median is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    slow = False
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory, "config.yaml")
        config.write_text(CONFIG)
        for command, limit in LIMITS.items():
            arguments = [str(config) if word == "CONFIG" else word for word in command.split()]
            seconds = [measure(arguments) for _ in range(runs + 1)][1:]  # the first one fills the file cache
            median = statistics.median(seconds)
            slow |= median > limit
            print(f"llmforge {command:<30} median {median:.2f} s, slowest {max(seconds):.2f} s, limit {limit} s")
    sys.exit(slow)


def measure(arguments: list[str]) -> float:
    """Run a command once; give its seconds from start to end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llmforge", *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
