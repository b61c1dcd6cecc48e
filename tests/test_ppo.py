"""PPO: the invariants that tell a working one from a broken one, on tiny models."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import eval_models
import ppo_models
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, TrainerCallback

from trueup.base.tokenizer import EOS, train_tokenizer
from trueup.eval.sampler import SamplingSettings, sample
from trueup.eval.scorers import RewardModelScorer
from trueup.preference.ppo_math import kl_estimate
from trueup.preference.ppo_rollout import (
    Completions,
    EpisodeSampler,
    Rewards,
    Rollout,
    as_scorer,
    episode_keys,
)
from trueup.preference.ppo_trainer import PPOTrainer
from trueup.preference.value import ActorCritic, ValueModel, disable_dropout
from trueup.recipes.directory import identity
from trueup.recipes.errors import UsageError

FAMILIES = ["gpt", "llama", "gpt2"]


def _completions(seed: int = 0, rows: int = 6, longest: int = 9) -> Completions:
    """Random prompts and completions; every second one ends with eos."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = eval_models.tokenizer()

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(23, len(tokenizer), (length,), generator=generator).tolist()

    prompts = [tokens(1, 7) for _ in range(rows)]
    ids = [tokens(1, longest) + [tokenizer.eos_token_id] * (row % 2) for row in range(rows)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Completions(
        [{"prompt": p} for p in prompts], prompts, ids, texts, [r % 2 == 1 for r in range(rows)]
    )


def _outputs(model: ActorCritic, completions: Completions, rows: list[int]) -> Any:
    rollout = Rollout.empty(completions, torch.device("cpu"))
    with torch.no_grad():
        return model(**rollout.batch(rows, pad_token_id=0))


# ---------------------------------------------------------------------------------- log-probabilities, values


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_model_row_by_row(family: str) -> None:
    """Neither padding nor order nor batch size changes a log-probability, an entropy or a value."""
    policy = eval_models.policy(family)
    value = ValueModel.from_reward_model(eval_models.reward_model(family, seed=1))
    model = ActorCritic(policy, value, temperature=0.7)
    completions = _completions()
    together = _outputs(model, completions, [4, 0, 5, 2, 1, 3])
    for place, row in enumerate([4, 0, 5, 2, 1, 3]):
        length = len(completions.ids[row])
        alone = _outputs(model, completions, [row])
        for batched, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batched[place, :length], single[0], atol=2e-5, rtol=1e-4)
            assert (batched[place, length:] == 0).all()
        sequence = torch.tensor([completions.sequences()[row]])
        with torch.no_grad():
            logits = policy(sequence).logits[0, -length - 1 : -1] / 0.7
            hidden = value.trunk(sequence).last_hidden_state[0, -length - 1 : -1]  # type: ignore[misc]
        expected = torch.log_softmax(logits, -1)
        torch.testing.assert_close(
            alone.log_probs[0], expected[range(length), completions.ids[row]], atol=2e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            alone.entropy[0], -(expected.exp() * expected).sum(-1), atol=2e-5, rtol=1e-4
        )
        torch.testing.assert_close(alone.values[0], value.head(hidden)[:, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"logit_scale": 0.5}, {}])
def test_slices_change_neither_log_probs_nor_gradients(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trueup.preference import value

    model = ActorCritic(eval_models.policy(**changes), None, 1.0)
    assert model.logits_of is not None
    batch = Rollout.empty(_completions(), torch.device("cpu")).batch(range(6), 0)
    whole = model(**batch).log_probs
    whole.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setitem(value.SLICE_LOGITS, "cpu", 4 * 279)  # parts that are computed again
    monkeypatch.setitem(value.loss.SLICE_LOGITS, "cpu", 3 * 279)  # and slices of these
    sliced = model(**batch).log_probs
    sliced.sum().backward()
    torch.testing.assert_close(sliced, whole)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_have_the_gradients_of_a_plain_log_softmax(temperature: float, dtype: torch.dtype) -> None:
    from trueup.preference.value import _log_probs

    torch.manual_seed(0)
    targets, weights = torch.randint(50, (7,)), torch.randn(7)
    logits = torch.randn(7, 50).to(dtype).requires_grad_()
    (_log_probs(logits, targets, temperature)[0] @ weights).backward()
    plain = logits.detach().clone().requires_grad_()
    expected = (plain.float() / temperature).log_softmax(-1)
    (expected[range(7), targets] @ weights).backward()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(logits.grad, plain.grad, atol=tolerance, rtol=tolerance)


def test_a_head_of_another_kind_goes_through_the_model_itself() -> None:
    policy = eval_models.policy()
    completions = _completions()
    expected = _outputs(ActorCritic(policy, None, 1.0), completions, [0, 1, 2])
    original = policy.lm_head.forward
    policy.lm_head.forward = lambda hidden: 2 * original(hidden / 2)  # still right, still the model's
    policy.lm_head.__class__ = type("Head", (torch.nn.Linear,), {})
    model = ActorCritic(policy, None, 1.0)
    assert model.logits_of is None
    for ours, theirs in zip(_outputs(model, completions, [0, 1, 2])[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(UsageError, match="share_trunk"):
        ActorCritic(policy, ValueModel.from_policy(policy, share_trunk=True), 1.0)


def test_a_model_that_does_more_than_its_head_is_found_out() -> None:
    policy = eval_models.policy("llama")
    policy.config.logit_scale = 3.0  # Llama does not read it
    assert ActorCritic(policy, None, 1.0).logits_of is None


def test_value_models_start_from_the_reward_model_or_at_zero() -> None:
    reward_model = eval_models.reward_model(reward_mean=3.0, reward_std=2.0)
    value = ValueModel.from_reward_model(reward_model)
    model = ActorCritic(eval_models.policy(), value, 1.0)
    completions = _completions(rows=1)
    # The value before the last token is the raw score, calibration removed, of the text so far.
    so_far = torch.tensor([completions.sequences()[0][:-1]])
    with torch.no_grad():
        raw = reward_model(so_far).logits[0, 0] * 2.0 + 3.0
    torch.testing.assert_close(_outputs(model, completions, [0]).values[0, -1], raw)
    assert value.head.weight is not reward_model.score.weight

    fresh = ActorCritic(eval_models.policy(), ValueModel.from_policy(eval_models.policy()), 1.0)
    assert (_outputs(fresh, completions, [0]).values == 0).all()


def test_dropout_is_off_even_while_training() -> None:
    policy = eval_models.policy(attention_dropout=0.5, residual_dropout=0.5, embedding_dropout=0.5)
    disable_dropout(policy)
    functional = eval_models.policy("llama", attention_dropout=0.5)
    disable_dropout(functional)
    ids = torch.arange(30, 60)[None]
    for model in (policy, functional):
        with torch.no_grad():
            torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits, atol=0, rtol=0)


# --------------------------------------------------------------------------------------------------- rollouts


def _rollout(trainer: PPOTrainer, rows: int = 8) -> Rollout:
    """The first round's rollout, outside of a training run."""
    trainer.create_optimizer()
    data: Any = trainer.train_dataset
    return trainer._roll_out(trainer.model.eval(), [data[i] for i in range(rows)])


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("share_trunk", [False, True])
def test_at_the_start_ratio_is_one_and_kl_zero(
    with_lora: bool, bf16: bool, share_trunk: bool, tmp_path: Path
) -> None:
    """Exactly: old log-probabilities come from the forward that is trained, in the same micro-batches."""
    peft_config = ppo_models.lora(lora_dropout=0.3) if with_lora else None
    trainer = ppo_models.trainer(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1, num_ppo_epochs=1,
        peft_config=peft_config, bf16=bf16, share_trunk=share_trunk,
    )  # fmt: skip
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["val/ratio"] == 1
    assert first["policy/approxkl_avg"] == 0
    assert first["objective/kl"] == 0
    assert first["objective/kl_k3"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_samplers_own_log_probs_agree_with_the_training_forward(family: str, tmp_path: Path) -> None:
    """Left-padded with a cache there, right-padded without one here."""
    trainer = ppo_models.trainer(tmp_path, eval_models.policy(family), response_length=12)
    rollout = _rollout(trainer)
    found = sample(
        trainer.policy, eval_models.tokenizer(), rollout.completions.prompts,
        SamplingSettings(max_new_tokens=12, seed=trainer.args.seed), log_probs=True,
    )  # fmt: skip
    for row, one in enumerate(found):
        assert one.ids == rollout.completions.ids[row]
        torch.testing.assert_close(
            rollout.log_probs[row, : len(one.ids)], torch.tensor(one.log_probs), atol=1e-4, rtol=1e-4
        )


def test_batch_size_and_order_change_neither_scores_nor_advantages(tmp_path: Path) -> None:
    reward_model = eval_models.reward_model(seed=3)
    settings: dict[str, Any] = {
        "whiten_advantages": False,
        "reward": reward_model,
        "gradient_accumulation_steps": 2,
    }
    small = _rollout(ppo_models.trainer(tmp_path, per_device_train_batch_size=4, **settings))
    large = _rollout(
        ppo_models.trainer(
            tmp_path, per_device_train_batch_size=8, local_rollout_forward_batch_size=3, **settings
        )
    )
    assert small.completions.ids == large.completions.ids
    torch.testing.assert_close(small.advantages, large.advantages, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(small.returns, large.returns, atol=1e-4, rtol=1e-3)

    def scores(order: list[int]) -> torch.Tensor:
        done = large.completions
        picked = (
            [getattr(done, name)[row] for row in order]
            for name in ("rows", "prompts", "ids", "texts", "ended")
        )
        rewards = Rewards([as_scorer(reward_model, eval_models.tokenizer(), torch.device("cpu"), None)],
                          eval_models.tokenizer())  # fmt: skip
        return rewards(Completions(*picked))[0]

    forth, back = scores(list(range(8))), scores(list(reversed(range(8))))
    torch.testing.assert_close(forth, back.flip(0), atol=1e-5, rtol=1e-5)


class Scripted:
    """A generator that returns given completions: the interface an engine such as vLLM would have."""

    def __init__(self, completions: list[list[int]]) -> None:
        self.completions = completions

    def __call__(self, policy: Any, prompts: Any, keys: Any, temperature: float) -> list[list[int]]:
        return [self.completions[key % len(self.completions)] for key in keys]


def test_the_score_lands_on_eos_which_is_counted_once_and_a_missing_one_costs(tmp_path: Path) -> None:
    eos = eval_models.tokenizer().eos_token_id
    generator = Scripted([[30, 31, eos], [40, 41, 42, 43]])
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, ended: Any, **_: Any) -> list[float]:
        seen.append((completions, ended))
        return [5.0] * len(completions)

    trainer = ppo_models.trainer(
        tmp_path,
        reward=reward,
        generator=generator,
        lam=1.0,
        whiten_advantages=False,
        missing_eos_penalty=2.0,
    )
    rollout = _rollout(trainer)
    assert rollout.mask[:2].tolist() == [[True, True, True, False], [True] * 4]
    # KL and values are 0 at the start, so each token's return is what comes after it: the score, once.
    assert rollout.returns[0].tolist() == [5, 5, 5, 0]
    assert rollout.returns[1].tolist() == [3, 3, 3, 3]
    text = eval_models.tokenizer().decode([30, 31])
    assert seen[0][0][0] == text  # what is scored is the cut text
    assert seen[0][1] == [True, False] * 4
    figures = {name: values[-1] for name, values in trainer._figures.items()}
    assert figures["objective/scores"] == 5  # raw
    assert figures["objective/rlhf_reward"] == 4  # half of the rows lost 2
    assert figures["val/num_eos_tokens"] == 4
    assert figures["completions/clipped_ratio"] == 0.5
    assert figures["completions/mean_length"] == 3.5


def test_a_reward_model_reads_the_policys_own_tokens(tmp_path: Path) -> None:
    """Bytes that are no text would come back from a detour over text as other tokens."""
    reward_model = eval_models.reward_model(seed=3)
    trainer = ppo_models.trainer(tmp_path, reward=reward_model)
    rollout = _rollout(trainer)
    scores, _ = trainer.rewards(rollout.completions)
    for row, ids in enumerate(rollout.completions.sequences()):
        with torch.no_grad():
            expected = reward_model(torch.tensor([ids])).logits[0, 0]
        assert scores[row].item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_reward_model_with_a_tokenizer_of_its_own_reads_the_text(tmp_path: Path) -> None:
    other = train_tokenizer(["some other words"] * 3, vocab_size=282)
    scorer = RewardModelScorer(eval_models.reward_model(vocab_size=len(other)), other, "other")
    trainer = ppo_models.trainer(tmp_path, reward=scorer)
    rollout = _rollout(trainer)
    done = rollout.completions
    expected = scorer([row["prompt"] for row in done.rows], done.texts, ended=done.ended)
    assert trainer.rewards(done)[0].tolist() == pytest.approx(expected)
    assert (rollout.values == 0).all()  # its trunk could not read the policy's tokens


def test_rewards_are_weighted_and_none_is_left_out(tmp_path: Path) -> None:
    def only_even(prompts: Any, completions: Any, **_: Any) -> list[float | None]:
        return [10.0 if row % 2 == 0 else None for row in range(len(completions))]

    def marks(prompts: Any, completions: Any, mark: list[float], **_: Any) -> list[float]:
        return mark

    data = Dataset.from_dict({"prompt": ["a", "b"] * 4, "mark": [1.0, 2.0] * 4})
    trainer = ppo_models.trainer(
        tmp_path, reward=[only_even, marks], reward_weights=[0.5, 2.0], train_dataset=data
    )
    rollout = _rollout(trainer)
    rewards, said = trainer.rewards(rollout.completions)
    assert rewards.tolist() == [7.0, 4.0] * 4
    assert said["marks"].tolist() == [1.0, 2.0] * 4
    lonely = ppo_models.trainer(tmp_path, reward=only_even, train_dataset=data)
    with pytest.raises(UsageError, match="none of them gives a score"):
        _rollout(lonely)


def test_conversations_are_rendered_by_the_template_and_given_back_as_messages(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    turns = [[{"role": "user", "content": f"say {word}"}] for word in "abcdefgh"]
    trainer = ppo_models.trainer(tmp_path, reward=reward, train_dataset=Dataset.from_dict({"prompt": turns}))
    rollout = _rollout(trainer)
    tokenizer = eval_models.tokenizer()
    assert tokenizer.decode(rollout.completions.prompts[0]) == f"<|bos|><|user|>say a{EOS}<|assistant|>"
    prompt, completion = seen[0]
    assert prompt == turns[0]
    assert completion == [{"role": "assistant", "content": rollout.completions.texts[0]}]


def test_generate_is_a_fall_back_that_samples_from_the_policy_itself(tmp_path: Path) -> None:
    policy = eval_models.policy()
    policy.generation_config.top_k = 1  # a model's own file must not make sampling impure
    trainer = ppo_models.trainer(tmp_path, policy, generation_backend="transformers", response_length=20)
    prompts = [eval_models.tokenizer()(text)["input_ids"] for text in ppo_models.PROMPTS * 4]
    first = trainer.generator(policy, prompts, range(32), 1.0)
    assert first == trainer.generator(policy, prompts, range(32), 1.0)
    assert first != trainer.generator(policy, prompts, range(32, 64), 1.0)
    assert len({tuple(ids) for ids in first}) == 32
    eos = eval_models.tokenizer().eos_token_id
    for ids in first:
        assert eos not in ids[:-1]
        assert ids[-1] == eos or len(ids) == 20
    assert any(len(ids) < 20 for ids in first)


def test_ranks_and_rounds_draw_different_numbers() -> None:
    keys = [key for step in range(3) for rank in range(2) for key in episode_keys(step, rank, 2, rows=8)]
    assert keys == list(range(48))


def test_episode_sampler_sees_every_prompt_equally_often() -> None:
    order = list(EpisodeSampler(prompts=5, episodes=12, seed=1))
    assert len(order) == 12
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:10]
    assert order == list(EpisodeSampler(5, 12, 1))
    assert order != list(EpisodeSampler(5, 12, 2))


# ---------------------------------------------------------------------------------------------------- updates


def _gradient(tmp_path: Path, rows: int, accumulation: int) -> dict[str, torch.Tensor]:
    trainer = ppo_models.trainer(
        tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
        reward=eval_models.reward_model(seed=3),
    )  # fmt: skip
    rollout = _rollout(trainer)
    trainer._accumulate(trainer.model, rollout, range(8))
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    whole, parts = _gradient(tmp_path, 8, 1), _gradient(tmp_path, 2, 4)
    assert whole.keys() == parts.keys()
    assert any(name.startswith("value.") for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-3)


class _Wrapped(torch.nn.Module):
    """What DDP looks like from outside."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_the_policys_activations_are_gone_before_the_value_models_come(tmp_path: Path) -> None:
    """Where nothing wants one forward for both; the gradients are the same to the bit."""
    trainer = ppo_models.trainer(tmp_path, reward=eval_models.reward_model(seed=3))
    rollout, model = _rollout(trainer), trainer.model
    done: list[bool] = []
    trainer.value_model.register_forward_pre_hook(
        lambda *_: done.append(trainer.policy.lm_head.weight.grad is not None)
    )
    gradients = []
    for form in (_Wrapped(model), model):
        trainer._accumulate(form, rollout, range(8))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert done[0] is False
    assert all(done[len(done) // 2 :])
    together, apart = gradients
    assert together.keys() == apart.keys()
    for name, gradient in together.items():
        assert torch.equal(apart[name], gradient), name


def test_gradients_are_clipped_and_their_norm_logged(tmp_path: Path) -> None:
    norms = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()))

    trainer = ppo_models.trainer(tmp_path, max_grad_norm=1e-3, max_steps=2, callbacks=[Watch()])
    trainer.train()
    assert norms == pytest.approx([1e-3] * 2, rel=1e-3)
    assert all(line["grad_norm"] > 1e-3 for line in trainer.state.log_history if "grad_norm" in line)


def test_steps_are_rounds_and_each_makes_all_its_updates(tmp_path: Path) -> None:
    steps = []
    trainer = ppo_models.trainer(
        tmp_path, total_episodes=24, max_steps=-1, num_ppo_epochs=3, num_mini_batches=2,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, lr_scheduler_type="linear",
    )  # fmt: skip
    trainer.create_optimizer()
    original = trainer.optimizer.step
    trainer.optimizer.step = lambda *a, **k: (steps.append(trainer.state.global_step), original(*a, **k))[1]
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 3
    assert [steps.count(round_) for round_ in range(3)] == [6, 6, 6]
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["episode"] for line in lines] == [8, 16, 24]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])


def test_value_model_has_a_learning_rate_of_its_own_in_the_one_optimizer(tmp_path: Path) -> None:
    trainer = ppo_models.trainer(tmp_path, value_learning_rate=7e-3, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    rate_of = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert rate_of[id(parameter)] == (7e-3 if name.startswith("value.") else 1e-3), name
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert {group["eps"] for group in groups} == {1e-5}
    frozen = ppo_models.trainer(tmp_path, value_learning_rate=0.0).create_optimizer().param_groups
    assert {group["lr"] for group in frozen} == {0.0, 1e-3}


def test_a_round_stops_when_the_policy_has_gone_too_far(tmp_path: Path) -> None:
    def lines(target_kl: float | None) -> Any:
        trainer = ppo_models.trainer(
            tmp_path, max_steps=1, num_ppo_epochs=8, learning_rate=1e-2, target_kl=target_kl
        )
        trainer.train()
        return trainer.state.log_history[0]["policy/approxkl_avg"]

    assert lines(0.01) < 0.5 * lines(None)
    assert lines(0.01) > 0  # the epoch that went too far is counted


def test_adaptive_kl_coefficient_moves_and_is_saved(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "kl_controller": "adaptive",
        "adaptive_kl_target": 6.0,
        "adaptive_kl_horizon": 80,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 9,
    }
    trainer = ppo_models.trainer(tmp_path, **settings)
    trainer.train()
    # The KL is far below the target: 20 % less each time, times 8 of 80 episodes.
    assert trainer.kl_controller.coef == pytest.approx(0.05 * 0.98**2)
    again = ppo_models.trainer(tmp_path, **settings | {"max_steps": 3})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.kl_controller.coef == pytest.approx(0.05 * 0.98**3, rel=1e-3)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, checkpointed = (
        ppo_models.trainer(tmp_path, activation_checkpointing=switch) for switch in (False, True)
    )
    plain.train()
    checkpointed.train()
    for ours, theirs in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------- what it learns


def _bandit(tmp_path: Path, **changes: Any) -> PPOTrainer:
    settings: dict[str, Any] = {
        "max_steps": 25, "per_device_train_batch_size": 32, "response_length": 8, "learning_rate": 5e-3,
        "missing_eos_penalty": None, "logging_steps": 5,
    }  # fmt: skip
    return ppo_models.trainer(tmp_path, **settings | changes)


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_bandit_is_learned(with_lora: bool, tmp_path: Path) -> None:
    """Reward: the share of one token, 1 % at the start. Four seeds ended between 0.52 and 0.99."""
    changes = {"peft_config": ppo_models.lora(r=8, lora_alpha=32), "learning_rate": 1e-2} if with_lora else {}
    trainer = _bandit(tmp_path, kl_coef=0.005, **changes)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "objective/scores" in line]
    assert lines[0]["objective/scores"] < 0.1
    assert lines[-1]["objective/scores"] > 0.4
    assert lines[-1]["objective/kl"] > 10


@pytest.mark.parametrize(("noise", "bound"), [(0.0, 1e-9), (0.1, 1.5)])
def test_no_reward_stays_at_the_reference(noise: float, bound: float, tmp_path: Path) -> None:
    """Exactly, where there is no advantage; and where wrong values pretend one, the KL holds it."""
    trainer = _bandit(tmp_path, reward=ppo_models.nothing, max_steps=10, learning_rate=3e-4)
    torch.nn.init.normal_(trainer.value_model.head.weight, std=noise)
    trainer.train()
    moved = [abs(line["objective/kl"]) for line in trainer.state.log_history if "objective/kl" in line]
    assert len(moved) == 2
    assert max(moved) < bound


def _chain() -> Any:
    """A policy whose next token depends on the last one alone, so that the best policy can be worked out."""
    policy = eval_models.policy(initializer_range=0.02)
    for name, parameter in policy.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            torch.nn.init.zeros_(parameter)
    return policy


@torch.no_grad()
def _best_reward(policy: Any, beta: float, steps: int = 8) -> float:
    """The bandit's expected reward under the best policy at KL coefficient beta, by soft value iteration."""
    vocabulary, eos = policy.config.vocab_size, policy.config.eos_token_id
    log_p = policy(torch.arange(vocabulary)[:, None]).logits[:, -1].double().log_softmax(-1)
    reward = torch.zeros(vocabulary, dtype=torch.float64)
    reward[ppo_models.counted()] = 1 / 8
    value, best = torch.zeros_like(reward), []
    for _ in range(steps):
        preferences = log_p + (reward + value) / beta
        best.append(preferences.softmax(-1))
        value = beta * preferences.logsumexp(-1)
        value[eos] = 0  # nothing comes after it
    last = [eval_models.tokenizer()(text)["input_ids"][-1] for text in ppo_models.PROMPTS]
    state = torch.bincount(torch.tensor(last), minlength=vocabulary).double() / len(last)
    expected = 0.0
    for transition in reversed(best):
        state = state @ transition
        expected += float(state @ reward)
        state[eos] = 0
    return expected


@pytest.mark.slow
def test_ppo_and_rloo_reach_the_optimum_of_the_bandit(tmp_path: Path) -> None:
    from trl import RLOOConfig, RLOOTrainer

    beta = 1 / 8 / math.log(279)  # makes the odds of a token of no consequence 279 times as large
    policy = _chain()
    policy.save_pretrained(tmp_path / "start")
    best = _best_reward(policy, beta)
    ours = _bandit(
        tmp_path / "ppo", model=policy, kl_coef=beta, max_steps=150, per_device_train_batch_size=64
    )
    ours.train()
    config = RLOOConfig(
        str(tmp_path / "rloo"), beta=beta, max_steps=400, per_device_train_batch_size=64, num_generations=8,
        max_completion_length=8, learning_rate=3e-3, use_cpu=True, bf16=False, report_to="none",
        logging_steps=10, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    theirs = RLOOTrainer(
        str(tmp_path / "start"), ppo_models.bandit, config,
        train_dataset=ppo_models.prompts(8), processing_class=eval_models.tokenizer(),
    )  # fmt: skip
    theirs.train()
    found = [line["objective/scores"] for line in ours.state.log_history if "objective/scores" in line][-4:]
    peers = [line["reward"] for line in theirs.state.log_history if "reward" in line][-4:]
    assert sum(found) / 4 == pytest.approx(best, abs=0.03)
    assert sum(peers) / 4 == pytest.approx(best, abs=0.03)


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_causal_model_is_trained_saved_and_opened(family: str, with_lora: bool, tmp_path: Path) -> None:
    trainer = ppo_models.trainer(
        tmp_path, eval_models.policy(family), eval_models.reward_model(family, seed=1),
        peft_config=ppo_models.lora(r=8) if with_lora else None, eval_dataset=ppo_models.prompts(),
    )  # fmt: skip
    assert trainer.evaluate()["eval_kl"] == 0
    trainer.train()
    assert trainer.state.log_history[1]["val/ratio"] == pytest.approx(1, abs=0.5)
    assert trainer.evaluate()["eval_kl"] != 0
    trainer.save_model(str(tmp_path / "saved"))
    policy = trainer.policy.merge_and_unload() if with_lora else trainer.policy
    loaded = eval_models.policy(family)
    if with_lora:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, tmp_path / "saved").merge_and_unload()
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(30, 40)[None]
    torch.testing.assert_close(loaded(ids).logits, policy(ids).logits)


def test_the_log_has_the_names_of_trl(tmp_path: Path) -> None:
    trainer = ppo_models.trainer(tmp_path, max_steps=1)
    trainer.train()
    names = {
        "objective/kl", "objective/entropy", "objective/scores", "objective/rlhf_reward",
        "objective/non_score_reward", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
        "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/num_eos_tokens",
        "val/explained_variance", "completions/mean_length", "completions/clipped_ratio", "episode", "eps",
        "grad_norm", "learning_rate",
    }  # fmt: skip
    assert names <= set(trainer.state.log_history[0])


# -------------------------------------------------------------------------------------- checkpoints, resuming


def test_an_adapter_begins_as_the_seed_says(tmp_path: Path) -> None:
    started = []
    for noise in (1, 2):
        model = eval_models.policy()
        torch.manual_seed(noise)
        started.append(ppo_models.trainer(tmp_path, model, peft_config=ppo_models.lora()).policy)
    for ours, theirs in zip(started[0].parameters(), started[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def _checkpointed(folder: Path, rounds: int, with_lora: bool, **changes: Any) -> PPOTrainer:
    settings: dict[str, Any] = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9,
        "num_mini_batches": 2,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "kl_controller": "adaptive",
        "reward": eval_models.reward_model(seed=3), "train_dataset": ppo_models.prompts(3),
    }  # fmt: skip
    if with_lora:
        settings["peft_config"] = ppo_models.lora(init_lora_weights=True)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= rounds

    return ppo_models.trainer(folder, callbacks=[Stop()], **settings | changes)


@pytest.mark.parametrize("with_lora", [False, True])
def test_resuming_is_exact_to_the_bit(with_lora: bool, tmp_path: Path) -> None:
    straight = _checkpointed(tmp_path / "a", 4, with_lora)
    straight.train()
    _checkpointed(tmp_path / "b", 2, with_lora).train()
    torch.manual_seed(99)  # nothing in a round may depend on where the global generators stand
    resumed = _checkpointed(tmp_path / "b", 4, with_lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (name, ours), theirs in zip(
        resumed.model.named_parameters(), straight.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    timeless = [
        [
            {k: v for k, v in line.items() if "runtime" not in k and k != "eps" and "per_second" not in k}
            for line in history[:4]
        ]
        for history in (resumed.state.log_history, straight.state.log_history)
    ]
    assert timeless[0] == timeless[1]
    frontiers = [(tmp_path / folder / "frontier.jsonl").read_text() for folder in "ab"]
    assert frontiers[0] == frontiers[1]
    assert len(frontiers[0].splitlines()) == 4


def test_checkpoints_open_as_models_and_save_model_writes_the_policy_alone(tmp_path: Path) -> None:
    trainer = _checkpointed(tmp_path, 1, with_lora=False)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for path in (tmp_path / "checkpoint-1", tmp_path / "saved"):
        loaded = AutoModelForCausalLM.from_pretrained(path)
        for ours, theirs in zip(loaded.parameters(), trainer.policy.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert (path / "tokenizer.json").exists()
    assert (tmp_path / "checkpoint-1" / "value_model.safetensors").exists()
    assert not (tmp_path / "saved" / "value_model.safetensors").exists()


def test_push_to_hub_uploads_the_policy_as_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}

    class Hub:
        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": f"someone/{name}"})

        def upload_folder(self, **arguments: Any) -> None:
            pushed.update(arguments)

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = ppo_models.trainer(tmp_path / "brave", max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    assert pushed["repo_id"] == "someone/brave"
    loaded = AutoModelForCausalLM.from_pretrained(pushed["folder_path"])
    for ours, theirs in zip(loaded.parameters(), trainer.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_best_checkpoint_by_a_named_metric_is_loaded_at_the_end(tmp_path: Path) -> None:
    worth = iter([9.0, 1.0, 3.0, 2.0, 0.0])  # the first before any round: what began is no checkpoint

    def falling(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [next(worth)] * len(completions)

    trainer = _checkpointed(
        tmp_path, 4, False, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", scorers=[falling], eval_dataset=ppo_models.prompts(),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 2
    held_out = [json.loads(line) for line in (tmp_path / "frontier.jsonl").read_text().splitlines()]
    start = next(point for point in held_out if point["split"] == "validation")
    assert (start["step"], start["kl"], start["score"]) == (0, 0.0, 9.0)
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for ours, theirs in zip(trainer.policy.parameters(), best.parameters(), strict=True):
        assert torch.equal(ours, theirs)


_KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
import conftest, test_ppo, pathlib, signal
from torch.optim.optimizer import register_optimizer_step_pre_hook

steps = []
def kill(*_):
    steps.append(1)
    if len(steps) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

register_optimizer_step_pre_hook(kill)
folder = pathlib.Path(sys.argv[1])
trainer = test_ppo._checkpointed(folder, 4, sys.argv[3] == "lora")
from trueup.base.trainer import newest_checkpoint
trainer.train(resume_from_checkpoint=str(newest_checkpoint(folder) or "") or None)
trainer.save_model(str(folder / "done"))
"""


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("step", [3, 13, 32])  # of 4 rounds of 8: in the first, in the midst, the very last
def test_kill_and_resume_ends_at_the_same_content_hash(kind: str, step: int, tmp_path: Path) -> None:
    code = _KILLED.format(tests=str(Path(__file__).parent))

    def run(folder: str, kill_at: int) -> int:
        command = [sys.executable, "-c", code, str(tmp_path / folder), str(kill_at), kind]
        return subprocess.run(command, check=False, timeout=300, capture_output=True).returncode

    assert run("straight", -1) == 0
    assert run("killed", step) == -9
    assert run("killed", -1) == 0
    assert _weights(tmp_path / "killed" / "done") == _weights(tmp_path / "straight" / "done")


def _weights(path: Path) -> str:
    return identity(path)


# ------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_measures_reward_scorers_and_kl_and_keeps_the_completions(tmp_path: Path) -> None:
    def words(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    settings: dict[str, Any] = {
        "eval_dataset": ppo_models.prompts(2),
        "max_eval_prompts": 12,
        "scorers": [words],
        "learning_rate": 1e-2,
    }
    trainer = ppo_models.trainer(tmp_path, **settings)
    before = trainer.evaluate()
    assert before["eval_kl"] == 0
    assert before == trainer.evaluate()  # the same prompts, the same luck
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl"] > 0
    assert after["eval_kl_stderr"] > 0
    table = [json.loads(x) for x in (tmp_path / "completions" / "step-2.jsonl").read_text().splitlines()]
    assert len(table) == 12
    assert after["eval_score"] == after["eval_scorers/words"] == sum(len(e["completion"]) for e in table) / 12
    assert after["eval_reward"] == pytest.approx(sum(e["reward"] for e in table) / 12)
    assert 0 < after["eval_completions/mean_length"] <= 6
    points = [json.loads(line) for line in (tmp_path / "frontier.jsonl").read_text().splitlines()]
    assert [point["split"] for point in points] == ["train", "train", "validation"]
    assert points[-1]["kl"] == after["eval_kl"]
    assert points[-1]["kl_stderr"] == after["eval_kl_stderr"]
    assert points[-1]["score"] == after["eval_score"]
    assert (tmp_path / "ppo.png").stat().st_size > 10_000


def test_the_kl_of_an_evaluation_is_that_of_the_rollouts(tmp_path: Path) -> None:
    """Two measurements of one thing: by eval/kl.py, and by the round's own estimator."""
    trainer = ppo_models.trainer(
        tmp_path, learning_rate=3e-3, eval_dataset=ppo_models.prompts(8), max_eval_prompts=64
    )
    trainer.train()
    measured = trainer.evaluate()
    rows = [{"prompt": text} for text in ppo_models.PROMPTS * 8]
    rollout = Rollout.empty(trainer._complete(rows, range(64), 1.0), torch.device("cpu"))
    trainer._measure(trainer.model.eval(), rollout)
    kl = kl_estimate(rollout.log_probs, rollout.reference_log_probs).sum(1)
    difference = abs(float(kl.mean()) - measured["eval_kl"])
    assert difference < 4 * math.sqrt(2) * measured["eval_kl_stderr"]


# --------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_work_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_k: 50 would not sample from the policy itself"):
        ppo_models.config(tmp_path, top_k=50)
    with pytest.raises(ValueError, match="total_episodes: and max_steps"):
        ppo_models.config(tmp_path, total_episodes=8, max_steps=2)
    with pytest.raises(ValueError, match="num_mini_batches: 3 does not divide"):
        ppo_models.config(tmp_path, num_mini_batches=3)
    with pytest.raises(UsageError, match="reward_weights: 2 weights for 1"):
        ppo_models.trainer(tmp_path, reward_weights=[1.0, 2.0])
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))
    with pytest.raises(UsageError, match="a stream has no length"):
        ppo_models.trainer(tmp_path, train_dataset=stream, max_steps=-1)
    with pytest.raises(UsageError, match="has no prompts"):
        ppo_models.trainer(tmp_path, train_dataset=Dataset.from_dict({"prompt": []}))


def test_pad_must_not_be_eos(tmp_path: Path) -> None:
    import copy

    tokenizer = copy.deepcopy(eval_models.tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UsageError, match="pad token and eos token must differ"):
        PPOTrainer(
            eval_models.policy(), ppo_models.bandit, ppo_models.config(tmp_path), ppo_models.prompts(),
            processing_class=tokenizer,
        )  # fmt: skip


def test_a_stacked_adapter_is_refused(tmp_path: Path) -> None:
    from peft import get_peft_model

    with pytest.raises(UsageError, match=r"already carries an adapter.*merge_and_unload"):
        ppo_models.trainer(tmp_path, get_peft_model(eval_models.policy(), ppo_models.lora()))


def test_streams_are_trained_on(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(
        lambda: iter([{"prompt": text} for text in ppo_models.PROMPTS * 2])
    )
    trainer = ppo_models.trainer(tmp_path, train_dataset=stream, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


# ---------------------------------------------------------------------------------------------- several ranks

_RANK = """
import os, sys
sys.path.insert(0, {tests!r})
import conftest, pathlib, torch, zlib, eval_models, ppo_models

folder = pathlib.Path(sys.argv[1])
world = int(os.environ["WORLD_SIZE"])
trainer = ppo_models.trainer(
    folder, reward=eval_models.reward_model(seed=3), per_device_train_batch_size=4 // world,
    gradient_accumulation_steps=2, max_steps=2, num_mini_batches=1, max_grad_norm=0.0,
    eval_dataset=ppo_models.prompts(), peft_config=ppo_models.lora() if sys.argv[2] == "lora" else None,
)
sampler = trainer.generator
def by_prompt(policy, prompts, keys, temperature):  # the same prompt gets the same luck on any rank
    return sampler(policy, prompts, [zlib.crc32(str(ids).encode()) for ids in prompts], temperature)
trainer.generator = by_prompt
grads = {{}}
step = trainer._step
def noting(model):
    if not grads:
        grads.update({{n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}})
    step(model)
trainer._step = noting
trainer.train()
metrics = trainer.evaluate()
state = {{name: p.detach() for name, p in trainer.model.named_parameters()}}
torch.save((grads, state, metrics, trainer.state.log_history[0]), folder / f"rank{{os.environ['RANK']}}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_ranks_have_equal_gradients_and_those_of_one(kind: str, tmp_path: Path) -> None:
    code = tmp_path / "rank.py"
    code.write_text(_RANK.format(tests=str(Path(__file__).parent)))
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
        command = [
            *launch,
            "--master_port",
            str(29500 + os.getpid() % 1000 + world),
            str(code),
            str(folder),
            kind,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found[world] = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]
    (first, second), (single,) = found[2], found[1]
    for name, gradient in first[0].items():
        assert torch.equal(gradient, second[0][name]), name
        assert torch.equal(first[1][name], second[1][name]), name
        torch.testing.assert_close(gradient, single[0][name], atol=1e-5, rtol=1e-3)
    for name in ("objective/kl", "objective/scores", "val/explained_variance", "completions/mean_length"):
        assert first[3][name] == pytest.approx(single[3][name], rel=1e-3), name
    assert first[2]["eval_reward"] == pytest.approx(second[2]["eval_reward"])
