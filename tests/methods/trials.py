"""A trial to hand to methods in tests; everything but the method's own fields is a filler."""

from typing import Any

from loratune.records import Trial
from loratune.study.methods import choose, describe


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
