// Records to examples, file by file as a user has them: what every format becomes, and what every fault is told.
#include "tokenizer/records.h"

#include <sys/stat.h>

#include <algorithm>

#include "dev/tests/byte_tokenizer.h"

namespace {

struct Fixture {
    Tokenizer t;
    DataOptions options;
    std::string dir;
};

}  // namespace

static bool fixture_make(Fixture& f, Template wanted) {
    f.dir = test_directory();
    if (!byte_tokenizer(f.t)) {
        return false;
    }
    Error e = chat_form_choose(f.options.form, f.t, wanted);
    return CHECK(!e, "%s", e.what.c_str());
}

static Error load_file(Dataset& data, const Fixture& f, const std::string& bytes,
                       const std::string& name = "data.jsonl") {
    std::string path = path_join(f.dir, name);
    Error e = file_replace(path, bytes);
    return e ? e : dataset_load(data, {path}, f.t, f.options);
}

struct Good {
    const char* record;
    const char* plain;  // written out as in byte_tokenizer.h
    const char* chat;   // the same with Meta's raw form; nullptr: as plain
};

static const char STANFORD[] =
    "<B>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:{3<E>}";
static const char STANFORD_INPUT[] =
    "<B>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
    "### Response:{3<E>}";
#define ASK(q) "<H>user</H>\n\n" q "<T>"
#define ANSWER(a) "<H>assistant</H>\n\n{" a "<T>}"

static const Good good_cases[] = {
    {R"({"text": " a b\n"})", "<B>{ a b\n<E>}", nullptr},
    {R"({"question": "Q?", "answer": "A"})", "<B>Question: Q?\nAnswer:{ A<E>}", "<B>" ASK("Q?") ANSWER("A")},
    {R"({"query": "Q?", "response": "A", "id": 3})", "<B>Question: Q?\nAnswer:{ A<E>}", "<B>" ASK("Q?") ANSWER("A")},
    {R"({"prompt": "P ", "completion": " C"})", "<B>P { C<E>}", "<B>" ASK("P") ANSWER("C")},
    {R"({"prompt": "", "completion": "C"})", "<B>{C<E>}", "<B>" ASK("") ANSWER("C")},
    {R"({"prompt": "P", "response": "C"})", "<B>P{C<E>}", "<B>" ASK("P") ANSWER("C")},
    {R"({"INSTRUCTION": "P", "RESPONSE": "C"})", "<B>P{C<E>}", "<B>" ASK("P") ANSWER("C")},
    {R"({"input": "P", "output": "C"})", "<B>P{C<E>}", "<B>" ASK("P") ANSWER("C")},
    {R"({"instruction": "Add.", "input": "", "output": "3"})", STANFORD, "<B>" ASK("Add.") ANSWER("3")},
    {R"({"instruction": "Add.", "input": " \n", "response": "3"})", STANFORD, "<B>" ASK("Add.") ANSWER("3")},
    {R"({"instruction": "Add.", "input": null, "output": "3"})", STANFORD, "<B>" ASK("Add.") ANSWER("3")},
    {R"({"instruction": "Add.", "input": "1 2", "output": "3"})", STANFORD_INPUT, "<B>" ASK("Add.\n1 2") ANSWER("3")},
    {R"({"text": "nul \u0000 and \ud83d\ude00"})", nullptr, nullptr},
};

static void records_pairs() {
    for (Template wanted : {Template::PLAIN, Template::LLAMA3_RAW}) {
        Fixture f;
        if (!fixture_make(f, wanted)) {
            return;
        }
        for (const Good& c : good_cases) {
            Dataset data;
            Error e = load_file(data, f, std::string(c.record) + "\n");
            if (!CHECK(!e && data.size() == 1, "%s: %s", c.record, e.what.c_str())) {
                continue;
            }
            std::string expected = c.plain ? c.plain : std::string("<B>{nul \0 and \xF0\x9F\x98\x80<E>}", 22);
            expected = wanted != Template::PLAIN && c.chat ? c.chat : expected;
            std::string found = written_out(data, 0);
            CHECK(found == expected, "%s\nfound    %s\nexpected %s", c.record, printable(found, 999).c_str(),
                  expected.c_str());
        }
        tokenizer_free(f.t);
    }
}

static const Good chat_cases[] = {
    {R"({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, )"
     R"({"role": "assistant", "content": " b "}]})",
     nullptr, "<B><H>system</H>\n\nS<T>" ASK("a") ANSWER("b")},
    {R"({"messages": [{"role": "developer", "content": "S"}, {"role": "assistant", "content": "b"}]})", nullptr,
     "<B><H>system</H>\n\nS<T>" ANSWER("b")},
    {R"({"system": "S", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})",
     nullptr, "<B><H>system</H>\n\nS<T>" ASK("a") ANSWER("b")},
    {R"({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, )"
     R"({"role": "assistant", "content": "c", "tool_calls": null, "name": "x"}], "tools": []})",
     nullptr, "<B>" ASK("ab") ANSWER("c")},
    {R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}, )"
     R"({"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}, )"
     R"({"role": "user", "content": "e"}]})",
     nullptr, "<B>" ASK("a") "<H>assistant</H>\n\nb<T>" ASK("c") ANSWER("d") ASK("e")},
    {R"({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": false}, )"
     R"({"from": "gpt", "value": "c", "train": true}], "system": ""})",
     nullptr, "<B>" ASK("a") "<H>assistant</H>\n\nb<T>" ANSWER("c")},
    {R"({"conversations": [{"role": "prompter", "content": "a"}, {"role": "bot", "content": "b"}], "system": "S"})",
     nullptr, "<B><H>system</H>\n\nS<T>" ASK("a") ANSWER("b")},
    {R"({"systemInstruction": {"role": "user", "parts": [{"text": "S"}]}, )"
     R"("contents": [{"role": "user", "parts": [{"text": "a"}, )"
     R"({"text": "b"}]}, {"role": "model", "parts": [{"text": "c"}]}]})",
     nullptr, "<B><H>system</H>\n\nS<T>" ASK("ab") ANSWER("c")},
    {R"({"system_instruction": {"parts": [{"text": "S"}]}, "contents": [{"role": "user", "parts": [{"text": "a"}]}, )"
     R"({"role": "model", "parts": [{"text": "c"}]}]})",
     nullptr, "<B><H>system</H>\n\nS<T>" ASK("a") ANSWER("c")},
    {R"({"instruction": "I", "output": "O", "system": "S", "history": [["q", "r"], ["t", "u"]]})", nullptr,
     "<B><H>system</H>\n\nS<T>" ASK("q") ANSWER("r") ASK("t") ANSWER("u") ASK("I") ANSWER("O")},
    {R"({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]})",
     nullptr, "<B>" ASK("a") ANSWER("b")},
    {R"({"question": "q", "answer": "a", "system": "S"})", nullptr, "<B><H>system</H>\n\nS<T>" ASK("q") ANSWER("a")},
};

static void records_chats() {
    Fixture f;
    if (!fixture_make(f, Template::LLAMA3_RAW)) {
        return;
    }
    for (const Good& c : chat_cases) {
        Dataset data;
        Error e = load_file(data, f, c.record);
        if (CHECK(!e && data.size() == 1, "%s: %s", c.record, e.what.c_str())) {
            std::string found = written_out(data, 0);
            CHECK(found == c.chat, "%s\nfound    %s\nexpected %s", c.record, printable(found, 999).c_str(), c.chat);
        }
    }
    // any of the roles' names
    const char* const names[][2] = {{"user", "user"},           {"human", "user"},        {"prompter", "user"},
                                    {"assistant", "assistant"}, {"gpt", "assistant"},     {"model", "assistant"},
                                    {"bot", "assistant"},       {"chatgpt", "assistant"}, {"system", "system"},
                                    {"developer", "system"}};
    for (const auto& name : names) {
        Dataset data;
        Error e = load_file(data, f,
                            std::string(R"({"messages": [{"role": "user", "content": "a"}, {"role": ")") + name[0] +
                                R"(", "content": "b"}, {"role": "assistant", "content": "c"}]})");
        CHECK(!e && text_has(written_out(data, 0),
                             std::string("<H>") + name[1] + "</H>\n\n" + (name[1][0] == 'a' ? "{b" : "b")),
              "%s: %s", name[0], e.what.c_str());
    }
    tokenizer_free(f.t);
}

struct Bad {
    const char* record;
    const char* what;  // must be in the message
};

static const Bad bad_records[] = {
    {R"("hello")", "not a record (found a string, need an object)"},
    {R"(17)", "not a record (found a number, need an object)"},
    {R"(null)", "not a record (found null, need an object)"},
    {R"({"foo": 1, "bar": 2})", "no known format (found foo, bar; need messages, conversations,"},
    {R"({})", "no known format (found an empty object; need"},
    {R"({"prompt": "x"})", "no known format (found prompt; need"},
    {R"({"messages": [], "text": "a"})", "fits two formats, messages and text"},
    {R"({"prompt": "a", "question": "b", "response": "c"})", "fits two formats, prompt-completion and question-answer"},
    {R"({"messages": []})", "a dialogue without messages"},
    {R"({"messages": {}})", "messages is not a list (found an object"},
    {R"({"messages": ["hi"]})", "a message is no object (found a string)"},
    {R"({"messages": [{"role": "narrator", "content": "a"}]})",
     "unknown role (found \"narrator\", need system, user or assistant)"},
    {R"({"messages": [{"role": "na\u001b[31mrr", "content": "a"}]})", "unknown role (found \"na\\x1B[31mrr\""},
    {R"({"messages": [{"role": 3, "content": "a"}]})", "the role of a message is not text (found a number"},
    {R"({"messages": [{"content": "a"}]})", "a message without \"role\""},
    {R"({"messages": [{"from": "human", "value": "a"}]})", "a message with \"from\" or \"value\" in \"messages\""},
    {R"({"conversations": [{"from": "human", "content": "a"}]})", "a message without \"value\""},
    {R"({"messages": [{"role": "user"}]})", "a message without \"content\""},
    {R"({"messages": [{"role": "user", "content": 5}]})",
     "content of a message is not text (found a number, need a string)"},
    {R"({"messages": [{"role": "user", "content": null}]})", "content of a message is not text (found null"},
    {R"({"messages": [{"role": "user", "content": []}]})", "content of a message is not text (found an empty array"},
    {R"({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]})",
     "found a part of type \"image_url\", need text"},
    {R"({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]})", "found a part that is no"},
    {R"({"messages": [{"role": "user", "content": "a"}]})", "nothing to learn: no assistant turn"},
    {R"({"messages": [{"role": "assistant", "content": "a"}]})", "the dialogue begins with the assistant"},
    {R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}]})",
     "an assistant turn is empty"},
    {R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]})",
     "nothing to learn: every assistant turn has weight 0"},
    {R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]})",
     "weight of a message (found 0.5, need 0 or 1)"},
    {R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": true}]})",
     "weight of a message (found a boolean, need 0 or 1)"},
    {R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": 1}]})",
     "train of a message (found a number, need true or false)"},
    {R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", )"
     R"("train": true, "weight": 0}]})",
     "weight and train of a message disagree"},
    {R"({"messages": [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b"}]})",
     "asks to learn a turn that is not the assistant's"},
    {R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, )"
     R"("tool_calls": [{"id": "1"}]}]})",
     "tool messages are not supported yet (found \"tool_calls\")"},
    {R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], )"
     R"("tools": [{"type": "function"}]})",
     "tool messages are not supported yet (found \"tools\")"},
    {R"({"messages": [{"role": "tool", "content": "a"}]})",
     "tool messages are not supported yet (found role \"tool\")"},
    {R"({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, )"
     R"({"role": "assistant", "content": "b"}], "system": "t"})",
     "a top-level system beside a system message"},
    {R"({"question": "a", "answer": "b", "system": 1})", "system is not text (found a number"},
    {R"({"contents": [{"role": "user", "parts": [{"fileData": {"fileUri": "u"}}]}]})",
     "a part that is not text alone (found \"fileData\""},
    {R"({"contents": [{"role": "user", "parts": [{"text": "a", "thought": true}]}]})",
     "a part that is not text alone (found \"thought\""},
    {R"({"contents": [{"role": "user", "parts": []}]})", "contents: a turn without parts"},
    {R"({"contents": [{"parts": [{"text": "a"}]}]})", "a message without \"role\""},
    {R"({"contents": [], "systemInstruction": "s"})", "systemInstruction: a turn without parts"},
    {R"({"contents": [{"role": "system", "parts": [{"text": "a"}]}], "systemInstruction": {"parts": [{"text": "s"}]}})",
     "a system turn beside systemInstruction"},
    {R"({"prompt": "a", "completion": " \t\n"})", "completion is empty: there is nothing to learn"},
    {R"({"question": "a", "answer": "\u3000"})", "answer is empty: there is nothing to learn"},
    {R"({"text": " \n"})", "text is empty: there is nothing to learn"},
    {R"({"text": 3})", "text is not text (found a number, need a string)"},
    {R"({"question": 3, "answer": "b"})", "question is not text (found a number, need a string)"},
    {R"({"instruction": "a", "output": {"x": 1}})", "output is not text (found an object, need a string)"},
    {R"({"instruction": "a", "output": "b", "input": 4})", "input is not text (found a number"},
    {R"({"instruction": "a", "output": "b", "history": [["q"]]})", "an entry of history is no pair of texts"},
    {R"({"instruction": "a", "output": "b", "history": "q"})", "history is not a list (found a string"},
    {R"({"instruction": "a", "output": "b", "history": [["q", ""]]})", "an assistant turn is empty"},
    {R"({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]})",
     "prompt and completion must both be texts or both lists of messages (found a string and an array)"},
    {R"({"prompt": [{"role": "user", "content": "b"}], "completion": []})", "completion is empty"},
    {R"({"prompt": "a", "chosen": "b", "rejected": "c"})",
     "preference data is not a format for supervised fine-tuning (found \"chosen\")"},
    {R"({"input": {}, "preferred_output": [], "non_preferred_output": []})", "preference data"},
    {R"({"input_ids": [1, 2]})", "pre-tokenised data (found \"input_ids\") is read only when asked for"},
    {R"({"text": "a", "text": "b"})", "duplicate key"},
    {R"({"text": "a",})", "trailing comma"},
    {R"({'text': 'a'})", "single quotes"},
    {R"({"text": NaN})", "NaN"},
    {R"({"text": "a"} // c)", "text after the JSON value"},
    {R"({"text": "a"}{"text": "b"})", "text after the JSON value"},
    {"{\"text\": \"a\tb\"}", "control character 0x09"},
    {R"({"text": "\ud83d"})", "lone surrogate \\ud83d"},
    {"{\"text\": \"a\xFF\"}", "invalid UTF-8 (found byte 0xFF)"},
    {R"({"text": "abc)", "the line ends inside a JSON value"},
    {"\xEF\xBB\xBF{\"text\": \"a\"}", "a byte order mark inside the file"},
};

// Each fault as the second of three lines: named with file and line, and left out with --skip-bad.
static void records_faults() {
    Fixture f;
    if (!fixture_make(f, Template::LLAMA3_RAW)) {
        return;
    }
    const std::string fine = "{\"text\": \"fine\"}\n";
    for (const Bad& c : bad_records) {
        Dataset data;
        f.options.skip_bad = false;
        Error e = load_file(data, f, fine + c.record + "\n" + fine);
        std::string place = path_join(f.dir, "data.jsonl") + ":2:";
        CHECK(e.code == 2 && e.what.compare(0, place.size(), place) == 0 && text_has(e.what, c.what), "%s\nfound %s",
              c.record, e.what.c_str());
        CHECK(text_has(e.hint, "--skip-bad"), "%s: hint %s", c.record, e.hint.c_str());
        CHECK(data.size() == 0 && data.ids.empty(), "a refused file leaves examples");
        f.options.skip_bad = true;
        e = load_file(data, f, fine + c.record + "\n" + fine);
        if (CHECK(!e && data.size() == 2 && data.rejected == 1 && data.read == 3 && data.bad.size() == 1, "%s: %s",
                  c.record, e.what.c_str())) {
            CHECK(data.bad[0].line == 2 && data.bad[0].raw == c.record && text_has(data.bad[0].reason, c.what),
                  "%s: %s", c.record, data.bad[0].reason.c_str());
            CHECK(data.line == (std::vector<size_t>{1, 3}), "lines of the others");
        }
    }
    std::string deep = "{\"text\": " + std::string(100000, '[') + "\n";
    f.options.skip_bad = false;
    Dataset data;
    Error e = load_file(data, f, deep + fine);
    CHECK(e.code == 2 && text_has(e.what, ":1:") && text_has(e.what, "64"), "depth: %s", e.what.c_str());
    tokenizer_free(f.t);
}

static void records_need_template() {
    Fixture f;
    if (!fixture_make(f, Template::AUTO)) {
        return;
    }
    f.options.skip_bad = true;  // no reason to leave out a whole file of dialogues
    Dataset data;
    for (size_t i = 0; i < 9; i++) {
        Error e = load_file(data, f, chat_cases[i].record);
        CHECK(e.code == 2 && text_has(e.what, ":1: chat data, and the model is used without a chat template"), "%s",
              e.what.c_str());
        CHECK(text_has(e.hint, "--template llama3"), "%s", e.hint.c_str());
    }
    f.options.skip_bad = false;
    Error e = load_file(data, f, chat_cases[9].record);
    CHECK(text_has(e.what, "history needs a chat template"), "%s", e.what.c_str());
    e = load_file(data, f, chat_cases[11].record);
    CHECK(text_has(e.what, "system needs a chat template"), "%s", e.what.c_str());
    f.t.chat_template = "{{ bos_token }}\nhello";
    CHECK(!chat_form_choose(f.options.form, f.t, Template::AUTO), "an unknown template is no error by itself");
    for (const char* record : {chat_cases[0].record, good_cases[1].record}) {
        e = load_file(data, f, record);
        CHECK(e.code == 2 && text_has(e.what, "not recognised (fingerprint b5c99c5106bb8d1a)"), "%s", e.what.c_str());
        CHECK(text_has(e.hint, "--template llama3"), "%s", e.hint.c_str());
    }
    e = load_file(data, f, good_cases[0].record);
    CHECK(!e, "text needs no template: %s", e.what.c_str());
    tokenizer_free(f.t);
}

static void records_formats() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    Dataset data;
    f.options.format = "text";
    Error e = load_file(data, f, R"({"text": "t", "question": "q", "answer": "a"})");
    CHECK(!e && written_out(data, 0) == "<B>{t<E>}", "%s", e.what.c_str());
    f.options.format = "question-answer";
    e = load_file(data, f, R"({"text": "t", "question": "q", "answer": "a"})");
    CHECK(!e && written_out(data, 0) == "<B>Question: q\nAnswer:{ a<E>}", "%s", e.what.c_str());
    f.options.format = "alpaca";
    e = load_file(data, f, R"({"text": "t"})");
    CHECK(text_has(e.what, ":1: not a record of format alpaca (found text, need instruction and output)"), "%s",
          e.what.c_str());
    f.options.format = "csv";
    e = load_file(data, f, R"({"text": "t"})");
    CHECK(e.code == 2 && text_has(e.what, "no such format (found csv, need one of auto, messages,"), "%s",
          e.what.c_str());
    for (const char* format : record_formats) {
        CHECK(!record_format_check(format), "%s", format);
    }
    tokenizer_free(f.t);
}

static void records_tokens() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    f.options.format = "tokens";
    f.options.vocab = 300;
    Dataset data;
    Error e = load_file(data, f,
                        R"({"input_ids": [256, 65, 66, 257]})"
                        "\n"
                        R"({"input_ids": [65, 66, 299], "labels": [65, -100, 299], "attention_mask": [1, 1, 1]})");
    if (CHECK(!e && data.size() == 2, "%s", e.what.c_str())) {
        CHECK(written_out(data, 0) == "<B>{AB<E>}", "%s", written_out(data, 0).c_str());
        CHECK(written_out(data, 1) == "AB{<299>}", "%s", written_out(data, 1).c_str());
    }
    const Bad cases[] = {
        {R"({"input_ids": []})", "input_ids is not a list of tokens (found an empty array)"},
        {R"({"input_ids": "1 2"})", "input_ids is not a list of tokens (found a string)"},
        {R"({"input_ids": [1, 300]})", "no token of the model (found 300 at index 1, need 0 to 299)"},
        {R"({"input_ids": [-1]})", "found -1 at index 0"},
        {R"({"input_ids": [1.0]})", "found 1.0 at index 0"},
        {R"({"input_ids": ["1"]})", "found \"1\" at index 0"},
        {R"({"input_ids": [1, 2], "labels": [1]})", "labels and input_ids differ in length (found 1, need 2)"},
        {R"({"input_ids": [1, 2], "labels": [2, -100]})",
         "neither -100 nor the token itself (found 2 at index 0, need -100 or 1)"},
        {R"({"input_ids": [1, 2], "labels": [1, -100]})", "nothing to learn: no token but the first has a label"},
        {R"({"input_ids": [1, 2], "labels": 1})", "labels is not a list"},
        {R"({"input_ids": [1, 2], "attention_mask": [1, 0]})", "attention_mask holds something else than 1"},
        {R"({"input_ids": [1]})", "nothing to learn: no token but the first"},
    };
    for (const Bad& c : cases) {
        e = load_file(data, f, c.record);
        CHECK(e.code == 2 && text_has(e.what, c.what), "%s: %s", c.record, e.what.c_str());
    }
    tokenizer_free(f.t);
}

struct BadFile {
    const char* name;
    std::string bytes;
    const char* what;
    const char* hint;
};

static void records_bad_files() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    std::string fine = "{\"text\": \"fine\"}\n";
    auto wide = [&](size_t width, const std::string& mark) {
        std::string out = mark;
        for (char c : fine) {
            out += c + std::string(width - 1, '\0');
        }
        return out;
    };
    const BadFile cases[] = {
        {"empty.jsonl", "", "empty.jsonl: no examples (found an empty file)", "one JSON object a line"},
        {"bom.jsonl", "\xEF\xBB\xBF", "no examples (found an empty file)", ""},
        {"blank.jsonl", "\n \r\n\t\n", "no examples (found only blank lines)", ""},
        {"array.json", " [ ]\n", "no examples (found an empty array)", ""},
        {"a.jsonl.gz", "\x1F\x8B\x08 ...", "the file is compressed (gzip)", "gunzip"},
        {"b.jsonl", "\x1F\x8B\x08 ...", "the file is compressed (gzip)", "gunzip"},
        {"c.jsonl", "\x28\xB5\x2F\xFD ...", "the file is compressed (zstd)", "unzstd"},
        {"d.parquet", "PAR1....PAR1", "the file is Parquet", "jsonl"},
        {"e.csv", "question,answer\na,b\n", "not a jsonl file (found .csv)", "one JSON object a line"},
        {"l.jsonl", "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", "git lfs pull"},
        {"u.jsonl", wide(2, "\xFF\xFE"), "the file is UTF-16 (need UTF-8)", "iconv -f UTF-16"},
        {"v.jsonl", wide(2, ""), "the file is UTF-16 (need UTF-8)", "save as UTF-8"},
        {"w.jsonl", wide(4, std::string("\xFF\xFE\0\0", 4)), "the file is UTF-32 (need UTF-8)", "save as UTF-8"},
        {"p.jsonl", "{\n  \"text\": \"a\"\n}\n",
         "p.jsonl:1:2: the line ends inside an object (need one object a line; this file is pretty", "jq -c"},
        {"cut.jsonl", fine + "{\"text\": \"fi", "cut.jsonl:2:13: the file ends inside a JSON value (a truncated copy?)",
         "get the file again"},
        {"cut.json", "[{\"text\": \"a\"},\n {\"te", "cut.json:2:6: the file ends inside a JSON value", "JSON array"},
        {"two.json", "[{\"text\": \"a\"}]\n{\"text\": \"b\"}\n", "two.json:2:1: text after the JSON value",
         "JSON array"},
        {"utf.json", "[{\"text\": \"a\xC3\"}]", "utf.json:1:13: invalid UTF-8 (found byte 0xC3)", "--bad-utf8 replace"},
        {"el.json", "[{\"text\": \"a\"}, 3, {\"text\": \"\"}]", "el.json: element 2: not a record (found a number",
         "--skip-bad"},
        {"utf.jsonl", fine + "{\"text\": \"\xED\x95\x9C \x80\"}\n", "utf.jsonl:2:13: invalid UTF-8 (found byte 0x80)",
         "--bad-utf8 replace"},
    };
    Dataset data;
    for (const BadFile& c : cases) {
        Error e = load_file(data, f, c.bytes, c.name);
        CHECK(e.code == 2 && text_has(e.what, c.what) && text_has(e.hint, c.hint), "%s: %s\nhint: %s", c.name,
              e.what.c_str(), e.hint.c_str());
    }
    std::string fifo = path_join(f.dir, "fifo");
    CHECK(mkfifo(fifo.c_str(), 0600) == 0, "mkfifo");
    const char* const paths[][2] = {
        {"missing.jsonl", "missing.jsonl: cannot open"}, {"", "a directory"}, {"fifo", "a pipe (FIFO)"}};
    for (const auto& p : paths) {
        Error e = dataset_load(data, {path_join(f.dir, p[0])}, f.t, f.options);
        CHECK(e.code == 2 && text_has(e.what, p[1]) && !e.hint.empty(), "%s: %s", p[0], e.what.c_str());
    }
    tokenizer_free(f.t);
}

static void records_odd_but_good_files() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    Dataset data;
    // byte order mark, CRLF, blank lines, U+2028 inside a text, no end of line at the end
    Error e = load_file(data, f,
                        "\xEF\xBB\xBF{\"text\": \"a\"}\r\n\r\n \n{\"text\": \"b\xE2\x80\xA8"
                        "c\"}\n{\"text\": \"d\"}");
    if (CHECK(!e && data.size() == 3, "%s", e.what.c_str())) {
        CHECK(data.line == (std::vector<size_t>{1, 4, 5}) && data.blank_lines == 2 && data.read == 3, "lines");
        CHECK(written_out(data, 1) ==
                  "<B>{b\xE2\x80\xA8"
                  "c<E>}",
              "%s", written_out(data, 1).c_str());
        CHECK(data.notes.size() == 1 && text_has(data.notes[0], "byte order mark"), "note");
        // sha256sum of these bytes
        CHECK(data.hash == "0bcadf65e7f88ff679a9689da4fd0331967eff99202d529ef25085075a1ba9a0", "%s", data.hash.c_str());
    }
    e = load_file(data, f, " [{\"text\": \"a\"},\n\n {\"question\": \"q\", \"answer\": \"b\"}]\n", "array.json");
    if (CHECK(!e && data.size() == 2, "%s", e.what.c_str())) {
        CHECK(data.line == (std::vector<size_t>{1, 2}), "elements count from 1");
        CHECK(written_out(data, 1) == "<B>Question: q\nAnswer:{ b<E>}", "%s", written_out(data, 1).c_str());
        CHECK(data.formats.size() == 2 && data.formats[0].first == "text" && data.formats[1].first == "question-answer",
              "formats");
    }
    e = load_file(data, f, "{\"text\": \"a\"}\n", "named.csv");
    CHECK(!e, "jsonl under another name: %s", e.what.c_str());
    f.options.replace_bad_utf8 = true;
    e = load_file(data, f, "{\"text\": \"a\xF0\x9F\x98z\"}\n{\"text\": \"\\ud83dx\"}\n");
    if (CHECK(!e && data.size() == 2, "%s", e.what.c_str())) {
        CHECK(written_out(data, 0) == "<B>{a\xEF\xBF\xBDz<E>}", "%s", written_out(data, 0).c_str());
        CHECK(written_out(data, 1) == "<B>{\xEF\xBF\xBDx<E>}", "%s", written_out(data, 1).c_str());
        CHECK(data.warnings.size() == 1 && text_has(data.warnings[0], "U+FFFD (line 1)"), "warning");
    }
    tokenizer_free(f.t);
}

static void records_many_bad() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    std::string bytes = "{\"text\": \"a\"}\n";
    for (int i = 0; i < 30; i++) {
        bytes += i % 3 ? "{\"text\": " + std::to_string(i) + "}\n" : "{\"x" + std::to_string(i) + "\": 1}\n";
    }
    Dataset data;
    Error e = load_file(data, f, bytes);
    CHECK(e.code == 2 && std::count(e.what.begin(), e.what.end(), '\n') == 19 + 1 + 1 + 2, "%s", e.what.c_str());
    CHECK(text_has(e.what, "data.jsonl:21: ") && !text_has(e.what, "data.jsonl:22: "), "the first twenty: %s",
          e.what.c_str());
    CHECK(
        text_has(e.what,
                 "\n... and 10 more\n30 of 31 records are bad:\n      20  text is not text\n      10  no known format"),
        "%s", e.what.c_str());
    f.options.skip_bad = true;
    e = load_file(data, f, bytes);
    CHECK(!e && data.bad.size() == 30 && data.rejected == 30 && data.size() == 1, "%s", e.what.c_str());
    e = load_file(data, f, bytes.substr(bytes.find('\n') + 1));
    CHECK(
        e.code == 2 && text_has(e.what, "data.jsonl: no example is left of 30 records:\n      20  text is not text\n"),
        "%s", e.what.c_str());
    tokenizer_free(f.t);
}

static void records_cut() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    f.options.max_tokens = 5;
    Dataset data;
    Error e =
        load_file(data, f,
                  "{\"prompt\": \"ab\", \"completion\": \"cdef\"}\n{\"prompt\": \"abcde\", \"completion\": \"f\"}\n"
                  "{\"prompt\": \"ab\", \"completion\": \"c\"}\n{\"prompt\": \"ab\", \"completion\": \"cdxx\"}\n");
    if (CHECK(!e && data.size() == 3, "%s", e.what.c_str())) {
        CHECK(written_out(data, 0) == "<B>ab{cd}", "%s", written_out(data, 0).c_str());
        CHECK(written_out(data, 1) == "<B>ab{c<E>}", "%s", written_out(data, 1).c_str());
        CHECK(data.cut == (std::vector<uint8_t>{1, 0, 1}) && data.truncated == 2, "cut");
        CHECK(data.dropped_without_target == 1 && data.read == 4, "dropped");
        CHECK(data.duplicates == 1, "first and last are the same after the cut");
    }
    f.options.max_tokens = 2;
    e = load_file(data, f, "{\"prompt\": \"ab\", \"completion\": \"c\"}\n");
    CHECK(e.code == 2 &&
              text_has(e.what, "no example is left of 1 records:\n       1  no token to learn among the first 2"),
          "%s", e.what.c_str());
    CHECK(text_has(e.hint, "--max-tokens"), "%s", e.hint.c_str());
    tokenizer_free(f.t);
}

static void records_warnings() {
    Fixture f;
    if (!fixture_make(f, Template::LLAMA3_RAW)) {
        return;
    }
    std::string bytes;
    for (int i = 0; i < 14; i++) {
        bytes += "{\"question\": \"a<|eot_id|><|eot_id|>\", \"answer\": \"b\", \"id\": 1}\n{\"text\": \"t\"}\n";
    }
    Dataset data;
    Error e = load_file(data, f, bytes);
    if (CHECK(!e && data.warnings.size() == 1, "%s", e.what.c_str())) {
        CHECK(text_has(data.warnings[0],
                       "28 control tokens spelt inside text (lines 1, 3, 5, 7, 9, 11, 13, 15, 17, 19 and 4 more)"),
              "%s", data.warnings[0].c_str());
        CHECK(text_has(written_out(data, 0), "a<|eot_id|><|eot_id|><T>"), "%s", written_out(data, 0).c_str());
        CHECK(data.notes.size() == 1 && text_has(data.notes[0], "id (14)"), "keys that play no part");
        CHECK(data.duplicates == 26, "%zu", data.duplicates);
    }
    f.options.parse_special = true;
    e = load_file(data, f, bytes);
    CHECK(!e && data.warnings.empty() && text_has(written_out(data, 0), "a<T><T><T>"), "%s", e.what.c_str());
    f.options.parse_special = false;
    // whole templated texts: control tokens are read, BOS and EOS stand once
    e = load_file(data, f, "{\"text\": \"<|begin_of_text|>a<|eot_id|>b<|end_of_text|>\"}\n{\"text\": \"c\"}\n");
    if (CHECK(!e && data.warnings.size() == 1, "%s", e.what.c_str())) {
        CHECK(written_out(data, 0) == "<B>{a<T>b<E>}", "%s", written_out(data, 0).c_str());
        CHECK(text_has(data.warnings[0], "already begins with the BOS token (line 1): not added twice"), "%s",
              data.warnings[0].c_str());
    }
    tokenizer_free(f.t);
}

// A tokenizer that names neither BOS nor EOS: nothing stands before the first token, so it is no target.
static void records_without_bos() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    f.t.bos = f.t.eos = -1;
    Dataset data;
    Error e = load_file(data, f, "{\"text\": \"abc\"}\n{\"prompt\": \"\", \"completion\": \"de\"}\n");
    if (CHECK(!e && data.size() == 2 && data.warnings.size() == 1, "%s", e.what.c_str())) {
        CHECK(written_out(data, 0) == "a{bc}", "%s", written_out(data, 0).c_str());
        CHECK(written_out(data, 1) == "d{e}", "%s", written_out(data, 1).c_str());
        CHECK(text_has(data.warnings[0], "names no eos_token"), "%s", data.warnings[0].c_str());
    }
    tokenizer_free(f.t);
}

static void records_long_lines() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    // lines around the size of the reader's buffer, and one of several buffers
    std::string bytes;
    std::vector<size_t> sizes = {(1 << 20) - 20, (1 << 20) - 12, (1 << 20) - 11, 1 << 20, 3, 5 << 20};
    for (size_t size : sizes) {
        bytes += "{\"text\": \"" + std::string(size, 'x') + "\"}\n";
    }
    f.options.max_tokens = size_t(1) << 30;
    Dataset data;
    Error e = load_file(data, f, bytes);
    if (CHECK(!e && data.size() == sizes.size(), "%s", e.what.c_str())) {
        for (size_t i = 0; i < sizes.size(); i++) {
            CHECK(data.length(i) == sizes[i] + 2, "example %zu has %zu tokens", i, data.length(i));
        }
    }
    f.options.max_line_bytes = 2 << 20;
    e = load_file(data, f, bytes);
    CHECK(e.code == 2 && text_has(e.what, ":6: the line is too long (found 6 MB, need at most 2)"), "%s",
          e.what.c_str());
    CHECK(text_has(e.hint, "--max-line"), "%s", e.hint.c_str());
    tokenizer_free(f.t);
}

static void records_threads() {
    Fixture f;
    if (!fixture_make(f, Template::LLAMA3)) {
        return;
    }
    std::string bytes;
    for (int i = 0; i < 10000; i++) {
        bytes += "{\"question\": \"" + std::string(size_t(i * 7919 % 97), 'q') + std::to_string(i) +
                 "\", \"answer\": \"a\"}\n";
    }
    Dataset one, four;
    Error e = load_file(one, f, bytes);
    f.options.threads = 4;
    Error e4 = load_file(four, f, bytes);
    CHECK(!e && !e4 && one.size() == 10000, "%s%s", e.what.c_str(), e4.what.c_str());
    CHECK(one.ids == four.ids && one.targets == four.targets && one.start == four.start && one.line == four.line,
          "threads matter");
    CHECK(one.hash == four.hash && one.histogram == four.histogram && one.formats == four.formats, "threads matter");
    tokenizer_free(f.t);
}

static void records_report() {
    Fixture f;
    if (!fixture_make(f, Template::PLAIN)) {
        return;
    }
    f.options.skip_bad = true;
    Dataset data;
    Error e = load_file(data, f,
                        "{\"prompt\": \"a\\n\\u001bb\", \"completion\": \"cd\"}\n{\"text\": \"\"}\n{\"text\": "
                        "\"abcd\"}\n{\"text\": \"abcde\"}\n");
    if (!CHECK(!e && data.size() == 3, "%s", e.what.c_str())) {
        return;
    }
    std::string report;
    for (const std::string& line : dataset_report(data)) {
        report += line + "\n";
    }
    for (const std::string& part :
         std::vector<std::string>{"4 read = 3 used + 1 rejected + 0 dropped", "prompt-completion 1, text 2",
                                  "21, of which 14 are learnt (66.7 %)", "8 tokens, on average 7",
                                  "4-7          2  " + std::string(40, '#') + "\n",
                                  "8-15          1  " + std::string(20, '#') + "\n", "0 cut, 0 exact duplicates"}) {
        CHECK(text_has(report, part), "no `%s` in\n%s", part.c_str(), report.c_str());
    }
    CHECK(dataset_show(data, f.t, 0, false) == "<|begin_of_text|>a\n\\x1Bb[cd<|end_of_text|>]", "%s",
          dataset_show(data, f.t, 0, false).c_str());
    CHECK(dataset_show(data, f.t, 0, true) == "<|begin_of_text|>a\n\\x1Bb\033[32mcd<|end_of_text|>\033[0m", "colour");
    std::string expected = "{\"file\":\"" + path_join(f.dir, "data.jsonl") +
                           "\",\"line\":1,\"ids\":[256,97,10,27,98,99,100,257],\"targets\":[0,0,0,0,0,1,1,1]}";
    CHECK(dataset_dump_line(data, 0) == expected, "%s", dataset_dump_line(data, 0).c_str());
    tokenizer_free(f.t);
}

static void records_llama3() {
    std::string dir = llama3_tokenizer_directory();
    if (dir.empty()) {
        return test_skip("the Llama-3 vocabulary is not there");
    }
    Fixture f;
    f.dir = test_directory();
    Error e = tokenizer_load(f.t, dir, 128256);
    if (!CHECK(!e, "%s", e.what.c_str())) {
        return;
    }
    f.t.bos = 128000;
    f.t.eos = 128001;
    Dataset data;
    e = load_file(data, f,
                  R"({"question": "What is the capital of France?", "answer": "Paris"})"
                  "\n"
                  R"({"text": "This is a test sentence."})"
                  "\n");
    if (CHECK(!e && data.size() == 2, "%s", e.what.c_str())) {
        CHECK(data.ids ==
                  (std::vector<int32_t>{128000, 14924, 25,     3639,   374,  279, 6864, 315,  9822,  5380, 16533,
                                        25,     12366, 128001, 128000, 2028, 374, 264,  1296, 11914, 13,   128001}),
              "ids differ");
        CHECK(data.target_tokens == 2 + 7 && data.targets[12] == 1 && data.targets[11] == 0, "targets differ");
    }
    tokenizer_free(f.t);
}

extern const Test records_tests[] = {{"records_pairs", records_pairs},
                                     {"records_chats", records_chats},
                                     {"records_faults", records_faults},
                                     {"records_need_template", records_need_template},
                                     {"records_formats", records_formats},
                                     {"records_tokens", records_tokens},
                                     {"records_bad_files", records_bad_files},
                                     {"records_odd_but_good_files", records_odd_but_good_files},
                                     {"records_many_bad", records_many_bad},
                                     {"records_cut", records_cut},
                                     {"records_warnings", records_warnings},
                                     {"records_without_bos", records_without_bos},
                                     {"records_long_lines", records_long_lines},
                                     {"records_threads", records_threads},
                                     {"records_report", records_report},
                                     {"records_llama3", records_llama3},
                                     {nullptr, nullptr}};
