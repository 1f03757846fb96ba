"""The Python API: what the command line calls, each a plain function over files and records.

Functions that train import torch when they are called; the others never do.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.analyse.cells import cells_table, make_cells
from loratune.analyse.compare import Comparison
from loratune.analyse.compare import compare as compare_results
from loratune.analyse.tables import results_table
from loratune.errors import StudyError
from loratune.folder import open_results
from loratune.planning.build import Plan, make_plan
from loratune.planning.cost import H100, Rate, Timing, measured_rate, stated_rate, trial_cost
from loratune.progress import ProgressLine
from loratune.recommendation.grid import Recommendation, recommendations
from loratune.report.page import ReportPaths, write_report
from loratune.study.loading import LoadedStudy, load_study, parse_study
from loratune.study.methods import describe

if TYPE_CHECKING:
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs]  # it ships no complete types

    from loratune.sweep import Sweep
    from loratune.workshop import EngineChoice, Survey

__all__ = [
    "cells",
    "compare",
    "demo_study",
    "load_study",
    "new_study",
    "plan",
    "recommend",
    "report",
    "results",
    "run",
    "tune",
]

# What `tune` and `compare` sweep: wide enough for an interior optimum on most data, one seed to
# find the best LRs and two more around them, so that an interval exists. Batch sizes stop where an
# epoch would have fewer than 8 updates.
GRID_BATCH_SIZES = (2, 8, 32, 128)
GRID_LEARNING_RATES = "{values: [1e-4, 2e-4, 5e-4, 1e-3, 2e-3], extend: 4}"
FEWEST_UPDATES_IN_GRID = 8
HELD_OUT_SHARE, MOST_HELD_OUT = 10, 512


def plan_with_remarks(
    loaded: LoadedStudy, *, tflops: float | None = None, like: str | Path | None = None
) -> tuple[Plan, tuple[str, ...]]:
    """The plan of a study, and what had to be taken from its declarations, in plain words.

    Args:
        loaded: the study.
        tflops: a rate of your own in TFLOP/s; left out: a stated H100 rate.
        like: a results folder whose finished trials give the rate of the device they ran on.

    Raises:
        LoratuneError: the study can't be planned.
    """
    from loratune.workshop import survey

    found = survey(loaded, download=False)
    rate = H100
    if tflops is not None:
        if not 0 < tflops < float("inf"):
            raise StudyError(f"tflops={tflops:g}; give a positive number")
        rate = stated_rate(tflops)
    elif like is not None:
        rate = _measured_rate(like, found)
    made = make_plan(loaded.study, models=found.models, data=found.data, rate=rate)
    return made, found.remarks


def plan(
    loaded: LoadedStudy, *, tflops: float | None = None, like: str | Path | None = None
) -> Plan:
    """What a study would train and cost; trains, downloads and writes nothing.

    See `plan_with_remarks`, which also says what was declared rather than read.
    """
    return plan_with_remarks(loaded, tflops=tflops, like=like)[0]


def _measured_rate(folder: str | Path, found: "Survey") -> Rate:
    """The rate of the trials in a results folder whose models and rows this study has, too."""
    _, store, record = open_results(folder)
    with store:
        measured = [result for result in store.results(record.name) if result.status == "done"]
    by_data = {facts.fingerprint: facts for facts in found.data.values()}
    timings = list[Timing]()
    for result in measured:
        trial, outcome = result.trial, result.outcome
        model, data = found.models.get(trial.model), by_data.get(trial.data_fingerprint)
        if model is None or data is None or outcome is None:
            continue
        assert outcome.rows_per_microbatch is not None
        cost = trial_cost(
            trial,
            model=model,
            data=data,
            rate=replace(H100, memory_bytes=None),
            tokens_per_microbatch=outcome.rows_per_microbatch * data.max_row_tokens,
        )
        count = trial.num_updates * cost.num_microbatches
        timings.append(Timing(model.num_layers, cost.flops / count, outcome.seconds / count))
    return measured_rate(timings, device=f"the device of {folder}")


def run(
    loaded: LoadedStudy,
    *,
    out: str | Path,
    store: str | None = None,
    device: str | None = None,
    devices: str | Sequence[str] | None = None,
    engine: "EngineChoice" = "auto",
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    unsafe_exec: bool = False,
    quiet: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> "Sweep":
    """Train a study's trials, or go on where it stopped; then write the report.

    Args:
        loaded: the study, from `load_study`.
        out: the results folder.
        store: address of a database outside the folder, shared with other studies.
        device: cpu, cuda or cuda:N; left out: a GPU if there is one.
        devices: in the place of `device` several of this machine, each trained on by a process of
            its own: "all" GPUs, or names. A script that asks for this needs
            `if __name__ == "__main__":`, as everything that starts processes does.
        engine: packed (many trials at once), reference (one after another), or auto: packed for
            every method that can be packed.
        gradient_checkpointing: compute activations twice instead of keeping them.
        trust_remote_code: let a model's own Python code run.
        unsafe_exec: run generated code even where it cannot be isolated; see docs/sandbox.md.
        quiet: no progress on stderr.
        should_stop: asked after every update; True ends the sweep with a snapshot.

    Raises:
        LoratuneError: the request is wrong; nothing was written.
        training.Interrupted: `should_stop` said so; the same call goes on.
    """
    from loratune.crew import CrewMember
    from loratune.sweep import run_sweep
    from loratune.workshop import LocalWorkshop, choose_device, choose_devices

    if device is not None and devices is not None:
        raise StudyError(f"device={device!r} and devices={devices!r}; give one of them")
    chosen = (choose_device(device),) if devices is None else choose_devices(devices)
    # Processes on one CPU share its cores; each with a thread a core would be in the others' way.
    on_cpu = sum(one.type == "cpu" for one in chosen)
    num_threads = max(1, (os.cpu_count() or 1) // on_cpu) if on_cpu > 1 else None
    makers = [
        partial(
            LocalWorkshop,
            loaded,
            one,
            engine_choice=engine,
            gradient_checkpointing=gradient_checkpointing,
            trust_remote_code=trust_remote_code,
            num_threads=num_threads,
            unsafe_exec=unsafe_exec,
        )
        for one in chosen
    ]
    members = [CrewMember(str(one), make) for one, make in zip(chosen, makers, strict=True)]
    with ProgressLine(quiet=quiet) as line:
        sweep = run_sweep(
            loaded,
            out=out,
            workshop=makers[0](),
            watcher=line,
            store=store,
            should_stop=should_stop,
            crew=members if len(members) > 1 else (),
        )
    report(out)
    return sweep


def results(folder: str | Path, *, all_scores: bool = False) -> "pd.DataFrame":
    """One row a trial, the columns that others rely on.

    Raises:
        StoreError: not a results folder.
    """
    _, store, record = open_results(folder)
    with store:
        found = store.results(record.name, with_losses=False)
        return results_table(found, all_scores=store.all_scores(record.name) if all_scores else ())


def cells(folder: str | Path) -> "pd.DataFrame":
    """One row a cell: its best LR and its score there."""
    _, store, record = open_results(folder)
    with store:
        return cells_table(make_cells(store.results(record.name, with_losses=False)))


def recommend(
    folder: str | Path, *, method: str | None = None, margin: float = 0.005
) -> tuple[Recommendation, ...]:
    """One recommendation for every setting of one method (model, rank, N, ...), in order.

    Args:
        folder: a results folder.
        method: left out, lora where the study has it, else its first method.
        margin: how much worse than the best loss counts as good, as a fraction.
    """
    _, store, record = open_results(folder)
    with store:
        found = store.results(record.name, with_losses=False)
    return recommendations(found, method=method, margin=margin)


def compare(folder: str | Path) -> tuple[Comparison, ...]:
    """Every method against lora, each at its own best batch size and LR, in every setting."""
    _, store, record = open_results(folder)
    with store:
        return compare_results(store.results(record.name, with_losses=False))


def report(folder: str | Path) -> ReportPaths:
    """Write DIR/report.html and DIR/figures/ from what is in the store."""
    place, store, record = open_results(folder)
    with store:
        return write_report(
            place.root,
            study=record,
            results=store.results(record.name),
            summaries=tuple(store.data_summaries(record.name).values()),
            provenances=store.provenances(record.name),
        )


def demo_study() -> LoadedStudy:
    """The study of `loratune demo`: shipped model and data, minutes on two cores."""
    text = resources.files("loratune").joinpath("demo.yaml").read_text(encoding="utf-8")
    return parse_study(text, name="demo.yaml", folder=Path.cwd())


def tune(
    *,
    model: str,
    data: str,
    out: str | Path,
    method: str = "lora",
    rank: int = 16,
    device: str | None = None,
    engine: "EngineChoice" = "auto",
    quiet: bool = False,
) -> tuple[Recommendation, ...]:
    """The batch size and LR for a model and data: a sweep of both, then the recommendation.

    Raises:
        LoratuneError: model or data can't be used, or the fields of the data can't be told.
    """
    loaded = new_study(model=model, data=data, methods=[method], rank=rank, device=device)
    run(loaded, out=out, device=device, engine=engine, quiet=quiet)
    return recommend(out)


def new_study(
    *, model: str, data: str, methods: Sequence[str], rank: int = 16, device: str | None = None
) -> LoadedStudy:
    """A complete study for a model and data: fields found by their names, a grid that fits.

    Paths are relative to the working directory and absolute in the study, whose only copy will lie
    in its results folder.

    Raises:
        LoratuneError: no such data or method, or fields that can't be told; it lists the columns.
    """
    from loratune.data.fields import detect_fields
    from loratune.data.sources import read_rows
    from loratune.study.schema import Source, source_of
    from loratune.workshop import choose_device

    for name in methods:
        describe(name)
    here = Path.cwd()
    rows = read_rows(Source.model_validate(source_of(data)), folder=here)
    fields = detect_fields(rows)
    held_out = max(1, min(MOST_HELD_OUT, len(rows) // HELD_OUT_SHARE))
    most = max(1, (len(rows) - held_out) // FEWEST_UPDATES_IN_GRID)
    sizes = [size for size in GRID_BATCH_SIZES if size <= most] or [1]
    on_gpu = choose_device(device).type == "cuda"
    chosen = {key: value for key, value in dataclasses.asdict(fields).items() if value is not None}
    template = "chat" if fields.messages is not None else "alpaca"
    # Another model or data set is another study, which its results folder then refuses.
    identity = json.dumps([_absolute(model), _absolute(data), list(methods), rank])
    text = _NEW_STUDY.format(
        name=f"tuned-{hashlib.sha256(identity.encode()).hexdigest()[:8]}",
        model=json.dumps(_absolute(model)),
        precision="bfloat16" if on_gpu else "float32",
        train=json.dumps(_absolute(data)),
        fields="\n".join(f"  {key}: {json.dumps(value)}" for key, value in chosen.items()),
        template=template,
        held_out=held_out,
        methods=json.dumps(list(methods)),
        rank=rank,
        batch_sizes=json.dumps(sizes),
        learning_rates=GRID_LEARNING_RATES,
        # A best of many is flattered by its luck; what is compared gets seeds that chose nothing.
        confirm=", confirm: 5" if len(methods) > 1 else "",
    )
    return parse_study(text, name="the study made for you", folder=here)


def _absolute(name: str) -> str:
    """A path that exists as an absolute one; anything else, such as a hub id, as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


_NEW_STUDY = """\
# Written for you; every key can be changed, and `loratune run` takes the file as it is.
study: {name}
model: {model}
precision: {precision}          # of the frozen base; the adapter is float32
data:
  train: {train}
{fields}
  template: {template}
  max_tokens: 1024
  too_long: drop
  validation: {{rows: {held_out}}}   # held out by equal prompts; they choose the LR and batch size
protocol: {{kind: fixed_samples, epochs: 1}}
methods: {methods}
rank: {rank}
alpha: rank
targets: all-linear
batch_size: {batch_sizes}
learning_rate: {learning_rates}
seeds: {{grid: 1, around_best: 2{confirm}}}  # further seeds where they decide something
schedule: {{kind: cosine, warmup_ratio: 0.0}}
select_on: validation_loss
keep_adapters: best
"""
