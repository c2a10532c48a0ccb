"""Memories against golden values, naive loops over clusters, and the invariances they promise."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import affscl.criteria.memory
from affscl.criteria.memory import (
    ClusterMemory,
    DualMemory,
    batch_mean,
    blend,
    blend_in_turn,
    check_targets,
    choice_problems,
    first_of,
    hardest,
    hardest_samples,
    memory_problems,
    memory_rows,
    similarities,
)

K, D = 7, 6
cases = settings(max_examples=40, deadline=None)
seeds, momenta = st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5, 0.9])
sizes = st.integers(1, 24)


@pytest.fixture
def golden(golden):
    return {name: torch.as_tensor(value) for name, value in golden("memory").items()}


def unit(g, *shape):
    return F.normalize(torch.randn(*shape, generator=g), dim=-1)


def world(seed, b=12):
    """A table of K rows, another one, a batch and its targets, some clusters several times and some never."""
    g = torch.Generator().manual_seed(seed)
    return unit(g, K, D), unit(g, K, D), unit(g, b, D), torch.randint(0, K - 1, (b,), generator=g)


def naive_mix(row, new, momentum):
    mixed = momentum * row.double() + (1 - momentum) * new.double()
    return (mixed / mixed.norm()).float()


def naive_dual(mean, hard, q, targets, momentum, reference="mean", normalise=False):
    """Eqs. 10, 12 and 13 in their own words, a cluster at a time."""
    new_mean, new_hard = mean.clone(), hard.clone()
    for i in set(targets.tolist()):
        members = [feature for feature, t in zip(q, targets.tolist()) if t == i]
        average = sum(members) / len(members)
        if normalise:
            average = average / average.norm()
        judge = (mean if reference == "mean" else hard)[i]
        similar = [float((feature * judge).sum()) for feature in members]
        new_mean[i] = naive_mix(mean[i], average, momentum)
        new_hard[i] = naive_mix(hard[i], members[similar.index(min(similar))], momentum)
    return new_mean, new_hard


# Golden values


@pytest.mark.parametrize("rule, name", [("sequential", "cluster_contrast_mean"), ("hard", "cluster_contrast_hard")])
def test_cluster_contrast_is_the_published_one(golden, rule, name):
    memory = ClusterMemory(golden["initial_bank"], rule, float(golden["momentum"]), float(golden["temperature"]))
    for step in range(6):
        q, targets = golden["queries"][step].clone().requires_grad_(), golden["targets"][step]
        loss = F.cross_entropy(memory.logits(q), targets)
        loss.backward()
        memory.update(q, targets)
        torch.testing.assert_close(loss.detach(), golden[name + "_loss"][step], atol=1e-5, rtol=0)
        torch.testing.assert_close(q.grad, golden[name + "_grad"][step], atol=1e-5, rtol=0)
        torch.testing.assert_close(memory.bank, golden[name + "_bank"][step], atol=1e-5, rtol=0)


def test_hhcl_hybrid_is_the_published_one(golden):
    memory = DualMemory(golden["initial_bank"], hard_reference="hard")
    for step in range(6):
        q, targets = golden["queries"][step].clone().requires_grad_(), golden["targets"][step]
        mean, hard = (F.cross_entropy(logits, targets) for logits in memory.logits(q))
        (0.75 * hard + 0.25 * mean).backward()
        memory.update(q, targets)
        found = torch.stack([hard, mean]).detach()
        torch.testing.assert_close(found, golden["hhcl_hybrid_loss"][step], atol=1e-5, rtol=0)
        torch.testing.assert_close(q.grad, golden["hhcl_hybrid_grad"][step], atol=1e-5, rtol=0)
        bank = torch.cat([memory.hard, memory.mean])
        torch.testing.assert_close(bank, golden["hhcl_hybrid_bank"][step], atol=1e-5, rtol=0)


def test_the_papers_reference_differs_from_hhcls(golden):
    """The golden batches do tell the two references apart, so the test above would notice a mix-up."""
    memory = DualMemory(golden["initial_bank"])
    for step in range(6):
        memory.update(golden["queries"][step], golden["targets"][step])
    assert (memory.hard - golden["hhcl_hybrid_bank"][-1][:40]).abs().max() > 0.1
    torch.testing.assert_close(memory.mean, golden["hhcl_hybrid_bank"][-1][40:], atol=1e-5, rtol=0)


# Naive loops


@cases
@given(seeds, sizes, momenta, st.sampled_from(["mean", "hard"]), st.booleans())
def test_dual_memory_is_the_loop_over_clusters(seed, b, momentum, reference, normalise):
    mean, hard, _, _ = world(seed)
    memory = DualMemory(mean, hard, momentum, hard_reference=reference, normalise_mean=normalise)
    for step in range(3):
        _, _, q, targets = world(seed + step + 1, b)
        mean, hard = naive_dual(mean, hard, q, targets, momentum, reference, normalise)
        memory.update(q, targets)
        torch.testing.assert_close(memory.mean, mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(memory.hard, hard, atol=1e-4, rtol=0)
        mean, hard = memory.mean.clone(), memory.hard.clone()


@cases
@given(seeds, sizes, momenta)
def test_sequential_memory_is_the_loop_over_instances(seed, b, momentum):
    rows, _, q, targets = world(seed, b)
    memory = ClusterMemory(rows, "sequential", momentum)
    memory.update(q, targets)
    for feature, t in zip(q, targets.tolist()):
        rows[t] = naive_mix(rows[t], feature, momentum)
    torch.testing.assert_close(memory.bank, rows, atol=1e-5, rtol=0)


@cases
@given(seeds, sizes, momenta)
def test_single_memories_are_the_halves_of_the_dual_one(seed, b, momentum):
    rows, _, q, targets = world(seed, b)
    mean, hard = naive_dual(rows, rows, q, targets, momentum, "hard")
    for rule, expected in ("mean", mean), ("hard", hard):
        memory = ClusterMemory(rows, rule, momentum)
        memory.update(q, targets)
        torch.testing.assert_close(memory.bank, expected, atol=1e-4, rtol=0)


@cases
@given(seeds, st.integers(1, 40))
def test_hardest_samples_is_a_search_in_each_cluster(seed, n):
    g = torch.Generator().manual_seed(seed)
    features = unit(g, n + K, D)
    labels = torch.cat([torch.arange(K), torch.randint(-1, K, (n,), generator=g)])
    labels = labels[torch.randperm(n + K, generator=g)]
    rows = unit(g, K, D)
    found = hardest_samples(features, labels.numpy(), rows)
    for i in range(K):
        members = features[labels == i]
        similar = [float((feature * rows[i]).sum()) for feature in members]
        assert torch.equal(found[i], members[similar.index(min(similar))])


def test_helpers_by_hand():
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    targets = torch.tensor([5, 5, 2, 5])
    assert first_of(targets).tolist() == [0, 0, 2, 0]
    third = 1 / 3
    torch.testing.assert_close(batch_mean(q, targets)[[0, 2]], torch.tensor([[third, 2 * third], [1.0, 0.0]]))
    torch.testing.assert_close(batch_mean(q, targets, normalise=True).norm(dim=1), torch.ones(4))
    bank = torch.tensor([[1.0, 0.0]] * 6)
    assert hardest(q, targets, bank).tolist() == [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    blend(bank, torch.tensor([3]), torch.tensor([[0.0, 1.0]]), 0.6)
    torch.testing.assert_close(bank[3], torch.tensor([0.6, 0.4]) / 0.52**0.5)


def test_ties_go_to_the_first_in_the_batch():
    up, down = torch.tensor([0.6, 0.8]), torch.tensor([0.6, -0.8])  # equally similar to the row (1, 0)
    bank = torch.tensor([[1.0, 0.0]])
    for first, second in (up, down), (down, up):
        assert torch.equal(hardest(torch.stack([first, second]), torch.tensor([0, 0]), bank)[1], first)


def test_the_reference_is_the_row_before_the_update():
    """After the mean row has moved, the other instance would be the hardest."""
    row, near, far = torch.tensor([[1.0, 0.0]]), torch.tensor([0.8, 0.6]), torch.tensor([0.0, 1.0])
    q, targets = torch.stack([near, far, far]), torch.zeros(3, dtype=torch.long)
    memory = DualMemory(row, momentum=0.0)
    memory.update(q, targets)
    assert (q @ memory.mean[0]).argmin() == 0
    torch.testing.assert_close(memory.hard[0], far)


# Invariances


@cases
@given(seeds, sizes)
def test_order_of_the_batch_does_not_matter(seed, b):
    mean, hard, q, targets = world(seed, b)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    one, two = DualMemory(mean, hard), DualMemory(mean, hard)
    one.update(q, targets)
    two.update(q[order], targets[order])
    torch.testing.assert_close(one.mean, two.mean, atol=1e-5, rtol=0)
    assert torch.equal(one.hard, two.hard)


def test_order_matters_to_the_sequential_update():
    g = torch.Generator().manual_seed(0)
    q, targets = unit(g, 8, D), torch.zeros(8, dtype=torch.long)
    one, two = (ClusterMemory(torch.ones(1, D), "sequential") for _ in range(2))
    one.update(q, targets)
    two.update(q.flip(0), targets)
    assert (one.bank - two.bank).norm() > 0.5
    assert one.bank[0] @ q[-1] > 0.9 and two.bank[0] @ q[0] > 0.9  # the last one dominates


@cases
@given(seeds, sizes, st.sampled_from(["dual", *ClusterMemory.rules]))
def test_absent_clusters_stay_and_rows_stay_unit(seed, b, rule):
    rows, hard, q, targets = world(seed, b)
    memory = DualMemory(rows, hard) if rule == "dual" else ClusterMemory(rows, rule)
    before = {name: buffer.clone() for name, buffer in memory.named_buffers()}
    memory.update(q, targets)
    absent = [i for i in range(K) if i not in targets]
    assert absent
    for name, buffer in memory.named_buffers():
        assert torch.equal(buffer[absent], before[name][absent])
        assert not torch.equal(buffer[targets], before[name][targets])
        torch.testing.assert_close(buffer.norm(dim=1), torch.ones(K))


@pytest.mark.parametrize("write", ["blend", "blend_in_turn"])
def test_repeated_writes_carry_the_same_bits(write):
    """Whichever write of a cluster lands last, the row is the same: every write is checked, by recording it."""
    written = {}

    class Recorder(torch.Tensor):
        def __setitem__(self, key, value):
            written["rows"] = torch.Tensor(value).clone()
            super().__setitem__(key, value)

    rows, _, q, targets = world(3, 24)
    bank = rows.clone().as_subclass(Recorder)
    if write == "blend":
        noise = 1e-7 * torch.rand(24, 1)  # new values that differ in the last bits within a cluster
        blend(bank, targets, batch_mean(q, targets) + noise, 0.1)
    else:
        blend_in_turn(bank, targets, q, 0.1)
    for i in targets.unique():
        copies = written["rows"][targets == i]
        assert (copies == copies[0]).all()


def test_update_is_repeatable_to_the_bit():
    mean, hard, q, targets = world(1, 24)
    results = []
    for _ in range(2):
        memory = DualMemory(mean, hard)
        memory.update(q, targets)
        results.append(torch.cat([memory.mean, memory.hard]))
    assert torch.equal(*results)


# Logits, gradients, number formats


def test_logits_are_similarities_over_temperature():
    mean, hard, q, _ = world(0)
    logits = DualMemory(mean, hard, temperature=0.2).logits(q)
    for found, bank in zip(logits, (mean, hard)):
        expected = [[sum(a * b for a, b in zip(f.tolist(), row.tolist())) / 0.2 for row in bank] for f in q]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_gradient_reaches_the_features_and_not_the_memory():
    mean, hard, q, targets = world(0)
    memory, q = DualMemory(mean, hard), q.requires_grad_()
    mean_logits, hard_logits = memory.logits(q)
    (2 * mean_logits.sum() + hard_logits.sum()).backward()
    expected = ((2 * mean + hard).sum(0) / 0.05).expand_as(q)
    torch.testing.assert_close(q.grad, expected, atol=1e-3, rtol=1e-5)
    assert not list(memory.parameters())
    memory.update(q, targets)  # q still asks for gradients: the update must not record any
    assert not memory.mean.requires_grad and memory.mean.grad_fn is None


def test_backward_never_updates():
    mean, hard, q, _ = world(0)
    memory, q = DualMemory(mean, hard), q.requires_grad_()
    before = memory.mean.clone()
    for _ in range(2):
        sum(logits.sum() for logits in memory.logits(q)).backward()
    assert torch.equal(memory.mean, before)


def test_an_update_between_loss_and_backward_is_noticed():
    mean, hard, q, targets = world(0)
    memory, q = DualMemory(mean, hard), q.requires_grad_()
    loss = sum(logits.sum() for logits in memory.logits(q))
    memory.update(q, targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memory_stays_float32(dtype):
    mean, hard, q, targets = world(0)
    memory, twin = DualMemory(mean, hard), DualMemory(mean, hard)
    q = q.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = memory.logits(q)
        memory.update(q, targets)
    twin.update(q.float(), targets)
    for found, bank in zip(logits, (mean, hard)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, q.float() @ bank.T / 0.05)
    assert torch.equal(memory.mean, twin.mean) and torch.equal(memory.hard, twin.hard)
    assert memory.mean.dtype == torch.float32


def test_start_is_a_copy_of_unit_rows():
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(0))
    kept = centres.clone()
    memory = DualMemory(centres)
    assert torch.equal(memory.mean, memory.hard)
    memory.update(-F.normalize(centres, dim=1), torch.arange(K))
    assert torch.equal(centres, kept)
    memory = DualMemory(F.normalize(centres, dim=1), momentum=0.0)
    memory.mean.zero_()
    assert memory.hard.norm() > 1  # the two tables do not share storage
    assert set(dict(memory.named_buffers())) == {"mean", "hard"}


def test_memory_needs_no_host_sync(monkeypatch):
    """On a device without values (meta) anything that read a value back would fail, as the sequential update does."""
    monkeypatch.setattr(affscl.criteria.memory, "_float32", lambda device: nullcontext())  # meta knows no autocast
    q, targets = torch.empty(6, 4, device="meta"), torch.empty(6, dtype=torch.long, device="meta")
    memory = DualMemory(torch.eye(4)).to("meta")
    memory.update(q, targets)
    assert [logits.shape for logits in memory.logits(q)] == [(6, 4), (6, 4)]
    with pytest.raises(RuntimeError, match="meta"):
        ClusterMemory(torch.eye(4), "sequential").to("meta").update(q, targets)


# Messages


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(momentum=1.0), "weight of the old row"),
        (dict(momentum=-0.1), r"\[0, 1\)"),
        (dict(momentum=float("nan")), r"\[0, 1\)"),
        (dict(temperature=0), "positive"),
        (dict(temperature=float("inf")), "finite"),
        (dict(hard_reference="median"), "'mean', 'hard'"),
        (dict(hard=torch.eye(3)), r"\(2, 3\), found \(3, 3\)"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DualMemory(torch.eye(2, 3), **options)


def test_problems_are_sentences_and_all_are_told():
    assert choice_problems("letter", "a", ("a", "b")) == memory_problems(0.0, 0.05) == []
    assert choice_problems("letter", "c", ("a", "b")) == ["letter = 'c' is unknown; choose one of 'a', 'b'"]
    assert len(memory_problems(1.0, 0)) == 2
    with pytest.raises(ValueError) as caught:
        DualMemory(torch.eye(2, 3), momentum=2, temperature=0, hard_reference="median")
    assert len(str(caught.value).splitlines()) == 3


def test_wrong_values_are_refused():
    memory = DualMemory(torch.eye(2, 3))
    with pytest.raises(ValueError, match="'mean', 'hard', 'sequential'"):
        ClusterMemory(torch.eye(2), rule="last")
    with pytest.raises(ValueError, match="outliers"):
        memory.update(torch.eye(2, 3), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"0\.\.1, found 0\.\.2"):
        memory.update(torch.eye(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="one dimension"):
        check_targets(torch.zeros(2, 1, dtype=torch.long), 2)
    with pytest.raises(ValueError, match=r"\(b, 3\).*\(2, 4\)"):
        memory.logits(torch.eye(2, 4))
    assert torch.equal(memory.mean, torch.eye(2, 3))  # a refused update leaves no trace


@pytest.mark.parametrize(
    "table, words",
    [
        (torch.zeros(0, 3), "row for each cluster"),
        (torch.ones(3), "row for each cluster"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "row 1 of hard"),
        (torch.tensor([[1.0, float("nan")], [1.0, 0.0]]), "row 0 of hard"),
        (torch.tensor([[float("inf"), 0.0]]), "not finite"),
    ],
)
def test_catalogue_that_would_poison_are_refused(table, words):
    with pytest.raises(ValueError, match=words):
        memory_rows(table, "hard")


def test_similarities_do_not_change_with_autocast():
    mean, _, q, _ = world(0)
    plain = similarities(q, mean, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarities(q, mean, 0.05), plain)
