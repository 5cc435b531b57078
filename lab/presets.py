"""The settings of the experiment and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lab.run import RunConfig
from lab.settings import check_range


@dataclass(frozen=True)
class Comparison:
    """What is compared: models and text."""

    preset: Literal["girrbach", "bradbury", "small", "demo"] = "girrbach"
    """Where all other flags start from.
    demo: an artificial language whose best possible perplexity is known; a minute.
    small: WikiText-2, small models; 40 minutes on 2 CPU cores.
    girrbach: WikiText-2 as in the log-space QRNN repository; for a GPU.
    bradbury: the Penn Treebank as in the QRNN paper; for a GPU."""
    generate: str | None = None
    """Do not train: let the best models of the run NAME continue this text."""

    models: tuple[Literal["qrnn", "lstm"], ...] = ("qrnn", "lstm")
    """Which models to train, in this order."""
    corpus: Literal["wikitext-2", "ptb", "text", "synthetic"] = "wikitext-2"
    """What to train on. text: your own, train.txt, valid.txt and test.txt in the folder --data."""
    data: Path | None = None
    """Folder with the corpus. None: where it was downloaded before, or download it (wikitext-2)."""
    protocol: Literal["sentence", "stream"] = "sentence"
    """The perplexities of one cannot be compared with those of the other.
    sentence: lower-cased sentences, each read on its own.
    stream: one long text, the models remember what came before, as in published numbers."""
    vocabulary: int | None = 10_000
    """How many different words to know, the most frequent ones; others count as <unk>. None: all."""
    batch_size: int = 32
    """Sentences (or rows of the stream) a step, over all processes together."""
    bptt: int = 105
    """stream: words of each row a step."""

    embedding: int = 300
    """Width of the word vectors."""
    hidden: int = 640
    """Width of each QRNN layer; the LSTM's follows from it, see --match."""
    layers: int = 2
    """Recurrent layers of either model."""
    match: bool = True
    """Give the LSTM as many recurrent parameters as the QRNN. --no-match: the same width."""
    forget_bias: float = 0.0
    """Added to the bias of the forget gates at the start, in either model; a positive one remembers longer."""
    dense: bool = False
    """Feed each layer with the word vectors and the outputs of all layers before it, in either model.
    The width stays, so there are more parameters."""
    kernel_size: int = 5
    """QRNN: how many words each step sees, itself and those before it."""
    first_kernel_size: int | None = None
    """QRNN: the same for the first layer alone. None: --kernel-size."""
    mode: Literal["f", "fo", "ifo"] = "fo"
    """QRNN: its gates: forget; forget and output; input, forget and output."""
    activation: Literal["softplus", "exp", "sigmoid", "relu", "tanh", "identity"] = "softplus"
    """QRNN: of the candidate. tanh is the paper's; a positive one is pooled faster in log space."""
    zoneout: float = 0.1
    """QRNN: probability that a channel keeps its state for a step, in training."""
    method: Literal["auto", "loop", "log", "blocked", "scan"] = "auto"
    """QRNN: how the recurrence is computed; all give the same result.
    auto: scan on a CPU, where it is the fastest, blocked on a GPU."""
    dropout: float = 0.4
    """Dropout between the recurrent layers."""
    dropout_embedding: float = 0.0
    """Dropout on the word vectors."""
    dropout_output: float = 0.0
    """Dropout before the softmax."""
    tied: bool = False
    """Use the word vectors as the weights of the softmax too."""


@dataclass(frozen=True)
class Config(RunConfig, Comparison):  # in --help the fields of the last base come first
    """Train a QRNN and an LSTM on the same text in the same way, and compare them.

    A preset sets everything, each flag changes one thing. The comparison and all else goes to runs/NAME.
    Without a GPU start with --preset demo (a minute), then --preset small (40 minutes on 2 CPU cores).
    """

    names: ClassVar[dict[str, str]] = {"qrnn": "QRNN", "lstm": "LSTM"}
    free: ClassVar[frozenset[str]] = RunConfig.free | {"data", "generate"}

    def check(self) -> None:
        """Raises InputError: a value out of range."""
        super().check()
        for name in ("batch_size", "bptt", "embedding", "hidden", "layers", "kernel_size"):
            check_range(name, getattr(self, name), low=1)
        for name in ("zoneout", "dropout", "dropout_embedding", "dropout_output"):
            check_range(name, getattr(self, name), low=0, high=1)
        check_range("forget_bias", self.forget_bias, low=-20, high=20)
        if self.first_kernel_size is not None:
            check_range("first_kernel_size", self.first_kernel_size, low=1)
        if self.vocabulary is not None:
            check_range("vocabulary", self.vocabulary, low=3)  # <eos>, <unk> and a word


PRESETS = {
    "girrbach": Config(),
    "bradbury": Config(
        preset="bradbury",
        corpus="ptb",
        protocol="stream",
        vocabulary=None,
        batch_size=20,
        bptt=105,
        embedding=640,
        hidden=640,
        kernel_size=2,
        activation="tanh",
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
    "small": Config(
        preset="small",
        batch_size=64,
        embedding=208,
        hidden=251,
        kernel_size=2,
        activation="tanh",
        zoneout=0.0,
        dropout=0.25,
        dropout_embedding=0.25,
        dropout_output=0.25,
        tied=True,
        epochs=4,
        lr=4e-3,
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
        kernel_size=2,
        dropout=0.0,
        zoneout=0.0,
        epochs=8,
        lr=5e-3,
        schedule="one-cycle",
        clip=1.0,
    ),
}
