"""Cleaning pairs of images and captions: what stays, what goes, and why."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathcli.curation.agreement import Drawn, agreement
from pathcli.curation.clean import Judges, clean
from pathcli.curation.clean_report import facts, write_report
from pathcli.curation.duplicates import Looks, Seen, looks
from pathcli.curation.judges import ByColour, ByEncoder, ByLexicon, Verdict
from pathcli.curation.species import read_lexicon
from pathcli.data.formats import Source, samples
from pathcli.errors import DataError, UsageError

LONG = "This section of the colon shows crooked glands with crowded dark nuclei and much mucin"


def tissue(seed: int, side: int = 96) -> np.ndarray:
    """Return purple blobs on pink, as haematoxylin and eosin would be."""
    import cv2

    noise = np.random.default_rng(seed).normal(0, 1, (side, side))
    share = cv2.GaussianBlur(noise, (0, 0), side / 24)
    share = ((share - share.min()) / np.ptp(share))[..., None]
    mixed = np.array([235, 180, 205]) * (1 - share) + np.array([95, 60, 140]) * share
    fine = np.random.default_rng(seed + 10_000).normal(0, 4, mixed.shape)
    return (mixed + fine).clip(0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **how: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path.name


def table(folder: Path, rows: list[dict[str, object]]) -> Source:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return Source(path)


def dropped(out: Path) -> list[tuple[str, str]]:
    with (out / "dropped.csv").open() as file:
        return [(row["id"], row["reason"]) for row in csv.DictReader(file)]


def kept(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()]


# --- the lexicon -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("Lungs of infected mice on day 7", "mice"),
        ("RABBIT CORNEA, H&E", "RABBIT"),
        ("Sprague-Dawley kidney", "Sprague-Dawley"),
        ("stained with mouse anti-human CD3 in mice", "mice"),
        ("Guinea pigs were sensitised", "Guinea pigs"),
        ("Porcine liver after perfusion", "Porcine"),
        ("a canine mast cell tumour", "canine"),
        ("zebrafish larvae", "zebrafish"),
        ("mouse anti-human CD3 antibody", ""),
        ("rabbit polyclonal, goat anti-rabbit IgG and anti-mouse secondary", ""),
        ("goat and rabbit sera", ""),
        ("HER2 FISH of the tumour; DOG-1 and a CAT scan", ""),
        ("a horseshoe kidney, chicken-wire calcification, owl-eye inclusions", ""),
        ("cat scratch disease; rat-bite fever; swine flu; monkeypox; monkey pox", ""),
        ("E. coli in the crypts, Ascaris in the lumen", ""),
        ("bovine serum albumin, horse-radish peroxidase", ""),
        ("butterfly rash, calf muscle, maxillary canine teeth", ""),
        ("moderate ratio of rates, category, catheter, pigment, doggedly", ""),
    ],
)
def test_animals_are_told_from_phrases_that_name_them(caption: str, name: str) -> None:
    assert read_lexicon().found(caption) == name


def test_a_lexicon_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("names: [[yeti]]\n")
    with pytest.raises(DataError, match="acronyms"):
        read_lexicon(path)


def test_an_own_lexicon_is_read(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("names: [[yeti]]\nacronyms: []\nallowed: ['{name} like']\n")
    own = read_lexicon(path)
    assert own.found("two yetis") == "yetis"
    assert own.found("yeti-like hair of a mouse") == ""
    assert own.digest != read_lexicon().digest


# --- copies ------------------------------------------------------------------------------


def test_hashes_stay_under_recompression_and_resizing_and_differ_between_images() -> None:
    import cv2

    images = [tissue(seed, 224) for seed in range(12)]
    seen = Seen(4)
    for number, image in enumerate(images):
        seen.add(number, f"{number:064x}", looks(image))
    for number, image in enumerate(images):
        bgr = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
        again = cv2.imdecode(bgr, cv2.IMREAD_COLOR)[..., ::-1]
        small = cv2.resize(np.ascontiguousarray(again), (150, 150), interpolation=cv2.INTER_AREA)
        found = seen.find("f" * 64, looks(small))
        assert found is not None
        assert found[0] == number
    assert all(seen.find("f" * 64, looks(tissue(100 + seed, 224))) is None for seed in range(12))


def test_the_index_finds_what_comparing_all_pairs_finds() -> None:
    rng = np.random.default_rng(0)
    base = [int(x) for x in rng.integers(0, 2**63, 100)]
    seen = Seen(5)
    for number, bits in enumerate(base):
        seen.add(number, f"{number:016x}", Looks(bits, 0))
    for bits in base:
        for flips in range(9):
            other = bits
            for place in rng.choice(64, flips, replace=False):
                other ^= 1 << int(place)
            nearest = min((other ^ each).bit_count() for each in base)
            found = seen.find("f" * 16, Looks(other, 0))
            assert (found[1] if found else None) == (nearest if nearest <= 5 else None)


def test_columns_have_to_agree_too() -> None:
    seen = Seen(3)
    seen.add(0, "0" * 16, Looks(1, 0))
    assert seen.find("f" * 16, Looks(1, 7)) == (0, 3)
    assert seen.find("f" * 16, Looks(1, 15)) is None


def test_flat_images_are_copies_by_their_bytes_alone() -> None:
    assert looks(np.full((32, 32, 3), 240, np.uint8)) is None
    seen = Seen()
    seen.add(4, "a" * 64, None)
    assert seen.find("a" * 64, None) == (4, -1)
    assert seen.find("b" * 64, None) is None


def test_a_distance_at_which_all_is_alike_is_refused() -> None:
    with pytest.raises(UsageError, match="0 to 15"):
        Seen(16)


# --- cleaning ----------------------------------------------------------------------------


def mixed(folder: Path) -> Source:
    first = tissue(1)
    save(folder / "a.png", first)
    save(folder / "copy.png", first)
    save(folder / "near.jpg", first, quality=70)
    save(folder / "b.png", tissue(2))
    chart = np.full((96, 96, 3), 255, np.uint8)
    chart[40:44] = (200, 30, 30)
    save(folder / "chart.png", chart)
    save(folder / "night.png", tissue(3) // 8)
    (folder / "broken.png").write_bytes(b"no image")
    long = {"caption": f"{LONG} in every field that was looked at"}
    return table(
        folder,
        [
            {"image": "a.png", "id": 7, "site": "colon", **long},
            {"image": "b.png", "caption": LONG + " in mice and in no other kind of animal"},
            {"image": "b.png", "caption": "Colon."},
            {"image": "copy.png", **long},
            {"image": "near.jpg", **long},
            {"image": "chart.png", **long},
            {"image": "night.png", **long},
            {"image": "broken.png", **long},
            {"image": "gone.png", **long},
            {"image": "b.png", "caption": f"{LONG}, as chicken-wire, in every field looked at"},
        ],
    )


CHEAP = Judges(texts=ByLexicon(), images=ByColour())


def test_each_row_is_kept_or_dropped_for_its_reason_in_order(tmp_path: Path) -> None:
    done = clean(mixed(tmp_path / "in"), tmp_path / "out", CHEAP)
    assert dropped(tmp_path / "out") == [
        ("b.png", "not human"),
        ("b.png", "short caption"),
        ("copy.png", "copy"),
        ("near.jpg", "near copy"),
        ("chart.png", "not pathology"),
        ("night.png", "not pathology"),
        ("broken.png", "image cannot be read"),
        ("gone.png", "no such image file"),
    ]
    assert (done.rows, done.kept, done.dropped.total()) == (10, 2, 8)
    rows = kept(tmp_path / "out")
    assert rows[0] == {
        "image": "../in/a.png",
        "id": 7,
        "site": "colon",
        "caption": f"{LONG} in every field that was looked at",
    }
    again = list(samples(Source(tmp_path / "out" / "kept.jsonl")))
    assert [Path(s.images[0]).resolve().name for s in again] == ["a.png", "b.png"]


def test_half_a_character_costs_no_file(tmp_path: Path) -> None:
    half = {"image": save(tmp_path / "a.png", tissue(1)), "caption": f"{LONG} \ud83d"}
    done = clean(table(tmp_path, [half]), tmp_path / "out", Judges(), min_words=5)
    assert kept(tmp_path / "out")[0]["caption"] == half["caption"]
    write_report(done, facts(Judges(), {"half": "\ud83d"}), "")


def test_an_image_of_a_row_that_was_dropped_is_no_original(tmp_path: Path) -> None:
    save(tmp_path / "a.png", tissue(1))
    rows = [{"image": "a.png", "caption": "Short."}, {"image": "a.png", "caption": LONG}]
    done = clean(table(tmp_path, rows), tmp_path / "out", Judges(), min_words=5)
    assert (done.kept, dict(done.dropped)) == (1, {"short caption": 1})


@pytest.mark.parametrize(("copies", "left"), [("image", 2), ("pair", 3), ("none", 4)])
def test_captions_of_one_row_stay_together_and_other_rows_obey_the_rule(
    tmp_path: Path, copies: str, left: int
) -> None:
    save(tmp_path / "a.png", tissue(1))
    save(tmp_path / "b.jpg", tissue(1), quality=80)
    rows = [
        {"image": "a.png", "caption": ["One caption.", "Another caption."]},
        {"image": "b.jpg", "caption": "one  CAPTION"},
        {"image": "a.png", "caption": "A third."},
    ]
    done = clean(table(tmp_path, rows), tmp_path / "out", Judges(), min_words=0, copies=copies)
    assert done.kept == left


def test_images_of_an_archive_are_written_beside_the_table(tmp_path: Path) -> None:
    save(tmp_path / "1.png", tissue(1))
    (tmp_path / "1.json").write_text(json.dumps({"caption": LONG, "group": "p1"}))
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name in ("1.png", "1.json"):
            archive.add(tmp_path / name, name)
    source = Source(tmp_path / "shard.tar")
    clean(source, tmp_path / "out", CHEAP, min_words=5)
    (sample,) = samples(Source(tmp_path / "out" / "kept.jsonl"))
    assert (sample.name, sample.group, sample.answer) == ("images/shard/1.png", "p1", LONG)
    assert Path(str(sample.images[0])).read_bytes() == (tmp_path / "1.png").read_bytes()


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    source = mixed(tmp_path)
    with pytest.raises(UsageError, match="--copies"):
        clean(source, tmp_path / "out", Judges(), copies="images")
    with pytest.raises(UsageError, match="--format"):
        clean(source, tmp_path / "out", Judges(), layout="llava")


# --- an encoder -------------------------------------------------------------------------


def test_an_encoder_drops_what_is_nearer_to_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    from fakes import Colours

    from pathcli.curation import judges

    kinds = {"keep": {"histology": ["red"]}, "drop": {"chart": ["grey"], "gel": ["blue"]}}
    monkeypatch.setattr(judges, "words", lambda: {"kinds": kinds})
    images = [np.full((40, 40, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 90))]
    found = ByEncoder(Colours())(["a", "b"], images)
    assert [verdict.out for verdict in found] == [False, True]
    assert found[1].why.startswith("gel (")


# --- agreement ---------------------------------------------------------------------------


def test_agreement_is_that_of_the_hand_worked_table() -> None:
    cheap = [True] * 20 + [True] * 5 + [False] * 10 + [False] * 15
    dear = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    found = agreement([*cheap, True], [*dear, None])
    assert found.table == ((15, 5), (10, 20))
    assert (found.n, found.undecided) == (50, 1)
    assert found.kappa.value == pytest.approx(0.4)
    assert found.kappa.low < 0.4 < found.kappa.high
    assert (found.precision.value, found.recall.value) == (0.8, pytest.approx(2 / 3))


def test_agreement_on_nothing_is_undefined() -> None:
    assert {row["value"] for row in agreement([True], [None]).rows()} == {None}


def test_a_drawn_sample_is_uniform() -> None:
    counts = np.zeros(20)
    for seed in range(2000):
        drawn: Drawn[int] = Drawn(5, seed)
        for value in range(20):
            drawn.offer(value)
        counts[drawn.found] += 1
    assert abs(counts - 500).max() < 100  # 5 standard deviations


def test_the_rule_says_why() -> None:
    dark, kept_in = ByColour()(["", ""], [tissue(3) // 8, tissue(3)])
    assert dark.out
    assert "dark" in dark.why
    assert kept_in == Verdict(out=False)
