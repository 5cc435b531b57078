"""benchmarks/gpu.md says what was measured and what is counted; the pages' own test covers that it is up to date."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import count, gpu_tables
from benchmarks.gpu import layer, layer_call
from benchmarks.record import RESULTS

FILES = sorted(RESULTS.glob("gpu-*.json"))


def rows(name: str, **labels: object) -> list[dict]:
    files = [path for path in FILES if path.name.startswith(f"gpu-{name}")]
    found = [row for path in files for row in json.loads(path.read_text())["rows"]]
    return [row for row in found if all(row.get(label) == value for label, value in labels.items())]


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if not line.startswith("|:")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_record_says_where_it_comes_from_and_no_path_of_a_machine(path):
    text = path.read_text()
    provenance = json.loads(text)["provenance"]
    assert provenance["machine"]["gpu"] and provenance["command"].startswith("python -m benchmarks.gpu ")
    assert not any(folder in text for folder in ("/home", "/root", "/tmp", "/opt", "/work"))


@pytest.mark.parametrize("part", ("inference", "training"))
def test_a_cell_of_the_grid_is_the_lstms_time_over_the_qrnns(part):
    header, *lines = cells(gpu_tables.grid(part))
    place = {name: column for column, name in enumerate(header)}
    for batch, length in ((8, 32), (256, 512)):
        found = rows("fig4", B=batch, T=length, part=part, tf32=True)
        ms = {(row["what"], row["form"]): row["ms"] for row in found}
        wanted = [
            ms["LSTM", "eager"] / ms["QRNN", "eager"],
            ms["LSTM", "eager"] / ms["QRNN", "compiled"],
            ms["LSTM", "eager, graph"] / ms["QRNN", "compiled, graph"],
        ]
        (line,) = [line for line in lines if line[0] == str(batch)]
        shown = line[place[f"T = {length}"]].split(" / ")
        assert shown[-3:] == [f"{ratio:.1f}" for ratio in wanted]


def test_no_cell_of_the_grid_was_measured_twice():
    measured = [tuple(row[key] for key in ("B", "T", "part", "tf32", "what", "form")) for row in rows("fig4")]
    assert len(measured) == len(set(measured))


def test_what_the_page_says_of_graphs_is_so_in_every_cell():
    inference, training = gpu_tables.grids("inference"), gpu_tables.grids("training")
    assert (inference["graph"] > gpu_tables.paper()).to_numpy().all()
    for part, ratios in (("inference", inference), ("training", training)):
        assert (ratios["graph"] > 1).to_numpy().all() and (ratios["compiled"] > 1).to_numpy().all()
        times = {
            form: {(row["B"], row["T"]): row["ms"] for row in rows("fig4", part=part, tf32=True, **form_of)}
            for form, form_of in FORMS.items()
        }
        behind = [cell for cell, ms in times["QRNN, compiled"].items() if ms > times["LSTM, graph"][cell]]
        assert behind and {length for _, length in behind} == {32}


FORMS = {
    "QRNN, compiled": {"what": "QRNN", "form": "compiled"},
    "LSTM, graph": {"what": "LSTM", "form": "eager, graph"},
}


def test_the_papers_grid_stands_first_in_inference():
    header, *lines = cells(gpu_tables.grid("inference"))
    assert "the paper" in header[0] and lines[0][1].startswith("5.5 / ")
    assert "the paper" not in cells(gpu_tables.grid("training"))[0][0]


def test_every_way_to_pool_has_its_times_and_its_largest_error():
    header, *lines = cells(gpu_tables.pooling("forward"))
    found = rows("methods", part="forward", what="log")
    (line,) = [line for line in lines if line[0] == "log"]
    eager = {(row["B"], row["T"], row["H"]): row["ms"] for row in found if row["form"] == "eager"}
    for shape, ms in eager.items():
        assert line[header.index(str(shape))].startswith(f"{1e3 * ms:,.0f} / ")
    assert line[-1] == f"{max(max(row['errors']) for row in found if 'errors' in row):.0e}"
    assert line[header.index("(8, 512, 320)")].endswith(" / - / -")  # did not compile, and the page says why
    assert "InductorError" in gpu_tables.not_run()


def test_the_language_models_are_compared_at_the_same_epoch_too():
    found = rows("bradbury")
    curves = [row["result"]["epochs"] for row in found]
    all_reached = min(map(len, curves))
    header, *lines = cells(gpu_tables.bradbury())
    assert header[2] == f"validation, epoch {all_reached}"
    assert [line[2] for line in lines] == [f"{curve[all_reached - 1]['valid_perplexity']:.1f}" for curve in curves]
    assert [line[1] for line in lines] == [row["zoneout_in_evaluation"] or "has none" for row in found]


def test_training_steps_are_held_against_those_of_the_lstm():
    _, *lines = cells(gpu_tables.training_steps())
    found = rows("training_steps", preset="small", part="training", amp="bf16")
    qrnn, lstm = (row["ms"] for name in ("qrnn", "lstm") for row in found if row["what"] == name)
    assert ["small", "training", "bf16", f"{qrnn:.1f} / {lstm:.1f} / {lstm / qrnn:.2f}"] in lines
    assert len(lines) * 2 == len(rows("training_steps"))


def test_tests_that_did_not_pass_are_named_with_their_reason():
    said = gpu_tables.tests()
    others = [row for row in rows("tests") if row["outcome"] != "passed"]
    assert said.startswith(f"{len(rows('tests')) - len(others)} tests passed. ")
    assert all(f"`{row['test']}` was {row['outcome']}: {row['text']}." in said for row in others)


# --- the count on paper ----------------------------------------------------------------------------------------------

KERNELS = {  # method -> how many it launches forward, of T steps, for T a power of 2 and at least 64
    "loop": lambda length: 2 * length + 2,
    "log": lambda length: 10,
    "closed form, float64, whole": lambda length: 13,
    "scan": lambda length: 5 * length.bit_length() - 3,
}


@pytest.mark.parametrize("length", (64, 512))
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_that_the_page_explains_are_what_is_dispatched(name, length):
    assert count.pooling((4, length, 8), name, backward=False).kernels == KERNELS[name](length)


def test_the_sums_of_bytes_that_the_page_explains_are_what_is_counted():
    page = (Path(gpu_tables.__file__).parent / "gpu.md").read_text()
    section = page[page.index("## Kernels and bytes") : page.index("<!-- begin gpu count -->")]
    sums = dict(re.findall(r"^\| ([^|]+) \| .* (\d+) \|$", section, re.MULTILINE))
    assert {*sums} == {*gpu_tables.COUNTED} - {"torch.associative_scan, generic"}
    edges = 60 * math.log2(512) / 512  # of each level of a scan; and h0
    for name, traffic in sums.items():
        counted = count.pooling((4, 512, 8), name, backward=False)
        assert counted.bytes / (4 * 512 * 8) == pytest.approx(float(traffic), abs=edges), name


@pytest.mark.parametrize("training", (False, True))
def test_without_numbers_the_same_is_counted(training):
    works = []
    for device in ("cpu", "meta"):
        module, x = layer("QRNN", 8, device).train(training), torch.ones(2, 16, 8, device=device)
        works.append(count.work_of(layer_call(module, x, training)))
    assert works[0] == works[1] and works[0].flops == (1 + training) * 2 * 16 * 2 * 16 * 24


def test_a_cell_of_fig_4_on_paper_is_its_largest_limit():
    lines = cells(gpu_tables.expected_layer("eager"))
    assert lines[1][1].startswith(f"launches {5 * count.qrnn(8, 32, training=False).kernels} / ")
    assert lines[-1][-1].startswith(f"products {256 * 512 * 2 * 640 * 960 / 50e6:,.0f} / bytes ")
