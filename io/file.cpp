// See file.h.
#include "io/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

static const size_t CHUNK = size_t(1) << 30;  // one read or write call never asks for more (Linux stops at 2 GiB)

static std::string shown(const std::string& path) {
    return printable(path, 4096);
}

// "PATH: cannot DO: system text". What the user can put right by another path or permission is code 2.
static Error system_error(const std::string& path, const char* doing, int number) {
    bool user = number == ENOENT || number == ENOTDIR || number == EACCES || number == EPERM || number == EISDIR ||
                number == ENAMETOOLONG || number == ELOOP || number == EROFS || number == EEXIST;
    std::string reason = std::generic_category().message(number);
    Error e = user ? bad_input("%s: cannot %s: %s", shown(path).c_str(), doing, reason.c_str())
                   : runtime_failure("%s: cannot %s: %s", shown(path).c_str(), doing, reason.c_str());
    switch (number) {
        case ENOSPC: return e.hinted("free some space on this disk, or write to another one");
        case EDQUOT: return e.hinted("your disk quota is used up: free some space, or write to another disk");
        case EACCES:
        case EPERM: return e.hinted("check who owns the file and the permissions of it and its directories (ls -ld)");
        case EROFS: return e.hinted("this file system is read-only: choose another place");
        case ENAMETOOLONG: return e.hinted("most file systems allow 255 bytes in a name: choose a shorter one");
        case EMFILE:
        case ENFILE: return e.hinted("too many files are open: raise the limit (ulimit -n)");
        default: return e;
    }
}

// ---------------------------------------------------------------------------------------------------- reading

static const char* kind_of(mode_t mode) {
    return S_ISDIR(mode) ? "a directory" : S_ISFIFO(mode) ? "a pipe (FIFO)" : S_ISSOCK(mode) ? "a socket" : "a device";
}

static Error need_regular(const std::string& path, mode_t mode) {
    if (S_ISREG(mode)) {
        return {};
    }
    return bad_input("%s: not a regular file (found %s)", shown(path).c_str(), kind_of(mode));
}

Error file_open(InFile& f, const std::string& path) {
    f = InFile();
    f.path = path;
    f.fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // non-blocking: a FIFO must not hang the open
    if (f.fd < 0) {
        struct stat s;
        if (errno == ENXIO && stat(path.c_str(), &s) == 0) {  // a socket, or a device that is not there
            return need_regular(path, s.st_mode);
        }
        return system_error(path, "open", errno);
    }
    struct stat s;
    Error e;
    if (fstat(f.fd, &s) != 0) {
        e = system_error(path, "stat", errno);
    } else {
        e = need_regular(path, s.st_mode);
        f.size = uint64_t(s.st_size);
    }
    if (e) {
        file_close(f);
    }
    return e;
}

static Error changed(const InFile& f, uint64_t found) {
    return runtime_failure("%s: file changed during load (found %" PRIu64 " bytes, need %" PRIu64 ")",
                           shown(f.path).c_str(), found, f.size)
        .hinted("something else writes to this file; wait until that is done and start again");
}

Error file_pread(const InFile& f, void* out, size_t bytes, uint64_t offset) {
    if (offset > f.size || bytes > f.size - offset) {
        return runtime_failure("%s: read of %zu bytes at byte %" PRIu64 " goes past the end (file has %" PRIu64
                               " bytes)",
                               shown(f.path).c_str(), bytes, offset, f.size);
    }
    char* at = static_cast<char*>(out);
    while (bytes > 0) {
        ssize_t n = pread(f.fd, at, std::min(bytes, CHUNK), off_t(offset));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return system_error(f.path, "read", errno);
        }
        if (n == 0) {
            return changed(f, offset);
        }
        at += n;
        bytes -= size_t(n);
        offset += uint64_t(n);
    }
    return {};
}

void file_close(InFile& f) {
    if (f.fd >= 0) {
        close(f.fd);
        f.fd = -1;
    }
}

static Error read_open_file(std::string& out, const InFile& f, uint64_t cap) {
    if (f.size > cap) {
        return bad_input("%s: file too large (found %" PRIu64 " bytes, need at most %" PRIu64 ")",
                         shown(f.path).c_str(), f.size, cap);
    }
    out.resize(size_t(f.size));
    if (Error e = file_pread(f, &out[0], out.size(), 0)) {
        return e;
    }
    struct stat s;
    if (fstat(f.fd, &s) == 0 && uint64_t(s.st_size) != f.size) {
        return changed(f, uint64_t(s.st_size));
    }
    return {};
}

Error file_read_all(std::string& out, const std::string& path, uint64_t cap) {
    out.clear();
    InFile f;
    if (Error e = file_open(f, path)) {
        return e;
    }
    Error e = read_open_file(out, f, cap);
    file_close(f);
    return e;
}

bool path_exists(const std::string& path) {
    struct stat s;
    return stat(path.c_str(), &s) == 0;
}

bool path_is_directory(const std::string& path) {
    struct stat s;
    return stat(path.c_str(), &s) == 0 && S_ISDIR(s.st_mode);
}

Error dir_list(std::vector<std::string>& names, const std::string& path) {
    names.clear();
    DIR* dir = opendir(path.c_str());
    if (!dir) {
        return system_error(path, "list", errno);
    }
    int failed = 0;
    for (;;) {
        errno = 0;
        struct dirent* entry = readdir(dir);
        if (!entry) {
            failed = errno;
            break;
        }
        std::string name = entry->d_name;
        if (name != "." && name != "..") {
            names.push_back(name);
        }
    }
    closedir(dir);
    std::sort(names.begin(), names.end());
    return failed ? system_error(path, "list", failed) : Error();
}

// ---------------------------------------------------------------------------------------------------- writing

Error out_create(OutFile& f, const std::string& path) {
    f = OutFile();
    f.path = path;
    f.fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    return f.fd < 0 ? system_error(path, "create", errno) : Error();
}

Error out_append(OutFile& f, const std::string& path) {
    f = OutFile();
    f.path = path;
    f.fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0644);
    if (f.fd < 0) {
        return system_error(path, "open for appending", errno);
    }
    struct stat s;
    Error e;
    if (fstat(f.fd, &s) != 0) {
        e = system_error(path, "stat", errno);
    } else {
        e = need_regular(path, s.st_mode);
        f.written = uint64_t(s.st_size);
    }
    if (e) {
        close(f.fd);
        f.fd = -1;
    }
    return e;
}

Error out_write(OutFile& f, const void* data, size_t bytes) {
    const char* at = static_cast<const char*>(data);
    while (bytes > 0) {
        ssize_t n = write(f.fd, at, std::min(bytes, CHUNK));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return system_error(f.path, "write", n < 0 ? errno : EIO);
        }
        at += n;
        bytes -= size_t(n);
        f.written += uint64_t(n);
    }
    return {};
}

// File systems that cannot sync a directory (or a special file) answer EINVAL or ENOTSUP: nothing can be done there.
static int sync_descriptor(int fd) {
    while (fsync(fd) != 0) {
        if (errno != EINTR) {
            return errno == EINVAL || errno == ENOTSUP ? 0 : errno;
        }
    }
    return 0;
}

Error out_sync(OutFile& f) {
    int failed = sync_descriptor(f.fd);
    return failed ? system_error(f.path, "sync", failed) : Error();
}

Error out_close(OutFile& f) {
    if (f.fd < 0) {
        return {};
    }
    Error e = out_sync(f);
    int result = close(f.fd);  // Linux releases the descriptor also when close fails; NFS reports a full disk here
    f.fd = -1;
    if (!e && result != 0 && errno != EINTR) {
        e = system_error(f.path, "close", errno);
    }
    return e;
}

Error file_replace(const std::string& path, const std::string& bytes) {
    static std::atomic<unsigned> counter{0};
    OutFile f;
    Error e;
    for (int attempt = 0; attempt < 100;
         attempt++) {  // a name left behind by a dead process with our id is passed over
        char name[64];
        snprintf(name, sizeof name, ".tmp-%ld-%u", long(getpid()), counter++);
        std::string temporary = path_join(path_directory(path), name);
        e = out_create(f, temporary);
        if (!e || !path_exists(temporary)) {
            break;
        }
    }
    if (e) {
        return e;
    }
    e = out_write(f, bytes.data(), bytes.size());
    Error closed = out_close(f);
    if (!e) {
        e = closed;
    }
    if (!e) {
        e = path_rename(f.path, path);
    }
    if (e) {
        unlink(f.path.c_str());
    }
    return e;
}

Error dir_sync(const std::string& path) {
    int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) {
        return system_error(path, "open", errno);
    }
    int failed = sync_descriptor(fd);
    close(fd);
    return failed ? system_error(path, "sync", failed) : Error();
}

Error dir_create(const std::string& path) {
    for (size_t end = 1; end <= path.size(); end++) {
        if (end != path.size() && path[end] != '/') {
            continue;
        }
        std::string part = path.substr(0, end);
        if (part.back() == '/') {
            continue;
        }
        if (mkdir(part.c_str(), 0755) == 0) {
            if (Error e = dir_sync(path_directory(part))) {
                return e;
            }
        } else if (!path_is_directory(part)) {
            int number = errno;
            return number == EEXIST ? bad_input("%s: cannot create directory: a file of this name is in the way",
                                                shown(part).c_str())
                                    : system_error(part, "create directory", number);
        }
    }
    return path.empty() ? bad_input("cannot create a directory without a name") : Error();
}

Error path_rename(const std::string& from, const std::string& to) {
    if (rename(from.c_str(), to.c_str()) != 0) {
        int number = errno;
        return system_error(from, ("rename to " + shown(to)).c_str(), number);
    }
    return dir_sync(path_directory(to));
}

Error file_truncate(const std::string& path, uint64_t size) {
    int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        return system_error(path, "open", errno);
    }
    int failed = 0;
    while (ftruncate(fd, off_t(size)) != 0) {
        if (errno != EINTR) {
            failed = errno;
            break;
        }
    }
    if (!failed) {
        failed = sync_descriptor(fd);
    }
    if (close(fd) != 0 && errno != EINTR && !failed) {
        failed = errno;
    }
    return failed ? system_error(path, "truncate", failed) : Error();
}

Error path_remove(const std::string& path) {
    std::string name = path;
    while (name.size() > 1 && name.back() == '/') {  // "link/" would be the directory that the link points to
        name.pop_back();
    }
    std::error_code failed;
    std::filesystem::remove_all(name, failed);
    return failed ? system_error(name, "remove", failed.value()) : Error();
}

uint64_t disk_free_bytes(const std::string& path) {
    std::string place = path.empty() ? "." : path;
    struct statvfs s;
    while (statvfs(place.c_str(), &s) != 0) {
        std::string parent = path_directory(place);
        if (parent == place) {
            return UINT64_MAX;
        }
        place = parent;
    }
    return uint64_t(s.f_bavail) * uint64_t(s.f_frsize);
}

// ---------------------------------------------------------------------------------------------------- names

std::string path_join(const std::string& dir, const std::string& name) {
    if (dir.empty()) {
        return name;
    }
    return dir.back() == '/' ? dir + name : dir + "/" + name;
}

// The path without trailing slashes ("/" stays).
static std::string without_slashes(const std::string& path) {
    size_t end = path.find_last_not_of('/');
    return end == std::string::npos ? path.substr(0, 1) : path.substr(0, end + 1);
}

std::string path_directory(const std::string& path) {
    std::string name = without_slashes(path);
    size_t slash = name.rfind('/');
    if (slash == std::string::npos) {
        return ".";
    }
    return without_slashes(name.substr(0, slash + 1));
}

std::string path_stem(const std::string& path) {
    std::string name = without_slashes(path);
    name = name.substr(name.rfind('/') + 1);
    size_t dot = name.rfind('.');
    return dot == std::string::npos || dot == 0 ? name : name.substr(0, dot);
}

// ---------------------------------------------------------------------------------------------------- hashes

static std::string hex_digest(EVP_MD_CTX* hash) {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned length = 0;
    EVP_DigestFinal_ex(hash, digest, &length);
    EVP_MD_CTX_free(hash);
    static const char digits[] = "0123456789abcdef";
    std::string hex;
    for (unsigned i = 0; i < length; i++) {
        hex += digits[digest[i] >> 4];
        hex += digits[digest[i] & 15];
    }
    return hex;
}

std::string sha256_hex(const void* data, size_t bytes) {
    EVP_MD_CTX* hash = EVP_MD_CTX_new();
    EVP_DigestInit_ex(hash, EVP_sha256(), nullptr);
    EVP_DigestUpdate(hash, data, bytes);
    return hex_digest(hash);
}

Error sha256_file(std::string& hex, const std::string& path) {
    hex.clear();
    InFile f;
    if (Error e = file_open(f, path)) {
        return e;
    }
    EVP_MD_CTX* hash = EVP_MD_CTX_new();
    EVP_DigestInit_ex(hash, EVP_sha256(), nullptr);
    std::vector<char> buffer(size_t(1) << 20);
    Error e;
    for (uint64_t offset = 0; offset < f.size && !e;) {
        size_t bytes = size_t(std::min<uint64_t>(buffer.size(), f.size - offset));
        e = file_pread(f, buffer.data(), bytes, offset);
        if (!e) {
            EVP_DigestUpdate(hash, buffer.data(), bytes);
            offset += bytes;
        }
    }
    file_close(f);
    hex = hex_digest(hash);
    return e;
}
