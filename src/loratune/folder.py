"""A results folder: where its files lie, whose it is, and that one process works in it at a time.

DIR/study.yaml the study as it was last run, DIR/loratune.db the store (or DIR/store.txt, the
address of one that several folders share), DIR/adapters/<trial>/ in PEFT's format,
DIR/snapshots/<trial>.safetensors of unfinished trials, DIR/report.html, DIR/figures/. Where a proxy
was searched first: DIR/proxy/ and DIR/beside/, results folders of their own, and DIR/proxy.json.
"""

import shutil
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from loratune.errors import StoreError
from loratune.records import StudyRecord
from loratune.store.database import Store, open_store
from loratune.study.loading import LoadedStudy, load_study


@dataclass(frozen=True)
class ResultsFolder:
    """The paths of one results folder; nothing here is created by naming it."""

    root: Path

    @property
    def study(self) -> Path:
        """The study file as it was last run."""
        return self.root / "study.yaml"

    @property
    def database(self) -> Path:
        """The folder's own store."""
        return self.root / "loratune.db"

    @property
    def proxy(self) -> Path:
        """Where `tune` searches a proxy in this model's place: a results folder of its own."""
        return self.root / "proxy"

    @property
    def beside(self) -> Path:
        """Where `tune` trains the model beside the proxy's batch size: a results folder as well."""
        return self.root / "beside"

    @property
    def proxy_pair(self) -> Path:
        """What is known of proxy and target beside their results (`recommendation.proxy`)."""
        return self.root / "proxy.json"

    @property
    def store_address(self) -> Path:
        """Holds the address of a store outside the folder, where one is used."""
        return self.root / "store.txt"

    def address(self) -> str:
        """The address of the store that the folder uses."""
        if self.store_address.is_file():
            return self.store_address.read_text(encoding="utf-8").strip()
        return str(self.database)

    def adapter(self, trial_id: str) -> Path:
        """The adapter of one trial, a folder in PEFT's format."""
        return self.root / "adapters" / trial_id

    def snapshot(self, trial_id: str) -> Path:
        """The latest snapshot of an unfinished trial."""
        return self.root / "snapshots" / f"{trial_id}.safetensors"

    def snapshots(self) -> tuple[Path, ...]:
        """The snapshots that are there; their stems are trial ids."""
        return tuple((self.root / "snapshots").glob("*.safetensors"))


def open_results(path: str | Path) -> tuple[ResultsFolder, Store, StudyRecord]:
    """An existing results folder for reading: its paths, its store, its study.

    Raises:
        StoreError: no such folder, or none that `loratune run` has written.
    """
    folder = ResultsFolder(Path(path))
    if not folder.study.is_file():
        if ResultsFolder(folder.proxy).study.is_file():
            raise StoreError(
                f"{path} has no trials of the target yet: `loratune tune` has searched its proxy "
                f"alone, in {folder.proxy}; look at that, or run tune again to go on"
            )
        what = "does not exist"
        if folder.root.exists():
            what = "is no results folder" if folder.root.is_dir() else "is a file"
        raise StoreError(
            f"{path} {what}; expected a folder that `loratune run STUDY.yaml --out DIR` has written"
        )
    name = load_study(folder.study).study.study
    store = open_store(folder.address(), create=False)
    for record in store.studies():
        if record.name == name:
            return folder, store, record
    store.close()
    raise StoreError(f"{path}: study {name!r} is not in its store; run it again to go on")


@contextmanager
def working_folder(
    path: str | Path, loaded: LoadedStudy, *, store: str | None, trial_ids: frozenset[str]
) -> Generator[tuple[ResultsFolder, Store]]:
    """The folder for running `loaded`, made if need be, locked against a second process.

    Everything that can be refused is refused before anything is written. `trial_ids` are those of
    the study as it is now: a study that has grown or shrunk goes on in its folder, one that shares
    no trial with what is there only has the same name.

    Raises:
        StoreError: the folder is another study's, holds something else, is not writable, is in use
            by another process, or belongs to another store than the one given.
    """
    folder = ResultsFolder(Path(path))
    _refuse_another_study(folder, loaded)
    if store is not None and "://" not in store:
        store = str(Path(store).expanduser().resolve())  # it is written down, and read elsewhere
    address = store if store is not None else folder.address()
    if folder.store_address.is_file() and address != folder.address():
        raise StoreError(
            f"{path} keeps its results in {folder.address()}, not in {address}; "
            "leave --store out, or choose another --out"
        )
    if store is not None and folder.database.is_file():
        raise StoreError(
            f"{path} keeps its results in its own {folder.database.name}; "
            "leave --store out, or choose another --out"
        )
    existed = folder.root.exists()
    with ExitStack() as stack:
        try:
            folder.root.mkdir(parents=True, exist_ok=True)
            if not existed:
                stack.callback(_remove_if_empty, folder)
            stack.enter_context(_held(FileLock(folder.root / ".lock", timeout=0), folder))
            opened = stack.enter_context(open_store(address, create=True))
            _refuse_a_namesake(folder, opened, loaded, trial_ids)
            if store is not None:
                write_whole(folder.store_address, address + "\n")
            write_whole(folder.study, loaded.text)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written: {error.strerror or error}; choose another --out"
            ) from error
        yield folder, opened


def _partial(path: Path) -> Path:
    """Where a file is written before it takes its place; what a kill leaves of it."""
    return path.with_name(path.name + ".partial")


def write_whole(path: Path, text: str) -> None:
    """The file with this text, or as it was: never half of it."""
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def replace_folder(partial: Path, final: Path) -> None:
    """`partial` takes the place of `final`, which may exist from an attempt that was killed."""
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


@contextmanager
def _held(lock: FileLock, folder: ResultsFolder) -> Generator[None]:
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreError(
            f"{folder.root} is in use by another loratune process; wait for it, or choose another "
            "--out"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _refuse_a_namesake(
    folder: ResultsFolder, store: Store, loaded: LoadedStudy, trial_ids: frozenset[str]
) -> None:
    name = loaded.study.study
    if not folder.study.is_file() or name not in {record.name for record in store.studies()}:
        return
    known = {trial.trial_id for trial in store.trials(name)}
    if known and not known & trial_ids:
        raise StoreError(
            f"{folder.root} holds another study of the name {name!r}: the two share no trial; "
            "rename the study, or choose another --out"
        )


def _remove_if_empty(folder: ResultsFolder) -> None:
    """Leave nothing of a folder that was made for a request which was then refused."""
    if not folder.study.exists() and {entry.name for entry in folder.root.iterdir()} <= {".lock"}:
        (folder.root / ".lock").unlink(missing_ok=True)
        folder.root.rmdir()


def _refuse_another_study(folder: ResultsFolder, loaded: LoadedStudy) -> None:
    name = loaded.study.study
    if folder.root.exists() and not folder.root.is_dir():
        raise StoreError(f"{folder.root} is a file; give a folder for --out")
    if folder.study.is_file():
        there = load_study(folder.study).study.study
        if there != name:
            raise StoreError(
                f"{folder.root} holds study {there!r}, not {name!r}; choose another --out"
            )
        return
    ours = {
        ".lock",
        folder.database.name,
        # SQLite's, of a commit that a kill cut off; the next opening rolls it back.
        f"{folder.database.name}-journal",
        folder.store_address.name,
        folder.proxy.name,
        folder.beside.name,
        folder.proxy_pair.name,
        *(_partial(path).name for path in (folder.study, folder.store_address, folder.proxy_pair)),
    }
    if folder.root.is_dir():
        others = sorted(entry.name for entry in folder.root.iterdir() if entry.name not in ours)
        if others:
            raise StoreError(
                f"{folder.root} is not empty ({others[0]}) and holds no study; choose another --out"
            )
