// Tokenizer: reference vectors, splits, merges, long runs, threads, UTF-8. Most tests use small vocabularies made in
// place; the real Llama-3 one is used where it is available. What files may hold: tokenizer_files.cpp. The comparison
// with the reference library on a large corpus: scripts/check_tokenizer.py.
#include <algorithm>
#include <ctime>
#include <map>
#include <thread>

#include "dev/tests/small_tokenizer.h"

namespace {

// Some text of every kind that the patterns tell apart.
std::string random_text(std::mt19937& rng, size_t characters) {
    static const std::string pool[] = {"a",      "b",  "the", "Z",    "é",      "한",       "日",
                                       "я",      "ß",  "ſ",   "0",    "12",     "½",        "٣",
                                       " ",      " ",  "  ",  "\t",   "\n",     "\r",       "\r\n",
                                       " \n",    "　", ".",   "'",    "'s",     "'LL",      "!?",
                                       "-",      "(",  "{",   "<|",   "|>",     "\u0301",   "🙂",
                                       "\u200d", "’",  "_",   "\x1f", "\u2028", "\xC2\xA0", std::string(1, '\0')};
    std::string text;
    for (size_t i = 0; i < characters; i++) {
        if (rng() % 12 == 0) {
            uint32_t c = rng() % 0x110000;
            text += c >= 0xD800 && c <= 0xDFFF ? std::string("x") : utf8(c);
        } else {
            text += pool[rng() % (sizeof(pool) / sizeof(pool[0]))];
        }
    }
    return text;
}

bool load_llama3(Tokenizer& t) {
    std::string directory = llama3_tokenizer_directory();
    if (directory.empty()) {
        test_skip("no ../shared/llama3_tokenizer");
        return false;
    }
    return load_ok(t, directory, 128256);
}

// ---- reference vectors ----------------------------------------------------------------------------------------------

void llama3_vectors() {
    Tokenizer t;
    if (!load_llama3(t)) {
        return;
    }
    CHECK(t.pieces.size() == 128256 && t.bos == 128000, "%zu tokens, bos %d", t.pieces.size(), t.bos);
    CHECK(t.warnings.empty(), "the two forms differ? %s", t.warnings.empty() ? "" : t.warnings[0].c_str());
    check_ids(t, "", {});
    check_ids(t, "a\u200bb", {64, 16067, 65});
    check_ids(t, "e\u0301", {68, 54939});
    check_ids(t, "½", {27154});
    check_ids(t, "\u3000a", {23249, 64});
    check_ids(t, "\r\n\r\n", {881});
    check_ids(t, "a\n \nb", {64, 27907, 65});
    check_ids(t, " \u00850", {220, 116360, 15});
    check_ids(t, std::string(1, '\0'), {188});
    check_ids(t, "\x1f-a", {219, 12, 64});
    check_ids(t, "a\r\n\r\n  b", {64, 881, 220, 293});
    check_ids(t, "1234567", {4513, 10961, 22});
    check_ids(t, "x\u00a0y", {87, 4194, 88});
    check_ids(t, "don't", {15357, 956});
    check_ids(t, "DON'T", {85741, 17773});
    check_ids(t, "I’m", {40, 4344});
    check_ids(t, "foo_bar(baz);\n\n", {8134, 14725, 1921, 1394, 629});
    check_ids(t, "٣٤٥٦", {117413, 124079, 124043, 149, 99});
    check_ids(t, "Ⅷ", {71567, 100});
    check_ids(t, "'ſa", {6, 129, 123, 64});
    check_ids(t, "\u2028x", {378, 101, 87});
    check_ids(t, std::string(81, ' '), {96529});
    check_ids(t, std::string(40, 'a'), {70540, 70540, 70540, 70540, 70540});
    check_ids(t, "\uFFFD", {5809});
    check_ids(t, "👩‍💻", {9468, 239, 102, 102470, 93273, 119});
    check_ids(t, "<|begin_of_text|>This is a test sentence.<|end_of_text|>",
              {128000, 2028, 374, 264, 1296, 11914, 13, 128001}, true);
    check_ids(t, "<|start_header_id|>user<|end_header_id|>\n\nThis is a test sentence.<|eot_id|>",
              {128006, 882, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009}, true);
    check_ids(t, "system", {9125});
    check_ids(t, "assistant", {78191});
    check_ids(t, "ipython", {23799, 4690});
    check_ids(t, "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
              {38766, 1303, 33025, 2696, 25,   6790,  220, 2366, 18, 198,
               15724, 2696, 25,    220,  1627, 10263, 220, 2366, 19, 271});
    CHECK(tokenizer_special_id(t, "<|eot_id|>") == 128009, "eot is %d", tokenizer_special_id(t, "<|eot_id|>"));
    CHECK(t.added[128009] == 2 && t.added[127999] == 0, "kinds %d %d", t.added[128009], t.added[127999]);
    tokenizer_free(t);
}

// The file of inputs is cut at the marker line; the file of outputs has one line of ids a case.
void llama_cpp_vectors() {
    Tokenizer t;
    if (!load_llama3(t)) {
        return;
    }
    for (const char* generation : {"ggml-vocab-llama-bpe.gguf", "ggml-vocab-llama-bpe.newer.gguf"}) {
        std::string path = path_join(path_join(llama3_tokenizer_directory(), "llama_cpp_vectors"), generation);
        std::string inputs, outputs;
        Error e = file_read_all(inputs, path + ".inp");
        CHECK(!e, "%s", e.what.c_str());
        e = file_read_all(outputs, path + ".out");
        CHECK(!e, "%s", e.what.c_str());
        const std::string marker = "\n__ggml_vocab_test__\n";
        size_t cases = 0, line = 0;
        for (size_t begin = 0, end; (end = inputs.find(marker, begin)) != std::string::npos; cases++) {
            Ids expected;
            size_t stop = outputs.find('\n', line);
            const char* s = outputs.c_str() + line;
            const char* last = outputs.c_str() + stop;
            while (stop != std::string::npos && s < last) {
                char* next = nullptr;
                long id = strtol(s, &next, 10);
                if (next == s || next > last) {
                    break;
                }
                expected.push_back(int32_t(id));
                s = next;
            }
            check_ids(t, inputs.substr(begin, end - begin), expected);
            begin = end + marker.size();
            line = stop + 1;
        }
        CHECK(cases == 46, "%zu cases, need 46", cases);
    }
    tokenizer_free(t);
}

void tiktoken_equals_json() {
    Tokenizer json, tiktoken;
    if (!load_llama3(json)) {
        return;
    }
    std::string directory = test_directory(), bytes;
    Error e = file_read_all(bytes, path_join(llama3_tokenizer_directory(), "tokenizer.model"));
    CHECK(!e, "%s", e.what.c_str());
    put(directory, "tokenizer.model", bytes);
    if (!load_ok(tiktoken, directory, 128256)) {
        return;
    }
    CHECK(json.pieces == tiktoken.pieces, "pieces differ");
    CHECK(json.added == tiktoken.added, "kinds differ");
    CHECK(tiktoken.bos == 128000 && tiktoken.eos == 128001, "bos %d, eos %d", tiktoken.bos, tiktoken.eos);
    CHECK(tiktoken.warnings.size() == 1 && text_has(tiktoken.warnings[0], "used, since there is no tokenizer.json"),
          "no note on the form that is used");
    std::mt19937 rng(7);
    for (int i = 0; i < 3000; i++) {
        std::string text = random_text(rng, 1 + rng() % 40);
        Ids a = encode(json, text, true), b = encode(tiktoken, text, true);
        if (!CHECK(a == b, "%s: %s against %s", printable(text).c_str(), join(a).c_str(), join(b).c_str())) {
            break;
        }
    }
    // every token by its merges alone: pair ranks of one form, ranks of joined tokens of the other
    size_t differ = 0;
    for (const std::string& piece : json.pieces) {
        Ids a, b;
        bpe_merge(json.bpe, a, piece.data(), piece.size());
        bpe_merge(tiktoken.bpe, b, piece.data(), piece.size());
        differ += a != b;
    }
    CHECK(differ == 0, "%zu tokens merge differently", differ);
    tokenizer_free(json);
    tokenizer_free(tiktoken);
}

// formats: 588 entries of the Llama-3 vocabulary cannot be reached by merges
void llama3_unreachable() {
    Tokenizer t;
    if (!load_llama3(t)) {
        return;
    }
    size_t unreachable = 0, not_whole = 0;
    for (int32_t id = 0; id < 128000; id++) {
        Ids ids;
        bpe_merge(t.bpe, ids, t.pieces[id].data(), t.pieces[id].size());
        unreachable += ids != Ids{id};
        not_whole += !t.bpe.whole[id];
    }
    CHECK(unreachable == 588, "%zu unreachable, need 588", unreachable);
    CHECK(not_whole == 0, "%zu tokens are not looked up whole", not_whole);
    check_ids(t, t.pieces[100769], {100769});
    tokenizer_free(t);
}

// ---- splits and merges ----------------------------------------------------------------------------------------------

void merge_spellings() {
    Merges merges = {{"a", "b"}, {"ab", "c"}, {" ", "a"}};
    for (bool pairs : {true, false}) {
        Tokenizer t;
        Error e = load_json(t, small_tokenizer(merges, false, pairs));
        CHECK(!e, "%s", e.what.c_str());
        check_ids(t, "abc", {257});
        check_ids(t, "xabcab", {'x', 257, 256});
        check_ids(t, " ab", {' ', 256});  // "ab" ranks before " a"
        check_ids(t, " ac", {258, 'c'});
        tokenizer_free(t);
    }
}

// A token that no merges reach is found by the look-up of the whole piece only.
void ignore_merges() {
    for (bool ignore : {true, false}) {
        Json root = small_tokenizer({{"a", "b"}});
        at(at(root, "model"), "vocab").set("xyz", 257);
        at(root, "model").set("ignore_merges", ignore);
        Tokenizer t;
        Error e = load_json(t, root);
        CHECK(!e, "%s", e.what.c_str());
        check_ids(t, "xyz", ignore ? Ids{257} : Ids{'x', 'y', 'z'});
        check_ids(t, "xyzab", {'x', 'y', 'z', 256});
        tokenizer_free(t);
    }
}

// Merges that would show a split in the wrong place, worked by hand from the two patterns.
void split_patterns() {
    Merges merges = {{"1", "2"},   {"12", "3"}, {" ", "1"},  {" ", " "}, {"'", "s"}, {" ", "'"}, {"a", "1"},
                     {"\n", "\n"}, {" ", "\n"}, {"-", "\n"}, {".", "a"}, {"3", "4"}, {"S", "a"}, {"\xBF", "a"}};
    enum { N12 = 256, N123, SP1, SPSP, QS, SPQ, A1, NLNL, SPNL, DASHNL, DOTA, N34, SA, BFA };
    Tokenizer llama3, smollm2;
    Error e = load_json(llama3, small_tokenizer(merges));
    CHECK(!e, "%s", e.what.c_str());
    e = load_json(smollm2, small_tokenizer(merges, true));
    CHECK(!e, "%s", e.what.c_str());
    check_ids(llama3, "1234", {N123, '4'});
    check_ids(llama3, "5634", {'5', '6', '3', '4'});  // threes from the left: the 3 and the 4 never meet
    check_ids(smollm2, "1234", {'1', '2', '3', '4'});
    check_ids(llama3, " 1", {' ', '1'});
    check_ids(smollm2, " 1", {' ', '1'});
    check_ids(llama3, "a1", {'a', '1'});
    check_ids(smollm2, "a1", {'a', '1'});
    check_ids(llama3, "a  1", {'a', ' ', ' ', '1'});  // the last space of a run is left for what follows
    check_ids(smollm2, "a  1", {'a', SPSP, '1'});     // the digit was cut off first: the run ends its text
    check_ids(llama3, "a  b", {'a', ' ', ' ', 'b'});
    check_ids(smollm2, "a  b", {'a', ' ', ' ', 'b'});
    check_ids(llama3, "a  ", {'a', SPSP});
    check_ids(smollm2, "a  ", {'a', SPSP});
    check_ids(llama3, "x's", {'x', QS});
    check_ids(smollm2, "x's", {'x', QS});
    check_ids(llama3, "x'S", {'x', '\'', 'S'});
    check_ids(llama3, "x'Sa", {'x', '\'', 'S', 'a'});   // contractions in either case end before the "a"
    check_ids(smollm2, "x'Sa", {'x', '\'', SA});        // in small letters only
    check_ids(llama3, "'ſa", {'\'', 0xC5, 0xBF, 'a'});  // U+017F is an s when case is ignored
    check_ids(smollm2, "'ſa", {'\'', 0xC5, BFA});
    check_ids(llama3, " 's", {SPQ, 's'});
    check_ids(smollm2, " 's", {SPQ, 's'});
    check_ids(llama3, "-\n", {DASHNL});  // punctuation takes the line ends behind it along
    check_ids(smollm2, "-\n", {'-', '\n'});
    check_ids(llama3, " \n\n", {' ', NLNL});
    check_ids(llama3, ".a", {DOTA});
    check_ids(smollm2, ".a", {'.', 'a'});
    check_ids(llama3, "\u180e1", {0xE1, 0xA0, 0x8E, '1'});
    check_ids(llama3, "  \u180ea", {' ', ' ', 0xE1, 0xA0, 0x8E, 'a'});  // U+180E is no white space: the run ends before it
    tokenizer_free(llama3);
    tokenizer_free(smollm2);
}

// The definition, on strings: join the pair of lowest (rank, position) until none is left.
std::vector<std::string> merge_by_definition(const std::map<std::pair<std::string, std::string>, size_t>& ranks,
                                             const std::string& text) {
    std::vector<std::string> parts;
    for (char c : text) {
        parts.push_back(std::string(1, c));
    }
    for (;;) {
        size_t best = 0, best_rank = SIZE_MAX;
        for (size_t i = 0; i + 1 < parts.size(); i++) {
            auto found = ranks.find({parts[i], parts[i + 1]});
            if (found != ranks.end() && found->second < best_rank) {
                best_rank = found->second;
                best = i;
            }
        }
        if (best_rank == SIZE_MAX) {
            return parts;
        }
        parts[best] += parts[best + 1];
        parts.erase(parts.begin() + std::ptrdiff_t(best) + 1);
    }
}

// Random merge tables over a small alphabet, in shuffled order, so that joins often make pairs of lower rank, and
// with equal ranks (as tiktoken's) in every other one.
void merge_algorithms_agree() {
    std::mt19937 rng(3);
    for (int table = 0; table < 60; table++) {
        bool equal_ranks = table % 2 == 1;
        std::vector<std::string> tokens;
        for (int b = 0; b < 256; b++) {
            tokens.push_back(std::string(1, char(b)));
        }
        std::map<std::string, int> id_of;
        // few letters make the same token in several ways, at different times: entries out of order
        std::vector<std::string> letters = {"a", "b", "c"};
        letters.resize(1 + table % 3);
        std::map<std::pair<std::string, std::string>, size_t> ranks;
        std::vector<std::pair<std::string, std::string>> pairs;
        for (int i = 0; i < 30; i++) {
            std::string left = letters[rng() % letters.size()], right = letters[rng() % letters.size()];
            if (left.size() + right.size() > 12 || !ranks.emplace(std::make_pair(left, right), 0).second) {
                continue;
            }
            pairs.push_back({left, right});
            if (id_of.emplace(left + right, int(tokens.size())).second) {
                tokens.push_back(left + right);
                letters.push_back(left + right);
            }
        }
        std::shuffle(pairs.begin(), pairs.end(), rng);
        Bpe b;
        int clash[2];
        CHECK(bpe_set_vocabulary(b, tokens, clash), "clash");
        for (size_t i = 0; i < pairs.size(); i++) {
            int id = id_of[pairs[i].first + pairs[i].second];
            size_t rank = equal_ranks ? size_t(id) * 7919 % 101 * 1000 + size_t(id) : i;
            ranks[pairs[i]] = rank;
            CHECK(bpe_add_pair(b, bpe_find(b, pairs[i].first.data(), pairs[i].first.size()),
                               bpe_find(b, pairs[i].second.data(), pairs[i].second.size()), uint32_t(rank), id),
                  "pair twice");
        }
        for (int i = 0; i < 60; i++) {
            std::string text;
            for (size_t n = 1 + rng() % (i < 50 ? 40 : 400); n > 0; n--) {
                text += char('a' + rng() % (i % 2 ? 2 + table % 3 : 1 + table % 3));  // the last letter is in no pair
            }
            Ids scan, lists, expected;
            for (const std::string& part : merge_by_definition(ranks, text)) {
                expected.push_back(bpe_find(b, part.data(), part.size()));
            }
            bpe_merge_scan(b, scan, text.data(), text.size());
            bpe_merge_lists(b, lists, text.data(), text.size());
            if (!CHECK(scan == expected, "scan, table %d, %s", table, text.c_str()) ||
                !CHECK(lists == expected, "lists, table %d, %s", table, text.c_str())) {
                return;
            }
        }
    }
}

// Of this process's time on a processor, so that other work on the machine does not count.
double seconds_since(clock_t begin) {
    return double(clock() - begin) / CLOCKS_PER_SEC;
}

// Ten million characters of one kind are one pre-token (digits: three each). With tokens of 2, 4, 8, 16 the ids are
// known: 10^7 / 16 of the longest. The bound on time is far above what it takes and far below anything quadratic.
void long_runs() {
    const size_t N = 10000000;
    const double SECONDS = 20;
    Merges merges;
    for (const char* c : {"a", " ", "\n", "-"}) {
        std::string s = c;
        for (int i = 0; i < 4; i++) {
            merges.push_back({s, s});
            s += s;
        }
    }
    Tokenizer t;
    Error e = load_json(t, small_tokenizer(merges));
    CHECK(!e, "%s", e.what.c_str());
    const char kinds[] = {'a', ' ', '\n', '-', '7'};
    for (int k = 0; k < 5; k++) {
        clock_t begin = clock();
        Ids ids = encode(t, std::string(N, kinds[k]));
        double seconds = seconds_since(begin);
        Ids expected = k < 4 ? Ids(N / 16, 256 + 4 * k + 3) : Ids(N, '7');
        CHECK(ids == expected, "run of 0x%02X: %zu ids (%s ...)", kinds[k], ids.size(),
              join(ids).substr(0, 40).c_str());
        CHECK(seconds <= SECONDS, "run of 0x%02X took %.1f s", kinds[k], seconds);
    }
    // a space before every letter, white space without an end of line, random letters in one word
    std::mt19937 rng(5);
    std::string mixed(N, ' '), tabs(N, ' '), word(N, 'a');
    for (size_t i = 0; i < N; i++) {
        mixed[i] = i % 2 ? 'x' : ' ';
        tabs[i] = i % 2 ? '\t' : ' ';
        word[i] = char('a' + rng() % 4);
    }
    tabs += 'x';
    for (const std::string* text : {&mixed, &tabs, &word}) {
        clock_t begin = clock();
        CHECK(decode(t, encode(t, *text)) == *text, "decode differs for %.10s", text->c_str());
        CHECK(seconds_since(begin) <= SECONDS, "%.10s took %.1f s", text->c_str(), seconds_since(begin));
    }
    tokenizer_free(t);
}

void long_runs_llama3() {
    const size_t N = 10000000;
    Tokenizer t;
    if (!load_llama3(t)) {
        return;
    }
    clock_t begin = clock();
    Ids letters = encode(t, std::string(N, 'a')), spaces = encode(t, std::string(N, ' '));
    double seconds = seconds_since(begin);
    CHECK(letters == Ids(N / 8, 70540), "%zu ids for 10^7 letters", letters.size());
    CHECK(decode(t, spaces) == std::string(N, ' '), "spaces do not come back");
    CHECK(seconds <= 40, "two runs of 10^7 took %.1f s", seconds);
    tokenizer_free(t);
}

void round_trip() {
    std::mt19937 rng(9);
    Tokenizer small;
    Error e = load_json(small, small_tokenizer({{"a", "b"}, {" ", "t"}, {"t", "h"}, {"th", "e"}, {"\xED", "\x95"}}));
    CHECK(!e, "%s", e.what.c_str());
    Tokenizer llama3;
    bool real = !llama3_tokenizer_directory().empty() && load_ok(llama3, llama3_tokenizer_directory(), 128256);
    for (int i = 0; i < 4000; i++) {
        std::string bytes;
        for (size_t n = rng() % 200; n > 0; n--) {
            bytes += char(rng() % (i % 2 ? 256 : 128));
        }
        std::string text =
            i % 4 < 2 ? utf8_replace_invalid(bytes.data(), bytes.size(), nullptr) : random_text(rng, rng() % 60);
        CHECK(utf8_validate(text.data(), text.size(), nullptr), "the test's text is not UTF-8");
        CHECK(decode(small, encode(small, text, i % 3 == 0)) == text, "small: %s", printable(text).c_str());
        if (real) {
            CHECK(decode(llama3, encode(llama3, text, i % 3 == 0)) == text, "llama3: %s", printable(text).c_str());
        }
    }
    tokenizer_free(small);
    tokenizer_free(llama3);
}

void threads_and_two_tokenizers() {
    Tokenizer a, b;
    Error e = load_json(a, small_tokenizer({{"a", "b"}, {"c", "d"}}));
    CHECK(!e, "%s", e.what.c_str());
    e = load_json(b, small_tokenizer({{"b", "c"}, {"a", "bc"}}));
    CHECK(!e, "%s", e.what.c_str());
    // the per-thread cache must not answer for the other tokenizer
    for (int i = 0; i < 3; i++) {
        check_ids(a, "abcd", {256, 257});
        check_ids(b, "abcd", {257, 'd'});
    }
    std::mt19937 rng(1);
    std::vector<std::string> texts;
    std::vector<Ids> expected;
    for (int i = 0; i < 500; i++) {
        texts.push_back(random_text(rng, 80));
        expected.push_back(encode(a, texts.back()));
    }
    std::vector<int> wrong(4, 0);
    std::vector<std::thread> threads;
    for (int k = 0; k < 4; k++) {
        threads.emplace_back([&, k] {
            for (size_t i = 0; i < texts.size(); i++) {
                wrong[size_t(k)] += encode(a, texts[i]) != expected[i];
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(wrong == std::vector<int>(4, 0), "threads give other ids");
    tokenizer_free(a);
    tokenizer_free(b);
}

// ---- UTF-8 ----------------------------------------------------------------------------------------------------------

void utf8_checks() {
    const struct {
        std::string bytes;
        size_t bad_at;         // SIZE_MAX: valid
        const char* replaced;  // WHATWG's result
        size_t count;
    } cases[] = {
        {"plain ascii that is longer than eight", SIZE_MAX, "plain ascii that is longer than eight", 0},
        {"é한🙂\xF4\x8F\xBF\xBF", SIZE_MAX, "é한🙂\xF4\x8F\xBF\xBF", 0},
        {"ab\xFFg", 2, "ab\uFFFDg", 1},
        {"12345678\x80", 8, "12345678\uFFFD", 1},
        {"\xC0\xAF", 0, "\uFFFD\uFFFD", 2},                      // overlong
        {"\xE0\x9F\xBF", 0, "\uFFFD\uFFFD\uFFFD", 3},            // overlong
        {"\xED\xA0\x80x", 0, "\uFFFD\uFFFD\uFFFDx", 3},          // surrogate
        {"\xF4\x90\x80\x80", 0, "\uFFFD\uFFFD\uFFFD\uFFFD", 4},  // above U+10FFFF
        {"\xF5\x80", 0, "\uFFFD\uFFFD", 2},
        {"\xE1\x80", 0, "\uFFFD", 1},  // cut at the end
        {"\xF1\x80\x80", 0, "\uFFFD", 1},
        {"\xF1\x80\x80g", 0, "\uFFFDg", 1},
        {"\xC2g", 0, "\uFFFDg", 1},
        // the example of the Unicode standard for this practice (table 3-11)
        {"\xF0\x80\x80\x41", 0,
         "\uFFFD\uFFFD\uFFFD"
         "A",
         3},
        {"a\xF1\x80\x80\xE1\x80\xC2"
         "b\x80"
         "c\x80\xBF"
         "d",
         1,
         "a\uFFFD\uFFFD\uFFFD"
         "b\uFFFD"
         "c\uFFFD\uFFFD"
         "d",
         6},
    };
    for (const auto& c : cases) {
        size_t bad_at = SIZE_MAX, count = 99;
        bool valid = utf8_validate(c.bytes.data(), c.bytes.size(), &bad_at);
        CHECK(valid == (c.bad_at == SIZE_MAX) && bad_at == c.bad_at, "%s: bad at %zu", printable(c.bytes).c_str(),
              bad_at);
        std::string text = utf8_replace_invalid(c.bytes.data(), c.bytes.size(), &count);
        CHECK(text == c.replaced && count == c.count, "%s: %s, %zu", printable(c.bytes).c_str(), text.c_str(), count);
    }
    for (uint32_t c = 0; c < 0x110000; c++) {
        std::string s = utf8(c);
        bool surrogate = c >= 0xD800 && c <= 0xDFFF;
        if (!CHECK(utf8_validate(s.data(), s.size(), nullptr) != surrogate, "U+%04X", c)) {
            break;
        }
    }
}

void stripping() {
    const uint32_t spaces[] = {0x09,   0x0A,   0x0B,   0x0C,   0x0D,   0x1C,   0x1D,   0x1E,   0x1F,   0x20,
                               0x85,   0xA0,   0x1680, 0x2000, 0x2001, 0x2002, 0x2003, 0x2004, 0x2005, 0x2006,
                               0x2007, 0x2008, 0x2009, 0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000};
    for (uint32_t c = 0; c < 0x110000; c++) {
        if (c >= 0xD800 && c <= 0xDFFF) {
            continue;
        }
        bool space = std::find(std::begin(spaces), std::end(spaces), c) != std::end(spaces);
        std::string s = utf8(c);
        if (!CHECK(is_blank(s) == space && python_strip(s).empty() == space, "U+%04X", c)) {
            break;
        }
    }
    CHECK(python_strip("\u3000 \t a b \n\x1c\u2003") == "a b", "both ends");
    CHECK(python_strip("한") == "한" && python_strip("") == "" && python_strip(" \n ") == "", "edges");
    CHECK(is_blank("") && is_blank(" \u00a0\n") && !is_blank(" x ") && !is_blank("\u200b"), "blank");
}

}  // namespace

extern const Test tokenizer_tests[];
const Test tokenizer_tests[] = {
    {"llama3_vectors", llama3_vectors},
    {"llama_cpp_vectors", llama_cpp_vectors},
    {"tiktoken_equals_json", tiktoken_equals_json},
    {"llama3_unreachable", llama3_unreachable},
    {"merge_spellings", merge_spellings},
    {"ignore_merges", ignore_merges},
    {"split_patterns", split_patterns},
    {"merge_algorithms_agree", merge_algorithms_agree},
    {"long_runs", long_runs},
    {"long_runs_llama3", long_runs_llama3},
    {"round_trip", round_trip},
    {"threads_and_two_tokenizers", threads_and_two_tokenizers},
    {"utf8", utf8_checks},
    {"stripping", stripping},
    {nullptr, nullptr},
};
