"""Carry out a list of runs: two at a time, each on half of the cores, then put on record."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.record import RESULTS
from lab.checkpoint import write_file
from lab.command_line import parse
from lab.provenance import provenance
from lab.run import RUNS, RunConfig
from lab.settings import InputError
from research.experiments import EXPERIMENTS, LANGUAGE, Experiment

ROOT = Path(__file__).parents[1]
AT_A_TIME = 2
GO_ON = "the same command goes on"  # with what is stopped


class Job(NamedTuple):
    """Say what to run, and with which flags."""

    flags: str
    module: str = "experiment"  # and, after a space, arguments that come before the flags

    @property
    def experiment(self) -> Experiment:
        return EXPERIMENTS.get(self.module, LANGUAGE)  # the modules of research/ take its flags

    @property
    def config(self) -> RunConfig:
        """Return what the flags set.

        Raises:
            InputError: if one is wrong.
        """
        return parse(self.flags.split(), self.experiment.presets)


Jobs = dict[str, Job]  # by what the tables call them


def carry_out(study: str, jobs: Jobs, data: str) -> int:
    """Run what is not finished yet, and put each run that succeeded on record in results/STUDY.json.

    What is on record stays until a run that takes its place has succeeded: an error never replaces it.

    Returns:
        the exit code: 0, 1 if a run failed, 130 if it was interrupted.

    Raises:
        InputError: if there is no such folder, a flag of a job is wrong, or the record is damaged; nothing has run.
        CorpusError: if the corpus is not there; nothing has run.
    """
    on_record(study)
    folder = corpus_folder(data)
    origin, identities, failed = provenance(seed=0, device="cpu"), identify(jobs, folder), {}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        futures = {pool.submit(perform, f"{study}-{identities[label]}", jobs[label], folder): label for label in jobs}
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), desc=study, unit="run"):
                label, run = futures[future], future.result()
                if "error" in run:
                    failed[label] = run["error"]
                put_on_record(study, origin, jobs, label, {"identity": identities[label], **run})
        except KeyboardInterrupt:  # which the runs got too
            print(f"stopped; {GO_ON}", file=sys.stderr)
            return 130
        finally:
            pool.shutdown(cancel_futures=True)
    for label, error in failed.items():
        print(f"{label}: {error}")
    print(f"wrote research/results/{study}.json; `make results` brings it into the pages")
    return 1 if failed else 0


def corpus_folder(data: str) -> Path:
    """Return the folder that --data names, with its whole path.

    Raises:
        InputError: if there is none.
    """
    if not data or not Path(data).is_dir():
        raise InputError(f"--data {data or repr(data)}: no folder; give the one with the corpus")
    return Path(data).resolve()


def on_record(study: str) -> dict[str, Any]:
    """Return the runs in results/STUDY.json by their labels; none if there is no such file.

    Raises:
        InputError: if the file is damaged.
    """
    path = RESULTS / f"{study}.json"
    try:
        return json.loads(path.read_text())["runs"] if path.exists() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no results of a study ({error!r}); git has it as it was") from error


def put_on_record(study: str, origin: dict[str, Any], jobs: Jobs, label: str, run: dict[str, Any]) -> None:
    """Write the run into results/STUDY.json, unless it failed where another one did not.

    The runs stand in the order of the jobs; those of which there is no job any more come last.
    """
    runs = on_record(study)
    if "error" in run and "error" not in runs.get(label, run):
        return
    runs[label] = run
    ordered = {label: runs[label] for label in (*jobs, *runs) if label in runs}
    write_file(RESULTS / f"{study}.json", json.dumps(origin | {"runs": ordered}, indent=1) + "\n")


def perform(name: str, job: Job, data: Path) -> dict[str, Any]:
    """Run a job unless it is finished; return the content of its results.json, or {"error": a line}."""
    path = ROOT / RUNS / name / "results.json"
    if not finished(path):
        (ROOT / RUNS).mkdir(exist_ok=True)
        with open(ROOT / RUNS / f"{name}.log", "a+") as log:
            threads = max(1, (os.cpu_count() or 1) // AT_A_TIME)
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            flags = [*job.flags.split(), "--data", str(data), "--name", name, "--resume"]
            command = [sys.executable, "-m", *job.module.split(), *flags]
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode
            if code:
                log.seek(0)
                (last,) = log.read().strip().splitlines()[-1:] or [""]
                return {"error": f"exit code {code}: {last}"}
    return json.loads(path.read_text())


def identify(jobs: Jobs, data: Path) -> dict[str, str]:
    """Return the `identity` of each job on the text in this folder.

    Raises:
        InputError: if a flag is wrong.
        CorpusError: if the corpus of a job is not there.
    """
    keys = {label: (job.experiment.text, job.experiment.reads(job.config, data)) for label, job in jobs.items()}
    texts = {(text, reads): text(*reads) for text, reads in {*keys.values()}}
    return {label: identity(job, texts[keys[label]]) for label, job in jobs.items()}


def identity(job: Job, sha256_of_text: str) -> str:
    """Return eight digits that stand for the text and the settings, also where the flags leave them to a preset.

    Raises:
        InputError: if a flag is wrong.
    """
    text = json.dumps([job.module, sha256_of_text, settings(job)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def settings(job: Job) -> dict[str, Any]:
    """Return all that decides about the numbers, but the text.

    Raises:
        InputError: if a flag is wrong.
    """
    chosen = job.config.deciding()
    del chosen["preset"]
    for name, value in (("first_kernel_size", None), ("initialisation", "uniform"), ("bidirectional", False)):
        if chosen.get(name) == value:  # as in the runs on record, which had no such flag
            chosen.pop(name, None)
    return chosen


def finished(path: Path) -> bool:
    """Tell whether a run is at its end; one whose results are damaged is not."""
    try:
        return json.loads(path.read_text())["interrupted"] is False
    except (OSError, ValueError, KeyError, TypeError):
        return False
