"""The runs behind the README's results: `python studies.py ablation --data wikitext-2` makes results/ablation.json.

A study is a list of runs of experiment.py. They go two at a time, each on half of the cores, which is faster for models
this small than one after the other. What is finished is not run again, what was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from checkpoint import write_file
from comparison import RUNS
from machine import provenance

ROOT = Path(__file__).parent
SMALL = "--preset small --amp bf16"
QRNN, LSTM = "--models qrnn", "--models lstm"
SHORT = f"{SMALL} {QRNN} --epochs 1"
STREAM = "--preset small --amp bf16 --protocol stream --vocabulary None"


class Run(NamedTuple):
    flags: str
    script: str = "experiment.py"


ABLATION = {
    # one thing changed at a time; the widths give as many recurrent parameters as the first has, within 1 %
    "ifo, tanh, k = 2": Run(SHORT),
    "LSTM": Run(f"{SMALL} {LSTM} --epochs 1"),
    "softplus": Run(f"{SHORT} --activation softplus"),
    "exp": Run(f"{SHORT} --activation exp"),
    "fo": Run(f"{SHORT} --mode fo --hidden 251"),
    "f": Run(f"{SHORT} --mode f --hidden 325"),
    "k = 1": Run(f"{SHORT} --kernel-size 1 --hidden 325"),
    "k = 3": Run(f"{SHORT} --kernel-size 3 --hidden 158"),
    "k = 5": Run(f"{SHORT} --kernel-size 5 --hidden 109"),
    "zoneout 0.1": Run(f"{SHORT} --zoneout 0.1"),
    "zoneout 0.3": Run(f"{SHORT} --zoneout 0.3"),
    "dense": Run(f"{SHORT} --dense --hidden 152"),
    "forget bias 1": Run(f"{SHORT} --forget-bias 1"),
    "fo, softplus": Run(f"{SHORT} --mode fo --hidden 251 --activation softplus"),
    "fo, softplus, zoneout 0.1": Run(f"{SHORT} --mode fo --hidden 251 --activation softplus --zoneout 0.1"),
    "method blocked": Run(f"{SHORT} --method blocked"),
    "method log": Run(f"{SHORT} --method log"),
    "ifo, tanh, k = 2, seed 1": Run(f"{SHORT} --seed 1"),
    "LSTM, seed 1": Run(f"{SMALL} {LSTM} --epochs 1 --seed 1"),
    "fo, seed 1": Run(f"{SHORT} --mode fo --hidden 251 --seed 1"),
}
STUDIES: dict[str, dict[str, Run]] = {"ablation": ABLATION}


def run(study: str, label: str, data: Path, threads: int) -> tuple[str, dict[str, Any]]:
    """The label and what came out: the content of the run's results.json, or {"error": a line}."""
    flags, script = STUDIES[study][label]
    name = f"{study}-{[*STUDIES[study]].index(label):02}"
    command = [sys.executable, script, *flags.split(), "--data", str(data), "--name", name, "--resume"]
    path = RUNS / name / "results.json"
    if not finished(path):
        (ROOT / RUNS).mkdir(exist_ok=True)
        with open(ROOT / RUNS / f"{name}.log", "a+") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode
            if code:
                log.seek(0)
                return label, {"error": log.read().strip().splitlines()[-1]}
    return label, json.loads((ROOT / path).read_text())


def finished(path: Path) -> bool:
    return (ROOT / path).exists() and not json.loads((ROOT / path).read_text())["interrupted"]


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0, or 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True, help="folder with the corpus")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    options = parser.parse_args(arguments)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    path, labels = ROOT / "results" / f"{options.study}.json", [*STUDIES[options.study]]
    done: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        one = partial(run, options.study, data=options.data.resolve(), threads=threads)
        futures = [pool.submit(one, label) for label in labels]
        for future in tqdm(as_completed(futures), total=len(labels), desc=options.study, unit="run"):
            label, content = future.result()
            done[label] = content
            runs = {label: done[label] for label in labels if label in done}
            content = provenance(seed=0, device="cpu") | {"runs": runs}
            write_file(path, json.dumps(content, indent=1) + "\n")
    failed = [f"{label}: {content['error']}" for label, content in done.items() if "error" in content]
    print("\n".join([*failed, f"wrote results/{path.name}; `make results` brings it into the README"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
