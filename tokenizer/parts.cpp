// See parts.h. Texts are made with io/pack.h.
#include "tokenizer/parts.h"

#include "io/pack.h"

// ---------------------------------------------------------------------------------------------------------------------
// items as text

static void put_item(std::string& text, const Item& item) {
    pack_number(text, uint64_t(item.fatal) | uint64_t(item.cut) << 1 | uint64_t(item.bos_spelt) << 2 |
                  uint64_t(item.mended) << 3 | uint64_t(item.format) << 4);
    pack_number(text, uint64_t(item.bad.code));
    pack_list(text, item.bad.what);
    pack_list(text, item.bad.hint);
    pack_number(text, item.column);
    pack_number(text, item.controls);
    pack_list(text, item.ids);
    pack_list(text, item.targets);
    pack_number(text, item.unused.size());
    for (const std::string& key : item.unused) {
        pack_list(text, key);
    }
}

static void take_item(Unpack& c, Item& item) {
    uint64_t flags = unpack_number(c);
    c.fine = c.fine && flags >> 4 < N_RECORD_FORMATS;
    if (!c.fine) {
        return;
    }
    item.fatal = flags & 1;
    item.cut = flags & 2;
    item.bos_spelt = flags & 4;
    item.mended = flags & 8;
    item.format = RecordFormat(flags >> 4);
    item.bad.code = int(unpack_number(c));
    unpack_list(c, item.bad.what);
    unpack_list(c, item.bad.hint);
    item.column = size_t(unpack_number(c));
    item.controls = size_t(unpack_number(c));
    unpack_list(c, item.ids);
    unpack_list(c, item.targets);
    c.fine = c.fine && item.targets.size() == item.ids.size();
    for (uint64_t left = unpack_number(c); left > 0 && c.fine; left--) {
        item.unused.emplace_back();
        unpack_list(c, item.unused.back());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// the exchange

static Error damaged(const DataOptions& options, size_t part) {
    return runtime_failure("process %zu of %d: its share of the examples did not arrive whole", part, options.parts);
}

// Every part's text, in pieces of bounded size: a piece ends with '+' when more of its text follows, else with '.'.
static Error exchange_texts(std::vector<std::string>& texts, const DataOptions& options, std::string mine) {
    texts.assign(size_t(options.parts), "");
    for (bool more = true; more;) {
        std::string rest;
        if (mine.size() > options.exchange_bytes) {
            rest = mine.substr(options.exchange_bytes);
            mine.resize(options.exchange_bytes);
        }
        mine += rest.empty() ? '.' : '+';
        std::vector<std::string> pieces = options.exchange(mine);
        mine = std::move(rest);
        more = false;
        for (size_t p = 0; p < texts.size(); p++) {
            char end = p < pieces.size() && !pieces[p].empty() ? pieces[p].back() : '\0';
            if (end != '+' && end != '.') {
                return damaged(options, p);
            }
            more |= end == '+';
            pieces[p].pop_back();
            if (texts[p].empty()) {
                texts[p] = std::move(pieces[p]);
            } else {
                texts[p] += pieces[p];
            }
        }
    }
    return {};
}

std::vector<size_t> parts_deal(const std::vector<Item>& items, int parts) {
    std::vector<size_t> bounds = {0};
    uint64_t total = 0, before = 0;
    for (const Item& item : items) {
        total += item.line.text.size() + 1;
    }
    for (size_t i = 0; i < items.size(); i++) {
        while (before * uint64_t(parts) >= total * bounds.size()) {
            bounds.push_back(i);
        }
        before += items[i].line.text.size() + 1;
    }
    bounds.resize(size_t(parts) + 1, items.size());
    return bounds;
}

Error parts_exchange(std::vector<Item>& items, const std::vector<size_t>& bounds, const DataOptions& options,
                     const std::string& round, const std::string& path) {
    std::string mine;
    pack_number(mine, 0);
    pack_list(mine, round);
    for (size_t i = bounds[size_t(options.part)]; i < bounds[size_t(options.part) + 1]; i++) {
        put_item(mine, items[i]);
    }
    std::vector<std::string> texts;
    if (Error e = exchange_texts(texts, options, std::move(mine))) {
        return e;
    }
    std::vector<size_t> begins;
    bool same = true;
    for (size_t p = 0; p < texts.size(); p++) {
        Unpack c{texts[p]};
        uint64_t code = unpack_number(c);
        if (code >= 1 && code <= UINT8_MAX) {
            return Error{int(code), "", ""};
        }
        std::string its_round;
        unpack_list(c, its_round);
        if (!c.fine || code != 0) {
            return damaged(options, p);
        }
        same = same && its_round == round;
        begins.push_back(c.at);
    }
    if (!same) {
        return bad_input("%s: the processes do not read the same bytes here", printable(path, 4096).c_str())
            .hinted("every machine needs the same copy of the data; was a file changed just now?");
    }
    for (size_t p = 0; p < texts.size(); p++) {
        Unpack c{texts[p], begins[p]};
        for (size_t i = bounds[p]; i < bounds[p + 1] && c.fine && p != size_t(options.part); i++) {
            take_item(c, items[i]);
        }
        if (!c.fine || (c.at < c.text.size() && p != size_t(options.part))) {
            return damaged(options, p);
        }
        texts[p] = std::string();
    }
    return {};
}

Error parts_failed(const DataOptions& options, const Error& e) {
    if (options.parts > 1) {
        std::string mine;
        pack_number(mine, uint64_t(e.code));
        std::vector<std::string> texts;
        if (Error of_exchange = exchange_texts(texts, options, mine)) {
            return e;  // the reason that came first
        }
    }
    return e;
}
