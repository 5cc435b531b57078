"""The README says what the files under results/ say, and its code runs."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "results").glob("*.json"))


def test_every_table_is_made_from_the_results():
    specification = importlib.util.spec_from_file_location("readme", ROOT / "results" / "readme.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.render(README) == README, "run `make results`"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_result_says_where_it_comes_from(path):
    content = json.loads(path.read_text())
    provenance = content.get("provenance", content)
    for key in ("command", "commit", "machine", "versions", "seed"):
        assert provenance[key] is not None, key
    assert provenance["dirty"] is False, "made by code that was not committed"


def test_example_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(blocks)], cwd=ROOT, check=True)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
