// See chat.h.
#include "tokenizer/chat.h"

#include "io/file.h"

// First 16 hex digits of the sha256 over the template's text, line ends as \n, none at the end.
static const struct {
    const char* fingerprint;
    ChatForm::Kind kind;
} KNOWN[] = {
    {"ba03a121d097859c", ChatForm::LLAMA30},  // 3.0
    {"b48c47f644389271", ChatForm::LLAMA30},  // 3.0, first release
    {"93c0e9aa3629bbd7", ChatForm::LLAMA31},  // 3.1 and 3.3
    {"d82792f95932f1c9", ChatForm::LLAMA32},  // 3.2
};

bool chat_form_known(ChatForm::Kind& kind, const std::string& fingerprint) {
    for (const auto& known : KNOWN) {
        if (fingerprint == known.fingerprint) {
            kind = known.kind;
            return true;
        }
    }
    return false;
}

static std::string template_fingerprint(const std::string& text) {
    std::string unix_text;
    for (size_t i = 0; i < text.size(); i++) {
        if (!(text[i] == '\r' && i + 1 < text.size() && text[i + 1] == '\n')) {
            unix_text += text[i];
        }
    }
    while (!unix_text.empty() && unix_text.back() == '\n') {
        unix_text.pop_back();
    }
    return sha256_hex(unix_text.data(), unix_text.size()).substr(0, 16);
}

std::string ChatForm::name() const {
    switch (kind) {
        case LLAMA30: return "Llama 3.0 chat";
        case LLAMA31: return "Llama 3.1 chat, dated " + date;
        case LLAMA32: return "Llama 3.2 chat, dated " + date;
        case RAW: return "Llama 3 raw chat";
        case PLAIN: break;
    }
    return recognised ? "plain" : "unknown template " + fingerprint;
}

Error chat_form_choose(ChatForm& form, const Tokenizer& t, Template wanted) {
    form = ChatForm();
    if (!t.chat_template.empty()) {
        form.fingerprint = template_fingerprint(t.chat_template);
    }
    if (wanted == Template::LLAMA3) {
        form.kind = ChatForm::LLAMA31;
    } else if (wanted == Template::LLAMA3_RAW) {
        form.kind = ChatForm::RAW;
    } else if (wanted == Template::AUTO && !t.chat_template.empty()) {
        form.recognised = chat_form_known(form.kind, form.fingerprint);
    }
    if (form.kind == ChatForm::PLAIN) {
        return {};
    }
    const struct {
        const char* content;
        int* id;
    } needed[] = {
        {"<|start_header_id|>", &form.header}, {"<|end_header_id|>", &form.header_end}, {"<|eot_id|>", &form.eot}};
    for (const auto& token : needed) {
        *token.id = tokenizer_special_id(t, token.content);
        if (*token.id < 0) {
            return bad_input("%s: the token %s, which the Llama 3 chat form needs, is not in the vocabulary",
                             printable(t.source, 4096).c_str(), token.content)
                .hinted("--template plain trains on prompts and completions without a chat form");
        }
    }
    if (t.bos < 0) {
        return bad_input("%s: the Llama 3 chat form begins with bos_token, and the model names none",
                         printable(t.source, 4096).c_str())
            .hinted("add bos_token to tokenizer_config.json, or use --template plain");
    }
    return {};
}

static void append_text(std::vector<int32_t>& ids, const Tokenizer& t, const std::string& text, bool parse_special) {
    tokenizer_encode(t, ids, text.data(), text.size(), parse_special);
}

static void append_header(std::vector<int32_t>& ids, const Tokenizer& t, const ChatForm& form, Turn::Role role) {
    static const char* const names[] = {"system", "user", "assistant"};
    ids.push_back(form.header);
    append_text(ids, t, names[role], false);
    ids.push_back(form.header_end);
    append_text(ids, t, "\n\n", false);  // the stripped text after it never joins it into another token
}

void chat_encode(std::vector<int32_t>& ids, std::vector<uint8_t>* targets, const Tokenizer& t, const ChatForm& form,
                 const std::vector<Turn>& turns, bool parse_special, bool reply) {
    size_t first = ids.size(), next = 0;
    ids.push_back(t.bos);
    if (form.kind == ChatForm::LLAMA31 || form.kind == ChatForm::LLAMA32) {
        append_header(ids, t, form, Turn::SYSTEM);
        append_text(ids, t, "Cutting Knowledge Date: December 2023\nToday Date: " + form.date + "\n\n", false);
        if (!turns.empty() && turns[0].role == Turn::SYSTEM) {
            append_text(ids, t, python_strip(turns[0].text), parse_special);
            next = 1;
        }
        ids.push_back(form.eot);
    }
    for (; next < turns.size(); next++) {
        const Turn& turn = turns[next];
        append_header(ids, t, form, turn.role);
        if (targets) {
            targets->resize(targets->size() + ids.size() - first, 0);
            first = ids.size();
        }
        append_text(ids, t, python_strip(turn.text), parse_special);
        ids.push_back(form.eot);
        if (targets) {
            targets->resize(targets->size() + ids.size() - first, turn.role == Turn::ASSISTANT && turn.train);
            first = ids.size();
        }
    }
    if (reply) {
        append_header(ids, t, form, Turn::ASSISTANT);
    }
    if (targets) {
        targets->resize(targets->size() + ids.size() - first, 0);
    }
}
