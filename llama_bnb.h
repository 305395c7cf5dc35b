// bitsandbytes' serialised NF4 matrices inside a safetensors checkpoint: which tensors belong to a weight, whether they
// fit together. It reads the small ones (tables, settings); codes and absmax are left to the loader.
//
//   X.weight                                  U8 (n/2, 1)    two codes a byte, the first in the high nibble
//   X.weight.absmax                           F32 (n/64), or U8 when nested (doubly quantised)
//   X.weight.quant_map                        F32 (16)       the NF4 codes
//   X.weight.nested_absmax                    F32 (n/64/256) nested only
//   X.weight.nested_quant_map                 F32 (256)      nested only
//   X.weight.quant_state.bitsandbytes__nf4    U8             JSON: quant_type, blocksize, shape, nested_offset...
#pragma once
#include <cstdint>
#include <string>

#include "io/error.h"
#include "io/safetensors.h"

struct BnbQuantState {
    uint64_t rows = 0, cols = 0;    // shape of the matrix
    uint64_t blocks = 0;            // of 64 weights over the flattened matrix, the last may be short
    std::string dtype;              // the weight had before: bfloat16, float16, float32
    const Tensor* codes = nullptr;  // these point into Safetensors::tensors
    const Tensor* absmax = nullptr;
    const Tensor* nested_absmax = nullptr;  // nullptr: not nested
    float quant_map[16] = {};               // as stored
    float nested_map[256] = {};             // as stored
    float offset = 0;                       // absmax = fl(nested_map[code] * nested_absmax) + offset

    bool nested() const { return nested_absmax != nullptr; }
};

// weight_name: "model.layers.0.self_attn.q_proj.weight". Errors: code 2, naming the tensor and what is wrong with it.
Error bnb_quant_state_read(BnbQuantState& q, const Safetensors& st, const std::string& weight_name);

// The weight has a quantisation state beside it (of NF4 or of another kind), so it is not a plain matrix.
bool bnb_is_quantised(const Safetensors& st, const std::string& weight_name);
