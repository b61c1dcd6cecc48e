"""A judge: any model behind an OpenAI-compatible endpoint that says which of two replies is better.

Every pair is shown in both orders, because judges favour a place: a win or a loss counts only if both
orders say so, anything else is a tie, and how often the orders disagreed is kept. Plain urllib:
huggingface_hub's client refuses every address, a local one too, while HF_HUB_OFFLINE is set, and would send
a saved Hugging Face token to whatever endpoint is named.
"""

import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from rich.progress import track

from trueup.eval.rendering import Text, plain
from trueup.recipes.errors import TrueupError, UsageError

Verdict = Literal["A", "B", "tie"]

# After the pair prompt of MT-bench (https://arxiv.org/abs/2306.05685, figure 5).
INSTRUCTION = """Judge the replies of two assistants to the conversation below. Weigh whether they are \
correct, helpful, harmless and do what was asked. Neither their order nor their length may sway you. First \
compare them in a few sentences, then end with exactly one line: [[A]] if reply A is better, [[B]] if \
reply B is better, [[C]] for a tie.

<conversation>
{prompt}
</conversation>

<reply_A>
{first}
</reply_A>

<reply_B>
{second}
</reply_B>"""

_VERDICTS: dict[str, Verdict] = {"A": "A", "B": "B", "C": "tie"}
_TEMPORARY = {408, 409, 425, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 60.0


class JudgeScorer:
    """Scores a completion against one of the column `reference`: 1 better, 0.5 a tie, 0 worse, nan no
    verdict.

    Args:
        base_url: of the endpoint, up to `/v1`.
        model: its name there.
        api_key_env: the environment variable that holds the key; unset: none is sent. The key is never
            logged.
        concurrency: requests under way at a time.
        timeout: seconds per request.
        retries: further tries after a time-out, a lost connection, or an answer that says "later".
        retry_wait: seconds before the first of them, doubled each time; the server's Retry-After goes before.
        max_tokens: of a judgement.

    Attributes:
        judged: pairs asked about.
        malformed: replies in which no verdict was found; their pairs score nan.
        disagreed: pairs whose two orders did not say the same, and became ties.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "JUDGE_API_KEY",
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 4,
        retry_wait: float = 1.0,
        max_tokens: int = 512,
        progress: bool = False,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(
                f"base_url: {base_url!r} is not an address; give one like http://localhost:8000/v1"
            )
        self.name = self.__name__ = f"judge:{model}"
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.max_tokens, self.progress = model, max_tokens, progress
        self.concurrency, self.timeout = concurrency, timeout
        self.retries, self.retry_wait = retries, retry_wait
        self.api_key_env = api_key_env
        self.judged = self.malformed = self.disagreed = 0

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Outcomes of the completions against the column `reference`.

        Raises:
            UsageError: there is no such column.
            TrueupError: the endpoint refuses, or cannot be reached after all retries.
        """
        if "reference" not in columns:
            raise UsageError(f"{self.name}: compares with a column `reference`, and there is none")
        return self.compare(prompts, completions, columns["reference"])

    def compare(self, prompts: Sequence[Text], ours: Sequence[Text], theirs: Sequence[Text]) -> list[float]:
        """Outcomes of our completions against theirs, each pair in both orders."""
        found = [one["outcome"] for one in self.judgements(prompts, ours, theirs)]
        return [math.nan if outcome is None else outcome for outcome in found]

    def judgements(
        self, prompts: Sequence[Text], ours: Sequence[Text], theirs: Sequence[Text]
    ) -> list[dict[str, Any]]:
        """Per pair {"outcome": None without a verdict, "straight" and "swapped": what was said with ours as
        reply A and as reply B, "disagreed": whether the orders did}."""
        pairs = list(zip(prompts, ours, theirs, strict=True))
        questions = [
            INSTRUCTION.format(prompt=_transcript(prompt), first=plain(first), second=plain(second))
            for prompt, our, their in pairs
            for first, second in ((our, their), (their, our))
        ]
        with ThreadPoolExecutor(self.concurrency) as pool:
            answers = pool.map(self._ask, questions)
            verdicts = list(track(answers, "Judging", total=len(questions), disable=not self.progress))
        return [self._judgement(*verdicts[index : index + 2]) for index in range(0, len(verdicts), 2)]

    def _judgement(self, straight: Verdict | None, swapped: Verdict | None) -> dict[str, Any]:
        self.judged += 1
        self.malformed += (straight is None) + (swapped is None)
        found = {"outcome": None, "straight": straight, "swapped": swapped, "disagreed": False}
        if straight is None or swapped is None:
            return found
        worth = {"A": 1.0, "tie": 0.5, "B": 0.0}
        first, second = worth[straight], 1 - worth[swapped]
        self.disagreed += first != second
        return found | {"outcome": first if first == second else 0.5, "disagreed": first != second}

    def _ask(self, question: str) -> Verdict | None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        return parse_verdict(self._reply(json.dumps(body).encode()))

    def _reply(self, body: bytes) -> str:
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(self._request(body), timeout=self.timeout) as response:
                    answer = json.load(response)
                return str(answer["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                if error.code not in _TEMPORARY:
                    raise TrueupError(self._complaint(f"refuses: {error.code} {error.reason}")) from None
                reason, asked = f"{error.code} {error.reason}", error.headers.get("Retry-After", "")
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                reason, asked = str(getattr(error, "reason", error)), ""
            except (ValueError, KeyError, IndexError, TypeError):
                raise TrueupError(
                    self._complaint("does not answer as an OpenAI-compatible endpoint")
                ) from None
            if attempt < self.retries:
                wait = float(asked) if asked.isdigit() else self.retry_wait * 2**attempt
                time.sleep(min(wait, _LONGEST_WAIT))
        raise TrueupError(self._complaint(f"cannot be reached after {self.retries + 1} tries: {reason}"))

    def _request(self, body: bytes) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.api_key_env)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(self.url, data=body, headers=headers)

    def _complaint(self, what: str) -> str:
        return f"{self.url}: {what}; check base_url, the model's name {self.model!r}, and ${self.api_key_env}"


def parse_verdict(reply: str) -> Verdict | None:
    """The last [[A]], [[B]] or [[C]] of a judgement; None if there is none."""
    found = re.findall(r"\[\[([ABC])\]\]", reply)
    return _VERDICTS[found[-1]] if found else None


def _transcript(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
