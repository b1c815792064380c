"""Files of weights in, tensors one by one out; and tensors in, a folder of transformers' out."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from pathcli.errors import DataError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    State = dict[str, Tensor]

SHARD = 2 * 2**30  # bytes
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("state_dict", "model", "module")  # mmengine's, LAVIS', DeepSpeed's


class _Inert:
    """Stands for whatever a pickle holds beside tensors, and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Self:
        return super().__new__(cls)

    def __call__(self, *_: object, **__: object) -> Self:
        return self

    append = extend = add = __setitem__ = __setstate__ = __call__


class _Tensors(pickle.Unpickler):
    """Reads tensors; what else a file asks for becomes `_Inert`, and is never imported."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - classes and functions
        known = {f.__name__: f for f in (_rebuild_tensor_v2, _rebuild_parameter, OrderedDict)}
        if module in {"torch._utils", "collections"} and name in known:
            return known[name]
        found = getattr(torch, name, None) if module == "torch" else None
        return found if found is torch.Size or isinstance(found, torch.dtype) else _Inert


def read_pickle(file: Path) -> State:
    """Return what a file of torch.save holds, mapped from the disk and not read into memory.

    Raises:
        DataError: it is none, is damaged, or holds no tensors by name.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            program = any(name.endswith("constants.pkl") for name in archive.namelist())
        # calls less than `weights_only` would, and bears what else is kept beside tensors
        reader: Any = SimpleNamespace(__name__=__name__, Unpickler=_Tensors)
        held: Any = {}
        if not program:  # of TorchScript
            held = torch.load(file, "cpu", reader, weights_only=False, mmap=True)
    except Exception as error:  # unpicklers raise whatever the bytes provoke
        empty = "an empty file" if not file.stat().st_size else "damaged, or no file of torch.save"
        msg = f"{file}: no weights can be read here ({empty})"
        raise DataError(msg) from error
    for wrapper in _WRAPPERS:
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    named = isinstance(held, dict) and all(isinstance(x, Tensor) for x in held.values())
    if not named or not held:
        msg = f"{file}: holds no tensors by name, so it is no checkpoint"
        raise DataError(msg)
    ddp = all(name.startswith("module.") for name in held)
    return {name.removeprefix("module.") if ddp else name: t for name, t in held.items()}


def stream(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file one by one, by name.

    Raises:
        DataError: it is damaged, or no file of weights.
    """
    if file.suffix != ".safetensors":
        yield from read_pickle(file).items()
        return
    try:
        with safe_open(file, "pt") as held:
            for name in held.keys():  # noqa: SIM118 - it is no mapping
                yield name, held.get_tensor(name)
    except Exception as error:  # safetensors has its own, undocumented error
        msg = f"{file}: corrupt weights (not safetensors, or cut short)"
        raise DataError(msg) from error


def weight_files(folder: Path) -> list[Path]:
    """Return the files of transformers' weights in a folder: of its index, or the one there is.

    Raises:
        DataError: the index is damaged.
        ResourceError: a file it names is missing.
    """
    index = next((folder / name for name in _INDEXES if (folder / name).is_file()), None)
    if index is None:
        return [folder / name for name in _WHOLE if (folder / name).is_file()][:1]
    try:
        files = sorted({folder / str(name) for name in read_json(index)["weight_map"].values()})
    except (KeyError, AttributeError) as error:
        msg = f"{index}: damaged index of weights"
        raise DataError(msg) from error
    if gone := [file.name for file in files if not file.is_file()]:
        msg = f"{index} names {len(files)} files, of which {', '.join(gone)} is not here; fetch it"
        raise ResourceError(msg)
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ResourceError: there is no such file.
        DataError: it is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        msg = f"{path}: is not here"
        raise ResourceError(msg) from None
    except ValueError as error:
        msg = f"{path}: not JSON ({error})"
        raise DataError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path}: not a JSON object"
        raise DataError(msg)
    return found


# --- writing -------------------------------------------------------------------------------


class Shards:
    """Writes tensors as a folder of transformers', in files of at most `SHARD` bytes."""

    def __init__(self, folder: Path) -> None:
        """Begin with an empty folder."""
        self.folder, self.shapes, self.files = folder, dict[str, tuple[int, ...]](), list[Path]()
        self._held: State = {}
        self._map: dict[str, int] = {}
        self._size = self.bytes = 0
        self.dtype: torch.dtype | None = None
        folder.mkdir()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; DataError when there was one of this name before."""
        if name in self.shapes:
            msg = f"{name} is there twice, in different files"
            raise DataError(msg)
        if self._held and self._size + tensor.nbytes > SHARD:
            self._flush()
        self.dtype = self.dtype or tensor.dtype
        self.shapes[name], self._map[name] = tuple(tensor.shape), len(self.files)
        self._held[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._size += tensor.nbytes
        self.bytes += tensor.nbytes

    def _flush(self) -> None:
        self.files.append(self.folder / f"{len(self.files)}.safetensors")
        save_file(self._held, self.files[-1], {"format": "pt"})
        self._held, self._size = {}, 0

    def close(self) -> None:
        """Write what is left, and the index where there are several files."""
        self._flush()
        if len(self.files) == 1:
            self.files[0].rename(self.folder / _WHOLE[0])
            return
        last = len(self.files)
        called = [f"model-{n:05}-of-{last:05}.safetensors" for n in range(1, last + 1)]
        for file, new in zip(self.files, called, strict=True):
            file.rename(self.folder / new)
        found = {"weight_map": {name: called[n] for name, n in self._map.items()}}
        text = json.dumps({"metadata": {"total_size": self.bytes}, **found}, indent=1)
        (self.folder / _INDEXES[0]).write_text(text, encoding="utf-8")


def refuse_faults(faults: Sequence[str], source: Path) -> None:
    """Raise DataError for the first of what keeps tensors from their places."""
    if faults:
        msg = f"{source}: {faults[0]} ({len(faults)} tensors in all); is the download whole?"
        raise DataError(msg)
