// The shape of a model: config.json of a Hugging Face directory, checked, in every spelling that released LLaMA models
// use. No weights, no tokenizer.
#pragma once
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "io/error.h"

struct RopeScaling {
    enum Kind { NONE, LINEAR, LLAMA3 } kind = NONE;
    double factor = 1, low_freq_factor = 1, high_freq_factor = 4;  // the last two, and the length: LLAMA3 only
    uint64_t original_max_positions = 8192;
};

struct LlamaConfig {
    int L = 0;    // layers
    int C = 0;    // hidden size
    int F = 0;    // ffn (intermediate) size
    int NH = 0;   // query heads
    int NKV = 0;  // key/value heads, a divisor of NH
    int HS = 0;   // head size; NH * HS need not be C
    int V = 0;    // vocabulary
    int max_positions = 2048;
    int sliding_window = 0;  // of a Mistral model, in tokens; 0: none. Sequences longer than it cannot be trained
    double rms_eps = 1e-6;
    double rope_theta = 10000;
    RopeScaling rope;
    bool tied = false;         // lm_head is the embedding
    bool bnb_nf4 = false;      // the checkpoint holds bitsandbytes-NF4 matrices
    std::vector<int> eos_ids;  // of config.json, then those that generation_config.json adds
    std::string name;          // _name_or_path, or ""
    std::string dtype;         // torch_dtype as written ("bfloat16"), or ""
    std::set<std::string> bnb_plain, bnb_flat;  // bitsandbytes: linears left unquantised; quantised once (bnb_layout_read)
    std::string text;          // config.json's bytes
    std::vector<std::string> warnings;
};

// MODEL_DIR/config.json and generation_config.json (optional). Errors: code 2, by key, with what was found.
Error llama_config_read(LlamaConfig& c, const std::string& model_dir);

// 125m, 1b, 3b, 8b, 70b, 405b; anything else is an error that lists them.
Error llama_config_shape(LlamaConfig& c, const std::string& name);

// RoPE's inverse frequencies, HS / 2 values, in fp32 as PyTorch computes them:
//   inv_j = 1 / theta^(2j / HS); LINEAR: inv_j / factor; LLAMA3: divided for long waves, kept for short ones, a ramp
//   between (Hugging Face, modeling_rope_utils.py).
std::vector<float> llama_inv_freq(const LlamaConfig& c);
