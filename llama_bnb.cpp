// See llama_bnb.h.
#include "llama_bnb.h"

#include <cmath>
#include <cstring>

#include "kernels/cpu/nf4.h"  // for the two tables alone

// Units in the last place between two finite floats (0 and -0 are 0 apart).
static uint32_t ulps(float a, float b) {
    auto ordered = [](float x) {
        int32_t bits;
        memcpy(&bits, &x, 4);
        return bits < 0 ? int64_t(INT32_MIN) - bits : int64_t(bits);
    };
    int64_t distance = ordered(a) - ordered(b);
    return uint32_t(distance < 0 ? -distance : distance);
}

struct Part {
    const Safetensors* st;
    std::string weight;
};

static Error part_error(const Part& p, const std::string& name, const std::string& what) {
    const Tensor* t = safetensors_find(*p.st, name);
    const Tensor* w = safetensors_find(*p.st, p.weight);
    std::string file = p.st->files[size_t((t ? t : w)->file)].path;
    return bad_input("%s: tensor %s: %s", printable(file, 4096).c_str(), printable(name).c_str(), what.c_str());
}

// The tensor weight + suffix, which must hold `count` elements of dtype.
static Error find_part(const Tensor*& t, const Part& p, const char* suffix, const char* dtype, uint64_t count) {
    std::string name = p.weight + suffix;
    t = safetensors_find(*p.st, name);
    if (!t) {
        return part_error(p, name, "missing");
    }
    if (t->dtype != dtype || t->elements() != count) {
        return part_error(p, name,
                          "wrong (found " + std::to_string(t->elements()) + " elements of " + t->dtype + ", need " +
                              std::to_string(count) + " of " + dtype + ")");
    }
    return {};
}

// A table of n values, each within 2 ulp of what it must be: builds of bitsandbytes differ by that much.
static Error read_table(float* table, const float* need, size_t n, const Part& p, const char* suffix) {
    const Tensor* t = nullptr;
    if (Error e = find_part(t, p, suffix, "F32", n)) {
        return e;
    }
    if (Error e = safetensors_read(*p.st, *t, table, 0, n * sizeof(float))) {
        return e;
    }
    for (size_t i = 0; i < n; i++) {
        if (!(std::fabs(table[i]) <= 1) || ulps(table[i], need[i]) > 2) {
            char what[120];
            snprintf(what, sizeof what, "entry %zu is not that of this data type (found %.9g, need %.9g)", i,
                     double(table[i]), double(need[i]));
            return part_error(p, t->name, what);
        }
    }
    return {};
}

// The settings: JSON in a U8 tensor.
static Error read_settings(Json& settings, const Part& p) {
    const uint64_t cap = 1 << 16;
    std::string name = p.weight + ".quant_state.bitsandbytes__nf4";
    const Tensor* t = safetensors_find(*p.st, name);
    if (!t) {
        std::string fp4 = p.weight + ".quant_state.bitsandbytes__fp4";
        return safetensors_find(*p.st, fp4) ? part_error(p, fp4, "quant_type fp4 not supported (need nf4)")
                                            : part_error(p, name, "missing");
    }
    if (t->dtype != "U8" || t->bytes > cap) {
        return part_error(p, name,
                          "wrong (found " + std::to_string(t->bytes) + " bytes of " + t->dtype + ", need at most " +
                              std::to_string(cap) + " of U8)");
    }
    std::string text(size_t(t->bytes), '\0');
    if (Error e = safetensors_read(*p.st, *t, &text[0], 0, text.size())) {
        return e;
    }
    JsonLimits limits;
    limits.depth = 16;
    limits.by_byte = true;
    std::string file = p.st->files[size_t(t->file)].path + ": tensor " + name + ":";
    return json_parse(settings, text.data(), text.size(), file, limits);
}

static Error need_setting(const Part& p, const Json& settings, const char* key, const Json& need) {
    const Json* v = settings.find(key);
    std::string found = v ? json_write(*v) : "nothing";
    return found == json_write(need) ? Error()
                                     : part_error(p, p.weight + ".quant_state.bitsandbytes__nf4",
                                                  std::string(key) + " not supported (found " + printable(found) +
                                                      ", need " + json_write(need) + ")");
}

static Error read_shape(BnbQuantState& q, const Part& p, const Json& settings) {
    const Json* shape = settings.find("shape");
    bool good = shape && shape->type == Json::ARRAY && shape->items.size() == 2;
    for (size_t i = 0; good && i < 2; i++) {
        good = shape->items[i].type == Json::INT && shape->items[i].integer > 0 && shape->items[i].integer < INT32_MAX;
    }
    if (!good) {
        return part_error(p, p.weight + ".quant_state.bitsandbytes__nf4",
                          "shape must be two positive integers (found " +
                              (shape ? printable(json_write(*shape)) : std::string("nothing")) + ")");
    }
    q.rows = shape->items[0].natural;
    q.cols = shape->items[1].natural;
    q.blocks = (q.rows * q.cols + 63) / 64;  // below 2^62
    return {};
}

bool bnb_is_quantised(const Safetensors& st, const std::string& weight_name) {
    return safetensors_find(st, weight_name + ".quant_state.bitsandbytes__nf4") ||
           safetensors_find(st, weight_name + ".quant_state.bitsandbytes__fp4") ||
           safetensors_find(st, weight_name + ".quant_map");
}

Error bnb_quant_state_read(BnbQuantState& q, const Safetensors& st, const std::string& weight_name) {
    q = BnbQuantState();
    Part p{&st, weight_name};
    if (!safetensors_find(st, weight_name)) {
        return bad_input("tensor %s: missing", printable(weight_name).c_str());
    }
    Json settings;
    Error e;
    if ((e = read_settings(settings, p)) || (e = need_setting(p, settings, "quant_type", "nf4")) ||
        (e = need_setting(p, settings, "blocksize", 64)) || (e = read_shape(q, p, settings))) {
        return e;
    }
    const Json* dtype = settings.find("dtype");
    q.dtype = dtype && dtype->type == Json::STRING ? dtype->string : "";
    if (q.dtype != "bfloat16" && q.dtype != "float16" && q.dtype != "float32") {
        return part_error(
            p, weight_name + ".quant_state.bitsandbytes__nf4",
            "dtype not supported (found \"" + printable(q.dtype) + "\", need bfloat16, float16 or float32)");
    }
    bool nested = safetensors_find(st, weight_name + ".nested_absmax") != nullptr || settings.find("nested_blocksize");
    if ((e = find_part(q.codes, p, "", "U8", (q.rows * q.cols + 1) / 2)) ||
        (e = find_part(q.absmax, p, ".absmax", nested ? "U8" : "F32", q.blocks)) ||
        (e = read_table(q.quant_map, NF4_CODE, 16, p, ".quant_map"))) {
        return e;
    }
    if (!nested) {
        return {};
    }
    float map[256];
    nf4_map8(map);
    if ((e = need_setting(p, settings, "nested_blocksize", 256)) ||
        (e = need_setting(p, settings, "nested_dtype", "float32")) ||
        (e = find_part(q.nested_absmax, p, ".nested_absmax", "F32", (q.blocks + 255) / 256)) ||
        (e = read_table(q.nested_map, map, 256, p, ".nested_quant_map"))) {
        return e;
    }
    const Json* offset = settings.find("nested_offset");
    if (!offset || !offset->is_number() || !std::isfinite(float(offset->number()))) {
        return part_error(p, weight_name + ".quant_state.bitsandbytes__nf4", "nested_offset must be a number");
    }
    q.offset = float(offset->number());
    return {};
}
