"""The Q-Former is transformers' in numbers, and each of its four masks hides what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_qformer as tiny
import torch
from safetensors.torch import save_file
from tiny_plip import WORDS, bert_folder
from torch import Tensor
from torch.testing import assert_close

from pathcli.errors import DataError, UsageError
from pathcli.vlm.qformer import QFormer

CLOSE = {"rtol": 0, "atol": 1e-5}


def read_into(theirs: Any, folder: Path, **given: Any) -> tuple[QFormer, Tensor]:
    """Return our Q-Former with the weights of theirs, and the queries both begin with."""
    draws = torch.Generator().manual_seed(3)
    queries = torch.randn(1, tiny.QUERIES, tiny.WIDTH, generator=draws)
    state = {f"qformer.{name}": x for name, x in theirs.state_dict().items()}
    save_file(state | {"query_tokens": queries}, folder / "model.safetensors")
    ours = QFormer(tiny.DIM, init=str(folder), norm=False, **tiny.SIZES | given)
    ours.start()
    return ours.eval(), queries.expand(3, -1, -1)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_queries_that_look_are_those_of_blip2(every: int, tmp_path: Path) -> None:
    theirs = tiny.blip2_qformer(reads=False, cross_attention_frequency=every)
    ours, queries = read_into(theirs, tmp_path, dim_out=8, cross_every=every)
    wanted = theirs(query_embeds=queries, encoder_hidden_states=tiny.image()).last_hidden_state
    assert_close(ours.look(tiny.image()), wanted, **CLOSE)
    assert_close(ours(tiny.image(), torch.arange(3)), ours.project(wanted), **CLOSE)


@pytest.mark.parametrize("dim_out", [None, 8])
@pytest.mark.parametrize("padded", [0, 2])
def test_queries_that_see_a_question_are_those_of_instructblip(
    padded: int, dim_out: int | None, tmp_path: Path
) -> None:
    theirs = tiny.instruct_qformer()
    ours, queries = read_into(theirs, tmp_path, dim_out=dim_out, instruct=True)
    text = tiny.text(padded=padded)
    wanted = theirs(
        input_ids=text["ids"],
        attention_mask=torch.cat([torch.ones(3, tiny.QUERIES).long(), text["mask"]], 1),
        query_embeds=queries,
        encoder_hidden_states=tiny.image(),
    ).last_hidden_state[:, : tiny.QUERIES]
    assert_close(ours.look(tiny.image(), text), wanted, **CLOSE)
    asked = ours(tiny.image(), torch.arange(3), text)
    assert_close(asked, ours.project(wanted), **CLOSE)


@pytest.fixture
def blip2(tmp_path: Path) -> tuple[QFormer, Any, Tensor]:
    """Ours and transformers' with words, which there are embedded outside."""
    theirs = tiny.blip2_qformer(reads=True)
    words = tiny.qformer().state_dict()
    embeddings = {
        "embeddings.word_embeddings.weight": words["words.weight"],
        "embeddings.position_embeddings.weight": words["places.weight"],
    }
    draws = torch.Generator().manual_seed(3)
    queries = torch.randn(1, tiny.QUERIES, tiny.WIDTH, generator=draws)
    state = {f"qformer.{name}": x for name, x in theirs.state_dict().items()}
    save_file(state | embeddings | {"query_tokens": queries}, tmp_path / "model.safetensors")
    ours = QFormer(tiny.DIM, None, norm=False, init=str(tmp_path), **tiny.SIZES)
    ours.start()
    return ours.eval(), theirs, queries.expand(3, -1, -1)


def test_texts_alone_are_read_as_blip2_reads_them(blip2: tuple[QFormer, Any, Tensor]) -> None:
    ours, theirs, _ = blip2
    text = tiny.text()
    said = ours.words(text["ids"]) + ours.places.weight[: text["ids"].shape[1]]
    wanted = theirs(query_embeds=said, query_length=0, attention_mask=text["mask"])
    assert_close(ours.read(text), wanted.last_hidden_state, **CLOSE)


def test_image_and_text_together_are_those_of_blip2(blip2: tuple[QFormer, Any, Tensor]) -> None:
    ours, theirs, queries = blip2
    text = tiny.text()
    said = ours.words(text["ids"]) + ours.places.weight[: text["ids"].shape[1]]
    wanted = theirs(
        query_embeds=torch.cat([queries, said], 1),
        query_length=tiny.QUERIES,
        attention_mask=torch.cat([torch.ones(3, tiny.QUERIES).long(), text["mask"]], 1),
        encoder_hidden_states=tiny.image(),
    ).last_hidden_state[:, : tiny.QUERIES]
    assert_close(ours.together(tiny.image(), text), wanted, **CLOSE)


def test_writing_is_blip2_under_the_mask_drawn_by_hand(blip2: tuple[QFormer, Any, Tensor]) -> None:
    ours, theirs, queries = blip2
    text = tiny.text(t=3, padded=1)
    ids = text["ids"].clone()
    ids[:, 0] = tiny.WORDS - 1
    said = ours.words(ids) + ours.places.weight[:3]
    drawn = torch.tensor(
        [
            [1, 1, 1, 1, 1, 0, 0, 0],  # five queries
            [1, 1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 1, 0, 0],  # three words
            [1, 1, 1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 1, 1, 1],
        ]
    )
    masks = torch.stack([drawn] * 3).bool()
    masks[0, 7, 7] = False  # padding
    wanted = theirs(
        query_embeds=torch.cat([queries, said], 1),
        query_length=tiny.QUERIES,
        attention_mask=masks[:, None],
        encoder_hidden_states=tiny.image(),
    ).last_hidden_state
    looked, written = ours.look_and_write(tiny.image(), text)
    assert_close(looked, wanted[:, : tiny.QUERIES], **CLOSE)
    assert_close(written, wanted[:, tiny.QUERIES :], **CLOSE)
    assert_close(ours.write(tiny.image(), text), written)
    assert_close(ours.look(tiny.image()), looked, **CLOSE)


def changed(text: dict[str, Tensor], place: int) -> dict[str, Tensor]:
    ids = text["ids"].clone()
    ids[:, place] = 5 + (ids[:, place] - 4) % (tiny.WORDS - 6)
    assert not torch.equal(ids[:, place], text["ids"][:, place])
    return text | {"ids": ids}


@pytest.mark.parametrize("place", [1, 3, 5])
def test_a_written_word_changes_nothing_before_it_and_no_query(place: int) -> None:
    ours, text = tiny.qformer(), tiny.text(padded=0)
    before = ours.look_and_write(tiny.image(), text)
    after = ours.look_and_write(tiny.image(), changed(text, place))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1][:, :place], after[1][:, :place])
    assert (before[1][:, place:] - after[1][:, place:]).abs().amax((0, 2)).min() > 1e-3


def test_dec_stands_for_the_first_word_of_what_is_written_and_of_nothing_else() -> None:
    ours, text = tiny.qformer(), tiny.text()
    other = changed(text, 0)
    assert torch.equal(ours.write(tiny.image(), text), ours.write(tiny.image(), other))
    assert (ours.read(text) - ours.read(other)).abs().max() > 1e-3
    with torch.no_grad():
        ours.words.weight[-1] *= -1
    kept = tiny.qformer()
    assert torch.equal(ours.read(text), kept.read(text))
    assert (ours.write(tiny.image(), text) - kept.write(tiny.image(), text)).abs().max() > 1e-3


@pytest.mark.parametrize("place", [0, 5])
def test_together_every_query_sees_every_word_and_every_word_the_image(place: int) -> None:
    ours, text = tiny.qformer(), tiny.text(padded=0)
    before = ours.together(tiny.image(), text)
    after = ours.together(tiny.image(), changed(text, place))
    assert (before - after).abs().amax((0, 2)).min() > 1e-3
    mask = ours._present(text, tiny.QUERIES)[:, None, None]
    words = [ours._states(x, text["ids"], mask)[:, -6:] for x in (tiny.image(), -tiny.image())]
    assert (words[0] - words[1]).abs().amax((0, 2)).min() > 1e-3


def test_reading_sees_no_image_and_looking_no_text() -> None:
    ours = tiny.qformer()
    ours.look(tiny.image())[0].sum().backward()
    seen = {name for name, weight in ours.named_parameters() if weight.grad is not None}
    assert not any(n.startswith(("words", "places")) or ".words." in n for n in seen)
    ours.zero_grad(set_to_none=True)
    ours.read(tiny.text()).sum().backward()
    seen = {name for name, weight in ours.named_parameters() if weight.grad is not None}
    blind = (".cross.", ".queries.")
    assert not any(n.startswith(("queries", "norm")) or any(b in n for b in blind) for n in seen)


@pytest.mark.parametrize("how", ["look", "read", "together", "write"])
def test_padding_of_text_changes_nothing(how: str) -> None:
    ours = tiny.qformer(instruct=True)
    text = tiny.text(padded=0)
    wide = {name: torch.nn.functional.pad(x, (0, 3)) for name, x in text.items()}
    wide["ids"][:, -3:] = torch.tensor([7, 0, 9])
    found = []
    for given in (text, wide):
        call = getattr(ours, how)
        states = call(given) if how == "read" else call(tiny.image(), given)
        found.append(states[:, :6] if how in {"read", "write"} else states)
    assert_close(found[0], found[1], **CLOSE)


# --- what it is made of -----------------------------------------------------------------------


def test_without_a_question_there_are_no_text_parts_and_the_gradient_reaches_all() -> None:
    ours = tiny.qformer(8)
    names = [name for name, _ in ours.named_parameters()]
    assert not any(n.startswith(("words", "places")) or ".words." in n for n in names)
    ours(tiny.image(), torch.arange(3)).square().sum().backward()
    assert all(weight.grad is not None for weight in ours.parameters())
    with pytest.raises(UsageError, match="no text parts"):
        ours.read(tiny.text())


def test_with_a_question_the_gradient_reaches_all() -> None:
    ours = tiny.qformer(8, instruct=True)
    ours(tiny.image(), torch.arange(3), tiny.text()).square().sum().backward()
    assert [name for name, weight in ours.named_parameters() if weight.grad is None] == []
    with pytest.raises(UsageError, match="question"):
        ours(tiny.image(), torch.arange(3))


def test_the_first_stage_reaches_every_weight() -> None:
    ours, text = tiny.qformer(), tiny.text()
    found = [ours.together(tiny.image(), text), ours.write(tiny.image(), text), ours.read(text)]
    sum(x.square().sum() for x in found).backward()
    assert [name for name, weight in ours.named_parameters() if weight.grad is None] == []


def test_weights_of_both_stages_have_the_same_names() -> None:
    first = tiny.qformer().state_dict()
    for second in (tiny.qformer(8), tiny.qformer(8, instruct=True)):
        shapes = {n: x.shape for n, x in second.state_dict().items() if "project" not in n}
        assert shapes == {name: first[name].shape for name in shapes}


def test_sizes_are_those_published() -> None:
    with torch.device("meta"):
        second, asked = QFormer(1408, 4096), QFormer(1408, 4096, instruct=True)
        first = QFormer(1408, None)
    count = {m: sum(p.numel() for p in m.parameters()) for m in (first, second, asked)}
    assert first.word_embeddings.shape == (30_523, 768)
    feed, project = 2 * 768 * 3072 + 3072 + 3 * 768, 768 * 4096 + 4096
    text = 30_523 * 768 + 512 * 768
    assert round(count[first] / 1e6) == 186  # BLIP-2, section 3.1, has 188 M with its heads
    assert count[first] - (count[second] - project) == text + 12 * feed
    assert count[first] - (count[asked] - project) == feed  # that of the last words


def test_dropout_works_in_training_alone() -> None:
    ours = tiny.qformer(8).train()
    looks = [ours.look(tiny.image()) for _ in range(2)]
    assert not torch.equal(*looks)
    ours.eval()
    assert torch.equal(ours.look(tiny.image()), ours.look(tiny.image()))


def test_tokens_of_the_store_in_half_precision_are_taken() -> None:
    ours = tiny.qformer(8)
    half = ours(tiny.image().half(), torch.arange(3))
    assert half.dtype == torch.float32
    assert_close(half, ours(tiny.image().half().float(), torch.arange(3)))


def test_half_arithmetic_stays_near() -> None:
    ours, text = tiny.qformer(), tiny.text()
    whole = ours.look_and_write(tiny.image(), text)
    with torch.autocast("cpu", torch.bfloat16):
        half = ours.look_and_write(tiny.image().half(), text)
    for near, wanted in zip(half, whole, strict=True):
        assert_close(near.float(), wanted, rtol=0, atol=0.1)


def test_an_image_is_one_square_view_and_as_many_tokens_as_queries(rng: Any) -> None:
    ours = tiny.qformer(8)
    picture = rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)
    views = ours.views(picture, 28)
    assert [view.shape for view in views] == [(28, 28, 3)]
    assert ours.count(257) == tiny.QUERIES
    assert ours(tiny.image(), torch.arange(3)).shape == (3, tiny.QUERIES, 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"queries": 0}, "queries"), ({"heads": 5}, "heads"), ({"text_limit": 17}, "text_limit")],
)
def test_impossible_sizes_are_refused(given: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tiny.qformer(**given)


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_texts_become_berts_tokens_padded_and_cut(whole: bool, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    if whole:
        from tokenizers import BertWordPieceTokenizer

        made = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
        made.enable_padding(length=20)
        made.enable_truncation(4)
        made.save(str(folder / "tokenizer.json"))
        (folder / "vocab.txt").unlink()
    at = {word: n for n, word in enumerate(WORDS)}
    texts = ["Red tissue", "much green tissue of a blue"]
    given = {"text": str(folder), "text_limit": 5, "words": len(WORDS) + 1}
    first = tiny.qformer(**given)
    kept = [at["[CLS]"], at["much"], at["green"], at["tissue"], at["[SEP]"]]
    short = [at["[CLS]"], at["red"], at["tissue"], at["[SEP]"], 0]
    tokens = first.tokens(texts)
    assert tokens["ids"].tolist() == [short, kept]
    assert tokens["mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert first.count_tokens(texts) == [4, 8]
    asked = tiny.qformer(instruct=True, **given).tokens(texts)["ids"].tolist()
    ends = [at["[CLS]"], at["of"], at["a"], at["blue"], at["[SEP]"]]
    assert asked == [short, ends]


def test_a_vocabulary_without_room_for_dec_is_refused(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    with pytest.raises(DataError, match="and \\[DEC\\] need"):
        tiny.qformer(text=str(folder), words=len(WORDS)).tokens(["red"])
