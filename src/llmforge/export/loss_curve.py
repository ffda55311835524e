"""Draws the losses of a run as a picture for its model card. Knows numbers and a file name, nothing of runs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_TRAIN, _SMOOTH, _EVALUATION = "#9fbad0", "#1f5c8b", "#c8501e"
_MOST_LABELS = 8  # evaluations that fit beside each other with their values


def plot_losses(
    train: Sequence[tuple[int, float]], evaluation: Sequence[tuple[int, float]], path: Path, title: str
) -> None:
    """Write a PNG of 1000 × 600 pixels with loss over optimizer steps.

    Both sequences hold (step, loss) and may be empty; losses that are not finite are left out.
    """
    # Figure and Agg directly: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = _finite(train)
    if len(steps) == 1:
        axes.plot(steps, losses, "o", color=_SMOOTH, label="training")
    elif len(steps):
        axes.plot(steps, losses, color=_TRAIN, linewidth=0.8, label="training")
        axes.plot(steps, smooth(losses), color=_SMOOTH, linewidth=2, label="training, smoothed")

    eval_steps, eval_losses = _finite(evaluation)
    if len(eval_steps):
        best = int(np.argmin(eval_losses))
        axes.plot(eval_steps, eval_losses, "o-", color=_EVALUATION, linewidth=1.2, markersize=5, label="evaluation")
        axes.plot(
            eval_steps[best],
            eval_losses[best],
            "*",
            color=_EVALUATION,
            markersize=17,
            markeredgecolor="white",
            label=f"best: {eval_losses[best]:.4f} at step {eval_steps[best]:,}",
        )
        for index in range(len(eval_steps)) if len(eval_steps) <= _MOST_LABELS else {0, best}:
            axes.annotate(
                f"{eval_losses[index]:.3f}",
                (eval_steps[index], eval_losses[index]),
                xytext=(0, 10),
                textcoords="offset points",
                ha="center",
                color=_EVALUATION,
                fontsize=9,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )

    axes.set_title(title, fontsize=13, loc="left", parse_math=False)
    axes.set_xlabel("optimizer step", fontsize=11)
    axes.set_ylabel("loss", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.03, y=0.1)
    if len({*steps, *eval_steps}) == 1:
        axes.set_xlim([*steps, *eval_steps][0] - 1, [*steps, *eval_steps][0] + 1)
    if axes.lines:
        axes.legend(frameon=False, fontsize=10)
    figure.savefig(path, format="png", metadata={"Software": None})


def smooth(losses: np.ndarray) -> np.ndarray:
    """Average exponentially over about a thirtieth of the run, unbiased at its start. Shape (steps,) to (steps,)."""
    keep = 1 - 1 / max(2.0, len(losses) / 30)
    smoothed = np.empty(len(losses))
    total = weight = 0.0
    for index, value in enumerate(losses):
        total = keep * total + value
        weight = keep * weight + 1
        smoothed[index] = total / weight
    return smoothed


def _finite(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    kept = [(step, loss) for step, loss in points if loss is not None and np.isfinite(loss)]
    return np.array([step for step, _ in kept], dtype=np.int64), np.array([loss for _, loss in kept], dtype=np.float64)
