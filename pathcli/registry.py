"""A name in, the component's class or factory out: one literal table, plus entry points.

A plug-in adds names through the entry-point group `pathcli.<kind>`; it may not take a
built-in name. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pathcli.errors import UsageError

BUILTIN: dict[str, dict[str, str]] = {
    "encoder": {
        "lite0": "pathcli.encoders.timm:Lite0",
        "timm": "pathcli.encoders.timm:TimmEncoder",
        "open_clip": "pathcli.encoders.clip:OpenClipEncoder",
        "pathgen-clip": "pathcli.encoders.clip:PathGenClip",
        "pathgen-clip-l": "pathcli.encoders.clip:PathGenClipL",
        "pathgen-clip-l-hf": "pathcli.encoders.hf:PathGenClipLHF",
        "plip": "pathcli.encoders.hf:Plip",
        "quilt-net": "pathcli.encoders.clip:QuiltNet",
        "conch": "pathcli.encoders.conch:Conch",
        "uni": "pathcli.encoders.timm:Uni",
        "pallava-plip": "pathcli.encoders.pallava_plip:PallavaPlip",
        "mini-clip": "pathcli.encoders.mini_clip:MiniClip",
        "eva-clip-g": "pathcli.encoders.eva:EvaClipG",
        "hf": "pathcli.encoders.hf:HFClipEncoder",
        "imported": "pathcli.encoders.imported:Imported",
    },
    "model": {
        "open-clip": "pathcli.encoders.open_clip_model:OpenClipModel",
        "mini-clip": "pathcli.encoders.mini_clip:MiniClipModel",
        "pallava-plip": "pathcli.encoders.pallava_plip:PallavaPlipModel",
    },
    "head": {
        "abmil": "pathcli.mil.abmil:ABMIL",
        "acmil": "pathcli.mil.acmil:ACMIL",
        "clam-sb": "pathcli.mil.clam:ClamSB",
        "transmil": "pathcli.mil.transmil:TransMIL",
        "dsmil": "pathcli.mil.dsmil:DSMIL",
        "mean": "pathcli.mil.pooling:MeanPooling",
        "max": "pathcli.mil.pooling:MaxPooling",
    },
    "connector": {
        "mlp": "pathcli.vlm.connectors:Mlp",
        "qformer": "pathcli.vlm.qformer:QFormer",
        "scale-invariant": "pathcli.vlm.scale_invariant:ScaleInvariant",
    },
    "language": {"hf": "pathcli.vlm.language:HFLanguage"},
    "task": {
        "mil": "pathcli.mil.task:MilTask",
        "mil-outcome": "pathcli.mil.outcome_task:OutcomeTask",
        "contrastive": "pathcli.encoders.contrastive:ContrastiveTask",
        "itc-itm": "pathcli.encoders.itc_itm:ItcItmTask",
        "align": "pathcli.vlm.align:AlignTask",
        "generate": "pathcli.vlm.generate:GenerateTask",
    },
    "outcome": {
        "regression": "pathcli.mil.outcomes:Regression",
        "cox": "pathcli.mil.outcomes:Cox",
        "hazards": "pathcli.mil.outcomes:Hazards",
    },
    "data": {
        "bags": "pathcli.mil.bags:BagData",
        "pairs": "pathcli.data.pairs:PairData",
        "classes": "pathcli.data.captions:ClassCaptions",
        "instructions": "pathcli.data.instructions:InstructionData",
        "texts": "pathcli.data.instructions:TextData",
    },
    "tissue": {
        "otsu": "pathcli.slides.tissue:Otsu",
        "imported": "pathcli.slides.imported:Imported",
        "hsv": "pathcli.slides.tissue:HSV",
        "hsv:bwh_biopsy": "pathcli.slides.tissue_methods:bwh_biopsy",
        "hsv:bwh_resection": "pathcli.slides.tissue_methods:bwh_resection",
        "hsv:tcga": "pathcli.slides.tissue_methods:tcga",
        "auto": "pathcli.slides.tissue_methods:Auto",
        "none": "pathcli.slides.tissue:Everything",
    },
    "reader": {
        "direct": "pathcli.slides.readers:open_direct",
        "openslide": "pathcli.slides.readers:OpenSlideReader",
        "tiffslide": "pathcli.slides.readers:TiffSlideReader",
        "image": "pathcli.slides.plain:ImageReader",
    },
}


def did_you_mean(name: str, names: list[str]) -> str:
    """Return a clause that suggests the nearest of `names`, or lists them all."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}? (known: {', '.join(names)})"
    return f"known: {', '.join(names)}"


@cache
def _plugins(kind: str) -> tuple[EntryPoint, ...]:
    """Ask every installed package, once: it takes as long as opening a slide."""
    return tuple(entry_points(group=f"pathcli.{kind}"))


def names(kind: str) -> list[str]:
    """Return the names of `kind`, built-in ones first, in table order."""
    return list(dict.fromkeys([*BUILTIN[kind], *(point.name for point in _plugins(kind))]))


def resolve(kind: str, name: str) -> Any:  # noqa: ANN401 - components share no base class
    """Return the class or factory registered as `name`.

    Raises:
        UsageError: nobody registered `name`, or a plug-in claims a built-in name.
    """
    plugins = [point for point in _plugins(kind) if point.name == name]
    if name in BUILTIN[kind]:
        if plugins:
            owner = plugins[0].dist.name if plugins[0].dist else plugins[0].value
            msg = f"plug-in {owner} may not replace the built-in {kind} {name!r}; uninstall it"
            raise UsageError(msg)
        module, _, attribute = BUILTIN[kind][name].partition(":")
        return getattr(import_module(module), attribute)
    if plugins:
        return plugins[0].load()
    msg = f"no {kind} is called {name!r}: {did_you_mean(name, names(kind))}"
    raise UsageError(msg)
