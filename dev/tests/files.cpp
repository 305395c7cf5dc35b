// io/file and io/error: bounded reads, whole or absent writes, names, hashes, and the words of their errors.
#include "io/file.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstring>

#include "dev/tests/test.h"

static std::string read_back(const std::string& path) {
    std::string text;
    Error e = file_read_all(text, path);
    CHECK(!e, "%s", e.what.c_str());
    return text;
}

static void error_texts() {
    Error e = bad_input("%s:%d: bad", "f", 3);
    CHECK(e && e.code == 2 && e.what == "f:3: bad" && e.hint.empty(), "%s", e.what.c_str());
    CHECK(e.hinted("do").hint == "do" && runtime_failure("x").code == 1 && !Error(), "codes");
    std::string lines(10000, 'x');
    CHECK(bad_input("%s", lines.c_str()).what == lines, "a long message");
    CHECK(printable("a\x1b[31m\n\x7f") == "a\\x1B[31m\\x0A\\x7F", "control bytes");
    CHECK(printable(std::string("a\0b", 3)) == "a\\x00b", "NUL");
    CHECK(printable("\xC3\xA9\xFF\xE2\x82") == "\xC3\xA9\\xFF\\xE2\\x82", "invalid UTF-8");
    CHECK(printable("\xC2\x9B") == "\\xC2\\x9B", "the 8-bit control CSI");
    CHECK(printable("abcdef", 4) == "abcd..." && printable("abcd", 4) == "abcd", "cut");
    CHECK(printable("abc\xC3\xA9", 4) == "abc...", "not cut inside a character");
    const struct {
        const char* text;
        size_t length;
    } sequences[] = {{"a", 1},
                     {"\xC3\xA9", 2},
                     {"\xE2\x82\xAC", 3},
                     {"\xF0\x9F\x98\x80", 4},
                     {"\x80", 0},
                     {"\xC1\xBF", 0},
                     {"\xE0\x9F\xBF", 0},
                     {"\xED\xA0\x80", 0},
                     {"\xF0\x8F\xBF\xBF", 0},
                     {"\xF5\x80\x80\x80", 0},
                     {"\xC3", 0},
                     {"\xC3z", 0},
                     {"\xEF\xBF\xBF", 3},
                     {"", 0}};
    for (const auto& s : sequences) {
        CHECK(utf8_sequence(s.text, strlen(s.text)) == s.length, "%s", printable(s.text).c_str());
    }
}

static void file_reads() {
    std::string dir = test_directory(), path = path_join(dir, "a b \xC3\xA9"), text;
    CHECK(!file_replace(path, std::string("one\0two", 7)), "write");
    CHECK(read_back(path) == std::string("one\0two", 7), "read");
    Error e = file_read_all(text, path, 6);
    CHECK(e.code == 2 && text_has(e.what, "file too large (found 7 bytes, need at most 6)"), "%s", e.what.c_str());

    InFile f;
    CHECK(!file_open(f, path) && f.size == 7 && f.path == path, "open");
    char part[4] = {};
    CHECK(!file_pread(f, part, 3, 4) && !strcmp(part, "two"), "a part");
    CHECK(!file_pread(f, part, 0, 7), "nothing at the end");
    e = file_pread(f, part, 2, 6);
    CHECK(e.code == 1 && text_has(e.what, "goes past the end (file has 7 bytes)"), "%s", e.what.c_str());
    CHECK(file_pread(f, part, 2, UINT64_MAX).code == 1, "an offset that would overflow");
    CHECK(!file_truncate(path, 5), "truncate");
    e = file_pread(f, part, 3, 4);
    CHECK(e.code == 1 && text_has(e.what, "file changed during load (found 5 bytes, need 7)"), "%s", e.what.c_str());
    file_close(f);
    CHECK(f.fd == -1, "closed");
}

static void file_refusals() {
    std::string dir = test_directory(), text;
    Error e = file_read_all(text, path_join(dir, "none"));
    CHECK(e.code == 2 && e.what == dir + "/none: cannot open: No such file or directory", "%s", e.what.c_str());
    e = file_read_all(text, dir);
    CHECK(e.code == 2 && e.what == dir + ": not a regular file (found a directory)", "%s", e.what.c_str());
    std::string fifo = path_join(dir, "fifo");
    CHECK(mkfifo(fifo.c_str(), 0600) == 0, "mkfifo");
    e = file_read_all(text, fifo);
    CHECK(e.code == 2 && e.what == fifo + ": not a regular file (found a pipe (FIFO))", "%s", e.what.c_str());
    e = file_read_all(text, "/dev/zero");
    CHECK(e.code == 2 && e.what == "/dev/zero: not a regular file (found a device)", "%s", e.what.c_str());
    e = file_read_all(text, path_join(dir, std::string(300, 'n')));
    CHECK(e.code == 2 && text_has(e.what, "File name too long") && text_has(e.hint, "255 bytes"), "%s", e.what.c_str());
    e = file_read_all(text, path_join(dir, "line\nbreak\x1b[2J"));
    CHECK(text_has(e.what, "line\\x0Abreak\\x1B[2J: cannot open"), "%s", e.what.c_str());
    std::string path = path_join(dir, "secret");
    CHECK(!file_replace(path, "x") && chmod(path.c_str(), 0) == 0, "write");
    bool root = geteuid() == 0;  // may read anything: another user asks then
    CHECK(!root || seteuid(65534) == 0, "seteuid");
    e = file_read_all(text, path);
    CHECK(!root || seteuid(0) == 0, "seteuid");
    CHECK(e.code == 2 && text_has(e.what, ": cannot open: Permission denied") && text_has(e.hint, "permissions"), "%s",
          e.what.c_str());
}

static void file_writes() {
    std::string dir = test_directory(), path = path_join(dir, "out");
    OutFile f;
    CHECK(!out_create(f, path) && !out_write(f, "abc", 3) && !out_write(f, "", 0), "create");
    CHECK(f.written == 3 && !out_sync(f) && !out_close(f) && f.fd == -1 && !out_close(f), "close");
    Error e = out_create(f, path);
    CHECK(e.code == 2 && e.what == path + ": cannot create: File exists", "%s", e.what.c_str());
    CHECK(!out_append(f, path) && f.written == 3 && !out_write(f, "de", 2) && f.written == 5 && !out_close(f),
          "append");
    CHECK(read_back(path) == "abcde", "what was written");
    CHECK(!file_replace(path, "new") && read_back(path) == "new", "replace");
    CHECK(!file_replace(path, "") && read_back(path).empty(), "replace by nothing");
    struct stat s;
    mode_t mask = umask(0);
    umask(mask);
    CHECK(stat(path.c_str(), &s) == 0 && (s.st_mode & 0777) == (0644 & ~mask), "mode %o", unsigned(s.st_mode & 0777));

    std::string link = path_join(dir, "link");
    CHECK(symlink(path.c_str(), link.c_str()) == 0, "symlink");
    CHECK(out_create(f, link).code == 2, "a link is not written through");
    std::vector<std::string> names;
    CHECK(!dir_list(names, dir) && names == std::vector<std::string>({"link", "out"}), "no temporary file is left");
    e = file_replace(path_join(dir, "none/x"), "x");
    CHECK(e.code == 2 && text_has(e.what, "cannot create: No such file or directory"), "%s", e.what.c_str());
    CHECK(!dir_create(path_join(dir, "d")), "directory");
    e = file_replace(path_join(dir, "d"), "x");
    CHECK(e.code == 2 && text_has(e.what, "cannot rename to " + dir + "/d: Is a directory"), "%s", e.what.c_str());
    CHECK(!dir_list(names, dir) && names == std::vector<std::string>({"d", "link", "out"}),
          "a failed write leaves nothing");
    CHECK(out_append(f, path_join(dir, "d")).code == 2 && f.fd == -1, "a directory cannot be appended to");
}

// The device that is always full, and a write that the file size limit stops: both are named, nothing is left behind.
static void file_full() {
    OutFile f;
    f.path = "/dev/full";
    f.fd = open("/dev/full", O_WRONLY);
    if (f.fd < 0) {
        return test_skip("no /dev/full");
    }
    Error e = out_write(f, "x", 1);
    CHECK(e.code == 1 && e.what == "/dev/full: cannot write: No space left on device" &&
              text_has(e.hint, "free some space"),
          "%s", e.what.c_str());
    Error closed = out_close(f);
    CHECK(f.fd == -1, "closed: %s", closed.what.c_str());

    std::string dir = test_directory();
    struct rlimit old, low;
    getrlimit(RLIMIT_FSIZE, &old);
    low = old;
    low.rlim_cur = 65536;
    signal(SIGXFSZ, SIG_IGN);
    CHECK(setrlimit(RLIMIT_FSIZE, &low) == 0, "setrlimit");
    e = file_replace(path_join(dir, "big"), std::string(100000, 'x'));
    setrlimit(RLIMIT_FSIZE, &old);
    CHECK(e.code == 1 && text_has(e.what, "cannot write: File too large"), "%s", e.what.c_str());
    std::vector<std::string> names;
    CHECK(!dir_list(names, dir) && names.empty(), "nothing is left");
}

static void file_trees() {
    std::string dir = test_directory(), deep = path_join(dir, "a/b//c/");
    CHECK(!dir_create(deep) && path_is_directory(path_join(dir, "a/b/c")) && !dir_create(deep), "with parents");
    CHECK(!file_replace(path_join(dir, "a/file"), "x"), "write");
    Error e = dir_create(path_join(dir, "a/file/d"));
    CHECK(e.code == 2 && text_has(e.what, "a/file: cannot create directory: a file of this name is in the way"), "%s",
          e.what.c_str());
    CHECK(dir_create("").code == 2, "no name");
    CHECK(!path_rename(path_join(dir, "a/b"), path_join(dir, "z")) && path_is_directory(path_join(dir, "z/c")),
          "rename");
    e = path_rename(path_join(dir, "none"), path_join(dir, "y"));
    CHECK(e.code == 2 && text_has(e.what, "none: cannot rename to"), "%s", e.what.c_str());

    std::string kept = path_join(dir, "kept");
    CHECK(!dir_create(kept) && !file_replace(path_join(kept, "x"), "x"), "write");
    CHECK(symlink(kept.c_str(), path_join(dir, "a/link").c_str()) == 0, "symlink");
    CHECK(symlink(kept.c_str(), path_join(dir, "link").c_str()) == 0, "symlink");
    CHECK(!path_remove(path_join(dir, "a")) && !path_exists(path_join(dir, "a")), "a tree");
    CHECK(!path_remove(path_join(dir, "link/")) && path_exists(path_join(kept, "x")), "links are not followed");
    CHECK(!path_remove(path_join(dir, "none")), "what is not there");
    CHECK(!dir_sync(dir) && dir_sync(path_join(dir, "none")).code == 2, "sync");
    std::vector<std::string> names;
    CHECK(dir_list(names, path_join(dir, "none")).code == 2, "list");
    CHECK(disk_free_bytes(path_join(dir, "not/yet/there")) != UINT64_MAX && disk_free_bytes("") != UINT64_MAX,
          "free bytes");
    CHECK(file_truncate(path_join(dir, "none"), 1).code == 2, "truncate");
}

static void file_names() {
    CHECK(path_join("a", "b") == "a/b" && path_join("a/", "b") == "a/b" && path_join("", "b") == "b", "join");
    CHECK(path_directory("a") == "." && path_directory("a/b") == "a" && path_directory("/a") == "/", "directory");
    CHECK(path_directory("a/b/") == "a" && path_directory("a//b") == "a" && path_directory("/") == "/", "directory");
    CHECK(path_stem("x/data.jsonl") == "data" && path_stem("data") == "data" && path_stem(".hidden") == ".hidden",
          "stem");
    CHECK(path_stem("a.tar.gz") == "a.tar" && path_stem("d.x/f") == "f" && path_stem("d.x/") == "d", "stem");
    CHECK(path_stem("") == "" && path_directory("") == ".", "empty");
}

// FIPS 180-2, appendix B.
static void file_hashes() {
    CHECK(sha256_hex("abc", 3) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "abc");
    CHECK(sha256_hex("", 0) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "empty");
    std::string path = path_join(test_directory(), "a"), hex;
    CHECK(!file_replace(path, std::string(1000000, 'a')) && !file_truncate(path, 1000000), "write");
    CHECK(!sha256_file(hex, path) && hex == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
          "a million a");
    CHECK(!file_replace(path, std::string(3u << 20, 'x')), "write");
    CHECK(!sha256_file(hex, path) && hex == sha256_hex(std::string(3u << 20, 'x').data(), 3u << 20), "in chunks");
    CHECK(sha256_file(hex, path + "x").code == 2 && hex.empty(), "no file");
}

static void harness_commands() {
    std::string out;
    CHECK(run_command(&out, "echo one; echo two >&2; exit 7") == 7 && out == "one\ntwo\n", "%s", out.c_str());
    CHECK(run_command(nullptr, "exit 0") == 0 && run_command(&out, "kill -TERM $$") == 128 + SIGTERM, "a signal");
    CHECK(text_has("abc", "bc") && !text_has("abc", "x"), "text_has");
    CHECK(test_directory() != test_directory(), "fresh directories");
}

extern const Test files_tests[];
const Test files_tests[] = {
    {"error_texts", error_texts}, {"file_reads", file_reads},   {"file_refusals", file_refusals},
    {"file_writes", file_writes}, {"file_full", file_full},     {"file_trees", file_trees},
    {"file_names", file_names},   {"file_hashes", file_hashes}, {"harness_commands", harness_commands},
    {nullptr, nullptr},
};
