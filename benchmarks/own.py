"""`python -m benchmarks.own [--rows 60,300] [--minutes N] [--make-only]`: people's own pictures, by one dial.

Each row is a folder of `benchmarks.pictures` and one command, `latent-gpt run --data FOLDER --minutes N`, in
a state folder of its own. `shapes` is the drawn shapes as such a folder, and `shapes-tiny` the preset that is
tuned by hand for them, which comes first, as it says how many minutes both have: they draw the same
combinations that training never saw, and the oracle reads them. The table goes to `results/own.md` and
`own.json`; a row that is run again replaces what was there of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import pictures
from benchmarks.harness import IDLE, commit, others, write
from components.registration import Registered
from model.config import RunConfig, VQVAEConfig, parse_config

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SERVICES = ("S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "LATENT_GPT_STORE", "LATENT_GPT_CACHE")
COLLECTIONS = {60: 5, 300: 10, 3000: 25, 30000: 60}  # pictures -> minutes
FLAGS_MINUTES = 10
PRESET, PRESET_PICTURES, PRESET_MINUTES = "shapes-tiny", 80000, 25
PROMPTS = 512  # held-out combinations that are drawn and read
WITHIN = 0.2  # of the minutes that were asked for
POINTS = 0.05  # by which shapes as a folder may be less often all right than the preset
FIGURES = (  # of a run, where it has them
    "validation/psnr",
    "train/psnr",
    "codebook_use",
    "train/retrieval",
    "train/retrieval_chance",
    "validation/retrieval",
    "validation/retrieval_chance",
    "train/near_duplicates",
    "validation/near_duplicates",
    "composition/oracle_all_right",
)


@dataclass
class Row:
    """A run, as the table has it; seconds and minutes of the wall clock."""

    name: str
    pictures: int  # files that are called pictures
    asked: float  # minutes; 0: as many as the preset takes
    usable: int = 0  # as they were made
    taken: int = 0  # that the run trained and measured on
    minutes: float = 0.0
    sizes: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    all_right: float | None = None  # of held-out combinations of shapes, by the oracle
    verdict: str = ""
    note: str = ""  # how a run that failed ended
    others: float = 0.0  # cores that others kept busy before
    measured: str = ""
    commit: str = ""


@dataclass(frozen=True)
class Work:
    """What a row runs."""

    pictures: int
    minutes: float
    make: Callable[[Path], None] | None = None  # fills the folder; None: a preset's pictures
    usable: int = 0
    shapes: bool = False


def offered(side: int, shapes: int) -> dict[str, Work]:
    """All rows, in the order in which they are run.

    Args:
        side: of the drawn shapes, pixels.
        shapes: how many of them.
    """
    rows = {
        str(count): Work(count, minutes, partial(pictures.collection, count=count), pictures.usable(count))
        for count, minutes in COLLECTIONS.items()
    }
    rows["flags"] = Work(0, FLAGS_MINUTES, pictures.flags)
    rows[PRESET] = Work(PRESET_PICTURES, 0, shapes=True)
    draw = partial(pictures.shapes, count=shapes, side=side)
    rows["shapes"] = Work(shapes, PRESET_MINUTES, draw, shapes, shapes=True)
    return rows


def main() -> int:
    """Exit code 1 when a run failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="names of rows, e.g. 60,300,flags; all by default")
    parser.add_argument("--minutes", type=float, default=0, help="of every row but the preset's")
    parser.add_argument("--make-only", action="store_true", help="the folders alone")
    parser.add_argument("--side", type=int, default=32, help="of the drawn shapes, pixels")
    parser.add_argument("--shapes", type=int, default=PRESET_PICTURES, help="how many of them")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "own", help="of pictures and states")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    parser.add_argument("--read", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(all_right(arguments.read)))
        return 0
    rows = offered(arguments.side, arguments.shapes)
    wanted = arguments.rows.split(",") if arguments.rows else list(rows)
    if unknown := [name for name in wanted if name not in rows]:
        parser.error(f"--rows: there is no row {unknown[0]}; choose from {', '.join(rows)}")
    table = Table(arguments.out)
    failed = False
    for name in (name for name in rows if name in wanted):
        drawn = f"-{arguments.shapes}-{arguments.side}" if name == "shapes" else ""
        work, data = rows[name], arguments.folder / "pictures" / f"{name}{drawn}"
        if work.make:
            start = time.monotonic()
            pictures.made(data, work.make)
            print(f"{name}: {data}, in {time.monotonic() - start:.0f} s", flush=True)
        if arguments.make_only:
            continue
        minutes = arguments.minutes or work.minutes
        if name == "shapes" and not arguments.minutes:
            minutes = table.minutes(PRESET) or minutes
        row = measured(name, work, data, minutes if work.make else 0, arguments.folder / "states" / name)
        table.add(row)
        failed |= bool(row.note)
    if not arguments.make_only:
        print(table.markdown())
    return int(failed)


# ── a run ───────────────────────────────────────────────────────────────────────────────────────────────


def measured(name: str, work: Work, data: Path, minutes: float, state: Path) -> Row:
    """Run a row in a state folder that is new, and say what came of it.

    Args:
        name: of the row.
        work: what it is.
        data: folder of pictures, where the row has one.
        minutes: that the run may take; 0: it is a preset's.
        state: folder; what lay there of an earlier run goes.
    """
    shutil.rmtree(state, ignore_errors=True)
    count = work.pictures or sum(path.suffix != ".txt" for path in data.rglob("*.*"))
    row = Row(name, count, minutes, work.usable or count, others=round(others(), 1), commit=commit())
    row.measured = datetime.date.today().isoformat()
    told = ["--data", str(data), "--minutes", f"{minutes:g}"] if minutes else ["--preset", name]
    start = time.monotonic()
    code, last = latent_gpt(["run", *told], state)
    row.minutes = round((time.monotonic() - start) / 60, 2)
    if code:
        row.note = f"FAILED with status {code}: {last}"[:300]
        return row
    try:
        registered = read(max((state / "runs").iterdir()), row)
        row.all_right = drawn_right(state, registered) if work.shapes else None
    except Exception as error:  # the rows after it go on
        traceback.print_exc()
        row.note = f"FAILED: {type(error).__name__}: {error}"[:300]
    return row


def drawn_right(state: Path, registered: Registered) -> float:
    """`all_right` of a state folder's model, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.own", "--read", f"{registered.model}/{registered.version}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(state), check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout.splitlines()[-1])


def environment(state: Path) -> dict[str, str]:
    """Ours without services, so that those of the state folder are used."""
    plain = {name: value for name, value in os.environ.items() if name not in SERVICES}
    return plain | {"LATENT_GPT_STATE": str(state), "PYTHONUNBUFFERED": "1"}


def latent_gpt(arguments: Sequence[str], state: Path) -> tuple[int, str]:
    """Run the command line, print what it says; its status and its last words."""
    command, last = [sys.executable, "-m", "pipelines.cli", *arguments], ""
    print(f"latent-gpt {' '.join(arguments)}", flush=True)
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(state), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout
        for line in run.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
        return run.wait(), last


def read(folder: Path, row: Row) -> Registered:
    """Fill in what a run left in its folder: its config, its pictures, its figures."""

    def left(step: str, name: str) -> Path:
        return next(folder.glob(f"kfp/*/{step}/{name}"))

    config = parse_config(left("prepare", "config").read_text())
    outputs = json.loads(left("images", "executor_output.json").read_text())["artifacts"]
    images = outputs["images"]["artifacts"][0]["metadata"]
    row.taken = int(sum(images.get(split, 0) for split in ("train", "validation", "composition")))
    output = json.loads(left("register", "executor_output.json").read_text())["parameterValues"]["Output"]
    registered = Registered.model_validate_json(output)
    ours = {name: pair[0] for name, pair in registered.verdict.columns.items()}
    row.figures = {name: round(float(ours[name]), 4) for name in FIGURES if ours.get(name) is not None}
    outputs = json.loads(left("transformer", "executor_output.json").read_text())["artifacts"]
    row.sizes = sizes(config, outputs["transformer"]["artifacts"][0]["metadata"].get("steps"))
    row.verdict = registered.verdict.outcome
    return registered


def sizes(config: RunConfig, steps: int | None) -> str:
    """What was chosen, in few words.

    Args:
        config: of the run.
        steps: of the transformer, where they were fitted to the time.
    """
    side, said = config.data.image_size, [f"{config.data.image_size} px"]
    if isinstance(config.tokenizer, VQVAEConfig):
        tokenizer = config.tokenizer
        grid = side // tokenizer.factor
        said.append(f"{grid} x {grid} of {tokenizer.codebook_size} codes, {tokenizer.training.steps:,} steps")
    if config.transformer:
        gpt = config.transformer
        said.append(f"transformer {gpt.depth} x {gpt.width}, {steps or gpt.training.steps:,} steps")
    return "; ".join(said)


def all_right(version: str) -> float:
    """The share of held-out combinations that a model (NAME/VERSION) of this state folder draws all right."""
    from model.evaluation.oracle import oracle_score
    from model.inference.generate import Generator
    from model.plumbing import registry
    from pipelines.embedded.services import services
    from pipelines.run import state_folder

    with services(state_folder()):
        generator = Generator.load(registry.resolve(f"models:/{version}"), pictures=PROMPTS)
    scenes = pictures.held_out(PROMPTS)
    images = generator.draw([scene.caption() for scene in scenes], range(len(scenes)))
    return oracle_score(images, scenes)["all_right"]


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────


class Table:
    """The rows so far, as JSON and Markdown in a folder; both are written with every row."""

    def __init__(self, folder: Path) -> None:
        self._json, self._markdown = folder / "own.json", folder / "own.md"
        self.rows: dict[str, Row] = {}
        if self._json.exists():
            self.rows = {row["name"]: Row(**row) for row in json.loads(self._json.read_text())["rows"]}

    def add(self, row: Row) -> None:
        """Put a row in the place of an earlier one of its name."""
        self.rows[row.name] = row
        self._json.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": {"cores": os.cpu_count()}, "rows": [asdict(one) for one in self._sorted()]}
        write(self._json, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        write(self._markdown, self.markdown())

    def minutes(self, name: str) -> float:
        """What a row took, in minutes; 0: it is not there, or failed."""
        row = self.rows.get(name)
        return round(row.minutes, 1) if row and not row.note else 0.0

    def _sorted(self) -> list[Row]:
        known = list(offered(1, 1))
        return sorted(self.rows.values(), key=lambda row: known.index(row.name))

    def markdown(self) -> str:
        """The table for people."""
        head = ["Pictures", "used", "Minutes asked", "taken", "Ratio", "Chosen", "PSNR", "Codes used"]
        head += ["Retrieval, seen", "held out", "Near-duplicates, seen", "held out"]
        lines = [
            f"{os.cpu_count()} cores; minutes from the command to its end, installation not counted.",
            "",
        ]
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(self._cells(row)) + " |" for row in self._sorted()]
        shown = {row.name: row.all_right for row in self._sorted() if row.all_right is not None}
        if shown:
            said = ", ".join(f"`{name}` {share:.1%}" for name, share in shown.items())
            lines += ["", f"All right, of {PROMPTS} combinations that training never saw: {said}."]
        if shown.keys() >= {"shapes", PRESET}:
            within = shown["shapes"] >= shown[PRESET] - POINTS
            lines.append(f"Within {POINTS:.0%} of the preset: {'yes' if within else '**no**'}.")
        return "\n".join(lines) + "\n"

    @staticmethod
    def _cells(row: Row) -> list[str]:
        figures = row.figures
        busy = f" (others kept {row.others} cores busy)" if row.others > IDLE else ""
        count = row.name if row.name == str(row.pictures) else f"{row.pictures:,}, {row.name}"
        cells = [count, f"{row.taken:,} of {row.usable:,}", f"{row.asked:g}" if row.asked else ""]
        if row.note:
            note = row.note.replace("|", "\\|").replace("\n", " ")
            return [*cells, f"{row.minutes:g}", "", note, *[""] * 6]
        ratio = row.minutes / row.asked if row.asked else 0.0
        within = "" if abs(ratio - 1) <= WITHIN else " **(beyond)**"
        cells += [f"{row.minutes:g}{busy}", f"{ratio:.2f}{within}" if ratio else "", row.sizes]
        psnr = figures.get("validation/psnr", figures.get("train/psnr"))
        cells += [f"{psnr:.1f} dB" if psnr is not None else "", _share(figures, "codebook_use")]
        for split in ("train", "validation"):
            found = _share(figures, f"{split}/retrieval")
            cells.append(f"{found} (chance {_share(figures, f'{split}/retrieval_chance')})" if found else "")
        cells += [_share(figures, f"{split}/near_duplicates") for split in ("train", "validation")]
        return cells


def _share(figures: Mapping[str, Any], name: str) -> str:
    return f"{figures[name]:.1%}" if name in figures else ""


if __name__ == "__main__":
    sys.exit(main())
