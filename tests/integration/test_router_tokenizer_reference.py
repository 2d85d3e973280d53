"""Tokenizer and chat template agree with the reference implementation."""

import pytest

from cluster.router.tokenization import Tokenizer
from tests.contract import small_tokenizers

pytestmark = pytest.mark.integration
MESSAGES = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "dog\n"}]


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "metaspace"])
def test_the_same_ids_and_text_as_transformers(name: str, tmp_path) -> None:
    import transformers

    files = small_tokenizers.files(getattr(small_tokenizers, name)())
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer(files)
    text = "The fox says 한국 👩 STOP"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.render_chat(MESSAGES) == theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
