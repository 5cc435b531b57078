"""Make the tables of benchmarks/gpu.md, from research/results/gpu-*.json, which benchmarks/gpu.sh writes.

The count on paper comes from `benchmarks.count`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from pandas import DataFrame, Series

from benchmarks import count
from benchmarks.gpu import PLAN, not_tried
from benchmarks.gpu_ways import WAYS
from benchmarks.record import RESULTS, markdown, source, span, wide
from benchmarks.tables import paper, side_by_side

FORMS = ("eager", "eager, graph", "compiled", "compiled, graph")
STEPS = ("methods", "fig4", "bradbury", "training_steps", "tests")  # of benchmarks/gpu.sh
COMPARED = {  # name -> form of the LSTM, form of the QRNN
    "eager": ("eager", "eager"),
    "compiled": ("eager", "compiled"),  # the compiler leaves nn.LSTM as it is
    "graph": ("eager, graph", "compiled, graph"),
}
POINTWISE = "torch.associative_scan, pointwise"
BYTES = {"copy": 8, POINTWISE: 12}  # a number, that a pass from log f and x to h moves at least


def contents(name: str) -> dict[str, dict[str, Any]]:
    """Return the files of a step by their names: one, or more where it took more calls to come to its end."""
    paths = sorted(RESULTS.glob(f"gpu-{name}*.json"))
    return {path.name: json.loads(path.read_text()) for path in paths}


def frame(name: str, table: str = "rows", **labels: object) -> DataFrame:
    """Return the rows of a step that have these labels, skipped ones included."""
    rows = DataFrame([row for content in contents(name).values() for row in content.get(table, [])])
    for label, value in labels.items():
        rows = rows[rows[label] == value]
    return rows


def origin(name: str) -> str:
    return "\n".join(source(file, content["provenance"]) for file, content in contents(name).items())


# --- pooling ---------------------------------------------------------------------------------------------------------


def limits() -> str:
    """Say what the machine can do."""
    rows = frame("methods", "limits").set_index("what")
    rate, launch = rows["tflop_per_s"], rows["us_a_launch"]
    products = ", ".join(f"{rate[f'matrix product, {kind}']:.0f} in {kind}" for kind in ("float32", "TF32", "bfloat16"))
    return (
        f"A copy moves {rows.loc['copy', 'gb_per_s'] / 1000:.1f} TB/s. A launch takes {launch['launches']:.1f} us from "
        f"Python and {launch['launches, graph']:.1f} us inside a CUDA graph. Matrix products, TFLOP/s: {products}."
    )


def pooling(part: str) -> str:
    """Return microseconds of each way to pool, in all forms, and the largest error in any of them, as a table."""
    rows = frame("methods", part=part)
    shapes = list(zip(*(rows[letter] for letter in "BTH"), strict=True))
    rows = rows.assign(shape=shapes, us=(1e3 * rows["ms"]).map("{:,.0f}".format, na_action="ignore"))
    cells = rows.pivot_table(index=["what", "shape"], columns="form", values="us", aggfunc="first")
    cells = cells.reindex(columns=list(FORMS))
    alone = cells[list(FORMS[1:])].isna().all(axis="columns")
    lines = cells.fillna("-").agg(" / ".join, axis=1).where(~alone, cells["eager"]).unstack("shape")
    lines = lines[list(PLAN.shapes)].loc[[name for name in ("copy", *WAYS) if name in lines.index]]
    errors = rows.dropna(subset="errors")
    worst = errors["errors"].map(max).groupby(errors["what"]).max()
    lines["largest error"] = worst.map("{:.0e}".format)
    return wide(lines, f"{part}, us: {' / '.join(FORMS)}", str)


def not_run() -> str:
    """List which ways have no number at some shape, and why."""
    rows = frame("methods").dropna(subset="skipped")
    rows = rows[~rows["form"].fillna("").str.contains("graph")]
    rows = rows.assign(shape=rows[["B", "T", "H"]].astype(str).agg(", ".join, axis=1).map("({})".format))
    reasons = rows.drop_duplicates(["what", "shape", "skipped"]).groupby(["what", "skipped"], sort=False)["shape"]
    return "\n".join(f"- {what}, {', '.join(shapes)}: {reason}." for (what, reason), shapes in reasons)


def bandwidth() -> str:
    """Say how far the compiled scan is from a copy, for a sentence."""
    rows = frame("methods", part="forward", B=32, T=512)
    copy = rows[rows["what"] == "copy"]["ms"].min()
    scan = rows[(rows["what"] == POINTWISE) & (rows["form"] == "compiled, graph")]["ms"].min()
    share = BYTES[POINTWISE] * copy / (BYTES["copy"] * scan)
    return f"{scan / copy:.1f} times as long as a copy, at {share:.0%} of its bandwidth"


# --- Fig. 4 ----------------------------------------------------------------------------------------------------------


def grids(part: str, tf32: bool = True) -> dict[str, DataFrame]:
    """Return the LSTM's time over the QRNN's by form: a row for each batch size, a column for each length."""
    rows = frame("fig4", part=part, tf32=tf32)
    times = {key: group.pivot(index="B", columns="T", values="ms") for key, group in rows.groupby(["what", "form"])}
    pairs = COMPARED if tf32 else {"eager": COMPARED["eager"], "graph": ("eager, graph", "eager, graph")}
    return {name: times["LSTM", lstm] / times["QRNN", qrnn] for name, (lstm, qrnn) in pairs.items()}


def grid(part: str) -> str:
    """Return the LSTM's time over the QRNN's as a table, all forms in a cell. In inference the paper's stands first."""
    tables = grids(part)
    if part == "inference":
        tables = {"the paper": paper(), **tables}
    return side_by_side(tables, f"batch, {part}")


def ranges(part: str, tf32: bool = True) -> str:
    """Return the smallest and the largest ratio of the two times in each form, for a sentence."""
    return ", ".join(f"{name} {span(table.stack())}" for name, table in grids(part, tf32).items())


def graph(part: str) -> str:
    """Return the smallest and the largest ratio in a graph alone, for a sentence."""
    return span(grids(part)["graph"].stack())


def launches() -> str:
    """Say how long an eager layer takes in inference for few and for many sequences, for a sentence."""
    steps, few, many = PLAN.lengths[0], PLAN.batches[0], PLAN.batches[-1]
    rows = frame("fig4", part="inference", tf32=True, what="QRNN", form="eager", T=steps).set_index("B")
    return f"{rows['ms'][few]:.1f} ms for {few} sequences of {steps} steps, {rows['ms'][many]:.1f} ms for {many}"


# --- a language model ------------------------------------------------------------------------------------------------


def bradbury() -> str:
    """Compare the language models at the last epoch that all reached and at the best one of each, as a table."""
    rows = frame("bradbury")
    both = min(len(result["epochs"]) for result in rows["result"])
    lines = []
    for result, evaluation in zip(rows["result"], rows["zoneout_in_evaluation"].fillna("has none"), strict=True):
        curve = Series({epoch["epoch"]: epoch["valid_perplexity"] for epoch in result["epochs"]})
        best = result["best_epoch"]
        lines.append(
            {
                "`bradbury`": f"{result['model'].upper()}, {result['hidden']} units",
                "zoneout in evaluation": evaluation,
                f"validation, epoch {both}": f"{curve[both]:.1f}",
                "best validation": f"{curve[best]:.1f}, epoch {best}",
                "test there": f"{result['test_perplexity']:.2f}",
                "stopped after": f"{result['interrupted_at_epoch'] or len(result['epochs']):.0f} epochs",
                "words/s": f"{result['tokens_per_second']:,.0f}",
            }
        )
    return markdown(DataFrame(lines))


def training_steps() -> str:
    """Return the speed of training steps of the presets, and the LSTM's time over the QRNN's, as a table."""
    rows = frame("training_steps").fillna({"amp": "float32"})
    keys = ["preset", "part", "amp"]
    both = rows.pivot(index=keys, columns="what", values="ms").reindex(rows[keys].drop_duplicates())
    cells = [f"{row['qrnn']:.1f} / {row['lstm']:.1f} / {row['lstm'] / row['qrnn']:.2f}" for _, row in both.iterrows()]
    table = DataFrame(both.index.to_list(), columns=["preset", "what", "dtype"])
    return markdown(table.assign(**{"QRNN, ms / LSTM, ms / LSTM's time over the QRNN's": cells}))


# --- the tests -------------------------------------------------------------------------------------------------------


def tests() -> str:
    """Say how many tests passed, and which others did not and why, for a sentence."""
    rows = frame("tests")
    others = rows[rows["outcome"] != "passed"]
    reasons = others["test"].map("`{}` was ".format) + others["outcome"] + ": " + others["text"]
    return f"{len(rows) - len(others)} tests passed. " + " ".join(f"{reason}." for reason in reasons)


# --- the count on paper ----------------------------------------------------------------------------------------------

COUNTED = [name for name in WAYS if "pointwise" not in name]  # that is a single kernel, on CUDA alone
US_A_LAUNCH = {"eager": 5, "graph": 1}  # this and the next two were taken before anything was measured
TB_PER_S, TFLOP_PER_S = 3, 50


def least_us(work: count.Work, form: str) -> dict[str, float]:
    """Return the microseconds that a call takes at least by each of the three limits."""
    return {
        "launches": work.kernels * US_A_LAUNCH[form],
        "products": 1e-6 * work.flops / TFLOP_PER_S,
        "bytes": 1e-6 * work.bytes / TB_PER_S,
    }


def counted() -> str:
    """Return kernels and bytes of each way to pool, at a shape of T = 512, as a table."""
    shape, lines = PLAN.shapes[1], DataFrame(index=COUNTED)
    for backward, part in ((False, "forward"), (True, "forward + backward")):
        works = [count.pooling(shape, name, backward) for name in COUNTED]
        lines[f"{part}: kernels"] = [f"{work.kernels:,}" for work in works]
        lines[f"{part}: bytes a number"] = [f"{work.bytes / math.prod(shape):.0f}" for work in works]
    return wide(lines, "method")


def expected_pooling() -> str:
    """Return the least time of each way to pool forward, by launches, launches in a graph and bytes, as a table."""
    lines = DataFrame(index=COUNTED)
    for shape in PLAN.shapes:
        lines[str(shape)] = [
            "not tried" if not_tried(name, shape[1], False, PLAN) else expected(count.pooling(shape, name, False))
            for name in COUNTED
        ]
    return wide(lines, "method")


def expected(work: count.Work) -> str:
    """Return the cell of `expected_pooling` for a way to pool."""
    eager, graph = (least_us(work, form) for form in US_A_LAUNCH)
    return f"{eager['launches']:,.0f} / {graph['launches']:,.0f} / {eager['bytes']:,.0f}"


def counted_layer() -> str:
    """Return how many kernels a layer of Fig. 4 launches, and how many bytes they move, for a sentence."""
    short, long, batch = PLAN.lengths[0], PLAN.lengths[-1], PLAN.batches[-1]
    (few, many), (few_training, many_training) = (
        [count.qrnn(batch, length, training) for length in (short, long)] for training in (False, True)
    )
    numbers = batch * long * PLAN.width
    return (
        f"launches {few.kernels} kernels in inference at T = {short} and {many.kernels} at T = {long}, in training "
        f"{few_training.kernels} and {many_training.kernels}. At {batch} x {long} they move {many.bytes / numbers:.0f} "
        f"bytes a number of h in inference and {many_training.bytes / numbers:.0f} in training"
    )


def expected_layer(form: str) -> str:
    """Return the largest limit of a layer in each cell of Fig. 4, inference / training, as a table."""

    def cell(batch: int, length: int) -> str:
        limits = (least_us(count.qrnn(batch, length, training), form) for training in (False, True))
        return " / ".join("{0[0]} {0[1]:,.0f}".format(max(us.items(), key=lambda item: item[1])) for us in limits)

    lines = {batch: [cell(batch, length) for length in PLAN.lengths] for batch in PLAN.batches}
    table = DataFrame.from_dict(lines, orient="index", columns=list(PLAN.lengths))
    return wide(table, f"batch, {form} (inference / training)", "T = {:,}".format)


BLOCKS: dict[str, Callable[[], str]] = {
    "gpu limits": limits,
    "gpu forward": partial(pooling, "forward"),
    "gpu forward and backward": partial(pooling, "forward + backward"),
    "gpu not run": not_run,
    "gpu bandwidth": bandwidth,
    "gpu grid inference": partial(grid, "inference"),
    "gpu grid training": partial(grid, "training"),
    "gpu ranges inference": partial(ranges, "inference"),
    "gpu ranges training": partial(ranges, "training"),
    "gpu ranges inference, float32": partial(ranges, "inference", tf32=False),
    "gpu ranges training, float32": partial(ranges, "training", tf32=False),
    "gpu graph inference": partial(graph, "inference"),
    "gpu graph training": partial(graph, "training"),
    "gpu launches": launches,
    "gpu bradbury": bradbury,
    "gpu training steps": training_steps,
    "gpu tests": tests,
    "gpu count": counted,
    "gpu expected pooling": expected_pooling,
    "gpu count of a layer": counted_layer,
    "gpu expected layer, eager": partial(expected_layer, "eager"),
    "gpu expected layer, graph": partial(expected_layer, "graph"),
    **{f"gpu source {name}": partial(origin, name) for name in STEPS},
}
