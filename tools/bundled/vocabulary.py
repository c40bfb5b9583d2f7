"""Tokenizer of the bundled model: byte-level BPE, with recall names and digits as one token each."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvatlas.workloads.recall import NAMES

VOCAB_SIZE = 1024
END_TOKEN = "<|end|>"
# words, single digits, punctuation runs and white space, each with at most one leading space
SPLIT_PATTERN = r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s+"


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of ``VOCAB_SIZE`` entries; names, spaced digits and "Question" are one token."""
    whole = ["Question", *(f" {word}" for word in (*NAMES, *map(str, range(10))))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(whole),
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
