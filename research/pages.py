"""Bring the numbers of results/*.json into the README: `make results`. Nothing in its tables is typed by hand."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NoReturn

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, NullFormatter

from lab.checkpoint import write_file
from lab.presets import Config
from lab.report import styles
from research import studies

NAMES = Config.names
STYLES = styles(NAMES)
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "research" / "results"
README = ROOT / "README.md"
PRECISION_METHODS = ("closed form, autograd", "log", "blocked", "scan", "loop")
POOLING_SHAPE, LAYER_WIDTH, REFERENCE_LENGTH, LONG = (32, 128, 640), 640, 512, 16_384
PAPER_WIDTH, PAPER_LENGTHS = 320, (32, 64, 128, 256, 512)
PAPER = {  # batch size -> times as fast as cuDNN's LSTM at each length, inference: Fig. 4, right
    8: (5.5, 8.8, 11.0, 12.4, 16.9),
    16: (5.5, 6.7, 7.8, 8.3, 10.8),
    32: (4.2, 4.5, 4.9, 4.9, 6.4),
    64: (3.0, 3.0, 3.0, 3.0, 3.7),
    128: (2.1, 1.9, 2.0, 2.0, 2.4),
    256: (1.4, 1.4, 1.3, 1.3, 1.3),
}
LIMITS = {"copy": "gb_per_s", "matrix product": "gflop_per_s"}  # of the machine
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "os^Dv<>x"
CONTEXT_FIGURE = (
    "By how many per cent the QRNN is behind the LSTM against the number of words known, after 3 and 15 epochs"
)
FIT = "training, mean over the last epoch, with dropout"
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


def recorded(name: str, command: str, made: Callable[[Row], str]) -> str:
    """What `made` makes of the runs in results/NAME.json, where they come from, and their figure."""
    if not (RESULTS / f"{name}.json").exists():
        return f"Not run yet: `{command} --data DIR` does it."
    content, finished = load(f"{name}.json"), finished_runs(name)
    failed = [f"{label} failed: {run['error']}." for label, run in content["runs"].items() if "error" in run]
    if not finished:
        return "\n\n".join(failed)
    if name in studies.STUDIES:
        missing = [label for label in studies.STUDIES[name]() if label not in content["runs"]]
        failed += [f"Not run yet: {'; '.join(missing)}."] if missing else []
    figure = [f"![{FIGURES[name][1]}](docs/images/{name}.png)"] if name in FIGURES else []
    return "\n\n".join([made(finished), *failed, study_source(name, content["command"], finished), *figure])


def finished_runs(name: str) -> Row:
    """The runs in results/NAME.json that did not fail; none if there is no such file."""
    runs = load(f"{name}.json")["runs"] if (RESULTS / f"{name}.json").exists() else {}
    return {label: run for label, run in runs.items() if "error" not in run}


def study(runs: Row, first: str, complete: bool = False) -> str:
    """A row for each run, of one model each; if complete, with the test perplexity and how well the training text is
    fitted in the last epoch."""
    rows = []
    for label, run in runs.items():
        (model,) = run["models"]
        sizes = [f"{model['hidden']}", f"{model['recurrent_parameters']:,} / {model['parameters']:,}"]
        scores = [model["valid_perplexity"]]
        scores += [model["test_perplexity"], model["epochs"][-1]["train_perplexity"]] if complete else []
        rows.append([label, *sizes, *(f"{score:.1f}" for score in scores)])
    header = [first, "units", "parameters, recurrent / all", "validation perplexity"]
    return table(header + (["test perplexity", FIT] if complete else []), rows)


def longer(runs: Row) -> str:
    """A row for each run, a column for each epoch, and how well the training text is fitted in the last one."""
    rows = []
    for label, run in runs.items():
        (model,) = run["models"]
        scores = [f"{line['valid_perplexity']:.1f}" for line in model["epochs"]]
        rows.append([label, f"{model['hidden']}", *scores, f"{model['epochs'][-1]['train_perplexity']:.1f}"])
    epochs = (f"validation, epoch {epoch + 1}" for epoch in range(len(rows[0]) - 3))
    return table(["model", "units", *epochs, FIT], rows)


def tuning(runs: Row) -> str:
    """A row for each trial, which is the same for both models, the best of each in bold."""
    trials: dict[tuple[float, ...], dict[str, float]] = {}
    for run in runs.values():
        values = tuple(run["config"][name] for name in ("epochs", "lr", "dropout", "weight_decay"))
        (model,) = run["models"]
        trials.setdefault(values, {})[model["model"]] = model["valid_perplexity"]
    best = {name: min((scores[name] for scores in trials.values() if name in scores), default=None) for name in NAMES}

    def cell(name: str, scores: dict[str, float]) -> str:
        if name not in scores:
            return ""
        return f"**{scores[name]:.2f}**" if scores[name] == best[name] else f"{scores[name]:.2f}"

    rows = [
        [f"{lr:.2g}", f"{dropout:.2f}", f"{decay:.2g}", f"{epochs}", *(cell(name, scores) for name in NAMES)]
        for (epochs, lr, dropout, decay), scores in sorted(trials.items())
    ]
    perplexities = [f"{model}, validation perplexity" for model in NAMES.values()]
    return table(["learning rate", "dropout", "weight decay", "epochs", *perplexities], rows)


def seeds(runs: Row) -> str:
    """Mean and standard deviation over the seeds."""
    rows = []
    for name, mine in by_model(runs).items():
        sizes = [f"{mine[0]['hidden']}", f"{mine[0]['recurrent_parameters']:,} / {mine[0]['parameters']:,}"]
        fit = score([model["epochs"][-1] for model in mine], "train")
        rows.append([NAMES[name], *sizes, f"{len(mine)}", score(mine, "valid"), score(mine, "test"), fit])
    header = ["model", "units", "parameters, recurrent / all", "seeds", "validation perplexity", "test perplexity", FIT]
    return table(header, rows)


def by_model(runs: Row) -> dict[str, list[Row]]:
    """The results of the QRNNs and of the LSTMs."""
    models = [model for run in runs.values() for model in run["models"]]
    return {name: mine for name in NAMES if (mine := [model for model in models if model["model"] == name])}


def score(results: list[Row], split: str) -> str:
    """Mean and standard deviation of the perplexities."""
    values = [result[f"{split}_perplexity"] for result in results]
    if None in values:
        return "not read"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def summary() -> str:
    """A row for each comparison of the two that has as many runs of one as of the other."""
    dense = by_model({label: run for label, run in finished_runs("longer").items() if run["config"]["dense"]})
    comparisons = {
        "WikiText-2, sentences, 4 epochs": by_model(finished_runs("seeds")),
        "the same, each tuned": by_model(finished_runs("tuned")),
        f"the same, not tuned, dense, the best of {len(dense.get('qrnn', ()))} QRNNs": best_of_each(dense),
        "Penn Treebank, stream, 15 epochs": by_model(finished_runs("ptb")),
        "WikiText-2, stream, all words, 4 epochs": by_model(finished_runs("wikitext2")),
    }
    rows = []
    for label, models in comparisons.items():
        seeds, *others = (len(models.get(name, ())) for name in NAMES)
        if seeds and others == [seeds]:
            scores = [score(mine, split) for split in ("valid", "test") for mine in models.values()]
            last = "valid" if "not read" in scores else "test"
            ratios = [ratio(models, quantity) for quantity in (f"{last}_perplexity", "tokens_per_second")]
            rows.append([label, f"{seeds}", *scores, f"{ratios[0]:.3f}", f"{ratios[1]:.2f}"])
    header = [f"{name}, {split}" for split in ("validation", "test") for name in NAMES.values()]
    return table(["perplexity", "seeds", *header, "QRNN / LSTM", "words a second, QRNN / LSTM"], rows)


def ratio(models: dict[str, list[Row]], quantity: str) -> float:
    """Of the means of the QRNNs and of the LSTMs."""
    return mean(model[quantity] for model in models["qrnn"]) / mean(model[quantity] for model in models["lstm"])


def best_of_each(models: dict[str, list[Row]]) -> dict[str, list[Row]]:
    return {name: [min(mine, key=lambda model: model["valid_perplexity"])] for name, mine in models.items()}


def study_source(name: str, command: str, runs: Row) -> str:
    """As `source`, from what the runs themselves say; older runs may have had other flags for the same settings."""

    def all_of(kind: Callable[[Row], str]) -> str:
        return " and ".join(sorted({kind(run) for run in runs.values()}))

    starts = (start for run in runs.values() for start in (*run.get("earlier_starts", ()), run))
    commits = " and ".join(sorted({start["commit"][:9] for start in starts}))
    where = all_of(lambda run: run["machine"]["gpu"] or f"{run['machine']['cpu']}, {run['machine']['threads']} core")
    versions = all_of(lambda run: f"torch {run['versions']['torch']}, Python {run['versions']['python']}")
    return f"`results/{name}.json`, made anew by `{command}`: runs at commit {commits}, {where} a run, {versions}."


def context() -> str:
    """A row for each number of words known: the perplexities of both models and their ratio; the last row is of the
    training text."""
    if not (RESULTS / "context.json").exists():
        return "Not measured yet: `python -m research.context --data ptb` does it."
    content = load("context.json")
    studies, known = content["studies"].values(), content["known"]
    header, rows, fits = ["words known"], [spans(known)], ["training text, all words before"]
    for study in studies:
        header += [f"{study['epochs']} epochs: QRNN", "LSTM", "QRNN / LSTM"]
        rows += [[f"{score:.1f}" for score in study[name]] for name in NAMES]
        pairs = zip(study["ratio"], study["standard_error"], strict=True)
        rows += [[f"{ratio:.3f} ± {error:.3f}" for ratio, error in pairs]]
        fitted = study["training_text"]
        fits += [*(f"{fitted[name]:.1f}" for name in NAMES), f"{fitted['qrnn'] / fitted['lstm']:.3f}"]
    return "\n\n".join(
        [
            table(header, [*map(list, zip(*rows, strict=True)), fits]),
            source("context.json", content),
            f"![{CONTEXT_FIGURE}](docs/images/context.png)",
        ]
    )


def spans(known: list[int]) -> list[str]:
    """1, 2, 3-4, 5-8 ...: what stands for 1, 2, 4, 8 ... words known."""
    return [str(most) if most < 3 else f"{most // 2 + 1}-{most}" for most in known]


def example(name: str, header: list[str], cells: Callable[[Row], list[str]]) -> str:
    """The models of an example: what every run has, and what `cells` makes of a result."""
    content = load(name)
    rows = [
        [
            f"{NAMES[model['model']]}, {model['hidden']} units",
            f"{model['recurrent_parameters']:,}",
            f"{model['best_epoch']}",
            *cells(model),
        ]
        for model in content["models"]
    ]
    return f"{table(['model', 'recurrent parameters', 'best epoch', *header], rows)}\n\n{source(name, content)}"


def sentiment() -> str:
    """Accuracies and their intervals."""

    def cells(model: Row) -> list[str]:
        accuracies = ["{accuracy:.1f} ({low:.1f} to {high:.1f})".format(**model[split]) for split in ("valid", "test")]
        return [*accuracies, f"{model['tokens_per_second']:.0f}"]

    return example("sentiment.json", ["validation accuracy, %", "test accuracy, %", "reviews/s"], cells)


def translation() -> str:
    """BLEU and chrF with their signatures; a model that was stopped was not tested."""

    def cells(model: Row) -> list[str]:
        scores = [f"{model[score]:.1f}" if score in model else "not read" for score in ("bleu", "chrf")]
        return [f"{model['valid_perplexity']:.2f}", *scores]  # no speed: since then the LSTM is fed in a faster way

    made = example("translation.json", ["validation perplexity", "BLEU", "chrF"], cells)
    first = load("translation.json")["models"][0]
    return f"{made} BLEU: {first['bleu_signature']}; chrF: {first['chrf_signature']}."


def draw_epochs(axis: Axes, model: Row, **style: Any) -> None:
    """Validation perplexity against epochs."""
    lines = model["epochs"]
    axis.plot([line["epoch"] for line in lines], [line["valid_perplexity"] for line in lines], **style)
    axis.set(xlabel="epochs")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)


def draw_models(runs: Row, path: Path) -> None:
    """Validation perplexity of QRNNs and LSTMs against epochs, a line for each run; and of the last epoch alone."""
    figure, (axis, last) = plt.subplots(1, 2, figsize=(8, 3.5), width_ratios=(3, 1), layout="constrained")
    for run, label in zip(runs.values(), named_once(runs), strict=True):
        (model,) = run["models"]
        style = STYLES[model["model"]]
        draw_epochs(axis, model, label=label, **style)
        last.plot(NAMES[model["model"]], model["epochs"][-1]["valid_perplexity"], **style, alpha=0.7)
    last.set(title="last epoch")
    last.title.set_fontsize(10)
    last.margins(x=0.5)
    last.grid(alpha=0.25)
    axis.set(ylabel="validation perplexity", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def named_once(runs: Row) -> list[str | None]:
    """What the legend calls the model of each run, None where it is named already."""
    models = [run["models"][0]["model"] for run in runs.values()]
    return [NAMES[name] if models.index(name) == row else None for row, name in enumerate(models)]


def draw_numerics(runs: Row, path: Path) -> None:
    """Validation perplexity against epochs: a panel for each length, a line for each way to pool."""
    lengths = sorted({run["config"]["bptt"] for run in runs.values()})
    figure, axes = plt.subplots(1, len(lengths), figsize=(9, 3.3), sharey=True, layout="constrained", squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=True):
        mine = [(label, run) for label, run in runs.items() if run["config"]["bptt"] == length]
        for index, (label, run) in enumerate(mine):
            style = {"color": COLORS[index], "marker": MARKERS[index], "linestyle": "--" if index else "-"}
            draw_epochs(axis, run["models"][0], label=label.partition(", ")[2], **style)
        axis.set(title=f"T = {length:,}")
        axis.title.set_fontsize(10)
        axis.legend(frameon=False)
    axes[0, 0].set(ylabel="validation perplexity")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_context(content: Row, path: Path) -> None:
    """The ratio of the perplexities against the number of words known, a line for each length of training."""
    figure, axis = plt.subplots(figsize=(7, 3.3), layout="constrained")
    for index, study in enumerate(content["studies"].values()):
        style = {"color": COLORS[index], "marker": MARKERS[index], "linestyle": ("--", "-")[index]}
        percent = [100 * (ratio - 1) for ratio in study["ratio"]]
        errors = [100 * error for error in study["standard_error"]]
        axis.errorbar(range(len(percent)), percent, errors, capsize=3, label=f"after {study['epochs']} epochs", **style)
    axis.axhline(0, color="0.6", linewidth=1, zorder=0)
    axis.set(xlabel="words known before the one that is predicted", ylabel="QRNN behind the LSTM, %")
    axis.set_xticks(range(len(content["known"])), spans(content["known"]))
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_ablation(runs: Row, path: Path) -> None:
    """A point for each run, in the order of the table; the line is the first run."""
    figure, axis = plt.subplots(figsize=(7, 0.24 * len(runs) + 0.9), layout="constrained")
    for row, (run, label) in enumerate(zip(runs.values(), named_once(runs), strict=True)):
        (model,) = run["models"]
        axis.plot(model["valid_perplexity"], row, **STYLES[model["model"]] | {"linestyle": ""}, label=label)
    axis.axvline(next(iter(runs.values()))["models"][0]["valid_perplexity"], color="0.6", linewidth=1, zorder=0)
    axis.set(
        xlabel="validation perplexity after one epoch; the line is at the first row",
        xscale="log",
        yticks=range(len(runs)),
    )
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.4, 1.6, 2, 2.5, 5)))
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticklabels(runs, fontsize=9)
    axis.invert_yaxis()
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


# --- the benchmark: every block is made from the content of results/benchmark-<device>.json ---------------------------


def measured(rows: list[Row], **labels: object) -> list[Row]:
    """The rows that have these labels, without those that say why something was skipped."""
    return [row for row in rows if "skipped" not in row and all(row[key] == value for key, value in labels.items())]


def by(rows: list[Row], *keys: str, value: str = "ms") -> dict[Any, Any]:
    """The value of each row that has one, under its labels."""
    return {tuple(row[key] for key in keys): row[value] for row in rows if value in row}


def names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["what"] for row in rows))


def benchmark_source(content: Row) -> str:
    """Where the numbers come from."""
    origin = content["provenance"]
    rows = [row for rows in content.values() if isinstance(rows, list) for row in rows if "rounds" in row]
    rounds, spreads = [row["rounds"] for row in rows], [(row["ms_q3"] - row["ms_q1"]) / row["ms"] for row in rows]
    name = f"benchmark-{origin['machine']['device']}.json"
    return (
        f"{source(name, origin)} "
        f"Times are medians of {min(rounds)} to {max(rounds)} rounds in which the compared things took turns; "
        f"their quartiles are {median(spreads):.0%} of it apart in half of the rows."
    )


def precision(content: Row) -> str:
    """Worst gate bias at each length: error of h / error of the gradient of log f."""
    lengths = sorted({row["T"] for row in content["precision"]})

    def cell(method: str, time: int) -> str:
        rows = [row for row in content["precision"] if (row["method"], row["T"]) == (method, time)]
        return " / ".join(f"{max(row[what] for row in rows):.0e}" for what in ("forward", "gradient"))

    rows = [[method, *(cell(method, time) for time in lengths)] for method in PRECISION_METHODS]
    return f"{table(['method', *(f'T = {time:,}' for time in lengths)], rows)}\n\n{benchmark_source(content)}"


def pooling_speed(content: Row) -> str:
    """Time of every way to pool over that of "auto", and its memory, at the shape that the targets are for."""
    rows = measured(content["pooling"], dtype="float32", **dict(zip("BTH", POOLING_SHAPE, strict=True)))
    times, memory = by(rows, "part", "what"), by(rows, "part", "what", value="mib")
    parts = ("forward", "forward + backward")
    lines = []
    for name in names(rows):
        ratios = [f"{times[part, name] / times[part, 'auto']:.1f}" for part in parts]
        peaks = [f"{memory[part, name]:,.0f}" if (part, name) in memory else "" for part in parts]
        lines.append([f"{name}", *ratios, *peaks])
    header = [
        "{} x {} x {}, times over that of `auto`".format(*POOLING_SHAPE),
        *parts,
        *(f"{part}, MiB" for part in parts),
    ]
    reference = " and ".join(f"{times[part, 'auto']:.3g} ms {part}" for part in parts)
    return f"{table(header, lines)}\n\n`auto` takes {reference}. {not_measured(content)}"


def not_measured(content: Row) -> str:
    """Which ways to pool were skipped, and why."""
    reasons: dict[str, list[str]] = {}
    for row in content["pooling"]:
        if "skipped" in row and row["what"] not in reasons.setdefault(row["skipped"], []):
            reasons[row["skipped"]].append(row["what"])
    return "".join(f"Not measured, {reason}: {'; '.join(names)}. " for reason, names in reasons.items()).strip()


def pooling_growth(content: Row) -> str:
    """Time of every way to pool over that of "auto", forward and backward, against T."""
    rows = growth_of_pooling(content)
    times = by(rows, "T", "what")
    lengths = sorted({row["T"] for row in rows})
    lines = [
        [name, *(f"{times[T, name] / times[T, 'auto']:.1f}" if (T, name) in times else "" for T in lengths)]
        for name in names(rows)
    ]
    tokens, width = rows[0]["B"] * rows[0]["T"], rows[0]["H"]
    header = [f"B x T = {tokens:,}, {width} channels", *(f"T = {T:,}" for T in lengths)]
    return table(header, lines)


def growth_of_pooling(content: Row) -> list[Row]:
    width = min(row["H"] for row in content["pooling"])
    return measured(content["pooling"], dtype="float32", H=width, part="forward + backward")


def layer_speed(content: Row) -> str:
    """Time of nn.LSTM and nn.GRU over the QRNN's, and the QRNN's memory over nn.LSTM's, at 640 units."""
    rows = measured(content["layer"], H=LAYER_WIDTH)
    times, memory = by(rows, "B", "T", "part", "what"), by(rows, "B", "T", "part", "what", value="mib")
    sizes = list(dict.fromkeys((row["B"], row["T"]) for row in rows))
    parts = list(dict.fromkeys(row["part"] for row in rows))

    def ratio(key: tuple[Any, ...], values: dict[Any, float], above: str, below: str) -> str:
        return f"{values[(*key, above)] / values[(*key, below)]:.1f}" if (*key, above) in values else ""

    lines = []
    for part in parts:
        keys = [(*size, part) for size in sizes]
        for other in ("LSTM", "GRU"):
            lines.append([f"{part}, speed over {other}", *(ratio(key, times, other, "QRNN") for key in keys)])
        lines.append([f"{part}, memory over LSTM", *(ratio(key, memory, "QRNN", "LSTM") for key in keys)])
    lines = [line for line in lines if any(line[1:])]
    return table(["batch x T", *("{} x {}".format(*size) for size in sizes)], lines)


def paper_grid(content: Row) -> str:
    """Fig. 4 of the paper: LSTM's time over the QRNN's: in the paper, inference / here, inference / here, training."""
    times = by(measured(content["paper"], H=PAPER_WIDTH), "B", "T", "part", "what")

    def cell(batch: int, time: int, paper: float) -> str:
        ours = [
            times[batch, time, part, "LSTM"] / times[batch, time, part, "QRNN"] for part in ("inference", "training")
        ]
        return " / ".join(f"{ratio:.1f}" for ratio in (paper, *ours))

    lines = [
        [f"{batch}", *(cell(batch, time, ratio) for time, ratio in zip(PAPER_LENGTHS, row, strict=True))]
        for batch, row in PAPER.items()
    ]
    return table(["batch", *(f"T = {time}" for time in PAPER_LENGTHS)], lines)


def experiment_speed(content: Row) -> str:
    """Training tokens a second of the two language models."""
    rows = content["experiment"]
    speeds, widths = (by(rows, "preset", "amp", "what", value=value) for value in ("tokens_per_s", "hidden"))
    lines = [
        [f"`{preset}`" + (f", {amp}" if amp else "")]
        + [f"{speeds[preset, amp, name]:,.0f} ({widths[preset, amp, name]} units)" for name in ("qrnn", "lstm")]
        + [f"{speeds[preset, amp, 'qrnn'] / speeds[preset, amp, 'lstm']:.1f}"]
        for preset, amp in dict.fromkeys((row["preset"], row["amp"]) for row in rows)
    ]
    return table(["preset", "QRNN, tokens/s", "LSTM, tokens/s", "ratio"], lines)


def data_parallel(content: Row) -> str:
    """How many times as many tokens several processes read as one."""
    speeds: dict[int, list[float]] = {}
    for row in content["processes"]:
        speeds.setdefault(row["processes"], []).append(row["tokens_per_s"])
    one, *others = ((count, median(values)) for count, values in sorted(speeds.items()))
    lines = [f"{count} processes read {speed / one[1]:.2f} times as many" for count, speed in others]
    return f"Tokens a second, one core a process: one reads {one[1]:,.0f}, {', '.join(lines)}."


def layer_growth(content: Row) -> str:
    """Time and memory per token of pooling and of a layer, against T at constant B T, and against B at constant T."""
    pooling = [row | {"what": "pooling"} for row in measured(growth_of_pooling(content), what="auto")]
    rows = pooling + content["scaling"]
    tokens = max(row["B"] * row["T"] for row in pooling)
    sweeps = {
        "T": [row for row in rows if row["B"] * row["T"] == tokens],
        "B": [row for row in content["scaling"] if row["T"] == REFERENCE_LENGTH],
    }
    parts = []
    for axis, sweep in sweeps.items():
        steps = sorted({row[axis] for row in sweep})
        lines = []
        for name in names(sweep):
            mine = {row[axis]: row for row in measured(sweep, what=name)}
            for value, label, scale in (("ms", "ns", 1e6), ("mib", "bytes", 2**20)):
                figures = [mine[step][value] * scale / (mine[step]["B"] * mine[step]["T"]) for step in steps]
                lines.append([f"{name}, {label} a token", *(f"{figure:,.0f}" for figure in figures)])
        fixed = f"B x T = {tokens:,}" if axis == "T" else f"T = {REFERENCE_LENGTH}"
        parts.append(table([f"{fixed}, {pooling[0]['H']} units", *(f"{axis} = {step:,}" for step in steps)], lines))
    times = by(sweeps["T"], "what", "T")
    ratios = (f"{name} {times[name, LONG] / times[name, REFERENCE_LENGTH]:.1f}" for name in names(sweeps["T"]))
    parts.append(f"Time a token at T = {LONG:,} over that at T = {REFERENCE_LENGTH}: {', '.join(ratios)}.")
    return "\n\n".join(parts)


def roofline(content: Row) -> str:
    """Bandwidth and rate of pooling and of a layer, and the part that is of what the machine can do."""
    rows = measured(content["roofline"])
    most = {value: max(row[value] for row in rows if row["what"] == what) for what, value in LIMITS.items()}
    lines = [
        [row["what"], f"{row['ms']:,.1f}"]
        + [f"{row[value]:,.3g} ({row[value] / most[value]:.0%})" if row[value] else "" for value in LIMITS.values()]
        for row in rows
    ]
    header = ["{B} x {T} x {H}".format(**rows[0]), "ms", "GB/s (of a copy's)", "GFLOP/s (of a matrix product's)"]
    return table(header, lines)


def profile(content: Row) -> str:
    """Where the time of training a layer goes."""
    rows = content["profile"]
    shares = ", ".join(f"{row['what']} {row['share']:.0%}" for row in rows)
    return "Of the time of {part} at {B} x {T} x {H}: ".format(**rows[0]) + shares + "."


BENCHMARK = {
    "precision": precision,
    "pooling speed": pooling_speed,
    "pooling growth": pooling_growth,
    "layer speed": layer_speed,
    "paper grid": paper_grid,
    "experiment speed": experiment_speed,
    "data parallel": data_parallel,
    "layer growth": layer_growth,
    "roofline": roofline,
    "profile": profile,
    "benchmark source": benchmark_source,
}


class NotMeasured(Exception):
    """A table that the benchmark's file does not have."""


class Content(dict):
    """The benchmark's file."""

    def __missing__(self, table: str) -> NoReturn:
        raise NotMeasured(table)


def block(name: str, device: str = "cpu") -> str:
    try:
        return BENCHMARK[name](Content(load(f"benchmark-{device}.json")))
    except NotMeasured as missing:
        return f"Not measured yet: `python -m benchmarks --only {missing}` does it."


def gpu() -> str:
    """The same tables of a GPU, once they are measured."""
    if not (RESULTS / "benchmark-cuda.json").exists():
        return "Nothing here has been measured on a GPU yet: `python -m benchmarks --device cuda` does it."
    images = (f"![{DRAWINGS[name][1]}, on a GPU](docs/images/{name}-cuda.png)" for name in DRAWINGS)
    return "\n\n".join([*(block(name, "cuda") for name in BENCHMARK), *images])


# --- plots -----------------------------------------------------------------------------------------------------------


def device_name(content: Row) -> str:
    machine = content["provenance"]["machine"]
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} cores"


def draw_speed(content: Row, path: Path) -> None:
    """The grid of the paper's Fig. 4 as heat maps: the paper's, and ours in inference and in training."""
    times = by(measured(content["paper"], H=PAPER_WIDTH), "B", "T", "part", "what")
    grids = {"the paper's kernel over cuDNN's\nLSTM, inference": list(PAPER.values())}
    for part in ("inference", "training"):
        grids[f"ours over nn.LSTM,\n{part}, {device_name(content)}"] = [
            [times[batch, time, part, "LSTM"] / times[batch, time, part, "QRNN"] for time in PAPER_LENGTHS]
            for batch in PAPER
        ]
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.6), sharey=True, layout="constrained")
    for axis, (title, grid) in zip(axes, grids.items(), strict=True):
        image = axis.imshow(grid, cmap="PuOr", norm=LogNorm(1 / 16, 16), aspect="auto")  # white: as fast as the LSTM
        for y, row in enumerate(grid):
            for x, ratio in enumerate(row):
                axis.text(
                    x, y, f"{ratio:.1f}", ha="center", va="center", color="white" if ratio > 6 else "black", fontsize=9
                )
        axis.set(title=title, xlabel="T, time steps", xticks=range(len(PAPER_LENGTHS)), xticklabels=PAPER_LENGTHS)
        axis.title.set_fontsize(10)
    axes[0].set(ylabel="batch size", yticks=range(len(PAPER)), yticklabels=PAPER)
    bar = figure.colorbar(image, ax=axes, label="times as fast as the LSTM", ticks=[1 / 16, 1 / 4, 1, 4, 16])
    bar.ax.set_yticklabels(["1/16", "1/4", "1", "4", "16"])
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_scaling(content: Row, path: Path) -> None:
    """Time a token against T, of the ways to pool and of a layer, and the memory of a layer."""
    pooling = growth_of_pooling(content)
    tokens = max(row["B"] * row["T"] for row in pooling)
    layers = [row for row in content["scaling"] if row["B"] * row["T"] == tokens]
    panels = (
        ("pooling, forward + backward", pooling, "ms", "time a token, ns", 1e6),
        ("layer, training", layers, "ms", "time a token, ns", 1e6),
        ("layer, training", layers, "mib", "memory a token, bytes", 2**20),
    )
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 4.8), layout="constrained")
    for axis, (title, rows, value, label, scale) in zip(axes, panels, strict=True):
        for index, name in enumerate(name for name in names(rows) if name != "auto"):
            mine = [row for row in measured(rows, what=name) if value in row]
            x, y = [row["T"] for row in mine], [row[value] * scale / tokens for row in mine]
            again = index // len(COLORS)  # the colours are used up: other markers, and dashes
            style = {
                "color": COLORS[index % len(COLORS)],
                "marker": MARKERS[(index + again) % len(MARKERS)],
                "linestyle": ("-", "--")[again],
            }
            axis.plot(x, y, label=name, markersize=5, **style)
        axis.set(title=f"{title},\n{rows[0]['H']} units", xlabel="T, B x T constant", ylabel=label)
        axis.set(xscale="log", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.suptitle(device_name(content), fontsize=10)
    figure.savefig(path, dpi=140)
    plt.close(figure)


DRAWINGS = {
    "speed": (draw_speed, "How many times as fast as an LSTM a QRNN is, for batch sizes 8 to 256 and T 32 to 512"),
    "scaling": (draw_scaling, "Time and memory a token against T, of the ways to pool and of a layer"),
}

STUDIES: dict[str, Callable[[Row], str]] = {
    "seeds": seeds,
    "tuned": seeds,
    "ablation": partial(study, first="what is changed"),
    "longer": longer,
    "numerics": partial(study, first="pieces of T words", complete=True),
    "ptb": partial(study, first="model", complete=True),
    "ptb_short": partial(study, first="model"),
    "wikitext2": partial(study, first="model", complete=True),
}
FIGURES: dict[str, tuple[Callable[[Row, Path], None], str]] = {
    "seeds": (
        draw_models,
        "Validation perplexity of QRNN and LSTM against epochs, a line for each seed, and of the last epoch",
    ),
    "ablation": (draw_ablation, "Validation perplexity of each row of the table, as a point"),
    "numerics": (draw_numerics, "Validation perplexity against epochs of both ways to pool, for two lengths"),
    "ptb": (draw_models, "Validation perplexity of QRNN and LSTM on the Penn Treebank against epochs"),
}
BLOCKS = {
    **{name: partial(recorded, name, f"python -m research.studies {name}", made) for name, made in STUDIES.items()},
    "summary": summary,
    "tuning": partial(recorded, "tuning", "python -m research.tune --preset small --amp bf16", tuning),
    "context": context,
    "sentiment": sentiment,
    "translation": translation,
    **{name: partial(block, name) for name in BENCHMARK},
    "gpu": gpu,
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
    images = ROOT / "docs" / "images"
    for name, (draw, _) in FIGURES.items():
        if runs := finished_runs(name):
            draw(runs, images / f"{name}.png")
    if (RESULTS / "context.json").exists():
        draw_context(load("context.json"), images / "context.png")
    from examples.translation.__main__ import draw_attention

    (images / "attention.png").write_bytes(draw_attention(load("translation.json")["models"][0]["attention"]))
    for device in ("cpu", "cuda"):
        if (RESULTS / f"benchmark-{device}.json").exists():
            suffix = "" if device == "cpu" else f"-{device}"
            for name, (draw, _) in DRAWINGS.items():
                with contextlib.suppress(NotMeasured):
                    draw(Content(load(f"benchmark-{device}.json")), images / f"{name}{suffix}.png")
    write_file(README, render(README.read_text()))
