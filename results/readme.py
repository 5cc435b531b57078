"""Bring the numbers of results/*.json into the README: `make results`. Nothing in its tables is typed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent
README = RESULTS.parent / "README.md"
MODELS = {"qrnn": "QRNN", "lstm": "LSTM"}
STYLES = {"qrnn": {"color": "#0072B2", "marker": "o"}, "lstm": {"color": "#D55E00", "marker": "s", "linestyle": "--"}}
PRECISION_METHODS = ("closed form, autograd", "log", "blocked", "scan", "loop")
POOLING_METHODS = ("scan", "loop", "blocked", "log", "closed form, autograd", "Python loop, autograd")
Row = dict[str, Any]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load(name: str) -> Row:
    return json.loads((RESULTS / name).read_text())


def source(name: str, content: Row) -> str:
    """The sentence under a table that says where its numbers come from."""
    machine, versions = content["machine"], content["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    return (
        f"`results/{name}`: `{content['command']}`, commit {content['commit'][:9]}, seed {content['seed']}, "
        f"{where}, torch {versions['torch']}, Python {versions['python']}."
    )


def comparison() -> str:
    """The language models of preset `small`."""
    name = "small.json"
    content = load(name)
    rows = [
        [
            f"{MODELS[model['model']]}, {model['hidden']} units",
            f"{model['recurrent_parameters']:,} / {model['parameters']:,}",
            f"{model['best_epoch']}",
            f"{model['valid_perplexity']:.2f}",
            f"**{model['test_perplexity']:.2f}**",
            f"{model['tokens_per_second']:,.0f}",
            f"{model['wall_seconds'] / 60:.0f} min",
            f"{model['peak_memory_bytes'] / 2**20:,.0f} MiB",
        ]
        for model in content["models"]
    ]
    header = ["model", "parameters, recurrent / all", "best epoch", "validation", "test", "tokens/s", "time", "memory"]
    return f"{table(header, rows)}\n\n{source(name, content)}"


def draw_comparison(path: Path) -> None:
    """Validation perplexity of the models of preset `small` against epochs and against minutes of training."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), sharey=True, layout="constrained")
    for model in load("small.json")["models"]:
        perplexity = [line["valid_perplexity"] for line in model["epochs"]]
        for axis, x in (
            (axes[0], [line["epoch"] for line in model["epochs"]]),
            (axes[1], [line["seconds"] / 60 for line in model["epochs"]]),
        ):
            axis.plot(x, perplexity, label=MODELS[model["model"]], **STYLES[model["model"]])
    axes[0].set(xlabel="epochs", ylabel="validation perplexity")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[1].set(xlabel="minutes of training, evaluation not counted")
    for axis in axes:
        axis.grid(alpha=0.25)
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def precision() -> str:
    """Worst gate bias at each length: error of h / error of the gradient of log f."""
    name = "benchmark-cpu.json"
    content = load(name)
    lengths = sorted({row["T"] for row in content["precision"]})

    def cell(method: str, time: int) -> str:
        rows = [row for row in content["precision"] if (row["method"], row["T"]) == (method, time)]
        return " / ".join(f"{max(row[what] for row in rows):.0e}" for what in ("forward", "gradient"))

    rows = [[method, *(cell(method, time) for time in lengths)] for method in PRECISION_METHODS]
    header = ["method", *(f"T = {time:,}" for time in lengths)]
    return f"{table(header, rows)}\n\n{source(name, content['provenance'])}"


def pooling_speed() -> str:
    """Time of each way to pool over that of "auto", forward and backward."""
    name = "benchmark-cpu.json"
    content = load(name)
    times = {
        (row["B"], row["T"], row["H"], row["what"]): row["ms"]
        for row in content["pooling"]
        if row["part"] == "forward + backward"
    }
    shapes = list(dict.fromkeys(key[:3] for key in times))
    methods = [method for method in POOLING_METHODS if any((*shape, method) in times for shape in shapes)]

    def cell(shape: tuple[int, int, int], method: str) -> str:
        time = times.get((*shape, method))
        return "" if time is None else f"{time / times[(*shape, 'scan')]:.1f}"

    rows = [[method, *(cell(shape, method) for shape in shapes)] for method in methods]
    return table(["time over that of `scan`", *("{} x {:,} x {}".format(*shape) for shape in shapes)], rows)


def layer_speed() -> str:
    """nn.LSTM's time over the QRNN's, in each cell."""
    name = "benchmark-cpu.json"
    content = load(name)
    times = {(row["B"], row["T"], row["part"], row["what"]): row["ms"] for row in content["layer"]}
    cells = list(dict.fromkeys(key[:2] for key in times))
    rows = [
        [f"{part}, over {other}"]
        + [f"{times[(*cell, part, other)] / times[(*cell, part, 'QRNN')]:.1f}" for cell in cells]
        for part in ("training", "inference")
        for other in ("LSTM", "GRU")
    ]
    header = ["times as fast", *(f"batch {batch}, T = {time}" for batch, time in cells)]
    return f"{table(header, rows)}\n\nBoth tables: {source(name, content['provenance'])}"


BLOCKS = {
    "comparison": comparison,
    "precision": precision,
    "pooling speed": pooling_speed,
    "layer speed": layer_speed,
}


def render(text: str) -> str:
    """The README with every block between `<!-- begin NAME -->` and `<!-- end NAME -->` made anew."""
    for name, block in BLOCKS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{README.name}: no block {begin} ... {end}")
        made = f"{begin}\n{block()}\n{end}"
        text = pattern.sub(lambda _, made=made: made, text)  # a function, so that no backslash is special
    return text


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
    draw_comparison(README.parent / "assets" / "small.png")
