"""The pairs stage: a model answers prompts several times over, and its answers are compared by a scorer."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, get_args

from trueup.base.data import DataArguments, Split, data_fingerprint, data_parents, load_data
from trueup.base.hub_keys import HubArguments, hub_contradictions
from trueup.base.stage import key
from trueup.eval.rendering import encode_prompt
from trueup.eval.sampler import SamplingSettings
from trueup.eval.scorers import Scorer, resolve_scorer
from trueup.eval.validation import scorer_parents
from trueup.preference.pairs_card import make_card
from trueup.preference.pairs_rows import SplitRows, best_rows, preference_rows
from trueup.preference.pairs_rules import RULES, Labeller, Rule
from trueup.preference.pairs_samples import Candidates, CandidateSampler, Labels, Row, split_seed
from trueup.recipes.directory import Kind, write_json
from trueup.recipes.errors import TrueupError
from trueup.recipes.hub import names_model
from trueup.recipes.run import Run, is_main_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPLITS: tuple[Split, ...] = get_args(Split)
# Figures of the card that stand in trueup.json too.
RECORDED = ("rows", "ties", "score_mean", "score_best_mean", "chosen_longer", "label_ceiling", "sft_overlap")


@dataclass
class PairsRecipe(HubArguments, DataArguments):
    """Sample answers from a model, score them, and write pairs of them, or the best ones."""

    output_dir: str = key("", "Directory of data to write.", required=True)
    model_name_or_path: str | None = key(None, "Model directory to sample from.", required=True)

    # What is written
    output_form: str = key(
        "preference",
        "preference: pairs, for reward, dpo and kto; prompt_completion: the best answer to each prompt, "
        "for sft.",
        choices=["preference", "prompt_completion"],
    )
    prompts_per_split: dict[str, int | None] = field(
        default_factory=lambda: dict.fromkeys(SPLITS),
        metadata={"help": "The splits to write, and of each how many prompts, drawn at random; null: all."},
    )
    min_score: float | None = key(None, "prompt_completion: leave out best answers that score below.")

    # Sampling
    num_generations: int = key(4, "Completions sampled of each prompt.")
    max_completion_length: int = key(256, "A completion of so many tokens is cut, and not used.")
    temperature: float = key(1.0, "Divides the logits.")
    top_k: int = key(0, "Sample among the k likeliest tokens; 0: all.")
    top_p: float = key(1.0, "Sample among the likeliest tokens of so much probability together; 1: all.")
    generation_batch_size: int = key(128, "Completions sampled together on each device.")

    # Scoring and pairing
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "What scores the answers: reward model directories, module:function, gold, judge.",
            "required": True,
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight for each of reward_funcs in the sum; default: all 1."}
    )
    judge_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "For the judge: base_url of an OpenAI-compatible endpoint, model, concurrency, ..."
        },
    )
    pairing: str = key(
        "best_worst",
        "Which of a prompt's answers are compared: the best with the worst (then the second best with the "
        "second worst, ...), two at random, or two at random whose scores differ by min_margin (margin).",
        choices=list(RULES),
    )
    pairs_per_prompt: int = key(1, "Pairs made of one prompt's answers, at most.")
    min_margin: float = key(0.0, "pairing: margin: the least difference of scores.")
    label_temperature: float | None = key(
        None,
        "The higher score is chosen with probability sigmoid(difference / this), as Bradley and Terry have "
        "it; null: always.",
    )
    label_flip: float = key(0.0, "Probability that a label is then turned round.")

    seed: int = key(42, "Decides prompts, samples, comparisons and labels.")
    use_cpu: bool = key(False, "Sample on the CPU even if there is an accelerator.")
    bf16: bool = key(False, "Compute in bfloat16.")

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        given = {name: value for name, value in given.items() if value is not None}
        found = [(name, message) for name, wrong, message in _out_of_range(given) if wrong]
        if given.get("output_form", "preference") == "preference":
            found += _of_pairs(given)
        else:
            found += [
                (name, "is for pairs; delete it, or output_form")
                for name in ("pairing", "pairs_per_prompt", "min_margin", "label_temperature", "label_flip")
                if name in given
            ]
        names, weights = given.get("reward_funcs", []), given.get("reward_weights")
        if weights is not None and len(weights) != len(names):
            found.append(("reward_weights", f"has {len(weights)} weights for {len(names)} rewards"))
        if "judge" in names and not {"base_url", "model"} <= set(given.get("judge_kwargs", ())):
            found.append(("judge_kwargs", "must name the judge's base_url and model"))
        if "judge_kwargs" in given and "judge" not in names:
            found.append(("judge_kwargs", "is read with judge among reward_funcs; add that, or delete it"))
        return found + hub_contradictions(given)

    def parents(self) -> dict[str, tuple[str, Kind | None]]:
        """The model that is sampled, reward models, and prompts that a stage wrote."""
        return {
            "model_name_or_path": (str(self.model_name_or_path), "causal-lm"),
            **scorer_parents(self.reward_funcs, "reward_funcs"),
            **data_parents(self),
        }

    def data(self) -> list[dict[str, Any]]:
        """Fingerprints of the prompts."""
        return [data_fingerprint(self, split) for split in self._splits()]

    def run(self, run: Run) -> None:
        """Sample, score, pair, and publish the directory."""
        import torch
        from accelerate import PartialState

        from trueup.eval.loading import load_policy

        state = PartialState(cpu=self.use_cpu)
        state.wait_for_everyone()  # the first process has emptied the work directory, if it was another's
        model, tokenizer = load_policy(str(self.model_name_or_path))
        prompts: dict[str, list[Row]] = {}
        too_long: dict[str, int] = {}
        for split in self._splits():
            prompts[split], too_long[split] = self._prompts(split, model, tokenizer)
        autocast = torch.bfloat16 if self.bf16 else None
        sampler = CandidateSampler(
            model=model.to(state.device),
            tokenizer=tokenizer,
            labels=Labels(self._scorers(state.device.type, autocast), self.reward_weights),
            settings=self._settings(),
            num_generations=self.num_generations,
            folder=_made(run.work_dir / "samples"),
            autocast=autocast,
        )
        drawn = sampler.draw(prompts)
        if is_main_process():
            found = {name: self._rows(name, prompts[name], drawn[name]) for name in prompts}
            for name, one in found.items():
                one.too_long = too_long[name]
            self._publish(run, found, sum(n for one in drawn.values() for c in one for n in c.lengths))

    def _splits(self) -> tuple[Split, ...]:
        return tuple(split for split in SPLITS if split in self.prompts_per_split)

    def _settings(self) -> SamplingSettings:
        return SamplingSettings(
            max_new_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            batch_size=self.generation_batch_size,
        )

    def _scorers(self, device: str, autocast: Any) -> list[Scorer]:
        found = []
        for place, name in enumerate(self.reward_funcs or []):
            options: dict[str, Any] = {"device": device, "autocast": autocast} if names_model(name) else {}
            options = dict(self.judge_kwargs or {}) if name == "judge" else options
            found.append(resolve_scorer(name, f"reward_funcs[{place}]", **options))
        return found

    def _prompts(
        self, split: Split, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
    ) -> tuple[list[Row], int]:
        """A split's prompts drawn at random, each with room for a completion; and how many had none."""
        reports: list[Any] = []
        rows: Any = load_data(self, split, "prompt", reports)
        wanted = self.prompts_per_split[split] or len(rows)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 31
        room = context - self.max_completion_length
        order = list(range(len(rows)))
        Random(f"{self.seed} prompts {split}").shuffle(order)
        kept, too_long = list[Row](), 0
        for place in order:
            if len(kept) == wanted:
                break
            row = rows[place]
            fits = len(encode_prompt(tokenizer, row["prompt"])) <= room
            kept += [row] if fits else []
            too_long += not fits
        if not kept:
            raise TrueupError(
                f"{split}: no prompt leaves room for {self.max_completion_length} tokens in the model's "
                f"context of {context}; lower max_completion_length, or choose shorter prompts"
            )
        lines = [*map(str, reports)]
        if too_long:
            lines.append(f"{split}: left out {too_long:,} prompts of over {room:,} tokens")
        if self.prompts_per_split[split] and len(kept) < wanted:
            lines.append(f"{split}: {wanted:,} prompts are asked for, and there are {len(kept):,}")
        if is_main_process():
            print(*lines, sep="\n", flush=True)
        return kept, too_long

    def _rows(self, split: str, prompts: list[Row], drawn: list[Candidates]) -> SplitRows:
        if self.output_form == "prompt_completion":
            found = best_rows(prompts, drawn, self.min_score)
            fix = "lower min_score, or sample more"
        else:
            rule: Rule = self.pairing  # type: ignore[assignment]  # the reader has checked it
            labeller = Labeller(self.label_temperature, self.label_flip)
            seed = f"{self.seed} pairs {split}"
            count, margin = self.pairs_per_prompt, self.min_margin
            found = preference_rows(prompts, drawn, rule, labeller, count, margin, seed)
            fix = "a scorer must tell answers apart, and answers must differ: see temperature, min_margin"
        if not found.rows:
            raise TrueupError(
                f"{split}: of {found.completions:,} completions no row is left: {found.cut:,} were cut at "
                f"max_completion_length, {found.empty:,} empty, {found.unscored:,} without a score (nan); "
                f"of what could be compared {found.ties:,} were ties, {found.close:,} below min_margin; {fix}"
            )
        return found

    def _publish(self, run: Run, found: dict[str, SplitRows], tokens: int) -> None:
        card = make_card(self._made(run), found, run.parents["model_name_or_path"])

        def save(path: Path) -> None:
            for split, one in found.items():
                with (path / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in one.rows)
            write_json(path / "card.json", card.as_dict())
            (path / "README.md").write_text(card.page(), encoding="utf-8")

        metrics = {
            f"{split}_{name}": float(value)
            for split, figures in card.splits.items()
            for name, value in figures.items()
            if name in RECORDED and isinstance(value, int | float)
        }
        seeds = {"seed": self.seed} | {split: split_seed(self.seed, split) for split in found}
        run.publish(save, metrics, tokens=tokens, seeds=seeds)
        shutil.rmtree(run.work_dir / "samples")
        print(*card.table(), sep="\n", flush=True)

    def _made(self, run: Run) -> dict[str, Any]:
        """How the data came about, for the card."""
        start = run.parents["model_name_or_path"]
        made = {
            "form": self.output_form,
            "model": f"{start.name} ({start.identity[:12]})",
            "prompts": self.dataset_name or "a mixture",
            "sampling": f"{self.num_generations} completions at temperature {self.temperature:g}",
            "scored_by": ", ".join(self.reward_funcs or []),
        }
        if self.output_form == "preference":
            margin = f" of {self.min_margin:g}" if self.pairing == "margin" else ""
            made["pairing"] = f"{self.pairing}{margin}, {self.pairs_per_prompt} per prompt at most"
            chosen = "the higher score is chosen"
            if self.label_temperature is not None:
                chosen += f" with probability sigmoid(difference / {self.label_temperature:g})"
            made["labels"] = f"{chosen}; {self.label_flip:.0%} are then turned round"
        return made


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _out_of_range(given: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """(key, whether it is wrong, what to say)."""
    splits = given.get("prompts_per_split", {"train": None})
    numbers = [number for number in splits.values() if number is not None]
    return [
        (
            "prompts_per_split",
            not splits or not set(splits) <= set(SPLITS),
            f"names splits: {', '.join(SPLITS)}",
        ),
        (
            "prompts_per_split",
            not all(type(number) is int and number > 0 for number in numbers),
            "takes whole numbers above 0, or null for all prompts of a split",
        ),
        ("reward_funcs", given.get("reward_funcs") == [], "names no scorer"),
        ("num_generations", not 1 <= given.get("num_generations", 1) <= 1 << 16, "must be 1 to 65,536"),
        ("pairs_per_prompt", given.get("pairs_per_prompt", 1) < 1, "must be at least 1"),
        ("label_temperature", given.get("label_temperature", 1) <= 0, "must be above 0"),
        (
            "label_flip",
            not 0 <= given.get("label_flip", 0) <= 0.5,
            "must lie between 0 and 0.5: labels turned more often only rename the better answer",
        ),
        ("dataset_streaming", bool(given.get("dataset_streaming")), "draws no prompts at random; delete it"),
    ]


def _of_pairs(given: dict[str, Any]) -> list[tuple[str, str]]:
    """What contradicts the making of pairs."""
    count, rule = given.get("num_generations", 4), given.get("pairing", "best_worst")
    possible = count // 2 if rule == "best_worst" else count * (count - 1) // 2
    found = []
    if count < 2:
        found.append(("num_generations", f"is {count}, and a pair needs two completions"))
    elif given.get("pairs_per_prompt", 1) > possible:
        found.append(
            (
                "pairs_per_prompt",
                f"{rule} makes {possible} pairs of {count} completions; raise num_generations",
            )
        )
    if given.get("temperature") == 0:
        found.append(("temperature", "0 samples the same completion every time"))
    if "min_score" in given:
        found.append(("min_score", "is read with output_form: prompt_completion; add that, or delete it"))
    if rule == "margin" and given.get("min_margin", 0) <= 0:
        found.append(("min_margin", "must be above 0 with pairing: margin"))
    if rule != "margin" and "min_margin" in given:
        found.append(("min_margin", "is read with pairing: margin; add that, or delete it"))
    return found
