"""Trains the same rows with llmforge and with other programs, and compares speed, memory and loss.

    python benchmarks/bench.py                      # everything; hours on two cores
    python benchmarks/bench.py --quick              # a few rows of everything, to see that it runs
    python benchmarks/bench.py --peers llmforge,trl --workloads chat --methods lora --merge
    python benchmarks/bench.py --render             # table and plot again, from the results there are

Every program runs as a process of its own, one after another, each with an environment of its own that is made on
demand. docs/benchmarks.md says what is measured and by which rules.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measuring import machine, process, work
from measuring.report import render
from measuring.work import Case
from peers import PROGRAMS
from peers.program import CACHE, INSIDE, NotInstalledError, NotPossibleError, Program, last_error, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GGUF = Path(os.environ.get("LLMFORGE_REAL_MODEL") or ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.gguf")
LEARNING_RATE = {"lora": 1e-3, "full": 3e-4}
QUICK_STEPS = 3
FULL_TRAINING_BYTES = 18  # of a parameter: weight, gradient and two moments in fp32, and a copy to compute with


def main() -> None:
    options = _options()
    name = "bench-gpu" if options.gpu else "bench"
    path = options.results / f"{name}{'-quick' if options.quick else ''}.json"
    if options.render:
        render(json.loads(path.read_text()), path)
        return
    if options.gpu:
        _require_gpu()
    if not GGUF.is_file():
        sys.exit(f"{GGUF} is missing; `make install-model` fetches it, or LLMFORGE_REAL_MODEL names it")
    programs = [PROGRAMS[key] for key in options.peers]
    results = json.loads(path.read_text()) if options.merge and path.is_file() else {"runs": [], "programs": {}}
    results["machine"] = machine.describe(gpu=options.gpu) | {"threads": options.threads}
    failed = _environments(programs, results)
    cases = list(_cases(options))
    results["flop_rule"] = work.FLOP_RULE
    if options.install_only:
        return
    shapes = {case.shape.name: case.shape for case in cases}
    device = "cuda" if options.gpu else "cpu"
    rates = results.setdefault("product_rates", {})
    rates |= {name: machine.product_rates(shape, options.threads, device) for name, shape in shapes.items()}
    done: set[tuple[str, ...]] = set()
    for repeat in range(options.repeat):
        for case in cases:
            for program in programs:
                if case.mode not in program.modes:
                    continue
                cell = (case.workload.name, case.method, case.mode, program.key)
                if cell not in done:  # what an earlier start measured of this is replaced
                    done.add(cell)
                    results["runs"] = [run for run in results["runs"] if _cell(run) != cell]
                label = " ".join(cell)
                print(f"{datetime.now():%H:%M:%S} {label} …", file=sys.stderr, flush=True)
                record = _run(program, case, failed.get(program.key), options)
                record |= {"repeat": repeat, "when": datetime.now(UTC).isoformat(timespec="seconds")}
                results["runs"].append(record)
                print(f"         {_summary(record)}", file=sys.stderr, flush=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(results, indent=1) + "\n")
    render(results, path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def one_of(*allowed: str) -> Any:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            wrong = [name for name in names if name not in allowed]
            if wrong:
                raise argparse.ArgumentTypeError(f"{', '.join(wrong)}; allowed: {', '.join(allowed)}")
            return names

        return parse

    def choice(flag: str, *allowed: str) -> None:
        parser.add_argument(flag, type=one_of(*allowed), default=list(allowed), help=f"some of {','.join(allowed)}")

    choice("--peers", *PROGRAMS)
    choice("--workloads", "chat", "guard", "short", "long")
    choice("--methods", "lora", "full")
    choice("--modes", "tuned", "quickstart")
    parser.add_argument("--repeat", type=int, default=1, help="how often, alternating; results are medians")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps of everything: does it run at all?")
    parser.add_argument("--gpu", action="store_true", help="the GPU suite instead, on one CUDA GPU")
    parser.add_argument("--threads", type=int, default=2, help="of every program")
    parser.add_argument("--limit", type=float, default=1_800, help="seconds after which a run is killed")
    parser.add_argument("--merge", action="store_true", help="keep what the results have of other programs and cases")
    parser.add_argument("--install-only", action="store_true", help="make the environments, and end")
    parser.add_argument("--render", action="store_true", help="only write table and plot again")
    parser.add_argument("--keep", action="store_true", help="keep what the programs write, in .cache/bench/runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results")
    return parser.parse_args()


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench-gpu needs one CUDA GPU, and torch sees none on this machine; `make bench` runs on the CPU")


def _environments(programs: list[Program], results: dict[str, Any]) -> dict[str, str]:
    """Make the environments, record their versions, and give the programs that have none, with the reason."""
    failed = {}
    for program in programs:
        try:
            found = versions(program.python(), program.packages)
        except NotInstalledError as error:
            failed[program.key] = f"not installed: {error}"
            found = {}
        results["programs"][program.key] = {"title": program.title, "versions": found}
    return failed


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    """Give every case, workload by workload, with model and rows on disk."""
    dtype = "bf16" if options.gpu else "fp32"
    for workload in work.GPU_WORKLOADS if options.gpu else work.CPU_WORKLOADS:
        if workload.name not in options.workloads:
            continue
        if options.quick:
            # At least one step of the quick starts, of which the largest takes 32 rows.
            rows = max(QUICK_STEPS * workload.examples_per_step, 32 if workload.name == "chat" else 0)
            workload = dataclasses.replace(workload, rows=rows)
        for mode, method in [("tuned", method) for method in options.methods] + [("quickstart", "lora")]:
            if mode not in options.modes or (mode == "quickstart" and workload.name not in ("chat", "guard")):
                continue
            shape = _shape(options.gpu, method)
            model = work.build_model(shape, dtype, GGUF, CACHE)
            rows, sizes = work.build_rows(workload, model, CACHE / "rows")
            yield Case(
                workload=workload,
                method=method,
                mode=mode,
                model=model,
                rows=rows,
                directory=CACHE / "runs",
                sizes=sizes,
                shape=shape,
                threads=options.threads,
                rank=16 if options.gpu else 8,
                learning_rate=LEARNING_RATE[method],
                dtype=dtype,
                device="cuda" if options.gpu else "cpu",
            )


def _shape(gpu: bool, method: str) -> work.Shape:
    """Choose the model: small on a CPU; on a GPU 8B for LoRA, and the largest that fits for full training."""
    if not gpu:
        return work.SMALL
    if method == "lora":
        return work.LLAMAS[0]
    import torch

    room = 0.8 * torch.cuda.get_device_properties(0).total_memory
    fitting = [shape for shape in work.LLAMAS if shape.parameters * FULL_TRAINING_BYTES < room]
    return fitting[0] if fitting else work.LLAMAS[-1]


def _run(program: Program, case: Case, failure: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """Do one case with one program, and describe how it went."""
    record: dict[str, Any] = {
        "workload": case.workload.name,
        "method": case.method,
        "mode": case.mode,
        "program": program.key,
        "shape": case.shape.name,
        "sizes": dataclasses.asdict(case.sizes) | {"examples_per_step": case.workload.examples_per_step},
    }
    if failure:
        return record | {"error": failure}
    directory = CACHE / "runs" / "-".join((*_cell(record), f"{time.time():.0f}"))
    directory.mkdir(parents=True)
    case = dataclasses.replace(case, directory=directory)
    try:
        command = program.command(case)
        outcome = process.run(
            [str(program.python()), *command.arguments],
            environment=_environment(case, command.environment),
            directory=directory,
            limit=options.limit,
        )
        return record | _described(program, case, outcome)
    except NotPossibleError as error:
        return record | {"error": str(error)}
    finally:
        if not options.keep:
            shutil.rmtree(directory)


def _environment(case: Case, added: Any) -> dict[str, str]:
    """Give the variables of a program: nothing is asked of a network, nothing is taken from an earlier run's cache."""
    threads = str(case.threads)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        **os.environ,
        # The program starts in another directory than this one.
        "PYTHONPATH": os.pathsep.join([str(INSIDE), *(str(Path(entry).resolve()) for entry in inherited if entry)]),
        "PYTHONUNBUFFERED": "1",
        "BENCH_VOCABULARY": str(case.shape.vocabulary),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(case.directory / "hf"),
        "HF_DATASETS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
        **({"CUDA_VISIBLE_DEVICES": "0"} if case.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}),
        **added,
    }


def _described(program: Program, case: Case, outcome: process.Outcome) -> dict[str, Any]:
    probe = process.steps_of(outcome.probe)
    record: dict[str, Any] = {"seconds": outcome.ended - outcome.began, "note": program.note(case)}
    if outcome.code != 0:
        why = "killed at the time limit" if outcome.code is None else last_error(outcome.log)
        return record | {"error": f"after {len(probe)} steps: {why}", "log": outcome.log[-4_000:]}
    steps = program.steps(case)
    steps = probe if steps is None else steps
    if not steps:
        return record | {"error": "no optimizer step was seen", "log": outcome.log[-4_000:]}
    record |= process.steady(steps, outcome.began)
    record |= {
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
        "trained": steps[-1].get("trained"),
        "computed_tokens": probe[-1]["tokens"] if probe else None,
        "computed_positions": probe[-1]["positions"] if probe else None,
        "peak_bytes": outcome.peak.together,
        "peak_main_bytes": outcome.peak.main,
        "device_bytes": max((step.get("device_bytes", 0) for step in probe), default=0) or None,
        "losses": program.losses(case, outcome.log),
        "step_times": [round(step["time"] - outcome.began, 3) for step in steps],
    }
    if record["tokens_per_second"]:
        per_token = work.flops(case.shape, case.sizes, case.method, case.rank) / case.sizes.tokens
        record["flops_per_second"] = per_token * record["tokens_per_second"]
    return record


def _cell(run: dict[str, Any]) -> tuple[str, ...]:
    return run["workload"], run["method"], run["mode"], run["program"]


def _summary(record: dict[str, Any]) -> str:
    if "error" in record:
        return record["error"]
    return (
        f"{record['seconds']:.1f} s, first step at {record['first_step_seconds']:.1f} s, {record['steps']} steps, "
        f"{record['tokens_per_second'] or 0:,.0f} tokens/s, {record['peak_bytes'] / 2**30:.2f} GiB, "
        f"loss {record['losses'][0] if record['losses'] else float('nan'):.3f} → "
        f"{record['losses'][-1] if record['losses'] else float('nan'):.3f}, "
        f"tokens {record['tokens'] / record['sizes']['tokens'] - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
