// safetensors: header reader with every check of the reference implementation (and refusal of duplicate names, deep
// nesting, long names), sharded checkpoints, and a writer. It knows dtypes and byte ranges; it does not know which
// tensors a model needs (llama_io.h does).
//
//   | u64 N, little endian | N bytes of JSON: {"name":{"dtype":"BF16","shape":[r,c],"data_offsets":[b,e]},...} | data |
//   offsets count from byte 8 + N; tensors follow each other without holes and end at the end of the file.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "io/error.h"
#include "io/file.h"
#include "io/json.h"

struct Tensor {
    std::string name;
    std::string dtype;            // as spelt in the file: BF16, F16, F32, U8, ...
    std::vector<uint64_t> shape;  // may be empty (a scalar) or hold zeros
    uint64_t offset = 0;          // of its first byte in the file
    uint64_t bytes = 0;
    int file = 0;  // index into Safetensors::files

    uint64_t elements() const;
};

struct Safetensors {
    std::vector<InFile> files;
    std::vector<Tensor> tensors;  // in file order
    std::unordered_map<std::string, size_t> index;
    std::map<std::string, std::string> metadata;  // of the first file
    std::vector<std::string> warnings;            // total_size wrong, both single file and index present, ...
};

Error safetensors_open(Safetensors& st, const std::string& path);      // one file
Error checkpoint_open(Safetensors& st, const std::string& model_dir);  // model.safetensors, else its index and shards
void safetensors_close(Safetensors& st);
const Tensor* safetensors_find(const Safetensors& st, const std::string& name);  // nullptr: not there
// bytes [first, first + bytes) of the tensor's data
Error safetensors_read(const Safetensors& st, const Tensor& t, void* out, uint64_t first, size_t bytes);

struct TensorOut {
    std::string name, dtype;
    std::vector<uint64_t> shape;
    const void* data;  // product(shape) elements of dtype
};
// A whole new file under a name that does not exist yet (O_EXCL, fsynced): layout as the reference writer's
// (alignment descending, then name; header padded to 8 with spaces), metadata {"format":"pt"} plus extra.
Error safetensors_write(const std::string& path, std::vector<TensorOut> tensors,
                        const std::map<std::string, std::string>& extra_metadata = {});
