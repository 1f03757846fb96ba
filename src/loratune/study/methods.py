"""What the study and the plan know of each LoRA variant: name, options, scale rule. No torch.

The tensor part stands in `loratune.methods`, one file each. A package of yours adds a variant by an
entry point in the group `loratune.methods` that names a `MethodDescription`; its `implementation`
is imported only when a trial of it is trained.
"""

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Literal

from loratune.errors import StudyError
from loratune.records import MethodChoice

OptionValue = float | int | str | bool | None
ENTRY_POINT_GROUP = "loratune.methods"


@dataclass(frozen=True)
class Option:
    """One option of a method: its default, its type and the values that are allowed."""

    default: OptionValue
    description: str
    minimum: float | None = None
    choices: tuple[OptionValue, ...] | None = None


@dataclass(frozen=True)
class MethodDescription:
    """A LoRA variant as the study sees it.

    `scale` says what multiplies BA: "alpha/r" or "alpha/sqrt(r)". `draws_initialisation` is False
    where the start is computed from the weights, so that the seed moves only data order and
    dropout. `implementation` is "module:attribute" of the tensor part (`methods.base.Method`).
    `not_quantised` says why the method cannot train over a quantised base; None: it can.
    `takes_from_base` and `has_magnitudes` say what a pack must hold beside A and B: the frozen part
    that is taken out of the base, a trained number for each output. `packable` says to planning
    whether the packed engine has it (`methods.base.Packable`).
    """

    name: str
    summary: str
    source: str
    implementation: str
    scale: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    draws_initialisation: bool = True
    not_quantised: str | None = None
    takes_from_base: bool = False
    has_magnitudes: bool = False
    packable: bool = True
    options: Mapping[str, Option] = field(default_factory=dict[str, Option])

    def scale_of(self, *, rank: int, alpha: float) -> float:
        """The number that multiplies BA."""
        return alpha / math.sqrt(rank) if self.scale == "alpha/sqrt(r)" else alpha / rank


# Of pissa, milora and olora.
_TAKES_A_PART_OUT = (
    "its authors quantise what is left of a weight once the part B0 A0 has been taken out; here B0 "
    "A0 is a frozen correction of weights that were quantised whole, and the numbers would not be "
    "the method's"
)

_BUILT_IN = (
    MethodDescription(
        name="lora",
        summary="B A with A Kaiming-uniform and B zero",
        source="Hu et al. 2022, arXiv 2106.09685",
        implementation="loratune.methods.lora:METHOD",
    ),
    MethodDescription(
        name="rslora",
        summary="LoRA scaled by alpha/sqrt(r)",
        source="Kalajdzievski 2023, arXiv 2312.03732",
        implementation="loratune.methods.rslora:METHOD",
        scale="alpha/sqrt(r)",
    ),
    MethodDescription(
        name="pissa",
        summary="starts from the top r singular components of each weight",
        source="Meng et al. 2024, arXiv 2404.02948",
        implementation="loratune.methods.pissa:METHOD",
        draws_initialisation=False,
        not_quantised=_TAKES_A_PART_OUT,
        takes_from_base=True,
        options={
            "niter": Option(
                None,
                "subspace iterations of the fast SVD (16 in the paper's code); null: exact SVD",
                minimum=1,
            )
        },
    ),
    MethodDescription(
        name="milora",
        summary="starts from the last r singular components of each weight",
        source="Wang et al. 2025, arXiv 2406.09044",
        implementation="loratune.methods.milora:METHOD",
        draws_initialisation=False,
        not_quantised=_TAKES_A_PART_OUT,
        takes_from_base=True,
    ),
    MethodDescription(
        name="dora",
        summary="LoRA on the direction of each weight column, its magnitude trained apart",
        source="Liu et al. 2024, arXiv 2402.09353",
        implementation="loratune.methods.dora:METHOD",
        has_magnitudes=True,
        not_quantised=(
            "the norms of its rows are computed from the weights themselves, which a quantised "
            "base holds packed"
        ),
    ),
    MethodDescription(
        name="loraplus",
        summary="LoRA whose B learns `ratio` times as fast as its A",
        source="Hayou et al. 2024, arXiv 2402.12354",
        implementation="loratune.methods.loraplus:METHOD",
        options={"ratio": Option(16.0, "learning rate of B over that of A", minimum=0.0)},
    ),
    MethodDescription(
        name="olora",
        summary="starts from the first r columns of each weight's QR decomposition",
        source="Buyukakyuz 2024, arXiv 2406.01775",
        implementation="loratune.methods.olora:METHOD",
        draws_initialisation=False,
        not_quantised=_TAKES_A_PART_OUT,
        takes_from_base=True,
    ),
    MethodDescription(
        name="adalora",
        summary="prunes the singular values of an SVD-form adapter down to a budget while training",
        source="Zhang et al. 2023, arXiv 2303.10512",
        implementation="loratune.methods.adalora:METHOD",
        packable=False,
        not_quantised=(
            "PEFT's layer for it does not bring float32 adapters and the 16-bit activations of a "
            "quantised base together"
        ),
        options={
            "initial_rank_ratio": Option(
                1.5, "initial rank over the study's rank, the target", minimum=1.0
            ),
            "initial_fraction": Option(0.1, "part of the updates before pruning", minimum=0.0),
            "final_fraction": Option(0.3, "part of the updates after pruning", minimum=0.0),
            "interval": Option(1, "updates between two re-allocations", minimum=1),
            "beta1": Option(0.85, "smoothing of the sensitivity", minimum=0.0),
            "beta2": Option(0.85, "smoothing of the uncertainty", minimum=0.0),
            "orthogonality_weight": Option(0.5, "weight of the orthogonality penalty", minimum=0.0),
        },
    ),
)


@cache
def descriptions() -> Mapping[str, MethodDescription]:
    """Every known method by name: the built-in ones and those of installed packages.

    Raises:
        StudyError: an installed package offers a name that is taken, or not a description.
    """
    known = {description.name: description for description in _BUILT_IN}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        offered: object = entry.load()
        if not isinstance(offered, MethodDescription):
            raise StudyError(
                f"entry point {entry.name!r} in group {ENTRY_POINT_GROUP!r} is "
                f"{type(offered).__name__}; expected a loratune MethodDescription"
            )
        if offered.name in known:
            raise StudyError(f"method {offered.name!r} is offered twice; rename that of {entry!r}")
        known[offered.name] = offered
    return known


def describe(name: str) -> MethodDescription:
    """The description of one method.

    Raises:
        StudyError: the name is unknown; the message lists those there are and the nearest.
    """
    known = descriptions()
    if name not in known:
        raise StudyError(f"unknown method {name!r}{near(name, known)}; known: {', '.join(known)}")
    return known[name]


def choose(name: str, options: Mapping[str, object]) -> MethodChoice:
    """A method with all its options filled in and checked.

    Raises:
        StudyError: unknown method, unknown option, or a value of the wrong type or range.
    """
    description = describe(name)
    for given in options:
        if given not in description.options:
            listed = ", ".join(description.options) or "none"
            raise StudyError(
                f"method {name!r} has no option {given!r}{near(given, description.options)}; "
                f"its options: {listed}"
            )
    filled = {
        key: _checked(name, key, option, options.get(key, option.default))
        for key, option in description.options.items()
    }
    return MethodChoice(name=name, options=tuple(sorted(filled.items())))


def near(word: str, known: Mapping[str, object]) -> str:
    """`` (did you mean 'x'?)`` where a known word is near, else nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _checked(method: str, key: str, option: Option, value: object) -> OptionValue:
    where = f"method {method!r}, option {key!r}: got {value!r}"
    if value is None and option.default is None:
        return None
    if option.choices is not None:
        if value not in option.choices:
            raise StudyError(f"{where}; expected one of {', '.join(map(str, option.choices))}")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise StudyError(f"{where}; expected a number")
    # Not finite, or a whole number that no float holds.
    elif not abs(value) <= sys.float_info.max or (
        option.minimum is not None and value < option.minimum
    ):
        raise StudyError(f"{where}; expected a number of at least {option.minimum}")
    if isinstance(option.default, float) and isinstance(value, int):
        return float(value)  # 16 and 16.0 are one choice and must give one trial id
    assert value is None or isinstance(value, float | int | str | bool)
    return value
