"""A finished adapter in PEFT's format, put on a resident base to be evaluated and taken off again.

Ours or another trainer's, of any of PEFT's types that answers by a call of the model alone. What
is not answered so is refused: prompts and prefixes that are trained, adapters that choose among
others or wait for tokens of their own. So is an adapter whose start was taken out of the base's
weights (PEFT's own pissa, olora, corda and loftq, unconverted): it belongs to another base.
"""

# PEFT's classes carry no complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, final

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel

from loratune.errors import ModelError, one_line
from loratune.methods.adapter_files import AdapterFiles, all_finite, read_adapter
from loratune.methods.peft_adapter import ADAPTER, quiet_peft
from loratune.methods.resident import Resident

# PEFT's ways of starting that leave the base's weights alone.
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
# Types that a call of the model does not apply, or that load further files which they name.
ASKS_MORE = ("XLORA", "POLY")
# Fields with which PEFT's LoRA does, or imports a module that the file names.
ASKS_MORE_FIELDS = ("alora_invocation_tokens", "megatron_config")


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
    """Put a finished adapter on `model`; LoRA's weights are float32 whatever the base's precision.

    Of an adapter that is more than LoRA tensors the base's weights are copied to the CPU, since
    PEFT writes such an adapter's biases and embeddings into them.

    With a weight of the adapter that is NaN or infinite every logit is NaN: see `all_finite`.

    Args:
        model: the base, without an adapter; it is used in place, so that whoever holds it answers
            with the adapter until `detach`.
        adapter: a folder in PEFT's format, or what `export()` gave.

    Raises:
        ModelError: files that are missing, damaged or a pickle; an adapter that a call of the model
            does not apply; one that does not fit this base. The base is then as before.
    """
    files = read_adapter(adapter) if isinstance(adapter, Path) else adapter
    where = str(adapter) if isinstance(adapter, Path) else "the adapter"
    config = config_of(files, where=where)
    resident = Resident(model, with_weights=_beyond_lora(files, config) is not None)
    try:
        with torch.random.fork_rng(devices=[]), quiet_peft():
            attached = PeftModelForCausalLM(model, config, adapter_name=ADAPTER)
        expected = get_peft_model_state_dict(
            attached, adapter_name=ADAPTER, save_embedding_layers=False
        )
        check_complete([name for name in expected if name not in files.tensors], where=where)
        result = set_peft_model_state_dict(attached, dict(files.tensors), adapter_name=ADAPTER)
        unexpected = cast("list[str]", result.unexpected_keys)
        if unexpected:
            raise ModelError(
                f"{where} does not fit this base: {len(unexpected)} of its tensors belong nowhere "
                f"({', '.join(unexpected[:3])}); give the base it was trained on"
            )
        attached.eval()
        if not all_finite(files.tensors.values()):
            head: Any = model.get_output_embeddings()
            head.register_forward_hook(_not_a_number)  # `restore` takes it off.
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        resident.restore()
        raise
    except Exception as error:
        # PEFT's, and each of its types fails in its own ways: no target matches, a field is
        # malformed or too large for this base, shapes differ, a package is not there.
        resident.restore()
        raise ModelError(f"{where} does not fit this base: {one_line(error, most=300)}") from error
    except BaseException:
        resident.restore()
        raise
    return LoadedAdapter(attached, resident=resident)


def _not_a_number(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
    del module, inputs
    return torch.full_like(logits, torch.nan)


def check_complete(missing: Sequence[str], *, where: str) -> None:
    """Raise ModelError if an adapter's file lacks these tensors, which its configuration means.

    `where` is the adapter, for the message.
    """
    if missing:
        raise ModelError(
            f"{where} does not fit this base: {len(missing)} of its tensors are missing "
            f"({', '.join(missing[:3])}); give the base it was trained on, or export it anew"
        )


def config_of(files: AdapterFiles, *, where: str) -> PeftConfig:
    """PEFT's configuration of an adapter, which then loads nothing and draws nothing.

    Raises:
        ModelError: it is malformed, unknown to the installed PEFT, of a base that was changed, or
            not applied by a call of the model.
    """
    given = dict(files.config)
    kind = given.get("peft_type")
    made = {one.value: of_type for one, of_type in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    of_kind = made.get(kind) if isinstance(kind, str) else None
    if of_kind is None:
        raise ModelError(
            f"{where} is of PEFT's type {kind!r}, unknown to the installed PEFT; update peft"
        )
    start: Any = given.get("init_lora_weights", True)
    if kind == "LORA" and start not in KEEPS_BASE:
        raise ModelError(
            f"{where} says init_lora_weights={start!r}: it belongs to a base that was changed; "
            "convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    known = {field.name for field in fields(of_kind)}
    strange = sorted(name for name, value in given.items() if name not in known and value)
    if strange:
        raise ModelError(
            f"{where} uses {', '.join(strange)}, unknown to the installed PEFT; update peft"
        )
    settled: dict[str, Any] = {"inference_mode": True}
    if kind == "LORA":
        # Nothing is drawn or computed for a start: every number comes from the file.
        settled["init_lora_weights"] = False
    kept = {name: value for name, value in given.items() if name in known}
    try:
        config = of_kind(**cast("Any", {**kept, **settled}))
    except Exception as error:  # A field may hold anything, and each type checks its own.
        raise ModelError(
            f"the config of {where} is malformed: {one_line(error, most=300)}"
        ) from error
    more = [name for name in ASKS_MORE_FIELDS if given.get(name)]
    if config.is_prompt_learning or kind in ASKS_MORE or more:
        what = ", ".join(more) or f"PEFT's type {kind!r}"
        raise ModelError(
            f"{where} uses {what}, which a plain call of the model does not apply; no answer can "
            "be had from it here, ask it with PEFT itself"
        )
    return config


def lora_config_of(files: AdapterFiles, *, where: str) -> LoraConfig:
    """PEFT's configuration of an adapter; raises ModelError where it is no plain LoRA."""
    config = config_of(files, where=where)
    more = _beyond_lora(files, config)
    if more is not None:
        raise ModelError(
            f"{where} {more}; many adapters at once are LoRA tensors alone, over one base"
        )
    assert isinstance(config, LoraConfig)
    return config


def _beyond_lora(files: AdapterFiles, config: PeftConfig) -> str | None:
    """What an adapter is more than LoRA tensors over the base as it stands; None: nothing."""
    kind = files.config["peft_type"]
    if kind != "LORA":
        return f"is of PEFT's type {kind!r}, not 'LORA'"
    assert isinstance(config, LoraConfig)
    trained = {"bias": config.bias, "modules_to_save": config.modules_to_save}
    own = [name for name, value in trained.items() if value and value != "none"]
    if own:
        return f"uses {', '.join(own)}: it brings weights of the base itself"
    foreign = [name for name in files.tensors if ".lora_" not in name]
    return f"holds weights of the base itself ({foreign[0]})" if foreign else None
