"""The embedded image-text encoder: its parts, its weights on disk, what it calls familiar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity, normalize

from pathcli.encoders.mini_clip import Familiarity, MiniClip, MiniClipModel
from pathcli.encoders.minilm import LIMIT, MiniLM
from pathcli.errors import DataError, UsageError
from pathcli.state import trainable_state
from pathcli.weights import find

pytestmark = pytest.mark.skipif(
    not (find("lite0") and find("minilm") and find("minilm-tokenizer")),
    reason="lite0 and MiniLM are not here; run: pathcli models pull minilm",
)


@pytest.fixture(scope="module")
def language() -> MiniLM:
    return MiniLM()


@pytest.fixture(scope="module")
def model() -> MiniClipModel:
    torch.manual_seed(0)
    made = MiniClipModel(frozen=5, width=16)
    made.start()
    return made


@pytest.fixture(scope="module")
def run_weights(model: MiniClipModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "weights.safetensors"
    save_file({f"model.{k}": v for k, v in trainable_state(model).items()}, path)
    return path


def images(n: int = 2) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (n, 224, 224, 3), dtype=np.uint8))


def test_sentences_of_one_meaning_lie_nearer_than_others(language: MiniLM) -> None:
    same, other = language(["a tumour of the lung", "lung cancer"]), language(["a red bicycle"])
    assert cosine_similarity(same[:1], same[1:]) > 0.6
    assert cosine_similarity(same[:1], other) < 0.3
    assert torch.allclose(same.norm(dim=1), torch.ones(2))


def test_a_sentence_is_the_mean_of_its_tokens_states(language: MiniLM) -> None:
    ids = language._tokenizer.encode("benign tissue").ids
    states = language._network(input_ids=torch.tensor([ids])).last_hidden_state[0]
    assert torch.allclose(language(["benign tissue"])[0], normalize(states.mean(0), dim=0))


def test_tokens_are_counted_before_a_long_text_is_cut(language: MiniLM) -> None:
    assert language.count_tokens(["lung"]) == [3]
    long = "lung " * 300
    assert language.count_tokens([long]) == [302]
    cut = "lung " * (LIMIT - 2)
    assert torch.allclose(language([long]), language([cut]), atol=1e-6)


def test_only_the_later_groups_and_the_projections_are_trained(model: MiniClipModel) -> None:
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    groups = {int(n.split(".")[2]) for n in trained if n.startswith("network.blocks.")}
    assert groups == {5, 6}
    assert {"image_projection.weight", "text_projection.weight", "logit_scale"} <= trained
    assert "network.conv_stem.weight" not in trained
    assert not model.train().network.training  # the statistics of batches are not learnt


def test_a_step_lowers_the_loss_of_images_against_texts(model: MiniClipModel) -> None:
    import copy

    tuned = copy.deepcopy(model).eval()
    texts = tuned.tokens(["a lung", "a bicycle"])
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=3e-5)
    losses = []
    for _ in range(3):
        found, said = tuned.embed_images(images()), tuned.embed_texts(texts)
        logits = tuned.scale() * normalize(found, dim=1) @ normalize(said, dim=1).T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_a_runs_weights_are_an_encoder(model: MiniClipModel, run_weights: Path) -> None:
    encoder = MiniClip(checkpoint=run_weights)
    encoder.load("cpu")
    assert encoder.row_shape == (16,)
    with torch.no_grad():
        wanted = model.eval().embed_images(images())
    assert torch.allclose(encoder.encode(images()), wanted, atol=1e-5)
    assert encoder.encode_text(["lung", "colon", "skin"]).shape == (3, 16)
    assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)
    assert encoder.familiar(encoder.encode(images())).all()  # no threshold: nothing is strange


def test_tokens_average_to_what_is_projected(model: MiniClipModel, run_weights: Path) -> None:
    encoder = MiniClip(checkpoint=run_weights, tokens=True)
    encoder.load("cpu")
    tokens = encoder.encode(images())
    assert tokens.shape[1:] == encoder.row_shape == (49, 1280)
    whole = MiniClip(checkpoint=run_weights)
    whole.load("cpu")
    projected = model.image_projection(tokens.mean(1))
    assert torch.allclose(projected, whole.encode(images()), atol=1e-4)
    assert whole.id != encoder.id


def test_weights_of_another_model_are_refused(tmp_path: Path, run_weights: Path) -> None:
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not mini-clip's weights"):
        MiniClip(checkpoint=tmp_path / "other.safetensors").load("cpu")
    with pytest.raises(UsageError, match=r"model\.frozen"):
        MiniClipModel(frozen=8)


def test_familiar_is_the_mean_cosine_to_the_five_nearest() -> None:
    bank = normalize(torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4), dim=1)
    judge = Familiarity(bank, 0.7)
    scores = judge.score(torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]))
    assert scores.tolist() == pytest.approx([4 / 5, 0.5**0.5, -1 / 5], abs=1e-6)


def test_familiarity_comes_back_from_the_weights_it_was_written_into(
    model: MiniClipModel, run_weights: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    seen = normalize(model.eval().embed_images(images()).detach(), dim=1)
    state = load_file(run_weights)
    judged = Familiarity(seen, 0.99).to_state()
    path = tmp_path / "judged.safetensors"
    half = {k: v.half() for k, v in state.items()}
    save_file(half | {f"model.{k}": v for k, v in judged.items()}, path)
    encoder = MiniClip(checkpoint=path)
    encoder.load("cpu")
    features = encoder.encode(torch.cat([images(), torch.zeros(1, 224, 224, 3, dtype=torch.uint8)]))
    alone = Familiarity(seen, 0.99).score(features[:2])
    assert encoder.familiar(features).tolist() == [*(alone >= 0.99).tolist(), False]


# --- the weights that are shipped --------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> MiniClip:
    encoder = MiniClip()
    encoder.load("cpu")
    return encoder


def test_what_is_no_tissue_is_unfamiliar_to_the_shipped_weights(shipped: MiniClip) -> None:
    flat = torch.full((1, 224, 224, 3), 200, dtype=torch.uint8)
    assert not shipped.familiar(shipped.encode(torch.cat([images(), flat]))).any()


@pytest.mark.data
def test_the_shipped_weights_tell_lung_tissue_apart_by_words_they_never_saw(
    shipped: MiniClip, data: Path
) -> None:
    import csv

    from pathcli.data.captions import read_wordings
    from pathcli.data.images import read_image
    from pathcli.encoders.zeroshot import class_probabilities, class_weights
    from pathcli.weights import asset

    with asset("benchmarks/lung-split.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    unseen = read_wordings().unseen
    picked = [row for name in unseen for row in [r for r in rows if r["label"] == name][::32]]
    pixels = [read_image(str(data / "lc25000-lung" / row["image"])) for row in picked]
    features = shipped.encode(torch.from_numpy(np.stack(pixels)))
    weights = class_weights(shipped, list(unseen.values()))
    half = features.numpy().astype(np.float16)
    said = class_probabilities(half, weights, shipped.logit_scale).argmax(1)
    right = [list(unseen)[i] == row["label"] for i, row in zip(said, picked, strict=True)]
    assert len(picked) == 30
    assert np.mean(right) >= 0.9
    assert shipped.familiar(features).float().mean() >= 0.9
