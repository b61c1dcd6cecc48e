"""The compare stage: which of several ways from one start is better, by how much, and how sure that is.

    stage: compare
    baseline: runs/lab/sft
    arms: {dpo: [runs/seeds/dpo-0, runs/seeds/dpo-1], ppo: [runs/seeds/ppo-0, runs/seeds/ppo-1]}
    scorers: [gold]
    dataset_name: lab/prompts
    output_dir: runs/lab/compare

The output folder holds `report.html`, `verdict.json`, the samples (`samples/*.jsonl`), every score of every
sample (`scores.csv`), the runs' traces, the manifest, and the plots as PNGs.
"""

import csv
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from trueup.base.data import DataArguments, data_fingerprint, data_parents, load_data
from trueup.base.stage import key
from trueup.eval.compare_frontier import matched, traces
from trueup.eval.compare_lineage import Findings, examine
from trueup.eval.compare_manifest import manifest
from trueup.eval.compare_pairwise import (
    Duels,
    JudgedPairs,
    PairScorer,
    VotedPairs,
    as_scores,
    by_pairs,
    by_scores,
    every_pair,
)
from trueup.eval.compare_samples import BASELINE, SAMPLES, Answers, Arm, Bench, Measures, measures, write_rows
from trueup.eval.compare_tax import bits_per_byte
from trueup.eval.compare_verdict import SCORERS, conclude, print_verdict
from trueup.eval.judge import JudgeScorer
from trueup.eval.rendering import encode_prompt
from trueup.eval.report import MANIFEST, PROMPTS, REPORT, SCORES, TRACES, write_report
from trueup.eval.results import lm_eval_results, tax
from trueup.eval.sampler import SamplingSettings
from trueup.eval.scorers import Scorer, resolve_scorer
from trueup.eval.validation import frozen_prompts, same_tokens, scorer_parents
from trueup.recipes.directory import VERDICT, Kind, ModelDirectory, write_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.hub import names_model, short_name
from trueup.recipes.machine import accelerator
from trueup.recipes.run import Run, is_main_process

GOLD = "gold"  # the scorer that comes in parts
JUDGE, VOTES = "judge", (".sqlite", ".db")  # what says which of two is better; the second by suffix
BEST_OF = "best-of-"


@dataclass
class CompareRecipe(DataArguments):
    """Compare models that began as one: samples on the same prompts, scored by what none was trained on."""

    output_dir: str = key("", "Folder to write.", required=True)
    arms: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Name -> model directory or Hub id (org/name, org/name@revision), or a list of them: the "
            "seeds of one method.",
            "required": True,
        },
    )
    baseline: str | None = key(
        None, "Model directory or Hub id all arms began as: KL is measured from it.", required=True
    )
    scorers: list[str] | None = field(
        default=None,
        metadata={
            "help": "What ranks: the first one. Registered names, module:function, reward model directories, "
            "judge, the app's votes (a .sqlite file); none that an arm was trained on.",
            "required": True,
        },
    )
    judge_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "For the judge: base_url of an OpenAI-compatible endpoint, model, concurrency, ..."
        },
    )
    reward_model_name_or_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "The proxy: reward model directory, or one per seed. Chooses for best_of, is shown, and "
            "never ranks."
        },
    )
    best_of: list[int] = field(
        default_factory=lambda: [4, 16],
        metadata={"help": "Best-of-n arms: the baseline's best answer of n by the reward model."},
    )
    max_prompts: int = key(840, "Test prompts, at most.")
    max_new_tokens: int = key(256, "A completion of so many tokens is cut.")
    per_device_eval_batch_size: int = key(64, "Completions sampled together: memory and speed alone.")
    text_dataset_name: str | None = key(
        None, "Text from before alignment (lab/text): bits per byte of its validation split."
    )
    max_documents: int = key(200, "Documents of that text, at most.")
    allow_unequal: bool = key(False, "Compare arms of unequal lineage all the same, and label the verdicts.")
    use_cpu: bool = key(False, "Stay on the CPU though there is an accelerator.")
    seed: int = key(0, "Of the sampling; repetition k takes seed + k.")

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        found = []
        counts = {}
        names = given.get("scorers") or []
        if JUDGE in names and not {"base_url", "model"} <= set(given.get("judge_kwargs") or ()):
            found.append(("judge_kwargs", "must name the judge's base_url and model"))
        if "judge_kwargs" in given and JUDGE not in names:
            found.append(("judge_kwargs", "is read with judge among scorers; add that, or delete it"))
        if not given.get("arms", True):
            found.append(("arms", "names none"))
        for name, value in given.get("arms", {}).items():
            paths = value if isinstance(value, list) else [value]
            counts[name] = len(paths)
            if name == BASELINE or str(name).startswith(BEST_OF):
                found.append(("arms", f"{name}: this name belongs to an arm of our own; choose another"))
            if not paths or not all(isinstance(path, str) for path in paths):
                found.append(("arms", f"{name}: takes a model directory, or a list of them"))
            if not str(name).replace("-", "").replace("_", "").isalnum():
                found.append(("arms", f"{name!r}: a name is made of letters, digits, - and _"))
        counts["reward_model_name_or_path"] = len(given.get("reward_model_name_or_path") or [0])
        several = {name: count for name, count in counts.items() if count > 1}
        if len(set(several.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in several.items())
            found.append(("arms", f"have different numbers of seeds ({told}): give each the same, or one"))
        if any(n < 2 for n in given.get("best_of", [])):
            found.append(("best_of", "takes numbers of candidates from 2 on"))
        if given.get("best_of") and not given.get("reward_model_name_or_path"):
            found.append(("best_of", "needs reward_model_name_or_path, which chooses the best"))
        return found

    def parents(self) -> dict[str, tuple[str, Kind | None]]:
        """The baseline, every arm's directories, the reward models."""
        policies = {"baseline": str(self.baseline)}
        for name, paths in self._paths().items():
            policies |= {f"arms.{name}[{place}]": path for place, path in enumerate(paths)}
        found: dict[str, tuple[str, Kind | None]] = {
            role: (path, "causal-lm") for role, path in policies.items()
        }
        found |= scorer_parents(self.reward_model_name_or_path, "reward_model_name_or_path")
        return {**found, **scorer_parents(self.scorers), **data_parents(self)}

    def data(self) -> list[dict[str, Any]]:
        """The fingerprints of the test prompts, of the text, and of votes."""
        text = [data_fingerprint(self._text(), "validation")] if self.text_dataset_name else []
        votes = [VotedPairs(Path(name)).fingerprint() for name in self.scorers or [] if _is_votes(name)]
        return [data_fingerprint(self, "test"), *text, *votes]

    def run(self, run: Run) -> None:
        """Examine the lineage, sample, score, conclude, and write the folder.

        Raises:
            UsageError: the arms are not equal, and that is not allowed.
        """
        if not is_main_process():  # under a launcher: what one process can do, several would do twice
            return
        arms = self._arms(run)
        findings = self._examine(run, arms)
        bench = self._bench(run)
        answers, tables = self._measure(bench, arms, run)
        duels, judges = self._duels(bench, arms, answers, tables)
        ranking = next(name for name in tables[BASELINE] if name.startswith(SCORERS))
        verdict = conclude(arms, answers, tables, duels, bench.prompts, findings)
        verdict |= {"data": run.data, "max_new_tokens": self.max_new_tokens, "seed": self.seed}
        verdict |= {"judges": judges, "tax": self._tax(bench, arms)}
        spread = float(np.nanstd(tables[BASELINE][ranking]))
        found = [one for arm in arms if not arm.best_of for one in self._traces(arm, ranking, spread)]
        print_verdict(verdict)

        def save(folder: Path) -> None:
            (folder / SAMPLES).mkdir()
            for path in bench.files:
                shutil.copy(path, folder / SAMPLES)
            write_rows(folder / PROMPTS, bench.prompts)
            write_scores(folder / SCORES, tables)
            write_json(folder / VERDICT, verdict)
            write_json(folder / TRACES, {"traces": found, "matched": matched(found)})
            write_json(folder / MANIFEST, manifest(run, verdict, answers))
            write_report(folder)

        rates = {f"{pair['a']}/{pair['b']}": pair["rate"]["estimate"] for pair in verdict["pairs"]}
        run.publish(save, rates)
        for path in run.work_dir.glob("*.jsonl"):
            path.unlink()
        print(f"{run.output_dir / REPORT}", flush=True)

    def _examine(self, run: Run, arms: list[Arm]) -> Findings:
        ranking = run.parents.get("scorers[0]", (self.scorers or [""])[0])
        proxies = [one for role, one in run.parents.items() if role.startswith("reward_model_name_or_path")]
        findings = examine(arms, ranking, proxies, run.data[0])
        if findings.unequal and not self.allow_unequal:
            listed = "\n  ".join(findings.unequal)
            raise UsageError(
                f"arms: not equal:\n  {listed}\ncompare arms of one start, the same pairs and the same "
                "prompts; or set allow_unequal: true (--allow-unequal), and the verdicts are labelled"
            )
        return findings

    def _traces(self, arm: Arm, ranking: str, spread: float) -> list[dict[str, Any]]:
        proxies = [short_name(name) for name in self.reward_model_name_or_path or []]
        return traces(arm, ranking.removeprefix(SCORERS), proxies, spread)

    def _text(self) -> DataArguments:
        return DataArguments(dataset_name=self.text_dataset_name)

    def _tax(self, bench: Bench, arms: list[Arm]) -> dict[str, Any]:
        """Arm -> one entry per directory: bits per byte if there is a text, lm-eval's results if there are
        any."""
        texts = []
        if self.text_dataset_name:
            rows = load_data(self._text(), "validation", "text")
            texts = [row["text"] for row in islice(rows, self.max_documents)]
        found: dict[str, Any] = {}
        before = lm_eval_results(bench.baseline)
        for arm in (arm for arm in arms if not arm.best_of):
            found[arm.name] = []
            for one in arm.directories:
                results = lm_eval_results(one)
                entry: dict[str, Any] = {"lm_eval": results, "change": tax(results, before)}
                if texts:
                    entry["bits_per_byte"] = bits_per_byte(*bench.load(one.path), texts)
                found[arm.name].append(entry)
        return found

    def _paths(self) -> dict[str, list[str]]:
        return {name: value if isinstance(value, list) else [value] for name, value in self.arms.items()}

    def _device(self) -> str:
        return "cpu" if self.use_cpu else accelerator()

    def _open(self, names: list[str] | None) -> list[Scorer]:
        return [
            resolve_scorer(name, "scorers", **({"device": self._device()} if names_model(name) else {}))
            for name in names or []
        ]

    def _arms(self, run: Run) -> list[Arm]:
        """The baseline first, then those named, then best-of-n."""
        baseline = run.parents["baseline"]
        named = [
            Arm(name, [run.parents[f"arms.{name}[{place}]"] for place in range(len(paths))])
            for name, paths in self._paths().items()
        ]
        virtual = [Arm(f"{BEST_OF}{n}", [baseline], n) for n in self._best_of()]
        return [Arm(BASELINE, [baseline]), *named, *virtual]

    def _best_of(self) -> list[int]:
        return self.best_of if self.reward_model_name_or_path else []

    def _bench(self, run: Run) -> Bench:
        return Bench(
            prompts=self._prompts(run),
            baseline=run.parents["baseline"],
            settings=SamplingSettings(
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
                batch_size=self.per_device_eval_batch_size,
            ),
            folder=run.work_dir,
            earlier=run.output_dir / SAMPLES,
            device=self._device(),
        )

    def _prompts(self, run: Run) -> list[dict[str, Any]]:
        """Test prompts that leave every arm room for a completion."""
        dataset = load_data(self, "test", "prompt")
        tokenizer, context = _reader(run.parents["baseline"].path)
        for one in {model.path for role, model in run.parents.items() if role.startswith("arms.")}:
            other, its_context = _reader(one)
            alike = same_tokens(other, tokenizer) and other.chat_template == tokenizer.chat_template
            if not alike or its_context != context:
                dataset = dataset.filter(
                    partial(_fits, other, (its_context or 1 << 31) - self.max_new_tokens)
                )
        found = frozen_prompts(dataset, self.max_prompts, tokenizer, context, self.max_new_tokens)
        if not found:
            raise TrueupError("test: no prompt leaves every arm room for a completion in its context")
        return found

    def _measure(
        self, bench: Bench, arms: list[Arm], run: Run
    ) -> tuple[dict[str, list[Answers]], dict[str, Measures]]:
        """All answers, and arm -> measure -> table (repetitions, prompts)."""
        scorers = self._open([name for name in self.scorers or [] if not _asked_in_pairs(name)])
        proxies = self._open(self.reward_model_name_or_path)
        repetitions = max([len(proxies), *(len(arm.directories) for arm in arms)])
        answers: dict[str, list[Answers]] = {}
        tables: dict[str, Measures] = {}
        for arm in arms:
            answers[arm.name], rows = [], []
            for repetition in range(max(len(proxies), 1) if arm.best_of else repetitions):
                if arm.best_of:
                    place = repetition % len(proxies)
                    identity = run.parents[f"reward_model_name_or_path[{place}]"].identity
                    said = bench.best_of(arm, repetition, proxies[place], identity)
                else:
                    said = bench.answers(arm, repetition)
                answers[arm.name].append(said)
                proxy = proxies[repetition % len(proxies)] if proxies else None
                rows.append(self._scored(bench, arm.directory(repetition), said, scorers, proxy))
            tables[arm.name] = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        return answers, tables

    def _duels(
        self,
        bench: Bench,
        arms: list[Arm],
        answers: dict[str, list[Answers]],
        tables: dict[str, Measures],
    ) -> tuple[Duels, dict[str, dict[str, float]]]:
        """The outcomes by what ranks; who was asked pair by pair, with an account of it.

        What a judge says of an arm and the baseline joins the tables, in the order of `scorers`.
        """
        found, accounts = None, {}
        for place, name in enumerate(self.scorers or []):
            if not _asked_in_pairs(name):
                continue
            asked = self._pair_scorer(name)
            pairs = [pair for pair in every_pair(arms) if place == 0 or BASELINE in pair]
            duels = by_pairs(asked, bench, arms, answers, pairs)
            for arm, scores in as_scores(duels, arms, answers).items():
                own = {f"{SCORERS}{asked.name}": scores}
                tables[arm] = own | tables[arm] if place == 0 else tables[arm] | own
            found = duels if place == 0 else found
            accounts[asked.name] = asked.account()
        ranking = next(name for name in tables[BASELINE] if name.startswith(SCORERS))
        return found or by_scores(arms, tables, ranking), accounts

    def _pair_scorer(self, name: str) -> PairScorer:
        if name == JUDGE:
            return JudgedPairs(JudgeScorer(**(self.judge_kwargs or {}), progress=True))
        return VotedPairs(Path(name))

    @staticmethod
    def _scored(
        bench: Bench, policy: ModelDirectory, said: Answers, scorers: list[Scorer], proxy: Scorer | None
    ) -> dict[str, list[float]]:
        found = {f"{SCORERS}{one.name}": bench.score(one, policy, said) for one in scorers}
        if any(one.name == GOLD for one in scorers):
            found |= {f"parts/{name}": values for name, values in bench.parts(said).items()}
        if proxy:
            found["proxy"] = bench.score(proxy, policy, said)
        return found | measures(said)


def _asked_in_pairs(name: str) -> bool:
    return name == JUDGE or _is_votes(name)


def _is_votes(name: str) -> bool:
    return Path(name).suffix in VOTES


def _fits(tokenizer: Any, room: int, row: dict[str, Any]) -> bool:
    return len(encode_prompt(tokenizer, row["prompt"])) <= room


def _reader(path: Path) -> tuple[Any, int | None]:
    """A model's tokenizer and its context."""
    config = AutoConfig.from_pretrained(path).get_text_config()
    return AutoTokenizer.from_pretrained(path), getattr(config, "max_position_embeddings", None)


def write_scores(path: Path, tables: Mapping[str, Measures]) -> None:
    """Every figure of every answer: one line per arm, repetition and prompt."""
    names = list(dict.fromkeys(name for table in tables.values() for name in table))

    def lines() -> Iterator[list[Any]]:
        for arm, table in tables.items():
            repetitions, prompts = next(iter(table.values())).shape
            for repetition in range(repetitions):
                for row in range(prompts):
                    cells = [table[name][repetition, row] if name in table else "" for name in names]
                    yield [arm, repetition, row, *cells]

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "repetition", "row", *names])
        writer.writerows(lines())
