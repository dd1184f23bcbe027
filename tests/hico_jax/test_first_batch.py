from __future__ import annotations

from hico_jax import registry
from hico_jax.batch import Batch
from hico_jax.first_batch import page


def test_what_is_masked_is_grey_and_what_is_learnt_green() -> None:
    batch = Batch.fake(registry.model_config("tiny").geometry(), rows=2)
    text = page(batch, lambda ids: "".join(f"<{i}>" for i in ids))
    assert text.count("data:image/jpeg") > 2
    assert text.count('class="row"') == 2
    learnt = text.split('class="learnt">')[1].split("</span>")[0]
    assert learnt == "".join(f"&lt;{i}&gt;" for i in batch.tokens[0, -5:])
    assert 'class="visual">' in text
    assert "&lt;" in text.split('class="masked">')[1]
