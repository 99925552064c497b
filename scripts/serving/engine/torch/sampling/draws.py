"""The random number behind each token: a function of the request's seed and the output position.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
with Stafford's mixer 13), whose outputs can be computed in any order: output `i` of a generator
is `mix(state + (i + 1) * GAMMA)`. Each request has a generator of its own, whose first state is
the first output of the one that starts at the request's seed, so that neighbouring seeds have
nothing in common. Integer arithmetic on the host for a whole batch at once: the same numbers on
every machine and device.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_27, _SHIFT_30, _SHIFT_31 = np.uint64(27), np.uint64(30), np.uint64(31)
_SHIFT_11 = np.uint64(11)


def uniforms(seeds: Words, positions: Words) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) with 53 random bits, one for each pair (arguments are broadcast)."""
    words = split_mix(split_mix(seeds, np.uint64(0)), positions)
    return (words >> _SHIFT_11).astype(np.float64) * 2.0**-53


def split_mix(states: Words, index: Words | np.uint64) -> Words:
    """Output `index` (from 0) of SplitMix64 generators that start at `states`."""
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64
        z: Words = states + (index + np.uint64(1)) * _GAMMA
        z = (z ^ (z >> _SHIFT_30)) * _MIX_1
        z = (z ^ (z >> _SHIFT_27)) * _MIX_2
        return z ^ (z >> _SHIFT_31)
