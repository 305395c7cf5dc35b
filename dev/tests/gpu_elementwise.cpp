// The GPU ops that treat each row, or each element, alone: embedding, RMSNorm, RoPE, SwiGLU, dropout. Against the CPU's
// in double, for both activation types, on widths that take the path of 16-byte accesses and widths that do not.
#include <algorithm>

#include "dev/tests/gpu.h"

namespace {

const size_t row_counts[] = {1, 33, 70};
const size_t widths[] = {24, 48, 101, 112, 576};

// N rows of `width` on the device, `gap` poisoned elements behind each, which an op may neither read nor write.
template <class X, class D>
struct Rows {
    GpuBuffer<X, D> buffer;
    size_t N, width, stride;

    Rows(Gpu<D>& dev, size_t rows, size_t columns, size_t gap = 0, size_t shift = 0)
        : buffer(dev, rows * (columns + gap), shift), N(rows), width(columns), stride(columns + gap) {}
    Rows(Gpu<D>& dev, size_t rows, const std::vector<double>& values, size_t gap = 0, size_t shift = 0)
        : Rows(dev, rows, values.size() / rows, gap, shift) {
        set(values);
    }
    void set(const std::vector<double>& values) {
        std::vector<X> all = buffer.get();
        for (size_t i = 0; i < N * width; i++) {
            all[i / width * stride + i % width] = stored<X>(values[i]);
        }
        buffer.set(all);
    }
    X* data() { return buffer.data(); }
    std::vector<X> get(const std::string& what) {
        CHECK(buffer.intact(), "%s: written outside", what.c_str());
        const std::vector<X> all = buffer.get();
        std::vector<X> out;
        bool gaps = true;
        for (size_t i = 0; i < all.size(); i++) {
            const unsigned char* byte = reinterpret_cast<const unsigned char*>(&all[i]);
            if (i % stride < width) {
                out.push_back(all[i]);
            } else {
                gaps = gaps && std::all_of(byte, byte + sizeof(X), [](unsigned char b) { return b == 0xff; });
            }
        }
        CHECK(gaps, "%s: written behind a row", what.c_str());
        return out;
    }
};

template <class X>
bool equal_bits(const std::vector<X>& a, const std::vector<X>& b) {
    return a.size() == b.size() && same_bits(a.data(), b.data(), a.size());
}

template <class X>
std::string shape_name(size_t N, size_t C, size_t shift) {
    return (sizeof(X) == 2 ? "bf16 " : "float ") + std::to_string(N) + "x" + std::to_string(C) +
           (shift > 0 ? " off the grid" : "");
}

// fn(N, C, gap, shift) over aligned rows, rows with gaps, and rows that begin off the grid of 16 bytes.
template <class Fn>
void for_each_layout(const Fn& fn) {
    for (size_t N : row_counts) {
        for (size_t C : widths) {
            fn(N, C, size_t(0), size_t(0));
            fn(N, C, size_t(16), size_t(0));
            fn(N, C, size_t(3), size_t(1));
        }
    }
}

// Rows longer than what a block keeps: several parts of a row in a grid, several walks over it, with and without
// 16-byte accesses.
template <class Fn>
void for_each_long_layout(const Fn& fn) {
    fn(size_t(2), size_t(1100), size_t(0), size_t(0));
    fn(size_t(2), size_t(2501), size_t(0), size_t(0));
    fn(size_t(1), size_t(8448), size_t(0), size_t(0));
    fn(size_t(1), size_t(16640), size_t(8), size_t(0));
}

template <class Fn>
void for_both_types(const Fn& fn) {
    fn(bf16());
    fn(float());
}

// ---- embedding

template <class X>
void embedding_of_type() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    const size_t V = 9;
    const std::vector<int32_t> tokens = {8, 0, 3, 3, 7};
    const size_t N = tokens.size();
    GpuBuffer<int32_t, X> places(dev, tokens);
    for (size_t C : {size_t(24), size_t(101), size_t(2052)}) {
        for (size_t shift : {0, 1}) {
            std::vector<float> wide = random_values<float>(V * C, 1, 3);
            std::vector<uint16_t> half(V * C), brain(V * C);
            for (size_t i = 0; i < wide.size(); i++) {
                half[i] = uint16_t(random_bits(2, STREAM_TOKENS, 0, i) & 0xfbff);  // no infinity, no NaN
                brain[i] = to_bf16(wide[i]).bits;
            }
            GpuBuffer<float, X> wide_table(dev, wide, shift);
            GpuBuffer<uint16_t, X> half_table(dev, half, shift), brain_table(dev, brain, shift);
            const auto check = [&](Store store, const void* data, const char* name, const auto& value) {
                Matrix wte;
                wte.store = store;
                wte.rows = int(V);
                wte.cols = int(C);
                wte.data = data;
                Rows<X, X> out(dev, N, C);
                embedding_forward(dev, out.data(), places.data(), wte, N);
                const std::vector<X> got = out.get(name);
                size_t wrong = 0;
                for (size_t i = 0; i < got.size(); i++) {
                    const X want = stored<X>(double(value(size_t(tokens[i / C]) * C + i % C)));
                    wrong += !same_bits(&got[i], &want, 1);
                }
                CHECK(wrong == 0, "%s of %s, %zu elements differ", name, shape_name<X>(N, C, shift).c_str(), wrong);
            };
            check(Store::F32, wide_table.data(), "F32", [&](size_t i) { return wide[i]; });
            check(Store::F16, half_table.data(), "F16", [&](size_t i) { return half_to_float(half[i]); });
            check(Store::BF16, brain_table.data(), "BF16", [&](size_t i) { return to_float(bf16{brain[i]}); });
        }
    }
    Rows<X, X> none(dev, 0, 24);
    embedding_forward(dev, none.data(), places.data(), Matrix(), 0);
    none.get("no rows");
}

void embedding_rows() {
    for_both_types([](auto x) { embedding_of_type<decltype(x)>(); });
}

// All 65,536 numbers of half precision, infinities and NaNs among them, bit for bit.
void embedding_half() {
    GpuDevice<float> dev;
    if (!dev.ok) {
        return;
    }
    const size_t V = 512, C = 128;
    std::vector<uint16_t> table(V * C);
    std::vector<int32_t> tokens(V);
    std::vector<float> want(V * C);
    for (size_t i = 0; i < table.size(); i++) {
        table[i] = uint16_t(i);
        want[i] = half_to_float(table[i]);
        tokens[i / C] = int32_t(i / C);
    }
    GpuBuffer<uint16_t, float> data(dev, table);
    GpuBuffer<int32_t, float> places(dev, tokens);
    Matrix wte;
    wte.store = Store::F16;
    wte.rows = int(V);
    wte.cols = int(C);
    wte.data = data.data();
    GpuBuffer<float, float> out(dev, V * C);
    embedding_forward(dev, out.data(), places.data(), wte, V);
    CHECK(equal_bits(out.get(), want), "half precision is widened wrongly");
}

// ---- RMSNorm

// Where there is one row, the last bit of its rstd is chance: the rstds of all shapes are judged together.
struct Collected {
    std::vector<double> got, plain, exact;
    template <class T>
    void add(const std::vector<T>& g, const std::vector<double>& p, const std::vector<double>& e) {
        const std::vector<double> n = numbers(g);
        got.insert(got.end(), n.begin(), n.end());
        plain.insert(plain.end(), p.begin(), p.end());
        exact.insert(exact.end(), e.begin(), e.end());
    }
};

template <class X>
void rmsnorm_of_shape(GpuDevice<X>& dev, size_t N, size_t C, size_t gap, size_t shift, Collected& rstds) {
    DoubleDevice cpu(1);
    const double eps = 1e-5;
    const std::string name = shape_name<X>(N, C, shift);
    const std::vector<double> x = random_stored<X>(N * C, 1, 3), dout = random_stored<X>(N * C, 2);
    const std::vector<double> before = random_stored<X>(N * C, 3), w = random_stored<X>(C, 4);
    std::vector<double> rstd(N), plain_rstd(N);
    rmsnorm_rstd(cpu, rstd.data(), x.data(), N, int(C), eps);
    for (size_t row = 0; row < N; row++) {
        float sum = 0;
        for (size_t c = 0; c < C; c++) {
            sum += float(x[row * C + c]) * float(x[row * C + c]);
        }
        plain_rstd[row] = double(1 / std::sqrt(sum / float(C) + float(eps)));
    }
    Rows<X, X> in(dev, N, x, 0, shift), grad(dev, N, dout, 0, shift);
    GpuBuffer<float, X> weight(dev, stored_values<float>(w), shift), got_rstd(dev, N);
    rmsnorm_rstd(dev, got_rstd.data(), in.data(), N, int(C), eps);
    CHECK(got_rstd.intact(), "%s: rstd: written outside", name.c_str());
    rstds.add(got_rstd.get(), plain_rstd, rstd);

    // forward and backward from the same rstd, rounded to float, for all three
    for (double& r : rstd) {
        r = rounded<float>(r);
    }
    GpuBuffer<float, X> r(dev, stored_values<float>(rstd));
    std::vector<double> out(N * C), plain(N * C), dx = before, plain_dx(N * C);
    rmsnorm_forward(cpu, out.data(), x.data(), rstd.data(), w.data(), N, int(C));
    rmsnorm_backward(cpu, dx.data(), C, dout.data(), x.data(), rstd.data(), w.data(), N, int(C));
    for (size_t row = 0; row < N; row++) {
        const float rf = float(rstd[row]);
        float dot = 0;
        for (size_t i = row * C; i < (row + 1) * C; i++) {
            plain[i] = rounded<X>(rounded<X>(double(float(x[i]) * rf)) * w[i % C]);
            dot += float(rounded<X>(dout[i] * w[i % C])) * float(x[i]);
        }
        for (size_t i = row * C; i < (row + 1) * C; i++) {
            const float d = float(rounded<X>(dout[i] * w[i % C]));
            plain_dx[i] =
                rounded<X>(before[i] + rounded<X>(double(rf * (d - float(x[i]) * rf * rf * (dot / float(C))))));
        }
    }
    Rows<X, X> norm(dev, N, C, gap, shift), again(dev, N, C, gap, shift);
    rmsnorm_forward(dev, norm.data(), norm.stride, in.data(), nullptr, r.data(), weight.data(), N, int(C));
    rmsnorm_forward(dev, again.data(), norm.stride, in.data(), nullptr, r.data(), weight.data(), N, int(C));
    const std::vector<X> got = norm.get(name + ": out");
    check_yardstick<X>(name + ": out", numbers(got), plain, out);
    CHECK(equal_bits(got, again.get(name)), "%s: out has other bits the second time", name.c_str());

    Rows<X, X> d(dev, N, before, gap, shift), d2(dev, N, before, gap, shift);
    rmsnorm_backward(dev, d.data(), d.stride, grad.data(), in.data(), r.data(), weight.data(), N, int(C));
    rmsnorm_backward(dev, d2.data(), d.stride, grad.data(), in.data(), r.data(), weight.data(), N, int(C));
    const std::vector<X> got_dx = d.get(name + ": dx");
    check_yardstick<X>(name + ": dx", numbers(got_dx), plain_dx, dx);
    CHECK(equal_bits(got_dx, d2.get(name)), "%s: dx has other bits the second time", name.c_str());
}

template <class X>
void rmsnorm_of_type() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    Collected rstds;
    const auto shape = [&](size_t N, size_t C, size_t gap, size_t shift) {
        rmsnorm_of_shape<X>(dev, N, C, gap, shift, rstds);
    };
    for_each_layout(shape);
    for_each_long_layout(shape);
    check_yardstick<float>(shape_name<X>(0, 0, 0) + " rstd", rstds.got, rstds.plain, rstds.exact);
    const float one = 1;
    GpuBuffer<float, X> r(dev, std::vector<float>(24, one));
    Rows<X, X> none(dev, 0, 24);
    rmsnorm_rstd(dev, r.data(), none.data(), 0, 24, 1e-5);
    rmsnorm_forward(dev, none.data(), 24, none.data(), nullptr, r.data(), r.data(), 0, 24);
    rmsnorm_backward(dev, none.data(), 24, none.data(), none.data(), r.data(), r.data(), 0, 24);
    none.get("no rows");
}

void rmsnorm() {
    for_both_types([](auto x) { rmsnorm_of_type<decltype(x)>(); });
}

// x rstd is rounded to bf16 before the weight is applied: that shows in the last bit of some elements.
void rmsnorm_rounds_twice() {
    GpuDevice<bf16> dev;
    if (!dev.ok) {
        return;
    }
    const size_t C = 32;
    std::vector<double> x = random_stored<bf16>(C, 1, 3), w = random_stored<bf16>(C, 2, 3);
    const float rstd = 0.7310586f;
    std::vector<bf16> want;
    size_t differ = 0;
    for (size_t c = 0; c < C; c++) {
        want.push_back(stored<bf16>(rounded<bf16>(double(float(x[c]) * rstd)) * w[c]));
        differ += want.back().bits != stored<bf16>(double(float(x[c]) * rstd * float(w[c]))).bits;
    }
    CHECK(differ > 0, "the data do not tell the two orders of rounding apart");
    Rows<bf16, bf16> in(dev, 1, x), out(dev, 1, C);
    GpuBuffer<float, bf16> r(dev, std::vector<float>{rstd}), weight(dev, stored_values<float>(w));
    rmsnorm_forward(dev, out.data(), C, in.data(), nullptr, r.data(), weight.data(), 1, int(C));
    CHECK(equal_bits(out.get("out"), want), "not rounded as Hugging Face rounds");
}

template <class X>
void rmsnorm_gather_of_type() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    for (size_t C : {size_t(48), size_t(101)}) {
        const size_t N = 9;
        const std::vector<int32_t> rows = {8, 0, 4, 4, 7, 1};
        const std::vector<double> x = random_stored<X>(N * C, 1), w = random_stored<X>(C, 2);
        const std::vector<float> rstd = random_values<float>(N, 3);
        Rows<X, X> in(dev, N, x), all(dev, N, C), some(dev, rows.size(), C, 8);
        GpuBuffer<float, X> r(dev, rstd), weight(dev, stored_values<float>(w));
        GpuBuffer<int32_t, X> places(dev, rows);
        rmsnorm_forward(dev, all.data(), C, in.data(), nullptr, r.data(), weight.data(), N, int(C));
        rmsnorm_forward(dev, some.data(), some.stride, in.data(), places.data(), r.data(), weight.data(), rows.size(),
                        int(C));
        const std::vector<X> whole = all.get("all"), got = some.get("some");
        for (size_t i = 0; i < rows.size(); i++) {
            CHECK(same_bits(&got[i * C], &whole[size_t(rows[i]) * C], C), "%s: row %zu is not row %d",
                  shape_name<X>(N, C, 0).c_str(), i, rows[i]);
        }
    }
}

void rmsnorm_gather() {
    for_both_types([](auto x) { rmsnorm_gather_of_type<decltype(x)>(); });
}

// ---- RoPE

template <class X>
void rope_of_shape(GpuDevice<X>& dev, size_t N, int HS, int heads, size_t gap, size_t shift) {
    DoubleDevice cpu(1);
    const size_t half = size_t(HS) / 2, width = size_t(heads) * size_t(HS), positions = 40;
    const std::string name = shape_name<X>(N, width, shift) + ", head of " + std::to_string(HS);
    std::vector<double> cosine(positions * half), sine(positions * half);
    for (size_t i = 0; i < cosine.size(); i++) {
        const double angle = double(i / half) * std::pow(500000.0, -2.0 * double(i % half) / HS);
        cosine[i] = rounded<float>(std::cos(angle));
        sine[i] = rounded<float>(std::sin(angle));
    }
    std::vector<int32_t> place(N);
    for (size_t i = 0; i < N; i++) {
        place[i] = int32_t((i * 7 + 3) % positions);
    }
    const std::vector<double> x = random_stored<X>(N * width, 1);
    GpuBuffer<float, X> c(dev, stored_values<float>(cosine)), s(dev, stored_values<float>(sine));
    GpuBuffer<int32_t, X> places(dev, place);
    Rope<double> exact_rope;
    exact_rope.cos = cosine.data();
    exact_rope.sin = sine.data();
    exact_rope.positions = place.data();
    Rope<float> rope;
    rope.cos = c.data();
    rope.sin = s.data();
    rope.positions = places.data();
    exact_rope.heads = rope.heads = heads;
    exact_rope.HS = rope.HS = HS;
    for (bool back : {false, true}) {
        std::vector<double> exact = x, plain(N * width);
        back ? rope_backward(cpu, exact.data(), width, exact_rope, N)
             : rope_forward(cpu, exact.data(), width, exact_rope, N);
        for (size_t i = 0; i < N * width; i++) {
            const size_t in_head = i % size_t(HS), pair = in_head % half;
            const size_t at = size_t(place[i / width]) * half + pair;
            const double other = in_head < half ? -x[i + half] : x[i - half];
            plain[i] = rounded<X>(rounded<X>(x[i] * cosine[at]) + rounded<X>(other * (back ? -sine[at] : sine[at])));
        }
        Rows<X, X> q(dev, N, x, gap, shift), again(dev, N, x, gap, shift);
        for (Rows<X, X>* rows : {&q, &again}) {
            back ? rope_backward(dev, rows->data(), q.stride, rope, N)
                 : rope_forward(dev, rows->data(), q.stride, rope, N);
        }
        const std::vector<X> got = q.get(name);
        check_yardstick<X>(name + (back ? ", back" : ""), numbers(got), plain, exact);
        CHECK(equal_bits(got, again.get(name)), "%s: other bits the second time", name.c_str());
    }
}

template <class X>
void rope_of_type() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    for (size_t N : row_counts) {
        for (int HS : {6, 32, 64, 80, 128}) {
            rope_of_shape(dev, N, HS, 3, 0, 0);
            rope_of_shape(dev, N, HS, 3, 64, 0);  // the values behind the queries and keys
            rope_of_shape(dev, N, HS, 1, 5, 1);
        }
    }
    rope_of_shape(dev, 2, 128, 40, 1024, 0);  // more pieces than two a thread of one block
    rope_of_shape(dev, 2, 128, 33, 1, 0);
    Rows<X, X> none(dev, 0, 64);
    Rope<float> rope;
    rope.heads = 1;
    rope.HS = 64;
    rope_forward(dev, none.data(), 64, rope, 0);
    none.get("no rows");
}

void rope() {
    for_both_types([](auto x) { rope_of_type<decltype(x)>(); });
}

// ---- SwiGLU

template <class X>
void swiglu_of_shape(GpuDevice<X>& dev, size_t N, size_t F, size_t gap, size_t shift) {
    DoubleDevice cpu(1);
    const std::string name = shape_name<X>(N, F, shift);
    const std::vector<double> in = random_stored<X>(N * 2 * F, 1, 8), dout = random_stored<X>(N * F, 2);
    std::vector<double> out(N * F), d(N * 2 * F), plain(N * F), plain_d(N * 2 * F);
    swiglu_forward(cpu, out.data(), in.data(), N, int(F));
    swiglu_backward(cpu, d.data(), 2 * F, dout.data(), in.data(), N, int(F));
    for (size_t i = 0; i < N * F; i++) {
        const size_t at = i / F * 2 * F + i % F;
        const float g = float(in[at]), s = 1 / (1 + std::exp(-g));
        const double silu = rounded<X>(double(g / (1 + std::exp(-g)))), dsilu = rounded<X>(dout[i] * in[at + F]);
        plain[i] = rounded<X>(silu * in[at + F]);
        plain_d[at] = rounded<X>(double(float(dsilu) * s * (1 + g * (1 - s))));
        plain_d[at + F] = rounded<X>(dout[i] * silu);
    }
    Rows<X, X> gate_up(dev, N, in, 0, shift), grad(dev, N, dout, 0, shift);
    Rows<X, X> y(dev, N, F, gap, shift), y2(dev, N, F, gap, shift), dx(dev, N, 2 * F, gap, shift);
    swiglu_forward(dev, y.data(), y.stride, gate_up.data(), N, int(F));
    swiglu_forward(dev, y2.data(), y.stride, gate_up.data(), N, int(F));
    swiglu_backward(dev, dx.data(), dx.stride, grad.data(), gate_up.data(), N, int(F));
    const std::vector<X> got = y.get(name + ": out"), got_d = dx.get(name + ": dgate_up");
    check_yardstick<X>(name + ": out", numbers(got), plain, out);
    check_yardstick<X>(name + ": dgate_up", numbers(got_d), plain_d, d);
    CHECK(equal_bits(got, y2.get(name)), "%s: out has other bits the second time", name.c_str());
    // in place, as the comment at the kernel allows, and so a second time
    swiglu_backward(dev, gate_up.data(), 2 * F, grad.data(), gate_up.data(), N, int(F));
    CHECK(equal_bits(got_d, gate_up.get(name)), "%s: in place dgate_up has other bits", name.c_str());
}

template <class X>
void swiglu_of_type() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    const auto shape = [&](size_t N, size_t F, size_t gap, size_t shift) { swiglu_of_shape<X>(dev, N, F, gap, shift); };
    for_each_layout(shape);
    for_each_long_layout(shape);
    Rows<X, X> none(dev, 0, 24);
    swiglu_forward(dev, none.data(), 24, none.data(), 0, 24);
    swiglu_backward(dev, none.data(), 48, none.data(), none.data(), 0, 24);
    none.get("no rows");
}

void swiglu() {
    for_both_types([](auto x) { swiglu_of_type<decltype(x)>(); });
}

// Where exp(-gate) is infinite or vanishes: silu is 0 or the gate itself.
void swiglu_ends() {
    GpuDevice<float> dev;
    if (!dev.ok) {
        return;
    }
    const std::vector<double> in = {0, -200, -89.5, 200, 2, 2, 2, 2};
    Rows<float, float> gate_up(dev, 1, in), out(dev, 1, 4), d(dev, 1, 8), ones(dev, 1, std::vector<double>(4, 1));
    swiglu_forward(dev, out.data(), 4, gate_up.data(), 1, 4);
    swiglu_backward(dev, d.data(), 8, ones.data(), gate_up.data(), 1, 4);
    const std::vector<float> y = out.get("out"), g = d.get("dgate_up");
    CHECK(y[0] == 0 && y[1] == 0 && y[3] == 400, "%g %g %g", double(y[0]), double(y[1]), double(y[3]));
    CHECK_ERROR("-89.5", std::fabs(double(y[2])), 1e-36);  // the true value is -2.5e-37
    CHECK(g[0] == 1 && g[3] == 2 && g[4] == 0 && g[7] == 200, "%g %g %g %g", double(g[0]), double(g[3]), double(g[4]),
          double(g[7]));
    CHECK_ERROR("far below", std::fabs(double(g[1])) + std::fabs(double(g[5])), 1e-36);
}

// ---- dropout

struct Masked {
    std::vector<uint32_t> example;
    std::vector<int32_t> position;
    Dropout drop;
};

Masked dropout_of(size_t N, float p) {
    Masked m;
    for (size_t i = 0; i < N; i++) {
        m.example.push_back(uint32_t(1000 * (i % 5) + 17));
        m.position.push_back(int32_t(i * 3));
    }
    m.drop.p = p;
    m.drop.seed = 0x123456789abcdefu;
    m.drop.step = 41;
    return m;
}

// x (N, C) under the CPU's dropout.
std::vector<double> cpu_dropout(Masked& m, std::vector<double> x, size_t N, size_t C, uint32_t module) {
    DoubleDevice cpu(1);
    m.drop.example = m.example.data();
    m.drop.position = m.position.data();
    for (size_t row = 0; row < N; row++) {
        dropout_run(cpu, x.data() + row * C, m.drop, module, row, 0, C);
    }
    return x;
}

template <class X>
void dropout_of_type() {
    GpuDevice<X> dev;
    if (!dev.ok) {
        return;
    }
    const auto shape = [&](size_t N, size_t C, size_t gap, size_t shift) {
        for (float p : {0.0f, 0.1f, 0.5f, 0.97f}) {
            const uint32_t module = uint32_t(C * 31 + size_t(p * 10));
            const std::string name = shape_name<X>(N, C, shift) + ", p " + std::to_string(p);
            Masked m = dropout_of(N, p);
            // 0.5 .. 1: no zero but by the mask
            std::vector<double> x = random_stored<X>(N * C, 1), plain(N * C), plain_sum(N * C);
            const std::vector<double> before = random_stored<X>(N * C, 2);
            for (double& v : x) {
                v = rounded<X>(0.75 + v / 4);
            }
            const std::vector<double> exact = cpu_dropout(m, x, N, C, module);
            std::vector<double> sum(N * C);
            for (size_t i = 0; i < N * C; i++) {
                plain[i] = exact[i] == 0 ? 0 : rounded<X>(double(float(x[i]) * (1 / (1 - p))));
                plain_sum[i] = rounded<X>(before[i] + plain[i]);
                sum[i] = before[i] + exact[i];
            }
            GpuBuffer<uint32_t, X> example(dev, m.example);
            GpuBuffer<int32_t, X> position(dev, m.position);
            m.drop.example = example.data();
            m.drop.position = position.data();
            Rows<X, X> in(dev, N, x, gap, shift), out(dev, N, C, gap / 2, shift), add(dev, N, before, gap, shift);
            dropout_rows(dev, out.data(), out.stride, in.data(), in.stride, m.drop, module, N, int(C), false);
            dropout_rows(dev, add.data(), add.stride, in.data(), in.stride, m.drop, module, N, int(C), true);
            const std::vector<X> got = out.get(name);
            size_t wrong = 0;
            for (size_t i = 0; i < N * C; i++) {
                wrong += (number(got[i]) == 0) != (exact[i] == 0);
            }
            CHECK(wrong == 0, "%s: %zu elements of the mask are not the CPU's", name.c_str(), wrong);
            check_yardstick<X>(name, numbers(got), plain, exact);
            check_yardstick<X>(name + ", added", numbers(add.get(name)), plain_sum, sum);
            // in place: the same, and so a second time
            dropout_rows(dev, in.data(), in.stride, in.data(), in.stride, m.drop, module, N, int(C), false);
            CHECK(equal_bits(got, in.get(name)), "%s: in place it has other bits", name.c_str());
        }
    };
    for (size_t C : widths) {
        shape(33, C, 0, 0);
        shape(5, C, 16, 0);
        shape(2, C, 2, 1);
    }
    shape(1, 4200, 0, 0);
    Rows<X, X> none(dev, 0, 24);
    dropout_rows(dev, none.data(), 24, none.data(), 24, Dropout(), 0, 0, 24, false);
    none.get("no rows");
}

void dropout() {
    for_both_types([](auto x) { dropout_of_type<decltype(x)>(); });
}

// The mask moves with each of what it is drawn from.
void dropout_sources() {
    GpuDevice<float> dev;
    if (!dev.ok) {
        return;
    }
    const size_t N = 3, C = 64;
    const std::vector<double> ones(N * C, 1);
    std::vector<std::vector<float>> masks;
    for (int which = 0; which < 6; which++) {
        Masked m = dropout_of(N, 0.5f);
        m.drop.seed += which == 1 ? uint64_t(1) << 40 : 0;
        m.drop.step += which == 2;
        m.example[1] += which == 3;
        m.position[1] += which == 4;
        const uint32_t module = which == 5 ? 8 : 7;
        const std::vector<double> want = cpu_dropout(m, ones, N, C, module);
        GpuBuffer<uint32_t, float> example(dev, m.example);
        GpuBuffer<int32_t, float> position(dev, m.position);
        m.drop.example = example.data();
        m.drop.position = position.data();
        Rows<float, float> in(dev, N, ones), out(dev, N, C);
        dropout_rows(dev, out.data(), C, in.data(), C, m.drop, module, N, int(C), false);
        const std::vector<float> got = out.get("mask");
        CHECK(numbers(got) == want, "source %d: not the CPU's", which);
        for (const std::vector<float>& other : masks) {
            CHECK(!equal_bits(other, got), "source %d does not move the mask", which);
        }
        masks.push_back(got);
    }
}

}  // namespace

extern const Test gpu_elementwise_tests[] = {{"gpu_embedding_rows", embedding_rows},
                                             {"gpu_embedding_half", embedding_half},
                                             {"gpu_rmsnorm", rmsnorm},
                                             {"gpu_rmsnorm_rounds_twice", rmsnorm_rounds_twice},
                                             {"gpu_rmsnorm_gather", rmsnorm_gather},
                                             {"gpu_rope", rope},
                                             {"gpu_swiglu", swiglu},
                                             {"gpu_swiglu_ends", swiglu_ends},
                                             {"gpu_dropout", dropout},
                                             {"gpu_dropout_sources", dropout_sources},
                                             {nullptr, nullptr}};
