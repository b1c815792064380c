"""Tiles that were cut before: what the store keeps of them, and when they are cut anew."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run
from fakes import MeanColour

from pathcli.encoders.embedding import embed
from pathcli.slides.plan import plan, unwritten_store
from pathcli.slides.tiling import tile, tile_spec
from pathcli.store import Store


def test_the_second_run_comes_from_the_store_and_another_mpp_does_not(
    slide_path: Path, store: Store
) -> None:
    assert not tile(slide_path, store=store).cached
    again = tile(slide_path, store=store)
    assert again.cached
    assert again.tiles.tissue_share > 0
    assert not tile(slide_path, store=store, mpp=0.25).cached
    assert not tile(slide_path, store=store, spec=tile_spec(min_tissue=0.4)).cached
    (slide_path.parent / "sub").mkdir()
    moved = slide_path.rename(slide_path.parent / "sub" / slide_path.name)
    assert tile(moved, store=store).cached
    assert len(store.tiles) == 3


def test_a_slide_that_was_still_being_copied_is_cut_and_embedded_again(
    slide_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    whole, spec = slide_path.read_bytes(), tile_spec(100, 0.5)
    encoder = MeanColour()
    first = tile(slide_path, spec=spec, store=store)
    slide_path.write_bytes(whole + bytes(1000))
    assert not tile(slide_path, spec=spec, store=store).cached
    assert f"grown from {len(whole)} to {len(whole) + 1000} bytes" in caplog.text
    assert tile(slide_path, spec=spec, store=store).cached
    embed(slide_path, encoder, spec=spec, store=store)
    slide_path.write_bytes(whole)  # a copy without its label is shorter, and the same slide
    assert tile(slide_path, spec=spec, store=store).cached
    assert len(store.features) == 1
    slide_path.write_bytes(whole + bytes(2000))
    dry = plan(slide_path, spec, unwritten_store(store.root))
    assert not dry.run.cached
    assert len(store.features) == 1
    again = tile(slide_path, spec=spec, store=store)
    assert not again.cached
    assert again.tiles.key == first.tiles.key
    assert not len(store.features)


def test_tiles_of_an_unknown_length_stay(slide_path: Path, store: Store) -> None:
    run = tile(slide_path, store=store)
    store.tiles[run.tiles.key] = replace(run.tiles, file_bytes=None, dropped=None)
    slide_path.write_bytes(slide_path.read_bytes() + bytes(10))
    again = tile(slide_path, store=store)
    assert again.cached
    assert again.tiles.dropped is None


def test_shards_of_a_batch_are_all_of_it_and_list_their_own_failures(
    slide_path: Path, run: Run
) -> None:
    folder, out = slide_path.parent / "many", slide_path.parent / "out"
    folder.mkdir()
    for k in range(5):
        (folder / f"s{k}.svs").write_bytes(slide_path.read_bytes())
    (folder / "s2.svs").write_bytes(b"no slide")
    found = []
    for part in ("1/2", "2/2"):
        code, told, _ = run("tile", folder, "--shard", part, "--out", out, "--json")
        found.append({Path(s["path"]).stem for s in json.loads(told)["slides"]})
        assert code == (3 if part == "1/2" else 0)
    assert found == [{"s0", "s4"}, {"s1", "s3"}]
    assert (out / "failures-1-of-2.csv").is_file()
    assert not (out / "failures-2-of-2.csv").exists()
    assert run("tile", folder, "--shard", "3/2", "--out", out)[0] == 2


def test_the_store_keeps_a_card_of_the_slide(slide_path: Path, store: Store) -> None:
    run = tile(slide_path, store=store, mpp=0.25, mpp_source="csv")
    card = store.slides()[run.tiles.item]
    assert (card["mpp"], card["mpp_used"], card["mpp_source"]) == (0.5, 0.25, "csv")
    assert card["last_seen"] == str(slide_path)
