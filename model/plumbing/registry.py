"""The model registry: versions of a registered model in MLflow, one such model per task, and which is in use.

A version holds a bundle, the asset of kind `model`, with its manifest; it is known by that manifest's hash
and by what it plays: `champion` (in use), `previous-champion` (what a rollback returns to), `challenger` (the
newest that did not become champion). Bundles of earlier releases, with `checksums.json` instead of a
manifest, can be used still.

MLflow changes one alias at a time. So who changes them is alone with a registered model, by a lock in the
store, and writes down first how they are to be in the end: who is killed in between is finished by the next.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from model.config import RunConfig, config_hash, parse_config, without_retired
from model.errors import UserError, reason
from model.plumbing import assets, cache, environment, leases, storage
from model.plumbing.assets import File, Input, Kind, Manifest
from model.plumbing.jobs import TrackingIds
from model.plumbing.provenance import DIGEST
from model.plumbing.sweeping import Needed
from model.plumbing.tracking import AT_ONCE, Tracker, all_found, explained, log_data, mlflow_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous-champion"
MODEL_TAG = "latent_gpt.model"  # of a version: hash of its manifest
KEYS_TAG = "latent_gpt.keys"  # of a version: keys of the assets that it was made from, by kind
FINGERPRINT_TAG = "latent_gpt.fingerprint"  # of a version: `model.steps.fingerprint` of its run
PARTS_TAG = "latent_gpt.parts"  # of a version: what that is the hash of, as JSON
CONFIG = "latent_gpt.config"  # in the metadata of a logged model: the config of its run
LONGEST_DESCRIPTION, LONGEST_TAG = 5000, 5000  # characters that MLflow's databases keep
TIME_TAG = "latent_gpt.registered"  # of a version: when a run last came to it, ms since 1970
INTENT_TAG = "latent_gpt.aliases"  # of a registered model: as its aliases are about to be
BENCHMARK_TAG = "latent_gpt.benchmark"  # of a registered model: "key/sha256" of what versions are measured on
IMAGES_TAG = "latent_gpt.images"  # of a registered model: "key/sha256" of those that stand for its source
VERDICT_TAG = (
    "latent_gpt.verdict"  # of a version: what was decided, set last; more of it in tags that begin so
)
CHECKSUMS, OLD_TAG = (
    "checksums.json",
    "latent_gpt.bundle",
)  # of earlier releases: SHA-256 sums, and their hash


def find(bundle: Manifest, name: str) -> int | None:
    """The newest version that holds a bundle, and holds all of it still; or None.

    Its images are the registered model's current ones from now on, as those of a new version are: a run has
    just seen that the source holds these.
    """
    client = mlflow_client()
    with explained():
        same = [one for one in _versions(client, name) if one.tags.get(MODEL_TAG) == bundle.sha256]
        for version in reversed(same):
            there = {path.split("/", 2)[-1] for path in _files(version)}  # after artifacts/bundle/
            if there >= {file.name for file in bundle.files}:
                client.set_model_version_tag(name, version.version, TIME_TAG, _now())
                _see_images_of(version.tags, name)
                return int(version.version)
    return None


def register(
    ids: TrackingIds,
    bundle: Path,
    log_model: Callable[[Path, str], Any],
    lineage: dict[str, str],
    name: str,
    figures: Mapping[str, float] | None = None,
    data: Manifest | None = None,
) -> int:
    """Make a bundle a new version of a registered model; returns its number.

    Args:
        ids: the step's place in MLflow; the model is logged in its run.
        bundle: local folder, with its manifest.
        log_model: `log_model(bundle, name)` logs it as a pyfunc in the active run and returns MLflow's
            `ModelInfo`.
        lineage: tags of the version: hashes of what it was made from, `MODEL_TAG` among them.
        name: of the registered model.
        figures: what was measured of it.
        data: the images that it was measured on.

    Raises:
        UserError: MLflow cannot be reached or refuses.
    """
    import mlflow

    with Tracker(ids) as tracker, explained():
        mlflow.set_tracking_uri(environment.MLFLOW_TRACKING_URI.get())
        # Whoever set another experiment, in this process or by MLFLOW_EXPERIMENT_NAME, would be in the way.
        run = mlflow_client().get_run(tracker.run_id)
        mlflow.set_experiment(experiment_id=run.info.experiment_id)
        with mlflow.start_run(run_id=tracker.run_id):
            info = log_model(bundle, name)
        _link(tracker.run_id, info.model_id, figures or {}, data)
        made = mlflow.register_model(info.model_uri, name, tags={**lineage, TIME_TAG: _now()})
        _see_images_of(lineage, name)
    return int(made.version)


def _link(run_id: str, model: str, figures: Mapping[str, float], data: Manifest | None) -> None:
    """Have MLflow show a logged model beside its data, and what was measured of it."""
    from mlflow.entities import LoggedModelInput, Metric

    client = mlflow_client()
    of: dict[str, Any] = {"model_id": model, "run_id": run_id}
    if data:
        log_data(client, run_id, [data], "evaluation")
        client.log_inputs(run_id, models=[LoggedModelInput(model)])
        of |= {"dataset_name": data.kind, "dataset_digest": data.sha256[:DIGEST]}
    now = int(1000 * time.time())
    some = [Metric(name, float(one), now, 0, **of) for name, one in figures.items()]
    for start in range(0, len(some), AT_ONCE):
        client.log_batch(run_id, metrics=some[start : start + AT_ONCE])


def last_registered(shared: bool) -> str:
    """The registered model that is meant where none is named: the one that a run came to last.

    Args:
        shared: the server is not this state folder's alone: then no guess is made among several.

    Raises:
        UserError: there is none, or there are several on a shared server.
    """
    with explained():
        times: dict[str, int] = {}
        for version in mlflow_client().search_model_versions():
            if version.tags.keys() & {MODEL_TAG, OLD_TAG}:
                when = int(version.tags.get(TIME_TAG, version.creation_timestamp))
                times[version.name] = max(when, times.get(version.name, 0))
    if not times:
        raise UserError("no model is registered yet; run the pipeline first")
    if shared and len(times) > 1:
        raise UserError(f"several models are registered here; name one of {', '.join(sorted(times))}")
    return max(times, key=lambda name: times[name])


def version_of(alias: str, name: str) -> int | None:
    """The version that has an alias, or None."""
    with explained():
        return _aliases(mlflow_client(), name).get(alias)


def tags_of(version: int, name: str) -> dict[str, str]:
    """The tags of a version: hashes of what it was made from."""
    with explained():
        return dict(mlflow_client().get_model_version(name, str(version)).tags)


def tag(version: int, name: str, tags: dict[str, str]) -> None:
    """Set tags of a version."""
    client = mlflow_client()
    with explained():
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version), key, value)


def tags_of_all(name: str) -> dict[int, dict[str, str]]:
    """The tags of all versions of a registered model, the oldest first; none if there is no such model."""
    with explained():
        return {int(one.version): dict(one.tags) for one in _versions(mlflow_client(), name)}


def lineage_tags(made_from: Collection[Input]) -> dict[str, str]:
    """The tags of a version that name the assets it was made from; `lineage` is the inverse."""
    hashes = {f"latent_gpt.{one.kind}": one.sha256 for one in made_from}
    return {**hashes, KEYS_TAG: json.dumps({one.kind: one.key for one in made_from})}


def lineage(version: int, name: str) -> dict[Kind, Input]:
    """The assets that a version was made from, by kind; none of a version of an earlier release."""
    return lineage_of(tags_of(version, name))


def lineage_of(tags: Mapping[str, str]) -> dict[Kind, Input]:
    """The same from the tags of a version."""
    keys: dict[Kind, str] = json.loads(tags.get(KEYS_TAG, "{}"))
    return {kind: Input(kind=kind, key=key, sha256=tags[f"latent_gpt.{kind}"]) for kind, key in keys.items()}


def current_images(name: str) -> Input | None:
    """The images that stand for the source of a registered model as it was last seen.

    Those of any other version may still hold what was deleted since. Where nobody has said which they are:
    those of the newest version. None: not even that is known, or there is no such model.
    """
    client = mlflow_client()
    with explained():
        found = client.search_registered_models(f"name='{name}'")
        key, _, sha256 = found[0].tags.get(IMAGES_TAG, "").partition("/") if found else ("", "", "")
        if sha256:
            return Input(kind="images", key=key, sha256=sha256)
        versions = _versions(client, name)
    return lineage_of(versions[-1].tags).get("images") if versions else None


def see_images(images: Input, name: str) -> None:
    """Have these be the current images of a registered model."""
    with explained():
        mlflow_client().set_registered_model_tag(name, IMAGES_TAG, f"{images.key}/{images.sha256}")


def _see_images_of(tags: Mapping[str, str], name: str) -> None:
    if images := lineage_of(tags).get("images"):
        see_images(images, name)


def config_of(version: int, name: str) -> RunConfig | None:
    """The config of the run that made a version; None of a version of an earlier release.

    Raises:
        UserError: it is damaged, or its files are gone.
    """
    import mlflow

    with explained():
        mlflow.set_tracking_uri(environment.MLFLOW_TRACKING_URI.get())
        metadata = mlflow.models.get_model_info(f"models:/{name}/{version}").metadata or {}
    if CONFIG not in metadata:
        return None
    return parse_config(without_retired(metadata[CONFIG]), where=f"the config of {name} version {version}")


def is_there(version: int, name: str) -> bool:
    """Whether MLflow still has files of a version."""
    with explained():
        return bool(_files(mlflow_client().get_model_version(name, str(version))))


def note(version: int, name: str, description: str, **tags: str) -> None:
    """Write on a version what people should know of it.

    Args:
        version: its number.
        name: of the registered model.
        description: Markdown; what is beyond MLflow's limit is cut off.
        tags: more of the verdict, by the end of the tag's name.
    """
    client = mlflow_client()
    with explained():
        client.update_model_version(name, str(version), description[:LONGEST_DESCRIPTION])
        for what, value in tags.items():
            client.set_model_version_tag(name, str(version), f"{VERDICT_TAG}.{what}", value[:LONGEST_TAG])


def judged(version: int, name: str, outcome: str) -> None:
    """Say what was decided of a version, last of all: one of which nothing is said is judged once more."""
    tag(version, name, {VERDICT_TAG: outcome})


def benchmark_of(name: str) -> Input | None:
    """The asset that the versions of a registered model are measured on; None if none is."""
    with explained():
        found = mlflow_client().search_registered_models(f"name='{name}'")
    key, _, sha256 = found[0].tags.get(BENCHMARK_TAG, "").partition("/") if found else ("", "", "")
    return Input(kind="benchmark", key=key, sha256=sha256) if sha256 else None


def pin(benchmark: Input, name: str) -> None:
    """Have the versions of a registered model be measured on this benchmark from now on."""
    with explained():
        said = f"{benchmark.key}/{benchmark.sha256}"
        mlflow_client().set_registered_model_tag(name, BENCHMARK_TAG, said)


# ── which version is in use ─────────────────────────────────────────────────────────────────────────────


class Aliases(BaseModel):
    """Which version of a registered model plays what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    champion: int | None = None
    previous: int | None = None
    challenger: int | None = None

    def promoted(self, version: int) -> Aliases:
        """As they are when a version becomes champion; the one so far is what a rollback returns to."""
        if version == self.champion:
            return self
        previous = self.previous if self.champion is None else self.champion
        return Aliases(
            champion=version,
            previous=None if previous == version else previous,
            challenger=self.challenger if self.challenger and self.challenger > version else None,
        )

    def rolled_back(self) -> Aliases:
        """As they are when the previous champion is in use again; the one so far takes its place."""
        return self.model_copy(update={"champion": self.previous, "previous": self.champion})

    def refused(self, version: int) -> Aliases:
        """As they are when a version does not become champion: the newest such one is the challenger."""
        if version in (self.champion, self.previous) or version < (self.challenger or 0):
            return self
        return self.model_copy(update={"challenger": version})

    def among(self, versions: Collection[int]) -> Aliases:
        """Those that make sense, where there are these versions."""
        champion, previous, challenger = (
            version if version in versions else None
            for version in (self.champion, self.previous, self.challenger)
        )
        previous = None if previous == champion else previous
        return Aliases(
            champion=champion,
            previous=previous,
            challenger=None if challenger in (champion, previous) else challenger,
        )

    @property
    def by_name(self) -> dict[str, int | None]:
        """The same by the names that MLflow knows."""
        return {CHAMPION: self.champion, PREVIOUS: self.previous, CHALLENGER: self.challenger}


def aliases(name: str) -> Aliases:
    """Those of a registered model, as they are; none if there is no such model."""
    with explained():
        return _known_aliases(_aliases(mlflow_client(), name))


class Change(NamedTuple):
    """To be alone with the aliases of a registered model, see `changing`."""

    name: str
    before: Aliases  # whole
    still_ours: Callable[[], None]  # raises a UserError where others may be at it: before each write

    def settle(self, wanted: Aliases) -> None:
        """Have the aliases be as wanted, in the end even by somebody else."""
        client = mlflow_client()
        with explained():
            before = _aliases(client, self.name)
            if _known_aliases(before) == wanted:
                return
            self.still_ours()
            client.set_registered_model_tag(self.name, INTENT_TAG, wanted.model_dump_json())
            _set(client, self.name, before, wanted, self.still_ours)
            self.still_ours()
            client.delete_registered_model_tag(self.name, INTENT_TAG)


@contextmanager
def changing(name: str, speaker: str) -> Iterator[Change]:
    """Alone with the aliases of a registered model, which are whole by then.

    Args:
        name: of the registered model.
        speaker: the step or command, for what is said.
    """
    with leases.alone(speaker, f"registry/{name}") as still_ours:
        yield Change(name, _mend(name, still_ours), still_ours)


def _mend(name: str, still_ours: Callable[[], None]) -> Aliases:
    """Finish what somebody who was killed had begun, and take aliases from what is deleted."""
    client = mlflow_client()
    with explained():
        found = client.search_registered_models(f"name='{name}'")
        if not found:
            return Aliases()
        before = {alias: int(version) for alias, version in found[0].aliases.items()}
        wanted, intent = _known_aliases(before), found[0].tags.get(INTENT_TAG)
        if intent is not None:
            with suppress(ValidationError):  # of somebody else's hand
                wanted = Aliases.model_validate_json(intent)
        wanted = wanted.among([int(version.version) for version in _versions(client, name)])
        _set(client, name, before, wanted, still_ours)
        if intent is not None:
            still_ours()
            client.delete_registered_model_tag(name, INTENT_TAG)
    return wanted


def promote(version: int, name: str, speaker: str = "promote") -> Aliases:
    """Make a version the champion; the one so far becomes `previous-champion`. Returns what it was before.

    Raises:
        NotFound: there is no such version, or its files are gone.
    """
    client = mlflow_client()
    with explained():
        one = _parse(client, f"models:/{name}/{version}")
        if not _files(one):
            raise storage.NotFound(f"the files of models:/{name}/{version} are gone from MLflow")
    with changing(name, speaker) as now:
        now.settle(now.before.promoted(version))
    return now.before


def rollback(name: str, speaker: str = "rollback") -> Aliases:
    """Put the previous champion back in use; the one so far takes its place. Returns what was before.

    Raises:
        UserError: there is no previous champion.
    """
    with changing(name, speaker) as now:
        if now.before.previous is None:
            known = {alias: version for alias, version in now.before.by_name.items() if version}
            raise UserError(f"{name} has no {PREVIOUS} to roll back to; it has {_known(known)}")
        now.settle(now.before.rolled_back())
    return now.before


def _set(
    client: MlflowClient, name: str, before: dict[str, int], wanted: Aliases, still_ours: Callable[[], None]
) -> None:
    for alias, version in wanted.by_name.items():
        if before.get(alias) == version:
            continue
        still_ours()
        if version is None:
            client.delete_registered_model_alias(name, alias)
        else:
            client.set_registered_model_alias(name, alias, str(version))


def _known_aliases(found: dict[str, int]) -> Aliases:
    return Aliases(
        champion=found.get(CHAMPION), previous=found.get(PREVIOUS), challenger=found.get(CHALLENGER)
    )


def needed(newest: int) -> tuple[dict[str, Needed], list[str]]:
    """What must stay in the store for the registered models of ours, and who asks for it.

    Args:
        newest: of each model so many versions count, and whatever has an alias.

    Returns:
        What versions were made from, and what they are measured on, each by a name for people; the versions
        that do not count.

    Raises:
        UserError: MLflow cannot be reached.
    """
    client = mlflow_client()
    wanted: dict[str, Needed] = {}
    others = []
    with explained():
        for model in all_found(client.search_registered_models):
            names: dict[int, list[str]] = {}
            for alias, number in model.aliases.items():
                names.setdefault(int(number), []).append(alias)
            found = all_found(client.search_model_versions, filter_string=f"name='{model.name}'")
            versions = sorted(
                (one for one in found if one.tags.keys() & {MODEL_TAG, OLD_TAG}),
                key=lambda one: int(one.version),
                reverse=True,
            )
            images = current_images(model.name) if versions else None
            current = images.sha256 if images else ""
            for place, one in enumerate(versions):
                plays = names.get(int(one.version), [])
                playing = f" ({', '.join(sorted(plays))})" if plays else ""
                name = f"{model.name} version {one.version}{playing}"
                if place < newest or plays:
                    wanted[name] = _needs(one.tags, current)
                else:
                    others.append(name)
            key, _, sha256 = model.tags.get(BENCHMARK_TAG, "").partition("/")
            if versions and sha256:
                pinned = f"benchmark/{key}"
                needs = Needed(frozenset({pinned}), frozenset({sha256}), current, pinned)
                wanted[f"{model.name}, what its versions are measured on"] = needs
    return wanted, others


def in_deleted_experiments() -> list[str]:
    """The versions of ours whose experiments are marked as deleted: these must not be deleted for good.

    Raises:
        UserError: MLflow cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    client = mlflow_client()
    held = []
    with explained():
        for one in all_found(client.search_model_versions):
            with suppress(MlflowException):  # its run is gone for good already
                experiment = client.get_run(one.run_id or "").info.experiment_id
                if client.get_experiment(experiment).lifecycle_stage == "deleted":
                    held.append(f"{one.name} version {one.version}")
    return held


def _needs(tags: dict[str, str], current: str) -> Needed:
    """What the tags of a version say that it was made from; `current` is the hash of its model's images."""
    keys: dict[str, str] = json.loads(tags.get(KEYS_TAG, "{}"))
    hashes = (value for tag, value in tags.items() if tag.removeprefix("latent_gpt.") in get_args(Kind))
    return Needed(frozenset(f"{kind}/{key}" for kind, key in keys.items()), frozenset(hashes), current)


class Listed(BaseModel):
    """A version, for people."""

    name: str
    version: int
    aliases: list[str]
    verdict: str  # empty of a version of an earlier release
    reason: str
    registered: int  # ms since 1970


def listed(name: str = "") -> list[Listed]:
    """The versions of a registered model of ours, or of all, the newest first within each.

    Raises:
        UserError: MLflow cannot be reached, or has no such model.
    """
    client = mlflow_client()
    with explained():
        found = client.search_registered_models(f"name='{name}'" if name else None, max_results=1000)
        if name and not found:
            raise UserError(f"there is no registered model {name}")
        lines = []
        for model in sorted(found, key=lambda one: one.name):
            playing = {alias: int(version) for alias, version in model.aliases.items()}
            for version in reversed(_versions(client, model.name)):
                number = int(version.version)
                if not version.tags.keys() & {MODEL_TAG, OLD_TAG}:
                    continue
                lines.append(
                    Listed(
                        name=model.name,
                        version=number,
                        aliases=sorted(alias for alias, one in playing.items() if one == number),
                        verdict=version.tags.get(VERDICT_TAG, ""),
                        reason=version.tags.get(f"{VERDICT_TAG}.reason", ""),
                        registered=int(version.tags.get(TIME_TAG, version.creation_timestamp)),
                    )
                )
    return lines


def named(ref: str) -> tuple[str, int]:
    """Name and number of the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names.

    Raises:
        NotFound: there is none.
    """
    with explained():
        version = _parse(mlflow_client(), ref)
    return version.name, int(version.version)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────


def resolve(ref: str) -> Path:
    """The local folder of a model, or of another asset, whose files are what their manifest says.

    Args:
        ref: `models:/NAME@champion`, `models:/NAME/3`, an S3 URI, or a local folder; without a manifest it is
            taken as it comes.

    Raises:
        NotFound: there is no such model, or its files are gone.
        Damaged: they are not what they were.
        UserError: it cannot be reached.
    """
    if ref.startswith("models:/"):
        return _resolve_version(ref)
    if storage.is_s3(ref):
        return cache.folder(_manifest(ref))
    path = Path(ref).expanduser()
    with storage.explained(ref):
        if not path.is_dir():
            raise storage.NotFound(
                f"model {ref} does not exist; give models:/NAME@{CHAMPION}, an s3:// URI or a folder"
            )
        if not any((path / note).exists() for note in (assets.NAME, CHECKSUMS)):
            return path
    return cache.folder(_manifest(str(path)))


# ── below ───────────────────────────────────────────────────────────────────────────────────────────────


def _manifest(uri: str, sizes: dict[str, int] | None = None) -> Manifest:
    """The manifest of the asset at `uri`; made up from its checksums for a bundle of an earlier release."""
    try:
        return assets.load(uri)
    except storage.NotFound:
        pass
    try:
        sums: dict[str, str] = json.loads(storage.read_bytes(storage.join(uri, CHECKSUMS), assets.LARGEST))
        if not isinstance(sums, dict):
            raise ValueError("no table of sums")
        sizes = storage.list_sizes(uri) if sizes is None else sizes
        files = [File(name=name, size=sizes.get(name, 0), sha256=sums[name]) for name in sorted(sums)]
        key = config_hash(sums)[:16]
        return Manifest(kind="model", key=key, settings={}, inputs={}, files=tuple(files)).at(uri)
    except storage.NotFound:
        raise storage.NotFound(f"{uri} is no model: it has neither {assets.NAME} nor {CHECKSUMS}") from None
    except (ValueError, RecursionError) as error:
        raise storage.Damaged(
            f"{uri}/{CHECKSUMS} is damaged ({reason(error)}); fetch the model again"
        ) from None


def _resolve_version(ref: str) -> Path:
    import mlflow

    with explained():
        version = _parse(mlflow_client(), ref)
        uri = f"models:/{version.name}/{version.version}"
        if not version.tags.keys() & {MODEL_TAG, OLD_TAG}:
            raise UserError(f"{ref} was not registered by latent-gpt: it has no tag {MODEL_TAG}")
        files = _files(version)
        notes = [path for path in files if path.endswith((f"/{assets.NAME}", f"/{CHECKSUMS}"))]
        if not notes:
            raise storage.NotFound(
                f"the files of {uri} are gone from MLflow; run the pipeline again, or delete this version"
            )
        root, _, note = notes[0].rpartition("/")
        sizes = {path.removeprefix(f"{root}/"): size for path, size in files.items()}

        def fetch(name: str, folder: str) -> Path:
            if name not in sizes:
                raise storage.NotFound(f"{name} of {uri} is gone from MLflow; delete this version")
            got = mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/{root}/{name}", dst_path=folder)
            return Path(got)

        def get(file: File, target: Path) -> None:
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    storage.download_file(str(fetch(file.name, scratch)), target, file.sha256)
                except storage.Damaged:
                    raise storage.Damaged(
                        f"{file.name} of {uri} is damaged: it is not what was registered; delete this version"
                    ) from None

        with tempfile.TemporaryDirectory() as scratch:
            manifest = _manifest(str(fetch(note, scratch).parent), sizes)
        sums = {file.name: file.sha256 for file in manifest.files}
        if version.tags.get(MODEL_TAG) != manifest.sha256 and version.tags.get(OLD_TAG) != config_hash(sums):
            raise storage.Damaged(
                f"{uri} does not hold the model it was registered with; delete this version"
            )
        return cache.folder(manifest, get=get)


def _files(version: ModelVersion) -> dict[str, int]:
    """Paths and sizes of what a version was logged with; none where that was deleted."""
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(environment.MLFLOW_TRACKING_URI.get())
    found: dict[str, int] = {}
    folders = ["artifacts"]
    while folders:
        uri = f"models:/{version.name}/{version.version}/{folders.pop()}"
        try:
            for entry in mlflow.artifacts.list_artifacts(artifact_uri=uri):
                if entry.is_dir:
                    folders.append(entry.path)
                else:
                    found[entry.path] = entry.file_size or 0
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    return found


def _parse(client: MlflowClient, ref: str) -> ModelVersion:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names."""
    rest = ref.removeprefix("models:/")
    if "@" in rest:
        name, _, alias = rest.partition("@")
        aliases = _aliases(client, name)
        if alias not in aliases:
            raise storage.NotFound(
                f"model {name} has no alias {alias}; it has {_known(aliases)}. Run the pipeline first"
            )
        return client.get_model_version(name, str(aliases[alias]))
    name, _, number = rest.rpartition("/")
    if not name or not number.isdecimal():
        raise UserError(f"model {ref} must read models:/NAME@ALIAS or models:/NAME/VERSION")
    versions = {int(version.version): version for version in _versions(client, name)}
    if int(number) not in versions:
        known = ", ".join(map(str, versions)) or "none"
        raise storage.NotFound(f"model {name} has no version {number}; it has {known}")
    return versions[int(number)]


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of a registered model, the oldest first."""
    found = client.search_model_versions(f"name='{name}'")
    return sorted(found, key=lambda version: int(version.version))


def _aliases(client: MlflowClient, name: str) -> dict[str, int]:
    """Aliases of a registered model; none if there is no such model."""
    found = client.search_registered_models(f"name='{name}'")
    return {alias: int(version) for alias, version in found[0].aliases.items()} if found else {}


def _known(aliases: dict[str, int]) -> str:
    return ", ".join(f"{alias} (version {version})" for alias, version in sorted(aliases.items())) or "none"


def _now() -> str:
    return str(time.time_ns() // 10**6)
