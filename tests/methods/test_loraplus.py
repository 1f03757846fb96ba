"""LoRA+ is LoRA with another learning rate for B."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from loratune.errors import StudyError
from loratune.methods.loraplus import METHOD
from loratune.models.targets import target_modules
from loratune.records import MethodChoice
from methods.trials import make_optimizer, make_trial, run_updates
from tiny_models import tiny_model


def attach(**changes):
    model = tiny_model("llama")
    trial = make_trial("loraplus", **changes)
    return METHOD.attach(model, trial, targets=target_modules(model, trial.targets)), trial


def test_training_equals_that_with_pefts_lora_plus_optimizer():
    ours, trial = attach(ratio=16.0)
    assert [group.lr_factor for group in ours.parameter_groups()] == [1.0, 16.0]
    losses = run_updates(ours, make_optimizer(ours, trial), range(6))
    other, _ = attach(ratio=16.0)
    optimizer = create_loraplus_optimizer(
        cast("Any", other.model),
        optimizer_cls=torch.optim.AdamW,
        lr=trial.learning_rate,
        eps=trial.eps,
        loraplus_lr_ratio=16.0,
    )
    assert run_updates(other, optimizer, range(6)) == losses
    assert all(torch.equal(ours.state()[name], one) for name, one in other.state().items())


def test_a_ratio_that_would_keep_b_at_zero_is_refused():
    model = tiny_model("llama")
    trial = replace(make_trial("lora"), method=MethodChoice("loraplus", (("ratio", 0.0),)))
    with pytest.raises(StudyError, match="'ratio'"):
        METHOD.attach(model, trial, targets=target_modules(model, trial.targets))
