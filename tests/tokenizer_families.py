"""Small tokenizers of every family that language models use, each trained here from a few sentences."""

import json
import random
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from conftest import CORPUS, SPECIAL_TOKENS

TEXTS = [" ".join(random.Random(0).choices(CORPUS, k=12)) for _ in range(300)]
ALPHABET = sorted({*map(chr, range(32, 127)), "\n", "▁"})
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TIKTOKEN = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _wrapped(tokenizer: Tokenizer, **tokens: str | None) -> PreTrainedTokenizerFast:
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **tokens}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in named.items() if v})


def _byte_level(split: Any = None, *, prefix: bool = False, **tokens: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split is None)
    tokenizer.pre_tokenizer = level if split is None else pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrapped(tokenizer, **tokens)


def _sentencepiece(scheme: str, *, unigram: bool = False, adds: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.Unigram() if unigram else models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=unigram)
    strip = [decoders.Strip(" ", 1, 0)] if scheme != "never" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if unigram:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=["<unk>", *SPECIAL_TOKENS], initial_alphabet=ALPHABET, unk_token="<unk>",
            show_progress=False,
        )  # fmt: skip
    else:
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<unk>", *SPECIAL_TOKENS, *BYTES], initial_alphabet=ALPHABET,
            show_progress=False,
        )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    if adds:  # as published tokenizers do, who write BOS, and EOS, around everything
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return _wrapped(tokenizer, unk_token="<unk>")


def _llama(*, legacy: bool) -> LlamaTokenizer:
    """Build Llama's own class, which SentencePiece models of many publishers name, from a trained vocabulary."""
    model = _sentencepiece("first").backend_tokenizer.model
    settings = json.loads(Tokenizer(model).to_str())["model"]
    merges = [tuple(merge) for merge in settings["merges"]]
    return LlamaTokenizer(vocab=settings["vocab"], merges=merges, legacy=legacy, pad_token="<pad>")


def _word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *SPECIAL_TOKENS]
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, initial_alphabet=ALPHABET,
                                         show_progress=False),
    )  # fmt: skip
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return _wrapped(tokenizer, bos_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")


def _bytes_only() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return _wrapped(tokenizer)


FAMILIES: dict[str, Callable[[], Any]] = {
    "byte-level BPE": _byte_level,
    "byte-level BPE, prefix space": lambda: _byte_level(prefix=True),
    "byte-level BPE without BOS": lambda: _byte_level(bos_token=None),
    "byte-level BPE without PAD": lambda: _byte_level(pad_token=None),
    "byte-level BPE, PAD is EOS": lambda: _byte_level(pad_token="</s>"),
    "byte-level BPE without any": lambda: _byte_level(bos_token=None, eos_token=None, pad_token=None),
    "tiktoken": lambda: _byte_level(pre_tokenizers.Split(TIKTOKEN, "isolated")),
    "SentencePiece BPE, prefix space": lambda: _sentencepiece("always"),
    "SentencePiece BPE, prefix space first": lambda: _sentencepiece("first"),
    "SentencePiece BPE without prefix space": lambda: _sentencepiece("never"),
    "SentencePiece BPE that adds BOS and EOS": lambda: _sentencepiece("first", adds=True),
    "SentencePiece Unigram": lambda: _sentencepiece("always", unigram=True),
    "Llama": lambda: _llama(legacy=False),
    "Llama, legacy": lambda: _llama(legacy=True),
    "WordPiece": _word_piece,
    "bytes": _bytes_only,
}
