"""Corpora: what is read, what is refused, what is cut, and that batches hold every token exactly once."""

import errno
import hashlib
import os
import random
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lab import corpora
from lab.batches import IGNORE, UNK, SentenceBatches, StreamBatches, build_vocabulary, by_length, encode
from lab.corpora import SPLITS, Corpus, CorpusError, length_filter, load_corpus, sentences, split_sentences
from lab.synthetic import EOS

DATA = Path(os.environ.get("QRNN_DATA") or Path(__file__).parents[3] / "shared" / "data")
any_speed = settings(deadline=None)  # of the machine
on_real_corpora = pytest.mark.skipif(not (DATA / "wikitext-2").is_dir(), reason="QRNN_DATA names no folder of corpora")

TEXTS = {"train": " \n = Title = \n \n The <unk> 's @-@ end . \n", "valid": " a b \n", "test": " c \n"}
OFFICIAL_NAMES = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")


def write(folder, names=OFFICIAL_NAMES, texts=TEXTS):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, texts.values(), strict=True):
        (folder / name).write_bytes(text.encode())
    return folder


def line_of(call):
    """The message of the CorpusError that the call raises, after checking that it is one line."""
    with pytest.raises(CorpusError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def official(monkeypatch):
    """Makes TEXTS the official WikiText-2."""
    sums = {split: hashlib.sha256(text.encode()).hexdigest() for split, text in TEXTS.items()}
    monkeypatch.setattr(corpora, "WIKITEXT_2_SHA256", sums)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a machine without network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Offline:
        def head(self, *args, **kwargs):
            raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "get_session", Offline)
    return tmp_path / "cache" / "qrnn" / "wikitext-2"


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place", "names"),
    (
        ("wikitext-2", ".", OFFICIAL_NAMES),
        ("wikitext-2", ".", ("train.txt", "valid.txt", "test.txt")),
        ("wikitext-2", "wikitext-2/wikitext-2", OFFICIAL_NAMES),  # torchtext 0.6
        ("wikitext-2", "wikitext-2", OFFICIAL_NAMES),  # 0.8
        ("wikitext-2", "WikiText2/wikitext-2", OFFICIAL_NAMES),  # 0.10
        ("wikitext-2", "datasets/WikiText2/wikitext-2", OFFICIAL_NAMES),  # 0.12
        ("ptb", ".", ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")),
        ("ptb", "penn-treebank", ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")),
        ("ptb", "datasets/PennTreebank", ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")),
        ("text", ".", ("train.txt", "validation.txt", "test.txt")),
        ("text", ".", OFFICIAL_NAMES),
    ),
)
def test_every_layout_is_found(official, tmp_path, name, place, names):
    write(tmp_path / place, names)
    corpus = load_corpus(name, tmp_path)
    assert corpus.name == name
    assert corpus.train == [[], ["=", "Title", "="], [], ["The", "<unk>", "'s", "@-@", "end", "."]]
    assert (corpus.valid, corpus.test) == ([["a", "b"]], [["c"]])
    assert tmp_path.name in corpus.source and str(tmp_path) not in corpus.source
    assert ("checksums" in corpus.source) == (name == "wikitext-2")


def test_a_complete_layout_wins_over_an_incomplete_one(tmp_path):
    write(tmp_path, ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"))
    (tmp_path / "train.txt").write_text("something else")
    assert load_corpus("text", tmp_path).test == [["c"]]


@pytest.mark.parametrize("text", ("a b\n\nc\n", "a b\n\nc", "a b\r\n\r\nc\r\n", "\ufeffa b\n\nc\n", "  a\tb \n \nc \n"))
def test_line_ends_marks_and_blanks_make_no_difference(tmp_path, text):
    write(tmp_path, ("train.txt", "valid.txt", "test.txt"), dict.fromkeys(SPLITS, text))
    assert load_corpus("text", tmp_path).train == [["a", "b"], [], ["c"]]


def test_wikitext_2_is_the_official_one_or_goes_by_another_name(tmp_path):
    folder = write(tmp_path)
    found = hashlib.sha256(TEXTS["train"].encode()).hexdigest()
    line = line_of(lambda: load_corpus("wikitext-2", folder))
    for part in ("wiki.train.tokens", found, corpora.WIKITEXT_2_SHA256["train"], "--corpus text"):
        assert part in line
    assert load_corpus("text", folder).valid == [["a", "b"]]


def test_errors_of_reading_say_what_was_found_and_expected(tmp_path):
    names = ("train.txt", "valid.txt", "test.txt")
    assert "'ptb2' given, one of wikitext-2, ptb, text, synthetic expected" in line_of(lambda: load_corpus("ptb2"))
    assert "no such folder" in line_of(lambda: load_corpus("text", tmp_path / "nowhere"))
    assert "no train split" in line_of(lambda: load_corpus("wikitext-2", tmp_path))
    assert "generated" in line_of(lambda: load_corpus("synthetic", tmp_path))
    write(tmp_path, names)
    (tmp_path / "valid.txt").unlink()
    line = line_of(lambda: load_corpus("text", tmp_path))
    assert "no valid split" in line and "valid.txt or validation.txt or wiki.valid.tokens or ptb.valid.txt" in line
    for empty in ("", " \n\n"):
        (tmp_path / "valid.txt").write_text(empty)
        assert "valid.txt: empty file" in line_of(lambda: load_corpus("text", tmp_path))
    (tmp_path / "valid.txt").write_bytes("naïve".encode("latin-1"))
    assert "valid.txt: not UTF-8 at byte 2" in line_of(lambda: load_corpus("text", tmp_path))


@pytest.mark.parametrize("line", (" a b \n", " a b <eos> \n", "a b <eos>\n", "a b <eos> "))
def test_an_end_of_sentence_that_is_written_out_ends_the_line_once(tmp_path, line):
    names = ("train.txt", "valid.txt", "test.txt")
    write(tmp_path, names, dict.fromkeys(SPLITS, f"{line}{line}x<eos> <eos>y\n"))
    assert load_corpus("text", tmp_path).train == [["a", "b"], ["a", "b"], ["x<eos>", "<eos>y"]]


def test_characters_that_steer_a_terminal_are_blanks(tmp_path):
    names = ("train.txt", "valid.txt", "test.txt")
    write(tmp_path, names, dict.fromkeys(SPLITS, "a\x1b[2Jb c\x07 \x9b d\x7f\n\x08e\n"))
    assert load_corpus("text", tmp_path).train == [["a", "[2Jb", "c", "d"], ["e"]]


@pytest.mark.parametrize("content", (b"a b\0c\n", "a b\n".encode("utf-16-le")))
def test_what_is_no_text_is_refused(tmp_path, content):
    write(tmp_path, ("train.txt", "valid.txt", "test.txt"))
    (tmp_path / "valid.txt").write_bytes(content)
    line = line_of(lambda: load_corpus("text", tmp_path))
    assert "valid.txt" in line and f"byte {content.index(0)}" in line


@pytest.mark.parametrize("number", (errno.EACCES, errno.EIO, errno.ENAMETOOLONG))
def test_a_folder_that_cannot_be_looked_into_is_one_line(tmp_path, monkeypatch, number):
    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    line = line_of(lambda: load_corpus("text", tmp_path))
    assert str(tmp_path) in line and os.strerror(number) in line
    monkeypatch.undo()
    (tmp_path / "file").touch()
    assert "Not a directory" in line_of(lambda: load_corpus("text", tmp_path / "file"))


def test_files_in_a_folder_without_search_permission_are_not_there(tmp_path, monkeypatch):
    """`os.path.isfile` says so; `Path.is_file` raises a PermissionError."""
    write(tmp_path, ("train.txt", "valid.txt", "test.txt"))
    stat = os.stat

    def refuse(path, *args, **kwargs):
        if str(path).startswith(f"{tmp_path}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    assert "no train split" in line_of(lambda: load_corpus("text", tmp_path))


def test_a_folder_with_a_name_that_is_no_text_can_be_named(tmp_path):
    folder = write(tmp_path / os.fsdecode(b"caf\xe9"), ("train.txt", "valid.txt", "test.txt"))
    assert load_corpus("text", folder).source.encode() == rb"folder caf\udce9"


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    folder = write(tmp_path)
    assert "wiki.train.tokens: cannot be read (Permission denied)" in line_of(lambda: load_corpus("text", folder))


# --- cache and download ----------------------------------------------------------------------------------------------


def as_hugging_face_rows(text):
    """The data set's rows: the file's lines, line end included, an empty one as the empty string."""
    return [line if line.strip() else "" for line in text.splitlines(keepends=True)]


def hugging_face(texts):
    rows = {"validation" if split == "valid" else split: as_hugging_face_rows(text) for split, text in texts.items()}
    return datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": text}) for split, text in rows.items()})


def test_a_download_becomes_the_official_files_and_happens_once(official, cache, monkeypatch):
    calls = []

    def load_dataset(*args):
        calls.append((args, huggingface_hub.constants.HF_HUB_OFFLINE))
        return hugging_face(TEXTS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    downloaded = load_corpus("wikitext-2")
    assert calls == [(("Salesforce/wikitext", "wikitext-2-v1"), True)]  # no network: no attempts that take minutes
    assert offline == huggingface_hub.constants.HF_HUB_OFFLINE
    assert {path.name: path.read_bytes().decode() for path in cache.iterdir()} == dict(
        zip(OFFICIAL_NAMES, TEXTS.values(), strict=True)
    )
    again = load_corpus("wikitext-2")
    assert len(calls) == 1
    assert (again.train, again.valid, again.test) == (downloaded.train, downloaded.valid, downloaded.test)
    assert "download" in downloaded.source and "cache" in again.source


def test_a_download_of_something_else_is_refused_and_not_kept(official, cache, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: hugging_face(TEXTS | {"test": " d \n"}))
    assert "not the official test split" in line_of(lambda: load_corpus("wikitext-2"))
    assert not cache.exists()


@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EROFS, errno.EACCES))
def test_a_cache_that_cannot_be_written_loses_no_download_and_keeps_no_piece(
    official, cache, monkeypatch, capsys, number
):
    write_bytes = Path.write_bytes

    def fill_up(path, content):
        write_bytes(path, content[:3])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(datasets, "load_dataset", lambda *args: hugging_face(TEXTS))
    monkeypatch.setattr(Path, "write_bytes", fill_up)
    assert load_corpus("wikitext-2").test == [["c"]]
    (line,) = capsys.readouterr().err.splitlines()
    assert str(cache) in line and os.strerror(number) in line
    assert list(cache.iterdir()) == []


def test_offline_with_nothing_local_one_line_says_what_to_do(cache, monkeypatch):
    def load_dataset(*args):
        raise ConnectionError("offline mode is enabled: unset HF_HUB_OFFLINE\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    line = line_of(lambda: load_corpus("wikitext-2"))
    for part in ("hub", "Salesforce/wikitext", "--data DIR", *OFFICIAL_NAMES):
        assert part in line
    assert "HF_HUB_OFFLINE" not in line  # nobody but the program set it
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in line_of(lambda: load_corpus("wikitext-2"))
    assert "--data DIR with ptb.train.txt, ptb.valid.txt and ptb.test.txt" in line_of(lambda: load_corpus("ptb"))
    assert "--data DIR with train.txt, valid.txt and test.txt" in line_of(lambda: load_corpus("text"))


def test_what_stops_a_download_is_said(cache, monkeypatch):
    def load_dataset(*args):
        raise OSError("no space for the archive\nand more")

    reachable = SimpleNamespace(head=lambda *args, **kwargs: None)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: reachable)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "no space for the archive" in line_of(lambda: load_corpus("wikitext-2"))


def test_without_a_home_nothing_is_downloaded_into_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where HOME is not set and the user not known
    monkeypatch.chdir(tmp_path)
    line = line_of(lambda: load_corpus("wikitext-2"))
    assert "XDG_CACHE_HOME" in line and "--data DIR" in line
    assert list(tmp_path.iterdir()) == []


def test_offline_is_noticed_at_once(cache, tmp_path, monkeypatch):
    """The real `load_dataset`, of a machine that has never downloaded anything."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hugging_face")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    start = time.monotonic()
    assert "--data DIR" in line_of(lambda: load_corpus("wikitext-2"))
    assert time.monotonic() - start < 5


# --- the sentence protocol -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    (
        ("", []),
        ("= Title =", []),
        ("= = Section = =", []),
        ("= 3 is what", ["= 3 is what"]),
        ("no end", ["no end"]),
        ("The Cat . A <unk> ! Who ? Me", ["the cat .", "a <unk> !", "who ?", "me"]),
        ("It 's 3.5 @-@ m . Yes .", ["it 's 3.5 @-@ m .", "yes ."]),
        ("( He left . ) Then", ["( he left . )", "then"]),
        ('He said " Go . " Then', ['he said " go . "', "then"]),  # the quotation is open: it closes
        ('He left . " Go " , she said', ["he left .", '" go " , she said']),  # it is not: a new one begins
        ('" What ? ! " " No . "', ['" what ? ! "', '" no . "']),
        ("`` Go . '' Then", ["`` go . ''", "then"]),
        ("wait . . . what", ["wait . . .", "what"]),
    ),
)
def test_where_sentences_end(line, expected):
    assert [" ".join(sentence) for sentence in sentences([line.split()])] == expected


@any_speed
@given(st.lists(st.lists(st.sampled_from(["a", "B", ".", "!", '"', ")", "("]))))
def test_cutting_loses_no_word(lines):
    words = [word.lower() for line in lines for word in line]
    cut = sentences(lines)
    assert [word for sentence in cut for word in sentence] == words
    assert all(cut)


def test_the_length_filter_drops_both_tails_and_nothing_else():
    lengths = [*range(1, 101), 50]
    train = [[str(i)] * length for i, length in enumerate(lengths)]
    assert [len(sentence) for sentence in length_filter(train)] == [n for n in lengths if 6 <= n <= 95]
    assert length_filter(train, 0, 1) == train
    assert length_filter([]) == []


@any_speed
@given(st.lists(st.integers(1, 60), min_size=1))
def test_the_length_filter_keeps_nine_tenths(lengths):
    kept = length_filter([["w"] * length for length in lengths])
    assert len(kept) >= 0.9 * len(lengths)
    assert {len(sentence) for sentence in kept} <= set(range(min(map(len, kept)), max(map(len, kept)) + 1))
    assert ["w"] * sorted(lengths)[len(lengths) // 2] in kept


def corpus_of(**texts):
    splits = {split: [line.split() for line in texts.get(split, "a b . c d .").split("\n")] for split in SPLITS}
    return Corpus("text", "folder x", **splits, files={split: f"x/{split}.txt" for split in SPLITS})


def test_only_training_sentences_are_filtered():
    train = "\n".join(" ".join("w" * length) for length in range(1, 101))
    parts = split_sentences(corpus_of(train=train, valid=train, test=train))
    assert [len(part) for part in parts] == [92, 100, 100]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("text", ("= Title =\n\n= = Section = =", " ".join("w" * 60_000)))
def test_a_split_that_makes_no_sentences_is_named_with_the_way_out(split, text):
    line = line_of(lambda: split_sentences(corpus_of(**{split: text})))
    assert f"x/{split}.txt" in line and "--protocol stream" in line
    assert ("60,000 words" in line) == ("w" in text)


# --- vocabulary ------------------------------------------------------------------------------------------------------


def vocabulary_of(sequences, size=None):
    ids = build_vocabulary(sequences, size).get_vocab()
    return sorted(ids, key=ids.get)


def test_vocabulary_is_the_most_frequent_words_in_an_order_that_does_not_depend_on_the_text():
    text = [["b", "c", UNK, "a", "c"], ["d", "b", EOS, "a", "c"]]
    assert vocabulary_of(text) == [EOS, UNK, "c", "a", "b", "d"]
    assert vocabulary_of(text[::-1]) == vocabulary_of(text)
    assert vocabulary_of(text, 4) == [EOS, UNK, "c", "a"]
    assert vocabulary_of(iter(text), 6) == vocabulary_of(text)
    assert vocabulary_of([list("zyxwvutsrqponmlkjihgfedcba")]) == [EOS, UNK, *"abcdefghijklmnopqrstuvwxyz"]


def test_words_are_counted_as_the_model_will_see_them():
    """Counted before lower-casing, "the" and "The" would take two places and "cat" none."""
    lines = [["The", "cat", "the", "The", "dog"], ["cat"]]
    assert vocabulary_of(sentences(lines), 4) == [EOS, UNK, "the", "cat"]


@pytest.mark.parametrize("size", (-1, 0, 2))
def test_a_vocabulary_without_a_word_is_refused(size):
    assert f"{size} given" in line_of(lambda: build_vocabulary([["a", "b"]], size))


@pytest.mark.parametrize("size", (4, 5, 10_000, 10**30))
def test_a_text_with_fewer_words_than_the_vocabulary_gives_all_it_has(size):
    assert vocabulary_of([["a", "b"]], size) == [EOS, UNK, "a", "b"]


@any_speed
@given(st.lists(st.text(min_size=1).filter(lambda word: word.split() == [word]), min_size=1))
def test_any_word_survives_the_tokenizer(words):
    words += [UNK, EOS, "@-@", "'s", "U.S.", "É", "E\u0301"]
    tokenizer = Tokenizer.from_str(build_vocabulary([words], None).to_str())  # what a checkpoint does
    assert tokenizer.encode(" ".join(words)).tokens == words
    (ids,) = encode(tokenizer, [words])
    assert ids.tolist() == [*tokenizer.encode(" ".join(words)).ids, 0]


def test_encode():
    tokenizer = build_vocabulary([["a", "b", "a"]], None)
    assert [ids.tolist() for ids in encode(tokenizer, [["a", "never", "b"], []])] == [[2, 1, 3, 0], [0]]
    assert all(ids.dtype == torch.int64 for ids in encode(tokenizer, [["a"]]))
    assert encode(tokenizer, []) == []


# --- batches ---------------------------------------------------------------------------------------------------------


def numbered(lengths):
    """Sequences of these lengths, no two of the same words; each ends with EOS."""
    return [torch.tensor([i + 1] * (length - 1) + [0]) for i, length in enumerate(lengths)]


def targets_of(batches, n=0):
    return [[row[row != IGNORE].tolist() for row in batch.targets] for batch in batches.epoch(n)]


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=40)


@any_speed
@given(sizes, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_sentence_batches_hold_every_token_once(lengths, batch_size, seed, n, shuffle):
    sequences = numbered(lengths)
    batches = SentenceBatches(sequences, batch_size, seed=seed, shuffle=shuffle)
    rows = [row for batch in targets_of(batches, n) for row in batch]
    assert sorted(rows) == sorted(sequence.tolist() for sequence in sequences)
    positions = padded = 0
    for inputs, targets in batches.epoch(n):
        assert inputs.shape == targets.shape and inputs.dtype == targets.dtype == torch.int64
        assert len(inputs) <= batch_size
        assert (inputs[:, 0] == 0).all()
        real = targets[:, :-1] != IGNORE
        assert (inputs[:, 1:][real] == targets[:, :-1][real]).all()
        assert (inputs[:, 1:][~real] == 0).all()
        positions += targets.numel()
        padded += (targets == IGNORE).sum().item()
    assert len(list(batches.epoch(n))) == len(batches) == -(-len(lengths) // batch_size)
    assert batches.tokens == sum(lengths) == positions - padded
    assert batches.padding == pytest.approx(padded / positions)
    assert batches.carry is False


def test_batches_keep_the_order_that_runs_on_record_had():
    lengths, pairs = [3, 1, 2, 3, 1, 2, 3], [(3, 1), (1, 2), (2, 2), (3, 1), (1, 1), (2, 1), (3, 1)]
    assert by_length(lengths, 2, random.Random("0 1")) == [[2, 5], [4, 1], [6], [0, 3]]
    assert by_length(pairs, 2, random.Random("0 1")) == [[5, 2], [4, 1], [6], [0, 3]]
    assert by_length(lengths, 2, None) == [[1, 4], [2, 5], [0, 3], [6]]


def test_the_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(0)
    lengths = torch.randint(2, 9, (200,)).tolist()
    batches = SentenceBatches(numbered(lengths), 8, seed=1)
    first = targets_of(batches, 3)
    torch.rand(1)
    list(batches.epoch(4))
    assert targets_of(batches, 3) == targets_of(SentenceBatches(numbered(lengths), 8, seed=1), 3) == first
    assert first != targets_of(batches, 4)
    assert first != targets_of(SentenceBatches(numbered(lengths), 8, seed=2), 3)


def test_shuffling_mixes_batches_and_neighbours_but_not_lengths():
    lengths = [length for length in range(2, 12) for _ in range(20)]
    batches = SentenceBatches(numbered(lengths), 10)
    first, second = targets_of(batches, 0), targets_of(batches, 1)
    order = [len(batch[0]) for batch in first]
    assert sorted(order) != order
    assert {frozenset(map(tuple, batch)) for batch in first} != {frozenset(map(tuple, batch)) for batch in second}
    assert batches.padding == 0


def test_without_shuffling_the_order_is_that_of_length():
    batches = SentenceBatches(numbered([3, 1, 2, 3, 1]), 2, shuffle=False)
    assert targets_of(batches) == [[[0], [0]], [[3, 0], [1, 1, 0]], [[4, 4, 0]]]
    assert targets_of(batches, 0) == targets_of(batches, 7)


@any_speed
@given(sizes, st.integers(1, 5), st.integers(1, 50))
def test_stream_windows_put_together_are_the_text(lengths, batch_size, bptt):
    sequences = numbered(lengths)
    text = torch.cat(sequences)
    if len(text) < batch_size:
        assert f"{batch_size} rows given" in line_of(lambda: StreamBatches(sequences, batch_size, bptt))
        return
    batches = StreamBatches(sequences, batch_size, bptt)
    inputs, targets = (torch.cat(parts, dim=1) for parts in zip(*batches.epoch(0), strict=True))
    dropped = len(text) - targets.numel()
    assert 0 <= dropped < batch_size and (batch_size > 1 or dropped == 0)
    assert torch.equal(targets.flatten(), text[: len(text) - dropped])
    assert torch.equal(inputs.flatten(), torch.cat([torch.tensor([0]), text])[: targets.numel()])
    widths = [batch.inputs.shape[1] for batch in batches.epoch(1)]
    assert widths[:-1] == [bptt] * (len(batches) - 1) and 0 < widths[-1] <= bptt
    assert batches.tokens == targets.numel()
    assert (batches.carry, batches.padding) == (True, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: SentenceBatches([], 4), "none given"),
        (lambda: SentenceBatches(numbered([3]), 0), "batch_size: 0 given, at least 1"),
        (lambda: StreamBatches([], 1, 5), "1 rows given, but the text has only 0 tokens"),
        (lambda: StreamBatches(numbered([3]), 4, 5), "4 rows given, but the text has only 3 tokens"),
        (lambda: StreamBatches(numbered([3]), -1, 5), "batch_size: -1 given"),
        (lambda: StreamBatches(numbered([3]), 1, 0), "bptt: 0 given"),
    ),
)
def test_sizes_that_make_no_batch_are_refused(call, message):
    assert message in line_of(call)


# --- the synthetic corpus; the language itself: test_synthetic.py ----------------------------------------------------


def test_the_synthetic_corpus():
    corpus = load_corpus("synthetic", seed=1)
    assert corpus == load_corpus("synthetic", seed=1)
    assert corpus.train != load_corpus("synthetic", seed=2).train
    assert set(corpus.floor) == set(SPLITS)
    tokens = sum(len(line) + 1 for line in corpus.train)
    assert 100_000 < tokens < 200_000
    words = Counter(word for line in corpus.train for word in line)
    assert {word for line in corpus.valid + corpus.test for word in line} <= words.keys()  # no UNK, so the floor holds


# --- the real corpora ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wikitext_2():
    return load_corpus("wikitext-2", DATA / "wikitext-2")


@on_real_corpora
def test_wikitext_2_has_the_published_numbers_of_tokens(wikitext_2):
    start = time.monotonic()
    tokenizer = build_vocabulary(wikitext_2.train, None)
    assert tokenizer.get_vocab_size() == 33_278
    tokens = [StreamBatches(encode(tokenizer, getattr(wikitext_2, split)), 1, 70).tokens for split in SPLITS]
    assert tokens == [2_088_628, 217_646, 245_569]
    assert time.monotonic() - start < 10
    assert "checksums of the official files verified" in wikitext_2.source


@on_real_corpora
def test_wikitext_2_sentences_are_padded_little(wikitext_2):
    cut = {split: sentences(getattr(wikitext_2, split)) for split in SPLITS}
    kept = length_filter(cut["train"])
    dropped = 1 - len(kept) / len(cut["train"])
    assert 0.05 < dropped < 0.1
    tokenizer = build_vocabulary(kept, 10_000)
    assert tokenizer.get_vocab_size() == 10_000
    for sequences in (kept, cut["valid"], cut["test"]):
        batches = SentenceBatches(encode(tokenizer, sequences), 32)
        positions = sum(batch.targets.numel() for batch in batches.epoch(0))
        assert 1 - batches.tokens / positions <= 0.05


@on_real_corpora
def test_the_rows_of_hugging_face_become_the_official_files_byte_for_byte(cache, monkeypatch, wikitext_2):
    """Against the official checksums in the module, which nothing here replaces."""
    texts = {split: (DATA / "wikitext-2" / f"wiki.{split}.tokens").read_bytes().decode() for split in SPLITS}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: hugging_face(texts))
    assert load_corpus("wikitext-2").test == wikitext_2.test


@on_real_corpora
def test_ptb(tmp_path):
    corpus = load_corpus("ptb", DATA)
    assert [len(getattr(corpus, split)) for split in SPLITS] == [42_068, 3_370, 3_761]
    assert build_vocabulary(corpus.train, None).get_vocab_size() == 10_000
