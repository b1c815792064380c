"""Features of labelled images in, linear probes and few-shot curves out, measured on a test part.

Test groups are never learnt from, and nothing is chosen on them. Few-shot draws see no
validation images either: what they choose, they choose within the images drawn.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.data.labelled import Labelled, open_dataset, read_labelled
from pathcli.data.layouts import ALL
from pathcli.encoders.embedding import Embedder
from pathcli.encoders.imageset import embed_images
from pathcli.errors import DataError, UsageError
from pathcli.evals.linear import METHODS, Learnt, Linear, fit, standardised
from pathcli.evals.patch_scores import REPLICATES, Scored, measure_draws, metrics_of, seen_before
from pathcli.evals.probe_report import level_rows, made_how
from pathcli.evals.probe_sides import Images, Sides, sides_of
from pathcli.metrics.statistics import mean_sd
from pathcli.types import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pathcli.data.classes import ClassSet
    from pathcli.encoders.imageset import ImageFeatures
    from pathcli.metrics.statistics import Interval
    from pathcli.store import Store
    from pathcli.types import Encoder, Progress

    Floats = NDArray[np.floating[Any]]
    Rows = NDArray[np.intp]

DRAWS = 5


@dataclass(frozen=True)
class Level:
    """Probes from `shots` images a class (None: all), one a draw.

    `images` is how many were learnt from; `chances` are probabilities [n, c] of the test images;
    `numbers` are means over draws with intervals over test groups, and `spread` the standard
    deviations over draws, nan for a single one.
    """

    shots: int | None
    images: int
    fitted: tuple[Linear, ...]
    chances: tuple[Floats, ...]
    numbers: Mapping[str, Interval]
    spread: Mapping[str, float]


def probe_levels(
    images: Images,
    sides: Sides,
    *,
    method: str = "adamw",
    shots: Sequence[int | None] = (None,),
    draws: int = DRAWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Level]:
    """Return the probes from each number of images a class, in rising order, all images last.

    Features are standardised with mean and deviation of the train part (no labels). A draw
    takes as many images of every class, all it has where those are fewer; draws of more images
    hold those of fewer. All images are drawn once, and only there validation images choose.

    Raises:
        UsageError: an unknown method, or fewer than one shot or draw.
    """
    check_probe(method, shots, draws)
    parts = (sides.train, sides.val, sides.test)
    features = standardised(*(images.features[rows] for rows in parts))
    train, val = (
        Learnt(x, images.labels[rows], images.units(rows))
        for x, rows in zip(features[:2], parts[:2], strict=True)
    )
    classes = len(images.classes)
    orders = [_order(train, classes, np.random.default_rng([seed, i])) for i in range(draws)]
    levels = sorted(set(shots), key=lambda k: float("inf") if k is None else k)
    tell = progress or silent
    found = []
    for done, k in enumerate(levels):
        tell(done, len(levels))
        if k is None:
            fitted = [fit(method, train, classes, val=val if len(val.labels) else None, seed=seed)]
            learnt = len(train.labels)
        else:
            drawn = [np.concatenate([of_class[:k] for of_class in order]) for order in orders]
            fitted = [fit(method, train.at(rows), classes, seed=seed) for rows in drawn]
            learnt = len(drawn[0])
        found.append(_level(images, sides.test, features[2], (k, learnt), fitted))
    tell(len(levels), len(levels))
    return found


def check_probe(method: str, shots: Sequence[int | None], draws: int) -> None:
    """Refuse what no probe can be, before anything is computed.

    Raises:
        UsageError: an unknown method, or fewer than one shot or draw.
    """
    if method not in METHODS:
        msg = f"--method is {', '.join(METHODS)}, not {method!r}"
        raise UsageError(msg)
    if not shots or any(k is not None and k < 1 for k in shots) or draws < 1:
        msg = "--shots are images a class, 1 or more, or all; --draws are 1 or more"
        raise UsageError(msg)


def _order(train: Learnt, classes: int, rng: np.random.Generator) -> list[Rows]:
    """Return the rows of each class in a random order."""
    return [rng.permutation(np.flatnonzero(train.labels == k)) for k in range(classes)]


def _level(
    images: Images, test: Rows, features: Floats, size: tuple[int | None, int], fitted: list[Linear]
) -> Level:
    """Measure the classifiers of one level on the test rows, `features` being theirs."""
    labels, every = images.labels[test], np.arange(len(test))
    chances = tuple(one(features) for one in fitted)
    spread = {
        name: mean_sd([of_rows(every) for of_rows in each])[1]
        for name, each in metrics_of(labels, chances).items()
    }
    numbers = measure_draws(labels, chances, images.units(test), REPLICATES)
    return Level(*size, tuple(fitted), chances, numbers, spread)


# --- from a data set to its report --------------------------------------------------------


@dataclass(frozen=True)
class Probed:
    """A data set probed: `scored` is the first draw of the last of `levels`."""

    scored: Scored
    levels: tuple[Level, ...]


def probe(
    dataset: str,
    encoder: Encoder,
    *,
    data: Path | str | None = None,
    labels: Path | str | None = None,
    test: Path | str | None = None,
    method: str = "adamw",
    shots: Sequence[int | None] = (None,),
    draws: int = DRAWS,
    seed: int = 0,
    store: Store | None = None,
    device: str = "auto",
    batch: int = 32,
    workers: int = 2,
    progress: Callable[[str], Progress] = lambda _: silent,
) -> Probed:
    """Learn the classes of a data set from an encoder's features, and test on other groups.

    Args:
        dataset: a name we know or a YAML file, with `data`; or a folder or table of one's own.
        encoder: whose features are probed.
        data: the folder of the images.
        labels: a table image,label[,group][,split] used instead of what is in `data`.
        test: the folder of images to test on, where they are a set of their own.
        method: adamw, logistic or ridge.
        shots: images a class to learn from, None for all.
        draws: random draws of each number of shots.
        seed: of draws, batches and, without an official split, of the sides.
        store: where features are kept (default: the user's store).
        device: auto, cpu, cuda, cuda:1 or mps.
        batch: images per forward pass.
        workers: threads that read images.
        progress: called with the name of a step, returns what is called with (done, total).

    Raises:
        UsageError: no such data set or method, or features that are not one vector an image.
        DataError: a table is wrong, no image can be read, or a group is on two sides.
        ResourceError: no data, no weights, or no space.
    """
    check_probe(method, shots, draws)
    classes, found = open_dataset(dataset, data, labels=labels, split=ALL)
    if test is not None:
        found = _with_test(found, read_labelled(classes, test, split=ALL))
    embedder = Embedder(encoder, store, device=device, batch=batch, workers=workers)
    known = encoder.id  # weights that are missing are missed before the images are read
    refs = [sample.images[0] for sample in found.samples]
    embedded = embed_images(refs, embedder, progress(f"images of {classes.name}"))
    images = _images(found, embedded, classes.keys)
    sides = sides_of(images, seed)
    if test is not None:
        sides = replace(sides, how=f"all of {test} to test on, the rest to learn from")
    sides = replace(sides, warnings=(*sides.warnings, *_few(images, sides, shots)))
    how: dict[str, Any] = {"method": method, "shots": shots, "draws": draws, "seed": seed}
    levels = probe_levels(images, sides, **how, progress=progress(f"{method} probes"))
    sets = [key.item for key in embedded.keys]
    how |= {"shots": [k or ALL for k in shots], "encoder": known, "image_sets": sets}
    how |= {"seen": seen_before(encoder, classes.name)}
    return _probed(classes, found, images, sides, levels, asked=how)


def _probed(
    classes: ClassSet,
    found: Labelled,
    images: Images,
    sides: Sides,
    levels: list[Level],
    *,
    asked: Mapping[str, Any],
) -> Probed:
    """Return what was found as it is reported; `asked` says of which encoder and how."""
    lost = len(found.samples) - len(images.samples)
    scored = Scored(
        title=f"{classes.title}, linear probe: {asked['encoder'].rpartition('-')[0]}",
        classes=classes.keys,
        samples=[images.samples[i] for i in sides.test.tolist()],
        labels=images.labels[sides.test],
        probabilities=levels[-1].chances[0],
        features=images.features[sides.test].astype(np.float32),
        dropped={**found.dropped, **({"not a readable image": lost} if lost else {})},
        warnings=(*found.warnings, *sides.warnings),
        published=tuple({"how": "by text", **row} for row in classes.published_rows()),
        lead=f"{_lead(images, sides, levels[-1], asked['method'])} {asked['seen']}",
        provenance={
            "dataset": classes.name,
            "labels": found.source,
            "labels_digest": found.digest,
            "split": sides.how,
            **asked,
            "levels": level_rows(levels),
        },
    )
    return Probed(scored, tuple(levels))


def parse_shots(text: str) -> tuple[int | None, ...]:
    """Return the numbers of a list like "1,2,4,all"; None stands for all.

    Raises:
        UsageError: anything else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word == ALL or word.isdecimal() for word in words):
        msg = f"--shots are images a class, as 1,2,4,8 or all, not {text!r}"
        raise UsageError(msg)
    return tuple(None if word == ALL else int(word) for word in words)


def _with_test(found: Labelled, test: Labelled) -> Labelled:
    """Return both sets as one, whose test part is all of `test` and nothing else."""
    known = "train" in found.splits
    splits = (("" if s == "test" else s) if known else "train" for s in found.splits)
    dropped = Counter(found.dropped) + Counter(test.dropped)
    return Labelled(
        (*found.samples, *test.samples),
        (*splits, *("test" for _ in test.samples)),
        dict(dropped),
        tuple(dict.fromkeys((*found.warnings, *test.warnings))),
        f"{found.source}; test: {test.source}",
    )


def _images(found: Labelled, embedded: ImageFeatures, classes: tuple[str, ...]) -> Images:
    if embedded.values.ndim != 2:  # noqa: PLR2004 - [n, d]
        msg = "this encoder gives several vectors an image; a probe needs one"
        raise UsageError(msg)
    kept = np.flatnonzero(embedded.readable).tolist()
    if not kept:
        msg = f"{found.source}: none of {len(embedded.readable)} images can be read"
        raise DataError(msg)
    samples = [found.samples[i] for i in kept]
    labels = np.array([classes.index(sample.label) for sample in samples], np.int64)
    splits = [found.splits[i] for i in kept]
    return Images(samples, embedded.values[kept], labels, classes, splits)


def _few(images: Images, sides: Sides, shots: Sequence[int | None]) -> list[str]:
    """Return a warning for each class that has fewer images than the most asked for."""
    most = max((k for k in shots if k is not None), default=0)
    counts = np.bincount(images.labels[sides.train], minlength=len(images.classes)).tolist()
    return [
        f"class {name} has {n} images to learn from: draws of more take them all"
        for name, n in zip(images.classes, counts, strict=True)
        if n < most
    ]


def _lead(images: Images, sides: Sides, level: Level, method: str) -> str:
    learnt, tested = (len(set(images.units(rows))) for rows in (sides.train, sides.test))
    grouped = all(images.samples[i].group for i in (*sides.train, *sides.test))
    groups = f" Their groups ({learnt:,} and {tested:,}) do not overlap." if grouped else ""
    all_, few = (" all", "") if level.shots is None else ("", f" ({level.shots} a class)")
    return (
        f"A linear classifier ({made_how(method, level)}) learnt from{all_} {level.images:,} "
        f"images{few} of the train part, tested on {len(sides.test):,} others.{groups} "
        f"The split is {sides.how}."
    )
