"""Which trials train together and which rows make a step. Pure: no torch, no GPU, no clock.

A step holds at most a fixed number of tokens. Every trial in a slot gives the rows that its batch
under way still needs, no more: the next batch must see the weights after this one's update. A trial
of small batches therefore gives few rows a step, however long it has to train, and one of large
batches fills what is left. So slots go to the trials with the most updates first, except that one
or more are filled from the other end while the slots together cannot fill a step.

Which trials share a step never changes which rows a trial sees, or in which order it updates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loratune.records import Trial

# A gradient is summed over at most so many tokens by one kernel program, then over its chunks in
# order: enough programs where one slot has all the tokens, and the same sum at every repeat.
TOKENS_SUMMED_AT_ONCE = 1024
# Logits of so many numbers are made at once.
LOGITS_AT_ONCE = 2**27
# Precisions of a base that the packed engine does not have, and why.
NOT_PACKED = {
    "int8": "LLM.int8 rounds activations as well, so that a product with unpacked weights would be "
    "another number"
}


def logit_rows(vocab_size: int) -> int:
    """How many target tokens go through the output head at once."""
    return max(256, LOGITS_AT_ONCE // vocab_size)


@dataclass(frozen=True, slots=True)
class PackShape:
    """What a packed engine allocates for: fixed while it runs.

    `tokens_per_step` bounds the tokens that go through the model at once. `rank` is the largest of
    the trials. `corrected`, `magnitudes` and `dropout` say whether any trial of the pack takes a
    part out of the base, trains DoRA's magnitudes, or drops features; `probed`, whether gradients
    of single rows are looked at in some steps.
    """

    num_slots: int
    tokens_per_step: int
    rank: int
    corrected: bool = False
    magnitudes: bool = False
    dropout: bool = False
    gradient_checkpointing: bool = False
    probed: bool = False


@dataclass(frozen=True, slots=True)
class Demand:
    """What one slot could give to the next step.

    `row_tokens` are the lengths of the rows that its batch under way still needs, in their order;
    `updates_left` counts that batch.
    """

    slot: int
    updates_left: int
    row_tokens: Sequence[int]


def fill_step(demands: Sequence[Demand], *, tokens: int, rows: int) -> dict[int, int]:
    """How many of its next rows each slot gives; slots that give none are left out.

    Trials with the most updates left come first: they decide when the pack is done. At least one
    row is taken, if there is one.

    Args:
        demands: what each slot could give.
        tokens: the most tokens of a step.
        rows: the most rows of a step.
    """
    taken = dict[int, int]()
    left = tokens
    for demand in sorted(demands, key=lambda one: (-one.updates_left, one.slot)):
        count = used = 0
        for length in demand.row_tokens:
            if used + length > left or count == rows:
                break
            count, used = count + 1, used + length
        if count:
            taken[demand.slot] = count
            left -= used
            rows -= count
    if not taken and demands:
        # A row that is longer than a step goes alone.
        taken[demands[0].slot] = 1
    return dict(sorted(taken.items()))


def choose_next(
    waiting: Sequence[Trial], active: Sequence[Trial], *, tokens: int, mean_row_tokens: float
) -> Trial:
    """Which of the waiting trials to put into a free slot.

    The one with the most updates, unless the slots together cannot fill a step: then the one with
    the largest batch. Ties go to the plan's order.
    """
    rows_wanted = sum(trial.batch_size for trial in active)
    if rows_wanted * mean_row_tokens < tokens:
        return max(waiting, key=lambda trial: trial.batch_size)
    return max(waiting, key=lambda trial: trial.num_updates)
