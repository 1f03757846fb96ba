"""What every LoRA variant offers: attached to a resident base, trained, exported, detached again.

The engine knows this file and no variant; a variant knows nothing of batches, optimizers or files.
One base model in memory serves all trials one after another: `attach` adds what is trained,
`detach` leaves the very same base behind, bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.errors import StudyError
from loratune.methods.adapter_files import AdapterFiles
from loratune.records import MethodChoice, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamFactors:
    """What multiplies a trial's learning rate, eps and weight decay for some of its parameters.

    All three exist because AdamW is unchanged by rescaling a parameter by p only if lr is
    multiplied by p and eps and weight decay are divided by it.
    """

    lr_factor: float = 1.0
    eps_factor: float = 1.0
    weight_decay_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ParameterGroup(AdamFactors):
    """Trainable parameters that share their factors. `name` is "A", "B" or "other"."""

    name: str
    parameters: list[nn.Parameter]


def number_option(method: MethodChoice, key: str, *, above: float) -> float:
    """An option of a method as a number.

    Raises:
        StudyError: it is absent, no number, or not above `above`.
    """
    value = dict(method.options).get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= above:
        raise StudyError(
            f"method {method.name!r}, option {key!r}: got {value!r}; "
            f"expected a number above {above:g}"
        )
    return float(value)


@runtime_checkable
class Attached(Protocol):
    """One adapter on its base, from its first update to its export."""

    @property
    def model(self) -> nn.Module:
        """The base with the adapter in it; called as the causal LM that it wraps.

        It starts in the base's own mode; the engine switches between train() and eval().
        """
        ...

    def parameter_groups(self) -> list[ParameterGroup]:
        """Every trainable parameter once, in model order within its group; float32."""
        ...

    def penalty(self) -> Tensor | None:
        """A scalar to add to the token-mean loss once an update, whatever the micro-batches."""
        ...

    def after_backward(self, update: int) -> None:
        """Called once an update (from 0): the whole batch's gradients are there and the optimizer
        has stepped; zero_grad has not been called."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of all that must be kept beside optimizer and random state so that a
        freshly attached adapter with this state goes on bit-equal."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave; parameters keep their identity.

        Raises:
            ModelError: the state belongs to another adapter: other names or shapes.
        """
        ...

    def export(self) -> AdapterFiles:
        """The adapter in PEFT's format: plain PEFT on the untouched base gives the same logits."""
        ...

    def detach(self) -> None:
        """Leave the base as `attach` found it, all its parameters frozen. Twice is harmless."""
        ...


@runtime_checkable
class Method(Protocol):
    """A LoRA variant."""

    def attach(self, model: PreTrainedModel, trial: Trial, *, targets: Sequence[str]) -> Attached:
        """Add the adapter of `trial` to `model`, on the full names `targets` of linear layers.

        What is drawn depends on the trial's seed and each layer's name alone; torch's global random
        state is neither used nor moved. If it raises, the base is as before.

        Raises:
            StudyError: the trial's values cannot be carried out by this method.
            ModelError: a target is not a linear layer, or its weights are not finite.
        """
        ...


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """One linear layer's adapter as plain float32 tensors: y = W x + scale (B A - B0 A0) x.

    `a_RD` and `b_ER` are trained. `a0_RD` and `b0_ER` are frozen, of the same shapes, and None
    where nothing is taken out of the base. `magnitude_E` is trained and DoRA's alone.
    """

    a_RD: Tensor
    b_ER: Tensor
    a0_RD: Tensor | None = None
    b0_ER: Tensor | None = None
    magnitude_E: Tensor | None = None


@runtime_checkable
class Packable(Protocol):
    """What a method offers beside `Method` so that many of its trials train over one base at once.

    It must be the same method: `start` gives the numbers that `attach` puts in, `adam_factors`
    those of `parameter_groups`, `export_layers` the files of `export`. A method without these
    trains on the reference engine.
    """

    def start(
        self, model: PreTrainedModel, trial: Trial, *, targets: Sequence[str]
    ) -> dict[str, LayerTensors]:
        """What each target starts from, in the order of `targets`, on any device.

        Raises as `Method.attach` does; the model is not touched. Trained tensors are the caller's
        to write into; frozen ones may be shared with the starts of other trials.
        """
        ...

    def adam_factors(self, trial: Trial) -> Mapping[str, AdamFactors]:
        """Those of the groups "A", "B" and "other"; all 1 where a group is absent."""
        ...

    def export_layers(
        self, model: PreTrainedModel, trial: Trial, layers: Mapping[str, LayerTensors]
    ) -> AdapterFiles:
        """The trained adapter in PEFT's format, as `Attached.export` gives it."""
        ...
