"""An adapter in PEFT's file format, in memory and in a folder: safetensors only, never a pickle.

Knows nothing of how the adapter was trained, and loads no model.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from loratune.errors import ModelError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# DoRA's magnitudes, as PEFT writes them; it reads them under a parameter's name too.
MAGNITUDE = "lora_magnitude_vector"
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """adapter_config.json as a dict of JSON values; the tensors under PEFT's names, on the CPU."""

    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write both files; equal adapters give equal bytes. Each file appears whole or not."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: self.tensors[name].contiguous() for name in sorted(self.tensors)}
        text = json.dumps(dict(self.config), indent=2, sort_keys=True)
        _write(folder / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
        _write(folder / CONFIG_NAME, text.encode())


def read_adapter(folder: Path) -> AdapterFiles:
    """Read an adapter in PEFT's format, ours or another trainer's.

    Raises:
        ModelError: files that are missing or damaged, or weights as a pickle.
    """
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not config_path.is_file():
        raise ModelError(
            f"{folder} holds no {CONFIG_NAME}; give the folder of an adapter in PEFT's format"
        )
    if not weights_path.is_file():
        pickles = [name for name in PICKLE_NAMES if (folder / name).is_file()]
        if pickles:
            raise ModelError(
                f"{folder / pickles[0]} is a pickle, which can run code when it is loaded; "
                f"give the adapter as {WEIGHTS_NAME}"
            )
        raise ModelError(f"{folder} holds no {WEIGHTS_NAME}; give the folder of a whole adapter")
    try:
        config: object = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config_path} is no JSON ({error}); export the adapter anew") from error
    if not isinstance(config, dict):
        raise ModelError(f"{config_path} holds no JSON object; export the adapter anew")
    try:
        tensors = load(weights_path.read_bytes())
    except SafetensorError as error:
        raise ModelError(
            f"{weights_path} is no safetensors file ({error}); export the adapter anew"
        ) from error
    return AdapterFiles(
        config=cast("dict[str, object]", config),
        tensors={
            name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name: one
            for name, one in tensors.items()
        },
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number among them is NaN or infinite in float32, in which adapters are laid on.

    That is looked at here, since logits do not always tell: torch's attention on a CPU takes NaN
    scores for zero weights where it is called without a mask, and answers as if nothing were wrong.
    """
    return all(bool(one.float().isfinite().all()) for one in tensors)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
