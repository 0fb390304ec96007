"""Models in which the documents of a packed row see each other are refused before a step is done.

The oracle: the model on the second document alone.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, OPTConfig

from ditty.config.choices import Precision
from ditty.config.spec import ModelSpec, TrainSpec
from ditty.errors import ModelError
from ditty.models.attention import check_isolation, forward_kwargs
from ditty.models.batches import flat_batch
from ditty.models.model import load_base
from ditty.runs.rundir import RunDir
from ditty.training.feed import PackedFeed
from ditty.training.sampler import BatchSplit, SampleOrder
from ditty.training.trainer import Place, Trainer
from tests.tiny import VOCABULARY, make_model_folder, random_rows, tiny_config

CPU = torch.device("cpu")
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
LEAKS = {
    "bloom": (BloomConfig(**SIZES, n_head=4), "eager"),
    "mamba": (MambaConfig(**SIZES, state_size=4), "eager"),
    "opt": (
        OPTConfig(**SIZES, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=32),
        "eager",
    ),
}


def load(folder, attention):
    spec = ModelSpec(base_model=str(folder), adapter="none", attention=attention)
    return load_base(folder, spec, Precision.FP32, CPU)


@torch.no_grad()
def difference_from_alone(model, folder):
    """Of the second document's logits in a flat batch, from those of the plain model on it."""
    ids = torch.arange(5, 45)
    batch = flat_batch(ids, ids, torch.tensor([20, 20]))
    together = model.eval()(**forward_kwargs(model, batch)).logits[0, 20:]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return float((together - plain(ids[None, 20:]).logits[0]).abs().max())


@pytest.mark.parametrize("name", LEAKS)
def test_a_model_that_mixes_documents_is_refused(name, tmp_path):
    config, attention = LEAKS[name]
    folder = make_model_folder(tmp_path / "model", config)
    model = load(folder, attention)
    assert difference_from_alone(model, folder) > 1e-4, "this one does not mix them"
    with pytest.raises(ModelError, match="mixes the documents .* data.packing: none"):
        check_isolation(model, model, CPU)


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_a_model_that_does_not_is_not(attention, tmp_path):
    folder = make_model_folder(tmp_path / "model", tiny_config())
    model = load(folder, attention)
    assert difference_from_alone(model, folder) < 1e-5
    model.train()
    check_isolation(model, model, CPU)
    assert model.training


@pytest.mark.parametrize(
    ("documents", "micro", "refused"), [(3, 1, True), (1, 2, True), (1, 1, False)]
)
def test_one_document_at_a_time_is_no_matter(documents, micro, refused, tmp_path):
    """Without packing and with one row a micro batch there is nothing to mix."""
    folder = make_model_folder(tmp_path / "model", LEAKS["bloom"][0])
    train = TrainSpec(
        max_steps=1, precision="fp32", micro_batch_size=micro, gradient_accumulation_steps=2
    )
    rows = random_rows(4, documents=documents, seed=1)
    split = BatchSplit(micro, 2, 0, 1)
    order = SampleOrder(len(rows), split.global_batch_size, train.sampling, train.seed)
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    trainer = Trainer(load(folder, "eager"), PackedFeed(rows, order, split), train, Place(run))
    if refused:
        with pytest.raises(ModelError, match="mixes the documents"):
            trainer.fit()
        assert not run.committed_steps()
    else:
        assert trainer.fit().finished
