"""A finished adapter in PEFT's format, put on a resident base to be evaluated and taken off again.

Ours or another trainer's, as long as it is a LoRA (DoRA and rank patterns included) of the base as
it stands. An adapter whose start was taken out of the base's weights (PEFT's own pissa, olora,
corda and loftq, unconverted) does not belong to that base and is refused.
"""

# PEFT's classes carry no complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from dataclasses import fields
from pathlib import Path
from typing import Any, cast, final

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, set_peft_model_state_dict
from transformers import PreTrainedModel

from loratune.errors import ModelError
from loratune.methods.adapter_files import AdapterFiles, read_adapter
from loratune.methods.peft_adapter import ADAPTER, quiet_peft
from loratune.methods.resident import Resident

# PEFT's ways of starting that leave the base's weights alone.
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")


@final
class LoadedAdapter:
    """An adapter on its base, in eval mode: call `model` as the causal LM, then `detach`."""

    def __init__(self, model: PeftModel, *, resident: Resident) -> None:
        self.model = model
        self._resident = resident

    def detach(self) -> None:
        """Leave the base as it was, all its parameters frozen. Twice is harmless."""
        self._resident.restore()


def attach_files(model: PreTrainedModel, adapter: AdapterFiles | Path) -> LoadedAdapter:
    """Put a finished adapter on `model`; its weights are float32 whatever the base's precision.

    Args:
        model: the base, without an adapter; it is used in place, so that whoever holds it answers
            with the adapter until `detach`.
        adapter: a folder in PEFT's format, or what `export()` gave.

    Raises:
        ModelError: files that are missing, damaged or a pickle; another kind of adapter; one that
            does not fit this base. The base is then as before.
    """
    files = read_adapter(adapter) if isinstance(adapter, Path) else adapter
    where = str(adapter) if isinstance(adapter, Path) else "the adapter"
    config = lora_config_of(files, where=where)
    resident = Resident(model)
    try:
        with torch.random.fork_rng(devices=[]), quiet_peft():
            attached = PeftModelForCausalLM(model, config, adapter_name=ADAPTER)
        try:
            result = set_peft_model_state_dict(attached, dict(files.tensors), adapter_name=ADAPTER)
        except RuntimeError as error:  # torch's, where shapes differ
            line = " ".join(str(error).split())[:300]
            raise ModelError(f"{where} does not fit this base: {line}") from error
        missing = [name for name in cast("list[str]", result.missing_keys) if ".lora_" in name]
        unexpected = cast("list[str]", result.unexpected_keys)
        if missing or unexpected:
            names = ", ".join([*missing, *unexpected][:3])
            raise ModelError(
                f"{where} does not fit this base: {len(missing)} of its tensors are missing and "
                f"{len(unexpected)} belong nowhere ({names}); give the base it was trained on"
            )
        attached.eval()
    except ModelError:
        resident.restore()
        raise
    except (TypeError, ValueError) as error:  # PEFT's: no target matches, a field is malformed
        resident.restore()
        raise ModelError(f"{where} does not fit this base: {error}") from error
    except BaseException:
        resident.restore()
        raise
    return LoadedAdapter(attached, resident=resident)


def lora_config_of(files: AdapterFiles, *, where: str) -> LoraConfig:
    """PEFT's configuration of an adapter; raises ModelError where it is no plain LoRA."""
    given = dict(files.config)
    if given.get("peft_type") != "LORA":
        raise ModelError(
            f"{where} is of PEFT's type {given.get('peft_type')!r}; expected 'LORA', which every "
            "method of loratune exports"
        )
    start: Any = given.get("init_lora_weights", True)
    if start not in KEEPS_BASE:
        raise ModelError(
            f"{where} says init_lora_weights={start!r}: it belongs to a base that was changed; "
            "convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    trained = {"bias": given.get("bias", "none"), "modules_to_save": given.get("modules_to_save")}
    own = [name for name, value in trained.items() if value and value != "none"]
    if own:
        raise ModelError(
            f"{where} uses {', '.join(own)}: it brings weights of the base itself; expected LoRA "
            "tensors alone, so that one base serves all adapters. Train it without, or merge it "
            "into its base and give that as the model"
        )
    foreign = [name for name in files.tensors if ".lora_" not in name]
    if foreign:
        raise ModelError(
            f"{where} holds weights of the base itself ({foreign[0]}); expected LoRA tensors "
            "alone, so that one base serves all adapters"
        )
    known = {field.name for field in fields(LoraConfig)}
    strange = sorted(name for name, value in given.items() if name not in known and value)
    if strange:
        raise ModelError(
            f"{where} uses {', '.join(strange)}, unknown to the installed PEFT; update peft"
        )
    # Nothing is drawn or computed for a start: every number comes from the file.
    settled = {"inference_mode": True, "init_lora_weights": False}
    kept = {name: value for name, value in given.items() if name in known}
    try:
        return LoraConfig(**cast("Any", {**kept, **settled}))
    except (TypeError, ValueError) as error:
        raise ModelError(f"the config of {where} is malformed: {error}") from error
