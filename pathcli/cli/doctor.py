"""`pathcli doctor`: what works on this machine, and the command that mends the rest."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

from pathcli.cli import options as o

app = typer.Typer(rich_markup_mode=None, add_completion=False)

EXTRAS = {"s3fs": "remote", "gcsfs": "remote", "aiohttp": "remote"}
EXTRAS |= {"ray": "ray", "fastapi": "serve", "uvicorn": "serve"}


@app.command()
def doctor(store: o.StoreRoot = None, json: o.Json = False) -> None:
    """Say what works on this machine, and what to do about the rest."""
    from pathcli.cli import show  # noqa: PLC0415

    rows = [*_software(), *_store(store), *_weights(), *_extras()]
    if json:
        show.as_json({"checks": rows})
    else:
        show.table(rows)
    if any(row["state"] == "missing" for row in rows):
        raise typer.Exit(5)


def _row(what: str, state: str, detail: str) -> dict[str, Any]:
    return {"what": what, "state": state, "detail": detail}


def _software() -> list[dict[str, Any]]:
    rows = [_row("python", "ok", f"{platform.python_version()} on {platform.system()}")]
    try:
        import torch  # noqa: PLC0415

        from pathcli.device import pick_device  # noqa: PLC0415

        best = pick_device("auto")
        name = (
            torch.cuda.get_device_name() if best == "cuda" else f"{torch.get_num_threads()} threads"
        )
        rows.append(_row("torch", "ok", f"{torch.__version__}, device {best} ({name})"))
    except (ImportError, OSError) as error:
        rows.append(_row("torch", "missing", f"{error}; run: pip install torch"))
    try:
        from pathcli.torchvision_guard import guard_torchvision  # noqa: PLC0415

        guard_torchvision()
        import torchvision  # noqa: PLC0415

        rows.append(_row("torchvision", "ok", torchvision.__version__))
    except (ImportError, OSError, RuntimeError) as error:
        rows.append(_row("torchvision", "missing", f"{error}; run: pip install torchvision"))
    try:
        import openslide  # noqa: PLC0415

        rows.append(_row("OpenSlide", "ok", openslide.__library_version__))
    except (ImportError, OSError) as error:
        rows.append(_row("OpenSlide", "missing", f"{error}; run: pip install openslide-bin"))
    return rows


def _store(root: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a path or None
    from pathcli.errors import PathcliError  # noqa: PLC0415

    try:
        opened = o.open_store(root)
    except PathcliError as error:
        return [_row("store", "missing", str(error))]
    where = "--store" if root else "the default"
    detail = f"{opened.root} ({where}), {len(opened.features)} features"
    if not isinstance(opened.root, Path):
        return [_row("store", "ok", detail)]
    free = shutil.disk_usage(opened.root).free / 1e9
    return [_row("store", "ok" if free > 1 else "low", f"{detail}, {free:.1f} GB free")]


def _weights() -> list[dict[str, Any]]:
    from pathcli.cards import CARDS  # noqa: PLC0415
    from pathcli.weights import find  # noqa: PLC0415

    rows = []
    for name in CARDS:
        path = find(name)
        detail = str(path) if path else f"not here; run: pathcli models pull {name}"
        rows.append(_row(name, "ok" if path else "absent", detail))
    return rows


def _extras() -> list[dict[str, Any]]:
    rows = []
    for package, extra in EXTRAS.items():
        try:
            rows.append(_row(package, "ok", version(package)))
        except PackageNotFoundError:
            rows.append(_row(package, "absent", f"optional; run: pip install 'pathcli[{extra}]'"))
    return rows
