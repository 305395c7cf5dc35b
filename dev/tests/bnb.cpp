// bitsandbytes' serialised NF4 matrices, from small files made here in its form.
#include "llama_bnb.h"

#include <cmath>
#include <cstring>

#include "dev/tests/test.h"
#include "kernels/cpu/nf4.h"

// SHA-256 of the bytes that bitsandbytes 0.50 makes (create_dynamic_map, get_4bit_type("nf4")) on x86-64 with AVX2.
static void bnb_tables() {
    float map[256];
    nf4_map8(map);
    std::string hash = sha256_hex(map, sizeof map);
    CHECK(hash == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c", "%s", hash.c_str());
    hash = sha256_hex(NF4_CODE, sizeof NF4_CODE);
    CHECK(hash == "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a", "%s", hash.c_str());
}

// What a file holds; each test changes one thing.
struct Made {
    std::vector<uint8_t> codes = std::vector<uint8_t>(96 * 3 / 2);  // a matrix of 3 x 96: 5 blocks, the last short
    std::vector<float> absmax32 = {1, 2, 3, 4, 5};
    std::vector<uint8_t> absmax8 = {0, 1, 2, 254, 255};
    std::vector<float> quant_map = std::vector<float>(16), nested_map = std::vector<float>(256), nested_absmax = {0.5f};
    std::string settings = "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"bfloat16\", \"shape\": [3, 96]}";
    std::string kind = "nf4", absmax_dtype = "F32";
    bool nested = false, with_map = true;
};

static Made plain() {
    Made m;
    m.quant_map.assign(NF4_CODE, NF4_CODE + 16);
    nf4_map8(m.nested_map.data());
    return m;
}

static const char* const NESTED_SETTINGS =
    "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"float16\", \"shape\": [3, 96], \"nested_blocksize\": "
    "256, "
    "\"nested_dtype\": \"float32\", \"nested_offset\": 0.05195719376206398}";

static Made doubly() {
    Made m = plain();
    m.nested = true;
    m.absmax_dtype = "U8";
    m.settings = NESTED_SETTINGS;
    return m;
}

static Error read_made(BnbQuantState& q, Safetensors& st, const Made& m, const std::string& weight = "X.weight") {
    static std::string path = path_join(test_directory(), "bnb.safetensors");
    bool bytes = m.absmax_dtype == "U8";
    const void* absmax = bytes ? static_cast<const void*>(m.absmax8.data()) : m.absmax32.data();
    size_t blocks = bytes ? m.absmax8.size() : m.absmax32.size();
    std::vector<TensorOut> out = {
        {"X.weight", "U8", {m.codes.size(), 1}, m.codes.data()},
        {"X.weight.absmax", m.absmax_dtype, {blocks}, absmax},
        {"X.weight.quant_state.bitsandbytes__" + m.kind, "U8", {m.settings.size()}, m.settings.data()},
    };
    if (m.with_map) {
        out.push_back({"X.weight.quant_map", "F32", {m.quant_map.size()}, m.quant_map.data()});
    }
    if (m.nested) {
        out.push_back({"X.weight.nested_absmax", "F32", {m.nested_absmax.size()}, m.nested_absmax.data()});
        out.push_back({"X.weight.nested_quant_map", "F32", {m.nested_map.size()}, m.nested_map.data()});
    }
    safetensors_close(st);
    Error e = path_remove(path);
    CHECK(!e, "%s", e.what.c_str());
    e = safetensors_write(path, out);
    CHECK(!e, "%s", e.what.c_str());
    e = safetensors_open(st, path);
    CHECK(!e, "%s", e.what.c_str());
    e = bnb_quant_state_read(q, st, weight);
    e.what = e.what.rfind(path + ": tensor ", 0) == 0 ? e.what.substr(path.size() + 9) : e.what;
    return e;
}

static void bnb_reads() {
    BnbQuantState q;
    Safetensors st;
    Error e = read_made(q, st, plain());
    CHECK(!e, "%s", e.what.c_str());
    CHECK(q.rows == 3 && q.cols == 96 && q.blocks == 5 && q.dtype == "bfloat16" && !q.nested() && q.offset == 0,
          "settings");
    CHECK(q.codes && q.codes->bytes == 144 && q.absmax && q.absmax->dtype == "F32" && q.quant_map[15] == 1, "parts");
    CHECK(bnb_is_quantised(st, "X.weight") && !bnb_is_quantised(st, "Y.weight"), "which weights are quantised");

    e = read_made(q, st, doubly());
    CHECK(!e, "%s", e.what.c_str());
    CHECK(q.nested() && q.nested_absmax->elements() == 1 && q.absmax->dtype == "U8" && q.dtype == "float16",
          "nested parts");
    CHECK(q.offset == 0.05195719376206398f && q.nested_map[0] == -0.99296875f && q.nested_map[255] == 1,
          "nested values");

    Made m = doubly();  // tables are used as stored, and may be 2 ulp away
    m.nested_map[200] = std::nextafterf(std::nextafterf(m.nested_map[200], 1), 1);
    m.quant_map[1] = std::nextafterf(std::nextafterf(m.quant_map[1], 0), 0);
    m.quant_map[7] = -0.0f;
    e = read_made(q, st, m);
    CHECK(!e && q.nested_map[200] == m.nested_map[200] && q.quant_map[1] == m.quant_map[1], "%s", e.what.c_str());
    safetensors_close(st);
}

static std::string replaced(std::string text, const std::string& from, const std::string& to) {
    size_t at = text.find(from);
    CHECK(at != std::string::npos, "%s is not in %s", from.c_str(), text.c_str());
    return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

static void bnb_bad_settings() {
    const std::string name = "X.weight.quant_state.bitsandbytes__nf4: ";
    const struct {
        const char *from, *to, *what;
    } cases[] = {
        {"\"nf4\"", "\"fp4\"", "quant_type not supported (found \"fp4\", need \"nf4\")"},
        {"64", "128", "blocksize not supported (found 128, need 64)"},
        {"64", "64.0", "blocksize not supported (found 64.0, need 64)"},
        {"\"blocksize\": 64,", "", "blocksize not supported (found nothing, need 64)"},
        {"float16", "float8", "dtype not supported (found \"float8\", need bfloat16, float16 or float32)"},
        {"[3, 96]", "[288]", "shape must be two positive integers (found [288])"},
        {"[3, 96]", "[0, 96]", "shape must be two positive integers"},
        {"[3, 96]", "[3, -96]", "shape must be two positive integers"},
        {"[3, 96]", "[3, 4294967296]", "shape must be two positive integers"},
        {"[3, 96]", "null", "shape must be two positive integers (found null)"},
        {"256", "128", "nested_blocksize not supported (found 128, need 256)"},
        {"float32", "float16", "nested_dtype not supported (found \"float16\", need \"float32\")"},
        {"0.05195719376206398", "1e39", "nested_offset must be a number"},
        {"0.05195719376206398", "\"x\"", "nested_offset must be a number"},
        {", \"nested_offset\": 0.05195719376206398", "", "nested_offset must be a number"},
        {"]", "", " unreadable at byte "},
    };
    for (const auto& c : cases) {
        BnbQuantState q;
        Safetensors st;
        Made m = doubly();
        m.settings = replaced(m.settings, c.from, c.to);
        Error e = read_made(q, st, m);
        CHECK(e.code == 2 && text_has(e.what, c.what) && text_has(e.what, name.substr(0, name.size() - 2)), "%s: %s",
              c.what, e.what.c_str());
        safetensors_close(st);
    }
}

static void bnb_bad_parts() {
    struct Case {
        Made made;
        const char* what;
    };
    std::vector<Case> cases;
    auto add = [&](const Made& base, const char* what, void (*change)(Made&)) {
        cases.push_back({base, what});
        change(cases.back().made);
    };
    add(plain(), "X.weight: wrong (found 143 elements of U8, need 144 of U8)", [](Made& m) { m.codes.pop_back(); });
    add(plain(), "X.weight.absmax: wrong (found 4 elements of F32, need 5 of F32)",
        [](Made& m) { m.absmax32.pop_back(); });
    add(plain(), "X.weight.absmax: wrong (found 5 elements of U8, need 5 of F32)",
        [](Made& m) { m.absmax_dtype = "U8"; });
    add(doubly(), "X.weight.absmax: wrong (found 5 elements of F32, need 5 of U8)",
        [](Made& m) { m.absmax_dtype = "F32"; });
    add(doubly(), "X.weight.nested_absmax: wrong (found 2 elements of F32, need 1", [](Made& m) {
        m.nested_absmax = {1, 2};
    });
    add(doubly(), "X.weight.nested_absmax: missing", [](Made& m) { m.nested = false; });
    add(doubly(), "X.weight.nested_quant_map: wrong (found 255 elements", [](Made& m) { m.nested_map.pop_back(); });
    add(plain(), "X.weight.quant_map: missing", [](Made& m) { m.with_map = false; });
    add(plain(), "X.weight.quant_map: wrong (found 15 elements of F32, need 16",
        [](Made& m) { m.quant_map.pop_back(); });
    add(plain(), "X.weight.quant_map: entry 3 is not that of this data type (found -0.4",
        [](Made& m) { m.quant_map[3] = -0.4f; });
    add(plain(), "X.weight.quant_map: entry 7 is not that", [](Made& m) { m.quant_map[7] = NAN; });
    add(doubly(), "X.weight.nested_quant_map: entry 200 is not that", [](Made& m) {
        for (int i = 0; i < 3; i++) {
            m.nested_map[200] = std::nextafterf(m.nested_map[200], 1);
        }
    });
    add(plain(), "X.weight.quant_state.bitsandbytes__nf4: missing", [](Made& m) { m.kind = "nf5"; });
    add(plain(), "X.weight.quant_state.bitsandbytes__fp4: quant_type fp4 not supported",
        [](Made& m) { m.kind = "fp4"; });
    add(plain(), "need at most 65536 of U8", [](Made& m) { m.settings.append(70000, ' '); });
    for (const Case& c : cases) {
        BnbQuantState q;
        Safetensors st;
        Error e = read_made(q, st, c.made);
        CHECK(e.code == 2 && text_has(e.what, c.what), "%s: %s", c.what, e.what.c_str());
        safetensors_close(st);
    }
    BnbQuantState q;
    Safetensors st;
    Error e = read_made(q, st, plain(), "Y.weight");
    CHECK(e.code == 2 && e.what == "tensor Y.weight: missing", "%s", e.what.c_str());
    safetensors_close(st);
}

extern const Test bnb_tests[];
const Test bnb_tests[] = {
    {"bnb_tables", bnb_tables},       {"bnb_reads", bnb_reads}, {"bnb_bad_settings", bnb_bad_settings},
    {"bnb_bad_parts", bnb_bad_parts}, {nullptr, nullptr},
};
