"""Every test, and the benchmark.

    python test_all.py             all of them, without a network
    python test_all.py -k resume   those with "resume" in their name
    python test_all.py --bench     speed and memory, beside other ways of doing the same work

DATA_DIR names a folder with the real MNIST (MNIST/raw/...) and GPT-2's tokenizer (gpt2/vocab.json
and merges.txt, and its weights if they are at hand), REFERENCE_DIR one with what other
implementations of GPT-2 made. Tests that miss these, transformers or tiktoken are skipped, and say
so.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import unittest
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import aae
import common
import gpt
import vae

HERE = Path(__file__).parent
# Absolute, as each test runs in a folder of its own; "" where there is none.
DATA_DIR, REFERENCE_DIR = (os.environ.get(name) and os.path.abspath(os.environ[name]) or ""
                           for name in ("DATA_DIR", "REFERENCE_DIR"))
needs_mnist = unittest.skipUnless(Path(DATA_DIR, "MNIST/raw").is_dir(),
                                  "DATA_DIR names no folder with MNIST in it")
GPT2_FILES = [Path(DATA_DIR, "gpt2", name) for name in ("vocab.json", "merges.txt")]
needs_gpt2_files = unittest.skipUnless(GPT2_FILES[0].is_file(),
                                       "DATA_DIR names no folder with GPT-2's tokenizer in it")
needs_references = unittest.skipUnless(Path(REFERENCE_DIR, "gpt2_tiny").is_dir(),
                                       "REFERENCE_DIR names no folder with references in it")


def needs_transformers(test):
    @functools.wraps(test)
    def wrapper(self):
        try:
            import transformers

            transformers.GPT2LMHeadModel.from_pretrained  # noqa: B018 - refuses an older torch here
        except ImportError:
            self.skipTest("transformers is not installed, or too new for this torch")
        test(self)

    return wrapper


RANDOM_STRINGS = int(os.environ.get("RANDOM_STRINGS", 20_000))
needs_tiktoken = unittest.skipUnless(find_spec("tiktoken"), "tiktoken is not installed")
SHORT = ["--dataset", "glyphs", "--limit", "200", "--batch-size", "64", "--device", "cpu"]


def setUpModule():
    # The tests' models are small: several threads would mostly wait for one another.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def run_main(main, *argv):
    """-> exit status, stdout, stderr of main(argv)"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in argv]) or 0
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def without_pictures(module):
    """Within the `with` block, `module` draws nothing, which takes longer than short runs do."""
    drawing = [name for name in vars(module) if name.startswith("draw_")]
    return mock.patch.multiple(module, **dict.fromkeys(drawing, mock.DEFAULT))


def snapshot(folder):
    """Every file below `folder` with its content's hash."""
    return {path: hashlib.md5(path.read_bytes()).hexdigest()
            for path in Path(folder).rglob("*") if path.is_file()}


class TemporaryFolder(unittest.TestCase):
    """Each test starts in an empty folder of its own, with a small cache of glyphs."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        drawn = mock.patch.object(common, "draw_glyphs", lambda: GLYPHS)
        drawn.start()
        self.addCleanup(drawn.stop)

    def assert_refused(self, *argv, saying=""):
        before = snapshot(".")
        status, out, err = run_main(self.module.main, *argv)
        self.assertEqual((status, out), (2, ""), argv)
        self.assertRegex(err.splitlines()[-1], f"^{self.module.__name__}.py: error: .*{saying}")
        self.assertNotIn("Traceback", err)
        self.assertEqual(snapshot("."), before)


DRAW_GLYPHS = common.draw_glyphs
GLYPHS = DRAW_GLYPHS()


def train_quickly(z_dim, steps):
    """A small VAE that has seen a few thousand glyphs. -> model, test images"""
    torch.manual_seed(0)
    images = GLYPHS[0] >> 4
    model = vae.VAE(z_dim, num_filters=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for x in images[:60_000].split(64)[:steps]:
        rec, kl, _ = model(x)
        optimizer.zero_grad()
        (rec + kl).backward()
        optimizer.step()
    return model, images[60_000:]


class VAEMathematics(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model, cls.images = train_quickly(z_dim=20, steps=300)

    def test_zero_parameters_give_exactly_4_bits(self):
        model = vae.VAE()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        rec, kl, bpd = model(self.images[:64])
        self.assertAlmostEqual(rec.item(), 784 * math.log(16), delta=1e-3)
        self.assertEqual(kl.item(), 0)
        self.assertAlmostEqual(bpd.item(), 4, delta=1e-6)

    def test_untrained_model_is_near_4_bits(self):
        torch.manual_seed(0)
        self.assertAlmostEqual(vae.VAE()(self.images[:64])[2].item(), 4, delta=0.2)

    def test_training_beats_the_frequencies_of_pixel_values(self):
        frequency = torch.bincount(self.images.flatten().long(), minlength=16) / self.images.numel()
        entropy = -(frequency * frequency.clamp(min=1e-9).log2()).sum().item()
        bpd = vae.elbo_to_bpd(sum(vae.evaluate(self.model, self.images[:500])), [1, 1, 28, 28])
        self.assertLess(bpd, 0.9 * entropy)

    def test_kl_matches_torch_distributions_and_monte_carlo(self):
        torch.manual_seed(0)
        mean, log_std = torch.randn(2, 5, 3).double()
        q = torch.distributions.Normal(mean, log_std.exp())
        p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        kl = vae.kl_divergence(mean, log_std)
        torch.testing.assert_close(kl, torch.distributions.kl_divergence(q, p).sum(-1))
        z = q.sample((200_000,))
        estimate = (q.log_prob(z) - p.log_prob(z)).sum(-1).mean(0)
        torch.testing.assert_close(kl, estimate, atol=0.03, rtol=0.01)

    def test_reparameterized_draws_have_the_moments_and_pass_gradients(self):
        torch.manual_seed(0)
        mean, std = torch.tensor([1., -2.]), torch.tensor([0.5, 3.])
        z = vae.sample_reparameterize(mean.expand(100_000, 2), std.expand(100_000, 2))
        torch.testing.assert_close(z.mean(0), mean, atol=0.05, rtol=0)
        torch.testing.assert_close(z.std(0), std, atol=0.05, rtol=0)
        mean, std = mean.requires_grad_(), std.requires_grad_()
        z = vae.sample_reparameterize(mean, std)
        z.sum().backward()
        torch.testing.assert_close(mean.grad, torch.ones(2))
        torch.testing.assert_close(std.grad, ((z - mean) / std).detach())

    def test_reconstruction_loss_is_the_categorical_log_probability(self):
        torch.manual_seed(0)
        logits, x = torch.randn(4, 16, 28, 28), self.images[:4]
        categorical = torch.distributions.Categorical(logits=logits.movedim(1, -1))
        expected = -categorical.log_prob(x.squeeze(1)).sum((1, 2))
        torch.testing.assert_close(vae.reconstruction_loss(logits, x), expected)

    def test_log_weight_matches_torch_distributions(self):
        torch.manual_seed(0)
        mean, log_std, z = torch.randn(3, 4, 20)
        x = self.images[:4]
        normal = torch.distributions.Normal
        expected = (normal(0, 1).log_prob(z) - normal(mean, log_std.exp()).log_prob(z)).sum(-1)
        expected = expected - vae.reconstruction_loss(self.model.decoder(z), x)
        torch.testing.assert_close(vae.log_weight(self.model, x, z, mean, log_std), expected)

    def test_bits_per_dimension(self):
        self.assertAlmostEqual(vae.elbo_to_bpd(784 * math.log(2), [64, 1, 28, 28]), 1)
        nats = torch.tensor(6 * math.log(16))
        self.assertAlmostEqual(vae.elbo_to_bpd(nats, (9, 1, 2, 3)).item(), 4, delta=1e-6)

    def test_log_std_is_bounded_with_zero_at_zero_and_gradients_alive(self):
        encoder = vae.Encoder(z_dim=3)
        nn.init.zeros_(encoder.log_std.weight)
        for bias, expected in ((0, 0), (1, 1), (100, 5), (-100, -5)):
            nn.init.constant_(encoder.log_std.bias, bias)
            log_std = encoder(self.images[:2])[1]
            self.assertLess((log_std - expected).abs().max().item(), 0.02)
        nn.init.constant_(encoder.log_std.bias, 15)
        encoder(self.images[:2])[1].sum().backward()
        self.assertGreater(encoder.log_std.bias.grad.min().item(), 1e-3)

    def test_shapes(self):
        for z_dim, num_filters in ((1, 4), (7, 6)):
            model = vae.VAE(z_dim, num_filters)
            mean, log_std = model.encoder(self.images[:3])
            self.assertEqual((mean.shape, log_std.shape), ((3, z_dim), (3, z_dim)))
            self.assertEqual(model.decoder(mean).shape, (3, 16, 28, 28))
            self.assertEqual([t.shape for t in model(self.images[:3])], [()] * 3)

    def test_every_parameter_gets_a_gradient(self):
        model = vae.VAE()
        rec, kl, _ = model(self.images[:8])
        (rec + kl).backward()
        for name, parameter in model.named_parameters():
            self.assertGreater(parameter.grad.abs().sum().item(), 0, name)

    def test_samples_follow_the_categorical(self):
        model = vae.VAE(z_dim=2, num_filters=4)
        for parameter in model.decoder.parameters():
            nn.init.zeros_(parameter)
        torch.manual_seed(0)
        logits = torch.randn(16)
        model.decoder.net[-1].bias.data = logits  # the same distribution for every pixel
        samples = model.sample(200)
        self.assertEqual(samples.shape, (200, 1, 28, 28))
        frequency = torch.bincount(samples.flatten(), minlength=16) / samples.numel()
        torch.testing.assert_close(frequency, logits.softmax(0), atol=0.005, rtol=0)

    def test_importance_weights_tighten_the_bound_on_the_same_draws(self):
        x, num_samples = self.images[:50], 60
        mean, log_std = self.model.encoder(x)
        torch.manual_seed(1)
        z = vae.sample_reparameterize(mean.repeat(20, 1), log_std.exp().repeat(20, 1))
        with torch.no_grad():
            log_w = vae.log_weight(self.model, x.repeat(20, 1, 1, 1), z, mean.repeat(20, 1),
                                   log_std.repeat(20, 1)).view(20, 50)
        torch.manual_seed(1)
        tighter = vae.log_likelihood(self.model, x, 20)
        torch.testing.assert_close(tighter, log_w.logsumexp(0) - math.log(20))
        self.assertTrue((log_w.mean(0) <= tighter).all())
        many = vae.log_likelihood(self.model, x, num_samples).mean()
        self.assertGreater(many.item(), log_w.mean().item())

    def test_both_estimates_equal_the_integral_at_one_dimension(self):
        class Toy(nn.Module):  # 2x2 images whose logits are linear in z, and a rough posterior
            def encoder(self, x):
                return torch.full((len(x), 1), 0.3), torch.full((len(x), 1), -0.2)

            def decoder(self, z):
                return (z * slopes).view(-1, 16, 2, 2)

        torch.manual_seed(0)
        model, slopes, x = Toy(), torch.randn(64), torch.randint(16, (8, 1, 2, 2))
        z = torch.linspace(-8, 8, 4001).unsqueeze(1)
        log_prior = torch.distributions.Normal(0, 1).log_prob(z.squeeze(1))
        exact = torch.stack([
            (log_prior - vae.reconstruction_loss(model.decoder(z), image.expand(4001, 1, 2, 2)))
            .logsumexp(0) + math.log(16 / 4000) for image in x])
        for proposal in ("posterior", "prior"):
            estimate = vae.log_likelihood(model, x, 10_000, proposal)
            self.assertLess((estimate - exact).abs().max().item(), 0.05, proposal)

    def test_the_prior_is_a_hopeless_proposal_at_twenty_dimensions(self):
        x = self.images[:50]
        gap = vae.log_likelihood(self.model, x, 64) - vae.log_likelihood(self.model, x, 64, "prior")
        self.assertGreater(gap.mean().item(), 30)

    def test_likelihood_is_computed_in_bounded_passes(self):
        rows = []
        hook = self.model.decoder.register_forward_hook(lambda *call: rows.append(len(call[2])))
        self.addCleanup(hook.remove)
        vae.log_likelihood(self.model, self.images[:3], 1001)
        self.assertEqual(sum(rows), 3 * 1001)
        self.assertLessEqual(max(rows), 1000)

    def test_manifold_lays_the_percentiles_out_left_to_right_and_bottom_to_top(self):
        class Ramp(nn.Module):  # a pixel value that grows with z[0] + 10 z[1]
            def __init__(self):
                super().__init__()
                self.seen, self.unused = None, nn.Parameter(torch.zeros(1))

            def forward(self, z):
                self.seen = z
                value = ((z @ torch.tensor([0.2, 2.])) + 7.5).view(-1, 1, 1, 1)
                return -(torch.arange(16).view(1, 16, 1, 1) - value)**2 * torch.ones(1, 1, 28, 28)

        ramp = Ramp()
        image = vae.visualize_manifold(ramp, grid_size=20)
        self.assertEqual(image.shape, (560, 560))
        self.assertTrue(0 <= image.min() and image.max() <= 1)
        corners = image[[-1, -1, 0, 0], [0, -1, 0, -1]]  # bottom left and right, then the top's
        self.assertEqual(corners.argsort().tolist(), [0, 1, 2, 3])
        percentiles = torch.distributions.Normal(0, 1).cdf(ramp.seen).unique()
        torch.testing.assert_close(percentiles, (torch.arange(20) + 0.5) / 20, atol=1e-5, rtol=0)

    def test_bfloat16_autocast_changes_the_bound_by_little(self):
        x = self.images[:200]
        torch.manual_seed(0)
        exact = self.model(x)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            fast = self.model(x)
        for a, b in zip(exact, fast, strict=True):
            self.assertEqual(b.dtype, torch.float32)
            torch.testing.assert_close(a, b, rtol=0.01, atol=0)

    def test_networks_and_losses_run_when_pasted_with_torch_alone(self):
        pasted = paste(HERE / "vae.py", ["VAE", "log_likelihood"])
        model = pasted["VAE"](z_dim=2, num_filters=4)
        rec, kl, bpd = model(self.images[:2])
        (rec + kl).backward()
        self.assertGreater(bpd.item(), 3)
        self.assertEqual(pasted["log_likelihood"](model, self.images[:2], 3).shape, (2,))

    def test_float64_and_float16_models_sample_and_compute_in_their_own_precision(self):
        x = self.images[:2]
        for model, compute in ((vae.VAE(4), lambda m: m(x)),
                               (aae.AdversarialAE(4, "universal"),
                                lambda m: m(aae.to_float(x).to(m.decoder.net[0].weight.dtype)))):
            model.double()
            self.assertEqual(model.sample(2).shape, (2, 1, 28, 28))
            for result in compute(model):
                self.assertEqual(result.dtype, torch.float64)
            model.half()
            self.assertEqual(model.sample(2).shape, (2, 1, 28, 28))
        self.assertEqual(aae.AdversarialAE(4).double().sample(2).dtype, torch.float64)


class AAEMathematics(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.x = aae.to_float(GLYPHS[0][:64])

    def test_zero_parameters_give_ln_2_and_no_error_on_zero_images(self):
        model = aae.AdversarialAE()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        x = torch.zeros(64, 1, 28, 28)
        recon, z = model(x)
        loss, rec, gen = model.autoencoder_loss(x, recon, z, lam=0.995)
        disc, accuracy = model.discriminator_loss(z)
        self.assertEqual(rec.item(), 0)
        self.assertAlmostEqual(gen.item(), math.log(2), delta=1e-6)
        self.assertAlmostEqual(disc.item(), math.log(2), delta=1e-6)
        self.assertAlmostEqual(loss.item(), 0.005 * math.log(2), delta=1e-8)
        self.assertEqual(accuracy.item(), 0.5)

    def test_shapes_and_ranges(self):
        for z_dim, posterior in itertools.product((1, 2, 20), aae.POSTERIORS):
            model = aae.AdversarialAE(z_dim, posterior)
            recon, z = model(self.x[:3])
            self.assertEqual((recon.shape, z.shape), ((3, 1, 28, 28), (3, z_dim)))
            self.assertEqual(model.discriminator(z).shape, (3, 1))
            self.assertEqual(model.sample(5).shape, (5, 1, 28, 28))
            self.assertLessEqual(model.decoder(100 * z).abs().max().item(), 1)
        self.assertEqual((self.x.min().item(), self.x.max().item()), (-1, 1))

    def test_the_losses_are_those_of_equation_15(self):
        torch.manual_seed(0)
        model = aae.AdversarialAE()
        recon, z = model(self.x)
        logits = model.discriminator(z)
        bce, ones = nn.functional.binary_cross_entropy_with_logits, torch.ones(64, 1)
        for lam in (0, 0.3, 1):
            loss, rec, gen = model.autoencoder_loss(self.x, recon, z, lam)
            torch.testing.assert_close(rec, ((recon - self.x)**2).sum() / (64 * 784))
            torch.testing.assert_close(gen, bce(logits, ones) if lam < 1 else torch.tensor(0.))
            torch.testing.assert_close(loss, lam * rec + (1 - lam) * gen)
        torch.manual_seed(1)
        prior = torch.randn_like(z)
        torch.manual_seed(1)
        disc, _ = model.discriminator_loss(z)
        real = bce(model.discriminator(prior), ones)
        torch.testing.assert_close(disc, (real + bce(logits, 0 * ones)) / 2)

    def test_accuracy_counts_both_halves(self):
        model = aae.AdversarialAE(z_dim=1)
        for slope, z, expected in ((1, -5., 0.75), (1, 5., 0.25), (0, 5., 0.5)):
            model.discriminator.forward = lambda z, slope=slope: slope * z  # draws: half above 0
            _, accuracy = model.discriminator_loss(torch.full((100_000, 1), z))
            self.assertAlmostEqual(accuracy.item(), expected, delta=0.01)

    def test_each_phase_reaches_all_of_its_parameters(self):
        for posterior in aae.POSTERIORS:
            model = aae.AdversarialAE(posterior=posterior)
            recon, z = model(self.x)
            model.discriminator_loss(z.detach())[0].backward()
            for name, parameter in model.named_parameters():
                if name.startswith("discriminator"):
                    self.assertGreater(parameter.grad.abs().sum().item(), 0, name)
                else:
                    self.assertIsNone(parameter.grad, name)
            loss = model.autoencoder_loss(self.x, recon, z, lam=0.995)[0]
            loss.backward(retain_graph=True)
            for name, parameter in model.named_parameters():
                self.assertGreater(parameter.grad.abs().sum().item(), 0, (posterior, name))
            model.zero_grad()
            model.autoencoder_loss(self.x, recon, z, lam=0)[0].backward()
            for name, parameter in model.decoder.named_parameters():
                self.assertEqual(parameter.grad.abs().sum().item(), 0, (posterior, name))

    def test_the_three_posteriors(self):
        x = self.x[:1].expand(5_000, -1, -1, -1)
        for posterior in aae.POSTERIORS:
            torch.manual_seed(0)
            encoder = aae.AdversarialAE(2, posterior).encoder
            with torch.no_grad():
                z = encoder(x[:200])
                if posterior == "deterministic":
                    self.assertLess(z.std(0).max().item(), 1e-5)
                else:
                    self.assertGreater(z.std(0).min().item(), 1e-3)
                if posterior == "gaussian":
                    encoder.out.weight.zero_()
                    encoder.out.bias.copy_(torch.tensor([1., -2., math.log(0.5), 0.]))
                    z = encoder(x)
                    torch.testing.assert_close(z.mean(0), torch.tensor([1., -2]), atol=0.05, rtol=0)
                    torch.testing.assert_close(z.std(0), torch.tensor([0.5, 1]), atol=0.02, rtol=0)
                    encoder.out.bias.fill_(1e4)
                    self.assertTrue(encoder(x[:10]).isfinite().all())

    def test_samples_are_decoded_draws_of_the_prior(self):
        model = aae.AdversarialAE(z_dim=3)
        torch.manual_seed(5)
        samples = model.sample(4)
        torch.manual_seed(5)
        torch.testing.assert_close(samples, model.decoder(torch.randn(4, 3)))

    def test_sliced_wasserstein_in_closed_form(self):
        torch.manual_seed(0)
        a = torch.randn(20_000, 1)
        distance = aae.sliced_wasserstein
        self.assertAlmostEqual(distance(a, a + 0.7, 50), 0.7, places=5)  # a shift
        self.assertAlmostEqual(distance(a, a.flip(0), 50), 0, places=6)  # the same set
        # E|2z| - E|z| for twice the spread
        expected = math.sqrt(2 / math.pi)
        self.assertAlmostEqual(distance(a, 2 * torch.randn(20_000, 1), 50), expected, delta=0.03)
        a = torch.randn(2000, 2)
        shifted = distance(a, a + torch.tensor([3., 4]), 10_000)  # 5 times the mean of |cos|
        self.assertAlmostEqual(shifted, 5 * 2 / math.pi, delta=0.05)

    def test_parzen_window_matches_torch_distributions_in_bounded_memory(self):
        torch.manual_seed(0)
        samples, x, sigma = torch.rand(30, 1, 28, 28), torch.rand(1001, 1, 28, 28), 0.2
        normal = torch.distributions.Normal(samples.flatten(1).double(), sigma)
        kernels = torch.distributions.Independent(normal, 1)
        uniform = torch.distributions.Categorical(torch.ones(30))
        mixture = torch.distributions.MixtureSameFamily(uniform, kernels)
        with mock.patch.object(torch, "cdist", wraps=torch.cdist) as cdist:
            estimates = aae.parzen_log_likelihood(samples, x, [0.1, sigma])
        torch.testing.assert_close(estimates[1].double(), mixture.log_prob(x.flatten(1).double()),
                                   atol=0.02, rtol=0)
        lengths = [len(call.args[0]) for call in cdist.call_args_list]
        self.assertLessEqual(max(lengths), 500)
        self.assertEqual(sum(lengths), len(x))  # once for both sigmas

    def test_evaluation_weighs_each_image_the_same_and_leaves_no_gradient(self):
        torch.manual_seed(0)
        model, images = aae.AdversarialAE(posterior="gaussian"), GLYPHS[0][:501]
        mse, codes = aae.evaluate(model, images)
        self.assertEqual((mse, codes.shape), (aae.evaluate(model, images)[0], (501, 8)))
        self.assertFalse(codes.requires_grad)
        x = aae.to_float(images)
        expected = ((model.decoder(codes) - x)**2).mean().item()
        self.assertAlmostEqual(mse, expected, places=5)
        moments = aae.code_moments(codes)
        self.assertAlmostEqual(moments["code_mean_max"], codes.mean(0).max().item(), places=6)
        self.assertEqual(aae.code_moments(codes[:1])["code_std_max"], 0)

    def test_bfloat16_autocast_changes_the_losses_by_little(self):
        torch.manual_seed(0)
        model = aae.AdversarialAE()

        def losses():
            torch.manual_seed(1)
            recon, z = model(self.x)
            return *model.autoencoder_loss(self.x, recon, z, 0.9), model.discriminator_loss(z)[0]

        exact = losses()
        with torch.autocast("cpu", torch.bfloat16):
            fast = losses()
        for a, b in zip(exact, fast, strict=True):
            self.assertEqual(b.dtype, torch.float32)
            torch.testing.assert_close(a, b, rtol=0.02, atol=0)

    def test_networks_and_losses_run_when_pasted_with_torch_alone(self):
        pasted = paste(HERE / "aae.py", [
            "AdversarialAE", "parzen_log_likelihood", "sliced_wasserstein"])
        model = pasted["AdversarialAE"](z_dim=2, posterior="universal")
        recon, z = model(self.x)
        model.autoencoder_loss(self.x, recon, z, 0.995)[0].backward()
        model.discriminator_loss(z.detach())[0].backward()
        self.assertEqual(pasted["parzen_log_likelihood"](self.x, self.x, [0.2]).shape, (1, 64))
        self.assertGreater(pasted["sliced_wasserstein"](z, torch.randn_like(z), 10), 0)


def small_gpt(spread=0.3, **changes):
    """A GPT in float64 whose attention is far from uniform, as it is in a trained one."""
    config = dict(vocab_size=61, block_size=24, n_layer=3, n_head=4, n_embd=32) | changes
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(**config)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=spread)
    return model.eval()


def numpy_gpt2(weights, n_head, ids):
    """GPT-2 once more, by itself. weights: {name: array}; ids: [T] -> logits [T, V]"""
    def layer_norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    T = len(ids)
    x = weights["wte.weight"][ids] + weights["wpe.weight"][:T]
    for i in range(sum(name.endswith("ln_1.bias") for name in weights)):
        qkv = dense(layer_norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        heads, parts = [], np.split(qkv, 3 * n_head, axis=-1)
        for q, k, v in zip(*(parts[j * n_head:(j + 1) * n_head] for j in range(3)), strict=True):
            weight = np.exp(q @ k.T / np.sqrt(k.shape[-1])) * np.tri(T)
            heads.append(weight / weight.sum(-1, keepdims=True) @ v)
        x = x + dense(np.concatenate(heads, axis=-1), f"h.{i}.attn.c_proj")
        h = dense(layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h ** 3)))
        x = x + dense(h, f"h.{i}.mlp.c_proj")
    return layer_norm(x, "ln_f") @ weights["wte.weight"].T


class GPTMathematics(unittest.TestCase):
    def setUp(self):
        self.model = small_gpt()
        self.idx = torch.randint(61, (5, 24), generator=torch.Generator().manual_seed(0))

    def test_logits_are_those_of_a_gpt2_in_numpy(self):
        weights = {name: weight.numpy() for name, weight in self.model.state_dict().items()}
        logits = self.model(self.idx)[0]
        self.assertEqual(logits.shape, (5, 24, 61))
        for row, ids in zip(logits, self.idx, strict=True):
            expected = torch.from_numpy(numpy_gpt2(weights, 4, ids.numpy()))
            torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-9)

    def test_attention_by_hand(self):
        q = torch.tensor([[[[2.]], [[2.]]]]).transpose(1, 2)  # [1, 1, 2, 1]
        k, v = torch.tensor([[[[0.], [math.log(3) / 2]]]]), torch.tensor([[[[1.], [5.]]]])
        mask = torch.tensor([[True, False], [True, True]])
        y = gpt.attention(q, k, v, mask)
        torch.testing.assert_close(y.flatten(), torch.tensor([1., (1 + 3 * 5) / 4]))
        torch.manual_seed(0)
        ones = torch.ones(1, 1, 100, 1)
        mask = torch.ones(100, 100, dtype=torch.bool)
        self.assertAlmostEqual(gpt.attention(ones, ones, ones, mask, 0.25).mean().item(), 1,
                               delta=0.02)
        one = ones[:, :, :1]
        dropped = gpt.attention(ones, one, one, mask[:, :1], 0.25).flatten()
        self.assertEqual(set(dropped.mul(3 / 4).round(decimals=4).tolist()), {0, 1})

    def test_fused_and_plain_attention_are_the_same_in_value_and_gradient(self):
        plain = small_gpt(fused=False)
        losses = [model(self.idx, self.idx.roll(-1, 1))[1] for model in (self.model, plain)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        for loss in losses:
            loss.backward()
        for (name, a), b in zip(self.model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=name)
            self.assertGreater(a.grad.abs().sum().item(), 0, name)

    def test_no_position_sees_a_later_one(self):
        changed = self.idx.clone()
        changed[:, 10:] = 60 - changed[:, 10:]
        before, after = self.model(self.idx)[0], self.model(changed)[0]
        torch.testing.assert_close(before[:, :10], after[:, :10])
        self.assertGreater((before[:, 10:] - after[:, 10:]).abs().amax(-1).min().item(), 0.01)

    def test_the_loss_is_the_mean_cross_entropy_and_not_in_bfloat16(self):
        targets = self.idx.roll(-1, 1)
        logits, loss = self.model(self.idx, targets)
        expected = -torch.distributions.Categorical(logits=logits).log_prob(targets).mean()
        torch.testing.assert_close(loss, expected)
        self.assertIsNone(self.model(self.idx)[1])
        half = small_gpt(spread=0.1).bfloat16()
        logits, loss = half(self.idx, targets)
        self.assertEqual((logits.dtype, loss.dtype), (torch.bfloat16, torch.float32))
        torch.testing.assert_close(
            loss, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()))

    def test_an_untrained_model_knows_nothing_and_has_gpt2s_initial_weights(self):
        torch.manual_seed(0)
        model = gpt.GPT(gpt.GPTConfig(1000, 64, 8, 4, 128, dropout=0.1))
        idx = torch.randint(1000, (4, 64))
        self.assertAlmostEqual(model(idx, idx.roll(1, 1))[1].item(), math.log(1000), delta=0.1)
        for name, parameter in model.named_parameters():
            std = 0.01 if name == "wpe.weight" else 0.02 / 4 ** name.endswith("c_proj.weight")
            if parameter.dim() == 2:
                self.assertAlmostEqual(parameter.std().item() / std, 1, delta=0.05, msg=name)
            else:
                self.assertEqual(parameter.unique().tolist(), [float("ln" in name and
                                                                     name.endswith("weight"))])

    def test_sizes(self):
        with torch.device("meta"):
            for name, millions in (("gpt2", 124.439808), ("gpt2-medium", 354.823168),
                                   ("gpt2-large", 774.030080), ("gpt2-xl", 1557.6112)):
                model = gpt.GPT(gpt.GPTConfig(50257, 1024, *gpt.SIZES[name]))
                self.assertEqual(sum(p.numel() for p in model.parameters()), millions * 1e6, name)
        with self.assertRaisesRegex(ValueError, "n_embd 100 is not a multiple of n_head 3"):
            gpt.GPTConfig(10, 10, 1, 3, 100)
        for size in (0, -1, 1.0, "1"):
            with self.assertRaisesRegex(ValueError, "n_head .* is not a whole number above 0"):
                gpt.GPTConfig(10, 10, 1, size, 100)
        self.assertEqual(gpt.GPTConfig(np.int64(10), 10, 1, 1, np.uint16(100)).n_embd, 100)

    def test_dropout_is_for_training_only(self):
        for fused in (True, False):
            model = small_gpt(dropout=0.2, fused=fused)
            expected = self.model(self.idx)[0]
            torch.testing.assert_close(model(self.idx)[0], expected)
            self.assertGreater((model.train()(self.idx)[0] - expected).abs().mean().item(), 0.1)

    def test_autocast_changes_the_loss_by_little(self):
        model, targets = small_gpt(spread=0.1).float(), self.idx.roll(-1, 1)
        precise = model(self.idx, targets)[1]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(self.idx, targets)[1]
            model.generate(self.idx[:, :3], 30)
        self.assertEqual(loss.dtype, torch.float32)
        torch.testing.assert_close(loss, precise, rtol=0.01, atol=0)

    def test_pasted_with_torch_alone_it_trains_writes_and_loads(self):
        pasted = paste(HERE / "gpt.py", ["GPT", "GPTConfig", "BPETokenizer", "CharTokenizer"])
        model = pasted["GPT"](pasted["GPTConfig"](61, 24, 2, 2, 16, fused=False))
        model(self.idx, self.idx)[1].backward()
        self.assertEqual(model.generate(self.idx, 3, top_p=0.9).shape, (5, 27))
        self.assertEqual(pasted["CharTokenizer"]("abc").encode("cab"), [2, 0, 1])

    def test_extra_rows_change_nothing(self):
        padded = small_gpt(padded_vocab_size=64)
        self.assertEqual(padded.wte.weight.shape[0], 64)
        with torch.no_grad():
            padded.load_state_dict(self.model.state_dict() | {
                "wte.weight": torch.cat([self.model.wte.weight, torch.ones(3, 32)])})
        for a, b in zip(padded(self.idx, self.idx), self.model(self.idx, self.idx), strict=True):
            torch.testing.assert_close(a, b)


class Generation(unittest.TestCase):
    def setUp(self):
        self.model = small_gpt()
        self.idx = torch.randint(61, (5, 24), generator=torch.Generator().manual_seed(0))

    def test_the_cache_changes_nothing(self):
        for fused, B, T, do_sample in (
                (False, 5, 7, True),
                *itertools.product((True,), (1, 5), (1, 7, 24, 40), (False, True))):
            model = small_gpt(fused=fused)
            idx = self.idx.repeat(1, 2)[:B, :T]
            new = 24 + 50 - min(T, 24)
            cached = model.generate(idx, new, do_sample=do_sample, temperature=1.5,
                                    generator=torch.Generator().manual_seed(1))
            self.assertTrue(torch.equal(cached[:, :T], idx))
            generator, plain = torch.Generator().manual_seed(1), idx
            for _ in range(new):  # the whole window anew for each token
                logits = model(plain[:, -24:])[0][:, -1]
                token = gpt.next_token(logits, do_sample, 1.5, generator=generator)
                plain = torch.cat([plain, token], dim=1)
            self.assertTrue(torch.equal(cached, plain), (fused, B, T, do_sample))
            if do_sample:
                self.assertGreater(len(cached[:, T:].unique()), 20)

    def test_what_cannot_be_continued(self):
        for idx in (self.idx[0], self.idx[:, :0], self.idx[:0]):
            with self.assertRaisesRegex(ValueError, "idx has to be"):
                self.model.generate(idx, 3)
        for options in ({"top_k": -1}, {"temperature": -0.5}):
            with self.assertRaisesRegex(ValueError, "must not be negative"):
                self.model.generate(self.idx, 3, **options)

    def test_16_bit_layers_with_logits_in_32(self):
        exact = small_gpt(spread=0.1).float()
        for dtype in (torch.bfloat16, torch.float16):
            model = small_gpt(spread=0.1).float()
            model.h.to(dtype)
            logits = model(self.idx)[0]
            self.assertEqual(logits.dtype, torch.float32)
            torch.testing.assert_close(logits, exact(self.idx)[0], atol=0.1, rtol=0)
            self.assertEqual(model.generate(self.idx, 30).shape, (5, 54))

    def test_greedy_is_the_most_probable_token_of_the_whole_window(self):
        idx = self.idx[:, :3]
        for _ in range(30):
            logits = self.model(idx[:, -24:])[0]
            idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        self.assertTrue(torch.equal(self.model.generate(self.idx[:, :3], 30, do_sample=False), idx))
        self.assertTrue(torch.equal(self.model.generate(self.idx[:, :3], 30, temperature=0), idx))
        self.assertTrue(torch.equal(self.model.generate(self.idx[:, :3], 30, top_k=1), idx))
        self.assertTrue(torch.equal(self.model.generate(self.idx[:, :3], 30, top_p=0), idx))

    def test_a_row_that_stopped_stays_so_and_when_all_have_the_model_rests(self):
        script = iter(torch.tensor([[1, 2], [9, 3], [5, 4], [6, 9], [7, 7]]).unsqueeze(-1))
        with mock.patch.object(gpt, "next_token", lambda *_, **__: next(script)):
            tokens = self.model.generate(self.idx[:2, :4], 7, stop_token=9)
        self.assertEqual(tokens[:, 4:].tolist(), [[1, 9, 9, 9, 9, 9, 9], [2, 3, 4, 9, 9, 9, 9]])
        self.assertEqual(len(list(script)), 1)

    def test_no_new_token_is_the_prompt_itself(self):
        self.assertTrue(torch.equal(self.model.generate(self.idx, 0), self.idx))

    def test_training_goes_on_undisturbed(self):
        self.model.train()
        torch.manual_seed(3)
        state = torch.get_rng_state()
        tokens = self.model.generate(self.idx, 3, generator=torch.Generator().manual_seed(0))
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        self.assertTrue(self.model.training)
        with self.assertRaises(IndexError):
            self.model.generate(self.idx + 99, 3)
        self.assertTrue(self.model.training)
        self.model(tokens[:, -24:], tokens[:, -24:])[1].backward()  # they are ordinary tensors

    def draws(self, probabilities, number=2000, **options):
        """The share of each token among `number` draws"""
        logits = torch.tensor(probabilities).log().expand(number, -1)
        generator = torch.Generator().manual_seed(0)
        tokens = gpt.next_token(logits, generator=generator, **options)
        self.assertEqual(tokens.shape, (number, 1))
        return torch.bincount(tokens.flatten(), minlength=len(probabilities)) / number

    def test_top_p_keeps_the_fewest_tokens_that_make_up_the_mass(self):
        for top_p, kept in ((0, 1), (0.4, 1), (0.5, 1), (0.501, 2), (0.9, 2), (0.92, 3), (1, 3)):
            shares = self.draws([0.09, 0.5, 0.41], top_p=top_p)
            self.assertEqual([i for i in (1, 2, 0) if shares[i]], [1, 2, 0][:kept], top_p)
        # of the two that top-k leaves, the first has 0.55 of the mass
        self.assertEqual(self.draws([0.5, 0.41, 0.09], top_k=2, top_p=0.54)[1], 0)
        self.assertGreater(self.draws([0.5, 0.41, 0.09], top_k=2, top_p=0.56)[1], 0.4)

    def test_top_k_keeps_k_tokens_even_of_equal_ones(self):
        for top_k, kept in ((None, 10), (0, 10), (1, 1), (3, 3), (10, 10), (10**6, 10)):
            self.assertEqual((self.draws([0.1] * 10, top_k=top_k) > 0).sum(), kept, top_k)

    def test_draws_follow_the_distribution(self):
        p = torch.tensor([0.6, 0.3, 0.1])
        for temperature in (0.5, 1.0, 2.0):
            expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
            shares = self.draws(p.tolist(), 50_000, temperature=temperature)
            torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
        for temperature in (1e-3, 1e-6, 1e-40, 0):
            shares = self.draws([0.3, 0.31, 0.39], temperature=temperature)
            self.assertEqual(shares.tolist(), [0, 0, 1])


def byte_characters():
    """How GPT-2's files write the 256 bytes"""
    characters, others = [], iter(range(256, 512))
    for byte in range(256):
        itself = 33 <= byte < 127 or 161 <= byte < 256 and byte != 173
        characters.append(chr(byte if itself else next(others)))
    return characters


def write_json(path, content):
    Path(path).write_text(json.dumps(content), encoding="utf-8")


def own_files(*merges, special=("<|endoftext|>",), folder="."):
    """The files of a small vocabulary: 256 bytes, what `merges` make, and special tokens."""
    tokens = [*byte_characters(), *(merge.replace(" ", "") for merge in merges), *special]
    paths = Path(folder, "vocab.json"), Path(folder, "merges.txt")
    paths[0].write_text(json.dumps({t: i for i, t in enumerate(tokens)}), "utf-8")
    paths[1].write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    return tuple(map(str, paths))


class Tokenizers(TemporaryFolder):
    own_files = staticmethod(own_files)

    def test_pairs_merge_in_the_order_of_the_list_and_from_left_to_right(self):
        tokenizer = gpt.BPETokenizer(*self.own_files("b c", "a a", "a b", "aa a", "Ġ a", "bc bc"))
        tokens = dict(enumerate(json.loads(Path("vocab.json").read_text())))
        for text, expected in (("abc", "a bc"), ("ab", "ab"), ("aaaaa", "aa aaa"), ("aab", "aa b"),
                               ("bcbcbc", "bcbc bc"), (" a ab", "Ġa Ġ ab"), ("a" * 7, "aa aa aaa"),
                               ("", ""), ("x", "x"), ("bb", "b b")):
            self.assertEqual([tokens[i] for i in tokenizer.encode(text)], expected.split(), text)
            self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)

    def test_special_tokens_in_a_text(self):
        plain = gpt.BPETokenizer(*self.own_files(special=()))
        self.assertEqual((plain.end_of_text, plain.start, plain.special), (None, 0, {}))
        self.assertEqual(len(plain.encode("a<|endoftext|>")), 14)
        files = self.own_files(special=("<pad>", "<|endoftext|>"))
        write_json("added_tokens.json", {"<|user|>": 258, "<|user|>!": 259, "user": 260})
        tokenizer = gpt.BPETokenizer(*files)
        self.assertEqual((tokenizer.end_of_text, tokenizer.start, len(tokenizer)), (257, 257, 261))
        self.assertEqual((tokenizer.num_bytes(258), tokenizer.num_bytes(97)), (8, 1))
        for text, ids in (("<|endoftext|><|endoftext|>", [257, 257]), ("<|user|>", [258]),
                          ("<|user|>!", [259]), ("<|user", [*plain.encode("<|"), 260]),
                          ("  <|user|>", [*plain.encode("  "), 258]),
                          ("<pad>", plain.encode("<pad>"))):
            self.assertEqual(tokenizer.encode(text), ids, text)
            self.assertEqual(tokenizer.encode(text, special=False), plain.encode(text))
            self.assertEqual(tokenizer.decode(ids), text)

    def test_a_text_in_pieces(self):
        files = self.own_files("l l", "' ll", "Ġ a", "Ġ Ġ", "a b", "ab ab")
        write_json("added_tokens.json", {"<|user|>": 263, "<|user|>!": 264, "user": 265, "<|": 266})
        tokenizer, generator = gpt.BPETokenizer(*files), random.Random(0)
        parts = ["a", "ab" * 40, " ", " " * 50, "'", "l", "'ll", "'ve", "\n", "1", "é😀", "\ud83d",
                 "\ude00", "!", "<|endoftext|>", "<|user|>", "<|user", "<|user|>!", "<|", "<"]
        for _ in range(1000):
            text = "".join(generator.choices(parts, k=generator.randrange(40)))
            number = generator.choice([0, 1, 5, len(text)])
            cuts = sorted(generator.choices(range(len(text) + 1), k=number))
            cut = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
            for pieces in (cut, list(text)):
                ids = [id for some in tokenizer.encode_pieces(iter(pieces)) for id in some]
                self.assertEqual(ids, tokenizer.encode(text), pieces)

    def test_pieces_take_linear_time_and_only_the_longest_word_waits(self):
        tokenizer = gpt.BPETokenizer(*self.own_files())
        pattern, scanned = gpt.word_pattern(), []
        watched = mock.Mock(findall=lambda text: scanned.append(len(text)) or pattern.findall(text))
        with mock.patch.object(gpt, "word_pattern", lambda: watched):
            for character in "a \u4e00<'":
                for size in (1, 7, 100):
                    scanned.clear()
                    lists = list(tokenizer.encode_pieces(itertools.repeat(character * size, 3000)))
                    self.assertLess(sum(scanned), 4 * 3000 * size)  # whatever is scanned, twice
                    self.assertEqual(sum(map(len, lists)),
                                     3000 * size * len(character.encode()))
            scanned.clear()
            for _ in tokenizer.encode_pieces(itertools.repeat("some words, ", 1000)):
                self.assertLess(max(scanned), 100)

    def test_any_ids_decode_and_half_characters_wait_for_the_rest(self):
        tokenizer = gpt.BPETokenizer(*self.own_files())
        ids = list("né😀\n".encode())
        self.assertEqual(list(tokenizer.stream(ids)),
                         ["n", "", "é", "", "", "", "😀", "\n", ""])
        self.assertEqual(tokenizer.decode(ids[:-2]), "né\ufffd")
        self.assertEqual(tokenizer.decode([0xff, 0xc3, 0x28, 10**9]), "\ufffd\ufffd(\ufffd")
        self.assertEqual(tokenizer.decode(torch.tensor([-1, 97])), "\ufffda")
        generator = random.Random(0)
        for _ in range(200):
            ids = generator.choices(range(256), k=20)
            self.assertEqual(tokenizer.decode(ids), bytes(ids).decode("utf-8", "replace"))

    def test_surrogates_are_joined_or_replaced(self):
        tokenizer = gpt.BPETokenizer(*self.own_files())
        self.assertEqual(tokenizer.decode(tokenizer.encode("\ud83d\ude00 a\ud83d\0")),
                         "😀 a\ufffd\0")

    def test_words_are_split_as_unicode_says(self):
        split = gpt.word_pattern().findall
        for text, words in (
                ("I'm he'LL", ["I", "'m", " he", "'", "LL"]),
                ("a_b", ["a", "_", "b"]),
                ("x² ½ Ⅷ", ["x", "²", " ½", " Ⅷ"]),  # numbers that are no digits
                ("a\x1cb \x1f", ["a", "\x1c", "b", " \x1f"]),  # no white space
                ("a  b\u2003\u3000c", ["a", " ", " b", "\u2003", "\u3000", "c"]),
                ("e\u0301", ["e", "\u0301"]),  # a combining mark is no letter
                ("a\r\n\n b ", ["a", "\r\n\n", " b", " "]),
                ("𝒳 𐍈1", ["𝒳", " 𐍈", "1"])):
            self.assertEqual(split(text), words)

    def test_files_that_are_damaged_or_do_not_belong_together(self):
        vocab, merges = self.own_files("a b", "ab c", special=("<|endoftext|>", "<pad>"))
        self.assertEqual(len(gpt.BPETokenizer(vocab, merges)), 260)
        whole = {name: Path(name).read_text(encoding="utf-8") for name in (vocab, merges)}
        for name, text, saying in (
                (merges, whole[merges][:-5], "no merge makes 'abc'"),
                (vocab, whole[vocab].replace("257", "256"), "the ids are not 0, 1, 2"),
                (vocab, whole[vocab].replace('<pad>', ''), "IndexError"),
                (vocab, "[" * 100_000, "RecursionError"),
                (vocab, "\ufeff\ufeff", f"{vocab} is damaged"),
                (merges, whole[merges] + "x y\n", "KeyError: 'xy'"),
                (merges, "<!DOCTYPE html>\n<html>404 Not Found", f"{vocab} and {merges}: damaged"),
                (vocab, whole[vocab][:100], "JSONDecodeError"),
                (vocab, "[]", "TypeError"), (vocab, "{}", "KeyError"),
                (vocab, "version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
                ("added_tokens.json", '{"<x>": 261}', "the ids are not 0, 1, 2"),
                ("added_tokens.json", '{"<x>": 1}', "the ids are not 0, 1, 2"),
                ("added_tokens.json", "{", "added_tokens.json is damaged")):
            Path(name).write_text(text, encoding="utf-8")
            with self.assertRaisesRegex(ValueError, saying):
                gpt.BPETokenizer(vocab, merges)
            if name in whole:
                Path(name).write_text("\ufeff" + whole[name], encoding="utf-8")
        Path("added_tokens.json").unlink()
        self.assertEqual(len(gpt.BPETokenizer(vocab, merges)), 260)  # byte-order marks are skipped
        with self.assertRaises(FileNotFoundError):
            gpt.BPETokenizer(vocab, "missing.txt")

    @needs_gpt2_files
    def test_long_words_take_no_quadratic_time(self):
        tokenizer = gpt.BPETokenizer(*GPT2_FILES)
        letters = "".join(random.Random(0).choices("etaoinshrdlu", k=40_000))
        for word in ("a" * 30_000, letters, " " * 30_000):
            start = time.process_time()
            self.assertEqual(tokenizer.decode(tokenizer.encode(word)), word)
            self.assertLess(time.process_time() - start, 10)  # hours, if it were
        operations = []
        for word in ("ACGT" * 5_000 + letters[:20_000], "ACGT" * 10_000 + letters[:40_000]):
            with mock.patch.object(gpt.heapq, "heappop", wraps=gpt.heapq.heappop) as pops:
                tokenizer.encode(word)
            operations.append(pops.call_count)
        self.assertLess(operations[1], 2.1 * operations[0])

    @needs_gpt2_files
    @needs_references
    def test_the_reference_cases(self):
        tokenizer = gpt.BPETokenizer(*GPT2_FILES)
        lines = Path(REFERENCE_DIR, "gpt2_bpe_cases.jsonl").read_text("utf-8").split("\n")
        cases = [json.loads(line) for line in lines if line]
        self.assertGreater(len(cases), 200)
        for case in cases:
            self.assertEqual(tokenizer.encode(case["text"], special=False), case["ids"])
            self.assertEqual(tokenizer.decode(case["ids"]), case["text"])

    @needs_gpt2_files
    @needs_tiktoken
    def test_random_texts_are_encoded_as_tiktoken_does(self):
        import tiktoken

        vocab = json.loads(GPT2_FILES[0].read_text(encoding="utf-8"))
        byte = {character: bytes([b]) for b, character in enumerate(byte_characters())}
        ranks = {b"".join(map(byte.get, token)): id for token, id in vocab.items() if id < 50256}
        oracle = tiktoken.Encoding(
            "gpt2", explicit_n_vocab=50257, mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": 50256}, pat_str="'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?"
            "\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+")
        tokenizer = gpt.BPETokenizer(*GPT2_FILES)
        assigned = [chr(code) for code in range(sys.maxunicode + 1)
                    if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
        ascii = [chr(code) for code in range(128)]
        hard = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u2028'sdmtlrevSLT0129½²Ⅷ_aAé\u0301\u200d日.-"
        generator = random.Random(0)
        for _ in range(RANDOM_STRINGS):
            pool = generator.choice([assigned, assigned[:3000], ascii, hard])
            text = "".join(generator.choices(pool, k=generator.randrange(1, 40)))
            if generator.random() < 0.3:
                text = "".join(c + generator.choice([" ", "", "'s"]) for c in text)
            ids = tokenizer.encode(text)
            self.assertEqual(ids, oracle.encode(text, disallowed_special=()))
            self.assertEqual(tokenizer.decode(ids), text)

    def one_file(self):
        """The content of a tokenizer.json with a small vocabulary"""
        vocab, merges = self.own_files("a b", "ab c")
        lines = Path(merges).read_text("utf-8").split("\n")[1:-1]
        saved = {"normalizer": None, "added_tokens": [{"id": 258, "content": "<|endoftext|>"},
                                                      {"id": 259, "content": "<|a b|>"}],
                 "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
                 "model": {"type": "BPE", "dropout": None, "end_of_word_suffix": "",
                           "vocab": json.loads(Path(vocab).read_text("utf-8")), "merges": lines}}
        return saved

    def test_one_file(self):
        pairs, lines = self.one_file(), self.one_file()
        pairs["model"]["merges"] = [line.split(" ") for line in pairs["model"]["merges"]]
        same = []
        for saved in (pairs, lines):
            write_json("tokenizer.json", saved)
            same.append(gpt.BPETokenizer("tokenizer.json"))
            self.assertEqual(same[-1].encode("abc<|a b|><|endoftext|>"), [257, 259, 258])
        Path("hub").mkdir()
        same[0].save("hub")
        same += [gpt.load_tokenizer_files(Path("hub")), pickle.loads(pickle.dumps(same[0]))]
        for tokenizer in same:
            self.assertEqual((tokenizer.fingerprint, tokenizer.special, tokenizer.bytes_of),
                             (same[0].fingerprint, same[0].special, same[0].bytes_of))
        others = {same[0].fingerprint}
        for merges, special in (((), ("<|endoftext|>",)), (("a b",), ("<|endoftext|>",)),
                                (("a b",), ("<pad>",))):
            others.add(gpt.BPETokenizer(*self.own_files(*merges, special=special)).fingerprint)
        self.assertEqual(len(others), 4)
        token = {"id": 258, "content": "<|endoftext|>", "lstrip": True}
        for part, change, saying in (
                ("normalizer", {"type": "NFC"}, "type of its normalizer is 'NFC', not None"),
                ("pre_tokenizer", None, "type of its pre_tokenizer is None, not 'ByteLevel'"),
                ("pre_tokenizer", {"type": "Whitespace"}, "is 'Whitespace'"),
                ("pre_tokenizer", {**lines["pre_tokenizer"], "add_prefix_space": True}, "is True"),
                ("pre_tokenizer", {**lines["pre_tokenizer"], "use_regex": False}, "is False"),
                *(("model", {**lines["model"], name: value}, f"{name} of its model is {value!r}")
                  for name, value in (("type", "Unigram"), ("dropout", 0.1),
                                      ("byte_fallback", True), ("ignore_merges", True),
                                      ("end_of_word_suffix", "</w>"))),
                ("model", {"type": "BPE"}, "KeyError"), ("model", [], "damaged"),
                ("added_tokens", [token], "lstrip of its added token is True")):
            write_json("tokenizer.json", {**lines, part: change})
            with self.assertRaisesRegex(ValueError, saying):
                gpt.BPETokenizer("tokenizer.json")

    @needs_gpt2_files
    @needs_transformers
    def test_transformers_reads_and_writes_the_same(self):
        from transformers import GPT2TokenizerFast

        text = "Hello'll <|user|>  there<|endoftext|>\n\n日本 <pad>"
        ours = gpt.BPETokenizer(*GPT2_FILES)
        merges = GPT2_FILES[1].read_text("utf-8").split("\n")[1:-1]
        theirs = GPT2TokenizerFast(vocab=ours.vocab, merges=[tuple(m.split(" ")) for m in merges])
        theirs.add_tokens(["<|user|>"])
        theirs.add_special_tokens({"pad_token": "<pad>"})
        theirs.save_pretrained("saved")
        ours = gpt.load_tokenizer_files(Path("saved"))
        self.assertEqual(ours.encode(text), theirs.encode(text))
        Path("hub").mkdir()
        ours.save("hub")
        self.assertEqual(GPT2TokenizerFast.from_pretrained("hub").encode(text), ours.encode(text))

    def test_which_files_of_a_folder_are_read(self):
        for files, error, saying in (
                ({}, FileNotFoundError, "neither tokenizer.json nor vocab.json"),
                ({"vocab.json": '{"ab": 0}'}, FileNotFoundError, "merges.txt is not there"),
                ({"vocab.json": "{"}, ValueError, "vocab.json is damaged"),
                ({"vocab.json": "{}"}, ValueError, "vocab.json is damaged"),
                ({"vocab.json": '{"a": 1}'}, ValueError, "vocab.json is damaged"),
                ({"vocab.json": '{"a": 0, "": 1}'}, ValueError, "vocab.json is damaged"),
                ({"tokenizer.json": "{}"}, ValueError, "tokenizer.json: damaged")):
            with tempfile.TemporaryDirectory() as folder:
                for name, text in files.items():
                    Path(folder, name).write_text(text, encoding="utf-8")
                with self.assertRaisesRegex(error, saying):
                    gpt.load_tokenizer_files(Path(folder))

    def test_characters(self):
        tokenizer = gpt.CharTokenizer("\n abcé")
        Path("hub").mkdir()
        tokenizer.save("hub")
        self.assertEqual(os.listdir("hub"), ["vocab.json"])
        again = gpt.load_tokenizer_files(Path("hub"))
        self.assertEqual((again.characters, again.fingerprint),
                         (tokenizer.characters, tokenizer.fingerprint))
        self.assertEqual((len(again), again.num_bytes(5), again.start, again.end_of_text),
                         (6, 2, 0, None))
        self.assertEqual(tokenizer.encode("cab\n"), [4, 2, 3, 0])
        self.assertEqual(list(tokenizer.encode_pieces(iter(["ca", "b"]))), [[4, 2], [3]])
        self.assertEqual(tokenizer.decode([4, 2, 3, 0, 99, -1]), "cab\n\ufffd\ufffd")
        self.assertEqual(list(tokenizer.stream(torch.tensor([2, 3]))), ["a", "b"])
        with self.assertRaisesRegex(ValueError, "never saw 'dx'"):
            tokenizer.encode("axbxd")


def hub_tensors(model):
    """The weights of a GPT as the public checkpoints hold them, [in, out]."""
    return {name: (w.t() if ".c_" in name and w.dim() == 2 else w).float().contiguous()
            for name, w in model.state_dict().items()}


def write_safetensors(path, tensors):
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.bool: "BOOL", torch.uint8: "U8"}
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": types[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(content), len(content) + len(data)]}
        content += data
    header = json.dumps(header).encode()
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + content)


def write_hub_folder(folder, model, tensors=None, **settings):
    """A folder as on the hub, with model.safetensors"""
    config = model.config
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "vocab_size": config.vocab_size, "n_positions": config.block_size,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd} | settings))
    write_safetensors(folder / "model.safetensors", tensors or hub_tensors(model))


def write_shards(folder, tensors, kind):
    """Weights in three files with an index of them. kind: "safetensors" or "bin" """
    stem, save = (("model", write_safetensors) if kind == "safetensors" else
                  ("pytorch_model", lambda path, tensors: torch.save(tensors, path)))
    names, shards = list(tensors), {}
    for i in range(3):
        shards |= dict.fromkeys(names[i::3], f"{stem}-0000{i + 1}-of-00003.{kind}")
        save(Path(folder, f"{stem}-0000{i + 1}-of-00003.{kind}"),
             {name: tensors[name] for name in names[i::3]})
    Path(folder, f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": shards}))


def replace_hub(test, address):
    """Another address for the hub, and an empty cache"""
    for module, name, value in ((gpt, "HUB", address), (torch.hub, "get_dir", lambda: "cache")):
        replaced = mock.patch.object(module, name, value)
        replaced.start()
        test.addCleanup(replaced.stop)


def serve_hub(test, model, name="openai-community/gpt2", broken=None, wait=lambda: None):
    """A server on localhost in the hub's place, with the folder hub/NAME; the file `broken` breaks
    off, and in the middle of weights it calls `wait`. -> a list to which paths asked for are added
    """
    asked, hub = [], Path("hub").resolve()
    write_hub_folder(hub / name, model)
    for file in own_files():
        shutil.move(file, hub / name)

    def respond(handler, file):
        asked.append(handler.path[1:].replace("/resolve/main", ""))
        if not (hub / asked[-1]).is_file():
            return handler.send_error(404 if (hub / asked[-1]).parent.is_dir() else 401)
        content = (hub / asked[-1]).read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:50])
        if file == "model.safetensors":
            wait()
        handler.wfile.write(content[50:-50] if file == broken else content[50:])

    replace_hub(test, serve(test, respond))
    return asked


class Pretrained(TemporaryFolder):
    def setUp(self):
        super().setUp()
        self.model = small_gpt().float()
        self.tensors = hub_tensors(self.model)

    def assert_loaded(self, path, tolerance=0.0):
        with contextlib.redirect_stderr(io.StringIO()):
            model = gpt.GPT.from_pretrained(path)
        self.assertFalse(model.training)
        for name, weight in self.model.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=tolerance)
        for parameter in model.parameters():
            self.assertTrue(parameter.requires_grad and parameter.is_contiguous())

    def assert_not_loaded(self, saying, path="m", kind=(ValueError, FileNotFoundError), **changes):
        if changes:
            write_hub_folder(path, self.model, **changes)
        with self.assertRaisesRegex(kind, saying) as raised, \
                contextlib.redirect_stderr(io.StringIO()):
            gpt.GPT.from_pretrained(path)
        self.assertLess(len(str(raised.exception)), 400)
        self.assertNotIn("\n", str(raised.exception))

    def test_every_layout_of_the_hub(self):
        prefixed = {f"transformer.{name}": tensor for name, tensor in self.tensors.items()}
        wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in prefixed.items()}
        masks = {"h.0.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.bool),
                 "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
        head = {"lm_head.weight": self.tensors["wte.weight"]}
        headed = {n: t for n, t in prefixed.items() if "wte" not in n} | head
        for tensors in (self.tensors, prefixed, wrapped, self.tensors | masks, prefixed | head,
                        headed):
            write_hub_folder("m", self.model, tensors=tensors)
            self.assert_loaded("m")
            os.remove("m/model.safetensors")
            for kind in ("safetensors", "bin"):
                write_shards("m", tensors, kind)
                self.assert_loaded(Path("m"))
                for path in Path("m").glob("*model*"):
                    path.unlink()
            for new in (True, False):  # torch's format of today, and that before 1.6
                torch.save(tensors, "m/pytorch_model.bin", _use_new_zipfile_serialization=new)
                self.assert_loaded("m")
            os.remove("m/pytorch_model.bin")
        for dtype, tolerance in ((torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
            halves = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
            write_hub_folder("m", self.model, tensors=halves)
            self.assert_loaded("m", tolerance)
            self.assertEqual(gpt.GPT.from_pretrained("m").wte.weight.dtype, torch.float32)

    def test_training_does_not_write_into_the_file(self):
        write_hub_folder("m", self.model)
        before = snapshot("m")
        with torch.no_grad():
            for parameter in gpt.load_model("m", dropout=0.5).train().parameters():
                parameter.zero_()
        self.assertEqual(snapshot("m"), before)
        self.assert_loaded("m")

    def test_every_tensor_is_used_once_or_named(self):
        tensors, wte = self.tensors, self.tensors["wte.weight"]
        missing = {name: tensor for name, tensor in tensors.items() if name != "h.1.ln_2.bias"}
        turned = {"h.0.attn.c_attn.weight": tensors["h.0.attn.c_attn.weight"].t()}
        heads = {f"v_head.{i}.weight": torch.zeros(32) for i in range(100)}
        for saying, changed in (
                (r"config.json: h.1.ln_2.bias is missing, should be \(32,\)$", missing),
                (r"h.3.ln_1.bias is \(32,\), should be absent",
                 tensors | {"h.3.ln_1.bias": torch.zeros(32)}),
                ("json: v_head.0.weight is .32,., should be absent; v_head.1.w.*; and 97 more$",
                 tensors | heads),
                ("m/model.safetensors: ln_f.bias is there twice",
                 tensors | {"transformer.ln_f.bias": torch.zeros(32)}),
                ("ln_f.bias is .* not of floating-point numbers",
                 tensors | {"ln_f.bias": torch.zeros(32, dtype=torch.uint8)}),
                (r"h.0.attn.c_attn.weight is \(32, 96\), should be \(96, 32\)", tensors | turned),
                ("lm_head.weight differs from wte", tensors | {"lm_head.weight": wte + 1e-6})):
            self.assert_not_loaded(saying, tensors=changed)
        self.assert_not_loaded(r"wpe.weight is \(24, 32\), should be \(23, 32\)", n_positions=23)

    def test_other_architectures_are_refused_by_name(self):
        for setting, value in (
                ("model_type", "gpt_neo"), ("activation_function", "relu"),
                ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False),
                ("scale_attn_by_inverse_layer_idx", True), ("reorder_and_upcast_attn", True),
                ("add_cross_attention", True)):
            self.assert_not_loaded(f"config.json .*its {setting} is {value!r}, and",
                                   **{setting: value})
        self.assert_not_loaded("n_embd 32 is not a multiple of n_head 5", n_head=5)
        self.assert_not_loaded("whole number", n_layer="3")
        self.assert_not_loaded("eos_token_id", eos_token_id="</s>")
        self.assert_not_loaded("c_fc", n_layer=3, tensors=self.tensors | {
            "h.0.mlp.c_fc.weight": torch.zeros(32, 96)})  # n_inner

    def test_the_token_that_ends_a_text(self):
        for settings, expected in (({}, None), ({"eos_token_id": None}, None),
                                   ({"eos_token_id": 2}, 2), ({"eos_token_id": [3, 2]}, 3)):
            write_hub_folder("m", self.model, **settings)
            text = Path("m/config.json").read_text()
            for encoding in ("utf-8", "utf-8-sig"):  # without and with a byte-order mark
                Path("m/config.json").write_text(text, encoding)
                self.assertEqual(gpt.load_model("m").config.eos_token_id, expected)

    def test_files_that_are_damaged_or_missing(self):
        os.makedirs("runs")
        replace_hub(self, "http://127.0.0.1:9")
        for path in ("nowhere", "runs/gpt-shakespaere", "a/b/c", "../a", "m/model.safetensors/"):
            self.assert_not_loaded("is not a folder, nor one of gpt2, gpt2-medium", path)
        self.assert_not_loaded("config.json is not there: put it into this folder", "")
        Path("runs/best.pt").touch()
        self.assert_not_loaded("runs is a run of gpt.py's first edition .*: train", "runs")
        write_hub_folder("m", self.model)
        whole = Path("m/model.safetensors").read_bytes()
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        damages = {"model.safetensors": [
            b"", whole[:5], whole[:500], whole[:-1], b"<!DOCTYPE html> 404" * 100,
            (2**60).to_bytes(8, "little") + whole[8:], (2).to_bytes(8, "little") + b"[]",
            whole + b"more", whole.replace(b'"data_offsets": [0', b'"data_offsets": [4')]}
        torch.save(self.tensors, "pytorch_model.bin")
        flipped = bytearray(Path("pytorch_model.bin").read_bytes())
        flipped[len(flipped) // 2] ^= 1
        damages["pytorch_model.bin"] = [b"", b"J", b"half a check", whole, flipped]
        for content in ({"state_dict": {}}, {1: None}, [], torch.ones(2)):
            torch.save(content, "pytorch_model.bin")
            damages["pytorch_model.bin"].append(Path("pytorch_model.bin").read_bytes())
        damages["model.safetensors.index.json"] = [b"", b"[]", b"{}", b'{"weight_map": [1]}']
        damages["config.json"] = [b"", b"[]", b"{}", b"[" * 100_000, b"\xff"]
        for name, contents in damages.items():
            Path("m/model.safetensors").unlink(missing_ok=True)
            for content in (*contents, pointer):
                Path("m", name).write_bytes(content)
                self.assert_not_loaded(f"m/{name} is damaged .*" + (
                    "git lfs pull" if content == pointer else "put a sound copy"))
            os.remove(f"m/{name}")
            self.assert_not_loaded("not there|no weights")
            write_hub_folder("m", self.model)
        Path("m/model.safetensors").write_bytes(whole.replace(b"F32", b"F4_"))
        self.assert_not_loaded("m/model.safetensors is damaged .*F4_")
        os.remove("m/model.safetensors")
        write_shards("m", self.tensors, "safetensors")
        os.remove("m/model-00002-of-00003.safetensors")
        self.assert_not_loaded("model-00002-of-00003.safetensors is not there")

    def test_a_pickle_is_never_run(self):
        class Harmful:
            def __reduce__(self):
                return os.mkdir, ("harmed",)

        write_hub_folder("m", self.model)
        os.remove("m/model.safetensors")
        torch.save(self.tensors | {"more": Harmful()}, "m/pytorch_model.bin")
        self.assert_not_loaded("pytorch_model.bin is damaged or not a GPT-2's")
        self.assertFalse(Path("harmed").exists())

    @unittest.skipUnless(Path("/proc/self/status").exists(), "needs Linux's /proc")
    def test_loading_takes_little_more_memory_than_the_weights(self):
        torch.manual_seed(0)
        model = gpt.GPT(gpt.GPTConfig(50257, 64, 2, 4, 512))  # 128 MB
        tensors = hub_tensors(model)
        write_hub_folder("one", model)
        for kind in ("safetensors", "bin"):
            Path(kind).mkdir()
            shutil.copy("one/config.json", kind)
            write_shards(kind, tensors, kind)
        for folder in ("one", "safetensors", "bin"):
            _, peak = load_apart(folder)
            self.assertTrue(0.9 < peak < 1.3, peak)

    def test_a_saved_model_is_read_back_and_checked(self):
        torch.manual_seed(0)
        sizes = [np.int64(size) for size in (61, 24, 3, 4, 32)]  # numpy's integers are fine
        padded = gpt.GPT(gpt.GPTConfig(*sizes, eos_token_id=7, padded_vocab_size=64))
        gpt.save_model(padded, "m/run")
        model = gpt.GPT.from_pretrained("m/run")
        self.assertEqual(model.config, gpt.GPTConfig(61, 24, 3, 4, 32, eos_token_id=7))
        idx = torch.randint(61, (2, 24))
        torch.testing.assert_close(model(idx)[0], padded(idx)[0][..., :61], rtol=0, atol=1e-6)
        self.assertEqual(sorted(os.listdir("m/run")), ["config.json", "model.safetensors"])
        path = Path("m/run/model.safetensors")
        whole = path.read_bytes()
        self.assertEqual(int.from_bytes(whole[:8], "little") % 8, 0)
        for place in (len(whole) - 1, len(whole) // 2, whole.index(b"crc32") + 10):
            flipped = bytearray(whole)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            self.assert_not_loaded("model.safetensors is damaged .*checksum", "m/run")

    def test_a_kill_while_saving_leaves_the_model_before(self):
        gpt.save_model(self.model, "m")
        with mock.patch("zlib.crc32", side_effect=KeyboardInterrupt), \
                self.assertRaises(KeyboardInterrupt):
            gpt.save_model(small_gpt(spread=1.0).float(), "m")
        self.assert_loaded("m")

    @needs_references
    def test_the_reference_model_in_both_layouts(self):
        expected = np.load(Path(REFERENCE_DIR, "gpt2_tiny/expected.npz"))
        expected = {name: torch.from_numpy(array) for name, array in expected.items()}
        ids, greedy = expected["ids"], expected["greedy"]
        for name in ("model.safetensors", "pytorch_model.bin"):
            Path(name).mkdir()
            for file in (name, "config.json"):
                shutil.copy(Path(REFERENCE_DIR, "gpt2_tiny", file), name)
            model = gpt.GPT.from_pretrained(name)
            with torch.no_grad():
                logits, loss = model(ids)[0], model(ids[:, :-1], ids[:, 1:])[1]
            error = (logits - expected["logits"]).abs().max() / expected["logits"].std()
            self.assertLess(error.item(), 1e-4)
            self.assertAlmostEqual(loss.item(), expected["loss"].item(), delta=1e-5)
            T = expected["prompt"].size(1)
            tokens = model.generate(expected["prompt"], greedy.size(1) - T, do_sample=False)
            self.assertTrue(torch.equal(tokens, greedy))

    @needs_transformers
    def test_transformers_models_of_several_shapes_there_and_back(self):
        import transformers

        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        for vocab_size, block_size, n_layer, n_head, n_embd in (
                (97, 16, 1, 1, 8), (1000, 33, 2, 3, 48), (503, 128, 5, 2, 64), (61, 24, 3, 4, 32),
                (2048, 64, 4, 8, 128), (50257, 1024, 12, 12, 768)):
            torch.manual_seed(0)
            theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
                vocab_size=vocab_size, n_positions=block_size, n_layer=n_layer, n_head=n_head,
                n_embd=n_embd, bos_token_id=0, eos_token_id=None)).eval()
            idx = torch.randint(vocab_size, (2, min(block_size, 64)))
            with torch.no_grad():
                expected = theirs(idx, labels=idx)
                for name, options in (("one", {}), ("shards", {"max_shard_size": "100MB"})):
                    theirs.save_pretrained(name, **options)
                    ours = gpt.GPT.from_pretrained(name)
                    logits, loss = ours(idx)[0], ours(idx[:, :-1], idx[:, 1:])[1]
                    error = (logits - expected.logits).abs().max() / expected.logits.std()
                    self.assertLess(error.item(), 1e-4)
                    self.assertAlmostEqual(loss.item(), expected.loss.item(), delta=1e-5)
                gpt.save_model(ours, "back")
                back, info = transformers.GPT2LMHeadModel.from_pretrained(
                    "back", output_loading_info=True)
                self.assertFalse(any(info.values()), info)
                error = (back.eval()(idx).logits - logits).abs().max() / logits.std()
                self.assertLess(error.item(), 1e-4)
                self.assertEqual(back.config.eos_token_id, None)
            tokens = theirs.generate(idx[:, :4], attention_mask=torch.ones_like(idx[:, :4]),
                                     max_new_tokens=12, do_sample=False, pad_token_id=0)
            self.assertTrue(torch.equal(tokens, ours.generate(idx[:, :4], 12, do_sample=False)))
            for folder in ("one", "shards", "back"):
                shutil.rmtree(folder)

    def test_a_model_is_downloaded_once(self):
        files = ["added_tokens.json", "config.json", "merges.txt", "model.safetensors",
                 "vocab.json"]
        for name, repo, cache in (("gpt2-xl", "openai-community/gpt2-xl", "gpt2-xl"),
                                  ("me/gpt.2", "me/gpt.2", "me--gpt.2")):
            asked = serve_hub(self, self.model, repo)
            self.assert_loaded(name)
            self.assertEqual(sorted(asked), [f"{repo}/{file}" for file in files])
            replace_hub(self, "http://127.0.0.1:9")  # from now on there is no network
            self.assert_loaded(name)
            self.assertEqual(len(gpt.load_tokenizer(name)), 257)
            self.assertEqual(sorted(os.listdir(f"cache/checkpoints/{cache}")), files[1:])

    def test_what_a_download_asks_for(self):
        """Without the weights, where only a tokenizer is wanted; and all shards of an index."""
        asked, hub = serve_hub(self, self.model), Path("hub/openai-community/gpt2")
        os.remove(hub / "model.safetensors")
        os.remove(hub / "merges.txt")
        (hub / "tokenizer.json").write_text("{}")
        write_shards(hub, self.tensors, "bin")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            folder = gpt.find_model("gpt2", weights=False)
        self.assertEqual({path.name for path in folder.iterdir()},
                         {"config.json", "tokenizer.json", "vocab.json"})
        for line in err.getvalue().splitlines():
            self.assertRegex(line, "^downloading http.*/resolve/main/.* to cache/checkpoints/gpt2")
        self.assert_loaded("gpt2")
        self.assertEqual(len(os.listdir(folder)), 7)
        before = list(asked)
        self.assert_loaded("gpt2")
        self.assertEqual(asked, before)

    def test_two_downloads_at_once(self):
        both = threading.Barrier(2)
        serve_hub(self, self.model, wait=lambda: both.wait(30))
        with concurrent.futures.ThreadPoolExecutor() as pool, \
                contextlib.redirect_stderr(io.StringIO()):
            folder, _ = pool.map(gpt.find_model, ["gpt2", "gpt2"])
        self.assert_loaded("gpt2")
        self.assertEqual(len(os.listdir(folder)), 4)

    def test_downloads_that_fail(self):
        asked = serve_hub(self, self.model, broken="model.safetensors")
        for _ in range(2):
            self.assert_not_loaded("safetensors is not in .*it broke off 50 bytes before its end",
                                   "gpt2", ConnectionError)
        self.assertNotIn("model.safetensors", os.listdir("cache/checkpoints/gpt2"))
        self.assert_not_loaded("me/gpt is not on the hub", "me/gpt", FileNotFoundError)
        write_hub_folder("hub/me/bert", self.model, model_type="bert")
        self.assert_not_loaded("its model_type is 'bert'", "me/bert", ValueError)
        self.assertNotIn("me/bert/model.safetensors", asked)
        replace_hub(self, "http://127.0.0.1:9")
        for name in ("gpt2-large", "me/other"):
            self.assert_not_loaded("config.json is not in cache/checkpoints/.* and could not be "
                                   "downloaded .*: run once online, or", name, ConnectionError)

    def test_the_public_weights(self):
        """Texts, ids and logits that other implementations published for GPT-2 124M."""
        places = (Path(DATA_DIR, "gpt2"), Path(torch.hub.get_dir(), "checkpoints/gpt2"))
        folder = next((place for place in places if (place / "model.safetensors").exists()), None)
        if folder is None:
            self.skipTest("the public weights of GPT-2 are not at hand: they are downloaded by "
                          "`python gpt.py generate`")
        model, tokenizer = gpt.GPT.from_pretrained(folder), gpt.load_tokenizer(folder)
        for text, ids in (
                ("Alan Turing theorized that computers would one day become",
                 [262, 749, 3665, 8217, 319, 262, 5440, 13, 198, 198]),
                ("San Francisco is", [257, 1748, 286, 517, 621, 352, 1510, 661]),
                ("Cars are", [407, 3142, 284, 307, 973, 287, 262, 7647, 1256, 286, 257, 7072, 13]),
                ("Ondřej Čertík was born in",
                 [1248, 5332, 287, 262, 7404, 286, 25370, 254, 368, 83, 6557, 81, 11]),
                ("The dog", [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688,
                             27262, 13, 198, 198, 464, 3290])):
            prompt = torch.tensor([tokenizer.encode(text)])
            tokens = model.generate(prompt, len(ids), do_sample=False)
            self.assertEqual(tokens[0, prompt.size(1):].tolist(), ids)
        logits = model(torch.tensor([[15496]]))[0][0, 0, :8]
        torch.testing.assert_close(logits, torch.tensor([
            -35.236244, -35.326595, -38.975349, -39.390675, -37.653183, -38.672436, -36.024891,
            -36.484154]), atol=1e-3, rtol=0)


def save_run(folder, model, characters):
    """What a training run leaves, as far as `generate` needs it"""
    Path(folder).mkdir()
    gpt.CharTokenizer(characters).save(Path(folder))
    gpt.save_model(model, Path(folder))


LOADING = """
import re, sys, threading, time, torch
from pathlib import Path

def own_memory():  # without what is mapped of files
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    global highest
    while not done.wait(0.001):
        highest = max(highest, own_memory())

start = highest = own_memory()
import gpt
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
model = gpt.GPT.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - began
done.set()
watcher.join()
highest = max(highest, own_memory())
print(seconds, (highest - start) / sum(p.nbytes for p in model.parameters()))
"""


def load_apart(path):
    """Load a model in a process of its own (Linux). -> seconds, and the highest its own memory
    rises above that after `import torch`, as a multiple of the weights"""
    result = subprocess.run([sys.executable, "-c", LOADING, path], check=True, text=True,
                            capture_output=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    return map(float, result.stdout.split())


class GPTCommandLine(TemporaryFolder):
    module = gpt
    CHARACTERS = "\n !'abcdefghijklmnopqrstuvwxyz"

    def setUp(self):
        super().setUp()
        vocab_size = len(self.CHARACTERS)
        save_run("run", small_gpt(vocab_size=vocab_size).float(), self.CHARACTERS)
        write_hub_folder("hub", small_gpt(vocab_size=257), eos_token_id=256)
        own_files(folder="hub")

    def generate(self, *argv, model="run", stdin=b""):
        """-> what `generate` wrote to standard output and to standard error"""
        with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))):
            status, out, err = run_main(gpt.main, "generate", "--model", model, "--device", "cpu",
                                        *argv)
        self.assertEqual(status, 0, err)
        return out, err

    def test_bad_values_are_answered_in_one_line(self):
        for argv, saying in (
                ([], "required: command"), (["write"], "invalid choice: 'write'"),
                (["generate", "--top-k", "-1"], "--top-k: -1 is not between 0 and"),
                (["generate", "--top-p", "1.1"], "--top-p: 1.1 is not between 0 and 1"),
                (["generate", "--temperature", "-1"], "--temperature: -1 is not between 0 and"),
                (["generate", "--temperature", "nan"], "--temperature: nan is not between"),
                (["generate", "--temperature", "inf"], "--temperature: inf is not between"),
                (["generate", "--num-samples", "0"], "--num-samples: 0 is not between 1 and"),
                (["generate", "--max-new-tokens", "-1"], "--max-new-tokens: -1 is not between"),
                (["generate", "--greedy", "--top-k", "3"], "--greedy leaves nothing to"),
                (["generate", "--stop", ""], "--stop needs a text"),
                (["generate", "--max-new", "3"], "unrecognized arguments: --max-new"),
                (["generate", "--model", "nowhere"], "nowhere"),
                (["generate", "--model", "run", "--prompt", "a Z"], "'Z'"),
                (["generate", "--model", "hub/config.json"], "hub/config.json")):
            with self.subTest(" ".join(argv)):
                self.assert_refused(*argv, saying=saying)
        os.remove("hub/merges.txt")
        self.assert_refused("generate", "--model", "hub", saying="merges.txt")
        save_run("less", small_gpt(vocab_size=5).float(), self.CHARACTERS)
        self.assert_refused("generate", "--model", "less", saying="they do not belong together")

    @unittest.skipIf(torch.cuda.is_available(), "this machine has a GPU")
    def test_a_device_that_is_not_there(self):
        self.assert_refused("generate", "--device", "cuda", saying="--device cuda: this machine")

    def test_one_sample_of_each_kind_of_model(self):
        for model in ("run", "hub"):
            out, err = self.generate("--prompt", "my text", "--max-new-tokens", 30, model=model)
            self.assertTrue(out.startswith("my text"))
            self.assertGreater(len(out), 20)
            first, last = err.splitlines()
            self.assertRegex(first, rf"^{model}: [\d,]+ parameters on cpu in float32; tokens: 7 of")
            self.assertRegex(last, r"^\d+ tokens in [\d.]+ s: [\d.]+ tokens/s$")

    def test_a_seed_a_text(self):
        first, second = (self.generate("--seed", 1)[0] for _ in range(2))
        self.assertEqual(first, second)
        self.assertNotEqual(first, self.generate("--seed", 2)[0])

    def test_several_samples_are_one_batch_and_printed_one_after_another(self):
        batches = []
        hidden = gpt.GPT.hidden
        with mock.patch.object(gpt.GPT, "hidden", lambda self, idx, *rest: batches.append(
                len(idx)) or hidden(self, idx, *rest)):
            out, err = self.generate("--num-samples", 3, "--prompt", "one", "--max-new-tokens", 12)
        self.assertEqual(batches, [3] * 12)
        samples = out.split("\n---\n")
        self.assertEqual(len(set(samples)), 3)
        self.assertTrue(all(sample.startswith("one") for sample in samples))
        self.assertRegex(err.splitlines()[-1], r"^36 tokens in")

    def test_the_limits_of_sampling(self):
        greedy = self.generate("--greedy")[0]
        for flag in ("--temperature", "--top-p"):
            self.assertEqual(self.generate(flag, 0)[0], greedy)
        self.assertEqual(self.generate("--top-k", 1)[0], greedy)
        free = self.generate("--top-k", 0)[0]
        self.assertNotEqual(free, greedy)
        self.assertEqual(self.generate("--top-k", 10**6, "--top-p", 1)[0], free)

    def test_nothing_new(self):
        for flags in ([], ["--num-samples", 2]):
            out = self.generate("--prompt", "as it is", "--max-new-tokens", 0, *flags)[0]
            self.assertEqual(out, "---\n".join(["as it is\n"] * (1 + len(flags) // 2)))

    def test_a_prompt_from_standard_input_loses_one_line_end(self):
        for stdin, prompt in ((b"two\nlines\n\n", "two\nlines\n"), (b"one\r\n", "one"),
                              (b"one", "one"), ("é😀".encode(), "é😀")):
            out, _ = self.generate("--prompt", "-", "--max-new-tokens", 0, model="hub", stdin=stdin)
            self.assertEqual(out, prompt + "\n")
        with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"))):
            self.assert_refused("generate", "--model", "hub", "--prompt", "-",
                                saying="'utf-8' codec can't decode byte 0xff")

    def test_unusual_prompts(self):
        out, err = self.generate("--prompt", "a\0b\ud83dc", model="hub", stdin=b"")
        self.assertTrue(out.startswith("a\0b\ufffdc"))
        out, err = self.generate("--prompt", "long " * 20, "--max-new-tokens", 5)
        self.assertEqual(len(out), 100 + 5 + 1)

    def test_an_empty_prompt_starts_a_new_text(self):
        seen = []
        hidden = gpt.GPT.hidden
        with mock.patch.object(gpt.GPT, "hidden", lambda self, idx, *rest: seen.append(
                idx.tolist()) or hidden(self, idx, *rest)):
            for model, start in (("hub", 256), ("run", 0)):
                self.generate(model=model)
                self.assertEqual(seen[0], [[start]])
                seen.clear()

    def test_a_text_ends_where_the_model_ends_it(self):
        script = iter(torch.tensor([97, 98, 256, 99]).view(4, 1, 1))
        with mock.patch.object(gpt, "next_token", lambda *_, **__: next(script)):
            out, err = self.generate("--prompt", "x", model="hub")
        self.assertEqual(out, "xab\n")
        self.assertRegex(err, "\n3 tokens in")

    def test_a_text_ends_before_the_words_given_by_stop(self):
        flags = ["--prompt", "ab", "--max-new-tokens", 60]
        whole = self.generate(*flags)[0]
        for length in (1, 2, 5):
            stop = whole[20:20 + length]
            out = self.generate(*flags, "--stop", stop)[0]
            self.assertEqual(out, "ab" + whole[2:].split(stop)[0] + "\n")
        self.assertEqual([*gpt.up_to(["ab", "c", "ab", "d", "x"], "abd")], ["", "abc", "", ""])
        self.assertEqual("".join(gpt.up_to("aabaabaac", "aabaac")), "aab")
        self.assertEqual("".join(gpt.up_to(["x", "ab"], "abc")), "xab")

    def test_special_tokens_in_a_prompt_are_one_token(self):
        err = self.generate("--prompt", "ab<|endoftext|>c", model="hub")[1]
        self.assertIn("tokens: 4 of the prompt", err)

    def test_layers_in_16_bits(self):
        for dtype in ("bfloat16", "float16"):
            out, err = self.generate("--dtype", dtype, "--prompt", "abc")
            self.assertIn(f"on cpu in {dtype};", err)
            self.assertEqual(len(out), 204)

    def test_a_reader_sees_each_token_at_once(self):
        written = []
        with mock.patch("builtins.print", lambda *words, **_: written.append(words)):
            self.generate("--prompt", "abc", "--max-new-tokens", 5)
        made = [word for word, in written[3:-2] if word]
        self.assertEqual([len(word) for word in made], [1] * 5)


def write_text(path, length=5000, characters="\n abcdefg"):
    """A text whose characters come in threes, which a model learns in a few steps."""
    words = ["".join(word) for word in itertools.product(characters, repeat=3)]
    text = "".join(random.Random(0).choices(words[::70], k=length // 3 + 1))[:length]
    Path(path).write_text(text, encoding="utf-8", newline="")
    return text


class GPTText(TemporaryFolder):
    def tokenize(self, tokenizer, folder=".", check=True, distinct=True):
        """-> the text's length and characters, and its tokens"""
        path = Path("text.txt")
        length, digest, characters = gpt.scan_text(path, None, distinct)
        tokenizer = tokenizer or gpt.CharTokenizer(characters)
        return length, characters, *gpt.tokenize(path, length, digest, tokenizer, Path(folder), 4,
                                                 check)

    def test_the_tokens_are_those_of_the_text_made_once_for_each_tokenizer(self):
        text = write_text("text.txt", 3333)
        own_files("a b", "e e")
        for tokenizer in (gpt.CharTokenizer("\n abcdefg"),
                          gpt.BPETokenizer("vocab.json", "merges.txt")):
            length, characters, train, val = self.tokenize(tokenizer)
            self.assertEqual((length, characters), (3333, "\n abcdefg"))
            self.assertEqual(train.dtype, np.uint16)
            self.assertEqual(train.tolist(), tokenizer.encode(text[:2999]))
            self.assertEqual(val.tolist(), tokenizer.encode(text[2999:]))
            with mock.patch.object(type(tokenizer), "encode_pieces", lambda *_: 1 / 0):
                self.assertEqual(self.tokenize(tokenizer)[2].tolist(), train.tolist())
        self.assertEqual(len([*Path(".").glob("tokens-*.bin")]), 2)

    def test_damaged_tokens_are_noticed(self):
        write_text("text.txt", 3333)
        self.tokenize(None)
        file, = Path(".").glob("tokens-*.bin")
        whole = file.read_bytes()
        for damaged in (whole[:-2], whole[:1000] + bytes(100) + whole[1100:]):
            file.write_bytes(damaged)
            with self.assertRaisesRegex(common.UserError, "tokens-.*bin is damaged: delete it"):
                self.tokenize(None)
        self.tokenize(None, check=False)  # by the other processes of a machine

    def test_more_than_65536_tokens_do_not_wrap(self):
        everything = "".join(map(chr, [*range(32, 0xd800), *range(0x10000, 0x10000 + 20_000)]))
        Path("text.txt").write_text(everything, encoding="utf-8", newline="")
        _, _, train, val = self.tokenize(None)
        self.assertEqual(train.dtype, np.uint32)
        self.assertEqual([*train, *val], [*range(len(everything))])

    def test_end_of_text_is_one_token_to_learn(self):
        own_files()
        tokenizer = gpt.BPETokenizer("vocab.json", "merges.txt")
        Path("text.txt").write_text("ab<|endoftext|>" * 20, encoding="utf-8")
        train = self.tokenize(tokenizer)[2]
        self.assertEqual(train[:6].tolist(), tokenizer.encode("ab<|endoftext|>") * 2)

    def test_windows_are_consecutive_tokens(self):
        tokens, starts = np.arange(100, dtype=np.uint16), np.array([0, 7, 91])
        windows = gpt.windows(tokens, starts, 9)
        self.assertEqual((windows.shape, windows.dtype), ((3, 9), torch.int64))
        self.assertEqual(windows[:, 0].tolist(), starts.tolist())
        self.assertTrue((windows.diff() == 1).all())

    def test_tiny_shakespeare_is_downloaded_once_and_python_stands_in(self):
        def respond(handler, name):
            asked.append(name)
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(b"First Citizen:\n")

        asked, err = [], io.StringIO()
        server = serve(self, respond)
        with mock.patch.object(gpt, "SHAKESPEARE", f"{server}/input.txt"), \
                contextlib.redirect_stderr(err):
            for _ in range(2):
                path = gpt.find_text("data", fallback=False)
        self.assertEqual((str(path), path.read_text()), ("data/tinyshakespeare.txt",
                                                         "First Citizen:\n"))
        self.assertEqual(asked, ["input.txt"])
        with mock.patch.object(gpt, "SHAKESPEARE", "http://localhost:1/input.txt"), \
                contextlib.redirect_stderr(err):
            with self.assertRaises(ConnectionError):
                gpt.find_text("elsewhere", fallback=False)
            path = gpt.find_text("elsewhere", fallback=True)
        self.assertIn("could not be downloaded", err.getvalue())
        self.assertEqual(path.name, "python-topics.txt")
        self.assertGreater(gpt.scan_text(path, None, False)[0], 100_000)


def evaluate(model, tokens, tokenizer, batch_size=4):
    num_bytes = np.array([tokenizer.num_bytes(id) for id in range(len(tokenizer))])
    return gpt.evaluate(model, tokens, num_bytes, batch_size, torch.float32)


class GPTTraining(TemporaryFolder):
    module = gpt

    def setUp(self):
        super().setUp()
        for name in ("gpt.draw_sample", "common.save_curves"):  # slower than the short runs here
            drawing = mock.patch(name)
            drawing.start()
            self.addCleanup(drawing.stop)
        self.text = write_text("text.txt")

    SMALL = ["--text", "text.txt", "--device", "cpu", "--n-layer", 2, "--n-embd", 32,
             "--block-size", 16]

    def train(self, *argv):
        """-> the folder, the printed lines and the rows of metrics.jsonl of a run"""
        status, out, err = run_main(gpt.main, "train", *self.SMALL, *argv)
        self.assertEqual((status, err), (0, ""))
        run = Path(out.splitlines()[-1].split(" -> ")[1])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return run, out.splitlines(), rows

    def last_of(self, run):
        return common.load_checkpoint(Path(run, "last.pt"), "gpt.py, edition 2")

    def gradients(self, *argv):
        """Those of the first step, in float64"""
        seen = []

        def clip(parameters, *_):
            seen.append([p.grad.clone() for p in parameters])
            return torch.zeros(())

        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        with mock.patch.object(nn.utils, "clip_grad_norm_", clip):
            self.train("--max-steps", 1, *argv)
        return torch.cat([gradient.flatten() for gradient in seen[0]])

    def test_accumulated_gradients_are_those_of_the_whole_batch(self):
        whole = self.gradients("--batch-size", 16)
        parts = self.gradients("--batch-size", 16, "--grad-accum", 4)
        self.assertEqual(whole.dtype, torch.float64)
        self.assertLess((whole - parts).norm(), 1e-12 * whole.norm())

    def test_orthogonalized_matrices_keep_their_singular_vectors(self):
        torch.manual_seed(0)
        for shape in ((20, 50), (50, 20), (30, 30)):
            matrix = torch.randn(shape)
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
            result = gpt.orthogonalize(matrix.expand(2, *shape))[1]
            product = u.T @ result @ vt.T  # diagonal, if it has the same
            values = product.diag()
            self.assertLess((product - values.diag()).abs().max(), 1e-4)
            large = s > 0.1 * s.max()
            self.assertTrue(((0.6 < values) & (values < 1.3))[large].all(), values)

    @unittest.skipUnless(hasattr(torch.optim, "Muon"), "this torch has no Muon")
    def test_muon_is_that_of_torch(self):
        torch.manual_seed(0)
        ours, theirs = (nn.Parameter(t) for t in torch.randn(1, 40, 24).repeat(2, 1, 1))
        a = gpt.Muon([ours], lr=0.1, weight_decay=0.1)
        b = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        before = ours.detach().clone()
        for _ in range(3):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
            a.step()
            b.step()
        self.assertLess((ours - theirs).norm(), 0.01 * (ours - before).norm())  # it has bfloat16

    def test_muon_runs_when_pasted_with_torch_alone(self):
        pasted = paste(HERE / "gpt.py", ["Muon", "orthogonalize"])
        weight = nn.Parameter(torch.eye(3))
        optimizer = pasted["Muon"]([weight], lr=0.1, weight_decay=0.0)
        for _ in range(100):
            optimizer.zero_grad()
            (weight - 2 * torch.eye(3)).square().sum().backward()
            optimizer.step()
        self.assertLess((weight - 2 * torch.eye(3)).abs().max(), 0.2)

    def test_the_learning_rate_rises_and_follows_a_cosine(self):
        args = argparse.Namespace(lr=1, min_lr=0.1, warmup=10, max_steps=110)
        rates = [gpt.learning_rate(step, args) for step in range(110)]
        self.assertAlmostEqual(rates[0], 0.1)
        self.assertEqual(rates[9:11], [1.0, 1.0])
        self.assertAlmostEqual(rates[60], 0.55)
        self.assertEqual(rates[10:], sorted(rates[10:], reverse=True))
        self.assertLess(rates[-1], 0.101)

    def test_validation_weighs_every_token_the_same_and_counts_bytes(self):
        torch.manual_seed(0)
        characters = "aé€😀\n"  # of 1, 2, 3, 4 and 1 bytes
        tokens = torch.randint(5, (50,)).numpy().astype(np.uint16)
        model = gpt.GPT(gpt.GPTConfig(5, 8, 1, 1, 4))  # six whole windows, and a token left out
        x = torch.from_numpy(tokens[:49].astype(np.int64))
        nats = model(x[:48].view(6, 8), x[1:].view(6, 8))[1].item()
        length = len("".join(characters[i] for i in tokens[1:49]).encode("utf-8"))
        for batch_size in (1, 4, 100):
            loss, bits = evaluate(model, tokens, gpt.CharTokenizer(characters), batch_size)
            self.assertAlmostEqual(loss, nats, places=5)
            self.assertAlmostEqual(bits, 48 * nats / length / math.log(2), places=5)
        self.assertTrue(model.training)
        evaluate(model, tokens[:5], gpt.CharTokenizer(characters))  # less than a window

    def test_operations_per_token(self):
        with torch.device("meta"):
            model = gpt.GPT(gpt.GPTConfig(50257, 1024, *gpt.SIZES["gpt2"]))
        matrices = 12 * 12 * 768**2 + 50257 * 768
        self.assertAlmostEqual(gpt.flops_per_token(model) / (6 * matrices + 12 * 12 * 1024 * 768),
                               1, places=2)

    def test_a_run_learns_and_leaves_what_the_readme_says(self):
        run, lines, rows = self.train("--max-steps", 60, "--eval-every", 25)
        self.assertEqual(run, Path("runs/gpt-text"))
        self.assertRegex(lines[0], "^GPT on text.txt, characters: .* .2 layers, 4 heads, 32 wide; "
                         "defaults: cpu. on cpu in float32; 4,500 train, 500 val "
                         "tokens, 9 different; 60 steps of 12 x 16 tokens, .* -> runs/gpt-text$")
        self.assertEqual([row["step"] for row in rows], [0, 25, 50, 60])
        self.assertEqual([*rows[0]], ["epoch", "step", "seconds", "tokens_per_s", "train_loss",
                                      "val_loss", "val_bits_per_byte", "lr", "grad_norm"])
        self.assertLess(rows[-1]["val_loss"], 1.9)  # ln 9 is 2.2
        self.assertAlmostEqual(rows[-1]["val_bits_per_byte"] * math.log(2), rows[-1]["val_loss"],
                               places=4)  # a byte a character
        self.assertEqual(sorted(os.listdir(run)), [
            "args.json", "config.json", "last.pt", "metrics.jsonl", "model.safetensors",
            "test.json", "vocab.json"])
        test = json.loads((run / "test.json").read_text())
        self.assertEqual(test["val_loss"], min(row["val_loss"] for row in rows))
        model = gpt.GPT.from_pretrained(run)
        self.assertEqual([*self.last_of(run)["model"]], [*model.state_dict()])
        status, out, _ = run_main(gpt.main, "generate", "--model", run, "--prompt", "abc",
                                  "--device", "cpu")
        self.assertEqual((status, out[:3], len(out)), (0, "abc", 204))

    @needs_transformers
    def test_transformers_reads_the_folder_of_a_run(self):
        import transformers

        own_files("a b", "e e")
        Path("data/gpt2").mkdir(parents=True)
        for name in ("vocab.json", "merges.txt"):
            shutil.move(name, "data/gpt2")
        idx = torch.randint(9, (2, 16), generator=torch.Generator().manual_seed(0))
        for flags in ([], ["--tokenizer", "gpt2"]):
            run = self.train("--max-steps", 20, *flags)[0]
            theirs = transformers.GPT2LMHeadModel.from_pretrained(run).eval()
            ours = gpt.GPT.from_pretrained(run)
            self.assertEqual(ours.wte.weight.shape[0], len(gpt.load_tokenizer(run)))
            with torch.no_grad():
                torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)
        # Rows that only training has: 257 + 2 tokens, rounded up to a multiple of 64
        self.assertEqual(self.last_of(run)["model"]["wte.weight"].shape[0], 320)

    @needs_transformers
    @needs_references
    def test_ten_steps_are_those_of_transformers_with_torchs_adamw(self):
        import transformers

        reference = Path(REFERENCE_DIR, "gpt2_tiny")
        seen, step = [], torch.Tensor.backward
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        load_model, windows = gpt.load_model, gpt.windows

        def backward(loss, *args):
            seen.append(loss.item())
            return step(loss, *args)

        def remembered(tokens, starts, length):
            batches.append(windows(tokens, starts, length))
            return batches[-1]

        batches = []
        with mock.patch.object(torch.Tensor, "backward", backward), \
                mock.patch.object(gpt, "windows", remembered), \
                mock.patch.object(gpt, "load_model", lambda *a: load_model(*a).double()):
            status, _, err = run_main(
                gpt.main, "train", "--init", reference, "--tokenizer", "char", "--text", "text.txt",
                "--device", "cpu", "--max-steps", 10, "--lr", 1e-3, "--min-lr", 1e-3, "--warmup", 0,
                "--eval-every", 100, "--out-dir", "run")
        self.assertEqual(status, 0, err)
        batches = [batch for batch in batches if len(batch) == 4][-10 - 1:]
        theirs = transformers.GPT2LMHeadModel.from_pretrained(reference).double()
        decayed = [p for p in theirs.parameters() if p.dim() == 2]
        others = [p for p in theirs.parameters() if p.dim() == 1]
        optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0}],
                                      lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        training = [batch for batch in batches if len(batch) == 4]
        losses = []
        for batch in training[:10]:
            logits = theirs(input_ids=batch[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
        np.testing.assert_allclose(seen, losses, rtol=0, atol=1e-8)
        model, last = theirs.transformer.state_dict(), self.last_of("run")["model"]
        for name, weight in last.items():
            other = model[name].T if ".c_" in name and weight.dim() == 2 else model[name]
            self.assertLess((weight - other[:len(weight)]).abs().max().item(), 1e-8, name)

    def test_curves_and_samples_are_left_at_each_evaluation(self):
        mock.patch.stopall()
        status, out, err = run_main(gpt.main, "train", "--text", "text.txt", "--device", "cpu",
                                    "--n-layer", 1, "--max-steps", 2, "--eval-every", 1)
        self.assertEqual((status, err), (0, ""))
        samples = [path.read_text(encoding="utf-8") for path in sorted(Path("runs").rglob("*.txt"))]
        self.assertEqual([len(sample) for sample in samples], [200, 200, 200])
        for sample in samples:
            self.assertIn(textwrap.indent(sample, "    "), out)
        self.assertGreater(Path("runs/gpt-text/loss.png").stat().st_size, 1000)

    def test_a_second_run_gets_a_folder_of_its_own_and_the_same_weights(self):
        runs = [self.train("--max-steps", 3, "--dropout", 0.1)[0] for _ in range(2)]
        self.assertEqual([run.name for run in runs], ["gpt-text", "gpt-text-2"])
        first, second = map(self.last_of, runs)
        self.assertEqual(differences(first["model"], second["model"]), [])

    def test_each_kind_of_parameter_is_optimized_as_it_should_be(self):
        for optimizer, moments in (("adamw", {"adamw": 28}), ("muon", {"adamw": 20, "muon": 4})):
            run, _, _ = self.train("--max-steps", 1, "--optimizer", optimizer)
            saved = self.last_of(run)["optimizer"]
            self.assertEqual({name: len(state["state"]) for name, state in saved.items()}, moments)
            decay = [group["weight_decay"] for group in saved["adamw"]["param_groups"]]
            self.assertEqual(decay, [0.1, 0.0])

    def test_16_bits_learn_as_32_do(self):
        for optimizer in ("muon", "adamw"):
            losses = {}
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                with computing_in(dtype):
                    run, _, rows = self.train("--max-steps", 100, "--eval-every", 50,
                                              "--optimizer", optimizer)
                losses[dtype] = rows[-1]["train_loss"]
            for dtype in (torch.bfloat16, torch.float16):
                self.assertLess(abs(losses[dtype] / losses[torch.float32] - 1), 0.03, dtype)
            self.assertGreaterEqual(self.last_of(run)["scaler"]["scale"], 2**10)

    def test_the_compiled_graphs_have_no_break(self):
        model, idx = gpt.GPT(gpt.GPTConfig(61, 16, 2, 4, 32)), torch.randint(61, (4, 16))
        explanation = torch._dynamo.explain(model)(idx, idx)
        self.assertEqual(explanation.graph_break_count, 0, explanation.break_reasons)
        torch._dynamo.reset()

    def test_fine_tuning_starts_where_the_model_is(self):
        write_hub_folder("hub", small_gpt(vocab_size=300, block_size=24).float())
        own_files("a b", folder="hub")
        first = self.train("--max-steps", 30)[0]
        for init in ("hub", first):
            model, tokenizer = gpt.GPT.from_pretrained(init), gpt.load_tokenizer(init)
            model.crop(16)
            val = np.array(tokenizer.encode(self.text[4500:]), np.uint16)
            own, _ = evaluate(model, val, tokenizer)
            status, out, err = run_main(
                gpt.main, "train", "--text", "text.txt", "--init", init, "--block-size", 16,
                "--device", "cpu", "--max-steps", 100, "--lr", 3e-3, "--dropout", 0.1)
            self.assertEqual((status, err), (0, ""))
            run = Path(out.splitlines()[-1].split(" -> ")[1])
            start = next(line for line in out.splitlines() if line.startswith("step "))
            self.assertIn(f"val {own:.4f}", start)
            self.assertLess(json.loads((run / "test.json").read_text())["val_loss"], own - 0.02)
            loaded = gpt.load_tokenizer(run)
            self.assertEqual(type(loaded), type(tokenizer))
            self.assertEqual(loaded.encode(self.text), tokenizer.encode(self.text))
        shutil.rmtree("hub")  # the run has a tokenizer of its own
        status, _, err = run_main(gpt.main, "generate", "--model", run, "--device", "cpu")
        self.assertEqual(status, 0, err)

    def test_a_finished_run_is_looked_at_and_extended(self):
        run = self.train("--max-steps", 20, "--eval-every", 10)[0]
        before = snapshot(run)
        for argv in ([], ["--max-steps", 5]):
            status, out, err = run_main(gpt.main, "train", "--resume", run, *argv)
            self.assertEqual((status, err, snapshot(run)), (0, "", before))
            self.assertRegex(out, "20 of them done.*\nbest: step 20, val ")
        status, out, _ = run_main(gpt.main, "train", "--resume", run, "--max-steps", 40)
        self.assertEqual(status, 0)
        self.assertIn("40 max steps instead of 20: the learning rate rises again", out)
        self.assertEqual([row["step"] for row in self.last_of(run)["rows"]], [0, 10, 20, 30, 40])

    def test_validating_on_some_tokens_only(self):
        seen = []
        real = gpt.evaluate
        with mock.patch.object(gpt, "evaluate", lambda model, tokens, *rest: seen.append(
                len(tokens)) or real(model, tokens, *rest)):
            self.train("--max-steps", 1, "--eval-tokens", 48)
        self.assertEqual(seen, [49, 49])

    def test_bad_values_are_answered_in_one_line(self):
        write_hub_folder("hub", small_gpt(vocab_size=257, block_size=24).float())
        write_hub_folder("few", small_gpt(vocab_size=5, block_size=24).float())
        own_files(folder="hub")
        for name, content in (("empty", b""), ("short", b"abcd" * 16),
                              ("latin", b"caf\xe9" * 99)):
            Path(name).write_bytes(content)
        for argv, saying in (
                (["--text", "nowhere"], "nowhere is not a file"),
                (["--text", "hub"], "hub is not a file"),
                (["--block-size", 4 * 10**9], "there is not enough memory"),
                (["--text", "empty"], "empty is empty"),
                (["--text", "short"], "short is too short"),
                (["--text", "latin"], "latin is not a UTF-8 text .*position 3"),
                (["--limit", 20], "text.txt is too short"),
                (["--n-embd", 100, "--n-head", 3], "n_embd 100 is not a multiple of n_head 3"),
                (["--size", "gpt-tiny"], "invalid choice: 'gpt-tiny'"),
                (["--batch-size", 10, "--grad-accum", 4], "not a multiple of --grad-accum"),
                (["--lr", -1], "--lr: -1 is not between 0 and"),
                (["--dropout", 2], "--dropout: 2 is not between 0 and 1"),
                (["--warmup", -1], "--warmup: -1 is not between 0 and"),
                (["--init", "nowhere"], "nowhere"),
                (["--init", "hub", "--n-layer", 2], "leave out --n-layer"),
                (["--init", "hub", "--block-size", 25], "blocks of at most 24 tokens, not of 25"),
                (["--init", "hub", "--tokenizer", "char"], "char does not fit --init hub"),
                (["--init", "few"], "few.*vocab.json"),
                (["--init", "few", "--tokenizer", "char"], "9 tokens and few 5: they do not"),
                (["--resume", "nowhere"], "last.pt is missing")):
            with self.subTest(" ".join(map(str, argv))):
                text = [] if argv[0] in ("--text", "--resume") else ["--text", "text.txt"]
                self.assert_refused("train", *argv, *text, "--device", "cpu", saying=saying)
        first = self.train("--max-steps", 1)[0]
        Path("new.txt").write_text(self.text.replace("a", "z"), encoding="utf-8")
        self.assert_refused("train", "--init", first, "--text", "new.txt", saying="'z'")
        Path("text.txt").write_text(self.text[:-1], encoding="utf-8")
        self.assert_refused("train", "--resume", first, saying="text.txt is not the text that")
        self.assert_refused("train", "--resume", first, "--n-layer", 3, saying="--n-layer 3 does")
        Path("moved.txt").write_text(self.text, encoding="utf-8", newline="")
        status, _, err = run_main(gpt.main, "train", "--resume", first, "--text", "moved.txt")
        self.assertEqual(status, 0, err)

    def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(self):
        for steps, saying in ((60, "the loss is not finite at step 50"),
                              (20, "the loss is not finite at step 20")):
            status, _, err = run_main(gpt.main, "train", *self.SMALL, "--max-steps", steps,
                                      "--optimizer", "adamw", "--lr", 4e9, "--out-dir",
                                      f"run{steps}")
            self.assertEqual(status, 2)
            self.assertRegex(err.splitlines()[-1], saying)
            self.assertEqual(len(self.last_of(f"run{steps}")["rows"]), 1)

    @needs_references
    def test_fine_tuning_the_reference_model(self):
        status, out, err = run_main(
            gpt.main, "train", "--init", Path(REFERENCE_DIR, "gpt2_tiny"), "--tokenizer", "char",
            "--text", "text.txt", "--device", "cpu", "--max-steps", 20, "--lr", 1e-3)
        self.assertEqual(status, 0, err)
        losses = [float(loss) for loss in re.findall(r"\| val ([\d.]+)", out)]
        model = gpt.GPT.from_pretrained(Path(REFERENCE_DIR, "gpt2_tiny"))
        tokenizer = gpt.CharTokenizer("\n abcdefg")
        model.crop(min(model.config.block_size, 256))
        val = np.array(tokenizer.encode(self.text[4500:]), np.uint16)
        own, _ = evaluate(model, val, tokenizer)
        self.assertAlmostEqual(losses[0], own, places=3)
        self.assertLess(losses[-1], losses[0] - 1)


def paste(path, names):
    """The definitions `names`, and those of the file that they use, run by themselves with
    nothing of the file but its imports of torch and the standard library. -> their namespace"""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions, imports = {}, []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            definitions[node.targets[0].id] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            if module.split(".")[0] in {"torch", *sys.stdlib_module_names}:
                imports.append(node)
    wanted, todo = [], list(names)
    while todo:
        if (name := todo.pop()) in definitions and definitions[name] not in wanted:
            wanted.append(definitions[name])
            todo += [n.id for n in ast.walk(definitions[name]) if isinstance(n, ast.Name)]
    body = imports + [node for node in tree.body if node in wanted]
    namespace = {}
    exec(compile(ast.Module(body, []), str(path), "exec"), namespace)
    return namespace


class CommonParts(TemporaryFolder):
    def test_shifting_right_is_the_4_bit_formula(self):
        x = torch.arange(256)
        formula = (x.double() / 255 * 16).floor().clamp(max=15)
        self.assertTrue(torch.equal(x.to(torch.uint8) >> 4, formula.to(torch.uint8)))

    def test_seeds_do_not_collide(self):
        pairs = [*itertools.product(range(100), range(100))]
        # torch's generator on the CPU takes the lowest 32 bits of a seed.
        self.assertEqual(len({hash(pair) % 2**32 for pair in pairs}), len(pairs))

    def test_glyphs_are_the_same_every_time_and_of_all_digits(self):
        images, labels = GLYPHS
        self.assertEqual((images.shape, images.dtype), ((70_000, 1, 28, 28), torch.uint8))
        again = DRAW_GLYPHS()
        self.assertTrue(torch.equal(images, again[0]) and torch.equal(labels, again[1]))
        self.assertGreater(torch.bincount(labels).min().item(), 6000)
        self.assertGreater(images.float().mean().item(), 15)  # ink, and not too much of it
        self.assertLess(images.float().mean().item(), 90)

    def test_the_split_is_fixed_and_limit_takes_the_first(self):
        whole = common.load_mnist("glyphs", "none", None, "cpu")
        self.assertEqual([len(t) for t in (whole.train, whole.val, whole.test)],
                         [54_000, 6_000, 10_000])
        few = common.load_mnist("glyphs", "none", 100, "cpu")
        self.assertTrue(torch.equal(few.train, whole.train[:100]))
        self.assertTrue(torch.equal(few.val, whole.val[:10]))
        self.assertTrue(torch.equal(few.test_labels, whole.test_labels[:10]))
        self.assertEqual(len(common.load_mnist("glyphs", "none", 1, "cpu").val), 1)

    def new_folder(self, path):
        return common.new_run_folder(path, argparse.Namespace(seed=1))

    def test_a_full_folder_is_never_written_into(self):
        Path("runs/a").mkdir(parents=True)
        self.assertEqual(self.new_folder("runs/a"), Path("runs/a"))  # it was empty
        self.assertEqual(json.loads(Path("runs/a/args.json").read_text()), {"seed": 1})
        Path("runs/a-2").touch()
        self.assertEqual(self.new_folder("runs/a/"), Path("runs/a-3"))
        os.chdir("runs/a")
        self.assertEqual(self.new_folder("."), Path.cwd().with_name("a-4"))

    def test_runs_that_start_at_once_get_folders_of_their_own(self):
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            folders = [*pool.map(self.new_folder, ["a"] * 20)]
        self.assertEqual(len(set(folders)), 20)

    def checkpoint(self):
        return {"model": {"w": torch.arange(1000.)}, "args": {"script": "vae.py"}}

    def test_a_checkpoint_comes_back_as_it_was(self):
        common.save_checkpoint(Path("a.pt"), self.checkpoint())
        state = common.load_checkpoint(Path("a.pt"), "vae.py")
        self.assertTrue(torch.equal(state["model"]["w"], torch.arange(1000.)))
        self.assertEqual(os.listdir(), ["a.pt"])

    def test_every_damaged_byte_of_the_weights_is_noticed(self):
        common.save_checkpoint(Path("a.pt"), self.checkpoint())
        content = Path("a.pt").read_bytes()
        start = content.index(torch.arange(1000.).numpy().tobytes())
        for position in range(start, start + 4000, 97):
            damaged = bytearray(content)
            damaged[position] ^= 1
            Path("b.pt").write_bytes(damaged)
            with self.assertRaisesRegex(common.UserError, "b.pt is missing or damaged"):
                common.load_checkpoint(Path("b.pt"), "vae.py")

    def test_what_is_no_checkpoint_is_named(self):
        for content in (b"", b"some text", b"PK\x03\x04" + b"\0" * 100):
            Path("a.pt").write_bytes(content)
            with self.assertRaisesRegex(common.UserError, "a.pt is missing or damaged"):
                common.load_checkpoint(Path("a.pt"), "vae.py")
        for foreign in ({"weights": 1}, [1], Path("a_path_needs_pickle")):
            torch.save(foreign, "a.pt")
            with self.assertRaisesRegex(common.UserError, "a.pt is missing or damaged"):
                common.load_checkpoint(Path("a.pt"), "vae.py")
        common.save_checkpoint(Path("a.pt"), self.checkpoint())
        with self.assertRaisesRegex(common.UserError, "written by vae.py, not by gpt.py"):
            common.load_checkpoint(Path("a.pt"), "gpt.py")

    def test_a_model_that_is_not_finite_is_not_saved(self):
        common.save_checkpoint(Path("a.pt"), self.checkpoint())
        before = snapshot(".")
        with self.assertRaisesRegex(common.UserError, "no longer finite"):
            broken = {"model": {"w": torch.tensor([1, math.nan])}, "step": 7}
            common.save_checkpoint(Path("a.pt"), broken)
        self.assertEqual(snapshot("."), before)

    @unittest.skipIf(os.name == "nt", "needs a limit on the size of files")
    def test_a_full_disk_leaves_the_previous_checkpoint_whole(self):
        import resource

        common.save_checkpoint(Path("a.pt"), self.checkpoint())
        before = snapshot(".")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        try:
            with self.assertRaisesRegex(common.UserError, r"a.pt cannot be written \(File too"):
                common.save_checkpoint(Path("a.pt"), self.checkpoint())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertEqual(snapshot("."), before)

    def test_tiles_are_laid_row_by_row(self):
        images = torch.arange(6.).view(6, 1, 1, 1).expand(6, 1, 2, 2)
        grid = common.tile(images, columns=3)
        self.assertEqual(grid.shape, (5, 8))
        self.assertEqual(grid[::3, ::3].tolist(), [[0, 1, 2], [3, 4, 5]])

    def test_no_cuda_no_float16_on_the_cpu(self):
        device, dtype = common.pick_device("cpu", amp=True)
        self.assertEqual((device.type, dtype), ("cpu", torch.float32))

    def test_what_cannot_be_compiled_runs_as_it_is_after_one_warning(self):
        with contextlib.redirect_stderr(io.StringIO()) as err, \
                mock.patch.object(torch, "compile", side_effect=RuntimeError("no compiler\nhere")):
            self.assertFalse(common.can_compile("cpu"))
        self.assertEqual(err.getvalue(), "warning: --compile does not work here (no compiler); "
                         "going on without it\n")


def serve(test, respond):
    """A server on localhost that answers with respond(handler, name of the file). -> its address"""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            respond(self, self.path.rsplit("/", 1)[-1])

        def log_message(self, *message):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    test.addCleanup(server.server_close)
    test.addCleanup(server.shutdown)
    return f"http://127.0.0.1:{server.server_port}"


class Datasets(TemporaryFolder):
    """Finding, checking and downloading: against the real files, and a server on localhost."""

    def raw_files(self, corrupt=None, change=lambda content: content):
        """data/MNIST/raw with links to the real files, the one named `corrupt` changed."""
        raw = self.folder / "data/MNIST/raw"
        raw.mkdir(parents=True)
        for name in common.RAW_FILES:
            source = Path(DATA_DIR, "MNIST/raw", name).resolve()
            if name == corrupt:
                (raw / name).write_bytes(change(source.read_bytes()))
            else:
                (raw / name).symlink_to(source)

    @needs_mnist
    def test_mnist_is_read_whole(self):
        data = common.load_mnist("auto", DATA_DIR, None, "cpu")
        self.assertEqual((data.name, data.train.shape), ("mnist", (54_000, 1, 28, 28)))
        self.assertEqual(data.test_labels[:5].tolist(), [7, 2, 1, 0, 4])
        pixels = torch.cat([data.train, data.val])
        self.assertAlmostEqual(pixels.float().mean().item(), 33.318, places=2)

    @needs_mnist
    def test_damaged_files_are_an_error_and_never_a_reason_to_fall_back(self):
        changes = {"truncated": lambda c: c[:-1000], "empty": lambda c: b"",
                   "zeroed": lambda c: c[:50_000] + bytes(10_000) + c[60_000:]}
        for name, change in changes.items():
            with self.subTest(name):
                self.raw_files("t10k-images-idx3-ubyte", change)
                status, out, err = run_main(vae.main, "--epochs", 1)
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(err.splitlines()[-1],
                                 r"^vae.py: error: a file in data/MNIST/raw is damaged: delete")
                self.assertEqual(os.listdir(), ["data"])
                shutil.rmtree("data")

    def test_other_datasets_are_checked_by_size_and_header(self):
        raw = Path("data/FashionMNIST/raw")
        raw.mkdir(parents=True)
        for name in common.RAW_FILES:
            (raw / name).write_bytes(b"\0\0\x08\x03" + bytes(1000))
        with self.assertRaisesRegex(common.UserError, "FashionMNIST/raw is damaged"):
            common.load_mnist("fashion", "data", None, "cpu")

    def serve(self, respond):
        """A server on localhost in the place of MNIST's."""
        import torchvision

        mirrors = [serve(self, respond) + "/"]
        mirror = mock.patch.object(torchvision.datasets.MNIST, "mirrors", mirrors)
        mirror.start()
        self.addCleanup(mirror.stop)

    @needs_mnist
    def test_a_download_is_whole_and_happens_once(self):
        import torchvision

        packed = {f"{name}.gz": gzip.compress(Path(DATA_DIR, "MNIST/raw", name).read_bytes(), 1)
                  for name in common.RAW_FILES}
        asked = []

        def respond(handler, name):
            asked.append(name)
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(packed[name])))
            handler.end_headers()
            handler.wfile.write(packed[name])

        self.serve(respond)
        resources = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
        with mock.patch.object(torchvision.datasets.MNIST, "resources", resources):
            with contextlib.redirect_stderr(io.StringIO()):
                first = common.load_mnist("auto", "new/data", None, "cpu")
        requests = len(asked)
        again = common.load_mnist("auto", "new/data", None, "cpu")
        self.assertEqual(len(asked), requests)
        self.assertEqual(set(asked), set(packed))
        self.assertTrue(torch.equal(first.train, again.train))
        self.assertEqual(os.listdir("new/data"), ["MNIST"])

    @needs_mnist
    def test_packed_files_that_are_there_are_unpacked_without_a_network(self):
        import torchvision

        raw, resources = Path("data/MNIST/raw"), []
        raw.mkdir(parents=True)
        for name in common.RAW_FILES:
            packed = gzip.compress(Path(DATA_DIR, "MNIST/raw", name).read_bytes(), 1)
            (raw / f"{name}.gz").write_bytes(packed)
            resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
        self.serve(lambda handler, name: handler.send_error(404))
        with mock.patch.object(torchvision.datasets.MNIST, "resources", resources):
            self.assertEqual(common.load_mnist("mnist", "data", None, "cpu").name, "mnist")

    def test_a_download_that_breaks_off_leaves_nothing_and_is_named(self):
        def respond(handler, name):
            handler.send_response(200)
            handler.send_header("Content-Length", "1000000")
            handler.end_headers()
            handler.wfile.write(bytes(1000))

        self.serve(respond)
        status, _, err = run_main(vae.main, "--dataset", "mnist")
        self.assertEqual(status, 2)
        self.assertIn("could not be downloaded", err.splitlines()[-1])
        self.assertIn("run once online, or pass --dataset glyphs", err.splitlines()[-1])
        self.assertEqual(os.listdir(), [])

    def test_a_server_that_never_answers_is_given_up(self):
        gone = threading.Event()
        self.addCleanup(gone.set)
        self.serve(lambda handler, name: gone.wait(60))
        with mock.patch.object(common, "TIMEOUT", 0.5):
            with self.assertRaisesRegex(common.UserError, "could not be downloaded"):
                common.load_mnist("mnist", "data", None, "cpu")

    def test_without_network_and_data_the_glyphs_stand_in_and_say_so(self):
        import torchvision

        with mock.patch.object(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"]):
            status, out, err = run_main(vae.main, "--z-dim", 2, "--epochs", 1, "--limit", 100)
        self.assertEqual(status, 0, err)
        warning, = (line for line in err.splitlines() if line.startswith("warning"))
        self.assertIn("train-images-idx3-ubyte", warning)  # what was looked for
        self.assertIn("using the built-in glyphs", warning)
        resumed = run_main(vae.main, "--resume", "runs/vae-z2-glyphs")
        for output in (out, resumed[1]):
            self.assertTrue(output.startswith("VAE on glyphs"))
            self.assertEqual(output.splitlines()[-1], "VAE on glyphs, z 2 -> runs/vae-z2-glyphs")


@contextlib.contextmanager
def computing_in(dtype):
    """Within the `with` block the scripts compute on the CPU as they do on a GPU with `dtype`."""
    device = torch.device("cpu"), dtype
    with mock.patch.object(common, "pick_device", lambda name, amp: device):
        yield


class CommandLine:
    """What the scripts that train on images have in common; `module` is one of them."""

    def test_bad_values_are_answered_in_one_line(self):
        Path("a_file").touch()
        rate = self.rates[0]
        for argv, saying in (
                *self.bad_values,
                (["--z-dim", "0"], "--z-dim: 0 is not between 1 and"),
                (["--z-dim", "two"], "--z-dim: invalid int value: 'two'"),
                (["--epochs", "0"], "--epochs: 0 is not between 1 and"),
                ([rate, "-1"], f"{rate}: -1 is not between 0 and"),
                ([rate, "nan"], f"{rate}: nan is not between 0 and"),
                ([rate, "inf"], f"{rate}: inf is not between 0 and"),
                (["--batch-size", "0"], "--batch-size: 0 is not between 1 and"),
                (["--seed", "-1"], "--seed: -1 is not between 0 and"),
                (["--seed", 10**30], f"--seed: {10**30} is not between 0 and"),
                (["--limit", "0"], "--limit: 0 is not between 1 and"),
                (["--z", "2"], "unrecognized arguments: --z 2"),  # no abbreviations
                (["--dataset", "imagenet"], "invalid choice: 'imagenet'"),
                (["--data-dir", "a_file"], "a_file is not a folder"),
                ([*SHORT, "--out-dir", "a_file/run"], "a_file/run cannot be made")):
            with self.subTest(" ".join(map(str, argv))):
                self.assert_refused(*argv, saying=saying)

    @unittest.skipIf(torch.cuda.is_available(), "this machine has a GPU")
    def test_a_device_that_is_not_there(self):
        self.assert_refused("--device", "cuda", saying="--device cuda: this machine")

    def train(self, *argv):
        """Run an epoch without drawing anything. -> its folder"""
        with without_pictures(self.module):
            status, out, err = run_main(self.module.main, *SHORT, "--epochs", 1, *argv)
        self.assertEqual(status, 0, err)
        return out.splitlines()[-1].split(" -> ")[1]

    def last_of(self, run):
        return common.load_checkpoint(Path(run, "last.pt"),
                                      f"{self.module.__name__}.py, edition 2")

    def test_what_cannot_be_resumed(self):
        Path("empty").mkdir()
        self.assert_refused("--resume", "empty", saying="empty/last.pt is missing or damaged")
        self.assert_refused("--resume", "nowhere", saying="nowhere/last.pt is missing")
        Path("empty/last.pt").write_bytes(b"half a check")
        self.assert_refused("--resume", "empty", saying="empty/last.pt is missing or damaged")
        self.assert_refused("--resume", "empty/last.pt", saying="last.pt/last.pt is missing")
        common.save_checkpoint(Path("empty/last.pt"), {"model": {}, "args": {"script": "gpt.py"}})
        self.assert_refused("--resume", "empty", saying="was written by gpt.py, not by")
        self.train("--out-dir", "a")
        for flag, value in (("--z-dim", 3), ("--seed", 1), ("--batch-size", 10), ("--limit", 100),
                            ("--dataset", "kmnist"), ("--out-dir", "b"), *self.fixed.items()):
            self.assert_refused("--resume", "a", "--epochs", 2, flag, value, saying=flag)

    def test_a_finished_run_is_looked_at_and_extended(self):
        run = self.train("--out-dir", "a", "--epochs", 2)
        before, before_rows = snapshot(run), Path(run, "metrics.jsonl").read_text()
        with without_pictures(self.module):
            for argv in ([], ["--epochs", 1]):
                status, out, err = run_main(self.module.main, "--resume", run, *argv)
                self.assertEqual((status, err, snapshot(run)), (0, "", before))
                self.assertRegex(out, r"2 of them done.*\n(the best.*\n)?test: ")
            status, out, _ = run_main(self.module.main, "--resume", run, "--epochs", 4)
        self.assertEqual(status, 0)
        self.assertIn("4 epochs instead of 2: the learning rate rises again", out)
        self.assertEqual(json.loads(Path(run, "args.json").read_text())["epochs"], 4)
        self.assertEqual(len(Path(run, "metrics.jsonl").read_text().splitlines()), 4)
        longer = self.last_of(run)
        self.assertEqual((len(longer["rows"]), longer["args"]["epochs"]), (4, 4))
        shorter = [json.loads(line) for line in before_rows.splitlines()]
        self.assertEqual(longer["rows"][:2], shorter)

    def test_a_run_that_goes_on_is_only_looked_at_where_epochs_says_so(self):
        with without_pictures(self.module), mock.patch.object(
                common, "write_json", side_effect=[None, KeyboardInterrupt]):
            status, _, err = run_main(self.module.main, *SHORT, "--epochs", 3, "--out-dir", "a")
        self.assertEqual((status, len(self.last_of("a")["rows"])), (130, 2))
        self.assertRegex(err.splitlines()[-1], "stopped; --resume with the run's folder")
        before = snapshot("a")
        with without_pictures(self.module):
            run_main(self.module.main, "--resume", "a", "--epochs", 2)
            self.assertEqual(snapshot("a"), before)
            run_main(self.module.main, "--resume", "a", self.rates[0], 1e-3)
        self.assertEqual(len(self.last_of("a")["rows"]), 3)
        self.assertTrue(Path("a/test.json").exists())

    def short_run(self, *argv):
        """-> the folder, its files, metrics and test figures of a run of 2 epochs, which --resume
        has been shown to leave as they are"""
        status, out, err = run_main(self.module.main, *SHORT, "--epochs", 2, *argv)
        self.assertEqual((status, err), (0, ""))
        lines = out.splitlines()
        run = Path(lines[-1].split(" -> ")[1])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual([(row["epoch"], row["step"]) for row in rows], [(1, 4), (2, 8)])
        test = json.loads((run / "test.json").read_text())
        self.assertEqual(test["epoch"], 2)
        before = snapshot(run)
        status, out, err = run_main(self.module.main, "--resume", run)
        self.assertEqual((status, err), (0, ""))
        end = [line.startswith("test") for line in lines].index(True)
        self.assertEqual(out.splitlines()[-len(lines[end:]):], lines[end:])
        self.assertEqual(snapshot(run), before)
        return run, sorted(os.listdir(run)), rows, test

    def test_a_second_run_gets_a_folder_of_its_own_and_the_same_weights(self):
        for name in ("a", "a-2"):
            self.assertEqual(self.train("--out-dir", "a"), name)
        first, second = (self.last_of(run) for run in ("a", "a-2"))
        self.assertEqual(differences(first["model"], second["model"]), [])

    def test_the_learning_rates_follow_the_schedule(self):
        rates = []

        highest = [0.01, 0.02][:len(self.rates)]
        flags = [word for flag in zip(self.rates, highest, strict=True) for word in flag]
        hook = register_optimizer_step_pre_hook(
            lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        self.addCleanup(hook.remove)
        self.train("--batch-size", 10, *flags)
        self.assertEqual(len(rates), 20 * len(highest))
        for i, peak in enumerate(highest):
            own = rates[i::len(highest)]
            self.assertAlmostEqual(own[0], peak / 4)
            self.assertEqual(own.index(max(own)), 2)
            self.assertEqual(own[2:], sorted(own[2:], reverse=True))
            self.assertAlmostEqual(own[-1], peak * 0.5 / 18)

    def test_images_per_step_that_do_not_divide_the_epoch(self):
        self.assertEqual(self.last_of(self.train("--batch-size", 130))["rows"][-1]["step"], 2)

    def test_16_bits_learn_as_32_do_and_the_scaler_is_resumed(self):
        """A run of 100 steps, whose second half is its second epoch."""
        # A CPU computes convolutions in float16 very slowly: few images, and a small model.
        argv = [*SHORT, "--limit", 400, "--batch-size", 8, *self.small]
        smaller = functools.partial(aae.AdversarialAE, num_filters=4)
        patch = mock.patch.object(aae, "AdversarialAE", smaller)
        patch.start()
        self.addCleanup(patch.stop)
        losses = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with computing_in(dtype), without_pictures(self.module):
                self.assertEqual(run_main(self.module.main, *argv, "--epochs", 2, "--out-dir",
                                          str(dtype))[0], 0)
            last = self.last_of(str(dtype))
            losses[dtype] = last["rows"][1][self.loss]
            self.assertTrue(all(t.dtype == torch.float32 for t in last["model"].values()))
            scaler = last["scaler"]
            self.assertEqual(bool(scaler), dtype == torch.float16)
        for dtype in (torch.bfloat16, torch.float16):
            self.assertLess(abs(losses[dtype] / losses[torch.float32] - 1), 0.03, dtype)
        # The scale halves with each step that overflows and is skipped.
        self.assertGreaterEqual(scaler["scale"], 2**4)
        skipped = math.log2(self.first_scale / scaler["scale"])
        self.assertEqual(last[self.optimizers[0]]["state"][0]["step"].item(), 100 - skipped)
        self.assertLess(skipped, 3)
        with computing_in(torch.float16), without_pictures(self.module):
            with mock.patch.object(common, "write_json", side_effect=KeyboardInterrupt):
                run_main(self.module.main, *argv, "--epochs", 2, "--out-dir", "b")
            self.assertEqual(len(self.last_of("b")["rows"]), 1)
            self.assertEqual(run_main(self.module.main, "--resume", "b")[0], 0)
        resumed = self.last_of("b")
        self.assertEqual(resumed["scaler"], scaler)
        self.assertEqual(differences(resumed["model"], last["model"]), [])

    def test_without_streams_and_in_another_thread(self):
        ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        ended = []
        with mock.patch.multiple(sys, stdout=ascii_only, stderr=None), \
                without_pictures(self.module):
            thread = threading.Thread(target=lambda: ended.append(self.module.main(
                [*map(str, SHORT), "--epochs", "1", "--out-dir", "\u00e9t\u00e9"])))
            thread.start()
            thread.join()
        self.assertEqual(ended, [None])
        ascii_only.flush()
        self.assertIn(b" -> ?t?", ascii_only.buffer.getvalue())

    def test_the_compiled_graphs_have_no_break(self):
        for function, arguments in self.compiled():
            explanation = torch._dynamo.explain(function)(*arguments)
            self.assertEqual(explanation.graph_break_count, 0, explanation.break_reasons)
            torch._dynamo.reset()


class VAECommandLine(CommandLine, TemporaryFolder):
    module, rates, optimizers, loss = vae, ["--lr"], ["optimizer"], "train_bpd"
    first_scale = 2**6
    bad_values, small, fixed = [], ["--num-filters", 4], {"--num-filters": 4}

    def compiled(self):
        return [(vae.VAE(), [vae.to_4_bits(GLYPHS[0][:4])])]

    def test_a_short_run_leaves_what_the_readme_says_and_looks_the_same_again(self):
        for z_dim, picture in ((2, "manifold.png latents.png"), (3, "kl.png")):
            run, files, rows, test = self.short_run("--z-dim", z_dim)
            self.assertEqual(run, Path(f"runs/vae-z{z_dim}-glyphs"))
            self.assertEqual(files, sorted((
                "args.json metrics.jsonl last.pt best.pt test.json bpd.png reconstructions.png "
                "samples_epoch_000.png samples_epoch_001.png samples_epoch_002.png " + picture
            ).split()))
            self.assertEqual(set(rows[0]), set(
                "epoch step seconds images_per_s train_bpd val_bpd train_rec train_kl val_rec "
                "val_kl".split()))
            self.assertLess(rows[-1]["val_bpd"], 3.5)
            best = common.load_checkpoint(run / "best.pt", "vae.py, edition 2")
            self.assertEqual(best["epoch"], 2)
            # Without it --resume says so at once.
            (run / "best.pt").unlink()
            self.assert_refused("--resume", run, "--epochs", 3, saying="best.pt is missing")

    def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(self):
        for folder, batch_size, saying in (("a", 64, "the weights are no longer finite"),
                                           ("b", 4, "the loss is not finite at step 50")):
            with without_pictures(vae):
                status, _, err = run_main(vae.main, *SHORT, "--batch-size", batch_size, "--lr", 4e9,
                                          "--epochs", 1, "--out-dir", folder)
            self.assertEqual(status, 2)
            self.assertRegex(err.splitlines()[-1], f"^vae.py: error: {saying}")
            self.assertEqual(os.listdir(folder), ["args.json"])

    def test_the_best_model_by_validation_is_tested(self):
        losses = iter([[9, 9], [3, 3], [1, 1], [2, 2], [5, 5], [6, 6]])  # untrained, 3 epochs, test
        with mock.patch.object(vae, "evaluate", lambda *_: next(losses)), without_pictures(vae):
            _, out, err = run_main(vae.main, *SHORT, "--epochs", 3, "--out-dir", "a")
        self.assertIn("the best model by validation is that of epoch 2 of 3", out, err)
        self.assertEqual(common.load_checkpoint(Path("a/best.pt"), "vae.py, edition 2")["epoch"], 2)


class AAECommandLine(CommandLine, TemporaryFolder):
    module, rates, loss, first_scale = aae, ["--ae-lr", "--d-lr"], "train_mse", 2**16
    optimizers, small = ["ae_optimizer", "d_optimizer"], []
    fixed = {"--lam": 0.5, "--posterior": "universal"}
    bad_values = [(["--lam", "1.01"], "--lam: 1.01 is not between 0 and 1"),
                  (["--lam", "-0.1"], "--lam: -0.1 is not between 0 and 1"),
                  (["--lam", "nan"], "--lam: nan is not between 0 and 1"),
                  (["--d-lr", "inf"], "--d-lr: inf is not between 0 and"),
                  (["--posterior", "normal"], "invalid choice: 'normal'")]

    def compiled(self):
        model, x = aae.AdversarialAE(posterior="gaussian"), aae.to_float(GLYPHS[0][:4])
        recon, z = (t.detach() for t in model(x))
        return [(model, [x]), (model.autoencoder_loss, [x, recon, z, 0.995]),
                (model.discriminator_loss, [z])]

    def test_a_short_run_leaves_what_the_readme_says_and_looks_the_same_again(self):
        for flags, name, picture in (
                (["--z-dim", 3, "--posterior", "universal"], "aae-z3-lam0.995-universal",
                 "adversary.png"),
                (["--lam", 1, "--z-dim", 2], "aae-z2-lam1", "manifold.png")):
            run, files, rows, test = self.short_run(*flags)
            self.assertEqual(run, Path(f"runs/{name}-glyphs"))
            self.assertEqual(files, sorted(
                "args.json metrics.jsonl last.pt test.json mse.png codes.png".split()
                + [f"{kind}_epoch_00{epoch}.png" for kind in ("samples", "reconstructions")
                   for epoch in (0, 1, 2)] + picture.split()))
            self.assertEqual(set(rows[0]), set(
                "epoch step seconds images_per_s train_mse val_mse code_mean_min code_mean_max "
                "code_std_min code_std_max".split()
                + ["gen_loss", "disc_loss", "disc_accuracy"] * ("--lam" not in flags)))
            self.assertEqual(len(self.last_of(run)["rows"]), 2)

    def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(self):
        for folder, flags, saying in (
                ("a", ["--ae-lr", 4e9], "the weights are no longer finite"),
                ("b", ["--ae-lr", 4e9, "--batch-size", 4], "a loss is not finite at step 50"),
                ("c", ["--batch-size", 4], "a loss is not finite at step 50")):
            loss = aae.AdversarialAE.discriminator_loss
            if folder == "c":  # the discriminator's, with all else as it should be
                def loss(*_):
                    return torch.tensor(math.nan, requires_grad=True), torch.tensor(0.5)
            with without_pictures(aae), mock.patch.object(
                    aae.AdversarialAE, "discriminator_loss", loss):
                status, _, err = run_main(
                    aae.main, *SHORT, *flags, "--epochs", 1, "--out-dir", folder)
            self.assertEqual(status, 2, folder)
            self.assertRegex(err.splitlines()[-1], f"^aae.py: error: {saying}")
            self.assertEqual(os.listdir(folder), ["args.json"])

    def moved(self, *argv):
        """-> the parts of the model that a run of one epoch moved"""
        last = self.last_of(self.train(*argv))["model"]
        torch.manual_seed(42)
        start = aae.AdversarialAE().state_dict()
        return {name.split(".")[0] for name in start
                if (start[name] - last[name]).abs().max() > 1e-20}

    def test_codes_come_to_the_prior_where_they_are_asked_to_and_only_there(self):
        tests = {}
        for lam in (0.995, 1):
            run = self.train("--limit", 2500, "--batch-size", 32, "--epochs", 3, "--d-lr", 1e-3,
                             "--lam", lam)
            tests[lam] = json.loads(Path(run, "test.json").read_text())
            self.assertLess(tests[lam]["test_mse"], 0.15)  # 0.22: the mean of all images
        self.assertLess(tests[0.995]["sliced_wasserstein"], 0.4)
        self.assertGreater(tests[1]["sliced_wasserstein"], 1)

    def test_each_phase_moves_its_own_networks_alone(self):
        self.assertEqual(self.moved(), {"encoder", "decoder", "discriminator"})
        self.assertEqual(self.moved("--d-lr", 0), {"encoder", "decoder"})
        self.assertEqual(self.moved("--ae-lr", 0), {"discriminator"})

    def test_the_plain_autoencoder_has_no_use_for_a_discriminator(self):
        with mock.patch.object(aae.Discriminator, "forward", side_effect=AssertionError):
            self.assertEqual(self.moved("--lam", 1), {"encoder", "decoder"})

    def test_a_run_without_reconstruction(self):
        self.assertIn("encoder", self.moved("--lam", 0))


def differences(a, b):
    """The names of the tensors of two state dicts that are not the same bit for bit."""
    return [name for name in a | b if not torch.equal(a[name], b[name])]


class Process:
    """`code`, run with `argv` in a process of its own, in this folder. It is forked from one that
    has imported torch and the scripts already, which takes longer than most of these runs."""

    IMPORTED = """
import json, os, sys, torch, torch._dynamo, aae, common, gpt, vae
for line in sys.stdin:
    task, *details = json.loads(line)
    if task == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(details[0], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        code, sys.argv[1:], environment, folder, out, err = details
        os.chdir(folder)
        os.environ.update(environment)
        os.dup2(os.open(out, os.O_WRONLY), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        exec(code)
        sys.exit()
"""
    parent, numbers = None, itertools.count()

    def __init__(self, code, *argv, **environment):
        if Process.parent is None:
            Process.parent = subprocess.Popen(
                [sys.executable, "-c", self.IMPORTED], text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(HERE)})
        number = next(self.numbers)
        out, self.err = f"{number}.stdout", Path(f"{number}.stderr")
        os.mkfifo(out)
        self.pid = self.ask("start", code, [str(word) for word in argv], environment, os.getcwd(),
                            out, str(self.err))
        self.stdout = open(out, encoding="utf-8")  # once the process has opened it, too

    def ask(self, *task):
        self.parent.stdin.write(json.dumps(task) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def read_until(self, pattern):
        for line in self.stdout:
            if re.match(pattern, line):
                return
        raise AssertionError(f"it ended before {pattern!r}: {self.err.read_text()}")

    def end(self, signum=None):
        """Wait for its end, after sending it a signal. -> exit status, stdout, stderr"""
        if signum is not None:
            os.kill(self.pid, signum)
        out = "" if self.stdout.closed else self.stdout.read()
        self.stdout.close()
        return self.ask("wait", self.pid), out, self.err.read_text()


@unittest.skipUnless(hasattr(os, "fork"), "starts processes as POSIX systems do")
class Resuming:
    """Real processes, really killed: each takes its own life at the KILL_AT-th of its backward
    passes and writes, an instant that does not depend on how busy the machine is."""

    LAUNCH = """
import os, signal, torch, common, {0} as script
common.draw_glyphs = lambda: torch.load("glyphs.pt", weights_only=True)
for name in [name for name in vars(script) if name.startswith("draw_")]:
    setattr(script, name, lambda *_, **__: None)
left = int(os.environ["KILL_AT"])
def dangerous(function):
    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper
torch.Tensor.backward = dangerous(torch.Tensor.backward)
os.fsync, os.replace = dangerous(os.fsync), dangerous(os.replace)
script.main()
"""
    ARGV = ["--dataset", "glyphs", "--limit", 300, "--batch-size", 20, "--device", "cpu"]
    command, total, unit = [], "--epochs", 1

    def setUp(self):
        super().setUp()
        torch.save(GLYPHS, "glyphs.pt")
        write_text("text.txt")
        drawing = without_pictures(self.module)
        drawing.start()
        self.addCleanup(drawing.stop)

    def run_quietly(self, *argv):
        status, _, err = run_main(self.module.main, *self.command, *argv)
        self.assertEqual(status, 0, err)

    def epochs(self, number):
        return [self.total, number * self.unit]

    def assert_the_same_run(self, first, second):
        """Weights, moments, rows and test figures are the same bit for bit."""
        states = [torch.load(Path(run, "last.pt"), weights_only=True) for run in (first, second)]
        self.assertEqual(differences(states[0]["model"], states[1]["model"]), [])
        for name in self.optimizers:
            first_moments, second_moments = (state[name]["state"] for state in states)
            self.assertTrue(first_moments)
            for i in first_moments:
                self.assertEqual(differences(first_moments[i], second_moments[i]), [])
        figures = []
        for run in (first, second):
            rows = Path(run, "metrics.jsonl").read_text().splitlines()
            figures.append([json.loads(line) for line in rows]
                           + [json.loads(Path(run, "test.json").read_text())])
            for row in figures[-1]:
                row["seconds"] = row["images_per_s"] = row["tokens_per_s"] = None
        self.assertEqual(*figures)

    def test_killed_five_times_and_resumed_ends_bit_for_bit_the_same(self):
        for run in ("whole", "killed"):
            self.run_quietly(*self.ARGV, *self.epochs(2), "--out-dir", run)
        self.run_quietly("--resume", "whole", *self.epochs(5))
        argv = ["--resume", "killed", *self.epochs(5)]  # the rest is an extension
        # A start, a step, a step of the next epoch, a step, and among an epoch's last writes
        for instant in (3, 12, self.steps + 15, 9, self.steps + 9):
            process = Process(self.LAUNCH.format(self.module.__name__), *self.command, *argv,
                              KILL_AT=str(instant))
            status, _, err = process.end()
            self.assertEqual(status, -signal.SIGKILL, err)
            argv = ["--resume", "killed", *(self.epochs(5) if instant == 3 else [])]
        self.run_quietly(*argv)
        self.assert_the_same_run("whole", "killed")

    def test_stopped_by_ctrl_c_and_resumed_ends_the_same(self):
        self.run_quietly(*self.ARGV, *self.epochs(2), "--out-dir", "whole")
        calls, backward = itertools.count(1), torch.Tensor.backward

        def interrupted(*args, **kwargs):
            if next(calls) == self.steps * 4 // 3:  # in the second epoch
                os.kill(os.getpid(), signal.SIGINT)
            return backward(*args, **kwargs)

        with mock.patch.object(torch.Tensor, "backward", interrupted):
            status, _, err = run_main(self.module.main, *self.command, *self.ARGV, *self.epochs(2),
                                      "--out-dir", "b")
        self.assertEqual((status, err.splitlines()[-1]), (
            130, f"{self.module.__name__}.py: stopped; --resume with the run's folder goes on from "
            "the last checkpoint"))
        self.run_quietly("--resume", "b")
        self.assert_the_same_run("whole", "b")

    def test_killed_during_its_test_the_run_is_tested_when_resumed(self):
        self.run_quietly(*self.ARGV, "--epochs", 2, "--out-dir", "whole")
        with mock.patch.object(self.module, "test_figures", side_effect=KeyboardInterrupt):
            run_main(self.module.main, *self.ARGV, "--epochs", 2, "--out-dir", "b")
        Path("b/metrics.jsonl").unlink()  # as if killed a little earlier
        self.run_quietly("--resume", "b")
        self.assert_the_same_run("whole", "b")

    def test_a_reader_that_goes_away_ends_the_script_quietly(self):
        process = Process(self.LAUNCH.format(self.module.__name__), *self.command, *self.ARGV,
                          *self.epochs(3), KILL_AT="0")
        process.stdout.close()
        _, _, err = process.end()
        self.assertEqual(err, "")


class VAEResuming(Resuming, TemporaryFolder):
    module, optimizers, steps = vae, ["optimizer"], 15  # backward passes of an epoch
    ARGV = [*Resuming.ARGV, "--num-filters", 8]


class AAEResuming(Resuming, TemporaryFolder):
    module, optimizers, steps = aae, ["ae_optimizer", "d_optimizer"], 30


class GPTResuming(Resuming, TemporaryFolder):
    module, steps, command = gpt, 10, ["train"]
    total, unit = "--max-steps", 10
    ARGV = ["--text", "text.txt", "--dropout", 0.2, "--n-layer", 2, "--n-embd", 64,
            "--eval-every", 10, "--device", "cpu"]
    test_killed_during_its_test_the_run_is_tested_when_resumed = None  # it has none

    @property
    def optimizers(self):
        return []

    def assert_the_same_run(self, first, second):
        super().assert_the_same_run(first, second)
        states = [torch.load(Path(run, "last.pt"), weights_only=True)["optimizer"]
                  for run in (first, second)]
        for name, optimizer in states[0].items():
            for i, moments in optimizer["state"].items():
                self.assertEqual(differences(moments, states[1][name]["state"][i]), [])
        for name in ("model.safetensors", "config.json", "vocab.json"):
            self.assertEqual(Path(first, name).read_bytes(), Path(second, name).read_bytes())


@unittest.skipUnless(hasattr(os, "fork"), "starts processes as POSIX systems do")
class GPTProcesses(TemporaryFolder):
    """Two processes, as torchrun starts them, beside one."""

    ARGV = ["train", "--text", "text.txt", "--n-layer", 2, "--n-embd", 32, "--block-size", 16,
            "--batch-size", 8, "--max-steps", 50, "--eval-every", 10, "--device", "cpu"]
    LAUNCH = """
import os, sys, torch, gpt
torch.set_num_threads(1)
torch.set_default_dtype(getattr(torch, os.environ["DTYPE"]))
gpt.draw_sample = gpt.common.save_curves = lambda *_, **__: None
clip, seen = torch.nn.utils.clip_grad_norm_, []
def record(parameters, *limit):
    parameters = [*parameters]
    seen.append(torch.cat([p.grad.flatten() for p in parameters]))
    torch.save(seen, "gradients" + os.environ["RANK"])
    return clip(parameters, *limit)
torch.nn.utils.clip_grad_norm_ = record
gpt.main()
"""

    def setUp(self):
        super().setUp()
        write_text("text.txt")

    def start(self, size, *argv, dtype="float32"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [Process(self.LAUNCH, *argv, RANK=str(rank), LOCAL_RANK=str(rank), DTYPE=dtype,
                        WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                for rank in range(size)]

    def end(self, processes, signum=None):
        """-> the statuses, and what the first wrote"""
        if signum is not None:
            os.kill(processes[-1].pid, signum)
        ends = [process.end() for process in processes]
        self.assertEqual([out for _, out, _ in ends[1:]], [""] * len(ends[1:]))
        return [status for status, _, _ in ends], ends[0][1], "".join(err for *_, err in ends)

    def rows(self, run):
        rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        return np.array([[row["train_loss"], row["val_loss"]] for row in rows[1:]])

    def test_two_processes_have_the_gradients_of_one(self):
        one_step = [*self.ARGV, "--max-steps", 1, "--grad-accum", 2]
        gradients = []
        for size in (1, 2):
            statuses, _, err = self.end(self.start(size, *one_step, dtype="float64"))
            self.assertEqual((statuses, err), ([0] * size, ""))
            gradients += [torch.load(f"gradients{rank}", weights_only=True)[0]
                          for rank in range(size)]
        one, first, second = gradients
        self.assertEqual(one.dtype, torch.float64)
        self.assertTrue(first.equal(second))
        self.assertLess((first - one).norm(), 1e-10 * one.norm())

    def test_two_processes_have_the_losses_of_one_and_resume_as_one(self):
        self.assertEqual(self.end(self.start(1, *self.ARGV, "--out-dir", "one"))[0], [0])
        self.assertEqual(self.end(self.start(2, *self.ARGV, "--out-dir", "two"))[0], [0, 0])
        one, two = self.rows("one"), self.rows("two")
        self.assertEqual(one.shape, (5, 2))
        self.assertLess(np.abs(two - one).max(), 1e-4)
        self.assertLess(one[-1, 1], one[0, 1] - 0.1)
        processes = self.start(2, *self.ARGV, "--out-dir", "stopped")
        processes[0].read_until("step    10/50")
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        self.end(processes)
        self.assertEqual(self.end(self.start(1, "train", "--resume", "stopped"))[0], [0])
        self.assertLess(np.abs(self.rows("stopped") - one).max(), 1e-4)

    def test_the_backends_serve_tensors_on_both_devices(self):
        from torch.distributed.distributed_c10d import BackendConfig

        source = (HERE / "gpt.py").read_text(encoding="utf-8")
        name = re.search(r'init_process_group\("([^"]+)" if device.type == "cuda"', source)[1]
        backends = BackendConfig(torch.distributed.Backend(name)).get_device_backend_map()
        self.assertEqual((backends["cpu"], backends["cuda"]), ("gloo", "nccl"))

    def test_a_process_that_dies_takes_the_others_down(self):
        processes = self.start(2, *self.ARGV, "--max-steps", 5000)
        processes[0].read_until("step    10/5000")
        began = time.monotonic()
        statuses, _, _ = self.end(processes, signal.SIGKILL)
        self.assertEqual(statuses[1], -signal.SIGKILL)
        self.assertGreater(statuses[0], 0)
        self.assertLess(time.monotonic() - began, 30)

    def test_a_batch_that_processes_cannot_share(self):
        self.module = gpt
        with mock.patch.dict(os.environ, WORLD_SIZE="3"):
            self.assert_refused(*self.ARGV, saying="--batch-size 8 is not a multiple of .* 3, the")


class Readme(TemporaryFolder):
    TEXT = (HERE / "README.md").read_text(encoding="utf-8")

    def test_every_flag_in_the_readme_is_in_the_help(self):
        commands = re.findall(r"python (\w+)\.py([^\n`|&]*)", self.TEXT)
        self.assertGreater(len(commands), 3)
        scripts = {"vae": vae, "aae": aae, "gpt": gpt}
        for script, rest in commands:
            if script in scripts:
                command = [rest.split()[0]] if script == "gpt" else []
                _, help_text, _ = run_main(scripts[script].main, *command, "--help")
                for flag in re.findall(r"--[a-z-]+", rest):
                    self.assertIn(flag, help_text.split())

    def run_python(self, words):
        """Run README's lines of Python with `words` in them. -> their names"""
        code = next(c for c in re.findall(r"```python\n(.*?)```", self.TEXT, re.S) if words in c)
        namespace = {}
        exec(code, namespace)
        return namespace

    def test_the_lines_that_use_a_trained_model_run(self):
        for module, folder, lowest, highest in ((vae, "runs/vae-z20", 0, 15),
                                                (aae, "runs/aae-z8-lam0.995", -1, 1)):
            with without_pictures(module):
                run_main(module.main, *SHORT, "--epochs", 1, "--out-dir", folder)
            namespace = self.run_python(f"from {module.__name__} import")
            images = namespace["images"]
            self.assertEqual(images.shape, (16, 1, 28, 28))
            self.assertTrue(lowest <= images.min() and images.max() <= highest)

    def test_the_lines_that_estimate_likelihoods_draw_their_picture(self):
        estimate, asked = vae.log_likelihood, []

        def with_few_draws(model, x, num_samples, proposal):
            asked.append((model.z_dim, num_samples, proposal))
            return estimate(model, x[:2], 10, proposal)

        for z_dim in (2, 8, 20):
            with without_pictures(vae):
                run_main(vae.main, *SHORT, "--epochs", 1, "--z-dim", z_dim, "--out-dir",
                         f"runs/draws-z{z_dim}")
        offline = mock.patch.object(common, "read_images", side_effect=ConnectionError)
        few_draws = mock.patch.object(vae, "log_likelihood", with_few_draws)
        with offline, few_draws, contextlib.redirect_stderr(io.StringIO()):
            self.run_python("vae.log_likelihood")
        self.assertEqual(len(asked), 3 * 4 * 2)
        self.assertGreater(Path("likelihood.png").stat().st_size, 10_000)

    def test_the_lines_that_measure_the_noise_of_codes_run(self):
        for posterior in ("gaussian", "universal"):
            with without_pictures(aae):
                run_main(aae.main, *SHORT, "--epochs", 1, "--z-dim", 20, "--posterior", posterior,
                         "--out-dir", f"runs/aae-z20-lam0.995-{posterior}")
        offline = mock.patch.object(common, "read_images", side_effect=ConnectionError)
        with offline, contextlib.redirect_stderr(io.StringIO()), \
                contextlib.redirect_stdout(io.StringIO()) as out:
            self.run_python("aae.to_float")
        self.assertRegex(out.getvalue(), r"^gaussian 0\.\d+\nuniversal 0\.\d+\n$")

    def test_the_lines_that_write_a_text_run(self):
        serve_hub(self, small_gpt(vocab_size=257, block_size=99).float())
        with contextlib.redirect_stderr(io.StringIO()):
            namespace = self.run_python("from gpt import")
        self.assertTrue(namespace["text"].startswith("Yesterday I went to the"))
        self.assertEqual(namespace["tokens"].shape, (1, len("Yesterday I went to the") + 50))

    def test_the_pictures_are_there_and_small(self):
        pictures = re.findall(r"figures/[\w.-]+", self.TEXT)
        self.assertGreater(len(pictures), 1)
        for picture in pictures:
            self.assertLess((HERE / picture).stat().st_size, 300_000, picture)


# ---------------------------------------------------------------------------------------------
# The benchmark


def ordinary_vae():
    """-> a step that trains the networks of vae.py as most tutorials do it"""
    model = vae.VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x):
        rec, kl, _ = model((x * 16).clamp(max=15).long())
        optimizer.zero_grad()
        (rec + kl).backward()
        optimizer.step()

    return step


def ordinary_aae():
    """-> the same for the networks of aae.py"""
    model = aae.AdversarialAE()
    autoencoder = [*model.encoder.parameters(), *model.decoder.parameters()]
    ae_optimizer = torch.optim.Adam(autoencoder, lr=1e-3)
    d_optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=1e-3)

    def step(x):
        x = 2 * x - 1
        recon, z = model(x)
        ae_optimizer.zero_grad()
        model.autoencoder_loss(x, recon, z, lam=0.995)[0].backward()
        ae_optimizer.step()
        d_optimizer.zero_grad()
        model.discriminator_loss(z.detach())[0].backward()
        d_optimizer.step()

    return step


def ordinary_images_per_s(step, data_dir, num_images, batch_size):
    """The rate of step(x) over a DataLoader with a transform."""
    from torchvision import datasets, transforms

    data = datasets.MNIST(data_dir, train=True, transform=transforms.ToTensor())
    data = torch.utils.data.Subset(data, range(num_images))
    loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True, num_workers=0)
    start = time.perf_counter()
    for x, _ in loader:
        step(x)
    return num_images / (time.perf_counter() - start)


def script_images_per_s(script, data_dir, num_images):
    """The rate that a script itself reports for its first epoch."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, HERE / script, "--data-dir", data_dir, "--device", "cpu",
                        "--limit", str(num_images), "--epochs", "1", "--out-dir", f"{folder}/run"],
                       check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(folder, "run/metrics.jsonl").read_text())["images_per_s"]


def overhead_share(module, *argv):
    """The share of a training step that is spent outside the forward and backward passes of the
    networks and their losses, and the matrix products of Muon."""
    parts = [(torch.Tensor, "backward"), *{
        vae: [(vae.VAE, "forward")], gpt: [(gpt.GPT, "forward"), (gpt, "orthogonalize")],
        aae: [(aae.AdversarialAE, name)
              for name in ("forward", "autoencoder_loss", "discriminator_loss")]}[module]]
    seconds = 0.0

    def timed(function):
        def wrapper(*args, **kwargs):
            nonlocal seconds
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if torch.is_grad_enabled() or function is orthogonalize:  # not in evaluation
                seconds += time.perf_counter() - start
            return result

        return wrapper

    orthogonalize = gpt.orthogonalize
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(without_pictures(module))
        for owner, name in parts:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        status, _, err = run_main(module.main, *argv, "--device", "cpu", "--out-dir",
                                  f"{folder}/run")
        assert status == 0, err
        args = json.loads(Path(folder, "run/args.json").read_text())
        row = json.loads(Path(folder, "run/metrics.jsonl").read_text().splitlines()[-1])
    batches_per_s = (row.get("images_per_s") or row["tokens_per_s"] / args["block_size"]
                     ) / args["batch_size"]
    return 1 - seconds / row["step"] * batches_per_s


def in_turn(runs, *ways):
    """-> for each way, a function without arguments, the figures of its `runs` calls"""
    return zip(*([way() for way in ways] for _ in range(runs)), strict=True)


def ratio(ours, theirs):
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def bench_images(module, ordinary_step, data_dir, runs=5, number=6400):
    batch_size, script = module.parse_args([]).batch_size, f"{module.__name__}.py"
    ordinary, ours = in_turn(
        runs, lambda: ordinary_images_per_s(ordinary_step(), data_dir, number, batch_size),
        lambda: script_images_per_s(script, data_dir, number))
    print(f"training, images/s: {script} {statistics.median(ours):,.0f}, the ordinary way "
          f"{statistics.median(ordinary):,.0f}, ratio {ratio(ours, ordinary)}", flush=True)


def per_second(number, work, *arguments):
    start = time.perf_counter()
    work(*arguments)
    return number / (time.perf_counter() - start)


def bench_generation(runs=7, number=200):
    """A GPT-2 124M with random weights, batch 1, after a prompt of 32 tokens: beside transformers,
    and beside its matrix products alone, as gpt.linear and as torch's F.linear."""
    model = gpt.GPT(gpt.GPTConfig(50257, 1024, *gpt.SIZES["gpt2"])).eval()
    idx = torch.randint(50257, (1, 32))
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "wpe.weight"]
    rows = {n_in: torch.randn(1, 1, n_in) for n_in in (768, 3072)}

    @torch.inference_mode()
    def products():
        for weight in matrices * number:
            F.linear(rows[weight.size(1)], weight)

    ways = {
        "gpt.py": lambda: model.generate(idx, number, do_sample=False),
        "its matrix products alone": products,
    }
    if find_spec("transformers"):
        import transformers

        transformers.logging.set_verbosity_error()
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
        ways["transformers"] = lambda: theirs.generate(
            idx, attention_mask=torch.ones_like(idx), min_new_tokens=number,
            max_new_tokens=number, do_sample=False, pad_token_id=0)
    ours, *others = in_turn(runs, *(lambda way=way: per_second(number, way)
                                    for way in ways.values()))
    print(f"generation, tokens/s: gpt.py {statistics.median(ours):.1f}")
    for name, rates in zip(list(ways)[1:], others, strict=True):
        print(f"    {name} {statistics.median(rates):.1f}, ratio {ratio(ours, rates)}", flush=True)


def bench_training(text, runs=11, steps=100):
    """A GPT of the size and batch that `gpt.py train` takes on a CPU, by AdamW, beside the same of
    transformers."""
    recipe = gpt.RECIPES["cpu"]
    T, B = recipe["block_size"], recipe["batch_size"]

    def ours():
        with tempfile.TemporaryDirectory() as folder, without_pictures(gpt):
            status, _, err = run_main(gpt.main, "train", "--text", text, "--limit", 100_000,
                                      "--max-steps", steps, "--device", "cpu", "--optimizer",
                                      "adamw", "--out-dir", f"{folder}/run")
            assert status == 0, err
            rows = Path(folder, "run/metrics.jsonl").read_text().splitlines()
            return json.loads(rows[-1])["tokens_per_s"]

    def theirs():
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=len(tokenizer), n_positions=T, n_embd=recipe["n_embd"],
            n_layer=recipe["n_layer"], n_head=recipe["n_head"], resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=None, eos_token_id=None))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))

        def train():
            for _ in range(steps):
                x = tokens[torch.randint(len(tokens) - T, (B, 1)) + torch.arange(T)]
                model(input_ids=x, labels=x).loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

        return per_second(steps * B * T, train)

    if not find_spec("transformers"):
        print(f"training, tokens/s: gpt.py {ours():,}")
        return
    import transformers

    transformers.logging.set_verbosity_error()
    content = Path(text).read_text(encoding="utf-8")[:100_000]
    tokenizer = gpt.CharTokenizer("".join(sorted(set(content))))
    tokens = torch.tensor(tokenizer.encode(content))
    ours, theirs = in_turn(runs, ours, theirs)
    print(f"training, tokens/s: gpt.py {statistics.median(ours):,.0f}, transformers "
          f"{statistics.median(theirs):,.0f}, ratio {ratio(ours, theirs)}", flush=True)


def bench_memory(T=1024):
    """What training takes on each process, counted on tensors without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for size in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        kept = {}

        def count(tensor, kept=kept):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
            return tensor

        with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            model = gpt.GPT(gpt.GPTConfig(50257, T, *gpt.SIZES[size]))
            x = torch.zeros(1, T + 1, dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16):
                model(x[:, :-1], x[:, 1:])
        weights = [p.untyped_storage() for p in model.parameters()]
        parameters = sum(p.numel() for p in model.parameters())
        copies = 2 * (sum(p.numel() for p in model.parameters() if p.dim() == 2)
                      - model.wpe.weight.numel())
        rest = sum(storage.nbytes() for storage in kept.values()) - copies - sum(
            w.nbytes() for w in weights if w._cdata in kept)
        print(f"training {size}: {16 * parameters / 1e9:.2f} GB for weights, gradients and AdamW, "
              f"{copies / 1e9:.2f} GB for bfloat16 copies, {rest / 1e9:.2f} GB and "
              f"{gpt.flops_per_token(model) * T / 1e12:.2f} TFLOP for each sequence of {T:,} "
              "tokens", flush=True)


ATTENTION = """
import sys, time, torch, gpt
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

def memory(field):
    status = open("/proc/self/status").read()
    return int(status.split(field + ":")[1].split()[0]) / 1024  # kB -> MB

def step(T):
    q, k, v = torch.randn(3, 1, 12, T, 64, requires_grad=True)
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    start, before = time.perf_counter(), memory("VmRSS")
    if sys.argv[1] == "plain":
        y = gpt.attention(q, k, v, mask)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y.sum().backward()
    return 1000 * (time.perf_counter() - start), before

step(16)
T = int(sys.argv[2])
open("/proc/self/clear_refs", "w").write("5")  # VmHWM, the highest VmRSS, starts anew
_, before = step(T)
peak = memory("VmHWM") - before
print(sorted(step(T)[0] for _ in range(5))[2], peak)
"""


def bench_attention():
    """Q3.1 in figures: forward and backward pass of one layer's attention, 12 heads of 64."""
    for T in (256, 1024, 4096):
        for way in ("plain", "fused"):
            result = subprocess.run([sys.executable, "-c", ATTENTION, way, str(T)], check=True,
                                    capture_output=True, text=True, cwd=HERE)
            milliseconds, megabytes = map(float, result.stdout.split())
            print(f"attention over {T:,} tokens, {way}: {milliseconds:,.1f} ms, peak memory "
                  f"{megabytes:,.0f} MB", flush=True)


def bench_loading(runs=5):
    with tempfile.TemporaryDirectory() as folder:
        write_hub_folder(folder, gpt.GPT(gpt.GPTConfig(50257, 1024, *gpt.SIZES["gpt2"])))
        seconds, peaks = zip(*(load_apart(folder) for _ in range(runs)), strict=True)
    print(f"loading 124M parameters: {statistics.median(seconds):.2f} s, peak memory "
          f"{max(peaks):.2f} times that of the weights", flush=True)


def bench_tokenizer(data_dir, runs=5):
    """Tiny Shakespeare, each time with a new tokenizer, which knows no word yet."""
    text = Path(data_dir, "tinyshakespeare.txt").read_text(encoding="utf-8")
    files = [Path(data_dir, "gpt2", name) for name in ("vocab.json", "merges.txt")]
    tokenizers = [gpt.BPETokenizer(*files) for _ in range(runs)]
    tokenizers[0].encode(" ")  # makes the pattern that all use
    megabytes = len(text.encode()) / 1e6
    new, again = ([per_second(megabytes, tokenizer.encode, text) for tokenizer in tokenizers]
                  for _ in range(2))
    long = sum(1 / per_second(1, tokenizers[0].encode, text)
               for text in ("a" * 200_000, " " * 1_000_000))
    print(f"encoding, MB/s: {statistics.median(new):.1f}, with all words known "
          f"{statistics.median(again):.1f}; 200,000 times a, and a million spaces: {long:.1f} s")


def bench(data_dir):
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians, and ratios with "
          "their range, of runs in turn", flush=True)
    bench_images(vae, ordinary_vae, data_dir)
    bench_images(aae, ordinary_aae, data_dir)
    text = Path(data_dir, "tinyshakespeare.txt")
    if not text.exists():
        text = HERE / "README.md"
    for module, *argv in (
            (vae, "--data-dir", data_dir, "--limit", 64 * 200, "--epochs", 1),
            (aae, "--data-dir", data_dir, "--limit", 32 * 200, "--epochs", 1),
            (gpt, "train", "--text", text, "--limit", 100_000, "--max-steps", 200)):
        print(f"share of a step of {module.__name__}.py outside forward and backward pass: "
              f"{overhead_share(module, *argv):.1%}", flush=True)
    bench_training(text)
    bench_memory()
    bench_generation()
    bench_attention()
    bench_loading()
    if text.name != "README.md" and Path(data_dir, "gpt2").is_dir():
        bench_tokenizer(data_dir)
    else:
        print(f"encoding: not measured without {data_dir}/tinyshakespeare.txt and {data_dir}/gpt2")


class Result(unittest.TextTestResult):
    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bench"]:
        bench(*(sys.argv[2:] or [DATA_DIR or "data"]))
    else:
        program = unittest.main(exit=False, testRunner=unittest.TextTestRunner(
            resultclass=Result, verbosity=2))
        result = program.result
        failed = len(result.failures) + len(result.errors)
        for test, reason in result.skipped:
            print(f"skipped {test}: {reason}")
        print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped")
        sys.exit(bool(failed))
