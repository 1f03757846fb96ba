"""Children that write to a store and are killed; run by test_crash.py as a program of its own.

A process without torch and without threads, so that it can fork hundreds of children quickly.
Prints one JSON document. Every child tells, through a pipe, what it was promised: a line after each
method that returned. SQLite's waits for the disk are switched off: the operating system outlives a
killed process, so they decide nothing here but the time.
"""

import gc
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  # imported before the forks, not in each child
from sqlalchemy import Connection, Engine, event

from loratune.records import FINAL_STATUSES
from loratune.store.database import open_store
from store.samples import PREDICTIONS, PROVENANCE, SUMMARY, outcome, score, trial

Tell = Callable[[str], None]


def work(file: Path, tell: Tell, *, numbers: Sequence[int]) -> None:
    """A small sweep: what is missing is claimed, finished, scored; then nothing is missing."""
    with open_store(file, create=True) as store:
        store.add_study(
            "study", text="text", select_on="test", trials=[trial(number) for number in numbers]
        )
        store.add_data_summary("data-a", SUMMARY)
        tell("study")
        for number in numbers:
            name = f"trial-{number}"
            found = store.outcome(name)
            while found is None or found.status not in FINAL_STATUSES:
                attempt = store.claim(name, provenance=PROVENANCE)
                if attempt is None:
                    break  # another worker has it
                store.heartbeat([attempt])
                # The first trial fails once before it succeeds.
                fails = number == 0 and found is None
                found = outcome(number, status="failed" if fails else "done")
                store.finish(attempt, found)
                tell(f"{found.status} {name}")
            if found is None:
                continue
            if not any(one.trial_id == name for one in store.all_scores("study")):
                store.add_score(name, score(), PREDICTIONS)
                store.add_artifact(name, kind="adapter", path=f"adapters/{name}")
                tell(f"scored {name}")


def dies_after(num_events: int) -> None:
    """Kill this process before its so-manieth write: a statement that changes rows, or a commit.

    What lies between two of them (reading, computing) leaves nothing in the file.
    """
    left = num_events

    def step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def statement(_connection: Any, _cursor: Any, text: str, *_: Any) -> None:
        if not text.startswith(("SELECT", "PRAGMA", "BEGIN", "SAVEPOINT", "RELEASE")):
            step()

    def commit(connection: Connection) -> None:
        if connection.get_execution_options().get("loratune_writes"):
            step()

    event.listen(Engine, "before_cursor_execute", statement)
    event.listen(Engine, "commit", commit)


def no_disk_waits(connection: Connection) -> None:
    # At each checkout, since the store itself sets it when it connects.
    connection.connection.cursor().execute("PRAGMA synchronous = OFF")


def child(do: Callable[[Tell], None], *, kill_after: float | None = None) -> tuple[bool, list[str]]:
    """Fork, do, die: whether the child came to its end, and what it told."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            do(lambda line: _write(writer, line))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reader) as told:
        lines = told.read().splitlines()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"child ended with {code}"
    return code == 0, lines


def _write(writer: int, line: str) -> None:
    os.write(writer, f"{line}\n".encode())


def look(file: Path) -> dict[str, Any]:
    """What stands in the database, by SQL of its own."""
    connection = sqlite3.connect(file)
    try:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        if "outcomes" not in tables:
            return {"outcomes": [], "scores": [], "integrity": "ok"}
        return {
            "outcomes": [
                f"{status} {trial_id}"
                for trial_id, status in connection.execute(
                    "SELECT trial_id, status FROM outcomes ORDER BY attempt_id"
                )
            ],
            "scores": [
                list(row)
                for row in connection.execute(
                    "SELECT trial_id, (SELECT count(*) FROM predictions AS p "
                    "WHERE p.score_id = s.score_id) FROM scores AS s ORDER BY trial_id"
                )
            ],
            "studies": connection.execute("SELECT count(*) FROM studies").fetchone()[0],
            "open": connection.execute(
                "SELECT count(*) FROM attempts WHERE ended_at IS NULL"
            ).fetchone()[0],
            "integrity": connection.execute("PRAGMA integrity_check").fetchone()[0],
        }
    finally:
        connection.close()


def every_step(folder: Path, *, prepared: bool) -> Iterator[dict[str, Any]]:
    """Kill at step 0, 1, 2, ... until the child reaches its end; after each, look and go on.

    `prepared` begins with a finished schema; otherwise the first steps make it.
    """
    numbers = range(2) if prepared else range(0)
    start = folder / "start.db"
    if prepared:
        with open_store(start, create=True):
            pass
    num_events, ended = 0, False
    while not ended:
        file = folder / f"{num_events}.db"
        if prepared:
            shutil.copy(start, file)

        def first(tell: Tell, file: Path = file, num_events: int = num_events) -> None:
            dies_after(num_events)
            work(file, tell, numbers=numbers)

        ended, told = child(first)
        after_kill = look(file)
        resumed, _ = child(lambda tell, file=file: work(file, tell, numbers=numbers))
        yield {
            "told": told,
            "after_kill": after_kill,
            "resumed": resumed,
            "at_end": look(file),
        }
        file.unlink()
        num_events += 1


def random_moments(folder: Path, *, seed: int, num_kills: int) -> dict[str, Any]:
    """Kill at random moments, most of them inside a statement or a commit; then finish."""
    moments = random.Random(seed)
    file = folder / "random.db"
    numbers = range(60)
    told: list[str] = []
    num_killed = 0
    for _ in range(num_kills):
        ended, lines = child(
            lambda tell: work(file, tell, numbers=numbers), kill_after=moments.uniform(0.02, 0.2)
        )
        told += lines
        num_killed += not ended
    _, lines = child(lambda tell: work(file, tell, numbers=numbers))
    return {"told": told + lines, "num_killed": num_killed, "at_end": look(file)}


def race(folder: Path, *, num_workers: int, num_trials: int) -> dict[str, Any]:
    """Several processes claim the same trials at once; each wants its equal share."""
    file = folder / "race.db"
    with open_store(file, create=True) as store:
        store.add_study(
            "study", text="", select_on="test", trials=[trial(n) for n in range(num_trials)]
        )
    gate, opener = os.pipe()
    readers: list[int] = []
    pids: list[int] = []
    for _ in range(num_workers):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(opener)
            os.read(gate, 1)  # returns when the parent closes the other end
            with open_store(file, create=False) as store:
                # All go the same way and stop at their share, so that none takes everything.
                share = num_trials // num_workers
                for number in range(num_trials):
                    if share and store.claim(f"trial-{number}", provenance=PROVENANCE) is not None:
                        share -= 1
                        _write(writer, str(number))
            # Gone only by the parent's kill: a worker that ends sets its claims free.
            os.close(writer)
            signal.pause()
        os.close(writer)
        readers.append(reader)
        pids.append(pid)
    os.close(gate)
    os.close(opener)
    claimed = []
    for reader in readers:
        with os.fdopen(reader) as told:
            claimed.append([int(line) for line in told.read().split()])
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"claimed": claimed, "at_end": look(file)}


def main() -> None:
    event.listen(Engine, "engine_connect", no_disk_waits)
    gc.freeze()  # the children share the pages of what is loaded
    folder = Path(sys.argv[2])
    match sys.argv[1]:
        case "making":
            found: Any = list(every_step(folder, prepared=False))
        case "working":
            found = list(every_step(folder, prepared=True))
        case "random":
            found = random_moments(folder, seed=int(sys.argv[3]), num_kills=int(sys.argv[4]))
        case "race":
            found = race(folder, num_workers=4, num_trials=40)
        case other:
            raise SystemExit(f"no test called {other}")
    assert "torch" not in sys.modules
    print(json.dumps(found))


if __name__ == "__main__":
    main()
