"""A cluster that launchers find."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.apiserver import ApiServer


@pytest.fixture
def api_server(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """An API server; the environment names it, and has training jobs run there."""
    with ApiServer() as server:
        kubeconfig = tmp_path / "kubeconfig"
        context = {"cluster": "s", "user": "u", "namespace": server.namespace}
        content = {
            "clusters": [{"name": "s", "cluster": {"server": server.url}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": context}],
            "current-context": "c",
        }
        kubeconfig.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **content}))
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setenv("LATENT_GPT_LAUNCHER", "pytorchjob")
        monkeypatch.setenv("LATENT_GPT_IMAGE", "registry/latent-gpt@sha256:1")
        yield server
