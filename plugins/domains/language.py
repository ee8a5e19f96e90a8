"""English as a domain: inflection, agreement, pronouns, articles, opposites, kinds of things, rhymes and small stories.

Word lists are written by hand. An instance is a frame with the words in it; one in eight is reserved for evaluation, so
a word is known from other frames there, and a frame from other words.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import spath_eval.tasks
from spath_eval import Domain, hookimpl
from spath_eval.plugins.domains._corpus import Corpus, Exercise, other, reserve

VERBS = tuple(line.split() for line in """
walk walks walked walking|jump jumps jumped jumping|laugh laughs laughed laughing|work works worked working
cook cooks cooked cooking|climb climbs climbed climbing|dance dances danced dancing|smile smiles smiled smiling
listen listens listened listening|travel travels travelled travelling|wait waits waited waiting
rest rests rested resting|play plays played playing|shout shouts shouted shouting
whisper whispers whispered whispering|cry cries cried crying|study studies studied studying
hurry hurries hurried hurrying|argue argues argued arguing|knock knocks knocked knocking|sing sings sang singing
swim swims swam swimming|run runs ran running|drink drinks drank drinking|begin begins began beginning
ring rings rang ringing|sit sits sat sitting|speak speaks spoke speaking|write writes wrote writing
drive drives drove driving|ride rides rode riding|rise rises rose rising|sleep sleeps slept sleeping
weep weeps wept weeping|kneel kneels knelt kneeling|leave leaves left leaving|eat eats ate eating
fall falls fell falling|fly flies flew flying|grow grows grew growing|draw draws drew drawing
win wins won winning|fight fights fought fighting|think thinks thought thinking|teach teaches taught teaching
stand stands stood standing|wake wakes woke waking|hide hides hid hiding|go goes went going
come comes came coming|dream dreams dreamed dreaming|paint paints painted painting
""".strip().replace("\n", "|").split("|"))  # fmt: skip
"""Base, third person, past, -ing form."""
NOUNS = tuple(line.split() for line in """
dog dogs|cat cats|horse horses|bird birds|boat boats|chair chairs|garden gardens|window windows|letter letters
river rivers|box boxes|fox foxes|bus buses|dish dishes|brush brushes|church churches|bench benches|glass glasses
watch watches|match matches|baby babies|city cities|story stories|lady ladies|party parties|country countries
puppy puppies|berry berries|penny pennies|wolf wolves|leaf leaves|knife knives|shelf shelves|thief thieves
loaf loaves|half halves|calf calves|scarf scarves|child children|man men|woman women|tooth teeth|foot feet
goose geese|mouse mice|ox oxen|tomato tomatoes|potato potatoes|hero heroes|teacher teachers|farmer farmers
doctor doctors|king kings|flower flowers|tree trees|door doors|lamp lamps|hat hats|road roads
""".strip().replace("\n", "|").split("|"))  # fmt: skip
"""Singular, plural."""
OPPOSITES = tuple(line.split() for line in """
hot cold|big small|tall short|fast slow|old young|rich poor|cooked raw|heavy light|happy sad|clean dirty
early late|open closed|full empty|wet dry|loud quiet|strong weak|thick thin|wide narrow|deep shallow
sweet bitter|polite rude|brave cowardly|cheap expensive|easy difficult|far near|high low|inside outside
left right|good bad|rough smooth|safe dangerous|sharp blunt|tight loose|asleep awake|up down|first last
day night|friend enemy|love hate|war peace|win lose|buy sell|push pull|give take|begin end|question answer
north south|east west
""".strip().replace("\n", "|").split("|"))  # fmt: skip
"""No word has a second opposite in the list, so that a wrong answer drawn from it is wrong."""
COMPARED = tuple(line.split() for line in """
tall taller tallest|small smaller smallest|fast faster fastest|old older oldest|cold colder coldest
soft softer softest|big bigger biggest|hot hotter hottest|thin thinner thinnest|wet wetter wettest
sad sadder saddest|fat fatter fattest|happy happier happiest|heavy heavier heaviest|easy easier easiest
dirty dirtier dirtiest|funny funnier funniest|busy busier busiest|good better best|bad worse worst
long longer longest|strong stronger strongest|weak weaker weakest|young younger youngest|wide wider widest
nice nicer nicest|large larger largest|late later latest|brave braver bravest|simple simpler simplest
""".strip().replace("\n", "|").split("|"))  # fmt: skip
KINDS = {
    "flower": "rose tulip daisy lily violet daffodil",
    "fish": "salmon trout cod herring pike carp",
    "fruit": "pear plum cherry peach grape banana",
    "tool": "hammer saw drill spade wrench chisel",
    "vehicle": "car truck tram lorry van taxi",
    "instrument": "violin piano flute drum harp trumpet",
    "garment": "shirt coat skirt dress jacket jumper",
    "drink": "tea coffee milk juice lemonade cocoa",
    "building": "castle cottage palace hut barn chapel",
    "relative": "aunt uncle cousin nephew niece grandmother",
}
RHYMES = (
    "cat hat rat bat mat", "light night right sight fight", "day way say play grey", "red bed head bread fed",
    "moon soon spoon noon tune", "king ring sing thing wing", "boat coat goat note throat",
    "tree sea key bee tea", "town down brown crown gown", "ball tall wall fall small",
    "cake lake snake make rake", "gold cold old told bold",
)  # fmt: skip
VOWEL = (
    "apple egg orange onion owl eagle island umbrella engine apron arrow actor artist uncle elephant insect oven acorn"
).split()
CONSONANT = (
    "banana pear hammer lemon spoon tiger mountain hat wagon carpet knight singer painter brother horse bee stove nut"
).split()
WOMEN = (
    "Mary", "Anna", "Lucy", "Sarah", "Emma", "Jane", "Alice", "Clara", "the girl", "the woman", "the queen",
    "my aunt",
)  # fmt: skip
MEN = (
    "John", "Peter", "David", "Henry", "George", "Simon", "Oscar", "Frank", "the boy", "the man", "the king",
    "my uncle",
)  # fmt: skip
PLACES = ("near the river", "in the garden", "behind the house", "on the hill", "by the window", "from the village",
          "under the bridge", "next to the school", "at the market", "beside the road")  # fmt: skip
QUALITIES = ("old", "new", "very big", "rather small", "quite clean", "well known", "here again", "not for sale")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def past(rng: Random) -> Exercise:
    base, third, form, gerund = rng.choice(VERBS)
    person = rng.choice(WOMEN + MEN)
    frame = rng.choice((
        "Every day they {base}, and yesterday they", "Today we {base}. Last week we",
        "I {base} now and then. This morning I", "{p} often {third}. Last night {p}",
        "{p} likes {gerund}. A year ago {p}", "{p} still {third}. Once {p}",
    ))  # fmt: skip
    prompt = _capital(frame.format(base=base, third=third, gerund=gerund, p=person))
    tail = rng.choice((" too.", ".", " again.", " all day."))
    return Exercise(prompt, form, (base, third, gerund), reserve("past", prompt), tail)


def present(rng: Random) -> Exercise:
    base, third, form, gerund = rng.choice(VERBS)
    person, people = rng.choice(WOMEN + MEN), rng.choice(NOUNS)[1]
    frame, answer = rng.choice((
        (f"Yesterday {person} {form}. Every day {person}", third), (f"{person} {form} and is still", gerund),
        (f"the {people} {form}. They still can", base), (f"{person} {third} often and will", base),
        (f"we saw {person} {base}: {person} was", gerund),
    ))  # fmt: skip
    prompt = _capital(frame)
    return Exercise(prompt, answer, tuple({base, third, form, gerund} - {answer}), reserve("present", prompt), ".")


def plural(rng: Random) -> Exercise:
    one, many = rng.choice(NOUNS)
    number = rng.choice(("two", "three", "four", "five", "six", "ten", "many", "several", "few", "some"))
    frame = rng.choice(("One {one}, {n}", "First I saw one {one} and then {n}", "Not a single {one} but {n}",
                        "There was one {one}. Soon there were {n}", "I have one {one}; you have {n}"))  # fmt: skip
    prompt = frame.format(one=one, n=number)
    wrong = (one, *rng.choice([noun for noun in NOUNS if noun[0] != one]))
    return Exercise(prompt, many, wrong, reserve("plural", prompt), ".")


def agreement(rng: Random) -> Exercise:
    one, many = rng.choice(NOUNS)
    noun, tense = rng.choice((one, many)), rng.choice(("is are", "was were", "has have"))
    right, wrong = tense.split() if noun == one else reversed(tense.split())
    prompt = f"The {noun} {rng.choice(PLACES)}" if rng.random() < 0.7 else f"The {noun}"
    ending = f" been {rng.choice(QUALITIES)}." if tense == "has have" else f" {rng.choice(QUALITIES)}."
    return Exercise(prompt, right, (wrong, "am", "be", "being"), reserve("agreement", prompt), ending)


def pronoun(rng: Random) -> Exercise:
    people = rng.choice((WOMEN, MEN))
    person, thing = _capital(rng.choice(people)), rng.choice(CONSONANT)
    subject, whose, themself = ("she", "her", "herself") if people is WOMEN else ("he", "his", "himself")
    frame, answer, wrong = rng.choice((
        (f"{person} was tired, so", subject, ("he", "she", "they", "it")),
        (f"{person} lost the {thing} because", subject, ("he", "she", "they", "it")),
        (f"{person} has a {thing} of", f"{whose} own", ("his own", "her own", "its own", "their own")),
        (f"{person} kept the {thing} as", f"{whose} own", ("his own", "her own", "its own", "their own")),
        (f"{person} made the {thing} for", themself, ("himself", "herself", "themselves", "myself")),
    ))  # fmt: skip
    tail = rng.choice((" went home.", " was sad.", " sat down.")) if answer == subject else "."
    return Exercise(frame, answer, tuple(set(wrong) - {answer}), reserve("pronoun", frame), tail)


def article(rng: Random) -> Exercise:
    noun = rng.choice((*VOWEL, *CONSONANT))
    right, wrong = ("an", "a") if noun in VOWEL else ("a", "an")
    prompt = rng.choice(("In the picture there is", "Nobody expected to find", "She told us about", "He was looking at",
                         "I have never seen such", "The story begins with"))  # fmt: skip
    answers = (f"{wrong} {noun}", f"{wrong} {noun}s", f"{right} {noun}s")
    return Exercise(f"{prompt}, as they say,", f"{right} {noun}", answers, reserve("article", prompt, noun), ".")


def opposite(rng: Random) -> Exercise:
    pair = rng.choice(OPPOSITES)
    word, answer = pair if rng.random() < 0.5 else reversed(pair)
    frame = rng.choice(("The opposite of {w} is", "It is not {w} but", "I say {w} and you say",
                        "If one is {w}, the other is", "The reverse of {w} is",
                        "A word that means the contrary of {w} is"))  # fmt: skip
    prompt = frame.format(w=word)
    options = [option for tried in OPPOSITES for option in tried if word not in tried]
    return Exercise(prompt, answer, (word, *other(rng, options, answer)[:2]), reserve("opposite", prompt), ".")


def comparison(rng: Random) -> Exercise:
    plain, more, most = rng.choice(COMPARED)
    noun = rng.choice(CONSONANT)
    prompt, answer = rng.choice((
        (f"My {noun} is {plain}, but yours is", more),
        (f"This {noun} is {more} than that one. It is the", most),
        (f"The {noun} is {more} now; last year it was less", plain),
        (f"Of all, this {noun} is the {most}. It is very", plain),
        (f"Your {noun} is {plain}, and mine is the", most),
    ))  # fmt: skip
    spare = rng.choice([form for forms in COMPARED for form in forms if plain not in forms])
    return Exercise(prompt, answer, (*({plain, more, most} - {answer}), spare), reserve("comparison", prompt), ".")


def kind_of(rng: Random) -> Exercise:
    kind = rng.choice(tuple(KINDS))
    member = rng.choice(KINDS[kind].split())
    prompt = rng.choice(("The {m} is a kind of", "By {m} we mean a certain kind of", "Of course {m} names a sort of",
                         "Look up {m}: it is some", "Everybody knows {m} as a type of")).format(m=member)  # fmt: skip
    return Exercise(prompt, kind, other(rng, tuple(KINDS), kind), reserve("kind", prompt), ".")


def rhyme(rng: Random) -> Exercise:
    group = rng.choice(RHYMES)
    word, answer = rng.sample(group.split(), 2)
    frame = rng.choice(("A word that rhymes with {w} is", "The poet rhymed {w} with", "What sounds like {w}? The word"))
    prompt = frame.format(w=word)
    options = [option for tried in RHYMES if tried != group for option in tried.split()]
    return Exercise(prompt, answer, other(rng, options, answer), reserve("rhyme", prompt), ".")


def story(rng: Random) -> str:
    she, her, people = rng.choice((("She", "her", WOMEN), ("He", "his", MEN)))
    person, noun, place = rng.choice(people), rng.choice(CONSONANT), rng.choice(PLACES)
    first, second = rng.sample(VERBS, 2)
    cold, warm = rng.choice(OPPOSITES[:20])
    lines = (
        f"One day {person} found a {noun} {place}. It was {cold}.",
        f"{she} wanted a {warm} one and {first[2]} to {her} friend.",
        f'"Do not {second[0]}," said the friend, "and do not be sad."',
        f"In the end {person} {second[2]}, and they were good friends.",
    )
    start = rng.randrange(3)
    return "\n".join(lines[start : start + 2])


CORPUS = Corpus(
    name="language",
    choice=(past, present, plural, agreement, pronoun, article, opposite, comparison, kind_of, rhyme),
    generate=(past, present, plural, opposite, comparison),
    prose=(story,),
)


@hookimpl
def spath_register_domains(register: Callable[[Domain], None]) -> None:
    register(
        Domain(
            name=CORPUS.name,
            texts=CORPUS.texts,
            tasks=("spath_language_choice", "spath_language_generate"),
            task_paths=(spath_eval.tasks.FOLDER,),
            provenance="word lists and frames of spath_eval.plugins.domains.language",
            licence="Apache-2.0",
            benchmarks=("lambada_openai", "wikitext"),
        )
    )
