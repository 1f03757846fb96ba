"""Numbers that are a pure function of what they belong to: a hash in the place of a generator.

So that whoever draws a number (dropout, a sampled token) draws the same whoever its neighbours are.
The hash is the finaliser of MurmurHash3 in 32 bits; torch's integers wrap.
"""

from torch import Tensor


def mixed(x: Tensor) -> Tensor:
    """A bijection of int32 in which every bit depends on every other; shifts are made logical."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * -2048144789  # 0x85ebca6b as int32
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * -1028477387  # 0xc2b2ae35 as int32
    return x ^ ((x >> 16) & 0xFFFF)
