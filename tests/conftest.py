"""What tests share: one Ray cluster for the whole session, a store of their own, small datasets of the toy world."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"  # real data beside the project, where it is there

os.environ["RAYWARD_PROGRESS"] = "log"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ |= {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
}  # of the store that tests start
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies of what lies elsewhere are not kept beside those of the user."""
    os.environ["RAYWARD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, or the test is skipped."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not here")
    return SHARED / "data"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One local cluster for the session: two CPUs, no dashboard."""
    from rayward import cluster

    with cluster.connect() as ray:
        yield ray


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A fit takes every core unless it is told; sums over more threads have other last bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAYWARD_STORE", str(tmp_path / "store"))
    return tmp_path / "store"
