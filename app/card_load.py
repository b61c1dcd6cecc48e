"""The lines that load a model, by what it is: for a reader who has Transformers, and not trueup."""

import json
from typing import TYPE_CHECKING

from trueup.app.card_lineage import START

if TYPE_CHECKING:
    from trueup.app.card_model import ModelSubject

QUESTION = "What is 8 plus 9?"
REPLY = "8 plus 9 is 17."
_NEW_TOKENS = 64


def load_lines(subject: "ModelSubject") -> str:
    """Python that loads the model and uses it once."""
    if subject.is_adapter:
        return adapter_lines(subject)
    name, trust = json.dumps(subject.address), _trust(subject.config)
    if subject.kind == "reward":
        return (
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name}{trust})\n"
            f"model = AutoModelForSequenceClassification.from_pretrained({name}{trust})\n\n"
            f"{_score(subject)}"
        )
    context = subject.config.get("max_position_embeddings") or 2 * _NEW_TOKENS
    length = f"max_new_tokens={min(_NEW_TOKENS, context // 2)}"
    generator = f'generate = pipeline("text-generation", {name}{trust}, {length})'
    if subject.kind == "base":
        use = 'print(generate("Once upon a time")[0]["generated_text"])'
    else:
        asked = f'[{{"role": "user", "content": "{QUESTION}"}}]'
        use = f'print(generate({asked})[0]["generated_text"][-1]["content"])'
    return f"from transformers import pipeline\n{generator}\n{use}"


def adapter_lines(subject: "ModelSubject", subfolder: str = "") -> str:
    """Python that puts an adapter on the model it was trained on.

    Args:
        subfolder: of the repository, where the adapter lies beside the merged model.
    """
    head, options = "AutoModelForCausalLM", ""
    if subject.kind == "reward":
        head, options = "AutoModelForSequenceClassification", ", num_labels=1"
    start = next(iter(subject.parents(START)), None)
    base = subject.config.get("base_model_name_or_path") or "BASE"
    if start is not None:
        base = start.hub_id or start.name
    trust = ", trust_remote_code=True" if start is None or start.hub_id is None else ""
    inside = f', subfolder="{subfolder}"' if subfolder else ""
    return (
        f"from peft import PeftModel\nfrom transformers import {head}\n"
        f"base = {head}.from_pretrained({json.dumps(base)}{options}{trust})\n"
        f"model = PeftModel.from_pretrained(base, {json.dumps(subject.address)}{inside})"
    )


def _trust(config: dict[str, object]) -> str:
    """What a model needs whose code lies beside it."""
    return ", trust_remote_code=True" if "auto_map" in config else ""


def _score(subject: "ModelSubject") -> str:
    from trueup.app.card_model import has_template

    if has_template(subject.model.path):
        chat = (
            f'chat = [{{"role": "user", "content": "{QUESTION}"}}, '
            f'{{"role": "assistant", "content": "{REPLY}"}}]\n'
        )
        tokens = f'{chat}tokens = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")'
    else:
        tokens = f'tokens = tokenizer("{QUESTION} {REPLY}", return_tensors="pt")'
    return f"{tokens}\nprint(model(**tokens).logits[0, 0].item())  # higher is better"
