"""A base model's identity: one hash over what its numbers come from, wherever the files lie.

Hashed are config.json, the weights, the tokenizer's files, and the repository's own Python files
where config.json asks for them. The README, generation_config.json and anything else in the folder
do not count, nor does what transformers writes into config.json about itself. The same tensors in
other shards or another file format are another model: nothing is parsed but config.json.
"""

import hashlib
import json
from pathlib import Path

from loratune.models.sources import (
    TOKENIZER_FILES,
    WEIGHTS,
    Location,
    has_custom_code,
    read_json,
)

# In config.json, but about the writer and the place rather than the model.
_ABOUT_THE_WRITER = ("transformers_version", "_name_or_path")


def fingerprint(location: Location) -> str:
    """ "sha256:" and 64 hexadecimal digits; reads every weight once, in a stream.

    Raises:
        ModelError: config.json is no JSON object, or a shard is missing.
    """
    if location.kind == "gguf":
        return f"sha256:{_digest(location.path)}"
    folder = location.path
    config = read_json(folder / "config.json", source=location.source)
    described = {key: value for key, value in config.items() if key not in _ABOUT_THE_WRITER}
    # Shards go by their position, so that renaming them all changes nothing.
    weights = location.weight_files()
    names = [WEIGHTS] if len(weights) == 1 else [f"shard {n}" for n in range(len(weights))]
    parts = {
        "config.json": hashlib.sha256(
            json.dumps(described, sort_keys=True, ensure_ascii=True).encode()
        ).hexdigest(),
        **{name: _digest(path) for name, path in zip(names, weights, strict=True)},
        **{name: _digest(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()},
    }
    if has_custom_code(config):
        parts |= {path.name: _digest(path) for path in folder.glob("*.py")}
    lines = "".join(f"{name} {parts[name]}\n" for name in sorted(parts))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
