"""Statistics of kernels: instructions are counted by kind, in both of their languages."""

from __future__ import annotations

from clsa_compile.kernels.offline import recorded
from clsa_compile.kernels.statistics import _PTX, _SASS, _counts, statistics

PTX = """
	ld.param.b64 	%rd1, [kernel_param_0];
$L__tmp0:
	.loc	1 20 3
	@%p1 bra 	$L__BB0_2;
	@!%p2 ld.global.v4.b32 { %r1, %r2 }, [ %rd1 + 0 ];
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 	{ %f1 }, { %r1 };
	ret;
"""
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0030*/             @UP0  UMOV UR4, 0x1 ;
"""


def test_instructions_are_told_from_labels_and_directives() -> None:
    assert _PTX.findall(PTX) == [
        "ld.param.b64",
        "bra",
        "ld.global.v4.b32",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "ret",
    ]
    assert _SASS.findall(SASS) == ["LDC", "BRA", "LDG.E.128", "UMOV"]


def test_kinds_are_counted() -> None:
    assert _counts(["ld.global.v4", "ld.global.b32", "bra"]) == {"all": 3, "ld.global": 2, "bra": 1}


def test_a_launch_is_compiled_without_a_gpu() -> None:
    _, launch = next(recorded())
    found = statistics(launch, 90)
    assert found["sm"] == 90
    assert found["num_warps"] == launch.arguments["num_warps"]
    assert found["registers"] > 0
    assert found["ptx"]["all"] > 0
    assert found["sass"]["all"] > 0
