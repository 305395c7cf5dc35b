// Optimizer moments and the embedding on the host's side of a card, and plans for cards with little memory.
#include <cmath>
#include <cstdlib>

#include "dev/tests/gpu.h"
#include "train_step.h"

static const size_t SLAB = size_t(1) << 20;  // of kernels/paged.cuh

// Three steps, with a fetch ahead and without; the moments once on the card and once paged. n is no multiple of a slab.
static void paged_moments_same_bits() {
    const size_t n = 2 * SLAB + 1003;
    GpuDevice<bf16> kept(1 << 16), paged(1 << 16);
    if (!kept.ok || !paged.ok) {
        return;
    }
    const std::vector<float> p = random_values<float>(n, 1), g = random_values<float>(n, 2);
    GpuBuffer<float, bf16> p1(kept, p), g1(kept, g), m1(kept, std::vector<float>(n)), v1(kept, std::vector<float>(n));
    GpuBuffer<float, bf16> p2(paged, p), g2(paged, g);
    float* m2 = static_cast<float*>(device_alloc_host(paged, n * sizeof(float), "first moments"));
    float* v2 = static_cast<float*>(device_alloc_host(paged, n * sizeof(float), "second moments"));
    CHECK(m2[0] == 0 && v2[n - 1] == 0, "not zeroed");
    moments_open(paged, m2);
    for (int step = 1; step <= 3; step++) {
        const AdamW a = {1e-2, 0.9, 0.999, 1e-8, 0.01, step, 0.5};
        CHECK(adamw_update(kept, p1.data(), m1.data(), v1.data(), g1.data(), n, a) == n, "not finite");
        if (step != 2) {
            adamw_prefetch(paged, m2, v2, n);
            adamw_prefetch(paged, m2, v2, n);  // of the step's second pass: nothing more
        }
        CHECK(adamw_update(paged, p2.data(), m2, v2, g2.data(), n, a) == n, "not finite");
    }
    moments_settle(paged);
    CHECK(p1.get() == p2.get(), "parameters differ");
    CHECK(same_bits(m1.get().data(), m2, n) && same_bits(v1.get().data(), v2, n), "moments differ");
    CHECK(p2.intact() && g2.intact(), "written outside");
    // What the host writes after moments_settle is what the next update reads, though slabs were on their way.
    const AdamW a = {1e-2, 0.9, 0.999, 1e-8, 0.01, 4, 0.5};
    adamw_prefetch(paged, m2, v2, n);
    moments_settle(paged);
    std::fill(m2, m2 + n, 0.25f);
    m1.set(std::vector<float>(n, 0.25f));
    adamw_update(kept, p1.data(), m1.data(), v1.data(), g1.data(), n, a);
    adamw_update(paged, p2.data(), m2, v2, g2.data(), n, a);
    CHECK(p1.get() == p2.get(), "moments set by the host are not the ones used");
}

// What moments_settle has waited for is whole on the host. Whether copies are still under way is luck; on the stand-in another
// seed is another order of what streams do.
static void paged_moments_settle() {
    const size_t n = SLAB + 10;
    const char* before = getenv("SIMT_SEED");
    const std::string restore = before ? before : "";
    for (int seed = 1; seed <= 8; seed++) {
        setenv("SIMT_SEED", std::to_string(seed).c_str(), 1);
        GpuDevice<bf16> dev(1 << 16);
        if (!dev.ok) {
            break;
        }
        GpuBuffer<float, bf16> p(dev, std::vector<float>(n, 1.0f)), g(dev, std::vector<float>(n, 0.5f));
        float* m = static_cast<float*>(device_alloc_host(dev, n * sizeof(float), "first moments"));
        float* v = static_cast<float*>(device_alloc_host(dev, n * sizeof(float), "second moments"));
        moments_open(dev, m);
        adamw_update(dev, p.data(), m, v, g.data(), n, AdamW{1e-2, 0.9, 0.999, 1e-8, 0, 1, 1});
        moments_settle(dev);
        const size_t last = n - 1;
        CHECK(std::fabs(m[0] - 0.05f) < 1e-6f && std::fabs(m[last] - 0.05f) < 1e-6f && v[0] > 0 && v[last] > 0,
              "seed %d: moments %g %g, %g %g", seed, double(m[0]), double(m[last]), double(v[0]), double(v[last]));
    }
    if (before != nullptr) {
        setenv("SIMT_SEED", restore.c_str(), 1);
    } else {
        unsetenv("SIMT_SEED");
    }
}

static void paged_nonfinite_is_named() {
    const size_t n = 2 * SLAB + 77, at = 2 * SLAB + 5;
    GpuDevice<bf16> dev(1 << 16);
    if (!dev.ok) {
        return;
    }
    std::vector<float> g(n, 0.5f);
    g[at] = INFINITY;
    GpuBuffer<float, bf16> p(dev, std::vector<float>(n, 1.0f)), grad(dev, g);
    float* m = static_cast<float*>(device_alloc_host(dev, n * sizeof(float), "first moments"));
    float* v = static_cast<float*>(device_alloc_host(dev, n * sizeof(float), "second moments"));
    moments_open(dev, m);
    const size_t found = adamw_update(dev, p.data(), m, v, grad.data(), n, AdamW{1e-2, 0.9, 0.999, 1e-8, 0, 1, 1});
    CHECK(found == at, "element %zu, need %zu", found, at);
}

static void embedding_on_the_host() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    const int V = 50, C = 48;
    const std::vector<bf16> rows = stored_values<bf16>(random_stored<bf16>(size_t(V) * C, 3));
    void* host = device_alloc_host(dev, rows.size() * sizeof(bf16), "the embedding");
    device_to(dev, host, rows.data(), rows.size() * sizeof(bf16));
    Matrix wte;
    wte.store = Store::BF16;
    wte.rows = V;
    wte.cols = C;
    wte.data = host;
    const std::vector<int32_t> tokens = {49, 0, 7};
    GpuBuffer<int32_t, bf16> ids(dev, tokens);
    GpuBuffer<bf16, bf16> out(dev, tokens.size() * C);
    embedding_forward(dev, out.data(), ids.data(), wte, tokens.size());
    const std::vector<double> got = numbers(out.get()), all = numbers(rows);
    for (size_t i = 0; i < got.size(); i++) {
        CHECK(got[i] == all[size_t(tokens[i / C]) * C + i % C], "element %zu", i);
    }
    CHECK(out.intact(), "written outside");
}

// 8B at rank 16, documents of 512 tokens. The bytes that cannot be spared, by hand: 6.979 G weights of linears at 4.127
// bits, the head 1.05 GB, adapters and gradients 0.336 GB.
static void plans_for_small_cards() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    LlamaConfig c;
    Error e = llama_config_shape(c, "8b");
    const double least = 6.979e9 * 4.127 / 8 + 1.0507e9 + 0.336e9;
    const auto choose = [&](Plan& p, double gb, GemmPath gemm = GemmPath::AUTO) {
        p = Plan();
        p.gemm = gemm;
        return plan_choose(p, static_cast<Gpu<bf16>&>(dev), c, LoraConfig(), BaseOptions(), 512, 8192, 0, "auto",
                           uint64_t(gb * 1e9));
    };
    Plan p;
    CHECK(!(e = choose(p, 140)), "%s", e.what.c_str());
    CHECK(p.pass_tokens == 8192 && recompute_text(p.recompute) == "none" && !p.paged && !p.host_embed, "140 GB: %zu, %s",
          p.pass_tokens, recompute_text(p.recompute).c_str());
    CHECK(!(e = choose(p, 24)), "%s", e.what.c_str());
    CHECK(p.pass_tokens >= 2048 && recompute_text(p.recompute) == "none", "24 GB: %zu tokens, %s", p.pass_tokens,
          recompute_text(p.recompute).c_str());
    CHECK(!(e = choose(p, 8)), "%s", e.what.c_str());
    CHECK(p.pass_tokens == 512 && double(p.total()) < 8e9 && double(p.total()) > least, "8 GB: %.2f GB, least %.2f",
          double(p.total()) / 1e9, least / 1e9);
    CHECK(!p.paged, "8 GB needs no paging");
    CHECK(!(e = choose(p, 7.2)), "%s", e.what.c_str());
    CHECK(p.gemm == GemmPath::FUSED && p.host_embed && !p.paged, "7.2 GB: the embedding goes first, then the moments");
    CHECK(!(e = choose(p, 6.44)), "%s", e.what.c_str());  // 6 GiB, as such a card has
    CHECK(p.paged && p.host_embed && p.gemm == GemmPath::FUSED && double(p.total()) < 6.44e9 - 805e6,
          "6 GiB: %.2f GB", double(p.total()) / 1e9);
    CHECK(!(e = choose(p, 8, GemmPath::DEQUANT)) && p.gemm == GemmPath::DEQUANT, "what was asked for does not stand");
    e = choose(p, 4);
    CHECK(e.code == 1 && text_has(e.what, "the card has 4.0 GB"), "%s", e.what.c_str());
}

extern const Test gpu_paged_tests[];
const Test gpu_paged_tests[] = {
    {"paged_moments_same_bits", paged_moments_same_bits},
    {"paged_moments_settle", paged_moments_settle},
    {"paged_nonfinite_is_named", paged_nonfinite_is_named},
    {"embedding_on_the_host", embedding_on_the_host},
    {"plans_for_small_cards", plans_for_small_cards},
    {nullptr, nullptr},
};
