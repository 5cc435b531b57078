"""Measure what models make of the words before: the perplexity of the same words, given the last 1, 2, 4 ... 256.

    python -m research.studies ptb_averaged --data ptb    # trains three QRNNs and three LSTMs
    python -m research.context --data ptb                 # 1/4 h; writes results/context.json

The models read windows of the validation split, each from a state of zeros. The last half of a window is scored (of a
window of one word the one), so "16" stands for 9 to 16 words known, and the windows overlap by the first half, so each
word is scored once. Beside it stands how well each model fits the whole training text without dropout.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.record import RESULTS
from experiment import evaluation_batches
from lab.batches import encode
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
from research.jobs import ROOT, Job, corpus_folder, finished, identify
from research.studies import STUDIES
from research.variants import VariantModelling

COMPARED = "ptb_averaged"
KNOWN = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # words before the one that is predicted, at most
BATCH = 512  # words; more take longer


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


def trained(data: Path) -> dict[str, tuple[Job, Path]]:
    """Return each run and its folder, by its label.

    Raises:
        InputError: if one of them is not trained.
        CorpusError: if the text is not there.
    """
    runs: dict[str, tuple[Job, Path]] = {}
    jobs = STUDIES[COMPARED]()
    for label, identity in identify(jobs, data).items():
        folder = ROOT / RUNS / f"{COMPARED}-{identity}"
        if not finished(folder / "results.json"):
            way_out = f"run `python -m research.studies {COMPARED} --data DIR` first"
            raise InputError(f"{label} of {COMPARED} is not trained; {way_out}")
        runs[label] = jobs[label], folder
    return runs


def measure(label: str, job: Job, folder: Path, data: Path) -> dict[str, Any]:
    """Return the perplexities of a model in the order of `KNOWN`, and that of the whole training text.

    The latter is taken as in validation: without dropout, the state carried on.

    Raises:
        InputError: if the validation split is too short.
        CheckpointError: if the model is trained, but its weights are gone.
    """
    config = replace(cast(Config, job.config), data=data)
    (name,) = config.models
    task = VariantModelling(config, processes=1, changes=job.module.split()[1:])
    model = task.build(name)
    load_best(ModelFolder(folder / name), model)
    corpus = load_corpus(config.corpus, data)
    words = torch.cat(encode(task.tokenizer, corpus.valid))
    if len(words) < 1.5 * KNOWN[-1]:
        raise InputError(f"--data {data}: {len(words)} words to validate on, {1.5 * KNOWN[-1]:.0f} expected")
    lengths = tqdm(KNOWN, desc=label, unit="length")
    scores = [math.exp(losses(model.eval(), words, known).double().mean()) for known in lengths]
    batches = evaluation_batches(config, encode(task.tokenizer, corpus.train))
    return {
        "model": name,
        "seed": config.seed,
        "perplexity": scores,
        "training_text": perplexity(evaluate(model, next_word_loss, batches)),
    }


def main(arguments: Sequence[str]) -> int:
    """Measure all models, and write the file; return the exit code: 0, or 2 if a folder or a model is not there."""
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="folder with the Penn Treebank")
    options = parser.parse_args(arguments)

    def command() -> int:
        origin, data = provenance(seed=0, device="cpu"), corpus_folder(options.data)
        runs = trained(data)  # all of them, before any takes minutes
        measured = [measure(label, *run, data) for label, run in runs.items()]
        content = origin | {"study": COMPARED, "known": KNOWN, "models": measured}
        write_file(RESULTS / "context.json", json.dumps(content, indent=1) + "\n")
        print("wrote results/context.json; `make results` brings it into the pages")
        return 0

    return exit_code(command, "the same command starts anew")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
