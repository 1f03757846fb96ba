"""pissa, milora and olora against PEFT's own, against closed forms, and their memory of factors."""

import copy
import gc
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from loratune.errors import StudyError
from loratune.methods import corrected, load_method
from loratune.models.targets import target_modules
from methods.trials import logits_of, make_optimizer, make_trial, run_updates, token_ids
from tiny_models import tiny_model

# PEFT asks transformers for a property that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def decaying_model() -> Any:
    """Each singular value is 0.7 of the one before, so that subspaces are well defined."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in target_modules(model, ("all-linear",)):
            weight = model.get_parameter(f"{layer}.weight")
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(u @ torch.diag(4 * 0.7 ** torch.arange(len(s))) @ vh)
    return model


def attach(model: Any, method: str, **changes: Any):
    trial = make_trial(method, **changes)
    return load_method(method).attach(
        model, trial, targets=target_modules(model, trial.targets)
    ), trial


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: one for name, one in model.named_parameters() if one.requires_grad and "lora" in name
    }


@pytest.mark.parametrize(
    ("method", "options", "theirs"),
    [
        ("pissa", {}, "pissa"),
        ("pissa", {"niter": 16}, "pissa_niter_16"),
        ("olora", {}, "olora"),
    ],
)
def test_start_and_training_equal_those_of_peft_on_its_changed_base(method, options, theirs):
    ours, trial = attach(decaying_model(), method, **options)
    config = LoraConfig(
        r=trial.rank, lora_alpha=8, target_modules="all-linear", init_lora_weights=theirs
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft = get_peft_model(decaying_model(), config).eval()
    mine, reference = trained(ours.model), trained(peft)
    assert mine.keys() == reference.keys()
    for name, one in mine.items():
        # The sign of each component is free. float32 rounding of values of size 1; for niter what
        # 16 iterations leave of a wrong start is of that size too: 0.7^33 is 8e-6.
        torch.testing.assert_close(one.abs(), reference[name].abs(), atol=2e-4, rtol=1e-3)
    # One start for both, so that what follows compares training alone.
    with torch.no_grad():
        for name, one in mine.items():
            one.copy_(reference[name])
    state = ours.state()
    layers = target_modules(tiny_model("llama"), ("all-linear",))
    for layer in layers:
        for half in "AB":
            name = f"base_model.model.{layer}.lora_{half}.default.weight"
            sign = 1 if half == "A" else -1
            state[f"{layer}.correction.{half}"] = sign * reference[name].detach().clone()
    ours.load_state(state)
    torch.testing.assert_close(logits_of(ours.model), logits_of(peft), atol=1e-4, rtol=1e-4)

    losses = run_updates(ours, make_optimizer(ours, trial), range(10))
    optimizer = torch.optim.AdamW(
        reference.values(), lr=trial.learning_rate, weight_decay=0.0, eps=trial.eps
    )
    for update, loss in enumerate(losses):
        ids = token_ids(update)
        logits = peft(input_ids=ids).logits[:, :-1]
        other = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        other.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss == pytest.approx(other.item(), abs=1e-4)
    for name, one in mine.items():
        # A tenth of what one update moves: Adam turns the sign of a tiny gradient into a step.
        torch.testing.assert_close(one, reference[name], atol=1e-4, rtol=1e-3)


def reconstruction(
    attached: Any, trial: Any, layer: str, *, half: str = "default"
) -> tuple[Tensor, Tensor]:
    module = attached.model.get_submodule(f"base_model.model.{layer}")
    product = trial.scale * module.lora_B[half].weight @ module.lora_A[half].weight
    return product, module.base_layer.weight


def last_components(weight: Tensor, rank: int) -> Tensor:
    """From the eigenvectors of W'W in float64: no singular value decomposition."""
    exact = weight.double()
    _, vectors = torch.linalg.eigh(exact.T @ exact)  # ascending
    smallest = vectors[:, max(0, exact.shape[1] - min(exact.shape)) :][:, :rank]
    return exact @ smallest @ smallest.T


def first_components(weight: Tensor, rank: int) -> Tensor:
    exact = weight.double()
    _, vectors = torch.linalg.eigh(exact.T @ exact)
    largest = vectors[:, -rank:]
    return exact @ largest @ largest.T


def first_columns(weight: Tensor, rank: int) -> Tensor:
    """Gram-Schmidt: the projection of W on the span of its first r columns."""
    columns = weight.double()[:, :rank]
    return columns @ torch.linalg.pinv(columns) @ weight.double()


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(
    ("method", "part"),
    [("milora", last_components), ("pissa", first_components), ("olora", first_columns)],
)
def test_the_start_is_the_part_of_the_weight_that_an_independent_formula_gives(
    method, part: Callable[[Tensor, int], Tensor], family
):
    model = tiny_model(family)
    attached, trial = attach(model, method)
    for layer in target_modules(tiny_model(family), ("all-linear",)):
        product, weight = reconstruction(attached, trial, layer)
        expected = part(weight, trial.rank)
        if method == "olora":
            expected = trial.scale * expected  # PEFT does not divide by the scale
        torch.testing.assert_close(product.double(), expected, atol=2e-5, rtol=1e-4)
        correction, _ = reconstruction(attached, trial, layer, half="correction")
        assert torch.equal(correction, -product)


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_the_singular_values_are_split_evenly_between_a_and_b(method):
    attached, _ = attach(tiny_model("llama"), method)
    group_a, group_b = attached.parameter_groups()
    for a, b in zip(group_a.parameters, group_b.parameters, strict=True):
        # A A' = S/scale = B'B, diagonal.
        torch.testing.assert_close(a @ a.T, b.T @ b, atol=1e-5, rtol=1e-4)
        off = a @ a.T - torch.diag(torch.diag(a @ a.T))
        assert off.abs().max() < 1e-5


@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_the_correction_is_not_trained_has_no_dropout_and_never_moves(method):
    attached, trial = attach(tiny_model("llama"), method, dropout=0.5, learning_rate=1e-2)
    before = attached.state()
    run_updates(attached, make_optimizer(attached, trial), range(3))
    after = attached.state()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (".correction." in name)
    layer: Any = attached.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert layer.lora_dropout["default"].p == 0.5
    assert isinstance(layer.lora_dropout["correction"], torch.nn.Identity)


@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_factors_are_computed_once_for_trials_that_share_them(method):
    model = tiny_model("llama")
    calls = list[str]()
    real = corrected._checked

    def counted(name: str, layer: torch.nn.Linear, factorise: corrected.Factorise):
        calls.append(name)
        return real(name, layer, factorise)

    def starts(**changes: Any) -> dict[str, Tensor]:
        attached, _ = attach(model, method, **changes)
        state = attached.state()
        attached.detach()
        return state

    with patch.object(corrected, "_checked", counted):
        first = starts()
        assert len(calls) == 14
        again = starts(seed=3, learning_rate=0.1, batch_size=16, dropout=0.1)
        assert len(calls) == 14
        assert all(torch.equal(first[name], again[name]) for name in first)
        starts(alpha=4.0)
        assert len(calls) == 28  # the scale is part of the factors
        starts(targets=("q_proj",), alpha=4.0)
        assert len(calls) == 28  # a layer's factors do not depend on its neighbours
        # The base is what it is computed from: a changed weight is seen, and so is another one.
        with torch.no_grad():
            model.get_parameter("model.layers.0.self_attn.q_proj.weight").mul_(2)
        starts(targets=("q_proj",), alpha=4.0)
        assert len(calls) == 29
        layer: Any = model.get_submodule("model.layers.1.self_attn.q_proj")
        layer.weight = torch.nn.Parameter(2 * layer.weight.detach(), requires_grad=False)
        changed = starts(targets=("q_proj",), alpha=4.0)
        assert len(calls) == 30
        fresh, _ = attach(copy.deepcopy(model), method, targets=("q_proj",), alpha=4.0)
        assert all(torch.equal(changed[name], one) for name, one in fresh.state().items())


def test_a_pack_that_goes_back_and_forth_between_methods_computes_each_start_once():
    model = tiny_model("llama")
    calls = list[str]()
    real = corrected._checked

    def counted(name: str, layer: torch.nn.Linear, factorise: corrected.Factorise):
        calls.append(name)
        return real(name, layer, factorise)

    def start(method: str, **changes: Any) -> None:
        trial = make_trial(method, targets=("q_proj",), **changes)
        packable: Any = load_method(method)
        packable.start(model, trial, targets=target_modules(model, trial.targets))

    with patch.object(corrected, "_checked", counted):
        for seed in range(3):
            for method in ("pissa", "milora", "olora"):
                start(method, seed=seed)
        assert len(calls) == 3 * 2
        start("pissa", alpha=4.0)
        start("pissa")  # used again, so that milora is now the oldest
        assert len(calls) == 4 * 2
        start("pissa", alpha=2.0)  # one more than are kept
        start("pissa")
        assert len(calls) == 5 * 2
        start("milora")
        assert len(calls) == 6 * 2
    layer: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert len(corrected._remembered[layer].factors) == corrected.NUM_REMEMBERED == 4


def test_training_does_not_reach_into_the_remembered_factors():
    model = tiny_model("llama")
    attached, trial = attach(model, "pissa", learning_rate=0.1)
    first = attached.state()
    run_updates(attached, make_optimizer(attached, trial), range(3))
    attached.detach()
    again = attach(model, "pissa")[0].state()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_remembered_factors_go_with_their_model():
    gc.collect()
    before = len(corrected._remembered)
    model = tiny_model("llama")
    attached, _ = attach(model, "milora")
    assert len(corrected._remembered) == before + 14
    attached.detach()
    del model, attached
    gc.collect()
    assert len(corrected._remembered) == before


def test_the_fast_decomposition_nears_the_exact_one_with_its_iterations():
    exact, trial = attach(decaying_model(), "pissa")
    distances = list[float]()
    for niter in (1, 4, 16):
        fast, _ = attach(decaying_model(), "pissa", niter=niter)
        layer = "model.layers.0.mlp.down_proj"
        ours, _ = reconstruction(fast, trial, layer)
        theirs, _ = reconstruction(exact, trial, layer)
        distances.append((ours - theirs).norm().item())
    assert distances[0] > 3 * distances[1] > 9 * distances[2]
    assert distances[2] < 0.01


@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_a_rank_above_the_smaller_side_is_an_error_that_names_layer_and_bound(method):
    # k_proj of the tiny model maps 32 to 16.
    with pytest.raises(StudyError, match=r"rank=17 is above 16.*self_attn\.k_proj"):
        attach(tiny_model("llama"), method, rank=17, targets=("k_proj",))
    attach(tiny_model("llama"), method, rank=16, targets=("k_proj",))


@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_the_exported_adapter_is_a_lora_of_twice_the_rank_at_the_same_scale(method):
    attached, trial = attach(tiny_model("llama"), method)
    config: Any = attached.export().config
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["lora_alpha"] / config["r"] == trial.scale
    shapes = {tuple(tensor.shape) for tensor in attached.export().tensors.values()}
    assert all(8 in shape for shape in shapes)
