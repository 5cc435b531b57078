"""QRNN against LSTM as language models: `python experiment.py --help`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from tokenizers import Tokenizer
from torch import nn

from checkpoint import CheckpointError, load_checkpoint, write_file
from corpora import (
    Corpus,
    CorpusError,
    SentenceBatches,
    StreamBatches,
    build_vocabulary,
    encode,
    length_filter,
    load_corpus,
    sentences,
)
from language_model import LanguageModel, count_parameters, generate, matched_width, next_word_loss
from presets import PRESETS, Config
from qrnn import QRNN
from report import describe_time, write_report
from settings import InputError
from training import (
    Batches,
    StopSignal,
    Trainer,
    TrainingError,
    agree,
    evaluate,
    perplexity,
    seconds_per_item,
)

SAMPLE_WORDS = 60
EVALUATION_ROWS = 16  # sentences a batch: the longest ones set the memory that it takes
HEAD_SEQUENCES = 4 * EVALUATION_ROWS  # of the validation split, to time evaluation on
EVALUATION_WINDOW = 1000  # words of the one row of a stream that are evaluated at a time
PATIENCE_HOURS = 2  # on a CPU, a longer run is worth a hint


FREE_TO_CHANGE = ("data", "name", "resume", "generate", "checkpoint_minutes")  # when a run is resumed


@dataclass(frozen=True)
class Data:
    """A corpus ready to train on; `floor` is the best possible perplexity of each split, where it is known."""

    tokenizer: Tokenizer
    train: Batches
    valid: Batches
    test: Batches
    valid_head: Batches  # a little of `valid`, to estimate the time that all of it takes
    floor: dict[str, float]
    fingerprint: dict[str, Any]


# --- data and models -------------------------------------------------------------------------------------------------


def prepare_data(config: Config) -> Data:
    """Raises CorpusError: the corpus is not there, or not what it should be."""
    corpus = load_corpus(config.corpus, config.data, seed=config.seed)
    train, valid, test = split_up(corpus, config)
    tokenizer = build_vocabulary(train, config.vocabulary)
    encoded = {name: encode(tokenizer, split) for name, split in (("train", train), ("valid", valid), ("test", test))}
    if config.protocol == "sentence":
        batches: Batches = SentenceBatches(encoded["train"], config.batch_size, seed=config.seed)
    else:
        batches = StreamBatches(encoded["train"], config.batch_size, config.bptt)
    words = "\n".join(" ".join(line) for split in (corpus.train, corpus.valid, corpus.test) for line in split)
    return Data(
        tokenizer,
        batches,
        evaluation_batches(config, encoded["valid"]),
        evaluation_batches(config, encoded["test"]),
        evaluation_batches(config, encoded["valid"][:HEAD_SEQUENCES]),
        corpus.floor or {},
        {
            "name": corpus.name,
            "source": corpus.source,
            "sha256_of_words": hashlib.sha256(words.encode()).hexdigest(),
            "vocabulary": tokenizer.get_vocab_size(),
            "padding": round(batches.padding, 4),
        }
        | {f"{name}_tokens": sum(map(len, sequences)) for name, sequences in encoded.items()},
    )


def split_up(corpus: Corpus, config: Config) -> tuple[list[list[str]], ...]:
    """The sequences of the three splits, in words."""
    if config.protocol == "stream" or corpus.floor is not None:  # the lines of the artificial language are sentences
        return corpus.train, corpus.valid, corpus.test
    return length_filter(sentences(corpus.train)), sentences(corpus.valid), sentences(corpus.test)


def evaluation_batches(config: Config, sequences: list[torch.Tensor]) -> Batches:
    """A split for `evaluate`: a stream is one row, so that nothing depends on a batch size."""
    if config.protocol == "sentence":
        return SentenceBatches(sequences, EVALUATION_ROWS, shuffle=False)
    return StreamBatches(sequences, 1, EVALUATION_WINDOW)


def build_qrnn(config: Config, hidden: int) -> QRNN:
    return QRNN(
        config.embedding,
        hidden,
        config.layers,
        batch_first=True,
        dropout=config.dropout,
        kernel_size=config.kernel_size,
        mode=config.mode,
        zoneout=config.zoneout,
        activation=config.activation,
        method=config.method,
    )


def build_lstm(config: Config, hidden: int) -> nn.LSTM:
    dropout = config.dropout if config.layers > 1 else 0.0  # with one layer there is nothing between layers
    return nn.LSTM(config.embedding, hidden, config.layers, batch_first=True, dropout=dropout)


def build_model(config: Config, name: str, vocabulary: int) -> LanguageModel:
    """The language model "qrnn" or "lstm", initialised from the seed."""
    hidden, build = config.hidden, {"qrnn": build_qrnn, "lstm": build_lstm}[name]
    if name == "lstm" and config.match:
        with torch.device("meta"):
            target = count_parameters(build_qrnn(config, hidden))
        hidden = matched_width(target, lambda width: build_lstm(config, width))
    torch.manual_seed(config.seed)
    return LanguageModel(
        build(config, hidden),
        hidden,
        vocabulary,
        config.embedding,
        dropout_embedding=config.dropout_embedding,
        dropout_output=config.dropout_output,
        tied=config.tied,
    )


# --- the run ---------------------------------------------------------------------------------------------------------


def run(config: Config) -> int:
    """Train, evaluate and report.

    Returns:
        the exit code: 0, or 130 if the run was interrupted.

    Raises:
        InputError, CorpusError, CheckpointError: before anything is overwritten.
        TrainingError, OSError: nothing that was written is lost.
    """
    accelerator = Accelerator(cpu=config.device == "cpu")
    record = read_record(config)
    if config.protocol == "stream" and config.batch_size < accelerator.num_processes:
        raise InputError(f"--batch-size {config.batch_size}: at least one row for each process expected")
    with accelerator.main_process_first():
        data = prepare_data(config)
    check_same(config, data, accelerator.num_processes, record)
    accelerator.wait_for_everyone()  # until all have looked at the folder
    if accelerator.is_main_process and record is None:
        config.folder.mkdir(parents=True, exist_ok=True)
        write_file(config.folder / "vocabulary.json", data.tokenizer.to_str(pretty=True))
        record = new_record(config, data, accelerator.num_processes)
        write_file(config.folder / "config.json", json.dumps(record, indent=1) + "\n")

    announce(config, data, accelerator)
    results = []
    with StopSignal() as stop:
        for name in config.models:
            results.append(finished_result(config, name) or train_model(config, data, name, stop))
            if any(agree(accelerator, stop.requested)):
                break
        interrupted = len(results) < len(config.models) or results[-1]["interrupted_at_epoch"] is not None
    if accelerator.is_main_process:
        table = write_report(
            config.folder, config, data.fingerprint, data.floor, results, interrupted, accelerator.device.type
        )
        print(f"\n{table}\n\nThe report is {config.folder / 'report.md'}.")
    return 130 if interrupted else 0


def new_record(config: Config, data: Data, processes: int) -> dict[str, Any]:
    """What config.json holds: all that decides about the numbers."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    return json.loads(json.dumps({"config": settings, "corpus": data.fingerprint, "processes": processes}))


def read_record(config: Config) -> dict[str, Any] | None:
    """config.json of the run to be resumed; None for a new run.

    Raises:
        InputError: the folder is in use and --resume is not given, or config.json cannot be read.
    """
    path = config.folder / "config.json"
    if not config.resume and config.folder.exists() and any(config.folder.iterdir()):
        raise InputError(f"{config.folder} exists; go on with it by --resume, or choose another --name")
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path} is damaged; start again under another --name") from None


def check_same(config: Config, data: Data, processes: int, record: dict[str, Any] | None) -> None:
    """Raises InputError: the run to be resumed is another one."""
    if record is None:
        return
    mine = new_record(config, data, processes)
    theirs = {key: record.get(key, {}) for key in ("config", "corpus")}
    pairs = [("processes", processes, record.get("processes"))]
    for part in ("config", "corpus"):
        pairs += [(name, value, theirs[part].get(name)) for name, value in mine[part].items()]
    different = [
        f"{name} {old!r} became {new!r}"
        for name, new, old in pairs
        if new != old and name not in (*FREE_TO_CHANGE, "source")
    ]
    if different:
        raise InputError(f"{config.folder} was started with other settings: {', '.join(different)}")


def announce(config: Config, data: Data, accelerator: Accelerator) -> None:
    """Print what will be trained and about how long it takes."""
    accelerator.print(f"{data.fingerprint['name']}: {len(data.train):,} batches, {data.train.tokens:,} tokens an epoch")
    total = 0.0
    for name in config.models:
        if (config.folder / name / "result.json").exists():
            continue
        model = build_model(config, name, data.tokenizer.get_vocab_size())  # built again, from the seed, to be trained
        step = seconds_per_item(model, next_word_loss, data.train, config)
        look = evaluation_seconds(model, data)
        seconds = config.epochs * (step * data.train.tokens + look * data.valid.tokens) + look * data.test.tokens
        total += seconds
        recurrent = count_parameters(model.rnn)
        accelerator.print(
            f"{name}: {type(model.rnn).__name__}, {recurrent:,} recurrent parameters of {count_parameters(model):,}, "
            f"{1 / step:,.0f} tokens/s, about {describe_time(seconds)} from the beginning"
        )
    accelerator.print(f"The whole run will take about {describe_time(total)}; {config.folder} is its folder.")
    if accelerator.device.type == "cpu" and total > PATIENCE_HOURS * 3600 and config.preset not in ("small", "demo"):
        accelerator.print("That is long: it is meant for a GPU. --preset small takes about 50 minutes on 2 CPU cores.")


def evaluation_seconds(model: LanguageModel, data: Data) -> float:
    """Seconds that evaluating a word takes."""
    evaluate(model, next_word_loss, data.valid_head)  # the first time is slower
    started = time.perf_counter()
    evaluate(model, next_word_loss, data.valid_head)
    return (time.perf_counter() - started) / data.valid_head.tokens


def finished_result(config: Config, name: str) -> dict[str, Any] | None:
    """What came out of a model that was finished before the run was resumed."""
    path = config.folder / name / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def train_model(config: Config, data: Data, name: str, stop: StopSignal) -> dict[str, Any]:
    """Train one model and, when it is finished, test it at its best epoch."""
    folder = config.folder / name
    model = build_model(config, name, data.tokenizer.get_vocab_size())
    trainer = Trainer(model, next_word_loss, data.train, config)

    def validate(model: nn.Module) -> float:
        return evaluate(model, next_word_loss, data.valid, data.floor.get("valid"))

    outcome = trainer.run(folder, validate, stop, name)
    progress, loss = outcome.progress, outcome.interrupted_loss
    if loss is None or progress.best_loss <= loss:
        best_epoch, best_loss = load_best(folder, model, trainer.accelerator)
    else:  # interrupted where it was best: the weights at hand
        best_epoch, best_loss = progress.step / len(data.train), loss
    test_loss = None  # the test split is read once, when training is finished
    if loss is None:
        test_loss = evaluate(model, next_word_loss, data.test, data.floor.get("test"))
    result = {
        "model": name,
        "hidden": model.hidden,
        "recurrent_parameters": count_parameters(model.rnn),
        "parameters": count_parameters(model),
        "best_epoch": best_epoch,
        "valid_perplexity": perplexity(best_loss),
        "test_perplexity": None if test_loss is None else perplexity(test_loss),
        "tokens_per_second": progress.items / progress.seconds,
        "training_seconds": progress.seconds,
        "wall_seconds": progress.wall_seconds,
        "peak_memory_bytes": progress.peak_memory,
        "interrupted_at_epoch": None if loss is None else progress.step / len(data.train),
        "sample": sample(config, data.tokenizer, model, []),
    }
    if loss is None and trainer.accelerator.is_main_process:
        write_file(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def load_best(folder: Path, model: LanguageModel, accelerator: Accelerator) -> tuple[int, float]:
    """Put the best weights into the model; their epoch, counted from 1, and validation loss in nats.

    Raises:
        CheckpointError: there are none that are undamaged.
    """
    with accelerator.main_process_first():
        found = load_checkpoint(folder, "best")
    if found is None:
        raise CheckpointError(f"{folder} holds no best checkpoint; train first, without --generate")
    weights, state, lines = found
    for line in lines:
        print(line, file=sys.stderr)
    model.load_state_dict(weights)
    return state["epoch"], state["valid_loss"]


def sample(config: Config, tokenizer: Tokenizer, model: LanguageModel, prompt: list[str]) -> str:
    carry = config.protocol == "stream"
    return generate(model, tokenizer, prompt, words=SAMPLE_WORDS, seed=config.seed, carry=carry)


def continue_text(config: Config, prompt: str) -> int:
    """Print how the models of a run continue the prompt.

    Raises:
        InputError, CheckpointError: there is no such run, or nothing in it.
    """
    record, path = read_record(replace(config, resume=True)), config.folder / "vocabulary.json"
    if record is None or not path.exists():
        raise InputError(f"{config.folder} holds no run; train first, or give the --name or the --preset of one")
    trained = replace(config, **{key: record["config"][key] for key in record["config"] if key not in FREE_TO_CHANGE})
    tokenizer = Tokenizer.from_file(str(path))
    words = (prompt.lower() if trained.protocol == "sentence" else prompt).split()
    unknown = [word for word in words if tokenizer.token_to_id(word) is None]
    if unknown:
        print(f"not in the vocabulary, read as <unk>: {' '.join(unknown)}", file=sys.stderr)
    for name in trained.models:
        model = build_model(trained, name, tokenizer.get_vocab_size())
        epoch, loss = load_best(config.folder / name, model, Accelerator(cpu=True))
        print(f"{name} (epoch {epoch}, validation perplexity {perplexity(loss):.1f}):")
        print(sample(replace(trained, seed=config.seed), tokenizer, model, words) + "\n")
    return 0


# --- the command line ------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> Config:
    """The preset with the flags on top.

    Raises:
        InputError: a flag or a value that does not exist; the message is one line.
    """
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", default="girrbach")
    preset = PRESETS.get(chosen.parse_known_args(arguments)[0].preset, PRESETS["girrbach"])
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            config = tyro.cli(Config, args=arguments, default=preset)
    except SystemExit as stopped:
        if not stopped.code:
            raise  # --help
        raise InputError(_without_box(message.getvalue())) from None
    config.check()
    return config


def _without_box(message: str) -> str:
    """What tyro says in its box, between the title and the hint at --help, in one line."""
    lines = (line.strip("╭╮╰╯│─ ") for line in message.splitlines())
    _, *inside = (line for line in lines if line.strip("-"))
    return " ".join(itertools.takewhile(lambda line: not line.startswith("For full helptext"), inside))


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0, 1 if the run failed, 2 if the input was wrong, 130 if it was interrupted."""
    try:
        config = parse(arguments)
        return run(config) if config.generate is None else continue_text(config, config.generate)
    except (InputError, CorpusError, CheckpointError) as error:
        return fail(str(error), 2)
    except TrainingError as error:
        return fail(str(error), 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return fail("the disk is full; nothing that was written is lost: make room and go on with --resume", 1)
    except KeyboardInterrupt:
        return fail("stopped at once; go on with --resume", 130)


def fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
