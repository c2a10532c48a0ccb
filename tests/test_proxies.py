"""Proxies: golden values of CAP and O2CAP, naive losses, and what happens at the edges."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from affscl.criteria.contrast import info_nce
from affscl.criteria.factory import BY_CAMERA, LossOptions, make_criterion, require_cameras
from affscl.criteria.proxies import ProxyContrast, ProxyMemory, camera_means, online_positives, several_positives
from affscl.model.network import Output

THEIRS = {"momentum": 0.2, "temperature": 0.07}


@pytest.fixture
def golden(golden):
    return {name: torch.as_tensor(value) for name, value in golden("field").items()}


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def world(n=48, d=8, cameras=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(n, d, generator=g), dim=1)
    return features, torch.arange(n) % 8 - (torch.arange(n) % 12 == 11) * 9, (torch.arange(n) // 8 % cameras).tolist()


@pytest.mark.parametrize("name", ["cap", "cap_within", "o2cap", "offline", "online"])
def test_losses_gradients_and_rows_are_the_published_ones(golden, name):
    features, labels, cameras = golden["features"], golden["labels"], golden["cameras"]
    options = LossOptions("cap" if name.startswith("cap") else "o2cap", **THEIRS)
    criterion = make_criterion(options, features, labels, cameras.tolist())
    criterion.rivals = 5
    # Theirs go by camera, ours by cluster.
    theirs = list(zip(golden["proxy_cluster"].tolist(), golden["proxy_camera"].tolist()))
    order = [theirs.index(pair) for pair in zip(criterion.memory.cluster.tolist(), criterion.memory.camera.tolist())]
    wanted = {"cap": ("intra", "inter"), "cap_within": ("intra",), "o2cap": ("offline", "online")}.get(name, (name,))
    for step in range(5):
        q, indices = golden["clustered_queries"][step].clone().requires_grad_(), golden["clustered"][step]
        output = Output(q, q, q)
        parts = criterion(output, labels[indices], indices)
        loss = sum(parts[part] for part in wanted)
        loss.backward()
        criterion.update(output, labels[indices], indices)
        torch.testing.assert_close(loss.detach(), golden[name + "_loss"][step], atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(q.grad, golden[name + "_grad"][step], atol=2e-5, rtol=1e-5)
        close(criterion.memory.rows, golden[name + "_rows"][step][order])


def test_a_proxy_is_the_mean_of_what_one_camera_saw_of_a_cluster():
    features, labels, camids = world()
    memory = ProxyMemory(features, labels, camids)
    assert sorted(set(zip(memory.cluster.tolist(), memory.camera.tolist()))) == sorted(
        {(int(y), c) for y, c in zip(labels, camids) if y >= 0}
    )
    for i in range(len(features)):
        p = int(memory.proxy[i])
        assert (p < 0) == (labels[i] < 0)
        if p >= 0:
            own = [j for j in range(len(features)) if (labels[j], camids[j]) == (labels[i], camids[i])]
            close(memory.rows[p], F.normalize(features[own].mean(0), dim=0))


def test_with_one_camera_everything_is_info_nce():
    features, labels, _ = world()
    indices = (labels >= 0).nonzero().squeeze(1)[:12]
    for name in ("cap", "o2cap"):  # ssl, which asks for cameras too, has no memory of clusters
        criterion = make_criterion(LossOptions(name), features, labels, [7] * 48)
        output = Output(*[features[indices]] * 3)
        parts = criterion(output, labels[indices], indices)
        plain = info_nce(criterion.memory.logits(features[indices]), labels[indices])
        for key, part in parts.items():
            close(part, plain / 2 if key == "inter" else plain)


def test_each_camera_counts_once():
    losses, cameras = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 0, 2])
    assert camera_means(losses, cameras) == 12


@pytest.mark.parametrize("rivals", [1, 4, 50])
def test_far_rivals_and_their_gradients_are_left_out(rivals):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 9, generator=g, requires_grad=True)
    positives = F.one_hot(torch.arange(5), 9) + F.one_hot(torch.arange(5) + 3, 9) > 0
    several_positives(logits, positives, logits.detach(), rivals).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert ((logits.grad != 0).sum(1) == 2 + min(rivals, 7)).all()
    close(logits.grad.sum(1), torch.zeros(5))


@pytest.mark.parametrize("most, cameras", [(1, 3), (3, 3), (3, 2), (5, 4)])
def test_online_positives_are_of_different_cameras(most, cameras):
    g = torch.Generator().manual_seed(2)
    camera, nearness = torch.arange(12) % cameras, torch.randn(6, 12, generator=g)
    found = online_positives(nearness, camera, cameras, most)
    for line, marks in zip(nearness, found):
        chosen = marks.nonzero().squeeze(1)
        assert len(chosen) == min(most, cameras) == len(set(camera[chosen].tolist()))
        assert all(line[p] == line[camera == camera[p]].max() for p in chosen)
    # A camera that saw nobody but outliers has no proxy, and so no positive.
    assert (online_positives(nearness, camera, cameras + 1, cameras + 1).sum(1) == cameras).all()


@pytest.mark.parametrize("name", [name for name in BY_CAMERA if name != "iics"])  # that one has a classifier
def test_gradients_learning_autocast_and_buffers(name):
    features, labels, camids = world(seed=3)
    criterion = make_criterion(LossOptions(name, temperature=0.3), features, labels, camids)
    indices = (labels >= 0).nonzero().squeeze(1)[::2]
    targets, g = labels[indices], torch.Generator().manual_seed(4)
    x = torch.randn(len(indices), 8, generator=g, requires_grad=True)
    direction = torch.randn(len(indices), 8, generator=g)

    def value(x):
        return sum(criterion(Output(x, x, F.normalize(x, dim=1)), targets, indices).values())

    (grad,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        slope = (value(x + 1e-2 * direction) - value(x - 1e-2 * direction)) / 2e-2
    if name == "cap":  # O2CAP's positives may change along the way
        assert float(slope) == pytest.approx(float((grad * direction).sum()), rel=2e-2, abs=1e-2)
    assert not list(criterion.parameters())
    optimizer, before = torch.optim.SGD([x], lr=0.3), float(value(x).detach())
    for _ in range(40):
        optimizer.zero_grad()
        value(x).backward()
        criterion.update(Output(x, x, F.normalize(x, dim=1)), targets, indices)
        optimizer.step()
    assert float(value(x).detach()) < 0.8 * before
    half = F.normalize(x.detach(), dim=1).bfloat16()
    plain = criterion(Output(half, half, half.float()), targets, indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = criterion(Output(half, half, half), targets, indices)
    for key, part in parts.items():
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, plain[key], rtol=1e-5, atol=0)


def test_what_cannot_work_is_told():
    features, labels, camids = world()
    output = Output(*[features] * 3)
    with pytest.raises(ValueError, match="remembers crops"):
        make_criterion(LossOptions("cap"), features, labels, camids)(output, labels)
    for wrong in (None, [None] + [1] * 47):
        with pytest.raises(ValueError, match="a memory of proxies needs the camera"):
            make_criterion(LossOptions("o2cap"), features, labels, wrong)
    with pytest.raises(ValueError, match="rivals of its own"):
        make_criterion(LossOptions("cap", negatives="camera"), features, labels, camids)
    with pytest.raises(ValueError, match="momentum"):
        ProxyContrast(ProxyMemory(features, labels, camids, momentum=2))


@pytest.mark.parametrize("criterion, negatives", [("cap", "all"), ("o2cap", "all"), ("symmetric", "camera")])
def test_crops_without_cameras_are_refused_before_training(criterion, negatives):
    options = SimpleNamespace(criterion=criterion, negatives=negatives)
    samples = [SimpleNamespace(camid=c) for c in (1, None, 2, None)]
    with pytest.raises(ValueError, match="2 of 4 have none.*--pattern.*--criterion symmetric") as told:
        require_cameras(options, samples)
    assert (f"criterion={criterion!r}" if negatives == "all" else "negatives='camera'") in str(told.value)
    require_cameras(options, samples[::2])
    require_cameras(SimpleNamespace(criterion="spcl", negatives="all"), samples)


def test_dcc_is_the_published_one(golden):
    features, labels = golden["features"], golden["labels"]
    criterion = make_criterion(LossOptions("dcc"), features, labels)
    for step in range(5):
        q, indices = golden["clustered_queries"][step].clone().requires_grad_(), golden["clustered"][step]
        output = Output(q, q, q)
        loss = sum(criterion(output, labels[indices]).values())
        loss.backward()
        criterion.update(output, labels[indices])
        torch.testing.assert_close(loss.detach(), golden["dcc_loss"][step], atol=1e-5, rtol=1e-6)
        close(q.grad, golden["dcc_grad"][step])
        close(torch.stack([criterion.centres.bank, criterion.last.bank]), golden["dcc_rows"][step])


def test_dcc_without_what_holds_its_memories_together():
    features, labels, _ = world()
    plain = make_criterion(LossOptions("dcc", balance="off"), features, labels)
    assert list(plain(Output(*[features[:8]] * 3), labels[:8])) == ["centre", "individual"]
    with pytest.raises(ValueError, match="another pair"):
        make_criterion(LossOptions("dcc", balance="both"), features, labels)
