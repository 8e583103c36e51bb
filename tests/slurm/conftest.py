"""The cluster, and a run to compare with."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, two_ranks_here, why_not
from micro import write_images


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes for all tests."""
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # a short path: sockets allow no long ones
        cluster = Cluster.start(Path(folder) / "state")
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 40)
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run of two ranks on this machine, without SLURM."""
    return two_ranks_here(tmp_path_factory.mktemp("undisturbed") / "run", images, "epochs=6")
