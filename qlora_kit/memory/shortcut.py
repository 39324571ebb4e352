"""Remembers what operators on `meta` return, so that the many equal layers of a model are worked out once.

torch works the results on `meta` out in Python, a millisecond an operator.
"""

from __future__ import annotations

from typing import Any

import torch

_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
_Key = tuple[Any, ...]


class MetaResults:
    """Layouts of results by operator and arguments; for operators that neither change nor share their arguments.

    Of those that write into their first argument it knows which leave its layout as it is: on `meta` they do nothing.
    """

    def __init__(self) -> None:
        self._known: dict[_Key, tuple[bool, list[_Layout | None]]] = {}
        self._pure: dict[Any, bool] = {}
        self._writes: dict[Any, bool] = {}
        self._idle: set[_Key] = set()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func` on `meta`: fresh tensors with the layouts that it had before, or worked out now."""
        pure = self._pure.get(func)
        if pure is None:
            pure = self._pure[func] = _is_pure(func)
        key = _key(func, args, kwargs) if pure else None
        if key is None:
            return func(*args, **kwargs) if pure else self._run_writing(func, args, kwargs)
        known = self._known.get(key)
        if known is None:
            result = func(*args, **kwargs)
            if _shares(result, args):  # `_unsafe_view` does, and its schema does not say so
                self._pure[func] = False
            else:
                self._remember(key, result)
            return result
        single, layouts = known
        tensors = [
            None if layout is None else torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
            for layout in layouts
        ]
        return tensors[0] if single else tuple(tensors)

    def _run_writing(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        writes = self._writes.get(func)
        if writes is None:
            writes = self._writes[func] = _writes_into_first(func)
        key = _key(func, args, kwargs) if writes else None
        if key is None:
            return func(*args, **kwargs)
        if key in self._idle:
            return args[0]
        before = _place(args[0])
        result = func(*args, **kwargs)
        if result is args[0] and _place(result) == before:
            self._idle.add(key)
        return result

    def _remember(self, key: _Key, result: Any) -> None:
        single = isinstance(result, torch.Tensor)
        parts = [result] if single else result
        if isinstance(parts, (tuple, list)) and all(p is None or _is_dense(p) for p in parts):
            layouts = [None if p is None else (tuple(p.shape), p.stride(), p.dtype) for p in parts]
            self._known[key] = (single, layouts)


def _is_pure(func: Any) -> bool:
    schema = func._schema
    shares = any(part.alias_info is not None for part in (*schema.arguments, *schema.returns))
    lists = any("Tensor[]" in str(part.type) for part in schema.returns)  # a tuple is not the list they give
    return not shares and not lists and func.namespace == "aten"


def _writes_into_first(func: Any) -> bool:
    """Whether `func` changes its first argument, no other, and returns it."""
    changed = [part.alias_info is not None and part.alias_info.is_write for part in func._schema.arguments]
    returned = [part.alias_info is not None for part in func._schema.returns]
    return changed[:1] == [True] and changed.count(True) == 1 and returned == [True] and func.namespace == "aten"


def _place(tensor: Any) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    return tensor.shape, tensor.stride(), tensor.storage_offset(), storage._cdata, storage.nbytes()


def _shares(result: Any, args: tuple[Any, ...]) -> bool:
    parts = [result] if isinstance(result, torch.Tensor) else result
    made = {p.untyped_storage()._cdata for p in parts if isinstance(p, torch.Tensor)}
    return any(isinstance(a, torch.Tensor) and a.untyped_storage()._cdata in made for a in args)


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Key | None:
    parts: list[Any] = [func]
    for value in (*args, *kwargs.items()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            if value.device.type != "meta":
                return None
            parts.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            inner = _key(type(value), tuple(value), {})
            if inner is None:
                return None
            parts.append(inner)
        else:
            parts.append((type(value), value))
    return tuple(parts)


def _is_dense(result: Any) -> bool:
    """Whether a fresh tensor of the same layout has a storage of the same size."""
    if not isinstance(result, torch.Tensor) or result.device.type != "meta" or result.storage_offset():
        return False
    last = sum((n - 1) * stride for n, stride in zip(result.shape, result.stride(), strict=True))
    return result.untyped_storage().nbytes() == (last + 1 if result.numel() else 0) * result.element_size()
