"""How many rows travel at once: the buffers of an exchange, from static sizes alone.

Axes: T tokens of a rank, K choices per token, P ranks, N slots per rank, D embedding width. The
even share is T·K / P rows, what each rank sends each other one if all do alike.

Buffers travel whole, filled or not, so a snug one is tried first; the worst case, all tokens of a
rank to one other, is P even shares, for which no GPU has memory where ranks are many.
"""

import math
from typing import NamedTuple

IMPLEMENTATIONS = ("waves", "all_gather", "ragged")

# Of a large batch, in even shares. Where replicas level the pairs of ranks the first one does;
# without them chance moves a share of 1,024 by less than an eighth, at four standard deviations;
# what domains move it by, the others nearly always cover.
_OF_LARGE = (1.0625, 1.125, 1.25, 1.5)
# Of a small one, whose time is that of reading weights, each wave would read them anew: so larger
# ones, in multiples of twice the share or of what five standard deviations make of it.
_OF_SMALL, _DEVIATIONS = (1, 2, 4), 5
# Where only full rows travel, nothing but memory is lost by a large one.
_OF_RAGGED = (4.0,)
# Rows for each rank, or numbers for all of them, from which a batch is large.
_LARGE_SHARE, _LARGE_BATCH = 1024, 1 << 26
# To choose a buffer the host waits for the device, which takes a small batch longer than to send so
# many numbers more.
_WORTH_WAITING = 1 << 22


class ExchangeSizes(NamedTuple):
    """How much travels at once; static.

    Rows for each pair of ranks; of all_gather: tokens of each rank.
    """

    implementation: str  # one of IMPLEMENTATIONS
    # Buffers that may take everything in one wave, ascending: the first that the fullest pair fits
    # into does.
    in_one_wave: tuple[int, ...]
    # Of a batch that fits into none of them, what goes in a wave of several; None: all fit.
    in_several: int | None = None

    @property
    def fit_the_fullest_pair(self) -> bool:
        """Whether more travels the more the fullest pair of ranks has to exchange."""
        several = self.in_several is not None or len(self.in_one_wave) > 1
        return self.implementation == "waves" and several


def least_in_wave(
    implementation: str, choices_per_token: int, num_ranks: int, slots_per_rank: int
) -> int:
    """Rows that a rank receives in a wave of one row, or one token, from each rank.

    >>> least_in_wave("waves", 8, num_ranks=4, slots_per_rank=2)
    4
    >>> least_in_wave("all_gather", 8, num_ranks=4, slots_per_rank=2)
    8
    """
    if implementation != "all_gather":
        return num_ranks
    return num_ranks * _most_on_one_rank(choices_per_token, slots_per_rank)


def _most_on_one_rank(choices_per_token: int, slots_per_rank: int) -> int:
    # A token's choices are of different experts, so of different slots.
    return min(choices_per_token, slots_per_rank)


def exchange_sizes(
    implementation: str,
    num_tokens: int,
    choices_per_token: int,
    num_ranks: int,
    slots_per_rank: int,
    embed_dim: int,
    most_rows: int | None = None,
) -> ExchangeSizes:
    """Sizes for a batch of T tokens a rank, which receives up to `most_rows` in a wave.

    >>> exchange_sizes("waves", 8192, 8, num_ranks=8, slots_per_rank=32, embed_dim=7168)[1:]
    ((8704, 9216, 10240, 12288), 6144)
    """
    per_token = 1  # of what travels
    if implementation != "all_gather":
        per_token = _most_on_one_rank(choices_per_token, slots_per_rank)
    whole = most = max(1, num_tokens * per_token)
    if most_rows is not None:
        least = least_in_wave(implementation, choices_per_token, num_ranks, slots_per_rank)
        most = min(whole, most_rows // least)
    rows = num_tokens * choices_per_token
    large = rows / num_ranks >= _LARGE_SHARE or rows * embed_dim >= _LARGE_BATCH
    buffers = _buffers(implementation, rows / num_ranks, large)
    saved = (whole - min(buffers, default=whole)) * num_ranks * embed_dim
    worth_choosing = large or saved > _WORTH_WAITING
    buffers = tuple(size for size in buffers if size < most) if worth_choosing else ()
    if most_rows is None and buffers and whole > 2 * buffers[-1]:
        # Two waves are in memory at a time: of a large batch as much as the largest buffer.
        several = math.ceil(buffers[-1] / 2) if large else buffers[-1]
        return ExchangeSizes(implementation, buffers, several)
    if most < whole:
        return ExchangeSizes(implementation, (*buffers, most) if buffers else (), most)
    return ExchangeSizes(implementation, (*buffers, whole))


def _buffers(implementation: str, share: float, large: bool) -> list[int]:
    """Rows for each pair of ranks, ascending, that are worth trying."""
    if implementation == "all_gather":
        return []  # all tokens go to all ranks, whatever is routed where
    if implementation == "ragged":
        sizes = [each * share for each in _OF_RAGGED]
    elif large:
        sizes = [each * share for each in _OF_LARGE]
    else:
        usual = max(2 * share, share + _DEVIATIONS * math.sqrt(share))
        sizes = [each * usual for each in _OF_SMALL]
    return [max(1, math.ceil(size)) for size in sizes]
