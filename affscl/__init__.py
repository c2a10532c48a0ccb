"""Unsupervised person re-identification: AFF_SCL, from crops to mAP. The names below are all that most users need."""
import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .criteria.contrast import balanced_l1
    from .criteria.memory import DualMemory
    from .data.datasets import load_dataset
    from .data.synthetic import make_dataset
    from .labels.clustering import pseudo_labels
    from .labels.jaccard import jaccard_distance
    from .model.extraction import extract
    from .model.network import AFF, load_model
    from .scores.evaluation import evaluate, score
    from .scores.reranking import rerank
    from .training.config import RECIPES, Config
    from .training.loop import train

# Where each name lives. It is loaded on first use, so that `import affscl` does not wait for torch.
_HOMES = {
    "load_dataset": "data.datasets", "make_dataset": "data.synthetic",
    "AFF": "model.network", "load_model": "model.network", "extract": "model.extraction",
    "jaccard_distance": "labels.jaccard", "pseudo_labels": "labels.clustering",
    "DualMemory": "criteria.memory", "balanced_l1": "criteria.contrast",
    "evaluate": "scores.evaluation", "score": "scores.evaluation", "rerank": "scores.reranking",
    "Config": "training.config", "RECIPES": "training.config", "train": "training.loop",
}
__all__ = [
    "AFF", "RECIPES", "Config", "DualMemory", "balanced_l1", "evaluate", "extract", "jaccard_distance", "load_dataset",
    "load_model", "make_dataset", "pseudo_labels", "rerank", "score", "train",
]


def __getattr__(name: str) -> object:
    """Import a public name from its module, once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'affscl' has no attribute {name!r}; it offers {', '.join(__all__)}")
    globals()[name] = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
