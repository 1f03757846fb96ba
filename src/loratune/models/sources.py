"""Where a base model's files are: a local folder, a GGUF file, a demo model or a hub snapshot.

Everything that can be wrong with the files is said here, before any of them is parsed by
transformers. Weights are taken as safetensors or GGUF only: pickles run code when they are read,
so they are neither loaded nor downloaded.
"""

# snapshot_download's overloads name a bare dict and a bare tqdm among parameters not used here.
# pyright: reportUnknownMemberType=false

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import huggingface_hub
import huggingface_hub.errors

from loratune.errors import ModelError
from loratune.models.demo import resolve_demo_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Any one of these is a tokenizer's vocabulary.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
# What is fetched from a hub repository: no pickles, no other formats, nothing from subfolders.
_HUB_PATTERNS = ["config.json", "generation_config.json", WEIGHTS, INDEX, "model-*.safetensors"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class Location:
    """A model's files on this machine: `path` is the folder, or the .gguf file."""

    source: str
    kind: Literal["folder", "gguf"]
    path: Path

    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights, shards in the order of their names.

        Raises:
            ModelError: the index of a sharded model cannot be read, or a shard is missing.
        """
        if self.kind == "gguf":
            return (self.path,)
        single = self.path / WEIGHTS
        return (single,) if single.is_file() else _shards(self.source, self.path / INDEX)


def locate(source: str, *, download: bool = True) -> Location:
    """Find and check the files of a base model; a hub snapshot is downloaded if it is not cached.

    Args:
        source: hub id, local folder, file.gguf, or demo:1m | demo:4m | demo:12m | demo:28m.
        download: whether a hub model that is not in the cache is fetched, or refused.

    Raises:
        ModelError: nothing is there, or what is there lacks weights, config or tokenizer, or holds
            its weights as pickles only.
    """
    if source.startswith("demo:"):
        return _checked(Location(source, "folder", resolve_demo_model(source).folder))
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf(source, path)
    if source and path.is_dir():
        return _checked(Location(source, "folder", path))
    if path.is_file():
        raise ModelError(f"model {source} is a file; expected a folder, a .gguf file or a hub id")
    looks_like_a_path = source.startswith((".", "/", "~")) or "\\" in source
    if looks_like_a_path or not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"model {source!r} does not exist; expected a folder, a .gguf file, a hub id or demo:4m"
        )
    return _checked(Location(source, "folder", _hub_snapshot(source, download=download)))


def is_hub_id(source: str) -> bool:
    """Whether a source can only be a hub id: nothing of that name is on this machine."""
    if source.startswith("demo:") or source.lower().endswith(".gguf"):
        return False
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).expanduser().exists()


def has_custom_code(config: dict[str, Any]) -> bool:
    """Whether a config.json asks for the repository's own Python code."""
    return "auto_map" in config


def read_json(path: Path, *, source: str) -> dict[str, Any]:
    """A JSON object from one of the model's files.

    Raises:
        ModelError: the file is no JSON object.
    """
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {source}: cannot read {path.name} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"model {source}: {path.name} holds no JSON object")
    return cast("dict[str, Any]", value)


def _checked(location: Location) -> Location:
    """The folder, after the checks that need no parsing beyond the index of the shards."""
    source, folder = location.source, location.path
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if WEIGHTS not in names and INDEX not in names:
        raise ModelError(_no_weights(source, names))
    if "adapter_config.json" in names:
        # transformers would put the adapter on top of the base without a word
        raise ModelError(
            f"model {source} also holds an adapter (adapter_config.json); "
            "merge it into the weights, or move the adapter's files away"
        )
    if "config.json" not in names:
        raise ModelError(
            f"model {source} has weights but no config.json; "
            "copy it from the original model, or save the model with save_pretrained"
        )
    if names.isdisjoint(VOCABULARIES):
        raise ModelError(
            f"model {source} has no tokenizer (none of {', '.join(VOCABULARIES)}); "
            "save the tokenizer into the same folder with save_pretrained"
        )
    location.weight_files()
    return location


def _no_weights(source: str, names: set[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        return (
            f"model {source} has pickle weights only ({pickles[0]}), which can run code and are "
            "refused; convert them on a machine where that may happen: load the model with "
            "transformers and save it with save_pretrained, which writes safetensors"
        )
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        return (
            f"model {source} has its weights as GGUF; "
            f"give the .gguf file itself, on this machine: .../{ggufs[0]}"
        )
    if "adapter_config.json" in names:
        return (
            f"model {source} is an adapter, not a base model; "
            "give the base model that its adapter_config.json names"
        )
    return (
        f"model {source} has no weights: neither {WEIGHTS} nor {INDEX} is there; "
        "expected a Hugging Face model folder"
    )


def _shards(source: str, index: Path) -> tuple[Path, ...]:
    mapped: object = read_json(index, source=source).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise ModelError(f"model {source}: {INDEX} has no weight_map")
    names = sorted({str(name) for name in cast("dict[str, object]", mapped).values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"model {source}: {INDEX} names {name!r}; "
                "expected a .safetensors file in the same folder"
            )
        if not (index.parent / name).is_file():
            raise ModelError(
                f"model {source}: {INDEX} names {name}, which is missing; download it again"
            )
    return tuple(index.parent / name for name in names)


def _gguf(source: str, path: Path) -> Location:
    if not path.is_file():
        raise ModelError(f"model {source}: there is no such GGUF file; check the path")
    if _SPLIT_GGUF.search(path.name):
        raise ModelError(
            f"model {source} is one part of a split GGUF file; "
            "join the parts with llama.cpp's llama-gguf-split --merge"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"model {source} does not start with GGUF; the file is another format")
    return Location(source, "gguf", path)


def _hub_snapshot(source: str, *, download: bool) -> Path:
    """The folder of a hub model's newest cached snapshot, else a fresh download of it."""
    patterns = [*_HUB_PATTERNS, *TOKENIZER_FILES, "*.py"]
    try:
        cached = Path(
            huggingface_hub.snapshot_download(
                source, allow_patterns=patterns, local_files_only=True
            )
        )
        # An interrupted download, or one of the tokenizer alone, leaves an incomplete snapshot.
        return _checked(Location(source, "folder", cached)).path
    except huggingface_hub.errors.HFValidationError as error:
        raise ModelError(f"model {source} is neither a folder here nor a hub id") from error
    except (huggingface_hub.errors.LocalEntryNotFoundError, ModelError) as error:
        if not download:
            raise ModelError(
                f"model {source} is no folder here and not complete in the hub's cache"
            ) from error
    with hub_errors(source, what="model", instead="a local folder or a .gguf file"):
        folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
        if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
            names = {name for name in huggingface_hub.list_repo_files(source) if "/" not in name}
            raise ModelError(_no_weights(source, names))
        return folder


@contextmanager
def hub_errors(source: str, *, what: str, instead: str) -> Generator[None]:
    """Say what the hub refuses, or that it is not there, in a line.

    Args:
        source: the hub id.
        what: what it is of.
        instead: what may be given in its place.

    Raises:
        ModelError: it is gated, not on the hub, or the hub cannot be reached.
    """
    try:
        yield
    except huggingface_hub.errors.GatedRepoError as error:
        raise ModelError(
            f"{what} {source} is gated on the hub; accept its terms there, then log in with "
            "`hf auth login`"
        ) from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{what} {source} is neither a folder here nor on the hub; check the spelling, or log "
            "in with `hf auth login` if it is private"
        ) from error
    except (
        huggingface_hub.errors.LocalEntryNotFoundError,
        # Of the library that speaks HTTP, which is another from version to version.
        huggingface_hub.errors.HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        OSError,
    ) as error:
        raise ModelError(
            f"{what} {source} is no folder here, not in the hub's cache, and the hub cannot be "
            f"reached; give {instead}, or go online"
        ) from error
