"""What `methods.base` promises, held against every built-in method."""

import copy
import hashlib
import math
from typing import Any, cast

import pytest
import torch
from peft import PeftModel

from loratune.errors import ModelError, StudyError
from loratune.methods import load_method
from loratune.methods.base import number_option
from loratune.models.targets import target_modules
from loratune.records import MethodChoice
from methods.trials import (
    METHODS,
    logits_of,
    make_optimizer,
    make_trial,
    run_updates,
)
from tiny_models import tiny_model

# PEFT asks transformers for a property that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

FAMILIES = ("llama", "qwen3", "gemma3", "phi3")


def attach(model: Any, method: str, **changes: Any):
    trial = make_trial(method, **changes)
    targets = target_modules(model, trial.targets)
    return load_method(method).attach(model, trial, targets=targets), trial


def looks(model: Any) -> dict[str, Any]:
    """All that one can see of a model from outside, weights as hashes of their bits."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "training": [module.training for module in model.modules()],
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
        "parameters": [
            (name, id(one), hashlib.sha256(one.detach().numpy().tobytes()).hexdigest())
            for name, one in model.named_parameters()
        ],
        "buffers": [(name, id(one), one.tolist()) for name, one in model.named_buffers()],
        "config": model.config.to_dict(),
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_detach_leaves_the_very_same_base(method, checkpointing):
    model = tiny_model("llama")
    if checkpointing:
        model.activation_checkpointing_enable()
    before, logits = looks(model), logits_of(model)
    attached, trial = attach(model, method, dropout=0.1, learning_rate=1e-2)
    assert looks(model) != before
    run_updates(attached, make_optimizer(attached, trial), range(3))
    attached.detach()
    assert looks(model) == before
    assert torch.equal(logits_of(model), logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    attached.detach()
    assert looks(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_failed_attach_leaves_the_very_same_base(method):
    model = tiny_model("llama")
    before = looks(model)
    # A rank without components for those that need them, for the others a scale not of their rule.
    needs_components = method in ("pissa", "milora", "olora", "adalora")
    wrong = {"rank": 33} if needs_components else {"scale": 3.0}
    with pytest.raises(StudyError):
        attach(model, method, **wrong)
    assert looks(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_base_that_carries_an_adapter_is_refused(method):
    model = tiny_model("llama")
    attached, _ = attach(model, "lora")
    with pytest.raises(ModelError, match="carries an adapter already"):
        attach(model, method)
    attached.detach()
    attach(model, method)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_training_starts_at_the_output_of_the_base(method, family):
    model = tiny_model(family)
    logits = logits_of(model)
    attached, _ = attach(model, method)
    # float32 rounding of logits of size 1 to 10; the corrected methods add and subtract a part.
    torch.testing.assert_close(logits_of(attached.model), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_plain_peft_gives_the_same_logits_on_the_untouched_base(method, family, tmp_path):
    model = tiny_model(family)
    start = logits_of(model)
    attached, trial = attach(model, method, dropout=0.2, learning_rate=2e-2, num_updates=8)
    run_updates(attached, make_optimizer(attached, trial), range(trial.num_updates))
    trained = logits_of(attached.model)
    assert (trained - start).abs().max() > 0.1  # there is something to compare
    attached.export().save(tmp_path)
    attached.detach()
    loaded = PeftModel.from_pretrained(tiny_model(family), str(tmp_path))
    # float32: the sums are taken in another order.
    torch.testing.assert_close(logits_of(loaded), trained, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_exports_of_equal_adapters_are_equal_bytes_and_name_the_base(method, tmp_path):
    contents = list[list[bytes]]()
    for index in range(2):
        attached, trial = attach(tiny_model("llama"), method)
        run_updates(attached, make_optimizer(attached, trial), range(2))
        files = attached.export()
        files.save(tmp_path / str(index))
        assert files.config["base_model_name_or_path"] == "some/base"
        contents.append([path.read_bytes() for path in sorted((tmp_path / str(index)).iterdir())])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2


# adalora: before, amid and after its pruning.
@pytest.mark.parametrize(
    ("method", "stop"), [*((method, 9) for method in METHODS), ("adalora", 1), ("adalora", 17)]
)
def test_a_reloaded_state_goes_on_bit_equal(method, stop):
    changes = {"dropout": 0.1, "learning_rate": 1e-2}
    whole, trial = attach(tiny_model("llama"), method, **changes)
    losses = run_updates(whole, make_optimizer(whole, trial), range(20))

    first, _ = attach(tiny_model("llama"), method, **changes)
    optimizer = make_optimizer(first, trial)
    run_updates(first, optimizer, range(stop))
    state, moments = first.state(), copy.deepcopy(optimizer.state_dict())
    run_updates(first, optimizer, range(stop, 20))  # must not reach into what was taken

    second, _ = attach(tiny_model("llama"), method, **changes)
    second.load_state(state)
    optimizer = make_optimizer(second, trial)
    optimizer.load_state_dict(moments)
    assert run_updates(second, optimizer, range(stop, 20)) == losses[stop:]
    ends = whole.state(), second.state()
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_state_of_another_rank_or_other_targets_is_refused(method):
    attached, _ = attach(tiny_model("llama"), method, rank=4)
    for changes in ({"rank": 2, "alpha": 4.0}, {"targets": ("q_proj",)}):
        other, _ = attach(tiny_model("llama"), method, **changes)
        with pytest.raises(ModelError, match="another adapter's"):
            attached.load_state(other.state())


@pytest.mark.parametrize("method", METHODS)
def test_groups_hold_every_trained_parameter_once_in_float32(method):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = cast("Any", tiny_model("llama")).to(dtype)
        attached, _ = attach(model, method)
        grouped = [one for group in attached.parameter_groups() for one in group.parameters]
        trained = [one for one in attached.model.parameters() if one.requires_grad]
        assert sorted(map(id, grouped)) == sorted(map(id, trained))
        assert all(one.dtype == torch.float32 for one in grouped)
        names = [group.name for group in attached.parameter_groups()]
        assert names == (["A", "B", "other"] if method in ("dora", "adalora") else ["A", "B"])
        assert all(tensor.dtype == torch.float32 for tensor in attached.export().tensors.values())
        attached.detach()


@pytest.mark.parametrize("method", METHODS)
def test_the_start_over_a_bfloat16_base_has_not_been_rounded_to_it(method):
    attached, _ = attach(cast("Any", tiny_model("llama")).to(torch.bfloat16), method)
    for group in attached.parameter_groups():
        for parameter in group.parameters:
            rounded = parameter.to(torch.bfloat16).to(torch.float32)
            assert torch.equal(rounded, parameter) == (not parameter.any())


@pytest.mark.parametrize("method", METHODS)
def test_attach_neither_reads_nor_moves_the_global_random_state(method):
    starts = list[dict[str, torch.Tensor]]()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        attached, _ = attach(tiny_model("llama"), method)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append(attached.state())
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_moves_the_start_only_where_the_method_draws_one(method):
    starts = [attach(tiny_model("llama"), method, seed=seed)[0].state() for seed in (0, 1)]
    same = all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert same == (method in ("pissa", "milora", "olora"))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_starts_the_same_whatever_its_neighbours(method):
    few = ("q_proj", "up_proj")
    everything = attach(tiny_model("llama"), method)[0].state()
    alone = attach(tiny_model("llama"), method, targets=few)[0].state()
    assert len(alone) < len(everything)
    assert all(torch.equal(alone[name], everything[name]) for name in alone)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_starts_in_the_mode_of_the_base(method):
    model = tiny_model("llama")
    attached, _ = attach(model, method, dropout=0.5)
    assert not any(module.training for module in attached.model.modules())
    attached.detach()
    model.train()
    attached, _ = attach(model, method, dropout=0.5)
    assert all(module.training for module in attached.model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_on_in_training_and_off_in_evaluation(method):
    attached, trial = attach(tiny_model("llama"), method, dropout=0.5, learning_rate=1e-2)
    run_updates(attached, make_optimizer(attached, trial), range(2))
    assert torch.equal(logits_of(attached.model), logits_of(attached.model))
    attached.model.train()
    assert not torch.equal(logits_of(attached.model), logits_of(attached.model))


@pytest.mark.parametrize("method", ["pissa", "milora", "dora", "olora"])
def test_a_weight_that_is_not_finite_is_an_error_that_names_its_layer(method):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = math.nan
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj is not finite"):
        attach(model, method)


@pytest.mark.parametrize("target", ["model.norm", "model.layers.7.mlp.up_proj"])
@pytest.mark.parametrize("method", METHODS)
def test_a_target_that_is_no_linear_layer_is_an_error_that_names_it(method, target):
    with pytest.raises(ModelError, match=target.replace(".", r"\.")):
        load_method(method).attach(
            tiny_model("llama"), make_trial(method), targets=["model.layers.0.mlp.up_proj", target]
        )


def test_an_option_that_is_no_number_above_its_bound_is_an_error():
    for value in (0.0, -1.0, True, "16", None):
        choice = MethodChoice("loraplus", (("ratio", value),))
        with pytest.raises(StudyError, match="'ratio'"):
            number_option(choice, "ratio", above=0.0)
    assert number_option(MethodChoice("x", (("ratio", 2),)), "ratio", above=0.0) == 2.0
