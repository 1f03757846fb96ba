"""A trial to hand to methods, and the plainest training loop. For the tests of this folder."""

from typing import Any

import torch
from torch import Tensor

from loratune.methods.base import Attached
from loratune.records import Trial
from loratune.study.methods import choose, describe
from tiny_models import VOCAB_SIZE


def make_trial(method: str, **changes: Any) -> Trial:
    """rank 4, alpha 8, seed 0, no dropout, 20 updates; options of the method by their names."""
    options = {key: changes.pop(key) for key in describe(method).options if key in changes}
    values: dict[str, Any] = {
        "rank": 4,
        "alpha": 8.0,
        "seed": 0,
        "dropout": 0.0,
        "num_updates": 20,
        "learning_rate": 1e-3,
        "targets": ("all-linear",),
        "model": "some/base",
        **changes,
    }
    scale = describe(method).scale_of(rank=values["rank"], alpha=values["alpha"])
    filler: dict[str, Any] = {
        "trial_id": "trial-0",
        "provisional": False,
        "model_fingerprint": "m",
        "precision": "float32",
        "data_fingerprint": "d",
        "rows": None,
        "num_train_rows": 64,
        "method": choose(method, options),
        "scale": scale,
        "batch_size": 4,
        "protocol": "fixed_steps",
        "epochs": None,
        "steps": values["num_updates"],
        "last_batch_size": 4,
        "num_samples": 4 * values["num_updates"],
        "schedule": "constant",
        "warmup_steps": 0,
        "optimizer": "adamw",
        "beta1": 0.9,
        "beta2": 0.999,
        "beta2_rule": "fixed",
        "eps": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": None,
    }
    return Trial(**{**filler, **values})


METHODS = ("lora", "rslora", "pissa", "milora", "dora", "loraplus", "olora", "adalora")


def token_ids(seed: int, *, rows: int = 4, length: int = 10) -> Tensor:
    """int64[rows, length], drawn apart from torch's global random state."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB_SIZE, (rows, length), generator=generator)


def make_optimizer(attached: Attached, trial: Trial) -> torch.optim.AdamW:
    """AdamW with the trial's numbers, each group's factors applied."""
    groups = [
        {
            "params": group.parameters,
            "lr": trial.learning_rate * group.lr_factor,
            "eps": trial.eps * group.eps_factor,
            "weight_decay": trial.weight_decay * group.weight_decay_factor,
        }
        for group in attached.parameter_groups()
    ]
    return torch.optim.AdamW(groups, betas=(trial.beta1, trial.beta2))


def run_updates(
    attached: Attached,
    optimizer: torch.optim.Optimizer,
    updates: range,
    *,
    tell_method: bool = True,
) -> list[float]:
    """The plainest loop: one batch an update, dropout seeded by the update; returns the losses."""
    losses = list[float]()
    attached.model.train()
    for update in updates:
        torch.manual_seed(1000 + update)
        ids = token_ids(update)
        logits = attached.model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        penalty = attached.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        if tell_method:
            attached.after_backward(update)
        optimizer.zero_grad()
        losses.append(loss.item())
    attached.model.eval()
    return losses


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> Tensor:
    """Logits of one fixed batch."""
    return model(input_ids=token_ids(777)).logits
