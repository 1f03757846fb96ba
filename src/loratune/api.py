"""The Python API: what the command line calls, each a plain function over files and records.

Functions that train import torch when they are called; the others never do.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from loratune.analyse.audit.from_results import table_of_results
from loratune.analyse.audit.inspect import Audit, audit_table
from loratune.analyse.audit.reading import read_table
from loratune.analyse.cells import cells_table
from loratune.analyse.compare import Comparison, question_sources, trials_to_compare
from loratune.analyse.compare import compare as compare_results
from loratune.analyse.laws.report import Laws, find_laws
from loratune.analyse.laws.sizes import parameters_of_name
from loratune.analyse.lemma import DEFAULT_REPLICATES, LemmaCheck, check_lemma
from loratune.analyse.noise import measured_noise
from loratune.analyse.tables import results_table
from loratune.errors import AnalysisError, EvaluationError, StudyError
from loratune.folder import ResultsFolder, open_results
from loratune.planning.alternatives import ASSUMED_RATIO, ProxySearch, proxy_alternative
from loratune.planning.build import Plan, make_plan
from loratune.planning.cost import H100, Rate, Timing, measured_rate, stated_rate, trial_cost
from loratune.planning.power import DifferenceNoise
from loratune.planning.shapes import declared_model_facts
from loratune.progress import ProgressLine
from loratune.recommendation.grid import Recommendation, recommendations
from loratune.recommendation.proxy import ProxyPair, recommend_by_proxy
from loratune.recommendation.searched import answered
from loratune.records import TrialResult
from loratune.study.loading import LoadedStudy, load_study
from loratune.study.schema import PAPER_LEARNING_RATES

if TYPE_CHECKING:
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs]  # it ships no complete types

    from loratune.evaluating import Evaluation
    from loratune.models.load import Precision
    from loratune.regrading import Account, Regraded
    from loratune.report.page import ReportPaths
    from loratune.study.schema import GraderName
    from loratune.sweep import Sweep
    from loratune.workshop import EngineChoice, Survey

__all__ = [
    "accounts",
    "audit",
    "cells",
    "compare",
    "demo",
    "demo_study",
    "evaluate",
    "evaluate_by_harness",
    "laws",
    "lemma",
    "load_study",
    "new_study",
    "noise_scale",
    "plan",
    "recommend",
    "report",
    "results",
    "run",
    "score",
    "tune",
]


def plan_with_remarks(
    loaded: LoadedStudy, *, tflops: float | None = None, like: str | Path | None = None
) -> tuple[Plan, tuple[str, ...]]:
    """The plan of a study, and in plain words what was declared, not read, or is not here.

    Args:
        loaded: the study.
        tflops: a rate of your own in TFLOP/s; left out: a stated H100 rate.
        like: a results folder whose finished trials give the rate of the device they ran on, and
            the noise from which the detectable differences are planned.

    Raises:
        LoratuneError: the study can't be planned, or a task of its `evaluate` can't be asked, as
            far as that shows without the network.
    """
    from loratune.evaluation.tasks import check_questions, check_tasks
    from loratune.workshop import survey

    tasks = loaded.study.evaluate.tasks
    # Where generated code may run is a matter of the machine that runs the study.
    check_tasks(tasks, folder=loaded.folder, unsafe_exec=True)
    found = survey(loaded, download=False)
    # A study whose rows are declared runs elsewhere, and its questions may lie there.
    missing = check_questions(
        tasks,
        folder=loaded.folder,
        may_be_missing=any(one.provisional for one in found.data.values()),
    )
    rate = H100
    if tflops is not None:
        if not 0 < tflops < float("inf"):
            raise StudyError(f"tflops={tflops:g}; give a positive number")
        rate = stated_rate(tflops)
    elif like is not None:
        rate = _measured_rate(like, found)
    noise = {} if like is None else noise_of(like)
    made = make_plan(loaded.study, models=found.models, data=found.data, rate=rate, noise=noise)
    return _with_proxy(made), (*found.remarks, *missing)


def _with_proxy(made: Plan) -> Plan:
    """The plan with what `tune` would cost in its place, by models whose names tell their size."""
    from loratune.models.proxies import propose_proxy
    from loratune.new_study import PROXY_GRIDS, SWEEP_BATCH_SIZES, finest_grid

    proxies = dict[str, tuple[str, float]]()
    for model, facts in made.models.items():
        proxy = propose_proxy(model)
        size = None if proxy is None else parameters_of_name(proxy)
        if proxy is not None and size is not None:
            own = parameters_of_name(model) or facts.num_parameters
            proxies[model] = (proxy, size / own)
    searches = [
        ProxySearch(sizes, rates.count(",") + 1, further) for sizes, rates, further in PROXY_GRIDS
    ]
    # As a share of the fixed sweep: batch sizes x the paper's LRs x 3 seeds on the target, less
    # the batch sizes that neither of the two has on so few rows.
    largest = max((ratio for _, ratio in proxies.values()), default=ASSUMED_RATIO)
    rows = max(trial.num_train_rows for trial in made.trials)
    sweep = 3 * ProxySearch(SWEEP_BATCH_SIZES, len(PAPER_LEARNING_RATES), 0).num_trials(rows)
    share = largest * searches[0].num_trials(rows) / sweep
    by_proxy = proxy_alternative(
        made.study,
        made.trials,
        made.costs,
        flops=made.flops,
        proxies=proxies,
        search=searches[finest_grid(share)],
    )
    more = () if by_proxy is None else (by_proxy,)
    return replace(made, alternatives=(*made.alternatives, *more))


def noise_of(folder: str | Path) -> dict[str, DifferenceNoise]:
    """The noise between methods that was measured in a results folder, by metric."""
    results = _results_of(Path(folder))
    chosen = trials_to_compare(results, cells_of=answered)
    _, store, record = open_results(folder)
    with store:
        verdicts = store.verdicts(record.name, trial_ids=chosen)
        sources = question_sources(store.data_summaries(record.name))
    return measured_noise(results, verdicts, sources=sources, cells_of=answered)


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


def statuses(folder: str | Path) -> dict[str, int]:
    """How many trials of a results folder have each status that occurs."""
    return dict(Counter[str](one.status for one in _results_of(Path(folder))))


def cells(folder: str | Path) -> "pd.DataFrame":
    """One row a cell: its best LR and its score there."""
    return cells_table(answered(_results_of(Path(folder))))


def recommend(
    folder: str | Path, *, method: str | None = None, margin: float = 0.005
) -> tuple[Recommendation, ...]:
    """One recommendation for every setting of one method (model, rank, N, ...), in order.

    Where `tune` searched a proxy, the one recommendation that it and the target give together.

    Args:
        folder: a results folder.
        method: left out, lora where the study has it, else its first method.
        margin: how much worse than the best loss counts as good, as a fraction.
    """
    place = ResultsFolder(Path(folder))
    if place.proxy_pair.is_file():
        pair = ProxyPair.from_json(place.proxy_pair.read_text(encoding="utf-8"))
        on_proxy = _results_of(place.root / pair.folder)
        on_target = _results_of(place.root) if place.study.is_file() else ()
        beside = ResultsFolder(place.beside)
        on_beside = _results_of(beside.root) if beside.study.is_file() else ()
        one = recommend_by_proxy(on_proxy, on_target, on_beside, pair=pair, margin=margin)
        if method not in (None, one.method):
            raise AnalysisError(f"no trials with method {method!r}; there are {one.method}")
        return (one,)
    return recommendations(_results_of(place.root), method=method, margin=margin)


def _results_of(folder: Path) -> tuple[TrialResult, ...]:
    _, store, record = open_results(folder)
    with store:
        return store.results(record.name, with_losses=False)


def compare(folder: str | Path) -> tuple[Comparison, ...]:
    """Every method against lora, each at its own best batch size and LR, in every setting."""
    found = _results_of(Path(folder))
    chosen = trials_to_compare(found, cells_of=answered)
    _, store, record = open_results(folder)
    with store:
        verdicts = store.verdicts(record.name, trial_ids=chosen)
        sources = question_sources(store.data_summaries(record.name))
    return compare_results(found, verdicts=verdicts, sources=sources, cells_of=answered)


def accounts(folder: str | Path) -> "tuple[Account, ...]":
    """Every score of a results folder, with why answers were not right where that is known.

    Raises:
        StoreError: not a results folder.
    """
    from loratune.regrading import accounts

    _, store, record = open_results(folder)
    with store:
        return accounts(store, record.name)


def score(
    folder: str | Path,
    *,
    grader: "GraderName",
    tasks: Sequence[str] | None = None,
    data: Mapping[str, str] | None = None,
    unsafe_exec: bool = False,
) -> "tuple[Regraded, ...]":
    """Grade a results folder's kept answers anew, without a model; scores are added, none changes.

    Args:
        folder: a results folder whose study has test tasks.
        grader: pissa, strict, exact, plain, normalised or tests.
        tasks: only these, by their names in the tables; None: all that the grader can judge.
        data: questions by task, for scores of older versions, which did not keep them, where the
            study's paths lead nowhere from here.
        unsafe_exec: run generated code where it cannot be isolated.

    Raises:
        LoratuneError: no such folder or task, none that the grader can judge, or questions that are
            not those that were asked.
    """
    from loratune.regrading import regrade
    from loratune.study.schema import Source, source_of

    for name, path in (data or {}).items():
        if not path:
            raise EvaluationError(f"data of task {name} is {path!r}; give a file, or a hub id")
    place, store, _ = open_results(folder)
    with store:
        return regrade(
            store,
            load_study(place.study).study,
            folder=place.root,
            grader=grader,
            tasks=None if tasks is None else frozenset(tasks),
            data={
                name: Source.model_validate(source_of(_absolute(path)))
                for name, path in (data or {}).items()
            },
            unsafe_exec=unsafe_exec,
        )


def evaluate(
    source: str | Path,
    *,
    tasks: Sequence[str],
    data: str | None = None,
    grader: "GraderName | None" = None,
    questions: int | None = None,
    model: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    precision: "Precision | None" = None,
    device: str | None = None,
    answers: str | Path | None = None,
    engine: "EngineChoice" = "auto",
    remark: Callable[[str], None] = lambda _: None,
    trust_remote_code: bool = False,
    unsafe_exec: bool = False,
) -> "tuple[Evaluation, ...]":
    """Any PEFT adapter, or a model itself, on tasks; no study is needed.

    Of a results folder every adapter that it keeps, with the study's own prompts; scores and
    answers go into its store, and what is there is not asked again.

    Args:
        source: an adapter's folder or hub id; a model's hub id, folder, file.gguf or demo model;
            or a results folder.
        tasks: names of tasks, or paths of a task's .yaml file.
        data: the questions, where there is one task and they are not its own.
        grader: in the place of the tasks' own.
        questions: the first so many of each task; None: all.
        model: the adapter's base; None: the one that its adapter_config.json names.
        prompt: a text with {prompt}, or alpaca, plain or chat; None: "Question: {prompt}\nAnswer:".
        max_new_tokens: in the place of the tasks' own.
        precision: of the base; None: bfloat16 on a GPU (float16 on one without it), float32 on a
            CPU.
        device: cpu, cuda or cuda:N; None: a GPU if there is one.
        answers: a file that keeps raw answers, a line a question; gone on with where it is there.
        engine: packed lets many adapters answer at once or refuses, reference asks one after
            another by transformers' own generate, auto does what can be done.
        remark: is told, under auto, what is asked one by one and why.
        trust_remote_code: let a model's own Python code run.
        unsafe_exec: run generated code where it cannot be isolated.

    Raises:
        LoratuneError: no such adapter, model or task, or they do not fit together.
        evaluating.NotAllScoredError: something has no score; it holds what has, as `found`.
    """
    from loratune.evaluating import DEFAULT_PROMPT, evaluate_results, is_results_folder
    from loratune.evaluating import evaluate as evaluate_source
    from loratune.evaluation.custom import is_custom
    from loratune.models.load import default_precision
    from loratune.study.schema import Source, Task, source_of
    from loratune.workshop import choose_device

    if not tasks:
        raise EvaluationError("no task is named; give at least one, such as gsm8k")
    twice = sorted({name for name in tasks if tasks.count(name) > 1})
    if twice:
        raise EvaluationError(f"task {twice[0]} is named twice; name each task once")
    if data is not None and len(tasks) > 1:
        raise EvaluationError(f"data={data!r} for {len(tasks)} tasks; give one task with it")
    try:
        asked = [
            Task(
                # Relative to the working folder, a results folder's adapters or not.
                name=str(Path(name).expanduser().absolute()) if is_custom(name) else name,
                data=None if data is None else Source.model_validate(source_of(_absolute(data))),
                grader=grader,
                questions=questions,
                max_new_tokens=max_new_tokens,
            )
            for name in tasks
        ]
    except ValidationError as error:
        problem = error.errors()[0]
        of_data = error.title == Source.__name__
        name = "data" if of_data else ".".join(map(str, problem["loc"]))
        given = data if of_data else problem["input"]
        raise EvaluationError(f"{name}={given!r}: {problem['msg']}") from error
    if is_results_folder(str(source)):
        if model or prompt or answers or precision:
            raise EvaluationError(
                f"{source} is a results folder: model, prompt and precision are its study's, and "
                "answers are kept in its store; leave them out"
            )
        return evaluate_results(
            str(source),
            tasks=asked,
            device=device,
            engine=engine,
            remark=remark,
            trust_remote_code=trust_remote_code,
            unsafe_exec=unsafe_exec,
        )
    return evaluate_source(
        str(source),
        tasks=asked,
        model=model,
        prompt=prompt or DEFAULT_PROMPT,
        precision=precision or default_precision(choose_device(device)),
        device=device,
        answers=None if answers is None else Path(answers),
        engine=engine,
        remark=remark,
        trust_remote_code=trust_remote_code,
        unsafe_exec=unsafe_exec,
    )


def evaluate_by_harness(
    source: str | Path,
    *,
    tasks: Sequence[str],
    model: str | None = None,
    precision: "Precision | None" = None,
    device: str | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, object]]:
    """lm-evaluation-harness's own tasks, asked of an adapter or a model; its results by task.

    Args:
        source: an adapter's folder or hub id; or a model's hub id, folder, file.gguf or demo model.
        tasks: names of the harness's tasks.
        model: the adapter's base; None: the one that its adapter_config.json names.
        precision: of the base; None: bfloat16 on a GPU (float16 on one without it), float32 on a
            CPU.
        device: cpu, cuda or cuda:N; None: a GPU if there is one.
        include_path: a folder with task files of your own.
        num_fewshot: worked examples before each question; None: the task's own.
        limit: the first so many questions of each task; None: all.
        chat: put prompts into the tokenizer's chat template.
        trust_remote_code: let a model's own Python code run.

    Raises:
        LoratuneError: the harness is not installed, or no such adapter, model or task.
    """
    from loratune import evaluating
    from loratune.models.load import default_precision
    from loratune.workshop import choose_device

    return evaluating.evaluate_by_harness(
        str(source),
        tasks=tasks,
        model=model,
        precision=precision or default_precision(choose_device(device)),
        device=device,
        include_path=None if include_path is None else str(include_path),
        num_fewshot=num_fewshot,
        limit=limit,
        chat=chat,
        trust_remote_code=trust_remote_code,
    )


def _absolute(name: str) -> str:
    if not name:
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def laws(folder: str | Path) -> Laws:
    """The laws that a results folder's cells support, and what cannot be concluded from them.

    A model's number of parameters is that of the study's `declared` section, else that which its
    name states.
    """
    place, store, record = open_results(folder)
    with store:
        found = store.results(record.name, with_losses=False)
    declared = load_study(place.study).study.declared.models
    sizes = {
        source: float(declared_model_facts(source, shape).num_parameters)
        for source, shape in declared.items()
    }
    return find_laws(found, model_parameters=sizes)


def noise_scale(folder: str | Path) -> "pd.DataFrame":
    """The gradient noise scale of every trial that was probed, with intervals or why there is none.

    One row a trial, split, coordinates (raw, adam) and block (all, A, B, other).

    Raises:
        StoreError: not a results folder.
        AnalysisError: the study asked for no probes.
    """
    from loratune.analyse.noise_table import noise_scale_table

    _, store, record = open_results(folder)
    with store:
        return noise_scale_table(
            store.results(record.name, with_losses=False), store.noise_probes(record.name)
        )


def lemma(
    *,
    rank: int,
    samples: int,
    replicates: int = DEFAULT_REPLICATES,
    seed: int = 0,
    noise_scale: float | None = None,
) -> LemmaCheck:
    """Lemma 4.1 by simulation; with `noise_scale` the plug-in law at that true noise scale too."""
    return check_lemma(
        rank=rank, samples=samples, replicates=replicates, seed=seed, true_noise_scale=noise_scale
    )


def audit(path: str | Path, *, columns: Mapping[str, str] | None = None) -> Audit:
    """What makes a comparison of methods less than fair, or less than sure, with numbers.

    Args:
        path: a results folder, a CSV (as `loratune results` writes it, or with `columns`), or a
            folder of PEFT method_comparison result files.
        columns: {column of the CSV: our field}, as `analyse.audit.from_csv.parse_map` reads it.

    Raises:
        LoratuneError: nothing that can be read, or no run with a score.
    """
    place = Path(path)
    ours = ResultsFolder(place)
    if (ours.study.is_file() or ours.proxy_pair.is_file()) and not columns:
        _, store, record = open_results(place)
        with store:
            table = table_of_results(store.results(record.name, with_losses=False))
    else:
        table = read_table(place, columns=columns or {})
    return audit_table(table)


def report(folder: str | Path) -> "ReportPaths":
    """Write DIR/report.html and DIR/figures/ from what is in the store."""
    from loratune.report.page import write_report  # matplotlib, which only this draws with

    place, store, record = open_results(folder)
    with store:
        found = store.results(record.name)
        return write_report(
            place.root,
            study=record,
            results=found,
            verdicts=store.verdicts(
                record.name, trial_ids=trials_to_compare(found, cells_of=answered)
            ),
            summaries=store.data_summaries(record.name),
            provenances=store.provenances(record.name),
        )


def demo_study() -> LoadedStudy:
    """The study of `loratune demo`: shipped model and data, minutes on two cores."""
    from loratune.demonstration import demo_study

    return demo_study()


def demo(
    out: str | Path,
    *,
    engine: "EngineChoice" = "auto",
    quiet: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> "Sweep":
    """The whole job on shipped models and data, without a GPU or a network.

    A sweep of batch size and LR of three methods on demo:1m in OUT; then, in OUT/target, demo:4m at
    the batch size that the sweep found for LoRA: the smaller model is the larger one's proxy.

    Raises:
        LoratuneError: `out` holds something else.
        training.Interrupted: `should_stop` said so; the same call goes on.
    """
    from loratune.demonstration import demonstrate

    def run_here(loaded: LoadedStudy, folder: Path) -> "Sweep":
        return run(
            loaded,
            out=folder,
            # Small products gain more from two processes than from two threads.
            devices=["cpu"] * min(2, os.cpu_count() or 1),
            engine=engine,
            quiet=quiet,
            should_stop=should_stop,
        )

    return demonstrate(Path(out), run=run_here)


def tune(
    *,
    model: str,
    data: str,
    out: str | Path,
    method: str = "lora",
    rank: int = 16,
    proxy: str | None = "auto",
    proxy_rank: int | None = None,
    budget_seconds: float | None = None,
    device: str | None = None,
    engine: "EngineChoice" = "auto",
    quiet: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Recommendation, ...]:
    """The batch size and LR for a model and data, searched on a smaller model where there is one.

    Args:
        model: the target: hub id, folder, file.gguf or demo model.
        data: hub id, file or demo:task; the fields are found by their names.
        out: the results folder; the proxy's is `proxy` in it. The same call goes on where it was.
        method: the LoRA variant.
        rank: r of the target's adapters.
        proxy: the smaller model; "auto": one that is known for the model's family; None: none, the
            target itself is swept.
        proxy_rank: r of the proxy's adapters; left out: 8, or the target's where that is lower.
        budget_seconds: wall time; what can be said when it is over is the answer.
        device: cpu, cuda or cuda:N; left out: a GPU if there is one.
        engine: as for `run`.
        quiet: no progress on stderr.
        should_stop: asked after every update; True ends with snapshots.
        say: told the studies that are run and what was found.

    Raises:
        LoratuneError: model, proxy or data can't be used, or the fields of the data can't be told.
        training.Interrupted: `should_stop` said so; the same call goes on.
    """
    from loratune import tuning

    asked = tuning.Tuning(
        model=model,
        data=data,
        out=Path(out),
        method=method,
        rank=rank,
        proxy=proxy,
        proxy_rank=proxy_rank,
        device=device,
        budget_seconds=budget_seconds,
        started=time.monotonic(),
    )

    def run_study(loaded: LoadedStudy, folder: Path, stop: Callable[[], bool]) -> "Sweep":
        return run(loaded, out=folder, device=device, engine=engine, quiet=quiet, should_stop=stop)

    tuning.tune(asked, run=run_study, should_stop=should_stop, say=say)
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
    from loratune.models.load import default_precision
    from loratune.new_study import grid_study, read_request
    from loratune.workshop import choose_device

    precision = default_precision(choose_device(device))
    request = read_request(data=data, methods=methods, precision=precision)
    return grid_study(request, model=model, rank=rank)
