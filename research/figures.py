"""Draw the figures of the pages, docs/images/*.png, from research/results/*.json, to be read on a phone as well."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from pandas import DataFrame

from benchmarks.record import Benchmark, NotMeasured
from benchmarks.tables import growth, paper_speed, ratios
from examples.translation.attention import draw_attention
from lab.report import styles
from research.record import RESULTS, finished_runs, load
from research.studies import NAMES
from research.tables import by_words, spans

STYLES = styles(NAMES)
WIDTH = 4.6  # inches: at 390 pixels a letter of 10 points is 12 pixels high
DPI = 200
WAYS = {  # of pooling: the name in the benchmark -> label, style
    "auto": ("this project's default", {"color": STYLES["qrnn"]["color"], "marker": "o"}),
    "Python loop, unbind, autograd": ("Python loop", {"color": "black", "marker": "D", "linestyle": ":"}),
    "closed form, autograd": ("closed form, left to autograd", {"color": "#009E73", "marker": "v", "linestyle": "-."}),
    "mamba.py pscan": ("mamba.py", {"color": "#CC79A7", "marker": "^", "linestyle": "--"}),
}


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def log_axis(axis: Axes, which: str, subs: tuple[float, ...]) -> None:
    """Make an axis logarithmic, with plain numbers at these multiples of powers of ten."""
    axis.set(**{f"{which}scale": "log"})
    ticks = getattr(axis, f"{which}axis")
    ticks.set_major_locator(LogLocator(subs=subs))
    ticks.set_major_formatter("{x:,g}")
    ticks.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)


# --- the studies -----------------------------------------------------------------------------------------------------


def draw_epochs(axis: Axes, runs: DataFrame) -> None:
    """Draw validation perplexity against epochs, a line for each run."""
    for (_, run), label in zip(runs.iterrows(), named_once(runs), strict=True):
        epochs, scores = zip(*((line["epoch"], line["valid_perplexity"]) for line in run["curve"]), strict=True)
        axis.plot(epochs, scores, label=label, **STYLES[run["model"]])
    axis.set(xlabel="epochs", ylabel="validation perplexity")
    locator = axis.xaxis.get_major_locator()
    assert isinstance(locator, MaxNLocator)  # that of an axis without logarithms
    locator.set_params(integer=True)
    log_axis(axis, "y", (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
    axis.legend(frameon=False)


def named_once(runs: DataFrame) -> list[str | None]:
    """Return what the legend calls the model of each run, None where it is named already."""
    return [
        None if again else NAMES[name] for name, again in zip(runs["model"], runs["model"].duplicated(), strict=True)
    ]


def draw_seeds(runs: DataFrame, path: Path) -> None:
    """Draw the epochs, and beside them the last one alone, where the lines lie on each other."""
    figure, (axis, last) = plt.subplots(1, 2, figsize=(WIDTH, 3.2), width_ratios=(2, 1), layout="constrained")
    draw_epochs(axis, runs)
    for name, mine in runs.groupby("model", sort=False):
        final = mine["curve"].map(lambda lines: lines[-1]["valid_perplexity"])
        last.plot([NAMES[name]] * len(final), final, **STYLES[name] | {"linestyle": ""}, alpha=0.7)
    last.set_title("last epoch", fontsize=10)
    last.margins(x=0.5)
    last.grid(alpha=0.25)
    save(figure, path)


def draw_carried_over(runs: DataFrame, path: Path) -> None:
    """Draw validation perplexity against that of the training text, a line for each run, a point for each epoch."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    for (_, run), label in zip(runs.iterrows(), named_once(runs), strict=True):
        pairs = ((line["train_perplexity"], line["valid_perplexity"]) for line in run["curve"])
        axis.plot(*zip(*pairs, strict=True), label=label, **STYLES[run["model"]] | {"markersize": 4})
    axis.set(xlabel="perplexity of the training text, with dropout", ylabel="validation perplexity")
    log_axis(axis, "x", (1, 1.5, 2, 3, 5, 7))
    log_axis(axis, "y", (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
    axis.invert_xaxis()
    axis.legend(frameon=False)
    save(figure, path)


def draw_ablation(runs: DataFrame, path: Path) -> None:
    """Draw a point for each run, the best at the top; the line is at the run that the others change."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.2 * len(runs) + 0.9), layout="constrained")
    axis.axvline(runs["valid_perplexity"].iloc[0], color="0.6", linewidth=1, zorder=0)
    reference = runs.index[0]
    runs = runs.sort_values("valid_perplexity")
    for row, (run, label) in enumerate(zip(runs.to_dict("records"), named_once(runs), strict=True)):
        axis.plot(run["valid_perplexity"], row, **STYLES[run["model"]] | {"linestyle": ""}, label=label)
    log_axis(axis, "x", (1, 1.2, 1.5, 2, 2.5, 5))
    axis.set(xlabel=f"validation perplexity after an epoch\n(line: {reference})")
    axis.xaxis.label.set_horizontalalignment("right")
    axis.xaxis.label.set_x(1)
    axis.set_yticks(range(len(runs)), runs.index, fontsize=8)
    axis.invert_yaxis()
    axis.legend(frameon=False)
    save(figure, path)


def draw_context(content: dict[str, Any], path: Path) -> None:
    """Draw the ratio of the perplexities against the number of words known, with its interval over the seeds."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    axis.axhline(0, color="0.6", linewidth=1, zorder=0)
    pairs = [*by_words(content).values()][: len(content["known"])]  # without the training text
    low, high = ([percent((pair.interval or (pair.gap,) * 2)[side]) for pair in pairs] for side in (0, 1))
    axis.fill_between(range(len(pairs)), low, high, color="0.8", label="95 % interval, over the seeds")
    axis.plot([percent(pair.gap) for pair in pairs], color="black", marker="o")
    axis.set(xlabel="words known before the one to predict", ylabel="perplexity of the QRNN\nover the LSTM's, %")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axis.set_xticks(range(len(pairs)), spans(content["known"]), rotation=45, fontsize=9)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    save(figure, path)


def percent(log_ratio: float) -> float:
    return 100 * math.expm1(log_ratio)


def draw_translation(runs: DataFrame, path: Path) -> None:
    """Draw where the QRNN looks while it translates; nothing if it has not been run."""
    for _, run in runs.query("model == 'qrnn'").head(1).iterrows():
        path.write_bytes(draw_attention(run["attention"], run["reverse"]))


# --- the benchmark ---------------------------------------------------------------------------------------------------


def draw_speed(benchmark: Benchmark, path: Path) -> None:
    """Draw how many times as fast as nn.LSTM the layer is at each width, a line for each batch size and length."""
    rows = benchmark.measured("layer")
    table = ratios(rows[rows["threads"] == rows["threads"].min()], "LSTM", "QRNN").droplevel("threads")
    parts = table.index.get_level_values("part").unique()
    figure, axes = plt.subplots(len(parts), 1, figsize=(WIDTH, 6.6), sharex=True, sharey=True, layout="constrained")
    for axis, part in zip(axes, parts, strict=True):
        axis.axhline(1, color="grey")
        for (cell, values), marker in zip(table.loc[part].items(), "osD^v", strict=False):
            axis.plot(values.index, values, marker=marker, label="{} x {}".format(*cell))
        axis.set(ylabel="times as fast as nn.LSTM", ylim=(0, 1.05 * table.max().max()))
        axis.set_title(part, fontsize=11)
        axis.grid(alpha=0.25)
    axes[-1].set(xlabel="units", xticks=table.loc[parts[0]].index)
    axes[-1].legend(title="batch x T", ncols=2, fontsize=9, loc="lower right")
    cores = "" if benchmark.origin["machine"]["gpu"] else ", one core"
    figure.suptitle(device_name(benchmark).partition(",")[0] + cores, fontsize=11)
    save(figure, path)


def draw_paper(benchmark: Benchmark, path: Path) -> None:
    """Draw the grid of the paper's Fig. 4 as heat maps, one above the other."""
    grids = paper_speed(benchmark)
    figure, axes = plt.subplots(
        len(grids), 1, figsize=(WIDTH, 2.9 * len(grids) + 0.5), sharex=True, layout="constrained"
    )
    for axis, (title, grid) in zip(axes, grids.items(), strict=True):
        image = axis.imshow(grid, cmap="PuOr", norm=LogNorm(1 / 16, 16), aspect="auto")  # white: as fast as the LSTM
        for y, row in enumerate(grid.to_numpy()):
            for x, ratio in enumerate(row):
                axis.text(x, y, f"{ratio:.1f}", ha="center", va="center", color="white" if ratio > 6 else "black")
        axis.set_title(title, fontsize=11)
        axis.set(ylabel="batch size", yticks=range(len(grid)), yticklabels=grid.index)
    axes[-1].set(xlabel="T, time steps", xticks=range(grid.shape[1]), xticklabels=grid.columns)
    bar = figure.colorbar(image, ax=axes, label="times as fast as the LSTM", ticks=[1 / 16, 1 / 4, 1, 4, 16])
    bar.ax.set_yticklabels(["1/16", "1/4", "1", "4", "16"])
    figure.suptitle(device_name(benchmark), fontsize=11)
    save(figure, path)


def device_name(benchmark: Benchmark) -> str:
    machine = benchmark.origin["machine"]
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} cores"


def draw_scaling(benchmark: Benchmark, path: Path) -> None:
    """Draw time a token against T, of four ways to pool and of a layer, and the memory of a layer."""
    pooling = benchmark.pooling_growth().assign(ns=lambda rows: rows["ms"] * 1e6 / (rows["B"] * rows["T"]))
    layers = growth(benchmark)["T"]
    models = {NAMES[name]: (NAMES[name], STYLES[name]) for name in NAMES}
    longest = pooling["T"].max()
    panels = (
        ("pooling, forward and backward", pooling, WAYS, "ns", "time a token, ns"),
        ("a layer in training", layers, models, "ns", "time a token, ns"),
        ("a layer in training", layers, models, "bytes", "memory a token, bytes"),
    )
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 9), layout="constrained")
    for axis, (title, rows, lines, value, label) in zip(axes, panels, strict=True):
        for name, (text, style) in lines.items():
            mine = rows[rows["what"] == name].dropna(subset=value)
            if len(mine):
                axis.plot(mine["T"], mine[value], **style)
                place = {"xytext": (0, 7), "ha": "left"}  # above the beginning,
                if lines is WAYS:  # where these lie on each other
                    place = {"xytext": (0, 7), "ha": "right"} if mine["T"].max() == longest else {"xytext": (7, -15)}
                point = mine.iloc[-1 if lines is WAYS else 0]
                axis.annotate(text, (point["T"], point[value]), textcoords="offset points", **place)
        log_axis(axis, "y", (1, 2, 5))
        axis.set(xscale="log", xlabel="T, time steps; B x T constant", ylabel=label)
        axis.margins(y=0.15)
        axis.set_title(f"{title}, {rows['H'].iloc[0]} units", fontsize=11)
    figure.suptitle(device_name(benchmark), fontsize=11)
    save(figure, path)


# --- all of them -----------------------------------------------------------------------------------------------------

STUDIES: dict[str, Callable[[DataFrame, Path], None]] = {
    "seeds": draw_seeds,
    "ablation": draw_ablation,
    "ptb_tuned": draw_carried_over,
    "translation": draw_translation,
}
BENCHMARK: dict[str, Callable[[Benchmark, Path], None]] = {
    "speed": draw_speed,
    "paper": draw_paper,
    "scaling": draw_scaling,
}


def draw_all(folder: Path) -> None:
    """Draw into a folder whatever was measured."""
    for name, draw in STUDIES.items():
        if len(runs := finished_runs(name)):
            draw(runs, folder / f"{name}.png")
    if (RESULTS / "context.json").exists():
        draw_context(load("context.json"), folder / "context.png")
    for device, suffix in (("cpu", ""), ("cuda", "-cuda")):
        for name, draw in BENCHMARK.items():
            try:
                draw(Benchmark(device), folder / f"{name}{suffix}.png")
            except NotMeasured:
                continue
