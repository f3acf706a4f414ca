"""A second device where there is none: tensors that are sent to it stay where they are, and are known by it.

What mixes one of it with one of the CPU, as CUDA would refuse it, is refused. Tensors of which it is not known where
they are made (a model's) may meet either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

THERE = torch.device("xpu")  # which no machine of ours has
_HERE = torch.device("cpu")
_FACTORIES = {torch.tensor, torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.randn, torch.stack}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}  # by a CPU's indices is allowed


class TwoPlaces(TorchFunctionMode):
    """While it is on, `device=THERE` and `.to(THERE)` make tensors that are there, and all others are here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return THERE if _place(args[0]) == THERE else func(*args)
        devices = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.device)]
        moved = devices[0] if devices else _HERE if func is Tensor.cpu else None
        args = tuple(_HERE if isinstance(one, torch.device) else one for one in args)
        kwargs = {name: _HERE if isinstance(one, torch.device) else one for name, one in kwargs.items()}
        places = {place for one in _tensors((args, kwargs)) if one.dim() and (place := _place(one)) is not None}
        if len(places) > 1 and func not in _INDEXING and func is not Tensor.copy_:
            raise RuntimeError(f"{resolve_name(func)} of tensors on two devices")
        found = func(*args, **kwargs)
        place = moved or next(iter(places), _HERE if func in _FACTORIES and not types else None)
        if moved is not None and any(found is one for one in args):  # it did not move: the other is another tensor
            found = found.clone()
        for one in _tensors(found):
            one.place = place  # type: ignore[attr-defined]
        return found


def _place(tensor: Tensor) -> torch.device | None:
    return tensor.__dict__.get("place")


def _tensors(of: Any) -> Iterator[Tensor]:
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, dict):
        yield from _tensors(list(of.values()))
    elif isinstance(of, list | tuple):
        for one in of:
            yield from _tensors(one)
