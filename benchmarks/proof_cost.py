"""Says what share of a run its proof took, of any finished run: `make quickstart`, then

    python benchmarks/proof_cost.py runs/SmolLM2-135M-Instruct-*

The proof's time has all of its parts in it: before training, the recording of what the trained model computes, and
afterwards. The run's time is that from the first step to the end; preparation and the model's loading come on top.
"""

import argparse
import json
from datetime import datetime
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    print("| run | run, s | proof, s | share |\n|---|---|---|---|")
    for run in parser.parse_args().runs:
        lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
        events = {event["event"]: event for event in map(json.loads, lines)}
        if "proof" not in events or "finished" not in events:
            print(f"| {run.name} | not finished | | |")
            continue
        began, ended = (datetime.fromisoformat(events[name]["time"]) for name in ("started", "finished"))
        whole, proof = (ended - began).total_seconds(), events["proof"]["seconds"]
        print(f"| {run.name} | {whole:.1f} | {proof:.1f} | {proof / whole:.1%} |")


if __name__ == "__main__":
    main()
