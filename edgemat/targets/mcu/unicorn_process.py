"""Runs a small ELF under unicorn; a program of its own, never imported by edgemat.

unicorn is under the GPLv2: this file is the only one that imports it, and it runs in a process of its own. It takes one
argument, a JSON object, and prints one::

    {"machine": "cortex-m4", "elf": path, "samples": path, "results": path,
     "inputs": [[symbol, bytes], ...], "outputs": [[symbol, bytes], ...], "count": bool}
    {"instructions": int or null, "stack_bytes": int, "status": int}

Instructions are those of the first sample, from the first of ``em_emulated`` to its return. They are counted by basic
block: each block's instructions are decoded once (only their lengths matter), then added up each time it runs.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

PAGE = 0x1000
RETURN = 0x7FFF0000
STACK_TOP = 0x7F000000
STACK_BYTES = 0x100000
PAINT = 0xA5


class Elf:
    """Loadable segments and symbols of a little-endian 32-bit ELF."""

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x01\x01":
            raise ValueError("not a little-endian 32-bit ELF")
        phoff, shoff = struct.unpack_from("<II", data, 28)
        phentsize, phnum, shentsize, shnum = struct.unpack_from("<HHHH", data, 42)
        self.segments = []
        for i in range(phnum):
            kind, offset, address, _, filesz, memsz = struct.unpack_from("<IIIIII", data, phoff + i * phentsize)
            if kind == 1 and memsz:
                self.segments.append((address, data[offset : offset + filesz], memsz))
        self.symbols: dict[str, int] = {}
        sections = [struct.unpack_from("<IIIIIIIIII", data, shoff + i * shentsize) for i in range(shnum)]
        for _, kind, _, _, offset, size, link, _, _, entsize in sections:
            if kind != 2:
                continue
            names = sections[link][4]
            for at in range(offset, offset + size, entsize):
                name, value = struct.unpack_from("<II", data, at)
                end = data.index(b"\0", names + name)
                self.symbols[data[names + name : end].decode()] = value


def instructions_in(code: bytes, thumb: bool) -> int:
    """Number of instructions of a block, from their lengths (Thumb-2 or RV32 with C)."""
    count = at = 0
    while at < len(code):
        half = code[at] | code[at + 1] << 8
        wide = (half >> 11) in (0b11101, 0b11110, 0b11111) if thumb else (half & 3) == 3
        at += 4 if wide else 2
        count += 1
    return count


def main(job: dict) -> dict:
    """Run every sample of a job."""
    import unicorn
    from unicorn import arm_const, riscv_const

    thumb = job["machine"] == "cortex-m4"
    elf = Elf(Path(job["elf"]).read_bytes())
    if thumb:
        machine = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
        machine.ctl_set_cpu_model(arm_const.UC_CPU_ARM_CORTEX_M4)
        stack, link, result = arm_const.UC_ARM_REG_SP, arm_const.UC_ARM_REG_LR, arm_const.UC_ARM_REG_R0
    else:
        machine = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV32)
        stack, link, result = riscv_const.UC_RISCV_REG_SP, riscv_const.UC_RISCV_REG_RA, riscv_const.UC_RISCV_REG_A0
    pages = set()
    for address, _, size in elf.segments:
        pages |= set(range(address // PAGE, (address + size - 1) // PAGE + 1))
    for first, count in runs(sorted(pages)):
        machine.mem_map(first * PAGE, count * PAGE)
    for address, data, _ in elf.segments:
        machine.mem_write(address, data)
    machine.mem_map(STACK_TOP - STACK_BYTES, STACK_BYTES)
    machine.mem_map(RETURN, PAGE)
    machine.mem_write(STACK_TOP - STACK_BYTES, bytes([PAINT]) * STACK_BYTES)

    counted = 0
    lengths: dict[int, int] = {}

    def block(uc: object, address: int, size: int, data: object) -> None:
        nonlocal counted
        if address not in lengths:
            lengths[address] = instructions_in(bytes(machine.mem_read(address, size)), thumb)
        counted += lengths[address]

    samples = Path(job["samples"]).read_bytes()
    width = sum(size for _, size in job["inputs"])
    entry = elf.symbols["em_emulated"]
    results = bytearray()
    for number in range(len(samples) // width):
        at = number * width
        for symbol, size in job["inputs"]:
            machine.mem_write(elf.symbols[symbol], samples[at : at + size])
            at += size
        machine.reg_write(stack, STACK_TOP - 64)
        machine.reg_write(link, RETURN | thumb)
        hook = machine.hook_add(unicorn.UC_HOOK_BLOCK, block) if job["count"] and number == 0 else None
        machine.emu_start(entry | thumb, RETURN)
        if hook is not None:
            machine.hook_del(hook)
        status = machine.reg_read(result)
        if status:
            return {"instructions": None, "stack_bytes": 0, "status": status}
        for symbol, size in job["outputs"]:
            results += machine.mem_read(elf.symbols[symbol], size)
    Path(job["results"]).write_bytes(results)
    painted = bytes(machine.mem_read(STACK_TOP - STACK_BYTES, STACK_BYTES))
    depth = STACK_BYTES - 64 - (len(painted) - len(painted.lstrip(bytes([PAINT]))))
    return {"instructions": counted if job["count"] else None, "stack_bytes": depth, "status": 0}


def runs(pages: list[int]) -> list[tuple[int, int]]:
    """Consecutive pages as (first, count)."""
    found: list[tuple[int, int]] = []
    for page in pages:
        if found and found[-1][0] + found[-1][1] == page:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((page, 1))
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
