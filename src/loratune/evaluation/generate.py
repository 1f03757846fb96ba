"""Greedy answers of one model to many prompts, through transformers' own `generate`.

Slow and obvious on purpose: one model at a time, batches of a fixed number of rows. A batched
generator over many adapters can be checked against it. An answer depends on its prompt alone: in
float32 the batch a prompt is in does not move it (tested). In bfloat16 or float16 the neighbours
move the last bits of the logits, so two tokens that are almost equally likely may change places.

Nothing here knows tasks, graders or adapters; an adapter that is attached to `base.model` answers.

Shapes: B prompts of one batch, T tokens of the longest of them, plus what was generated.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from loratune.engine.decoding_text import answer_of, decoded, end_ids_of
from loratune.errors import EvaluationError
from loratune.models.load import Base, positions_of
from loratune.records import NO_ANSWER, Answer

# transformers' tokenizers, configurations and `generate` are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false


def generate_answers(
    base: Base,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    end_ids: Sequence[int] = (),
    rows_per_batch: int = 16,
) -> list[Answer]:
    """The greedy answers to prompts, in their order.

    Sampling settings, penalties and limits that the model ships (generation_config.json) play no
    part; its EOS tokens do, all of them, beside the tokenizer's own. The model is in eval mode
    meanwhile.

    Args:
        base: the model, with whatever adapter is attached to it, and its tokenizer.
        prompt_ids: complete prompts as tokens, each with at least one.
        max_new_tokens: an answer that has not ended after so many is cut.
        stop: texts that end an answer where the first of them appears.
        end_ids: further tokens that end an answer, as EOS does.
        rows_per_batch: prompts answered at once; for speed and memory alone.

    Raises:
        EvaluationError: as `check_room` says.
    """
    check_room(base.model, prompt_ids, max_new_tokens=max_new_tokens)
    all_end_ids = end_ids_of(base, end_ids)
    # Prompts of like length share a batch, the longest first: what does not fit in memory shows
    # at once.
    order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
    answers: dict[int, Answer] = {}
    with _plain_generation(base.model):
        for begin in range(0, len(order), rows_per_batch):
            chosen = order[begin : begin + rows_per_batch]
            batch = _answer_batch(
                base,
                [prompt_ids[index] for index in chosen],
                max_new_tokens=max_new_tokens,
                stop=stop,
                end_ids=all_end_ids,
            )
            answers.update(zip(chosen, batch, strict=True))
    return [answers[index] for index in range(len(prompt_ids))]


def check_room(
    model: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], *, max_new_tokens: int
) -> None:
    """Make sure that every prompt and its longest answer fit into the model's positions.

    Raises:
        EvaluationError: `max_new_tokens` is below 1, a prompt has no token, or the longest prompt
            leaves too little room.
    """
    if max_new_tokens < 1:
        raise EvaluationError(f"max_new_tokens={max_new_tokens}; give at least 1")
    for index, ids in enumerate(prompt_ids):
        if not ids:
            raise EvaluationError(
                f"prompt {index} has no token, and an answer has to start from one; "
                "give the task a prompt that is not empty"
            )
    longest = max((len(ids) for ids in prompt_ids), default=0)
    positions = positions_of(model.config)
    if positions is not None and longest + max_new_tokens > positions:
        left = positions - longest
        advice = f"choose at most {left}" if left > 0 else "shorten the prompt"
        raise EvaluationError(
            f"max_new_tokens={max_new_tokens} and the longest prompt of {longest} tokens exceed "
            f"the model's {positions} positions; {advice}"
        )


def _answer_batch(
    base: Base,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    end_ids: Sequence[int],
) -> list[Answer]:
    model, tokenizer = base.model, base.tokenizer
    # Masked before a prompt and cut off after an answer: any id serves.
    pad_id = 0
    width = max(len(ids) for ids in prompt_ids)
    input_ids_BT = torch.tensor([[pad_id] * (width - len(ids)) + [*ids] for ids in prompt_ids])
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    watch = _Watch(len(prompt_ids), device=model.device)
    stopping = _StopAtText(tokenizer, stop, prompt_width=width, num_rows=len(prompt_ids))
    # transformers puts `generate` on the models' own classes, so their base class lacks it.
    generate = cast("Any", model).generate
    generated_BT: Tensor = generate(
        input_ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_ids) or None,
            pad_token_id=pad_id,
            use_cache=True,
        ),
        logits_processor=LogitsProcessorList([watch]),
        stopping_criteria=StoppingCriteriaList([stopping] if stop else []),
    )
    rows: list[list[int]] = generated_BT[:, width:].tolist()
    answers: list[Answer] = []
    for row, stopped_after, num_good in zip(
        rows, stopping.num_tokens, watch.num_good_B.tolist(), strict=True
    ):
        ended_after = next((t + 1 for t, one in enumerate(row) if one in end_ids), None)
        ends = [end for end in (stopped_after, ended_after) if end is not None]
        num_tokens = min(ends, default=len(row))
        if num_good < num_tokens:
            answers.append(NO_ANSWER)
            continue
        answers.append(
            answer_of(tokenizer, row[:num_tokens], stop=stop, end_ids=end_ids, finished=bool(ends))
        )
    return answers


class _Watch(LogitsProcessor):
    """Changes nothing; `num_good_B`: each row's tokens before the first without finite logits."""

    def __init__(self, num_rows: int, *, device: torch.device) -> None:
        self._num_steps = 0
        self.num_good_B = torch.full((num_rows,), torch.iinfo(torch.int64).max, device=device)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        # The highest of a row with a NaN is one. What was chosen by it is not looked at here, so
        # that the device is not waited for.
        is_bad_B = ~scores.amax(dim=-1).isfinite()
        self.num_good_B = torch.where(
            is_bad_B, self.num_good_B.clamp(max=self._num_steps), self.num_good_B
        )
        self._num_steps += 1
        return scores


class _StopAtText(StoppingCriteria):
    """Ends a row once its text holds a stop string, and remembers after how many tokens.

    The whole answer is decoded anew at every token: a stop string may begin and end inside tokens,
    and only the text itself tells.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        *,
        prompt_width: int,
        num_rows: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._prompt_width = prompt_width
        self.num_tokens: list[int | None] = [None] * num_rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        generated: list[list[int]] = input_ids[:, self._prompt_width :].tolist()
        for index, row in enumerate(generated):
            if self.num_tokens[index] is None:
                text = decoded(self._tokenizer, row)
                if any(one in text for one in self._stop):
                    self.num_tokens[index] = len(row)
        is_done = [num_tokens is not None for num_tokens in self.num_tokens]
        return cast("torch.BoolTensor", torch.tensor(is_done, device=input_ids.device))


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Generator[None]:
    """Eval mode, and no shipped generation settings, until the end.

    `generate` fills whatever its own configuration leaves open from the model's, so that a shipped
    repetition penalty, say, would still apply: the model's has to be empty meanwhile.
    """
    shipped = model.generation_config
    training = [module for module in model.modules() if module.training]
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = shipped
        for module in training:
            module.training = True
