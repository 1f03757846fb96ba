"""`loratune demo`: a sweep on a shipped model, and its answer carried over to a larger one.

The larger model gets the paper's recipe alone, three LRs at the proxy's batch size, so that the
demo stays within its minutes. `tune` does more (`recommendation.proxy.search_target`): an LR read
off between those tried, and half and twice the batch size. The answer says what was not tried.
"""

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.folder import ResultsFolder, open_results, write_whole
from loratune.new_study import SWEEP_BATCH_SIZES
from loratune.recommendation.proxy import proxy_answer
from loratune.study.loading import LoadedStudy, parse_study
from loratune.tuning import pair_of

if TYPE_CHECKING:
    from loratune.sweep import Sweep

METHOD, TARGET = "lora", "demo:4m"


def demo_study(**changes: str) -> LoadedStudy:
    """The demo's study, with other values of top-level keys where given, as YAML."""
    text = resources.files("loratune").joinpath("demo.yaml").read_text(encoding="utf-8")
    for key, value in changes.items():
        text, count = re.subn(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
        assert count == 1, key
    return parse_study(text, name="demo.yaml", folder=Path.cwd())


def demonstrate(out: Path, *, run: Callable[[LoadedStudy, Path], "Sweep"]) -> "Sweep":
    """Run the sweep in `out`, then the larger model at its batch size in `out`/target.

    Where the sweep has no answer there is nothing to carry over. Returns the sweep.
    """
    searched = demo_study()
    sweep = run(searched, out)
    _, store, record = open_results(out)
    with store:
        answer = proxy_answer(store.results(record.name, with_losses=False), method=METHOD)
    if answer.batch_size is None or answer.learning_rate is None:
        return sweep
    rows = searched.study.data.rows[0] or 0
    fixed = demo_study(
        model=TARGET,
        methods=f"[{METHOD}]",
        batch_size=str([size for size in SWEEP_BATCH_SIZES if size <= rows]),
        learning_rate="paper",
        seeds="3",
    )
    pair = pair_of(searched, fixed, method=METHOD, folder="..")
    expected = pair.carried(answer.learning_rate)
    rates = [float(f"{expected * factor:.2g}") for factor in (1 / 3, 1, 3)]
    target = ResultsFolder(out / "target")
    run(
        demo_study(
            study="demo-target",
            model=TARGET,
            methods=f"[{METHOD}]",
            batch_size=f"[{answer.batch_size}]",
            learning_rate=f"{{values: {rates}, extend: 2}}",
            seeds="1",
        ),
        target.root,
    )
    write_whole(target.proxy_pair, pair.to_json())
    return sweep
