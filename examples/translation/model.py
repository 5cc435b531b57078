"""The encoder-decoders that are compared, QRNN or LSTM, and their loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from examples.translation.config import Config
from examples.translation.data import Batch
from examples.translation.lstm_seq2seq import LSTMSeq2Seq
from lab.initial import initialise
from lab.losses import token_loss
from lab.run import lstm_width
from lab.training import Carried
from qrnn.seq2seq import QRNNSeq2Seq

Translator = QRNNSeq2Seq | LSTMSeq2Seq


def build_qrnn(config: Config, hidden: int, vocabulary: int) -> QRNNSeq2Seq:
    return QRNNSeq2Seq(
        vocabulary,
        vocabulary,
        config.embedding,
        hidden,
        config.layers,
        config.dropout,
        kernel_size=config.kernel_size,
        first_kernel_size=config.first_kernel_size,
        causal_encoder=config.causal_encoder,
        mode=config.mode,
        zoneout=config.zoneout,
        mean_zoneout=True,
        activation=config.activation,
        method=config.method,
    )


def build_lstm(config: Config, hidden: int, vocabulary: int) -> LSTMSeq2Seq:
    return LSTMSeq2Seq(
        vocabulary, vocabulary, config.embedding, hidden, config.layers, config.dropout, config.bidirectional
    )


def build_model(config: Config, name: str, vocabulary: int) -> Translator:
    """Return the translator "qrnn" or "lstm", initialised from the seed."""
    builders: dict[str, Callable[[Config, int, int], Translator]] = {"qrnn": build_qrnn, "lstm": build_lstm}
    hidden, build = config.hidden, builders[name]
    if name == "lstm" and config.match:
        directions = 1 + config.bidirectional  # which share the units
        hidden = directions * lstm_width(
            hidden,
            lambda width: recurrent_part(build_qrnn(config, width, vocabulary)),
            lambda width: recurrent_part(build_lstm(config, directions * width, vocabulary)),
        )
    torch.manual_seed(config.seed)
    model = build(config, hidden, vocabulary)
    initialise(model, config)
    model.hidden = hidden  # type: ignore[assignment]  # nn.Module is typed to have tensors and modules alone
    return model


def recurrent_part(model: Translator) -> nn.ModuleList:
    """Return all but the embeddings and the softmax."""
    outside = (model.source_embedding, model.target_embedding, model.output)
    return nn.ModuleList(child for child in model.children() if child not in outside)


def next_character_loss(model: nn.Module, batch: Batch, carried: Carried) -> tuple[Tensor, Tensor, Carried]:
    """Return the `token_loss` of a batch, and no state. A `training.Step`."""
    logits = model(batch.source, batch.source_lengths, batch.inputs)  # (B, T, V)
    return *token_loss(logits, batch.targets), None
