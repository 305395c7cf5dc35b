// Files and directories. Everything the program reads or writes on disk passes here: bounded reads by pread, and
// writes that are whole or absent (temporary name beside the target, checked write, fsync, checked close, rename,
// fsync of the directory). No stdio, no iostream, no formats.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "io/error.h"

struct InFile {
    int fd = -1;
    uint64_t size = 0;  // at open; a read past it, or a file that has shrunk, is "file changed during load"
    std::string path;
};
Error file_open(InFile& f, const std::string& path);                          // regular files only
Error file_pread(const InFile& f, void* out, size_t bytes, uint64_t offset);  // all bytes or an error
void file_close(InFile& f);
Error file_read_all(std::string& out, const std::string& path, uint64_t cap = UINT64_C(1) << 30);
bool path_exists(const std::string& path);
bool path_is_directory(const std::string& path);
Error dir_list(std::vector<std::string>& names, const std::string& path);  // sorted, without . and ..

struct OutFile {
    int fd = -1;
    uint64_t written = 0;  // the file's size: out_append starts with what is there
    std::string path;
};
Error out_create(OutFile& f, const std::string& path);                  // O_EXCL: never overwrites
Error out_append(OutFile& f, const std::string& path);                  // creates or appends (log.jsonl)
Error out_write(OutFile& f, const void* data, size_t bytes);            // loops over short writes, EINTR
Error out_sync(OutFile& f);                                             // fsync
Error out_close(OutFile& f);                                            // fsync, then a checked close; always frees fd
Error file_replace(const std::string& path, const std::string& bytes);  // temp name, fsync, rename, fsync dir

Error dir_create(const std::string& path);  // with parents, 0755
Error dir_sync(const std::string& path);
Error path_rename(const std::string& from, const std::string& to);  // and fsync of to's directory
Error file_truncate(const std::string& path, uint64_t size);
Error path_remove(const std::string& path);         // a file, or a tree; follows no links; absent: fine
uint64_t disk_free_bytes(const std::string& path);  // of the file system that holds path (or will); UINT64_MAX: unknown

std::string path_join(const std::string& dir, const std::string& name);
std::string path_directory(const std::string& path);  // "." when there is none
std::string path_stem(const std::string& path);       // file name without directory and last extension

std::string sha256_hex(const void* data, size_t bytes);  // libcrypto
Error sha256_file(std::string& hex, const std::string& path);
