import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from loratune.errors import ModelError
from loratune.models.sources import locate
from tiny_models import save_tiny, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama")


def _pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _an_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def _base_and_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _gguf_inside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")


def _sharded(folder: Path) -> list[Path]:
    (folder / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))


def _missing_shard(folder: Path) -> None:
    _sharded(folder)[1].unlink()


def _shard_elsewhere(folder: Path) -> None:
    _sharded(folder)
    index = folder / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    written["weight_map"]["lm_head.weight"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(written))


def _broken_index(folder: Path) -> None:
    _sharded(folder)
    (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_pickles_only, r"pickle weights only \(pytorch_model.bin\).*refused.*save_pretrained"),
        (_no_weights, r"has no weights: neither model\.safetensors nor"),
        (_no_config, r"has weights but no config\.json"),
        (_no_tokenizer, r"has no tokenizer \(none of tokenizer\.json"),
        (_an_adapter, r"is an adapter, not a base model"),
        (_base_and_adapter, r"also holds an adapter \(adapter_config\.json\)"),
        (_gguf_inside, r"give the \.gguf file itself.*model-Q4_K_M\.gguf"),
        (_missing_shard, r"names model-00002-of-\d+\.safetensors, which is missing"),
        (_shard_elsewhere, r"names '\.\./\.\./elsewhere\.safetensors'; expected"),
        (_broken_index, r"cannot read model\.safetensors\.index\.json as JSON"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message) as raised:
        locate(str(folder))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pickles_beside_safetensors_do_no_harm(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert locate(str(folder)).weight_files() == (folder / "model.safetensors",)


def test_shards_come_in_the_order_of_their_names(folder: Path) -> None:
    shards = _sharded(folder)
    assert len(shards) > 2
    assert locate(str(folder)).weight_files() == tuple(shards)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "does not exist; expected a folder"),
        ("a/b/c", "does not exist; expected a folder"),
        ("", "does not exist; expected a folder"),
        ("nowhere.gguf", "there is no such GGUF file"),
        ("demo:5m", "is no demo model"),
        ("a--b/c", "is neither a folder here nor a hub id"),
    ],
)
def test_a_source_that_is_nowhere_is_refused(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        locate(source)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"x" * 8)
    with pytest.raises(ModelError, match="is a file; expected a folder"):
        locate(str(weights))
    renamed = weights.rename(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="does not start with GGUF"):
        locate(str(renamed))


def test_a_part_of_a_split_gguf_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="one part of a split GGUF"):
        locate(str(part))


class _Hub:
    """Stands in for the hub: what is cached, and what a download leaves behind."""

    def __init__(self, cached: Path | None, online: Path | None, names: list[str]) -> None:
        self.cached, self.online, self.names = cached, online, names
        self.downloads = 0

    def snapshot_download(
        self, repo_id: str, *, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        if local_files_only:
            found = self.cached
        else:
            self.downloads += 1
            found = self.online
        if found is None:
            raise LocalEntryNotFoundError(f"{repo_id} is not here")
        return str(found)

    def list_repo_files(self, repo_id: str) -> list[str]:
        return self.names


def _use(monkeypatch: pytest.MonkeyPatch, hub: _Hub) -> _Hub:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", hub.list_repo_files)
    return hub


def test_a_cached_hub_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    hub = _use(monkeypatch, _Hub(cached=folder, online=None, names=[]))
    assert locate("someone/model").path == folder
    assert hub.downloads == 0


def test_an_incomplete_cache_is_completed(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    shutil.copy(folder / "config.json", partial)
    hub = _use(monkeypatch, _Hub(cached=partial, online=folder, names=[]))
    assert locate("someone/model").path == folder
    assert hub.downloads == 1
    with pytest.raises(ModelError, match="not complete in the hub's cache"):
        locate("someone/model", download=False)
    assert hub.downloads == 1


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, _Hub(cached=None, online=None, names=[]))
    with pytest.raises(ModelError, match="the hub cannot be reached; give a local folder"):
        locate("someone/model")


def test_a_hub_model_with_pickles_only_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # allow_patterns kept the pickle out of the snapshot, so only the listing tells.
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    names = ["config.json", "pytorch_model.bin", "original/model.safetensors"]
    _use(monkeypatch, _Hub(cached=None, online=snapshot, names=names))
    with pytest.raises(ModelError, match=r"pickle weights only \(pytorch_model.bin\)"):
        locate("someone/model")
