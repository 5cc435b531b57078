"""The comparison: a table, the curves and a sample of each model, for people and as JSON."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from lab.checkpoint import write_file
from lab.provenance import command
from lab.training import describe_time

# dark blue and orange: told apart by the colour-blind, and in grey by lightness, dashes and markers
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#E69F00", "linestyle": "--", "marker": "s"},
)
Result = dict[str, Any]  # of one model, as JSON values


@dataclass(frozen=True)
class Layout:
    """Say what the report of a task shows.

    Attributes:
        unit: of what is read in training, in the plural: "tokens".
        measure: what a loss is shown as: "perplexity" or "loss".
        convert: makes it of a loss.
        columns: of the table, between the parameters and the speed: header -> text for the result of a model.
        facts: paragraphs below the table.
        sections: lines at the end of the report, from the results; files beside it go into the folder.
        best_possible: column -> value, where it is known.
    """

    unit: str
    measure: str
    convert: Callable[[float], float]
    columns: dict[str, Callable[[Result], str]]
    facts: list[str]
    sections: Callable[[list[Result], Path], list[str]]
    best_possible: dict[str, float] = field(default_factory=dict)


def styles(names: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return how the lines of each model are drawn."""
    return dict(zip(names, itertools.cycle(STYLES), strict=False))


def write_report(
    folder: Path,
    record: dict[str, Any],
    layout: Layout,
    names: dict[str, str],
    results: list[Result],
    logs: dict[str, list[dict[str, float]]],
    interrupted: bool,
    origin: dict[str, Any],
) -> str:
    """Write results.json, curves.png and report.md into the folder of the run.

    Args:
        folder: of the run.
        record: the content of its config.json.
        layout: of the task.
        names: of the models: what they are called in results -> in the report.
        results: what came out of each model.
        logs: the lines of metrics.jsonl of each.
        interrupted: whether the run was stopped before its end.
        origin: the `provenance` of the run, from its start.

    Returns:
        the table for a terminal.
    """
    rows = comparison(results, layout, names)
    on_gpu = origin["machine"]["device"] == "cuda"
    content = origin | {
        "interrupted": interrupted,
        "wall_seconds": sum(result["wall_seconds"] for result in results),
        "config": record["config"],
        "corpus": record["corpus"],
        "best_possible": layout.best_possible,
        "peak_memory": "allocated on the GPU" if on_gpu else "of the whole process, data included",
        "models": [result | {"epochs": epoch_curve(logs[result["model"]], layout)} for result in results],
    }
    write_file(folder / "results.json", json.dumps(_finite(content), indent=1) + "\n")
    write_file(folder / "curves.png", draw_curves(logs, layout, names))
    title = " and ".join(names[result["model"]] for result in results)
    sections = layout.sections(results, folder)
    write_file(folder / "report.md", markdown(title, content, markdown_table(rows), layout, sections))
    return terminal_table(rows)


def _finite(content: Any) -> Any:
    """Return the content with null where a number is not finite: JSON has no infinity."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def epoch_curve(log: list[dict[str, float]], layout: Layout) -> list[dict[str, float]]:
    return [
        {
            "epoch": line["epoch"],
            f"train_{layout.measure}": layout.convert(line["train_loss"]),
            f"valid_{layout.measure}": layout.convert(line["valid_loss"]),
            "seconds": line["seconds"],
        }
        for line in log
        if "valid_loss" in line
    ]


def comparison(results: list[Result], layout: Layout, names: dict[str, str]) -> list[list[str]]:
    """Return the table, row by row: a header, a row for each model, and the best possible where it is known."""
    columns: dict[str, Callable[[Result], str]] = {
        "model": lambda result: model_cell(result, names),
        "units": lambda result: f"{result['hidden']:,}",
        "recurrent parameters": lambda result: f"{result['recurrent_parameters']:,}",
        "parameters": lambda result: f"{result['parameters']:,}",
        "best epoch": lambda result: f"{result['best_epoch']:.3g}",
        **layout.columns,
        f"{layout.unit}/s": lambda result: f"{result['tokens_per_second']:,.0f}",
        "wall time": lambda result: describe_time(result["wall_seconds"]),
        "peak memory": lambda result: f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB",
    }
    rows = [list(columns), *([cell(result) for cell in columns.values()] for result in results)]
    if layout.best_possible:
        known = {"model": "best possible"} | {name: f"{value:.2f}" for name, value in layout.best_possible.items()}
        rows.append([known.get(column, "") for column in columns])
    return rows


def model_cell(result: Result, names: dict[str, str]) -> str:
    epoch = result["interrupted_at_epoch"]
    return names[result["model"]] + ("" if epoch is None else f" (stopped at epoch {epoch:.2f})")


def markdown_table(rows: list[list[str]]) -> str:
    """Return the table in Markdown, its columns lined up."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def terminal_table(rows: list[list[str]]) -> str:
    """Return the table with a column for each model, so that it fits into 80 characters."""
    columns = list(zip(*rows, strict=True))
    widths = [max(len(column[i]) for column in columns) for i in range(len(rows))]
    return "\n".join("  ".join(map(str.ljust, column, widths)).rstrip() for column in columns)


def markdown(title: str, content: dict[str, Any], table: str, layout: Layout, sections: list[str]) -> str:
    """Return the text of report.md."""
    corpus, machine = content["corpus"], content["machine"]
    lines = [f"# {title} on {corpus['name']}", ""]
    if content["interrupted"]:
        lines += ["**Interrupted**: go on with `--resume`. The test split is read when a model is finished.", ""]
    lines += [table, ""]
    for paragraph in layout.facts:
        lines += [paragraph, ""]
    lines += [
        f"{layout.unit.capitalize()}/s counts training steps alone, wall time evaluations and checkpoints too. Peak "
        f"memory: {content['peak_memory']}. Seed {content['seed']}.",
        "",
        "![curves](curves.png)",
        *sections,
    ]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    starts = [*content["earlier_starts"], content]
    commits = ", ".join(f"{start['commit']}{' with changes' if start['dirty'] else ''}" for start in starts)
    lines += [
        "",
        "## Where it comes from",
        "",
        f"- `{command(folders=True)}`",
        f"- commit {commits}",
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpu}; {versions}",
        f"- corpus: {corpus['source']}",
    ]
    return "\n".join(lines) + "\n"


def fenced(lines: list[str]) -> list[str]:
    """Return lines of text as a block in Markdown, its fence longer than any row of backticks in it."""
    fence = "`" * max(3, 1 + max((len(row) for line in lines for row in re.findall("`+", line)), default=0))
    return [f"{fence}text", *lines, fence]


def draw_curves(logs: dict[str, list[dict[str, float]]], layout: Layout, names: dict[str, str]) -> bytes:
    """Draw the validation loss against epochs and seconds, learning rate and gradient norm against steps, as a PNG."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    validation = f"validation {layout.measure}"
    panels: tuple[tuple[Axes, str, str, str, str], ...] = (
        (axes[0, 0], "epoch", "epochs", "valid_loss", validation),
        (axes[0, 1], "seconds", "seconds of training", "valid_loss", validation),
        (axes[1, 0], "step", "steps", "learning_rate", "learning rate"),
        (axes[1, 1], "step", "steps", "gradient_norm", "L2 norm of the gradient"),
    )
    drawn = styles(names)
    for axis, x, x_label, y, y_label in panels:
        for name, log in logs.items():
            lines = [line for line in log if y in line]
            values = [layout.convert(line[y]) if y == "valid_loss" else line[y] for line in lines]
            style = drawn[name] if y == "valid_loss" else drawn[name] | {"marker": "", "linewidth": 1}
            axis.plot([line[x] for line in lines], values, label=names[name], **style)
        if y == "valid_loss" and validation in layout.best_possible:
            axis.axhline(layout.best_possible[validation], color="black", linestyle=":", label="best possible")
        if y != "learning_rate":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.grid(which="both", alpha=0.3)
        axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
