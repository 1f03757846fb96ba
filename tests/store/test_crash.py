"""Killed at any instant (SIGKILL), a finished trial is neither lost nor doubled."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

NURSERY = Path(__file__).with_name("nursery.py")


def nursery(*arguments: str | Path) -> Any:
    ran = subprocess.run(
        [sys.executable, NURSERY, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(NURSERY.parent.parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_killed_between_any_two_writes_a_finished_trial_is_never_lost_or_doubled(
    tmp_path: Path,
) -> None:
    moments = nursery("working", tmp_path)
    print(f"{len(moments)} moments")
    assert len(moments) > 30
    for moment in moments:
        # What a method had promised by returning is there after the kill ...
        promised = [line for line in moment["told"] if line.startswith(("failed", "done"))]
        assert moment["after_kill"]["outcomes"][: len(promised)] == promised
        assert moment["after_kill"]["integrity"] == "ok"
        # ... no score is there without its predictions ...
        assert all(num == 4 for _, num in moment["after_kill"]["scores"])
        # ... and the next process comes to the same end, whatever happened to the first.
        assert moment["resumed"]
        assert moment["at_end"] == {
            "outcomes": ["failed trial-0", "done trial-0", "done trial-1"],
            "scores": [["trial-0", 4], ["trial-1", 4]],
            "studies": 1,
            "open": 0,
            "integrity": "ok",
        }
    # The kills did strike in between: every number of outcomes was met, and open claims too.
    assert {len(moment["after_kill"]["outcomes"]) for moment in moments} == {0, 1, 2, 3}
    assert {moment["after_kill"].get("open") for moment in moments} == {0, 1}


def test_killed_while_the_database_is_made_it_is_made_by_the_next(tmp_path: Path) -> None:
    moments = nursery("making", tmp_path)
    assert len(moments) > 15  # every table, every index, the commits
    for moment in moments:
        assert moment["after_kill"]["integrity"] == "ok"
        assert moment["resumed"]
        assert moment["at_end"]["studies"] == 1


def check_random_kills(found: Any) -> None:
    at_end = found["at_end"]
    done = Counter(line for line in at_end["outcomes"] if line.startswith("done"))
    assert done == {f"done trial-{number}": 1 for number in range(60)}
    assert Counter(at_end["outcomes"])["failed trial-0"] == 1
    # A child may be killed after a commit and before it tells: told is a part of what is there.
    assert not Counter(
        line for line in found["told"] if line.startswith(("done", "failed"))
    ) - Counter(at_end["outcomes"])
    assert at_end["scores"] == sorted([f"trial-{number}", 4] for number in range(60))
    assert (at_end["open"], at_end["integrity"]) == (0, "ok")


def test_killed_at_20_random_moments_the_study_ends_complete(tmp_path: Path) -> None:
    found = nursery("random", tmp_path, "1", "20")
    assert found["num_killed"] > 0
    check_random_kills(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_50_random_moments_for_ten_seeds(tmp_path: Path, seed: int) -> None:
    check_random_kills(nursery("random", tmp_path, str(seed), "50"))


def test_processes_that_claim_the_same_trials_get_each_once(tmp_path: Path) -> None:
    found = nursery("race", tmp_path)
    every = [number for claimed in found["claimed"] for number in claimed]
    assert sorted(every) == list(range(40))
    assert [len(claimed) for claimed in found["claimed"]] == [10, 10, 10, 10]
    assert found["at_end"]["open"] == 40
