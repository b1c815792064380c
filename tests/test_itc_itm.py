"""PLIP's training: momentum and queues, matching, and the task on a toy problem."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from tiny_plip import COLOURS, WORDS, bert_folder, images, model, started
from torch.nn.functional import normalize
from two import in_two_processes

from pathcli.data.corpus import Corpus
from pathcli.encoders.augment import Augment
from pathcli.encoders.itc_itm import Check, ItcItm, ItcItmTask
from pathcli.encoders.pairs import Batches
from pathcli.encoders.pallava_plip import PallavaPlipModel
from pathcli.errors import UsageError
from pathcli.recipe import load_recipe, resolve_recipe
from pathcli.settings import TrainSettings
from pathcli.state import fill, trainable_state
from pathcli.trainer import Loop
from pathcli.types import Sample


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Twelve patches in three colours, each captioned by its colour and a number."""
    made = []
    for i in range(12):
        name = list(COLOURS)[i % 3]
        pixels = np.full((24, 24, 3), COLOURS[name], np.uint8)
        pixels[: 2 * i, :12] = 255 - 20 * i
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        made.append(Sample(f"{i}", (str(tmp_path / f"{i}.png"),), f"{name} tissue {i}"))
    return made


def batch(samples: list[Sample], plip: PallavaPlipModel) -> dict[str, Any]:
    return Batches(Corpus(samples, [], ""), plip, Augment())(samples, np.random.default_rng(0))


# --- momentum ------------------------------------------------------------------------------


def test_the_slow_weights_start_equal_and_follow_by_the_formula(bert: Path) -> None:
    plip = started(bert, momentum=0.9)
    pixels, tokens = plip.preprocess(images()), plip.tokens(["red", "a"])
    fast = plip.towers(pixels, **tokens)
    torch.testing.assert_close(plip.slow_embeddings(pixels, tokens), fast)
    first = plip.towers.image_projection.weight.detach().clone()
    with torch.no_grad():
        plip.towers.image_projection.weight.add_(1)
    torch.testing.assert_close(plip.slow_embeddings(pixels, tokens), fast)
    plip.follow()
    moved = copy.deepcopy(plip.towers)
    moved.image_projection.weight.data = 0.9 * first + 0.1 * (first + 1)
    torch.testing.assert_close(plip.slow_embeddings(pixels, tokens), moved(pixels, **tokens))


def test_a_batch_moves_queues_in_training_and_nothing_in_evaluation(
    bert: Path, samples: list[Sample]
) -> None:
    module = ItcItm(started(bert))
    given = batch(samples[:4], module.model)
    before = trainable_state(module)
    module.eval().loss(given)
    after = trainable_state(module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    module.train()
    for _ in range(3):
        module.loss(given)
    assert module.model.image_place.item() == 2  # 12 rows into 10 places
    assert module.model.steps.item() == 3
    assert not torch.equal(module.model.text_queue, before["model.text_queue"])


def test_soft_targets_rise_over_the_first_batches(bert: Path) -> None:
    plip = started(bert, alpha=0.4, alpha_steps=4)
    shares = []
    for _ in range(6):
        shares.append(float(plip.soft()))
        plip.remember(torch.ones(1, 8), torch.ones(1, 8))
    assert shares == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert started(bert, alpha=0.4).soft() == 0.4


def test_the_temperature_is_put_back_into_its_range(bert: Path) -> None:
    plip = started(bert)
    plip.temperature.data.fill_(-3)
    assert plip.scale().item() == pytest.approx(1000)
    assert plip.temperature.item() == pytest.approx(0.001)


# --- matching ------------------------------------------------------------------------------


def test_negatives_are_never_of_the_same_meaning(
    bert: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ItcItm(started(bert))
    labels = torch.tensor([0, 1, 0, 2])
    number = torch.arange(4.0)
    asked: list[tuple[list[float], list[float]]] = []

    def compare(ids: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        asked.append((ids[:, 1].tolist(), seen[:, 0, 0].tolist()))
        return torch.zeros(len(ids), 2)

    monkeypatch.setattr(module.model.towers, "compare", compare)
    seen = number[:, None, None].expand(4, 5, 32)
    tokens = {"ids": torch.stack([number, number], 1).long(), "mask": torch.ones(4, 2).long()}
    for _ in range(20):
        pair = torch.randn(4, 8), torch.randn(4, 8)
        _, truth = module.matches(seen, tokens, pair, labels)
        assert truth.tolist() == [1] * 4 + [0] * 8
        text, image = asked[-1]
        assert text[:4] == image[:4] == [0, 1, 2, 3]
        for t, i in zip(text[4:], image[4:], strict=True):
            assert labels[int(t)] != labels[int(i)]


def test_a_batch_of_one_meaning_has_positives_alone(bert: Path, samples: list[Sample]) -> None:
    module = ItcItm(started(bert))
    given = batch([samples[0]] * 3, module.model)
    seen = module.model.towers.see(module.model.preprocess(given["images"]))
    pair = torch.randn(3, 8), torch.randn(3, 8)
    logits, truth = module.matches(seen, given["texts"], pair, given["labels"])
    assert logits.shape == (3, 2)
    assert truth.tolist() == [1, 1, 1]
    assert torch.isfinite(module.loss(given))


# --- the task ------------------------------------------------------------------------------


class Table:
    """A corpus as it is given."""

    def __init__(self, corpus: Corpus) -> None:
        self.given = corpus

    def corpus(self) -> Corpus:
        return self.given


def task(bert: Path, samples: list[Sample], **given: Any) -> ItcItmTask:
    train = TrainSettings(**{"batch": 6, "epochs": 2, "lr": 3e-3} | given)
    corpus = Corpus(samples, samples[:5], "abc")
    made = ItcItmTask(model=model(bert), data=Table(corpus), train=train)
    made.prepare(None, device="cpu", progress=lambda _: lambda done, total: None)
    return made


def test_both_losses_fall_on_a_toy_problem(bert: Path, samples: list[Sample]) -> None:
    set_seed(5)
    module = ItcItm(started(bert, momentum=0.5, alpha=0.2))
    given = batch(samples, module.model)
    check = Check(module, Corpus([], samples, ""), TrainSettings(batch=12))
    module.eval()
    with torch.no_grad():
        before = check()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 3e-3)
    module.train()
    for _ in range(40):
        optimizer.zero_grad()
        loss = module.loss(given)
        assert torch.isfinite(loss)
        loss.backward()
        assert all(p.grad is not None for p in module.model.towers.parameters())
        optimizer.step()
    module.eval()
    with torch.no_grad():
        after = check()
    assert after["loss"] < before["loss"] - 0.5
    assert after["itm_loss"] < before["itm_loss"]
    assert after["image_to_text_r5"] > before["image_to_text_r5"]
    assert set(after) >= {"itm_loss", "itm_accuracy", "text_to_image_r5"}


def test_validation_adds_up_both_losses_and_repeats(bert: Path, samples: list[Sample]) -> None:
    work = task(bert, samples).begin(1)
    work.module.eval()
    with torch.no_grad():
        found, again = work.validate(), work.validate()
        shown = work.validate.collate(samples[:5], np.random.default_rng(0))
        parts = work.module.embed(shown)
        plain = float(work.module.loss_of(*parts))
    assert found == again
    assert found["loss"] == pytest.approx(plain + found["itm_loss"], abs=1e-5)


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(
    bert: Path, samples: list[Sample], tmp_path: Path
) -> None:
    made, states = task(bert, samples), []
    for name, stops in {"whole": [None], "stopped": [1, 3, None]}.items():
        for stop in stops:
            set_seed(7)
            work = made.begin(1)
            loop = Loop(work, made.train, tmp_path / name, "cpu")
            loop.run(lambda done, total: None, stop)
        states.append(trainable_state(work.module))
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert states[0]["model.steps"].item() == 4


class _Forward(torch.nn.Module):
    def __init__(self, module: ItcItm) -> None:
        super().__init__()
        self.module = module

    def forward(self, given: dict[str, Any]) -> torch.Tensor:
        return self.module.loss(given)


def steps(bert: Path, part: slice, *, wrapped: bool) -> dict[str, torch.Tensor]:
    """Train two steps on some of five rows, whose texts differ in length; return the state."""
    module = ItcItm(started(bert)).train()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    texts = ["red", "green tissue", "blue", "much red tissue of 1", "a much green tissue of 2"]
    given = {
        "images": images(5)[part],
        "texts": module.model.tokens(texts[part]),
        "labels": torch.arange(5)[part],
    }
    step: torch.nn.Module = _Forward(module)
    if wrapped:
        step = torch.nn.parallel.DistributedDataParallel(step)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        step(given).backward()
        optimizer.step()
    return trainable_state(module)


def process(rank: int, folder: str, bert: str) -> None:
    """Be one of two processes; write the state after two steps."""
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    part = slice(0, 3) if rank == 0 else slice(3, 5)
    torch.save(steps(Path(bert), part, wrapped=True), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_one_model_and_fill_one_queue(bert: Path, tmp_path: Path) -> None:
    in_two_processes("test_itc_itm", tmp_path, bert)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    alone = steps(bert, slice(0, 5), wrapped=False)
    assert states[0]["model.image_place"].item() == alone["model.image_place"].item() == 0
    rows = slice(0, 5)  # of the first batch, before the weights of the two ways part
    queue = "model.text_queue"
    torch.testing.assert_close(states[0][queue][rows], alone[queue][rows], atol=1e-5, rtol=1e-5)


def test_what_is_saved_has_slow_weights_and_queues(bert: Path) -> None:
    module = ItcItm(started(bert))
    saved = trainable_state(module)
    kept = ("slow", "image_queue", "text_queue", "image_place", "text_place", "steps")
    assert {f"model.{name}" for name in kept} <= set(saved)
    module.model.remember(torch.randn(3, 8), torch.randn(3, 8))
    module.model.temperature.data.fill_(0.2)
    fill(module, saved, "here")
    assert module.model.image_place.item() == 0
    assert module.model.temperature.item() == pytest.approx(0.07)
    rows = module.model.image_queue
    torch.testing.assert_close(normalize(rows, dim=-1), rows)


def test_captions_that_are_cut_are_reported(bert: Path, samples: list[Sample]) -> None:
    long = [Sample(s.name, s.images, f"{s.answer} {'much ' * 10}") for s in samples]
    facts = task(bert, long).begin(1).facts
    assert any("longer than the 10 tokens" in warning for warning in facts["warnings"])
    assert facts["model"]["sizes"]["words"] == len(WORDS) + 2


@pytest.mark.parametrize("wrong", [{"chunk": 2}, {"shard": "full"}, {"batch": 1}])
def test_settings_the_task_cannot_take_are_refused(
    bert: Path, samples: list[Sample], wrong: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        task(bert, samples, **wrong)


def test_the_recipe_has_the_published_numbers() -> None:
    values = resolve_recipe(load_recipe("pallava-plip", ["data.source=/data/pairs.csv"])).values
    train, plip = values["train"], values["model"]
    assert (train["epochs"], train["batch"], train["weight_decay"]) == (30, 192, 0.01)
    rates = ("warmup_lr", "lr", "min_lr", "warmup_steps")
    assert [train[name] for name in rates] == [1e-5, 1e-4, 5e-5, 1000]
    assert (plip["queue"], plip["momentum"], plip["dim"]) == (57600, 0.995, 256)
