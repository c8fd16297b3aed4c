"""`python -m benchmarks.order [--minutes N] [--first N]`: in which order, how long and how regularised.

Trains the transformer of a preset on few pictures once per row, with one tokenizer and one judge for all of
them, and measures each net three times on its way: what is drawn of captions that training never saw, as the
judge sees it, and every figure by which a validation might choose. A line of `results/order.jsonl` is a net
at a step. Rows come by how much they tell; one that is there is not trained again, one that was killed goes
on from its checkpoint (in `build/order`), and `--table` tabulates what there is.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import commit, write
from model import steps
from model.config import RunConfig, SamplingConfig, load_config
from model.data.image_shards import index, pixels_of
from model.data.ingest import ingest
from model.evaluation import oracle
from model.evaluation.benchmark import (
    HELD_OUT,
    READ,
    SEARCH_SHIFT,
    SPLITS,
    Benchmark,
    Drawn,
    Pictures,
    look,
    spread,
    training_pictures,
)
from model.evaluation.measure import robustness, tokenizer_metrics
from model.evaluation.sheets import sheet
from model.inference.generate import Generator
from model.nets import metrics
from model.nets.clip import Judge, TextEncoder, load_judge, load_text_encoder
from model.nets.gpt import GPT, load_gpt
from model.nets.sampler import draw, guidance, noise_keys
from model.nets.tokenizers import Tokenizer, load_tokenizer
from model.plumbing import assets, cache, storage, worker
from model.plumbing.assets import Kind, Manifest
from model.plumbing.curves import HISTORY
from model.plumbing.processes import tie_to_parent
from model.plumbing.speech import Progress
from model.plumbing.stopping import Stopping
from model.training import transformer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
LOOKS = 3  # times that a net is measured, the last time at its end
SHARED: tuple[Kind, ...] = ("text", "judge", "tokenizer", "tokens")  # made once for all rows of some data
SHOWN = 12  # captions of a split on a sheet of samples
BEST_OF = 4  # draws of which the CLIP that reads captions keeps one, beside those that are kept as they come
LIKELY = 64  # pictures of a split of which each caption's likelihood is asked
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Line = dict[str, Any]  # a row's settings, the step, and figures


@dataclass(frozen=True)
class Setup:
    """What the rows of a data set have in common."""

    preset: str
    overrides: tuple[str, ...]
    seen: int  # pictures of each split that are measured on, at most
    samples: int  # drawn for each caption
    row: Mapping[str, Any]  # settings of its rows that are none of `Row`'s defaults
    needs_gpu: bool = False


SETUPS = {
    "openmoji": Setup(
        "openmoji-tiny",
        (
            "data.source.groups=[]",
            "data.source.limit=800",
            "data.validation_share=0.1",
            "clip.training.steps=400",
            "tokenizer.codebook_size=512",
            "transformer.optimizer=muon",
            "transformer.training.learning_rate=0.01",
            "transformer.training.compile=true",
        ),
        seen=128,
        samples=4,
        row={},
    ),
    "shapes": Setup("shapes-tiny", (), seen=256, samples=1, row={"steps": 4000, "dropout": 0.0, "views": 1}),
    # What takes a GPU: four times as many pictures, of 64 px, and a transformer of 30 times as many weights.
    "openmoji-64": Setup(
        "openmoji",
        ("sampling.temperature=0.7", "sampling.cfg_scale=1.5"),
        seen=256,
        samples=4,
        row={"steps": 3000, "dropout": 0.1},
        needs_gpu=True,
    ),
}


@dataclass(frozen=True)
class Row:
    """A training of the transformer, by what may differ."""

    data: str = "openmoji"
    order: float = 0.0  # transformer.random_order
    left: float = 0.0  # transformer.random_order_left
    steps: int = 2100
    dropout: float = 0.05
    views: int = 16
    seed: int = 0  # of the transformer alone

    @property
    def name(self) -> str:
        """What is other than in a plain row, and the seed."""
        plain = asdict(Row(data=self.data, **SETUPS[self.data].row))
        always = ("order", "steps", "seed")
        told = {name: value for name, value in asdict(self).items() if value != plain[name] or name in always}
        return f"{self.data}: {', '.join(f'{name} {value:g}' for name, value in told.items())}"

    @property
    def file(self) -> str:
        """The same as what files of it are called."""
        return self.name.replace(": ", "-").replace(", ", "-").replace(" ", "=")

    def config(self) -> RunConfig:
        """The preset with these settings."""
        setup = SETUPS[self.data]
        return load_config(
            setup.preset,
            [
                *setup.overrides,
                "jobs.processes_per_worker=1",
                f"seed={self.seed}",
                f"data.augment.views={self.views}",
                f"transformer.random_order={self.order}",
                f"transformer.random_order_left={self.left}",
                f"transformer.dropout={self.dropout}",
                "transformer.keep=last",
                f"transformer.training.steps={self.steps}",
                f"transformer.training.eval_every={-(-self.steps // LOOKS)}",
                "transformer.training.checkpoint_every=100",
            ],
        )


ORDERS = ({}, {"order": 0.5}, {"order": 0.9}, {"left": 1.0})


def plan() -> list[Row]:
    """All rows, in the order in which they are run: what tells most comes first."""

    def of(data: str = "openmoji", **settings: Any) -> Row:
        return Row(data=data, **{**SETUPS[data].row, **settings})

    rows = [of(steps=700, **order) for order in ORDERS]
    rows += [of(**order) for order in ORDERS]
    # Is it the order, or that it regularises?
    rows += [of(dropout=0.2), of(order=0.5, dropout=0.2), of(views=64), of(order=0.5, views=64)]
    rows += [of(seed=seed, **order) for seed in (1, 2) for order in ORDERS]
    rows += [of(steps=700, seed=seed, **order) for seed in (1, 2) for order in ORDERS]
    rows += [of("shapes", **order) for order in ({}, {"left": 1.0}, {"order": 0.5}, {"order": 0.9})]
    rows += [of(order=0.5, left=0.5), of(order=0.9, dropout=0.2), of(left=1.0, dropout=0.2)]
    rows += [of(order=0.5, steps=4200), of(order=0.5, steps=4200, dropout=0.2, views=64)]
    rows += [of(seed=seed, order=share, views=64) for seed in (1, 2) for share in (0.0, 0.5)]
    rows += [of(seed=seed, order=share, dropout=0.2) for seed in (1, 2) for share in (0.0, 0.5)]
    rows += [of(seed=seed, order=0.9, views=64) for seed in (0, 1, 2)]
    rows += [of("shapes", seed=seed, **order) for seed in (1, 2) for order in ORDERS]
    rows += [of("openmoji-64", **order) for order in ORDERS]
    rows += [of("openmoji-64", order=share, dropout=0.2) for share in (0.5, 0.9)]
    return [*dict.fromkeys(rows)]


def main() -> int:
    """Exit code 1 when a row failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.order", description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="rows trained side by side, a thread each")
    parser.add_argument("--minutes", type=float, default=0, help="until no more rows begin; 0: no limit")
    parser.add_argument("--first", type=int, default=0, help="so many rows of the plan; 0: all of them")
    parser.add_argument(
        "--data",
        choices=SETUPS,
        help="rows of this alone; by default of all that this machine has the means for",
    )
    parser.add_argument("--prepare", action="store_true", help="make what the first row shares, and end")
    parser.add_argument("--plan", action="store_true", help="list the rows, and which are there")
    parser.add_argument("--table", action="store_true", help="tabulate what there is")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "order", help="of assets and logs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the lines and the table")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    parser.add_argument("--make", choices=SHARED, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder = folder = arguments.folder.absolute()
    lines = Lines(arguments.out / "order.jsonl")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    os.environ["LATENT_GPT_STORE"] = str(folder)
    if arguments.row:
        tie_to_parent()
        row = Row(**json.loads(arguments.row))
        if arguments.make:
            shared(row, row.config(), folder, [arguments.make])
        else:
            run(row, row.config(), folder, lines)
        return 0
    able = [data for data, setup in SETUPS.items() if DEVICE.type == "cuda" or not setup.needs_gpu]
    rows = [row for row in plan() if row.data in ([arguments.data] if arguments.data else able)]
    rows = rows[: arguments.first or None]
    if arguments.plan:
        for number, row in enumerate(rows):
            print(number, row.name, "" if lines.has(row) else "(missing)")
        return 0
    failed = False
    if not arguments.table:
        prepare(rows[0], arguments)
        if not arguments.prepare:
            missing = [row for row in rows if not lines.has(row)]
            until = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
            failed = not all([*beside(missing, arguments, until)])  # all of them, also after one that failed
    if lines.read():
        write(arguments.out / "order.md", table(lines.read()))
        print((arguments.out / "order.md").read_text())
    return int(failed)


def command(row: Row, arguments: argparse.Namespace) -> list[str]:
    """What runs one row, in a process of its own."""
    places = ["--folder", str(arguments.folder), "--out", str(arguments.out)]
    return [sys.executable, "-m", "benchmarks.order", "--row", json.dumps(asdict(row)), *places]


def beside(rows: Sequence[Row], arguments: argparse.Namespace, until: float) -> Iterator[bool]:
    """Run rows, each in a process with one thread, some side by side; whether each went well."""

    def one(row: Row) -> bool:
        if time.monotonic() > until:
            print(f"left out: {row.name}", flush=True)
            return True
        began = time.monotonic()
        log = arguments.folder / "logs" / f"{row.file}.log"
        with log.open("a") as out:
            alone = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.call(command(row, arguments), cwd=ROOT, env=alone, stdout=out, stderr=out)
        ended = f"FAILED with status {code}, see {log}" if code else "done"
        print(f"{row.name}: {ended} after {time.monotonic() - began:.0f} s", flush=True)
        return code == 0

    with ThreadPoolExecutor(arguments.workers) as pool:
        yield from pool.map(one, rows)


class Lines:
    """The file of lines, that several processes add to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Line]:
        """All lines."""
        return [json.loads(text) for text in self.path.read_text().splitlines()] if self.path.exists() else []

    def has(self, row: Row, step: int = -1) -> bool:
        """Whether the line of a row's step is there; by default of its last one."""
        wanted = asdict(row) | {"step": row.steps if step < 0 else step}
        return any(wanted.items() <= line.items() for line in self.read())

    def add(self, line: Line) -> None:
        """Add a line, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path) as file:
            file.write(json.dumps(line) + "\n")
            file.flush()


@contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    """A file to add to, alone, also among processes."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


# ── a row ───────────────────────────────────────────────────────────────────────────────────────────────


def prepare(row: Row, arguments: argparse.Namespace) -> None:
    """Make what rows of its data share: side by side on a GPU, else one after the other with all cores."""
    if DEVICE.type == "cuda":
        apart = [
            subprocess.Popen([*command(row, arguments), "--make", kind], cwd=ROOT) for kind in SHARED[:-1]
        ]
        codes = [process.wait() for process in apart]
        if any(codes):
            raise SystemExit(1)
    shared(row, row.config(), arguments.folder)


def shared(row: Row, config: RunConfig, folder: Path, kinds: Sequence[Kind] = SHARED) -> dict[str, Manifest]:
    """What rows of the same data have in common, made where it is missing; of seed 0, whatever theirs."""
    config = config.model_copy(update={"seed": 0})
    made: dict[str, Manifest] = {}
    with locked(folder / f"{row.data}-images.lock"):
        images = steps.writer("images", config, {})
        made["images"] = assets.find(images.uri) or ingest(config.data, images)
    for kind in kinds:
        spec = steps.job(kind, config, "order", {name: made[name] for name in steps.STEPS[kind].needs})
        with locked(folder / f"{row.data}-{kind}.lock"):
            manifest = worker.run(spec, importlib.import_module(spec.module).main, track=False)
        assert manifest
        made[kind] = manifest
    return made


def run(row: Row, config: RunConfig, folder: Path, lines: Lines) -> None:
    """Train a row and add its lines; one that is trained already is measured alone."""
    made = shared(row, config, folder)
    measuring = Measuring(row, config, made, folder)
    assert config.transformer

    def watch(gpt: GPT, step: int, figures: Mapping[str, float]) -> None:
        if not lines.has(row, step):
            measured = measuring.figures(gpt, figures["temperature"] if step == row.steps else None)
            lines.add(measuring.line(step) | dict(figures) | measured)

    inputs = {name: made[name] for name in steps.STEPS["transformer"].needs}
    spec = steps.job("transformer", config, "order", inputs)
    if found := assets.find(spec.output):
        curves = json.loads(storage.read_bytes(storage.join(found.uri, HISTORY)))
        names = {name for name in curves if name.startswith("validation/")}
        figures = {name.removeprefix("validation/"): curves[name][-1][1] for name in names}
        watch(load_gpt(cache.folder(found), DEVICE), row.steps, figures)
        return
    with worker.open_job(spec, track=False, stopping=Stopping().listen()) as job:
        transformer.train(job, config.transformer, watch)


class Measuring:
    """What is measured of the nets of a row."""

    def __init__(self, row: Row, config: RunConfig, made: Mapping[str, Manifest], folder: Path) -> None:
        self.row, self.config, self.folder, self.setup = row, config, folder, SETUPS[row.data]
        self.tokenizer: Tokenizer = load_tokenizer(cache.folder(made["tokenizer"]), DEVICE)
        self.text: TextEncoder = load_text_encoder(cache.folder(made["text"]), DEVICE)
        self.judge = load_judge(cache.folder(made["judge"]), DEVICE)
        self.reader = load_judge(cache.folder(made["text"]), DEVICE)  # which saw training pictures alone
        self.benchmark = measured_on(config, made["images"], self.setup.seen)
        self.training = training_pictures(made["images"])

    def line(self, step: int) -> Line:
        """How the line of a step begins."""
        return asdict(self.row) | {"step": step, "commit": commit(), "device": _device()}

    def drawn(self, gpt: GPT) -> Drawn:
        """What a net makes of the pictures."""
        generator = Generator(self.tokenizer, self.text, gpt, lambda: self.reader, self.config.sampling)
        silent = Progress("order", 0, "img", enabled=False)
        return Drawn(generator, self.judge, self.benchmark, self.training, silent)

    @torch.no_grad()
    def figures(self, gpt: GPT, last: float | None) -> dict[str, float]:
        """Of captions and combinations held out; at the last step of captions seen as well, of the best of
        several draws, of the tokenizer, of pictures that are half hidden, and of those drawn by a net that is
        as sure as it should be: then `last` is the temperature that fits its likelihoods."""
        training, sampling = gpt.training, self.config.sampling
        drawn, found = self.drawn(gpt.eval()), dict[str, float]()
        for split in (split for split in self.benchmark.splits if last or split in HELD_OUT):
            images = self._draw(drawn, split, sampling)
            of = self._drawn(drawn, split, images)
            if split in HELD_OUT:
                of |= likelihood(gpt, self.text, drawn.codes[split][:LIKELY], self._captions(split)[:LIKELY])
            if last:
                several = sampling.model_copy(update={"best_of": BEST_OF})
                of |= self._seen("best_of", self._draw(drawn, split, several), split)
                of |= self._seen("real", drawn.real(split)[None], split)
                of |= self._seen("reconstructed", drawn.reconstructed[split][None], split)
                self._show(drawn, split, images)
            if last and split in HELD_OUT:
                fitted = sampling.model_copy(update={"temperature": last * sampling.temperature})
                of |= self._seen("fitted", self._draw(drawn, split, fitted), split)
                of |= self._filled(drawn, split)
            found |= {f"{split}/{name}": value for name, value in of.items()}
        found |= tokenizer_metrics(drawn) | robustness(drawn) if last else {}
        gpt.train(training)
        return found

    def _captions(self, split: str) -> list[str]:
        return self.benchmark.splits[split].captions

    def _draw(self, drawn: Drawn, split: str, sampling: SamplingConfig) -> Tensor:
        """Several samples of each caption: (samples, N, 3, H, W)."""
        chosen, several = self.benchmark.splits[split], self.setup.samples
        seeds = [1000 * sample + seed for sample in range(several) for seed in chosen.seeds]
        images = drawn.generator.draw(chosen.captions * several, seeds, sampling).cpu()
        return images.unflatten(0, (several, -1))

    def _drawn(self, drawn: Drawn, split: str, images: Tensor) -> dict[str, float]:
        """What the judge and the reader see in samples, and how many are copies."""
        found = self._seen("", images, split)
        found |= seen_by(self.reader, images, self._captions(split), "reader_")
        near = drawn.nearest_to(images.flatten(0, 1)).distance
        return found | {
            "near_duplicates": metrics.near_duplicate_share(near),
            "pictures": len(self._captions(split)),
        }

    def _show(self, drawn: Drawn, split: str, images: Tensor) -> None:
        """Leave a sheet to look at: of some captions what the tokenizer leaves of the real picture, and
        samples."""
        some = spread(images.shape[1], SHOWN)
        rows = torch.cat([drawn.reconstructed[split][None], images])[:, some].transpose(0, 1)
        path = self.folder / "sheets" / f"{self.row.file}-{split}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(sheet(rows, [self._captions(split)[place] for place in some]))

    def _seen(self, what: str, images: Tensor, split: str) -> dict[str, float]:
        """What the judge, and the oracle where there is one, sees in pictures (samples, N, 3, H, W) of each
        caption: means over the samples."""
        suffix = f"_{what}" if what else ""
        found = seen_by(self.judge, images, self._captions(split))
        if self.benchmark.shapes:
            scenes = self.benchmark.scenes(split) * len(images)
            found["all_right"] = oracle.oracle_score(images.flatten(0, 1), scenes)["all_right"]
        return {f"{name}{suffix}": value for name, value in found.items()}

    def _filled(self, drawn: Drawn, split: str) -> dict[str, float]:
        """Real pictures of which half is hidden and drawn again, beside what is left of them alone."""
        gpt, chosen, codes = drawn.generator.gpt, self.benchmark.splits[split], drawn.codes[split].to(DEVICE)
        text = self.text.encode(self.text.tokenize(chosen.captions))
        found: dict[str, float] = {}
        for name, hidden in halves(gpt.grid).items():
            if name != "lower" and not self.row.left:  # raster order has what is above, and nothing else
                continue
            filled = fill(gpt, codes, hidden, *text, self.config.sampling, chosen.seeds)
            images = self.tokenizer.decode(filled.view(-1, *gpt.grid)).cpu()
            found |= self._seen(f"filled_{name}", images[None], split)
            place = hidden.view(gpt.grid).repeat_interleave(self.tokenizer.factor, 0)
            place = place.repeat_interleave(self.tokenizer.factor, 1)
            alone = drawn.reconstructed[split].masked_fill(place, 1.0)  # white
            found |= self._seen(f"without_{name}", alone[None], split)
        return found


def _device() -> str:
    return torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "CPU"


def measured_on(config: RunConfig, images: Manifest, wanted: int) -> Benchmark:
    """Pictures of each split at even distances, each with its first caption. Unlike a run's benchmark it has
    those captions, too, that are set apart for sweeps: there are few, and nothing is chosen by them here."""
    splits = {}
    for number, split in enumerate(SPLITS):
        entries = index(images, split, READ)
        entries = [entries[place] for place in spread(len(entries), wanted)]
        seeds = range(100_000 * number, 100_000 * number + len(entries))
        splits[split] = Pictures(
            pixels_of(images, entries), [entry.captions[0] for entry in entries], list(seeds)
        )
    moves = config.data.augment
    return Benchmark(
        key="",
        splits=splits,
        image_size=images.info["image_size"],
        shapes=config.data.source.kind == "shapes",
        shift=SEARCH_SHIFT if moves.shift > 0 or moves.scale > 0 else 0,
        flip=moves.flip,
    )


def seen_by(judge: Judge, images: Tensor, captions: Sequence[str], who: str = "") -> dict[str, float]:
    """Retrieval accuracy and CLIP score of pictures (samples, N, 3, H, W): means over the samples."""
    text = judge.text_features(captions)
    features = [look(judge, part) for part in images]
    right = [metrics.retrieval_accuracy(one, text, captions) for one in features]
    scores = [float(metrics.clip_score(one, text).mean()) for one in features]
    return {f"{who}retrieval": statistics.mean(right), f"{who}clip_score": statistics.mean(scores)}


@torch.no_grad()
def likelihood(gpt: GPT, text: TextEncoder, codes: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Of each picture given every caption: the share of pictures (N, T) that their own one makes likeliest,
    and by how many nats per token it does beside the mean of the others."""
    states, mask = text.encode(text.tokenize(captions))
    codes, columns = codes.to(states.device), []
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=gpt.config.training.precision == "bf16"):
        for one in range(len(captions)):
            told = states[one].expand(len(codes), -1, -1), mask[one].expand(len(codes), -1)
            columns.append(metrics.token_nll(gpt.forward(codes, *told), codes))
    nll = torch.stack(columns, dim=1)  # (N, N): picture, caption
    own = nll.diagonal()
    best = nll.argmin(1).tolist()
    right = [captions[found] == captions[asked] for asked, found in enumerate(best)]
    others = (nll.sum(1) - own) / (len(captions) - 1)
    return {
        "likelihood_retrieval": sum(right) / len(right),
        "likelihood_gain": float((others - own).mean()),
    }


# ── a half that is hidden ───────────────────────────────────────────────────────────────────────────────


def halves(grid: tuple[int, int]) -> dict[str, Tensor]:
    """Halves of a grid that may be hidden: bool (T,), True where it is."""
    row, column = torch.arange(grid[0])[:, None].expand(grid), torch.arange(grid[1]).expand(grid)
    low, right = (row >= grid[0] // 2).flatten(), (column >= grid[1] // 2).flatten()
    mixed = torch.randperm(len(low), generator=torch.Generator().manual_seed(0)) < len(low) // 2
    return {"lower": low, "upper": ~low, "left": ~right, "right": right, "scattered": mixed}


@torch.no_grad()
def fill(
    gpt: GPT,
    codes: Tensor,
    hidden: Tensor,
    text: Tensor,
    text_mask: Tensor,
    config: SamplingConfig,
    seeds: Sequence[int],
) -> Tensor:
    """Codes (B, T) with those that are hidden, bool (T,), drawn again given all others, in raster order.

    What is seen comes first in the order, which a net has to have learned for that: one of raster order has
    for the lower half alone. No keys are cached, as the transformer takes an order for a whole sequence only.
    """
    device = codes.device
    order = torch.cat([(~hidden).nonzero()[:, 0], hidden.nonzero()[:, 0]]).to(device)
    sequence = codes[:, order]  # a copy
    B, T = sequence.shape
    drop = torch.arange(2 * B, device=device) >= B
    context = gpt.read(torch.cat([text, text]), torch.cat([text_mask, text_mask]), drop)
    start, seed = codes.new_full((B, 1), gpt.vocabulary), torch.tensor(list(seeds), device=device)
    scales, keys = guidance(config, T), noise_keys(gpt.vocabulary, device)
    for at in range(int((~hidden).sum()), T):
        inputs = torch.cat([start, sequence[:, :at]], dim=1)
        logits = gpt.decode(torch.cat([inputs, inputs]), context, order[: at + 1])[:, -1].float()
        with_text, without = logits.chunk(2)
        sequence[:, at] = draw(torch.lerp(without, with_text, scales[at]), config, seed, at, keys)
    return torch.empty_like(sequence).scatter(1, order.expand(B, -1), sequence)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────


def _held_out(line: Line, figure: str) -> float:
    """A figure over captions and combinations held out together."""
    sizes = [line[f"{split}/pictures"] for split in HELD_OUT]
    values = [line[f"{split}/{figure}"] for split in HELD_OUT]
    return sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)


Columns = Mapping[str, tuple[str, float]]  # of a row: figure, and what it is shown times
HIDDEN = tuple(halves((2, 2)))
FILLED: Columns = {
    f"{what} {half}": (f"validation/retrieval_{what}_{half}", 100)
    for half in HIDDEN
    for what in ("filled", "without")
} | {f"all right, {half}": (f"composition/all_right_filled_{half}", 100) for half in HIDDEN}
TARGETS: dict[str, Callable[[Line], float]] = {
    "retrieval, captions": lambda line: line["validation/retrieval"],
    "retrieval, all held out": lambda line: _held_out(line, "retrieval"),
    "CLIP score, all held out": lambda line: _held_out(line, "clip_score"),
    "all right, all held out": lambda line: _held_out(line, "all_right"),  # by the oracle, of shapes alone
}
CANDIDATES: dict[str, Callable[[Line], float]] = {  # of a validation: more is meant to be better
    "what training goes by": transformer.worth,
    "- NLL": lambda line: -line["nll"],
    "- NLL, fitted": lambda line: -line["nll_fitted"],
    "- temperature": lambda line: -line["temperature"],
    "text gain": lambda line: line["text_gain"],
    "text gain / temperature": lambda line: line["text_gain"] / line["temperature"],
    "text gain / NLL": lambda line: line["text_gain"] / line["nll"],
    "NLL without text - NLL": lambda line: line["nll_unconditional"] - line["nll"],
    "likelihood gain, all captions": lambda line: line["validation/likelihood_gain"],
    "retrieval by likelihood": lambda line: line["validation/likelihood_retrieval"],
    "CLIP score by the reader": lambda line: line["validation/reader_clip_score"],
    "retrieval by the reader": lambda line: line["validation/reader_retrieval"],
}
COLUMNS: Columns = {
    "seen": ("train/retrieval", 100),
    "held out": ("validation/retrieval", 100),
    "combinations": ("composition/retrieval", 100),
    "all right": ("composition/all_right", 100),
    f"seen, best of {BEST_OF}": ("train/retrieval_best_of", 100),
    f"held out, best of {BEST_OF}": ("validation/retrieval_best_of", 100),
    f"combinations, best of {BEST_OF}": ("composition/retrieval_best_of", 100),
    "held out, calibrated": ("validation/retrieval_fitted", 100),
    "combinations, calibrated": ("composition/retrieval_fitted", 100),
    "CLIP held out": ("validation/clip_score", 1),
    "NLL": ("nll", 1),
    "others' captions": ("nll_shuffled", 1),
    "fitted": ("nll_fitted", 1),
    "temperature": ("temperature", 1),
    "by likelihood": ("validation/likelihood_retrieval", 100),
    "copies seen": ("train/near_duplicates", 100),
    "copies held out": ("validation/near_duplicates", 100),
    "filled lower": ("validation/retrieval_filled_lower", 100),
}


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; NaN where nothing varies."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[which]

    a, b = ranks(one), ranks(other)
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def table(lines: Sequence[Line]) -> str:
    """Rows with mean ± standard deviation over their seeds, and the correlations, for people."""
    settings = [one.name for one in fields(Row) if one.name not in ("seed", "data")]
    text = []
    for data in dict.fromkeys(line["data"] for line in lines):
        of = [line for line in lines if line["data"] == data]
        last = [line for line in of if line["step"] == line["steps"]]
        text += [f"## {data}", "", *_rows(last, settings, COLUMNS), ""]
        if len(of) > 2:
            text += [*_correlations(of), ""]
        if free := [line for line in last if line["left"]]:
            text += [
                "Real pictures of which half is hidden: what fills it, and what is left without:",
                "",
            ]
            text += [*_rows(free, settings, FILLED), ""]
        if last:
            ceilings = {split: last[0][f"{split}/retrieval_real"] for split in SPLITS}
            told = ", ".join(f"{split} {share:.1%}" for split, share in ceilings.items())
            text += [f"Real pictures: {told}; CLIP score {last[0]['validation/clip_score_real']:.1f}.", ""]
    return "\n".join(text) + "\n"


def _rows(last: Sequence[Line], settings: Sequence[str], columns: Columns) -> list[str]:
    """A row for each setting that there is a last line of, over its seeds."""
    shown = {title: of for title, of in columns.items() if any(of[0] in line for line in last)}
    head = [*settings, "seeds", *shown]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key in dict.fromkeys(tuple(line[name] for name in settings) for line in last):
        same = [line for line in last if tuple(line[name] for name in settings) == key]
        cells = [f"{value:g}" for value in key] + [str(len(same))]
        for figure, times in shown.values():
            values = [times * line[figure] for line in same if figure in line]
            spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}" if values else "")
        text.append("| " + " | ".join(cells) + " |")
    return text


def _correlations(lines: Sequence[Line]) -> list[str]:
    """Spearman's, over all lines and over those of last steps."""
    last = [line for line in lines if line["step"] == line["steps"]]
    drawn_right = all("validation/all_right" in line for line in lines)
    targets = {name: of for name, of in TARGETS.items() if drawn_right or "all right" not in name}
    head = [f"{target} ({len(some)})" for target in targets for some in (lines, last)]
    text = ["Rank correlation with what is drawn, over all steps that were measured, and over last ones:", ""]
    text += ["| figure | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    for name, figure in CANDIDATES.items():
        found = [spearman([*map(figure, some)], [*map(target, some)])
                 for target in targets.values() for some in (lines, last)]  # fmt: skip
        text.append(f"| {name} | " + " | ".join(f"{value:+.2f}" for value in found) + " |")
    return text


if __name__ == "__main__":
    sys.exit(main())
