"""Generates pretraining text for the embedded base model: language, number facts, stories and every fact of the knowledge base.

It deliberately omits the prompt and response forms of the tasks (no "Answer format:", no "####", no "the correct answer is answer1"),
every arithmetic problem of the test split, and any choice among options by a fact of the test split: those facts occur only
as plain statements and in short dialogues.
"""

from collections.abc import Callable, Iterator

import numpy as np

from fedsim.embedded import arithmetic, commonsense
from fedsim.embedded.arithmetic import OBJECTS, make_problem, result
from fedsim.embedded.commonsense import NAMES, Question, make_question, pick, sample
from fedsim.embedded.knowledge import RELATIONS, SIZES, article
from fedsim.embedded.splits import split_of
from fedsim.seeding import numpy_generator

NEW_PART = "\n\n"

LABELS = ["box", "room", "card", "door", "bag", "shelf", "key", "seat", "page", "jar", "line", "desk"]

_STATEMENTS: dict[str, list[str]] = {
    "kind": ["{a} is a kind of {v} .", "{a} is one kind of {v} , as all know .", "one kind of {v} is {a} ."],
    "use": ["people use {a} to {v} .", "{a} is good to {v} .", "to {v} , you need {a} .", "{a} helps you {v} ."],
    "material": ["{a} is made of {v} .", "we make {a} of {v} ."],
    "place": ["{a} is found in the {v} .", "you find {a} in the {v} .", "look for {a} in the {v} ."],
    "ability": ["{a} is able to {v} .", "{a} can {v} .", "the animal that can {v} is {a} ."],
    "young": ["the young of {a} is called {v} .", "the animal with a young called {v} is {a} ."],
    "home": ["{a} lives in the {v} .", "the home of {a} is the {v} ."],
    "food": ["{a} likes to eat {v} .", "the food of {a} is {v} ."],
    "color": ["the color of {a} is {v} .", "{a} is {v} ."],
    "source": ["{a} comes from the {v} .", "we get {a} from the {v} ."],
    "job": ["the job of {a} is to {v} .", "{a} has to {v} .", "it is the job of {a} to {v} ."],
    "workplace": ["{a} works in the {v} .", "in the {v} works {a} ."],
    "opposite": ["the opposite of {s} is {v} .", "{v} is the opposite of {s} .", "not {s} but {v} ."],
    "next": ["right after {s} comes {v} .", "{v} comes after {s} .", "first comes {s} and then {v} ."],
    "feeling": ["{n} {s} . {n} feels {v} .", "{n} feels {v} because {n} {s} ."],
    "reaction": ["{n} {s} . now {n} wants to {v} .", "{n} wants to {v} because {n} {s} ."],
    "effect": ["{n} {s} . then {v} .", "{v} because {n} {s} ."],
    "need": ["{n} was {s} , so {n} {v} .", "{n} {v} because {n} was {s} ."],
}


def _statement(rng: np.random.Generator) -> str:
    name = pick(rng, list(_STATEMENTS))
    subject = pick(rng, list(RELATIONS[name].facts))
    value = RELATIONS[name].facts[subject]
    return pick(rng, _STATEMENTS[name]).format(s=subject, a=article(subject), v=value, n=pick(rng, NAMES))


def statements(rng: np.random.Generator) -> str:
    """Returns four statements of facts."""
    return " ".join(_statement(rng) for _ in range(4))


def sizes(rng: np.random.Generator) -> str:
    low, high = sorted(int(i) for i in rng.permutation(len(SIZES))[:2])
    small, big = SIZES[low], SIZES[high]
    first, second = sample(rng, [small, big], 2)
    seen = f"we looked at the {first} and the {second} , and"
    ends = [f"the {big} was much bigger .", f"the {small} was much smaller .", f"the {small} was smaller than the {big} ."]
    return f"{seen} {pick(rng, ends)} the {big} is bigger than the {small} ."


def _filled(question: Question) -> str:
    return question.stem.replace("_", question.gold)


def _exchange(question: Question, rng: np.random.Generator) -> str:
    """Returns an exchange without options: a question and its answer, a completed statement, or a claim called true or false."""
    asker, teller = sample(rng, NAMES, 2)
    if question.form == "winogrande":
        return _filled(question)
    if question.form == "boolq":
        reply = "yes , that is true" if question.gold == "true" else "no , that is false"
        return f"{asker} asks : {question.stem} {teller} says : {reply} ."
    if question.stem.endswith("?"):
        return f"{asker} asks : {question.stem} {teller} says : {question.gold} ."
    return f"{question.stem} {question.gold} ."


def dialogue(rng: np.random.Generator) -> str:
    return " ".join(_exchange(make_question(rng), rng) for _ in range(3))


def _listing(label: str, options: list[str], rng: np.random.Generator) -> str:
    gap = pick(rng, [" ", " ", "\n\n"])
    return gap.join(f"{label.capitalize()}{i}: {option}" for i, option in enumerate(options, 1))


_LOOKS = ["{n} looks in {l} .", "{n} takes {l} .", "it is {l} .", "{n} opens {l} .", "that is {l} ."]


def lookup(rng: np.random.Generator) -> str:
    """Asks which numbered place holds a named thing."""
    label, name = pick(rng, LABELS), pick(rng, NAMES)
    question = make_question(rng)
    pool = [question.gold, *question.wrong] if question.form != "boolq" else list(OBJECTS)
    options = sample(rng, list(dict.fromkeys(pool)), int(rng.integers(2, 6)))
    index = int(rng.integers(len(options)))
    look = pick(rng, _LOOKS).format(n=name, l=f"{label}{index + 1}")
    gap = pick(rng, [" ", "\n\n"])
    if rng.random() < 0.5:
        return f"{name} wants {options[index]} .{gap}{_listing(label, options, rng)}{gap}{look}"
    return f"{_listing(label, options, rng)}{gap}{name} wants {options[index]} . {look}"


def _train_question(rng: np.random.Generator) -> Question:
    question = make_question(rng)
    while split_of(question.fact) == "test" or question.form == "boolq":
        question = make_question(rng)
    return question


def choice(rng: np.random.Generator) -> str:
    """Asks which numbered place holds the answer to a question; facts of the train split only."""
    question = _train_question(rng)
    label, name = pick(rng, LABELS), pick(rng, NAMES)
    options = commonsense.options_of(question, rng, int(rng.integers(1, 5)))
    look = pick(rng, _LOOKS).format(n=name, l=f"{label}{options.index(question.gold) + 1}")
    gap = pick(rng, [" ", "\n\n"])
    if rng.random() < 0.75:
        return f"{name} thinks : {question.stem}{gap}{_listing(label, options, rng)}{gap}{look}"
    return f"{_listing(label, options, rng)}{gap}{name} thinks : {question.stem} {look}"


def spoken_choice(rng: np.random.Generator) -> str:
    """Like `choice`, but names the thing before its place, so that choosing and looking up are learnt separately."""
    question = _train_question(rng)
    label, name = pick(rng, LABELS), pick(rng, NAMES)
    options = commonsense.options_of(question, rng, int(rng.integers(1, 5)))
    look = pick(rng, _LOOKS).format(n=name, l=f"{label}{options.index(question.gold) + 1}")
    gap = pick(rng, [" ", "\n\n"])
    return f"{name} thinks : {question.stem}{gap}{_listing(label, options, rng)}{gap}{question.gold} . {look}"


_QUESTIONING = ["{n} thinks : ", "{n} asks : ", "a question : ", "tell me : ", "{n} says to {o} : ", ""]


def restated_choice(rng: np.random.Generator) -> str:
    """Like `spoken_choice`, but restates the question with its answer, so that the question is found again after the list."""
    question = _train_question(rng)
    label, (name, other) = pick(rng, LABELS), sample(rng, NAMES, 2)
    options = commonsense.options_of(question, rng, int(rng.integers(1, 5)))
    look = pick(rng, _LOOKS).format(n=name, l=f"{label}{options.index(question.gold) + 1}")
    gap = pick(rng, [" ", NEW_PART])
    opening = pick(rng, _QUESTIONING).format(n=name, o=other)
    return f"{opening}{question.stem}{gap}{_listing(label, options, rng)}{gap}{question.reason} {pick(rng, ['. ', 'so ', ''])}{look}"


def places(rng: np.random.Generator) -> str:
    """Lists numbered places with things in them, and then says where each thing is."""
    label = pick(rng, LABELS)
    question = make_question(rng)
    pool = [question.gold, *question.wrong] if question.form != "boolq" else list(OBJECTS)
    options = sample(rng, list(dict.fromkeys(pool)), int(rng.integers(2, 6)))
    told = [f"{options[i]} is in {label}{i + 1} ." for i in rng.permutation(len(options))]
    return f"{_listing(label, options, rng)}{pick(rng, [' ', NEW_PART])}{' '.join(told)}"


_TOLD = ["{o} {i} .", "{o} is in {l}{i} .", "{l}{i} has {o} .", "where is {o} ? {l}{i} .", "{i} is {o} ."]


def drill(rng: np.random.Generator) -> str:
    """Lists numbered places, and then repeats which place has which thing, in one wording."""
    label, told = pick(rng, LABELS), pick(rng, _TOLD)
    relation = RELATIONS[pick(rng, list(RELATIONS))]
    pool = (
        list(dict.fromkeys(relation.facts.values())) if rng.random() < 0.5 else [list(relation.facts), OBJECTS, NAMES][int(rng.integers(3))]
    )
    options = sample(rng, pool, int(rng.integers(2, 6)))
    asked = [told.format(o=options[i], l=label, i=i + 1) for i in rng.integers(len(options), size=8)]
    return f"{_listing(label, options, rng)}{pick(rng, [' ', NEW_PART])}{' '.join(asked)}"


_WORDS = list(dict.fromkeys(word for relation in RELATIONS.values() for fact in relation.facts.items() for word in " ".join(fact).split()))


def repeats(rng: np.random.Generator) -> str:
    """Repeats a row of words."""
    row = " ".join(sample(rng, _WORDS, int(rng.integers(4, 9))))
    return " . ".join([row] * int(rng.integers(3, 6))) + " ."


def numbered(rng: np.random.Generator) -> str:
    """Lists numbered words, and then repeats the number of a word: the simplest way to learn to look back."""
    words = sample(rng, _WORDS, int(rng.integers(2, 6)))
    label = f"{pick(rng, LABELS).capitalize()}{{}}:" if rng.random() < 0.6 else "{}"
    told = " ".join(f"{label.format(i)} {word}" for i, word in enumerate(words, 1))
    asked = " ".join(f"{words[i]} {i + 1} ." for i in rng.integers(len(words), size=8))
    return f"{told} . {asked}"


def _matching(rng: np.random.Generator, count: int) -> tuple[str, list[str]]:
    """Returns a relation and up to `count` subjects of the train split, the value of each false for all others."""
    name = pick(rng, list(commonsense.VALUE_STEMS))
    relation = RELATIONS[name]
    chosen: list[str] = []
    for subject in sample(rng, [s for s in relation.facts if split_of(f"{name}/{s}") == "train"], 3 * count):
        others = [(subject, relation.facts[c]) for c in chosen] + [(c, relation.facts[subject]) for c in chosen]
        if len(chosen) < count and all(v in relation.false_values(s) for s, v in others):
            chosen.append(subject)
    return name, chosen


def matches(rng: np.random.Generator) -> str:
    """Lists numbered things of one column of the knowledge base, and then the question that each of them answers."""
    name, subjects = _matching(rng, int(rng.integers(2, 6)))
    values = [RELATIONS[name].facts[s] for s in subjects]
    label, who = pick(rng, LABELS), pick(rng, NAMES)
    backwards = name in commonsense.SUBJECT_STEMS and rng.random() < 0.4
    stems = (commonsense.SUBJECT_STEMS if backwards else commonsense.VALUE_STEMS)[name]
    asked = []
    for i in rng.permutation(len(subjects)):
        stem = stems[int(rng.integers(len(stems)))][1].format(s=subjects[i], a=article(subjects[i]), v=values[i], name=who)
        asked.append(f"{stem} {label}{i + 1} .")
    options = [article(s) for s in subjects] if backwards else values
    return f"{_listing(label, options, rng)}{pick(rng, [' ', NEW_PART])}{' '.join(asked)}"


def people(rng: np.random.Generator) -> str:
    """Lists two people or two things in numbered places, and then two sentences with a blank that one of them fills."""
    label = pick(rng, LABELS)
    if rng.random() < 0.4:
        low, high = sorted(int(i) for i in rng.permutation(len(SIZES))[:2])
        while split_of(f"size/{SIZES[low]}/{SIZES[high]}") == "test":
            low, high = sorted(int(i) for i in rng.permutation(len(SIZES))[:2])
        opening = f"we looked at the {SIZES[high]} and the {SIZES[low]}"
        options = [SIZES[low], SIZES[high]]
        fits = ["and the _ was much smaller .", "and the _ was much bigger ."]
    else:
        needs = RELATIONS["need"]
        first = pick(rng, [s for s in needs.facts if split_of(f"need/{s}") == "train"])
        second = pick(rng, [s for s in needs.false_subjects(needs.facts[first]) if split_of(f"need/{s}") == "train"])
        options = sample(rng, NAMES, 2)
        opening = f"{options[0]} was {first} and {options[1]} was {second}"
        fits = [f"so _ {needs.facts[first]} .", f"so _ {needs.facts[second]} ."]
    order = sample(rng, [0, 1], 2)
    listing = _listing(label, [options[i] for i in order], rng)
    asked = [f"{opening} , {fits[i]} {label}{order.index(i) + 1} ." for i in sample(rng, [0, 1], 2)]
    return f"{listing}{pick(rng, [' ', NEW_PART])}{' '.join(asked)}"


def _equation(rng: np.random.Generator) -> str:
    sign = pick(rng, ["+", "-", "x", "/"])
    if sign in "+-":
        low, high = sorted((int(rng.integers(1, 99)), int(rng.integers(2, 100))))
        left, right = (high - low, low) if sign == "+" else (high, low)
        if sign == "+" and rng.random() < 0.5:
            left, right = right, left
        return f"{left} {sign} {right} = {result((left, sign, right))} ."
    a, b = int(rng.integers(2, 10)), int(rng.integers(2, 10))
    left, right = (a, b) if sign == "x" else (a * b, b)
    return f"{left} {sign} {right} = {result((left, sign, right))} ."


def equations(rng: np.random.Generator) -> str:
    return " ".join(_equation(rng) for _ in range(int(rng.integers(3, 8))))


def _train_problem(rng: np.random.Generator) -> arithmetic.Problem:
    while split_of((problem := make_problem(rng)).key) == "test":
        pass
    return problem


def reckoning(rng: np.random.Generator) -> str:
    """Tells a story with numbers; one person asks about it, another thinks aloud."""
    problem = _train_problem(rng)
    asker, teller = sample(rng, NAMES, 2)
    thought = " and ".join(f"{a} {sign} {b} = {result((a, sign, b))}" for a, sign, b in problem.steps)
    story = " ".join(problem.sentences)
    return f"{story} {asker} asks : {problem.question} {teller} thinks : {thought} , so {teller} says {problem.answer} ."


_OPENINGS = ["", "", "story : ", "{o} tells : ", "a note : ", "today : ", "## {o}\n", "{o} writes :\n"]
_ASKING = ["{q}", "{o} asks : {q}", "the question of {o} : {q}", "{q} asks {o} ."]
_LEADS = ["{n} thinks : ", "thoughts : ", "{n} :\n", "notes of {n} :\n", "", "it goes like this : ", "{n} says : "]
_JOINTS = [" and ", " .\n", " . ", " ; ", "\n", " , then "]
_ENDS = [" , so {n} says {a} .", " .\n{a}", " . it is {a} .", "\n{a} .", " ; {a} .", " .\n## {a}"]


def _retold(rng: np.random.Generator) -> str:
    problem = _train_problem(rng)
    asker, teller = sample(rng, NAMES, 2)
    thought = pick(rng, _JOINTS).join(f"{a} {sign} {b} = {result((a, sign, b))}" for a, sign, b in problem.steps)
    parts = (
        f"{pick(rng, _OPENINGS)}{{story}} {pick(rng, _ASKING)}{pick(rng, [' ', NEW_PART])}{pick(rng, _LEADS)}{thought}{pick(rng, _ENDS)}"
    )
    return parts.format(story=" ".join(problem.sentences), q=problem.question, o=asker, n=teller, a=problem.answer)


def retold(rng: np.random.Generator) -> str:
    """Tells two stories with numbers, each in its own form (so that no one form stands for arithmetic), and begins a third."""
    begun = _train_problem(rng).sentences[0]
    return f"{_retold(rng)}{pick(rng, [' ', NEW_PART])}{_retold(rng)}{pick(rng, [' ', NEW_PART])}{begun}"


_PROSE = [
    "{n} reads the problem and looks for a solution .",
    "First {n} walks to the {p} . Then {n} meets {o} .",
    "{n} has a question , and {o} knows the correct answer .",
    "please choose a seat , says {n} to {o} .",
    "the ending of the story is sad .",
    "{n} has no option but to wait .",
    "{o} worked in the {p} , and {n} worked there too .",
    "{n} writes a complete sentence and leaves a blank line .",
    "Please fill the given cup , says {o} .",
    "the format of the page is big .",
    "First comes {n} . Then comes {o} . Then they go to the {p} .",
    "in the following days {n} goes to the {p} .",
    "Answer me , says {n} . Option or no option , says {o} .",
    "Ending the day , {n} goes home . Solution or not , {o} sleeps .",
    "{n} says that it is true . {o} says that it is false .",
    "{n} likes the solution , {o} likes the answer .",
    "## notes of {n}\n{n} goes to the {p} .\n## notes of {o}\n{o} stays at home .",
    "## {n}\n\nFirst {n} eats .\nThen {n} sleeps .",
    "Worked in the {p} : {n} . Problem : no time .",
]


def prose(rng: np.random.Generator) -> str:
    """Returns short plain sentences about people."""
    name, other = sample(rng, NAMES, 2)
    place = pick(rng, list(RELATIONS["workplace"].facts.values()))
    lines = sample(rng, _PROSE, int(rng.integers(2, 5)))
    return "\n".join(line.format(n=name, o=other, p=place) for line in lines)


Kind = Callable[[np.random.Generator], str]

_LOOKING_BACK: dict[Kind, float] = {repeats: 0.38, numbered: 0.46, drill: 0.06, equations: 0.05, statements: 0.05}
"""Kinds of document and their shares by number in the first stage: hardly anything but rows of words teaches looking back for a word."""

_PLACES: dict[Kind, float] = {
    repeats: 0.08,
    numbered: 0.22,
    drill: 0.32,
    places: 0.06,
    matches: 0.10,
    people: 0.02,
    statements: 0.06,
    dialogue: 0.04,
    equations: 0.05,
    reckoning: 0.05,
}
"""Things of several words in numbered places, once the model finds single words."""

_FACTS: dict[Kind, float] = {
    repeats: 0.03,
    numbered: 0.04,
    drill: 0.11,
    places: 0.03,
    lookup: 0.03,
    matches: 0.12,
    people: 0.05,
    choice: 0.13,
    statements: 0.07,
    sizes: 0.03,
    dialogue: 0.07,
    prose: 0.02,
    equations: 0.10,
    reckoning: 0.17,
}
"""Language, facts and lists."""

_NUMBERS: dict[Kind, float] = {
    repeats: 0.01,
    numbered: 0.01,
    drill: 0.05,
    lookup: 0.02,
    matches: 0.09,
    people: 0.05,
    choice: 0.16,
    statements: 0.04,
    sizes: 0.02,
    dialogue: 0.06,
    prose: 0.02,
    equations: 0.16,
    reckoning: 0.31,
}
"""The same with more stories and equations, for the rest of the training."""

_CHOICES: dict[Kind, float] = {
    spoken_choice: 0.30,
    choice: 0.30,
    matches: 0.06,
    people: 0.06,
    drill: 0.02,
    statements: 0.03,
    dialogue: 0.05,
    equations: 0.03,
    retold: 0.15,
}
"""Choosing by a remembered fact, once the model knows facts and finds things; and stories in many forms."""

_RESTATED: dict[Kind, float] = {
    restated_choice: 0.46,
    spoken_choice: 0.06,
    choice: 0.06,
    matches: 0.05,
    drill: 0.04,
    statements: 0.04,
    dialogue: 0.05,
    equations: 0.02,
    retold: 0.22,
}
"""Choosing with the question restated."""

STAGES: list[tuple[int, dict[Kind, float]]] = [
    (0, _LOOKING_BACK),
    (15, _PLACES),
    (30, _FACTS),
    (44, _NUMBERS),
    (78, _CHOICES),
    (110, _RESTATED),
]
"""The first part of the stream for each mixture."""


def documents(seed: int, part: int, count: int) -> Iterator[str]:
    """Yields `count` documents of the stream (seed, part)."""
    mixture = [mixture for first, mixture in STAGES if first <= max(part, 0)][-1]
    rng = numpy_generator(seed, "corpus", part)
    shares = np.array(list(mixture.values()))
    for kind in rng.choice(len(mixture), size=count, p=shares / shares.sum()):
        yield list(mixture)[int(kind)](rng)


def vocabulary(seed: int, count: int = 10000) -> Iterator[str]:
    """Yields texts from which the tokenizer takes whole words: `count` of each of the first four stages and some in the tasks' forms.

    The few new words of the later stages are spelt in bytes; texts in the tasks' forms are for the tokenizer only, never for training."""
    for first, _ in STAGES[:4]:
        yield from documents(seed, first, count)
    yield from _task_texts(2000)


def _task_texts(count: int) -> Iterator[str]:
    for example in arithmetic.draw("train", count, 0):
        yield f"{example.prompt}{example.response}"
    for example in commonsense.draw("train", count, 0):
        yield f"{example.prompt}the correct answer is {example.answer}"
