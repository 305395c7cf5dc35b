// The formats of products (kernels/cpu/format.h) of every tier, each by itself: packing and multiplying against sums in
// double with the bound of the format's rounding, the packers of frozen weights against the packers of floats, and what
// may not move a bit. Inputs end at a page that nobody may read, outputs stand between fences.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "dev/tests/ops.h"
#include "dev/tests/test.h"
#include "kernels/bf16.h"
#include "kernels/cpu/format.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/nf4.h"

namespace {

using Format = GemmFormat<float>;
using Bytes = Guarded<unsigned char>;
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN(),
                INFINITE = std::numeric_limits<float>::infinity();

// fn(format, "tier format:") once for each format of this machine.
template <class Fn>
void for_each_format(const Fn& fn) {
    std::vector<const Format*> seen;
    for (const char* tier : {"ref", "avx2", "avx512", "avx512vnni", "amx"}) {
        const CpuIsa* isa = cpu_isa_choose(tier);
        if (!isa) {
            continue;
        }
        for (const Format* f : {isa->fp32, isa->int16, isa->bf16}) {
            if (f && std::find(seen.begin(), seen.end(), f) == seen.end()) {
                seen.push_back(f);
                fn(*f, std::string(tier) + " " + f->name + ":");
            }
        }
    }
}

bool is(const Format& f, const char* name) {
    return std::string(f.name) == name;
}

// ---- operands ----

// Lines of elements, ld apart, what is between them NaN. They end where a page begins that cannot be read.
template <class T>
struct Walled {
    char* map;
    size_t map_bytes, ld;
    T* data;

    Walled(const T* values, size_t lines, size_t length, size_t gap) : ld(length + gap) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = ((lines - 1) * ld + length) * sizeof(T);
        map_bytes = (bytes + page - 1) / page * page + page;
        void* p = mmap(nullptr, map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED || mprotect(static_cast<char*>(p) + map_bytes - page, page, PROT_NONE) != 0) {
            test_fail(__FILE__, __LINE__, "no memory for a wall of %zu bytes", map_bytes);
            std::abort();
        }
        map = static_cast<char*>(p);
        char* begin = map + map_bytes - page - bytes;
        memset(begin, 0xff, bytes);
        data = reinterpret_cast<T*>(begin);
        for (size_t i = 0; i < lines; i++) {
            memcpy(data + i * ld, values + i * length, length * sizeof(T));
        }
    }
    ~Walled() { munmap(map, map_bytes); }
    Walled(const Walled&) = delete;
};

template <class T>
std::vector<T> transposed(const T* x, size_t lines, size_t k) {
    std::vector<T> y(lines * k);
    for (size_t i = 0; i < lines; i++) {
        for (size_t p = 0; p < k; p++) {
            y[p * lines + i] = x[i * k + p];
        }
    }
    return y;
}

// Packs the lines x (n, k), from memory where they are lines, or columns.
enum Way { LINES, COLUMNS };

void pack_strip(const Format& f, void* out, const float* x, size_t n, size_t k, Way way) {
    if (way == LINES) {
        Walled<float> in(x, n, k, 3);
        f.pack_a_lines(out, in.data, in.ld, int(n), k);
    } else {
        Walled<float> in(transposed(x, n, k).data(), k, n, 3);
        f.pack_a_columns(out, in.data, in.ld, int(n), k);
    }
}

void pack_panels(const Format& f, unsigned char* out, const float* x, size_t n, size_t k, Way way) {
    const size_t nr = size_t(f.NR);
    for (size_t j = 0; j < n; j += nr, out += panel_bytes(f, k)) {
        const size_t count = std::min(nr, n - j);
        if (way == LINES) {
            Walled<float> in(x + j * k, count, k, 5);
            f.pack_b_lines(out, in.data, in.ld, int(count), k);
        } else {
            Walled<float> in(transposed(x + j * k, count, k).data(), k, count, 5);
            f.pack_b_columns(out, in.data, in.ld, int(count), k);
        }
    }
}

size_t panels_bytes(const Format& f, size_t n, size_t k) {
    return (n + size_t(f.NR) - 1) / size_t(f.NR) * panel_bytes(f, k);
}

// One strip times its panels; c (mr, nc), added to when it is not empty, in memory with gaps that must stay as they
// are.
void multiply(std::vector<float>& c, const Format& f, const void* strip, const void* panels, size_t k, size_t mr,
              size_t nc) {
    const bool add = !c.empty();
    const size_t ldc = nc + 7;
    Guarded<float> out(mr * ldc, nc % 16);
    for (size_t i = 0; add && i < mr; i++) {
        std::copy_n(&c[i * nc], nc, &out[i * ldc]);
    }
    f.multiply(k, strip, panels, out.data(), ldc, int(mr), nc, add);
    CHECK_FENCES(out);
    c.resize(mr * nc);
    static const std::vector<unsigned char> untouched(7 * sizeof(float), 0xff);
    for (size_t i = 0; i < mr; i++) {
        std::copy_n(&out[i * ldc], nc, &c[i * nc]);
        CHECK(memcmp(&out[i * ldc + nc], untouched.data(), untouched.size()) == 0, "row %zu of %zu: written behind %zu",
              i, mr, nc);
    }
}

// a (mr, k) times b (nc, k), both lines.
std::vector<float> product(const Format& f, const std::vector<float>& a, const std::vector<float>& b, size_t mr,
                           size_t nc, size_t k, Way way = LINES) {
    Bytes strip(strip_bytes(f, k)), panels(panels_bytes(f, nc, k));
    pack_strip(f, strip.data(), a.data(), mr, k, way);
    pack_panels(f, panels.data(), b.data(), nc, k, way);
    CHECK_FENCES(strip);
    CHECK_FENCES(panels);
    std::vector<float> c;
    multiply(c, f, strip.data(), panels.data(), k, mr, nc);
    return c;
}

// ---- bounds ----

// What packing may move an element by.
//   fp32   nothing
//   bf16   8 significant bits: 2^-8 of it; a number below the normal ones may become 0
//   int16  half a step of its block, whose greatest is 16383 steps in A and 2047 in B, a step being 2^-126 at least.
//   Four
//          roundings to float, two of the step, of its inverse and of the quotient, add 4 * 16383 * 2^-24 = 0.004
//          steps.
double rounding(const Format& f, bool left, double x, double block_greatest) {
    const double smallest = std::numeric_limits<float>::min();
    if (is(f, "fp32")) {
        return 0;
    }
    if (is(f, "bf16")) {
        return std::fabs(x) * 0x1p-8 + smallest;
    }
    const double power = block_greatest > 0 ? std::exp2(std::floor(std::log2(block_greatest))) : 0;
    return left ? 0.502 * std::max(block_greatest / 8191, smallest) : 0.5 * std::max(power / 2048, smallest);
}

// Of lines of k elements, each in blocks of a unit.
std::vector<double> roundings(const Format& f, bool left, const std::vector<float>& x, size_t lines, size_t k) {
    std::vector<double> r(lines * k);
    for (size_t i = 0; i < lines; i++) {
        for (size_t p = 0; p < k; p++) {
            double top = 0;
            for (size_t q = p / f.unit * f.unit; q < std::min(k, (p / f.unit + 1) * f.unit); q++) {
                top = std::max(top, double(std::fabs(x[i * k + q])));
            }
            r[i * k + p] = rounding(f, left, x[i * k + p], top);
        }
    }
    return r;
}

// The product in double and how far the format's may be from it: the operands' roundings, then k additions and a few
// scalings in float, each 2^-24 of at most the sum of magnitudes, and what falls below the normal numbers.
struct Expected {
    size_t columns;
    std::vector<double> value, bound;
};

Expected expected(const std::vector<float>& a, const std::vector<double>& ra, const std::vector<float>& b,
                  const std::vector<double>& rb, size_t mr, size_t nc, size_t k) {
    Expected e = {nc, std::vector<double>(mr * nc), std::vector<double>(mr * nc)};
    for (size_t i = 0; i < mr; i++) {
        for (size_t j = 0; j < nc; j++) {
            double sum = 0, magnitudes = 0, moved = 0;
            for (size_t p = 0; p < k; p++) {
                const double x = a[i * k + p], y = b[j * k + p], rx = ra[i * k + p], ry = rb[j * k + p];
                sum += x * y;
                magnitudes += (std::fabs(x) + rx) * (std::fabs(y) + ry);
                moved += std::fabs(x) * ry + std::fabs(y) * rx + rx * ry;
            }
            e.value[i * nc + j] = sum;
            e.bound[i * nc + j] = moved + double(k + 4) * (0x1p-24 * magnitudes + 0x1p-126);
        }
    }
    return e;
}

Expected expected(const Format& f, const std::vector<float>& a, const std::vector<float>& b, size_t mr, size_t nc,
                  size_t k) {
    return expected(a, roundings(f, true, a, mr, k), b, roundings(f, false, b, nc, k), mr, nc, k);
}

// c (mr, nc) against the upper left corner; one message for the first element that is off.
void check_product(const std::string& what, const std::vector<float>& c, const Expected& e, size_t mr, size_t nc,
                   size_t k) {
    for (size_t i = 0; i < mr; i++) {
        for (size_t j = 0; j < nc; j++) {
            const double err = std::fabs(double(c[i * nc + j]) - e.value[i * e.columns + j]);
            if (!(err <= e.bound[i * e.columns + j])) {
                CHECK(false, "%s (%zu, %zu), k %zu: element %zu, %zu is %g, not %g: error %.3e, bound %.3e",
                      what.c_str(), mr, nc, k, i, j, double(c[i * nc + j]), e.value[i * e.columns + j], err,
                      e.bound[i * e.columns + j]);
                return;
            }
        }
    }
}

// ---- products ----

const std::vector<size_t>& lengths() {
    static const std::vector<size_t> list = {1, 16, 63, 64, 65, 200, 512};
    return list;
}

void format_shape() {
    for_each_format([](const Format& f, const std::string& who) {
        CHECK(f.KC % f.unit == 0 && f.NC % size_t(f.NR) == 0, "%s KC %zu, NC %zu", who.c_str(), f.KC, f.NC);
        CHECK(64 % f.NR == 0 || f.NR % 64 == 0, "%s NR %d does not fit NF4's blocks of 64 columns", who.c_str(), f.NR);
        float sink = NOT_A_NUMBER;
        const size_t one = f.peak_loop(1, &sink);
        CHECK(one > 0 && f.peak_loop(100, &sink) == 100 * one && std::isfinite(sink), "%s peak", who.c_str());
    });
}

void format_products() {
    for_each_format([](const Format& f, const std::string& who) {
        const size_t MR = size_t(f.MR), NR = size_t(f.NR);
        for (size_t k : lengths()) {
            const auto a = random_values<float>(MR * k, 1, 2), b = random_values<float>(3 * NR * k, 2);
            const Expected e = expected(f, a, b, MR, 3 * NR, k);
            const std::vector<float> whole = product(f, a, b, MR, 3 * NR, k);
            Bytes strips[] = {Bytes(strip_bytes(f, k)), Bytes(strip_bytes(f, k))};
            Bytes panels[] = {Bytes(panels_bytes(f, NR - 1, k)), Bytes(panels_bytes(f, NR - 1, k))};
            for (Way way : {LINES, COLUMNS}) {
                pack_strip(f, strips[way].data(), a.data(), MR, k, way);
                pack_panels(f, panels[way].data(), b.data(), NR - 1, k, way);
            }
            CHECK(same_bits(strips[0].data(), strips[1].data(), strips[0].n) &&
                      same_bits(panels[0].data(), panels[1].data(), panels[0].n),
                  "%s k %zu: other bits from columns than from lines", who.c_str(), k);
            for (size_t mr = 1; mr <= MR; mr++) {
                for (size_t nc : {size_t(1), size_t(17), NR, NR + 5, 3 * NR}) {
                    const auto c = product(f, a, b, mr, nc, k);
                    check_product(who, c, e, mr, nc, k);
                    for (size_t i = 0; i < mr; i++) {
                        CHECK(same_bits(&c[i * nc], &whole[i * 3 * NR], nc),
                              "%s (%zu, %zu), k %zu: other bits in row %zu", who.c_str(), mr, nc, k, i);
                    }
                }
            }
        }
    });
}

// An element is the same wherever it stands: rows in reverse, columns moved by 5 and by a panel.
void format_place() {
    for_each_format([](const Format& f, const std::string& who) {
        const size_t MR = size_t(f.MR), NR = size_t(f.NR), N = 3 * NR, k = 200;
        auto a = random_values<float>(MR * k, 3), b = random_values<float>(N * k, 4);
        const auto c = product(f, a, b, MR, N, k);
        for (size_t shift : {size_t(5), NR}) {
            std::vector<float> a2(a.size()), b2(b.size());
            for (size_t i = 0; i < MR; i++) {
                std::copy_n(&a[i * k], k, &a2[(MR - 1 - i) * k]);
            }
            for (size_t j = 0; j < N; j++) {
                std::copy_n(&b[j * k], k, &b2[(j + shift) % N * k]);
            }
            const auto moved = product(f, a2, b2, MR, N, k);
            bool same = true;
            for (size_t i = 0; i < MR; i++) {
                for (size_t j = 0; j < N; j++) {
                    same &= same_bits(&c[i * N + j], &moved[(MR - 1 - i) * N + (j + shift) % N], 1);
                }
            }
            CHECK(same, "%s columns moved by %zu: other bits", who.c_str(), shift);
        }
    });
}

// Packing that stops at a unit and goes on is the same packing; what is there is added to.
void format_parts() {
    for_each_format([](const Format& f, const std::string& who) {
        const size_t MR = size_t(f.MR), n = size_t(f.NR) - 3, k = 3 * f.unit + 1, cut = 2 * f.unit;
        const auto a = random_values<float>(MR * k, 5), b = random_values<float>(n * k, 6);
        for (Way way : {LINES, COLUMNS}) {
            Bytes strip(strip_bytes(f, k)), panel(panel_bytes(f, k)), strip2(strip_bytes(f, k)),
                panel2(panel_bytes(f, k));
            pack_strip(f, strip.data(), a.data(), MR, k, way);
            pack_panels(f, panel.data(), b.data(), n, k, way);
            for (size_t begin : {size_t(0), cut}) {
                const size_t part = begin == 0 ? cut : k - cut;
                std::vector<float> a2, b2;
                for (size_t i = 0; i < MR; i++) {
                    a2.insert(a2.end(), &a[i * k] + begin, &a[i * k] + begin + part);
                }
                for (size_t j = 0; j < n; j++) {
                    b2.insert(b2.end(), &b[j * k] + begin, &b[j * k] + begin + part);
                }
                pack_strip(f, strip2.data() + begin / f.unit * f.a_unit, a2.data(), MR, part, way);
                pack_panels(f, panel2.data() + begin / f.unit * f.b_unit, b2.data(), n, part, way);
            }
            CHECK(same_bits(strip.data(), strip2.data(), strip.n), "%s strip in two parts", who.c_str());
            CHECK(same_bits(panel.data(), panel2.data(), panel.n), "%s panel in two parts", who.c_str());

            Expected e = expected(f, a, b, MR, n, k);
            std::vector<float> c = random_values<float>(MR * n, 7);
            for (size_t i = 0; i < c.size(); i++) {
                e.value[i] += c[i];
                e.bound[i] += 0x1p-24 * (std::fabs(c[i]) + std::fabs(e.value[i]));
            }
            multiply(c, f, strip.data(), panel.data(), k, MR, n);
            check_product(who + " added", c, e, MR, n, k);
        }
    });
}

// ---- what is special in values ----

void format_zeros() {
    for_each_format([](const Format& f, const std::string& who) {
        const size_t MR = size_t(f.MR), N = size_t(f.NR) + 1, k = 3 * f.unit;
        auto a = random_values<float>(MR * k, 8), b = random_values<float>(N * k, 9);
        const std::vector<float> no_a(MR * k, 0.0f), no_b(N * k, 0.0f);
        for (const auto& c :
             {product(f, no_a, b, MR, N, k), product(f, a, no_b, MR, N, k), product(f, no_a, no_b, MR, N, k)}) {
            CHECK(greatest(c.data(), c.size()) == 0, "%s the product of zeros is %g", who.c_str(),
                  greatest(c.data(), c.size()));
        }
        // Blocks of zeros between others.
        std::fill_n(&a[f.unit], f.unit, 0.0f);
        std::fill_n(&b[k + f.unit], 2 * f.unit, 0.0f);
        check_product(who + " zero blocks", product(f, a, b, MR, N, k), expected(f, a, b, MR, N, k), MR, N, k);
    });
}

// An infinity or a NaN reaches every sum that it is part of, against zeros too, and no other.
void format_not_finite() {
    for_each_format([](const Format& f, const std::string& who) {
        const size_t MR = size_t(f.MR), N = size_t(f.NR) + 1, k = 2 * f.unit + 3;
        auto a = random_values<float>(MR * k, 10), b = random_values<float>(N * k, 11);
        std::fill_n(&b[2 * k], k, 0.0f);  // a column of zeros
        std::fill_n(&a[0], k, 0.0f);      // a row of zeros
        const auto clean = product(f, a, b, MR, N, k);
        const size_t row = MR / 2, column = N - 2;
        for (float bad : {NOT_A_NUMBER, -NOT_A_NUMBER, INFINITE, -INFINITE}) {
            for (size_t place : {size_t(0), f.unit + 1, k - 1}) {
                for (Way way : {LINES, COLUMNS}) {
                    auto a2 = a, b2 = b;
                    a2[row * k + place] = bad;
                    b2[column * k + place] = bad;
                    const auto from_a = product(f, a2, b, MR, N, k, way);
                    const auto from_b = product(f, a, b2, MR, N, k, way);
                    size_t wrong = 0;
                    for (size_t i = 0; i < MR; i++) {
                        for (size_t j = 0; j < N; j++) {
                            const size_t at = i * N + j;
                            wrong += i == row ? std::isfinite(from_a[at]) : !same_bits(&from_a[at], &clean[at], 1);
                            wrong += j == column ? std::isfinite(from_b[at]) : !same_bits(&from_b[at], &clean[at], 1);
                        }
                    }
                    CHECK(wrong == 0, "%s %g at %zu: %zu elements wrong", who.c_str(), double(bad), place, wrong);
                }
            }
        }
    });
}

void format_extremes() {
    for_each_format([](const Format& f, const std::string& who) {
        const size_t MR = size_t(f.MR), N = size_t(f.NR), k = 2 * f.unit + 5;
        const double sizes[][2] = {{1e-30, 1e30},  {1e30, 1e-30}, {1e-30, 1},    {1, 1e-30},     {1e-20, 1e-12},
                                   {1e-12, 1e-20}, {1e-39, 1},    {1, 1e-39},    {1e-39, 1e-39}, {3e38, 1e-3},
                                   {1e-3, 1e32},   {1e-44, 1e30}, {1e30, 1e-44}, {1e-6, 2e-37},  {2e-36, 1e-2}};
        for (const auto& size : sizes) {
            const auto a = random_values<float>(MR * k, 12, size[0]), b = random_values<float>(N * k, 13, size[1]);
            check_product(who + " extremes", product(f, a, b, MR, N, k), expected(f, a, b, MR, N, k), MR, N, k);
        }
        // Every product as large as it can be, of one sign: sums of integers must not overflow.
        for (float sign : {1.0f, -1.0f}) {
            const std::vector<float> a(MR * k, 3), b(N * k, 0.7f * sign);
            check_product(who + " equal", product(f, a, b, MR, N, k), expected(f, a, b, MR, N, k), MR, N, k);
        }
    });
}

// int16: whole steps are exact. A block of A has 8191 as its greatest, one of B a number from 2048 on: the steps are 1,
// or the power of two that all are multiplied by. What is left is the rounding of a block's sum, of A's step and of the
// sum of the blocks, four of 2^-24. With 2^-75 the product of two steps is below the least float.
void format_whole_steps() {
    for_each_format([](const Format& f, const std::string& who) {
        if (!is(f, "int16")) {
            return;
        }
        const size_t MR = size_t(f.MR), N = size_t(f.NR) + 1, k = 2 * f.unit + 40;
        const auto whole = [&](size_t lines, uint64_t seed, float most, float greatest) {
            std::vector<float> x = random_values<float>(lines * k, seed, most);
            for (size_t i = 0; i < lines; i++) {
                for (size_t p = 0; p < k; p++) {
                    x[i * k + p] = std::round(x[i * k + p]);
                }
                for (size_t p = 0; p < k; p += f.unit) {  // at every place of a block once
                    const size_t place = p + (7 * i + p / f.unit) % std::min(f.unit, k - p);
                    x[i * k + place] = i % 2 == 0 ? greatest : -greatest;
                }
            }
            return x;
        };
        const auto a = whole(MR, 14, 2000, 8191), b = whole(N, 15, 300, 3001);
        for (double size : {1.0, 0x1p-75, 0x1p40}) {
            std::vector<float> a2(a), b2(b);
            std::for_each(a2.begin(), a2.end(), [&](float& x) { x = float(x * size); });
            std::for_each(b2.begin(), b2.end(), [&](float& x) { x = float(x * size); });
            Expected e = expected(a, std::vector<double>(a.size()), b, std::vector<double>(b.size()), MR, N, k);
            for (size_t i = 0; i < MR; i++) {
                for (size_t j = 0; j < N; j++) {
                    double sums = 0;
                    for (size_t p0 = 0; p0 < k; p0 += f.unit) {
                        double sum = 0;
                        for (size_t p = p0; p < std::min(k, p0 + f.unit); p++) {
                            sum += double(a[i * k + p]) * b[j * k + p];
                        }
                        sums += std::fabs(sum);
                    }
                    e.value[i * N + j] *= size * size;
                    e.bound[i * N + j] = 4 * 0x1p-24 * sums * size * size + 0x1p-148;
                }
            }
            for (Way way : {LINES, COLUMNS}) {
                check_product(who + " whole steps", product(f, a2, b2, MR, N, k, way), e, MR, N, k);
            }
        }
        // The greatest sum that there is: B is rounded up to the next power of two, by less than half a step of 4096.
        const std::vector<float> most(MR * k, 8191), next(N * k, 0x1.fffffep+11f);
        Expected e = expected(most, std::vector<double>(most.size()), next, std::vector<double>(next.size()), MR, N, k);
        for (double& bound : e.bound) {
            bound = 0x1p-13 * e.value[0];
        }
        check_product(who + " greatest", product(f, most, next, MR, N, k), e, MR, N, k);
    });
}

// ---- frozen weights ----

// lines (n, k) of NF4, each beginning at a block, with their meaning as the matmul sees it.
struct Nf4 {
    size_t n, k, blocks;
    std::vector<uint8_t> codes;  // (n, (k + 1) / 2)
    std::vector<float> absmax, value;

    // extreme: the first weight of a block is -1 or 1 times its absmax, as one always is when weights are quantised.
    Nf4(size_t lines, size_t length, uint64_t seed, bool extreme) : n(lines), k(length), blocks((length + 63) / 64) {
        const size_t bytes = (k + 1) / 2;
        const auto draws = random_values<float>(n * bytes * 2, seed, 8),
                   sizes = random_values<float>(n * blocks, seed + 1);
        codes.resize(n * bytes);
        value.resize(n * k);
        absmax.resize(n * blocks);
        for (size_t i = 0; i < absmax.size(); i++) {
            absmax[i] = i % 7 == 3 ? 0 : 0.01f + 0.1f * std::fabs(sizes[i]);
        }
        for (size_t i = 0; i < n; i++) {
            for (size_t p = 0; p < 2 * bytes; p++) {
                unsigned code = unsigned(std::min(15.0f, draws[i * bytes * 2 + p] + 8));
                code = extreme && p % 64 == 0 ? code % 2 * 15 : code;
                codes[i * bytes + p / 2] = uint8_t(codes[i * bytes + p / 2] | (p % 2 == 0 ? code << 4 : code));
                if (p < k) {
                    value[i * k + p] = to_float(to_bf16(NF4_CODE[code] * absmax[i * blocks + p / 64]));
                }
            }
        }
    }
    float top(size_t line, size_t p) const { return to_float(to_bf16(absmax[line * blocks + p / 64])); }
};

void pack_nf4(const Format& f, unsigned char* out, const Nf4& w, Way way) {
    Walled<uint8_t> codes(w.codes.data(), w.n, w.codes.size() / w.n, 11);
    Walled<float> absmax(w.absmax.data(), w.n, w.blocks, 3);
    if (way == LINES) {
        f.pack_b_nf4_lines(out, codes.data, codes.ld, absmax.data, absmax.ld, int(w.n), w.k);
    } else {
        f.pack_b_nf4_columns(out, codes.data, codes.ld, absmax.data, absmax.ld, w.k, w.n);
    }
}

void format_nf4_lines() {
    for_each_format([](const Format& f, const std::string& who) {
        if (!f.pack_b_nf4_lines) {
            return;
        }
        const size_t MR = size_t(f.MR), NR = size_t(f.NR);
        for (size_t k : {64, 128, 448}) {
            for (size_t n : {size_t(1), size_t(3), NR - 1, NR}) {
                for (bool extreme : {true, false}) {
                    const Nf4 w(n, k, 20 + k, extreme);
                    Bytes panel(panel_bytes(f, k)), floats(panel_bytes(f, k)), strip(strip_bytes(f, k));
                    pack_nf4(f, panel.data(), w, LINES);
                    CHECK_FENCES(panel);
                    pack_panels(f, floats.data(), w.value.data(), n, k, LINES);
                    // A block without the greatest weight has a finer scale as floats.
                    CHECK(same_bits(panel.data(), floats.data(), panel.n) || (!extreme && is(f, "int16")),
                          "%s %zu lines of %zu: not the panel of their floats", who.c_str(), n, k);
                    std::vector<double> r(n * k);
                    for (size_t i = 0; i < r.size(); i++) {
                        r[i] = rounding(f, false, w.value[i], w.top(i / k, i % k));
                    }
                    const auto a = random_values<float>(MR * k, 21);
                    pack_strip(f, strip.data(), a.data(), MR, k, LINES);
                    std::vector<float> c;
                    multiply(c, f, strip.data(), panel.data(), k, MR, n);
                    check_product(who + " NF4 lines", c,
                                  expected(a, roundings(f, true, a, MR, k), w.value, r, MR, n, k), MR, n, k);
                }
            }
        }
    });
}

// The reduction runs over the lines. In int16, 64 lines by 64 columns share a scale: that of the greatest absmax.
void format_nf4_columns() {
    for_each_format([](const Format& f, const std::string& who) {
        if (!f.pack_b_nf4_columns) {
            return;
        }
        const size_t MR = size_t(f.MR), NR = size_t(f.NR), wide = std::max<size_t>(NR, 64);
        for (size_t k : {1, 31, 64, 65, 127, 200}) {
            for (size_t n : {wide, 3 * wide}) {
                const Nf4 w(k, n, 30 + k, true);
                Bytes panels(panels_bytes(f, n, k)), floats(panels_bytes(f, n, k)), strip(strip_bytes(f, k));
                pack_nf4(f, panels.data(), w, COLUMNS);
                CHECK_FENCES(panels);
                const auto b = transposed(w.value.data(), k, n);
                pack_panels(f, floats.data(), b.data(), n, k, COLUMNS);
                CHECK(same_bits(panels.data(), floats.data(), panels.n) || is(f, "int16"),
                      "%s %zu lines of %zu: not the panels of their floats", who.c_str(), k, n);
                std::vector<double> r(n * k);
                for (size_t j = 0; j < n; j++) {
                    for (size_t p = 0; p < k; p++) {
                        float top = 0;
                        for (size_t q = p / 64 * 64; q < std::min(k, p / 64 * 64 + 64); q++) {
                            top = std::max(top, w.top(q, j));
                        }
                        r[j * k + p] = rounding(f, false, b[j * k + p], top);
                    }
                }
                const auto a = random_values<float>(MR * k, 31);
                pack_strip(f, strip.data(), a.data(), MR, k, LINES);
                for (size_t nc : {n, n - 5}) {
                    std::vector<float> c;
                    multiply(c, f, strip.data(), panels.data(), k, MR, nc);
                    std::vector<double> rn(r.begin(), r.begin() + std::ptrdiff_t(nc * k));
                    check_product(who + " NF4 columns", c, expected(a, roundings(f, true, a, MR, k), b, rn, MR, nc, k),
                                  MR, nc, k);
                }
            }
        }
    });
}

std::vector<bf16> rounded(const std::vector<float>& x) {
    std::vector<bf16> y;
    for (float v : x) {
        y.push_back(to_bf16(v));
    }
    return y;
}

// From bf16 as from the same values as floats.
void format_bf16_packers() {
    using PackBf16 = void (*)(void*, const bf16*, size_t, int, size_t);
    for_each_format([](const Format& f, const std::string& who) {
        for (size_t k : lengths()) {
            for (size_t n : {size_t(1), size_t(f.MR), size_t(f.NR) - 1, size_t(f.NR)}) {
                auto values = random_values<float>(n * k, 40 + n, 3);
                values[n * k / 2] = INFINITE;
                values[0] = NOT_A_NUMBER;
                const auto x = rounded(values), y = transposed(x.data(), n, k);
                for (size_t i = 0; i < values.size(); i++) {
                    values[i] = to_float(x[i]);
                }
                const auto check = [&](const char* what, PackBf16 pack, bool a, Way way) {
                    if (!pack || (a && n > size_t(f.MR))) {
                        return;
                    }
                    const size_t bytes = a ? strip_bytes(f, k) : panel_bytes(f, k);
                    Bytes packed(bytes), floats(bytes);
                    Walled<bf16> in(way == LINES ? x.data() : y.data(), way == LINES ? n : k, way == LINES ? k : n, 5);
                    pack(packed.data(), in.data, in.ld, int(n), k);
                    CHECK_FENCES(packed);
                    if (a) {
                        pack_strip(f, floats.data(), values.data(), n, k, way);
                    } else {
                        pack_panels(f, floats.data(), values.data(), n, k, way);
                    }
                    CHECK(same_bits(packed.data(), floats.data(), bytes), "%s %s of %zu by %zu", who.c_str(), what, n,
                          k);
                };
                check("A lines", f.pack_a_bf16_lines, true, LINES);
                check("B lines", f.pack_b_bf16_lines, false, LINES);
                check("B columns", f.pack_b_bf16_columns, false, COLUMNS);
            }
        }
    });
}

// ---- accuracy ----

// Normal by the central limit: the sum of 12 uniform numbers, less 6.
std::vector<float> normal_values(size_t n, uint64_t seed, double size) {
    const auto u = random_values<float>(12 * n, seed, 0.5 * size);
    std::vector<float> x(n);
    for (size_t i = 0; i < 12 * n; i++) {
        x[i / 12] += u[i];
    }
    return x;
}

// Root mean square of the error relative to that of the product, activations against frozen weights, which are bf16
// already. int16 stays under half the error of activations that are rounded to bf16 as well, and under 1e-3; bf16 has
// that error and no more; fp32 has that of its sums.
void format_accuracy() {
    constexpr size_t K = 512, N = 64;
    const auto w = normal_values(N * K, 50, 0.02), w_back = normal_values(K * N, 51, 0.02);
    for_each_format([&](const Format& f, const std::string& who) {
        const size_t MR = size_t(f.MR);
        for (Way way : {LINES, COLUMNS}) {
            if (way == LINES ? !f.pack_b_nf4_lines : !f.pack_b_nf4_columns) {
                continue;
            }
            Nf4 q(way == LINES ? N : K, way == LINES ? K : N, 1, true);
            nf4_quantize(q.codes.data(), q.absmax.data(), (way == LINES ? w : w_back).data(), N * K, 1);
            for (size_t i = 0; i < N * K; i++) {
                const unsigned code = i % 2 == 0 ? q.codes[i / 2] >> 4 : q.codes[i / 2] & 15;
                q.value[i] = to_float(to_bf16(NF4_CODE[code] * q.absmax[i / 64]));
            }
            Bytes panels(N / size_t(f.NR) * panel_bytes(f, K));
            if (way == LINES) {
                for (size_t j = 0; j < N; j += size_t(f.NR)) {
                    f.pack_b_nf4_lines(panels.data() + j / size_t(f.NR) * panel_bytes(f, K), &q.codes[j * K / 2], K / 2,
                                       &q.absmax[j * K / 64], K / 64, f.NR, K);
                }
            } else {
                pack_nf4(f, panels.data(), q, COLUMNS);
            }
            const auto b = way == LINES ? q.value : transposed(q.value.data(), K, N);
            double squares = 0, errors = 0, bf16_errors = 0;
            for (size_t strips = 0; strips < 64; strips += MR) {
                const auto a = normal_values(MR * K, 60 + strips, 1);
                Bytes strip(strip_bytes(f, K));
                pack_strip(f, strip.data(), a.data(), MR, K, LINES);
                std::vector<float> c;
                multiply(c, f, strip.data(), panels.data(), K, MR, N);
                for (size_t i = 0; i < MR * N; i++) {
                    double exact = 0, from_bf16 = 0;
                    for (size_t p = 0; p < K; p++) {
                        const double x = a[i / N * K + p], y = b[i % N * K + p];
                        exact += x * y;
                        from_bf16 += double(to_float(to_bf16(float(x)))) * y;
                    }
                    squares += exact * exact;
                    errors += (c[i] - exact) * (c[i] - exact);
                    bf16_errors += (from_bf16 - exact) * (from_bf16 - exact);
                }
            }
            const double error = std::sqrt(errors / squares), bf16_error = std::sqrt(bf16_errors / squares);
            const std::string what = who + (way == LINES ? " lines" : " columns");
            if (is(f, "int16")) {
                CHECK_ERROR(what, error, 1e-3);
                CHECK_ERROR(what, error, 0.5 * bf16_error);
            } else if (is(f, "bf16")) {
                CHECK_ERROR(what, error, 1.01 * bf16_error);
            } else {
                CHECK_ERROR(what, error, 1e-6);
            }
        }
    });
}

}  // namespace

extern const Test format_tests[] = {
    {"format_shape", format_shape},
    {"format_products", format_products},
    {"format_place", format_place},
    {"format_parts", format_parts},
    {"format_zeros", format_zeros},
    {"format_not_finite", format_not_finite},
    {"format_extremes", format_extremes},
    {"format_whole_steps", format_whole_steps},
    {"format_nf4_lines", format_nf4_lines},
    {"format_nf4_columns", format_nf4_columns},
    {"format_bf16_packers", format_bf16_packers},
    {"format_accuracy", format_accuracy},
    {nullptr, nullptr},
};
