"""Answers that are programs: the code in them, and their verdicts by running the tests.

The post-processing is the one that PiSSA published for HumanEval: the fenced python block, cut at
`if __name__ == "__main__":`, at `# Example usage` and at the first `assert`, in whatever word or
line it stands. It is crude on purpose: it exists to reproduce published numbers. The code follows
the prompt (a prompt that ends within a function is continued, or the function is defined anew), as
in HumanEval's own harness (Chen et al. 2021, arXiv 2107.03374).

How a program is kept apart and judged is the sandbox's affair.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loratune.errors import EvaluationError
from loratune.evaluation.graders import Verdict
from loratune.evaluation.sandbox import Check, Isolation, Judgement, Limits, judge_programs

_BLOCK = re.compile(r"```([\w+-]*)[ \t]*\r?\n(.*?)(```|\Z)", re.DOTALL)
_LANGUAGES = ("", "python", "python3", "py")
_CUTS = ('if __name__ == "__main__":', "# Example usage", "assert")


@dataclass(frozen=True, slots=True)
class CodeReference:
    """What judges an answer: `sandbox.Check` without the program, and what stands before the code.

    As a text (`to_text`) it is a question's reference.
    """

    prefix: str
    tests: str
    names: tuple[str, ...]
    setup: str

    def to_text(self) -> str:
        """JSON, the same for equal references."""
        return json.dumps(asdict(self), sort_keys=True)


def read_reference(text: str) -> CodeReference:
    """The reference that `CodeReference.to_text` wrote.

    Raises:
        EvaluationError: the text is none.
    """
    try:
        fields: dict[str, Any] = json.loads(text)
        fields["names"] = tuple(fields["names"])
        return CodeReference(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise EvaluationError(
            f"reference {text[:40]!r} holds no tests; expected the JSON of a CodeReference"
        ) from error


def extract_code(text: str) -> tuple[str, bool]:
    """The code in an answer, and whether it has an end: a closing fence or one of the cuts.

    An answer without a fenced block is code from its first character. Of several blocks of
    Python, or of no language, the first counts.
    """
    blocks = (one for one in _BLOCK.finditer(text) if one[1].lower() in _LANGUAGES)
    block = next(blocks, None)
    code, has_end = (block[2], bool(block[3])) if block else (text, False)
    for cut in _CUTS:
        code, marker, _ = code.partition(cut)
        has_end = has_end or bool(marker)
    return code, has_end


def program_of(text: str, reference: CodeReference) -> str:
    """The program that an answer makes with its prompt."""
    prefix = reference.prefix
    code, _ = extract_code(text)
    return prefix + ("" if prefix.endswith("\n") or not prefix else "\n") + code


def grade_code(
    texts: Sequence[str],
    references: Sequence[str | None],
    *,
    finished: Sequence[bool],
    isolation: Isolation,
    limits: Limits | None = None,
    workers: int | None = None,
) -> list[tuple[Verdict, str]]:
    """A verdict for each answer, with the reason of those that are not correct.

    Args:
        texts: the whole answers, as they were generated.
        references: of their questions, in the same order; None is an error, as for other graders.
        finished: False where the answer ran into the token limit. It is `truncated` then, unless
            it passes, or the limit came after the end of its code: then it is wrong.
        isolation: see `sandbox.choose_isolation`.
        limits: of each program; None: the sandbox's own.
        workers: programs at once; None: one a core.

    Raises:
        EvaluationError: a reference is not one of a code task.
    """
    asked = [
        (index, read_reference(reference))
        for index, reference in enumerate(references)
        if reference is not None
    ]
    checks = [
        Check(program_of(texts[index], one), one.tests, one.names, one.setup)
        for index, one in asked
    ]
    judgements = judge_programs(
        checks, isolation=isolation, limits=limits or Limits(), workers=workers
    )
    verdicts: list[tuple[Verdict, str]] = [("error", "the question has no tests")] * len(texts)
    for (index, _), judgement in zip(asked, judgements, strict=True):
        verdicts[index] = _verdict(judgement, texts[index], finished=finished[index])
    return verdicts


def _verdict(judgement: Judgement, text: str, *, finished: bool) -> tuple[Verdict, str]:
    if judgement.verdict == "wrong" and not finished and not extract_code(text)[1]:
        return "truncated", judgement.reason
    return judgement.verdict, judgement.reason
