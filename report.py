"""The comparison: a table, the curves and a sample of each model, for people and as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from checkpoint import write_file
from machine import provenance
from presets import Config
from training import perplexity

NAMES = {"qrnn": "QRNN", "lstm": "LSTM"}
# dark blue and orange: told apart by the colour-blind, and in grey by lightness, dashes and markers
STYLES: dict[str, dict[str, Any]] = {
    "qrnn": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "lstm": {"color": "#E69F00", "linestyle": "--", "marker": "s"},
}
COLUMNS = (
    "model",
    "units",
    "recurrent parameters",
    "parameters",
    "best epoch",
    "validation perplexity",
    "test perplexity",
    "tokens/s",
    "wall time",
    "peak memory",
)


def write_report(
    folder: Path,
    config: Config,
    corpus: dict[str, Any],
    floor: dict[str, float],
    results: list[dict[str, Any]],
    interrupted: bool,
    device: str,
) -> str:
    """Write results.json, curves.png and report.md into the folder of the run.

    Args:
        corpus: what is known about it, as JSON values.
        floor: the best possible perplexity of each split, where it is known.
        results: what came out of each model.
        interrupted: whether the run was stopped before its end.
        device: on which the models were trained.

    Returns:
        the table, in Markdown.
    """
    logs = {result["model"]: read_log(folder / result["model"] / "metrics.jsonl") for result in results}
    table = comparison_table(results, floor)
    content = provenance(seed=config.seed, device=device) | {
        "interrupted": interrupted,
        "wall_seconds": sum(result["wall_seconds"] for result in results),
        "config": {name: value for name, value in asdict(config).items() if name not in ("data", "resume", "generate")},
        "corpus": corpus,
        "floor": floor,
        "peak_memory": "allocated on the GPU" if device == "cuda" else "of the whole process, data included",
        "models": [result | {"epochs": epoch_curve(logs[result["model"]])} for result in results],
    }
    write_file(folder / "results.json", json.dumps(content, indent=1) + "\n")
    write_file(folder / "curves.png", draw_curves(logs, floor))
    write_file(folder / "report.md", markdown(content, table))
    return table


def read_log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def epoch_curve(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {
            "epoch": line["epoch"],
            "train_perplexity": perplexity(line["train_loss"]),
            "valid_perplexity": perplexity(line["valid_loss"]),
            "seconds": line["seconds"],
        }
        for line in log
        if "valid_loss" in line
    ]


def comparison_table(results: list[dict[str, Any]], floor: dict[str, float]) -> str:
    """The table in Markdown, its columns lined up so that it reads well in a terminal too."""
    rows = [list(COLUMNS), *(table_row(result) for result in results)]
    if floor:
        known = {"model": "best possible", "validation perplexity": floor["valid"], "test perplexity": floor["test"]}
        cells = [known.get(column, "") for column in COLUMNS]
        rows.append([cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = []
    for row in rows:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join([first, *others])} |")
    return "\n".join(lines)


def table_row(result: dict[str, Any]) -> list[str]:
    stopped = (
        "" if result["interrupted_at_epoch"] is None else f" (stopped at epoch {result['interrupted_at_epoch']:.2f})"
    )
    test = result["test_perplexity"]
    return [
        NAMES[result["model"]] + stopped,
        f"{result['hidden']:,}",
        f"{result['recurrent_parameters']:,}",
        f"{result['parameters']:,}",
        f"{result['best_epoch']:.3g}",
        f"{result['valid_perplexity']:.2f}",
        "not read" if test is None else f"{test:.2f}",
        f"{result['tokens_per_second']:,.0f}",
        describe_time(result["wall_seconds"]),
        f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB",
    ]


def describe_time(seconds: float) -> str:
    """For example "45 s", "12 min" or "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def markdown(content: dict[str, Any], table: str) -> str:
    """report.md."""
    corpus, config, machine = content["corpus"], content["config"], content["machine"]
    lines = [f"# {' and '.join(NAMES[result['model']] for result in content['models'])} on {corpus['name']}", ""]
    if content["interrupted"]:
        lines += ["**Interrupted**: go on with `--resume`. The test split is read when a model is finished.", ""]
    lines += [
        table,
        "",
        f"Perplexity is exp(sum of the negative log-likelihoods / number of words) over the whole split. Test is read "
        "once, at the epoch that was best on validation. Tokens/s counts training steps alone, wall time evaluations "
        f"and checkpoints too. Peak memory: {content['peak_memory']}.",
        "",
        f"Protocol `{config['protocol']}`, {corpus['vocabulary']:,} words, {corpus['train_tokens']:,} training tokens, "
        f"{100 * corpus['padding']:.1f} % padding, seed {content['seed']}.",
        "",
        "![curves](curves.png)",
    ]
    if len(content["models"]) > 1:
        lines += ["", "The samples below come from the same random draws."]
    for result in content["models"]:
        lines += ["", f"## A sample of the {NAMES[result['model']]}", "", "```text", result["sample"], "```"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    commit = f"{content['commit']}{' with changes' if content['dirty'] else ''}"
    lines += [
        "",
        "## Where it comes from",
        "",
        f"- `{content['command']}`",
        f"- commit {commit}",
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpu}; {versions}",
        f"- corpus: {corpus['source']}",
    ]
    return "\n".join(lines) + "\n"


def draw_curves(logs: dict[str, list[dict[str, float]]], floor: dict[str, float]) -> bytes:
    """A PNG: validation perplexity against epochs and seconds, learning rate and gradient norm against steps."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    panels: tuple[tuple[Axes, str, str, str, str], ...] = (
        (axes[0, 0], "epoch", "epochs", "valid_loss", "validation perplexity"),
        (axes[0, 1], "seconds", "seconds of training", "valid_loss", "validation perplexity"),
        (axes[1, 0], "step", "steps", "learning_rate", "learning rate"),
        (axes[1, 1], "step", "steps", "gradient_norm", "L2 norm of the gradient"),
    )
    for axis, x, x_label, y, y_label in panels:
        for name, log in logs.items():
            lines = [line for line in log if y in line]
            values = [perplexity(line[y]) if y == "valid_loss" else line[y] for line in lines]
            style = STYLES[name] if y == "valid_loss" else STYLES[name] | {"marker": "", "linewidth": 1}
            axis.plot([line[x] for line in lines], values, label=NAMES[name], **style)
        if y == "valid_loss" and floor:
            axis.axhline(floor["valid"], color="black", linestyle=":", label="best possible")
        if y != "learning_rate":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.grid(which="both", alpha=0.3)
        axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
