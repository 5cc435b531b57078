"""List the experiments that studies run: their presets, and what tells one text from another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import examples.sentiment.config as sentiment
import examples.translation.config as translation
from examples.sentiment.data import load_reviews
from examples.translation.data import read_parallel, sha256_of_lines
from lab import presets
from lab.corpora import load_corpus
from lab.run import RunConfig


class Experiment(NamedTuple):
    """Name what a study has to know of an experiment.

    Attributes:
        presets: of its command line.
        deciding: the names of the settings that decide which text is read.
        text: their values -> the sha256 of the text. It raises CorpusError if the text is not there.
    """

    presets: dict[str, Any]
    deciding: tuple[str, ...]
    text: Callable[..., str]

    def reads(self, config: RunConfig, data: Path) -> tuple[Any, ...]:
        """Return what `text` needs, with the corpus in the folder `data`."""
        return tuple(data if name == "data" else getattr(config, name) for name in self.deciding)


def words(corpus: str, data: Path) -> str:
    return load_corpus(corpus, data).sha256_of_words


def pairs(data: Path, source: str, target: str, max_length: int) -> str:
    return sha256_of_lines(read_parallel(data, source, target), max_length)


def reviews(corpus: str, data: Path, fold: int, seed: int) -> str:
    return load_reviews(corpus, data, fold, seed).sha256


LANGUAGE = Experiment(presets.PRESETS, ("corpus", "data"), words)
EXPERIMENTS = {
    "experiment": LANGUAGE,
    "examples.translation": Experiment(translation.PRESETS, ("data", "source", "target", "max_length"), pairs),
    "examples.sentiment": Experiment(sentiment.PRESETS, ("corpus", "data", "fold", "seed"), reviews),
}
