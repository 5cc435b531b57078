"""The benchmark measures what it says, on sizes that take no time; how long anything took is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import instruments, peers, record, tables
from benchmarks import measure as benchmark
from benchmarks.instruments import LEAST, MOST, interleaved, peak_mib, speed_rows, time_by_kind
from benchmarks.measure import (
    FOR_GPUS,
    LAYERS,
    PLAN,
    TABLES,
    Grid,
    Plan,
    Steps,
    gates,
    layer_call,
    main,
    parse,
    pool_call,
    try_way,
)
from benchmarks.peers import LOOPS, PEERS, WAYS, Missing, Peer
from benchmarks.record import INFERENCE, STACK, STACKED, STEP, Benchmark
from lab.presets import PRESETS
from research import figures

ROOT = Path(__file__).parents[2]
SHAPE = (2, 8, 4)


def tiny(grid: Grid, *cells: tuple[int, int]) -> Grid:
    return grid._replace(widths=(4, 12), cells=cells)


TINY = Plan(
    precision_lengths=(8,),
    precision_biases=(0.0,),
    pool_shapes=(SHAPE, (1, 16, 4)),
    longest_loop=8,
    pool_memory_shape=SHAPE,
    grid=tiny(PLAN.grid, (1, 4), (2, 4)),
    step_grid=tiny(PLAN.step_grid, (1, 1)),
    kept_grid=tiny(PLAN.kept_grid, (1, 4)),
    paper_grid=tiny(PLAN.paper_grid, (8, 4), (16, 4))._replace(widths=(4,)),
    largest_gru=4 * 4,
    presets=tuple(
        replace(PRESETS[name], vocabulary=20, embedding=8, hidden=8, batch_size=2) for name in ("girrbach", "small")
    ),
    scaling_shapes=(SHAPE, (1, 16, 4), (4, 8, 4)),
    roofline_shape=SHAPE,
    matrix_size=16,
    profile_shapes=(SHAPE,),
    processes=(1,),
    process_flags="--preset demo --epochs 1 --models qrnn --embedding 4 --hidden 4 --batch-size 256",
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a run of the whole command left its file; memory is not measured, for that takes a process each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "peak_mib", lambda *_, **__: 1.5)
        patch.setitem(
            PEERS, "a peer", Peer(lambda: __import__("no_such_module").scan, "no-such-package", cuda_only=False)
        )
        patch.setattr(sys, "argv", ["benchmarks", "--budget", "0"])
        folder = tmp_path_factory.mktemp("results")
        patch.setattr(instruments, "SHORTEST", 1e-9)  # no repeats
        patch.setattr(benchmark, "FOR_GPUS", ())  # all of them, to see their tables
        patch.setattr(benchmark, "keep_freed_memory", lambda: None)  # it would last for all other tests
        assert main(["--device", "cpu", "--budget", "0"], TINY, folder) == 0
    return folder


@pytest.fixture
def content(folder):
    return json.loads((folder / "benchmark-cpu.json").read_text())


@pytest.fixture
def measured(folder, monkeypatch):
    """The benchmark as the tables see it, for the tiny sizes."""
    monkeypatch.setattr(record, "RESULTS", folder)
    monkeypatch.setattr(tables, "POOLING_SHAPE", SHAPE)
    monkeypatch.setattr(tables, "REFERENCE_LENGTH", 8)
    monkeypatch.setattr(tables, "LONG", 16)
    monkeypatch.setattr(tables, "PAPER_LENGTHS", (4,))
    monkeypatch.setattr(tables, "PAPER", {8: (5.5,), 16: (6.6,)})
    return Benchmark("cpu")


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_holds_every_table_and_where_it_comes_from(content):
    assert set(content) == {"provenance", *TABLES}
    origin = content["provenance"]
    assert origin["command"].endswith(" --budget 0")
    assert (origin["seed"], origin["budget_s"], origin["machine"]["device"]) == (0, 0.0, "cpu")
    assert set(origin["peers"]) >= {"mambapy", "accelerated-scan", "flash-linear-attention"}


def test_every_time_has_its_spread_and_its_rounds(content):
    for table in ("pooling", "layer", "step", "layer_kept", "scaling", "experiment", "roofline"):
        rows = [row for row in content[table] if "skipped" not in row]
        assert rows
        for row in rows:
            assert 0 < row["ms_q1"] <= row["ms"] <= row["ms_q3"], (table, row)
            assert row["rounds"] == LEAST
            assert row["threads"] in TINY.threads


@pytest.mark.parametrize("shape", TINY.pool_shapes)
def test_every_way_to_pool_is_measured_or_skipped_with_a_reason(content, shape):
    rows = [row for row in content["pooling"] if (row["B"], row["T"], row["H"]) == shape]
    skipped = {row["what"]: row["skipped"] for row in rows if "skipped" in row}
    measured = {row["what"] for row in rows if "skipped" not in row}
    assert measured | set(skipped) == {*WAYS, *PEERS, "a peer"}
    assert not measured & set(skipped)
    assert skipped["a peer"].startswith("not installed: ") and "no_such_module" in skipped["a peer"]
    assert skipped["fla chunk_hgrn"] == "runs on CUDA only"
    assert set(LOOPS) <= (measured if shape[1] <= TINY.longest_loop else set(skipped))
    for part in ("forward", "forward + backward"):
        assert {row["what"] for row in rows if row.get("part") == part} == measured


@pytest.mark.parametrize(
    ("table", "grid"), [("layer", TINY.grid), ("step", TINY.step_grid), ("layer_kept", TINY.kept_grid)]
)
def test_layers_are_compared_in_every_cell_with_each_number_of_threads(content, table, grid):
    cells = {}
    for row in content[table]:
        cells.setdefault((row["threads"], row["H"], (row["B"], row["T"]), row["part"]), set()).add(row["what"])
        assert ("mib" in row) == (grid.memory and row["threads"] == 1 and row["what"] in ("QRNN", "LSTM"))
    assert set(cells) == set(product(TINY.threads, grid.widths, grid.cells, grid.parts))
    for (_, width, (batch, time), _), names in cells.items():
        assert names == {name for name in grid.layers if name != "GRU" or batch * time * width <= TINY.largest_gru}


@pytest.mark.parametrize("name", ["QRNN", "QRNN, k = 1", "LSTM", "GRU", "stack of one QRNN layer"])
def test_layers_take_time_first_and_carry_the_state(name):
    torch.manual_seed(0)
    layer, x = LAYERS[name](5).eval(), torch.randn(6, 3, 5)  # (T, B, F)
    steps, h = Steps(layer, x[:1]), []
    for t in range(len(x)):
        steps.x = x[t : t + 1]
        h.append(layer(steps.x, steps.state)[0])
        steps()
    torch.testing.assert_close(torch.cat(h), layer(x)[0], rtol=1e-5, atol=1e-6)


def test_the_papers_grid_is_for_gpus(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(benchmark, "TABLES", dict.fromkeys(TABLES, lambda *_: []) | {"paper": measured.append})
    assert main(["--device", "cpu"], TINY, tmp_path) == 0
    assert FOR_GPUS == ("paper",) and not measured
    assert set(json.loads((tmp_path / "benchmark-cpu.json").read_text())) == {"provenance", *TABLES} - {"paper"}


def test_the_whole_plan_has_the_cells_that_are_published():
    plan = benchmark.PLAN
    assert len(plan.paper_grid.cells) == 30
    assert (32, 128, 640) in plan.pool_shapes
    growing = {shape[1] for shape in plan.pool_shapes if shape[0] * shape[1] == 65_536}
    assert (
        growing == {shape[1] for shape in plan.scaling_shapes if shape[0] * shape[1] == 65_536} >= {32, 16_384, 65_536}
    )


def test_models_of_the_experiment_are_matched(content):
    rows = {(row["preset"], row["part"], row["what"]): row for row in content["experiment"]}
    parts = ("training", "recurrent layers alone")
    assert set(rows) == set(product(("girrbach", "small"), parts, ("qrnn", "lstm")))
    for row in rows.values():
        assert row["tokens_per_s"] == pytest.approx(2 * benchmark.SENTENCE / (1e-3 * row["ms"]))


@pytest.mark.parametrize("part", [INFERENCE, STACKED])
def test_shares_of_the_profile_are_of_one_whole(content, part):
    rows = {row["what"]: row for row in content["profile"] if row["part"] == part}
    assert set(rows) >= {"matrix products", "gates, activations and pooling"}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["matrix products"]["of_machine"] > 0


def test_rates_of_the_roofline_follow_from_its_times(content):
    rows = {row["what"]: row for row in content["roofline"]}
    states = SHAPE[0] * SHAPE[1] * SHAPE[2]
    assert rows["copy"]["gb_per_s"] == pytest.approx(2 * 4 * 4 * states / (1e-3 * rows["copy"]["ms"]) / 1e9)
    product = rows["matrix product"]
    assert product["gflop_per_s"] == pytest.approx(2 * TINY.matrix_size**3 / (1e-3 * product["ms"]) / 1e9)


# --- tables and figures ----------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(measured, folder, tmp_path, monkeypatch):
    """The same, as if a GPU had made it."""
    content = json.loads((folder / "benchmark-cpu.json").read_text())
    content["provenance"]["machine"] |= {"device": "cuda", "gpu": "a GPU"}
    (tmp_path / "benchmark-cuda.json").write_text(json.dumps(content))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return Benchmark("cuda")


def cells(table: str) -> list[list[str]]:
    """The cells of a table in Markdown, without its rule."""
    lines = [line for line in table.splitlines() if line.startswith("|") and not line.startswith("|:")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_ratios_are_of_the_same_run(content, measured):
    times = {(row["B"], row["part"], row["what"]): row["ms"] for row in content["paper"]}
    ratios = [times[8, part, "LSTM"] / times[8, part, "QRNN"] for part in (INFERENCE, STACKED)]
    assert cells(tables.paper_grid(measured))[1] == ["8", " / ".join(f"{ratio:.1f}" for ratio in ratios)]


def test_the_papers_figures_stand_beside_those_of_a_gpu_alone(on_a_gpu):
    assert cells(tables.paper_grid(on_a_gpu))[1][1].startswith("5.5 / ")


def test_layers_are_compared_by_time_and_memory(content, measured):
    times = {
        (row["H"], row["threads"], row["B"], row["part"], row["what"]): row["ms"]
        for row in (*content["layer"], *content["step"])
    }

    def ratio(name: str, *place: object) -> float:
        return times[(*place, "LSTM")] / times[(*place, name)]

    shown = {row[0]: row[1:] for row in cells(tables.layer_speed(STACKED, measured))}
    wanted = [f"{ratio('QRNN', 12, 2, b, STACKED):.2f} / {ratio('QRNN, k = 1', 12, 2, b, STACKED):.2f}" for b in (1, 2)]
    assert shown["12 units, 2 cores"] == wanted
    assert {row[0]: row[1:] for row in cells(tables.layer_memory(measured))}["inference, 4 units"] == ["1.00", "1.00"]

    widths = TINY.grid.widths
    ranges = {row[0]: row[1:] for row in cells(tables.readme_speed({"one": measured, "other": measured}))[1:]}
    assert [*ranges][:3] == [f"{STACKED}, one", f"{STACKED}, other", f"{INFERENCE}, one"]
    for part, batches in ((STACKED, (1, 2)), (INFERENCE, (1, 2)), (STEP, (1,))):
        assert ranges[f"{part}, one"] == ranges[f"{part}, other"]
        for width, shown in zip(widths, ranges[f"{part}, one"], strict=True):
            layer = STACK if part == STEP else "QRNN"
            every = [ratio(layer, width, threads, batch, part) for threads in (1, 2) for batch in batches]
            low, high = f"{min(every):.1f}", f"{max(every):.1f}"
            assert shown == (low if low == high else f"{low} to {high}")

    least, place = min((ratio("QRNN", h, n, b, STACKED), (h, n, b)) for h in widths for n in (1, 2) for b in (1, 2))
    (sentence,) = [text for text in tables.layer_worst(measured).split(". ") if text.startswith("Training inside")]
    cores = "1 core" if place[1] == 1 else "2 cores"
    assert sentence.endswith(f"ratio is {least:.2f}, at {place[0]} units, {cores}, {place[2]} x 4")
    least = min(ratio(STACK, h, n, 1, STEP) for h in widths for n in (1, 2))
    (sentence,) = [
        text for text in tables.layer_worst(measured).split(". ") if text.startswith("Step by step, in a stack")
    ]
    assert f"ratio is {least:.2f}, at" in sentence


def test_both_ways_to_hand_out_memory_are_shown(content, measured):
    shown = {row[0]: row[1:] for row in cells(tables.layer_kept(measured))[1:]}
    assert len(shown) == 2 * 2 * len(TINY.kept_grid.widths)
    for table, column in (("layer", 0), ("layer_kept", 1)):
        times = {
            row["what"]: row["ms"]
            for row in content[table]
            if (row["H"], row["B"], row["threads"], row["part"]) == (12, 1, 1, INFERENCE)
        }
        assert shown["inference, 12 units, 1 core"][column] == f"{times['LSTM'] / times['QRNN']:.2f}"


def test_the_worst_error_of_each_length_is_shown(content, measured):
    errors = {row["method"]: f"{row['forward']:.0e} / {row['gradient']:.0e}" for row in content["precision"]}
    assert dict(cells(tables.precision(measured))[1:]) == {name: errors[name] for name in tables.PRECISION_METHODS}
    assert len(cells(tables.readme_exactness(measured))) == 4


def test_every_block_is_made_from_the_file(measured, folder):
    (folder / f"benchmark-{tables.INTEL}.json").write_text((folder / "benchmark-cpu.json").read_text())
    shown = {name: block() for name, block in tables.BLOCKS.items()}
    assert "Not measured, runs on CUDA only: " in shown["pooling speed"]
    assert "a peer" in shown["pooling speed"]
    assert "T = 16 over that at T = 8: pooling " in shown["layer growth"]
    assert "--budget 0`" in shown["benchmark source"]
    assert not any("nan" in text or "yet" in text for name, text in shown.items() if name != "gpu")


def test_speeds_are_named_after_the_maker_of_the_cpu():
    both = [SimpleNamespace(origin={"machine": {"cpu": cpu}}) for cpu in ("Intel(R) Xeon(R) Processor", "AMD EPYC")]
    assert list(tables.by_maker(*both).items()) == [("AMD", both[1]), ("Intel", both[0])]
    assert tables.by_maker(both[0], both[0]) == {"Intel": both[0]}


def test_plots_are_drawn(on_a_gpu, tmp_path):
    for name, draw in figures.BENCHMARK.items():
        draw(on_a_gpu, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_without_a_gpu_the_page_says_so(measured, on_a_gpu, tmp_path):
    assert "research/results/benchmark-cuda.json" in tables.gpu() and ", a GPU, " in tables.gpu()
    (tmp_path / "benchmark-cuda.json").unlink()
    assert "`python -m benchmarks --device cuda`" in tables.gpu()


def test_a_table_that_is_missing_says_how_to_measure_it(on_a_gpu, tmp_path):
    content = json.loads((tmp_path / "benchmark-cuda.json").read_text())
    content.pop("paper")
    (tmp_path / "benchmark-cuda.json").write_text(json.dumps(content))
    assert "`python -m benchmarks --device cuda --only paper`" in tables.block(tables.paper_grid, "cuda")
    assert "`python -m benchmarks --device cpu`" in tables.block(tables.paper_grid, "cpu")


# --- the instruments -------------------------------------------------------------------------------------------------


def test_compared_calls_take_turns():
    turns = []
    times = interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, budget=0.0)
    assert all(len(seconds) == LEAST for seconds in times.values())
    changes = sum(before != after for before, after in pairwise(turns))
    assert changes == 2 * LEAST + 1


def test_rounds_have_a_limit():
    assert len(interleaved({"a": lambda: None}, budget=1e9)["a"]) == MOST


def test_median_and_quartiles():
    (row,) = speed_rows({"a": [0.005, 0.001, 0.002, 0.004, 0.003]}, part="forward")
    assert row == {"part": "forward", "threads": 1, "what": "a", "ms": 3.0, "ms_q1": 2.0, "ms_q3": 4.0, "rounds": 5}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory can be reset on Linux only")
def test_peak_memory_is_what_the_arrays_take():
    shape = (1, 4096, 512)  # 8 MiB an array
    # the gates and h, and what the scan keeps of the gates' products: one array more
    assert 16 <= peak_mib(pool_call, shape, "scan", "float32", False, device="cpu") <= 48
    assert 8 <= peak_mib(layer_call, (1, 4096, 64), "QRNN", STACKED, device="cpu") <= 64


def test_matrix_products_are_told_from_the_rest():
    a = torch.randn(64, 64)
    seconds = time_by_kind(lambda: (a @ a).tanh().copy_(a), "cpu")
    assert set(seconds) == {"matrix products", "gates, activations and pooling", "copies"}


# --- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WAYS, "torch.associative_scan"])
def test_ways_to_pool_agree(name):
    try_way(peers.load(name, "cpu"), gates((2, 16, 3), 0.0, "cpu"))


def test_a_peer_that_fails_or_is_wrong_is_told_in_one_line():
    problem = gates(SHAPE, 0.0, "cpu")
    with pytest.raises(Missing, match=r"^ValueError: no$"):
        try_way(lambda log_f, log_x: (_ for _ in ()).throw(ValueError("no\nnever")), problem)
    with pytest.raises(Missing, match=r"^wrong: relative error"):
        try_way(lambda log_f, log_x: log_f + log_x, problem)


def test_a_peer_that_breaks_on_import_is_told_in_one_line(monkeypatch):
    def broken():
        raise OSError("no compiler\nwhatever")

    monkeypatch.setitem(PEERS, "broken", Peer(broken, "broken", cuda_only=False))
    with pytest.raises(Missing, match=r"^OSError: no compiler$"):
        peers.load("broken", "cpu")


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--only", "everything"],
        ["--rounds", "3"],
        ["--budget", "-1"],
        ["--budget", "nan"],
        ["--seed", "x"],
        ["--device", "tpu"],
        *([] if torch.cuda.is_available() else [["--device", "cuda"]]),
    ],
)
def test_wrong_flags_give_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(flags)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and flags[0] in captured.err
    assert captured.out == ""


def test_the_script_itself_says_it_in_one_line():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--only"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_only_some_tables_are_measured_and_the_others_kept(content, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "provenance", lambda **_: content["provenance"] | {"command": "again"})
    monkeypatch.setattr(benchmark, "versions", lambda: content["provenance"]["peers"])
    path = tmp_path / "benchmark-cpu.json"
    path.write_text((folder / "benchmark-cpu.json").read_text())
    only = ["--device", "cpu", "--budget", "0", "--only", "roofline", "precision"]
    assert main(only, TINY, tmp_path) == 0
    after = json.loads(path.read_text())
    assert after["roofline"] != content["roofline"]
    assert after["layer"] == content["layer"]
    assert after["precision"] == content["precision"]  # the same seed gives the same inputs
    assert after["provenance"]["command"].endswith(" --budget 0; again")


def test_what_is_on_record_stays_until_all_tables_are_measured(folder, tmp_path, monkeypatch):
    path = tmp_path / "benchmark-cpu.json"
    path.write_text((folder / "benchmark-cpu.json").read_text())
    before = path.read_bytes()
    broken = {"roofline": TABLES["roofline"], "profile": lambda *_: 1 / 0}
    monkeypatch.setattr(benchmark, "TABLES", broken)
    with pytest.raises(ZeroDivisionError):
        main(["--device", "cpu", "--budget", "0"], TINY, tmp_path)
    assert path.read_bytes() == before


def test_tables_of_different_runs_are_not_mixed(content, folder, tmp_path, capsys):
    path = tmp_path / "benchmark-cpu.json"
    path.write_text((folder / "benchmark-cpu.json").read_text())
    before = path.read_bytes()
    assert main(["--device", "cpu", "--budget", "0", "--seed", "1", "--only", "roofline"], TINY, tmp_path) == 2
    captured = capsys.readouterr()
    assert all(word in captured.err for word in ("--only", "benchmark-cpu.json", "seed"))
    assert captured.err.count("\n") == 1
    assert path.read_bytes() == before


def test_what_measures_memory_is_found_by_its_name_in_another_process():
    """In `__main__`, which `python -m benchmarks` runs, no other process would find it."""
    assert {call.__module__ for call in (pool_call, layer_call)} == {"benchmarks.measure"}
    assert "def " not in (ROOT / "benchmarks" / "__main__.py").read_text()
