// The GPU device: opening and refusing, memory with and without an arena, copies, clocks.
#include <algorithm>
#include <cstdlib>

#include "dev/tests/gpu.h"

namespace {

template <class X>
void check_memory(bool arena) {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    Gpu<X>& d = dev;
    if (arena) {
        const std::string why = device_arena(d, 1 << 20);
        CHECK(why.empty(), "no arena: %s", why.c_str());
    }
    const size_t before = device_peak_bytes(d);
    const size_t sizes[] = {1, 255, 256, 257, 4096, 100003, 0};
    std::vector<char*> pieces;
    for (size_t bytes : sizes) {
        pieces.push_back(static_cast<char*>(device_alloc(d, bytes, "a test")));
        CHECK(reinterpret_cast<uintptr_t>(pieces.back()) % 256 == 0, "%zu bytes are not aligned", bytes);
    }
    // Filled one after the other, all keep what they were given: none overlaps another.
    for (size_t i = 0; i < pieces.size(); i++) {
        const std::vector<char> fill(sizes[i], char('a' + i));
        device_to(d, pieces[i], fill.data(), sizes[i]);
    }
    for (size_t i = 0; i < pieces.size(); i++) {
        std::vector<char> back(sizes[i], 0);
        device_from(d, back.data(), pieces[i], sizes[i]);
        CHECK(std::all_of(back.begin(), back.end(), [&](char c) { return c == char('a' + i); }),
              "piece %zu does not hold what it was given", i);
    }
    device_zero(d, pieces[4] + 8, 4096 - 16);
    std::vector<char> back(4096);
    device_from(d, back.data(), pieces[4], 4096);
    CHECK(back[7] == 'e' && back[8] == 0 && back[4087] == 0 && back[4088] == 'e', "device_zero wrote other bytes");

    if (arena) {
        CHECK(device_peak_bytes(d) == before, "an arena asked for more memory");
        device_free(d, pieces[6]);  // the last piece: its place is free again
        CHECK(device_alloc(d, 300, "a test") == pieces[6], "the last piece's place was not used again");
        device_free(d, pieces[2]);
        CHECK(device_alloc(d, 256, "a test") == pieces[6] + 512, "an inner piece's place was used again");
    } else {
        CHECK(device_peak_bytes(d) >= before + 100003 + 4096 + 4 * 256, "%zu bytes at most", device_peak_bytes(d));
        const size_t most = device_peak_bytes(d);
        device_free(d, pieces[5]);
        device_alloc(d, 4096, "a test");
        CHECK(device_peak_bytes(d) == most, "freed memory still counts");
    }
    device_free(d, static_cast<void*>(nullptr));
}
void memory() {
    check_memory<bf16>(false);
    check_memory<float>(false);
}
void memory_arena() {
    check_memory<bf16>(true);
    check_memory<float>(true);
}

// An arena takes exactly what was asked for, and says why it is not to be had.
void arena_limits() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    Gpu<bf16>& d = dev;
    std::string why = device_arena(d, size_t(1) << 60);
    CHECK(text_has(why, "MiB are free of the GPU's"), "too large an arena: '%s'", why.c_str());
    why = device_arena(d, 4 * 256);
    CHECK(why.empty(), "no arena after a refusal: %s", why.c_str());
    device_reserve(d, 300);
    char* const workspace = d.workspace;
    device_reserve(d, 200);
    CHECK(d.workspace == workspace && d.workspace_bytes == 300, "a smaller need moved the workspace");
    device_reserve(d, 1000);
    CHECK(d.workspace == workspace && d.workspace_bytes == 1000, "the workspace did not grow where it stood");
    CHECK(text_has(device_arena(d, 256), "before the arena"), "a second arena");
}

// Each reason why there is no device has its words. The stand-in plays the machines that are not at hand.
void reasons() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    if (std::string(dev.info.name) != "stand-in") {
        test_skip("a real GPU cannot be made to disappear");
        return;
    }
    struct {
        const char *variable, *value, *why;
    } const cases[] = {
        {"CUDA_VISIBLE_DEVICES", "", "no NVIDIA GPU is visible"},
        {"SIMT_CAPABILITY", "7.5", "stand-in has compute capability 7.5, need 8.0 or newer"},
        {"SIMT_DRIVER", "0", "no NVIDIA driver is loaded"},
        {"SIMT_DRIVER", "12040", "the NVIDIA driver is too old (it knows CUDA 12.4, need 13.0)"},
    };
    for (const auto& c : cases) {
        const char* const before = getenv(c.variable);
        const std::string kept = before ? before : "";
        setenv(c.variable, c.value, 1);
        Gpu<bf16> none;
        const std::string why = device_open(none, 1);
        before ? setenv(c.variable, kept.c_str(), 1) : unsetenv(c.variable);
        CHECK(text_has(why, c.why), "%s=%s: '%s'", c.variable, c.value, why.c_str());
        CHECK(!none.state && !none.stream, "%s=%s: half open", c.variable, c.value);
    }
    GpuDevice<bf16> again;
    CHECK(again.ok, "the refusals left something behind");
}

void info() {
    GpuDevice<float> dev;
    if (!dev.ok) {
        return;
    }
    const GpuInfo& i = dev.info;
    CHECK(i.name[0] != 0 && i.arch >= 80 && i.multiprocessors > 0, "'%s', sm_%d, %d multiprocessors", i.name, i.arch,
          i.multiprocessors);
    CHECK(i.shared_bytes >= 99 << 10 && i.shared_bytes <= 1 << 20, "%zu bytes of shared memory", i.shared_bytes);
    CHECK(i.l2_bytes > 0 && i.memory > 1 << 28, "%zu bytes of cache, %zu of memory", i.l2_bytes, i.memory);
    // Of a real card within what the fastest and slowest of these years do; the stand-in has no rates.
    const bool rates = i.gflops > 1e4 && i.gflops < 1e7 && i.gbytes_per_s > 100 && i.gbytes_per_s < 1e5;
    CHECK(rates || (i.gflops == 0 && i.gbytes_per_s == 0), "%g GFLOP/s, %g GB/s", i.gflops, i.gbytes_per_s);
    CHECK(dev.threads == 2, "%d threads", dev.threads);
}

// Off: nothing is added. On: each clock's time is added at the next device_sync, to what was there.
void clocks() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    Gpu<bf16>& d = dev;
    GpuBuffer<char, bf16> memory(d, 1 << 22);
    double first = 1, second = 2;
    const auto work = [&](double* seconds) {
        device_clock_start(d, seconds);
        device_zero(d, memory.data(), memory.n);
        device_clock_stop(d);
    };
    work(&first);
    device_sync(d);
    CHECK(first == 1, "a clock ran though timing is off");
    device_timing(d, true);
    work(&first);
    work(&second);
    work(&first);
    CHECK(first == 1 && second == 2, "time was added before device_sync");
    device_sync(d);
    CHECK(first > 1 && second > 2 && first < 61 && second < 62, "%g and %g s", first, second);
    const double once = first;
    device_sync(d);
    CHECK(first == once, "time was added twice");
    for (int i = 0; i < 100; i++) {  // events are used again
        work(&second);
        if (i % 10 == 9) {
            device_sync(d);
        }
    }
    CHECK(second > 2 && first == once, "%g and %g s", first, second);
    device_timing(d, false);
    work(&first);
    device_sync(d);
    CHECK(first == once, "a clock ran after timing was switched off");
}

// A device may be opened while another is, and again after it was closed.
void open_twice() {
    GpuDevice<bf16> one;
    GpuDevice<float> two;
    if (!one.ok || !two.ok) {
        return;
    }
    GpuBuffer<float, bf16> a(one, std::vector<float>{1, 2, 3});
    GpuBuffer<float, float> b(two, std::vector<float>{4, 5, 6});
    CHECK(a.get() == (std::vector<float>{1, 2, 3}) && b.get() == (std::vector<float>{4, 5, 6}),
          "memory of another device");
    for (int i = 0; i < 3; i++) {
        GpuDevice<bf16> again;
        CHECK(again.ok, "did not open again");
        device_alloc(static_cast<Gpu<bf16>&>(again), 100, "a test");  // left to device_close
    }
    Gpu<bf16> never;
    device_close(never);
}

}  // namespace

extern const Test gpu_device_tests[] = {{"gpu_memory", memory},
                                        {"gpu_memory_arena", memory_arena},
                                        {"gpu_arena_limits", arena_limits},
                                        {"gpu_reasons", reasons},
                                        {"gpu_info", info},
                                        {"gpu_clocks", clocks},
                                        {"gpu_open_twice", open_twice},
                                        {nullptr, nullptr}};
