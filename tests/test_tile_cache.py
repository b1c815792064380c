"""Decoded tiles are made once, held within a limit, and left alone while somebody looks."""

from collections.abc import Callable

import numpy as np
import pytest

from pathcli.slides.tile_cache import TileCache

SHAPE = (10, 10, 3)
SIZE = 300


def filled(k: int) -> Callable[[np.ndarray], None]:
    return lambda out: out.fill(k)


def test_the_cache_holds_no_more_than_it_may() -> None:
    made: list[int] = []

    def get(k: int, side: int = 10) -> int:
        def make(out: np.ndarray) -> None:
            made.append(k)
            out[:] = k

        tile = cache.borrow(k, (side, side, 3), make)
        assert tile.pixels.shape == (side, side, 3)
        assert (tile.pixels == k).all()
        cache.give_back(k, tile, 0)
        return tile.pixels.ctypes.data

    cache = TileCache(1000)
    places = set()
    for k in [*range(50), 49, 48, 47]:
        places.add(get(k))
        assert cache.held <= 1000
    assert made == list(range(50))
    assert len(places) == 3  # their memory is used again
    get(0)  # the least used went: made again
    get(47)  # the last used is held
    assert made[-1] == 0
    get(7, side=40)
    assert cache.held == 4800  # one tile is held, however large
    cache.clear()
    assert cache.held == 0


def test_a_tile_in_use_keeps_its_pixels() -> None:
    cache = TileCache(SIZE)
    a = cache.borrow("a", SHAPE, filled(1))
    b = cache.borrow("b", SHAPE, filled(2))
    assert (a.pixels == 1).all()
    assert (b.pixels == 2).all()
    cache.give_back("b", b, 0)
    assert cache.held == 2 * SIZE
    cache.give_back("a", a, 0)
    cache.borrow("c", SHAPE, filled(3))
    assert cache.held == SIZE


def test_a_tile_that_could_not_be_made_is_tried_anew() -> None:
    cache = TileCache(1000)

    def fail(_: np.ndarray) -> None:
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        cache.borrow("a", SHAPE, fail)
    assert cache.held == 0
    assert cache.borrow("a", SHAPE, filled(1)).pixels.all()


def test_a_tile_given_out_whole_goes_first_until_one_is_wanted_again() -> None:
    cache = TileCache(10 * SIZE)
    for k in range(3):
        cache.give_back(k, cache.borrow(k, SHAPE, filled(k)), SIZE)
    assert cache.held == SIZE
    for k in (2, 0):  # the first is held, the second gone: regions overlap
        cache.give_back(k, cache.borrow(k, SHAPE, filled(k)), SIZE)
    for k in range(10, 15):
        cache.give_back(k, cache.borrow(k, SHAPE, filled(k)), SIZE)
    assert cache.held == 7 * SIZE


def test_a_tile_is_unshared_until_it_is_held_or_wanted_again() -> None:
    cache = TileCache(10 * SIZE)
    assert cache.unshared("a", SIZE)
    assert not cache.unshared("a", SIZE)  # again: it is worth holding
    cache.give_back("b", cache.borrow("b", SHAPE, filled(1)), 0)
    assert not cache.unshared("b", SIZE)  # held for others already
    assert cache.unshared("c", SIZE)
    cache.borrow("a", SHAPE, filled(1))
    assert not cache.unshared("d", SIZE)  # regions overlap
