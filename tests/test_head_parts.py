import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from pathcli.mil import acmil, clam, transmil
from pathcli.mil.abmil import AttentionScores
from pathcli.mil.clam import ClamSB
from pathcli.mil.transmil import TransMIL

DIM = 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- attention ---------------------------------------------------------------------------


def test_gates_multiply_the_units() -> None:
    x, net = torch.rand(7, 8), AttentionScores(8)
    assert net.gate is not None
    expected = torch.stack(
        [
            net.score.weight[0]
            @ (
                (net.value.weight @ tile + net.value.bias).tanh()
                * (net.gate.weight @ tile + net.gate.bias).sigmoid()
            )
            for tile in x
        ]
    )
    assert torch.allclose(net(x)[0], expected, atol=1e-6)


def test_multi_head_attention_is_that_of_torch() -> None:
    scores, pool = acmil.QueryScores(24, 3, 4), acmil.HeadPool(24, 4, 0.0)
    x = torch.randn(11, 24)
    weights = scores(x).softmax(-1)
    key = scores.key(x).view(11, 3, 4, 6).permute(1, 2, 0, 3)  # [branch, head, n, 6]
    value = pool.value(x).view(11, 4, 6).transpose(0, 1)
    for m in range(3):
        query = scores.query[m].unsqueeze(1)  # [head, 1, 6]
        expected = F.scaled_dot_product_attention(query, key[m], value).flatten()
        assert torch.allclose(pool(weights[:, m], x), pool.out(expected), atol=1e-5)


# --- CLAM --------------------------------------------------------------------------------


def test_the_svm_is_the_smoothed_margin_loss() -> None:
    logits, targets = torch.randn(9, 2) * 3, torch.randint(2, (9,))
    other = F.one_hot(1 - targets, 2)
    true = logits.gather(1, targets[:, None])
    expected = torch.logsumexp(logits + other - true, dim=1).mean()
    assert clam.instance_loss(logits, targets, 1).item() == pytest.approx(expected.item(), rel=1e-5)
    exact = F.cross_entropy(logits, targets).item()
    assert clam.instance_loss(logits, targets, 0).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("n", "count"), [(1, 1), (2, 1), (3, 1), (6, 2), (40, 2)])
def test_clam_clusters_both_ends_of_the_attention(n: int, count: int) -> None:
    head = ClamSB(DIM, 3, hidden=8, attention_width=4, instances=2, inst_loss="ce", bag_weight=0.7)
    head.eval()
    features = torch.randn(n, DIM)
    x = head.project(features)
    out = head(features)
    order = out.attention.argsort()
    high, low = order.flip(0)[:count], order[:count]
    classify = head.instance_classifiers[2]
    ones, zeros = torch.ones(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    instance = (
        F.cross_entropy(classify(x[high]), ones) + F.cross_entropy(classify(x[low]), zeros)
    ) / 2
    expected = 0.7 * F.cross_entropy(out.logits, torch.tensor(2)) + 0.3 * instance
    assert head.loss(features, torch.tensor(2)).item() == pytest.approx(expected.item(), abs=1e-5)


# --- TransMIL ----------------------------------------------------------------------------


def test_as_many_landmarks_as_tokens_make_nystrom_exact() -> None:
    q, k, v = torch.randn(3, 2, 12, 4)
    exact = F.scaled_dot_product_attention(q, k, v)
    close = transmil.nystrom(q, k, v, landmarks=64, steps=30)
    assert torch.allclose(close, exact, atol=1e-2)
    full = (q @ k.mT / 2).softmax(-1)
    assert not torch.allclose(transmil.nystrom(q, k, v, landmarks=3), exact, atol=1e-2)
    row = transmil.nystrom_row(q, k, landmarks=64)
    assert (row - full[:, 0].mean(0)).abs().max() < 0.1  # six steps


@pytest.mark.parametrize("landmarks", [1, 3, 8, 12])
def test_the_row_is_the_one_the_values_are_mixed_by(landmarks: int) -> None:
    q, k, _ = torch.randn(3, 2, 12, 4)
    unit = torch.eye(12).expand(2, 12, 12)
    mixed = transmil.nystrom(q, k, unit, landmarks)  # the attention itself
    row = transmil.nystrom_row(q, k, landmarks)
    assert torch.allclose(row, mixed[:, 0].mean(0), atol=1e-5)
    assert torch.allclose(mixed.sum(-1), mixed.sum(-1).mean().expand(2, 12), atol=0.2)


def test_the_last_layer_may_give_the_first_token_alone() -> None:
    layer = transmil.NystromLayer(32, 4, 8, 0.0)
    for n in (2, 15, 40):
        x = torch.randn(n, 32)
        assert torch.allclose(layer(x, rows=1), layer(x)[:1], atol=1e-5)


def test_values_are_convolved_head_by_head_over_33_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = transmil.NystromLayer(4, 2, 8, 0.0)
    monkeypatch.setattr(transmil, "nystrom", lambda q, *how: torch.zeros_like(q))
    layer.out = torch.nn.Sequential()
    layer.values.weight.data = torch.zeros(2, 1, 33, 1)
    layer.values.weight.data[0, 0, 0] = 2  # head 0 sees 16 tokens back, head 1 16 ahead
    layer.values.weight.data[1, 0, 32] = 3
    x = torch.randn(40, 4)
    v = layer.qkv(layer.norm(x))[:, 8:]
    mixed = layer(x) - x
    assert torch.allclose(mixed[16:, :2], 2 * v[:-16, :2], atol=1e-5)
    assert torch.allclose(mixed[:-16, 2:], 3 * v[16:, 2:], atol=1e-5)
    assert torch.allclose(mixed[:16, :2], torch.zeros(16, 2), atol=1e-5)


def test_the_iterated_inverse_is_that_of_linalg() -> None:
    matrix = torch.randn(3, 6, 6).softmax(-1)
    found = transmil.pseudo_inverse(matrix, steps=25).double()
    expected = torch.linalg.pinv(matrix.double())
    assert ((found - expected).norm() / expected.norm()).item() < 1e-3


def test_landmarks_are_means_of_consecutive_tokens() -> None:
    x = torch.arange(7.0).view(1, 7, 1)
    assert transmil.segment_means(x, 3).flatten().tolist() == [1, 3.5, 5.5]
    assert transmil.segment_means(x, 7).flatten().tolist() == list(range(7))
    assert transmil.segment_means(x, 1).flatten().tolist() == [3]


def test_positions_are_convolved_on_the_square() -> None:
    layer = transmil.PositionEncoding(2)
    for convolve, value in zip(layer.convolutions, (4.0, 2.0, 1.0), strict=True):
        torch.nn.init.zeros_(convolve.weight)
        torch.nn.init.zeros_(convolve.bias)
        convolve.weight.data[:, :, -1, -1] = value  # the lower right corner of the kernel
    x = torch.zeros(26, 2)
    x[0], x[1 + 24, 0] = 9, 1  # class token, and the last tile of the square of 5
    square = layer(x)[1:].view(5, 5, 2)
    assert layer(x)[0].tolist() == [9, 9]
    found = {tuple(at): square[tuple(at)].item() for at in square.nonzero().tolist()}
    assert found == {(4, 4, 0): 1, (3, 3, 0): 1, (2, 2, 0): 2, (1, 1, 0): 4}


def test_repeated_tiles_give_their_attention_to_the_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = TransMIL(DIM, 2, width=32, heads=4, landmarks=8).eval()
    seen = []

    def row(tokens: torch.Tensor) -> torch.Tensor:  # class token, 7 tiles, copies of two
        seen.append(len(tokens))
        return torch.tensor([5, 1, 2, 1, -3, 0, 1, 1, 3, 1])

    monkeypatch.setattr(head.last, "first_row", lambda t: row(t).float())
    attention = head(torch.randn(7, DIM)).attention
    assert seen == [10]
    assert attention.tolist() == pytest.approx([0.4, 0.3, 0.1, 0, 0, 0.1, 0.1])
