// Numbers and lists as one text, to send them to another process of the same program, and back.
//
//   number   8 bytes in the machine's own order
//   list     its bytes, then so many of them
#pragma once
#include <cstdint>
#include <cstring>
#include <string>

inline void pack_number(std::string& text, uint64_t number) {
    text.append(reinterpret_cast<const char*>(&number), sizeof number);
}

// T: std::string or a vector of numbers.
template <class T>
void pack_list(std::string& text, const T& list) {
    const size_t bytes = list.size() * sizeof(list[0]);
    pack_number(text, bytes);
    text.append(reinterpret_cast<const char*>(list.data()), bytes);
}

// A text that is being taken apart. fine = false, and only zeros from then on: it is not what was to be there.
struct Unpack {
    const std::string& text;
    size_t at = 0;
    bool fine = true;
};

inline uint64_t unpack_number(Unpack& u) {
    uint64_t number = 0;
    u.fine = u.fine && u.text.size() - u.at >= sizeof number;
    if (u.fine) {
        memcpy(&number, u.text.data() + u.at, sizeof number);
        u.at += sizeof number;
    }
    return number;
}

template <class T>
void unpack_list(Unpack& u, T& list) {
    const uint64_t bytes = unpack_number(u);
    u.fine = u.fine && bytes <= u.text.size() - u.at && bytes % sizeof(list[0]) == 0;
    if (u.fine && bytes > 0) {
        list.resize(size_t(bytes) / sizeof(list[0]));
        memcpy(&list[0], u.text.data() + u.at, size_t(bytes));
        u.at += size_t(bytes);
    }
}
