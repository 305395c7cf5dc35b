// The NF4 base, as it was packed here, written as a Hugging Face directory in bitsandbytes' 4-bit form, which
// transformers loads too: `--save-base DIR`. It owns names, shapes and settings of that form, the shards and the files
// beside them; quantising and reading are llama_io.h's business, the other direction is llama_bnb.h's.
//
//   DIR's parent/.DIR.save-base/  .lock, shards as they fill, then index, config.json, tokenizer... each fsynced
//                                 -> renamed to DIR as a whole
//   DIR/config.json               the model's own with quantization_config
//   DIR/model.safetensors         or model-0000i-of-0000N.safetensors with model.safetensors.index.json
//   DIR/tokenizer.json ...        the model's own, byte for byte
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "io/error.h"
#include "io/run.h"
#include "kernels/types.h"

struct HostTensor {
    std::string name, dtype;  // dtype as safetensors spells it: BF16, F16, F32, U8
    std::vector<uint64_t> shape;
    std::string bytes;
};

// Appends the tensors of one packed linear. w: Store::NF4 in host memory and in bitsandbytes' order (not w.packed).
// source: dtype that the weight had before, as safetensors spells it; dequantising gives this dtype in transformers.
void bnb_tensors(std::vector<HostTensor>& out, const std::string& weight_name, const Matrix& w,
                 const std::string& source);

// Tensors as one string, to send them to another process, and back. false: the text is damaged; out is then empty.
std::string host_tensors_pack(const std::vector<HostTensor>& tensors);
bool host_tensors_unpack(std::vector<HostTensor>& out, const std::string& text);

struct BaseWriter {
    uint64_t shard_bytes = 1000000000;  // most bytes of tensors in a shard; one that a single unit fills may be larger
    std::string dir, temporary, model_dir;
    RunLock lock;                     // of temporary
    std::vector<HostTensor> pending;  // of the shard being collected
    uint64_t pending_bytes = 0, total_bytes = 0;
    std::vector<std::vector<std::string>> shards;  // names of the tensors of each one written
    std::string dtype;                             // of the embedding, "bfloat16"
    bool double_quant = false;
};

// Refuses (code 2) a directory that is not empty, the model's own, one whose parent cannot be written, a DIR that
// another process is writing; (code 1) a disk without room for `bytes`, 0 when that is not known. What a dead process
// left of the same DIR is removed. After an error here or below nothing of the writer is left on the disk (but for
// parents of DIR that had to be made).
Error base_writer_open(BaseWriter& w, const std::string& dir, const std::string& model_dir, uint64_t bytes);
// A unit: the embedding, a layer, or the final norm and head. The tensors of a unit stay in one shard, as loaders of
// quantised weights want it. Memory: shard_bytes, or the unit when that is larger.
Error base_writer_add(BaseWriter& w, std::vector<HostTensor> unit);
Error base_writer_close(BaseWriter& w);   // DIR is there from now on
void base_writer_abandon(BaseWriter& w);  // removes what was written; does nothing after close or an error
