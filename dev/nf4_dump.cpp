// nf4_dump IN.f32 OUT.safetensors: quantises a file of raw little-endian floats as one flat tensor and writes
//   codes U8 [(n + 1) / 2]   absmax F32 [blocks]   absmax8 U8 [blocks]   absmax2 F32 [(blocks + 255) / 256]
//   offset F32 [1]
// so that a script can compare with what bitsandbytes makes of the same numbers.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "io/file.h"
#include "io/safetensors.h"
#include "kernels/cpu/nf4.h"

int main(int argc, char** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: nf4_dump IN.f32 OUT.safetensors\n");
        return 2;
    }
    std::string bytes;
    if (Error e = file_read_all(bytes, argv[1])) {
        return error_print(e);
    }
    if (bytes.empty() || bytes.size() % sizeof(float) != 0) {
        return error_print(bad_input("%s: not a whole number of floats (found %zu bytes)", argv[1], bytes.size()));
    }
    const size_t n = bytes.size() / sizeof(float), blocks = (n + 63) / 64;
    std::vector<float> w(n), absmax(blocks), absmax2((blocks + 255) / 256);
    memcpy(w.data(), bytes.data(), bytes.size());
    std::vector<uint8_t> codes((n + 1) / 2), absmax8(blocks);
    float offset = 0;
    nf4_quantize(codes.data(), absmax.data(), w.data(), n, 1);
    nf4_double_quantize(absmax8.data(), absmax2.data(), &offset, absmax.data(), blocks);
    Error e = safetensors_write(argv[2], {{"codes", "U8", {codes.size()}, codes.data()},
                                          {"absmax", "F32", {absmax.size()}, absmax.data()},
                                          {"absmax8", "U8", {absmax8.size()}, absmax8.data()},
                                          {"absmax2", "F32", {absmax2.size()}, absmax2.data()},
                                          {"offset", "F32", {1}, &offset}});
    return e ? error_print(e) : 0;
}
