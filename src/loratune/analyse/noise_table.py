"""The noise scale of every trial from its stored probes, as a table.

One row a trial, split, coordinates and block: raw gradients or Adam's (P g, see records.BlockSums),
of all trained numbers together or of A, B and DoRA's magnitudes apart. Squared norms of blocks add
up, so that "all" is their sum.
"""

# pandas comes without complete types: what it returns is unknown to pyright.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product

import pandas as pd

from loratune.analyse.noise_scale import GradientSums, noise_scale
from loratune.analyse.scores import method_label
from loratune.analyse.tables import Value, make_frame
from loratune.errors import AnalysisError
from loratune.records import BlockSums, NoiseProbe, TrialResult

COLUMNS = {
    "trial_id": "text",
    "status": "text",
    "method": "text",
    "model": "text",
    "rank": "int",
    "batch_size": "int",
    "learning_rate": "float",
    "seed": "int",
    "num_train_rows": "int",
    "split": "text",
    "coordinates": "text",
    "block": "text",
    "verdict": "text",
    "noise_scale": "float",
    "low": "float",
    "high": "float",
    "reason": "text",
    "num_probes": "int",
    "mean_examples": "float",
    "trace": "float",
    "squared_norm": "float",
    "squared_norm_low": "float",
    "squared_norm_high": "float",
}
SPLITS = ("train", "validation")
COORDINATES = ("raw", "adam")
BLOCKS = ("all", "A", "B", "other")


def noise_scale_table(results: Sequence[TrialResult], probes: Sequence[NoiseProbe]) -> pd.DataFrame:
    """B_simple of every trial that was probed, in the order of `results`.

    Adam's coordinates leave out probes from before there was a second moment in every block asked
    about. Probes of one example, and rows without any probe left, are left out.

    Raises:
        AnalysisError: no trial has a probe.
    """
    if not probes:
        raise AnalysisError(
            "no trial of this folder has noise probes; run a study with the key "
            "noise_scale: {every: 10}"
        )
    by_trial = dict[str, list[NoiseProbe]]()
    for probe in probes:
        by_trial.setdefault(probe.trial_id, []).append(probe)
    rows = list[dict[str, Value]]()
    for result in results:
        own = by_trial.get(result.trial.trial_id, [])
        for split, coordinates, block in product(SPLITS, COORDINATES, BLOCKS):
            sums = [
                one
                for probe in own
                if probe.split == split
                and (one := _sums(probe, block, scaled=coordinates == "adam")) is not None
            ]
            if sums:
                # At the start B is 0, and A has no gradient at all: such a probe says nothing of A.
                found = asdict(noise_scale([one for one in sums if one.sum_squares] or sums))
                rows.append(
                    {
                        **_identity(result),
                        "split": split,
                        "coordinates": coordinates,
                        "block": block,
                        "noise_scale": found.pop("value"),
                        **found,
                    }
                )
    return make_frame(COLUMNS, rows)


def _sums(probe: NoiseProbe, block: str, *, scaled: bool) -> GradientSums | None:
    chosen = [one for one in probe.blocks if block in ("all", one.block)]
    pairs = [_pair(one, scaled=scaled) for one in chosen]
    if not pairs or probe.num_examples < 2:
        return None
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs):
        return None
    return GradientSums(
        num_examples=probe.num_examples,
        sum_squares=sum(square for square, _ in known),
        mean_square=sum(mean for _, mean in known),
    )


def _pair(one: BlockSums, *, scaled: bool) -> tuple[float, float] | None:
    if not scaled:
        return one.sum_squares, one.mean_square
    if one.scaled_sum_squares is None or one.scaled_mean_square is None:
        return None
    return one.scaled_sum_squares, one.scaled_mean_square


def _identity(result: TrialResult) -> dict[str, Value]:
    trial = result.trial
    return {
        "trial_id": trial.trial_id,
        "status": result.status,
        "method": method_label(result),
        "model": trial.model,
        "rank": trial.rank,
        "batch_size": trial.batch_size,
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
        "num_train_rows": trial.num_train_rows,
    }
