"""The tiles of a grouped product on Hopper GPUs, and the order in which blocks work through them.

Axes: M rows sorted by group, G groups.

The sizes of the groups are known on the device alone. So each block walks over them as it works,
from one of its tiles to the next; a table made beforehand would be several launches more. What
two blocks or one do at a time is a unit, and units are numbered group by group: a group's weights
are read from memory once, and then from the cache.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jax_eplb.kernels.tile_table import ALIGN


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is cut; the stages must fit the 227 KiB of shared memory."""

    block_m: int = 128  # rows of a tile
    block_n: int = 256  # columns of weights in a tile; half gate, half up where they are joined
    steps: int = 4  # stages of shared memory
    window: int = 8  # tiles of rows, at most, that are multiplied with the same columns together
    # Two blocks read what their tiles have in common once, for both: two tiles of rows with the
    # same weights, or a group's last tile of rows with two tiles of columns.
    pair: bool = False


class Place(NamedTuple):
    """Where a walk is."""

    group: Int[Array, ""]  # G: rows past the groups; G + 1: past the end
    row: Int[Array, ""]  # the group's first
    size: Int[Array, ""]  # its rows
    unit: Int[Array, ""]  # of its units


class Tile(NamedTuple):
    """One block's part of a unit. Rows `begin` to `end` of it, from `start` on, are its group's."""

    group: Int[Array, ""]
    start: Int[Array, ""]  # a multiple of 8, as the copy engine wants it
    begin: Int[Array, ""]
    end: Int[Array, ""]
    column: Int[Array, ""]  # which tile of columns; of a pair's second block also one too many
    shares_weights: Bool[Array, ""]  # in a pair: the weights, else the rows


@dataclasses.dataclass(frozen=True)
class Walk:
    """The units of one product."""

    tiles: Tiles
    num_rows: int  # M
    num_groups: int  # G
    num_columns: int  # tiles of columns

    def begin(self, sizes: Int[Array, "G"], unit: Int[Array, ""]) -> Place:
        """The place of the unit of this number."""
        nothing = jnp.int32(0)
        return self.go_on(sizes, Place(jnp.int32(-1), nothing, nothing, nothing), unit)

    def go_on(self, sizes: Int[Array, "G"], place: Place, units: Int[Array, ""]) -> Place:
        """The place so many units further on."""

        def is_past(place):
            return (place.group <= self.num_groups) & (place.unit >= self._units(place))

        def next_group(place):
            group, row = place.group + 1, place.row + place.size
            # Rows past the groups are the last one's, so that their results are written too.
            size = jnp.where(
                group < self.num_groups,
                sizes[jnp.minimum(group, self.num_groups - 1)],
                self.num_rows - row,
            )
            return Place(group, row, size, place.unit - self._units(place))

        return lax.while_loop(is_past, next_group, place._replace(unit=place.unit + units))

    def goes_on(self, place: Place) -> Bool[Array, ""]:
        return place.group <= self.num_groups

    def tile(self, place: Place, half: Int[Array, ""]) -> Tile:
        """The tile of a pair's first or second block, or of the only one."""
        # The group's tiles of rows, or pairs of them, are cut into windows of about equal size.
        # Each window goes through all columns, and is multiplied with the same ones together.
        steps, columns = self._steps_of(place), self.num_columns
        some = jnp.maximum(steps, 1)
        windows = _quotient(some + (self._window - 1), self._window)
        # Window w is made of steps · w / windows up to the next. A window has `columns` units for
        # each of its steps: so this is a step of the unit's window.
        step = jnp.minimum(_quotient(place.unit, columns), some - 1)
        window = _quotient((step + 1) * windows - 1, some)
        first = _quotient(some * window, windows)
        width = _quotient(some * (window + 1), windows) - first
        rest = place.unit - first * columns
        row, column = first + lax.rem(rest, width), _quotient(rest, width)
        shares_weights = place.unit < steps * columns
        if self.tiles.pair:
            row = jnp.where(shares_weights, 2 * row + half, 2 * steps)
            column = jnp.where(shares_weights, column, 2 * (place.unit - steps * columns) + half)
        start = place.row - lax.rem(place.row, jnp.int32(ALIGN)) + row * self.tiles.block_m
        begin = jnp.maximum(place.row - start, 0)
        end = jnp.minimum(place.row + place.size - start, self.tiles.block_m)
        return Tile(place.group, start, begin, end, column, shares_weights)

    @property
    def _window(self) -> int:
        return self.tiles.window // 2 if self.tiles.pair else self.tiles.window

    def _tiles_of_rows(self, place: Place) -> Int[Array, ""]:
        # The first one begins up to 7 rows before its group.
        whole = lax.rem(place.row, jnp.int32(ALIGN)) + place.size + (self.tiles.block_m - 1)
        return jnp.where(place.size > 0, _quotient(whole, self.tiles.block_m), 0)

    def _steps_of(self, place: Place) -> Int[Array, ""]:
        """Tiles of rows, or pairs of them."""
        tiles = self._tiles_of_rows(place)
        return _quotient(tiles, 2) if self.tiles.pair else tiles

    def _units(self, place: Place) -> Int[Array, ""]:
        units = self._steps_of(place) * self.num_columns
        if self.tiles.pair:
            odd = lax.rem(self._tiles_of_rows(place), jnp.int32(2))
            units = units + odd * (-(-self.num_columns // 2))
        return units


def _quotient(number, divisor) -> Int[Array, ""]:
    """Rounded down, of numbers that are not negative: fewer instructions than `//`."""
    return lax.div(number, jnp.int32(divisor))
