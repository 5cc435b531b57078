"""Read what was measured as frames, and write frames as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

RESULTS = Path(__file__).parents[1] / "research" / "results"
INFERENCE, STACKED, STEP = "inference", "training inside a stack", "step by step"  # STACKED: with the input's gradient
STACK = "stack of one QRNN layer"


class NotMeasured(Exception):
    """Say which table the benchmark's file does not have, or nothing if there is no file."""


class Benchmark:
    """Read what was measured on a device.

    Attributes:
        origin: where the numbers come from, see `lab.provenance`.

    Raises:
        NotMeasured: if nothing was.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.file = f"benchmark-{device}.json"
        if not (RESULTS / self.file).exists():
            raise NotMeasured
        self._content = json.loads((RESULTS / self.file).read_text())
        self.origin = self._content["provenance"]

    def rows(self, table: str, **labels: object) -> DataFrame:
        """Return the rows of a table that have these labels, skipped ones included.

        Raises:
            NotMeasured: if the file does not have the table.
        """
        if table not in self._content:
            raise NotMeasured(table)
        rows = DataFrame(self._content[table])
        for name, value in labels.items():
            rows = rows[rows[name] == value]
        return rows

    def measured(self, table: str, **labels: object) -> DataFrame:
        """Return `rows` without those that say why something was skipped. Raises what `rows` raises."""
        rows = self.rows(table, **labels)
        return rows[rows["skipped"].isna()] if "skipped" in rows else rows

    def source(self) -> str:
        """Return where the numbers come from."""
        tables = (self.measured(name) for name in self._content if name != "provenance")
        rows = pd.concat([table for table in tables if "rounds" in table])
        spread = ((rows["ms_q3"] - rows["ms_q1"]) / rows["ms"]).median()
        return (
            f"{source(self.file, self.origin)} Each time is the median of {rows['rounds'].min():.0f} to "
            f"{rows['rounds'].max():.0f} rounds in which the compared things took turns. In half of the rows the "
            f"quartiles are at most {spread:.0%} apart."
        )

    def pooling_growth(self) -> DataFrame:
        """Return the times of pooling that show how it grows: narrow, forward and backward, B T constant."""
        rows = self.measured("pooling", dtype="float32", part="forward + backward")
        return rows[rows["H"] == rows["H"].min()]


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(table: DataFrame) -> str:
    """Return the table as it goes into a page: the first column to the left, the others to the right."""
    alignment = ["left", *["right"] * (table.shape[1] - 1)]
    return table.to_markdown(index=False, colalign=alignment, disable_numparse=True)


def wide(table: DataFrame | Series, header: str, column: Callable[[Any], str] = str) -> str:
    """Return the table with its index as first column, and the other columns renamed."""
    table = table.rename(columns=column).fillna("")
    table.insert(0, header, table.index)
    return markdown(table)


def source(name: str, origin: dict[str, Any]) -> str:
    """Return the sentence under a table that says where its numbers come from."""
    machine, versions = origin["machine"], origin["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    return (
        f"`research/results/{name}`: `{origin['command']}`, commit {origin['commit'][:9]}, seed {origin['seed']}, "
        f"{where}, torch {versions['torch']}, Python {versions['python']}."
    )


def span(values: Series) -> str:
    """Return the smallest and the largest value, as a range."""
    low, high = f"{values.min():.1f}", f"{values.max():.1f}"
    return low if low == high else f"{low} to {high}"
