// For the tests of data: a vocabulary in which every byte is a token of its own number, with Llama-3's 256 control
// tokens after it (BOS 256, EOS 257, headers 262 and 263, end of turn 265); and examples written out so that their
// tokens can be read: <B> <E> <H> </H> <T> for the control tokens, {braces} around targets, bytes as they are.
#pragma once
#include <string>

#include "dev/tests/test.h"
#include "io/file.h"
#include "tokenizer/dataset.h"

inline bool byte_tokenizer(Tokenizer& t) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string file;
    for (int byte = 0; byte < 256; byte++) {
        file += digits[byte >> 2];
        file += digits[(byte & 3) << 4];
        file += "== " + std::to_string(byte) + "\n";
    }
    std::string dir = test_directory();
    Error e = file_replace(path_join(dir, "tokenizer.model"), file);
    e = e ? e : tokenizer_load(t, dir, 512);
    return CHECK(!e, "byte tokenizer: %s", e.what.c_str());
}

inline std::string written_out(const std::vector<int32_t>& ids, const std::vector<uint8_t>& targets) {
    std::string out;
    if (!CHECK(ids.size() == targets.size(), "%zu ids, %zu targets", ids.size(), targets.size())) {
        return out;
    }
    for (size_t i = 0; i < ids.size(); i++) {
        out += targets[i] && (i == 0 || !targets[i - 1]) ? "{" : "";
        switch (ids[i]) {
            case 256: out += "<B>"; break;
            case 257: out += "<E>"; break;
            case 262: out += "<H>"; break;
            case 263: out += "</H>"; break;
            case 265: out += "<T>"; break;
            default:
                out += ids[i] >= 0 && ids[i] < 256 ? std::string(1, char(ids[i])) : "<" + std::to_string(ids[i]) + ">";
        }
        out += targets[i] && (i + 1 == ids.size() || !targets[i + 1]) ? "}" : "";
    }
    return out;
}

inline std::string written_out(const Dataset& data, size_t i) {
    auto id = data.ids.begin() + long(data.start[i]);
    auto target = data.targets.begin() + long(data.start[i]);
    return written_out({id, id + long(data.length(i))}, {target, target + long(data.length(i))});
}
