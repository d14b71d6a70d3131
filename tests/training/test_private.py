"""DP-SGD in the cohort against Opacus, one client at a time: GradSampleModule and DPOptimizer, the same draws and generators."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import WithLinearR, adapted_classifier, adapted_model, take_private_steps, tiny_classifier, tiny_model, unreachable_entries

from fedsim.choices import Optimizer, Schedule
from fedsim.config import TrainingConfig
from fedsim.core.adapters import adapt, adapted_layers, bound, factors, install, matrix_shape
from fedsim.core.forms import DENSE, LORA, RAVAN
from fedsim.core.gradient_parts import WHOLE, GradientParts, Sketch
from fedsim.core.initialization import new_head
from fedsim.core.payload import Layout
from fedsim.models import head_paths
from fedsim.seeding import NoiseKey
from fedsim.training.cohort import ClientData, LocalRule, private_batches, train_cohort
from fedsim.training.gradients import FactoredGradients, clipped_weight_gradients, weight_gradients
from fedsim.training.private import CohortDPOptimizer, PrivateRule, noise_of_initial_gradient, poisson_batches, sampling_rate
from fedsim.types import EncodedExample

KEY = NoiseKey.of_seed(0)

SIZES, NOISE, CLIP = (9, 5, 14), (0.7, 1.3, 0.4), 0.05
SGD = {"optimizer": Optimizer.sgd, "learning_rate": 0.5, "schedule": Schedule.constant, "warmup_ratio": 0.0}


def training(**options):
    return TrainingConfig(**{"batch_size": 4, "local_steps": 4, "tokens_per_pass": 60, **SGD, **options})


def clients(sequences, sizes=SIZES):
    return [ClientData(i, sequences(n, seed=i)) for i, n in enumerate(sizes)]


def train(model, cohort, noise=NOISE, clip=CLIP, **options):
    current = factors(model, ("R",))
    layout = Layout.of(current)
    rule = PrivateRule(clip, tuple(noise[: len(cohort)]), KEY)
    return train_cohort(model, layout.pack(current), layout, cohort, training(**options), pad_id=0, seed=0, round=1, rounds=1, private=rule)


def opacus_alone(architecture, data, noise, options):
    """Trains one client with Opacus in float64, in which Opacus draws the same noise as fedsim."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = adapted_model(architecture).train()
    names = list(adapted_layers(model))
    for name, layer in adapted_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, WithLinearR(layer))
    Rs = [model.get_submodule(name).R.weight for name in names]
    private = GradSampleModule(model.double(), loss_reduction="sum", strict=False)
    expected = len(data.examples) * sampling_rate(len(data.examples), 4)
    kind = torch.optim.AdamW(Rs, lr=0.01, weight_decay=0.0) if "optimizer" in options else torch.optim.SGD(Rs, lr=0.5)
    optimizer = DPOptimizer(
        kind,
        noise_multiplier=noise,
        max_grad_norm=CLIP,
        expected_batch_size=expected,
        generator=KEY.torch("noise", 1, data.client),
    )
    batches = private_batches([each.num_tokens for each in data.examples], training(), KEY.torch("poisson", 1, data.client))

    def inputs(i):
        example = data.examples[i]
        labels = torch.tensor([[-100] * example.loss_start + example.input_ids[example.loss_start :].tolist()])
        return {"input_ids": torch.tensor([example.input_ids.tolist()]), "labels": labels, "use_cache": False}

    return take_private_steps(private, optimizer, Rs, batches, inputs)


TRAINED = [(LORA, ("B", "A")), (LORA, ("B",)), (RAVAN, ("H", "s")), (DENSE, ("D",))]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("form", "kinds"), TRAINED)
def test_the_sum_of_clipped_gradients_equals_autograd_one_example_at_a_time_for_every_form(form, kinds, trainable, sequences):
    model, generator = tiny_model("llama"), torch.Generator().manual_seed(0)
    spec = adapt(model, form, 4, 2, 0.5, [])
    install(model, {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in factors(model, spec.kinds).items()})
    start, cohort = factors(model, kinds), clients(sequences)
    layout = Layout.of(start)
    mask = torch.rand(3, layout.num_parameters, generator=generator) < 0.5 if trainable else torch.ones(3, layout.num_parameters)
    results = train_cohort(
        model,
        layout.pack(start),
        layout,
        cohort,
        training(learning_rate=1.0, local_steps=1),
        pad_id=0,
        seed=0,
        round=1,
        rounds=1,
        rule=LocalRule(trainable=mask if trainable else None),
        private=PrivateRule(CLIP, (0.0, 0.0, 0.0), KEY),
    )
    for result, data, own in zip(results, cohort, mask, strict=True):
        (batch,) = private_batches([e.num_tokens for e in data.examples], training(local_steps=1), KEY.torch("poisson", 1, data.client))
        total = torch.zeros(layout.num_parameters)
        for i in batch:
            leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in start.items()}
            with bound(model, leaves):
                example = data.examples[i]
                labels = torch.tensor([[-100] * example.loss_start + example.input_ids[example.loss_start :].tolist()])
                loss = model(input_ids=torch.tensor([example.input_ids.tolist()]), labels=labels, use_cache=False).loss
            flat = own * torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(leaves.values()))])
            total += flat * min(1.0, CLIP / float(flat.norm()))
        expected = layout.pack(start) - total / (len(data.examples) * sampling_rate(len(data.examples), 4))
        torch.testing.assert_close(result.factors, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of Opacus, about its hooks
@pytest.mark.parametrize("options", [{}, {"batch_size": 2, "accumulation": 2}, {"optimizer": Optimizer.adamw, "learning_rate": 0.01}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_a_private_cohort_equals_opacus_client_by_client(architecture, options, sequences):
    cohort = clients(sequences)
    for result, data, noise in zip(train(adapted_model(architecture), cohort, **options), cohort, NOISE, strict=True):
        alone = opacus_alone(architecture, data, noise, options)
        torch.testing.assert_close(result.factors, alone, rtol=0, atol=2e-5 if "optimizer" in options else 1e-6)


def test_an_empty_poisson_batch_still_noises_every_entry(sequences):
    cohort, model = clients(sequences, (5,)), adapted_model()
    assert private_batches(cohort[0].lengths, training(batch_size=1, local_steps=1), KEY.torch("poisson", 1, cohort[0].client)) == [[]]
    (noised,) = train(model, cohort, batch_size=1, local_steps=1, noise=(1.0,))
    start = Layout.of(factors(model, ("R",))).pack(factors(model, ("R",)))
    assert (noised.factors - start).abs().min() > 0


def deviation(sequences, noise):
    """Standard deviation of the noise in each client's step, in units of the clip norm."""
    cohort, model = clients(sequences), adapted_model()
    with_noise, without = (train(model, cohort, noise=each, local_steps=1, learning_rate=1.0) for each in (noise, (0.0, 0.0, 0.0)))
    added = [
        (a.factors - b.factors) * len(data.examples) * sampling_rate(len(data.examples), 4) / CLIP
        for a, b, data in zip(with_noise, without, cohort, strict=True)
    ]
    return [float(each.std()) for each in added]


def test_noise_has_its_standard_deviation_and_not_two_thirds_or_three_halves_of_it(sequences):
    def accepted(found, claimed):
        return abs(found / claimed - 1) < 0.12  # 896 values: four standard errors are 0.094

    found = deviation(sequences, NOISE)
    for sigma, claimed in zip(found, NOISE, strict=True):
        assert accepted(sigma, claimed)
    for factor in (2 / 3, 3 / 2):
        wrong = deviation(sequences, tuple(factor * noise for noise in NOISE))
        assert not any(accepted(sigma, claimed) for sigma, claimed in zip(wrong, NOISE, strict=True))


def test_noise_of_large_adapters_is_drawn_by_several_threads_and_is_the_same(sequences, monkeypatch):
    cohort = clients(sequences)
    one_after_another = [result.factors for result in train(adapted_model(), cohort)]
    monkeypatch.setattr("fedsim.training.private.THREADED_FROM", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a.factors, b) for a, b in zip(train(adapted_model(), cohort), one_after_another, strict=True))


def test_examples_are_drawn_at_the_sampling_rate_and_not_at_another():
    draws = np.array([len(batch) for batch in poisson_batches(200, 0.1, 400, KEY.torch("poisson"))])
    standard_error = np.sqrt(200 * 0.1 * 0.9 / 400)
    assert abs(draws.mean() - 20) < 4 * standard_error < abs(200 * 0.12 - draws.mean())
    assert draws.var() == pytest.approx(200 * 0.1 * 0.9, rel=0.3), "a fixed batch size would vary by nothing"


def test_an_example_moves_the_sum_by_at_most_the_clip_norm_whatever_the_other_examples_are(sequences):
    """Noise off, one step over everything: the change of the sum is the contribution of one example."""
    model, everything = adapted_model(), {"batch_size": 100, "local_steps": 1, "learning_rate": 1.0}
    examples = sequences(8, seed=3)

    def total(of):
        (result,) = train(model, [ClientData(0, of)], noise=(0.0,), **everything)
        start = Layout.of(factors(model, ("R",))).pack(factors(model, ("R",)))
        return (start - result.factors) * len(of)  # the expected batch is the number of examples

    with_it, without = total(examples), total(examples[:-1])
    contribution = with_it - without
    assert 0.9 * CLIP < contribution.norm() < CLIP * 1.001
    others = sequences(7, seed=77)  # of other lengths and contents
    again = total([*others, examples[-1]]) - total(others)
    torch.testing.assert_close(again, contribution, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_an_example_with_a_huge_or_non_finite_gradient_moves_the_sum_by_at_most_the_clip_norm(sequences, bad):
    """A sum that is not finite would reveal the example, whatever the noise."""
    model, only_mine = adapted_model("mistral"), 49  # whose head has weights of its own
    examples = [example for example in sequences(12, seed=3) if only_mine not in example.input_ids]
    mine = EncodedExample((*examples[0].input_ids[:-1], only_mine), 3)
    model.get_input_embeddings().weight.data[only_mine] = bad
    everything = {"batch_size": 100, "local_steps": 1, "learning_rate": 1.0, "tokens_per_pass": 1000}
    (without,), (with_mine,) = (train(model, [ClientData(0, of)], noise=(0.0,), **everything) for of in (examples, [*examples, mine]))
    start = Layout.of(factors(model, ("R",))).pack(factors(model, ("R",)))
    moved = (start - with_mine.factors) * (len(examples) + 1) - (start - without.factors) * len(examples)
    assert moved.norm() < CLIP * 1.001
    options = {"pad_id": 0, "tokens_per_pass": 1000}
    gradients, of_others = (clipped_weight_gradients(model, of, CLIP, **options) for of in ([*examples, mine], examples))
    assert torch.stack([(gradients[name] - of_others[name]).norm() for name in gradients]).norm() < CLIP * 1.001


@pytest.mark.parametrize(("batch_size", "examples"), [(4, 17), (3, 10_000_000), (1, 3), (4, 4), (9, 4), (1, 1 << 24)])
def test_the_charged_sampling_rate_is_exactly_that_of_the_coin_flips(batch_size, examples):
    rate, sides = sampling_rate(examples, batch_size), 1 << 24
    assert Fraction(rate) >= min(Fraction(batch_size, examples), 1)
    assert Fraction(rate) - Fraction(batch_size, examples) <= Fraction(1, sides)
    near = torch.arange(max(0, int(rate * sides) - 3), min(sides, int(rate * sides) + 3)).float() / sides  # values of torch.rand
    assert [float(coin) < Fraction(rate) for coin in near] == (near < rate).tolist()
    assert (rate * sides).is_integer(), "so many of the coin's sides are below it, and no side is in part"
    assert float((torch.rand(10_000) * sides).frac().max()) == 0


def test_a_private_client_reports_neither_loss_nor_tokens(sequences):
    result = train(adapted_model(), clients(sequences))[0]
    assert np.isnan(result.loss)
    assert result.num_tokens == 0


def test_the_private_result_does_not_depend_on_the_cohort_or_the_packing(sequences):
    model, cohort = adapted_model(), clients(sequences)
    together, small = train(model, cohort), train(model, cohort, tokens_per_pass=15)
    for i, data in enumerate(cohort):
        (alone,) = train(model, [data], noise=(NOISE[i],))
        torch.testing.assert_close(together[i].factors, alone.factors, rtol=0, atol=1e-6)
        torch.testing.assert_close(together[i].factors, small[i].factors, rtol=0, atol=1e-6)


def test_checkpointing_and_a_bfloat16_base_train_privately(sequences):
    plain, saved = (train(adapted_model(activation_checkpointing=each), clients(sequences))[0].factors for each in (False, True))
    torch.testing.assert_close(plain, saved, rtol=0, atol=1e-6)
    half = adapted_model()
    half.to(torch.bfloat16)
    for layer in adapted_layers(half).values():
        layer.R, layer.A, layer.B = layer.R.float(), layer.A.float(), layer.B.float()
    cohort, no_noise = clients(sequences), (0.0,) * len(clients(sequences))
    start = Layout.of(factors(half, ("R",))).pack(factors(half, ("R",)))
    exact, coarse = (train(model, cohort, noise=no_noise)[0].factors - start for model in (adapted_model(), half))
    assert float((coarse - exact).norm()) < 0.3 * float(exact.norm())


def clipped_one_by_one(model, examples, parts, clip_norm=None):
    """Returns the flat sum of the examples' gradients, each clipped by hand, and the clip norm, by default their median norm."""
    found = [weight_gradients(model, [example], pad_id=0, tokens_per_pass=100, parts=parts) for example in examples]
    flat = torch.stack([torch.cat([gradient.flatten() for gradient in each.values()]) for each in found]).double()
    norms = flat.norm(dim=1)
    clip_norm = clip_norm or float(norms.median())
    return (flat * (clip_norm / norms).clamp(max=1.0)[:, None]).sum(0).float(), clip_norm


def shapes_of(model):
    return {name: matrix_shape(layer.base) for name, layer in adapted_layers(model).items()}


@pytest.mark.parametrize("tokens_per_pass", [1, 30, 1000])
@pytest.mark.parametrize("sketched", [False, True])
def test_the_initial_gradient_is_clipped_per_example_over_all_layers(sequences, sketched, tokens_per_pass):
    model, examples = adapted_model(), sequences(9)
    shapes = shapes_of(model)
    parts = GradientParts(shapes, {name: Sketch.of(shape, 4, 0) for name, shape in shapes.items()} if sketched else {})
    expected, clip_norm = clipped_one_by_one(model, examples, parts)
    found = clipped_weight_gradients(model, examples, clip_norm, pad_id=0, tokens_per_pass=tokens_per_pass, parts=parts)
    torch.testing.assert_close(torch.cat([gradient.flatten() for gradient in found.values()]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "apart"])
def test_the_initial_gradient_is_clipped_per_pair_also_where_its_texts_are_read_apart(pairs, architecture):
    model, examples = adapted_classifier(architecture), pairs(9, apart=architecture == "apart")
    expected, clip_norm = clipped_one_by_one(model, examples, WHOLE)
    found = clipped_weight_gradients(model, examples, clip_norm, pad_id=0, tokens_per_pass=60)
    torch.testing.assert_close(torch.cat([gradient.flatten() for gradient in found.values()]), expected, rtol=1e-4, atol=1e-6)
    for pair in examples:
        alone = clipped_weight_gradients(model, [pair], 1e-3, pad_id=0, tokens_per_pass=60)
        assert float(torch.cat([gradient.flatten() for gradient in alone.values()]).norm()) < 1.0001e-3


def test_the_initial_gradient_of_layers_with_one_row_per_example_is_clipped_too(pairs):
    model, examples = tiny_classifier("bert"), pairs(5)
    spec = adapt(model, LORA, 2, 1, 1.0, ["dense"], head_paths(model))
    install(model, new_head(spec, seed=0))
    assert any("pooler" in name for name in adapted_layers(model))
    expected, clip_norm = clipped_one_by_one(model, examples, WHOLE)
    found = clipped_weight_gradients(model, examples, clip_norm, pad_id=0, tokens_per_pass=60)
    torch.testing.assert_close(torch.cat([gradient.flatten() for gradient in found.values()]), expected, rtol=1e-4, atol=1e-6)


def test_squared_norms_are_accurate_for_gradients_whose_tokens_cancel_out():
    generator = torch.Generator().manual_seed(0)
    deltas, inputs = torch.randn(50, 8, 6, generator=generator), torch.randn(50, 8, 5, generator=generator)
    deltas, inputs = torch.cat([deltas, -deltas], dim=1), torch.cat([inputs, inputs * (1 + 1e-4)], dim=1)
    expected = torch.einsum("eto,eti->eoi", deltas.double(), inputs.double()).square().sum((1, 2))
    torch.testing.assert_close(FactoredGradients(deltas, inputs).squared_norms(), expected.float(), rtol=1e-4, atol=0)
    once = (1024 * deltas[:, :8]).round() / 1024  # so that three times that is exact, and what is left is the rounding of norms alone
    nothing = FactoredGradients(torch.cat([once, 2 * once, -3 * once], dim=1), inputs[:, :8].repeat(1, 3, 1)).squared_norms()
    assert nothing.min() >= 0
    assert nothing.max() < 1e-12


def test_the_clipped_gradient_of_no_examples_is_zero():
    assert not any(g.any() for g in clipped_weight_gradients(adapted_model(), [], 1.0, pad_id=0, tokens_per_pass=100).values())


def test_the_noise_of_the_initial_gradient_has_its_standard_deviation():
    noised = noise_of_initial_gradient(torch.zeros(40_000), 1.5, 0.2, KEY.torch("noise"))
    assert float(noised.std()) == pytest.approx(0.3, rel=0.02)
    assert not noise_of_initial_gradient(torch.zeros(4), 0.0, 0.2, KEY.torch("noise")).any()


def noised_step(total):
    """The noised gradients of a step of DP-SGD whose clipped gradients have this sum."""
    found, stack = [], torch.zeros(1, len(total))
    options = {"noise_multipliers": [1.0], "clip_norm": 1.0, "expected_batch_sizes": [1.0], "generators": [KEY.torch("noise")]}
    optimizer = CohortDPOptimizer(stack, Layout.of({"R": total}), lambda gradients: found.append(gradients[0].clone()), **options)
    optimizer.start(total.clone().unsqueeze(0))
    optimizer.finish()
    return found[0]


@pytest.mark.parametrize("release", [noised_step, lambda total: noise_of_initial_gradient(total, 1.0, 1.0, KEY.torch("noise"))])
@pytest.mark.parametrize("inside", [True, False])
def test_the_last_bits_of_a_release_do_not_reveal_the_sum_that_noise_was_added_to(release, inside):
    generator = torch.Generator().manual_seed(0)
    without = 0.02 * torch.randn(100_000, generator=generator)
    example = torch.randn(100_000, generator=generator)
    sums = without, without + example / example.norm()
    released = release(sums[inside])
    false, true = (unreachable_entries(released, each) for each in (sums[not inside], sums[inside]))
    assert true == pytest.approx(false, rel=0.15), "with noise of float32 none of the true sum, thousands of the other one"
    assert unreachable_entries(sums[inside] + torch.randn(100_000, generator=generator), sums[inside]) == 0 < false
