"""Stage 1 of a Q-Former: three losses, what may be a negative, what is measured and saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from tiny_plip import COLOURS, WORDS, bert_folder
from torch.nn.functional import cross_entropy, normalize

from pathcli.data.corpus import Corpus
from pathcli.data.pairs import Pictures
from pathcli.encoders.augment import Augment
from pathcli.errors import DataError
from pathcli.objectives import query_itc
from pathcli.settings import TrainSettings
from pathcli.store import Store
from pathcli.types import Sample
from pathcli.vlm.align import AlignTask, Batches
from pathcli.vlm.align_losses import Align, Compared, Seen, contrast
from pathcli.vlm.qformer import QFormer
from pathcli.vlm.towers import Views

TINY = {"queries": 3, "width": 32, "layers": 2, "heads": 2, "hidden": 48, "text_limit": 10}
TINY |= {"words": len(WORDS) + 1, "positions": 16}


class Patches:
    """An encoder of 8 px images: four tokens, the mean colours of the quarters."""

    name, id, tokens, input_px, row_shape = "patches", "patches-0", True, 8, (4, 3)
    loads = 0

    def load(self, device: str) -> None:
        type(self).loads += 1

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        quarters = images.float().view(-1, 2, 4, 2, 4, 3).mean((2, 4))
        return quarters.flatten(1, 2) / 255 - 0.5


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Twelve patches in three colours, each captioned by its colour and a number."""
    made = []
    for i in range(12):
        name = list(COLOURS)[i % 3]
        pixels = np.full((8, 8, 3), COLOURS[name], np.uint8)
        pixels[i % 4 :, i // 2 :] = 255 - 20 * i
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        made.append(Sample(f"{i}", (str(tmp_path / f"{i}.png"),), f"{name} tissue {i}"))
    return made


def built(bert: Path, **given: Any) -> partial[QFormer]:
    return partial(
        QFormer, **TINY | {"text": str(bert), "init": "random", "frame": "centre"} | given
    )


def align(bert: Path, *, dropout: float = 0.0) -> Align:
    set_seed(3)
    connector = built(bert, dropout=dropout)(3, None)
    connector.start()
    return Align(Patches(), connector).eval()


def collate(module: Align, corpus: Corpus) -> Batches:
    views = Views(Pictures(corpus.train), module.connector, Augment(), 8)
    return Batches(corpus, views, module.connector)


def batch(module: Align, samples: list[Sample]) -> dict[str, Any]:
    return collate(module, Corpus(samples, [], ""))(samples, np.random.default_rng(0))


class Table:
    """A corpus as it is given."""

    def __init__(self, corpus: Corpus) -> None:
        self.given = corpus

    def corpus(self) -> Corpus:
        return self.given


def task(bert: Path, corpus: Corpus, store: Store, **given: Any) -> AlignTask:
    train = TrainSettings(**{"batch": 6, "epochs": 2, "lr": 3e-3} | given.pop("train", {}))
    connector = given.pop("connector", built(bert))
    data = Table(corpus)
    made = AlignTask(encoder=Patches(), connector=connector, data=data, train=train, **given)
    made.prepare(store, device="cpu", progress=lambda _: lambda done, total: None)
    return made


# --- contrast ----------------------------------------------------------------------------


def compared(images: torch.Tensor, texts: torch.Tensor, labels: list[int]) -> Compared:
    module = Align.__new__(Align)
    torch.nn.Module.__init__(module)
    module.temperature = torch.nn.Parameter(torch.tensor(0.2))
    none = torch.zeros(1)
    seen = Seen(none, {}, none, images, texts, torch.tensor(labels))
    return module.compare(seen)


def test_with_texts_all_different_the_contrast_is_query_itc() -> None:
    images, texts = torch.randn(4, 3, 5), torch.randn(4, 5)
    found = contrast(compared(images, texts, [4, 7, 1, 2]))
    torch.testing.assert_close(found, query_itc(images, texts, 0.2))


def test_rows_of_one_meaning_are_all_positives() -> None:
    images, texts = torch.randn(4, 3, 5), torch.randn(4, 5)
    table = torch.einsum("nqd,md->nmq", normalize(images, dim=-1), normalize(texts, dim=-1))
    logits = table.amax(-1) / 0.2
    wanted = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]])
    wanted = 0.9 * wanted + 0.1 / 4
    expected = (cross_entropy(logits, wanted) + cross_entropy(logits.T, wanted)) / 2
    torch.testing.assert_close(contrast(compared(images, texts, [9, 1, 9, 5])), expected)


# --- matching ----------------------------------------------------------------------------


def test_negatives_are_never_of_the_same_meaning(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = align(bert)
    asked: list[tuple[list[int], list[int]]] = []

    def together(tokens: torch.Tensor, text: dict[str, torch.Tensor]) -> torch.Tensor:
        asked.append((text["ids"][:, 1].tolist(), tokens[:, 0, 0].int().tolist()))
        return torch.zeros(len(tokens), 3, 32)

    monkeypatch.setattr(module.connector, "together", together)
    number, labels = torch.arange(4), torch.tensor([0, 1, 0, 2])
    text = {"ids": torch.stack([number, number], 1), "mask": torch.ones(4, 2, dtype=torch.int64)}
    tokens = number[:, None, None].float().expand(4, 4, 3)
    drawn = set()
    for _ in range(30):
        images, texts = torch.randn(4, 3, 8), torch.randn(4, 8)
        seen = Seen(tokens, text, tokens, images, texts, labels)
        logits, truth = module.matches(seen, module.compare(seen))
        assert logits.shape == (12, 3, 2)
        assert truth.tolist() == [1] * 4 + [0] * 8
        read, shown = asked[-1]
        assert read[:8] == [0, 1, 2, 3, 0, 1, 2, 3]  # pairs; each text with another image
        assert shown[:4] + shown[8:] == [0, 1, 2, 3, 0, 1, 2, 3]
        for t, i in zip(read[4:], shown[4:], strict=True):
            assert labels[t] != labels[i]
            drawn.add((t, i))
    assert drawn == {(a, b) for a in range(4) for b in range(4) if labels[a] != labels[b]}


def test_a_batch_of_one_meaning_is_matched_with_its_own_texts_alone(
    bert: Path, samples: list[Sample]
) -> None:
    module = align(bert)
    seen = module.see(batch(module, [samples[0]] * 3))
    logits, truth = module.matches(seen, module.compare(seen))
    assert logits.shape == (3, 3, 2)
    assert truth.tolist() == [1, 1, 1]
    assert torch.isfinite(torch.stack(module.losses(seen))).all()


# --- captioning --------------------------------------------------------------------------


def test_a_word_changes_no_logit_before_it_and_no_image(bert: Path, samples: list[Sample]) -> None:
    module = align(bert)
    given = batch(module, samples[:2])
    seen = module.see(given)
    before = module.logits(seen)
    assert before.shape == (2, 5, module.connector.word_embeddings.shape[0])
    for place in range(1, 5):
        ids = given["text"]["ids"].clone()
        ids[0, place] = 7
        changed = module.see(given | {"text": given["text"] | {"ids": ids}})
        after = module.logits(changed)
        assert torch.equal(after[0, :place], before[0, :place])
        assert torch.equal(after[1], before[1])
        assert not torch.allclose(after[0, place], before[0, place])
        assert torch.equal(changed.images, seen.images)


def test_the_first_word_is_replaced_and_padding_is_passed_over(
    bert: Path, samples: list[Sample]
) -> None:
    module = align(bert)
    short = Sample("s", samples[0].images, "red")
    given = batch(module, [short, samples[1]])
    assert given["text"]["mask"].sum(1).tolist() == [3, 5]
    found = module.captions(module.see(given))
    alone = [module.captions(module.see(batch(module, [s]))) for s in (short, samples[1])]
    torch.testing.assert_close(found, (2 * alone[0] + 4 * alone[1]) / 6)
    ids = given["text"]["ids"].clone()
    ids[0, 3:] = 9
    text = given["text"] | {"ids": ids}
    torch.testing.assert_close(module.captions(module.see(given | {"text": text})), found)
    ids[:, 0] = 8
    torch.testing.assert_close(module.captions(module.see(given | {"text": text})), found)


def test_words_are_said_through_the_embeddings_they_are_read_by(bert: Path) -> None:
    module = align(bert)
    head, states = module.word_head, torch.randn(2, 32)
    hidden = head.norm(torch.nn.functional.gelu(head.dense(states)))
    words = module.connector.word_embeddings
    torch.testing.assert_close(head(states, words), hidden @ words.T + head.bias)
    assert sum(p.shape == words.shape for p in module.parameters()) == 1


# --- all three ---------------------------------------------------------------------------


def test_all_three_losses_fall_on_a_few_images(bert: Path, samples: list[Sample]) -> None:
    module = align(bert)
    for weight in (p for p in module.parameters() if p.ndim == 2):
        weight.data.mul_(5)  # so that four images do not look alike from the start
    given = batch(module, samples[:4])
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        now = torch.stack(module.losses(module.see(given)))
        now.sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
        losses.append(now.detach())
    assert (losses[-1] < losses[0] - torch.tensor([0.5, 0.5, 1.0])).all(), losses
    assert losses[-1][1] < 0.3  # a third are pairs: without looking it stays at 0.64
    torch.testing.assert_close(module.loss(given), now.sum(), atol=0.3, rtol=0)


def test_heads_come_with_the_first_weights(bert: Path, tmp_path: Path) -> None:
    module = align(bert)
    theirs = {"vision_proj.weight": torch.full((256, 32), 0.1), "temp": torch.tensor(0.05)}
    theirs |= {"Qformer.cls.predictions.bias": torch.arange(len(WORDS) + 1.0)}
    theirs |= {"Qformer.cls.predictions.transform.dense.weight": torch.eye(32)}
    torch.save({"model": theirs}, tmp_path / "blip2.pth")
    before = module.itm_head.weight.clone()
    taken = module.begin_heads(str(tmp_path / "blip2.pth"))["taken"]
    names = {"vision_proj.weight", "temperature", "word_head.bias", "word_head.dense.weight"}
    assert set(taken) == names
    assert module.temperature.item() == pytest.approx(0.05)
    assert torch.equal(module.vision_proj.weight, theirs["vision_proj.weight"])
    assert module.word_head.bias[-1] == len(WORDS)
    assert torch.equal(module.itm_head.weight, before)
    torch.save({"vision_proj.weight": torch.ones(8, 32)}, tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"vision_proj.weight is \(8, 32\), not \(256, 32\)"):
        module.begin_heads(str(tmp_path / "other.pth"))
    assert module.begin_heads("random") == {"taken": []}
