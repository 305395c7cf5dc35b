#include "io/console.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>

static std::string format_args(const char* format, va_list args) {
    va_list again;
    va_copy(again, args);
    std::string text(size_t(vsnprintf(nullptr, 0, format, args)), '\0');
    vsnprintf(&text[0], text.size() + 1, format, again);
    va_end(again);
    return text;
}

std::string text_format(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::string text = format_args(format, args);
    va_end(args);
    return text;
}

void console_open(Console& console, bool quiet) {
    console.quiet = quiet;
    console.terminal = isatty(STDOUT_FILENO) == 1;
    setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
}

// A live line that was redrawn in place is left standing before anything else is printed.
static void live_finish(Console& console) {
    if (console.live) {
        fputc('\n', stdout);
        console.live = false;
    }
}

void console_line(Console& console, const std::string& line) {
    if (!console.quiet) {
        live_finish(console);
        fputs((line + "\n").c_str(), stdout);
    }
}

void console_fact(Console& console, const char* format, ...) {
    va_list args;
    va_start(args, format);
    console_line(console, "# " + format_args(format, args));
    va_end(args);
}

void console_warn(Console& console, const char* format, ...) {
    if (console.muted) {
        return;
    }
    va_list args;
    va_start(args, format);
    live_finish(console);
    fputs(("warning: " + format_args(format, args) + "\n").c_str(), stderr);
    va_end(args);
}

void console_live(Console& console, const std::string& line, bool last) {
    if (console.quiet) {
        return;
    }
    if (!console.terminal) {
        fputs((line + "\n").c_str(), stdout);
        return;
    }
    struct winsize size = {};  // a line that wraps could not be redrawn; the live line is ASCII, so bytes are columns
    bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1;
    std::string shown = line.substr(0, known ? size_t(size.ws_col) - 1 : std::string::npos);
    fputs(("\r" + shown + "\x1b[K").c_str(), stdout);  // ESC [ K clears what a longer line left behind
    console.live = true;
    if (last) {
        live_finish(console);
    }
    fflush(stdout);
}

size_t text_columns(const std::string& utf8) {
    size_t n = 0;
    for (char ch : utf8) {
        n += (ch & 0xc0) != 0x80;
    }
    return n;
}

void console_table(Console& console, const std::vector<std::vector<std::string>>& rows) {
    std::vector<size_t> width;
    for (const std::vector<std::string>& row : rows) {
        width.resize(std::max(width.size(), row.size()));
        for (size_t i = 0; i < row.size(); i++) {
            width[i] = std::max(width[i], text_columns(row[i]));
        }
    }
    for (const std::vector<std::string>& row : rows) {
        std::string line = "#";
        for (size_t i = 0; i < row.size(); i++) {
            std::string pad(width[i] - text_columns(row[i]), ' ');
            line += "  " + (i == 0 ? row[i] + pad : pad + row[i]);
        }
        console_line(console, line);
    }
}

std::string text_count(uint64_t n) {
    std::string digits = std::to_string(n);
    for (size_t at = digits.size(); at > 3; at -= 3) {
        digits.insert(at - 3, ",");
    }
    return digits;
}

std::string text_bytes(double bytes) {
    const char* const unit[] = {"B", "kB", "MB", "GB", "TB"};
    int u = 0;
    while (bytes >= 999.5 && u < 4) {
        bytes /= 1000;
        u++;
    }
    return text_format(u == 0        ? "%.0f %s"
                       : bytes < 10  ? "%.2f %s"
                       : bytes < 100 ? "%.1f %s"
                                     : "%.0f %s",
                       bytes, unit[u]);
}

std::string text_duration(double seconds) {
    int64_t s = int64_t(seconds + 0.5);
    if (s < 60) {
        return text_format("%d s", int(s));
    }
    if (s < 3600) {
        return text_format("%d m %02d s", int(s / 60), int(s % 60));
    }
    return text_format("%d h %02d m", int(s / 3600), int(s % 3600 / 60));
}
