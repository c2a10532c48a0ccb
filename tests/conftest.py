"""What several tests share."""

import os

# Two tests run at a time (pytest.ini): one thread each, set before torch is loaded, and a waiting thread sleeps.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def caches_of_their_own(tmp_path_factory):
    """Stores and worlds go to a temporary cache: no test reads what an earlier run left behind."""
    old = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME") if old is None else os.environ.update(XDG_CACHE_HOME=old)


@pytest.fixture(autouse=True)
def no_dataset_from_outside(monkeypatch):
    """A tester's own AFFSCL_DATA must not decide a test."""
    monkeypatch.delenv("AFFSCL_DATA", raising=False)


@pytest.fixture
def golden():
    """Loads tests/golden/NAME.npz."""
    return lambda name: np.load(ROOT / "tests" / "golden" / f"{name}.npz")


@pytest.fixture(autouse=True)
def fresh_state():
    """Tests that draw without a generator draw the same every time; hypothesis wants denormals."""
    torch.set_flush_denormal(False)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def joined():
    """A source of three people and a target, joined."""
    from two_domains import source_world, target_world

    from affscl.data.domains import join_domains

    return join_domains(source_world(), target_world())
