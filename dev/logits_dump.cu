// logits_dump MODEL ADAPTER TOKENS.safetensors OUT.safetensors [--quant nf4|nf4-single|none] [--memory]
// The logits of base + adapter for one document (tensor `tokens`, I32), as `tokens` and `logits` (F32, tokens x
// vocabulary). For comparison with other programs; `-` as ADAPTER is the base alone.
// --memory prints the process's peak memory after the base has been read.
#include <sys/resource.h>

#include <cstring>

#include "llama_io.h"

static Error dump(const std::string& model, const std::string& adapter, const std::string& in, const std::string& out,
                  const BaseOptions& base, bool memory) {
    Llama<Cpu<float>> m;
    device_open(m.dev, 0);
    if (m.dev.isa == nullptr) {
        return bad_input("TRAIN_LLAMA_CPU names a tier that is unknown or that this processor lacks");
    }
    std::string hash;
    std::vector<std::string> warnings;
    LoraConfig lora;
    Error e = llama_config_read(m.c, model);
    e = e ? e : llama_load(m, &hash, warnings, model, {base.nf4 || m.c.bnb_nf4, base.double_quant});
    e = e || adapter == "-" ? e : adapter_config_read(lora, adapter);
    if (e) {
        return e;
    }
    if (memory) {
        struct rusage usage = {};
        getrusage(RUSAGE_SELF, &usage);
        printf("after_load_bytes: %lld\n", (long long)usage.ru_maxrss * 1024);
    }
    llama_adapter_create(m, lora);
    llama_adapter_init(m, 0);
    e = adapter == "-" ? Error() : adapter_load(m, adapter);
    Safetensors st;
    e = e ? e : safetensors_open(st, in);
    if (e) {
        return e;
    }
    const Tensor* t = safetensors_find(st, "tokens");
    if (t == nullptr || t->dtype != "I32" || t->elements() == 0) {
        return bad_input("%s: need a tensor tokens, I32", in.c_str());
    }
    Batch b;
    b.tokens.resize(t->elements());
    if (Error bad = safetensors_read(st, *t, b.tokens.data(), 0, t->bytes)) {
        return bad;
    }
    const size_t N = b.size();
    std::vector<int32_t> rows;
    for (size_t i = 0; i < N; i++) {
        b.positions.push_back(int32_t(i));
        rows.push_back(int32_t(i));
        if (b.tokens[i] < 0 || b.tokens[i] >= m.c.V) {
            return bad_input("%s: token %d at %zu is outside the vocabulary of %d", in.c_str(), b.tokens[i], i, m.c.V);
        }
    }
    b.labels.assign(N, -1);
    b.example.assign(N, 0);
    b.cu_seqlens = {0, int32_t(N)};
    llama_activations_create(m, N, N, RecomputePlan(), false);
    llama_forward(m, b, 0, 0);
    std::vector<float> logits(N * m.c.V);
    head_logits(m.dev, logits.data(), head_input(m), m.w.head, rows.data(), N);
    e = safetensors_write(
        out, {{"tokens", "I32", {N}, b.tokens.data()}, {"logits", "F32", {N, uint64_t(m.c.V)}, logits.data()}});
    llama_free(m);
    safetensors_close(st);
    return e;
}

int main(int argc, char** argv) {
    BaseOptions base;
    bool memory = false, good = argc >= 5;
    for (int i = 5; i < argc; i++) {
        if (strcmp(argv[i], "--memory") == 0) {
            memory = true;
        } else if (strcmp(argv[i], "--quant") == 0 && i + 1 < argc) {
            i++;
            base.nf4 = strncmp(argv[i], "nf4", 3) == 0;
            base.double_quant = strcmp(argv[i], "nf4-single") != 0;
        } else {
            good = false;
        }
    }
    Error e = good ? dump(argv[1], argv[2], argv[3], argv[4], base, memory)
                   : bad_input(
                         "usage: logits_dump MODEL ADAPTER TOKENS.safetensors OUT.safetensors [--quant "
                         "nf4|nf4-single|none] [--memory]");
    return e ? error_print(e) : 0;
}
