"""ditty fine-tunes Hugging Face causal language models as a line of cached, resumable stages.

    from ditty import Data, Hooks, Pipeline, RunSpec, Trainer

Names are imported when they are first used: importing ditty loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ditty.version import __version__

if TYPE_CHECKING:
    from ditty.config.spec import RunSpec
    from ditty.data import Data
    from ditty.pipeline import Pipeline
    from ditty.training.hooks import Hooks
    from ditty.training.trainer import Trainer

__all__ = ["Data", "Hooks", "Pipeline", "RunSpec", "Trainer", "__version__"]

_HOMES = {
    "Data": "ditty.data",
    "Hooks": "ditty.training.hooks",
    "Pipeline": "ditty.pipeline",
    "RunSpec": "ditty.config.spec",
    "Trainer": "ditty.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ditty' has no attribute {name!r}")
