"""The settings of the translation example and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from lab.run import RunConfig
from lab.settings import Chosen, Count, InputError, KernelSize, Layers, Range, check_text


@dataclass(frozen=True)
class Translation(Chosen):
    """Say what is translated."""

    preset: Literal["paper", "small", "demo"] = "paper"
    """The values that all other flags start from. Of a flag that is given twice the last counts.
    demo: strings to be reversed and mapped letter by letter; half a minute. --demo is short for it.
    small: 3 layers of 256 units; for Multi30k an hour on 2 CPU cores.
    paper: 4 layers of 320 units, as in the QRNN paper; for a GPU."""
    translate: str | None = None
    """Do not train: let the best models of the run --name translate this sentence."""

    corpus: Literal["files", "reversed"] = "files"
    """What to train on. files: those in the folder --data. reversed: generated strings and their mirror images."""
    data: Path | None = None
    """files: folder with train, val and test in both languages, a sentence on each line, as train.de and train.en."""
    source: str = "de"
    """files: the language to be translated, as the files name it."""
    target: str = "en"
    """files: the language to translate into."""
    max_length: Count = 300
    """Leave pairs with more characters on either side out of training; validation and test keep every pair."""
    batch_size: Count = 64
    """Sentence pairs that a step reads, over all processes together. The paper's 16 are slow on every machine."""
    reverse: bool = True
    """Read the source from its end to its beginning, as in the paper."""
    first_kernel_size: KernelSize = 6
    """QRNN: how many characters the encoder's first layer sees at each step."""
    causal_encoder: bool = False
    """QRNN: hide later steps from the encoder's layers. The paper does not."""
    bidirectional: bool = False
    """LSTM: let the encoder read the source both ways, each with half of the units."""

    beam_size: Annotated[int, Range(low=1, high=1000)] = 8
    """How many translations of a sentence the beam search follows at a time."""
    length_penalty: Annotated[float, Range(low=0, high=10)] = 0.6
    """How much the search prefers long translations (alpha of Wu et al. 2016). 0: not at all."""


@dataclass(frozen=True)
class Config(RunConfig, Translation):  # in --help the fields of the last base come first
    """Train a QRNN and an LSTM to translate by characters, and compare them.

    A preset sets every value, each flag changes one. Results go to runs/NAME.

    Without a GPU, start with --demo (half a minute), then --preset small (1 hour).
    """

    prefix: ClassVar[str] = "translation-"
    free: ClassVar[frozenset[str]] = RunConfig.free | {"data", "translate"}
    embedding: Count = 16
    """Width of the character vectors."""
    layers: Layers = 4
    """Recurrent layers of the encoder, and as many of the decoder, of either model."""
    mode: Literal["fo", "ifo"] = "fo"
    """QRNN: its gates, by their letters. fo: forget and output. ifo: input, forget and output."""

    def check(self) -> None:
        """Check every value before any work starts.

        Raises:
            InputError: if one is out of range, --data is given for strings that are generated, or a width is odd that
                must be halved.
        """
        super().check()
        if self.corpus == "reversed" and self.data is not None:
            raise InputError(f"--data {self.data}: given for strings that are generated; leave out --data or --demo")
        if self.bidirectional and not self.match and self.hidden % 2:
            raise InputError(f"--hidden {self.hidden}: an even number expected with --bidirectional")
        check_text("translate", self.translate or "")


PRESETS = {
    "paper": Config(hidden=320, dropout=0.2, optimizer="adam", weight_decay=0.0, clip=5.0, epochs=60),
    "small": Config(
        preset="small",
        batch_size=32,
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
        epochs=4,
        optimizer="adam",
        weight_decay=0.0,
        lr=5e-3,
        schedule="one-cycle",
        clip=1.0,
    ),
}
