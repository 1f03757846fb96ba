"""The table of noise scales in plain words, for the terminal."""

# pandas comes without complete types: what it returns is unknown to pyright.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_COORDINATES = {"raw": "raw", "adam": "Adam-scaled"}


def noise_scale_text(table: "pd.DataFrame") -> str:
    """A paragraph for each trial, a line for each split, coordinates and block."""
    lines = list[str]()
    before = None
    for row in table.to_dict("records"):
        if row["trial_id"] != before:
            before = row["trial_id"]
            lines += [
                *([""] if lines else []),
                f"{before}: {row['method']}, rank {row['rank']}, batch size {row['batch_size']}, "
                f"LR {row['learning_rate']:g}, seed {row['seed']} ({row['status']})",
            ]
        what = f"{row['split']}, {_COORDINATES[row['coordinates']]}, {row['block']}"
        lines.append(f"  {what:<34}  {_said(row)}")
    return "\n".join(lines)


def _said(row: dict[Any, Any]) -> str:
    over = f"{row['num_probes']} probes of {row['mean_examples']:.3g} examples"
    match row["verdict"]:
        case "estimate":
            return (
                f"{row['noise_scale']:.3g} sequences, 95% {row['low']:.3g} to {row['high']:.3g} "
                f"({over})"
            )
        case "at least":
            return f"at least {row['low']:.3g} sequences ({over})"
        case _:
            return f"undetermined: {row['reason']} ({over})"
