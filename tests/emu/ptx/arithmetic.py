"""Instructions whose result depends on their operands alone: each family gives (function, sources, destination)."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from emu.ptx.ptx_types import DTYPES, Unknown

INTEGER = {f"{k}{b}" for k in "us" for b in (16, 32, 64)}
FLOAT = {"f32", "f64"}
BITWISE = {"b16", "b32", "b64", "pred"}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """To nearest even; NaN becomes 0x7fff."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def fma_f32(x, y, z) -> np.ndarray:
    """x y + z with one rounding. The product is exact in double; the sum is rounded to odd there, so that the rounding to
    single is that of the exact sum."""
    product = x.astype(np.float64) * y.astype(np.float64)
    addend = np.asarray(z, np.float64)
    product, addend = np.broadcast_arrays(product, addend)
    total = product + addend
    other = total - product
    error = (product - (total - other)) + (addend - other)  # exact
    bits = np.ascontiguousarray(total).view(np.int64)
    odd = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(odd, bits + step, bits).view(np.float64).astype(np.float32)


def fma_f64(x, y, z) -> np.ndarray:
    x, y, z = (np.ascontiguousarray(v) for v in np.broadcast_arrays(x, y, z))
    known: dict[tuple, float] = {}
    result = np.empty(x.shape)
    for i, values in enumerate(zip(x.ravel().tolist(), y.ravel().tolist(), z.ravel().tolist(), strict=True)):
        if values not in known:
            if all(np.isfinite(values)) and Fraction(values[0]) * Fraction(values[1]) + Fraction(values[2]) != 0:
                exact = Fraction(values[0]) * Fraction(values[1]) + Fraction(values[2])
                try:
                    known[values] = float(exact)
                except OverflowError:
                    known[values] = float("inf") if exact > 0 else float("-inf")
            else:
                known[values] = float(np.float64(values[0]) * np.float64(values[1]) + np.float64(values[2]))
        result.flat[i] = known[values]
    return result


def _nan_max(a, b):
    result = np.maximum(a, b)
    return np.where(np.isnan(result), np.array(0x7FFFFFFF, np.uint32).view(np.float32), result)


def _nan_min(a, b):
    result = np.minimum(a, b)
    return np.where(np.isnan(result), np.array(0x7FFFFFFF, np.uint32).view(np.float32), result)


def _quotient(a, b):
    """Towards zero; what a division by zero gives is not defined."""
    b = np.where(b == 0, np.array(1, b.dtype), b)
    floor = a // b
    return np.where((floor < 0) & (floor * b != a), floor + np.array(1, a.dtype), floor)


def _remainder(a, b):
    return a - _quotient(a, b) * np.where(b == 0, np.array(1, b.dtype), b)


def _wide(kind: str) -> str:
    return f"{kind[0]}{int(kind[1:]) * 2}"


def _simple(functions: dict[str, dict], operands: int = 2):
    """A family of instructions that differ by type alone: {modifiers before the type: {types: function}}"""

    def family(batch, i):
        modifiers, kind = ".".join(i.name[1:-1]), i.name[-1]
        function = next((f for kinds, f in functions.get(modifiers, {}).items() if kind in kinds), None)
        if function is None or len(i.operands) != operands + 1:
            raise Unknown(i)
        return function, [batch.reader(o, kind) for o in i.operands[1:]], i.operands[0]

    return family


INTS, FLOATS = tuple(sorted(INTEGER)), tuple(sorted(FLOAT))
UNSIGNED, SIGNED = ("u16", "u32", "u64"), ("s16", "s32", "s64")


def _multiply(batch, i):
    if i.name[1] == "wide" and i.name[2:] and i.name[2] in ("u16", "u32", "s16", "s32") and len(i.name) == 3:
        wide = DTYPES[_wide(i.name[2])]
        sources = [batch.reader(o, i.name[2]) for o in i.operands[1:3]]
        if i.name[0] == "mad":
            sources.append(batch.reader(i.operands[3], _wide(i.name[2])))
            return lambda a, b, c: a.astype(wide) * b.astype(wide) + c, sources, i.operands[0]
        return lambda a, b: a.astype(wide) * b.astype(wide), sources, i.operands[0]
    if i.name[1] in ("lo", "hi") and len(i.name) == 3 and i.name[2] in INTEGER:
        kind = i.name[2]
        sources = [batch.reader(o, kind) for o in i.operands[1:]]
        if i.name[1] == "lo":
            product = np.multiply
        elif kind in ("u32", "s32", "u16", "s16"):
            wide, bits = DTYPES[_wide(kind)], int(kind[1:])

            def product(a, b):
                return (a.astype(wide) * b.astype(wide) >> np.array(bits, wide)).astype(a.dtype)

        elif kind == "u64":

            def product(a, b):
                low, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
                a0, a1, b0, b1 = a & mask, a >> low, b & mask, b >> low
                middle = a1 * b0 + (a0 * b0 >> low)
                other = a0 * b1 + (middle & mask)
                return a1 * b1 + (middle >> low) + (other >> low)

        else:
            raise Unknown(i)
        if i.name[0] == "mad":
            return lambda a, b, c: product(a, b) + c, sources, i.operands[0]
        return product, sources, i.operands[0]
    if i.name[0] == "mul" and i.name[1:] in (("f32",), ("rn", "f32"), ("f64",), ("rn", "f64")):
        return np.multiply, [batch.reader(o, i.name[-1]) for o in i.operands[1:]], i.operands[0]
    raise Unknown(i)


def _shift(batch, i):
    kind = i.name[1]
    if len(i.name) != 2 or kind not in INTEGER | BITWISE or kind == "pred":
        raise Unknown(i)
    bits = DTYPES[kind].itemsize * 8
    left = i.name[0] == "shl"

    def function(a, count):
        within = np.minimum(count, np.uint32(bits - 1)).astype(a.dtype)
        if left:
            return np.where(count >= bits, np.array(0, a.dtype), a << within)
        beyond = a >> np.array(bits - 1, a.dtype) if kind[0] == "s" else np.array(0, a.dtype)
        return np.where(count >= bits, beyond, a >> within)

    return function, [batch.reader(i.operands[1], kind), batch.reader(i.operands[2], "u32")], i.operands[0]


def _funnel(batch, i):
    if len(i.name) != 4 or i.name[1] not in ("l", "r") or i.name[2] not in ("wrap", "clamp") or i.name[3] != "b32":
        raise Unknown(i)

    def function(a, b, c):
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        n = (c & np.uint32(31) if i.name[2] == "wrap" else np.minimum(c, np.uint32(32))).astype(np.uint64)
        if i.name[1] == "r":
            return (both >> n).astype(np.uint32)
        return ((both << n) >> np.uint64(32)).astype(np.uint32)

    return function, [batch.reader(o, "u32") for o in i.operands[1:]], i.operands[0]


COMPARE: dict[str, Callable] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b, "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
    "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
# of floats, true too when an operand is NaN
UNORDERED: dict[str, Callable] = {
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip


def _compare(batch, i):
    if len(i.name) != 3 or len(i.operands) != 3 or "|" in i.operands[0]:
        raise Unknown(i)
    _, how, kind = i.name
    function = COMPARE.get(how) or (UNORDERED.get(how) if kind in FLOAT else None)
    known = INTEGER | FLOAT if how not in ("eq", "ne") else INTEGER | FLOAT | (BITWISE - {"pred"})
    if function is None or kind not in known or (how in ("lo", "ls", "hi", "hs") and kind[0] != "u"):
        raise Unknown(i)
    return function, [batch.reader(o, kind) for o in i.operands[1:]], i.operands[0]


def _select(batch, i):
    kind = i.name[-1]
    if len(i.name) != 2 or kind not in INTEGER | FLOAT | BITWISE - {"pred"}:
        raise Unknown(i)
    sources = [
        batch.reader(i.operands[1], kind),
        batch.reader(i.operands[2], kind),
        batch.reader(i.operands[3], "pred"),
    ]
    return lambda a, b, p: np.where(p, a, b), sources, i.operands[0]


def _bit_field_insert(batch, i):
    if i.name != ("bfi", "b32"):
        raise Unknown(i)

    def function(a, b, position, length):
        position, length = position.astype(np.uint64) & np.uint64(255), length.astype(np.uint64) & np.uint64(255)
        mask = ((np.uint64(1) << np.minimum(length, np.uint64(32))) - np.uint64(1)) << np.minimum(
            position, np.uint64(32)
        )
        shifted = a.astype(np.uint64) << np.minimum(position, np.uint64(32))
        return ((shifted & mask) | (b.astype(np.uint64) & ~mask)).astype(np.uint32)

    return function, [batch.reader(o, "u32") for o in i.operands[1:]], i.operands[0]


def _bit_field_extract(batch, i):
    if i.name not in (("bfe", "u32"), ("bfe", "s32")):
        raise Unknown(i)

    def function(a, position, length):
        position, length = position & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(32))
        wide = a.astype(np.int64) >> np.minimum(position, np.uint32(63)).astype(np.int64)
        n = length.astype(np.int64)
        field = wide & ((np.int64(1) << n) - 1)
        if i.name[1] == "s32":
            top = np.minimum(position.astype(np.int64) + n - 1, 31)
            sign = (a.astype(np.int64) >> np.maximum(top, 0)) & 1
            field = np.where((n > 0) & (sign == 1), field | (np.int64(-1) << n), field)
        return field.astype(a.dtype)

    sources = [batch.reader(i.operands[1], i.name[1]), *(batch.reader(o, "u32") for o in i.operands[2:])]
    return function, sources, i.operands[0]


def _permute(batch, i):
    if i.name != ("prmt", "b32"):
        raise Unknown(i)

    def function(a, b, selector):
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.zeros((), np.uint32)
        for n in range(4):
            choice = (selector >> np.uint32(4 * n)) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))).astype(np.uint32) & np.uint32(
                255
            )
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | (np.where(choice & np.uint32(8), sign, byte) << np.uint32(8 * n))
        return result.astype(np.uint32)

    return function, [batch.reader(o, "u32") for o in i.operands[1:]], i.operands[0]


def _logic3(batch, i):
    if i.name != ("lop3", "b32"):
        raise Unknown(i)
    table = int(i.operands[4], 0)

    def function(a, b, c):
        result = np.zeros((), np.uint32)
        for n in range(8):
            if table >> n & 1:
                result = result | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
        return result

    return function, [batch.reader(o, "u32") for o in i.operands[1:4]], i.operands[0]


def _count_bits(a):
    result = np.zeros(a.shape, np.uint32)
    for n in range(a.dtype.itemsize * 8):
        result += ((a >> np.array(n, a.dtype)) & np.array(1, a.dtype)).astype(np.uint32)
    return result


def _leading_zeros(a):
    bits = a.dtype.itemsize * 8
    result = np.full(a.shape, bits, np.uint32)
    for n in range(bits):
        result = np.where((a >> np.array(n, a.dtype)) & np.array(1, a.dtype), np.uint32(bits - 1 - n), result)
    return result


def _saturated(values, dtype):
    """Rounded floats as integers: the nearest there is, NaN as zero."""
    info = np.iinfo(dtype)
    clean = np.where(np.isnan(values), 0.0, np.asarray(values, np.float64))
    inside = np.clip(clean, float(info.min), np.nextafter(float(info.max) + 1.0, 0.0))
    return np.where(clean >= float(info.max), np.array(info.max, dtype), inside.astype(dtype))


ROUND_TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _convert(batch, i):
    *modifiers, to, source = i.name[1:]
    sources = [batch.reader(o, source if source in DTYPES else "b32") for o in i.operands[1:]]

    def give(function):
        return function, sources, i.operands[0]

    if to in ("f16x2", "bf16x2") and source == "f32" and modifiers == ["rn"]:  # the first operand is the upper half
        narrow = (lambda v: v.astype(np.float16).view(np.uint16)) if to == "f16x2" else f32_to_bf16
        return give(lambda a, b: (narrow(a).astype(np.uint32) << np.uint32(16)) | narrow(b).astype(np.uint32))
    if len(sources) != 1 or to not in DTYPES or source not in DTYPES or "pred" in (to, source):
        raise Unknown(i)
    target = DTYPES[to]
    integers = [kind[0] in "us" for kind in (to, source)]
    if all(integers) and not modifiers:
        return give(lambda a: a.astype(target))
    if integers == [False, True] and modifiers == ["rn"] and to in FLOAT:
        return give(lambda a: a.astype(target))
    if integers == [True, False] and len(modifiers) == 1 and modifiers[0] in ROUND_TO_INTEGER and source in FLOAT:
        return give(lambda a: _saturated(ROUND_TO_INTEGER[modifiers[0]](a), target))
    if (to, source) in (("f32", "f16"), ("f64", "f32"), ("f64", "f16")) and not modifiers:
        return give(lambda a: a.astype(target))
    if (to, source) in (("f16", "f32"), ("f32", "f64"), ("f16", "f64")) and modifiers == ["rn"]:
        return give(lambda a: a.astype(target))
    if (to, source) == ("bf16", "f32") and modifiers == ["rn"]:
        return give(f32_to_bf16)
    if (to, source) == ("f32", "bf16") and not modifiers:
        return give(bf16_to_f32)
    if to == source and to in FLOAT and len(modifiers) == 1 and modifiers[0] in ROUND_TO_INTEGER:
        return give(ROUND_TO_INTEGER[modifiers[0]])
    raise Unknown(i)


def _approximate_reciprocal(a):
    """Of a double: its upper word alone."""
    return ((1.0 / a).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def _inverse(a):
    return np.array(1, a.dtype) / a


FAMILIES: dict[str, Callable] = {
    "add": _simple({"": {INTS: np.add, FLOATS: np.add}, "rn": {FLOATS: np.add}}),
    "sub": _simple({"": {INTS: np.subtract, FLOATS: np.subtract}, "rn": {FLOATS: np.subtract}}),
    "mul": _multiply,
    "mad": _multiply,
    "fma": _simple({"rn": {("f32",): fma_f32, ("f64",): fma_f64}}, 3),
    "div": _simple({"": {INTS: _quotient}, "rn": {FLOATS: np.divide}}),
    "rem": _simple({"": {INTS: _remainder}}),
    "rcp": _simple({"rn": {FLOATS: _inverse}, "approx.ftz": {("f64",): _approximate_reciprocal}}, 1),
    "sqrt": _simple({"rn": {FLOATS: np.sqrt}}, 1),
    "neg": _simple({"": {SIGNED: np.negative, FLOATS: np.negative}}, 1),
    "abs": _simple({"": {SIGNED: np.abs, FLOATS: np.abs}}, 1),
    "min": _simple({"": {INTS: np.minimum, FLOATS: np.fmin}, "NaN": {("f32",): _nan_min}}),
    "max": _simple({"": {INTS: np.maximum, FLOATS: np.fmax}, "NaN": {("f32",): _nan_max}}),
    "and": _simple({"": {tuple(BITWISE): np.bitwise_and}}),
    "or": _simple({"": {tuple(BITWISE): np.bitwise_or}}),
    "xor": _simple({"": {tuple(BITWISE): np.bitwise_xor}}),
    "not": _simple({"": {tuple(BITWISE): np.invert}}, 1),
    "popc": _simple({"": {("b32", "b64"): _count_bits}}, 1),
    "clz": _simple({"": {("b32", "b64"): _leading_zeros}}, 1),
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel,
    "setp": _compare,
    "selp": _select,
    "bfi": _bit_field_insert,
    "bfe": _bit_field_extract,
    "prmt": _permute,
    "lop3": _logic3,
    "cvt": _convert,
}
