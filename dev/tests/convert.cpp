// The conversions between number formats: bf16 rounding, half precision, widening.
#include <cmath>

#include "dev/tests/test.h"
#include "kernels/widen.h"

static float from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// Round to nearest, ties to even (IEEE 754): the tie between two bf16 goes to the one whose last bit is 0.
static void bf16_rounds_to_even() {
    const struct {
        uint32_t from;
        uint16_t to;
    } cases[] =
        {
            {0x3f800000, 0x3f80}, {0x3f808000, 0x3f80}, {0x3f808001, 0x3f81},
            {0x3f807fff, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f817fff, 0x3f81},
            {0xbf808000, 0xbf80}, {0xbf818000, 0xbf82}, {0x3fff8000, 0x4000},  // carries into the exponent
            {0x7f7fffff, 0x7f80},                                              // beyond the largest bf16: infinity
            {0x7f800000, 0x7f80}, {0xff800000, 0xff80}, {0x00000001, 0x0000},
            {0x00008000, 0x0000}, {0x00018000, 0x0002}, {0x80000000, 0x8000},
        };
    for (const auto& c : cases) {
        CHECK(to_bf16(from_bits(c.from)).bits == c.to, "%08x gives %04x, need %04x", c.from,
              to_bf16(from_bits(c.from)).bits, c.to);
    }
    for (uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0x7fc00000u}) {
        CHECK(std::isnan(to_float(to_bf16(from_bits(nan)))), "the NaN %08x became %g", nan,
              double(to_float(to_bf16(from_bits(nan)))));
    }
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        float x = to_float(bf16{uint16_t(bits)});
        CHECK(std::isnan(x) || to_bf16(x).bits == bits, "bf16 %04x does not come back", bits);
    }
}

// Every half is sign * 2^(e - 15) * (1 + m / 1024), or sign * 2^-14 * m / 1024 for e = 0.
static void half_is_exact() {
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        int e = int(bits >> 10 & 31), m = int(bits & 1023);
        double want = e == 0 ? std::ldexp(m, -24) : std::ldexp(1024 + m, e - 25);
        want = bits & 0x8000 ? -want : want;
        float got = half_to_float(uint16_t(bits));
        if (e == 31) {
            CHECK(m == 0 ? std::isinf(got) && std::signbit(got) == (bits >> 15 != 0) : std::isnan(got), "%04x gives %g",
                  bits, double(got));
        } else {
            CHECK(double(got) == want && std::signbit(got) == (bits >> 15 != 0), "%04x gives %g, need %g", bits,
                  double(got), want);
        }
    }
}

static void widen_finds_the_first_bad() {
    const uint16_t halves[] = {0x3c00, 0x7c00, 0x7e00};  // 1, infinity, NaN
    const bf16 brains[] = {{0x3f80}, {0x4000}, {0xff80}};
    const float floats[] = {1, NAN, 3};
    float out[3];
    CHECK(widen(out, halves, Store::F16, 3) == 1 && widen(out, halves, Store::F16, 1) == 1 && out[0] == 1, "F16");
    CHECK(widen(out, brains, Store::BF16, 3) == 2 && out[1] == 2, "BF16");
    CHECK(widen(out, floats, Store::F32, 3) == 1 && out[2] == 3, "F32");
}

extern const Test convert_tests[];
const Test convert_tests[] = {
    {"bf16_rounds_to_even", bf16_rounds_to_even},
    {"half_is_exact", half_is_exact},
    {"widen_finds_the_first_bad", widen_finds_the_first_bad},
    {nullptr, nullptr},
};
