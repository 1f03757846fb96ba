"""A variant that PEFT's LoRA layers compute: all of ours but AdaLoRA.

Such a method is what its layers start from, how its scale follows from alpha, and what multiplies
its learning rates. Both ways of training it come from that: PEFT's layers on one base, filled with
the start, and plain tensors for an engine of its own; both are exported by the same lines.

A part that is taken out of the base (`a0_RD`, `b0_ER`) is never written into it, because all trials
share it: it is a second, frozen PEFT adapter beside the trained one, without dropout,

    y = W x + scale B A dropout(x) - scale B0 A0 x,

and exported, both become one LoRA of rank 2r on the untouched base.

Legend: D in, E out, R rank.
"""

# PEFT's layers carry no complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast, final

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from loratune.errors import StudyError
from loratune.methods.adapter_files import AdapterFiles
from loratune.methods.base import AdamFactors, Attached, LayerTensors, ParameterGroup
from loratune.methods.peft_adapter import (
    ADAPTER,
    adapter_layers,
    attach_peft,
    copied,
    copy_into,
    files_of,
    key_of,
    lora_config,
    quiet_peft,
    trained_tensors,
    whole,
)
from loratune.methods.resident import Resident
from loratune.records import Trial

CORRECTION = "correction"

# The model, the trial and the full names of its targets -> what each target starts from.
StartLayers = Callable[[PreTrainedModel, Trial, Sequence[str]], dict[str, LayerTensors]]


def _all_one(trial: Trial) -> Mapping[str, AdamFactors]:
    del trial
    return {}


@final
@dataclass(frozen=True, slots=True)
class LoraMethod:
    """`methods.base.Method` and `Packable` of a variant that is told by its start.

    Args:
        start_layers: raises as `Method.attach` does, leaves the model alone, and fills the optional
            fields of `LayerTensors` for all layers or for none.
        adam_factors_of: see `Packable.adam_factors`; raises `StudyError` for an option it cannot
            use.
        use_rslora: the scale is alpha/sqrt(r), and the exported config says so.
    """

    start_layers: StartLayers
    adam_factors_of: Callable[[Trial], Mapping[str, AdamFactors]] = _all_one
    use_rslora: bool = False

    def attach(self, model: PreTrainedModel, trial: Trial, *, targets: Sequence[str]) -> Attached:
        """See `methods.base.Method`."""
        resident = Resident(model)
        try:
            # Before PEFT's layers exist: the slow part, and the one that refuses.
            started = self.start(model, trial, targets=targets)
            config = self._config(model, trial, started)
            attached = attach_peft(model, config, targets)
            if _any(started).a0_RD is not None:
                frozen = self._config(model, trial, started, lora_dropout=0.0)
                with torch.random.fork_rng(devices=[]), quiet_peft():
                    attached.add_adapter(CORRECTION, frozen)
                cast("Any", attached.base_model).set_adapter([ADAPTER, CORRECTION])
                attached.train(model.training)
            layers = adapter_layers(attached, targets)
            for name, layer in layers.items():
                assert math.isclose(layer.scaling[ADAPTER], trial.scale, rel_tol=1e-12)
                _fill(layer, started[name])
        except BaseException:
            resident.restore()
            raise
        return PeftAttached(
            attached,
            layers,
            resident=resident,
            adam_factors=self.adam_factors(trial),
            export=lambda live: self.export_layers(model, trial, live),
        )

    def start(
        self, model: PreTrainedModel, trial: Trial, *, targets: Sequence[str]
    ) -> dict[str, LayerTensors]:
        """See `methods.base.Packable`.

        Raises:
            StudyError: the trial's scale is not that of the method, so that it would train at
                another scale than its record; or an option cannot be used.
        """
        root = math.sqrt(trial.rank) if self.use_rslora else trial.rank
        if not math.isclose(trial.alpha / root, trial.scale, rel_tol=1e-12):
            raise StudyError(
                f"trial {trial.trial_id} ({trial.method.name}) says scale={trial.scale:g}, but "
                f"alpha={trial.alpha:g} at rank {trial.rank} gives {trial.alpha / root:g}; "
                "take the scale from the method's description"
            )
        self.adam_factors(trial)  # refuses options before anything is computed
        return self.start_layers(model, trial, targets)

    def adam_factors(self, trial: Trial) -> Mapping[str, AdamFactors]:
        """See `methods.base.Packable`."""
        return self.adam_factors_of(trial)

    def export_layers(
        self, model: PreTrainedModel, trial: Trial, layers: Mapping[str, LayerTensors]
    ) -> AdapterFiles:
        """See `methods.base.Packable`; with a part taken out, [B, -B0] [A; A0] of rank 2r."""
        tensors = dict[str, Tensor]()
        for name, one in layers.items():
            a_RD, b_ER = one.a_RD, one.b_ER
            if one.a0_RD is not None and one.b0_ER is not None:
                a_RD = torch.cat([a_RD, one.a0_RD], dim=0)
                b_ER = torch.cat([b_ER, -one.b0_ER], dim=1)
            tensors[key_of(name, "lora_A.weight")] = a_RD
            tensors[key_of(name, "lora_B.weight")] = b_ER
            if one.magnitude_E is not None:
                tensors[key_of(name, "lora_magnitude_vector")] = one.magnitude_E
        settings = dict[str, Any]()
        if _any(layers).a0_RD is not None:
            # alpha/r stays the scale, whatever the method's rule is.
            rank = 2 * trial.rank
            settings = {"r": rank, "lora_alpha": whole(trial.scale * rank), "use_rslora": False}
        return files_of(self._config(model, trial, layers, **settings), tensors)

    def _config(
        self,
        model: PreTrainedModel,
        trial: Trial,
        layers: Mapping[str, LayerTensors],
        **settings: Any,
    ) -> LoraConfig:
        fields = {
            "use_rslora": self.use_rslora,
            "use_dora": _any(layers).magnitude_E is not None,
            **settings,
        }
        return lora_config(model, trial, list(layers), **fields)


@final
class PeftAttached:
    """`methods.base.Attached` for PEFT's LoRA layers, whose only state is their tensors.

    The correction is part of the state because a singular value decomposition that is computed
    again may differ in its last bits, with another number of threads for example.
    """

    def __init__(
        self,
        model: PeftModel,
        layers: Mapping[str, Any],
        *,
        resident: Resident,
        adam_factors: Mapping[str, AdamFactors],
        export: Callable[[Mapping[str, LayerTensors]], AdapterFiles],
    ) -> None:
        self.model = model
        self._layers = layers
        self._resident = resident
        self._adam_factors = adam_factors
        self._export = export
        self._tensors = trained_tensors(model)
        for name, layer in layers.items():
            if CORRECTION in layer.lora_A:
                self._tensors[f"{name}.{CORRECTION}.A"] = layer.lora_A[CORRECTION].weight
                self._tensors[f"{name}.{CORRECTION}.B"] = layer.lora_B[CORRECTION].weight

    def parameter_groups(self) -> list[ParameterGroup]:
        """Groups "A", "B" and, for magnitudes, "other"."""
        layers = self._layers.values()
        grouped = {
            "A": [layer.lora_A[ADAPTER].weight for layer in layers],
            "B": [layer.lora_B[ADAPTER].weight for layer in layers],
            "other": [
                layer.lora_magnitude_vector[ADAPTER].weight
                for layer in layers
                if ADAPTER in layer.lora_magnitude_vector
            ],
        }
        return [
            ParameterGroup(name, parameters, **asdict(self._adam_factors.get(name, AdamFactors())))
            for name, parameters in grouped.items()
            if parameters
        ]

    def penalty(self) -> Tensor | None:
        """None: the loss is all that is minimised."""
        return None

    def after_backward(self, update: int) -> None:
        """Nothing."""

    def state(self) -> dict[str, Tensor]:
        """The trained tensors and the correction's."""
        return copied(self._tensors)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `methods.base.Attached`."""
        copy_into(self._tensors, state)

    def export(self) -> AdapterFiles:
        """See `methods.base.Attached`."""
        return self._export({name: _read(layer) for name, layer in self._layers.items()})

    def detach(self) -> None:
        """See `methods.base.Attached`."""
        self._resident.restore()


def _any(layers: Mapping[str, LayerTensors]) -> LayerTensors:
    """One of them: all have the same optional fields."""
    return next(iter(layers.values()))


@torch.no_grad()
def _fill(layer: Any, start: LayerTensors) -> None:
    """Put the start into PEFT's layer. The correction's B is -B0, so that PEFT may add it."""
    layer.lora_A[ADAPTER].weight.copy_(start.a_RD)
    layer.lora_B[ADAPTER].weight.copy_(start.b_ER)
    if start.a0_RD is not None and start.b0_ER is not None:
        layer.lora_A[CORRECTION].weight.copy_(start.a0_RD)
        layer.lora_B[CORRECTION].weight.copy_(-start.b0_ER)
        for half in (layer.lora_A, layer.lora_B):
            half[CORRECTION].weight.requires_grad_(False)
    if start.magnitude_E is not None:
        layer.lora_magnitude_vector[ADAPTER].weight.copy_(start.magnitude_E)


@torch.no_grad()
def _read(layer: Any) -> LayerTensors:
    """What PEFT's layer holds now; the inverse of `_fill`."""
    corrected = CORRECTION in layer.lora_A
    vectors = layer.lora_magnitude_vector
    return LayerTensors(
        a_RD=layer.lora_A[ADAPTER].weight,
        b_ER=layer.lora_B[ADAPTER].weight,
        a0_RD=layer.lora_A[CORRECTION].weight if corrected else None,
        b0_ER=-layer.lora_B[CORRECTION].weight if corrected else None,
        magnitude_E=vectors[ADAPTER].weight if ADAPTER in vectors else None,
    )
