"""The CUDA kernels' machine code against a budget, where nvcc and nvdisasm are (pip install -e '.[sass]'); no GPU is asked for.

What test_nvcc.py cannot see is time: how much integer arithmetic goes with each 16 bytes, whether loads are on their way
together, what a barrier was compiled to. A kernel is compiled, disassembled, and one warp's way through it is followed with
the very arguments of a launch (tools/sass/). `pytest -s` prints the figures.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sass import calls, checks, code, tiles, toolkit
from sass.calls import Call
from sass.checks import Budget
from sass.warp import Latency, Undecided, Warp
from simt import harness

# An H200's clocks and copy rate, the GPU on which instructions are dearest: 4.3 TB/s over 132 multiprocessors at 1.98 GHz
# are 16.5 bytes a cycle, so a warp's 512 bytes pass in 31 cycles, in which four schedulers issue 124 instructions. A kernel
# that is to reach a share of the copy rate may fill 60% of those places: the rest is lost to dependences and barriers.
PLACES, FILLED = 124, 0.6


def at_share(share: float) -> float:
    return PLACES * FILLED / share


DENSE = partial(Call, n=32768, d=4096)
STEP = Call("step", 64, 4096, 8)
# Of an edit's code a dense call runs 26 to 38 KB more than once, which is to stay in the instruction cache (48 KB). The
# rest, sixteen activations, weights of four types, listed rows and rows behind others, may not grow.
FUSED, BOTH = 120 * 1024, 116 * 1024
# The optimizer's has five stored types, and Gram-Schmidt, which is rare.
CODE = 116 * 1024
# A CTA's 8 x 2048 fp32 elements of a matrix, and as many plain ones: parameter, gradient, two moments read, three written.
STEPPED = 2 * 8 * 2048 * 28 / 16 / 640
# A row of bf16 read twice and written, and its adapter's A and U in fp32, by 256 lanes.
POOLED, ROW = Call("pooled", 160, 4096, 8, total=8192, listed=True), (3 * 4096 * 2 + 2 * 8 * 4096 * 4) / 256 / 16
# call, which of its launches, kernel, instructions for 16 bytes, registers, CTAs a multiprocessor, and why
BUDGETS = [
    Budget(
        DENSE("forward", r=8), 0, "fused_kernel", at_share(0.85), 80, 2, "85%; one CTA works while one waits", FUSED
    ),
    Budget(DENSE("forward", r=16), 0, "fused_kernel", at_share(0.85), 80, 2, "85%; as r = 8", FUSED),
    # Of 12 warps three share a quarter of the registers, 168 each, of which the matrices take 96 and 128.
    Budget(DENSE("forward", r=32), 0, "fused_kernel", at_share(0.75), 168, 1, "75%; matrices in registers", FUSED),
    Budget(DENSE("forward", r=64), 0, "fused_kernel", at_share(0.65), 168, 1, "65%; matrices in registers", FUSED),
    Budget(DENSE("backward", r=8), 0, "both_kernel", at_share(0.75), 168, 1, "75%; sums are in registers", BOTH),
    Budget(DENSE("backward", r=16), 0, "both_kernel", at_share(0.75), 168, 1, "75%; sums are in registers", BOTH),
    Budget(DENSE("backward", r=64), 0, "fused_kernel", at_share(0.6), 168, 1, "60% in all, 8 bytes for 6", FUSED),
    Budget(DENSE("backward", r=64), 1, "sums_kernel", at_share(0.75), 255, 1, "60% in all, 8 bytes for 6"),
    Budget(STEP, 0, "step_kernel", at_share(0.85), 96, 1, "one launch: 117 MB in 33 us are 85%", CODE, vectors=STEPPED),
    Budget(POOLED, 0, "pooled_kernel", 30, 80, 3, "a row a CTA: others hide its round trips", vectors=ROW),
]
H200 = calls.Device(9, 0, 132, 232448, 16, {(1, 8): 15, (2, 8): 30})
LATENCY = Latency({})  # of no effect on what is counted here


def kernels_of(program: Path) -> dict[str, list[Budget]]:
    """The budgets by the kernel they are for, the slowest to compile first: it is in a unit with others."""
    found: dict[str, list[Budget]] = {}
    for budget in reversed(BUDGETS):
        found.setdefault(calls.launches(program, budget.call, H200)[budget.which].kernel, []).append(budget)
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """What answers which kernels a call launches."""
    if harness.compiler() is None:
        pytest.skip("needs g++ on Linux")
    return calls.build(tmp_path_factory.mktemp("calls"))


@pytest.mark.parametrize(
    ("matrices", "launches"),
    [
        (64, ["step"]),
        (80, ["step"]),
        (100, ["step", "plain"]),  # 300 items, of which a launch takes 256
        (300, ["step", "step", "plain", "plain", "plain"]),  # 44 matrices are not enough for 212 others beside them
    ],
)
def test_plain_parameters_are_stepped_beside_matrices_where_there_is_room(matrices, launches, program):
    made = calls.launches(program, Call("step", matrices, 4096, 8), H200)
    assert [launch.kernel.split("_kernel")[0] for launch in made] == launches
    assert all(launch.threads == (640 if launch.kernel.startswith("step") else 256) for launch in made)


@pytest.mark.skipif(toolkit.missing() is not None, reason=toolkit.missing() or "")
def test_every_kernel_keeps_to_its_budget(program, tmp_path):
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        asked = {
            kernel: (budgets, pool.submit(checks.look, program, budgets, H200, LATENCY, tmp_path))
            for kernel, budgets in kernels_of(program).items()
        }
        looked = [
            (budget, seen)
            for budgets, job in asked.values()
            for budget, seen in zip(budgets, job.result(), strict=True)
        ]
    wrong = []
    for budget, seen in looked:
        name = f"{seen.kernel}, {budget.call.what} r = {budget.call.r}"
        print(
            f"{name:52} {seen.per_vector:4.0f} instructions for 16 bytes (at most {budget.per_vector:3.0f}), "
            f"{seen.registers:3} registers, {seen.per_sm} a multiprocessor, {seen.size:6} B, {seen.kept:5} kept, "
            f"in loops {len(seen.ordering)} fences, {len(seen.waited)} loads waited for at once, "
            f"{len(seen.scattered)} accesses scattered"
        )
        faults = seen.faults(budget)
        if faults:
            wrong += [f"{name} ({budget.why}):", *(f"    {fault}" for fault in faults)]
    assert not wrong, "\n" + "\n".join(wrong)


# ---- the parser and the walk, on listings written by hand --------------------------------------------------------------


def line(pc: int, text: str, stall: int = 1, sets: int = 7, waits: int = 0) -> str:
    upper = (stall | 1 << 4 | sets << 5 | 7 << 8 | waits << 11) << 41
    return f"        /*{pc:04x}*/                   {text} ;   /* 0x{0:016x} */\n   /* 0x{upper:016x} */"


def kernel_of(*lines: str | tuple) -> code.Kernel:
    """Labels as they are; an instruction's text, or (text, stall, sets, waits)."""
    out, pc = ['\t.section\t.text.planted,"ax",@progbits'], 0
    for one in lines:
        if isinstance(one, str) and one.endswith(":"):
            out.append(one)
            continue
        out.append(line(pc, *((one,) if isinstance(one, str) else one)))
        pc += 16
    (kernel,) = code.parse("\n".join(out))
    kernel.registers = 32
    return kernel


LAUNCH = calls.Launch("planted<8>", (1, 1, 1), 256, 1, 1024, calls.Tiles(), (4).to_bytes(4, "little"))


def loop_of(*body: str | tuple) -> code.Kernel:
    """Four times round, as the launch's only argument says."""
    return kernel_of(
        ("LDC R1, c[0x0][0x210]", 1, 0, 0),
        "MOV R0, RZ",
        ".L_x_0:",
        *body,
        ("IADD3 R0, R0, 0x1, RZ", 4, 7, 1),
        "ISETP.GE.AND P0, PT, R0, R1, PT",
        "@!P0 BRA `(.L_x_0)",
        "EXIT",
    )


def seen_in(kernel: code.Kernel, vectors: float = 1) -> checks.Found:
    trace = Warp(kernel, LAUNCH, LATENCY).run()
    return checks.found(kernel, LAUNCH, H200, [trace], len(trace.steps) / vectors)


BUDGET = Budget(STEP, 0, "planted", 40, 32, 8, "planted")


def test_a_listing_is_read():
    kernel = kernel_of(
        ("LDG.E.128 R4, desc[UR6][R2.64+0x10]", 2, 3, 0b100001),
        "@!UP1 BRA `(.L_x_1)",
        'BRX R30 -0x30 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)',
        ".L_x_1:",
        "EXIT",
        ".L_x_2:",
        "BRA `(.L_x_2)",
    )
    load, branch, table, _, _ = kernel.code
    assert (load.op, load.base, load.args) == ("LDG.E.128", "LDG", ("R4", "desc[UR6][R2.64+0x10]"))
    assert (load.stall, load.sets, load.waits, load.frees, load.yields) == (2, 3, {0, 5}, -1, False)
    assert branch.guard == "!UP1" and branch.targets == (0x30,)
    assert table.targets == (0x30, 0x40)
    assert [(block.first, block.end, sorted(block.next)) for block in kernel.blocks] == [
        (0, 2, [1, 2]),
        (2, 3, [2, 3]),
        (3, 4, []),
        (4, 5, [3]),
    ]
    assert [(loop.head, loop.blocks, loop.depth) for loop in kernel.loops] == [(3, {3}, 1)]


def test_loops_are_nested():
    kernel = loop_of(
        "MOV R3, RZ", ".L_x_7:", "VIADD R3, R3, 0x1", "ISETP.NE.AND P1, PT, R3, 0x3, PT", "@P1 BRA `(.L_x_7)"
    )
    outer, inner = kernel.loops
    assert inner.parent is outer and (outer.depth, inner.depth) == (1, 2) and inner.blocks < outer.blocks
    trace = Warp(kernel, LAUNCH, LATENCY).run()
    assert len(trace.visits(3)) == 12 and len(trace.steps) == 2 + 4 * (1 + 9 + 3) + 1


def test_a_good_kernel_is_let_through():
    good = loop_of(
        ("LDG.E R4, desc[UR6][R2.64]", 1, 1, 0),
        ("LDG.E R5, desc[UR6][R2.64+0x10]", 1, 2, 0),
        ("FADD R6, R4, R5", 4, 7, 0b110),
    )
    assert seen_in(good).faults(BUDGET) == []


def test_planted_faults_are_found():
    fence = loop_of("MEMBAR.ALL.GPU", "CCTL.IVALL")
    assert seen_in(fence).faults(BUDGET) == ["in a loop: 00020: MEMBAR.ALL.GPU", "in a loop: 00030: CCTL.IVALL"]
    waited = loop_of(("LDG.E R4, desc[UR6][R2.64]", 1, 1, 0), ("FADD R6, R4, R4", 4, 7, 0b10))
    assert seen_in(waited).faults(BUDGET) == ["waited for at once, in a loop: 00020: LDG.E R4, desc[UR6][R2.64]"]
    long = seen_in(loop_of(*["VIADD R7, R7, 0x1"] * 10), 1)
    assert long.faults(BUDGET) == ["55 instructions for 16 bytes a lane, at most 40"]
    large = kernel_of(*["NOP"] * 3072, "EXIT")
    large.registers = 40
    assert seen_in(large, 100).faults(BUDGET) == [
        "40 registers, at most 32",
        "6 CTAs a multiprocessor, at least 8",
        "49168 bytes of code, at most 49152",
    ]
    often = seen_in(loop_of(*["NOP"] * 3072), 1000)
    assert often.faults(replace(BUDGET, size=64 * 1024)) == ["49280 bytes of code run more than once, at most 49152"]
    assert "another plan" in checks.Found("other<8>", 1, 1, 9, 1, 1).faults(BUDGET)[0]


def test_scattered_stores_are_found():
    address = ("S2R R2, SR_TID.X", "IMAD.SHL.U32 R2, R2, 0x10, RZ", "MOV R3, RZ")
    apart = loop_of(*address, *(f"STG.E desc[UR6][R2.64+0x{at:x}], R4" for at in (0, 4)))
    assert seen_in(apart, 2).faults(BUDGET) == [
        "touches more than twice what it moves, in a loop: 00050: STG.E desc[UR6][R2.64+0x0], R4",
        "touches more than twice what it moves, in a loop: 00060: STG.E desc[UR6][R2.64+0x4], R4",
    ]
    assert seen_in(loop_of(*address, "STG.E.128 desc[UR6][R2.64], R4"), 2).faults(BUDGET) == []
    assert seen_in(loop_of(*address[2:], "LDG.E R6, desc[UR6][R2.64]"), 2).faults(BUDGET) == []  # one for all lanes


def test_a_fence_behind_the_loop_is_none_of_its_own():
    kernel = loop_of("NOP")
    kernel.code.insert(-1, code.instruction_of(0x1000, "MEMBAR.ALL.GPU"))
    assert seen_in(kernel).faults(BUDGET) == []


def test_lanes_part_and_meet():
    kernel = kernel_of(
        "S2R R0, SR_TID.X",
        "BSSY B0, `(.L_x_1)",
        "ISETP.GE.U32.AND P0, PT, R0, 0x5, PT",
        "@P0 BRA `(.L_x_0)",
        "IMAD.WIDE.U32 R2, R0, -0x1, RZ",
        "BRA `(.L_x_2)",
        ".L_x_0:",
        "SHF.L.U32 R2, R0, 0x2, RZ",
        ".L_x_2:",
        "BSYNC B0",
        ".L_x_1:",
        "EXIT",
    )
    warp = Warp(kernel, LAUNCH, LATENCY)
    trace = warp.run()
    assert [len(trace.visits(i)) for i in range(9)] == [1, 1, 1, 1, 1, 1, 1, 2, 1]
    assert warp.registers.file["R"][2].tolist()[:8] == [0, 2**32 - 1, 2**32 - 2, 2**32 - 3, 2**32 - 4, 20, 24, 28]


def test_lanes_with_other_addresses_take_turns():
    """As they do for a bulk copy, which takes an address that is the warp's."""
    kernel = kernel_of(
        "S2R R0, SR_TID.X",
        "LOP3.LUT R1, R0, 0x3, RZ, 0xc0, !PT",
        "PLOP3.LUT P0, PT, PT, PT, PT, 0x80, 0x0",
        ".L_x_0:",
        "@P0 R2UR P1, UR4, R1",
        "@P0 PLOP3.LUT P0, PT, P1, PT, PT, 0x80, 0x0",
        "@P0 BRA.U.ANY `(.L_x_0)",
        "EXIT",
    )
    assert len(Warp(kernel, LAUNCH, LATENCY).run().visits(3)) == 4


def registers_after(*lines: str | tuple) -> dict[str, np.ndarray]:
    warp = Warp(kernel_of(*lines, "EXIT"), LAUNCH, LATENCY)
    warp.run()
    return warp.registers.file


def test_numbers_are_found_where_they_were_left():
    file = registers_after(
        "S2R R0, SR_TID.X",
        "IMAD.SHL.U32 R1, R0, 0x4, RZ",
        "STS [R1+0x100], R0",
        "LDS R2, [R1+0x100]",
        "MOV R3, 0x104",
        "LDS R4, [R3]",  # the second lane's, in all
        "S2UR UR4, SR_SWINHI",
        "IMAD.U32 R7, RZ, RZ, UR4",
        "IMAD.IADD R6, R1, 0x1, R3",
        "LD.E R5, desc[UR6][R6.64]",  # the same memory by a generic address: the next lane's
        "FADD R8, R0, R0",
        "STS [R1+0x100], R8",  # a float is not kept
        "LDS R9, [R1+0x100]",
        "MOV R10, 0x12345678",
        "STS.U8 [RZ], R10",
        "LDS R11, [RZ]",
        "DADD R14, R14, R14",
        "CS2R R14, SRZ",  # both are whole numbers again
        "STS.64 [RZ+0x300], R14",
        "LDS.64 R12, [RZ+0x300]",
    )["R"]
    assert set(file[12]) == set(file[13]) == {0}
    assert file[2].tolist() == [*range(32)] and set(file[4]) == {1} and file[5].tolist() == [*range(1, 32), -1]
    assert set(file[9]) == {-1} and set(file[11]) == {0x78}


def test_flags_in_a_register_are_followed_though_it_was_never_written_as_a_whole():
    file = registers_after(
        "LDG.E R6, desc[UR6][R2.64]",
        "LOP3.LUT R6, R6, 0xfffffffd, RZ, 0xc0, !PT",
        "LOP3.LUT R6, R6, 0x2, RZ, 0xfc, !PT",
        "LOP3.LUT P0, RZ, R6, 0x2, RZ, 0xc0, !PT",
        "LOP3.LUT P1, RZ, R6, 0x1, RZ, 0xc0, !PT",
    )["P"]
    assert set(file[0]) == {1} and set(file[1]) == {0}


def test_carries_and_addresses():
    file = registers_after(
        "MOV R0, 0xfffffffe",
        "MOV R1, 0x7",
        "LEA.HI R2, P1, R0, R0, RZ, 0x2",  # 3 and a carry: 0xfffffffe + 3
        "IADD3.X R3, RZ, RZ, RZ, P1, !PT",
        "IMAD.WIDE.U32 R4, P2, R0, R0, R0",
        "MOV R8, 0x200",
        "LDC.64 R8, c[0x0][R8+0x10]",  # its own address is overwritten
        "IMAD.WIDE R10, R0, 0x3, RZ",
        "SHF.R.U64 R12, R10, 0x1, R11",
        "PRMT R13, R1, 0x8880, R0",
    )
    r = {n: int(file["R"][n][0]) for n in range(14)}
    product = 0xFFFFFFFE**2 + (0x7 << 32 | 0xFFFFFFFE)
    assert (r[2], r[3]) == (1, 1)
    assert (r[4], r[5]) == (product & (1 << 32) - 1, product >> 32 & (1 << 32) - 1) and int(
        file["P"][2][0]
    ) == product >> 64
    assert (r[8], r[9]) == (4, -1)  # the launch's argument, and nothing behind it
    assert (r[10], r[11], r[12], r[13]) == (2**32 - 6, 2**32 - 1, 2**32 - 3, 7)


def test_a_way_that_depends_on_memory_is_asked_for():
    kernel = kernel_of(
        "LDG.E R0, desc[UR6][R2.64]", "ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 BRA `(.L_x_0)", ".L_x_0:", "EXIT"
    )
    with pytest.raises(Undecided, match="@P0 BRA"):
        Warp(kernel, LAUNCH, LATENCY).run()
    assert len(Warp(kernel, LAUNCH, LATENCY, decide=lambda _: False).run().steps) == 4


def test_a_wait_that_asks_again_and_again_is_over():
    """As cc 8.x has it for an mbarrier; any other branch that depends on something unknown is not followed."""
    launch = replace(LAUNCH, tiles=calls.Tiles(1, 1, 1, 1))  # of which no numbers are known
    asked = ("LDG.E R0, desc[UR6][R2.64]", "ISETP.NE.AND P0, PT, R0, RZ, PT")
    (trace,) = tiles.walked(kernel_of(".L_x_0:", *asked, "@!P0 BRA `(.L_x_0)", "EXIT"), launch, LATENCY)
    assert len(trace.steps) == 4
    with pytest.raises(Undecided, match="@!P0 BRA"):
        tiles.walked(kernel_of(*asked, "@!P0 BRA `(.L_x_1)", ".L_x_1:", "EXIT"), launch, LATENCY)
