"""Scored images in, pictures of a report out: confusion matrix, maps of features, worst errors."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.charts import COLOURS, drawing
from pathcli.errors import PathcliError
from pathcli.report import Picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from pathcli.evals.patch_scores import Scored

    Floats = NDArray[np.floating[Any]]

log = logging.getLogger("pathcli")

WORST = 12
POINTS = 5000
SIDE_PX = 224
_MARKERS = "osD^vP"
_INK, _DOTS = 9000, (9, 40)  # of all dots together, and of one, in square points
_NEIGHBOURS = 15
_DARK, _SHORT = 0.55, 9


def confusion_chart(scored: Scored) -> str:
    """Return an SVG of the confusion matrix: share of each true class, and the count."""
    table, names = scored.confusion, scored.classes
    share = table / np.maximum(table.sum(1, keepdims=True), 1)

    def draw(axes: Axes) -> None:
        axes.pcolormesh(share, cmap="Blues", vmin=0, vmax=1, edgecolor="white", linewidth=1.5)
        for (i, j), count in np.ndenumerate(table):
            colour = "white" if share[i, j] > _DARK else "#1c2024"
            text = f"{share[i, j]:.2f}\n{count:,}"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour, fontsize=9)
        places = np.arange(len(names)) + 0.5
        lean: Any = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(places, names, **(lean if max(map(len, names)) > _SHORT else {}))
        axes.set_yticks(places, names)
        axes.tick_params(length=0)
        axes.set(xlabel="predicted", ylabel="true", aspect="equal", ylim=(len(names), 0))
        axes.spines[:].set_visible(False)

    side = 2.2 + 0.75 * len(names)
    return drawing((side + 0.6, side), draw)


def feature_maps(scored: Scored) -> tuple[list[str], str]:
    """Return SVG maps of the features in two dimensions, and the sentence that explains them.

    Principal components always; UMAP (McInnes et al. 2018, arXiv:1802.03426; cosine distance)
    where umap-learn is installed. Of more than 5,000 images a random 5,000 are drawn. Nothing
    without features.
    """
    if scored.features is None:
        return [], ""
    n = len(scored.features)
    chosen = np.sort(np.random.default_rng(0).permutation(n)[:POINTS])
    features = np.asarray(scored.features[chosen], np.float32)
    places, shares = _principal(features)
    axes = [f"component {i + 1} ({share:.0%} of variance)" for i, share in enumerate(shares)]
    maps = [_map(scored, chosen, places, "PCA", axes)]
    told = "Every point is an image, its colour the true class; a black ring marks an error."
    if len(chosen) < n:
        told += f" A random {len(chosen):,} of {n:,} images are drawn."
    if find_spec("umap") is None:
        return maps, f"{told} With pathcli[umap] installed there is a UMAP beside the PCA."
    if len(chosen) > _NEIGHBOURS:
        maps.append(_map(scored, chosen, _umap(features), "UMAP", ["", ""]))
        told += " Distances between far groups of a UMAP mean nothing."
    return maps, told


def _principal(features: Floats) -> tuple[Floats, Floats]:
    """Return the first two components [n, 2] and their shares of variance [2]."""
    from sklearn.decomposition import PCA  # noqa: PLC0415 - costs a second

    count = min(2, *features.shape)
    pca = PCA(count, svd_solver="full" if features.shape[1] < len(features) else "auto")
    with np.errstate(invalid="ignore", divide="ignore"):  # images that are all alike
        places = pca.fit_transform(features)
    places = np.pad(places, [(0, 0), (0, 2 - count)])
    return places, np.nan_to_num(np.pad(pca.explained_variance_ratio_, (0, 2 - count)))


def _umap(features: Floats) -> Floats:
    from umap import UMAP  # noqa: PLC0415 - an extra, and slow to import

    made = UMAP(n_neighbors=_NEIGHBOURS, metric="cosine", random_state=0, n_jobs=1)
    return np.asarray(made.fit_transform(features))


def _map(
    scored: Scored, chosen: NDArray[np.intp], places: Floats, title: str, names: Sequence[str]
) -> str:
    labels = scored.labels[chosen]
    wrong = scored.predicted[chosen] != labels
    size = float(np.clip(_INK / len(chosen), *_DOTS))

    def draw(axes: Axes) -> None:
        for k, name in enumerate(scored.classes):
            colour, marker = COLOURS[k % len(COLOURS)], _MARKERS[k // len(COLOURS) % len(_MARKERS)]
            look: dict[str, Any] = {"c": colour, "marker": marker, "rasterized": True}
            mine, missed = labels == k, (labels == k) & wrong
            (x, y), (x_missed, y_missed) = places[mine & ~wrong].T, places[missed].T
            axes.scatter(x, y, s=size, linewidths=0, alpha=0.55, **look)
            ring: Any = {"s": max(size, 26), "linewidths": 0.9, "edgecolors": "#1c2024"}
            axes.scatter(x_missed, y_missed, **ring, **look)
            axes.scatter([], [], s=30, c=colour, marker=marker, label=name)
        axes.set(title=title, xlabel=names[0], ylabel=names[1], xticks=[], yticks=[])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3)

    return drawing((5.6, 5.2), draw)


def worst_errors(scored: Scored) -> tuple[list[Picture], list[str]]:
    """Return the most confident error of each group as a picture, and why some are not shown."""
    from pathcli.data.images import read_image  # noqa: PLC0415 - slides, archives

    chance = scored.probabilities[np.arange(len(scored.labels)), scored.predicted]
    worst: dict[str, int] = {}
    for i in np.argsort(-chance, kind="stable").tolist():
        if scored.predicted[i] != scored.labels[i]:
            worst.setdefault(scored.units[i], i)
    pictures, unseen = [], []
    for i in list(worst.values())[:WORST]:
        true, said = (scored.classes[int(of[i])] for of in (scored.labels, scored.predicted))
        stay = " (abstained)" if scored.abstained is not None and scored.abstained[i] else ""
        name = scored.samples[i].name
        caption = f"{true}, said {said} with {chance[i]:.2f}{stay}: {name}"
        try:
            pixels = read_image(scored.samples[i].images[0])
        except PathcliError as error:
            log.debug("not shown: %s", error)
            unseen.append(f"{caption}; not shown: {error}")
            continue
        pictures.append(Picture(_small(pixels), caption))
    return pictures, unseen


def _small(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from PIL import Image  # noqa: PLC0415 - only when there are pictures

    image = Image.fromarray(pixels)
    image.thumbnail((SIDE_PX, SIDE_PX))
    return np.asarray(image)
