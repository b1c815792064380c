import csv
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import MeanColour
from PIL import Image

from pathcli import registry
from pathcli.encoders import build_encoder
from pathcli.encoders.embedding import Embedder
from pathcli.encoders.zeroshot import class_probabilities, class_weights, too_long, unfamiliar
from pathcli.errors import DataError, UsageError
from pathcli.evals.patch_scores import measure_patches
from pathcli.evals.zeroshot import zeroshot

WORDS = {"red": (1.0, 0, 0), "scarlet": (0.8, 0.1, 0.1), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}


class ColourWords(MeanColour):
    """Reads the names of colours: a text's embedding is the sum of those in it."""

    name = "colour-words"
    id = "colour-words-000000000000"
    text_limit = 8

    def load(self, device: str) -> None:
        super().load(device)
        self.logit_scale = 10.0

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [[WORDS[word] for word in text.split() if word in WORDS] for text in texts]
        sums = np.array([np.sum(row or [(0, 0, 0)], axis=0) for row in rows])
        return torch.from_numpy(sums).float() * 7

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) + 2 for text in texts]


class Cautious(ColourWords):
    """Knows bright images only."""

    name = "cautious"
    id = "cautious-000000000000"

    def familiar(self, features: torch.Tensor) -> torch.Tensor:
        assert features.dtype == torch.float32
        return features.max(1).values > 150


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cls in (("colour-words", ColourWords), ("cautious", Cautious)):
        monkeypatch.setitem(registry.BUILTIN["encoder"], name, f"{__name__}:{cls.__name__}")
    few = functools.partial(measure_patches, replicates=60)
    monkeypatch.setattr("pathcli.evals.patch_scores.measure_patches", few)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Class folders red and green, 6 images each; one red image is green, one is broken."""
    root = tmp_path / "flat"
    for label, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30))):
        (root / label).mkdir(parents=True)
        for i in range(6):
            pixels = np.full((32, 32, 3), colour, np.uint8) + np.uint8(i)
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    Image.fromarray(np.full((32, 32, 3), (20, 100, 20), np.uint8)).save(root / "red" / "5.png")
    (root / "green" / "5.png").write_bytes(b"broken")
    return root


def built(name: str = "colour-words") -> ColourWords:
    encoder = build_encoder(name)
    assert isinstance(encoder, ColourWords)
    encoder.load("cpu")
    return encoder


# --- the classifier ------------------------------------------------------------------------


def test_a_class_is_the_normalised_mean_of_its_normalised_texts() -> None:
    weights = class_weights(built(), [["a red", "scarlet scarlet"], ["green"]]).numpy()
    scarlet = np.array(WORDS["scarlet"]) / np.linalg.norm(WORDS["scarlet"])
    mean = (np.array([1.0, 0, 0]) + scarlet) / 2
    assert np.allclose(weights[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert np.allclose(weights[1], [0, 1, 0])


def test_probabilities_are_the_softmax_of_scaled_cosines() -> None:
    features = np.array([[3.0, 4.0], [0, 100.0]], np.float16)
    found = class_probabilities(features, torch.eye(2), 10.0)
    # cosines 0.6 and 0.8: the odds are exp(-2) to 1
    odds = np.exp(-2.0)
    assert np.allclose(found[0], [odds / (1 + odds), 1 / (1 + odds)])
    assert np.allclose(found[1], [1 / (1 + np.exp(10)), 1 / (1 + np.exp(-10))])
    logits = 10 * torch.nn.functional.normalize(torch.from_numpy(features).double(), dim=1)
    assert np.allclose(found, logits.softmax(1).numpy())


def test_texts_and_images_of_different_spaces_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(3,\) and text features \(2,\) differ"):
        class_probabilities(np.zeros((1, 3), np.float16), torch.eye(2), 1.0)


def test_texts_without_a_direction_are_refused() -> None:
    with pytest.raises(DataError, match="no direction"):
        class_weights(built(), [["nothing known"], ["green"]])


def test_only_encoders_that_can_say_abstain() -> None:
    features = np.array([[200, 0, 0], [100, 90, 0]], np.float16)
    assert unfamiliar(built(), features) is None
    told = unfamiliar(built("cautious"), features)
    assert told is not None
    assert told.tolist() == [False, True]


def test_texts_beyond_the_limit_are_found() -> None:
    assert too_long(built(), ["one two three four five six", "1 2 3 4 5 6 7"]) == ["1 2 3 4 5 6 7"]


# --- the evaluation ------------------------------------------------------------------------


def test_labels_and_what_texts_say_are_set_side_by_side(flat: Path) -> None:
    scored = zeroshot(str(flat), Embedder(built()))
    assert scored.classes == ("green", "red")
    assert scored.confusion.tolist() == [[5, 0], [1, 5]]
    assert dict(scored.dropped) == {"not a readable image": 1}
    assert scored.texts["red"] == ("An H&E image of red",)
    assert scored.abstained is None
    numbers = measure_patches(scored)
    assert numbers["accuracy"].value == pytest.approx(10 / 11)
    assert numbers["balanced_accuracy"].value == pytest.approx((1 + 5 / 6) / 2)
    assert any("no groups are known" in w for w in scored.warnings)


def test_other_prompts_turn_the_classes_round(flat: Path) -> None:
    scored = zeroshot(str(flat), Embedder(built()), prompts=["red=green", "green=red"])
    assert scored.confusion.tolist() == [[0, 5], [5, 1]]


def test_a_second_run_encodes_nothing(flat: Path) -> None:
    assert zeroshot(str(flat), Embedder(built())).provenance["encoded"] == 12
    assert zeroshot(str(flat), Embedder(built()), ensemble=True).provenance["encoded"] == 0


def test_prompts_that_are_cut_and_images_that_repeat_are_told(flat: Path) -> None:
    (flat / "red" / "4.png").write_bytes((flat / "red" / "0.png").read_bytes())
    scored = zeroshot(
        str(flat), Embedder(built()), template="a very long and winding text about {}"
    )
    assert any("2 of 2 prompts are cut at 8 tokens" in w for w in scored.warnings)
    assert any(
        w.endswith("byte for byte copies of others, and count again: 1") for w in scored.warnings
    )


def test_a_long_prompt_is_told_in_short(flat: Path) -> None:
    scored = zeroshot(str(flat), Embedder(built()), prompts=["red=" + "red " * 500])
    (told,) = (w for w in scored.warnings if "cut at 8 tokens" in w)
    assert len(told) < 160


def test_parts_that_labels_keep_apart_are_not_scored_together_in_silence(flat: Path) -> None:
    rows = [
        f"{c}/{i}.png,{c},{'train' if i < 3 else 'test'}"
        for c in ("red", "green")
        for i in range(5)
    ]
    (flat / "labels.csv").write_text("\n".join(["image,label,split", *rows]))

    def told(split: str | None) -> list[str]:
        scored = zeroshot(str(flat), Embedder(built()), split=split)
        return [w for w in scored.warnings if "scored together" in w]

    assert "--split test scores one part" in told(None)[0]
    assert told("all") == told("test") == []


def test_an_encoder_without_a_text_tower_is_refused(flat: Path, fake: type) -> None:
    with pytest.raises(UsageError, match="no text tower"):
        zeroshot(str(flat), Embedder(build_encoder("fake")))


# --- the command ---------------------------------------------------------------------------


def test_the_command_prints_numbers_and_writes_a_report(
    flat: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, text, err = run("zeroshot", flat, "--encoder", "colour-words", "--out", out, "--json")
    assert code == 0, err
    report = json.loads(text)
    assert report["metrics"]["accuracy"]["value"] == pytest.approx(0.9091)
    assert report["metrics"]["accuracy"]["n"] == 11
    for name in ("balanced_accuracy", "weighted_f1", "macro_f1", "auroc"):
        metric = report["metrics"][name]
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert report["provenance"]["dropped"] == {"not a readable image": 1}
    assert report["provenance"]["texts"] == {
        "green": ["An H&E image of green"],
        "red": ["An H&E image of red"],
    }
    assert "left out: 1 (not a readable image)" in err
    page = Path(report["report"])
    assert page.parent.parent == out
    assert page.parent.name.startswith("zeroshot-flat-colour-words-")
    assert "Research use only" in page.read_text()
    with (page.parent / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11
    assert {row["name"]: row["predicted"] for row in rows}["red/5.png"] == "green"


def test_the_command_says_what_the_classes_are_called_and_what_others_found(
    flat: Path, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "colours.yaml"
    path.write_text(
        "title: Colours\ntemplate: a {} thing\n"
        "classes:\n  - {key: red, text: red, synonyms: [scarlet]}\n  - {key: green, text: green}\n"
        "published:\n  - {metric: accuracy, data: other images, source: a book, values: {X: 0.5}}\n"
    )
    labels = tmp_path / "labels.csv"
    with labels.open("w", newline="") as file:
        rows = [[f"{c}/{i}.png", c, f"g{i // 2}{c}"] for c in ("red", "green") for i in range(5)]
        csv.writer(file).writerows([["image", "label", "group"], *rows])
    arguments = ("--data", flat, "--labels", labels, "--encoder", "cautious", "--ensemble")
    code, out, err = run("zeroshot", path, *arguments)
    assert code == 0, err
    assert "a red thing | An image of red | An H&E patch of red" in " ".join(out.split())
    assert "a book" in out
    assert "not comparable" in err
    assert "0 of 10 images were not named" in err
    assert "Research use only; not for diagnosis." in err
    assert "no groups are known" not in err


def test_another_question_goes_into_another_folder(flat: Path, run: Run, tmp_path: Path) -> None:
    pages = set()
    for more in ([], ["--ensemble"], ["--encoder", "cautious"], ["--prompt", "red=scarlet"], []):
        code, out, err = run("zeroshot", flat, "--encoder", "colour-words", *more, "--json")
        assert code == 0, err
        pages.add(json.loads(out)["report"])
    assert len(pages) == 4


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    flat: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("zeroshot", flat, "--encoder", "colour-words", "--out", tmp_path / "file")
    assert code == 2
    assert "a file is where a folder is needed" in err
    assert not (tmp_path / "default-store").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["lc-lung"], 2, "give --data DIR"),
        (["lc-lungs"], 2, "did you mean 'lc-lung'"),
        (["lc-lung", "--data", "absent"], 5, "no such folder"),
        (["lc-lung", "--data", ".", "--prompt", "x"], 5, "neither labels.csv"),
    ],
)
def test_wrong_calls_end_with_one_line_and_the_right_code(
    run: Run, arguments: list[str], code: int, told: str
) -> None:
    found, _, err = run("zeroshot", *arguments, "--encoder", "colour-words")
    assert found == code
    assert told in err


def test_a_report_says_whether_the_classes_were_seen_in_training() -> None:
    from pathcli.encoders.mini_clip import MiniClip
    from pathcli.evals.patch_scores import seen_before

    assert "has seen: it was trained on the train groups" in seen_before(MiniClip(), "lc-lung")
    assert seen_before(MiniClip(), "crc-100k") == ""
    assert "its model card says" in seen_before(ColourWords(), "lc-lung")
