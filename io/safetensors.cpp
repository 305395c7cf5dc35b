// See safetensors.h. The checks follow the order of the reference implementation (huggingface/safetensors).
#include "io/safetensors.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <set>

static const uint64_t HEADER_CAP = 100000000;  // the reference's
static const size_t TENSOR_CAP = 1000000;      // a 405B checkpoint has 1,137, quantised ones six times as many
static const size_t NAME_CAP = 1024;
static const uint64_t DIMENSION_CAP = UINT64_C(1) << 48;

// Bits of one element; 0: no such dtype.
static int dtype_bits(const std::string& dtype) {
    static const struct {
        const char* name;
        int bits;
    } table[] = {{"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"BOOL", 8},        {"U8", 8},          {"I8", 8},
                 {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
                 {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
                 {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}};
    for (const auto& row : table) {
        if (dtype == row.name) {
            return row.bits;
        }
    }
    return 0;
}

uint64_t Tensor::elements() const {
    uint64_t n = 1;
    for (uint64_t d : shape) {
        n *= d;  // cannot overflow: the reader checked it
    }
    return n;
}

static std::string shown(const std::string& path) {
    return printable(path, 4096);
}

// ------------------------------------------------------------------------------------------------------ the header

struct Header {
    const std::string* path;
    std::vector<Tensor> tensors;  // offset counts from the data's start here
    std::map<std::string, std::string>* metadata;
};

static Error entry_error(const Header& h, const std::string& name, const std::string& what) {
    return bad_input("%s: tensor %s: %s", shown(*h.path).c_str(), printable(name).c_str(), what.c_str());
}

// A non-negative integer of the header.
static bool as_size(const Json& v, uint64_t& out) {
    out = v.natural;
    return v.type == Json::UINT || (v.type == Json::INT && v.integer >= 0);
}

static Error read_metadata(Header& h, Json& value) {
    if (value.type == Json::NUL) {
        return {};
    }
    if (value.type != Json::OBJECT) {
        return bad_input("%s: header: __metadata__ must be an object (found %s)", shown(*h.path).c_str(),
                         value.type_name());
    }
    for (size_t i = 0; i < value.items.size(); i++) {
        if (value.items[i].type != Json::STRING) {
            return bad_input("%s: header: __metadata__ key %s must be a string (found %s)", shown(*h.path).c_str(),
                             printable(value.keys[i]).c_str(), value.items[i].type_name());
        }
        (*h.metadata)[value.keys[i]] = value.items[i].string;
    }
    return {};
}

// Shape and dtype give the bytes, which must be those of the offsets.
static Error check_size(const Header& h, const Tensor& t, const std::string& name) {
    uint64_t elements = 1, bits = 0;
    bool overflow = false;
    for (uint64_t d : t.shape) {
        overflow |= __builtin_mul_overflow(elements, d, &elements) || d > DIMENSION_CAP;
    }
    int each = dtype_bits(t.dtype);
    if (each == 0) {
        return entry_error(h, name,
                           "dtype not usable as weight (found \"" + printable(t.dtype) + "\", need BF16, F16 or F32)");
    }
    overflow |= __builtin_mul_overflow(elements, uint64_t(each), &bits);
    if (overflow) {
        return entry_error(h, name, "size overflows");
    }
    if (bits % 8 != 0) {
        return entry_error(h, name, "ends inside a byte (" + std::to_string(bits) + " bits)");
    }
    if (bits / 8 != t.bytes) {
        return entry_error(h, name,
                           "shape says " + std::to_string(bits / 8) + " bytes, offsets say " + std::to_string(t.bytes));
    }
    return {};
}

static Error read_entry(void* context, std::string& name, Json& value) {
    Header& h = *static_cast<Header*>(context);
    if (name == "__metadata__") {
        return read_metadata(h, value);
    }
    if (h.tensors.size() == TENSOR_CAP) {
        return bad_input("%s: header: more than %zu tensors", shown(*h.path).c_str(), TENSOR_CAP);
    }
    if (name.size() > NAME_CAP || name.find('\0') != std::string::npos) {
        return entry_error(h, name, "name is longer than " + std::to_string(NAME_CAP) + " bytes or holds a NUL");
    }
    if (value.type != Json::OBJECT) {
        return entry_error(h, name, std::string("entry must be an object (found ") + value.type_name() + ")");
    }
    const Json* dtype = value.find("dtype");
    const Json* shape = value.find("shape");
    const Json* range = value.find("data_offsets");
    if (!dtype || dtype->type != Json::STRING) {
        return entry_error(h, name, "dtype missing or not a string");
    }
    if (!shape || shape->type != Json::ARRAY) {
        return entry_error(h, name, "shape missing or not an array");
    }
    Tensor t;
    t.dtype = dtype->string;
    for (const Json& d : shape->items) {
        uint64_t n;
        if (!as_size(d, n)) {
            return entry_error(h, name, "shape must hold non-negative integers");
        }
        t.shape.push_back(n);
    }
    uint64_t begin = 0, end = 0;
    if (!range || range->type != Json::ARRAY || range->items.size() != 2 || !as_size(range->items[0], begin) ||
        !as_size(range->items[1], end)) {
        return entry_error(h, name, "data_offsets missing or not two non-negative integers");
    }
    if (end < begin) {
        return entry_error(h, name, "data_offsets end before they begin");
    }
    t.offset = begin;
    t.bytes = end - begin;
    t.name = std::move(name);
    h.tensors.push_back(std::move(t));
    return {};
}

// The length cannot be right: say what the file is, when its first bytes tell.
static Error not_safetensors(const InFile& f, uint64_t length) {
    char head[64] = {};
    size_t n = size_t(std::min<uint64_t>(f.size, sizeof head));
    if (Error e = file_pread(f, head, n, 0)) {
        return e;
    }
    std::string start(head, n), path = shown(f.path);
    size_t first = start.find_first_not_of(" \t\r\n");
    if (start.rfind("version https://git-lfs", 0) == 0) {
        return bad_input("%s: this is a Git LFS pointer, not the weights", path.c_str())
            .hinted("run: git lfs pull (in the model's directory)");
    }
    if (first != std::string::npos && start[first] == '<') {
        return bad_input("%s: file starts with '<': not safetensors (download error page?)", path.c_str())
            .hinted("open the file in an editor to see the message; then download it again");
    }
    if (start.rfind("PK\x03\x04", 0) == 0 || start.rfind("\x80\x02", 0) == 0) {
        return bad_input("%s: a PyTorch pickle file, not safetensors", path.c_str())
            .hinted(
                "pickle files can run code and are not read; convert it with save_pretrained(safe_serialization=True)");
    }
    Error e = length > HEADER_CAP ? bad_input("%s: header length %" PRIu64 " exceeds the limit of %" PRIu64 " bytes",
                                              path.c_str(), length, HEADER_CAP)
                                  : bad_input("%s: header length %" PRIu64 " exceeds the file (%" PRIu64 " bytes)",
                                              path.c_str(), length, f.size);
    return e.hinted("the file is truncated, or it is not safetensors: download it again");
}

// Tensors must follow each other without holes and fill the file.
static Error check_layout(Header& h, const InFile& f, uint64_t data) {
    std::stable_sort(h.tensors.begin(), h.tensors.end(), [](const Tensor& a, const Tensor& b) {
        return a.offset != b.offset ? a.offset < b.offset : a.bytes < b.bytes;
    });
    uint64_t end = 0;
    for (const Tensor& t : h.tensors) {
        if (t.offset != end) {
            return entry_error(h, t.name,
                               "offsets do not follow previous tensor (found " + std::to_string(t.offset) + ", need " +
                                   std::to_string(end) + ")");
        }
        if (Error e = check_size(h, t, t.name)) {
            return e;
        }
        end += t.bytes;  // no overflow: offset + bytes is a u64 that the header gave
    }
    uint64_t need;
    if (__builtin_add_overflow(data, end, &need)) {
        return entry_error(h, h.tensors.back().name, "size overflows");
    }
    if (need > f.size) {
        return bad_input("%s: file is %" PRIu64 " bytes, header needs %" PRIu64 ": download incomplete",
                         shown(f.path).c_str(), f.size, need)
            .hinted("download the file again");
    }
    if (need < f.size) {
        return bad_input("%s: %" PRIu64 " unexpected bytes after the last tensor", shown(f.path).c_str(),
                         f.size - need);
    }
    return {};
}

// Header of an open file; tensors' offsets count from the file's start.
static Error read_header(Header& h, const InFile& f) {
    if (f.size < 8) {
        return bad_input("%s: too short to be safetensors (found %" PRIu64 " bytes, need at least 8)",
                         shown(f.path).c_str(), f.size)
            .hinted("download the file again");
    }
    unsigned char little[8];
    if (Error e = file_pread(f, little, 8, 0)) {
        return e;
    }
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) {
        length = length << 8 | little[i];
    }
    if (length > HEADER_CAP || length > f.size - 8) {
        return not_safetensors(f, length);
    }
    std::string text(size_t(length), '\0');
    if (Error e = file_pread(f, &text[0], text.size(), 8)) {
        return e;
    }
    JsonLimits limits;
    limits.depth = 16;
    limits.by_byte = true;
    limits.first_byte = 8;
    limits.values = 100000;
    limits.member = read_entry;
    limits.context = &h;
    Json root;
    if (Error e = json_parse(root, text.data(), text.size(), f.path + ": header", limits)) {
        return e;
    }
    if (root.type != Json::OBJECT) {
        return bad_input("%s: header unreadable at byte 8: must be an object (found %s)", shown(f.path).c_str(),
                         root.type_name());
    }
    if (Error e = check_layout(h, f, 8 + length)) {
        return e;
    }
    for (Tensor& t : h.tensors) {
        t.offset += 8 + length;
    }
    return {};
}

// Adds one file to st.
static Error add_file(Safetensors& st, const std::string& path) {
    InFile f;
    if (Error e = file_open(f, path)) {
        return e;
    }
    int file = int(st.files.size());
    st.files.push_back(f);
    std::map<std::string, std::string> unused;
    Header h{&path, {}, file == 0 ? &st.metadata : &unused};
    if (Error e = read_header(h, f)) {
        return e;
    }
    for (Tensor& t : h.tensors) {
        t.file = file;
        auto [place, fresh] = st.index.emplace(t.name, st.tensors.size());
        if (!fresh) {
            return bad_input("%s: duplicate tensor %s (also in %s)", shown(path).c_str(), printable(t.name).c_str(),
                             shown(st.files[size_t(st.tensors[place->second].file)].path).c_str());
        }
        st.tensors.push_back(std::move(t));
    }
    return {};
}

static Error close_unless_good(Safetensors& st, Error e) {
    if (e) {
        safetensors_close(st);
    }
    return e.or_hinted("the file is damaged, or no 16-bit or 32-bit checkpoint: download it again");
}

Error safetensors_open(Safetensors& st, const std::string& path) {
    st = Safetensors();
    return close_unless_good(st, add_file(st, path));
}

void safetensors_close(Safetensors& st) {
    for (InFile& f : st.files) {
        file_close(f);
    }
    st = Safetensors();
}

const Tensor* safetensors_find(const Safetensors& st, const std::string& name) {
    auto found = st.index.find(name);
    return found == st.index.end() ? nullptr : &st.tensors[found->second];
}

Error safetensors_read(const Safetensors& st, const Tensor& t, void* out, uint64_t first, size_t bytes) {
    const InFile& f = st.files[size_t(t.file)];
    if (first > t.bytes || bytes > t.bytes - first) {
        return runtime_failure("%s: tensor %s: read of %zu bytes at byte %" PRIu64 " goes past its %" PRIu64 " bytes",
                               shown(f.path).c_str(), printable(t.name).c_str(), bytes, first, t.bytes);
    }
    return file_pread(f, out, bytes, t.offset + first);
}

// ------------------------------------------------------------------------------------------------------ checkpoints

static bool ends_with(const std::string& s, const char* end) {
    size_t n = strlen(end);
    return s.size() >= n && s.compare(s.size() - n, n, end) == 0;
}

// A plain file name of the model's own directory: letters, digits, '.', '_', '-', and not hidden.
static bool legal_shard_name(const std::string& name) {
    bool plain = std::all_of(name.begin(), name.end(), [](char c) {
        return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || strchr("._-", c);
    });
    return plain && name.find('\0') == std::string::npos && name[0] != '.' && name.find("..") == std::string::npos &&
           ends_with(name, ".safetensors") && name.size() > strlen(".safetensors");
}

// There is neither model.safetensors nor its index: say why from what is there.
static Error no_checkpoint(const std::string& dir) {
    std::vector<std::string> names;
    if (Error e = dir_list(names, dir)) {
        return e;
    }
    std::string list, pickle, shard, native;
    for (const std::string& name : names) {
        list += (list.empty() ? "" : ", ") + printable(name);
        bool is_pickle =
            ends_with(name, ".bin") || ends_with(name, ".pth") || ends_with(name, ".pt") || ends_with(name, ".ckpt");
        pickle = is_pickle && pickle.empty() ? name : pickle;
        bool is_native = name.rfind("consolidated", 0) == 0 && ends_with(name, ".safetensors");
        native = is_native ? name : native;
        shard = !is_native && ends_with(name, ".safetensors") && name.find("-of-") != std::string::npos ? name : shard;
    }
    std::string where = shown(dir);
    if (!shard.empty()) {
        return bad_input("%s: model.safetensors.index.json missing (found shard %s)", where.c_str(),
                         printable(shard).c_str())
            .hinted("the download is incomplete: get the index file as well");
    }
    if (!native.empty()) {
        return bad_input("%s: %s has other tensor names than a Hugging Face checkpoint", where.c_str(),
                         printable(native).c_str())
            .hinted("get the files named model*.safetensors of the same model");
    }
    if (!pickle.empty()) {
        return bad_input("%s: only %s is here: a pickle file can run code when it is read, so it is not", where.c_str(),
                         printable(pickle).c_str())
            .hinted(
                "convert it to safetensors once, in Python: AutoModelForCausalLM.from_pretrained(DIR)."
                "save_pretrained(NEW_DIR, safe_serialization=True)");
    }
    return bad_input("%s: no model.safetensors and no model.safetensors.index.json (found: %s)", where.c_str(),
                     list.empty() ? "an empty directory" : printable(list, 1000).c_str());
}

static void check_total_size(Safetensors& st, const Json& index, const std::string& path) {
    uint64_t bytes = 0;
    for (const Tensor& t : st.tensors) {
        bytes += t.bytes;
    }
    const Json* metadata = index.find("metadata");
    const Json* total = metadata ? metadata->find("total_size") : nullptr;
    std::string found = !total ? "nothing" : total->is_number() ? json_write(*total) : total->type_name();
    if (!total || (total->type != Json::INT && total->type != Json::UINT) || total->natural != bytes) {
        st.warnings.push_back(shown(path) + ": metadata.total_size should be " + std::to_string(bytes) + " (found " +
                              found + "); it is not used");
    }
}

// Opens every shard of weight_map, then compares map and shards.
static Error open_shards(Safetensors& st, const std::string& dir, const std::string& path, const Json& map) {
    std::set<std::string> shards;
    for (size_t i = 0; i < map.items.size(); i++) {
        const Json& shard = map.items[i];
        if (shard.type != Json::STRING) {
            return bad_input("%s: index malformed: weight_map of %s must be a file name (found %s)",
                             shown(path).c_str(), printable(map.keys[i]).c_str(), shard.type_name());
        }
        if (!legal_shard_name(shard.string)) {
            return bad_input("%s: illegal shard name \"%s\" for %s; refused", shown(path).c_str(),
                             printable(shard.string).c_str(), printable(map.keys[i]).c_str())
                .hinted("shards are plain names in the model's own directory, like model-00001-of-00004.safetensors");
        }
        shards.insert(shard.string);
    }
    size_t missing = 0;
    std::string first_missing;
    for (const std::string& shard : shards) {
        if (!path_exists(path_join(dir, shard))) {
            first_missing = missing++ == 0 ? shard : first_missing;
        }
    }
    if (missing) {
        return bad_input("%s: shard %s missing: download incomplete (%zu of %zu shards missing)", shown(path).c_str(),
                         first_missing.c_str(), missing, shards.size())
            .hinted("download the missing files");
    }
    for (const std::string& shard : shards) {
        if (Error e = add_file(st, path_join(dir, shard))) {
            return e;
        }
    }
    for (size_t i = 0; i < map.items.size(); i++) {
        const Tensor* t = safetensors_find(st, map.keys[i]);
        if (!t || st.files[size_t(t->file)].path != path_join(dir, map.items[i].string)) {
            return bad_input("%s: shard %s does not contain %s", shown(path).c_str(), map.items[i].string.c_str(),
                             printable(map.keys[i]).c_str())
                .hinted("index and shards are not of one download: get all of them again");
        }
    }
    std::set<std::string> mapped(map.keys.begin(), map.keys.end());
    for (const Tensor& t : st.tensors) {
        if (!mapped.count(t.name)) {
            st.warnings.push_back(shown(path) + ": tensor " + printable(t.name) + " of " +
                                  shown(st.files[size_t(t.file)].path) + " is not in the index");
        }
    }
    return {};
}

static Error open_index(Safetensors& st, const std::string& dir, const std::string& path) {
    Json index;
    if (Error e = json_read_file(index, path)) {
        return e;
    }
    const Json* map = index.find("weight_map");
    if (!map || map->type != Json::OBJECT || map->items.empty()) {
        return bad_input("%s: index malformed: weight_map must be an object with entries (found %s)",
                         shown(path).c_str(),
                         !map                        ? "none"
                         : map->type == Json::OBJECT ? "an empty one"
                                                     : map->type_name());
    }
    if (Error e = open_shards(st, dir, path, *map)) {
        return e;
    }
    check_total_size(st, index, path);
    return {};
}

Error checkpoint_open(Safetensors& st, const std::string& model_dir) {
    st = Safetensors();
    std::string single = path_join(model_dir, "model.safetensors");
    std::string index = path_join(model_dir, "model.safetensors.index.json");
    if (path_exists(single)) {
        Error e = add_file(st, single);
        if (!e && path_exists(index)) {
            st.warnings.push_back(shown(single) + " is used; " + shown(index) + " is there too and is ignored");
        }
        return close_unless_good(st, e);
    }
    return close_unless_good(st, path_exists(index) ? open_index(st, model_dir, index) : no_checkpoint(model_dir));
}

// ------------------------------------------------------------------------------------------------------ writing

static Error write_file(OutFile& f, const std::string& header, const std::vector<TensorOut>& tensors,
                        const std::vector<uint64_t>& bytes) {
    unsigned char little[8];
    for (int i = 0; i < 8; i++) {
        little[i] = static_cast<unsigned char>(uint64_t(header.size()) >> 8 * i);
    }
    if (Error e = out_write(f, little, 8)) {
        return e;
    }
    if (Error e = out_write(f, header.data(), header.size())) {
        return e;
    }
    for (size_t i = 0; i < tensors.size(); i++) {
        if (Error e = out_write(f, tensors[i].data, size_t(bytes[i]))) {
            return e;
        }
    }
    return {};
}

Error safetensors_write(const std::string& path, std::vector<TensorOut> tensors,
                        const std::map<std::string, std::string>& extra_metadata) {
    std::sort(tensors.begin(), tensors.end(), [](const TensorOut& a, const TensorOut& b) {
        int bits_a = dtype_bits(a.dtype), bits_b = dtype_bits(b.dtype);
        return bits_a != bits_b ? bits_a > bits_b : a.name < b.name;
    });
    std::map<std::string, std::string> metadata = extra_metadata;
    metadata["format"] = "pt";
    Json root = Json::object(), strings = Json::object();
    for (const auto& [key, value] : metadata) {
        strings.set(key, value);
    }
    root.set("__metadata__", strings);
    uint64_t end = 0;
    std::vector<uint64_t> bytes;
    for (const TensorOut& out : tensors) {
        Json shape = Json::array();
        uint64_t bits = uint64_t(dtype_bits(out.dtype));
        bool wrong = bits == 0;
        for (uint64_t d : out.shape) {
            shape.push(d);
            wrong |= __builtin_mul_overflow(bits, d, &bits);
        }
        if (wrong || bits % 8 != 0) {
            return runtime_failure("%s: tensor %s of dtype %s cannot be written", shown(path).c_str(), out.name.c_str(),
                                   out.dtype.c_str());
        }
        bytes.push_back(bits / 8);
        Json entry = Json::object();
        entry.set("dtype", out.dtype).set("shape", shape);
        entry.set("data_offsets", Json::array().push(end).push(end + bits / 8));
        root.keys.push_back(out.name);
        root.items.push_back(std::move(entry));
        end += bits / 8;
    }
    std::string header = json_write(root);
    header.append((8 - header.size() % 8) % 8, ' ');
    OutFile f;
    if (Error e = out_create(f, path)) {
        return e;
    }
    Error e = write_file(f, header, tensors, bytes);
    Error closed = out_close(f);
    e = e ? e : closed;
    if (e) {
        Error removed = path_remove(path);  // the first error is the one to tell
        (void)removed;
    }
    return e;
}
