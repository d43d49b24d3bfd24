"""A task of pairs for comparison.py, as RTE's: do two messages of BANKING77's customers ask for the same?

Half of the pairs share their intent; the others are of two intents that chance chose. From the training file for training, from
the test file for the test; the same pairs each time.
"""

import random

from fastreft.tasks.sets import Record, find, register
from fastreft.tasks.sets.registry import CLASSIFY

PAIRS = {"train": 4400, "test": 800}


@register("same_intent", kind=CLASSIFY, labels=("different", "same"))
def same_intent(split, folder):
    of_intent = {}
    for record in find("banking77")[0].records(split, folder):
        of_intent.setdefault(record.answer, []).append(record.prompt)
    intents = sorted(of_intent)
    chance = random.Random(split)
    for i in range(PAIRS["train" if split == "train" else "test"]):
        one, other = chance.sample(intents, 2)
        if i % 2:
            yield Record(chance.choice(of_intent[one]), answer="different", pair=chance.choice(of_intent[other]))
        else:
            first, second = chance.sample(of_intent[one], 2)
            yield Record(first, answer="same", pair=second)
