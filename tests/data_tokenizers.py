"""Small tokenizers made on the spot, one for each way in which real ones differ, and the real GPT-2 one."""

from pathlib import Path

import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

settings.register_profile("steady", derandomize=True, deadline=None)  # the same cases on a slow, shared machine
settings.load_profile("steady")

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"
EOS = "<|end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3 does: the last answer gets an empty thought, which is gone once the conversation goes on.
CHATML_WITH_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXTS = ["The answer is 42.", "How many are in the basket? Janet has 3 of them.", "the sum of 1 + 2 = 3\nand more"] * 4


def byte_level(bos: str | None = None, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's; with `bos` it puts that token first by itself, as Llama-3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [EOS, "<|im_start|>", "<|im_end|>", *([bos] if bos else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrapped(tokenizer, bos, chat_template)


def sentence_piece(prepend_scheme: str, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """A BPE that marks spaces with ▁ and puts one before texts: "first" as Llama's does now, "always" as it did."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    space = "▁"
    if prepend_scheme == "always":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[EOS, *([bos] if bos else []), *fallback], show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainer)
    return _wrapped(tokenizer, bos, None)


def _wrapped(tokenizer: Tokenizer, bos: str | None, chat_template: str | None) -> PreTrainedTokenizerFast:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=bos)
    wrapped.chat_template = chat_template
    return wrapped


def real_gpt2() -> PreTrainedTokenizerFast:
    folder = SHARED_DATA / "gpt2-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"needs the GPT-2 tokenizer in {folder}")
    return AutoTokenizer.from_pretrained(folder)


class TwoVocabularies(PreTrainedTokenizerFast):
    """As Marian's: sources are encoded otherwise than targets, and only targets decode back. Here they are reversed."""

    def _switch_to_target_mode(self):
        self.reads_targets = True

    def _switch_to_input_mode(self):
        self.reads_targets = False

    def _encode_plus(self, text, *args, **kwargs):
        if not getattr(self, "reads_targets", False):
            text = [one[::-1] for one in text] if isinstance(text, list) else text[::-1]
        return super()._encode_plus(text, *args, **kwargs)


def of_words(*words: str) -> Tokenizer:
    """A vocabulary of whole words; all others are unknown."""
    vocabulary = {word: number for number, word in enumerate(("<unk>", "</s>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer
