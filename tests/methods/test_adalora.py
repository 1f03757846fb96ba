"""AdaLoRA: the budget really moves, the penalty is PEFT's, an impossible schedule is refused."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loratune.errors import ModelError, StudyError
from loratune.methods.adalora import METHOD
from loratune.models.targets import target_modules
from methods.trials import logits_of, make_optimizer, make_trial, run_updates, token_ids
from tiny_models import tiny_model


def attach(model: Any = None, **changes: Any):
    model = tiny_model("llama") if model is None else model
    trial = make_trial("adalora", **{"learning_rate": 1e-2, **changes})
    return METHOD.attach(model, trial, targets=target_modules(model, trial.targets)), trial


def values(attached: Any) -> list[torch.Tensor]:
    """E of every layer."""
    return [one.detach().flatten() for one in attached.parameter_groups()[2].parameters]


def ranks(attached: Any) -> list[int]:
    return [int((e != 0).sum()) for e in values(attached)]


def test_the_rank_pattern_ends_at_the_target_budget_and_differs_between_layers():
    attached, trial = attach(rank=4)
    run_updates(attached, make_optimizer(attached, trial), range(20))
    masks = [mask for name, mask in attached.state().items() if name.startswith("mask.")]
    assert len(masks) == 14
    assert sum(int(mask.sum()) for mask in masks) == 4 * 14
    assert len({int(mask.sum()) for mask in masks}) > 2
    assert ranks(attached) == [int(mask.sum()) for mask in masks]


def test_the_budget_falls_on_the_cubic_of_the_paper():
    attached, trial = attach(rank=4, num_updates=40)
    optimizer = make_optimizer(attached, trial)
    # 40 updates: 4 before pruning, 12 after it, 24 of pruning; 14 layers from rank 6 to 4.
    for update in range(40):
        run_updates(attached, optimizer, range(update, update + 1))
        step = update + 1
        left = 1 - min(max(step - 4, 0) / 24, 1)
        budget = int((6 * 14 - 4 * 14) * left**3 + 4 * 14)
        assert sum(ranks(attached)) == budget, step


def test_without_after_backward_nothing_is_pruned():
    attached, trial = attach(rank=4)
    run_updates(attached, make_optimizer(attached, trial), range(20), tell_method=False)
    assert ranks(attached) == [6] * 14
    assert not any(name.startswith("mask.") for name in attached.state())


def test_the_pattern_stands_still_after_the_last_pruning():
    attached, trial = attach(rank=4, num_updates=20)
    optimizer = make_optimizer(attached, trial)
    run_updates(attached, optimizer, range(14))  # step 14 = 20 - 6 is the last pruning
    pattern = [e != 0 for e in values(attached)]
    for update in range(14, 20):
        before = values(attached)[0].clone()
        run_updates(attached, optimizer, range(update, update + 1))
        assert all(
            torch.equal(e != 0, was) for e, was in zip(values(attached), pattern, strict=True)
        )
        assert not torch.equal(values(attached)[0], before)  # what is left goes on learning


def test_the_interval_spaces_the_prunings_out():
    attached, trial = attach(rank=4, num_updates=20, interval=5)
    optimizer = make_optimizer(attached, trial)
    seen = list[int]()
    for update in range(20):
        before = {name: one for name, one in attached.state().items() if name.startswith("mask.")}
        run_updates(attached, optimizer, range(update, update + 1))
        after = {name: one for name, one in attached.state().items() if name.startswith("mask.")}
        if any(name not in before or not torch.equal(before[name], after[name]) for name in after):
            seen.append(update + 1)
    assert seen == [5, 10, 14]


def test_the_penalty_is_what_pefts_own_forward_adds_to_the_loss():
    attached, _ = attach(orthogonality_weight=0.3)
    ids = token_ids(1)
    labelled = attached.model(input_ids=ids, labels=ids).loss
    plain = torch.nn.functional.cross_entropy(
        attached.model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    penalty = attached.penalty()
    assert penalty is not None
    assert penalty.item() > 0.1
    assert penalty.item() == pytest.approx((labelled - plain).item(), rel=1e-5)
    penalty.backward()
    group_a, group_b, group_e = attached.parameter_groups()
    assert all(one.grad is not None for one in group_a.parameters + group_b.parameters)
    assert all(one.grad is None for one in group_e.parameters)


def test_a_weight_of_zero_has_no_penalty():
    assert attach(orthogonality_weight=0.0)[0].penalty() is None


def test_a_and_b_are_normal_with_deviation_002_and_e_is_zero():
    attached, _ = attach(rank=8, alpha=8.0)
    group_a, group_b, group_e = attached.parameter_groups()
    drawn = torch.cat([one.flatten() for one in group_a.parameters + group_b.parameters])
    assert drawn.std().item() == pytest.approx(0.02, rel=0.03)
    assert drawn.mean().abs() < 0.001
    assert not any(one.any() for one in group_e.parameters)
    assert all(one.shape == (12, 1) for one in group_e.parameters)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_scale_is_the_trials_even_where_bfloat16_cannot_hold_the_initial_rank(precision):
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=320,
        intermediate_size=320,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config).eval().to(precision)
    # 1.1 x 259 is 285, which bfloat16 would round to 284.
    attached, trial = attach(
        model, rank=259, alpha=518.0, initial_rank_ratio=1.1, targets=("up_proj",)
    )
    layer: Any = attached.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    a, b, e = (getattr(layer, kind)["default"] for kind in ("lora_A", "lora_B", "lora_E"))
    assert a.shape[0] == 285
    torch.nn.init.normal_(e, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 320, generator=torch.Generator().manual_seed(1)).to(precision)
    base = torch.zeros(3, 320, dtype=precision)
    layer.base_layer.forward = lambda x: base.clone()
    expected = trial.scale * x.float() @ (e * a).T @ b.T
    # Only the one rounding of the result to the base's precision: 2^-8 in bfloat16, not 1/285.
    tolerance = 1e-5 if precision == torch.float32 else 2**-8
    torch.testing.assert_close(layer(x).float(), expected, atol=1e-6, rtol=tolerance)


def test_a_layer_without_components_is_exported_at_rank_one_and_adds_nothing(tmp_path):
    attached, trial = attach(rank=4)
    run_updates(attached, make_optimizer(attached, trial), range(20))
    with torch.no_grad():
        attached.parameter_groups()[2].parameters[0].zero_()
    files: Any = attached.export()
    name = target_modules(tiny_model("llama"), ("all-linear",))[0]
    assert files.config["rank_pattern"][name] == 1
    assert not files.tensors[f"base_model.model.{name}.lora_B.weight"].any()
    assert files.config["peft_type"] == "LORA"
    for layer, rank in files.config["rank_pattern"].items():
        assert files.config["alpha_pattern"][layer] / rank == trial.scale
        assert files.tensors[f"base_model.model.{layer}.lora_A.weight"].shape[0] == rank


def test_an_untrained_adapter_can_be_exported():
    attached, _ = attach()
    logits = logits_of(attached.model)
    files = attached.export()
    attached.detach()
    assert all(not one.any() for name, one in files.tensors.items() if "lora_B" in name)
    assert torch.equal(logits, logits_of(tiny_model("llama")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_updates": 2}, "train at least 3 updates"),
        (
            {"num_updates": 3, "initial_fraction": 0.5, "final_fraction": 0.49},
            "train at least",
        ),
        ({"initial_fraction": 0.6, "final_fraction": 0.4}, "sum to less than 1"),
        ({"initial_rank_ratio": 1.0}, "nothing to prune"),
        ({"rank": 12, "alpha": 12.0}, r"initial rank 18 is above 16, the smaller side of .*k_proj"),
        ({"beta1": 1.0}, "beta1=1; give a number between 0 and 1"),
        ({"beta2": 0.0}, "beta2=0; give a number between 0 and 1"),
    ],
)
def test_a_schedule_that_cannot_prune_is_an_error_that_says_what_to_do(changes, message):
    with pytest.raises(StudyError, match=message):
        attach(**changes)


def test_every_number_of_updates_that_is_accepted_ends_at_the_target_budget():
    accepted = 0
    for num_updates in range(1, 9):
        try:
            attached, trial = attach(num_updates=num_updates, targets=("q_proj", "up_proj"))
        except StudyError:
            assert num_updates < 3  # what the message says is needed
            continue
        run_updates(attached, make_optimizer(attached, trial), range(num_updates))
        assert sum(ranks(attached)) == 4 * 4
        accepted += 1
    assert accepted == 6


def test_a_layer_that_no_token_went_through_is_an_error_that_names_it():
    attached, _ = attach()
    attached.model(input_ids=token_ids(0)).logits.sum().backward()
    attached.parameter_groups()[0].parameters[3].grad = None
    with pytest.raises(ModelError, match=r"o_proj.*has no gradient"):
        attached.after_backward(0)
