"""The QRNN encoder-decoder with attention (Bradbury et al. 2016, section 2.1).

    z = tanh(W_z * X + V_z h~_S), gates alike    the decoder's convolutions are told the encoder's last state (eq. 7)
    alpha_st = softmax_s(c_t . h~_s)             attention of the decoder's cell states on the source (eq. 8)
    k_t = sum_s alpha_st h~_s                    what it reads there
    h_t = o_t * (W_k k_t + W_c c_t + b)          what goes to the softmax over the vocabulary

Attention never feeds back into c, so a target that is known is decoded at all its steps at once: training has no loop
over time. Glossary, besides that of `qrnn_layer`:
    S T      tokens of the source and of the target
    h~       (B, S, H), outputs of the encoder's last layer, the keys and values of the attention
    bos eos  the token that a target starts after, and the one that ends it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrnn.fast import FastQRNNLayer
from qrnn.stack import check_flag
from qrnn_layer import (
    MODES,
    QRNNLayer,
    QRNNState,
    check_lengths,
    check_probability,
    check_size,
    check_tensor,
    expect,
)

WHOLE = (torch.int64, torch.int32)  # dtypes of tokens and lengths

# --- the layers -------------------------------------------------------------------------------------------------------


class CentredLayer(FastQRNNLayer):
    """Run a layer of an encoder, which sees ahead: step t sees the inputs t - K // 2 ... t + (K - 1) // 2.

    It takes no state, since it must be given whole sequences.
    """

    def forward(
        self, x: Tensor, state: QRNNState | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, QRNNState]:
        """Run the layer as `QRNNLayer` does; raise ValueError if a state is given."""
        expect(state is None, "state", type(state), "None: a centred layer looks ahead and takes whole sequences")
        return super().forward(x, None, lengths)

    def _run(self, window: Tensor, x: Tensor, c0: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        ahead, before = (self.kernel_size - 1) // 2, window.shape[1]
        seen = F.pad(torch.cat([window, x], dim=1)[:, ahead:], (0, 0, 0, ahead))
        return super()._run(seen[:, :before], seen[:, before:], c0, keep)


class DecoderLayer(QRNNLayer):
    """Run a layer of a decoder, which is told of another sequence and shows its cells before the output gate."""

    def cells(self, x: Tensor, state: QRNNState, condition: Tensor) -> tuple[Tensor, Tensor, QRNNState]:
        """Return c and o, (B, T, H) each, at least float32, and the state after the last step.

        Args:
            x: (B, T, F).
            state: what an earlier call returned, or `initial_state`.
            condition: (B, rows of `weight`), added to the pre-activations of every step (V h~ of eq. 7).
        """
        state = self._check_input(x, state)
        seen = torch.cat([state.window, x], dim=1)  # (B, K-1+T, F)
        c, o = self._cells(self._project(seen) + condition.unsqueeze(1), state.c, self._keep(x))
        assert o is not None  # `QRNNSeq2Seq` takes no mode without an output gate
        time = x.shape[1]
        return c, o, QRNNState((c[:, -1] if time else state.c).clone(), seen[:, time:].clone())


Layer = TypeVar("Layer", bound=QRNNLayer)


# --- the model -------------------------------------------------------------------------------------------------------


class Seq2SeqState(NamedTuple):
    """Hold everything that the decoder knows: of the source, and of the target so far.

    Attributes:
        layers: for each decoder layer its `QRNNState`.
        conditions: for each decoder layer (B, rows of its `weight`), V h~ of eq. 7.
        keys: (B, S, H), h~.
        padding: (B, S) bool, True where the source is padded.
    """

    layers: tuple[QRNNState, ...]
    conditions: tuple[Tensor, ...]
    keys: Tensor
    padding: Tensor

    def index_select(self, index: Tensor) -> Seq2SeqState:
        """Return the state of the sequences `index`, (N,) int64: a beam search goes on with those that it keeps."""
        return Seq2SeqState(
            layers=tuple(QRNNState(*(part.index_select(0, index) for part in layer)) for layer in self.layers),
            conditions=tuple(condition.index_select(0, index) for condition in self.conditions),
            keys=self.keys.index_select(0, index),
            padding=self.padding.index_select(0, index),
        )


class QRNNSeq2Seq(nn.Module):
    """Encode and decode by as many QRNN layers each; decoder layer l is told the last state of encoder layer l.

    >>> model = QRNNSeq2Seq(source_vocabulary=60, target_vocabulary=50, hidden_size=64, num_layers=2)
    >>> source, lengths = torch.randint(60, (8, 30)), torch.full((8,), 30)
    >>> logits = model(source, lengths, torch.randint(50, (8, 25)))      # (8, 25, 50), all 25 steps at once
    >>> best = beam_search(model, source, lengths, bos=1, eos=2, max_length=40)

    The paper feeds the source reversed, does not mask the encoder's convolutions and pools tanh candidates: 4 layers of
    320, embeddings of 16 for characters, kernels of 6 in the first encoder layer and of 2 elsewhere. Reversing is up to
    whoever makes the batches. "The last encoder state" is here the cell state c after the last real token.

    Args:
        source_vocabulary, target_vocabulary: number of different tokens.
        embedding_size: features of a token, in the encoder and in the decoder.
        hidden_size: channels H of every layer.
        num_layers: layers of the encoder, and of the decoder.
        dropout: probability of dropout on the outputs of each layer but the last, in the encoder and in the decoder, in
            training. As in `nn.LSTM`, embeddings and the last layer's outputs are left alone.
        kernel_size: width K of all convolutions but the encoder's first.
        first_kernel_size: width of the encoder's first. Default: `kernel_size`.
        causal_encoder: False centres the encoder's convolutions, see `CentredLayer`. The decoder's are always causal.
        mode: "fo" or "ifo"; there is no eq. 8 without an output gate.
        zoneout, mean_zoneout, activation, method, device, dtype: of each layer, see `QRNNLayer`.

    Raises:
        TypeError: if a size is no whole number, or a flag no bool.
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        embedding_size: int = 16,
        hidden_size: int = 320,
        num_layers: int = 4,
        dropout: float = 0.0,
        *,
        kernel_size: int = 2,
        first_kernel_size: int | None = None,
        causal_encoder: bool = True,
        mode: str = "fo",
        zoneout: float = 0.0,
        mean_zoneout: bool = False,
        activation: str = "tanh",
        method: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        first_kernel_size = kernel_size if first_kernel_size is None else first_kernel_size
        sizes = {"source_vocabulary": source_vocabulary, "target_vocabulary": target_vocabulary}
        sizes |= {"embedding_size": embedding_size, "num_layers": num_layers, "first_kernel_size": first_kernel_size}
        for name, size in sizes.items():
            check_size(name, size)
        check_probability("dropout", dropout)
        check_flag("causal_encoder", causal_encoder)
        expect(str(mode) in ("fo", "ifo"), "mode", mode, "fo or ifo, for attention needs an output gate (eq. 8),")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"mode": mode, "zoneout": zoneout, "mean_zoneout": mean_zoneout}
        options |= {"activation": activation, "method": method, **place}

        def stack(layer_class: type[Layer], first_kernel_size: int) -> Sequence[Layer]:
            features = [embedding_size] + [hidden_size] * (num_layers - 1)
            widths = [first_kernel_size] + [kernel_size] * (num_layers - 1)
            return nn.ModuleList(  # type: ignore[return-value]  # it cannot say of what
                layer_class(size, hidden_size, width, **options) for size, width in zip(features, widths, strict=True)
            )

        self.encoder = stack(FastQRNNLayer if causal_encoder else CentredLayer, first_kernel_size)
        self.decoder = stack(DecoderLayer, kernel_size)
        self.source_embedding = nn.Embedding(source_vocabulary, embedding_size, **place)
        self.target_embedding = nn.Embedding(target_vocabulary, embedding_size, **place)
        rows = MODES[mode] * hidden_size
        self.conditions = nn.ModuleList(nn.Linear(hidden_size, rows, bias=False, **place) for _ in range(num_layers))
        self.w_k = nn.Linear(hidden_size, hidden_size, bias=False, **place)
        self.w_c = nn.Linear(hidden_size, hidden_size, **place)
        self.output = nn.Linear(hidden_size, target_vocabulary, **place)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, source: Tensor, source_lengths: Tensor | Sequence[int], target: Tensor, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits of the next token after each token of a known target, at all steps at once.

        Args:
            source: (B, S) int64 tokens; those from `source_lengths` on are padding, of any content, and never seen.
            source_lengths: (B,) whole numbers from 1 to S, on any device. The range is checked on the CPU in eager
                mode; elsewhere the check would make a GPU wait. So it is for the range of tokens.
            target: (B, T) int64, what the decoder is fed: <bos> and the tokens but the last. Padding at its end needs
                no lengths, for no step sees a later one: leave it out of the loss.
            return_attention: whether to return alpha too.

        Returns:
            logits, (B, T, target_vocabulary); with `return_attention` also alpha, (B, T, S), at least float32: each row
            sums to 1 and is 0 where the source is padded.

        Raises:
            TypeError: if an argument is no tensor.
            ShapeError: if a tensor does not fit, in shape or dtype; it is a ValueError and a RuntimeError.
            ValueError: if a token or a length is out of range.
        """
        state = self.start(source, source_lengths)
        check_tensor("target", target, (len(source), "T"), None, *WHOLE)
        _check_range("target", target, 0, self.target_embedding.num_embeddings - 1)
        logits, _, attention = self._decode(target, state)
        return (logits, attention) if return_attention else logits

    def start(self, source: Tensor, source_lengths: Tensor | Sequence[int]) -> Seq2SeqState:
        """Encode the source; arguments and errors as in `forward`. The state is that of an empty target."""
        check_tensor("source", source, ("B", "S"), None, *WHOLE)
        lengths = check_lengths(source_lengths, len(source), source.shape[1], "source_lengths", least=1)
        lengths = lengths.to(source.device)
        padding = torch.arange(source.shape[1], device=source.device) >= lengths.unsqueeze(1)  # (B, S)
        source = source.masked_fill(padding, 0)
        _check_range("source", source, 0, self.source_embedding.num_embeddings - 1)

        h = embedded = self.source_embedding(source)  # (B, S, E)
        conditions = []
        for index, (layer, v) in enumerate(zip(self.encoder, self.conditions, strict=True)):
            h, last = layer(self.dropout(h) if index else h, lengths=lengths)  # (B, S, H)
            conditions.append(v(last.c.to(h.dtype)))  # (B, MODES*H)
        layers = tuple(layer.initial_state(len(source), embedded) for layer in self.decoder)
        return Seq2SeqState(layers, tuple(conditions), h, padding)

    def step(self, tokens: Tensor, state: Seq2SeqState) -> tuple[Tensor, Seq2SeqState, Tensor]:
        """Run one step of a generation: what `forward` does, a token at a time.

        Args:
            tokens: (B,) int64, the last token of each target so far; bos at first.
            state: what `start` or the last step returned.

        Returns:
            logits of the next token, (B, target_vocabulary), the state after the step and alpha, (B, S).

        Raises:
            TypeError, ShapeError, ValueError: if `forward` would raise them.
        """
        check_tensor("tokens", tokens, (len(state.keys),), None, *WHOLE)
        _check_range("tokens", tokens, 0, self.target_embedding.num_embeddings - 1)
        logits, state, attention = self._decode(tokens.unsqueeze(1), state)
        return logits.squeeze(1), state, attention.squeeze(1)

    def _decode(self, target: Tensor, state: Seq2SeqState) -> tuple[Tensor, Seq2SeqState, Tensor]:
        """Decode the next steps of the target, (B, T): logits (B, T, V), the state after them, alpha (B, T, S)."""
        h = self.target_embedding(target)  # (B, T, E)
        states: list[QRNNState] = []
        for layer, before, condition in zip(self.decoder, state.layers, state.conditions, strict=True):
            x = self.dropout(h) if states else h
            c, o, after = layer.cells(x, before, condition)  # (B, T, H)
            h = (o * c).to(x.dtype)
            states.append(after)
        k, attention = attend(c, state.keys, state.padding)
        h = o * (self.w_k(k) + self.w_c(c.to(k.dtype)))  # (B, T, H)
        state = Seq2SeqState(tuple(states), state.conditions, state.keys, state.padding)
        return self.output(h.to(k.dtype)), state, attention


def attend(c: Tensor, keys: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Attend: alpha_st = softmax_s(c_t . h~_s) and k_t = sum_s alpha_st h~_s (eq. 8).

    Args:
        c: (B, T, H), the decoder's cell states before their output gate.
        keys: (B, S, H), h~; matrix products are computed in its dtype, the softmax in that of c.
        padding: (B, S) bool, True where the source is padded.

    Returns:
        k, (B, T, H), and alpha, (B, T, S), exactly 0 where padded.
    """
    scores = (c.to(keys.dtype) @ keys.mT).to(c.dtype)  # (B, T, S)
    lowest = torch.finfo(scores.dtype).min  # -inf would make NaN of a source without any token
    weights = scores.masked_fill(padding.unsqueeze(1), lowest).softmax(dim=2)
    return weights.to(keys.dtype) @ keys, weights


# --- errors ----------------------------------------------------------------------------------------------------------


def _check_range(name: str, array: Tensor, least: int, most: int) -> None:
    if array.device.type != "cpu" or torch.compiler.is_compiling():
        return  # to look at values would make a GPU wait, or break a graph
    wrong = (array < least) | (array > most)
    if wrong.any():
        raise ValueError(f"{name}: {array[wrong][0].item()} given, numbers from {least} to {most} expected")
