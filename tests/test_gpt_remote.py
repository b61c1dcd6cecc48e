"""A saved directory opens anywhere: with its own code where trueup is not installed, without where it is."""

import subprocess
import sys
from pathlib import Path

import torch

from trueup.base import GPTConfig, GPTForCausalLM
from trueup.base.tokenizer import default_generation_config, train_tokenizer

# With trueup made impossible to import, every Auto class opens the directory, and what it saves opens again.
ELSEWHERE = """
import sys
sys.modules["trueup"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer

directory, again = sys.argv[1:]
assert AutoConfig.from_pretrained(directory, trust_remote_code=True).model_type == "trueup_gpt"
ids = AutoTokenizer.from_pretrained(directory)("the cat", return_tensors="pt")["input_ids"]
policy = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
trunk = AutoModel.from_pretrained(directory, trust_remote_code=True)
reward = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True, num_labels=1)
assert type(policy).__module__.startswith("transformers_modules"), type(policy).__module__
assert policy.config._attn_implementation == "sdpa"
hidden = trunk(ids).last_hidden_state
assert torch.equal(policy(ids).logits, policy.lm_head(hidden))
assert torch.equal(reward(ids).logits, reward.score(hidden[:, -1]))
assert policy.generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3

reward.save_pretrained(again)
copied = AutoModelForSequenceClassification.from_pretrained(again, trust_remote_code=True)
assert torch.equal(copied(ids).logits, reward(ids).logits)
base = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)  # T3: another class than was saved
assert torch.equal(base.model(ids).last_hidden_state, hidden)
torch.save(policy(ids).logits, again + "/logits.pt")
"""

# T6: nothing is trusted, nobody is asked: stdin is closed.
LOCAL = """
import sys
import trueup.base
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

for auto in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    assert type(auto.from_pretrained(sys.argv[1])).__module__.startswith("trueup.base"), auto
"""


def run(script: str, *arguments: Path, cache: Path) -> None:
    environment = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        cwd=cache,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_a_directory_opens_with_and_without_trueup(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat " * 9], vocab_size=300)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    model = GPTForCausalLM(GPTConfig(vocab_size=len(tokenizer), **shape)).eval()
    model.generation_config = default_generation_config(tokenizer)
    directory, again = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    assert {"configuration_gpt.py", "modeling_gpt.py"} <= {path.name for path in directory.iterdir()}

    run(ELSEWHERE, directory, again, cache=tmp_path)
    run(LOCAL, directory, cache=tmp_path)
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    assert torch.equal(torch.load(again / "logits.pt"), model(ids).logits)
    assert {"configuration_gpt.py", "modeling_gpt.py"} <= {path.name for path in again.iterdir()}
