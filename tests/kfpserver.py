"""A KFP's API as far as our client speaks to one, with a driver that a test plays, and faults.

It keeps pipelines, versions and runs; it runs nothing. What it says in which words was read off a real one
(`../shared/cluster`).
"""

from __future__ import annotations

import datetime
import email
import email.policy
import http.server
import json
import re
import threading
import urllib.parse
import uuid
from typing import Any, Self

import yaml

Object = dict[str, Any]


class Refused(Exception):
    """A request is answered with an error."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class KfpServer:
    """On loopback, while the block runs."""

    def __init__(self) -> None:
        self.token = ""  # that clients must show; "" is none
        self.several_users = False
        self.faults: list[tuple[int, Any]] = []  # status and body of the next answers; a string is no JSON
        self.page = 2  # entries in an answer, at most
        self.html = ""  # KFP's page, where it is at this address
        self.requests: list[tuple[str, str]] = []  # method and path with its query
        self.pipelines: dict[str, Object] = {}
        self.uploads: dict[str, list[Object]] = {}  # by pipeline, the oldest first
        self.experiments: dict[str, Object] = {}
        self.runs: dict[str, Object] = {}
        self.lost: set[str] = set()  # runs whose workflow somebody deleted
        self.recurring: dict[str, Object] = {}
        self._clock = datetime.datetime(2026, 11, 26, 12, tzinfo=datetime.UTC)

    # ── what a test does as KFP's driver ────────────────────────────────────────────────────────────────

    def state(self, run: str, *states: str) -> None:
        """A run comes to these states, one after the other."""
        found = self.runs[run]
        for state in states:
            found["state"] = state
            found["state_history"].append({"state": state, "update_time": self._now()})
        if states[-1] in ("FAILED", "SUCCEEDED"):
            found["finished_at"] = self._now()
        else:
            found["finished_at"] = "1970-01-01T00:00:00Z"

    # ── the server ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _now(self) -> str:
        self._clock += datetime.timedelta(seconds=1)
        return self._clock.isoformat().replace("+00:00", "Z")

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, kind: str) -> Object:
        """What it says to a request."""
        for how, pattern, answer in (
            ("GET", "healthz", self._health),
            ("GET", "pipelines/names/([^/]+)", self._named),
            ("POST", "pipelines", self._make_pipeline),
            ("GET", "pipelines/([^/]+)/versions", self._list_versions),
            ("POST", "pipelines/upload_version", self._upload),
            ("GET", "pipelines/([^/]+)/versions/([^/]+)", self._version),
            ("DELETE", "pipelines/([^/]+)/versions/([^/]+)", self._remove_version),
            ("DELETE", "pipelines/([^/]+)", self._remove_pipeline),
            ("GET", "experiments", self._list_experiments),
            ("POST", "experiments", self._make_experiment),
            ("POST", "runs", self._submit),
            ("GET", "runs", self._list_runs),
            ("GET", "runs/([^/:]+)", self._run),
            ("POST", "runs/([^/:]+):terminate", self._terminate),
            ("POST", "runs/([^/:]+):retry", self._retry),
            ("POST", "recurringruns", self._repeat),
            ("GET", "recurringruns", self._list_recurring),
            ("POST", "recurringruns/([^/:]+):(enable|disable)", self._switch),
            ("DELETE", "recurringruns/([^/:]+)", self._stop),
        ):
            match = re.fullmatch(f"/apis/v2beta1/{pattern}", path)
            if match and how == method:
                given: Any = _upload_of(body, kind) if "multipart" in kind else json.loads(body or b"{}")
                return answer(*match.groups(), query=query, body=given)  # type: ignore[operator, no-any-return]
        raise Refused(404, 5, "Not Found")

    def _health(self, query: Object, body: Any) -> Object:
        return {"multi_user": self.several_users, "pipeline_store": "database"}

    def _named(self, name: str, query: Object, body: Any) -> Object:
        for one in self.pipelines.values():
            if one["name"] == name and one.get("namespace", "") == query.get("namespace", ""):
                return one
        raise Refused(404, 5, f"Failed to get pipeline by name and namespace: ResourceNotFoundError: {name}")

    def _make_pipeline(self, query: Object, body: Any) -> Object:
        made = {**body, "pipeline_id": str(uuid.uuid4()), "created_at": self._now()}
        self.pipelines[made["pipeline_id"]] = made
        self.uploads[made["pipeline_id"]] = []
        return made

    def _list_versions(self, pipeline: str, query: Object, body: Any) -> Object:
        assert query["sort_by"] == "created_at desc"
        return self._paged("pipeline_versions", self.uploads[pipeline][::-1], query)

    def _upload(self, query: Object, body: Any) -> Object:
        uploaded = self.uploads[query["pipelineid"]]
        if any(one["name"] == query["name"] for one in uploaded):
            raise Refused(409, 6, f"Already exist error: version {query['name']}")
        made = {
            "name": query["name"],
            "pipeline_version_id": str(uuid.uuid4()),
            "created_at": self._now(),
            "pipeline_spec": next(yaml.safe_load_all(body)),
        }
        uploaded.append(made)
        return made

    def _version(self, pipeline: str, version: str, query: Object, body: Any) -> Object:
        for one in self.uploads.get(pipeline, []):
            if one["pipeline_version_id"] == version:
                return one
        raise Refused(404, 5, f"Failed to get pipeline version: ResourceNotFoundError: {version} not found")

    def _remove_version(self, pipeline: str, version: str, query: Object, body: Any) -> Object:
        kept = [one for one in self.uploads[pipeline] if one["pipeline_version_id"] != version]
        self.uploads[pipeline] = kept
        return {}

    def _remove_pipeline(self, pipeline: str, query: Object, body: Any) -> Object:
        if self.uploads[pipeline]:
            raise Refused(400, 9, "pipeline has versions")
        del self.pipelines[pipeline]
        return {}

    def _list_experiments(self, query: Object, body: Any) -> Object:
        return self._paged("experiments", list(self.experiments.values()), query)

    def _make_experiment(self, query: Object, body: Any) -> Object:
        made = {**body, "experiment_id": str(uuid.uuid4())}
        self.experiments[made["experiment_id"]] = made
        return made

    def _submit(self, query: Object, body: Any) -> Object:
        if self.several_users and "experiment_id" not in body:
            raise Refused(400, 3, "Experiment Id can not be empty in multi-user mode")
        made = {**body, "run_id": str(uuid.uuid4()), "created_at": self._now(), "state_history": []}
        self._check(made)
        self.runs[made["run_id"]] = made
        self.state(made["run_id"], "PENDING")
        return made

    def _check(self, body: Any) -> None:
        """Refuse parameters that the version does not take."""
        reference = body["pipeline_version_reference"]
        (version,) = (
            one
            for one in self.uploads[reference["pipeline_id"]]
            if one["pipeline_version_id"] == reference["pipeline_version_id"]
        )
        wanted = version["pipeline_spec"]["root"].get("inputDefinitions", {}).get("parameters", {})
        for name, value in body["runtime_config"]["parameters"].items():
            if name not in wanted:
                raise Refused(400, 3, f"parameter(s) provided are not required by pipeline: {name}")
            allowed = wanted[name].get("literals")
            if allowed and value not in allowed:
                choice = " ".join(f'string_value:"{one}"' for one in allowed)
                why = f'value string_value:"{value}" does not match any of the allowed literal values'
                said = f'Failed to create a new run: Invalid input error: input parameter "{name}" {why}'
                raise Refused(400, 3, f"{said}: [{choice}]")

    def _repeat(self, query: Object, body: Any) -> Object:
        if self.several_users and "experiment_id" not in body:
            raise Refused(400, 3, "Experiment Id can not be empty in multi-user mode")
        self._check(body)
        if len(body["trigger"]["cron_schedule"]["cron"].split()) not in (5, 6):
            raise Refused(400, 3, "Invalid input error: Schedule cron is not a supported format")
        if not 1 <= int(body["max_concurrency"]) <= 10:
            raise Refused(400, 3, "Max concurrency of a recurring run must be at least 1 and at most 10.")
        made = {key: value for key, value in body.items() if key != "mode"}
        made |= {"recurring_run_id": str(uuid.uuid4()), "created_at": self._now(), "status": "ENABLED"}
        self.recurring[made["recurring_run_id"]] = made
        return made

    def _list_recurring(self, query: Object, body: Any) -> Object:
        return self._paged("recurringRuns", list(self.recurring.values())[::-1], query)

    def _switch(self, recurring: str, how: str, query: Object, body: Any) -> Object:
        self.recurring[recurring]["status"] = how.upper() + "D"
        return {}

    def _stop(self, recurring: str, query: Object, body: Any) -> Object:
        assert query["propagation_policy"] == "ORPHAN", "Workflows that it started are deleted with it"
        if self.recurring.pop(recurring, None) is None:
            raise Refused(404, 5, f"ResourceNotFoundError: Job {recurring} not found")
        return {}

    def _list_runs(self, query: Object, body: Any) -> Object:
        assert query["sort_by"] == "created_at desc"
        if self.several_users and not query.get("namespace"):
            raise Refused(400, 3, "A namespace is required in multi-user mode")
        return self._paged("runs", list(self.runs.values())[::-1], query)

    def _run(self, run: str, query: Object, body: Any) -> Object:
        if run not in self.runs:
            raise Refused(404, 5, f"Failed to get a run: ResourceNotFoundError: Run {run} not found")
        return self.runs[run]

    def _terminate(self, run: str, query: Object, body: Any) -> Object:
        if self._run(run, query, body)["state"] in ("SUCCEEDED", "FAILED"):
            raise Refused(400, 3, "Failed to terminate a run: its state is final")
        if run in self.lost:
            raise Refused(500, 13, f'workflows.argoproj.io "{run}" not found')
        self.state(run, "CANCELING")
        return {}

    def _retry(self, run: str, query: Object, body: Any) -> Object:
        if self._run(run, query, body)["state"] != "FAILED":
            raise Refused(400, 3, "Failed to retry run: workflow must be Failed/Error to retry")
        self.state(run, "RUNNING")
        return {}

    def _paged(self, named: str, all_: list[Object], query: Object) -> Object:
        start = int(query.get("page_token") or 0)
        end = start + min(int(query["page_size"]), self.page)
        more = {"next_page_token": str(end)} if end < len(all_) else {}
        return {named: all_[start:end], **more} if all_[start:end] else {}


def _upload_of(body: bytes, kind: str) -> bytes:
    """The file of a form."""
    whole = email.message_from_bytes(
        f"Content-Type: {kind}\r\n\r\n".encode() + body, policy=email.policy.HTTP
    )
    (part,) = whole.iter_parts()  # type: ignore[attr-defined]
    return bytes(part.get_payload(decode=True))


def _handler(server: KfpServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def go(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.requests.append((self.command, self.path))
            split = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(split.query))
            try:
                if split.path == "/" and server.html:
                    self.reply(200, server.html)
                    return
                if server.faults:
                    self.reply(*server.faults.pop(0))
                    return
                if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
                    raise Refused(401, 16, "Request header error: there is no user identity header.")
                kind = self.headers.get("Content-Type") or ""
                self.reply(200, server.answer(self.command, split.path, query, body, kind))
            except Refused as refusal:
                said = {"error": str(refusal), "code": refusal.code, "message": str(refusal), "details": []}
                self.reply(refusal.status, said)

        do_GET = do_POST = do_DELETE = go

        def reply(self, status: int, told: Any) -> None:
            data = told.encode() if isinstance(told, str) else json.dumps(told).encode()
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "/login")
            self.send_header("Content-Type", "text/html" if isinstance(told, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
