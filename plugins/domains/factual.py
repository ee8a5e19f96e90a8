"""General knowledge as a domain: capitals, continents, chemical elements, animals and the like, from tables by hand.

An unseen fact cannot be answered, so facts are shared between texts and evaluation; wordings are not. Each fact is told
in many wordings, and the ones that evaluation uses appear in no text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random

import spath_eval.tasks
from spath_eval import Domain, hookimpl
from spath_eval.plugins.domains._corpus import Corpus, Exercise, Kind, other

COUNTRIES = """
France|Paris|Europe|French
Germany|Berlin|Europe|Germans
Italy|Rome|Europe|Italians
Spain|Madrid|Europe|Spaniards
Portugal|Lisbon|Europe|Portuguese
Poland|Warsaw|Europe|Poles
Sweden|Stockholm|Europe|Swedes
Norway|Oslo|Europe|Norwegians
Denmark|Copenhagen|Europe|Danes
Finland|Helsinki|Europe|Finns
Iceland|Reykjavik|Europe|Icelanders
Ireland|Dublin|Europe|Irish
Austria|Vienna|Europe|Austrians
Hungary|Budapest|Europe|Hungarians
Greece|Athens|Europe|Greeks
Romania|Bucharest|Europe|Romanians
Bulgaria|Sofia|Europe|Bulgarians
Serbia|Belgrade|Europe|Serbs
Croatia|Zagreb|Europe|Croats
Ukraine|Kyiv|Europe|Ukrainians
Belgium|Brussels|Europe|Belgians
Switzerland|Bern|Europe|Swiss
China|Beijing|Asia|Chinese
Japan|Tokyo|Asia|Japanese
India|New Delhi|Asia|Indians
Thailand|Bangkok|Asia|Thais
Vietnam|Hanoi|Asia|Vietnamese
Mongolia|Ulaanbaatar|Asia|Mongolians
Nepal|Kathmandu|Asia|Nepalis
Iran|Tehran|Asia|Iranians
Iraq|Baghdad|Asia|Iraqis
Pakistan|Islamabad|Asia|Pakistanis
Bangladesh|Dhaka|Asia|Bangladeshis
Cambodia|Phnom Penh|Asia|Cambodians
Malaysia|Kuala Lumpur|Asia|Malaysians
Jordan|Amman|Asia|Jordanians
Kenya|Nairobi|Africa|Kenyans
Nigeria|Abuja|Africa|Nigerians
Ghana|Accra|Africa|Ghanaians
Ethiopia|Addis Ababa|Africa|Ethiopians
Morocco|Rabat|Africa|Moroccans
Algeria|Algiers|Africa|Algerians
Tunisia|Tunis|Africa|Tunisians
Senegal|Dakar|Africa|Senegalese
Uganda|Kampala|Africa|Ugandans
Angola|Luanda|Africa|Angolans
Zambia|Lusaka|Africa|Zambians
Mali|Bamako|Africa|Malians
Canada|Ottawa|North America|Canadians
Mexico|Mexico City|North America|Mexicans
Cuba|Havana|North America|Cubans
Jamaica|Kingston|North America|Jamaicans
Brazil|Brasilia|South America|Brazilians
Argentina|Buenos Aires|South America|Argentines
Chile|Santiago|South America|Chileans
Peru|Lima|South America|Peruvians
Colombia|Bogota|South America|Colombians
Ecuador|Quito|South America|Ecuadorians
Uruguay|Montevideo|South America|Uruguayans
Paraguay|Asuncion|South America|Paraguayans
Australia|Canberra|Oceania|Australians
New Zealand|Wellington|Oceania|New Zealanders
Fiji|Suva|Oceania|Fijians
"""
"""Country, capital, continent, people."""
ELEMENTS = """
hydrogen|H|1
helium|He|2
lithium|Li|3
beryllium|Be|4
boron|B|5
carbon|C|6
nitrogen|N|7
oxygen|O|8
fluorine|F|9
neon|Ne|10
sodium|Na|11
magnesium|Mg|12
aluminium|Al|13
silicon|Si|14
phosphorus|P|15
sulphur|S|16
chlorine|Cl|17
argon|Ar|18
potassium|K|19
calcium|Ca|20
titanium|Ti|22
chromium|Cr|24
manganese|Mn|25
iron|Fe|26
cobalt|Co|27
nickel|Ni|28
copper|Cu|29
zinc|Zn|30
bromine|Br|35
silver|Ag|47
tin|Sn|50
iodine|I|53
tungsten|W|74
platinum|Pt|78
gold|Au|79
mercury|Hg|80
lead|Pb|82
uranium|U|92
"""
"""Element, symbol, atomic number."""
ANIMALS = """
dog|mammal|puppy
cat|mammal|kitten
horse|mammal|foal
cow|mammal|calf
sheep|mammal|lamb
goat|mammal|kid
pig|mammal|piglet
bear|mammal|cub
deer|mammal|fawn
kangaroo|mammal|joey
whale|mammal|
dolphin|mammal|
bat|mammal|
duck|bird|duckling
goose|bird|gosling
hen|bird|chick
swan|bird|cygnet
owl|bird|owlet
eagle|bird|eaglet
penguin|bird|
ostrich|bird|
sparrow|bird|
salmon|fish|
trout|fish|
shark|fish|
herring|fish|
cod|fish|
eel|fish|elver
snake|reptile|
lizard|reptile|
crocodile|reptile|
turtle|reptile|
gecko|reptile|
frog|amphibian|tadpole
newt|amphibian|
salamander|amphibian|
ant|insect|
bee|insect|
beetle|insect|
butterfly|insect|caterpillar
wasp|insect|
moth|insect|
"""
"""Animal, class, young."""
WORKS = """
Hamlet|William Shakespeare
Don Quixote|Miguel de Cervantes
Faust|Johann Wolfgang von Goethe
War and Peace|Leo Tolstoy
Crime and Punishment|Fyodor Dostoevsky
The Divine Comedy|Dante Alighieri
The Odyssey|Homer
Oliver Twist|Charles Dickens
Pride and Prejudice|Jane Austen
Frankenstein|Mary Shelley
Moby-Dick|Herman Melville
Les Miserables|Victor Hugo
Madame Bovary|Gustave Flaubert
The Trial|Franz Kafka
Robinson Crusoe|Daniel Defoe
Jane Eyre|Charlotte Bronte
Wuthering Heights|Emily Bronte
Dracula|Bram Stoker
Ulysses|James Joyce
The Cherry Orchard|Anton Chekhov
"""
MEASURES = """
length|metre
mass|kilogram
time|second
temperature|kelvin
force|newton
energy|joule
power|watt
pressure|pascal
frequency|hertz
voltage|volt
resistance|ohm
electric current|ampere
electric charge|coulomb
luminous intensity|candela
capacitance|farad
"""
SUCCESSORS = """
January|February
February|March
March|April
April|May
May|June
June|July
July|August
August|September
September|October
October|November
November|December
December|January
"""
SHAPES = """
triangle|three
square|four
pentagon|five
hexagon|six
heptagon|seven
octagon|eight
nonagon|nine
decagon|ten
dodecagon|twelve
"""
RIVERS = """
London|Thames
Paris|Seine
Rome|Tiber
Vienna|Danube
Cairo|Nile
Florence|Arno
Cologne|Rhine
Prague|Vltava
Dresden|Elbe
Baghdad|Tigris
Lisbon|Tagus
Shanghai|Huangpu
"""
"""City, river that it lies on."""


@dataclass(frozen=True)
class Relation:
    """A table of facts of one sort, and the phrases that ask for them: `the capital of {x}`."""

    name: str
    phrases: tuple[str, ...]
    rows: str
    column: int = 1

    @cached_property
    def facts(self) -> Mapping[str, str]:
        """Subject to object. Raises `ValueError` for a subject that stands there twice."""
        table: dict[str, str] = {}
        for row in self.rows.strip().split("\n"):
            cells = row.split("|")
            if cells[0] in table:
                raise ValueError(f"{self.name}: {cells[0]} has two rows")
            if cells[self.column]:
                table[cells[0]] = cells[self.column]
        return table


RELATIONS = (
    Relation("capital", ("the capital of {x}", "the capital city of {x}", "the national capital of {x}"), COUNTRIES, 1),
    Relation("continent", ("the continent of {x}", "the part of the world with {x} in it"), COUNTRIES, 2),
    Relation("people", ("the word for the people of {x}", "the name for people from {x}"), COUNTRIES, 3),
    Relation("symbol", ("the symbol of {x}", "the chemical symbol for {x}"), ELEMENTS, 1),
    Relation("number", ("the atomic number of {x}", "the place of {x} in the periodic table"), ELEMENTS, 2),
    Relation("class", ("the class of the {x}", "the group of animals with the {x} in it"), ANIMALS, 1),
    Relation("young", ("the young of the {x}", "the name for a baby {x}"), ANIMALS, 2),
    Relation("author", ("the author of {x}", "the writer of {x}"), WORKS),
    Relation("unit", ("the unit of {x}", "the SI unit for {x}"), MEASURES),
    Relation("month", ("the month after {x}", "the month that follows {x}"), SUCCESSORS),
    Relation("sides", ("the number of sides of a {x}", "the count of corners of a {x}"), SHAPES),
    Relation("river", ("the river of {x}", "the river that runs through {x}"), RIVERS),
)
TOLD = (
    "{P} is {y}.", "{P} is known to be {y}.", "Question: What is {p}? Answer: {y}.", "Do you know {p}? It is {y}.",
    "We learned that {p} is {y}.", "Name {p}: {y}.", "I asked for {p}, and the answer was {y}.", "{P}? That is {y}.",
    "The book says that {p} is {y}.", "Everybody in the class knew {p}: {y}.", "Remember {p}, which is {y}.",
    "Of course {p} is {y}.", "The teacher wrote down {p}: it is {y}.", "In the quiz they wanted {p}, so I said {y}.",
    "{P} has always been {y}.", "Fact: {p} = {y}.", "{Y} is {p}.", "It is {y} that is {p}.", "They gave {y} as {p}.",
)  # fmt: skip
"""Wordings of texts."""
ASKED = ("The teacher asked for {p}: the answer is {y}.", "In the book, {p} is known as {y}.",
         "Quiz question: Name {p}. Answer: {y}.", "Do they know what {p} is? Of course, it is {y}.")  # fmt: skip
"""Wordings of evaluation items; the answer comes last in all of them."""
ENDING = re.compile(r" \{([pPyY])\}(?!.*\{)")
"""The last thing that a wording fills in."""


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def about(relation: Relation) -> Kind:
    """The kind of exercise that states or asks one of the relation's facts."""

    def kind(rng: Random) -> Exercise:
        subject = rng.choice(tuple(relation.facts))
        answer = relation.facts[subject]
        phrase = rng.choice(relation.phrases).format(x=subject)
        words = {"p": phrase, "P": _capital(phrase), "y": answer, "Y": _capital(answer)}
        wording = rng.choice(TOLD + ASKED)
        start, last, tail = ENDING.split(wording)
        wrong = other(rng, tuple(relation.facts.values()), answer)
        return Exercise(start.format(**words), words[last], wrong, wording in ASKED, tail)

    return kind


KINDS = tuple(about(relation) for relation in RELATIONS)
CORPUS = Corpus(name="factual", choice=KINDS, generate=KINDS)


@hookimpl
def spath_register_domains(register: Callable[[Domain], None]) -> None:
    register(
        Domain(
            name=CORPUS.name,
            texts=CORPUS.texts,
            tasks=("spath_factual_choice", "spath_factual_generate"),
            task_paths=(spath_eval.tasks.FOLDER,),
            provenance="fact tables of spath_eval.plugins.domains.factual",
            licence="Apache-2.0",
            benchmarks=("arc_easy", "arc_challenge", "mmlu", "commonsense_qa", "piqa"),
        )
    )
