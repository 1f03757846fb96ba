"""A bridge to lm-evaluation-harness: its tasks, asked of a base with whatever adapter is attached.

The harness is an optional package. It writes prompts, reads answers and counts; this file only says
what a model says, as the harness's own Hugging Face model (HFLM) would: prompts are tokenised as
the tokenizer does it, with a BOS where it adds one, and what is too long for the model loses its
first tokens, which a warning says. Greedy decoding alone: a task that samples is refused, and one
with a setting that would change greedy answers (beams, penalties). So is a model whose logits are
not finite: the harness knows right and wrong alone, and would count the first choice as said.
"""

# lm_eval is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportMissingTypeStubs=false, reportMissingParameterType=false

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from loratune.errors import EvaluationError, LoratuneError, one_line
from loratune.evaluation.generate import generate_answers
from loratune.evaluation.likelihood import Continuation, log_likelihoods
from loratune.evaluation.score import NOT_FINITE
from loratune.models.load import Base, positions_of
from loratune.records import NO_ANSWER

# What the harness's own models take where a task says nothing.
DEFAULT_MAX_NEW_TOKENS = 256
_DEFAULT_MAX_LENGTH = 2048
# Settings that greedy decoding does not look at, and the values at which others change nothing.
OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
OF_BEAMS = ("length_penalty", "early_stopping")
NEUTRAL: Mapping[str, float] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
}


def manager_of(tasks: Sequence[str], *, include_path: str | None = None) -> TaskManager:
    """The harness's manager, after it has loaded the tasks and their data once.

    Args:
        tasks: names of the harness's tasks.
        include_path: a folder with task files of the user's own.

    Raises:
        EvaluationError: none is named, no such task or folder, or a task that cannot be loaded.
    """
    if not tasks:
        raise EvaluationError("no task is named; `lm-eval ls tasks` lists the harness's own")
    if include_path is not None and not Path(include_path).is_dir():
        raise EvaluationError(
            f"include path {include_path} is no folder; give one that holds task files"
        )
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise EvaluationError(
            f"task {unknown[0]!r} is none of lm-evaluation-harness's; `lm-eval ls tasks` lists them"
        )
    for name in tasks:
        try:
            manager.load([name])
        except Exception as error:  # A task's file and its data can fail in any way.
            raise EvaluationError(
                f"lm-evaluation-harness cannot load task {name}: {one_line(error, most=300)}; "
                "check its file, its data, and the network"
            ) from error
    return manager


def run_harness(
    base: Base,
    tasks: Sequence[str],
    *,
    manager: TaskManager,
    adapter: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
) -> dict[str, dict[str, Any]]:
    """The harness's own results by task: metric, filter and standard error as it names them.

    Args:
        base: the model, with whatever adapter is attached to it.
        tasks: names of the harness's tasks.
        manager: see `manager_of`.
        adapter: what is attached, for messages.
        num_fewshot: worked examples before each question; None: the task's own.
        limit: the first so many questions of each task; None: all.
        chat: put prompts into the tokenizer's chat template.

    Raises:
        EvaluationError: a task that samples or that the harness cannot ask, or a model whose logits
            are not finite.
    """
    evaluate: Any = simple_evaluate
    try:
        found = evaluate(
            model=HarnessModel(base, adapter=adapter),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
        )
    except LoratuneError:
        raise
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"lm-evaluation-harness cannot run {', '.join(tasks)}: {one_line(error, most=300)}"
        ) from error
    return cast("dict[str, dict[str, Any]]", found["results"])


def _warn_of_cuts(num_cut: int, num_asked: int, *, most: int) -> None:
    if num_cut:
        logging.getLogger(__name__).warning(
            "%d of %d texts are longer than the %d tokens that the model has room for; only their "
            "last ones were asked, as lm-evaluation-harness does",
            num_cut,
            num_asked,
            most,
        )


class HarnessModel(TemplateLM):
    """A base as the harness asks models."""

    def __init__(self, base: Base, *, adapter: str | None = None) -> None:
        """`adapter`: what is attached to the base, for messages."""
        super().__init__()
        self._base = base
        self._who = base.source if adapter is None else adapter
        self.tokenizer: Any = base.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """How many tokens go through the model at once, prompt and answer together."""
        positions = positions_of(self._base.model.config)
        if positions is None:
            stated = int(self.tokenizer.model_max_length)
            positions = stated if stated < VERY_LARGE_INTEGER else _DEFAULT_MAX_LENGTH
        return positions

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's cache of chats."""
        return self._base.source.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as one text."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """A text as tokens; a BOS that it holds already is not added again."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = list[Continuation]()
        num_cut = 0
        for _, before, after in requests:
            # The last token is only asked for, so that one more than the positions fits; a token of
            # the context has to stay.
            if len(after) > self.max_length:
                raise EvaluationError(
                    f"a continuation of {len(after)} tokens exceeds the model's {self.max_length} "
                    "positions; leave its question out"
                )
            kept = (*before, *after)[-(self.max_length + 1) :]
            num_cut += len(kept) < len(before) + len(after)
            asked.append(Continuation(kept[: -len(after)], kept[-len(after) :]))
        _warn_of_cuts(num_cut, len(asked), most=self.max_length + 1)
        found = log_likelihoods(self._base, asked)
        if any(math.isnan(one.value) for one in found):
            raise self._not_finite()
        return [(one.value, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of each whole text, window after window where it is longer than the model's positions."""
        values = list[float]()
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(one) for one in windows]
            found = self._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
            values.append(sum(value for value, _ in found))
        return values

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each cut before the first of its stop strings."""
        answers = dict[int, str]()
        alike = dict[tuple[tuple[str, ...], int], list[int]]()
        for index, request in enumerate(requests):
            _, options = request.args
            settings = _greedy_settings(options, task=request.task_name)
            alike.setdefault(settings, []).append(index)
        for (stop, limit), indices in alike.items():
            room = self.max_length - limit
            if room < 1:
                raise EvaluationError(
                    f"task {requests[indices[0]].task_name} asks for answers of up to {limit} "
                    f"tokens, which leaves no room for a prompt in the model's {self.max_length} "
                    "positions; lower max_gen_toks in the task's generation_kwargs"
                )
            whole = [self.tok_encode(requests[index].args[0]) for index in indices]
            prompts = [ids[-room:] for ids in whole]
            _warn_of_cuts(sum(len(ids) > room for ids in whole), len(whole), most=room)
            said = generate_answers(self._base, prompts, max_new_tokens=limit, stop=stop)
            if NO_ANSWER in said:
                raise self._not_finite()
            answers.update((index, one.text) for index, one in zip(indices, said, strict=True))
        return [answers[index] for index in range(len(requests))]

    def _not_finite(self) -> EvaluationError:
        return EvaluationError(
            f"{self._who} has no score by lm-evaluation-harness, which has no verdict for this: "
            f"{NOT_FINITE}"
        )


def _greedy_settings(
    options: Mapping[str, Any], *, task: str | None
) -> tuple[tuple[str, ...], int]:
    """Stop strings and the limit of new tokens, read from a task's generation_kwargs as HFLM does.

    Raises:
        EvaluationError: the task samples, or says what would change greedy answers.
    """
    try:
        settings: dict[str, Any] = dict(normalize_gen_kwargs({**options}, DEFAULT_MAX_NEW_TOKENS))
        temperature = float(settings.get("temperature", 1))
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"task {task}: generation_kwargs {options} cannot be read ({error}); correct them"
        ) from error
    if settings.pop("do_sample") and temperature > 0:
        raise EvaluationError(f"task {task} samples ({options}); loratune decodes greedily")
    stop: list[str] = settings.pop("until")
    limit: int = settings.pop("max_gen_toks")
    changing = [
        name
        for name, value in settings.items()
        if name not in (*OF_SAMPLING, *OF_BEAMS)
        and value is not None
        and value != NEUTRAL.get(name)
    ]
    if changing:
        raise EvaluationError(
            f"task {task} asks for {', '.join(changing)} in its generation_kwargs ({options}), "
            "which greedy decoding one token at a time does not have; leave it out"
        )
    return tuple(one for one in stop if one), limit
