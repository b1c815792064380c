import json
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pictures import facts, png, read, three_images, write
from PIL import Image

from pathcli.data.formats import Source, recognise, samples
from pathcli.data.formats.source import Files
from pathcli.data.formats.tables import read_rows
from pathcli.data.images import cell, read_image
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.types import Member

ROWS = [
    {"image": "a.png", "caption": "Gland, well formed.", "label": "x", "group": "p1"},
    {
        "image": "sub/b.png",
        "caption": "Mucosa \N{GREEK SMALL LETTER MU}m",
        "label": "",
        "group": "p2",
    },
    {"image": "c.png", "caption": "  ", "label": "x", "group": "p2"},
    {"image": "gone.png", "caption": "Stroma", "label": "x", "group": "p2"},
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return three_images(tmp_path / "images")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_a_table_gives_its_pairs_and_counts_what_it_drops(
    tmp_path: Path, images: Path, suffix: str
) -> None:
    path = write(tmp_path / f"pairs{suffix}", ROWS)
    assert recognise(path) == "manifest"
    found, source = read(path, images)
    assert facts(found) == [
        ("a.png", "Gland, well formed.", "x", "p1"),
        ("sub/b.png", "Mucosa \N{GREEK SMALL LETTER MU}m", "", "p2"),
    ]
    assert [read_image(s.images[0])[0, 0, 0] for s in found] == [0, 1]
    assert source.rows == 4
    assert source.dropped == {"no caption": 1, "no such image file": 1}
    assert source.examples["no such image file"] == "gone.png"


@pytest.mark.parametrize(
    ("image", "caption"),
    [("image_path", "text"), ("filepath", "title"), ("file_name", "txt"), ("JPG", "Caption")],
)
def test_columns_go_by_their_usual_names(
    tmp_path: Path, images: Path, image: str, caption: str
) -> None:
    path = write(images / "t.csv", [{image: "a.png", caption: "Gland", "patient": "p9"}])
    found, _ = read(path)
    assert facts(found) == [("a.png", "Gland", "", "p9")]


def test_an_image_is_found_by_its_bare_name_when_the_root_is_its_folder(
    tmp_path: Path, images: Path
) -> None:
    path = write(tmp_path / "t.csv", [{"image": "images/a.png", "caption": "Gland"}])
    for root in (tmp_path, images):
        assert read(path, root)[0][0].images == (str(images / "a.png"),)


def test_each_caption_of_an_image_is_a_pair(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"image": "a.png", "captions": ["One", "", "Two"]}))
    assert [s.answer for s in read(path, images)[0]] == ["One", "Two"]


def test_rows_can_be_kept_by_a_column(tmp_path: Path, images: Path) -> None:
    rows = [
        {"image": "a.png", "caption": c, "split": s}
        for c, s in zip("123", ("train", "val", ""), strict=True)
    ]
    path = write(tmp_path / "t.csv", rows)
    for keep, expected in ((["train"], ["1"]), (["*"], ["1", "2"])):
        source = Source(path, images, {"split": keep})
        assert [s.answer for s in samples(source)] == expected
        assert source.rows == 3
    with pytest.raises(DataError, match="no column 'spilt': did you mean 'split'"):
        list(samples(Source(path, images, {"spilt": ["train"]})))


def test_a_damaged_table_says_where(tmp_path: Path) -> None:
    cases: dict[str, tuple[bytes, str]] = {
        "a.csv": (b"image,caption\na.png,one, two\n", r"line 2 has 3 cells, the header 2; quote"),
        "b.csv": (b"image,caption\na.png,\xff\n", "not text in UTF-8"),
        "c.jsonl": (b'{"image": "a"}\n{"image": ', "line 2 is not JSON"),
        "d.json": (b'[{"image": "a", "caption": "b"}, {"image": ', "truncated .* after 1 records"),
        "e.json": (b'[{"image": "a"} oops]', "after 1 records"),
        "f.json": (b'"text"', "a list of records"),
        "g.xyz": (b"", "not a table we read"),
    }
    for name, (data, why) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: .*{why}"):
            list(read_rows(tmp_path / name))
    with pytest.raises(ResourceError, match="no such file"):
        list(read_rows(tmp_path / "absent.csv"))
    path = write(tmp_path / "u.csv", [{"a": "1", "b": "2"}])
    with pytest.raises(DataError, match=r"no known layout, the first row has a, b"):
        recognise(path)
    with pytest.raises(DataError, match="no image column: it has a, b"):
        read(path, form="manifest")


def test_a_json_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"wsi_id": f"w{i}", "position": [str(i), "]}"], "caption": 'a, "b" \\ ['} for i in range(40)
    ]
    path = tmp_path / "x.json"
    path.write_text("\n " + json.dumps(rows, indent=1) + "\n")
    for chunk in (3, 64, 1 << 20):
        monkeypatch.setattr("pathcli.data.formats.tables._CHUNK", chunk)
        assert list(read_rows(path)) == rows
    path.write_text("[ ]")
    assert list(read_rows(path)) == []


# --- Parquet -----------------------------------------------------------------------------


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ResourceError, match="pip install pyarrow"):
        read(tmp_path / "x.parquet")


def test_parquet_gives_names_or_embedded_images(tmp_path: Path, images: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "names.parquet")
    assert [s.name for s in read(tmp_path / "names.parquet", images)[0]] == ["a.png", "sub/b.png"]
    rows = [{"image": {"bytes": png(i), "path": f"{i}.png"}, "text": f"Text {i}"} for i in range(7)]
    path = tmp_path / "hub.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    found, _ = read(path)
    assert [s.answer for s in found] == [f"Text {i}" for i in range(7)]
    assert found[5].images == (cell(str(path), "image", 5),)
    assert [int(read_image(found[i].images[0])[0, 0, 0]) for i in (6, 0, 4)] == [6, 0, 4]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        read(path)


# --- shards and folders ------------------------------------------------------------------


def shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        members: dict[str, bytes] = {}
        for i in range(4):
            stem = f"part/{'n' * (110 * (i == 3))}{number}{i}"  # one name too long for plain tar
            members[f"{stem}.png"] = png(10 * number + i)
            if i == 0:
                members[f"{stem}.json"] = json.dumps(
                    {"caption": "From json", "group": "p7"}
                ).encode()
            elif i < 3:
                members[f"{stem}.txt"] = f"Text {number}{i}".encode()
        members["readme.md"] = b"no sample"
        shard(folder / f"train-{number:03d}.tar", members)
    return folder


@pytest.mark.parametrize("pattern", ["", "train-{000..002}.tar", "train-*.tar"])
def test_shards_are_found_by_folder_range_and_glob(shards: Path, pattern: str) -> None:
    path = shards / pattern if pattern else shards
    assert recognise(path) == "webdataset"
    found, source = read(path)
    assert [s.answer for s in found] == [
        text for n in range(3) for text in ("From json", f"Text {n}1", f"Text {n}2")
    ]
    assert found[0].group == "p7"
    assert (source.rows, dict(source.dropped)) == (12, {"no caption": 3})


def test_shards_have_no_columns_to_keep_rows_by(shards: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.keep chooses rows of a table"):
        samples(Source(shards, keep={"split": ["train"]}))


def test_random_access_to_shards_equals_reading_them_through(shards: Path) -> None:
    through = {}
    for path in sorted(shards.iterdir()):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".png"):
                    data = archive.extractfile(member)
                    assert data is not None
                    through[path.name, member.name] = np.asarray(Image.open(data))
    found, _ = read(shards)
    for number in np.random.default_rng(1).permutation(len(found)):
        ref = found[number].images[0]
        assert isinstance(ref, Member)
        assert np.array_equal(read_image(ref), through[Path(ref.archive).name, ref.name])


def test_compressed_and_damaged_shards_are_refused(tmp_path: Path, shards: Path) -> None:
    packed = shard(tmp_path / "x.tar.gz", {"a.png": png(1), "a.txt": b"A"}, "w:gz")
    hidden = packed.rename(tmp_path / "y.tar")
    with pytest.raises(DataError, match=r"y\.tar: compressed.*unpack it"):
        read(hidden)
    whole = shards / "train-001.tar"
    data = whole.read_bytes()
    for cut in (700, 1024, 1400, 2048):  # in an image, after it, in a header, in a text
        whole.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"train-001\.tar: truncated"):
            read(shards)
    with pytest.raises(ResourceError, match=r"train-003\.tar: no such shard \(2 of 5"):
        read(shards / "train-{000..004}.tar")


def test_pathgens_own_export_is_read_as_a_folder(tmp_path: Path) -> None:
    stems = [f"TCGA-F7-A50J-01Z-00-DX1.D754F90E_{x}_96" for x in (0, 672)] + [
        "TCGA-AA-0001-01Z_1_2"
    ]
    (tmp_path / "out").mkdir()
    for number, stem in enumerate(stems):
        (tmp_path / "out" / f"{stem}.png").write_bytes(png(number))
        (tmp_path / "out" / f"{stem}.txt").write_text(f"Caption {number}\n")
    (tmp_path / "out" / "lonely.png").write_bytes(png(9))
    (tmp_path / "out" / "orphan.txt").write_text("words")
    assert recognise(tmp_path / "out") == "folder"
    found, source = read(tmp_path / "out")
    assert sorted(facts(found)) == sorted(
        (f"{stem}.png", f"Caption {n}", "", stem[:12]) for n, stem in enumerate(stems)
    )
    assert source.dropped == {"no caption": 1, "a caption without an image": 1}


def test_a_file_found_by_its_bare_name_stands_for_one_row_alone(tmp_path: Path) -> None:
    for name in ("1.png", "x/2.png", "y/2.png", "x/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = Files(tmp_path, deep=True)
    assert files.find("a/1.png") == str(tmp_path / "1.png")
    assert files.find("a/1.png") == str(tmp_path / "1.png")
    assert files.find("b/1.png") is None  # not the picture of another row
    assert files.find("y/2.png") == str(tmp_path / "y/2.png")
    assert files.find("2.png") is None  # two files are called so
    assert files.find("3.png") == str(tmp_path / "x/3.png")
