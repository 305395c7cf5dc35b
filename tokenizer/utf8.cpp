// UTF-8 and the white space of Python's str.strip(); declared in tokenizer.h.
#include <cstring>

#include "tokenizer/tokenizer.h"

namespace {

// Bytes of the maximal ill-formed subpart at text: the longest start of some well-formed sequence, at least one byte
// (Unicode 3.9). Whether bytes are such a start is asked by completing them: after two bytes any continuation will do.
size_t ill_formed_subpart(const char* text, size_t n) {
    for (size_t k = n < 3 ? n : 3; k >= 2; k--) {
        char completed[4] = {'\x80', '\x80', '\x80', '\x80'};
        memcpy(completed, text, k);
        if (utf8_sequence(completed, 4) > k) {
            return k;
        }
    }
    return 1;
}

size_t ascii_run(const char* text, size_t n) {
    size_t i = 0;
    while (i + 8 <= n) {
        uint64_t word;
        memcpy(&word, text + i, 8);
        if (word & UINT64_C(0x8080808080808080)) {
            break;
        }
        i += 8;
    }
    return i;
}

// Bytes of the stripped character at text (0: it is not one). Python's str.isspace: White_Space and 1C..1F.
size_t python_space(const unsigned char* s, size_t n) {
    if (n >= 1 && ((s[0] >= 0x09 && s[0] <= 0x0D) || (s[0] >= 0x1C && s[0] <= 0x20))) {
        return 1;
    }
    if (n >= 2 && s[0] == 0xC2 && (s[1] == 0x85 || s[1] == 0xA0)) {  // U+0085, U+00A0
        return 2;
    }
    if (n < 3) {
        return 0;
    }
    bool space = (s[0] == 0xE1 && s[1] == 0x9A && s[2] == 0x80) ||                                    // U+1680
                 (s[0] == 0xE2 && s[1] == 0x80 && s[2] >= 0x80 && s[2] <= 0x8A) ||                    // U+2000..200A
                 (s[0] == 0xE2 && s[1] == 0x80 && (s[2] == 0xA8 || s[2] == 0xA9 || s[2] == 0xAF)) ||  // 2028 2029 202F
                 (s[0] == 0xE2 && s[1] == 0x81 && s[2] == 0x9F) ||                                    // U+205F
                 (s[0] == 0xE3 && s[1] == 0x80 && s[2] == 0x80);                                      // U+3000
    return space ? 3 : 0;
}

}  // namespace

bool utf8_validate(const char* text, size_t n, size_t* bad_at) {
    size_t i = 0;
    while (i < n) {
        i += ascii_run(text + i, n - i);
        if (i == n) {
            break;
        }
        size_t length = utf8_sequence(text + i, n - i);
        if (length == 0) {
            if (bad_at) {
                *bad_at = i;
            }
            return false;
        }
        i += length;
    }
    return true;
}

std::string utf8_replace_invalid(const char* text, size_t n, size_t* replaced) {
    std::string out;
    out.reserve(n);
    size_t count = 0;
    size_t i = 0;
    while (i < n) {
        size_t ascii = ascii_run(text + i, n - i);
        out.append(text + i, ascii);
        i += ascii;
        if (i == n) {
            break;
        }
        size_t length = utf8_sequence(text + i, n - i);
        if (length > 0) {
            out.append(text + i, length);
            i += length;
        } else {
            out += "\xEF\xBF\xBD";
            i += ill_formed_subpart(text + i, n - i);
            count++;
        }
    }
    if (replaced) {
        *replaced = count;
    }
    return out;
}

std::string python_strip(const std::string& s) {
    const unsigned char* text = (const unsigned char*)s.data();
    size_t begin = 0, end = s.size();
    for (size_t k; begin < end && (k = python_space(text + begin, end - begin)) > 0;) {
        begin += k;
    }
    while (end > begin) {
        size_t last = end - 1;  // first byte of the last character
        while (last > begin && (text[last] & 0xC0) == 0x80) {
            last--;
        }
        if (python_space(text + last, end - last) != end - last) {
            break;
        }
        end = last;
    }
    return s.substr(begin, end - begin);
}

bool is_blank(const std::string& s) {
    const unsigned char* text = (const unsigned char*)s.data();
    size_t i = 0;
    for (size_t k; i < s.size() && (k = python_space(text + i, s.size() - i)) > 0;) {
        i += k;
    }
    return i == s.size();
}
