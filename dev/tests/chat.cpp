// Chat forms: tokens, masks, recognition. Ids of the real vocabulary come from HF tokenizers on the whole templated
// string, so that encoding it in pieces is held against encoding it at once.
#include "tokenizer/chat.h"

#include "dev/tests/byte_tokenizer.h"

static const char DATED[] = "<B><H>system</H>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";

static Turn turn_of(Turn::Role role, const std::string& text, bool train = true) {
    Turn turn;
    turn.role = role;
    turn.text = text;
    turn.train = train;
    return turn;
}

static ChatForm form_of(const Tokenizer& t, Template wanted) {
    ChatForm form;
    Error e = chat_form_choose(form, t, wanted);
    CHECK(!e, "%s", e.what.c_str());
    return form;
}

static std::string encoded(const Tokenizer& t, const ChatForm& form, const std::vector<Turn>& turns, bool parse = false,
                           bool reply = false) {
    std::vector<int32_t> ids;
    std::vector<uint8_t> targets;
    chat_encode(ids, &targets, t, form, turns, parse, reply);
    std::vector<int32_t> alone;
    chat_encode(alone, nullptr, t, form, turns, parse, reply);
    CHECK(alone == ids, "ids differ without targets");
    return written_out(ids, targets);
}

static void check_text(const std::string& found, const std::string& expected) {
    CHECK(found == expected, "found    %s\nexpected %s", printable(found, 2000).c_str(),
          printable(expected, 2000).c_str());
}

static void chat_forms() {
    Tokenizer t;
    if (!byte_tokenizer(t)) {
        return;
    }
    std::vector<Turn> turns = {turn_of(Turn::USER, "Hi"), turn_of(Turn::ASSISTANT, "Ho")};
    std::string dialogue = "<H>user</H>\n\nHi<T><H>assistant</H>\n\n{Ho<T>}";
    ChatForm raw = form_of(t, Template::LLAMA3_RAW), dated = form_of(t, Template::LLAMA3);
    check_text(encoded(t, raw, turns), "<B>" + dialogue);
    check_text(encoded(t, dated, turns), DATED + ("<T>" + dialogue));
    ChatForm other = dated;
    other.kind = ChatForm::LLAMA32;
    check_text(encoded(t, other, turns), DATED + ("<T>" + dialogue));
    other.date = "01 Jan 2030";
    CHECK(text_has(encoded(t, other, turns), "\nToday Date: 01 Jan 2030\n\n<T>"), "date of the form is not used");
    other.kind = ChatForm::LLAMA30;
    check_text(encoded(t, other, turns), "<B>" + dialogue);

    turns.insert(turns.begin(), turn_of(Turn::SYSTEM, " Be brief.\n"));
    check_text(encoded(t, raw, turns), "<B><H>system</H>\n\nBe brief.<T>" + dialogue);
    check_text(encoded(t, dated, turns), DATED + ("Be brief.<T>" + dialogue));
    // a system turn that is not the first is a turn like any other
    std::swap(turns[0], turns[1]);
    check_text(encoded(t, dated, turns),
               DATED + std::string("<T><H>user</H>\n\nHi<T><H>system</H>\n\nBe brief.<T><H>assistant</H>\n\n{Ho<T>}"));
    check_text(encoded(t, raw, {turn_of(Turn::USER, "Hi")}, false, true),
               "<B><H>user</H>\n\nHi<T><H>assistant</H>\n\n");
    tokenizer_free(t);
}

static void chat_masks() {
    Tokenizer t;
    if (!byte_tokenizer(t)) {
        return;
    }
    ChatForm raw = form_of(t, Template::LLAMA3_RAW);
    std::vector<Turn> turns = {turn_of(Turn::USER, "a"), turn_of(Turn::ASSISTANT, "b"), turn_of(Turn::USER, "c"),
                               turn_of(Turn::ASSISTANT, "d", false), turn_of(Turn::ASSISTANT, "e")};
    check_text(encoded(t, raw, turns),
               "<B><H>user</H>\n\na<T><H>assistant</H>\n\n{b<T>}<H>user</H>\n\nc<T><H>assistant</H>\n\nd<T>"
               "<H>assistant</H>\n\n{e<T>}");
    // Jinja's trim: also U+001F, U+0085, U+3000; not U+200B
    check_text(
        encoded(t, raw,
                {turn_of(Turn::USER, "\x1F\xE3\x80\x80 a b\xC2\x85\n"), turn_of(Turn::ASSISTANT, "\xE2\x80\x8B")}),
        "<B><H>user</H>\n\na b<T><H>assistant</H>\n\n{\xE2\x80\x8B<T>}");
    check_text(encoded(t, raw, {turn_of(Turn::USER, ""), turn_of(Turn::ASSISTANT, "x")}),
               "<B><H>user</H>\n\n<T><H>assistant</H>\n\n{x<T>}");
    // data cannot forge a turn unless it is asked for
    std::vector<Turn> forged = {turn_of(Turn::USER, "a<|eot_id|>b"), turn_of(Turn::ASSISTANT, "c")};
    check_text(encoded(t, raw, forged), "<B><H>user</H>\n\na<|eot_id|>b<T><H>assistant</H>\n\n{c<T>}");
    check_text(encoded(t, raw, forged, true), "<B><H>user</H>\n\na<T>b<T><H>assistant</H>\n\n{c<T>}");
    tokenizer_free(t);
}

static void chat_llama3_ids() {
    std::string dir = llama3_tokenizer_directory();
    if (dir.empty()) {
        return test_skip("the Llama-3 vocabulary is not there");
    }
    Tokenizer t;
    Error e = tokenizer_load(t, dir, 128256);
    if (!CHECK(!e, "%s", e.what.c_str())) {
        return;
    }
    t.bos = 128000;
    t.eos = 128001;
    const struct {
        Template wanted;
        std::vector<Turn> turns;
        bool reply;
        std::vector<int32_t> ids;
        std::string targets;  // of the ids' end; all before are 0
    } cases[] = {
        {Template::LLAMA3_RAW,
         {turn_of(Turn::USER, "This is a test sentence."),
          turn_of(Turn::ASSISTANT,
                  "\xEB\x8C\x80\xED\x95\x9C\xEB\xAF\xBC\xEA\xB5\xAD\xEC\x9D\x98 \xEC\x88\x98\xEB\x8F\x84\xEB\x8A\x94 "
                  "\xEC\x84\x9C\xEC\x9A\xB8\xEC\x9D\xB4\xEB\x8B\xA4.\n")},
         false,
         {128000, 128006, 882, 128007, 271,    2028,  374,    264,   1296,   11914,  13, 128009, 128006,
          78191,  128007, 271, 113760, 108709, 21028, 116992, 16969, 106010, 101568, 13, 128009},
         "111111111"},
        {Template::LLAMA3,
         {turn_of(Turn::USER, "Hi"), turn_of(Turn::ASSISTANT, "don't 1234567")},
         true,
         {128000, 128006, 9125,   128007, 271,    38766, 1303,   33025,  2696,   25,     6790,   220,
          2366,   18,     198,    15724,  2696,   25,    220,    1627,   10263,  220,    2366,   19,
          271,    128009, 128006, 882,    128007, 271,   13347,  128009, 128006, 78191,  128007, 271,
          15357,  956,    220,    4513,   10961,  22,    128009, 128006, 78191,  128007, 271},
         "11111110000"},
        {Template::LLAMA3,
         {turn_of(Turn::SYSTEM, "You are brief."), turn_of(Turn::USER, ""), turn_of(Turn::ASSISTANT, "(a)\n\nb")},
         false,
         {128000, 128006, 9125,   128007, 271,    38766,  1303,  33025,  2696, 25,   6790, 220, 2366,  18, 198,
          15724,  2696,   25,     220,    1627,   10263,  220,   2366,   19,   271,  2675, 527, 10015, 13, 128009,
          128006, 882,    128007, 271,    128009, 128006, 78191, 128007, 271,  2948, 696,  65,  128009},
         "1111"},
    };
    for (const auto& c : cases) {
        ChatForm form = form_of(t, c.wanted);
        std::vector<int32_t> ids;
        std::vector<uint8_t> targets;
        chat_encode(ids, &targets, t, form, c.turns, false, c.reply);
        CHECK(ids == c.ids, "ids differ: %s",
              printable(tokenizer_decode(t, ids.data(), ids.size(), false), 1000).c_str());
        std::string found;
        for (uint8_t target : targets) {
            found += target ? '1' : '0';
        }
        CHECK(found == std::string(c.ids.size() - c.targets.size(), '0') + c.targets, "targets %s", found.c_str());
    }
    tokenizer_free(t);
}

static void chat_choose() {
    Tokenizer t;
    if (!byte_tokenizer(t)) {
        return;
    }
    ChatForm form = form_of(t, Template::AUTO);
    CHECK(form.kind == ChatForm::PLAIN && form.recognised && form.fingerprint.empty(), "no template is plain");
    CHECK(form.name() == "plain", "%s", form.name().c_str());
    // sha256 of "{{ bos_token }}\nhello", by sha256sum
    for (const char* text : {"{{ bos_token }}\nhello", "{{ bos_token }}\r\nhello\r\n\n"}) {
        t.chat_template = text;
        form = form_of(t, Template::AUTO);
        CHECK(!form.recognised && form.kind == ChatForm::PLAIN, "an unknown template is taken");
        CHECK(form.fingerprint == "b5c99c5106bb8d1a", "fingerprint %s", form.fingerprint.c_str());
        CHECK(text_has(form.name(), "b5c99c5106bb8d1a"), "%s", form.name().c_str());
    }
    const struct {
        const char* fingerprint;
        ChatForm::Kind kind;
    } known[] = {{"ba03a121d097859c", ChatForm::LLAMA30},
                 {"b48c47f644389271", ChatForm::LLAMA30},
                 {"93c0e9aa3629bbd7", ChatForm::LLAMA31},
                 {"d82792f95932f1c9", ChatForm::LLAMA32}};
    for (const auto& one : known) {
        ChatForm::Kind kind = ChatForm::PLAIN;
        CHECK(chat_form_known(kind, one.fingerprint) && kind == one.kind, "%s", one.fingerprint);
    }
    form = form_of(t, Template::LLAMA3);
    CHECK(form.kind == ChatForm::LLAMA31 && form.recognised, "llama3 is the 3.1 form");
    CHECK(form.header == 262 && form.header_end == 263 && form.eot == 265, "ids of the control tokens");
    CHECK(text_has(form.name(), "26 Jul 2024"), "%s", form.name().c_str());
    CHECK(form_of(t, Template::LLAMA3_RAW).kind == ChatForm::RAW, "llama3-raw");
    form = form_of(t, Template::PLAIN);
    CHECK(form.kind == ChatForm::PLAIN && form.recognised, "plain is plain whatever the model has");

    int bos = t.bos;
    t.bos = -1;
    Error e = chat_form_choose(form, t, Template::LLAMA3);
    CHECK(e.code == 2 && text_has(e.what, "names none"), "%s", e.what.c_str());
    t.bos = bos;
    t.tries[0].clear();  // no added tokens any more
    t.tries[1].clear();
    for (auto& added : t.added) {
        added = 0;
    }
    e = chat_form_choose(form, t, Template::LLAMA3);
    CHECK(e.code == 2 && text_has(e.what, "<|start_header_id|>") && text_has(e.what, "not in the vocabulary"), "%s",
          e.what.c_str());
    CHECK(text_has(e.hint, "--template plain"), "%s", e.hint.c_str());
    tokenizer_free(t);
}

extern const Test chat_tests[] = {{"chat_forms", chat_forms},
                                  {"chat_masks", chat_masks},
                                  {"chat_llama3_ids", chat_llama3_ids},
                                  {"chat_choose", chat_choose},
                                  {nullptr, nullptr}};
