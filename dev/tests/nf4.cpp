// NF4: thresholds, byte layout, double quantisation, and the weights that every tier reads, bit for bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "dev/tests/test.h"
#include "kernels/cpu/nf4.h"

namespace {

struct Source {
    uint64_t state;
    uint32_t bits() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state >> 32);
    }
    double uniform() { return (bits() + 0.5) * 0x1p-32; }
    double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(2 * 3.14159265358979323846 * uniform()); }
};

struct Quantised {
    std::vector<uint8_t> codes;
    std::vector<float> absmax;
    int code(size_t i) const { return i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4; }
};

Quantised quantise(const std::vector<float>& w, int threads = 1) {
    Quantised q;
    q.codes.assign((w.size() + 1) / 2, 0xab);
    q.absmax.assign((w.size() + 63) / 64, -1);
    nf4_quantize(q.codes.data(), q.absmax.data(), w.data(), w.size(), threads);
    return q;
}

Matrix flat_matrix(const Quantised& q, size_t n) {
    Matrix m;
    m.store = Store::NF4;
    m.rows = 1;
    m.cols = int(n);
    m.codes = q.codes.data();
    m.absmax32 = q.absmax.data();
    return m;
}

// The decision thresholds of bitsandbytes' CPU back end: the fp32 midpoints between neighbouring codes, computed with
// numpy. A value above one takes the code above.
const float thresholds[15] = {-0.848096371f, -0.610632896f,  -0.45999527f,  -0.33967942f, -0.234607399f,
                              -0.137911737f, -0.0455250181f, 0.0397901498f, 0.120255247f, 0.203521252f,
                              0.292013764f,  0.389312536f,   0.501663446f,  0.64278692f,  0.861478448f};

void nf4_thresholds() {
    std::vector<float> w(64, 0.0f);
    for (int i = 0; i < 15; i++) {
        w[size_t(3 * i)] = std::nextafter(thresholds[i], -2.0f);
        w[size_t(3 * i + 1)] = thresholds[i];
        w[size_t(3 * i + 2)] = std::nextafter(thresholds[i], 2.0f);
    }
    w[45] = -1.0f;
    w[46] = 1.0f;
    Quantised q = quantise(w);
    CHECK(q.absmax[0] == 1.0f, "absmax is %g", double(q.absmax[0]));
    for (int i = 0; i < 15; i++) {
        CHECK(q.code(size_t(3 * i)) == i && q.code(size_t(3 * i + 1)) == i && q.code(size_t(3 * i + 2)) == i + 1,
              "threshold %d: codes %d %d %d", i, q.code(size_t(3 * i)), q.code(size_t(3 * i + 1)),
              q.code(size_t(3 * i + 2)));
    }
    CHECK(q.code(45) == 0 && q.code(46) == 15 && q.code(63) == 7, "codes of -1, 1, 0: %d %d %d", q.code(45), q.code(46),
          q.code(63));
}

void nf4_layout() {
    std::vector<float> w(64 + 3, 0.0f);
    w[0] = -4.0f;                    // code 0, and the block's absmax
    w[1] = 4.0f;                     // 15
    w[3] = 0.7229568362236023f * 4;  // 14
    w[64] = 0.25f;
    w[66] = -0.25f;
    Quantised q = quantise(w);
    CHECK(q.codes[0] == 0x0f, "byte 0 is %02x: the earlier weight belongs in the high nibble", q.codes[0]);
    CHECK(q.codes[1] == 0x7e, "byte 1 is %02x", q.codes[1]);
    CHECK(q.absmax[0] == 4.0f && q.absmax[1] == 0.25f, "absmax %g %g", double(q.absmax[0]), double(q.absmax[1]));
    CHECK(q.codes[32] == 0xf7 && q.codes[33] == 0x07, "the short last block is %02x %02x", q.codes[32], q.codes[33]);

    std::vector<float> zeros(128, 0.0f);
    zeros[100] = -0.0f;
    q = quantise(zeros);
    bool sevens = std::all_of(q.codes.begin(), q.codes.end(), [](uint8_t c) { return c == 0x77; });
    CHECK(sevens && q.absmax[0] == 0 && q.absmax[1] == 0, "a block of zeros is not code 7 with absmax 0");
    float out[128];
    Cpu<float> dev;
    device_open(dev, 1);
    matrix_row(dev, out, flat_matrix(q, 128), 0);
    CHECK(std::all_of(out, out + 128, [](float x) { return x == 0 && !std::signbit(x); }), "zeros do not come back");

    std::vector<float> tiny(64, 0.0f);  // bitsandbytes divides by at least 1e-38: 1e-40 becomes 0.01, which is code 7
    tiny[0] = 1e-40f;
    tiny[1] = -1e-40f;
    q = quantise(tiny);
    CHECK(q.code(0) == 7 && q.code(1) == 7 && q.code(2) == 7 && q.absmax[0] == 1e-40f,
          "subnormal block: codes %d %d %d", q.code(0), q.code(1), q.code(2));
}

// bitsandbytes' own test of quantising N(0, 1), 1024 x 1024, blocks of 64: mean error and mean relative error with the
// seven standard deviations that it allows.
void nf4_normal_anchor() {
    Source source{1};
    const size_t n = 1024 * 1024;
    std::vector<float> w(n), back(n);
    for (float& x : w) {
        x = float(source.normal());
    }
    Quantised q = quantise(w, 2);
    Cpu<float> dev;
    device_open(dev, 1);
    matrix_row(dev, back.data(), flat_matrix(q, n), 0);
    double error = 0, relative = 0;
    for (size_t i = 0; i < n; i++) {
        double d = std::fabs(double(w[i]) - double(back[i]));
        error += d / double(n);
        relative += d / (std::fabs(double(w[i])) + 1e-8) / double(n);
    }
    CHECK_ERROR("mean error", std::fabs(error - 0.072798), 0.000074 * 7);
    CHECK_ERROR("mean relative error", std::fabs(relative - 0.203339), 0.000340 * 7);
    Quantised one = quantise(w, 1);
    CHECK(one.codes == q.codes && one.absmax == q.absmax, "1 and 2 threads quantise differently");
}

void nf4_map() {
    float map[256];
    nf4_map8(map);
    uint64_t hash = 0xcbf29ce484222325;
    for (float x : map) {
        uint8_t bytes[4];
        memcpy(bytes, &x, 4);
        for (uint8_t b : bytes) {
            hash = (hash ^ b) * 0x100000001b3;
        }
    }
    // FNV-1a of the 1024 bytes of bitsandbytes 0.50's create_dynamic_map()
    CHECK(hash == 0xd677f22a96665bc4, "the map differs from bitsandbytes' (hash %016llx)",
          static_cast<unsigned long long>(hash));
    CHECK(map[0] == -0.99296875f && map[127] == 0 && map[254] == 0.99296875f && map[255] == 1, "ends: %g %g %g %g",
          double(map[0]), double(map[127]), double(map[254]), double(map[255]));
}

void nf4_double_quantisation() {
    Source source{2};
    const size_t blocks = 1000;  // four of the second level, the last one short
    std::vector<float> absmax(blocks), absmax2(4, -1.0f);
    double sum = 0;
    for (float& x : absmax) {
        x = float(0.02 + 0.01 * source.uniform());
        sum += x;
    }
    absmax[300] = 0.5f;
    sum = 0;
    for (float x : absmax) {
        sum += x;
    }
    std::vector<uint8_t> absmax8(blocks);
    float offset = 0, map[256];
    nf4_double_quantize(absmax8.data(), absmax2.data(), &offset, absmax.data(), blocks);
    nf4_map8(map);
    CHECK(offset == float(sum / double(blocks)), "offset is not the rounded mean");
    Matrix m;
    m.store = Store::NF4;
    m.absmax8 = absmax8.data();
    m.absmax2 = absmax2.data();
    m.map8 = map;
    m.offset = offset;
    for (size_t i = 0; i < blocks; i++) {
        float greatest = 0;
        for (size_t j = i / 256 * 256; j < std::min(blocks, (i / 256 + 1) * 256); j++) {
            greatest = std::max(greatest, std::fabs(absmax[j] - offset));
        }
        CHECK(absmax2[i / 256] == greatest, "absmax2 of block %zu", i);
        double x = double(absmax[i] - offset) / greatest, nearest = 9;
        for (float entry : map) {
            nearest = std::min(nearest, std::fabs(entry - x));
        }
        // two roundings of a number of at most 1 lie between this x and the one that was looked up
        CHECK_ERROR("distance to the nearest entry", std::fabs(map[absmax8[i]] - x), nearest + 1.3e-7);
        volatile float product = map[absmax8[i]] * greatest;
        CHECK(nf4_absmax(m, i) == product + offset, "block %zu is not restored as code * absmax2 + offset", i);
    }
    // equal absmax: nothing is left above the offset
    std::vector<float> equal(70, 0.125f);
    nf4_double_quantize(absmax8.data(), absmax2.data(), &offset, equal.data(), equal.size());
    CHECK(offset == 0.125f && absmax2[0] == 0 && map[absmax8[0]] == 0, "equal absmax: offset %g, absmax2 %g, code %d",
          double(offset), double(absmax2[0]), absmax8[0]);
}

// Runs of every length and alignment against the rule, weight by weight, in every tier and in double.
void nf4_runs_bitwise() {
    Source source{3};
    const size_t n = 1600;
    std::vector<uint8_t> codes(n / 2), absmax8(n / 64);
    std::vector<float> absmax(n / 64), absmax2(1), map(256), expected(n);
    std::vector<uint16_t> half(n);
    for (uint8_t& c : codes) {
        c = uint8_t(source.bits());
    }
    for (size_t b = 0; b < n / 64; b++) {
        absmax[b] = float(source.normal());
        absmax8[b] = uint8_t(source.bits());
    }
    absmax2[0] = 0.37f;
    nf4_map8(map.data());
    for (const char* tier : {"ref", "avx2", "avx512"}) {
        Cpu<float> dev;
        Cpu<double> dev64;
        device_open(dev, 1);
        dev.isa = dev64.isa = cpu_isa_choose(tier);
        if (!dev.isa) {
            continue;
        }
        for (int kind = 0; kind < 4; kind++) {
            Matrix m;
            m.rows = 1;
            m.cols = int(n);
            m.data = half.data();
            m.store = kind < 2 ? Store::NF4 : kind == 2 ? Store::BF16 : Store::F16;
            m.codes = codes.data();
            m.absmax32 = kind == 0 ? absmax.data() : nullptr;
            m.absmax8 = absmax8.data();
            m.absmax2 = absmax2.data();
            m.map8 = map.data();
            m.offset = 0.21f;
            for (size_t i = 0; i < n; i++) {
                uint8_t code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
                half[i] = uint16_t(source.bits() & 0xbbff);  // finite in both formats, subnormals too
                expected[i] = kind == 2   ? to_float(bf16{half[i]})
                              : kind == 3 ? half_to_float(half[i])
                                          : to_float(to_bf16(NF4_CODE[code] * nf4_absmax(m, i / 64)));
            }
            for (size_t first : {size_t(0), size_t(1), size_t(2), size_t(31), size_t(63), size_t(64), size_t(77)}) {
                for (size_t length : {size_t(0), size_t(1), size_t(2), size_t(7), size_t(16), size_t(33), size_t(64),
                                      size_t(65), size_t(128), size_t(512), size_t(1500)}) {
                    std::vector<float> out(length + 1, 99.0f);
                    std::vector<double> wide(length + 1, 99.0);
                    matrix_run(dev, out.data(), m, first, length);
                    matrix_run(dev64, wide.data(), m, first, length);
                    CHECK(memcmp(out.data(), expected.data() + first, length * sizeof(float)) == 0 &&
                              std::equal(wide.begin(), wide.end() - 1, expected.begin() + long(first)) &&
                              out[length] == 99.0f && wide[length] == 99.0,
                          "%s, store %d: run of %zu from %zu", tier, kind, length, first);
                }
            }
        }
    }
}

}  // namespace

extern const Test nf4_tests[] = {
    {"nf4_thresholds", nf4_thresholds},
    {"nf4_layout", nf4_layout},
    {"nf4_normal_anchor", nf4_normal_anchor},
    {"nf4_map", nf4_map},
    {"nf4_double_quantisation", nf4_double_quantisation},
    {"nf4_runs_bitwise", nf4_runs_bitwise},
    {nullptr, nullptr},
};
