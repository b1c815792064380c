"""A slide as SpatialData has it: `<slide>.zarr` with `tables/<model>_tiles` and `shapes/tiles`.

The table is AnnData's encoding of Zarr (format 2, which all its versions read): X float16's
values as float32 [n, d], `obsm/spatial` the tiles' centres and `obsm/corner` their corners,
both in level-0 px. Shapes are ragged arrays, SpatialData's own form before GeoParquet.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli import __version__
from pathcli.errors import DataError, ResourceError
from pathcli.store.peers import files
from pathcli.store.peers.parcel import (
    RECORD,
    UNKNOWN,
    Incoming,
    Source,
    corners,
    imported_spec,
    matrix,
    number,
    plain,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pathcli.store.peers.parcel import Asked, Outgoing

_TILES = "_tiles"
_TABLE = ("encoding-type", "anndata", "encoding-version", "0.1.0")


def places(out: Path, one: Outgoing) -> tuple[Path, ...]:
    """Return the folder of one slide."""
    return (out / f"{one.name}.zarr",)


def table_name(encoder: str) -> str:
    """Return what the table of an encoder is called."""
    return re.sub(r"[^\w.-]", "_", encoder) + _TILES


@contextmanager
def writer(out: Path, **_: Any) -> Iterator[Callable[[Outgoing, str | None], None]]:  # noqa: ANN401
    """Give a function that writes one slide."""
    yield partial(_write, out)


def _write(out: Path, one: Outgoing, record: str | None) -> None:
    import zarr  # noqa: PLC0415

    _require_own(places(out, one)[0])
    with files.writing_folder(places(out, one)[0]) as folder:
        root = zarr.open_group(folder, mode="w", zarr_format=2)
        made = {"version": "0.1", "spatialdata_software_version": f"pathcli {__version__}"}
        root.attrs.update({"spatialdata_attrs": made, "tile_spec": {"tiles": _tile_spec(one)}})
        _shapes(root.create_group("shapes").create_group("tiles"), one)
        tables = root.create_group("tables")
        _table(tables.create_group(table_name(one.encoder)), one, record)


def _require_own(folder: Path) -> None:
    """Refuse to replace a slide that another tool wrote: there is more in it than features."""
    import zarr  # noqa: PLC0415

    if not folder.exists():
        return
    try:
        made: Any = zarr.open_group(folder, mode="r").attrs["spatialdata_attrs"]
        own = str(made["spatialdata_software_version"]).startswith("pathcli ")
    except Exception:  # noqa: BLE001 - zarr raises what the bytes provoke
        own = False
    if not own:
        msg = f"{folder}: another tool's, and not replaced; move it away, or give another OUT"
        raise DataError(msg)


def _tile_spec(one: Outgoing) -> dict[str, Any]:
    """Return the fields of wsidata's TileSpec, which refuses any other."""
    spec = one.tiles.spec
    scale = spec.mpp / one.tiles.slide_mpp
    return {
        **dict.fromkeys(("height", "width"), spec.size_px),
        **dict.fromkeys(("stride_height", "stride_width"), spec.step_px),
        **dict.fromkeys(("ops_downsample", "base_downsample"), scale),
        **dict.fromkeys(("ops_level", "base_level"), 0),
        "mpp": spec.mpp,
        "tissue_name": spec.tissue,
    }


def _shapes(group: Any, one: Outgoing) -> None:  # noqa: ANN401 - zarr groups
    """Write the squares of the tiles as ragged arrays: corners, rings, polygons."""
    ring = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) * one.tiles.side0
    n = len(one.xy)
    space = [{"name": axis, "type": "space", "unit": "unit"} for axis in ("x", "y")]
    same = {
        "type": "identity",
        "input": {"axes": space, "name": "xy"},
        "output": {"axes": space, "name": "global"},
    }
    group.attrs.update(
        {
            "encoding-type": "ngff:shapes",
            "axes": ["x", "y"],
            "coordinateTransformations": [same],
            "spatialdata_attrs": {"version": "0.1", "geos": {"name": "POLYGON", "type": 3}},
        }
    )
    _array(group, "coords", (one.xy[:, None] + ring).reshape(-1, 2))
    _array(group, "offset0", np.arange(n + 1, dtype=np.int64) * len(ring))
    _array(group, "offset1", np.arange(n + 1, dtype=np.int64))
    _array(group, "Index", np.arange(n, dtype=np.int64))


def _table(group: Any, one: Outgoing, record: str | None) -> None:  # noqa: ANN401
    n, d = one.values.shape
    group.attrs.update(
        {
            **dict(zip(_TABLE[::2], _TABLE[1::2], strict=True)),
            "spatialdata-encoding-type": "ngff:regions_table",
            "region": "tiles",
            "region_key": "library_id",
            "instance_key": "tile_id",
            "version": "0.1",
        }
    )
    _encoded(group, "X", one.values.astype(np.float32))
    obs = _frame(group, "obs", [str(i) for i in range(n)], ["tile_id", "library_id"])
    _encoded(obs, "tile_id", np.arange(n, dtype=np.int64))
    kinds = obs.create_group("library_id")
    kinds.attrs.update(_kind("categorical", "0.2.0") | {"ordered": False})
    _encoded(kinds, "codes", np.zeros(n, np.int8))
    _strings(kinds, "categories", ["tiles"])
    _frame(group, "var", [str(i) for i in range(d)], [])
    for name in ("layers", "obsp", "varm", "varp"):
        _mapping(group, name)
    places_ = _mapping(group, "obsm")
    _encoded(places_, "spatial", one.xy + one.tiles.side0 / 2)
    _encoded(places_, "corner", one.xy.astype(np.int64))
    uns = _mapping(group, "uns")
    told = _mapping(uns, "spatialdata_attrs")
    for name in ("region", "region_key", "instance_key"):
        _text(told, name, group.attrs[name])
    _text(uns, "tile_spec", json.dumps(_tile_spec(one)))
    _text(uns, "encoder", one.encoder)
    if record:
        _text(uns, RECORD, record)


# --- AnnData's encodings -----------------------------------------------------------------


def _kind(name: str, version: str) -> dict[str, Any]:
    return {"encoding-type": name, "encoding-version": version}


def _array(group: Any, name: str, values: NDArray[Any]) -> Any:  # noqa: ANN401
    chunks = (min(4096, max(1, len(values))), *values.shape[1:])
    made = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks)
    made[...] = values
    return made


def _encoded(group: Any, name: str, values: NDArray[Any]) -> None:  # noqa: ANN401
    _array(group, name, values).attrs.update(_kind("array", "0.2.0"))


def _strings(group: Any, name: str, values: list[str]) -> None:  # noqa: ANN401
    made = group.create_array(name, shape=(len(values),), dtype=str)
    made[...] = np.array(values, dtype=object)
    made.attrs.update(_kind("string-array", "0.2.0"))


def _text(group: Any, name: str, value: str) -> None:  # noqa: ANN401
    made = group.create_array(name, shape=(), dtype=str)
    made[()] = np.array(value, dtype=object)
    made.attrs.update(_kind("string", "0.2.0"))


def _mapping(group: Any, name: str) -> Any:  # noqa: ANN401
    made = group.create_group(name)
    made.attrs.update(_kind("dict", "0.1.0"))
    return made


def _frame(group: Any, name: str, index: list[str], columns: list[str]) -> Any:  # noqa: ANN401
    made = group.create_group(name)
    made.attrs.update(_kind("dataframe", "0.2.0") | {"_index": "_index", "column-order": columns})
    _strings(made, "_index", index)
    return made


# --- reading -----------------------------------------------------------------------------


def sources(path: Path, asked: Asked) -> list[Source]:
    """Return the tables of tiles in a folder of `*.zarr`, or in one."""
    import zarr  # noqa: PLC0415

    one = path.suffix == ".zarr"
    found = []
    for folder in [path] if one else sorted(p for p in path.glob("*.zarr") if p.is_dir()):
        try:
            tables: Any = zarr.open_group(folder, mode="r")["tables"]
            names = sorted(name for name in tables.group_keys() if name.endswith(_TILES))
        except Exception as error:  # noqa: BLE001 - zarr raises what the bytes provoke
            found.append(Source(folder.stem, folder, folder.name, partial(_fail, folder, error)))
            continue
        found += [
            Source(folder.stem, folder, f"{folder.name}/{n}", partial(_read, folder, n, asked))
            for n in names
        ]
    return found


def _fail(folder: Path, error: Exception) -> Incoming:
    msg = f"{folder}: no readable tables ({type(error).__name__}); SpatialData keeps them there"
    raise DataError(msg) from error


def _read(folder: Path, name: str, asked: Asked) -> Incoming:
    import zarr  # noqa: PLC0415

    try:
        root = zarr.open_group(folder, mode="r")
        table: Any = root[f"tables/{name}"]
        values = matrix(_dense(table["X"], folder, name), f"{folder}: tables/{name}/X")
        uns = table.get("uns", {})
        told = {n: str(plain(uns[n][()])) for n in ("encoder", RECORD) if n in uns}
        says = {
            "table": plain(dict(table.attrs)),
            "tile_spec": plain(root.attrs.get("tile_spec", {})),
        }
        region = plain(table.attrs.get("region"))
        region = region[0] if isinstance(region, list) and len(region) == 1 else str(region)
        xy, notes = _corners(root, table, folder, len(values), region)
    except (DataError, ResourceError):
        raise
    except Exception as error:  # zarr raises what the bytes provoke
        line = (str(error).splitlines() or [""])[0][:80]
        msg = f"{folder}: tables/{name} cannot be read ({type(error).__name__}: {line})"
        raise DataError(msg) from error
    spec, mpp, source, more = _tiling(says["tile_spec"], folder.stem, told.get(RECORD), asked)
    return Incoming(
        path=folder,
        name=folder.stem,
        values=values,
        xy=xy,
        encoder=told.get("encoder") or name.removesuffix(_TILES),
        spec=spec,
        slide_mpp=mpp,
        mpp_source=source,
        says=says,
        record=told.get(RECORD),
        notes=(*notes, *more),
    )


def _dense(found: Any, folder: Path, name: str) -> Any:  # noqa: ANN401 - a zarr array or group
    if not hasattr(found, "shape"):
        msg = f"{folder}: tables/{name}/X is sparse; features [tiles, length] are wanted"
        raise DataError(msg)
    return found[...]


def _corners(
    root: Any,  # noqa: ANN401 - zarr groups
    table: Any,  # noqa: ANN401
    folder: Path,
    n: int,
    region: str,
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the corners [n, 2] of the table's tiles in level-0 px, and what to say of them."""
    if "obsm" in table and "corner" in table["obsm"]:
        return corners(table["obsm/corner"][...], n, f"{folder}: obsm/corner"), ()
    shapes = f"shapes/{region}"
    if shapes in root and "offset0" in root[shapes]:
        starts = root[f"{shapes}/offset0"][...][:-1]
        ends = root[f"{shapes}/offset0"][...][1:]
        flat = root[f"{shapes}/coords"][...]
        low = [flat[a:b].min(0) for a, b in zip(starts, ends, strict=True)]
        return corners(_of_rows(np.array(low), table), n, f"{folder}: {shapes}"), ()
    parquet = folder / "shapes" / region / "shapes.parquet"
    if parquet.is_file():
        return corners(_of_rows(_parquet(parquet), table), n, str(parquet)), ()
    note = "the file does not say where its tiles are: they are counted instead"
    return np.stack([np.arange(n), np.zeros(n, np.int64)], 1), (note,)


def _of_rows(low: NDArray[Any], table: Any) -> NDArray[Any]:  # noqa: ANN401 - a zarr group
    """Return the corners of a table's rows, which say by number whose they are."""
    obs, name = table.get("obs", {}), str(table.attrs.get("instance_key"))
    ids = np.asarray(obs[name][...] if name in obs and hasattr(obs[name], "shape") else [])
    known = len(ids) and ids.dtype.kind in "iu" and ids.min() >= 0 and ids.max() < len(low)
    return low[ids] if known else low


def _parquet(path: Path) -> NDArray[np.float64]:
    """Return the least x and y [n, 2] of polygons in GeoParquet."""
    try:
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        msg = f"{path}: GeoParquet needs: pip install 'pathcli[parquet]'"
        raise ResourceError(msg) from error
    import shapely  # noqa: PLC0415

    shapes = shapely.from_wkb(pq.read_table(path, columns=["geometry"])["geometry"].to_pylist())
    return np.asarray(shapely.bounds(shapes)[:, :2])


def _tiling(
    told: Mapping[str, Any], name: str, record: str | None, asked: Asked
) -> tuple[Any, float, str, tuple[str, ...]]:
    """Return specification, slide resolution, its source and notes of wsidata's tile_spec."""
    tiles: Mapping[str, Any] = told.get("tiles", {}) if isinstance(told, dict) else {}
    size, mpp = number(tiles.get("width")), number(tiles.get("mpp"))
    if size is None or mpp is None:
        note = "the file does not say how large its tiles are: unknown, 1 px stands for it"
        return UNKNOWN, 1.0, "unknown, 1 stands for it", (note,)
    step = number(tiles.get("stride_width")) or size
    found = asked.resolution(name, record)
    if found is None and (scale := number(tiles.get("base_downsample"))):
        found = mpp / scale, "tile_spec"
    if found is None:
        msg = (
            f"{name}: its tile_spec does not say the slide's resolution; give --slides DIR, or "
            "--mpp, um per level-0 pixel"
        )
        raise DataError(msg)
    return imported_spec(int(size), mpp, int(step)), *found, ()
