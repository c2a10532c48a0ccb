"""The changes of `tools/ideas.py` fit what they take the place of."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from affscl.data.datasets import Sample
from affscl.labels.clustering import ClusterOptions
from affscl.labels.labellers import cluster_labeller

TOOL = Path(__file__).resolve().parent.parent / "tools" / "ideas.py"


@pytest.fixture(scope="module")
def ideas():
    """The tool as a module."""
    about = importlib.util.spec_from_file_location("ideas", TOOL)
    module = importlib.util.module_from_spec(about)
    about.loader.exec_module(module)
    return module


LABELS = ["true links", "true people in each camera", "clusters in each camera", "links that two halves agree on"]


@pytest.mark.parametrize("name", [*LABELS, "links by margin", "links by margin, the better half"])
@pytest.mark.parametrize("colours", [False, True])
def test_changed_labels(ideas, name, colours):
    g = torch.Generator().manual_seed(0)
    pids, camids = np.arange(20).repeat(12), np.tile([1, 4], 120)
    x = torch.randn(20, 64, generator=g)[pids] + torch.randn(2, 64, generator=g)[(camids == 4).astype(int)]
    x = torch.nn.functional.normalize(x + 0.15 * torch.randn(240, 64, generator=g))
    samples = [Sample(f"{i}.png", int(p), int(c)) for i, (p, c) in enumerate(zip(pids, camids))]
    options = ClusterOptions(k1=10, k2=3, min_samples=2, camera_links=1.0, link_colours="auto" if colours else 0.0)
    with ideas.IDEAS[name][1](samples):
        labels = cluster_labeller(options, camids.tolist(), (lambda labels: x) if colours else None)(x, 1)
    if name.startswith("true"):
        assert adjusted_rand_score(pids, labels) > 0.9
    assert len(labels) == 240 and labels.max() >= 9
