"""A labelled data set and an image-text encoder in, its classes told by text alone out."""

from __future__ import annotations

from dataclasses import replace
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np

from pathcli.data.labelled import open_dataset
from pathcli.encoders.build import text_encoder
from pathcli.encoders.imageset import embed_images
from pathcli.encoders.zeroshot import (
    class_probabilities,
    class_weights,
    too_long,
    unfamiliar,
)
from pathcli.errors import DataError
from pathcli.evals.patch_scores import Scored, seen_before

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch

    from pathcli.data.classes import ClassSet
    from pathcli.data.labelled import Labelled
    from pathcli.encoders.embedding import Embedder
    from pathcli.encoders.imageset import ImageFeatures
    from pathcli.types import Encoder, ImageTextEncoder, Progress

NOT_COMPARABLE = (
    "Published numbers are of other images, splits or prompts than these: they show the scale, "
    "and are not comparable with ours."
)


def zeroshot(
    dataset: str,
    embedder: Embedder,
    *,
    data: Path | str | None = None,
    labels: Path | str | None = None,
    split: str | None = None,
    ensemble: bool = False,
    prompts: Sequence[str] = (),
    template: str | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Classify the images of a data set by the nearest class text; no label is learnt from.

    Args:
        dataset: a name we know or a YAML file, with `data`; or a folder or table of one's own.
        embedder: an encoder of images and texts, with the store of its features.
        data: the folder of the images.
        labels: a table image,label[,group][,split] used instead of what is in `data`.
        split: the part to score: a name, or "all" (default: what the set's file says).
        ensemble: all synonyms x templates of a class instead of its one text.
        prompts: `CLASS=TEXT`, other texts for classes.
        template: another template, with {} where the class text goes.
        progress: called with (images done, images in all).

    Raises:
        UsageError: the encoder reads no text, or no such data set, split or class.
        DataError: a table is wrong, or no image can be read.
        ResourceError: no data, no weights, or no space.
    """
    reader = text_encoder(embedder.encoder)
    classes, found = open_dataset(dataset, data, labels=labels, split=split)
    classes = classes.reworded(prompts, template)
    embedder.load()
    texts = classes.texts(ensemble=ensemble)
    weights = class_weights(reader, [texts[key] for key in classes.keys])
    images = embed_images([s.images[0] for s in found.samples], embedder, progress)
    scored = _scored(classes, found, images, reader, weights)
    return replace(
        scored,
        texts=texts,
        warnings=(
            *found.warnings,
            *(_of_parts(found) if not (split or classes.split) else ()),
            *_warnings(reader, texts, images),
        ),
        lead=_lead(classes, reader, ensemble=ensemble),
        provenance={
            **scored.provenance,
            "split": split or classes.split or "all",
            "prompts": "synonyms x templates" if ensemble else "one text a class",
        },
    )


def _scored(
    classes: ClassSet,
    found: Labelled,
    images: ImageFeatures,
    encoder: ImageTextEncoder,
    weights: torch.Tensor,
) -> Scored:
    """Return what the nearest of `weights` [c, d] says of every image that could be read.

    Raises:
        DataError: none could.
    """
    kept = np.flatnonzero(images.readable)
    if not len(kept):
        msg = f"{found.source}: none of {len(images.readable)} images can be read"
        raise DataError(msg)
    values, samples = images.values[kept], [found.samples[i] for i in kept.tolist()]
    lost = len(images.readable) - len(kept)
    return Scored(
        title=f"{classes.title} told by text: {encoder.name}",
        classes=classes.keys,
        samples=samples,
        labels=np.array([classes.keys.index(s.label) for s in samples], np.int64),
        probabilities=class_probabilities(values, weights, encoder.logit_scale),
        features=values.astype(np.float32),
        abstained=unfamiliar(encoder, values),
        dropped={**found.dropped, **({"not a readable image": lost} if lost else {})},
        published=classes.published_rows(),
        provenance={
            "dataset": classes.name,
            "dataset_source": classes.source,
            "dataset_licence": classes.licence,
            "labels": found.source,
            "labels_digest": found.digest,
            "encoder": encoder.id,
            "logit_scale": round(encoder.logit_scale, 4),
            "image_sets": [key.item for key in images.keys],
            "encoded": images.encoded,
        },
    )


def _warnings(
    encoder: ImageTextEncoder, texts: dict[str, tuple[str, ...]], images: ImageFeatures
) -> Iterator[str]:
    """Yield what the user should know of the prompts and of the images' bytes."""
    every = [text for of_class in texts.values() for text in of_class]
    if cut := too_long(encoder, every):
        first = shorten(cut[0], 80, placeholder="...")
        told = f"{len(cut)} of {len(every)} prompts are cut at {encoder.text_limit} tokens"
        yield f"{told}; the first: {first!r}"
    if images.copies:
        yield f"images that are byte for byte copies of others, and count again: {images.copies}"


def _of_parts(found: Labelled) -> Iterator[str]:
    """Yield a warning where parts that the labels keep apart are scored together."""
    parts = sorted(set(found.splits) - {""})
    if len(parts) > 1:
        one = "test" if "test" in parts else parts[-1]
        yield (
            f"images of {', '.join(parts)} are scored together; an encoder may have learnt from "
            f"some of them: --split {one} scores one part, --split all says it is meant"
        )


def _lead(classes: ClassSet, encoder: Encoder, *, ensemble: bool) -> str:
    how = "the mean of all its texts" if ensemble else "its text"
    lead = (
        f"{encoder.name} gives each image the class whose text is nearest ({how}); no label of "
        "the set was learnt from here."
    )
    notes = [seen_before(encoder, classes.name), classes.note]
    notes += [NOT_COMPARABLE] if classes.published else []
    return " ".join([lead, *filter(None, notes)])
