"""Whole models against transformers' own, of the same weights; and the batches they are given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_language
import tiny_qformer as tiny
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from pathcli.data.images import read_image
from pathcli.data.pairs import Pictures
from pathcli.encoders.augment import Augment
from pathcli.encoders.eva import EvaClipG
from pathcli.encoders.hf import HFClipEncoder
from pathcli.errors import DataError
from pathcli.torchvision_guard import guard_torchvision
from pathcli.types import Encoder, Sample
from pathcli.vlm.batches import Examples
from pathcli.vlm.chat import Chat
from pathcli.vlm.connectors import Connector, Mlp
from pathcli.vlm.generate import answers
from pathcli.vlm.language import HFLanguage
from pathcli.vlm.model import NOT_LEARNT, VisionLanguage
from pathcli.vlm.qformer import QFormer
from pathcli.vlm.towers import Views, ready

KINDS = ["blip2-opt", "blip2-t5", "instructblip-llama", "instructblip-t5", "llava-llama"]
WIDTH, EVA, CLIP = 32, 176, 24
IMAGE = 480  # the tokenizers have words 0 to 479
TURNS = ("<image> What do you see? <image> Is there a tumour?",)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "do", "you", "see", "?", "is"]


class Both(NamedTuple):
    """The same weights as transformers' model and as ours; samples of one and of two images."""

    theirs: Any
    ours: VisionLanguage
    examples: Examples
    one: Sample
    two: Sample

    def batch(self, *samples: Sample) -> dict[str, Any]:
        return self.examples(samples or (self.one, self.two), np.random.default_rng(0))

    def given(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return a batch of ours as transformers' model takes it."""
        encoder: Any = self.ours.encoder
        found = {
            "pixel_values": encoder.preprocess(batch["views"]),
            "input_ids": batch["ids"].masked_fill(batch["image"], IMAGE),
            "attention_mask": batch["mask"].long(),
        }
        for name, tensor in batch.get("text", {}).items():
            found[f"qformer_{ {'ids': 'input_ids', 'mask': 'attention_mask'}[name] }"] = tensor
        return found


# --- transformers' models, and how ours come from their files -----------------------------


def words(kind: str) -> Any:
    """Return the configuration of a language model of two layers."""
    guard_torchvision()
    import transformers

    sizes = {"vocab_size": IMAGE + 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes |= {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 256}
    if kind == "opt":
        return transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=WIDTH)
    if kind == "llama":
        return transformers.LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=2)
    sizes = {"vocab_size": IMAGE + 1, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    how = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return transformers.T5Config(**sizes, num_heads=4, decoder_start_token_id=0, **how)


def language(network: Any, folder: Path) -> HFLanguage:
    """Return the language model of a folder that is made of transformers' network."""
    network.save_pretrained(folder)
    if network.config.is_encoder_decoder:
        marks: Any = (["<pad>", "</s>", "<unk>"], None, "</s>", "<pad>")
    else:
        marks = (["<unk>", "<s>", "</s>"], "<s>", "</s>", "<unk>")
    assert len(tiny_language.tokenizer(folder, *marks)) == IMAGE
    made = HFLanguage(model=str(folder))
    made.start()
    return made


def blip(family: str, kind: str, folder: Path) -> tuple[Any, VisionLanguage]:
    """Make a BLIP-2 or InstructBLIP; ours reads the file it is saved to."""
    import transformers

    vision = {"hidden_size": EVA, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    reads = family == "InstructBlip"
    config = getattr(transformers, f"{family}Config")(
        vision_config=vision,
        qformer_config=tiny.THEIRS
        | {"encoder_hidden_size": EVA}
        | ({} if reads else {"use_qformer_text_input": False}),
        text_config=words(kind).to_dict(),
        num_query_tokens=tiny.QUERIES,
        image_token_index=IMAGE,
    )
    theirs = tiny.shaken(getattr(transformers, f"{family}ForConditionalGeneration")(config))
    theirs.save_pretrained(folder / "whole")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    sizes: Any = {"init": str(folder / "whole"), "text": str(folder), "instruct": reads}
    connector = QFormer(EVA, WIDTH, **tiny.SIZES | sizes)
    assert connector.start()["drawn"] == 0
    encoder = EvaClipG(checkpoint=folder / "whole", precision="float32")
    spoken = language(theirs.language_model, folder / "language")
    return theirs, VisionLanguage(encoder, connector, spoken)


def llava(kind: str, folder: Path) -> tuple[Any, VisionLanguage]:
    """Make a LLaVA; ours are a CLIP's folder, a language model's, and two linear layers."""
    guard_torchvision()
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    sizes = {"hidden_size": CLIP, "intermediate_size": 48, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=28, patch_size=14)
    config = LlavaConfig(vision_config=vision, text_config=words(kind), image_token_index=IMAGE)
    assert config.vision_feature_layer == -2
    theirs = tiny.shaken(LlavaForConditionalGeneration(config))
    text = sizes | {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict()))
    clip.vision_model.load_state_dict(theirs.model.vision_tower.state_dict())
    clip.save_pretrained(folder / "clip")
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps({"crop_size": 28}))
    encoder = HFClipEncoder(model=str(folder / "clip"), tokens=True, layer=-2)
    connector, way = Mlp(CLIP, WIDTH), theirs.model.multi_modal_projector
    connector.layers[0].load_state_dict(way.linear_1.state_dict())
    connector.layers[2].load_state_dict(way.linear_2.state_dict())
    network = LlamaForCausalLM(words(kind))
    network.model.load_state_dict(theirs.model.language_model.state_dict())
    network.lm_head.load_state_dict(theirs.lm_head.state_dict())
    return theirs, VisionLanguage(encoder, connector, language(network, folder / "language"))


def examples(
    encoder: Encoder, connector: Connector, spoken: HFLanguage, samples: list[Sample], chat: Chat
) -> Examples:
    views = Views(Pictures(samples), connector, Augment(), encoder.input_px)
    count = connector.count(encoder.row_shape[0])
    return Examples(views, chat, connector, spoken, count)


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    family, _, kind = request.param.partition("-")
    folder = tmp_path_factory.mktemp(request.param)
    if family == "llava":
        theirs, ours = llava(kind, folder)
    else:
        theirs, ours = blip({"blip2": "Blip2"}.get(family, "InstructBlip"), kind, folder)
    ours.eval()
    ready(ours.encoder, "cpu")
    draws = np.random.default_rng(3)
    paths = [str(folder / f"{number}.png") for number in range(3)]
    for path, size in zip(paths, ((90, 60), (224, 224), (50, 70)), strict=True):
        Image.fromarray(draws.integers(0, 256, (*size, 3), np.uint8)).save(path)
    question = (TURNS[0].replace("<image> ", ""),)
    one = Sample("one", (paths[0],), "no, benign", question)
    two = Sample("two", (paths[1], paths[2]), "yes, many malignant cells with large nuclei", TURNS)
    chat = Chat(template="flan" if kind == "t5" else "vicuna-v1")
    made = examples(ours.encoder, ours.connector, ours.language, [one, two], chat)
    return Both(theirs, ours, made, one, two)


# --- parity -------------------------------------------------------------------------------


def test_logits_and_loss_are_transformers_own(both: Both) -> None:
    batch = both.batch()
    with torch.no_grad():
        theirs = both.theirs(**both.given(batch), labels=batch["labels"])
        logits, loss = both.ours.logits(batch), both.ours.loss(batch)
    assert logits.shape == theirs.logits.shape
    there = batch["mask"] if not both.ours.language.seq2seq else batch["labels"] != NOT_LEARNT
    # a Q-Former's first norm adds LAVIS' 1e-5 to the variance, transformers' 1e-6
    assert float((logits - theirs.logits)[there].abs().max()) < 1e-4
    assert float(theirs.logits[there].std()) > 0.3
    assert abs(float(loss - theirs.loss)) < 1e-5


def test_what_is_compared_depends_on_the_images_and_on_the_words(both: Both) -> None:
    batch = both.batch()
    last = (batch["labels"] != NOT_LEARNT).nonzero()[-1]
    with torch.no_grad():
        before = both.ours.logits(batch)[tuple(last)]
        turned = both.ours.logits(batch | {"views": batch["views"].flip(0)})[tuple(last)]
        ids = batch["ids"].clone()
        ids[1, (~batch["image"][1]).nonzero()[3]] = 300
        reworded = both.ours.logits(batch | {"ids": ids})[tuple(last)]
    assert float((turned - before).abs().max()) > 0.01
    assert float((reworded - before).abs().max()) > 0.01


def test_greedy_answers_are_transformers_own(both: Both) -> None:
    batch = both.examples.ask([both.one, both.two], np.random.default_rng(0))
    assert not batch["mask"][0, 0]  # padded on the left
    end = both.ours.language.tokenizer.eos_token_id
    how = {"do_sample": False, "eos_token_id": end, "pad_token_id": 0, "max_new_tokens": 10}
    found = both.theirs.generate(**both.given(batch), **how)
    first = 1 if both.ours.language.seq2seq else batch["ids"].shape[1]
    theirs = [row[: row.index(end)] if end in row else row for row in found[:, first:].tolist()]
    assert both.ours.generate(batch, max_new_tokens=10) == theirs
    assert theirs[0] != theirs[1]
    tokenizer = both.ours.language.tokenizer
    said = answers(both.ours, both.examples, [both.two, both.one], max_new_tokens=10)
    told = tokenizer.batch_decode(theirs[::-1], skip_special_tokens=True)
    assert said == [text.strip() for text in told]


# --- batches ------------------------------------------------------------------------------


def test_padding_on_the_right_changes_no_loss(both: Both) -> None:
    batch = both.batch()
    assert not batch["mask"][0, -1]
    alone = [both.batch(sample) for sample in (both.one, both.two)]
    assert all(bool(each["mask"].all()) for each in alone)
    learnt = [int((each["labels"] != NOT_LEARNT).sum()) for each in alone]
    with torch.no_grad():
        sums = [n * both.ours.loss(each) for n, each in zip(learnt, alone, strict=True)]
        together = both.ours.loss(batch)
        other = both.ours.loss(batch | {"ids": batch["ids"].masked_fill(~batch["mask"], 300)})
    assert_close(together, sum(sums) / sum(learnt), rtol=0, atol=1e-5)
    assert_close(together, other, rtol=0, atol=1e-6)


def test_two_images_of_a_sample_go_to_their_places_in_order(both: Both) -> None:
    batch = both.batch()
    count, model = both.examples.count, both.ours
    assert batch["image"].sum(1).tolist() == [count, 2 * count]
    first, second = batch["image"][1].nonzero()[:, 0].split(count)
    assert int(second[0]) > int(first[-1]) + 1  # words stand between
    with torch.no_grad():
        embeds, spoken = model.embeds(batch), model.language.embed(batch["ids"])
        assert model.visual(batch).shape == (3, count, WIDTH)
        for image, place in enumerate((first, second), start=1):
            pixels = read_image(both.two.images[image - 1])
            (view,) = model.connector.views(pixels, model.encoder.input_px)
            text = {name: t[image : image + 1] for name, t in batch.get("text", {}).items()}
            alone = {"views": torch.from_numpy(view)[None], "of": torch.tensor([0]), "text": text}
            assert_close(embeds[1, place], model.visual(alone)[0], rtol=0, atol=1e-5)
    words_there = batch["mask"] & ~batch["image"]
    assert torch.equal(embeds[words_there], spoken[words_there])


def test_fewer_places_than_visual_tokens_are_refused(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = both.examples.chat
    encode, count = chat.encode, both.examples.count

    def forgetful(*given: Any, **named: Any) -> Any:
        told = encode(*given, **named)
        kept = [i for i, is_image in enumerate(told.image) if not is_image or told.image[i - 1]]
        return replace(told, tokens=tuple(told.tokens[i] for i in kept))

    monkeypatch.setattr(chat, "encode", forgetful)
    with pytest.raises(DataError, match=f"two: {2 * count - 2} places for {2 * count} visual"):
        both.batch(both.two)


def test_as_many_questions_as_images_go_to_a_connector_that_reads(both: Both) -> None:
    batch = both.batch()
    if not both.ours.connector.reads:
        assert "text" not in batch
        return
    ids = batch["text"]["ids"]
    assert len(ids) == 3
    assert (ids == ids[0]).all()  # without marks the two ask the same
    assert both.batch(both.one)["text"]["ids"].tolist() == [ids[0].tolist()]
