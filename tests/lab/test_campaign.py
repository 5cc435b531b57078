"""A campaign against the folder of a run: kills, errors of the system, damaged files, links.

Afterwards the run must go on to the result of one that nothing happened to, or be refused in one line. By default a
few are tried; QRNN_CAMPAIGN=10000 tries everything, which takes long. What came of it is printed.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import experiment
from experiment import main
from lab import report
from lab import run as comparison
from lab.checkpoint import load_checkpoint
from lab.synthetic import sample_sentences

MOST = int(os.environ.get("QRNN_CAMPAIGN", 0))  # tries of each campaign; 0: a few
RUN = Path("runs/x")
FLAGS = "--preset demo --corpus text --data text --embedding 4 --hidden 4 --epochs 3 --batch-size 16 --device cpu"
TRAIN = [*FLAGS.split(), "--zoneout", "0.3", "--models", "qrnn", "--checkpoint-minutes", "0", "--name"]
CHANGING = ("open", "replace", "mkdir", "unlink", "rmdir", "fsync")
READING = ("stat", "lstat", "scandir", "listdir")
ERRORS = (errno.EACCES, errno.EROFS, errno.EIO, errno.ENOSPC, errno.ENAMETOOLONG, errno.ENOTDIR)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Path]:
    """A folder with runs: done is finished, half is after two epochs, other is done with another seed."""
    folder = tmp_path_factory.mktemp("campaign")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        origin = comparison.provenance(seed=0, device="cpu")
        patch.setattr(comparison, "provenance", lambda **_: dict(origin))  # git takes its time, and so do
        patch.setattr(comparison, "announce", lambda *_: None)
        patch.setattr(report, "draw_curves", lambda *_: b"PNG")
        patch.setattr(experiment, "SAMPLE_WORDS", 3)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        Path("text").mkdir()
        for split, seed, count in (("train", 1, 80), ("valid", 2, 10), ("test", 3, 10)):
            lines = [" ".join(sentence) for sentence in sample_sentences(count, seed=seed)]
            Path("text", f"{split}.txt").write_text("\n".join(lines) + "\n")
        assert main([*TRAIN, "done"]) == 0
        assert main([*TRAIN, "other", "--seed", "1"]) == 0
        operations = count_operations(CHANGING)
        with Sabotage(CHANGING, int(0.6 * operations), kill), pytest.raises(Killed):
            main([*TRAIN, "x"])
        RUN.rename("runs/half")
        yield folder
        torch.set_num_threads(threads)


# --- what is done to a run -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone: nothing of it may go on."""


def kill(_: object) -> None:
    raise Killed


class Sabotage:
    """Within `with`, count the operations on files in runs/; `action` takes the place of the one `at`, and of later."""

    def __init__(self, names: tuple[str, ...], at: int, action: Callable[[object], None], once: bool = False) -> None:
        self.names, self.at, self.action, self.once = names, at, action, once
        self.count = 0

    def _wrapped(self, real: Callable) -> Callable:
        def operation(path, *arguments, **named):
            if isinstance(path, int) or "dir_fd" in named or os.fspath(path).startswith("runs"):
                self.count += 1
                if self.count == self.at or (self.count > self.at and not self.once):
                    self.action(path)
            return real(path, *arguments, **named)

        return operation

    def __enter__(self) -> Sabotage:
        self._patch = pytest.MonkeyPatch()
        for name in self.names:
            real = getattr(os, name)
            wrapped = self._wrapped(real)
            self._patch.setattr(os, name, wrapped)
            for known in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
                if real in known:  # shutil.rmtree looks there
                    known.add(wrapped)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def count_operations(names: tuple[str, ...]) -> int:
    fresh()
    with Sabotage(names, 10**9, kill) as counted:
        assert main([*TRAIN, "x"]) == 0
    fresh()
    return counted.count


# --- what came of it -------------------------------------------------------------------------------------------------


def outcome(folder: Path, with_weights: bool = True) -> str:
    """All that decides: the log but for the times, the scores, the best weights."""
    log = [json.loads(line) for line in (folder / "qrnn/metrics.jsonl").read_text().splitlines()]
    (result,) = json.loads((folder / "results.json").read_text())["models"]
    scores = [result[name] for name in ("best_epoch", "valid_perplexity", "test_perplexity", "sample")]
    times = [line.pop("seconds") for line in log]
    assert times == sorted(times)
    if not with_weights:
        return repr((log, scores))
    weights, state, _ = load_checkpoint(folder / "qrnn", "best")
    return repr((log, scores, state["epoch"], [(name, weights[name].tolist()) for name in sorted(weights)]))


class Campaign:
    """Counts what was tried: survived, refused in a line, or lost."""

    def __init__(self, name: str, capsys: pytest.CaptureFixture) -> None:
        self.name, self.capsys = name, capsys
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []

    def attempt(self, label: str, arguments: list[str]) -> int | None:
        """Run; None if it ended in anything but an exit code with at most one line that says error."""
        self.capsys.readouterr()
        try:
            code = main(arguments)
        except Exception as error:
            self.lost.append(f"{label}: {error!r}")
            return None
        lines = self.capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        if len(errors) != bool(code) or errors != lines[len(lines) - len(errors) :] or code not in (0, 1, 2):
            self.lost.append(f"{label}: code {code}, {lines}")
            return None
        if errors and not any(word in errors[0] for word in ("runs", "--name")):
            self.lost.append(f"{label}: names no file: {errors[0]}")
        return code

    def resume(self, label: str, may_refuse: bool = False, with_weights: bool = True) -> None:
        code = self.attempt(label, [*TRAIN, "x", "--resume"])
        if code == 0 and outcome(RUN, with_weights) == outcome(Path("runs/done"), with_weights):
            self.counts["survived"] += 1
        elif code and may_refuse:
            self.counts["refused"] += 1
        elif code is not None:
            self.lost.append(f"{label}: code {code}, another outcome")

    def close(self) -> None:
        with self.capsys.disabled():
            counts = {**self.counts, "lost": len(self.lost)}
            numbers = ", ".join(f"{count} {what}" for what, count in counts.items())
            print(f"\n{self.name}: {sum(counts.values())} tried, {numbers}")
        assert not self.lost, "\n".join(self.lost)


def fresh(source: str | None = None) -> None:
    """Let runs/x be a copy of a run, or nothing."""
    if RUN.is_symlink() or RUN.is_file():
        RUN.unlink()
    elif RUN.exists():
        shutil.rmtree(RUN)
    if source:
        shutil.copytree(f"runs/{source}", RUN, symlinks=True)


def sample(things: list, count: int) -> list:
    """So many of them, the same each time."""
    return random.Random(0).sample(things, min(count, len(things)))


# --- the campaigns ---------------------------------------------------------------------------------------------------


def test_kills_at_operations(runs, capsys):
    campaign = Campaign("kills", capsys)
    for at in sample(list(range(1, count_operations(CHANGING) + 1)), MOST or 12):
        fresh()
        with Sabotage(CHANGING, at, kill), pytest.raises(Killed):
            main([*TRAIN, "x"])
        if at % 3 == 0:  # and once more while it goes on
            with Sabotage(CHANGING, 1 + at % 11, kill), pytest.raises(Killed):
                main([*TRAIN, "x", "--resume"])
        campaign.resume(f"operation {at}")
    campaign.close()


def test_errors_of_the_system(runs, capsys):
    campaign = Campaign("errors", capsys)
    points = range(1, count_operations(CHANGING + READING) + 1)
    tries = [(number, at, once) for at in points for number in ERRORS for once in (True, False)]
    for number, at, once in sample(tries, MOST or 14):

        def fail(path: object, number: int = number) -> None:
            name = None if isinstance(path, int) else os.fspath(path)
            raise OSError(number, os.strerror(number), name)

        fresh()
        label = f"{errno.errorcode[number]} at {at}{' once' if once else ''}"
        with Sabotage(CHANGING + READING, at, fail, once):
            code = campaign.attempt(label, [*TRAIN, "x"])
        if code is not None:
            campaign.resume(label)
    campaign.close()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def foreign(path: Path) -> None:
    shutil.copy(Path("runs/other", *path.parts[2:]), path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def newer(path: Path) -> None:
    """What a later version may write: JSON with one thing more."""
    content = path.read_text()
    path.write_text('{"version": 2, ' + content.lstrip()[1:])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "null": lambda path: path.write_text("null"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "directory": directory,
    "pipe": pipe,
    "foreign": foreign,
    "newer": newer,
}


def files(source: str) -> list[Path]:
    return [path.relative_to(f"runs/{source}") for path in Path("runs", source).rglob("*") if path.is_file()]


def test_damaged_folders(runs, capsys):
    campaign = Campaign("damages", capsys)
    tries = [(source, path, name) for source in ("done", "half") for path in sorted(files(source)) for name in DAMAGES]
    for source, path, name in sample(tries, MOST or 24):
        nothing_foreign = name == "foreign" and not Path("runs/other", path).exists()
        if nothing_foreign or (name == "newer" and path.suffix != ".json"):
            continue
        fresh(source)
        DAMAGES[name](RUN / path)
        label = f"{source}: {path} {name}"
        code = campaign.attempt(f"{label}, generate", ["--name", "x", "--generate", "anna"])
        if code is not None:
            campaign.counts["survived" if code == 0 else "refused"] += 1
        may_refuse = path.name == "config.json" or name in ("directory", "pipe")
        # weights of a finished model that are gone stay gone; its scores are kept
        campaign.resume(label, may_refuse, with_weights=source == "half" or "best" not in str(path))
    campaign.close()


def test_links_are_never_written_through(runs, capsys):
    campaign = Campaign("links", capsys)
    asides = [Path(name) for name in ("config.json.tmp", "results.json.tmp", "report.md.tmp", "vocabulary.json.tmp")]
    asides += [Path("qrnn", name) for name in ("last.tmp", "best.tmp", "result.json.tmp", "metrics.jsonl.tmp")]
    asides += [Path("qrnn/last-999999"), Path("qrnn/damaged-last-000001"), Path("qrnn")]
    paths = sorted({*files("half"), *files("done"), *asides})
    for path, folder in sample([(path, folder) for path in paths for folder in (False, True)], MOST or 16):
        fresh("half")
        victim = Path("victim")
        shutil.rmtree(victim, ignore_errors=True)
        victim.mkdir()
        (victim / "file").write_text("mine")
        link = RUN / path
        if link.is_dir():
            shutil.rmtree(link)
        link.unlink(missing_ok=True)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(Path.cwd() / (victim if folder else victim / "file"))
        campaign.resume(f"{path} to a {'folder' if folder else 'file'}", may_refuse=True)
        if [file.name for file in victim.iterdir()] != ["file"] or (victim / "file").read_text() != "mine":
            campaign.lost.append(f"{path}: written through")
    campaign.close()
