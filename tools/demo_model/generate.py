"""Writes the demo model's conversations. Every text comes from this folder; nothing is downloaded.

An item is one question with its one right answer. Items are split by a hash of the problem (not of its wording) into test,
validation and training, so a problem in the test set was never trained on in any wording. The tokenizer is bytes: token id = byte
value, then three special tokens, so encoding needs no tokenizer here.

    python3 generate.py --skill sort --count 5 [--split test] [--seed 1]     prints items as JSON lines
"""

import argparse
import json
import random
import zlib
from typing import NamedTuple

import numpy as np

import about
from words import WORDS

END_OF_TEXT, IM_START, IM_END = 256, 257, 258
VOCABULARY = 272  # 259 used; a multiple of 16 for the tensor cores
LOWER = "abcdefghijklmnopqrstuvwxyz"
ALNUM = LOWER + "0123456789"
PRINTABLE = "".join(map(chr, range(33, 127)))
COPY_LONGEST = 340  # trained a little beyond the 320 that the model card promises
COPY_EXAM = (300, 320)
REVERSE_LONGEST = 20
ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr kr pl st tr sh ch".split()
VOWELS = "a e i o u ai ea oo".split()
CODAS = ["", "", "n", "r", "s", "t", "l", "m", "nd", "rk"]


class Item(NamedTuple):
    """One question and its right answer; `key` names the problem whatever the wording."""

    skill: str
    key: str
    user: str
    answer: str


def split_of(key):
    """1 in 64 problems is for the test, 1 in 64 for validation, the rest for training."""
    bucket = zlib.crc32(key.encode()) & 63
    return ("test", "validation")[bucket] if bucket < 2 else "train"


def pseudo_word(rng, syllables=None):
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables or rng.randint(1, 3)))


def letters(rng, alphabet, low, high):
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


# --- arithmetic: the answer shows the columns from the right, as on paper, then the result -------------------------------------


def add_columns(a, b):
    a, b = str(a)[::-1], str(b)[::-1]
    steps, carry = [], 0
    for i in range(max(len(a), len(b))):
        x, y = int(a[i]) if i < len(a) else 0, int(b[i]) if i < len(b) else 0
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ", ".join(steps)


def subtract_columns(a, b):
    """a >= b. A borrowed ten stands in front of the digit (11-9=2); the next column pays it back (2-1-3)."""
    a, b = str(a)[::-1], str(b)[::-1]
    steps, borrow = [], 0
    for i in range(len(a)):
        x, y = int(a[i]), int(b[i]) if i < len(b) else 0
        owed = "-1" if borrow else ""
        top = x + 10 if x - borrow < y else x
        steps.append(f"{top}{owed}-{y}={top - borrow - y}")
        borrow = 1 if top != x else 0
    return ", ".join(steps)


def number(rng, digits):
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


ADD = ["What is {a} + {b}?", "{a}+{b}", "{a} + {b}", "{a} + {b} =", "{a}+{b}=?", "Compute {a} + {b}.", "Add {a} and {b}.", "What is {a} plus {b}?",
       "What is the sum of {a} and {b}?", "Calculate {a}+{b}", "How much is {a} + {b}?", "Please add {a} and {b}.", "{a} plus {b}",
       "what's {a} + {b}", "Can you compute {a} + {b}?", "Sum {a} and {b}."]
SUB = ["What is {a} - {b}?", "{a}-{b}", "{a} - {b}", "{a} - {b} =", "{a}-{b}=?", "Compute {a} - {b}.", "Subtract {b} from {a}.", "What is {a} minus {b}?",
       "Calculate {a}-{b}", "How much is {a} - {b}?", "Take {b} away from {a}.", "{a} minus {b}", "what's {a} - {b}", "Can you compute {a} - {b}?"]
MUL = ["What is {a} x {b}?", "{a}*{b}", "{a} * {b}", "{a} x {b}", "{a} × {b}", "Compute {a} * {b}.", "Multiply {a} by {b}.", "What is {a} times {b}?",
       "What is the product of {a} and {b}?", "Calculate {a}*{b}", "How much is {a} x {b}?", "{a} times {b}", "what's {a} * {b}", "Multiply {a} and {b}."]


def arithmetic(rng, stage, exam):
    kind = rng.random()
    if kind < 0.4:
        a, b = number(rng, rng.randint(1, 4)), number(rng, rng.randint(1, 4))
        if rng.random() < 0.3:
            a, b = number(rng, 4), number(rng, 4)
        answer = f"{a} + {b}: {add_columns(a, b)}. So {a} + {b} = {a + b}."
        return f"add:{min(a, b)}:{max(a, b)}", rng.choice(ADD).format(a=a, b=b), answer
    if kind < 0.8:
        a, b = number(rng, rng.randint(1, 4)), number(rng, rng.randint(1, 4))
        if rng.random() < 0.4:
            digits = rng.randint(2, 4)
            a, b = number(rng, digits), number(rng, digits)
        if a < b and rng.random() < 0.5:
            a, b = b, a
        user = rng.choice(SUB).format(a=a, b=b)
        if a >= b:
            answer = f"{a} - {b}: {subtract_columns(a, b)}. So {a} - {b} = {a - b}."
        else:
            answer = f"{a} - {b} is negative. {b} - {a}: {subtract_columns(b, a)}. So {a} - {b} = {a - b}."
        return f"sub:{a}:{b}", user, answer
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if exam or rng.random() < 0.7:
        a, b = rng.randint(11, 99), rng.randint(11, 99)
    user = rng.choice(MUL).format(a=a, b=b)
    if a < 10 or b < 10:
        # A table of facts that the longer products are built on: always trained, never examined.
        return "train:product", user, f"{a} x {b} = {a * b}."
    ones, tens = a * (b % 10), a * (b - b % 10)
    answer = (f"{a} x {b % 10} = {ones}, {a} x {b - b % 10} = {tens}. {ones} + {tens}: {add_columns(ones, tens)}. "
              f"So {a} x {b} = {a * b}.")
    return f"mul:{a}:{b}", user, answer


# --- reversing ---------------------------------------------------------------------------------------------------------------

REVERSE = ["Reverse the word {q}.", "Reverse {q}", "Reverse the string {q}.", "Write {q} backwards.", "What is {q} backwards?", "Spell {q} backwards.",
           "Reverse this: {p}", "Please reverse {q}.", "What is the reverse of {q}?", "reverse: {p}", "Can you reverse the word {q}?",
           "Write the letters of {q} in reverse order.", "Turn {q} around, letter by letter."]


def quoted(rng, text):
    return rng.choice(('"{}"', '"{}"', "'{}'", "{}", "{}")).format(text)


def reverse(rng, stage, exam):
    longest = 6 + int((REVERSE_LONGEST - 6) * min(1, stage * 4))
    kind = rng.random()
    if kind < 0.3:
        text = rng.choice(WORDS)
    elif kind < 0.5:
        text = pseudo_word(rng, rng.randint(1, 4))
    elif kind < 0.75:
        text = letters(rng, LOWER, 3, longest)
    elif kind < 0.9:
        text = letters(rng, ALNUM, 3, longest)
    else:
        text = rng.choice(WORDS) + " " + rng.choice(WORDS)
    if rng.random() < 0.1:
        text = text.capitalize()
    text = text[:REVERSE_LONGEST].strip()
    return f"rev:{text}", rng.choice(REVERSE).format(q=quoted(rng, text), p=text), text[::-1]


# --- sorting -----------------------------------------------------------------------------------------------------------------

SORT_UP = ["Sort these {what}: {list}", "Sort {list}", "Sort in ascending order: {list}", "Sort from smallest to largest: {list}", "Order these {what}: {list}",
           "Put these {what} in order: {list}", "Please sort: {list}", "Sort the list {list}", "sort: {list}", "Arrange in ascending order: {list}"]
SORT_DOWN = ["Sort in descending order: {list}", "Sort from largest to smallest: {list}", "Sort these {what} in descending order: {list}",
             "Put these {what} in descending order: {list}", "Arrange from largest to smallest: {list}"]
SORT_ALPHA = ["Sort alphabetically: {list}", "Put these {what} in alphabetical order: {list}", "Sort these {what} alphabetically: {list}",
              "Alphabetize: {list}", "Sort these {what}: {list}", "Sort {list}", "Order these {what}: {list}"]


def sort(rng, stage, exam):
    full = min(1, stage * 3)
    kind = rng.random()
    if kind < 0.5:
        top, longest = (99, 4 + int(4 * full)) if rng.random() < 0.6 else (999, 4 + int(2 * full))
        size = rng.randint(3, longest)
        items = rng.sample(range(top + 1), size)
        if rng.random() < 0.15:
            items[0] = items[rng.randrange(size)]
            rng.shuffle(items)
        down = rng.random() < 0.3
        ordered, what = sorted(items, reverse=down), "numbers"
        template = rng.choice(SORT_DOWN if down else SORT_UP)
    elif kind < 0.7:
        items = rng.sample(LOWER, rng.randint(3, 5 + int(5 * full)))
        ordered, what, template = sorted(items), "letters", rng.choice(SORT_ALPHA)
    else:
        items = rng.sample(WORDS, rng.randint(3, 4 + int(2 * full)))
        ordered, what, template = sorted(items), "words", rng.choice(SORT_ALPHA)
    separator = rng.choice((", ", ", ", ", ", " ", ","))
    listed = separator.join(map(str, items))
    if rng.random() < 0.12:
        listed = f"[{listed}]"
    key = f"sort:{template in SORT_DOWN}:{' '.join(map(str, items))}"
    return key, template.format(what=what, list=listed), ", ".join(map(str, ordered))


# --- counting: the answer counts aloud -----------------------------------------------------------------------------------------

COUNT_LETTER = ['How many times does the letter {l} appear in {q}?', "How many {l}'s are in {q}?", "Count the letter {l} in {q}.", "How often does {l} occur in {q}?",
                "How many letters {l} are there in {q}?", "count the {l}s in {q}"]
COUNT_LENGTH = ["How many letters are in {q}?", "How long is the word {q}?", "Count the letters in {q}.", "How many letters does {q} have?",
                "What is the length of {q}?"]
COUNT_ITEMS = ["How many items are in this list: {list}?", "Count the items: {list}", "How many words are there: {list}?", "Count these: {list}",
               "How many things are in the list {list}?"]


def count(rng, stage, exam):
    kind = rng.random()
    word = rng.choice(WORDS) if rng.random() < 0.5 else pseudo_word(rng, rng.randint(1, 4))[:14]
    if kind < 0.45:
        letter = rng.choice(word) if rng.random() < 0.8 else rng.choice(LOWER)
        seen, spelled = 0, []
        for char in word:
            seen += char == letter
            spelled.append(f"{char}{seen}" if char == letter else char)
        shown = rng.choice((letter, letter, f'"{letter}"', f"'{letter}'"))
        user = rng.choice(COUNT_LETTER).format(l=shown, q=quoted(rng, word))
        answer = f"{' '.join(spelled)}. The letter {letter} appears {seen} time{'' if seen == 1 else 's'} in {word}."
        return f"count:{letter}:{word}", user, answer
    if kind < 0.7:
        spelled = " ".join(f"{char}{i}" for i, char in enumerate(word, 1))
        return f"length:{word}", rng.choice(COUNT_LENGTH).format(q=quoted(rng, word)), f"{spelled}. {word} has {len(word)} letters."
    items = rng.sample(WORDS, rng.randint(2, 10))
    listed = rng.choice((", ", ", ", " ")).join(items)
    spelled = ", ".join(f"{i} {item}" for i, item in enumerate(items, 1))
    return f"items:{listed}", rng.choice(COUNT_ITEMS).format(list=listed), f"{spelled}. There are {len(items)} items."


# --- copying -------------------------------------------------------------------------------------------------------------------

COPY = ["Repeat this text exactly:\n{t}", "Copy the following text exactly:\n{t}", "Repeat after me: {t}", "Copy this: {t}", "Write this text again:\n{t}",
        "Echo: {t}", "Please repeat exactly: {t}", "Repeat: {t}", "Say exactly this: {t}", "Copy the passage below, word for word.\n\n{t}"]
UNICODE = "äöüßéèêçñåøæœ¿¡€£§°²µ×÷–—“”„…→←≤≥≠∞∑πλΩжядлω中文字日本語한국🙂🚀🦀🎉"


def passage(rng, length):
    kind = rng.random()
    if kind < 0.55:
        pool = rng.sample(WORDS, 40) if rng.random() < 0.8 else rng.choices(WORDS, k=40)
        marks = rng.random() < 0.4
        parts, size = [], 0
        while size < length:
            word = pool.pop() if rng.random() < 0.5 and pool else pseudo_word(rng)
            if rng.random() < 0.05:
                word = str(rng.randint(0, 9999))
            if marks and rng.random() < 0.15:
                word += rng.choice((",", ".", ";", ":", "!", "?"))
            if rng.random() < 0.08:
                word = word.capitalize()
            if rng.random() < 0.02:
                word += rng.choice(UNICODE)
            parts.append(word)
            size += len(word) + 1
        text = ("\n" if rng.random() < 0.05 else " ").join(parts)
    elif kind < 0.75:
        text = letters(rng, LOWER, length, length)
    elif kind < 0.9:
        text = letters(rng, ALNUM, length, length)
    else:
        text = letters(rng, PRINTABLE, length, length)
    data = text.encode()[:length]
    return data.decode(errors="ignore").strip() or "a"


def copy(rng, stage, exam):
    longest = 40 + int((COPY_LONGEST - 40) * min(1, stage * 3))
    length = rng.randint(*COPY_EXAM) if exam else rng.randint(1, longest) if rng.random() < 0.7 else rng.randint(1, 40)
    text = passage(rng, length)
    template = rng.choice(COPY)
    if rng.random() < 0.2:
        template = template.replace("{t}", '"{t}"')
    return f"copy:{text}", template.replace("{t}", text), text


# --- looking up a key ------------------------------------------------------------------------------------------------------------

LOOKUP = ['What is the value of "{k}" in {j}?', 'Look up "{k}" in this JSON:\n{j}', "{j}\nWhat is {k}?", 'Given {j}, what is "{k}"?', "{j} {k}?",
          'Return the value of the key "{k}":\n{j}', "JSON: {j}\nKey: {k}", "{j}\n\nWhat is the value of {k}?", "Find {k} in {j}", "What is {k} in this object? {j}"]


def lookup(rng, stage, exam):
    keys = rng.sample(WORDS, rng.randint(3, 10))
    pairs = []
    for key in keys:
        kind = rng.random()
        if kind < 0.4:
            value = rng.choice(WORDS)
        elif kind < 0.7:
            value = rng.randint(0, 9999)
        elif kind < 0.85:
            value = letters(rng, ALNUM, 4, 10)
        else:
            value = pseudo_word(rng)
        pairs.append((key, value))
    if rng.random() < 0.15:
        pairs = [(f"{key}_{rng.choice(('id', 'name', 'size', 'code'))}", value) for key, value in pairs]
    style = rng.random()
    data = dict(pairs)
    if style < 0.6:
        text = json.dumps(data)
    elif style < 0.85:
        text = json.dumps(data, separators=(",", ":"))
    else:
        text = json.dumps(data, indent=2)
    key, value = rng.choice(pairs)
    return f"look:{key}:{text}", rng.choice(LOOKUP).replace("{k}", key).replace("{j}", text), str(value)


# --- Lockstep, greetings, anything else --------------------------------------------------------------------------------------------

OPENINGS = ["Please tell me: ", "Quick question: ", "Hi! ", "Hello, ", "Hey, ", "One question: ", "I have a question. ", "Question: ", "Tell me, ",
            "I wonder: ", "Hi, ", "Hello! ", "So, ", "OK, ", "Now: "]
CLOSINGS = [" Thanks.", " Please answer briefly.", " Please.", " Thank you.", " I want to know.", " Thanks!"]


def reword(rng, text):
    """Ordinary ways to type the same sentence."""
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.25:
        text = text.rstrip("?.!")
    elif rng.random() < 0.2:
        text += rng.choice(CLOSINGS)
    if rng.random() < 0.35:
        opening = rng.choice(OPENINGS)
        text = opening + (text[0].lower() + text[1:] if rng.random() < 0.5 and text[:2] not in ("I ", "GE", "PO") else text)
        if rng.random() < 0.2:
            text = text[0].lower() + text[1:]
    return text


def lockstep(rng, stage, exam):
    answer, phrasings = rng.choice(about.ABOUT)
    user = reword(rng, rng.choice(phrasings))
    return f"about:{user}", user, answer


def other(rng, stage, exam):
    kind = rng.random()
    if kind < 0.25:
        pool, answer = rng.choice(((about.GREETINGS, about.GREETING), (about.GREETINGS, about.GREETING), (about.THANKS, about.THANKS_ANSWER),
                                   (about.FAREWELLS, about.FAREWELL_ANSWER)))
        user = rng.choice(pool) + rng.choice(("", "!", ".", "!!", "?", " :)", "..."))
        style = rng.random()
        user = user.capitalize() if style < 0.6 else user.upper() if style < 0.65 else user
    elif kind < 0.37:
        digits = rng.randint(5, 9)
        a, b = number(rng, digits), number(rng, rng.randint(1, 9))
        if rng.random() < 0.5:
            a, b = b, a
        style = rng.random()
        if style < 0.7:
            user = rng.choice(ADD if rng.random() < 0.5 else SUB).format(a=a, b=b)
        else:
            user = rng.choice(MUL).format(a=number(rng, rng.randint(3, 6)), b=number(rng, rng.randint(1, 4)))
        answer = about.TOO_LARGE
    else:
        word, word2 = rng.sample(WORDS, 2)
        user = rng.choice(about.OFF_TOPIC).format(
            country=rng.choice(about.COUNTRIES), city=rng.choice(about.CITIES), city2=rng.choice(about.CITIES), language=rng.choice(about.LANGUAGES),
            subject=rng.choice(about.SUBJECTS), word=word, word2=word2, year=rng.randint(1900, 2100), gibberish=pseudo_word(rng),
            gibberish2=letters(rng, LOWER, 2, 9))
        user, answer = reword(rng, user), about.CANNOT
    return f"other:{user}", user, answer


# Name -> (writer, share of the training conversations).
SKILLS = {
    "arithmetic": (arithmetic, 0.27),
    "reverse": (reverse, 0.15),
    "sort": (sort, 0.17),
    "count": (count, 0.08),
    "copy": (copy, 0.12),
    "lookup": (lookup, 0.08),
    "lockstep": (lockstep, 0.07),
    "other": (other, 0.06),
}
REQUIRED = ("arithmetic", "reverse", "sort", "copy", "lookup")  # the skills that must reach 99 %


def draw(rng, skill, split, stage=1.0):
    """One item of `skill` whose problem belongs to `split`."""
    write = SKILLS[skill][0]
    while True:
        key, user, answer = write(rng, stage, split != "train")
        if key == "train:product":
            if split == "train":
                return Item(skill, key, user, answer)
        elif split_of(key) == split:
            return Item(skill, key, user, answer)


def exam(skill, split, seed, count):
    """`count` different items of the test or validation split."""
    rng = random.Random(f"{seed}:{split}:{skill}")
    items = {}
    while len(items) < count:
        item = draw(rng, skill, split)
        items.setdefault(item.user, item)
    return list(items.values())


# --- conversations as tokens ---------------------------------------------------------------------------------------------------

SYSTEM = ["You are a helpful assistant.", "You are the Lockstep demo model.", "Answer briefly.", "You are a helpful assistant. Answer in English.",
          "Be concise.", "You are a friendly chat model.", "Follow the instructions."]


def encode(turns, system=None):
    """Tokens of a conversation in the ChatML template, and for each token whether the assistant has to produce it."""
    tokens, learned = [], []

    def put(data, flag):
        tokens.extend(data)
        learned.extend([flag] * len(data))

    if system is not None:
        put([IM_START, *b"system\n", *system.encode(), IM_END, 10], 0)
    for user, answer in turns:
        put([IM_START, *b"user\n", *user.encode(), IM_END, 10, IM_START, *b"assistant\n"], 0)
        put([*answer.encode(), IM_END], 1)
        put([10], 0)
    return tokens[:-1], learned[:-1]


def conversation(rng, shares, stage):
    """One training conversation: mostly one turn, sometimes up to four, sometimes with a system message."""
    names = list(SKILLS)
    turns = 1 if rng.random() < 0.85 else rng.randint(2, 4)
    items = [draw(rng, skill, "train", stage) for skill in rng.choices(names, weights=shares, k=turns)]
    if turns > 1:
        items = [item for item in items if len(item.user) < 300] or items[:1]
    system = None
    if rng.random() < 0.15:
        system = rng.choice(SYSTEM) if rng.random() < 0.7 else " ".join(rng.sample(WORDS, rng.randint(2, 8))).capitalize() + "."
    return encode([(item.user, item.answer) for item in items], system)


class Batch(NamedTuple):
    """`rows` x `length` tokens of whole conversations; `ends` are the cumulative lengths of all of them, padded to a fixed size."""

    tokens: np.ndarray
    targets: np.ndarray  # the next token where the assistant produces it, else -100
    positions: np.ndarray
    ends: np.ndarray


def pack(documents, rows, length, ends_size):
    """Packs whole (tokens, learned) pairs from the iterator `documents` into rows; a short tail is left as padding."""
    tokens = np.zeros((rows, length), np.int16)
    targets = np.full((rows, length), -100, np.int16)
    positions = np.zeros((rows, length), np.int16)
    ends, waiting = [0], []
    placed = []
    for row in range(rows):
        used = 0
        while True:
            while len(waiting) < 24:
                found = next(documents, None)
                if found is None:
                    break
                waiting.append(found)
            fits = next((i for i, found in enumerate(waiting) if used + len(found[0]) - 1 <= length), None)
            # Every row still to come may need one end for its padding.
            if fits is None or len(ends) + rows - row + 1 > ends_size:
                break
            found = waiting.pop(fits)
            size = len(found[0]) - 1
            array = np.array(found[0], np.int16)
            tokens[row, used:used + size] = array[:-1]
            targets[row, used:used + size] = np.where(np.array(found[1][1:]), array[1:], -100)
            positions[row, used:used + size] = np.arange(size)
            used += size
            ends.append(row * length + used)
            placed.append(found)
            if length - used < 24:
                break
        if used < length:
            positions[row, used:] = np.arange(length - used)
            ends.append((row + 1) * length)
    ends += [rows * length] * (ends_size - len(ends))
    return Batch(tokens, targets, positions, np.array(ends, np.int32)), placed, waiting


def training_batches(seed, worker, rows, length, ends_size, shares, stage):
    """Endless batches of one worker. `shares()` and `stage()` give the trainer's current mixture and curriculum."""
    rng = random.Random(f"{seed}:train:{worker}")
    left = []
    while True:
        weights, now = shares(), stage()

        def documents():
            yield from left
            while True:
                found = conversation(rng, weights, now)
                if len(found[0]) <= length:
                    yield found

        batch, _, left = pack(documents(), rows, length, ends_size)
        yield batch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skill", choices=SKILLS, default="arithmetic")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for _ in range(args.count):
        print(json.dumps(draw(rng, args.skill, args.split)._asdict(), ensure_ascii=False))


if __name__ == "__main__":
    main()
