// See run.h. The order of the steps in checkpoint_write is what makes a kill or a power cut harmless (Pillai et al.,
// OSDI 2014): contents and directory are on the disk before the rename that gives them their name.
#include "io/run.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <climits>
#include <cstdio>
#include <filesystem>
#include <system_error>

static const int manifest_version = 1;

static std::string shown(const std::string& path) {
    return printable(path, 1000);
}

// The rest of name as a number when name is prefix and digits alone, without leading zeros; else -1.
static int64_t number_after(const std::string& name, const std::string& prefix) {
    if (name.rfind(prefix, 0) != 0 || name.size() == prefix.size()) {
        return -1;
    }
    const char *begin = name.data() + prefix.size(), *end = name.data() + name.size();
    int64_t n = -1;
    std::from_chars_result r = std::from_chars(begin, end, n);
    return r.ec == std::errc() && r.ptr == end && n >= 0 && std::to_string(n).size() == size_t(end - begin) ? n : -1;
}

// ---- lock

static std::string lock_holder(int fd) {
    char text[300];
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    std::string holder(text, n > 0 ? size_t(n) : 0);
    while (!holder.empty() && holder.back() == '\n') {
        holder.pop_back();
    }
    return holder.empty() ? "a process that has not said its number" : printable(holder);
}

static std::string lock_text() {
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    return "process " + std::to_string(getpid()) + " on " + host;
}

static Error locked_by(const std::string& dir, const std::string& holder) {
    return bad_input("%s: in use by another run (%s)", shown(dir).c_str(), holder.c_str())
        .hinted("wait until it has ended, or give another directory with -o");
}

static Error lock_error(const std::string& path, const char* doing, int number) {
    return runtime_failure("%s: cannot %s: %s", shown(path).c_str(), doing,
                           std::generic_category().message(number).c_str());
}

Error run_lock(RunLock& lock, const std::string& dir) {
    if (Error e = dir_create(dir)) {
        return e;
    }
    lock.path = path_join(dir, ".lock");
    for (;;) {
        int fd = open(lock.path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0644);
        if (fd < 0) {
            return lock_error(lock.path, "open", errno);
        }
        if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
            int number = errno;
            Error e = number == EWOULDBLOCK ? locked_by(dir, lock_holder(fd)) : lock_error(lock.path, "lock", number);
            close(fd);
            return e;
        }
        // careful: between open and flock the owner may have ended and removed the file; then this lock guards nothing
        struct stat held, named;
        if (fstat(fd, &held) == 0 && stat(lock.path.c_str(), &named) == 0 && held.st_ino == named.st_ino &&
            held.st_dev == named.st_dev) {
            std::string text = lock_text() + "\n";
            if (ftruncate(fd, 0) != 0 || pwrite(fd, text.data(), text.size(), 0) != ssize_t(text.size())) {
                Error e = lock_error(lock.path, "write", errno);
                close(fd);
                return e;
            }
            lock.fd = fd;
            return {};
        }
        close(fd);
    }
}

void run_unlock(RunLock& lock) {
    if (lock.fd >= 0) {
        unlink(lock.path.c_str());
        close(lock.fd);
        lock.fd = -1;
    }
}

// Somebody else holds the lock of dir at this moment.
static Error check_unlocked(const std::string& dir) {
    std::string path = path_join(dir, ".lock");
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) {
        return {};
    }
    std::string holder = lock_holder(fd);
    bool other = flock(fd, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK && holder != lock_text();
    close(fd);
    return other ? locked_by(dir, holder) : Error();
}

// ---- log.jsonl

// The newline that ends the last whole line of the file's first `size` bytes.
static uint64_t whole_lines(const std::string& path, uint64_t size) {
    InFile f;
    if (file_open(f, path)) {
        return size;
    }
    char block[4096];
    uint64_t end = size;
    while (end > 0) {
        size_t n = size_t(std::min<uint64_t>(end, sizeof block));
        if (file_pread(f, block, n, end - n)) {
            break;
        }
        for (size_t i = n; i > 0; i--) {
            if (block[i - 1] == '\n') {
                file_close(f);
                return end - n + i;
            }
        }
        end -= n;
    }
    file_close(f);
    return end;
}

Error log_open(RunLog& log, const std::string& path, uint64_t keep_bytes) {
    log = RunLog();
    if (Error e = out_append(log.file, path)) {
        return e;
    }
    uint64_t keep = std::min(keep_bytes, log.file.written);
    if (keep < keep_bytes) {
        fprintf(stderr,
                "warning: %s: shorter than when the checkpoint was written (found %llu bytes, need %llu): some records "
                "are lost\n",
                shown(path).c_str(), (unsigned long long)log.file.written, (unsigned long long)keep_bytes);
        keep = whole_lines(path, keep);
    }
    if (keep < log.file.written) {
        if (Error e = file_truncate(path, keep)) {
            close(log.file.fd);
            log.file.fd = -1;
            return e;
        }
    }
    log.file.written = log.whole = keep;
    return {};
}

static void log_failed(RunLog& log, const Error& e) {
    if (!log.failed) {
        log.failed = true;
        fprintf(stderr, "warning: %s; the log is incomplete from here on, training goes on\n", e.what.c_str());
    }
}

void log_event(RunLog& log, const Json& record) {
    if (log.file.fd < 0) {
        return;
    }
    std::string line = json_write(record) + "\n";
    if (log.file.written > log.whole) {  // the rest of a line that a full disk cut
        if (Error e = file_truncate(log.file.path, log.whole)) {
            return log_failed(log, e);
        }
        log.file.written = log.whole;
    }
    if (Error e = out_write(log.file, line.data(), line.size())) {
        return log_failed(log, e);
    }
    log.whole = log.file.written;
}

uint64_t log_bytes(const RunLog& log) {
    return log.whole;
}

void log_sync(RunLog& log) {
    if (log.file.fd >= 0) {
        if (Error e = out_sync(log.file)) {
            log_failed(log, e);
        }
    }
}

void log_close(RunLog& log) {
    if (Error e = out_close(log.file)) {
        log_failed(log, e);
    }
}

// ---- checkpoints

static bool plain_name(const std::string& name) {
    return !name.empty() && name[0] != '.' && name.size() <= 255 &&
           name.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") ==
               std::string::npos;
}

static Error write_one(Json& files, const std::string& dir, const CheckpointFile& file) {
    std::string path = path_join(dir, file.name), hex;
    uint64_t bytes = file.bytes.size();
    if (file.tensors.empty()) {
        OutFile out;
        if (Error e = out_create(out, path)) {
            return e;
        }
        Error wrong = out_write(out, file.bytes.data(), file.bytes.size());
        Error unclosed = out_close(out);
        if (wrong || unclosed) {
            return wrong ? wrong : unclosed;
        }
        hex = sha256_hex(file.bytes.data(), file.bytes.size());
    } else {
        if (Error e = safetensors_write(path, file.tensors)) {
            return e;
        }
        if (Error e = sha256_file(hex, path)) {
            return e;
        }
        InFile in;
        if (Error e = file_open(in, path)) {
            return e;
        }
        bytes = in.size;
        file_close(in);
    }
    files.set(file.name, Json::object().set("bytes", bytes).set("sha256", hex));
    return {};
}

static std::string manifest_hash(const Json& without_hash) {
    std::string text = json_write(without_hash);
    return sha256_hex(text.data(), text.size());
}

// The checkpoint at path is whole. hashes = false: names and sizes alone. newer: written by a later version.
static Error checkpoint_check(const std::string& path, int64_t step, bool hashes, bool* newer) {
    std::string where = path_join(path, "MANIFEST.json");
    Json manifest;
    if (Error e = json_read_file(manifest, where)) {
        return e;
    }
    const Json* version = manifest.find("version");
    if (version && version->type == Json::INT && version->integer > manifest_version) {
        *newer = true;
        return bad_input("%s: written by a newer version of this program (found version %lld, need at most %d)",
                         shown(where).c_str(), (long long)version->integer, manifest_version)
            .hinted("resume with the version that wrote it");
    }
    Json rest = Json::object();
    for (size_t k = 0; k < manifest.keys.size(); k++) {
        if (manifest.keys[k] != "sha256") {
            rest.set(manifest.keys[k], manifest.items[k]);
        }
    }
    const Json *hash = manifest.find("sha256"), *files = manifest.find("files"), *number = manifest.find("step");
    std::string found = manifest_hash(rest);
    if (!hash || hash->type != Json::STRING || hash->string != found) {
        return bad_input("%s: damaged (its sha256 is %s, it says %s)", shown(where).c_str(), found.c_str(),
                         hash && hash->type == Json::STRING ? printable(hash->string).c_str() : "nothing");
    }
    if (!version || version->type != Json::INT || version->integer != manifest_version || !number ||
        number->type != Json::INT || number->integer != step || !files || files->type != Json::OBJECT ||
        !files->find("state.json")) {
        return bad_input("%s: not the manifest of step %lld", shown(where).c_str(), (long long)step);
    }
    for (size_t k = 0; k < files->keys.size(); k++) {
        const std::string& name = files->keys[k];
        const Json *bytes = files->items[k].find("bytes"), *sha256 = files->items[k].find("sha256");
        if (!plain_name(name) || !bytes || bytes->type != Json::INT || !sha256 || sha256->type != Json::STRING) {
            return bad_input("%s: bad entry %s", shown(where).c_str(), printable(name).c_str());
        }
        std::string file = path_join(path, name), hex;
        InFile in;
        if (Error e = file_open(in, file)) {
            return e;
        }
        uint64_t size = in.size;
        file_close(in);
        if (size != uint64_t(bytes->integer)) {
            return bad_input("%s: wrong size (found %llu bytes, need %lld)", shown(file).c_str(),
                             (unsigned long long)size, (long long)bytes->integer);
        }
        if (hashes) {
            if (Error e = sha256_file(hex, file)) {
                return e;
            }
            if (hex != sha256->string) {
                return bad_input("%s: damaged (its sha256 is %s, need %s)", shown(file).c_str(), hex.c_str(),
                                 printable(sha256->string).c_str());
            }
        }
    }
    return {};
}

// Steps of the checkpoints there, newest first. No directory: none.
static Error list_steps(std::vector<int64_t>& steps, const std::string& checkpoints) {
    steps.clear();
    if (!path_exists(checkpoints)) {
        return {};
    }
    std::vector<std::string> names;
    if (Error e = dir_list(names, checkpoints)) {
        return e;
    }
    for (const std::string& name : names) {
        int64_t step = number_after(name, "step_");
        if (step >= 0) {
            steps.push_back(step);
        }
    }
    std::sort(steps.rbegin(), steps.rend());
    return {};
}

static std::string step_path(const std::string& checkpoints, int64_t step) {
    return path_join(checkpoints, "step_" + std::to_string(step));
}

static std::string temporary(const std::string& checkpoints, int64_t step) {
    return path_join(checkpoints, ".tmp-step_" + std::to_string(step) + "-" + std::to_string(getpid()));
}

// Of the checkpoints before `step`, the newest keep - 1 whole ones stay; damaged ones stay too, as evidence. A
// checkpoint that goes loses its name first, so that a kill in the middle leaves no half of one.
static Error prune(const std::string& checkpoints, int64_t step, int64_t keep) {
    std::vector<int64_t> steps;
    if (Error e = list_steps(steps, checkpoints)) {
        return e;
    }
    int64_t whole = 1;
    for (int64_t s : steps) {
        std::string path = step_path(checkpoints, s);
        bool newer = false;
        if (s >= step || checkpoint_check(path, s, false, &newer) || ++whole <= keep) {
            continue;
        }
        std::string aside = temporary(checkpoints, s);
        if (Error e = path_rename(path, aside)) {
            return e;
        }
        if (Error e = path_remove(aside)) {
            return e;
        }
    }
    return {};
}

static Error write_and_name(const std::string& tmp, const std::string& path, int64_t step,
                            const std::vector<CheckpointFile>& files) {
    if (Error e = dir_create(tmp)) {
        return e;
    }
    Json list = Json::object();
    for (const CheckpointFile& file : files) {
        if (!plain_name(file.name) || file.name == "MANIFEST.json") {
            return runtime_failure("%s: no name for a file of a checkpoint", printable(file.name).c_str());
        }
        if (Error e = write_one(list, tmp, file)) {
            return e;
        }
    }
    Json manifest = Json::object();
    manifest.set("version", manifest_version).set("step", step).set("files", list);
    std::string hash = manifest_hash(manifest);
    CheckpointFile last{"MANIFEST.json", json_write(manifest.set("sha256", hash), 2) + "\n", {}};
    Json ignored = Json::object();
    if (Error e = write_one(ignored, tmp, last)) {
        return e;
    }
    if (Error e = dir_sync(tmp)) {
        return e;
    }
    if (Error e = path_rename(tmp, path)) {
        return e;
    }
    bool newer = false;
    Error damaged = checkpoint_check(path, step, true, &newer);
    if (damaged && !path_rename(path, tmp)) {
        return runtime_failure("%s: does not read back as it was written: %s", shown(path).c_str(),
                               damaged.what.c_str())
            .hinted("the disk may be failing; earlier checkpoints are kept");
    }
    return damaged;
}

Error checkpoint_write(const std::string& run_dir, int64_t step, const std::vector<CheckpointFile>& files,
                       int64_t keep) {
    std::string checkpoints = path_join(run_dir, "checkpoints");
    std::string path = step_path(checkpoints, step), tmp = temporary(checkpoints, step);
    if (Error e = dir_create(checkpoints)) {
        return e;
    }
    if (Error e = path_remove(tmp)) {
        return e;
    }
    if (path_exists(path)) {
        bool newer = false;
        if (!checkpoint_check(path, step, true, &newer)) {
            return {};  // resumed here and stopped before the next step: the same state is there already
        }
        // A damaged one, and the run has come back to its step from an earlier one: it makes room, but stays.
        for (int k = 1;; k++) {
            std::string aside =
                path_join(checkpoints, ".damaged-step_" + std::to_string(step) + "-" + std::to_string(k));
            if (!path_exists(aside)) {
                if (Error e = path_rename(path, aside)) {
                    return e;
                }
                break;
            }
        }
    }
    if (Error e = write_and_name(tmp, path, step, files)) {
        Error left = path_remove(tmp);
        return left ? Error{e.code, e.what + "; " + left.what, e.hint} : e;
    }
    if (Error e = prune(checkpoints, step, keep)) {
        fprintf(stderr, "warning: an old checkpoint stays: %s\n", e.what.c_str());
    }
    return {};
}

// Removes what processes that no longer live have left under temporary names: .tmp-<anything>-<pid> among the
// checkpoints, .tmp-<pid>-<n> beside them. Our own number counts as dead: it was another process's before.
static void remove_stale(const std::string& dir, bool pid_is_last) {
    std::vector<std::string> names;
    if (!path_exists(dir) || dir_list(names, dir)) {
        return;
    }
    for (const std::string& name : names) {
        if (name.rfind(".tmp-", 0) != 0) {
            continue;
        }
        size_t dash = name.rfind('-');
        int64_t pid =
            pid_is_last ? number_after(name, name.substr(0, dash + 1)) : number_after(name.substr(0, dash), ".tmp-");
        bool dead = pid > 0 && pid <= INT_MAX && (pid == getpid() || (kill(pid_t(pid), 0) != 0 && errno == ESRCH));
        if (dead) {
            if (Error e = path_remove(path_join(dir, name))) {
                fprintf(stderr, "warning: %s\n", e.what.c_str());
            }
        }
    }
}

Error checkpoint_newest(Checkpoint& c, std::vector<std::string>& complaints, const std::string& run_dir) {
    c = Checkpoint();
    complaints.clear();
    std::string checkpoints = path_join(run_dir, "checkpoints");
    remove_stale(run_dir, false);
    remove_stale(checkpoints, true);
    std::vector<int64_t> steps;
    if (Error e = list_steps(steps, checkpoints)) {
        return e;
    }
    for (int64_t step : steps) {
        std::string path = step_path(checkpoints, step);
        bool newer = false;
        Error e = checkpoint_check(path, step, true, &newer);
        if (newer) {
            return e;
        }
        if (!e) {
            e = json_read_file(c.state, path_join(path, "state.json"));
        }
        if (!e) {
            c.step = step;
            c.path = path;
            return {};
        }
        complaints.push_back(e.what);
    }
    if (complaints.empty()) {
        return {};
    }
    std::string list;
    for (const std::string& complaint : complaints) {
        list += "\n  " + complaint;
    }
    return bad_input("%s: no checkpoint is whole:%s", shown(checkpoints).c_str(), list.c_str())
        .hinted("nothing was changed; restore one of them from a copy, or start afresh in another directory");
}

Error checkpoint_preflight(const std::string& run_dir, uint64_t bytes) {
    uint64_t available = disk_free_bytes(run_dir), needed = bytes > UINT64_MAX / 2 ? UINT64_MAX : 2 * bytes;
    if (available >= needed) {
        return {};
    }
    return runtime_failure("%s: too little disk space for checkpoints (found %.1f MB, need %.1f MB)",
                           shown(run_dir).c_str(), double(available) / 1e6, double(needed) / 1e6)
        .hinted("free some space on this disk, or give a directory on another one with -o");
}

// ---- the directory

std::string run_directory_name(const std::string& stem, int rank, bool resume) {
    std::string prefix = stem + "-r" + std::to_string(rank) + "-";
    if (!resume) {
        for (int64_t k = 1;; k++) {
            std::string path = path_join("runs", prefix + std::to_string(k));
            if (!path_exists(path)) {
                return path;
            }
        }
    }
    std::vector<std::string> names;
    int64_t highest = -1;
    if (path_exists("runs") && !dir_list(names, "runs")) {
        for (const std::string& name : names) {
            highest = std::max(highest, number_after(name, prefix));
        }
    }
    return highest < 0 ? "" : path_join("runs", prefix + std::to_string(highest));
}

static std::string real_path(const std::string& path) {
    std::error_code failed;
    std::filesystem::path real = std::filesystem::weakly_canonical(path, failed);
    std::string text = failed ? path : real.string();
    return text.size() > 1 && text.back() == '/' ? text.substr(0, text.size() - 1) : text;
}

// What a run writes, in the order in which --overwrite removes it: run.json last, so that a directory whose removal was
// cut short is still known as a run's.
static const char* const run_files[] = {
    "adapter_model.safetensors", "adapter_config.json", "report.html", "rejected.jsonl", "log.jsonl", "run.json"};

static bool is_temporary(const std::string& name) {
    return name.rfind(".tmp-", 0) == 0;
}

static bool is_run_file(const std::string& name) {
    return std::find(std::begin(run_files), std::end(run_files), name) != std::end(run_files);
}

// The first entry that is not a run's, or "".
static Error find_foreign(std::string& foreign, const std::string& dir, const std::vector<std::string>& names) {
    foreign.clear();
    for (const std::string& name : names) {
        if (name == "checkpoints") {
            std::vector<std::string> inside;
            if (!path_is_directory(path_join(dir, name))) {
                foreign = name;
                return {};
            }
            if (Error e = dir_list(inside, path_join(dir, name))) {
                return e;
            }
            for (const std::string& entry : inside) {
                if (number_after(entry, "step_") < 0 && !is_temporary(entry) && entry.rfind(".damaged-step_", 0) != 0) {
                    foreign = name + "/" + entry;
                    return {};
                }
            }
        } else if (!is_run_file(name) && !is_temporary(name)) {
            foreign = name;
            return {};
        }
    }
    return {};
}

static Error remove_run(const std::string& dir, const std::vector<std::string>& names) {
    std::string checkpoints = path_join(dir, "checkpoints");
    if (path_exists(checkpoints)) {
        std::string aside = path_join(dir, ".tmp-" + std::to_string(getpid()) + "-0");
        if (Error e = path_remove(aside)) {
            return e;
        }
        if (Error e = path_rename(checkpoints, aside)) {
            return e;
        }
        if (Error e = path_remove(aside)) {
            return e;
        }
    }
    for (const std::string& name : names) {
        if (is_temporary(name)) {
            if (Error e = path_remove(path_join(dir, name))) {
                return e;
            }
        }
    }
    for (const char* name : run_files) {
        if (Error e = path_remove(path_join(dir, name))) {
            return e;
        }
    }
    return dir_sync(dir);
}

// The names in dir but for the lock; none when there is no dir yet.
static Error run_names(std::vector<std::string>& names, const std::string& dir) {
    names.clear();
    if (!path_exists(dir)) {
        return {};
    }
    if (!path_is_directory(dir)) {
        return bad_input("%s: is not a directory", shown(dir).c_str()).hinted("give another one with -o");
    }
    Error e = dir_list(names, dir);
    names.erase(std::remove(names.begin(), names.end(), ".lock"), names.end());
    return e;
}

Error run_directory_check(const std::string& dir, const std::string& model_dir, bool resume, bool overwrite) {
    if (!model_dir.empty() && real_path(dir) == real_path(model_dir)) {
        return bad_input("%s: is the model's own directory", shown(dir).c_str()).hinted("give another one with -o");
    }
    std::vector<std::string> names;
    if (Error e = run_names(names, dir)) {
        return e;
    }
    if (Error e = path_exists(dir) ? check_unlocked(dir) : Error()) {
        return e;
    }
    std::string foreign;
    if (Error e = find_foreign(foreign, dir, names)) {
        return e;
    }
    bool has_run = std::any_of(names.begin(), names.end(),
                               [](const std::string& n) { return is_run_file(n) || n == "checkpoints"; });
    if (!foreign.empty() && (overwrite || !has_run)) {
        return bad_input("%s: holds something that no run wrote (found %s)", shown(dir).c_str(),
                         printable(foreign).c_str())
            .hinted(overwrite ? "--overwrite removes a run's own files alone: move the others away, or give another "
                                "directory with -o"
                              : "give an empty or new directory with -o");
    }
    if (has_run && !resume && !overwrite) {
        bool finished = std::find(names.begin(), names.end(), "adapter_model.safetensors") != names.end();
        return bad_input("%s: holds %s run", shown(dir).c_str(), finished ? "a finished" : "an earlier")
            .hinted("--resume goes on with it, --overwrite replaces it, another -o leaves it alone");
    }
    return {};
}

Error run_directory_prepare(const std::string& dir, const std::string& model_dir, bool resume, bool overwrite) {
    if (Error e = run_directory_check(dir, model_dir, resume, overwrite)) {
        return e;
    }
    if (!path_exists(dir)) {
        return dir_create(dir);
    }
    std::vector<std::string> names;
    Error e = run_names(names, dir);
    return e || !overwrite ? e : remove_run(dir, names);
}
