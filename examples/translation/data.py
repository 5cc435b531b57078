"""Parallel text, character by character: reading and generating sentence pairs, the vocabulary, batches."""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lab.batches import IGNORE, by_length
from lab.corpora import CorpusError, check_folder, decode, folder_name, read

PAD, BOS, EOS, UNK = range(4)  # in every vocabulary; characters follow
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # how UNK is written
SPLITS = {"train": ("train",), "valid": ("val", "valid", "dev"), "test": ("test", "test_2016_flickr")}  # file names
LETTERS, SHORTEST, LONGEST = "abcdefgh", 3, 8  # of the strings that are generated


class Pair(NamedTuple):
    """Hold a sentence and its translation."""

    source: str
    target: str


@dataclass(frozen=True)
class ParallelText:
    """Hold three splits of sentence pairs; `name` says what it is, `origin` where it comes from."""

    name: str
    origin: str
    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


# --- reading and generating ------------------------------------------------------------------------------------------


def read_parallel(folder: Path, source: str, target: str) -> ParallelText:
    """Read train, val (or valid, dev) and test (or test_2016_flickr) of both languages, a sentence a line.

    Args:
        folder: with the files, for example train.de and train.en.
        source, target: their extensions.

    Raises:
        CorpusError: if a folder or file is missing or cannot be read, a file is not UTF-8, a line is empty, or the
            files of a split differ in length.
    """
    check_folder(folder, f"train.{source}, train.{target} and the other splits")
    splits = {split: _read_split(folder, split, source, target) for split in SPLITS}
    name = folder_name(folder)
    return ParallelText(f"{name} {source}-{target}", f"folder {name}", **splits)


def _read_split(folder: Path, split: str, source: str, target: str) -> list[Pair]:
    names = [name for name in SPLITS[split] if os.path.isfile(folder / f"{name}.{source}")]
    if not names:
        wanted = " or ".join(f"{name}.{source}" for name in SPLITS[split])
        raise CorpusError(f"{folder}: no {split} split there; looked for {wanted}")
    paths = [folder / f"{names[0]}.{language}" for language in (source, target)]
    sources, targets = map(_lines, paths)
    if len(sources) != len(targets):
        raise CorpusError(f"{paths[0]} has {len(sources)} lines, {paths[1].name} {len(targets)}: they must be as many")
    return list(map(Pair, sources, targets))


def _lines(path: Path) -> list[str]:
    """Return the lines without blanks at both ends; `str.splitlines` would cut at rarer characters too."""
    text = decode(read(path), str(path))
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if "" in lines:
        raise CorpusError(f"{path}: line {lines.index('') + 1} is empty; remove the pair from both files")
    return lines


def reversed_strings(seed: int) -> ParallelText:
    """Generate strings without repeated letters; the translation is the string reversed, with mapped letters.

    Args:
        seed: of the strings and the permutation of the letters; every length is as likely.
    """
    rng = random.Random(seed)
    mapping = str.maketrans(LETTERS, "".join(rng.sample(LETTERS, len(LETTERS))))
    strings: dict[str, None] = {}  # a set that keeps the order
    while len(strings) < 4_400:
        strings["".join(rng.sample(LETTERS, rng.randint(SHORTEST, LONGEST)))] = None
    pairs = [Pair(string, string[::-1].translate(mapping)) for string in strings]
    return ParallelText(
        "strings reversed and mapped", f"generated, seed {seed}", pairs[:4_000], pairs[4_000:4_200], pairs[4_200:]
    )


def drop_long(pairs: list[Pair], longest: int) -> list[Pair]:
    """Return the pairs of which neither side has more characters.

    For training only: validation and test keep every pair.
    """
    return [pair for pair in pairs if max(map(len, pair)) <= longest]


def sha256_of_lines(text: ParallelText, longest: int) -> str:
    """Return what tells one text from another: all lines, but those of training pairs that `drop_long` leaves out."""
    splits = (drop_long(text.train, longest), text.valid, text.test)
    return hashlib.sha256("\n".join(line for split in splits for pair in split for line in pair).encode()).hexdigest()


# --- vocabulary ------------------------------------------------------------------------------------------------------


class Vocabulary:
    """Number the characters of both languages, as in the paper, after PAD, BOS, EOS and UNK.

    Args:
        characters: in the order of their ids.
    """

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._ids = {character: index for index, character in enumerate(characters, start=UNK + 1)}

    @classmethod
    def of(cls, pairs: Iterable[Pair], at_least: int = 5) -> Vocabulary:
        """Take the characters that occur so often; the others are too rare to learn, and teach what UNK is."""
        counts = Counter(character for pair in pairs for text in pair for character in text)
        return cls("".join(sorted(character for character, count in counts.items() if count >= at_least)))

    def __len__(self) -> int:
        return UNK + 1 + len(self.characters)

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(character, UNK) for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[index - UNK - 1] if index > UNK else UNKNOWN for index in ids)


# --- batches ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Hold sentences to be read and what to predict: `targets[b, t]` is the character that follows `inputs[b, t]`."""

    source: Tensor  # (B, S) int64, PAD where padded
    source_lengths: Tensor  # (B,) int64
    inputs: Tensor  # (B, T) int64, starting with BOS, PAD where padded
    targets: Tensor  # (B, T) int64, ending with EOS, IGNORE where padded


class PairBatches:
    """Give batches of pairs of similar length, padded on the right; every pair once an epoch.

    Pairs are sorted by the length of the source, then by that of the target: most batches have sources of one length,
    which leaves little padding, and nothing to be packed for an LSTM. The order of an epoch depends on nothing but the
    seed and its number.

    Args:
        pairs: (source (S,), target (T,)) each, int64; the target ends with EOS.
        batch_size: pairs B in a batch; the last one of an epoch may have fewer.
        seed: of the order.
        shuffle: whether the batches come in random order and pairs of the same length meet others in each epoch; else
            in the order of length.

    Attributes:
        tokens: target characters an epoch, EOS counted, padding not.
        padding: fraction of all positions, source and target, that is padding in epoch 0; about the same in each.
        carry: False: a model starts every batch without a state.

    Raises:
        CorpusError: if there are no pairs.
    """

    carry = False

    def __init__(
        self, pairs: list[tuple[Tensor, Tensor]], batch_size: int, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        if not pairs:
            raise CorpusError("pairs: none given, at least one expected; is --max-length too small?")
        self.pairs, self.batch_size, self.seed, self.shuffle = pairs, batch_size, seed, shuffle
        self.tokens = sum(len(target) for _, target in pairs)
        places = sum(batch.source.numel() + batch.inputs.numel() for batch in self.epoch(0))
        self.padding = 1 - (self.tokens + sum(len(source) for source, _ in pairs)) / places

    def __len__(self) -> int:
        return math.ceil(len(self.pairs) / self.batch_size)

    def epoch(self, n: int) -> Iterator[Batch]:
        """Return the batches of epoch n."""
        rng = random.Random(f"{self.seed} {n}") if self.shuffle else None
        lengths = [(len(source), len(target)) for source, target in self.pairs]
        for batch in by_length(lengths, self.batch_size, rng):
            sources, targets = zip(*(self.pairs[i] for i in batch), strict=True)
            expected = pad_sequence(list(targets), batch_first=True, padding_value=IGNORE)  # (B, T)
            inputs = pad(expected[:, :-1], (1, 0), value=BOS)
            yield Batch(*pad_sources(sources), inputs.masked_fill(inputs == IGNORE, PAD), expected)


def pad_sources(sources: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return sources (S_b,) as one tensor (B, S), PAD where padded, and their lengths (B,)."""
    sources = list(sources)
    return pad_sequence(sources, batch_first=True, padding_value=PAD), torch.tensor(list(map(len, sources)))
