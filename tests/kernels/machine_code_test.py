"""The reader of machine code, on a program that was written for it."""

from __future__ import annotations

import machine_code

PROGRAM = """
        .section        .text.kernel,"ax",@progbits
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R2, 0x4, PT ;
        /*0020*/              @!P0 EXIT ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0040*/                   IADD3 R3, R3, 0x1, RZ ;
.L_x_1:
        /*0050*/                   FFMA R4, R4, R4, R4 ;
        /*0060*/                   UISETP.NE.AND UP1, UPT, UR4, 0x8, UPT ;
        /*0070*/                   BRA.U UP1, `(.L_x_1) ;
        /*0080*/               @P1 CALL.REL.NOINC `(.L_x_0) ;
        /*0090*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*00a0*/                   MUFU.LG2 R5, R5 ;
.L_x_3:
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
        /*00d0*/                   NOP;
        /*00e0*/                   NOP;
"""


def test_instructions_are_read():
    instructions = machine_code.parse(PROGRAM)
    assert len(instructions) == 12
    assert [instructions[i].name for i in (0, 5, 10, 11)] == ["LDC", "FFMA", "MUFU", "EXIT"]
    assert instructions[2].successors == (3,)
    assert instructions[3].successors == (4, 10)
    assert instructions[7].successors == (8, 5)
    assert instructions[9].successors == (11,)
    assert instructions[11].successors == ()


def test_loops_are_found():
    bodies, back = machine_code.loops(machine_code.parse(PROGRAM))
    assert bodies == {4: frozenset(range(4, 9)), 5: frozenset(range(5, 8))}
    assert back == {(8, 4), (7, 5)}


def test_the_longest_way():
    instructions = machine_code.parse(PROGRAM)
    assert machine_code.longest(instructions, 1) == 4 + 2 + 3 + 1 + 1
    assert machine_code.longest(instructions, 8) == 4 + 8 * 2 + 8 * 8 * 3 + 1 + 1
