"""The settings of the experiment and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lab.run import RunConfig
from lab.settings import Chosen, Count, KernelSize, Probability, Words, check_text


@dataclass(frozen=True)
class Text(Chosen):
    """Say what is read."""

    preset: Literal["small", "demo", "girrbach", "bradbury"] = "small"
    """The values that all other flags start from. Of a flag that is given twice the last counts.
    small: WikiText-2 and small models, tuned alike; 40 minutes on 2 CPU cores.
    demo: a generated language whose best possible perplexity is known; a minute. --demo is short for it.
    girrbach: WikiText-2 as in the log-space QRNN repository of L. Girrbach; for a GPU.
    bradbury: the Penn Treebank as in the QRNN paper, Bradbury et al. 2016; for a GPU."""
    generate: str | None = None
    """Do not train: let the best models of the run --name continue this text."""

    corpus: Literal["wikitext-2", "ptb", "text", "synthetic"] = "wikitext-2"
    """What to train on. wikitext-2: is downloaded if need be. ptb: the Penn Treebank, in the folder --data.
    text: your own, in the files train.txt, valid.txt and test.txt of the folder --data. synthetic: generated."""
    data: Path | None = None
    """Folder with the corpus. none: where it was downloaded before, else download it (wikitext-2)."""
    protocol: Literal["sentence", "stream"] = "sentence"
    """How the text is read; perplexities of one cannot be compared with those of the other.
    sentence: lower-cased sentences, each read on its own.
    stream: one long text, in which the models remember what came before, as in published numbers."""
    vocabulary: Words | None = 10_000
    """How many different words to know, the most frequent ones; all others become <unk>. none: all of them."""
    batch_size: Count = 32
    """Sentences (or rows of the stream) that a step reads, over all processes together."""
    bptt: Count = 105
    """stream: how many words of each row a step reads."""
    dense: bool = False
    """Feed each layer with the word vectors and the outputs of all layers before it, in either model.
    The width stays, so there are more parameters."""
    first_kernel_size: KernelSize | None = None
    """QRNN: --kernel-size of the first layer alone. none: that of the other layers."""
    dropout_embedding: Probability = 0.0
    """Dropout on the word vectors."""
    dropout_output: Probability = 0.0
    """Dropout before the softmax, the layer that names the next word."""
    tied: bool = False
    """Use the word vectors as the weights of the softmax too."""


@dataclass(frozen=True)
class Config(RunConfig, Text):  # in --help the fields of the last base come first
    """Train a QRNN and an LSTM on the same text in the same way, and compare them.

    A preset sets every value, each flag changes one. Results go to runs/NAME.

    Start with --demo (1 minute). Without flags it is the preset small (40 minutes).
    """

    free: ClassVar[frozenset[str]] = RunConfig.free | {"data", "generate"}

    def check(self) -> None:
        """Check every value before any work starts.

        Raises:
            InputError: if one is out of range.
        """
        super().check()
        check_text("generate", self.generate or "")


PRESETS = {
    "small": Config(
        preset="small",
        batch_size=64,
        embedding=208,
        hidden=292,
        first_kernel_size=1,
        dropout=0.1,
        dropout_embedding=0.1,
        dropout_output=0.1,
        tied=True,
        epochs=4,
        lr=8e-3,
        schedule="one-cycle",
        clip=1.0,
        checkpoint_minutes=2.0,
    ),
    "demo": Config(
        preset="demo",
        corpus="synthetic",
        vocabulary=None,
        batch_size=16,
        embedding=64,
        hidden=192,
        layers=1,
        activation="softplus",
        epochs=8,
        lr=5e-3,
        schedule="one-cycle",
        clip=1.0,
    ),
    "girrbach": Config(preset="girrbach", hidden=640, kernel_size=5, activation="softplus", zoneout=0.1, dropout=0.4),
    "bradbury": Config(
        preset="bradbury",
        corpus="ptb",
        protocol="stream",
        vocabulary=None,
        batch_size=20,
        bptt=105,
        embedding=640,
        hidden=640,
        zoneout=0.1,
        dropout=0.5,
        dropout_embedding=0.5,
        dropout_output=0.5,
        epochs=72,
        optimizer="sgd",
        schedule="decay",
        # The paper sums the loss over the 105 steps, this project takes the mean: these make the same updates as the
        # paper's learning rate 1, clipping at 10 and L2 2e-4.
        lr=1.0 * 105,
        clip=10 / 105,
        weight_decay=2e-4 / 105,
    ),
}
