"""Files as other tools write them, and the commands that read them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import typer

from pathcli import registry
from pathcli.cli import store as store_commands
from pathcli.cli.store_exchange import export, import_

D = 5
XY = np.array([[0, 512], [512, 0], [0, 0], [1024, 512]])  # not in the order of (y, x)
ORDER = [2, 1, 0, 3]
ASKED = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "savetodir": "/data/out",
    "level0_width": 9000,
    "level0_height": 8000,
}


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sure that the commands and names are there that imports need."""
    monkeypatch.setitem(
        registry.BUILTIN["encoder"], "imported", "pathcli.encoders.imported:Imported"
    )
    monkeypatch.setitem(registry.BUILTIN["tissue"], "imported", "pathcli.slides.imported:Imported")
    app: typer.Typer = store_commands.app
    if "export" not in {command.name for command in app.registered_commands}:
        monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
        app.command("export")(export)
        app.command("import")(import_)


def features(n: int = 4, d: int = D, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def trident(
    job: Path,
    name: str = "s1",
    values: np.ndarray | None = None,
    *,
    encoder: str = "uni_v1",
    **attrs: object,
) -> Path:
    """Write a slide as TRIDENT does: chunks of a row, attributes on the datasets."""
    values = features() if values is None else values
    path = job / "20x_256px_0px_overlap" / f"features_{encoder}" / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, data in (("features", values), ("coords", XY[: len(values)])):
            file.create_dataset(key, data=data, chunks=(1, data.shape[1]), maxshape=(None, None))
        file["features"].attrs.update({"name": name, "savetodir": "x", "encoder": encoder})
        file["coords"].attrs.update({"name": name, **ASKED, **attrs})
    return path
