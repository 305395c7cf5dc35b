// The tier amx: its tiles as the stand-in of dev/simt has them, and its format bf16. Packed bytes are compared with the
// layout and the rounding that isa_amx.cpp states, products with sums in double of the rounded operands.
//
// The format's tests run where cpu_isa_choose has the tier: on a processor with tiles, and in a program that was built
// with the stand-in.
#if defined(__x86_64__)
#include "dev/simt/amx_tiles.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cfloat>
#include <functional>
#include <thread>

#include "dev/tests/ops.h"
#include "io/file.h"
#include "kernels/cpu/isa.h"

namespace {

// As vcvtneps2bf16 rounds: what is denormal becomes zero, with its sign.
bf16 rounded(float x) {
    return to_bf16(std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x);
}

uint32_t word(uint64_t seed, uint64_t i) {
    return uint32_t(random_uniform(seed, STREAM_TOKENS, 11, i) * 4294967296.0);
}

// ---- the stand-in ----

bool standin_runs() {
    if (!__builtin_cpu_supports("avx512f")) {
        test_skip("this processor has no AVX-512");
        return false;
    }
    return true;
}

struct Tiles {
    bf16 a[16][32], b[16][16][2];  // b[p][n]: rows 2p and 2p + 1
    float c[16][16];
};

void tiles_multiply(Tiles& t) {
    tiles_open();
    tile_load<2>(t.c, 64);
    tile_load<4>(t.a, 64);
    tile_load<7>(t.b, 64);
    tile_dot_bf16<2, 4, 7>();
    tile_store<2>(t.c, 64);
    tiles_close();
}

void standin_multiplies() {
    if (!standin_runs()) {
        return;
    }
    Tiles t, before;
    for (size_t i = 0; i < 512; i++) {
        t.a[i / 32][i % 32] = to_bf16(float(random_uniform(1, STREAM_TOKENS, 0, i)) - 0.5f);
        t.b[i / 32][i / 2 % 16][i % 2] = to_bf16(float(random_uniform(2, STREAM_TOKENS, 0, i)) - 0.5f);
        t.c[i / 16 % 16][i % 16] = float(random_uniform(3, STREAM_TOKENS, 0, i)) - 0.5f;
    }
    before = t;
    tiles_multiply(t);
    for (int m = 0; m < 16; m++) {
        for (int n = 0; n < 16; n++) {
            double sum = double(before.c[m][n]), size = std::fabs(sum);
            for (int k = 0; k < 32; k++) {
                const double product = double(to_float(t.a[m][k])) * double(to_float(t.b[k / 2][n][k % 2]));
                sum += product;
                size += std::fabs(product);
            }
            // No partial sum exceeds `size`; 15 additions in each of two chains, and two more.
            CHECK_ERROR("c[" + std::to_string(m) + "][" + std::to_string(n) + "]", std::fabs(t.c[m][n] - sum),
                        size * 32 * 0x1p-24);
        }
    }
}

// Cases in one element each, where another order, or denormals that count, would give another value.
void standin_rounds() {
    if (!standin_runs()) {
        return;
    }
    struct Case {
        const char* what;
        float c, a[4], b[4], result;
    };
    static const Case cases[] = {
        {"odd k by themselves", 0, {0x1p24f, 1, 0, 1}, {1, 1, 1, 1}, 0x1p24f + 2},
        {"even k by themselves", 0, {1, 0x1p24f, 1, 0}, {1, 1, 1, 1}, 0x1p24f + 2},
        {"c comes last", 0x1p24f, {1, 1, 0, 0}, {1, 1, 1, 1}, 0x1p24f + 2},
        {"ties go to even", 0x1p24f, {1, 0, 0, 0}, {1, 1, 1, 1}, 0x1p24f},
        {"ties go to even, up", 0x1p24f + 2, {1, 0, 0, 0}, {1, 1, 1, 1}, 0x1p24f + 4},
        {"a denormal operand", 0, {0x1p-130f, 0, 0, 0}, {0x1p100f, 1, 1, 1}, 0},
        {"a denormal in B", 0, {0x1p100f, 0, 0, 0}, {0x1p-130f, 1, 1, 1}, 0},
        {"a denormal sum", 0, {0x1p-70f, 0, 0, 0}, {0x1p-70f, 1, 1, 1}, 0},
        {"a denormal c", 0x1p-140f, {0, 0, 0, 0}, {1, 1, 1, 1}, 0},
        {"the least normal", 0, {0x1p-63f, 0, 0, 0}, {0x1p-63f, 1, 1, 1}, 0x1p-126f},
        {"overflow", 0, {0x1p100f, 0, 0, 0}, {0x1p100f, 1, 1, 1}, std::numeric_limits<float>::infinity()},
    };
    const unsigned control = _mm_getcsr();
    for (unsigned mode : {_MM_ROUND_NEAREST, _MM_ROUND_UP}) {
        for (const Case& c : cases) {
            Tiles t = {};
            for (int k = 0; k < 4; k++) {
                t.a[9][k] = to_bf16(c.a[k]);
                t.b[k / 2][13][k % 2] = to_bf16(c.b[k]);
            }
            t.c[9][13] = c.c;
            _mm_setcsr((control & ~unsigned(_MM_ROUND_MASK)) | mode);
            const unsigned set = _mm_getcsr();
            tiles_multiply(t);
            CHECK(_mm_getcsr() == set, "%s: the control register has changed", c.what);
            _mm_setcsr(control);
            CHECK(same_bits(&t.c[9][13], &c.result, 1), "%s: %a, need %a", c.what, double(t.c[9][13]),
                  double(c.result));
        }
    }
    Tiles t = {};
    t.a[2][0] = rounded(std::numeric_limits<float>::infinity());
    tiles_multiply(t);
    CHECK(std::isnan(t.c[2][5]) && t.c[3][5] == 0, "infinity by zero: %g, the row below %g", double(t.c[2][5]),
          double(t.c[3][5]));
}

void standin_catches() {
    if (!standin_runs()) {
        return;
    }
    static unsigned char memory[2048];
    struct Mistake {
        const char* message;
        void (*make)();
    };
    static const Mistake mistakes[] = {
        {"tile_load: the tiles are not open", [] { tile_load<0>(memory, 64); }},
        {"tile_zero: the tiles are not open", [] { tile_zero<0>(); }},
        {"tile_store: the tiles are not open",
         [] { tiles_open(), tile_zero<1>(), tiles_close(), tile_store<1>(memory, 64); }},
        {"tile_zero: the tiles are not open in this thread", [] { tiles_open(), std::thread(tile_zero<0>).join(); }},
        {"tiles_open: the tiles are open already", [] { tiles_open(), tiles_open(); }},
        {"tiles_close: the tiles are not open", [] { tiles_close(); }},
        {"tile_store: the tile has not been filled", [] { tiles_open(), tile_store<3>(memory, 64); }},
        {"tile_dot_bf16: A: the tile has not been filled",
         [] { tiles_open(), tile_zero<0>(), tile_zero<6>(), tile_dot_bf16<0, 4, 6>(); }},
        {"tile_dot_bf16: B: the tile has not been filled",
         [] { tiles_open(), tile_zero<0>(), tile_zero<4>(), tile_dot_bf16<0, 4, 6>(); }},
        {"tile_dot_bf16: C: the tile has not been filled",
         [] { tiles_open(), tile_zero<4>(), tile_zero<6>(), tile_dot_bf16<0, 4, 6>(); }},
        {"tile_load: rows overlap", [] { tiles_open(), tile_load<0>(memory, 32); }},
        {"tile_store: rows overlap", [] { tiles_open(), tile_zero<0>(), tile_store<0>(memory, 63); }},
    };
    const std::string path = test_directory() + "/message";
    for (const Mistake& m : mistakes) {
        fflush(nullptr);
        const pid_t pid = fork();
        if (pid == 0) {
            const rlimit none = {0, 0};
            setrlimit(RLIMIT_CORE, &none);
            if (!freopen(path.c_str(), "w", stderr)) {
                _exit(2);
            }
            setvbuf(stderr, nullptr, _IONBF, 0);
            m.make();
            _exit(0);
        }
        int how = 0;
        waitpid(pid, &how, 0);
        std::string text;
        CHECK(!file_read_all(text, path), "no message");
        CHECK(WIFSIGNALED(how) && WTERMSIG(how) == SIGABRT && text_has(text, m.message),
              "need an end by \"%s\", found \"%s\"", m.message, text.c_str());
    }
}

// ---- the format ----

const GemmFormat<float>* format() {
    const CpuIsa* isa = cpu_isa_choose("amx");
    if (!isa || !isa->bf16) {
        test_skip("no tier amx here");
        return nullptr;
    }
    return isa->bf16;
}

// n elements that end where memory ends: reading beyond is a fault.
template <class T>
struct AtTheEdge {
    size_t n, page, bytes;
    char* memory;
    explicit AtTheEdge(size_t count)
        : n(count), page(size_t(sysconf(_SC_PAGESIZE))), bytes((n * sizeof(T) + page - 1) / page * page) {
        memory =
            static_cast<char*>(mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(memory + bytes, page, PROT_NONE);
    }
    ~AtTheEdge() { munmap(memory, bytes + page); }
    AtTheEdge(const AtTheEdge&) = delete;
    T* data() { return reinterpret_cast<T*>(memory + bytes - n * sizeof(T)); }
    T& operator[](size_t i) { return data()[i]; }
};

// Any bits, and often those that round in a way of their own: ties, zeros, denormals, infinities, NaN.
float any_float(uint64_t seed, size_t i) {
    static const uint32_t special[] = {0,          0x80000000, 0x00000001, 0x80400000, 0x007fffff,
                                       0x00800000, 0x3f808000, 0x3f818000, 0x7f800000, 0xff800000,
                                       0x7f800001, 0x7fc00000, 0xffbfffff, 0x7f7fffff};
    uint32_t u = word(seed, i);
    u = u % 4 == 0 ? special[(u >> 8) % 14] : word(seed + 1, i);
    float f;
    memcpy(&f, &u, 4);
    return f;
}
void fill(AtTheEdge<float>& x, uint64_t seed) {
    for (size_t i = 0; i < x.n; i++) {
        x[i] = any_float(seed, i);
    }
}
void fill(AtTheEdge<bf16>& x, uint64_t seed) {
    for (size_t i = 0; i < x.n; i++) {
        x[i].bits = uint16_t(word(seed, i) >> 16);
    }
}
bf16 packed(float x) {
    return rounded(x);
}
bf16 packed(bf16 x) {
    return x;  // as it is, denormals too: the tiles read them as zero
}

// Where element (i, k) of a strip, or (k, i) of a panel, stands: in elements.
size_t place_a(size_t i, size_t k) {
    return k / 32 * 1024 + i * 32 + k % 32;
}
size_t place_b(size_t i, size_t k) {
    return k / 32 * 1024 + i / 16 * 512 + k % 32 / 2 * 32 + i % 16 * 2 + k % 2;
}

const size_t depths[] = {1, 2, 31, 32, 33, 63, 64, 65, 97, 128, 200, 1024};
const int widths[] = {1, 15, 16, 17, 31, 32};

// element(i, k): what stands there, for i < n.
template <class Element>
void check_packed(const char* what, const Guarded<bf16>& out, int n, size_t k, size_t (*place)(size_t, size_t),
                  const Element& element) {
    CHECK(out.intact(), "%s n %d k %zu: written outside", what, n, k);
    for (size_t i = 0; i < 32; i++) {
        for (size_t j = 0; j < (k + 31) / 32 * 32; j++) {
            const uint16_t need = i < size_t(n) && j < k ? element(i, j).bits : uint16_t(0);
            const uint16_t found = out.data()[place(i, j)].bits;
            if (!CHECK(found == need, "%s n %d k %zu: (%zu, %zu) is %04x, need %04x", what, n, k, i, j, found, need)) {
                return;
            }
        }
    }
}

template <class X>
void check_packer(const char* what, void (*pack)(void*, const X*, size_t, int, size_t), bool lines,
                  size_t (*place)(size_t, size_t)) {
    for (size_t k : depths) {
        for (int n : widths) {
            const size_t length = lines ? k : size_t(n), count = lines ? size_t(n) : k, ldi = length + 5;
            AtTheEdge<X> in((count - 1) * ldi + length);
            fill(in, k * 64 + size_t(n));
            Guarded<bf16> out((k + 31) / 32 * 1024);
            pack(out.data(), in.data(), ldi, n, k);
            check_packed(what, out, n, k, place,
                         [&](size_t i, size_t j) { return packed(in[lines ? i * ldi + j : j * ldi + i]); });
        }
    }
}

// The lines of a matrix as columns of several panels at once.
template <class X>
void check_panels(const char* what, void (*pack)(void*, const X*, size_t, int, size_t)) {
    for (size_t k : {1, 33, 64}) {
        for (int n : {33, 64, 100, 256}) {
            const size_t ldi = size_t(n) + 5, elements = (k + 31) / 32 * 1024, panels = (size_t(n) + 31) / 32;
            AtTheEdge<X> in((k - 1) * ldi + size_t(n));
            fill(in, k * 64 + size_t(n));
            Guarded<bf16> out(panels * elements);
            pack(out.data(), in.data(), ldi, n, k);
            CHECK(out.intact(), "%s n %d k %zu: written outside", what, n, k);
            for (size_t panel = 0; panel < panels; panel++) {
                Guarded<bf16> one(elements);
                memcpy(one.data(), out.data() + panel * elements, elements * sizeof(bf16));
                check_packed(what, one, n - int(panel) * 32, k, place_b,
                             [&](size_t i, size_t j) { return packed(in[j * ldi + panel * 32 + i]); });
            }
        }
    }
}

void packs() {
    const GemmFormat<float>* f = format();
    if (!f) {
        return;
    }
    CHECK(f->MR == 32 && f->NR == 32 && f->unit == 32 && f->a_unit == 2048 && f->b_unit == 2048, "another layout");
    CHECK(f->KC % f->unit == 0 && f->NC % 64 == 0, "KC %zu, NC %zu", f->KC, f->NC);
    check_packer("pack_a_lines", f->pack_a_lines, true, place_a);
    check_packer("pack_a_columns", f->pack_a_columns, false, place_a);
    check_packer("pack_b_lines", f->pack_b_lines, true, place_b);
    check_packer("pack_b_columns", f->pack_b_columns, false, place_b);
    check_packer("pack_a_bf16_lines", f->pack_a_bf16_lines, true, place_a);
    check_packer("pack_b_bf16_lines", f->pack_b_bf16_lines, true, place_b);
    check_packer("pack_b_bf16_columns", f->pack_b_bf16_columns, false, place_b);
    check_panels("pack_b_columns", f->pack_b_columns);
    check_panels("pack_b_bf16_columns", f->pack_b_bf16_columns);
}

// Lines of any codes and absmax of any finite size: zero, denormal, such that only some weights are, near the greatest.
struct Nf4Lines {
    size_t ld, lda;
    AtTheEdge<uint8_t> codes;
    AtTheEdge<float> absmax;
    Nf4Lines(size_t count, size_t length)
        : ld((length + 1) / 2 + 3),
          lda((length + 63) / 64 + 1),
          codes((count - 1) * ld + (length + 1) / 2),
          absmax((count - 1) * lda + (length + 63) / 64) {
        static const float sizes[] = {0, 1e-40f, 1.5e-38f, 3e38f, 1};
        for (size_t i = 0; i < codes.n; i++) {
            codes[i] = uint8_t(word(count + length, i) >> 16);
        }
        for (size_t i = 0; i < absmax.n; i++) {
            absmax[i] = i % 3 == 2 ? sizes[i / 3 % 5] : float(random_uniform(9, STREAM_TOKENS, 1, i));
        }
    }
    bf16 weight(size_t line, size_t i) {
        const uint8_t two = codes[line * ld + i / 2];
        return rounded(NF4_CODE[i % 2 == 0 ? two >> 4 : two & 15] * absmax[line * lda + i / 64]);
    }
};

void packs_nf4() {
    const GemmFormat<float>* f = format();
    if (!f) {
        return;
    }
    for (size_t k : depths) {
        const size_t elements = (k + 31) / 32 * 1024;
        for (int n : widths) {
            Nf4Lines in(size_t(n), k);
            Guarded<bf16> out(elements);
            f->pack_b_nf4_lines(out.data(), in.codes.data(), in.ld, in.absmax.data(), in.lda, n, k);
            check_packed("pack_b_nf4_lines", out, n, k, place_b, [&](size_t i, size_t j) { return in.weight(i, j); });
        }
        for (size_t n : {size_t(64), size_t(128), size_t(256)}) {
            Nf4Lines in(k, n);
            Guarded<bf16> out(n / 32 * elements);
            f->pack_b_nf4_columns(out.data(), in.codes.data(), in.ld, in.absmax.data(), in.lda, n, k);
            CHECK_FENCES(out);
            for (size_t panel = 0; panel < n / 32; panel++) {
                Guarded<bf16> one(elements);
                memcpy(one.data(), out.data() + panel * elements, elements * sizeof(bf16));
                check_packed("pack_b_nf4_columns", one, 32, k, place_b,
                             [&](size_t i, size_t j) { return in.weight(j, panel * 32 + i); });
            }
        }
    }
}

// A strip of mr lines and panels of nc lines of random numbers, k long.
struct Operands {
    size_t k, nc;
    int mr;
    std::vector<float> a, b;
    Guarded<unsigned char> strip, panels;
    Operands(const GemmFormat<float>& f, size_t depth, int rows, size_t columns)
        : k(depth),
          nc(columns),
          mr(rows),
          a(random_values<float>(size_t(mr) * k, 21)),
          b(random_values<float>(nc * k, 22)),
          strip(strip_bytes(f, k)),
          panels((nc + 31) / 32 * panel_bytes(f, k)) {
        pack(f);
    }
    void pack(const GemmFormat<float>& f) {
        f.pack_a_lines(strip.data(), a.data(), k, mr, k);
        for (size_t j = 0; j < nc; j += 32) {
            f.pack_b_lines(panels.data() + j / 32 * panel_bytes(f, k), b.data() + j * k, k,
                           int(nc - j < 32 ? nc - j : 32), k);
        }
    }
};

// The product of the operands, without and with sums that were there; nothing but mr x nc is written.
std::vector<float> product(const GemmFormat<float>& f, const Operands& op) {
    const size_t ldc = op.nc + 7, rows = size_t(op.mr), n = (rows - 1) * ldc + op.nc;
    Guarded<float> fresh(n), added(n, 1);
    const std::vector<float> there = random_values<float>(n, 23);
    std::vector<float> result(rows * op.nc);
    for (size_t i = 0; i < rows; i++) {
        memcpy(added.data() + i * ldc, there.data() + i * ldc, op.nc * sizeof(float));
    }
    f.multiply(op.k, op.strip.data(), op.panels.data(), fresh.data(), ldc, op.mr, op.nc, false);
    f.multiply(op.k, op.strip.data(), op.panels.data(), added.data(), ldc, op.mr, op.nc, true);
    CHECK_FENCES(fresh);
    CHECK_FENCES(added);
    size_t gaps = 0, wrong = 0;
    for (size_t i = 0; i < n; i++) {
        if (i % ldc >= op.nc) {
            uint32_t bits[2];
            memcpy(&bits[0], &fresh[i], 4);
            memcpy(&bits[1], &added[i], 4);
            gaps += bits[0] != 0xffffffff || bits[1] != 0xffffffff;
        } else {
            const float sum = there[i] + fresh[i];
            wrong += !same_bits(&sum, &added[i], 1);
            result[i / ldc * op.nc + i % ldc] = fresh[i];
        }
    }
    CHECK(gaps == 0, "k %zu mr %d nc %zu: %zu elements between rows are written", op.k, op.mr, op.nc, gaps);
    CHECK(wrong == 0, "k %zu mr %d nc %zu: %zu sums are not what was there and the product", op.k, op.mr, op.nc, wrong);
    return result;
}

void check_product(const GemmFormat<float>& f, size_t k, int mr, size_t nc) {
    const Operands op(f, k, mr, nc);
    const std::vector<float> c = product(f, op);
    double error = 0, size = 0;
    for (size_t i = 0; i < size_t(mr); i++) {
        for (size_t j = 0; j < nc; j++) {
            double sum = 0;
            for (size_t p = 0; p < k; p++) {
                double term = double(to_float(rounded(op.a[i * k + p]))) * double(to_float(rounded(op.b[j * k + p])));
                sum += term;
                size += term * term;  // what the square of a sum of random signs is on average
            }
            error += (c[i * nc + j] - sum) * (c[i * nc + j] - sum);
        }
    }
    // A sum over 32 is added to 31 more at k = 1024, each rounded by at most 2^-24 of what has come together: the
    // errors of 32 + 16 roundings, were they of one size and independent, are 7 times 2^-24 / sqrt(3) = 2.4e-7.
    CHECK_ERROR("k " + std::to_string(k) + " mr " + std::to_string(mr) + " nc " + std::to_string(nc) + ": relative RMS",
                std::sqrt(error / size), 1e-6);
}

void multiplies() {
    const GemmFormat<float>* f = format();
    if (!f) {
        return;
    }
    for (size_t k : {1, 31, 32, 33, 64, 200, 1024}) {
        for (int mr : {1, 16, 17, 32}) {
            for (size_t nc : {1, 17, 32, 37, 96}) {
                check_product(*f, k, mr, nc);
            }
        }
    }
    for (int mr = 1; mr <= 32; mr++) {
        check_product(*f, 64, mr, 33);
    }
    check_product(*f, 300, 32, f->NC);
    check_product(*f, 300, 32, f->NC + 70);
    check_product(*f, f->KC + 40, 5, 40);
}

void multiplies_nothing() {
    const GemmFormat<float>* f = format();
    if (!f) {
        return;
    }
    Operands op(*f, 32, 32, 32);
    op.k = 0;
    for (float x : product(*f, op)) {
        CHECK(x == 0, "a sum of nothing is %g", double(x));
    }
}

// Each element once more, alone, and in other company.
void same_bits_anywhere() {
    const GemmFormat<float>* f = format();
    if (!f) {
        return;
    }
    const size_t k = 600, nc = 70;
    Operands all(*f, k, 32, nc);
    const std::vector<float> whole = product(*f, all);
    CHECK(same_bits(product(*f, all).data(), whole.data(), whole.size()), "other bits the second time");
    for (size_t i = 0; i < 32; i++) {
        Operands row(*f, k, 1, nc);
        row.a.assign(all.a.begin() + long(i * k), all.a.begin() + long((i + 1) * k));
        row.b = all.b;
        row.pack(*f);
        CHECK(same_bits(product(*f, row).data(), &whole[i * nc], nc), "row %zu alone has other bits", i);
    }
    for (size_t first : {1, 16, 33, 69}) {
        Operands some(*f, k, 32, nc - first);
        some.a = all.a;
        some.b.assign(all.b.begin() + long(first * k), all.b.end());
        some.pack(*f);
        const std::vector<float> c = product(*f, some);
        for (size_t i = 0; i < 32; i++) {
            CHECK(same_bits(&c[i * (nc - first)], &whole[i * nc + first], nc - first),
                  "row %zu: columns from %zu have other bits", i, first);
        }
    }
}

void not_finite() {
    const GemmFormat<float>* f = format();
    if (!f) {
        return;
    }
    const size_t k = 100, nc = 40;
    const float infinity = std::numeric_limits<float>::infinity();
    Operands op(*f, k, 32, nc);
    for (float& x : op.a) {
        x = x < 0 ? x - 1 : x + 1;
    }
    op.a[3 * k + 70] = std::numeric_limits<float>::quiet_NaN();
    op.b[5 * k + 99] = -infinity;
    op.pack(*f);
    const std::vector<float> c = product(*f, op);
    for (size_t i = 0; i < 32; i++) {
        for (size_t j = 0; j < nc; j++) {
            const float x = c[i * nc + j];
            const bool right = i == 3   ? std::isnan(x)
                               : j == 5 ? x == (op.a[i * k + 99] < 0 ? infinity : -infinity)
                                        : std::isfinite(x);
            CHECK(right, "(%zu, %zu) is %g", i, j, double(x));
        }
    }
}

// Threads that have never seen a tile, at once.
void threads_multiply() {
    const GemmFormat<float>* f = format();
    if (!f) {
        return;
    }
    const Operands op(*f, 513, 32, 96);
    const std::vector<float> alone = product(*f, op);
    std::vector<float> c[4];
    std::vector<std::thread> threads;
    for (std::vector<float>& each : c) {
        each.resize(alone.size());
        threads.emplace_back([&] {
            for (int round = 0; round < 20; round++) {
                f->multiply(op.k, op.strip.data(), op.panels.data(), each.data(), op.nc, op.mr, op.nc, false);
            }
        });
    }
    for (std::thread& t : threads) {
        t.join();
    }
    for (const std::vector<float>& each : c) {
        CHECK(same_bits(each.data(), alone.data(), alone.size()), "a thread has other bits");
    }
}

void counts_operations() {
    const GemmFormat<float>* f = format();
    if (!f) {
        return;
    }
    float sink = 1;
    const size_t operations = f->peak_loop(3, &sink);
    CHECK(operations == 3 * 4 * 2 * 16 * 16 * 32, "%zu operations", operations);
    CHECK(sink == 0, "zeros give %g", double(sink));
}

}  // namespace

extern const Test amx_tests[] = {
    {"standin_multiplies", standin_multiplies},
    {"standin_rounds", standin_rounds},
    {"standin_catches", standin_catches},
    {"packs", packs},
    {"packs_nf4", packs_nf4},
    {"multiplies", multiplies},
    {"multiplies_nothing", multiplies_nothing},
    {"same_bits_anywhere", same_bits_anywhere},
    {"not_finite", not_finite},
    {"threads_multiply", threads_multiply},
    {"counts_operations", counts_operations},
    {nullptr, nullptr},
};
#else
#include "dev/tests/test.h"

extern const Test amx_tests[] = {{nullptr, nullptr}};
#endif
