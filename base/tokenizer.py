"""The tokenizer: byte-level BPE, special tokens that exist from the start, one chat template.

    0 <|pad|>   1 <|bos|>   2 <|end|>   3 <|system|>   4 <|user|>   5 <|assistant|>   6 <|tool|>
    7 to 22 <|spare_0|> to <|spare_15|>   from 23 the 256 bytes, then the merges

`<|end|>` ends a turn and a document: it is the eos token. Encoding puts `<|bos|>` before a text, as the model
saw every document in pretraining.
"""

from collections.abc import Iterable, Iterator
from importlib.resources import files

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from trueup.recipes.errors import UsageError

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
SPARE = tuple(f"<|spare_{index}|>" for index in range(16))
SPECIAL_TOKENS = (PAD, BOS, EOS, *ROLES, *SPARE)

# GPT-4's pre-tokeniser (cl100k_base in https://github.com/openai/tiktoken), but digits one by one: a small
# model can then learn to add.
PRETOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, model_max_length: int = 1024, show_progress: bool = False
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on texts; any Unicode text survives encoding and decoding unchanged.

    Args:
        texts: documents; read once.
        vocab_size: entries, the special tokens and the 256 bytes included. A small corpus may have too few
            pairs to merge: `len()` of the result says how many there are.
        model_max_length: the model's context in tokens, for truncation.

    Raises:
        UsageError: `vocab_size` has no room for bytes and special tokens, or there is no text.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise UsageError(
            f"vocab_size: {vocab_size} is too small; {len(alphabet)} bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens need {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(_not_all_empty(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[*ROLES, *SPARE],
        chat_template=files("trueup.base").joinpath("chat_template.jinja").read_text(encoding="utf-8"),
        model_max_length=model_max_length,
        padding_side="left",  # the end of a prompt must stand where generation begins
        clean_up_tokenization_spaces=False,  # it would eat the space in "end ."
        model_input_names=["input_ids", "attention_mask"],
    )


def _not_all_empty(texts: Iterable[str]) -> Iterator[str]:
    characters = 0
    for text in texts:
        characters += len(text)
        yield text
    if not characters:
        raise UsageError("tokenizer: there is no text to train on; check the data set and its text column")


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Each text whole, as `<|bos|> text <|end|>`, for pretraining.

    The literal text of a special token inside a document becomes plain tokens, never the special token.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a call with truncation=True leaves it switched on
    backend.no_padding()
    backend.encode_special_tokens = True  # that is: like any other text
    try:
        return [[*encoding.ids, tokenizer.eos_token_id] for encoding in backend.encode_batch_fast(texts)]
    finally:
        backend.encode_special_tokens = False


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> float:
    """UTF-8 bytes per token of texts: how far the tokenizer compresses them. bos and eos are not counted.

    Raises:
        UsageError: there is no text.
    """
    size = tokens = 0
    for text in texts:
        size += len(text.encode())
        tokens += len(encode_documents(tokenizer, [text])[0]) - 2
    if not tokens:
        raise UsageError("bytes_per_token: there is no text to measure")
    return size / tokens


def default_generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """The generation_config.json of a model directory: where a reply begins, ends and is padded."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
