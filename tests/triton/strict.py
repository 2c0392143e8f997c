"""Triton's CPU interpreter, made as strict as a test needs: values as a GPU would round them, and no access that a GPU would not forgive.

Triton runs a kernel on the CPU when TRITON_INTERPRET=1 is set before its first import. ``install()`` then adds

- bfloat16 by ml_dtypes. The interpreter holds it as 16-bit integers, and multiplies those.
- a bounds check of every load, store and atomic against the tensors given to the launch.
- poison in the lanes of a masked load that names no ``other=``; a GPU leaves them undefined, the interpreter makes them zero.
- a race check: a plain store to bytes that another program of the launch touched, or a load of bytes that another one stored, raises.
- ``schedule()``: programs interleaved at their atomics, so that kernels whose programs wait for each other finish here.
- ``tl.device_assert``, and autotuned kernels without a driver (they run their first configuration).

Not seen here: the rounding of TF32, the order in which tensor cores add, races between the threads of one program.
The names that are replaced are private, so Triton is pinned to the version they were read in.
"""

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import greenlet
import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.autotuner import Autotuner

TRITON_VERSION = "3.8.0"
BF16 = np.dtype(ml_dtypes.bfloat16)
U16 = np.dtype(np.uint16)
PAGE_BITS = np.uint64(12)
Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


class KernelMemoryError(RuntimeError):
    """A kernel touched memory that is not its own to touch."""


# --- bfloat16 -------------------------------------------------------------------------------------------------------------
_plain_numpy_dtype, _plain_convert = interpreter._get_np_dtype, interpreter._convert_float
_plain_dot, _plain_rmw, _plain_cas = Builder.create_dot, Builder.create_atomic_rmw, Builder.create_atomic_cas
_PlainExecutor = interpreter.GridExecutor


def _numpy_dtype(dtype: Any) -> np.dtype:
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return BF16 if scalar == tl.bfloat16 else _plain_numpy_dtype(dtype)


def _convert_float(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    if tl.bfloat16 not in (source, target):
        return _plain_convert(data, source, target, rounding_mode)
    if target.primitive_bitwidth == 8:
        return _plain_convert(data.astype(np.float32), tl.float32, target, rounding_mode)
    if source.primitive_bitwidth == 8:
        return _plain_convert(data, source, tl.float32, None).view(np.float32).astype(BF16)
    return np.ascontiguousarray(data.astype(np.float32).astype(_numpy_dtype(target)))


def _cast(self: Any, source: Any, target: Any) -> Any:
    data = source.data
    if source.dtype.scalar == tl.bfloat16 and target.scalar != tl.bfloat16:
        data = data.astype(np.float32)
    return Handle(data.astype(_numpy_dtype(target)), target.scalar)


def _dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
    """Products of 16-bit floats are exact in fp32 and added there, as tensor cores do."""

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar not in (tl.bfloat16, tl.float16):
            return handle
        return Handle(handle.data.astype(np.float32), tl.float32)

    narrow = accumulator.dtype.scalar
    if narrow not in (tl.bfloat16, tl.float16):
        return _plain_dot(self, widened(a), widened(b), accumulator, *rest)
    result = _plain_dot(self, widened(a), widened(b), widened(accumulator), *rest)
    return Handle(result.data.astype(_numpy_dtype(narrow)), narrow)


# --- memory ---------------------------------------------------------------------------------------------------------------
class _Memory:
    """The bytes of the tensors of a launch, and which program touched each last."""

    def __init__(self) -> None:
        self.reachable: list[torch.Tensor] = []
        self.reset([])

    def reset(self, tensors: list[torch.Tensor]) -> None:
        spans = []
        for t in [*tensors, *self.reachable]:
            if t.numel():
                last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
                spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
        merged: list[list[int]] = []
        for low, high in sorted(spans):
            if merged and low < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        self.low = np.array([m[0] for m in merged], np.uint64)
        self.high = np.array([m[1] for m in merged], np.uint64)
        # By page, so that a tensor whose rows lie far apart costs what it touches.
        self.touched: dict[str, dict[int, np.ndarray]] = {"store": {}, "load": {}, "atomic": {}}

    def check(self, kind: str, pointers: np.ndarray, mask: np.ndarray, width: int) -> None:
        pointers = np.asarray(pointers)
        live = np.broadcast_to(np.asarray(mask), pointers.shape).reshape(-1).astype(bool)
        flat = pointers.reshape(-1).astype(np.uint64)[live]
        if not flat.size:
            return
        builder = interpreter.interpreter_builder
        span = np.searchsorted(self.low, flat, side="right").astype(np.int64) - 1
        outside = span < 0
        if len(self.high):
            outside |= flat + np.uint64(width) > self.high[np.maximum(span, 0)]
        if outside.any():
            raise KernelMemoryError(f"{kind} out of bounds by program {builder.grid_idx}: {int(outside.sum())} of {flat.size} lanes")
        x, y, z = builder.grid_idx
        me = x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)
        bytes_ = (flat[:, None] + np.arange(width, dtype=np.uint64)).reshape(-1)
        pages, places = bytes_ >> PAGE_BITS, (bytes_ & np.uint64((1 << int(PAGE_BITS)) - 1)).astype(np.int64)
        for page in np.unique(pages).tolist():
            here = places[pages == page]
            for other in {"store": ("store", "load", "atomic"), "load": ("store",), "atomic": ("store",)}[kind]:
                owners = self.touched[other].get(page)
                if owners is not None and (((owner := owners[here]) >= 0) & (owner != me)).any():
                    raise KernelMemoryError(
                        f"race: {kind} by program {builder.grid_idx} on bytes that program {owner.max()} had a {other} on"
                    )
            self.touched[kind].setdefault(page, np.full(1 << int(PAGE_BITS), -1, np.int32))[here] = me


MEMORY = _Memory()


def _load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
    element = pointers.get_element_ty()
    dtype = _numpy_dtype(element)
    MEMORY.check("load", pointers.data, mask.data, dtype.itemsize)
    if other is None:
        data = np.full(pointers.data.shape, np.nan if element.is_floating() else 0, dtype)
        if dtype.kind in "iu":
            data.fill(np.iinfo(dtype).max // 3)
    else:
        data = np.ascontiguousarray(np.broadcast_to(other.data, pointers.data.shape)).astype(dtype, copy=False)
    # The loader knows no bfloat16; its bits travel as integers.
    raw = U16 if dtype == BF16 else dtype
    result = interpreter._interpreter.load(pointers.data, mask.data, data.view(raw), raw)
    return Handle(result.view(dtype), element)


def _store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any, **__: Any) -> Any:
    MEMORY.check("store", pointers.data, mask.data, _numpy_dtype(pointers.get_element_ty()).itemsize)
    data = np.ascontiguousarray(value.data).view(U16) if value.data.dtype == BF16 else value.data
    return interpreter._interpreter.store(pointers.data, data, mask.data)


def _rmw(self: Any, op: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _give_way()
    MEMORY.check("atomic", pointer.data, mask.data, value.data.dtype.itemsize)
    if value.dtype.scalar in (tl.bfloat16, tl.float16, tl.float32, tl.float64):
        raise NotImplementedError("an atomic on floats: its order of additions differs from run to run")
    return _plain_rmw(self, op, pointer, value, mask, *rest)


def _cas(self: Any, pointer: Any, *rest: Any) -> Any:
    _give_way()
    MEMORY.check("atomic", pointer.data, np.ones_like(pointer.data, bool), _numpy_dtype(pointer.get_element_ty()).itemsize)
    return _plain_cas(self, pointer, *rest)


# --- scheduling -----------------------------------------------------------------------------------------------------------
_schedule: dict[str, Any] = {"mode": "sequential", "seed": 0, "resident": 64}


def _give_way() -> None:
    """Let another program run, where programs are interleaved."""
    current = greenlet.getcurrent()
    if current.parent is not None:
        index = interpreter.interpreter_builder.grid_idx
        current.parent.switch()
        interpreter.interpreter_builder.set_grid_idx(*index)


class _Executor(_PlainExecutor):
    def _init_args_hst(self, args: Any, kwargs: Any) -> Any:
        host, host_kwargs = super()._init_args_hst(args, kwargs)
        MEMORY.reset(list(_tensors([*host, *host_kwargs.values()])))
        return host, host_kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        kernel = self.fn
        if _schedule["mode"] != "sequential":
            self.fn = _interleaved(kernel)
        try:
            super().__call__(*args, **kwargs)
        finally:
            self.fn = kernel


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, interpreter.TensorDescriptor):
            yield from _tensors([value.base])
        elif hasattr(value, "data_ptr"):
            yield interpreter._unwrap_tensor(value)


def _interleaved(kernel: Callable[..., None]) -> Callable[..., None]:
    """Collects the programs of a launch; the last one to arrive runs them all, in turns."""
    builder, waiting = interpreter.interpreter_builder, []

    def collect(**arguments: Any) -> None:
        waiting.append((builder.grid_idx, arguments))
        if len(waiting) < int(np.prod(builder.grid_dim)):
            return
        order = random.Random(_schedule["seed"])
        if _schedule["mode"] == "shuffle":
            order.shuffle(waiting)
        alive: list[tuple[greenlet.greenlet, Any]] = []
        while waiting or alive:
            while waiting and len(alive) < _schedule["resident"]:
                index, mine = waiting.pop(0)
                alive.append((greenlet.greenlet(lambda mine=mine: kernel(**mine)), index))
            turn = order.randrange(len(alive))
            program, index = alive[turn]
            builder.set_grid_idx(*index)
            program.switch()
            if program.dead:
                alive.pop(turn)

    # The executor reads the kernel's signature from whatever it runs.
    collect.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    collect.__annotations__ = kernel.__annotations__
    return collect


@contextlib.contextmanager
def schedule(mode: str, seed: int = 0, resident: int = 64) -> Iterator[None]:
    """Run programs "sequential" (the default), "ordered" or "shuffle"d, at most ``resident`` at a time, switching at atomics."""
    before = dict(_schedule)
    _schedule.update(mode=mode, seed=seed, resident=resident)
    try:
        yield
    finally:
        _schedule.update(before)


@contextlib.contextmanager
def reachable(*tensors: torch.Tensor) -> Iterator[None]:
    """Tensors that a kernel reaches through pointers in memory, not through its arguments."""
    MEMORY.reachable = list(tensors)
    try:
        yield
    finally:
        MEMORY.reachable = []


def install() -> None:
    """Replace the interpreter's parts. Once, before the first launch, in a process of its own."""
    if triton.__version__ != TRITON_VERSION:
        raise RuntimeError(f"triton is {triton.__version__}; the interpreter's strict layer is written for {TRITON_VERSION}")
    interpreter._get_np_dtype, interpreter._convert_float = _numpy_dtype, _convert_float
    Builder.cast_impl, Builder.create_dot = _cast, _dot
    Builder.get_bf16 = lambda self, value: Handle(np.array([value], BF16), tl.bfloat16)
    Builder.create_masked_load, Builder.create_masked_store = _load, _store
    Builder.create_atomic_rmw, Builder.create_atomic_cas = _rmw, _cas
    interpreter.GridExecutor = _Executor
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True, default_dot_input_precision="ieee")

    def bench(self: Any) -> Callable[..., tuple[float, ...]]:
        def once(run: Callable[[], None], quantiles: Any = None) -> tuple[float, ...]:
            run()
            return (0.0, 0.0, 0.0)

        return once

    Autotuner.do_bench = property(bench, lambda self, value: None)
