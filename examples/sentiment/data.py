"""Labelled reviews: rt-polarity, IMDb, generated ones; folds, batches, ready-made word vectors."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor

from lab.batches import EOS_ID, IGNORE, SentenceBatches, share_of_padding
from lab.checkpoint import first_line
from lab.corpora import CONTROL, CorpusError, check_folder, fetch, folder_name

FOLDS = 10
LABELS = ("negative", "positive")  # 0 and 1


class Review(NamedTuple):
    """Hold words and what they say: 1 is positive, 0 negative."""

    words: list[str]
    label: int


class Reviews(NamedTuple):
    """Hold three splits and their source; `best`: split -> the accuracy in % that cannot be beaten, where known."""

    source: str
    train: list[Review]
    valid: list[Review]
    test: list[Review]
    best: dict[str, float] | None = None

    @property
    def sha256(self) -> str:
        """Tell one corpus, and one fold of it, from another."""
        reviews = (*self.train, *self.valid, *self.test)
        return hashlib.sha256("\n".join(f"{label} {' '.join(words)}" for words, label in reviews).encode()).hexdigest()


def load_reviews(corpus: str, data: Path | None, fold: int, seed: int) -> Reviews:
    """Read, download (IMDb) or generate (synthetic) a corpus.

    Args:
        corpus: "imdb", "rt-polarity" or "synthetic".
        data: its folder.
        fold: of the 10, see `rt_polarity` and `imdb`.
        seed: of the folds and of the generated sentences.

    Raises:
        CorpusError: if it is not there, cannot be read, or is not what it should be.
    """
    if data is not None and corpus == "synthetic":
        raise CorpusError(f"{data}: given as data of the synthetic corpus, which is generated: leave it out")
    if data is not None:
        check_folder(data, f"the files of {corpus}")
    if corpus == "imdb":
        return imdb(data, fold, seed)
    return rt_polarity(data, fold, seed) if corpus == "rt-polarity" else synthetic(seed)


# --- the corpora -----------------------------------------------------------------------------------------------------


def rt_polarity(folder: Path | None, fold: int, seed: int) -> Reviews:
    """Read sentences of film reviews, tokenised and lower-cased already (Pang and Lee 2005; "MR" in Kim 2014).

    Fold `fold` is test, the next one validation, the other eight are for training.
    """
    if folder is None:
        raise CorpusError("rt-polarity: no data given; give --data DIR with rt-polarity.pos and rt-polarity.neg")
    reviews = []
    for label, ending in enumerate(("neg", "pos")):
        path = folder / f"rt-polarity.{ending}"
        try:
            text = path.read_bytes().decode("latin-1")
        except FileNotFoundError:
            what = "rt-polarity is rt-polarity.pos and rt-polarity.neg"
            raise CorpusError(f"{folder}: no {path.name} there; {what}") from None
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read ({error.strerror})") from None
        lines = CONTROL.sub(" ", text).split("\n")  # not splitlines: Latin-1's \x85 is no line break here
        reviews += [Review(line.split(), label) for line in lines if line.strip()]
    folds = stratified_folds(reviews, seed)
    test, valid = folds.pop(fold), folds.pop(fold % len(folds))
    return Reviews(f"folder {folder_name(folder)}, fold {fold}", list(chain(*folds)), valid, test)


def imdb(folder: Path | None, fold: int, seed: int) -> Reviews:
    """Read whole film reviews (Maas et al. 2011) from the folder aclImdb, or from the Hugging Face hub if it is None.

    Fold `fold` of the official training split is validation. Words are split at blanks and punctuation, case is kept.
    """
    raw = _download() if folder is None else {split: _read_folder(folder / split) for split in ("train", "test")}
    texts = {name: [Review(_words(text), label) for text, label in rows] for name, rows in raw.items()}
    folds = stratified_folds(texts["train"], seed)
    valid = folds.pop(fold)
    source = "download of stanfordnlp/imdb" if folder is None else f"folder {folder_name(folder)}"
    return Reviews(f"{source}, validation on fold {fold} of train", list(chain(*folds)), valid, texts["test"])


def _words(text: str) -> list[str]:
    clean = CONTROL.sub(" ", text.replace("<br />", " "))
    return [word for word, _ in BertPreTokenizer().pre_tokenize_str(clean)]


def _read_folder(folder: Path) -> list[tuple[str, int]]:
    rows = []
    for label, name in enumerate(("neg", "pos")):
        paths = sorted((folder / name).glob("*.txt"))
        if not paths:
            raise CorpusError(f"{folder / name}: no reviews there; IMDb is the folder aclImdb, as it was unpacked")
        try:
            rows += [(path.read_text(encoding="utf-8", errors="replace"), label) for path in paths]
        except OSError as error:
            raise CorpusError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return rows


def _download() -> dict[str, list[tuple[str, int]]]:
    try:
        splits = fetch("stanfordnlp/imdb")
    except Exception as error:  # whatever stops the download, the way out is the same
        raise CorpusError(
            f"imdb: not downloaded ({first_line(error)}); give --data DIR with the folder aclImdb"
        ) from error
    return {name: list(zip(splits[name]["text"], splits[name]["label"], strict=True)) for name in ("train", "test")}


CUES = ([f"bad{i}" for i in range(10)], [f"good{i}" for i in range(10)])
NEUTRAL = [f"word{i}" for i in range(60)]
FLIPPED = 0.1  # probability that a label is the wrong one
SIZES = {"train": 3000, "valid": 1000, "test": 1000}


def synthetic(seed: int) -> Reviews:
    """Generate sentences with 3, 5 or 7 cue words anywhere among neutral ones; the label is that of most cues.

    A tenth of the labels is wrong, at random, in all splits: nobody can know which, so that counting the cues is the
    best that can be done, and its accuracy on each split is known.
    """
    rng = random.Random(f"reviews {seed}")
    splits, best = [], {}
    for name, size in SIZES.items():
        pairs = [_cue_sentence(rng) for _ in range(size)]
        splits.append([Review(words, label) for words, label, _ in pairs])
        best[name] = 100 * sum(label == majority for _, label, majority in pairs) / size
    train, valid, test = splits
    return Reviews(f"generated, seed {seed}", train, valid, test, best)


def _cue_sentence(rng: random.Random) -> tuple[list[str], int, int]:
    """Return words, label, and what most cues say."""
    cues = [rng.randrange(2) for _ in range(rng.choice((3, 5, 7)))]
    words = [rng.choice(CUES[cue]) for cue in cues] + rng.choices(NEUTRAL, k=rng.randrange(5, 16))
    rng.shuffle(words)
    majority = int(2 * sum(cues) > len(cues))
    return words, majority ^ (rng.random() < FLIPPED), majority


def stratified_folds(reviews: list[Review], seed: int) -> list[list[Review]]:
    """Return `FOLDS` parts of the reviews, each with its share of either label.

    Raises:
        CorpusError: if there are fewer reviews of a label than folds.
    """
    rng = random.Random(f"folds {seed}")
    folds: list[list[Review]] = [[] for _ in range(FOLDS)]
    for label, name in enumerate(LABELS):
        same = [review for review in reviews if review.label == label]
        if len(same) < FOLDS:
            raise CorpusError(f"only {len(same)} {name} reviews; at least {FOLDS} expected, one for each fold")
        rng.shuffle(same)
        for fold in range(FOLDS):
            folds[fold] += same[fold::FOLDS]
    return folds


# --- batches ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Hold B reviews, padded on the right."""

    words: Tensor  # (B, T) int64
    lengths: Tensor  # (B,) int64: the first words[b, : lengths[b]] are real, EOS is the last of them
    labels: Tensor  # (B,) int64, 0 or 1


class ReviewBatches:
    """Give batches of reviews of similar length, in the order of `SentenceBatches`.

    Args:
        sequences: ids of the words and `EOS`, each (n,), int64, as `lab.batches.encode` returns them.
        labels: one for each.
        batch_size, seed, shuffle: see `SentenceBatches`.

    Attributes:
        tokens: the items that a loss is of, here reviews.
        padding: fraction of all positions.
    """

    carry = False

    def __init__(
        self, sequences: list[Tensor], labels: list[int], batch_size: int, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        # as if the label were the last word, which a language model has to predict
        labelled = [torch.cat([ids, torch.tensor([label])]) for ids, label in zip(sequences, labels, strict=True)]
        self.sentences = SentenceBatches(labelled, batch_size, seed=seed, shuffle=shuffle)
        self.tokens = len(sequences)
        self.padding = share_of_padding(list(map(len, sequences)), batch_size)

    def __len__(self) -> int:
        return len(self.sentences)

    def epoch(self, n: int) -> Iterator[Batch]:
        """Return the batches of epoch n."""
        for _, targets in self.sentences.epoch(n):  # (B, T + 1): words, EOS, label, then IGNORE
            lengths = (targets != IGNORE).sum(1) - 1
            labels = targets.take_along_dim(lengths.unsqueeze(1), dim=1).squeeze(1)
            after = torch.arange(targets.shape[1]) >= lengths.unsqueeze(1)
            yield Batch(targets.masked_fill(after, EOS_ID)[:, :-1], lengths, labels)


# --- word vectors ----------------------------------------------------------------------------------------------------

HEADER = re.compile(r"\d+ (\d+)\s*")  # number of words, numbers of a word


def read_vectors(path: Path, vocabulary: dict[str, int], width: int) -> dict[int, Tensor]:
    """Read the ready-made vectors of the words that are known.

    A word that the file does not have takes the vector of its lower-case form, if there is one.

    Args:
        path: of a text file with a word and its numbers on each line, as GloVe has; above them may stand how many
            words and numbers there are, as in fastText and word2vec.
        vocabulary: word -> id.
        width: numbers of a word.

    Returns:
        id -> (width,), float32.

    Raises:
        CorpusError: if there is no such file, it is not UTF-8, a line is not a word and `width` numbers, or no word
            of it is known.
    """
    wanted = vocabulary.keys() | {word.lower() for word in vocabulary}
    found = {}
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                if number == 1 and (header := HEADER.fullmatch(line)):
                    _check_width(int(header[1]), width, where)
                    continue
                word, *numbers = line.rstrip().rsplit(" ", width)  # from the right: some words have blanks in them
                if len(numbers) < width or (number == 1 and " " in word):  # the first line tells the width of the file
                    _check_width(line.rstrip().count(" "), width, where)
                if word in wanted:
                    found[word] = _vector(numbers, where)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 text; of word2vec's files give the text form, not the binary") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})") from error
    if not found:
        raise CorpusError(f"{path}: has none of the {len(vocabulary):,} words of the training text; another language?")
    pairs = ((index, found.get(word, found.get(word.lower()))) for word, index in vocabulary.items())
    return {index: vector for index, vector in pairs if vector is not None}


def _check_width(given: int, width: int, where: str) -> None:
    if given != width:
        raise CorpusError(f"{where}: {given} numbers given, --embedding {width} expected")


def _vector(numbers: list[str], where: str) -> Tensor:
    try:
        vector = torch.tensor([float(number) for number in numbers])
    except ValueError as error:
        raise CorpusError(f"{where}: {error}") from None
    if not vector.isfinite().all():
        raise CorpusError(f"{where}: not all numbers are finite")
    return vector
