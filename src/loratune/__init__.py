"""loratune finds the batch size and learning rate that train a LoRA adapter best.

The Python API is this module: every command is a function here. Nothing heavy is imported until one
of them is called.
"""

import logging
from typing import TYPE_CHECKING

# Here, because PEFT imports bitsandbytes wherever it is installed: on some CPUs that says that it
# misses a package, which is for a layout of weights that `models.load` switches off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from loratune.api import (
        audit,
        cells,
        compare,
        laws,
        lemma,
        load_study,
        noise_scale,
        plan,
        recommend,
        results,
        run,
        tune,
    )

__all__ = [
    "audit",
    "cells",
    "compare",
    "laws",
    "lemma",
    "load_study",
    "noise_scale",
    "plan",
    "recommend",
    "results",
    "run",
    "tune",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'loratune' has no attribute {name!r}")
    from loratune import api

    return getattr(api, name)
