"""rsLoRA is LoRA at another scale, and says so in its config."""

import torch

from loratune.methods import lora, rslora
from loratune.models.targets import target_modules
from methods.trials import make_optimizer, make_trial, run_updates
from tiny_models import tiny_model


def test_rslora_trains_like_lora_at_alpha_times_the_root_of_the_rank():
    ends = list[dict[str, torch.Tensor]]()
    for method, trial in (
        (rslora.METHOD, make_trial("rslora", rank=4, alpha=8.0)),
        (lora.METHOD, make_trial("lora", rank=4, alpha=16.0)),
    ):
        model = tiny_model("llama")
        attached = method.attach(model, trial, targets=target_modules(model, trial.targets))
        run_updates(attached, make_optimizer(attached, trial), range(5))
        ends.append(attached.state())
        assert attached.export().config["use_rslora"] == (method is rslora.METHOD)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
