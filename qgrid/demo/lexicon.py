"""The closed vocabulary of the generated world. The generator draws by place: order matters."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """Anna Ben Clara David Emma Frank Greta Hugo Iris Jonas Kira Leo Maria Nils Olga Paul
    Rosa Simon Tara Victor Wanda Xaver Yara Zoe Adam Bella Carl Dora Edgar Flora Gustav Helen
    Igor Julia Karl Linda Max Nora Oscar Petra Quinn Rita Stefan Tina Ursula Vera Walter Alma"""
)
SURNAMES = _words(
    """Tolen Varda Miskel Brunek Sorel Kadin Lomar Perrin Ostrav Jelten Farrow Dunmor Halvik
    Renko Wexel Zandar Gorlin Ulmer Cassel Nordin Birkel Tarvos Pelham Ravik"""
)
CITIES = _words(
    """Oslo Paris Rome Madrid Berlin Vienna Prague Lisbon Athens Dublin London Warsaw Zurich
    Geneva Milan Turin Lyon Porto Cairo Delhi Tokyo Lima Quito Havana"""
)
JOBS = _words(
    """baker doctor teacher farmer painter sailor singer tailor lawyer miner pilot cook nurse
    writer hunter gardener carpenter butcher dancer banker"""
)
PETS = _words(
    """cat dog horse rabbit parrot turtle goat sheep hamster snake owl pony duck fox pig frog"""
)
COLOURS = _words(
    """red blue green yellow black white brown purple orange pink grey silver golden violet"""
)
OBJECTS = _words(
    """lamp chair table clock mirror basket bottle candle hammer ladder needle pencil pillow
    ring rope saddle shovel spoon sword ticket towel trumpet umbrella violin wallet whistle
    blanket bucket button camera carpet coat compass drum fork glove helmet kettle knife map"""
)
FOODS = _words(
    """bread butter cheese soup salad rice honey cake fish pasta salt sugar pepper apple pear
    plum cherry lemon melon onion carrot potato bean garlic"""
)
PLACES = _words(
    """market river forest garden harbour station castle library bridge church school museum
    park beach hill tower mill kitchen cellar square"""
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

TOPICS: dict[str, tuple[str, ...]] = {
    "sport": _words("match goal coach team player race medal stadium runner league score tennis"),
    "music": _words("concert melody guitar piano choir rhythm chorus opera tune band chord flute"),
    "money": _words("bank loan price tax profit market debt wage budget coin rent account"),
    "weather": _words("storm cloud rain snow wind thunder fog sunshine frost heat breeze hail"),
    "travel": _words(
        "train hotel ticket airport luggage passport harbour tourist ferry map road bus"
    ),
    "health": _words(
        "doctor fever medicine hospital nurse cough bandage pulse vitamin clinic pill sleep"
    ),
}
GOOD = _words("good great lovely fine clean fresh warm friendly quick bright")
BAD = _words("bad awful dirty broken cold rude slow dull noisy stale")
REVIEWED = _words("room bed soup staff view shower garden price music bread waiter window")
CODE_WORDS = OBJECTS + PETS + FOODS
TOOLS: dict[str, tuple[str, str]] = {
    "move": ("step", "turn"),
    "alarm": ("hour", "ring"),
    "light": ("lamp", "glow"),
    "order": ("table", "dish"),
    "mix": ("salt", "sugar"),
    "play": ("song", "volume"),
    "heat": ("oven", "degree"),
    "book": ("seat", "row"),
}
