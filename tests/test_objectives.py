"""The objectives against closed forms, open_clip, and one process with the joint batch."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from two import in_two_processes

from pathcli.errors import DataError
from pathcli.objectives import (
    IGNORED,
    contrastive,
    enqueue,
    gather,
    hard_negatives,
    itg,
    itm,
    momentum_itc,
    momentum_update,
    multi_positive,
    query_itc,
    query_similarity,
)
from pathcli.vlm.model import VisionLanguage


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_process_gathers_its_own_rows() -> None:
    mine = rows(3, 2)
    assert gather(mine) is mine


def test_equal_embeddings_leave_the_contrast_at_the_logarithm_of_the_batch() -> None:
    ones = torch.ones(5, 4, dtype=torch.float64)
    assert contrastive(ones, ones, 100).item() == pytest.approx(math.log(5), abs=1e-12)


def test_orthogonal_pairs_have_the_contrast_of_their_closed_form() -> None:
    eye, scale = torch.eye(4, dtype=torch.float64), 3.0
    expected = math.log(math.exp(scale) + 3) - scale
    assert contrastive(7 * eye, eye, scale).item() == pytest.approx(expected, abs=1e-12)


def test_the_contrast_and_its_gradients_are_those_of_open_clip() -> None:
    from pathcli.torchvision_guard import guard_torchvision

    guard_torchvision()
    from open_clip.loss import ClipLoss

    ours = [rows(6, 5).requires_grad_(), rows(6, 5, seed=1).requires_grad_()]
    theirs = [part.detach().clone().requires_grad_() for part in ours]
    scale = [torch.tensor(14.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = contrastive(ours[0], ours[1], scale[0])
    reference = ClipLoss()(normalize(theirs[0], dim=-1), normalize(theirs[1], dim=-1), scale[1])
    assert loss.item() == pytest.approx(reference.item(), abs=1e-12)
    loss.backward()
    reference.backward()
    for one, other in zip([*ours, scale[0]], [*theirs, scale[1]], strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=0)


def test_labels_all_different_make_multi_positive_the_plain_contrast() -> None:
    images, texts = rows(5, 3), rows(5, 3, seed=1)
    plain = contrastive(images, texts, 9)
    torch.testing.assert_close(multi_positive(images, texts, torch.arange(5), 9), plain)


def test_equal_captions_are_no_negatives_of_each_other() -> None:
    eye, scale = torch.eye(2, dtype=torch.float64)[[0, 0, 1]], 4.0
    labels = torch.tensor([8, 8, 2])
    twice = math.log(2 * math.exp(scale) + 1) - scale  # half of the target on each equal row
    once = math.log(math.exp(scale) + 2) - scale
    expected = (2 * twice + once) / 3
    assert multi_positive(eye, eye, labels, scale).item() == pytest.approx(expected, abs=1e-12)
    assert contrastive(eye, eye, scale).item() == pytest.approx(expected, abs=1e-12)
    other = eye.roll(1, 0)  # now only the labels know which rows belong together
    assert multi_positive(eye, other, labels, scale) > multi_positive(eye, eye, labels, scale)


def test_an_image_is_as_similar_to_a_text_as_its_best_query() -> None:
    queries, texts = rows(4, 32, 6), rows(3, 6, seed=1)
    expected = torch.stack(
        [torch.stack([torch.cosine_similarity(q, t[None]).max() for t in texts]) for q in queries]
    )
    torch.testing.assert_close(query_similarity(queries, texts), expected)


def test_the_query_contrast_is_smoothed_cross_entropy_in_both_directions() -> None:
    queries, texts, heat = rows(4, 3, 6), rows(4, 6, seed=1), 0.2
    similar = query_similarity(queries, texts) / heat
    target = torch.full((4, 4), 0.1 / 4, dtype=torch.float64) + 0.9 * torch.eye(4)
    ways = [-(target * way.log_softmax(1)).sum(1).mean() for way in (similar, similar.T)]
    torch.testing.assert_close(query_itc(queries, texts, heat), (ways[0] + ways[1]) / 2)


def test_one_query_without_smoothing_is_the_plain_contrast() -> None:
    images, texts = rows(5, 3), rows(5, 3, seed=1)
    found = query_itc(images[:, None], texts, 0.1, smoothing=0)
    torch.testing.assert_close(found, contrastive(images, texts, 10))


# --- momentum ------------------------------------------------------------------------------


def test_without_queue_and_soft_targets_the_momentum_contrast_is_the_plain_one() -> None:
    images, texts = rows(5, 3), rows(5, 3, seed=1)
    empty = torch.empty(0, 3, dtype=torch.float64)
    found = momentum_itc(images, texts, (images, texts), (empty, empty), 0.1, alpha=0)
    torch.testing.assert_close(found, contrastive(images, texts, 10))


def test_queues_and_soft_targets_enter_the_momentum_contrast_as_published() -> None:
    fast, slow = (rows(3, 4), rows(3, 4, seed=1)), (rows(3, 4, seed=2), rows(3, 4, seed=3))
    queues = normalize(rows(6, 4, seed=4), dim=-1), normalize(rows(6, 4, seed=5), dim=-1)
    heat, alpha, total = 0.3, 0.4, 0.0
    for own, other in ((0, 1), (1, 0)):
        columns = torch.cat([normalize(slow[other], dim=-1), queues[other]])
        soft = (normalize(slow[own], dim=-1) @ columns.T / heat).softmax(1)
        target = alpha * soft + (1 - alpha) * torch.eye(3, 9, dtype=torch.float64)
        said = (normalize(fast[own], dim=-1) @ columns.T / heat).log_softmax(1)
        total += float(-(target * said).sum(1).mean()) / 2
    found = momentum_itc(*fast, slow, queues, heat, alpha=alpha)
    assert found.item() == pytest.approx(total, abs=1e-12)


def test_the_momentum_model_gets_no_gradient() -> None:
    parts = [rows(3, 4, seed=i).requires_grad_() for i in range(4)]
    queue = rows(5, 4)
    momentum_itc(*parts[:2], (parts[2], parts[3]), (queue, queue), 0.1, alpha=0.5).backward()
    assert [part.grad is not None for part in parts] == [True, True, False, False]


def test_a_queue_wraps_and_keeps_the_newest_rows() -> None:
    queue, place = torch.zeros(5, 2), torch.zeros(1, dtype=torch.int64)
    batches = [torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 2.0]] * 4)]
    for batch in batches:
        enqueue(queue, place, batch)
    assert queue[:, 0].tolist() == [0, 0, 1, 0, 0]
    assert queue[:, 1].tolist() == [1, 1, 0, 1, 1]
    assert place.item() == 2


def test_a_batch_larger_than_the_queue_leaves_its_last_rows() -> None:
    queue, place = torch.zeros(2, 2), torch.zeros(1, dtype=torch.int64)
    enqueue(queue, place, torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    assert sorted(queue.tolist()) == [[-1.0, 0.0], [0.0, 1.0]]


def test_slow_weights_follow_by_the_momentum_formula() -> None:
    slow, fast = [rows(3), rows(2, 2)], [rows(3, seed=1), rows(2, 2, seed=2)]
    expected = [0.995 * s + 0.005 * f for s, f in zip(slow, fast, strict=True)]
    momentum_update(slow, fast, 0.995)
    torch.testing.assert_close(slow, expected)


# --- matching and captioning -----------------------------------------------------------------


def test_a_hard_negative_is_never_the_positive_and_follows_the_softmax() -> None:
    similarity = torch.tensor([[50.0, 1.0, 0.0]]).repeat(20_000, 1)
    barred = torch.tensor([[True, False, False]]).repeat(20_000, 1)
    drawn = hard_negatives(similarity, torch.Generator().manual_seed(0), barred)
    share = 1 / (1 + math.exp(-1))
    assert 0 not in drawn.tolist()
    assert (drawn == 1).float().mean().item() == pytest.approx(share, abs=0.01)


def test_the_diagonal_is_the_positive_where_nothing_else_is_said() -> None:
    for seed in range(20):
        drawn = hard_negatives(100 * torch.eye(6), torch.Generator().manual_seed(seed))
        assert not (drawn == torch.arange(6)).any()


def test_draws_repeat_with_their_generator() -> None:
    draws = [hard_negatives(rows(30, 30), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)


def test_a_pair_without_any_negative_is_an_error() -> None:
    with pytest.raises(DataError, match="no negative"):
        hard_negatives(torch.zeros(1, 1))


def test_matching_averages_the_logits_of_queries() -> None:
    logits, labels = rows(4, 32, 2), torch.tensor([1, 0, 0, 1])
    expected = -logits.mean(1).log_softmax(1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(itm(logits, labels), expected)
    torch.testing.assert_close(itm(logits.mean(1), labels), expected)


def test_captioning_predicts_the_next_token_and_passes_over_the_masked() -> None:
    logits, labels = rows(2, 4, 7), torch.tensor([[-100, 3, 4, -100], [1, 2, 6, 0]])
    places = [(0, 0, 3), (0, 1, 4), (1, 0, 2), (1, 1, 6), (1, 2, 0)]
    said = logits.log_softmax(-1)
    plain = -torch.stack([said[p] for p in places]).mean()
    flat = -torch.stack([said[b, t].mean() for b, t, _ in places]).mean()
    torch.testing.assert_close(itg(logits, labels), plain)
    torch.testing.assert_close(itg(logits, labels, smoothing=0.1), 0.9 * plain + 0.1 * flat)


def test_captions_masked_whole_are_an_error() -> None:
    with pytest.raises(DataError, match="without a token"):
        itg(rows(1, 3, 7), torch.tensor([[5, -100, -100]]))


# --- two processes ---------------------------------------------------------------------------

LOSSES: dict[str, Callable[..., Tensor]] = {
    "contrastive": lambda x, y, _, s: contrastive(x[:, 0], y, s),
    "multi_positive": lambda x, y, labels, s: multi_positive(x[:, 0], y, labels, s),
    "query_itc": lambda x, y, _, s: query_itc(x, y, 1 / s),
    "momentum_itc": lambda x, y, _, s: momentum_itc(
        x[:, 0], y, (x[:, 1], y.flip(1)), (QUEUE, QUEUE.flip(0)), 1 / s, alpha=0.4
    ),
    "words": lambda x, y, labels, s: answered((x[:, 0] * y).sum(1) * s, labels),
}


def answered(losses: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a vision-language model, a word a row; those of label 1 are not learnt."""
    wanted = labels.masked_fill(labels == 1, IGNORED)[:, None]
    language = SimpleNamespace(
        seq2seq=True, loss=lambda embeds, mask, said: embeds[said[:, 0] != mask].mean()
    )
    model = VisionLanguage(None, None, language)  # type: ignore[arg-type]
    model.embeds = lambda batch: losses  # type: ignore[method-assign]
    return model.loss({"labels": wanted, "mask": IGNORED})


QUEUE = normalize(rows(6, 4, seed=9), dim=-1)
CUT = 4  # of 7 rows: the processes have unequal batches


def weights() -> list[Tensor]:
    return [rows(5, 4, seed=2), rows(3, 4, seed=3), torch.tensor(2.0, dtype=torch.float64)]


def of_rows(name: str, part: slice) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of some rows of the joint batch, and the gradients of all weights."""
    learnt = [w.clone().requires_grad_() for w in weights()]
    images, texts = rows(7, 3, 5)[part] @ learnt[0], rows(7, 3, seed=1)[part] @ learnt[1]
    labels = torch.tensor([0, 1, 2, 0, 1, 5, 0])[part]
    loss = LOSSES[name](images, texts, labels, learnt[2].exp())
    loss.backward()
    return loss.detach(), [w.grad for w in learnt if w.grad is not None]


def process(rank: int, folder: str) -> None:
    """Be one of two processes, and write what its rows give."""
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    part = slice(0, CUT) if rank == 0 else slice(CUT, 7)
    found = {name: of_rows(name, part) for name in LOSSES}
    queue, place = torch.zeros(5, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    enqueue(queue, place, rows(4, 4)[2 * rank : 2 * rank + 2])
    torch.save({"losses": found, "queue": queue, "place": place}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes("test_objectives", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_over_processes_is_one_process_with_the_joint_batch(
    processes: list[dict], name: str
) -> None:
    loss, gradients = of_rows(name, slice(0, 7))
    parts = [one["losses"][name] for one in processes]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, loss, atol=1e-9, rtol=0)
    for joint, *split in zip(gradients, parts[0][1], parts[1][1], strict=True):
        torch.testing.assert_close((split[0] + split[1]) / 2, joint, atol=1e-9, rtol=0)


def test_both_processes_queue_the_rows_of_both(processes: list[dict]) -> None:
    for one in processes:
        torch.testing.assert_close(one["queue"][:4], normalize(rows(4, 4), dim=-1))
        assert one["place"].item() == 4
