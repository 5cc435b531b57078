"""The language models that are compared: embedding, QRNN or LSTM, softmax; and what to do with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from lab.batches import UNK, Batch
from lab.losses import token_loss
from lab.synthetic import EOS
from lab.training import Carried

INITIAL_RANGE = 0.1  # of embedding and softmax: with larger ones a tied softmax starts far from uniform


class LanguageModel(nn.Module):
    """Predict each next word.

    Args:
        rnn: called like `nn.LSTM` with batch_first, (B, T, embedding) -> (B, T, hidden).
        hidden: the width of its output.
        vocabulary: number of words.
        embedding: width of the word vectors.
        dropout_embedding, dropout_output: probability of dropout on the word vectors, and before the softmax.
        tied: the softmax uses the word vectors, behind a projection from `hidden` to `embedding`, also where they are
            equal: without it the outputs of an LSTM, between -1 and 1, hold it back more than a QRNN of mode "ifo".
    """

    def __init__(
        self,
        rnn: nn.Module,
        hidden: int,
        vocabulary: int,
        embedding: int,
        *,
        dropout_embedding: float = 0.0,
        dropout_output: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.rnn, self.hidden, self.tied = rnn, hidden, tied
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.dropout_embedding, self.dropout_output = nn.Dropout(dropout_embedding), nn.Dropout(dropout_output)
        self.projection = nn.Linear(hidden, embedding) if tied else nn.Identity()
        if not tied:
            self.softmax_weight = nn.Parameter(torch.empty(vocabulary, hidden))
        self.softmax_bias = nn.Parameter(torch.zeros(vocabulary))
        for weight in (self.embedding.weight, *([] if tied else [self.softmax_weight])):
            nn.init.uniform_(weight, -INITIAL_RANGE, INITIAL_RANGE)

    def forward(self, words: Tensor, state: Carried = None) -> tuple[Tensor, Carried]:
        """Compute the logits of the next word at every step.

        Args:
            words: (B, T), int64.
            state: what an earlier call returned: the steps follow those of that call. Default: the start of a text.

        Returns:
            logits, (B, T, vocabulary), and the state after the last step.
        """
        x = self.dropout_embedding(self.embedding(words))  # (B, T, embedding)
        h, state = self.rnn(x, state)  # (B, T, hidden)
        h = self.projection(self.dropout_output(h))
        weight = self.embedding.weight if self.tied else self.softmax_weight
        return F.linear(h, weight, self.softmax_bias), state


def next_word_loss(model: nn.Module, batch: Batch, carried: Carried) -> tuple[Tensor, Tensor, Carried]:
    """Return the `token_loss` of a batch and the state after it. A `training.Step`."""
    logits, carried = model(batch.inputs, carried)
    return *token_loss(logits, batch.targets), carried


@torch.no_grad()
def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompt: list[str], *, words: int, seed: int, carry: bool
) -> str:
    """Continue a text by drawing words from the model; `<unk>` is never drawn.

    Args:
        model: is put into eval mode.
        tokenizer: of the model.
        prompt: words; unknown ones count as `<unk>`.
        words: how many to draw.
        seed: of the draws.
        carry: whether the text goes on after `<eos>`; if not, each sentence starts from nothing, as in training.

    Returns:
        prompt and continuation; `<eos>` is a line break.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    eos, unk = tokenizer.token_to_id(EOS), tokenizer.token_to_id(UNK)
    known = [tokenizer.token_to_id(word) for word in prompt]
    new, state, text = [eos, *(unk if word is None else word for word in known)], None, list(prompt)
    for _ in range(words):
        logits, state = model(torch.tensor([new], device=device), state)
        probabilities = logits[0, -1].float().cpu().index_fill(0, torch.tensor(unk), -torch.inf).softmax(0)
        word = int(torch.multinomial(probabilities, 1, generator=generator))
        written = tokenizer.id_to_token(word)
        assert written is not None  # the model has the tokenizer's words
        text.append("\n" if word == eos else written)
        new = [word]
        if word == eos and not carry:
            state = None
    return " ".join(text).replace(" \n ", "\n").strip()
