"""The task `generate`: what is told before training, what a run is known by, stored tokens."""

from __future__ import annotations

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
from safetensors.torch import load_file, save_file
from test_align import Patches
from test_generate import ANSWERS, ASKED, chat, folder, llama, said, samples, t5, task, trained

from pathcli.batches import Batches
from pathcli.data.corpus import Corpus
from pathcli.data.instructions import InstructionData
from pathcli.encoders.augment import Augment
from pathcli.errors import DataError, UsageError
from pathcli.store import Store
from pathcli.trainer import Loop
from pathcli.types import Sample
from pathcli.vlm import generate
from pathcli.vlm.connectors import Mlp
from pathcli.vlm.generate import GenerateTask
from pathcli.vlm.language import HFLanguage
from pathcli.vlm.start import Start
from pathcli.vlm.tokens import CacheSettings

__all__ = ["folder", "llama", "samples", "t5"]  # fixtures


# --- broken images -----------------------------------------------------------------------


def instructions(folder: Path, place: Path, **given: Any) -> InstructionData:
    """Write a table of the four samples below `place`; return the data it holds."""
    rows = [
        {"path": f"{name}.png", "question": ASKED, "answer": answer}
        for name, (_, answer) in ANSWERS.items()
    ]
    (place / "table.json").write_text(json.dumps(rows))
    return InstructionData(source=place / "table.json", images=folder, **given)


def test_a_broken_image_is_replaced_in_training_and_an_error_when_asked(
    llama: str, samples: list[Sample], store: Store, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    bad = Sample("broken", (str(broken),), "broken", (ASKED,))
    both = [*samples, bad]
    data = instructions(tmp_path, tmp_path, max_broken=0.5)
    data.corpus = lambda: Corpus(both, both[:], "abc")  # type: ignore[method-assign]
    made = task(llama, Corpus([], [], ""), store, data=data, train={"choose": "exact_match"})
    work = made.begin(1)
    batch = work.collate([samples[0], bad], np.random.default_rng(0))
    assert any(
        torch.equal(batch["ids"][1][batch["mask"][1]], one["ids"][0])
        and torch.equal(batch["views"][1], one["views"][0])
        for one in (work.collate([s], np.random.default_rng(0)) for s in samples)
    )
    with pytest.raises(
        DataError, match="broken: its image cannot be read, so nothing can be asked"
    ):
        said(work, [samples[0], bad])
    assert 0 <= work.validate()["exact_match"] <= 1


# --- samples that cannot be told ---------------------------------------------------------


def crowded(samples: list[Sample]) -> Sample:
    """A sample of ten images, for whose tokens a limit of 32 has no room."""
    return Sample("crowded", samples[0].images * 10, "no", (ASKED,))


def short(llama: str, samples: list[Sample], store: Store, **given: Any) -> Any:
    """A task with room for 32 tokens, four of them an image's, and these samples on both sides."""
    data = InstructionData(source=Path("none"), max_broken=given.pop("max_broken", 0.5))
    data.corpus = lambda: Corpus(samples, samples[:], "abc")  # type: ignore[method-assign]
    return task(llama, Corpus([], [], ""), store, data=data, chat=chat(llama, limit=32), **given)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", ["too long", "nothing to learn"])
def test_for_a_sample_that_cannot_be_told_another_stands_in(
    kind: str, llama: str, samples: list[Sample], store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    bad = crowded(samples) if kind == "too long" else replace(samples[0], name="mute", answer=" ")
    made = short(llama, [*samples, bad], store, train={"choose": "exact_match"})
    work = made.begin(1)
    with caplog.at_level("WARNING", "pathcli"):
        batch = work.collate([bad], np.random.default_rng(0))
    assert f"cannot be told, another sample is used instead: {bad.name}: " in caplog.text
    alone = [work.collate([s], np.random.default_rng(0)) for s in samples]
    assert sum(same(batch, one) for one in alone) == 1
    again = made.begin(1).collate  # as a resumed run has it, whatever came before
    again([samples[1]], np.random.default_rng(0))
    assert same(again([bad], np.random.default_rng(0)), batch)
    assert np.isfinite(work.validate()["loss"])
    assert any("1 of 5 samples looked at cannot be told" in text for text in work.facts["warnings"])


def test_stand_ins_are_counted_and_said_at_the_end(
    llama: str, samples: list[Sample], store: Store, tmp_path: Path
) -> None:
    rows = [*samples, crowded(samples)]
    for workers in (0, 1):  # a worker counts, too
        made = short(llama, rows, store, train={"epochs": 3, "batch": 5, "workers": workers})
        work, loop = trained(made, tmp_path / str(workers))
        found = loop.conclude()
        assert found["stood in for"] == 3
        assert found["warnings"][:-1] == work.facts["warnings"]
        assert found["warnings"][-1].startswith("3 of 18 samples could not be told, and others")
    assert (tmp_path / "0" / "weights.safetensors").read_bytes() == (
        tmp_path / "1" / "weights.safetensors"
    ).read_bytes()
    made = short(llama, samples, store)
    assert trained(made, tmp_path / "none")[1].conclude() == {"stood in for": 0}


def test_a_run_stopped_amid_stand_ins_ends_with_the_same_weights(
    llama: str, samples: list[Sample], store: Store, tmp_path: Path
) -> None:
    rows, train = [*samples, crowded(samples)], {"epochs": 3, "batch": 2}
    trained(short(llama, rows, store, train=train), tmp_path / "whole")
    made = short(llama, rows, store, train=train)
    set_seed(1)
    loop = Loop(made.begin(1), made.train, tmp_path / "stopped", "cpu")
    assert not loop.run(lambda done, total: None, stop_after=4)
    trained(made, tmp_path / "stopped")
    files = [tmp_path / name / "weights.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_too_many_samples_that_cannot_be_told_are_one_clear_error(
    llama: str, samples: list[Sample], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*samples, crowded(samples)]
    said = (
        r"^crowded: 40 visual tokens leave no room for words; raise chat\.limit; 1 of \d samples "
        r"cannot be told, more than data\.max_broken=0\.1; raise chat\.limit, mend the data, or "
    )
    with pytest.raises(DataError, match=said):  # when samples are looked at
        short(llama, rows, store, max_broken=0.1).begin(1)
    monkeypatch.setattr(generate, "LOOKED", 1)
    work = short(llama, rows, store, max_broken=0.1).begin(1)
    with pytest.raises(DataError, match=said):  # when a batch is made
        work.collate(rows, np.random.default_rng(0))


def test_images_change_in_training_and_never_in_validation(
    llama: str, samples: list[Sample], store: Store
) -> None:
    corpus = Corpus(samples, samples[:], "abc")
    work = task(llama, corpus, store, augment=Augment(colour=0.9)).begin(1)
    plain = task(llama, corpus, store).begin(1)

    def views(collate: Any) -> torch.Tensor:
        return collate(samples, np.random.default_rng(0))["views"]

    assert not torch.equal(views(work.collate), views(plain.collate))
    assert torch.equal(views(work.collate), views(work.collate))
    assert torch.equal(views(work.validate.examples), views(plain.collate))


# --- what is told before training --------------------------------------------------------


def test_a_sample_is_shown_in_pieces_without_any_weights(
    llama: str, t5: str, samples: list[Sample], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(HFLanguage, "start")
    corpus = Corpus(samples[:1], [], "abc")
    assert task(llama, corpus, store).sample_view(1) == [
        ("read", "<s>USER: "),
        ("image", "<image: 4 tokens>"),
        ("read", f"\n{ASKED} ASSISTANT:"),
        ("learnt", " red cells</s>"),
        ("counts", task(llama, corpus, store).sample_view(1)[-1][1]),
    ]
    pieces = task(t5, corpus, store).sample_view(1)
    assert [role for role, _ in pieces] == ["image", "read", "learnt", "counts"]
    assert pieces[1][1] == f"{ASKED}</s>"
    assert pieces[2][1] == "red cells</s>"
    assert "4 of images" in pieces[-1][1]


class Unseen(Patches):
    """An encoder whose tokens are known by its name, and which may not be loaded."""

    name = "lite0"

    def load(self, device: str) -> None:
        raise AssertionError(device)

    def __getattribute__(self, name: str) -> Any:
        assert name not in {"row_shape", "id", "encode", "input_px"}, name
        return super().__getattribute__(name)


def test_to_show_a_sample_nothing_is_encoded_and_nothing_stored(
    llama: str, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GenerateTask, "prepare", lambda self, store, **given: None)
    cache = CacheSettings(tokens="float16")
    corpus, store = Corpus(samples[:1], [], "abc"), Store(tmp_path / "store")
    made = task(llama, corpus, store, encoder=Unseen(), cache=cache)
    assert ("image", "<image: 49 tokens>") in made.sample_view(1)
    Patches.loads = 0
    other = Patches()
    other.row_shape = ()  # type: ignore[misc]
    monkeypatch.setattr(Patches, "load", lambda self, device: setattr(self, "row_shape", (2, 3)))
    made = task(llama, corpus, store, encoder=other, cache=cache)
    assert ("image", "<image: 2 tokens>") in made.sample_view(1)  # not known otherwise
    assert not list((tmp_path / "store").rglob("*.h5"))


def test_facts_count_samples_tokens_and_what_is_cut(
    llama: str, samples: list[Sample], store: Store
) -> None:
    work = task(llama, Corpus(samples, samples[:1], "abc", {"why": 3}, ("mind",)), store).begin(1)
    told = [work.collate.encode(s, np.random.default_rng(0)) for s in samples]
    facts = work.facts
    assert facts["samples"] == {"train": 4, "val": 1}
    assert facts["dropped"] == {"why": 3}
    assert facts["visual tokens of an image"] == 4
    lengths = [len(one.ids) for one in told]
    assert facts["tokens of a sample"] == {"mean": sum(lengths) / 4, "most": max(lengths)}
    learnt = [sum(token.learnt for token in one.tokens) for one in told]
    assert facts["learnt of them"] == sum(learnt) / 4
    assert facts["warnings"] == ["mind"]
    short = chat(llama, limit=sorted(lengths)[2])
    cut = task(llama, Corpus(samples, [], "abc"), store, chat=short).begin(1)
    assert cut.facts["warnings"] == ["1 of 4 samples looked at are longer than chat.limit"]


def test_samples_of_one_length_come_together(
    llama: str, samples: list[Sample], store: Store
) -> None:
    images, many = samples[0].images, []
    for i in range(16):
        words = "a word " * (12 if i % 2 else 1)
        many.append(Sample(str(i), images * (2 if i < 8 else 1), words, (ASKED,)))
    made = task(llama, Corpus(many, [], "abc"), store, train={"by_length": True})
    work = made.begin(1)
    assert work.lengths == [
        len(ASKED) + (84 if i % 2 else 7) + (2000 if i < 8 else 1000) for i in range(16)
    ]
    feed = Batches(work.examples, work.collate, made.train, lengths=work.lengths)
    widths = [feed[0, n][0]["mask"].sum(1) for n in range(4)]
    assert all(len(set(row.tolist())) == 1 for row in widths), widths
    assert task(llama, Corpus(many, [], "abc"), store).begin(1).lengths is None


class Given(Mlp):
    """A connector that begins with weights of a file."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, frame="centre")

    def start(self) -> dict[str, Any]:
        return {"kind": "given", "init": "somewhere", "init_sha256": "abc"}


def test_identity_changes_with_data_and_with_whatever_training_begins_from(
    llama: str,
    samples: list[Sample],
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = Corpus(samples, [], "abc")
    first = task(llama, corpus, store).begin(1).identity
    assert task(llama, corpus, store).begin(2).identity == first
    more = {"data": replace(corpus, digest="abd"), "val": replace(corpus, val=samples[:1])}
    found = {name: task(llama, c, store).begin(1).identity for name, c in more.items()}
    encoder = Patches()
    encoder.id = "patches-1"
    found["encoder"] = task(llama, corpus, store, encoder=encoder).begin(1).identity
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    assert task(str(other), corpus, store).begin(1).identity == first  # the same, elsewhere
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, other / "model.safetensors")
    found["language"] = task(str(other), corpus, store).begin(1).identity
    found["connector"] = task(llama, corpus, store, connector=partial(Given)).begin(1).identity
    monkeypatch.setattr(Start, "fill", lambda self, module, prefixes: {"weights": "of a run"})
    found["start"] = task(llama, corpus, store).begin(1).identity
    assert len({first, *found.values()}) == 7


# --- tokens of the store -----------------------------------------------------------------


def test_stored_tokens_give_the_loss_of_the_images(
    llama: str, samples: list[Sample], store: Store
) -> None:
    corpus, losses, kept = Corpus(samples, [], "abc"), [], CacheSettings(tokens="float16")
    for cache in (CacheSettings(), kept):
        set_seed(1)
        work = task(llama, corpus, store, cache=cache).begin(1)
        batch = work.collate(samples, np.random.default_rng(0))
        assert ("tokens" in batch) is (cache is kept)
        losses.append(work.module.loss(batch).item())
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0] > 1


def pooled() -> Patches:
    made = Patches()
    made.tokens = False  # type: ignore[misc]
    return made


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"train": {"choose": "accuracy"}}, r"train\.choose: exact_match or null, not 'accuracy'"),
        ({"train": {"chunk": 2}}, r"train\.chunk"),
        ({"cache": CacheSettings(tokens="int8"), "augment": Augment(crop=(0.5, 1))}, "cache"),
        ({"cache": CacheSettings(tokens="int8"), "encoder": pooled()}, "tokens: true"),
        ({"encoder": pooled()}, "tokens: true"),
    ],
)
def test_settings_the_task_cannot_take_are_refused(
    llama: str, samples: list[Sample], store: Store, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        task(llama, Corpus(samples, [], ""), store, **wrong)


def test_no_sample_to_train_on_is_refused(llama: str, store: Store) -> None:
    with pytest.raises(DataError, match="no sample to train on"):
        task(llama, Corpus([], [], ""), store)
