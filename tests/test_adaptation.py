"""Two datasets as one through several rooms: statistics of each domain, memories, two joint steps."""

import numpy as np
import torch

from affscl.criteria.factory import LossOptions, make_criterion
from affscl.data.datasets import load_dataset
from affscl.data.domains import SOURCE, TARGET, join_domains
from affscl.data.sampling import BatchPlan, joint_batches
from affscl.data.store import ImageStore
from affscl.data.synthetic import make_dataset
from affscl.labels.labellers import joint_labeller, joint_labels
from affscl.model.extraction import extract
from affscl.model.network import AFF, Output
from affscl.training.config import BatchOptions
from affscl.training.loading import train_loader

# --- with the parts of other chapters ----------------------------------------------------------------------------


def test_statistics_of_each_domain_equal_the_naive_loop():
    torch.manual_seed(0)
    joint = AFF("resnet10", height=64, width=32, domains=2)
    state = joint.state_dict()
    single = [AFF("resnet10", height=64, width=32) for _ in range(2)]
    for model in single:  # both start where domain 0 does
        model.load_state_dict({name: state[name] for name in model.state_dict()})
    images = torch.randn(8, 3, 64, 32)
    images[:4] = 2 * images[:4] + 1  # another light
    domains = torch.tensor([SOURCE] * 4 + [TARGET] * 4)
    out = joint(images, domains)
    naive = {domain: single[domain](images[domains == domain]) for domain in (SOURCE, TARGET)}
    torch.testing.assert_close(out.unit, torch.cat([naive[SOURCE].unit, naive[TARGET].unit]))
    torch.testing.assert_close(joint.neck.running_mean, single[TARGET].neck.running_mean)
    torch.testing.assert_close(joint.neck.others[0].running_mean, single[SOURCE].neck.running_mean)
    assert not torch.allclose(joint.backbone.bn1.running_var, joint.backbone.bn1.others[0].running_var)


def test_memories_have_a_row_for_each_class_and_each_cluster(joined):
    labels = joint_labels(joined.train, [0] * 6 + [-1] * 6 + [1] * 12)
    features = torch.nn.functional.normalize(torch.randn(36, 8), dim=1)
    memory = make_criterion(LossOptions(), features, labels).memory
    assert len(memory.mean) == len(memory.hard) == 3 + 2
    for k, row in enumerate(memory.mean):
        torch.testing.assert_close(row, torch.nn.functional.normalize(features[labels == k].mean(0), dim=0))


def test_two_joint_steps(tmp_path):
    worlds = [
        load_dataset("market1501", make_dataset(tmp_path / f"look{look}", 8, 2, look=look, size=(64, 32)))
        for look in (1, 0)
    ]
    train = join_domains(*worlds).train
    store, domains = ImageStore(train, 64, 32, cache=tmp_path, progress=False), torch.tensor([s.domain for s in train])
    truth = np.unique([s.pid for s in train if s.domain == TARGET], return_inverse=True)[1]  # perfect clusters
    model, options = AFF("resnet10", height=64, width=32, domains=2), BatchOptions(p=4, k=2, pad=3)
    before = [p.clone() for p in model.parameters()]
    features = torch.cat(
        [extract(model, store.batch(np.flatnonzero(domains == d)), domain=d) for d in (SOURCE, TARGET)]
    )
    labels = joint_labeller(train, lambda features, epoch: truth)(features, 1)
    criterion, optimizer = make_criterion(LossOptions(), features, labels), torch.optim.Adam(model.parameters())
    batches = joint_batches(labels, domains, [s.camid for s in train], BatchPlan(4, 2, 2), np.random.default_rng(0))
    model.train()
    for images, targets, indices in train_loader(store, labels, batches, options, seed=(0, 1)):
        output = model(images, domains[indices])
        assert isinstance(output, Output) and targets.tolist() == labels[indices].tolist()
        optimizer.zero_grad()
        loss = sum(criterion(output, targets).values())
        loss.backward()
        criterion.update(output, targets)
        optimizer.step()
        assert torch.isfinite(loss)
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters()) if new.requires_grad]
    assert all(moved)
