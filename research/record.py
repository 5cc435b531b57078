"""Read the files of research/results."""

from __future__ import annotations

import json
from typing import Any

from pandas import DataFrame

from benchmarks.record import RESULTS
from research import jobs


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def finished_runs(name: str) -> DataFrame:
    """Return the runs in results/NAME.json that did not fail: a row for each, its label as index.

    The columns are the settings of the run and its results; `curve` is what each epoch came to, `fit` the
    perplexity of the training text in the last one, where there is one.
    """
    rows = {}
    for label, run in jobs.on_record(name).items():
        if "error" not in run:
            (model,) = run["models"]
            sizes = f"{model['recurrent_parameters']:,} / {model['parameters']:,}"
            curve = model.pop("epochs")  # `epochs` is the setting
            fit = curve[-1].get("train_perplexity")
            rows[label] = run["config"] | model | {"sizes": sizes, "curve": curve, "fit": fit}
    return DataFrame.from_dict(rows, orient="index")
