from dataclasses import fields, replace

import pytest

from pathcli.errors import DataError, PathcliError, ResourceError, UsageError
from pathcli.slides.tiling import tile_spec
from pathcli.types import Key, TileSpec

CHANGES = {
    "size_px": 256,
    "mpp": 0.25,
    "step_px": 112,
    "tissue": "hsv",
    "tissue_params": {"mask_mpp": 8.0},
    "tissue_version": 3,
    "min_tissue": 0.1,
    "roi": "abc",
    "drop": ("pen",),
    "grid": 2,
}


@pytest.mark.parametrize("name", [f.name for f in fields(TileSpec)])
def test_every_parameter_of_a_tile_spec_changes_its_digest(name: str) -> None:
    spec = tile_spec()
    assert replace(spec, **{name: CHANGES[name]}).digest != spec.digest


def test_a_digest_does_not_depend_on_how_numbers_are_written() -> None:
    assert tile_spec(224, 1).digest == tile_spec(224, 1.0).digest
    a = replace(tile_spec(), tissue_params={"a": 1.0, "b": 2.0})
    assert a.digest == replace(a, tissue_params={"b": 2.0, "a": 1.0}).digest


def test_the_default_digest_is_what_stores_on_disk_have() -> None:
    # a change here makes every user's tiles be cut again: say so in CHANGELOG.md, in bold
    assert tile_spec().digest == "83cb11025b98"


def test_a_spec_survives_json() -> None:
    spec = replace(tile_spec(), drop=("pen", "blur"), roi="r")
    back = TileSpec.from_json(spec.to_json())
    assert back.digest == spec.digest


@pytest.mark.parametrize(
    "wrong",
    [{"size_px": 0}, {"step_px": 0}, {"mpp": 0.01}, {"mpp": float("nan")}, {"min_tissue": 2}],
)
def test_what_cannot_be_tiled_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        TileSpec(**{"size_px": 224, "mpp": 0.5, **wrong})  # type: ignore[arg-type]


def test_a_corrected_mpp_is_another_key() -> None:
    assert Key("a", 0.5, "t").stem != Key("a", 0.25, "t").stem


def test_exit_codes_are_those_of_the_manual() -> None:
    codes = [e.exit_code for e in (PathcliError, UsageError, DataError, ResourceError)]
    assert codes == [1, 2, 4, 5]
