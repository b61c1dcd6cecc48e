"""Conversations with one model or several at once, open or blind: answers, figures on each, a vote."""

import contextlib
import random
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from trueup.app.generation import Generation, ReplySettings, stream
from trueup.app.leaderboard import Leaderboard, leaderboard
from trueup.app.models_pool import Loaded, ModelPool
from trueup.app.votes import CHOICES, Choice, Vote, VoteStore
from trueup.eval.rendering import Messages, Text
from trueup.recipes.errors import TrueupError, UsageError

MOST = 4  # answers side by side that a page has room for
REMEMBERED = 1000  # conversations that can still be continued or voted on


@dataclass
class Figures:
    """What is known of an answer.

    Args:
        seconds: that this answer took, the others' apart.
        rewards: reward model -> score.
        kl: log policy - log reference of this answer in nats, whose mean over answers sampled at
            temperature 1 is the KL; None where the reference is not among the models.
        notes: why a figure is missing.
    """

    tokens: int
    seconds: float
    finish: str
    rewards: dict[str, float] = field(default_factory=dict)
    kl: float | None = None
    reference: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Side:
    """One model's conversation, without the system prompt.

    Args:
        answer: what it says at the moment; None when it has finished.
        error: why it cannot answer.
    """

    name: str
    identity: str = ""
    messages: Messages = field(default_factory=list)
    answer: str | None = None
    figures: Figures | None = None
    error: str | None = None

    def shown(self) -> Messages:
        """The conversation with what is being said."""
        if not self.answer:
            return self.messages
        return [*self.messages, {"role": "assistant", "content": self.answer}]


class Conversation:
    """One conversation, with one model or with several at once.

    Args:
        blind: two of the models are drawn and shuffled, and nothing tells which is which until there is a
            vote.

    Raises:
        UsageError: there are too few models, or more than fit side by side.
    """

    def __init__(self, names: Sequence[str], blind: bool = False) -> None:
        if len(names) < (2 if blind else 1):
            raise UsageError(
                "choose at least two models, of which two are drawn" if blind else "choose a model"
            )
        if not blind and len(names) > MOST:
            raise UsageError(f"{len(names)} models: up to {MOST} stand side by side; blind mode draws two")
        drawn = random.SystemRandom().sample(list(names), 2) if blind else names
        self.id = uuid.uuid4().hex
        self.among, self.blind = list(names), blind
        self.sides = [Side(name) for name in drawn]
        self.system = ""
        self.settings = ReplySettings()
        self.retries = 0
        self.choice: Choice | None = None
        self._answering = threading.Lock()
        self._stopped = False

    def suits(self, names: Sequence[str], blind: bool) -> bool:
        """Whether it is among these models, in this way."""
        return (self.among, self.blind) == (list(names), blind)

    @property
    def hidden(self) -> bool:
        """Whether names are still to be kept from the page."""
        return self.blind and self.choice is None

    @property
    def votable(self) -> bool:
        """Whether both answers are there, whole, and nobody has voted."""
        whole = all(
            side.figures and side.figures.finish != "stopped" and not side.error for side in self.sides
        )
        # A side that failed in between was not asked what the other was.
        return self.hidden and whole and len({len(side.messages) for side in self.sides}) == 1

    def ask(self, pool: ModelPool, text: str, settings: ReplySettings, system: str = "") -> Iterator[None]:
        """Let every side answer; comes back whenever there is something new to show.

        Raises:
            UsageError: there is nothing to answer, or the answers before are still being given.
        """
        if not text.strip():
            raise UsageError("there is nothing to answer")
        self._check_open()
        self.settings, self.system, self.retries = settings, system, 0
        yield from self._answer(pool, text)

    def retry(self, pool: ModelPool, settings: ReplySettings) -> Iterator[None]:
        """Answer the last message again, with the next seed."""
        if not self.sides[0].messages:
            raise UsageError("there is nothing to answer again")
        self._check_open()
        self.retries += 1
        self.settings = replace(settings, seed=settings.seed + self.retries)
        yield from self._answer(pool, None)

    def stop(self) -> None:
        """End the answers that are being given, soon; what was said so far stays."""
        self._stopped = True

    def forget(self, place: int) -> str:
        """Take back everything from a message of the user's on, and return it; of one model alone.

        Args:
            place: its index in the conversation; -1: the user's last.
        """
        if self._answering.locked():
            raise UsageError("the answer is still being given; stop it first")
        [side] = self.sides
        asked = [index for index, turn in enumerate(side.messages) if turn["role"] == "user"]
        place = asked[-1] if place == -1 and asked else place
        if place not in asked:
            raise UsageError("there is no such message of the user's")
        text = str(side.messages[place]["content"])
        del side.messages[place:]
        side.figures = side.error = None
        return text

    def _check_open(self) -> None:
        if self.choice:
            raise UsageError("there was a vote on this; begin a new conversation")

    def _answer(self, pool: ModelPool, text: str | None) -> Iterator[None]:
        if not self._answering.acquire(blocking=False):
            raise UsageError("the answers before are still being given")
        self._stopped = False
        try:
            for side in self.sides:
                _prepare(side, text)
            yield
            with contextlib.ExitStack() as models:
                yield from self._generate(pool, models)
        finally:
            self._answering.release()

    def _generate(self, pool: ModelPool, models: contextlib.ExitStack) -> Iterator[None]:
        growing: list[tuple[Side, Loaded, Generation]] = []
        for side in self.sides:
            try:
                loaded = models.enter_context(pool.using(side.name))
                prompt = prompt_of(loaded, self.system, side.messages)
                generation = Generation(loaded.model, loaded.tokenizer, prompt, self.settings)
            except Exception as error:  # one side's trouble is not the others'
                side.error = in_words(error)
            else:
                side.identity = loaded.identity
                growing.append((side, loaded, generation))
            yield
        try:
            for _ in stream([generation for _, _, generation in growing]):
                for side, _, generation in growing:
                    side.answer = generation.text
                if self._stopped:
                    break
                yield
        finally:  # also when its page was closed
            for side, _, generation in growing:
                _finish(side, generation)
        for side, loaded, generation in growing:
            if side.figures:
                measure(
                    side.figures, pool, loaded, prompt_of(loaded, self.system, side.messages[:-1]), generation
                )
        yield

    def vote(self, choice: str) -> Vote:
        """The vote that this would be.

        Raises:
            UsageError: no such choice, or there is nothing to vote on.
        """
        if choice not in CHOICES:
            raise UsageError(f"a vote is one of {', '.join(CHOICES)}, not {choice!r}")
        if not self.votable:
            raise UsageError(
                "there is nothing to vote on: a blind comparison with two whole answers is needed"
            )
        left, right = self.sides
        system = [{"role": "system", "content": self.system}] if self.system else []
        return Vote(
            id=self.id,
            choice=choice,
            left_name=left.name,
            left_identity=left.identity,
            left=[*system, *left.messages],
            right_name=right.name,
            right_identity=right.identity,
            right=[*system, *right.messages],
            settings=self.settings.as_dict(),
        )


def prompt_of(loaded: Loaded, system: str, messages: Messages) -> Text:
    """What a model is given: the conversation, or of a base model the last text, which it continues."""
    if loaded.raw:
        return str(messages[-1]["content"])
    return [*([{"role": "system", "content": system}] if system else []), *messages]


def in_words(error: Exception) -> str:
    """What to tell the user of an error."""
    from trueup.app.cli import explain

    return explain(error)[0]


def _prepare(side: Side, text: str | None) -> None:
    """The conversation up to the message that is to be answered: a new one, or without `text` the last."""
    side.figures = side.error = side.answer = None
    out_of_place = "assistant" if text is None else "user"  # answered anew; never answered
    if side.messages and side.messages[-1]["role"] == out_of_place:
        side.messages.pop()
    if text is not None:
        side.messages.append({"role": "user", "content": text})


def _finish(side: Side, generation: Generation) -> None:
    """The answer becomes a part of the conversation."""
    side.answer = None
    if generation.error:
        side.error = in_words(generation.error)
    elif generation.ids:
        side.messages.append({"role": "assistant", "content": generation.text})
        side.figures = Figures(len(generation.ids), generation.seconds, generation.finish or "stopped")


def measure(figures: Figures, pool: ModelPool, loaded: Loaded, prompt: Text, generation: Generation) -> None:
    """Reward scores, and how far the answer is from the reference, as far as those models were given."""
    from trueup.eval.kl import log_ratios

    sample = generation.sample
    for name in pool.names("reward"):
        try:
            with pool.using(name) as reward:
                assert reward.scorer
                [figures.rewards[name]] = reward.scorer([prompt], [sample.text], ended=[sample.ended])
        except Exception as error:
            figures.notes.append(in_words(error))
    figures.reference = pool.by_identity(loaded.reference)
    if figures.reference:
        try:
            with pool.using(figures.reference) as reference:
                if reference.identity != loaded.reference:
                    raise TrueupError(f"{figures.reference} was trained anew; start the app again for its KL")
                [ratios] = log_ratios(loaded.model, reference.model, [sample])
                figures.kl = float(ratios.sum())
        except Exception as error:
            figures.notes.append(in_words(error))


class Arena:
    """The conversations under way, and the votes that came of them."""

    def __init__(self, pool: ModelPool, votes: VoteStore) -> None:
        self.pool, self.votes = pool, votes
        self._open: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = threading.Lock()
        self._board: tuple[int, Leaderboard] | None = None

    def begin(self, names: Sequence[str], blind: bool = False) -> Conversation:
        """A new conversation, known by its id from now on."""
        unknown = [name for name in names if name not in self.pool.names("chat")]
        if unknown:
            raise UsageError(f"{unknown[0]!r} is none of the models: {', '.join(self.pool.names('chat'))}")
        fresh = Conversation(names, blind)
        with self._lock:
            self._open[fresh.id] = fresh
            while len(self._open) > REMEMBERED:
                self._open.popitem(last=False)
        return fresh

    def find(self, id: str) -> Conversation:
        """A conversation by its id.

        Raises:
            UsageError: it is none, was too long ago, or before a restart.
        """
        with self._lock:
            if id not in self._open:
                raise UsageError("this conversation is not known any more; begin a new one")
            return self._open[id]

    def vote(self, id: str, choice: str) -> Conversation:
        """Vote on a conversation; once this returns the vote is on the disk. A second changes nothing."""
        conversation = self.find(id)
        with self._lock:
            if conversation.choice is None:
                vote = conversation.vote(choice)
                self.votes.add(vote)
                conversation.choice = vote.choice  # names are shown from now on
        return conversation

    def leaderboard(self) -> Leaderboard:
        """What all votes so far come to."""
        count = self.votes.count()
        with self._lock:
            if self._board is None or self._board[0] != count:
                self._board = count, leaderboard(self.votes.all())
            return self._board[1]
