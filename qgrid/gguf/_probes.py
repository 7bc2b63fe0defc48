"""Strings that two tokenizers are compared on, and prose that two models are compared on."""

# ruff: noqa: RUF001  (look-alike characters are what tokenizers are probed with)

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

_SEED = 20_011
_COUNT_MIXED, _COUNT_CHARACTERS, _COUNT_SPECIAL = 800, 250, 120
_BIDI = "\u202babc\u202c \u200fשלום\u200e"

FIXED = (
    *(" " * n for n in range(1, 18)),
    *("\n" * n for n in range(1, 6)),
    *("\t" * n for n in range(1, 5)),
    *(" " * n + "x" for n in range(1, 9)),
    *("x" + " " * n for n in range(1, 5)),
    *("x" + " " * n + "y" for n in range(2, 9)),
    *("7" * n for n in range(1, 14)),
    " \n",
    "\n ",
    " \n \n  \n",
    "\r\n",
    "\r\n\r\n \r x",
    "\t \t x \t",
    "a\n\nb\n \n  c\n\t\nd   \n",
    "\u00a0x\u00a0\u00a0y",
    "\u2003em\u2003space\u3000wide\u2028line\u2029paragraph\u0085next",
    "zero\u200bwidth\u200djoiner\ufeffmark",
    "\u0000",
    "a\u0000b",
    "\u0001\u0002\u0007\u0008\u000b\u000c\u001b[31mred\u001b[0m\u007f",
    "\u0080\u0085\u009f",
    "I'm you're he'll she'd we've it's don't",
    "I'M YOU'RE HE'LL SHE'D WE'VE IT'S DON'T",
    "'s 't 're 've 'm 'll 'd 'S 'LL ''s x'ss '1",
    "I’m you’re “quoted” ‘single’ — dash – dash … dots",
    "3.14159 -2.5e-10 1,000,000 0x1F 1_000 50% $3.50 №5 ½ ² Ⅷ ٣٤ ९",
    "3 33 333 3333 33333 333333 3333333 3.3 3..3 3...3",
    "2024-11-05T12:34:56.789Z +49 (0)30 123-456",
    "def f(x):\n    return x ** 2  # note\n\n\nclass A(B):\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; } // sum",
    '{"name": "f", "arguments": {"x": -1.5e3, "y": [1, 2, null]}}\n',
    "<html><body class='a'>&amp; &lt;</body></html>",
    "SELECT * FROM t WHERE a != 'b' AND c <> 3;",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\x\\y",
    "!!! ??? ... --- === *** ((( ]]] }}} ~~~ ``` ### @@@ &&& |||",
    "a.b,c;d:e!f?g/h\\i|j-k_l+m=n",
    "......!!!!!!?????? ''''''```````\"\"\"\"",
    "CamelCaseWordsAndHTTPServer iPhone McDonald eBay ÀÉÎ éÀ ÀéÎ ǅ ß ẞ",
    "naïve Zürich façade Ångström œuvre Łódź İstanbul ıI",
    "e\u0301 o\u0308\u0323 a\u030a\u0301 x\u0336y\u0336 \u0301start",
    "\u1e0b\u0323 \u0064\u0323\u0307 \u212b \u2126 ﬁ ﬀ ½ ①",
    "東京は日本の首都です。人口は約1400万人。",
    "我想在apple工作1314151天～",
    "한국어 문장입니다 \u1112\u1161\u11ab",
    "Привет, мир! Съешь ещё этих мягких французских булок.",
    "Γειά σου Κόσμε ὀξύς",
    "שלום עולם שָׁלוֹם",
    "مرحبا بالعالم ٱلسَّلَامُ",
    _BIDI,
    "नमस्ते दुनिया क्षत्रिय",
    "สวัสดีชาวโลก ภาษาไทย",
    "វាពិសេស កាន់តែអាច😁",
    "தமிழ் తెలుగు ಕನ್ನಡ മലയാളം বাংলা ગુજરાતી",
    "🙂 😀😃 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 ❤️ ☺ ✅ 🚀",
    "😶\u200d🌫️ 🦙🦙 x🙂y",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀 𠜎",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ ± ∞ ≠ √2 → ⇒",
    "§ ¶ † • ° © ® ™ ¿qué? ¡sí! « guillemets » „tief“",
    "<0x0A> <0xFF> <s> </s> <unk> [INST] [/INST] <<SYS>>",
    "<|endoftext|> <|im_start|>user <|end|><|user|> <|begin_of_text|>",
    "<|im_end|>\n",
    "▁underline ▁▁two Ġbytes Ċ",
)
_FRAGMENTS = (
    "the",
    "The",
    "THE",
    "quick",
    "brownFox",
    "don't",
    "I'LL",
    "naïve",
    "Straße",
    "e\u0301te\u0301",
    "東京",
    "です",
    "한국",
    "Привет",
    "мир",
    "שלום",
    "مرحبا",
    "नमस्ते",
    "สวัสดี",
    "🙂",
    "👩‍👧",
    "1",
    "42",
    "2024",
    "1234567",
    "3.14",
    "½",
    "x_1",
    "foo()",
    "a[i]",
    "{",
    "}",
    "==",
    "->",
    "//",
    "#",
    ",",
    ".",
    "...",
    "!?",
    "'",
    '"',
    "\u00a0",
    "\u200b",
    "\u0007",
    "%20",
    "@user",
    "$",
    "€",
)
_GAPS = ("", "", " ", " ", " ", "  ", "   ", "\n", "\n\n", " \n", "\t", "\r\n", "    ")

PROSE = (
    "The harbour was quiet in the early morning, and only two boats had come in before the fog "
    "lifted. A woman in a yellow coat counted the boxes twice, wrote 27 into her book, and asked "
    "the driver whether the road to the old mill was open again. He said that it had been closed "
    "since Tuesday, when the river rose by almost a metre and carried the small bridge away.\n\n"
    "Question: a train leaves at 9:15 and arrives at 11:40. How long does it travel?\n"
    "Answer: 2 hours and 25 minutes.\n\n"
    "def mean(values):\n    if not values:\n        return 0.0\n"
    "    return sum(values) / len(values)\n\n"
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}\n\n'
    "Bread needs four things: flour, water, salt and time. Mix 500 g of flour with 350 g of water, "
    "wait half an hour, add 10 g of salt, fold the dough every forty minutes, and let it rest in "
    "a cool place until the next day. Bake it in a hot pot with the lid on for thirty minutes; "
    "then take the lid off and wait until the crust is as dark as you like it.\n"
)


def strings(special: Sequence[str]) -> tuple[str, ...]:
    """More than 1,000 strings, the same on every machine, none with a special token inside."""
    chance = random.Random(_SEED)
    mixed = [_mixed(chance, _FRAGMENTS) for _ in range(_COUNT_MIXED)]
    characters = _known_characters()
    single = ["".join(chance.choices(characters, k=k % 7 + 1)) for k in range(_COUNT_CHARACTERS)]
    every = dict.fromkeys(("", *FIXED, *mixed, *single, PROSE))
    return tuple(text for text in every if not any(token in text for token in special))


def strings_with(special: Sequence[str]) -> tuple[str, ...]:
    """Strings with special tokens at the start, between and at the end."""
    if not special:
        return ()
    chance = random.Random(_SEED + 1)
    alone = [token + tail for token in special[:16] for tail in ("", "x", " x", "\n", token)]
    pool = [*_FRAGMENTS, *list(special[:16]) * 3]
    mixed = [_mixed(chance, pool) + chance.choice(special) for _ in range(_COUNT_SPECIAL)]
    return tuple(dict.fromkeys((*alone, *mixed)))


def _mixed(chance: random.Random, pool: Sequence[str]) -> str:
    count = chance.randint(2, 12)
    return "".join(chance.choice(pool) + chance.choice(_GAPS) for _ in range(count))


def _known_characters() -> list[str]:
    """Assigned characters of Unicode 3.2: both tokenizers' tables have them, in any version."""
    tables = unicodedata.ucd_3_2_0
    points = (*range(0x20, 0x3400, 3), *range(0x4E00, 0x9FA5, 97), *range(0xAC00, 0xD7A4, 131))
    marks = (*range(0xFB00, 0xFFE6), *range(0x10300, 0x1D7FF, 11))
    names = [chr(point) for point in (*points, *marks)]
    return [name for name in names if tables.category(name) not in {"Cn", "Cs", "Co"}]
