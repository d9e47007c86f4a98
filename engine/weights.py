"""Read weight files and fill modules with them, without ever holding them twice.

Modules are built on torch's meta device, where no weight exists, so nothing random is invented only
to be overwritten. They are then filled tensor by tensor from a memory-mapped file, each at once in
its dtype on its device. Mapped pages that were read count as resident until they are unmapped, so
the file is mapped anew every few MiB: the peak stays near the size of the weights themselves.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from engine.errors import SpeechError
from engine.machine import ask_for_huge_pages

MAX_WINDOW_BYTES = 64 << 20
"""Most bytes of a file that stay mapped and read; for small files it is a thirty-second of their size."""


class _Source(Protocol):
    """An open weight file. `forget` unmaps and maps it anew, so that what was read is no longer resident."""

    def keys(self) -> Sequence[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def tensor(self, key: str) -> torch.Tensor: ...

    def forget(self) -> None: ...


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = self._open()

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise _unreadable(self._path, str(error)) from error

    def keys(self) -> Sequence[str]:
        return self._file.offset_keys()  # in file order, which reads ahead well

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def tensor(self, key: str) -> torch.Tensor:
        return self._file.get_tensor(key)

    def forget(self) -> None:
        self._file = None  # first, so that the old and the new mapping never lie side by side
        self._file = self._open()


class _Zipped:
    """torch.save's format since 1.6. Its pickle is read once, onto the meta device, for it takes a second for some
    thousand tensors; the data is then mapped as often as needed at the offsets that torch noted on the storages
    (`_checkpoint_offset`, see torch's notes on serialization)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outline = _state_dict(path, load_pickled(path, "meta"))
        self._mapping: Any = None

    def keys(self) -> Sequence[str]:
        return list(self._outline)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._outline[key].shape)

    def tensor(self, key: str) -> torch.Tensor:
        outline = self._outline[key]
        storage = outline.untyped_storage()
        start = storage._checkpoint_offset
        assert start is not None, key
        data = self._mapped[start : start + storage.nbytes()]
        place = (outline.storage_offset(), outline.shape, outline.stride())
        return torch.empty(0, dtype=outline.dtype).set_(data, *place)

    @property
    def _mapped(self) -> Any:
        if self._mapping is None:
            self._mapping = torch.UntypedStorage.from_file(str(self._path), False, self._path.stat().st_size)
        return self._mapping

    def forget(self) -> None:
        self._mapping = None


class _Whole:
    """A .pt file that cannot be mapped by piece: torch.save's format before 1.6, or a torch that notes no offsets."""

    def __init__(self, path: Path) -> None:
        self._state = _state_dict(path, load_pickled(path))

    def keys(self) -> Sequence[str]:
        return list(self._state)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._state[key].shape)

    def tensor(self, key: str) -> torch.Tensor:
        return self._state[key]

    def forget(self) -> None:
        pass


def _offsets_are_noted() -> bool:
    """Whether this torch notes offsets when it loads to the meta device; seen in 2.13, not in every 2.x before."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(1), buffer)
    buffer.seek(0)
    storage = torch.load(buffer, map_location="meta", weights_only=True).untyped_storage()
    return getattr(storage, "_checkpoint_offset", None) is not None


def _state_dict(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), list | tuple) and loaded["model"]:
        loaded = loaded["model"][0]  # T3 as upstream's training saves it
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise _unreadable(path, "it does not hold a state dict")
    return loaded


class WeightFile:
    """A weight file, .safetensors or legacy .pt, read tensor by tensor. A context manager.

    Raises:
        SpeechError: weights_missing when the file is not there, is damaged, or (.pt) holds anything but tensors:
            pickles are read with weights_only, so that no code in them runs, and to the CPU, so that a file saved on
            a GPU loads without one.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise SpeechError("weights_missing", f"{self.path} is not there", "model")
        self.window_bytes = min(MAX_WINDOW_BYTES, self.path.stat().st_size // 32)
        self._num_bytes_read = 0
        self._source: _Source | None = self._open()

    def _open(self) -> _Source:
        if self.path.suffix == ".safetensors":
            return _Safetensors(self.path)
        return _Zipped(self.path) if _is_zip(self.path) and _offsets_are_noted() else _Whole(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file. Tensors that were handed out keep their own hold on it."""
        self._source = None

    @property
    def _opened(self) -> _Source:
        assert self._source is not None, f"{self.path} is closed"
        return self._source

    def keys(self) -> Sequence[str]:
        """In file order."""
        return self._opened.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._opened.shape(key)

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor on the CPU, a view of the mapped file: copy what is to outlive it."""
        return self._opened.tensor(key)

    def note_read(self, num_bytes: int) -> None:
        """Tell that so much was copied out; past the window the file is mapped afresh, which frees what was read."""
        self._num_bytes_read += num_bytes
        if self._num_bytes_read >= self.window_bytes:
            self._opened.forget()
            self._num_bytes_read = 0


def load_pickled(path: Path | str, device: str = "cpu") -> Any:
    """Read a .pt file: tensors in plain containers, memory-mapped where its format allows.

    Args:
        device: "cpu", or "meta" for shapes and dtypes without the data.

    Raises:
        SpeechError: weights_missing when it is damaged or holds anything else.
    """
    path = Path(path)
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=_is_zip(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unreadable(path: Path, why: str) -> SpeechError:
    return SpeechError("weights_missing", f"{path} cannot be read as weights: {why}", "model")


# ---------------------------------------------------------------------------------- empty modules

_INITIALISERS = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_})


class _WithoutInitialValues(TorchFunctionMode):
    """Passes over what would fill a tensor that holds nothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _INITIALISERS or getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Build modules on the meta device, to be filled by `load_module`.

    torch works initialisers out in Python for the meta device, for which it imports its compiler: without them a
    module is laid out several times faster. The mode is this thread's alone and ends with the block.
    """
    with torch.device("meta"), _WithoutInitialValues():
        yield


# ---------------------------------------------------------------------------------- filling modules


@dataclass(frozen=True)
class Combined:
    """A parameter that is made from several tensors of the file, or from one in another layout.

    Args:
        keys: the file's keys, after prefix and rename.
        combine: gets their tensors in that order, gives the parameter:
            `Combined(("q", "k"), lambda q, k: torch.cat([q, k]))`.
    """

    keys: tuple[str, ...]
    combine: Callable[..., torch.Tensor]


Module = TypeVar("Module", bound=nn.Module)
Rename = Callable[[str], str | None] | Mapping[str, str | None]


def load_module(
    module: Module,
    weights: WeightFile,
    *,
    device: torch.device | str = "cpu",
    dtype_for: Callable[[str], torch.dtype] | None = None,
    prefix: str = "",
    rename: Rename | None = None,
    combined: Mapping[str, Combined] | None = None,
    strict: bool = True,
) -> Module:
    """Fill a module that was built under `torch.device("meta")`, and give it back in eval mode, without gradients.

    Args:
        module: what the file does not hold and is not in its state dict (tables, masks) must be filled already.
        device: where the parameters go; what was filled already is moved there too.
        dtype_for: dtype of a floating point tensor by the module's name for it; None for float32 throughout.
            Integer tensors keep theirs.
        prefix: take only the file's keys that start with it, without it ("flow.").
        rename: file key (without prefix) to module key, None to drop it; a mapping leaves other keys alone.
        combined: module keys that are made of others.
        strict: the file's and the module's keys must be the same. Otherwise keys that the module lacks are passed over,
            and what the file lacks is left alone if it is filled already.

    Raises:
        SpeechError: weights_missing, naming keys that are missing, not expected, or of another shape.
    """
    plan = _plan(module, weights, prefix, rename, combined or {}, strict=strict)
    names_of = _names_by_tensor(module)
    for name, source in plan.items():
        old, names = names_of[name]
        dtype = (dtype_for(name) if dtype_for else torch.float32) if old.is_floating_point() else old.dtype
        new = _read(weights, name, source, old.shape, torch.device(device), dtype)
        new = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        for tied in names:  # what was one object on the meta device is one again
            _place(module, tied, new)
    _assert_filled(module)
    return module.to(device).eval().requires_grad_(False)


def _plan(
    module: nn.Module,
    weights: WeightFile,
    prefix: str,
    rename: Rename | None,
    combined: Mapping[str, Combined],
    *,
    strict: bool,
) -> dict[str, Combined]:
    """Module key → the file's keys that make it, in file order; complete and of the right shapes."""
    renamed = dict(_renamed(weights.keys(), prefix, rename))
    parts = {key for made in combined.values() for key in made.keys}
    names = {name: Combined((name,), _as_it_is) for name in renamed if name not in parts} | dict(combined)
    wanted = module.state_dict(keep_vars=True)
    unexpected = sorted(names.keys() - wanted.keys())
    missing = _missing_names(wanted, names, strict=strict) + sorted(parts - renamed.keys())
    plan = {name: made for name, made in names.items() if name in wanted}
    wrong = [
        f"{name} {_shape(weights.shape(renamed[name]))}, expected {_shape(wanted[name].shape)}"
        for name, made in plan.items()
        if made.combine is _as_it_is and weights.shape(renamed[name]) != tuple(wanted[name].shape)
    ]
    _refuse(weights.path, missing=missing, unexpected=unexpected if strict else [], misshapen=wrong)
    return {name: Combined(tuple(renamed[key] for key in made.keys), made.combine) for name, made in plan.items()}


def _renamed(keys: Sequence[str], prefix: str, rename: Rename | None) -> Iterator[tuple[str, str]]:
    """(module's name, file's key) of every key that is not left out."""
    for key in keys:
        if not key.startswith(prefix):
            continue
        short = key.removeprefix(prefix)
        name = short if rename is None else rename(short) if callable(rename) else rename.get(short, short)
        if name is not None:
            yield name, key


def _missing_names(wanted: Mapping[str, torch.Tensor], given: Mapping[str, object], *, strict: bool) -> list[str]:
    """Names that nothing fills: tied parameters are filled by any of their names."""
    covered = {id(wanted[name]) for name in given if name in wanted}
    return [
        name
        for name, tensor in wanted.items()
        if name not in given and id(tensor) not in covered and (strict or tensor.is_meta)
    ]


def _refuse(path: Path, **found: list[str]) -> None:
    complaints = [f"{len(keys)} {what}: {_listed(keys)}" for what, keys in found.items() if keys]
    if complaints:
        raise SpeechError("weights_missing", f"{path} does not fit the model: {'; '.join(complaints)}", "model")


def _listed(keys: Sequence[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _shape(shape: Sequence[int]) -> str:
    return "×".join(str(size) for size in shape) or "scalar"


def _names_by_tensor(module: nn.Module) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Name → its tensor and all names of that tensor."""
    tensors = module.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: (tensor, names[id(tensor)]) for name, tensor in tensors.items()}


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _read(
    weights: WeightFile, name: str, source: Combined, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """A fresh tensor with the file's values: never a view of the mapped file, whose pages are to be freed."""
    new = ask_for_huge_pages(torch.empty(shape, dtype=dtype, device=device))
    if source.combine is _as_it_is:
        _copy_by_rows(weights, source.keys[0], new)
        return new
    made = source.combine(*(weights.tensor(key) for key in source.keys))
    if made.shape != shape:
        _refuse(weights.path, misshapen=[f"{name} {_shape(made.shape)}, expected {_shape(shape)}"])
    new.copy_(made)
    weights.note_read(made.numel() * made.element_size())
    return new


def _copy_by_rows(weights: WeightFile, key: str, new: torch.Tensor) -> None:
    """Copy a tensor in pieces: an embedding of 200 MB in float32 would otherwise stand beside its bf16 copy whole."""
    if not new.ndim or not new.numel():
        new.copy_(weights.tensor(key))
        return
    rows = max(1, weights.window_bytes * len(new) // (new.numel() * 4))
    for start in range(0, len(new), rows):
        piece = weights.tensor(key)[start : start + rows]
        new[start : start + rows].copy_(piece)
        num_bytes = piece.numel() * piece.element_size()
        del piece  # it holds the mapping that is about to be given up
        weights.note_read(num_bytes)


def _place(module: nn.Module, name: str, new: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    if leaf in holder._parameters:
        assert isinstance(new, nn.Parameter), name
        holder._parameters[leaf] = new
    else:
        holder._buffers[leaf] = new


def _assert_filled(module: nn.Module) -> None:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"still on the meta device, to be filled before loading: {', '.join(left)}"
