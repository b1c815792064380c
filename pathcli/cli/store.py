"""`pathcli store`: what is kept, whether it is whole, and what can go."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Annotated, Any

import typer

from pathcli.cli import options as o

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)


@app.callback()
def root() -> None:
    """List, check and clean the feature store."""


@app.command("list")
def list_entries(store: o.StoreRoot = None, json: o.Json = False) -> None:
    """List the entries of the store, one line each."""
    from pathcli.cli import show  # noqa: PLC0415

    opened = o.open_store(store, create=False)
    rows: list[dict[str, Any]] = []
    for kind, entries in (("tiles", opened.tiles), ("features", opened.features)):
        for key in entries:
            size = entries.path(key).stat().st_size / 1e6
            rows.append(
                {
                    "kind": kind,
                    "item": key.item,
                    "um/px": key.mpp,
                    "tiles": key.tiles,
                    "encoder": key.encoder or "-",
                    "MB": round(size, 2),
                }
            )
    if json:
        show.as_json({"root": str(opened.root), "entries": rows})
    elif rows:
        show.table(rows)
    else:
        show.say(f"{opened.root}: nothing here yet; run: pathcli embed SLIDE")


@app.command()
def info(
    item: Annotated[str | None, typer.Argument(help="One item, as `list` names it.")] = None,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Say what the store holds in all, or everything it knows of one item."""
    from pathcli.cli import show  # noqa: PLC0415

    opened = o.open_store(store, create=False)
    value = _item(opened, item) if item else _summary(opened)
    if json:
        show.as_json(value)
    else:
        show.table([{"what": k, "value": str(v)} for k, v in value.items()])


def _summary(store: Any) -> dict[str, Any]:  # noqa: ANN401 - typed where it is opened
    import shutil  # noqa: PLC0415

    encoders = Counter(str(key.encoder) for key in store.features)
    used = sum(p.stat().st_size for p in store.root.rglob("*") if p.is_file())
    return {
        "root": str(store.root),
        "slides": len(store.slides()),
        "tile entries": len(store.tiles),
        "feature entries": len(store.features),
        **{f"features of {name}": count for name, count in sorted(encoders.items())},
        "used MB": round(used / 1e6, 1),
        "free GB": round(shutil.disk_usage(store.root).free / 1e9, 1),
    }


def _item(store: Any, item: str) -> dict[str, Any]:  # noqa: ANN401
    from pathcli.errors import DataError  # noqa: PLC0415
    from pathcli.registry import did_you_mean  # noqa: PLC0415

    cards = store.slides()
    if item not in cards:
        msg = f"the store has no item {item!r}: {did_you_mean(item, list(cards)[:20])}"
        raise DataError(msg)
    value = dict(cards[item])
    for key in store.tiles:
        if key.item == item:
            tiles = store.tiles[key]
            value[f"tiles {key.tiles} at {key.mpp:g}"] = f"{len(tiles)}: {tiles.spec.to_json()}"
    for key in store.features:
        if key.item == item:
            shape, bad = store.features.shape(key)
            value[f"features {key.encoder} on {key.tiles}"] = f"rows of {shape}, {bad} unreadable"
    return value


@app.command()
def verify(store: o.StoreRoot = None, json: o.Json = False) -> None:
    """Check every entry against its checksums; exit 4 if one is broken."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.store.upkeep import verify as check  # noqa: PLC0415

    opened = o.open_store(store, create=False)
    found = list(check(opened))
    counts = Counter(f.state for f in found)
    rows = [
        {"state": f.state, "file": str(f.path.relative_to(opened.root)), "detail": f.detail}
        for f in found
        if f.state != "ok"
    ]
    if json:
        show.as_json({"root": str(opened.root), "counts": dict(counts), "findings": rows})
    else:
        show.table(rows)
        told = ", ".join(f"{n} {state}" for state, n in counts.items()) or "empty"
        show.say(f"{opened.root}: {told}")
    if counts["broken"]:
        raise typer.Exit(4)


@app.command()
def prune(
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Also all features of this encoder id.")
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", help="Also older features.", metavar="DAYS", min=0),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Remove stale temporaries and broken entries, and what the options name.

    With both options only features that match both. Files not written by pathcli stay.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.store.upkeep import prune as remove  # noqa: PLC0415

    opened = o.open_store(store, create=False)
    # the removals are listed here; the library logs them too
    logging.getLogger("pathcli").setLevel(logging.WARNING)
    gone = remove(opened, encoder=encoder, older_than_days=older_than, dry_run=dry_run)
    rows = [
        {"file": str(r.path.relative_to(opened.root)), "why": r.why, "bytes": r.size} for r in gone
    ]
    if json:
        show.as_json({"root": str(opened.root), "dry_run": dry_run, "removed": rows})
        return
    show.table(rows)
    verb = "would be removed" if dry_run else "removed"
    show.say(f"{len(rows)} files {verb}, {sum(r.size for r in gone) / 1e6:.1f} MB")
