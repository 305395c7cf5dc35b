// From jsonl files to training examples, and from the examples of a step to passes. Owns: the formats of a record,
// chat templates and masks, the check of the whole file, the data report, the packing. It has no tensors; the order
// of an epoch and the choice of a step's examples belong to the training loop.
//
//   {"question": "...", "answer": "..."}  ->  ids      BOS Question : ...  Answer :  Paris EOS
//                                             targets   0     0     0  0     0     0   1    1
//   A target is a token that is predicted and counted. Inside a pass it becomes the label of the row before it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "io/error.h"
#include "tokenizer/tokenizer.h"

enum class Template { AUTO, LLAMA3, LLAMA3_RAW, PLAIN };

// How a chat becomes text, resolved for one model: AUTO goes by the fingerprint of the model's own template.
struct ChatForm {
    enum Kind { PLAIN, LLAMA30, LLAMA31, LLAMA32, RAW } kind = PLAIN;
    std::string date = "26 Jul 2024";  // of the 3.1 and 3.2 system turn; fixed, so that runs repeat
    std::string fingerprint;           // first 16 hex digits of the template's sha256; "" when the model has none
    std::string name() const;          // for banners and checkpoints
    bool recognised = true;            // false: the model has a template that is none of these (chat data is refused)
    int header = -1, header_end = -1, eot = -1;  // ids of <|start_header_id|>, <|end_header_id|>, <|eot_id|>
};
Error chat_form_choose(ChatForm& form, const Tokenizer& t, Template wanted);

struct DataOptions {
    ChatForm form;
    std::string format = "auto";  // or the name of one of the formats, for every line
    size_t max_tokens = 2048;     // longer examples keep their first max_tokens tokens
    int vocab = 0;                // embedding rows, to check pre-tokenised ids
    bool parse_special = false;   // text of messages may contain control tokens
    bool skip_bad = false;        // bad lines are left out and listed instead of refused
    bool replace_bad_utf8 = false;
    size_t max_line_bytes = size_t(256) << 20;
    int threads = 1;
    // One of several processes that read the same files with the same options; each gets the whole data set (parts.h).
    // exchange returns the text of every part, in order. All parts call it equally often, however the reading ends,
    // from the thread that called dataset_load.
    int part = 0, parts = 1;
    std::function<std::vector<std::string>(const std::string& mine)> exchange;
    size_t exchange_bytes = size_t(64) << 20;  // longer texts go in several pieces
};

struct RejectedLine {
    int file;
    size_t line;
    std::string reason, raw;
};

// Examples lie back to back: example i is ids[start[i] .. start[i + 1]).
struct Dataset {
    std::vector<std::string> files;
    std::vector<int32_t> ids;
    std::vector<uint8_t> targets;  // beside ids: 1 = predicted and counted; never 1 at an example's first token
    std::vector<size_t> start = {0};
    std::vector<int> file;        // of each example
    std::vector<size_t> line;     // of each example, from 1 (array files: index of the element, from 1)
    std::vector<uint8_t> cut;     // 1: lost tokens to max_tokens
    std::vector<uint8_t> format;  // of each example: index into formats

    // The report. Of every record read: used + rejected + dropped = read.
    size_t read = 0, rejected = 0, dropped_without_target = 0, truncated = 0, duplicates = 0, blank_lines = 0;
    size_t tokens = 0, target_tokens = 0, longest = 0;
    std::vector<size_t> histogram;                        // histogram[k]: examples of 2^k .. 2^(k+1) - 1 tokens
    std::vector<std::pair<std::string, size_t>> formats;  // name, examples
    std::vector<std::string> warnings;                    // special tokens inside text (with line numbers), ...
    std::vector<std::string> notes;                       // keys that play no part, a skipped byte order mark, ...
    std::vector<RejectedLine> bad;                        // with skip_bad: all; else empty (the Error lists them)
    std::string hash;                                     // sha256 over the files' bytes, in order

    size_t size() const { return start.size() - 1; }
    size_t length(size_t i) const { return start[i + 1] - start[i]; }
};

// Reads, checks and tokenises every line of every file. Without skip_bad the first 20 bad lines are listed in one
// Error, `file:line: reason` each, with the count of the rest. No example left: an error with the table of reasons.
// Several parts get the same data set or the same Error, whatever their number; but where a file cannot be read by some
// of them, only those say why, and the others return an Error with that code and an empty `what`.
Error dataset_load(Dataset& data, const std::vector<std::string>& files, const Tokenizer& t,
                   const DataOptions& options);
// Moves the examples named (ascending, without repeats, not all) from train into val, with the report's numbers. Which
// ones is the caller's choice: random numbers live in kernels/random.h, which this folder does not use.
void dataset_split(Dataset& train, Dataset& val, const std::vector<size_t>& held_out);
// Fills truncated, duplicates, tokens, target_tokens, longest, histogram and the counts of formats from the examples.
void dataset_count(Dataset& data);
// "" or a warning: how many examples of val are also in train, token for token.
std::string dataset_overlap(const Dataset& train, const Dataset& val);
// The report as lines for the console (no trailing newline in each), without the warnings: the caller shows those.
std::vector<std::string> dataset_report(const Dataset& data);
// One example as text with its targets marked: ANSI colour when colour, [brackets] around targets otherwise.
std::string dataset_show(const Dataset& data, const Tokenizer& t, size_t i, bool colour);
// --dump-data: {"file","line","ids","targets"} one example a line.
std::string dataset_dump_line(const Dataset& data, size_t i);

// One pass: N tokens of whole documents in a row. Positions restart at 0 in each; attention ends at its borders.
struct Batch {
    std::vector<int32_t> tokens;      // (N)
    std::vector<int32_t> labels;      // (N) token that row i is to predict, -1: none (masked, or a document's last row)
    std::vector<int32_t> positions;   // (N) 0.. inside each document
    std::vector<int32_t> cu_seqlens;  // (documents + 1) first row of each document, and N
    std::vector<uint32_t> example;    // (N) number of the example in its data set, for dropout that ignores packing
    size_t n_labels = 0;              // rows with a label

    size_t size() const { return tokens.size(); }
};
void batch_make(Batch& b, const Dataset& data, const std::vector<size_t>& examples);

// Splits a step's examples into passes of at most pass_tokens tokens (a longer example gets a pass of its own):
// best fit decreasing, ties by the order given, so that the same step always splits the same way.
// pack = false: one example a pass, in the order given.
std::vector<std::vector<size_t>> passes_make(const Dataset& data, const std::vector<size_t>& examples,
                                             size_t pass_tokens, bool pack);
