import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.models.fingerprint import fingerprint
from loratune.models.sources import locate
from tiny_models import save_tiny, tiny_model


def _of(folder: Path) -> str:
    return fingerprint(locate(str(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama")


def _flip_a_weight(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def _edit(name: str, change: dict[str, object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return edit


def _write(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text("new")

    return write


def _reorder_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(config.items())), indent=7))


@pytest.mark.parametrize(
    "change",
    [
        _flip_a_weight,
        _edit("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
        _edit("tokenizer_config.json", {"bos_token": "<b>"}),
        _edit("tokenizer.json", {"truncation": None, "version": "2"}),
        _write("chat_template.jinja"),
        _write("added_tokens.json"),
    ],
)
def test_what_changes_the_model_changes_the_fingerprint(
    folder: Path, change: Callable[[Path], None]
) -> None:
    before = _of(folder)
    change(folder)
    assert _of(folder) != before


@pytest.mark.parametrize(
    "change",
    [
        _write("README.md"),
        _write(".gitattributes"),
        _write("generation_config.json"),
        _write("pytorch_model.bin"),
        _write("consolidated.safetensors"),
        _write("own.py"),
        _edit("config.json", {"transformers_version": "9.9", "_name_or_path": "elsewhere"}),
        _reorder_config,
    ],
)
def test_what_does_not_change_the_model_leaves_the_fingerprint(
    folder: Path, change: Callable[[Path], None]
) -> None:
    before = _of(folder)
    change(folder)
    assert _of(folder) == before


def test_the_place_of_the_folder_does_not_count(folder: Path, tmp_path: Path) -> None:
    before = _of(folder)
    assert before.startswith("sha256:")
    assert len(before) == len("sha256:") + 64
    assert _of(Path(shutil.move(folder, tmp_path / "moved"))) == before


def test_code_counts_where_the_config_asks_for_it(folder: Path) -> None:
    _edit("config.json", {"auto_map": {"AutoModelForCausalLM": "own.Own"}})(folder)
    before = _of(folder)
    _write("own.py")(folder)
    assert _of(folder) != before


def test_every_shard_counts_and_shards_that_change_places_are_another_model(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    shards = locate(str(folder)).weight_files()
    assert len(shards) > 2
    seen = {_of(folder)}
    for shard in shards:
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(_of(folder))
        shard.write_bytes(content)
    first, second = shards[0].read_bytes(), shards[1].read_bytes()
    shards[0].write_bytes(second)
    shards[1].write_bytes(first)
    seen.add(_of(folder))
    assert len(seen) == len(shards) + 2


def test_a_gguf_file_is_its_own_hash(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and more")
    expected = hashlib.sha256(b"GGUF and more").hexdigest()
    assert fingerprint(locate(str(path))) == f"sha256:{expected}"
