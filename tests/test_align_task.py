"""The task `align`: validation by hand, runs that stop and go on, processes, stages, the recipe."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import load_file
from test_align import TINY, Patches, align, batch, bert, built, samples, task
from two import in_two_processes

from pathcli import registry
from pathcli.data.corpus import Corpus
from pathcli.data.pairs import Pictures
from pathcli.encoders.augment import Augment
from pathcli.encoders.pairs import meaning
from pathcli.errors import DataError, UsageError
from pathcli.recipe import load_recipe, resolve_recipe
from pathcli.runs import train
from pathcli.state import trainable_state
from pathcli.store import Store
from pathcli.trainer import Loop
from pathcli.types import Sample
from pathcli.vlm import align_losses
from pathcli.vlm.align import Check
from pathcli.vlm.align_losses import Align
from pathcli.vlm.qformer import QFormer
from pathcli.vlm.start import Start
from pathcli.vlm.tokens import CacheSettings, TokenCache
from pathcli.vlm.towers import Views, ready, see

__all__ = ["bert", "samples"]  # fixtures


# --- validation, by hand -----------------------------------------------------------------


class Stub(torch.nn.Module):
    """Images are their tokens, texts one word, of which there are five, in two dimensions."""

    reads = False

    def __init__(self) -> None:
        super().__init__()
        words = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
        self.word_embeddings = torch.nn.Parameter(torch.tensor(words))

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[int(text), 4] for text in texts])
        return {"ids": ids, "mask": torch.ones_like(ids)}

    def read(self, text: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.word_embeddings[text["ids"]]

    def together(self, tokens: torch.Tensor, text: dict[str, torch.Tensor]) -> torch.Tensor:
        del text
        return torch.tensor([0.0, math.log(3)]).expand(len(tokens), 1, 2)

    def look_and_write(self, tokens: torch.Tensor, text: dict[str, torch.Tensor]) -> Any:
        return tokens, torch.zeros(*text["ids"].shape, 2)


class Three:
    """The collate of three images at 0, 90 and 180 degrees; texts at 0, 180 and 90."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def __call__(self, samples: list[Sample], rng: np.random.Generator) -> dict[str, Any]:
        del rng
        at = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [-1.0, 0.0]}
        tokens = torch.tensor([at[s.name] for s in samples])[:, None]
        text = Stub().tokens([s.answer for s in samples])
        labels = torch.tensor([meaning(s.label, s.answer) for s in samples])
        return {"tokens": tokens, "of": torch.arange(3), "text": text, "labels": labels}


@pytest.fixture
def stub() -> Align:
    module = Align(Patches(), Stub())
    module.vision_proj = module.text_proj = module.itm_head = torch.nn.Identity()
    module.word_head.norm = torch.nn.Identity()
    torch.nn.init.zeros_(module.word_head.dense.weight)
    module.temperature.data.fill_(0.2)
    return module.eval()


def three(**labels: str) -> list[Sample]:
    said = {"a": "0", "b": "1", "c": "2"}
    return [Sample(n, (), said[n], label=labels.get(n, "")) for n in said]


@torch.no_grad()
def test_validation_is_what_was_worked_out_by_hand(stub: Align) -> None:
    found = Check(stub, Three(Corpus([], [], "")), three(), 3)()
    # rows of logits: own 5 with -5, 0; own 0 with 0, 5; own 0 with -5, 5; both ways the same
    first = 0.9 * 0.00676 + (0.00676 + 10.00676 + 5.00676) / 30
    second = 0.9 * 5.01339 + (5.01339 + 5.01339 + 0.01339) / 30
    third = 0.9 * 5.00676 + (0.00676 + 10.00676 + 5.00676) / 30
    itc = (first + second + third) / 3
    itm = -(3 * math.log(3 / 4) + 6 * math.log(1 / 4)) / 9
    losses = {"itc_loss": itc, "itm_loss": itm, "itg_loss": math.log(5)}
    right = {"itm_accuracy": 1 / 3, "image_to_text_r1": 1 / 3, "text_to_image_r1": 1 / 3}
    right |= {"image_to_text_r5": 1.0, "text_to_image_r5": 1.0}
    assert found == pytest.approx(losses | right | {"loss": sum(losses.values())}, abs=1e-4)


@torch.no_grad()
def test_with_prompts_labels_are_told_apart_by_text(stub: Align) -> None:
    prompts = {"one": ["0"], "other": ["1", "2"]}
    corpus = Corpus([], [], "", prompts=prompts)
    found = Check(stub, Three(corpus), three(a="one", b="one", c="other"), 3)()
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert "image_to_text_r1" not in found


def test_the_samples_of_validation_and_its_draws_repeat(
    bert: Path, samples: list[Sample], store: Store
) -> None:
    work = task(bert, Corpus(samples, samples[:5], "abc"), store).begin(1)
    work.module.eval()
    with torch.no_grad():
        found, again = work.validate(), work.validate()
    assert found == again
    assert found["loss"] == pytest.approx(sum(found[f"{x}_loss"] for x in ("itc", "itm", "itg")))


# --- runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["off", "float16"])
def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(
    tokens: str, bert: Path, samples: list[Sample], store: Store, tmp_path: Path
) -> None:
    corpus = Corpus(samples, samples[:5], "abc")
    made = task(bert, corpus, store, cache=CacheSettings(tokens=tokens))
    states = []
    for name, stops in {"whole": [None], "stopped": [1, 2, None]}.items():
        for stop in stops:
            set_seed(7)
            work = made.begin(1)
            first = trainable_state(work.module)
            loop = Loop(work, made.train, tmp_path / name, "cpu")
            loop.run(lambda done, total: None, stop)
        states.append(trainable_state(work.module))
    assert loop.step == 4
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert not torch.equal(tensor, first[name]), name


def small(bert: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the shipped recipe with a small Q-Former, a small encoder, and three images."""
    monkeypatch.setitem(registry.BUILTIN["encoder"], "patches", f"{Patches.__module__}:Patches")
    folder.mkdir()
    lines = ["caption,image_path,pathology"]
    for i in range(6):
        Image.fromarray(np.full((9, 12, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        lines.append(f"tissue of {i},{i}.png,{'x' if i else ''}")
    (folder / "quilt.csv").write_text("\n".join(lines))
    sections = {"connector": TINY | {"init": "random", "text": str(bert)}}
    sections["data"] = {"source": str(folder / "quilt.csv"), "images": str(folder), "val": 0.3}
    sections["train"] = {"epochs": 2, "batch": 2, "precision": "float32", "workers": 0}
    dotted = {f"{s}.{name}": value for s, part in sections.items() for name, value in part.items()}
    return load_recipe("clover-stage1").with_values(encoder={"kind": "patches"}, **dotted)


def test_a_later_stage_starts_from_the_recipes_run(
    bert: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(bert, tmp_path / "quilt", monkeypatch)
    (run,) = train(made, out=tmp_path / "runs", store=store, device="cpu")
    assert run.facts["samples"]["train"] + run.facts["samples"]["val"] == 5  # one is no pathology
    saved = load_file(run.folder / "weights.safetensors")
    assert any(name.startswith("connector.") for name in saved)
    later = torch.nn.Module()
    later.connector = QFormer(3, 8, **TINY, instruct=True, text=str(bert), init="random")
    facts = Start(run=run.folder).fill(later, ["connector."])
    assert facts["recipe"] == "clover-stage1"
    assert facts["fresh"] == 2  # the projection to the language model, weight and bias
    assert facts["taken"] == len(later.state_dict()) - 2
    for name, value in later.state_dict().items():
        assert ".project." in name or torch.equal(value, saved[name]), name
    again = made.with_values(start={"run": str(run.folder)}, **{"train.epochs": 1})
    (more,) = train(replace(again, name="more"), out=tmp_path / "runs", store=store, device="cpu")
    assert more.facts["model"]["start"]["taken"] == len(saved)
    assert more.facts["model"]["start"]["left"] == more.facts["model"]["start"]["fresh"] == 0


def test_the_recipe_has_the_published_numbers() -> None:
    given = ["data.source=/q.csv", "data.images=/q", "connector.init=random"]
    values = resolve_recipe(load_recipe("clover-stage1", given)).values
    numbers = values["train"]
    assert (numbers["epochs"], numbers["batch"], numbers["seed"]) == (20, 36, 42)
    assert (numbers["lr"], numbers["weight_decay"], numbers["warmup"]) == (2e-5, 1e-4, 0.1)
    assert (numbers["clip"], numbers["schedule"], numbers["min_lr"]) == (1.0, "cosine", 0)
    assert numbers["decay_all"] is False
    reader = values["connector"]
    assert (reader["queries"], reader["cross_every"], reader["text_limit"]) == (32, 2, 32)
    assert values["augment"]["crop"] == [0.2, 1.0]
    assert values["data"]["keep"] == {"pathology": ["*"]}


# --- processes ---------------------------------------------------------------------------


def _nearest(
    similarity: torch.Tensor, generator: torch.Generator | None, exclude: torch.Tensor
) -> torch.Tensor:
    """Draw what is most likely drawn, so that processes and one alone draw the same."""
    del generator
    return similarity.masked_fill(exclude, -torch.inf).argmax(1)


class _Forward(torch.nn.Module):
    def __init__(self, module: Align) -> None:
        super().__init__()
        self.module = module

    def forward(self, given: dict[str, Any]) -> torch.Tensor:
        return self.module.loss(given)


def step(
    bert: Path, part: slice, patch: pytest.MonkeyPatch, *, wrapped: bool
) -> dict[str, torch.Tensor]:
    """Return the gradients of some of five rows, whose texts differ in length, and their loss."""
    module = align(bert)
    for weight in (p for p in module.parameters() if p.ndim == 2):
        weight.data.mul_(5)
    patch.setattr(align_losses, "hard_negatives", _nearest)
    texts = ["red", "green tissue", "red", "much red tissue of 1", "a much green tissue of 2"]
    images = torch.randint(0, 256, (5, 8, 8, 3), generator=torch.Generator().manual_seed(1))
    given = {
        "views": images[part].to(torch.uint8),
        "text": module.connector.tokens(texts[part]),
        "labels": torch.tensor([meaning("", text) for text in texts])[part],
    }
    called: torch.nn.Module = _Forward(module)
    if wrapped:
        called = torch.nn.parallel.DistributedDataParallel(called)
    loss = called(given)
    loss.backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def process(rank: int, folder: str, bert: str) -> None:
    """Be one of two processes; write what its rows give."""
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    part = slice(0, 3) if rank == 0 else slice(3, 5)
    torch.save(step(Path(bert), part, pytest.MonkeyPatch(), wrapped=True), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_loss_and_gradients_of_the_joint_batch(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_two_processes("test_align_task", tmp_path, bert)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = step(bert, slice(0, 5), monkeypatch, wrapped=False)
    assert len(alone) > 30
    mean = (parts[0].pop("loss") + parts[1].pop("loss")) / 2
    torch.testing.assert_close(mean, alone.pop("loss"), atol=1e-4, rtol=1e-4)
    for name, expected in alone.items():
        assert torch.equal(parts[0][name], parts[1][name]), name
        torch.testing.assert_close(parts[0][name], expected, atol=1e-3, rtol=1e-3, msg=name)


# --- what is seen ------------------------------------------------------------------------


def test_tokens_of_the_store_are_what_the_encoder_would_give(
    bert: Path, samples: list[Sample], store: Store
) -> None:
    corpus, rng = Corpus(samples, [], "abc"), np.random.default_rng(0)
    kept = task(bert, corpus, store, cache=CacheSettings(tokens="float16")).begin(1)
    plain = task(bert, corpus, store).begin(1)
    stored, shown = kept.collate(samples[:4], rng), plain.collate(samples[:4], rng)
    assert "views" not in stored
    torch.testing.assert_close(see(Patches(), stored), see(Patches(), shown), atol=1e-3, rtol=0)
    assert stored["of"].tolist() == shown["of"].tolist() == [0, 1, 2, 3]


def test_another_image_stands_in_for_one_that_is_not_in_the_store(
    bert: Path, samples: list[Sample], store: Store
) -> None:
    rng, broken = np.random.default_rng(0), Sample("x", ("nowhere.png",), "red")
    both = [*samples, broken]
    kept = TokenCache(
        [r for s in both for r in s.images], Patches(), store, CacheSettings(tokens="int8")
    )
    kept.fill(lambda done, total: None)
    pictures = Pictures(both, max_broken=0.5)
    views = Views(pictures, built(bert)(3, None), Augment(), 8, kept)
    shown = [views(sample, rng) for sample in (broken, samples[0])]
    assert shown[0].sample in samples
    assert shown[1].sample == samples[0]
    assert views.batch(shown)["tokens"].shape == (2, 4, 3)
    assert (pictures.read, pictures.broken) == (3, 1)


def test_an_encoder_is_loaded_once_and_not_trained(
    bert: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patches, "loads", 0)
    module = align(bert)
    given = batch(module, samples[:3])
    for _ in range(2):
        tokens = see(module.encoder, given)
    assert Patches.loads == 1
    assert not tokens.requires_grad
    assert not tokens.is_inference()
    assert not any("encoder" in name for name, _ in module.named_parameters())
    pooled = Patches()
    pooled.tokens = False
    with pytest.raises(UsageError, match="tokens: true for patches"):
        ready(pooled, "cpu")


def test_every_view_of_an_image_knows_the_image_it_is_of(tmp_path: Path) -> None:
    class Two:
        def views(self, image: np.ndarray, side: int) -> list[np.ndarray]:
            whole = image[:side, :side]
            return [whole, whole] if image[0, 0, 0] else [whole]

    for name, value in (("a", 1), ("b", 0)):
        Image.fromarray(np.full((9, 9, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    places = {name: str(tmp_path / f"{name}.png") for name in "ab"}
    samples = [Sample("x", (places["a"], places["b"])), Sample("y", (places["a"],))]
    views = Views(Pictures(samples), Two(), Augment(), 8)
    rng = np.random.default_rng(0)
    found = views.batch([views(sample, rng) for sample in samples])
    assert found["views"].shape == (5, 8, 8, 3)
    assert found["of"].tolist() == [0, 0, 1, 2, 2]
    cropped = Views(Pictures(samples), Two(), Augment(crop=(0.5, 0.5)), 4)
    assert cropped.batch([cropped(samples[1], rng)])["views"].shape == (2, 4, 4, 3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"train": {"chunk": 2}}, "chunk"),
        ({"train": {"batch": 1}}, "batch"),
        ({"train": {"choose": "accuracy"}}, "choose"),
        ({"cache": CacheSettings(tokens="int8"), "augment": Augment(crop=(0.5, 1))}, "cache"),
        ({"connector": {"instruct": True}}, "instruct: false"),
    ],
)
def test_settings_the_task_cannot_take_are_refused(
    bert: Path, samples: list[Sample], store: Store, wrong: dict[str, Any], said: str
) -> None:
    given = dict(wrong)
    if "connector" in given:
        given["connector"] = built(bert, **given["connector"])
    with pytest.raises(UsageError, match=said):
        task(bert, Corpus(samples, [], ""), store, **given)


def test_a_corpus_of_one_caption_is_refused(
    bert: Path, samples: list[Sample], store: Store
) -> None:
    same = [replace(sample, answer="tissue") for sample in samples]
    with pytest.raises(DataError, match="nothing to contrast"):
        task(bert, Corpus(same, [], ""), store)
