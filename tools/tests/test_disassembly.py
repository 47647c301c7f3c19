"""Spills are counted where a loop repeats them, and nowhere else."""

from tools.disassembly import count_spills_in_loops


def test_spills_are_counted_where_they_repeat():
    disassembly = """
        /*0000*/  STL [R1], R2 ;
    .L_x_0:
        /*0010*/  LDL R3, [R1] ;
    .L_x_1:
        /*0020*/  STL.64 [R1+0x4], R4 ;
        /*0030*/  @P0 BRA `(.L_x_1) ;
        /*0040*/  @P1 BRA `(.L_x_2) ;
        /*0050*/  LDL R5, [R1] ;
        /*0060*/  @P0 BRA `(.L_x_0) ;
    .L_x_2:
        /*0070*/  LDL.LU R5, [R1] ;
    .L_x_3:
        /*0080*/  BRA `(.L_x_3);
    """
    assert count_spills_in_loops(disassembly) == 3


def test_a_jump_back_from_rare_code_is_no_loop():
    """The compiler puts it behind the end of the code; what stands between repeats nothing."""
    disassembly = """
        /*0000*/  STL [R1], R2 ;
        /*0010*/  BRA.DIV UR9, `(.L_x_2) ;
    .L_x_0:
        /*0020*/  BSSY.RECONVERGENT B1, `(.L_x_1) ;
        /*0030*/  @P0 BRA `(.L_x_3) ;
        /*0040*/  BSYNC.RECONVERGENT B1 ;
    .L_x_1:
        /*0050*/  LDL R3, [R1] ;
        /*0060*/  EXIT ;
    .L_x_2:
        /*0070*/  LDL R4, [R1] ;
        /*0080*/  BRA `(.L_x_0) ;
    .L_x_3:
        /*0090*/  LDL R5, [R1] ;
        /*00a0*/  BSYNC.RECONVERGENT B1 ;
        /*00b0*/  EXIT ;
    """
    assert count_spills_in_loops(disassembly) == 0
    # With a jump back where the branches have met, all three loads repeat.
    loop = disassembly.replace("/*0060*/  EXIT", "/*0060*/  @P1 BRA `(.L_x_0)")
    assert count_spills_in_loops(loop) == 3
