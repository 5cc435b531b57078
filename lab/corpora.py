"""Text corpora for language models: reading and downloading, sentences.

A corpus is three splits of lines, a line is a list of words; `EOS` is added once a line when words become ids.

    corpus = load_corpus("wikitext-2", Path("data"))              # stream protocol: corpus.train
    train, valid, test = split_sentences(corpus)                  # sentence protocol
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.checkpoint import first_line
from lab.synthetic import EOS, perplexity_floor, sample_sentences

SPLITS = ("train", "valid", "test")
NAMES = ("wikitext-2", "ptb", "text", "synthetic")
WIKITEXT_2_SHA256 = {  # of the official files wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens
    "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
OFFICIAL = ", checksums of the official files verified"

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

CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # but for those at which `split` cuts words
SENTENCE_ENDS = {".", "!", "?"}
LONGEST_SENTENCE = 1_000  # words: reading one takes 8 bytes for each of them and each word of the vocabulary
CLOSING = {")", "]", "}", "''", "”", "»"}  # belong to the sentence that ended before them, '"' does if one is open


class CorpusError(ValueError):
    """Say that a corpus cannot be used; the message is one line: what was given, what is expected, what to do."""


@dataclass(frozen=True)
class Corpus:
    """Hold three splits of lines, each a list of words without `EOS`.

    Attributes:
        name: "wikitext-2", "ptb", "text" or "synthetic".
        source: where the text came from, for a report.
        train, valid, test: the lines, empty ones included.
        floor: of the synthetic language, the best possible perplexity of each split, a token being a word or `EOS`.
        files: split -> the file it was read from, for messages.
    """

    name: str
    source: str
    train: list[list[str]]
    valid: list[list[str]]
    test: list[list[str]]
    floor: dict[str, float] | None = None
    files: dict[str, str] = field(default_factory=dict)

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
        CorpusError: if the name is unknown; a folder, split or word is missing or cannot be read; a file is not UTF-8
            or not the official one; or the machine is offline with nothing to read.
    """
    if name not in NAMES:
        raise CorpusError(f"corpus: {name!r} given, one of {', '.join(NAMES)} expected")
    if name == "synthetic":
        if data is not None:
            raise CorpusError(f"{data}: given as data of the synthetic corpus, which is generated: leave it out")
        return _synthetic(seed)
    if data is None:
        return _from_cache(name)
    check_folder(data, f"the files of the corpus {name}")
    return _from_folder(name, data, f"folder {folder_name(data)}")


def check_folder(path: Path, holds: str) -> None:
    """Check that a folder can be looked into.

    Args:
        path: of the folder.
        holds: what it should hold.

    Raises:
        CorpusError: if it is not there, no folder, or not open to this user.
    """
    try:
        next(path.iterdir(), None)
    except FileNotFoundError:
        raise CorpusError(f"{path}: no such folder; expected one that holds {holds}") from None
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); expected a folder that holds {holds}") from None


def folder_name(path: Path) -> str:
    """Return the last part of a path as text that can be printed and stored, whatever its bytes."""
    return path.resolve().name.encode("utf-8", "backslashreplace").decode()


def _synthetic(seed: int) -> Corpus:
    lines = sample_sentences(14_000, seed)
    splits = lines[:12_000], lines[12_000:13_000], lines[13_000:]
    floor = {name: perplexity_floor(split) for name, split in zip(SPLITS, splits, strict=True)}
    return Corpus("synthetic", f"generated, seed {seed}", *splits, floor=floor)


def _from_folder(name: str, folder: Path, source: str) -> Corpus:
    files = _find(name, folder)
    contents = {split: read(path) for split, path in files.items()}
    if name == "wikitext-2":
        for split in SPLITS:
            _verify(contents[split], split, str(files[split]))
        source += OFFICIAL
    return _corpus(name, source, contents, {split: str(path) for split, path in files.items()})


def _corpus(name: str, source: str, contents: dict[str, bytes], files: dict[str, str]) -> Corpus:
    train, valid, test = (_lines(contents[split], files[split]) for split in SPLITS)
    return Corpus(name, source, train, valid, test, files=files)


def _find(name: str, folder: Path) -> dict[str, Path]:
    """Return the file of each split; of all places and names that the corpus may have, those with the most files."""
    candidates = [[folder / place / file for file in files] for place in PLACES[name] for files in FILES[name]]
    best = dict(zip(SPLITS, max(candidates, key=lambda paths: sum(map(os.path.isfile, paths))), strict=True))
    for index, split in enumerate(SPLITS):
        if not os.path.isfile(best[split]):
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


def _lines(content: bytes, file: str) -> list[list[str]]:
    text = decode(content, file)
    if EOS in text:  # it ends a line, as a line end does; both together end one
        text = re.sub(rf"(?<!\S){EOS}(?!\S)[^\S\n]*\n?", "\n", text)
    lines = [line.split() for line in text.removesuffix("\n").split("\n")]
    if not any(lines):
        raise CorpusError(f"{file}: empty file; expected text, one line or paragraph a line")
    return lines


def read(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        CorpusError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})") from error


def decode(content: bytes, file: str) -> str:
    """Return the text of a file without byte order mark and without characters that steer a terminal.

    Raises:
        CorpusError: if it is not UTF-8, or holds a NUL, as binary files and UTF-16 do.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    if "\0" in text:
        raise CorpusError(f"{file}: NUL at byte {content.index(0)}: no text, or UTF-16; convert the file to UTF-8")
    return CONTROL.sub(" ", text.removeprefix("\ufeff"))


# --- cache and download ----------------------------------------------------------------------------------------------


def _from_cache(name: str) -> Corpus:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path(base) / "qrnn"
    try:
        _find(name, cache)
    except CorpusError:
        if name != "wikitext-2":
            raise CorpusError(f"corpus {name}: no data given; give --data DIR with {_file_names(name)}") from None
    else:
        return _from_folder(name, cache, "cache")
    if base.startswith("~"):  # there is no home
        raise CorpusError(
            f"{name}: no home directory to keep a download in; set XDG_CACHE_HOME to a folder, "
            f"or give --data DIR with {_file_names(name)}"
        )
    contents = _download()
    _keep(cache / name, contents)
    files = {split: f"{split} split of Salesforce/wikitext" for split in SPLITS}
    return _corpus(name, "download of Salesforce/wikitext" + OFFICIAL, contents, files)


def _file_names(name: str) -> str:
    return "{}, {} and {}".format(*FILES[name][0])


def _download() -> dict[str, bytes]:
    """Return the three official files of WikiText-2, verified."""
    try:
        rows = fetch("Salesforce/wikitext", "wikitext-2-v1")
    except Exception as error:  # whatever stops the download, the way out is the same
        raise CorpusError(
            f"wikitext-2: not in the cache and not downloaded ({first_line(error)}); "
            f"give --data DIR with {_file_names('wikitext-2')}, or use --corpus synthetic"
        ) from error
    contents = {}
    for split in SPLITS:
        # the rows lack the blank of an empty line, else they are the official lines; single blanks between words
        text = rows["validation" if split == "valid" else split]["text"]
        lines = (" ".join(["", *row.split(), "\n"]) for row in text)
        contents[split] = "".join(lines).encode()
        _verify(contents[split], split, "Salesforce/wikitext")
    return contents


def _keep(folder: Path, contents: dict[str, bytes]) -> None:
    """Write the files of WikiText-2 into the folder, or say why they will be downloaded again."""
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
        print(f"{folder}: the download cannot be kept there ({error.strerror})", file=sys.stderr)


def fetch(*names: str) -> Any:
    """Call `datasets.load_dataset`, which offline looks into its own cache at once.

    Raises:
        ConnectionError: if the hub is out of reach, and the cache does not hold the data set.
        Exception: whatever else stops it.
    """
    import datasets  # slow to import, and needed for a download only
    from huggingface_hub import constants, get_session

    offline, reachable = constants.HF_HUB_OFFLINE, True
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # then `load_dataset` would try again and again; told so, it looks into its own cache
        constants.HF_HUB_OFFLINE, reachable = True, False
    try:
        return datasets.load_dataset(*names)
    except Exception as error:
        if reachable:
            raise
        # the library's own advice is to unset what was set here
        why = "HF_HUB_OFFLINE is set" if offline else "the Hugging Face hub cannot be reached"
        raise ConnectionError(f"{why}, and its cache on this machine does not hold {names[0]}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


# --- the sentence protocol -------------------------------------------------------------------------------------------


def split_sentences(corpus: Corpus) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Return the sentences of train, valid and test; those of train pass the `length_filter`.

    Raises:
        CorpusError: if a split has none, or one that is too long to be read at once.
    """
    splits = {split: sentences(getattr(corpus, split)) for split in SPLITS}
    splits["train"] = length_filter(splits["train"])
    for split, found in splits.items():
        file = corpus.files.get(split, corpus.name)
        if not found:
            raise CorpusError(
                f"{file}: no sentence in the {split} split, only headings (= Title =) and empty lines; "
                "put text there, or use --protocol stream, which reads headings too"
            )
        longest = max(map(len, found))
        if longest > LONGEST_SENTENCE:
            raise CorpusError(
                f"{file}: a sentence of {longest:,} words, at most {LONGEST_SENTENCE:,} expected; end sentences with "
                "a word . ! or ?, or put each on a line of its own, or use --protocol stream"
            )
    return splits["train"], splits["valid"], splits["test"]


def sentences(lines: list[list[str]]) -> list[list[str]]:
    """Return the sentences of the lines, in lower case, without section headings ("= Title =") and empty lines.

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
    """Return the sentences whose length lies between two quantiles of the lengths, both included.

    For the training split only: validation and test keep every sentence, or their perplexity would be another text's.
    """
    if not train:
        return []
    lengths = sorted(map(len, train))
    shortest = lengths[math.floor(low * (len(lengths) - 1))]
    longest = lengths[math.ceil(high * (len(lengths) - 1))]
    return [sentence for sentence in train if shortest <= len(sentence) <= longest]
