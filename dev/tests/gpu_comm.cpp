// Tensors over ranks on GPUs, and what goes with them: which card a rank takes, the checksum, slots that know whose
// weights they hold.
//
// The group ranks_gpu_comm runs on every rank, with any number of ranks; gpu_comm starts it with 1, 2 and 3, as far as
// there are cards. On the stand-in the streams of each rank run in an order of its own, under several seeds: work that
// does not wait for what it needs then comes too early, sooner or later. ends_gpu_comm: ranks that disagree, which the
// stand-in ends.
#include <cstdlib>
#include <memory>

#include "dev/tests/gpu.h"
#include "dev/tests/ranks.h"

namespace {

// An environment variable for the length of a scope; nullptr: not set.
struct Variable {
    std::string name, before;
    bool was_set;
    Variable(const char* n, const char* value) : name(n) {
        const char* text = getenv(n);
        was_set = text != nullptr;
        before = was_set ? text : "";
        value ? setenv(n, value, 1) : unsetenv(n);
    }
    ~Variable() { was_set ? setenv(name.c_str(), before.c_str(), 1) : unsetenv(name.c_str()); }
    Variable(const Variable&) = delete;
};

bool stand_in(const GpuInfo& info) {
    return std::string(info.name) == "stand-in";
}

// ----------------------------------------------------------------------------
// one process: the card

// Of three cards the stand-in's first is too old.
void which_card() {
    GpuDevice<bf16> here;
    if (!here.ok) {
        return;
    }
    if (!stand_in(here.info)) {
        test_skip("needs a machine with other cards");
        return;
    }
    const Variable cards("SIMT_DEVICES", "3"), capability("SIMT_CAPABILITY", "7.5,8.0,8.6");
    const Variable all("CUDA_VISIBLE_DEVICES", nullptr);
    const auto opens = [](int local_rank, int local_size, int arch, const char* what) {
        Gpu<bf16> dev;
        const std::string why = device_open(dev, 1, local_rank, local_size);
        CHECK(why.empty() && dev.info.arch == arch, "%s: '%s', sm_%d", what, why.c_str(), dev.info.arch);
        device_close(dev);
    };
    const auto refuses = [](int local_rank, int local_size, const char* part, const char* what) {
        Gpu<bf16> dev;
        const std::string why = device_open(dev, 1, local_rank, local_size);
        CHECK(text_has(why, part), "%s: '%s'", what, why.c_str());
        CHECK(!dev.state && !dev.stream, "%s: half open", what);
    };
    opens(0, 1, 80, "one rank");
    opens(0, 2, 80, "rank 0 of 2");
    opens(1, 2, 86, "rank 1 of 2");
    refuses(2, 3, "3 ranks on this machine, 2 usable GPUs: start one rank a GPU (mpirun -n 2)", "too many ranks");
    {
        const Variable chosen("CUDA_VISIBLE_DEVICES", "5,6,7");
        opens(2, 4, 80, "rank 2 of 4, which the launcher may have shown two of its own");
        opens(3, 4, 86, "rank 3 of 4, as rank 2");
        opens(1, 2, 86, "rank 1 of 2, with cards for both");
    }
    {
        const Variable two("SIMT_DEVICES", "2");
        opens(3, 4, 80, "the only one, which the launcher may have chosen");
    }
    {
        const Variable one("SIMT_DEVICES", "1");
        refuses(1, 2, "need 8.0 or newer", "an old card alone");
    }
    const Variable none("CUDA_VISIBLE_DEVICES", "");
    refuses(0, 2, "no NVIDIA GPU is visible", "no card");
}

// ----------------------------------------------------------------------------
// one process: the checksum

float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

template <class X>
uint64_t gpu_checksum(Gpu<X>& dev, const std::vector<float>& x, size_t shift) {
    GpuBuffer<float, X> at(dev, x, shift);
    const uint64_t sum = checksum(dev, at.data(), x.size());
    CHECK(at.intact(), "written outside");
    return sum;
}

void checksums() {
    GpuDevice<bf16> dev(1 << 16);
    if (!dev.ok) {
        return;
    }
    // Element i with the bits s adds the output i + 1 of splitmix64 seeded with s. Its first five for 1234567, as
    // published:
    const uint64_t published = 6457827717110365317u + 3203168211198807973u + 9817491932198370423u +
                               4593380528125082431u + 16408922859458223821u;
    CHECK(gpu_checksum<bf16>(dev, std::vector<float>(5, float_of(1234567)), 0) == published, "not the published sum");
    for (size_t n : {size_t(0), size_t(1), size_t(255), size_t(100003)}) {
        std::vector<float> x = random_values<float>(n, 5);
        uint64_t want = 0;
        for (int threads : {1, 2, 5}) {
            Cpu<float> cpu;
            device_open(cpu, threads);
            const uint64_t sum = checksum(cpu, x.data(), n);
            CHECK(threads == 1 || sum == want, "n = %zu: %d threads give another sum", n, threads);
            want = sum;
            device_close(cpu);
        }
        for (size_t shift : {0, 1, 4}) {
            CHECK(gpu_checksum<bf16>(dev, x, shift) == want, "n = %zu, shift %zu: not the CPU's", n, shift);
        }
        CHECK((n == 0) == (want == 0), "n = %zu: %llu", n, static_cast<unsigned long long>(want));
        if (n < 2) {
            continue;
        }
        const auto differs = [&](const char* what) {
            Cpu<float> cpu;
            device_open(cpu, 2);
            CHECK(checksum(cpu, x.data(), n) != want, "n = %zu: %s is not seen by the CPU", n, what);
            CHECK(gpu_checksum<bf16>(dev, x, 0) != want, "n = %zu: %s is not seen by the GPU", n, what);
            device_close(cpu);
        };
        for (const size_t i : {size_t(0), n / 2, n - 1}) {
            const float kept = x[i];
            uint32_t bits;
            memcpy(&bits, &kept, sizeof bits);
            for (int bit : {0, 17, 31}) {
                x[i] = float_of(bits ^ 1u << bit);
                differs("a flipped bit");
            }
            x[i] = kept;
        }
        std::swap(x[n / 3], x[n - 1]);
        differs("an exchange");
        std::swap(x[n / 3], x[n - 1]);
        x[7] = 0;
        want = gpu_checksum<bf16>(dev, x, 0);
        x[7] = -0.0f;
        differs("-0 in place of 0");
        x[7] = float_of(0x7fc00001);  // a NaN is like itself
        CHECK(gpu_checksum<bf16>(dev, x, 0) == gpu_checksum<bf16>(dev, x, 1), "n = %zu: NaN", n);
    }
    const std::vector<double> wide = {1.0, 1.0 + 0x1p-52};
    Cpu<double> cpu;
    device_open(cpu, 2);
    const double other[2] = {1.0, 1.0};
    CHECK(checksum(cpu, wide.data(), 2) != checksum(cpu, other, 2), "the last bit of a double is not seen");
    device_close(cpu);
}

// ----------------------------------------------------------------------------
// layers that take turns in two buffers: a linear of (32 size, 64) NF4 weights, which are the same in the 32 rows of a
// rank

constexpr int C = 64, ROWS = 32;                // of a rank
constexpr size_t SLICE = size_t(ROWS) * C / 2;  // bytes
constexpr size_t CHANNEL = 5;                   // of the input, the one that is 1

int nibble(size_t layer, int rank) {
    return int(3 * layer + 5 * size_t(rank) + 1) % 16;
}

float weight(size_t layer, int rank) {
    const std::vector<uint8_t> codes(C / 2, uint8_t(nibble(layer, rank) * 17));
    const float absmax = 1;
    Matrix w;
    w.store = Store::NF4;
    w.rows = 1;
    w.cols = C;
    w.codes = codes.data();
    w.absmax32 = &absmax;
    Cpu<float> cpu;
    device_open(cpu, 1);
    std::vector<float> row(C);
    matrix_row(cpu, row.data(), w, size_t(0));
    device_close(cpu);
    return row[CHANNEL];
}

struct Layers {
    Gpu<float>& dev;
    int size;
    GpuBuffer<float, float> x, absmax;
    std::vector<std::unique_ptr<GpuBuffer<uint8_t, float>>> buffer;

    Layers(Gpu<float>& d, int ranks)
        : dev(d), size(ranks), x(d, one_hot()), absmax(d, std::vector<float>(size_t(ranks) * ROWS, 1.0f)) {
        for (int i = 0; i < 2; i++) {
            buffer.emplace_back(new GpuBuffer<uint8_t, float>(d, size_t(size) * SLICE));
        }
        dev.gemm = GemmPath::DEQUANT;
        const LinearGroup<float> g = group(0);
        device_reserve(dev, linear_workspace(dev, g, 1));
        linear_slots_reserve(dev, linear_slot_bytes(dev, g, 1));
    }
    static std::vector<float> one_hot() {
        std::vector<float> row(C, 0.0f);
        row[CHANNEL] = 1;
        return row;
    }
    size_t width() const { return size_t(size) * ROWS; }
    LinearGroup<float> group(size_t layer) {
        LinearGroup<float> g;
        g.parts = 1;
        g.C = C;
        g.OC = int(width());
        g.part[0].module = uint32_t(7 * layer);
        Matrix& w = g.part[0].w;
        w.store = Store::NF4;
        w.rows = g.OC;
        w.cols = C;
        w.codes = buffer[layer % 2]->data();
        w.absmax32 = absmax.data();
        return g;
    }
    // Queued, not waited for.
    void forward(float* out, size_t layer) {
        const LinearInput<float, float> in = {LinearInput<float, float>::PLAIN, x.data(), C, nullptr, nullptr};
        linear_forward(dev, out, width(), static_cast<float*>(nullptr), in, group(layer), 1,
                       static_cast<const float*>(nullptr), static_cast<const Rope<float>*>(nullptr), Dropout());
    }
    void prefetch(size_t layer) { linear_prefetch(dev, group(layer), 1); }
    bool right(const float* out, size_t layer) const {
        for (size_t i = 0; i < width(); i++) {
            if (!(out[i] == weight(layer, int(i / ROWS)))) {
                return false;
            }
        }
        return true;
    }
    std::vector<uint8_t> codes(size_t layer, int rank) const {
        return std::vector<uint8_t>(SLICE, uint8_t(nibble(layer, rank) * 17));
    }
};

// Layer 2 comes to stand where layer 0 stood. What a slot holds of layer 0 is not its weights.
void slots_know_layers() {
    GpuDevice<float> dev;
    if (!dev.ok) {
        return;
    }
    Layers layers(dev, 1);
    GpuBuffer<float, float> out(dev, layers.width());
    for (size_t layer : {0, 2, 4, 2, 0}) {
        for (bool ahead : {true, false}) {
            layers.buffer[0]->set(layers.codes(layer, 0));
            if (ahead) {
                layers.prefetch(layer);
            }
            layers.forward(out.data(), layer);
            const std::vector<float> got = out.get();
            CHECK(layers.right(got.data(), layer), "layer %zu: %g, need %g", layer, double(got[0]),
                  double(weight(layer, 0)));
        }
    }
}

// ----------------------------------------------------------------------------
// ranks

// The random order in which this rank's streams go on; on a real card there is no such thing.
struct Order {
    Variable streams, seed;
    explicit Order(int number)
        : streams("SIMT_STREAMS", "queues"),
          seed("SIMT_SEED", std::to_string(1000 * test_comm.rank + number).c_str()) {}
};
constexpr int ORDERS = 8;

// This rank's card, attached. Where cards are fewer than ranks the test is skipped: not on the stand-in, where each
// process has its own.
template <class X>
struct RankDevice : Gpu<X> {
    bool ok = false;
    explicit RankDevice(size_t workspace = 0) {
        Gpu<X>& dev = *this;
        const std::string none = device_open(dev, 2, test_comm.local_rank, test_comm.local_size);
        const std::string why = none.empty() ? comm_attach(dev, test_comm) : none;
        ok = why.empty();
        if (!ok && (!none.empty() || text_has(why, "both use GPU"))) {
            test_skip(why.c_str());
        } else if (CHECK(ok, "%s", why.c_str()) && workspace > 0) {
            device_reserve(dev, workspace);
        }
    }
    ~RankDevice() {
        if (ok) {
            comm_detach(static_cast<Gpu<X>&>(*this));
        }
        device_close(static_cast<Gpu<X>&>(*this));
    }
    RankDevice(const RankDevice&) = delete;
};

// out (rows, cols) = in, by a kernel: queued, not waited for.
struct Copier {
    Gpu<float>& dev;
    GpuBuffer<int32_t, float> rows;
    static std::vector<int32_t> numbered(size_t n) {
        std::vector<int32_t> list(n);
        for (size_t i = 0; i < n; i++) {
            list[i] = int32_t(i);
        }
        return list;
    }
    Copier(Gpu<float>& d, size_t greatest) : dev(d), rows(d, numbered(greatest)) {}
    void copy(float* out, const float* in, size_t n, int cols) {
        Matrix w;
        w.store = Store::F32;
        w.rows = int(n);
        w.cols = cols;
        w.data = in;
        embedding_forward(dev, out, rows.data(), w, n);
    }
};

std::vector<float> of_rank(size_t n, int rank, uint64_t what) {
    return random_values<float>(n, 100 * what + uint64_t(rank), 1 + rank);
}

// x_0 + x_1 + ..., each sum rounded.
std::vector<float> ordered_sum(size_t n, uint64_t what) {
    std::vector<float> sum = of_rank(n, 0, what);
    for (int r = 1; r < test_comm.size; r++) {
        const std::vector<float> x = of_rank(n, r, what);
        for (size_t i = 0; i < n; i++) {
            sum[i] += x[i];
        }
    }
    return sum;
}

// A real ring begins with another rank for each part. All its orders of R terms stay within (R - 1) rounding errors of
// the sum of magnitudes, at most R (R + 1) / 2; so do two of them within twice that.
void check_sum(const char* what, const std::vector<float>& got, const std::vector<float>& want, bool exact) {
    const double R = test_comm.size, bound = exact || R < 3 ? 0 : 2 * (R - 1) * 0x1p-24 * R * (R + 1) / 2;
    CHECK_ERROR(what, greatest_error(got.data(), want.data(), want.size()), bound);
}

// Two sums under way, of what kernels have just written, read by kernels that are queued behind.
void ranks_sum() {
    const struct {
        size_t rows;
        int cols;
    } shapes[] = {{1, 1}, {5, 51}, {1003, 70}};
    RankDevice<float> dev(1 << 16);
    if (!dev.ok) {
        return;
    }
    for (const auto& s : shapes) {
        const size_t n = s.rows * size_t(s.cols);
        const std::vector<float> want_a = ordered_sum(n, 1), want_b = ordered_sum(n, 2);
        Copier copier(dev, s.rows);
        GpuBuffer<float, float> a(dev, of_rank(n, dev.comm->rank, 1)), b(dev, of_rank(n, dev.comm->rank, 2));
        for (int number = 0; number < (n > 1000 ? 2 : ORDERS); number++) {
            const Order order(number);
            GpuBuffer<float, float> x(dev, n), y(dev, n), x_after(dev, n), y_after(dev, n), other(dev, n);
            copier.copy(x.data(), a.data(), s.rows, s.cols);
            comm_sum_begin(dev, x.data(), n);
            copier.copy(other.data(), a.data(), s.rows, s.cols);
            copier.copy(y.data(), b.data(), s.rows, s.cols);
            comm_sum_begin(dev, y.data(), n);
            copier.copy(other.data(), b.data(), s.rows, s.cols);
            comm_sum_finish(dev);
            copier.copy(x_after.data(), x.data(), s.rows, s.cols);
            copier.copy(y_after.data(), y.data(), s.rows, s.cols);
            const std::vector<float> got_a = x_after.get(), got_b = y_after.get();
            check_sum("first", got_a, want_a, stand_in(dev.info));
            check_sum("second", got_b, want_b, stand_in(dev.info));
            CHECK(other.get() == b.get(), "work beside the sums");
            CHECK(x.intact() && y.intact(), "written outside");
            const uint64_t mine = checksum(dev, x_after.data(), n);
            std::vector<uint64_t> all(size_t(dev.comm->size));
            comm_all_gather(*dev.comm, all.data(), &mine, sizeof mine);
            for (uint64_t sum : all) {
                CHECK(sum == mine, "ranks have different sums");
            }
        }
    }
}

// The layers come to the two buffers one or two ahead of their use. AS_NEEDED: their weights are read by the main
// stream alone. AHEAD: while one layer computes, the next one's weights go into a slot aside. GONE: so, and the buffer
// is given away at once: only the slot still has the weights when they are used.
enum Way { AS_NEEDED, AHEAD, GONE };
void gather_layers(Gpu<float>& dev, Way way) {
    constexpr size_t L = 8;
    const Comm& comm = *dev.comm;
    Layers layers(dev, comm.size);
    std::vector<uint8_t> mine;
    for (size_t l = 0; l < L; l++) {
        const std::vector<uint8_t> codes = layers.codes(l, comm.rank);
        mine.insert(mine.end(), codes.begin(), codes.end());
    }
    GpuBuffer<uint8_t, float> slices(dev, mine);
    GpuBuffer<float, float> out(dev, L * layers.width());
    const auto begin = [&](size_t l) {
        if (l < L) {
            comm_gather_begin(dev, int(l % 2), layers.buffer[l % 2]->data(), slices.data() + l * SLICE, SLICE);
        }
    };
    const auto finish = [&](size_t l) {
        if (l < L) {
            comm_gather_finish(dev, int(l % 2));
        }
    };
    begin(0);
    begin(1);
    finish(0);
    for (size_t l = 0; l < L; l++) {
        if (way == AHEAD && l + 1 < L) {
            finish(l + 1);
            layers.prefetch(l + 1);
        } else if (way != AHEAD) {
            finish(l);
        }
        if (way == GONE) {
            layers.prefetch(l);
            begin(l + 2);
        }
        layers.forward(out.data() + l * layers.width(), l);
        if (way != GONE) {
            begin(l + 2);
        }
    }
    const std::vector<float> got = out.get();
    for (size_t l = 0; l < L; l++) {
        CHECK(layers.right(got.data() + l * layers.width(), l), "way %d, layer %zu: not its weights", int(way), l);
    }
    CHECK(layers.buffer[0]->intact() && layers.buffer[1]->intact() && out.intact(), "written outside");
    CHECK(slices.get() == mine, "the slices were written");
}
void ranks_gather() {
    for (int number = 0; number < ORDERS; number++) {
        const Order order(number);
        RankDevice<float> dev;
        for (Way way : {AS_NEEDED, AHEAD, GONE}) {
            if (dev.ok) {
                gather_layers(dev, way);
            }
        }
    }
}

// What a kernel has just written goes to all, and is there when the call returns.
void ranks_broadcast() {
    const size_t rows = 9;
    const int cols = 13;
    RankDevice<float> dev;
    if (!dev.ok) {
        return;
    }
    Copier copier(dev, rows);
    const size_t n = rows * size_t(cols);
    GpuBuffer<float, float> own(dev, of_rank(n, dev.comm->rank, 3));
    for (int number = 0; number < ORDERS; number++) {
        const Order order(number);
        for (int root = 0; root < dev.comm->size; root++) {
            GpuBuffer<float, float> x(dev, n);
            copier.copy(x.data(), own.data(), rows, cols);
            comm_broadcast_device(dev, x.data(), n * sizeof(float), root);
            CHECK(x.get() == of_rank(n, root, 3), "order %d: not what rank %d has", number, root);
            CHECK(x.intact(), "written outside");
        }
    }
}

// Every second rank has a piece for each.
void ranks_exchange() {
    const int cols = 20;
    RankDevice<float> dev;
    if (!dev.ok) {
        return;
    }
    const int R = dev.comm->size, rank = dev.comm->rank;
    const size_t all = size_t(R) * cols;
    Copier copier(dev, size_t(R));
    GpuBuffer<float, float> own(dev, of_rank(all, rank, 4));
    for (int number = 0; number < ORDERS; number++) {
        const Order order(number);
        GpuBuffer<float, float> pieces(dev, all), came(dev, all);
        std::vector<void*> from;
        for (int r = 0; r < R; r++) {
            from.push_back(r % 2 == 0 ? came.data() + r * cols : nullptr);
        }
        copier.copy(pieces.data(), own.data(), size_t(R), cols);
        comm_exchange_device(dev, rank % 2 == 0 ? pieces.data() : nullptr, from.data(), cols * sizeof(float));
        const std::vector<float> got = came.get();
        for (int r = 0; r < R; r++) {
            const std::vector<float> sent = of_rank(all, r, 4);
            for (size_t i = 0; i < size_t(cols); i++) {
                const float g = got[size_t(r) * cols + i];
                CHECK(r % 2 == 0 ? g == sent[size_t(rank) * cols + i] : std::isnan(g), "order %d: from rank %d: %g",
                      number, r, double(g));
            }
        }
        CHECK(came.intact(), "written outside");
    }
}

// A rank that waits for others on the host while it has sums queued; the others wait for those. On a card they run; the
// stand-in has to see to it.
void ranks_host_waits() {
    RankDevice<float> dev;
    if (!dev.ok) {
        return;
    }
    for (int number = 0; number < ORDERS; number++) {
        const Order order(number);
        GpuBuffer<float, float> x(dev, of_rank(33, dev.comm->rank, 5));
        comm_sum_begin(dev, x.data(), x.n);
        comm_sum_finish(dev);
        if (dev.comm->rank % 2 == 0) {
            check_sum("sum", x.get(), ordered_sum(33, 5), stand_in(dev.info));
        }
        comm_barrier(*dev.comm);
        check_sum("sum", x.get(), ordered_sum(33, 5), stand_in(dev.info));
    }
}

void ranks_attach() {
    const Comm& comm = test_comm;
    RankDevice<bf16> device;
    if (!device.ok) {
        return;
    }
    Gpu<bf16>& dev = device;
    comm_detach(dev);
    // Without ranks nothing is done, and everything may be called that a program of one process calls.
    GpuBuffer<float, bf16> x(dev, std::vector<float>{1, 2, 3});
    CHECK(comm_attach(dev, Comm()).empty() && !dev.comm && !dev.ranks, "attached to nobody");
    CHECK(comm_device_bytes(dev, 0, 0) == 0, "memory for nobody");
    comm_sum_begin(dev, x.data(), 3);
    comm_sum_finish(dev);
    comm_detach(dev);
    CHECK(x.get() == (std::vector<float>{1, 2, 3}), "a sum over nobody");
    for (int time = 0; time < 2; time++) {
        const std::string why = comm_attach(dev, comm);
        CHECK(why.empty() && dev.comm == &comm && dev.ranks, "'%s'", why.c_str());
        // By what NCCL was seen to take: 0.2 GB alone, 1.1 GB on eight H100 for rings of 24 channels.
        const size_t bytes = comm_device_bytes(dev, comm.size, comm.local_size);
        CHECK(bytes > size_t(100) << 20 && bytes < (size_t(300) + 60 * size_t(comm.local_size)) << 20, "%zu bytes",
              bytes);
        x.set({1, 2, 3});
        comm_sum_begin(dev, x.data(), 3);
        comm_sum_finish(dev);
        const float R = float(comm.size);
        CHECK(x.get() == (std::vector<float>{R, 2 * R, 3 * R}), "a sum of bf16's gradients");
        comm_detach(dev);
        CHECK(!dev.comm && !dev.ranks, "still attached");
    }
    if (!stand_in(dev.info)) {
        return;
    }
    {
        const Variable fails("SIMT_NCCL_FAILS", "1");
        const std::string why = comm_attach(dev, comm);
        CHECK(text_has(why, "NCCL: ncclCommInitRankConfig: unhandled system error"), "'%s'", why.c_str());
        CHECK(!dev.comm && !dev.ranks, "half attached");
    }
    const Variable same("SIMT_BUS_ID", "0000:17:00.0");
    const std::string why = comm_attach(dev, comm);
    const std::string part = "ranks 0 and 1 both use GPU 0 (0000:17:00.0) of " + comm_host(comm) +
                             ": start one rank a GPU there (mpirun -n 1)";
    CHECK(comm.size == 1 ? why.empty() : text_has(why, part), "'%s'", why.c_str());
    CHECK((comm.size == 1) == (dev.ranks != nullptr), "half attached");
    comm_detach(dev);
}

// A rank that leaves with a sum queued that nobody else knows of does not wait for the others.
void ranks_abandon() {
    const Comm& comm = test_comm;
    {
        GpuDevice<float> device;
        if (!device.ok) {
            return;
        }
        if (!stand_in(device.info)) {
            return;  // would be luck: where it waits depends on how far NCCL has come
        }
        const Order order(1);
        Gpu<float>& dev = device;
        const std::string why = comm_attach(dev, comm);
        CHECK(why.empty(), "'%s'", why.c_str());
        float* x = static_cast<float*>(device_alloc(dev, 40, "a test"));
        if (comm.rank == 0) {
            comm_sum_begin(dev, x, 10);
            comm_sum_finish(dev);
        }
    }
    comm_barrier(comm);
}

// ----------------------------------------------------------------------------
// on every rank, and it ends them: a real library would wait for ever, or add what does not belong together

template <class Fn>
void disagree(const Fn& fn) {
    RankDevice<float> dev;
    if (!dev.ok || !stand_in(dev.info)) {
        test_skip("only the stand-in notices");
        return;
    }
    GpuBuffer<float, float> x(dev, std::vector<float>(64, 1.0f));
    std::vector<void*> from(size_t(test_comm.size), nullptr);
    fn(static_cast<Gpu<float>&>(dev), x.data(), from.data());
    device_sync(static_cast<Gpu<float>&>(dev));
}
void different_counts() {
    disagree([](Gpu<float>& dev, float* x, void**) { comm_sum_begin(dev, x, test_comm.rank == 0 ? 64 : 63); });
}
void different_order() {
    disagree([](Gpu<float>& dev, float* x, void**) {
        if (test_comm.rank != 0) {
            comm_broadcast_device(dev, x, 16, 0);
        }
        comm_sum_begin(dev, x, 64);
    });
}
void nobody_receives() {
    disagree([](Gpu<float>& dev, float* x, void** from) {
        from[1] = x + 32;
        comm_exchange_device(dev, test_comm.rank == 0 ? x : nullptr, from, 16);
    });
}

// ----------------------------------------------------------------------------
// on one process, which starts ranks

// The machine has a card for each of n ranks; else the test is skipped, and returns.
bool cards_for(int n) {
    GpuDevice<bf16> here;
    if (!here.ok || stand_in(here.info)) {
        return here.ok;
    }
    const Variable all("CUDA_VISIBLE_DEVICES", nullptr);  // set, it may be a launcher's choice, which opens
    Gpu<bf16> dev;
    int cards = 1;  // what opens for one rank of so many is the only one
    sscanf(device_open(dev, 1, 0, 1 << 20).c_str(), "%*d ranks on this machine, %d usable", &cards);
    device_close(dev);
    if (cards < n) {
        test_skip((std::to_string(n) + " ranks, and GPUs for " + std::to_string(cards)).c_str());
    }
    return cards >= n;
}
template <int N>
void inner() {
    if (cards_for(N)) {
        check_inner(N, "ranks_gpu_comm/", "", 100);
    }
}

void ranks_that_disagree() {
    GpuDevice<bf16> here;
    if (here.ok && !stand_in(here.info)) {
        test_skip("only the stand-in notices");
        return;
    }
    if (!here.ok || !ranks_can_start()) {
        return;
    }
    const struct {
        const char *test, *message;
    } list[] = {{"different_counts", "(type 7, count 64, root or operation 0)"},
                {"different_order", "is in ncclBroadcast"},
                {"nobody_receives", "is not what that receives"}};
    for (const auto& l : list) {
        std::string out;
        const int code = run_ranks(&out, 2, this_program() + " ends_gpu_comm/" + l.test);
        CHECK(code != 0 && code != 124 && text_has(out, l.message), "%s: exit %d:\n%s", l.test, code, out.c_str());
    }
}

}  // namespace

extern const Test gpu_comm_tests[], ranks_gpu_comm_tests[], ends_gpu_comm_tests[];
const Test gpu_comm_tests[] = {{"gpu_which_card", which_card},
                               {"gpu_checksums", checksums},
                               {"gpu_slots_know_layers", slots_know_layers},
                               {"gpu_ranks_1", inner<1>},
                               {"gpu_ranks_2", inner<2>},
                               {"gpu_ranks_3", inner<3>},
                               {"gpu_ranks_that_disagree", ranks_that_disagree},
                               {nullptr, nullptr}};
const Test ranks_gpu_comm_tests[] = {{"gpu_attach", ranks_attach},     {"gpu_sum", ranks_sum},
                                     {"gpu_gather", ranks_gather},     {"gpu_broadcast", ranks_broadcast},
                                     {"gpu_exchange", ranks_exchange}, {"gpu_host_waits", ranks_host_waits},
                                     {"gpu_abandon", ranks_abandon},   {nullptr, nullptr}};
const Test ends_gpu_comm_tests[] = {{"different_counts", different_counts},
                                    {"different_order", different_order},
                                    {"nobody_receives", nobody_receives},
                                    {nullptr, nullptr}};
