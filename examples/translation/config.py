"""The settings of the translation example and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lab.run import RunConfig
from lab.settings import check_range


@dataclass(frozen=True)
class Translation:
    """What is translated, and by which models."""

    preset: Literal["paper", "small", "demo"] = "paper"
    """Where all other flags start from.
    demo: strings to be reversed and mapped letter by letter; half a minute. --demo for short.
    small: 3 layers of 256; for Multi30k an hour on 2 CPU cores.
    paper: 4 layers of 320, as in the QRNN paper; for a GPU."""
    translate: str | None = None
    """Do not train: let the best models of the run NAME translate this sentence."""

    models: tuple[Literal["qrnn", "lstm"], ...] = ("qrnn", "lstm")
    """Which models to train, in this order."""
    corpus: Literal["files", "reversed"] = "files"
    """What to train on. files: those in the folder --data. reversed: generated strings and their mirror images."""
    data: Path | None = None
    """files: folder with train, val and test of both languages, a sentence a line: train.de, train.en ...."""
    source: str = "de"
    """files: extension of the language to be translated."""
    target: str = "en"
    """files: extension of the language to translate into."""
    max_length: int = 300
    """Pairs with more characters on either side are left out of training; validation and test keep every pair."""
    batch_size: int = 64
    """Sentence pairs a step, over all processes together. The paper's 16 are slow on every machine."""
    reverse: bool = True
    """Read the source from its end to its beginning, as in the paper."""

    embedding: int = 16
    """Width of the character vectors."""
    hidden: int = 320
    """Width of each QRNN layer; the LSTM's follows from it, see --match."""
    layers: int = 4
    """Recurrent layers of the encoder, and as many of the decoder, of either model."""
    match: bool = True
    """Give the LSTM as many recurrent parameters as the QRNN. --no-match: the same width."""
    kernel_size: int = 2
    """QRNN: how many steps each convolution sees, but for the encoder's first."""
    first_kernel_size: int = 6
    """QRNN: how many characters the encoder's first convolution sees."""
    causal_encoder: bool = False
    """QRNN: let the encoder's convolutions see no later step. The paper does not mask them."""
    mode: Literal["fo", "ifo"] = "fo"
    """QRNN: its gates: forget and output; input, forget and output."""
    activation: Literal["softplus", "exp", "sigmoid", "relu", "tanh", "identity"] = "tanh"
    """QRNN: of the candidate. tanh is the paper's."""
    zoneout: float = 0.0
    """QRNN: probability that a channel keeps its state for a step, in training."""
    method: Literal["auto", "loop", "log", "blocked", "scan"] = "auto"
    """QRNN: how the recurrence is computed; all give the same result.
    auto: scan on a CPU, where it is the fastest, blocked on a GPU."""
    dropout: float = 0.2
    """Dropout between the recurrent layers."""

    beam_size: int = 8
    """Translations of a sentence that the search follows at a time."""
    length_penalty: float = 0.6
    """0 prefers short translations, more prefers longer ones (alpha of Wu et al. 2016)."""


@dataclass(frozen=True)
class Config(RunConfig, Translation):  # in --help the fields of the last base come first
    """Train a QRNN and an LSTM to translate character by character in the same way, and compare them.

    A preset sets everything, each flag changes one thing. The comparison and all else goes to runs/NAME.
    Without a GPU start with --preset demo (half a minute), then --preset small (an hour on 2 CPU cores).
    """

    prefix: ClassVar[str] = "translation-"
    names: ClassVar[dict[str, str]] = {"qrnn": "QRNN", "lstm": "LSTM"}
    free: ClassVar[frozenset[str]] = RunConfig.free | {"data", "translate"}

    def check(self) -> None:
        """Raises InputError: a value out of range."""
        super().check()
        sizes = ("max_length", "batch_size", "embedding", "hidden", "layers", "kernel_size", "first_kernel_size")
        for name in (*sizes, "beam_size"):
            check_range(name, getattr(self, name), low=1)
        for name in ("zoneout", "dropout"):
            check_range(name, getattr(self, name), low=0, high=1)
        check_range("length_penalty", self.length_penalty, low=0)


PRESETS = {
    "paper": Config(optimizer="adam", weight_decay=0.0, clip=5.0, epochs=60),
    "small": Config(
        preset="small",
        batch_size=32,
        hidden=256,
        layers=3,
        dropout=0.1,
        epochs=6,
        optimizer="adam",
        weight_decay=0.0,
        lr=2e-3,
        schedule="one-cycle",
        clip=1.0,
        amp="bf16",
        checkpoint_minutes=2.0,
    ),
    "demo": Config(
        preset="demo",
        corpus="reversed",
        batch_size=16,
        hidden=128,
        layers=1,
        dropout=0.0,
        epochs=4,
        optimizer="adam",
        weight_decay=0.0,
        lr=5e-3,
        schedule="one-cycle",
        clip=1.0,
    ),
}
