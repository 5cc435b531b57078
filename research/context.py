"""Measure what models make of the words before: the perplexity of the same words, given the last 1, 2, 4 ... 256.

    python -m research.studies ptb --data ptb          # trains a QRNN and an LSTM for 15 epochs, and
    python -m research.studies ptb_short --data ptb    # others for 3
    python -m research.context --data ptb     # 20 minutes; writes results/context.json

The models read windows of the validation split, each from a state of zeros. The last half of a window is scored (of a
window of one word the one), so "16" stands for 9 to 16 words known, and the windows overlap by the first half, so each
word is scored once. Beside it stands how well each model fits the whole training text without dropout.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.record import RESULTS
from experiment import build_model, evaluation_batches
from lab.batches import build_vocabulary, encode
from lab.checkpoint import write_file
from lab.command_line import exit_code
from lab.corpora import load_corpus
from lab.language_model import next_word_loss
from lab.parser import Parser
from lab.presets import Config
from lab.provenance import provenance
from lab.run import RUNS, load_best
from lab.run_folder import ModelFolder
from lab.settings import InputError
from lab.training import evaluate, perplexity
from research.jobs import ROOT, corpus_folder, finished, identify
from research.studies import STUDIES

COMPARED = ("ptb_short", "ptb")
KNOWN = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # words before the one that is predicted, at most
BATCH = 4096  # words


@torch.no_grad()
def losses(model: nn.Module, words: Tensor, known: int) -> Tensor:
    """Return what each word costs, given the `known` words before it, or fewer, but more than half as many.

    Args:
        model: in eval mode, a `LanguageModel`.
        words: (N,), int64, at least 3/2 `KNOWN[-1]` of them.
        known: one of `KNOWN`.

    Returns:
        negative log-likelihoods in nats, of the same words for every `known`: from the one with the index `KNOWN[-1]`
        on, as many as fill windows of every length.
    """
    unscored, longest = known // 2, KNOWN[-1]
    count = (len(words) - longest) // (longest // 2) * (longest // 2)
    text = words[longest - unscored - 1 : longest + count]
    windows = text.unfold(0, known + 1, known - unscored)  # (windows, known + 1)
    costs = []
    for rows in windows.split(max(1, BATCH // known)):
        logits, _ = model(rows[:, :-1])
        targets = rows[:, unscored + 1 :]
        costs.append(F.cross_entropy(logits[:, unscored:].flatten(0, 1), targets.flatten(), reduction="none"))
    return torch.cat(costs)


def trained(study: str, data: Path) -> dict[str, tuple[Config, Path]]:
    """Return settings and folder of the study's first QRNN and first LSTM.

    Raises:
        InputError: if one of them is not trained.
        CorpusError: if the text is not there.
    """
    models: dict[str, tuple[Config, Path]] = {}
    jobs = STUDIES[study]()
    for label, identity in identify(jobs, data).items():
        config, folder = cast(Config, jobs[label].config), ROOT / RUNS / f"{study}-{identity}"
        (name,) = config.models
        if name in models:
            continue
        if not finished(folder / "results.json"):
            raise InputError(
                f"{label} of {study} is not trained; run `python -m research.studies {study} --data DIR` first"
            )
        models[name] = config, folder / name
    return models


def compare(models: dict[str, tuple[Config, Path]], data: Path) -> dict[str, Any]:
    """Return the perplexities of the QRNN and the LSTM in the order of `KNOWN`, and the ratio of the two.

    Beside them stand those of the whole training text, as in validation: without dropout, the state carried on.

    Raises:
        InputError: if the validation split is too short.
        CheckpointError: if a model is trained, but its weights are gone.
    """
    costs: dict[str, list[Tensor]] = {}
    fitted: dict[str, float] = {}
    for name, (config, folder) in models.items():
        corpus = load_corpus(config.corpus, data)
        tokenizer = build_vocabulary(corpus.train, config.vocabulary)
        model = build_model(config, name, tokenizer.get_vocab_size())
        load_best(ModelFolder(folder), model)
        words = torch.cat(encode(tokenizer, corpus.valid))
        if len(words) < 1.5 * KNOWN[-1]:
            raise InputError(f"--data {data}: {len(words)} words to validate on, {1.5 * KNOWN[-1]:.0f} expected")
        lengths = tqdm(KNOWN, desc=f"{name}, {config.epochs} epochs", unit="length")
        costs[name] = [losses(model.eval(), words, known).double() for known in lengths]
        batches = evaluation_batches(config, encode(tokenizer, corpus.train))
        fitted[name] = perplexity(evaluate(model, next_word_loss, batches))
    behind = [qrnn - lstm for qrnn, lstm in zip(costs["qrnn"], costs["lstm"], strict=True)]
    return {
        "epochs": models["qrnn"][0].epochs,
        "words": len(behind[0]),
        **{name: [math.exp(cost.mean()) for cost in mine] for name, mine in costs.items()},
        "training_text": fitted,
        "ratio": [math.exp(cost.mean()) for cost in behind],
        "standard_error": [float(cost.std()) / math.sqrt(len(cost)) for cost in behind],  # over words, of log ratio
    }


def main(arguments: Sequence[str]) -> int:
    """Compare, and write the file; return the exit code: 0, or 2 if a folder or a model is not there."""
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="folder with the Penn Treebank")
    options = parser.parse_args(arguments)

    def command() -> int:
        origin, data = provenance(seed=0, device="cpu"), corpus_folder(options.data)
        pairs = {study: trained(study, data) for study in COMPARED}  # all of them, before any takes minutes
        compared = {study: compare(models, data) for study, models in pairs.items()}
        content = origin | {"known": KNOWN, "studies": compared}
        write_file(RESULTS / "context.json", json.dumps(content, indent=1) + "\n")
        print("wrote results/context.json; `make results` brings it into the pages")
        return 0

    return exit_code(command, "the same command starts anew")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
