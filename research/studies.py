"""The runs behind the results: `python -m research.studies ablation --data wikitext-2` makes results/ablation.json.

A study is a list of runs of experiment.py or of an example. They go two at a time, each on half of the cores. What is
finished in runs/ is not run again, what was stopped goes on; `make results` brings the file into the pages.
What is on record stays until a run that takes its place has succeeded.

seeds         QRNN and LSTM with the first settings of the preset small, three seeds; 1 h on 2 CPU cores
ablation      the QRNN with one thing changed, one epoch; 1 1/2 h
longer        the most promising for four epochs, with and without dense connections; 1 1/4 h
tuned         three seeds with the settings that were best in language_models, now the preset small; 1 1/4 h
forms         the QRNN of tuned in mode f, and with shifted_softplus, one seed; 1/2 h
numerics      the plain closed form left to autograd beside `scan`; 1/4 h
ptb_changes   both models on the Penn Treebank as one stream, 15 epochs, and what may help them, one seed; 5 h
ptb_tuned     three seeds with dropout 0.3, which was best for both models; 3 h
ptb_averaged  the same with averaged weights and the learning rate that was best for each; 3 h
wikitext2_scaled  both models on WikiText-2 as one stream with all its words, three seeds, in float32; for a GPU
first_kernel  the QRNN of seeds with a first layer that sees one word, three seeds; 1/2 h
candidates    candidates of the QRNN, one epoch; 1/2 h
initial       QRNN and LSTM with larger initial candidates, three seeds; 1 1/2 h
ptb_quarter   what helps on a quarter of the Penn Treebank as one stream, 8 epochs, one seed; 1 1/2 h
language_models  ten trials of each language model: learning rate, initial weights, forget bias, dropout; 3 3/4 h
translators   twelve trials of each translator: learning rate, initial weights, dropout; 1/2 h
both_ways     the same trials of an LSTM whose encoder reads both ways; 1/4 h
translation   all three translators with their best trials on all pairs; 1 1/2 h
readers       eight trials of each reader of film reviews: learning rate, initial weights, dropout; 3/4 h
folds         both readers with their best trials, each tenth of the reviews once for test; 1 h

--data is a folder with the files of WikiText-2; for numerics and the studies named ptb, of the Penn Treebank; for
translators, both_ways and translation, of Multi30k; for readers and folds, of rt-polarity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

from examples.sentiment.data import FOLDS
from lab.command_line import exit_code
from lab.parser import Parser
from lab.presets import Config
from lab.settings import InputError
from research.jobs import GO_ON, Job, Jobs, carry_out, on_record

NAMES = Config.names
BF16 = " --amp bf16"
UNIFORM = "--initialisation uniform"  # as in all runs of the first round
DROPOUT = "--dropout {0} --dropout-embedding {0} --dropout-output {0}"  # the same in all three places
FIRST_SMALL = f"--preset small --hidden 251 --first-kernel-size None --lr 4e-3 {DROPOUT.format(0.25)}"  # as it was
SMALL = f"{FIRST_SMALL}{BF16} {UNIFORM}"
SHORT = f"{SMALL} --epochs 1 --no-test --models"
SEEDED = tuple(product(range(3), ("qrnn", "lstm")))
STREAM = "--protocol stream --vocabulary None"
PUBLISHED = f"{STREAM} --embedding 256 --batch-size 20 --bptt 70"  # read as for published numbers
LARGER = "research.variants gain"  # initial candidates, of either model
FIRST_KERNEL = f"{SMALL} --models qrnn --first-kernel-size 1 --hidden 292"
TRANSLATE = "--preset small --epochs 3"
SHORT_PAIRS = f"{TRANSLATE} --max-length 50"
PTB_WIDTH, PTB_WIDTH_OF_F = 359, 452  # of two layers, the first of which sees one word, in modes fo and f
PTB = f"{SMALL} {PUBLISHED} --corpus ptb --lr 4e-3 {DROPOUT.format(0.4)}"
PTB_MODELS = {
    "QRNN": f"{PTB} --initialisation scaled --models qrnn --first-kernel-size 1 --hidden {PTB_WIDTH}",
    "LSTM": f"{PTB} --initialisation scaled --models lstm --hidden 309",
}
PTB_LESS_DROPOUT = {label: f"{flags} --epochs 15 {DROPOUT.format(0.3)}" for label, flags in PTB_MODELS.items()}
PTB_RATES = {"QRNN": "8e-3", "LSTM": "8e-3"}  # the best of each in `ptb_changes`
WIKITEXT2 = f"{FIRST_SMALL} {PUBLISHED} --corpus wikitext-2 --lr 3e-3 {DROPOUT.format(0.2)}"
WIKITEXT2_SCALED = {
    "QRNN": f"{WIKITEXT2} --models qrnn --first-kernel-size 1 --hidden 566",
    "LSTM": f"{WIKITEXT2} --models lstm --hidden 512",  # as many recurrent parameters: 402 units
}


class Search(NamedTuple):
    """Say which trials both models get alike.

    Attributes:
        name: of the study that runs them.
        preset: of the trials.
        settings: what differs between them.
        score: of a trial on validation; lower is better.
        models: that get the trials.
    """

    name: str
    preset: str
    settings: tuple[str, ...]
    score: str = "valid_perplexity"
    models: tuple[str, ...] = tuple(NAMES)


SEARCHED = ("lr", "initialisation", "forget_bias", "dropout")
LANGUAGE_MODELS = Search("language_models", "small", (*SEARCHED, "dropout_embedding", "dropout_output", "weight_decay"))
TRANSLATORS = Search("translators", "small", SEARCHED)
BOTH_WAYS = Search("both_ways", "small", SEARCHED, models=("lstm",))
READERS = Search("readers", "mr", SEARCHED, "valid_loss")
SIZES = ("hidden", "first_kernel_size")  # each model has its own, so that both have as many parameters
SEARCHED_MODELS = {"qrnn": FIRST_KERNEL, "lstm": f"{SMALL} --models lstm"}  # by language_models


# --- the studies -----------------------------------------------------------------------------------------------------


def ablation() -> Jobs:
    """Change one thing at a time; widths give each QRNN as many recurrent parameters as the first, within 1 %."""
    f, fo, ifo = (f"{SHORT} qrnn --mode {mode}" for mode in ("f", "fo", "ifo"))
    lstm = f"{SHORT} lstm"
    return {
        "f, tanh, k = 2": Job(f"{f} --hidden 325"),
        "f, tanh, k = 2, seed 1": Job(f"{f} --hidden 325 --seed 1"),
        "LSTM": Job(lstm),
        "LSTM, seed 1": Job(f"{lstm} --seed 1"),
        "fo": Job(f"{fo} --hidden 251"),
        "fo, seed 1": Job(f"{fo} --hidden 251 --seed 1"),
        "ifo": Job(f"{ifo} --hidden 208"),
        "ifo, seed 1": Job(f"{ifo} --hidden 208 --seed 1"),
        "ifo, k = 1": Job(f"{ifo} --hidden 325 --kernel-size 1"),
        "f, softplus": Job(f"{f} --hidden 325 --activation softplus"),
        "f, no dropout on outputs": Job(f"{f} --hidden 325 --dropout 0 --dropout-output 0"),
        "f, softplus, no dropout on outputs": Job(
            f"{f} --hidden 325 --activation softplus --dropout 0 --dropout-output 0"
        ),
        "fo, softplus": Job(f"{fo} --hidden 251 --activation softplus"),
        "f, exp": Job(f"{f} --hidden 325 --activation exp"),
        "f, k = 1": Job(f"{f} --hidden 493 --kernel-size 1"),
        "f, k = 3": Job(f"{f} --hidden 251 --kernel-size 3"),
        "f, k = 5": Job(f"{f} --hidden 179 --kernel-size 5"),
        "f, in float32": Job(f"{f} --hidden 325".replace(BF16, "")),
        "LSTM, in float32": Job(lstm.replace(BF16, "")),
        "f, zoneout 0.1": Job(f"{f} --hidden 325 --zoneout 0.1"),
        "f, zoneout 0.3": Job(f"{f} --hidden 325 --zoneout 0.3"),
        "f, dense": Job(f"{SHORT} qrnn --dense --mode f --hidden 257"),
        "LSTM, dense": Job(f"{SHORT} lstm --dense --mode f --hidden 257"),
        "f, forget bias 1": Job(f"{f} --hidden 325 --forget-bias 1"),
        "LSTM, forget bias 1": Job(f"{lstm} --forget-bias 1"),
        "f, method blocked": Job(f"{f} --hidden 325 --method blocked"),
        "f, method log": Job(f"{f} --hidden 325 --method log"),
    }


def longer() -> Jobs:
    """Train the best of the ablation for the four epochs of the preset, for one epoch leaves much open."""
    models = {
        "QRNN, f": "qrnn --mode f --hidden 325",
        "QRNN, fo": "qrnn --mode fo --hidden 251",
        "LSTM": "lstm",
        "QRNN, f, dense": "qrnn --dense --mode f --hidden 257",
        "QRNN, fo, dense": "qrnn --dense --mode fo --hidden 190",
        "QRNN, ifo, dense": "qrnn --dense --mode ifo --hidden 152",
        "LSTM, dense": "lstm --dense --mode f --hidden 257",
    }
    return {label: Job(f"{SMALL} --no-test --models {flags}") for label, flags in models.items()}


def numerics() -> Jobs:
    """Train by the derived backward pass and by autograd through the closed form, in float32, on long pieces."""
    model = "--models qrnn --mode fo --activation softplus --embedding 128 --hidden 128 --epochs 3"
    jobs = {}
    for length, rows in ((256, 16), (1024, 4)):
        flags = f"{FIRST_SMALL} {UNIFORM} {STREAM} --corpus ptb {model} --bptt {length} --batch-size {rows}"
        jobs[f"T = {length}, scan"] = Job(f"{flags} --method scan")
        jobs[f"T = {length}, closed form, autograd"] = Job(flags, "research.closed_form")
    return jobs


def seeds() -> Jobs:
    """Train both models with the first settings of the preset small, the same for both."""
    return {f"{NAMES[model]}, seed {seed}": Job(f"{SMALL} --models {model} --seed {seed}") for seed, model in SEEDED}


def tuned() -> Jobs:
    """Train the models of `language_models`, each with its best trial."""
    return {
        f"{NAMES[model]}, seed {seed}": Job(
            f"{SEARCHED_MODELS[model]} --seed {seed} {best_flags(model, LANGUAGE_MODELS)}"
        )
        for seed, model in SEEDED
    }


def forms() -> Jobs:
    """Give the QRNN of `tuned` another mode or another candidate, with as many parameters, seed 0."""
    best = f"{FIRST_KERNEL} {best_flags('qrnn', LANGUAGE_MODELS)}"
    flags = {
        "f, tanh": f"{best} --mode f --hidden 368",
        "f, shifted_softplus": f"{best} --mode f --hidden 368 --activation shifted_softplus",
        "fo, shifted_softplus": f"{best} --activation shifted_softplus",
    }
    return {label: Job(mine) for label, mine in flags.items()}


def best_flags(model: str, search: Search) -> str:
    """Return the flags of the model's trial that was best on validation.

    Raises:
        InputError: if the models of the search do not have the same trials, or these differ in more than is searched.
    """
    trials: dict[str, dict[tuple[Any, ...], float]] = {name: {} for name in search.models}  # values -> score
    fixed: dict[str, Any] = {}
    for run in on_record(search.name).values():
        config = run.get("config", {})  # none where it failed
        if config.get("preset") == search.preset:
            (result,) = run["models"]
            trials[result["model"]][tuple(config[name] for name in search.settings)] = result[search.score]
            for name in {*config} - {*search.settings, *SIZES, "models", "name"}:
                if fixed.setdefault(name, config[name]) != config[name]:
                    found = f"trials with {name} {fixed[name]} and {config[name]} found, of one kind expected"
                    raise InputError(
                        f"{search.name}.json: {found}; `python -m research.studies {search.name}` makes them"
                    )
    tried = [set(mine) for mine in trials.values()]
    if not all(tried) or tried[0] != tried[-1]:
        way_out = f"run `python -m research.studies {search.name}` first"
        raise InputError(f"{search.name}.json lacks the same trials of all models; {way_out}")
    best = min(trials[model], key=trials[model].__getitem__)
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in zip(search.settings, best, strict=True))


def ptb_tuned() -> Jobs:
    """Train with the dropout that was best for both models in `ptb_changes`, three seeds."""
    return {
        f"{label}, seed {seed}": Job(f"{flags} --seed {seed}")
        for seed in range(3)
        for label, flags in PTB_LESS_DROPOUT.items()
    }


def ptb_averaged() -> Jobs:
    """Evaluate the models of `ptb_tuned` with averaged weights, each with the rate that was best in `ptb_changes`."""
    return {
        f"{label}, seed {seed}": Job(f"{flags} --lr {PTB_RATES[label]} --seed {seed}", "research.variants average")
        for seed in range(3)
        for label, flags in PTB_LESS_DROPOUT.items()
    }


def ptb_changes() -> Jobs:
    """Read the Penn Treebank as one stream, changed in one thing, and in one more where dropout is at its best."""
    jobs, averaged = {}, "research.variants average"
    for label, flags in PTB_MODELS.items():
        whole, best = f"{flags} --epochs 15", f"{label}, dropout 0.3, averaged weights"
        jobs[f"{label}, skip connection"] = Job(whole, "research.variants skip")
        jobs |= {f"{label}, dropout {rate}": Job(f"{whole} {DROPOUT.format(rate)}") for rate in (0.2, 0.3, 0.4, 0.5)}
        jobs[f"{label}, averaged weights"] = Job(whole, averaged)
        jobs[best] = Job(PTB_LESS_DROPOUT[label], averaged)
        for rate in ("8e-3", "1.6e-2"):
            jobs[f"{best}, learning rate {rate}"] = Job(f"{PTB_LESS_DROPOUT[label]} --lr {rate}", averaged)
    zoneout = f"{PTB_LESS_DROPOUT['QRNN']} --zoneout"
    return jobs | {f"QRNN, dropout 0.3, zoneout {rate}": Job(f"{zoneout} {rate}") for rate in (0.1, 0.2)}


def wikitext2_scaled() -> Jobs:
    """Read WikiText-2 as one stream, with all words: beside so large a softmax, wider layers cost little time."""
    return {
        f"{label}, seed {seed}": Job(f"{flags} --seed {seed}")
        for seed in range(3)
        for label, flags in WIKITEXT2_SCALED.items()
    }


def first_kernel() -> Jobs:
    """Show one word to the first layer and two to the second: the QRNNs of `seeds` see two in both."""
    return {f"QRNN, seed {seed}": Job(f"{FIRST_KERNEL} --seed {seed}") for seed in range(3)}


def initial() -> Jobs:
    """Start the QRNNs of `first_kernel` and the LSTMs of `seeds` with larger weights of the candidates."""
    flags = {
        "QRNN, shifted_softplus": f"{FIRST_KERNEL} --activation shifted_softplus",
        "QRNN, tanh": FIRST_KERNEL,
        "LSTM": f"{SMALL} --models lstm",
    }
    return {
        f"{label}, seed {seed}": Job(f"{mine} --seed {seed}", LARGER)
        for seed in range(3)
        for label, mine in flags.items()
    }


def candidates() -> Jobs:
    """Compare candidates; the first layer of each QRNN sees one word, as that of `QRNN` by default."""
    flags = f"{FIRST_KERNEL} --epochs 1 --no-test --activation"
    jobs = {
        f"{name}, seed {seed}": Job(f"{flags} {name} --seed {seed}")
        for seed in range(2)
        for name in ("tanh", "shifted_softplus", "elu")
    }
    lstm = f"{SHORT} lstm"
    jobs |= {
        "tanh, larger initial candidates": Job(f"{flags} tanh", LARGER),
        "LSTM, larger initial candidates": Job(lstm, LARGER),
        "shifted_softplus, larger initial candidates": Job(f"{flags} shifted_softplus", LARGER),
        "LSTM, Glorot's initial weights": Job(f"{lstm} --initialisation xavier"),
        "tanh, Glorot's initial weights": Job(f"{flags} tanh --initialisation xavier"),
    }
    jobs |= {
        f"shifted_softplus of slope {slope}": Job(f"{flags} shifted_softplus", f"research.slope {slope}")
        for slope in (3, 4, 6, 1)
    }
    return jobs | {"softplus": Job(f"{flags} softplus")}


def ptb_quarter() -> Jobs:
    """Train on little text, where a model shows soon how well it carries over; there QRNNs on streams fell short."""
    qrnn, lstm = (f"{flags} --epochs 8 --no-test" for flags in PTB_MODELS.values())
    more = DROPOUT.format(0.5)
    plain, changes = "research.variants quarter", "research.variants quarter,"
    return {
        "QRNN": Job(qrnn, plain),
        "LSTM": Job(lstm, plain),
        "QRNN, shifted softplus": Job(f"{qrnn} --activation shifted_softplus", plain),
        "QRNN, locked dropout": Job(qrnn, f"{changes}locked"),
        "LSTM, locked dropout": Job(lstm, f"{changes}locked"),
        "QRNN, dropout 0.5": Job(f"{qrnn} {more}", plain),
        "LSTM, dropout 0.5": Job(f"{lstm} {more}", plain),
        "QRNN, skip connection": Job(qrnn, f"{changes}skip"),
        "LSTM, skip connection": Job(lstm, f"{changes}skip"),
        "QRNN, spread forget biases": Job(qrnn, f"{changes}spread"),
        "LSTM, spread forget biases": Job(lstm, f"{changes}spread"),
        "QRNN, k = 2 in the first layer": Job(f"{qrnn} --first-kernel-size 2 --kernel-size 1 --hidden 388", plain),
        "QRNN, three layers": Job(f"{qrnn} --hidden 265 --layers 3", plain),
        "QRNN, mode f": Job(f"{qrnn} --mode f --hidden {PTB_WIDTH_OF_F}", plain),
        "QRNN, learning rate 8e-3": Job(f"{qrnn} --lr 8e-3", plain),
        "LSTM, learning rate 8e-3": Job(f"{lstm} --lr 8e-3", plain),
        "QRNN, learning rate 1.6e-2": Job(f"{qrnn} --lr 1.6e-2", plain),
        "LSTM, learning rate 1.6e-2": Job(f"{lstm} --lr 1.6e-2", plain),
        "QRNN, averaged weights": Job(qrnn, f"{changes}average"),
        "LSTM, averaged weights": Job(lstm, f"{changes}average"),
        "QRNN, learning rate 8e-3, averaged weights": Job(f"{qrnn} --lr 8e-3", f"{changes}average"),
        "LSTM, learning rate 8e-3, averaged weights": Job(f"{lstm} --lr 8e-3", f"{changes}average"),
        "QRNN, zoneout 0.1": Job(f"{qrnn} --zoneout 0.1", plain),
        "QRNN, weight decay 0.1": Job(f"{qrnn} --weight-decay 0.1", plain),
        "LSTM, weight decay 0.1": Job(f"{lstm} --weight-decay 0.1", plain),
    }


def trials(search: Search, module: str, flags: dict[str, str], values: Sequence[tuple[Any, ...]]) -> Jobs:
    """Return a run of each model, by its flags, with each of these values of what is searched."""
    searched = " ".join(f"--{name.replace('_', '-')} {{}}" for name in search.settings)
    return {
        f"{label}, trial {number}": Job(f"{mine} --no-test {searched.format(*trial)}", module)
        for number, trial in enumerate(values)
        for label, mine in flags.items()
    }


def language_models() -> Jobs:
    """Give both language models the same ten trials, as long as the runs of `seeds`.

    The first is a centre. Five take a step from it, and the last four start from the best of these six, which was so
    for both. The first layer of the QRNN sees one word, as that of `QRNN` by default.
    """
    values = [(4e-3, "scaled", 0.0, 0.1), (4e-3, "xavier", 0.0, 0.1), (4e-3, "scaled", 0.0, 0.05)]
    values += [(4e-3, "scaled", 1.0, 0.1), (8e-3, "scaled", 0.0, 0.1), (4e-3, "scaled", 0.0, 0.2)]
    values += [(1.6e-2, "scaled", 0.0, 0.1), (8e-3, "scaled", 0.0, 0.05)]
    values += [(8e-3, "scaled", 0.0, 0.2), (8e-3, "uniform", 0.0, 0.1)]
    whole = [(*value, *(value[-1],) * 2, 0.01) for value in values]  # the same dropout in all three places
    flags = {NAMES[model]: flags for model, flags in SEARCHED_MODELS.items()}
    return trials(LANGUAGE_MODELS, "experiment", flags, whole)


def of_each_model(flags: str) -> dict[str, str]:
    return {label: f"{flags} --models {model}" for model, label in NAMES.items()}


def translators() -> Jobs:
    """Give both translators the same twelve trials, on the pairs that are at most fifty characters long."""
    return translator_trials(TRANSLATORS, of_each_model(SHORT_PAIRS))


def both_ways() -> Jobs:
    """Give the trials of `translators` to an LSTM whose encoder reads both ways."""
    return translator_trials(BOTH_WAYS, {"LSTM": f"{SHORT_PAIRS} --models lstm --bidirectional"})


def translator_trials(search: Search, flags: dict[str, str]) -> Jobs:
    rates = (2e-3, 4e-3, 8e-3)
    values = [(rate, initial, 0.0, 0.1) for initial in ("scaled", "xavier") for rate in rates]
    values += [(4e-3, "uniform", 0.0, 0.1), (4e-3, "scaled", 1.0, 0.1), (4e-3, "xavier", 1.0, 0.1)]
    values += [(4e-3, "scaled", 0.0, 0.2), (1e-3, "scaled", 0.0, 0.1), (1.6e-2, "scaled", 0.0, 0.1)]
    return trials(search, "examples.translation", flags, values)


def translation() -> Jobs:
    """Train on all pairs, each model with its best trial of `translators` or `both_ways`.

    The LSTM that reads both ways also has lower rates than its best trial, which proved too high for longer pairs.
    """
    flags = {label: f"--models {model} {best_flags(model, TRANSLATORS)}" for model, label in NAMES.items()}
    flags["LSTM, reads both ways"] = f"--models lstm --bidirectional {best_flags('lstm', BOTH_WAYS)}"
    for rate in ("4e-3", "2e-3"):
        flags[f"LSTM, reads both ways, rate {rate}"] = f"{flags['LSTM, reads both ways']} --lr {rate}"
    return {label: Job(f"{TRANSLATE} {mine}", "examples.translation") for label, mine in flags.items()}


def readers() -> Jobs:
    """Give both readers of film reviews the same eight trials, with fold 0 set aside."""
    values = [(rate, "scaled", 0.0, 0.5) for rate in (5e-4, 1e-3, 2e-3, 4e-3)]
    values += [(1e-3, "scaled", 0.0, 0.3), (1e-3, "scaled", 1.0, 0.5)]
    values += [(1e-3, "uniform", 0.0, 0.5), (1e-3, "xavier", 0.0, 0.5)]
    return trials(READERS, "examples.sentiment", of_each_model("--preset mr"), values)


def folds() -> Jobs:
    """Train both readers with their best trials of `readers`, each tenth of the reviews once for test."""
    return {
        f"{label}, fold {fold}": Job(
            f"--preset mr --fold {fold} --models {model} {best_flags(model, READERS)}", "examples.sentiment"
        )
        for fold in range(FOLDS)
        for model, label in NAMES.items()
    }


STUDIES: dict[str, Callable[[], Jobs]] = {
    study.__name__: study
    for study in (
        seeds,
        ablation,
        longer,
        tuned,
        forms,
        numerics,
        ptb_tuned,
        ptb_averaged,
        ptb_changes,
        wikitext2_scaled,
        first_kernel,
        candidates,
        initial,
        ptb_quarter,
        language_models,
        translators,
        both_ways,
        translation,
        readers,
        folds,
    )
}


def main(arguments: Sequence[str]) -> int:
    """Carry out a study; return the exit code, see `carry_out`: 2 if the input was wrong."""
    parser = Parser(__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", required=True, help="folder with the corpus")
    options = parser.parse_args(arguments)
    return exit_code(lambda: carry_out(options.study, STUDIES[options.study](), options.data), GO_ON)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
