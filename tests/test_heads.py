import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from pathcli import registry
from pathcli.errors import UsageError
from pathcli.mil import acmil
from pathcli.mil.abmil import ABMIL, hidden_width
from pathcli.mil.acmil import ACMIL
from pathcli.mil.clam import ClamSB
from pathcli.mil.dsmil import DSMIL
from pathcli.mil.pooling import MaxPooling, MeanPooling
from pathcli.mil.transmil import TransMIL
from pathcli.types import HeadOutput

DIM = 16
Build = Callable[[int], torch.nn.Module]
SMALL = {"width": 32, "heads": 4, "landmarks": 8}
HEADS: dict[str, Build] = {
    "abmil": lambda c: ABMIL(DIM, c, hidden=32),
    "abmil plain": lambda c: ABMIL(DIM, c, hidden=32, attention="plain", dropout=0.1),
    "acmil": lambda c: ACMIL(DIM, c, hidden=32),
    "acmil multi-head": lambda c: ACMIL(DIM, c, hidden=32, attention="multi-head"),
    "acmil one branch": lambda c: ACMIL(DIM, c, hidden=32, branches=1),
    "clam-sb": lambda c: ClamSB(DIM, c, hidden=32, attention_width=16),
    "clam-sb ce": lambda c: ClamSB(DIM, c, hidden=32, attention_width=16, inst_loss="ce"),
    "transmil": lambda c: TransMIL(DIM, c, **SMALL),  # type: ignore[arg-type]
    "dsmil": lambda c: DSMIL(DIM, c),
    "mean": lambda c: MeanPooling(DIM, c),
    "max": lambda c: MaxPooling(DIM, c),
}
every_head = pytest.mark.parametrize("name", HEADS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def label(value: int) -> torch.Tensor:
    return torch.tensor(value)


def set_to(head: torch.nn.Module, **values: list[object]) -> None:
    """Set parameters, named with __ for the dots; all must be of the right shape."""
    for name, value in values.items():
        parameter = head.get_parameter(name.replace("__", "."))
        given = torch.tensor(value, dtype=torch.float32)
        assert given.shape == parameter.shape, name
        parameter.data = given


# --- every head --------------------------------------------------------------------------


def test_every_registered_head_is_tested_here() -> None:
    assert {n.split()[0] for n in HEADS} == set(registry.names("head"))
    for name, build in HEADS.items():
        assert type(build(2)) is registry.resolve("head", name.split()[0])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("train", [True, False])
@every_head
def test_attention_is_a_distribution_over_the_tiles(name: str, train: bool, classes: int) -> None:
    head = HEADS[name](classes).train(train)
    for n in (1, 2, 3, 5, 10, 37):
        out: HeadOutput = head(torch.randn(n, DIM) * 3)
        assert out.logits.shape == (classes,)
        assert out.attention.shape == (n,)
        assert out.logits.dtype == out.attention.dtype == torch.float32
        assert (out.attention >= 0).all()
        assert out.attention.sum().item() == pytest.approx(1, abs=1e-5)


@every_head
def test_bags_of_any_size_and_scale_train_without_nan(name: str) -> None:
    head = HEADS[name](3)
    for n in (1, 2, 3, 9, 11, 80):
        for scale in (0.0, 1.0, 100.0):
            head.zero_grad()
            loss = head.loss(torch.randn(n, DIM) * scale, label(2))  # type: ignore[operator]
            assert loss.shape == ()
            assert loss.isfinite()
            loss.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


@every_head
def test_a_loss_in_half_precision_is_close_to_the_exact_one(name: str) -> None:
    head = HEADS[name](2).eval()
    features = torch.randn(40, DIM)
    exact = head.loss(features, label(1))  # type: ignore[operator]
    with torch.autocast("cpu", torch.bfloat16):
        rough = head.loss(features, label(1))  # type: ignore[operator]
        out = head(features)
    assert rough.item() == pytest.approx(exact.item(), abs=0.05)
    assert out.logits.dtype == torch.float32
    assert out.attention.sum().item() == pytest.approx(1, abs=0.01)


@every_head
def test_the_order_of_tiles_matters_to_transmil_alone(name: str) -> None:
    head = HEADS[name](3).eval()
    features, order = torch.randn(30, DIM), torch.randperm(30)
    one, other = head(features), head(features[order])
    same = torch.allclose(one.logits, other.logits, atol=1e-5) and torch.allclose(
        one.attention[order], other.attention, atol=1e-5
    )
    assert same == (name != "transmil")
    losses = [head.loss(f, label(1)).item() for f in (features, features[order])]  # type: ignore[operator]
    assert (losses[0] == pytest.approx(losses[1], abs=1e-5)) == (name != "transmil")


@every_head
def test_evaluation_is_deterministic(name: str) -> None:
    head = HEADS[name](2).eval()
    features = torch.randn(30, DIM)
    state = torch.get_rng_state()
    outs = [head(features) for _ in range(2)]
    losses = [head.loss(features, label(0)) for _ in range(2)]  # type: ignore[operator]
    assert torch.equal(outs[0].logits, outs[1].logits)
    assert torch.equal(outs[0].attention, outs[1].attention)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(torch.get_rng_state(), state)


@every_head
def test_the_gradient_reaches_every_parameter(name: str) -> None:
    head = HEADS[name](2)
    features = torch.randn(50, DIM)
    for value in (0, 1):  # CLAM's instance classifiers learn from their own class only
        head.loss(features, label(value)).backward()  # type: ignore[operator]
    missed = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missed


@every_head
def test_a_head_learns_planted_tiles_and_attends_to_them(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    direction = F.normalize(torch.randn(DIM, generator=generator), dim=0) * 6

    def bags(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        made = []
        for i in range(count):
            features = torch.randn(60, DIM, generator=generator)
            features[:12] += direction * (i % 2)  # more than ACMIL masks
            made.append((features, label(i % 2)))
        return made

    head = HEADS[name](2)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.01)
    for features, target in bags(200):
        optimiser.zero_grad()
        head.loss(features, target).backward()  # type: ignore[operator]
        optimiser.step()
    head.eval()
    with torch.no_grad():
        outs = [(head(f), int(t)) for f, t in bags(40)]
    assert sum(int(o.logits.argmax()) == t for o, t in outs) >= 36
    # in transmil any token may carry it; in dsmil the other stream may be enough
    if name not in {"mean", "transmil", "dsmil"}:
        planted = [o.attention[:12].sum().item() for o, t in outs if t]
        assert sum(planted) / len(planted) > 0.3  # 0.2 by chance


def test_impossible_arguments_are_refused() -> None:
    wrong: list[tuple[type, dict[str, object]]] = [
        (ABMIL, {"attention": "gate"}),
        (ACMIL, {"attention": "mha"}),
        (ACMIL, {"branches": 0}),
        (ACMIL, {"masked": -1}),
        (ACMIL, {"mask_drop": 1.5}),
        (ACMIL, {"attention": "multi-head", "heads": 3}),
        (ClamSB, {"inst_loss": "hinge"}),
        (ClamSB, {"instances": 0}),
        (ClamSB, {"bag_weight": 7}),
        (TransMIL, {"heads": 5}),
        (TransMIL, {"landmarks": 0}),
    ]
    for head, arguments in wrong:
        name = next(reversed(arguments))
        with pytest.raises(UsageError, match=name):
            head(DIM, 2, **arguments)


# --- ABMIL -------------------------------------------------------------------------------


def test_the_width_follows_the_features() -> None:
    widths = [hidden_width(d, None) for d in (384, 512, 768, 1024, 1536)]
    assert widths == [128, 256, 384, 512, 768]
    assert hidden_width(1, None) == 1
    assert hidden_width(384, 64) == 64


def test_abmil_by_hand() -> None:
    # tiles 1 and 3 pass a unit projection; tanh(1) = 0.76159, tanh(3) = 0.99505
    head = ABMIL(1, 2, hidden=1, attention="plain")
    set_to(
        head,
        project__0__weight=[[1]],
        attention__value__weight=[[1]] * 128,
        attention__value__bias=[0] * 128,
        attention__score__weight=[[10 / 128] * 128],
        classifier__weight=[[0], [1]],
        classifier__bias=[0.5, 0],
    )
    out = head(torch.tensor([[1.0], [3.0]]))
    # softmax(7.6159, 9.9505) = (0.0883, 0.9117), and 0.0883 + 3 * 0.9117 = 2.8234
    assert out.attention.tolist() == pytest.approx([0.0883, 0.9117], abs=1e-4)
    assert out.logits.tolist() == pytest.approx([0.5, 2.8234], abs=1e-4)
    loss = head.loss(torch.tensor([[1.0], [3.0]]), label(1))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.5 - 2.8234)), abs=1e-4)


# --- ACMIL -------------------------------------------------------------------------------


def test_abmil_is_acmil_with_one_branch_and_no_mask() -> None:
    abmil, one = ABMIL(DIM, 3), ACMIL(DIM, 3, branches=1, masked=0, mask_drop=0)
    one.load_state_dict(abmil.state_dict())
    for n in (1, 4, 200):
        features = torch.randn(n, DIM)
        assert torch.equal(abmil(features).logits, one(features).logits)
        assert torch.equal(abmil(features).attention, one(features).attention)
        losses = [head.loss(features, label(2)) for head in (abmil, one)]
        assert losses[0].item() == losses[1].item()
        for head, loss in zip((abmil, one), losses, strict=True):
            head.zero_grad()
            loss.backward()
        for (name, p), q in zip(abmil.named_parameters(), one.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]


def test_masked_attention_by_hand() -> None:
    scores = torch.log(torch.tensor([[8.0, 1.0, 4.0, 3.0], [1.0, 2.0, 2.5, 7.5]]))
    # branch 1 loses its highest tile (0) and third (3); branch 2 its highest (3) and second (2)
    masked = acmil.mask_ranks(scores, torch.tensor([[0, 2], [1, 0]]))
    weights = masked.softmax(1)
    expected = torch.tensor([[0, 0.2, 0.8, 0], [1 / 3, 2 / 3, 0, 0]])
    assert torch.allclose(weights, expected)
    # (0.2 * 2/3) / (sqrt(0.04 + 0.64) * sqrt(1/9 + 4/9)) = 0.13333 / (0.82462 * 0.74536)
    assert acmil.mean_similarity(weights).item() == pytest.approx(0.21693, abs=1e-5)


def test_acmil_loss_is_the_sum_of_its_three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    head = ACMIL(DIM, 3, branches=3, masked=2, mask_drop=0.5)
    features = torch.randn(6, DIM)
    ranks = torch.tensor([[0], [1], [0]])
    monkeypatch.setattr(acmil, "draw_ranks", lambda *how: ranks)
    x = head.project(features)
    scores = head.attention(x)
    for m in range(3):
        scores[m, scores[m].argsort(descending=True)[ranks[m, 0]]] = -1e9
    a = scores.softmax(1)
    branch = sum(
        F.cross_entropy(classify(a[m] @ x), label(1)) / 3
        for m, classify in enumerate(head.branch_classifiers)
    )
    bag = F.cross_entropy(head.classifier(a.mean(0) @ x), label(1))
    pairs = [(a[i] @ a[j]) / a[i].norm() / a[j].norm() for i, j in ((0, 1), (0, 2), (1, 2))]
    expected = branch + bag + sum(pairs) / 3
    assert head.loss(features, label(1)).item() == pytest.approx(expected.item(), abs=1e-5)
    plain = head.attention(x).softmax(1)
    out = head(features)  # predictions mask nothing, in whatever mode
    assert torch.allclose(out.attention, plain.mean(0), atol=1e-6)
    assert torch.allclose(out.logits, head.classifier(plain.mean(0) @ x), atol=1e-5)


def test_masks_are_drawn_uniformly_among_the_top_tiles() -> None:
    ranks = acmil.draw_ranks(5000, 100, 10, 0.6)
    assert ranks.shape == (5000, 6)
    assert (ranks.sort(1).values.diff(dim=1) > 0).all()
    share = ranks.flatten().bincount(minlength=10) / 5000
    assert (share - 0.6).abs().max() < 0.035  # five standard deviations
    torch.manual_seed(3)
    one = acmil.draw_ranks(2, 50, 10, 0.6)
    torch.manual_seed(3)
    assert torch.equal(one, acmil.draw_ranks(2, 50, 10, 0.6))


@pytest.mark.parametrize(
    ("tiles", "top", "share", "count"),
    [(4, 10, 0.6, 2), (1, 10, 0.6, 0), (1, 10, 1, 0), (3, 10, 1, 2), (20, 10, 1, 10), (9, 0, 1, 0)],
)
def test_at_least_one_tile_stays(tiles: int, top: int, share: float, count: int) -> None:
    ranks = acmil.draw_ranks(3, tiles, top, share)
    assert ranks.shape == (3, count)
    masked = acmil.mask_ranks(torch.randn(3, tiles), ranks)
    assert (masked.isinf().sum(1) == count).all()
    assert count < tiles


def test_masks_are_for_training_only() -> None:
    head = ACMIL(DIM, 2)
    features = torch.randn(12, DIM)
    assert len({head.loss(features, label(0)).item() for _ in range(5)}) > 1
    head.eval()
    assert len({head.loss(features, label(0)).item() for _ in range(5)}) == 1


# --- DSMIL and pooling -------------------------------------------------------------------


def test_dsmil_by_hand() -> None:
    head = DSMIL(2, 2, width=1)
    set_to(
        head,
        instance__weight=[[1, 0], [0, 1]],
        instance__bias=[0, 0],
        query__weight=[[1, 0]],
        query__bias=[0],
        value__weight=[[1, 0], [0, 2]],
        value__bias=[0, 1],
        classifier__weight=[[1, 0, 0, 0], [0, 0, 0, 1]],
        classifier__bias=[0, 0],
    )
    ln2, ln3 = math.log(2), math.log(3)
    # the critical tile of class 0 is the second, of class 1 the first
    features = torch.tensor([[ln2, 1.0], [ln3, 0.0]])
    c0 = torch.tensor([ln3 * ln2, ln3 * ln3]).softmax(0)
    c1 = torch.tensor([ln2 * ln2, ln2 * ln3]).softmax(0)
    stream = torch.stack([c0 @ features[:, 0], 2 * c1 @ features[:, 1] + 1])
    highest = torch.tensor([ln3, 1.0])
    logits = (stream + highest) / 2
    out = head(features)
    assert torch.allclose(out.logits, logits, atol=1e-6)
    p = logits.softmax(0)
    assert torch.allclose(out.attention, p[0] * c0 + p[1] * c1, atol=1e-6)
    loss = (F.cross_entropy(highest, label(0)) + F.cross_entropy(stream, label(0))) / 2
    assert head.loss(features, label(0)).item() == pytest.approx(loss.item(), abs=1e-6)


def test_mean_pooling_classifies_the_mean() -> None:
    head, features = MeanPooling(DIM, 3), torch.randn(8, DIM)
    out = head(features)
    assert torch.allclose(out.logits, head.classifier(features).mean(0), atol=1e-6)
    assert out.attention.tolist() == [1 / 8] * 8


def test_of_two_classes_the_most_positive_tile_decides() -> None:
    head = MaxPooling(2, 2)
    set_to(head, classifier__weight=[[1, 0], [0, 1]], classifier__bias=[0, 0])
    # class by class the maxima would be (9, 3): negative, though the second tile is positive
    out = head(torch.tensor([[9.0, 3.0], [1.0, 2.0], [5.0, 0.0]]))
    assert out.logits.tolist() == [1, 2]
    assert out.attention.tolist() == [0, 1, 0]


def test_of_more_classes_each_takes_its_own_highest_tile() -> None:
    head = MaxPooling(3, 3)
    set_to(head, classifier__weight=torch.eye(3).tolist(), classifier__bias=[0, 0, 0])
    out = head(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 7.0], [3.0, 0.0, 0.0]]))
    assert out.logits.tolist() == [3, 2, 7]
    assert out.attention.tolist() == [0, 1, 0]


# --- large bags --------------------------------------------------------------------------

CHILD = """
import resource, sys, torch
from pathcli import registry
features = torch.randn(100_000, 512)
for name in sys.argv[1:]:
    head = registry.resolve("head", name)(512, 2)
    loss = head.loss(features, torch.tensor(1))
    loss.backward()
    grads = [p.grad for p in head.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in [loss, *grads])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_bag_of_100_000_tiles_trains_within_8_gib() -> None:
    command = [sys.executable, "-c", CHILD, "abmil", "acmil", "clam-sb"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak_kib = int(done.stdout)
    assert 200 * 2**10 < peak_kib < 8 * 2**20  # the features alone are 195 MiB
