"""The LSTM encoder-decoder that the QRNN is compared with: attention at the same place, the same way to be searched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from qrnn.seq2seq import attend


class LSTMState(NamedTuple):
    """Hold everything the decoder knows: of the source, and of the target so far.

    Attributes:
        h, c: (L, B, H), of the decoder's layers.
        keys: (B, S, H), outputs of the encoder's last layer.
        padding: (B, S) bool, True where the source is padded.
    """

    h: Tensor
    c: Tensor
    keys: Tensor
    padding: Tensor

    def index_select(self, index: Tensor) -> LSTMState:
        """Return the state of the sequences `index`, (N,) int64, of the batch."""
        h, c = (part.index_select(1, index) for part in (self.h, self.c))
        return LSTMState(h, c, self.keys.index_select(0, index), self.padding.index_select(0, index))


class LSTMSeq2Seq(nn.Module):
    """Encode and decode by LSTMs; the decoder starts from the encoder's last states, and attends after its last layer.

    The attention is that of Luong et al. 2015 (arXiv 1508.04025), global with the score `dot`, without input feeding:
    h~_t = tanh(W [k_t; h_t]) goes to the softmax (their eq. 5) and not back into the decoder. So a target that is known
    is decoded at all its steps in one call of nn.LSTM, as the QRNN's is.

    Args:
        source_vocabulary, target_vocabulary: number of different tokens.
        embedding_size: features of a token, in the encoder and in the decoder.
        hidden_size: units H of every layer.
        num_layers: layers L of the encoder, and of the decoder.
        dropout: probability of dropout on the outputs of each layer but the last, in training.
        bidirectional: whether the encoder reads the source both ways, in each direction with H / 2 units. Its last
            states of both are joined to those that the decoder starts from (Bahdanau et al. 2015, arXiv 1409.0473).

    Raises:
        ValueError: if the units of a bidirectional encoder cannot be halved.
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        directions = 1 + bidirectional
        if hidden_size % directions:
            raise ValueError(f"hidden_size {hidden_size}: an even number expected, for each direction has half of it")
        dropout = dropout if num_layers > 1 else 0.0  # nn.LSTM warns if there is nothing to drop
        self.source_embedding = nn.Embedding(source_vocabulary, embedding_size)
        self.target_embedding = nn.Embedding(target_vocabulary, embedding_size)
        self.encoder = nn.LSTM(
            embedding_size,
            hidden_size // directions,
            num_layers,
            batch_first=True,
            dropout=dropout,
            bidirectional=bidirectional,
        )
        self.decoder = nn.LSTM(embedding_size, hidden_size, num_layers, batch_first=True, dropout=dropout)
        self.attended = nn.Linear(2 * hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, target_vocabulary)

    def forward(self, source: Tensor, source_lengths: Tensor, target: Tensor) -> Tensor:
        """Compute the logits of the next token after each token of a known target, at all steps at once.

        Args:
            source: (B, S) int64; tokens from `source_lengths` on are padding, never seen.
            source_lengths: (B,) whole numbers from 1 to S.
            target: (B, T) int64, what the decoder is fed: <bos> and the tokens but the last.

        Returns:
            logits, (B, T, target_vocabulary).
        """
        return self._decode(target, self.start(source, source_lengths))[0]

    def start(self, source: Tensor, source_lengths: Tensor) -> LSTMState:
        """Encode the source; arguments as in `forward`. The state is that of an empty target."""
        padding = torch.arange(source.shape[1], device=source.device) >= source_lengths.unsqueeze(1)  # (B, S)
        encode = self._encode_both_ways if self.encoder.bidirectional else self._encode
        keys, h, c = encode(self.source_embedding(source), source_lengths)
        return LSTMState(h, c, keys, padding)

    def _encode(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs (B, S, H) and the states (L, B, H) after the last token of each source x, (B, S, E).

        Only steps that not all sources have are packed: on a CPU nn.LSTM takes three times as long over packed ones.
        """
        least = int(lengths.min())
        outputs, (h, c) = self.encoder(x[:, :least])
        longer = (lengths > least).nonzero().flatten()  # (N,), rows
        if len(longer) == 0:
            return outputs, h, c
        packed = pack_padded_sequence(
            x[longer, least:], lengths[longer].cpu() - least, batch_first=True, enforce_sorted=False
        )
        packed, last = self.encoder(packed, (h.index_select(1, longer), c.index_select(1, longer)))
        rest, _ = pad_packed_sequence(packed, batch_first=True)  # (N, S - least, H)
        beyond = rest.new_zeros(len(x), *rest.shape[1:]).index_copy(0, longer, rest)
        h, c = (before.index_copy(1, longer, after) for before, after in zip((h, c), last, strict=True))
        return torch.cat([outputs, beyond], dim=1), h, c

    def _encode_both_ways(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `_encode` does; the second direction ends at the first token."""
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        packed, last = self.encoder(packed)
        keys, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])  # (B, S, H)
        h, c = (torch.cat([state[::2], state[1::2]], dim=2) for state in last)  # (2L, B, H/2) -> (L, B, H)
        return keys, h, c

    def step(self, tokens: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState, Tensor]:
        """Make one step of a generation: what `forward` does, a token at a time.

        Args:
            tokens: (B,) int64, the last token of each target so far; bos at first.
            state: what `start` or the last step returned.

        Returns:
            logits of the next token, (B, target_vocabulary), the state after the step and the attention, (B, S).
        """
        logits, state, attention = self._decode(tokens.unsqueeze(1), state)
        return logits.squeeze(1), state, attention.squeeze(1)

    def _decode(self, target: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState, Tensor]:
        """Decode the next steps of the target, (B, T): logits (B, T, V), the state after them, attention (B, T, S)."""
        outputs, (h, c) = self.decoder(self.target_embedding(target), (state.h, state.c))  # (B, T, H)
        k, attention = attend(outputs, state.keys, state.padding)
        outputs = self.attended(torch.cat([k, outputs], dim=2)).tanh()
        return self.output(outputs), state._replace(h=h, c=c), attention
