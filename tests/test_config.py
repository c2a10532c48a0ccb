"""Settings: what the recipes hold, what is refused, and that all problems are told together."""

import inspect
from dataclasses import fields, replace

import pytest

from affscl.training.config import (
    MODES,
    RECIPES,
    SOURCES,
    AdaptationOptions,
    BatchOptions,
    Config,
    SupervisedOptions,
    adaptation_problems,
    batch_problems,
    differences,
    supervised_problems,
)


class TestConfig:
    def test_full_recipes_carry_the_papers_settings(self):
        paper = dict(
            backbone="resnet50",
            layout="paper",
            height=256,
            width=128,
            p=16,
            k=8,
            epochs=60,
            lr=3.5e-4,
            lr_step=20,
            weight_decay=5e-4,
            k1=30,
            k2=6,
            min_samples=4,
            iterations=400,
            momentum=0.1,
            temperature=0.05,
            hard_weight=0.75,
            mean_weight=0.25,
            criterion="symmetric",
            balance="auto",
            flip=0.5,
            pad=10,
            erase=0.5,
            bn_chunk=64,
            last_stride=1,
        )
        for name, eps in (("market1501", 0.65), ("dukemtmc", 0.7), ("msmt17", 0.6)):
            recipe = RECIPES[name]
            assert {key: getattr(recipe, key) for key in paper} == paper
            assert recipe.dataset == name and recipe.eps == eps

    def test_names_its_recipe(self):
        assert all(recipe.recipe == name for name, recipe in RECIPES.items())

    def test_all_mistakes_are_told_together(self):
        with pytest.raises(ValueError) as error:
            Config(epochs=0, labels="guess", lr=-1.0, backbone="vgg", balance="maybe")
        for word in ("epochs", "labels", "clusters", "lr", "resnet50", "stop_gradient"):
            assert word in str(error.value)

    def test_differences_are_those_from_the_defaults(self):
        assert differences(Config(eps=0.5)) == {"eps": 0.5}

    def test_every_field_has_a_comment(self):
        lines = {}
        for base in Config.__mro__[:-1]:
            for line in inspect.getsource(base).splitlines():
                name = line.strip().split(":")[0]
                if line.startswith("    ") and ":" in line and name.isidentifier():
                    lines[name] = line
        assert [f.name for f in fields(Config) if "#" not in lines[f.name]] == []

    def test_contradictions_are_told_together(self):
        with pytest.raises(ValueError) as error:
            Config(
                source="market1501",
                labels="truth",
                adapt="mixed",
                camera_links=2.0,
                links_from=0,
                search="magic",
                negatives="some",
            )
        for word in (
            "labels='truth'",
            "joint, pretrain, source",
            "camera_links=2.0",
            "links_from=0",
            "exact, faiss",
            "'all', 'camera'",
        ):
            assert word in str(error.value)


class TestAdaptationOptions:
    @pytest.mark.parametrize(
        "fine",
        [
            dict(),
            *(dict(source=name) for name in SOURCES),
            dict(source="dukemtmc", adapt="pretrain"),
            dict(source="dukemtmc", adapt="source"),
            dict(source="synthetic", source_look=3, source_seed=9, source_data="worlds", domain_norm=False),
        ],
    )
    def test_valid_options(self, fine):
        assert adaptation_problems(AdaptationOptions(**fine)) == []

    @pytest.mark.parametrize(
        "wrong, message",
        [
            (
                dict(source="market", source_data="x"),
                "source='market': choose one of market1501, dukemtmc, msmt17, cuhk03, cuhk03np, folder, synthetic",
            ),
            (dict(source="market1501", adapt="both"), "adapt='both': choose one of joint, pretrain, source"),
            (dict(source_data="x"), "source_data='x' is about a source, and there is none"),
            (dict(source_look=2), "leave source_look at 1"),
            (dict(source_seed=2), "source_seed=2 is about"),
            (dict(adapt="pretrain"), "leave adapt at 'joint'"),
            (dict(domain_norm=False), "leave domain_norm at True"),
            (dict(source="synthetic", source_look=-1), "source_look=-1: must not be negative"),
            (dict(source="dukemtmc", source_seed=1), "the source is 'dukemtmc'"),
        ],
    )
    def test_invalid_options(self, wrong, message):
        assert any(message in problem for problem in adaptation_problems(AdaptationOptions(**wrong)))

    def test_every_problem_has_a_line(self):
        lines = adaptation_problems(
            AdaptationOptions(source_data="x", source_look=-1, source_seed=4, adapt="both", domain_norm=False)
        )
        assert all(
            any(line.startswith(f"{f.name}=") for line in lines)
            for f in fields(AdaptationOptions)
            if f.name != "source"
        )

    def test_p_is_even_where_it_is_halved(self):
        with pytest.raises(ValueError, match="p=5: must be even"):
            Config(source="dukemtmc", p=5)
        assert Config(source="dukemtmc", p=5, adapt="pretrain").p == 5
        assert MODES == ("joint", "pretrain", "source")


class TestSupervisedOptions:
    @pytest.mark.parametrize(
        "wrong, message",
        [
            (dict(warmup=-1), "warmup=-1: must not be negative"),
            (dict(milestones=(70, 40)), "milestones="),
            (dict(milestones=(40, 40)), "milestones="),
            (dict(milestones=(0, 40)), "milestones="),
            (dict(centre_weight=-0.1), "centre_weight=-0.1"),
            (dict(centre_weight=float("inf")), "centre_weight=inf"),
            (dict(centre_rate=-0.5), "centre_rate=-0.5"),
            (dict(centre_rate=float("nan")), "centre_rate=nan"),
        ],
    )
    def test_supervised_options_refused(self, wrong, message):
        (problem,) = supervised_problems(replace(SupervisedOptions(), **wrong))
        assert message in problem

    def test_supervised_options_tell_all_problems_at_once(self):
        assert len(supervised_problems(SupervisedOptions(-1, (2, 1), -1, 2))) == 4

    def test_supervised_options_accepted(self):
        assert supervised_problems(SupervisedOptions()) == []
        assert supervised_problems(SupervisedOptions(10, (40, 70), 0.0005, 0.5)) == []
        assert supervised_problems(SupervisedOptions(milestones=[40, 70])) == []  # as JSON brings them back


class TestBatchOptions:
    @pytest.mark.parametrize(
        "wrong, message",
        [
            (dict(p=0), "p=0: must be 1 or more"),
            (dict(k=0), "k=0: must be 1 or more"),
            (dict(p=1, k=1), "BatchNorm needs two"),
            (dict(workers=-1), "workers=-1: must not be negative"),
            (dict(pad=-1), "pad=-1: must not be negative"),
            (dict(flip=1.1), "flip=1.1: a probability"),
            (dict(erase=float("nan")), "erase=nan: a probability"),
        ],
    )
    def test_refused(self, wrong, message):
        (problem,) = batch_problems(replace(BatchOptions(), **wrong))
        assert message in problem

    def test_accepted(self):
        assert batch_problems(BatchOptions()) == batch_problems(BatchOptions(p=1, k=2, flip=0, erase=1)) == []


class TestLabelsThatNobodyReads:
    """MMCL and SSL find their targets themselves: labels that they would not read are refused."""

    @pytest.mark.parametrize("criterion", ["mmcl", "ssl"])
    @pytest.mark.parametrize("given", [dict(labels="truth"), dict(labels="names.csv"), dict(source="synthetic")])
    def test_they_are_refused_by_name(self, criterion, given):
        with pytest.raises(ValueError, match=f"criterion '{criterion}' finds its targets itself and reads no label"):
            replace(RECIPES["tiny"], criterion=criterion, **given)

    @pytest.mark.parametrize("criterion", ["symmetric", "spcl", "hhcl", "cap"])
    def test_others_read_them(self, criterion):
        replace(RECIPES["tiny"], criterion=criterion, labels="truth")
        replace(RECIPES["tiny"], criterion=criterion, source="synthetic")
