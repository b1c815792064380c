"""What augmentation may change, and what it must leave."""

from __future__ import annotations

import numpy as np
import pytest

from pathcli.encoders.augment import Augment, change_colour, change_stain, to_grey
from pathcli.errors import UsageError


def picture(height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_default_changes_no_pixel_of_an_image_of_the_right_size() -> None:
    image = picture(64, 64)
    assert np.array_equal(Augment()(image, 64, rng()), image)


def test_an_image_of_another_size_is_used_whole() -> None:
    image = np.zeros((100, 50, 3), np.uint8)
    image[:, 25:] = 200
    made = Augment()(image, 20, rng())
    assert made.shape == (20, 20, 3)
    assert made[:, :9].max() == 0
    assert made[:, 11:].min() == 200


def test_equal_random_numbers_give_equal_images_and_others_do_not() -> None:
    augment = Augment(crop=(0.3, 1.0), turns=True, stain=0.3, colour=0.3, grey=0.5)
    made = [augment(picture(), 48, rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_a_crop_keeps_the_share_of_the_area_it_was_told() -> None:
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 200, 0).repeat(3, 2)
    seen = [Augment(crop=(0.25, 0.25))(ramp, 100, rng(s)) for s in range(20)]
    widths = [int(image.max()) - int(image.min()) + 1 for image in seen]
    assert all(85 <= width <= 118 for width in widths)  # 100 px, give or take the aspect
    assert len({int(image.min()) for image in seen}) > 10


def test_the_smallest_image_can_be_cropped() -> None:
    image = np.full((1, 1, 3), 7, np.uint8)
    assert (Augment(crop=(0.01, 0.05))(image, 8, rng()) == 7).all()


def test_a_mirror_changes_left_and_right_in_half_of_the_images() -> None:
    image = picture(32, 32)
    made = [Augment(mirror=True)(image, 32, rng(seed)) for seed in range(40)]
    changed = [np.array_equal(one, image[:, ::-1]) for one in made]
    assert all(np.array_equal(m, image) != c for m, c in zip(made, changed, strict=True))
    assert 12 <= sum(changed) <= 28


def test_turns_only_move_pixels() -> None:
    image = picture(32, 32)
    for seed in range(8):
        made = Augment(turns=True)(image, 32, rng(seed))
        assert sorted(map(tuple, made.reshape(-1, 3))) == sorted(map(tuple, image.reshape(-1, 3)))


def test_grey_has_three_equal_channels_of_the_luma() -> None:
    made = to_grey(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8))
    assert made.tolist() == [[[76] * 3, [150] * 3]]


def test_grey_is_taken_as_often_as_told() -> None:
    image = picture(8, 8)
    many = [Augment(grey=0.3)(image, 8, rng(seed)) for seed in range(400)]
    share = np.mean([bool((made == made[..., :1]).all()) for made in many])
    assert 0.22 < share < 0.38


@pytest.mark.parametrize("change", [change_stain, change_colour])
def test_colour_changes_by_nothing_at_strength_zero(change) -> None:  # noqa: ANN001
    image = picture(16, 16)
    assert np.abs(change(image, 0.0, rng()).astype(int) - image).max() <= 1


def test_stain_changes_leave_white_nearly_white_and_tissue_different() -> None:
    white = np.full((4, 4, 3), 255, np.uint8)
    purple = np.full((4, 4, 3), (120, 60, 140), np.uint8)
    drawn = [change_stain(white, 0.2, rng(s)) for s in range(30)]
    assert min(int(image.min()) for image in drawn) > 225
    assert len({tuple(change_stain(purple, 0.2, rng(s))[0, 0]) for s in range(30)}) > 20


@pytest.mark.parametrize("wrong", [{"crop": (0.0, 1.0)}, {"crop": (0.8, 0.5)}, {"grey": 1.2}])
def test_impossible_strengths_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Augment(**wrong)
