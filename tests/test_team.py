"""Teams: the running mean against a loop, both views, refusals, and runs with a teacher that go on exactly.

AFFSCL_LONG=1 pytest tests/test_team.py: also a mean teacher alone, experts, a source before a pair and before each
expert, and all networks of stripes.
"""

from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from long_forms import ASKED, LONG
from small_networks import images, small

from affscl.data.store import ImageStore
from affscl.data.synthetic import make_dataset
from affscl.model.extraction import extract
from affscl.model.network import AFF, load_model
from affscl.model.norms import CameraNorm
from affscl.model.team import Team, alone, kept_network, make_team, network_kinds, trained_parameters, views_wanted
from affscl.training import loop as training
from affscl.training.config import RECIPES, BatchOptions, Config
from affscl.training.loading import train_loader
from affscl.training.loop import prepare, train
from affscl.training.runs import read_state

PAIR = dict(teacher="mutual", criterion="cross_entropy_triplet", label_smoothing=0.1)
TEAMS = {"mean": dict(teacher="mean", teacher_momentum=0.9), "mutual": PAIR | {"teacher_momentum": 0.9}}
EXPERTS = PAIR | dict(teacher="brainstorming", experts=("resnet18",), expert_weights=("none",))
TEAMS["brainstorming"] = EXPERTS | {"teacher_momentum": 0.9}
TINY = dict(backbone="resnet10", weights="synthetic", height=64, width=32)


def test_teachers_are_the_running_means_of_their_students():
    torch.manual_seed(0)
    students = [AFF("resnet10", height=64, width=32) for _ in range(2)]
    team = Team(students, 0.7)
    means = [{name: p.clone() for name, p in student.named_parameters()} for student in students]
    for step in range(1, 6):
        alpha = min(1 - 1 / step, 0.7)
        for student, mean in zip(students, means):
            for name, parameter in student.named_parameters():
                parameter.data += torch.randn_like(parameter)
                mean[name] = alpha * mean[name] + (1 - alpha) * parameter
        assert team.follow() == pytest.approx(alpha)
    for teacher, mean in zip(team.teachers, means):
        for name, parameter in teacher.named_parameters():
            torch.testing.assert_close(parameter, mean[name])
            assert not parameter.requires_grad
    assert {id(p) for p in trained_parameters(team)} == {id(p) for s in students for p in s.parameters()}


def test_a_pair_sees_two_views_and_answers_with_four():
    torch.manual_seed(0)
    team = Team([small(), AFF("resnet10", height=64, width=32)], 0.9).eval()
    for teacher in team.teachers:
        teacher.neck.weight.data += torch.rand(256)
    views = torch.stack([images(3), images(3, seed=1)], 1)
    output = team(views)
    assert output.unit.shape == (3, 4, 256)
    for i, network in enumerate((*team.students, *team.teachers)):
        torch.testing.assert_close(output.unit[:, i], network(views[:, i % 2]).unit, rtol=1e-4, atol=1e-5)
    assert output.unit.grad_fn is not None and kept_network(team) is team.teachers[0]


def test_experts_see_a_view_each_and_short_features_end_with_zeros():
    torch.manual_seed(0)
    students = [AFF(kind, height=64, width=32) for kind in ("resnet10", "resnet18", "resnet10")]
    team, views = Team(students, 0.9, experts=True).eval(), torch.stack([images(3, seed=i) for i in range(3)], 1)
    output = team(views)
    assert output.pooled.shape == (3, 6, 512)
    for i, network in enumerate((*team.students, *team.teachers)):
        for found, own in zip(output, network(views[:, i % 3])):
            torch.testing.assert_close(found[:, i, : network.dim], own, rtol=1e-4, atol=1e-5)
            assert not found[:, i, network.dim :].any()
    assert kept_network(team) is team.teachers[0]
    rows = [F.normalize(torch.randn(5, network.dim)) for network in students]
    together = team.together(rows)
    torch.testing.assert_close(together @ together.T, sum(part @ part.T for part in rows) / 3)
    torch.testing.assert_close(Team(students[::2], 0.9).together(rows[::2]), F.normalize(rows[0] + rows[2]))


def test_a_mean_teacher_leaves_the_students_output_alone_and_keeps_statistics_of_its_own():
    plain, team = small(), Team([small()], 0.9)
    x = images(6)
    assert torch.equal(plain(x).unit, team(x).unit)
    team.students[0].neck.weight.data *= 2
    team.teachers[0].pool.forward = lambda maps: maps.amax((2, 3))
    team(x)
    assert not torch.equal(team.teachers[0].neck.running_mean, team.students[0].neck.running_mean)


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(teacher="students"), "teacher='students': choose one of off, mean, mutual"),
        (dict(teacher="mean", teacher_momentum=1.0), "teacher_momentum=1.0: must be 0 or more, and less than 1"),
        (dict(teacher="mean", teacher_momentum=-0.1), "teacher_momentum=-0.1"),
        (dict(teacher_momentum=0.9), "there is no teacher: set teacher to 'mean' or 'mutual'"),
        (dict(soft_entropy=0.2), "soft_entropy=0.2: only teacher='mutual' reads it"),
        (dict(teacher="mean", soft_triplet=0.2), "soft_triplet=0.2: only teacher='mutual' reads it"),
        (PAIR | dict(soft_triplet=1.2), "soft_triplet=1.2: must lie between 0 and 1"),
        (PAIR | dict(criterion="hhcl", label_smoothing=0.0), "set criterion to 'cross_entropy_triplet'"),
        (PAIR | dict(labels="truth"), "teacher='mutual' is about pseudo labels"),
        (PAIR | dict(crossing=True), "crossing=True judges the batch of one network"),
        (PAIR | dict(margin=0.5), "margin=0.5: the triplets of teacher='mutual' have none"),
        (PAIR | dict(p=1), "p=1: teacher='mutual' needs strangers in a batch"),
        (EXPERTS | dict(experts=(), expert_weights=()), "has one network and no partner: name the backbones of others"),
        (EXPERTS | dict(experts=("resnet10", "vgg16"), expert_weights=()), "unknown backbone 'vgg16': choose one of"),
        (EXPERTS | dict(expert_weights=("none", "none")), "give one for each of the 1 experts"),
        (EXPERTS | dict(expert_weights=("synthetic",)), "resnet18 cannot start from weights='synthetic'"),
        (EXPERTS | dict(expert_weights=(), weights="synthetic"), "which are for resnet10: give each expert its own"),
        (
            EXPERTS | dict(expert_weights=(), weights="a.pth"),
            "cannot start from weights='a.pth', which are for resnet50",
        ),
        (EXPERTS | dict(experts=("resnet10",), expert_weights=("imagenet",)), "resnet10 cannot start from weights="),
        (EXPERTS | dict(network="hpm"), "network='hpm': experts are AFF on several backbones"),
        (EXPERTS | dict(camera_map=True), "camera_map=True moves the features of one network"),
        (EXPERTS | dict(criterion="hhcl", label_smoothing=0.0), "teacher='brainstorming' compares classifiers"),
        (EXPERTS | dict(labels="truth"), "teacher='brainstorming' is about pseudo labels"),
        (EXPERTS | dict(crossing=True), "leave it at False with teacher='brainstorming'"),
        (PAIR | dict(experts=("resnet18",)), "experts=('resnet18',): only teacher='brainstorming' reads it"),
        (dict(teacher="mean", expert_weights=("none",)), "expert_weights=('none',): only teacher='brainstorming'"),
    ],
)
def test_what_cannot_work_is_refused_by_name(wrong, told):
    with pytest.raises(ValueError) as error:
        Config(**wrong)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "fine",
    [dict(teacher="mean", crossing=True), dict(teacher="mean", labels="truth"), PAIR | dict(labels="a.csv")]
    + [EXPERTS | dict(expert_weights=()), EXPERTS | dict(expert_weights=(), weights="imagenet"), EXPERTS | TINY]
    + [EXPERTS | dict(expert_weights=("a.pth",), labels="a.csv"), EXPERTS | TINY | dict(expert_weights=("imagenet",))],
)
def test_what_goes_together(fine):
    assert Config(**fine).teacher == fine["teacher"]


def test_makes_what_is_asked_for():
    make = partial(small, camera_norm=True)
    assert isinstance(make_team(Config(), make), AFF)
    for name, count in (("mean", 1), ("mutual", 2)):
        team = make_team(Config(**TEAMS[name]), make, 3)
        assert len(team.students) == len(team.teachers) == views_wanted(Config(**TEAMS[name])) == count
        assert [m.processes for m in team.modules() if isinstance(m, CameraNorm)] == [3] * 2 * count
    assert views_wanted(BatchOptions()) == 1


def test_experts_have_backbones_and_weights_of_their_own(tmp_path):
    config = Config(**TINY, **EXPERTS | dict(experts=("resnet18", "resnet10"), expert_weights=("none", "synthetic")))
    kinds = [("resnet10", "synthetic"), ("resnet18", None), ("resnet10", "synthetic")]
    assert [tuple(own.values()) for own in network_kinds(config)] == kinds and views_wanted(config) == 3
    team = make_team(config, small, 1, [own["weights"] for own in network_kinds(config)])
    assert team.experts and [(s.options.backbone, s.options.weights) for s in team.students] == kinds
    before = [alone(config, i) for i in range(3)]
    assert [(c.backbone, c.weights, c.seed, c.teacher, c.experts) for c in before] == [
        (*kind, 1 + i, "off", ()) for i, kind in enumerate(kinds)
    ]
    for file in tmp_path / "a.pth", tmp_path:
        with pytest.raises(FileNotFoundError, match="expert_weights: looked for .*no such file"):
            alone(replace(config, expert_weights=("none", str(file))))
    (tmp_path / "b.pth").touch()
    assert alone(replace(config, expert_weights=("none", str(tmp_path / "b.pth"))), 2).weights.endswith("b.pth")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    world = make_dataset(tmp_path_factory.mktemp("world") / "market", n_ids=24, n_cams=3, seed=5)
    tiny = replace(RECIPES["tiny"], device="cpu", epochs=2, iterations=3, p=4, k=4, k1=10)
    return replace(tiny, dataset="market1501", data=str(world))


def test_two_views_of_a_crop_differ_and_the_first_is_the_usual_one(short):
    store = ImageStore(prepare(short).train.samples[:16], 64, 32)
    batches, labels = [np.arange(8), np.arange(8, 16)], np.zeros(16, np.int64)
    one, two = (
        list(train_loader(store, labels, batches, options, (1, 1))) for options in (short, replace(short, **PAIR))
    )
    halves = [[*train_loader(store, labels, batches, replace(short, **PAIR), (1, 1), r, 2)] for r in (0, 1)]
    for i, ((usual, *_), (views, *_)) in enumerate(zip(one, two)):
        assert views.shape == (8, 2, 3, 64, 32) and torch.equal(views[:, 0], usual)
        assert not any(torch.equal(a, b) for a, b in views)
        assert torch.equal(torch.cat([half[i][0] for half in halves]), views)


@pytest.mark.parametrize("name", TEAMS if ASKED else ["mutual"])
def test_a_run_keeps_its_teacher_and_goes_on_exactly(name, short, tmp_path):
    config = replace(short, **TEAMS[name])
    whole = train(config, tmp_path / "whole")
    train(replace(config, epochs=1), tmp_path / "halves")
    halves = train(config, resume=tmp_path / "halves")
    mine, theirs = (read_state(run.run / "resume.safetensors").tensors for run in (whole, halves))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert int(mine["model.steps"]) == 6
    count = views_wanted(config)
    assert {key.split(".")[2] for key in mine if key.startswith("model.teachers.")} == set(map(str, range(count)))
    loaded, x = load_model(whole.run), images(2)
    assert isinstance(loaded, AFF) and isinstance(whole.model, AFF)
    torch.testing.assert_close(extract(loaded, x), extract(whole.model, x))
    teacher = {key[17:]: value for key, value in mine.items() if key.startswith("model.teachers.0.")}
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in teacher.items())
    student = mine["model.students.0.neck.weight"]
    assert not torch.equal(student, teacher["neck.weight"])
    keys = {"loss", "loss_hard", "loss_mean"} if name == "mean" else {"loss", "loss_triplet", "loss_soft_triplet"}
    assert keys <= whole.history[-1].keys()
    with pytest.raises(ValueError, match="teacher is 'off' now, and was"):
        train(replace(config, **asdict(replace(short, epochs=3))), resume=tmp_path / "halves")


@LONG
def test_a_source_before_a_pair_is_trained_alone(short, tmp_path):
    config = replace(
        short, epochs=1, source="synthetic", adapt="pretrain", world_ids=24, world_cams=3, iterations=2, **PAIR
    )
    run = train(config, tmp_path / "run").run
    before = read_state(run / "source" / "resume.safetensors").tensors
    assert not any("teachers" in key for key in before)
    after = read_state(run / "resume.safetensors").tensors
    assert any(key.startswith("model.teachers.1.") for key in after)


@LONG
def test_each_expert_is_trained_on_the_source_first_and_goes_on_where_it_was_interrupted(short, tmp_path, monkeypatch):
    source = dict(source="synthetic", adapt="pretrain", world_ids=24, world_cams=3, iterations=2)
    config, epoch, seen = replace(short, epochs=1, **source, **EXPERTS), training.train_epoch, []
    whole = train(config, tmp_path / "whole").run

    def stop_in_the_second_source(job, asked, *rest):
        seen.append((asked.adapt, asked.backbone, asked.seed))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return epoch(job, asked, *rest)

    monkeypatch.setattr(training, "train_epoch", stop_in_the_second_source)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parted")
    parted = train(config, resume=tmp_path / "parted").run
    second = ("source", "resnet18", 2)
    assert seen == [("source", "resnet10", 1), second, second, ("pretrain", "resnet10", 1)]
    mine, theirs = (read_state(run / "resume.safetensors").tensors for run in (whole, parted))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    start = read_state(parted / "source2" / "resume.safetensors").tensors["model.backbone.conv1.weight"]
    moved = mine["model.students.1.backbone.conv1.weight"]
    assert 0 < (moved - start).abs().max() < 0.1 and moved.shape[0] == 64


@pytest.mark.parametrize("name", ["mgn", "hpm", "mhn"] if ASKED else ["mgn"])
def test_networks_of_stripes_train_with_labels(name, short, tmp_path):
    """A run, its files and its way back; with labels, each piece has a classifier."""
    orders = {"orders": 2} if name == "mhn" else {}
    labels = dict(labels="truth", criterion="cross_entropy_triplet", epochs=1, iterations=2)
    config = replace(short, network=name, **orders, **labels)
    result = train(config, tmp_path / "run")
    tensors = read_state(result.run / "resume.safetensors").tensors
    rows = tensors["criterion.classifier.weight"]
    assert rows.shape[1:] == (256, 1) and len(rows) % (result.model.dim // 256) == 0
    x = images(2)
    torch.testing.assert_close(extract(load_model(result.run), x), extract(result.model, x))
