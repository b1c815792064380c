"""The published sets in their own layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import facts, png, read, three_images, write

from pathcli.data.formats import Source, recognise, samples
from pathcli.data.images import read_image
from pathcli.errors import DataError, ResourceError
from pathcli.types import Region


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return three_images(tmp_path / "images")


def pathgen_rows() -> list[dict[str, object]]:
    return [
        {
            "wsi_id": "TCGA-F7-A50J-01Z-00-DX1",
            "position": ["32", "64"],
            "caption": "A",
            "file_id": "f1",
        },
        {"WSI_id": "TCGA-BB-0000-01Z-00-DX1.AB-12", "position": [96, 0], "caption": "B"},
        {"wsi_id": "TCGA-F7-A50J-01Z-00-DX1", "position": ["x", "64"], "caption": "A"},
        {"wsi_id": "TCGA-NO-0000-01Z-00-DX1", "position": ["0", "0"], "caption": "C"},
    ]


def test_pathgens_records_are_regions_of_slides_in_any_layout(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    for name in (
        "f1/TCGA-F7-A50J-01Z-00-DX1.D754F90E.svs",  # as GDC's client puts it
        "f2/TCGA-F7-A50J-01Z-00-DX10.svs",
        "brca/TCGA-BB-0000-01Z-00-DX1.AB-12.svs",
        "f1/annotations.txt",
    ):
        (slides / name).parent.mkdir(parents=True, exist_ok=True)
        (slides / name).touch()
    path = tmp_path / "x.json"
    path.write_text(json.dumps(pathgen_rows()))
    assert recognise(path) == "pathgen"
    found, source = read(path, slides)
    assert [(s.name, s.group, s.images[0]) for s in found] == [
        (
            "TCGA-F7-A50J-01Z-00-DX1_32_64",
            "TCGA-F7-A50J",
            Region(str(slides / "f1/TCGA-F7-A50J-01Z-00-DX1.D754F90E.svs"), (32, 64), 672),
        ),
        (
            "TCGA-BB-0000-01Z-00-DX1.AB-12_96_0",
            "TCGA-BB-0000",
            Region(str(slides / "brca/TCGA-BB-0000-01Z-00-DX1.AB-12.svs"), (96, 0), 672),
        ),
    ]
    assert source.dropped == {"no slide or position": 1, "no slide of this id, or several": 1}
    assert "1 of 3 slides are not to be found below" in source.warnings[0]
    assert "TCGA-NO-0000" in source.warnings[0]
    with pytest.raises(
        ResourceError, match=r"3 of 3 slides are not to be found below .*data\.images"
    ):
        read(path, tmp_path / "empty")


def test_of_two_slides_of_one_beginning_the_file_id_tells(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"f{number}").mkdir()
        (tmp_path / f"f{number}" / f"TCGA-F7-A50J-01Z-00-DX1.{number}.svs").touch()
    path = tmp_path / "x.jsonl"
    row = {"wsi_id": "TCGA-F7-A50J-01Z-00-DX1", "position": ["0", "0"], "caption": "A"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"file_id": "f2"}))
    found, source = read(path)
    assert [s.images[0].slide[-5:] for s in found] == ["2.svs"]  # type: ignore[union-attr]
    assert source.dropped == {"no slide of this id, or several": 1}


@pytest.mark.data
def test_pathgens_published_sample_has_5000_records_of_3582_slides(
    data: Path, tmp_path: Path
) -> None:
    path = data / "captions" / "pathgen-sample.json"
    ids = {row["wsi_id"] for row in json.loads(path.read_text())}
    for wsi in ids:
        (tmp_path / f"{wsi}.svs").touch()
    found, source = read(path, tmp_path)
    assert (len(found), len(ids), dict(source.dropped)) == (5000, 3582, {})
    assert found[0].images[0].xy == (21408, 27328)  # type: ignore[union-attr]
    assert found[0].answer.startswith("The microscopic image reveals pleomorphic cells")
    assert found[0].group == "TCGA-F7-A50J"


@pytest.mark.data
@pytest.mark.parametrize("key", ["wsi_id", "WSI_id"])
def test_a_record_is_cut_from_a_real_slide(data: Path, tmp_path: Path, key: str) -> None:
    import openslide

    path = tmp_path / "one.json"
    row = {key: "cmu-1-small-region", "position": ["1024", "1536"], "caption": "Skin"}
    path.write_text(json.dumps([row]))
    (found,), _ = read(path, data / "slides")
    pixels = read_image(found.images[0])
    with openslide.OpenSlide(data / "slides" / "cmu-1-small-region.svs") as slide:
        expected = np.asarray(slide.read_region((1024, 1536), 0, (672, 672)))[..., :3]
    assert pixels.shape == (672, 672, 3)
    assert np.array_equal(pixels, expected)


def test_quilts_missing_captions_are_counted_and_null_pathology_goes_on_request(
    images: Path,
) -> None:
    (images / "vid-1_image_ab.jpg").write_bytes(png(1))
    rows = [
        {"": "0", "caption": "One", "image_path": "vid-1_image_ab.jpg", "pathology": "['Skin']"},
        {"": "1", "caption": "Two", "image_path": "a.png", "pathology": ""},
        {"": "2", "caption": "", "image_path": "a.png", "pathology": "['Lung']"},
    ]
    path = write(images / "quilt_1M_lookup.csv", rows)
    assert recognise(path) == "quilt-1m"
    found, source = read(path)
    assert facts(found) == [("vid-1_image_ab.jpg", "One", "", "vid-1"), ("a.png", "Two", "", "")]
    assert source.dropped == {"no caption": 1}
    kept = Source(path, keep={"pathology": ["*"]})
    assert [s.answer for s in samples(kept)] == ["One"]
    assert kept.dropped == {"no caption": 1, "pathology is empty": 1}


INDICES: dict[str, Callable[[], object]] = {
    "list of names": lambda: ["a.png", "sub/b.png", "lost.png"],
    "list of records": lambda: [
        {"img_name": "a.png"},
        {"img_name": "b.png"},
        {"image": "lost.png"},
    ],
    "dict to captions": lambda: {"a.png": "One", "b.png": ["Two", "Three"], "lost.png": ""},
    "dict to records": lambda: {"a.png": {"caption": "One"}, "b.png": {}, "lost.png": {}},
}


@pytest.mark.parametrize("form", INDICES)
def test_pathgen_inits_indices_choose_images_and_tables_beside_give_captions(
    images: Path, tmp_path: Path, form: str
) -> None:
    folder = tmp_path / "init"
    folder.mkdir()
    (folder / "pathcap_imgs.json").write_text(json.dumps(INDICES[form]()))
    table = [
        {"image_path": name, "caption": caption, "pathology": ""}
        for name, caption in (
            ("a.png", "One"),
            ("b.png", "Two"),
            ("b.png", "Three"),
            ("c.png", "Not listed"),
        )
    ]
    write(folder / "quilt_1M_lookup.csv", table)
    assert recognise(folder) == recognise(folder / "pathcap_imgs.json") == "pathgen-init"
    found, source = read(folder, images)
    assert [s.answer for s in found] == ["One", "Two", "Three"]
    assert [Path(str(s.images[0])).name for s in found] == ["a.png", "b.png", "b.png"]
    assert source.dropped == {"no caption": 1}
    (folder / "quilt_1M_lookup.csv").unlink()
    with pytest.raises(DataError, match="no captions: put Quilt-1M's CSV"):
        read(folder / "pathcap_imgs.json", images)


def test_pmc_oa_groups_by_article(images: Path) -> None:
    row = {"image": "a.png", "caption": "A. Figure", "pmcid": "PMC212319", "url_name": "x-3.jpg"}
    path = images / "pmc_oa.jsonl"
    path.write_text(json.dumps(row))
    assert recognise(path) == "pmc-oa"
    assert facts(read(path)[0]) == [("a.png", "A. Figure", "", "PMC212319")]
    (images / "PMC99_Fig3_4.png").write_bytes(png(1))
    path.write_text(json.dumps({"image": "PMC99_Fig3_4.png", "caption": "A", "alignment_type": 1}))
    assert facts(read(path, form="pmc-oa")[0]) == [("PMC99_Fig3_4.png", "A", "", "PMC99")]


def test_of_pubmedvision_the_microscopy_is_taken(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("pmc_1_0.jpg", "pmc_1_1.jpg", "pmc_2_0.jpg"):
        (tmp_path / "images" / name).write_bytes(png(3))
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Glands."}]
    rows = [
        {"id": "a", "image": ["images/pmc_1_0.jpg"], "modality": "Microscopy Images"},
        {
            "id": "b",
            "image": ["images/pmc_1_0.jpg", "images/pmc_1_1.jpg"],
            "modality": "Microscopy Images",
        },
        {"id": "c", "image": ["images/pmc_2_0.jpg"], "modality": "Computed Tomography"},
    ]
    path = tmp_path / "PubMedVision_Alignment_VQA.json"
    path.write_text(
        json.dumps([row | {"conversations": talk, "body_part": "Skin"} for row in rows])
    )
    assert recognise(path) == "pubmedvision"
    for root in (None, tmp_path / "images"):
        found, source = read(path, root)
        assert [(s.answer, len(s.images), s.group) for s in found] == [
            ("Glands.", 1, "pmc_1"),
            ("Glands.", 2, "pmc_1"),
        ]
        assert source.dropped == {"not microscopy": 1}
