"""QRNN against LSTM as language models: `python experiment.py --help`."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # while it imports, Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from lab.batches import SentenceBatches, StreamBatches, build_vocabulary, encode
from lab.command_line import exit_code, parse
from lab.corpora import SPLITS, Corpus, load_corpus, split_sentences
from lab.dense_lstm import DenseLSTM
from lab.initial import initialise
from lab.language_model import LanguageModel, generate, next_word_loss
from lab.presets import PRESETS, Config
from lab.report import Layout, fenced
from lab.run import Task, load_best, lstm_width, recorded, run
from lab.run_folder import RunFolder
from lab.settings import InputError
from lab.training import Batches, evaluate, perplexity
from qrnn import QRNN

VOCABULARY = "vocabulary.json"
NAMES = Config.names
SAMPLE_WORDS = 60
EVALUATION_ROWS = 16  # sentences a batch: the longest ones set the memory that it takes
HEAD_SEQUENCES = 4 * EVALUATION_ROWS  # of the validation split, to time evaluation on
EVALUATION_WINDOW = 1000  # words of the one row of a stream that are evaluated at a time


# --- data and models -------------------------------------------------------------------------------------------------


def split_up(corpus: Corpus, config: Config) -> tuple[list[list[str]], ...]:
    """Return the sequences of the three splits, in words."""
    if config.protocol == "stream" or corpus.floor is not None:  # the lines of the artificial language are sentences
        return corpus.train, corpus.valid, corpus.test
    return split_sentences(corpus)


def training_batches(config: Config, sequences: list[torch.Tensor]) -> SentenceBatches | StreamBatches:
    """Return the batches of a split to train on."""
    if config.protocol == "sentence":
        return SentenceBatches(sequences, config.batch_size, seed=config.seed)
    return StreamBatches(sequences, config.batch_size, config.bptt)


def evaluation_batches(config: Config, sequences: list[torch.Tensor]) -> Batches:
    """Return a split for `evaluate`: a stream is one row, so that nothing depends on a batch size."""
    if config.protocol == "sentence":
        return SentenceBatches(sequences, EVALUATION_ROWS, shuffle=False)
    return StreamBatches(sequences, 1, EVALUATION_WINDOW)


def build_qrnn(config: Config, hidden: int) -> QRNN:
    return QRNN(
        config.embedding,
        hidden,
        config.layers,
        batch_first=True,
        dropout=config.dropout_between,
        kernel_size=config.kernel_size,
        first_kernel_size=config.first_kernel_size or config.kernel_size,
        mode=config.mode,
        zoneout=config.zoneout,
        mean_zoneout=True,
        activation=config.activation,
        dense=config.dense,
        method=config.method,
    )


def build_lstm(config: Config, hidden: int) -> nn.LSTM | DenseLSTM:
    dropout = config.dropout_between
    if config.dense:
        return DenseLSTM(config.embedding, hidden, config.layers, dropout)
    return nn.LSTM(config.embedding, hidden, config.layers, batch_first=True, dropout=dropout)


def build_model(config: Config, name: str, vocabulary: int) -> LanguageModel:
    """Return the language model "qrnn" or "lstm", initialised from the seed."""
    hidden, build = config.hidden, {"qrnn": build_qrnn, "lstm": build_lstm}[name]
    if name == "lstm" and config.match:
        hidden = lstm_width(hidden, partial(build_qrnn, config), partial(build_lstm, config))
    torch.manual_seed(config.seed)
    rnn = build(config, hidden)
    initialise(rnn, config)
    return LanguageModel(
        rnn,
        hidden,
        vocabulary,
        config.embedding,
        dropout_embedding=config.dropout_embedding,
        dropout_output=config.dropout_output,
        tied=config.tied,
    )


# --- the task --------------------------------------------------------------------------------------------------------


class LanguageModelling(Task[LanguageModel]):
    """Predict the next word.

    Args:
        config: checked.
        processes: that train together.

    Raises:
        InputError: if there are more processes than rows of a stream.
        CorpusError: if the corpus is not there, or not what it should be.
    """

    config: Config
    train: SentenceBatches | StreamBatches
    step = staticmethod(next_word_loss)
    hint = "That is long: it is meant for a GPU. --preset small takes about 40 minutes on 2 CPU cores."

    def __init__(self, config: Config, processes: int = 1) -> None:
        if config.protocol == "stream" and config.batch_size < processes:
            raise InputError(f"--batch-size {config.batch_size}: at least one row for each process expected")
        self.config = config
        corpus = load_corpus(config.corpus, config.data, seed=config.seed)
        splits = dict(zip(SPLITS, split_up(corpus, config), strict=True))
        self.tokenizer = build_vocabulary(splits["train"], config.vocabulary)
        encoded = {name: encode(self.tokenizer, split) for name, split in splits.items()}
        self.train = training_batches(config, encoded["train"])
        self.valid = evaluation_batches(config, encoded["valid"])
        self.head = evaluation_batches(config, encoded["valid"][:HEAD_SEQUENCES])
        self.test = evaluation_batches(config, encoded["test"])
        self.floor = corpus.floor or {}
        self.fingerprint = {
            "name": corpus.name,
            "source": corpus.source,
            "sha256_of_words": corpus.sha256_of_words,
            "vocabulary": self.tokenizer.get_vocab_size(),
            "padding": round(self.train.padding, 4),
            **{f"{name}_tokens": sum(map(len, sequences)) for name, sequences in encoded.items()},
        }
        self.files = {VOCABULARY: self.tokenizer.to_str(pretty=True)}
        self.layout = perplexity_layout(self.fingerprint, config.protocol, self.floor)

    def build(self, name: str) -> LanguageModel:
        return build_model(self.config, name, self.tokenizer.get_vocab_size())

    def recurrent(self, model: LanguageModel) -> nn.Module:
        return model.rnn

    def validate(self, model: nn.Module) -> float:
        return evaluate(model, self.step, self.valid, self.floor.get("valid"))

    def judge(self, model: LanguageModel, valid_loss: float, test: bool) -> dict[str, Any]:
        test_loss = evaluate(model, self.step, self.test, self.floor.get("test")) if test else None
        return {
            "valid_perplexity": perplexity(valid_loss),
            "test_perplexity": None if test_loss is None else perplexity(test_loss),
            "sample": sample(self.config, self.tokenizer, model, []),
        }


def perplexity_layout(fingerprint: dict[str, Any], protocol: str, floor: dict[str, float]) -> Layout:
    """Return what the report shows.

    Args:
        fingerprint: of the task.
        protocol: how the text was read.
        floor: split -> the best possible perplexity, where it is known.
    """
    return Layout(
        unit="tokens",
        measure="perplexity",
        convert=perplexity,
        columns={
            "validation perplexity": lambda result: f"{result['valid_perplexity']:.2f}",
            "test perplexity": lambda result: (
                "not read" if result["test_perplexity"] is None else f"{result['test_perplexity']:.2f}"
            ),
        },
        best_possible={f"{'validation' if split == 'valid' else split} perplexity": floor[split] for split in floor},
        facts=[
            "Perplexity is exp(sum of the negative log-likelihoods / number of words) over the whole split. Test "
            "is read once, at the epoch that was best on validation.",
            f"Protocol `{protocol}`, {fingerprint['vocabulary']:,} words, "
            f"{fingerprint['train_tokens']:,} training tokens, "
            f"{100 * fingerprint['padding']:.1f} % padding.",
        ],
        sections=samples,
    )


def samples(results: list[dict[str, Any]], folder: Path) -> list[str]:
    """Return the part of the report that shows what the models write."""
    lines = ["", "The samples below come from the same random draws."] if len(results) > 1 else []
    for result in results:
        lines += ["", f"## A sample of the {NAMES[result['model']]}", "", *fenced([result["sample"]])]
    return lines


def sample(config: Config, tokenizer: Tokenizer, model: LanguageModel, prompt: list[str]) -> str:
    carry = config.protocol == "stream"
    return generate(model, tokenizer, prompt, words=SAMPLE_WORDS, seed=config.seed, carry=carry)


def continue_text(config: Config, prompt: str) -> int:
    """Print how the models of a run continue the prompt.

    Raises:
        InputError, CheckpointError: if there is no such run, or nothing in it.
    """
    folder = RunFolder(config.folder)
    record = folder.record(config.experiment)
    trained = recorded(config, record)
    tokenizer = Tokenizer.from_str(folder.file(VOCABULARY, record))
    words = (prompt.lower() if trained.protocol == "sentence" else prompt).split()
    unknown = [word for word in words if tokenizer.token_to_id(word) is None]
    if unknown:
        print(f"not in the vocabulary, read as <unk>: {' '.join(unknown)}", file=sys.stderr)
    for name in trained.models:
        model = build_model(trained, name, tokenizer.get_vocab_size())
        epoch, loss = load_best(folder.model(name, record), model)
        print(f"{name} (epoch {epoch}, validation perplexity {perplexity(loss):.1f}):")
        print(sample(replace(trained, seed=config.seed), tokenizer, model, words) + "\n")
    return 0


# --- the command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Return the exit code: 0, 1 if the run failed, 2 if the input was wrong, 130 if it was interrupted."""

    def command() -> int:
        config = parse(arguments, PRESETS)
        if config.generate is not None:
            return continue_text(config, config.generate)
        return run(config, lambda processes: LanguageModelling(config, processes))

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
