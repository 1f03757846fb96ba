"""The recorded sweep of docs/log.md, SmolLM2-135M on GSM8K: 279 trials, no simulation."""

import csv
from pathlib import Path

from loratune.records import TrialResult
from simulated import result

_RESULTS = Path(__file__).parents[1] / "docs" / "log" / "fig1-smollm2-results.csv"


def recorded_results() -> list[TrialResult]:
    """Its trials, with their held-out losses."""
    with _RESULTS.open(newline="") as lines:
        return [
            result(
                float(row["validation_loss"]),
                method=row["method"],
                batch_size=int(row["batch_size"]),
                learning_rate=float(row["learning_rate"]),
                seed=int(row["seed"]),
                num_train_rows=4096,
            )
            for row in csv.DictReader(lines)
        ]
