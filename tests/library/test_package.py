"""What `pip install .` installs: the library, its types, and a page that an index can show."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, for setuptools writes beside its sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE", "qrnn_layer.py"):
        shutil.copy(ROOT / name, source)
    for name in ("qrnn", "lab"):  # the second must stay out
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", target, source)
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    return zipfile.ZipFile(next(target.glob("*.whl")))


def test_wheel_holds_the_library_and_nothing_else(wheel):
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert installed == {"qrnn_layer.py", "qrnn/py.typed", *(f"qrnn/{path.name}" for path in ROOT.glob("qrnn/*.py"))}


def test_wheel_needs_torch_alone_and_describes_itself_without_what_an_index_cannot_show(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    fields = Parser().parsestr(wheel.read(metadata).decode())
    needs = [Requirement(text) for text in fields.get_all("Requires-Dist")]
    assert [need.name for need in needs if need.marker is None] == ["torch"]
    assert fields["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)]+)\)", fields.get_payload())
    assert links and all(link.startswith("https://") for link in links)  # relative ones, pictures too, lead nowhere


def test_python_of_the_description_runs(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    blocks = re.findall(r"```python\n(.*?)```", wheel.read(metadata).decode(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_extras_name_what_requirements_pin():
    pins = dict(re.findall(r"^(\S+)==([^\s#]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", text, re.DOTALL)[1]
    needs = [Requirement(need) for need in re.findall(r'^ {4}"(.+)",$', extras, re.MULTILINE)]
    assert needs
    for need in needs:
        assert need.name in pins, f"{need.name} is in no line of requirements.txt"
        assert need.specifier.contains(pins[need.name])
