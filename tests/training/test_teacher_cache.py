"""Tokens drawn from a teacher stand for its whole distribution: counts, and gradients, are right on average."""

import math

import pytest
import torch
from torch import Tensor

from spp_fx.errors import SppFxError
from spp_fx.training.losses import distillation_loss, sampled_loss
from spp_fx.training.teacher_cache import Drawn, draw, uniforms, write_drawn

VOCABULARY = 11


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(drawn: Drawn, samples: int) -> Tensor:
    """Share of the samples of each token, (n, vocabulary)."""
    shares = torch.zeros(len(drawn.distinct), VOCABULARY)
    owner = torch.arange(len(drawn.distinct)).repeat_interleave(drawn.distinct)
    shares[owner, drawn.tokens] = drawn.counts.float() / samples
    return shares


@pytest.mark.parametrize("samples", [1, 3, 32, 300])
def test_counts_are_within_one_of_what_is_expected(samples):
    teacher = logits(50, VOCABULARY)
    drawn = draw(teacher, uniforms(0, 0, 50), samples, 1.5)
    shares = dense(drawn, samples)
    torch.testing.assert_close(shares.sum(-1), torch.ones(50))
    probabilities = (teacher / 1.5).softmax(-1)
    assert ((shares - probabilities).abs() < 1 / samples + 1e-6).all()
    entropy = torch.distributions.Categorical(logits=teacher / 1.5).entropy()
    torch.testing.assert_close(drawn.entropy.float(), entropy)


def test_a_token_of_probability_zero_is_never_drawn():
    teacher = torch.full((4, VOCABULARY), -math.inf)
    teacher[:, 3], teacher[:, 7] = 0.0, -50.0
    for uniform in (0.0, 1 - 2**-53):
        drawn = draw(teacher, torch.full((4,), uniform, dtype=torch.float64), 8)
        assert set(drawn.tokens.tolist()) <= {3, 7}


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(SppFxError, match="not finite"):
        draw(torch.full((1, 3), math.nan), uniforms(0, 0, 1), 4)


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0]


def sampled(student: Tensor, drawn: Drawn, temperature: float) -> Tensor:
    """The loss of one row whose every position but the last is learned."""
    length, most = student.shape[1], int(drawn.distinct.max())
    filled = torch.arange(most) < drawn.distinct[:, None]
    draws, counts = (torch.zeros(1, length, most, dtype=torch.int64) for _ in range(2))
    draws[0, :-1][filled], counts[0, :-1][filled] = drawn.tokens, drawn.counts
    entropy = torch.zeros(1, length)
    entropy[0, :-1] = drawn.entropy
    return sampled_loss(student, draws, counts, entropy, temperature=temperature)


def errors(gradients: Tensor, exact: Tensor) -> Tensor:
    """How many standard errors the mean over (seeds, ...) is away, where there is any spread."""
    spread = gradients.std(0) / math.sqrt(len(gradients))
    return ((gradients.mean(0) - exact).abs() / spread.clamp_min(1e-9))[spread > 1e-9]


@pytest.mark.parametrize(("temperature", "samples"), [(1.0, 2), (2.0, 5)])
def test_the_gradient_is_unbiased(temperature, samples):
    student = logits(1, 4, VOCABULARY).requires_grad_()
    teacher, labels = logits(1, 4, VOCABULARY, seed=1), torch.ones(1, 4, dtype=torch.int64)
    exact_loss = distillation_loss(student, teacher, labels, temperature=temperature)
    exact = gradient(exact_loss, student)
    losses, gradients = [], []
    for seed in range(400):
        drawn = draw(teacher[0, :-1], uniforms(seed, 7, 3), samples, temperature)
        losses.append(sampled(student, drawn, temperature))
        gradients.append(gradient(losses[-1], student))
    assert errors(torch.stack(gradients), exact).max() < 4.5
    assert errors(torch.stack(losses)[:, None], exact_loss[None]).max() < 4.5
    # The same number of most probable tokens is not: the test can tell.
    top = teacher[0, :-1] / temperature
    top = top.masked_fill(top < top.topk(samples).values[:, -1:], -math.inf).softmax(-1)
    ours = (student[:, :-1] / temperature).log_softmax(-1)
    biased = gradient(-(top * ours).sum() / 3 * temperature**2, student)
    assert errors(torch.stack(gradients), biased).max() > 20


def test_many_samples_are_the_divergence_itself():
    student = logits(1, 4, VOCABULARY).requires_grad_()
    teacher, labels = logits(1, 4, VOCABULARY, seed=1), torch.ones(1, 4, dtype=torch.int64)
    exact = distillation_loss(student, teacher, labels)
    many = sampled(student, draw(teacher[0, :-1], uniforms(0, 0, 3), 65535), 1.0)
    torch.testing.assert_close(many, exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(gradient(many, student), gradient(exact, student), rtol=0, atol=2e-5)


@pytest.mark.parametrize("vocabulary", [1000, 70000])
@pytest.mark.parametrize("samples", [4, 300])
def test_a_token_takes_no_more_bytes_than_is_said(tmp_path, samples, vocabulary):
    drawn = draw(torch.zeros(200, 1000), uniforms(0, 0, 200), samples)
    file = write_drawn(tmp_path / "tokens.safetensors", [drawn], samples, vocabulary)
    most = {(4, 1000): 17, (4, 70000): 25, (300, 1000): 1206, (300, 70000): 1806}[samples, vocabulary]
    assert (file.positions, file.pairs) == (200, 200 * samples)
    assert (tmp_path / "tokens.safetensors").stat().st_size == pytest.approx(200 * most, abs=600)
