// A Llama to and from files: the base from a Hugging Face directory (quantised tensor by tensor as it is read), random
// weights in place, adapters in PEFT's form. It knows names, shapes and dtypes of both; bytes on disk are io/'s
// business, arithmetic is kernels/'.
//
// Memory while loading: the packed model, one tensor's absmax, and two buffers of CHUNK elements.
#pragma once
#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "io/safetensors.h"
#include "kernels/widen.h"
#include "llama.h"
#include "llama_bnb.h"

constexpr size_t LOAD_CHUNK = size_t(4) << 20;  // elements; a multiple of a block of 64 and of 64 x 256

// How the frozen base is held.
struct BaseOptions {
    bool nf4 = true;
    bool double_quant = true;
    bool host_embed = false;  // the embedding stays on the host's side of a device that has memory of its own
};

inline Store dtype_store(const std::string& dtype) {  // as a tensor's or a config's dtype is spelled
    return dtype == "F32" || dtype == "float32"   ? Store::F32
           : dtype == "F16" || dtype == "float16" ? Store::F16
                                                  : Store::BF16;
}

inline size_t store_bytes(Store s) {  // of an element; not for NF4
    return s == Store::F32 ? 4 : 2;
}

// ---------------------------------------------------------------------------------------------------------------------
// the base without its weights, for plans

// A matrix as it will be held, without memory.
template <class Dev>
Matrix base_matrix(const Dev& dev, const LlamaConfig& c, const BaseOptions& options, const std::string& name,
                   bool linear, int rows, int cols) {
    const bool nf4 = linear && (c.bnb_nf4 ? c.bnb_plain.count(name) == 0 : options.nf4);
    Matrix w;
    w.rows = rows;
    w.cols = cols;
    w.store = nf4 ? Store::NF4 : device_store(dev, dtype_store(c.dtype));
    w.packed = w.store == Store::NF4 && nf4_packs(dev, w);
    return w;
}

// A bitsandbytes checkpoint decides tensor by tensor what is quantised, and whether its absmax is too: which linears
// are not, by their headers alone. Nothing for other checkpoints.
inline Error bnb_layout_read(LlamaConfig& c, const std::string& model_dir) {
    if (!c.bnb_nf4) {
        return {};
    }
    Safetensors st;
    Error e = checkpoint_open(st, model_dir);
    for (int l = 0; l < c.L && !e; l++) {
        for (int m = 0; m < MODULES; m++) {
            const std::string name = "model.layers." + std::to_string(l) + "." + module_path[m] + ".weight";
            const Tensor* t = safetensors_find(st, name);
            if (t != nullptr && t->dtype != "U8") {
                c.bnb_plain.insert(name);
            } else if (t != nullptr && safetensors_find(st, name + ".nested_absmax") == nullptr) {
                c.bnb_flat.insert(name);
            }
        }
    }
    safetensors_close(st);
    return e;
}

// Rows of an embedding that is not the head too can be gathered over the bus.
inline bool is_host_embed(const LlamaConfig& c, const BaseOptions& options, const std::string& name) {
    return options.host_embed && !c.tied && name == "model.embed_tokens.weight";
}

template <class Dev>
struct BaseBytes {
    const Dev& dev;
    const LlamaConfig& c;
    BaseOptions options;
    size_t bytes = 0, load_workspace = 0;

    void matrix(const std::string& name, Matrix&, int rows, int cols, bool linear) {
        const Matrix w = base_matrix(dev, c, options, name, linear, rows, cols);
        const bool nested = c.bnb_nf4 ? c.bnb_flat.count(name) == 0 : options.double_quant;
        if (w.store != Store::NF4) {
            bytes += is_host_embed(c, options, name) ? 0 : placed_bytes(w.elements() * store_bytes(w.store));
            return;
        }
        bytes += placed_bytes((w.elements() + 1) / 2);
        bytes += nested ? placed_bytes(w.blocks()) + placed_bytes((w.blocks() + 255) / 256 * 4) + placed_bytes(256 * 4)
                        : placed_bytes(w.blocks() * 4);
        load_workspace = std::max(load_workspace, nf4_load_workspace(dev, w.elements(), LOAD_CHUNK));
    }
    void vector(const std::string&, typename Dev::real*&, int n) {
        bytes += placed_bytes(size_t(n) * sizeof(typename Dev::real));
    }
};

// Bytes of the base as held, and of workspace that reading it needs.
template <class Dev>
BaseBytes<Dev> base_measure(const Dev& dev, const LlamaConfig& c, const BaseOptions& options) {
    BaseBytes<Dev> b{dev, c, options};
    Weights<typename Dev::real> none;
    each_weight(none, c, b);
    return b;
}

// ---------------------------------------------------------------------------------------------------------------------
// reading the base

struct BaseReader {
    Safetensors st;
    std::vector<uint8_t> raw;
    std::vector<float> values;
    std::string chunk_hashes;      // of the bytes read, in order; hashed once more they name the base
    std::set<std::string> wanted;  // names that belong to the model
};

inline size_t dtype_bytes(const std::string& dtype) {  // 0: not a dtype that a weight may have
    return dtype == "F32" ? 4 : dtype == "BF16" || dtype == "F16" ? 2 : 0;
}

inline std::string shape_text(const std::vector<uint64_t>& shape) {
    std::string s = "[";
    for (size_t i = 0; i < shape.size(); i++) {
        s += (i > 0 ? "," : "") + std::to_string(shape[i]);
    }
    return s + "]";
}

inline Error tensor_check(const Safetensors& st, const std::string& name, const std::vector<uint64_t>& shape) {
    const Tensor* t = safetensors_find(st, name);
    const char* path = st.files[t->file].path.c_str();
    if (dtype_bytes(t->dtype) == 0) {
        return bad_input("%s: tensor %s: dtype %s is not usable as a weight (need BF16, F16 or F32)", path,
                         name.c_str(), printable(t->dtype).c_str())
            .hinted("use the 16-bit checkpoint of this model");
    }
    if (t->shape != shape) {
        bool transposed = shape.size() == 2 && t->shape == std::vector<uint64_t>{shape[1], shape[0]};
        return bad_input("%s: tensor %s: expected shape %s, found %s", path, name.c_str(), shape_text(shape).c_str(),
                         shape_text(t->shape).c_str())
            .hinted(transposed ? "the matrix seems to be transposed (another checkpoint format)"
                               : "config.json and the weights do not belong together");
    }
    return {};
}

// The bytes of a tensor in chunks of LOAD_CHUNK elements, checked to be finite and widened to float.
// sink(raw bytes, floats, first element, elements)
template <class Sink>
Error tensor_stream(BaseReader& r, const Tensor& t, Sink&& sink) {
    const size_t width = dtype_bytes(t.dtype);
    const uint64_t n = t.elements();
    for (uint64_t first = 0; first < n; first += LOAD_CHUNK) {
        size_t count = size_t(std::min<uint64_t>(LOAD_CHUNK, n - first));
        r.raw.resize(LOAD_CHUNK * 4);
        r.values.resize(LOAD_CHUNK);
        if (Error e = safetensors_read(r.st, t, r.raw.data(), first * width, count * width)) {
            return e;
        }
        r.chunk_hashes += sha256_hex(r.raw.data(), count * width);
        size_t bad = widen(r.values.data(), r.raw.data(),
                           t.dtype == "F32"   ? Store::F32
                           : t.dtype == "F16" ? Store::F16
                                              : Store::BF16,
                           count);
        if (bad < count) {
            return bad_input("%s: tensor %s has a non-finite value at index %llu", r.st.files[t.file].path.c_str(),
                             t.name.c_str(), (unsigned long long)(first + bad))
                .hinted("the checkpoint is damaged; download it again");
        }
        sink(r.raw.data(), r.values.data(), first, count);
    }
    return {};
}

// Every tensor of the model is there with the right shape, and nothing else is (2.1 of the format notes: an extra
// tensor means another architecture, so a warning would be silently wrong training).
template <class Real>
struct CheckTensors {
    BaseReader& r;
    const LlamaConfig& c;
    Error error;
    size_t missing = 0;
    std::string first_missing;

    void seen(const std::string& name, const std::vector<uint64_t>& shape, bool linear) {
        r.wanted.insert(name);
        const Tensor* t = safetensors_find(r.st, name);
        if (t == nullptr) {
            first_missing = missing++ == 0 ? name : first_missing;
            return;
        }
        if (!error && !(linear && t->dtype == "U8" && c.bnb_nf4)) {
            error = tensor_check(r.st, name, shape);
        }
    }
    void matrix(const std::string& name, Matrix&, int rows, int cols, bool linear) {
        seen(name, {uint64_t(rows), uint64_t(cols)}, linear);
    }
    void vector(const std::string& name, Real*&, int n) { seen(name, {uint64_t(n)}, false); }
};

// A name that bitsandbytes adds to a packed weight.
inline bool is_bnb_companion(const BaseReader& r, const std::string& name) {
    size_t at = name.find(".weight.");
    return at != std::string::npos && r.wanted.count(name.substr(0, at + 7)) > 0;
}

template <class Real>
Error base_check_names(BaseReader& r, Weights<Real>& w, const LlamaConfig& c, const std::string& dir) {
    CheckTensors<Real> check{r, c, {}, 0, ""};
    each_weight(w, c, check);
    if (check.missing > 0) {
        bool head = check.first_missing == "lm_head.weight";
        return bad_input("%s: tensor %s is missing%s%s", dir.c_str(), check.first_missing.c_str(),
                         head ? " (config.json says tie_word_embeddings is false)" : "",
                         check.missing > 1 ? (", and " + std::to_string(check.missing - 1) + " more").c_str() : "")
            .hinted("the checkpoint is incomplete, or config.json belongs to another model");
    }
    if (check.error) {
        return check.error;
    }
    for (const Tensor& t : r.st.tensors) {
        bool ignored = t.name.size() > 20 && t.name.rfind(".rotary_emb.inv_freq") == t.name.size() - 20;
        bool head = c.tied && t.name == "lm_head.weight";
        if (r.wanted.count(t.name) == 0 && !ignored && !head && !(c.bnb_nf4 && is_bnb_companion(r, t.name))) {
            return bad_input("%s: unexpected tensor %s: the checkpoint is not a plain Llama",
                             r.st.files[t.file].path.c_str(), printable(t.name).c_str())
                .hinted("biases, q/k norms, quantisation scales and extra layers are not supported");
        }
    }
    return {};
}

// Reads each weight into device memory.
template <class Dev>
struct LoadWeights {
    using Real = typename Dev::real;
    Llama<Dev>& m;
    BaseReader& r;
    BaseOptions options;
    Error error;

    void vector(const std::string& name, Real*& p, int n) {
        if (error) {
            return;
        }
        llama_alloc(m, p, n, name.c_str());
        std::vector<Real> host(n);
        error = tensor_stream(r, *safetensors_find(r.st, name),
                              [&](const void*, const float* x, uint64_t first, size_t count) {
                                  std::copy(x, x + count, host.begin() + first);
                              });
        device_to(m.dev, p, host.data(), n * sizeof(Real));
    }

    void matrix(const std::string& name, Matrix& w, int rows, int cols, bool linear) {
        if (error) {
            return;
        }
        w.rows = rows;
        w.cols = cols;
        const Tensor& t = *safetensors_find(r.st, name);
        if (t.dtype == "U8") {
            error = matrix_bnb(name, t, w);
        } else if (linear && options.nf4 &&
                   !m.c.bnb_nf4) {  // a bnb checkpoint's 16-bit linears were left so on purpose
            error = matrix_nf4(t, w);
        } else {
            error = matrix_plain(t, w);
        }
    }

    template <class T>
    T* place(size_t elements, const std::string& what) {
        T* p;
        llama_alloc(m, p, elements, what.c_str());
        return p;
    }

    Error matrix_plain(const Tensor& t, Matrix& w) {
        const Store stored = dtype_store(t.dtype);
        w.store = device_store(m.dev, stored);
        const size_t width = store_bytes(w.store), bytes = w.elements() * width;
        void* host = is_host_embed(m.c, options, t.name) ? device_alloc_host(m.dev, bytes, "the embedding") : nullptr;
        uint8_t* p = host != nullptr ? static_cast<uint8_t*>(host) : place<uint8_t>(bytes, t.name);
        w.data = p;
        std::vector<bf16> rounded;
        return tensor_stream(r, t, [&](const void* raw, const float* x, uint64_t first, size_t count) {
            if (w.store != stored && w.store == Store::BF16) {
                rounded.resize(count);
                std::transform(x, x + count, rounded.begin(), to_bf16);
            }
            device_to(m.dev, p + first * width,
                      w.store == stored       ? raw
                      : w.store == Store::F32 ? static_cast<const void*>(x)
                                              : rounded.data(),
                      count * width);
        });
    }

    Error matrix_nf4(const Tensor& t, Matrix& w) {
        uint8_t* codes = place<uint8_t>((w.elements() + 1) / 2, t.name);
        std::vector<float> absmax(w.blocks());
        Error e = tensor_stream(r, t, [&](const void*, const float* x, uint64_t first, size_t count) {
            nf4_quantize(m.dev, codes + first / 2, absmax.data() + first / 64, x, count);
        });
        w.store = Store::NF4;
        w.codes = codes;
        if (!e) {
            set_absmax(w, absmax, t.name);
            nf4_pack(m.dev, w);
        }
        return e;
    }

    void set_absmax(Matrix& w, const std::vector<float>& absmax, const std::string& name) {
        if (!options.double_quant) {
            float* p = place<float>(absmax.size(), name);
            device_to(m.dev, p, absmax.data(), absmax.size() * 4);
            w.absmax32 = p;
            return;
        }
        std::vector<uint8_t> absmax8(absmax.size());
        std::vector<float> absmax2((absmax.size() + 255) / 256);
        nf4_double_quantize(absmax8.data(), absmax2.data(), &w.offset, absmax.data(), absmax.size());
        float map[256];
        nf4_map8(map);
        uint8_t* p8 = place<uint8_t>(w.blocks(), name);
        float* p2 = place<float>(absmax2.size(), name);
        float* pm = place<float>(256, name);
        device_to(m.dev, p8, absmax8.data(), absmax8.size());
        device_to(m.dev, p2, absmax2.data(), absmax2.size() * 4);
        device_to(m.dev, pm, map, 256 * 4);
        w.absmax8 = p8;
        w.absmax2 = p2;
        w.map8 = pm;
    }

    // A packed weight of a bitsandbytes checkpoint, used as stored.
    Error matrix_bnb(const std::string& name, const Tensor& t, Matrix& w) {
        BnbQuantState q;
        if (Error e = bnb_quant_state_read(q, r.st, name)) {
            return e;
        }
        if (q.rows != uint64_t(w.rows) || q.cols != uint64_t(w.cols)) {
            return bad_input("%s: tensor %s: expected shape [%d,%d], found %s in its quantisation state",
                             r.st.files[t.file].path.c_str(), name.c_str(), w.rows, w.cols,
                             shape_text({q.rows, q.cols}).c_str())
                .hinted("config.json and the weights do not belong together");
        }
        w.store = Store::NF4;
        w.offset = q.offset;
        Error e = tensor_copy(w.codes, *q.codes);
        if (!e && !q.nested()) {
            e = tensor_copy(w.absmax32, *q.absmax);
        } else if (!e) {
            e = tensor_copy(w.absmax8, *q.absmax);
            e = e ? e : tensor_copy(w.absmax2, *q.nested_absmax);
            float* map = place<float>(256, name);
            device_to(m.dev, map, q.nested_map, sizeof(q.nested_map));
            w.map8 = map;
            r.chunk_hashes += sha256_hex(q.nested_map, sizeof(q.nested_map)) + sha256_hex(&q.offset, sizeof(q.offset));
        }
        if (!e) {
            nf4_pack(m.dev, w);
        }
        return e;
    }

    // The bytes of a tensor as they are, into new device memory; floats are checked to be finite.
    template <class T>
    Error tensor_copy(const T*& p, const Tensor& t) {
        T* to = place<T>(t.bytes / sizeof(T), t.name);
        p = to;
        if (t.dtype == "F32") {
            return tensor_stream(r, t, [&](const void* raw, const float*, uint64_t first, size_t count) {
                device_to(m.dev, to + first, raw, count * 4);
            });
        }
        r.raw.resize(LOAD_CHUNK * 4);
        for (uint64_t first = 0; first < t.bytes; first += r.raw.size()) {
            size_t count = size_t(std::min<uint64_t>(r.raw.size(), t.bytes - first));
            if (Error e = safetensors_read(r.st, t, r.raw.data(), first, count)) {
                return e;
            }
            r.chunk_hashes += sha256_hex(r.raw.data(), count);
            device_to(m.dev, to + first / sizeof(T), r.raw.data(), count);
        }
        return {};
    }
};

// #14 of the bad inputs: a stored head beside a tied embedding is ignored; said when it differs.
inline Error tied_head_warning(BaseReader& r, const LlamaConfig& c, std::vector<std::string>& warnings) {
    const Tensor* head = safetensors_find(r.st, "lm_head.weight");
    const Tensor* embed = safetensors_find(r.st, "model.embed_tokens.weight");
    if (!c.tied || head == nullptr) {
        return {};
    }
    bool same = head->dtype == embed->dtype && head->shape == embed->shape;
    std::vector<uint8_t> a(1 << 20), b(1 << 20);
    for (uint64_t first = 0; same && first < head->bytes; first += a.size()) {
        size_t count = size_t(std::min<uint64_t>(a.size(), head->bytes - first));
        if (Error e = safetensors_read(r.st, *head, a.data(), first, count)) {
            return e;
        }
        if (Error e = safetensors_read(r.st, *embed, b.data(), first, count)) {
            return e;
        }
        same = std::equal(a.begin(), a.begin() + count, b.begin());
    }
    if (!same) {
        warnings.push_back(
            "stored lm_head.weight is ignored: config.json ties the output head to the embedding, and they differ");
    }
    return {};
}

// Loads the weights of m.c from model_dir. *hash: sha256 of what was read (tensors and their names).
template <class Dev>
Error llama_load(Llama<Dev>& m, std::string* hash, std::vector<std::string>& warnings, const std::string& model_dir,
                 const BaseOptions& options) {
    BaseReader r;
    device_reserve(m.dev, base_measure(m.dev, m.c, options).load_workspace);
    if (m.c.bnb_nf4 && !options.nf4) {
        return bad_input("%s: the checkpoint is already quantised to NF4, --quant none is not possible",
                         model_dir.c_str())
            .hinted("leave out --quant, or give the 16-bit checkpoint");
    }
    Error e = checkpoint_open(r.st, model_dir);
    if (!e) {
        warnings.insert(warnings.end(), r.st.warnings.begin(), r.st.warnings.end());
        e = base_check_names(r, m.w, m.c, model_dir);
    }
    if (!e) {
        LoadWeights<Dev> load{m, r, options, {}};
        each_weight(m.w, m.c, load);
        e = load.error;
    }
    if (!e) {
        e = tied_head_warning(r, m.c, warnings);
    }
    if (!e) {
        for (const std::string& name : r.wanted) {
            r.chunk_hashes += name + "\n";
        }
        *hash = sha256_hex(r.chunk_hashes.data(), r.chunk_hashes.size());
        if (m.c.tied) {
            m.w.head = m.w.embed;
        }
    }
    safetensors_close(r.st);
    return e;
}

// ---------------------------------------------------------------------------------------------------------------------
// random weights in place, for plans and timings

template <class Dev>
struct RandomWeights {
    using Real = typename Dev::real;
    Llama<Dev>& m;
    BaseOptions options;
    uint64_t tensor = 0;

    void vector(const std::string& name, Real*& p, int n) {
        llama_alloc(m, p, n, name.c_str());
        std::vector<Real> ones(n, Real(1));
        device_to(m.dev, p, ones.data(), n * sizeof(Real));
    }

    // Codes are random bits; the absmax gives weights of standard deviation 1 / sqrt(cols), so that activations keep
    // their size through the layers.
    void matrix(const std::string& name, Matrix& w, int rows, int cols, bool linear) {
        w.rows = rows;
        w.cols = cols;
        tensor++;
        const double sigma = 1 / std::sqrt(double(cols));
        if (linear && options.nf4) {
            const size_t bytes = (w.elements() + 1) / 2;
            uint8_t* codes;
            llama_alloc(m, codes, bytes, name.c_str());
            fill(codes, bytes, [&](size_t i, void* out) {
                uint64_t bits = random_bits(1, STREAM_WEIGHTS, tensor, i);
                memcpy(out, &bits, 8);
            });
            w.store = Store::NF4;
            w.codes = codes;
            LoadWeights<Dev> load{m, unused, options, {}};
            load.set_absmax(w, std::vector<float>(w.blocks(), float(sigma / 0.55)), name);  // 0.55: the codes' rms
            nf4_pack(m.dev, w);
            return;
        }
        w.store = device_store(m.dev, Store::BF16);
        const bool half = w.store == Store::BF16;
        const size_t bytes = w.elements() * store_bytes(w.store);
        uint8_t* p = static_cast<uint8_t*>(
            is_host_embed(m.c, options, name) ? device_alloc_host(m.dev, bytes, "the embedding") : nullptr);
        if (p == nullptr) {
            llama_alloc(m, p, bytes, name.c_str());
        }
        fill(p, w.elements() * store_bytes(w.store), [&](size_t i, void* out) {
            uint64_t bits = random_bits(1, STREAM_WEIGHTS, tensor, half ? i : i / 2);
            bf16 x[4];
            float f[4];
            for (int j = 0; j < 4; j++) {
                x[j] = to_bf16(float((double(uint16_t(bits >> (16 * j))) / 65535 - 0.5) * sigma * std::sqrt(12.0)));
                f[j] = to_float(x[j]);
            }
            memcpy(out, half ? static_cast<const void*>(x) : f + i % 2 * 2, 8);
        });
        w.data = p;
    }

    // make(i, out): eight bytes at a time, in pieces that fit a host buffer
    template <class Make>
    void fill(uint8_t* device_p, size_t bytes, Make&& make) {
        std::vector<uint8_t> host(size_t(1) << 20);
        for (size_t first = 0; first < bytes; first += host.size()) {
            size_t count = std::min(host.size(), bytes - first);
            parallel_ranges(m.dev.threads, (count + 7) / 8, 1024, [&](size_t begin, size_t end, int) {
                for (size_t i = begin; i < end; i++) {
                    make(first / 8 + i, host.data() + i * 8);
                }
            });
            device_to(m.dev, device_p + first, host.data(), count);
        }
    }

    BaseReader unused;
};

template <class Dev>
void llama_random(Llama<Dev>& m, const BaseOptions& options) {
    device_reserve(m.dev, base_measure(m.dev, m.c, options).load_workspace);
    RandomWeights<Dev> random{m, options, 0, {}};
    each_weight(m.w, m.c, random);
    if (m.c.tied) {
        m.w.head = m.w.embed;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// adapters, as PEFT writes and reads them

inline const char* const module_name[MODULES] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                 "gate_proj", "up_proj", "down_proj"};

// adapter_config.json for the adapter (keys sorted, as PEFT writes them).
inline std::string adapter_config_text(const LoraConfig& lora, const std::string& base_name) {
    Json targets = Json::array();
    for (const char* name : {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"}) {
        for (int m = 0; m < MODULES; m++) {
            if (lora.target[m] && std::string(name) == module_name[m]) {
                targets.push(name);
            }
        }
    }
    Json alpha = lora.alpha == std::floor(lora.alpha) ? Json(int64_t(lora.alpha)) : Json(lora.alpha);
    Json j = Json::object();
    j.set("alpha_pattern", Json::object()).set("auto_mapping", Json()).set("base_model_name_or_path", base_name);
    j.set("bias", "none").set("fan_in_fan_out", false).set("inference_mode", true).set("init_lora_weights", true);
    j.set("layer_replication", Json()).set("layers_pattern", Json()).set("layers_to_transform", Json());
    j.set("loftq_config", Json::object()).set("lora_alpha", alpha).set("lora_dropout", lora.dropout);
    j.set("megatron_config", Json()).set("megatron_core", "megatron.core").set("modules_to_save", Json());
    j.set("peft_type", "LORA").set("r", lora.r).set("rank_pattern", Json::object()).set("revision", Json());
    j.set("target_modules", targets)
        .set("task_type", "CAUSAL_LM")
        .set("use_dora", false)
        .set("use_rslora", lora.rslora);
    return json_write(j, 2, true) + "\n";
}

// The tensors of the adapter file; `values` (fp32) and `rounded` hold what they point to.
template <class Dev>
std::vector<TensorOut> adapter_tensors(Llama<Dev>& m, std::vector<float>& values, std::vector<bf16>& rounded,
                                       bool as_bf16) {
    using real = typename Dev::real;
    std::vector<real> p(m.adapter.size);
    device_from(m.dev, p.data(), m.adapter.p, p.size() * sizeof(real));
    values.assign(p.begin(), p.end());
    rounded.clear();
    for (size_t i = 0; as_bf16 && i < values.size(); i++) {
        rounded.push_back(to_bf16(values[i]));
    }
    std::vector<TensorOut> tensors;
    each_adapter(m.c, m.adapter.lora, [&](const std::string& name, int, int, bool, int rows, int cols, size_t offset) {
        const void* data = as_bf16 ? static_cast<const void*>(&rounded[offset]) : &values[offset];
        tensors.push_back({name, as_bf16 ? "BF16" : "F32", {uint64_t(rows), uint64_t(cols)}, data});
    });
    return tensors;
}

// Reads adapter_config.json of a PEFT adapter; what this program cannot reproduce is refused by name.
Error adapter_config_read(LoraConfig& lora, const std::string& dir);

// The adapter's tensors into p. The model's adapter must have been created with the configuration just read.
template <class Dev>
Error adapter_load(Llama<Dev>& m, const std::string& dir) {
    using real = typename Dev::real;
    BaseReader r;
    std::string path = path_join(dir, "adapter_model.safetensors");
    if (!path_exists(path) && path_exists(path_join(dir, "adapter_model.bin"))) {
        return bad_input("%s: adapter_model.bin is a pickle, which is not read: it can run code", dir.c_str())
            .hinted("save the adapter with PEFT's save_pretrained(..., safe_serialization=True)");
    }
    if (Error e = safetensors_open(r.st, path)) {
        return e;
    }
    Error error;
    std::vector<real> p(m.adapter.size);
    each_adapter(m.c, m.adapter.lora, [&](const std::string& name, int, int, bool, int rows, int cols, size_t offset) {
        std::string stored = name;
        const Tensor* t = safetensors_find(r.st, stored);
        if (t == nullptr) {  // some versions keep the adapter's own name in the key
            stored.insert(stored.rfind(".weight"), ".default");
            t = safetensors_find(r.st, stored);
        }
        if (error || t == nullptr) {
            error = error ? error
                          : bad_input("%s: tensor %s is missing", path.c_str(), name.c_str())
                                .hinted("adapter_config.json names modules or layers that the file does not hold");
            return;
        }
        r.wanted.insert(stored);
        error = tensor_check(r.st, stored, {uint64_t(rows), uint64_t(cols)});
        if (!error) {
            error = tensor_stream(r, *t, [&](const void*, const float* x, uint64_t first, size_t count) {
                std::copy(x, x + count, p.begin() + offset + first);
            });
        }
    });
    for (const Tensor& t : r.st.tensors) {
        if (!error && r.wanted.count(t.name) == 0) {
            error = bad_input("%s: unexpected tensor %s", path.c_str(), printable(t.name).c_str())
                        .hinted("only LoRA matrices of the seven linears of a Llama are supported");
        }
    }
    device_to(m.dev, m.adapter.p, p.data(), p.size() * sizeof(real));
    safetensors_close(r.st);
    return error;
}
