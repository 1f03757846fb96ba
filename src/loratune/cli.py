"""The command line: parse, call one function, print, set the exit code.

Results go to stdout, progress and remarks to stderr. Exit codes: 0 done (diverged trials and
undecided answers are answers), 1 something failed, 2 the request was wrong, 130 interrupted.
Everything heavy is imported by the command that needs it: `loratune init` must not wait for torch.
"""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune.errors import LoratuneError, StoreError

if TYPE_CHECKING:
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs]  # it ships no complete types

    from loratune.analyse.tables import TableFormat
    from loratune.evaluating import Evaluation
    from loratune.recommendation.grid import Recommendation
    from loratune.sweep import Sweep

app = typer.Typer(
    help="Finds the batch size and learning rate that train a LoRA adapter best.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Scale(StrEnum):
    """The scale of a preset."""

    paper = "paper"
    small = "small"


class Format(StrEnum):
    """How a table is written."""

    csv = "csv"
    json = "json"
    parquet = "parquet"


class GraderChoice(StrEnum):
    """How answers are judged."""

    pissa = "pissa"
    strict = "strict"
    number = "number"
    exact = "exact"
    plain = "plain"
    normalised = "normalised"
    tests = "tests"


class HarnessChoice(StrEnum):
    """Whose tasks are asked."""

    lm_eval = "lm-eval"


class Engine(StrEnum):
    """What trains: many trials at once, or one after another."""

    auto = "auto"
    packed = "packed"
    reference = "reference"


Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `loratune run` wrote.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The results folder.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="A database outside the folder, shared with other studies."),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda or cuda:N; left out: a GPU if there is one."),
]
Devices = Annotated[
    str | None,
    typer.Option(
        "--devices",
        help="Several devices of this machine, a process on each: all, or cuda:0,cuda:1.",
    ),
]
EngineOption = Annotated[
    Engine,
    typer.Option(
        "--engine",
        help="packed: many trials at once; reference: one after another; auto: packed for every "
        "method that can be packed.",
    ),
]
AnsweringOption = Annotated[
    Engine,
    typer.Option(
        "--engine",
        help="packed: adapters answer all at once, or are refused; reference: one after another, "
        "by transformers' generate; auto: at once where that can be done.",
    ),
]
HiddenEngineOption = Annotated[Engine, typer.Option("--engine", hidden=True)]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", help="Compute activations twice instead of keeping them."
    ),
]
RemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let a model's own Python code run. Off by default."),
]
UnsafeExec = Annotated[
    bool,
    typer.Option(
        "--unsafe-exec", help="Run generated code even where it cannot be isolated. Dangerous."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
FormatOption = Annotated[Format, typer.Option("--format", help="How the table is written.")]
OutputFile = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Write there, not to stdout.")
]
MethodOption = Annotated[
    str | None, typer.Option("--method", help="Only this method, where the study has several.")
]
Margin = Annotated[
    float,
    typer.Option("--margin", help="How much worse than the best loss is as good, as a fraction."),
]


def main() -> None:
    """The entry point `loratune`."""
    # Threads that wait for each other by spinning stand still on a machine that is busy: on two
    # shared cores a trial took over 60 s instead of 5. Read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except LoratuneError as error:
        _say(f"loratune: {error}")
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output has gone, as `loratune results DIR | head` does.
        sys.stderr.close()
        sys.exit(0)


@app.command()
def demo(
    out: Out = Path("demo-results"),
    *,
    engine: HiddenEngineOption = Engine.auto,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole job on shipped models and data: no GPU, no network, minutes."""
    from loratune import api

    with _stoppable() as should_stop:
        sweep = api.demo(out, engine=engine.value, quiet=quiet, should_stop=should_stop)
    carried = api.recommend(out / "target") if (out / "target" / "study.yaml").is_file() else ()
    _print_answer(sweep, as_json=as_json, further=carried)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="A preset, such as fig1.")],
    *,
    scale: Annotated[
        Scale | None,
        typer.Option(
            help="paper: as published; small: what one GPU does in minutes. "
            "Left out: small where there is one."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a commented study file: `loratune init fig1 --scale small > fig1.yaml`."""
    from loratune.study.presets import preset_text

    text = preset_text(name, scale=None if scale is None else scale.value)
    _print(json.dumps({"name": name, "text": text}) if as_json else text)


@app.command()
def plan(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or - for stdin.")],
    *,
    tflops: Annotated[
        float | None,
        typer.Option(help="State your device's rate in TFLOP/s instead of the built-in H100's."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Take rate and noise as measured in this results folder."),
    ] = None,
    trials: Annotated[bool, typer.Option("--trials", help="List every trial as well.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a study would train and cost. Trains, downloads and writes nothing."""
    from loratune import api
    from loratune.planning.text import plan_text

    planned, remarks = api.plan_with_remarks(_study(study), tflops=tflops, like=like)
    for remark in remarks:
        _say(remark)
    if as_json:
        body = planned.to_json()
        if trials:
            body["trials"] = [dataclasses.asdict(trial) for trial in planned.trials]
        _print(json.dumps(body, indent=2))
    else:
        _print(plan_text(planned, list_trials=trials))


@app.command()
def run(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or - for stdin.")],
    out: Out,
    *,
    store: StoreOption = None,
    device: Device = None,
    devices: Devices = None,
    engine: EngineOption = Engine.auto,
    gradient_checkpointing: Checkpointing = False,
    trust_remote_code: RemoteCode = False,
    unsafe_exec: UnsafeExec = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a study's trials, or go on where it stopped; then report and recommend."""
    from loratune import api

    with _stoppable() as should_stop:
        sweep = api.run(
            _study(study),
            out=out,
            store=store,
            device=device,
            devices=devices,
            engine=engine.value,
            gradient_checkpointing=gradient_checkpointing,
            trust_remote_code=trust_remote_code,
            unsafe_exec=unsafe_exec,
            quiet=quiet,
            should_stop=should_stop,
        )
    _print_answer(sweep, as_json=as_json)


@app.command()
def results(
    folder: Folder,
    *,
    format: FormatOption = Format.csv,
    all_scores: Annotated[
        bool, typer.Option("--all-scores", help="Also scores that the study does not ask for.")
    ] = False,
    output: OutputFile = None,
    as_json: Json = False,
) -> None:
    """One row a trial."""
    from loratune import api

    table = api.results(folder, all_scores=all_scores)
    _write_table(table, format="json" if as_json else format.value, output=output)


@app.command()
def cells(
    folder: Folder,
    *,
    format: FormatOption = Format.csv,
    output: OutputFile = None,
    as_json: Json = False,
) -> None:
    """One row a cell: its best LR and its score there."""
    from loratune import api

    _write_table(api.cells(folder), format="json" if as_json else format.value, output=output)


@app.command()
def recommend(
    folder: Folder,
    *,
    method: MethodOption = None,
    margin: Margin = 0.005,
    as_json: Json = False,
) -> None:
    """The batch size and LR to use, how sure, and why; or why it can't be said."""
    from loratune import api
    from loratune.report.text import recommendation_text

    answers = api.recommend(folder, method=method, margin=margin)
    if as_json:
        documents = [answer.to_json() for answer in answers]
        _print(_json_of(documents[0] if len(documents) == 1 else documents))
    else:
        _print("\n\n".join(recommendation_text(answer) for answer in answers))


@app.command()
def score(
    folder: Folder,
    *,
    grader: Annotated[
        GraderChoice | None,
        typer.Option(help="How to judge the kept answers; left out: what was judged, by reason."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Only this task; may be given several times.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=FILE", help="A task's questions, where they have moved."),
    ] = None,
    unsafe_exec: UnsafeExec = False,
    as_json: Json = False,
) -> None:
    """Grade kept answers anew, no model, no GPU; or print what was judged, by reason."""
    from loratune import api

    if grader is None:
        if task or data:
            raise typer.BadParameter("--task and --data belong to --grader")
        stand = api.accounts(folder)
        if as_json:
            _print(_json_of([dataclasses.asdict(one) for one in stand]))
            return
        for one in stand:
            account = one.score
            _print(
                f"{one.trial_id} {account.task}: {account.correct} right, {account.wrong} wrong, "
                f"{account.truncated} truncated, {account.errors} errors of {account.total}; "
                f"grader {account.grader}"
            )
            for verdict, reason, count in one.reasons:
                _print(f"  {count} {verdict}: {reason}")
        return
    moved = dict[str, str]()
    for one in data or ():
        name, sign, path = one.partition("=")
        if not sign or not path:
            raise typer.BadParameter(f"--data {one!r}; give TASK=FILE, as in gsm8k=test.jsonl")
        moved[name] = path
    made = api.score(folder, grader=grader.value, tasks=task, data=moved, unsafe_exec=unsafe_exec)
    if as_json:
        _print(_json_of([dataclasses.asdict(one) for one in made]))
        return
    for one in made:
        before, after = one.before, one.after
        _print(
            f"{one.trial_id} {after.task}: {after.correct} of {after.total} right by "
            f"{after.grader}, {before.correct} by {before.grader}"
        )
    stand = "" if made else f"; what grader {grader.value} judges here, it has judged"
    _say(f"{len(made)} scores added{stand}")


@app.command()
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER|MODEL|DIR",
            help="A PEFT adapter or a model, each a folder or hub id, or a results folder.",
        ),
    ],
    *,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task's name, or its .yaml file; may be given several times."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="The questions of the one task.")] = None,
    grader: Annotated[GraderChoice | None, typer.Option(help="How to judge.")] = None,
    questions: Annotated[int | None, typer.Option(help="The first so many.", min=1)] = None,
    model: Annotated[
        str | None, typer.Option(help="The adapter's base, in the place of the one it names.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="A text with {prompt}, or alpaca, plain or chat."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Where answers are cut.", min=1)
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep raw answers here, and go on from them."),
    ] = None,
    harness: Annotated[
        HarnessChoice | None,
        typer.Option(help="Ask another harness's tasks, named by --tasks."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="With --harness: its tasks, as gsm8k,arc_easy.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --harness: a folder with task files of your own.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="With --harness: worked examples before a question.", min=0)
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="With --harness: the tokenizer's chat template.")
    ] = False,
    engine: AnsweringOption = Engine.auto,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    unsafe_exec: UnsafeExec = False,
    as_json: Json = False,
) -> None:
    """Score any PEFT adapter, or a model, on tasks; no study is needed."""
    from loratune import api

    if harness is not None:
        if not tasks or task:
            raise typer.BadParameter("--harness takes its tasks by --tasks, as gsm8k,arc_easy")
        unused = {
            "--data": data,
            "--grader": grader,
            "--prompt": prompt,
            "--max-new-tokens": max_new_tokens,
            "--answers": answers,
            "--engine": None if engine is Engine.auto else engine,
            "--unsafe-exec": unsafe_exec or None,
        }
        given = [name for name, value in unused.items() if value is not None]
        if given:
            raise typer.BadParameter(
                f"{', '.join(given)}: with --harness, its tasks' own files say such things"
            )
        results = api.evaluate_by_harness(
            source,
            tasks=[name.strip() for name in tasks.split(",") if name.strip()],
            model=model,
            device=device,
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=questions,
            chat=chat,
            trust_remote_code=trust_remote_code,
        )
        if as_json:
            _print(json.dumps(results, indent=2, default=str))
            return
        for name, metrics in results.items():
            for metric, value in metrics.items():
                if isinstance(value, float):
                    _print(f"{name} {metric}: {value:.4f}")
        return
    if tasks or include_path or num_fewshot is not None or chat:
        raise typer.BadParameter(
            "--tasks, --include-path, --num-fewshot and --chat belong to --harness lm-eval"
        )
    from loratune.evaluating import NotAllScoredError  # It takes seconds to import.

    try:
        found = api.evaluate(
            source,
            tasks=task or [],
            data=data,
            grader=None if grader is None else grader.value,
            questions=questions,
            model=model,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            answers=answers,
            engine=engine.value,
            remark=_say,
            device=device,
            trust_remote_code=trust_remote_code,
            unsafe_exec=unsafe_exec,
        )
    except NotAllScoredError as error:
        _print_evaluations(error.found, as_json=as_json)
        raise
    _print_evaluations(found, as_json=as_json)


def _print_evaluations(found: "Sequence[Evaluation]", *, as_json: bool) -> None:
    if as_json:
        _print(_json_of([one.to_json() for one in found]))
        return
    for one in found:
        account = one.score
        who = f"{Path(one.adapter).name} " if one.adapter is not None and len(found) > 1 else ""
        _print(
            f"{who}{account.task}: {100 * account.accuracy:.1f}% ({100 * one.low:.1f} to "
            f"{100 * one.high:.1f}, 95% over questions), {account.correct} right, "
            f"{account.wrong} wrong, {account.truncated} truncated, {account.errors} errors of "
            f"{account.total}; grader {account.grader}"
        )


@app.command()
def report(folder: Folder, *, as_json: Json = False) -> None:
    """Write DIR/report.html and DIR/figures/ again from what is in the store."""
    from loratune import api

    paths = api.report(folder)
    if as_json:
        _print(json.dumps({"page": str(paths.page), "figures": [str(f) for f in paths.figures]}))
    else:
        _print(str(paths.page))


@app.command()
def compare(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A folder that `loratune run` wrote.")
    ] = None,
    *,
    methods: Annotated[
        str | None, typer.Option(help="Methods to train and compare, as lora,pissa.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, file.gguf or demo:1m.")] = None,
    data: Annotated[str | None, typer.Option(help="Hub id, file or demo:task.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The results folder.")] = None,
    rank: Annotated[int, typer.Option(help="r of every adapter.")] = 16,
    device: Device = None,
    engine: EngineOption = Engine.auto,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods, each at its own best batch size and LR, against LoRA."""
    from loratune import api
    from loratune.analyse.compare import comparisons_document
    from loratune.report.text import comparison_sentence

    if folder is None:
        sweep = _new_study(
            model=model,
            data=data,
            out=out,
            methods=[name.strip() for name in methods.split(",") if name.strip()]
            if methods
            else None,
            rank=rank,
            device=device,
            engine=engine,
            quiet=quiet,
        )
        folder = sweep.folder.root
    elif methods or model or data or out:
        raise typer.BadParameter("give DIR to analyse it, or --methods, --model, --data and --out")
    compared = api.compare(folder)
    if as_json:
        _print(_json_of(comparisons_document(compared)))
    else:
        _print("\n\n".join(comparison_sentence(one) for one in compared))


@app.command()
def laws(folder: Folder, *, as_json: Json = False) -> None:
    """Laws of the best LR, the loss and the best batch size, with intervals, or why none."""
    from loratune import api
    from loratune.report.laws_text import laws_text

    found = api.laws(folder)
    _print(_json_of(found.to_json()) if as_json else laws_text(found))


@app.command("noise-scale")
def noise_scale(
    folder: Folder,
    *,
    format: Annotated[
        Format | None, typer.Option(help="csv, json or parquet; left out: text.")
    ] = None,
    output: OutputFile = None,
    as_json: Json = False,
) -> None:
    """The gradient noise scale of every probed trial, with an interval, or why there is none."""
    from loratune import api
    from loratune.report.noise_text import noise_scale_text

    table = api.noise_scale(folder)
    chosen = "json" if as_json else None if format is None else format.value
    if chosen is None and output is None:
        _print(noise_scale_text(table))
    else:
        _write_table(table, format=chosen or "csv", output=output)


@app.command()
def lemma(
    *,
    rank: Annotated[int, typer.Option(help="r, the dimension of the inputs.")],
    samples: Annotated[int, typer.Option(help="N, the rows that an estimate is made from.")],
    replicates: Annotated[int, typer.Option(help="How many estimates are drawn.")] = 2000,
    seed: Annotated[int, typer.Option(help="Same seed, same numbers.")] = 0,
    noise_scale: Annotated[
        float | None,
        typer.Option(metavar="B", help="Check the plug-in law too, at this true noise scale."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check Lemma 4.1 of the paper by simulation, and what the plug-in noise scale estimates."""
    from loratune import api
    from loratune.report.laws_text import lemma_text

    found = api.lemma(
        rank=rank, samples=samples, replicates=replicates, seed=seed, noise_scale=noise_scale
    )
    _print(_json_of(found.to_json()) if as_json else lemma_text(found))


@app.command()
def audit(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A results folder, a CSV, or a folder of PEFT method_comparison results.",
        ),
    ],
    *,
    columns: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="COLUMN=FIELD", help="A CSV's column and our field for it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what makes a comparison of methods unfair or unsure, with numbers."""
    from loratune import api
    from loratune.analyse.audit.from_csv import parse_map
    from loratune.report.audit_text import audit_text

    found = api.audit(path, columns=parse_map(columns or []))
    _print(_json_of(found.to_json()) if as_json else audit_text(found))


@app.command()
def tune(
    *,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, file.gguf or demo:1m.")] = None,
    data: Annotated[str | None, typer.Option(help="Hub id, file or demo:task.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The results folder.")] = None,
    method: Annotated[str, typer.Option(help="The LoRA variant to tune.")] = "lora",
    rank: Annotated[int, typer.Option(help="r of the adapter.")] = 16,
    proxy: Annotated[
        str,
        typer.Option(
            help="A smaller model of the same family, to search on in the model's place; "
            "auto: one that is known; none: the model itself."
        ),
    ] = "auto",
    proxy_rank: Annotated[
        int | None, typer.Option(help="r on the proxy; left out: 8, or --rank where that is lower.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Wall time, such as 2h, 90m or 1h30m; left out: no end."),
    ] = None,
    device: Device = None,
    engine: EngineOption = Engine.auto,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the batch size and LR for your model and data, on a smaller model where there is one."""
    from loratune import api
    from loratune.report.text import recommendation_text

    if model is None or data is None or out is None:
        raise _missing({"--model": model, "--data": data, "--out": out})
    with _stoppable() as should_stop:
        answers = api.tune(
            model=model,
            data=data,
            out=out,
            method=method,
            rank=rank,
            proxy=None if proxy == "none" else proxy,
            proxy_rank=proxy_rank,
            budget_seconds=None if budget is None else _seconds(budget),
            device=device,
            engine=engine.value,
            quiet=quiet,
            should_stop=should_stop,
            say=_say,
        )
    folders = [one for one in (out / "proxy", out) if (one / "study.yaml").is_file()]
    statuses = {str(one): api.statuses(one) for one in folders}
    if as_json:
        body = {
            "folder": str(out),
            "reports": [str(one / "report.html") for one in folders],
            "statuses": statuses,
            "recommendations": [answer.to_json() for answer in answers],
        }
        _print(_json_of(body))
    else:
        parts = [recommendation_text(answer) for answer in answers]
        parts += [f"report: {one / 'report.html'}" for one in folders]
        _print("\n\n".join(parts))
    failed = sum(
        counts.get("failed", 0) + counts.get("out_of_memory", 0) for counts in statuses.values()
    )
    if failed:
        _say(f"loratune: {failed} trials failed; `loratune results DIR` says why")
        raise typer.Exit(1)


def _seconds(duration: str) -> float:
    """2h, 90m, 1h30m in seconds; a number without a unit is refused."""
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

    try:
        if not duration.strip()[-1:].isalpha():
            raise ValueError("no unit")
        return float(pd.Timedelta(duration).total_seconds())
    except ValueError as error:
        raise typer.BadParameter(
            f"--budget {duration!r} is no time ({error}); give for example 2h, 90m or 1h30m"
        ) from error


def _missing(options: dict[str, object]) -> typer.BadParameter:
    absent = ", ".join(name for name, given in options.items() if given is None)
    return typer.BadParameter(f"missing {absent}")


def _new_study(
    *,
    model: str | None,
    data: str | None,
    out: Path | None,
    methods: list[str] | None,
    rank: int,
    device: str | None,
    engine: Engine,
    quiet: bool,
) -> "Sweep":
    """A complete study file, written and printed, then run."""
    from loratune import api

    if model is None or data is None or out is None or methods is None:
        raise _missing({"--model": model, "--data": data, "--out": out, "--methods": methods})
    loaded = api.new_study(model=model, data=data, methods=methods, rank=rank, device=device)
    _say(loaded.text)
    with _stoppable() as should_stop:
        return api.run(
            loaded,
            out=out,
            device=device,
            engine=engine.value,
            quiet=quiet,
            should_stop=should_stop,
        )


def _study(path: str) -> Any:
    from loratune.study.loading import load_study, parse_study

    if path == "-":
        return parse_study(sys.stdin.read(), name="<stdin>", folder=Path.cwd())
    return load_study(path)


def _print_answer(
    sweep: "Sweep", *, as_json: bool, further: "Sequence[Recommendation]" = ()
) -> None:
    """The curve, the recommendation, where the report is; exit code 1 if a trial failed.

    `further` are recommendations for larger models that the sweep was the proxy of.
    """
    from loratune import api
    from loratune.analyse.curves import make_curves
    from loratune.recommendation.searched import answered
    from loratune.report.text import curves_text, recommendation_text

    answers = api.recommend(sweep.folder.root)
    if as_json:
        body = {
            "folder": str(sweep.folder.root),
            "report": str(sweep.folder.root / "report.html"),
            "statuses": sweep.statuses(),
            "recommendations": [answer.to_json() for answer in (*answers, *further)],
        }
        _print(_json_of(body))
    else:
        parts = [curves_text(make_curves(answered(sweep.results)))]
        parts += [recommendation_text(answer) for answer in answers]
        parts += [
            f"The same, carried over to the larger {answer.model}:\n{recommendation_text(answer)}"
            for answer in further
        ]
        parts.append(f"report: {sweep.folder.root / 'report.html'}")
        _print("\n\n".join(parts))
    total = len(sweep.results)
    left = {
        f"{sweep.num_failed} of {total} trials failed; "
        f"`loratune results {sweep.folder.root}` says why": sweep.num_failed,
        f"{sweep.num_unfinished} of {total} trials are not finished": sweep.num_unfinished,
        f"{sweep.num_not_scored} scores are missing, as was said above": sweep.num_not_scored,
    }
    for said, count in left.items():
        if count:
            _say(f"loratune: {said}; running again tries them again")
    if any(left.values()):
        raise typer.Exit(1)


@contextmanager
def _stoppable() -> Generator[Callable[[], bool]]:
    """Ctrl-C once: stop at the next update, with a snapshot. Twice: stop at once."""
    from loratune.training import Interrupted

    asked = False

    def ask(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        _say("stopping after this update; Ctrl-C again stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    except Interrupted as error:
        _say(f"loratune: {error}")
        raise typer.Exit(130) from error
    except KeyboardInterrupt as error:
        _say("loratune: stopped at once; the same command goes on from the last snapshot")
        raise typer.Exit(130) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_table(table: "pd.DataFrame", *, format: "TableFormat", output: Path | None) -> None:
    """To a file, whole or not at all, or to stdout."""
    from loratune.analyse.tables import table_bytes

    content = table_bytes(table, format=format)
    if output is None:
        sys.stdout.buffer.write(content)
        return
    try:
        partial = output.with_name(output.name + ".partial")
        partial.write_bytes(content)
        partial.replace(output)
    except OSError as error:
        raise StoreError(f"{output} cannot be written: {error.strerror}") from error


def _json_of(value: object) -> str:
    return json.dumps(value, indent=2, allow_nan=False)


def _print(text: str) -> None:
    typer.echo(text)


def _say(text: str) -> None:
    typer.echo(text, err=True)


if __name__ == "__main__":
    main()
