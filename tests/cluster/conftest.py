"""A real cluster for the tests of this folder, which only `make test-cluster` collects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model.plumbing import storage
from tests.cluster.cluster import Cluster, image


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Nothing here is looked at unless somebody asks for it."""
    return None if config.option.markexpr == "cluster" else True


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A namespace with our services; this process's environment leads to them."""
    one = Cluster(image(), image("-mlflow"))
    with pytest.MonkeyPatch.context() as patch, one.up() as environment:
        for name, value in {**environment, "LATENT_GPT_STORE": "s3://latent-gpt/jobs"}.items():
            patch.setenv(name, value)
        storage.check_store(storage.store_root())  # makes the bucket, as a pipeline's first step does
        yield one
