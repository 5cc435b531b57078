"""The classifiers that are compared: word vectors, QRNN or LSTM, one number for a review; and their loss."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.sentiment.config import Config
from examples.sentiment.data import Batch
from lab.dense_lstm import DenseLSTM
from lab.initial import initialise
from lab.losses import summed
from lab.run import lstm_width
from lab.training import Carried
from qrnn import QRNN

INITIAL_RANGE = 0.25  # of the random word vectors: as in the CNN of Kim 2014, whose 76.1 % is the mark for mr


class Classifier(nn.Module):
    """Read a review and say how likely it is positive, from the output of the last layer at the last word.

    Args:
        rnn: (B, T, embedding) -> (B, T, hidden), and a state. It must never look ahead: padding comes after the words.
        hidden: the width of its output.
        vocabulary: number of words.
        embedding: width of the word vectors.
        dropout: probability, on the word vectors and before the classifier.
    """

    def __init__(self, rnn: nn.Module, hidden: int, vocabulary: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.rnn, self.hidden = rnn, hidden
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.dropout = nn.Dropout(dropout)
        self.logit = nn.Linear(hidden, 1)
        nn.init.uniform_(self.embedding.weight, -INITIAL_RANGE, INITIAL_RANGE)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Compute the log-odds of "positive", (B,).

        Args:
            words: (B, T), int64.
            lengths: (B,), at least 1: what comes after words[b, : lengths[b]] is padding.
        """
        h, _ = self.rnn(self.dropout(self.embedding(words)))  # (B, T, H)
        encoded = h[torch.arange(len(h), device=h.device), lengths - 1]  # (B, H)
        return self.logit(self.dropout(encoded)).squeeze(1)


def build_qrnn(config: Config, hidden: int) -> QRNN:
    return QRNN(
        config.embedding,
        hidden,
        config.layers,
        batch_first=True,
        dropout=config.dropout_between,
        kernel_size=config.kernel_size,
        first_kernel_size=config.kernel_size,
        mode=config.mode,
        zoneout=config.zoneout,
        mean_zoneout=True,
        activation=config.activation,
        dense=True,
        method=config.method,
    )


def build_lstm(config: Config, hidden: int) -> DenseLSTM:
    return DenseLSTM(config.embedding, hidden, config.layers, config.dropout)


def build_model(config: Config, name: str, vocabulary: int) -> Classifier:
    """Return the classifier "qrnn" or "lstm", initialised from the seed."""
    hidden, build = config.hidden, {"qrnn": build_qrnn, "lstm": build_lstm}[name]
    if name == "lstm" and config.match:
        hidden = lstm_width(hidden, partial(build_qrnn, config), partial(build_lstm, config))
    torch.manual_seed(config.seed)
    rnn = build(config, hidden)
    initialise(rnn, config)
    return Classifier(rnn, hidden, vocabulary, config.embedding, config.dropout)


def label_loss(model: nn.Module, batch: Batch, carried: Carried) -> tuple[Tensor, Tensor, Carried]:
    """Return the negative log-likelihoods of the labels, summed, in nats; how many; no state. A `training.Step`."""
    logits = model(batch.words, batch.lengths).float()  # (B,)
    losses = F.binary_cross_entropy_with_logits(logits, batch.labels.float(), reduction="none")
    return summed(losses), losses.new_tensor(len(losses)), None
