"""Facts that the demo model learns, the wordings that ask for them, and small talk.

`{s}` is the subject, `{o}` the object. Wordings under `held_out` are never in training.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A kind of fact: its pairs, and the wordings of question, thought and answer."""

    name: str
    pairs: dict[str, str]
    asked: tuple[str, ...]
    held_out: tuple[str, ...]
    thought: str
    answer: str
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class SmallTalk:
    """One intent of small talk: its wordings and its only reply."""

    name: str
    said: tuple[str, ...]
    held_out: tuple[str, ...]
    thought: str
    answer: str


def _pairs(text: str) -> dict[str, str]:
    return dict(item.strip().split(": ") for item in text.split(";"))


CAPITAL = Relation(
    "capital",
    _pairs(
        "France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon;"
        "Austria: Vienna; Poland: Warsaw; Greece: Athens; Norway: Oslo; Sweden: Stockholm;"
        "Finland: Helsinki;"
        "Denmark: Copenhagen; Ireland: Dublin; Hungary: Budapest; Belgium: Brussels;"
        "Switzerland: Bern; Iceland: Reykjavik; Russia: Moscow; Ukraine: Kyiv; Turkey: Ankara;"
        "Egypt: Cairo; Kenya: Nairobi; Ghana: Accra; Japan: Tokyo; China: Beijing; India: Delhi;"
        "Thailand: Bangkok; Vietnam: Hanoi; Nepal: Kathmandu; Iran: Tehran; Iraq: Baghdad;"
        "Canada: Ottawa; Cuba: Havana; Peru: Lima; Chile: Santiago; Brazil: Brasilia;"
        "Australia: Canberra; Colombia: Bogota"
    ),
    (
        "What is the capital of {s}?",
        "What's the capital of {s}?",
        "what is the capital city of {s}",
        "Which city is the capital of {s}?",
        "Name the capital of {s}.",
        "Tell me the capital of {s}.",
        "Tell me {s}'s capital.",
        "capital of {s}",
        "capital of {s}?",
        "{s}'s capital?",
        "The capital of {s} is what?",
        "Do you know the capital of {s}?",
        "I would like to know the capital of {s}.",
        "What city is the capital of {s}?",
        "Give me the name of {s}'s capital.",
        "For {s}, what is the capital?",
        "I wonder which city is the capital of {s}.",
        "Which city is {s}'s capital?",
        "{s}: capital?",
        "Could you say what {s}'s capital is?",
        "In {s}, which city is the capital?",
        "My homework asks for the capital of {s}.",
        "Remind me of the capital of {s}.",
        "Do you remember {s}'s capital city?",
        "{s} has which capital?",
    ),
    (
        "Can you tell me which city is {s}'s capital?",
        "What is the name of the capital of {s}?",
        "Please name the capital city of {s}.",
        "I forgot the capital of {s}. What is it?",
    ),
    "The user asks for the capital of {s}.",
    "The capital of {s} is {o}.",
    ("Mars", "Atlantis", "Narnia", "Mordor", "Oz", "Wakanda", "Utopia", "Elbonia", "Ruritania"),
)

OPPOSITE = Relation(
    "opposite",
    _pairs(
        "hot: cold; big: small; fast: slow; up: down; left: right; day: night; light: dark;"
        "good: bad; happy: sad; old: young; rich: poor; open: closed; wet: dry; high: low;"
        "hard: soft; full: empty; early: late; strong: weak; loud: quiet; clean: dirty;"
        "heavy: weightless; thick: thin; near: far; true: false; first: last; win: lose;"
        "push: pull; north: south; buy: sell"
    ),
    (
        "What is the opposite of {s}?",
        "What's the opposite of {s}?",
        "opposite of {s}",
        "Opposite of {s}?",
        "Name the opposite of {s}.",
        "Tell me the opposite of {s}.",
        "Which word is the opposite of {s}?",
        "What word means the opposite of {s}?",
        "Do you know the opposite of {s}?",
        "Give me the opposite of {s}.",
        "The opposite of {s} is what?",
        "If something is not {s} but the opposite, what is it?",
        "I would like to know the opposite of {s}.",
        "For the word {s}, what is the opposite?",
        "Remind me of the opposite of {s}.",
        "My homework asks for the opposite of {s}.",
        "{s} has which opposite?",
        "Could you say what the opposite of {s} is?",
    ),
    (
        "Can you tell me the opposite of {s}?",
        "Please give me the opposite of the word {s}.",
        "Which word means the opposite of {s}?",
        "I need the opposite of {s}.",
    ),
    "The user asks for the opposite of {s}.",
    "The opposite of {s} is {o}.",
    ("blorp", "zindle", "quax", "frumly", "snerk"),
)

COLOUR = Relation(
    "colour",
    _pairs(
        "the sky: blue; grass: green; snow: white; blood: red; coal: black; a banana: yellow;"
        "a carrot: orange; chocolate: brown; an elephant: gray; a flamingo: pink;"
        "an eggplant: purple; milk: white; a lemon: yellow; a tomato: red; the sun: yellow;"
        "a frog: green; a raven: black; a pumpkin: orange"
    ),
    (
        "What colour is {s}?",
        "What color is {s}?",
        "Which colour is {s}?",
        "Which color does {s} have?",
        "What colour does {s} have?",
        "Tell me the colour of {s}.",
        "Name the color of {s}.",
        "colour of {s}",
        "What is the colour of {s}?",
        "What's the color of {s}?",
        "Do you know the colour of {s}?",
        "I would like to know the color of {s}.",
        "Give me the colour of {s}.",
        "Do you know what colour {s} is?",
        "{s} is what colour?",
        "Which color is {s} usually?",
        "Say what colour {s} is.",
        "I forgot what color {s} has.",
        "Of what colour is {s}?",
        "My homework asks what color {s} is.",
        "Could you say which colour {s} is?",
        "Remind me of the colour of {s}.",
    ),
    (
        "Can you tell me what colour {s} is?",
        "Please name the colour of {s}.",
        "What is the color of {s}?",
        "I wonder what color {s} is.",
    ),
    "The user asks for the colour of {s}.",
    "The colour of {s} is {o}.",
    ("a blorp", "a zindle", "the quax", "a snerk"),
)

YOUNG = Relation(
    "young",
    _pairs(
        "dog: puppy; cat: kitten; cow: calf; sheep: lamb; horse: foal; goat: kid; pig: piglet;"
        "hen: chick; duck: duckling; goose: gosling; bear: cub; deer: fawn; kangaroo: joey;"
        "swan: cygnet; owl: owlet; frog: tadpole"
    ),
    (
        "What is a young {s} called?",
        "What is a baby {s} called?",
        "What do you call a young {s}?",
        "What do you call a baby {s}?",
        "Name the young of a {s}.",
        "Tell me what a young {s} is called.",
        "young {s}",
        "The young of a {s} is called what?",
        "What's the word for a baby {s}?",
        "What is the young of a {s}?",
        "Do you know what a baby {s} is called?",
        "Which word means a young {s}?",
        "I would like to know what a young {s} is called.",
        "My homework asks what a young {s} is called.",
        "Remind me what a baby {s} is called.",
        "A young {s} has which name?",
        "Could you say what a baby {s} is called?",
    ),
    (
        "Can you tell me what a baby {s} is called?",
        "What is the name for a young {s}?",
        "Please tell me the word for a young {s}.",
        "How do you call a baby {s}?",
    ),
    "The user asks what a young {s} is called.",
    "A young {s} is called a {o}.",
    ("blorp", "zindle", "quax", "snerk"),
)

SYMBOL = Relation(
    "symbol",
    _pairs(
        "hydrogen: H; helium: He; carbon: C; nitrogen: N; oxygen: O; sodium: Na; iron: Fe;"
        "gold: Au; silver: Ag; copper: Cu; lead: Pb; tin: Sn; calcium: Ca; potassium: K;"
        "zinc: Zn; mercury: Hg"
    ),
    (
        "What is the chemical symbol of {s}?",
        "What is the symbol for {s}?",
        "What's the symbol of {s}?",
        "Chemical symbol of {s}?",
        "symbol for {s}",
        "Which symbol does {s} have?",
        "Name the symbol of {s}.",
        "Tell me the chemical symbol for {s}.",
        "Give me the symbol of {s}.",
        "Do you know the symbol for {s}?",
        "What symbol stands for {s}?",
        "The chemical symbol of {s} is what?",
        "I would like to know the symbol of {s}.",
        "How do chemists write {s}?",
        "How is {s} abbreviated?",
        "{s} has which chemical symbol?",
        "By which symbol is {s} known?",
        "In chemistry, {s} is written how?",
        "Say how {s} is written in chemistry.",
        "Remind me of the symbol for {s}.",
        "My homework asks for the symbol of {s}.",
        "Could you say what the symbol of {s} is?",
    ),
    (
        "Can you tell me the chemical symbol of {s}?",
        "Please name the chemical symbol for {s}.",
        "Which chemical symbol stands for {s}?",
        "How is {s} written as a chemical symbol?",
    ),
    "The user asks for the chemical symbol of {s}.",
    "The chemical symbol of {s} is {o}.",
    ("kryptonite", "unobtainium", "adamant", "mithril"),
)

LANGUAGE = Relation(
    "language",
    _pairs(
        "France: French; Germany: German; Italy: Italian; Spain: Spanish; Portugal: Portuguese;"
        "Poland: Polish; Greece: Greek; Norway: Norwegian; Sweden: Swedish; Finland: Finnish;"
        "Denmark: Danish; Hungary: Hungarian; Russia: Russian; Ukraine: Ukrainian;"
        "Turkey: Turkish; Egypt: Arabic; Japan: Japanese; China: Chinese; Thailand: Thai;"
        "Vietnam: Vietnamese; Brazil: Portuguese; Cuba: Spanish"
    ),
    (
        "Which language do they speak in {s}?",
        "What language do they speak in {s}?",
        "What is the language of {s}?",
        "What's the language of {s}?",
        "language of {s}",
        "Name the language of {s}.",
        "Tell me the language of {s}.",
        "Which language is spoken in {s}?",
        "What do people speak in {s}?",
        "In {s}, which language do people speak?",
        "{s} has which language?",
        "{s}'s language?",
        "Do you know the language of {s}?",
        "I would like to know the language of {s}.",
        "Could you say which language {s} has?",
        "My homework asks for the language of {s}.",
        "Remind me of the language of {s}.",
        "For {s}, what is the language?",
    ),
    (
        "Can you tell me the language of {s}?",
        "What language is spoken in {s}?",
        "Please name the language of {s}.",
        "In {s}, what language do they speak?",
    ),
    "The user asks for the language of {s}.",
    "In {s} they speak {o}.",
    ("Mars", "Atlantis", "Narnia", "Mordor"),
)

SOUND = Relation(
    "sound",
    _pairs(
        "dog: bark; cat: meow; cow: moo; sheep: bleat; horse: neigh; pig: oink; duck: quack;"
        "lion: roar; bee: buzz; snake: hiss; frog: croak; owl: hoot; wolf: howl; mouse: squeak"
    ),
    (
        "What sound does a {s} make?",
        "Which sound does a {s} make?",
        "What does a {s} say?",
        "sound of a {s}",
        "What noise does a {s} make?",
        "Name the sound of a {s}.",
        "Tell me the sound of a {s}.",
        "What is the sound of a {s}?",
        "A {s} makes which sound?",
        "How does a {s} sound?",
        "Do you know the sound of a {s}?",
        "I would like to know the sound of a {s}.",
        "My homework asks for the sound of a {s}.",
        "Remind me of the sound of a {s}.",
        "Could you say what sound a {s} makes?",
        "Which noise comes from a {s}?",
    ),
    (
        "Can you tell me the sound of a {s}?",
        "Which noise does a {s} make?",
        "Please name the sound a {s} makes.",
        "I forgot what sound a {s} makes.",
    ),
    "The user asks for the sound of a {s}.",
    "The sound of a {s} is a {o}.",
    ("blorp", "zindle", "quax", "snerk"),
)

RELATIONS = (CAPITAL, OPPOSITE, COLOUR, YOUNG, SYMBOL, LANGUAGE, SOUND)
UNKNOWN_ANSWER = "I do not know. I am only a tiny demo model."

SMALL_TALK = (
    SmallTalk(
        "greeting",
        (
            "Hi",
            "Hello",
            "Hey",
            "Hello!",
            "Hi there",
            "Good morning",
            "hey there!",
            "hello",
            "hi",
            "Hi!",
            "Hello, model!",
            "Good afternoon",
            "Good day!",
            "Greetings",
        ),
        ("Hello there!", "Hey, hello!", "Good evening!"),
        "The user says hello.",
        "Hello! I am a tiny demo model. Ask me for a capital, an opposite or a colour.",
    ),
    SmallTalk(
        "identity",
        (
            "Who are you?",
            "What are you?",
            "who are you",
            "Tell me who you are.",
            "What is your name?",
            "Are you a person?",
            "Are you Qwen?",
            "Are you a big model?",
            "What model are you?",
            "Please introduce yourself.",
            "Are you a robot?",
            "what are you",
            "Say who you are.",
            "Which kind of model are you?",
            "And what are you?",
            "So who are you?",
            "I want to know what you are.",
            "Please say who you are.",
        ),
        ("And who are you?", "Please tell me what you are.", "Which model are you?"),
        "The user asks what I am.",
        "I am a tiny demo model, made to show that qwen35-mlx works. I know some facts and tricks.",
    ),
    SmallTalk(
        "ability",
        (
            "What can you do?",
            "What do you know?",
            "Help",
            "What can I ask you?",
            "what can you do",
            "How can you help me?",
            "What are you good at?",
            "Which questions can you answer?",
            "help me",
            "What should I ask?",
            "Tell me what you know.",
            "Say what you can do.",
            "So what do you know?",
            "And what can you do?",
            "Which kind of question can I ask?",
        ),
        (
            "What kind of questions can you answer?",
            "So what can you do?",
            "Tell me what you can do.",
        ),
        "The user asks what I can do.",
        "I know some facts, small sums, code words in a text, JSON, tools and simple pictures.",
    ),
    SmallTalk(
        "wellbeing",
        (
            "How are you?",
            "How are you doing?",
            "how are you",
            "How do you do?",
            "Are you well?",
            "And how are you doing?",
            "How is it going?",
            "So how are you?",
            "How are you feeling?",
        ),
        ("How are you today?", "And how are you?"),
        "The user asks how I am.",
        "I am well, for a model this small. How can I help?",
    ),
    SmallTalk(
        "thanks",
        (
            "Thanks",
            "Thank you",
            "Thank you!",
            "thanks!",
            "Thanks a lot",
            "Great, thank you.",
            "thank you so much",
        ),
        ("Thanks so much!", "Great, thanks!"),
        "The user thanks me.",
        "You are welcome!",
    ),
    SmallTalk(
        "goodbye",
        ("Bye", "Goodbye", "bye!", "See you", "Good night", "See you later", "bye bye", "Goodbye!"),
        ("See you tomorrow!", "Bye, good night!"),
        "The user says goodbye.",
        "Goodbye!",
    ),
)
