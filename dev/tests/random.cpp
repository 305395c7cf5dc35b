// The counter-based generator: published vectors, layout of the counter, ranges, permutations.
#include "kernels/random.h"

#include <cmath>

#include "dev/tests/test.h"

// Random123 1.09, kat_vectors, "philox4x32 10".
static void random_vectors() {
    const struct {
        uint32_t counter[4], key[2], out[4];
    } vectors[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (const auto& v : vectors) {
        uint32_t out[4];
        philox4x32(out, v.counter, v.key);
        for (int i = 0; i < 4; i++) {
            CHECK(out[i] == v.out[i], "counter %08x, word %d: %08x, not %08x", v.counter[0], i, out[i], v.out[i]);
        }
    }
}

// random_bits is the first half of the block at the counter and key that the header draws.
static void random_layout() {
    CHECK(random_bits(0, 0, 0, 0) == 0xe169c58d6627e8d5, "%016llx", (unsigned long long)random_bits(0, 0, 0, 0));
    const uint32_t counter[4] = {0x89abcdef, 0x45670003, 0x55667788, 0x11223344}, key[2] = {0x9abcdef0, 0x12345678};
    uint32_t out[4];
    philox4x32(out, counter, key);
    uint64_t got = random_bits(0x123456789abcdef0, STREAM_DROPOUT, 0x1122334455667788, 0x456789abcdef);
    CHECK(got == (uint64_t(out[1]) << 32 | out[0]), "%016llx", (unsigned long long)got);
    CHECK(STREAM_ORDER == 1 && STREAM_DROPOUT == 3 && STREAM_WEIGHTS == 6, "a stream has another number");
}

// Mean and mean square of n uniform numbers lie within 5 standard deviations, sqrt(1/12/n) and sqrt(4/45/n), of 1/2 and
// 1/3.
static void random_uniform_range() {
    const int n = 100000;
    double sum = 0, squares = 0, least = 1, most = 0;
    for (int i = 0; i < n; i++) {
        double u = random_uniform(1337, STREAM_ADAPTER, 5, uint64_t(i));
        sum += u;
        squares += u * u;
        least = u < least ? u : least;
        most = u > most ? u : most;
    }
    CHECK(least >= 0 && most < 1, "%g to %g", least, most);
    CHECK_ERROR("mean", std::fabs(sum / n - 0.5), 5 * std::sqrt(1.0 / 12 / n));
    CHECK_ERROR("mean square", std::fabs(squares / n - 1.0 / 3), 5 * std::sqrt(4.0 / 45 / n));
    const double u = random_uniform(0, 0, 0, 0);
    CHECK(u == double(0xe169c58d6627e8d5 >> 11) / 9007199254740992.0, "%.17g", u);
}

static void random_below_range() {
    int counts[7] = {};
    const int n = 70000;
    for (int i = 0; i < n; i++) {
        uint64_t x = random_below(1337, STREAM_SPLIT, 0, uint64_t(i), 7);
        if (!CHECK(x < 7, "%llu", (unsigned long long)x)) {
            return;
        }
        counts[x]++;
    }
    for (int count : counts) {  // 5 standard deviations of a binomial count
        CHECK_ERROR("count", std::fabs(count - n / 7.0), 5 * std::sqrt(n * (1.0 / 7) * (6.0 / 7)));
    }
#ifdef __SIZEOF_INT128__
    __extension__ typedef unsigned __int128 uint128;
    for (uint64_t bound : {uint64_t(1), uint64_t(3), uint64_t(1) << 32, (uint64_t(1) << 40) + 12345, ~uint64_t(0)}) {
        for (uint64_t i = 0; i < 1000; i++) {
            uint64_t want = uint64_t(uint128(random_bits(3, 4, 5, i)) * bound >> 64);
            CHECK(random_below(3, 4, 5, i, bound) == want, "bound %llu, index %llu", (unsigned long long)bound,
                  (unsigned long long)i);
        }
    }
#endif
}

static void random_permutations() {
    CHECK(random_permutation(0, 1, STREAM_ORDER, 0).empty(), "of none");
    CHECK(random_permutation(1, 1, STREAM_ORDER, 0) == std::vector<size_t>{0}, "of one");
    const std::vector<size_t> a = random_permutation(1000, 1337, STREAM_ORDER, 0);
    std::vector<bool> seen(1000);
    for (size_t i : a) {
        CHECK(i < 1000 && !seen[i], "%zu is out of range or there twice", i);
        seen[i < 1000 ? i : 0] = true;
    }
    CHECK(a == random_permutation(1000, 1337, STREAM_ORDER, 0), "not the same again");
    CHECK(a != random_permutation(1000, 1337, STREAM_ORDER, 1), "epochs share an order");
    CHECK(a != random_permutation(1000, 1338, STREAM_ORDER, 0), "seeds share an order");
    int counts[6] = {};  // each order of three equally often
    const int n = 12000;
    for (int i = 0; i < n; i++) {
        const std::vector<size_t> p = random_permutation(3, 7, STREAM_ORDER, uint64_t(i));
        counts[p[0] * 2 + (p[1] > p[2] ? 1 : 0)]++;
    }
    for (int count : counts) {
        CHECK_ERROR("order", std::fabs(count - n / 6.0), 5 * std::sqrt(n * (1.0 / 6) * (5.0 / 6)));
    }
}

extern const Test random_tests[] = {{"random_vectors", random_vectors},
                                    {"random_layout", random_layout},
                                    {"random_uniform_range", random_uniform_range},
                                    {"random_below_range", random_below_range},
                                    {"random_permutations", random_permutations},
                                    {nullptr, nullptr}};
