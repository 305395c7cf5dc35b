// The contract of every op: what it reads, what it writes, shapes, `=` or `+=`. Implementations are overloads on the
// device: kernels/cpu/*.h for Cpu<X>, kernels/*.cuh for Gpu<X> (declared in gpu.h). An op named here and missing for a
// device is a compile error at its call.
//
// Letters: N rows (tokens) of a pass, C hidden, F ffn, NH and NKV heads, HS head size, V vocabulary, R rank,
// OC output channels; QKV = (NH + 2 NKV) HS. X is the device's activation type, real its statistics type.
// A *_workspace function gives the bytes of dev.workspace that an op needs.
//
// embedding_forward     out (N,C) =                        tokens (N), wte (V,C)
// rmsnorm_rstd          rstd (N) =                         x (N,C), eps
// rmsnorm_forward       out (N,C) =                        x (N,C), rstd, w (C)             [tests, dumps]
// rmsnorm_backward      dx (N,C) +=                        dout (N,C), x, rstd, w
// linear_forward        out (N,OC) =, xa (N,R) =           in, group, residual, rope, dropout
// linear_backward       din (N,C) =, dA +=, dB +=          dout (N,OC) (rotated back in place), in, group, xa, ...
// rope_forward          qkv in place                       rope;  rope_backward: the inverse
// attention_forward     out (N,NH*HS) =, lse (NH,N) =      qkv (N,QKV), documents
// attention_backward    dqkv (N,QKV) =                     dout, out, lse, qkv, documents
// swiglu_forward        out (N,F) =                        gate_up (N,2F)                   [tests, dumps]
// swiglu_backward       dgate_up (N,2F) =                  dout (N,F), gate_up
// classifier            losses (n) =, correct (n) =, din (N,C) =   in, head (V,C), rows (n), labels (n), scale
// head_logits           logits (n,V) =                     in, head (V,C), rows (n)
// nf4_quantize          codes =, absmax =                  w (n);  nf4_double_quantize: absmax8, absmax2, offset
// matrix_row            out (cols) =                       one row of a Matrix as the matmul sees it
// sum_squares           returns double                     x (n)
// first_nonfinite       returns index or n                 x (n)
// checksum              returns 64 bits                   x (n), by its bits and their places
// adamw_update          p, m, v in place, returns as first_nonfinite of p      g (n), rates
// documents_place       the documents of a pass, as attention wants them
// linear_prefetch       nothing that can be seen            group: the next one
// nf4_pack              a whole NF4 matrix into the device's order
#pragma once
#include "kernels/cpu/adamw.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/classifier.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/nf4.h"
#include "kernels/device.h"
#include "kernels/gpu.h"
#include "kernels/random.h"
#include "kernels/types.h"
