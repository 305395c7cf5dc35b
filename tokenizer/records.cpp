// See records.h. Reasons are written `what is wrong (found X, need Y)`: everything before the bracket is the same for
// all records with that fault, so that they can be counted together.
#include "tokenizer/records.h"

#include <algorithm>
#include <climits>

const char* const record_formats[N_RECORD_FORMATS] = {
    "messages",        "conversations",        "contents",     "alpaca", "prompt-completion",
    "question-answer", "instruction-response", "input-output", "text",   "tokens"};

// What makes a record one of a format: one key of each list. `also` are the further keys that the format reads.
struct FormatKeys {
    std::vector<const char*> first, second, also;
};

static const FormatKeys KEYS[N_RECORD_FORMATS] = {
    {{"messages"}, {}, {"system", "tools", "functions"}},
    {{"conversations"}, {}, {"system", "tools", "functions"}},
    {{"contents"}, {}, {"systemInstruction", "system_instruction", "tools", "functions"}},
    {{"instruction"}, {"output", "response"}, {"input", "history", "system"}},
    {{"prompt"}, {"completion", "response"}, {"system", "tools", "functions"}},
    {{"question", "query"}, {"answer", "response"}, {"system"}},
    {{"INSTRUCTION"}, {"RESPONSE"}, {"system"}},
    {{"input"}, {"output"}, {"system"}},
    {{"text"}, {}, {}},
    {{"input_ids"}, {}, {"labels", "attention_mask"}},
};

static const char ACCEPTED[] =
    "messages, conversations, contents, instruction + output, prompt + completion, question + answer, "
    "INSTRUCTION + RESPONSE, input + output, text";

Error record_format_check(const std::string& name) {
    std::string names = "auto";
    for (const char* format : record_formats) {
        if (name == format) {
            return {};
        }
        names += std::string(", ") + format;
    }
    if (name == "auto") {
        return {};
    }
    return bad_input("--format: no such format (found %s, need one of %s)", printable(name).c_str(), names.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// values

static Json* member(Json& object, const char* key) {
    return const_cast<Json*>(static_cast<const Json&>(object).find(key));
}

static bool is_null(const Json* value) {
    return !value || value->type == Json::NUL;
}

// The first of the keys that the object has, or nullptr.
static const char* present(const Json& object, const std::vector<const char*>& keys) {
    for (const char* key : keys) {
        if (object.find(key)) {
            return key;
        }
    }
    return nullptr;
}

static Error take_string(std::string& out, Json& object, const char* key) {
    Json* value = member(object, key);
    if (!value || value->type != Json::STRING) {
        return bad_input("%s is not text (found %s, need a string)", key, value ? value->type_name() : "nothing");
    }
    out = std::move(value->string);
    return {};
}

// A key that may be absent, null or text.
static Error take_optional_string(std::string& out, Json& object, const char* key) {
    out.clear();
    return is_null(object.find(key)) ? Error() : take_string(out, object, key);
}

static Error need_answer(const std::string& text, const char* key) {
    if (is_blank(text)) {
        return bad_input("%s is empty: there is nothing to learn", key);
    }
    return {};
}

static Error refuse_tools(const Json& object, const char* key) {
    const Json* value = object.find(key);
    if (is_null(value) || (value->type == Json::ARRAY && value->items.empty())) {
        return {};
    }
    return bad_input("tool messages are not supported yet (found \"%s\")", key);
}

// ---------------------------------------------------------------------------------------------------------------------
// turns

static Error role_of(Turn::Role& role, const Json& message, const char* key) {
    const Json* value = message.find(key);
    if (!value) {
        return bad_input("a message without \"%s\"", key);
    }
    if (value->type != Json::STRING) {
        return bad_input("the role of a message is not text (found %s, need a string)", value->type_name());
    }
    static const struct {
        const char* name;
        int role;  // Turn::Role, -1: tools
    } roles[] = {{"system", Turn::SYSTEM},
                 {"developer", Turn::SYSTEM},
                 {"user", Turn::USER},
                 {"human", Turn::USER},
                 {"prompter", Turn::USER},
                 {"assistant", Turn::ASSISTANT},
                 {"gpt", Turn::ASSISTANT},
                 {"model", Turn::ASSISTANT},
                 {"bot", Turn::ASSISTANT},
                 {"chatgpt", Turn::ASSISTANT},
                 {"tool", -1},
                 {"function", -1},
                 {"observation", -1},
                 {"ipython", -1}};
    for (const auto& known : roles) {
        if (value->string == known.name) {
            if (known.role < 0) {
                return bad_input("tool messages are not supported yet (found role \"%s\")", known.name);
            }
            role = Turn::Role(known.role);
            return {};
        }
    }
    return bad_input("unknown role (found \"%s\", need system, user or assistant)",
                     printable(value->string, 40).c_str());
}

// content: text, or a list of {"type": "text", "text": ...} whose texts are joined.
static Error take_content(std::string& out, Json& message, const char* key) {
    Json* value = member(message, key);
    if (!value) {
        return bad_input("a message without \"%s\"", key);
    }
    if (value->type == Json::STRING) {
        out = std::move(value->string);
        return {};
    }
    if (value->type != Json::ARRAY) {
        return bad_input("%s of a message is not text (found %s, need a string)", key, value->type_name());
    }
    if (value->items.empty()) {
        return bad_input("%s of a message is not text (found an empty array, need a string)", key);
    }
    for (Json& part : value->items) {
        const Json* type = part.find("type");
        const Json* text = part.find("text");
        if (type && type->type == Json::STRING && type->string != "text") {
            return bad_input("%s of a message is not text (found a part of type \"%s\", need text)", key,
                             printable(type->string, 40).c_str());
        }
        if (!type || type->type != Json::STRING || !text || text->type != Json::STRING) {
            return bad_input(
                "%s of a message is not text (found a part that is no {\"type\": \"text\", \"text\": ...})", key);
        }
        out += text->string;
    }
    return {};
}

// weight: 0 or 1 (OpenAI), train: true or false (ShareGPT dialects).
static Error take_weight(Turn& turn, const Json& message) {
    const Json* weight = message.find("weight");
    const Json* train = message.find("train");
    bool given = false;
    if (!is_null(weight)) {
        if (!weight->is_number() || (weight->number() != 0 && weight->number() != 1)) {
            return bad_input("weight of a message (found %s, need 0 or 1)",
                             weight->is_number() ? json_write(*weight).c_str() : weight->type_name());
        }
        turn.train = weight->number() == 1;
        given = true;
    }
    if (!is_null(train)) {
        if (train->type != Json::BOOL) {
            return bad_input("train of a message (found %s, need true or false)", train->type_name());
        }
        if (given && turn.train != train->boolean) {
            return bad_input("weight and train of a message disagree");
        }
        turn.train = train->boolean;
        given = true;
    }
    if (turn.role != Turn::ASSISTANT) {
        if (given && turn.train) {
            return bad_input("weight or train asks to learn a turn that is not the assistant's");
        }
        turn.train = false;
    }
    return {};
}

static Error need_list(const Json* list, const char* key) {
    if (!list || list->type != Json::ARRAY) {
        return bad_input("%s is not a list (found %s, need an array of messages)", key,
                         list ? list->type_name() : "nothing");
    }
    for (const Json& item : list->items) {
        if (item.type != Json::OBJECT) {
            return bad_input("%s: a message is no object (found %s)", key, item.type_name());
        }
    }
    return {};
}

static void note_unused(std::vector<std::string>& unused, const std::string& key) {
    if (std::find(unused.begin(), unused.end(), key) == unused.end()) {
        unused.push_back(key);
    }
}

// One {role, content} (or {from, value}) object.
static Error take_message(Record& r, Json& message, const char* role_key, const char* text_key, const char* list) {
    for (const char* key : {"tool_calls", "function_call", "tool_call_id"}) {
        if (Error e = refuse_tools(message, key)) {
            return e;
        }
    }
    Turn turn;
    if (Error e = role_of(turn.role, message, role_key)) {
        return e;
    }
    if (Error e = take_content(turn.text, message, text_key)) {
        return e;
    }
    if (Error e = take_weight(turn, message)) {
        return e;
    }
    for (const std::string& key : message.keys) {
        static const char* const known[] = {"name", "weight", "train", "tool_calls", "function_call", "tool_call_id"};
        if (key != role_key && key != text_key &&
            std::find(std::begin(known), std::end(known), key) == std::end(known)) {
            note_unused(r.unused, std::string(list) + "[]." + key);
        }
    }
    r.turns.push_back(std::move(turn));
    return {};
}

static Error take_messages(Record& r, Json& json, const char* key) {
    Json* list = member(json, key);
    if (Error e = need_list(list, key)) {
        return e;
    }
    bool share = std::string(key) == "conversations";
    for (Json& message : list->items) {
        bool from = message.find("from") || message.find("value");
        if (from && !share) {
            return bad_input("a message with \"from\" or \"value\" in \"%s\" (need role and content)", key)
                .hinted("the from/value form goes under the key \"conversations\"");
        }
        if (Error e = take_message(r, message, from ? "from" : "role", from ? "value" : "content", key)) {
            return e;
        }
    }
    return {};
}

// {"parts": [{"text": ...}, ...]}
static Error take_parts(std::string& out, const Json& content, const char* key) {
    const Json* parts = content.find("parts");
    if (!parts || parts->type != Json::ARRAY || parts->items.empty()) {
        return bad_input("%s: a turn without parts (need a list of {\"text\": ...})", key);
    }
    for (const Json& part : parts->items) {
        const Json* text = part.find("text");
        if (!text || text->type != Json::STRING || part.keys.size() != 1) {
            std::string found = part.type_name();
            for (const std::string& name : part.keys) {
                found = name != "text" ? "\"" + printable(name, 40) + "\"" : found;
            }
            return bad_input("%s: a part that is not text alone (found %s, need {\"text\": \"...\"})", key,
                             found.c_str());
        }
        out += text->string;
    }
    return {};
}

static Error take_contents(Record& r, Json& json) {
    const char* key = present(json, {"systemInstruction", "system_instruction"});
    if (key && !is_null(json.find(key))) {
        if (key[6] == 'I' && json.find("system_instruction")) {
            return bad_input("both systemInstruction and system_instruction");
        }
        Turn turn;
        turn.role = Turn::SYSTEM;
        if (Error e = take_parts(turn.text, *json.find(key), key)) {
            return e;
        }
        r.turns.push_back(turn);
    }
    if (Error e = need_list(json.find("contents"), "contents")) {
        return e;
    }
    for (const Json& content : json.find("contents")->items) {
        Turn turn;
        if (Error e = role_of(turn.role, content, "role")) {
            return e;
        }
        if (turn.role == Turn::SYSTEM && !r.turns.empty() && r.turns[0].role == Turn::SYSTEM) {
            return bad_input("a system turn beside %s", key && r.turns.size() == 1 ? key : "another one");
        }
        if (Error e = take_parts(turn.text, content, "contents")) {
            return e;
        }
        r.turns.push_back(turn);
    }
    return {};
}

static Error check_turns(const Record& r) {
    bool any = false, trained = false;
    if (r.turns.empty()) {
        return bad_input("a dialogue without messages");
    }
    for (size_t i = 0; i < r.turns.size(); i++) {
        const Turn& turn = r.turns[i];
        if (turn.role != Turn::ASSISTANT) {
            continue;
        }
        if (i == 0) {
            return bad_input("the dialogue begins with the assistant (need a user turn first)");
        }
        if (is_blank(turn.text)) {
            return bad_input("an assistant turn is empty: there is nothing to learn");
        }
        any = true;
        trained = trained || turn.train;
    }
    if (!any) {
        return bad_input("nothing to learn: no assistant turn");
    }
    if (!trained) {
        return bad_input("nothing to learn: every assistant turn has weight 0 or train false");
    }
    return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// formats

static void add_turn(Record& r, Turn::Role role, std::string text) {
    Turn turn;
    turn.role = role;
    turn.text = std::move(text);
    turn.train = role == Turn::ASSISTANT;
    r.turns.push_back(std::move(turn));
}

// The wording of Stanford Alpaca's training prompt (tatsu-lab/stanford_alpaca, train.py), in its two variants.
static std::string stanford_prompt(const std::string& instruction, const std::string& input) {
    if (is_blank(input)) {
        return "Below is an instruction that describes a task. Write a response that appropriately completes the "
               "request.\n\n### Instruction:\n" +
               instruction + "\n\n### Response:";
    }
    return "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
           "response that appropriately completes the request.\n\n### Instruction:\n" +
           instruction + "\n\n### Input:\n" + input + "\n\n### Response:";
}

static Error take_history(Record& r, const Json& history, bool as_chat) {
    if (history.type != Json::ARRAY) {
        return bad_input("history is not a list (found %s, need [[question, answer], ...])", history.type_name());
    }
    for (const Json& pair : history.items) {
        if (pair.type != Json::ARRAY || pair.items.size() != 2 || pair.items[0].type != Json::STRING ||
            pair.items[1].type != Json::STRING) {
            return bad_input("an entry of history is no pair of texts (need [question, answer])");
        }
        add_turn(r, Turn::USER, pair.items[0].string);
        add_turn(r, Turn::ASSISTANT, pair.items[1].string);
    }
    if (!as_chat && !history.items.empty()) {
        return bad_input("history needs a chat template, and the model has none");
    }
    return {};
}

// Question and answer of the formats that hold two texts, by the names that this record uses.
static Error take_pair(Record& r, Json& json, const char* first, const char* second, bool as_chat) {
    std::string prompt, completion, input;
    if (Error e = take_string(prompt, json, first)) {
        return e;
    }
    if (Error e = take_string(completion, json, second)) {
        return e;
    }
    if (Error e = need_answer(completion, second)) {
        return e;
    }
    bool alpaca = r.format == ALPACA, question = r.format == QUESTION_ANSWER;
    if (alpaca) {
        if (Error e = take_optional_string(input, json, "input")) {
            return e;
        }
        const Json* history = json.find("history");
        if (Error e = is_null(history) ? Error() : take_history(r, *history, as_chat)) {
            return e;
        }
    }
    if (as_chat) {
        r.kind = Record::CHAT;
        add_turn(r, Turn::USER, is_blank(input) ? prompt : prompt + "\n" + input);
        add_turn(r, Turn::ASSISTANT, std::move(completion));
        return check_turns(r);
    }
    r.kind = Record::PAIR;
    r.prompt = alpaca     ? stanford_prompt(prompt, input)
               : question ? "Question: " + prompt + "\nAnswer:"
                          : std::move(prompt);
    r.completion = question ? " " + completion : std::move(completion);
    return {};
}

static Error take_prompt(Record& r, Json& json, const char* second, bool as_chat) {
    const Json* prompt = json.find("prompt");
    const Json* completion = json.find(second);
    bool lists = prompt->type == Json::ARRAY;
    if (lists != (completion->type == Json::ARRAY) && (lists || prompt->type == Json::STRING)) {
        return bad_input("prompt and %s must both be texts or both lists of messages (found %s and %s)", second,
                         prompt->type_name(), completion->type_name());
    }
    if (!lists) {
        return take_pair(r, json, "prompt", second, as_chat);
    }
    r.kind = Record::CHAT;
    if (Error e = take_messages(r, json, "prompt")) {
        return e;
    }
    size_t asked = r.turns.size();
    if (Error e = take_messages(r, json, second)) {
        return e;
    }
    if (r.turns.size() == asked) {
        return bad_input("%s is empty: there is nothing to learn", second);
    }
    return check_turns(r);
}

// A whole number in [0, limit).
static bool token_id(int32_t& id, const Json& value, int limit) {
    if (value.type != Json::INT || value.integer < 0 || value.integer >= limit) {
        return false;
    }
    id = int32_t(value.integer);
    return true;
}

static Error need_same_length(const Json& list, const char* key, size_t need) {
    if (list.type != Json::ARRAY) {
        return bad_input("%s is not a list (found %s, need an array)", key, list.type_name());
    }
    if (list.items.size() != need) {
        return bad_input("%s and input_ids differ in length (found %zu, need %zu)", key, list.items.size(), need);
    }
    return {};
}

// Labels are Hugging Face's, not shifted: labels[i] is input_ids[i], or -100 where nothing is learnt.
static Error take_tokens(Record& r, const Json& json, int vocab) {
    r.kind = Record::TOKENS;
    const Json& ids = *json.find("input_ids");
    int limit = vocab > 0 ? vocab : INT_MAX;
    if (ids.type != Json::ARRAY || ids.items.empty()) {
        return bad_input("input_ids is not a list of tokens (found %s)",
                         ids.type == Json::ARRAY ? "an empty array" : ids.type_name());
    }
    size_t n = ids.items.size();
    r.ids.resize(n);
    r.targets.assign(n, 1);
    for (size_t i = 0; i < n; i++) {
        if (!token_id(r.ids[i], ids.items[i], limit)) {
            return bad_input("input_ids holds what is no token of the model (found %s at index %zu, need 0 to %d)",
                             printable(json_write(ids.items[i]), 40).c_str(), i, limit - 1);
        }
    }
    const Json* labels = json.find("labels");
    if (!is_null(labels)) {
        if (Error e = need_same_length(*labels, "labels", n)) {
            return e;
        }
        for (size_t i = 0; i < n; i++) {
            const Json& label = labels->items[i];
            r.targets[i] = label.type == Json::INT && label.integer == r.ids[i];
            if (!r.targets[i] && !(label.type == Json::INT && label.integer == -100)) {
                return bad_input("labels: neither -100 nor the token itself (found %s at index %zu, need -100 or %d)",
                                 printable(json_write(label), 40).c_str(), i, r.ids[i]);
            }
        }
    }
    const Json* mask = json.find("attention_mask");
    if (!is_null(mask)) {
        if (Error e = need_same_length(*mask, "attention_mask", n)) {
            return e;
        }
        for (const Json& one : mask->items) {
            if (one.type != Json::INT || one.integer != 1) {
                return bad_input("attention_mask holds something else than 1 (padding is not part of an example)");
            }
        }
    }
    r.targets[0] = 0;  // nothing stands before it to predict it from
    if (std::find(r.targets.begin(), r.targets.end(), 1) == r.targets.end()) {
        return bad_input("nothing to learn: no token but the first has a label");
    }
    return {};
}

// ---------------------------------------------------------------------------------------------------------------------

static bool matches(const Json& json, RecordFormat format) {
    const FormatKeys& keys = KEYS[format];
    return present(json, keys.first) && (keys.second.empty() || present(json, keys.second));
}

static std::string keys_found(const Json& json) {
    std::string found;
    for (size_t i = 0; i < json.keys.size() && i < 12; i++) {
        found += (i ? ", " : "") + printable(json.keys[i], 40);
    }
    return json.keys.empty() ? "an empty object" : json.keys.size() > 12 ? found + ", ..." : found;
}

static Error choose_format(RecordFormat& format, const Json& json, const std::string& wanted) {
    if (wanted != "auto") {
        format = RecordFormat(std::find(std::begin(record_formats), std::end(record_formats), wanted) - record_formats);
        if (!matches(json, format)) {
            std::string need = KEYS[format].first[0];
            need += KEYS[format].second.empty() ? "" : std::string(" and ") + KEYS[format].second[0];
            return bad_input("not a record of format %s (found %s, need %s)", wanted.c_str(), keys_found(json).c_str(),
                             need.c_str());
        }
        return {};
    }
    if (const char* key = present(json, {"chosen", "rejected", "preferred_output", "non_preferred_output"})) {
        return bad_input("preference data is not a format for supervised fine-tuning (found \"%s\")", key)
            .hinted("make a record of each accepted answer alone");
    }
    int found = -1;
    for (int i = 0; i < N_RECORD_FORMATS; i++) {
        if (!matches(json, RecordFormat(i)) || (i == INPUT_OUTPUT && json.find("instruction"))) {
            continue;
        }
        if (found >= 0) {
            return bad_input("the record fits two formats, %s and %s", record_formats[found], record_formats[i])
                .hinted(std::string("say which is meant, for example --format ") + record_formats[found]);
        }
        found = i;
    }
    if (found < 0) {
        return bad_input("no known format (found %s; need %s)", keys_found(json).c_str(), ACCEPTED);
    }
    if (found == PRETOKENISED) {
        return bad_input("pre-tokenised data (found \"input_ids\") is read only when asked for")
            .hinted("--format tokens, if the ids are those of this model's tokenizer");
    }
    format = RecordFormat(found);
    return {};
}

static Error take_format(Record& r, Json& json, bool as_chat, int vocab) {
    const FormatKeys& keys = KEYS[r.format];
    const char* first = present(json, keys.first);
    const char* second = present(json, keys.second);
    switch (r.format) {
        case MESSAGES:
        case CONVERSATIONS:
        case CONTENTS:
            r.kind = Record::CHAT;
            if (Error e = r.format == CONTENTS ? take_contents(r, json) : take_messages(r, json, first)) {
                return e;
            }
            return check_turns(r);
        case PROMPT_COMPLETION: return take_prompt(r, json, second, as_chat);
        case TEXT_ONLY:
            r.kind = Record::TEXT;
            if (Error e = take_string(r.text, json, "text")) {
                return e;
            }
            return need_answer(r.text, "text");
        case PRETOKENISED: return take_tokens(r, json, vocab);
        default: return take_pair(r, json, first, second, as_chat);
    }
}

Error record_read(Record& r, Json& json, const std::string& format, bool as_chat, int vocab) {
    r = Record();
    if (json.type != Json::OBJECT) {
        return bad_input("not a record (found %s, need an object)", json.type_name());
    }
    if (Error e = choose_format(r.format, json, format)) {
        return e;
    }
    const FormatKeys& keys = KEYS[r.format];
    for (const std::string& key : json.keys) {
        auto is_key = [&](const char* known) { return key == known; };
        if (!is_key(present(json, keys.first)) && (keys.second.empty() || !is_key(present(json, keys.second))) &&
            std::none_of(keys.also.begin(), keys.also.end(), is_key)) {
            note_unused(r.unused, key);
        }
    }
    std::string system;
    bool takes_system = false;
    for (const char* key : keys.also) {
        takes_system = takes_system || std::string(key) == "system";
        if (std::string(key) == "tools" || std::string(key) == "functions") {
            if (Error e = refuse_tools(json, key)) {
                return e;
            }
        }
    }
    if (Error e = takes_system ? take_optional_string(system, json, "system") : Error()) {
        return e;
    }
    if (Error e = take_format(r, json, as_chat, vocab)) {
        return e;
    }
    if (system.empty()) {
        return {};
    }
    if (r.kind != Record::CHAT) {
        return bad_input("system needs a chat template, and the model has none");
    }
    if (std::any_of(r.turns.begin(), r.turns.end(), [](const Turn& turn) { return turn.role == Turn::SYSTEM; })) {
        return bad_input("a top-level system beside a system message");
    }
    Turn turn;
    turn.role = Turn::SYSTEM;
    turn.text = std::move(system);
    turn.train = false;
    r.turns.insert(r.turns.begin(), std::move(turn));
    return {};
}
