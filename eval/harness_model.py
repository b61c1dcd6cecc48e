"""A model as lm-eval asks it: its questions become tokens just as the model met them in training.

    lm_eval.evaluator.evaluate(HarnessModel(model, tokenizer), tasks)

lm-eval's own `hf` model differs in what matters here: it puts a bos before rolling text and then scores that
bos, which no model has learned; it fails on an answer longer than the context; it cuts long questions and
tells nobody how many; it lets a reply run on behind its end of turn; and it ties weights anew, which breaks
an adapter in training. Where none of this plays a part, the scores are the same.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jinja2.exceptions import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import track

from trueup.eval.kl import CHUNK_ELEMENTS
from trueup.eval.sampler import eos_ids, token_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tokens = list[int]
Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH_SIZE = {"cpu": 16}  # small batches of alike lengths waste no time on padding; elsewhere:
GPU_BATCH_SIZE = 64


@dataclass
class Lengths:
    """How the requests fitted the model's context.

    Args:
        requests: how many there were.
        truncated: of those, how many lost their beginning.
        tokens_lost: the tokens cut off.
        in_pieces: texts and answers longer than the context, scored in pieces that begin with the last token
            of the one before.
        shortened: replies that could not be as long as the task allows.
    """

    requests: int = 0
    truncated: int = 0
    tokens_lost: int = 0
    in_pieces: int = 0
    shortened: int = 0


class HarnessModel(TemplateLM):
    """A causal language model behind lm-eval's interface.

    Args:
        batch_size: requests in one forward; memory and speed alone.
        add_bos_token: whether a text begins with bos (eos, where there is no bos). Default: as it did in
            training. Pretraining here always puts it; of a foreign model its tokenizer decides.
        progress: show a bar, on stderr.

    Attributes:
        lengths: counts since they were last set to `Lengths()`.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        batch_size: int | None = None,
        add_bos_token: bool | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        # Whatever is done to sys.stderr while lm-eval is at work: the bar goes to where it is now.
        self.console = Console(file=sys.stderr, quiet=not (progress and sys.stderr.isatty()))
        self._device = next(model.parameters()).device
        self.batch_size = batch_size or BATCH_SIZE.get(self._device.type, GPU_BATCH_SIZE)
        if add_bos_token is None:
            own = tokenizer("a")["input_ids"][:1] == [self.prefix_token_id]
            add_bos_token = own or model.config.model_type == "trueup_gpt"
        self.add_bos_token = add_bos_token
        config = model.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length)
        self.lengths = Lengths()

    # -------------------------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int:
        """What ends a document or a turn."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a document."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's records."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Tokens:
        """The tokens of a text; bos before it unless it has one already, as a rendered conversation has."""
        ids = list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])
        begins = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id, *ids] if begins and ids[:1] != [self.prefix_token_id] else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; one that ends with the assistant is continued.

        Where a template knows no system turn, what it would say stands before the user's first words.
        """
        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return str(render(chat_history))
        except TemplateError:
            if chat_history[0]["role"] != "system":
                raise
            system, user, *rest = chat_history
            asked = user | {"content": f"{system['content']}\n\n{user['content']}"}
            return str(render([asked, *rest]))

    # ----------------------------------------------------------------------------------- log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding says just that) of each answer to its context."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of each text, from its first token on; its end is not scored."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        return [
            nats
            for nats, _ in self._loglikelihood_tokens([(None, [self.prefix_token_id], ids) for ids in texts])
        ]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, Tokens, Tokens]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows: list[tuple[Tokens, Tokens]] = []
        parts: list[int] = []  # rows of each request
        for _, context, answer in requests:
            pieces = self._fitted(context, answer)
            rows += pieces
            parts.append(len(pieces))
        scored = iter(self._in_order(rows, lambda row: len(row[0]) + len(row[1]), self._scores, "Scoring"))
        found = []
        for count in parts:
            pieces_scored = [next(scored) for _ in range(count)]
            nats = sum(nats for nats, _ in pieces_scored)
            found.append((nats, all(greedy for _, greedy in pieces_scored)))
        return found

    def _fitted(self, context: Tokens, answer: Tokens) -> list[tuple[Tokens, Tokens]]:
        """The request as rows of at most `max_length` + 1 tokens, the last of which is only predicted."""
        self.lengths.requests += 1
        context = context or [self.prefix_token_id]
        kept = context[-max(1, self.max_length + 1 - len(answer)) :]
        self.lengths.truncated += len(kept) < len(context)
        self.lengths.tokens_lost += len(context) - len(kept)
        if len(answer) <= self.max_length:
            return [(kept, answer)] if answer else []
        self.lengths.in_pieces += 1
        windows = get_rolling_token_windows(answer, kept[-1], self.max_length, 1)
        return [make_disjoint_window(window) for window in windows]

    @torch.no_grad()
    def _scores(self, rows: list[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """One forward, or as many as it takes for the logits to fit in memory.

        Rows are padded on the right, where causal attention does not look.
        """
        width = max(len(context) + len(answer) - 1 for context, answer in rows)
        first = min(len(context) - 1 for context, _ in rows)  # logits exist from here on alone
        budget = CHUNK_ELEMENTS.get(self._device.type, 1 << 23)
        most = max(1, budget // ((width - first) * self.model.config.get_text_config().vocab_size))
        if len(rows) > most:
            starts = range(0, len(rows), most)
            return [score for start in starts for score in self._scores(rows[start : start + most])]
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        targets = torch.zeros_like(ids)
        places = []
        for row, (context, answer) in enumerate(rows):
            tokens = context + answer
            ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            places.append(slice(len(context) - 1 - first, len(tokens) - 1 - first))
            targets[row, len(context) - 1 : len(tokens) - 1] = torch.tensor(answer)
        outputs = self.model(input_ids=ids.to(self._device), use_cache=False, logits_to_keep=width - first)
        logits, targets = outputs.logits.float(), targets[:, first:].to(self._device)
        nats = token_log_probs(logits, targets).double().cpu()
        greedy = (logits.argmax(dim=-1) == targets).cpu()
        return [(float(nats[row, at].sum()), bool(greedy[row, at].all())) for row, at in enumerate(places)]

    # ------------------------------------------------------------------------------------------- replies

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to a stop string, its end of turn or the length.

        A reply never takes more than half of the context: the question needs room too.
        """
        by_settings: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(place)
        found: dict[int, str] = {}
        for places in by_settings.values():
            settings = dict(normalize_gen_kwargs(requests[places[0]].args[1], default_max_gen_toks=256))
            allowed = settings.pop("max_gen_toks")
            length = min(allowed, self.max_length // 2)
            self.lengths.shortened += len(places) if length < allowed else 0
            prompts = [self._prompt(requests[place].args[0], self.max_length - length) for place in places]
            run = partial(self._replies, length=length, settings=settings)
            replies = self._in_order(prompts, len, run, "Generating")
            found |= dict(zip(places, replies, strict=True))
        return [found[place] for place in range(len(requests))]

    def _prompt(self, text: str, room: int) -> Tokens:
        ids = self.tok_encode(text)
        self.lengths.requests += 1
        self.lengths.truncated += len(ids) > room
        self.lengths.tokens_lost += max(0, len(ids) - room)
        return ids[-room:]

    @torch.no_grad()
    def _replies(self, rows: list[Tokens], length: int, settings: dict[str, Any]) -> list[str]:
        """One batch, padded on the left, where the mask hides it."""
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        stop = [text for text in settings["until"] if text]
        pad = self.tokenizer.pad_token_id
        unused = {"until"} if settings["do_sample"] else {"until", "temperature"}
        made = self.model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=length,
            eos_token_id=sorted(eos_ids(self.model, self.tokenizer)),
            pad_token_id=self.eot_token_id if pad is None else pad,
            use_cache=True,
            **({"stop_strings": stop, "tokenizer": self.tokenizer} if stop else {}),
            **{name: value for name, value in settings.items() if name not in unused},
        )
        texts = self.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        return [postprocess_generated_text(text, stop, None) for text in texts]

    # -------------------------------------------------------------------------------------------- batches

    def _in_order(
        self,
        items: Sequence[Item],
        length: Callable[[Item], int],
        run: Callable[[list[Item]], list[Result]],
        title: str,
    ) -> list[Result]:
        """`run` on batches of items, the longest first; the results in the order of the items."""
        order = sorted(range(len(items)), key=lambda place: -length(items[place]))
        starts = range(0, len(order), self.batch_size)
        found: dict[int, Result] = {}
        for start in track(starts, title, console=self.console, transient=True):
            places = order[start : start + self.batch_size]
            found |= dict(zip(places, run([items[place] for place in places]), strict=True))
        return [found[place] for place in range(len(items))]
