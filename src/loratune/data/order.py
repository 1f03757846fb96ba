"""Which row trains when: a seed's endless stream of permutations of the rows.

The stream depends on the seed and the number of rows alone, so that trials with equal seeds see
equal rows in equal order whatever their method, LR or batch size, and a resumed trial finds its
place by a number. When steps outlast the data a new permutation begins.

A permutation sorts the raw 64-bit words of numpy's PCG64, because numpy promises that the words of
a bit generator and the expansion of a `SeedSequence` never change between versions, and does not
promise that of `Generator.permutation` (NEP 19).
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Keeps these draws apart from every other use of a trial's seed. Any number would do.
_DOMAIN = 0x6F726465  # "orde"


def row_order(seed: int, *, num_rows: int, start: int, count: int) -> NDArray[np.int64]:
    """Positions start ... start + count of the stream, int64[count], each in range(num_rows).

    Any slice costs the permutations that it touches, never those before; the latest are kept.
    """
    if num_rows < 1 or start < 0 or count < 0:
        raise ValueError(f"num_rows={num_rows}, start={start}, count={count} make no slice")
    order = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        epoch, first = divmod(start + filled, num_rows)
        part = permutation(seed, num_rows=num_rows, epoch=epoch)[first : first + count - filled]
        order[filled : filled + len(part)] = part
        filled += len(part)
    return order


# As many as trials train at once, each with a seed of its own.
@lru_cache(maxsize=256)
def permutation(seed: int, *, num_rows: int, epoch: int) -> NDArray[np.int64]:
    """The stream's permutation number `epoch`, read-only int64[num_rows]."""
    words = np.random.PCG64(np.random.SeedSequence([_DOMAIN, seed, epoch])).random_raw(num_rows)
    permuted = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    permuted.flags.writeable = False
    return permuted
