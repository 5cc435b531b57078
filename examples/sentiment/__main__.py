"""QRNN against LSTM as readers of reviews (paper, section 3.1): `python -m examples.sentiment --help`."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # while it imports, Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import binomtest
from tokenizers import Tokenizer
from torch import nn

from examples.sentiment.config import PRESETS, Config
from examples.sentiment.data import LABELS, Review, ReviewBatches, load_reviews, read_vectors
from examples.sentiment.model import Classifier, build_model, label_loss
from lab.batches import build_vocabulary, encode
from lab.command_line import exit_code, parse
from lab.report import Layout, fenced
from lab.run import Task, run

NAMES = Config.names
EVALUATION_ROWS = 32
HEAD_REVIEWS = 4 * EVALUATION_ROWS  # of the validation split, to time evaluation on
EXAMPLES = 3  # reviews of a kind that the report shows,
EXAMPLE_WORDS = 40  # and how much of each


# --- how good they are -----------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """Hold what a model made of one review."""

    words: list[int]
    label: int
    positive: float  # the probability of label 1

    @property
    def right(self) -> bool:
        return (self.positive > 0.5) == self.label

    @property
    def certainty(self) -> float:
        """Return the probability of what was predicted."""
        return max(self.positive, 1 - self.positive)


@torch.no_grad()
def predict(model: Classifier, batches: ReviewBatches) -> list[Prediction]:
    """Return what the model says of every review of a split. It is put into eval mode."""
    model.eval()
    device = model.embedding.weight.device
    predictions: list[Prediction] = []
    for batch in batches.epoch(0):
        words, lengths, labels = batch
        positive = model(words.to(device), lengths.to(device)).cpu().double().sigmoid().tolist()
        rows = (row[:length].tolist() for row, length in zip(words, lengths, strict=True))
        predictions += map(Prediction, rows, labels.tolist(), positive)
    return predictions


def accuracy(predictions: list[Prediction]) -> dict[str, float]:
    """Return the accuracy and the ends of its 95 % confidence interval, in %.

    Wilson's score interval (E. B. Wilson 1927, JASA 22, 209-212) never leaves 0 to 100.
    """
    right = sum(prediction.right for prediction in predictions)
    interval = binomtest(right, len(predictions)).proportion_ci(method="wilson")
    return {"accuracy": 100 * right / len(predictions), "low": 100 * interval.low, "high": 100 * interval.high}


def describe_accuracy(measured: dict[str, float] | None) -> str:
    """Describe an accuracy and its interval, for example "77.40 (74.8 to 79.8)"."""
    return "not read" if measured is None else "{accuracy:.2f} ({low:.1f} to {high:.1f})".format(**measured)


def most_certain(predictions: list[Prediction], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return `EXAMPLES` right ones, then as many wrong ones, of which the model is most certain, as JSON values."""
    chosen = []
    for right in (True, False):
        kind = [prediction for prediction in predictions if prediction.right == right]
        chosen += sorted(kind, key=lambda prediction: -prediction.certainty)[:EXAMPLES]
    return [
        {
            "predicted": LABELS[prediction.positive > 0.5],
            "probability": prediction.certainty,
            "label": LABELS[prediction.label],
            "words": [tokenizer.id_to_token(word) for word in prediction.words[:-1]],  # without EOS
        }
        for prediction in chosen
    ]


def examples(results: list[dict[str, Any]], folder: Path) -> list[str]:
    """Return the part of the report that shows what the models are sure of."""
    lines = ["", "Validation reviews as the models read them, those with the surest predictions, right and wrong:"]
    for result in results:
        lines += ["", f"## What the {NAMES[result['model']]} is surest of", ""]
        shown = []
        for example in result["examples"]:
            verdict = "right" if example["predicted"] == example["label"] else "WRONG"
            words, more = example["words"][:EXAMPLE_WORDS], " ..." * (len(example["words"]) > EXAMPLE_WORDS)
            shown.append(
                f"{verdict}, {100 * example['probability']:.2f} % {example['predicted']}: {' '.join(words)}{more}"
            )
        lines += fenced(shown)
    return lines


def accuracy_layout(fingerprint: dict[str, Any], best: dict[str, float]) -> Layout:
    """Return what the report shows.

    Args:
        fingerprint: of the task.
        best: split -> the accuracy that cannot be beaten, in %.
    """
    return Layout(
        unit="reviews",
        measure="loss",
        convert=float,
        columns={
            "validation accuracy, %": lambda result: describe_accuracy(result["valid"]),
            "test accuracy, %": lambda result: describe_accuracy(result["test"]),
        },
        best_possible={f"{'validation' if split == 'valid' else split} accuracy, %": best[split] for split in best},
        facts=[
            "In brackets Wilson's 95 % confidence interval: how far the choice of the reviews may have moved the "
            "accuracy; other seeds move it too. Test is read once, at the epoch with the lowest validation loss.",
            "{train_reviews:,} reviews for training, {valid_reviews:,} for validation, {test_reviews:,} for test; "
            "{vocabulary:,} words, {ready_made_vectors:,} with a ready-made vector.".format(**fingerprint),
        ],
        sections=examples,
    )


# --- the task --------------------------------------------------------------------------------------------------------


class Sentiment(Task[Classifier]):
    """Tell positive reviews from negative ones.

    Args:
        config: checked.

    Raises:
        CorpusError: if the reviews or the word vectors are not there, or not what they should be.
    """

    config: Config
    train: ReviewBatches
    valid: ReviewBatches
    step = staticmethod(label_loss)
    hint = "That is long: it is meant for a GPU. On 2 CPU cores --preset mr takes about 10 minutes, --demo half of one."

    def __init__(self, config: Config) -> None:
        self.config = config
        reviews = load_reviews(config.corpus, config.data, config.fold, config.seed)
        self.tokenizer = build_vocabulary((review.words for review in reviews.train), config.vocabulary)
        vocabulary = self.tokenizer.get_vocab()
        self.vectors = {} if config.glove is None else read_vectors(config.glove, vocabulary, config.embedding)
        self.train = self.batches(reviews.train, config.batch_size, shuffle=True)
        self.valid = self.batches(reviews.valid, EVALUATION_ROWS)
        self.head = self.batches(reviews.valid[:HEAD_REVIEWS], EVALUATION_ROWS)
        self.test = self.batches(reviews.test, EVALUATION_ROWS)
        self.fingerprint = {
            "name": config.corpus,
            "source": reviews.source,
            "sha256_of_reviews": reviews.sha256,
            "vocabulary": len(vocabulary),
            "ready_made_vectors": len(self.vectors),
            "padding": round(self.train.padding, 4),
            "train_reviews": len(reviews.train),
            "valid_reviews": len(reviews.valid),
            "test_reviews": len(reviews.test),
        }
        self.files = {"vocabulary.json": self.tokenizer.to_str(pretty=True)}
        self.layout = accuracy_layout(self.fingerprint, reviews.best or {})

    def batches(self, reviews: list[Review], rows: int, shuffle: bool = False) -> ReviewBatches:
        sequences = encode(self.tokenizer, [review.words for review in reviews])
        labels = [review.label for review in reviews]
        return ReviewBatches(sequences, labels, rows, seed=self.config.seed, shuffle=shuffle)

    def build(self, name: str) -> Classifier:
        model = build_model(self.config, name, self.tokenizer.get_vocab_size())
        with torch.no_grad():
            for index, vector in self.vectors.items():
                model.embedding.weight[index] = vector
        return model

    def recurrent(self, model: Classifier) -> nn.Module:
        return model.rnn

    def judge(self, model: Classifier, valid_loss: float, test: bool) -> dict[str, Any]:
        predictions = predict(model, self.valid)
        return {
            "valid_loss": valid_loss,
            "valid": accuracy(predictions),
            "test": accuracy(predict(model, self.test)) if test else None,
            "examples": most_certain(predictions, self.tokenizer),
        }


# --- the command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Return the exit code: 0, 1 if the run failed, 2 if the input was wrong, 130 if it was interrupted."""

    def command() -> int:
        config = parse(arguments, PRESETS)
        return run(config, lambda processes: Sentiment(config))

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
