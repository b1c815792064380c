"""Language models of transformers: loss, generation, adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_language
import torch
from torch import Tensor

from pathcli.errors import DataError, UsageError
from pathcli.state import load_trainable, trainable_state
from pathcli.vlm.language import IGNORED, HFLanguage, Lora
from pathcli.vlm.language_files import shape_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_language.tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_language.tiny_t5(tmp_path_factory.mktemp("t5")))


def started(model: str, **given: Any) -> HFLanguage:
    torch.manual_seed(0)
    made = HFLanguage(model=model, **given)
    made.start()
    return made


def batch(width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of 9 and 6 tokens, right-padded; an answer of three and of two tokens."""
    draws = torch.Generator().manual_seed(3)
    embeds = torch.randn(2, 9, width, generator=draws)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    labels = torch.full((2, 9), IGNORED)
    labels[0, 6:], labels[1, 4:6] = torch.tensor([300, 310, 2]), torch.tensor([320, 2])
    return embeds, mask, labels


# --- loss --------------------------------------------------------------------------------------


def test_the_loss_of_a_causal_model_is_transformers_own(llama: str) -> None:
    made = started(llama).eval()
    embeds, mask, labels = batch()
    own = made.network(inputs_embeds=embeds, attention_mask=mask.long(), labels=labels).loss
    assert torch.allclose(made.loss(embeds, mask, labels), own, atol=1e-6)


def test_the_loss_of_an_encoder_decoder_is_transformers_own(t5: str) -> None:
    made = started(t5).eval()
    embeds, mask, _ = batch()
    labels = torch.tensor([[300, 310, 1], [320, 1, IGNORED]])
    own = made.network(inputs_embeds=embeds, attention_mask=mask.long(), labels=labels).loss
    assert torch.allclose(made.loss(embeds, mask, labels), own, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_vocabulary_logits_are_made_only_where_something_is_learnt(
    name: str, request: pytest.FixtureRequest
) -> None:
    made = started(request.getfixturevalue(name)).eval()
    seen = []
    embeds, mask, labels = batch()
    head = made.network.get_output_embeddings()
    with head.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape))):
        made.loss(embeds, mask, labels)
        made.logits(embeds, mask, labels)
    assert seen == [(5, 480), (2, 9, 480)]


def test_padding_on_the_left_changes_no_loss(llama: str) -> None:
    made = started(llama).eval()
    embeds, mask, labels = batch()
    rows, moved = [made.loss(embeds[1:], mask[1:], labels[1:])], 3
    rolled = [x[1:].roll(moved, 1) for x in (embeds, mask, labels)]
    rows.append(made.loss(*rolled))
    assert torch.allclose(*rows, atol=1e-6)


def test_a_batch_with_nothing_to_learn_is_no_loss_of_zero(llama: str) -> None:
    embeds, mask, labels = batch()
    with pytest.raises(DataError, match="no token is learnt"):
        started(llama).loss(embeds, mask, torch.full_like(labels, IGNORED))


def test_the_first_token_of_a_row_is_not_learnt_for_nothing_comes_before_it(llama: str) -> None:
    made = started(llama).eval()
    embeds, mask, labels = batch()
    first = labels.clone()
    first[:, 0] = 300
    assert made.loss(embeds, mask, first) == made.loss(embeds, mask, labels)


# --- generation ----------------------------------------------------------------------------------


def prompts(made: HFLanguage) -> list[Tensor]:
    texts = ["USER: What do you see? ASSISTANT:", "red", "Is there a tumour? Answer yes or no."]
    rows = [made.tokenizer(t, return_tensors="pt").input_ids[0] for t in texts]
    return [made.embed(row) for row in rows]


def padded(rows: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    embeds = torch.full((len(rows), length, rows[0].shape[-1]), 7.0)  # padding is not nothing
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        embeds[i, place], mask[i, place] = row, True
    return embeds, mask


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_padded_batch_generates_what_each_prompt_does_alone(
    name: str, left: bool, beams: int, request: pytest.FixtureRequest
) -> None:
    made = started(request.getfixturevalue(name)).eval()
    rows = prompts(made)
    how = {"max_new_tokens": 12, "beams": beams}
    alone = [made.generate(*padded([row], left=left), **how)[0] for row in rows]
    assert made.generate(*padded(rows, left=left), **how) == alone
    assert len({tuple(row) for row in alone}) == 3


def test_greedy_generation_takes_the_likeliest_token_each_time(llama: str) -> None:
    made = started(llama).eval()
    row = prompts(made)[0][None]
    found = []
    for _ in range(6):
        likeliest = int(
            made.logits(row, torch.ones(row.shape[:2], dtype=torch.bool))[0, -1].argmax()
        )
        found.append(likeliest)
        row = torch.cat([row, made.embed(torch.tensor([[likeliest]]))], 1)
    assert made.generate(*padded(prompts(made)[:1], left=True), max_new_tokens=6) == [found]


def test_a_stop_token_ends_an_answer_and_is_left_out(llama: str) -> None:
    made = started(llama).eval()
    prompt = padded(prompts(made)[:1], left=True)
    (whole,) = made.generate(*prompt, max_new_tokens=8)
    stop = whole[3]
    assert made.generate(*prompt, max_new_tokens=8, stop=[stop]) == [whole[: whole.index(stop)]]
    (longer,) = made.generate(*prompt, max_new_tokens=8, stop=[stop], min_new_tokens=6)
    assert len(longer) >= 5
    assert stop not in longer


def test_the_models_own_end_ends_an_answer_and_its_own_sampling_is_not_used(
    llama: str, tmp_path: Path
) -> None:
    import shutil

    made = started(llama).eval()
    prompt = padded(prompts(made)[:1], left=True)
    (whole,) = made.generate(*prompt, max_new_tokens=8)
    folder = shutil.copytree(llama, tmp_path / "copy")
    sampling = {"do_sample": True, "temperature": 9.0, "eos_token_id": [2, whole[3]]}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    other = started(str(folder)).eval()
    assert other.generate(*prompt, max_new_tokens=8) == [whole[: whole.index(whole[3])]]


# --- what is trained -----------------------------------------------------------------------------


def test_a_frozen_model_passes_gradients_on_and_keeps_none(t5: str) -> None:
    made = started(t5).train()
    embeds, mask, labels = batch()
    made.loss(embeds.requires_grad_(), mask, labels).backward()
    assert float(embeds.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert not any(p.requires_grad or p.grad is not None for p in made.parameters())
    assert trainable_state(made) == {}


@pytest.mark.parametrize("tune", ["frozen", "lora"])
def test_training_mode_leaves_what_is_frozen_without_dropout(t5: str, tune: Any) -> None:
    made = torch.nn.ModuleList([started(t5, tune=tune, lora=Lora(dropout=0.5))]).train()[0]
    on = {name for name, m in made.network.named_modules() if m.training}
    drops = {n for n, m in made.network.named_modules() if isinstance(m, torch.nn.Dropout)}
    own = {n for n in drops if "lora_dropout" in n}
    assert {n for n in on if n in drops} == own
    assert bool(own) is (tune == "lora")
    assert len(drops - own) > 10
    losses = [made.loss(*batch()) for _ in range(2)]
    if tune == "frozen":
        assert losses[0] == losses[1]
    made.eval()
    assert made.loss(*batch()) == made.loss(*batch())


def test_a_model_trained_whole_has_its_dropout(t5: str) -> None:
    made = started(t5, tune="full").train()
    assert made.loss(*batch()) != made.loss(*batch())
    assert all(p.requires_grad for p in made.parameters())


def test_adapters_begin_without_effect_and_are_all_that_is_trained(llama: str) -> None:
    plain, made = started(llama).eval(), started(llama, tune="lora", lora=Lora(r=4)).eval()
    assert torch.equal(made.loss(*batch()), plain.loss(*batch()))
    made.loss(*batch()).backward()
    state = trainable_state(made)
    assert all(".lora_" in name for name in state)
    layers = {name.rpartition(".lora_")[0] for name in state}
    ends = {name.rpartition(".")[2] for name in layers}
    assert ends == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert "network.model.layers.0.self_attn.q_proj.lora_A.default.weight" in state
    assert {n for n, p in made.named_parameters() if p.grad is not None} == set(state)
    assert sum(value.numel() for value in state.values()) == shape_of(llama).lora(4)


def test_an_encoder_decoder_has_as_many_adapter_weights_as_its_shape_says(t5: str) -> None:
    made = started(t5, tune="lora", lora=Lora(r=2))
    assert sum(v.numel() for v in trainable_state(made).values()) == shape_of(t5).lora(2)


def test_trained_adapters_are_saved_and_read_back(llama: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    made = started(llama, tune="lora", lora=Lora(r=4, targets=("q_proj", "v_proj")))
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        made.loss(*batch()).backward()
        optimizer.step()
    save_file(trainable_state(made), tmp_path / "w.safetensors")
    again = started(llama, tune="lora", lora=Lora(r=4, targets=("q_proj", "v_proj"))).eval()
    before = again.loss(*batch())
    load_trainable(again, tmp_path / "w.safetensors")
    assert again.loss(*batch()) == made.eval().loss(*batch())
    assert again.loss(*batch()) != before


def test_adapters_for_a_layer_the_model_has_not_are_refused(llama: str) -> None:
    with pytest.raises(UsageError, match="'q_prj': did you mean 'q_proj'"):
        started(llama, tune="lora", lora=Lora(targets=("q_prj",)))


def test_a_frozen_base_may_be_half_while_inputs_and_adapters_are_float32(llama: str) -> None:
    made = started(llama, tune="lora", load="bfloat16")
    embeds, mask, labels = batch()
    loss = made.loss(embeds.requires_grad_(), mask, labels)
    loss.backward()
    assert loss.dtype == embeds.grad.dtype == torch.float32  # type: ignore[union-attr]
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in made.parameters() if not p.requires_grad} == {torch.bfloat16}
    whole = started(llama).loss(*batch())
    assert torch.allclose(loss, whole, rtol=0.02)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_checkpointing_keeps_less_and_changes_no_gradient(
    name: str, request: pytest.FixtureRequest
) -> None:
    kept, gradients = [], []
    for on in (False, True):
        options: Any = {"tune": "lora", "lora": Lora(r=2, dropout=0.0), "checkpointing": on}
        made = started(request.getfixturevalue(name), **options).train()
        embeds, mask, labels = batch()
        saved: list[int] = []
        hooks = (lambda x, to=saved: to.append(x.numel()) or x, lambda x: x)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = made.loss(embeds.requires_grad_(), mask, labels)
        loss.backward()
        kept.append(sum(saved))
        gradients.append(embeds.grad)
        made.eval().generate(embeds, mask, max_new_tokens=3)
    assert kept[1] < kept[0] / 2
    assert torch.allclose(*gradients, atol=1e-6)
