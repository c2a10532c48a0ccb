"""Stand-ins for runs of a study: what training would give, without training."""

from dataclasses import replace

from affscl.training.config import RECIPES

TINY = RECIPES["tiny"]


def pretend(score=lambda run: 0.5 + run.seed / 100, fail=()):
    """A stand-in for `finish_run` that remembers its runs."""
    calls = []

    def call(run, folder):
        calls.append((run.setting, run.seed))
        if (run.setting, run.seed) in fail:
            raise RuntimeError("out of memory")
        best = {"epoch": 1, "mAP": score(run) + 0.02, "rank1": 0.9}
        return [
            {"epoch": 0, "mAP": 0.1, "rank1": 0.2},
            best,
            {
                "epoch": 2,
                "mAP": score(run),
                "rank1": 0.8,
                "mixed_mAP": 0.8 * score(run),
                "clusters": 7,
                "outlier_share": 0.25,
            },
        ]

    call.calls = calls
    return call


def results_of(**scores):
    """Results of made-up settings: a list of scores each, one a seed."""
    return [
        {"setting": name, "seed": seed, "mAP": x, "rank1": x}
        for name, xs in scores.items()
        for seed, x in enumerate(xs)
    ]


def recipe_for(study, recipe="tiny"):
    """A recipe with what the study needs, and without what contradicts one of its settings."""
    config = RECIPES[recipe]
    if study in ("table4", "table7"):  # a baseline without a memory has no rivals to choose
        config = replace(config, negatives="all")
    if study != "table7":  # a centre loss is for labels and the baseline's criterion only
        config = replace(config, centre_weight=0)
    if study == "table3":
        config = replace(config, labels="clusters", source="msmt17" if recipe != "msmt17" else "market1501")
    return config
