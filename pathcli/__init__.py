"""Computational pathology from slide to answer; public names, resolved when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Answer": "pathcli.types",
    "Bag": "pathcli.types",
    "DataError": "pathcli.errors",
    "Features": "pathcli.types",
    "HeadOutput": "pathcli.types",
    "Key": "pathcli.types",
    "PathcliError": "pathcli.errors",
    "ResourceError": "pathcli.errors",
    "Store": "pathcli.store",
    "TileSpec": "pathcli.types",
    "TileStatus": "pathcli.types",
    "Tiles": "pathcli.types",
    "UsageError": "pathcli.errors",
    "ask": "pathcli.vlm.ask",
    "build": "pathcli.recipe",
    "build_encoder": "pathcli.encoders",
    "check_recipe": "pathcli.recipe",
    "demo": "pathcli.evals.demo",
    "embed": "pathcli.encoders.embedding",
    "load_recipe": "pathcli.recipe",
    "mil_eval": "pathcli.evals.mil",
    "open_slide": "pathcli.slides",
    "predict": "pathcli.mil.predict",
    "probe": "pathcli.evals.probe",
    "search": "pathcli.encoders.search",
    "tile": "pathcli.slides.tiling",
    "train": "pathcli.runs",
    "zeroshot": "pathcli.evals.zeroshot",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - the keys are strings


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name
    """Import a public name on first use."""
    if name not in _PUBLIC:
        msg = f"module 'pathcli' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
