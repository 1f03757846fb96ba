"""Whether many adapters at once answer as well as one by one, in 16 bits.

    python benchmarks/decoding_parity.py DIR --task gsm8k --data test.jsonl --json parity.json

DIR is a results folder that keeps adapters; the first eight answer every question twice, together
by the decoder and one after another by transformers' `generate`, greedily, over one base. In 16
bits two tokens that are almost equally likely may change places, and an answer goes another way
from there. So the two are held against each other by what they get right: parity is proven where
the 95% interval of the mean difference in accuracy, over adapters and questions, lies within half
a point (the crossed model with adapters in the place of seeds; `analyse.crossed`). The share of
texts that are equal stands beside it. Exit code 0: proven; 1: refuted; 3: undecided, or not all
is answered yet (`--minutes`; the same call goes on).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch

from kept_results import KeptResults, Minutes
from loratune.analyse.crossed import crossed_difference, not_too_certain
from loratune.analyse.intervals import Estimate
from loratune.data.prepare import turn_ends
from loratune.evaluation.answering import Asked, answer_all
from loratune.evaluation.questions import TaskQuestions
from loratune.evaluation.score import answer_questions, grade
from loratune.evaluation.tasks import ask, load_questions
from loratune.folder import ResultsFolder, open_results
from loratune.methods.attach_files import attach_files
from loratune.models.load import Base, load_base
from loratune.records import Answer, NotScored, Said
from loratune.study.loading import load_study
from loratune.study.schema import Source, Task, source_of
from loratune.workshop import choose_device, model_source

TOGETHER, ALONE = "together", "one by one"
# Of accuracy.
MARGIN = 0.005
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
EXIT_CODES = {HOLDS: 0, FAILS: 1, UNDECIDED: 3}


@dataclass(frozen=True)
class Answered:
    """One adapter's answers: the text and the verdict of each question, and the seconds."""

    texts: tuple[str, ...]
    correct: tuple[bool, ...]
    seconds: float


def answered_together(
    base: Base, adapters: Sequence[Path], questions: TaskQuestions
) -> list[Answered]:
    """All adapters in one pass of the decoder; the seconds are shared out evenly."""
    asked = [Asked(adapter, questions) for adapter in adapters]
    answers = [dict[int, Answer]() for _ in adapters]
    since = time.perf_counter()
    for event in answer_all(base, asked, engine="packed", remark=say):
        if isinstance(event, Said):
            answers[event.asked].update(event.answers)
        elif isinstance(event, NotScored):
            raise SystemExit(f"{adapters[event.asked]} can't be asked: {event.reason}")
    seconds = (time.perf_counter() - since) / len(adapters)
    return [judged([one[at] for at in sorted(one)], questions, seconds) for one in answers]


def answered_alone(
    base: Base, adapter: Path, questions: TaskQuestions, *, rows_per_batch: int
) -> Answered:
    """By `generate`, with the adapter in the base."""
    since = time.perf_counter()
    attached = attach_files(base.model, adapter)
    try:
        answers = answer_questions(base, questions, rows_per_batch=rows_per_batch)
    finally:
        attached.detach()
    return judged(answers, questions, time.perf_counter() - since)


def judged(answers: Sequence[Answer], questions: TaskQuestions, seconds: float) -> Answered:
    """The answers with their verdicts."""
    _, predictions = grade(list(answers), questions)
    return Answered(
        texts=tuple(one.text for one in answers),
        correct=tuple(one.verdict == "correct" for one in predictions),
        seconds=seconds,
    )


def verdict_of(estimate: Estimate) -> str:
    """Whether the interval lies within the margin, outside of it, or neither."""
    if estimate.low >= -MARGIN and estimate.high <= MARGIN:
        return HOLDS
    return FAILS if estimate.low > MARGIN or estimate.high < -MARGIN else UNDECIDED


def summary_of(results: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What came of adapters that answered both ways."""
    together, alone = ([results[f"{way}/{name}"] for name in names] for way in (TOGETHER, ALONE))
    first, second = (
        np.array([one["correct"] for one in ways], dtype=np.float64) for ways in (together, alone)
    )
    estimate = not_too_certain(crossed_difference(first, second, paired=True), first, second)
    equal = [
        a == b
        for one, two in zip(together, alone, strict=True)
        for a, b in zip(one["texts"], two["texts"], strict=True)
    ]
    return {
        "num_adapters": len(names),
        "num_questions": first.shape[1],
        "accuracy_together": float(first.mean()),
        "accuracy_alone": float(second.mean()),
        "difference": estimate.value,
        "difference_low": estimate.low,
        "difference_high": estimate.high,
        "margin": MARGIN,
        "share_of_equal_texts": float(np.mean(equal)),
        "share_of_equal_verdicts": float((first == second).mean()),
        "seconds_together": float(sum(one["seconds"] for one in together)),
        "seconds_alone": float(sum(one["seconds"] for one in alone)),
        "verdict": verdict_of(estimate),
    }


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", default="gsm8k")
    parser.add_argument("--data", help="the questions, where they are not the task's own")
    parser.add_argument("--questions", type=int, help="the first so many")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rows", type=int, default=512, help="questions at once, one by one")
    parser.add_argument("--device")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()

    place, store, record = open_results(chosen.folder)
    with store:
        results = store.results(record.name, with_losses=False)
    kept_adapters = [one for one in results if place.adapter(one.trial.trial_id).is_dir()]
    wanted = kept_adapters[: chosen.adapters]
    if len(wanted) < chosen.adapters:
        raise SystemExit(
            f"{chosen.folder} keeps {len(wanted)} adapters; expected {chosen.adapters}: set "
            "keep_adapters: all in the study, or give --adapters"
        )
    names = [one.trial.trial_id for one in wanted]
    base, questions = _prepared(place, chosen, model=wanted[0].trial.model)
    kept = KeptResults(
        chosen.json,
        settings={"task": questions.task, "questions": len(questions.prompts), "names": names},
        about={
            "model": wanted[0].trial.model,
            "precision": str(base.model.dtype),
            "device": _device_name(base.device),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        },
    )
    minutes = Minutes(chosen.minutes)
    folders = [place.adapter(name) for name in names]
    if not all(f"{TOGETHER}/{name}" in kept for name in names):
        for name, one in zip(names, answered_together(base, folders, questions), strict=True):
            kept.add(f"{TOGETHER}/{name}", vars(one))
    for name, folder in zip(names, folders, strict=True):
        if f"{ALONE}/{name}" in kept:
            continue
        if not minutes.allow(ALONE):
            say("the minutes are over; the same call goes on")
            return EXIT_CODES[UNDECIDED]
        one = answered_alone(base, folder, questions, rows_per_batch=chosen.rows)
        minutes.took(ALONE, one.seconds)
        kept.add(f"{ALONE}/{name}", vars(one))
        say(f"{name}: {one.seconds:.1f} s")
    summary = summary_of(kept.results, names)
    kept.write(summary=summary)
    for name, value in summary.items():
        print(f"{name}: {value}")
    return EXIT_CODES[summary["verdict"]]


def _prepared(
    place: ResultsFolder, chosen: argparse.Namespace, *, model: str
) -> tuple[Base, TaskQuestions]:
    """The study's base, and the task with the study's own prompt."""
    study = load_study(place.study).study
    base = load_base(
        model_source(model, folder=place.root),
        precision=study.precision,
        device=choose_device(chosen.device),
    )
    data = None if chosen.data is None else str(Path(chosen.data).absolute())
    given = Task(
        name=chosen.task,
        data=None if data is None else Source.model_validate(source_of(data)),
        questions=chosen.questions,
        max_new_tokens=chosen.max_new_tokens,
    )
    questions = ask(
        given,
        load_questions(given, folder=place.root),
        data=study.data,
        tokenizer=base.tokenizer,
        folder=place.root,
        end_ids=turn_ends(study.data, tokenizer=base.tokenizer),
    )
    return base, questions


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(main())
