"""From words to batches: the vocabulary, and the batches of both protocols.

tokenizer = build_vocabulary(train, size=10_000)
batches = SentenceBatches(encode(tokenizer, train), batch_size=32)
for inputs, targets in batches.epoch(0): ...                  # (B, T), (B, T)
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lab.corpora import CorpusError
from lab.synthetic import EOS

UNK = "<unk>"
EOS_ID, UNK_ID = 0, 1  # in every vocabulary
IGNORE = -100  # target of a padded position, the default `ignore_index` of PyTorch's cross entropy
Length = TypeVar("Length", int, tuple[int, ...])  # of a sequence, or of all that belong together

# --- vocabulary ------------------------------------------------------------------------------------------------------


def build_vocabulary(sequences: Iterable[list[str]], size: int | None) -> Tokenizer:
    """Return a word-level tokenizer of the most frequent words, equally frequent ones in alphabetical order.

    Args:
        sequences: words as they are to be counted: lower them first, if at all.
        size: words to keep at most, `EOS` (id 0) and `UNK` (id 1) among them; None keeps all.

    Raises:
        CorpusError: if `size` leaves room for no word.
    """
    counts = Counter(chain.from_iterable(sequences))
    words = sorted(counts.keys() - {EOS, UNK}, key=lambda word: (-counts[word], word))
    if size is not None and size < 3:
        raise CorpusError(f"vocabulary size: {size} given, at least 3 expected: {EOS}, {UNK} and a word")
    kept = [EOS, UNK, *words][:size]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(kept)}, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def encode(tokenizer: Tokenizer, sequences: list[list[str]]) -> list[Tensor]:
    """Return for each sequence of n words its ids and that of `EOS`: (n + 1,), int64, all views of one tensor."""
    vocabulary = tokenizer.get_vocab()  # looking words up takes half the time of tokenizer.encode_batch
    ids = [vocabulary.get(word, UNK_ID) for sequence in sequences for word in (*sequence, EOS)]
    return list(torch.tensor(ids, dtype=torch.int64).split([len(sequence) + 1 for sequence in sequences]))


# --- batches ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Hold a step's input and what it is to predict: `targets[b, t]` is the word that follows `inputs[b, t]`."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORE where padded


def by_length(lengths: Sequence[Length], batch_size: int, rng: random.Random | None) -> list[list[int]]:
    """Put sequences of similar length into batches.

    Args:
        lengths: of the sequences.
        batch_size: sequences in a batch; one of them may have fewer, the longest.
        rng: draws the order of the batches, and which sequences of equal length meet. None: all in the order of length.

    Returns:
        the indices of the sequences of each batch; every sequence once.
    """
    order = list(range(len(lengths)))
    if rng is not None:
        rng.shuffle(order)
    order.sort(key=lengths.__getitem__)  # stable: equal lengths stay shuffled
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if rng is not None:
        rng.shuffle(batches)
    return batches


def share_of_padding(lengths: Sequence[int], batch_size: int) -> float:
    """Return the fraction of padded positions where sequences of these lengths are put into batches `by_length`."""
    batches = by_length(lengths, batch_size, None)
    return 1 - sum(lengths) / sum(len(batch) * lengths[batch[-1]] for batch in batches)


class SentenceBatches:
    """Give batches of sentences of similar length, padded on the right; every sentence once an epoch.

    Inputs start with `EOS`, targets end with it. The order of an epoch depends on nothing but the seed and its number.

    Args:
        sequences: each (n,), int64, ending with `EOS`, as `encode` returns them.
        batch_size: sentences B in a batch; the last one of an epoch may have fewer.
        seed: of the order.
        shuffle: whether the batches come in random order and sentences of the same length meet others in each epoch;
            else in the order of length.

    Attributes:
        tokens: target tokens an epoch, padding not counted.
        padding: fraction of all positions that is padding, the same in every epoch.
        carry: False: a model starts every batch without a state.

    Raises:
        CorpusError: if there are no sequences, or the batch size is below 1.
    """

    carry = False

    def __init__(self, sequences: list[Tensor], batch_size: int, *, seed: int = 0, shuffle: bool = True) -> None:
        _check_positive("batch_size", batch_size)
        if not sequences:
            raise CorpusError("sequences: none given, at least one sentence expected")
        self.sequences, self.batch_size, self.seed, self.shuffle = sequences, batch_size, seed, shuffle
        self.tokens = sum(map(len, sequences))
        self.padding = share_of_padding(list(map(len, sequences)), batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self.sequences) / self.batch_size)

    def epoch(self, n: int) -> Iterator[Batch]:
        """Return the batches of epoch n, (B, T) each, T being the length of the batch's longest sentence."""
        rng = random.Random(f"{self.seed} {n}") if self.shuffle else None
        for batch in by_length(list(map(len, self.sequences)), self.batch_size, rng):
            targets = pad_sequence([self.sequences[i] for i in batch], batch_first=True, padding_value=IGNORE)  # (B, T)
            inputs = pad(targets[:, :-1], (1, 0), value=EOS_ID).clamp(min=EOS_ID)  # padding becomes EOS
            yield Batch(inputs, targets)


class StreamBatches:
    """Give the whole text as `batch_size` rows, each a contiguous piece of it, read in windows of `bptt` steps.

    The first input is `EOS`. What is left over when the text is cut into rows of equal length, fewer tokens than rows,
    is dropped; with one row every token is predicted exactly once, which is how to evaluate.

    Args:
        sequences: each (n,), int64, as `encode` returns them.
        batch_size: rows B.
        bptt: steps T of a window; the last one of an epoch may have fewer.

    Attributes:
        tokens: target tokens an epoch.
        padding: 0.
        carry: True: a model's state after a batch belongs to the start of the next.

    Raises:
        CorpusError: if there are fewer tokens than rows, or a size is below 1.
    """

    carry = True
    padding = 0.0

    def __init__(self, sequences: list[Tensor], batch_size: int, bptt: int) -> None:
        _check_positive("batch_size", batch_size)
        _check_positive("bptt", bptt)
        text = torch.cat([torch.tensor([EOS_ID]), *sequences])
        steps = (len(text) - 1) // batch_size
        if steps == 0:
            raise CorpusError(f"batch_size: {batch_size} rows given, but the text has only {len(text) - 1} tokens")
        self.tokens = batch_size * steps
        self.bptt = bptt
        self.inputs = text[: self.tokens].view(batch_size, steps)
        self.targets = text[1 : self.tokens + 1].view(batch_size, steps)

    def __len__(self) -> int:
        return math.ceil(self.inputs.shape[1] / self.bptt)

    def epoch(self, n: int) -> Iterator[Batch]:
        """Return the windows in the order of the text, (B, T) each; the same in every epoch n."""
        return map(Batch, self.inputs.split(self.bptt, dim=1), self.targets.split(self.bptt, dim=1))


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise CorpusError(f"{name}: {value} given, at least 1 expected")
