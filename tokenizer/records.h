// One JSON record to what is learnt from it. Owns the formats of a record and every rule about their keys and values;
// knows no files, no lines and no tokens (pre-tokenised records apart).
//
//   name                  keys                                              becomes
//   messages              messages:[{role,content}]                         CHAT
//   conversations         conversations:[{from,value}] (or role/content)    CHAT
//   contents              contents:[{role,parts:[{text}]}], systemInstruction   CHAT
//   alpaca                instruction, output|response; input, history      CHAT, or PAIR in the Stanford wording
//   prompt-completion     prompt, completion|response: texts or messages    CHAT, or PAIR
//   question-answer       question|query, answer|response                   CHAT, or PAIR "Question: ...\nAnswer:"
//   instruction-response  INSTRUCTION, RESPONSE                             CHAT, or PAIR
//   input-output          input, output (and no instruction)                CHAT, or PAIR
//   text                  text                                              TEXT
//   tokens                input_ids; labels, attention_mask                 TOKENS, when asked for by name
// A `system` beside them is a system turn. Keys that no format knows are left alone and reported.
#pragma once
#include <string>
#include <vector>

#include "io/json.h"
#include "tokenizer/chat.h"

enum RecordFormat {
    MESSAGES,
    CONVERSATIONS,
    CONTENTS,
    ALPACA,
    PROMPT_COMPLETION,
    QUESTION_ANSWER,
    INSTRUCTION_RESPONSE,
    INPUT_OUTPUT,
    TEXT_ONLY,
    PRETOKENISED,
    N_RECORD_FORMATS
};

struct Record {
    enum Kind { CHAT, PAIR, TEXT, TOKENS } kind = TEXT;
    RecordFormat format = TEXT_ONLY;
    std::vector<Turn> turns;          // CHAT
    std::string prompt, completion;   // PAIR
    std::string text;                 // TEXT
    std::vector<int32_t> ids;         // TOKENS
    std::vector<uint8_t> targets;     // TOKENS: beside ids
    std::vector<std::string> unused;  // keys that play no part
};

extern const char* const record_formats[N_RECORD_FORMATS];  // their names
Error record_format_check(const std::string& name);         // "auto" or one of the names, else an error that lists them

// Takes what the record holds out of json (its strings are moved). format: "auto" or a name. as_chat: the model has a
// chat form, and pairs become turns. vocab: rows of the embedding, for TOKENS (0: not known).
// Errors: code 2, what = the reason alone (no file, no line).
Error record_read(Record& r, Json& json, const std::string& format, bool as_chat, int vocab);
