// See error.h.
#include "io/error.h"

#include <cstdarg>
#include <cstdio>

static std::string format_list(const char* format, va_list arguments) {
    va_list again;
    va_copy(again, arguments);
    int length = vsnprintf(nullptr, 0, format, arguments);
    std::string text(length < 0 ? 0 : size_t(length), '\0');
    if (length > 0) {
        vsnprintf(&text[0], text.size() + 1, format, again);
    }
    va_end(again);
    return text;
}

Error bad_input(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    Error e{2, format_list(format, arguments), ""};
    va_end(arguments);
    return e;
}

Error runtime_failure(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    Error e{1, format_list(format, arguments), ""};
    va_end(arguments);
    return e;
}

// Unicode 15, table 3-7: overlong forms, surrogates and values above U+10FFFF are ill-formed.
size_t utf8_sequence(const char* text, size_t n) {
    if (n == 0) {
        return 0;
    }
    const unsigned char* s = reinterpret_cast<const unsigned char*>(text);
    if (s[0] < 0x80) {
        return 1;
    }
    size_t length = s[0] >= 0xC2 && s[0] <= 0xDF ? 2 : (s[0] & 0xF0) == 0xE0 ? 3 : s[0] >= 0xF0 && s[0] <= 0xF4 ? 4 : 0;
    if (length == 0 || length > n) {
        return 0;
    }
    unsigned low = s[0] == 0xE0 ? 0xA0 : s[0] == 0xF0 ? 0x90 : 0x80;
    unsigned high = s[0] == 0xED ? 0x9F : s[0] == 0xF4 ? 0x8F : 0xBF;
    if (s[1] < low || s[1] > high) {
        return 0;
    }
    for (size_t i = 2; i < length; i++) {
        if ((s[i] & 0xC0) != 0x80) {
            return 0;
        }
    }
    return length;
}

std::string printable(const std::string& text, size_t max_bytes) {
    std::string out;
    for (size_t i = 0; i < text.size();) {
        unsigned char c = static_cast<unsigned char>(text[i]);
        size_t length = utf8_sequence(&text[i], text.size() - i);
        bool c1_control = c == 0xC2 && length == 2 && static_cast<unsigned char>(text[i + 1]) < 0xA0;
        if (i + (length ? length : 1) > max_bytes) {
            return out + "...";
        }
        if (length == 0 || c < 0x20 || c == 0x7F || c1_control) {
            char escaped[8];
            for (size_t k = 0; k < (length ? length : 1); k++) {
                snprintf(escaped, sizeof escaped, "\\x%02X", static_cast<unsigned char>(text[i + k]));
                out += escaped;
            }
        } else {
            out.append(text, i, length);
        }
        i += length ? length : 1;
    }
    return out;
}

int error_print(const Error& e) {
    fprintf(stderr, "error: %s\n", e.what.c_str());
    if (!e.hint.empty()) {
        fprintf(stderr, "hint: %s\n", e.hint.c_str());
    }
    fflush(stderr);
    return e.code;
}
