"""The connector `scale-invariant` against worked numbers and transformers' BERT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed

from pathcli.errors import UsageError
from pathcli.registry import resolve
from pathcli.torchvision_guard import guard_torchvision
from pathcli.vlm.scale_invariant import GRIDS, ScaleInvariant, best_grid, tiles

WIDTH, OUT, PATCHES = 24, 10, 5


def connector(**given: Any) -> ScaleInvariant:
    set_seed(0)
    made = ScaleInvariant(WIDTH, OUT, **{"layers": 2, "heads": 3} | given)
    made.start()
    with torch.no_grad():
        for weight in made.layers.parameters():
            weight.mul_(10)  # BERT's 0.02 is for 768 numbers, and would hardly show in so few
    return made.eval()


def seen(*views: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make tokens of images with so many views each."""
    draws = torch.Generator().manual_seed(1)
    of = torch.repeat_interleave(torch.arange(len(views)), torch.tensor(views))
    return torch.randn(len(of), PATCHES, WIDTH, generator=draws), of


# --- tiles -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [
        # Squares: 2 x 2 keeps 448 x 448 of a large one, 2 x 4 as much, but wastes more. One of
        # 224 fits every grid whole: the least are the three of four tiles, 1 x 4 the first.
        (448, 448, (2, 2)),
        (1000, 1000, (2, 2)),
        (4096, 4096, (2, 2)),
        (300, 300, (2, 2)),  # 90,000: 1 x 4 keeps 224 x 224 = 50,176
        (224, 224, (1, 4)),
        (100, 100, (1, 4)),
        # 1 : 2: 2 x 4 keeps 896 x 448 = 401,408; upright and lying.
        (1000, 500, (2, 4)),
        (500, 1000, (4, 2)),
        # 1 : 1.5: 2 x 3 keeps 672 x 448 = 301,056, and 2 x 4 no more.
        (1500, 1000, (2, 3)),
        (1000, 1500, (3, 2)),
        # 3 : 4: 2 x 3 keeps 448 x 597 = 267,456; 2 x 4 the same.
        (768, 1024, (3, 2)),
        (1024, 768, (2, 3)),
        # 9 : 16, 1920 x 1080: 4 x 2 keeps 796 x 448 = 356,608; 3 x 2 672 x 378 = 254,016.
        (1080, 1920, (4, 2)),
        # Strips. 4 : 1 is 896 x 224 = 200,704 in 4 x 1, 4 x 2 and 8 x 1; 4 x 1 wastes least.
        (400, 1600, (4, 1)),
        (1600, 400, (1, 4)),
        # 5, 6, 7, 8 : 1 fill their grids: 1120 x 224 and so on.
        (300, 1500, (5, 1)),
        (1800, 300, (1, 6)),
        (300, 2100, (7, 1)),
        (2400, 300, (1, 8)),
        # 20 : 1: 8 x 1 keeps 1792 x 89 = 159,488; 7 x 1 1568 x 78 = 122,304.
        (200, 4000, (8, 1)),
    ],
)
def test_the_grid_of_an_image_is_the_one_worked_out(
    height: int, width: int, grid: tuple[int, int]
) -> None:
    assert best_grid(height, width, 224) == grid


def test_the_grid_is_llava_nexts_choice_for_any_size(rng: np.random.Generator) -> None:
    guard_torchvision()
    from transformers.image_processing_utils import select_best_resolution

    shapes = [(224 * rows, 224 * columns) for columns, rows in GRIDS]
    for height, width in np.exp(rng.uniform(3, 9, (500, 2))).astype(int).tolist():
        columns, rows = best_grid(height, width, 224)
        assert (224 * rows, 224 * columns) == select_best_resolution((height, width), shapes)


def test_tiles_are_the_image_on_black_cut_row_by_row() -> None:
    image = np.full((300, 600, 3), 7, np.uint8)  # 4 x 2 grid of 10 px, filled: 40 x 20
    image[:, :300] = 200
    cut = tiles(image, 10)
    assert len(cut) == 8
    assert [int(np.median(tile)) for tile in cut] == [200, 200, 7, 7] * 2
    thin = tiles(np.full((10, 70, 3), 9, np.uint8), 7)  # 7 x 1 grid of 7 px: 49 x 7, filled
    assert len(thin) == 7
    assert all((tile == 9).all() for tile in thin)
    # 3 : 1 is 32 x 10 in the 4 x 2 grid of 8 px, and at most 24 x 8 in the others
    middle = tiles(np.full((80, 240, 3), 255, np.uint8), 8)
    grid = best_grid(80, 240, 8)
    whole = np.concatenate(
        [np.concatenate(middle[r * grid[0] : (r + 1) * grid[0]], 1) for r in range(grid[1])]
    )
    black = (whole == 0).all(2)
    assert grid == (4, 2)  # rounded up 32 x 11, of 32 x 16: 2 rows black above, 3 below
    assert black[:2].all()
    assert black[13:].all()
    assert not black[2:13].any()


def test_views_are_the_squashed_image_then_its_tiles(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (50, 90, 3), dtype=np.uint8)
    views = connector().views(image, 16)
    assert {view.shape for view in views} == {(16, 16, 3)}
    assert len(views) == 1 + int(np.prod(best_grid(50, 90, 16)))
    assert abs(views[0].mean() - image.mean()) < 2
    assert all((a == b).all() for a, b in zip(views[1:], tiles(image, 16), strict=True))


# --- the layers --------------------------------------------------------------------------


def test_an_image_in_a_batch_gives_what_it_gives_alone() -> None:
    model, counts = connector(), (5, 9, 6, 9, 8)
    tokens, of = seen(*counts)
    together = model(tokens, of)
    assert together.shape == (len(counts), model.count(PATCHES), OUT)
    for image in range(len(counts)):
        own = tokens[of == image]
        alone = model(own, torch.zeros(len(own), dtype=torch.int64))
        assert (together[image] - alone[0]).abs().max() < 1e-6


def test_every_tile_counts_and_their_order_does_not() -> None:
    model = connector().double()
    tokens, of = seen(9)
    tokens = tokens.double()
    before = model(tokens, of)
    shuffled = tokens[[0, 8, 3, 1, 2, 7, 6, 5, 4]]
    assert (model(shuffled, of) - before).abs().max() < 1e-12
    for view in range(9):
        changed = tokens.clone()
        changed[view] += torch.randn(PATCHES, WIDTH, generator=torch.Generator().manual_seed(view))
        assert (model(changed, of) - before).abs().max() > 1e-3


def test_the_layers_are_berts_with_cross_attention() -> None:
    guard_torchvision()
    from transformers import BertConfig, BertModel

    model = connector()
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 3, "intermediate_size": 4 * WIDTH}
    decoder = {"is_decoder": True, "add_cross_attention": True, "num_hidden_layers": 2}
    bert = BertModel(BertConfig(**sizes, **decoder, vocab_size=8), add_pooling_layer=False).eval()
    for layer in bert.encoder.layer:
        layer.attention.self.is_causal = False  # every query sees every other
    theirs: dict[str, torch.Tensor] = {}
    for name, weight in model.layers.state_dict().items():
        layer, _, rest = name.partition(".")
        for ours, other in _BERT:
            rest = rest.replace(ours, other)
        if "in_proj_" in rest:
            for part, third in zip(("query", "key", "value"), weight.chunk(3), strict=True):
                theirs[f"{layer}.{rest.replace('in_proj_', f'self.{part}.')}"] = third
        else:
            theirs[f"{layer}.{rest}"] = weight
    bert.encoder.layer.load_state_dict(theirs)
    tokens, of = seen(5, 5)
    whole, local = tokens[[0, 5]], tokens.view(2, 5, PATCHES, WIDTH)[:, 1:].flatten(1, 2)
    with torch.no_grad():
        x = torch.nn.functional.layer_norm(whole, (WIDTH,), eps=1e-12)
        for layer in bert.encoder.layer:
            given = layer(x, encoder_hidden_states=local)
            x = given[0] if isinstance(given, tuple) else given
        expected = model.projection(model.norm(x + whole))
        assert (model(tokens, of) - expected).abs().max() < 1e-5


_BERT = (
    ("self_attn.out_proj", "attention.output.dense"),
    ("multihead_attn.out_proj", "crossattention.output.dense"),
    ("self_attn.", "attention."),
    ("multihead_attn.", "crossattention."),
    ("norm1", "attention.output.LayerNorm"),
    ("norm2", "crossattention.output.LayerNorm"),
    ("norm3", "output.LayerNorm"),
    ("linear1", "intermediate.dense"),
    ("linear2", "output.dense"),
)


def test_pa_llavas_sizes_are_the_default() -> None:
    with torch.device("meta"):
        model = resolve("connector", "scale-invariant")(768, 4096)
    # a layer: 8 square attention matrices, 768 x 3072 twice, and their biases and norms
    square, wide = 768 * 768 + 768, 2 * 768 * 3072 + 3072 + 768
    layer = 8 * square + wide + 3 * 2 * 768
    count = sum(weight.numel() for weight in model.parameters())
    assert count == 6 * layer + 2 * 768 + 768 * 4096 + 4096
    assert 55e6 < count < 65e6
    assert model.count(196) == 196


def test_the_draw_is_berts_and_the_seeds() -> None:
    made = ScaleInvariant(WIDTH, OUT, layers=2, heads=1)
    drawn = []
    for seed in (1, 1, 2):
        set_seed(seed)
        made.start()
        drawn.append({name: weight.clone() for name, weight in made.state_dict().items()})
    one, two, other = drawn
    assert all((one[name] == two[name]).all() for name in one)
    first, second = (f"layers.{n}.self_attn.in_proj_weight" for n in range(2))
    assert (one[first] != other[first]).any()
    assert (one[first] != one[second]).any()
    assert one["projection.weight"].ne(other["projection.weight"]).any()
    assert float(one[first].std()) == pytest.approx(0.02, rel=0.1)
    assert not one["layers.1.linear1.bias"].any()


def test_it_learns_with_dropout_and_padding() -> None:
    model = connector().train()
    tokens, of = seen(5, 7)
    model(tokens, of).square().sum().backward()
    assert all(w.grad is not None and bool(w.grad.isfinite().all()) for w in model.parameters())
    assert (model(tokens, of) != model(tokens, of)).any()


def test_what_it_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="heads that divide the encoder's width 24"):
        ScaleInvariant(WIDTH, OUT, heads=7)
    with pytest.raises(UsageError, match="an image here has one view"):
        connector()(*seen(5, 1))


def test_images_that_are_augmented_are_not_cut_into_tiles() -> None:
    from pathcli.data.pairs import Pictures
    from pathcli.encoders.augment import Augment
    from pathcli.vlm.towers import Views

    Views(Pictures(()), connector(), Augment(), 32)
    with pytest.raises(UsageError, match="this connector cuts; leave it out"):
        Views(Pictures(()), connector(), Augment(grey=0.5), 32)
