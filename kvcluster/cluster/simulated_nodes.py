"""A Ray cluster of several nodes on one machine, for the demo and for tests.

Each node is a raylet of its own with its own resources, so placement, transport and loss of a node
go the same way as between machines.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.cluster_utils import Cluster

_OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Blocks never go through Ray's object store."""


@contextmanager
def simulated_nodes(num_nodes: int, *, cpus_per_node: int) -> Iterator[Cluster]:
    """Start the nodes and connect this process to them; both end with the `with` block.

    Takes some seconds a node. The caller may add and remove nodes meanwhile.
    """
    cluster = Cluster()
    try:
        for _ in range(num_nodes):
            cluster.add_node(
                num_cpus=cpus_per_node,
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
            )
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]
