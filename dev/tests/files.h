// Files of a test: written, read, listed; what fails is a failed check.
#pragma once
#include <string>
#include <vector>

#include "dev/tests/test.h"
#include "io/file.h"

inline std::string file_text(const std::string& path) {
    std::string text;
    Error e = file_read_all(text, path);
    CHECK(!e, "%s", e.what.c_str());
    return text;
}

inline void write_text(const std::string& path, const std::string& text) {
    Error e = file_replace(path, text);
    CHECK(!e, "%s", e.what.c_str());
}

// The names in a folder, a space between them.
inline std::string listing(const std::string& dir) {
    std::vector<std::string> names;
    Error e = dir_list(names, dir);
    CHECK(!e, "%s", e.what.c_str());
    std::string list;
    for (const std::string& name : names) {
        list += (list.empty() ? "" : " ") + name;
    }
    return list;
}
