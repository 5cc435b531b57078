"""A result says by which command it was made."""

import sys
from importlib.machinery import ModuleSpec

import pytest

from lab import provenance

ROOT = provenance.ROOT


@pytest.mark.parametrize(
    ("spec", "script", "command"),
    (
        (ModuleSpec("examples.sentiment.__main__", None), "x", "python -m examples.sentiment --data text"),
        (ModuleSpec("research.studies", None), "x", "python -m research.studies --data text"),
        (None, str(ROOT / "experiment.py"), "python experiment.py --data text"),
        (None, "/elsewhere/other.py", "python other.py --data text"),
    ),
)
def test_the_command_names_modules_and_scripts_and_no_folder(monkeypatch, spec, script, command):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [script, "--data", "/some/folder/text"])
    assert provenance.provenance(seed=0, device="cpu")["command"] == command
