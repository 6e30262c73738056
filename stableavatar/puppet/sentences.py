"""Small grammars of seven languages (English in two accents): endless short sentences, with words for training and words kept apart.

Of every list the last quarter is held out: no sentence of training has such a word and no held-out sentence has another.
Names and numbers are split in the same way, so that the two kinds of sentences have in common only articles and prepositions, what
the patterns bring, and the parts of numbers ("hundred").
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

__all__ = ["GRAMMARS", "Grammar", "draw_nonsense", "draw_sentence", "draw_verse"]

HELD_OUT_PART = 4
ROLES = ("subjects", "verbs", "objects", "places")
NAME_SYLLABLES = "ba be bi bo bu da di do fa fe fi fo ga go ka ki ko la le li lo lu ma me mi mo mu na ne ni no pa pe pi po ra ri ro sa "
NAME_SYLLABLES += "se si so ta te ti to tu va ve vi wa wi za zo sha shi"


@dataclass(frozen=True)
class Grammar:
    """Word lists of one language, separated by "|"; verbs are in the third person, objects and places bring their articles.

    Attributes:
        voice: the language's name in espeak-ng.
        patterns: sentences with {s} subject, {v} verb, {o} object, {p} place; {x} is a name, {n} a number.
    """

    voice: str
    subjects: str
    verbs: str
    objects: str
    places: str
    patterns: str

    def words(self, role: str, held_out: bool) -> list[str]:
        """The entries of one of ROLES for training, or the held-out ones."""
        every = getattr(self, role).split("|")
        train = len(every) - len(every) // HELD_OUT_PART
        return every[train:] if held_out else every[:train]

    def vocabulary(self, held_out: bool) -> set[str]:
        """The single words of all entries for training, or of the held-out ones, which may share articles."""
        return {word for role in ROLES for entry in self.words(role, held_out) for word in entry.split()}


ENGLISH = (
    "my mother|the doctor|a young woman|our teacher|the old fisherman|your brother|the blue bird|the farmer|this boy|"
    "the pilot|her cousin|a hungry wolf",
    "sees|brings|buys|paints|wants|loves|follows|carries|found|washes|remembers|throws",
    "the big apple|a warm coat|two books|the yellow flowers|a piece of bread|some music|the open window|fresh milk|a paper boat|"
    "the piano|seven keys|a golden watch",
    "in the garden|on the bridge|every morning|at the market|near the river|before dinner|after work|by the sea|in July|"
    "behind the church|on Thursday|under the moon",
    "{s} {v} {o} {p}.|{p}, {s} {v} {o}.|{s} {v} {o}.|{x} {v} {o}!|The number is {n}, and {s} {v} {o}.|{s} {v} {n} apples {p}?",
)
GRAMMARS: tuple[Grammar, ...] = (
    Grammar("en-us", *ENGLISH),
    Grammar("en", *ENGLISH),
    Grammar(
        "de",
        "meine Mutter|der Arzt|eine junge Frau|unser Lehrer|der alte Fischer|dein Bruder|der blaue Vogel|das Kind|die Katze|"
        "der Pilot|ihre Tante|ein Wolf",
        "sieht|bringt|kauft|malt|sucht|liebt|findet|trägt|möchte|wäscht|zeigt|holt",
        "den großen Apfel|einen warmen Mantel|zwei Bücher|die gelben Blumen|ein Stück Brot|schöne Musik|das Fenster|frische Milch|"
        "ein Boot|das Klavier|sieben Schlüssel|eine goldene Uhr",
        "im Garten|auf der Brücke|jeden Morgen|am Markt|bei dem Fluss|vor dem Essen|nach der Arbeit|am Meer|im Juli|"
        "hinter der Kirche|am Donnerstag|unter dem Mond",
        "{s} {v} {o} {p}.|{p} {v} {s} {o}.|{s} {v} {o}.|{x} {v} {o}!|Die Nummer ist {n}, und {s} {v} {o}.|{s} {v} {p} {n} Äpfel.",
    ),
    Grammar(
        "fr",
        "ma mère|le docteur|une jeune femme|notre maître|le vieux pêcheur|ton frère|l'oiseau bleu|l'enfant|le chat|"
        "le pilote|sa cousine|un loup",
        "voit|apporte|achète|peint|cherche|aime|trouve|porte|demande|lave|montre|jette",
        "la grosse pomme|un manteau chaud|deux livres|les fleurs jaunes|un morceau de pain|de la musique|la fenêtre|du lait frais|"
        "un bateau|le piano|sept clés|une montre en or",
        "dans le jardin|sur le pont|chaque matin|au marché|près du fleuve|avant le repas|après le travail|au bord de la mer|en juillet|"
        "derrière l'église|jeudi soir|sous la lune",
        "{s} {v} {o} {p}.|{p}, {s} {v} {o}.|{s} {v} {o}.|{x} {v} {o}!|Le numéro est {n}, et {s} {v} {o}.|{s} {v} {n} pommes {p}.",
    ),
    Grammar(
        "es",
        "mi madre|el médico|una mujer joven|nuestro maestro|el viejo pescador|tu hermano|el pájaro azul|el niño|la gata|"
        "el piloto|su prima|un lobo",
        "mira|trae|compra|pinta|busca|quiere|encuentra|lleva|pide|lava|muestra|recoge",
        "la manzana grande|un abrigo|dos libros|las flores amarillas|un pedazo de pan|buena música|la ventana|leche fresca|un barco|"
        "el piano|siete llaves|un reloj de oro",
        "en el jardín|sobre el puente|cada mañana|en el mercado|cerca del río|antes de comer|después del trabajo|junto al mar|en julio|"
        "detrás de la iglesia|el jueves|bajo la luna",
        "{s} {v} {o} {p}.|{p}, {s} {v} {o}.|¿{s} {v} {o}?|{x} {v} {o}.|El número es {n}, y {s} {v} {o}.|{s} {v} {n} manzanas {p}.",
    ),
    Grammar(
        "it",
        "mia madre|il medico|una giovane donna|il nostro maestro|il vecchio pescatore|tuo fratello|il passero|il bambino|la gatta|"
        "il pilota|sua cugina|un lupo",
        "vede|porta|compra|dipinge|cerca|ama|trova|prende|chiede|lava|mostra|getta",
        "la mela grande|un cappotto|due libri|i fiori gialli|un pezzo di pane|bella musica|la finestra|latte fresco|una barca|"
        "il pianoforte|sette chiavi|un orologio d'oro",
        "nel giardino|sul ponte|ogni mattina|al mercato|vicino al fiume|prima di cena|dopo il lavoro|in riva al mare|a luglio|"
        "dietro la chiesa|giovedì|sotto la luna",
        "{s} {v} {o} {p}.|{p}, {s} {v} {o}.|{s} {v} {o}?|{x} {v} {o}.|Il numero è {n}, e {s} {v} {o}.|{s} {v} {n} mele {p}.",
    ),
    Grammar(
        "nl",
        "mijn moeder|de dokter|een jonge vrouw|onze leraar|de oude visser|jouw broer|de blauwe vogel|het kind|de kat|"
        "de piloot|haar nicht|een wolf",
        "ziet|brengt|koopt|schildert|zoekt|houdt|vindt|draagt|vraagt|wast|toont|gooit",
        "de grote appel|een warme jas|twee boeken|de gele bloemen|een stuk brood|mooie muziek|het raam|verse melk|een boot|"
        "de piano|zeven sleutels|een gouden horloge",
        "in de tuin|op de brug|elke morgen|op de markt|bij de rivier|voor het eten|na het werk|aan zee|in juli|"
        "achter de kerk|op donderdag|onder de maan",
        "{s} {v} {o} {p}.|{p} {v} {s} {o}.|{s} {v} {o}.|{x} {v} {o}!|Het nummer is {n}, en {s} {v} {o}.|{s} {v} {p} {n} appels.",
    ),
    Grammar(
        "pl",
        "moja matka|nasz lekarz|młoda kobieta|dobry nauczyciel|stary rybak|twój brat|niebieski ptak|małe dziecko|czarny kot|"
        "pilot|jej kuzynka|głodny wilk",
        "widzi|przynosi|kupuje|maluje|bierze|lubi|znajduje|niesie|prosi o|myje|pokazuje|rzuca",
        "duże jabłko|ciepły płaszcz|dwie książki|żółte kwiaty|kawałek chleba|piękne obrazy|otwarte okno|świeże mleko|papierowy statek|"
        "pianino|siedem kluczy|złoty zegarek",
        "w ogrodzie|na moście|każdego ranka|na rynku|blisko rzeki|przed obiadem|po pracy|nad morzem|w lipcu|"
        "za kościołem|w czwartek|pod księżycem",
        "{s} {v} {o} {p}.|{p} {s} {v} {o}.|{s} {v} {o}?|{x} {v} {o}.|Numer to {n}, a {s} {v} {o}.|{n}, {s} {v} {o}.",
    ),
)


def draw_sentence(rng: np.random.Generator, grammar: Grammar, held_out: bool = False) -> str:
    """One sentence of the grammar; held-out sentences share no word of its lists with the others."""
    slots = {key: str(rng.choice(grammar.words(role, held_out))) for key, role in zip("svop", ROLES)}
    slots |= {"n": str(_draw_number(rng, held_out)), "x": _draw_name(rng, held_out)}
    sentence = str(rng.choice(grammar.patterns.split("|"))).format(**slots)
    start = next(index for index, letter in enumerate(sentence) if letter.isalnum())
    return sentence[:start] + sentence[start].upper() + sentence[start + 1 :]


def draw_verse(rng: np.random.Generator, grammar: Grammar, held_out: bool = False) -> str:
    """A line to sing: words of the grammar, without numbers and punctuation."""
    return " ".join(str(rng.choice(grammar.words(role, held_out))) for role in ROLES)


def draw_nonsense(rng: np.random.Generator, grammar: Grammar) -> str:
    """Words that no language has, of pieces of the grammar's training words: what hears them learns sounds, not a vocabulary."""
    words, held_out = sorted(grammar.vocabulary(False)), grammar.vocabulary(True)
    invented: list[str] = []
    while len(invented) < 5:
        pieces = [str(rng.choice(words)) for _ in range(rng.integers(1, 4))]
        starts = [int(rng.integers(max(1, len(piece) - 1))) for piece in pieces]
        word = "".join(piece[start : start + int(rng.integers(2, 5))] for piece, start in zip(pieces, starts))
        if word not in held_out:
            invented.append(word)
    return " ".join(invented)


def _draw_number(rng: np.random.Generator, held_out: bool) -> int:
    """1 to 995; the multiples of five are held out."""
    return 5 * int(rng.integers(1, 200)) - (0 if held_out else int(rng.integers(1, 5)))


def _draw_name(rng: np.random.Generator, held_out: bool) -> str:
    """A name without meaning, as Bamilo: any sound may meet any other. One in four, by its checksum, is held out."""
    while True:
        name = "".join(rng.choice(NAME_SYLLABLES.split(), size=int(rng.integers(2, 5)))).capitalize()
        if (crc32(name.encode()) % HELD_OUT_PART == 0) == held_out:
            return name
