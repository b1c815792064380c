"""The task `generate`: answers are learnt, each from its own image; what is trained and checked."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import load_file
from test_align import Patches, Table
from test_language import llama, t5

from pathcli.data.corpus import Corpus
from pathcli.errors import DataError
from pathcli.settings import TrainSettings
from pathcli.store import Store
from pathcli.trainer import Loop, Work
from pathcli.types import Sample
from pathcli.vlm import generate
from pathcli.vlm.chat import Chat
from pathcli.vlm.connectors import Mlp
from pathcli.vlm.generate import GenerateTask, Validation, answers
from pathcli.vlm.language import HFLanguage, Lora

__all__ = ["llama", "t5"]  # fixtures

ANSWERS = {
    "red": ((220, 20, 20), "red cells"),
    "green": ((20, 220, 20), "benign"),
    "blue": ((20, 20, 220), "a tumour of the colon"),
    "grey": ((120, 120, 120), "no"),
}
ASKED = "What do you see?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of 8 px, each of its own colour."""
    folder = tmp_path_factory.mktemp("images")
    for name, (colour, _) in ANSWERS.items():
        Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def samples(folder: Path) -> list[Sample]:
    return four(folder)


def four(folder: Path) -> list[Sample]:
    return [
        Sample(name, (str(folder / f"{name}.png"),), answer, (ASKED,))
        for name, (_, answer) in ANSWERS.items()
    ]


def task(model: str, corpus: Corpus, store: Store, **given: Any) -> GenerateTask:
    """A prepared task on a tiny language model, whose prompts are of few words."""
    language = {"model": model, "tune": given.pop("tune", "frozen"), "lora": Lora(r=8, dropout=0)}
    train = {"batch": 4, "epochs": 1, "lr": 5e-3, "schedule": "constant", "weight_decay": 0}
    made = GenerateTask(
        encoder=given.pop("encoder", Patches()),
        connector=given.pop("connector", partial(Mlp, frame="centre")),
        language=HFLanguage(**language),
        data=given.pop("data", Table(corpus)),
        chat=given.pop("chat", chat(model)),
        train=TrainSettings(**train | given.pop("train", {})),
        **given,
    )
    made.prepare(store, device="cpu", progress=lambda _: lambda done, total: None)
    return made


def chat(model: str, **given: Any) -> Chat:
    named = json.loads((Path(model) / "config.json").read_text())["model_type"]
    return Chat(**{"template": "flan" if named == "t5" else "vicuna-v1", "system": ""} | given)


def trained(made: GenerateTask, folder: Path) -> tuple[Work, Loop]:
    set_seed(1)
    work = made.begin(1)
    loop = Loop(work, made.train, folder, "cpu")
    loop.run(lambda done, total: None)
    loop.save_weights()
    return work, loop


def said(work: Work, samples: list[Sample], **decoding: Any) -> list[str]:
    return answers(work.module, work.collate, samples, **{"max_new_tokens": 12} | decoding)


# --- learning ----------------------------------------------------------------------------


class Loud(Patches):
    """An encoder whose tokens stand out among the words of a T5 drawn at random."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode(images) * 10


@pytest.fixture(scope="module")
def store_of_module(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def full(
    llama: str, folder: Path, store_of_module: Store, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Work, Loop]:
    """A LLaMA trained whole on the four samples."""
    made = task(
        llama, Corpus(four(folder), [], "abc"), store_of_module, tune="full", train={"epochs": 50}
    )
    return trained(made, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def speaker(llama: str, full: tuple[Work, Loop], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The language model of that run: it can say the answers, and needs telling when."""
    folder = Path(shutil.copytree(llama, tmp_path_factory.mktemp("speaker"), dirs_exist_ok=True))
    full[0].module.language.network.save_pretrained(folder)
    return str(folder)


LEARNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "frozen": ("speaker", {"tune": "frozen", "train": {"epochs": 60, "lr": 2e-2}}),
    "lora": ("speaker", {"tune": "lora", "train": {"epochs": 40}}),
    "full": ("", {}),
    "seq2seq": ("t5", {"tune": "full", "train": {"epochs": 40, "lr": 1e-2}, "encoder": Loud()}),
}


@pytest.fixture(scope="module", params=LEARNERS)
def learner(
    request: pytest.FixtureRequest,
    folder: Path,
    store_of_module: Store,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Work, Loop]:
    """A run that has seen four images often; where the model could speak, it knew other images."""
    name, given = LEARNERS[request.param]
    if not name:
        return request.getfixturevalue("full")
    samples, model = four(folder), request.getfixturevalue(name)
    if name == "speaker":
        samples = turned(samples)
    else:
        config = Path(model) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout_rate": 0.0}))
    made = task(model, Corpus(samples, [], "abc"), store_of_module, **copy.deepcopy(given))
    return trained(made, tmp_path_factory.mktemp("run"))


def turned(samples: list[Sample]) -> list[Sample]:
    """The same questions and answers, each on the image of the one before."""
    return [replace(s, images=samples[i - 1].images) for i, s in enumerate(samples)]


def test_loss_falls_and_the_answers_become_right(learner: tuple[Work, Loop]) -> None:
    work, loop = learner
    losses = [line["loss"] for line in loop.lines]
    assert losses[0] > 1
    assert losses[-1] < 0.1
    learnt = list(work.examples)
    assert said(work, learnt) == [sample.answer for sample in learnt]


def test_every_question_is_answered_from_its_own_image(learner: tuple[Work, Loop]) -> None:
    work, _ = learner
    learnt = list(work.examples)
    others = turned(learnt)
    assert said(work, others) == [learnt[i - 1].answer for i in range(4)]
    batch = work.collate(learnt, np.random.default_rng(0))
    wrong = batch | {"views": batch["views"].roll(1, 0)}
    assert work.module.loss(wrong) > work.module.loss(batch) + 1


def test_answers_do_not_depend_on_who_is_asked_beside(learner: tuple[Work, Loop]) -> None:
    work, _ = learner
    learnt = list(work.examples)
    longer = replace(learnt[1], turns=("What do you see in this picture of a gland?",))
    asked = [learnt[0], longer, learnt[2]]
    assert said(work, asked) == [said(work, [one])[0] for one in asked]


@pytest.mark.parametrize("tune", ["frozen", "lora", "full"])
def test_what_is_trained_is_what_is_changed_and_saved(
    tune: str, llama: str, samples: list[Sample], store: Store, tmp_path: Path
) -> None:
    made = task(llama, Corpus(samples, [], "abc"), store, tune=tune, train={"epochs": 2})
    set_seed(1)
    first = {n: v.clone() for n, v in made.begin(1).module.state_dict().items()}
    work, _ = trained(made, tmp_path / "run")
    work.module.loss(work.collate(samples, np.random.default_rng(0))).backward()
    saved = load_file(tmp_path / "run" / "weights.safetensors")
    now = work.module.state_dict()
    changed = {name for name, value in now.items() if not torch.equal(value, first[name])}
    assert set(saved) == changed
    parts = {name.split(".")[0] for name in saved}
    assert parts == ({"connector"} if tune == "frozen" else {"connector", "language"})
    adapters = {name for name in saved if ".lora_" in name}
    assert bool(adapters) is (tune == "lora")
    own = {name for name in now if name.startswith("language.")}
    assert {name for name in saved if name.startswith("language.")} == {
        "frozen": set(),
        "lora": {name for name in own if ".lora_" in name},
        "full": own,
    }[tune]
    held = {name for name, weight in work.module.named_parameters() if weight.grad is not None}
    assert held == changed
    facts = work.facts["language"]
    assert (facts["tune"], facts["trained"] > 0) == (tune, tune != "frozen")


# --- where images stand ------------------------------------------------------------------


def test_visual_tokens_stand_in_their_places_in_the_order_of_the_images(
    llama: str, samples: list[Sample], store: Store
) -> None:
    work = task(llama, Corpus(samples, [], "abc"), store).begin(1)
    both = replace(
        samples[0],
        images=(*samples[2].images, *samples[0].images),
        turns=("<image>\nIs this as <image>\nthis?",),
    )
    batch = work.collate([samples[1], both, samples[3]], np.random.default_rng(0))
    assert batch["image"].sum(1).tolist() == [4, 8, 4]
    found, mask = work.module.embeds(batch), batch["image"]
    visual = torch.cat(
        [
            work.module.visual(work.collate([samples[i]], np.random.default_rng(0)))[0]
            for i in (1, 2, 0, 3)
        ]
    )
    torch.testing.assert_close(found[mask], visual)
    assert torch.equal(found[~mask], work.module.language.embed(batch["ids"])[~mask])
    assert [row.nonzero()[0].item() for row in mask] == [4, 4, 4]  # after <s> and USER:


class Reader(Mlp):
    """A connector that takes note of the question it reads."""

    reads = True

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[len(text)] for text in texts])
        return {"ids": ids, "mask": torch.ones_like(ids)}

    def forward(self, tokens: Any, of: Any, text: Any = None) -> Any:
        assert len(text["ids"]) == len(tokens)
        return super().forward(tokens, of) * text["ids"][..., None]


def test_a_connector_that_reads_is_given_the_question_of_each_image(
    llama: str, samples: list[Sample], store: Store
) -> None:
    reader = partial(Reader, frame="centre")
    work = task(llama, Corpus(samples, [], "abc"), store, connector=reader).begin(1)
    two = replace(samples[1], images=(*samples[1].images, *samples[0].images), turns=("Alike?",))
    rng = np.random.default_rng(0)
    for batch in (work.collate([samples[0], two], rng), work.collate.ask([samples[0], two], rng)):
        assert batch["text"]["ids"].flatten().tolist() == [len(ASKED), 6, 6]
        assert work.module.visual(batch).shape == (3, 4, 32)


def test_places_that_are_not_as_many_as_visual_tokens_are_refused(
    llama: str, samples: list[Sample], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = task(llama, Corpus(samples, [], "abc"), store).begin(1)
    told = Chat.encode
    monkeypatch.setattr(
        Chat, "encode", lambda self, s, t, counts, *a, **k: told(self, s, t, [3], *a, **k)
    )
    with pytest.raises(DataError, match="red: 3 places for 4 visual tokens"):
        work.collate(samples[:1], np.random.default_rng(0))


# --- validation --------------------------------------------------------------------------


class Words:
    """A tokenizer of whole answers."""

    def batch_decode(self, ids: list[int], *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [f" {TALK[i]} " for i in ids]


TALK = ["Yes.", "yes", "no", "lung  Adenocarcinoma ", "", "A. x", "no.", "yes or no", "NO"]
TRUTH = ["yes", "no", "no", "lung adenocarcinoma", "no", "A. x", "No", "yes", "no"]


class Said(torch.nn.Module):
    """A model whose losses are known, and which says TALK."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["number"].float().sum()

    def generate(self, batch: dict[str, torch.Tensor], **decoding: Any) -> list[int]:
        assert decoding == {"stop": [7], "max_new_tokens": 32}
        return batch["number"].tolist()


class Given:
    """What makes batches of numbers of samples."""

    class language:  # noqa: N801 - an attribute
        tokenizer = Words()

    class chat:  # noqa: N801 - an attribute
        stop = staticmethod(lambda tokenizer: [7])

    def __call__(self, samples: list[Sample], rng: np.random.Generator) -> dict[str, Any]:
        del rng
        return {"number": torch.tensor([int(s.name) for s in samples])}

    def ask(self, samples: list[Sample], rng: np.random.Generator) -> dict[str, Any]:
        return self(samples, rng)

    def learnt(self, sample: Sample, rng: np.random.Generator) -> Sample:
        del rng
        return sample


def test_validation_is_what_was_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "order", lambda seed, epoch, n: list(range(n)))
    samples = [Sample(str(i), (), answer) for i, answer in enumerate(TRUTH)]
    found = Validation(Said(), Given(), Given.chat, samples, answers=True)()
    assert found["loss"] == ((0 + 1 + 2 + 3 + 4 + 5 + 6 + 7) + 8) / 2  # batches of eight and one
    assert found["exact_match"] == pytest.approx(6 / 9)  # not 1, 4 and 7
    assert set(Validation(Said(), Given(), Given.chat, samples, answers=False)()) == {"loss"}


def test_validation_takes_no_more_than_its_number_and_always_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate, "VALIDATED", 5)
    samples = [Sample(str(i), ()) for i in range(50)]
    checks = [Validation(Said(), Given(), Given.chat, samples, answers=False) for _ in range(2)]
    assert len(checks[0].samples) == len({s.name for s in checks[0].samples}) == 5
    assert checks[0].samples == checks[1].samples


def test_a_run_is_chosen_by_exact_match(
    llama: str, samples: list[Sample], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"epochs": 40, "choose": "exact_match"}
    corpus = Corpus(samples[:], samples[:3], "abc")
    made = task(llama, corpus, store, tune="full", train=train)
    work, loop = trained(made, tmp_path / "run")
    lines = [line for line in loop.lines if "val_exact_match" in line]
    assert lines[0]["val_exact_match"] < 1 == lines[-1]["val_exact_match"]
    assert loop.best["exact_match"] == 1
    assert work.validate() == loop.best
    best = max(lines, key=lambda line: (line["val_exact_match"], -line["val_loss"]))
    assert loop.best_epoch == best["epoch"]
