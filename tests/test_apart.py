"""Clusters within cameras, and IICS: values of its code, naive oracles, turns, refusals, a run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from affscl.criteria.classifier import CameraClassifier, CrossEntropyTriplet
from affscl.labels.clustering import pseudo_labels
from affscl.labels.labellers import camera_labeller
from affscl.labels.links import agreeing_search, camera_scores, cluster_apart, score_agreement
from affscl.labels.neighbours import nearest
from affscl.model.network import Output
from affscl.training.config import RECIPES, Config
from affscl.training.loop import train

GOLDEN = np.load(Path(__file__).parent / "golden" / "iics.npz")
IICS = replace(RECIPES["tiny"], criterion="iics", clustering="alternating")


def crowd(shift=1.0, people=12, each=10):
    g = torch.Generator().manual_seed(1)
    pids, cams = torch.arange(people).repeat_interleave(each), np.tile([4, 9], people * each // 2)
    x = F.normalize(torch.randn(people, 24, generator=g)[pids] + 0.6 * torch.randn(len(pids), 24, generator=g))
    return F.normalize(x + shift * torch.randn(2, 24, generator=g)[(cams == 9).astype(int)] / 5), pids.numpy(), cams


X, PIDS, CAMS = crowd()


def cluster(rows, search="exact"):
    return pseudo_labels(rows, 0.6, 2, 8, 3, search)


def test_golden_agreement():
    answers = torch.from_numpy(GOLDEN["answers"])
    np.testing.assert_allclose(score_agreement(answers, answers), GOLDEN["agreement"], atol=1e-5)
    np.testing.assert_allclose(score_agreement(answers[7:9], answers), GOLDEN["agreement"][7:9], atol=1e-5)


def test_clusters_apart_are_each_cameras_own():
    labels = cluster_apart(X, CAMS, cluster)
    for camera in (4, 9):
        rows = np.flatnonzero(camera == CAMS)
        own, alone = labels[rows], cluster(X[torch.from_numpy(rows)])
        assert ((own < 0) == (alone < 0)).all()
        assert len({(a, b) for a, b in zip(own, alone)}) == len(set(own)) == len(set(alone))
    assert set(labels[CAMS == 4]) & set(labels[CAMS == 9]) <= {-1}
    assert sorted(set(labels[labels >= 0])) == list(range(labels.max() + 1))


def test_a_camera_without_clusters_and_one_of_a_single_crop():
    lonely = torch.cat([X, F.normalize(torch.ones(1, 24))])
    labels = camera_labeller(IICS, [*CAMS.tolist(), 2])(lonely, 1)
    assert labels[-1] == -1 and labels.max() > 1
    assert (camera_labeller(IICS, [0, 1, 2])(X[:3], 2) == -1).all()


def test_each_camera_judges_every_crop():
    labels = cluster_apart(X, CAMS, cluster)
    scores = camera_scores(X, labels, CAMS, 0.1)
    held = np.array([CAMS[labels == c][0] for c in range(labels.max() + 1)])
    for camera in (4, 9):
        centres = [F.normalize(X[torch.from_numpy(labels == c)].mean(0), dim=0) for c in np.flatnonzero(held == camera)]
        naive = torch.stack([(torch.stack(centres) @ q / 0.1).softmax(0) for q in X])
        np.testing.assert_allclose(scores[:, torch.from_numpy(held == camera)], naive, atol=1e-5)


def test_the_search_adds_agreement_between_cameras_only():
    scores = camera_scores(X, cluster_apart(X, CAMS, cluster), CAMS)
    lists, values = agreeing_search(scores, CAMS, 0.02)(X, 12)
    other = torch.from_numpy(CAMS[:, None] != CAMS)
    table = (X @ X.T + 0.02 * score_agreement(scores, scores) * other).clamp(max=1).fill_diagonal_(2)
    np.testing.assert_allclose(values[:, 1:], table.topk(12, 1).values[:, 1:], atol=1e-6)
    assert (lists[:, 0] == np.arange(len(X))).all() and (values[:, 0] == 1).all()
    assert (agreeing_search(scores, CAMS, 0)(X, 12)[0] == nearest(X, 12)[0]).all()
    assert (agreeing_search(scores, CAMS, 0.5)(X[:40], 5)[0] == nearest(X[:40], 5)[0]).all()  # copies were left out


def test_turns_and_the_weight_that_falls():
    x, _, _ = crowd(shift=0.2)
    turns = camera_labeller(replace(IICS, epochs=10), CAMS.tolist())
    odd, even = turns(x, 1), turns(x, 2)
    assert not set(odd[CAMS == 4]) & set(odd[CAMS == 9]) - {-1}
    assert set(even[CAMS == 4]) & set(even[CAMS == 9]) - {-1}
    assert (turns(x, 3) == odd).all() and (turns(x, 2) == even).all()
    late = camera_labeller(replace(IICS, epochs=2), CAMS.tolist())(x, 4)  # a report after the last epoch: weight 0
    assert (late == pseudo_labels(x, IICS.eps, IICS.min_samples, IICS.k1, IICS.k2)).all()
    always = camera_labeller(replace(IICS, clustering="apart"), CAMS.tolist())
    assert (always(x, 2) == odd).all()
    renamed = camera_labeller(replace(IICS, epochs=10), [{4: 50, 9: 7}[c] for c in CAMS])(x, 2)
    assert (renamed == even).all()


def test_the_classifier_asks_within_a_camera_and_gradients_stay_there():
    g = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(5, 24, generator=g))
    held, targets = torch.eye(2)[[0, 0, 1, 1, 1]], torch.tensor([0, 4, 2, 1])
    criterion, out = CameraClassifier(rows, held), Output(X[:4], 5 * X[:4], X[:4])
    loss = criterion(out, targets)["within"]
    logits = 5 * X[:4] @ criterion.classifier.weight.T
    blocks = [
        (logits[i, :2] if t < 2 else logits[i, 2:]).log_softmax(0)[t if t < 2 else t - 2] for i, t in enumerate(targets)
    ]
    torch.testing.assert_close(loss, -torch.stack(blocks).mean())
    criterion(Output(X[:2], X[:2], X[:2]), torch.tensor([0, 1]))["within"].backward()
    assert criterion.classifier.weight.grad[:2].abs().sum() > 0 == criterion.classifier.weight.grad[2:].abs().sum()
    half = Output(X[:4].bfloat16(), X[:4].bfloat16(), X[:4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criterion(half, targets)["within"].dtype == torch.float32
    crossing, plain = CameraClassifier(rows, torch.ones(5, 2)), CrossEntropyTriplet(rows)
    for name, value in plain(out, targets).items():
        torch.testing.assert_close(crossing(out, targets)[name], value)
    assert list(CameraClassifier(rows, torch.ones(5, 1))(out, targets)) == ["cross_entropy", "triplet"]  # one camera


def test_refused_by_name():
    with pytest.raises(ValueError, match="clustering='apart' needs the camera of every crop, and 1 of 3 have none"):
        camera_labeller(replace(IICS, clustering="apart"), [1, 2, None])
    for changes, word in (
        ({"self_paced": 0.02}, "self_paced=0.02"),
        ({"merged": 0.5}, "merged=0.5"),
        ({"negatives": "camera"}, "criterion 'iics' has none"),
        ({"labels": "truth"}, "true labels are not clustered"),
    ):
        with pytest.raises(ValueError, match=word):
            replace(IICS, **changes)
    assert isinstance(replace(IICS, camera_links=0.5, k1="auto"), Config)


def test_a_run_takes_turns(tmp_path):
    small = dict(world_ids=24, world_cams=3, iterations=2, epochs=2, p=4, height=32, width=16, device="cpu")
    train(replace(IICS, **small), out=tmp_path / "run")
    first, second = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    assert "within" in str(first)
    assert "within" not in str(second) and "triplet" in str(second)
    assert first["multi_camera_share"] == 0
