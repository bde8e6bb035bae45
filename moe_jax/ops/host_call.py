"""Calls a numpy function from a program that XLA runs on a CPU, without copying its arrays.

`jax.pure_callback` copies its inputs to a device again, and copies the results. Here XLA calls a C
function made by ctypes through its foreign function interface
(https://openxla.org/xla/custom_call), and numpy works on views of XLA's buffers.
"""

import atexit
import contextlib
import ctypes
import functools
import math
import traceback
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_void_p

import jax
import jax.numpy as jnp
import numpy as np

_VERSION = (0, 3)  # the interface's version that is used here
_EXECUTE = 3  # the stage of a call that computes
_METADATA = 1  # the extension by which XLA asks for the version
_INTERNAL = 13  # the error code INTERNAL
_DTYPES = {
    4: np.int32,
    5: np.int64,
    10: np.float16,
    11: np.float32,
    12: np.float64,
    16: jnp.bfloat16,
}


def call(
    name: str, results: Sequence[jax.ShapeDtypeStruct], *arrays: jax.Array, flops: int
) -> Sequence[jax.Array]:
    """Calls the function registered as `name` with arrays of a traced program.

    Args: flops: the FLOPs of its products, which `dryrun/hlo.py` reads from the compiled program.
    """
    _wait_at_exit()
    function = jax.ffi.ffi_call(name, results, vmap_method="sequential")
    return function(*arrays, flops=np.int64(flops))


@functools.cache
def _wait_at_exit() -> None:
    """Waits for calls to end before the interpreter exits: a later call would wait forever."""

    def wait():
        with contextlib.suppress(Exception):  # a failure has been reported, or nobody needs it
            jax.block_until_ready(jax.live_arrays())

    atexit.register(wait)


def register(name: str, function: Callable) -> None:
    """Makes a numpy function known to XLA.

    function(inputs, outputs): lists of numpy arrays; it fills the outputs. Several devices may call
    at the same time.
    """

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Call))
    def entry(frame):
        frame = frame.contents
        if frame.extension and frame.extension.contents.type == _METADATA:  # only at registration
            version = frame.extension.contents.metadata.contents.version
            version.major, version.minor = _VERSION
        elif frame.stage == _EXECUTE:
            try:
                function(frame.inputs.arrays(), frame.outputs.arrays())
            except Exception:  # exceptions cannot cross into XLA, which raises this text instead
                return frame.api.contents.error(traceback.format_exc())
        return None

    _ALIVE.append(entry)
    jax.ffi.register_ffi_target(
        name, jax.ffi.pycapsule(ctypes.cast(entry, ctypes.c_void_p).value), platform="cpu"
    )


_ALIVE: list[Callable] = []  # keeps the C functions alive, because XLA stores only addresses


# The structs below follow xla/ffi/api/c_api.h, up to the last field that is read.


def _fields(**fields) -> list[tuple[str, type]]:
    """The fields of a struct, preceded by its size and a list of extensions."""
    start = {"size": c_size_t, "extension": c_void_p}
    return [*(start | fields).items()]


class _Version(Structure):
    _fields_ = _fields(major=c_int, minor=c_int)


class _Metadata(Structure):
    _fields_ = (("size", c_size_t), ("version", _Version))


class _Extension(Structure):
    _fields_ = (
        ("size", c_size_t),
        ("type", c_int),
        ("next", c_void_p),
        ("metadata", POINTER(_Metadata)),
    )


class _Buffer(Structure):
    _fields_ = _fields(dtype=c_int, data=c_void_p, rank=c_int64, dims=POINTER(c_int64))

    def array(self) -> np.ndarray:
        shape, dtype = tuple(self.dims[: self.rank]), np.dtype(_DTYPES[self.dtype])
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return np.empty(shape, dtype)
        memory = (ctypes.c_char * num_bytes).from_address(self.data)
        return np.frombuffer(memory, dtype).reshape(shape)


class _Buffers(Structure):
    _fields_ = _fields(number=c_int64, types=c_void_p, buffers=POINTER(POINTER(_Buffer)))

    def arrays(self) -> list[np.ndarray]:
        return [self.buffers[i].contents.array() for i in range(self.number)]


class _Error(Structure):
    _fields_ = _fields(message=c_char_p, code=c_int)


class _Api(Structure):
    _fields_ = _fields(
        version=_Version, internal=c_void_p, make_error=CFUNCTYPE(c_void_p, POINTER(_Error))
    )

    def error(self, message: str) -> int:
        return self.make_error(_Error(ctypes.sizeof(_Error), None, message.encode(), _INTERNAL))


class _Call(Structure):
    _fields_ = _fields(
        extension=POINTER(_Extension),
        api=POINTER(_Api),
        context=c_void_p,
        stage=c_int,
        inputs=_Buffers,
        outputs=_Buffers,
    )
