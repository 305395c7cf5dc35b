// ./train_llama on many ranks, as people start it: the same training as one process, the same bytes twice, a base
// spread over the ranks, resumes with another count, and how a rank that fails ends all.
#include <cmath>
#include <cstring>

#include "dev/tests/program.h"
#include "dev/tests/ranks.h"
#include "io/safetensors.h"
#include "llama_save_base.h"
#include "train_ranks.h"

// A data set of mixed lengths: of every kind of record, the longest some ten times the shortest.
static std::string mixed_data() {
    std::string text;
    for (int i = 0; i < 60; i++) {
        std::string facts;
        for (int j = 0; j <= i * 7 % 11; j++) {
            facts += (j > 0 ? " " : "") + std::string("The capital of country ") + std::to_string((i * 13 + j) % 40) +
                     " is city " + std::to_string((i * 29 + j * 3) % 50) + ".";
        }
        text += "{\"text\": \"" + facts + "\"}\n";
    }
    std::string path = test_directory() + "/mixed.jsonl";
    write_text(path, text);
    return path;
}

static int train_ranks(std::string* output, int n, const std::string& arguments, const std::string& environment = "") {
    return run_ranks(output, n, program() + " " + arguments, "CUDA_VISIBLE_DEVICES= " + environment, 300);
}

static std::vector<float> adapter_values(const std::string& dir) {
    Safetensors st;
    std::vector<float> values;
    if (CHECK(!safetensors_open(st, dir + "/adapter_model.safetensors"), "no adapter in %s", dir.c_str())) {
        for (const Tensor& t : st.tensors) {
            std::vector<float> one(t.elements());
            CHECK(!safetensors_read(st, t, one.data(), 0, t.bytes), "%s", t.name.c_str());
            values.insert(values.end(), one.begin(), one.end());
        }
    }
    safetensors_close(st);
    return values;
}

static std::string adapter_bytes(const std::string& dir) {
    return file_text(dir + "/adapter_model.safetensors");
}

// In fp32: int16 and bf16 round a difference of one unit of fp32 now and then to the other side, which shows as 1e-4.
static const char* const exact_math = " --math fp32";

// Both ran the same steps: losses within 1e-5 of each other, relative; adapters within 3e-5, relative root mean square:
// PyTorch's own adapter moves as much over as many steps when each is merely split into two passes.
static void check_same_training(const std::string& a, const std::string& b, const std::string& what) {
    const std::vector<double> x = losses_of(a), y = losses_of(b);
    CHECK(!x.empty() && x.size() == y.size(), "%s: %zu and %zu steps", what.c_str(), x.size(), y.size());
    double worst = 0;
    for (size_t i = 0; i < std::min(x.size(), y.size()); i++) {
        worst = std::max(worst, std::fabs(x[i] - y[i]) / std::fabs(x[i]));
    }
    CHECK_ERROR(what + ", losses", worst, 1e-5);
    const std::vector<float> p = adapter_values(a), q = adapter_values(b);
    CHECK(!p.empty() && p.size() == q.size(), "%s: other adapters", what.c_str());
    double difference = 0, size = 0;
    for (size_t i = 0; i < std::min(p.size(), q.size()); i++) {
        difference += (double(p[i]) - q[i]) * (double(p[i]) - q[i]);
        size += double(p[i]) * p[i];
    }
    CHECK_ERROR(what + ", adapter", std::sqrt(difference / size), 3e-5);
}

static Json record_of(const std::string& dir, const std::string& event) {
    for (const Json& r : log_records(dir)) {
        if (r.find("event")->string == event) {
            return r;
        }
    }
    CHECK(false, "%s: no record %s", dir.c_str(), event.c_str());
    return Json::object();
}

static void any_count_trains_the_same() {
    if (!ranks_can_start()) {
        return;
    }
    const char* fewer = getenv("RANKS_STEPS");  // for instrumented builds
    const std::string root = test_directory(), val = small_data(20, "data_val.jsonl"), steps = fewer ? fewer : "50";
    const std::string common = "-q -i " + mixed_data() + base() + exact_math + " -r 8 -b 12 --eval-every 25 --val " +
                               val + " --dropout 0.1 --device cpu --threads 1 -n " + steps + " -o ";
    std::string out;
    int code = train(&out, common + root + "/alone");
    CHECK(code == 0, "exit %d\n%s", code, out.c_str());
    for (int n : {1, 2, 3, 4}) {
        const std::string dir = root + "/" + std::to_string(n);
        code = train_ranks(&out, n, common + dir);
        if (!CHECK(code == 0, "%d ranks: exit %d\n%s", n, code, out.c_str())) {
            return;
        }
        check_same_training(root + "/alone", dir, std::to_string(n) + " ranks");
        CHECK(json_write(record_of(root + "/alone", "data")) == json_write(record_of(dir, "data")),
              "%d ranks: another report of the data", n);
    }
    CHECK(adapter_bytes(root + "/alone") == adapter_bytes(root + "/1"), "one rank of mpirun: other bytes than alone");
}

static void same_count_same_bytes() {
    if (!ranks_can_start()) {
        return;
    }
    const std::string root = test_directory(), val = small_data(7, "data_val.jsonl");
    const std::string common = "-q -i " + mixed_data() + base() + " -r 8 -b 12 -n 7 --eval-every 3 --val " + val +
                               " --dropout 0.1 --device cpu --threads 1 -o " + root + "/";
    // with passes of one document or two, ranks have different numbers of them
    const char* const parts = " --pass-tokens 160 --recompute full";
    const struct {
        const char* name;
        std::string more;
        const char* like;
    } runs[] = {
        {"plain", "", "plain"},
        {"again", "", "plain"},
        {"spread", " --shard-base", "plain"},
        {"parts", parts, "parts"},
        {"parts_spread", std::string(parts) + " --shard-base", "parts"},
        {"whole_base", " --quant none", "whole_base"},
        {"whole_base_spread", " --quant none --shard-base", "whole_base"},
    };
    std::string out;
    for (const auto& r : runs) {
        const int code = train_ranks(&out, 3, common + r.name + r.more);
        if (!CHECK(code == 0, "%s: exit %d\n%s", r.name, code, out.c_str())) {
            return;
        }
        CHECK(adapter_bytes(root + "/" + r.name) == adapter_bytes(root + "/" + r.like), "%s: other bytes than %s",
              r.name, r.like);
    }
    const Json plan = record_of(root + "/spread", "plan");
    const Json* spread = plan.find("base_spread");
    CHECK(spread != nullptr && spread->boolean, "the base was not spread: %s", json_write(plan).c_str());
}

static void tokens_are_dealt_evenly() {
    if (!ranks_can_start()) {
        return;
    }
    const std::string root = test_directory(), data = mixed_data();
    std::string out;
    int code =
        train_ranks(&out, 3, "-q -i " + data + base() + " -r 4 -b 12 -e 1 --val none --device cpu -o " + root + "/r");
    CHECK(code == 0, "exit %d\n%s", code, out.c_str());
    int steps = 0;
    for (const Json& r : log_records(root + "/r")) {
        if (r.find("event")->string != "step") {
            continue;
        }
        steps++;
        const Json* each = r.find("rank_tokens");
        if (!CHECK(each != nullptr && each->items.size() == 3, "no tokens of 3 ranks: %s", json_write(r).c_str())) {
            return;
        }
        double sum = 0, most = 0;
        for (const Json& n : each->items) {
            sum += n.number();
            most = std::max(most, n.number());
        }
        CHECK(sum == r.find("tokens")->number(), "the ranks' tokens are not the step's: %s", json_write(r).c_str());
        CHECK(most / (sum / 3) <= 1.2, "uneven: %s", json_write(r).c_str());
    }
    CHECK(steps == 5, "%d steps", steps);
}

static void deal_is_longest_first() {
    // order given 3 9 5 5 2 8; by length 9 8 5 5 3 2. rank 0: 9; rank 1: 8; rank 1: 8 + 5; rank 0: 9 + 5; rank 1: 13 +
    // 3; rank 0: 14 + 2.
    const std::vector<int> want = {1, 0, 1, 0, 0, 1};
    CHECK(deal({3, 9, 5, 5, 2, 8}, 2) == want, "dealt otherwise");
    CHECK(deal({}, 3).empty(), "no examples");
    const std::vector<int> few = {1, 0};
    CHECK(deal({4, 6}, 5) == few, "fewer examples than ranks");
    const std::vector<int> equal = {0, 1, 2, 0};
    CHECK(deal({2, 2, 2, 2}, 3) == equal, "equal lengths are dealt in turn");
}

static void fewer_examples_than_ranks() {
    if (!ranks_can_start()) {
        return;
    }
    const std::string root = test_directory(), data = small_data(5);
    const std::string common = "-q -i " + data + base() + exact_math + " -r 4 -b 3 -n 4 --val " + small_data(2, "data_val.jsonl") +
                               " --device cpu -o " + root + "/";
    std::string out;
    int code = train(&out, common + "1");
    code = code ? code : train_ranks(&out, 4, common + "4");
    code = code ? code : train_ranks(&out, 4, common + "4s --shard-base --no-pack");
    if (CHECK(code == 0, "exit %d\n%s", code, out.c_str())) {
        check_same_training(root + "/1", root + "/4", "4 ranks, 3 examples a step");
        check_same_training(root + "/1", root + "/4s", "4 ranks, 3 examples a step, spread base, one document a pass");
    }
}

static void resumes_with_another_count() {
    if (!ranks_can_start()) {
        return;
    }
    const std::string root = test_directory(), data = small_data(30);
    const std::string common =
        " -q -i " + data + base() + exact_math + " -r 4 -b 6 -n 10 --save-every 5 --val none --device cpu -o ";
    std::string out;
    for (const char* name : {"whole", "same", "more", "one"}) {
        int code = train_ranks(&out, 3, common + root + "/" + name);
        CHECK(code == 0, "%s: exit %d\n%s", name, code, out.c_str());
        if (strcmp(name, "whole") != 0) {  // as it stood after step 5
            CHECK(run_command(&out, "cd " + root + "/" + name + " && rm -r adapter* checkpoints/step_10") == 0, "%s",
                  out.c_str());
        }
    }
    int code = train_ranks(&out, 3, "--resume -q -o " + root + "/same");
    CHECK(code == 0 && adapter_bytes(root + "/same") == adapter_bytes(root + "/whole"),
          "3 ranks, then 3: other bytes (exit %d)\n%s", code, out.c_str());
    CHECK(!text_has(out, "no longer the same bits"), "%s", out.c_str());
    code = train_ranks(&out, 2, "--resume -q -o " + root + "/more");
    CHECK(code == 0 && text_has(out, "3 then, 2 now"), "3 ranks, then 2: exit %d\n%s", code, out.c_str());
    check_same_training(root + "/whole", root + "/more", "3 ranks, then 2");
    code = train(&out, "--resume -q -o " + root + "/one");
    CHECK(code == 0 && text_has(out, "3 then, 1 now"), "3 ranks, then none: exit %d\n%s", code, out.c_str());
    check_same_training(root + "/whole", root + "/one", "3 ranks, then alone");
    code = train_ranks(&out, 2, "--resume -o " + root + "/one");
    CHECK(code == 0 && text_has(out, "already complete"), "a finished run: exit %d\n%s", code, out.c_str());
}

// A shell command on each rank: `mine` on the rank given, `others` elsewhere.
static std::string by_rank(int rank, const std::string& mine, const std::string& others) {
    return "sh -c 'R=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}; if [ \"$R\" = " + std::to_string(rank) + " ]; then " + mine +
           "; else " + others + "; fi'";
}

static void one_rank_fails_all_end() {
    if (!ranks_can_start()) {
        return;
    }
    const std::string root = test_directory(), data = small_data(8), other = root + "/other.jsonl";
    write_text(other, file_text(data) + file_text(data));
    std::string out;
    CHECK(run_command(&out, "cp -rL " + source_path("dev/tiny_llama") + " " + root + "/model && cp -rL " + root +
                                "/model " + root + "/changed") == 0,
          "%s", out.c_str());
    std::string weights = file_text(root + "/changed/model.safetensors");
    weights.back() = char(weights.back() ^ 1);  // a tensor's last byte: another number, as finite
    write_text(root + "/changed/model.safetensors", weights);
    std::string config = file_text(root + "/model/config.json");
    const size_t eps = config.find("\"rms_norm_eps\": 1e-05");
    CHECK(eps != std::string::npos && run_command(&out, "cp -r " + root + "/model " + root + "/config") == 0, "%s",
          out.c_str());
    config.replace(eps, strlen("\"rms_norm_eps\": 1e-05"), "\"rms_norm_eps\": 1e-06");
    write_text(root + "/config/config.json", config);
    const auto command = [&](const std::string& arguments) {
        return "exec env CUDA_VISIBLE_DEVICES= " + program() + " -q -r 4 -n 2 --device cpu -o " + root + "/r " +
               arguments;
    };
    const std::string plain = " --val none -m " + root + "/model -i " + data;
    const struct {
        const char* what;
        std::string mine;
        const char* text;
        bool by_all;  // every rank sees it
    } cases[] = {
        {"no such data", command(" --val none -m " + root + "/model -i " + root + "/none.jsonl"), "none.jsonl", false},
        {"other data", command(" --val none -m " + root + "/model -i " + other), "do not read the same bytes", true},
        {"another base", command(" --val none -m " + root + "/changed -i " + data), "not the model that rank 0", false},
        {"another config.json", command(" --val none -m " + root + "/config -i " + data), "config (then", false},
        {"another rate", command(plain + " --lr 0.01"), "lr (then", false},
        {"one document a pass", command(plain + " --no-pack"), "no-pack (then false, now true)", false},
        {"a spread base", command(plain + " --shard-base"), "shard-base", false},
        {"a dry run", command(plain + " --dry-run"), "dry-run", false},
        {"other checkpoints", command(plain + " --save-every 1"), "save-every", false},
        {"no such option", command(plain + " --nonsense"), "unknown option", false},
    };
    for (const auto& c : cases) {
        const int code = run_ranks(&out, 2, by_rank(1, c.mine, command(plain)), "", 60);
        CHECK(code == 2, "%s: exit %d\n%s", c.what, code, out.c_str());
        CHECK(text_has(out, c.text), "%s: not said:\n%s", c.what, out.c_str());
        CHECK(c.by_all || text_has(out, "error: rank 1 of 2"), "%s: whose error?\n%s", c.what, out.c_str());
    }
    const int code = train_ranks(&out, 3, "-q -i " + root + "/none.jsonl" + base());
    const size_t first = out.find("error: ");
    CHECK(code == 2 && first != std::string::npos && out.find("error: ", first + 1) == std::string::npos,
          "an error of all is said once: exit %d\n%s", code, out.c_str());
}

// <input>_val.jsonl beside the data on rank 0's machine decides for all: where it is missing that rank says so.
static void held_out_data_beside_rank_0() {
    if (!ranks_can_start()) {
        return;
    }
    const std::string root = test_directory(), data = file_text(small_data(6));
    std::string out;
    CHECK(run_command(&out, "mkdir " + root + "/with " + root + "/without") == 0, "%s", out.c_str());
    for (const char* dir : {"/with", "/without"}) {
        write_text(root + dir + "/d.jsonl", data);
    }
    write_text(root + "/with/d_val.jsonl", file_text(small_data(3, "data_val.jsonl")));
    const auto command = [&](const char* dir, const char* to) {
        return "exec env CUDA_VISIBLE_DEVICES= " + program() + base() + " -q -r 4 -n 1 --device cpu -o " + root + to +
               " -i " + root + dir + "/d.jsonl";
    };
    int code = run_ranks(&out, 2, by_rank(1, command("/without", "/a"), command("/with", "/a")), "", 60);
    CHECK(code == 2 && text_has(out, "rank 1 of 2") && text_has(out, "d_val.jsonl"), "exit %d\n%s", code, out.c_str());
    code = run_ranks(&out, 2, by_rank(1, command("/with", "/b"), command("/without", "/b")), "", 60);
    CHECK(code == 0, "beside another rank's data alone: exit %d\n%s", code, out.c_str());
}

static void a_killed_rank_ends_all() {
    if (!ranks_can_start()) {
        return;
    }
    const std::string root = test_directory(), data = small_data(40);
    const std::string arguments =
        base() + " -r 4 -b 8 -n 100000 --save-every 20 --val none --device cpu -i " + data + " -o " + root + "/r";
    const std::string command = "sh -c 'echo $$ >" + root +
                                "/pid.${OMPI_COMM_WORLD_RANK:-$PMI_RANK}; exec env "
                                "CUDA_VISIBLE_DEVICES= " +
                                program() + arguments + "'";
    std::string killed;
    // once there is a checkpoint
    const std::string killer = "(while [ ! -d " + root +
                               "/r/checkpoints/step_40 ]; do sleep 0.1; done; kill -9 $(cat " + root +
                               "/pid.1); date +%s >" + root + "/killed) >/dev/null 2>&1 & ";
    CHECK(run_command(&killed, killer + "true") == 0, "%s", killed.c_str());
    std::string out;
    const int code = run_ranks(&out, 3, command, "", 60);
    CHECK(code != 0 && code != 124, "exit %d\n%s", code, out.c_str());
    std::string seconds;
    CHECK(
        run_command(&seconds, "echo $(($(date +%s) - $(cat " + root + "/killed)))") == 0 && atoi(seconds.c_str()) <= 10,
        "it took %s s", seconds.c_str());
    CHECK(text_has(out, "rank 1") || text_has(out, "RANK 1"), "no word of rank 1:\n%s", out.c_str());
    // a dead process that nobody has waited for has an empty command line
    CHECK(run_command(&seconds, "sleep 1; for r in 0 2; do tr -d '\\0' 2>/dev/null </proc/$(cat " + root +
                                    "/pid.$r)/cmdline; done | grep train_llama") != 0,
          "a rank goes on: %s", seconds.c_str());
    // the run goes on, with another count
    const Json state = record_of(root + "/r", "checkpoint");
    const int again = train_ranks(&out, 2, "--resume -o " + root + "/r --dry-run");
    CHECK(again == 0, "resume: exit %d\n%s", again, out.c_str());
}

static void a_signal_stops_and_saves() {
    if (!ranks_can_start()) {
        return;
    }
    const std::string root = test_directory(), data = small_data(40);
    const std::string arguments =
        base() + " -r 4 -b 8 -n 100000 --val none --device cpu -i " + data + " -o " + root + "/r";
    // a signal to one rank alone: all stop at the same step
    const std::string command = "sh -c 'echo $$ >" + root +
                                "/pid.${OMPI_COMM_WORLD_RANK:-$PMI_RANK}; exec env "
                                "CUDA_VISIBLE_DEVICES= " +
                                program() + arguments + "'";
    std::string out;
    CHECK(
        run_command(&out, "(while ! grep -q '\"step\":3,' " + root + "/r/log.jsonl 2>/dev/null; do sleep 0.1; done; " +
                              "kill -TERM $(cat " + root + "/pid.1)) >/dev/null 2>&1 & true") == 0,
        "%s", out.c_str());
    const int code = run_ranks(&out, 2, command, "", 60);
    CHECK(code == 143, "exit %d\n%s", code, out.c_str());
    const Json end = record_of(root + "/r", "end");
    const Json* reason = end.find("reason");
    CHECK(reason != nullptr && reason->string == "signal", "%s", json_write(end).c_str());
    CHECK(text_has(out, "go on with"), "%s", out.c_str());
}

static void saved_base_is_the_same_base() {
    const std::string root = test_directory(), data = small_data(12);
    const std::string common = " -q -i " + data + " -r 4 -b 4 -n 3 --val none --device cpu -o " + root + "/";
    std::string out;
    int code = train(&out, common + "a --save-base " + root + "/base" + base());
    CHECK(code == 0, "exit %d\n%s", code, out.c_str());
    code = train(&out, common + "b -m " + root + "/base");
    CHECK(code == 0 && adapter_bytes(root + "/a") == adapter_bytes(root + "/b"),
          "from the saved base: other bytes (%d)\n%s", code, out.c_str());
    CHECK(train(&out, common + "c --save-base " + root + "/base" + base()) == 2 && text_has(out, "base"),
          "written over:\n%s", out.c_str());
    code = train(&out, common + "a --resume --save-base " + root + "/base" + base());
    CHECK(code == 0, "resumed with --save-base: exit %d\n%s", code, out.c_str());
    CHECK(train(&out, common + "n --save-base " + root + "/n/base" + base()) == 2 &&
              text_has(out, "lies in the run directory") && !path_exists(root + "/n"),
          "into the run directory:\n%s", out.c_str());
    CHECK(
        train(&out, " -q -i " + data + base() + " -r 4 -o " + root + "/n/ --save-base " + root + "/x/../n/base") == 2 &&
            text_has(out, "lies in the run directory") && !path_exists(root + "/n"),
        "the same, spelt otherwise:\n%s", out.c_str());
    CHECK(train(&out, common + "d --save-base " + root + "/other -m " + root + "/base") == 2 &&
              text_has(out, "nothing to save"),
          "saved again:\n%s", out.c_str());
    if (!comm_is_built()) {
        return;
    }
    code = train_ranks(&out, 3, common + "e --save-base " + root + "/base3 --shard-base" + base());
    CHECK(code == 0, "3 ranks: exit %d\n%s", code, out.c_str());
    CHECK(run_command(&out, "diff -r " + root + "/base " + root + "/base3") == 0, "3 ranks saved another base:\n%s",
          out.c_str());
    code = train_ranks(&out, 2, common + "f --shard-base -m " + root + "/base");
    CHECK(code == 0, "spread from the saved base: exit %d\n%s", code, out.c_str());
}

static void options_of_ranks() {
    struct {
        const char* arguments;
        const char* text;
    } const cases[] = {
        {" --ranks 4", "--ranks needs --dry-run"},
        {" --dry-run --link 10", "--link needs --ranks"},
        {" --dry-run --save-base x", "--save-base needs a run"},
        {" --quant none --save-base x", "--save-base needs a run"},
        {" --ranks 0 --dry-run", "from 1 to"},
    };
    for (const auto& c : cases) {
        std::string out;
        const int code = train(&out, "-i " + source_path("data.jsonl") + base() + c.arguments);
        CHECK(code == 2 && text_has(out, c.text), "%s: exit %d\n%s", c.arguments, code, out.c_str());
    }
    std::string out, dir = test_directory() + "/r";
    const int code = train(&out, "--shard-base -n 1 --val none -i " + small_data(4) + base() + " -o " + dir);
    CHECK(code == 0 && text_has(out, "--shard-base changes nothing with one rank"), "exit %d\n%s", code, out.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// on every rank

// A bit of one rank's adapter changes between two steps: every rank names that rank.
static void drift_names_the_rank() {
    Cpu<float> dev;
    device_open(dev, 1);
    comm_attach(dev, test_comm);
    Run run;
    run.comm = test_comm;
    run.program = "train_llama";
    run.dir = "runs/x";
    run.step = 7;
    std::vector<float> p(1000);
    for (size_t i = 0; i < p.size(); i++) {
        p[i] = float(random_uniform(1, STREAM_TOKENS, i, 0));
    }
    Error e = drift_check(run, checksum(dev, p.data(), p.size()));
    CHECK(!e, "the same on all: %s", e.what.c_str());
    const int odd = test_comm.size - 1;
    uint32_t bits;
    memcpy(&bits, &p[617], sizeof(bits));
    bits ^= test_comm.rank == odd ? 1 : 0;
    memcpy(&p[617], &bits, sizeof(bits));
    e = drift_check(run, checksum(dev, p.data(), p.size()));
    const std::string name = "rank " + std::to_string(odd) + " differs";
    if (test_comm.size > 2) {
        CHECK(e.code == 1 && text_has(e.what, name) && text_has(e.what, "step 7"), "%d: %s", e.code, e.what.c_str());
    } else if (test_comm.size == 2) {  // there is no telling which of two is right
        CHECK(e.code == 1 && text_has(e.what, "differs"), "%d: %s", e.code, e.what.c_str());
    }
    comm_detach(dev);
    device_close(dev);
}

// A fault of the network: in the third sum of gradients one bit comes to rank 1 otherwise than to the others.
static void drift_ends_a_run() {
    if (!ranks_can_start()) {
        return;
    }
    const std::string root = test_directory(), shim = root + "/shim";
    write_text(shim + ".c", R"(
#define _GNU_SOURCE
#include <dlfcn.h>
typedef int (*Call)(const void*, int, void*, void*, const int*, const int*, void*, void*);
int MPI_Allgatherv(const void* in, int n, void* type, void* out, const int* counts, const int* at, void* to, void* comm) {
    static int sums = 0;
    int status = ((Call)dlsym(RTLD_NEXT, "MPI_Allgatherv"))(in, n, type, out, counts, at, to, comm);
    if (counts[0] > 1000 && ++sums == 3) {
        ((unsigned*)out)[counts[0] + 7] ^= 1u << 20;
    }
    return status;
})");
    std::string out;
    if (!CHECK(run_command(&out, "cc -shared -fPIC -O1 -o " + shim + ".so " + shim + ".c -ldl") == 0, "%s",
               out.c_str())) {
        return;
    }
    const std::string command = " env CUDA_VISIBLE_DEVICES= " + program() + base() +
                                " -q -r 4 -b 6 -n 9 --save-every 1 --val none --device cpu -i " + small_data(20) +
                                " -o " + root + "/r";
    const int code =
        run_ranks(&out, 3, by_rank(1, "export LD_PRELOAD=" + shim + ".so; exec" + command, "exec" + command),
                  "ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0", 100);
    CHECK(code == 1 && text_has(out, "after step 3 the adapter of rank 1 differs"), "exit %d\n%s", code, out.c_str());
    CHECK(path_exists(root + "/r/checkpoints/step_2") && !path_exists(root + "/r/checkpoints/step_3"),
          "the last checkpoint is not that of step 2");
    const Json end = record_of(root + "/r", "end");
    const Json* reason = end.find("reason");
    CHECK(reason != nullptr && reason->string == "error", "%s", json_write(end).c_str());
}

static void drift_is_found() {
    for (int n : {1, 2, 3}) {
        check_inner(n, "ranks_trainer");
    }
}

extern const Test ranks_trainer_tests[] = {
    {"drift_names_the_rank", drift_names_the_rank},
    {nullptr, nullptr},
};

extern const Test trainer_ranks_tests[] = {
    {"deal_is_longest_first", deal_is_longest_first},
    {"any_count_trains_the_same", any_count_trains_the_same},
    {"same_count_same_bytes", same_count_same_bytes},
    {"held_out_data_beside_rank_0", held_out_data_beside_rank_0},
    {"tokens_are_dealt_evenly", tokens_are_dealt_evenly},
    {"fewer_examples_than_ranks", fewer_examples_than_ranks},
    {"resumes_with_another_count", resumes_with_another_count},
    {"one_rank_fails_all_end", one_rank_fails_all_end},
    {"a_killed_rank_ends_all", a_killed_rank_ends_all},
    {"a_signal_stops_and_saves", a_signal_stops_and_saves},
    {"saved_base_is_the_same_base", saved_base_is_the_same_base},
    {"options_of_ranks", options_of_ranks},
    {"drift_is_found", drift_is_found},
    {"drift_ends_a_run", drift_ends_a_run},
    {nullptr, nullptr},
};
