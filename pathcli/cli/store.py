"""`pathcli store`: what is kept, whether it is whole, and what can go."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o
from pathcli.cli.store_exchange import export, import_

if TYPE_CHECKING:
    from pathcli.store import Store

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)
app.command("export")(export)
app.command("import")(import_)


@app.callback()
def root() -> None:
    """List, check, clean, export and import features."""


@app.command("list")
def list_entries(store: o.StoreRoot = None, json: o.Json = False) -> None:
    """List the entries of the store, one line each."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.store.units import ENTRIES, units  # noqa: PLC0415

    opened = o.open_store(store, create=False)
    rows = [
        {
            "kind": unit.kind,
            "item": unit.key.item,
            "um/px": unit.key.mpp,
            "tiles": unit.key.tiles,
            "encoder": unit.key.encoder or "-",
            "MB": round(unit.size / 1e6, 2),
        }
        for unit in sorted(units(opened), key=lambda unit: unit.kind == "features")
        if unit.key and unit.kind in ENTRIES
    ]
    if json:
        show.as_json({"root": str(opened.root), "entries": rows})
    elif rows:
        show.table(rows)
    else:
        root = opened.root
        show.say(f"{root}: nothing here yet; run: pathcli embed SLIDES --store {root}")


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


def _summary(store: Store) -> dict[str, Any]:
    import shutil  # noqa: PLC0415

    from pathcli.store.units import usage  # noqa: PLC0415

    used = usage(store)
    counts: Counter[str] = Counter()
    for row in used:
        counts[row.kind] += row.count
        if row.kind == "features":
            counts[f"features of {row.encoder}"] += row.count
    value = {
        "root": str(store.root),
        "slides": counts["slides"],
        "tile entries": counts["tiles"],
        "feature entries": counts["features"],
        **{name: count for name, count in sorted(counts.items()) if name.startswith("features of")},
        "used MB": round(sum(row.size for row in used) / 1e6, 1),
    }
    if store.root == store.local:
        value["free GB"] = round(shutil.disk_usage(store.local).free / 1e9, 1)
    return value


def _item(store: Store, item: str) -> dict[str, Any]:
    from json import loads  # noqa: PLC0415

    from pathcli.errors import DataError  # noqa: PLC0415
    from pathcli.registry import did_you_mean  # noqa: PLC0415

    names = store.place.glob("slides/*.json")
    cards = {name.removeprefix("slides/").removesuffix(".json"): name for name in names}
    if item not in cards:
        msg = f"the store has no item {item!r}: {did_you_mean(item, list(cards)[:20])}"
        raise DataError(msg)
    try:
        value = dict(loads(store.place.read(cards[item])))
    except (ValueError, TypeError) as error:
        msg = f"{store.root}/{cards[item]}: damaged ({error}); run: pathcli store verify"
        raise DataError(msg) from error
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
def du(store: o.StoreRoot = None, json: o.Json = False) -> None:
    """Say what takes the space, by kind, encoder and tiles, the largest first."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.store.units import usage  # noqa: PLC0415

    opened = o.open_store(store, create=False)
    used = usage(opened)
    rows = [
        {
            "kind": row.kind,
            "encoder": row.encoder or "-",
            "tiles": row.tiles or "-",
            "count": row.count,
            "MB": round(row.size / 1e6, 3),
        }
        for row in used
    ]
    total = sum(row.size for row in used) / 1e6
    if json:
        show.as_json({"root": str(opened.root), "MB": round(total, 3), "uses": rows})
        return
    show.table(rows)
    show.say(f"{opened.root}: {total:.1f} MB")


@app.command()
def verify(store: o.StoreRoot = None, json: o.Json = False) -> None:
    """Check every entry against its checksums, and say what mends it.

    Exit 4 if one is broken, 5 if one cannot be read.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.store.upkeep import FAULTY  # noqa: PLC0415
    from pathcli.store.upkeep import verify as check  # noqa: PLC0415

    opened = o.open_store(store, create=False)
    found = list(check(opened))
    counts = Counter(f.state for f in found)
    rows = [
        {"state": f.state, "file": f.name, "detail": f.detail, "mend": f.mend}
        for f in found
        if f.state != "ok"
    ]
    if json:
        show.as_json({"root": str(opened.root), "counts": dict(counts), "findings": rows})
    else:
        show.table(rows)
        told = ", ".join(f"{n} {state}" for state, n in counts.items()) or "empty"
        show.say(f"{opened.root}: {told}")
    if any(counts[state] for state in FAULTY):
        raise typer.Exit(4)
    if counts["unreadable"]:
        raise typer.Exit(5)


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
    rows = [{"file": r.name, "why": r.why, "bytes": r.size} for r in gone]
    if json:
        show.as_json({"root": str(opened.root), "dry_run": dry_run, "removed": rows})
        return
    show.table(rows)
    verb = "would be removed" if dry_run else "removed"
    size = sum(r.size for r in gone) / 1e6
    show.say(f"{opened.root}: {verb}: {len(rows)}, {size:.1f} MB")
