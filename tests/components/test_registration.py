"""Which version is in use: fake evaluations of real tiny models, the real MLflow, the real S3.

What is measured is said by the test: evaluations and measurements are written as their jobs would. One test
has the real job measure.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components import registration
from components.registration import Registered, register_model
from model import steps
from model.config import RunConfig
from model.errors import UserError
from model.evaluation.benchmark import load_benchmark, make_benchmark
from model.inference import serving
from model.inference.bundle import make_bundle
from model.inference.generate import Generator
from model.plumbing import assets, cache, leases, registry, storage, uses
from model.plumbing.assets import AssetWriter, Manifest
from model.plumbing.jobs import TrackingIds
from model.plumbing.registry import Aliases
from model.plumbing.tracking import mlflow_client
from pipelines.commands import evaluate
from tests.instances import config, ingest, publish_models
from tests.plumbing.test_registry import log_model as log_echo

pytestmark = pytest.mark.slow

NAN = float("nan")
GATE = {"margin": 0.4, "more_near_duplicates": 0.3}
SPLITS = ("train", "validation", "composition")
FIGURES = {
    f"{split}/{name}": value
    for split in SPLITS
    for name, value in (
        ("bits_per_token", 3.0),
        ("psnr", 20.0),
        ("diversity", 0.8),
        ("near_duplicates", 0.1),
    )
} | {"bundle_bytes": 1e5}


@dataclass(frozen=True)
class Made:
    """A run as far as its evaluation."""

    run: RunConfig
    evaluation: Manifest


@dataclass
class Bench:
    """Makes runs of one registered model."""

    folder: Path
    name: str = field(default_factory=lambda: f"model-{uuid.uuid4().hex[:8]}")
    published: dict[tuple[int, str], dict[str, Manifest]] = field(default_factory=dict)  # by seed and images

    def make(
        self,
        seed: int,
        score: float = 1.0,
        figures: dict[str, float] | None = None,
        without: str = "",
        judge: int = 0,
        tokenizer: int = 0,
        scores: list[float] | None = None,
        **changes: object,
    ) -> Made:
        """A run whose model has random weights, and whose evaluation says what the test wants.

        Args:
            seed: of the weights.
            score: of every prompt.
            figures: others than the usual.
            without: a figure, or "scores", that is missing.
            judge: seed of the judge: with another one the benchmark is another one, too.
            tokenizer: seed of the tokenizer.
            scores: of the prompts of each split, in place of `score`.
            changes: to the config.
        """
        run = config(**{"model_name": self.name, "gate": GATE, **changes})
        images = ingest(run.data)
        parts = dict(self.models(seed, run, images))
        parts["judge"] = self.models(judge, run, images)["judge"]
        parts["tokenizer"] = self.models(tokenizer, run, images)["tokenizer"]
        benchmark = make_benchmark(run, images, parts["judge"])
        given = {"images": images, "model": make_bundle(run, parts), "benchmark": benchmark}
        version = steps.STEPS["evaluation"].version
        writer = AssetWriter("evaluation", {"seed": seed, "name": self.name}, given, version)
        writer.add_bytes("report.html", b"<html><main>report</main></html>")
        headline = {
            "headline": [["90.0 %", "retrieval accuracy", "3.1 % by chance"]],
            "headline_of": "captions held out",
        }
        made = writer.finish(headline)
        return Made(run, rewritten(made, headline | info(benchmark, score, figures, without, scores)))

    def models(self, seed: int, run: RunConfig, images: Manifest) -> dict[str, Manifest]:
        """Parts with random weights, made once."""
        which = (seed, images.sha256)
        if which not in self.published:
            self.published[which] = publish_models(self.folder / str(seed), run, images, seed)
        return self.published[which]

    def aliases(self) -> Aliases:
        return registry.aliases(self.name)

    def verdict(self, version: int) -> dict[str, str]:
        return {
            name.removeprefix(registry.VERDICT_TAG).removeprefix("."): value
            for name, value in registry.tags_of(version, self.name).items()
            if name.startswith(registry.VERDICT_TAG)
        }


def info(
    benchmark: Manifest,
    score: float,
    figures: dict[str, float] | None = None,
    without: str = "",
    scores: list[float] | None = None,
) -> dict[str, Any]:
    """What a model was measured to."""
    counts = {split: len(one.captions) for split, one in load_benchmark(benchmark).splits.items()}
    known = {name: value for name, value in (FIGURES | (figures or {})).items() if name != without}
    oracle = {split: (scores or [score] * count)[:count] for split, count in counts.items()}
    return {
        "benchmark": benchmark.key,
        "figures": known,
        "scores": {} if without == "scores" else {"oracle": oracle, "retrieval": oracle},
        "chance": {"retrieval": dict.fromkeys(counts, 0.2)},
    }


def rewritten(manifest: Manifest, said: dict[str, Any]) -> Manifest:
    """The asset with another `info`, which no hash knows of, even one that no writer would take."""
    values = {**json.loads(manifest.text), "info": said}
    storage.write_bytes(storage.join(manifest.uri, assets.NAME), json.dumps(values).encode())
    return assets.load(manifest.uri)


@pytest.fixture
def real(services: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """With versions as they are."""
    monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "cache"))
    return Bench(tmp_path)


@pytest.fixture
def bench(real: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """With versions that do not draw, which are logged in a second."""
    monkeypatch.setattr(serving, "log_model", lambda bundle, name, config: log_echo(bundle, name))
    return real


@pytest.fixture(scope="module")
def table(servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Bench]:
    """A registered model with two versions that cases share, as nobody asks when a version was registered."""
    folder = tmp_path_factory.mktemp("table")
    place = f"{servers['LATENT_GPT_STORE']}/{uuid.uuid4().hex[:8]}"
    environment = {**servers, "LATENT_GPT_STORE": place, "LATENT_GPT_CACHE": str(folder / "cache")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(serving, "log_model", lambda bundle, name, config: log_echo(bundle, name))
        bench = Bench(folder)
        for seed in (1, 2):
            register(bench.make(seed))
    return environment, bench


@pytest.fixture
def versions(table: tuple[dict[str, str], Bench], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The two, and none of them in use."""
    environment, bench = table
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with registry.changing(bench.name, "test") as now:
        now.settle(Aliases())
    return bench


def register(made: Made) -> Registered:
    return register_model(made.run, uuid.uuid4().hex[:8], made.evaluation)


# ── the table of cases ──────────────────────────────────────────────────────────────────────────────────

CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str, str]] = {
    # champion, challenger, outcome, and what the reason says
    "first ever, good": (None, {}, "first", "no other is in use: all attributes right 1.000"),
    "first ever, at chance": (None, {"score": 0.0}, "refused", "not above chance"),
    "first ever, no numbers": (None, {"score": NAN}, "refused", "all attributes right is no finite number"),
    "first ever, a figure that is none": (
        None,
        {"figures": {"validation/psnr": NAN}},
        "refused",
        "validation/psnr is nan",
    ),
    "worse": ({}, {"score": 0.0}, "not better", "0.000 against 1.000"),
    "equal": ({}, {}, "not better", "difference +0.000"),
    "better": ({"score": 0.0}, {}, "better", "1.000 against 0.000"),
    "better by less than the margin": (
        {"score": 0.0},
        {"scores": [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]},
        "not better",
        "margin 0.4",
    ),
    "too few prompts for the margin": (
        {"score": 0.0},
        {"gate": {**GATE, "margin": 0.1}},
        "undecidable",
        "the margin needs",
    ),
    "challenger's scores are no numbers": (
        {"score": 0.0},
        {"score": NAN},
        "refused",
        "all attributes right is no finite number",
    ),
    "challenger's scores are missing": ({"score": 0.0}, {"without": "scores"}, "refused", "is missing"),
    "challenger's figure is no number": (
        {"score": 0.0},
        {"figures": {"train/near_duplicates": NAN}},
        "refused",
        "train/near_duplicates is nan",
    ),
    "challenger's figure is missing": (
        {"score": 0.0},
        {"without": "validation/diversity"},
        "refused",
        "validation/diversity is missing",
    ),
    "champion's scores are no numbers": (
        {"scores": [1.0, NAN, 1.0, 1.0, 1.0, 1.0]},
        {},
        "replaces",
        "the champion's all attributes right is no finite number",
    ),
    "champion's scores are missing": ({"without": "scores"}, {}, "replaces", "is no finite number"),
    "champion's other figure is no number": (
        {"score": 0.0, "figures": {"validation/psnr": NAN}},
        {},
        "better",
        "1.000 against 0.000",
    ),
    "champion's other figure is missing": (
        {"score": 0.0, "without": "validation/psnr"},
        {},
        "better",
        "1.000 against 0.000",
    ),
    "guard broken: bits per token": (
        {"score": 0.0},
        {"figures": {"validation/bits_per_token": 3.2}},
        "refused",
        "bits per token (captions held out): 3.2 is above 3.1",
    ),
    "guard broken: reconstruction": (
        {"score": 0.0},
        {"figures": {"validation/psnr": 19.0}},
        "refused",
        "PSNR in dB (captions held out): 19 is below 19.5",
    ),
    "guard broken: near-duplicates of what was seen": (
        {"score": 0.0},
        {"figures": {"train/near_duplicates": 0.41}},
        "refused",
        "(captions seen): 0.41 is above 0.4",
    ),
    "guard broken: near-duplicates of what is held out": (
        {"score": 0.0},
        {"figures": {"validation/near_duplicates": 0.6, "composition/near_duplicates": 0.6}},
        "refused",
        "(all that is held out): 0.6 is above 0.4",
    ),
    "guard broken: the bound of near-duplicates": (
        {"score": 0.0, "figures": {"train/near_duplicates": 0.5}},
        {"figures": {"train/near_duplicates": 0.65}},
        "refused",
        "(captions seen): 0.65 is above 0.6",
    ),
    "guard broken: diversity": (
        {"score": 0.0},
        {"figures": {"validation/diversity": 0.5}},
        "refused",
        "diversity (captions held out): 0.5 is below 0.68",
    ),
    "guard broken: bundle size": (
        {"score": 0.0},
        {"figures": {"bundle_bytes": 2e5}},
        "refused",
        "bytes of the bundle: 200000 is above 150000",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_who_is_champion(versions: Bench, case: str) -> None:
    before, after, outcome, reason = CASES[case]
    first, second = versions.make(1), versions.make(2, **after)
    if before is not None:
        with registry.changing(versions.name, "test") as now:
            now.settle(Aliases(champion=1))
        benchmark = first.evaluation.input("benchmark")
        rewritten(first.evaluation, first.evaluation.info | info(benchmark, **({"score": 1.0} | before)))
    made = register(second)
    assert (made.version, made.verdict.outcome) == (2, outcome)
    assert reason in made.reason
    champion = 1 if before is not None else None
    promoted, kept = Aliases(champion=2, previous=champion), Aliases(champion=champion, challenger=2)
    assert versions.aliases() == (promoted if made.verdict.promoted else kept)
    assert made.alias == ("champion" if made.verdict.promoted else "challenger")
    said = versions.verdict(2)
    assert (said[""], said["reason"]) == (outcome, made.reason)


def test_a_verdict_is_on_the_version_and_in_the_report(bench: Bench) -> None:
    register(bench.make(1, score=0.0, gate=GATE | {"above_chance": False}))
    made = register(bench.make(2))
    assert made.verdict.outcome == "better"
    said, benchmark = bench.verdict(2), bench.make(2).evaluation.input("benchmark")
    assert said["benchmark"] == benchmark.key
    assert benchmark.inputs["judge"].key in said["judge"]
    assert said["interval"].startswith("+1.0000 [")
    assert json.loads(said["figures"])["validation/psnr"] == 20.0
    assert json.loads(said["figures_of_champion"])["validation/psnr"] == 20.0
    card = mlflow_client().get_model_version(bench.name, "2").description or ""
    for part in ("# model-", "**Verdict: better.**", "| champion, version 1 |", "## Data and licences"):
        assert part in card
    for part in ("drawn for the purpose", "for training", "## Limits", f"models:/{bench.name}/2"):
        assert part in card
    report = storage.read_bytes(made.report).decode()
    assert made.report.endswith("/report-2.html")
    assert f"{bench.name} version 2: better" in report
    assert report.endswith("report</main></html>")
    runs = mlflow_client().search_runs(
        [mlflow_client().get_experiment_by_name(bench.make(2).run.experiment).experiment_id],  # type: ignore[union-attr]
        "tags.`latent_gpt.step` = 'register'",
    )
    logged = {file.path for run in runs for file in mlflow_client().list_artifacts(run.info.run_id)}
    assert "report.html" in logged


def test_who_comes_again_is_found(bench: Bench) -> None:
    first = bench.make(1)
    assert register(first).reason.startswith("no other is in use")
    worse = bench.make(2, score=0.0)
    register(worse)
    again = register(first)
    assert (again.version, again.alias, again.reason) == (1, "champion", "it was before")
    assert bench.verdict(1)[""] == "first", "what was said of it stands"
    again = register(worse)
    assert (again.version, again.alias) == (2, "challenger")
    assert bench.aliases() == Aliases(champion=1, challenger=2)


# ── what people and releases do ─────────────────────────────────────────────────────────────────────────


def test_the_registered_version_is_the_asset_with_its_lineage_and_draws(real: Bench, tmp_path: Path) -> None:
    made = real.make(1)
    run, evaluation = made.run, made.evaluation
    register(made)
    model = evaluation.input("model")
    tags = registry.tags_of(1, run.registered_model)
    for name, one in {**model.inputs, **evaluation.inputs}.items():
        assert tags[f"latent_gpt.{name}"] == one.sha256
    assert tags["latent_gpt.evaluation"] == evaluation.sha256
    assert registry.lineage(1, run.registered_model) == {
        **model.inputs,
        **evaluation.inputs,
        "evaluation": evaluation.as_input,
    }
    assert registry.config_of(1, run.registered_model) == run
    parts = steps.parts(run, evaluation.input("images").settings)
    assert tags[registry.FINGERPRINT_TAG] == steps.fingerprint(parts)
    assert registry.benchmark_of(run.registered_model) == evaluation.inputs["benchmark"]
    shutil.rmtree(tmp_path / "cache")
    folder = registry.resolve(f"models:/{run.registered_model}@champion")
    assert (folder / "manifest.json").read_bytes() == model.text
    assert Generator.load(folder).generate(["red circle"], [0])


def test_a_champion_whose_version_is_deleted_by_hand(bench: Bench) -> None:
    register(bench.make(1))
    mlflow_client().delete_model_version(bench.name, "1")
    made = register(bench.make(2))
    assert (made.verdict.outcome, bench.aliases()) == ("first", Aliases(champion=2))


def lose(services: dict[str, str], bench: Bench, version: int) -> None:
    """Delete the files of a version from MLflow."""
    model = str(mlflow_client().get_model_version(bench.name, str(version)).source).rpartition("/")[2]
    bucket = storage.join("s3://" + storage.split(services["LATENT_GPT_STORE"])[0], "mlflow")
    (gone := [uri for uri in storage.list_uris(bucket) if f"/{model}/" in uri and "/bundle/" in uri])
    assert gone
    for uri in gone:
        storage.delete(uri)


def test_what_takes_a_lost_champions_place_is_above_chance(services: dict[str, str], bench: Bench) -> None:
    register(bench.make(1))
    lose(services, bench, 1)
    made = register(bench.make(2, score=0.0))
    assert (made.verdict.outcome, bench.aliases()) == ("refused", Aliases(champion=1, challenger=2))
    assert "not above chance" in made.reason
    assert "(and the champion is lost" in made.reason


def test_where_a_champion_is_lost_its_predecessor_is_compared_with(
    services: dict[str, str], bench: Bench
) -> None:
    register(bench.make(1, scores=[1.0, 0.0, 0.0, 0.0, 0.0, 0.0], gate=GATE | {"above_chance": False}))
    assert register(bench.make(2)).verdict.outcome == "better"
    lose(services, bench, 2)
    worse = register(bench.make(3, score=0.0))
    assert (worse.verdict.outcome, worse.verdict.against) == ("not better", 1)
    assert "the champion is lost" in worse.reason
    assert "`latent-gpt rollback` puts that one back in use" in worse.reason
    assert bench.aliases() == Aliases(champion=2, previous=1, challenger=3)
    better = register(bench.make(4))
    assert (better.verdict.outcome, better.verdict.against) == ("better", 1)
    assert bench.aliases().champion == 4


def test_a_champion_whose_files_are_gone(services: dict[str, str], bench: Bench, tmp_path: Path) -> None:
    first = bench.make(1)
    register(first)
    lose(services, bench, 1)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(storage.NotFound, match="are gone from MLflow; run the pipeline again"):
        registry.resolve(f"models:/{bench.name}@champion")
    made = register(bench.make(2))
    assert (made.version, made.alias, made.verdict.outcome) == (2, "champion", "replaces")
    assert "the champion is lost: the files of models:/" in made.reason
    assert register(first).version == 3, "what is lost is registered anew"


def test_a_registered_model_and_its_experiment_that_are_deleted_by_hand(bench: Bench) -> None:
    first = bench.make(1)
    register(first)
    client = mlflow_client()
    client.delete_registered_model(bench.name)
    with pytest.raises(UserError, match=r"has no alias champion; it has none\. Run the pipeline first"):
        registry.resolve(f"models:/{bench.name}@champion")
    with pytest.raises(UserError, match="has no previous-champion to roll back to; it has none"):
        registry.rollback(bench.name)
    experiment = client.get_experiment_by_name(first.run.experiment)
    assert experiment
    client.delete_experiment(experiment.experiment_id)
    made = register(first)
    assert (made.version, made.alias) == (1, "champion")


def put_in_use(bench: Bench, made: Made, transformer: Path) -> None:
    """Register a run's model with another transformer, and make it champion."""
    writer = AssetWriter("transformer", {"broken": True}, {})
    for path in transformer.iterdir():
        writer.add_file(path.name, path)
    model = made.evaluation.input("model")
    parts = {name: one.load() for name, one in model.inputs.items()} | {"transformer": writer.finish({})}
    broken = make_bundle(made.run, parts)
    ids, lineage = TrackingIds(experiment="e", run="r", step="register"), {registry.MODEL_TAG: broken.sha256}
    version = registry.register(ids, cache.folder(broken), log_echo, lineage, bench.name)
    registry.promote(version, bench.name)


def test_a_champion_that_is_no_numbers(bench: Bench, tmp_path: Path) -> None:
    """As an earlier release registered it, which did not look."""
    first = bench.make(1)
    weights = tmp_path / "nan/model.safetensors"
    shutil.copytree(tmp_path / "1/transformer", weights.parent)
    save_file({name: torch.full_like(one, torch.nan) for name, one in load_file(weights).items()}, weights)
    put_in_use(bench, first, weights.parent)
    made = register(first)
    assert (made.version, made.alias, made.verdict.outcome) == (2, "champion", "replaces")
    assert "the champion, version 1, cannot be used: " in made.reason


def test_a_champion_of_a_later_release_keeps_its_place(bench: Bench, tmp_path: Path) -> None:
    """This one cannot read it, which says nothing of it."""
    first = bench.make(1)
    later = tmp_path / "later/config.json"
    shutil.copytree(tmp_path / "1/transformer", later.parent)
    described = json.loads(later.read_text())
    described["transformer"]["of_a_later_release"] = 1
    later.write_text(json.dumps(described))
    put_in_use(bench, first, later.parent)
    with pytest.raises(UserError) as failed:
        register(first)
    assert "version 1 of model-" in str(failed.value)
    assert "is whole, but this release cannot read it" in str(failed.value)
    assert "\n" not in str(failed.value)
    assert bench.aliases() == Aliases(champion=1)
    assert registry.VERDICT_TAG not in registry.tags_of(2, bench.name), "so that it is judged when it can be"


def test_a_champion_of_an_earlier_release_keeps_its_place(bench: Bench) -> None:
    first = bench.make(1)
    model = first.evaluation.input("model")
    tags = {registry.MODEL_TAG: model.sha256, registration.IMAGES_TAG: "0" * 64}
    ids = TrackingIds(experiment="e", run="r", step="register")
    registry.register(ids, cache.folder(model), log_echo, tags, bench.name)
    registry.promote(1, bench.name)
    made = register(bench.make(2))
    assert (made.verdict.outcome, bench.aliases()) == ("not compared", Aliases(champion=1, challenger=2))
    assert "an earlier release made from pictures that nobody knows any more" in made.reason
    assert "latent-gpt promote 2" in made.reason


def test_what_was_made_from_other_pictures_is_not_compared(bench: Bench) -> None:
    first = bench.make(1)
    register(first)
    source = {"kind": "shapes", "count": 64, "seed": 1}
    made = register(bench.make(2, data={**first.run.data.model_dump(), "source": source}))
    assert (made.verdict.outcome, bench.aliases()) == ("not compared", Aliases(champion=1, challenger=2))
    assert "was made from other pictures: none of the pinned ones is in this data" in made.reason
    assert bench.verdict(2)[""] == "not compared"


OTHERS = {"source": {"kind": "shapes", "count": 64, "seed": 1}, "image_size": 16, "validation_share": 0.2}
LARGER = {"source": {"kind": "shapes", "count": 64}, "image_size": 32, "validation_share": 0.2}


@pytest.mark.parametrize("data", [OTHERS, LARGER], ids=["other pictures", "larger ones"])
@pytest.mark.parametrize("by_command", [True, False])
def test_what_is_put_in_use_by_hand_is_compared_with_again(
    bench: Bench, data: dict[str, Any], by_command: bool
) -> None:
    register(bench.make(1))
    second = bench.make(2, data=data, score=0.0)
    assert register(second).verdict.outcome == "not compared"
    own = second.evaluation.inputs["benchmark"]
    assert registry.benchmark_of(bench.name) != own
    (registration if by_command else registry).promote(2, bench.name)
    assert (registry.benchmark_of(bench.name) == own) == by_command
    made = register(bench.make(3, data=data))
    assert (made.verdict.outcome, made.verdict.against) == ("better", 2)
    assert registry.benchmark_of(bench.name) == own
    assert ("as the pinned one does not fit" in made.reason) == (not by_command)
    registration.rollback(bench.name)
    assert registry.benchmark_of(bench.name) == own, "which fits the version that is in use again"


def test_by_hand_what_is_pinned_stays_where_it_fits(bench: Bench) -> None:
    register(bench.make(1))
    pinned = registry.benchmark_of(bench.name)
    second = bench.make(2, judge=2)
    measure(second, second.evaluation.input("images"), bench.make(1).evaluation.input("benchmark"), 0.0)
    register(second)
    registration.promote(2, bench.name)
    assert registry.benchmark_of(bench.name) == pinned


def test_a_benchmark_whose_pictures_are_mostly_deleted_is_no_measure_any_more(bench: Bench) -> None:
    first = bench.make(1, score=0.0, gate=GATE | {"above_chance": False})
    register(first)
    source = {"kind": "shapes", "count": 20}
    second = bench.make(2, data={**first.run.data.model_dump(), "source": source})
    own = second.evaluation.input("benchmark")
    measure(first, first.evaluation.input("images"), own, 0.0)
    made = register(second)
    assert made.verdict.outcome == "better"
    assert "measured on this run's benchmark, as most of the pinned pictures are deleted" in made.reason
    assert registry.benchmark_of(bench.name) == own.as_input


def test_what_was_trained_on_pinned_pictures_is_not_compared(bench: Bench) -> None:
    """With another share held out, some of what is pinned would be learned by heart."""
    first = bench.make(1)
    register(first)
    made = register(bench.make(2, data={**first.run.data.model_dump(), "validation_share": 0.05}))
    assert made.verdict.outcome == "not compared"
    assert "is measured on pictures held out, of which this version was trained on" in made.reason


def measure(made: Made, images: Manifest, benchmark: Manifest, score: float) -> None:
    """What the job would leave."""
    given = {"images": images, "model": made.evaluation.input("model"), "benchmark": benchmark}
    rewritten(steps.writer("measurement", made.run, given).finish({}), info(benchmark, score))


def test_another_judge_measures_on_the_pinned_benchmark(bench: Bench) -> None:
    """Of a run with a judge of its own the report is by that one, and the verdict by the pinned one."""
    first = bench.make(1, score=0.0, gate=GATE | {"above_chance": False})
    register(first)
    pinned = registry.benchmark_of(bench.name)
    second = bench.make(2, score=0.0, judge=2)
    assert second.evaluation.info["benchmark"] != first.evaluation.info["benchmark"]
    benchmark = first.evaluation.input("benchmark")
    measure(second, second.evaluation.input("images"), benchmark, 1.0)
    made = register(second)
    assert (made.verdict.outcome, made.verdict.ours) == ("better", 1.0)
    own = second.evaluation.input("benchmark").inputs["judge"].key
    assert made.verdict.judge.startswith(f"{benchmark.inputs['judge'].key}, pinned with the benchmark")
    assert own in made.verdict.judge
    assert registry.benchmark_of(bench.name) == pinned


def test_a_pinned_benchmark_that_is_gone_is_replaced_by_the_runs(bench: Bench) -> None:
    first = bench.make(1, score=0.0, gate=GATE | {"above_chance": False})
    register(first)
    second = bench.make(2, judge=2)
    own = second.evaluation.input("benchmark")
    storage.delete_prefix(first.evaluation.input("benchmark").uri)
    measure(first, first.evaluation.input("images"), own, 0.0)
    made = register(second)
    assert made.verdict.outcome == "better"
    assert "measured on this run's benchmark, as the pinned one is gone" in made.reason
    assert registry.benchmark_of(bench.name) == own.as_input


def test_what_another_version_of_the_step_evaluated_is_measured_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.make(1, score=0.0, gate=GATE | {"above_chance": False})
    register(first)
    raised = dataclasses.replace(steps.STEPS["evaluation"], version=steps.STEPS["evaluation"].version + 1)
    monkeypatch.setitem(steps.STEPS, "evaluation", raised)
    measure(first, first.evaluation.input("images"), first.evaluation.input("benchmark"), 1.0)
    made = register(bench.make(2))
    assert (made.verdict.outcome, made.verdict.theirs) == ("not better", 1.0)


def test_pictures_that_are_deleted_leave_the_benchmark(bench: Bench) -> None:
    first = bench.make(1, score=0.0, gate=GATE | {"above_chance": False})
    register(first)
    source = {"kind": "shapes", "count": 50}
    second = bench.make(2, data={**first.run.data.model_dump(), "source": source})
    from model.evaluation.benchmark import without

    smaller = without(first.evaluation.input("benchmark"), second.evaluation.input("images"))
    assert smaller
    measure(first, first.evaluation.input("images"), smaller, 0.0)
    measure(second, second.evaluation.input("images"), smaller, 1.0)
    made = register(second)
    assert made.verdict.outcome == "better"
    assert "pinned pictures that are deleted from the data were left out" in made.reason
    assert registry.benchmark_of(bench.name) == smaller.as_input
    assert any(name.endswith(f"/benchmark-{smaller.key}") for name in uses.said()), "gc knows of it"


def test_a_champion_that_is_gone_from_the_store_is_put_back_from_mlflow(bench: Bench, tmp_path: Path) -> None:
    first = bench.make(1, score=0.0, gate=GATE | {"above_chance": False})
    register(first)
    model = first.evaluation.input("model")
    before = {uri: storage.read_bytes(uri) for uri in storage.list_uris(model.uri)}
    storage.delete_prefix(model.uri)
    shutil.rmtree(tmp_path / "cache")
    made = register(bench.make(2))
    assert made.verdict.outcome == "better"
    assert {uri: storage.read_bytes(uri) for uri in storage.list_uris(model.uri)} == before


def test_the_job_measures_a_champion_and_a_challenger_alike(real: Bench) -> None:
    """Nothing said by the test: another judge, so the challenger is measured by the pinned one, for real."""
    loose = {
        "margin": 0.4,
        "above_chance": False,
        "more_bits_per_token": 100.0,
        "less_psnr": 100.0,
        "less_diversity": 1.0,
        "max_near_duplicates": {"seen": 1.0, "held_out": 1.0},
    }
    first = real.make(1, gate=loose)
    register(first)
    storage.delete_prefix(first.evaluation.uri)  # so that the champion is measured, too
    second = real.make(2, judge=2, gate=loose)
    made = register(second)
    assert made.verdict.outcome == "not better", "random weights draw no shapes"
    assert (made.verdict.ours, made.verdict.theirs) == (0.0, 0.0)
    ours, theirs = made.verdict.columns["validation/psnr"]
    assert ours is not None
    assert ours == theirs, "of the same tokenizer on the same pictures"
    bundles = [one.evaluation.inputs["model"].key[:8] for one in (first, second)]
    runs = mlflow_client().search_runs(
        [mlflow_client().get_experiment_by_name(first.run.experiment).experiment_id],  # type: ignore[union-attr]
        "tags.`latent_gpt.step` LIKE 'measurement%'",
    )
    named = {run.data.tags["latent_gpt.step"] for run in runs}
    assert named >= {f"measurement-{bundle}" for bundle in bundles}, "a run of MLflow each"


def test_two_that_somebody_names_are_compared_and_nothing_is_promoted(
    real: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version against the champion, and a folder that is a whole copy of a bundle."""
    monkeypatch.setenv("LATENT_GPT_STATE", str(tmp_path / "state"))
    register(real.make(1, score=0.0, gate=GATE | {"above_chance": False}))
    register(real.make(2, figures={"bundle_bytes": 9e5}))
    before = real.aliases()
    evaluate(f"models:/{real.name}/2")
    said = capsys.readouterr().out
    assert before == real.aliases() == Aliases(champion=1, challenger=2)
    assert "refused: bytes of the bundle: 900000 is above 150000" in said
    assert f"models:/{real.name}/2  |  models:/{real.name}@champion" in said
    assert said.endswith("nothing was promoted\n")
    folder = tmp_path / "copy"
    shutil.copytree(registry.resolve(f"models:/{real.name}/2"), folder)
    evaluate(str(folder), f"models:/{real.name}@champion")
    assert "not better: all attributes right 0.000 against 0.000" in capsys.readouterr().out
    assert before == real.aliases()


# ── kills, and many at once ─────────────────────────────────────────────────────────────────────────────


class Killed(BaseException):
    """Ends the process that is under test."""


@pytest.mark.parametrize("call", ["changing", "note", "pin", "judged"])
def test_killed_between_registering_and_aliasing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(registry, call, die)
        with pytest.raises(Killed):
            register(bench.make(1))
    assert bench.aliases() == Aliases(champion=1 if call == "judged" else None)
    made = register(bench.make(1))
    assert (made.version, made.alias) == (1, "champion"), "the version that was there is found"
    assert registry.benchmark_of(bench.name)
    said = bench.verdict(1)
    assert said[""] == ("in use" if call == "judged" else "first")
    assert said["reason"].startswith("no other is in use")


def test_what_was_put_in_use_before_it_was_judged_gets_a_verdict(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(bench.make(1))
    with monkeypatch.context() as patch:
        patch.setattr(registration, "judge", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            register(bench.make(2))
    assert not bench.verdict(2)
    registration.promote(2, bench.name)
    assert register(bench.make(2)).verdict.outcome == "in use"
    assert bench.verdict(2) == {"": "in use", "reason": "it was before"}


def test_a_benchmark_that_is_pinned_meanwhile_is_measured_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = bench.make(1, score=0.0, gate=GATE | {"above_chance": False})
    register(first)
    second = bench.make(2, judge=2)
    pinned = second.evaluation.input("benchmark")
    measure(first, first.evaluation.input("images"), pinned, 0.0)
    third = bench.make(3, judge=2)
    real = registration.judge

    def judge(*given: Any) -> registration.Judged:
        found = real(*given)
        registry.pin(pinned.as_input, bench.name)
        return found

    measure(third, third.evaluation.input("images"), first.evaluation.input("benchmark"), 1.0)
    monkeypatch.setattr(registration, "judge", judge)
    made = register(third)
    assert made.verdict.benchmark == pinned.key
    assert "champion or benchmark have changed meanwhile: compared anew" in capsys.readouterr().out


def test_who_has_lost_the_lock_writes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    register(bench.make(1, score=0.0, gate=GATE | {"above_chance": False}))
    real = leases.alone

    @contextmanager
    def lost(name: str, work: str, *saying: str) -> Iterator[Callable[[], None]]:
        def still_ours() -> None:
            raise UserError("its lock may be another's")

        with real(name, work, *saying) as ours:
            yield still_ours if work.startswith("registry/") else ours

    monkeypatch.setattr(leases, "alone", lost)
    before = dict(mlflow_client().get_registered_model(bench.name).tags)
    with pytest.raises(UserError, match="its lock may be another's"):
        register(bench.make(2))
    assert not bench.verdict(2)
    assert bench.aliases() == Aliases(champion=1)
    assert dict(mlflow_client().get_registered_model(bench.name).tags) == before


def test_a_champion_that_changes_meanwhile_is_compared_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(bench.make(1, score=0.0, gate=GATE | {"above_chance": False}))
    real = registration.judge
    first = [True]

    def judge(*given: Any) -> registration.Judged:
        found = real(*given)
        if first.pop() if first else False:
            assert register(bench.make(3)).verdict.outcome == "better"
        return found

    monkeypatch.setattr(registration, "judge", judge)
    made = register(bench.make(2))
    assert (made.version, made.verdict.outcome, made.verdict.against) == (2, "not better", 3)
    assert bench.aliases() == Aliases(champion=3, previous=1, challenger=2)
    assert "champion or benchmark have changed meanwhile: compared anew" in capsys.readouterr().out


@pytest.mark.parametrize("count", [2, 20])
def test_at_once_they_leave_a_champion_its_predecessor_and_the_newest_challenger(
    bench: Bench, count: int
) -> None:
    register(bench.make(1, score=0.0, gate=GATE | {"above_chance": False}))
    runs = [bench.make(seed) for seed in range(2, 2 + count)]
    with ThreadPoolExecutor(count) as pool:
        made = list(pool.map(register, runs))
    assert sorted(one.version for one in made) == list(range(2, 2 + count))
    (better,) = [one for one in made if one.verdict.promoted]
    assert {one.verdict.outcome for one in made if one is not better} <= {"not better"}
    newest = max(one.version for one in made if one is not better)
    expected = Aliases(champion=better.version, previous=1, challenger=newest)
    assert bench.aliases() == expected
    assert len(mlflow_client().get_registered_model(bench.name).aliases) == 3
    assert registry.INTENT_TAG not in mlflow_client().get_registered_model(bench.name).tags
