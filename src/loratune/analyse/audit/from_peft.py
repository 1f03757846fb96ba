"""PEFT's method_comparison result files (one JSON for each run) as rows for the audit.

Each file has `run_info` (train_config, peft_config), `train_info` (status, metrics), `meta_info`.
The last entry of the metrics is the final one; validation accuracy is the last that was measured.
The files do not say how many test questions there were; where the data are GSM8K, whose test set
has 1,319, that is used if every accuracy is a whole number of them.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from loratune.analyse.audit.rows import AuditRow, AuditTable, TaskScore, effective_scale
from loratune.errors import DataError

MOST_BYTES = 16 * 2**20
MOST_FILES = 10_000
GSM8K_TEST_QUESTIONS = 1319
# Versions and places, which are no choice of the comparison.
_NO_SETTING = frozenset(
    {"peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type"}
)

Json = dict[str, Any]


def read_peft(paths: Sequence[Path]) -> AuditTable:
    """The rows of PEFT's result files, in the order of the paths.

    Raises:
        DataError: too many files, one that is too large or no JSON, or one without the sections
            that PEFT writes.
    """
    if len(paths) > MOST_FILES:
        raise DataError(f"{len(paths):,} files; at most {MOST_FILES:,} are read")
    read = [_read(path) for path in paths]
    accuracies = [score.accuracy for one in read for score in one.row.tests]
    gsm8k = bool(accuracies) and all("gsm8k" in one.data for one in read)
    whole = gsm8k and all(_is_count(one, GSM8K_TEST_QUESTIONS) for one in accuracies)
    remarks = list[str]()
    if whole:
        remarks.append(
            "the files do not say how many test questions there were; taken as GSM8K's "
            f"{GSM8K_TEST_QUESTIONS:,}, of which every accuracy is a whole number"
        )
    decays = Counter(one.weight_decay for one in read)
    if len(decays) > 1:
        # No part of a cell: the files that state a learning rate of their own lose it with it.
        remarks.append(
            "weight decay is not the same in all files: "
            + ", ".join(
                f"{'the default of the optimizer' if decay is None else f'{decay:g}'} in {count}"
                for decay, count in decays.most_common()
            )
        )
    rows = tuple(_with_total(one.row) if whole else one.row for one in read)
    return AuditTable("PEFT method_comparison results", rows, tuple(remarks))


@dataclass(frozen=True, slots=True)
class _File:
    """The row of one file, and what is said of all files together: data sets and weight decay."""

    row: AuditRow
    data: tuple[str, ...]
    weight_decay: float | None


def _read(path: Path) -> _File:
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise DataError(
            f"{path} has {size / 2**20:,.0f} MiB; at most {MOST_BYTES // 2**20} MiB are read"
        )
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); expected a PEFT result file") from error
    try:
        return _file(path, _object(content))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is no PEFT result file ({type(error).__name__}: {error}); "
            "expected run_info, train_info and meta_info as method_comparison writes them"
        ) from error


def _file(path: Path, content: Json) -> _File:
    run, train = _object(content["run_info"]), _object(content["train_info"])
    config = _object(run["train_config"])
    peft = _object(run.get("peft_config") or {})
    data = _object(_object(content.get("meta_info") or {}).get("dataset_info") or {})
    metrics = [_object(one) for one in cast("list[object]", train["metrics"])]
    final = metrics[-1] if metrics else {}
    held_out = [one["valid accuracy"] for one in metrics if "valid accuracy" in one]
    succeeded = train["status"] == "success"
    optimizer = _object(config.get("optimizer_kwargs") or {})
    method = _method(peft, str(config.get("optimizer_type") or "AdamW"))
    # AdaLoRA ignores `r`: it starts with `init_r`, and divides alpha by the rank that is left.
    rank = _whole(peft.get("init_r") if peft.get("peft_type") == "ADALORA" else peft.get("r"))
    alpha = _number(peft.get("lora_alpha"))
    other = {key: value for key, value in peft.items() if key not in _NO_SETTING}
    other |= {"schedule": config.get("lr_scheduler"), "max_steps": config.get("max_steps")}
    row = AuditRow(
        where=path.name,
        method=method,
        model=str(config["model_id"]),
        other=json.dumps({key: _in_order(value) for key, value in other.items()}, sort_keys=True),
        rank=rank,
        alpha=alpha,
        scale=effective_scale(method, rank, alpha),
        batch_size=_whole(config["batch_size"]),
        learning_rate=_number(optimizer.get("lr")),
        seed=_whole(config.get("seed")),
        num_updates=_whole(final.get("step")),
        num_samples=_whole(final.get("train samples")),
        train_loss=_number(final.get("train loss")),
        validation_accuracy=_accuracy(held_out[-1]) if held_out and succeeded else None,
        tests=(
            (TaskScore("test", _accuracy(final["test accuracy"]), None),)
            if succeeded and "test accuracy" in final
            else ()
        ),
        failed=not succeeded,
    )
    return _File(row, tuple(data), _number(optimizer.get("weight_decay")))


def _method(peft: Mapping[str, Any], optimizer: str) -> str:
    """The PEFT type with its variants: `lora(use_dora)`, `lora(init=pissa)`, `lora(lora-fa)`."""
    if not peft:
        return "full fine-tuning"
    variants = sorted(key for key, value in peft.items() if key.startswith("use_") and value)
    started = peft.get("init_lora_weights")
    if isinstance(started, str):
        variants.append(f"init={started}")
    if optimizer.lower() != "adamw":
        variants.append(optimizer)
    name = str(peft["peft_type"]).lower()
    return f"{name}({', '.join(variants)})" if variants else name


def _in_order(value: object) -> object:
    """A list of names sorted: PEFT writes sets of modules, in any order."""
    if not isinstance(value, list):
        return value
    return sorted(str(one) for one in cast("list[object]", value))


def _with_total(row: AuditRow) -> AuditRow:
    tests = tuple(TaskScore(one.task, one.accuracy, GSM8K_TEST_QUESTIONS) for one in row.tests)
    return replace(row, tests=tests)


def _is_count(accuracy: float, total: int) -> bool:
    return abs(accuracy * total - round(accuracy * total)) < 1e-6


def _object(value: object) -> Json:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {type(value).__name__}")
    return cast("Json", value)


def _number(value: object) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _accuracy(value: object) -> float:
    number = _number(value)
    if number is None or not 0 <= number <= 1:
        raise ValueError(f"an accuracy of {value!r}, expected a fraction from 0 to 1")
    return number


def _whole(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None
