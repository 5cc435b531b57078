"""Make the tables of benchmarks/README.md from research/results/benchmark-DEVICE.json.

Each raises NotMeasured if the file does not have its rows; `block` turns that into a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pandas as pd
from pandas import DataFrame, Series

from benchmarks.record import INFERENCE, STACK, STACKED, STEP, Benchmark, NotMeasured, span, wide

PRECISION_METHODS = ("closed form, autograd", "log", "blocked", "scan", "loop")
POOLING_SHAPE, REFERENCE_LENGTH, LONG = (32, 128, 640), 512, 16_384
PAPER_LENGTHS = (32, 64, 128, 256, 512)
PAPER = {  # batch size -> times as fast as cuDNN's LSTM at each length, inference: Fig. 4, right
    8: (5.5, 8.8, 11.0, 12.4, 16.9),
    16: (5.5, 6.7, 7.8, 8.3, 10.8),
    32: (4.2, 4.5, 4.9, 4.9, 6.4),
    64: (3.0, 3.0, 3.0, 3.0, 3.7),
    128: (2.1, 1.9, 2.0, 2.0, 2.4),
    256: (1.4, 1.4, 1.3, 1.3, 1.3),
}
LIMITS = {"copy": ("gb_per_s", "GB/s"), "matrix product": ("gflop_per_s", "GFLOP/s")}  # of the machine
COMMAND = "python -m benchmarks"
INTEL = "cpu-intel"  # on record from an older commit, of another machine than "cpu"


# --- exactness -------------------------------------------------------------------------------------------------------


def precision(benchmark: Benchmark) -> str:
    """Return the errors at the worst gate bias of each length, of h / of the gradient of log f, as a table."""
    worst = benchmark.measured("precision").groupby(["method", "T"])[["forward", "gradient"]].max()
    cells = worst.map("{:.0e}".format).agg(" / ".join, axis=1).unstack("T").loc[list(PRECISION_METHODS)]
    return f"{wide(cells, 'method', 'T = {:,}'.format)}\n\n{benchmark.source()}"


def readme_exactness(benchmark: Benchmark) -> str:
    """Return the largest errors of three ways to pool at the greatest length, as a table."""
    rows = benchmark.measured("precision")
    longest = rows[rows["T"] == rows["T"].max()]
    worst = longest.groupby("method")[["forward", "gradient"]].max().loc[["closed form, autograd", "blocked", "scan"]]
    worst.index = ["the closed form, left to autograd", '`method="blocked"`', '`method="scan"`']
    worst.columns = ["output h", "gradient of log f"]
    return wide(worst.map("{:.0e}".format), f"largest relative error, float32, T = {rows['T'].max():,}")


# --- pooling ---------------------------------------------------------------------------------------------------------


def pooling_speed(benchmark: Benchmark) -> str:
    """Return the time of every way to pool over that of "auto", and its memory, at `POOLING_SHAPE`, as a table."""
    rows = benchmark.measured("pooling", dtype="float32", **dict(zip("BTH", POOLING_SHAPE, strict=True)))
    names, parts = rows["what"].unique(), list(rows["part"].unique())
    times, memory = (rows.pivot(index="what", columns="part", values=value)[parts] for value in ("ms", "mib"))
    ratios = (times / times.loc["auto"]).loc[names].map("{:.1f}".format)
    peaks = memory.loc[names].map("{:,.0f}".format, na_action="ignore").dropna(axis="columns", how="all")
    header = "{} x {} x {}, times over that of `auto`".format(*POOLING_SHAPE)
    shown = wide(ratios.join(peaks.add_suffix(", MiB")), header)
    reference = " and ".join(f"{times.loc['auto', part]:.3g} ms {part}" for part in parts)
    return f"{shown}\n\n`auto` takes {reference}. {not_measured(benchmark)}".strip()


def not_measured(benchmark: Benchmark) -> str:
    """Say which ways to pool were skipped, and why."""
    rows = benchmark.rows("pooling").reindex(columns=["skipped", "what"]).dropna()
    reasons = rows.groupby("skipped", sort=False)["what"].unique()
    return " ".join(f"Not measured, {reason}: {'; '.join(names)}." for reason, names in reasons.items())


def pooling_growth(benchmark: Benchmark) -> str:
    """Return the time of every way to pool over that of "auto" at each T, forward and backward, as a table."""
    rows = benchmark.pooling_growth()
    times = rows.pivot(index="what", columns="T", values="ms").loc[rows["what"].unique()]
    first = rows.iloc[0]
    header = f"B x T = {first['B'] * first['T']:,}, {first['H']} channels"
    return wide((times / times.loc["auto"]).map("{:.1f}".format, na_action="ignore"), header, "T = {:,}".format)


# --- layers ----------------------------------------------------------------------------------------------------------


def ratios(rows: DataFrame, above: str, below: str, value: str = "ms") -> DataFrame:
    """Return value of `above` / value of `below`: a row for each part, width and threads, a column for each B and T."""
    order = rows["part"].unique()
    table = rows.pivot(index=["part", "H", "threads"], columns=["B", "T", "what"], values=value)
    of = {name: table.xs(name, level="what", axis="columns") for name in (above, below)}
    return (of[above] / of[below]).reindex(order, level="part")


def row_names(table: DataFrame, benchmark: Benchmark) -> list[str]:
    """Name rows by width and threads; a GPU has no number of threads."""
    names = []
    for width, threads in zip(*(table.index.get_level_values(level) for level in ("H", "threads")), strict=True):
        cores = "" if benchmark.origin["machine"]["gpu"] else f", {threads} core{'s' if threads > 1 else ''}"
        names.append(f"{width} units{cores}")
    return names


def over_lstm(rows: DataFrame, layers: tuple[str, ...], benchmark: Benchmark, corner: str) -> str:
    """Return how many times as fast as nn.LSTM these layers are, side by side in each cell of a table."""
    tables = [ratios(rows, "LSTM", name).droplevel("part").map("{:.2f}".format) for name in layers]
    cells = pd.concat(tables, keys=range(len(tables))).groupby(level=["H", "threads"]).agg(" / ".join)
    cells.index, cells.columns = row_names(cells, benchmark), cells.columns.map("{0[0]} x {0[1]}".format)
    return wide(cells, corner)


def layer_speed(part: str, benchmark: Benchmark) -> str:
    """Return how many times as fast as nn.LSTM the layer is with k = 2 / with k = 1, as a table."""
    rows = benchmark.measured("layer", part=part)
    return over_lstm(rows, ("QRNN", "QRNN, k = 1"), benchmark, f"{part}: batch x T, k = 2 / k = 1")


def step_speed(benchmark: Benchmark) -> str:
    """Return how many times as fast as nn.LSTM the layer is step by step, alone and in a stack, as a table."""
    layers = ("QRNN", "QRNN, k = 1", STACK)
    return over_lstm(benchmark.measured("step"), layers, benchmark, "batch x T, k = 2 / k = 1 / k = 2 in a stack")


def layer_worst(benchmark: Benchmark) -> str:
    """Say where the layer is slowest beside nn.LSTM."""
    sentences = []
    for kind, layer, where in (("layer", "QRNN", ""), ("step", "QRNN", ""), ("step", STACK, ", in a stack")):
        for part, rows in benchmark.measured(kind).groupby("part", sort=False):
            table = ratios(rows, "LSTM", layer).droplevel("part")
            place, least = table.stack(["B", "T"], future_stack=True).agg(["idxmin", "min"])
            (name,) = row_names(table.loc[[place[:2]]], benchmark)
            slower = (table < 1).to_numpy().sum()
            sentences.append(
                f"{part.capitalize()}{where}: `nn.LSTM` is faster in {slower} of {table.size} cells; the smallest "
                f"ratio is {least:.2f}, at {name}, {place[2]} x {place[3]}."
            )
    return " ".join(sentences)


def layer_memory(benchmark: Benchmark) -> str:
    """Return the peak of memory over that of nn.LSTM, as a table."""
    rows = benchmark.measured("layer").dropna(subset="mib")
    table = ratios(rows, "QRNN", "LSTM", value="mib").map("{:.2f}".format)
    table.index = [f"{part}, {width} units" for part, width, _ in table.index]
    table.columns = table.columns.map("{0[0]} x {0[1]}".format)
    return wide(table, "batch x T, memory over that of `nn.LSTM`")


def layer_kept(benchmark: Benchmark) -> str:
    """Return the ratios over nn.LSTM as memory is handed out by default, and with freed memory kept, as a table."""
    kept, handed_out = benchmark.measured("layer_kept"), benchmark.measured("layer")
    tables = {
        "the system's default": ratios(handed_out, "LSTM", "QRNN"),
        "freed memory kept": ratios(kept, "LSTM", "QRNN"),
    }
    (cell,) = tables["freed memory kept"].columns
    lines = DataFrame({name: table[cell].map("{:.2f}".format) for name, table in tables.items()})
    lines = lines.loc[tables["freed memory kept"].index]
    names = row_names(lines, benchmark)
    lines.index = [f"{part}, {name}" for part, name in zip(lines.index.get_level_values("part"), names, strict=True)]
    return wide(lines, "{} x {}, times as fast as `nn.LSTM`".format(*cell))


def gru_speed(part: str, benchmark: Benchmark) -> str:
    """Return how many times as fast as nn.GRU the layer is, for a sentence."""
    return span(ratios(benchmark.measured("layer", part=part), "GRU", "QRNN").stack(["B", "T"], future_stack=True))


def readme_speed(benchmarks: dict[str, Benchmark]) -> str:
    """Return the range of the ratios over nn.LSTM for each part, CPU and width, as a table; step by step of a stack."""
    lines: dict[tuple[str, str], Series] = {}
    for cpu, benchmark in benchmarks.items():
        compared = (("layer", "QRNN"), ("step", STACK))
        tables = [ratios(benchmark.measured(name), "LSTM", layer) for name, layer in compared]
        cells = pd.concat(table.stack(["B", "T"], future_stack=True) for table in tables)
        spans = cells.groupby(level=["part", "H"]).agg(span).unstack("H")
        lines |= {(part, cpu): spans.loc[part] for part in spans.index}
    order = [(part, cpu) for part in (STACKED, INFERENCE, STEP) for cpu in benchmarks]
    shown = DataFrame([lines[line] for line in order], index=map(", ".join, order))
    return wide(shown, "times as fast as `nn.LSTM`", "{} units".format)


def by_maker(*benchmarks: Benchmark) -> dict[str, Benchmark]:
    """Return benchmarks by the maker of their CPU, such as "AMD"; of two by the same maker the later one."""
    makers = {re.split(r"\W", benchmark.origin["machine"]["cpu"])[0]: benchmark for benchmark in benchmarks}
    return dict(sorted(makers.items()))


def paper_speed(benchmark: Benchmark) -> dict[str, DataFrame]:
    """Return the LSTM's time over the QRNN's in the grid of the paper's Fig. 4, a row for each batch size, by part.

    On a GPU the paper's own numbers stand first.
    """
    rows = benchmark.measured("paper")
    grids = {}
    if benchmark.origin["machine"]["gpu"]:
        grids["the paper, inference"] = paper()
    measured = ratios(rows, "LSTM", "QRNN")
    return grids | {place[0]: cells.unstack("T") for place, cells in measured.iterrows()}


def paper() -> DataFrame:
    """Return the paper's own numbers, inference: a row for each batch size, a column for each length."""
    return DataFrame.from_dict(PAPER, orient="index", columns=list(PAPER_LENGTHS))


def side_by_side(grids: dict[str, DataFrame], batch: str) -> str:
    """Return grids as one table that has a number of each in every cell; `batch` heads the batch sizes."""
    cells = pd.concat({name: grid.map("{:.1f}".format) for name, grid in grids.items()})
    return wide(cells.groupby(level=1).agg(" / ".join), f"{batch} ({' / '.join(grids)})", "T = {:,}".format)


def paper_grid(benchmark: Benchmark) -> str:
    """Return the grids of `paper_speed` in one table."""
    return side_by_side(paper_speed(benchmark), "batch")


def experiment_speed(benchmark: Benchmark) -> str:
    """Return words a second of the two language models, as a table."""
    rows = benchmark.measured("experiment")
    rows["name"] = "`" + rows["preset"] + "`, " + rows["part"] + rows["amp"].map(lambda amp: f", {amp}" if amp else "")
    speeds, widths = (rows.pivot(index="name", columns="what", values=value) for value in ("tokens_per_s", "hidden"))
    lines = DataFrame(index=rows["name"].unique())
    for name in ("qrnn", "lstm"):
        lines[f"{name.upper()}, words/s"] = speeds[name].map("{:,.0f}".format) + widths[name].map(" ({} units)".format)
    lines["QRNN / LSTM"] = (speeds["qrnn"] / speeds["lstm"]).map("{:.2f}".format)
    return wide(lines, "preset")


def data_parallel(benchmark: Benchmark) -> str:
    """Say how many times as many tokens several processes read as one."""
    speeds = benchmark.measured("processes").groupby("processes")["tokens_per_s"].median()
    others = (f"{count} processes read {speed / speeds[1]:.2f} times as many" for count, speed in speeds.items())
    return f"Tokens a second, one core a process: one reads {speeds[1]:,.0f}, {', '.join(list(others)[1:])}."


def growth(benchmark: Benchmark) -> dict[str, DataFrame]:
    """Return time (ns) and memory (bytes) a token: for each T at constant B T, and for each B at constant T."""
    pooling = benchmark.pooling_growth().query("what == 'auto'").assign(what="pooling")
    layers = benchmark.measured("scaling")
    rows = pd.concat([pooling, layers])
    tokens = rows["B"] * rows["T"]
    rows = rows.assign(ns=rows["ms"] * 1e6 / tokens, bytes=rows["mib"] * 2**20 / tokens)
    longest = (pooling["B"] * pooling["T"]).max()
    return {"T": rows[tokens == longest], "B": rows[(rows["T"] == REFERENCE_LENGTH) & (rows["what"] != "pooling")]}


def layer_growth(benchmark: Benchmark) -> str:
    """Return time and memory a token as tables, for each T and for each B, and what growing T does to the time."""
    parts, sweeps = [], growth(benchmark)
    for axis, rows in sweeps.items():
        table = rows.pivot(index="what", columns=axis, values=["ns", "bytes"]).stack(0, future_stack=True)
        table = table.loc[[(name, value) for name in rows["what"].unique() for value in ("ns", "bytes")]]
        table.index = table.index.map("{0[0]}, {0[1]} a token".format)
        first = rows.iloc[0]
        fixed = f"B x T = {first['B'] * first['T']:,}" if axis == "T" else f"T = {REFERENCE_LENGTH}"
        form = f"{axis} = {{:,}}".format
        parts.append(wide(table.map("{:,.0f}".format), f"{fixed}, {first['H']} units", form))
    times = sweeps["T"].pivot(index="T", columns="what", values="ns")[sweeps["T"]["what"].unique()]
    grown = ", ".join(f"{name} {ratio:.1f}" for name, ratio in (times.loc[LONG] / times.loc[REFERENCE_LENGTH]).items())
    return "\n\n".join([*parts, f"Time a token at T = {LONG:,} over that at T = {REFERENCE_LENGTH}: {grown}."])


# --- the machine's limits --------------------------------------------------------------------------------------------


def roofline(benchmark: Benchmark) -> str:
    """Return bandwidth and rate of pooling and of a layer, and the share of the machine's limits, as a table."""
    measured = benchmark.measured("roofline")
    rows = measured.set_index("what")
    lines = DataFrame({"ms": rows["ms"].map("{:,.1f}".format)})
    for limit, (value, unit) in LIMITS.items():
        part = rows[value] / rows.loc[limit, value].max()
        lines[f"{unit} (of a {limit}'s)"] = [
            f"{rate:,.3g} ({share:.0%})" if rate else "" for rate, share in zip(rows[value], part, strict=True)
        ]
    return wide(lines, "{B} x {T} x {H}".format(**measured.iloc[0]))


def profile(benchmark: Benchmark) -> str:
    """Return where the time of a layer goes, and at what share of the machine's rate its products run, as a table."""
    rows = benchmark.measured("profile")
    shares = rows.pivot(index=["part", "H"], columns="what", values="share").fillna(0)
    lines = shares.sort_values(shares.index[-1], axis="columns", ascending=False).map("{:.0%}".format)
    products = rows.dropna(subset="of_machine").set_index(["part", "H"])["of_machine"]
    lines["rate of the products, of the machine's"] = products.map("{:.0%}".format)
    lines.index = lines.index.map("{0[0]}, {0[1]} units".format)
    return wide(lines, "share of the time, {B} x {T}".format(**rows.iloc[0]))


# --- blocks ----------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[Benchmark], str]] = {
    "precision": precision,
    "pooling speed": pooling_speed,
    "pooling growth": pooling_growth,
    "layer training": partial(layer_speed, STACKED),
    "layer inference": partial(layer_speed, INFERENCE),
    "layer worst": layer_worst,
    "step speed": step_speed,
    "layer memory": layer_memory,
    "layer kept": layer_kept,
    "experiment speed": experiment_speed,
    "data parallel": data_parallel,
    "layer growth": layer_growth,
    "roofline": roofline,
    "profile": profile,
    "benchmark source": Benchmark.source,
}
OF_BOTH_CPUS = ("layer training", "layer inference", "step speed", "benchmark source")


def block(made: Callable[[Benchmark], str], device: str = "cpu") -> str:
    """Return what `made` makes of the benchmark on a device, or which command measures it."""
    try:
        return made(Benchmark(device))
    except NotMeasured as missing:
        only = f" --only {missing}" if str(missing) else ""
        return f"Not measured yet: `{COMMAND} --device {device}{only}` does it."


def gpu() -> str:
    """Return the tables of `TABLES` and the paper's grid of a GPU, once they are measured."""
    try:
        Benchmark("cuda")
    except NotMeasured:
        return f"Of the tables above, none is measured on a GPU yet: `{COMMAND} --device cuda` does it."
    return "\n\n".join(block(made, "cuda") for made in (*TABLES.values(), paper_grid))


BLOCKS: dict[str, Callable[[], str]] = {
    **{name: partial(block, made) for name, made in TABLES.items()},
    "readme exactness": partial(block, readme_exactness),
    "readme speed": partial(block, lambda benchmark: readme_speed(by_maker(Benchmark(INTEL), benchmark))),
    **{f"{name}, Intel": partial(block, TABLES[name], INTEL) for name in OF_BOTH_CPUS},
    "gru training": partial(block, partial(gru_speed, STACKED)),
    "gru inference": partial(block, partial(gru_speed, INFERENCE)),
    "gpu": gpu,
}
