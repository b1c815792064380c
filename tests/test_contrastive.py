"""Images and texts in one space: against open_clip, closed forms and numbers worked by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from torch.nn.functional import normalize

from pathcli.data.corpus import Corpus
from pathcli.encoders.augment import Augment
from pathcli.encoders.contrastive import CHOICES, ContrastiveTask, Validation
from pathcli.encoders.pairs import Batches, Pairs
from pathcli.encoders.preprocess import Preprocess
from pathcli.encoders.text import clamped
from pathcli.errors import DataError, UsageError
from pathcli.settings import TrainSettings
from pathcli.store import Store
from pathcli.types import Sample

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


class Colours(torch.nn.Module):
    """Image tower: the mean colour; text tower: one vector a word. Both have three dimensions."""

    preprocess = Preprocess(8)
    text_limit = 4

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Linear(3, 3)
        self.words = torch.nn.Embedding(101, 3)
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(5.0)))

    def start(self) -> dict[str, Any]:
        torch.nn.init.normal_(self.words.weight)
        self.image.reset_parameters()
        return {"init": "random"}

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [[sum(word.encode()) % 101 for word in (text or "-").split()][:4] for text in texts]
        return torch.tensor([row + row[-1:] * (4 - len(row)) for row in rows])

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        return self.image(images.float().mean((1, 2)) / 255 - 0.5)

    def embed_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.words(tokens).mean(1)

    def scale(self) -> torch.Tensor:
        return clamped(self.logit_scale)


class Table:
    """A corpus as it is given."""

    def __init__(self, corpus: Corpus) -> None:
        self.given = corpus

    def corpus(self) -> Corpus:
        return self.given


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Twelve patches of noise in three colours, four of each, captioned by colour and number."""
    rng, made = np.random.default_rng(0), []
    for i in range(12):
        name = list(COLOURS)[i % 3]
        pixels = rng.normal(COLOURS[name], 20, (16, 20, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        made.append(
            Sample(f"{i}", (str(tmp_path / f"{i}.png"),), f"{name} {i}", group=f"g{i // 2}")
        )
    return made


def labelled(samples: list[Sample]) -> Corpus:
    named = [Sample(s.name, s.images, label=s.answer.split()[0]) for s in samples]
    said = {name: [f"{name} tissue", f"much {name}"] for name in COLOURS}
    return Corpus(named[:9], named[9:], "abc", wordings=said, prompts=said)


def task(corpus: Corpus, **given: Any) -> ContrastiveTask:
    made = TrainSettings(**{"batch": 3, "epochs": 2, "lr": 0.05} | given.pop("train", {}))
    return ContrastiveTask(model=Colours(), data=Table(corpus), train=made, **given)


def prepared(corpus: Corpus, store: Store, **given: Any) -> ContrastiveTask:
    made = task(corpus, **given)
    made.prepare(store, device="cpu", progress=lambda _: lambda done, total: None)
    return made


def pairs(loss: str = "infonce") -> Pairs:
    set_seed(2)
    return Pairs(Colours(), loss)


def batch(samples: list[Sample], corpus: Corpus | None = None, seed: int = 0) -> dict[str, Any]:
    made = Batches(corpus or Corpus(samples, [], ""), Colours(), Augment())
    return made(samples, np.random.default_rng(seed))


# --- the loss ----------------------------------------------------------------------------


def test_the_loss_is_open_clips_on_the_embeddings_of_a_batch(samples: list[Sample]) -> None:
    from pathcli.torchvision_guard import guard_torchvision

    guard_torchvision()
    from open_clip.loss import ClipLoss

    module, given = pairs(), batch(samples)
    images, texts, labels = module.embed(given)
    assert images.shape == texts.shape == (12, 3)
    assert labels.unique().numel() == 12
    theirs = ClipLoss()(normalize(images), normalize(texts), module.model.scale())
    torch.testing.assert_close(module.loss(given), theirs)


def test_rows_of_one_label_or_one_caption_are_pairs_of_each_other(samples: list[Sample]) -> None:
    same = [Sample(s.name, s.images, "one caption") for s in samples[:4]]
    module = pairs("multi-positive")
    # texts are one point: image to text is uniform over 4, and so is what is wanted
    images, texts, labels = module.embed(batch(same))
    assert labels.unique().numel() == 1
    cosines = module.model.scale() * normalize(images) @ normalize(texts[:1]).T
    towards = -torch.log_softmax(cosines[:, 0], 0).mean()
    torch.testing.assert_close(module.loss(batch(same)), (math.log(4) + towards) / 2)
    labels = batch(labelled(samples).train, labelled(samples))["labels"].tolist()
    assert labels[:3] == labels[3:6] == labels[6:9]
    assert len(set(labels)) == 3


def test_a_label_and_a_caption_of_the_same_words_do_not_mean_the_same(
    samples: list[Sample],
) -> None:
    label = Sample("a", samples[0].images, label="red")
    caption = Sample("b", samples[1].images, answer="red")
    assert batch([label, caption])["labels"].unique().numel() == 2


def test_gradients_by_way_of_embeddings_in_parts_are_those_of_the_whole_batch(
    samples: list[Sample],
) -> None:
    corpus = labelled(samples)
    for kind in ("infonce", "multi-positive"):
        whole, parts = pairs(kind), pairs(kind)
        whole.loss(batch(corpus.train, corpus)).backward()
        given = batch(corpus.train, corpus)
        cut = [{k: v[i : i + 4] for k, v in given.items()} for i in (0, 4, 8)]
        with torch.no_grad():
            held = [torch.cat(x) for x in zip(*(parts.embed(c) for c in cut), strict=True)]
        held = [x.requires_grad_() if x.is_floating_point() else x for x in held]
        parts.loss_of(*held).backward()
        for i, part in zip((0, 4, 8), cut, strict=True):
            live = parts.embed(part)[:2]
            torch.autograd.backward(live, [held[j].grad[i : i + 4] for j in (0, 1)])
        for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-6)
        assert whole.model.logit_scale.grad.abs() > 0


def test_the_scale_stays_within_1_and_100_and_comes_back_from_there() -> None:
    for value, bound in ((9.0, math.log(100)), (-1.0, 0.0)):
        log_scale = torch.nn.Parameter(torch.tensor(value))
        clamped(log_scale).backward()
        assert log_scale.item() == pytest.approx(bound)
        assert log_scale.grad.item() == pytest.approx(math.exp(bound))  # not cut off at the bound
    inside = torch.nn.Parameter(torch.tensor(2.0))
    assert clamped(inside).item() == pytest.approx(math.exp(2))


# --- batches -----------------------------------------------------------------------------


def test_a_batch_is_a_function_of_its_samples_and_its_random_numbers(
    samples: list[Sample],
) -> None:
    corpus = labelled(samples)
    made = Batches(corpus, Colours(), Augment(crop=(0.3, 0.6), turns=True, colour=0.3))

    def drawn(seed: int) -> dict[str, Any]:
        return made(list(corpus.train), np.random.default_rng(seed))

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert one["images"].shape == (9, 8, 8, 3)
    assert one["images"].dtype == torch.uint8
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one["images"], other["images"])
    assert not torch.equal(one["texts"], other["texts"])  # another wording
    assert torch.equal(one["labels"], other["labels"])


def test_an_image_that_cannot_be_read_is_named(samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3\.png: not an image"):
        batch(samples)


def test_a_broken_image_in_a_large_set_gives_way_to_another_with_its_own_caption(
    samples: list[Sample], tmp_path: Path
) -> None:
    from pathcli.data.pairs import Pictures

    (tmp_path / "3.png").write_bytes(b"no picture")
    corpus = Corpus(samples, [], "")
    made = Batches(corpus, Colours(), Augment(), Pictures(samples, max_broken=0.5))
    (one, two) = made([samples[2], samples[3]], np.random.default_rng(0))["labels"].tolist()
    healthy = Batches(corpus, Colours(), Augment())
    others = healthy([s for s in samples if s.name != "3"], np.random.default_rng(0))["labels"]
    assert one == others[2]
    assert two in others.tolist()


# --- validation --------------------------------------------------------------------------


class Fixed(Colours):
    """Embeds images and texts where the test puts them, by the mean red and the first word."""

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2)) - 110

    def embed_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.words(tokens[:, 0])


def fixed() -> Pairs:
    model = Fixed()
    with torch.no_grad():
        for name, rgb in COLOURS.items():
            model.words.weight[model.tokens([name])[0, 0]] = torch.tensor(rgb).float() - 110
    return Pairs(model, "infonce")


def test_labels_told_apart_by_text_give_balanced_accuracy_as_scikit_learn_has_it(
    samples: list[Sample],
) -> None:
    from sklearn.metrics import balanced_accuracy_score

    named = [Sample(s.name, s.images, label=s.answer.split()[0]) for s in samples[:7]]
    wrong = [Sample(s.name, s.images, label="red") for s in samples[7:9]]  # a green, a blue one
    other = [Sample(samples[9].name, samples[9].images, label="unheard of")]
    said = {name: [f"{name} x", f"{name} y"] for name in COLOURS}
    corpus = Corpus([], [*named, *wrong, *other], "", wordings=said, prompts=said)
    found = Validation(fixed(), corpus, TrainSettings(batch=4))()
    true = [s.label for s in [*named, *wrong]]
    seen = [list(COLOURS)[int(s.name) % 3] for s in [*named, *wrong]]
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, seen))
    assert set(found) == {"loss", "balanced_accuracy"}


@pytest.mark.parametrize(("first", "found_by_text"), [(200, 1.0), (150, 5 / 6)])
def test_recall_counts_a_text_that_means_the_same_and_no_other(
    first: int, found_by_text: float, tmp_path: Path
) -> None:
    # of the two green pictures one is green and called so, the other is called blue
    shown = [COLOURS["red"], (30, first, 30), COLOURS["blue"]] * 2
    shown[4] = (30, 350 - first, 30)
    captions = ["red", "green", "blue", "red", "blue", "blue"]
    rows = []
    for i, (colour, caption) in enumerate(zip(shown, captions, strict=True)):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{i}.png")
        rows.append(Sample(f"{i}", (str(tmp_path / f"{i}.png"),), caption))
    found = Validation(fixed(), Corpus([], rows, ""), TrainSettings(batch=6))()
    # the one called blue finds "green"; all others find their own word, of whichever picture
    assert found["image_to_text_r1"] == pytest.approx(5 / 6)
    # "green" finds the purer green; every "blue" finds a blue picture that is called so
    assert found["text_to_image_r1"] == pytest.approx(found_by_text)
    assert found["image_to_text_r5"] == found["text_to_image_r5"] == 1.0
    assert set(found) - {"loss"} == set(CHOICES) - {"balanced_accuracy"}


def test_validation_loss_is_the_mean_over_samples_in_batches_of_training_size(
    samples: list[Sample],
) -> None:
    module, corpus = pairs(), Corpus([], samples[:10], "")
    check = Validation(module, corpus, TrainSettings(batch=4))
    found, cut = check(), [check.samples[:4], check.samples[4:8], check.samples[8:]]
    assert sorted(int(s.name) for s in check.samples) == list(range(10))
    rng = np.random.default_rng(0)
    losses = [module.loss(check.collate(part, rng)).item() * len(part) for part in cut]
    assert found["loss"] == pytest.approx(sum(losses) / 10, rel=1e-5)
    assert check() == found


def test_validation_shows_the_square_that_encoders_see(tmp_path: Path) -> None:
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    seen = [Sample("wide", (str(tmp_path / "wide.png"),), "red")]
    check = Validation(pairs(), Corpus([], seen, ""), TrainSettings(batch=4))
    assert (check.collate(seen, np.random.default_rng(0))["images"] == 200).all()


# --- the task ----------------------------------------------------------------------------


def test_a_run_learns_the_colours_by_their_names(
    samples: list[Sample], store: Store, tmp_path: Path
) -> None:
    from pathcli.trainer import Loop

    chosen = {"epochs": 15, "lr": 0.1, "choose": "balanced_accuracy"}
    made = prepared(labelled(samples), store, train=chosen, loss="multi-positive")
    set_seed(1)
    loop = Loop(made.begin(1), made.train, tmp_path / "run", "cpu")
    assert loop.run(lambda *_: None)
    assert loop.best["balanced_accuracy"] == 1.0


def test_every_seed_has_a_model_of_its_own_drawn_from_that_seed(
    samples: list[Sample], store: Store
) -> None:
    made = prepared(Corpus(samples, [], "abc"), store)

    def drawn(seed: int) -> torch.Tensor:
        set_seed(seed)
        return made.begin(seed).module.model.words.weight

    one, other, again = drawn(1), drawn(2), drawn(1)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one is not again
    assert made.begin(1).validate is None


def test_facts_count_what_is_long_what_is_dropped_and_what_repeats(
    samples: list[Sample], store: Store
) -> None:
    long = [Sample("x", samples[0].images, "one two three four five six seven", group="g0")]
    twice = [Sample("y", samples[1].images, "green 1", group="g1")]
    corpus = Corpus(
        [*samples[:8], *long, *twice], samples[8:], "abc", {"no caption": 3}, ("no groups",)
    )
    facts = prepared(corpus, store).begin(1).facts
    assert facts["dropped"] == {"no caption": 3}
    assert facts["samples"] == {"train": 10, "val": 4}
    assert facts["groups"] == {"train": 4, "val": 2}
    assert facts["captions"]["too_long"] == 1
    assert facts["captions"]["over_most"] == 3
    json.dumps(facts)
    long_ones, repeats, last = facts["warnings"][1:]
    assert facts["warnings"][0] == "no groups"
    assert "1 of 10 training captions are longer than the 4 tokens" in long_ones
    assert "1 of 10 training captions or labels occur again" in repeats
    assert "last batch of an epoch is one sample" in last
    quiet = prepared(corpus, store, loss="multi-positive", train={"batch": 5})
    assert len(quiet.begin(1).facts["warnings"]) == 2


def test_the_identity_is_that_of_the_data_and_the_first_weights(
    samples: list[Sample], store: Store
) -> None:
    def identity(name: str) -> str:
        return prepared(Corpus(samples, [], name), store).begin(1).identity

    assert identity("abc") == identity("abc")
    assert identity("abc") != identity("abd")


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"choose": "auroc"}, "train.choose: 'auroc' is no validation metric"),
        ({"batch": 1}, "train.batch: at least 2"),
    ],
)
def test_a_call_that_cannot_be_right_is_refused_before_anything_is_read(
    train: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        task(Corpus([], [], ""), train=train)


def test_data_without_contrast_are_refused(samples: list[Sample], store: Store) -> None:
    same = [Sample(s.name, s.images, "one caption") for s in samples]
    with pytest.raises(DataError, match=r"all captions are one \('one caption'\)"):
        prepared(Corpus(same, [], ""), store)
    labelled = [Sample(s.name, s.images, f"caption {s.name}", label="x") for s in samples]
    with pytest.raises(DataError, match=r"all labels are one \('x'\)"):
        prepared(Corpus(labelled, [], ""), store, loss="multi-positive")
    assert prepared(Corpus(labelled, [], ""), store).corpus  # captions still tell images apart
    with pytest.raises(DataError, match="no sample to train on; left out: 2 no such file"):
        prepared(Corpus([], [], "", {"no such file": 2}), store)
