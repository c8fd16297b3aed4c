"""What a run measures, in MLflow: one parent run per pipeline run, one child below it per step.

Runs are found again by tag, so a step that is repeated continues its own curves. What a training loop says
is sent beside it, and again where the server is away for a while, so that no curve has a gap; a server that
is not there at the start is an error.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import re
import tempfile
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from model.errors import Stopped, Unavailable, UserError
from model.plumbing import environment, leases, provenance
from model.plumbing.jobs import TrackingIds

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from mlflow.store.entities import PagedList
    from PIL import Image

    from model.plumbing.assets import Manifest

logger = logging.getLogger(__name__)
T = TypeVar("T")

RUN_TAG, STEP_TAG = "latent_gpt.pipeline_run", "latent_gpt.step"
FAILURE_TAG = "latent_gpt.failure"  # why a run has failed
GIVEN_UP = "its step ended without a word, or no next one came"
ASSET_TAG = "latent_gpt.asset."  # and the step's name, on a parent run: URI of what the step makes
REUSED_TAG = "latent_gpt.reused"  # of a step's run: there was nothing to do
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: below which run it is shown
PIPELINE = "pipeline"  # STEP_TAG of a parent run
OPENING = "mlflow/opening"  # lock: of the finding and creating of runs, by all steps
PATIENCE = 120.0  # seconds to get through what is left when a run ends: longer than a server's restart
HASTE = 20.0  # the same for a process that was told to end
AGAIN = 2.0  # seconds until a message is sent again
AT_ONCE = 1000  # figures in one message, at most: MLflow's limit; finds in one answer
TRIAL = "preflight"  # name of what is made only to see whether it can be

# Set wherever MLflow is used, by us and by the servers we start. Artifacts go through the tracking server:
# left to itself the client asks the server for presigned URLs and then hangs where it cannot reach the S3
# behind it. Requests are repeated for about a minute, which outlives a restart.
MLFLOW_SETTINGS = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # our own lines say how far a step is
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it is the server's address for us, not for people
}


def mlflow_client() -> MlflowClient:
    """A client of the tracking server that the environment names.

    Raises:
        UserError: it names none, or it does not answer.
    """
    check_server()
    environment.put(MLFLOW_SETTINGS)
    from mlflow import MlflowClient

    uri = environment.MLFLOW_TRACKING_URI.get()
    return MlflowClient(tracking_uri=uri, registry_uri=environment.MLFLOW_REGISTRY_URI.get() or uri)


def check_server(patience: float = 10.0) -> None:
    """Ask the tracking server for something that needs its database.

    Args:
        patience: seconds to wait for the answer.

    Raises:
        UserError: `MLFLOW_TRACKING_URI` is missing or wrong, or the server does not answer as MLflow does.
    """
    _ask("experiments/search", patience, max_results=1)


def refused_hosts(patience: float) -> list[str]:
    """Of the server's name with and without its port those by which it does not take questions."""
    address = urllib.parse.urlsplit(environment.MLFLOW_TRACKING_URI.get())
    port = address.port or {"https": 443}.get(address.scheme, 80)
    refused = []
    for host in (f"{address.hostname}", f"{address.hostname}:{port}"):
        try:
            _ask("experiments/search", patience, host=host, max_results=1)
        except UserError as error:
            if "Invalid Host header" in str(error):
                refused.append(host)
    return refused


def _ask(what: str, patience: float, method: str = "POST", host: str = "", **question: Any) -> dict[str, Any]:
    """Put a question to the server with the settings that MLflow's client has, and none of its patience.

    Args:
        what: the path, below that of the API.
        patience: seconds to wait.
        method: GET or POST.
        host: what to call the server; empty: as the address does.
        question: its fields.
    """
    import requests

    uri = environment.MLFLOW_TRACKING_URI.get()
    if not uri.startswith(("http://", "https://")):
        raise UserError(
            f"MLFLOW_TRACKING_URI is '{uri}'; it must name an MLflow server, e.g. http://127.0.0.1:5000"
        )
    anything = environment.MLFLOW_TRACKING_INSECURE_TLS.get().lower() in ("true", "1")
    try:
        answer = requests.request(
            method,
            f"{uri.rstrip('/')}/api/2.0/mlflow/{what}",
            **{"json" if method == "POST" else "params": question},
            headers=_authorization() | ({"Host": host} if host else {}),
            timeout=patience,
            verify=False if anything else environment.MLFLOW_TRACKING_SERVER_CERT_PATH.get() or True,
            cert=environment.MLFLOW_TRACKING_CLIENT_CERT_PATH.get() or None,
        )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found
    except requests.HTTPError as error:
        said, code = " ".join(error.response.text[:200].split()), error.response.status_code
        if code == 401:
            right = "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        elif code == 403:
            right = (
                "check the permissions, and that the server was started with --allowed-hosts for this name"
            )
        else:
            right = "check that MLFLOW_TRACKING_URI names an MLflow server"
        kind = Unavailable if code >= 500 or code == 429 else UserError
        raise kind(f"MLflow at {uri} answers {code} ({said}); {right}") from None
    except requests.exceptions.JSONDecodeError:
        raise UserError(f"{uri} does not answer as MLflow does; check MLFLOW_TRACKING_URI") from None
    except requests.exceptions.SSLError as error:
        raise UserError(
            f"MLflow at {uri}: {reason(error)}; if its certificate is signed by an authority of yours, set"
            " MLFLOW_TRACKING_SERVER_CERT_PATH to that one's file"
        ) from None
    except requests.exceptions.ProxyError as error:
        raise UserError(
            f"MLflow at {uri} cannot be reached through the proxy that HTTP_PROXY or HTTPS_PROXY names"
            f" ({reason(error)}); mend that, or name the host in NO_PROXY"
        ) from None
    except OSError as error:  # as all that requests raises is
        raise Unavailable(
            f"MLflow at {uri} cannot be reached ({reason(error)}); check that it runs, and"
            " MLFLOW_TRACKING_URI"
        ) from None


def reason(error: BaseException) -> str:
    """The failure that requests and urllib3 have wrapped."""
    below = error.__context__
    while below:
        if isinstance(below, OSError):
            error = below
        below = below.__context__
    return " ".join(str(error).split())


QUICK_ANSWER = 5.0  # seconds to wait for one that nothing depends on
# Of those that are only a try: who does not answer soon is down.
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


def check_models(experiment: str) -> None:
    """Make a logged model, which MLflow has from version 3 on, and look into the registry.

    Raises:
        UserError: one or the other is not there.
    """
    client = mlflow_client()
    registry = environment.MLFLOW_REGISTRY_URI.get() or environment.MLFLOW_TRACKING_URI.get()
    with environment.within(QUICK):
        with explained("; models need MLflow 3 or newer"):
            model = client.create_logged_model(_experiment(client, experiment), TRIAL)
            client.delete_logged_model(model.model_id)
        with explained(f"; MLFLOW_REGISTRY_URI or MLFLOW_TRACKING_URI names the registry {registry}"):
            client.search_registered_models(max_results=1)


def check_artifacts(experiment: str) -> None:
    """Keep an artifact, read it back and remove it.

    Raises:
        UserError: that fails; says where the server wants artifacts to be.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = mlflow_client()
    uri = environment.MLFLOW_TRACKING_URI.get()
    with environment.within(QUICK), explained(), tempfile.TemporaryDirectory() as folder:
        run = client.create_run(_experiment(client, experiment), run_name=TRIAL).info
        place = run.artifact_uri
        try:
            client.log_text(run.run_id, TRIAL, TRIAL)
            found = Path(client.download_artifacts(run.run_id, TRIAL, folder)).read_text()
            if "://" not in place.removeprefix("file://"):  # written by us: the same disk as the server's?
                known = _ask("artifacts/list", 5.0, method="GET", run_id=run.run_id)
                found = found if known.get("files") else "nothing"
            get_artifact_repository(place, tracking_uri=uri).delete_artifacts(TRIAL)
        except Exception as error:  # file systems, S3 and whatever else an artifact root can be
            found = " ".join(str(error).split())[:300]
        client.delete_run(run.run_id)
    if found != TRIAL:
        raise UserError(
            f"MLflow at {uri} wants artifacts at {place}, and one that is written there is not found by both"
            f" sides ({found}); start the server with --serve-artifacts and an --artifacts-destination"
        )


def _authorization() -> dict[str, str]:
    if token := environment.MLFLOW_TRACKING_TOKEN.get():
        return {"Authorization": f"Bearer {token}"}
    if user := environment.MLFLOW_TRACKING_USERNAME.get():
        both = f"{user}:{environment.MLFLOW_TRACKING_PASSWORD.get()}"
        return {"Authorization": f"Basic {base64.b64encode(both.encode()).decode()}"}
    return {}


class _Outbox:
    """Messages to the server, sent in order by a thread beside the training, each until it is through."""

    def __init__(self, log: Callable[[list[Metric]], object]) -> None:
        """
        Args:
            log: sends figures; those that wait together are sent together.
        """
        self.lost = 0  # messages that the server refused, or that were given up
        self._log = log
        self._waiting: deque[list[Metric] | Callable[[], object] | None] = deque()
        self._under_way = 0
        self._changed = threading.Condition()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, message: list[Metric] | Callable[[], object]) -> None:
        """Send figures, or call what sends something else, in a while."""
        with self._changed:
            self._waiting.append(message)
            self._changed.notify()

    def close(self, patience: float) -> None:
        """Wait until all is sent, so many seconds at most; the rest is lost."""
        with self._changed:
            self._waiting.append(None)
            self._changed.notify()
        self._thread.join(patience)
        with self._changed:
            if self._thread.is_alive():
                self._given_up.set()
                self.lost += self._under_way + len(self._waiting) - 1
                self._waiting.clear()

    def _work(self) -> None:
        while (message := self._next()) is not None:
            if isinstance(message, list):
                figures = message
                self._deliver(lambda figures=figures: self._log(figures))  # type: ignore[misc]
            else:
                self._deliver(message)

    def _next(self) -> list[Metric] | Callable[[], object] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            message = self._waiting.popleft()
            self._under_way = 1
            if isinstance(message, list):
                message = list(message)
                while self._waiting:
                    more = self._waiting[0]
                    if not isinstance(more, list) or len(message) + len(more) > AT_ONCE:
                        break
                    message += more
                    self._waiting.popleft()
                    self._under_way += 1
            return message

    def _deliver(self, send: Callable[[], object]) -> None:
        said = False
        while not self._given_up.is_set():
            try:
                send()
                return
            except Exception as error:  # whatever MLflow raises: training goes on
                what = " ".join(str(error).split())[:200]
                if not _may_pass(error):
                    self.lost += self._under_way
                    logger.warning("MLflow did not take a message: %s", what)
                    return
                if not said:
                    logger.warning("MLflow does not answer for now, and is told later: %s", what)
                said = True
            self._given_up.wait(AGAIN)


def _may_pass(error: Exception) -> bool:
    """Whether the same message may get through later."""
    from mlflow.exceptions import MlflowException

    status = 0
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, OSError):  # as all that requests raises is
        status = getattr(getattr(error, "response", None), "status_code", 503)
    return status >= 500 or status == 429


class Tracker:
    """The run of one step. A context manager: leaving it ends the run, as FAILED by an exception, as
    KILLED where it was told to.

    Once it stands, nothing here raises or waits for a server's sake: what did not get through is reported in
    a warning when the run ends. What MLflow knows of a machine (CPU, memory, disk, network, GPU) is measured
    beside the step's own figures.
    """

    def __init__(self, ids: TrackingIds, params: dict[str, Any] | None = None, enabled: bool = True) -> None:
        """Find or create the run.

        Args:
            ids: experiment, pipeline run and step.
            params: nested settings, flattened to `section.field`.
            enabled: False tracks nothing (every rank but one).

        Raises:
            UserError: MLflow cannot be reached.
        """
        self.enabled = enabled
        self.lost = 0  # messages that did not get through
        if not enabled:
            return
        client = self._client = mlflow_client()
        with explained():
            parent = open_pipeline_run(ids.experiment, ids.run)
            run, found = _open(client, ids.experiment, ids.run, ids.step, parent)
            self.run_id: str = run
            if params and not (found and client.get_run(run).data.params):
                _log_params(client, run, params)
        self._outbox = _Outbox(lambda figures: client.log_batch(run, figures))
        self._stop_measuring = _measure_machine(run)

    def metrics(self, step: int, **values: float) -> None:
        """Log figures of an optimiser step."""
        if not self.enabled:
            return
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._outbox.put([Metric(name, float(value), now, step) for name, value in values.items()])

    def reads(self, data: Iterable[Manifest], context: str) -> None:
        """Show what the step reads of data, for what."""
        if self.enabled:
            shown = list(data)
            self._outbox.put(lambda: log_data(self._client, self.run_id, shown, context))

    def image(self, name: str, image: Image.Image) -> None:
        """Keep a picture under an artifact name such as `samples/step-500.png`."""
        if self.enabled:
            self._outbox.put(lambda: self._client.log_image(self.run_id, image, artifact_file=name))

    def text(self, name: str, text: str) -> None:
        """Keep a text, e.g. `report.html`."""
        if self.enabled:
            self._outbox.put(lambda: self._client.log_text(self.run_id, text, name))

    def finish(self, status: str = "FINISHED") -> None:
        """Send what is left, report what was lost, and end the run as FINISHED, FAILED or KILLED."""
        if not self.enabled:
            return
        self._outbox.put(self._stop_measuring)
        self._outbox.put(lambda: self._client.set_terminated(self.run_id, status))
        self._outbox.close(HASTE if status == "KILLED" else PATIENCE)
        self.lost = self._outbox.lost
        if self.lost:
            logger.warning("%d messages to MLflow were lost; what it shows of this run has gaps", self.lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            broken = issubclass(kind, Exception) and not issubclass(kind, Stopped)
            self.finish("FAILED" if broken else "KILLED")


def _measure_machine(run_id: str) -> Callable[[], object]:
    """Have MLflow measure this machine beside a run, every ten seconds; returns what ends it."""
    name = "mlflow.system_metrics.system_metrics_monitor"
    logging.getLogger(name).setLevel(logging.WARNING)  # it says that it starts, and that it ends
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    except ImportError as error:  # of psutil, which MLflow does not ask for
        logger.warning("this machine is not measured: %s", error)
        return lambda: None
    uri = environment.MLFLOW_TRACKING_URI.get()
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor.finish


def log_data(client: MlflowClient, run_id: str, data: Iterable[Manifest], context: str) -> None:
    """Show what a run reads as its datasets; the same ones once."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    shown = [provenance.dataset(one, context) for one in data if one.kind in provenance.DATA]
    inputs = [
        DatasetInput(Dataset(**one["dataset"]), [InputTag(tag["key"], tag["value"]) for tag in one["tags"]])
        for one in shown
    ]
    if inputs:
        client.log_inputs(run_id, inputs)


def open_pipeline_run(
    experiment: str, run: str, params: dict[str, Any] | None = None, tags: dict[str, str] | None = None
) -> str:
    """The id of a pipeline run's parent run, found by tag in any experiment; else the one that KFP has opened
    in MLflow, or a new one in this experiment.

    Args:
        experiment: its name.
        run: of the pipeline.
        params: nested settings of a new one.
        tags: of a new one.

    Raises:
        UserError: MLflow cannot be reached.
    """
    client = mlflow_client()
    with explained():
        parent, found = _open(client, experiment, run, PIPELINE, parent="", tags=tags)
        if params and not found:
            _log_params(client, parent, params)
    return parent


def address(run_id: str) -> str:
    """Where people open a run.

    Raises:
        UserError: MLflow cannot be reached.
    """
    with explained():
        experiment = mlflow_client().get_run(run_id).info.experiment_id
    server = environment.MLFLOW_UI.get() or environment.MLFLOW_TRACKING_URI.get()
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def finish_pipeline_run(
    run: str, status: str = "FINISHED", tags: dict[str, str] | None = None, step: str = ""
) -> None:
    """End a pipeline run's parent run as FINISHED, FAILED or KILLED; no parent run is no error.

    Args:
        run: of the pipeline.
        status: how it ended.
        tags: of it.
        step: whose run below it ends likewise, with the same tags, if nobody has ended it yet.

    Raises:
        UserError: MLflow cannot be reached.
    """
    client = mlflow_client()
    with explained():
        for name in (PIPELINE, *([step] if step else [])):
            found = _find(client, run, name)
            if not found or (name == step and found.info.status == "FINISHED"):
                continue
            for tag, value in (tags or {}).items():
                client.set_tag(found.info.run_id, tag, value)
            if name == PIPELINE or found.info.status == "RUNNING":
                client.set_terminated(found.info.run_id, status)


def kill_pipeline_run(run: str) -> bool:
    """End all that still runs of a pipeline run, steps too, as KILLED; returns whether anything did.

    Raises:
        UserError: MLflow cannot be reached.
    """
    client = mlflow_client()
    query = f"tags.`{RUN_TAG}` = '{_quoted(run)}' and attributes.status = 'RUNNING'"
    with explained():
        experiments = _experiments(client)
        found = client.search_runs(experiments, query)
        for one in found:
            client.set_tag(one.info.run_id, FAILURE_TAG, GIVEN_UP)
            client.set_terminated(one.info.run_id, "KILLED")
    return bool(found)


def reopen_pipeline_run(run: str) -> None:
    """Have a pipeline run go on that was ended as KILLED; its steps do so themselves.

    Raises:
        UserError: MLflow cannot be reached.
    """
    client = mlflow_client()
    with explained():
        found = _find(client, run, PIPELINE)
        if found and found.info.status == "KILLED":
            _go_on(client, found)


def failed_runs(experiment: str, tags: Mapping[str, str]) -> list[tuple[float, str]]:
    """The last runs of a pipeline that have these tags, as far back as they failed; the newest comes first.

    Those that were told to end say nothing, and are passed over; those that were given up have failed.

    Returns:
        Of each, when it ended in seconds since 1970, and why.

    Raises:
        UserError: MLflow cannot be reached.
    """
    client = mlflow_client()
    wanted = {STEP_TAG: PIPELINE, **tags}
    query = " and ".join(f"tags.`{name}` = '{_quoted(value)}'" for name, value in wanted.items())
    found: list[tuple[float, str]] = []
    with explained():
        known = client.get_experiment_by_name(experiment)
        ids = [known.experiment_id] if known else []
        order = ["attributes.start_time DESC"]
        for one in client.search_runs(ids, query, order_by=order, max_results=AT_ONCE) if ids else ():
            if one.info.status == "FAILED" or one.data.tags.get(FAILURE_TAG) == GIVEN_UP:
                found.append((one.info.end_time / 1000, one.data.tags.get(FAILURE_TAG, "nobody knows")))
            elif one.info.status != "KILLED":
                break
    return found


def deleted_runs() -> dict[str, str]:
    """The runs that are marked as deleted, and where their artifacts are.

    Raises:
        UserError: MLflow cannot be reached.
    """
    from mlflow.entities import ViewType

    client = mlflow_client()
    with explained():
        experiments = _experiments(client, view_type=ViewType.ALL)
        if not experiments:
            return {}
        found = all_found(client.search_runs, experiment_ids=experiments, run_view_type=ViewType.DELETED_ONLY)
    return {one.info.run_id: one.info.artifact_uri for one in found}


def note_asset(run: str, step: str, uri: str) -> None:
    """Note on a pipeline run what one of its steps makes, or finds made: there its job's logs are.

    Asks quickly and without MLflow's client, which takes long to load. No such run is no error.

    Raises:
        UserError: MLflow cannot be reached.
    """
    for one in _runs_quickly(run, PIPELINE):
        _ask("runs/set-tag", QUICK_ANSWER, run_id=one["run_id"], key=ASSET_TAG + step, value=uri)


def note_made(
    run: str,
    made: Manifest,
    reused: bool,
    figures: Mapping[str, float],
    data: Iterable[Manifest],
    seconds: float,
    step: str = "",
) -> None:
    """Have the step that makes an asset stand below its pipeline's run, also where there was nothing to do.

    As `note_asset`. A job has a run of its own, which says more; what was reused, or is no job's, gets one.

    Args:
        run: of the pipeline.
        made: the asset.
        reused: it was there before.
        figures: of the asset.
        data: what it was made from.
        seconds: that it took.
        step: its name within the run; "" is the asset's kind.

    Raises:
        UserError: MLflow cannot be reached.
    """
    step = step or made.kind
    parents = _runs_quickly(run, PIPELINE)
    for parent in parents[:1]:
        if made.kind == "images":
            _ask("runs/log-inputs", QUICK_ANSWER, run_id=parent["run_id"], **_as_inputs([made], "images"))
        if _runs_quickly(run, step):
            continue
        now = int(1000 * time.time())
        start = now - max(1, int(1000 * seconds))
        tags = {RUN_TAG: run, STEP_TAG: step, PARENT_TAG: parent["run_id"], **provenance.tags()}
        tags |= {REUSED_TAG: "yes"} if reused else {}
        asked = {"experiment_id": parent["experiment_id"], "run_name": step, "start_time": start}
        asked["tags"] = [{"key": name, "value": value} for name, value in tags.items()]
        child = _ask("runs/create", QUICK_ANSWER, **asked)["run"]["info"]["run_id"]
        shown = [{"key": name, "value": one, "timestamp": now, "step": 0} for name, one in figures.items()]
        _ask("runs/log-batch", QUICK_ANSWER, run_id=child, metrics=shown)
        if inputs := _as_inputs(data, made.kind):
            _ask("runs/log-inputs", QUICK_ANSWER, run_id=child, **inputs)
        _ask("runs/update", QUICK_ANSWER, run_id=child, status="FINISHED", end_time=now)


def attach(run: str, step: str) -> None:
    """Take the run that KFP has opened in MLflow for this step, unless the step has one; as `note_asset`.

    Raises:
        UserError: MLflow cannot be reached.
    """
    named = provenance.named_by_kfp().step
    if not named or _runs_quickly(run, step):
        return
    for tag, value in {RUN_TAG: run, STEP_TAG: step, **provenance.tags()}.items():
        _ask("runs/set-tag", QUICK_ANSWER, run_id=named, key=tag, value=value)


def _as_inputs(data: Iterable[Manifest], context: str) -> dict[str, Any]:
    shown = [provenance.dataset(one, context) for one in data if one.kind in provenance.DATA]
    return {"datasets": shown} if shown else {}


def _runs_quickly(run: str, step: str) -> list[dict[str, Any]]:
    """What MLflow says of the runs with these tags, the first one first; without its client."""
    ids: list[str] = []
    page = ""
    while True:
        found = _ask("experiments/search", QUICK_ANSWER, max_results=AT_ONCE, page_token=page)
        ids += [one["experiment_id"] for one in found.get("experiments", [])]
        page = found.get("next_page_token", "")
        if not page:
            break
    query = f"tags.`{RUN_TAG}` = '{_quoted(run)}' and tags.`{STEP_TAG}` = '{_quoted(step)}'"
    runs = _ask("runs/search", QUICK_ANSWER, experiment_ids=ids, filter=query).get("runs", [])
    return sorted((one["info"] for one in runs), key=lambda one: (one["start_time"], one["run_id"]))


def assets_noted(run: str) -> tuple[bool, dict[str, str]]:
    """Of a pipeline run, by its name or its id: whether it runs, and URIs of what its steps make, by step.

    Raises:
        UserError: MLflow cannot be reached, or knows no such run.
    """
    client = mlflow_client()
    with explained():
        found = _find(client, run, PIPELINE)
        if not found and re.fullmatch("[0-9a-f]{32}", run):
            with contextlib.suppress(KeyError):  # another run, of nobody's pipeline
                named = client.get_run(run).data.tags[RUN_TAG]
                found = _find(client, named, PIPELINE)
    if not found:
        raise UserError(
            f"MLflow at {environment.MLFLOW_TRACKING_URI.get()} knows no pipeline run '{run}'; give its name"
            " or its id, as MLflow shows them"
        )
    return found.info.status == "RUNNING", _noted(found.data.tags)


@dataclass(frozen=True)
class StepRun:
    """What is known of a step's run."""

    step: str
    seconds: float  # from its start to its end, if it ended well; else 0


@dataclass(frozen=True)
class PipelineRun:
    """What is known of a pipeline's run."""

    steps: list[StepRun]  # in the order in which they began
    assets: dict[str, str]  # URIs of what they make, by step
    failure: str  # why it failed; "": it did not


def pipeline_run(job: str) -> PipelineRun:
    """What MLflow knows of the run with this id in KFP, by which its name ends.

    Raises:
        UserError: MLflow cannot be reached, or knows no such run.
    """
    client = mlflow_client()
    query = f"tags.`{RUN_TAG}` LIKE '%-{_quoted(job)}'"
    with explained():
        experiments = _experiments(client)
        found = client.search_runs(experiments, query, order_by=["attributes.start_time ASC"])
    if not found:
        raise UserError(f"MLflow at {environment.MLFLOW_TRACKING_URI.get()} knows no run of {job}")
    steps, assets, failure = [], {}, ""
    for one in found:
        step, tags = one.data.tags[STEP_TAG], one.data.tags
        if step == PIPELINE:
            failure = tags.get(FAILURE_TAG, "")
            assets = _noted(tags)
        else:
            well = one.info.status == "FINISHED"
            seconds = (one.info.end_time - one.info.start_time) / 1000 if well else 0.0
            steps.append(StepRun(step, seconds))
    return PipelineRun(steps, assets, failure)


def _noted(tags: dict[str, str]) -> dict[str, str]:
    return {tag.removeprefix(ASSET_TAG): uri for tag, uri in tags.items() if tag.startswith(ASSET_TAG)}


def _open(
    client: MlflowClient,
    experiment: str,
    run: str,
    step: str,
    parent: str,
    tags: dict[str, str] | None = None,
) -> tuple[str, bool]:
    """Find a run by its tags, take KFP's, or create it: (id, whether it was there with our tags already)."""
    if found := _find(client, run, step):
        _go_on(client, found)
        return found.info.run_id, True
    # Steps may start side by side, and MLflow takes two runs of the same tags, in any order of their times.
    with leases.alone(step, OPENING, "waits for a step that begins, too"):
        if found := _find(client, run, step):
            return found.info.run_id, True
        tags = {RUN_TAG: run, STEP_TAG: step, **provenance.tags(), **(tags or {})}
        if named := _named(client, step):
            for tag, value in tags.items():
                client.set_tag(named, tag, value)
            return named, False
        if parent:
            tags[PARENT_TAG] = parent
        name = step if parent else run
        made = client.create_run(_experiment(client, experiment), tags=tags, run_name=name)
        return str(made.info.run_id), False


def _named(client: MlflowClient, step: str) -> str:
    """The id of the run that KFP has opened in MLflow, if it has, and no other step has taken it."""
    from mlflow.exceptions import MlflowException

    found = provenance.named_by_kfp()
    named = found.pipeline if step == PIPELINE else found.step
    with contextlib.suppress(MlflowException):  # it is another server's
        if named and STEP_TAG not in client.get_run(named).data.tags:
            return named
    return ""


def _go_on(client: MlflowClient, found: Run) -> None:
    """Have a run that has ended go on, without the failure of its earlier try."""
    client.update_run(found.info.run_id, status="RUNNING")
    if FAILURE_TAG in found.data.tags:
        client.delete_tag(found.info.run_id, FAILURE_TAG)


def _find(client: MlflowClient, run: str, step: str) -> Run | None:
    experiments = _experiments(client)
    query = f"tags.`{RUN_TAG}` = '{_quoted(run)}' and tags.`{STEP_TAG}` = '{_quoted(step)}'"
    runs = client.search_runs(experiments, query, order_by=["attributes.start_time ASC"], max_results=10)
    return min(runs, key=lambda one: (one.info.start_time, one.info.run_id), default=None)


def _experiments(client: MlflowClient, **query: Any) -> list[str]:
    """The ids of all experiments; of those that are not marked as deleted, unless `query` says so."""
    return [one.experiment_id for one in all_found(client.search_experiments, **query)]


def all_found(search: Callable[..., PagedList[T]], **query: Any) -> list[T]:
    """All that a search of MLflow's client finds, page by page. Raises MlflowException: see `explained`."""
    found: list[T] = []
    page = ""
    while True:
        some = search(**query, max_results=AT_ONCE, page_token=page)
        found += some
        page = some.token or ""
        if not page:
            return found


def _quoted(text: str) -> str:
    if "'" in text:
        raise UserError(f"run and step names go into MLflow queries; '{text}' must not hold a quote")
    return text


def _experiment(client: MlflowClient, name: str) -> str:
    """The id of an experiment, created if need be, undeleted if somebody deleted it."""
    from mlflow.exceptions import MlflowException

    for _ in range(2):
        if found := client.get_experiment_by_name(name):
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        with contextlib.suppress(MlflowException):  # somebody was quicker
            return client.create_experiment(name)
    raise UserError(f"MLflow does not let experiment '{name}' be created; check the permissions")


def _log_params(client: MlflowClient, run_id: str, params: dict[str, Any]) -> None:
    from mlflow.entities import Param

    flat = [Param(name, str(value)[:6000]) for name, value in flatten(params).items()]
    for start in range(0, len(flat), 100):  # MLflow's limit
        client.log_batch(run_id, params=flat[start : start + 100])


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` is `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@contextlib.contextmanager
def explained(right: str = "") -> Iterator[None]:
    """Turn MLflow's refusals into one line, which ends with what would be right."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        what = " ".join(str(error).split())[:300]
        kind = Unavailable if error.get_http_status_code() >= 500 else UserError  # as are broken connections
        raise kind(f"MLflow at {environment.MLFLOW_TRACKING_URI.get()} refuses: {what}{right}") from None
