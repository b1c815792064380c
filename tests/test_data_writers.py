"""What is written in a form is read again as it was, and what the form cannot hold is said."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from pictures import png, three_images, write

from pathcli.data.formats import TALKS, Source, recognise, samples
from pathcli.data.images import read_image
from pathcli.data.writers import DESCRIBE, Form, Written, convert, form_of, write_samples
from pathcli.errors import DataError, UsageError
from pathcli.types import Region, Sample

NAMES: dict[Form, str] = {
    "llava": "x.json",
    "clover": "x.json",
    "pallava": "x.jsonl",
    "csv": "x.csv",
    "jsonl": "x.jsonl",
    "parquet": "x.parquet",
    "webdataset": "shards",
}
QUESTION = ('What is "shown"?\nLook well.',)
TURNS = ("What is shown?", "A gland, <b>benign</b>.", "Which grade, \N{GREEK SMALL LETTER MU}?")


def back(path: Path, root: Path | None = None) -> list[Sample]:
    return list(samples(Source(path, root), "auto", TALKS))


def shown(sample: Sample) -> list[int]:
    return [int(read_image(ref)[0, 0, 0]) for ref in sample.images]


def said(sample: Sample) -> tuple[tuple[str, ...], str]:
    return tuple(t.replace("<image>", "").strip() for t in sample.turns), sample.answer


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return three_images(tmp_path / "images")


@pytest.fixture
def pairs(images: Path) -> list[Sample]:
    return [
        Sample("a.png", (str(images / "a.png"),), "A gland, well formed.", (), "x", "p1"),
        Sample("sub/b.png", (str(images / "sub/b.png"),), 'Mucosa; 5 "\u00b5m"\nthick', (), "", ""),
        Sample("c.png", (str(images / "c.png"),), "Stroma", (), "y", "p2"),
    ]


def asked(pairs: list[Sample], turns: tuple[str, ...]) -> list[Sample]:
    return [replace(pair, turns=turns) for pair in pairs]


# --- round trips -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "webdataset"])
def test_captions_come_back_from_every_form_that_holds_them(
    tmp_path: Path, pairs: list[Sample], form: Form
) -> None:
    path = tmp_path / "out" / NAMES[form]
    done = write_samples(pairs, path, form)
    assert (done.rows, done.told()) == (3, [])
    found = back(path)
    assert [(s.answer, s.turns, s.label, s.group) for s in found] == [
        (s.answer, s.turns, s.label, s.group) for s in pairs
    ]
    assert [shown(s) for s in found] == [[0], [1], [2]]
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("form", NAMES)
def test_questions_come_back_from_every_form(
    tmp_path: Path, pairs: list[Sample], form: Form
) -> None:
    path = tmp_path / "out" / NAMES[form]
    given = asked(pairs, QUESTION)
    done = write_samples(given, path, form)
    assert (done.rows, done.told()) == (3, [])
    found = back(path)
    assert [said(s) for s in found] == [said(s) for s in given]
    assert [s.group for s in found] == ["p1", "", "p2"]
    assert [shown(s) for s in found] == [[0], [1], [2]]


@pytest.mark.parametrize("form", ["llava", "pallava", "jsonl", "parquet", "webdataset"])
def test_conversations_come_back_whole(tmp_path: Path, pairs: list[Sample], form: Form) -> None:
    path = tmp_path / "out" / NAMES[form]
    given = asked(pairs, TURNS)
    assert write_samples(given, path, form).told() == []
    assert [said(s) for s in back(path)] == [said(s) for s in given]


@pytest.mark.parametrize("form", ["llava", "jsonl", "parquet"])
def test_several_images_of_a_row_stay_together(
    tmp_path: Path, pairs: list[Sample], form: Form
) -> None:
    several = replace(pairs[0], images=pairs[1].images + pairs[2].images, turns=TURNS)
    path = tmp_path / NAMES[form]
    assert write_samples([several, asked(pairs, TURNS)[0]], path, form).told() == []
    found = back(path)
    assert [shown(s) for s in found] == [[1, 2], [0]]
    assert [said(s) for s in found] == [said(several)] * 2


def test_forms_agree_through_one_another(tmp_path: Path, pairs: list[Sample]) -> None:
    first = tmp_path / "first.jsonl"
    write_samples(asked(pairs, QUESTION), first, "jsonl")
    here = first
    for form in ("clover", "parquet", "llava", "csv", "webdataset", "pallava", "jsonl"):
        there = tmp_path / form / NAMES[form]
        told = convert(here, there, form, write_images=tmp_path / "cut").told()
        assert told == [], form
        here = there
    final = back(here)
    assert [(said(s), s.group) for s in final] == [(said(s), s.group) for s in back(first)]
    assert [shown(s) for s in final] == [[0], [1], [2]]


def test_a_written_form_converted_to_itself_is_the_same_file(
    tmp_path: Path, pairs: list[Sample]
) -> None:
    for form, name in NAMES.items():
        once, again = tmp_path / f"1{form}" / name, tmp_path / f"2{form}" / name
        write_samples([replace(s, label="") for s in asked(pairs, QUESTION)], once, form)
        convert(once, again, form)
        files = [p if p.is_file() else p / "000000.tar" for p in (once, again)]
        if form == "webdataset":
            with tarfile.open(files[0]) as one, tarfile.open(files[1]) as two:
                assert one.getnames() == two.getnames()
        else:
            assert files[0].read_bytes() == files[1].read_bytes(), form


# --- the forms themselves ----------------------------------------------------------------


def test_records_are_as_published(tmp_path: Path, pairs: list[Sample]) -> None:
    given = asked(pairs[:1], ("Q?",))
    write_samples(given, tmp_path / "l.json", "llava")
    conversations = [
        {"from": "human", "value": "<image>\nQ?"},
        {"from": "gpt", "value": "A gland, well formed."},
    ]
    image = "images/a.png"
    record = {"id": "1", "image": image, "conversations": conversations}
    known = {"label": "x", "group": "p1"}
    assert json.loads((tmp_path / "l.json").read_bytes()) == [record | known]
    write_samples(given, tmp_path / "p.jsonl", "pallava")
    assert json.loads((tmp_path / "p.jsonl").read_bytes()) == record | known
    write_samples(given, tmp_path / "c.json", "clover")
    assert json.loads((tmp_path / "c.json").read_bytes()) == [
        {"question": "Q?", "answer": "A gland, well formed.", "path": image} | known
    ]
    write_samples(given, tmp_path / "t.csv", "csv", root=tmp_path / "images")
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "image,question,answer,label,group",
        'a.png,Q?,"A gland, well formed.",x,p1',
    ]


def test_marks_that_stand_in_the_text_are_not_doubled(tmp_path: Path, pairs: list[Sample]) -> None:
    given = asked(pairs[:1], ("What is here? <image>",))
    write_samples(given, tmp_path / "l.json", "llava")
    assert back(tmp_path / "l.json")[0].turns == given[0].turns
    write_samples(given, tmp_path / "c.json", "clover")
    assert back(tmp_path / "c.json")[0].turns == ("What is here?",)


def pathgen(tmp_path: Path, slide: Path, **said: object) -> Path:
    folder = tmp_path / "slides" / "5b4a2b0e-0000-4000-8000-0123456789ab"
    folder.mkdir(parents=True)
    slide.rename(folder / "TCGA-F7-A50J-01Z-00-DX1.D754F90E.svs")
    places = (["32", "64"], ["700", "300"])
    rows = [
        {"wsi_id": "TCGA-F7-A50J-01Z-00-DX1", "position": p} | said | {"file_id": folder.name}
        for p in places
    ]
    return write(tmp_path / "pathgen.json", rows)  # type: ignore[arg-type]


def test_pathgens_records_come_back_as_they_were(tmp_path: Path, slide_path: Path) -> None:
    path = pathgen(tmp_path, slide_path, caption="A field of tissue")
    for name in ("again.json", "again.jsonl"):
        out = tmp_path / name
        assert convert(path, out, "pathgen", images=tmp_path / "slides").told() == []
        text = out.read_text()
        rows = json.loads(text) if name == "again.json" else map(json.loads, text.splitlines())
        assert list(rows) == json.loads(path.read_text())


def test_pathgens_conversations_stay_regions(tmp_path: Path, slide_path: Path) -> None:
    talk = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]
    path = pathgen(tmp_path, slide_path, conversations=talk)
    out = tmp_path / "again.json"
    convert(path, out, "pathgen", images=tmp_path / "slides")
    assert recognise(out, TALKS) == "pathgen-instruct"
    assert back(out, tmp_path / "slides") == back(path, tmp_path / "slides")


def test_regions_become_files_or_are_refused(tmp_path: Path, slide_path: Path) -> None:
    path = pathgen(tmp_path, slide_path, caption="A field of tissue")
    slides, crops, out = tmp_path / "slides", tmp_path / "crops", tmp_path / "out.jsonl"
    with pytest.raises(
        DataError, match=r"_32_64|\(32, 64\): jsonl names image files.*--write-images"
    ):
        convert(path, out, "jsonl", images=slides)
    assert not out.exists()
    assert list(tmp_path.glob(".*")) == []
    assert convert(path, out, "jsonl", images=slides, write_images=crops).told() == []
    regions, files = back(path, slides), back(out)
    assert [s.group for s in files] == ["TCGA-F7-A50J"] * 2
    for region, file in zip(regions, files, strict=True):
        assert isinstance(region.images[0], Region)
        assert np.array_equal(read_image(region.images[0]), read_image(file.images[0]))
    for form, name in (("webdataset", "x.tar"), ("parquet", "x.parquet")):
        inside = tmp_path / name
        convert(path, inside, form, images=slides)
        for region, member in zip(regions, back(inside), strict=True):
            assert np.array_equal(read_image(region.images[0]), read_image(member.images[0]))
            assert member.group == "TCGA-F7-A50J"


def test_members_of_archives_become_files_of_their_own_bytes(
    tmp_path: Path, pairs: list[Sample]
) -> None:
    for folder in "12":  # two archives of one name
        write_samples(pairs, tmp_path / folder / "x.tar", "webdataset")
    both = [s for folder in "12" for s in back(tmp_path / folder / "x.tar")]
    write_samples(both, tmp_path / "t.csv", "csv", write_images=tmp_path / "files")
    found = back(tmp_path / "t.csv")
    assert len({s.images for s in found}) == 6
    assert [Path(str(s.images[0])).read_bytes() for s in found] == [png(n) for n in (0, 1, 2)] * 2


def test_names_in_an_archive_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("../../evil/../e.png", png(7)), ("../../evil/../e.txt", b"Gland")):
            (tmp_path / "member").write_bytes(data)
            archive.add(tmp_path / "member", name)
    convert(tmp_path / "x.tar", tmp_path / "t.csv", "csv", write_images=tmp_path / "files")
    (sample,) = back(tmp_path / "t.csv")
    assert Path(str(sample.images[0])).resolve().is_relative_to(tmp_path / "files")


def test_shards_end_at_their_size_and_keep_the_order(tmp_path: Path, pairs: list[Sample]) -> None:
    write_samples(pairs * 4, tmp_path / "shards", "webdataset", shard=4000)
    names = sorted(p.name for p in (tmp_path / "shards").iterdir())
    assert len(names) > 2
    assert names[0] == "000000.tar"
    assert [s.answer for s in back(tmp_path / "shards")] == [s.answer for s in pairs * 4]


def test_questions_on_one_image_stay_together_in_shards(
    tmp_path: Path, pairs: list[Sample]
) -> None:
    one = [replace(pairs[1], turns=(f"Q{n}?",)) for n in range(3)]
    done = write_samples([*one, pairs[2]], tmp_path / "x.tar", "webdataset")
    assert done.told() == ["3 rows share an image, whose name is now their group"]
    assert [s.group for s in back(tmp_path / "x.tar")] == ["sub/b.png"] * 3 + ["p2"]


# --- what cannot be held -----------------------------------------------------------------


def lost(done: Written) -> dict[str, int]:
    return dict(done.left) | dict(done.notes)


def test_what_a_form_cannot_hold_is_counted(tmp_path: Path, pairs: list[Sample]) -> None:
    talk, several = replace(pairs[0], turns=TURNS), replace(pairs[0], turns=QUESTION)
    several = replace(several, images=several.images * 2)
    given = [*asked(pairs[:1], QUESTION), talk, several, pairs[1], replace(pairs[2], answer=" ")]
    described = {f"captions are now answers to {DESCRIBE!r}": 1, "an empty text": 1}
    expected: dict[Form, dict[str, int]] = {
        "csv": {"several turns": 1, "several images": 1},
        "clover": {"several turns": 1, "several images": 1},
        "pallava": {"several images": 1},
        "llava": {},
        "jsonl": {},
        "parquet": {},
    }
    for form, missing in expected.items():
        done = write_samples(given, tmp_path / f"{form}{NAMES[form]}", form)
        assert lost(done) == missing | described, form
        assert done.rows == 4 - sum(missing.values())
    done = write_samples(given, tmp_path / "x.tar", "webdataset")
    assert lost(done) == {"several images": 1, "an empty text": 1}
    with pytest.raises(DataError, match=r"can be written as pathgen.*no region of a slide"):
        write_samples(given, tmp_path / "p.json", "pathgen")


def test_captions_and_conversations_share_a_file_by_a_question(
    tmp_path: Path, pairs: list[Sample]
) -> None:
    mixed = [pairs[0], replace(pairs[1], turns=TURNS)]
    done = write_samples(mixed, tmp_path / "x.jsonl", "jsonl")
    assert lost(done) == {"a conversation among captions; --question writes all so": 1}
    done = write_samples(mixed, tmp_path / "y.jsonl", "jsonl", question="Say what you see.")
    assert lost(done) == {"captions are now answers to 'Say what you see.'": 1}
    assert back(tmp_path / "y.jsonl")[0].turns == ("Say what you see.",)


def test_pathgen_keeps_no_label_and_no_group_but_the_patient(
    tmp_path: Path, slide_path: Path
) -> None:
    sample = Sample("s", (Region(str(slide_path), (0, 0), 672),), "Text", (), "x", "ward 3")
    small = replace(sample, images=(Region(str(slide_path), (0, 0), 96),))
    done = write_samples([sample, small], tmp_path / "x.json", "pathgen")
    told = ("labels are not kept: pathgen has none",)
    told += ("groups are not kept: pathgen has the patient of its slide alone",)
    assert lost(done) == dict.fromkeys(told, 2)
    assert [s.images for s in back(tmp_path / "x.json")] == [sample.images, small.images]


def test_half_a_character_costs_a_row_of_a_table_not_the_file(
    tmp_path: Path, pairs: list[Sample]
) -> None:
    given = [replace(pairs[0], answer="cut \ud83d"), pairs[1]]
    for form in ("csv", "parquet", "webdataset"):
        done = write_samples(given, tmp_path / form / NAMES[form], form)
        assert (done.rows, list(done.left)) == (1, ["half a character, which is no text in UTF-8"])
    assert write_samples(given, tmp_path / "x.jsonl", "jsonl").rows == 2
    assert back(tmp_path / "x.jsonl")[0].answer == "cut \ud83d"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, pairs: list[Sample]) -> None:
    def broken() -> object:
        yield from pairs
        msg = "the input ends here"
        raise DataError(msg)

    for form, name in NAMES.items():
        path = tmp_path / form / name
        path.parent.mkdir()
        if path.suffix:
            path.write_text("as before")
        with pytest.raises(DataError, match="the input ends here"):
            write_samples(broken(), path, form)  # type: ignore[arg-type]
        assert [p.name for p in path.parent.iterdir()] == ([name] if path.suffix else [])
        assert not path.suffix or path.read_text() == "as before"


def test_calls_that_cannot_be_meant_are_refused(tmp_path: Path, pairs: list[Sample]) -> None:
    path = tmp_path / "x.jsonl"
    write_samples(pairs, path, "jsonl")
    with pytest.raises(UsageError, match="written over itself"):
        convert(path, path, "jsonl")
    with pytest.raises(UsageError, match=r"x\.csv: a file of clover is called \.json"):
        convert(path, tmp_path / "x.csv", "clover")
    with pytest.raises(UsageError, match="no form is called 'lava': did you mean 'llava'"):
        convert(path, tmp_path / "x.csv", "lava")  # type: ignore[arg-type]
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="a folder is there"):
        convert(path, tmp_path / "there", "webdataset")
    assert form_of(tmp_path / "x.CSV", pairs[0]) == "csv"
    assert form_of(tmp_path / "x.json", pairs[0]) == "llava"


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, pairs: list[Sample]) -> None:
    import tracemalloc

    def many(count: int) -> object:
        return (replace(pairs[0], answer=f"{n} " + "long " * 400) for n in range(count))

    peaks = []
    for count in (150, 750):
        tracemalloc.start()
        write_samples(many(count), tmp_path / f"{count}.json", "llava")  # type: ignore[arg-type]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    assert (tmp_path / "750.json").stat().st_size > 1_500_000


def test_the_command_tells_what_is_left_out(tmp_path: Path, images: Path, run: Run) -> None:
    rows = [
        {"image": "a.png", "caption": "Gland"},
        {"image": "gone.png", "caption": "Gland"},
        {"image": "c.png", "caption": ""},
    ]
    write(images / "t.csv", rows)
    out = tmp_path / "x.json"
    code, stdout, err = run("data", "convert", images / "t.csv", out, "--to", "clover", "--json")
    assert code == 3
    told = json.loads(stdout)
    assert (told["rows"], told["form"]) == (1, "clover")
    assert told["left_out"] == {"no such image file": 1, "no caption": 1}
    assert "1 rows left out, not read: no such image file (e.g. gone.png)" in err
    assert "1 captions are now answers to 'Describe this image.'" in err
