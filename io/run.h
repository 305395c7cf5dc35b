// The run directory: its lock, log.jsonl, and checkpoints that are whole or absent. It moves bytes and hashes; what the
// state means belongs to train_llama.cu.
//
//   checkpoints/.tmp-step_N-<pid>/ ...files, each fsynced..., MANIFEST.json last  -> fsync dir -> rename to step_N ->
//   fsync MANIFEST.json  {"version":1,"step":N,"files":{"state.json":{"bytes":..,"sha256":".."},...},"sha256":"<of the
//   rest>"}
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "io/error.h"
#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"

// One process writes a run directory: flock on <dir>/.lock, which holds pid and host. Error: who holds it.
struct RunLock {
    int fd = -1;
    std::string path;
};
Error run_lock(RunLock& lock, const std::string& dir);
void run_unlock(RunLock& lock);  // also removes the file

struct RunLog {
    OutFile file;
    uint64_t whole = 0;   // bytes of whole lines; a write that failed in the middle is cut off before the next
    bool failed = false;  // a write failed: said once on stderr, training goes on
};
// keep_bytes: what stays of an existing file (the rest was logged after the checkpoint resumed from); 0: a new log.
Error log_open(RunLog& log, const std::string& path, uint64_t keep_bytes);
void log_event(RunLog& log, const Json& record);  // one line, one write; never stops the run
uint64_t log_bytes(const RunLog& log);
void log_sync(RunLog& log);
void log_close(RunLog& log);

struct CheckpointFile {
    std::string name;
    std::string bytes;               // contents, or
    std::vector<TensorOut> tensors;  // a safetensors file of these
};
// Writes checkpoints/step_<step>, reads it back, then removes older ones beyond keep. Never replaces a checkpoint that
// is there. On an error nothing but a .tmp- directory may be left, which is removed too when that is possible.
Error checkpoint_write(const std::string& run_dir, int64_t step, const std::vector<CheckpointFile>& files,
                       int64_t keep);

struct Checkpoint {
    int64_t step = -1;  // -1: none
    std::string path;
    Json state;  // state.json
};
// The newest checkpoint whose manifest and hashes are right. Those that are not are named in complaints and left alone;
// stale .tmp- directories of dead processes are removed. All bad: an error that lists each reason.
Error checkpoint_newest(Checkpoint& c, std::vector<std::string>& complaints, const std::string& run_dir);
// Free space against what a checkpoint needs, before training starts.
Error checkpoint_preflight(const std::string& run_dir, uint64_t bytes);

// runs/<stem>-r<rank>-<k>: the first free k (resume: the highest that exists; "" when there is none).
std::string run_directory_name(const std::string& stem, int rank, bool resume);
// Refuses the model's directory, and one that holds a run (or anything else) unless resume or overwrite. Changes
// nothing.
Error run_directory_check(const std::string& dir, const std::string& model_dir, bool resume, bool overwrite);
// The same check; then makes the directory, or with overwrite removes exactly the files that a run writes.
Error run_directory_prepare(const std::string& dir, const std::string& model_dir, bool resume, bool overwrite);
