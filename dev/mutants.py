#!/usr/bin/env python3
"""Plants faults in the program, one at a time, and checks that the tests notice each.

    mutants.py [--only SUBSTRING]... [--list] [--check] [--jobs N] [--work DIR] [--output FILE]

A fault is a piece of text of one source file and what replaces it. The tree itself is never touched: faults are planted
in a copy. What depends on the changed file (g++ -MMD says it) is compiled again and linked with the other objects and
with the test groups that the fault names. A fault is caught when one of those tests fails, by a check or by a crash;
the same tests must pass without it. A fault that does not compile counts as missed. The GPU's kernels are compiled as
the stand-in of dev/simt, which runs them on the CPU; their faults are in mutants_gpu.py. For the groups amx and
attention, tiles are a stand-in's as well. Faults of many ranks are in mutants_ranks.py; their tests start mpirun, and
without MPI (mpicxx, or what the environment variable MPICXX names) they are left out.

Writes the tables of faults and tests to --output (all faults, so not with --only). --check compiles nothing: it says
whether the text of every fault stands in its file, as often as the fault says. The last line is
`N passed, N failed`: faults caught; faults missed, and tests that fail without any fault. Exit status 1 when anything
failed. With --work the objects are kept for the next run. Needs g++ and what the program needs.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True  # of the module below: the tree stays as it is
from mutants_gpu import FAULTS as GPU_FAULTS
from mutants_gpu import Fault
from mutants_ranks import FAULTS as RANKS_FAULTS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fopenmp", "-w"] + (["-march=x86-64-v2"] if X86 else [])
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2, "-mprefer-vector-width=512"]
VNNI = [*AVX512, "-mavx512vnni"]
TIERS = {"kernels/cpu/isa_avx2.cpp": AVX2, "kernels/cpu/isa_avx512.cpp": AVX512, "kernels/cpu/isa_avx512vnni.cpp": VNNI,
         "kernels/cpu/isa_amx.cpp": [*VNNI, "-mavx512vbmi", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]}
# What these groups see with the stand-in's tiles; as sources they are named with STANDIN before their path.
STANDIN = "simt/"
AMX_GROUPS = {"amx", "attention"}
AMX_SOURCES = {"kernels/cpu/" + name for name in ("isa_amx.cpp", "isa_choose.cpp", "amx_permitted.cpp")}
# Whether the program is one for a GPU. test_llama.cu has the groups of all kinds, those not linked without a test.
DEFINES = {"train_llama.cu": ["-DHAVE_GPU=0"], "test_llama.cu": ["-DHAVE_GPU=2"]}
# The GPU's kernels, for groups of tests named gpu_...
GPU_SOURCES = ["kernels/gpu.cu", "kernels/gpu_attention.cu", "kernels/gpu_comm.cu", "kernels/gpu_nf4.cu",
               "dev/simt/nccl.cpp"]
# Of the library, one of the first two is linked.
COMM_SOURCES = {"kernels/comm_mpi.cpp", "kernels/comm_none.cpp", "kernels/gpu_comm_none.cpp"}
TEST_SOURCES = ["test_llama.cu", "dev/tests/test.cpp", "dev/tests/comm.cpp"]  # of every group
PROGRAM_GROUPS = {"math", "trainer", "trainer_ranks"}  # tests that run the program itself
# Of the tests. A stream that does not wait for another one's event runs before it, or after: as a card's may.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "SIMT_STREAMS": "queues"}
LIBRARIES = ["-lpcre2-8", "-lcrypto"]
LIBRARY_FOLDERS = ["", "io", "tokenizer", "kernels", "kernels/cpu"]
SOURCES = (".cpp", ".cu", ".h", ".cuh", ".inc")
LEFT_OUT = {".git", "build", "runs", "__pycache__", "train_llama", "test_llama"}  # of the copy
TEST_SECONDS = 600

GEMM_H, LEAF_GEMM = "kernels/cpu/gemm.h", "kernels/cpu/leaf_gemm.inc"
VNNI_CPP, AMX_CPP = "kernels/cpu/isa_avx512vnni.cpp", "kernels/cpu/isa_amx.cpp"
LEAF_AMX = "kernels/cpu/leaf_attention_amx.inc"

FAULTS = [
    # ---- RMSNorm, RoPE, SwiGLU
    Fault("RoPE turns the other way", "kernels/cpu/elementwise.h", "half, inverse);", "half, !inverse);",
          "elementwise/rope model/dump_gqa"),
    Fault("RoPE pairs neighbours instead of halves", "kernels/cpu/elementwise.h",
          "row_kernels(dev).rotate(head, head + half, rope.cos + at, rope.sin + at, half, inverse);",
          "for (size_t i = 0; i < half; i++) { row_kernels(dev).rotate(head + 2 * i, head + 2 * i + 1, rope.cos "
          "+ at + i, rope.sin + at + i, 1, inverse); }", "elementwise/rope model/dump_gqa"),
    Fault("RoPE's gradient is not turned back", "kernels/cpu/elementwise.h", "rope, N, true);", "rope, N, false);",
          "elementwise/rope linear/linear_rope"),
    Fault("RoPE turns the values as well", "llama.h", "a.positions, c.NH + c.NKV, c.HS}",
          "a.positions, c.NH + 2 * c.NKV, c.HS}", "model/dump_gqa"),
    Fault("RMSNorm without eps", "kernels/cpu/elementwise.h", "std::sqrt(mean + eps)", "std::sqrt(mean)",
          "elementwise/rms"),
    Fault("RMSNorm's backward without the term through the mean", "kernels/cpu/leaf_rows.inc",
          "v_set1(rstd * rstd * mean)", "v_zero()", "elementwise/rms"),
    Fault("second RMSNorm uses the first one's weight", "llama.h", "y.rstd2, m.w.layers[l].norm2), group, p.N",
          "y.rstd2, m.w.layers[l].norm1), group, p.N", "model/dump_gqa"),
    Fault("derivative of SwiGLU: sigmoid in place of x sigmoid", "kernels/cpu/leaf_rows.inc",
          "v_fma(silu, v_sub(v_set1(1), s), s)", "v_fma(s, v_sub(v_set1(1), s), s)", "elementwise/swiglu"),
    Fault("SwiGLU takes gate and up the wrong way round", "kernels/cpu/gemm.h", "silu_mul_wide(out, x, x + op.ld, n)",
          "silu_mul_wide(out, x + op.ld, x, n)", "linear/linear_double model/dump_gqa"),
    Fault("llama3 RoPE: ends of the ramp exchanged", "llama_config.cpp",
          "(1.0f - smooth) * keep / factor + smooth * keep", "smooth * keep / factor + (1.0f - smooth) * keep",
          "config/config_inv_freq model/dump_gqa"),

    # ---- attention
    Fault("attention scaled by HS instead of its root", "kernels/cpu/attention.h", "1 / std::sqrt(double(HS))}",
          "1 / double(HS)}", "attention/"),
    Fault("dQ without the scale", "kernels/cpu/attention.h", "queries, false, scale, w.rows",
          "queries, false, Real(1), w.rows", "attention/"),
    Fault("causal mask lets a query see the next key", "kernels/cpu/attention.h", "ptrdiff_t(query + r + 1)",
          "ptrdiff_t(query + r + 2)", "attention/"),
    Fault("backward: causal mask lets a query see the next key", "kernels/cpu/attention.h",
          "diagonal ? r + 1 : keys", "diagonal ? r + 2 : keys", "attention/"),
    Fault("query head h reads kv head h mod NKV", "kernels/cpu/attention.h", "size_t(t.kv) * group + g;",
          "size_t(t.kv) + g * size_t(s.NKV);", "attention/", (1, 2)),
    Fault("backward: query heads of another kv head", "kernels/cpu/attention.h", "h = size_t(t.kv) * group;",
          "h = size_t(t.kv);", "attention/"),
    Fault("attention reaches across documents", "llama.h",
          "p.docs = documents_place(m.dev, a.documents, b.cu_seqlens.data(), int(b.cu_seqlens.size()) - 1, c.HS);",
          "const int32_t all[2] = {0, int32_t(p.N)}; p.docs = documents_place(m.dev, a.documents, all, 1, c.HS);",
          "model/packed_equals_separate"),
    Fault("attention's log-sum-exp without the maximum", "kernels/cpu/attention.h",
          "w.max[g * B + i] + std::log(w.total[i])", "std::log(w.total[i])", "attention/"),
    Fault("sums of values not shrunk to the new maximum", "kernels/cpu/attention.h", "m, HS, n, key > 0, w.shrink",
          "m, HS, n, key > 0", "attention/"),
    Fault("running sum of the softmax not shrunk to the new maximum", "kernels/cpu/leaf_attention.inc",
          "v_fma(v_load(total), v_set1(f[i]), v_add(t[0], t[1]))", "v_add(v_load(total), v_add(t[0], t[1]))",
          "attention/"),
    Fault("dK and dV of the diagonal: only the last query head counts", "kernels/cpu/attention.h",
          "const bool add = !diagonal || g > 0;", "const bool add = !diagonal;", "attention/"),
    Fault("D of the softmax's gradient left out", "kernels/cpu/leaf_attention.inc",
          "v_store(d + c, v_mul(e, v_sub(v_load(d + c), mean)));", "v_store(d + c, v_mul(e, v_load(d + c)));",
          "attention/"),
    Fault("D left out where a row ends within a vector", "kernels/cpu/leaf_attention.inc",
          "g = v_mul(e, v_sub(v_load(d + c), mean));", "g = v_mul(e, v_load(d + c));", "attention/"),
    Fault("softmax of keys behind the diagonal, within a vector", "kernels/cpu/leaf_attention.inc",
          "vec x = v_first(v_load(p + c), none, int(here - c));", "vec x = v_load(p + c);", "attention/"),
    Fault("gradient of keys behind the diagonal, within a vector", "kernels/cpu/leaf_attention.inc",
          "v_store(p + c, v_first(e, v_zero(), int(here - c)));", "v_store(p + c, e);", "attention/"),

    # ---- loss
    Fault("cross-entropy's exp without the maximum", "kernels/cpu/classifier.h",
          "max + std::log(kernels.exp_sum(logits, max, V))", "std::log(kernels.exp_sum(logits, Real(0), V))",
          "classifier/"),
    Fault("gradient of the loss: 1 taken from the label's, whatever the scale", GEMM_H,
          "out[label - column] -= op.scale;", "out[label - column] -= 1;", "classifier/"),
    Fault("a tie of logits counts for the later id", "kernels/cpu/classifier.h", "best = logits[v] < max;",
          "best = logits[v] <= max;", "classifier/"),
    Fault("gradients are a mean of the passes' means", "train_step.h", "true, 1 / double(r.targets))",
          "true, 1 / double(passes.size() * b.n_labels))", "model/accumulation"),
    Fault("only the last pass's gradient counts", "train_step.h", "llama_backward(m, p, last);",
          "llama_zero_gradients(m); llama_backward(m, p, last);", "model/accumulation"),
    Fault("the head reads the embedding though it is not tied", "llama_io.h", "if (m.c.tied) { m.w.head",
          "if (true) { m.w.head", "model/dump_gqa"),
    Fault("a stored head is used though it is tied", "llama_io.h", "e = tied_head_warning(r, m.c, warnings);",
          "e = tied_head_warning(r, m.c, warnings); if (m.c.tied && safetensors_find(r.st, \"lm_head.weight\")) { "
          "uint8_t* own; llama_alloc(m, own, m.w.head.elements() * store_bytes(m.w.head.store), \"a head\"); "
          "m.w.head.data = own; LoadUnit<Dev> more{m, r, options, nullptr, {}}; more.matrix(\"lm_head.weight\", "
          "m.w.head, m.c.V, m.c.C, false); }", "load/ model/dump_tied"),

    # ---- LoRA and dropout
    Fault("LoRA's scale is alpha r", "llama.h", ": alpha / r;", ": alpha * r;", "model/dump_gqa"),
    Fault("rsLoRA's scale is that of LoRA", "llama.h", "alpha / std::sqrt(double(r))", "alpha / r",
          "model/dump_linear_rslora"),
    Fault("scale left out of the forward pass", "kernels/cpu/linear.h",
          "operand_stored<X>(xa + rank, size_t(g.R), part.scale)", "operand_stored<X>(xa + rank, size_t(g.R))",
          "linear/linear_double linear/linear_finite"),
    Fault("scale left out of dB", "kernels/cpu/linear.h", "+= part.scale * s.right[", "+= s.right[",
          "linear/linear_double linear/linear_finite"),
    Fault("dB transposed", "kernels/cpu/linear.h", "part.dB[o * r + i]", "part.dB[i * OC + o]",
          "linear/linear_double linear/linear_finite"),
    Fault("dA of x without the dropout mask", "kernels/cpu/linear.h", "x.drop = drop.p > 0 ? &drop : nullptr;",
          "x.drop = nullptr;", "linear/linear_double linear/linear_finite linear/linear_dropout"),
    Fault("dx of the adapter without the dropout mask", "kernels/cpu/linear.h",
          "dropout_run(dev, from, drop, part.module, row + i, 0, C);", "",
          "linear/linear_double linear/linear_finite linear/linear_dropout"),
    Fault("dropout keeps without 1 / (1 - p)", "kernels/cpu/gemm.h", "Real(1) / (Real(1) - Real(drop.p))", "Real(1)",
          "linear/linear_dropout linear/linear_double"),
    Fault("dropout keyed by the row of the pass", "kernels/cpu/gemm.h",
          "{drop.example[row], uint32_t(drop.position[row]), module}", "{uint32_t(row), 0, module}",
          "linear/linear_dropout model/packed_equals_separate"),
    Fault("dropout the same in every step", "kernels/cpu/gemm.h", " + drop.step;", ";", "linear/linear_dropout"),
    Fault("dropout the same in all linears", "kernels/cpu/gemm.h", "uint32_t(drop.position[row]), module}",
          "uint32_t(drop.position[row]), 0}", "linear/linear_dropout"),
    Fault("A starts in [0, bound)", "llama.h", "(2 * u - 1) * bound", "u * bound", "model/adapter_start"),

    # ---- products on the CPU: the engine
    Fault("a scaled operand is read where it stands", GEMM_H, "if (op.kind == Operand<X>::PLAIN && op.scale == 1)",
          "if (op.kind == Operand<X>::PLAIN)", "linear/linear_double"),
    Fault("an input's scale is not applied", GEMM_H, "operand_scale(out, op.scale, n);", "", "linear/linear_double",
          (2, 2)),
    Fault("an input under dropout is read where it stands", GEMM_H, "!op.map && !op.drop &&", "!op.map &&",
          "linear/linear_double"),
    Fault("an input with a map is read where it stands", GEMM_H, "!op.map && !op.drop &&", "!op.drop &&",
          "classifier/"),
    Fault("lines in parts: all go to the first units", GEMM_H, "pack(out + i / f.unit *", "pack(out + 0 *",
          "linear/linear_tiers"),
    Fault("columns in parts: a line is taken for a unit", GEMM_H, "panel + i / f.unit * unit, in + j",
          "panel + i * unit, in + j", "math/curves linear/"),
    Fault("columns in groups: all go to the first panels", GEMM_H, "out + (j0 + j) / width * panel",
          "out + j / width * panel", "linear/linear_double linear/linear_tiers"),
    Fault("absmax of the rows of a part taken as if they stood side by side", GEMM_H, "first + j * in_row, blocks);",
          "first + j * blocks, blocks);", "linear/linear_tiers"),
    Fault("absmax in fp32: rows of a part taken as if they stood side by side", GEMM_H, "*lda = in_row;",
          "*lda = blocks;", "linear/linear_tiers"),
    Fault("a part of the frozen head is its first rows", GEMM_H, "row = op.row0 + (along ? k0 : first), column",
          "row = (along ? k0 : first), column", "classifier/"),
    Fault("panels of a frozen bf16 matrix all from its first columns", GEMM_H, "in + j * cols, cols,", "in, cols,",
          "linear/linear_tiers"),
    Fault("bf16 columns: panels all from the first columns", LEAF_GEMM, "load_stored(in + j0 + j, have",
          "load_stored(in + j, have", "linear/linear_tiers"),
    Fault("residual of a band is that of the first", GEMM_H, "from + i * p.ldc + n0", "from + (i - row0) * p.ldc + n0",
          "linear/"),
    Fault("what stands in C is taken for the residual", GEMM_H, "if (from && !(in_place && from == p.c))",
          "if (from && !in_place)", "linear/linear_double"),
    Fault("a term of a product overwrites those before it", GEMM_H, "const Term<X>& term = p.term[t];",
          "const Term<X>& term = p.term[t]; add = add && t == 0;", "linear/linear_double"),
    Fault("a product that should add begins anew", GEMM_H, "from = p.add ? p.c : p.residual;", "from = p.residual;",
          "classifier/"),
    Fault("a block of A is looked for behind one strip, not all", GEMM_H, "term.a.p + strips * strip_bytes(f, k0)",
          "term.a.p + strip_bytes(f, k0)", "linear/linear_double"),
    Fault("a band reads the strips of the first", GEMM_H, "+ row0 / mr * strip;", "+ 0 * row0 / mr * strip;",
          "linear/"),
    Fault("bands are no whole strips", GEMM_H, "band = round_up((M + bands - 1) / bands, unit);",
          "band = (M + bands - 1) / bands;", "linear/"),
    Fault("the last band is left out", GEMM_H, "bands = (M + cut.band - 1) / cut.band;",
          "bands = M < cut.band ? 1 : M / cut.band;", "linear/"),
    Fault("bf16: a band may be longer than its sums", GEMM_H, "? M : SUMS_ROWS;", "? M : M;", "linear/"),
    Fault("residual of the first linear for all of a group", "kernels/cpu/linear.h",
          "residual ? residual + column : nullptr", "residual", "linear/linear_double"),

    # ---- products on the CPU: fp32
    Fault("NF4 lines: the absmax of the first block for all", LEAF_GEMM, "* lda + i0 / 64]", "* lda]",
          "format/format_nf4_lines"),
    Fault("NF4 columns: panels stand in each other", LEAF_GEMM, "row + at / WIDTH * WIDTH * whole_runs(k) + at % WIDTH",
          "row + at", "format/format_nf4_columns"),
    Fault("whole vectors of C at its right end", LEAF_GEMM, "if (n == W) { v_store(row + v * W, out);",
          "if (true) { v_store(row + v * W, out);", "format/format_products"),
    Fault("whole vectors behind a strip", LEAF_GEMM, "size_t(i) * ldo + W <= room", "size_t(i) * ldo <= room",
          "format/format_products"),

    # ---- products on the CPU: int16
    Fault("int16: A has as many steps as overflow", VNNI_CPP, "A_STEPS = 8191", "A_STEPS = 16383", "format/"),
    Fault("int16: A has one step too many", VNNI_CPP, "A_STEPS = 8191", "A_STEPS = 8192", "format/"),
    Fault("int16: B has half its steps", VNNI_CPP, "B_STEPS = 2048", "B_STEPS = 1024", "format/"),
    Fault("int16: A's scale for another number of steps", VNNI_CPP, "_mm512_set1_ps(1 / A_STEPS)",
          "_mm512_set1_ps(1 / (A_STEPS + 1))", "format/"),
    Fault("int16: B's scale is no power of two", VNNI_CPP, "_mm512_set1_epi32(0x7f800000)",
          "_mm512_set1_epi32(0x7fffffff)", "format/"),
    Fault("int16: no least scale of A", VNNI_CPP, "_mm512_set1_ps(A_STEPS * 0x1p-126f)", "_mm512_set1_ps(0)",
          "format/"),
    Fault("int16: no least scale of B", VNNI_CPP, "_mm512_set1_ps(B_STEPS * 0x1p-126f)", "_mm512_set1_ps(0)",
          "format/"),
    Fault("int16: a block's greatest with its sign", VNNI_CPP, "_mm512_set1_epi32(0x7fffffff)",
          "_mm512_set1_epi32(-1)", "format/"),
    Fault("int16: a block's greatest as floats, which drops a NaN", VNNI_CPP,
          "greatest = _mm512_max_epi32(greatest, magnitude(x[v]));",
          "greatest = _mm512_castps_si512(_mm512_max_ps(_mm512_castsi512_ps(greatest), "
          "_mm512_castsi512_ps(magnitude(x[v]))));", "format/"),
    Fault("int16: a block's greatest from half of it", VNNI_CPP, "magnitude(x[v]));", "magnitude(x[v & 1]));",
          "format/"),
    Fault("int16: the scales are multiplied first, and may be 0", VNNI_CPP,
          "__m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][v]), right[v]); float* t = total[i] + v * 16; "
          "_mm512_store_ps(t, _mm512_fmadd_ps(x, left, _mm512_load_ps(t)));",
          "float* t = total[i] + v * 16; _mm512_store_ps(t, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i][v]), "
          "_mm512_mul_ps(right[v], left), _mm512_load_ps(t)));", "format/"),
    Fault("int16: the scale of A's first row for all", VNNI_CPP, "_mm512_set1_ps(a->scale[i])",
          "_mm512_set1_ps(a->scale[0])", "format/"),
    Fault("int16: a line's tail is read beyond its end", VNNI_CPP, "load(in + v * 16, lanes_of(v, int(n)))",
          "load(in + v * 16, n > 0 ? 0xffff : 0)", "format/"),
    Fault("int16: columns of an odd length have no zero at the end", VNNI_CPP,
          "p + 1 < count ? lanes_of(v, n) : 0", "lanes_of(v, n)", "format/"),
    Fault("int16: NF4's table is not rounded to bf16", VNNI_CPP,
          "to_steps(round_to_bf16(_mm512_mul_ps(_mm512_loadu_ps(NF4_CODE), _mm512_set1_ps(absmax))), inverse)",
          "to_steps(_mm512_mul_ps(_mm512_loadu_ps(NF4_CODE), _mm512_set1_ps(absmax)), inverse)", "format/"),
    Fault("int16: NF4 columns: the scale of some lines for all", VNNI_CPP,
          "block_scale(false, _mm512_reduce_max_epi32(greatest), &factor)",
          "block_scale(false, _mm_cvtsi128_si32(_mm512_castsi512_si128(greatest)), &factor)", "format/"),
    Fault("int16: NF4 columns: odd lines with the table of the even ones", VNNI_CPP, "_mm512_set1_epi32(0x00100000)",
          "_mm512_setzero_si512()", "format/"),
    Fault("int16: NF4 columns: lines behind the last have weights", VNNI_CPP, "float top[BLOCK] = {};",
          "float top[BLOCK]; for (float& t : top) { t = 1; }", "format/"),
    Fault("int16: NF4 columns: the absmax of the first unit for all", VNNI_CPP,
          "absmax[(u * BLOCK + i) * lda + j]", "absmax[i * lda + j]", "format/"),
    Fault("int16: NF4 columns: panels and units exchanged", VNNI_CPP, "+ j * units + u,", "+ u * (n / NR) + j,",
          "format/"),
    Fault("int16: whole vectors of C at its right end", VNNI_CPP, "v + 1 < V ? 0xffff : lanes(columns - v * 16);",
          "0xffff;", "format/"),
    Fault("int16: what stands in C is lost", VNNI_CPP,
          "add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), out) : out", "out", "format/"),

    Fault("a thread spreads every piece of memory but the last of its round", "kernels/cpu/device.cpp",
          "size_t(worker) * HUGE_PAGE; i < bytes", "size_t(worker) * HUGE_PAGE; i + HUGE_PAGE < bytes",
          "engine/pages_are_spread"),

    # ---- products on the CPU: bf16, through the stand-in of the tiles
    Fault("tiles: sums begin anew every 256 k", AMX_CPP, "unit == 0, next);", "true, next);", "amx/"),
    Fault("tiles: row 17 of a strip is left out", AMX_CPP, "if (mr > 16) {", "if (mr > 17) {", "amx/"),
    Fault("tiles: rows 16 to 31 of A are rows 0 to 15", AMX_CPP, "tile_dot_bf16<C2, A1, B0>();",
          "tile_dot_bf16<C2, A0, B0>();", "amx/", (1, 2)),
    Fault("tiles stay open", AMX_CPP, "tiles_close();", "", "amx/", (1, 2)),
    Fault("tiles: what stands in C is lost", AMX_CPP, "if (add) { sum =", "if (false) { sum =", "amx/"),
    Fault("tiles: whole vectors of C at its right end", AMX_CPP, "_mm512_mask_storeu_ps(c + j, lanes, sum);",
          "_mm512_storeu_ps(c + j, sum);", "amx/"),
    Fault("tiles: columns behind the last are those of the tile before", AMX_CPP, "clear(lines, TILE);", "", "amx/"),
    Fault("tiles: an odd last line is paired with itself", AMX_CPP, "high, have > 1 ? high : 0", "high, high", "amx/"),
    Fault("tiles: NF4: an odd last line is paired with itself", AMX_CPP,
          "nf4_table(absmax[i]), _mm256_setzero_si256());", "nf4_table(absmax[i]), nf4_table(absmax[i]));", "amx/"),
    Fault("tiles: NF4: a line's tail is not cut", AMX_CPP, "nf4_lanes(beyond(n, 32))", "0xffffffffu", "amx/"),
    Fault("tiles: NF4: second lines with the table of the first", AMX_CPP, "_mm512_set1_epi32(0x100000)",
          "_mm512_setzero_si512()", "amx/"),
    Fault("tiles: NF4: the absmax of the first line for both", AMX_CPP, "nf4_table(absmax[lda + i])",
          "nf4_table(absmax[i])", "amx/"),
    Fault("attention by tiles: keys that the second half alone sees are left out", LEAF_AMX,
          "uint32_t(first) | uint32_t(second) << 16", "uint32_t(first)", "attention/"),
    Fault("attention by tiles: a row sees what the first of its tile sees", LEAF_AMX, "seen_lanes(here[r], 16 * half)",
          "seen_lanes(here[0], 16 * half)", "attention/"),
    Fault("attention by tiles: sums that stand turned are stored as they stand", LEAF_AMX, "turned && tile < 4",
          "false && tile < 4", "attention/"),
    Fault("attention by tiles: the sums of earlier keys keep their old scale", "kernels/cpu/attention.h",
          "if (add && f) {", "if (false) {", "attention/"),

    # ---- the choice of the arithmetic
    Fault("--math auto is fp32 where int16 is to be had", "kernels/cpu/device.cpp",
          "|| (any && dev.isa->int16) ? dev.isa->int16", "? dev.isa->int16", "math/tiers"),
    Fault("the adapters' own products in int16", "kernels/cpu/device.cpp", "dev.adapter = dev.isa->fp32;",
          "dev.adapter = base;", "linear/"),
    Fault("an arithmetic that the processor lacks is passed over", "train_device.h",
          "if (!device_math(dev, run.o.math.c_str())) {", "if (device_math(dev, run.o.math.c_str()), false) {",
          "math/tiers"),
    Fault("--math int16 with a GPU is taken", "train_device.h", 'if (o.math == "int16" && o.device == "cuda") {',
          "if (false) {", "math/tiers"),
    Fault("a refused --math int16 is said to want AMX", "train_device.h", 'run.o.math == "int16" ? "AVX-512',
          'run.o.math != "int16" ? "AVX-512', "math/tiers"),

    # ---- AdamW and the schedule
    Fault("AdamW without the second moment's bias correction", "kernels/adamw.h", "Real(std::sqrt(correction2))",
          "Real(1)", "adamw/"),
    Fault("AdamW's first bias correction one step late", "kernels/adamw.h", "1 - std::pow(a.beta1, double(a.step))",
          "1 - std::pow(a.beta1, double(a.step + 1))", "adamw/"),
    Fault("weight decay after the update", "kernels/cpu/leaf_rows.inc", "v_set1(a->step_size), mean)",
          "v_set1(a->step_size * a->keep), mean)", "adamw/"),
    Fault("clip coefficient ignored by AdamW", "kernels/cpu/leaf_rows.inc", "v_set1(a->grad_scale)", "v_set1(1)",
          "adamw/"),
    Fault("clipping without the limit of 1", "train_step.h", "std::min(1.0, rates.clip / (r.grad_norm + 1e-6))",
          "rates.clip / (r.grad_norm + 1e-6)", "model/clip"),
    Fault("no clipping", "train_step.h", "std::min(1.0, rates.clip / (r.grad_norm + 1e-6))", "1.0",
          "model/clip"),
    Fault("warm-up starts at 0", "train_run.h", "run.lr * (s + 1) / W", "run.lr * s / W", "schedule/"),
    Fault("decay reaches its end one step early", "train_run.h", "(s - W) / (T - W)", "(s + 1 - W) / (T - W)",
          "schedule/"),
    Fault("every epoch has the same order", "train_run.h", "STREAM_ORDER, uint64_t(epoch))",
          "STREAM_ORDER, uint64_t(0))", "schedule/"),
    Fault("dropout seed not that of the run", "train_setup.h", "m.dropout_seed = run.o.seed;",
          "m.dropout_seed = uint64_t(getpid());", "trainer/same_run"),
    Fault("Philox with seven rounds", "kernels/random.h", "round < 10", "round < 7", "random/"),
    Fault("a permutation leaves nothing in its place", "kernels/random.h", "uint64_t(i) + 1))",
          "uint64_t(i)))", "random/"),

    # ---- recomputation
    Fault("gate and up made again from the layer below", "llama.h", "layer_gate_up(m, p, l);",
          "layer_gate_up(m, p, l > 0 ? l - 1 : 0);", "model/same_bits_for_any_recompute", (2, 2)),
    Fault("attention not made again", "llama.h", "if (policy == Recompute::FULL) { layer_attention(m, p, l); }", "",
          "model/same_bits_for_any_recompute"),

    # ---- NF4 and dtypes
    Fault("NF4: nibbles exchanged when written", "kernels/cpu/nf4.cpp", "code[2 * i] << 4 | code[2 * i + 1]",
          "code[2 * i + 1] << 4 | code[2 * i]", "nf4/"),
    Fault("NF4: nibbles exchanged when read", "kernels/cpu/leaf_gemm.inc", "? pair >> 4 : pair & 15",
          "? pair & 15 : pair >> 4", "nf4/"),
    Fault("NF4: a weight on a threshold goes up", "kernels/cpu/nf4.cpp", "x[i] > t;", "x[i] >= t;", "nf4/"),
    Fault("double quantisation without the offset", "kernels/cpu/nf4.h", "return product + m.offset;",
          "return product;", "nf4/ model/bnb_weights"),
    Fault("absmax of the wrong block of blocks", "kernels/cpu/nf4.h", "m.absmax2[block / 256]", "m.absmax2[0]",
          "nf4/ model/bnb_weights"),
    Fault("double quantisation takes the entry below, not the nearest", "kernels/cpu/nf4.cpp",
          "middle[i] = (map[i] + map[i + 1]) / 2.0f;", "middle[i] = map[i + 1];", "nf4/"),
    Fault("absmax map made in double", "kernels/cpu/nf4.cpp", "std::fma(step, float(i), 0.1f)",
          "float(0.1 + 0.9 * i / (n - 1))", "nf4/ bnb/"),
    Fault("bf16 by truncation", "kernels/bf16.h", "(u + 0x7fff + ((u >> 16) & 1)) >> 16", "u >> 16",
          "nf4/ elementwise/bf16"),
    Fault("bf16 ties away from even", "kernels/bf16.h", "0x7fff + ((u >> 16) & 1)", "0x8000",
          "convert/bf16"),
    Fault("subnormal halves read as zero", "kernels/bf16.h", "float(mantissa) * 0x1p-24f", "0.0f",
          "linear/linear_double"),
    Fault("quantisation tables of a checkpoint not compared", "llama_bnb.cpp", "ulps(table[i], need[i]) > 2", "false",
          "bnb/"),

    # ---- from text to passes
    Fault("labels not shifted", "tokenizer/pack.cpp", "label ? data.ids[first + k + 1]", "label ? data.ids[first + k]",
          "pack/"),
    Fault("a document's first token is a label", "tokenizer/pack.cpp", "bool label = k + 1 < n && data",
          "bool label = first + k + 1 < data.ids.size() && data", "pack/"),
    Fault("positions go on across documents", "tokenizer/pack.cpp", "b.positions.push_back(int32_t(k));",
          "b.positions.push_back(int32_t(b.positions.size()));", "pack/"),
    Fault("passes filled next fit, not best fit", "tokenizer/pack.cpp", "room.lower_bound({n, 0})",
          "std::find_if(room.begin(), room.end(), [&](const auto& x) { return x.first >= n && x.second + 1 == "
          "passes.size(); })", "pack/"),
    Fault("ignore_merges off", "tokenizer/bpe.cpp", "= ignore_merges || (", "= (", "tokenizer/"),
    Fault("merges taken from the right", "tokenizer/bpe.cpp", "if (rank[i] < best_rank)", "if (rank[i] <= best_rank)",
          "tokenizer/"),
    Fault("white space is PCRE2's \\s", "tokenizer/tokenizer.cpp",
          r'"| ?[^\\p{White_Space}\\p{L}\\p{N}]+[\\r\\n]*|\\p{White_Space}*[\\r\\n]+" '
          r'"|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",',
          r'"| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",', "tokenizer/"),
    Fault("white space of the look-ahead alone is PCRE2's", "tokenizer/tokenizer.cpp", r"(?!\\P{White_Space})",
          r"(?!\\S)", "tokenizer/"),
    Fault("digits are not split in threes", "tokenizer/tokenizer.cpp", r"|\\p{N}{1,3}", r"|\\p{N}+", "tokenizer/"),
    Fault("a piece cached by another tokenizer is used", "tokenizer/tokenizer.cpp", "state.serial != t.serial",
          "state.cache.empty()", "tokenizer/"),
    Fault("control tokens parsed in a chat's text", "tokenizer/chat.cpp", "python_strip(turn.text), parse_special);",
          "python_strip(turn.text), true);", "chat/ records/"),
    Fault("<|eot_id|> is no target", "tokenizer/chat.cpp", "turn.role == Turn::ASSISTANT && turn.train);",
          "turn.role == Turn::ASSISTANT && turn.train);\n            targets->back() = 0;", "chat/"),
    Fault("the user's turns are targets", "tokenizer/chat.cpp", "turn.role == Turn::ASSISTANT && turn.train);",
          "turn.train);", "chat/ records/"),
    Fault("template's date is another", "tokenizer/dataset.h", "26 Jul 2024", "25 Jul 2024", "chat/"),
    Fault("turns not stripped", "tokenizer/chat.cpp", "append_text(ids, t, python_strip(turn.text), parse_special);",
          "append_text(ids, t, turn.text, parse_special);", "chat/"),
    Fault("no EOS after a plain record", "tokenizer/dataset.cpp", "if (t.eos >= 0 && ids.size() > bos",
          "if (false && bos", "records/"),
    Fault("the prompt of a plain record is a target", "tokenizer/dataset.cpp", "std::max<size_t>(learnt, 1)",
          "size_t(1)", "records/"),
    Fault("labels of token records taken as already shifted", "tokenizer/records.cpp", "label.integer == r.ids[i];",
          "i + 1 < n && label.integer == r.ids[i + 1];", "records/records_tokens"),

    # ---- files
    Fault("gaps between tensors let through", "io/safetensors.cpp", "if (t.offset != end)", "if (t.offset < end)",
          "safetensors/"),
    Fault("shard names may leave the directory", "io/safetensors.cpp", "if (!legal_shard_name(shard.string))",
          "if (false)", "safetensors/"),
    Fault("duplicate keys of JSON let through", "io/json.cpp", "if (twice) {", "if (false) {", "json/"),
    Fault("JSON nests without limit", "io/json.cpp", "if (open.size() >= size_t(text.limits->depth))", "if (false)",
          "json/"),
    Fault("lone surrogates of JSON let through", "io/json.cpp", "int unit = escape_unit(text + i, n - i);",
          "int unit = 0;", "json/"),
    Fault("unexpected tensors of a checkpoint ignored", "llama_io.h", "if (r.wanted.count(t.name) == 0 && !ignored",
          "if (false && !ignored", "load/"),
    Fault("non-finite weights let through", "kernels/widen.h", "finite &= std::isfinite(out[i]);", "", "load/"),
    Fault("adapters of another kind accepted", "llama_adapter.cpp", "!is_harmless(j.keys[i]) && !is_unset(j.items[i])",
          "false", "load/"),
    Fault("a manifest's own hash unchecked", "io/run.cpp", " || hash->string != found)", ")", "run/"),
    Fault("hashes of a checkpoint's files unchecked", "io/run.cpp", "if (hex != sha256->string)", "if (false)", "run/"),
    Fault("one checkpoint too few kept", "io/run.cpp", "++whole <= keep)", "++whole < keep)", "run/"),
    Fault("log not cut back on resume", "io/run.cpp", "if (keep < log.file.written) {", "if (false) {", "run/"),
    Fault("a locked directory is taken all the same", "io/run.cpp", "if (flock(fd, LOCK_EX | LOCK_NB) != 0)",
          "if (false)", "run/"),
    Fault("resume without the second moments", "train_checkpoint.h", "m.adapter.m : m.adapter.v",
          "m.adapter.m : m.adapter.m", "trainer/killed_and_resumed"),
    Fault("resume with changed data", "train_run.h", "if (was != is)", "if (false)", "trainer/resume_refuses"),
    Fault("resume with another rate", "io/options.cpp", "if (!resume || (s.flags",
          "if (true || !resume || (s.flags", "options/"),
    Fault("a non-finite gradient goes into the update", "train_step.h",
          "if (!std::isfinite(r.loss) || !std::isfinite(r.grad_norm))", "if (false)", "model/non_finite"),
]

class BuildFailed(Exception):
    pass


class Mpi:
    """What an MPI's compiler wrapper adds to a command, without its C++ bindings, as scripts/probe.sh takes it; none is
    there: found is False."""

    def __init__(self):
        wrapper = shutil.which(os.environ.get("MPICXX", "mpicxx")) if os.environ.get("MPICXX") != "" else None
        self.found, self.flags, self.libraries, self.run = wrapper is not None, [], [], ""
        if wrapper is None:
            return
        shown = subprocess.run([wrapper, "-show"], capture_output=True, text=True).stdout
        words = shlex.split(re.sub(r"(?<!\S)-([ILlD]) +", r"-\1", shown))
        bindings = ("-lmpi_cxx", "-lmpichcxx", "-lmpicxx", "-lmpi++")
        self.flags = ["-DOMPI_SKIP_MPICXX", "-DMPICH_SKIP_MPICXX"] + [w for w in words if w[:2] in ("-I", "-D")]
        self.libraries = [w for w in words if (w[:2] in ("-L", "-l") or w.startswith("-Wl,")) and w not in bindings]
        self.libraries += ["-Wl,-rpath," + w[2:] for w in words if w.startswith("-L")]
        beside = re.sub(r"mpi(cxx|c\+\+|CC)([^/]*)$", r"mpirun\2", wrapper)
        self.run = beside if beside != wrapper and os.access(beside, os.X_OK) else "mpirun"

    def defines(self):
        return {"kernels/comm_mpi.cpp": self.flags, "dev/simt/nccl.cpp": ["-DHAVE_MPI=%d" % self.found] + self.flags,
                "dev/tests/comm.cpp": ['-DMPIRUN="%s"' % self.run]}


def source_files(root):
    """Paths of everything that the copy takes, relative to root."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(d for d in folders if d not in LEFT_OUT)
        for name in sorted(files):
            if name not in LEFT_OUT:
                yield os.path.relpath(os.path.join(folder, name), root)


def copy_tree(tree):
    """Makes `tree` a copy of the sources; a file that has not changed keeps its time, and so its objects."""
    wanted = set(source_files(ROOT))
    for path in wanted:
        old, new = os.path.join(tree, path), os.path.join(ROOT, path)
        with open(new, "rb") as f:
            data = f.read()
        if os.path.exists(old):
            with open(old, "rb") as f:
                if f.read() == data:
                    continue
        os.makedirs(os.path.dirname(old), exist_ok=True)
        with open(old, "wb") as f:
            f.write(data)
    for path in set(source_files(tree)) - wanted:
        os.remove(os.path.join(tree, path))


def places_of(fault, text):
    """Begin and end of each place where the fault's old text stands."""
    pattern = r"\s+".join(re.escape(word) for word in re.split(r"\s+", fault.old))
    return [m.span() for m in re.finditer(pattern, text)]


def wrong_places(fault, places):
    return "the text stands there %d times, not %d" % (len(places), fault.which[1])


def check_texts(faults):
    """What --check prints. Faults whose text does not stand in the tree as they say."""
    wrong = 0
    for fault in faults:
        path = os.path.join(ROOT, fault.file)
        places = []
        if os.path.exists(path):
            with open(path, encoding="utf-8", newline="") as f:
                places = places_of(fault, f.read())
        if len(places) != fault.which[1]:
            print("FAILED %s (%s): %s" % (fault.name, fault.file, wrong_places(fault, places)))
            wrong += 1
    print("%d passed, %d failed" % (len(faults) - wrong, wrong))
    return wrong


class Build:
    """Objects of the copy in work/obj, those of the present fault in work/fault."""

    def __init__(self, work, jobs, mpi):
        self.work, self.tree, self.pool = work, os.path.join(work, "tree"), concurrent.futures.ThreadPoolExecutor(jobs)
        self.mpi, self.defines = mpi, {**DEFINES, **mpi.defines()}
        copy_tree(self.tree)
        self.library = sorted(os.path.join(folder, name) for folder in LIBRARY_FOLDERS
                              for name in os.listdir(os.path.join(self.tree, folder))
                              if name.endswith(".cpp") and (folder or name.startswith("llama_")))
        self.library = [s for s in self.library if s not in COMM_SOURCES]
        self.library.append("kernels/comm_mpi.cpp" if mpi.found else "kernels/comm_none.cpp")

    def object(self, source, folder="obj"):
        return os.path.join(self.work, folder, source.replace("/", "_") + ".o")

    def dependencies(self, source):
        """Files that the object of source was made of, as the compiler wrote them down: of the tree, relative to it."""
        with open(self.object(source)[:-1] + "d") as f:
            words = f.read().replace("\\\n", " ").split()
        return [os.path.normpath(w) for w in words[1:] if not w.startswith("/")]

    def up_to_date(self, source):
        made = self.object(source)
        if not os.path.exists(made) or not os.path.exists(made[:-1] + "d"):
            return False
        files = [os.path.join(self.tree, d) for d in self.dependencies(source)]
        return all(os.path.exists(f) and os.path.getmtime(f) <= os.path.getmtime(made) for f in files)

    def compile(self, source, made):
        path = source[len(STANDIN):] if source.startswith(STANDIN) else source
        special = self.defines.get(path, []) + (TIERS.get(path, []) if X86 else [])
        special += ["-DAMX_STANDIN"] if path != source else []
        self.call(["g++", *FLAGS, *special, "-I.", "-MMD", "-x", "c++", "-c", path, "-o", made])

    def call(self, command):
        done = subprocess.run(command, cwd=self.tree, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildFailed(done.stderr.strip()[:2000])

    def objects(self, sources, changed=None):
        """Objects of the sources; those that the changed file plays a part in are made in work/fault."""
        os.makedirs(os.path.join(self.work, "obj"), exist_ok=True)
        stale = [s for s in sources if not self.up_to_date(s)]
        list(self.pool.map(lambda s: self.compile(s, self.object(s)), stale))
        if changed is None:
            return [self.object(s) for s in sources]
        touched = [s for s in sources if changed in self.dependencies(s)]
        missing = [s for s in touched if not os.path.exists(self.object(s, "fault"))]
        list(self.pool.map(lambda s: self.compile(s, self.object(s, "fault")), missing))
        return [self.object(s, "fault" if s in touched else "obj") for s in sources]

    def link(self, objects, name):
        program = os.path.join(self.work, name)
        self.call(["g++", "-fopenmp", *objects, *LIBRARIES, *self.mpi.libraries, "-o", program])
        return program

    def without_tests(self, sources):
        """Object of empty tables for the groups that test_llama.cu lists and none of the sources has."""
        text = {s: open(os.path.join(self.tree, s), encoding="utf-8").read() for s in ["test_llama.cu"] + sources}
        there = set(re.findall(r"\b(\w+_tests)\[\] =", "".join(text[s] for s in sources)))
        missing = sorted(set(re.findall(r"\b(\w+_tests)\[\]", text["test_llama.cu"])) - there)
        path = os.path.join(self.work, "obj", "without_tests")
        with open(path + ".cpp", "w") as f:
            f.write('#include "dev/tests/test.h"\n')
            f.writelines("extern const Test %s[] = {{nullptr, nullptr}};\n" % name for name in missing)
        self.call(["g++", *FLAGS, "-I.", "-c", path + ".cpp", "-o", path + ".o"])
        return path + ".o"

    def program(self, group, changed=None):
        """test_llama with one group; where its tests run the program itself, also that, its path in the environment."""
        name = "fault_" if changed else ""
        tests = sorted({"dev/tests/comm.cpp", "dev/tests/" + group + ".cpp"})
        sources = self.library + sorted(set(TEST_SOURCES + tests)) + (GPU_SOURCES if group.startswith("gpu_") else [])
        if group in AMX_GROUPS:
            sources = [STANDIN + s if s in AMX_SOURCES else s for s in sources]
        program = self.link(self.objects(sources, changed) + [self.without_tests(tests)], name + "tests")
        if group in PROGRAM_GROUPS:
            trainer = self.objects(self.library + ["train_llama.cu"], changed)
            os.environ["TRAIN_LLAMA_PROGRAM"] = self.link(trainer, name + "train_llama")
        return program

    def run(self, group, parts, changed=None):
        """Runs the group's tests with one of the parts in their names. {name: ok, skipped, FAILED, crashed, not run}"""
        program = self.program(group, changed)
        files = os.path.join(self.work, "files")  # of the tests: one that crashes leaves its own behind
        shutil.rmtree(files, ignore_errors=True)
        os.makedirs(files)
        os.environ.update(ENVIRONMENT, TRAIN_LLAMA_ROOT=self.tree, TMPDIR=files)

        def output(*more):
            try:
                return subprocess.run([program, *parts, *more], cwd=self.tree, stdout=subprocess.PIPE,
                                      stderr=subprocess.DEVNULL, timeout=TEST_SECONDS).stdout
            except subprocess.TimeoutExpired as e:
                return e.stdout or b""

        lines = [line.split() for line in output().decode("utf-8", "replace").split("\n")]
        results = {words[0]: words[1] for words in lines if len(words) == 4 and words[3] == "ms"}
        last = "crashed"
        for name in output("--list").decode().split():  # a test that ends the program has no line of its own
            if name not in results:
                results[name], last = last, "not run"
        return results

    @contextlib.contextmanager
    def planted(self, fault):
        """While this is open the fault stands in the copy, its file's time unchanged. Gives what is wrong, or None."""
        shutil.rmtree(os.path.join(self.work, "fault"), ignore_errors=True)
        os.makedirs(os.path.join(self.work, "fault"))
        path = os.path.join(self.tree, fault.file)
        if not os.path.exists(path):
            yield "no such file"
            return
        with open(path, encoding="utf-8", newline="") as f:
            text = f.read()
        places, times = places_of(fault, text), os.stat(path)
        if len(places) != fault.which[1]:
            yield wrong_places(fault, places)
            return
        begin, end = places[fault.which[0] - 1]
        try:
            self.write(path, text[:begin] + fault.new + text[end:], times)
            yield None
        finally:
            self.write(path, text, times)

    @staticmethod
    def write(path, text, times):
        with open(path, "w", encoding="utf-8", newline="") as f:
            f.write(text)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def by_group(fault):
    """{group: parts of test names}"""
    groups = collections.defaultdict(list)
    for part in fault.tests.split():
        groups[part.split("/")[0]].append(part)
    return groups


def check_unchanged(build, faults, known):
    """The tests of these faults pass in the copy as it is. Fills known: {test: result}; returns what is wrong."""
    wrong = []
    wanted = collections.defaultdict(set)
    for fault in faults:
        for group, parts in by_group(fault).items():
            wanted[group].update(parts)
    for group in sorted(wanted):
        results = build.run(group, sorted(wanted[group]))
        known.update(results)
        wrong += [name + ": " + result + " without any fault" for name, result in results.items()
                  if result not in ("ok", "skipped")]
        wrong += [part + ": there is no such test" for part in sorted(wanted[group])
                  if not any(part in name for name in results)]
    return wrong


def try_fault(build, fault, known):
    """Names of the tests that caught it, and what is to be said when there is none. Only a test that passes without the
    fault can catch it."""
    caught = []
    with build.planted(fault) as problem:
        if problem:
            return [], problem
        for group, parts in by_group(fault).items():
            try:
                results = build.run(group, parts, fault.file)
            except BuildFailed as e:
                return [], "does not compile: " + str(e).split("error: ")[-1].split("\n")[0]
            caught += [name for name, result in results.items()
                       if result in ("FAILED", "crashed") and known.get(name) == "ok"]
    return caught, "" if caught else "no test failed of: " + fault.tests


def write_rows(f, rows):
    f.write("| fault | file | caught by |\n|---|---|---|\n")
    for fault, tests in rows:
        more = " and %d more" % (len(tests) - 3) if len(tests) > 3 else ""
        f.write("| %s | %s | %s |\n" % (fault.name.replace("|", "\\|"), fault.file,
                                        ", ".join(tests[:3]) + more if tests else "**no test**"))


def caught_of(rows):
    return "%d of %d faults are caught.\n\n" % (sum(1 for _, tests in rows if tests), len(rows))


def write_tables(path, rows):
    def those_of(faults):
        return [r for r in rows if r[0] in faults]

    with open(path, "w", encoding="utf-8") as f:
        f.write("# Planted faults\n\n"
                "Each row is a fault that `dev/mutants.py` plants in the program, alone, and the tests of\n"
                "`test_llama` that fail with it and pass without it: the first three, of those that the script runs\n"
                "for this fault. " + caught_of(those_of(FAULTS)))
        write_rows(f, those_of(FAULTS))
        f.write("\n## GPU kernels (through the stand-in)\n\n"
                "The kernels run on the CPU, by `dev/simt`. All of these faults were planted by the script on %s.\n"
                % time.strftime("%d %B %Y") + caught_of(those_of(GPU_FAULTS)))
        write_rows(f, those_of(GPU_FAULTS))
        if those_of(RANKS_FAULTS):
            f.write("\n## Many ranks\n\nThe tests start `mpirun`. NCCL is the stand-in's.\n"
                    + caught_of(those_of(RANKS_FAULTS)))
            write_rows(f, those_of(RANKS_FAULTS))


def main():
    parser = argparse.ArgumentParser(description="Plants faults in the program and checks that the tests notice each.")
    parser.add_argument("--only", action="append", metavar="SUBSTRING", help="faults with this in name, file or tests")
    parser.add_argument("--list", action="store_true", help="show the faults and stop")
    parser.add_argument("--check", action="store_true", help="look for the text of each fault in the tree and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="compilers at a time")
    parser.add_argument("--work", metavar="DIR", help="keep copy and objects there (default: a temporary directory)")
    parser.add_argument("--output", default=os.path.join(ROOT, "dev/results/mutants.md"), metavar="FILE")
    options = parser.parse_args()
    faults = [f for f in FAULTS + GPU_FAULTS + RANKS_FAULTS
              if any(part in " ".join([f.name, f.file, f.tests]) for part in options.only or [""])]
    if not faults:
        parser.error("no fault has this in it: " + ", ".join(options.only))
    if options.list:
        for fault in faults:
            print("%-66s %-28s %s" % (fault.name, fault.file, fault.tests))
        return 0
    if options.check:
        return 1 if check_texts(faults) else 0
    mpi = Mpi()
    if not mpi.found and set(faults) & set(RANKS_FAULTS):
        print("no MPI: %d faults of many ranks are left out" % len(set(faults) & set(RANKS_FAULTS)))
        faults = [f for f in faults if f not in RANKS_FAULTS]
    with tempfile.TemporaryDirectory(prefix="mutants.") as temporary:
        work = os.path.abspath(options.work or temporary)
        build = Build(work, options.jobs, mpi)
        start = time.time()
        known = {}
        try:
            problems = check_unchanged(build, faults, known)
        except BuildFailed as e:
            problems = ["the program does not compile without any fault: " + str(e)]
            faults = []
        for problem in problems:
            print("FAILED", problem)
        print("unchanged: %d tests in %.0f s" % (len(known), time.time() - start), flush=True)
        rows = []
        for fault in faults:
            start = time.time()
            caught, problem = try_fault(build, fault, known)
            rows.append((fault, caught))
            print("%-7s %3.0f s  %s: %s" % ("ok" if caught else "MISSED", time.time() - start, fault.name,
                                            ", ".join(caught[:3]) or problem), flush=True)
    if not options.only and faults:
        os.makedirs(os.path.dirname(os.path.abspath(options.output)), exist_ok=True)
        write_tables(options.output, rows)
    caught = sum(1 for _, tests in rows if tests)
    failed = len(rows) - caught + len(problems)
    print("%d passed, %d failed" % (caught, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
