"""What each study varies, what it refuses, and the published numbers beside it."""

import json
from dataclasses import asdict, fields, replace

import pytest
from pretended import TINY, recipe_for

from affscl.model.network import AFF_ALONE
from affscl.studies.ablation import parse_ablate
from affscl.studies.catalogue import AE, COLOURED, SSG, STEPS, STUDIES, brainstorming
from affscl.studies.sweeps import plan
from affscl.training.config import ACROSS, BEST, RECIPES, AdaptationOptions


class TestStudies:
    @pytest.mark.parametrize("study", STUDIES)
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_only_what_is_studied_changes(self, study, recipe):
        source = {f.name for f in fields(AdaptationOptions)}
        supervised = {
            "labels",
            "criterion",
            "hard_weight",
            "mean_weight",
            "balance",
            "network",
            *AFF_ALONE,
            "last_stride",
        }
        allowed = {
            "table2": {key for s in STUDIES["table2"].settings(TINY) for key in s.changes} | {"camera_map"},
            "table3": source | {"camera_map", *brainstorming(TINY), *AE, *SSG},
            "table7": supervised,
            "field": {"criterion", "hard_weight", "mean_weight", "balance", *BEST},
            "path": {"criterion", "hard_weight", "mean_weight", "balance", *BEST},
            "without": {"criterion", "hard_weight", "mean_weight", "balance", "camera_map", "crossing", *BEST},
            "cameras": {"criterion", "hard_weight", "mean_weight", "balance", *ACROSS, *COLOURED, *BEST},
            "table4": {"criterion", "hard_weight", "mean_weight", "balance"},
            "table5": {"criterion", "hard_weight", "mean_weight"},
            "table6": {"k"},
            "figure4": {"eps"},
        }[study]
        config = recipe_for(study, recipe)
        base = asdict(config)
        for run in plan(study, config, [3]):
            assert {key for key, value in asdict(run.config).items() if value != base[key]} <= allowed | {"seed"}
            assert run.config.seed == 3

    def test_rows_of_a_study_differ_from_each_other(self):
        for study in STUDIES:
            configs = [json.dumps(asdict(run.config)) for run in plan(study, recipe_for(study), [1])]
            assert len(set(configs)) == len(configs)

    def test_table4_is_run_both_ways(self):
        changes = {s.name: s.changes for s in STUDIES["table4"].settings(TINY)}
        assert changes["baseline"]["criterion"] == "cross_entropy_triplet"
        assert (changes["mean only"]["criterion"], changes["hard only"]["criterion"]) == ("mean", "hard")
        for name, weights in (
            ("mean only, L_b", (0, 1)),
            ("hard only, L_b", (1, 0)),
            ("total", (0.75, 0.25)),
            ("total without L_b", (0.75, 0.25)),
        ):
            assert changes[name]["criterion"] == "symmetric"
            assert (changes[name]["hard_weight"], changes[name]["mean_weight"]) == weights
            assert (changes[name]["balance"] == "off") == (name == "total without L_b")

    def test_the_papers_numbers_agree_where_the_tables_meet(self):
        paper = {
            study: {s.name: (s.mAP, s.rank1) for s in STUDIES[study].settings(recipe_for(study, "market1501"))}
            for study in STUDIES
        }
        assert (
            paper["table4"]["total"]
            == paper["table5"]["0.75"]
            == paper["table6"]["8"]
            == paper["figure4"]["0.65"]
            == (78.8, 90.9)
        )
        assert (
            paper["table4"]["mean only, L_b"] == paper["table5"]["0"]
            and paper["table4"]["hard only, L_b"] == paper["table5"]["1"]
        )
        assert [paper["table4"][name][0] for name in ("baseline", "mean only", "hard only")] == [55.8, 70.6, 76.3]
        assert paper["table4"]["total without L_b"] == (None, None)

    def test_table3_and_table7_carry_the_papers_numbers(self):
        def paper(source, target):
            return {s.name: s.mAP for s in STUDIES["table3"].settings(replace(RECIPES[target], source=source))}

        assert (
            paper("dukemtmc", "market1501")["joint"] == 77.7 and paper("dukemtmc", "market1501")["target only"] == 78.8
        )
        assert (
            paper("market1501", "dukemtmc")["joint"] == 66.5 and paper("market1501", "dukemtmc")["target only"] == 68.6
        )
        assert paper("msmt17", "market1501")["joint"] is None
        assert paper("dukemtmc", "market1501")["MMT, pre-trained"] == 71.2
        assert paper("market1501", "dukemtmc")["MMT, pre-trained"] == 65.1
        assert paper("dukemtmc", "market1501")["MEB-Net, pre-trained"] == 76.0
        assert paper("market1501", "dukemtmc")["MEB-Net, pre-trained"] == 66.1
        assert [(s.name, s.mAP) for s in STUDIES["table7"].settings(TINY)] == [
            ("baseline", 81.7),
            ("+ L", 86.8),
            ("+ G", 87.4),
            ("+ AFF", 88.2),
            ("MGN", 86.9),
            ("HPM", 82.7),
            ("MHN-6", 85.0),
        ]

    def test_table7_leaves_out_networks_that_its_backbone_cannot_hold_and_puts_options_of_aff_back(self):
        small = {run.setting: run.config for run in plan("table7", replace(RECIPES["small"], swapped=True), [1])}
        assert list(small) == ["baseline", "+ L", "+ G", "+ AFF", "HPM"]
        assert small["HPM"].fusion == "multiply" and not small["HPM"].swapped and small["+ AFF"].swapped
        assert small["baseline"].fusion == "multiply" and small["+ L"].fusion == "residual"
        with pytest.raises(ValueError, match="table7 has no setting 'MGN'"):
            plan("table7", RECIPES["small"], [1], ["MGN"])

    def test_table3_takes_the_options_that_mmt_puts_aside(self):
        words = "table3 --source market1501 --criterion hhcl --negatives camera --crossing --margin 0.5"
        _, config = parse_ablate(words.split())
        runs = {run.setting: run.config for run in plan("table3", config, [1])}
        assert runs["joint"].criterion == "hhcl" and runs["joint"].crossing and runs["joint"].negatives == "camera"
        pair = runs["MMT, pre-trained"]
        assert (pair.teacher, pair.criterion, pair.crossing, pair.adapt) == (
            "mutual",
            "cross_entropy_triplet",
            False,
            "pretrain",
        )
        experts = runs["MEB-Net, pre-trained"]
        assert (experts.teacher, experts.crossing, experts.adapt) == ("brainstorming", False, "pretrain")
        with pytest.raises(ValueError, match="table3 sets teacher itself"):
            parse_ablate(["table3", "--source", "market1501", "--teacher", "mean"])

    @pytest.mark.parametrize(
        "recipe, changes, experts, weights",
        [
            ("tiny", {}, ("resnet18", "mobilenet_v2"), ("none", "none")),
            ("tiny", {"weights": None, "backbone": "resnet18"}, ("mobilenet_v2", "resnet34"), ()),
            ("small", {"weights": "imagenet"}, ("resnet18", "resnet34"), ()),
            ("small", {"weights": "a.pth"}, ("resnet18", "resnet34"), ("none", "none")),
            ("best", {}, ("resnet18", "resnet34"), ()),
        ],
    )
    def test_table3_gives_meb_net_two_other_backbones(self, recipe, changes, experts, weights):
        config = replace(RECIPES[recipe], source="synthetic", source_seed=1, **changes)
        (run,) = [run.config for run in plan("table3", config, [1]) if run.setting == "MEB-Net, pre-trained"]
        assert (run.experts, run.expert_weights, run.camera_map) == (experts, weights, False)

    def test_table3_leaves_meb_net_out_where_the_network_is_not_aff(self):
        config = replace(RECIPES["tiny"], source="synthetic", source_seed=1, network="hpm")
        assert "MEB-Net, pre-trained" not in {run.setting for run in plan("table3", config, [1])}

    @pytest.mark.parametrize("words", ["--swapped", "--reduction 4", "--last-stride 2", "--pooling gem"])
    def test_table7_takes_options_of_aff(self, words):
        """Chapter 61's exercise 4 runs it with --swapped."""
        _, config = parse_ablate(f"table7 --recipe supervised-quick {words}".split())
        name = words.split()[0][2:].replace("-", "_")
        assert {getattr(run.config, name) for run in plan("table7", config, [1]) if run.setting == "+ AFF"} == {
            getattr(config, name)
        }

    def test_a_recipe_that_contradicts_a_row_is_refused_before_anything_is_trained(self):
        with pytest.raises(ValueError, match="leave negatives at 'all'"):
            plan("table4", RECIPES["best"], [1])

    def test_the_path_adds_one_step_a_row_and_ends_at_best(self):
        rows = [asdict(run.config) for run in plan("path", RECIPES["small"], [1])]
        for before, after, names in zip(rows, rows[1:], STEPS.values()):
            assert {key for key in after if after[key] != before[key]} <= set(names)
        last = plan("field", RECIPES["small"], [1])[-1]
        assert last.setting == "best" and rows[-1] == asdict(last.config)
        assert replace(last.config, recipe="best", epochs=6, **ACROSS) == RECIPES["best"]

    def test_table2_is_about_methods_without_a_source(self):
        settings = {s.name: s for s in STUDIES["table2"].settings(TINY)}
        assert settings["AFF_SCL"].mAP == 78.8 and settings["true labels"].mAP is None
        assert STUDIES["table2"].bound in settings and settings["true labels"].changes["labels"] == "truth"
        with pytest.raises(ValueError, match="leave --source out"):
            parse_ablate(["table2", "--source", "synthetic"])
        with pytest.raises(ValueError, match="table2 sets criterion, labels itself"):
            parse_ablate(["table2", "--criterion", "hhcl", "--labels", "truth"])

    def test_table3_wants_a_source(self):
        with pytest.raises(ValueError, match="name one with --source"):
            plan("table3", TINY, [1])
        arguments, config = parse_ablate(["table3", "--source", "synthetic"])
        assert config.source == "synthetic"
        with pytest.raises(ValueError, match="table3 sets adapt itself"):
            parse_ablate(["table3", "--source", "synthetic", "--adapt", "pretrain"])

    def test_weights_sum_to_one(self):
        assert all(s.changes["hard_weight"] + s.changes["mean_weight"] == 1 for s in STUDIES["table5"].settings(TINY))

    def test_table6_is_relative_to_the_recipe(self):
        assert [s.changes["k"] for s in STUDIES["table6"].settings(RECIPES["market1501"])] == [4, 8, 16]
        assert [s.changes["k"] for s in STUDIES["table6"].settings(replace(TINY, k=6))] == [3, 6, 12]
        with pytest.raises(ValueError, match="even, found 5"):
            plan("table6", replace(TINY, k=5), [1])

    def test_plan_goes_seed_by_seed_and_repeats_none(self):
        runs = plan("table6", TINY, [2, 1, 2])
        assert [(r.setting, r.seed) for r in runs] == [(k, seed) for seed in (2, 1) for k in ("2", "4", "8")]

    def test_a_setting_that_cannot_work_is_told_at_once(self):
        with pytest.raises(ValueError, match="hard_start"):
            plan("table4", replace(TINY, hard_start="hardest"), [1])
