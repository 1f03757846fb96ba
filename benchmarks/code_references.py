"""Every reference solution of HumanEval and sanitized MBPP passes its own tests in the sandbox.

    python benchmarks/code_references.py --humaneval HumanEval.jsonl --mbpp sanitized-mbpp.json

Prints the verdicts and the seconds for each isolation that works here; exit code 1 if one fails.
The data sets are not shipped. A file may end with .gz.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from time import perf_counter

from loratune.data.sources import read_rows
from loratune.evaluation import humaneval, mbpp
from loratune.evaluation.code_answers import grade_code
from loratune.evaluation.sandbox import available_isolations
from loratune.study.schema import Source


def grade_references(task, field: str, path: Path, isolation, workers: int | None = None):
    """The verdicts of a data set's own solutions, with their reasons, and the rows."""
    source = Source(file=str(path.resolve()))
    questions = task.load(source, Path())
    rows = read_rows(source, folder=Path())
    verdicts = grade_code(
        [f"```python\n{row[field]}\n```" for row in rows],
        [question.reference for question in questions],
        finished=[True] * len(rows),
        isolation=isolation,
        workers=workers,
    )
    return verdicts, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--humaneval", type=Path)
    parser.add_argument("--mbpp", type=Path)
    parser.add_argument("--workers", type=int, help="programs at once; left out: one a core")
    arguments = parser.parse_args()
    is_complete = True
    for isolation in available_isolations():
        for task, field, path in (
            (humaneval, "canonical_solution", arguments.humaneval),
            (mbpp, "code", arguments.mbpp),
        ):
            if path is None:
                continue
            begin = perf_counter()
            verdicts, rows = grade_references(task, field, path, isolation, arguments.workers)
            counts = Counter(verdict for verdict, _ in verdicts)
            result = {
                "isolation": isolation.kind,
                "user_namespace": isolation.with_user,
                "data": path.name,
                "total": len(rows),
                **counts,
                "seconds": round(perf_counter() - begin, 1),
            }
            print(json.dumps(result), flush=True)
            for (verdict, reason), row in zip(verdicts, rows, strict=True):
                if verdict != "correct":
                    print(f"  {row['task_id']}: {verdict}: {reason}")
            is_complete = is_complete and counts["correct"] == len(rows)
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
