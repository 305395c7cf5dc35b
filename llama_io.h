// A Llama to and from files: the base from a Hugging Face directory (quantised tensor by tensor as it is read), random
// weights in place, adapters in PEFT's form. It knows names, shapes and dtypes of both; bytes on disk are io/'s
// business, arithmetic is kernels/'.
//
// With R ranks, rank u % R reads and quantises unit u; the others get it, or their slices of it, from that rank:
//
//   round 0   | unit 0 | unit 1 | ... | unit R-1 |    one a rank, all at once
//   round 1   | unit R | ...                          then sent, before the next round
//
// Memory while loading: the packed model, one tensor's absmax, and two buffers of CHUNK elements; with --save-base also
// the unit at hand, and on rank 0 those of all ranks.
#pragma once
#include <algorithm>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "io/safetensors.h"
#include "kernels/widen.h"
#include "llama.h"
#include "llama_bnb.h"
#include "llama_save_base.h"

constexpr size_t LOAD_CHUNK = size_t(4) << 20;  // elements; a multiple of a block of 64 and of 64 x 256

// How the frozen base is held.
struct BaseOptions {
    bool nf4 = true;
    bool double_quant = true;
    bool host_embed = false;  // the embedding stays on the host's side of a device that has memory of its own
    int spread = 0;           // ranks that each keep a part of every layer; 0: the whole base is here
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

// A matrix as it will be held, without memory. st: the checkpoint, whose own dtypes decide; nullptr: by config.json.
template <class Dev>
Matrix base_matrix(const Dev& dev, const LlamaConfig& c, const BaseOptions& options, const std::string& name,
                   bool linear, int rows, int cols, const Safetensors* st = nullptr) {
    const Tensor* t = st != nullptr ? safetensors_find(*st, name) : nullptr;
    const bool stored_nf4 = t != nullptr ? t->dtype == "U8" : c.bnb_plain.count(name) == 0;
    Matrix w;
    w.rows = rows;
    w.cols = cols;
    w.store = linear && (c.bnb_nf4 ? stored_nf4 : options.nf4)
                  ? Store::NF4
                  : device_store(dev, dtype_store(t != nullptr ? t->dtype : c.dtype));
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

// Every allocation and every piece in one begins at a multiple of 256 bytes. Without memory it only counts.
struct Placing {
    char* memory = nullptr;
    size_t bytes = 0;

    template <class T>
    void take(T*& p, size_t elements) {
        p = memory != nullptr ? reinterpret_cast<T*>(memory + bytes) : nullptr;
        bytes += placed_bytes(elements * sizeof(T));
    }
};

// Gives each weight of a unit its form and its place in the unit's memory.
template <class Dev>
struct PlaceUnit {
    const Dev& dev;
    const LlamaConfig& c;
    BaseOptions options;
    const Safetensors* st;  // as base_matrix
    Placing at;
    size_t load_workspace = 0;

    void matrix(const std::string& name, Matrix& w, int rows, int cols, bool linear) {
        w = base_matrix(dev, c, options, name, linear, rows, cols, st);
        if (w.store != Store::NF4) {
            const uint8_t* data = nullptr;
            at.take(data, is_host_embed(c, options, name) ? 0 : w.elements() * store_bytes(w.store));
            w.data = data;
            return;
        }
        w.packed = false;  // not before nf4_pack
        at.take(w.codes, (w.elements() + 1) / 2);
        if (is_nested(name)) {
            at.take(w.absmax8, w.blocks());
            at.take(w.absmax2, (w.blocks() + 255) / 256);
            at.take(w.map8, 256);
        } else {
            at.take(w.absmax32, w.blocks());
        }
        load_workspace = std::max(load_workspace, nf4_load_workspace(dev, w.elements(), LOAD_CHUNK));
    }
    void vector(const std::string&, typename Dev::real*& p, int n) { at.take(p, size_t(n)); }

    bool is_nested(const std::string& name) const {
        return !c.bnb_nf4      ? options.double_quant
               : st != nullptr ? safetensors_find(*st, name + ".nested_absmax") != nullptr
                               : c.bnb_flat.count(name) == 0;
    }
};

// What a rank keeps of a layer of that many bytes, when `ranks` share it.
inline size_t spread_slice(size_t layer_bytes, int ranks) {
    return placed_bytes((layer_bytes + size_t(ranks) - 1) / size_t(ranks));
}

struct BaseBytes {
    std::vector<size_t> unit;   // of each unit
    size_t layer = 0;           // of the largest layer
    size_t bytes = 0;           // on this rank's device
    size_t load_workspace = 0;  // while it is read
};

// Bytes of the base as held, and of workspace that reading it needs.
template <class Dev>
BaseBytes base_measure(const Dev& dev, const LlamaConfig& c, const BaseOptions& options,
                       const Safetensors* st = nullptr) {
    BaseBytes b;
    Weights<typename Dev::real> none;
    for (int u = 0; u < base_units(c); u++) {
        PlaceUnit<Dev> place{dev, c, options, st, {}, 0};
        each_weight_of(none, c, u, place);
        const size_t bytes = place.at.bytes;
        b.unit.push_back(bytes);
        const bool is_layer = u > 0 && u <= c.L;
        b.layer = is_layer ? std::max(b.layer, bytes) : b.layer;
        b.bytes += is_layer && options.spread > 0 ? 0 : bytes;
        b.load_workspace = std::max(b.load_workspace, place.load_workspace);
    }
    if (options.spread > 0) {
        const size_t slice = spread_slice(b.layer, options.spread);
        b.bytes += size_t(c.L) * slice + 2 * size_t(options.spread) * slice;
    }
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

// Memory for the base as measured, and every weight's place in it.
template <class Dev>
void base_place(Llama<Dev>& m, const BaseOptions& options, const BaseBytes& measured, const Safetensors* st) {
    const size_t ranks = size_t(options.spread);
    SpreadBase& s = m.spread;
    if (ranks > 0) {
        s.slice = spread_slice(measured.layer, options.spread);
        llama_alloc(m, s.mine, size_t(m.c.L) * s.slice, "this rank's part of the base");
        device_spread(m.dev, s.mine, size_t(m.c.L) * s.slice);
        llama_alloc(m, s.whole[0], ranks * s.slice, "a whole layer");
        llama_alloc(m, s.whole[1], ranks * s.slice, "another whole layer");
    }
    for (int u = 0; u < base_units(m.c); u++) {
        PlaceUnit<Dev> place{m.dev, m.c, options, st, {}, 0};
        if (u > 0 && u <= m.c.L && ranks > 0) {
            place.at.memory = s.whole[(u - 1) % 2];
        } else if (measured.unit[u] > 0) {
            llama_alloc(m, place.at.memory, measured.unit[u], "the base");
            device_spread(m.dev, place.at.memory, measured.unit[u]);
        }
        each_weight_of(m.w, m.c, u, place);
        m.units.push_back({place.at.memory, measured.unit[u]});
    }
    if (is_host_embed(m.c, options, "model.embed_tokens.weight")) {
        m.w.embed.data = device_alloc_host(m.dev, m.w.embed.elements() * store_bytes(m.w.embed.store), "the embedding");
    }
}

template <class T>
T* writable(const T* p) {  // weights are constant to all but those who read them in
    return const_cast<T*>(p);
}

// The absmax of a matrix quantised here, into its place.
template <class Dev>
void absmax_store(Llama<Dev>& m, Matrix& w, const std::vector<float>& absmax) {
    if (w.absmax32 != nullptr) {
        device_to(m.dev, writable(w.absmax32), absmax.data(), absmax.size() * 4);
        return;
    }
    std::vector<uint8_t> absmax8(absmax.size());
    std::vector<float> absmax2((absmax.size() + 255) / 256);
    nf4_double_quantize(absmax8.data(), absmax2.data(), &w.offset, absmax.data(), absmax.size());
    float map[256];
    nf4_map8(map);
    device_to(m.dev, writable(w.absmax8), absmax8.data(), absmax8.size());
    device_to(m.dev, writable(w.absmax2), absmax2.data(), absmax2.size() * 4);
    device_to(m.dev, writable(w.map8), map, sizeof(map));
}

// Reads each weight of a unit into its place. saved: what --save-base writes of it, nullptr: nothing is.
template <class Dev>
struct LoadUnit {
    using Real = typename Dev::real;
    Llama<Dev>& m;
    BaseReader& r;
    BaseOptions options;
    std::vector<HostTensor>* saved;
    Error error;

    void vector(const std::string& name, Real*& p, int n) {
        if (error) {
            return;
        }
        std::vector<Real> host(n);
        const Tensor& t = *safetensors_find(r.st, name);
        HostTensor* copy = save_begin(t);
        error = tensor_stream(r, t, [&](const void* raw, const float* x, uint64_t first, size_t count) {
            save_more(copy, t, raw, count);
            std::copy(x, x + count, host.begin() + first);
        });
        device_to(m.dev, p, host.data(), n * sizeof(Real));
    }

    void matrix(const std::string& name, Matrix& w, int, int, bool) {
        if (error) {
            return;
        }
        const Tensor& t = *safetensors_find(r.st, name);
        error = t.dtype == "U8"         ? matrix_bnb(name, t, w)
                : w.store == Store::NF4 ? matrix_nf4(t, w)
                                        : matrix_plain(t, w);
    }

    HostTensor* save_begin(const Tensor& t) {
        if (saved == nullptr) {
            return nullptr;
        }
        saved->push_back({t.name, t.dtype, t.shape, ""});
        saved->back().bytes.reserve(t.bytes);
        return &saved->back();
    }

    static void save_more(HostTensor* copy, const Tensor& t, const void* raw, size_t count) {
        if (copy != nullptr) {
            copy->bytes.append(static_cast<const char*>(raw), count * dtype_bytes(t.dtype));
        }
    }

    Error matrix_plain(const Tensor& t, Matrix& w) {
        const Store stored = dtype_store(t.dtype);
        const size_t width = store_bytes(w.store);
        uint8_t* p = static_cast<uint8_t*>(const_cast<void*>(w.data));
        std::vector<bf16> rounded;
        HostTensor* copy = save_begin(t);
        return tensor_stream(r, t, [&](const void* raw, const float* x, uint64_t first, size_t count) {
            save_more(copy, t, raw, count);
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
        std::vector<float> absmax(w.blocks());
        Error e = tensor_stream(r, t, [&](const void*, const float* x, uint64_t first, size_t count) {
            nf4_quantize(m.dev, writable(w.codes) + first / 2, absmax.data() + first / 64, x, count);
        });
        if (!e) {
            absmax_store(m, w, absmax);
            if (saved != nullptr) {
                matrix_save(t, w);
            }
            nf4_pack(m.dev, w);
        }
        return e;
    }

    void matrix_save(const Tensor& t, const Matrix& w) {
        Matrix host = w;
        std::vector<uint8_t> codes((w.elements() + 1) / 2), absmax8;
        std::vector<float> absmax32, absmax2, map;
        const auto fetch = [&](auto& to, auto*& p, size_t n) {
            if (p != nullptr) {
                to.resize(n);
                device_from(m.dev, to.data(), p, n * sizeof(to[0]));
                p = to.data();
            }
        };
        fetch(codes, host.codes, codes.size());
        fetch(absmax32, host.absmax32, w.blocks());
        fetch(absmax8, host.absmax8, w.blocks());
        fetch(absmax2, host.absmax2, (w.blocks() + 255) / 256);
        fetch(map, host.map8, 256);
        bnb_tensors(*saved, t.name, host, t.dtype);
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
        w.offset = q.offset;
        Error e = tensor_copy(writable(w.codes), *q.codes);
        if (!e && !q.nested()) {
            e = tensor_copy(writable(w.absmax32), *q.absmax);
        } else if (!e) {
            e = tensor_copy(writable(w.absmax8), *q.absmax);
            e = e ? e : tensor_copy(writable(w.absmax2), *q.nested_absmax);
            device_to(m.dev, writable(w.map8), q.nested_map, sizeof(q.nested_map));
            r.chunk_hashes += sha256_hex(q.nested_map, sizeof(q.nested_map)) + sha256_hex(&q.offset, sizeof(q.offset));
        }
        if (!e) {
            nf4_pack(m.dev, w);
        }
        return e;
    }

    // The bytes of a tensor as they are; floats are checked to be finite.
    template <class T>
    Error tensor_copy(T* to, const Tensor& t) {
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

// ---------------------------------------------------------------------------------------------------------------------
// units between ranks

// Of all ranks' errors: this rank's own, or with an empty text that another rank has one and says it; none only if none
// has.
inline Error comm_agree(const Comm* comm, Error mine) {
    if (comm == nullptr) {
        return mine;
    }
    std::vector<int> codes(comm->size);
    comm_all_gather(*comm, codes.data(), &mine.code, sizeof(mine.code));
    for (int code : codes) {
        mine.code = mine.code == 0 ? code : mine.code;
    }
    return mine;
}

// Units first, first + 1, ... have been read, one by each rank: hands them on, with the offsets of a layer's absmax,
// which are held beside its memory, and the hashes of what was read. *hashes grows by theirs, in order.
template <class Dev>
void round_share(Llama<Dev>& m, int first, std::string own_hashes, std::string* hashes) {
    const Comm* comm = m.dev.comm;
    if (comm == nullptr) {
        *hashes += own_hashes;
        return;
    }
    const int units = base_units(m.c), own = first + comm->rank;
    const auto is_layer = [&](int u) { return u > 0 && u <= m.c.L; };
    std::string note(MODULES * sizeof(float), '\0');
    for (int i = 0; own < units && is_layer(own) && i < MODULES; i++) {
        memcpy(&note[size_t(i) * sizeof(float)], &m.w.layers[own - 1].linear[i].offset, sizeof(float));
    }
    const std::vector<std::string> notes = comm_all_gather_text(*comm, note + own_hashes);
    std::vector<void*> slices(comm->size, nullptr);
    for (int r = 0; r < comm->size && first + r < units; r++) {
        const int u = first + r;
        hashes->append(notes[r], note.size());
        if (!is_layer(u)) {
            comm_broadcast_device(m.dev, m.units[u].p, m.units[u].bytes, r);
            if (u == 0 && m.units[0].bytes == 0) {  // on the host
                comm_broadcast(*comm, const_cast<void*>(m.w.embed.data),
                               m.w.embed.elements() * store_bytes(m.w.embed.store), r);
            }
            continue;
        }
        for (int i = 0; i < MODULES; i++) {
            Matrix& w = m.w.layers[u - 1].linear[i];
            memcpy(&w.offset, &notes[r][size_t(i) * sizeof(float)], sizeof(float));
            w.packed = w.store == Store::NF4 && nf4_packs(m.dev, w);
        }
        if (m.spread.slice == 0) {
            comm_broadcast_device(m.dev, m.units[u].p, m.units[u].bytes, r);
        } else {
            slices[r] = m.spread.mine + size_t(u - 1) * m.spread.slice;
        }
    }
    if (m.spread.slice > 0) {
        comm_exchange_device(m.dev, own < units && is_layer(own) ? m.units[own].p : nullptr, slices.data(),
                             m.spread.slice);
    }
}

// Every unit is made by one rank with make(unit, hashes) and handed on. after(first, error): once a round, on all
// ranks.
template <class Dev, class Make, class After>
Error base_rounds(Llama<Dev>& m, std::string* hashes, const Make& make, const After& after) {
    const int ranks = m.dev.comm != nullptr ? m.dev.comm->size : 1, rank = m.dev.comm != nullptr ? m.dev.comm->rank : 0;
    for (int first = 0; first < base_units(m.c); first += ranks) {
        std::string own;
        Error e = first + rank < base_units(m.c) ? make(first + rank, &own) : Error();
        e = comm_agree(m.dev.comm, e);
        e = e ? e : comm_agree(m.dev.comm, after());
        if (e) {
            return e;
        }
        round_share(m, first, own, hashes);
    }
    if (m.c.tied) {
        m.w.head = m.w.embed;
    }
    return {};
}

// What this round's ranks read, to rank 0, which writes it in the order of the units.
inline Error saved_units_write(const Comm* comm, BaseWriter& writer, std::vector<HostTensor>& own) {
    if (comm == nullptr) {
        return base_writer_add(writer, std::move(own));
    }
    const std::string text = host_tensors_pack(own);
    own.clear();
    for (std::string& one : comm_gather_text(*comm, text)) {
        std::vector<HostTensor> unit;
        if (!host_tensors_unpack(unit, one)) {
            return runtime_failure("a part of the base came damaged from another rank");
        }
        std::string().swap(one);
        if (Error e = base_writer_add(writer, std::move(unit))) {
            return e;
        }
    }
    return {};
}

// Each rank reads a part of the base only, so a rank with another copy of it would train a mixture. What can be told
// quickly: names, dtypes, shapes, and the first and last bytes of every tensor.
inline Error same_base_check(const Comm* comm, const BaseReader& r, const std::string& model_dir) {
    std::string text;
    Error e;
    for (const Tensor& t : r.st.tensors) {
        char ends[2][2048] = {};
        const size_t bytes = size_t(std::min<uint64_t>(t.bytes, sizeof(ends[0])));
        e = e ? e : safetensors_read(r.st, t, ends[0], 0, bytes);
        e = e ? e : safetensors_read(r.st, t, ends[1], t.bytes - bytes, bytes);
        text += t.name + " " + t.dtype + " " + shape_text(t.shape) + " " + sha256_hex(ends, sizeof(ends)) + "\n";
    }
    if (e = comm_agree(comm, e); e) {
        return e;
    }
    const std::vector<std::string> all = comm_all_gather_text(*comm, sha256_hex(text.data(), text.size()));
    if (all[comm->rank] != all[0]) {
        e = bad_input("%s: not the model that rank 0 reads", model_dir.c_str())
                .hinted("every machine needs the same copy of the model");
    }
    return comm_agree(comm, e);
}

// Loads the weights of m.c from model_dir. *hash: sha256 of what was read (tensors and their names). save_dir: where
// the packed base is written too; "": nowhere.
template <class Dev>
Error llama_load(Llama<Dev>& m, std::string* hash, std::vector<std::string>& warnings, const std::string& model_dir,
                 const BaseOptions& options, const std::string& save_dir = "") {
    if (m.c.bnb_nf4 && !options.nf4) {
        return bad_input("%s: the checkpoint is already quantised to NF4, --quant none is not possible",
                         model_dir.c_str())
            .hinted("leave out --quant, or give the 16-bit checkpoint");
    }
    if (m.c.bnb_nf4 && !save_dir.empty()) {
        return bad_input("%s: the checkpoint is already quantised to NF4, there is nothing to save", model_dir.c_str())
            .hinted("leave out --save-base");
    }
    const bool first = m.dev.comm == nullptr || m.dev.comm->rank == 0, save = !save_dir.empty(), writes = save && first;
    BaseReader r;
    BaseWriter writer;
    Error e = checkpoint_open(r.st, model_dir);
    if (!e) {
        warnings.insert(warnings.end(), r.st.warnings.begin(), r.st.warnings.end());
        e = base_check_names(r, m.w, m.c, model_dir);
    }
    e = comm_agree(m.dev.comm, e);
    e = e || m.dev.comm == nullptr ? e : same_base_check(m.dev.comm, r, model_dir);
    const BaseBytes measured = e ? BaseBytes() : base_measure(m.dev, m.c, options, &r.st);
    size_t whole = std::accumulate(measured.unit.begin(), measured.unit.end(), size_t(0));
    whole += options.host_embed ? size_t(m.c.V) * m.c.C * 2 : 0;
    e = e || !writes ? e : base_writer_open(writer, save_dir, model_dir, whole);
    e = comm_agree(m.dev.comm, e);
    std::string hashes;
    if (!e) {
        device_reserve(m.dev, measured.load_workspace);
        base_place(m, options, measured, &r.st);
        std::vector<HostTensor> saved;
        const auto load = [&](int unit, std::string* own) {
            LoadUnit<Dev> one{m, r, options, save ? &saved : nullptr, {}};
            each_weight_of(m.w, m.c, unit, one);
            own->swap(r.chunk_hashes);
            r.chunk_hashes.clear();
            return one.error;
        };
        e = base_rounds(m, &hashes, load,
                        [&] { return save ? saved_units_write(m.dev.comm, writer, saved) : Error(); });
    }
    if (!e && first) {  // it reads two whole tensors, for a warning that rank 0 shows
        e = tied_head_warning(r, m.c, warnings);
    }
    e = e || !writes ? e : base_writer_close(writer);
    if (e && writes) {
        base_writer_abandon(writer);
    }
    e = comm_agree(m.dev.comm, e);
    for (const std::string& name : r.wanted) {
        hashes += name + "\n";
    }
    *hash = sha256_hex(hashes.data(), hashes.size());
    safetensors_close(r.st);
    return e;
}

// ---------------------------------------------------------------------------------------------------------------------
// random weights in place, for plans and timings

template <class Dev>
struct RandomUnit {
    using Real = typename Dev::real;
    Llama<Dev>& m;
    uint64_t tensor;  // matrices before this one, in the order of each_weight

    void vector(const std::string&, Real*& p, int n) {
        std::vector<Real> ones(n, Real(1));
        device_to(m.dev, p, ones.data(), n * sizeof(Real));
    }

    // Codes are random bits; the absmax gives weights of standard deviation 1 / sqrt(cols), so that activations keep
    // their size through the layers.
    void matrix(const std::string&, Matrix& w, int, int cols, bool) {
        tensor++;
        const double sigma = 1 / std::sqrt(double(cols));
        if (w.store == Store::NF4) {
            fill(writable(w.codes), (w.elements() + 1) / 2, [&](size_t i, void* out) {
                uint64_t bits = random_bits(1, STREAM_WEIGHTS, tensor, i);
                memcpy(out, &bits, 8);
            });
            absmax_store(m, w, std::vector<float>(w.blocks(), float(sigma / 0.55)));  // 0.55: the codes' rms
            nf4_pack(m.dev, w);
            return;
        }
        const bool half = w.store == Store::BF16;
        fill(static_cast<uint8_t*>(const_cast<void*>(w.data)), w.elements() * store_bytes(w.store),
             [&](size_t i, void* out) {
                 uint64_t bits = random_bits(1, STREAM_WEIGHTS, tensor, half ? i : i / 2);
                 bf16 x[4];
                 float f[4];
                 for (int j = 0; j < 4; j++) {
                     x[j] =
                         to_bf16(float((double(uint16_t(bits >> (16 * j))) / 65535 - 0.5) * sigma * std::sqrt(12.0)));
                     f[j] = to_float(x[j]);
                 }
                 memcpy(out, half ? static_cast<const void*>(x) : f + i % 2 * 2, 8);
             });
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
};

template <class Dev>
Error llama_random(Llama<Dev>& m, const BaseOptions& options) {
    const BaseBytes measured = base_measure(m.dev, m.c, options);
    device_reserve(m.dev, measured.load_workspace);
    base_place(m, options, measured, nullptr);
    std::string none;
    return base_rounds(
        m, &none,
        [&](int unit, std::string*) {
            RandomUnit<Dev> random{m, unit == 0 ? 0 : 1 + uint64_t(unit - 1) * MODULES};
            each_weight_of(m.w, m.c, unit, random);
            return Error();
        },
        [] { return Error(); });
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
