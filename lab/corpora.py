"""Text corpora for language models: reading and downloading, sentences.

A corpus is three splits of lines, a line is a list of words; `EOS` is added once a line when words become ids.

    corpus = load_corpus("wikitext-2", Path("data"))
    train = length_filter(sentences(corpus.train))                # sentence protocol; stream protocol: corpus.train
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.synthetic import perplexity_floor, sample_sentences

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

    @property
    def sha256_of_words(self) -> str:
        """Identify the text, whatever its folder is called."""
        lines = (" ".join(line) for split in (self.train, self.valid, self.test) for line in split)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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
