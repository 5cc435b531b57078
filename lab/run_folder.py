"""The folder of a run: what belongs to it, checked when it is read, written under its lock.

runs/NAME/config.json         what decides about the numbers: settings, corpus, processes
runs/NAME/vocabulary.json     and other files of the task
runs/NAME/MODEL/              checkpoints `last-...` and `best-...`, metrics.jsonl, and result.json once it is finished
runs/NAME/results.json        and the rest of the report

Two digests tie them together. Each JSON file holds that of its own content, so that one that was cut or edited is
found out. Checkpoints and results hold that of config.json: those of another run are not believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lab.checkpoint import (
    CheckpointError,
    State,
    Weights,
    append_line,
    cause,
    load_checkpoint,
    put_aside,
    read_file,
    save_checkpoint,
    write_file,
)
from lab.settings import InputError

CONFIG, LOCK, LOG, RESULT = "config.json", ".lock", "metrics.jsonl", "result.json"
BEFORE_THE_START = {LOCK, f"{CONFIG}.tmp"}  # what a run that was killed at once leaves behind
DECIDING = ("experiment", "config", "corpus", "processes")
Content = dict[str, Any]  # JSON values
Line = dict[str, float]  # of metrics.jsonl


class RunFolder:
    """Read and write the folder of a run; errors name the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def model(self, name: str, record: Content) -> ModelFolder:
        return ModelFolder(self.path / name, identity(record))

    def look(self, experiment: str, resume: bool) -> Content | None:
        """Return what config.json says; None for a run that has not begun.

        Args:
            experiment: the one that is run.
            resume: whether the run may have begun.

        Raises:
            InputError: if it has and may not, or is of another experiment, or its config.json is gone or damaged.
        """
        with _as_input_error():
            if self.path.is_symlink():
                raise InputError(f"{self.path} is a symbolic link; choose another --name")
            names = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
            if names <= BEFORE_THE_START:
                return None
            if not resume:
                raise InputError(f"{self.path} exists; go on with it by --resume, or choose another --name")
            return self.record(experiment)

    def record(self, experiment: str) -> Content:
        """Return what config.json says.

        Raises:
            InputError: if there is no run, or one of another experiment, or config.json is damaged.
        """
        path = self.path / CONFIG
        with _as_input_error():
            if not path.is_file():
                raise InputError(f"{self.path} holds no run, for it has no {CONFIG}; give another --name")
            try:
                record = _read_json(path)
            except ValueError as error:
                raise InputError(f"{path} is damaged ({error}); start again under another --name") from None
        if record["experiment"] != experiment:
            raise InputError(f"{self.path} is a run of {record['experiment']}, not of {experiment}; give its --name")
        return record

    def file(self, name: str, record: Content) -> str:
        """Return a file of the task.

        Raises:
            InputError: if it is not the one that the run wrote.
        """
        path = self.path / name
        with _as_input_error():
            text = read_file(path) if path.exists() else b""
        if record["files"].get(name) != _sha256(text):
            raise InputError(f"{path} is not that of the run; --resume, with the flags of before, writes it again")
        return text.decode()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other processes out.

        Raises:
            InputError: if another process trains there, or the folder cannot be made.
        """
        with _as_input_error():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                message = f"{self.path} is being trained by another process; wait for it, or choose another --name"
                raise InputError(message) from None
        try:
            yield
        finally:
            lock.release()

    def begin(self, record: Content, files: dict[str, str]) -> None:
        """Write config.json, and what is missing or damaged of the files of the task. For who holds the lock."""
        record["files"] = {name: _sha256(text.encode()) for name, text in files.items()}
        new = not (self.path / CONFIG).exists()
        write_file(self.path / CONFIG, _to_json(record))
        for name, text in files.items():
            path = self.path / name
            if not _holds(path, text):
                if not new:
                    _warn(f"{path} is missing or damaged: it is written again")
                write_file(path, text)

    def sign(self, record: Content, origin: Content, trains: bool) -> None:
        """Write into config.json which code runs now, unless it trains nothing. For who holds the lock.

        Afterwards `origin` names the code that has trained, for a run may be resumed after a change of the code.

        Args:
            record: what config.json says.
            origin: the `provenance` of this start.
            trains: whether there is something to train.
        """
        starts = record.setdefault("starts", [])
        start = {name: origin[name] for name in ("commit", "dirty")}
        if start not in starts and (trains or not starts):
            starts.append(start)
            write_file(self.path / CONFIG, _to_json(record))
        origin |= starts[-1] | {"earlier_starts": starts[:-1]}


class ModelFolder:
    """Read and write the folder of a model.

    The lines of metrics.jsonl are in the checkpoints too. So the file can be written again, and is never read.

    Args:
        path: the folder.
        run: the identity of the run. None: of any run, for reading alone.
    """

    def __init__(self, path: Path, run: str | None = None) -> None:
        self.path, self.run = path, run
        self.log: list[Line] = []

    def make(self) -> None:
        """Make the folder, if it is not there.

        Raises:
            InputError: if it is a symbolic link.
        """
        if self.path.is_symlink():
            raise InputError(f"{self.path} is a symbolic link; start again under another --name")
        self.path.mkdir(parents=True, exist_ok=True)

    def append(self, line: Line) -> None:
        """Add a line to metrics.jsonl."""
        self.log.append(line)
        append_line(self.path / LOG, json.dumps(line) + "\n")

    def save(self, kind: str, weights: Weights, state: State) -> None:
        """Write a checkpoint, see `save_checkpoint`."""
        save_checkpoint(self.path, kind, weights, state | {"run": self.run, "log": _lines(self.log)})

    def load(self, kind: str, accept: Any, training: bool) -> tuple[Weights, State] | None:
        """Load the newest good checkpoint of this run, see `load_checkpoint`. Say on stderr which ones are damaged.

        Args:
            kind: "last" or "best".
            accept: a function of weights and state that puts them to use; raises where it cannot.
            training: whether this process holds the lock: damaged ones are renamed.

        Raises:
            CheckpointError: if there are some, all damaged.
        """

        def check(weights: Weights, state: State) -> None:
            if self.run is not None and state.get("run") != self.run:
                raise CheckpointError("of another run")
            accept(weights, state)

        found = load_checkpoint(self.path, kind, check, set_aside=training)
        if found is None:
            return None
        weights, state, lines = found
        for line in lines:
            _warn(line)
        return weights, state

    def restart_log(self, lines: list[Line]) -> None:
        """Let metrics.jsonl hold these lines and no others. For who holds the lock."""
        self.log = list(lines)
        if not _holds(self.path / LOG, _lines(lines)):
            write_file(self.path / LOG, _lines(lines))

    def finish(self, result: Content) -> None:
        """Write result.json."""
        self.restart_log(self.log)
        write_file(self.path / RESULT, _to_json({"run": self.run, "result": result, "log": self.log}))

    def steps(self) -> int:
        """Return about how many steps of training are done."""
        try:
            return int(parse_log(read_file(self.path / LOG).decode())[-1]["step"])
        except (OSError, ValueError, LookupError, TypeError):
            return 0

    def finished(self, training: bool) -> Content | None:
        """Return the result of a finished model, and take its log; None if it must be trained or judged.

        A result.json that is damaged, or of another run, counts as none: the checkpoints are judged again.

        Args:
            training: whether this process holds the lock: a damaged one is renamed, metrics.jsonl mended.
        """
        path = self.path / RESULT
        if not path.exists() and not path.is_symlink():
            return None
        try:
            content = _read_json(path)
            if content["run"] != self.run:
                raise ValueError("of another run")
        except (OSError, ValueError) as error:
            _warn(f"{path} is damaged ({error}): the model is judged again")
            if training:
                put_aside(path)
            return None
        self.log = content["log"]
        if training:
            self.restart_log(self.log)
        return content["result"]


def identity(record: Content) -> str:
    """Return a digest of all that decides about the numbers of a run."""
    deciding = {name: record[name] for name in DECIDING}
    deciding["corpus"] = {name: value for name, value in record["corpus"].items() if name != "source"}
    return _sha256(json.dumps(deciding, sort_keys=True).encode())


def parse_log(text: str) -> list[Line]:
    """Return the lines of a metrics.jsonl."""
    return [json.loads(line) for line in text.splitlines()]


def _lines(log: list[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in log)


def _holds(path: Path, text: str) -> bool:
    try:
        return read_file(path) == text.encode()
    except OSError:
        return False


def _to_json(content: Content) -> str:
    """Return the content and its digest."""
    return json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n"


def _read_json(path: Path) -> Content:
    """Return what `_to_json` wrote.

    Raises:
        ValueError: if it is something else.
        OSError: if it cannot be read.
    """
    try:
        content = json.loads(read_file(path))
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError("no object")
    if content.pop("sha256", None) != _digest(content):
        raise ValueError("its sha256 is another")
    return content


def _digest(content: Content) -> str:
    return _sha256(json.dumps(content, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _as_input_error() -> Iterator[None]:
    """Turn what the system says of the folder into an error of input: no work has begun."""
    try:
        yield
    except OSError as error:
        raise InputError(cause(error)) from None


def _warn(line: str) -> None:
    print(line, file=sys.stderr)
