"""Snapshots as files: tensors in safetensors, facts as JSON in its header. Whole, or not there.

The file is written beside its place and moved there, so that a process killed at any instant leaves
the previous snapshot. No pickle: a results folder may come from somebody else.
"""

# safetensors is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loratune.engine.base import Snapshot

FORMAT = "loratune snapshot 2"


def save_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write the snapshot to `path`, replacing an older one in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    metadata = {
        "format": FORMAT,
        "trial_id": snapshot.trial_id,
        "update": str(snapshot.update),
        "engine": snapshot.engine,
        # repr-exact floats: going on must be bit-equal.
        "facts": json.dumps(snapshot.facts),
    }
    save_file(dict(snapshot.tensors), partial, metadata=metadata)
    partial.replace(path)


def load_snapshot(path: Path) -> Snapshot | None:
    """The snapshot in `path`, or None where the file is none of ours: the trial starts again."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = cast("Mapping[str, str]", file.metadata() or {})
            if metadata.get("format") != FORMAT:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    return Snapshot(
        trial_id=metadata["trial_id"],
        update=int(metadata["update"]),
        tensors=tensors,
        facts=cast("dict[str, object]", json.loads(metadata["facts"])),
        engine=metadata["engine"],
    )
