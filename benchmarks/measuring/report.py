"""Turns the results' JSON into a table and a plot, so that partial runs can be merged and rendered again."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

OURS = "llmforge"
METHODS = {"lora": "LoRA", "full": "full"}
MEDIANS = (
    "seconds",
    "first_step_seconds",
    "tokens_per_second",
    "flops_per_second",
    "peak_bytes",
    "peak_main_bytes",
    "device_bytes",
    "tokens",
    "trained",
    "computed_tokens",
    "computed_positions",
    "steps",
)
LOSS_APART = 0.03  # of the loss: a program whose last losses are further from the others' is named


def render(results: dict[str, Any], path: Path) -> None:
    """Write `<name>.md` and `<name>.png` beside the JSON file `path`."""
    path.with_suffix(".md").write_text(_page(results, path.stem))
    _plot(results, path.with_suffix(".png"))
    print(path.with_suffix(".md"))


def _page(results: dict[str, Any], name: str) -> str:
    gpu = "gpu" in results["machine"]
    lines = [
        f"# {'One GPU' if gpu else 'The CPU'}: llmforge and other programs",
        "",
        f"`make {name.removesuffix('-quick')}`; how it is measured: [docs/benchmarks.md](../../docs/benchmarks.md).",
    ]
    if name.endswith("-quick"):
        lines += ["", "**A quick run: three steps of everything. It shows that programs run, not how fast they are.**"]
    lines += ["", *_machine(results), "", f"![tokens per second]({name}.png)", "", *_headline(results)]
    for (mode, workload, method), cells in _groups(results):
        sizes = cells[0]["sizes"]
        what = f"{METHODS[method]}" if mode == "tuned" else "as a user gets it"
        lines += [
            "",
            f"## {workload}, {what}",
            "",
            f"{sizes['rows']:,} rows of {sizes['shortest']:,}–{sizes['longest']:,} tokens, {sizes['tokens']:,} in all, "
            f"{sizes['trained'] / sizes['tokens']:.0%} trained, {sizes['examples_per_step']} rows a step, "
            f"{cells[0]['shape']} parameters.",
            "",
            *_table(results, cells, mode, gpu),
            "",
            *_differences(cells),
        ]
    lines += ["", "## Versions", "", *_versions(results), "", "## Rule for FLOPs", "", results["flop_rule"]]
    return "\n".join(lines) + "\n"


def _machine(results: dict[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    days = sorted({run["when"][:10] for run in results["runs"]})
    where = f"{machine['gpu']} ({machine['gpu_gib']} GiB), CUDA {machine['cuda']}; " if "gpu" in machine else ""
    yield (
        f"{where}{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, "
        f"Python {machine['python']}, {machine['threads']} threads for every program. "
        f"{' – '.join(dict.fromkeys((days[0], days[-1])))}."
        if days
        else ""
    )
    for shape, rates in results.get("product_rates", {}).items():
        words = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())
        yield f"Measured rate of matrix products ({shape}'s shapes), GFLOP/s: {words}."


def _headline(results: dict[str, Any]) -> Iterator[str]:
    yield "| steady tokens/s | llmforge | fastest other | which | ratio | wall time, fastest other ÷ llmforge |"
    yield "|---|---|---|---|---|---|"
    for (mode, workload, method), cells in _groups(results):
        ours = next((cell for cell in cells if cell["program"] == OURS and "error" not in cell), None)
        others = [cell for cell in cells if cell["program"] != OURS and cell.get("tokens_per_second")]
        if ours is None or not others or not ours["tokens_per_second"]:
            continue
        best = max(others, key=lambda cell: cell["tokens_per_second"])
        soonest = min(others, key=lambda cell: cell["seconds"])
        what = METHODS[method] if mode == "tuned" else "as a user gets it"
        yield (
            f"| {workload}, {what} | {ours['tokens_per_second']:,.0f} | {best['tokens_per_second']:,.0f} | "
            f"{_title(results, best)} | {ours['tokens_per_second'] / best['tokens_per_second']:.2f} | "
            f"{soonest['seconds'] / ours['seconds']:.2f} |"
        )


def _table(results: dict[str, Any], cells: Sequence[dict[str, Any]], mode: str, gpu: bool) -> Iterator[str]:
    limit = "MFU" if gpu else "of limit"
    memory = "GPU GiB" if gpu else "peak GiB"
    yield (
        f"| program | steady tokens/s | {limit} | first step s | wall s | {memory} | filled | steps "
        "| first and last loss | tokens | trained |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    fastest = max((cell.get("tokens_per_second") or 0 for cell in cells), default=0)
    for cell in sorted(cells, key=lambda cell: -(cell.get("tokens_per_second") or 0)):
        title = _title(results, cell)
        if "error" in cell:
            yield f"| {title} | – {_escaped(cell['error'])} |" + " |" * 9
            continue
        rate = cell["tokens_per_second"]
        bold = "**" if rate and rate == fastest else ""
        sizes = cell["sizes"]
        yield (
            f"| {title} | {bold}{_number(rate, '{:,.0f}')}{bold} | {_share(results, cell)} | "
            f"{_number(cell['first_step_seconds'], '{:.1f}')} | {cell['seconds']:.1f} | "
            f"{_number(cell['device_bytes'] if gpu else cell['peak_bytes'], '{:.2f}', 2**-30)} | "
            f"{_fill(cell)} | {cell['steps']:.0f} | {_losses(cell)} | {_apart(cell['tokens'], sizes['tokens'])} | "
            f"{_apart(cell['trained'], sizes['trained'])} |"
        )


def _differences(cells: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Say in words what programs do that is not the same work."""
    for cell in cells:
        if cell.get("note"):
            yield f"* {cell['program']}: {cell['note']}."
    ends = {cell["program"]: _end(cell["losses"]) for cell in cells if "error" not in cell and cell["losses"]}
    if len(ends) > 1:
        middle = median(ends.values())
        apart = {program: end / middle - 1 for program, end in ends.items()}
        yield (
            f"* The losses of the last quarter of the steps are within {max(map(abs, apart.values())):.1%} of their "
            f"median, {middle:.3f}"
            + "".join(f"; {program} {share:+.1%}" for program, share in apart.items() if abs(share) > LOSS_APART)
            + "."
        )


def _versions(results: dict[str, Any]) -> Iterator[str]:
    for key, program in results["programs"].items():
        versions = ", ".join(f"{name} {version}" for name, version in program["versions"].items())
        yield f"* {key}: {versions or 'not installed'}"


def _groups(results: dict[str, Any]) -> Iterator[tuple[tuple[str, str, str], list[dict[str, Any]]]]:
    """Give the cells of each table, repeats combined, in the order in which they were run."""
    groups: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for run in results["runs"]:
        group = groups.setdefault((run["mode"], run["workload"], run["method"]), {})
        group.setdefault(run["program"], []).append(run)
    for key in sorted(groups, key=lambda key: key[0] != "tuned"):
        yield key, [_combined(runs) for runs in groups[key].values()]


def _combined(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Take the medians of a program's repeats; an error only if none succeeded."""
    good = [run for run in runs if "error" not in run]
    if not good:
        return runs[-1]
    cell = dict(good[0])
    for name in MEDIANS:
        values = [run[name] for run in good if run.get(name) is not None]
        cell[name] = median(values) if values else None
    cell["repeats"] = len(good)
    return cell


def _title(results: dict[str, Any], cell: Mapping[str, Any]) -> str:
    title = results["programs"][cell["program"]]["title"]
    return title.split(",")[0] if cell["mode"] == "quickstart" else title


def _limit(results: dict[str, Any], cell: Mapping[str, Any]) -> float:
    rates = results.get("product_rates", {}).get(cell["shape"], {})
    if "gpu" in results["machine"]:
        return results["machine"].get("data_sheet_rate") or max(rates.values(), default=0)
    # A quick start may compute in bf16, which has another limit.
    return max((rate for name, rate in rates.items() if cell["mode"] == "quickstart" or "fp32" in name), default=0)


def _share(results: dict[str, Any], cell: Mapping[str, Any]) -> str:
    limit, rate = _limit(results, cell), cell.get("flops_per_second")
    # In a quick start programs train different parts of the model, so that one rule would not fit all.
    return f"{rate / limit:.0%}" if limit and rate and cell["mode"] == "tuned" else "–"


def _fill(cell: Mapping[str, Any]) -> str:
    """Give the real tokens among the places that the model computed; above 100 % where a prefix is shared."""
    return f"{cell['tokens'] / cell['computed_positions']:.0%}" if cell.get("computed_positions") else "–"


def _losses(cell: Mapping[str, Any]) -> str:
    if not cell["losses"]:
        return "–"
    if len(cell["losses"]) == 1:
        return f"mean {cell['losses'][0]:.2f}"
    return f"{cell['losses'][0]:.2f} → {_end(cell['losses']):.2f}"


def _end(losses: Sequence[float]) -> float:
    return mean(losses[-max(1, len(losses) // 4) :])


def _apart(counted: float | None, expected: int) -> str:
    if not counted:
        return "not counted"
    return "same" if counted == expected else f"{counted / expected - 1:+.1%}"


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "–" if value is None else form.format(value * factor)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _plot(results: dict[str, Any], path: Path) -> None:
    """Draw steady tokens/s of every table as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(_groups(results))
    if not groups:
        return
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    tallest = max(len(cells) for _, cells in groups)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(6.5 * columns, rows * (0.8 + 0.28 * tallest)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, ((mode, workload, method), cells) in zip(axes.flat, groups, strict=False):
        cells = sorted(cells, key=lambda cell: cell.get("tokens_per_second") or 0)
        rates = [cell.get("tokens_per_second") or 0 for cell in cells]
        pairs = list(zip(cells, rates, strict=True))
        colours = ["#c0392b" if cell["program"] == OURS else "#9aa5b1" for cell in cells]
        bars = axis.barh([_title(results, cell) for cell in cells], rates, color=colours)
        texts = [f"{rate:,.0f}" if rate else "failed" if "error" in cell else "–" for cell, rate in pairs]
        axis.bar_label(bars, texts, padding=3, fontsize=8)
        axis.set_title(f"{workload}, {METHODS[method] if mode == 'tuned' else 'as a user gets it'}", fontsize=10)
        axis.set_xlim(0, max(rates, default=0) * 1.15 or 1)
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.supxlabel("real tokens per second, after the first steps", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
