// Which base fits on how many cards, by the plan: the memory that CUDA gives of a card, less what NCCL may take of it.
#include "dev/tests/gpu.h"
#define HAVE_GPU 1
#include "train_forecast.h"

static void bases_that_fit() {
    const struct {
        const char* shape;
        int ranks;
        size_t tokens;
        bool paged, fits;
        uint64_t mib;  // 24207: an RTX 4090; 80998: an H100
    } known[] = {
        {"70b", 4, 2048, false, true, 24207 - 432},  {"70b", 2, 512, true, true, 24207 - 336},
        {"70b", 2, 2048, false, false, 24207 - 336}, {"70b", 1, 512, true, false, 24207},
        {"405b", 8, 2048, false, true, 80998 - 624}, {"405b", 2, 2048, false, false, 80998 - 336},
    };
    GpuDevice<bf16> here;
    if (!here.ok) {
        return;
    }
    Gpu<bf16>& dev = here;
    for (const auto& k : known) {
        LlamaConfig c;
        Error e = llama_config_shape(c, k.shape);
        Plan p;
        p.ranks = k.ranks;
        p.spread = true;
        p.paged = k.paged;
        e = e ? e : plan_choose(p, dev, c, LoraConfig(), BaseOptions(), k.tokens, 4 * k.tokens, 0, "auto", k.mib << 20);
        CHECK(k.fits == !e, "%s on %d ranks of %llu MiB, %zu tokens: %s", k.shape, k.ranks, (unsigned long long)k.mib,
              k.tokens, e ? e.what.c_str() : "fits");
        if (k.ranks == 4 && !e) {  // an eighty-layer model has 440 MB a layer: a quarter of all, and two whole
            const size_t layer = p.weights - 2 * size_t(128256) * 8192 * 2;
            CHECK(layer > size_t(22) * 438000000 && layer < size_t(22) * 442000000, "%zu bytes of layers", layer);
        }
    }
}

extern const Test gpu_forecast_tests[];
const Test gpu_forecast_tests[] = {
    {"bases_that_fit", bases_that_fit},
    {nullptr, nullptr},
};
