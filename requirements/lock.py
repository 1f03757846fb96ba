"""Writes lock.txt and dev-lock.txt: the exact versions of all that loratune needs, from this venv.

`make lock` runs it. It looks at what is installed, not at an index, so that a version is locked
only after it has run here. Local version suffixes (+cpu, +cu130) and CUDA's own packages are left
out: they belong to one machine, and which build of torch a machine gets is its own choice.
"""

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
MACHINE_SPECIFIC = ("nvidia-", "cuda-", "triton")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Name to version of everything that the requirements need, extras followed."""
    pins = dict[str, str]()
    seen = set[tuple[str, frozenset[str]]]()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        needed = waiting.pop()
        name = canonical(needed.name)
        key = (name, frozenset(needed.extras))
        if key in seen or name.startswith(MACHINE_SPECIFIC):
            continue
        seen.add(key)
        installed = distribution(name)
        pins[name] = installed.version.partition("+")[0]
        for text in installed.requires or ():
            below = Requirement(text)
            extras = needed.extras or {""}
            if below.marker is None or any(below.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(below)
    return pins


def write(path: Path, pins: dict[str, str], *, head: str) -> None:
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    path.write_text(head + "".join(lines), encoding="ascii")
    print(f"{path.name}: {len(lines)} packages")


def main() -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    runtime = closure([*project["project"]["dependencies"], *project["build-system"]["requires"]])
    dev = closure(project["dependency-groups"]["dev"])
    again = "# To write it anew: install newer versions into .venv, then `make lock`.\n"
    write(
        HERE / "lock.txt",
        runtime,
        head=f"# The exact versions that loratune runs with; pip install -r reads it.\n{again}",
    )
    write(
        HERE / "dev-lock.txt",
        {name: version for name, version in dev.items() if name not in runtime},
        head=f"# The tools that check and test it, on top of lock.txt.\n{again}-r lock.txt\n",
    )


if __name__ == "__main__":
    main()
