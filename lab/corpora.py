"""Text corpora for language models: reading and downloading, sentences, vocabulary, batches.

A corpus is three splits of lines, a line is a list of words; `EOS` is added once a line when words become ids.

    corpus = load_corpus("wikitext-2", Path("data"))
    train = length_filter(sentences(corpus.train))                # sentence protocol; stream protocol: corpus.train
    tokenizer = build_vocabulary(train, size=10_000)
    batches = SentenceBatches(encode(tokenizer, train), batch_size=32)
    for inputs, targets in batches.epoch(0): ...                  # (B, T), (B, T)
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lab.synthetic import EOS, perplexity_floor, sample_sentences

UNK = "<unk>"
EOS_ID, UNK_ID = 0, 1  # in every vocabulary
IGNORE = -100  # target of a padded position, the default `ignore_index` of PyTorch's cross entropy

SPLITS = ("train", "valid", "test")
NAMES = ("wikitext-2", "ptb", "text", "synthetic")
WIKITEXT_2_SHA256 = {  # of the official files wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens
    "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}

# names of a corpus's three files, and where below the folder they may lie: torchtext 0.6 unpacks to penn-treebank and
# wikitext-2/wikitext-2, 0.8 to wikitext-2, 0.10 to PennTreebank and WikiText2/wikitext-2, 0.12 to those in datasets
PLAIN = (("train.txt", "valid.txt", "test.txt"), ("train.txt", "validation.txt", "test.txt"))
WIKITEXT = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")
PTB = ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")
FILES = {"wikitext-2": (WIKITEXT, *PLAIN), "ptb": (PTB, *PLAIN), "text": (*PLAIN, WIKITEXT, PTB)}
PLACES = {
    "wikitext-2": (".", "wikitext-2", "wikitext-2/wikitext-2", "WikiText2/wikitext-2", "datasets/WikiText2/wikitext-2"),
    "ptb": (".", "ptb", "penn-treebank", "PennTreebank", "datasets/PennTreebank"),
    "text": (".",),
}

SENTENCE_ENDS = {".", "!", "?"}
CLOSING = {")", "]", "}", "''", "”", "»"}  # belong to the sentence that ended before them, '"' does if one is open


class CorpusError(ValueError):
    """A corpus that cannot be used; the message is one line: what was given, what is expected, what to do."""


@dataclass(frozen=True)
class Corpus:
    """Three splits of lines, each a list of words without `EOS`.

    Attributes:
        name: "wikitext-2", "ptb", "text" or "synthetic".
        source: where the text came from, for a report.
        train, valid, test: the lines, empty ones included.
        floor: of the synthetic language, the best possible perplexity of each split, a token being a word or `EOS`.
    """

    name: str
    source: str
    train: list[list[str]]
    valid: list[list[str]]
    test: list[list[str]]
    floor: dict[str, float] | None = None


# --- reading ---------------------------------------------------------------------------------------------------------


def load_corpus(name: str, data: Path | None = None, *, seed: int = 0) -> Corpus:
    """Read a corpus from a folder, else from the cache, else download it (WikiText-2), else generate it (synthetic).

    Args:
        name: "wikitext-2" (must be the official files, by checksum), "ptb", "text" (any text) or "synthetic".
        data: folder with the official file names, or train.txt, valid.txt (or validation.txt) and test.txt, or the
            cache of torchtext. Default: the cache of this project, $XDG_CACHE_HOME/qrnn or ~/.cache/qrnn.
        seed: of the synthetic sentences.

    Raises:
        CorpusError: unknown name; folder, split or words missing; not UTF-8; wrong checksum; offline and nothing local.
    """
    if name not in NAMES:
        raise CorpusError(f"corpus: {name!r} given, one of {', '.join(NAMES)} expected")
    if name == "synthetic":
        if data is not None:
            raise CorpusError(f"{data}: given as data of the synthetic corpus, which is generated: leave it out")
        return _synthetic(seed)
    if data is None:
        return _from_cache(name)
    data = Path(data)
    if not data.is_dir():
        raise CorpusError(f"{data}: no such folder; expected one that holds the files of the corpus {name}")
    return _from_folder(name, data, f"folder {data.resolve().name}")


def _synthetic(seed: int) -> Corpus:
    lines = sample_sentences(14_000, seed)
    splits = {"train": lines[:12_000], "valid": lines[12_000:13_000], "test": lines[13_000:]}
    floor = {split: perplexity_floor(splits[split]) for split in SPLITS}
    return Corpus("synthetic", f"generated, seed {seed}", **splits, floor=floor)


def _from_folder(name: str, folder: Path, source: str) -> Corpus:
    splits = {}
    for split, path in _find(name, folder).items():
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read ({error.strerror})") from error
        if name == "wikitext-2":
            _verify(content, split, str(path))
        splits[split] = _lines(content, path)
    if name == "wikitext-2":
        source += ", checksums of the official files verified"
    return Corpus(name, source, **splits)


def _find(name: str, folder: Path) -> dict[str, Path]:
    """Split -> its file; of all places and names that the corpus may have, the first with the most files."""
    candidates = [[folder / place / file for file in files] for place in PLACES[name] for files in FILES[name]]
    best = dict(zip(SPLITS, max(candidates, key=lambda paths: sum(path.is_file() for path in paths)), strict=True))
    for index, split in enumerate(SPLITS):
        if not best[split].is_file():
            names = dict.fromkeys(files[index] for files in FILES[name])
            raise CorpusError(f"{folder}: no {split} split of {name} there; looked for {' or '.join(names)}")
    return best


def _verify(content: bytes, split: str, origin: str) -> None:
    found, expected = hashlib.sha256(content).hexdigest(), WIKITEXT_2_SHA256[split]
    if found != expected:
        raise CorpusError(
            f"{origin}: not the official {split} split of WikiText-2, sha256 {found} found, {expected} expected; "
            "get the official file (one in the cache: delete it), or read the folder it is in with --corpus text"
        )


def _lines(content: bytes, path: Path) -> list[list[str]]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    lines = [line.split() for line in text.removeprefix("\ufeff").removesuffix("\n").split("\n")]
    if not any(lines):
        raise CorpusError(f"{path}: empty file; expected text, one line or paragraph a line")
    return lines


# --- cache and download ----------------------------------------------------------------------------------------------


def _from_cache(name: str) -> Corpus:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qrnn"
    source = "cache"
    try:
        _find(name, cache)
    except CorpusError:
        if name != "wikitext-2":
            raise CorpusError(f"corpus {name}: no data given; give --data DIR with {_file_names(name)}") from None
        source = "download of Salesforce/wikitext"
        _download(cache / name)
    return _from_folder(name, cache, source)


def _file_names(name: str) -> str:
    return "{}, {} and {}".format(*FILES[name][0])


def _download(folder: Path) -> None:
    """Write the three official files of WikiText-2, verified, into the folder."""
    try:
        rows = fetch("Salesforce/wikitext", "wikitext-2-v1")
    except Exception as error:  # whatever stops the download, the way out is the same
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CorpusError(
            f"wikitext-2: not in the cache and not downloaded ({reason}); "
            f"give --data DIR with {_file_names('wikitext-2')}, or use --corpus synthetic"
        ) from error
    contents = {}
    for split in SPLITS:
        # the rows lack the blank of an empty line, else they are the official lines; single blanks between words
        text = rows["validation" if split == "valid" else split]["text"]
        lines = (" ".join(["", *row.split(), "\n"]) for row in text)
        contents[split] = "".join(lines).encode()
        _verify(contents[split], split, "Salesforce/wikitext")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, file in zip(SPLITS, WIKITEXT, strict=True):
            aside = folder / f"{file}.{os.getpid()}"
            try:
                aside.write_bytes(contents[split])
                aside.replace(folder / file)  # all or nothing, also with several processes
            finally:
                aside.unlink(missing_ok=True)
    except OSError as error:
        raise CorpusError(f"{folder}: the download cannot be written there ({error.strerror})") from error


def fetch(*names: str) -> Any:
    """`datasets.load_dataset`, which offline looks into its own cache at once; raises whatever it raises."""
    import datasets  # slow to import, and needed for a download only
    from huggingface_hub import constants, get_session

    offline = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # then `load_dataset` would try again and again; told so, it looks into its own cache
        constants.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(*names)
    finally:
        constants.HF_HUB_OFFLINE = offline


# --- the sentence protocol -------------------------------------------------------------------------------------------


def sentences(lines: list[list[str]]) -> list[list[str]]:
    """The sentences of the lines, in lower case, without section headings ("= Title =") and empty lines.

    A sentence ends after ".", "!" or "?" and what closes there: more of these, brackets, a quotation that is open.
    """
    lowered = ([word.lower() for word in line] for line in lines)
    return [sentence for line in lowered for sentence in _cut(line)]


def _cut(line: list[str]) -> Iterator[list[str]]:
    if len(line) > 1 and line[0] == line[-1] == "=":  # a heading
        return
    sentence: list[str] = []
    ended = quoted = False
    for word in line:
        closing = word in SENTENCE_ENDS or word in CLOSING or (word == '"' and quoted)
        if ended and not closing:
            yield sentence
            sentence, ended = [], False
        sentence.append(word)
        ended = ended or word in SENTENCE_ENDS
        quoted ^= word == '"'
    if sentence:
        yield sentence


def length_filter(train: list[list[str]], low: float = 0.05, high: float = 0.95) -> list[list[str]]:
    """The sentences whose length lies between two quantiles of the lengths, both included.

    For the training split only: validation and test keep every sentence, or their perplexity would be another text's.
    """
    if not train:
        return []
    lengths = sorted(map(len, train))
    shortest = lengths[math.floor(low * (len(lengths) - 1))]
    longest = lengths[math.ceil(high * (len(lengths) - 1))]
    return [sentence for sentence in train if shortest <= len(sentence) <= longest]


# --- vocabulary ------------------------------------------------------------------------------------------------------


def build_vocabulary(sequences: Iterable[list[str]], size: int | None) -> Tokenizer:
    """A word-level tokenizer of the most frequent words, equally frequent ones in alphabetical order.

    Args:
        sequences: words as they are to be counted: lower them first, if at all.
        size: words to keep, `EOS` (id 0) and `UNK` (id 1) among them; None keeps all.

    Raises:
        CorpusError: the sequences have fewer words than `size`, or `size` leaves room for none.
    """
    counts = Counter(chain.from_iterable(sequences))
    words = sorted(counts.keys() - {EOS, UNK}, key=lambda word: (-counts[word], word))
    if size is not None and not 2 < size <= len(words) + 2:
        raise CorpusError(
            f"vocabulary size: {size} given, 3 to {len(words) + 2} expected, "
            f"for the training text has {len(words)} different words beside {EOS} and {UNK}"
        )
    kept = [EOS, UNK, *words][:size]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(kept)}, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def encode(tokenizer: Tokenizer, sequences: list[list[str]]) -> list[Tensor]:
    """For each sequence of n words its ids and that of `EOS`: (n + 1,), int64, all views of one tensor."""
    vocabulary = tokenizer.get_vocab()  # looking words up takes half the time of tokenizer.encode_batch
    ids = [vocabulary.get(word, UNK_ID) for sequence in sequences for word in (*sequence, EOS)]
    return list(torch.tensor(ids, dtype=torch.int64).split([len(sequence) + 1 for sequence in sequences]))


# --- batches ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """One step's input and what it is to predict: `targets[b, t]` is the word that follows `inputs[b, t]`."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORE where padded


class SentenceBatches:
    """Batches of sentences of similar length, padded on the right; every sentence once an epoch.

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
        CorpusError: no sequences, or a batch size below 1.
    """

    carry = False

    def __init__(self, sequences: list[Tensor], batch_size: int, *, seed: int = 0, shuffle: bool = True) -> None:
        _check_positive("batch_size", batch_size)
        if not sequences:
            raise CorpusError("sequences: none given, at least one sentence expected")
        self.sequences, self.batch_size, self.seed, self.shuffle = sequences, batch_size, seed, shuffle
        lengths = sorted(map(len, sequences))
        rows = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
        self.tokens = sum(lengths)
        self.padding = 1 - self.tokens / sum(len(row) * row[-1] for row in rows)

    def __len__(self) -> int:
        return math.ceil(len(self.sequences) / self.batch_size)

    def epoch(self, n: int) -> Iterator[Batch]:
        """The batches of epoch n, (B, T) each, T being the length of the batch's longest sentence."""
        order = list(range(len(self.sequences)))
        rng = random.Random(f"{self.seed} {n}")
        if self.shuffle:
            rng.shuffle(order)
        order.sort(key=lambda i: len(self.sequences[i]))  # stable: equal lengths stay shuffled
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.shuffle:
            rng.shuffle(batches)
        for batch in batches:
            targets = pad_sequence([self.sequences[i] for i in batch], batch_first=True, padding_value=IGNORE)  # (B, T)
            inputs = pad(targets[:, :-1], (1, 0), value=EOS_ID).clamp(min=EOS_ID)  # padding becomes EOS
            yield Batch(inputs, targets)


class StreamBatches:
    """The whole text as `batch_size` rows, each a contiguous piece of it, read in windows of `bptt` steps.

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
        CorpusError: fewer tokens than rows, or a size below 1.
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
        """The windows in the order of the text, (B, T) each; the same in every epoch n."""
        return map(Batch, self.inputs.split(self.bptt, dim=1), self.targets.split(self.bptt, dim=1))


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise CorpusError(f"{name}: {value} given, at least 1 expected")
