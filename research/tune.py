"""Tune both models alike: quasi-random trials of learning rate, dropout and weight decay, judged by validation alone.

    python -m research.tune --data wikitext-2 --trials 6 --preset small --amp bf16

Each model gets the same trials; the first has the learning rate, the dropout and the weight decay of the preset and the
flags. Learning rate (1e-3 to 1.6e-2) and weight decay (1e-4 to 0.1) are drawn in logarithms, dropout (0 to 0.5) is the
same in all three places, also in the first. All flags of
experiment.py can be given; without --preset it starts from girrbach, which is for a GPU. The results are in
results/tuning.json; the test split is not evaluated. Called again, it goes on.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import optuna

from lab.command_line import exit_code, parse
from lab.parser import Parser
from lab.presets import PRESETS, Config
from lab.settings import Range, check_range
from research.jobs import GO_ON, Job, Jobs, carry_out

SPACE = {
    "lr": optuna.distributions.FloatDistribution(1e-3, 1.6e-2, log=True),
    "dropout": optuna.distributions.FloatDistribution(0.0, 0.5),  # in all three places
    "weight_decay": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
}


def trials(config: Config, count: int) -> list[dict[str, float]]:
    """Return the values of each trial. They depend on the seed alone, so that all models get the same.

    They are drawn from a scrambled Sobol sequence, whose first few points lie further apart than independent ones.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=config.seed)
    study = optuna.create_study(sampler=sampler)
    preset = {name: getattr(config, name) for name in SPACE}
    space: dict[str, optuna.distributions.BaseDistribution] = {**SPACE}
    # the value counts for nothing: the sampler reads the space from a finished trial
    study.add_trial(optuna.trial.create_trial(params=preset, distributions=space, value=0.0))
    return [preset, *(study.ask(space).params for _ in range(count - 1))]


def jobs(flags: Sequence[str], count: int) -> Jobs:
    """Return a run for each trial and model.

    Raises:
        InputError: if a flag is wrong.
    """
    config = parse(flags, PRESETS)
    check_range("trials", count, Range(low=1))
    for name, space in SPACE.items():
        check_range(name, getattr(config, name), Range(space.low, space.high))  # what is searched
    runs: Jobs = {}
    for number, values in enumerate(trials(config, count)):
        dropouts = " ".join(f"--{name} {values['dropout']}" for name in ("dropout-embedding", "dropout-output"))
        own = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
        for model in config.models:
            runs[f"{model}, trial {number}"] = Job(f"{' '.join(flags)} --no-test --models {model} {own} {dropouts}")
    return runs


def main(arguments: Sequence[str]) -> int:
    """Tune; return the exit code: 0, 1 if a run failed, 2 if the input was wrong, 130 if it was interrupted."""
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="folder with the corpus")
    parser.add_argument("--trials", type=int, default=8, help="of each model (8)")
    options, flags = parser.parse_known_args(arguments)
    return exit_code(lambda: carry_out("tuning", jobs(flags, options.trials), options.data), GO_ON)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
