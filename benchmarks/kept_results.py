"""Results that are written as they come, and taken up again: what a limit of minutes needs."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class KeptResults:
    """Results by key in a JSON file, or in memory alone where there is no path.

    `settings` decide what the results are: a file with other settings is refused, not mixed.
    """

    def __init__(
        self, path: Path | None, *, settings: Mapping[str, Any], about: Mapping[str, Any]
    ) -> None:
        self._path = path
        # As JSON has them, so that tuples equal what was read.
        self._settings = json.loads(json.dumps(settings))
        self._about = dict(about)
        self.results = dict[str, Any]()
        if path is not None and path.exists():
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["settings"] != self._settings:
                raise SystemExit(
                    f"{path} holds results of other settings, {read['settings']}; expected "
                    f"{self._settings}; give another --json, or the settings it was made with"
                )
            self.results = read["results"]

    def __contains__(self, key: str) -> bool:
        return key in self.results

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep one, by replacing the file: a killed run leaves a whole one behind."""
        self.results[key] = dict(result)
        self.write()

    def write(self, **summary: Any) -> None:
        """Write what there is, with what came of it where that is known."""
        if self._path is None:
            return
        content = {"settings": self._settings, **self._about, **summary, "results": self.results}
        beside = self._path.with_suffix(".partial")
        beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        beside.replace(self._path)


class Minutes:
    """Whether there is time for one more, going by the longest of its kind so far."""

    def __init__(
        self, limit: float | None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._limit = limit
        self._clock = clock
        self._begun = clock()
        self._longest = dict[str, float]()

    def allow(self, kind: str) -> bool:
        """False where one more of this kind may end after the limit."""
        spent = self._clock() - self._begun
        return self._limit is None or spent + self._longest.get(kind, 0.0) < 60 * self._limit

    def took(self, kind: str, seconds: float) -> None:
        """Note how long one took."""
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))
