"""Where an adapter's files are: a folder in PEFT's format, or a hub repository that holds one.

As for base models (models/sources.py): the hub's cache first, weights as safetensors only. Nothing
of the adapter is parsed here.
"""

# snapshot_download's overloads name a bare dict and a bare tqdm among parameters not used here.
# pyright: reportUnknownMemberType=false

from pathlib import Path

import huggingface_hub
import huggingface_hub.errors

from loratune.errors import ModelError
from loratune.methods.adapter_files import CONFIG_NAME, PICKLE_NAMES, WEIGHTS_NAME
from loratune.models.sources import hub_errors, is_hub_id


def locate_adapter(source: str) -> Path | None:
    """The folder with an adapter's files; None: the source is no adapter, and may be a model.

    A hub id is looked up in the cache, then on the hub, where both files are downloaded. A base
    model that is in the cache needs no network to be told from an adapter.

    Args:
        source: a folder or a hub id; anything else is no adapter.

    Raises:
        ModelError: a hub repository that is missing, gated or out of reach, or an adapter on the
            hub whose weights are missing or pickles only.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder if (folder / CONFIG_NAME).is_file() else None
    if not is_hub_id(source):
        return None
    patterns = [CONFIG_NAME, WEIGHTS_NAME]
    try:
        cached = Path(
            huggingface_hub.snapshot_download(
                source, allow_patterns=patterns, local_files_only=True
            )
        )
        if all((cached / name).is_file() for name in patterns):
            return cached
        if (cached / "config.json").is_file() and not (cached / CONFIG_NAME).is_file():
            return None
    except huggingface_hub.errors.HFValidationError:
        return None
    except huggingface_hub.errors.LocalEntryNotFoundError:
        pass
    with hub_errors(source, what="adapter or model", instead="a local folder"):
        names = set(huggingface_hub.list_repo_files(source))
        if CONFIG_NAME not in names:
            return None
        if WEIGHTS_NAME not in names:
            pickles = [name for name in PICKLE_NAMES if name in names]
            raise ModelError(
                f"adapter {source} has its weights as a pickle only ({pickles[0]}), which can run "
                "code and is refused; load it with peft where that may happen and save it with "
                "save_pretrained, which writes safetensors"
                if pickles
                else f"adapter {source} has no {WEIGHTS_NAME} on the hub; give a whole adapter"
            )
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
