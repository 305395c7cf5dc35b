// The run directory: lock, log, checkpoints through every kind of damage, and which directories are refused.
#include "io/run.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "dev/tests/files.h"

static const float values[4] = {1, 2, 3, 4};

static std::vector<CheckpointFile> checkpoint_files(int64_t step) {
    return {{"adapter_model.safetensors", "", {{"a.weight", "F32", {2, 2}, values}}},
            {"adapter_config.json", "{}\n", {}},
            {"state.json", json_write(Json::object().set("step", step).set("x", 0.1)), {}}};
}

static void save(const std::string& dir, int64_t step, int64_t keep = 100) {
    Error e = checkpoint_write(dir, step, checkpoint_files(step), keep);
    CHECK(!e, "step %lld: %s", (long long)step, e.what.c_str());
}

// The step of the newest good checkpoint, -1: none, -2: an error.
static int64_t newest(const std::string& dir, std::string* said = nullptr) {
    Checkpoint c;
    std::vector<std::string> complaints;
    Error e = checkpoint_newest(c, complaints, dir);
    if (said) {
        *said = e.what;
        for (const std::string& complaint : complaints) {
            *said += "\n" + complaint;
        }
    }
    if (!e && c.step >= 0) {
        const Json* step = c.state.find("step");
        CHECK(step && step->integer == c.step, "state.json is not that of step %lld", (long long)c.step);
        CHECK(c.path == path_join(dir, "checkpoints/step_" + std::to_string(c.step)), "path %s", c.path.c_str());
    }
    return e ? -2 : c.step;
}

// A number that no process has.
static pid_t dead_process() {
    pid_t child = fork();
    if (child == 0) {
        _exit(0);
    }
    waitpid(child, nullptr, 0);
    return child;
}

static void run_checkpoint_round_trip() {
    std::string dir = test_directory();
    CHECK(newest(dir) == -1, "an empty directory has a checkpoint");
    save(dir, 0);
    save(dir, 7);
    CHECK(newest(dir) == 7, "the newest is %lld", (long long)newest(dir));
    std::string at = path_join(dir, "checkpoints/step_7");
    CHECK(listing(at) == "MANIFEST.json adapter_config.json adapter_model.safetensors state.json", "%s",
          listing(at).c_str());
    Json m;
    CHECK(!json_read_file(m, path_join(at, "MANIFEST.json")), "manifest");
    const Json *step = m.find("step"), *files = m.find("files");
    CHECK(m.find("version") && step && step->integer == 7 && files && files->keys.size() == 3 && m.find("sha256"),
          "manifest's keys");
    // sha256 of "{}\n", by sha256sum
    const Json* entry = files ? files->find("adapter_config.json") : nullptr;
    CHECK(entry && entry->find("bytes")->integer == 3 &&
              entry->find("sha256")->string == "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",
          "hash of adapter_config.json");
    Safetensors st;
    CHECK(!safetensors_open(st, path_join(at, "adapter_model.safetensors")), "adapter");
    const Tensor* t = safetensors_find(st, "a.weight");
    float read[4] = {};
    CHECK(t && !safetensors_read(st, *t, read, 0, sizeof read) && memcmp(read, values, sizeof read) == 0, "tensor");
    safetensors_close(st);
    std::string before = file_text(path_join(at, "MANIFEST.json"));
    Error e = checkpoint_write(dir, 7, {{"state.json", "{}", {}}}, 2);
    CHECK(!e && file_text(path_join(at, "MANIFEST.json")) == before, "a good checkpoint of the same step was replaced");
}

static void run_checkpoint_prune() {
    std::string dir = test_directory(), at = path_join(dir, "checkpoints");
    for (int64_t step : {5, 10, 15, 100}) {
        save(dir, step, 2);
    }
    CHECK(listing(at) == "step_10 step_100" || listing(at) == "step_100 step_15", "keep 2 leaves %s",
          listing(at).c_str());
    CHECK(listing(at) == "step_100 step_15", "the older one was kept: %s", listing(at).c_str());
    save(dir, 200, 3);
    CHECK(listing(at) == "step_100 step_15 step_200", "keep 3 leaves %s", listing(at).c_str());
    // A damaged one does not count as kept, and is not removed.
    CHECK(!path_remove(path_join(at, "step_200/state.json")), "remove");
    save(dir, 300, 2);
    CHECK(listing(at) == "step_100 step_200 step_300", "with a damaged one: %s", listing(at).c_str());
    // Back at a step whose checkpoint is damaged: it makes room and stays.
    CHECK(!path_remove(path_join(at, "step_300/state.json")), "remove");
    CHECK(newest(dir) == 100, "newest is %lld", (long long)newest(dir));
    save(dir, 200, 2);
    CHECK(newest(dir) == 200, "newest is %lld", (long long)newest(dir));
    CHECK(listing(at) == ".damaged-step_200-1 step_100 step_200 step_300", "%s", listing(at).c_str());
}

// Every byte class of every file: flipped, cut, removed. The one before is taken, and the complaint names the file.
static void run_checkpoint_damage() {
    std::string dir = test_directory(), at = path_join(dir, "checkpoints/step_20");
    save(dir, 10);
    save(dir, 20);
    for (const char* name : {"MANIFEST.json", "adapter_config.json", "adapter_model.safetensors", "state.json"}) {
        std::string path = path_join(at, name), good = file_text(path), said;
        for (size_t i = 0; i<good.size(); i += good.size()> 64 ? good.size() / 61 : 1) {
            std::string bad = good;
            bad[i] = char(bad[i] ^ 0x04);
            write_text(path, bad);
            int64_t step = newest(dir, &said);
            bool whitespace = strcmp(name, "MANIFEST.json") == 0 && isspace(static_cast<unsigned char>(good[i]));
            CHECK((step == 10 && text_has(said, name)) || whitespace, "%s, byte %zu flipped: step %lld, %s", name, i,
                  (long long)step, said.c_str());
        }
        for (size_t size : {size_t(0), good.size() / 2, good.size() - 2}) {
            write_text(path, good.substr(0, size));
            CHECK(newest(dir, &said) == 10 && text_has(said, name), "%s cut to %zu: %s", name, size, said.c_str());
        }
        write_text(path, good + "x");
        CHECK(newest(dir, &said) == 10, "%s with a byte more: %s", name, said.c_str());
        CHECK(!path_remove(path), "remove");
        CHECK(newest(dir, &said) == 10 && text_has(said, name), "%s removed: %s", name, said.c_str());
        write_text(path, good);
        CHECK(newest(dir) == 20, "%s restored: %lld", name, (long long)newest(dir));
    }
    CHECK(listing(path_join(dir, "checkpoints")) == "step_10 step_20", "evidence was touched");
    CHECK(rename(at.c_str(), path_join(dir, "checkpoints/step_30").c_str()) == 0, "rename");
    CHECK(newest(dir) == 10, "a checkpoint under another step's name was taken");
}

static void run_checkpoint_all_bad() {
    std::string dir = test_directory(), said;
    save(dir, 1);
    save(dir, 2);
    write_text(path_join(dir, "checkpoints/step_1/state.json"), "{}");
    write_text(path_join(dir, "checkpoints/step_2/MANIFEST.json"), "{\"version\":1}");
    Checkpoint c;
    std::vector<std::string> complaints;
    Error e = checkpoint_newest(c, complaints, dir);
    CHECK(e.code == 2 && text_has(e.what, "step_1/state.json: wrong size") &&
              text_has(e.what, "step_2/MANIFEST.json: damaged") && !e.hint.empty(),
          "code %d: %s", e.code, e.what.c_str());
    CHECK(c.step == -1, "step %lld", (long long)c.step);
    write_text(path_join(dir, "checkpoints/step_2/MANIFEST.json"), "{\"version\":2,\"something\":\"else\"}");
    e = checkpoint_newest(c, complaints, dir);
    CHECK(e.code == 2 && text_has(e.what, "written by a newer version") && text_has(e.what, "found version 2"), "%s",
          e.what.c_str());
}

static void run_checkpoint_stale() {
    std::string dir = test_directory(), at = path_join(dir, "checkpoints"), dead = std::to_string(dead_process());
    save(dir, 3);
    for (const std::string& name : {".tmp-step_4-" + dead, ".tmp-step_5-" + std::to_string(getpid()),
                                    ".tmp-step_6-" + std::to_string(getppid())}) {
        CHECK(!dir_create(path_join(at, name)), "create");
        write_text(path_join(at, name + "/state.json"), "{}");
    }
    CHECK(!dir_create(path_join(at, "step_x")) && !dir_create(path_join(at, "step_007")), "create");
    write_text(path_join(dir, ".tmp-" + dead + "-0"), "half a file");
    CHECK(newest(dir) == 3, "newest");
    std::string list = listing(at);
    CHECK(list == ".tmp-step_6-" + std::to_string(getppid()) + " step_007 step_3 step_x", "left: %s", list.c_str());
    CHECK(listing(dir) == "checkpoints", "left: %s", listing(dir).c_str());
}

// A file that cannot be written: no trace of the new checkpoint, the old one stays.
static void run_checkpoint_fails() {
    std::string dir = test_directory();
    save(dir, 1);
    std::vector<CheckpointFile> files = checkpoint_files(2);
    files.push_back(files.back());  // the same name twice: O_EXCL refuses the second
    Error e = checkpoint_write(dir, 2, files, 2);
    CHECK(e.code != 0 && text_has(e.what, "state.json"), "%s", e.what.c_str());
    CHECK(listing(path_join(dir, "checkpoints")) == "step_1" && newest(dir) == 1, "left: %s",
          listing(path_join(dir, "checkpoints")).c_str());
    e = checkpoint_write(dir, 2, {{"../state.json", "{}", {}}}, 2);
    CHECK(e.code == 1, "a name that leaves the directory was taken");
    write_text(path_join(dir, "file"), "x");
    e = checkpoint_write(path_join(dir, "file"), 1, checkpoint_files(1), 2);
    CHECK(e.code != 0 && !e.what.empty(), "a run directory that is a file was taken");
}

// SIGKILL at any moment: what is there afterwards is whole, and as new as the last save that was acknowledged.
static void run_checkpoint_killed() {
    srand(1);
    for (int round = 0; round < 12; round++) {
        std::string dir = test_directory();
        int ends[2];
        CHECK(pipe(ends) == 0, "pipe");
        pid_t child = fork();
        if (child == 0) {
            for (int64_t step = 1;; step++) {
                if (checkpoint_write(dir, step, checkpoint_files(step), 2) ||
                    write(ends[1], &step, sizeof step) != sizeof step) {
                    _exit(1);
                }
            }
        }
        close(ends[1]);
        usleep(useconds_t(2000 + rand() % 60000));
        kill(child, SIGKILL);
        waitpid(child, nullptr, 0);
        int64_t acknowledged = -1, step;
        while (read(ends[0], &step, sizeof step) == sizeof step) {
            acknowledged = step;
        }
        close(ends[0]);
        std::string said;
        int64_t found = newest(dir, &said);
        CHECK(found >= acknowledged && found <= acknowledged + 2, "acknowledged %lld, found %lld: %s",
              (long long)acknowledged, (long long)found, said.c_str());
        CHECK(said.empty(), "complaints: %s", said.c_str());
        std::string list = path_exists(path_join(dir, "checkpoints")) ? listing(path_join(dir, "checkpoints")) : "";
        CHECK(!text_has(list, ".tmp-"), "left: %s", list.c_str());
    }
}

static void run_preflight() {
    std::string dir = test_directory();
    CHECK(!checkpoint_preflight(dir, 1000), "1000 bytes are too much");
    Error e = checkpoint_preflight(dir, UINT64_C(1) << 60);
    CHECK(e.code == 1 && text_has(e.what, "too little disk space") && text_has(e.what, "need 2305843009213.7 MB"), "%s",
          e.what.c_str());
}

static void run_locked() {
    std::string dir = path_join(test_directory(), "new");
    int ends[2];
    CHECK(pipe(ends) == 0, "pipe");
    pid_t child = fork();
    if (child == 0) {
        RunLock lock;
        char ok = run_lock(lock, dir) ? 'n' : 'y';
        if (write(ends[1], &ok, 1) == 1) {
            pause();
        }
        _exit(0);
    }
    char ok = 0;
    CHECK(read(ends[0], &ok, 1) == 1 && ok == 'y', "the child has no lock");
    RunLock lock;
    std::string holder = "process " + std::to_string(child) + " on ";
    Error e = run_lock(lock, dir);
    CHECK(e.code == 2 && text_has(e.what, "in use by another run (" + holder), "%s", e.what.c_str());
    write_text(path_join(dir, "run.json"), "{}");
    e = run_directory_prepare(dir, "", false, true);
    CHECK(e.code == 2 && text_has(e.what, holder) && path_exists(path_join(dir, "run.json")),
          "overwrite of a locked run: %s", e.what.c_str());
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    close(ends[0]);
    close(ends[1]);
    e = run_lock(lock, dir);
    CHECK(!e, "the lock of a dead process holds: %s", e.what.c_str());
    CHECK(!run_directory_prepare(dir, "", false, true), "our own lock stands in the way");
    RunLock second;
    CHECK(run_lock(second, dir).code == 2, "locked twice");
    run_unlock(lock);
    CHECK(listing(dir).empty(), "left: %s", listing(dir).c_str());
    CHECK(!run_lock(second, dir), "after unlock");
    run_unlock(second);
}

static void run_log() {
    std::string path = path_join(test_directory(), "log.jsonl");
    RunLog log;
    CHECK(!log_open(log, path, 0), "open");
    log_event(log, Json::object().set("event", "step").set("loss", 0.1));
    uint64_t bytes = log_bytes(log);
    log_event(log, Json::object().set("event", "step").set("loss", 0.2));
    log_sync(log);
    log_close(log);
    CHECK(file_text(path) == "{\"event\":\"step\",\"loss\":0.1}\n{\"event\":\"step\",\"loss\":0.2}\n", "%s",
          file_text(path).c_str());
    CHECK(bytes == 28, "the first record has %llu bytes", (unsigned long long)bytes);
    CHECK(!log_open(log, path, bytes) && log_bytes(log) == bytes, "open for going on");
    log_event(log, Json("third"));
    log_close(log);
    CHECK(file_text(path) == "{\"event\":\"step\",\"loss\":0.1}\n\"third\"\n", "%s", file_text(path).c_str());
    write_text(path, "{\"a\":1}\n{\"b\"");
    CHECK(!log_open(log, path, 100) && log_bytes(log) == 8, "a log that is too short is cut to whole lines: %llu",
          (unsigned long long)log_bytes(log));
    log_close(log);
    CHECK(file_text(path) == "{\"a\":1}\n", "%s", file_text(path).c_str());
    CHECK(!log_open(log, path, 0) && log_bytes(log) == 0, "a new log");
    log_close(log);
    CHECK(file_text(path).empty(), "%s", file_text(path).c_str());
    CHECK(log_open(log, path + "/x", 0).code != 0, "a directory that is a file");
    log_event(log, Json("nowhere"));  // does nothing, and does not end the program
    log_close(log);
}

// A full disk (here: a limit on the file's size) never stops the run, and leaves no half line once there is room again.
static void run_log_full() {
    std::string path = path_join(test_directory(), "log.jsonl");
    struct rlimit before, small;
    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0, "getrlimit");
    auto old = signal(SIGXFSZ, SIG_IGN);
    RunLog log;
    CHECK(!log_open(log, path, 0), "open");
    log_event(log, Json("first"));
    small = before;
    small.rlim_cur = 12;
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0, "setrlimit");
    log_event(log, Json("second"));
    CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0, "setrlimit");
    CHECK(file_text(path) == "\"first\"\n\"sec" && log.failed && log_bytes(log) == 8, "%s", file_text(path).c_str());
    log_event(log, Json("third"));
    log_close(log);
    CHECK(file_text(path) == "\"first\"\n\"third\"\n", "%s", file_text(path).c_str());
    signal(SIGXFSZ, old);
}

static void run_names() {
    std::string dir = test_directory(), here(4096, '\0');
    here = getcwd(&here[0], here.size());
    CHECK(chdir(dir.c_str()) == 0, "chdir");
    CHECK(run_directory_name("data", 16, true).empty(), "no run yet");
    CHECK(run_directory_name("data", 16, false) == "runs/data-r16-1", "%s",
          run_directory_name("data", 16, false).c_str());
    for (const char* name : {"runs/data-r16-1", "runs/data-r16-2", "runs/data-r16-10", "runs/data-r8-50",
                             "runs/data-r16-11x", "runs/data-r16-012"}) {
        CHECK(!dir_create(name), "create");
    }
    CHECK(run_directory_name("data", 16, false) == "runs/data-r16-3", "%s",
          run_directory_name("data", 16, false).c_str());
    CHECK(run_directory_name("data", 16, true) == "runs/data-r16-10", "%s",
          run_directory_name("data", 16, true).c_str());
    CHECK(chdir(here.c_str()) == 0, "chdir");
}

static void make_run(const std::string& dir, bool finished) {
    CHECK(!dir_create(dir), "create");
    write_text(path_join(dir, "run.json"), "{}");
    write_text(path_join(dir, "log.jsonl"), "");
    if (finished) {
        write_text(path_join(dir, "adapter_model.safetensors"), "x");
        write_text(path_join(dir, "adapter_config.json"), "{}");
    }
    save(dir, 5);
}

static void refused(const std::string& dir, const std::string& model, bool resume, bool overwrite, const char* part) {
    Error e = run_directory_prepare(dir, model, resume, overwrite);
    CHECK(e.code == 2 && text_has(e.what, part) && !e.hint.empty(), "code %d: '%s', need '%s'", e.code, e.what.c_str(),
          part);
}

static void accepted(const std::string& dir, const std::string& model, bool resume, bool overwrite) {
    Error e = run_directory_prepare(dir, model, resume, overwrite);
    CHECK(!e && path_is_directory(dir), "%s", e.what.c_str());
}

static void run_directory() {
    std::string root = test_directory(), model = path_join(root, "model"), run = path_join(root, "run");
    CHECK(!dir_create(model), "create");
    refused(model, model, false, false, "is the model's own directory");
    refused(root + "/run/../model/", model, false, true, "is the model's own directory");
    accepted(path_join(root, "a/b/c"), model, false, false);
    accepted(path_join(root, "a/b/c"), model, false, false);
    accepted(path_join(model, "runs"), model, false, false);
    write_text(path_join(root, "file"), "x");
    refused(path_join(root, "file"), model, false, false, "is not a directory");
    CHECK(run_directory_prepare(path_join(root, "file/x"), model, false, false).code == 2, "below a file");

    make_run(run, false);
    refused(run, model, false, false, "holds an earlier run");
    accepted(run, model, true, false);
    CHECK(newest(run) == 5, "resume removed something");
    make_run(path_join(root, "done"), true);
    refused(path_join(root, "done"), model, false, false, "holds a finished run");
    accepted(path_join(root, "done"), model, true, false);

    write_text(path_join(run, "notes.txt"), "mine");
    refused(run, model, false, true, "(found notes.txt)");
    CHECK(path_exists(path_join(run, "run.json")) && newest(run) == 5, "a refused overwrite removed something");
    accepted(run, model, true, false);
    CHECK(!path_remove(path_join(run, "notes.txt")), "remove");
    write_text(path_join(run, "checkpoints/mine"), "mine");
    refused(run, model, false, true, "(found checkpoints/mine)");
    CHECK(!path_remove(path_join(run, "checkpoints/mine")), "remove");
    write_text(path_join(run, ".tmp-1-0"), "left over");
    accepted(run, model, false, true);
    CHECK(listing(run).empty(), "overwrite leaves %s", listing(run).c_str());

    write_text(path_join(run, "thesis.tex"), "mine");
    refused(run, model, false, false, "(found thesis.tex)");
    refused(run, model, true, false, "(found thesis.tex)");
    refused(run, model, false, true, "(found thesis.tex)");
    CHECK(listing(run) == "thesis.tex", "%s", listing(run).c_str());
}

extern const Test run_tests[] = {{"run_checkpoint_round_trip", run_checkpoint_round_trip},
                                 {"run_checkpoint_prune", run_checkpoint_prune},
                                 {"run_checkpoint_damage", run_checkpoint_damage},
                                 {"run_checkpoint_all_bad", run_checkpoint_all_bad},
                                 {"run_checkpoint_stale", run_checkpoint_stale},
                                 {"run_checkpoint_fails", run_checkpoint_fails},
                                 {"run_checkpoint_killed", run_checkpoint_killed},
                                 {"run_preflight", run_preflight},
                                 {"run_locked", run_locked},
                                 {"run_log", run_log},
                                 {"run_log_full", run_log_full},
                                 {"run_names", run_names},
                                 {"run_directory", run_directory},
                                 {nullptr, nullptr}};
