"""A random model with a tokenizer of bytes, saved as a folder that every command can load."""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from models_for_tests import tiny

CONTEXT = 3072
SPECIAL = ["<pad>", "<end>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_tokenizer():
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *bytes_to_unicode().values()])}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save(folder, **settings):
    """Write the checkpoint to ``folder``, and return it."""
    tokenizer = byte_tokenizer()
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
