"""Adapters on the hub: a stand-in says what is cached and online, and what a download leaves."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from loratune.errors import ModelError
from loratune.methods.adapter_sources import locate_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class _Hub:
    """`cached` and `online` are folders, `listed` what the listing gives or raises."""

    def __init__(
        self,
        *,
        cached: Path | None = None,
        online: Path | None = None,
        listed: list[str] | Exception,
    ) -> None:
        self.cached, self.online, self.listed = cached, online, listed
        self.calls = list[str]()

    def snapshot_download(
        self, repo_id: str, *, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        assert allow_patterns == [CONFIG, WEIGHTS]  # Never a pickle.
        found = self.cached if local_files_only else self.online
        if not local_files_only:
            self.calls.append("download")
        if found is None:
            raise LocalEntryNotFoundError(f"{repo_id} is not here")
        return str(found)

    def list_repo_files(self, repo_id: str) -> list[str]:
        self.calls.append("list")
        if isinstance(self.listed, Exception):
            raise self.listed
        return self.listed


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[_Hub], _Hub]:
    def use_hub(hub: _Hub) -> _Hub:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", hub.list_repo_files)
        return hub

    return use_hub


def snapshot(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_a_cached_adapter_needs_no_network(tmp_path, use):
    cached = snapshot(tmp_path / "cached", CONFIG, WEIGHTS)
    hub = use(_Hub(cached=cached, listed=OfflineModeIsEnabled("offline")))
    assert locate_adapter("someone/adapter") == cached
    assert hub.calls == []


def test_a_cached_base_model_is_no_adapter_and_needs_no_network(tmp_path, use):
    hub = use(
        _Hub(
            cached=snapshot(tmp_path / "cached", "config.json"),
            listed=OfflineModeIsEnabled("offline"),
        )
    )
    assert locate_adapter("someone/model") is None
    assert hub.calls == []


@pytest.mark.parametrize("cached", [None, (CONFIG,), ()])
def test_what_is_not_wholly_in_the_cache_is_fetched(tmp_path, use, cached):
    online = snapshot(tmp_path / "online", CONFIG, WEIGHTS)
    partial = None if cached is None else snapshot(tmp_path / "partial", *cached)
    hub = use(_Hub(cached=partial, online=online, listed=["README.md", CONFIG, WEIGHTS]))
    assert locate_adapter("someone/adapter") == online
    assert hub.calls == ["list", "download"]


def test_a_model_on_the_hub_is_no_adapter_and_nothing_of_it_is_fetched(use):
    hub = use(_Hub(listed=["config.json", "model.safetensors", f"adapter/{CONFIG}"]))
    assert locate_adapter("someone/model") is None
    assert hub.calls == ["list"]


NO_NETWORK = errors.HTTPError("no such name")  # pyright: ignore[reportPrivateImportUsage]


def refused(kind: type[RepositoryNotFoundError]) -> Exception:
    return kind("no", response=MagicMock(headers={}))


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([CONFIG, "adapter_model.bin"], r"a pickle only \(adapter_model.bin\).*refused"),
        ([CONFIG], "has no adapter_model.safetensors on the hub"),
        (refused(GatedRepoError), "is gated on the hub; accept its terms"),
        (refused(RepositoryNotFoundError), "neither a folder here nor on the hub; check the spell"),
        (OfflineModeIsEnabled("offline"), "not in the hub's cache, and the hub cannot be reached"),
        # As it comes where there is no network.
        (NO_NETWORK, "the hub cannot be reached"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_a_line(use, listed, message):
    hub = use(_Hub(listed=listed))
    with pytest.raises(ModelError, match=message) as caught:
        locate_adapter("someone/adapter")
    assert "\n" not in str(caught.value)
    assert "download" not in hub.calls


def test_what_is_on_this_machine_is_never_looked_up(tmp_path, monkeypatch, use):
    hub = use(_Hub(listed=[CONFIG, WEIGHTS]))
    adapter = snapshot(tmp_path / "adapter", CONFIG)
    assert locate_adapter(str(adapter)) == adapter
    snapshot(tmp_path / "model", "config.json")
    monkeypatch.chdir(tmp_path)
    for source in ("model", "demo:1m", "file.gguf", "./nowhere", "a/b/c", "/nowhere", ""):
        assert locate_adapter(source) is None
    assert hub.calls == []
