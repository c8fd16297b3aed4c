"""The API of Kubeflow Pipelines: what is uploaded there, what runs, and what it says when it refuses.

It tells neither outputs nor reasons of a run, which `runs` finds elsewhere. A KFP with one user keeps all
runs in its own namespace; one with several wants a namespace with each question.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import requests

from model.errors import Unavailable, UserError
from model.plumbing import environment
from model.plumbing.tracking import reason

PATIENCE = (5.0, 60.0)  # seconds to reach the server, and to wait for its answer
PAGE = 100  # entries in one answer
ENDED = ("succeeded", "failed", "cancelled", "skipped")
WORDS = {"CANCELED": "cancelled", "CANCELING": "being cancelled"}  # for the others, KFP's own


@dataclass(frozen=True)
class Run:
    """A run as KFP knows it."""

    id: str
    name: str
    state: str  # in our words: pending, running, being cancelled, or one of `ENDED`
    began: float  # it was submitted, in seconds since 1970
    ended: float  # 0: it has not
    pipeline: str = ""  # id
    version: str = ""  # id; "": the pipeline was handed over with the run
    tasks: tuple[str, ...] = ()  # its steps, if it was
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen of itself."""
        return self.state in ENDED


@dataclass(frozen=True)
class Recurring:
    """A recurring run as KFP knows it."""

    id: str
    name: str
    cron: str  # six fields, seconds first
    paused: bool
    made: float  # in seconds since 1970
    pipeline: str = ""  # id
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Uploaded:
    """A version of a pipeline."""

    pipeline: str  # id
    version: str  # its name
    new: bool  # whether it was not there before


class Kfp:
    """One KFP, by its address."""

    def __init__(self, endpoint: str, token: str, namespace: str) -> None:
        """
        Args:
            endpoint: address of the API, without `/apis/…`.
            token: for a KFP with a login; "": none.
            namespace: of our runs, where KFP has several users.

        Raises:
            UserError: there is no KFP at this address, or it does not let us in.
        """
        self.endpoint = endpoint.rstrip("/")
        self._session = requests.Session()
        if token.strip():
            self._session.headers["Authorization"] = f"Bearer {token.strip()}"
        self.several_users = bool(self._ask("GET", "healthz").get("multi_user"))
        self.namespace = namespace if self.several_users else ""

    # ── what is uploaded ────────────────────────────────────────────────────────────────────────────────

    def pipeline(self, name: str) -> str:
        """The id of a pipeline; "": there is none of this name."""
        try:
            found = self._ask("GET", f"pipelines/names/{name}", namespace=self.namespace)
        except _NotFound:
            return ""
        return str(found["pipeline_id"])

    def versions(self, pipeline: str) -> list[dict[str, Any]]:
        """Versions of a pipeline by its id, the newest first: `name`, `pipeline_version_id` …"""
        return list(
            self._all(f"pipelines/{pipeline}/versions", "pipeline_versions", sort_by="created_at desc")
        )

    def upload(self, name: str, package: Path, description: str) -> Uploaded:
        """Make a compiled pipeline the newest version of the pipeline of this name; one that is, stays.

        Raises:
            UserError: KFP does not take it.
        """
        content = hashlib.sha256(package.read_bytes()).hexdigest()[:12]
        pipeline = self.pipeline(name)
        if not pipeline:
            made = {"name": name, "display_name": name, "description": description}
            if self.namespace:
                made["namespace"] = self.namespace
            pipeline = str(self._ask("POST", "pipelines", body=made)["pipeline_id"])
        before = [_name(one) for one in self.versions(pipeline)]
        if before and before[0].partition("-")[0] == content:
            return Uploaded(pipeline, before[0], new=False)
        # An older content that comes again is the newest version again, so it needs another name.
        count = sum(one.partition("-")[0] == content for one in before)
        version = f"{content}-{count + 1}" if count else content
        with package.open("rb") as file:
            self._ask(
                "POST",
                "pipelines/upload_version",
                files={"uploadfile": (f"{name}.yaml", file)},
                name=version,
                pipelineid=pipeline,
                description=description,
            )
        return Uploaded(pipeline, version, new=True)

    def remove(self, name: str) -> bool:
        """Remove a pipeline with all of its versions, not its runs; returns whether there was one."""
        pipeline = self.pipeline(name)
        if not pipeline:
            return False
        for one in self.versions(pipeline):
            self._ask("DELETE", f"pipelines/{pipeline}/versions/{one['pipeline_version_id']}")
        self._ask("DELETE", f"pipelines/{pipeline}")
        return True

    # ── what runs ───────────────────────────────────────────────────────────────────────────────────────

    def submit(self, pipeline: str, name: str, parameters: dict[str, Any]) -> str:
        """Start a run of a pipeline's newest version; returns its id.

        Args:
            pipeline: its id.
            name: of the run, for people.
            parameters: of the pipeline; those left out have its defaults.

        Raises:
            UserError: the pipeline has no version, or KFP refuses a parameter.
        """
        body = {
            "display_name": name,
            "pipeline_version_reference": self._newest(pipeline),
            "runtime_config": {"parameters": parameters},
        }
        if self.several_users:
            body["experiment_id"] = self._experiment()
        return str(self._ask("POST", "runs", body=body)["run_id"])

    def runs(self, pipelines: set[str], count: int) -> list[Run]:
        """The newest runs of these pipelines (ids), so many at most, the newest first."""
        found = []
        for one in self._all("runs", "runs", sort_by="created_at desc", namespace=self.namespace):
            run = _run(one)
            if run.pipeline in pipelines:
                found.append(run)
            if len(found) == count:
                break
        return found

    def run(self, identity: str) -> Run:
        """A run by its id.

        Raises:
            UserError: there is none.
        """
        return _run(self._ask("GET", f"runs/{identity}"))

    def tasks(self, run: Run) -> list[str]:
        """Names of the steps of a run; none where its version is gone."""
        if run.tasks or not run.version:
            return list(run.tasks)
        try:
            found = self._ask("GET", f"pipelines/{run.pipeline}/versions/{run.version}")
        except _NotFound:
            return []
        return list(_tasks(found))

    def terminate(self, identity: str) -> None:
        """Have a run end; its steps are told."""
        self._ask("POST", f"runs/{identity}:terminate")

    def retry(self, identity: str) -> None:
        """Have a run that failed or was cancelled go on where it stopped."""
        self._ask("POST", f"runs/{identity}:retry")

    # ── what starts of itself ───────────────────────────────────────────────────────────────────────────

    def recurring(self, pipelines: set[str]) -> list[Recurring]:
        """The recurring runs of these pipelines (ids), the newest first."""
        asked = {"sort_by": "created_at desc", "namespace": self.namespace}
        found = map(_recurring, self._all("recurringruns", "recurringRuns", **asked))
        return [one for one in found if one.pipeline in pipelines]

    def repeat(
        self, pipeline: str, name: str, cron: str, description: str, parameters: dict[str, Any]
    ) -> str:
        """Have runs of a pipeline's newest version start at the times of a cron; returns an id for that.

        One runs at a time, and what was missed is not made up for. KFP cannot change a recurring run.

        Args:
            pipeline: its id.
            name: of the recurring run, for people; there may be another one of that name.
            cron: six fields.
            description: for people.
            parameters: of the pipeline.

        Raises:
            UserError: the pipeline has no version, or KFP refuses.
        """
        body = {
            "display_name": name,
            "description": description,
            "pipeline_version_reference": self._newest(pipeline),
            "runtime_config": {"parameters": parameters},
            "trigger": {"cron_schedule": {"cron": cron}},
            "max_concurrency": "1",
            "no_catchup": True,
            "mode": "ENABLE",
        }
        if self.several_users:
            body["experiment_id"] = self._experiment()
        return str(self._ask("POST", "recurringruns", body=body)["recurring_run_id"])

    def pause(self, recurring: str, paused: bool = True) -> None:
        """Have no more runs start of a recurring run, or again some."""
        self._ask("POST", f"recurringruns/{recurring}:{'disable' if paused else 'enable'}")

    def stop(self, recurring: str) -> None:
        """Delete a recurring run; what it started goes on, as Kubernetes is told not to take it along."""
        self._ask("DELETE", f"recurringruns/{recurring}", propagation_policy="ORPHAN")

    def page(self, identity: str) -> str:
        """Where a run is looked at; "": KFP's page is not at the address of its API, which it passes on."""
        try:
            answer = self._session.get(f"{self.endpoint}/", timeout=PATIENCE[0], allow_redirects=False)
        except OSError:
            return ""
        shown = answer.ok and "text/html" in answer.headers.get("Content-Type", "")
        return f"{self.endpoint}/#/runs/details/{identity}" if shown else ""

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────

    def _newest(self, pipeline: str) -> dict[str, str]:
        """How KFP is told of a pipeline's newest version."""
        versions = self.versions(pipeline)
        if not versions:
            raise UserError(f"KFP at {self.endpoint} has no version of this pipeline; `make upload` first")
        return {"pipeline_id": pipeline, "pipeline_version_id": str(versions[0]["pipeline_version_id"])}

    def _experiment(self) -> str:
        """The id of the experiment of our runs, which a KFP with several users wants to be named."""
        named = "latent-gpt"
        for one in self._all("experiments", "experiments", namespace=self.namespace):
            if one.get("display_name") == named:
                return str(one["experiment_id"])
        made = {"display_name": named, "namespace": self.namespace}
        return str(self._ask("POST", "experiments", body=made)["experiment_id"])

    def _all(self, what: str, named: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Entries of a list, page after page."""
        token = ""
        while True:
            answer = self._ask("GET", what, page_size=str(PAGE), page_token=token, **query)
            yield from answer.get(named) or []
            if not (token := answer.get("next_page_token", "")):
                return

    def _ask(
        self,
        method: str,
        what: str,
        body: dict[str, Any] | None = None,
        files: dict[str, Any] | None = None,
        **query: str,
    ) -> dict[str, Any]:
        """KFP's answer, or what it says against it in one line."""
        try:
            answer = self._session.request(
                method,
                f"{self.endpoint}/apis/v2beta1/{what}",
                params={name: value for name, value in query.items() if value},
                json=body,
                files=files,
                timeout=PATIENCE,
                allow_redirects=False,  # to a login, which is no answer
            )
        except requests.exceptions.SSLError as error:
            raise UserError(
                f"KFP at {self.endpoint}: {reason(error)[:200]}; if its certificate is signed by an authority"
                " of yours, let REQUESTS_CA_BUNDLE name that one's file"
            ) from None
        except ValueError:  # of a URL
            raise UserError(
                f"KFP_ENDPOINT is '{self.endpoint}'; it must be an address, e.g. http://localhost:8888"
            ) from None
        except OSError as error:  # as all that requests raises is
            raise Unavailable(
                f"KFP at {self.endpoint} cannot be reached ({reason(error)[:200]}); check KFP_ENDPOINT, or"
                " lead a port to it: kubectl -n kubeflow port-forward service/ml-pipeline 8888"
            ) from None
        if answer.ok and not answer.is_redirect:
            try:
                found: dict[str, Any] = answer.json() if answer.content else {}
                return found
            except ValueError:
                raise UserError(
                    f"{self.endpoint} does not answer as KFP does; check KFP_ENDPOINT (the address without"
                    " /apis), and KFP_TOKEN where there is a login"
                ) from None
        raise self._refusal(answer)

    def _refusal(self, answer: requests.Response) -> UserError:
        said, code = _said(answer), answer.status_code
        if answer.is_redirect or code in (401, 403):
            wrong = "check that KFP_TOKEN holds a token of yours that has not expired"
            if "Authorization" not in self._session.headers:
                wrong = "it wants a login: let KFP_TOKEN hold a token of yours"
            return UserError(f"KFP at {self.endpoint} does not let you in ({code}: {said}); {wrong}")
        if code == 404:
            return _NotFound(f"KFP at {self.endpoint} does not know it ({said})")
        if code >= 500 or code == 429:
            return Unavailable(f"KFP at {self.endpoint} answers {code}: {said}")
        return UserError(f"KFP refuses: {said}")


class _NotFound(UserError):
    """There is no such thing."""


def connected() -> Kfp:
    """The KFP that the environment names.

    Raises:
        UserError: it names none, or it does not let us in.
    """
    endpoint = environment.KFP_ENDPOINT.get()
    if not endpoint:
        raise UserError(
            "KFP_ENDPOINT is not set; set it to the address of the KFP API, e.g. http://localhost:8888 after"
            " kubectl -n kubeflow port-forward service/ml-pipeline 8888"
        )
    return Kfp(endpoint, environment.KFP_TOKEN.get(), environment.NAMESPACE.get())


def _run(found: dict[str, Any]) -> Run:
    reference = found.get("pipeline_version_reference") or {}
    return Run(
        id=found["run_id"],
        name=found.get("display_name", ""),
        state=_state(found),
        began=_seconds(found.get("created_at")),
        ended=_seconds(found.get("finished_at")),
        pipeline=reference.get("pipeline_id", ""),
        version=reference.get("pipeline_version_id", ""),
        tasks=_tasks(found),
        parameters=(found.get("runtime_config") or {}).get("parameters") or {},
    )


def _recurring(found: dict[str, Any]) -> Recurring:
    reference = found.get("pipeline_version_reference") or {}
    return Recurring(
        id=found["recurring_run_id"],
        name=found.get("display_name", ""),
        cron=((found.get("trigger") or {}).get("cron_schedule") or {}).get("cron", ""),
        paused=found.get("status") == "DISABLED" or found.get("mode") == "DISABLE",
        made=_seconds(found.get("created_at")),
        pipeline=reference.get("pipeline_id", ""),
        description=found.get("description", ""),
        parameters=(found.get("runtime_config") or {}).get("parameters") or {},
    )


def _tasks(found: dict[str, Any]) -> tuple[str, ...]:
    """Names of the steps of whatever has a pipeline's spec, those within a part of it among them."""
    spec = found.get("pipeline_spec") or {}
    spec = spec.get("pipeline_spec", spec)

    def steps(component: dict[str, Any]) -> Iterator[str]:
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            within = spec.get("components", {}).get(task.get("componentRef", {}).get("name"), {})
            yield from steps(within) if "dag" in within else (name,)

    return tuple(steps(spec.get("root", {})))


def _state(found: dict[str, Any]) -> str:
    """The state in our words. KFP calls a run that was cancelled FAILED; its history knows better."""
    state = found.get("state") or "PENDING"
    history = [one.get("state") for one in found.get("state_history") or []]
    if state == "FAILED" and "CANCELING" in history[-2:]:
        return "cancelled"
    return WORDS.get(state, state.lower())


def _seconds(time: str | None) -> float:
    """A time as KFP writes it, in seconds since 1970; 0 for none, which is year 1 or 1970 there."""
    if not time:
        return 0.0
    return max(0.0, datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp())


def _name(version: dict[str, Any]) -> str:
    return str(version.get("name") or version.get("display_name", ""))


def _said(answer: requests.Response) -> str:
    """What the server says, in one line."""
    try:
        told = answer.json()
        said = told.get("message") or told.get("error_message") or told.get("error") or answer.text
    except (ValueError, AttributeError):
        said = answer.reason or answer.text
    plain = re.sub(r'(?:string|number|bool)_value:("[^"]*"|\S+)', r"\1", " ".join(str(said).split()))
    return re.split(r"[Ee]rror: ", plain)[-1][:600]  # of "Failed to …: BadRequestError: why"
