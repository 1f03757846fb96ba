"""Packs over a base in nf4: against the unpacked weights, and against the reference engine.

Tolerances in float32 are those of `test_packed`, for its reasons.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loratune.engine.packed_linear import packed_linear, packed_linear_backward, unpacked
from loratune.engine.packed_model import check_family, group_targets, group_weights
from loratune.engine.routing import Routing, route
from loratune.errors import ModelError
from loratune.methods import load_method
from loratune.methods.adapter_files import AdapterFiles
from loratune.models.load import Base
from loratune.models.targets import block_linears, target_modules
from loratune.records import Outcome, Trial
from nf4_bases import NEEDS_BITSANDBYTES, bits_of, nf4_base, twin_of
from tiny_packs import Packed, mixed_trials, pack, shape_for
from tiny_trials import random_data, tiny_trial, train
from torch_devices import ON_CUDA

pytestmark = NEEDS_BITSANDBYTES

PROMISED = 1e-4
SAME_NUMBERS = 3e-6
WHOLE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

SMALL, LARGE = random_data(24, seed=5), random_data(40)
DATA = {one.facts.fingerprint: one for one in (SMALL, LARGE)}
TRIALS = [
    trial
    for trial in mixed_trials(SMALL, LARGE)
    if trial.method.name in ("lora", "rslora", "loraplus")
]


# The operators ------------------------------------------------------------------------------------

NUM_TOKENS, WIDTH, RANK = 24, 128, 3
COUNTS = (5, 0, 12)


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantised(weight_ED: Tensor) -> tuple[list[Tensor], Tensor]:
    """A weight as the operators take it, and unpacked by the table that bitsandbytes gives."""
    functional: Any = import_module("bitsandbytes.functional")
    numbers, state = functional.quantize_4bit(weight_ED, blocksize=64, quant_type="nf4")
    pairs = torch.stack([numbers.flatten() >> 4, numbers.flatten() & 15], dim=1)
    blocks = state.code[pairs.flatten().long()].view(-1, 64) * state.absmax[:, None]
    return [numbers, state.absmax], blocks.view(weight_ED.shape).to(weight_ED.dtype)


@pytest.mark.parametrize("dtype", list(WHOLE))
@pytest.mark.parametrize("widths", [(64,), (64, 32), (64, 16, 16)])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_the_operators_over_packed_weights_are_those_over_unpacked_ones_bit_for_bit(
    dtype, widths, gained, dropped
):
    segments = [0, *torch.tensor(widths).cumsum(0).tolist()]
    out, directions = segments[-1], RANK * len(widths)
    both = [quantised(draw(width, WIDTH, seed=n, dtype=dtype)) for n, width in enumerate(widths)]
    packed = [one for member, _ in both for one in member]
    weight = torch.cat([unpacked for _, unpacked in both])
    x = draw(NUM_TOKENS, WIDTH, seed=10, dtype=dtype)
    x_adapter = x * (draw(NUM_TOKENS, WIDTH, seed=11, dtype=dtype) > 0) * 1.5 if dropped else None
    downs = [draw(3, directions, WIDTH, seed=12, dtype=dtype)]
    ups = [draw(3, RANK, out, seed=13, dtype=dtype)]
    gain = draw(3, out, seed=14, dtype=dtype).abs() if gained else None
    bias = draw(out, seed=15, dtype=dtype)
    grads_y = [draw(NUM_TOKENS, width, seed=20, dtype=dtype) for width in widths]
    routing, lengths = route(COUNTS, fresh=[True] * 3, num_tokens=NUM_TOKENS, fixed_size=False)
    routes = Routing.of(torch.from_numpy(routing), lengths).tensors()

    def through(weights: Sequence[Tensor], block_size: int | None) -> list[Tensor]:
        y, h, correction, rescaled = packed_linear(
            x, x_adapter, weights, block_size, bias, downs, ups, gain, routes, segments
        )
        sums = [torch.zeros(one[0].shape) for one in (downs, ups)]
        magnitudes = torch.zeros(3, out) if gained else None
        grad_x, grad_seen = packed_linear_backward(
            grads_y,
            x,
            x_adapter,
            h,
            correction,
            rescaled,
            weights,
            block_size,
            downs,
            ups,
            torch.ones(3),
            gain,
            None if gain is None else gain.float(),
            False,
            *sums,
            magnitudes,
            routes,
            segments,
        )
        found = [y, h, rescaled, grad_x, grad_seen, *sums]
        return found if magnitudes is None else [*found, magnitudes]

    for found, expected in zip(through(packed, 64), through([weight], None), strict=True):
        assert torch.equal(found, expected)


def test_a_layers_weight_is_unpacked_to_what_it_multiplies_with():
    base = nf4_base()
    linear: Any = block_linears(base.model)["model.layers.0.self_attn.k_proj"]
    packed, block_size = group_weights([linear], ["k_proj"])
    assert [one.dtype for one in packed] == [torch.uint8, torch.float32]
    assert all(type(one) is Tensor for one in packed)
    assert block_size == 64
    x = draw(5, 64, seed=0, dtype=torch.float32)
    weight = unpacked(packed, 64, [0, 32], like=x)
    assert weight.shape == (32, 64)
    assert torch.equal(linear(x), nn.functional.linear(x, weight))


def test_packed_weights_stay_where_they_are_and_no_unpacked_one_is_kept_for_the_backward():
    base = nf4_base()
    before = {name: one.data_ptr() for name, one in base.model.named_parameters()}
    kept = list[Tensor]()

    def note(one: Tensor) -> Tensor:
        kept.append(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
        packed = pack(TRIALS[:1], [LARGE], base=base)
    assert packed.failed() == {}
    assert kept
    linears = block_linears(base.model)
    # Four tokens at least are what a step has, and 96 at most: a weight is known by its shape.
    groups = group_targets(base.model, list(linears), apart=False)
    weights = [(sum(one.out_features), one.in_features) for one in groups]
    weights += [(one.out_features, one.in_features) for one in linears.values()]
    assert not {tuple(one.shape) for one in kept} & {one for one in weights if one[0] > 96}
    assert {name: one.data_ptr() for name, one in base.model.named_parameters()} == before


# Packs --------------------------------------------------------------------------------------------


def numbers_of(packed: Packed, trial: Trial) -> tuple[Outcome, AdapterFiles]:
    finished = packed.finished(trial.trial_id)
    assert finished.outcome.status == "done", finished.outcome.reason
    assert finished.adapter is not None
    return finished.outcome, finished.adapter


def assert_same_bits(packed: Packed, other: Packed, trials: Sequence[Trial] = TRIALS) -> None:
    for trial in trials:
        (outcome, adapter), (expected, files) = (numbers_of(one, trial) for one in (packed, other))
        assert outcome.losses == expected.losses
        assert outcome.grad_norms == expected.grad_norms
        assert outcome.validation_loss == expected.validation_loss
        assert adapter.config == files.config
        for name, tensor in files.tensors.items():
            assert torch.equal(adapter.tensors[name], tensor), name


def errors_of(
    outcome: Outcome, adapter: AdapterFiles, *, against: Any, way: float
) -> dict[str, float]:
    """How far two runs of a trial lie apart; weights relative to the way that they have moved."""
    expected, files = against
    return {
        "losses": furthest(outcome.losses, expected.losses),
        "gradient norms": furthest(outcome.grad_norms, expected.grad_norms),
        "validation loss": furthest([outcome.validation_loss], [expected.validation_loss]),
        "weights": distance(adapter.tensors, files.tensors) / way,
    }


def furthest(found: Sequence[Any], expected: Sequence[Any]) -> float:
    assert len(found) == len(expected)
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


def distance(some: Any, others: Any) -> float:
    assert some.keys() == others.keys()
    return float(sum((some[n].double() - others[n].double()).square().sum() for n in some)) ** 0.5


def way_of(base: Base, trial: Trial, files: AdapterFiles) -> float:
    method: Any = load_method(trial.method.name)
    targets = target_modules(base.model, trial.targets)
    start = method.export_layers(
        base.model, trial, method.start(base.model, trial, targets=targets)
    )
    return distance(start.tensors, files.tensors)


def alone(base: Base, trial: Trial) -> tuple[Outcome, AdapterFiles]:
    """The trial on the reference engine."""
    outcome, adapter = train(
        trial, DATA[trial.data_fingerprint], base=base, tokens_per_microbatch=200
    )
    assert adapter is not None, outcome.reason
    return outcome, adapter


@pytest.mark.parametrize(
    ("dtype", "dropout", "gradient_checkpointing"),
    [(torch.float32, 0.0, False), (torch.bfloat16, 0.0, False), (torch.float32, 0.1, True)],
)
def test_a_pack_over_nf4_is_the_pack_over_its_unpacked_weights_bit_for_bit(
    dtype, dropout, gradient_checkpointing
):
    base = nf4_base(dtype)
    before = bits_of(base)
    trials = [replace(trial, dropout=dropout) for trial in TRIALS]
    shape = shape_for(trials, gradient_checkpointing=gradient_checkpointing)
    packed = pack(trials, [SMALL, LARGE], base=base, shape=shape)
    twin = pack(trials, [SMALL, LARGE], base=twin_of(base, dtype), shape=shape)
    assert_same_bits(packed, twin)
    assert bits_of(base) == before


def test_a_mixed_pack_over_nf4_equals_the_reference_engine_in_float32():
    base = nf4_base()
    before = bits_of(base)
    packed = pack(TRIALS, [SMALL, LARGE], base=base)
    assert {trial.method.name for trial in TRIALS} == {"lora", "rslora", "loraplus"}
    for trial in TRIALS:
        reference = alone(base, trial)
        way = way_of(base, trial, reference[1])
        outcome, adapter = numbers_of(packed, trial)
        errors = errors_of(outcome, adapter, against=reference, way=way)
        assert adapter.config == reference[1].config
        assert errors.pop("weights") < PROMISED, trial.trial_id
        assert max(errors.values()) < SAME_NUMBERS, (trial.trial_id, errors)
    assert bits_of(base) == before


def test_in_bfloat16_a_pack_is_no_further_from_float32_than_the_reference_engine_is():
    assert_no_further_from_float32(device="cpu")


def assert_no_further_from_float32(*, device: str, **engine: Any) -> None:
    """Both engines in bfloat16 against the reference engine over the same weights in float32.

    Measured on a CPU, the root of the summed squares of four trials, packed and reference: losses
    1.6e-3 and 2.3e-3, gradient norms 6.7e-3 and 6.2e-3, weights 0.094 and 0.094. A validation loss
    is one number a trial, and its rounding may be next to nothing by chance: it is held against
    what rounding does to the reference engine's losses.
    """
    base = nf4_base(torch.bfloat16, device=device)
    before = bits_of(base)
    yardstick = twin_of(base, torch.float32)
    packed = pack(TRIALS, [SMALL, LARGE], base=base, **engine)
    ours, theirs = dict[str, float](), dict[str, float]()
    for trial in TRIALS:
        exact = alone(yardstick, trial)
        way = way_of(yardstick, trial, exact[1])
        for sums, run in ((ours, numbers_of(packed, trial)), (theirs, alone(base, trial))):
            for name, error in errors_of(*run, against=exact, way=way).items():
                sums[name] = sums.get(name, 0.0) + error**2
    for name in ("losses", "gradient norms", "weights"):
        assert ours[name] < 1.5**2 * theirs[name], name
    assert ours["validation loss"] < theirs["losses"]
    assert bits_of(base) == before


class NanStart:
    """LoRA whose adapter starts with one number that is none."""

    def __init__(self) -> None:
        self._inner: Any = load_method("lora")

    def start(self, model: Any, trial: Trial, *, targets: Sequence[str]) -> Any:
        layers = self._inner.start(model, trial, targets=targets)
        layers[targets[0]].a_RD[0, 0] = float("nan")
        return layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_nan_in_one_adapter_over_nf4_leaves_neighbours_and_base_untouched():
    base = nf4_base()
    before = bits_of(base)
    nan = NanStart()
    broken = replace(TRIALS[0], trial_id="broken", method=replace(TRIALS[0].method, name="broken"))
    with_it = pack(
        [broken, *TRIALS],
        [SMALL, LARGE],
        base=base,
        shape=shape_for(TRIALS, num_slots=len(TRIALS) + 1),
        find_method=lambda name: nan if name == "broken" else load_method(name),
    )
    outcome = with_it.finished("broken").outcome
    assert outcome.status == "diverged"
    for trial in TRIALS:
        found, adapter = numbers_of(with_it, trial)
        expected = alone(base, trial)
        way = way_of(base, trial, expected[1])
        errors = errors_of(found, adapter, against=expected, way=way)
        assert errors.pop("weights") < PROMISED, trial.trial_id
        assert max(errors.values()) < SAME_NUMBERS, (trial.trial_id, errors)
    assert bits_of(base) == before


@pytest.mark.parametrize("method", ["pissa", "dora"])
def test_a_method_that_needs_the_weights_themselves_fails_with_the_reason_and_alone(method):
    base = nf4_base()
    refused = replace(tiny_trial(SMALL, method=method), trial_id="refused")
    # Where the plan would have refused it, a pack that is given it has room for it.
    trials = [refused, TRIALS[0]]
    shape = shape_for(trials, magnitudes=False)
    packed = pack(trials, [SMALL, LARGE], base=base, shape=shape)
    (error,) = packed.failed().values()
    assert isinstance(error, ModelError)
    assert "is quantised (torch.uint8); load the base in bfloat16" in str(error)
    assert packed.finished(TRIALS[0].trial_id).outcome.status == "done"


def test_weights_in_eight_bits_are_refused_in_a_line_and_the_base_is_as_it_was():
    base = nf4_base()
    linear: Any = block_linears(base.model)["model.layers.1.mlp.up_proj"]
    kept = linear.weight
    linear.weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"the weight of .*up_proj is quantised \(torch.int8\)"):
        group_weights([linear], ["model.layers.1.mlp.up_proj"])
    linear.weight = kept
    before = bits_of(base)
    check_family(base.model, targets=("all-linear",))
    assert bits_of(base) == before


# torch's compiler instantiates an autograd function to trace it, and warns of that itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("targets", ["all-linear", "q_proj"])
def test_compiled_blocks_over_nf4_give_the_same_numbers(monkeypatch, targets):
    """Also where layers without an adapter stay bitsandbytes' own."""
    compiled = nn.Module.compile
    # A backend that needs no C compiler; what is traced is the same.
    monkeypatch.setattr(
        nn.Module, "compile", lambda block, **more: compiled(block, backend="aot_eager", **more)
    )
    base = nf4_base()
    trial = replace(TRIALS[0], targets=(targets,), steps=4, num_updates=4)
    shape = shape_for([trial], num_slots=1)
    runs = [
        pack([trial], [LARGE], base=base, shape=shape, compile_blocks=with_it, targets=(targets,))
        for with_it in (True, False)
    ]
    torch.compiler.reset()
    found, expected = (run.finished(trial.trial_id).outcome for run in runs)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.parametrize(
    "compile_blocks", [pytest.param(False, marks=ON_CUDA), pytest.param(True, marks=ON_CUDA)]
)
def test_on_cuda_a_pack_over_nf4_equals_the_reference_engine(compile_blocks):
    """Not run on a CUDA device yet. In float32 as `test_packed` promises there.

    In float32 against the unpacked weights: how exactly bitsandbytes' kernels multiply packed ones
    there is not known here. In bfloat16 against its own.
    """
    base = nf4_base(device="cuda")
    before = bits_of(base)
    packed = pack(TRIALS, [SMALL, LARGE], base=base, compile_blocks=compile_blocks)
    twin = twin_of(base, torch.float32)
    for trial in TRIALS:
        reference = alone(twin, trial)
        way = way_of(twin, trial, reference[1])
        outcome, adapter = numbers_of(packed, trial)
        errors = errors_of(outcome, adapter, against=reference, way=way)
        assert errors.pop("weights") < 1e-3, trial.trial_id
        assert max(errors.values()) < PROMISED, (trial.trial_id, errors)
    assert bits_of(base) == before
    assert_no_further_from_float32(device="cuda", compile_blocks=compile_blocks)
