// safetensors files, sharded checkpoints, the writer. The header cases are those of the reference implementation's own
// tests (huggingface/safetensors), rebuilt byte by byte.
#include "io/safetensors.h"

#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "dev/tests/test.h"

static std::string length_bytes(uint64_t n) {
    std::string s;
    for (int i = 0; i < 8; i++) {
        s += char(n >> 8 * i & 255);
    }
    return s;
}

static std::string with_length(const std::string& header, size_t zeros = 0) {
    return length_bytes(header.size()) + header + std::string(zeros, '\0');
}

static Error open_bytes(Safetensors& st, const std::string& bytes) {
    static std::string path = path_join(test_directory(), "x.safetensors");
    Error e = file_replace(path, bytes);
    CHECK(!e, "%s", e.what.c_str());
    e = safetensors_open(st, path);
    e.what =
        e.what.substr(0, path.size()) == path ? e.what.substr(path.size()) : e.what;  // begins with ": " or " unread"
    return e;
}

static void safetensors_good() {
    Safetensors st;
    const std::string i32 = "{\"test\":{\"dtype\":\"I32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}";
    CHECK(!open_bytes(st, with_length(i32, 16)) && st.tensors.size() == 1, "one tensor");
    const Tensor* t = safetensors_find(st, "test");
    CHECK(t && t->dtype == "I32" && t->shape == std::vector<uint64_t>({2, 2}) && t->elements() == 4 && t->bytes == 16 &&
              t->offset == 8 + i32.size(),
          "its entry");
    CHECK(!safetensors_find(st, "none"), "a name that is not there");
    safetensors_close(st);
    CHECK(st.files.empty() && st.tensors.empty(), "closed");

    const struct {
        std::string header;
        size_t zeros, tensors;
    } cases[] = {
        {"{}\r \t\n", 0, 0},  // white space around the header is legal
        {"\t\n{}\r ", 0, 0},
        {"{}", 0, 0},
        {"{\"__metadata__\":null}", 0, 0},
        {"{\"t\":{\"dtype\":\"I32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, 1},
        {"{\"t\":{\"dtype\":\"I32\",\"shape\":[2,0],\"data_offsets\":[0,0]}}", 0, 1},
        {"{\"t\":{\"dtype\":\"F4\",\"shape\":[6],\"data_offsets\":[0,3]}}", 3, 1},
        {"{\"t\":{\"dtype\":\"F8_E4M3\",\"shape\":[3],\"data_offsets\":[0,3],\"more\":{\"a\":[1]}}}", 3, 1},
        {"{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]},\"a\":{\"dtype\":\"U8\",\"shape\":[1],"
         "\"data_offsets\":[0,1]},\"z\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[1,1]}}",
         3, 3},
    };
    for (const auto& c : cases) {
        Error e = open_bytes(st, with_length(c.header, c.zeros));
        CHECK(!e && st.tensors.size() == c.tensors, "%s: %s", c.header.c_str(), e.what.c_str());
        if (c.tensors == 3) {
            CHECK(st.tensors[0].name == "a" && st.tensors[1].name == "z" && st.tensors[2].name == "b", "file order");
        }
        safetensors_close(st);
    }
    CHECK(!open_bytes(st, with_length("{\"__metadata__\":{\"format\":\"pt\",\"k\":\"v\"}}")) && st.metadata["k"] == "v",
          "metadata");
    safetensors_close(st);
}

static std::string entry(const char* name, const char* dtype, const char* shape, const char* offsets) {
    return "\"" + std::string(name) + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
           ",\"data_offsets\":" + offsets + "}";
}

static void safetensors_bad_files() {
    const std::string i32 = "{" + entry("test", "I32", "[2,2]", "[0,16]") + "}";
    std::string ten = "{";
    for (int i = 0; i < 10; i++) {
        ten += (i ? "," : "") + entry(("test_" + std::to_string(i)).c_str(), "I32", "[2,2]", "[0,16]");
    }
    std::string deep = "{\"t\":" + std::string(20, '[') + std::string(20, ']') + "}";
    const struct {
        std::string bytes;
        const char *what, *hint;
    } cases[] = {
        {with_length(i32, 14), ": file is 82 bytes, header needs 84: download incomplete", "again"},
        {with_length(i32, 16) + "extra_bogus_data", ": 16 unexpected bytes after the last tensor", ""},
        {with_length("{" + entry("test", "I32", "[2,2]", "[0,4]") + "}"),
         ": tensor test: shape says 16 bytes, offsets say 4", ""},
        {std::string("\x3C\0\0\0\0\xFF\xFF\xFF", 8), ": file starts with '<'", "download it again"},
        {std::string("\x3D\0\0\0\0\xFF\xFF\xFF", 8), ": header length 18446742974197923901 exceeds the limit",
         "truncated"},
        {length_bytes(60), ": file starts with '<'", ""},
        {length_bytes(61), ": header length 61 exceeds the file (8 bytes)", "truncated"},
        {length_bytes(100000001) + "{}", ": header length 100000001 exceeds the limit of 100000000 bytes", ""},
        {length_bytes(3) + "{}", ": header length 3 exceeds the file (10 bytes)", ""},
        {"", ": too short to be safetensors (found 0 bytes, need at least 8)", ""},
        {"1234567", ": too short to be safetensors (found 7 bytes, need at least 8)", ""},
        {length_bytes(1) + "\xFF", ": header unreadable at byte 8: invalid UTF-8 (found byte 0xFF)", ""},
        {length_bytes(1) + "{", ": header unreadable at byte 9: it ends inside a JSON value", ""},
        {with_length("[]"), ": header unreadable at byte 8: must be an object (found an array)", ""},
        {with_length("{\"a\" 1}"), ": header unreadable at byte 13: not JSON (found '1', need ':' after the key)", ""},
        {with_length("\xEF\xBB\xBF{}"), ": header unreadable at byte 8: byte order mark", ""},
        {with_length(std::string("{}\0\0", 4)), ": header unreadable at byte 10: NUL byte outside a string", ""},
        {with_length("{" + entry("test", "I32", "[2,18446744073709551614]", "[0,16]") + "}", 16),
         ": tensor test: size overflows", ""},
        {with_length("{" + entry("test", "I32", "[2,9223372036854775807]", "[0,16]") + "}", 16),
         ": tensor test: size overflows", ""},
        {with_length("{" + entry("test", "U8", "[0,281474976710657]", "[0,0]") + "}"), ": tensor test: size overflows",
         ""},
        {with_length(ten + "}", 16), "offsets do not follow previous tensor (found 0, need 16)", ""},
        {with_length("{" + entry("a", "U8", "[1]", "[1,2]") + "}", 2),
         ": tensor a: offsets do not follow previous tensor (found 1, need 0)", ""},
        {with_length("{" + entry("a", "U8", "[1]", "[0,1]") + "," + entry("b", "U8", "[1]", "[2,3]") + "}", 3),
         ": tensor b: offsets do not follow previous tensor (found 2, need 1)", ""},
        {with_length("{" + entry("a", "U8", "[1]", "[1,0]") + "}", 2), ": tensor a: data_offsets end before they begin",
         ""},
        {with_length("{" + entry("a", "U8", "[1]", "[0,18446744073709551615]") + "}", 2),
         ": tensor a: shape says 1 bytes, offsets say 18446744073709551615", ""},
        {with_length("{" + entry("a", "U8", "[1]", "[0,1]") + "," + entry("a", "U8", "[1]", "[0,1]") + "}", 1),
         ": header unreadable at byte 61: duplicate key \"a\"", ""},
        {with_length("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\"}}"),
         ": header unreadable at byte 27: duplicate key \"dtype\"", ""},
        {with_length("{" + entry("w", "F128", "[1]", "[0,16]") + "}", 16),
         ": tensor w: dtype not usable as weight (found \"F128\", need BF16, F16 or F32)", ""},
        {with_length("{" + entry("w", "F4", "[3]", "[0,2]") + "}", 2), ": tensor w: ends inside a byte (12 bits)", ""},
        {with_length("{" + entry("w", "U8", "[-1]", "[0,1]") + "}", 1), ": tensor w: shape must hold non-negative", ""},
        {with_length("{" + entry("w", "U8", "[1.0]", "[0,1]") + "}", 1), ": tensor w: shape must hold non-negative",
         ""},
        {with_length("{" + entry("w", "U8", "1", "[0,1]") + "}", 1), ": tensor w: shape missing or not an array", ""},
        {with_length("{" + entry("w", "U8", "[1]", "[0]") + "}", 1), ": tensor w: data_offsets missing or not two", ""},
        {with_length("{" + entry("w", "U8", "[1]", "[0,\"1\"]") + "}", 1),
         ": tensor w: data_offsets missing or not two", ""},
        {with_length("{\"w\":{\"shape\":[],\"data_offsets\":[0,0]}}"), ": tensor w: dtype missing or not a string", ""},
        {with_length("{\"w\":{\"dtype\":\"U8\",\"data_offsets\":[0,0]}}"), ": tensor w: shape missing", ""},
        {with_length("{\"w\":{\"dtype\":\"U8\",\"shape\":[]}}"), ": tensor w: data_offsets missing", ""},
        {with_length("{\"w\":7}"), ": tensor w: entry must be an object (found a number)", ""},
        {with_length("{\"__metadata__\":7}"), ": header: __metadata__ must be an object (found a number)", ""},
        {with_length("{\"__metadata__\":{\"k\":1}}"), ": header: __metadata__ key k must be a string (found a number)",
         ""},
        {with_length("{" + entry(std::string(1025, 'n').c_str(), "U8", "[]", "[0,1]") + "}", 1),
         ": name is longer than 1024 bytes", ""},
        {with_length("{" + entry("a\\u0000b", "U8", "[]", "[0,1]") + "}", 1), ": tensor a\\x00b: name is longer", ""},
        {with_length("{" + entry("a\\u001b[2J", "U8", "[]", "[0,2]") + "}", 2), ": tensor a\\x1B[2J: shape says", ""},
        {with_length(deep), ": header unreadable at byte 28: nesting deeper than 16", ""},
        {"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n",
         ": this is a Git LFS pointer, not the weights", "git lfs pull"},
        {"<!DOCTYPE html><html><body>404</body></html>",
         ": file starts with '<': not safetensors (download error page?)", "editor"},
        {"\n <html>....", ": file starts with '<'", ""},
        {std::string("PK\x03\x04\0\0\x08\x08\0\0", 10), ": a PyTorch pickle file, not safetensors", "run code"},
    };
    for (const auto& c : cases) {
        Safetensors st;
        Error e = open_bytes(st, c.bytes);
        CHECK(e.code == 2 && text_has(e.what, c.what) && text_has(e.hint, c.hint), "%s: %s | %s",
              printable(c.bytes.substr(8 < c.bytes.size() ? 8 : 0)).c_str(), e.what.c_str(), e.hint.c_str());
        CHECK(st.files.empty() && st.tensors.empty(), "%s: something is left open", c.what);
    }
}

// A header of more than a million entries fails at the cap on their number: what it takes stays near the size of the
// header.
static void safetensors_many_entries() {
    std::string header = "{";
    const std::string one = "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},";
    for (int i = 0; i < 1100000; i++) {
        header += "\"" + std::to_string(i) + one;
    }
    header.back() = '}';
    std::string path = path_join(test_directory(), "many.safetensors");
    CHECK(!file_replace(path, with_length(header, 1)), "write");
    header = std::string();
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    Safetensors st;
    Error e = safetensors_open(st, path);
    getrusage(RUSAGE_SELF, &after);
    CHECK(e.code == 2 && e.what == path + ": header: more than 1000000 tensors", "%s", e.what.c_str());
    long grown = after.ru_maxrss - before.ru_maxrss;  // KiB; 10^6 entries of about 250 bytes, keys, and the header
    CHECK(grown < 700 * 1024, "%ld KiB", grown);
}

static void safetensors_reads() {
    std::string data;
    for (int i = 0; i < 16; i++) {
        data += char('a' + i);
    }
    std::string path = path_join(test_directory(), "r.safetensors");
    std::string header = "{" + entry("a", "U8", "[4]", "[0,4]") + "," + entry("b", "I32", "[3]", "[4,16]") + "}  ";
    CHECK(header.size() % 8 != 0, "tensors at an odd place");
    CHECK(!file_replace(path, with_length(header) + data), "write");
    Safetensors st;
    Error e = safetensors_open(st, path);
    CHECK(!e, "%s", e.what.c_str());
    char out[13] = {};
    const Tensor* b = safetensors_find(st, "b");
    CHECK(!safetensors_read(st, *b, out, 0, 12) && !strcmp(out, "efghijklmnop"), "whole");
    memset(out, 0, sizeof out);
    CHECK(!safetensors_read(st, *b, out, 8, 4) && !strcmp(out, "mnop"), "a part");
    e = safetensors_read(st, *b, out, 9, 4);
    CHECK(e.code == 1 && text_has(e.what, "tensor b: read of 4 bytes at byte 9 goes past its 12 bytes"), "%s",
          e.what.c_str());
    CHECK(safetensors_read(st, *b, out, UINT64_MAX, 2).code == 1, "overflow");
    CHECK(!file_truncate(path, 8 + header.size() + 10), "truncate");
    e = safetensors_read(st, *b, out, 0, 12);
    CHECK(e.code == 1 && text_has(e.what, "file changed during load"), "%s", e.what.c_str());
    safetensors_close(st);
}

// The bytes are those of the reference writer: save_file({"b": f32 (2), "a": f32 (1), "h": bf16 (1,3), "s": u8 ()},
// metadata={"format": "pt"}).
static void safetensors_writes() {
    float b[2] = {1, -2}, a[1] = {0.5f};
    uint16_t h[3] = {0x3F80, 0x4000, 0x4040};
    uint8_t s[1] = {7};
    std::string dir = test_directory(), path = path_join(dir, "w.safetensors"), text;
    Error e = safetensors_write(
        path, {{"s", "U8", {}, s}, {"b", "F32", {2}, b}, {"h", "BF16", {1, 3}, h}, {"a", "F32", {1}, a}});
    CHECK(!e, "%s", e.what.c_str());
    std::string header =
        "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
        "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]},\"h\":{\"dtype\":\"BF16\",\"shape\":"
        "[1,3],\"data_offsets\":[12,18]},\"s\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[18,19]}}";
    header.append((8 - header.size() % 8) % 8, ' ');
    std::string data;
    data.append(reinterpret_cast<char*>(a), 4).append(reinterpret_cast<char*>(b), 8);
    data.append(reinterpret_cast<char*>(h), 6).append(reinterpret_cast<char*>(s), 1);
    CHECK(!file_read_all(text, path) && text == with_length(header) + data, "the bytes");
    e = safetensors_write(path, {});
    CHECK(e.code == 2 && text_has(e.what, "cannot create: File exists"), "%s", e.what.c_str());

    path = path_join(dir, "m.safetensors");
    CHECK(!safetensors_write(path, {}, {{"key", "v\n"}}), "no tensors, more metadata");
    Safetensors st;
    CHECK(!safetensors_open(st, path) && st.metadata.size() == 2 && st.metadata["key"] == "v\n", "metadata");
    safetensors_close(st);
    path = path_join(dir, "bad.safetensors");
    e = safetensors_write(path, {{"x", "F128", {1}, s}});
    CHECK(e.code == 1 && text_has(e.what, "tensor x of dtype F128 cannot be written") && !path_exists(path), "%s",
          e.what.c_str());
}

// ------------------------------------------------------------------------------------------------------ checkpoints

static void put(const std::string& dir, const std::string& name, const std::string& bytes) {
    Error e = file_replace(path_join(dir, name), bytes);
    CHECK(!e, "%s", e.what.c_str());
}

static std::string one_byte_tensors(std::vector<std::string> names) {
    std::string header = "{";
    for (size_t i = 0; i < names.size(); i++) {
        std::string range = "[" + std::to_string(i) + "," + std::to_string(i + 1) + "]";
        header += (i ? "," : "") + entry(names[i].c_str(), "U8", "[1]", range.c_str());
    }
    return with_length(header + "}", names.size());
}

static const char* const INDEX = "model.safetensors.index.json";
static const char* const FIRST = "model-00001-of-00002.safetensors";
static const char* const SECOND = "model-00002-of-00002.safetensors";

static std::string two_shards() {
    std::string dir = test_directory();
    put(dir, FIRST, one_byte_tensors({"a", "b"}));
    put(dir, SECOND, one_byte_tensors({"c"}));
    return dir;
}

static std::string index_of(const std::string& total, const std::string& b, const std::string& more = "") {
    return "{\"metadata\":{" + total + "},\"weight_map\":{\"a\":\"" + FIRST + "\",\"b\":" + b + ",\"c\":\"" + SECOND +
           "\"" + more + "}}";
}

static void checkpoint_good() {
    std::string dir = two_shards(), first = "\"" + std::string(FIRST) + "\"";
    put(dir, INDEX, index_of("\"total_size\":3", first));
    Safetensors st;
    Error e = checkpoint_open(st, dir);
    CHECK(!e && st.files.size() == 2 && st.tensors.size() == 3 && st.warnings.empty(), "%s", e.what.c_str());
    CHECK(safetensors_find(st, "c") && safetensors_find(st, "c")->file == 1, "the second shard");
    safetensors_close(st);

    const struct {
        const char *total, *warning;
    } sizes[] = {{"\"total_size\":4", "total_size should be 3 (found 4)"},
                 {"\"total_size\":3.0", "total_size should be 3 (found 3.0)"},
                 {"\"total_size\":\"3\"", "total_size should be 3 (found a string)"},
                 {"\"x\":3", "total_size should be 3 (found nothing)"}};
    for (const auto& s : sizes) {
        put(dir, INDEX, index_of(s.total, first));
        e = checkpoint_open(st, dir);
        CHECK(!e && st.warnings.size() == 1 && text_has(st.warnings[0], s.warning), "%s", s.warning);
        safetensors_close(st);
    }

    put(dir, "model.safetensors", one_byte_tensors({"only"}));
    e = checkpoint_open(st, dir);
    CHECK(!e && st.tensors.size() == 1 && st.warnings.size() == 1 &&
              text_has(st.warnings[0], "is there too and is ignored"),
          "a single file wins: %s", e.what.c_str());
    safetensors_close(st);

    std::string linked = test_directory();  // as in the cache of the hub: links into another folder
    put(dir, INDEX, index_of("\"total_size\":3", first));
    for (const char* name : {FIRST, SECOND, INDEX}) {
        CHECK(symlink(path_join(dir, name).c_str(), path_join(linked, name).c_str()) == 0, "symlink");
    }
    CHECK(!checkpoint_open(st, linked) && st.tensors.size() == 3, "links");
    safetensors_close(st);

    put(dir, SECOND, one_byte_tensors({"c", "d"}));
    CHECK(path_remove(path_join(dir, "model.safetensors")).code == 0, "remove");
    e = checkpoint_open(st, dir);
    CHECK(!e && !st.warnings.empty() && text_has(st.warnings[0], "tensor d of ") &&
              text_has(st.warnings[0], "is not in the index"),
          "a tensor that is not mapped");
    safetensors_close(st);
}

static void checkpoint_bad() {
    const std::string first = "\"" + std::string(FIRST) + "\"", size = "\"total_size\":3";
    const struct {
        std::string index;
        const char* what;
    } cases[] = {
        {index_of(size, first, ",\"d\":\"model-00003-of-00002.safetensors\""),
         "shard model-00003-of-00002.safetensors missing: download incomplete (1 of 3 shards missing)"},
        {index_of(size, "\"../../etc/x.safetensors\""),
         "illegal shard name \"../../etc/x.safetensors\" for b; refused"},
        {index_of(size, "\"/etc/x.safetensors\""), "illegal shard name"},
        {index_of(size, "\"a\\\\b.safetensors\""), "illegal shard name"},
        {index_of(size, "\"a..b.safetensors\""), "illegal shard name"},
        {index_of(size, "\".hidden.safetensors\""), "illegal shard name"},
        {index_of(size, "\"a\\u0000.safetensors\""), "illegal shard name \"a\\x00.safetensors\""},
        {index_of(size, "\"model.bin\""), "illegal shard name"},
        {index_of(size, "\".safetensors\""), "illegal shard name"},
        {index_of(size, "\"\""), "illegal shard name \"\""},
        {index_of(size, "\"m\xC3\xB6.safetensors\""), "illegal shard name"},
        {index_of(size, "7"), "index malformed: weight_map of b must be a file name (found a number)"},
        {index_of(size, "\"" + std::string(SECOND) + "\""),
         "shard model-00002-of-00002.safetensors does not contain b"},
        {index_of(size, first, ",\"z\":" + first), "shard model-00001-of-00002.safetensors does not contain z"},
        {"{\"weight_map\":{}}", "index malformed: weight_map must be an object with entries (found an empty one)"},
        {"{\"weight_map\":[]}", "index malformed: weight_map must be an object with entries (found an array)"},
        {"{}", "index malformed: weight_map must be an object with entries (found none)"},
        {"[]", "index malformed: weight_map must be an object with entries (found none)"},
        {"{\"weight_map\":", "model.safetensors.index.json:1:15: the file ends inside a JSON value"},
        {index_of(size, first, ",\"a\":" + first), "duplicate key \"a\""},
    };
    std::string dir = two_shards();
    for (const auto& c : cases) {
        put(dir, INDEX, c.index);
        Safetensors st;
        Error e = checkpoint_open(st, dir);
        CHECK(e.code == 2 && text_has(e.what, c.what), "%s: %s", c.what, e.what.c_str());
        CHECK(st.files.empty(), "%s: left open", c.what);
    }
    put(dir, INDEX, index_of(size, first));
    put(dir, SECOND, one_byte_tensors({"c", "a"}));
    Safetensors st;
    Error e = checkpoint_open(st, dir);
    CHECK(e.code == 2 && text_has(e.what, std::string(SECOND) + ": duplicate tensor a (also in ") &&
              text_has(e.what, FIRST),
          "%s", e.what.c_str());
}

static void checkpoint_absent() {
    const struct {
        const char *file, *what, *hint;
    } cases[] = {
        {nullptr, "no model.safetensors and no model.safetensors.index.json (found: an empty directory)", ""},
        {"readme.md", "no model.safetensors and no model.safetensors.index.json (found: readme.md)", ""},
        {"pytorch_model.bin", "only pytorch_model.bin is here: a pickle file can run code",
         "convert it to safetensors"},
        {"consolidated.00.pth", "only consolidated.00.pth is here", "save_pretrained"},
        {"model.ckpt", "only model.ckpt is here", ""},
        {"consolidated.safetensors", "consolidated.safetensors has other tensor names", "model*.safetensors"},
        {FIRST, "model.safetensors.index.json missing (found shard model-00001-of-00002.safetensors)", "index file"},
    };
    for (const auto& c : cases) {
        std::string dir = test_directory();
        if (c.file) {
            put(dir, c.file, "x");
        }
        Safetensors st;
        Error e = checkpoint_open(st, dir);
        CHECK(e.code == 2 && text_has(e.what, c.what) && text_has(e.hint, c.hint), "%s | %s", e.what.c_str(),
              e.hint.c_str());
    }
    Safetensors st;
    Error e = checkpoint_open(st, "/nowhere/at/all");
    CHECK(e.code == 2 && text_has(e.what, "No such file or directory"), "%s", e.what.c_str());
}

extern const Test safetensors_tests[];
const Test safetensors_tests[] = {
    {"safetensors_good", safetensors_good},
    {"safetensors_bad_files", safetensors_bad_files},
    {"safetensors_many_entries", safetensors_many_entries},
    {"safetensors_reads", safetensors_reads},
    {"safetensors_writes", safetensors_writes},
    {"checkpoint_good", checkpoint_good},
    {"checkpoint_bad", checkpoint_bad},
    {"checkpoint_absent", checkpoint_absent},
    {nullptr, nullptr},
};
