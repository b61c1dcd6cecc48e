"""What a stranger's machine would find in a pushed folder: run by `trueup push` in a process of its own.

    python -I push_probe.py '{"folder": ..., "head": "AutoModelForCausalLM", ...}'

Nothing of trueup is imported here, and nothing can be: the files must do without it. Prints one JSON object.
"""

import json
import sys
from typing import Any


def main() -> None:
    """Open the folder as the request on the command line says."""
    sys.modules["trueup"] = None  # type: ignore[assignment]  # installed or not, importing it fails
    request = json.loads(sys.argv[1])
    found = rows(**request) if "logits" not in request else model(**request)
    print("\n" + json.dumps(found))


def rows(folder: str) -> dict[str, Any]:
    """Rows by split, as `load_dataset` reads them."""
    from datasets import load_dataset

    return {"rows": {str(split): len(part) for split, part in load_dataset(folder).items()}}


def model(folder: str, head: str, remote: bool, max_new_tokens: int, logits: str) -> dict[str, Any]:
    """Open a model by every Auto class and use it.

    Args:
        head: the Auto class that it was saved for.
        remote: run the folder's own code.
        max_new_tokens: of a reply, which is to end before; 0: it is no chat model.
        logits: file to write the logits of `probe_ids` to.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=remote)
    names = sorted({head, "AutoModel", *(getattr(config, "auto_map", None) or {} if remote else {})})
    classes = {"AutoConfig": type(config).__name__}
    found: dict[str, Any] = {"classes": classes, "missing": []}
    for name in (name for name in names if name.startswith("AutoModel")):
        loaded, report = getattr(transformers, name).from_pretrained(
            folder, trust_remote_code=remote, dtype="auto", output_loading_info=True
        )
        classes[name] = type(loaded).__name__
        if name in (head, "AutoModel"):  # another head than the stored one is new, and may be
            found["missing"] += sorted(report["missing_keys"])
        if name == head:
            with torch.inference_mode():
                save_file({"logits": loaded.eval()(probe_ids(config)).logits.contiguous()}, logits)
            found |= about(loaded, folder, remote)
            if max_new_tokens:
                found |= reply(loaded, folder, remote, max_new_tokens)
        del loaded
    return found


def probe_ids(config: Any) -> Any:
    """Random tokens (1, T), the same everywhere."""
    import torch

    text = config.get_text_config()
    length = min(32, getattr(text, "max_position_embeddings", None) or 32)
    return torch.randint(text.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def about(loaded: Any, folder: str, remote: bool) -> dict[str, Any]:
    """Whether tied weights are one, and what each file holds for the end of a turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
    config = loaded.config.get_text_config()
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    generation = getattr(loaded, "generation_config", None)
    return {
        "wants_tied": bool(config.tie_word_embeddings) and head is not None,
        "tied": tied,
        "eos": {
            "tokenizer": tokenizer.eos_token_id,
            "config": config.eos_token_id,
            "generation_config": generation.eos_token_id if generation is not None else None,
        },
        "eos_token": tokenizer.eos_token,
    }


def reply(loaded: Any, folder: str, remote: bool, max_new_tokens: int) -> dict[str, Any]:
    """Tokens of a greedy reply, and whether it ended by itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
    asked = [{"role": "user", "content": "Hello."}]
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or 1 << 31
    room = min(max_new_tokens, context - length)
    answer = loaded.generate(**inputs, max_new_tokens=room, do_sample=False)[0, length:].tolist()
    ends = loaded.generation_config.eos_token_id
    ended = bool(answer) and answer[-1] in (ends if isinstance(ends, list) else [ends])
    return {"reply": {"tokens": len(answer), "ended": ended}}


if __name__ == "__main__":
    main()
