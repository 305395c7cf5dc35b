// A data set read by several processes at once. All of them read all files, so that all know every line and its number;
// the records are dealt. This file owns the dealing, the texts in which a process tells the others what became of its
// records, and the exchange. It does not know what is done with a record, before or after: that is dataset.cpp.
//
//   a round    record 0 .. 99 | 100 .. 187 | 188 .. 299      about as many bytes each
//   part            0         |     1      |     2
//   its text   code of an error, or 0 | what the round is | its records, one after the other
//
// Every part makes the same decisions from the same texts, so that all leave at the same round, with the same error.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "io/json.h"
#include "tokenizer/dataset.h"
#include "tokenizer/lines.h"
#include "tokenizer/records.h"

// A record on its way. In: a line of a file, or an element of a file that is one array.
struct Item {
    Line line;
    const Json* element = nullptr;

    // Out, and what parts tell each other.
    Error bad;           // what is wrong with it, without the place
    size_t column = 0;   // of bad, 0: none
    bool fatal = false;  // bad concerns the whole run, not this line
    RecordFormat format = TEXT_ONLY;
    std::vector<int32_t> ids;
    std::vector<uint8_t> targets;
    std::vector<std::string> unused;
    size_t controls = 0;  // control tokens spelt in text that is kept as text
    bool cut = false, bos_spelt = false, mended = false;
};

// bounds (parts + 1): part p takes the items bounds[p] .. bounds[p + 1] - 1.
std::vector<size_t> parts_deal(const std::vector<Item>& items, int parts);
// Gives the others this part's items and fills in theirs. round says what the items are (how many, and what was read so
// far) and must be the same text everywhere. Errors, in all parts alike: a part reports parts_failed: its code, and no
// text; round differs: the files are not the same (path names the one at hand); a damaged text (in the part that found
// it).
Error parts_exchange(std::vector<Item>& items, const std::vector<size_t>& bounds, const DataOptions& options,
                     const std::string& round, const std::string& path);
// Instead of parts_exchange, in a part that cannot read on: the others stop with it. Returns e.
Error parts_failed(const DataOptions& options, const Error& e);
