"""What kernels compile to is counted rightly, and a replay of them does what its rules say."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from qjl import cli
from qjl.lab.bench.synthetic import Maker, Shape
from qjl.ops.triton import runtime

if not runtime.is_installed() or runtime.is_interpreted():
    pytest.skip("kernels are compiled by Triton, which is not installed or interprets", allow_module_level=True)

import triton
import triton.language as tl

from qjl.lab.bench import warp_model
from qjl.lab.bench.launches import Launch, recorded
from qjl.lab.bench.static_counts import Instruction, Listing, listing
from qjl.lab.bench.static_kernels import Attention, stretched
from qjl.lab.bench.warp_model import GPUS, GUESSES, cycles

SASS = """
	//----- nvinfo : EIATTR_REGCOUNT
        /*0004*/ 	.word	index@(other)
        /*0008*/ 	.word	0x000000ff
	//----- nvinfo : EIATTR_REGCOUNT
        /*0004*/ 	.word	index@(walk)
        /*0008*/ 	.word	0x00000028
	//----- nvinfo : EIATTR_FRAME_SIZE
        /*000c*/ 	.word	index@($__internal_0)
        /*0010*/ 	.word	0x00000000
        /*0014*/ 	.word	index@(walk)
        /*0018*/ 	.word	0x00000020
	.section	.text.walk,"ax",@progbits
walk:
.text.walk:
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
                                                                     /* 0x000fe20000000f00 */
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
                                                                     /* 0x000ea2000c1e1d00 */
        /*0020*/              @!P0 BRA `(.L_x_1) ;                   /* 0x0000000000008947 */
                                                                     /* 0x000fea0003800000 */
        /*0030*/                   MUFU.SIN R8, R8 ;                 /* 0x0000000800087308 */
                                                                     /* 0x000e220000000400 */
.L_x_1:
        /*0040*/                   IMAD R9, R4, R5, R9 ;             /* 0x0000000504097224 */
                                                                     /* 0x004fc600078e0209 */
.L_x_2:
        /*0050*/               @P2 BRA `(.L_x_2) ;                   /* 0x0000000000002947 */
                                                                     /* 0x000fea0003800000 */
        /*0060*/               @P1 BRA `(.L_x_0) ;                   /* 0x0000000000001947 */
                                                                     /* 0x000fea000383ffff */
        /*0070*/                   EXIT ;                            /* 0x000000000000794d */
                                                                     /* 0x000fea0003800000 */
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);                    /* 0xfffffffc00fc7947 */
                                                                     /* 0x000fc0000383ffff */
$__internal_0:
.L_x_4:
        /*0090*/                   DFMA R2, R2, R4, R6 ;             /* 0x000000040202722b */
                                                                     /* 0x000fd00000000006 */
"""
BENCH = ("bench", "kernels", "--static", "--capability", "90", "--shape", "smollm2", "--statistics", "synthetic")


def run(*arguments):
    return CliRunner().invoke(cli.app, arguments)


@triton.jit
def _sums(tokens, out, count, TILE: tl.constexpr):
    """Sums of columns."""
    column = tl.arange(0, 128)
    sums = tl.zeros([128], tl.float32)
    for tile in range(tl.program_id(0), count // TILE):
        row = tile * TILE + tl.arange(0, TILE)
        sums += tl.sum(tl.load(tokens + row[:, None] * 128 + column[None, :]), axis=0)
    tl.store(out + tl.program_id(0) * 128 + column, sums)


def launched(tile):
    with recorded() as launches:
        _sums[(6, 2)](torch.zeros(256, 128), torch.zeros(6, 128), 256, TILE=tile)
    return launches[0]


# Counting


def test_the_loop_of_a_listing():
    found = Listing.of(SASS, "walk")
    assert (found.registers, found.spilled_bytes, len(found.instructions)) == (40, 32, 9)
    assert [one.op for one in found.loop] == ["LDG.E.128", "BRA", "IMAD", "BRA", "BRA"]
    assert found.counts == {"CONTROL": 3, "GLOBAL": 1, "IMAD": 1}


def test_what_encodings_tell_of_issue():
    first, load, _, sine, multiply, *_ = Listing.of(SASS, "walk").instructions
    assert (first.stall, first.sets, first.waits) == (1, (7, 7), ())
    assert (load.stall, load.sets) == (1, (2, 7))
    assert sine.sets[0] == 0
    assert (multiply.stall, multiply.waits) == (3, (2,))


def test_a_listing_without_a_loop_has_none():
    assert Listing.of(SASS.replace("@P1 BRA `(.L_x_0)", "NOP"), "walk").counts == {}


def test_a_listing_must_tell_its_registers(refuses):
    with refuses("does not tell its REGCOUNT"):
        Listing.of(SASS.replace("EIATTR_REGCOUNT", "EIATTR_OTHER"), "walk")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_compiled_kernel_is_counted(capability):
    launch = launched(64)
    kernel = launch.compiled(capability)
    found = listing(kernel.asm["cubin"], launch.name)
    used = [int(register) for one in found.instructions for register in re.findall(r"\bR(\d+)", one.operands)]
    assert max(used) < found.registers <= 255
    assert found.spilled_bytes == 0
    loaded = sum(warp_model.width(one) for one in found.loop if one.kind == "GLOBAL")
    assert loaded * 32 * kernel.metadata.num_warps == 64 * 128 * 4
    added = sum(2 if one.op == "FADD2" else one.op == "FADD" for one in found.loop)
    assert added >= 64 * 128 / 32 / kernel.metadata.num_warps


def test_nvdisasm_takes_no_other_bytes(refuses):
    with refuses("nvdisasm cannot read it"):
        listing(b"no code", "it")


# Launches


def test_a_launch_knows_its_arguments():
    launch = launched(64)
    assert (launch.name, launch.grid, launch.arguments["TILE"]) == ("_sums", (6, 2), 64)
    assert [tensor.shape for tensor in launch.tensors] == [(256, 128), (6, 128)]


def test_launches_of_one_kernel_are_one_variant():
    assert launched(64).variant(90) == launched(64).variant(90)
    assert launched(64).variant(90) != launched(32).variant(90)


def test_what_lies_in_tuples_is_given_too():
    inner, outer = torch.zeros(1), torch.zeros(2)
    kernel = SimpleNamespace(arg_names=["a", "b"])
    assert Launch(kernel, ((1, (inner, None)), outer), {}, (1,)).tensors == [inner, outer]


def test_recording_needs_a_compiler(refuses, monkeypatch):
    monkeypatch.setattr(runtime, "is_interpreted", lambda: True)
    with refuses("unset TRITON_INTERPRET"), recorded():
        pass
    monkeypatch.setattr(runtime, "is_installed", lambda: False)
    with refuses("run `pip install triton`"), recorded():
        pass


# The model


def instruction(op, stall=1, sets=(7, 7), waits=()):
    control = stall | sets[0] << 5 | sets[1] << 8 | sum(1 << 11 + board for board in waits)
    return Instruction("", op, "", control)


def replayed(loop, warps=1, capability=90, guess="mid"):
    return cycles(loop, warps, GPUS[capability], GUESSES[guess])


def test_a_warp_alone_waits_for_its_stalls():
    assert replayed([instruction("IADD3", 5), instruction("IADD3", 3)]) == 8


@pytest.mark.parametrize(("op", "busy"), [("IADD3", 2), ("FFMA", 1), ("IMAD", 2), ("MUFU.EX2", 8), ("IMMA.16832", 8)])
def test_many_warps_wait_for_units(op, busy):
    assert replayed([instruction(op)] * 20, warps=4) == pytest.approx(4 * 20 * busy, rel=0.02)


def test_units_work_side_by_side():
    mixed = [instruction("IADD3"), instruction("IMAD")] * 10
    assert replayed(mixed, warps=4) == pytest.approx(4 * 20, rel=0.02)


def test_integer_products_take_the_units_of_others_on_8_0():
    mixed = [instruction("FFMA"), instruction("IMAD")] * 10
    assert replayed(mixed, warps=4, capability=80) == pytest.approx(4 * 20 * 2, rel=0.02)


def test_what_memory_takes_is_waited_for_and_hidden():
    loop = [instruction("LDG.E.128", sets=(0, 7)), instruction("FFMA", waits=(0,))]
    alone = {guess: replayed(loop, guess=guess) for guess in GUESSES}
    assert alone["opt"] < alone["mid"] < alone["pes"]
    assert 500 < alone["mid"] < 560
    assert replayed(loop, warps=8) < 1.2 * alone["mid"]


def test_look_ups_cost_wavefronts():
    streams, look_ups = ([instruction(op, sets=(0, 7))] * 10 for op in ("LDG.E.CONSTANT", "LDG.E"))
    assert replayed(streams, warps=4) == pytest.approx(4 * 10 * 4, rel=0.05)
    assert replayed(look_ups, warps=4) == pytest.approx(4 * 10 * 4 * 3.6, rel=0.05)


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "blocks"),
    [(4, 255, 53248, 2), (2, 157, 18976, 6), (4, 32, 100000, 2), (4, 14, 0, 16)],
)
def test_how_many_blocks_share_a_multiprocessor(warps, registers, shared, blocks):
    assert GPUS[90].resident(warps, registers, shared) == blocks


def test_warps_are_spread_over_quarters():
    assert [warp_model.quarter(blocks, warps) for blocks, warps in ((6, 2), (3, 2), (2, 4))] == [3, 2, 2]


def test_bandwidth_is_that_of_a_datasheet():
    assert GPUS[90].bytes_per_cycle == pytest.approx(14.93, abs=0.01)
    assert GPUS[90].cycles_to_read(512) == pytest.approx(38.1, abs=0.1)


def test_what_the_model_does_not_know_it_says():
    loop = [instruction("HGMMA.64x8x16.F32")]
    assert "wgmma" in warp_model.why_unknown(loop, GPUS[90])
    assert "10.0" in warp_model.why_unknown([], GPUS[100])
    assert warp_model.why_unknown([instruction("IMMA.16832")], GPUS[90]) == ""


# Statistics of another shape


def test_statistics_are_stretched_by_directions():
    own = Maker(Shape(32, 2, 2)).statistics()
    wide = stretched(own, Attention(64, 3, 2, 1e4))
    assert wide.key_mean.shape == (3, 64)
    assert wide.key_quantiles.shape == (3, 64, own.key_quantiles.shape[2])
    for name in ("key_covariance", "query_moment", "value_covariance", "output_moment"):
        once, twice = (torch.linalg.eigvalsh(getattr(x, name)[0]) for x in (own, wide))
        assert torch.allclose(twice, once.repeat_interleave(2), atol=1e-4)
    assert torch.equal(wide.key_mean[2], wide.key_mean[0])
    assert torch.equal(wide.key_mean[:2, [1, 33]], own.key_mean[:, [0, 16]])


def test_no_other_multiple_is_stretched_to(refuses):
    with refuses("cannot be stretched to 80"):
        stretched(Maker(Shape(32, 2, 2)).statistics(), Attention(80, 3, 2, 1e4))


# The command


def test_the_command_predicts():
    result = run(*BENCH, "-p", "quarot-3", "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    by_reads = {row["reads"]: row for row in rows}
    assert by_reads.keys() == {"codes", "exact", None}
    for row in rows:
        assert (row["case"], row["preset"], row["capability"], row["head_dim"]) == ("static", "quarot-3", 90, 64)
        assert (row["statistics"], row["layers"]) == ("synthetic", 1)
        assert 0 < row["registers"] <= 255
        assert 0 < row["filled"] <= 1
    codes, exact, others = (by_reads[name] for name in ("codes", "exact", None))
    cycles = codes["model_cycles_per_token_head"]
    assert 0 < cycles["opt"] <= cycles["mid"] <= cycles["pes"]
    instructions = sum(codes["loop_instructions"].values()) * 32 * codes["warps"] / codes["tokens_per_tile"]
    assert codes["thread_instructions_per_token_head"] == instructions
    assert codes["bandwidth_cycles_per_token_head"] < exact["bandwidth_cycles_per_token_head"] / 4
    low, high = codes["predicted_ratio_bf16_range"]
    assert low <= codes["predicted_ratio_bf16"] <= high
    assert exact["predicted_ratio_bf16"] is None
    assert others["model_cycles_per_token_head"] is None
    assert others["why"] == "It has no loop over tokens."


@pytest.mark.parametrize(("preset", "most"), [("b3", 1050), ("b2", 1050)])
def test_a_step_takes_no_more_instructions_than_it_may(preset, most):
    """At head_dim 128; 10,740 and 7,044 were those of tables in memory."""
    shape = ("--shape", "llama-3.1-8b", "--statistics", "synthetic", "--capability", "90")
    result = run("bench", "kernels", "--static", *shape, "-p", preset, "--json")
    assert result.exit_code == 0, result.output
    rows = {row["kernel"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert rows.keys() == {"prepare", "step"}
    assert rows["step"]["thread_instructions_per_token_head"] <= most
    assert rows["step"]["registers"] <= 168


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--static", "--signs", "128"), "leave --signs and --bits out"),
        (("--capability", "90"), "are of --static"),
        (("--static", "--capability", "86"), "choose from 80, 89, 90, 100"),
        (("--static", "--shape", "other"), "choose from llama-3.1-8b, smollm2"),
        (("--static", "--statistics", "other"), "choose from smollm2, synthetic"),
        ((*BENCH[2:], "-p", "full"), "codes that no kernel on a GPU reads"),
    ],
)
def test_refusals(arguments, message):
    result = run("bench", "kernels", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())
