"""A program drops while it trains as its model does: every kind of dropout, in the same places, from the same seed."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaForCausalLM, PreTrainedModel

from spp_fx.errors import SppFxError
from spp_fx.graph.program import Program
from spp_fx.graph.trace import trace
from tests.families import VOCABULARY, batch, shallow

pytestmark = pytest.mark.usefixtures("real_exports")

KINDS = {
    "module": lambda x, training: nn.Dropout(0.3).train(training)(x),
    "in-place": lambda x, training: nn.Dropout(0.3, inplace=True).train(training)(x + 0),
    "function": lambda x, training: nn.functional.dropout(x, training=training),
    "channels": lambda x, training: nn.functional.dropout2d(x.unsqueeze(-1), 0.4, training).squeeze(-1),
    "alpha": lambda x, training: nn.functional.alpha_dropout(x, 0.2, training=training),
    "while training only": lambda x, training: nn.functional.dropout(x, 0.3 if training else 0.0, training),
    "attention": lambda x, training: nn.functional.scaled_dot_product_attention(
        x, x, x, None, 0.3 if training else 0.0
    ),
}  # fmt: skip


class Dropping(nn.Module):
    """Between other work, and called twice by its model."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.scale = kind, nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return KINDS[self.kind](x * self.scale, self.training) + x


class Attention(nn.MultiheadAttention):
    """Of torch, whose function calls the others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


def with_norms(make) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = shallow("llama")
    config.attention_dropout = 0.1
    model = LlamaForCausalLM(config)
    own = make(config.hidden_size)
    model.model.norm = nn.Sequential(model.model.norm, own, own)
    return model.eval()


def assert_drops_like(program: Program, model: PreTrainedModel, **given: Tensor) -> None:
    """Equal to the bit in each mode, from the same seeds; training differs from evaluation."""
    logits = {}
    for training in (False, True):
        for seed in (1, 2):
            for each in (program.train(training), model.train(training)):
                torch.manual_seed(seed)
                logits[training, seed, each is model] = each(**given).logits
            assert torch.equal(logits[training, seed, True], logits[training, seed, False])
    assert torch.equal(logits[False, 1, True], logits[False, 2, True])
    assert not torch.equal(logits[True, 1, True], logits[True, 2, True])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_kind_of_dropout_is_the_models(kind):
    model = with_norms(lambda _: Dropping(kind))
    model.config.attention_dropout = 0.0
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    model.config.dropout = 0.1  # of a family that has the option under some name
    assert_drops_like(trace(model), model, input_ids=batch())


def test_dropout_of_torchs_own_attention_is_the_models():
    model = with_norms(lambda width: Attention(width, 2, dropout=0.3, batch_first=True))
    assert_drops_like(trace(model), model, input_ids=batch())


class Skipping(nn.Module):
    """Drops in one mode only, which a program, whose path is that of evaluation, cannot follow."""

    def __init__(self, *, while_training: bool) -> None:
        super().__init__()
        self.when = while_training

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.2, self.training) if self.training == self.when else x * 2


@pytest.mark.parametrize("when", [True, False])
def test_another_path_while_training_is_refused(when):
    with pytest.raises(
        SppFxError, match=r"takes another path while training .* set its dropout options to 0"
    ):
        trace(with_norms(lambda _: Skipping(while_training=when)))


def test_a_model_that_skips_layers_is_refused_until_it_is_told_not_to():
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": VOCABULARY}
    sizes |= {
        f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")
    }
    torch.manual_seed(0)
    for layer_drop in (0.5, 0.0):
        model = BartForConditionalGeneration(BartConfig(**sizes, encoder_layerdrop=layer_drop)).eval()
        if layer_drop:
            with pytest.raises(SppFxError, match=r"while training .*set its dropout options to 0"):
                trace(model)
            continue
        with torch.no_grad():
            assert_drops_like(trace(model), model, input_ids=batch(), decoder_input_ids=batch())


class Refusing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("it takes 128 tokens while it trains")
        return x


def test_what_a_model_says_of_its_training_is_passed_on():
    with pytest.raises(SppFxError, match=r"cannot be traced while training .*it takes 128 tokens"):
        trace(with_norms(lambda _: Refusing()))


def test_functions_of_torch_are_what_they_were():
    before = dict(vars(nn.functional))
    trace(with_norms(lambda _: Dropping("module")))
    assert dict(vars(nn.functional)) == before
