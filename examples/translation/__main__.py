"""QRNN against LSTM as character-level translators (paper, section 3.3): `python -m examples.translation --help`."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # while it imports, Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor, nn
from tqdm import tqdm

from examples.translation.attention import draw_attention, visible
from examples.translation.config import PRESETS, Config
from examples.translation.data import (
    BOS,
    EOS,
    Pair,
    PairBatches,
    ParallelText,
    Vocabulary,
    drop_long,
    pad_sources,
    read_parallel,
    reversed_strings,
    sha256_of_lines,
)
from examples.translation.model import Translator, build_model, next_character_loss, recurrent_part
from lab.checkpoint import write_file
from lab.command_line import exit_code, parse
from lab.report import Layout, fenced
from lab.run import Task, load_best, recorded, run
from lab.run_folder import RunFolder
from lab.settings import InputError
from lab.training import evaluate, perplexity
from qrnn.search import Hypothesis, beam_search

VOCABULARY = "vocabulary.json"
NAMES = Config.names
EVALUATION_ROWS = 32  # pairs a batch
HEAD_PAIRS = 4 * EVALUATION_ROWS  # of the validation split, to time evaluation on
SEARCH_ROWS = 32  # sentences that are translated at a time
SAMPLES = 5  # sentences of the validation split that the report shows


# --- the task --------------------------------------------------------------------------------------------------------


def prepare_text(config: Config) -> ParallelText:
    """Read or generate the text.

    Raises:
        InputError: if no folder is given.
        CorpusError: if the text is not there, or not what it should be.
    """
    if config.corpus == "reversed":
        return reversed_strings(config.seed)
    if config.data is None:
        raise InputError(f"--data: give the folder with train.{config.source} and the others, or try --preset demo")
    return read_parallel(config.data, config.source, config.target)


def encode_source(config: Config, vocabulary: Vocabulary, text: str) -> Tensor:
    """Return the ids of a sentence as the model reads it, (S,) int64."""
    return torch.tensor(vocabulary.encode(text[::-1] if config.reverse else text))


class Translating(Task[Translator]):
    """Translate a sentence, character by character.

    Args:
        config: checked.

    Raises:
        InputError, CorpusError: if the data is not there, or not what it should be.
    """

    config: Config
    train: PairBatches
    step = staticmethod(next_character_loss)
    hint = "That is long: it is meant for a GPU. --preset small takes about an hour on 2 CPU cores."

    def __init__(self, config: Config) -> None:
        self.config, self.text = config, prepare_text(config)
        kept = drop_long(self.text.train, config.max_length)
        self.vocabulary = Vocabulary.of(kept)
        self.train = PairBatches(self.encode(kept), config.batch_size, seed=config.seed)
        self.valid, self.test, self.head = (
            PairBatches(self.encode(pairs), EVALUATION_ROWS, shuffle=False)
            for pairs in (self.text.valid, self.text.test, self.text.valid[:HEAD_PAIRS])
        )
        self.fingerprint = {
            "name": self.text.name,
            "source": self.text.origin,
            "sha256_of_lines": sha256_of_lines(self.text, config.max_length),
            "vocabulary": len(self.vocabulary),
            "padding": round(self.train.padding, 4),
            "train_pairs": len(kept),
            "dropped_pairs": len(self.text.train) - len(kept),
            "valid_pairs": len(self.text.valid),
            "test_pairs": len(self.text.test),
        }
        self.files = {VOCABULARY: json.dumps(self.vocabulary.characters) + "\n"}
        self.layout = layout(self.fingerprint, config)

    def encode(self, pairs: list[Pair]) -> list[tuple[Tensor, Tensor]]:
        return [
            (
                encode_source(self.config, self.vocabulary, pair.source),
                torch.tensor([*self.vocabulary.encode(pair.target), EOS]),
            )
            for pair in pairs
        ]

    def build(self, name: str) -> Translator:
        return build_model(self.config, name, len(self.vocabulary))

    def recurrent(self, model: Translator) -> nn.ModuleList:
        return recurrent_part(model)

    def judge(self, model: Translator, valid_loss: float, test: bool) -> dict[str, Any]:
        samples, found = self.text.valid[:SAMPLES], self.translate(model, self.text.valid[:SAMPLES])
        shortest = min(range(len(samples)), key=lambda i: len(samples[i].source))
        return {
            "valid_perplexity": perplexity(valid_loss),
            **(self.test_scores(model) if test else {}),
            "samples": [
                {"source": pair.source, "reference": pair.target, "translation": self.vocabulary.decode(best.tokens)}
                for pair, best in zip(samples, found, strict=True)
            ],
            "attention": self.attention(samples[shortest].source, found[shortest]),
        }

    def test_scores(self, model: Translator) -> dict[str, Any]:
        """Compute what a finished model comes to on the test split."""
        loss = evaluate(model, self.step, self.test)
        started = time.perf_counter()
        found = self.translate(model, self.text.test, progress=True)
        seconds = time.perf_counter() - started
        return {
            "test_perplexity": perplexity(loss),
            **scores([self.vocabulary.decode(best.tokens) for best in found], [pair.target for pair in self.text.test]),
            "search_seconds": seconds,
        }

    def translate(self, model: Translator, pairs: list[Pair], progress: bool = False) -> list[Hypothesis]:
        sources = [encode_source(self.config, self.vocabulary, pair.source) for pair in pairs]
        return translate(self.config, model, sources, progress)

    def attention(self, source: str, found: Hypothesis) -> dict[str, Any]:
        """Return the weights of a sentence in per cent, as JSON values: a line for each character that was written."""
        assert found.attention is not None  # both models attend
        weights = found.attention.flip(1) if self.config.reverse else found.attention  # (n + 1, S)
        rows = (100 * weights).round().int().tolist()
        return {
            "source": source,
            "translation": self.vocabulary.decode(found.tokens),
            "per_cent": [" ".join(map(str, row)) for row in rows],
        }


def translate(config: Config, model: Translator, sources: list[Tensor], progress: bool = False) -> list[Hypothesis]:
    """Return the best translation of each source, (S_b,) int64, that a beam search finds."""
    device = next(model.parameters()).device
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]), reverse=True)  # little padding
    found: dict[int, Hypothesis] = {}
    with tqdm(
        total=len(sources),
        desc="beam search",
        unit="sentence",
        mininterval=0.5 if sys.stderr.isatty() else 60,
        disable=not (progress and PartialState().is_main_process),
    ) as bar:
        for first in range(0, len(order), SEARCH_ROWS):
            rows = order[first : first + SEARCH_ROWS]
            source, lengths = (part.to(device) for part in pad_sources(sources[i] for i in rows))
            hypotheses = beam_search(
                model,
                source,
                lengths,
                bos=BOS,
                eos=EOS,
                beam_size=config.beam_size,
                length_penalty=config.length_penalty,
                max_length=2 * source.shape[1] + 10,
            )
            found |= dict(zip(rows, hypotheses, strict=True))
            bar.update(len(rows))
    return [found[i] for i in range(len(sources))]


def scores(translations: list[str], references: list[str]) -> dict[str, Any]:
    """Compute BLEU and chrF of a whole split, what sacrebleu needs to give the same again, and the part that is exact.

    `bleu_counts` has a line for each sentence: its n-grams that are in the reference, all its n-grams (n from 1 to 4
    each) and both lengths. BLEU is made of their sums, also that of a choice of sentences.
    """
    found: dict[str, Any] = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        found[name] = metric.corpus_score(translations, [references]).score
        found[f"{name}_signature"] = metric.get_signature().format()
    pairs = list(zip(translations, references, strict=True))
    single = [BLEU().corpus_score([one], [[other]]) for one, other in pairs]
    counts = [(*one.counts, *one.totals, one.sys_len, one.ref_len) for one in single]
    equal = sum(one == other for one, other in pairs)
    return found | {"bleu_counts": [" ".join(map(str, line)) for line in counts], "exact_match": equal / len(pairs)}


# --- the report ------------------------------------------------------------------------------------------------------


def layout(data: dict[str, Any], config: Config) -> Layout:
    """Return how the report looks, given what is known of the data."""

    def cell(key: str, form: str) -> Any:
        return lambda result: format(result[key], form) if key in result else "not read"

    generated = config.corpus == "reversed"  # a string is one word: nothing for BLEU to count
    of_words = {"BLEU": cell("bleu", ".2f"), "chrF": cell("chrf", ".2f")}
    return Layout(
        unit="characters",
        measure="perplexity",
        convert=perplexity,
        columns={
            "validation perplexity": cell("valid_perplexity", ".3f"),
            "test perplexity": cell("test_perplexity", ".3f"),
            **({"exact match": cell("exact_match", ".1%")} if generated else of_words),
        },
        facts=[
            "Perplexity is that of a target character, the end of the sentence counted, given the source and the "
            "characters before it. The other scores are of the whole test split, translated by a beam search of size "
            f"{config.beam_size} with length penalty {config.length_penalty:g}, at the epoch that was best on "
            "validation.",
            f"{data['train_pairs']:,} pairs to train on, {data['dropped_pairs']:,} longer than {config.max_length} "
            f"characters left out; {data['valid_pairs']:,} pairs for validation and {data['test_pairs']:,} for test, "
            f"none left out; {data['vocabulary']:,} characters, {100 * data['padding']:.1f} % padding.",
        ],
        sections=partial(sections, backwards=config.reverse),
    )


def sections(results: list[dict[str, Any]], folder: Path, backwards: bool) -> list[str]:
    """Return the end of the report: how the scores were made, what the models write, and where they look."""
    lines = []
    for result in results:
        if "bleu" in result:
            lines += [
                "",
                f"{NAMES[result['model']]}: {result['bleu_signature']} (BLEU), {result['chrf_signature']} (chrF); "
                f"the search took {result['search_seconds']:.0f} s.",
            ]
    lines += ["", "## Translations of the validation split"]
    for same in zip(*(result["samples"] for result in results), strict=True):
        shown = [f"source     {same[0]['source']}", f"reference  {same[0]['reference']}"]
        shown += [
            f"{NAMES[result['model']]:11}{sample['translation']}" for result, sample in zip(results, same, strict=True)
        ]
        lines += ["", *fenced(shown)]
    for result in results:
        name = f"attention-{result['model']}.png"
        write_file(folder / name, draw_attention(result["attention"], backwards))
        lines += ["", f"## Where the {NAMES[result['model']]} looks", "", f"![attention]({name})"]
    return lines


# --- translating -----------------------------------------------------------------------------------------------------


def translate_sentence(config: Config, sentence: str) -> int:
    """Print how the models of a run translate the sentence.

    Raises:
        InputError, CheckpointError: if there is no such run, or nothing in it.
    """
    folder = RunFolder(config.folder)
    record = folder.record(config.experiment)
    if not sentence:
        raise InputError("--translate: a sentence expected")
    trained = recorded(config, record)
    vocabulary = Vocabulary(json.loads(folder.file(VOCABULARY, record)))
    unknown = sorted(set(sentence) - set(vocabulary.characters))
    if unknown:
        print(f"not in the vocabulary, read as unknown: {' '.join(map(visible, unknown))}", file=sys.stderr)
    source = encode_source(trained, vocabulary, sentence)
    for name in trained.models:
        model = build_model(trained, name, len(vocabulary))
        epoch, loss = load_best(folder.model(name, record), model)
        (best,) = translate(trained, model, [source])
        print(f"{name} (epoch {epoch}, validation perplexity {perplexity(loss):.3f}):")
        print(vocabulary.decode(best.tokens) + "\n")
    return 0


# --- the command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Return the exit code: 0, 1 if the run failed, 2 if the input was wrong, 130 if it was interrupted."""

    def command() -> int:
        config = parse(arguments, PRESETS)
        if config.translate is not None:
            return translate_sentence(config, config.translate)
        return run(config, lambda _: Translating(config))

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
