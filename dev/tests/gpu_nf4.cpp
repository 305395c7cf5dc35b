// NF4 on the GPU: the quantiser's bytes, the packed order, every weight bit for bit on every way that it is read, and
// the products that dequantise as they go against double.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>

#include "dev/tests/gpu.h"
#include "kernels/nf4_ops.h"

namespace {

struct Bits {
    uint64_t state;
    uint32_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state >> 32);
    }
    double uniform() { return (next() + 0.5) * 0x1p-32; }
    double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(2 * 3.14159265358979323846 * uniform()); }
};

// How the absmax of a matrix are made. Harsh: zero, -0, negative, tiny, huge, and (double-quantised) sums that cancel,
// so that only a product and a sum that are rounded apart give them.
enum Absmax { NESTED, SINGLE, NESTED_HARSH, SINGLE_HARSH };
const Absmax all_kinds[] = {NESTED, SINGLE, NESTED_HARSH, SINGLE_HARSH};

// A frozen NF4 matrix: bytes on the host and on the device, and the weights that they stand for.
template <class X>
struct Frozen {
    std::vector<uint8_t> codes, absmax8;
    std::vector<float> absmax, absmax2, map;
    std::vector<bf16> weights;
    std::unique_ptr<GpuBuffer<uint8_t, X>> d_codes, d_absmax8;
    std::unique_ptr<GpuBuffer<float, X>> d_absmax, d_absmax2, d_map;
    Matrix w;  // on the device

    Frozen(Gpu<X>& dev, int rows, int cols, Absmax kind, uint64_t seed) {
        Bits bits{seed};
        const size_t n = size_t(rows) * size_t(cols), blocks = (n + 63) / 64;
        const bool nested = kind == NESTED || kind == NESTED_HARSH,
                   harsh = kind == NESTED_HARSH || kind == SINGLE_HARSH;
        codes.resize((n + 1) / 2);
        for (uint8_t& c : codes) {
            c = uint8_t(bits.next());
        }
        w.store = Store::NF4;
        w.rows = rows;
        w.cols = cols;
        if (nested) {
            map.resize(256);
            nf4_map8(map.data());
            w.offset = harsh ? 0.0371f : float(0.05 + 0.1 * bits.uniform());
            absmax8.resize(blocks);
            absmax2.resize((blocks + 255) / 256);
            for (uint8_t& q : absmax8) {
                q = harsh && bits.next() % 2 ? 0 : uint8_t(bits.next());
            }
            for (size_t i = 0; i < absmax2.size(); i++) {
                absmax2[i] = harsh ? w.offset / -map[0] : float(0.01 + 0.03 * bits.uniform());  // entry 0 cancels
            }
        } else {
            const float harsh_values[] = {0.0f, -0.0f, -0.7f, 1e-30f, 1e12f, -3e-12f, 1.0f, 0.1f};
            absmax.resize(blocks);
            for (float& a : absmax) {
                a = harsh ? harsh_values[bits.next() % 8] : float(1e-3 + 0.3 * bits.uniform());
            }
        }
        Matrix host = w;
        host.absmax32 = nested ? nullptr : absmax.data();
        host.absmax8 = absmax8.data();
        host.absmax2 = absmax2.data();
        host.map8 = map.data();
        for (size_t i = 0; i < n; i++) {
            const int code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
            weights.push_back(to_bf16(NF4_CODE[code] * nf4_absmax(host, i / 64)));
        }
        d_codes.reset(new GpuBuffer<uint8_t, X>(dev, codes));
        w.codes = d_codes->data();
        if (nested) {
            d_absmax8.reset(new GpuBuffer<uint8_t, X>(dev, absmax8));
            d_absmax2.reset(new GpuBuffer<float, X>(dev, absmax2));
            d_map.reset(new GpuBuffer<float, X>(dev, map));
            w.absmax8 = d_absmax8->data();
            w.absmax2 = d_absmax2->data();
            w.map8 = d_map->data();
        } else {
            d_absmax.reset(new GpuBuffer<float, X>(dev, absmax));
            w.absmax32 = d_absmax->data();
        }
    }

    double weight(size_t row, size_t col) const { return to_float(weights[row * size_t(w.cols) + col]); }
    bool intact() {
        return d_codes->intact() && (!d_absmax8 || d_absmax8->intact()) && (!d_absmax || d_absmax->intact());
    }
};

template <class X>
void reserve_for_loading(Gpu<X>& dev, size_t elements) {
    device_reserve(dev, nf4_load_workspace(dev, elements, elements));
}

// ----------------------------------------------------------------------------
// quantising

std::vector<float> weights_of_kind(int kind, size_t n, uint64_t seed) {
    Bits bits{seed};
    std::vector<float> w(n);
    for (size_t i = 0; i < n; i++) {
        switch (kind) {
            case 0: w[i] = float(bits.normal() * 0.02); break;
            case 1: w[i] = i % 3 ? 0.0f : -0.0f; break;
            case 2: w[i] = float(bits.normal() * 1e-39); break;  // subnormal: the floor of the reciprocal decides
            case 3: w[i] = float((2 * bits.uniform() - 1) * 3.4e38); break;
            case 4: w[i] = i % 64 == 7 ? float(bits.normal()) : 0.0f; break;
            default: {  // at a threshold between two codes, just below and just above; 1 is the absmax of each block
                const int t = int(i / 3) % 15;
                const float middle = (NF4_CODE[t] + NF4_CODE[t + 1]) / 2;
                w[i] = i % 64 == 63 ? 1.0f : std::nextafter(middle, i % 3 == 0 ? -2.0f : i % 3 == 1 ? middle : 2.0f);
            }
        }
    }
    return w;
}

template <class X>
void check_quantiser(Gpu<X>& dev, int kind, size_t n, size_t shift) {
    const std::vector<float> w = weights_of_kind(kind, n, n + size_t(kind));
    std::vector<uint8_t> expected((n + 1) / 2);
    std::vector<float> expected_absmax((n + 63) / 64), absmax((n + 63) / 64 + 1, 99.0f);
    nf4_quantize(expected.data(), expected_absmax.data(), w.data(), n, 1);
    GpuBuffer<uint8_t, X> codes(dev, expected.size(), shift);
    nf4_quantize(dev, codes.data(), absmax.data(), w.data(), n);
    CHECK(codes.get() == expected, "codes of %zu weights of kind %d, shift %zu, differ from the CPU's", n, kind, shift);
    CHECK(same_bits(absmax.data(), expected_absmax.data(), expected_absmax.size()) && absmax.back() == 99.0f,
          "absmax of %zu weights of kind %d differ from the CPU's", n, kind);
    CHECK_FENCES(codes);
}

template <class X>
void gpu_nf4_quantise() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    reserve_for_loading<X>(dev, 5000);
    for (int kind = 0; kind < 6; kind++) {
        for (size_t n : {1, 2, 3, 63, 64, 65, 200, 256, 1000, 4101}) {
            check_quantiser<X>(dev, kind, n, n % 4);
        }
    }
    // in chunks that end at borders of blocks: the same bytes
    const std::vector<float> w = weights_of_kind(0, 4992, 1);
    std::vector<uint8_t> expected(w.size() / 2);
    std::vector<float> expected_absmax(w.size() / 64), absmax(w.size() / 64);
    nf4_quantize(expected.data(), expected_absmax.data(), w.data(), w.size(), 1);
    GpuBuffer<uint8_t, X> codes(dev, expected.size());
    device_reserve(static_cast<Gpu<X>&>(dev), nf4_load_workspace(static_cast<Gpu<X>&>(dev), w.size(), 1920));
    for (size_t begin = 0; begin < w.size(); begin += 1920) {
        const size_t n = std::min<size_t>(1920, w.size() - begin);
        nf4_quantize(static_cast<Gpu<X>&>(dev), codes.data() + begin / 2, absmax.data() + begin / 64, w.data() + begin,
                     n);
    }
    CHECK(codes.get() == expected && absmax == expected_absmax, "chunks of a tensor differ from the whole");
}

// ----------------------------------------------------------------------------
// the packed order

// The code of (row, col) in the packed order, step by step as the picture in kernels/nf4.cuh has it.
int packed_code(const std::vector<uint8_t>& codes, size_t cols, size_t row, size_t col) {
    const size_t supertile = row / 16 * (cols / 64) + col / 64;
    const size_t tile = col % 64 / 16, u = row % 16 / 2, v = col % 16 / 2;  // of units in the 16x16 tile
    const size_t lane = 4 * u + v % 4, unit = v / 4;
    const size_t byte = supertile * 512 + lane * 16 + tile * 4 + unit * 2 + row % 2;
    return col % 2 ? codes[byte] >> 4 : codes[byte] & 15;
}

template <class X>
void check_pack(Gpu<X>& dev, int rows, int cols, Absmax kind) {
    Frozen<X> f(dev, rows, cols, kind, 5);
    const size_t across = size_t(cols) / 64;
    nf4_pack(dev, f.w);
    const std::vector<uint8_t> codes = f.d_codes->get();
    size_t wrong = 0;
    for (size_t r = 0; r < size_t(rows); r++) {
        for (size_t c = 0; c < size_t(cols); c++) {
            const uint8_t byte = f.codes[(r * size_t(cols) + c) / 2];
            wrong += packed_code(codes, size_t(cols), r, c) != (c % 2 ? byte & 15 : byte >> 4);
        }
    }
    const std::vector<float> absmax = f.d_absmax ? f.d_absmax->get() : std::vector<float>();
    const std::vector<uint8_t> absmax8 = f.d_absmax8 ? f.d_absmax8->get() : std::vector<uint8_t>();
    for (size_t r = 0; r < size_t(rows); r++) {
        for (size_t b = 0; b < across; b++) {
            const size_t at = b * size_t(rows) + r, was = r * across + b;
            wrong += f.d_absmax ? !same_bits(&absmax[at], &f.absmax[was], 1) : absmax8[at] != f.absmax8[was];
        }
    }
    CHECK(f.w.packed && wrong == 0, "%d x %d, kind %d: %zu codes or absmax stand elsewhere", rows, cols, kind, wrong);
    CHECK(f.intact(), "%d x %d: packing writes outside", rows, cols);
    nf4_pack(dev, f.w);
    CHECK(f.d_codes->get() == codes, "packing a packed matrix changes it");
}

void gpu_nf4_pack() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    reserve_for_loading<bf16>(dev, 320 * 448);
    for (Absmax kind : {NESTED, SINGLE_HARSH}) {
        check_pack<bf16>(dev, 64, 64, kind);
        check_pack<bf16>(dev, 128, 192, kind);
        check_pack<bf16>(dev, 320, 448, kind);
    }
    const int shapes[][2] = {{144, 144}, {64, 80}, {80, 64}, {3, 7}};
    for (const auto& s : shapes) {
        Frozen<bf16> f(dev, s[0], s[1], NESTED, 6);
        nf4_pack<bf16>(dev, f.w);
        CHECK(!f.w.packed && f.d_codes->get() == f.codes && f.d_absmax8->get() == f.absmax8,
              "%d x %d does not fit and is packed", s[0], s[1]);
    }
}

// ----------------------------------------------------------------------------
// a matrix as 16 bit or float

// The whole buffer: weights where the matrix is, the poison elsewhere.
template <class X>
void check_scratch(Gpu<X>& dev, const Matrix& w, const std::vector<double>& weights, size_t ldo, size_t shift,
                   const char* what) {
    const size_t rows = size_t(w.rows), cols = size_t(w.cols);
    GpuBuffer<X, X> out(dev, rows * ldo, shift);
    matrix_to_scratch(dev, dev.stream, out.data(), ldo, w);
    const std::vector<X> got = out.get();
    size_t wrong = 0;
    for (size_t i = 0; i < rows * ldo; i++) {
        X expected;
        memset(&expected, 0xff, sizeof(X));
        if (i % ldo < cols) {
            expected = stored<X>(weights[i / ldo * cols + i % ldo]);
        }
        wrong += !same_bits(&expected, &got[i], 1);
    }
    CHECK(wrong == 0, "%s, %zu x %zu, %zu apart, shift %zu: %zu elements are wrong", what, rows, cols, ldo, shift,
          wrong);
    CHECK_FENCES(out);
}

template <class X>
void check_scratches(Gpu<X>& dev, const Matrix& w, const std::vector<double>& weights, const char* what) {
    const size_t cols = size_t(w.cols);
    check_scratch<X>(dev, w, weights, cols, 0, what);
    check_scratch<X>(dev, w, weights, (cols + 23) / 8 * 8, 0, what);
    check_scratch<X>(dev, w, weights, cols + 3, 0, what);
    check_scratch<X>(dev, w, weights, (cols + 7) / 8 * 8, 1, what);
}

template <class X>
void gpu_nf4_dequantise() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    reserve_for_loading<X>(dev, 320 * 448);
    const int shapes[][2] = {{144, 144}, {20, 144}, {3, 7}, {5, 36}, {320, 448}, {64, 64}, {64, 576}};
    for (const auto& s : shapes) {
        for (Absmax kind : all_kinds) {
            if (s[0] == 320 && kind != NESTED_HARSH) {
                continue;
            }
            Frozen<X> f(dev, s[0], s[1], kind, uint64_t(s[0]));
            const std::vector<double> weights = numbers(f.weights);
            check_scratches<X>(dev, f.w, weights, "flat");
            nf4_pack<X>(dev, f.w);
            if (f.w.packed) {
                check_scratches<X>(dev, f.w, weights, "packed");
            }
        }
    }
}

template <class X>
void gpu_matrix_stores() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    const int shapes[][2] = {{20, 144}, {3, 7}, {64, 64}, {2, 3000}};
    Bits bits{9};
    for (const auto& s : shapes) {
        const size_t n = size_t(s[0]) * size_t(s[1]);
        Matrix w;
        w.rows = s[0];
        w.cols = s[1];
        std::vector<uint16_t> half(n);
        std::vector<float> single(n);
        for (size_t i = 0; i < n; i++) {
            half[i] = uint16_t(bits.next() & 0xbbff);  // finite in both 16-bit formats, subnormals too
            single[i] = float(bits.normal());
        }
        GpuBuffer<uint16_t, X> d_half(dev, half);
        GpuBuffer<float, X> d_single(dev, single);
        std::vector<double> as_bf16, as_half;
        for (uint16_t h : half) {
            as_bf16.push_back(to_float(bf16{h}));
            as_half.push_back(half_to_float(h));
        }
        w.data = d_half.data();
        w.store = Store::BF16;
        check_scratches<X>(dev, w, as_bf16, "bf16");
        w.store = Store::F16;
        check_scratches<X>(dev, w, as_half, "f16");
        w.data = d_single.data();
        w.store = Store::F32;
        check_scratches<X>(dev, w, std::vector<double>(single.begin(), single.end()), "f32");
    }
}

// ----------------------------------------------------------------------------
// products

const Nf4Tile all_tiles[] = {Nf4Tile::T64x16, Nf4Tile::T64x32, Nf4Tile::T64x64, Nf4Tile::T128x128, Nf4Tile::T256x128};

// Matrices one below the other, packed.
struct Stack {
    std::vector<std::unique_ptr<Frozen<bf16>>> parts;
    Nf4Group group = {};

    Stack(Gpu<bf16>& dev, const std::vector<int>& rows, int cols, const std::vector<Absmax>& kinds) {
        group.cols = cols;
        for (size_t i = 0; i < rows.size(); i++) {
            parts.emplace_back(new Frozen<bf16>(dev, rows[i], cols, kinds[i % kinds.size()], 10 * i + size_t(cols)));
            nf4_pack(dev, parts[i]->w);
            group.w[group.parts++] = &parts[i]->w;
            group.rows += rows[i];
        }
    }
    double weight(size_t row, size_t col) const {
        size_t i = 0;
        while (row >= size_t(parts[i]->w.rows)) {
            row -= size_t(parts[i++]->w.rows);
        }
        return parts[i]->weight(row, col);
    }
};

// A product of a group: its operands, and what is behind their rows.
struct Product {
    const Stack& stack;
    bool backward;
    size_t M;
    int R;
    size_t features, contraction, ldx, ldy;
    std::vector<bf16> x, adapter, residual;

    Product(const Stack& s, bool back, size_t tokens, int r, bool add)
        : stack(s),
          backward(back),
          M(tokens),
          R(r),
          features(size_t(back ? s.group.cols : s.group.rows)),
          contraction(size_t(back ? s.group.rows : s.group.cols)),
          ldx(contraction + size_t(r) + 8),
          ldy(features + 16) {
        x = stored_values<bf16>(random_values<double>(M * ldx, 21));
        for (size_t i = 0; i < M * ldx; i++) {
            x[i] = i % ldx < contraction + size_t(R) ? x[i] : bf16{0xffff};
        }
        adapter = stored_values<bf16>(random_values<double>(features * size_t(R), 22, 0.2));
        if (add) {
            residual = stored_values<bf16>(random_values<double>(M * (features + 8), 23));
        }
    }

    // Element k of the contraction as the product sees it.
    double operand(size_t feature, size_t k) const {
        if (k < contraction) {
            return backward ? stack.weight(k, feature) : stack.weight(feature, k);
        }
        const size_t r = k - contraction;
        return to_float(backward ? adapter[r * features + feature] : adapter[feature * size_t(R) + r]);
    }
    double added(size_t m, size_t feature) const {
        return residual.empty() ? 0 : to_float(residual[m * (features + 8) + feature]);
    }

    // y and the gap behind its rows, (M, ldy).
    std::vector<bf16> run(Gpu<bf16>& dev, Nf4Tile tile) const {
        GpuBuffer<bf16, bf16> d_x(dev, x), d_adapter(dev, adapter), d_residual(dev, residual), y(dev, M * ldy);
        const Nf4Group& g = stack.group;
        if (backward) {
            nf4_matmul_backward(dev, y.data(), ldy, d_x.data(), ldx, M, g, d_adapter.data(), R, tile);
        } else {
            nf4_matmul_forward(dev, y.data(), ldy, d_x.data(), ldx, M, g, d_adapter.data(), R,
                               residual.empty() ? nullptr : d_residual.data(), features + 8, tile);
        }
        CHECK_FENCES(y);
        return y.get();
    }

    std::string name(Nf4Tile tile) const {
        char text[160];
        snprintf(text, sizeof(text), "%s, %d parts, %d x %d, M %zu, R %d%s, tile %d", backward ? "backward" : "forward",
                 stack.group.parts, stack.group.rows, stack.group.cols, M, R, residual.empty() ? "" : ", residual",
                 int(tile));
        return text;
    }
};

// For its scope the stand-in runs warps and blocks in another order; a GPU does not care.
struct OtherSchedule {
    const char* before = getenv("SIMT_SEED");
    const std::string kept = before ? before : "";
    OtherSchedule() { setenv("SIMT_SEED", "12345", 1); }
    ~OtherSchedule() { before ? setenv("SIMT_SEED", kept.c_str(), 1) : unsetenv("SIMT_SEED"); }
    OtherSchedule(const OtherSchedule&) = delete;
};

// Every element is the rounding of a number no further from the exact one than fp32 sums may be: n additions of at most
// the sum of magnitudes, each off by 2^-23 (tensor cores may cut off instead of rounding).
void check_product(Gpu<bf16>& dev, const Product& p, Nf4Tile tile) {
    const std::vector<bf16> y = p.run(dev, tile);
    const size_t n = p.contraction + size_t(p.R);
    std::vector<double> w(p.features * n);
    for (size_t i = 0; i < w.size(); i++) {
        w[i] = p.operand(i / n, i % n);
    }
    size_t wrong = 0, outside = 0;
    for (size_t m = 0; m < p.M; m++) {
        for (size_t f = 0; f < p.ldy; f++) {
            const bf16 got = y[m * p.ldy + f];
            if (f >= p.features) {
                outside += got.bits != 0xffff;
                continue;
            }
            double sum = p.added(m, f), size = std::fabs(sum);
            for (size_t k = 0; k < n; k++) {
                const double term = double(to_float(p.x[m * p.ldx + k])) * w[f * n + k];
                sum += term;
                size += std::fabs(term);
            }
            const double e = size * double(n + 1) * 0x1p-23;
            const bool right = to_float(got) >= rounded<bf16>(sum - e) && to_float(got) <= rounded<bf16>(sum + e);
            wrong += !right;
        }
    }
    CHECK(wrong == 0, "%s: %zu of %zu elements are wrong", p.name(tile).c_str(), wrong, p.M * p.features);
    CHECK(outside == 0, "%s: writes between the rows", p.name(tile).c_str());
    const OtherSchedule other;
    const std::vector<bf16> again = p.run(dev, tile);
    CHECK(same_bits(y.data(), again.data(), y.size()), "%s: other bits the second time", p.name(tile).c_str());
}

// Token m is 1 at place m of the contraction: the product is the matrix, or its transpose, bit for bit.
void check_one_hot(Gpu<bf16>& dev, const Stack& stack, bool backward, Nf4Tile tile) {
    Product p(stack, backward, size_t(backward ? stack.group.rows : stack.group.cols), 16, false);
    for (size_t i = 0; i < p.x.size(); i++) {
        p.x[i] = to_bf16(i % p.ldx == i / p.ldx ? 1.0f : 0.0f);
    }
    const std::vector<bf16> y = p.run(dev, tile);
    size_t wrong = 0;
    for (size_t m = 0; m < p.M; m++) {
        for (size_t f = 0; f < p.features; f++) {
            const double expected = p.operand(f, m), got = to_float(y[m * p.ldy + f]);
            wrong += !(got == expected);  // a sum with +0 has lost the sign of a zero
        }
    }
    CHECK(wrong == 0, "%s: %zu weights are wrong", p.name(tile).c_str(), wrong);
}

void with_device(const std::function<void(Gpu<bf16>&)>& body) {
    GpuDevice<bf16> dev;
    if (dev.ok) {
        reserve_for_loading<bf16>(dev, 320 * 448);
        body(dev);
    }
}

void gpu_nf4_matmul_weights() {
    with_device([](Gpu<bf16>& dev) {
        for (Absmax kind : all_kinds) {
            const Stack stack(dev, {192}, 128, {kind});
            check_one_hot(dev, stack, false, Nf4Tile::BY_SHAPE);
            check_one_hot(dev, stack, true, Nf4Tile::BY_SHAPE);
        }
        // parts of other widths than a block, of either kind
        const Stack mixed(dev, {64, 192, 64}, 192, {NESTED_HARSH, SINGLE, NESTED});
        // absmax2 goes by the block's number in the part: more than 256 blocks, 7 a row
        const Stack large(dev, {128, 320}, 448, {NESTED, NESTED_HARSH});
        for (bool backward : {false, true}) {
            for (Nf4Tile tile : all_tiles) {
                check_one_hot(dev, mixed, backward, tile);
            }
            check_one_hot(dev, large, backward, Nf4Tile::T64x64);
            check_one_hot(dev, large, backward, Nf4Tile::T128x128);
        }
    });
}

void gpu_nf4_matmul_shapes() {
    with_device([](Gpu<bf16>& dev) {
        const Stack one(dev, {128}, 192, {NESTED}), two(dev, {64, 128}, 128, {NESTED, SINGLE}),
            three(dev, {128, 64, 64}, 64, {SINGLE, NESTED, NESTED});
        for (bool backward : {false, true}) {
            for (size_t M : {1, 16, 33, 70, 128, 200}) {
                for (int R : {0, 16, 48}) {
                    const Stack& stack = R == 0 ? one : R == 16 ? two : three;
                    check_product(dev, Product(stack, backward, M, R, !backward && M % 2 == 0), Nf4Tile::BY_SHAPE);
                }
            }
        }
    });
}

void gpu_nf4_matmul_tiles() {
    with_device([](Gpu<bf16>& dev) {
        // more slices than stages, the last one of features half empty, more adapter columns than a slice
        const Stack stack(dev, {192, 128}, 448, {NESTED, SINGLE});
        for (bool backward : {false, true}) {
            for (Nf4Tile tile : all_tiles) {
                check_product(dev, Product(stack, backward, 70, 80, !backward), tile);
            }
        }
    });
}

// y may be the residual itself.
void gpu_nf4_matmul_in_place() {
    with_device([](Gpu<bf16>& dev) {
        const Stack stack(dev, {128}, 128, {NESTED});
        for (size_t M : {size_t(20), size_t(70)}) {
            const Product p(stack, false, M, 16, true);
            const std::vector<bf16> expected = p.run(dev, Nf4Tile::BY_SHAPE);
            GpuBuffer<bf16, bf16> x(dev, p.x), adapter(dev, p.adapter), y(dev, p.residual);
            nf4_matmul_forward(dev, y.data(), p.features + 8, x.data(), p.ldx, M, stack.group, adapter.data(), p.R,
                               y.data(), p.features + 8);
            const std::vector<bf16> got = y.get();
            size_t wrong = 0;
            for (size_t i = 0; i < M * p.features; i++) {
                wrong += got[i / p.features * (p.features + 8) + i % p.features].bits !=
                         expected[i / p.features * p.ldy + i % p.features].bits;
            }
            CHECK(wrong == 0, "M %zu: %zu elements differ when the residual is y", M, wrong);
        }
    });
}

// Writing W out and multiplying is the other way to the same product: fp32 sums in order, one rounding.
void gpu_nf4_matmul_two_ways() {
    with_device([](Gpu<bf16>& dev) {
        const Stack stack(dev, {128, 64}, 256, {NESTED, NESTED});
        for (bool backward : {false, true}) {
            const Product p(stack, backward, 70, 16, false);
            const size_t cols = size_t(stack.group.cols);
            GpuBuffer<bf16, bf16> scratch(dev, size_t(stack.group.rows) * cols);
            size_t row = 0;
            for (int i = 0; i < stack.group.parts; i++) {
                matrix_to_scratch(dev, dev.stream, scratch.data() + row * cols, cols, *stack.group.w[i]);
                row += size_t(stack.group.w[i]->rows);
            }
            const std::vector<bf16> w = scratch.get(), y = p.run(dev, Nf4Tile::BY_SHAPE);
            std::vector<double> fused, plain, exact;
            for (size_t m = 0; m < p.M; m++) {
                for (size_t f = 0; f < p.features; f++) {
                    float sum = 0;
                    double sum64 = 0;
                    for (size_t k = 0; k < p.contraction + size_t(p.R); k++) {
                        const float a = to_float(p.x[m * p.ldx + k]);
                        const float b = k >= p.contraction ? float(p.operand(f, k))
                                                           : to_float(w[backward ? k * cols + f : f * cols + k]);
                        sum += a * b;
                        sum64 += double(a) * double(b);
                    }
                    fused.push_back(to_float(y[m * p.ldy + f]));
                    plain.push_back(rounded<bf16>(sum));
                    exact.push_back(sum64);
                }
            }
            CHECK_ERROR(p.name(Nf4Tile::BY_SHAPE) + ": distance of the two ways (rms)", rms_error(fused, plain),
                        2 * rms_error(plain, exact));
            check_yardstick<bf16>(p.name(Nf4Tile::BY_SHAPE), fused, plain, exact);
        }
    });
}

void gpu_nf4_matmul_refusals() {
    with_device([](Gpu<bf16>& dev) {
        const Stack stack(dev, {64, 128}, 64, {NESTED});
        Nf4Group g = stack.group;
        CHECK(nf4_matmul_takes(g, 0) && nf4_matmul_takes(g, 48), "a packed group is refused");
        CHECK(!nf4_matmul_takes(g, 8), "8 adapter columns are taken");
        g.cols = 128;
        CHECK(!nf4_matmul_takes(g, 0), "parts of another width are taken");
        g = stack.group;
        g.rows = 64;
        CHECK(!nf4_matmul_takes(g, 0), "a group of fewer rows than its parts is taken");
        g = stack.group;
        Matrix flat = *g.w[1];
        flat.packed = false;
        g.w[1] = &flat;
        CHECK(!nf4_matmul_takes(g, 0), "a matrix in bitsandbytes' order is taken");
        flat = *stack.group.w[1];
        flat.store = Store::BF16;
        CHECK(!nf4_matmul_takes(g, 0), "a bf16 matrix is taken");
    });
}

}  // namespace

extern const Test gpu_nf4_tests[] = {
    {"gpu_nf4_quantise_bf16", gpu_nf4_quantise<bf16>},
    {"gpu_nf4_quantise_float", gpu_nf4_quantise<float>},
    {"gpu_nf4_pack", gpu_nf4_pack},
    {"gpu_nf4_dequantise_bf16", gpu_nf4_dequantise<bf16>},
    {"gpu_nf4_dequantise_float", gpu_nf4_dequantise<float>},
    {"gpu_matrix_stores_bf16", gpu_matrix_stores<bf16>},
    {"gpu_matrix_stores_float", gpu_matrix_stores<float>},
    {"gpu_nf4_matmul_weights", gpu_nf4_matmul_weights},
    {"gpu_nf4_matmul_shapes", gpu_nf4_matmul_shapes},
    {"gpu_nf4_matmul_tiles", gpu_nf4_matmul_tiles},
    {"gpu_nf4_matmul_in_place", gpu_nf4_matmul_in_place},
    {"gpu_nf4_matmul_two_ways", gpu_nf4_matmul_two_ways},
    {"gpu_nf4_matmul_refusals", gpu_nf4_matmul_refusals},
    {nullptr, nullptr},
};
