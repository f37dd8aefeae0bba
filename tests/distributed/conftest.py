"""A Ray cluster of two simulated nodes, shared by the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.architectures import tiny_models


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[Cluster]:
    """Two nodes on this machine, with CPUs for six ranks."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "object_store_memory": 100 * 1024 * 1024},
    )
    cluster.add_node(num_cpus=3, object_store_memory=100 * 1024 * 1024)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 2 on disk: two windows, soft-caps, no tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-gemma2")
    tiny_models()["gemma2"]().save_pretrained(directory)
    return directory
