// The program as people run it: ./train_llama as a subprocess, its files, exit codes and messages. Small runs on the
// default base.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <vector>

#include "dev/tests/program.h"
#include "dev/tests/ranks.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "kernels/bf16.h"

// The log without what depends on time and on where the run's files lie.
static std::string log_timeless(const std::string& dir) {
    std::string text;
    for (const Json& r : log_records(dir)) {
        Json kept = Json::object();
        for (size_t i = 0; i < r.keys.size(); i++) {
            const std::string& k = r.keys[i];
            if (k != "ms" && k != "tokens_per_s" && k != "mfu" && k != "threads") {
                kept.set(k, r.items[i]);
            }
        }
        text += json_write(kept) + "\n";
    }
    return text;
}

static std::string adapter_of(const std::string& dir) {
    return file_text(dir + "/adapter_model.safetensors");
}

// ---------------------------------------------------------------------------------------------------------------------

static void learns_the_default_task() {
    std::string out, dir = test_directory() + "/run";
    int code = train(&out, "-i " + source_path("data.jsonl") + base() + " -r 16 -o " + dir);
    CHECK(code == 0, "exit %d\n%s", code, out.c_str());
    double before = -1, after = -1;
    for (const Json& r : log_records(dir)) {
        if (r.find("event")->string == "eval") {
            after = r.find("token_accuracy")->number();
            before = before < 0 ? after : before;
        }
    }
    CHECK(before >= 0 && before < 0.5, "accuracy before: %g", before);
    CHECK(after >= 0.95, "accuracy after: %g", after);
    CHECK(text_has(out, "next-token accuracy"), "no closing table:\n%s", out.c_str());
}

static const char* const small_run = " -r 4 -b 4 -e 2 --save-every 2 --eval-every 3 --val ";

static void same_run_same_bytes() {
    std::string data = small_data(14), val = small_data(5), out, root = test_directory();
    std::string common = "-i " + data + base() + small_run + val + " --dropout 0.1 -q";
    const char* const variants[] = {"--threads 2", "--threads 2", "--threads 1 --recompute full"};
    std::string adapter, log;
    for (int i = 0; i < 3; i++) {
        std::string dir = root + "/" + std::to_string(i);
        int code = train(&out, common + " -o " + dir + " " + variants[i]);
        CHECK(code == 0, "%s: exit %d\n%s", variants[i], code, out.c_str());
        adapter = adapter.empty() ? adapter_of(dir) : adapter;
        CHECK(adapter_of(dir) == adapter, "%s: other adapter bytes", variants[i]);
        log = i == 0 ? log_timeless(dir) : log;
        CHECK(i != 1 || log_timeless(dir) == log, "%s: other log:\n%s\n%s", variants[i], log.c_str(),
              log_timeless(dir).c_str());
    }
    int code = train(&out, "--config " + root + "/0/run.json -o " + root + "/again -q");
    CHECK(code == 0 && adapter_of(root + "/again") == adapter, "run.json does not repeat the run (exit %d)\n%s", code,
          out.c_str());
}

static void what_a_run_leaves() {
    std::string data = small_data(9), out, dir = test_directory() + "/run";
    int code = train(&out, "-i " + data + base() + " -r 4 -b 4 -n 5 --save-every 1 --keep 2 --val none -o " + dir);
    CHECK(code == 0, "exit %d\n%s", code, out.c_str());
    std::vector<std::string> names, steps;
    Error e = dir_list(names, dir);
    e = e ? e : dir_list(steps, dir + "/checkpoints");
    std::string all;
    for (const std::string& n : names) {
        all += n + " ";
    }
    CHECK(!e && all == "adapter_config.json adapter_model.safetensors checkpoints log.jsonl run.json ", "left: %s",
          all.c_str());
    CHECK(steps.size() == 2 && steps[0] == "step_4" && steps[1] == "step_5", "%zu checkpoints", steps.size());
    std::vector<Json> log = log_records(dir);
    CHECK(log.size() == 3 + 5 + 5 + 1, "%zu records", log.size());
    CHECK(log[0].find("event")->string == "run" && log[1].find("event")->string == "data" &&
              log[2].find("event")->string == "plan" && log.back().find("event")->string == "end" &&
              log.back().find("reason")->string == "finished",
          "order of the log");
    std::string hash;
    e = sha256_file(hash, dir + "/adapter_model.safetensors");
    CHECK(!e && log.back().find("adapter_sha256")->string == hash, "adapter_sha256");
    const char* const step_keys[] = {"step",   "epoch",         "loss", "lr",           "grad_norm",
                                     "tokens", "target_tokens", "ms",   "tokens_per_s", "mfu"};
    for (const char* key : step_keys) {
        CHECK(log[3].find(key) != nullptr && log[3].find(key)->is_number(), "step record without %s", key);
    }
    // 9 records in steps of 4: the third step of an epoch holds one
    CHECK(log[3].find("epoch")->number() == 1 / 3.0, "epoch %g", log[3].find("epoch")->number());
}

static void refuses_an_existing_run() {
    std::string data = small_data(5), out, dir = test_directory() + "/run";
    std::string command = "-i " + data + base() + " -r 4 -n 2 --val none -q -o " + dir;
    CHECK(train(&out, command) == 0, "%s", out.c_str());
    int code = train(&out, command);
    CHECK(code == 2 && text_has(out, "--resume") && text_has(out, "--overwrite"), "exit %d: %s", code, out.c_str());
    CHECK(train(&out, command + " --overwrite") == 0, "--overwrite: %s", out.c_str());
    code = train(&out, command + " --resume");
    CHECK(code == 0, "resume of a finished run: exit %d: %s", code, out.c_str());
    write_text(dir + "/my_notes.txt", "keep me");
    code = train(&out, command + " --overwrite");
    CHECK(code == 2 && path_exists(dir + "/my_notes.txt"), "--overwrite beside foreign files: exit %d: %s", code,
          out.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// killed and resumed

// Starts the program, kills it with `number` after `seconds`; its exit status as a shell gives it.
static int train_and_signal(const std::vector<std::string>& arguments, double seconds, int number) {
    pid_t pid = fork();
    if (pid == 0) {
        for (int ignored : {SIGINT, SIGHUP}) {  // which nohup, or a shell's &, has set aside for these tests
            signal(ignored, SIG_DFL);
        }
        freopen("/dev/null", "w", stdout);
        freopen("/dev/null", "w", stderr);
        std::vector<char*> argv;
        std::string path = program();
        argv.push_back(&path[0]);
        for (const std::string& a : arguments) {
            argv.push_back(const_cast<char*>(a.c_str()));
        }
        argv.push_back(nullptr);
        execv(path.c_str(), argv.data());
        _exit(127);
    }
    usleep(useconds_t(seconds * 1e6));
    kill(pid, number);
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static std::vector<std::string> words(const std::string& line) {
    std::vector<std::string> out;
    for (size_t at = 0; at < line.size();) {
        size_t end = std::min(line.find(' ', at), line.size());
        if (end > at) {
            out.push_back(line.substr(at, end - at));
        }
        at = end + 1;
    }
    return out;
}

// Ten times killed with -9, at moments spread over the run, and resumed: the adapter's bytes and the log are those of
// the run that was left alone. The moments are shares of the time that run took, so that a faster machine is killed as
// often.
static void killed_and_resumed() {
    std::string data = small_data(30), val = small_data(6), out, root = test_directory();
    std::string common =
        "-i " + data + base() + " -r 8 -b 2 -e 12 --save-every 3 --eval-every 20 --val " + val + " --dropout 0.1 -q";
    const auto start = std::chrono::steady_clock::now();
    CHECK(train(&out, common + " -o " + root + "/whole") == 0, "%s", out.c_str());
    const double whole = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::string dir = root + "/killed";
    int killed = 0;
    for (int i = 0; i < 10; i++) {
        double share = 0.03 + 0.02 * ((i * 7) % 10);  // 0.03 to 0.21 of the run, in mixed order; together 1.2 runs
        killed += train_and_signal(words(common + " --resume -o " + dir), share * whole, SIGKILL) == 137;
    }
    CHECK(train(&out, common + " --resume -o " + dir) == 0, "the last resume: %s", out.c_str());
    CHECK(killed >= 5, "only %d of 10 runs were killed before they ended", killed);
    CHECK(adapter_of(dir) == adapter_of(root + "/whole"), "another adapter after %d kills", killed);
    CHECK(log_timeless(dir) == log_timeless(root + "/whole"), "another log after %d kills", killed);
}

static void stopped_by_a_signal() {
    std::string data = small_data(30), out, root = test_directory();
    std::string common = "-i " + data + base() + " -r 8 -b 1 -e 40 --val none -q";
    const int numbers[] = {SIGTERM, SIGINT, SIGHUP}, codes[] = {143, 130, 129};
    for (int i = 0; i < 3; i++) {
        std::string dir = root + "/" + std::to_string(i);
        int code = train_and_signal(words(common + " -o " + dir), 2.0, numbers[i]);
        CHECK(code == codes[i], "signal %d: exit %d, need %d", numbers[i], code, codes[i]);
        Json last = log_records(dir).back();
        CHECK(last.find("event")->string == "end" && last.find("reason")->string == "signal", "log ends with %s",
              json_write(last).c_str());
        CHECK(path_exists(dir + "/checkpoints/step_" + json_write(*last.find("steps")) + "/MANIFEST.json"),
              "no checkpoint of step %s", json_write(*last.find("steps")).c_str());
        CHECK(!path_exists(dir + "/adapter_model.safetensors"), "a stopped run has a final adapter");
    }
}

static void resume_refuses_what_changed() {
    std::string data = small_data(12), out, dir = test_directory() + "/run";
    std::string common = " -r 4 -b 4 --save-every 1 --val none -q -o " + dir;
    CHECK(train(&out, "-i " + data + base() + " -n 3" + common) == 0, "%s", out.c_str());
    CHECK(!path_remove(dir + "/adapter_model.safetensors"), "cannot remove");
    const std::pair<const char*, const char*> changes[] = {
        {" --lr 0.5", "lr"}, {" --seed 2", "seed"}, {" -r 8", "rank"}, {" --alpha 7", "alpha"}, {" -b 2", "batch"}};
    for (const auto& c : changes) {
        int code = train(&out, "--resume -o " + dir + c.first);
        CHECK(code == 2 && text_has(out, c.second), "%s: exit %d: %s", c.first, code, out.c_str());
    }
    std::string text = file_text(data);
    write_text(data, text.substr(text.find('\n') + 1) + text.substr(0, text.find('\n') + 1));
    int code = train(&out, "--resume -o " + dir);
    CHECK(code == 2 && text_has(out, "data"), "changed data: exit %d: %s", code, out.c_str());
    write_text(data, text);
    code = train(&out, "--resume -o " + dir);
    CHECK(code == 0 && path_exists(dir + "/adapter_model.safetensors"), "plain resume: exit %d: %s", code, out.c_str());
}

// Nothing of an earlier run is removed before the new one has read all it needs.
static void overwrite_comes_last() {
    std::string data = small_data(5), out, root = test_directory(), dir = root + "/run";
    std::string command = "-i " + data + base() + " -r 4 -n 2 --val none -q -o " + dir;
    CHECK(train(&out, command) == 0, "%s", out.c_str());
    const std::string before = adapter_of(dir);
    write_text(root + "/config.json", "{}");  // a model that cannot be read
    const std::string changes[] = {" --overwrite --init-adapter " + dir, " --overwrite --init-adapter " + root,
                                   " --overwrite -i " + root + "/none.jsonl"};
    for (const std::string& change : changes) {
        std::string other = change.find("init") != std::string::npos
                                ? "-i " + data + base() + " -n 2 --val none -q -o " + dir
                                : command;
        int code = train(&out, other + change);
        CHECK(code == 2 && path_exists(dir + "/adapter_model.safetensors") && adapter_of(dir) == before,
              "%s: exit %d: %s", change.c_str(), code, out.c_str());
    }
}

// Weights that grow without bound show in the evaluation, not in the step that made them: still exit 3 and no adapter.
static void divergence_of_the_evaluation() {
    std::string data = small_data(8), out, dir = test_directory() + "/run";
    int code = train(&out, "-i " + data + base() +
                               " -r 4 -n 4 --lr 10 --weight-decay 100 --schedule constant --warmup 0 --val " + data +
                               " -o " + dir);
    CHECK(code == 3 && text_has(out, "not finite"), "exit %d: %s", code, out.c_str());
    CHECK(!path_exists(dir + "/adapter_model.safetensors"), "a diverged run wrote a final adapter");
}

// A kill between the adapter and the log's last record: resume writes that record, and the same adapter again.
static void resume_completes_the_log() {
    std::string data = small_data(6), out, dir = test_directory() + "/run";
    CHECK(train(&out, "-i " + data + base() + " -r 4 -n 3 --val none -q -o " + dir) == 0, "%s", out.c_str());
    const std::string log = file_text(dir + "/log.jsonl"), adapter = adapter_of(dir);
    write_text(dir + "/log.jsonl", log.substr(0, log.rfind("{\"event\":\"end\"")));
    CHECK(train(&out, "--resume -o " + dir) == 0, "%s", out.c_str());
    CHECK(file_text(dir + "/log.jsonl") == log && adapter_of(dir) == adapter,
          "the log or the adapter is not what it was");
    CHECK(train(&out, "--resume -o " + dir) == 0 && text_has(out, "already complete"), "%s", out.c_str());
}

// What a resume may do: leave out the held-out data, take other passes, go on without the adapter it started from.
static void resume_allows_what_does_not_matter() {
    std::string data = small_data(12), val = small_data(3), out, root = test_directory(), dir = root + "/run";
    CHECK(train(&out, "-i " + data + base() + " -r 4 -n 2 --val none -q -o " + root + "/first") == 0, "%s",
          out.c_str());
    std::string from = root + "/from";
    CHECK(run_command(&out, "mkdir " + from + " && cp " + root + "/first/adapter_* " + from) == 0, "%s", out.c_str());
    std::string common = "-i " + data + base() + " -b 2 -n 6 --save-every 2 --val " + val + " -q -o " + dir;
    CHECK(train(&out, common + " --init-adapter " + from) == 0, "%s", out.c_str());
    CHECK(!path_remove(from) && !path_remove(dir + "/checkpoints/step_6"), "cannot remove");
    CHECK(!path_remove(dir + "/adapter_model.safetensors"), "cannot remove");
    int code = train(&out, "--resume --val none --pass-tokens 100 -o " + dir);
    CHECK(code == 0 && text_has(out, "going on after step 4 of 6") && text_has(out, "no longer the same bits") &&
              text_has(out, "held-out data is not what it was"),
          "exit %d: %s", code, out.c_str());
    CHECK(path_exists(dir + "/adapter_model.safetensors"), "no adapter");
}

// A few examples seen again and again: validation loss rises, training loss falls. The warning names the step with the
// lowest validation loss, and never comes before two rises in a row.
static void overfitting_is_named() {
    std::string data = small_data(6), val = small_data(30, "data_val.jsonl"), out, dir = test_directory() + "/run";
    int code =
        train(&out, "-i " + data + base() + " -r 16 -b 6 -n 60 --lr 5e-3 --schedule constant --eval-every 4 --val " +
                        val + " -o " + dir);
    CHECK(code == 0 && text_has(out, "warning: overfitting"), "exit %d: %s", code, out.c_str());
    std::vector<double> losses;
    double best = INFINITY;
    int64_t best_step = -1;
    size_t warnings = 0;
    for (const Json& r : log_records(dir)) {
        if (r.find("event")->string == "eval") {
            losses.push_back(r.find("loss")->number());
            best_step = losses.back() < best ? r.find("step")->integer : best_step;
            best = std::min(best, losses.back());
        } else if (r.find("event")->string == "overfitting") {
            const size_t n = losses.size();
            warnings++;
            CHECK(n >= 3 && losses[n - 1] > losses[n - 2] && losses[n - 2] > losses[n - 3], "warned without two rises");
            CHECK(r.find("best_step")->integer == best_step && r.find("best_loss")->number() == best,
                  "best step %lld, need %lld", (long long)r.find("best_step")->integer, (long long)best_step);
        }
    }
    CHECK(warnings > 0, "no record of it");
}

// Under nohup a hang-up is ignored, and stays so.
static void hangup_stays_ignored() {
    std::string data = small_data(30), out, dir = test_directory() + "/run";
    int code =
        run_command(&out, "trap '' HUP; " + program() + " -q -i " + data + base() + " -r 8 -b 1 -e 12 --val none -o " +
                              dir + " & p=$!; sleep 0.7; kill -HUP $p; wait $p");
    CHECK(code == 0 && path_exists(dir + "/adapter_model.safetensors"), "exit %d: %s", code, out.c_str());
}

static void resume_without_a_checkpoint_starts() {
    std::string data = small_data(6), out, dir = test_directory() + "/run";
    int code = train(&out, "-i " + data + base() + " -r 4 -n 2 --val none --resume -o " + dir);
    CHECK(code == 0 && text_has(out, "starting afresh"), "exit %d: %s", code, out.c_str());
    CHECK(path_exists(dir + "/adapter_model.safetensors"), "no adapter");
}

// ---------------------------------------------------------------------------------------------------------------------
// wrong input

static void wrong_options_and_input() {
    std::string data = small_data(6), root = test_directory(), out;
    write_text(root + "/empty.jsonl", "");
    write_text(root + "/broken.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n{\"question\": 1}\nnot json\n");
    const std::pair<std::string, const char*> cases[] = {
        {"", "--input"},
        {"-i " + root + "/nothing.jsonl" + base(), "nothing.jsonl"},
        {"-i " + root + "/empty.jsonl" + base(), "no examples"},
        {"-i " + root + "/broken.jsonl" + base(), "broken.jsonl:2"},
        {"-i " + data + " -m " + root + "/no_such_model", "no_such_model"},
        {"-i " + data + base() + " -r 500", "larger than the smallest side"},
        {"-i " + data + base() + " -n 3 --warmup 9", "longer than the run"},
        {"-i " + data + base() + " --pass-tokens 5", "less than the longest example"},
        {"-i " + data + base() + " --device cuda", "--device cuda: "},
        {"-i " + data + base() + " --gemm fast", "--gemm"},
        {"-i " + data + base() + " --targets q_proj,wte", "wte"},
        {"-i " + data + base() + " --init-adapter " + root, "adapter_config.json"},
        {"-i " + data + base() + " --dump-data x.jsonl", "--dry-run"},
        {"-i " + data + base() + " --val " + root + "/no_val.jsonl", "no_val.jsonl"},
        {"-m shape:9000b --dry-run", "9000b"},
        {"-i " + data + base() + " -o " + source_path("dev/tiny_llama"), "model"},
        {"--resume", "exit 2"},
    };
    for (const auto& c : cases) {
        bool has_output = c.first.find(" -o ") != std::string::npos;
        int code = train(&out, c.first + (has_output || c.first == "--resume" ? "" : " -o " + root + "/out"));
        CHECK(code == 2, "'%s': exit %d, need 2: %s", c.first.c_str(), code, out.c_str());
        CHECK(text_has(out, "error: ") && (text_has(out, c.second) || c.first == "--resume"), "'%s': %s",
              c.first.c_str(), out.c_str());
        CHECK(!path_exists(root + "/out"), "'%s' left an output directory", c.first.c_str());
    }
}

static void skip_bad_lists_the_rejected() {
    std::string root = test_directory(), out;
    write_text(root + "/some.jsonl",
               "{\"question\": \"a\", \"answer\": \"b\"}\n{\"question\": 1}\nnot \x1b[31m json\n{\"question\": \"c\", "
               "\"answer\": \"d\"}\n");
    int code =
        train(&out, "-i " + root + "/some.jsonl" + base() + " -r 2 -n 1 --val none --skip-bad -o " + root + "/run");
    CHECK(code == 0 && text_has(out, "4 read = 2 used + 2 rejected"), "exit %d: %s", code, out.c_str());
    CHECK(!text_has(out, "\x1b"), "an escape sequence of the data reached the terminal");
    std::string rejected = file_text(root + "/run/rejected.jsonl");
    CHECK(text_has(rejected, "\"line\":2") && text_has(rejected, "\"line\":3") && text_has(rejected, "\"reason\""),
          "%s", rejected.c_str());
}

static void dry_run_writes_nothing() {
    std::string data = small_data(4), root = test_directory(), out;
    int code = train(
        &out, "-i " + data + base() + " --val none --dry-run --dump-data " + root + "/dump.jsonl -o " + root + "/run");
    CHECK(code == 0 && text_has(out, "memory plan") && text_has(out, "speed"), "exit %d: %s", code, out.c_str());
    CHECK(!path_exists(root + "/run"), "a dry run made the output directory");
    std::string dump = file_text(root + "/dump.jsonl");
    Json first;
    Error e = json_parse(first, dump.data(), dump.find('\n'), "dump");
    CHECK(!e && first.find("ids") && first.find("targets") &&
              first.find("ids")->items.size() == first.find("targets")->items.size() &&
              first.find("line")->integer == 1,
          "%s", dump.substr(0, dump.find('\n')).c_str());
    code = train(&out, "-m shape:8b --dry-run -b 1 -t 512");
    CHECK(code == 0 && text_has(out, "8,030,261,248 parameters"), "exit %d: %s", code, out.c_str());
}

static void copies_of_a_launcher_are_refused() {
    std::string data = small_data(4), out;
    for (const char* variable : {"OMPI_COMM_WORLD_SIZE=4", "PMI_SIZE=2", "SLURM_STEP_NUM_TASKS=8"}) {
        int code = train(&out, "-i " + data + base() + " --dry-run", ranks_environment() + variable);
        CHECK(code == 2 && text_has(out, "launcher"), "%s: exit %d: %s", variable, code, out.c_str());
    }
    int code = train(&out, "-i " + data + base() + " --dry-run", ranks_environment() + "OMPI_COMM_WORLD_SIZE=1");
    CHECK(code == 0, "one task: exit %d: %s", code, out.c_str());
}

static void survives_a_closed_pipe() {
    std::string data = small_data(6), out, dir = test_directory() + "/run";
    int code = run_command(&out, program() + " -i " + data + base() + " -r 4 -n 4 --val none -o " + dir +
                                     " | head -n 1; test -f " + dir + "/adapter_model.safetensors");
    for (int i = 0; i < 50 && !path_exists(dir + "/adapter_model.safetensors"); i++) {
        usleep(100000);
    }
    CHECK(path_exists(dir + "/adapter_model.safetensors"), "training ended with its pipe (%d): %s", code, out.c_str());
}

static void benchmark_prints_its_line() {
    std::string out;
    int code = train(&out, "--benchmark 2 -b 2 -t 32" + base());
    size_t at = out.rfind("tokens_per_s: ");
    CHECK(code == 0 && at != std::string::npos && atof(out.c_str() + at + 14) > 0, "exit %d: %s", code, out.c_str());
    CHECK(text_has(out, "measured peak") && text_has(out, "gate_up"), "%s", out.c_str());
}

// An adapter whose product overflows: the run must stop with 3 and name what is not finite, never go on with NaN.
static void divergence_is_an_exit_code() {
    std::string data = small_data(8), out, root = test_directory(), dir = root + "/run", from = root + "/from";
    std::vector<float> huge(192, 1e30f);
    Error e = dir_create(from);
    const std::string name = "base_model.model.model.layers.0.self_attn.q_proj.lora_";
    std::vector<TensorOut> one = {{name + "A.weight", "F32", {1, 192}, huge.data()},
                                  {name + "B.weight", "F32", {192, 1}, huge.data()}};
    e = e ? e : safetensors_write(from + "/adapter_model.safetensors", one);
    CHECK(!e, "%s", e.what.c_str());
    write_text(from + "/adapter_config.json",
               R"({"peft_type":"LORA","r":1,"lora_alpha":1,"layers_to_transform":null,"target_modules":["q_proj"]})");
    // first without the other layers' matrices: refused by name
    int code = train(&out, "-i " + data + base() + " --init-adapter " + from + " --val none -o " + dir);
    CHECK(code == 2 && text_has(out, "layers.1.self_attn.q_proj.lora_A.weight is missing"), "exit %d: %s", code,
          out.c_str());
    std::vector<TensorOut> all;
    for (const char* layer : {"0", "1", "2", "3"}) {
        std::string n = std::string("base_model.model.model.layers.") + layer + ".self_attn.q_proj.lora_";
        all.push_back({n + "A.weight", "F32", {1, 192}, huge.data()});
        all.push_back({n + "B.weight", "F32", {192, 1}, huge.data()});
    }
    e = path_remove(from + "/adapter_model.safetensors");
    e = e ? e : safetensors_write(from + "/adapter_model.safetensors", all);
    CHECK(!e, "%s", e.what.c_str());
    code = train(&out, "-i " + data + base() + " --init-adapter " + from + " --val none -o " + dir);
    CHECK(code == 3 && text_has(out, "not finite") && text_has(out, "step 1"), "exit %d: %s", code, out.c_str());
    CHECK(!path_exists(dir + "/adapter_model.safetensors"), "a diverged run wrote a final adapter");
    Json last = log_records(dir).back();
    CHECK(last.find("reason") && last.find("reason")->string == "diverged", "log ends with %s",
          json_write(last).c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// memory

// Llama-3.2-1B's shape in bf16, 2.5 GB on disk: while it is read and quantised the process stays under the packed
// model, one matrix and 200 MB.
static void memory_of_a_1b_load() {
    const uint64_t C = 2048, F = 8192, L = 16, V = 128256, KV = 512;
    std::string root = test_directory(), model = root + "/model";
    const std::string tool = source_path("build/release/logits_dump");  // instrumented builds need more memory
    if (!path_exists(tool)) {
        return test_skip("build/release/logits_dump is not there (make tools)");
    }
    if (disk_free_bytes(root) < UINT64_C(4) << 30) {
        return test_skip("less than 4 GB of disk free for temporary files");
    }
    CHECK(!dir_create(model), "cannot make %s", model.c_str());
    write_text(
        model + "/config.json",
        R"({"model_type":"llama","vocab_size":128256,"hidden_size":2048,"intermediate_size":8192,"num_hidden_layers":16,)"
        R"("num_attention_heads":32,"num_key_value_heads":8,"head_dim":64,"hidden_act":"silu","rms_norm_eps":1e-5,)"
        R"("max_position_embeddings":131072,"rope_theta":500000.0,"tie_word_embeddings":true})");
    std::vector<bf16> block(V * C);  // every tensor takes its values from the start of this
    for (size_t i = 0; i < block.size(); i++) {
        block[i] = to_bf16(float(int(uint32_t(i) * 2654435761u >> 20) - 2048) / 40000);
    }
    std::vector<TensorOut> tensors = {{"model.embed_tokens.weight", "BF16", {V, C}, block.data()},
                                      {"model.norm.weight", "BF16", {C}, block.data()}};
    for (uint64_t l = 0; l < L; l++) {
        std::string p = "model.layers." + std::to_string(l) + ".";
        const std::pair<const char*, std::vector<uint64_t>> parts[] = {
            {"input_layernorm.weight", {C}},      {"post_attention_layernorm.weight", {C}},
            {"self_attn.q_proj.weight", {C, C}},  {"self_attn.k_proj.weight", {KV, C}},
            {"self_attn.v_proj.weight", {KV, C}}, {"self_attn.o_proj.weight", {C, C}},
            {"mlp.gate_proj.weight", {F, C}},     {"mlp.up_proj.weight", {F, C}},
            {"mlp.down_proj.weight", {C, F}}};
        for (const auto& part : parts) {
            tensors.push_back({p + part.first, "BF16", part.second, block.data()});
        }
    }
    Error e = safetensors_write(model + "/model.safetensors", tensors);
    std::vector<int32_t> token = {5};
    std::vector<TensorOut> tokens = {{"tokens", "I32", {1}, token.data()}};
    e = e ? e : safetensors_write(root + "/tokens.safetensors", tokens);
    CHECK(!e, "%s", e.what.c_str());
    block = std::vector<bf16>();
    std::string out;
    int code = run_command(&out, tool + " " + model + " - " + root + "/tokens.safetensors " + root +
                                     "/logits.safetensors --quant nf4 --memory");
    CHECK(code == 0, "exit %d: %s", code, out.c_str());
    const double linears = 973078528.0,
                 packed = linears / 2 + linears / 64 * (1 + 4 / 256.0) + double(V * C) * 2 + (2 * L + 1) * C * 4;
    const double one_matrix = double(F * C) * 2, bound = packed + one_matrix + 200e6;
    size_t at = out.find("after_load_bytes: ");
    double used = at == std::string::npos ? NAN : atof(out.c_str() + at + 18);
    CHECK(used <= bound, "peak %.0f MB, bound %.0f MB (packed %.0f)\n%s", used / 1e6, bound / 1e6, packed / 1e6,
          out.c_str());
    printf("    peak while loading: %.0f MB; packed model %.0f MB, bound %.0f MB\n", used / 1e6, packed / 1e6,
           bound / 1e6);
}

extern const Test trainer_tests[];
const Test trainer_tests[] = {
    {"learns_the_default_task", learns_the_default_task},
    {"same_run_same_bytes", same_run_same_bytes},
    {"what_a_run_leaves", what_a_run_leaves},
    {"refuses_an_existing_run", refuses_an_existing_run},
    {"killed_and_resumed", killed_and_resumed},
    {"stopped_by_a_signal", stopped_by_a_signal},
    {"resume_refuses_what_changed", resume_refuses_what_changed},
    {"overwrite_comes_last", overwrite_comes_last},
    {"divergence_of_the_evaluation", divergence_of_the_evaluation},
    {"resume_completes_the_log", resume_completes_the_log},
    {"resume_allows_what_does_not_matter", resume_allows_what_does_not_matter},
    {"overfitting_is_named", overfitting_is_named},
    {"hangup_stays_ignored", hangup_stays_ignored},
    {"resume_without_a_checkpoint_starts", resume_without_a_checkpoint_starts},
    {"wrong_options_and_input", wrong_options_and_input},
    {"skip_bad_lists_the_rejected", skip_bad_lists_the_rejected},
    {"dry_run_writes_nothing", dry_run_writes_nothing},
    {"copies_of_a_launcher_are_refused", copies_of_a_launcher_are_refused},
    {"survives_a_closed_pipe", survives_a_closed_pipe},
    {"benchmark_prints_its_line", benchmark_prints_its_line},
    {"divergence_is_an_exit_code", divergence_is_an_exit_code},
    {"memory_of_a_1b_load", memory_of_a_1b_load},
    {nullptr, nullptr},
};
