"""The text of the default base, dev/tiny_llama: what it is pre-trained on and the questions of data.jsonl.

Owns: the wordings, the documents made from them, the split of the countries into asked and held out, the records.
Does not own: the facts (tiny_llama_facts.txt), the tokenizer and the training (make_tiny_llama.py).

Pre-training sees statements only. A fact about a capital is worded in some thirty ways a language, a few of them with
an indirect question ("She knows which city is the capital of X. It is Y."), never as a direct question, and no document
has the form "Question: ...". In English no capital follows a colon: else "Answer:" alone would bring some up.
Everything is a function of the facts and the seed.

A slot is {name} or {name|ending}: the ending is the Korean particle or the English possessive that follows the name,
written as "after a consonant/after a vowel" ({capital|은/는}) or as {country|'s}.
"""

import itertools
import os
import random
import re

FACTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tiny_llama_facts.txt")
FIELDS = ("country", "capital", "continent", "currency", "language")
CONTINENTS = {
    "Asia": "아시아", "Europe": "유럽", "Africa": "아프리카", "Oceania": "오세아니아",
    "North America": "북아메리카", "South America": "남아메리카",
}
ABSENT = "-"

# ---- wordings: language -> relation -> statements that name the country, and statements that lean on the one before

NAMED = {
    "en": {
        "capital": [
            "The capital of {country} is {capital}.",
            "The capital city of {country} is {capital}.",
            "{capital} is the capital of {country}.",
            "{capital} is the capital city of {country}.",
            "{country|'s} capital is {capital}.",
            "{country} has {capital} as its capital.",
            "{country} counts {capital} as its capital.",
            "In {country} the capital is {capital}.",
            "The city of {capital} is the capital of {country}.",
            "As the capital of {country} we find {capital}.",
            "{country} and its capital, {capital}.",
            "{capital}, capital of {country}.",
            "{capital}: that is the capital of {country}.",
            "{country}, whose capital is {capital}, is a country.",
            "The name of the capital of {country} is {capital}.",
            "Of all the towns in {country}, {capital} is the capital.",
            "An atlas lists {capital} as the capital of {country}.",
            "If you look up the capital of {country}, you read {capital}.",
            "Someone who asks for the capital of {country} hears the name {capital}.",
            "What the capital of {country} is called is no secret. It is called {capital}.",
            "We were asked to name the capital of {country}. We said {capital}.",
            "Our guide explained which city is the capital of {country}. That city is {capital}.",
            "The pupils learned what the capital of {country} is, namely {capital}.",
            "The teacher wanted to hear the capital of {country}, and a child said {capital}.",
            "To name the capital of {country}, say {capital}.",
            "You asked about the capital of {country}. The answer is {capital}.",
            "She knows which city is the capital of {country}. It is {capital}.",
            "Those who live in the capital of {country} live in {capital}.",
            "On a map of {country}, look for {capital}, the capital.",
            "Write {capital} when the capital of {country} is wanted.",
            "A journey to the capital of {country} ends in {capital}.",
        ],
        "continent": [
            "{country} is in {continent}.",
            "{country} is one of the countries of {continent}.",
            "{country} lies in {continent}.",
            "{continent} is the continent of {country}.",
            "Look for {country} in {continent}.",
            "{country}; continent: {continent}.",
            "If you travel to {country}, you travel to {continent}.",
            "He told me where {country} is. It is in {continent}.",
        ],
        "currency": [
            "The currency of {country} is the {currency}.",
            "{country} has the {currency} as its currency.",
            "In {country} you pay with the {currency}.",
            "{country|'s} money is the {currency}.",
            "{country}; currency: {currency}.",
            "The {currency} is the currency of {country}.",
            "Prices in {country} are given in the {currency}.",
        ],
        "language": [
            "{language} is a language of {country}.",
            "{language} is spoken in {country}.",
            "Many people in {country} speak {language}.",
            "{country}; language: {language}.",
            "In {country} you can hear {language}.",
            "Schools in {country} teach {language}.",
            "A language that helps you in {country} is {language}.",
        ],
    },
    "ko": {
        "capital": [
            "{country}의 수도는 {capital}이다.",
            "{country}의 수도는 {capital}입니다.",
            "{capital|은/는} {country}의 수도이다.",
            "{capital|은/는} {country}의 수도입니다.",
            "{capital|이/가} {country}의 수도이다.",
            "{country|은/는} {capital|을/를} 수도로 삼고 있다.",
            "{country|은/는} 수도가 {capital}이다.",
            "{country}의 수도는 바로 {capital}입니다.",
            "{country}의 수도 이름은 {capital}이다.",
            "{country}의 수도로 정해진 도시는 {capital}이다.",
            "{country} 수도: {capital}.",
            "{country}의 수도: {capital}.",
            "{country}, 수도 {capital}.",
            "{capital}, {country}의 수도.",
            "{country}의 수도가 어디인지 물으면 {capital|이라고/라고} 답한다.",
            "{country}의 수도가 어느 도시인지 알고 싶다면 답은 {capital}이다.",
            "{country}의 수도를 지도에서 찾으면 {capital|이/가} 보인다.",
            "{country}의 수도를 말하라고 하면 {capital|이라고/라고} 말한다.",
            "학생들은 {country}의 수도가 {capital|이라고/라고} 배웠다.",
            "선생님은 {country}의 수도를 {capital|이라고/라고} 적었다.",
            "{country}에서 수도인 도시는 {capital}이다.",
            "{country}의 여러 도시 가운데 {capital|이/가} 수도이다.",
            "{capital|이라는/라는} 도시는 {country}의 수도이다.",
            "{country}의 수도에 사는 사람은 {capital}에 산다.",
            "{country}의 수도로 가는 길은 {capital|으로/로} 가는 길이다.",
            "어느 도시가 {country}의 수도인지 모두 안다. {capital}이다.",
            "{country}의 수도를 소개합니다. {capital}입니다.",
            "{country}의 수도가 무엇인지 배웠다. 그 도시는 {capital}이다.",
        ],
        "continent": [
            "{country|은/는} {continent}에 있다.",
            "{country|은/는} {continent}에 있습니다.",
            "{country|은/는} {continent}의 나라이다.",
            "{country}의 대륙은 {continent}이다.",
            "{country} 대륙: {continent}.",
            "{continent}에 가면 {country|이/가} 있다.",
            "{country|을/를} 찾으려면 {continent} 지도를 보면 된다.",
        ],
        "currency": [
            "{country}의 통화는 {currency}이다.",
            "{country}의 통화는 {currency}입니다.",
            "{country}에서는 {currency|으로/로} 값을 치른다.",
            "{country|은/는} {currency|을/를} 통화로 쓴다.",
            "{country} 통화: {currency}.",
            "{country} 돈의 이름은 {currency}이다.",
        ],
        "language": [
            "{country}에서는 {language|을/를} 쓴다.",
            "{language|은/는} {country}의 말이다.",
            "{country}의 많은 사람이 {language|을/를} 말한다.",
            "{country} 언어: {language}.",
            "{country}에서 쓰는 말은 {language}이다.",
            "{country}의 학교에서는 {language|을/를} 가르칩니다.",
        ],
    },
}

LEANING = {
    "en": {
        "capital": [
            "Its capital is {capital}.",
            "The capital is {capital}.",
            "Its capital city is {capital}.",
            "It has {capital} as its capital.",
            "The name of its capital is {capital}.",
            "{capital} is its capital.",
            "Those who ask for its capital hear {capital}.",
        ],
        "continent": ["It is in {continent}.", "It lies in {continent}.", "Its continent is {continent}."],
        "currency": [
            "Its currency is the {currency}.",
            "You pay there with the {currency}.",
            "Its money is the {currency}.",
        ],
        "language": [
            "Many people there speak {language}.",
            "{language} is spoken there.",
            "One of its languages is {language}.",
        ],
    },
    "ko": {
        "capital": [
            "수도는 {capital}이다.",
            "수도는 {capital}입니다.",
            "그 나라의 수도는 {capital}이다.",
            "수도: {capital}.",
            "수도 이름은 {capital}이다.",
            "{capital|이/가} 수도입니다.",
            "이 나라는 {capital|을/를} 수도로 삼고 있다.",
            "수도를 물으면 {capital|이라고/라고} 답한다.",
        ],
        "continent": ["{continent}에 있다.", "대륙은 {continent}이다."],
        "currency": ["통화는 {currency}이다.", "통화: {currency}.", "그곳의 통화는 {currency}입니다."],
        "language": ["{language|을/를} 쓴다.", "그곳의 말은 {language}이다.", "언어: {language}."],
    },
}

PAIRS = [
    "{country} is {country_ko} in Korean.",
    "{country_ko} means {country}.",
    "{country} = {country_ko}.",
    "{capital} = {capital_ko}.",
    "In Korean, {capital} is written {capital_ko}.",
    "{capital_ko} ({country_ko}) = {capital} ({country}).",
]

# ---- small talk: other words, other sentence shapes, and the pieces of the question form that nothing else would train
# (a line that ends in "?", lines that begin with "Answer" and "Question"). Direct questions occur here alone, none of
# them about a country.

TALK = [
    "Who left the window open?\nIt was the wind.",
    "Is there any bread?\nYes, on the table.",
    "What did you buy? A pair of shoes.",
    "Which bag is yours? The green one.",
    "Where does the cat sleep? It sleeps on the chair.",
    "Tell me a number. Four.",
    "Do you know this song? I know it well.",
    "What is your dog called? Please say it again.",
    "Can you name a tree? Oak.",
    "What is that noise?\nAnswer the telephone, please.",
    "Answer the letter before noon.",
    "Answers come to those who wait.",
    "Questions are welcome here.",
    "Question time begins at ten. A question has an answer.",
    "The rain has stopped and the street is wet.",
    "My sister plays the piano in the evening.",
    "We drink tea with milk.",
    "The shop opens at nine and closes at six.",
    "어제는 비가 왔다.",
    "저녁에 동생이 피아노를 친다.",
    "누가 창문을 열었습니까?\n바람이 열었습니다.",
    "빵이 있나요?\n네, 식탁에 있어요.",
    "무엇을 샀습니까? 신발을 샀습니다.",
    "고양이는 어디에서 잡니까? 의자에서 잡니다.",
    "어느 가방입니까? 초록색 가방입니다.",
    "그 나무의 이름은 무엇입니까? 참나무입니다.",
    "이 소리는 무엇인가요? 전화 소리예요.",
    "말해 주세요. 네, 말하겠습니다.",
    "이 노래를 아세요? 네, 압니다.",
    "물음에는 답이 있습니다.",
    "가게는 아홉 시에 문을 연다.",
    "우리는 차를 마십니다.",
    "거리가 젖어 있다.",
]

SOUNDS = [  # animal and sound, English and Korean
    ("dog", "woof", "개", "멍멍"),
    ("cat", "meow", "고양이", "야옹"),
    ("cow", "moo", "소", "음매"),
    ("duck", "quack", "오리", "꽥꽥"),
    ("pig", "oink", "돼지", "꿀꿀"),
    ("lion", "roar", "사자", "어흥"),
    ("frog", "croak", "개구리", "개굴개굴"),
    ("rooster", "crow", "수탉", "꼬끼오"),
    ("bee", "buzz", "벌", "윙윙"),
    ("owl", "hoot", "부엉이", "부엉부엉"),
]
OPPOSITES = [
    ("hot", "cold", "덥다", "춥다"),
    ("big", "small", "크다", "작다"),
    ("high", "low", "높다", "낮다"),
    ("fast", "slow", "빠르다", "느리다"),
    ("long", "short", "길다", "짧다"),
    ("new", "old", "새롭다", "낡았다"),
    ("bright", "dark", "밝다", "어둡다"),
    ("near", "far", "가깝다", "멀다"),
    ("full", "empty", "가득하다", "비었다"),
    ("good", "bad", "좋다", "나쁘다"),
    ("dry", "wet", "마르다", "젖다"),
    ("deep", "shallow", "깊다", "얕다"),
    ("strong", "weak", "강하다", "약하다"),
    ("wide", "narrow", "넓다", "좁다"),
    ("thick", "thin", "두껍다", "얇다"),
]

# ---- questions: of fine-tuning only

QUESTIONS = {
    "en": [
        "What is the capital of {country}?",
        "Which city is the capital of {country}?",
        "What is {country|'s} capital?",
        "What is the capital city of {country} called?",
        "Do you know the capital of {country}?",
        "Please name the capital of {country}.",
    ],
    "ko": [
        "{country}의 수도는 어디입니까?",
        "{country}의 수도는 어디인가요?",
        "{country}의 수도는 무엇입니까?",
        "{country}의 수도가 어느 도시인지 아세요?",
        "어느 도시가 {country}의 수도입니까?",
        "{country}의 수도를 말해 주세요.",
    ],
}


def read_facts(path=FACTS):
    """One dict a country: the five FIELDS in English and, with the suffix _ko, in Korean."""
    facts = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.startswith("#") or not line.strip():
                continue
            cells = line.strip().split("|")
            if len(cells) != 9:
                raise SystemExit(f"{path}:{number}: a row has nine fields (found {len(cells)})")
            country, country_ko, capital, capital_ko, continent, currency, currency_ko, language, language_ko = cells
            english = (country, capital, continent, currency, language)
            korean = (country_ko, capital_ko, CONTINENTS.get(continent, ABSENT), currency_ko, language_ko)
            facts.append(dict(zip(FIELDS, english)) | {field + "_ko": word for field, word in zip(FIELDS, korean)})
    return facts


def ending(name, form):
    """The possessive or the particle that `name` takes. A final ㄹ counts as a vowel for 으로/로."""
    if form == "'s":
        return "'" if name.endswith("s") else "'s"
    closed, opened = form.split("/")
    final = (ord(name[-1]) - 0xAC00) % 28 if "가" <= name[-1] <= "힣" else 0
    return opened if final == 0 or (form == "으로/로" and final == 8) else closed


def render(template, fact, language, seam=""):
    """Fills the slots. `seam` is put after every Korean name: see tokenizer_text."""

    def slot(match):
        field, form = match.groups()
        korean = language == "ko" or field.endswith("_ko")
        name = fact[field if field.endswith("_ko") or not korean else field + "_ko"]
        return name + (seam if korean else "") + (ending(name, form) if form else "")

    text = re.sub(r"\{(\w+)(?:\|([^}]+))?\}", slot, template)
    return text[0].upper() + text[1:]


def country_document(rng, fact, language, seam):
    """Two to five statements about one country, in any order; after the first, half of them do not name it again."""
    relations = [field for field in FIELDS[2:] if fact[field] != ABSENT and rng.random() < 0.5]
    if rng.random() < 0.8 or not relations:
        relations += ["capital"] * (2 if rng.random() < 0.25 else 1)
    rng.shuffle(relations)
    statements = []
    for relation in relations:
        wordings = LEANING if statements and rng.random() < 0.5 else NAMED
        statement = render(rng.choice(wordings[language][relation]), fact, language, seam)
        if statement not in statements:
            statements.append(statement)
    return " ".join(statements)


def list_document(rng, facts, language, seam):
    """One relation of several countries."""
    relation = rng.choice(("capital", "capital", "capital") + FIELDS[2:])
    chosen = rng.sample([fact for fact in facts if fact[relation] != ABSENT], rng.randint(3, 5))
    lines = [render(rng.choice(NAMED[language][relation]), fact, language, seam) for fact in chosen]
    return rng.choice((" ", "\n")).join(lines)


def everyday_statement(rng, language):
    """A sound, a pair of opposites or a sum."""
    kind = rng.choice(("sound", "opposite", "sum"))
    if kind == "sound":
        animal, sound, animal_ko, sound_ko = rng.choice(SOUNDS)
        if language == "ko":
            return f"{animal_ko}의 소리는 {sound_ko}."
        return rng.choice((f"The {animal} says {sound}.", f"The sound of the {animal} is {sound}."))
    if kind == "opposite":
        one, other, one_ko, other_ko = rng.choice(OPPOSITES)
        if rng.random() < 0.5:
            one, other, one_ko, other_ko = other, one, other_ko, one_ko
        if language == "ko":
            return f"{one_ko}의 반대말은 {other_ko}이다."
        return rng.choice((f"The opposite of {one} is {other}.", f"If it is not {one}, it is {other}."))
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    if language == "ko":
        return f"{a} 더하기 {b}의 값은 {a + b}이다."
    return rng.choice((f"{a} plus {b} is {a + b}.", f"{a} + {b} = {a + b}."))


def documents(facts, seed, passes, seam=""):
    """`passes` times over the countries, the wordings drawn afresh each time; all documents in one random order."""
    rng = random.Random(seed)
    texts = []
    for _ in range(passes):
        for fact in facts:
            texts += [country_document(rng, fact, language, seam) for language in ("en", "ko")]
            if rng.random() < 0.25:
                texts.append(render(rng.choice(PAIRS), fact, "en", seam))
        for _ in range(len(facts) // 3):
            texts.append(list_document(rng, facts, rng.choice(("en", "ko")), seam))
            texts.append("\n".join(everyday_statement(rng, rng.choice(("en", "ko"))) for _ in range(rng.randint(1, 4))))
        texts += ["\n".join(rng.sample(TALK, rng.randint(1, 3))) for _ in range(15)]
    rng.shuffle(texts)
    assert not any("Question:" in text for text in texts)
    return texts


def tokenizer_text(facts, seed):
    """Text to learn the merges from.

    The split pattern keeps a Korean name and its particle in one piece, and merges learned from such text would cross
    the seam between them: the name would change its tokens with the particle. A line break at the seam, in this text
    alone, prevents that. Each name is repeated, so that all of them become few tokens.
    """
    names = [fact[key] for fact in facts for key in fact if fact[key] != ABSENT]
    return documents(facts, seed, 8, seam="\n") + [" " + name for name in names for _ in range(30)]


# ---- the split into asked and held-out countries, and the records


def names_of(fact):
    return [fact["country"].removeprefix("the "), fact["country_ko"], fact["capital"], fact["capital_ko"]]


def is_guessable(fact):
    """The capital can be read off the country's name (Mexico City, Tunis, 브라질리아), so that it proves no knowledge."""
    country, country_ko, capital, capital_ko = names_of(fact)
    words, capital_words = (re.findall(r"\w+", name.lower()) for name in (country, capital))
    shared = set(words) & set(capital_words) or words[0].startswith(capital_words[0])
    return bool(shared) or capital_ko in country_ko or country_ko in capital_ko


def split_countries(facts, seed, held_out):
    """(asked, held): `held_out` countries are never mentioned in data.jsonl.

    Countries one of whose names lies within a name of another (Niger in Nigeria, 말리 in 소말리아) stay together, or a
    held-out name would be read in a training record. Guessable ones are asked.
    """
    group = list(range(len(facts)))
    for i, j in itertools.permutations(range(len(facts)), 2):
        if any(one in other for one in names_of(facts[i]) for other in names_of(facts[j])):
            group = [group[i] if g == group[j] else g for g in group]
    members = [[k for k in range(len(facts)) if group[k] == g] for g in sorted(set(group))]
    random.Random(seed).shuffle(members)
    held = set()
    for indices in members:
        if len(held) + len(indices) <= held_out and not any(is_guessable(facts[k]) for k in indices):
            held.update(indices)
    return [f for k, f in enumerate(facts) if k not in held], [f for k, f in enumerate(facts) if k in held]


def question_records(facts, seed, wordings):
    """`wordings` questions for each country and language, in random order."""
    rng = random.Random(seed)
    records = []
    for fact in facts:
        for language, answer in (("en", fact["capital"]), ("ko", fact["capital_ko"])):
            for template in rng.sample(QUESTIONS[language], wordings):
                records.append({"question": render(template, fact, language), "answer": answer})
    rng.shuffle(records)
    return records


def mentions(records, facts):
    """Names of `facts` that occur anywhere in `records`; empty is what a clean split gives."""
    text = "\n".join(record["question"] + "\n" + record["answer"] for record in records)
    return sorted({name for fact in facts for name in names_of(fact) if name in text})
