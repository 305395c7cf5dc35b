// Reading adapter_config.json: which LoRA a PEFT adapter is, and whether it is one that this program reproduces.
#include <cmath>

#include "llama_io.h"

// Keys whose value says nothing about the arithmetic of an adapter already trained.
static bool is_harmless(const std::string& key) {
    for (const char* name :
         {"auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout",
          "megatron_config", "megatron_core", "peft_type", "peft_version", "r", "lora_alpha", "revision", "task_type",
          "target_modules", "use_rslora", "qalora_group_size", "layers_pattern", "bias", "eva_config"}) {
        if (key == name) {
            return true;
        }
    }
    return false;
}

static bool is_unset(const Json& v) {
    return v.type == Json::NUL || (v.type == Json::BOOL && !v.boolean) ||
           (v.type == Json::STRING && v.string.empty()) ||
           ((v.type == Json::ARRAY || v.type == Json::OBJECT) && v.items.empty());
}

static Error targets_read(LoraConfig& lora, const Json* targets, const char* path) {
    std::vector<Json> names;
    if (targets != nullptr && targets->type == Json::STRING) {
        names = {*targets};
    } else if (targets != nullptr && targets->type == Json::ARRAY) {
        names = targets->items;
    }
    std::fill(lora.target, lora.target + MODULES, false);
    for (const Json& name : names) {
        bool known = false;
        for (int m = 0; m < MODULES; m++) {
            if (name.string == module_name[m] || name.string == module_path[m] || name.string == "all-linear") {
                lora.target[m] = known = true;
            }
        }
        if (!known) {
            return bad_input("%s: target_modules: '%s' is not one of the seven linears of a Llama layer", path,
                             printable(name.string).c_str())
                .hinted("patterns, the embedding and the output head are not supported as targets");
        }
    }
    if (names.empty()) {
        return bad_input("%s: target_modules: need a list of module names", path);
    }
    return {};
}

Error adapter_config_read(LoraConfig& lora, const std::string& dir) {
    std::string file = path_join(dir, "adapter_config.json");
    const char* path = file.c_str();
    if (!path_exists(file)) {
        return bad_input("%s: no adapter_config.json there", dir.c_str())
            .hinted("give the directory of a PEFT adapter");
    }
    Json j;
    if (Error e = json_read_file(j, file)) {
        return e;
    }
    if (j.type != Json::OBJECT) {
        return bad_input("%s: need an object, found %s", path, j.type_name());
    }
    const Json* type = j.find("peft_type");
    if (type == nullptr || type->string != "LORA") {
        return bad_input("%s: peft_type: need \"LORA\" (found %s)", path,
                         type ? printable(json_write(*type)).c_str() : "nothing");
    }
    for (size_t i = 0; i < j.keys.size(); i++) {
        if (!is_harmless(j.keys[i]) && !is_unset(j.items[i])) {
            return bad_input("%s: %s is set (%s): adapters of this kind are not supported", path,
                             printable(j.keys[i]).c_str(), printable(json_write(j.items[i])).c_str())
                .hinted(
                    "plain LoRA on the seven linears, one rank and one alpha, no biases, no DoRA, no modules_to_save");
        }
    }
    // Other initialisations (pissa, olora, corda, loftq) change the base weight when the adapter is made: it then
    // belongs to a residual base that is not on disk.
    const Json* init = j.find("init_lora_weights");
    const std::string kind = init != nullptr && init->type == Json::STRING ? init->string : "gaussian";
    if (kind != "gaussian" && kind != "eva" && kind != "orthogonal") {
        return bad_input("%s: init_lora_weights: need true, false, gaussian, eva or orthogonal (found %s)", path,
                         printable(kind).c_str())
            .hinted("convert the adapter to a plain LoRA with PEFT first");
    }
    const Json* bias = j.find("bias");
    if (bias != nullptr && bias->string != "none") {
        return bad_input("%s: bias: need \"none\" (found %s)", path, printable(json_write(*bias)).c_str());
    }
    const Json* r = j.find("r");
    if (r == nullptr || r->type != Json::INT || r->integer < 1 || r->integer > 1 << 20) {
        return bad_input("%s: r: need a positive integer (found %s)", path,
                         r ? printable(json_write(*r)).c_str() : "nothing");
    }
    lora.r = int(r->integer);
    const Json* alpha = j.find("lora_alpha");
    if (alpha == nullptr || !alpha->is_number() || !(std::isfinite(alpha->number()))) {
        return bad_input("%s: lora_alpha: need a number (found %s)", path,
                         alpha ? printable(json_write(*alpha)).c_str() : "nothing");
    }
    lora.alpha = alpha->number();
    const Json* rslora = j.find("use_rslora");
    lora.rslora = rslora != nullptr && rslora->type == Json::BOOL && rslora->boolean;
    return targets_read(lora, j.find("target_modules"), path);
}
