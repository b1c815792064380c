"""Batches through an encoder: two at once on a CPU, in order, and smaller where memory is short."""

import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import fakes
import numpy as np
import pytest
import torch

from pathcli.encoders.passes import LANES, Passes
from pathcli.encoders.reading import Batch
from pathcli.errors import ResourceError

WAIT_S = 20


class Reentrant(fakes.MeanColour):
    """May be called by two threads; knows how many were in it at once."""

    reentrant = True

    def __init__(self) -> None:
        super().__init__()
        self.inside = self.most = 0
        self.threads: set[int] = set()
        self.lock = threading.Lock()

    def encode(self, images: Any) -> Any:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.threads.add(torch.get_num_threads())
        try:
            return self.work(images)
        finally:
            with self.lock:
                self.inside -= 1

    def work(self, images: Any) -> Any:
        time.sleep(0.05 if int(images[0, 0, 0, 0]) % 2 else 0)  # every other is slow
        return super().encode(images)


class Meets(Reentrant):
    """Goes on once another thread is in it, too."""

    def work(self, images: Any) -> Any:
        for _ in range(WAIT_S * 100):
            if self.most == LANES:
                break
            time.sleep(0.01)
        return fakes.MeanColour.encode(self, images)


@pytest.fixture
def cores() -> Iterator[int]:
    """Four threads for PyTorch."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


def batches(n: int, b: int = 4) -> list[Batch]:
    return [
        Batch(i * b, torch.full((b, 2, 2, 3), i, dtype=torch.uint8), np.zeros(b, np.uint8))
        for i in range(n)
    ]


def passes(encoder: fakes.MeanColour, batch: int = 4) -> Passes:
    return Passes(encoder, "cpu", batch, compiled=False)


def test_two_batches_go_through_at_once_on_half_of_the_cores_each(cores: int) -> None:
    encoder = Meets()
    assert len(list(passes(encoder).over(batches(4)))) == 4
    assert encoder.most == LANES
    assert encoder.threads == {cores // LANES}
    assert torch.get_num_threads() == cores  # the caller's own number
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [cores]


@pytest.mark.usefixtures("cores")
def test_lanes_end_with_the_encoder_they_served() -> None:
    def lanes() -> int:
        return sum(thread.name.startswith("encoder") for thread in threading.enumerate())

    before = lanes()
    ready = passes(encoder := Reentrant())
    assert len(list(ready.over(batches(4)))) == 4
    gone = weakref.ref(encoder)
    del ready, encoder
    for _ in range(WAIT_S * 100):
        gc.collect()
        if gone() is None and lanes() == before:
            break
        time.sleep(0.01)
    assert gone() is None
    assert lanes() == before


@pytest.mark.usefixtures("cores")
def test_cores_may_be_fewer_than_when_it_was_made() -> None:
    ready = passes(Reentrant())
    torch.set_num_threads(1)
    assert len(list(ready.over(batches(4)))) == 4


@pytest.mark.usefixtures("cores")
def test_features_come_in_the_order_of_the_batches() -> None:
    found = list(passes(Reentrant()).over(batches(9)))
    assert [batch.start for batch, _ in found] == list(range(0, 36, 4))
    assert [features[0, 0].item() for _, features in found] == list(range(9))


@pytest.mark.usefixtures("cores")
def test_an_encoder_that_does_not_say_so_is_called_by_one_thread() -> None:
    class Alone(Reentrant):
        reentrant = False

    encoder = Alone()
    assert len(list(passes(encoder).over(batches(4)))) == 4
    assert encoder.most == 1


@pytest.mark.usefixtures("cores")  # which sets the number back
def test_a_single_core_has_a_single_lane() -> None:
    torch.set_num_threads(1)
    assert passes(Reentrant()).lanes == 1


@pytest.mark.usefixtures("cores")
def test_few_batches_are_taken_ahead_and_none_is_encoded_after_the_end() -> None:
    taken: list[int] = []

    def counted() -> Iterator[Batch]:
        for batch in batches(20):
            taken.append(batch.start)
            yield batch

    encoder = Reentrant()
    encoded = passes(encoder).over(counted())
    next(encoded)
    assert len(taken) == LANES + 1
    encoded.close()
    assert encoder.inside == 0


@pytest.mark.usefixtures("cores")
def test_what_goes_wrong_in_a_lane_is_raised() -> None:
    class Breaks(Reentrant):
        def work(self, images: Any) -> Any:
            if int(images[0, 0, 0, 0]) == 3:
                msg = "shapes do not match"
                raise RuntimeError(msg)
            return super().work(images)

    found = passes(Breaks()).over(batches(9))
    assert [next(found)[0].start for _ in range(3)] == [0, 4, 8]
    with pytest.raises(RuntimeError, match="shapes do not match"):
        next(found)


@pytest.mark.usefixtures("cores")
def test_lanes_that_are_out_of_memory_halve_their_passes_and_say_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Small(Reentrant):
        most_images = 4

        def work(self, images: Any) -> Any:
            if len(images) > self.most_images:
                msg = "can't allocate memory"
                raise RuntimeError(msg)
            return fakes.MeanColour.encode(self, images)

    with caplog.at_level(logging.WARNING, "pathcli"):
        found = list(passes(Small(), 16).over(batches(5, 16)))
    assert [len(features) for _, features in found] == [16] * 5
    assert [r.getMessage() for r in caplog.records] == [
        "cpu is out of memory at --batch 16: going on with 4"
    ]
    Small.most_images = 0
    with pytest.raises(ResourceError, match="out of memory with a single tile"):
        list(passes(Small(), 16).over(batches(3, 16)))
