"""The benchmarks' harness: pairing, failing rows, the table. Nothing here asserts a time."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
import pkgutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks
from benchmarks import __main__ as command
from benchmarks import harness, order, own, pictures
from benchmarks.growth import exponent
from benchmarks.harness import LEFT_OUT, Comparison, Part, Ratio, Results, Row, compare
from benchmarks.main_job import Timeline
from model.config import DataConfig, FolderSource, SamplingConfig
from model.data import sources
from model.data.images import BadImage, decode, to_tensor
from model.data.sources.shapes import parse
from model.evaluation import oracle
from model.nets.gpt import GPT
from model.nets.sampler import sample
from tests import instances

pytestmark = pytest.mark.slow  # too long for the inner loop
CPU = torch.device("cpu")


def test_ratio_is_taken_within_each_round() -> None:
    # Medians alone would say 3 / 2 = 1.5; the pairs say 2, 3 and 1.
    comparison = Comparison({"ours": [1.0, 2.0, 3.0], "peer": [2.0, 6.0, 3.0]})
    assert comparison.ratio("peer") == Ratio(median=2.0, low=1.0, high=3.0)


def test_every_way_is_warmed_up_and_called_once_a_round_in_turning_order() -> None:
    calls: list[str] = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    comparison = compare(ways, rounds=3, warmup=2)
    assert "".join(calls) == "abcabc" + "abc" + "bca" + "cab"
    assert {name: len(seconds) for name, seconds in comparison.seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_untimed_preparation_precedes_every_call() -> None:
    calls: list[str] = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    compare(ways, rounds=1, warmup=1, before=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b-a-b"


def test_a_row_fails_when_results_differ_however_fast_it_is() -> None:
    ways = {"ours": lambda: 1, "right": lambda: 1, "wrong": lambda: 2}
    comparison = compare(ways, rounds=1, same=lambda ours, theirs: ours == theirs)
    row = comparison.row(7, "work", amount=1, unit="things/s", goals={"wrong": 0.0, "right": 0.0})
    assert row.met is False
    assert row.note.startswith("FAILED")
    assert "wrong" in row.note
    assert "right" not in row.note


def test_goals_are_judged_by_ratio_and_by_share_of_the_floor() -> None:
    comparison = Comparison({"ours": [1.0], "peer": [2.0]})
    row = comparison.row(1, "w", amount=10, unit="u/s", goals={"peer": 2.0, "floor": 0.5}, floor=20.0)
    assert (row.met, row.share, row.figures) == (True, 0.5, {"ours": 10.0, "peer": 5.0})
    assert row.goal == "≥ 2x peer; ≥ 50% of the floor"
    assert comparison.row(1, "w", amount=10, unit="u/s", goals={"peer": 2.1}).met is False
    assert comparison.row(1, "w", amount=10, unit="u/s", goals={"floor": 0.6}, floor=20.0).met is False
    assert comparison.row(1, "w", amount=10, unit="u/s").met is None
    with pytest.raises(KeyError):
        comparison.row(1, "w", amount=10, unit="u/s", goals={"typo": 1.0})


def test_peak_memory_sees_what_is_freed_again() -> None:
    size = 2**27
    small = harness.peak_memory(lambda: torch.ones(2**10))
    large = harness.peak_memory(lambda: torch.ones(size, dtype=torch.uint8).max())
    assert large - small == pytest.approx(size, rel=0.2)


def test_the_table_keeps_rows_that_were_not_measured_again(tmp_path: Path) -> None:
    comparison = Comparison({"ours": [1.0], "peer": [2.0]})
    rows = [comparison.row(n, f"work|{n}", amount=1, unit="u/s", goals={"peer": 3.0}) for n in (2, 1)]
    Results(tmp_path, "cpu", {"cores": 2}).add(rows[0])
    twice = Results(tmp_path, "cpu", {"cores": 2})
    for row in (rows[1], dataclasses.replace(rows[1], work="another")):
        twice.add(row)
    document = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["number"] for row in document["rows"]] == [1, 1, 2]
    Results(tmp_path, "cpu", {"cores": 2}).add(rows[1])
    document = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["number"] for row in document["rows"]] == [1, 2]
    assert document["rows"][0]["ratios"] == {"peer": {"median": 2.0, "low": 2.0, "high": 2.0}}
    lines = (tmp_path / "cpu.md").read_text().splitlines()
    assert lines[0] == "cores 2"
    assert lines[-1].startswith("| 2 | work\\|2 | ours 1, peer 0.5 u/s | peer 2x (2 to 2) |")
    assert "**no**" in lines[-1]


def test_the_rest_replaces_what_a_part_that_was_broken_off_had_measured(tmp_path: Path) -> None:
    left_out = Row(1, "part", "", {}, note=f"{LEFT_OUT}the time was over")
    first = Results(tmp_path, "cpu", {})
    for row in (Row(1, "a", "s", {"ours": 1.0}), left_out):
        first.add(row, part="part")
    rest = Results(tmp_path, "cpu", {}, rest=True)
    assert rest.left_out() == [(1, "part")]
    for work in ("a", "b", "part"):
        rest.add(Row(1, work, "s", {"ours": 2.0}), part="part")
    rest.add(left_out, part="part")  # the alarm after the last line
    lines = [(row["work"], row["figures"]) for row in json.loads((tmp_path / "cpu.json").read_text())["rows"]]
    assert lines == [("a", {"ours": 2.0}), ("b", {"ours": 2.0}), ("part", {"ours": 2.0})]


def test_a_row_that_breaks_is_a_failed_line_and_keeps_what_was_measured() -> None:
    def broken(device: torch.device) -> Iterator[Row]:
        yield Row(3, "fine", "s", {"ours": 1.0})
        raise RuntimeError("no such peer")

    rows: list[Row] = []
    command.measure(3, Part("work", broken), CPU, rows.append)
    assert [(row.work, row.met) for row in rows] == [("fine", None), ("work", False)]
    assert rows[1].note == "FAILED: RuntimeError: no such peer"


def test_parts_that_wait_come_after_those_of_all_rows() -> None:
    def part(work: str, later: bool = False) -> Part:
        return Part(work, lambda device: iter(()), later)

    offered = {1: [part("a"), part("A", later=True), part("b")], 2: [part("c")], 3: [part("C", later=True)]}
    plan = [(number, part.work) for number, part in command.plan(offered, [3, 1, 2])]
    assert plan == [(1, "a"), (1, "b"), (2, "c"), (3, "C"), (1, "A")]


def test_a_part_whose_time_is_over_is_left_out_by_name() -> None:
    rows: list[Row] = []
    part = Part("work", lambda device: pytest.fail("it was begun"))
    command.measure(3, part, CPU, rows.append, deadline=-math.inf)
    (row,) = rows
    assert (row.number, row.work, row.met, row.figures) == (3, "work", None, {})
    assert row.note.startswith("left out")


def test_a_part_is_broken_off_when_its_time_is_over_and_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def endless(device: torch.device) -> Iterator[Row]:
        yield Row(3, "fine", "s", {"ours": 1.0})
        while True:
            with suppress(Exception):  # as libraries do
                time.sleep(1)

    rows: list[Row] = []
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    command.measure(3, Part("work", endless), CPU, rows.append, deadline=0.2)
    assert [(row.work, row.met) for row in rows] == [("fine", None), ("work", None)]
    assert rows[1].note.startswith("left out")


def test_a_run_writes_each_line_at_once_and_names_what_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]

    def slow(device: torch.device) -> Iterator[Row]:
        yield Row(1, "first", "s", {"ours": 1.0})
        assert json.loads((tmp_path / "cpu.json").read_text())["rows"][0]["work"] == "first"
        clock[0] += 61

    def quick(device: torch.device) -> Iterator[Row]:
        yield Row(2, "second", "s", {"ours": 1.0})

    offered = {1: [Part("slow", slow)], 2: [Part("quick", quick)]}
    monkeypatch.setattr(command, "discover", lambda gpu: (offered, []))
    monkeypatch.setattr(command, "machine", lambda device: {"cores": 2})
    monkeypatch.setattr(command, "others", lambda: 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--minutes", "1", "--out", str(tmp_path)])
    assert command.main() == 0
    first, second = (tmp_path / "cpu.md").read_text().splitlines()[-2:]
    assert first.startswith("| 1 | first | ours 1 s")
    assert second.startswith("| 2 | quick |")
    assert "left out: the time was over" in second
    assert "quick: left out" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--rest", "--out", str(tmp_path)])
    assert command.main() == 0
    first, second = (tmp_path / "cpu.md").read_text().splitlines()[-2:]
    assert first.startswith("| 1 | first | ours 1 s")
    assert second.startswith("| 2 | second | ours 1 s")
    assert "slow" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main()  # nothing is left


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(benchmarks.__path__)])
def test_every_module_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


def test_a_module_that_cannot_be_loaded_is_named_and_the_others_are_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everything, missing = command.discover(gpu=False)
    assert not missing
    monkeypatch.delitem(sys.modules, "benchmarks.startup")
    load = importlib.import_module

    def without(name: str) -> ModuleType:
        if name == "benchmarks.startup":
            raise ModuleNotFoundError(name="absent")
        return load(name)

    monkeypatch.setattr(importlib, "import_module", without)
    offered, missing = command.discover(gpu=False)
    assert offered.keys() == everything.keys() - {10}
    assert missing == ["benchmarks/startup.py needs absent"]


def test_a_run_of_the_job_is_split_into_work_and_the_rest() -> None:
    lines = [
        (1.0, "[1/2] images"),
        (2.0, "      picture 10/20  50%"),
        (4.0, "      done in 3.0 s"),
        (5.0, "[2/2] register"),
        (7.0, "      done in 2.0 s"),
        (8.0, ""),
    ]
    timeline = Timeline.read(lines)
    assert (timeline.wall, timeline.inside, timeline.working) == (8.0, 5.0, 4.0)


def test_steps_before_the_first_line_of_progress_are_work() -> None:
    lines = [
        (10.0, "[1/1] text"),
        (25.0, "      step 20/400  5%  loss 4.06  214 img/s  ETA 1m54s"),  # 20 at the pace of 380 in 114 s
        (26.0, "      step 40/400  10%  loss 4.01  1.3k img/s  ETA 1m"),
        (50.0, "      done in 40.0 s"),
    ]
    step = Timeline.read(lines).steps["text"]
    assert (step.started, step.worked, step.ended) == (10.0, 25.0 - 6.0, 50.0)


def test_the_exponent_is_the_slope_of_the_logarithms() -> None:
    assert exponent({1.0: 3.0, 2.0: 12.0, 4.0: 48.0}) == pytest.approx(2.0)


def test_rows_of_a_busy_machine_say_so(tmp_path: Path) -> None:
    results = Results(tmp_path, "cpu", {})
    results.add(Row(1, "calm", "s", {"ours": 1.0}), others=0.1)
    results.add(Row(2, "busy", "s", {"ours": 1.0}), others=1.5)
    calm, busy = (tmp_path / "cpu.md").read_text().splitlines()[-2:]
    assert "others" not in calm
    assert "(others kept 1.5 cores busy)" in busy


def test_a_neighbour_at_work_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            assert harness.others(0.5) > harness.IDLE
        finally:
            neighbour.kill()


def test_no_two_modules_offer_the_same_row() -> None:
    seen: dict[int, str] = {}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if not module.name.startswith("__"):
            for number in getattr(importlib.import_module(f"benchmarks.{module.name}"), "ROWS", {}):
                assert seen.setdefault(number, module.name) == module.name


def test_an_unknown_row_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--rows", "99"])
    with pytest.raises(SystemExit):
        command.main()
    assert "there is no row 99" in capsys.readouterr().err


# ── people's own pictures ───────────────────────────────────────────────────────────────────────────────


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of a hundred pictures."""
    return pictures.made(tmp_path_factory.mktemp("own") / "100", partial(pictures.collection, count=100))


def test_a_collection_is_the_same_each_time_and_begins_as_a_smaller_one(
    hundred: Path, tmp_path: Path
) -> None:
    again, smaller = tmp_path / "again", tmp_path / "smaller"
    pictures.made(again, partial(pictures.collection, count=100))
    assert contents(again) == contents(hundred)
    pictures.made(smaller, partial(pictures.collection, count=40))
    wrong = pictures.broken(100).keys() | pictures.broken(40).keys()
    whole = {name: data for name, data in contents(smaller).items() if int(Path(name).stem[-5:]) not in wrong}
    assert whole
    assert whole.items() <= contents(hundred).items()
    pictures.made(again, lambda folder: pytest.fail("it is there"))


def test_of_a_collection_all_is_of_use_but_what_was_broken(hundred: Path) -> None:
    assert sorted(pictures.broken(100).values()) == sorted(pictures.BROKEN)
    assert pictures.broken(3000).keys() < set(range(3000))
    source = FolderSource(path=str(hundred))
    good, sides, forms, clear = [], [], set(), 0
    for record in sources.iterate(source, 32):
        if record.problem or record.others or not record.captions:
            continue
        try:
            decode(record.image, DataConfig(source=source, image_size=32))
        except BadImage:
            continue
        image = Image.open(io.BytesIO(record.image))
        good.append(record.captions[0])
        sides += image.size
        forms.add(image.format)
        clear += image.mode == "RGBA"
    assert len(good) == len(set(good)) == pictures.usable(100) == 96
    assert forms == set(pictures.SUFFIXES)
    assert min(sides) < 40
    assert 600 < max(sides) <= 900
    assert 10 < clear < 50


def test_captions_of_a_large_collection_are_all_different_and_say_what_is_there() -> None:
    captions = [pictures.caption(number) for number in range(30_000)]
    assert len(set(captions)) == 30_000
    beyond = next(number for number, text in enumerate(captions) if text.endswith("orange background"))
    assert captions[beyond].endswith(" on an orange background")
    form, data = pictures.picture(beyond)
    assert form in pictures.SUFFIXES
    corner = Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))
    assert corner == pytest.approx(pictures.COLOURS["orange"], abs=6)


def test_shapes_as_a_folder_show_no_combination_that_is_held_out(tmp_path: Path) -> None:
    folder = pictures.made(tmp_path / "shapes", partial(pictures.shapes, count=60, side=32))
    told = [path.read_text().splitlines() for path in sorted(folder.rglob("*.txt"))]
    assert len(told) == len(list(folder.rglob("*.png"))) == 60
    scenes = [[parse(line) for line in lines] for lines in told]
    assert all(one.canonical() == other.canonical() for one, other in scenes)
    assert not any(scene.composition for lines in scenes for scene in lines)
    first = Image.open(next(iter(sorted(folder.rglob("*.png")))))
    assert oracle.read(to_tensor(torch.from_numpy(np.array(first)).permute(2, 0, 1)[None])) == [
        scenes[0][0].canonical()
    ]
    asked = pictures.held_out(20)
    assert len(asked) == 20
    assert all(scene.composition for scene in asked)


@pytest.mark.parametrize("captioned", [False, True])
def test_flags_are_called_after_their_countries(captioned: bool, tmp_path: Path) -> None:
    svg = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 4 3'><path fill='#f00' d='M0 0h4v3H0z'/></svg>"
    )
    (tmp_path / "ci.svg").write_text(svg)
    country = {"code": "ci", "flag_4x3": "ci.svg", "name": "Côte d'Ivoire"}
    (tmp_path / "country.json").write_text(json.dumps([country]))
    out = tmp_path / "out"
    out.mkdir()
    pictures.render_flags(tmp_path, out, captioned)
    (path,) = out.glob("*.png")
    assert path.stem == ("ci" if captioned else "Côte d'Ivoire")
    assert [path.read_text() for path in out.glob("ci.txt")] == (["Côte d'Ivoire\n"] if captioned else [])
    flag = Image.open(path)
    assert (flag.size, flag.getpixel((320, 240))) == ((640, 480), (255, 0, 0, 255))


def test_the_table_of_own_pictures_keeps_rows_and_says_what_was_beyond(tmp_path: Path) -> None:
    figures = {
        "validation/psnr": 20.04,
        "codebook_use": 0.5,
        "train/retrieval": 0.9,
        "train/retrieval_chance": 0.1,
    }
    own.Table(tmp_path).add(own.Row("300", 300, 10, 288, 280, minutes=12.1, figures=figures))
    own.Table(tmp_path).add(own.Row("60", 60, 5, 58, minutes=1, note="FAILED with status 2: error: a|b"))
    for name, share in ((own.PRESET, 0.94), ("shapes", 0.88)):
        own.Table(tmp_path).add(own.Row(name, 80000, 25, minutes=25, all_right=share))
    table = own.Table(tmp_path)
    assert (table.minutes("60"), table.minutes("300"), table.minutes("none")) == (0, 12.1, 0)
    lines = (tmp_path / "own.md").read_text().splitlines()[2:]
    assert lines[2].startswith("| 60 | 0 of 58 | 5 | 1 |  | FAILED with status 2: error: a\\|b |")
    assert "| 12.1 | 1.21 **(beyond)** |" in lines[3]
    assert "| 20.0 dB | 50.0% | 90.0% (chance 10.0%) |  |" in lines[3]
    assert len({line.replace("\\|", "").count("|") for line in lines[:6]}) == 1, "as many cells in each"
    assert lines[-1] == "Within 5% of the preset: **no**."


def test_a_run_that_left_nothing_to_read_is_a_row_that_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(own, "latent_gpt", lambda arguments, state: (0, "done"))
    row = own.measured("60", own.Work(3, 1, lambda folder: None), tmp_path, 1, tmp_path / "state")
    assert row.note.startswith("FAILED: FileNotFoundError: ")


def test_a_failed_run_is_a_row_that_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work = own.Work(3, 1, lambda folder: None)
    row = own.measured("60", work, tmp_path / "nowhere", 1, tmp_path / "state")
    assert row.note.startswith("FAILED with status 2: ")


def test_ranks_correlate_with_ties_at_their_mean() -> None:
    assert order.spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert order.spearman([1, 1, 2], [1, 1, 2]) == 1
    assert order.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)  # as scipy has it
    assert math.isnan(order.spearman([1, 1], [1, 2]))


def test_no_row_of_the_plan_comes_twice_and_each_has_a_config_of_its_own() -> None:
    rows = order.plan()
    assert len({row.name for row in rows}) == len(rows)
    configs = [row.config().model_dump_json() for row in rows]
    assert len(set(configs)) == len(configs)


def test_a_row_that_fails_keeps_no_other_from_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = iter([0, 1, 0, 0])
    monkeypatch.setattr(order.subprocess, "call", lambda *_, **__: next(codes))
    monkeypatch.setattr(order, "prepare", lambda *_: None)
    places = ["--workers", "1", "--first", "4", "--folder", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["order", "--data", "openmoji", *places])
    monkeypatch.setenv("LATENT_GPT_STORE", "")
    assert order.main() == 1
    ended = [line.rpartition(": ")[2].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert ended == ["done", "FAILED", "done", "done"]


def test_the_lower_half_is_filled_as_the_sampler_goes_on_from_the_upper_one() -> None:
    torch.manual_seed(0)
    gpt = GPT(instances.config().transformer, 16, (4, 4), 16).eval()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    codes, text, mask = torch.randint(16, (3, 16)), torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.bool)
    halves = order.halves((4, 4))
    assert [int(hidden.sum()) for hidden in halves.values()] == [8] * 5
    sampling, seeds = SamplingConfig(temperature=0.7, cfg_scale=1.5), [3, 4, 5]
    found = order.fill(gpt, codes, halves["lower"], text, mask, sampling, seeds)
    assert torch.equal(found, sample(gpt, text, mask, sampling, seeds, prefix=codes[:, :8]))
    for name, hidden in halves.items():
        found = order.fill(gpt, codes, hidden, text, mask, sampling, seeds)
        assert torch.equal(found[:, ~hidden], codes[:, ~hidden])
        assert not torch.equal(found[:, hidden], codes[:, hidden]), name


def test_a_row_is_measured_on_its_way_and_tabulated(tmp_path: Path, store: str) -> None:
    row = order.Row("shapes", left=1.0, steps=2, dropout=0.0, views=1)
    tiny = instances.config().transformer
    assert tiny
    training = tiny.training.model_copy(update={"steps": 2, "eval_every": 1})
    changed = {"keep": "last", "random_order_left": 1.0, "training": training}
    config = instances.config(transformer=tiny.model_copy(update=changed))
    lines = order.Lines(tmp_path / "order.jsonl")
    order.run(row, config, tmp_path, lines)
    first, last = lines.read()
    assert lines.has(row)
    assert not lines.has(dataclasses.replace(row, seed=1))
    assert (first["step"], last["step"]) == (1, 2)
    assert first.keys() >= {"nll_fitted", "validation/likelihood_retrieval", "composition/reader_retrieval"}
    assert last.keys() >= first.keys() | {
        *("train/retrieval_real", "validation/all_right_filled_scattered"),
        *("validation/psnr", "robustness_psnr"),
    }  # fmt: skip
    assert len(list(tmp_path.glob("sheets/*.png"))) == 3
    lines.path.write_text(json.dumps(first) + "\n")  # as if the last line had not been written
    order.run(row, config, tmp_path, lines)
    assert lines.read()[1] == pytest.approx(last)
    text = order.table([*lines.read(), dict(last, seed=1, nll=9.0)])
    assert "| 0 | 1 | 2 | 0 | 1 | 2 |" in text, "two seeds are one row"
    assert "| - NLL |" in text
    assert "| all right, all held out (3) |" in text, "what the oracle sees, as these are shapes"
    assert "| filled lower | without lower | filled upper |" in text
