"""Where the asynchronous products of a compiled kernel (wgmma, in machine code HGMMA) read shared memory.

Their operands come by descriptors in uniform registers. An assembler may get those wrong: that of CUDA 12.8, which
Triton 3.6 and 3.7 bring along, reads registers that nobody wrote where one address serves as the left operand and then,
in rows of another width, as the right one. On a GPU that is an illegal memory access; no level above the machine code
shows it.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import triton.backends.nvidia

NVDISASM = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
FIRST = 1024
"""Where a program's shared memory begins on a GPU of capability 9.0."""
TURNS = 4
"""How often a loop is gone back through: what is loaded ahead of its turn goes through three places at most."""
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a row of the layout that a descriptor's last two bits name."""

Values = np.ndarray | None
"""Of 32 bits, of every thread; None: not known here."""


def listing(cubin: bytes, place: Path) -> str:
    """The machine code as text."""
    path = place / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([NVDISASM, "-c", path], capture_output=True, text=True, check=True).stdout


def misplaced_operand(text: str, threads: int, shared: int) -> str:
    """The first operand of a product that is not known to lie in the program's `shared` bytes: where and why; "" if
    there is none."""
    machine, places, labels = _Machine(threads), [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(places)
        elif found := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;", line):
            places.append(found.groups())
    at, returned = 0, list[int]()
    while at < len(places):
        where, predicate, operation, rest = places[at]
        operands = re.split(r",\s*", rest.replace(".reuse", ""))
        if operation == "HGMMA" or operation.startswith("HGMMA."):
            if reason := machine.product(operation, operands, shared):
                return f"{where} {operation} {rest}: {reason}"
        elif operation == "BRA":
            target = labels.get(operands[-1].strip("`()"), len(places))
            if target <= at and returned.count(at) < TURNS:
                returned.append(at)
                at = target
                continue
        else:
            machine.step(operation, operands, sure=predicate is None)
        at += 1
    return ""


class _Machine:
    """Registers of all threads of a program whose indices are 0, as far as integers alone decide them."""

    def __init__(self, threads: int) -> None:
        self._registers: dict[str, Values] = {}
        self._local: dict[str, Values] = {}
        """Spilled ones, by their place."""
        self._zero = np.zeros(threads, np.uint32)
        self._special = {"SR_TID.X": np.arange(threads, dtype=np.uint32)}

    def product(self, operation: str, operands: list[str], shared: int) -> str:
        columns, deep = map(int, re.search(r"\.64x(\d+)x(\d+)", operation).groups())
        descriptors = next(x for x in operands if x.startswith("gdesc"))
        register = re.search(r"UR\d+", descriptors)[0]
        sides = [(0, 64, "tnspA"), (2, columns, "tnspB")]
        for first, rows, transposed in sides[operands[1] != descriptors and operands[1] not in ("RZ",) :]:
            low, high = (self._value(_after(register, first + i)) for i in range(2))
            if low is None or high is None:
                return f"nothing known wrote {_after(register, first + (low is not None))}"
            begin, end = _span(low, high, rows, transposed in descriptors)
            if begin < FIRST or end > FIRST + shared:
                return f"reads {begin - FIRST:,} to {end - FIRST:,} of {shared:,} bytes of shared memory"
        for i in range(columns // 2):
            self._registers[_after(operands[0], i)] = None
        return ""

    def step(self, operation: str, operands: list[str], *, sure: bool) -> None:
        """What is not listed here, or not in every thread, leaves nothing known of its result."""
        name, _, kind = operation.removeprefix("U").partition(".")
        if name == "STL":
            for i in range(_width(kind)):
                self._local[_shifted(operands[0], 4 * i)] = self._value(_after(operands[1], i)) if sure else None
            return
        if name == "ISETP":
            self._registers[operands[0]] = self._compared(kind, operands[2:]) if sure else None
            return
        target, sources = operands[0], operands[1:]
        carry = sources.pop(0) if sources and re.fullmatch(r"U?P\d", sources[0]) else None
        values = self._results(name, kind, sources) if sure else None
        if values is None:
            values = [None] * (2 if "WIDE" in kind else _width(kind))
        if carry:
            self._registers[carry] = values[1] if len(values) > 1 else None
        if name in SUMS and kind != "64":
            del values[1:]
        for i, value in enumerate(values):
            self._registers[_after(target, i)] = value

    def _results(self, name: str, kind: str, sources: list[str]) -> list[Values] | None:
        """Of the target and the registers after it; of sums, their carry last."""
        kinds = kind.split(".")
        if name in ("S2R", "S2UR"):
            return [self._special.get(sources[0], self._zero)]
        if name == "CS2R":
            return [self._zero, self._zero]
        if name == "LDL":
            return [self._local.get(_shifted(sources[0], 4 * i)) for i in range(_width(kind))]
        if name == "IADD3" and kind == "64" or name == "IMAD" and "WIDE" in kinds:
            return self._wide(name, kind, sources)
        if name == "SEL":
            return [self._selected(*sources)]
        values = [self._value(x) for x in sources if not x.startswith("!")]
        arithmetic = OPERATIONS.get(name)
        if arithmetic is None or any(v is None for v in values) or name == "IMAD" and "HI" in kinds:
            return None
        total = arithmetic(kinds, [v.astype(np.uint64) for v in values])
        return [total.astype(np.uint32), (total >> np.uint64(32)).astype(np.uint32)][: 2 if name in SUMS else 1]

    def _compared(self, kind: str, sources: list[str]) -> Values:
        """1 where a predicate is true."""
        how, *kinds = kind.split(".")
        a, b = (self._value(x) for x in sources[:2])
        if a is None or b is None or how not in COMPARISONS or "EX" in kinds or sources[2] not in ("PT", "UPT"):
            return None
        signed = np.uint32 if "U32" in kinds else np.int32
        return COMPARISONS[how](a.view(signed), b.view(signed)).astype(np.uint32)

    def _selected(self, first: str, second: str, predicate: str) -> Values:
        chosen, a, b = self._registers.get(predicate.lstrip("!")), self._value(first), self._value(second)
        if chosen is None or a is None or b is None:
            return None
        return np.where((chosen == 1) != predicate.startswith("!"), a, b)

    def _wide(self, name: str, kind: str, sources: list[str]) -> list[Values] | None:
        pairs = [self._pair(x) for x in (sources if name == "IADD3" else sources[2:])]
        factors = [] if name == "IADD3" else [self._value(x) for x in sources[:2]]
        if any(v is None for v in (*pairs, *factors)):
            return None
        total = sum(pairs)
        if factors:
            signed = np.uint32 if "U32" in kind else np.int32
            total = total + np.prod([v.view(signed).astype(np.int64) for v in factors], axis=0).view(np.uint64)
        return [total.astype(np.uint32), (total >> np.uint64(32)).astype(np.uint32)]

    def _value(self, operand: str) -> Values:
        sign, name = re.match(r"([-~]?)(.*)", operand).groups()
        if re.fullmatch(r"0x[0-9a-f]+", name):
            value = self._zero + np.uint32(int(name, 16) & 0xFFFFFFFF)
        elif name in ("RZ", "URZ"):
            value = self._zero
        else:
            value = self._registers.get(name)
        return value if value is None or not sign else ~value + np.uint32(sign == "-")

    def _pair(self, operand: str) -> Values:
        """Of 64 bits."""
        sign, name = re.match(r"(-?)(.*)", operand).groups()
        if name.startswith("0x"):
            value = self._zero.astype(np.uint64) + np.uint64(int(name, 16))
        else:
            low, high = self._value(name), self._value(_after(name, 1))
            if low is None or high is None:
                return None
            value = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return ~value + np.uint64(1) if sign else value


def _span(low: np.ndarray, high: np.ndarray, rows: int, transposed: bool) -> tuple[int, int]:
    """First byte of an operand of `rows` rows or columns, 32 bytes deep, and the end of its last one."""
    begin, far, step = ((x >> shift & 0x3FFF).astype(np.int64) * 16 for x, shift in ((low, 0), (low, 16), (high, 0)))
    width = np.vectorize(SWIZZLES.get)(high >> 30)
    if transposed:  # 16 deep are two groups of 8; rows beyond a layout's width stand `far` from the first
        end = begin // width * width + np.maximum(2 * rows // width - 1, 0) * far + step + 8 * width
    else:
        end = begin + (rows // 8 - 1) * step + 7 * width + 32
    return int(begin.min()), int(end.max())


def _after(register: str, count: int) -> str:
    """R4, 2 -> R6"""
    found = re.fullmatch(r"(U?R)(\d+)", register)
    return f"{found[1]}{int(found[2]) + count}" if found else register


def _shifted(place: str, count: int) -> str:
    """[R1+0x10], 4 -> [R1+0x14]"""
    found = re.fullmatch(r"\[R1(?:\+0x([0-9a-f]+))?\]", place)
    return f"[R1+{int(found[1] or '0', 16) + count:#x}]" if found else place


def _width(kind: str) -> int:
    """Registers of a result."""
    return 4 if kind.endswith(("128", "M88.4")) else 2 if kind.endswith("64") else 1


def _logic(_kinds: list[str], values: list[np.ndarray]) -> np.ndarray:
    a, b, c, table = values[:4]
    found = np.zeros_like(a)
    for i in range(8):
        terms = [x if i & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
        found |= terms[0] & terms[1] & terms[2] & -(table >> np.uint64(i) & np.uint64(1))
    return found & np.uint64(0xFFFFFFFF)


def _shift(kinds: list[str], values: list[np.ndarray]) -> np.ndarray:
    """SHF.L low, count, high; SHF.R.HI low, count, high is of the high one alone."""
    low, count, high = values
    if kinds[0] == "L":
        return (high << np.uint64(32) | low) << count >> np.uint64(32 * ("HI" in kinds))
    return (high.astype(np.uint32).view(np.int32) >> count.astype(np.int32)).view(np.uint32) if "S32" in kinds else (
        high >> count)


def _scaled_sum(kinds: list[str], values: list[np.ndarray]) -> np.ndarray:
    """LEA low, addend, count; LEA.HI low, addend, high, count; a carry may follow."""
    low, addend, *rest = values
    high = (low >> np.uint64(31)) * np.uint64(0xFFFFFFFF) if "SX32" in kinds or len(rest) == 1 else rest.pop(0)
    count, *carry = rest
    scaled = (high << np.uint64(32) | low) << count
    return (scaled >> np.uint64(32) if "HI" in kinds else scaled & np.uint64(0xFFFFFFFF)) + addend + sum(carry)


def _extend(kinds: list[str], values: list[np.ndarray]) -> np.ndarray:
    value, bits = values
    kept = value & ((np.uint64(1) << bits) - np.uint64(1))
    return kept if "U32" in kinds else kept | -(kept >> (bits - np.uint64(1))) << bits


COMPARISONS = {"GT": np.greater, "GE": np.greater_equal, "LT": np.less, "LE": np.less_equal, "EQ": np.equal,
               "NE": np.not_equal}
SUMS = "IADD3", "LEA"
OPERATIONS: dict[str, Callable[[list[str], list[np.ndarray]], np.ndarray]] = {
    "MOV": lambda _, v: v[0], "R2UR": lambda _, v: v[0], "VIADD": lambda _, v: v[0] + v[1],
    "IADD3": lambda _, v: sum(v), "IMAD": lambda _, v: v[0] * v[1] + sum(v[2:]), "LEA": _scaled_sum, "LOP3": _logic,
    "SHF": _shift, "SGXT": _extend}
