"""What numba has no words for: addresses as pointers, calls by address, and the processor's mode for tiny numbers."""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_HAS_SSE = platform.machine().lower() in ("x86_64", "amd64")
_FLUSH = 0x8040  # of the register MXCSR: denormals count as 0, as results and as operands


@intrinsic
def pointer(context, address):
    """A number as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _call(builder, address, result):
    function = builder.inttoptr(address, ir.FunctionType(result, []).as_pointer())
    return builder.call(function, [])


@intrinsic
def call_for_number(context, address):
    """Call a C function `int f(void)` by its address."""

    def generate(context, builder, signature, arguments):
        return builder.sext(_call(builder, arguments[0], ir.IntType(32)), ir.IntType(64))

    return types.int64(address), generate


@intrinsic
def call(context, address):
    """Call a C function `void f(void)` by its address."""

    def generate(context, builder, signature, arguments):
        _call(builder, arguments[0], ir.VoidType())
        return context.get_dummy_value()

    return types.void(address), generate


@intrinsic
def without_denormals(context):
    """From here on this thread takes numbers below 1e-38 for 0: some processors compute them a hundred times slower.

    Returns what `with_denormals_as` needs to bring its mode back. Where there is no SSE nothing happens.
    """

    def generate(context, builder, signature, arguments):
        if not _HAS_SSE:
            return ir.Constant(ir.IntType(32), 0)
        before = cgutils.alloca_once(builder, ir.IntType(32))
        _control(builder, "st", before)
        now = cgutils.alloca_once_value(builder, builder.or_(builder.load(before), ir.Constant(ir.IntType(32), _FLUSH)))
        _control(builder, "ld", now)
        return builder.load(before)

    return types.int32(), generate


@intrinsic
def with_denormals_as(context, mode):
    """The mode as it was, see `without_denormals`."""

    def generate(context, builder, signature, arguments):
        if _HAS_SSE:
            _control(builder, "ld", cgutils.alloca_once_value(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.int32), generate


def _control(builder, way, place):
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{way}mxcsr")
    builder.call(function, [builder.bitcast(place, cgutils.voidptr_t)])
