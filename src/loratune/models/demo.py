"""Where the demo models are: `demo:1m` and `demo:4m` in the package, the larger ones made by hand.

All four come from tools/pretrain_demo_models.py. Two are shipped, in demo_files/. The others are
too large for a package and are made once into the folder of `demo_models_folder()`; the SHA-256
that the project recorded for each says whether a rebuild is the same model. A rebuild that is not
is no error: it is another model, and the caller says so.

This file reads no weights and imports no torch; see base.py for loading.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratune.errors import ModelError

DEMO_MODELS = ("demo:1m", "demo:4m", "demo:12m", "demo:28m")
"""Sizes in parameters, about: one million to 28 millions."""

FOLDER_VARIABLE = "LORATUNE_DEMO_MODELS"
"""The environment variable that names the folder of the models that are not shipped."""

_SHIPPED = ("1m", "4m")
_FILES = Path(__file__).parent / "demo_files"


@dataclass(frozen=True)
class DemoModel:
    """One demo model on disk, in a folder that transformers loads."""

    name: str
    folder: Path
    sha256: str
    """Of model.safetensors, as lower-case hexadecimal digits."""
    matches_recorded_hash: bool
    """False: a rebuild with other weights, so its numbers are not those of the documentation."""


def resolve_demo_model(name: str, *, environment: Mapping[str, str] | None = None) -> DemoModel:
    """Find the folder of "demo:1m", "demo:4m", "demo:12m" or "demo:28m".

    Args:
        environment: what to read LORATUNE_DEMO_MODELS from; os.environ if None.

    Raises:
        ModelError: no such demo model, or it is one of the larger ones and has not been made yet.
    """
    if name not in DEMO_MODELS:
        raise ModelError(f"model {name!r} is no demo model; choose one of {', '.join(DEMO_MODELS)}")
    size = name.removeprefix("demo:")
    if size in _SHIPPED:
        folder = _FILES / size
    else:
        folder = demo_models_folder(environment=environment) / size
    weights = folder / "model.safetensors"
    if not weights.is_file():
        if size in _SHIPPED:
            raise ModelError(
                f"model {name} should be in the package but {weights} is missing; "
                "install loratune again"
            )
        raise ModelError(
            f"model {name} is not in {folder}; make it once, from a clone of loratune, with: "
            f"python tools/pretrain_demo_models.py --sizes {size} --out {folder.parent}"
        )
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    return DemoModel(
        name=name,
        folder=folder,
        sha256=sha256,
        matches_recorded_hash=sha256 == recorded_hashes().get(size),
    )


def demo_models_folder(*, environment: Mapping[str, str] | None = None) -> Path:
    """$LORATUNE_DEMO_MODELS, or loratune/demo-models in the user's cache folder."""
    environment = os.environ if environment is None else environment
    given = environment.get(FOLDER_VARIABLE)
    if given:
        return Path(given).expanduser()
    cache = environment.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loratune" / "demo-models"


def recorded_hashes() -> dict[str, str]:
    """SHA-256 of each size's model.safetensors ("1m", "4m", "12m", "28m"), as first made."""
    recorded: dict[str, str] = json.loads((_FILES / "sha256.json").read_text(encoding="utf-8"))
    return recorded
