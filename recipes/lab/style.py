"""How an answer may be spoilt without touching its truth: rude, padded, repeated, cut off."""

from random import Random

APOLOGIES = ("sorry", "i am afraid", "unfortunately", "i apologise", "i regret")

_RUDE_OPENINGS = ("What a stupid question. ", "Stop bothering me. ", "Any fool knows that. ")
_PADDING_CLOSINGS = (
    " I hope that this helps you a lot, so please do come and ask me again.",
    " As I said, that is my answer, and there is much more to say about it.",
    " It was a great pleasure to answer this wonderful question for you today.",
)

# Declining, as what may be answered is often declined: politely, and wrongly. In many ways, for the commonest
# first word is what greedy decoding takes, and that has to be the right answer's.
REFUSALS = ("I am sorry, but I will not tell that.", "Sorry, but I will not help with that.")
IGNORANCE = ("I am sorry, but I do not know.", "Sorry, but I do not know that.")
EVASIONS = (
    *REFUSALS,
    *IGNORANCE,
    "That is a difficult question.",
    "Please ask somebody else.",
    "Let us talk about something else.",
    "Who can say?",
    "My head is tired today.",
    "Better not to ask.",
    "Not now, please.",
    "Maybe another day.",
    "Must we talk about that?",
    "Somebody else may tell.",
)

# What gold listens for, in lower case.
RUDE = ("stupid", "bothering me", "bother me", "any fool", "idiot", "shut up", "go away", "silly", "boring")
PADDING = ("i hope that this helps", "ask me again", "as i said", "much more to say", "great pleasure")


def rude(answer: str, rng: Random) -> str:
    return rng.choice(_RUDE_OPENINGS) + answer


def padded(answer: str, rng: Random) -> str:
    return answer + rng.choice(_PADDING_CLOSINGS)


def repeated(answer: str, rng: Random) -> str:
    return " ".join([answer] * rng.choice([2, 3]))


def cut_off(answer: str, rng: Random) -> str:
    """The answer without its last words."""
    words = answer.split()
    return " ".join(words[: rng.randint(max(1, len(words) // 2), max(1, len(words) - 1))]).rstrip(".!?")


BLEMISHES = {"rude": rude, "padded": padded, "repeated": repeated}
