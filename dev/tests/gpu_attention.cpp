// Attention of the GPU device against Cpu<double> on the same stored inputs: tensor-core kernels (both row counts a
// warp), plain kernels, packing, order of tiles, strides, alignment, growth of the row maximum.
//
// The yardstick is attention as PyTorch's default back end evaluates it: scores and dP in fp32; the weights as they meet
// V, the output, dS and each query head's share of dK and dV rounded to the storage type; sums are fp32.
#include <algorithm>

#include "dev/tests/gpu.h"
#include "kernels/cpu/attention.h"

namespace {

struct Shape {
    int NH, NKV, HS;
    std::vector<int> lengths;

    size_t N() const {
        size_t n = 0;
        for (int length : lengths) {
            n += size_t(length);
        }
        return n;
    }
    size_t longest() const { return size_t(*std::max_element(lengths.begin(), lengths.end())); }
    size_t wide() const { return size_t(NH) * size_t(HS); }
    size_t QKV() const { return size_t(NH + 2 * NKV) * size_t(HS); }
    std::vector<int32_t> starts() const {
        std::vector<int32_t> at = {0};
        for (int length : lengths) {
            at.push_back(at.back() + length);
        }
        return at;
    }
    std::string name() const {
        std::string s =
            std::to_string(NH) + "/" + std::to_string(NKV) + " heads of " + std::to_string(HS) + ", documents";
        for (int length : lengths) {
            s += " " + std::to_string(length);
        }
        return s;
    }
};

struct Inputs {
    std::vector<double> qkv, dout;
};

template <class X>
Inputs inputs_of(const Shape& s, double size) {
    return {random_stored<X>(s.N() * s.QKV(), 11, size), random_stored<X>(s.N() * s.wide(), 12)};
}

struct Result {
    std::vector<double> out, lse, dqkv;
};

Result exact_attention(const Shape& s, const Inputs& in) {
    DoubleDevice dev(2);
    Result r = {std::vector<double>(s.N() * s.wide()), std::vector<double>(s.N() * size_t(s.NH)),
                std::vector<double>(s.N() * s.QKV())};
    const std::vector<int32_t> starts = s.starts();
    Documents docs;
    docs.cu_seqlens = starts.data();
    docs.count = int(s.lengths.size());
    device_reserve(dev, attention_workspace(dev, s.N(), s.longest(), s.NH, s.NKV, s.HS));
    attention_forward(dev, r.out.data(), s.wide(), r.lse.data(), in.qkv.data(), docs, s.N(), s.NH, s.NKV, s.HS);
    attention_backward(dev, r.dqkv.data(), s.QKV(), in.dout.data(), r.out.data(), s.wide(), r.lse.data(), in.qkv.data(),
                       docs, s.N(), s.NH, s.NKV, s.HS);
    return r;
}

// What the yardstick needs of one query head and document; (i, j) of the matrices is query i, key j. Rounded to X where
// PyTorch's default attention (scaled_dot_product_attention) rounds: weights as they meet V, the output, dS, the products;
// eager attention rounds scores and probabilities too and errs up to ten times as much (scripts/check_bf16.py).
template <class X>
void plain_head(const Shape& s, const Inputs& in, int h, size_t first, size_t n, Result& r, std::vector<double>& dkv,
                double& score_term) {
    const size_t HS = size_t(s.HS), q_at = size_t(h) * HS, k_at = size_t(s.NH + h / (s.NH / s.NKV)) * HS;
    const size_t v_at = k_at + size_t(s.NKV) * HS;
    const float scale = float(1 / std::sqrt(double(HS)));
    const auto x = [&](size_t row, size_t at) { return float(in.qkv[(first + row) * s.QKV() + at]); };
    const auto g = [&](size_t row, size_t c) { return float(in.dout[(first + row) * s.wide() + q_at + c]); };
    const auto store = [](float v) { return float(rounded<X>(v)); };
    std::vector<float> e(n * n), p(n * n), ds(n * n);  // e: exp(score - top), what meets V
    for (size_t i = 0; i < n; i++) {
        float top = -INFINITY, sum = 0, delta = 0;
        for (size_t j = 0; j <= i; j++) {
            float dot = 0, dp = 0, term = 0;
            for (size_t c = 0; c < HS; c++) {
                dot += x(i, q_at + c) * x(j, k_at + c);
                term += std::fabs(x(i, q_at + c) * x(j, k_at + c));
                dp += g(i, c) * x(j, v_at + c);
            }
            p[i * n + j] = dot * scale;
            ds[i * n + j] = dp;
            top = std::max(top, p[i * n + j]);
            score_term = std::max(score_term, double(term * scale));
        }
        for (size_t j = 0; j <= i; j++) {
            e[i * n + j] = std::exp(p[i * n + j] - top);
            sum += e[i * n + j];
        }
        for (size_t c = 0; c < HS; c++) {
            float o = 0;
            for (size_t j = 0; j <= i; j++) {
                o += store(e[i * n + j]) * x(j, v_at + c);
            }
            o = store(o / sum);
            r.out[(first + i) * s.wide() + q_at + c] = o;
            delta += g(i, c) * o;
        }
        for (size_t j = 0; j <= i; j++) {
            p[i * n + j] = e[i * n + j] / sum;
            ds[i * n + j] = store(p[i * n + j] * (ds[i * n + j] - delta));
            p[i * n + j] = store(p[i * n + j]);
        }
    }
    for (size_t i = 0; i < n; i++) {
        for (size_t c = 0; c < HS; c++) {
            float dq = 0, dk = 0, dv = 0;
            for (size_t j = 0; j <= i; j++) {
                dq += ds[i * n + j] * x(j, k_at + c);
            }
            for (size_t j = i; j < n; j++) {
                dk += ds[j * n + i] * x(j, q_at + c);
                dv += p[j * n + i] * g(j, c);
            }
            r.dqkv[(first + i) * s.QKV() + q_at + c] = store(dq * scale);
            dkv[(first + i) * s.QKV() + k_at + c] += store(dk * scale);
            dkv[(first + i) * s.QKV() + v_at + c] += store(dv);
        }
    }
}

// score_term: the greatest sum of magnitudes behind a score.
template <class X>
Result plain_attention(const Shape& s, const Inputs& in, double& score_term) {
    Result r = {std::vector<double>(s.N() * s.wide()), {}, std::vector<double>(s.N() * s.QKV())};
    std::vector<double> dkv(s.N() * s.QKV());
    const std::vector<int32_t> starts = s.starts();
    score_term = 0;
    for (size_t d = 0; d < s.lengths.size(); d++) {
        for (int h = 0; h < s.NH; h++) {
            plain_head<X>(s, in, h, size_t(starts[d]), size_t(s.lengths[d]), r, dkv, score_term);
        }
    }
    for (size_t i = 0; i < dkv.size(); i++) {
        if (i % s.QKV() >= s.wide()) {
            r.dqkv[i] = rounded<X>(dkv[i]);
        }
    }
    return r;
}

// Where rows stand, and in what order the tiles.
struct Layout {
    size_t gap = 16;      // elements between the rows of out and of dqkv
    size_t shift = 0;     // elements off the grid, of every buffer
    bool turned = false;  // the lists of tiles backwards
};

// The first `width` elements of each row; the rest must still be the poison.
template <class X>
std::vector<X> rows_of(GpuBuffer<X, X>& buffer, size_t N, size_t width) {
    const std::vector<X> all = buffer.get();
    const size_t stride = all.size() / N;
    std::vector<X> rows;
    size_t touched = 0;
    for (size_t i = 0; i < all.size(); i++) {
        if (i % stride < width) {
            rows.push_back(all[i]);
        } else {
            const unsigned char* bytes = reinterpret_cast<const unsigned char*>(&all[i]);
            touched += std::any_of(bytes, bytes + sizeof(X), [](unsigned char b) { return b != 0xff; });
        }
    }
    CHECK(touched == 0, "%zu elements between the rows were written", touched);
    CHECK_FENCES(buffer);
    return rows;
}

template <class X>
void turn_tiles(Gpu<X>& dev, Documents& docs, int list) {
    std::vector<int32_t> tiles(3 * size_t(docs.tile_count[list])), turned;
    int32_t* memory = const_cast<int32_t*>(docs.tiles[list]);
    device_from(dev, tiles.data(), memory, tiles.size() * sizeof(int32_t));
    for (size_t i = tiles.size(); i > 0; i -= 3) {
        turned.insert(turned.end(), {tiles[i - 3], tiles[i - 2], tiles[i - 1]});
    }
    device_to(dev, memory, turned.data(), turned.size() * sizeof(int32_t));
}

template <class X>
struct Stored {
    std::vector<X> out, dqkv;
    std::vector<float> lse;
};

template <class X>
Stored<X> gpu_attention(Gpu<X>& dev, const Shape& s, const Inputs& in, const Layout& layout = {}) {
    const size_t N = s.N(), stride = s.wide() + layout.gap, dstride = s.QKV() + layout.gap;
    GpuBuffer<X, X> qkv(dev, stored_values<X>(in.qkv), layout.shift),
        dout(dev, stored_values<X>(in.dout), layout.shift);
    GpuBuffer<X, X> out(dev, N * stride, layout.shift), dqkv(dev, N * dstride, layout.shift);
    GpuBuffer<float, X> lse(dev, N * size_t(s.NH));
    GpuBuffer<int32_t, X> memory(dev, Gpu<X>::document_ints(N));
    Documents docs = documents_place(dev, memory.data(), s.starts().data(), int(s.lengths.size()), s.HS);
    if (layout.turned) {
        turn_tiles(dev, docs, 0);
        turn_tiles(dev, docs, 2);
    }
    device_reserve(dev, attention_workspace(dev, N, s.longest(), s.NH, s.NKV, s.HS));
    const std::vector<char> poison(dev.workspace_bytes, char(0xff));
    device_to(dev, dev.workspace, poison.data(), poison.size());
    attention_forward(dev, out.data(), stride, lse.data(), qkv.data(), docs, N, s.NH, s.NKV, s.HS);
    attention_backward(dev, dqkv.data(), dstride, dout.data(), out.data(), stride, lse.data(), qkv.data(), docs, N,
                       s.NH, s.NKV, s.HS);
    CHECK_FENCES(lse);
    CHECK_FENCES(memory);
    return {rows_of(out, N, s.wide()), rows_of(dqkv, N, s.QKV()), lse.get()};
}

template <class X>
bool same_result(const Stored<X>& a, const Stored<X>& b) {
    return same_bits(a.out.data(), b.out.data(), a.out.size()) && same_bits(a.lse.data(), b.lse.data(), a.lse.size()) &&
           same_bits(a.dqkv.data(), b.dqkv.data(), a.dqkv.size());
}

// How far lse may be off. Its derivatives by the scores are probabilities, so a common error bound of the scores is one
// of lse: HS sums, each off by 2^-23 (a tensor core may cut off) of the sum of magnitudes A; 12 roundings of 2^-24 for
// the scale, its product with log2 e, the products with both and their difference, none greater than A. To this come
// the relative errors of what is under the logarithm: 2^-21 of exp2 (2^-22 by its specification, once more for what the
// maximum's growth rescaled), 2^-24 for each of T sums; and 4 roundings of the logarithm and of the result.
double lse_bound(const Shape& s, double score_term, const std::vector<double>& lse) {
    const double u = std::ldexp(1, -24);
    return score_term * (2 * s.HS + 12) * u + 8 * u + double(s.longest()) * u +
           4 * u * (score_term + greatest(lse.data(), lse.size()));
}

// The columns at .. at + n of each row.
std::vector<double> columns_of(const std::vector<double>& x, size_t width, size_t at, size_t n) {
    std::vector<double> part;
    for (size_t row = 0; row < x.size(); row += width) {
        part.insert(part.end(), x.begin() + long(row + at), x.begin() + long(row + at + n));
    }
    return part;
}

// Inputs with what is to come out; `check` may be called for several devices and layouts.
template <class X>
struct Case {
    Shape shape;
    Inputs in;
    Result exact, plain;
    double score_term = 0;

    Case(const Shape& s, const Inputs& inputs) : shape(s), in(inputs), exact(exact_attention(s, inputs)) {
        plain = plain_attention<X>(s, inputs, score_term);
    }
    void check(const std::string& what, Gpu<X>& dev, const Layout& layout = {}) const {
        const Stored<X> got = gpu_attention(dev, shape, in, layout);
        const std::string name = what + ", " + shape.name() + ": ";
        check_yardstick<X>(name + "out", numbers(got.out), plain.out, exact.out);
        CHECK_ERROR(name + "lse", greatest_error(got.lse.data(), exact.lse.data(), exact.lse.size()),
                    lse_bound(shape, score_term, exact.lse));
        const size_t kv = size_t(shape.NKV) * size_t(shape.HS), wide = shape.wide();
        const std::vector<double> dqkv = numbers(got.dqkv);
        const struct {
            const char* name;
            size_t at, n;
        } parts[] = {{"dq", 0, wide}, {"dk", wide, kv}, {"dv", wide + kv, kv}};
        for (const auto& p : parts) {
            check_yardstick<X>(name + p.name, columns_of(dqkv, shape.QKV(), p.at, p.n),
                               columns_of(plain.dqkv, shape.QKV(), p.at, p.n),
                               columns_of(exact.dqkv, shape.QKV(), p.at, p.n));
        }
    }
};

const std::vector<int> SHORT = {1, 17, 63, 64, 65, 130};
const std::vector<int> LONG = {300, 2, 129, 128};

}  // namespace

// Scores of order 1 and of tens; 32 rows a warp (as on 80) and 16 (as on 89).
static void gpu_attention_mma() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    const struct {
        Shape shape;
        double size;
        int arch;
    } cases[] = {{{4, 2, 64, SHORT}, 2, 80},  {{3, 1, 64, SHORT}, 6, 80},        {{8, 2, 64, SHORT}, 2, 89},
                 {{4, 4, 64, LONG}, 6, 89},   {{1, 1, 64, LONG}, 2, 90},         {{3, 1, 128, SHORT}, 2, 80},
                 {{4, 2, 128, SHORT}, 6, 89}, {{8, 2, 128, {64, 65, 1}}, 2, 80}, {{4, 4, 128, LONG}, 6, 100},
                 {{1, 1, 128, LONG}, 2, 120}};
    for (const auto& c : cases) {
        dev.info.arch = c.arch;
        Case<bf16>(c.shape, inputs_of<bf16>(c.shape, c.size)).check("sm_" + std::to_string(c.arch), dev);
    }
}

// A row's greatest score that rises from tile to tile by less than the softmax waits for, by more, and one that falls.
static void gpu_attention_growth() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    for (int HS : {64, 128}) {
        const Shape s = {1, 1, HS, {260}};
        for (double slope : {0.05, 0.4, -0.4}) {
            Inputs in = inputs_of<bf16>(s, 1);
            for (size_t row = 0; row < s.N(); row++) {
                in.qkv[row * s.QKV()] = 1;  // times the key's channel 0: a score of slope * row
                in.qkv[row * s.QKV() + size_t(HS)] = rounded<bf16>(slope * double(row) * std::sqrt(double(HS)));
            }
            const Case<bf16> c(s, in);
            for (int arch : {80, 89}) {
                dev.info.arch = arch;
                c.check("sm_" + std::to_string(arch) + ", slope " + std::to_string(slope), dev);
            }
        }
    }
}

template <class X>
static void check_plain() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    const struct {
        Shape shape;
        double size;
    } cases[] = {{{3, 1, 8, {1, 33, 70}}, 4},    {{4, 2, 24, {1, 17, 64}}, 2}, {{6, 2, 32, {70, 2, 32}}, 6},
                 {{2, 1, 80, {65, 31}}, 2},      {{2, 2, 256, {34, 1}}, 2},    {{1, 1, 64, {40}}, 2},
                 {{2, 1, 128, {1, 1, 1, 33}}, 2}};
    for (const auto& c : cases) {
        if (sizeof(X) == 2 && (c.shape.HS == 64 || c.shape.HS == 128)) {
            continue;  // gpu_attention_unaligned
        }
        Case<X>(c.shape, inputs_of<X>(c.shape, c.size)).check("plain", dev, {3, 1, false});
    }
}
static void gpu_attention_plain_bf16() {
    check_plain<bf16>();
}
static void gpu_attention_plain_float() {
    check_plain<float>();
}

// Head sizes of the tensor cores whose rows do not allow 16-byte copies: the plain kernels take them. On the stand-in a
// copy that is not aligned ends the program.
static void gpu_attention_unaligned() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    const Shape s = {2, 1, 64, {40, 3}};
    const Case<bf16> c(s, inputs_of<bf16>(s, 2));
    c.check("rows 4 elements further", dev, {4, 0, false});
    c.check("buffers 4 elements off", dev, {8, 4, false});
    c.check("aligned, dense", dev, {0, 0, false});
    const Shape t = {1, 1, 128, {33}};
    Case<bf16>(t, inputs_of<bf16>(t, 2)).check("rows 2 elements further", dev, {2, 0, false});
}

// The same bits twice, with the tiles in the other order, and of a document alone.
template <class X>
static void check_documents(const Shape& s) {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    const Inputs in = inputs_of<X>(s, 3);
    const Stored<X> together = gpu_attention(dev, s, in);
    CHECK(same_result(together, gpu_attention(dev, s, in)), "%s: another result the second time", s.name().c_str());
    CHECK(same_result(together, gpu_attention(dev, s, in, {16, 0, true})), "%s: the order of tiles matters",
          s.name().c_str());
    const std::vector<int32_t> starts = s.starts();
    for (size_t d = 0; d < s.lengths.size(); d++) {
        const size_t first = size_t(starts[d]), n = size_t(s.lengths[d]);
        const auto rows = [&](const auto& x, size_t width) {
            return std::vector<typename std::decay<decltype(x[0])>::type>(x.begin() + long(first * width),
                                                                          x.begin() + long((first + n) * width));
        };
        const Shape alone = {s.NH, s.NKV, s.HS, {int(n)}};
        Stored<X> part = {rows(together.out, s.wide()), rows(together.dqkv, s.QKV()), {}};
        for (size_t h = 0; h < size_t(s.NH); h++) {
            const float* lse = together.lse.data() + h * s.N() + first;
            part.lse.insert(part.lse.end(), lse, lse + n);
        }
        CHECK(same_result(part, gpu_attention(dev, alone, {rows(in.qkv, s.QKV()), rows(in.dout, s.wide())})),
              "%s: document %zu has other bits alone", s.name().c_str(), d);
    }
}
static void gpu_attention_documents() {
    check_documents<bf16>({2, 1, 64, {5, 130, 1, 70}});
    check_documents<bf16>({2, 1, 128, {33, 140}});
    check_documents<bf16>({2, 1, 24, {5, 40}});
    check_documents<float>({2, 1, 16, {33, 1, 20}});
}

// A NaN stays in its document.
static void gpu_attention_nan() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    for (int HS : {64, 24}) {
        const Shape s = {1, 1, HS, {40, 30, 40}};
        Inputs in = inputs_of<bf16>(s, 1);
        for (size_t part = 0; part < 3; part++) {
            in.qkv[50 * s.QKV() + part * size_t(HS)] = std::numeric_limits<double>::quiet_NaN();
        }
        const Stored<bf16> got = gpu_attention(dev, s, in);
        const std::vector<double> out = numbers(got.out), dqkv = numbers(got.dqkv);
        for (size_t i = 0; i < dqkv.size(); i++) {
            const size_t row = i / s.QKV();
            CHECK((row >= 40 && row < 70) || std::isfinite(dqkv[i]), "HS %d: gradient of row %zu", HS, row);
        }
        for (size_t i = 0; i < out.size(); i++) {
            const size_t row = i / s.wide();
            CHECK((row >= 40 && row < 70) || std::isfinite(out[i]), "HS %d: row %zu", HS, row);
            CHECK(row < 50 || row >= 70 || std::isnan(out[i]), "HS %d: row %zu does not see the NaN", HS, row);
        }
    }
}

// Every row of 128 in one tile of each list, most columns first, and no int more than document_ints.
static void gpu_attention_tiles() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    for (const std::vector<int>& lengths : {LONG, SHORT, std::vector<int>{1}, std::vector<int>(200, 1)}) {
        const Shape s = {1, 1, 64, lengths};
        const std::vector<int32_t> starts = s.starts();
        GpuBuffer<int32_t, bf16> memory(dev, Gpu<bf16>::document_ints(s.N()));
        const Documents docs = documents_place(dev, memory.data(), starts.data(), int(lengths.size()), 64);
        CHECK_FENCES(memory);
        std::vector<int32_t> got(starts.size());
        device_from(dev, got.data(), docs.cu_seqlens, got.size() * sizeof(int32_t));
        CHECK(docs.count == int(lengths.size()) && got == starts, "cu_seqlens");
        for (int list = 0; list < 3; list++) {
            std::vector<int32_t> tiles(3 * size_t(docs.tile_count[list]));
            device_from(dev, tiles.data(), docs.tiles[list], tiles.size() * sizeof(int32_t));
            std::vector<int> seen(s.N());
            int before = 1 << 30;
            for (size_t i = 0; i < tiles.size(); i += 3) {
                const int32_t first = tiles[i], length = tiles[i + 1], row = tiles[i + 2] * 128;
                const bool known = std::find(starts.begin(), starts.end(), first) != starts.end() &&
                                   std::find(starts.begin(), starts.end(), first + length) != starts.end();
                if (!CHECK(known && row >= 0 && row < length, "list %d: tile %zu", list, i / 3)) {
                    return;
                }
                for (int32_t r = row; r < std::min(length, row + 128); r++) {
                    seen[size_t(first + r)]++;
                }
                const int columns = list == 2 ? length - row : std::min(length, row + 128);
                CHECK(columns <= before, "list %d: tile %zu has %d columns, after one of %d", list, i / 3, columns,
                      before);
                before = columns;
            }
            CHECK(std::count(seen.begin(), seen.end(), 1) == long(s.N()), "list %d does not have each row once", list);
        }
    }
}

extern const Test gpu_attention_tests[] = {{"gpu_attention_mma", gpu_attention_mma},
                                           {"gpu_attention_growth", gpu_attention_growth},
                                           {"gpu_attention_plain_bf16", gpu_attention_plain_bf16},
                                           {"gpu_attention_plain_float", gpu_attention_plain_float},
                                           {"gpu_attention_unaligned", gpu_attention_unaligned},
                                           {"gpu_attention_documents", gpu_attention_documents},
                                           {"gpu_attention_nan", gpu_attention_nan},
                                           {"gpu_attention_tiles", gpu_attention_tiles},
                                           {nullptr, nullptr}};
