"""What MLflow is shown of where a run came from, against the real server."""

from __future__ import annotations

import json
import uuid
from typing import Any

import mlflow.data
import pytest
from mlflow.entities import Metric, Run

from components.parameters import resolve
from model.config import RunConfig
from model.plumbing import environment, provenance, registry, tracking
from model.plumbing.assets import AssetWriter, Manifest
from model.plumbing.jobs import TrackingIds
from model.plumbing.tracking import Tracker, mlflow_client
from pipelines.dag import PIPELINES
from tests.plumbing.test_registry import log_model


@pytest.fixture
def ids(services: dict[str, str]) -> TrackingIds:
    """A step of a fresh pipeline run."""
    return TrackingIds(experiment="text-to-image", run=f"smoke-{uuid.uuid4().hex[:8]}", step="tokenizer")


@pytest.fixture
def images(services: dict[str, str]) -> Manifest:
    """Images, with counts."""
    return AssetWriter("images", {"a": uuid.uuid4().hex}, {}).finish({"train": 7, "others": {"txt": 1}})


def below(parent: str) -> list[Run]:
    client = mlflow_client()
    experiments = [one.experiment_id for one in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent}'"))


def test_the_commit_is_the_images_or_the_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    provenance._commit.cache_clear()
    assert provenance.tags()[provenance.COMMIT_TAG][:7].isalnum()
    provenance._commit.cache_clear()
    monkeypatch.setenv("LATENT_GPT_REVISION", "0123abc")
    monkeypatch.setenv("LATENT_GPT_IMAGE", "registry/latent-gpt@sha256:1")
    assert provenance.tags() == {
        provenance.COMMIT_TAG: "0123abc",
        provenance.IMAGE_TAG: "registry/latent-gpt@sha256:1",
    }
    provenance._commit.cache_clear()


def test_the_tracking_uri_is_no_runs_to_say() -> None:
    """Whoever may start a run must not lead steps, and their passwords, to another server."""

    def fields(schema: Any) -> set[str]:
        if isinstance(schema, dict):
            named = set(schema.get("properties", {}))
            return named.union(*map(fields, schema.values())) if schema else named
        return set().union(*map(fields, schema)) if isinstance(schema, list) else set()

    names = fields(RunConfig.model_json_schema())
    for pipeline in PIPELINES.values():
        names |= set(pipeline.component_spec.inputs or {})
    assert "experiment_name" in names
    assert [
        name for name in names if "mlflow" in name.lower() or "tracking" in name or "registry" in name
    ] == []
    with pytest.raises(Exception, match="tracking_uri"):
        resolve("latent-gpt-text-to-image", "smoke", "", 0, -1, "tracking_uri=http://evil", "", "")


@pytest.mark.slow
class TestRealServer:
    """What only a server can show."""

    def test_one_parent_and_one_child_per_step_however_often(
        self, ids: TrackingIds, images: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LATENT_GPT_IMAGE", "registry/latent-gpt@sha256:1")
        monkeypatch.setenv("LATENT_GPT_KFP_UI", "https://kfp.example.com/")
        tokenizer = AssetWriter("tokenizer", {"a": ids.run}, {"images": images}).finish({"psnr": 20.0})
        for _ in range(2):  # the run, and its retry
            parent = tracking.open_pipeline_run(
                ids.experiment, ids.run, {"seed": 0}, provenance.kfp_tags("job-1")
            )
            tracking.note_made(ids.run, images, False, {"train": 7.0}, [images], 2.0)
            with Tracker(ids, {"a": 1}) as tracker:
                tracker.reads([images], "tokenizer")
            tracking.note_made(ids.run, tokenizer, False, {"psnr": 20.0}, [images], 0.0)
            tracking.note_made(
                ids.run, tokenizer.model_copy(update={"kind": "text"}), True, {"psnr": 20.0}, [images], 0.0
            )
        client = mlflow_client()
        found = {one.info.run_name: one for one in below(parent)}
        assert len(below(parent)) == len(found)
        assert found.keys() == {"images", "tokenizer", "text"}
        assert {one.info.status for one in found.values()} == {"FINISHED"}
        top = client.get_run(parent)
        for one in (top, *found.values()):
            (read,) = one.inputs.dataset_inputs
            assert read.dataset.digest == images.sha256[:36]
            assert mlflow.data.get_source(read.dataset).uri == images.uri
            assert json.loads(read.dataset.profile) == {"train": 7}
            assert one.data.tags[provenance.COMMIT_TAG]
            assert one.data.tags[provenance.IMAGE_TAG] == "registry/latent-gpt@sha256:1"
        took = {name: one.info.end_time - one.info.start_time for name, one in found.items()}
        assert 1990 < took["images"] < 2100
        assert took["text"] == 1, "`latent-gpt status` takes one of no time for one that did not end"
        assert found["images"].data.metrics == {"train": 7.0}
        assert found["text"].data.tags[tracking.REUSED_TAG] == "yes"
        assert top.data.tags[provenance.KFP_TAG] == "job-1"
        assert "https://kfp.example.com/#/runs/details/job-1" in top.data.tags["mlflow.note.content"]

    def test_a_model_is_linked_to_its_run_its_data_and_its_figures(
        self, ids: TrackingIds, images: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        from model.plumbing import cache

        monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path))
        writer = AssetWriter("model", {"a": ids.run}, {"images": images})
        writer.add_bytes("sampling.json", b"{}")
        bundle = writer.finish({})
        register = ids.model_copy(update={"step": "register"})
        figures = {"validation/retrieval": 0.5, "validation/psnr": 20.0}
        tags = registry.lineage_tags([bundle.as_input])
        name = f"linked-{ids.run}"
        version = registry.register(register, cache.folder(bundle), log_model, tags, name, figures, images)
        client = mlflow_client()
        run = client.get_run(client.get_model_version(name, str(version)).run_id or "")
        (output,) = run.outputs.model_outputs
        model = client.get_logged_model(output.model_id)
        assert model.source_run_id == run.info.run_id
        assert {one.key: one.value for one in model.metrics} == figures
        for one in model.metrics:
            assert isinstance(one, Metric)
            assert (one.dataset_name, one.dataset_digest) == ("images", images.sha256[:36])
        assert [one.dataset.digest for one in run.inputs.dataset_inputs] == [images.sha256[:36]]
        assert [one.model_id for one in run.inputs.model_inputs] == [output.model_id]

    def test_runs_that_kfps_plugin_has_opened_are_ours(
        self, ids: TrackingIds, images: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its variables as backend/src/common/plugins/mlflow/config.go of KFP 2.17 has them."""
        client = mlflow_client()
        experiment = client.create_experiment(f"KFP's {ids.run}")
        theirs = client.create_run(experiment, run_name="my-run").info.run_id
        task = client.create_run(
            experiment, tags={"mlflow.parentRunId": theirs}, run_name="tokenizer"
        ).info.run_id
        config = {
            "endpoint": "http://mlflow",
            "parentRunId": theirs,
            "experimentId": experiment,
            "authType": "none",
            "injectUserEnvVars": True,
        }
        monkeypatch.setenv("KFP_MLFLOW_CONFIG", json.dumps(config))
        assert tracking.open_pipeline_run(ids.experiment, ids.run, {"seed": 0}) == theirs
        monkeypatch.setenv("MLFLOW_RUN_ID", task)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
        for _ in range(2):
            tracking.attach(ids.run, ids.step)
            monkeypatch.delenv("MLFLOW_RUN_ID")  # a job's pod is not told
            monkeypatch.delenv("KFP_MLFLOW_CONFIG")
            with Tracker(ids, {"a": 1}) as tracker:
                tracker.metrics(1, loss=1.0)
            assert tracker.run_id == task
            again = client.create_run(experiment, tags={"mlflow.parentRunId": theirs}, run_name="tokenizer")
            monkeypatch.setenv("KFP_MLFLOW_CONFIG", json.dumps(config))
            monkeypatch.setenv("MLFLOW_RUN_ID", again.info.run_id)  # of a second attempt
        assert client.get_run(theirs).data.params == {"seed": "0"}
        assert client.get_run(task).data.params == {"a": "1"}
        ours = [one.info.run_id for one in below(theirs) if tracking.STEP_TAG in one.data.tags]
        assert ours == [task], "one child of ours, however often"

    def test_a_run_that_this_server_does_not_know_is_none(
        self, ids: TrackingIds, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KFP_MLFLOW_CONFIG", json.dumps({"parentRunId": "0" * 32}))
        parent = tracking.open_pipeline_run(ids.experiment, ids.run)
        assert mlflow_client().get_run(parent).data.tags[tracking.RUN_TAG] == ids.run
        monkeypatch.setenv("KFP_MLFLOW_CONFIG", "no JSON")
        assert provenance.named_by_kfp() == ("", "")
        assert environment.KFP_MLFLOW_CONFIG.get() == "no JSON"
