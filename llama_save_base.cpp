// See llama_save_base.h. Names, shapes and settings are those that transformers and bitsandbytes write
// (QuantState.as_dict, BitsAndBytesConfig.to_dict).
#include "llama_save_base.h"

#include <cstdio>
#include <cstring>
#include <filesystem>

#include "io/pack.h"
#include "kernels/cpu/nf4.h"  // for the table of codes alone

static const char* const HINT = "give a new or empty directory with --save-base, on a disk with room for the base";

// What is copied from the model's directory where it is there: all that a tokenizer is made of, and the ids that end a
// generation.
static const char* const copied_files[] = {"tokenizer.json",          "tokenizer.model",     "tokenizer_config.json",
                                           "special_tokens_map.json", "chat_template.jinja", "generation_config.json"};

// ---------------------------------------------------------------------------------------------------------------------
// one packed linear

static std::string dtype_name(const std::string& dtype) {  // as PyTorch spells it
    return dtype == "F32" ? "float32" : dtype == "F16" ? "float16" : "bfloat16";
}

static HostTensor host_tensor(const std::string& name, const char* dtype, std::vector<uint64_t> shape, const void* data,
                              size_t bytes) {
    return {name, dtype, std::move(shape), std::string(static_cast<const char*>(data), bytes)};
}

void bnb_tensors(std::vector<HostTensor>& out, const std::string& weight_name, const Matrix& w,
                 const std::string& source) {
    const bool nested = w.absmax8 != nullptr;
    const uint64_t blocks = w.blocks(), packed = (w.elements() + 1) / 2, groups = (blocks + 255) / 256;
    std::string state = "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"" + dtype_name(source) +
                        "\", \"shape\": [" + std::to_string(w.rows) + ", " + std::to_string(w.cols) + "]";
    out.push_back(host_tensor(weight_name, "U8", {packed, 1}, w.codes, packed));
    out.push_back(host_tensor(weight_name + ".quant_map", "F32", {16}, NF4_CODE, sizeof NF4_CODE));
    if (nested) {
        out.push_back(host_tensor(weight_name + ".absmax", "U8", {blocks}, w.absmax8, blocks));
        out.push_back(host_tensor(weight_name + ".nested_absmax", "F32", {groups}, w.absmax2, groups * 4));
        out.push_back(host_tensor(weight_name + ".nested_quant_map", "F32", {256}, w.map8, 256 * 4));
        // The offset as a double has the digits that read back to it, in our reader and in Python's float().
        state += ", \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": " +
                 json_write(double(w.offset));
    } else {
        out.push_back(host_tensor(weight_name + ".absmax", "F32", {blocks}, w.absmax32, blocks * 4));
    }
    state += "}";
    out.push_back(
        host_tensor(weight_name + ".quant_state.bitsandbytes__nf4", "U8", {state.size()}, state.data(), state.size()));
}

// ---------------------------------------------------------------------------------------------------------------------
// tensors as one string: how many, then of each the name, dtype, shape, bytes (io/pack.h)

std::string host_tensors_pack(const std::vector<HostTensor>& tensors) {
    size_t bytes = 8;
    for (const HostTensor& t : tensors) {
        bytes += 8 * (4 + t.shape.size()) + t.name.size() + t.dtype.size() + t.bytes.size();
    }
    std::string out;
    out.reserve(bytes);
    pack_number(out, tensors.size());
    for (const HostTensor& t : tensors) {
        pack_list(out, t.name);
        pack_list(out, t.dtype);
        pack_list(out, t.shape);
        pack_list(out, t.bytes);
    }
    return out;
}

bool host_tensors_unpack(std::vector<HostTensor>& out, const std::string& text) {
    out.clear();
    Unpack u{text};
    const uint64_t n = unpack_number(u);
    for (uint64_t i = 0; u.fine && i < n; i++) {  // a count that is wrong meets the text's end
        out.emplace_back();
        HostTensor& t = out.back();
        unpack_list(u, t.name);
        unpack_list(u, t.dtype);
        unpack_list(u, t.shape);
        unpack_list(u, t.bytes);
    }
    const bool good = u.fine && u.at == text.size();
    if (!good) {
        out.clear();
    }
    return good;
}

// ---------------------------------------------------------------------------------------------------------------------
// the directory

static std::string shown(const std::string& path) {
    return printable(path, 4096);
}

static Error abandoned(BaseWriter& w, const Error& e) {
    base_writer_abandon(w);
    return e.or_hinted(HINT);
}

// dir as the last rename wants it: links followed, no slash at its end. An empty directory is taken away: where that
// cannot be (a mount point), it is better known now than after the weights have been read.
static Error claim_directory(std::string& target, const std::string& dir, const std::string& model_dir) {
    namespace fs = std::filesystem;
    std::error_code failed;
    target = (fs::path(dir) / "").parent_path().string();
    fs::file_type type = fs::symlink_status(target, failed).type();
    if (type == fs::file_type::not_found || type == fs::file_type::none) {  // none: making it will tell why
        const std::string name = fs::path(target).filename().string();
        return !name.empty() && name != "." && name != ".."
                   ? Error()
                   : bad_input("--save-base: '%s' is not the name of a directory", shown(dir).c_str()).hinted(HINT);
    }
    if (!path_is_directory(target)) {
        return bad_input("%s: is not a directory", shown(dir).c_str()).hinted(HINT);
    }
    for (const auto& [other, what] : {std::pair<std::string, const char*>{model_dir, "the model's own directory"},
                                      {".", "the directory in which the program runs"}}) {
        if (fs::equivalent(target, other, failed)) {
            return bad_input("%s: is %s", shown(dir).c_str(), what).hinted(HINT);
        }
    }
    std::vector<std::string> names;
    if (Error e = dir_list(names, target)) {
        return e;
    }
    if (!names.empty()) {
        return bad_input("%s: is not empty (found %s)", shown(dir).c_str(), printable(names[0]).c_str()).hinted(HINT);
    }
    target = fs::canonical(target, failed).string();
    if (failed || !fs::remove(target, failed)) {
        return bad_input("%s: cannot be replaced: %s", shown(dir).c_str(), failed.message().c_str())
            .hinted("give the name of a new directory with --save-base");
    }
    return {};
}

// Makes the temporary directory, or takes over what a dead process left there; until it is ours w.temporary is empty.
static Error claim_temporary(BaseWriter& w) {
    namespace fs = std::filesystem;
    const std::string path = path_join(path_directory(w.dir), "." + fs::path(w.dir).filename().string() + ".save-base");
    std::error_code failed;
    fs::file_type type = fs::symlink_status(path, failed).type();
    if (type != fs::file_type::not_found && type != fs::file_type::directory) {
        return bad_input("%s: is in the way", shown(path).c_str()).hinted("remove it");
    }
    if (Error e = run_lock(w.lock, path)) {
        fs::remove(path, failed);  // goes only when it is empty
        return e.hinted(HINT);
    }
    w.temporary = path;
    std::vector<std::string> names;
    Error e = dir_list(names, path);
    for (size_t i = 0; i < names.size() && !e; i++) {
        e = names[i] == ".lock" ? Error() : path_remove(path_join(path, names[i]));
    }
    return e;
}

Error base_writer_open(BaseWriter& w, const std::string& dir, const std::string& model_dir, uint64_t bytes) {
    const uint64_t shard_bytes = w.shard_bytes;  // the caller's setting
    w = BaseWriter();
    w.shard_bytes = shard_bytes;
    w.model_dir = model_dir;
    Error e = claim_directory(w.dir, dir, model_dir);
    e = e ? e : claim_temporary(w);
    if (e) {
        return abandoned(w, e);
    }
    uint64_t available = disk_free_bytes(w.temporary);
    if (available < bytes) {
        return abandoned(w, runtime_failure("%s: too little disk space for the base (found %.1f GB, need %.1f GB)",
                                            shown(dir).c_str(), double(available) / 1e9, double(bytes) / 1e9)
                                .hinted("free some space on this disk, or give a directory on another one with "
                                        "--save-base"));
    }
    return {};
}

static std::string shard_name(size_t shard, size_t shards) {
    char name[64];
    snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", shard + 1, shards);
    return shards == 1 ? "model.safetensors" : name;
}

// The number of shards is known at the end; until then it is 0 in the names.
static Error write_shard(BaseWriter& w) {
    if (w.temporary.empty()) {  // names would be those of the directory in which the program runs
        return runtime_failure("%s: not open for the base, or given up after an error", shown(w.dir).c_str());
    }
    std::vector<TensorOut> tensors;
    std::vector<std::string> names;
    for (const HostTensor& t : w.pending) {
        tensors.push_back({t.name, t.dtype, t.shape, t.bytes.data()});
        names.push_back(t.name);
    }
    Error e = safetensors_write(path_join(w.temporary, shard_name(w.shards.size(), 0)), tensors);
    w.shards.push_back(std::move(names));
    w.pending.clear();
    w.pending_bytes = 0;
    return e;
}

Error base_writer_add(BaseWriter& w, std::vector<HostTensor> unit) {
    uint64_t bytes = 0;
    for (const HostTensor& t : unit) {
        bytes += t.bytes.size();
        w.double_quant |= t.name.size() > 14 && t.name.rfind(".nested_absmax") == t.name.size() - 14;
        if (t.name == "model.embed_tokens.weight") {
            w.dtype = dtype_name(t.dtype);
        }
    }
    if (!w.pending.empty() && w.pending_bytes + bytes > w.shard_bytes) {
        if (Error e = write_shard(w)) {
            return abandoned(w, e);
        }
    }
    w.pending_bytes += bytes;
    w.total_bytes += bytes;
    for (HostTensor& t : unit) {
        w.pending.push_back(std::move(t));
    }
    return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// what goes beside the shards

static Error write_index(const BaseWriter& w) {
    Json map = Json::object();
    for (size_t i = 0; i < w.shards.size(); i++) {
        for (const std::string& name : w.shards[i]) {
            map.keys.push_back(name);
            map.items.push_back(shard_name(i, w.shards.size()));
        }
    }
    Json index = Json::object();
    index.set("metadata", Json::object().set("total_size", w.total_bytes)).set("weight_map", std::move(map));
    return file_replace(path_join(w.temporary, "model.safetensors.index.json"), json_write(index, 2, true) + "\n");
}

// The model's own settings. The dtype is said where they leave it open, as transformers does: with scales in the file
// it could not be told from the first tensor of floats.
static Error write_config(const BaseWriter& w) {
    Json config;
    if (Error e = json_read_file(config, path_join(w.model_dir, "config.json"))) {
        return e;
    }
    std::string dtype;
    for (const char* key : {"torch_dtype", "dtype"}) {
        const Json* v = config.find(key);
        dtype = v && v->type == Json::STRING ? v->string : dtype;
    }
    if (dtype.empty()) {
        dtype = w.dtype;
        config.set("torch_dtype", dtype);
    }
    Json q = Json::object();
    q.set("quant_method", "bitsandbytes").set("load_in_4bit", true).set("load_in_8bit", false);
    q.set("_load_in_4bit", true).set("_load_in_8bit", false);
    q.set("bnb_4bit_quant_type", "nf4").set("bnb_4bit_quant_storage", "uint8");
    q.set("bnb_4bit_use_double_quant", w.double_quant);
    q.set("bnb_4bit_compute_dtype", dtype);
    q.set("llm_int8_enable_fp32_cpu_offload", false).set("llm_int8_has_fp16_weight", false);
    q.set("llm_int8_skip_modules", Json()).set("llm_int8_threshold", 6.0);
    config.set("quantization_config", std::move(q));
    return file_replace(path_join(w.temporary, "config.json"), json_write(config, 2, true) + "\n");
}

static Error copy_files(const BaseWriter& w) {
    for (const char* name : copied_files) {
        std::string from = path_join(w.model_dir, name), bytes;
        if (!path_exists(from)) {
            continue;
        }
        if (Error e = file_read_all(bytes, from)) {
            return e;
        }
        if (Error e = file_replace(path_join(w.temporary, name), bytes)) {
            return e;
        }
    }
    return {};
}

Error base_writer_close(BaseWriter& w) {
    Error e = write_shard(w);
    const size_t shards = w.shards.size();
    for (size_t i = 0; i < shards && !e; i++) {
        e = path_rename(path_join(w.temporary, shard_name(i, 0)), path_join(w.temporary, shard_name(i, shards)));
    }
    if (!e && shards > 1) {
        e = write_index(w);
    }
    e = e ? e : write_config(w);
    e = e ? e : copy_files(w);
    e = e ? e : path_rename(w.temporary, w.dir);
    if (e) {
        return abandoned(w, e);
    }
    w.lock.path = path_join(w.dir, ".lock");
    run_unlock(w.lock);
    w.temporary.clear();
    return {};
}

void base_writer_abandon(BaseWriter& w) {
    if (w.temporary.empty()) {
        return;
    }
    Error e = path_remove(w.temporary);  // the reason for this is told, not that some of it may have stayed
    (void)e;
    run_unlock(w.lock);
    w.pending.clear();
    w.temporary.clear();
}
