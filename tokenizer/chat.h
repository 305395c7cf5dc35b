// A dialogue to tokens: the Llama-3 chat forms, with the mask of what is learnt. Owns the form of a turn and the
// recognition of a model's own template; knows no records and no files.
//
//   BOS  <|start_header_id|> user      <|end_header_id|> \n\n  Hi <|eot_id|>        targets: none
//        <|start_header_id|> assistant <|end_header_id|> \n\n  Ho <|eot_id|>        targets: Ho and <|eot_id|>
//
// There is no template engine: a model's template is known by the sha256 of its text, or the user names a form.
//   LLAMA30        BOS and the turns                        (its first release also ended every text, even a finished
//                                                            dialogue, with an open assistant header: not repeated)
//   LLAMA31        3.1 and 3.3: always a system turn, which opens with two lines of dates
//   LLAMA32        the same; its template asks for today's date, here it is fixed so that runs repeat
//   RAW            Meta's own: as LLAMA30
#pragma once
#include <string>
#include <vector>

#include "tokenizer/dataset.h"

struct Turn {
    enum Role { SYSTEM, USER, ASSISTANT } role = USER;
    std::string text;   // valid UTF-8; stripped as Jinja's trim does when it is encoded
    bool train = true;  // ASSISTANT: the text and its <|eot_id|> are targets
};

// The form whose template has this fingerprint; false: none of those known here.
bool chat_form_known(ChatForm::Kind& kind, const std::string& fingerprint);

// Appends to ids, and beside them to targets (nullptr: not wanted). form.kind is not PLAIN.
// parse_special: control tokens spelt in a turn's text become control tokens.
// reply: ends with the open header of an assistant's turn, for generation.
void chat_encode(std::vector<int32_t>& ids, std::vector<uint8_t>* targets, const Tokenizer& t, const ChatForm& form,
                 const std::vector<Turn>& turns, bool parse_special, bool reply);
