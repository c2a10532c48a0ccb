"""Teams: the running mean against a loop, both views, refusals, and runs with a teacher that go on exactly.

AFFSCL_LONG=1 pytest tests/test_team.py: also a mean teacher alone, a source before a pair, and all networks of stripes.
"""

from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from long_forms import ASKED, LONG
from small_networks import images, small

from affscl.data.store import ImageStore
from affscl.data.synthetic import make_dataset
from affscl.model.extraction import extract
from affscl.model.network import AFF, load_model
from affscl.model.norms import CameraNorm
from affscl.model.team import Team, kept_network, make_team, trained_parameters, views_wanted
from affscl.training.config import RECIPES, BatchOptions, Config
from affscl.training.loading import train_loader
from affscl.training.loop import prepare, train
from affscl.training.runs import read_state

PAIR = dict(teacher="mutual", criterion="cross_entropy_triplet", label_smoothing=0.1)
TEAMS = {"mean": dict(teacher="mean", teacher_momentum=0.9), "mutual": PAIR | {"teacher_momentum": 0.9}}


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
    ],
)
def test_what_cannot_work_is_refused_by_name(wrong, told):
    with pytest.raises(ValueError) as error:
        Config(**wrong)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "fine", [dict(teacher="mean", crossing=True), dict(teacher="mean", labels="truth"), PAIR | dict(labels="a.csv")]
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
    count = 2 if name == "mutual" else 1
    assert {key.split(".")[2] for key in mine if key.startswith("model.teachers.")} == set(map(str, range(count)))
    loaded, x = load_model(whole.run), images(2)
    assert isinstance(loaded, AFF) and isinstance(whole.model, AFF)
    torch.testing.assert_close(extract(loaded, x), extract(whole.model, x))
    teacher = {key[17:]: value for key, value in mine.items() if key.startswith("model.teachers.0.")}
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in teacher.items())
    student = mine["model.students.0.neck.weight"]
    assert not torch.equal(student, teacher["neck.weight"])
    keys = {"loss", "loss_triplet", "loss_soft_triplet"} if name == "mutual" else {"loss", "loss_hard", "loss_mean"}
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
